"""Cross-entropy of K codebooks from the hidden states that are the input of the heads.

    ce, objective = linear_cross_entropy(states, head, codes, vocab_sizes, label_smoothing=0.05)
    objective.backward()  # states [1 or K, N, D], head [K, V, D], codes [N, K]

N frames, K codebooks, V entries of the largest, D width of a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Losses(NamedTuple):
    """Losses averaged over the frames of a batch, in nats per code, float32."""

    ce: Tensor  # [K], plain cross-entropy, without gradient
    objective: Tensor  # scalar, smoothed and weighted: training minimises it


def linear_cross_entropy(
    states: Tensor,
    head: Tensor,
    codes: Tensor,
    vocab_sizes: Sequence[int],
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Losses:
    """Return the cross-entropy of codes [N, K] under the logits states @ head^T, and the objective.

    `states` are [K, N, D], or [1, N, D] for all codebooks alike; `head` is [K, V, D]. Codebook k
    uses the first V_k = vocab_sizes[k] rows of its head; its codes are int64 in [0, V_k). `weights`
    [K] weight the codebooks in the objective's mean; None means equal weights. Label smoothing
    spreads its share evenly over the V_k entries (Szegedy et al. 2016, section 7).
    """
    logits = head_logits(states, head)
    books = 1 if len(states) == 1 else 0  # dimension of the logits that holds the codebooks
    codes = codes if books == 1 else codes.mT
    if min(vocab_sizes) == logits.shape[-1]:
        ce, smoothed = cross_entropy(logits, codes, label_smoothing)
    else:
        each = zip(logits.split(1, books), codes.split(1, books), vocab_sizes, strict=True)
        pairs = [cross_entropy(x[..., :v], y, label_smoothing) for x, y, v in each]
        ce, smoothed = (torch.cat(parts, books) for parts in zip(*pairs, strict=True))
    by_codebook = smoothed.mean(1 - books)
    objective = (by_codebook if weights is None else by_codebook * weights).mean()
    return Losses(ce.detach().mean(1 - books), objective)


def head_logits(states: Tensor, head: Tensor) -> Tensor:
    """Return logits [N, K, V] of states [1, N, D], or [K, N, V] of [K, N, D], by one product."""
    if len(states) == 1:
        return F.linear(states[0], head.flatten(0, 1)).unflatten(-1, (len(head), -1))
    return states @ head.mT


def cross_entropy(logits: Tensor, codes: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return cross-entropies [M, L] of codes [M, L] given logits [M, L, V], plain and smoothed."""
    log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    ce = F.nll_loss(log_p.flatten(0, 1), codes.flatten(), reduction="none").view_as(codes)
    # Not `mean`: its backward allocates a gradient [M, L, V]; that of `sum` only expands a view.
    uniform_ce = -log_p.sum(-1) / log_p.shape[-1]
    return ce, (1 - smoothing) * ce + smoothing * uniform_ce
