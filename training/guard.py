"""The guard: refuses a step whose loss or gradient norm is far above the run's recent values.

reason = guard.judge(loss, grad_norm, ce)  # None: the step is taken
if reason is None:
    guard.accept(loss, grad_norm, ce)
else:
    guard.refuse()
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

WARM_UP = 32  # accepted steps before the statistical limits are used
LOSS_SIGMA_FLOOR = 0.04  # share of the mean loss; at factor 6 the loss may rise by 24 %
NORM_SIGMA_FLOOR = 0.5  # nats of log grad norm; at factor 6 the norm may rise to 20 times
CE_MARGIN = 1.0  # nats above guessing, ln V, that a codebook's cross-entropy may reach in a step
LASTING_CE_MARGIN = 0.1  # nats above guessing that its moving average may reach
CE_AVERAGE = 1 / 32  # weight of one step in that moving average


class Guard:
    """Refuses a step whose loss or gradient norm is far above the run's recent values.

    A step is refused when its loss or gradient norm is not finite; when a codebook's cross-entropy
    exceeds ln V + 1; or when the loss, or the logarithm of the gradient norm, lies more than
    `factor` standard deviations above the mean of the last `memory` accepted steps. A step is
    compared before it is added, and only accepted steps are added, so neither a spike nor a NaN can
    widen the limits. The standard deviations have a minimum; otherwise the guard would refuse
    ordinary steps after a calm stretch. Call `forget` after a known change of level, such as other
    flags.
    """

    def __init__(
        self, vocab_sizes: Sequence[int], *, factor: float = 6.0, memory: int = 128
    ) -> None:
        self.factor, self.memory = factor, memory
        self.guessing = [math.log(v) for v in vocab_sizes]  # [K], ce of a uniform prediction, nats
        self.losses: deque[float] = deque(maxlen=memory)
        self.log_norms: deque[float] = deque(maxlen=memory)
        self.refused_in_a_row = 0
        self.refused = 0
        self.recent_ce: list[float] = []  # [K], moving average over accepted steps

    def judge(self, loss: float, grad_norm: float, ce: Sequence[float]) -> str | None:
        """Return why a step must be refused, or None to take it.

        `loss` and `ce` [K] are in nats per code, `grad_norm` is the norm before clipping.
        """
        if not math.isfinite(loss) or not all(map(math.isfinite, ce)):
            return "loss is not finite"
        if not math.isfinite(grad_norm):
            return "gradient norm is not finite"
        for k, (value, guess) in enumerate(zip(ce, self.guessing, strict=True)):
            if value > guess + CE_MARGIN:
                return (
                    f"cross-entropy of codebook {k} is {value:.3f}, above ln V + 1 = "
                    f"{guess + 1:.3f}"
                )
        if self.factor and len(self.losses) >= WARM_UP:
            limit = _limit(self.losses, self.factor, LOSS_SIGMA_FLOOR * _mean(self.losses))
            if loss > limit:
                return f"loss {loss:.4f} is above {limit:.4f}, {self.factor:g} sigma over its mean"
            limit = math.exp(_limit(self.log_norms, self.factor, NORM_SIGMA_FLOOR))
            if grad_norm > limit:
                return (
                    f"gradient norm {grad_norm:.3f} is above {limit:.3f}, {self.factor:g} sigma "
                    "over its mean"
                )
        return None

    def accept(self, loss: float, grad_norm: float, ce: Sequence[float] = ()) -> None:
        """Add an accepted step to the recent values; `ce` [K] in nats per code."""
        self.losses.append(loss)
        self.log_norms.append(math.log(max(grad_norm, 1e-12)))
        self.refused_in_a_row = 0
        past = self.recent_ce or ce
        self.recent_ce = [a + CE_AVERAGE * (x - a) for a, x in zip(past, ce, strict=True)]

    def refuse(self, *, in_a_row: bool = True) -> None:
        """Count a refused step; with `in_a_row` also as one of the refusals in a row.

        An fp16 overflow is ordinary and does not count as one in a row.
        """
        self.refused += 1
        self.refused_in_a_row += in_a_row

    def worse_than_guessing(self) -> str | None:
        """Return which codebook's moving average of cross-entropy exceeds ln V + 0.1, or None."""
        for k, (value, guess) in enumerate(zip(self.recent_ce, self.guessing, strict=False)):
            if value > guess + LASTING_CE_MARGIN:
                return f"cross-entropy of codebook {k} averages {value:.3f}, ln V is {guess:.3f}"
        return None

    def forget(self) -> None:
        """Drop the recent values, so that the limits are learned again."""
        self.losses.clear()
        self.log_norms.clear()
        self.recent_ce = []
        self.refused_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain lists and numbers."""
        return {
            "losses": list(self.losses),
            "log_norms": list(self.log_norms),
            "refused_in_a_row": self.refused_in_a_row,
            "refused": self.refused,
            "recent_ce": list(self.recent_ce),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`; `factor` and `memory` stay as constructed."""
        self.losses = deque(state["losses"], maxlen=self.memory)
        self.log_norms = deque(state["log_norms"], maxlen=self.memory)
        self.refused_in_a_row, self.refused = state["refused_in_a_row"], state["refused"]
        self.recent_ce = list(state.get("recent_ce", ()))


def _limit(past: deque[float], factor: float, sigma_floor: float) -> float:
    """Return mean + `factor` * max(standard deviation, `sigma_floor`) of the past values."""
    centre = _mean(past)
    sigma = math.dist(past, [centre] * len(past)) / math.sqrt(len(past))  # no Python loop
    return centre + factor * max(sigma, sigma_floor)


def _mean(values: deque[float]) -> float:
    return sum(values) / len(values)
