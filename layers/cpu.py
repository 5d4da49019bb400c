"""Faster variants of this folder's plain PyTorch for a CPU, and the conditions for their use.

    if cpu.prefers_blocks(q): return cpu.blocked_attention(q, k, v)

A variant stays only while it saves a twentieth of a whole step on a CPU
(benchmarks/cpu_variants.py). On other devices `PackedLinear` is a plain matrix product, and the
others are not used.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 256  # queries at a time


def prefers_blocks(q: Tensor) -> bool:
    """Return whether `blocked_attention` is faster than SDPA: eagerly, on a CPU, in bfloat16."""
    eager = not torch.compiler.is_compiling()
    return eager and q.device.type == "cpu" and q.dtype == torch.bfloat16


def blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention [B, H, T, C], computed for BLOCK queries and their keys at a time.

    It keeps the attention weights for backward: at least B * H * T^2 / 2 numbers a layer.
    """
    (batch, heads, frames, channels), mixed = q.shape, []
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [B * H, T, C]
    for first in range(0, frames, BLOCK):
        end = min(first + BLOCK, frames)
        future = torch.full((end - first, end), -torch.inf, dtype=q.dtype).triu(1 + first)
        scores = torch.baddbmm(future, q[:, first:end], k[:, :end].mT, alpha=channels**-0.5)
        mixed.append(scores.softmax(-1) @ v[:, :end])
    return torch.cat(mixed, dim=1).unflatten(0, (batch, heads))


# --- products in sampling ------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A linear layer without bias for the few rows of sampling; weight [out, in] in `dtype`.

    On CPUs the weight is kept in oneDNN's own layout: converting it at every call takes as long as
    the product (benchmarks/journal.md). The rows of the weight are split into `parts` equal blocks,
    which `forward` can use one at a time.
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
        """Map x [..., in] of any dtype to [..., out / parts] in `dtype`, by block `part` or 0."""
        weight = self.parts[part or 0]
        if self.is_packed:
            pointwise = torch.ops.mkldnn._linear_pointwise.default
            return pointwise(x.to(self.dtype), weight, None, "none", [], "")
        return F.linear(x.to(self.dtype), weight)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether oneDNN can pack weights of this dtype: float32 on CPUs, bfloat16 on some."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class QuickNorm(nn.Module):
    """RMSNorm by a vector norm: half as many operations, and for one row each costs the same."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        size = math.prod(norm.normalized_shape)
        gain = norm.weight.detach() if norm.weight is not None else torch.ones(())
        self.gain = gain * size**0.5
        self.eps = self.gain.new_tensor((norm.eps or 0.0) * size) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """Return gain * x / sqrt(mean(x^2) + eps) for x [..., D]."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * (self.gain / torch.hypot(norm, self.eps))
