"""What blocks are made of: norm, activation, dropout, rotary heads, attention.

    x = rms_norm(x, gain)                                   # [B, T, D], gain [D]
    q, k, v = rotated_heads(qkv, gains, (cos, sin))         # [B, T, 3, H, C] -> [B, H, T, C] each
    mixed = causal_attention(q, k, v)                       # [B, H, T, C]

Each is a function of tensors whose backward is written out, in fewer passes over memory than
autograd makes; works in any floating dtype on any device; and can be traced by torch.compile.
Statistics are float32 at least, whatever goes in; what comes out is what autocast would make a
product's input. For the few rows of sampling there are modules of fewer operations: `PackedLinear`,
`QuickNorm`.

B windows, H heads, T frames, C channels of a head, D width. In the formulas of the backwards dy is
the gradient that comes in, and * works element by element.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
Rope = tuple[Tensor, Tensor]  # cosines and signed sines of each frame's angles, [T, C] each


def product_dtype(x: Tensor) -> torch.dtype:
    """Dtype that a product of x would be made in: autocast's, or its own."""
    device = x.device.type
    mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if mixed else x.dtype


# --- norm, activation, dropout -------------------------------------------------------------------


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """x / rms(x) * gain over the last dimension (Zhang and Sennrich 2019): [..., D], gain [D]."""
    return _RmsNorm.apply(x, gain, product_dtype(x))


class _RmsNorm(torch.autograd.Function):
    """y = u * gain with u = r x and r = 1 / rms(x), which moves with x: dr/dx = -r^2 u / D.

    d gain = sum over rows of dy * u
    dx = r (dy * gain - u mean(dy * u * gain)), the mean over D
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
        inverse = _inverse_rms(x)
        ctx.save_for_backward(x, gain, inverse)
        return ((x * inverse) * gain).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain, inverse = ctx.saved_tensors
        unit = x * inverse
        along = grad * unit
        mean = (along @ gain.to(along.dtype))[..., None] / x.shape[-1]
        grad_x = torch.addcmul(grad * gain, unit, mean, value=-1).mul_(inverse)
        return grad_x.to(x.dtype), along.flatten(0, -2).sum(0).to(gain.dtype), None


def _inverse_rms(x: Tensor) -> Tensor:
    """1 / rms(x) over the last dimension: [..., 1], float32 at least."""
    exact = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
    return (norm.square() / x.shape[-1] + NORM_EPS).rsqrt()


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, of any shape (So et al. 2021)."""
    return _SquaredRelu.apply(x)


class _SquaredRelu(torch.autograd.Function):
    """y = relu(x)^2; dx = 2 dy * relu(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, positive, value=2)  # in one pass


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


# --- heads with rotary positions -----------------------------------------------------------------


def rotated_heads(qkv: Tensor, gains: Tensor | None, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, T, C] of qkv [B, T, 3, H, C].

    Queries and keys are RMS-normalised (Henry et al. 2020) with gains [2, C], unless None, and
    turned by `rope` (Su et al. 2021).
    """
    q_and_k, v = _RotatedHeads.apply(qkv, gains, *rope)
    return q_and_k[0], q_and_k[1], v


class _RotatedHeads(torch.autograd.Function):
    """y = R(u * gain) for queries and keys: u = x / rms(x) as in `_RmsNorm`, R the rotation.

    R x = x * cos + swap(x) * sin, where `swap` exchanges the halves of the channels. The gain can
    be taken into the angles' small tables, where it costs nothing:
    R(u * gain) = u * (gain * cos) + swap(u) * (swap(gain) * sin), and r = 1 / rms(x) comes last.

    R is orthogonal, so backward turns the other way, dz = R(-angles) dy. The rest is the norm's:
    d gain = sum over rows of dz * u
    dx = r (dz * gain - u mean(dz * u * gain)), or dz without a norm
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, gains: Tensor | None, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = _exact(qkv[:, :, :2].permute(2, 0, 3, 1, 4))
        inverse = None
        turned_cos, turned_sin = cos, sin
        if gains is not None:
            gain = gains[:, None, None, None]
            turned_cos, turned_sin = gain * cos, gain.roll(gain.shape[-1] // 2, -1) * sin
            inverse = _inverse_rms(x)
        rotated = _turned(x, turned_cos, turned_sin)
        if inverse is not None:
            rotated *= inverse
        ctx.save_for_backward(qkv, gains, cos, sin, inverse)
        return rotated.to(qkv.dtype), qkv[:, :, 2].transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        qkv, gains, cos, sin, inverse = ctx.saved_tensors
        grad = _exact(grad)
        grad_x = _turned(grad, cos, -sin)
        grad_gains = None
        if gains is not None:
            unit = _exact(qkv[:, :, :2].permute(2, 0, 3, 1, 4)).mul_(inverse)
            along = grad_x * unit
            grad_gains = along.sum((1, 2, 3))
            gain = gains[:, None, None, None]
            mean = (along * gain).mean(-1, keepdim=True)
            grad_x.mul_(gain).addcmul_(unit, mean, value=-1).mul_(inverse)
        grad_qkv = torch.empty_like(qkv)
        grad_qkv[:, :, :2] = grad_x.permute(1, 3, 0, 2, 4)
        grad_qkv[:, :, 2] = grad_v.transpose(1, 2)
        return grad_qkv, grad_gains, None, None


def _exact(x: Tensor) -> Tensor:
    """A contiguous copy in float32 at least, in one pass."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape, dtype=dtype).copy_(x)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + x's halves exchanged * sin; `roll` would take a pass of its own."""
    half, out = x.shape[-1] // 2, x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


# --- attention -----------------------------------------------------------------------------------

SDPA_BATCH = 65_535  # CUDA's fused kernels lay the batch along a grid axis that ends here
BLOCK = 128  # queries at a time


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention over the past, [B, H, T, C] each, by the best kernel."""
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if slow or len(q) > SDPA_BATCH:
        return blocked_attention(q, k, v)
    with sdpa_kernels():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by plain products, for BLOCK queries at a time over the keys they may see.

    On CPUs SDPA's bfloat16 kernel took more than twice as long (benchmarks/README.md). It keeps the
    attention weights for backward, B * H * T^2 / 2 of them a layer.
    """
    return _BlockedAttention.apply(q, k, v)


class _BlockedAttention(torch.autograd.Function):
    """Y = P V with P = softmax(s Q K^T) over each row's past and s = 1 / sqrt(C).

    dV = P^T dY
    dS = P * (dY V^T - i), the slope of P's logits; i = rowsum(P * dY V^T) = rowsum(dY * Y), which
    needs no square (FlashAttention: Dao et al. 2022, appendix B.2)
    dQ = s dS K and dK = s dS^T Q
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, frames, scale = q.shape[:2], q.shape[2], q.shape[3] ** -0.5
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [B * H, T, C]
        mixed, weights = torch.empty_like(q), []
        for first in range(0, frames, BLOCK):
            end = min(first + BLOCK, frames)
            future = torch.full((end - first, end), -torch.inf, dtype=q.dtype, device=q.device)
            scores = torch.baddbmm(
                future.triu(1 + first), q[:, first:end], k[:, :end].mT, alpha=scale
            )
            weights.append(scores.softmax(-1))
            mixed[:, first:end] = weights[-1] @ v[:, :end]
        ctx.save_for_backward(q, k, v, mixed, *weights)
        return mixed.unflatten(0, batch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, mixed, *weights = ctx.saved_tensors
        batch, grad, scale = grad.shape[:2], grad.flatten(0, 1), q.shape[2] ** -0.5
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        inner = (grad * mixed).sum(-1, keepdim=True)
        for first, weight in zip(range(0, q.shape[1], BLOCK), weights, strict=True):
            end = min(first + BLOCK, q.shape[1])
            block = grad[:, first:end]
            grad_v[:, :end].baddbmm_(weight.mT, block)
            slope = torch.baddbmm(inner[:, first:end], block, v[:, :end].mT, beta=-1).mul_(weight)
            grad_q[:, first:end] = torch.bmm(slope, k[:, :end])
            grad_k[:, :end].baddbmm_(slope.mT, q[:, first:end], alpha=scale)
        return (
            grad_q.mul_(scale).unflatten(0, batch),
            grad_k.unflatten(0, batch),
            grad_v.unflatten(0, batch),
        )


def find_sdpa_kernels() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """The context that lets SDPA choose flash, memory-efficient or plain kernels.

    cuDNN's kernel is left out: it recompiles for every shape. A PyTorch that names the context
    otherwise gets its own, one that has none chooses for itself.
    """
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        old = getattr(torch.backends.cuda, "sdp_kernel", None)
        return old if old is not None else contextlib.nullcontext
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return lambda: sdpa_kernel(kernels)


sdpa_kernels = find_sdpa_kernels()


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

    def forward(self, x: Tensor, part: int = 0) -> Tensor:
        """[..., in] of any dtype -> [..., out / parts] in `dtype`."""
        weight = self.parts[part]
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
