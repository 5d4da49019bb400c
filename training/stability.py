"""What keeps a run alive: averaged weights, the guard that refuses bad steps, the rescue ladder.

    reason = guard.judge(loss, grad_norm, ce)           # None: the step is taken
    if reason is None:
        optimizer.step(); ema.update(step); guard.accept(loss, grad_norm, ce)
    else:
        guard.refuse(); ladder.refuse(windows)
        trouble = ladder.trouble(guard.refused_in_a_row)    # not None: roll back, or stop

Objects with state; no files, no flags. Guard and ladder round-trip through `state_dict`; averaged
weights are loaded as a model's.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
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
CE_MARGIN = 1.0  # nats above guessing, ln V, that a codebook's cross-entropy may reach in a step
LASTING_CE_MARGIN = 0.1  # nats above guessing that its average may reach
CE_AVERAGE = 1 / 32  # weight of a step in that average


class Guard:
    """Refuses a step whose loss or gradient norm does not belong to the run's recent past.

    A step is refused when its loss or gradient norm is not finite; when a codebook's cross-entropy
    exceeds ln V + 1; or when the loss, or the logarithm of the gradient norm, lies more than
    `factor` standard deviations above the mean of the last `memory` accepted steps. It compares
    first and adds afterwards, and only accepted steps are added, so neither a spike nor a NaN can
    widen its limits. The deviations have floors, lest a calm stretch make it refuse everything.
    Where the level changes for a reason, such as other flags, the caller says so with `forget`.
    """

    def __init__(
        self, vocab_sizes: Sequence[int], *, factor: float = 6.0, memory: int = 128
    ) -> None:
        self.factor, self.memory = factor, memory
        self.guessing = [math.log(v) for v in vocab_sizes]  # ce [K] of an even guess
        self.losses: deque[float] = deque(maxlen=memory)
        self.log_norms: deque[float] = deque(maxlen=memory)
        self.refused_in_a_row = 0
        self.refused = 0
        self.recent_ce: list[float] = []  # [K], averaged over the last accepted steps

    def judge(self, loss: float, grad_norm: float, ce: Sequence[float]) -> str | None:
        """Why a step must be refused, or None; ce [K] in nats, grad norm before clipping."""
        if not math.isfinite(loss) or not all(map(math.isfinite, ce)):
            return "loss is not finite"
        if not math.isfinite(grad_norm):
            return "gradient norm is not finite"
        for k, (value, guess) in enumerate(zip(ce, self.guessing, strict=True)):
            if value > guess + CE_MARGIN:
                return (
                    f"cross-entropy of codebook {k} is {value:.3f}, over ln V + 1 = {guess + 1:.3f}"
                )
        if self.factor and len(self.losses) >= WARM_UP:
            limit = _limit(self.losses, self.factor, LOSS_SIGMA_FLOOR * _mean(self.losses))
            if loss > limit:
                return f"loss {loss:.4f} is over {limit:.4f}, {self.factor:g} sigma above its mean"
            limit = math.exp(_limit(self.log_norms, self.factor, NORM_SIGMA_FLOOR))
            if grad_norm > limit:
                return f"gradient norm {grad_norm:.3f} is over {limit:.3f}, {self.factor:g} sigma"
        return None

    def accept(self, loss: float, grad_norm: float, ce: Sequence[float] = ()) -> None:
        """Add an accepted step to the past; ce [K] in nats."""
        self.losses.append(loss)
        self.log_norms.append(math.log(max(grad_norm, 1e-12)))
        self.refused_in_a_row = 0
        past = self.recent_ce or ce
        self.recent_ce = [a + CE_AVERAGE * (x - a) for a, x in zip(past, ce, strict=True)]

    def refuse(self, *, in_a_row: bool = True) -> None:
        """Count a refused step; an fp16 overflow is no sign of trouble and not counted in a row."""
        self.refused += 1
        self.refused_in_a_row += in_a_row

    def worse_than_guessing(self) -> str | None:
        """Which codebook's cross-entropy has lately averaged over ln V + 0.1, or None."""
        for k, (value, guess) in enumerate(zip(self.recent_ce, self.guessing, strict=False)):
            if value > guess + LASTING_CE_MARGIN:
                return f"cross-entropy of codebook {k} averages {value:.3f}, ln V is {guess:.3f}"
        return None

    def forget(self) -> None:
        """Start to learn the run's level anew."""
        self.losses.clear()
        self.log_norms.clear()
        self.recent_ce = []
        self.refused_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {
            "losses": list(self.losses),
            "log_norms": list(self.log_norms),
            "refused_in_a_row": self.refused_in_a_row,
            "refused": self.refused,
            "recent_ce": list(self.recent_ce),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s result; `factor` and `memory` stay as constructed."""
        self.losses = deque(state["losses"], maxlen=self.memory)
        self.log_norms = deque(state["log_norms"], maxlen=self.memory)
        self.refused_in_a_row, self.refused = state["refused_in_a_row"], state["refused"]
        self.recent_ce = list(state.get("recent_ce", ()))


def _limit(past: deque[float], factor: float, sigma_floor: float) -> float:
    """`factor` standard deviations, each `sigma_floor` at least, above the mean of the past."""
    centre = _mean(past)
    sigma = math.dist(past, [centre] * len(past)) / math.sqrt(len(past))  # no Python loop
    return centre + factor * max(sigma, sigma_floor)


def _mean(values: deque[float]) -> float:
    return sum(values) / len(values)


# --- the rescue ladder ---------------------------------------------------------------------------

REFUSED_IN_A_ROW = 10  # the next rung after so many
REFUSED_LATELY, LATELY = 10, 1000  # or after so many of the last so many steps, taken or refused
ROLLBACK_STEPS = 100  # a state so much older than the event has not seen what led to it
MAX_ROLLBACKS = 3  # within FORGIVEN_AFTER steps; then the run stops
FORGIVEN_AFTER = 5000  # steps beyond an event, after which it counts no more
SUSPECT_STEPS = 30  # whose windows the rest of the epoch leaves out: refused and accepted ones
MAX_BARRED = 0.2  # share of the windows that may be left out for good


class Ladder:
    """Decides what follows when skipping a step does not help: roll back, three times, then stop.

    A refused step costs nothing but its windows. Ten in a row mean that the weights are damaged,
    ten of the last thousand that they, or the data, soon will be: the run then goes back to a state
    at least 100 steps older, with a lower learning rate, without the windows before the event and
    in another order (Chowdhery et al. 2022, section 5.1). Windows of the steps whose refusal led
    there are not drawn again at all, so that bad windows in the data cannot cause it for ever.
    """

    STATE = ("attempts", "refusals", "events", "detours", "kept_step")

    def __init__(self) -> None:
        self.attempts = 0  # steps, taken or refused; never goes back
        self.refusals: list[dict[str, Any]] = []  # of the last LATELY steps: attempt, windows
        self.events: list[int] = []  # steps that were rolled back from and are not forgiven yet
        self.detours: list[dict[str, Any]] = []  # of the data order; see npq_dataset.EpochOrder
        self.kept_step: int | None = None  # newest step checkpoint

    def attempt(self) -> None:
        """Count a step, taken or refused."""
        self.attempts += 1

    def refuse(self, windows: Iterable[int]) -> None:
        """Remember the windows of the refused step just counted."""
        self.refusals.append({"attempt": self.attempts, "windows": [int(w) for w in windows]})
        oldest = self.attempts - LATELY
        self.refusals = [r for r in self.refusals if r["attempt"] > oldest]

    def trouble(self, refused_in_a_row: int) -> str | None:
        """Why the next rung is due, or None; ask after a refusal."""
        if refused_in_a_row >= REFUSED_IN_A_ROW:
            return f"{REFUSED_IN_A_ROW} steps in a row were refused"
        if len(self.refusals) >= REFUSED_LATELY:
            return f"{REFUSED_LATELY} of the last {LATELY} steps were refused"
        return None

    def may_roll_back(self, step: int) -> bool:
        """Whether a rung is left; forgives events that lie far back."""
        self.events = [e for e in self.events if e + FORGIVEN_AFTER > step]
        return len(self.events) < MAX_ROLLBACKS

    def retreats(self, step: int, available: Iterable[int]) -> list[int]:
        """Which of the available states to try, best first.

        The newest that is old enough, then older ones; where none is, the oldest.
        """
        oldest_first = sorted(available)
        old_enough = [s for s in oldest_first if s <= step - ROLLBACK_STEPS]
        too_young = [s for s in oldest_first if step - ROLLBACK_STEPS < s <= step]
        return old_enough[::-1] + too_young

    def roll_back(
        self,
        event: int,
        step: int,
        *,
        epoch: int,
        position: int,
        suspects: Iterable[int],
        windows: int,
    ) -> None:
        """Record that trouble at step `event` led back to `step`, at a place of the data order.

        `position` counts windows of the epoch. `suspects`, numbers of windows, are left out of the
        rest of it; windows of refused steps of the whole run, MAX_BARRED of all `windows` at most.
        """
        room = int(MAX_BARRED * windows) - sum(len(d["barred"]) for d in self.detours)
        refused = Counter(w for r in self.refusals for w in r["windows"])
        self.events.append(event)
        self.kept_step = step
        self.detours.append(
            {
                "epoch": epoch,
                "position": position,
                "suspects": [int(w) for w in suspects],
                "barred": sorted(w for w, _ in refused.most_common(max(0, room))),
            }
        )
        self.refusals = []

    def forget_windows(self) -> None:
        """Drop what refers to windows by number, after the data changed."""
        self.refusals, self.detours = [], []

    def keep_due(self, step: int, planned_steps: int) -> bool:
        """Whether a step checkpoint is due: at the start, and every `keep_interval` steps."""
        if step == self.kept_step:
            return False
        return self.kept_step is None or step % keep_interval(planned_steps) == 0

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {name: copy.deepcopy(getattr(self, name)) for name in self.STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s result."""
        vars(self).update({n: copy.deepcopy(state[n]) for n in self.STATE if n in state})


def keep_interval(planned_steps: int) -> int:
    """Steps between the step checkpoints to roll back to; a pure function, so a resume agrees.

    A twentieth of the run, but not below 100, where saving a tiny model would begin to show, and
    not above 500: minutes of a large one.
    """
    return min(500, max(100, planned_steps // 20))


def lr_doubling(planned_steps: int) -> int:
    """Accepted steps in which a cut learning rate doubles on its way back.

    A hundredth of the run: three cuts then cost 3 % of it. At most 25; at least 4, over which
    trouble that is the rate's fault has shown itself.
    """
    return min(25, max(4, planned_steps // 100))


# --- soundness -----------------------------------------------------------------------------------


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity; one host sync."""
    if not tensors:
        return []
    # A sum is not finite if one of its terms is not, and takes one pass without a copy.
    sums = torch.stack([t.sum(dtype=torch.float32) for t in tensors.values()])
    return [name for name, ok in zip(tensors, sums.isfinite().tolist(), strict=True) if not ok]
