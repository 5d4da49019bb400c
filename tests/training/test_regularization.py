"""The decay of rows that a new run takes where none is given."""

from __future__ import annotations

import pytest
from kit.npq_bytes import put
from kit.trainer import make_run, train

from run_folder.checkpoint import load_checkpoint
from run_folder.files import save_checkpoint
from sound.corpus import shifted_name
from training import regularization
from training.regularization import planned_passes

LATEST = "rvq_4cb_latest.pt"


def test_planned_passes_are_those_that_the_run_counts(tunes, tmp_path):
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--epochs", "3")
    passes = planned_passes(run.flags, run.train_windows)
    assert passes == pytest.approx(3 * run.passes_per_epoch)
    run.flags.batch, run.flags.effective_batch, run.flags.max_steps = "auto", 12, 7
    frames = 7 * 12 * run.flags.ctx
    assert planned_passes(run.flags, run.train_windows) == frames / run.train_windows.frames


def test_rows_of_codes_forget_where_a_run_is_longer_than_their_memory(
    tunes, tmp_path, capsys, monkeypatch
):
    """Without vectors the memory is six passes for each code a parameter."""
    assert make_run("--data", tunes, "--save_dir", tmp_path).flags.row_decay == 0, "little music"
    monkeypatch.setattr(regularization, "BARE_FRAMES", 0)
    flags = ("--data", tunes, "--epochs", "40", "--save_dir", tmp_path)
    run = make_run(*flags)
    steps_a_pass = run.train_windows.frames / (run.windows_per_step * run.flags.ctx)
    codes = run.train_windows.frames * run.train_windows.num_codebooks
    memory = 6 * codes / run.state.model.num_parameters() * steps_a_pass  # steps
    assert run.flags.row_decay == pytest.approx(1 / (25 * run.flags.lr * max(memory, 10)), rel=0.01)
    assert "rows     what is learned of single codes has weight decay" in capsys.readouterr().out
    for words, decay in (
        (["--max-steps", str(int(memory))], 0.0),
        (["--max-steps", str(int(memory)), "--max-seconds", "9"], run.flags.row_decay),
        (["--dropout", "0"], 0.0),
        (["--row-decay", "3"], 3.0),
    ):
        assert make_run(*flags, *words).flags.row_decay == decay, words


def test_shifted_encodings_lengthen_the_memory_and_validation_has_none(
    tunes, tmp_path, monkeypatch
):
    monkeypatch.setattr(regularization, "BARE_FRAMES", 0)
    for path in sorted(tunes.glob("*.npq")):
        for part in range(3):
            put(tmp_path / shifted_name(path.name, part, 3), path.read_bytes())
    flags = (
        "--epochs",
        "60",
        "--batch",
        "1",
        "--accum",
        "1",
        "--save_dir",
        tmp_path / "run",
        "--data",
    )
    alone, shifted = make_run(*flags, tunes), make_run(*flags, tmp_path)
    assert alone.flags.row_decay == pytest.approx(3 * shifted.flags.row_decay, rel=0.01)
    assert len(shifted.train_windows) == len(alone.train_windows)
    assert (len(shifted.train_windows.tables), len(shifted.val_windows.tables)) == (3, 1)


def test_a_resume_keeps_it_and_an_older_run_goes_on_without(tunes, tmp_path, monkeypatch):
    monkeypatch.setattr(regularization, "BARE_FRAMES", 0)
    flags = ("--data", tunes, "--save_dir", tmp_path)
    train(*flags, "--epochs", "40", "--depth-dropout", "0.2", stop_at=2)
    saved = load_checkpoint(tmp_path / LATEST)
    assert saved["flags"]["row_decay"] > 0
    resumed = make_run(*flags, "--epochs", "2")
    assert resumed.flags.row_decay == saved["flags"]["row_decay"]
    config = resumed.state.model.config
    assert (config.depth_dropout, config.value_residual) == (0.2, True)
    del saved["flags"]["depth_dropout"], saved["architecture"]["depth_dropout"]
    del saved["architecture"]["embed_fall"], saved["architecture"]["value_residual"]
    del saved["flags"]["row_decay"]
    save_checkpoint(saved, tmp_path / LATEST)
    run = make_run(*flags)
    assert (run.flags.depth_dropout, run.flags.row_decay) == (0.0, 0.0)
    assert not run.state.model.config.embed_fall
    assert not run.state.model.config.value_residual
