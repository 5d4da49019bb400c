"""GB/s of saving and loading a checkpoint, against torch.save, torch.load and the disk.

    python benchmarks/checkpoint_speed.py --megabytes 600 --folder /a/disk     # a minute

Every save ends with the bytes on the disk (fsync); ours also hashes every tensor, reads nothing
back, and keeps the file before it. Loads are from the page cache; ours checks every byte. All in
turn.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measuring
import torch
from measuring import in_turn, print_table, ratios, seconds_of, spread

from run_folder.checkpoint import REQUIRED_KEYS, BackgroundSaver, load_checkpoint, size_of
from run_folder.files import RunFiles

SAVES = ("save, in the background", "save, in its way", "torch.save and fsync")
WRITTEN, READ = "limit: the bytes written and synced", "limit: the bytes read"


def state_of(megabytes: int, device: str) -> dict:
    """Weights, EMA and two moments of a model that takes so much on disk, 4 MB a tensor."""
    parts = ("model", "ema", "first", "second")
    count = max(1, megabytes // 4 // len(parts))
    tensors = {
        part: {f"{part}.{i}": torch.randn(1000, 1000, device=device) for i in range(count)}
        for part in parts
    }
    return {**{key: {} for key in REQUIRED_KEYS}, **tensors, "progress": {"step": 0}}


def synced(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file and wait for the disk."""
    write(path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def make_ways(
    folder: Path, state: dict, waits: dict[str, list[float]]
) -> dict[str, Callable[[], float]]:
    """Seconds of each; how long the caller waits goes to `waits`."""
    files, saver, plain = RunFiles(folder / "run", "rvq_9cb"), BackgroundSaver(), folder / "plain"
    (folder / "run").mkdir()
    zeros = bytes(1 << 22)
    size = size_of(state)

    def in_the_background() -> float:
        started = time.perf_counter()
        future = saver.start(state, files.save)
        waits[SAVES[0]].append(time.perf_counter() - started)
        future.result()
        return time.perf_counter() - started

    def waited(name: str, work: Callable[[], object]) -> Callable[[], float]:
        def way() -> float:
            waits[name].append(seconds_of(work))
            return waits[name][-1]

        return way

    def write_bytes(path: Path) -> None:
        with open(path, "wb", buffering=0) as file:
            for _ in range(-(-size // len(zeros))):
                file.write(zeros)

    def read_bytes() -> None:
        with open(plain, "rb", buffering=0) as file:
            while file.read(1 << 22):
                pass

    return {
        SAVES[0]: in_the_background,
        SAVES[1]: waited(SAVES[1], lambda: files.save(state)),
        SAVES[2]: waited(SAVES[2], lambda: synced(plain, lambda p: torch.save(state, p))),
        WRITTEN: waited(WRITTEN, lambda: synced(folder / "bytes", write_bytes)),
        "load, checked": lambda: seconds_of(lambda: load_checkpoint(files.latest)),
        "torch.load": lambda: seconds_of(lambda: torch.load(plain, weights_only=True)),
        READ: lambda: seconds_of(read_bytes),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--megabytes", type=int, default=600, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write; without it the temporary folder")
    parser.add_argument("--json", help="file for all times")
    flags = parser.parse_args()
    state = state_of(flags.megabytes, "cpu")
    size = size_of(state)
    print(f"{size / 1e6:.0f} MB of float32, n = {flags.rounds} rounds in turn, seconds")
    print(measuring.machine())
    waits: dict[str, list[float]] = {name: [] for name in (*SAVES, WRITTEN)}
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        times = in_turn(make_ways(Path(folder), state, waits), flags.rounds)
    rows = []
    for name, taken in times.items():
        is_load = list(times).index(name) > list(times).index(WRITTEN)
        peer, limit = ("torch.load", READ) if is_load else (SAVES[2], WRITTEN)
        waiting = spread([1e3 * w for w in waits[name][1:]]) if name in waits else "-"
        over = [spread(ratios(taken, times[other]), ".2f") for other in (peer, limit)]
        rows.append([name, spread([size / t / 1e9 for t in taken], ".2f"),
                     spread(taken, ".2f"), waiting, *over])  # fmt: skip
    print_table(["", "GB/s", "s", "training waits, ms", "times torch's", "times the limit"], rows)
    measuring.write_json(flags.json, flags=vars(flags), seconds=times, waits=waits)
    return 0


if __name__ == "__main__":
    sys.exit(main())
