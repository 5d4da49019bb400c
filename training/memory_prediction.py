"""Peak memory of a run's optimizer steps by part, on a device that need not be here.

    step = Step(build, shape=(6, 512, 9), label_smoothing=0.05, accum=6, amp_dtype=torch.bfloat16)
    memory = predict_memory(step, "cuda")
    print(gib(memory.total), memory.parts["activations"], memory.fits(24 * GIB))

Memory is not reckoned by formulas: the run's own model, optimizer and EMA take a step on tensors
that have shapes and no bytes (FakeTensorMode), and what would be alive at each moment is added up
(MemTracker). No GPU is needed, a large model takes seconds, and what the code does is what counts.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.overrides import TorchFunctionMode

from model import CodesTransformer
from run_folder.checkpoint import size_of
from training.ema import Ema
from training.objective import Objective

GIB = 2**30
# Estimates: of a GPU's memory what driver and libraries take, of the host's Python with PyTorch.
FIXED = {"cuda": ("CUDA context (estimate)", GIB // 2), "cpu": ("Python (estimate)", GIB // 3)}
KEPT = "kept by glibc (estimate)"  # on a CPU, of freed blocks: a third of the tensors, as measured
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


class Trained(Protocol):
    """What a step works on."""

    model: CodesTransformer
    ema: Ema[CodesTransformer]
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Step:
    """An optimizer step of a run: what it trains, and on how much."""

    build: Callable[[], Trained]  # on torch's default device
    shape: tuple[int, int, int]  # [B, T, K] of a micro-batch
    label_smoothing: float
    accum: int  # micro-batches
    amp_dtype: torch.dtype | None  # None: no mixed precision

    def objective(self, model: CodesTransformer) -> Objective:
        """Of even weights, on torch's default device."""
        return Objective(model, self.label_smoothing, torch.ones(self.shape[2]))


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


def predict_memory(step: Step, device: str) -> Memory:
    """Peak memory of the steps of a run with the kernels of a device type, `cpu` or `cuda`."""
    tracker = _Tracker()
    with warnings.catch_warnings(), _FakeMode(), tracker:
        warnings.simplefilter("ignore")  # of torch, about copies of tensors without bytes
        trained = step.build()
        _take_step(trained, step, device, tracker)
        (peak,) = tracker.get_tracker_snapshot("peak").values()
        kept = (trained.model.state_dict(), trained.ema.state_dict())
        checkpoint = size_of([*kept, trained.optimizer.state_dict()])
    parts = dict.fromkeys(PARTS.values(), 0)
    for kind, name in PARTS.items():
        parts[name] += peak[kind]
    if device == "cpu":
        parts["copy that is saved"] = checkpoint
        parts[KEPT] = sum(parts.values()) // 3
    if device in FIXED:
        name, size = FIXED[device]
        parts[name] = size
    return Memory(parts, checkpoint)


def _take_step(trained: Trained, step: Step, device: str, tracker: _Tracker) -> None:
    """The update first: it makes the optimizer's state, which later micro-batches find there."""
    tracker.track_external(*trained.ema.averaged)
    micro_batch = step.objective(trained.model)  # MemTracker learns the parameters from a module
    last = trained.model.depth or trained.model.norm
    last.register_forward_hook(lambda *_: setattr(tracker, "in_loss", True))
    if device != "cpu":
        _take_foreach(trained.optimizer)
        _recompute_elsewhere(trained.model, device)
    for p in trained.model.parameters():
        p.grad = torch.empty_like(p)
        tracker.mark(p.grad, _MemRefType.GRAD)
    trained.optimizer.step()
    trained.ema.update(1)
    if step.accum == 1:  # else gradients of earlier micro-batches lie there
        trained.optimizer.zero_grad(set_to_none=True)
    codes = torch.zeros(step.shape, dtype=torch.int64)
    with _kernels_of(device):
        with _autocast(device, step.amp_dtype):
            objective = micro_batch(codes).objective
        tracker.in_loss = False
        objective.backward()


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


# --- the kernels of another device ---------------------------------------------------------------


@contextlib.contextmanager
def _autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Mixed precision of CPU tensors that stand for tensors of a device; none without a dtype."""
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
    # It keeps its input and a number a row, as the kernel of layer_norm does everywhere.
    F.rms_norm: lambda x, shape, weight, eps: F.layer_norm(x, shape, weight, None, eps),
    F.dropout: lambda x, p, training, **_: (
        torch.native_dropout(x, p, True)[0] if p and training else x
    ),
}
