"""Moments that no gradients can make, whatever the other param_groups hold."""

from __future__ import annotations

import torch
from kit.checkpoints import content_of

from doctor.checks.optimizer import check_moments
from doctor.examined_run import ExaminedRun
from doctor.reading.optimizer_state import moment_bound
from doctor.reading.reader import summarize
from run_folder.metrics import RunMetrics


def test_the_bound_is_that_of_the_tensors_own_group(good):
    content = content_of(good)
    first, later, *_ = content["optimizer"]["param_groups"]
    del first["betas"]
    later["betas"] = (0.9, 0.999)
    content["optimizer"]["state"][later["params"][0]]["exp_avg"] += 1e4
    torch.save(content, good)
    (finding,) = check_moments(ExaminedRun("rvq_4cb", [summarize(good)], RunMetrics([])))
    assert (finding.check, finding.where) == ("F3", later["param_names"][0])
    assert f"{moment_bound(0.9, 0.999):.3g} sqrt(v)" in finding.text
