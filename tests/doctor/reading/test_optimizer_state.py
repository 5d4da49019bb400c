"""How far a step can go, against torch's own optimizers; odd ones cost no more than the row."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from kit.checkpoints import content_of
from torch import nn

from doctor.reading.optimizer_state import NEWTON_SCHULZ_GAIN, moment_bound
from doctor.reading.reader import summarize


@pytest.mark.parametrize(
    "spoil",
    [
        lambda o: o.update(param_groups=[]),
        lambda o: o.update(param_groups=[1, 2]),
        lambda o: o["param_groups"][0].update(betas=(0.9,)),
        lambda o: o["param_groups"][0].update(betas="ab"),
        lambda o: o["param_groups"][0].update(betas=(0.999, 0.9)),
        lambda o: o["param_groups"][0].update(betas=(1.0, 1.0)),
        lambda o: o["param_groups"][0].update(params=5),
        lambda o: o["param_groups"][0].update(param_names=None),
        lambda o: o["param_groups"][0].update(lr=None),
        lambda o: o["param_groups"][0].update(lr=torch.tensor(1e-3)),
        lambda o: o["param_groups"][0].pop("lr"),
        lambda o: o["param_groups"][0].pop("eps"),
        lambda o: o["state"].update({0: None}),
        lambda o: o["state"][0].update(exp_avg=None),
        lambda o: o["state"][0].update(exp_avg=torch.ones(3)),
        lambda o: o["state"][0].update(exp_avg=torch.arange(3)),
        lambda o: o["state"][0].update(step=7),
        lambda o: o["state"][0].update(step=torch.tensor(math.inf)),
        lambda o: o["state"][0].update(step=torch.tensor(-4.0)),
        lambda o: o["state"][0].update(step=torch.ones(5)),
        lambda o: o["state"][0].pop("exp_avg_sq"),
        lambda o: o["state"][0].update(max_exp_avg_sq=3.0),
    ],
)  # fmt: skip
def test_odd_optimizers_cost_no_more_than_the_row(spoil, good):
    content = content_of(good)
    content["optimizer"] = copy.deepcopy(content["optimizer"])
    spoil(content["optimizer"])
    torch.save(content, good)
    summary = summarize(good)
    assert summary.problem is None, summary.problem
    assert len(summary.parameters) == len(content["model"])


@pytest.mark.parametrize("key", ["ns_steps", "ns_coefficients", "momentum", "lr_factor", "lr"])
@pytest.mark.parametrize("value", [None, "x", 10**30, -1.0, math.nan, [1.0], 0])
def test_odd_settings_of_muon_cost_no_more_than_the_row(key, value, muon):
    content = content_of(muon)
    content["optimizer"]["param_groups"][0][key] = value
    torch.save(content, muon)
    assert summarize(muon).problem is None


@pytest.mark.parametrize("factor", [None, "x", -1.0, math.nan, math.inf, 0])
def test_an_odd_multiple_of_the_rate_counts_as_one(factor, muon):
    content = content_of(muon)
    content["optimizer"]["param_groups"][0]["lr_factor"] = factor
    torch.save(content, muon)
    group = summarize(muon).optimizer["groups"][0]
    assert group["lr_factor"] == 1.0


# --- how far a step can go ------------------------------------------------------------------------


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.8, 0.99), (0.0, 0.9)])
def test_the_bound_on_moments_holds_and_is_tight(betas):
    b1, b2 = betas
    bound, worst = moment_bound(b1, b2), 0.0
    rng = np.random.default_rng(0)
    sequences = [rng.standard_normal(400) * rng.choice([1, 1e-3, 1e3]) for _ in range(200)]
    sequences += [rng.standard_cauchy(60) for _ in range(100)]
    sequences += [np.where(rng.random(100) < 0.05, 1.0, 0.0) for _ in range(50)]
    # Cauchy-Schwarz holds with equality for g_i in proportion to (b1 / b2)^age.
    sequences += [(b1 / b2) ** np.arange(400)[::-1] if b1 else np.array([0.0, 1.0])]
    for gradients in sequences:
        m = v = 0.0
        for g in gradients:
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            if v:
                worst = max(worst, abs(m) / math.sqrt(v))
    assert worst <= bound * (1 + 1e-9)
    assert worst > 0.999 * bound


def test_the_bound_on_moments_as_published():
    assert moment_bound(0.9, 0.95) == pytest.approx(1.165, abs=1e-3)
    assert moment_bound(0.9, 0.999) == pytest.approx(7.27, abs=1e-2)
    assert moment_bound(0.95, 0.9) == math.inf
    assert moment_bound(math.nan, 0.9) == math.inf


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 128)])
def test_a_step_of_muon_is_as_large_as_told(adjust, shape, tmp_path):
    """Against torch's own, for gradients of every kind of spectrum."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, adjust_lr_fn=adjust)
    sizes, furthest = [], 0.0
    for power in (0.0, 0.5, 1.0, 3.0):
        u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        weight.grad = u @ torch.diag(s * torch.arange(1, len(s) + 1).float() ** -power) @ v
        optimizer.state.clear()
        before = weight.detach().clone()
        optimizer.step()
        moved = before - weight.detach()
        sizes.append(float(moved.square().mean().sqrt()))
        furthest = max(furthest, float(moved.abs().max()))
    state = optimizer.state_dict()
    state["param_groups"][0]["param_names"] = ["w"]
    torch.save({"model": {"w": weight.detach()}, "opt": state, "global_step": 1}, tmp_path / "a.pt")
    (p,) = summarize(tmp_path / "a.pt").parameters
    assert 0.7 * p.update_rms < sizes[0] < 1.2 * p.update_rms
    assert max(sizes) < p.update_rms * NEWTON_SCHULZ_GAIN
    assert furthest < p.step_bound


def test_no_singular_value_leaves_the_iteration_above_its_gain():
    """On paper, and by torch's own, whose bfloat16 rounds to 1 in 256."""
    s = np.linspace(0.0, 1.0, 10_001)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    assert s.max() < NEWTON_SCHULZ_GAIN < 1.001 * s.max()
    group = torch.optim.Muon([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]
    coefficients, steps, eps = group["ns_coefficients"], group["ns_steps"], group["eps"]
    largest = 0.0
    for first in np.linspace(0.01, 1.0, 100):
        rest = math.sqrt(max(0.0, 1 - first * first))
        matrix = torch.diag(torch.tensor([first, rest]))
        done = torch.optim._muon._zeropower_via_newtonschulz(matrix, coefficients, steps, eps)
        largest = max(largest, float(torch.linalg.svdvals(done.float())[0]))
    assert 1.1 < largest < 1.02 * NEWTON_SCHULZ_GAIN
