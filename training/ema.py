"""Exponential moving average (EMA) of the weights, which is evaluated, sampled and shared.

ema = Ema(model, decay=0.999)
optimizer.step(); ema.update(step)  # steps count from 1
ema.model                           # a separate model, in eval mode
"""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Ema(Generic[M]):
    """Exponential moving average of a model's weights, kept as a second model.

    Evaluation uses the second model directly. Averages are never swapped into the trained model, so
    an interrupted evaluation cannot leave them there. The memory cost is the same.
    """

    def __init__(self, model: M, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.averaged: list[Tensor] = list(self.model.parameters())
        self.trained: list[Tensor] = list(model.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average after optimizer step number `step`, counted from 1.

        The decay warms up as (1 + step) / (10 + step), so that a short run is not an average over
        its random start (Abadi et al., TensorFlow's ExponentialMovingAverage, `num_updates`).
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averaged, self.trained, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights under the names of the model's state_dict."""
        return dict(self.model.state_dict())
