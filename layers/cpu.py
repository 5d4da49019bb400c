"""What a CPU does otherwise than the plain PyTorch of this folder, and when.

    if cpu.prefers_blocks(q): return cpu.blocked_attention(q, k, v)

A variant stands here for as long as it saves a twentieth of a whole step on a CPU
(benchmarks/cpu_variants.py). Elsewhere `PackedLinear` is a plain product; the rest does not run.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 256  # queries at a time


def prefers_blocks(q: Tensor) -> bool:
    """Whether `blocked_attention` is faster than PyTorch's own: a CPU's is slow in bfloat16."""
    eager = not torch.compiler.is_compiling()
    return eager and q.device.type == "cpu" and q.dtype == torch.bfloat16


def blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention [B, H, T, C] by products of BLOCK queries with the keys they may see.

    The attention weights are kept for backward, at least B * H * T^2 / 2 of them a layer.
    """
    (batch, heads, frames, channels), mixed = q.shape, []
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [B * H, T, C]
    for first in range(0, frames, BLOCK):
        end = min(first + BLOCK, frames)
        future = torch.full((end - first, end), -torch.inf, dtype=q.dtype).triu(1 + first)
        scores = torch.baddbmm(future, q[:, first:end], k[:, :end].mT, alpha=channels**-0.5)
        mixed.append(scores.softmax(-1) @ v[:, :end])
    return torch.cat(mixed, dim=1).unflatten(0, (batch, heads))


# --- sampling's products -------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A product without bias for sampling's few rows; weight [out, in] is kept in `dtype`.

    On CPUs in oneDNN's own layout: rearranging it at every call takes as long as the product
    (benchmarks/journal.md). `parts` blocks of rows can be asked for one by one.
    """

    def __init__(
        self, weight: Tensor, dtype: torch.dtype, parts: int = 1, *, eager: bool = True
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.parts = list(weight.detach().to(dtype).chunk(parts))
        self.is_packed = eager and can_pack(weight.device, dtype)
        if self.is_packed:
            self.parts = [torch.ops.mkldnn._reorder_linear_weight(p) for p in self.parts]

    def forward(self, x: Tensor, part: int | None = None) -> Tensor:
        """[..., in] of any dtype -> [..., out / parts] in `dtype`."""
        weight = self.parts[part or 0]
        if self.is_packed:
            pointwise = torch.ops.mkldnn._linear_pointwise.default
            return pointwise(x.to(self.dtype), weight, None, "none", [], "")
        return F.linear(x.to(self.dtype), weight)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this dtype here: float32 on CPUs, bfloat16 on some."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class QuickNorm(nn.Module):
    """RMSNorm from a vector norm: half of the operations, which is what a single row costs."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        size = math.prod(norm.normalized_shape)
        gain = norm.weight.detach() if norm.weight is not None else torch.ones(())
        self.gain = gain * size**0.5
        self.eps = self.gain.new_tensor((norm.eps or 0.0) * size) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]: x over the square root of its mean square + eps."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * (self.gain / torch.hypot(norm, self.eps))
