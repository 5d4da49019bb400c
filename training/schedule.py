"""The learning rate of a run: a function of the step or, with a time budget, of training seconds.

    lr = lr_at_step(100, 10_000, lr=2e-4, eta_min=1e-5, warmup_ratio=0.01)
    lr = learning_rate(run)           # learning rate of the run's next step

The budget is fixed at a run's first start (for wsd at every start before its cooldown) and saved
with the progress, so lengthening a run never raises a learning rate that has already fallen.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from cli.command_line import UsageError

if TYPE_CHECKING:
    from training.state import TrainingRun


def lr_at_step(
    step: float,
    total: float,
    *,
    lr: float,
    eta_min: float,
    warmup_ratio: float,
    schedule: str = "cosine",
    cooldown: float = 0.2,
) -> float:
    """Return the learning rate of step number `step` of `total`, counted from 1.

    It rises linearly over the share `warmup_ratio`. Then `cosine` falls to `eta_min` (Loshchilov
    and Hutter 2017); `wsd` (warm-up, stable, decay: Hu et al. 2024, section 4; Haegele et al. 2024)
    stays at `lr` and falls linearly over the last share `cooldown`. Past `total` the learning rate
    stays at `eta_min`. `step` and `total` may also be seconds of a time budget.
    """
    warmup = warmup_ratio * total
    if step < warmup:
        return lr * step / warmup
    if schedule == "wsd":
        left = max(0.0, total - step) / (cooldown * total)
        return eta_min + (lr - eta_min) * min(1.0, left)
    progress = min(1.0, (step - warmup) / max(total - warmup, 1e-9))
    return eta_min + (lr - eta_min) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate(run: TrainingRun) -> float:
    """Return the learning rate of the next step; each parameter group multiplies it by a factor."""
    flags = run.flags
    names = ("lr", "eta_min", "warmup_ratio", "schedule", "cooldown")
    shape = {name: getattr(flags, name) for name in names}
    return run.state.progress.lr_scale * lr_at_step(*schedule_position(run), **shape)


def schedule_position(run: TrainingRun) -> tuple[float, float]:
    """Return the next step's position in the schedule and the schedule's end: steps or seconds."""
    p = run.state.progress
    if p.schedule_seconds:
        # The next step's duration is not added: its estimate can shrink, and the lr would rise.
        return max(p.seconds, 1e-3 * p.schedule_seconds), p.schedule_seconds
    return p.step + 1, p.schedule_steps


def cooldown_begins(run: TrainingRun) -> bool:
    """Return whether the cooldown of wsd begins with the next step."""
    if run.flags.schedule != "wsd" or run.state.progress.cooling:
        return False
    position, total = schedule_position(run)
    return position > (1 - run.flags.cooldown) * total


def settle_schedule(run: TrainingRun, checkpoint: dict[str, Any] | None) -> None:
    """Fix the schedule's budget: for cosine at the first start, for wsd at each start.

    Raises:
        UsageError: a longer wsd run would raise a learning rate whose cooldown has begun.
    """
    p, flags = run.state.progress, run.flags
    if checkpoint is not None and "schedule_seconds" not in checkpoint["progress"]:
        p.schedule_seconds = checkpoint["flags"].get("max_seconds") or 0.0
    if checkpoint is not None and flags.schedule == "cosine":
        return
    longer = run.planned_steps > p.schedule_steps
    if flags.max_seconds and p.schedule_seconds:
        longer = flags.max_seconds > p.schedule_seconds
    if longer and p.cooling:
        raise UsageError(
            f"the run cannot be made longer: its cooldown has begun before step {p.step}; give "
            "--resume the archive that was saved when it began, or --init-from for a new schedule"
        )
    p.schedule_steps, p.schedule_seconds = run.planned_steps, flags.max_seconds or 0.0


def schedule_words(progress: dict[str, Any], saved: dict[str, Any]) -> str:
    """Return the budget of a saved run's schedule as `1740 steps` or `600 training seconds`."""
    seconds = progress.get("schedule_seconds", saved.get("max_seconds"))
    return f"{seconds:g} training seconds" if seconds else f"{progress['schedule_steps']} steps"
