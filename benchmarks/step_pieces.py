"""Pieces of a training step against PyTorch's own way, forward and backward, in turn.

python benchmarks/step_pieces.py --rounds 9 --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from layers import kernels
from layers.loss import linear_cross_entropy
from model import ModelConfig, rotary_angles, rotate

K, V, FRAMES, WIDTH = 9, 1024, 2048, 512


def attention(batch: int, heads: int, frames: int, channels: int) -> list[Callable[[], None]]:
    """SDPA and blocked attention in bfloat16."""
    shape = (3, batch, heads, frames, channels)
    q, k, v = torch.randn(shape, dtype=torch.bfloat16).requires_grad_().unbind(0)
    slope = torch.randn_like(v)

    def sdpa() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(slope, retain_graph=True)

    def blocked() -> None:
        kernels.blocked_attention(q, k, v).backward(slope, retain_graph=True)

    return [sdpa, blocked]


def loss() -> list[Callable[[], None]]:
    """Cross-entropy of all logits by autograd, and codebook by codebook; bf16 autocast."""
    states = torch.randn(1, FRAMES, WIDTH, requires_grad=True)
    head = (0.05 * torch.randn(K, V, WIDTH)).requires_grad_()
    codes, sizes = torch.randint(V, (FRAMES, K)), torch.full((K,), V)

    def plain() -> Tensor:
        logits = F.linear(states[0], head.flatten(0, 1)).unflatten(-1, (K, V)).float()
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten(), label_smoothing=0.05)

    def ours() -> Tensor:
        return linear_cross_entropy(states, head, codes, sizes, label_smoothing=0.05).objective

    def step(objective: Callable[[], Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            value = objective()
        value.backward()

    return [lambda: step(plain), lambda: step(ours)]


def dropout() -> list[Callable[[], None]]:
    """torch's dropout, and masks of 15 random bits."""
    x = torch.randn(FRAMES, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    slope = torch.randn_like(x)
    return [
        lambda: F.dropout(x, 0.1).backward(slope),
        lambda: kernels.dropout(x, 0.1).backward(slope),
    ]


def norm() -> list[Callable[[], None]]:
    """RMSNorm under autocast: torch's and its cast for the next product, and ours."""
    x, gain = torch.randn(FRAMES, WIDTH, requires_grad=True), torch.ones(WIDTH, requires_grad=True)
    slope = torch.randn(FRAMES, WIDTH, dtype=torch.bfloat16)

    def ours() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = kernels.rms_norm(x, gain)
        y.backward(slope)

    return [lambda: F.rms_norm(x, (WIDTH,), gain).bfloat16().backward(slope), ours]


def activation() -> list[Callable[[], None]]:
    """Squared ReLU by autograd, and ours."""
    x = torch.randn(FRAMES, 4 * WIDTH, dtype=torch.bfloat16, requires_grad=True)
    slope = torch.randn_like(x)
    return [
        lambda: F.relu(x).square().backward(slope),
        lambda: kernels.squared_relu(x).backward(slope),
    ]


def heads() -> list[Callable[[], None]]:
    """QK-norm and rotary positions by autograd, and ours: 4 windows of 512, 8 heads of 64."""
    qkv = torch.randn(4, 512, 3, 8, 64, dtype=torch.bfloat16, requires_grad=True)
    gains = torch.ones(2, 64, requires_grad=True)
    rope = rotary_angles(torch.arange(512), ModelConfig((2,), d_model=512, heads=8))
    slope = torch.randn(4, 8, 512, 64, dtype=torch.bfloat16)

    def by_autograd() -> None:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = (
            rotate(F.rms_norm(x.float(), (64,), gain), rope).bfloat16()
            for x, gain in zip((q, k), gains, strict=True)
        )
        torch.autograd.backward((q, k, v), (slope,) * 3)

    def ours() -> None:
        torch.autograd.backward(kernels.rotated_heads(qkv, gains, rope), (slope,) * 3)

    return [by_autograd, ours]


def main() -> int:
    """Print a table of medians and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    pieces: dict[str, Sequence[Callable[[], object]]] = {
        "attention, 8 windows of 256, 8 heads of 32": attention(8, 8, 256, 32),
        "attention, 4 windows of 512, 8 heads of 64": attention(4, 8, 512, 64),
        "attention, 6 windows of 512, 12 heads of 64": attention(6, 12, 512, 64),
        f"loss of {FRAMES} frames, width {WIDTH}, {K} x {V}": loss(),
        f"dropout of {FRAMES} x {WIDTH}": dropout(),
        f"RMSNorm of {FRAMES} x {WIDTH}": norm(),
        f"squared ReLU of {FRAMES} x {4 * WIDTH}": activation(),
        "QK-norm and rotary positions, 4 windows of 512, 8 heads of 64": heads(),
    }
    print("| piece | PyTorch's, ms | ours, ms | ratio (min to max) |\n|---|---:|---:|---:|")
    for name, ways in pieces.items():
        times: list[list[float]] = [[], []]
        for _ in range(flags.rounds + 2):  # two to warm up
            for way, taken in zip(ways, times, strict=True):
                started = time.perf_counter()
                way()
                taken.append(1e3 * (time.perf_counter() - started))
        theirs, ours = times[0][2:], times[1][2:]
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        print(
            f"| {name} | {statistics.median(theirs):.1f} | {statistics.median(ours):.1f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
