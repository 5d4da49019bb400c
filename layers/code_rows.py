"""Embeddings and output heads: a row of numbers for each code of each codebook.

    embed = Embeddings(width, k, v, features)     # rows of k codebooks of v entries
    head = Heads(width, k, v, features)           # x [..., width] -> logits [..., k * v]
    head.vectors.copy_(vectors)                   # [k, v, features], before training

v is the number of entries of the largest codebook, `features` what is known of each entry; 0: none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CodeRows(nn.Module):
    """A row of `width` numbers for each code of k codebooks; codebook i owns rows i * V on.

    Where the model knows the vectors [k, V, F] that a codec's codes stand for, a row is its own
    weight plus its code's vector times a matrix [F, width] of the codebook, which is learned too.
    So what is learned of one code holds for all that sound like it; a weight of its own is seen
    once in V frames. The matrices start at zero.
    """

    weight: Tensor  # [k * V, width]
    vectors: Tensor | None

    def know(self, k: int, v: int, features: int) -> None:
        """Make room for vectors of `features` numbers; 0: none."""
        self.k, width = k, self.weight.shape[1]
        self.proj = nn.Parameter(torch.zeros(k, features, width)) if features else None
        self.register_buffer("vectors", torch.zeros(k, v, features) if features else None)

    def rows(self) -> Tensor:
        """Return all rows, [k * V, width]."""
        if self.vectors is None or self.proj is None:
            return self.weight
        return self.weight + (self.vectors @ self.proj).flatten(0, 1)

    def fold(self) -> None:
        """Make the rows plain weights, for a model that is used and no longer trained."""
        self.weight = nn.Parameter(self.rows().detach(), requires_grad=False)
        self.vectors = self.proj = None


class Embeddings(CodeRows, nn.Embedding):
    """The embeddings [k * V, width] of k codebooks."""

    def __init__(self, width: int, k: int, v: int, features: int) -> None:
        super().__init__(k * v, width)
        self.know(k, v, features)


class Heads(CodeRows, nn.Linear):
    """The output heads of K codebooks as one matrix [K * V, width] without bias."""

    def __init__(self, width: int, k: int, v: int, features: int) -> None:
        super().__init__(width, k * v, bias=False)
        self.know(k, v, features)

    def forward(self, x: Tensor, k: int | None = None) -> Tensor:
        """Map x [..., D] to logits of all codebooks [..., K * V], or of codebook k [..., V]."""
        return F.linear(x, self.rows() if k is None else self.by_codebook()[k])

    def by_codebook(self) -> Tensor:
        """Return the rows as [K, V, D]."""
        return self.rows().unflatten(0, (self.k, -1))
