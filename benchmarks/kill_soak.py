"""SIGKILLs of real runs at random moments: is a saved step ever lost, is the end ever another?

    python benchmarks/kill_soak.py --runs 300                          # codes that it makes up
    python benchmarks/kill_soak.py --runs 300 --data "npq_out/*.npq" --flags "--ctx 64"

A run is started, killed, and started again with the same command, five
times or so, then left to end. A third of the kills falls into start-up, a third onto a save (as
soon as its temporary file is seen), a third anywhere. After each kill the newest step that a `save`
row reports must be loaded; in the end weights, moments, EMA, guard and random state must equal, bit
for bit, those of a run that nobody touched. `--fork` starts each trainer from a process that has
torch loaded already: the same program without seconds of importing, for many kills in little time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_rvq
from run_folder.checkpoint import CheckpointError, load_checkpoint
from run_folder.files import RunFiles

ROOT = Path(__file__).resolve().parents[1]
FLAGS = shlex.split(
    "--device cpu --d_model 32 --layers 2 --heads 2 --ctx 32 --batch 4 --accum 2 --lr 3e-4 "
    "--max-steps 150 --eval-audio-every 0 --log-lr-steps 5 --save-every-minutes 0.002 "
    "--archive-every 1"
)
CLOCKS = {"seconds", "elapsed", "epoch_seconds", "log_seconds", "validated_seconds"}
COMPARED = ("model", "ema", "optimizer", "scaler", "guard", "rng", "architecture", "data")
KILLS_A_RUN = 5
LONGEST = 600  # seconds that one start may take


@dataclass
class Tally:
    """What came of one run, or of all."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MOMENTS, 0))
    with_file: int = 0  # kills after which a half-written file was there
    lost: int = 0
    manual: int = 0  # starts that did not go on by themselves
    ends: int = 0
    unequal: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        for name, count in other.kills.items():
            self.kills[name] += count
        for name in ("with_file", "lost", "manual", "ends", "unequal"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.notes += other.notes


# --- the trainer as a process --------------------------------------------------------------------


class Trainer:
    """A trainer in a process group of its own; its words go to `log`."""

    def __init__(self, flags: list[str], folder: Path, *, fork: bool) -> None:
        self.folder, self.log = folder, folder / "log.txt"
        self.log.touch()
        argv = [*flags, "--save_dir", str(folder)]
        if fork:
            self.pid = os.fork()
            if self.pid == 0:
                run_here(argv, self.log)
        else:
            command = [sys.executable, str(ROOT / "train_rvq.py"), *argv]
            with open(self.log, "wb") as log:
                self.pid = subprocess.Popen(
                    command, stdout=log, stderr=log, start_new_session=True
                ).pid
        self.code: int | None = None

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def kill(self) -> None:
        """The trainer, without a warning."""
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.code = os.waitstatus_to_exitcode(status)


def run_here(argv: list[str], log: Path) -> None:
    """In a forked child: the program's own `main`, and out."""
    code = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = train_rvq.main(argv)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    finally:
        os._exit(code)


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.0005)
    return True


# --- what is on the disk -------------------------------------------------------------------------


def name_of(folder: Path) -> str:
    """`rvq_4cb` of the only run in a folder, or nothing."""
    found = [p.name.removesuffix("_metrics.jsonl") for p in folder.glob("*_metrics.jsonl")]
    return found[0] if found else ""


def reported(folder: Path) -> int:
    """The newest step that a whole `save` row reports; -1 without one."""
    newest = -1
    for path in folder.glob("*_metrics.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # half a row of a killed run
            newest = max(newest, row["step"]) if row["event"] == "save" else newest
    return newest


def loaded(folder: Path) -> dict[str, Any] | None:
    """What a start would go on from; changes nothing."""
    files = RunFiles(folder, name_of(folder))
    for path in (files.latest, files.previous):
        try:
            return load_checkpoint(path)
        except CheckpointError:
            continue
    return None


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def comparable(checkpoint: dict[str, Any]) -> dict[str, Any]:
    progress = {n: v for n, v in checkpoint["progress"].items() if n not in CLOCKS}
    return {**{name: checkpoint[name] for name in COMPARED}, "progress": progress}


# --- one run, killed again and again -------------------------------------------------------------


@dataclass
class Reference:
    """The run that nobody touched."""

    flags: list[str]
    fork: bool
    start_up: float  # seconds until its first save
    seconds: float
    end: dict[str, Any]


def reference_run(flags: list[str], fork: bool, folder: Path) -> Reference:
    started = time.monotonic()
    trainer = Trainer(flags, folder, fork=fork)
    wait(lambda: trainer.ended() or reported(folder) >= 0, LONGEST)
    start_up = time.monotonic() - started
    if not wait(trainer.ended, LONGEST) or trainer.code:
        raise SystemExit(f"the run fails without any kill:\n{trainer.log.read_text()}")
    found = loaded(folder)
    assert found is not None
    return Reference(flags, fork, start_up, time.monotonic() - started, comparable(found))


def wait_at_random(moment: str, trainer: Trainer, reference: Reference, rng: random.Random) -> None:
    """Sleep until the moment of the kill, or the end of the run."""
    if moment == "start-up":
        wait(trainer.ended, rng.uniform(0, reference.start_up))
    elif moment == "save":
        wait(lambda: trainer.ended() or reported_since(trainer), reference.start_up * 5)
        wait(trainer.ended, rng.uniform(0, 0.3))
        wait(lambda: trainer.ended() or has_half_written(trainer.folder), 5)
        wait(trainer.ended, rng.uniform(0, 0.005))
    else:
        wait(trainer.ended, rng.uniform(0, reference.seconds))


def reported_since(trainer: Trainer) -> bool:
    return b"windows  train=" in trainer.log.read_bytes()


def has_half_written(folder: Path) -> bool:
    return any(name.endswith(".saving") for name in os.listdir(folder))


MOMENTS = ("start-up", "save", "anywhere")


def killed_run(seed: int, folder: Path, reference: Reference) -> Tally:
    """Up to KILLS_A_RUN kills, then the end, and the comparison."""
    tally, rng = Tally(), random.Random(seed)
    folder.mkdir()
    for _ in range(KILLS_A_RUN):
        moment = rng.choice(MOMENTS)
        trainer = Trainer(reference.flags, folder, fork=reference.fork)
        wait_at_random(moment, trainer, reference, rng)
        if trainer.ended():
            break
        before = reported(folder)
        trainer.kill()
        tally.kills[moment] += 1
        tally.with_file += has_half_written(folder)
        found = loaded(folder)
        if before >= 0 and (found is None or found["progress"]["step"] < before):
            tally.lost += 1
            tally.notes.append(f"{folder}: step {before} was saved and is gone")
            return tally
    else:
        trainer = Trainer(reference.flags, folder, fork=reference.fork)
    if not wait(trainer.ended, LONGEST) or trainer.code:
        tally.manual += 1
        tally.notes.append(f"{folder}: code {trainer.code}\n{trainer.log.read_text()}")
        return tally
    tally.ends += 1
    found = loaded(folder)
    if found is None or not same(comparable(found), reference.end):
        tally.unequal += 1
        tally.notes.append(f"{folder}: the end is another")
    else:
        shutil.rmtree(folder)
    return tally


# --- all of them ---------------------------------------------------------------------------------


def soak(args: argparse.Namespace, flags: list[str], folder: Path) -> Tally:
    reference = reference_run(flags, args.fork, folder / "whole")
    steps = reference.end["progress"]["step"]
    print(
        f"untouched run: {steps} steps, first save after {reference.start_up:.1f} s, "
        f"end after {reference.seconds:.1f} s",
        flush=True,
    )
    total, number = Tally(), 0
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(args.parallel, mp_context=fork) as pool:
        while sum(total.kills.values()) < args.runs and not total.notes:
            seeds = range(number, number + 4 * args.parallel)
            number += len(seeds)
            folders = [folder / f"run{n}" for n in seeds]
            again = [reference] * len(seeds)
            for tally in pool.map(
                killed_run, [args.seed * 10**6 + n for n in seeds], folders, again
            ):
                total.add(tally)
            print(f"{sum(total.kills.values())} kills, {total.ends} ends", flush=True)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--runs", type=int, default=300, help="kills, at least")
    parser.add_argument("--data", nargs="+", help=".npq files; without it made-up codes")
    parser.add_argument("--flags", default="", help="for the trainer, over those of a tiny run")
    parser.add_argument("--workers", type=int, default=2, help="of each trainer; read ahead")
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", help="where runs live; those that failed are kept there")
    parser.add_argument(
        "--fork", action="store_true", help="start from a process with torch loaded"
    )
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    data = args.data
    if not data:
        make = [sys.executable, str(ROOT / "examples" / "make_codes.py"), str(folder / "codes")]
        make += ["--files", "4", "--frames", "1500"]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        data = [str(folder / "codes")]
    flags = [*FLAGS, "--num_workers", str(args.workers), *shlex.split(args.flags), "--data", *data]
    (folder / "whole").mkdir()
    started = time.monotonic()
    total = soak(args, flags, folder)
    kills, minutes = sum(total.kills.values()), (time.monotonic() - started) / 60
    moments = ", ".join(f"{count} {name}" for name, count in total.kills.items())
    print(
        f"{kills} kills in {minutes:.1f} min: {moments}; {total.with_file} left half-written files"
    )
    print(f"{total.ends} runs left to end: {total.unequal} of them not bit-equal")
    print(f"{total.manual} starts that needed a hand")
    for note in total.notes:
        print(note, file=sys.stderr)
    bound = f": below {3 / max(kills, 1):.2%} with 95 % confidence" if not total.lost else ""
    print(f"{total.lost} lost of {kills} kills{bound}")
    if total.notes:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
