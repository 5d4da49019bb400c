"""What the doctor takes for large checkpoints: seconds, beside a plain load and a plain read.

    python benchmarks/doctor_speed.py [--files 3] [--shape 768/16/12]

Writes checkpoints of that shape (random weights, EMA, Adam's moments; about 2 GB each) into a
temporary folder, then runs, in turn: the doctor (a process of its own, report included), torch.load
of every file, which checks nothing, and a read of all their bytes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measuring
import torch
from measuring import in_turn, print_table, ratios, seconds_of, spread

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import CodesTransformer, ModelConfig  # noqa: E402
from run_folder.checkpoint import save_checkpoint  # noqa: E402


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, default=3)
    parser.add_argument("--shape", default="768/16/12", help="d_model/layers/heads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the files; without it a temporary one")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        shape = tuple(map(int, flags.shape.split("/")))
        # In a process of its own: a child counts its parent's memory as its own until it starts.
        writer = multiprocessing.Process(target=write_run, args=(Path(folder), flags.files, shape))
        writer.start()
        writer.join()
        paths = sorted(Path(folder).glob("*.pt"))
        size = sum(p.stat().st_size for p in paths)
        peaks: list[float] = []
        ways = {
            "the doctor": lambda: seconds_of_doctor(folder, peaks),
            "torch.load of every file": lambda: seconds_of(lambda: load_all(paths)),
            "limit: the bytes read": lambda: seconds_to_read(paths),
        }
        times = in_turn(ways, flags.rounds, warm_up=0)
    limit, rows = times["limit: the bytes read"], []
    print(f"{flags.files} files of {flags.shape}, {size / 1e9:.2f} GB, n = {flags.rounds} rounds")
    print(measuring.machine())
    for name, taken in times.items():
        per_gb = spread([t / size * 1e9 for t in taken], ".2f")
        rows.append([name, spread(taken, ".1f"), per_gb, spread(ratios(taken, limit), ".1f")])
    print_table(["", "s", "s/GB", "times the limit"], rows)
    print(f"largest process of the doctor {max(peaks):.2f} GB")


def write_run(folder: Path, files: int, shape: tuple[int, ...]) -> None:
    """Checkpoints whose weights, EMA and moments are random, but fit together."""
    torch.manual_seed(0)
    config = ModelConfig((1024,) * 9, *shape)
    weights = {n: p.detach().clone() for n, p in CodesTransformer(config).state_dict().items()}
    names = list(weights)
    for epoch in range(1, files + 1):
        step = 1000 * epoch
        for weight in weights.values():
            weight += 1e-3 * torch.randn_like(weight)
        states = {
            i: {"step": torch.tensor(float(step)), "exp_avg": 1e-5 * torch.randn_like(w),
                "exp_avg_sq": torch.full_like(w, 1e-8)}
            for i, w in enumerate(weights.values())
        }  # fmt: skip
        group = {
            "lr": 2e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.02,
            "params": list(range(len(names))), "param_names": names,
        }  # fmt: skip
        checkpoint = {
            "model": weights, "ema": {n: w + 1e-3 for n, w in weights.items()},
            "optimizer": {"state": states, "param_groups": [group]}, "scaler": {}, "guard": {},
            "progress": {"step": step, "epoch": epoch, "best_val": 4.5}, "rng": {},
            "architecture": config.to_dict(), "flags": {"ema": 0.999}, "data": {}, "history": [],
            "libraries": {},
        }  # fmt: skip
        name = f"rvq_9cb_epoch_e{epoch:04d}__20250101-{epoch:06d}.pt"
        save_checkpoint(checkpoint, folder / name)


def seconds_to_read(paths: list[Path]) -> float:
    """To read every byte once."""
    started = time.perf_counter()
    for path in paths:
        with open(path, "rb") as file:
            while file.read(1 << 22):
                pass
    return time.perf_counter() - started


def load_all(paths: list[Path]) -> None:
    """As torch does, one after the other."""
    for path in paths:
        torch.load(path, weights_only=True)


def seconds_of_doctor(folder: str, peaks: list[float]) -> float:
    """Of a whole process, start and report included; GB of its largest process go to `peaks`."""
    script = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
        "assert 'VERDICT' in done.stdout, done.stderr\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    started = time.perf_counter()
    command = [sys.executable, "-c", script, sys.executable, str(ROOT / "ckpt_doctor.py"), folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks.append(float(done.stdout) / 1e6)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
