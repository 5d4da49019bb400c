"""The trainer as a real process, stopped by real signals at arbitrary moments."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kit.checkpoints import assert_same_tensors, comparable
from kit.trainer import ROOT, TINY, kill_group, rows, run_trainer, start_trainer, wait_for

from run_folder.checkpoint import load_checkpoint


def flags_of(tunes: Path, save_dir: Path, workers: int, epochs: int = 8) -> list[str | Path]:
    """A run of some seconds that saves several times a second."""
    return [
        *TINY,
        *("--data", tunes, "--save_dir", save_dir, "--epochs", str(epochs)),
        *("--num_workers", str(workers), "--save-every-minutes", "0.002", "--archive-every", "3"),
    ]


def steps_logged(save_dir: Path) -> int:
    """The newest step in the metrics; 0 before there are any."""
    files = list(save_dir.glob("*_metrics.jsonl"))
    steps = rows(save_dir, "step") if files and files[0].read_bytes().endswith(b"\n") else []
    return int(steps[-1]["step"]) if steps else 0


def kill_and_resume(tunes: Path, folder: Path, workers: int, kills: int, seed: int) -> None:
    """Invariant A: no manual step, none of the saved steps lost, the same weights in the end."""
    code, output = run_trainer(*flags_of(tunes, folder / "whole", workers))
    assert code == 0, output
    whole = comparable(load_checkpoint(folder / "whole" / "rvq_4cb_latest.pt"))
    total, rng = whole["progress"]["step"], random.Random(seed)
    cut = folder / "cut"
    for moment in sorted(rng.uniform(0, total) for _ in range(kills)):
        process = start_trainer(*flags_of(tunes, cut, workers), start_new_session=True)
        wait_for(lambda m=moment, p=process: p.poll() is not None or steps_logged(cut) >= m - 5)
        time.sleep(rng.uniform(0, 0.3))
        reported = [row["step"] for row in rows(cut, "save")] if steps_logged(cut) else []
        kill_group(process)
        if reported:
            found = load_checkpoint(cut / "rvq_4cb_latest.pt")["progress"]["step"]
            assert found >= reported[-1], "a step that was reported as saved is gone"
    code, output = run_trainer(*flags_of(tunes, cut, workers))
    assert code == 0, output
    assert_same_tensors(comparable(load_checkpoint(cut / "rvq_4cb_latest.pt")), whole)
    assert not list(cut.glob("*.saving")), "leftovers are removed at the next start"


def test_killed_twice_and_resumed_with_workers(tunes, tmp_path):
    """Fault 1."""
    kill_and_resume(tunes, tmp_path, workers=2, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_five_times_at_random_moments(workers, seed, tunes, tmp_path):
    """Fault 1: n = 50 kills in all."""
    kill_and_resume(tunes, tmp_path, workers, kills=5, seed=seed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(number, code, tunes, tmp_path):
    """Fault 13."""
    process = start_trainer(*flags_of(tunes, tmp_path, 2, epochs=10_000), start_new_session=True)
    wait_for(lambda: steps_logged(tmp_path) >= 5)
    os.killpg(process.pid, number)  # as a terminal does
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code, output
    assert f"Stopped by {signal.Signals(number).name}; saved" in output
    assert "Traceback" not in output
    saved = load_checkpoint(tmp_path / "rvq_4cb_latest.pt")["progress"]["step"]
    assert f"at step {saved}." in output


def test_a_second_signal_leaves_at_once_and_sigusr1_only_saves(tunes, tmp_path):
    """Fault 13. A stopped process receives both signals together when it goes on."""
    flags = [*flags_of(tunes, tmp_path, 0, epochs=10_000), "--save-every-minutes", "0"]
    process = start_trainer(*flags, "--val-every", "10000", "--batch", "8")
    wait_for(lambda: steps_logged(tmp_path) >= 5)
    saves = len(rows(tmp_path, "save"))
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: len(rows(tmp_path, "save")) > saves)
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode in (130, 143), output
    assert "saved" not in output.splitlines()[-1]


def test_a_disk_that_hangs_stops_neither_training_nor_the_second_signal(tunes, tmp_path):
    """Fault 13, saving: to open a FIFO that nobody reads takes for ever, as on a dead network disk.

    A thousand steps an epoch: the next save, which waits, is far away.
    """
    flags = [*flags_of(tunes, tmp_path, 0, epochs=10_000), "--save-every-minutes", "0"]
    process = start_trainer(*flags, "--step", "1", "--batch", "1", "--accum", "1")
    wait_for(lambda: steps_logged(tmp_path) >= 5)
    os.mkfifo(tmp_path / ".rvq_4cb_latest.pt.saving")
    process.send_signal(signal.SIGUSR1)
    step = steps_logged(tmp_path)
    wait_for(lambda: steps_logged(tmp_path) >= step + 50)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):  # it waits for the save
        process.wait(timeout=1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 143, output
    assert "saved" not in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_while_a_run_starts_up_changes_none_of_its_files(number, tunes, tmp_path):
    """Fault 13: before the first step there is nothing to save; the next start goes on."""
    flags = [*flags_of(tunes, tmp_path, 2, epochs=4), "--save-every-minutes", "0"]
    assert run_trainer(*flags, "--max-steps", "3")[0] == 0
    before = (tmp_path / "rvq_4cb_latest.pt").read_bytes()
    for seconds in (0.05, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0):
        process = start_trainer(*flags, "--max-steps", "3")
        time.sleep(seconds)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode in (0, -number, 128 + number), output
        assert (tmp_path / "rvq_4cb_latest.pt").read_bytes() == before
    assert run_trainer(*flags)[0] == 0


@pytest.mark.slow
def test_a_signal_during_a_save_waits_for_it_and_saves_the_present_step(tunes, tmp_path):
    """Fault 13: a FIFO holds the save until it is read; it cannot be synced, so that save fails."""
    flags = [*flags_of(tunes, tmp_path, 0, epochs=10_000), "--save-every-minutes", "0"]
    process = start_trainer(*flags, "--step", "1", "--batch", "1", "--accum", "1")
    wait_for(lambda: steps_logged(tmp_path) >= 5)
    hole = tmp_path / ".rvq_4cb_latest.pt.saving"
    os.mkfifo(hole)
    process.send_signal(signal.SIGUSR1)
    step = steps_logged(tmp_path)
    wait_for(lambda: steps_logged(tmp_path) >= step + 10)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    subprocess.run(["cat", str(hole)], stdout=subprocess.DEVNULL, check=True)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143, output
    assert "Invalid argument" in output
    saved = load_checkpoint(tmp_path / "rvq_4cb_latest.pt")["progress"]["step"]
    assert saved >= step + 10
    assert f"saved {tmp_path / 'rvq_4cb_latest.pt'} at step {saved}." in output


def test_a_compiler_that_fails_is_named_and_training_goes_on(tunes, tmp_path):
    """A mode with CUDA graphs falls back to the default one, that to eager, and both are said."""
    flags = [*TINY, "--data", tunes, "--save_dir", tmp_path, "--epochs", "1", "--compile"]
    flags += ["--layers", "1", "--pattern", "parallel"]
    flags += ["--compile-mode", "reduce-overhead"]
    flags += ["--amp-dtype", "fp16"]  # a scaler must come through the failed trial step as well
    broken = {**os.environ, "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    code, output = run_trainer(*flags, env={**broken, "OMP_NUM_THREADS": "1"}, timeout=200)
    assert code == 0, output
    first = output.index("torch.compile failed in mode reduce-overhead, going on in mode default (")
    assert first < output.index("torch.compile failed in mode default, going on without it (")
    assert "Done at step" in output


@pytest.mark.slow
def test_the_kill_soak_counts_kills_and_ends(tunes, tmp_path):
    """Fault 1: as anybody would run it on codes of their own."""
    script = [sys.executable, str(ROOT / "benchmarks" / "kill_soak.py"), "--runs", "5"]
    script += ["--data", str(tunes), "--folder", str(tmp_path), "--fork", "--flags=--max-steps 40"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"0 lost of \d+ kills: below \d+\.\d\d% with 95 % confidence", done.stdout)
    assert list(tmp_path.iterdir()) == []
