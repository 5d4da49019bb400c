"""What a save costs training: in its way, and in the background; size, duration, stall.

    python benchmarks/save_stall.py --megabytes 600 --rounds 5 --folder /a/disk

A step of fixed work runs over and over; its median without a save is what a step should take. The
stall of a save is the time that its start took plus what the steps beside it took longer than that.
Where all processor cores are busy it holds the processor time of the writing, too; a forked
process that writes the same shows how much: it shares processors and disk, but no interpreter lock.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from run_folder import checkpoint as checkpointing
from run_folder.checkpoint import REQUIRED_KEYS, BackgroundSaver, load_checkpoint, size_of
from run_folder.files import RunFiles


class Cost(NamedTuple):
    """Of one save, in seconds."""

    duration: float
    start: float
    stall: float
    slowest: float  # step beside it


def state_of(megabytes: int, device: str) -> dict:
    """Weights, EMA and two moments of a model that takes so much on disk, 4 MB a tensor."""
    parts = ("model", "ema", "first", "second")
    count = max(1, megabytes // 4 // len(parts))
    tensors = {
        part: {f"{part}.{i}": torch.randn(1000, 1000, device=device) for i in range(count)}
        for part in parts
    }
    state: dict = {**{key: {} for key in REQUIRED_KEYS}, **tensors, "progress": {"step": 0}}
    return state


class Step:
    """About 20 ms of matrix products on the device, and one host sync as a training step has."""

    def __init__(self, device: str) -> None:
        self.a, self.b = torch.randn(2, 256, 256, device=device).unbind()

    def __call__(self) -> float:
        started, x = time.perf_counter(), self.a
        for _ in range(40):
            x = torch.tanh(x @ self.b)
        x.sum().item()
        return time.perf_counter() - started


def beside(done: Callable[[], bool], step: Step, started: float, usual: float) -> Cost:
    """Of a save that has been started, by the steps until it is done."""
    start, steps = time.perf_counter() - started, []
    while not done():
        steps.append(step())
    duration = time.perf_counter() - started
    return Cost(duration, start, start + sum(s - usual for s in steps), max(steps, default=usual))


def save_once(kind: str, files: RunFiles, saver: BackgroundSaver, state: dict, step: Step) -> Cost:
    usual = statistics.median(step() for _ in range(50))
    state["progress"]["step"] += 1
    started = time.perf_counter()
    if kind == "in its way":
        files.save(state)
        duration = time.perf_counter() - started
        return Cost(duration, duration, duration, usual)
    if kind == "in the background":
        return beside(saver.start(state, files.save).done, step, started, usual)
    pid = os.fork()
    if pid == 0:
        checkpointing._yield_to_training()
        files.save(state)
        os._exit(0)
    return beside(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid, step, started, usual)


def spread(values: list[float], scale: float = 1.0, form: str = ".2f") -> str:
    """Median and range."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle * scale:{form}} ({low * scale:{form}} to {high * scale:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--megabytes", type=int, default=600, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind, in turn")
    parser.add_argument("--folder", help="where to write; without it the temporary folder")
    parser.add_argument("--device", default="cpu", help="of the state and of the steps")
    parser.add_argument("--niceness", type=int, help=f"without it {checkpointing.SAVING_NICENESS}")
    args = parser.parse_args()
    if args.niceness is not None:
        checkpointing.SAVING_NICENESS = args.niceness
    state, step = state_of(args.megabytes, args.device), Step(args.device)
    print(f"{size_of(state) / 1e6:.0f} MB on {args.device}, {torch.get_num_threads()} threads")
    kinds = ["in its way", "in the background"] + ["by a forked process"] * (args.device == "cpu")
    costs: dict[str, list[Cost]] = {kind: [] for kind in kinds}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        files, saver = RunFiles(folder, "rvq_9cb"), BackgroundSaver()
        for number in range(args.rounds + 1):
            for kind in kinds:
                cost = save_once(kind, files, saver, state, step)
                if number:  # the first is a trial: it pays for the pages of the copy
                    costs[kind].append(cost)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert load_checkpoint(files.latest)["progress"]["step"] == state["progress"]["step"]
    for kind, measured in costs.items():
        durations = [c.duration for c in measured]
        print(f"{kind}, n = {len(measured)}, median (range):")
        print(f"  duration {spread(durations)} s")
        print(f"  start    {spread([c.start for c in measured], 1e3, '.0f')} ms")
        print(f"  stall    {spread([c.stall for c in measured], 1e3, '.0f')} ms")
        print(f"  share    {spread([c.stall / c.duration for c in measured], 100, '.1f')} %")
        print(f"  slowest step {spread([c.slowest for c in measured], 1e3, '.0f')} ms")
    print(f"peak memory grew by {grown:.0f} MiB")


if __name__ == "__main__":
    main()
