"""The benchmark of learning: times, tables, picture, and runs that are kept."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from kit.trainer import ROOT
from learning import (
    Job,
    RunFailed,
    Setup,
    by_variant,
    jobs_of,
    measure,
    report,
    table,
    time_to_reach,
)

SETUP = Setup(("a",), ("b",), 100, 2, 64, 2, 2, 32, 4)


def rows_of(*vals: float | None) -> list[dict]:
    """Validations at 10, 20, ... seconds; two codebooks."""
    return [
        {"seconds": 10.0 * i, "step": i, "val": val, "ce": [val, val]}
        for i, val in enumerate(vals, 1)
    ]


def run_of(variant: str, seed: int, *vals: float) -> dict:
    figures = {"flags": "", "params_m": 1.5, "steps": len(vals), "frames_per_s": 1000}
    kept = {"refused": 0, "wall_s": 1, "load": 0.5, "commit": "abc"}
    return {"variant": variant, "seed": seed, **figures, **kept, "rows": rows_of(*vals)}


@pytest.mark.parametrize(
    ("vals", "target", "seconds"),
    [
        ((6.0, 5.0, 4.0), 4.5, 25.0),
        ((6.0, 5.0, 4.0), 5.0, 20.0),
        ((6.0, 5.0, 4.0), 6.5, 10.0),  # there at the first validation: at most so long
        ((6.0, 5.0, 4.0), 3.9, None),
        ((6.0, 4.0, 6.0, 4.0), 5.0, 15.0),  # the first time counts
        ((6.0, None, 4.0), 5.0, 20.0),  # a validation that was not finite
    ],
)
def test_time_to_reach(vals, target, seconds):
    assert time_to_reach(rows_of(*vals), target) == seconds


RUNS = [
    run_of("default", 0, 6.0, 4.0), run_of("default", 1, 6.0, 4.2),
    run_of("worse", 0, 6.0, 5.5), run_of("worse", 1, 6.0, 5.0),
    run_of("plain-1e-3", 0, 6.5, 5.1), run_of("plain-1e-3", 1, 6.5, 5.3),
    run_of("plain-3e-4", 0, 6.5, 6.0),
]  # fmt: skip


def test_the_table_compares_seed_by_seed_with_the_default_and_with_the_best_plain():
    head, _, *body = table(RUNS, 100, base="default", yardstick="plain")
    cells = {line.split("|")[1].strip(" *"): line for line in body}
    assert "plain-1e-3's end (5.200)" in head
    assert list(cells) == ["default", "plain-1e-3", "worse", "plain-3e-4"], "best first"
    assert "4.100 (4.000 to 4.200)" in cells["default"]
    assert "| 14 (14 to 14) % |" in cells["default"]
    assert "+1.150 (+0.800 to +1.500)" in cells["worse"]
    assert "1 of 2 never" in cells["worse"]
    assert "| 1 of 1 never |" in cells["plain-3e-4"]


def test_a_run_that_ended_in_nan_is_last():
    assert list(by_variant([*RUNS, run_of("nan", 0, 3.0, None)]))[-1] == "nan"


def test_runs_are_made_in_turn_kept_and_not_repeated(tmp_path, capsys):
    made = []

    def job(variant: str, seed: int, flags: str = "") -> Job:
        def make(_):
            made.append((variant, seed))
            if variant == "bad":
                raise RunFailed("no such flag")
            return {k: v for k, v in run_of(variant, seed, 6.0, 5.0).items() if k != "flags"}

        return Job(variant, seed, flags, make)

    file = tmp_path / "out" / "learning.json"
    failed = measure(file, SETUP, [job("default", 0), job("bad", 0)])
    assert failed == ["bad, seed 0: no such flag"]
    assert measure(file, SETUP, [job("default", 0), job("default", 1)]) == []
    assert made == [("default", 0), ("bad", 0), ("default", 1)]
    assert [r["seed"] for r in json.loads(file.read_text())["runs"]] == [0, 1]
    with pytest.raises(SystemExit, match="another name"):
        measure(file, SETUP, [job("default", 0, "--lr 1")])
    with pytest.raises(SystemExit, match="seconds 100 and not 5"):
        measure(file, dataclasses.replace(SETUP, seconds=5), [])
    report(file, base="default", yardstick="plain")
    assert "| **default** |" in capsys.readouterr().out
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_jobs_go_seed_by_seed():
    jobs = jobs_of(SETUP, {"default": "", "plain": "", "x": "--lr 1"}, ["1e-3", "2e-3"], range(2))
    names = ["default", "plain-1e-3", "plain-2e-3", "x"]
    assert [(j.variant, j.seed) for j in jobs] == [(n, s) for s in (0, 1) for n in names]


@pytest.mark.slow
def test_real_runs(tunes, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "learning.py"), "--out", str(tmp_path)]
    command += ["--data", *(str(tunes / f"{i}.npq") for i in range(3)), "--val"]
    command += [str(tunes / "3.npq"), "--d_model", "32", "--layers", "1", "--heads", "2", "--ctx"]
    command += ["32", "--batch", "4", "--seconds", "1", "--evals", "2", "--seeds", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads((tmp_path / "learning.json").read_text())["runs"]
    assert len(kept) == 4
    assert all(run["rows"][-1]["seconds"] >= 1 for run in kept)
    assert (tmp_path / "learning.png").exists()
