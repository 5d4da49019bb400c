"""The doctor's scoreboard in small: real runs and files, faults, the doctor as a process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from kit.trainer import ROOT


@pytest.mark.parametrize("kind", [(), ("--single",)], ids=["runs", "single files"])
def test_planted_faults_are_found_and_nothing_healthy_is_accused(kind):
    script = ROOT / "benchmarks" / "doctor_scoreboard.py"
    command = [sys.executable, str(script), "--quick", *kind]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
