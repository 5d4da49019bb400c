"""The learning rate over a run: a pure function of the step, or of the seconds of a budget.

    lr = lr_at_step(100, 10_000, lr=2e-4, eta_min=1e-5, warmup_ratio=0.01)
    lr = learning_rate(run)           # of the run's next step

The budget is fixed at a run's first start (for wsd at every start before its cooldown) and is part
of the saved progress, so a longer run never gets a risen learning rate back.
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
    """Learning rate of the step-th step (from 1) of `total`: linear warm-up, fall, then eta_min.

    `cosine` falls from the end of the warm-up on (Loshchilov and Hutter 2017). `wsd` stays, and
    falls linearly over the last share `cooldown` of the run (warm-up, stable, decay: Hu et al.
    2024, section 4; Haegele et al. 2024). Past `total` it is eta_min for ever. Steps may also be
    seconds of a time budget.
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
    """Learning rate of the next step; groups of parameters run at multiples of it."""
    flags = run.flags
    names = ("lr", "eta_min", "warmup_ratio", "schedule", "cooldown")
    shape = {name: getattr(flags, name) for name in names}
    return run.state.progress.lr_scale * lr_at_step(*schedule_position(run), **shape)


def schedule_position(run: TrainingRun) -> tuple[float, float]:
    """Position of the next step in the schedule, and the schedule's end: steps, or seconds."""
    p = run.state.progress
    if p.schedule_seconds:
        # Seconds alone: an estimate of the step's own could fall, and the rate would rise.
        return max(p.seconds, 1e-3 * p.schedule_seconds), p.schedule_seconds
    return p.step + 1, p.schedule_steps


def cooldown_begins(run: TrainingRun) -> bool:
    """Whether the next step is the first that wsd lowers the learning rate for."""
    if run.flags.schedule != "wsd" or run.state.progress.cooling:
        return False
    position, total = schedule_position(run)
    return position > (1 - run.flags.cooldown) * total


def settle_schedule(run: TrainingRun, checkpoint: dict[str, Any] | None) -> None:
    """Fix the budget that the rate falls over: for a cosine at the first start, for wsd at each.

    Raises:
        UsageError: a longer run would raise a cooling rate again.
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
            f"a longer run is asked for, but its cooldown has begun before step {p.step}: give "
            "--resume the archive that was kept when it began, or --init-from for a new schedule"
        )
    p.schedule_steps, p.schedule_seconds = run.planned_steps, flags.max_seconds or 0.0


def schedule_words(progress: dict[str, Any], saved: dict[str, Any]) -> str:
    """`1740 steps` or `600 training seconds`: the budget of a saved run's schedule."""
    seconds = progress.get("schedule_seconds", saved.get("max_seconds"))
    return f"{seconds:g} training seconds" if seconds else f"{progress['schedule_steps']} steps"
