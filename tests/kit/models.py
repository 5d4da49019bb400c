"""A tiny model and codes for it."""

from __future__ import annotations

import torch

from model import CodesTransformer, ModelConfig

CONFIG = ModelConfig((16, 16, 16), d_model=32, layers=2, heads=2, dropout=0.0, value_residual=True)


def make_model(config: ModelConfig = CONFIG, **options: bool) -> CodesTransformer:
    """A model whose output projections are not zero, so that every path carries signal."""
    torch.manual_seed(0)
    model = CodesTransformer(config, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def make_codes(config: ModelConfig = CONFIG, batch: int = 2, frames: int = 12) -> torch.Tensor:
    torch.manual_seed(1)
    columns = [torch.randint(v, (batch, frames)) for v in config.vocab_sizes]
    return torch.stack(columns, dim=-1)
