"""torch.compile: what is tried where it fails, and gradients that a CUDA graph cannot overwrite.

CUDA graphs themselves need a device: tests/test_train_rvq.py has them replayed.
"""

from __future__ import annotations

import os
from pathlib import Path

from kit.checkpoints import assert_same_tensors
from kit.trainer import TINY, make_run, run_trainer

import train_rvq
from training.compiling import GRAPH_MODES, attempts


def test_a_failing_graph_mode_is_followed_by_the_default_and_that_by_none():
    assert attempts("default") == [("default", "without it")]
    for mode in GRAPH_MODES:
        assert attempts(mode) == [(mode, "in mode default"), ("default", "without it")]


def broken(folder: Path) -> dict[str, str]:
    """An environment in which nothing can be compiled."""
    env = {**os.environ, "CXX": "/bin/false", "OMP_NUM_THREADS": "1"}
    return {**env, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}


def test_a_plan_times_what_the_run_would_fall_back_to(tunes, tmp_path):
    flags = [*TINY, "--data", tunes, "--save_dir", tmp_path, "--plan", "--compile"]
    flags += ["--layers", "1", "--pattern", "parallel"]
    code, output = run_trainer(*flags, env=broken(tmp_path), timeout=200)
    assert code == 0, output
    assert "torch.compile failed in mode default, so without it (" in output
    (time,) = (line for line in output.splitlines() if line.startswith("time "))
    assert " s a step, measured on cpu" in time


def test_gradients_beside_graphs_keep_their_places_and_their_sums(tunes, tmp_path):
    """Without a graph the same steps come out, bit for bit."""
    states, places = [], set()
    for has_graphs in (False, True):
        flags = ("--data", tunes, "--accum", "2", "--save_dir", tmp_path / str(has_graphs))
        run = make_run(*flags)
        run.has_graphs = has_graphs
        batches = iter(run.loader)
        for _ in range(3):
            train_rvq.train_step(run, batches)
            if has_graphs:
                gradients = [p.grad for p in run.state.model.parameters()]
                places.add(tuple(g.data_ptr() for g in gradients if g is not None))
                assert not any(g.any() for g in gradients if g is not None)
        states.append(dict(run.state.model.state_dict()))
    assert_same_tensors(*states)
    assert len(places) == 1
    assert len(next(iter(places))) == len(list(run.state.model.parameters()))
