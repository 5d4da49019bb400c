"""Cross-entropy of K codebooks from the states that their heads read.

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
    """Means over the frames of a batch, nats per code, float32."""

    ce: Tensor  # [K], plain cross-entropy; carries no gradient
    objective: Tensor  # scalar: smoothed, weighted; what training minimises


def linear_cross_entropy(
    states: Tensor,
    head: Tensor,
    codes: Tensor,
    vocab_sizes: Sequence[int],
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Losses:
    """Cross-entropy of codes [N, K] under the logits states @ head^T, and the training objective.

    States [K, N, D], or [1, N, D] that serve every codebook; head [K, V, D]; of codebook k the
    first V_k = vocab_sizes[k] rows count; codes int64 below them; weights [K] of the codebooks in
    the objective's mean, equal if None. Label smoothing spreads its share evenly over the V_k
    entries (Szegedy et al. 2016, section 7).
    """
    logits = head_logits(states, head)
    books = 1 if len(states) == 1 else 0  # which dimension of the logits has the codebooks
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
    """One product for all heads: logits [N, K, V] of states [1, N, D], [K, N, V] of [K, N, D]."""
    if len(states) == 1:
        return F.linear(states[0], head.flatten(0, 1)).unflatten(-1, (len(head), -1))
    return states @ head.mT


def cross_entropy(logits: Tensor, codes: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Of each code [M, L] under its logits [M, L, V], plain and with label smoothing."""
    log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    ce = F.nll_loss(log_p.flatten(0, 1), codes.flatten(), reduction="none").view_as(codes)
    # Not `mean`: its backward writes out a gradient of all logits, that of `sum` expands one.
    even = -log_p.sum(-1) / log_p.shape[-1]
    return ce, (1 - smoothing) * ce + smoothing * even
