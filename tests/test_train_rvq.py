"""train_rvq.py: flags, one step, refusal, evaluation, saving, resuming; in this process."""

from __future__ import annotations

import contextlib
import copy
import glob
import itertools
import json
import math
import os
import resource
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same_tensors, rows, run_trainer

import train_rvq
from cli import command_line
from layers.loss import Losses
from model import CodesTransformer, ModelConfig
from npq_dataset import EpochOrder
from run_folder.checkpoint import load_checkpoint
from run_folder.files import save_checkpoint
from run_folder.lock import FolderLock
from run_folder.metrics import Console
from sound.npq_format import map_codes, read_header, write_npq
from train_rvq import backward, parse_flags, update
from training import saving as run_saving
from training import setup as run_setup
from training.optimizer import parameter_groups
from training.schedule import lr_at_step
from training.setup import codebook_weights, set_up
from training.state import Run

FRACTIONS = (command_line.fraction, command_line.fraction_or_one)
CLOCKS = {"seconds", "elapsed", "epoch_seconds", "log_seconds", "validated_seconds"}


def make_run(*flags: str | Path) -> Run:
    """A run as main sets it up."""
    parsed, explicit = parse_flags([*TINY, *map(str, flags)])
    Path(parsed.save_dir).mkdir(parents=True, exist_ok=True)
    return set_up(parsed, explicit, Console(quiet=True))


def train(*flags: str | Path, stop_at: int | None = None) -> dict[str, Any]:
    """Train to the end, or until a signal comes in the middle of step `stop_at`; the checkpoint."""
    run = make_run(*flags)
    eager = run.losses

    def interrupting(codes: torch.Tensor) -> Losses:
        if run.state.progress.step + 1 == stop_at:
            run.stop.signal = signal.SIGTERM
        return eager(codes)

    run.losses = interrupting
    code = train_rvq.train_or_save(run)
    assert code == (0 if run.stop.signal is None else 143)
    return load_checkpoint(run.files.latest)


def comparable(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What must be equal after a resume: all but clocks and file names."""
    kept = ("model", "ema", "optimizer", "scaler", "guard", "ladder", "rng", "architecture", "data")
    progress = {n: v for n, v in checkpoint["progress"].items() if n not in CLOCKS}
    return {**{name: checkpoint[name] for name in kept}, "progress": progress}


def snapshot(run: Run) -> dict[str, Any]:
    """Copies of everything that a refused step must leave alone."""
    state = run.state
    return {
        "model": {n: p.detach().clone() for n, p in state.model.state_dict().items()},
        "ema": {n: p.clone() for n, p in state.ema.state_dict().items()},
        "moments": [
            {n: v.clone() for n, v in s.items()}
            for s in state.optimizer.state_dict()["state"].values()
        ],
        "step": state.progress.step,
        "lr": [g["lr"] for g in state.optimizer.param_groups],
        "past": (list(state.guard.losses), list(state.guard.log_norms)),
    }


# --- flags ---------------------------------------------------------------------------------------

RUN_1 = """--data "npq_out/*.npq" --ctx 1280 --batch 8 --epochs 300 --amp --save_dir rvq_ckpts
  --eval-audio-every 5 --eval-frames 1290 --eval-temperature 1.1 --eval-outdir rvq_eval
  --log-lr-steps 50 --quiet"""
RUN_2 = """--data "npq_out/*.npq" --ctx 1280 --step 640 --batch 4 --accum 6 --epochs 350 --amp
  --device cuda --d_model 768 --layers 16 --heads 12 --dropout 0.1 --lr 2e-4 --weight-decay 0.02
  --ema 0.999 --label-smoothing 0.05 --cb-weights auto --cb-weights-auto-alpha 0.5
  --eval-audio-every 5 --eval-frames 1290 --eval-temperature 1.1
  --save_dir rvq_ckpts_big --log-lr-steps 50 --archive-every 10 --keep-archived 20"""
RUN_3 = """--data "npq_out/*.npq" --ctx 512 --step 256 --batch 6 --accum 6 --epochs 250 --amp
  --device cuda --d_model 768 --layers 16 --heads 12 --dropout 0.1 --lr 2e-4 --weight-decay 0.02
  --fused-optim --compile --ema 0.999 --label-smoothing 0.05 --cb-weights auto
  --cb-weights-auto-alpha 0.5 --val-every 1 --eval-audio-every 5 --eval-on-cpu
  --save_dir rvq_ckpts_fast --tag base512 --log-lr-steps 50 --persistent-workers --prefetch 6
  --quiet"""
SMALLER = "--device cpu --d_model 32 --layers 1 --heads 2 --epochs 1 --ctx 32 --step 32 --batch 2"


@pytest.mark.parametrize("command", [RUN_1, RUN_2, RUN_3], ids=["run1", "run2", "run3"])
def test_the_users_own_commands_run_as_they_stand(command, tunes, tmp_path):
    """With a smaller shape laid over the same flags, as on a machine without a GPU."""
    shutil.copytree(tunes, tmp_path / "npq_out")
    flags = shlex.split(command.replace("\n", " ")) + shlex.split(SMALLER)
    code, output = run_trainer(*flags, timeout=200, cwd=tmp_path)
    assert code == 0, output
    assert "val CE per codebook" in output
    assert len(list(tmp_path.glob("rvq_ckpts*/rvq_4cb*_best.pt"))) == 1
    assert len(list(tmp_path.glob("rvq_ckpts*/rvq_4cb*_latest.pt"))) == 1
    names = load_checkpoint(next(tmp_path.glob("rvq_ckpts*/*_latest.pt")))["model"]
    assert not any("_orig_mod" in name for name in names), "pitfall 20"


def test_defaults_are_run_3():
    defaults, _ = parse_flags([])
    third, given = parse_flags(shlex.split(RUN_3.replace("\n", " ")))
    own = {"data", "device", "compile", "save_dir", "tag", "step", "quiet"}
    assert {n: getattr(defaults, n) for n in given if n not in own} == {
        n: getattr(third, n) for n in given if n not in own
    }


def test_every_flag_takes_both_spellings():
    for action in train_rvq.build_parser()._actions:
        name = action.dest.replace("_", "-")
        if name == "help":
            continue
        value = [] if action.nargs == 0 else [str(action.choices[-1] if action.choices else "")]
        value = value and [value[0] or ("0.5" if action.type in FRACTIONS else "3")]
        for spelling in (f"--{name}", f"--{name.replace('-', '_')}"):
            _, given = parse_flags(["--lr", "9", spelling, *value])
            assert action.dest in given, spelling


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch 0", "expected a whole number >= 1, found '0'"),
        ("--dropout 1.5", "expected a number >= 0 and < 1"),
        ("--lr nan", "expected a number > 0"),
        ("--resume x --no-resume", "contradict"),
        ("--lr 1e-6", "--eta-min"),
        ("--tag a/b", "--tag"),
        ("--d_modl 3", "no such flag; did you mean --d_model?"),
    ],
)
def test_wrong_flags_end_with_code_2_and_a_remedy(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse_flags(flags.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ((), 2, "--data"),
        (("--data", "nowhere/*.npq"), 1, "no .npq file matches"),
        (("--data", "{tunes}", "--heads", "5"), 2, "--heads 5"),
        (("--data", "{tunes}", "--device", "cuda:7"), 2, "--device cuda:7"),
        (("--data", "{tunes}", "--ctx", "5000"), 1, "shorter than a window"),
        (("--data", "{tunes}", "--batch", "5000"), 2, "fewer than one step's"),
        (("--data", "{tunes}", "--cb-weights", "1,2"), 2, "expected 4 numbers"),
        (("--data", "{tunes}", "--resume", "{tmp}/typo.pt"), 1, "no such checkpoint"),
        (("--data", "{tunes}", "--val-list", "{tmp}/typo.txt"), 2, "--val-list"),
        (("--data", "{tunes}", "--val-list", __file__), 2, "listed files are not in the data"),
    ],
)
def test_mistakes_get_one_message_and_write_no_run_file(
    flags, code, message, tunes, tmp_path, capsys
):
    """Pitfall 15 among others."""
    filled = [f.format(tunes=tunes, tmp=tmp_path) for f in flags]
    save_dir = tmp_path / "run"
    assert train_rvq.main([*TINY, "--save_dir", str(save_dir), *filled]) == code
    assert message in capsys.readouterr().err
    assert not list(save_dir.glob("rvq_*"))


# --- pure pieces ---------------------------------------------------------------------------------


def test_lr_warms_up_falls_and_never_rises_again():
    """Pitfall 7: torch's cosine climbs again after T_max."""
    shape = {"lr": 2e-4, "eta_min": 1e-5, "warmup_ratio": 0.01}
    curve = [lr_at_step(s, 1000, **shape) for s in range(1, 3000)]
    assert curve[0] == pytest.approx(2e-5)
    assert curve[9] == pytest.approx(2e-4)
    assert all(a < b for a, b in itertools.pairwise(curve[:10]))
    assert all(a >= b for a, b in itertools.pairwise(curve[9:]))
    assert curve[504] == pytest.approx((2e-4 + 1e-5) / 2, rel=1e-6)  # half-way down
    assert curve[999:] == [pytest.approx(1e-5)] * 2000


def test_codebook_weights():
    raw = [1 + 0.5 * k / 8 for k in range(9)]
    expected = [w * 9 / sum(raw) for w in raw]
    assert codebook_weights("auto", 0.5, 9) == pytest.approx(expected)
    assert codebook_weights("3,1", 0.5, 2) == [1.5, 0.5]
    assert codebook_weights("auto", 0.5, 1) == [1.0]


@pytest.mark.parametrize(
    ("windows", "batch", "accum", "steps"), [(62640, 6, 6, 1740), (34520, 4, 6, 1438)]
)
def test_steps_per_epoch_of_the_notes(windows, batch, accum, steps):
    order = EpochOrder(windows, batch=batch, accum=accum, seed=0)
    assert len(order) == steps * accum


def test_decay_is_on_matrices_alone():
    model = CodesTransformer(ModelConfig((16,) * 3, 32, 2, 2))
    decayed, rest = parameter_groups(model, 0.02)
    names = {n for n, _ in decayed["params"]}
    kinds = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
    assert names == {"head.weight"} | {f"blocks.{i}.{k}.weight" for i in (0, 1) for k in kinds}
    assert rest["weight_decay"] == 0
    assert len(names) + len(rest["params"]) == len(list(model.parameters()))


# --- one step ------------------------------------------------------------------------------------


def test_a_step_reads_the_device_once(tunes, tmp_path, monkeypatch):
    """Pitfall 9: every .item(), bool() or copy to the host is a sync on CUDA."""
    run = make_run("--data", tunes, "--save_dir", tmp_path)
    batches = iter(run.loader)
    train_rvq.train_step(run, batches)
    reads = []

    def spy(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)
        return lambda self, *args, **kw: (reads.append(name), original(self, *args, **kw))[1]

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, spy(name))
    stats = train_rvq.train_step(run, batches)
    monkeypatch.undo()
    assert stats.refused is None
    assert reads == ["tolist"]


def test_a_whole_step_runs_on_meta(tunes, tmp_path):
    """CUDA without CUDA: a tensor left on the CPU, and every host read, raise on meta."""
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--no-fused-optim", "--no-amp")
    meta = torch.device("meta")
    model = CodesTransformer(run.state.model.config).to(meta)
    run.state = run_setup.build_state(run.flags, model, None, meta)
    run.device, run.weights = meta, run.weights.to(meta)
    run.losses = lambda codes: model.losses(codes, 0.05)
    facts = backward(run, iter(run.loader))
    assert facts.is_meta
    assert facts.shape == (1 + 4 + 1,)
    update(run, 1e-3, grad_norm=2.0)


ON_CUDA = ("eager", "default", "reduce-overhead", "max-autotune")
MODES = [("cpu", "eager"), *(pytest.param("cuda", m, marks=pytest.mark.cuda) for m in ON_CUDA)]


@pytest.mark.parametrize(("device", "mode"), MODES)
def test_gradients_and_means_of_micro_batches_equal_those_of_one_batch(
    device, mode, tunes, tmp_path
):
    """Of four steps in a row: CUDA graphs warm up, are recorded, and are replayed from then on.

    A replay overwrites the outputs of the one before it, and gradients that lie among them.
    """
    flags = ("--data", tunes, "--save_dir", tmp_path, "--device", device, "--accum", "3")
    flags += ("--dropout", "0", "--no-amp", "--depth-share", "1", "--grad-clip", "0")
    flags += ("--no-compile",) if mode == "eager" else ("--compile", "--compile-mode", mode)
    run = make_run(*flags)
    train_rvq.prepare_losses(run)
    assert run.compiled == (mode != "eager"), "it fell back"
    whole = copy.deepcopy(run.state.model)
    found: list[list[torch.Tensor]] = []
    places: set[tuple[int, ...]] = set()

    def keep(*_: Any) -> None:
        gradients = [p.grad for p in run.state.model.parameters()]
        found.append([g.clone() for g in gradients])
        places.add(tuple(g.data_ptr() for g in gradients))

    run.state.optimizer.register_step_pre_hook(keep)
    batches = list(run.loader)
    for step in range(4):
        used = batches[3 * step : 3 * step + 3]
        whole.load_state_dict(run.state.model.state_dict())
        whole.zero_grad()
        losses = whole.losses(torch.cat(used).long().to(device), 0.05, run.weights)
        losses.objective.backward()
        stats = train_rvq.train_step(run, iter(used))
        assert stats.loss == pytest.approx(losses.objective.item(), rel=1e-4)
        assert stats.ce == pytest.approx(losses.ce.tolist(), rel=1e-4)
        for (name, p), gradient in zip(whole.named_parameters(), found[step], strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert len(found) == 4
    if mode in ("reduce-overhead", "max-autotune"):
        assert len(places) == 1, "gradients are buffers of our own, outside the graphs' pool"


def test_clipping_bounds_the_update(tunes, tmp_path):
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--grad-clip", "0.01", "--no-amp")
    norm = backward(run, iter(run.loader)).tolist()[-1]
    assert norm > 0.01
    update(run, 1e-3, norm)
    grads = [p.grad for p in run.state.model.parameters()]
    assert torch.nn.utils.get_total_norm(grads).item() == pytest.approx(0.01, rel=1e-3)


AMP = {"float32": ("--no-amp",), "bf16": (), "fp16": ("--amp-dtype", "fp16")}


@pytest.mark.parametrize("amp", AMP)
@pytest.mark.parametrize("warm", [0, 3], ids=["first step", "later"])
@pytest.mark.parametrize("fault", ["nan first", "inf last", "inf gradient"])
def test_a_refused_step_changes_nothing(fault, warm, amp, tunes, tmp_path):
    """Fault 9, pitfalls 3, 4 and 5: weights, moments, EMA, lr, guard; the next step is accepted."""
    run = make_run("--data", tunes, "--save_dir", tmp_path, *AMP[amp])
    batches = iter(run.loader)
    for _ in range(warm):
        train_rvq.train_step(run, batches)
    before = snapshot(run)
    eager, calls = run.losses, []

    def poisoned(codes: torch.Tensor) -> Losses:
        losses = eager(codes)
        calls.append(1)
        if fault == "nan first" and len(calls) == 1:
            losses = Losses(losses.ce, losses.objective * math.nan)
        if fault == "inf last" and len(calls) == 2:
            losses = Losses(losses.ce + math.inf, losses.objective + math.inf)
        return losses

    run.losses = poisoned
    hook = run.state.model.head.weight.register_hook(
        lambda g: g * math.inf if fault == "inf gradient" else g
    )
    stats = train_rvq.train_step(run, batches)
    hook.remove()
    run.losses = eager
    assert stats.refused
    assert_same_tensors(snapshot(run), before)
    assert run.state.progress.position == (warm + 1) * run.windows_per_step, "the windows are used"
    assert all(p.grad is None for p in run.state.model.parameters()), (
        "pitfall 3: no stale gradients"
    )
    if amp != "fp16":  # a scaler at 65536 may overflow once more
        assert train_rvq.train_step(run, batches).refused is None


def test_fp16_lowers_its_scale_until_steps_are_accepted(tunes, tmp_path):
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--amp-dtype", "fp16", "--epochs", "3")
    run.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    code = train_rvq.train_or_save(run)
    assert code == 0
    assert run.state.scaler.get_scale() < 2.0**40
    assert not run.state.ladder.events, "overflows are no trouble"
    skips = rows(tmp_path, "skip")
    assert skips
    assert all("overflow" in row["reason"] for row in skips)
    assert run.state.progress.step > 3


def test_fp16_that_overflows_for_ever_stops(tunes, tmp_path, capsys):
    """Fault 12."""
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--amp-dtype", "fp16")
    run.state.model.head.weight.register_hook(lambda g: g * math.inf)
    assert train_rvq.train_or_save(run) == train_rvq.EXIT_GUARD
    assert "--amp-dtype bf16" in capsys.readouterr().err
    assert run.state.progress.step == 0


def test_a_refusal_names_the_frames_that_were_used(tunes, tmp_path):
    """In the second epoch, where jitter has moved them."""
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--epochs", "2", "--num_workers", "2")
    eager, seen = run.losses, []

    def refusing(codes: torch.Tensor) -> Losses:
        if run.state.progress.step != 11 or run.state.ladder.refusals:
            return eager(codes)
        seen.extend(codes)
        return Losses(*(x * math.nan for x in eager(codes)))

    run.losses = refusing
    assert train_rvq.train_or_save(run) == 0
    (row,) = rows(tmp_path, "skip")
    assert row["epoch"] == 2
    for place, codes in zip(row["windows"], seen, strict=True):
        whole = map_codes(read_header(place["file"]))
        assert whole[place["frame"] : place["frame"] + 32].tolist() == codes.tolist()
    assert {p["frame"] % 16 for p in row["windows"]} != {0}


# --- figures -------------------------------------------------------------------------------------


def test_train_is_the_mean_over_micro_batches(tunes, tmp_path):
    """Pitfall 8: with a learning rate of nothing, `train` is the objective of the first weights."""
    flags = ("--data", tunes, "--save_dir", tmp_path, "--dropout", "0", "--no-amp", "--epochs", "1")
    run = make_run(*flags, "--lr", "1e-30", "--eta-min", "0", "--depth-share", "1")
    order = run.order.permutation(0)[: run.steps_per_epoch * run.windows_per_step]
    with torch.no_grad():
        losses = run.state.model.losses(run.train_windows[order].long(), 0.05, weights=run.weights)
    expected = losses.objective.item()
    assert train_rvq.train_or_save(run) == 0
    (row,) = rows(tmp_path, "epoch")
    assert row["train"] == pytest.approx(expected, rel=1e-5)


def test_val_is_plain_cross_entropy_of_the_ema_weights(tunes, tmp_path):
    train("--data", tunes, "--save_dir", tmp_path, "--epochs", "2", "--no-amp")
    run = make_run("--data", tunes, "--save_dir", tmp_path / "other", "--no-amp")
    checkpoint = load_checkpoint(tmp_path / "rvq_4cb_latest.pt")
    run.state.model.load_state_dict(checkpoint["ema"])
    every = run.val_windows[np.arange(len(run.val_windows))].long()
    with torch.no_grad():
        losses = run.state.model.eval().losses(every, 0.05, weights=run.weights)
    row = rows(tmp_path, "epoch")[-1]
    assert row["val_per_codebook"] == pytest.approx(losses.ce.tolist(), rel=1e-5)
    assert row["val"] == pytest.approx(losses.ce.mean().item(), rel=1e-5)
    assert row["ppl"] == pytest.approx(math.exp(row["val"]), rel=1e-6)
    assert row["val_obj"] == pytest.approx(losses.objective.item(), rel=1e-5)
    raw = checkpoint["model"]
    assert not torch.equal(raw["head.weight"], checkpoint["ema"]["head.weight"])


def test_without_validation_windows_nothing_is_best(tunes, tmp_path, capsys):
    """Fault 21, pitfall 10: an empty validation must not become val 0.0, for ever the best."""
    train("--data", tunes, "--save_dir", tmp_path, "--epochs", "1", "--val_split", "0")
    (row,) = rows(tmp_path, "epoch")
    assert row["val"] is row["ppl"] is None
    assert not (tmp_path / "rvq_4cb_best.pt").exists()
    assert "val n/a" in capsys.readouterr().out


@pytest.mark.parametrize("value", [math.nan, 800.0], ids=["NaN", "over 709"])
def test_a_validation_that_means_nothing_is_no_best_and_no_crash(value, tunes, tmp_path, capsys):
    """Fault 21, pitfall 10: exp(800) raises, and NaN is never the best."""
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--epochs", "2")
    model = run.state.ema.model
    eager = model.losses
    run.state.progress.best_val = 5.0
    model.losses = lambda *args: Losses(*(x * 0 + value for x in eager(*args)))
    assert train_rvq.train_or_save(run) == 0
    assert [row["ppl"] for row in rows(tmp_path, "epoch")] == [None, None]
    assert not run.files.best.exists()
    assert load_checkpoint(run.files.latest)["progress"]["best_val"] == 5.0
    assert "ppl n/a" in capsys.readouterr().out


def test_the_loss_falls_and_the_files_of_a_run_are_there(tunes, tmp_path):
    flags = ("--archive-every", "2", "--keep-archived", "2", "--epochs", "9")
    train("--data", tunes, "--save_dir", tmp_path, *flags)
    vals = [row["val"] for row in rows(tmp_path, "epoch")]
    assert len(vals) == 9
    assert vals[-1] < vals[0] - 0.5
    names = {p.name for p in tmp_path.glob("rvq_*")}
    assert {
        f"rvq_4cb_{n}" for n in ("latest.pt", "previous.pt", "best.pt", "metrics.jsonl")
    } < names
    archives = sorted(n[:22] for n in names if "epoch_e" in n)
    assert archives == ["rvq_4cb_epoch_e0006__2", "rvq_4cb_epoch_e0008__2"]
    assert len([n for n in names if "best_e" in n]) == 2, "pitfall 16"
    best = load_checkpoint(tmp_path / "rvq_4cb_best.pt")["progress"]
    assert best["best_val"] == min(vals), "pitfall 14: the saved best value is the new one"


# --- resuming ------------------------------------------------------------------------------------


def test_interrupted_at_every_step_ends_in_the_same_weights(tunes, tmp_path):
    """Fault 14, pitfall 18: bit for bit, wherever it was cut."""
    flags = ("--data", tunes, "--epochs", "2", "--dropout", "0.2")
    whole = comparable(train(*flags, "--save_dir", tmp_path / "whole"))
    steps = whole["progress"]["step"]
    assert steps > 10
    for n in range(1, steps + 1):
        save_dir = tmp_path / f"cut{n}"
        train(*flags, "--save_dir", save_dir, stop_at=n)
        assert_same_tensors(comparable(train(*flags, "--save_dir", save_dir)), whole)
        assert (
            rows(save_dir, "epoch")[-1]["train"] == rows(tmp_path / "whole", "epoch")[-1]["train"]
        )


def test_interrupted_in_validation_saves_raw_weights_as_raw(tunes, tmp_path, monkeypatch):
    """Pitfall 19, fault 13."""
    flags = ("--data", tunes, "--epochs", "2", "--save_dir")
    whole = comparable(train(*flags, tmp_path / "whole"))
    run = make_run(*flags, tmp_path / "cut")
    model = run.state.ema.model
    losses = model.losses

    def interrupting(*args: Any) -> Losses:
        run.stop.signal = signal.SIGINT
        return losses(*args)

    monkeypatch.setattr(model, "losses", interrupting)
    assert train_rvq.train_or_save(run) == 130
    saved = load_checkpoint(run.files.latest)
    assert_same_tensors(dict(saved["model"]), dict(run.state.model.state_dict()))
    assert_same_tensors(comparable(train(*flags, tmp_path / "cut")), whole)


def test_a_damaged_latest_falls_back_and_still_ends_right(tunes, tmp_path, capsys):
    """Fault 4."""
    flags = ("--data", tunes, "--epochs", "3", "--save_dir")
    whole = comparable(train(*flags, tmp_path / "whole"))
    train(*flags, tmp_path / "cut", stop_at=20)
    latest = tmp_path / "cut" / "rvq_4cb_latest.pt"
    latest.write_bytes(latest.read_bytes()[:-1000])
    assert_same_tensors(comparable(train(*flags, tmp_path / "cut")), whole)
    assert "rvq_4cb_latest.pt: damaged" in capsys.readouterr().err


def test_explicit_flags_win_architecture_stays_and_the_banner_says_so(tunes, tmp_path, capsys):
    flags = ("--data", tunes, "--save_dir", tmp_path, "--epochs", "2")
    train(*flags, stop_at=3)
    capsys.readouterr()
    run = make_run(*flags, "--d_model", "64", "--weight-decay", "0.3", "--label-smoothing", "0.1")
    said = capsys.readouterr().out
    assert "Resuming at step 3" in said
    assert "--d-model: saved 32, asked 64; the saved architecture stays" in said
    assert "--weight-decay: saved 0.02, asked 0.3; asked wins" in said
    assert run.state.model.config.d_model == 32
    assert run.state.optimizer.param_groups[0]["weight_decay"] == 0.3, "pitfall 17"
    assert run.flags.label_smoothing == 0.1


def test_arch_flags_may_be_left_out_when_resuming(tunes, tmp_path):
    train("--data", tunes, "--save_dir", tmp_path, "--tag", "base", stop_at=3)
    parsed, explicit = parse_flags(["--save_dir", str(tmp_path)])
    run = set_up(parsed, explicit, Console(quiet=True))
    assert run.state.progress.step == 3
    assert (run.flags.d_model, run.flags.batch, run.flags.tag) == (32, 4, "base")


def test_a_run_from_before_jitter_goes_on_without_it(tunes, tmp_path, capsys):
    """A flag that the saved run did not have must not switch itself on in the middle."""
    flags = ("--data", tunes, "--epochs", "2", "--save_dir")
    whole = comparable(train(*flags, tmp_path / "whole", "--no-jitter"))
    old = train(*flags, tmp_path / "cut", "--no-jitter", stop_at=11)
    del old["flags"]["jitter"]
    save_checkpoint(old, tmp_path / "cut" / "rvq_4cb_latest.pt")
    assert not make_run(*flags, tmp_path / "cut").flags.jitter
    capsys.readouterr()
    run = make_run(*flags, tmp_path / "cut", "--jitter")
    assert "--jitter: saved False, asked True; asked wins" in capsys.readouterr().out
    assert run.train_windows.phase is not None
    assert run.state.progress.position == 3 * run.windows_per_step, "the epoch goes on"
    assert not run.state.guard.losses, "of another level"
    resumed = train(*flags, tmp_path / "cut")
    assert_same_tensors(comparable(resumed), whole)
    assert resumed["flags"]["jitter"] is False
    with_it = train(*flags, tmp_path / "jittered")
    assert with_it["flags"]["jitter"] is True
    assert not torch.equal(with_it["model"]["head.weight"], whole["model"]["head.weight"])


def test_ignore_arch_lists_what_does_not_fit(tunes, tmp_path, capsys):
    """Fault 7."""
    flags = ("--data", tunes, "--save_dir", tmp_path)
    train(*flags, stop_at=3)
    before = (tmp_path / "rvq_4cb_latest.pt").read_bytes()
    argv = [*TINY, *map(str, flags), "--ignore-arch", "--d_model", "64"]
    assert train_rvq.main(argv) == 1
    said = capsys.readouterr().err
    assert "another architecture" in said
    assert "(128, 32) -> (256, 64)" in said
    assert (tmp_path / "rvq_4cb_latest.pt").read_bytes() == before


def test_a_longer_plan_does_not_raise_the_lr(tunes, tmp_path):
    """Pitfall 7, by the whole program."""
    flags = ("--data", tunes, "--save_dir", tmp_path, "--log-lr-steps", "1")
    train(*flags, "--epochs", "1")
    train(*flags, "--epochs", "3")
    rates = [row["lr"] for row in rows(tmp_path, "step")]
    peak = rates.index(max(rates))
    assert len(rates) > 20
    assert all(a >= b for a, b in itertools.pairwise(rates[peak:]))
    assert rates[-1] == pytest.approx(1e-5)


def test_a_finished_run_is_left_alone(tunes, tmp_path, capsys):
    flags = ("--data", tunes, "--save_dir", tmp_path, "--epochs", "1")
    train(*flags)
    before = (tmp_path / "rvq_4cb_latest.pt").read_bytes()
    train(*flags)
    assert "Nothing to do" in capsys.readouterr().out
    assert (tmp_path / "rvq_4cb_latest.pt").read_bytes() == before


def test_other_data_is_refused_until_it_is_allowed(tunes, tmp_path, capsys):
    """Fault 15."""
    data = shutil.copytree(tunes, tmp_path / "data")
    flags = ("--data", data, "--save_dir", tmp_path / "run", "--epochs", "2")
    train(*flags, stop_at=3)
    codes = np.random.default_rng(0).integers(64, size=(300, 4))
    write_npq(data / "new.npq", codes, vocab_sizes=[64] * 4, frame_rate=86.13)
    assert train_rvq.main([*TINY, *map(str, flags)]) == 1
    assert "--allow-data-change" in capsys.readouterr().err
    train(*flags, "--allow-data-change")
    assert rows(tmp_path / "run", "epoch")[-1]["epoch"] == 2


@pytest.mark.parametrize("workers", [("0", "2"), ("2", "0")], ids="->".join)
def test_other_workers_give_the_same_result(workers, tunes, tmp_path):
    """Fault 15."""
    flags = ("--data", tunes, "--epochs", "2", "--save_dir")
    whole = comparable(train(*flags, tmp_path / "whole"))
    train(*flags, tmp_path / "cut", "--num_workers", workers[0], stop_at=11)  # in epoch 2
    resumed = comparable(train(*flags, tmp_path / "cut", "--num_workers", workers[1]))
    assert_same_tensors(resumed, whole)


def test_another_batch_with_as_many_windows_a_step_gives_the_same_steps(tunes, tmp_path, capsys):
    """Fault 15: the same windows in the same order; sums in another order, so not bit for bit."""
    flags = ("--data", tunes, "--epochs", "2", "--dropout", "0", "--no-amp", "--depth-share", "1")
    flags += ("--save_dir",)
    whole = train(*flags, tmp_path / "whole")
    train(*flags, tmp_path / "cut", stop_at=5)
    resumed = train(*flags, tmp_path / "cut", "--batch", "2", "--accum", "4")
    assert "--batch: saved 4, asked 2; asked wins" in capsys.readouterr().out
    assert resumed["progress"]["step"] == whole["progress"]["step"]
    for name, weight in whole["model"].items():
        torch.testing.assert_close(resumed["model"][name], weight, rtol=1e-2, atol=1e-3)


def test_another_accumulation_in_the_middle_of_an_epoch_uses_no_window_twice(tunes, tmp_path):
    """Fault 15: 5 steps of 8 windows, then of 12; what does not fill a step is left over."""
    flags = ("--data", tunes, "--epochs", "2", "--save_dir", tmp_path)
    train(*flags, stop_at=5)
    run = make_run(*flags, "--accum", "3")
    used, eager = [], run.train_windows.__class__.__getitem__
    order = run.order.permutation(0)
    assert run.state.progress.position == 40
    run.order.start = 40
    for windows in run.order:
        used += windows.tolist()
        assert eager(run.train_windows, windows).shape[0] == len(windows)
    assert used == order[40 : 40 + 24].tolist()
    assert train_rvq.train_or_save(run) == 0
    assert run.state.progress.step == 5 + 2 + 5


def test_with_every_checkpoint_bad_nothing_is_overwritten(tunes, tmp_path, capsys):
    """Fault 5: no fresh start either."""
    flags = ("--data", tunes, "--save_dir", tmp_path, "--epochs", "2")
    train(*flags)
    for path in tmp_path.glob("rvq_*.pt"):
        os.truncate(path, path.stat().st_size // 2)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("rvq_*")}
    assert train_rvq.main([*TINY, *map(str, flags)]) == 1
    said = capsys.readouterr().err
    assert "nothing was changed" in said
    assert "rvq_4cb_best.pt" in said
    assert {p.name: p.read_bytes() for p in tmp_path.glob("rvq_*")} == before


def test_a_checkpoint_without_moments_can_start_a_new_run_alone(tunes, tmp_path, capsys):
    """Fault 7: the error names what is missing and the flag."""
    checkpoint = train("--data", tunes, "--save_dir", tmp_path / "a", "--epochs", "1")
    del checkpoint["optimizer"]
    save_checkpoint(checkpoint, tmp_path / "poor.pt")
    flags = (*TINY, "--data", str(tunes), "--save_dir", str(tmp_path / "b"), "--epochs", "1")
    assert train_rvq.main([*flags, "--resume", str(tmp_path / "poor.pt")]) == 1
    assert f"lacks optimizer; start anew with --init-from {tmp_path}" in capsys.readouterr().err
    assert train_rvq.main([*flags, "--init-from", str(tmp_path / "poor.pt")]) == 0


def test_renamed_and_moved_files_are_the_same_data(tunes, tmp_path):
    flags = ("--save_dir", tmp_path / "run", "--epochs", "2")
    train("--data", tunes, *flags, stop_at=3)
    moved = tmp_path / "moved"
    moved.mkdir()
    for i, path in enumerate(sorted(tunes.iterdir())):
        shutil.copy(path, moved / f"song{9 - i}.npq")
    resumed = comparable(train("--data", moved, *flags))
    whole = train("--data", tunes, "--save_dir", tmp_path / "whole", "--epochs", "2")
    assert_same_tensors(resumed, comparable(whole))


def test_init_from_starts_a_new_run_with_another_ctx(tunes, tmp_path):
    train("--data", tunes, "--save_dir", tmp_path / "a", "--epochs", "1")
    first = load_checkpoint(tmp_path / "a" / "rvq_4cb_best.pt")
    flags = ("--data", tunes, "--save_dir", tmp_path / "b", "--ctx", "64", "--epochs", "1")
    run = make_run(*flags, "--init-from", tmp_path / "a" / "rvq_4cb_best.pt", "--batch", "2")
    assert run.state.progress.step == 0
    assert not run.state.optimizer.state
    assert_same_tensors(dict(run.state.model.state_dict()), dict(first["ema"]))
    assert train_rvq.train_or_save(run) == 0


@pytest.mark.parametrize("eval_outdir", [(), ("--eval-outdir", "heard/here")])
def test_files_of_a_run_are_no_data(eval_outdir, tunes, tmp_path, monkeypatch, capsys):
    """Else the first evaluation sample changes the data: the run is refused, or learns from it."""
    shutil.copytree(tunes, tmp_path / "toks")
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, "--eval-audio-every", "1", "--eval-frames", "40", "--no-report", *eval_outdir]
    flags += ["--eval-dac-repo", "nowhere.pth", "--data", ".", "--save_dir", "out/run"]
    assert train_rvq.main([*flags, "--epochs", "1"]) == 0
    assert "left out" not in capsys.readouterr().out
    assert len(list(tmp_path.rglob("*_e0001__*.npq"))) == 1
    for epochs, more in (("2", ()), ("1", ("--no-resume",)), ("2", ()), ("1", ("--tag", "b"))):
        assert train_rvq.main([*flags, "--epochs", epochs, *more]) == 0
        printed = capsys.readouterr().out
        assert "data     4 files" in printed
        (line,) = (line for line in printed.splitlines() if line.startswith("left out"))
        assert "out/run" in line
        assert ("heard/here" in line) == bool(eval_outdir)
    assert len(list(tmp_path.rglob("*.npq"))) == 4 + 5
    out = [*TINY, "--no-report", "--save_dir", "new", "--max-steps", "1"]
    assert train_rvq.main([*out, "--data", *glob.glob("*/**/*.npq", recursive=True)]) == 0
    assert "data     4 files" in capsys.readouterr().out  # a shell's own ** names each


def test_no_resume_sets_the_earlier_run_aside(tunes, tmp_path):
    flags = ("--data", tunes, "--save_dir", tmp_path, "--epochs", "1")
    train(*flags)
    old = {p.name: p.read_bytes() for p in tmp_path.glob("rvq_*")}
    train(*flags, "--no-resume", "--seed", "5")
    (aside,) = tmp_path.glob("*_before_*")
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == old


def test_fp16_and_ema_and_scaler_survive_a_resume(tunes, tmp_path):
    flags = ("--data", tunes, "--epochs", "1", "--amp-dtype", "fp16", "--save_dir")
    whole = comparable(train(*flags, tmp_path / "whole"))
    train(*flags, tmp_path / "cut", stop_at=4)
    assert whole["scaler"]["scale"] > 0
    assert_same_tensors(comparable(train(*flags, tmp_path / "cut")), whole)


def test_metrics_rows_hold_what_other_programs_rely_on(tunes, tmp_path):
    train("--data", tunes, "--save_dir", tmp_path, "--epochs", "1", stop_at=7)
    with open(tmp_path / "rvq_4cb_metrics.jsonl", "a") as file:
        file.write('{"event": "step", "st')  # half a row, as a kill leaves it
    train("--data", tunes, "--save_dir", tmp_path, "--epochs", "1")
    lines = (tmp_path / "rvq_4cb_metrics.jsonl").read_text().splitlines()
    good = [json.loads(line) for line in lines if not line.endswith('"st')]
    assert len(good) == len(lines) - 1
    by_event = {row["event"]: row for row in good}
    step = ["step", "epoch", "loss", "lr", "grad_norm", "frames_per_s", "skipped", "seconds"]
    epoch = [
        "step",
        "epoch",
        "train",
        "val",
        "val_obj",
        "ppl",
        "val_per_codebook",
        "frames_per_s",
        "seconds",
        "skipped",
    ]
    assert set(step) <= set(by_event["step"])
    assert set(epoch) <= set(by_event["epoch"])
    assert {"start", "resume", "save", "end"} <= set(by_event)
    assert all(next(iter(row)) == "event" for row in good)


def test_a_budget_in_seconds_ends_the_run_and_bends_the_schedule(tunes, tmp_path):
    flags = (
        "--max-seconds",
        "2",
        "--epochs",
        "10000",
        "--log-lr-steps",
        "1",
        "--val-every",
        "10000",
    )
    checkpoint = train("--data", tunes, "--save_dir", tmp_path, *flags, "--archive-every", "0")
    assert 2 <= checkpoint["progress"]["seconds"] < 4
    rates = [row["lr"] for row in rows(tmp_path, "step")]
    assert max(rates) == pytest.approx(3e-4, rel=0.05)
    assert rates[-1] < 3e-5
    assert len(rows(tmp_path, "epoch")) == 1, "one validation at the end"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_validating_within_epochs_changes_no_weight_and_resumes_exactly(workers, tunes, tmp_path):
    flags = ("--data", tunes, "--epochs", "2", "--num_workers", workers, "--archive-every", "0")
    plain = train(*flags, "--save_dir", tmp_path / "plain")
    timed = (*flags, "--val-every-seconds", "1e-9", "--save_dir")
    every_step = train(*timed, tmp_path / "timed")
    train(*timed, tmp_path / "cut", stop_at=5)
    cut = train(*timed, tmp_path / "cut")
    steps = every_step["progress"]["step"]
    assert [r["step"] for r in rows(tmp_path / "timed", "epoch")] == list(range(1, steps + 1))
    for other in (every_step, cut):
        assert_same_tensors(weights_and_rng(other), weights_and_rng(plain))


def weights_and_rng(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What validating must leave alone; the best value is not among it."""
    return {name: checkpoint[name] for name in ("model", "ema", "optimizer", "guard", "rng")}


def test_a_full_disk_is_survived_and_named(tunes, tmp_path, capsys):
    """Fault 3: the save fails, training goes on, latest stays the last good one."""
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--epochs", "3", "--archive-every", "0")
    run_saving.save(run)
    run_saving.finish_save(run)
    before = run.files.latest.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        run_saving.save(run)
        run_saving.save(run)
        run_saving.save(run)
        with pytest.raises(OSError, match="File too large"):
            run_saving.check_save(run, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert run.files.latest.read_bytes() == before
    assert "is still the last good one" in capsys.readouterr().err
    assert [p for p in os.listdir(tmp_path) if p.endswith(".saving")] == []


def held_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that syncs nothing until the event is set."""
    go_on, real = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (go_on.wait(60), real(descriptor))[1])
    return go_on


def test_training_goes_on_while_a_save_is_written(tunes, tmp_path, monkeypatch):
    """The file holds the state of the step at which it began; its row comes when it is there."""
    run = make_run("--data", tunes, "--save_dir", tmp_path)
    batches = iter(run.loader)
    train_rvq.train_step(run, batches)
    go_on = held_disk(monkeypatch)
    truth = copy.deepcopy(comparable(run_saving.checkpoint_of(run)))
    run_saving.save(run)
    for _ in range(3):
        train_rvq.train_step(run, batches)
        assert run_saving.check_save(run) is None
    assert not run.files.latest.exists()
    assert not rows(tmp_path, "save")
    go_on.set()
    run_saving.finish_save(run)
    (row,) = rows(tmp_path, "save")
    assert row["step"] == 1
    assert row["stall_seconds"] < row["save_seconds"]
    saved = load_checkpoint(run.files.latest)
    truth["model"] = dict(truth["model"])
    assert_same_tensors(comparable(saved), truth)
    assert run.state.progress.step == 4


def test_a_save_is_reported_at_the_next_step(tunes, tmp_path):
    """Not at the next save, which may be a quarter of an hour away."""
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--epochs", "1", "--accum", "1")
    eager, reported = run.losses, []

    def asking(codes: torch.Tensor) -> Losses:
        step = run.state.progress.step
        run.stop.save |= step == 2
        if step == 4 and run.saving is not None:
            run.saving.written.result()
        reported.append(sum(row["step"] > 0 for row in rows(tmp_path, "save")))
        return eager(codes)

    run.losses = asking
    assert train_rvq.train_or_save(run) == 0
    assert reported[6:] == [1] * 10


def test_a_save_waits_for_the_one_before_it(tunes, tmp_path, monkeypatch):
    run = make_run("--data", tunes, "--save_dir", tmp_path)
    go_on = held_disk(monkeypatch)
    run_saving.save(run)
    threading.Timer(0.3, go_on.set).start()
    started = time.monotonic()
    run_saving.save(run)
    assert time.monotonic() - started > 0.2
    run_saving.finish_save(run)
    first, second = rows(tmp_path, "save")
    assert first["stall_seconds"] < 0.2 < second["stall_seconds"]


@pytest.mark.parametrize("end", ["finish", "signal", "guard", "exception"])
def test_every_end_of_a_run_waits_for_its_save(end, tunes, tmp_path, monkeypatch):
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--epochs", "1")
    eager, real = run.losses, os.fsync

    def ending(codes: torch.Tensor) -> Losses:
        if run.state.progress.step == 3:
            run.stop.signal = signal.SIGTERM if end == "signal" else None
            run.guard_stop = "test" if end == "guard" else None
            run.stop.save = end == "guard"  # which saves nothing more by itself
            if end == "exception":
                raise RuntimeError("planted")
        return eager(codes)

    run.losses = ending
    monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.3), real(descriptor))[1])
    if end == "exception":
        with pytest.raises(RuntimeError, match="planted"):
            train_rvq.train_or_save(run)
    else:
        train_rvq.train_or_save(run)
    assert run.saving is None
    found = load_checkpoint(run.files.latest)["progress"]["step"]
    assert found == rows(tmp_path, "save")[-1]["step"] == run.state.progress.step


def test_a_best_whose_save_failed_is_not_the_best(tunes, tmp_path, capsys):
    """Or `best` would keep another epoch's weights for ever; the next one may be kept."""
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--epochs", "4")
    model, vals = run.state.ema.model, iter([1.0, 3.0, 2.0, 2.5])
    eager = model.losses
    model.losses = lambda *args: Losses(*(x * 0 + v for v in [next(vals)] for x in eager(*args)))
    run_saving.save(run, ring=True)
    run_saving.finish_save(run)
    (tmp_path / ".rvq_4cb_latest.pt.saving").symlink_to("/dev/full")
    assert train_rvq.train_or_save(run) == 0
    assert "No space left on device" in capsys.readouterr().err
    assert [row["val"] for row in rows(tmp_path, "epoch")] == [1, 3, 2, 2.5]
    assert load_checkpoint(run.files.best)["progress"]["best_val"] == 2
    assert load_checkpoint(run.files.latest)["progress"]["best_epoch"] == 3
    assert [row["step"] for row in rows(tmp_path, "save")] == [0, 16, 24, 32]


@pytest.mark.parametrize("end", ["signal", "finish"])
def test_a_run_whose_last_save_fails_does_not_say_that_it_was_saved(end, tunes, tmp_path, capsys):
    """Fault 3: tried three times, then exit code 1; `latest` is the last good one."""
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--epochs", "1")
    run_saving.save(run)
    run_saving.finish_save(run)
    before, eager = run.files.latest.read_bytes(), run.losses

    def ending(codes: torch.Tensor) -> Losses:
        run.stop.signal = signal.SIGTERM if end == "signal" else None
        return eager(codes)

    run.losses = ending
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            train_rvq.train_or_save(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    said = capsys.readouterr()
    assert said.err.count("failed (File too large;") >= 3
    assert "saved" not in said.out
    assert "Done" not in said.out
    assert run.files.latest.read_bytes() == before


WSD = ("--schedule", "wsd", "--cooldown", "0.25", "--archive-every", "0", "--epochs", "99")


def test_a_wsd_run_is_extended_from_where_its_cooldown_began(tunes, tmp_path, capsys):
    """A run of 16 steps gone on to 40 from its archive ends as one planned for 40."""
    flags = ("--data", tunes, *WSD)
    straight = train(*flags, "--save_dir", tmp_path / "straight", "--max-steps", "40")
    train(*flags, "--save_dir", tmp_path / "short", "--max-steps", "16")
    (archive,) = (tmp_path / "short").glob("*_epoch_e*.pt")
    assert load_checkpoint(archive)["progress"]["step"] == 12
    with pytest.raises(command_line.UsageError, match="cooldown has begun before step 16"):
        make_run("--save_dir", tmp_path / "short", "--max-steps", "40")
    extended = train(
        *("--save_dir", tmp_path / "long", "--resume", archive, "--max-steps", "40"), "--quiet"
    )
    for part in ("model", "ema", "optimizer", "guard", "rng"):  # the ladder counts by the plan
        assert_same_tensors(dict(extended[part]), dict(straight[part]))


def test_a_wsd_run_is_ended_early_by_fewer_steps(tunes, tmp_path):
    flags = ("--data", tunes, *WSD, "--save_dir", tmp_path)
    train(*flags, "--max-steps", "4000", stop_at=9)
    train("--save_dir", tmp_path, "--max-steps", "12")
    rates = {row["step"]: row["lr"] for row in rows(tmp_path, "step")}
    assert rates[10] == pytest.approx((3e-4 - 1e-5) * 2 / 3 + 1e-5)


def test_a_full_disk_makes_room_of_old_archives_and_the_run_ends_as_on_a_large_one(
    tunes, tmp_path, small_disk, capsys
):
    """Fault 3, pitfall 16: 14 epochs with an archive each on a disk that holds six."""
    flags = ("--data", tunes, "--epochs", "14", "--archive-every", "1", "--keep-archived", "99")
    whole = comparable(train(*flags, "--save_dir", tmp_path / "whole"))
    size = (tmp_path / "whole" / "rvq_4cb_latest.pt").stat().st_size
    disk = small_disk(str(6 * size + 300_000))
    assert_same_tensors(comparable(train(*flags, "--save_dir", disk)), whole)
    said = capsys.readouterr().err
    assert "old archives" in said
    assert "failed" not in said
    assert len(rows(disk, "save")) == 14 + 2, "each epoch's end; steps 0 and 100"
    for path in disk.glob("rvq_*.pt"):
        load_checkpoint(path)
    assert load_checkpoint(disk / "rvq_4cb_best.pt")["progress"]["epoch"] > 0


def test_a_disk_filled_by_others_is_named_with_figures_and_saved_to_again_later(
    tunes, tmp_path, small_disk, capsys
):
    """Fault 3: two saves fail, the disk is emptied, the third succeeds, the count starts anew."""
    disk = small_disk("3m")
    run = make_run("--data", tunes, "--save_dir", disk, "--optim", "muon", "--pattern", "parallel")
    run_saving.save(run)
    run_saving.finish_save(run)
    filler = disk / "film.mkv"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while file.write(bytes(65536)):
            pass
    before = run.files.latest.read_bytes()
    for _ in range(2):
        run_saving.save(run)
        assert run_saving.check_save(run, wait=True) is not None
    said = capsys.readouterr().err
    assert "0.5 MB needed, 0.0 MB free and 0.0 MB in archives" in said
    assert run.files.latest.read_bytes() == before
    filler.unlink()
    run_saving.save(run)
    run_saving.finish_save(run)
    assert run.failed_saves == 0


def test_a_second_trainer_in_the_folder_is_refused(tunes, tmp_path, capsys):
    """Fault 16."""
    with FolderLock(tmp_path):
        argv = [*TINY, "--data", str(tunes), "--save_dir", str(tmp_path)]
        assert train_rvq.main(argv) == 1
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["eager", "compile", "reduce-overhead", "fp16"])
def test_cuda_trains_and_resumes(mode, tunes, tmp_path):
    """To the same course within what its kernels, which add in any order, make of it."""
    extra = {
        "eager": ("--no-compile",),
        "compile": ("--compile",),
        "reduce-overhead": ("--compile", "--compile-mode", "reduce-overhead"),
        "fp16": ("--no-compile", "--amp-dtype", "fp16"),
    }[mode]
    flags = ("--data", tunes, "--device", "cuda", "--epochs", "6", "--log-lr-steps", "1", *extra)
    train(*flags, "--save_dir", tmp_path / "whole")
    train(*flags, "--save_dir", tmp_path / "cut", stop_at=5)
    train(*flags, "--save_dir", tmp_path / "cut")
    whole, cut = (
        {row["step"]: row["loss"] for row in rows(tmp_path / name, "step")}
        for name in ("whole", "cut")
    )
    assert cut == pytest.approx(whole, rel=0.02)
    vals = [row["val"] for row in rows(tmp_path / "cut", "epoch")]
    assert vals[-1] < vals[0] - 0.5
