"""Windows per second from disk to batch: this project, a plain PyTorch loader, limits; memory.

python benchmarks/data_path.py                         # makes its files: 0.7 GB, removed again
python benchmarks/data_path.py --files 2000 --rounds 3
python benchmarks/data_path.py --data npq_out          # real files instead, of 16-bit codes

The files are in the page cache throughout (the scan has just read them): this compares what the
readers themselves cost, not disks. All read the same windows in the same shuffled order and take
turns; a ratio is the median over the rounds of the reader's rate by the first row's.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import struct
import sys
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from npq_dataset import WindowDataset, find_npq_files, scan_corpus, split_corpus
from sound.npq_format import map_codes, read_header
from training.loader import Loader

CTX, CODEBOOKS, VOCAB, BATCH = 512, 9, 1024, 32
RATE = 44_100 / 512  # frames per second
SLOW = 10  # readers that take this many times as long get as many times fewer windows
MOST_MAPS = 256  # kept at once
Read = Callable[[np.ndarray], None]  # window numbers [n] -> reads them all, batch by batch


def make_files(folder: Path, lengths: np.ndarray) -> None:
    """NPQ1 files of random codes. Not by write_npq, which waits for the disk at each of them."""
    random = np.random.default_rng(0)
    pool = random.integers(VOCAB, size=(int(lengths.max()) + 10_000, CODEBOOKS), dtype=np.uint16)
    folder.mkdir()
    for i, frames in enumerate(lengths.tolist()):
        start = random.integers(10_000)
        codes = pool[start : start + frames].copy()
        codes[0, :2] = divmod(i, VOCAB)  # no two files alike
        (folder / f"{i:06d}.npq").write_bytes(npq1_head(frames) + codes.tobytes())


def npq1_head(frames: int) -> bytes:
    """What stands before the codes of an NPQ1 file."""
    head = struct.pack("<4sHHffI", b"NPQ1", 1, CODEBOOKS, RATE, 320.0, frames)
    return head + struct.pack(f"<{CODEBOOKS}IB", *[VOCAB] * CODEBOOKS, 1)


def resident_mb() -> float:
    """Resident memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# --- readers -------------------------------------------------------------------------------------


def in_batches(batch: Callable[[np.ndarray], object]) -> Read:
    """Reads window numbers by calls with BATCH of them."""

    def read(numbers: np.ndarray) -> None:
        for first in range(0, len(numbers), BATCH):
            batch(numbers[first : first + BATCH])

    return read


def by_peer_loader(dataset: Dataset[torch.Tensor], workers: int) -> Read:
    """Reads through a DataLoader that collates, whose processes live on from call to call."""
    order: list[int] = []
    loader = DataLoader(
        dataset,
        batch_size=BATCH,
        sampler=order,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=6 if workers else None,
    )

    def read(numbers: np.ndarray) -> None:
        order[:] = numbers.tolist()
        for _ in loader:
            pass

    return read


def by_loader(windows: WindowDataset, threads: int) -> Read:
    """Reads through the loader of a run."""
    order: list[np.ndarray] = []
    loader = Loader(windows, order, threads=threads, ahead=6)

    def read(numbers: np.ndarray) -> None:
        order[:] = np.split(numbers, len(numbers) // BATCH)
        for _ in loader:
            pass

    return read


class WholeFiles(Dataset[torch.Tensor]):
    """The ordinary way: a table of all windows, and for each its file read to the end."""

    def __init__(self, windows: WindowDataset) -> None:
        files, starts = windows.locate(np.arange(len(windows)))
        of, columns = windows.tables[0]
        offsets = columns["offset"][files].tolist()
        paths = [of[file] for file in files.tolist()]
        self.table = list(zip(paths, offsets, starts.tolist(), strict=True))

    def __getitem__(self, number: int) -> torch.Tensor:
        path, offset, start = self.table[number]
        codes = np.fromfile(path, "<i2", offset=offset).reshape(-1, CODEBOOKS)
        return torch.from_numpy(codes[start : start + CTX])

    def __len__(self) -> int:
        return len(self.table)


def by_maps(windows: WindowDataset) -> Read:
    """Slices of memory maps into a batch; MOST_MAPS of them stay."""
    headers = [read_header(path) for path in windows.tables[0].paths]
    maps: OrderedDict[int, np.ndarray] = OrderedDict()

    def batch(numbers: np.ndarray) -> torch.Tensor:
        out = np.empty((len(numbers), CTX, CODEBOOKS), windows.dtype)
        files, starts = windows.locate(numbers)
        for row, file, start in zip(out, files.tolist(), starts.tolist(), strict=True):
            if file not in maps:
                maps[file] = map_codes(headers[file])
                if len(maps) > MOST_MAPS:
                    maps.popitem(last=False)
            row[:] = maps[file][start : start + CTX]
        return torch.from_numpy(out)

    return in_batches(batch)


def limit_of_system_calls(windows: WindowDataset) -> Read:
    """Open, look at size and time, read into the batch, close: no index, no checks."""

    def batch(numbers: np.ndarray) -> None:
        out = np.empty((len(numbers), CTX, CODEBOOKS), windows.dtype)
        for row, number in zip(out, numbers.tolist(), strict=True):
            descriptor = os.open(paths[number], os.O_RDONLY)
            os.fstat(descriptor)
            os.preadv(descriptor, [row.data], positions[number])
            os.close(descriptor)

    files, starts = windows.locate(np.arange(len(windows)))
    of, columns = windows.tables[0]
    paths = [of[file] for file in files.tolist()]
    positions = (columns["offset"][files] + starts * 2 * CODEBOOKS).tolist()
    return in_batches(batch)


def limit_of_slices(windows: WindowDataset) -> Read:
    """A slice of a memory map a window, of MOST_MAPS made before: nothing read or copied."""
    files, starts = (column.tolist() for column in windows.locate(np.arange(len(windows))))
    maps = [map_codes(read_header(path)) for path in windows.tables[0].paths[:MOST_MAPS]]

    def batch(numbers: np.ndarray) -> None:
        for number in numbers.tolist():
            start = starts[number]
            maps[files[number] % len(maps)][start : start + CTX]

    return in_batches(batch)


def limit_of_memory(windows: WindowDataset) -> Read:
    """The same bytes copied into batches from an array in memory."""
    pool = np.ones((min(len(windows), 10_000), CTX, CODEBOOKS), windows.dtype)

    def batch(numbers: np.ndarray) -> None:
        out = np.empty((len(numbers), CTX, CODEBOOKS), windows.dtype)
        np.take(pool, numbers, axis=0, out=out, mode="wrap")

    return in_batches(batch)


def readers_of(windows: WindowDataset, jittered: WindowDataset) -> dict[str, tuple[Read, int]]:
    """Each with the factor by which it gets fewer windows."""
    files = WholeFiles(windows)
    return {
        "this project, one process": (in_batches(windows.__getitem__), 1),
        "the same with jitter": (in_batches(jittered.__getitem__), 1),
        "through the loader, nothing read ahead": (by_loader(jittered, 0), 1),
        "through the loader, 2 threads": (by_loader(jittered, 2), 1),
        "peer: whole files, DataLoader, 0 workers": (by_peer_loader(files, 0), SLOW),
        "peer: whole files, DataLoader, 2 workers": (by_peer_loader(files, 2), SLOW),
        f"memory maps, {MOST_MAPS} kept": (by_maps(windows), 1),
        "limit: open, fstat, preadv, close": (limit_of_system_calls(windows), 1),
        "limit: bare slices of kept maps": (limit_of_slices(windows), 1),
        "limit: memcpy of the same bytes": (limit_of_memory(windows), 1),
    }


# --- measuring -----------------------------------------------------------------------------------


def check_equal(windows: WindowDataset) -> None:
    """What the peer reads is what the project reads."""
    some = np.unique(np.linspace(0, len(windows) - 1, 50).astype(np.int64))
    files = WholeFiles(windows)
    assert torch.equal(windows[some], torch.stack([files[number] for number in some.tolist()]))


def compare_readers(windows: WindowDataset, jittered: WindowDataset, turns: int, n: int) -> None:
    """A table of windows per second, every reader once a round, each round begun by another."""
    readers = readers_of(windows, jittered)
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for read, _ in readers.values():
        read(np.arange(BATCH) % len(windows))  # starts its processes
    for turn in range(turns):
        order = np.random.default_rng(turn).permutation(len(windows))
        order = np.resize(order, n)
        names = itertools.islice(itertools.cycle(readers), turn, turn + len(readers))
        for name in names:
            read, slower = readers[name]
            some = order[: n // slower // BATCH * BATCH]
            started = time.perf_counter()
            read(some)
            rates[name].append(len(some) / (time.perf_counter() - started))
    ours = next(iter(rates.values()))
    print(f"| n = {turns} rounds of {n:,} windows | windows/s | range | ratio |")
    print("|---|---:|---:|---:|")
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, ours, strict=True))
        spread = f"{min(found):,.0f} to {max(found):,.0f}"
        print(f"| {name} | {statistics.median(found):,.0f} | {spread} | {ratio:.2f} |")


def report(title: str, paths: list[str], turns: int, n: int, store: Path) -> None:
    """Scan, index, the readers' table and the memory of an epoch for one set of files."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        corpus = scan_corpus(paths, ctx=CTX, skip_bad=True, checked_file=store)
        seconds.append(time.perf_counter() - started)
    train, _ = split_corpus(corpus, ctx=CTX, val_split=0.0)
    windows = WindowDataset(corpus, train, ctx=CTX, stride=CTX)
    jittered = WindowDataset(corpus, train, ctx=CTX, stride=CTX, jitter_seed=0)
    if (corpus.files["dtype_code"] != 1).any() or (corpus.files["codebooks"] != CODEBOOKS).any():
        raise SystemExit(f"the peer reads files of {CODEBOOKS} codebooks in 16 bits only")
    check_equal(windows)
    before, descriptors = resident_mb(), len(os.listdir("/proc/self/fd"))
    in_batches(jittered.__getitem__)(np.random.default_rng(0).permutation(len(windows)))
    after, opened = resident_mb(), len(os.listdir("/proc/self/fd")) - descriptors
    print(f"\n{title}: {len(paths):,} files, {len(windows):,} windows of {CTX} frames")
    print(f"scan, every code checked: {seconds[0]:.2f} s, remembered {seconds[1]:.2f} s")
    print(f"resident {before:,.0f} MB before an epoch, {after:,.0f} after; {opened} files open\n")
    compare_readers(windows, jittered, turns, n)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=20_000, help="short files to make")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each reader")
    parser.add_argument("--windows", type=int, default=10_000, help="windows in a turn")
    parser.add_argument("--data", nargs="+", help="use these .npq files or folders instead")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    n = max(SLOW * BATCH, args.windows // BATCH * BATCH)
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
            report(title, paths, args.rounds, n, folder / f"checked{number}.json")


if __name__ == "__main__":
    main()
