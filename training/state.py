"""What a run is: how far it has come, what a resume restores, what stays, what signals ask of it.

run.state.progress.step       # in the checkpoint, as all of run.state
run.flags.batch, run.files    # not in the state: they do not change while a run goes on
run.stop.signal               # a signal to stop, once one came
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import resource
import signal
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
from training.loader import Loader
from training.pace import Pace
from training.parallel import World
from training.rollback_policy import RollbackPolicy


@dataclass
class Progress:
    """How far a run has come: plain numbers, all of them in the checkpoint."""

    step: int = 0  # optimizer steps taken; refused ones do not count
    epoch: int = 0  # epochs finished
    position: int = 0  # windows of the present epoch that were used or refused
    seconds: float = 0.0  # in training steps, since the very first start
    elapsed: float = 0.0  # wall clock, likewise, over all processes
    schedule_steps: int = 0  # of the lr schedule; fixed at the very first start but for wsd
    schedule_seconds: float = 0.0  # the same where --max-seconds is the budget, else 0
    threads: int = 0  # that a CPU computes with, so that sums keep their order; 0 = torch's number
    cooling: bool = False  # wsd's cooldown has begun
    lr_scale: float = 1.0  # cut by rollbacks
    lr_goal: float = 1.0  # where it comes back to
    best_val: float = math.inf
    best_epoch: int = 0
    validated_step: int = -1
    validated_seconds: float = 0.0  # of --val-every-seconds
    epoch_loss: float = 0.0  # the objective, summed over the epoch's accepted steps
    epoch_ce: float = 0.0  # plain cross-entropy, likewise: what val is compared with
    epoch_steps: int = 0
    epoch_refused: int = 0
    epoch_seconds: float = 0.0
    log_loss: float = 0.0  # the same since the last log line
    log_steps: int = 0
    log_seconds: float = 0.0

    def begin_epoch(self) -> None:
        """Go to the first window of the present epoch; its sums start at 0."""
        self.position = self.epoch_steps = self.epoch_refused = 0
        self.epoch_loss = self.epoch_ce = self.epoch_seconds = 0.0


@dataclass
class TrainState:
    """All that a resume restores, besides the random state."""

    model: CodesTransformer
    ema: Ema[CodesTransformer]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    guard: Guard
    progress: Progress
    policy: RollbackPolicy = dataclasses.field(default_factory=RollbackPolicy)


@dataclass
class TrainingRun:
    """One process's share of a run: its flags, its state, and all that does not change."""

    flags: argparse.Namespace
    device: torch.device
    amp_dtype: torch.dtype | None
    console: Console
    files: RunFiles
    metrics: MetricsLog
    state: TrainState
    losses: nn.Module  # an Objective, compiled or not, of codes on the device
    compiled: bool
    weights: Tensor  # [K], of the codebooks in the objective
    train_windows: WindowDataset
    val_windows: WindowDataset
    order: EpochOrder
    loader: Loader
    data: dict[str, Any]  # what the windows are made of; a resume compares it
    world: World
    stop: StopRequest
    started: float = dataclasses.field(default_factory=time.perf_counter)
    last_save: float = dataclasses.field(default_factory=time.perf_counter)
    saver: BackgroundSaver = dataclasses.field(default_factory=BackgroundSaver)
    saving: Saving | None = None  # the save in flight
    best_on_disk: tuple[float, int] = (math.inf, 0)  # val and epoch
    pace: Pace = dataclasses.field(default_factory=Pace)
    failed_saves: int = 0
    report_failed: bool = False  # the newest try to write the run's page
    told_trouble: str | None = None  # kind of what the newest validation was found to show
    guard_stop: str | None = None  # why the guard ends the run
    between_steps: bool = True  # False while weights, moments and counters disagree

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision around a forward pass."""
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.amp_dtype)

    @property
    def windows_per_step(self) -> int:
        """Windows that an optimizer step uses."""
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
        """How often an epoch reads each training frame, on the average."""
        return self.order.num_windows * self.flags.ctx / self.train_windows.frames

    def memory_gib(self) -> float:
        """The most so far: of tensors on CUDA, elsewhere of this process in host memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB

    def is_finished(self) -> bool:
        """Whether epochs, steps, seconds or patience have run out."""
        p, flags = self.state.progress, self.flags
        return (
            p.epoch >= flags.epochs
            or p.step >= (flags.max_steps or math.inf)
            or p.seconds >= (flags.max_seconds or math.inf)
            or self.is_out_of_patience()
        )

    def is_out_of_patience(self) -> bool:
        """Whether the validation of this step ends --patience."""
        p = self.state.progress
        passes = (p.epoch - p.best_epoch) * self.passes_per_epoch
        return p.validated_step == p.step and passes >= (self.flags.patience or math.inf)

    def seconds_left(self) -> float:
        """Estimate from this epoch's pace."""
        p = self.state.progress
        pace = p.epoch_seconds / max(p.epoch_steps + p.epoch_refused, 1)
        left = max(0, self.planned_steps - p.step) * pace
        return min(left, self.flags.max_seconds - p.seconds) if self.flags.max_seconds else left


@dataclass(frozen=True)
class Saving:
    """A save in flight: of which moment, and what to do again if it fails."""

    written: Future[Path]
    step: int
    epoch: int
    is_best: bool
    archive: bool
    may_fail: bool  # a step checkpoint; these come often, and a disk may be full for minutes
    started: float
    stall: float  # seconds that training waited, for the save before it too


class StopRequest:
    """Requests by signals. The loop looks at them between steps.

    The first SIGINT, SIGTERM or SIGHUP (a terminal that closed) requests a save and the end, the
    second leaves at once; SIGUSR1 requests a save. Any of many processes may receive one; it counts
    once `sync_control` has sent it to all.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.signal: int | None = None
        self.save = False
        self.received: int | None = None  # by this process; `signal` is what all know
        self.received_save = False

    def install(self) -> None:
        """Take over the signals; under nohup SIGHUP stays ignored."""
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
        """The signal to stop that this process received, or 0; whether to save, reported once."""
        signal_number, save = self.received or 0, self.received_save
        self.received_save = False
        return signal_number, save

    def record(self, signal_number: int, save: bool) -> None:
        """Set what all processes know."""
        self.signal = self.signal or signal_number or None
        self.save = self.save or save


class Stopped(Exception):
    """A signal came while data was waited for, or codes were drawn."""
