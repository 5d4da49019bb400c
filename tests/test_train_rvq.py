"""train_rvq.py: flags, one step, refusal, evaluation, figures; in this process."""

from __future__ import annotations

import copy
import glob
import itertools
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kit.checkpoints import assert_same_tensors
from kit.trainer import TINY, make_run, rows, run_trainer, train

import train_rvq
from cli import command_line
from layers.loss import Losses
from model import CodesTransformer
from npq_dataset import EpochOrder
from run_folder.checkpoint import load_checkpoint
from run_folder.lock import FolderLock
from sound.npq_format import map_codes, read_header
from train_rvq import backward, parse_flags, update
from training import building, ends
from training.schedule import lr_at_step
from training.setup import codebook_weights
from training.state import TrainingRun

FRACTIONS = (command_line.fraction, command_line.fraction_or_one)


def snapshot(run: TrainingRun) -> dict[str, Any]:
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
        usual = "auto" if str(action.metavar).endswith("|auto") else "3"
        value = value and [value[0] or ("0.5" if action.type in FRACTIONS else usual)]
        for spelling in (f"--{name}", f"--{name.replace('-', '_')}"):
            _, given = parse_flags(["--lr", "9", spelling, *value])
            assert action.dest in given, spelling


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


# --- one step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["step", "validation"])
def test_a_step_and_a_validation_read_the_device_once(part, tunes, tmp_path, monkeypatch):
    """Pitfall 9: every .item(), bool() or copy that waits is a sync on CUDA."""
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--batch", "1")
    batches = iter(run.loader)
    train_rvq.train_step(run, batches)
    reads = []

    def spy(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def read(self: torch.Tensor, *args: Any, **kw: Any) -> Any:
            if name != "to" or (args and args[0] is run.device and not kw.get("non_blocking")):
                reads.append(name)
            return original(self, *args, **kw)

        return read

    waits = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero", "to")
    for name in waits:
        monkeypatch.setattr(torch.Tensor, name, spy(name))
    if part == "step":
        result = train_rvq.train_step(run, batches).refused is None
    else:
        result = train_rvq.evaluate(run) is not None
    monkeypatch.undo()
    assert result
    assert len(run.val_windows) > 1
    assert reads == ["tolist"]


def test_a_whole_step_runs_on_meta(tunes, tmp_path):
    """CUDA without CUDA: a tensor left on the CPU, and every host read, raise on meta."""
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--no-fused-optim", "--no-amp")
    meta = torch.device("meta")
    model = CodesTransformer(run.state.model.config).to(meta)
    run.state = building.build_state(run.flags, model, None, meta)
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
        losses = whole.losses(
            torch.cat([batch.codes for batch in used]).long().to(device), 0.05, run.weights
        )
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
    assert not run.state.policy.events, "overflows are no trouble"
    skips = rows(tmp_path, "skip")
    assert skips
    assert all("overflow" in row["reason"] for row in skips)
    assert run.state.progress.step > 3


def test_fp16_that_overflows_for_ever_stops(tunes, tmp_path, capsys):
    """Fault 12."""
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--amp-dtype", "fp16")
    run.state.model.head.weight.register_hook(lambda g: g * math.inf)
    assert train_rvq.train_or_save(run) == ends.EXIT_GUARD
    assert "--amp-dtype bf16" in capsys.readouterr().err
    assert run.state.progress.step == 0


def test_a_refusal_names_the_frames_that_were_used(tunes, tmp_path):
    """In the second epoch, where jitter has moved them."""
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--epochs", "2", "--num_workers", "2")
    eager, seen = run.losses, []

    def refusing(codes: torch.Tensor) -> Losses:
        if run.state.progress.step != 11 or run.state.policy.refusals:
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
        run.state.model.head.weight.mul_(10)  # else all guesses are even, and smoothing is nothing
        losses = run.state.model.losses(run.train_windows[order].long(), 0.05, weights=run.weights)
    expected = losses.objective.item()
    assert train_rvq.train_or_save(run) == 0
    (row,) = rows(tmp_path, "epoch")
    assert row["train"] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(losses.ce.mean().item(), rel=1e-5)


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


def test_train_ce_is_measured_as_val_is_at_a_quarter_of_its_cost(tunes, tmp_path, monkeypatch):
    """EMA weights without dropout or drawn noise, over the same training windows each time."""
    monkeypatch.setattr(train_rvq, "FEW_WINDOWS", 2)
    flags = ("--data", tunes, "--val_split", "0.5", "--dropout", "0.5", "--no-amp", "--jitter")
    train(*flags, "--save_dir", tmp_path, "--epochs", "2")
    run = make_run(*flags, "--save_dir", tmp_path / "other")
    run.state.model.load_state_dict(load_checkpoint(tmp_path / "rvq_4cb_latest.pt")["ema"])
    few, last = len(run.val_windows) // 4, len(run.train_windows) - 1
    assert few > 2
    spread = (np.arange(few) * last / (few - 1)).astype(int)
    with torch.no_grad():
        losses = run.state.model.eval().losses(run.train_windows[spread].long(), 0.05, run.weights)
    row = rows(tmp_path, "epoch")[-1]
    assert row["train_ce"] == pytest.approx(losses.ce.mean().item(), rel=1e-5)
    monkeypatch.setattr(train_rvq, "FEW_WINDOWS", 10**6)
    before = torch.get_rng_state()
    assert math.isfinite(train_rvq.evaluate(run).train_ce)
    assert torch.equal(torch.get_rng_state(), before)


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


# --- a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("eval_outdir", [(), ("--eval-outdir", "heard/here")])
def test_files_of_a_run_are_no_data(eval_outdir, tunes, tmp_path, monkeypatch, capsys):
    """Else the first evaluation sample changes the data: the run is refused, or learns from it."""
    shutil.copytree(tunes, tmp_path / "toks")
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, "--eval-audio-every", "1", "--eval-frames", "40", "--no-report", *eval_outdir]
    flags += ["--pattern", "parallel"]
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
    epoch = ["step", "epoch", "train", "train_ce", "val", "val_obj", "ppl", "val_per_codebook"]
    epoch += ["frames_per_s", "seconds", "skipped"]
    assert set(step) <= set(by_event["step"])
    assert set(epoch) <= set(by_event["epoch"])
    assert {"start", "resume", "save", "end"} <= set(by_event)
    assert all(next(iter(row)) == "event" for row in good)


def test_a_budget_in_seconds_ends_the_run_and_bends_the_schedule(tunes, tmp_path):
    flags = ("--max-seconds", "2", "--epochs", "10000", "--log-lr-steps", "1")
    flags += ("--val-every", "10000", "--warmup-ratio", "0", "--step", "64")  # 2 steps an epoch
    checkpoint = train("--data", tunes, "--save_dir", tmp_path, *flags, "--archive-every", "0")
    assert 2 <= checkpoint["progress"]["seconds"] < 4
    steps = rows(tmp_path, "step")
    assert steps[-1]["epoch"] > 1
    rates = [row["lr"] for row in steps]
    assert rates[0] == pytest.approx(3e-4, rel=0.05)
    assert rates[-1] < 3e-5
    assert all(a >= b for a, b in itertools.pairwise(rates)), "also at an epoch's first step"
    assert len(rows(tmp_path, "epoch")) == 1, "one validation at the end"


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
