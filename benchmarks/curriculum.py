"""Most of the time at half the window, against the whole window all along.

    python benchmarks/curriculum.py --seconds 600 --seeds 2           # ctx 512 then 1024, or 1024
    python benchmarks/curriculum.py --from curriculum_runs/curriculum.json

`512-then-1024` trains with windows of 512 frames for `--first` of the seconds, then `--init-from`
its EMA weights with windows of 1024 for the rest: a new schedule, a new optimizer. `scratch` has
1024 all along. A step has as many frames everywhere, and all reported validations are over the
same windows of 1024 frames: those of the first part, over 512, are printed but do not count.
`learning.py` makes, keeps and reports the runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

from learning import (
    Job,
    Setup,
    add_setup_flags,
    measure,
    report,
    run_lines,
    setup_of,
    train,
)

SIDES = {"base": "scratch", "yardstick": "scratch"}


def train_in_two_parts(
    share: float, setup: Setup, flags: str, seed: int, folder: Path
) -> dict[str, Any]:
    """Half the window, then the whole; rows of the second part, in seconds of both.

    The first part does not lower its learning rate: the second begins at the peak again.
    """
    half = dataclasses.replace(
        setup, ctx=setup.ctx // 2, batch=2 * setup.batch, seconds=share * setup.seconds,
        evals=max(1, setup.evals // 2),
    )  # fmt: skip
    first = train(half, f"{flags} --schedule wsd --cooldown 0.01", seed, folder / "first")
    print("\n".join(run_lines({"variant": f"ctx {half.ctx}", "seed": seed, **first})), flush=True)
    (weights,) = (folder / "first").glob("*_latest.pt")
    rest = (1 - share) * setup.seconds
    whole = dataclasses.replace(half, ctx=setup.ctx, batch=setup.batch, seconds=rest)
    second = train(whole, f"{flags} --init-from '{weights}'", seed, folder / "second")
    spent, steps = first["rows"][-1]["seconds"], first["steps"]
    rows = [
        {**row, "seconds": round(row["seconds"] + spent, 3), "step": row["step"] + steps}
        for row in second["rows"]
    ]
    return {
        **second,
        "steps": steps + second["steps"],
        "frames_per_s": round((first["frames_per_s"] + second["frames_per_s"]) / 2),
        "refused": first["refused"] + second["refused"],
        "rows": rows,
        "first_rows": first["rows"],
    }


def main() -> int:
    """Run, print, draw; 1 where a run failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_setup_flags(parser, ctx=1024, batch=2)
    parser.add_argument("--first", type=float, default=0.7, help="share of the first part")
    parser.add_argument("--flags", default="", help="the trainer's, for all runs: '--lr 1e-3'")
    parser.add_argument("--out", type=Path, default=Path("curriculum_runs"))
    flags = parser.parse_args()
    if flags.file:
        report(flags.file, **SIDES)
        return 0
    setup, file = setup_of(flags), flags.out / "curriculum.json"
    ways = {"scratch": train}
    ways[f"{setup.ctx // 2}-then-{setup.ctx}"] = functools.partial(train_in_two_parts, flags.first)
    jobs = [
        Job(name, seed, flags.flags, functools.partial(way, setup, flags.flags, seed))
        for seed in range(flags.seeds)
        for name, way in ways.items()
    ]
    failed = measure(file, setup, jobs)
    if file.exists():
        report(file, **SIDES)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
