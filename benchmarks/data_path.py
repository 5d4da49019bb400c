"""What the way from disk to batch costs: scan, index, windows per second by three readers, memory.

python benchmarks/data_path.py                         # makes its files: 0.7 GB, removed again
python benchmarks/data_path.py --files 2000 --rounds 3
python benchmarks/data_path.py --data npq_out          # real files instead

The files are in the page cache throughout (the scan has just read them): this compares what the
readers themselves cost, not disks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import struct
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from npq_dataset import (
    MAX_OPEN_FILES,
    Corpus,
    WindowDataset,
    find_npq_files,
    map_codes,
    read_header,
    scan_corpus,
    split_corpus,
)

CTX, CODEBOOKS, VOCAB, BATCH = 512, 9, 1024, 32
RATE = 44_100 / 512  # frames per second
READERS = ("preadv", "memory map", "whole file")
Batch = Callable[[np.ndarray], object]


def make_files(folder: Path, lengths: np.ndarray) -> None:
    """NPQ1 files of random codes. Not by write_npq, which waits for the disk at each of them."""
    random = np.random.default_rng(0)
    pool = random.integers(VOCAB, size=(int(lengths.max()) + 10_000, CODEBOOKS), dtype=np.uint16)
    folder.mkdir()
    for i, frames in enumerate(lengths.tolist()):
        head = struct.pack("<4sHHffI", b"NPQ1", 1, CODEBOOKS, RATE, 320.0, frames)
        head += struct.pack(f"<{CODEBOOKS}IB", *[VOCAB] * CODEBOOKS, 1)
        start = random.integers(10_000)
        codes = pool[start : start + frames].copy()
        codes[0, :2] = divmod(i, VOCAB)  # no two files alike
        (folder / f"{i:06d}.npq").write_bytes(head + codes.tobytes())


def resident_mb() -> float:
    """Resident memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def all_windows(corpus: Corpus) -> WindowDataset:
    """Every window of a corpus, end to end."""
    train, _ = split_corpus(corpus, ctx=CTX, val_split=0.0)
    return WindowDataset(corpus, train, ctx=CTX, stride=CTX)


def by_memory_map(windows: WindowDataset) -> Batch:
    """Slices of memory maps, of which as many stay open as the project's reader keeps files."""
    headers = [read_header(path) for path in windows.paths]
    open_maps: OrderedDict[int, np.ndarray] = OrderedDict()

    def batch(numbers: np.ndarray) -> np.ndarray:
        out = np.empty((len(numbers), CTX, windows.num_codebooks), windows.dtype)
        files, starts = windows.locate(numbers)
        for row, file, start in zip(out, files.tolist(), starts.tolist(), strict=True):
            if file not in open_maps:
                open_maps[file] = map_codes(headers[file])
                if len(open_maps) > MAX_OPEN_FILES:
                    open_maps.popitem(last=False)
            open_maps.move_to_end(file)
            row[:] = open_maps[file][start : start + CTX]
        return out

    return batch


def by_whole_file(windows: WindowDataset) -> Batch:
    """The file read from beginning to end for each window of it."""

    def batch(numbers: np.ndarray) -> np.ndarray:
        out = np.empty((len(numbers), CTX, windows.num_codebooks), windows.dtype)
        files, starts = windows.locate(numbers)
        for row, file, start in zip(out, files.tolist(), starts.tolist(), strict=True):
            _, frames, k, code_type, *_ = windows.files[file].item()
            count = frames * k
            content = Path(windows.paths[file]).read_bytes()
            dtype = ("<u1", "<u2", "<u4")[code_type]
            codes = np.frombuffer(content, dtype, count, int(windows.files[file]["offset"]))
            row[:] = codes.reshape(frames, k)[start : start + CTX]
        return out

    return batch


def windows_per_second(read: Batch, numbers: np.ndarray) -> float:
    started = time.perf_counter()
    for first in range(0, len(numbers), BATCH):
        read(numbers[first : first + BATCH])
    return len(numbers) / (time.perf_counter() - started)


def compare_readers(windows: WindowDataset, rounds: int, most: int) -> None:
    """Windows per second in shuffled order; the readers take turns on the same windows."""
    reads = dict(
        zip(
            READERS,
            (windows.__getitem__, by_memory_map(windows), by_whole_file(windows)),
            strict=True,
        )
    )
    some = np.arange(min(8, len(windows)))
    assert np.array_equal(reads["preadv"](some), reads["memory map"](some))
    assert np.array_equal(reads["preadv"](some), reads["whole file"](some))
    found: dict[str, list[float]] = {name: [] for name in READERS}
    for turn in range(rounds):
        order = np.random.default_rng(turn).permutation(len(windows))
        order = np.resize(order, max(len(order), most))[:most]
        for name in READERS[turn % 3 :] + READERS[: turn % 3]:
            numbers = order[: most // 10] if name == "whole file" else order
            found[name].append(windows_per_second(reads[name], numbers))
    for name, speeds in found.items():
        count = most // 10 if name == "whole file" else most
        print(
            f"  {name:<11} {statistics.median(speeds):>10,.0f} windows/s   "
            f"{min(speeds):>9,.0f} to {max(speeds):<9,.0f} n = {rounds} x {count:,}"
        )


def epoch_memory(windows: WindowDataset) -> None:
    """Resident memory before and after every window once, by either reader that keeps files."""
    order = np.random.default_rng(0).permutation(len(windows))
    for name, read in (("preadv", windows.__getitem__), ("memory map", by_memory_map(windows))):
        before = resident_mb()
        windows_per_second(read, order)
        print(f"  {name:<11} resident {before:,.0f} MB before an epoch, {resident_mb():,.0f} after")


def report(title: str, paths: list[str], rounds: int, most: int, store: Path) -> None:
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        corpus = scan_corpus(paths, ctx=CTX, skip_bad=True, checked_file=store)
        seconds.append(time.perf_counter() - started)
    windows = all_windows(corpus)
    arrays = [v for v in vars(windows).values() if isinstance(v, np.ndarray)]
    size = sum(a.nbytes for a in arrays)
    print(f"{title}: {len(corpus.paths):,} files, {len(windows):,} windows of {CTX} frames")
    print(f"  scan        {seconds[0]:.2f} s the first time, {seconds[1]:.2f} s again")
    print(f"  index       {size:,} bytes in arrays, {size / len(corpus.paths):.0f} a file")
    compare_readers(windows, rounds, most)
    epoch_memory(windows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=20_000, help="short files to make")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each reader")
    parser.add_argument("--windows", type=int, default=10_000, help="windows in a turn")
    parser.add_argument("--data", nargs="+", help="use these .npq files or folders instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.data:
            sets = {"given files": find_npq_files(args.data)}
        else:
            lengths = np.random.default_rng(1).integers(1_000, 3_001, args.files)
            make_files(folder / "many", lengths)
            make_files(folder / "two", np.array([30_000, 60_000]))
            sets = {n: find_npq_files([folder / d]) for n, d in
                    (("short files", "many"), ("long files", "two"))}  # fmt: skip
        for number, (title, paths) in enumerate(sets.items()):
            report(title, paths, args.rounds, args.windows, folder / f"checked{number}.json")


if __name__ == "__main__":
    main()
