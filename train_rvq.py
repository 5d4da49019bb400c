r"""Train a causal transformer on the codes of a neural audio codec, kept in .npq files.

    python train_rvq.py --data "npq_out/*.npq"           # a new run, or its next part
    python train_rvq.py --data "npq_out/*.npq" --resume rvq_ckpts/rvq_9cb_best.pt
    torchrun --nproc_per_node=4 train_rvq.py --data "npq_out/*.npq" --accum 8
    python train_rvq.py --data demo_codes --device cpu --d_model 64 --layers 2 --heads 2 --ctx 64 \
        --batch 4 --accum 1 --max-steps 30 --save_dir smoke_ckpts

The file reads from top to bottom: flags, pure pieces, the state of a run, one step, evaluation,
saving and restoring, the loop, and `main`. It can be killed at any moment; the same command goes on
from the last checkpoint and ends in the weights of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import itertools
import math
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from checkpointing import (
    WEIGHTS_KEYS,
    BackgroundSaver,
    CheckpointError,
    FolderLock,
    RunFiles,
    find_run,
    library_versions,
    load_checkpoint,
    load_latest,
    rng_kept,
    rng_state,
    run_name,
    save_checkpoint,
    set_rng_state,
)
from code_statistics import compare, describe, flat, read_excerpts
from losses import Losses
from model import PATTERNS, Block, CodesTransformer, ModelConfig
from npq_dataset import (
    BadFilesError,
    Corpus,
    EpochOrder,
    WindowDataset,
    find_npq_files,
    scan_corpus,
    split_corpus,
)
from npq_format import NpqError, map_codes, read_header, write_npq
from optimizer import build_optimizer, state_tensors
from parallel import EveryNth, ParallelError, World, is_loss_of_peer, join, leave, local
from planning import Plan, PlanError, is_out_of_memory
from reporting import Console, MetricsLog, epoch_lines, number, perplexity, step_line
from sampling import Draw, generate
from stability import (
    MAX_ROLLBACKS,
    SUSPECT_STEPS,
    Ema,
    Guard,
    Ladder,
    lr_doubling,
    not_finite,
)

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_GUARD = 0, 1, 2, 3  # and 128 + signal when interrupted

# --- flags ---------------------------------------------------------------------------------------

# A resumed run keeps these.
ARCHITECTURE_FLAGS: tuple[str, ...] = ("d_model", "layers", "heads", "codebooks", "qk_norm")
ARCHITECTURE_FLAGS += ("pattern", "depth_layers")
# Flags that shift loss or gradient norm: the guard learns their level anew when one changes.
LEVEL_FLAGS: tuple[str, ...] = ("label_smoothing", "z_loss", "embed_grad", "dropout", "batch")
LEVEL_FLAGS += ("code_dropout", "accum", "cb_weights", "cb_weights_auto_alpha", "jitter")
# What a run did that was saved before a flag existed, where that is not the flag's default.
BEFORE_THE_FLAG = {"jitter": False, "optim": "adamw", "pattern": "parallel"}
# Flags that belong to one command and not to the run: never restored from a checkpoint.
COMMAND_FLAGS: tuple[str, ...] = ("save_dir", "resume", "no_resume", "init_from", "ignore_arch")
COMMAND_FLAGS += ("allow_data_change", "effective_batch", "plan", "memory_gb", "device_tflops")
COMMAND_FLAGS += ("mfu",)


class UsageError(ValueError):
    """Flags that do not fit together or do not fit the data; ends with exit code 2."""


class FlagParser(argparse.ArgumentParser):
    """Accepts every multi-word flag with `-` and with `_`; shows the user's own spelling."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, after each flag's name has been brought to its declared spelling."""
        spelling = {s.replace("_", "-"): s for a in self._actions for s in a.option_strings}
        given = list(sys.argv[1:] if args is None else args)
        for i, word in enumerate(given):
            name, equals, value = word.partition("=")
            if word.startswith("--"):
                given[i] = spelling.get(name.replace("_", "-"), name) + equals + value
        return super().parse_known_args(given, namespace)


def build_parser() -> argparse.ArgumentParser:
    """All flags, by group. Defaults are run #3 of the notes that this trainer was made for."""
    parser = FlagParser(
        description=(__doc__ or "").partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    switch = argparse.BooleanOptionalAction

    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="GLOB", help="globs, folders or .npq files")
    add("--ctx", type=at_least(2), default=512, help="frames in a window")
    add("--step", type=at_least(1), help="frames between window starts; without it ctx // 2")
    add("--jitter", action=switch, default=True,
        help="shift training windows from epoch to epoch")
    add("--val_split", type=fraction, default=0.05, help="share of the data that validates")
    add("--val-list", metavar="FILE", help="text file of validation files; overrides --val_split")
    add("--codebooks", type=at_least(1), help="use the first so many codebooks of each file")
    add("--skip-bad-files", action="store_true", help="train without files that are not valid .npq")
    add("--num_workers", type=at_least(0), default=2, help="loader processes; 0 = none")
    add("--persistent-workers", action=switch, default=True, help="keep them between epochs")
    add("--prefetch", type=at_least(1), default=6, help="micro-batches each worker reads ahead")

    add = parser.add_argument_group("model").add_argument
    add("--d_model", type=at_least(2), default=768, help="width")
    add("--layers", type=at_least(1), default=16, help="transformer blocks")
    add("--heads", type=at_least(1), default=12, help="attention heads")
    add("--dropout", type=fraction, default=0.1,
        help="on embeddings and on each block's two outputs")
    add("--pattern", choices=PATTERNS, default="depth",
        help="what a code may depend on within its frame; see model.py")
    add("--depth-layers", type=at_least(1), default=1, help="blocks of --pattern depth")
    add("--depth-share", type=fraction_or_one, default=0.5,
        help="depth: share of the frames in each micro-batch that its loss is made of")
    add("--code-dropout", type=fraction, default=0.0,
        help="share of the input codes that training hides")
    add("--grad-checkpoint", action=switch, default=False, help="recompute blocks to save memory")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch", type=number_or_auto, default=6, metavar="N|auto",
        help="windows in a micro-batch; auto: the most that fit, and --accum to match")
    add("--accum", type=at_least(1), default=6,
        help="micro-batches in an optimizer step, over all processes")
    add("--effective-batch", type=at_least(1), metavar="N",
        help="windows in an optimizer step: sets --accum to N / --batch; auto without it: 36")
    add("--epochs", type=at_least(1), default=250, help="passes over the training windows")
    add("--max-steps", type=at_least(1), help="end after so many optimizer steps")
    add("--max-seconds", type=positive, help="end after so many training seconds, over all starts")
    add("--optim", choices=("muon", "adamw"), default="muon",
        help="muon: Muon for matrices within the model at 100 x --lr, AdamW for the rest at 25 x")
    add("--lr", type=positive, default=2e-4, help="peak learning rate")
    add("--schedule", choices=("cosine", "wsd"), default="cosine",
        help="of the lr after warm-up: a cosine, or stable and then a linear cooldown")
    add("--cooldown", type=fraction_or_one, default=0.2, help="wsd: share of the run that it takes")
    add("--weight-decay", type=not_negative, default=0.02,
        help="on the matrices of the blocks and head")
    add("--warmup-ratio", type=fraction, default=0.01, help="share of the run with rising lr")
    add("--eta-min", type=not_negative, default=1e-5,
        help="lr at and after the end of the schedule")
    add("--ema", type=fraction, default=0.999, help="decay of the averaged weights")
    add("--label-smoothing", type=fraction, default=0.05, help="share spread over all entries")
    add("--cb-weights", default="auto", metavar="auto|w0,w1,...", help="codebooks' loss weights")
    add("--cb-weights-auto-alpha", type=not_negative, default=0.5,
        help="auto: 1 + alpha * k / (K - 1)")
    add("--grad-clip", type=not_negative, default=1.0, help="largest gradient norm; 0 = off")
    add("--seed", type=at_least(0), default=0, help="of weights, dropout and data order")

    add = parser.add_argument_group("stability").add_argument
    add("--outlier-skip-factor", type=not_negative, default=6.0,
        help="refuse steps so many sigma above the recent past; 0 = only absolute limits")
    add("--outlier-ema-beta", type=fraction, default=1 - 1 / 128,
        help="the guard looks back over 1 / (1 - beta) accepted steps")
    add("--qk-norm", action=switch, default=True, help="normalise queries and keys")
    add("--z-loss", type=not_negative, default=0.0,
        help="weight of the squared log partition in the objective; PaLM: 1e-4")
    add("--decay-all", action=switch, default=False,
        help="weight decay on embeddings and gains as well")
    add("--embed-grad", type=fraction_or_one, default=1.0,
        help="factor on the embedding tables' gradient; GLM-130B: 0.1")
    add("--panic-lr-mul", type=positive, default=0.5,
        help="factor on lr at each rollback")
    add("--panic-snapshot", action=switch, default=False,
        help="keep *_panic_sNNNNNNNN.pt of the moment before a rollback")

    add = parser.add_argument_group("speed").add_argument
    add("--device", help="cuda, cuda:1, mps or cpu; without it the best device present")
    add("--amp", action=switch, default=True, help="mixed precision")
    add("--amp-dtype", choices=("auto", "bf16", "fp16"), default="auto",
        help="auto: bf16 if it is fast")
    add("--compile", action=switch, help="torch.compile; without it on for CUDA only")
    add("--compile-mode", choices=("default", "reduce-overhead", "max-autotune"), default="default",
        help="reduce-overhead uses CUDA graphs")
    add("--fused-optim", action=switch, default=True, help="fused AdamW")
    add("--parallel", choices=("ddp", "fsdp"), default="ddp",
        help="under torchrun: a whole copy of the state in each process, or a part")

    add = parser.add_argument_group("planning").add_argument
    add("--plan", action="store_true",
        help="print memory, time and disk that the run will take, and do nothing else")
    add("--memory-gb", type=positive,
        help="memory to fit into, GiB; without it what is free on the device, if that is here")
    add("--device-tflops", type=positive,
        help="TFLOP/s of the device's matrix products; without it a few steps are timed")
    add("--mfu", type=fraction_or_one, default=0.35, help="share of them that training reaches")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--save_dir", default="rvq_ckpts", help="folder of the run's files")
    add("--tag", default="", help="part of the files' names")
    add("--resume", metavar="PATH", help="go on from this checkpoint and not from *_latest.pt")
    add("--no-resume", action="store_true", help="start anew; an earlier run's files are set aside")
    add("--init-from", metavar="PATH", help="start a new run from a checkpoint's EMA weights")
    add("--ignore-arch", action="store_true", help="take the architecture from flags when resuming")
    add("--allow-data-change", action="store_true", help="resume although data or windows changed")
    add("--archive-every", type=at_least(0), default=10, help="epochs between archives; 0 = none")
    add("--keep-archived", type=at_least(1), default=20, help="archives of each kind to keep")
    add("--save-every-minutes", type=not_negative, default=15.0, help="within epochs; 0 = never")

    add = parser.add_argument_group("evaluation").add_argument
    add("--val-every", type=at_least(1), default=1, help="epochs between validations")
    add("--val-every-seconds", type=positive,
        help="training seconds between validations; overrides --val-every")
    add("--eval-audio-every", type=at_least(0), default=5, help="epochs between samples; 0 = none")
    add("--eval-frames", type=at_least(1), default=1290, help="length of a sample (1290 = 15 s)")
    add("--eval-temperature", type=positive, default=1.0, help="of sampling")
    add("--eval-top-k", type=at_least(0), default=0, help="draw from the k likeliest; 0 = all")
    add("--eval-top-p", type=fraction_or_one, default=1.0, help="draw from this much probability")
    add("--eval-outdir", help="folder of samples; without it `samples` in --save_dir")
    add("--eval-on-cpu", action=switch, default=True, help="decode audio on the CPU")
    add("--eval-dac-repo", default="44khz", help="codec for samples: 44khz, 24khz, 16khz or a path")

    add = parser.add_argument_group("logging").add_argument
    add("--log-lr-steps", type=at_least(1), default=50, help="steps between loss and lr lines")
    add("--quiet", action="store_true", help="no bar, no start-up details, no library warnings")
    add("--tensorboard", action=switch, default=False, help="write event files beside the metrics")
    # fmt: on
    return parser


def at_least(low: int) -> Callable[[str], int]:
    """Argument type: a whole number of at least `low`."""

    def whole_number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {low}, found {text!r}")
        return int(text)

    return whole_number


def number_or_auto(text: str) -> int | str:
    """Argument type: a whole number of at least 1, or `auto`."""
    return text if text == "auto" else at_least(1)(text)


def _number_type(what: str, accepts: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {what}, found {text!r}")
        return value

    return parse


positive = _number_type("a number > 0", lambda x: 0 < x < math.inf)
not_negative = _number_type("a number >= 0", lambda x: 0 <= x < math.inf)
fraction = _number_type("a number >= 0 and < 1", lambda x: 0 <= x < 1)
fraction_or_one = _number_type("a number > 0 and <= 1", lambda x: 0 < x <= 1)


def parse_flags(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """All flags, and apart from them the ones that were given."""
    parser = build_parser()
    flags = parser.parse_args(argv)
    unset = object()
    blank = argparse.Namespace(**dict.fromkeys(vars(flags), unset))
    given = vars(parser.parse_args(argv, blank))
    explicit = {name: value for name, value in given.items() if value is not unset}
    if flags.resume and flags.no_resume:
        parser.error("--resume and --no-resume contradict each other; give one")
    if flags.eta_min > flags.lr:
        parser.error(f"--eta-min {flags.eta_min:g} is above --lr {flags.lr:g}; lower it")
    if "accum" in explicit and flags.batch == "auto":
        parser.error("--batch auto sets --accum; leave it out, or give --effective-batch")
    if set(flags.tag) & set('/\\*?[]" '):
        parser.error(f"--tag: expected letters, digits, '.', '-' and '_', found {flags.tag!r}")
    return flags, explicit


# --- pure pieces ---------------------------------------------------------------------------------


def lr_at_step(
    step: float,
    total: float,
    *,
    lr: float,
    eta_min: float,
    warmup_ratio: float,
    schedule: str = "cosine",
    cooldown: float = 0.2,
) -> float:
    """Learning rate of the step-th step (from 1) of `total`: linear warm-up, fall, then eta_min.

    `cosine` falls from the end of the warm-up on (Loshchilov and Hutter 2017). `wsd` stays, and
    falls linearly over the last share `cooldown` of the run (warm-up, stable, decay: Hu et al.
    2024, section 4; Haegele et al. 2024). Past `total` it is eta_min for ever. Steps may also be
    seconds of a time budget.
    """
    warmup = warmup_ratio * total
    if step < warmup:
        return lr * step / warmup
    if schedule == "wsd":
        left = max(0.0, total - step) / (cooldown * total)
        return eta_min + (lr - eta_min) * min(1.0, left)
    progress = min(1.0, (step - warmup) / max(total - warmup, 1e-9))
    return eta_min + (lr - eta_min) * 0.5 * (1 + math.cos(math.pi * progress))


def codebook_weights(choice: str, alpha: float, num_codebooks: int) -> list[float]:
    """Loss weight of each codebook, mean 1. `auto` rises linearly with k; else a comma list."""
    k = num_codebooks
    if choice == "auto":
        weights = [1 + alpha * i / max(k - 1, 1) for i in range(k)]
    else:
        try:
            weights = [float(w) for w in choice.split(",")]
        except ValueError as error:
            raise UsageError(f"--cb-weights: expected auto or numbers, found {choice!r}") from error
        if len(weights) != k or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise UsageError(f"--cb-weights: expected {k} numbers >= 0, found {choice!r}")
    return [w * k / sum(weights) for w in weights]


# --- the state of a run --------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run has come: plain numbers, all of them in the checkpoint."""

    step: int = 0  # optimizer steps taken; refused ones do not count
    epoch: int = 0  # epochs finished
    position: int = 0  # windows of the present epoch that were used or refused
    seconds: float = 0.0  # in training steps, since the very first start
    elapsed: float = 0.0  # wall clock, likewise, over all processes
    schedule_steps: int = 0  # of the lr schedule; fixed at the very first start but for wsd
    cooling: bool = False  # wsd's cooldown has begun
    lr_scale: float = 1.0  # cut by rollbacks
    lr_goal: float = 1.0  # where it comes back to
    best_val: float = math.inf
    best_epoch: int = 0
    validated_step: int = -1
    validated_seconds: float = 0.0  # of --val-every-seconds
    epoch_loss: float = 0.0  # sum over the epoch's accepted steps
    epoch_steps: int = 0
    epoch_refused: int = 0
    epoch_seconds: float = 0.0
    log_loss: float = 0.0  # the same since the last log line
    log_steps: int = 0
    log_seconds: float = 0.0


@dataclass
class TrainState:
    """All that a resume restores, besides the random state."""

    model: CodesTransformer
    ema: Ema[CodesTransformer]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    guard: Guard
    progress: Progress
    ladder: Ladder = dataclasses.field(default_factory=Ladder)


@dataclass
class Run:
    """One process's share of a run: its flags, its state, and all that does not change."""

    flags: argparse.Namespace
    device: torch.device
    amp_dtype: torch.dtype | None
    console: Console
    files: RunFiles
    metrics: MetricsLog
    state: TrainState
    losses: Callable[[Tensor], Losses]  # codes on the device -> losses; compiled or not
    compiled: bool
    weights: Tensor  # [K], of the codebooks in the objective
    train_windows: WindowDataset
    val_windows: WindowDataset
    order: EpochOrder
    loader: DataLoader[Tensor]
    data: dict[str, Any]  # what the windows are made of; a resume compares it
    world: World
    stop: StopRequest
    started: float = dataclasses.field(default_factory=time.perf_counter)
    last_save: float = dataclasses.field(default_factory=time.perf_counter)
    saver: BackgroundSaver = dataclasses.field(default_factory=BackgroundSaver)
    saving: Saving | None = None  # the save in flight
    best_on_disk: tuple[float, int] = (math.inf, 0)  # val and epoch
    failed_saves: int = 0
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

    def is_finished(self) -> bool:
        """Whether epochs, steps or seconds have run out."""
        p, flags = self.state.progress, self.flags
        return (
            p.epoch >= flags.epochs
            or p.step >= (flags.max_steps or math.inf)
            or p.seconds >= (flags.max_seconds or math.inf)
        )

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
    spare: bool  # a step checkpoint; these come often, and a disk may be full for minutes
    started: float
    stall: float  # seconds that training waited, for the save before it too


class StopRequest:
    """What signals have asked for. The loop looks at it between steps.

    The first SIGINT or SIGTERM asks to save and stop, the second leaves at once; SIGUSR1 asks to
    save and go on. Of many processes any may get one; it counts once `agree` has told all of them.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.signal: int | None = None
        self.save = False
        self.received: int | None = None  # by this process; `signal` is what all know
        self.received_save = False

    def install(self) -> None:
        """Take over the three signals."""
        for number_ in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number_, self._receive)

    def _receive(self, number_: int, _: FrameType | None) -> None:
        if number_ == signal.SIGUSR1:
            self.received_save = True
        elif self.received is not None:
            os._exit(128 + number_)
        else:
            self.received = number_
        if self.world.size == 1:
            self.settle(*self.news())

    def news(self) -> tuple[int, bool]:
        """What this process has received: a signal to stop, or 0; whether to save, told once."""
        number_, save = self.received or 0, self.received_save
        self.received_save = False
        return number_, save

    def settle(self, number_: int, save: bool) -> None:
        """Take note of what all processes know."""
        self.signal = self.signal or number_ or None
        self.save = self.save or save


# --- one step ------------------------------------------------------------------------------------

SMALLEST_SCALE = 1.0  # of fp16 losses; below it gradients vanish


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did. Losses in nats per code, grad norm before clipping."""

    loss: float
    ce: list[float]
    grad_norm: float
    lr: float
    refused: str | None  # why, if the guard refused it
    is_overflow: bool = False  # of fp16, which the scaler mends


def train_step(run: Run, batches: Iterator[Tensor]) -> StepStats:
    """One optimizer step over `accum` micro-batches, or its refusal, which changes nothing."""
    state, p = run.state, run.state.progress
    loss, *ce, grad_norm = backward(run, batches).tolist()  # the one host sync of a step
    overflow = state.scaler.is_enabled() and not math.isfinite(grad_norm)
    refused = "fp16 overflow, scale lowered" if overflow else state.guard.judge(loss, grad_norm, ce)
    lr = learning_rate(run)
    run.between_steps = False
    if refused is None:
        update(run, lr, grad_norm)
        state.guard.accept(loss, grad_norm, ce)
        p.step += 1
        p.lr_scale = min(p.lr_goal, p.lr_scale * 2 ** (1 / lr_doubling(p.schedule_steps)))
        p.epoch_loss, p.epoch_steps = p.epoch_loss + loss, p.epoch_steps + 1
        p.log_loss, p.log_steps = p.log_loss + loss, p.log_steps + 1
    else:
        state.guard.refuse(in_a_row=not overflow)
        p.epoch_refused += 1
    state.scaler.update()  # halves the scale after an overflow; nothing without a scaler
    state.optimizer.zero_grad(set_to_none=True)
    state.ladder.attempt()
    p.position += run.windows_per_step
    run.between_steps = True
    return StepStats(loss, ce, grad_norm, lr, refused, overflow)


def backward(run: Run, batches: Iterator[Tensor]) -> Tensor:
    """Gradients of `accum` micro-batches; returns [objective, ce of each codebook, grad norm].

    The micro-batches are those of all processes, and so is what is returned; it is on the device.
    """
    state = run.state
    facts = run.world.sum(accumulate(run, batches))
    state.scaler.unscale_(state.optimizer)
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    return torch.cat((facts, run.world.total_norm(gradients)[None].float()))


def accumulate(run: Run, batches: Iterator[Tensor]) -> Tensor:
    """Gradients of this process's micro-batches of a step; its share of [objective, ce].

    Everything stays on the device. Codes arrive as 16-bit integers and are widened there.
    """
    flags, p, world = run.flags, run.state.progress, run.world
    facts = torch.zeros(1 + len(run.weights), device=run.device)
    mine = range(world.rank, flags.accum, world.size)
    for number_, codes in zip(mine, batches, strict=False):
        codes = codes.to(run.device, non_blocking=True).long()
        if run.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        torch.manual_seed(noise_seed(flags.seed, p.epoch, p.position + number_ * flags.batch))
        with world.reducing(last=number_ == mine[-1]):
            with run.autocast():
                losses = run.losses(codes)
            run.state.scaler.scale(losses.objective / len(mine)).backward()
        # The sum is a new tensor: CUDA graphs overwrite their outputs at the next micro-batch.
        facts = facts + torch.cat((losses.objective.detach()[None], losses.ce)) / flags.accum
    return facts


def noise_seed(seed: int, epoch: int, position: int) -> int:
    """Of dropout and drawn frames in the micro-batch that begins at a window of the epoch.

    So they depend on the run's place alone: not on its restarts, nor on the number of processes.
    """
    return int(np.random.SeedSequence((seed, epoch, position)).generate_state(1, np.uint64)[0])


def update(run: Run, lr: float, grad_norm: float) -> None:
    """Clip, step the optimizer, move the EMA."""
    state = run.state
    if 0 < run.flags.grad_clip < grad_norm:
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, run.flags.grad_clip / (grad_norm + 1e-6))
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    state.optimizer.step()
    state.ema.update(state.progress.step + 1)


def learning_rate(run: Run) -> float:
    """Of the step about to be taken; groups of parameters run at multiples of it."""
    flags = run.flags
    names = ("lr", "eta_min", "warmup_ratio", "schedule", "cooldown")
    shape = {name: getattr(flags, name) for name in names}
    return run.state.progress.lr_scale * lr_at_step(*schedule_position(run), **shape)


def schedule_position(run: Run) -> tuple[float, float]:
    """Of the step about to be taken, and the end; in seconds where those are the budget."""
    p, flags = run.state.progress, run.flags
    if flags.max_seconds:
        return p.seconds + p.epoch_seconds / max(p.epoch_steps, 1), flags.max_seconds
    return p.step + 1, p.schedule_steps


def cooldown_begins(run: Run) -> bool:
    """Whether the step about to be taken is the first that wsd lowers the learning rate for."""
    if run.flags.schedule != "wsd" or run.state.progress.cooling:
        return False
    position, total = schedule_position(run)
    return position > (1 - run.flags.cooldown) * total


# --- evaluation ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Validation:
    """Means over the validation windows, EMA weights, nats per code; NaN where there are none."""

    val: float  # plain cross-entropy, mean over codebooks
    val_obj: float  # the training objective
    per_codebook: list[float]


@torch.inference_mode()
def evaluate(run: Run) -> Validation | None:
    """Validate the EMA weights, eagerly; None when a signal asked to stop in the middle."""
    flags, model, world = run.flags, run.state.ema.model, run.world
    k = len(run.weights)
    total = torch.zeros(k + 1, device=run.device)
    count = len(run.val_windows)
    for first in range(0, count, flags.batch * world.size):
        agree(run)
        if run.stop.signal is not None:
            return None
        first += flags.batch * world.rank
        windows = np.arange(first, min(first + flags.batch, count))
        # With nothing left of its own a process goes through the motions, for the others' sake.
        codes = run.val_windows[windows if len(windows) else np.arange(1)].to(run.device).long()
        with run.autocast():
            losses = model.losses(codes, flags.label_smoothing, flags.z_loss, run.weights)
            total += torch.cat((losses.objective[None], losses.ce)) * len(windows)
    world.sum(total)
    objective, *ce = (total / count if count else total * math.nan).tolist()
    return Validation(sum(ce) / k, objective, ce)


class StopSampling(Exception):
    """A signal came while codes were drawn."""


def write_samples(run: Run) -> None:
    """Draw a sample from the EMA weights; write its codes and its sound to --eval-outdir.

    Sound never stops training: any failure is one line and a metrics row.
    """
    p, flags = run.state.progress, run.flags
    started = time.perf_counter()
    weights = run.world.whole(run.state.ema.state_dict())
    if not run.world.is_first:
        return

    def stop_on_signal() -> None:
        if run.stop.signal is not None or run.stop.received is not None:
            raise StopSampling

    codes: np.ndarray[Any, Any] | None = None
    outcome: dict[str, Any]
    try:
        path = draw_sample(run, weights, stop_on_signal)
        codes = map_codes(read_header(path)).astype(np.int64)
        from codec import load_codec, write_wav  # training runs where no codec can be imported

        codec = load_codec(flags.eval_dac_repo, "cpu" if flags.eval_on_cpu else str(run.device))
        waveform = codec.decode_channels(torch.from_numpy(codes), run.data["side_codebooks"])
        write_wav(path.with_suffix(".wav"), waveform.numpy(), codec.sample_rate)
    except StopSampling:
        return
    except Exception as error:  # a missing codec, a full disk, no memory left: train on
        run.console.problem(f"evaluation audio failed, training goes on: {error}")
        outcome = {"error": str(error)}
    else:
        seconds = round(time.perf_counter() - started, 3)
        run.console.detail(f"sample   {path.with_suffix('.wav')} ({seconds:.1f} s)")
        outcome = {"file": path.name, "sample_seconds": seconds}
    figures = {} if codes is None else sample_statistics(run, codes)
    run.metrics.write("sample", step=p.step, epoch=p.epoch, **outcome, **figures)


def sample_statistics(run: Run, codes: np.ndarray[Any, Any]) -> dict[str, float | None]:
    """Say how far a sample [T, K] is from the validation music; fields for its metrics row."""
    try:
        figures = compare(codes, read_excerpts(run.val_windows, len(codes)))
    except Exception as error:  # a file that changed, no memory left: train on
        run.console.problem(f"statistics of the sample failed, training goes on: {error}")
        return {}
    run.console.line(f"         {describe(figures)}")
    return flat(figures)


def draw_sample(run: Run, weights: dict[str, Tensor], on_frame: Callable[[], None]) -> Path:
    """Codes of one sample of EMA weights as .npq, named by run, epoch and time."""
    p, flags, config = run.state.progress, run.flags, run.state.model.config
    folder = Path(flags.eval_outdir or Path(flags.save_dir) / "samples")
    folder.mkdir(parents=True, exist_ok=True)
    model = run.state.ema.model
    if run.world.is_sharded:  # drawing is one process's work
        model = CodesTransformer(config).to(run.device)
        model.load_state_dict(weights)
    draw = Draw.of(config.num_codebooks, flags.eval_temperature, flags.eval_top_k, flags.eval_top_p)
    codes = generate(
        model,
        flags.eval_frames,
        ctx=flags.ctx,
        draw=draw,
        seed=flags.seed + p.epoch,
        dtype=run.amp_dtype,
        on_frame=on_frame,
    )
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = folder / f"{run.files.name}_e{p.epoch:04d}__{stamp}.npq"
    write_npq(
        path,
        codes[0].cpu().numpy(),
        vocab_sizes=config.vocab_sizes,
        frame_rate=run.data["frame_rate"],
        side_codebooks=run.data["side_codebooks"],
    )
    return path


# --- save and restore ----------------------------------------------------------------------------

MAX_FAILED_SAVES = 3


def checkpoint_of(run: Run) -> dict[str, Any]:
    """Everything needed to resume: plain types and tensors only; every process must ask."""
    state, whole = run.state, run.world.whole
    state.progress.elapsed += time.perf_counter() - run.started
    run.started = time.perf_counter()
    return {
        "model": whole(state.model.state_dict()),
        "ema": whole(state.ema.state_dict()),
        "optimizer": whole(state.optimizer.state_dict()),
        "scaler": state.scaler.state_dict(),
        "guard": state.guard.state_dict(),
        "ladder": state.ladder.state_dict(),
        "progress": dataclasses.asdict(state.progress),
        "rng": rng_state(),
        "architecture": state.model.config.to_dict(),
        "flags": vars(run.flags),
        "data": run.data,
        "history": run.metrics.history,
        "libraries": library_versions(),
        "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def save(
    run: Run,
    *,
    is_best: bool = False,
    archive: bool = False,
    ring: bool = False,
    spare: bool = False,
) -> str | None:
    """Begin to save `latest` and, as asked, `best`, an archive, a step checkpoint of the ring.

    The writing goes on beside. An unsound state goes to quarantine instead, at once; returns why.
    A failing disk is survived: three failures in a row, of saves that are not spare, raise OSError
    here or in `check_save`.
    """
    began = time.perf_counter()
    check_save(run, wait=True)
    p = run.state.progress
    started = time.perf_counter()
    run.last_save = started
    run.stop.save = False
    if (reason := unsound(run)) is not None:  # asked of the state itself, before it is copied
        quarantine(run, reason)
        return reason
    if ring:
        run.state.ladder.kept_step = p.step
    checkpoint = checkpoint_of(run)
    if not run.world.is_first:
        return None
    write = functools.partial(
        run.files.save,
        best_epoch=p.best_epoch if is_best else None,
        archive_epoch=p.epoch if archive else None,
        ring_step=p.step if ring else None,
        keep_archived=run.flags.keep_archived,
        tell=run.console.problem,
    )
    written = run.saver.start(checkpoint, write, is_copy=run.world.is_sharded)
    stall = time.perf_counter() - began
    run.saving = Saving(written, p.step, p.epoch, is_best, archive, spare, started, stall)
    return None


def check_save(run: Run, *, wait: bool = False) -> Saving | None:
    """Report the save in flight if it has ended, or wait for it; returns it if it failed.

    Raises:
        OSError: it failed, as did MAX_FAILED_SAVES in a row.
    """
    saving, p = run.saving, run.state.progress
    if saving is None or not (wait or saving.written.done()):
        return None
    run.saving = None
    try:
        path = saving.written.result()
    except OSError as error:
        run.failed_saves += not saving.spare
        run.console.problem(
            f"save at step {saving.step} failed ({error}); {run.files.latest} is still the last "
            "good one"
        )
        if run.failed_saves >= MAX_FAILED_SAVES:
            raise
        p.best_val, p.best_epoch = run.best_on_disk  # the next validation may find one again
        return saving
    run.failed_saves = 0
    run.best_on_disk = p.best_val, p.best_epoch
    seconds = round(time.perf_counter() - saving.started, 3)
    run.metrics.write(
        "save",
        step=saving.step,
        epoch=saving.epoch,
        file=path.name,
        save_seconds=seconds,
        stall_seconds=round(saving.stall, 4),
    )
    return None


def finish_save(run: Run) -> None:
    """At the end of a run: wait until the newest save is on the disk; if it fails, save again.

    Raises:
        OSError: MAX_FAILED_SAVES in a row failed.
    """
    p = run.state.progress
    best = p.best_val, p.best_epoch
    while True:
        failed = check_save(run, wait=True)
        if not any(run.world.largest(failed is not None)):
            return
        p.best_val, p.best_epoch = best
        save(run, is_best=bool(failed and failed.is_best), archive=bool(failed and failed.archive))


def unsound(run: Run) -> str | None:
    """Why the state must not become a checkpoint to go on from, or None; one host sync."""
    state = run.state
    tensors = {f"model {n}": t for n, t in state.model.state_dict().items()}
    tensors |= {f"ema {n}": t for n, t in state.ema.state_dict().items()}
    tensors |= dict(state_tensors(state.optimizer))
    bad = not_finite({n: local(t) for n, t in tensors.items()})
    return run.world.first(
        f"{len(bad)} tensors are not finite, first {bad[0]}"
        if bad
        else state.guard.worse_than_guessing()
    )


def quarantine(run: Run, reason: str) -> None:
    """Keep an unsound state apart for diagnosis and say so; `latest` stays as it is."""
    p, checkpoint = run.state.progress, checkpoint_of(run)
    if not run.world.is_first:
        return
    try:
        name = run.files.quarantine(checkpoint, p.step, reason).name
    except OSError as error:
        name = f"nowhere ({error})"
    run.metrics.write("quarantine", step=p.step, epoch=p.epoch + 1, reason=reason, file=name)
    run.console.problem(
        f"the state at step {p.step} is unsound ({reason}); it went to {name}, and "
        f"{run.files.latest} stays as it was"
    )


def restore(state: TrainState, checkpoint: dict[str, Any], path: str, world: World) -> None:
    """Put a checkpoint's weights, moments, guard and counters into a state.

    Weight decay and the like stay as the flags say; only the moments come from the file.

    Raises:
        CheckpointError: lists the tensors that do not fit.
    """
    load_weights(state.model, checkpoint["model"], path, world)
    load_weights(state.ema.model, checkpoint["ema"], path, world)
    own, saved = state.optimizer.state_dict(), checkpoint["optimizer"]
    if [g["param_names"] for g in own["param_groups"]] != [
        g.get("param_names") for g in saved["param_groups"]
    ]:
        raise CheckpointError(
            f"{path}: its optimizer state is of another --optim or of other parameters; start from "
            "its weights alone with --init-from"
        )
    for group, saved_group in zip(own["param_groups"], saved["param_groups"], strict=True):
        group["lr"] = saved_group["lr"]  # as it stood; each step sets it anew
    moments = world.placed_moments(saved["state"], state.optimizer)
    state.optimizer.load_state_dict({**own, "state": moments})
    if checkpoint["scaler"] and state.scaler.is_enabled():
        state.scaler.load_state_dict(checkpoint["scaler"])
    state.guard.load_state_dict(checkpoint["guard"])
    known = {f.name for f in dataclasses.fields(Progress)}
    for name, value in checkpoint["progress"].items():
        if name in known:
            setattr(state.progress, name, value)
    set_rng_state(checkpoint["rng"])


def load_weights(
    model: torch.nn.Module, weights: dict[str, Tensor], path: str, world: World
) -> None:
    """Strict load; raises CheckpointError with the names and shapes that differ."""
    own = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    saved = {name: tuple(p.shape) for name, p in weights.items()}
    differing = sorted(n for n in own.keys() | saved.keys() if own.get(n) != saved.get(n))
    if differing:
        listed = ", ".join(f"{n} {saved.get(n)} -> {own.get(n)}" for n in differing[:6])
        raise CheckpointError(
            f"{path}: weights of another architecture ({len(differing)} differ: {listed}); "
            "leave out --ignore-arch to take the saved one, or --no-resume to start anew"
        )
    for name, p in model.state_dict().items():
        world.place(p, weights[name])


# --- setting up ----------------------------------------------------------------------------------

ALONE = World()


def set_up(
    flags: argparse.Namespace, explicit: dict[str, Any], console: Console, world: World = ALONE
) -> Run:
    """From flags to a run that is ready to step: checkpoint, data, model, restored state."""
    checkpoint, source = find_checkpoint(flags, console, world)
    flags = settle_flags(flags, explicit, checkpoint, console)
    if not flags.data:
        raise UsageError("--data: name the .npq files to train on")
    device = pick_device(flags.device, world)
    amp_dtype = pick_amp_dtype(flags, device)
    tune_for(device)

    os.makedirs(flags.save_dir, exist_ok=True)  # on a machine without rank 0 it may be new
    with world.in_turn():
        corpus, train_windows, val_windows, data = open_data(flags, console)
    config, initial = pick_architecture(flags, checkpoint, source, corpus.vocab_sizes, world)
    console.lines(plan_of(flags, config, device).settle_batch(explicit, world))
    check_accum(flags.accum, world)
    check_same(flags, data, world)
    check_windows(flags, len(train_windows))
    order = EpochOrder(len(train_windows), batch=flags.batch, accum=flags.accum, seed=flags.seed)
    shares = codebook_weights(flags.cb_weights, flags.cb_weights_auto_alpha, corpus.num_codebooks)
    weights = torch.tensor(shares, device=device)
    state = first_state(flags, config, initial, amp_dtype, device, world)
    files = RunFiles(flags.save_dir, run_name(config.num_codebooks, flags.tag))
    if checkpoint is not None:
        restore(state, checkpoint, source, world)
        state.ladder.load_state_dict(checkpoint.get("ladder", {}))
        settle_data_change(flags, state, checkpoint["data"], data, console)
        forget_another_level(flags, state.guard, saved_flags(checkpoint))
    if world.is_first:
        tidy(files, state, console, resumed=checkpoint is not None)
    state.ladder.kept_step = world.from_first(state.ladder.kept_step)
    order.detours = state.ladder.detours

    written = files.metrics if world.is_first else None
    run = Run(
        flags=flags, device=device, amp_dtype=amp_dtype, console=console, files=files,
        metrics=MetricsLog(written, tensorboard=flags.tensorboard), state=state, world=world,
        losses=functools.partial(
            state.model.losses, label_smoothing=flags.label_smoothing, z_loss=flags.z_loss,
            weights=weights,
        ),
        compiled=False, train_windows=train_windows, val_windows=val_windows, order=order,
        weights=weights,
        loader=build_loader(flags, train_windows, EveryNth(order, world), device), data=data,
        stop=StopRequest(world),
        best_on_disk=(state.progress.best_val, state.progress.best_epoch),
    )  # fmt: skip
    run.metrics.history = checkpoint["history"] if checkpoint is not None else []
    settle_schedule(run, checkpoint)
    announce(run, source, resumed=checkpoint is not None)
    if flags.compile or (flags.compile is None and device.type == "cuda"):
        compile_losses(run)
    run.losses = world.averaging(state.model, run.losses)
    return run


def check_windows(flags: argparse.Namespace, windows: int) -> None:
    """Raise UsageError where training windows make no step."""
    if windows < flags.batch * flags.accum:
        raise UsageError(
            f"{windows} training windows are fewer than one step's --batch {flags.batch} x --accum "
            f"{flags.accum}; lower these, --ctx or --step, or add data"
        )


def check_accum(accum: int, world: World) -> None:
    """Raise UsageError where micro-batches cannot be dealt out evenly; name counts that can."""
    if accum % world.size:
        below = accum // world.size * world.size
        near = [str(n) for n in (below, below + world.size) if n]
        raise UsageError(
            f"--accum {accum}: {world.size} processes cannot share so many micro-batches of a step "
            f"evenly; use --accum {' or '.join(near)}"
        )


# Flags that may differ from machine to machine: paths and the like.
MACHINE_FLAGS: tuple[str, ...] = ("data", "val_list", "save_dir", "resume", "init_from")
MACHINE_FLAGS += ("eval_outdir", "eval_dac_repo", "num_workers", "prefetch", "persistent_workers")


def check_same(flags: argparse.Namespace, data: dict[str, Any], world: World) -> None:
    """See that every process has the same flags and data; raises ParallelError."""
    facts = {f"--{n}": v for n, v in vars(flags).items() if n not in MACHINE_FLAGS}
    remedy = "start every machine with the same command, over the same files"
    world.check_same({**facts, **{f"data {n}": v for n, v in data.items()}}, remedy)


def tidy(files: RunFiles, state: TrainState, console: Console, *, resumed: bool) -> None:
    """Remove or set aside what an earlier run, or an earlier part of this one, has left."""
    if resumed:
        files.prune_ring(newest=state.progress.step)
        if not files.ring_steps():  # of a run that had ended, or of a version without a ring
            state.ladder.kept_step = None
    elif aside := files.set_aside():
        console.line(f"An earlier run's files were moved to {aside}")
    files.remove_leftovers()


def settle_schedule(run: Run, checkpoint: dict[str, Any] | None) -> None:
    """Fix the steps that lr falls over: for a cosine at the first start, for wsd at each.

    Raises:
        UsageError: a longer run would raise a cooling lr again.
    """
    p, flags = run.state.progress, run.flags
    if checkpoint is not None and flags.schedule == "cosine":
        return
    longer = run.planned_steps > p.schedule_steps
    if checkpoint is not None and flags.max_seconds and checkpoint["flags"].get("max_seconds"):
        longer = flags.max_seconds > checkpoint["flags"]["max_seconds"]
    if longer and p.cooling:
        raise UsageError(
            f"a longer run is asked for, but its cooldown has begun before step {p.step}: give "
            "--resume the archive that was kept when it began, or --init-from for a new schedule"
        )
    p.schedule_steps = run.planned_steps


def forget_another_level(flags: argparse.Namespace, guard: Guard, saved: dict[str, Any]) -> None:
    """Let the guard learn anew where flags move loss or gradient norm to another level."""
    now = vars(flags)
    if any(now[name] != saved.get(name, now[name]) for name in LEVEL_FLAGS):
        guard.forget()


def find_checkpoint(
    flags: argparse.Namespace, console: Console, world: World
) -> tuple[dict[str, Any] | None, str]:
    """The checkpoint to resume from and where it came from, or None for a new run.

    Rank 0 reads it for all.
    """
    found = read_checkpoint(flags, console) if world.is_first else (None, "")
    return world.share(found[0]), world.from_first(found[1])


def read_checkpoint(
    flags: argparse.Namespace, console: Console
) -> tuple[dict[str, Any] | None, str]:
    """The same, from this machine's disk."""
    if flags.resume:
        return load_checkpoint(flags.resume), flags.resume
    if flags.no_resume:
        return None, ""
    files = find_run(flags.save_dir, flags.tag, flags.codebooks)
    if files is None:
        return None, ""
    checkpoint, path, complaints = load_latest(files)
    for complaint in complaints:
        console.problem(f"{complaint}\n  falling back to {path}")
    return checkpoint, str(path)


def saved_flags(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's flags, and what its run did by flags that its version did not have."""
    return {**BEFORE_THE_FLAG, **checkpoint["flags"]}


def settle_flags(
    flags: argparse.Namespace,
    explicit: dict[str, Any],
    checkpoint: dict[str, Any] | None,
    console: Console,
) -> argparse.Namespace:
    """Those of the run, new or resumed, with a number for --step."""
    if checkpoint is not None:
        flags = merge_flags(flags, explicit, checkpoint, console)
    flags.step = flags.step or max(1, flags.ctx // 2)
    return flags


def merge_flags(
    flags: argparse.Namespace,
    explicit: dict[str, Any],
    checkpoint: dict[str, Any],
    console: Console,
) -> argparse.Namespace:
    """Flags of a resumed run: the saved ones, over them the ones given; a banner says so."""
    saved, progress = saved_flags(checkpoint), checkpoint["progress"]
    if explicit.get("batch") == "auto":  # picked once: another number would be another run
        explicit = {name: value for name, value in explicit.items() if name != "batch"}
    merged = dict(vars(flags))
    merged.update({n: v for n, v in saved.items() if n in merged and n not in COMMAND_FLAGS})
    merged.update(explicit)
    merged["quiet"] = flags.quiet
    console.line(
        f"Resuming at step {progress['step']}, epoch {progress['epoch'] + 1}, "
        f"best val {number(progress['best_val'])} (saved {checkpoint.get('saved_at', '?')})"
    )
    for name, value in explicit.items():
        if name in COMMAND_FLAGS or name not in saved or saved[name] == value or name == "quiet":
            continue
        keeps = name in ARCHITECTURE_FLAGS and not flags.ignore_arch
        if keeps:
            merged[name] = saved[name]
        winner = "the saved architecture stays (--ignore-arch to insist)" if keeps else "asked wins"
        console.line(f"  --{name.replace('_', '-')}: saved {saved[name]}, asked {value}; {winner}")
        if name in ("epochs", "max_steps") and merged["schedule"] == "cosine":
            console.line(
                f"  the lr schedule still spans {progress['schedule_steps']} steps and stays at "
                "--eta-min after them; --init-from starts a new schedule from these weights"
            )
    return argparse.Namespace(**merged)


def pick_device(wanted: str | None, world: World = ALONE) -> torch.device:
    """The device asked for, or the best present; an absent one is an error and no fall back.

    Of CUDA devices each process of a machine takes its own.
    """
    if world.size > 1 and wanted in (None, "cuda") and torch.cuda.is_available():
        wanted = f"cuda:{world.local_rank}"
    if wanted is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--device {wanted}: not usable here ({reason}); leave the flag out to take the best "
            "device present, or pass --device cpu"
        ) from error
    return device


def tune_for(device: torch.device) -> None:
    """Settings of the whole process that make a device faster."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if device.type == "cpu" and not any(name.startswith("MALLOC_") for name in os.environ):
        # glibc keeps what is freed: fetching a step's pages anew took a tenth of its time.
        trim_threshold, mmap_threshold = -1, -3  # as in <malloc.h>
        with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(trim_threshold, -1)
            mallopt(mmap_threshold, 32 << 20)  # the most it accepts


def pick_amp_dtype(flags: argparse.Namespace, device: torch.device) -> torch.dtype | None:
    """Of mixed precision: bfloat16 where the device computes in it, else float16; None without."""
    if not flags.amp:
        return None
    if flags.amp_dtype != "auto":
        return torch.bfloat16 if flags.amp_dtype == "bf16" else torch.float16
    here = device.type == "cuda" and torch.cuda.is_available()
    if here and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def open_data(
    flags: argparse.Namespace, console: Console
) -> tuple[Corpus, WindowDataset, WindowDataset, dict[str, Any]]:
    """Scan, split and index the files; the last item tells one set of windows from another."""
    corpus = scan_corpus(
        find_npq_files(flags.data),
        ctx=flags.ctx,
        codebooks=flags.codebooks,
        skip_bad=flags.skip_bad_files,
        checked_file=os.path.join(flags.save_dir, ".checked_files.json")
        if os.path.isdir(flags.save_dir)  # --plan makes none
        else None,
    )
    split = {"ctx": flags.ctx, "val_split": flags.val_split, "val_list": flags.val_list}
    try:
        train, val = split_corpus(corpus, **split)
    except (OSError, ValueError) as error:
        raise UsageError(f"--val-list: {error}; name a text file of validation files") from error
    jitter_seed = flags.seed if flags.jitter else None
    train_windows = WindowDataset(
        corpus, train, ctx=flags.ctx, stride=flags.step, jitter_seed=jitter_seed
    )
    # Validation windows do not overlap: each frame counts once, and the same ones in each epoch.
    val_windows = WindowDataset(corpus, val, ctx=flags.ctx, stride=flags.ctx)
    for line in corpus.summary.lines():
        console.line(line)
    console.line(
        f"windows  train={len(train_windows)}, val={len(val_windows)} (ctx={flags.ctx}, "
        f"step={flags.step}, jitter={'on' if flags.jitter else 'off'}); validation: {train.rule}"
    )
    if not len(val_windows):
        console.problem("no validation windows: val will be n/a and no best checkpoint is kept")
    # Without `jitter`: with it and without, a window has the same number and about the same place.
    identity = {
        "files": corpus.fingerprint(),
        "split": train.fingerprint() + val.fingerprint(),
        "ctx": flags.ctx,
        "step": flags.step,
        "seed": flags.seed,
        "frame_rate": corpus.frame_rate,
        "side_codebooks": corpus.side_codebooks,
    }
    return corpus, train_windows, val_windows, identity


def settle_data_change(
    flags: argparse.Namespace,
    state: TrainState,
    saved: dict[str, Any],
    found: dict[str, Any],
    console: Console,
) -> None:
    """Refuse to resume on other windows, or with --allow-data-change begin the epoch anew."""
    changed = [name for name in found if saved.get(name) != found[name]]
    if not changed:
        return
    said = ", ".join(f"{n} {saved.get(n)} -> {found[n]}" for n in changed)
    if not flags.allow_data_change:
        raise CheckpointError(
            f"the data is not the data of the saved run ({said}); restore it, or pass "
            "--allow-data-change to go on with what is there now, from the start of this epoch"
        )
    progress = state.progress
    console.problem(f"the data changed ({said}); epoch {progress.epoch + 1} starts anew")
    state.guard.forget()
    state.ladder.forget_windows()
    progress.position = progress.epoch_steps = progress.epoch_refused = 0
    progress.epoch_loss = progress.epoch_seconds = 0.0


def pick_architecture(
    flags: argparse.Namespace,
    checkpoint: dict[str, Any] | None,
    source: str,
    vocab_sizes: tuple[int, ...],
    world: World = ALONE,
) -> tuple[ModelConfig, dict[str, Any] | None]:
    """Of the checkpoint, of --init-from, or of the flags, in that order; and --init-from's file."""
    initial = None
    if checkpoint is None and flags.init_from:
        if world.is_first:
            initial = load_checkpoint(flags.init_from, needed=WEIGHTS_KEYS)
        initial = world.share(initial)
    saved = checkpoint or initial
    if saved is not None and not flags.ignore_arch:
        config = ModelConfig.from_dict({**saved["architecture"], "dropout": flags.dropout})
    else:
        names = ("d_model", "layers", "heads", "dropout", "qk_norm", "pattern", "depth_layers")
        try:
            config = ModelConfig(vocab_sizes, **{name: getattr(flags, name) for name in names})
        except ValueError as error:
            raise UsageError(str(error)) from error
    fits = len(config.vocab_sizes) == len(vocab_sizes) and all(
        have <= v for have, v in zip(vocab_sizes, config.vocab_sizes, strict=False)
    )
    if not fits:
        raise CheckpointError(
            f"{source or flags.init_from}: a model of vocab sizes {list(config.vocab_sizes)}, the "
            f"data has {list(vocab_sizes)}; see --codebooks, or start anew with --no-resume"
        )
    return config, initial


def new_model(flags: argparse.Namespace, config: ModelConfig) -> CodesTransformer:
    """With fresh weights, and what the flags say of training it."""
    return CodesTransformer(
        config,
        grad_checkpoint=flags.grad_checkpoint,
        embed_grad=flags.embed_grad,
        code_dropout=flags.code_dropout,
        depth_share=flags.depth_share,
    )


def first_state(
    flags: argparse.Namespace,
    config: ModelConfig,
    initial: dict[str, Any] | None,
    amp_dtype: torch.dtype | None,
    device: torch.device,
    world: World,
) -> TrainState:
    """With fresh weights, or the EMA weights of --init-from's file."""
    torch.manual_seed(flags.seed)
    model = new_model(flags, config)
    if not shards(flags, world):  # else it need not fit there whole
        model.to(device)
    if initial is not None:
        load_weights(model, initial["ema"], flags.init_from, world)
    return build_state(flags, model, amp_dtype, device, world)


def build_state(
    flags: argparse.Namespace,
    model: CodesTransformer,
    amp_dtype: torch.dtype | None,
    device: torch.device,
    world: World = ALONE,
) -> TrainState:
    """Optimizer, scaler, EMA and guard around a model, which is sharded first if it shall be."""
    average = copy.deepcopy(model)
    if shards(flags, world):
        check_shardable(flags, model, amp_dtype)
        for each in (model, average):
            world.shard(each, blocks_of(each), device)
    optimizer = build_optimizer(
        model,
        optim=flags.optim,
        lr=flags.lr,
        weight_decay=flags.weight_decay,
        decay_all=flags.decay_all,
        fused=flags.fused_optim,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    memory = max(32, round(1 / (1 - flags.outlier_ema_beta)))
    guard = Guard(model.config.vocab_sizes, factor=flags.outlier_skip_factor, memory=memory)
    ema = Ema(model, flags.ema, average)
    return TrainState(model, ema, optimizer, scaler, guard, Progress())


def blocks_of(model: CodesTransformer) -> list[Block]:
    """The backbone's and those of depth."""
    return [m for m in model.modules() if isinstance(m, Block)]


def check_shardable(
    flags: argparse.Namespace, model: CodesTransformer, amp_dtype: torch.dtype | None
) -> None:
    """Raise UsageError for what --parallel fsdp cannot do."""
    if amp_dtype is torch.float16:
        raise UsageError("--parallel fsdp has no loss scaler for fp16; use bf16 or --no-amp")
    if flags.compile_mode == "reduce-overhead":
        raise UsageError(
            "--parallel fsdp moves the weights that CUDA graphs would hold in place; use another "
            "--compile-mode"
        )
    if not all(p.numel() for p in model.parameters()):
        raise UsageError(
            "--parallel fsdp cannot share the empty table that --pattern depth has for one "
            "codebook; use --parallel ddp or --pattern parallel"
        )


def shards(flags: argparse.Namespace, world: World) -> bool:
    """Whether each process shall hold a part of the state."""
    return world.size > 1 and flags.parallel == "fsdp"


def build_loader(
    flags: argparse.Namespace, windows: WindowDataset, order: Sampler[Any], device: torch.device
) -> DataLoader[Tensor]:
    """Micro-batches in the epoch's order; the dataset itself gathers a batch."""
    workers = flags.num_workers
    return DataLoader(
        windows,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        persistent_workers=flags.persistent_workers and workers > 0,
        prefetch_factor=flags.prefetch if workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_trainer,
        generator=torch.Generator(),  # of its own: the global one is dropout's, and exact on resume
    )


def leave_signals_to_the_trainer(_: int) -> None:
    """In a loader process: a group of its own, so that Ctrl-C and the like reach the trainer alone.

    SIGTERM gets its default action back: with it the trainer ends its loaders. If the trainer is
    killed the kernel kills them, else they could outlive it and hold the folder's lock.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def compile_losses(run: Run) -> None:
    """Switch to compiled losses after one trial step; where that fails, say so and stay eager."""
    state, failure = run.state, None
    eager, scaler = run.losses, state.scaler
    state.scaler = torch.amp.GradScaler(run.device.type, enabled=False)  # the trial leaves no trace
    options = {"mode": run.flags.compile_mode, "fullgraph": True}
    blocks = blocks_of(state.model) if run.world.is_sharded else []
    for block in blocks:  # between them their weights are put together, by code for no compiler
        vars(block)["forward"] = torch.compile(block.forward, **options)
    run.losses = eager if blocks else torch.compile(eager, **options)
    run.compiled = True
    started = time.perf_counter()
    try:
        with rng_kept():
            trial = run.train_windows[np.zeros(run.flags.batch, dtype=np.int64)]
            accumulate(run, itertools.repeat(trial))
        run.console.detail(f"compiled in {time.perf_counter() - started:.0f} s")
    except torch.OutOfMemoryError:
        tell_out_of_memory(run)
        raise
    except Exception as error:  # the compiler can fail in any way; training need not
        failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    finally:
        state.scaler = scaler
        state.optimizer.zero_grad(set_to_none=True)
    if (failure := run.world.first(failure)) is not None:
        run.losses, run.compiled = eager, False
        for block in blocks:
            del vars(block)["forward"]
        run.console.problem(f"torch.compile failed, going on without it ({failure})")


# --- the loop ------------------------------------------------------------------------------------


def train(run: Run) -> int:
    """Epochs until the run is finished, or stopped by a signal or by the guard; the exit code.

    An epoch may turn out to lie behind the run, after a rollback.
    """
    p = run.state.progress
    if run.is_finished() and p.validated_step == p.step:
        run.console.line(f"Nothing to do: the run was finished at step {p.step}.")
        return EXIT_DONE
    while True:
        epoch_complete = take_steps(run)
        if run.guard_stop is not None:
            return stopped_by_guard(run)
        if run.stop.signal is not None or not close_epoch(run, complete=epoch_complete):
            return interrupted(run)
        if run.is_finished() and p.validated_step == p.step:
            return finished(run)


def take_steps(run: Run) -> bool:
    """Step until the epoch, the run or the time ends or validation is due; True at epoch's end."""
    p, ladder = run.state.progress, run.state.ladder
    batches, end = read_on(run)
    while p.position + run.windows_per_step <= end:
        if run.is_finished() or run.stop.signal is not None or run.guard_stop is not None:
            break
        if validation_due(run, complete=False):
            break
        keep, cools = ladder.keep_due(p.step, p.schedule_steps), cooldown_begins(run)
        if keep or cools:  # a run can be extended from the archive of before its cooldown
            reason = save(run, ring=keep, archive=cools, spare=not cools)
            if reason is not None:
                roll_back(run, reason)
                batches, end = read_on(run)
                continue
            p.cooling = p.cooling or cools
        started = time.perf_counter()
        stats = train_step(run, batches)
        seconds = agree(run, time.perf_counter() - started)
        p.seconds += seconds
        p.epoch_seconds += seconds
        p.log_seconds += seconds
        if stats.refused is None:
            report_step(run, stats)
        elif handle_refusal(run, stats):
            batches, end = read_on(run)
        check_save(run)
        if run.stop.save:
            save(run)
    run.console.end_epoch()
    return p.position + run.windows_per_step > end


def agree(run: Run, seconds: float = 0.0) -> float:
    """Settle what the shared state does not say: signals, and clocks, where rank 0's counts.

    Returns rank 0's seconds. Every process decides by what is settled here, so all do the same.
    """
    stop, world, every = run.stop, run.world, run.flags.save_every_minutes
    due = 0 < every < (time.perf_counter() - run.last_save) / 60
    if world.size == 1:
        stop.settle(0, due)
        return seconds
    clock = (float(due), seconds) if world.is_first else (0.0, 0.0)
    number_, asked, due, seconds = world.largest(*stop.news(), *clock)
    stop.settle(int(number_), bool(asked or due))
    return seconds


def read_on(run: Run) -> tuple[Iterator[Tensor], int]:
    """The epoch's micro-batches from the present position on, and the epoch's number of windows."""
    p, order = run.state.progress, run.order
    order.epoch, order.start = p.epoch, p.position
    done, end = p.position // run.windows_per_step, order.end()
    run.console.end_epoch()
    run.console.start_epoch(p.epoch + 1, run.flags.epochs, done, end // run.windows_per_step)
    if run.flags.num_workers and not run.flags.persistent_workers:
        # A process forked now would hold the half-written file open, and its space, for an epoch.
        check_save(run, wait=True)
    batches = iter(run.loader)
    # torch's handler would raise for a dead loader in the middle of a step, where nothing can be
    # saved; without it the next micro-batch does, between two steps.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return name_dead_loaders(batches), end


def name_dead_loaders(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same micro-batches; a pipe that broke is a loader that died, and no fault of a disk."""
    try:
        yield from batches
    except (ConnectionError, EOFError) as error:
        raise RuntimeError(f"a loader process died: {error}") from error


def report_step(run: Run, stats: StepStats) -> None:
    """Move the bar; every --log-lr-steps a console line and a metrics row."""
    p, flags = run.state.progress, run.flags
    frames_per_s = p.log_steps * run.windows_per_step * flags.ctx / max(p.log_seconds, 1e-9)
    run.console.advance(stats.loss, stats.lr, frames_per_s, run.seconds_left())
    if p.step % flags.log_lr_steps:
        return
    row = run.metrics.write(
        "step",
        step=p.step,
        epoch=p.epoch + 1,
        loss=p.log_loss / p.log_steps,
        lr=stats.lr,
        grad_norm=stats.grad_norm,
        frames_per_s=round(frames_per_s, 1),
        skipped=run.state.guard.refused,
        seconds=round(p.seconds, 3),
    )
    total = 0 if flags.max_seconds else run.planned_steps
    run.console.line(step_line(row, total, run.seconds_left()))
    p.log_loss, p.log_steps, p.log_seconds = 0.0, 0, 0.0


def handle_refusal(run: Run, stats: StepStats) -> bool:
    """Log a refused step with its windows, and climb the ladder if due; True after a rollback."""
    p, state = run.state.progress, run.state
    used = run.order.permutation(p.epoch)[p.position - run.windows_per_step : p.position]
    run.metrics.write(
        "skip",
        step=p.step + 1,
        epoch=p.epoch + 1,
        reason=stats.refused,
        loss=stats.loss,
        ce=stats.ce,
        grad_norm=stats.grad_norm,
        windows=run.train_windows.describe(used, p.epoch),
    )
    run.console.problem(f"step {p.step + 1} refused, nothing changed: {stats.refused}")
    if stats.is_overflow:
        if state.scaler.get_scale() < SMALLEST_SCALE:
            save(run)
            finish_save(run)
            run.guard_stop = (
                "fp16 gradients overflow at every scale; use --amp-dtype bf16 or --no-amp"
            )
        return False
    state.ladder.refuse(used)
    trouble = state.ladder.trouble(state.guard.refused_in_a_row)
    return trouble is not None and roll_back(run, trouble)


# --- rollback ------------------------------------------------------------------------------------

# Of the present, not of the state gone back to: clocks run on, and `best` is still on the disk.
NOT_ROLLED_BACK = ("seconds", "elapsed", "best_val", "best_epoch", "validated_seconds")


def roll_back(run: Run, reason: str) -> bool:
    """Return to an older state with a lower lr and other data; False where the run stops instead.

    Where no step checkpoint can be read, the present state goes on with the lower lr.
    """
    check_save(run, wait=True)  # the ring is read, and the best value kept, as they are on disk
    state, p, flags, ladder = run.state, run.state.progress, run.flags, run.state.ladder
    if flags.panic_snapshot:
        snapshot(run)
    event, refused, kept = p.step, state.guard.refused, {n: getattr(p, n) for n in NOT_ROLLED_BACK}
    if not ladder.may_roll_back(event):
        run.guard_stop = f"{reason}, after {MAX_ROLLBACKS} rollbacks"
        return False
    suspects, scale, was_goal = last_windows(run), p.lr_scale, p.lr_goal
    goal = was_goal
    found = find_retreat(run)
    if found is None:
        state.guard.forget()
    else:
        checkpoint, path = found
        restore(state, checkpoint, path, run.world)
        # The lr that this state was sound with may be lower than what another --lr asks now.
        goal = min(goal, p.lr_goal * checkpoint["flags"]["lr"] / flags.lr)
    for name, value in kept.items():
        setattr(p, name, value)
    # Trouble that comes back once the lr has, and not before, is the lr's.
    came_back = bool(ladder.events) and scale >= was_goal
    p.lr_goal = goal * (flags.panic_lr_mul if came_back else 1.0)
    p.lr_scale = min(scale, p.lr_goal) * flags.panic_lr_mul
    state.guard.refused = refused
    state.optimizer.zero_grad(set_to_none=True)
    place = {"epoch": p.epoch, "position": p.position, "windows": run.order.num_windows}
    ladder.roll_back(event, p.step, suspects=suspects, **place)
    report_rollback(run, event, reason, found[1] if found else None)
    save(run)
    check_save(run, wait=True)  # as long as `latest` is the old one, it may need what goes now
    if run.world.is_first:
        run.files.prune_ring(newest=p.step)
    return True


def last_windows(run: Run) -> np.ndarray[Any, Any]:
    """Windows of the epoch's last SUSPECT_STEPS steps, but a quarter of the epoch at most."""
    p, order = run.state.progress, run.order
    count = min(SUSPECT_STEPS * run.windows_per_step, order.num_windows // 4)
    return order.permutation(p.epoch)[max(0, p.position - count) : p.position]


def find_retreat(run: Run) -> tuple[dict[str, Any], str] | None:
    """The step checkpoint to go back to and its name; rank 0 reads it for all."""
    found = read_retreat(run) if run.world.is_first else None
    checkpoint = run.world.share(found[0] if found else None)
    return (checkpoint, run.world.from_first(found[1] if found else "")) if checkpoint else None


def read_retreat(run: Run) -> tuple[dict[str, Any], str] | None:
    """The ladder's first choice that can be read and fits."""
    for step in run.state.ladder.retreats(run.state.progress.step, run.files.ring_steps()):
        path = run.files.ring_file(step)
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            run.console.problem(f"{error}\n  trying an older one")
            continue
        shapes = {n: t.shape for n, t in run.state.model.state_dict().items()}
        fits = shapes == {n: t.shape for n, t in checkpoint["model"].items()}
        if fits and checkpoint["data"] == run.data:
            return checkpoint, path.name
        run.console.problem(f"{path}: of other data or another architecture; trying an older one")
    return None


def report_rollback(run: Run, event: int, reason: str, file: str | None) -> None:
    """Metrics row and console line of a rollback that has just happened."""
    p, detour = run.state.progress, run.state.ladder.detours[-1]
    run.metrics.write(
        "rollback",
        step=event,
        epoch=p.epoch + 1,
        to_step=p.step,
        file=file,
        lr_scale=p.lr_scale,
        reason=reason,
        skipped_windows=len({*detour["suspects"], *detour["barred"]}),
        rollbacks=len(run.state.ladder.events),
    )
    where = f"back to step {p.step}" if file else "no step checkpoint could be read, going on"
    run.console.problem(
        f"{reason} at step {event}; {where}, lr is scaled by {p.lr_scale:g} now, the windows "
        "before are left out"
    )


def snapshot(run: Run) -> None:
    """Keep the state before a rollback for diagnosis."""
    checkpoint = checkpoint_of(run)
    if not run.world.is_first:
        return
    try:
        save_checkpoint(checkpoint, run.files.panic_snapshot(run.state.progress.step))
    except OSError as error:
        run.console.problem(f"snapshot failed, training goes on: {error}")


# --- ends of epochs and of the run ---------------------------------------------------------------


def close_epoch(run: Run, *, complete: bool) -> bool:
    """Validate if due, report, keep `latest`, `best` and archives; False when a signal cut in."""
    p, flags = run.state.progress, run.flags
    if (reason := unsound(run)) is not None:  # before an epoch is counted that must be repeated
        quarantine(run, reason)
        roll_back(run, reason)
        return True
    started = time.perf_counter()
    epoch = p.epoch + 1
    is_last = run.is_finished() or (complete and epoch >= flags.epochs)
    is_best = False
    if is_last or validation_due(run, complete=complete):
        result = evaluate(run)
        if result is None:
            return False
        p.validated_step, p.validated_seconds = p.step, p.seconds
        check_save(run, wait=True)  # if it fails, the best value is not what it was
        is_best = result.val < p.best_val  # never true for NaN
        if is_best:
            p.best_val, p.best_epoch = result.val, epoch
        report_epoch(run, result, is_best=is_best, evaluation_seconds=time.perf_counter() - started)
    if complete:
        p.epoch, p.position = epoch, 0
        p.epoch_loss = p.epoch_seconds = 0.0
        p.epoch_steps = p.epoch_refused = 0
    archive = complete and flags.archive_every > 0 and epoch % flags.archive_every == 0
    ring = complete and run.state.ladder.keep_due(p.step, p.schedule_steps)
    save(run, is_best=is_best, archive=archive, ring=ring)
    if complete and flags.eval_audio_every and epoch % flags.eval_audio_every == 0:
        write_samples(run)
    return True


def validation_due(run: Run, *, complete: bool) -> bool:
    """By training seconds where --val-every-seconds says so, else at the end of epochs."""
    p, flags = run.state.progress, run.flags
    if every := flags.val_every_seconds:
        return p.seconds // every > p.validated_seconds // every
    return complete and (p.epoch + 1) % flags.val_every == 0


def report_epoch(run: Run, result: Validation, *, is_best: bool, evaluation_seconds: float) -> None:
    """Console summary and metrics row of an epoch, or of its part when the run ends within it."""
    p = run.state.progress
    steps = max(p.epoch_steps, 1)
    frames = p.epoch_steps * run.windows_per_step * run.flags.ctx
    row = run.metrics.write(
        "epoch",
        step=p.step,
        epoch=p.epoch + 1,
        train=p.epoch_loss / steps if p.epoch_steps else math.nan,
        val=result.val,
        val_obj=result.val_obj,
        ppl=perplexity(result.val),
        val_per_codebook=result.per_codebook,
        frames_per_s=round(frames / max(p.epoch_seconds, 1e-9), 1),
        seconds=round(p.seconds, 3),
        skipped=p.epoch_refused,
    )
    elapsed = p.elapsed + time.perf_counter() - run.started
    wall = p.epoch_seconds + evaluation_seconds
    for line in epoch_lines(row, wall, elapsed, is_best=is_best):
        run.console.line(line)


def interrupted(run: Run) -> int:
    """Save where a signal stopped the run, and say how to go on."""
    number_ = run.stop.signal or signal.SIGTERM
    where = f"saved {run.files.latest} at step {run.state.progress.step}"
    if save(run) is not None:
        where = f"{run.files.latest} is the last sound state"
    finish_save(run)
    run.console.line(
        f"Stopped by {signal.Signals(number_).name}; {where}. The same command goes on from there."
    )
    return 128 + number_


def stopped_by_guard(run: Run) -> int:
    """Leave `latest` at the last sound save, and say what to look at."""
    check_save(run, wait=True)
    run.metrics.write("end", step=run.state.progress.step, reason=run.guard_stop)
    run.console.problem(
        f"Stopped by the guard at step {run.state.progress.step}: {run.guard_stop}. "
        f"{run.files.latest} is the last sound save. See what happened with\n"
        f"  python ckpt_doctor.py {run.files.folder}\n"
        f"and the refused windows in {run.files.metrics}. The same command goes on from there, "
        f"with lr scaled by {run.state.progress.lr_scale:g}, and --lr sets another peak."
    )
    return EXIT_GUARD


def finished(run: Run) -> int:
    """See the last save to its end, and say what there is."""
    p = run.state.progress
    finish_save(run)
    if run.world.is_first:
        run.files.remove_ring()
    run.metrics.write("end", step=p.step, best_val=p.best_val, seconds=round(p.seconds, 3))
    run.console.line(
        f"Done at step {p.step}: best val {number(p.best_val)} of epoch {p.best_epoch} in "
        f"{run.files.best}, last state in {run.files.latest}"
    )
    return EXIT_DONE


def train_or_save(run: Run) -> int:
    """`train`; if it fails between two steps, what was reached is saved first."""
    try:
        return train(run)
    except Exception as error:
        run.console.end_epoch()
        if not run.world.go_alone():
            raise
        run.stop.settle(run.stop.received or 0, False)
        if run.stop.signal is not None and run.between_steps:
            return interrupted(run)  # the signal went to every process, and ended a loader too
        if run.between_steps and not isinstance(error, OSError):
            run.console.problem(f"failed at step {run.state.progress.step}; saving first")
            save(run)
            finish_save(run)
        if is_out_of_memory(error):
            tell_out_of_memory(run)
        raise
    finally:
        with contextlib.suppress(OSError):
            check_save(run, wait=True)
        run.metrics.close()


# --- planning ------------------------------------------------------------------------------------


def plan(flags: argparse.Namespace, explicit: dict[str, Any], console: Console) -> int:
    """Say what the run would take: nothing is trained, locked, moved or restored."""
    checkpoint, source = look_for_checkpoint(flags)
    flags = settle_flags(flags, explicit, checkpoint, console)
    device = planned_device(flags)
    if flags.data:
        corpus, train_windows, *_ = open_data(flags, console)
        windows, vocab_sizes = len(train_windows), corpus.vocab_sizes
    else:
        windows, vocab_sizes = 0, (1024,) * (flags.codebooks or 9)
        if checkpoint is not None:
            vocab_sizes = tuple(checkpoint["architecture"]["vocab_sizes"])
        console.line(f"data     none named (--data): {len(vocab_sizes)} codebooks are assumed")
    config, _ = pick_architecture(flags, checkpoint, source, vocab_sizes)
    asked = plan_of(flags, config, device)
    console.lines(asked.settle_batch(explicit, ALONE))
    console.lines(asked.step_lines())
    console.lines(asked.memory_lines(is_new=checkpoint is None))
    console.lines(asked.time_lines())
    if windows:
        check_windows(flags, windows)
        console.lines(asked.run_lines(windows))
    lines, problem = asked.disk_lines(windows)
    console.lines(lines)
    if problem is not None:
        console.problem(problem)
    return EXIT_DONE


def plan_of(flags: argparse.Namespace, config: ModelConfig, device: torch.device) -> Plan:
    """Of a run on a device, here or not."""
    return Plan(flags, config, device, pick_amp_dtype(flags, device), new_state)


def new_state(flags: argparse.Namespace, config: ModelConfig) -> TrainState:
    """With fresh weights, whole, on torch's default device."""
    return build_state(flags, new_model(flags, config), None, torch.device("cpu"))


def planned_device(flags: argparse.Namespace) -> torch.device:
    """The device asked for, here or not, or the best one here."""
    try:
        return torch.device(flags.device) if flags.device else pick_device(None)
    except RuntimeError as error:
        raise UsageError(f"--device: expected cuda, mps or cpu, found {flags.device!r}") from error


def look_for_checkpoint(flags: argparse.Namespace) -> tuple[dict[str, Any] | None, str]:
    """As `read_checkpoint`, but a damaged `latest` stays where it is."""
    if flags.resume:
        return load_checkpoint(flags.resume), flags.resume
    files = None if flags.no_resume else find_run(flags.save_dir, flags.tag, flags.codebooks)
    if files is None:
        return None, ""
    try:
        return load_checkpoint(files.latest), str(files.latest)
    except CheckpointError:
        return load_checkpoint(files.previous), str(files.previous)


def tell_out_of_memory(run: Run) -> None:
    """What the user can change; the error itself is raised on."""
    lines = plan_of(run.flags, run.state.model.config, run.device).advice()
    run.console.problem(
        "\n  ".join(["out of memory; the same step in less, by prediction:", *lines])
    )


# --- main ----------------------------------------------------------------------------------------


def announce(run: Run, source: str, *, resumed: bool) -> None:
    """Start-up details, and the first metrics row of this process."""
    p, model, flags = run.state.progress, run.state.model, run.flags
    config = model.config
    precision = str(run.amp_dtype).removeprefix("torch.") if run.amp_dtype else "float32"
    flops = model.flops_per_frame(flags.ctx)
    run.console.detail(f"vocab    {list(config.vocab_sizes)}")
    run.console.detail(
        f"model    {config.d_model} wide, {config.layers} layers, {config.heads} heads: "
        f"{model.num_parameters() / 1e6:.2f} M parameters, {flops / 1e6:.1f} MFLOP a trained frame"
    )
    run.console.detail(f"device   {run.device}, {precision}" + parallel_words(run))
    run.console.detail(
        f"plan     {run.steps_per_epoch} steps per epoch (batch {flags.batch} x accum "
        f"{flags.accum}), {run.planned_steps} in all"
        + (f" or {flags.max_seconds:g} training seconds" if flags.max_seconds else "")
    )
    if flags.init_from and not resumed:
        run.console.line(f"weights  EMA weights of {flags.init_from}")
    event = "resume" if resumed else "start"
    run.metrics.write(event, step=p.step, epoch=p.epoch + 1, source=source, flags=vars(flags))


def parallel_words(run: Run) -> str:
    """`, 4 processes (ddp)`, or nothing for one."""
    return f", {run.world.size} processes ({run.flags.parallel})" if run.world.size > 1 else ""


def main(argv: list[str] | None = None) -> int:
    """Join, parse, lock the folder, train; errors become one message and an exit code."""
    world = World()
    try:
        world = join()
        with world.one_voice():
            flags, explicit = parse_flags(argv)
        return train_as_one(flags, explicit, world)
    except (UsageError, PlanError) as error:
        return fail(world, EXIT_USAGE, str(error))
    except (CheckpointError, BadFilesError, NpqError, ParallelError, OSError) as error:
        return fail(world, EXIT_FAILED, str(error))
    except KeyboardInterrupt:
        told = "interrupted before the first step; no file of the run was changed"
        return fail(world, 128 + signal.SIGINT, told)
    except Exception as error:
        if world.store is None:
            raise
        lost = f"another process of the run died ({error}); torchrun names it below"
        return fail(world, EXIT_FAILED, lost if is_loss_of_peer(error) else traceback.format_exc())


def train_as_one(flags: argparse.Namespace, explicit: dict[str, Any], world: World) -> int:
    """Set up and train; rank 0 holds the folder and the console for all."""
    console = Console(quiet=flags.quiet and not flags.plan, silent=not world.is_first)
    if flags.quiet:
        warnings.filterwarnings("ignore")
    if flags.plan:
        return plan(flags, explicit, console) if world.is_first else EXIT_DONE
    with FolderLock(flags.save_dir) if world.is_first else contextlib.nullcontext():
        run = set_up(flags, explicit, console, world)
        run.stop.install()
        code = train_or_save(run)
        world.wait()
        return code


def fail(world: World, code: int, message: str) -> int:
    """Say why the run failed, once for all processes; the exit code of all."""
    told = world.first_failure(code)
    if told is not None:
        return told
    Console().problem(message if world.is_first else f"{world.name}: {message}")
    return code


if __name__ == "__main__":
    leave(main())
