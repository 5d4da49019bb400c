"""The dropout of a new run's depth transformer, from the passes over the music that are planned.

    console.lines(settle_depth_dropout(flags, data.train))

Over many passes the model learns its frames by heart. Dropout in the depth transformer costs a
short run some of its progress, and lets val of a long one fall further: benchmarks/journal.md.
"""

from __future__ import annotations

import argparse
import math

from npq_dataset import WindowDataset
from training.planning import DEFAULT_EFFECTIVE_BATCH

RATE = 0.2
MANY_PASSES = 30.0  # with 60 planned, 22 made up for its cost, at 0.7 codes a parameter


def planned_passes(flags: argparse.Namespace, windows: WindowDataset) -> float:
    """Return how often a run without --max-seconds sees each frame on the average."""
    in_a_step = DEFAULT_EFFECTIVE_BATCH if flags.batch == "auto" else flags.batch * flags.accum
    in_a_step = flags.effective_batch or in_a_step
    seen = min(flags.epochs * len(windows), (flags.max_steps or math.inf) * in_a_step)
    return seen * flags.ctx / windows.frames


def settle_depth_dropout(flags: argparse.Namespace, windows: WindowDataset | None) -> list[str]:
    """Replace --depth-dropout auto by a rate; return lines to print."""
    if flags.depth_dropout != "auto":
        return []
    flags.depth_dropout = 0.0
    if flags.pattern != "depth" or not windows or not flags.dropout:
        return []
    if flags.max_seconds:
        why = f"--max-seconds: give {RATE:g} for a run of {MANY_PASSES:g} passes or more"
    else:
        passes = planned_passes(flags, windows)
        flags.depth_dropout = RATE if passes >= MANY_PASSES else 0.0
        why = f"{passes:.3g} passes are planned, and {MANY_PASSES:g} are many"
    rate = flags.depth_dropout
    return [f"dropout  {rate:g} in the depth transformer (--depth-dropout auto: {why})"]
