"""torch.compile for what training minimises, and what its CUDA graphs ask of the gradients.

    for mode, instead in attempts("reduce-overhead"):  # then "default"
        losses = compiled(objective, mode)
        try: ...                                       # MICRO_BATCHES_TO_TRUST of them
        except Exception: give_back()

A graph writes what it returns to the same place whenever it is replayed.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

GRAPH_MODES = ("reduce-overhead", "max-autotune")  # those of --compile-mode with CUDA graphs
MICRO_BATCHES_TO_TRUST = 3  # of a graph mode: it warms up, is recorded, and is replayed


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
