"""`--plan`'s memory against what real runs take on this CPU: RSS of child processes.

    python benchmarks/plan_accuracy.py
    python benchmarks/plan_accuracy.py --allocated --only bf16,adamw

Each row trains in a process of its own: three optimizer steps with a save after the first, by the
trainer's own functions. Measured is the most resident memory that the process ever has (VmHWM),
as users run it. With `--allocated` glibc is told to give large blocks back at once, so that
resident is what is allocated; measured is the rise above what the process has after such a run of
a tiny model, which loads all libraries, and predicted leaves out Python and what glibc keeps.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
import train_rvq
from run_folder import lock
from run_folder.metrics import Console
from sound.npq_format import write_npq
from training import building
from training import saving as run_saving
from training import setup as run_setup
from training.memory_prediction import KEPT, LIBRARIES

SMALL = "--d_model 256 --layers 6 --heads 4 --ctx 256"
WIDE = "--d_model 512 --layers 8 --heads 8 --ctx 512"
CASES = [
    f"{SMALL} --batch 8 --pattern parallel",
    f"{SMALL} --batch 8 --pattern delay",
    f"{SMALL} --batch 8 --pattern depth",
    f"{SMALL} --batch 24 --pattern depth --accum 1",
    f"{SMALL} --batch 8 --pattern parallel --no-amp",
    f"{SMALL} --batch 8 --pattern delay --no-amp",
    f"{SMALL} --batch 8 --pattern depth --no-amp",
    f"{SMALL} --batch 8 --pattern depth --optim adamw",
    f"{SMALL} --batch 8 --pattern parallel --optim adamw --no-amp --no-fused-optim",
    f"{SMALL} --batch 16 --pattern parallel --grad-checkpoint",
    f"{SMALL} --batch 24 --pattern depth --grad-checkpoint",
    f"{SMALL} --batch 24 --pattern delay --grad-checkpoint --no-amp",
    f"{WIDE} --batch 2 --pattern depth",
    f"{WIDE} --batch 2 --pattern parallel --optim adamw --no-amp",
    f"{WIDE} --batch 4 --pattern delay --dropout 0",
]
TINY = "--d_model 32 --layers 1 --heads 1 --ctx 32 --batch 2"
COMMON = "--device cpu --num_workers 0 --accum 2 --eval-audio-every 0"
RETURN = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def memory_of_this_process(field: str) -> int:
    """Bytes; VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def take_steps(words: list[str]) -> None:
    """Three optimizer steps, and a save after the first."""
    flags, explicit = train_rvq.parse_flags(words)
    with lock.FolderLock(flags.save_dir):
        run = run_setup.set_up(flags, explicit, Console(quiet=True))
        batches, _ = train_rvq.start_epoch_batches(run)
        train_rvq.train_step(run, batches)
        run_saving.save(run)
        run_saving.check_save(run, wait=True)
        for _ in range(2):
            train_rvq.train_step(run, batches)


def child(words: list[str], folder: str, *, allocated: bool) -> None:
    """Print the most memory that training takes; `allocated`: how far it rises over the steps."""
    before = 0
    if allocated:
        take_steps([*words, *TINY.split(), "--save_dir", folder + "/tiny"])
        gc.collect()
        before = memory_of_this_process("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    take_steps([*words, "--save_dir", folder + "/run"])
    print(memory_of_this_process("VmHWM") - before)


def in_a_child(mode: str, words: list[str], *, allocated: bool) -> int:
    """What a process of its own prints last: as a user's run it has nothing but its libraries."""
    mode += "-allocated" if allocated else ""
    with tempfile.TemporaryDirectory() as folder:
        codes = np.random.default_rng(0).integers(1024, size=(60_000, 9))
        write_npq(Path(folder) / "a.npq", codes, vocab_sizes=[1024] * 9, frame_rate=86.13)
        env = {name: v for name, v in os.environ.items() if not name.startswith("MALLOC_")}
        env |= {"OMP_NUM_THREADS": "1", **(RETURN if allocated else {})}
        command = [sys.executable, __file__, mode, folder, *words, "--data", folder]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def measured(words: list[str], *, allocated: bool = False) -> int:
    """Peak bytes of a process that trains with these flags."""
    return in_a_child("--child-trains", words, allocated=allocated)


def predicted(words: list[str], *, allocated: bool = False) -> int:
    """The same by prediction."""
    return in_a_child("--child-predicts", words, allocated=allocated)


def predict(words: list[str], *, allocated: bool) -> None:
    """Print the prediction."""
    flags, _ = train_rvq.parse_flags(words)
    names = ("d_model", "layers", "heads", "dropout", "pattern")
    config = model.ModelConfig((1024,) * 9, **{name: getattr(flags, name) for name in names})
    memory = building.plan_of(flags, config, torch.device("cpu")).predict()
    print(memory.total - (memory.parts[LIBRARIES] + memory.parts[KEPT] if allocated else 0))


def main() -> None:
    if sys.argv[1:2] and sys.argv[1].startswith("--child"):
        allocated = sys.argv[1].endswith("-allocated")
        if sys.argv[1].startswith("--child-predicts"):
            predict(sys.argv[3:], allocated=allocated)
        else:
            child(sys.argv[3:], sys.argv[2], allocated=allocated)
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--only", default="", help="rows whose flags have one of these words")
    parser.add_argument("--allocated", action="store_true", help="what tensors take, no more")
    args = parser.parse_args()
    print("| flags | predicted MiB | measured MiB | ratio |\n|---|---:|---:|---:|", flush=True)
    for case in CASES:
        if not any(word in case for word in args.only.split(",")):
            continue
        words = [*COMMON.split(), *case.split()]
        guess = predicted(words, allocated=args.allocated)
        real = measured(words, allocated=args.allocated)
        cells = [guess / 2**20, real / 2**20, guess / real]
        print("| {} | {:.0f} | {:.0f} | {:.3f} |".format(f"`{case}`", *cells), flush=True)


if __name__ == "__main__":
    main()
