"""A run's files beside its metrics."""

from __future__ import annotations

from doctor.examined_run import ExaminedRun
from doctor.reading.summary import Summary
from run_folder.metrics import RunMetrics


def test_files_of_steps_that_a_resume_took_back_do_not_count():
    told = [{"event": "start", "step": 0, "time": 1.0}, {"event": "step", "step": 50, "time": 2.0}]
    told += [{"event": "resume", "step": 20, "time": 9.0}, {"event": "step", "step": 40}]
    lost = Summary("a", "archive", None, step=50, modified=5.0)
    kept = Summary("b", "archive", None, step=40, modified=11.0)
    assert ExaminedRun("x", [lost, kept], RunMetrics(told)).readable == [kept]
