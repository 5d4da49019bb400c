"""Returns a run to an older state, as rollback_policy.py decides.

if not roll_back(run, reason):    # the run stops; run.guard_stop is the reason
"""

from __future__ import annotations

from typing import Any

import numpy as np

from run_folder.checkpoint import CheckpointError, load_checkpoint
from training.rollback_policy import MAX_ROLLBACKS, SUSPECT_STEPS
from training.saving import check_save, restore, save
from training.state import TrainingRun

# These keep their present values in a rollback: clocks run on, `best` is still on disk, and the
# budget of the learning rate's schedule is the one that this start fixed.
NOT_ROLLED_BACK: tuple[str, ...] = ("seconds", "elapsed", "best_val", "best_epoch")
NOT_ROLLED_BACK += ("validated_seconds", "schedule_steps", "schedule_seconds")


def roll_back(run: TrainingRun, reason: str) -> bool:
    """Return to an older state with a lower lr and other data, or stop after too many rollbacks.

    If no step checkpoint can be read, training goes on from the present state with the lower lr.
    Returns False, with the reason in `run.guard_stop`, if the run must stop.
    """
    check_save(run, wait=True)  # the step checkpoints and best_val must match the disk
    state, p, flags, policy = run.state, run.state.progress, run.flags, run.state.policy
    event, refused, kept = p.step, state.guard.refused, {n: getattr(p, n) for n in NOT_ROLLED_BACK}
    if not policy.may_roll_back(event):
        run.guard_stop = f"{reason}, after {MAX_ROLLBACKS} rollbacks"
        return False
    suspects, scale, was_goal = last_windows(run), p.lr_scale, p.lr_goal
    goal = was_goal
    found = find_candidate(run)
    if found is None:
        state.guard.forget()
    else:
        checkpoint, path = found
        restore(state, checkpoint, path, run.world)
        # A changed --lr may be higher than the lr that this state was stable with.
        goal = min(goal, p.lr_goal * checkpoint["flags"]["lr"] / flags.lr)
    for name, value in kept.items():
        setattr(p, name, value)
    # If trouble returns only once the lr is back at its goal, the lr is the cause.
    came_back = bool(policy.events) and scale >= was_goal
    p.lr_goal = goal * (flags.panic_lr_mul if came_back else 1.0)
    p.lr_scale = min(scale, p.lr_goal) * flags.panic_lr_mul
    state.guard.refused = refused
    state.optimizer.zero_grad(set_to_none=True)
    place = {"epoch": p.epoch, "position": p.position, "windows": run.order.num_windows}
    run.metrics.rewind(p.step)
    policy.roll_back(event, p.step, suspects=suspects, **place)
    report_rollback(run, event, reason, found[1] if found else None)
    save(run)
    check_save(run, wait=True)  # until then, `latest` may need the step checkpoints removed below
    if run.world.is_first:
        run.files.prune_ring(newest=p.step)
    return True


def last_windows(run: TrainingRun) -> np.ndarray[Any, Any]:
    """Return the windows of the epoch's last SUSPECT_STEPS steps, at most a quarter of all."""
    p, order = run.state.progress, run.order
    count = min(SUSPECT_STEPS * run.windows_per_step, order.num_windows // 4)
    return order.permutation(p.epoch)[max(0, p.position - count) : p.position]


def find_candidate(run: TrainingRun) -> tuple[dict[str, Any], str] | None:
    """Return the step checkpoint to go back to and its file name, or None; rank 0 reads it."""
    found = read_candidate(run) if run.world.is_first else None
    checkpoint = run.world.share(found[0] if found else None)
    return (checkpoint, run.world.from_first(found[1] if found else "")) if checkpoint else None


def read_candidate(run: TrainingRun) -> tuple[dict[str, Any], str] | None:
    """Read the policy's first candidate that is readable and fits model and data, or None."""
    for step in run.state.policy.candidates(run.state.progress.step, run.files.ring_steps()):
        path = run.files.ring_file(step)
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            run.console.problem(f"trying an older one: {error}")
            continue
        shapes = {n: t.shape for n, t in run.state.model.state_dict().items()}
        fits = shapes == {n: t.shape for n, t in checkpoint["model"].items()}
        if fits and {**checkpoint["data"], "size": 0} == {**run.data, "size": 0}:
            return checkpoint, path.name
        run.console.problem(f"{path}: of other data or another architecture; trying an older one")
    return None


def report_rollback(run: TrainingRun, event: int, reason: str, file: str | None) -> None:
    """Write the metrics row and console line of a rollback from step `event`."""
    p, change = run.state.progress, run.state.policy.order_changes[-1]
    run.metrics.write(
        "rollback",
        step=event,
        epoch=p.epoch + 1,
        to_step=p.step,
        file=file,
        lr_scale=p.lr_scale,
        reason=reason,
        skipped_windows=len({*change["suspects"], *change["excluded_windows"]}),
        rollbacks=len(run.state.policy.events),
    )
    where = (
        f"back to step {p.step}" if file else "no step checkpoint could be read, weights are kept"
    )
    run.console.problem(
        f"{reason} at step {event}; {where}, lr is scaled by {p.lr_scale:g} now, the last windows "
        "before it are left out"
    )
