"""The scales that weights allow, against models that are run on states of random direction."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from doctor.reading.scales import scales_of
from doctor.reading.summary import Summary
from model import CodesTransformer, ModelConfig


def of(config: ModelConfig) -> tuple[CodesTransformer, dict[tuple[str, str, int], float]]:
    """A model whose weights and gains are random, and its figures by what, where and number."""
    torch.manual_seed(0)
    model = CodesTransformer(config).eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * (0.3 if p.dim() == 2 else 1.0)
    summary = Summary("x", "latest", None, vocab_sizes=list(config.vocab_sizes))
    summary.architecture = config.to_dict()
    found = scales_of(model.state_dict(), summary)
    return model, {(x.what, x.where, x.number): x.value for x in found}


CONFIG = ModelConfig(vocab_sizes=(40, 40, 30), d_model=64, layers=2, heads=2)


def unit(*shape: int) -> torch.Tensor:
    """Vectors of random direction and RMS 1 over the last dimension."""
    x = torch.randn(*shape)
    return x / x.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("pattern", ["parallel", "depth"])
def test_logits_of_random_states(pattern):
    model, found = of(dataclasses.replace(CONFIG, pattern=pattern))
    norm = model.depth.norm if model.depth else model.norm
    states = norm(unit(20_000, norm.weight.numel())).detach()
    for k, size in enumerate(CONFIG.vocab_sizes):
        logits = states @ model.head.weight.detach().unflatten(0, (3, -1))[k, :size].T
        common = logits.mean(1, keepdim=True)
        spread = float((logits - common).square().mean().sqrt())
        assert found["logits", "head.weight", k] == pytest.approx(spread, rel=0.05)
        offset = float(common.square().mean().sqrt())
        assert found["offset", "head.weight", k] == pytest.approx(offset, rel=0.05)
        assert found["embedding", "embed.weight", k] > 0


@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_logits_of_random_inputs(qk_norm):
    config = dataclasses.replace(CONFIG, qk_norm=qk_norm)
    model, found = of(config)
    attn, norm = model.blocks[1].attn, model.blocks[1].norm1
    queries, keys = (attn.qkv(norm(unit(20_000, 64))).unflatten(-1, (3, 2, 32)) for _ in "qk")
    for head in range(2):
        q, k = attn.q_norm(queries[:, 0, head]), attn.k_norm(keys[:, 1, head])
        rms = float((q * k).sum(-1).square().mean().sqrt()) / math.sqrt(32)
        where = "blocks.1.attn." + ("q_norm.weight" if qk_norm else "qkv.weight")
        expected = pytest.approx(rms, rel=0.25 if qk_norm else 0.1)  # normalised is not quite even
        assert found["attention", where, 0 if qk_norm else head] == expected
