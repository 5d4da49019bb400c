"""Fixtures for every test: tiny corpora, runs made of them, odd disks and file systems."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from kit.trainer import ROOT, TINY, run_trainer
from make_codes import make_tune

from sound.npq_format import map_codes, read_header, write_npq


def pytest_configure() -> None:
    """Ctrl-C is tested also where a shell started the tests in the background, deaf to it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
    """Environment in which system calls can fail (kit/odd_file_system.c). Skips without cc."""
    if shutil.which("cc") is None:
        pytest.skip("faults of system calls are compiled by cc")
    library = tmp_path_factory.mktemp("odd") / "odd_file_system.so"
    source = ROOT / "tests" / "kit" / "odd_file_system.c"
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
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `high` and `low`: three files each, K = 4, of the upper and the lower half of V."""
    folder, rng = tmp_path_factory.mktemp("halves"), np.random.default_rng(7)
    patterns = rng.integers(8, size=(16, 8, 4))
    for half, least in (("high", 8), ("low", 0)):
        (folder / half).mkdir()
        for i in range(3):
            codes = least + make_tune(patterns, 400, rng)
            write_npq(folder / half / f"{i}.npq", codes, vocab_sizes=[16] * 4, frame_rate=86.13)
    return folder


@pytest.fixture(scope="session")
def tunes_of_the_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four short files of the bundled melodies, K = 9, V = 1024: what the bundled codec decodes."""
    folder = tmp_path_factory.mktemp("melodies")
    for path in sorted((ROOT / "examples" / "demo" / "train").glob("*.npq"))[:4]:
        codes = map_codes(read_header(path))[:200]
        write_npq(folder / path.name, codes, vocab_sizes=[1024] * 9, frame_rate=44_100 / 512)
    return folder


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
