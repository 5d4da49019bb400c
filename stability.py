"""What keeps a run alive: averaged weights and the guard that refuses bad steps.

Objects with state; no files, no flags. Both round-trip through `state_dict`.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

# --- averaged weights ----------------------------------------------------------------------------


M = TypeVar("M", bound=nn.Module)


class Ema(Generic[M]):
    """Exponential moving average of a model's weights, kept as a second model.

    A model of its own is evaluated as it stands: nothing is swapped into the trained weights, so
    nothing can be left swapped when an evaluation is interrupted. It costs the same memory.
    """

    def __init__(self, model: M, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.averaged: list[Tensor] = list(self.model.parameters())
        self.trained: list[Tensor] = list(model.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the trained weights after the step-th optimizer step (counted from 1).

        The decay warms up as (1 + step) / (10 + step), so that a short run is not an average over
        its random start (Abadi et al., TensorFlow's ExponentialMovingAverage, `num_updates`).
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averaged, self.trained, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, under the model's own names."""
        return dict(self.model.state_dict())


# --- the guard -----------------------------------------------------------------------------------

WARM_UP = 32  # accepted steps before the statistical limits are used
LOSS_SIGMA_FLOOR = 0.04  # of the mean: six of these let a loss rise by 24 %
NORM_SIGMA_FLOOR = 0.5  # of log grad norm: six of these let it rise to 20 times
CE_MARGIN = 1.0  # nats above guessing, ln V, that a codebook's cross-entropy may reach


class Guard:
    """Refuses a step whose loss or gradient norm does not belong to the run's recent past.

    A step is refused when its loss or gradient norm is not finite; when a codebook's cross-entropy
    exceeds ln V + 1; or when the loss, or the logarithm of the gradient norm, lies more than
    `factor` standard deviations above the mean of the last `memory` accepted steps. It compares
    first and adds afterwards, and only accepted steps are added, so neither a spike nor a NaN can
    widen its limits. The deviations have floors, lest a calm stretch make it refuse everything.
    After a run of refusals the caller forgets the past with `forget`: a lasting change of level is
    learned, not fought.
    """

    def __init__(
        self, vocab_sizes: Sequence[int], *, factor: float = 6.0, memory: int = 128
    ) -> None:
        self.factor, self.memory = factor, memory
        self.ce_limits = [math.log(v) + CE_MARGIN for v in vocab_sizes]
        self.losses: deque[float] = deque(maxlen=memory)
        self.log_norms: deque[float] = deque(maxlen=memory)
        self.refused_in_a_row = 0
        self.refused = 0

    def judge(self, loss: float, grad_norm: float, ce: Sequence[float]) -> str | None:
        """Why a step must be refused, or None; ce [K] in nats, grad norm before clipping."""
        if not math.isfinite(loss) or not all(map(math.isfinite, ce)):
            return "loss is not finite"
        if not math.isfinite(grad_norm):
            return "gradient norm is not finite"
        for k, (value, limit) in enumerate(zip(ce, self.ce_limits, strict=True)):
            if value > limit:
                return f"cross-entropy of codebook {k} is {value:.3f}, over ln V + 1 = {limit:.3f}"
        if self.factor and len(self.losses) >= WARM_UP:
            limit = _limit(self.losses, self.factor, LOSS_SIGMA_FLOOR * mean(self.losses))
            if loss > limit:
                return f"loss {loss:.4f} is over {limit:.4f}, {self.factor:g} sigma above its mean"
            limit = math.exp(_limit(self.log_norms, self.factor, NORM_SIGMA_FLOOR))
            if grad_norm > limit:
                return f"gradient norm {grad_norm:.3f} is over {limit:.3f}, {self.factor:g} sigma"
        return None

    def accept(self, loss: float, grad_norm: float) -> None:
        """Add an accepted step to the past."""
        self.losses.append(loss)
        self.log_norms.append(math.log(max(grad_norm, 1e-12)))
        self.refused_in_a_row = 0

    def refuse(self, *, in_a_row: bool = True) -> None:
        """Count a refused step; an fp16 overflow is no sign of trouble and not counted in a row."""
        self.refused += 1
        self.refused_in_a_row += in_a_row

    def forget(self) -> None:
        """Start to learn the run's level anew."""
        self.losses.clear()
        self.log_norms.clear()
        self.refused_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {
            "losses": list(self.losses),
            "log_norms": list(self.log_norms),
            "refused_in_a_row": self.refused_in_a_row,
            "refused": self.refused,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s result; `factor` and `memory` stay as constructed."""
        self.losses = deque(state["losses"], maxlen=self.memory)
        self.log_norms = deque(state["log_norms"], maxlen=self.memory)
        self.refused_in_a_row, self.refused = state["refused_in_a_row"], state["refused"]


def _limit(past: deque[float], factor: float, sigma_floor: float) -> float:
    centre = mean(past)
    sigma = math.sqrt(sum((x - centre) ** 2 for x in past) / len(past))
    return centre + factor * max(sigma, sigma_floor)


def mean(values: deque[float]) -> float:
    """Arithmetic mean of at least one value."""
    return sum(values) / len(values)
