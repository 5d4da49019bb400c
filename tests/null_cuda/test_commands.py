"""Training, resuming, rolling back, planning and sampling on CUDA, as the commands do them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kit.checkpoints import assert_same_tensors
from kit.trainer import TINY, make_run, rows
from null_cuda.launches import counted

import sample_rvq
import train_rvq
from model import PATTERNS
from run_folder.checkpoint import load_checkpoint
from sound.npq_format import read_header
from training import saving
from training.state import TrainingRun

PRECISIONS = {
    "bf16": ["--amp-dtype", "bf16"],
    "fp16": ["--amp-dtype", "fp16"],
    "float32": ["--no-amp"],
}


def flags_of(tunes: Path, folder: Path, *more: str) -> list[str]:
    """A tiny run on the device, eager."""
    own = ["--device", "cuda", "--no-compile", "--data", str(tunes), "--save_dir", str(folder)]
    return [*TINY, *own, *more]


def on_host(run: TrainingRun) -> dict[str, Any]:
    """What the device holds of a run, as a checkpoint keeps it."""
    held = saving.checkpoint_of(run)
    parts = {name: dict(held[name]) for name in ("model", "ema", "optimizer")}
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, parts)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_run_trains_validates_saves_and_is_sampled(pattern, precision, tunes, tmp_path):
    more = [*PRECISIONS[precision], "--pattern", pattern, "--max-steps", "3"]
    codes: list[int] = []
    train = counted(lambda: codes.append(train_rvq.main(flags_of(tunes, tmp_path, *more))))
    assert codes == [0]
    assert train.launches > 300
    assert [row["step"] for row in rows(tmp_path, "epoch")] == [3]
    out = tmp_path / "song.npq"
    for how in ([], ["--compile"]):
        draw = ["--npq-out", str(out), "--frames", "12", "--ctx", "8", "--top-k", "5", *how]
        latest = str(tmp_path / "rvq_4cb_latest.pt")
        assert sample_rvq.main([latest, "--device", "cuda", *draw]) == 0
        assert read_header(out).num_frames == 12
        out.unlink()


def test_a_resumed_run_holds_what_was_saved_and_goes_on(tunes, tmp_path):
    assert train_rvq.main(flags_of(tunes, tmp_path, "--max-steps", "3")) == 0
    saved = load_checkpoint(tmp_path / "rvq_4cb_latest.pt")
    assert any(t.any() for t in saved["model"].values())
    run = make_run(*flags_of(tunes, tmp_path, "--max-steps", "6"))
    held = on_host(run)
    assert_same_tensors(held["model"], saved["model"])
    assert_same_tensors(held["ema"], saved["ema"])
    assert_same_tensors(held["optimizer"]["state"], saved["optimizer"]["state"])
    assert all(p.is_cuda for p in run.state.model.parameters())
    assert run.state.progress.step == 3
    assert train_rvq.train_or_save(run) == 0
    assert run.state.progress.step == 6


def test_a_run_that_the_guard_stops_goes_back_and_on(tunes, tmp_path):
    run = make_run(*flags_of(tunes, tmp_path, "--max-steps", "4"))
    kept = on_host(run)["model"]
    saving.save(run, ring=True)
    with torch.no_grad():  # H2D copies are real: these weights are lost again
        for p in run.state.model.parameters():
            p.copy_(torch.ones(p.shape))
    guard = run.state.guard
    guard.losses.extend([-9.0] * 64)  # the device computes 0: far above
    guard.log_norms.extend([0.0] * 64)
    assert train_rvq.train_or_save(run) == 0
    (event,) = rows(tmp_path, "rollback")
    assert event["step"] == 0
    assert run.state.progress.step == 4
    assert_same_tensors(on_host(run)["model"], kept)


def test_a_plan_times_micro_batches_on_the_device(tunes, tmp_path, capsys):
    assert train_rvq.main(flags_of(tunes, tmp_path, "--plan")) == 0
    assert "measured on cuda" in capsys.readouterr().out
