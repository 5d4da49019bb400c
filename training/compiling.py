"""torch.compile for what training minimises, and what its CUDA graphs ask of the gradients.

    compile_losses(run, take_micro_batches)   # run.losses, run.compiled, run.has_graphs
    own_gradients(model.parameters())         # before the first micro-batch of each step

A graph writes what it returns to the same place whenever it is replayed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from run_folder.checkpoint import rng_kept
from training.state import TrainingRun

GRAPH_MODES = ("reduce-overhead", "max-autotune")  # those of --compile-mode with CUDA graphs
MICRO_BATCHES_TO_TRUST = 3  # of a graph mode: it warms up, is recorded, and is replayed


def compile_losses(run: TrainingRun, take_micro_batches: Callable[[int], None]) -> None:
    """Switch to compiled losses after a trial; report what fails, and stay eager if nothing works.

    A mode with CUDA graphs is tried for as many micro-batches as it takes to replay one, and the
    default mode after it; `take_micro_batches(n)` takes those of a step n times. What DDP finds
    inside the module before the first call is compiled in parts, a bucket of gradients each: those
    of one part are averaged while the next part's backward runs.
    """
    eager = run.losses
    torch._dynamo.config.optimize_ddp = not run.flags.grad_checkpoint  # torch 2.10 splits none such
    for mode, instead in attempts(run.flags.compile_mode):
        run.losses, run.compiled = run.world.averaging(compiled(eager, mode)), True
        run.has_graphs = mode in GRAPH_MODES and run.device.type == "cuda"
        if (failure := run.world.first(failure_of_trial(run, take_micro_batches))) is None:
            return
        run.losses, run.compiled, run.has_graphs = run.world.averaging(eager), False, False
        give_back()
        run.console.problem(f"torch.compile failed in mode {mode}, going on {instead} ({failure})")


def failure_of_trial(run: TrainingRun, take_micro_batches: Callable[[int], None]) -> str | None:
    """Return why micro-batches cannot be taken, or None; the trial leaves no trace."""
    state, scaler, started = run.state, run.state.scaler, time.perf_counter()
    state.scaler = torch.amp.GradScaler(run.device.type, enabled=False)
    mine = run.flags.accum // run.world.size
    try:
        # Without exchanges: the compiler may fail in one process alone.
        with rng_kept(), run.world.reducing(last=False):
            take_micro_batches(-(-MICRO_BATCHES_TO_TRUST // mine) if run.has_graphs else 1)
        run.console.detail(f"compiled in {time.perf_counter() - started:.0f} s")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler can fail in any way; training need not
        return first_words(error)
    finally:
        state.scaler = scaler
        state.optimizer.zero_grad(set_to_none=True)
    return None


def attempts(mode: str) -> list[tuple[str, str]]:
    """What to try for a --compile-mode, each with what comes after it where it fails."""
    plain = [("default", "without it")]
    return [(mode, "in mode default"), *plain] if mode in GRAPH_MODES else plain


def compiled(objective: nn.Module, mode: str) -> Any:
    """The module, compiled at its first call, which can fail in any way."""
    return torch.compile(objective, mode=mode, fullgraph=True)


def own_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give zeroed gradients to parameters that have none, before the first micro-batch of a step.

    Else autograd takes the first ones where a graph left them, and the next replay overwrites them.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)


def give_back() -> None:
    """After a failure: drop all that was compiled, and give the graphs' memory back to the device.

    Whatever holds tensors of a graph, such as an error's traceback, must be gone.
    """
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def first_words(error: BaseException) -> str:
    """An error of the compiler in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
