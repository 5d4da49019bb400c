"""Figures of tensors against slow references; odd tensors are measured or passed over."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.checkpoints import content_of
from torch import nn

from doctor.reading import measures as ckpt_measures
from doctor.reading.reader import summarize
from doctor.reading.summary import Parameter

# --- odd contents ---------------------------------------------------------------------------------


def save(path: Path, model: dict[str, Any], **others: Any) -> Path:
    torch.save({"model": model, "global_step": 5, "cfg": {}, **others}, path)
    return path


def test_odd_tensors_are_measured_or_passed_over(tmp_path):
    model = {
        "int": torch.arange(10),
        "bool": torch.ones(4, dtype=torch.bool),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0),
        "empty rows": torch.empty(0, 32),
        "f16": torch.full((32, 32), 2.0, dtype=torch.float16),
        "bf16": torch.full((32, 32), 2.0, dtype=torch.bfloat16),
        "f64": torch.full((32, 32), 2.0, dtype=torch.float64),
        "f8": torch.full((32, 32), 2.0).to(torch.float8_e4m3fn),
        "parameter": nn.Parameter(torch.full((32, 32), 2.0)),
        "grad": torch.full((32, 32), 2.0, requires_grad=True),
        "view": torch.full((64, 64), 2.0)[::2, ::2],
        "transposed": torch.full((16, 64), 2.0).T,
        "expanded": torch.full((1,), 2.0).expand(4),
        "text": "hello",
        "number": 7,
        "none": None,
        "list": [torch.ones(3)],
        5: torch.ones(3),
    }
    summary = summarize(save(tmp_path / "rvq_4cb_latest.pt", model))
    assert summary.problem is None, summary.problem
    found = {p.name: p for p in summary.parameters}
    for name in ("f16", "bf16", "f64", "f8", "parameter", "grad", "view", "transposed"):
        assert found[name].rms == 2.0, name
        assert found[name].bad == {}
    assert found["scalar"].rms == 3.0


def test_a_complex_tensor_costs_no_more_than_its_row(tmp_path):
    odd = {"odd": torch.ones(8, dtype=torch.complex64), "w": torch.ones(9)}
    summary = summarize(save(tmp_path / "rvq_4cb_latest.pt", odd))
    assert summary.problem is None
    assert [p.name for p in summary.parameters] == ["w"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of its own tensors
@pytest.mark.parametrize("kind", ["sparse", "quantised", "meta", "csr"])
def test_tensors_of_a_kind_that_training_never_saves_are_not_loaded(kind, tmp_path):
    odd = {
        "sparse": lambda: torch.eye(8).to_sparse(),
        "quantised": lambda: torch.quantize_per_tensor(torch.ones(8), 0.1, 0, torch.qint8),
        "meta": lambda: torch.empty(8, device="meta"),
        "csr": lambda: torch.eye(8).to_sparse_csr(),
    }[kind]()
    summary = summarize(save(tmp_path / "rvq_4cb_latest.pt", {"odd": odd, "w": torch.ones(9)}))
    assert summary.problem is not None
    assert summary.problem.kind == "unsafe"
    assert "of a kind that no training saves" in summary.problem.text


def test_float8_and_half_with_bad_values(tmp_path):
    weight = torch.ones(20, 20, dtype=torch.float16)
    weight[0, 0], weight[1, 1], weight[2, 2] = math.inf, -math.inf, math.nan
    summary = summarize(save(tmp_path / "a.pt", {"w": weight}))
    assert summary.parameters[0].bad == {"raw": 3}
    assert summary.parameters[0].rms == pytest.approx(math.sqrt(397 / 400))


def test_bad_values_are_counted_in_their_place(good):
    content = content_of(good)
    name = "blocks.1.mlp.up.weight"
    content["model"][name].view(-1)[[3, 70]] = math.nan
    content["ema"][name].view(-1)[5] = -math.inf
    for group in content["optimizer"]["param_groups"]:
        if name in group["param_names"]:
            number = group["params"][group["param_names"].index(name)]
    state = content["optimizer"]["state"][number]
    state["exp_avg"].view(-1)[:4] = math.inf
    state["exp_avg_sq"].view(-1)[9] = -1.0
    torch.save(content, good)
    bad = {p.name: p for p in summarize(good).parameters if p.bad or p.v_negative}
    assert bad[name].bad == {"raw": 2, "ema": 1, "m": 4}
    assert bad[name].v_negative == 1
    assert list(bad) == [name]


@pytest.mark.parametrize("last", [0, -3, 10**30, None])
def test_a_codebook_without_codes_costs_no_more_than_its_rows(last, good):
    content = content_of(good)
    content["architecture"]["vocab_sizes"] = [64, 64, 64, last]
    torch.save(content, good)
    summary = summarize(good)
    assert summary.problem is None
    assert len(next(p for p in summary.parameters if p.name == "head.weight").zero_rows) == 3


# --- figures against slow references --------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(adamw_run: Path) -> tuple[dict[str, Any], dict[str, Parameter], dict[str, Any]]:
    path = adamw_run / "rvq_4cb_latest.pt"
    content = content_of(path)
    states = {}
    for group in content["optimizer"]["param_groups"]:
        for name, number in zip(group["param_names"], group["params"], strict=True):
            states[name] = content["optimizer"]["state"][number]
    return content, {p.name: p for p in summarize(path).parameters}, states


def rms(tensor: torch.Tensor) -> float:
    values = tensor.flatten().double().tolist()
    return math.sqrt(math.fsum(x * x for x in values) / len(values))


def test_sizes_and_distances(measured):
    content, found, states = measured
    for name, weight in content["model"].items():
        p, state = found[name], states[name]
        assert p.rms == pytest.approx(rms(weight))
        assert p.largest == pytest.approx(float(weight.abs().max()))
        assert p.ema_rms == pytest.approx(rms(content["ema"][name]))
        difference = weight.double() - content["ema"][name].double()
        assert p.ema_distance == pytest.approx(rms(difference))
        assert p.m_rms == pytest.approx(rms(state["exp_avg"]))
        assert p.v_root == pytest.approx(math.sqrt(float(state["exp_avg_sq"].double().mean())))
        assert p.shape == list(weight.shape)


def test_adams_step_is_the_one_that_the_optimizer_takes(measured):
    """Against torch's own AdamW: one more step with a gradient that leaves m / sqrt(v) alone."""
    content, found, states = measured
    for name, p in found.items():
        state = {k: v.clone() for k, v in states[name].items()}
        weight = nn.Parameter(content["model"][name].double())
        m, v = state["exp_avg"].double(), state["exp_avg_sq"].double()
        t = float(state["step"])
        u = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        assert p.update_rms == pytest.approx(rms(u), rel=1e-6)
        optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
        # After a step with gradient g: 0.9 m' + 0.1 g = m and 0.95 v' + 0.05 g^2 = v at g = 0.
        before = {"step": torch.tensor(t - 1), "exp_avg": m / 0.9, "exp_avg_sq": v / 0.95}
        optimizer.state[weight] = before
        weight.grad = torch.zeros_like(weight)
        old = weight.detach().clone()
        optimizer.step()
        assert rms(old - weight.detach()) == pytest.approx(p.update_rms, rel=1e-6)
        d = (content["model"][name].double() - content["ema"][name].double()).flatten()
        cos = -float(d @ u.flatten()) / float(d.norm() * u.norm())
        assert p.update_cos == pytest.approx(cos, abs=1e-6)


def test_rows_of_zeros_are_counted_by_codebook(good):
    content = content_of(good)
    content["model"]["head.weight"][64:67] = 0
    torch.save(content, good)
    found = {p.name: p.zero_rows for p in summarize(good).parameters}
    assert found["head.weight"] == {"0": 0, "1": 3, "2": 0, "3": 0}
    assert found["blocks.0.mlp.up.weight"] == {}


def test_moments_over_the_bound_are_counted_and_no_others(good):
    assert all(p.m_over_bound == 0 for p in summarize(good).parameters)
    content = content_of(good)
    state = content["optimizer"]["state"][0]
    m, v = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
    v[:7] = m[:7].abs().clamp_min(1e-6).square() / 1.3**2
    m[:7] = m[:7].sign() * m[:7].abs().clamp_min(1e-6)
    v[7:11] = m[7:11].square().clamp_min(1e-12) / 1.1**2
    assert (m[:7] != 0).all()
    torch.save(content, good)
    assert sum(p.m_over_bound for p in summarize(good).parameters) == 7


def test_chunks_change_nothing(good, monkeypatch):
    whole = summarize(good).parameters
    monkeypatch.setattr(ckpt_measures, "CHUNK", 1000)
    for a, b in zip(whole, summarize(good).parameters, strict=True):
        assert a.sample == b.sample
        assert b.rms == pytest.approx(a.rms)
        assert b.update_cos == pytest.approx(a.update_cos)
        assert b.ema_distance == pytest.approx(a.ema_distance)


# --- Muon -----------------------------------------------------------------------------------------


def muon_states(content: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """State by name of the parameters in Muon's groups."""
    groups = [g for g in content["optimizer"]["param_groups"] if "ns_steps" in g]
    states = content["optimizer"]["state"]
    return {
        n: states[i] for g in groups for i, n in zip(g["params"], g["param_names"], strict=True)
    }


def test_a_muon_checkpoint_is_described(muon):
    summary, content = summarize(muon), content_of(muon)
    states = muon_states(content)
    assert summary.problem is None
    assert summary.mismatches == []
    assert summary.optimizer["method"] == "Muon + AdamW"
    groups = content["optimizer"]["param_groups"]
    assert [g["lr"] for g in summary.optimizer["groups"]] == [g["lr"] for g in groups]
    base = groups[0]["lr"] / groups[0].get("lr_factor", 1.0)
    assert summary.optimizer["lr"] == pytest.approx(base)
    for p in summary.parameters:
        assert (p.optimizer == "Muon") == (p.name in states)
        if p.name in states:
            momentum, weight = states[p.name]["momentum_buffer"], content["model"][p.name]
            assert p.m_rms == pytest.approx(rms(momentum))
            assert math.isnan(p.adam_step)
            assert math.isnan(p.v_root)
            d = (weight - content["ema"][p.name]).double().flatten()
            m = momentum.double().flatten()
            assert p.update_cos == pytest.approx(-float(d @ m / d.norm() / m.norm()), abs=1e-6)
        else:
            assert p.adam_step == summary.step
