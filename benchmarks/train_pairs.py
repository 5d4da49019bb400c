"""Frames per second as users get them: the trainer and a plain GPT, each in a process of its own.

    python benchmarks/train_pairs.py --data "npq_out/*.npq" --val one.npq --pairs 3

`train_speed.py` runs all ways in one process, where the plain GPT gains from what the trainer sets
for it (`tune_for`). Here both start as commands, in turn, and train for some seconds;
their own clocks count training steps alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import measuring

from npq_dataset import find_npq_files

ROOT = Path(__file__).resolve().parent.parent
SHAPE = ["--layers", "8", "--heads", "8", "--ctx", "512", "--batch", "4"]
WAYS = {
    "parallel, AdamW, accum 1": ["--pattern", "parallel", "--optim", "adamw", "--lr", "5e-4"],
    "default recipe, accum 1": [],
    "default recipe, accum 6": ["--accum", "6"],
}


def plain_rate(files: list[str], val: str, seconds: float) -> float:
    """Of plain_gpt.py."""
    script = [sys.executable, str(ROOT / "benchmarks" / "plain_gpt.py"), "--train", *files]
    rest = ["--val", val, "--d", "512", *SHAPE, "--seconds", str(seconds), "--evals", "1"]
    done = subprocess.run([*script, *rest], stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["frames_per_s"])


def our_rate(way: list[str], files: list[str], seconds: float) -> float:
    """Of train_rvq.py."""
    with tempfile.TemporaryDirectory() as folder:
        script = [sys.executable, str(ROOT / "train_rvq.py"), "--data", *files, "--accum", "1"]
        run = ["--d_model", "512", *SHAPE, "--max-seconds", str(seconds), "--save_dir", folder]
        quiet = ["--device", "cpu", "--quiet", "--eval-audio-every", "0", "--num_workers", "0"]
        subprocess.run([*script, *run, *quiet, *way], stdout=subprocess.DEVNULL, check=True)
        (metrics,) = Path(folder).glob("*_metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return float(next(row["frames_per_s"] for row in rows if row["event"] == "epoch"))


def main() -> int:
    """Print a table of medians and ratios, pair by pair."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--data", nargs="+", required=True, help=".npq files to train on")
    parser.add_argument("--val", required=True, help="one file; the plain GPT wants it")
    parser.add_argument("--seconds", type=float, default=20, help="of training, each time")
    parser.add_argument("--pairs", type=int, default=3)
    flags = parser.parse_args()
    files = [str(path) for path in find_npq_files(flags.data)]
    rates: measuring.Rates = {"plain GPT": [], **{name: [] for name in WAYS}}
    for _ in range(flags.pairs):
        rates["plain GPT"].append(plain_rate(files, flags.val, flags.seconds))
        for name, way in WAYS.items():
            rates[name].append(our_rate(way, files, flags.seconds))
    print(measuring.machine())
    rows = [
        [
            name,
            measuring.spread(own),
            measuring.spread(measuring.ratios(own, rates["plain GPT"]), ".2f"),
        ]
        for name, own in rates.items()
    ]
    measuring.print_table([f"n = {flags.pairs}", "frames/s", "over plain"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
