"""training/loader.py: windows read in threads, in order; files kept open; errors."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import processes
from kit.trainer import ROOT, TINY, rows, wait_for

from npq_dataset import EpochOrder, WindowDataset, find_npq_files, scan_corpus, split_corpus
from run_folder.checkpoint import load_checkpoint
from sound.npq_format import NpqError, map_codes, read_header, write_npq
from training.loader import Loader

CTX = 8


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 short files, no two alike."""
    folder = tmp_path_factory.mktemp("many")
    codes = np.random.default_rng(0).integers(64, size=(600, 40, 2))
    for i, each in enumerate(codes):
        write_npq(folder / f"{i:03d}.npq", each, vocab_sizes=[64] * 2, frame_rate=86.13)
    return folder


def windows_of(folder: Path) -> WindowDataset:
    corpus = scan_corpus(find_npq_files([folder]), ctx=CTX)
    train, _ = split_corpus(corpus, ctx=CTX, val_split=0.0)
    return WindowDataset(corpus, train, ctx=CTX, stride=11, jitter_seed=0)


def truth(windows: WindowDataset, order: EpochOrder) -> list[Any]:
    """The codes of an epoch's batches, each file read whole."""
    used = order.permutation(order.epoch)[: len(order) * order.batch]
    return [
        map_codes(read_header(p["file"]))[p["frame"] : p["frame"] + CTX].tolist()
        for p in windows.describe(used, order.epoch)
    ]


def reading_threads() -> int:
    return sum(t.name == "reading" for t in threading.enumerate())


# --- order and threads ----------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "ahead"), [(0, 6), (1, 1), (2, 6), (8, 50)])
def test_batches_come_in_the_orders_order_in_every_epoch(many, threads, ahead):
    windows = windows_of(many)
    order = EpochOrder(len(windows), batch=16, accum=2, seed=0)
    loader = Loader(windows, order, threads=threads, ahead=ahead)
    for order.epoch in (0, 1, 5):
        assert torch.cat([batch.codes for batch in loader]).tolist() == truth(windows, order)
    opened = [os.path.realpath(place) for place in Path("/proc/self/fd").iterdir()]
    assert not [path for path in opened if path.startswith(str(many))], "left open"


def test_what_is_left_half_way_ends_and_threads_end_with_their_loader(many):
    windows, before = windows_of(many), reading_threads()
    order = EpochOrder(len(windows), batch=16, accum=2, seed=0)
    loader = Loader(windows, order, threads=3, ahead=6)
    assert reading_threads() == before + 3
    for _ in range(3):
        next(iter(loader))
    assert torch.cat([batch.codes for batch in loader]).tolist() == truth(windows, order)
    del loader
    gc.collect()
    wait_for(lambda: reading_threads() == before, seconds=5)


def test_an_error_arrives_where_its_batch_would_and_as_it_was_raised(many, tmp_path):
    """Fault 18."""
    for name in ("000.npq", "001.npq"):
        (tmp_path / name).write_bytes((many / name).read_bytes())
    windows = windows_of(tmp_path)
    os.truncate(windows.tables[0].paths[1], 50)
    loader = Loader(windows, [np.array([0]), np.array([4])], threads=2, ahead=2)
    batches = iter(loader)
    assert next(batches).codes.shape == (1, CTX, 2)
    with pytest.raises(NpqError, match=r"00\d\.npq: file changed during the run") as caught:
        next(batches)
    assert caught.value.field == "file changed during the run"


# --- how many files are open ----------------------------------------------------------------------


TRAIN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train_rvq
train_rvq.leave(train_rvq.main())
"""


def limited(
    soft: int, *flags: str | Path, hard: int | None = None, program: str = TRAIN
) -> subprocess.Popen[str]:
    """A trainer that may have so many files open, as behind `ulimit -n` (or -Sn)."""
    least = f"({soft}, {hard} or resource.getrlimit(resource.RLIMIT_NOFILE)[1])"
    lower = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, {least})\n"
    return processes.Popen(
        [sys.executable, "-c", lower + program, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def flags_of(many: Path, save_dir: Path) -> list[str | Path]:
    flags = [*TINY, "--ctx", "8", "--data", many, "--save_dir", save_dir, "--num_workers", "2"]
    return [*flags, "--codebooks", "2", "--log-lr-steps", "1"]


def test_a_run_over_600_files_keeps_to_a_limit_of_64_open_ones(many, tmp_path):
    flags = [*flags_of(many, tmp_path), "--max-steps", "100", "--epochs", "9"]
    process = limited(64, *flags, hard=64)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "! " not in output


def test_a_soft_limit_is_raised_as_far_as_is_allowed(many, tmp_path):
    flags = [*flags_of(many, tmp_path), "--max-steps", "1000000", "--epochs", "1000000"]
    process = limited(100, *flags)
    try:
        wait_for(lambda: any(tmp_path.glob("*.jsonl")) or process.poll() is not None)
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        assert soft == min(1024, hard)
    finally:
        process.kill()


LEAK = f"""
import os, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import train_rvq
from training import ends

def leak():
    while not os.path.exists(sys.argv[-1]):
        time.sleep(0.01)
    while not failed.is_set():
        try:
            os.open(os.devnull, os.O_RDONLY)
        except OSError:
            time.sleep(0.001)

failed = threading.Event()
save_first = ends.save_first
ends.save_first = lambda run: (failed.set(), time.sleep(0.1), save_first(run))
threading.Thread(target=leak, daemon=True).start()
train_rvq.leave(train_rvq.main(sys.argv[1:-1]))
"""


def test_with_no_descriptor_left_the_cause_is_named_and_the_run_saved(many, tmp_path):
    """Something in the process takes every descriptor that gets free, until the run fails."""
    go = tmp_path / "go"
    flags = [*flags_of(many, tmp_path / "run"), "--epochs", "100000", "--save-every-minutes", "0"]
    process = limited(128, *flags, go, hard=128, program=LEAK)
    metrics = tmp_path / "run"
    wait_for(lambda: any(metrics.glob("*.jsonl")) and len(rows(metrics, "step")) >= 10)
    go.touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "killed" not in output
    last = output.splitlines()[-1]
    assert last.startswith(f"! {many}")
    assert last.endswith(".npq: Too many open files; raise `ulimit -n`")
    saved = load_checkpoint(metrics / "rvq_2cb_latest.pt")["progress"]["step"]
    assert saved == len(rows(metrics, "step")) >= 10
