"""Classifier-free guidance: draw more of what a label tells than the model itself would.

    model = Guided(model, 2.0)                              # takes the model's place in drawing
    cache = model.new_cache(batch=4, ctx=512, labels=labels)  # [4, n] -> 8 rows
    state = model.prefill(columns, cache)                   # [4, T, K] -> [4, 2, D]
    column = model.draw(state, choose, model.new_depth_cache(4))  # [4, K]

Each sample has two rows, one with its labels and one without, that hear the same codes (Ho and
Salimans 2022; for music AudioGen and MusicGen, Copet et al. 2023, section 2.3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layers.cache import KeyValueCache
from model import ABSENT, Choose, CodesTransformer


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Mix logits [2 B, ...], the first half of them with labels: u + guidance (l - u), [B, ...].

    float32. What no code has stays -inf.
    """
    labelled, unlabelled = logits.float().chunk(2)
    mixed = unlabelled + guidance * (labelled - unlabelled)
    return mixed.masked_fill(unlabelled == -math.inf, -math.inf)


class Guided:
    """A labelled model as drawing sees it; see `CodesTransformer` for what its methods take."""

    def __init__(self, model: CodesTransformer, guidance: float) -> None:
        self.model, self.guidance = model, guidance
        self.config, self.depth = model.config, model.depth

    def new_cache(
        self,
        batch: int,
        ctx: int,
        dtype: torch.dtype = torch.float32,
        *,
        labels: Tensor | None,
        static: bool = False,
    ) -> KeyValueCache:
        """Return a cache of two rows for each sample, the second half of them without labels."""
        assert labels is not None, "nothing to guide to"
        rows = torch.cat((labels, torch.full_like(labels, ABSENT)))
        return self.model.new_cache(2 * batch, ctx, dtype, static=static, labels=rows)

    def new_depth_cache(self, batch: int) -> KeyValueCache | None:
        """Return a cache of a frame's codebooks for two rows of each sample."""
        return self.model.new_depth_cache(2 * batch)

    def prefill(self, columns: Tensor, cache: KeyValueCache) -> Tensor:
        """Fill the cache with columns [B, T, K]; return the states [B, 2, D] of the next."""
        return _paired(self.model.prefill(columns.repeat(2, 1, 1), cache))

    def advance(self, column: Tensor, cache: KeyValueCache) -> Tensor:
        """Append the column [B, K] to both rows; return the states [B, 2, D] of the next."""
        return _paired(self.model.advance(column.repeat(2, 1), cache))

    def draw(self, state: Tensor, choose: Choose, cache: KeyValueCache | None = None) -> Tensor:
        """Draw the next column [B, K] from states [B, 2, D]; `choose` is given mixed logits."""

        def choose_once(logits: Tensor, first: int) -> Tensor:
            return choose(guided(logits, self.guidance), first).repeat(2, 1)

        rows = state.transpose(0, 1).flatten(0, 1)
        return self.model.draw(rows, choose_once, cache)[: len(state)]


def _paired(states: Tensor) -> Tensor:
    return states.unflatten(0, (2, -1)).transpose(0, 1)
