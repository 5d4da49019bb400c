"""Turns flags into a run that is ready to train, or ready to be planned.

flags, explicit = parse_flags(argv)
run = set_up(flags, explicit, Console())
ready = prepare(flags, explicit, Console(), dry=True)   # for --plan
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cli.command_line import UsageError, in_words, shell_line
from cli.device import device_name, faster_thread_count, pick_device, tune_for
from model import ModelConfig
from npq_dataset import EpochOrder
from run_folder import wandb_log
from run_folder.checkpoint import BackgroundSaver, library_versions, rng_kept
from run_folder.files import RunFiles, run_name
from run_folder.flags import FLAGS, saved_flags, spelled
from run_folder.metrics import Console, MetricsLog, check_tensorboard, code_version
from sound.origin import another_codec
from training.building import (
    adapt_labels,
    codebook_weights,
    first_state,
    new_model,
    pick_amp_dtype,
    pick_architecture,
    plan_of,
    settle_amp_dtype,
)
from training.code_vectors import find_code_vectors
from training.data import Data, build_loader, open_data
from training.memory_prediction import gib
from training.objective import Objective
from training.parallel import ALONE, World
from training.planning import Plan
from training.regularization import settle_row_decay
from training.resume import find_checkpoint, forget_another_level, settle_data_change, settle_flags
from training.saving import restore
from training.schedule import settle_schedule
from training.state import StopRequest, TrainingRun, TrainState


@dataclass
class Prepared:
    """A run's flags, data and architecture, before its weights exist."""

    flags: argparse.Namespace  # without `auto`
    checkpoint: dict[str, Any] | None  # None for a new run
    source: str  # path of the checkpoint
    device: torch.device
    data: Data | None  # None only with --plan
    config: ModelConfig
    shares: list[float]  # [K], loss weight of each codebook
    initial: dict[str, Any] | None  # content of --init-from's file
    vectors: torch.Tensor | None  # [K, V, F] of the codec, that a new model begins from
    plan: Plan


def prepare(
    flags: argparse.Namespace,
    explicit: dict[str, Any],
    console: Console,
    world: World = ALONE,
    *,
    dry: bool = False,
) -> Prepared:
    """Determine flags, device, data and architecture of a run.

    `explicit` are the flags that the user gave. With `dry`, for --plan, nothing is written or
    moved, and device and data may be absent.

    Raises:
        UsageError, CheckpointError, ParallelError, BadFilesError: see the functions called.
    """
    checkpoint, source = find_checkpoint(flags, console, world, dry=dry)
    flags = settle_flags(flags, explicit, checkpoint, console)
    if dry:
        device = planned_device(flags)
    else:
        device = use_device(flags, world, resumed=checkpoint is not None)
    data, vocab_sizes = None, assumed_vocab_sizes(flags, checkpoint)
    if flags.data:
        with world.rank0_first():
            data = open_data(flags, console)
        vocab_sizes = data.corpus.vocab_sizes
    elif dry:
        console.line(f"data     none given (--data): {len(vocab_sizes)} codebooks are assumed")
    labels = data.corpus.labels.names if data is not None and data.corpus.labels else ()
    vectors, is_saved = None, (checkpoint or flags.init_from) and not flags.ignore_arch
    if data is not None and flags.code_vectors and not is_saved:
        with world.rank0_first():
            vectors, line = find_code_vectors(flags, data)
        console.line(line)
    features = 0 if vectors is None else vectors.shape[2]
    config, initial = pick_architecture(
        flags, checkpoint, source, vocab_sizes, labels, features, world
    )
    if initial is not None:
        console.lines(adapt_labels(initial, config))
    if data is not None and labels:
        data.number_labels(config.numbers_of(labels))
    weighting = flags.cb_weights, flags.cb_weights_auto_alpha
    shares = codebook_weights(*weighting, config.num_codebooks)
    if data and initial and (mismatch := another_codec(initial.get("data", {}), data.facts)):
        console.problem(f"--init-from {flags.init_from}: {mismatch}")
    plan = plan_of(flags, config, device)
    console.lines(plan.settle_batch(explicit, world))
    console.lines(settle_row_decay(flags, data.train if data else None, plan.model))
    if data is not None:
        check_accum(flags.accum, world)
        check_same(flags, data.facts, world)
        check_windows(flags, len(data.train), len(data.val), console)
    return Prepared(flags, checkpoint, source, device, data, config, shares, initial, vectors, plan)


def set_up(
    flags: argparse.Namespace, explicit: dict[str, Any], console: Console, world: World = ALONE
) -> TrainingRun:
    """Build a run that is ready to train: checkpoint, data, model, restored state.

    `explicit` are the flags that the user gave. Raises what `prepare` raises.
    """
    ready = prepare(flags, explicit, console, world)
    flags, checkpoint, device, data = ready.flags, ready.checkpoint, ready.device, ready.data
    assert data is not None
    check_size(flags, ready.config, device)
    amp_dtype, k = pick_amp_dtype(flags, device), ready.config.num_codebooks
    weights = torch.tensor(ready.shares, device=device)
    state = first_state(flags, ready.config, ready.initial, ready.vectors, amp_dtype, device, world)
    files = RunFiles(flags.save_dir, run_name(k, flags.tag))
    if checkpoint is not None:
        restore(state, checkpoint, ready.source, world)
        state.policy.load_state_dict(checkpoint.get("ladder", {}))
        settle_data_change(flags, state, checkpoint["data"], data.facts, ready.source, console)
        forget_another_level(flags, state.guard, saved_flags(checkpoint))
    if world.is_first:
        tidy(files, state, console, resumed=checkpoint is not None)
    state.policy.kept_step = world.from_first(state.policy.kept_step)
    order = EpochOrder(len(data.train), batch=flags.batch, accum=flags.accum, seed=flags.seed)
    order.changes = state.policy.order_changes

    written = files.metrics if world.is_first else None
    run = TrainingRun(
        flags=flags, device=device, amp_dtype=amp_dtype, console=console, files=files,
        metrics=MetricsLog(written, tensorboard=flags.tensorboard, step=state.progress.step),
        state=state, world=world, weights=weights,
        losses=Objective(state.model, flags.label_smoothing, weights), compiled=False,
        train_windows=data.train, val_windows=data.val, order=order, data=data.facts,
        loader=build_loader(flags, data.train, order, console, device, world),
        stop=StopRequest(world), saver=BackgroundSaver(console.problem),
        best_on_disk=(state.progress.best_val, state.progress.best_epoch),
    )  # fmt: skip
    run.metrics.history = checkpoint["history"] if checkpoint is not None else []
    settle_schedule(run, checkpoint)
    settle_threads(run, resumed=checkpoint is not None)
    start_wandb(run)
    announce(run, ready.source, resumed=checkpoint is not None)
    return run


# --- device ---------------------------------------------------------------------------------------


def use_device(flags: argparse.Namespace, world: World, *, resumed: bool) -> torch.device:
    """Choose and configure the device of this process, and create the folder of the run.

    Raises:
        UsageError: --data names no files, the device is absent, or TensorBoard or wandb is missing.
        OSError: the folder cannot be created.
    """
    if not flags.data:
        raise UsageError(
            "--data: expected .npq files to train on, found none; give a folder of them"
        )
    if flags.tensorboard:
        check_tensorboard(flags.save_dir)
    if flags.wandb and world.is_first:
        wandb_log.check_wandb()
    device = pick_device(flags.device, world.local_rank if world.size > 1 else None)
    settle_amp_dtype(flags, device, world, resumed=resumed)
    tune_for(device)
    os.makedirs(flags.save_dir, exist_ok=True)  # rank 0's lock creates it on its machine only
    return device


def planned_device(flags: argparse.Namespace) -> torch.device:
    """Return the device of --device, which may be absent, or the best one of this machine."""
    try:
        return torch.device(flags.device) if flags.device else pick_device(None)
    except RuntimeError as error:
        raise UsageError(f"--device: expected cuda, mps or cpu, found {flags.device!r}") from error


def settle_threads(run: TrainingRun, *, resumed: bool) -> None:
    """Choose the faster of one thread and all on a CPU, by a trial at the run's first start.

    A resumed run keeps the number, so that sums keep their order and its weights stay bit-exact.
    OMP_NUM_THREADS overrides both. The trial changes neither weights nor random state.
    """
    p, most = run.state.progress, torch.get_num_threads()
    if run.device.type != "cpu":
        return
    is_asked = "OMP_NUM_THREADS" in os.environ
    if resumed and not is_asked:
        if p.threads > most:
            run.console.problem(
                f"the run used {p.threads} threads, this machine has {most}: sums are rounded in "
                "another order from here on, so the weights will differ slightly"
            )
        torch.set_num_threads(min(p.threads or most, most))
    if resumed:
        return
    if most > 1 and run.world.size == 1 and not is_asked:
        codes = run.train_windows[np.zeros(run.flags.batch, dtype=np.int64)].long()

        def micro_batch() -> None:
            with run.autocast():
                objective = run.losses(codes).objective
            objective.backward()

        with rng_kept():
            count, times = faster_thread_count(micro_batch)
        run.state.optimizer.zero_grad(set_to_none=True)
        figures = ", ".join(f"{1e3 * t:.0f} ms with {n}" for n, t in sorted(times.items()))
        run.console.line(f"threads  {count}: a micro-batch takes {figures} (kept on every resume)")
    p.threads = torch.get_num_threads()


def start_wandb(run: TrainingRun) -> None:
    """With --wandb, start to send the metrics rows to it; a failure is printed in one line."""
    if run.flags.wandb and run.world.is_first:
        try:
            run.sender = wandb_log.start(run.files.metrics, run.flags.wandb, vars(run.flags))
        except OSError as error:
            run.console.problem(f"--wandb: training goes on without it: {in_words(error)}")


# --- checks ---------------------------------------------------------------------------------------


def assumed_vocab_sizes(
    flags: argparse.Namespace, checkpoint: dict[str, Any] | None
) -> tuple[int, ...]:
    """Return the vocab sizes [K] for a plan without data: the checkpoint's, or DAC's 1024 each."""
    if checkpoint is not None:
        return tuple(checkpoint["architecture"]["vocab_sizes"])
    return (1024,) * (flags.codebooks or 9)


def check_windows(flags: argparse.Namespace, train: int, val: int, console: Console) -> None:
    """Raise UsageError if the training windows make no step; warn if there are none to validate."""
    if not train and val:
        raise UsageError(
            "--val-list: expected some files, found all of the data; shorten it, so that others "
            "are left to train on"
        )
    if train < flags.batch * flags.accum:
        raise UsageError(
            f"{train} training windows are fewer than one step's --batch {flags.batch} x --accum "
            f"{flags.accum}; lower these, --ctx or --step, or add data"
        )
    if not val and flags.patience:
        raise UsageError(
            f"--patience {flags.patience:g}: expected validation windows, found none; lower --ctx, "
            "or name files with --val-list"
        )
    if not val:
        console.problem(
            "no validation windows: val will be n/a and no best checkpoint is kept"
            + ("; lower --ctx, or name files with --val-list" if flags.val_split else "")
        )


def check_size(flags: argparse.Namespace, config: ModelConfig, device: torch.device) -> None:
    """Raise UsageError if the weights alone exceed this machine's memory.

    Weights are made on the CPU, where Linux grants more memory than it has and later kills the
    process without a message.
    """
    with torch.device("meta"):
        model = new_model(flags, config)
    copies = 2 if device.type == "cpu" else 1  # the EMA is on the device
    needed = copies * sum(p.numel() * p.element_size() for p in model.parameters())
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        raise UsageError(
            f"--d_model {config.d_model} x --layers {config.layers}: the weights alone take "
            f"{gib(needed)}, this machine has {gib(present)}; lower these (--plan prints what fits)"
        )


def check_accum(accum: int, world: World) -> None:
    """Raise UsageError if `accum` is no multiple of the number of processes."""
    if accum % world.size:
        below = accum // world.size * world.size
        near = [str(n) for n in (below, below + world.size) if n]
        raise UsageError(
            f"--accum {accum}: expected a multiple of the {world.size} processes, which share the "
            f"micro-batches of a step evenly; use --accum {' or '.join(near)}"
        )


def check_same(flags: argparse.Namespace, data: dict[str, Any], world: World) -> None:
    """Raise ParallelError unless all processes have the same flags and data."""
    alike = [n for n, flag in FLAGS.items() if not flag.is_path and not flag.may_differ]
    facts = {spelled(name): getattr(flags, name) for name in alike}
    remedy = "start every machine with the same command, over the same files"
    # `codec` is left out: a copy of the data may lack the file that records it.
    known = {f"data {n}": v for n, v in data.items() if n != "codec"}
    world.check_same({**facts, **known}, remedy)


def tidy(files: RunFiles, state: TrainState, console: Console, *, resumed: bool) -> None:
    """Clean up the folder: remove leftovers of this run, or set an earlier run's files aside."""
    if resumed:
        files.prune_ring(newest=state.progress.step)
        if not files.ring_steps():  # the run had ended, or its version kept no step checkpoints
            state.policy.kept_step = None
    elif aside := files.set_aside():
        console.line(f"An earlier run's files were moved to {aside}")
    files.remove_leftovers()


def announce(run: TrainingRun, source: str, *, resumed: bool) -> None:
    """Print the start-up details and write the `start` or `resume` row of the metrics."""
    p, model, flags = run.state.progress, run.state.model, run.flags
    config = model.config
    precision = str(run.amp_dtype).removeprefix("torch.") if run.amp_dtype else "float32"
    flops = model.flops_per_frame(flags.ctx)
    codes = run.train_windows.frames * config.num_codebooks
    passes_a_step = run.passes_per_epoch / run.steps_per_epoch
    run.console.detail(f"vocab    {list(config.vocab_sizes)}")
    run.console.detail(
        f"model    {config.d_model} wide, {config.layers} layers, {config.heads} heads: "
        f"{model.num_parameters() / 1e6:.2f} M parameters, {flops / 1e6:.1f} MFLOP a trained "
        f"frame, {codes / model.num_parameters():.2g} codes a parameter"
    )
    if codes < model.num_parameters() and len(run.train_windows.tables) == 1 and not resumed:
        run.console.detail(
            "data     little for this model: encode_npq.py --offsets 4 makes more of it"
        )
    run.console.detail(f"device   {run.device}, {precision}" + parallel_words(run))
    run.console.detail(
        f"plan     {run.steps_per_epoch} steps per epoch (batch {flags.batch} x accum "
        f"{flags.accum}), {run.planned_steps} in all: "
        f"{run.planned_steps * passes_a_step:.3g} passes over the music"
        + (f" or {flags.max_seconds:g} training seconds" if flags.max_seconds else "")
    )
    if flags.init_from and not resumed:
        run.console.line(f"weights  EMA weights of {flags.init_from}")
    run.metrics.write(
        "resume" if resumed else "start",
        step=p.step,
        epoch=p.epoch + 1,
        source=source,
        command=shell_line(["python", *sys.argv]),
        planned_steps=run.planned_steps,
        passes_a_step=passes_a_step,
        flags=vars(flags),
        model={**config.to_dict(), "parameters": model.num_parameters()},
        data={**run.data["size"], "frame_rate": run.data["frame_rate"]},
        device=f"{device_name(run.device)}, {precision}" + parallel_words(run),
        libraries=library_versions(),
        code=code_version(Path(__file__).parent.parent),
    )


def parallel_words(run: TrainingRun) -> str:
    """Return `, 4 processes`, or an empty string for one process."""
    return f", {run.world.size} processes" if run.world.size > 1 else ""
