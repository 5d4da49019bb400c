"""What each variant of `layers/cpu.py` is worth: a whole step with it and with plain PyTorch.

    OMP_NUM_THREADS=1 python benchmarks/cpu_variants.py
    OMP_NUM_THREADS=1 python benchmarks/cpu_variants.py --d_model 128 --layers 4 --heads 4 --ctx 256

A training step is the trainer's own (`train_rvq.train_step`) with its default recipe; a step of
sampling draws a frame behind a full context, in bfloat16. Each way runs in turn with the program as
it ships. A ratio is the time without a variant by the time with it: one that stays below 1.05 goes.
Times are the processor's and not the clock's, so that neighbours disturb them less.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import measuring
import torch
from measuring import in_turn, print_table, ratios

import train_rvq
from layers import cpu
from model import CodesTransformer, ModelConfig
from sound import sampling

Change = tuple[Any, str, Any]  # where the program chooses, and what makes it choose plain PyTorch
TRAINING: dict[str, Change] = {"blocked attention": (cpu, "prefers_blocks", lambda _: False)}
SAMPLING: dict[str, Change] = {
    "packed products": (cpu, "can_pack", lambda *_: False),
    "quick norms": (sampling, "QuickNorm", lambda norm: norm),
}


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    measuring.add_shape(parser)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accum", type=int, default=6)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def without(changes: Sequence[Change], seconds: Callable[[], float]) -> float:
    """What `seconds` returns in a program with some changes."""
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(patch.object(*change))
        return seconds()


def compare(
    name: str, seconds: Callable[[], float], variants: dict[str, Change], rounds: int
) -> list[list[str]]:
    """Rows of the table: the program as it ships, without each variant, without any."""
    left_out = {"": []} | {f"without {v}": [c] for v, c in variants.items()}
    if len(variants) > 1:
        left_out["without any"] = list(variants.values())
    ways = {way: lambda c=c: without(c, seconds) for way, c in left_out.items()}
    times = in_turn(ways, rounds)
    rows = []
    for way, taken in times.items():
        over = sorted(ratios(taken, times[""]))
        low, _, high = statistics.quantiles(over) if len(over) > 1 else over * 3
        spread = f"{statistics.median(over):.3f} ({low:.3f} to {high:.3f})" if way else ""
        rows.append([f"{name} {way}", f"{1e3 * statistics.median(taken):.1f}", spread])
    return rows


def training(flags: argparse.Namespace, folder: str) -> Callable[[], float]:
    """Seconds of a step."""
    recipe = [
        "--batch",
        flags.batch,
        "--accum",
        flags.accum,
        "--device",
        "cpu",
        "--amp",
        "--lr",
        1e-4,
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        run = measuring.trainer_run(Path(folder) / "run", flags, recipe)
    feed = measuring.micro_batches(run)

    def seconds() -> float:
        started = time.process_time()
        train_rvq.train_step(run, feed)
        return time.process_time() - started

    return seconds


def drawing(flags: argparse.Namespace, pattern: str) -> Callable[[], float]:
    """Seconds of a frame behind a full context."""
    sizes = (flags.vocab,) * flags.codebooks
    config = ModelConfig(sizes, flags.d_model, flags.layers, flags.heads, pattern=pattern)
    model, draw = CodesTransformer(config).eval(), sampling.Draw.of(flags.codebooks)
    prompt = torch.randint(flags.vocab, (flags.ctx, flags.codebooks))

    def seconds() -> float:
        times: list[float] = []
        sampling.generate(
            model, flags.frames, ctx=flags.ctx, draw=draw, prompt=prompt, dtype=torch.bfloat16,
            on_frame=lambda: times.append(time.process_time()),
        )  # fmt: skip
        return (times[-1] - times[0]) / (len(times) - 1)

    return seconds


def main() -> int:
    """Measure and print."""
    flags = parse_flags()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = f"{flags.d_model}/{flags.layers}/{flags.heads}, ctx {flags.ctx}, batch {flags.batch}"
    print(f"{shape}, {flags.codebooks} x {flags.vocab}, n = {flags.rounds} rounds in turn")
    print(measuring.machine())
    with tempfile.TemporaryDirectory() as folder:
        rows = compare("training", training(flags, folder), TRAINING, flags.rounds)
    for pattern in ("parallel", "depth"):
        rows += compare(f"drawing, {pattern}", drawing(flags, pattern), SAMPLING, flags.rounds)
    print_table(["a step", "ms", "ratio (quartiles)"], rows)
    print(measuring.machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
