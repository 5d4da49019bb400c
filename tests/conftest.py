"""Shared by the tests: the project on the path, tiny corpora, and the trainer as a real process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "examples"))

from make_codes import make_tune  # noqa: E402

from sound.npq_format import map_codes, read_header, write_npq  # noqa: E402

# Tiny tensors: threads cost more than they bring, here and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

TINY = [
    *("--device", "cpu", "--d_model", "32", "--layers", "2", "--heads", "2", "--ctx", "32"),
    *("--batch", "4", "--accum", "2", "--lr", "3e-4", "--num_workers", "0", "--eval-audio-every"),
    *("0", "--log-lr-steps", "5"),
]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs of a size ("3m"): a real disk that gets full. Skips where it may not."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs root; RLIMIT_FSIZE tests stand in elsewhere")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def odd_file_system(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which system calls can fail; see odd_file_system.c. Skips without cc."""
    if shutil.which("cc") is None:
        pytest.skip("faults of system calls are compiled by cc")
    library = tmp_path_factory.mktemp("odd") / "odd_file_system.so"
    source = Path(__file__).with_name("odd_file_system.c")
    command = ["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source, "-ldl"]
    subprocess.run(list(map(str, command)), check=True)
    return {**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(library)}


@pytest.fixture(scope="session")
def tunes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files of structured codes, K = 4, V = 64."""
    folder = tmp_path_factory.mktemp("tunes")
    rng = np.random.default_rng(7)
    patterns = rng.integers(64, size=(16, 8, 4))
    for i in range(4):
        codes = make_tune(patterns, 300, rng)
        write_npq(folder / f"{i}.npq", codes, vocab_sizes=[64] * 4, frame_rate=86.13)
    return folder


@pytest.fixture(scope="session")
def tunes_of_the_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four short files of the bundled melodies, K = 9, V = 1024: what the bundled codec decodes."""
    folder = tmp_path_factory.mktemp("melodies")
    for path in sorted((ROOT / "examples" / "demo" / "train").glob("*.npq"))[:4]:
        codes = map_codes(read_header(path))[:200]
        write_npq(folder / path.name, codes, vocab_sizes=[1024] * 9, frame_rate=44_100 / 512)
    return folder


def start_trainer(*flags: str | Path, **options: Any) -> subprocess.Popen[str]:
    """train_rvq.py as a user starts it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_rvq.py"), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=options.pop("env", {**os.environ, "OMP_NUM_THREADS": "1"}),
        **options,
    )


def run_trainer(*flags: str | Path, timeout: float = 120, **options: Any) -> tuple[int, str]:
    """Exit code and everything printed."""
    process = start_trainer(*flags, **options)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output


@pytest.fixture(scope="session")
def adamw_run(tunes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs with --optim adamw and an archive of each."""
    folder = tmp_path_factory.mktemp("adamw")
    flags = ["--data", tunes, "--save_dir", folder, "--epochs", "2", "--archive-every", "1"]
    flags += [*TINY, "--optim", "adamw", "--lr", "3e-3", "--pattern", "parallel"]
    code, output = run_trainer(*flags)
    assert code == 0, output
    return folder


@pytest.fixture
def good(adamw_run: Path, tmp_path: Path) -> Path:
    """A copy of its `latest`, to spoil."""
    return Path(shutil.copyfile(adamw_run / "rvq_4cb_latest.pt", tmp_path / "rvq_4cb_latest.pt"))


@pytest.fixture(scope="session")
def muon_epoch(tunes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`latest` of a run of one epoch with --optim muon."""
    folder = tmp_path_factory.mktemp("muon")
    flags = ["--data", tunes, "--save_dir", folder, "--epochs", "1", *TINY]
    code, output = run_trainer(*flags, "--optim", "muon", "--pattern", "parallel")
    assert code == 0, output
    return folder / "rvq_4cb_latest.pt"


@pytest.fixture
def muon(muon_epoch: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    return Path(shutil.copyfile(muon_epoch, tmp_path / "rvq_4cb_latest.pt"))


def content_of(path: Path) -> dict[str, Any]:
    """What a checkpoint holds."""
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def rows(save_dir: Path, event: str = "") -> list[dict[str, Any]]:
    """Metrics rows of the only run in a folder."""
    (path,) = save_dir.glob("*_metrics.jsonl")
    parsed = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in parsed if not event or row["event"] == event]


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


def assert_same_tensors(a: Any, b: Any, path: str = "") -> None:
    """Equality of nested checkpoints, tensors bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same_tensors(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_tensors(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    else:
        assert a == b, path
