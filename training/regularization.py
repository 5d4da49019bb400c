"""What keeps a new run from learning its music by heart, where the user leaves it to the trainer.

    console.lines(settle_depth_dropout(flags, data.train))
    console.lines(settle_row_decay(flags, data.train, model))    # once --batch is a number

Dropout in the depth transformer costs a short run some of its progress, and lets val of a long one
fall further. Decay of what is learned of single codes costs nothing: benchmarks/journal.md.
"""

from __future__ import annotations

import argparse
import math

from model import CodesTransformer
from npq_dataset import WindowDataset
from training.optimizer import ADAMW_FACTOR
from training.planning import DEFAULT_EFFECTIVE_BATCH

ROW_MEMORY = 1.0  # passes in which what a row learns beside its vector is forgotten, but for 1 / e
BARE_ROW_MEMORY = 6.0  # ... and without vectors, times codes a parameter: such rows know all
STRONGEST = 0.1  # share of a row that a step at the peak rate takes away at most
DEPTH_DROPOUT = 0.2
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
        why = f"--max-seconds: give {DEPTH_DROPOUT:g} for a run of {MANY_PASSES:g} passes or more"
    else:
        passes = planned_passes(flags, windows)
        flags.depth_dropout = DEPTH_DROPOUT if passes >= MANY_PASSES else 0.0
        why = f"{passes:.3g} passes are planned, and {MANY_PASSES:g} are many"
    rate = flags.depth_dropout
    return [f"dropout  {rate:g} in the depth transformer (--depth-dropout auto: {why})"]


def settle_row_decay(
    flags: argparse.Namespace, windows: WindowDataset | None, model: CodesTransformer
) -> list[str]:
    """Replace --row-decay auto by a number, once --batch is one; return lines to print.

    `model` may be without weights. A run that ends before it would forget has none.

    A weight forgets in 1 / (rate * decay) steps; counted in passes, the best such memory depends
    least on data and model (Wang and Aitchison 2024, "How to set AdamW's weight decay as you scale
    model and dataset size").
    """
    if flags.row_decay != "auto":
        return []
    flags.row_decay = 0.0
    if not windows or not flags.dropout:
        return []
    passes = ROW_MEMORY
    if not model.config.code_features:
        codes = windows.frames * windows.num_codebooks
        passes = BARE_ROW_MEMORY * codes / model.num_parameters()
    passes *= len(windows.tables)  # a pass over each shifted encoding, which has other codes
    if planned_passes(flags, windows) <= passes and not flags.max_seconds:
        return []
    steps_a_pass = windows.frames / (flags.batch * flags.accum * flags.ctx)
    steps = max(passes * steps_a_pass, 1 / STRONGEST)
    rate = flags.lr * (ADAMW_FACTOR if flags.optim == "muon" else 1)
    flags.row_decay = float(f"{1 / (steps * rate):.3g}")
    return [
        f"rows     what is learned of single codes has weight decay {flags.row_decay:g}, to be "
        f"forgotten in {steps / steps_a_pass:.2g} passes (--row-decay auto)"
    ]
