"""A large corpus, by simulation: 10,000 hours in 200,000 files, from the scan to the first batch.

python benchmarks/scale.py                             # 1 GB of disk, removed again
python benchmarks/scale.py --files 20000               # 1,000 hours

The files have real headers and full length, 180 s of 9 codebooks each (56 GB), but only their first
frame is written, and differs from file to file: the rest are holes, which read as zeros, a valid
code. So no figure here tells of a disk. That codes are checked at first sight is timed on a part of
the files, and the list of checked files made up for the rest. Each part runs in a process of its
own, so that its memory is its own; "peak" is above what the process had with its libraries loaded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_path import BATCH, CODEBOOKS, CTX, RATE, VOCAB, npq1_head

from npq_dataset import EpochOrder, WindowDataset, find_npq_files, scan_corpus, split_corpus

FRAMES = round(180 * RATE)
PER_FOLDER = 1_000  # files
CHECKED = 2_000  # files whose codes are read
STRIDES = (CTX // 2, 3_000)  # the trainer's default, and one for a million windows an epoch


def make_files(folder: Path, files: int) -> None:
    """Sparse files: header and first frame, then holes."""
    head = npq1_head(FRAMES)
    size = len(head) + FRAMES * CODEBOOKS * 2
    for first in range(0, files, PER_FOLDER):
        place = folder / f"{first // PER_FOLDER:04d}"
        place.mkdir()
        for i in range(first, min(first + PER_FOLDER, files)):
            frame = np.array([*divmod(i, VOCAB), *[1] * (CODEBOOKS - 2)], "<u2")
            with open(place / f"{i:06d}.npq", "wb") as file:
                file.write(head + frame.tobytes())
                file.truncate(size)


def pretend_checked(folder: Path, store: Path) -> None:
    """A list of checked files as a scan leaves it, with a number for each CRC."""
    known = {}
    for i, path in enumerate(find_npq_files([folder])):
        status = os.stat(path)
        crc = i * 2_654_435_761 % 2**32
        known[os.path.realpath(path)] = [status.st_size, status.st_mtime_ns, crc]
    store.write_text(json.dumps(known))


# --- memory --------------------------------------------------------------------------------------


def memory_mb(process: int | str, file: str, field: str) -> float:
    """A field of /proc/process/file, in MB."""
    for line in Path(f"/proc/{process}/{file}").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1e3
    raise KeyError(field)


def alone(measure: Callable[..., None], *arguments: Any) -> None:
    """Run in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=measure, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{measure.__name__} failed")


class Clock:
    """Prints what a part took, and the memory so far above that at the start."""

    def __init__(self) -> None:
        self.before = memory_mb("self", "status", "VmRSS")
        print("\n| part | time | processor | peak so far | memory |\n|---|---:|---:|---:|---:|")
        self.begin()

    def begin(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def lap(self, part: str) -> None:
        wall, processor = time.perf_counter() - self.started[0], time.process_time()
        processor -= self.started[1]
        peak, now = (memory_mb("self", "status", f) - self.before for f in ("VmHWM", "VmRSS"))
        row = f"| {part} | {wall:.2f} s | {processor:.2f} s | {peak:,.0f} MB | {now:,.0f} MB |"
        print(row, flush=True)
        self.begin()


# --- parts ---------------------------------------------------------------------------------------


def first_sight(folder: Path, store: Path) -> None:
    """The scan of files that were not read before."""
    paths = find_npq_files([folder])[:CHECKED]
    clock = Clock()
    scan_corpus(paths, ctx=CTX, checked_file=store)
    size = sum(map(os.path.getsize, paths))
    clock.lap(f"scan that reads {len(paths):,} files, {size / 1e9:.2f} GB")


def start_of_a_run(folder: Path, store: Path) -> None:
    """From the folder to the first batches."""
    clock = Clock()
    paths = find_npq_files([folder])
    clock.lap(f"find {len(paths):,} files")
    corpus = scan_corpus(paths, ctx=CTX, checked_file=store)
    del paths
    clock.lap(f"scan, {corpus.summary.hours:,.0f} hours, codes known")
    train, _ = split_corpus(corpus, ctx=CTX, val_split=0.05)
    clock.lap("split")
    for stride in STRIDES:
        windows = WindowDataset(corpus, train, ctx=CTX, stride=stride, jitter_seed=0)
        clock.lap(f"index, a window every {stride} frames")
        order = EpochOrder(len(windows), batch=BATCH, accum=1, seed=0)
        batches = iter(order)
        next(batches)
        clock.lap(f"order of an epoch, {len(windows):,} windows")
        del batches
    for workers in (0, 2):
        first_batch(clock, windows, order, workers)


def first_batch(clock: Clock, windows: WindowDataset, order: EpochOrder, workers: int) -> None:
    """The first batch of an epoch, shuffle included, then memory after 300 more."""
    clock.begin()
    batches = iter(DataLoader(windows, batch_size=None, sampler=order, num_workers=workers))
    next(batches)
    clock.lap(f"first batch, {workers} loader processes")
    for _ in range(300):
        next(batches)
    clock.lap(f"300 batches of {BATCH} more")
    for child in multiprocessing.active_children():
        pss = memory_mb(str(child.pid), "smaps_rollup", "Pss")
        own = memory_mb(str(child.pid), "smaps_rollup", "Private_Dirty")
        print(f"| a loader process | | | {pss:,.0f} MB of its share | {own:,.0f} MB of its own |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=200_000)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name) / "files", Path(name) / "checked.json"
        folder.mkdir()
        started = time.perf_counter()
        make_files(folder, args.files)
        print(f"made {args.files:,} files in {time.perf_counter() - started:.0f} s", flush=True)
        alone(first_sight, folder, Path(name) / "some.json")
        alone(pretend_checked, folder, store)
        alone(start_of_a_run, folder, store)
        print(f"\nlist of checked files: {store.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
