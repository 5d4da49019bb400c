"""The training objective as one module, which torch.compile and DDP wrap directly.

objective = Objective(model, label_smoothing=0.05, weights=torch.ones(9))
objective(codes).objective.backward()  # codes [B, T, K]
"""

from __future__ import annotations

from torch import Tensor, nn

from layers.loss import Losses
from model import CodesTransformer


class Objective(nn.Module):
    """A model with its label smoothing and the loss weights [K] of its codebooks."""

    weights: Tensor

    def __init__(self, model: CodesTransformer, label_smoothing: float, weights: Tensor) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Losses:
        """Return the losses of codes [B, T, K] with labels [B, n], both int64, in nats per code."""
        return self.model.losses(codes, self.label_smoothing, self.weights, labels)
