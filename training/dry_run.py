"""--plan: what a run would take. Nothing is trained, locked, moved or restored.

return dry_run.plan(flags, explicit, Console())
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from cli.command_line import EXIT_DONE, UsageError
from cli.device import pick_device
from run_folder.checkpoint import load_checkpoint
from run_folder.files import find_run, load_latest
from run_folder.metrics import Console
from training.setup import ALONE, check_windows, open_data, pick_architecture, plan_of, settle_flags


def plan(flags: argparse.Namespace, explicit: dict[str, Any], console: Console) -> int:
    """Say what the run would take: nothing is trained, locked, moved or restored."""
    checkpoint, source = look_for_checkpoint(flags)
    flags = settle_flags(flags, explicit, checkpoint, console)
    device = planned_device(flags)
    if flags.data:
        corpus, train_windows, val_windows, _ = open_data(flags, console)
        windows, vocab_sizes = (len(train_windows), len(val_windows)), corpus.vocab_sizes
    else:
        windows, vocab_sizes = (0, 0), (1024,) * (flags.codebooks or 9)
        if checkpoint is not None:
            vocab_sizes = tuple(checkpoint["architecture"]["vocab_sizes"])
        console.line(f"data     none named (--data): {len(vocab_sizes)} codebooks are assumed")
    config, _ = pick_architecture(flags, checkpoint, source, vocab_sizes)
    asked = plan_of(flags, config, device)
    console.lines(asked.settle_batch(explicit, ALONE))
    if flags.data:
        check_windows(flags, *windows, console)
    console.lines(asked.step_lines())
    console.lines(asked.memory_lines(is_new=checkpoint is None))
    console.lines(asked.time_lines())
    if flags.data:
        console.lines(asked.run_lines(windows[0]))
    lines, problem = asked.disk_lines(windows[0])
    console.lines(lines)
    if problem is not None:
        console.problem(problem)
    return EXIT_DONE


def planned_device(flags: argparse.Namespace) -> torch.device:
    """The device asked for, here or not, or the best one here."""
    try:
        return torch.device(flags.device) if flags.device else pick_device(None)
    except RuntimeError as error:
        raise UsageError(f"--device: expected cuda, mps or cpu, found {flags.device!r}") from error


def look_for_checkpoint(flags: argparse.Namespace) -> tuple[dict[str, Any] | None, str]:
    """As `read_checkpoint`, but a damaged `latest` stays where it is, and nothing is said."""
    if flags.resume:
        return load_checkpoint(flags.resume), flags.resume
    files = None if flags.no_resume else find_run(flags.save_dir, flags.tag, flags.codebooks)
    if files is None:
        return None, ""
    checkpoint, path, _ = load_latest(files, keep_damaged=True)
    return checkpoint, str(path)
