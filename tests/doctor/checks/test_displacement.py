"""How far weights went: what cannot be measured, moves that nothing allows, foreign momentum."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kit.checkpoints import content_of

from doctor.checks.displacement import check_average, check_displacement
from doctor.examined_run import ExaminedRun
from doctor.reading.reader import summarize
from run_folder.metrics import RunMetrics


def two_files(
    good: Path, change: Callable[[dict[str, Any], int], Any], lr: float | None = None
) -> ExaminedRun:
    """A run of a file and one of ten steps later, `change`d knowing which; a row of `lr` a step."""
    summaries, step = [], content_of(good)["progress"]["step"]
    for number in (0, 1):
        content = content_of(good)
        content["progress"]["step"] = step + 10 * number
        change(content["model"], number)
        path = good.with_name(f"rvq_4cb_ring_s{number:08}.pt")
        torch.save(content, path)
        summaries.append(summarize(path))
    rows = [] if lr is None else [{"event": "step", "step": step + i, "lr": lr} for i in range(11)]
    return ExaminedRun("rvq_4cb", summaries, RunMetrics(rows))


def test_a_tensor_without_elements_is_passed_over(good):
    run = two_files(good, lambda model, _: model.update(empty=torch.empty(0, 32)))
    assert all(f.where != "empty" for f in check_displacement(run))


def test_weights_that_moved_without_a_learning_rate(good):
    run = two_files(good, lambda model, number: model["head.weight"].add_(0.01 * number), lr=0.0)
    (finding,) = check_displacement(run)
    assert (finding.check, finding.where) == ("G2", "head.weight")
    assert "without a learning rate" in finding.text


def test_weights_at_the_end_of_what_float64_holds(good):
    def change(model: dict[str, Any], number: int) -> None:
        model["head.weight"] = model["head.weight"].double() * 1e200 * (1 + number)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (finding,) = check_displacement(two_files(good, change))
    assert (finding.check, finding.where) == ("G2", "head.weight")


def test_another_groups_decay_moves_no_weight(good):
    """A group that decays by 20 makes room for its own tensors alone."""

    def change(model: dict[str, Any], number: int) -> None:
        model["blocks.0.mlp.up.weight"].add_(0.1 * number)

    content = content_of(good)
    *_, rest = content["optimizer"]["param_groups"]
    assert "blocks.0.mlp.up.weight" not in rest["param_names"]
    rest["weight_decay"] = 20.0
    torch.save(content, good)
    (finding,) = check_displacement(two_files(good, change, lr=1e-3))
    assert (finding.check, finding.where) == ("G2", "blocks.0.mlp.up.weight")


def test_random_momentum_of_a_small_matrix_is_found_however_it_falls(muon):
    """Of 1,024 elements, whose cosine with anything is 0 +- 0.03."""
    name, content = "blocks.0.attn.out.weight", content_of(muon)
    group = next(g for g in content["optimizer"]["param_groups"] if name in g["param_names"])
    number = group["params"][group["param_names"].index(name)]
    state = content["optimizer"]["state"][number]
    assert not list(check_average(ExaminedRun("rvq_4cb", [summarize(muon)], RunMetrics([]))))
    size, generator = state["momentum_buffer"].std(), torch.Generator().manual_seed(0)
    for _ in range(12):
        drawn = torch.randn(state["momentum_buffer"].shape, generator=generator)
        state["momentum_buffer"] = size * drawn
        torch.save(content, muon)
        (finding,) = check_average(ExaminedRun("rvq_4cb", [summarize(muon)], RunMetrics([])))
        assert (finding.check, finding.where) == ("G3", name)
