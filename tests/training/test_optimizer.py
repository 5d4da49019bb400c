"""The optimizer: groups, Muon beside AdamW, its state; and the trainer's runs with each of them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.checkpoints import assert_same_tensors, comparable
from kit.trainer import TINY, make_run, rows, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import sample_rvq
import train_rvq
import training.optimizer
from cli.device import fast_precision
from model import PATTERNS, CodesTransformer, ModelConfig
from run_folder.checkpoint import load_checkpoint
from run_folder.files import save_checkpoint
from sound.npq_format import map_codes, read_header
from training import setup
from training.optimizer import (
    ADAMW_FACTOR,
    HEAD_WIDTH,
    MUON_FACTOR,
    MuonWithAdamW,
    StackedMuon,
    build_optimizer,
    muon_flops,
    muon_groups,
    orthogonalized,
    parameter_groups,
    state_tensors,
)
from training.saving import unsound
from training.schedule import lr_at_step

SMALL = ModelConfig((16,) * 3, d_model=32, layers=2, heads=2, dropout=0.0)


def make_model(pattern: str, **changes: Any) -> CodesTransformer:
    torch.manual_seed(0)
    return CodesTransformer(dataclasses.replace(SMALL, pattern=pattern, **changes))


def make_optimizer(model: CodesTransformer, *, optim: str = "muon") -> torch.optim.Optimizer:
    return build_optimizer(model, optim=optim, lr=1e-3, weight_decay=0.1)


def gradients(model: CodesTransformer, seed: int) -> None:
    """Of the same windows for the same seed."""
    codes = torch.randint(16, (2, 8, 3), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model.losses(codes).objective.backward()


def step(model: CodesTransformer, optimizer: torch.optim.Optimizer, seed: int, lr: float) -> None:
    """As the trainer makes it."""
    gradients(model, seed)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    optimizer.step()


# --- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["muon", "adamw"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_parameter_is_in_exactly_one_group(pattern, optim):
    model = make_model(pattern)
    groups = make_optimizer(model, optim=optim).param_groups
    names = [n for g in groups for n in g["param_names"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    held = [p for g in groups for p in g["params"]]
    assert all(p is model.get_parameter(n) for n, p in zip(names, held, strict=True))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_muon_trains_the_matrices_of_the_blocks_and_into_depth(pattern):
    hidden, (head, rest) = muon_groups(make_model(pattern), 0.1)
    kinds = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
    expected = {f"blocks.{i}.{k}.weight" for i in (0, 1) for k in kinds}
    if pattern == "depth":
        expected |= {f"depth.blocks.0.{k}.weight" for k in kinds} | {"depth.proj.weight"}
    assert {n for n, _ in hidden["params"]} == expected
    assert [n for n, _ in head["params"]] == ["head.weight"]
    assert {n for n, p in rest["params"] if p.dim() == 2} == {
        f"{owner}embed.weight" for owner in ("", "depth.") if owner == "" or pattern == "depth"
    }
    assert (hidden["weight_decay"], head["weight_decay"], rest["weight_decay"]) == (0.1, 0.1, 0)
    assert muon_groups(make_model(pattern), 0.1, decay_all=True)[1][1]["weight_decay"] == 0.1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_adamw_decays_matrices_of_products_alone(pattern):
    decayed, rest = parameter_groups(make_model(pattern), 0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0)
    assert {p.dim() for _, p in decayed["params"]} == {2}
    assert {n for n, p in rest["params"] if p.dim() == 2} <= {"embed.weight", "depth.embed.weight"}
    assert not [n for n, _ in decayed["params"] if "embed" in n]


@pytest.mark.parametrize("width", [HEAD_WIDTH // 2, HEAD_WIDTH, 3 * HEAD_WIDTH])
def test_the_rate_of_a_wide_head_falls_with_its_width(width):
    model = make_model("parallel", d_model=width, heads=2, layers=1)
    hidden, (head, rest) = muon_groups(model, 0.1)
    assert (hidden["lr_factor"], rest["lr_factor"]) == (MUON_FACTOR, ADAMW_FACTOR)
    assert head["lr_factor"] == pytest.approx(ADAMW_FACTOR * min(1, HEAD_WIDTH / width))


# --- steps ---------------------------------------------------------------------------------------


def test_a_step_without_a_rate_changes_nothing():
    model = make_model("depth")
    optimizer = make_optimizer(model)
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer, 0, lr=0.0)
    assert_same_tensors(dict(model.state_dict()), dict(before))
    assert optimizer.state[model.head.weight]["exp_avg"].any(), "there were gradients"
    assert optimizer.state[model.blocks[0].attn.out.weight]["momentum_buffer"].any()


def moves(lr: float) -> dict[str, torch.Tensor]:
    """What the first step at a rate adds to each parameter; without weight decay."""
    model = make_model("depth")
    optimizer = build_optimizer(model, optim="muon", lr=1.0, weight_decay=0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(model, optimizer, 0, lr)
    return {n: p.detach() - before[n] for n, p in model.named_parameters()}


def test_twice_the_rate_is_twice_the_step():
    once, twice = moves(1e-4), moves(2e-4)
    assert any(move.any() for move in once.values())
    for name, move in once.items():
        torch.testing.assert_close(twice[name], 2 * move, rtol=1e-3, atol=2e-7, msg=name)


def test_muon_moves_every_direction_by_its_factor_and_adamw_every_element():
    """At 2e-4: spectral norm 0.02 but for Newton-Schulz's tolerance, elements 5e-3."""
    made = moves(2e-4)
    for name in ("blocks.0.attn.out.weight", "depth.blocks.0.mlp.down.weight"):
        singular = torch.linalg.svdvals(made[name])  # descending
        assert singular[0].item() == pytest.approx(MUON_FACTOR * 2e-4, rel=0.35), name
    assert made["head.weight"].abs().max().item() == pytest.approx(ADAMW_FACTOR * 2e-4, rel=1e-3)


def test_stacks_of_matrices_move_as_torchs_muon_moves_each(monkeypatch):
    """Bit for bit over steps, in whole stacks, in parts of them and without some gradients; as
    long as every step of the iteration takes the Gram matrix of its own matrix, as torch's does.
    On a processor that is not fast in bf16 its batched products round differently."""
    monkeypatch.setattr(training.optimizer, "STACK", 2 * 32 * 96)
    monkeypatch.setattr(training.optimizer, "AT_ONCE", 1)
    model, other = make_model("depth"), make_model("depth")
    ours = StackedMuon([muon_groups(model, 0.1)[0]], lr=1e-2)
    theirs = torch.optim.Muon([muon_groups(other, 0.1)[0]], lr=1e-2)
    for seed in range(3):
        gradients(model, seed)
        gradients(other, seed)
        for made in (model, other):
            made.blocks[1].attn.out.weight.grad = None
        ours.step()
        theirs.step()
    for name, weight in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=1e-3)
    if fast_precision(torch.device("cpu")) == "bf16":
        assert_same_tensors(dict(model.state_dict()), dict(other.state_dict()))
        assert_same_tensors(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("shape", [(48, 160), (160, 48), (64, 64)])
@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_steps_taken_at_once_stay_near_the_plain_iteration(shape, decay):
    """Singular values that fall as i ** -decay; the truth is the iteration in float64."""
    torch.manual_seed(0)
    coefficients = (3.4445, -4.7750, 2.0315)
    left, _, right = torch.linalg.svd(torch.randn(2, *shape), full_matrices=False)
    fall = torch.arange(1, min(shape) + 1) ** -decay
    matrices = left * fall @ right

    def iterated(dtype: torch.dtype) -> torch.Tensor:
        x = (
            matrices.to(dtype)
            / torch.linalg.vector_norm(matrices.to(dtype), dim=(1, 2))[:, None, None]
        )
        a, b, c = coefficients
        for _ in range(5):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.double()

    truth = iterated(torch.float64)
    off = (orthogonalized(matrices, coefficients, 5) - truth).norm() / truth.norm()
    rounding = (iterated(torch.bfloat16) - truth).norm() / truth.norm()
    assert off < 0.06 + 1.1 * rounding  # all five at once: 0.18 to 120,000


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm")
        return func(*args, **(kwargs or {}))


def test_a_step_of_muon_takes_products_by_shape_and_not_by_matrix():
    """On a GPU a small product is a launch that the host is waited for."""
    counts = []
    for layers in (2, 6):
        model = make_model("parallel", layers=layers)
        optimizer = StackedMuon([muon_groups(model, 0.1)[0]], lr=1e-2)
        gradients(model, 0)
        with Products() as products:
            optimizer.step()
        counts.append(products.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_a_state_dict_goes_on_bit_for_bit(optim):
    whole = make_model("depth")
    optimizer = make_optimizer(whole, optim=optim)
    for seed in range(3):
        step(whole, optimizer, seed, 1e-4)
    other = make_model("depth")
    other.load_state_dict(whole.state_dict())
    resumed = make_optimizer(other, optim=optim)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        step(whole, optimizer, seed, 1e-4)
        step(other, resumed, seed, 1e-4)
    assert_same_tensors(dict(other.state_dict()), dict(whole.state_dict()))
    assert_same_tensors(resumed.state_dict(), optimizer.state_dict())


def test_parts_work_on_the_groups_and_the_state_of_the_whole():
    model = make_model("parallel")
    optimizer = make_optimizer(model)
    assert isinstance(optimizer, MuonWithAdamW)
    step(model, optimizer, 0, 1e-4)
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(part.state is optimizer.state for part in optimizer.parts)
    of_parts = [g for part in optimizer.parts for g in part.param_groups]
    assert all(a is b for a, b in zip(of_parts, optimizer.param_groups, strict=True))
    kinds = {k.split(" of ")[0] for k, _ in state_tensors(optimizer)}
    assert kinds == {"momentum_buffer", "exp_avg", "exp_avg_sq"}
    assert "momentum_buffer of blocks.1.mlp.up.weight" in dict(state_tensors(optimizer))


# --- the schedule --------------------------------------------------------------------------------


def test_wsd_warms_up_stays_and_falls_linearly():
    shape = {"lr": 2e-4, "eta_min": 1e-5, "warmup_ratio": 0.01}
    curve = [lr_at_step(s, 1000, **shape, schedule="wsd", cooldown=0.25) for s in range(1, 3000)]
    assert curve[4] == pytest.approx(1e-4), "half-way up"
    assert curve[9:750] == [pytest.approx(2e-4)] * 741
    assert curve[749 + 125] == pytest.approx((2e-4 + 1e-5) / 2)
    falls = np.diff(curve[749:1000])
    assert falls == pytest.approx([-(2e-4 - 1e-5) / 250] * 250)
    assert curve[999:] == [pytest.approx(1e-5)] * 2000
    assert all(a >= b for a, b in itertools.pairwise(curve[9:])), "pitfall 7"


def test_the_schedule_reaches_every_group(tunes, tmp_path):
    """--schedule wsd of a whole run: the rate of the rows, and of the groups at its end."""
    flags = ("--schedule", "wsd", "--cooldown", "0.5", "--optim", "muon", "--log-lr-steps", "1")
    checkpoint = train("--data", tunes, "--save_dir", tmp_path, "--epochs", "2", *flags)
    rates = [row["lr"] for row in rows(tmp_path, "step")]
    assert rates[:8] == [pytest.approx(3e-4)] * 8
    assert rates[8:] == sorted(rates[8:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5)
    lrs = [g["lr"] for g in checkpoint["optimizer"]["param_groups"]]
    assert lrs == pytest.approx([rates[-1] * f for f in (MUON_FACTOR, ADAMW_FACTOR, ADAMW_FACTOR)])


# --- runs ----------------------------------------------------------------------------------------


def run_flags(tunes: Path, pattern: str, *more: str) -> tuple[str | Path, ...]:
    """A run of sixteen steps that draws on every source of chance."""
    flags = ("--data", tunes, "--epochs", "2", "--dropout", "0.2", "--code-dropout", "0.1")
    return (*flags, "--layers", "1", "--pattern", pattern, *more, "--save_dir")


OPTIMS = "muon", "adamw"
CUTS = (1, 8, 13)  # in the first epoch, at its end, in the second


@pytest.mark.parametrize(
    ("optim", "cuts"),
    [("muon", CUTS), *(pytest.param(o, range(1, 17), marks=pytest.mark.slow) for o in OPTIMS)],
    ids=str,
)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_run_of_each_kind_resumes_bit_for_bit(pattern, optim, cuts, tunes, tmp_path):
    """Fault 14: cut several times, and gone on each time."""
    flags = run_flags(tunes, pattern, "--optim", optim)
    whole = comparable(train(*flags, tmp_path / "whole"))
    for n in cuts:
        assert train(*flags, tmp_path / "cut", stop_at=n)["progress"]["step"] == n
    assert_same_tensors(comparable(train(*flags, tmp_path / "cut")), whole)


def age(folder: Path) -> None:
    """Leave of a run's `latest` what the version before --optim and --pattern wrote."""
    checkpoint = load_checkpoint(folder / "rvq_4cb_latest.pt")
    for name in ("optim", "pattern", "depth_share", "code_dropout", "schedule", "row_decay"):
        del checkpoint["flags"][name]
    for name in ("pattern", "depth_layers"):
        del checkpoint["architecture"][name]
    for group in checkpoint["optimizer"]["param_groups"]:
        del group["lr_factor"]
    save_checkpoint(checkpoint, folder / "rvq_4cb_latest.pt")


def test_a_run_from_before_muon_and_patterns_goes_on_as_it_was(tunes, tmp_path):
    flags = ("--data", tunes, "--epochs", "2", "--lr", "3e-3", "--save_dir")
    plain = ("--optim", "adamw", "--pattern", "parallel", "--row-decay", "0")
    whole = comparable(train(*plain, *flags, tmp_path / "whole"))
    train(*plain, *flags, tmp_path / "cut", stop_at=5)
    age(tmp_path / "cut")
    run = make_run(*flags, tmp_path / "cut")
    assert (run.flags.optim, run.state.model.config.pattern) == ("adamw", "parallel")
    assert [g["lr_factor"] for g in run.state.optimizer.param_groups] == [1, 1]
    resumed = train(*flags, tmp_path / "cut")
    assert_same_tensors(comparable(resumed), whole)
    assert (resumed["flags"]["optim"], resumed["flags"]["pattern"]) == ("adamw", "parallel")


@pytest.mark.parametrize("kinds", [("adamw", "muon"), ("muon", "adamw")], ids="->".join)
def test_another_optimizer_in_the_middle_is_refused_with_the_remedy(kinds, tunes, tmp_path, capsys):
    flags = ("--data", tunes, "--epochs", "2", "--save_dir", tmp_path)
    train(*flags, "--optim", kinds[0], stop_at=3)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.pt")}
    argv = [*TINY, *map(str, flags), "--optim", kinds[1]]
    assert train_rvq.main(argv) == 1
    said = capsys.readouterr().err
    assert "another --optim" in said
    assert "--init-from" in said
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.pt")} == before
    latest = tmp_path / "rvq_4cb_latest.pt"
    fresh = tmp_path / "fresh"
    run = make_run(*flags[:-1], fresh, "--optim", kinds[1], "--init-from", latest)
    assert train_rvq.train_or_save(run) == 0, "the remedy"


def test_a_pattern_belongs_to_the_weights(tunes, tmp_path, capsys):
    flags = ("--data", tunes, "--epochs", "2", "--save_dir", tmp_path)
    train(*flags, "--pattern", "depth", stop_at=3)
    run = make_run(*flags, "--pattern", "delay")
    assert "--pattern: saved depth, given delay; the saved value stays" in (capsys.readouterr().out)
    assert run.state.model.config.pattern == "depth"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_momentum_that_is_not_finite_is_unsound(bad, tunes, tmp_path):
    """Fault 8."""
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--optim", "muon")
    train_rvq.train_step(run, iter(run.loader))
    assert unsound(run) is None
    weight = run.state.model.blocks[1].mlp.up.weight
    run.state.optimizer.state[weight]["momentum_buffer"][0, 3] = bad
    assert unsound(run) == (
        "1 tensors are not finite, first momentum_buffer of blocks.1.mlp.up.weight"
    )


# --- samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_samples_after_epochs_and_from_its_file(pattern, tunes, tmp_path):
    """Longer than ctx, with a prompt too; the codec does not fit such codes, which are kept."""
    flags = ("--eval-audio-every", "1", "--eval-frames", "40", "--eval-dac-repo", "demo")
    flags += ("--pattern", pattern, "--epochs", "1")
    train("--data", tunes, "--save_dir", tmp_path, *flags)
    (npq,) = (tmp_path / "samples").glob("*.npq")
    assert_codes(npq, 40)
    best = str(tmp_path / "rvq_4cb_best.pt")
    for number, more in enumerate(([], ["--prompt", str(tunes / "0.npq")])):
        out = tmp_path / f"out{number}.npq"
        assert sample_rvq.main([best, "--frames", "40", "--npq-out", str(out), *more]) == 0
        assert_codes(out, None)


def assert_codes(path: Path, frames: int | None) -> None:
    codes = np.array(map_codes(read_header(path)))
    assert codes.shape[1] == 4
    assert codes.max() < 64
    assert frames in (None, len(codes))
    assert len(np.unique(codes)) > 8, "drawn, and not filled in"


def test_a_run_of_flags_that_are_gone_goes_on_and_says_so(tunes, tmp_path, monkeypatch, capsys):
    """Saved with --no-qk-norm --depth-layers 2 --z-loss 1e-4 --embed-grad 0.1."""
    flags = ("--data", tunes, "--epochs", "2", "--layers", "1", "--save_dir")
    pick = setup.pick_architecture

    def as_flagged(*args: Any) -> tuple[ModelConfig, None]:
        return dataclasses.replace(pick(*args)[0], qk_norm=False, depth_layers=2), None

    with monkeypatch.context() as before:
        before.setattr(setup, "pick_architecture", as_flagged)
        whole = comparable(train(*flags, tmp_path / "whole"))
        train(*flags, tmp_path / "cut", stop_at=10)
    latest = tmp_path / "cut" / "rvq_4cb_latest.pt"
    checkpoint = load_checkpoint(latest)
    gone = {"qk_norm": False, "depth_layers": 2, "z_loss": 1e-4, "embed_grad": 0.1}
    checkpoint["flags"] |= gone
    save_checkpoint(checkpoint, latest)
    capsys.readouterr()
    run = make_run(*flags, tmp_path / "cut")
    said = capsys.readouterr().out
    for flag in ("--z-loss 0.0001", "--embed-grad 0.1"):
        assert f"{flag} of the saved run: this version has no such flag" in said
    assert "qk-norm" not in said, "that and the layers of depth belong to the architecture"
    assert (run.state.model.config.qk_norm, run.state.model.config.depth_layers) == (False, 2)
    assert checkpoint["guard"]["losses"]
    assert not run.state.guard.losses, "the loss has another level now"
    resumed = train(*flags, tmp_path / "cut")
    assert_same_tensors(comparable(resumed) | {"guard": whole["guard"]}, whole)
    assert not gone.keys() & resumed["flags"].keys()
    capsys.readouterr()
    make_run(*flags, tmp_path / "cut")
    assert "no such flag" not in capsys.readouterr().out


def test_the_plan_counts_the_products_that_muon_takes():
    model = make_model("depth")
    optimizer = build_optimizer(model, optim="muon", lr=1e-3, weight_decay=0.0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == muon_flops(model) > 0
