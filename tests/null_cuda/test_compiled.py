"""torch.compile and its CUDA graphs: no error, no recompilation, gradients that stay in place."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._inductor.config
from kit.trainer import make_run
from null_cuda.launches import counted

import train_rvq
from training.compiling import GRAPH_MODES

pytestmark = pytest.mark.timeout(3600)  # the first time compiles for minutes, later ones load

TRIALS = [(mode, accum) for mode in ("default", *GRAPH_MODES) for accum in (1, 2, 6)]


@pytest.mark.parametrize(("mode", "accum"), TRIALS)
def test_steps_are_compiled_once_and_wait_once(mode, accum, tunes, tmp_path):
    shape = ["--d_model", "64", "--layers", "1", "--heads", "2", "--ctx", "64", "--batch", "4"]
    where = ["--data", tunes, "--save_dir", tmp_path, "--device", "cuda"]
    run = make_run(*shape, *where, "--compile", "--compile-mode", mode, "--accum", str(accum))
    # Times mean nothing here: products are not searched among Triton's.
    with torch._inductor.config.patch(max_autotune_gemm_backends="ATEN"):
        train_rvq.prepare_losses(run)
    assert run.compiled, "it fell back"
    assert run.has_graphs == (mode in GRAPH_MODES)
    places: set[tuple[int, ...]] = set()

    def note(*_: object) -> None:
        places.add(tuple(p.grad.data_ptr() for p in run.state.model.parameters()))

    run.state.optimizer.register_step_pre_hook(note)
    batches = itertools.cycle(list(run.loader))
    with torch.compiler.set_stance("fail_on_recompile"):
        counts = [counted(lambda: train_rvq.train_step(run, batches)) for _ in range(5)]
        train_rvq.evaluate(run)
        counts += [counted(lambda: train_rvq.train_step(run, batches)) for _ in range(2)]
    assert [c.syncs for c in counts] == [1] * 7
    if run.has_graphs:
        assert len(places) == 1
        assert all(c.graphs == 2 * accum for c in counts), "forward and backward of each"
