"""Cross-entropy from hidden states, a few codebooks at a time.

    ce, objective = linear_cross_entropy(states, head, codes, sizes, label_smoothing=0.05)
    objective.backward()                     # states [K, N, D], head [K, V, D], codes [N, K]

Logits are the largest tensor of a codes model: K * V numbers a frame. Here they are made for a few
codebooks at a time and turned into gradients on the spot, so that never more than LOGITS_AT_ONCE
of them exist, forward or backward, but for a single codebook that has more. What is kept until
backward has the size of states and head.

N frames, K codebooks, G of them at once, V entries of the largest, D width of a state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.kernels import product_dtype

# At least one codebook's. A CPU is fastest on logits that stay in its caches (8 MiB of float32), a
# GPU on products that fill it (256 MiB).
LOGITS_AT_ONCE = {"cpu": 2**21}
LOGITS_AT_ONCE_ELSEWHERE = 2**26


class Losses(NamedTuple):
    """Means over the frames of a batch, nats per code, float32."""

    ce: Tensor  # [K], plain cross-entropy; carries no gradient
    objective: Tensor  # scalar: smoothed, with z-loss, weighted; what training minimises


def linear_cross_entropy(
    states: Tensor,
    head: Tensor,
    codes: Tensor,
    sizes: Tensor,
    *,
    absent: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Losses:
    """Cross-entropy of codes [N, K] under the logits states @ head^T, and the training objective.

    States [K, N, D], or [1, N, D] that serve every codebook; head [K, V, D]; sizes [K], the entries
    V_k that each codebook has; codes int64 below them; absent [K, V] bool, the other entries, None
    where there are none; weights [K] of the codebooks in the objective's mean, equal if None.
    Products are made in autocast's dtype, sums in float32.

    Label smoothing spreads its share evenly over the V_k entries (Szegedy et al. 2016, section 7).
    The z-loss is the square of the log partition, and keeps it near 0 (Chowdhery et al. 2022,
    section 5).
    """
    if weights is None:
        weights = torch.ones(len(sizes), device=states.device)
    learns = torch.is_grad_enabled() and (states.requires_grad or head.requires_grad)
    dtype = product_dtype(states)
    ce, objective = _LinearCrossEntropy.apply(
        states, head, codes, sizes, absent, weights, label_smoothing, z_loss, dtype, learns
    )
    return Losses(ce, objective)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in forward, where the logits are; backward only scales them.

    Of one code y in a codebook of V_k entries, with p = softmax(logits), Z their partition,
    smoothing s and z-loss z:

    loss = (1 - s) (-log p_y) + s (log Z - mean of the logits) + z (log Z)^2
    d loss / d logits = p (1 + 2 z log Z) - (1 - s) [at y] - s / V_k

    The first two terms are the slope, the third is the same for every entry and frame: what it adds
    to products with the slope are sums over head or states, and no logits are needed for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: Tensor,
        codes: Tensor,
        sizes: Tensor,
        absent: Tensor | None,
        weights: Tensor,
        smoothing: float,
        z_loss: float,
        dtype: torch.dtype,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        shared, (n, k), vocab = len(states) == 1, codes.shape, head.shape[1]
        exact = torch.promote_types(dtype, torch.float32)
        x, w = states.to(dtype), head.to(dtype)
        x_sum = states.sum(1, keepdim=True, dtype=exact).expand(k, -1, -1)  # [K, 1, D]
        present = head if absent is None else head.masked_fill(absent[..., None], 0)
        w_mean = present.sum(1, keepdim=True, dtype=exact) / sizes[:, None, None]  # [K, 1, D]
        scale = (weights / (n * k))[:, None, None]
        facts = []
        grad_states = torch.zeros_like(states, dtype=exact)
        grad_head = torch.empty_like(head) if learns else head
        at_once = LOGITS_AT_ONCE.get(head.device.type, LOGITS_AT_ONCE_ELSEWHERE)
        group = max(1, at_once // (n * vocab))
        for first in range(0, k, group):
            g = slice(first, min(first + group, k))
            gone = None if absent is None else absent[g, None]
            x_g = x if shared else x[g]
            fact, slope = _logits_and_slope(
                x_g, w[g], codes.mT[g, :, None], gone, smoothing, z_loss
            )
            facts.append(fact)
            if not learns:
                continue
            even_w = smoothing / sizes[g, None, None] * x_sum[g]
            if gone is not None:
                even_w = even_w * ~gone.mT
            even = smoothing * w_mean[g], even_w
            grad_x, grad_head[g] = _gradients(x_g, w[g], slope, even, scale[g])
            if shared:
                grad_states += grad_x.sum(0)
            else:
                grad_states[g] = grad_x
        ce, log_z, squares = torch.cat(facts, dim=1)  # [K] each
        mean_logit = (x_sum * w_mean).sum((1, 2)) / n  # over frames and entries, without the logits
        smoothed = (1 - smoothing) * ce + smoothing * (log_z - mean_logit)
        objective = ((smoothed + z_loss * squares) * weights).mean()
        ctx.mark_non_differentiable(ce)
        ctx.save_for_backward(grad_states, grad_head)
        return ce, objective

    @staticmethod
    def backward(ctx: Any, _: Tensor, factor: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_head = ctx.saved_tensors
        return grad_states * factor, grad_head * factor, *([None] * 8)


def _logits_and_slope(
    x: Tensor, w: Tensor, target: Tensor, absent: Tensor | None, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Of G codebooks: states [1 or G, N, D], head [G, V, D], target [G, N, 1], absent [G, 1, V].

    Returns means over frames, [3, G], of cross-entropy, log Z and its square; and the slope
    [G, N, V], in the dtype of the products.
    """
    logits = _product(x, w.mT)
    if absent is not None:
        logits.masked_fill_(absent, -torch.inf)
    log_p = F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    log_p_target = log_p.gather(-1, target)
    log_z = logits.gather(-1, target) - log_p_target
    facts = torch.cat((-log_p_target, log_z, log_z.square()), dim=-1).mean(1).mT
    p = log_p.exp_()
    if z_loss:
        p *= 1 + 2 * z_loss * log_z
    hit = torch.full_like(target, smoothing - 1, dtype=logits.dtype)
    return facts, p.to(logits.dtype).scatter_add_(-1, target, hit)


def _gradients(
    x: Tensor, w: Tensor, slope: Tensor, even: tuple[Tensor, Tensor], scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Of G codebooks' states and head, [G, N, D] and [G, V, D] in float32 at least.

    `even` is what s / V_k takes from either; `scale` [G, 1, 1] is a code's weight in the objective.
    """
    exact, n = torch.promote_types(slope.dtype, torch.float32), x.shape[1]
    grad_x = (_product(slope, w).to(exact) - even[0]) * scale
    # A sum over many frames could overflow fp16; sqrt(n) keeps it in range.
    grad_w = _product(slope.mT, x * n**-0.5).to(exact) * n**0.5
    return grad_x, (grad_w - even[1]) * scale


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[1 or G, M, D] @ [G, D, N]; a batch of one would copy transposed operands on a CPU."""
    return (a[0] @ b[0])[None] if len(a) == len(b) == 1 else a @ b
