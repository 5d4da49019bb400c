"""Resumes a run: finds its checkpoint, merges its flags, checks that the data is the same.

    checkpoint, source = find_checkpoint(flags, console, world)   # None for a new run
    flags = settle_flags(flags, explicit, checkpoint, console)

A resumed run uses its saved flags, except where the command gives others; a banner lists each
difference. The architecture stays, and the data must be the same.
"""

from __future__ import annotations

import argparse
from typing import Any

from run_folder.checkpoint import CheckpointError, load_checkpoint
from run_folder.files import find_run, load_latest
from run_folder.flags import FLAGS, gone_flags, names, saved_flags, spelled
from run_folder.metrics import Console, number
from sound.origin import another_codec
from training.guard import Guard
from training.parallel import World
from training.schedule import schedule_words
from training.state import TrainState


def find_checkpoint(
    flags: argparse.Namespace, console: Console, world: World, *, dry: bool = False
) -> tuple[dict[str, Any] | None, str]:
    """Return the checkpoint to resume from and its path, or (None, "") for a new run.

    Rank 0 reads it for all processes. With `dry` a damaged `latest` is neither renamed nor
    reported.

    Raises:
        CheckpointError: there are checkpoints, but none can be loaded, or several runs match.
    """
    found = read_checkpoint(flags, console, dry=dry) if world.is_first else (None, "")
    return world.share(found[0]), world.from_first(found[1])


def read_checkpoint(
    flags: argparse.Namespace, console: Console, *, dry: bool
) -> tuple[dict[str, Any] | None, str]:
    """Read the checkpoint to resume from this machine's disk; see `find_checkpoint`."""
    if flags.resume:
        return load_checkpoint(flags.resume), flags.resume
    files = None if flags.no_resume else find_run(flags.save_dir, flags.tag, flags.codebooks)
    if files is None:
        return None, ""
    checkpoint, path, complaints = load_latest(files, keep_damaged=dry)
    for complaint in () if dry else complaints:
        console.problem(f"falling back to {path}: {complaint}")
    return checkpoint, str(path)


def settle_flags(
    flags: argparse.Namespace,
    explicit: dict[str, Any],
    checkpoint: dict[str, Any] | None,
    console: Console,
) -> argparse.Namespace:
    """Return the flags of a new or resumed run; an unset --step becomes ctx // 2."""
    if checkpoint is not None:
        flags = merge_flags(flags, explicit, checkpoint, console)
    flags.step = flags.step or max(1, flags.ctx // 2)
    return flags


def merge_flags(
    flags: argparse.Namespace,
    explicit: dict[str, Any],
    checkpoint: dict[str, Any],
    console: Console,
) -> argparse.Namespace:
    """Merge the saved flags of a resumed run with those that were given; print the differences."""
    saved, progress = saved_flags(checkpoint), checkpoint["progress"]
    # The first start replaced `auto` by a value, which a resume must keep to train alike.
    explicit = {n: v for n, v in explicit.items() if v != "auto" or not FLAGS[n].is_settled}
    kept = names("run", "architecture", "machine")
    merged = {**vars(flags), **{n: saved[n] for n in kept if n in saved}, **explicit}
    console.line(
        f"Resuming at step {progress['step']}, epoch {progress['epoch'] + 1}, "
        f"best val {number(progress['best_val'])} (saved {checkpoint.get('saved_at', '?')})"
    )
    if explicit.get("init_from"):
        console.line(
            "  --init-from is ignored: the run goes on with its own weights; --no-resume starts a "
            "new one"
        )
    for name in gone_flags(saved):
        flag = f"{spelled(name)} {saved[name]}"
        console.line(f"  {flag} of the saved run: this version has no such flag and ignores it")
    for name in kept:
        if name not in explicit or name not in saved or saved[name] == (given := explicit[name]):
            continue
        keeps = FLAGS[name].scope == "architecture" and not flags.ignore_arch
        if keeps:
            merged[name] = saved[name]
        winner = (
            "the saved value stays (--ignore-arch overrides it)"
            if keeps
            else "the given value is used"
        )
        console.line(f"  {spelled(name)}: saved {saved[name]}, given {given}; {winner}")
        if FLAGS[name].is_budget and merged["schedule"] == "cosine":
            console.line(
                f"  the lr schedule still spans {schedule_words(progress, saved)} and stays at "
                "--eta-min after them; --init-from starts a new schedule from these weights"
            )
    return argparse.Namespace(**merged)


def forget_another_level(flags: argparse.Namespace, guard: Guard, saved: dict[str, Any]) -> None:
    """Reset the guard's recent values if a changed flag moves loss or gradient norm."""
    now = vars(flags)
    level = [name for name, flag in FLAGS.items() if flag.moves_loss]
    moved = any(now[name] != saved.get(name, now[name]) for name in level)
    if moved or gone_flags(saved):
        guard.forget()


def settle_data_change(
    flags: argparse.Namespace,
    state: TrainState,
    saved: dict[str, Any],
    found: dict[str, Any],
    source: str,
    console: Console,
) -> None:
    """Compare the `found` data with the `saved`; with --allow-data-change restart the epoch.

    Raises:
        CheckpointError: the windows or the codec differ from the saved run's.
    """
    if mismatch := another_codec(saved, found):
        raise CheckpointError(
            f"{source}: {mismatch}; give the data of this run, or start anew (--no-resume)"
        )
    found["codec"] = found["codec"] or saved.get("codec")
    identity = found.keys() - {"size", "codec"}  # these two follow from the files
    changed = sorted(name for name in identity if saved.get(name) != found[name])
    if not changed:
        return
    changes = ", ".join(f"{n} {saved.get(n)!s:.8} -> {found[n]!s:.8}" for n in changed)  # hashes
    if not flags.allow_data_change:
        raise CheckpointError(
            f"{source}: the data is not the data of the saved run ({changes}); restore data and "
            "flags, or give --allow-data-change to go on with the present data, from the start of "
            "this epoch"
        )
    console.problem(f"the data changed ({changes}); epoch {state.progress.epoch + 1} starts again")
    state.guard.forget()
    state.policy.forget_windows()
    state.progress.begin_epoch()
    state.progress.held_out_run = -1
