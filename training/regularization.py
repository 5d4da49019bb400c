"""What keeps a new run from learning its music by heart, where the user leaves it to the trainer.

    console.lines(settle_row_decay(flags, data.train, model))    # once --batch is a number

Decay of what is learned of single codes costs nothing and lets val fall further and longer; beside
it, dropout in the depth transformer only costs: benchmarks/journal.md.
"""

from __future__ import annotations

import argparse
import math

from model import CodesTransformer
from npq_dataset import WindowDataset
from training.optimizer import ADAMW_FACTOR
from training.planning import DEFAULT_EFFECTIVE_BATCH

ROW_MEMORY = 1.0  # passes in which what a row learns beside its vector is forgotten, but for 1 / e
BARE_ROW_MEMORY = (
    6.0  # ... and without vectors, times codes a parameter: they hold all that is known
)
BARE_FRAMES = 30_000  # six minutes; of less music rows without vectors keep all that they learn
STRONGEST = 0.1  # share of a row that a step at the peak rate takes away at most


def planned_passes(flags: argparse.Namespace, windows: WindowDataset) -> float:
    """Return how often a run without --max-seconds sees each frame on the average."""
    in_a_step = DEFAULT_EFFECTIVE_BATCH if flags.batch == "auto" else flags.batch * flags.accum
    in_a_step = flags.effective_batch or in_a_step
    seen = min(flags.epochs * len(windows), (flags.max_steps or math.inf) * in_a_step)
    return seen * flags.ctx / windows.frames


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
        if windows.frames < BARE_FRAMES:
            return []
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
