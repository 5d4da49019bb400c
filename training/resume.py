"""What a start takes from an earlier one: its checkpoint, its flags, its data.

    checkpoint, source = find_checkpoint(flags, console, world)   # None for a new run
    flags = settle_flags(flags, explicit, checkpoint, console)

A resumed run keeps its saved flags, and over them those that were given; a banner lists each that
differs. Its architecture stays, and its data must be what it was.
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
    """The checkpoint to resume from and where it came from, or None for a new run.

    Rank 0 reads it for all. With `dry` a damaged `latest` stays where it is, without a message.
    """
    found = read_checkpoint(flags, console, dry=dry) if world.is_first else (None, "")
    return world.share(found[0]), world.from_first(found[1])


def read_checkpoint(
    flags: argparse.Namespace, console: Console, *, dry: bool
) -> tuple[dict[str, Any] | None, str]:
    """The same, from this machine's disk."""
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
    """Flags of the run, new or resumed, with a number for --step."""
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
    """Flags of a resumed run: the saved ones, over them the ones given; prints a banner."""
    saved, progress = saved_flags(checkpoint), checkpoint["progress"]
    # What `auto` is was settled at the first start: another number would be another run.
    explicit = {n: v for n, v in explicit.items() if v != "auto" or not FLAGS[n].is_settled}
    kept = names("run", "architecture", "machine")
    merged = {**vars(flags), **{n: saved[n] for n in kept if n in saved}, **explicit}
    console.line(
        f"Resuming at step {progress['step']}, epoch {progress['epoch'] + 1}, "
        f"best val {number(progress['best_val'])} (saved {checkpoint.get('saved_at', '?')})"
    )
    if explicit.get("init_from"):
        console.line("  --init-from is left unread: weights are the run's own (or --no-resume)")
    for name in gone_flags(saved):
        flag = f"{spelled(name)} {saved[name]}"
        console.line(f"  {flag} of the saved run: this version has no such flag, goes on without")
    for name in kept:
        if name not in explicit or name not in saved or saved[name] == (asked := explicit[name]):
            continue
        keeps = FLAGS[name].scope == "architecture" and not flags.ignore_arch
        if keeps:
            merged[name] = saved[name]
        winner = "the saved architecture stays (--ignore-arch to insist)" if keeps else "asked wins"
        console.line(f"  {spelled(name)}: saved {saved[name]}, asked {asked}; {winner}")
        if FLAGS[name].is_budget and merged["schedule"] == "cosine":
            console.line(
                f"  the lr schedule still spans {schedule_words(progress, saved)} and stays at "
                "--eta-min after them; --init-from starts a new schedule from these weights"
            )
    return argparse.Namespace(**merged)


def forget_another_level(flags: argparse.Namespace, guard: Guard, saved: dict[str, Any]) -> None:
    """Let the guard learn anew where flags move loss or gradient norm to another level."""
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
    """Refuse to resume on other windows, or with --allow-data-change begin the epoch anew."""
    if said := another_codec(saved, found):
        raise CheckpointError(f"{source}: {said}; name its own data, or start anew (--no-resume)")
    found["codec"] = found["codec"] or saved.get("codec")
    identity = found.keys() - {"size", "codec"}  # which follow from the files
    changed = sorted(name for name in identity if saved.get(name) != found[name])
    if not changed:
        return
    said = ", ".join(f"{n} {saved.get(n)!s:.8} -> {found[n]!s:.8}" for n in changed)  # hashes
    if not flags.allow_data_change:
        raise CheckpointError(
            f"{source}: the data is not the data of the saved run ({said}); restore data and "
            "flags, or pass --allow-data-change to go on with what is there now, from the start of "
            "this epoch"
        )
    console.problem(f"the data changed ({said}); epoch {state.progress.epoch + 1} starts anew")
    state.guard.forget()
    state.policy.forget_windows()
    state.progress.begin_epoch()
