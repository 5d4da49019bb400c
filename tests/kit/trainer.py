"""The trainer as a real process, or set up in this one, and the rows that it writes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import train_rvq
from kit import processes
from layers.loss import Losses
from run_folder.checkpoint import load_checkpoint
from run_folder.metrics import Console
from train_rvq import parse_flags
from training.setup import set_up
from training.state import TrainingRun

ROOT = Path(__file__).resolve().parents[2]


TINY = [
    *("--device", "cpu", "--d_model", "32", "--layers", "2", "--heads", "2", "--ctx", "32"),
    *("--batch", "4", "--accum", "2", "--lr", "3e-4", "--num_workers", "0", "--eval-audio-every"),
    *("0", "--log-lr-steps", "5"),
]


def start_trainer(*flags: str | Path, **options: Any) -> subprocess.Popen[str]:
    """train_rvq.py as a user starts it."""
    return processes.Popen(
        [sys.executable, str(ROOT / "train_rvq.py"), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=options.pop("env", {**os.environ, "OMP_NUM_THREADS": "1"}),
        **options,
    )


def run_doctor(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """ckpt_doctor.py as a process."""
    command = [sys.executable, str(ROOT / "ckpt_doctor.py"), *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return processes.run(command, capture_output=True, text=True, timeout=240, env=env, **options)


def run_trainer(*flags: str | Path, timeout: float = 120, **options: Any) -> tuple[int, str]:
    """Exit code and everything printed."""
    process = start_trainer(*flags, **options)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output


def rows(save_dir: Path, event: str = "") -> list[dict[str, Any]]:
    """Metrics rows of the only run in a folder, but one that is just being written."""
    (path,) = save_dir.glob("*_metrics.jsonl")
    parsed = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return [row for row in parsed if not event or row["event"] == event]


def start_ranks(
    count: int, *flags: str | Path, program: tuple[str, ...] = (), env: dict[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """Processes of one run, by rank: the trainer, or `program`, with what torchrun tells each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {}), **meeting}
    words = [sys.executable, *(program or (str(ROOT / "train_rvq.py"),)), *TINY, *map(str, flags)]
    return [
        processes.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**env, "WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]


def end_ranks(ranks: list[subprocess.Popen[str]], timeout: float = 200) -> tuple[list[int], str]:
    """Exit codes of `start_ranks`, by rank, and everything printed."""
    try:
        output = "".join(rank.communicate(timeout=timeout)[0] for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], output


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Poll until true; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a trainer and what it has started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def make_run(*flags: str | Path) -> TrainingRun:
    """A run as main sets it up."""
    parsed, explicit = parse_flags([*TINY, *map(str, flags)])
    Path(parsed.save_dir).mkdir(parents=True, exist_ok=True)
    return set_up(parsed, explicit, Console(quiet=True))


def train(*flags: str | Path, stop_at: int | None = None) -> dict[str, Any]:
    """Train to the end, or until a signal comes in the middle of step `stop_at`; the checkpoint."""
    run = make_run(*flags)
    eager = run.losses

    def interrupting(*inputs: torch.Tensor) -> Losses:
        if run.state.progress.step + 1 == stop_at:
            run.stop.signal = signal.SIGTERM
        return eager(*inputs)

    run.losses = interrupting
    code = train_rvq.train_or_save(run)
    assert code == (0 if run.stop.signal is None else 143)
    return load_checkpoint(run.files.latest)
