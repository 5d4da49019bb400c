r"""Predicts what a run will need: memory by part, hours of training, disk for checkpoints.

    plan = Plan(flags, config, torch.device("cuda"), torch.bfloat16, build)
    print(plan.predict().parts, plan.predict(batch=2).total / GIB)
    print(*plan.memory_lines(), sep="\n")

A plan is built from a run's own flags, and memory_prediction.py predicts the memory. `--plan`
prints the results of the methods named `..._lines`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cli.command_line import UsageError
from cli.disk import free_space
from model import CodesTransformer, ModelConfig
from run_folder.files import RING_SIZE, megabytes
from run_folder.flags import command_words
from training import compiling
from training.memory_prediction import (
    CONTEXT,
    GIB,
    MARGIN,
    Memory,
    Step,
    Trained,
    gib,
    libraries,
    predict_memory,
)
from training.optimizer import muon_flops
from training.parallel import World

DEFAULT_EFFECTIVE_BATCH = 36  # windows in a step under --batch auto; default --batch x --accum


class PlanError(UsageError):
    """No micro-batch fits into memory, or --effective-batch is not --batch x a whole --accum."""


@dataclass
class Plan:
    """Predicts memory, time and disk of a run from its flags; its device may be absent.

    `build` makes model, EMA and optimizer from flags and architecture on torch's default device.
    """

    flags: argparse.Namespace
    config: ModelConfig
    device: torch.device
    amp_dtype: torch.dtype | None
    build: Callable[[argparse.Namespace, ModelConfig], Trained]
    predicted: dict[Any, Memory] = dataclasses.field(default_factory=dict)  # cache of `predict`

    def __post_init__(self) -> None:
        if self.device.type == "cpu":
            libraries()  # a run's first plan comes before its tensors

    # --- memory ----------------------------------------------------------------------------------

    def predict(self, **changes: Any) -> Memory:
        """Predict the memory of a step with the plan's flags, of which `changes` replace some."""
        changes = {"batch": self.flags.batch, "accum": self.flags.accum, **changes}
        key = tuple(sorted(changes.items()))
        if key not in self.predicted:
            flags = argparse.Namespace(**{**vars(self.flags), **changes})
            layers = changes.get("layers", self.config.layers)
            step = self._step(flags, dataclasses.replace(self.config, layers=layers))
            self.predicted[key] = predict_memory(step, self.device.type)
        return self.predicted[key]

    def _step(self, flags: argparse.Namespace, config: ModelConfig) -> Step:
        return Step(
            build=functools.partial(self.build, flags, config),
            shape=(flags.batch, flags.ctx, config.num_codebooks),
            label_smoothing=flags.label_smoothing,
            accum=flags.accum,
            amp_dtype=self.amp_dtype,
        )

    def room(self) -> float | None:
        """Return the bytes the process may use: --memory-gb, or what is free; None if unknown."""
        if self.flags.memory_gb:
            return float(self.flags.memory_gb * GIB)
        return free_memory(self.device)

    def settle_batch(self, explicit: dict[str, Any], world: World) -> list[str]:
        """Set --batch and --accum from --batch auto and --effective-batch; return lines to print.

        Raises:
            PlanError: nothing fits, or --effective-batch does not divide.
        """
        flags, lines = self.flags, []
        effective = flags.effective_batch
        if flags.batch == "auto":
            effective = effective or DEFAULT_EFFECTIVE_BATCH
            flags.batch, line = self._most_that_fit(effective, world)
            lines.append(line)
        elif effective and "accum" in explicit and "batch" not in explicit:
            flags.batch = max(1, effective // flags.accum)
        if effective:
            if "accum" not in explicit:
                flags.accum = max(1, effective // flags.batch)
            if flags.batch * flags.accum != effective:
                raise PlanError(
                    f"--effective-batch {effective}: expected a multiple of --batch, found --batch "
                    f"{flags.batch} x --accum {flags.accum}; --batch can be one of "
                    f"{divisors(effective)}"
                )
        return lines

    def _most_that_fit(self, effective: int, world: World) -> tuple[int, str]:
        room = self.room()
        if room is None:
            raise PlanError(
                f"--batch auto: this machine has no {self.device}; give its memory by --memory-gb"
            )
        batches = [b for b in divisors(effective) if effective // b % world.size == 0]
        found = world.from_first(largest_batch(batches, effective, self.predict, room))
        if found is None:
            least = self.predict(batch=1, accum=effective).total
            raise PlanError(
                f"--batch auto: one window takes {gib(least)}, but {gib(room)} less {MARGIN:.0%} "
                "are available; --plan --batch 1 prints what to change"
            )
        batch, memory = found
        return batch, (
            f"batch    {batch} x accum {effective // batch} are the most that fit: "
            f"{gib(memory.total)} of {gib(room)}, {MARGIN:.0%} left free"
        )

    def advice(self, layers: int | None = None) -> list[str]:
        """Return flags that take less memory, a line each with the memory they take.

        With `layers`, the layers of the model, a smaller model may be among them. Never raises: it
        is called while another error is handled.
        """
        flags = self.flags
        try:
            return what_to_change(
                self.predict,
                batch=flags.batch,
                accum=flags.accum,
                grad_checkpoint=flags.grad_checkpoint,
                layers=layers,
                room=self.room() or math.inf,
            )
        except Exception:  # for example, no memory is left for the prediction either
            return ["half of --batch with twice --accum, or --grad-checkpoint"]

    # --- time ------------------------------------------------------------------------------------

    @functools.cached_property
    def model(self) -> CodesTransformer:
        """The run's model on the meta device, without weights."""
        with torch.device("meta"):
            return self.build(self.flags, self.config).model

    @property
    def windows_per_step(self) -> int:
        """Windows in an optimizer step."""
        return int(self.flags.batch * self.flags.accum)

    @property
    def flops(self) -> float:
        """Floating-point operations of an optimizer step, over all processes.

        They are matrix products and attention, forward and backward, and Muon's products.
        """
        ctx = self.flags.ctx
        batches = float(self.model.flops_per_frame(ctx) * self.windows_per_step * ctx)
        return batches + (muon_flops(self.model) if self.flags.optim == "muon" else 0.0)

    @functools.cached_property
    def step_seconds(self) -> tuple[float, str]:
        """Seconds of an optimizer step and how they were found; 0 and the reason if unknown."""
        flags, device = self.flags, self.device
        if rate := flags.device_tflops:
            at = f"at {rate:g} TFLOP/s x {flags.mfu:g} MFU (--device-tflops, --mfu)"
            return self.flops / (rate * flags.mfu * 1e12), at
        free = free_memory(device)
        if free is None:
            return 0.0, f"this machine has no {device}; give --device-tflops"
        if self.predict().total > free:
            return 0.0, f"a step does not fit into the {gib(free)} that are free"
        wanted = flags.compile or (flags.compile is None and device.type == "cuda")
        how = f"measured on {device} with random codes"
        step = self._step(flags, self.config)
        for mode, instead in compiling.attempts(flags.compile_mode) if wanted else ():
            try:
                return time_step(step, device, compile_mode=mode), how
            except Exception as error:  # the compiler can fail in any way
                failure = compiling.first_words(error)
            compiling.give_back()
            how += f"; torch.compile failed in mode {mode}, so {instead} ({failure})"
        return time_step(step, device, compile_mode=None), how

    def steps(self, windows: int) -> tuple[int, float]:
        """Return the optimizer steps of an epoch of `windows` training windows, and of the run."""
        flags = self.flags
        per_epoch = windows // self.windows_per_step
        total = min(flags.epochs * per_epoch, flags.max_steps or math.inf)
        seconds, _ = self.step_seconds
        if flags.max_seconds and seconds:
            total = min(total, flags.max_seconds / seconds)
        return per_epoch, total

    # --- lines to print --------------------------------------------------------------------------

    def step_lines(self) -> list[str]:
        """Return lines on the model's parameters and the step's FLOPs."""
        config, flags = self.config, self.flags
        return [
            f"model    {config.d_model} wide, {config.layers} layers, {config.heads} heads, "
            f"{config.pattern}: {self.model.num_parameters() / 1e6:.2f} M parameters",
            f"step     {self.windows_per_step} windows of {flags.ctx} frames (batch {flags.batch} "
            f"x accum {flags.accum}), {self.flops / 1e12:.3g} TFLOP: products and attention, "
            f"forward and backward{', and Muon' if flags.optim == 'muon' else ''}",
        ]

    def memory_lines(self, *, is_new: bool = True) -> list[str]:
        """Return lines on memory by part and, if it does not fit, on flags that take less.

        For a new run (`is_new`) these may include a smaller model.
        """
        memory, room = self.predict(), self.room()
        where = f"memory   at a step's peak on {self.device.type}, predicted, without --compile:"
        lines = memory.lines()
        left = f"{MARGIN:.0%} of it left free"
        if room is None:
            lines.append(f"this machine has no {self.device}: give its memory by --memory-gb")
        elif memory.fits(room):
            lines.append(f"fits into {gib(room)} with {left}")
        else:
            lines.append(f"too much for {gib(room)} with {left}; instead:")
            lines += self.advice(layers=self.config.layers if is_new else None)
        return [where, *(f"         {line}" for line in lines)]

    def time_lines(self) -> list[str]:
        """Return a line on the seconds of a step."""
        seconds, how = self.step_seconds
        return [
            f"time     {seconds:.3g} s a step, {how}" if seconds else f"time     unknown: {how}"
        ]

    def run_lines(self, windows: int, frames: int) -> list[str]:
        """Return lines on steps, passes and hours of an epoch and of the run.

        An epoch has `windows` windows; the music to train on has `frames` frames.
        """
        (seconds, _), (per_epoch, total) = self.step_seconds, self.steps(windows)
        hours = f", {per_epoch * seconds / 3600:.3g} hours" if seconds else ""
        passes = total * self.windows_per_step * self.flags.ctx / frames
        codes = frames * self.config.num_codebooks
        in_all = f", {total * seconds / 3600:.3g} hours of training steps" if seconds else ""
        return [
            f"epoch    {windows} windows, {per_epoch} steps{hours}",
            f"run      {total:.0f} steps, {passes:.3g} passes over the music{in_all}; "
            f"{codes / self.model.num_parameters():.2g} codes a parameter",
        ]

    def disk_lines(self, windows: int) -> tuple[list[str], str | None]:
        """Return lines on the disk space of checkpoints, and a warning if too little is free."""
        flags, size = self.flags, self.predict().checkpoint
        epochs = int(flags.epochs)
        if windows:
            per_epoch, total = self.steps(windows)
            epochs = math.ceil(total / per_epoch)
        least, most = checkpoints_kept(
            epochs,
            archive_every=flags.archive_every,
            keep_archived=flags.keep_archived,
            validations=math.inf if flags.val_every_seconds else -(-epochs // flags.val_every),
        )
        folder = Path(flags.save_dir).absolute()
        while not folder.exists():
            folder = folder.parent
        free = free_space(folder)
        room = "an unknown space" if free is None else megabytes(free)
        lines = [
            f"disk     {megabytes(size)} a checkpoint: {megabytes(least * size)} without archives "
            f"({least} files of different content), {megabytes(most * size)} at most ({most}); "
            f"{room} free in {folder}"
        ]
        if free is None:
            return lines, None
        if free < least * size:
            return lines, (
                "too little disk space: saves will fail; free some, or give another --save_dir"
            )
        if free < most * size:
            fits = (free // size - least) // 2
            lines.append(
                "         old archives will be removed when the disk is full; --keep-archived "
                f"{fits} fits"
            )
        return lines, None


# --- what fits, and what to change ---------------------------------------------------------------

Predict = Callable[..., Memory]  # `Plan.predict`


def divisors(n: int) -> list[int]:
    """Return the divisors of n in rising order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def largest_batch(
    batches: Sequence[int], effective: int, predict: Predict, room: float, **changes: Any
) -> tuple[int, Memory] | None:
    """Find the largest of some micro-batches, in rising order, that fits into `room` bytes.

    A step has `effective` windows; `changes` are other flags to predict with. Returns the
    micro-batch and its prediction, or None. Memory rises with the micro-batch, so bisection works.
    """
    low, high, found = 0, len(batches), None
    while low < high:
        middle = (low + high) // 2
        batch = batches[middle]
        memory = predict(batch=batch, accum=effective // batch, **changes)
        if memory.fits(room):
            low, found = middle + 1, (batch, memory)
        else:
            high = middle
    return found


def what_to_change(
    predict: Predict,
    *,
    batch: int,
    accum: int,
    grad_checkpoint: bool,
    layers: int | None,
    room: float,
) -> list[str]:
    """Return flags that make the step fit into `room` bytes, a line each with the memory they take.

    First come flags that change only the speed. A model of half of `layers` or fewer comes only if
    those are not enough, and never if `layers` is None.
    """
    effective = batch * accum
    batches = [b for b in divisors(effective) if b < batch]
    lines: list[str] = []
    ways: list[tuple[dict[str, Any], list[int]]] = [({}, batches)]
    if not grad_checkpoint:
        ways.append(({"grad_checkpoint": True}, [*batches, batch]))
    for changes, candidates in ways:
        if found := largest_batch(candidates, effective, predict, room, **changes):
            lines.append(_option(found[1], batch=found[0], accum=effective // found[0], **changes))
    least = {"batch": 1, "accum": effective, "grad_checkpoint": True}
    if not lines:
        lines.append(_option(predict(**least), **least) + ", the least for this model")
        while layers := (layers or 0) // 2:
            smaller = predict(**least, layers=layers)
            if smaller.fits(room):
                lines.append(_option(smaller, **least, layers=layers) + ", another model")
                break
    return lines


def _option(memory: Memory, **flags: Any) -> str:
    words = itertools.chain(*command_words(flags))
    return f"{' '.join(words)}: {gib(memory.total)}"


# --- time, disk, and what a device has -----------------------------------------------------------


def time_step(
    step: Step, device: torch.device, *, compile_mode: str | None, seconds: float = 20.0
) -> float:
    """Measure the seconds of an optimizer step on random codes, from a few micro-batches.

    One micro-batch and update warm up, with CUDA graphs as many micro-batches as it takes to replay
    one; then three, or as many as `seconds` allow, at least one, are timed. `compile_mode` None
    means without torch.compile.
    """
    with device:
        trained, codes = step.build(), torch.randint(2, step.shape)
        forward: Any = step.objective(trained.model)
    dtype = step.amp_dtype
    mixed = torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
    if compile_mode is not None:
        forward = compiling.compiled(forward, compile_mode)
    has_graphs = compile_mode in compiling.GRAPH_MODES
    if has_graphs:
        compiling.own_gradients(trained.model.parameters())

    def micro_batch() -> None:
        if has_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with mixed:
            objective = forward(codes).objective
        objective.backward()
        objective.item()  # waits for the device

    def update() -> None:
        trained.optimizer.step()
        trained.ema.update(1)
        next(trained.model.parameters()).sum().item()

    for _ in range(compiling.MICRO_BATCHES_TO_TRUST if has_graphs else 1):
        micro_batch()
    update()
    micro = _mean_seconds(micro_batch, 3, seconds)
    return step.accum * micro + _mean_seconds(update, 1, seconds)


def _mean_seconds(work: Callable[[], None], times: int, limit: float) -> float:
    started, done = time.perf_counter(), 0
    while done < times and (not done or time.perf_counter() - started < limit):
        work()
        done += 1
    return (time.perf_counter() - started) / done


def checkpoints_kept(
    epochs: int, *, validations: float, archive_every: int, keep_archived: int
) -> tuple[int, int]:
    """Return how many files of different content a run keeps: without archives, and at most.

    `latest`, `previous`, `best`, the ring and the file being written always stay. Each archive may
    be of another step; `best` and its newest archive are one file. On a file system without hard
    links there are more files.
    """
    without = 4 + RING_SIZE
    epoch_archives = epochs // archive_every if archive_every else 0
    best_archives = int(min(keep_archived, validations))
    archives = min(keep_archived, epoch_archives) + best_archives - 1
    return without, without + max(0, archives)


def free_memory(device: torch.device) -> float | None:
    """Return the bytes this process may use on a device, including those it uses already.

    Returns None if this machine has no such device, or for a device other than CUDA and CPU.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        own = torch.cuda.memory_reserved(device) + CONTEXT
        return float(torch.cuda.mem_get_info(device)[0] + own)
    if device.type == "cpu":
        lines = Path("/proc/meminfo").read_text() + Path("/proc/self/status").read_text()
        sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", lines, re.M))
        return 1024.0 * (int(sizes["MemAvailable"]) + int(sizes["VmRSS"]))
    return None
