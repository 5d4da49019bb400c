"""Frames per second of sampling: with the key-value cache, and recomputing the window per frame.

    python benchmarks/sampling_speed.py                 # 512 wide, 8 layers, ctx 512
    python benchmarks/sampling_speed.py --rounds 5 --compile

Both ways run in turn in each round, on the same model; medians and spreads are printed. The cached
way draws `--frames` frames, so that it passes ctx; the slow way is timed on `--slow-frames` full
windows. The floor is the time to read all weights once per frame, measured in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import CodesTransformer, ModelConfig
from sampling import Draw, generate


def per_second(count: int, work: Callable[[], object]) -> float:
    """How many a second, when `work` does `count`."""
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


def recompute(model: CodesTransformer, window: torch.Tensor, frames: int, draw: Draw) -> None:
    """Each frame from a whole forward pass over a full window."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(frames):
            drawn = draw(model(window)[:, -1], generator)
            window = torch.cat((window[:, 1:], drawn[:, None]), dim=1)


def read_weights(model: CodesTransformer) -> None:
    """Touch every weight that a step multiplies with, as its matrix-vector products must."""
    for p in model.parameters():
        if p.dim() == 2 and p is not model.embed.weight:
            p @ p.new_ones(p.shape[1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--d_model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--frames", type=int, default=1290)
    parser.add_argument("--slow-frames", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    flags = parser.parse_args()

    torch.manual_seed(0)
    config = ModelConfig((1024,) * 9, flags.d_model, flags.layers, flags.heads)
    model = CodesTransformer(config).eval()
    draw = Draw.of(9)
    window = torch.randint(1024, (1, flags.ctx, 9))

    def cached(frames: int) -> torch.Tensor:
        return generate(model, frames, ctx=flags.ctx, draw=draw, compiled=flags.compile)

    cached(4)  # compiles, if asked to
    rounds = []
    for _ in range(flags.rounds):
        fast = per_second(flags.frames, lambda: cached(flags.frames))
        slow = per_second(
            flags.slow_frames, lambda: recompute(model, window, flags.slow_frames, draw)
        )
        with torch.inference_mode():
            floor = per_second(20, lambda: [read_weights(model) for _ in range(20)])
        rounds.append((fast, slow, fast / slow, floor))

    print(f"{torch.get_num_threads()} threads, n = {flags.rounds} rounds, float32, {flags}")
    names = ("cached, frames/s", "recomputed, frames/s", "ratio", "all weights read, times/s")
    for name, values in zip(names, zip(*rounds, strict=True), strict=True):
        low, high = min(values), max(values)
        print(f"{name:26} {statistics.median(values):9.2f}   ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
