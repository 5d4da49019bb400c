"""What a run will take, before it begins: memory by part, hours, checkpoints on the disk.

    memory = predict_memory(build, codes, losses, accum=6, device="cuda", amp_dtype=torch.bfloat16)
    print(memory.parts, memory.total / GIB)

Memory is not reckoned by formulas: the run's own model, optimizer and EMA take a step on tensors
that have shapes and no bytes (FakeTensorMode), and what would be alive at each moment is added up
(MemTracker). No GPU is needed, a large model takes seconds, and what the code does is what counts.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.overrides import TorchFunctionMode

from checkpointing import RING_SIZE, size_of
from losses import Losses
from model import CodesTransformer
from stability import Ema

GIB = 2**30
# Estimates: of a GPU's memory what driver and libraries take, of the host's Python with PyTorch.
FIXED = {"cuda": ("CUDA context (estimate)", GIB // 2), "cpu": ("Python (estimate)", GIB // 4)}
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


class Trained(NamedTuple):
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


class _RmsNorm(torch.autograd.Function):
    """One kernel that keeps its input and a number a row; the CPU's parts keep three times that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


_CUDA_KERNELS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.dropout: lambda x, p, **_: torch.native_dropout(x, p, True)[0],
    F.rms_norm: lambda x, _, weight=None, eps=None: _RmsNorm.apply(x, weight),
    Tensor.square: lambda x: x.float().square(),  # a power, which autocast makes in float32 there
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
