"""The doctor's scoreboard in small: real runs and files, faults, the doctor as a process."""

from __future__ import annotations

import os
import sys

import pytest
from kit import processes, single_files
from kit.trainer import ROOT

import train_rvq

pytestmark = pytest.mark.timeout(1200)  # minutes on a busy machine


def scoreboard(*flags):
    script = ROOT / "benchmarks" / "doctor_scoreboard.py"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *flags]
    done = processes.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# One fault of each kind: in training, in the optimizer, in the averages. What is left of the quick
# set is damage to files (tests/doctor/reading/test_container.py) and NaN (test_ckpt_doctor.py).
FEW = ("--only", "head drift", "lr x 10", "scale collapse", "wrong Adam", "swapped EMA")


@pytest.mark.parametrize(
    "kind",
    [FEW, ("--single",), pytest.param((), marks=pytest.mark.slow)],
    ids=["runs", "single files", "more runs"],
)
def test_planted_faults_are_found_and_nothing_healthy_is_accused(kind):
    scoreboard("--quick", *kind)


def test_what_a_check_alone_decides_is_counted():
    table = scoreboard("--single", "--ablate", "--only", "adamw", "embeddings x 30")
    rows = {words[0]: words[1:] for words in map(str.split, table.splitlines()) if words}
    speaks, _, verdict, *_ = rows["A4"]
    assert (speaks, verdict) == ("1", "1")
    assert rows["F1"] == ["0"] * 6


def test_the_trainer_has_the_flags_of_every_training():
    """The quick sets above train a few: a flag that has gone shows here."""
    trainings = {**single_files.HEALTHY, **single_files.BLOWN}
    for run in trainings.values():
        if isinstance(run, single_files.Own):
            words = f"--data x {single_files.COMMON} {run.flags}".split()
            train_rvq.build_parser().parse_args(words)
