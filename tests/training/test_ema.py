"""Averaged weights."""

from __future__ import annotations

import torch

from training.ema import Ema


def test_ema_follows_its_formula_and_leaves_the_model_alone():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    ema = Ema(model, decay=0.9)
    expected = model.weight.detach().clone()
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        raw = model.weight.detach().clone()
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * raw
        assert torch.equal(model.weight, raw)
    torch.testing.assert_close(ema.state_dict()["weight"], expected)
    assert not any(p.requires_grad for p in ema.model.parameters())
