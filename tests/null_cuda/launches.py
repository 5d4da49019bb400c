"""What a training step and a drawn frame ask of a GPU, counted on the null CUDA device.

    tests/null_cuda/on_device .null_cuda tests/null_cuda/launches.py            # all, minutes
    tests/null_cuda/on_device .null_cuda tests/null_cuda/launches.py eager frame

Run #3's model and flags: 768/16/12, ctx 512, six micro-batches of six windows. A replayed graph is
one launch; copies and fills count as launches too. Compiling 16 layers takes long, and all of them
are alike: what is compiled is counted with one and two layers and continued to 16. The update is
counted with all, as Muon's stacks do not grow layer by layer.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import train_rvq
from model import CodesTransformer, ModelConfig
from run_folder.metrics import Console
from sound import sampling
from sound.sampling import Draw, generate
from training import saving
from training.loader import Batch
from training.setup import set_up
from training.state import TrainingRun

ROOT = Path(__file__).resolve().parents[2]
DEVICE = ctypes.CDLL(None)  # runtime.cpp is preloaded
LAYERS = 16
MODES = {
    "eager": ["--no-compile"],
    "compiled": ["--compile"],
    "graphs": ["--compile", "--compile-mode", "reduce-overhead"],
}


class Counts(NamedTuple):
    """What was asked of the device."""

    launches: int  # kernels, products, copies and fills outside of graphs, and graphs
    graphs: int  # of these
    syncs: int  # the host waited for the device

    def plus(self, other: Counts, times: int = 1) -> Counts:
        """Add so many times the other."""
        return Counts(*(a + times * b for a, b in zip(self, other, strict=True)))


def counted(action: Callable[[], object]) -> Counts:
    """Do it and count."""
    DEVICE.null_cuda_reset()
    action()
    with tempfile.NamedTemporaryFile() as report:
        DEVICE.null_cuda_report(report.name.encode())
        lines = Path(report.name).read_text().splitlines()
    sums = dict.fromkeys(("LAUNCH", "COPY", "FILL", "GRAPH", "SYNC"), 0)
    for number, name in (line.split("\t", 1) for line in lines):
        if (kind := name.split(" ")[0]) in sums:
            sums[kind] += int(number)
    syncs = sums.pop("SYNC")
    return Counts(sum(sums.values()), sums["GRAPH"], syncs)


class Training:
    """A run with run #3's flags and others, after its first steps."""

    def __init__(self, *flags: str) -> None:
        self.run = run_of(*flags)
        assert self.run.compiled == ("--no-compile" not in flags), "it fell back"
        shape = (self.run.flags.batch, self.run.flags.ctx, 9)
        codes = torch.zeros(shape, dtype=torch.int16).pin_memory()
        self.batches = itertools.repeat(Batch(codes))
        for _ in range(3):  # state is made, graphs are recorded
            self.step()

    def step(self) -> None:
        """Take a step."""
        train_rvq.train_step(self.run, self.batches)

    def micro_batch(self) -> Counts:
        """Count the gradients of one more micro-batch of a step."""
        one, two = (counted(lambda n=n: self._accumulate(n)) for n in (1, 2))
        return two.plus(one, -1)

    def _accumulate(self, count: int) -> None:
        before, self.run.flags.accum = self.run.flags.accum, count
        train_rvq.accumulate(self.run, self.batches)
        self.run.flags.accum = before
        self.run.state.optimizer.zero_grad(set_to_none=not self.run.has_graphs)

    def update(self) -> Counts:
        """Count clipping, optimizer and EMA."""
        train_rvq.accumulate(self.run, self.batches)
        return counted(lambda: train_rvq.update(self.run, 1e-4, 2.0))


def run_of(*flags: str) -> TrainingRun:
    """Set up a run as the trainer does, with the codec's vectors, compiled if `flags` say so."""
    folder, tokens = Path(tempfile.mkdtemp()), ROOT / "examples" / "tokens" / "val"
    given = ["--data", str(tokens), "--save_dir", str(folder / "run"), "--device", "cuda"]
    parsed, explicit = train_rvq.parse_flags([*given, "--eval-audio-every", "0", *flags])
    Path(parsed.save_dir).mkdir()
    run = set_up(parsed, explicit, Console(quiet=True))
    assert run.state.model.config.code_features, "the codec was not found"
    train_rvq.prepare_losses(run)
    return run


def of_a_step(mode: str) -> dict[str, Counts]:
    """Count a micro-batch, the update of the weights, and a whole step with six and one."""
    eager = Training(*MODES["eager"])
    if mode == "eager":
        return {
            "micro-batch": eager.micro_batch(),
            "update": eager.update(),
            "step": counted(eager.step),
        }
    parts = []
    for layers in (1, 2):
        training = Training(*MODES[mode], "--layers", str(layers))
        update = training.update()
        parts.append((training.micro_batch(), counted(training.step).plus(update, -1)))
    micro_batch, rest = (
        one.plus(two.plus(one, -1), LAYERS - 1) for one, two in zip(*parts, strict=True)
    )
    update = eager.update()
    return {"micro-batch": micro_batch, "update": update, "step": rest.plus(update)}


def of_a_frame(*, compiled: bool, pattern: str = "depth") -> Counts:
    """Count what one more drawn frame takes, in bfloat16 with top-k and top-p."""
    config = ModelConfig((1024,) * 9, 768, LAYERS, 12, pattern=pattern)
    model, draw = CodesTransformer(config).cuda(), Draw.of(9, 0.9, 200, 0.95)

    def draw_frames(count: int) -> Counts:
        return counted(
            lambda: generate(
                model, count, ctx=512, draw=draw, dtype=torch.bfloat16, compiled=compiled
            )
        )

    few, many = draw_frames(8), draw_frames(18)
    return Counts(*(-(-n // 10) for n in many.plus(few, -1)))


def main(names: list[str]) -> None:
    """Print a row for each of the named ways."""
    saving.not_finite = lambda tensors: []  # nothing is computed on the device
    sampling.check_finite = lambda codes, first: None
    for name in names or [*MODES, "frame"]:
        if name == "frame":
            rows = {"eager": of_a_frame(compiled=False), "--compile": of_a_frame(compiled=True)}
        else:
            rows = of_a_step(name)
        for what, counts in rows.items():
            print(f"{name:<10}{what:<14}{counts}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # the device's libraries are not made to be unloaded
