"""What a run will take, before it begins: memory by part, hours, checkpoints on the disk.

    plan = Plan(flags, config, torch.device("cuda"), torch.bfloat16, build)
    print(plan.predict().parts, plan.predict(batch=2).total / GIB)
    print(*plan.memory_lines(), sep="\n")

Memory is not reckoned by formulas: the run's own model, optimizer and EMA take a step on tensors
that have shapes and no bytes (FakeTensorMode), and what would be alive at each moment is added up
(MemTracker). No GPU is needed, a large model takes seconds, and what the code does is what counts.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.overrides import TorchFunctionMode

from checkpointing import RING_SIZE, megabytes, size_of
from losses import Losses
from model import CodesTransformer, ModelConfig
from parallel import World
from stability import Ema

GIB = 2**30
# Estimates: of a GPU's memory what driver and libraries take, of the host's Python with PyTorch.
FIXED = {"cuda": ("CUDA context (estimate)", GIB // 2), "cpu": ("Python (estimate)", GIB // 3)}
KEPT = "kept by glibc (estimate)"  # on a CPU, of freed blocks: a seventh of the tensors, or more
MARGIN = 0.1  # of the memory stays free: for what lies between tensors, and libraries' work space
LOSS = "logits and loss"
PARTS = {  # what MemTracker calls them
    _MemRefType.PARAM: "weights",
    _MemRefType.BUFFER: "weights",
    _MemRefType.GRAD: "gradients",
    _MemRefType.OPT: "optimizer",
    _MemRefType.OTH: "EMA",
    _MemRefType.ACT: "activations",
    LOSS: LOSS,
    _MemRefType.TEMP: "backward",
}


class PlanError(ValueError):
    """What is asked for fits into no memory, or divides into no whole step."""


class Trained(Protocol):
    """What a step works on."""

    model: CodesTransformer
    ema: Ema[CodesTransformer]
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at the moment of a step that takes most, by part."""

    parts: dict[str, int]
    checkpoint: int  # bytes of one on the disk, and of the copy in host memory that it is made from

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    def fits(self, room: float) -> bool:
        """Into `room` bytes, with MARGIN of them left."""
        return self.total <= (1 - MARGIN) * room

    def lines(self) -> list[str]:
        """A table."""
        rows = [(name, size) for name, size in self.parts.items() if size]
        return [f"{n:<26}{gib(size):>10}" for n, size in [*rows, ("total", self.total)]]


def gib(size: float) -> str:
    """`4.91 GiB`."""
    return f"{size / GIB:.2f} GiB"


def predict_memory(
    build: Callable[[], Trained],
    *,
    shape: tuple[int, int, int],
    losses: dict[str, Any],
    accum: int,
    device: str,
    amp_dtype: torch.dtype | None,
) -> Memory:
    """Peak memory of the optimizer steps of a run on a device that need not be here.

    `build` makes model, EMA and optimizer on the CPU; `shape` [B, T, K] is a micro-batch's;
    `losses` are keywords of `model.losses`; the kernels are those of the device type `device`.
    """
    tracker = _Tracker()
    with warnings.catch_warnings(), _FakeMode(), tracker:
        warnings.simplefilter("ignore")  # of torch, about copies of tensors without bytes
        trained = build()
        tracker.track_external(*trained.ema.averaged)
        losses = {**losses, "weights": torch.ones(shape[2])}
        module = _MicroBatch(trained.model, tracker, losses)
        if device != "cpu":
            _take_foreach(trained.optimizer)
            _recompute_elsewhere(trained.model, device)
        for p in trained.model.parameters():
            p.grad = torch.empty_like(p)
            tracker.mark(p.grad, _MemRefType.GRAD)
        trained.optimizer.step()  # makes its state, and takes what a step takes beside it
        trained.ema.update(1)
        if accum == 1:  # else gradients of earlier micro-batches lie there
            trained.optimizer.zero_grad(set_to_none=True)
        codes = torch.zeros(shape, dtype=torch.int64)
        with _kernels_of(device):
            with _autocast(device, amp_dtype):
                objective = module(codes).objective
            tracker.in_loss = False
            objective.backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
        kept = (trained.model.state_dict(), trained.ema.state_dict())
        checkpoint = size_of([*kept, trained.optimizer.state_dict()])
    parts = dict.fromkeys(PARTS.values(), 0)
    for kind, name in PARTS.items():
        parts[name] += peak[kind]
    if device == "cpu":
        parts["copy that is saved"] = checkpoint
        parts[KEPT] = sum(parts.values()) // 7
    name, size = FIXED.get(device, ("", 0))
    return Memory({**parts, name: size}, checkpoint)


def _take_foreach(optimizer: torch.optim.Optimizer) -> None:
    """AdamW's choice on a GPU where it is not fused; on a CPU it takes one tensor at a time."""
    for group in optimizer.param_groups:
        if "foreach" in group and not group["fused"]:
            group["foreach"] = True


class _FakeMode(FakeTensorMode):
    def __deepcopy__(self, _: Any) -> _FakeMode:
        return self  # the EMA is a deep copy of the model; its tensors belong to this mode too


class _Tracker(MemTracker):
    """MemTracker that keeps apart what is made between the last block and backward."""

    def __init__(self) -> None:
        super().__init__()
        self._ref_class = (*_MemRefType, LOSS)  # type: ignore[assignment]  # any keys will do
        self.in_loss = False

    def _track(self, kind: Any, tensor: Tensor) -> None:
        super()._track(LOSS if self.in_loss else kind, tensor)  # type: ignore[arg-type]

    def _update_peak_stats(self, _: Any) -> None:
        # MemTracker's own keeps a peak for each module too, which takes most of its time.
        for device, now in self._curr_mem_snap.items():
            if now["Total"] > self._peak_mem.get(device, 0):
                self._peak_mem[device] = now["Total"]
                self._peak_mem_snap[device] = dict(now)

    def mark(self, tensor: Tensor, kind: Any) -> None:
        """Count a tensor that exists as another kind."""
        self._update_and_maybe_create_winfos(tensor, kind)


class _MicroBatch(nn.Module):
    """`model.losses` as a module's forward: MemTracker learns the parameters from a module."""

    def __init__(self, model: CodesTransformer, tracker: _Tracker, losses: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.losses = model, losses
        last = model.depth or model.norm
        last.register_forward_hook(lambda *_: setattr(tracker, "in_loss", True))

    def forward(self, codes: Tensor) -> Losses:
        return self.model.losses(codes, **self.losses)


# --- the kernels of another device ---------------------------------------------------------------


@contextlib.contextmanager
def _autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Mixed precision of CPU tensors that are said to lie on a device; none without a dtype."""
    if dtype is None:
        yield
        return
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    with torch.autocast("cpu", dtype):
        torch.set_autocast_enabled(device, True)  # torch.autocast refuses a device not here
        torch.set_autocast_dtype(device, dtype)
        try:
            yield
        finally:
            torch.set_autocast_enabled(device, before[0])
            torch.set_autocast_dtype(device, before[1])


@contextlib.contextmanager
def _kernels_of(device: str) -> Iterator[None]:
    """Forward and backward passes of CPU tensors as on a device of this type."""
    if device == "cpu":
        yield
        return
    with patch.object(FakeTensor, "device", _device_said_to_be(device)), _Elsewhere(device):
        yield


def _device_said_to_be(device: str) -> property:
    """What code outside of PyTorch reads as the `device` of tensors that lie on the CPU.

    PyTorch without CUDA can compute nothing on that device, not even shapes. With this the model
    and its losses choose as they would there.
    """
    said, real = torch.device(device), vars(FakeTensor)["device"]

    def device_of(tensor: FakeTensor) -> torch.device:
        asker = sys._getframe(1).f_globals["__name__"]
        return real.fget(tensor) if asker.startswith("torch.") else said

    return property(device_of)


class _Elsewhere(TorchFunctionMode):
    """Takes CUDA's kernels for those that keep something else for backward than the CPU's.

    Products and most element-wise kernels keep the same on both.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == self.device:
            kwargs["device"] = "cpu"
        return _CUDA_KERNELS.get(func, func)(*args, **kwargs)


def _recompute_elsewhere(model: CodesTransformer, device: str) -> None:
    """Backward runs blocks again (--grad-checkpoint), and autograd leaves all modes before it."""

    def there(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            with _Elsewhere(device):
                return forward(*args)

        return run

    for block in model.blocks:
        block.forward = there(block.forward)


def _attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    causal = options.get("is_causal", False)
    if q.dtype == torch.float32:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, options.get("attn_mask"), q.requires_grad, 0.0, causal)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0]


_CUDA_KERNELS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.dropout: lambda x, p, **_: torch.native_dropout(x, p, True)[0],
}


# --- what fits, and what to change ---------------------------------------------------------------

Predict = Callable[..., Memory]  # of flags that differ from the run's


def divisors(n: int) -> list[int]:
    """In rising order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def largest_batch(
    batches: Sequence[int], effective: int, predict: Predict, room: float, **changes: Any
) -> tuple[int, Memory] | None:
    """The last of some rising micro-batches of a step of `effective` windows that fits, or None.

    Memory rises with the micro-batch, so halving the candidates finds it.
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
    """Flags to copy that make the same step fit, each with what it takes.

    First with all that stays equal but the time; a smaller model, of `layers` or less, only where
    nothing else is enough, and not where `layers` is None.
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
    names = {name: "--" + name.replace("_", "-") for name in flags}
    said = [names[n] + ("" if value is True else f" {value}") for n, value in flags.items()]
    return f"{' '.join(said)}: {gib(memory.total)}"


# --- time and disk -------------------------------------------------------------------------------


def time_step(
    build: Callable[[], Trained],
    *,
    shape: tuple[int, int, int],
    losses: dict[str, Any],
    accum: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    compile_mode: str | None,
    seconds: float = 20.0,
) -> float:
    """Seconds of an optimizer step on random codes, from a few micro-batches on the device itself.

    One comes before the clock starts; then three, or as many as `seconds` allow, at least one.
    """
    with device:
        trained, codes = build(), torch.randint(2, shape)
        losses = {**losses, "weights": torch.ones(shape[2])}
    mixed = torch.autocast(device.type, amp_dtype or torch.bfloat16, enabled=amp_dtype is not None)
    forward: Any = trained.model.losses
    if compile_mode is not None:
        forward = torch.compile(forward, mode=compile_mode, fullgraph=True)

    def micro_batch() -> None:
        with mixed:
            objective = forward(codes, **losses).objective
        objective.backward()
        objective.item()  # waits for the device

    def update() -> None:
        trained.optimizer.step()
        trained.ema.update(1)
        next(trained.model.parameters()).sum().item()

    micro_batch()
    update()
    micro = _mean_seconds(micro_batch, 3, seconds)
    return accum * micro + _mean_seconds(update, 1, seconds)


def _mean_seconds(work: Callable[[], None], times: int, limit: float) -> float:
    started, done = time.perf_counter(), 0
    while done < times and (not done or time.perf_counter() - started < limit):
        work()
        done += 1
    return (time.perf_counter() - started) / done


def checkpoints_kept(
    epochs: int, *, validations: float, archive_every: int, keep_archived: int
) -> tuple[int, int]:
    """Files of different content that a run holds at once: without archives, and at most.

    `latest`, `previous`, `best`, the ring and the one being written cannot go. Every archive may be
    of another moment; `best` is a link to the newest of the best ones. Without hard links there
    are more.
    """
    without = 4 + RING_SIZE
    epoch_archives = epochs // archive_every if archive_every else 0
    best_archives = int(min(keep_archived, validations))
    archives = min(keep_archived, epoch_archives) + best_archives - 1
    return without, without + max(0, archives)


# --- the plan of a run ---------------------------------------------------------------------------

DEFAULT_EFFECTIVE_BATCH = 36  # windows in a step under --batch auto: that of the other defaults


@dataclass
class Plan:
    """What the steps and checkpoints of a run will take, by its flags; its device may be absent.

    `build` makes what a step works on, of flags and architecture, on torch's default device.
    """

    flags: argparse.Namespace
    config: ModelConfig
    device: torch.device
    amp_dtype: torch.dtype | None
    build: Callable[[argparse.Namespace, ModelConfig], Trained]
    predicted: dict[Any, Memory] = dataclasses.field(default_factory=dict)  # by what was changed

    # --- memory ----------------------------------------------------------------------------------

    def predict(self, **changes: Any) -> Memory:
        """Memory of a step with these flags, or with a few of them changed."""
        changes = {"batch": self.flags.batch, "accum": self.flags.accum, **changes}
        key = tuple(sorted(changes.items()))
        if key not in self.predicted:
            flags = argparse.Namespace(**{**vars(self.flags), **changes})
            layers = changes.get("layers", self.config.layers)
            step = self._step(flags, dataclasses.replace(self.config, layers=layers))
            self.predicted[key] = predict_memory(**step, device=self.device.type)
        return self.predicted[key]

    def _step(self, flags: argparse.Namespace, config: ModelConfig) -> dict[str, Any]:
        """What `predict_memory` and `time_step` ask of a step."""
        return {
            "build": functools.partial(self.build, flags, config),
            "shape": (flags.batch, flags.ctx, config.num_codebooks),
            "losses": {"label_smoothing": flags.label_smoothing, "z_loss": flags.z_loss},
            "accum": flags.accum,
            "amp_dtype": self.amp_dtype,
        }

    def room(self) -> float | None:
        """Bytes that the process may take: --memory-gb, or what is free; None: unknown."""
        if self.flags.memory_gb:
            return float(self.flags.memory_gb * GIB)
        return free_memory(self.device)

    def settle_batch(self, explicit: dict[str, Any], world: World) -> list[str]:
        """Make numbers of --batch auto and --effective-batch; says which, if memory chose.

        Raises:
            PlanError: nothing fits, or the numbers do not divide.
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
                    f"--effective-batch {effective} is not --batch {flags.batch} x a whole "
                    f"--accum; --batch can be one of {divisors(effective)}"
                )
        return lines

    def _most_that_fit(self, effective: int, world: World) -> tuple[int, str]:
        room = self.room()
        if room is None:
            raise PlanError(f"--batch auto: {self.device} is not here; say its --memory-gb")
        batches = [b for b in divisors(effective) if effective // b % world.size == 0]
        found = world.from_first(largest_batch(batches, effective, self.predict, room))
        if found is None:
            least = self.predict(batch=1, accum=effective).total
            raise PlanError(
                f"--batch auto: one window takes {gib(least)}, and {gib(room)} less {MARGIN:.0%} "
                "are there; --plan --batch 1 says what to change"
            )
        batch, memory = found
        return batch, (
            f"batch    {batch} x accum {effective // batch} are the most that fit: "
            f"{gib(memory.total)} of {gib(room)}, {MARGIN:.0%} left free"
        )

    def advice(self, layers: int | None = None) -> list[str]:
        """Flags that take less memory, each with how much; a smaller model only of `layers`.

        Never raises: it is asked for in the middle of another error.
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
        except Exception:  # no memory is left for it either
            return ["half of --batch with twice --accum, or --grad-checkpoint"]

    # --- time ------------------------------------------------------------------------------------

    @functools.cached_property
    def model(self) -> CodesTransformer:
        """Without weights."""
        with torch.device("meta"):
            return self.build(self.flags, self.config).model

    @property
    def windows_per_step(self) -> int:
        """Windows that an optimizer step uses."""
        return int(self.flags.batch * self.flags.accum)

    @property
    def flops(self) -> float:
        """Of an optimizer step: products and attention, forward and backward."""
        ctx = self.flags.ctx
        return float(self.model.flops_per_frame(ctx) * self.windows_per_step * ctx)

    @functools.cached_property
    def step_seconds(self) -> tuple[float, str]:
        """Of an optimizer step, and how it is known; 0 and why not."""
        flags, device = self.flags, self.device
        if rate := flags.device_tflops:
            at = f"at {rate:g} TFLOP/s x {flags.mfu:g} MFU (--device-tflops, --mfu)"
            return self.flops / (rate * flags.mfu * 1e12), at
        free = free_memory(device)
        if free is None:
            return 0.0, f"{device} is not here; give --device-tflops"
        if self.predict().total > free:
            return 0.0, f"a step does not fit into the {gib(free)} that are free here"
        compiled = flags.compile or (flags.compile is None and device.type == "cuda")
        mode = flags.compile_mode if compiled else None
        seconds = time_step(**self._step(flags, self.config), device=device, compile_mode=mode)
        return seconds, f"measured on {device} with random codes"

    def steps(self, windows: int) -> tuple[int, float]:
        """In an epoch of so many training windows, and in all."""
        flags = self.flags
        per_epoch = windows // self.windows_per_step
        total = min(flags.epochs * per_epoch, flags.max_steps or math.inf)
        seconds, _ = self.step_seconds
        if flags.max_seconds and seconds:
            total = min(total, flags.max_seconds / seconds)
        return per_epoch, total

    # --- what is said ----------------------------------------------------------------------------

    def step_lines(self) -> list[str]:
        """Parameters and FLOPs."""
        config, flags = self.config, self.flags
        return [
            f"model    {config.d_model} wide, {config.layers} layers, {config.heads} heads, "
            f"{config.pattern}: {self.model.num_parameters() / 1e6:.2f} M parameters",
            f"step     {self.windows_per_step} windows of {flags.ctx} frames (batch {flags.batch} "
            f"x accum {flags.accum}), {self.flops / 1e12:.3g} TFLOP: products and attention, "
            "forward and backward",
        ]

    def memory_lines(self, *, is_new: bool = True) -> list[str]:
        """Memory by part, and what to change where it does not fit; of a new run the model too."""
        memory, room = self.predict(), self.room()
        where = f"memory   at a step's peak on {self.device.type}, predicted, without --compile:"
        lines = memory.lines()
        left = f"{MARGIN:.0%} of it left free"
        if room is None:
            lines.append(f"{self.device} is not here: --memory-gb says what it has to fit into")
        elif memory.fits(room):
            lines.append(f"fits into {gib(room)} with {left}")
        else:
            lines.append(f"too much for {gib(room)} with {left}; instead:")
            lines += self.advice(layers=self.config.layers if is_new else None)
        return [where, *(f"         {line}" for line in lines)]

    def time_lines(self) -> list[str]:
        """Of a step."""
        seconds, how = self.step_seconds
        return [
            f"time     {seconds:.3g} s a step, {how}" if seconds else f"time     unknown: {how}"
        ]

    def run_lines(self, windows: int) -> list[str]:
        """Steps and hours of training."""
        (seconds, _), (per_epoch, total) = self.step_seconds, self.steps(windows)
        hours = f", {per_epoch * seconds / 3600:.3g} hours" if seconds else ""
        in_all = f", {total * seconds / 3600:.3g} hours of training steps" if seconds else ""
        return [
            f"epoch    {windows} windows, {per_epoch} steps{hours}",
            f"run      {total:.0f} steps{in_all}",
        ]

    def disk_lines(self, windows: int) -> tuple[list[str], str | None]:
        """What checkpoints take and what is free; apart from it, that it is too little."""
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
        free = shutil.disk_usage(folder).free
        lines = [
            f"disk     {megabytes(size)} a checkpoint: {megabytes(least * size)} without archives "
            f"({least} files of different content), {megabytes(most * size)} at most ({most}); "
            f"{megabytes(free)} free in {folder}"
        ]
        if free < least * size:
            return lines, "too little disk: saves will fail; free some, or another --save_dir"
        if free < most * size:
            fits = (free // size - least) // 2
            lines.append(
                f"         old archives will go when it is full; --keep-archived {fits} fits"
            )
        return lines, None


def free_memory(device: torch.device) -> float | None:
    """Bytes that this process may take on a device, with what it has; None: it is not here."""
    if device.type == "cuda" and torch.cuda.is_available():
        own = torch.cuda.memory_reserved(device) + FIXED["cuda"][1]
        return float(torch.cuda.mem_get_info(device)[0] + own)
    if device.type == "cpu":
        lines = Path("/proc/meminfo").read_text() + Path("/proc/self/status").read_text()
        sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", lines, re.M))
        return 1024.0 * (int(sizes["MemAvailable"]) + int(sizes["VmRSS"]))
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device's memory, or the host's, did not suffice."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator: can't allocate" in str(error)
