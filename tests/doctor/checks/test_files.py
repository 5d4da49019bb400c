"""What is wrong with a file by itself, and can be told of one that says little."""

from __future__ import annotations

import pytest
import torch
from kit.checkpoints import content_of

from doctor.checks.files import check_keys, check_steps
from doctor.examined_run import ExaminedRun
from doctor.reading.reader import summarize
from run_folder.metrics import RunMetrics


@pytest.mark.parametrize("step", [None, "x", 10**30, -5])
def test_a_file_that_tells_no_step_is_told_and_counted_against_nothing(step, good):
    content = content_of(good)
    content["progress"]["step"] = step
    torch.save(content, good)
    run = ExaminedRun("rvq_4cb", [summarize(good)], RunMetrics([]))
    assert "contains no step" in "".join(f.text for f in check_keys(run))
    assert list(check_steps(run)) == []
