"""Predicts the peak memory of a run's optimizer steps by part, for a device that may be absent.

    step = Step(build, shape=(6, 512, 9), label_smoothing=0.05, accum=6, amp_dtype=torch.bfloat16)
    memory = predict_memory(step, "cuda")
    print(gib(memory.total), memory.parts["activations"], memory.fits(24 * GIB))

There are no formulas: the run's own model, optimizer and EMA take a step on tensors that have
shapes and no memory (FakeTensorMode), and MemTracker sums the tensors alive at each moment. So the
prediction follows the code, needs no GPU, and takes seconds for a large model.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
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
CONTEXT = GIB // 2  # estimate: CUDA driver and libraries in GPU memory
FIRST_STEPS = 45 << 20  # estimate: libraries that a run's first steps add to those of its set-up
KEPT = "kept by glibc (estimate)"  # freed blocks on a CPU; measured: a third of the tensors' bytes
MARGIN = 0.1  # share of the memory left free for fragmentation and the libraries' work space
LIBRARIES = "Python and libraries"
LOSS = "logits and loss"
PARTS = {  # MemTracker's kinds of tensors -> names in the table
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
    """The objects that an optimizer step changes."""

    model: CodesTransformer
    ema: Ema[CodesTransformer]
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Step:
    """An optimizer step: how to build what it trains, and the size of its micro-batches."""

    build: Callable[[], Trained]  # makes its tensors on torch's default device
    shape: tuple[int, int, int]  # [B, T, K] of a micro-batch
    label_smoothing: float
    accum: int  # micro-batches in the step
    amp_dtype: torch.dtype | None  # None: no mixed precision

    def objective(self, model: CodesTransformer) -> Objective:
        """Return the objective with equal codebook weights, on torch's default device."""
        return Objective(model, self.label_smoothing, torch.ones(self.shape[2]))


@dataclass(frozen=True)
class Memory:
    """Predicted bytes on the device at the peak of a step, by part."""

    parts: dict[str, int]
    checkpoint: int  # bytes of a checkpoint on disk, and of its copy in host memory during a save

    @property
    def total(self) -> int:
        """Total predicted bytes."""
        return sum(self.parts.values())

    def fits(self, room: float) -> bool:
        """Return whether the total fits into `room` bytes and leaves the share MARGIN free."""
        return self.total <= (1 - MARGIN) * room

    def lines(self) -> list[str]:
        """Return the table of parts and total, a line each."""
        rows = [(name, size) for name, size in self.parts.items() if size]
        return [f"{n:<26}{gib(size):>10}" for n, size in [*rows, ("total", self.total)]]


def gib(size: float) -> str:
    """Format a number of bytes as `4.91 GiB`."""
    return f"{size / GIB:.2f} GiB"


@functools.cache
def libraries() -> int:
    """Return the host memory of Python and its libraries in bytes, from what this process has now.

    To be called before a run has tensors; later calls return the same. With a CUDA build of torch
    it is twice that of a CPU build.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") + FIRST_STEPS


def predict_memory(step: Step, device: str) -> Memory:
    """Predict the peak memory of a run's steps on device type `cpu` or `cuda`."""
    tracker = _Tracker()
    with warnings.catch_warnings(), _FakeMode(), tracker:
        warnings.simplefilter("ignore")  # torch warns of copies of tensors without memory
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
        parts[LIBRARIES] = libraries()
    if device == "cuda":
        parts["CUDA context (estimate)"] = CONTEXT
    return Memory(parts, checkpoint)


def _take_step(trained: Trained, step: Step, device: str, tracker: _Tracker) -> None:
    """Take an update and then a micro-batch, so that the optimizer's state exists during it."""
    tracker.track_external(*trained.ema.averaged)
    micro_batch = step.objective(trained.model)  # MemTracker learns the parameters from a module
    last = trained.model.depth or trained.model.norm
    last.register_forward_hook(lambda *_: setattr(tracker, "in_loss", True))
    if device != "cpu":
        _use_foreach(trained.optimizer)
        _recompute_on(trained.model, device)
    for p in trained.model.parameters():
        p.grad = torch.empty_like(p)
        tracker.mark(p.grad, _MemRefType.GRAD)
    trained.optimizer.step()
    trained.ema.update(1)
    if step.accum == 1:  # with more, the last micro-batch finds the gradients of the earlier ones
        trained.optimizer.zero_grad(set_to_none=True)
    codes = torch.zeros(step.shape, dtype=torch.int64)
    with _kernels_of(device):
        with _autocast(device, step.amp_dtype):
            objective = micro_batch(codes).objective
        tracker.in_loss = False
        objective.backward()


def _use_foreach(optimizer: torch.optim.Optimizer) -> None:
    """Let AdamW use its multi-tensor kernels, its default on a GPU if it is not fused."""
    for group in optimizer.param_groups:
        if "foreach" in group and not group["fused"]:
            group["foreach"] = True


class _FakeMode(FakeTensorMode):
    def __deepcopy__(self, _: Any) -> _FakeMode:
        return self  # the EMA deep-copies the model, and its tensors must belong to this mode too


class _Tracker(MemTracker):
    """A MemTracker that counts tensors made between the last block and backward as LOSS."""

    def __init__(self) -> None:
        super().__init__()
        self._ref_class = (*_MemRefType, LOSS)  # type: ignore[assignment]  # any keys will do
        self.in_loss = False

    def _track(self, kind: Any, tensor: Tensor) -> None:
        super()._track(LOSS if self.in_loss else kind, tensor)  # type: ignore[arg-type]

    def _update_peak_stats(self, _: Any) -> None:
        # MemTracker's own method also keeps a peak per module, which takes most of its time.
        for device, now in self._curr_mem_snap.items():
            if now["Total"] > self._peak_mem.get(device, 0):
                self._peak_mem[device] = now["Total"]
                self._peak_mem_snap[device] = dict(now)

    def mark(self, tensor: Tensor, kind: Any) -> None:
        """Count an existing tensor as kind `kind` from now on."""
        self._update_and_maybe_create_winfos(tensor, kind)


# --- the kernels of another device ---------------------------------------------------------------


@contextlib.contextmanager
def _autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Apply mixed precision to CPU tensors that stand for tensors of `device`; None: do nothing."""
    if dtype is None:
        yield
        return
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    with torch.autocast("cpu", dtype):
        torch.set_autocast_enabled(device, True)  # torch.autocast refuses an absent device
        torch.set_autocast_dtype(device, dtype)
        try:
            yield
        finally:
            torch.set_autocast_enabled(device, before[0])
            torch.set_autocast_dtype(device, before[1])


@contextlib.contextmanager
def _kernels_of(device: str) -> Iterator[None]:
    """Make forward and backward passes of CPU tensors keep what they would keep on `device`."""
    if device == "cpu":
        yield
        return
    with patch.object(FakeTensor, "device", _pretended_device(device)), _CudaKernels(device):
        yield


def _pretended_device(device: str) -> property:
    """Return a `device` property that reports `device` to all code outside of PyTorch.

    PyTorch itself must see the CPU: without CUDA it cannot even compute shapes for that device. The
    model and its losses see `device`, and take the branches that they would take there.
    """
    pretended, real = torch.device(device), vars(FakeTensor)["device"]

    def device_of(tensor: FakeTensor) -> torch.device:
        caller = sys._getframe(1).f_globals["__name__"]
        return real.fget(tensor) if caller.startswith("torch.") else pretended

    return property(device_of)


class _CudaKernels(TorchFunctionMode):
    """Replaces the CPU kernels that keep other tensors for backward than CUDA's by CUDA's.

    Matrix products and most element-wise kernels keep the same tensors on both.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == self.device:
            kwargs["device"] = "cpu"
        return _CUDA_KERNELS.get(func, func)(*args, **kwargs)


def _recompute_on(model: CodesTransformer, device: str) -> None:
    """Enter `_CudaKernels` in each block: --grad-checkpoint recomputes blocks outside all modes."""

    def with_kernels(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with _CudaKernels(device):
                return forward(*args)

        return run

    for block in model.blocks:
        block.forward = with_kernels(block.forward)


def _attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    causal = options.get("is_causal", False)
    if q.dtype == torch.float32:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, options.get("attn_mask"), q.requires_grad, 0.0, causal)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0]


_CUDA_KERNELS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    # CUDA's rms_norm keeps its input and one number a row, as layer_norm does on every device.
    F.rms_norm: lambda x, shape, weight, eps: F.layer_norm(x, shape, weight, None, eps),
    F.dropout: lambda x, p, training, **_: (
        torch.native_dropout(x, p, True)[0] if p and training else x
    ),
}
