"""Data that does not come: what a run says and does while it waits, and how the wait ends.

Fault 26. Reads are held in the kernel's place, by `odd_file_system.c`, as a dead server holds them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from kit import processes
from kit.trainer import ROOT, TINY, end_ranks, rows, run_trainer, start_ranks, wait_for

import cli.waiting
from cli.waiting import NoAnswerError, in_thread
from run_folder.checkpoint import load_checkpoint

WORKERS = ("--num_workers", "2", "--prefetch", "1")
IMPATIENT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import cli.waiting
cli.waiting.FIRST_WORD, cli.waiting.PATIENCE = 1.0, 3.0  # seconds, and not 30 and 600
import train_rvq
train_rvq.leave(train_rvq.main())
"""


class Held:
    """A trainer whose data can be held back, and which gives it up after three seconds."""

    program: tuple[str, ...] = ("-c", IMPATIENT)

    def __init__(self, env: dict[str, str], save_dir: Path, *flags: str | Path) -> None:
        self.save_dir, self.hold = save_dir, save_dir.with_name(f"{save_dir.name}.hold")
        command = [*TINY, "--save_dir", save_dir, "--epochs", "10000", "--save-every-minutes", "0"]
        self.process = processes.Popen(
            [sys.executable, *self.program, *map(str, [*command, *flags])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={"HOLD": str(self.hold), **env},
        )

    def hold_after(self, steps: int) -> None:
        """Hold the data back once so many steps were logged; come back when a read is held."""
        wait_for(lambda: self.logged() >= steps or self.process.poll() is not None)
        self.hold.touch()
        held = self.hold.with_name(f"{self.hold.name}.held")
        wait_for(lambda: held.exists() or self.process.poll() is not None)
        time.sleep(1)  # what was read ahead is used

    def logged(self, event: str = "step") -> int:
        found = any(self.save_dir.glob("*_metrics.jsonl"))
        return len(rows(self.save_dir, event)) if found else 0

    def end(self, seconds: float = 40) -> str:
        """Wait for the end; all that was printed."""
        try:
            return self.process.communicate(timeout=seconds)[0]
        finally:
            self.process.kill()

    def saved_step(self) -> int:
        step: int = load_checkpoint(self.save_dir / "rvq_4cb_latest.pt")["progress"]["step"]
        return step


class HeldWithPatience(Held):
    """The same with the patience that users have."""

    program = (str(ROOT / "train_rvq.py"),)


# --- what a batch travels through -----------------------------------------------------------------


def test_a_long_tmpdir_is_no_matter(tunes, tmp_path):
    """A socket's path has 108 bytes at most."""
    long = tmp_path / ("x" * (108 - len(str(tmp_path))))
    long.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(long)}
    flags = ("--data", tunes, "--save_dir", tmp_path / "run", "--epochs", "1", *WORKERS)
    code, output = run_trainer(*TINY, *flags, env=environment, timeout=40)
    assert code == 0, output
    assert "Traceback" not in output


def test_a_full_dev_shm_is_no_matter(tunes, tmp_path):
    """64 kB, as containers may have."""
    mounted = "mount -t tmpfs -o size=64k tmpfs /dev/shm && fallocate -l 64k /dev/shm/full"
    if subprocess.run(["unshare", "-m", "sh", "-c", mounted], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    flags = ("--data", tunes, "--save_dir", tmp_path, "--epochs", "1", *WORKERS, "--prefetch", "30")
    trainer = [sys.executable, ROOT / "train_rvq.py", *TINY, *flags]
    script = f'{mounted}; exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *map(str, trainer)],
        capture_output=True,
        text=True,
        timeout=40,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# --- reads that do not return ---------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_that_waits_for_data(
    number, code, workers, tunes, tmp_path, odd_file_system
):
    flags = ("--data", tunes, "--num_workers", workers)
    run = HeldWithPatience(odd_file_system, tmp_path / "run", *flags)
    run.hold_after(steps=2)
    run.process.send_signal(number)
    output = run.end()
    assert run.process.returncode == code, output
    assert f"at step {run.saved_step()}. The same command goes on from there." in output
    assert run.saved_step() >= 10
    assert "Traceback" not in output


def test_sigusr1_saves_a_run_that_waits_for_data(tunes, tmp_path, odd_file_system):
    run = HeldWithPatience(odd_file_system, tmp_path / "run", "--data", tunes, *WORKERS)
    run.hold_after(steps=2)
    before = run.logged("save")
    run.process.send_signal(signal.SIGUSR1)
    wait_for(lambda: run.logged("save") > before, seconds=20)
    run.hold.unlink()
    steps = run.logged()
    wait_for(lambda: run.logged() > steps + 2)
    run.process.send_signal(signal.SIGTERM)
    output = run.end()
    assert run.process.returncode == 143, output


def test_data_that_never_comes_is_named_and_the_run_saved(tunes, tmp_path, odd_file_system):
    run = Held(odd_file_system, tmp_path / "run", "--data", tunes, *WORKERS)
    run.hold_after(steps=2)
    output = run.end()
    assert run.process.returncode == 1, output
    assert run.saved_step() >= 10
    *_, waiting, failed, last = output.splitlines()
    assert f"! {tunes}" in waiting
    assert waiting.endswith(".npq: waiting since 2 s (for 3 s at most)")
    assert failed == f"! failed at step {run.saved_step()}; saving first"
    assert f"! {tunes}" in last
    assert ".npq: no answer for 3 s" in last
    assert "same command" in last


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (None, 1)])
def test_a_validation_that_waits_is_ended_too(number, code, tunes, tmp_path, odd_file_system):
    """By a signal, or by itself."""
    names = tmp_path / "val.txt"
    names.write_text("3.npq\n")
    flags = ("--data", tunes, "--val-list", names, *WORKERS)
    run = Held({**odd_file_system, "HOLD_DATA": "3.npq"}, tmp_path / "run", *flags)
    run.hold_after(steps=1)
    if number:
        run.process.send_signal(number)
    output = run.end()
    assert run.process.returncode == code, output
    assert number or "3.npq: no answer for 3 s" in output
    assert f"saved {run.save_dir / 'rvq_4cb_latest.pt'}" in output or not number
    assert run.saved_step() >= 5


def test_a_plan_and_a_start_that_wait_are_ended(tunes, tmp_path, odd_file_system):
    for flags in (("--plan",), ()):
        (tmp_path / "run.hold").touch()
        run = Held(odd_file_system, tmp_path / "run", "--data", tunes, *flags)
        output = run.end()
        assert run.process.returncode == 1, output
        assert "0.npq: waiting since 1 s" in output
        assert "0.npq: no answer for 3 s" in output
        (tmp_path / "run.hold.held").unlink()
        run = Held(odd_file_system, tmp_path / "run", "--data", tunes, *flags)
        wait_for(lambda: (tmp_path / "run.hold.held").exists())
        run.process.send_signal(signal.SIGINT)
        output = run.end()
        assert run.process.returncode == 130, output


def test_a_sample_that_waits_for_its_statistics_is_ended(
    tunes_of_the_demo, tmp_path, odd_file_system
):
    flags = ("--data", tunes_of_the_demo, "--eval-audio-every", "1", "--eval-dac-repo", "demo")
    held = {**odd_file_system, "HOLD_DATA": str(tunes_of_the_demo)}
    run = Held(held, tmp_path / "run", *flags, "--eval-frames", "64", *WORKERS)
    samples = tmp_path / "run" / "samples"
    wait_for(lambda: any(samples.glob("*.npq")) or run.process.poll() is not None)
    run.hold_after(steps=0)  # its sound is decoded first, and the codec imported
    run.process.send_signal(signal.SIGTERM)
    output = run.end()
    assert run.process.returncode == 143, output
    assert "Stopped by SIGTERM; saved" in output


@pytest.mark.parametrize("ending", ["signal", "patience"])
def test_one_process_of_two_that_waits_ends_both(ending, tunes, tmp_path, odd_file_system):
    """Rank 1's data is held; rank 0 waits for rank 1, and saves."""
    hold = tmp_path / "hold"
    held = {**odd_file_system, "HOLD": str(hold), "HOLD_RANK": "1"}
    flags = ["--data", tunes, "--save_dir", tmp_path / "run", "--epochs", "10000", *WORKERS]
    flags += ["--log-lr-steps", "1", "--save-every-minutes", "0", "--step", "4"]
    ranks = start_ranks(2, *flags, program=("-c", IMPATIENT), env=held)
    try:
        metrics = tmp_path / "run"
        wait_for(lambda: any(metrics.glob("*.jsonl")) and len(rows(metrics, "step")) >= 3)
        hold.touch()
        if ending == "signal":
            wait_for(lambda: (tmp_path / "hold.held").exists())
            time.sleep(1)
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)  # as torchrun hands it on
    finally:
        codes, output = end_ranks(ranks, timeout=40)
    assert codes == [143, 143] if ending == "signal" else all(codes), output
    saved = load_checkpoint(tmp_path / "run" / "rvq_4cb_latest.pt")["progress"]["step"]
    assert saved == len(rows(tmp_path / "run", "step")) >= 3
    if ending == "signal":
        assert f"Stopped by SIGTERM; saved {tmp_path / 'run' / 'rvq_4cb_latest.pt'}" in output
    else:
        assert "rank 1 on" in output
        assert "no answer for 3 s" in output


# --- the wait itself ------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.waiting, "FIRST_WORD", 0.2)
    monkeypatch.setattr(cli.waiting, "PATIENCE", 1.0)
    monkeypatch.setattr(cli.waiting, "TICK", 0.02)


def test_slow_work_is_waited_for_as_long_as_it_goes_on(short):
    """Three times the patience, with a sign of life each half of it; a line tells each stall."""
    done: list[int] = []

    def work() -> str:
        for i in range(6):
            time.sleep(0.5)
            done.append(i)
        return "at last"

    said: list[str] = []
    future = in_thread(work)
    result = cli.waiting.wait_for(
        future, lambda: (len(done), f"part {len(done)}"), tell=said.append
    )
    assert result == "at last"
    assert [line.partition(":")[0] for line in said[::2]] == [f"part {i}" for i in range(6)]


def test_words_come_ever_more_seldom_and_the_last_is_an_error(short):
    said: list[str] = []
    never: Future[Any] = Future()
    with pytest.raises(NoAnswerError, match=r"it: no answer for 1 s; .*same command"):
        cli.waiting.wait_for(never, lambda: (0, "it"), tell=said.append)
    assert len(said) == 3  # at 0.2, 0.4 and 0.8 s


def test_a_process_that_was_stopped_itself_accuses_nobody(tmp_path):
    """SIGSTOP for twice the patience, and on: it was this process that did not look."""
    script = tmp_path / "wait.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "import cli.waiting as w\n"
        "w.PATIENCE = 1.0\n"
        "future = w.in_thread(lambda: time.sleep(3))\n"
        "print('waiting', flush=True)\n"
        "w.wait_for(future, lambda: (0, 'it'))\n"
    )
    command = [sys.executable, str(script)]
    process = processes.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 0, output


def test_an_error_of_the_work_is_raised_as_it_was():
    def work() -> None:
        raise OSError(24, "Too many open files", "x.npq")

    with pytest.raises(OSError, match=r"x\.npq") as caught:
        cli.waiting.wait_for(in_thread(work), lambda: (0, ""))
    assert caught.value.errno == 24
