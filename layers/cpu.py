"""What a CPU does otherwise than the plain PyTorch of this folder, and when.

    if cpu.prefers_blocks(q): return cpu.blocked_attention(q, k, v)

A variant stands here for as long as it saves a twentieth of a whole step on a CPU
(benchmarks/cpu_variants.py); nothing of it runs on another device.
"""

from __future__ import annotations

import math
from typing import Any

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


# --- dropout -------------------------------------------------------------------------------------


def dropout(x: Tensor, p: float) -> Tensor:
    """Inverted dropout (Srivastava et al. 2014): 0 with probability p, else divided by 1 - p.

    Of any shape; p = 0 returns x itself.
    """
    if not p:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return _Dropout.apply(x, _kept_bits(x, p), p)


class _Dropout(torch.autograd.Function):
    """y = x * kept / (1 - p); dx = dy * kept / (1 - p), with the same bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.p = p
        return _masked(x, kept).mul_(1 / (1 - p))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _masked(grad, *ctx.saved_tensors).mul_(1 / (1 - ctx.p)), None, None


def _kept_bits(x: Tensor, p: float) -> Tensor:
    """Of x's shape, int16: all bits set with probability 1 - p, else none; from 15 random bits.

    torch's own dropout takes four times as long on a CPU (benchmarks/README.md), and comparisons
    that make booleans are slow there as well.
    """
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    drawn = words.view(torch.int16)[: x.numel()].view(x.shape)
    drawn >>= 1  # so that the difference below cannot overflow; its sign, spread, is the mask
    return drawn.neg_().add_(round(p * 2**15) - 2**14 - 1).bitwise_right_shift_(15)


_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def _masked(x: Tensor, kept: Tensor) -> Tensor:
    """x where the bits of `kept` are set, else 0."""
    words = _WORDS[x.element_size()]
    return (x.contiguous().view(words) & kept.to(words)).view(x.dtype)


# --- sampling's products -------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A product without bias for sampling's few rows; weight [out, in] is kept in `dtype`.

    On CPUs in oneDNN's own layout: rearranging it at every call takes as long as the product
    (benchmarks/README.md). `parts` blocks of rows can be asked for one by one.
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
