"""The state of a run: its progress, what a checkpoint restores, its fixed parts, pending signals.

run.state.progress.step       # run.state is what a checkpoint contains
run.flags.batch, run.files    # everything else stays the same while the process runs
run.stop.signal               # number of a signal to stop, or None
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import resource
import signal
import subprocess
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from model import CodesTransformer
from npq_dataset import EpochOrder, WindowDataset
from run_folder.checkpoint import BackgroundSaver
from run_folder.files import RunFiles
from run_folder.metrics import Console, MetricsLog
from training.ema import Ema
from training.guard import Guard
from training.loader import Batch, Loader
from training.pace import Pace
from training.parallel import World
from training.rollback_policy import RollbackPolicy


@dataclass
class Progress:
    """The progress of a run: plain numbers, all of them in the checkpoint."""

    step: int = 0  # optimizer steps taken; refused ones do not count
    epoch: int = 0  # epochs finished
    position: int = 0  # windows of the present epoch that were used or refused
    seconds: float = 0.0  # spent in training steps since the run's very first start
    elapsed: float = 0.0  # wall clock since then, summed over all starts
    schedule_steps: int = 0  # length of the lr schedule; see schedule.py
    schedule_seconds: float = 0.0  # its length with --max-seconds, else 0
    threads: int = 0  # CPU threads, kept so that sums keep their order; 0 = torch's number
    cooling: bool = False  # wsd's cooldown has begun
    lr_scale: float = 1.0  # factor on the learning rate, lowered by rollbacks
    lr_goal: float = 1.0  # value to which lr_scale rises again
    best_val: float = math.inf
    best_epoch: int = 0
    validated_step: int = -1  # step of the newest validation
    validated_seconds: float = 0.0  # `seconds` at that validation
    epoch_loss: float = 0.0  # objective, summed over the epoch's accepted steps
    epoch_steps: int = 0
    epoch_refused: int = 0
    epoch_seconds: float = 0.0
    held_out_run: int = -1  # frames that validation music repeats of training music; -1: not known
    log_loss: float = 0.0  # the same since the last log line
    log_steps: int = 0
    log_seconds: float = 0.0

    def begin_epoch(self) -> None:
        """Return to the first window of the present epoch and reset its sums."""
        self.position = self.epoch_steps = self.epoch_refused = 0
        self.epoch_loss = self.epoch_seconds = 0.0


@dataclass
class TrainState:
    """Everything that a resume restores, except the random state."""

    model: CodesTransformer
    ema: Ema[CodesTransformer]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    guard: Guard
    progress: Progress
    policy: RollbackPolicy = dataclasses.field(default_factory=RollbackPolicy)


@dataclass
class TrainingRun:
    """A run as one process holds it: flags, state, data, files and console."""

    flags: argparse.Namespace
    device: torch.device
    amp_dtype: torch.dtype | None
    console: Console
    files: RunFiles
    metrics: MetricsLog
    state: TrainState
    losses: nn.Module  # the Objective, possibly compiled and wrapped in DDP
    compiled: bool
    weights: Tensor  # [K], loss weights of the codebooks, on the device
    train_windows: WindowDataset
    val_windows: WindowDataset
    order: EpochOrder
    loader: Loader
    data: dict[str, Any]  # identity of the data, which a resume compares
    world: World
    stop: StopRequest
    saver: BackgroundSaver
    started: float = dataclasses.field(default_factory=time.perf_counter)
    last_save: float = dataclasses.field(default_factory=time.perf_counter)
    saving: Saving | None = None  # the save in progress
    sender: subprocess.Popen[bytes] | None = None  # of metrics rows to Weights & Biases
    best_on_disk: tuple[float, int] = (math.inf, 0)  # val and epoch
    pace: Pace = dataclasses.field(default_factory=Pace)
    failed_saves: int = 0
    report_failed: bool = False  # the newest attempt to write the HTML page failed
    has_graphs: bool = False  # CUDA graphs: losses and gradients lie where the next replay writes
    reported_trouble: str | None = (
        None  # kind of trouble after the newest validation, already printed
    )
    guard_stop: str | None = None  # reason why the guard ends the run
    between_steps: bool = True  # False during an update, when weights and counters disagree

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context for a forward pass: mixed precision, or nothing without it."""
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.amp_dtype)

    def inputs_of(self, batch: Batch) -> list[Tensor]:
        """Return what the objective takes, int64 on the device: codes, and labels if there are."""
        present = (tensor for tensor in batch if tensor is not None)
        return [tensor.to(self.device, non_blocking=True).long() for tensor in present]

    @property
    def windows_per_step(self) -> int:
        """Windows in an optimizer step, over all processes."""
        return int(self.flags.batch * self.flags.accum)

    @property
    def steps_per_epoch(self) -> int:
        """Whole optimizer steps in an epoch."""
        return self.order.num_windows // self.windows_per_step

    @property
    def planned_steps(self) -> int:
        """Steps until --epochs or --max-steps ends the run."""
        planned = int(self.flags.epochs * self.steps_per_epoch)
        return min(planned, self.flags.max_steps or planned)

    @property
    def passes_per_epoch(self) -> float:
        """Average number of times that an epoch reads each training frame."""
        return self.order.num_windows * self.flags.ctx / self.train_windows.frames

    def memory_gib(self) -> float:
        """Return the peak so far, in GiB: of CUDA tensors, or of this process's host memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB

    def is_finished(self) -> bool:
        """Return whether --epochs, --max-steps, --max-seconds or --patience is reached."""
        p, flags = self.state.progress, self.flags
        return (
            p.epoch >= flags.epochs
            or p.step >= (flags.max_steps or math.inf)
            or p.seconds >= (flags.max_seconds or math.inf)
            or self.is_out_of_patience()
        )

    def is_out_of_patience(self) -> bool:
        """Return whether this step was validated and val is not lower for --patience passes."""
        p = self.state.progress
        passes = (p.epoch - p.best_epoch) * self.passes_per_epoch
        return p.validated_step == p.step and passes >= (self.flags.patience or math.inf)

    def seconds_left(self) -> float:
        """Estimate the training seconds to the run's end from the speed of this epoch."""
        p = self.state.progress
        pace = p.epoch_seconds / max(p.epoch_steps + p.epoch_refused, 1)
        left = max(0, self.planned_steps - p.step) * pace
        return min(left, self.flags.max_seconds - p.seconds) if self.flags.max_seconds else left


@dataclass(frozen=True)
class Saving:
    """A save in progress: its step, and what must be saved again if it fails."""

    written: Future[Path]
    step: int
    epoch: int
    is_best: bool
    archive: bool
    may_fail: bool  # True for step checkpoints: they are frequent, and a failure is tolerable
    started: float
    stall: float  # seconds that training waited, also for the save before it


class StopRequest:
    """Records signals, to which the training loop responds between steps.

    The first SIGINT, SIGTERM or SIGHUP (closed terminal) requests a save and the end of the run, a
    second one exits at once; SIGUSR1 requests a save. Any process may receive a signal; it takes
    effect once `sync_control` has sent it to all.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.signal: int | None = None
        self.save = False
        self.received: int | None = None  # by this process; `signal` is known to all processes
        self.received_save = False

    def install(self) -> None:
        """Install the signal handlers; under nohup SIGHUP stays ignored."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, signal_number: int, _: FrameType | None) -> None:
        if signal_number == signal.SIGUSR1:
            self.received_save = True
        elif self.received is not None:
            os._exit(128 + signal_number)
        else:
            self.received = signal_number
        if self.world.size == 1:
            self.record(*self.news())

    def news(self) -> tuple[int, bool]:
        """Return the stop signal that this process received, or 0, and whether to save.

        A request to save is returned once.
        """
        signal_number, save = self.received or 0, self.received_save
        self.received_save = False
        return signal_number, save

    def record(self, signal_number: int, save: bool) -> None:
        """Record a stop signal (0 for none) and a request to save, known to all processes."""
        self.signal = self.signal or signal_number or None
        self.save = self.save or save


class Stopped(Exception):
    """Raised when a signal to stop comes while waiting for data or drawing a sample."""
