"""training/saving.py: saves in the background, saves that fail, disks that get full."""

from __future__ import annotations

import contextlib
import copy
import os
import resource
import signal
import threading
import time

import pytest
import torch
from kit.checkpoints import assert_same_tensors, comparable
from kit.trainer import make_run, rows, train

import train_rvq
from layers.loss import Losses
from run_folder.checkpoint import load_checkpoint
from training import saving as run_saving


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
    model = run.state.ema.model
    vals = iter([1.0, 1.0, 3.0, 3.0, 2.0, 2.0, 2.5, 2.5])  # of validation, then of training windows
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
    assert said.err.count("rvq_4cb_latest.pt: File too large;") >= 3
    assert "saved" not in said.out
    assert "Done" not in said.out
    assert run.files.latest.read_bytes() == before


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
