"""--plan: what a run would take. Nothing is trained, locked, moved or restored.

return dry_run.plan(flags, explicit, Console())
"""

from __future__ import annotations

import argparse
from typing import Any

from cli.command_line import EXIT_DONE
from run_folder.metrics import Console
from training.setup import prepare


def plan(flags: argparse.Namespace, explicit: dict[str, Any], console: Console) -> int:
    """Print what the run would take; the exit code."""
    ready = prepare(flags, explicit, console, dry=True)
    windows = len(ready.data.train) if ready.data else 0
    console.lines(ready.plan.step_lines())
    console.lines(ready.plan.memory_lines(is_new=ready.checkpoint is None))
    console.lines(ready.plan.time_lines())
    if ready.data:
        console.lines(ready.plan.run_lines(windows, ready.data.train.frames))
    lines, problem = ready.plan.disk_lines(windows)
    console.lines(lines)
    if problem is not None:
        console.problem(problem)
    return EXIT_DONE
