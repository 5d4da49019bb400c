"""The doctor's scoreboard in small: real runs, planted faults, the doctor as a process."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import ROOT


def test_planted_faults_are_found_and_no_healthy_run_accused():
    command = [sys.executable, str(ROOT / "benchmarks" / "doctor_scoreboard.py"), "--quick"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
