"""What does not fit together in a checkpoint is told, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import torch
from kit.checkpoints import content_of

from doctor.reading.reader import summarize


def test_keys_and_shapes_that_do_not_fit(good):
    original = content_of(good)

    def mismatches(change: Any) -> str:
        content = dict(original, model=dict(original["model"]))
        change(content)
        torch.save(content, good)
        return "; ".join(summarize(good).mismatches)

    name = "blocks.0.attn.qkv.weight"
    assert mismatches(lambda c: None) == ""
    assert name in mismatches(lambda c: c["model"].pop(name))
    assert name in mismatches(lambda c: c["model"].update({name: c["model"][name].T}))
    assert "extra" in mismatches(lambda c: c["model"].update(extra=torch.ones(3)))
    assert "`rng`" in mismatches(lambda c: c.pop("rng"))
    assert "optimizer" in mismatches(lambda c: c.pop("optimizer"))
    assert "EMA" in mismatches(lambda c: c.update(ema={name: torch.ones(3)}))
    assert "scaler" in mismatches(lambda c: c.pop("scaler"))
    endless = {**original["architecture"], "layers": math.inf}
    assert "builds no model" in mismatches(lambda c: c.update(architecture=endless))


def test_a_weight_without_moments_is_named(good):
    content = content_of(good)
    group = content["optimizer"]["param_groups"][0]
    name, number = group["param_names"].pop(), group["params"].pop()
    del content["optimizer"]["state"][number]
    torch.save(content, good)
    assert f"no optimizer state for {name}" in summarize(good).mismatches


def test_names_of_a_compiled_module(tmp_path):
    weights = {f"_orig_mod.blocks.{i}.attn.qkv.weight": torch.randn(96, 32) for i in range(2)}
    path = tmp_path / "rvq_4cb_latest.pt"
    torch.save({"model": weights, "global_step": 5, "cfg": {}}, path)
    summary = summarize(path)
    assert summary.prefix == "_orig_mod."
    assert [p.place.role for p in summary.parameters] == ["attn.qkv"] * 2


def test_an_older_scripts_file_may_be_without_its_optimizer(tmp_path):
    weights = {f"{part}.0.weight": torch.randn(64, 32) for part in ("embeds", "heads")}
    path = tmp_path / "rvq_1cb_latest.pt"
    content = {"model": weights, "global_step": 5, "cfg": {}, "vocab_sizes": [64]}
    torch.save(content, path)
    assert summarize(path).mismatches == []
    torch.save({**content, "opt": {"state": {}, "param_groups": []}}, path)
    assert summarize(path).mismatches == ["no optimizer state"]


def test_momentum_that_is_missing_foreign_or_not_finite(muon):
    content = content_of(muon)
    group = next(g for g in content["optimizer"]["param_groups"] if "ns_steps" in g)
    name, state = group["param_names"][0], content["optimizer"]["state"][group["params"][0]]
    momentum = state["momentum_buffer"]
    momentum.view(-1)[:5] = math.nan
    torch.save(content, muon)
    bad = {p.name: p.bad for p in summarize(muon).parameters if p.bad}
    assert bad == {name: {"momentum": 5}}

    state["momentum_buffer"] = momentum[1:].clone()
    torch.save(content, muon)
    assert [m for m in summarize(muon).mismatches if "momentum_buffer" in m and name in m]

    del state["momentum_buffer"]
    state["exp_avg"] = torch.zeros(3)
    torch.save(content, muon)
    mismatches = " ".join(summarize(muon).mismatches)
    assert f"Muon has no momentum_buffer of {name}" in mismatches
    assert f"Muon has a foreign exp_avg of {name}" in mismatches


def test_an_optimizer_other_than_the_flags_say(muon):
    content = content_of(muon)
    content["flags"]["optim"] = "adamw"
    torch.save(content, muon)
    assert "--optim adamw, but" in " ".join(summarize(muon).mismatches)
