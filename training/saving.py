"""A run to its files and back: saving beside training, quarantine, restoring.

    save(run, is_best=True)            # begins; an unsound state goes to quarantine instead
    check_save(run)                    # reports it once it is on the disk
    restore(state, checkpoint, path, world)

Training goes on while a copy is written; one save is in flight at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cli.command_line import in_words
from cli.waiting import NoAnswerError, wait_for
from run_folder.checkpoint import CheckpointError, library_versions, rng_state, set_rng_state
from training.optimizer import state_tensors
from training.parallel import World
from training.state import Progress, Saving, TrainingRun, TrainState

MAX_FAILED_SAVES = 3
SAVE_PATIENCE = 3600.0  # seconds; gigabytes may go to a slow network folder


def checkpoint_of(run: TrainingRun) -> dict[str, Any]:
    """Everything needed to resume: plain types and tensors only."""
    state = run.state
    state.progress.elapsed += time.perf_counter() - run.started
    run.started = time.perf_counter()
    return {
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "guard": state.guard.state_dict(),
        "ladder": state.policy.state_dict(),
        "progress": dataclasses.asdict(state.progress),
        "rng": rng_state(),
        "architecture": state.model.config.to_dict(),
        "flags": vars(run.flags),
        "data": run.data,
        "history": run.metrics.history,
        "libraries": library_versions(),
        "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def save(
    run: TrainingRun,
    *,
    is_best: bool = False,
    archive: bool = False,
    ring: bool = False,
    may_fail: bool = False,
    is_sound: bool = False,
) -> str | None:
    """Begin to save `latest` and, if requested, `best`, an archive, a step checkpoint of the ring.

    The writing goes on beside. An unsound state goes to quarantine instead, at once; returns why.
    `is_sound`: the caller has just checked with `unsound`; else it is checked here.
    A failing disk is survived: three failures in a row, of saves that may not fail, raise OSError
    here or in `check_save`.
    """
    began = time.perf_counter()
    check_save(run, wait=True)
    p = run.state.progress
    started = time.perf_counter()
    run.last_save = started
    run.stop.save = False
    if not is_sound and (reason := unsound(run)) is not None:
        quarantine(run, reason)
        return reason
    if ring:
        run.state.policy.kept_step = p.step
    checkpoint = checkpoint_of(run)
    if not run.world.is_first:
        return None
    write = functools.partial(
        run.files.save,
        keep_archived=run.flags.keep_archived,
        tell=run.console.problem,
        best_epoch=p.best_epoch if is_best else None,
        archive_epoch=p.epoch if archive else None,
        ring_step=p.step if ring else None,
    )
    written = run.saver.start(checkpoint, write)
    stall = time.perf_counter() - began
    run.saving = Saving(written, p.step, p.epoch, is_best, archive, may_fail, started, stall)
    return None


def check_save(run: TrainingRun, *, wait: bool = False) -> Saving | None:
    """Report the save in flight if it has ended, or wait for it; returns it if it failed.

    Raises:
        OSError: it failed, as did MAX_FAILED_SAVES in a row.
        NoAnswerError: it did not end.
    """
    saving, p = run.saving, run.state.progress
    if saving is None or not (wait or saving.written.done()):
        return None
    run.saving = None
    try:
        path = wait_for(
            saving.written,
            lambda: (0, f"saving step {saving.step} to {run.files.folder}"),
            tell=run.console.problem,
            patience=SAVE_PATIENCE,
        )
    except NoAnswerError:
        run.failed_saves = MAX_FAILED_SAVES
        raise
    except OSError as error:
        run.failed_saves += not saving.may_fail
        run.console.problem(
            f"save at step {saving.step} failed ({in_words(error)}); {run.files.latest_in_words()}"
        )
        if run.failed_saves >= MAX_FAILED_SAVES:
            raise
        p.best_val, p.best_epoch = run.best_on_disk  # the next validation may find one again
        return saving
    run.failed_saves = 0
    run.best_on_disk = p.best_val, p.best_epoch
    seconds = round(time.perf_counter() - saving.started, 3)
    run.metrics.write(
        "save",
        step=saving.step,
        epoch=saving.epoch,
        file=path.name,
        save_seconds=seconds,
        stall_seconds=round(saving.stall, 4),
    )
    return None


def finish_save(run: TrainingRun) -> None:
    """At the end of a run: wait until the newest save is on the disk; if it fails, save again.

    Raises:
        OSError: MAX_FAILED_SAVES in a row failed.
    """
    p = run.state.progress
    best = p.best_val, p.best_epoch
    while True:
        failed = check_save(run, wait=True)
        if not any(run.world.largest(failed is not None)):
            return
        p.best_val, p.best_epoch = best
        save(run, is_best=bool(failed and failed.is_best), archive=bool(failed and failed.archive))


def unsound(run: TrainingRun) -> str | None:
    """Why the state must not become a checkpoint to go on from, or None; one host sync."""
    state = run.state
    tensors = {f"model {n}": t for n, t in state.model.state_dict().items()}
    tensors |= {f"ema {n}": t for n, t in state.ema.state_dict().items()}
    tensors |= dict(state_tensors(state.optimizer))
    bad = not_finite(tensors)
    return run.world.first(
        f"{len(bad)} tensors are not finite, first {bad[0]}"
        if bad
        else state.guard.worse_than_guessing()
    )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity; one host sync."""
    if not tensors:
        return []
    # A sum is not finite if one of its terms is not, and takes one pass without a copy.
    sums = torch.stack([t.sum(dtype=torch.float32) for t in tensors.values()])
    return [name for name, ok in zip(tensors, sums.isfinite().tolist(), strict=True) if not ok]


def quarantine(run: TrainingRun, reason: str) -> None:
    """Save an unsound state apart, for diagnosis, and report it; `latest` stays as it is."""
    p, checkpoint = run.state.progress, checkpoint_of(run)
    if not run.world.is_first:
        return
    try:
        name = run.files.quarantine(checkpoint, p.step, reason).name
    except OSError as error:
        name = f"nowhere ({in_words(error)})"
    run.metrics.write("quarantine", step=p.step, epoch=p.epoch + 1, reason=reason, file=name)
    run.console.problem(
        f"the state at step {p.step} is unsound ({reason}); it went to {name}, and "
        f"{run.files.latest_in_words()}"
    )


def restore(state: TrainState, checkpoint: dict[str, Any], path: str, world: World) -> None:
    """Put a checkpoint's weights, moments, guard and counters into a state.

    Weight decay and the like stay as the flags say; only the moments come from the file.

    Raises:
        CheckpointError: lists the tensors that do not fit.
    """
    load_weights(state.model, checkpoint["model"], path, world)
    load_weights(state.ema.model, checkpoint["ema"], path, world)
    now, before = state.optimizer.state_dict(), checkpoint["optimizer"]
    own, saved = members_of(now), members_of(before)
    if {n: "ns_steps" in m.group for n, m in own.items()} != {
        n: "ns_steps" in m.group for n, m in saved.items()
    }:
        raise CheckpointError(
            f"{path}: its optimizer state is of another --optim or of other parameters; start from "
            "its weights alone with --init-from"
        )
    for group in now["param_groups"]:
        group["lr"] = saved[group["param_names"][0]].group["lr"]  # each step sets it anew
    moments = before["state"]  # empty before the first step
    moments = {own[n].number: moments[m.number] for n, m in saved.items() if m.number in moments}
    moments = world.scatter_moments(moments, state.optimizer)
    state.optimizer.load_state_dict({**now, "state": moments})
    if checkpoint["scaler"] and state.scaler.is_enabled():
        state.scaler.load_state_dict(checkpoint["scaler"])
    state.guard.load_state_dict(checkpoint["guard"])
    known = {f.name for f in dataclasses.fields(Progress)}
    for name, value in checkpoint["progress"].items():
        if name in known:
            setattr(state.progress, name, value)
    set_rng_state(checkpoint["rng"])


class Member(NamedTuple):
    """A parameter of an optimizer: its group, and its number in the state dict."""

    group: dict[str, Any]
    number: int


def members_of(optimizer: dict[str, Any]) -> dict[str, Member]:
    """Return the members of an optimizer's state dict by name; other groups may have them."""
    return {
        name: Member(group, number)
        for group in optimizer["param_groups"]
        for name, number in zip(group.get("param_names", ()), group["params"], strict=False)
    }


def load_weights(
    model: torch.nn.Module, weights: dict[str, Tensor], path: str, world: World
) -> None:
    """Strict load; raises CheckpointError with the names and shapes that differ."""
    own = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    saved = {name: tuple(p.shape) for name, p in weights.items()}
    differing = sorted(n for n in own.keys() | saved.keys() if own.get(n) != saved.get(n))
    if differing:
        listed = ", ".join(f"{n} {saved.get(n)} -> {own.get(n)}" for n in differing[:6])
        raise CheckpointError(
            f"{path}: weights of another architecture ({len(differing)} differ: {listed}); "
            "leave out --ignore-arch to take the saved one, or --no-resume to start anew"
        )
    for name, p in model.state_dict().items():
        world.scatter(p, weights[name])
