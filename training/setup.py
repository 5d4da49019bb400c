"""From flags to a run that is ready to step: checkpoint, device, data, model, restored state.

    flags, explicit = parse_flags(argv)
    run = set_up(flags, explicit, Console())

A resumed run keeps its saved flags, and over them those that were given; a banner tells each that
differs. Its architecture stays, and its data must be what it was.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cli.command_line import UsageError, problem
from cli.device import (
    PRECISIONS,
    device_name,
    fast_precision,
    faster_thread_count,
    pick_device,
    tune_for,
)
from model import CodesTransformer, ModelConfig
from npq_dataset import (
    Corpus,
    EpochOrder,
    Spans,
    WindowDataset,
    split_corpus,
)
from run_folder.checkpoint import (
    WEIGHTS_KEYS,
    CheckpointError,
    library_versions,
    load_checkpoint,
    rng_kept,
)
from run_folder.files import RunFiles, find_run, load_latest, run_name
from run_folder.metrics import Console, MetricsLog, check_tensorboard, code_version, number
from run_folder.shared_weights import load_parts
from sound.origin import codec_of
from training.ema import Ema
from training.guard import Guard
from training.loader import Loader, scan
from training.memory_prediction import gib
from training.optimizer import build_optimizer
from training.parallel import EveryNth, World
from training.planning import Plan
from training.saving import load_weights, restore
from training.schedule import schedule_words, settle_schedule
from training.state import Progress, Run, StopRequest, TrainState

# Flags that may differ from machine to machine: paths and the like.
MACHINE_FLAGS: tuple[str, ...] = ("data", "val_list", "save_dir", "resume", "init_from")
MACHINE_FLAGS += ("eval_outdir", "eval_dac_repo", "num_workers", "prefetch", "persistent_workers")
# A resumed run keeps these.
ARCHITECTURE_FLAGS: tuple[str, ...] = ("d_model", "layers", "heads", "codebooks", "pattern")
# Flags that shift loss or gradient norm: the guard learns their level anew when one changes.
LEVEL_FLAGS: tuple[str, ...] = ("label_smoothing", "dropout", "batch", "code_dropout", "accum")
LEVEL_FLAGS += ("cb_weights", "cb_weights_auto_alpha", "jitter")
# Flags of older versions that moved the loss or its gradient, with the value that did nothing.
GONE_FLAGS = {"z_loss": 0.0, "embed_grad": 1.0}
# What a run did that was saved before a flag existed, where that is not the flag's default.
BEFORE_THE_FLAG = {"jitter": False, "optim": "adamw", "pattern": "parallel"}
# Flags that belong to one command and not to the run: never restored from a checkpoint.
COMMAND_FLAGS: tuple[str, ...] = ("save_dir", "resume", "no_resume", "init_from", "ignore_arch")
COMMAND_FLAGS += ("allow_data_change", "effective_batch", "plan", "memory_gb", "device_tflops")
COMMAND_FLAGS += ("mfu", "debug")
AUTO_FLAGS: tuple[str, ...] = ("batch", "amp_dtype")
BUDGET_FLAGS: tuple[str, ...] = ("epochs", "max_steps", "max_seconds")

ALONE = World()


def set_up(
    flags: argparse.Namespace, explicit: dict[str, Any], console: Console, world: World = ALONE
) -> Run:
    """From flags to a run that is ready to step: checkpoint, data, model, restored state."""
    checkpoint, source = find_checkpoint(flags, console, world)
    flags = settle_flags(flags, explicit, checkpoint, console)
    if not flags.data:
        raise UsageError("--data: expected .npq files to train on, found none; name some")
    if flags.tensorboard:
        check_tensorboard()
    device = pick_device(flags.device, world.local_rank if world.size > 1 else None)
    settle_amp_dtype(flags, device, world, resumed=checkpoint is not None)
    amp_dtype = pick_amp_dtype(flags, device)
    tune_for(device)

    os.makedirs(flags.save_dir, exist_ok=True)  # on a machine without rank 0 it may be new
    with world.rank0_first():
        corpus, train_windows, val_windows, data = open_data(flags, console)
    config, initial = pick_architecture(flags, checkpoint, source, corpus.vocab_sizes, world)
    if initial is not None and (said := another_codec(initial.get("data", {}), data)):
        console.problem(f"--init-from {flags.init_from}: {said}")
    console.lines(plan_of(flags, config, device).settle_batch(explicit, world))
    check_accum(flags.accum, world)
    check_same(flags, data, world)
    check_windows(flags, len(train_windows), len(val_windows), console)
    check_size(flags, config, device)
    order = EpochOrder(len(train_windows), batch=flags.batch, accum=flags.accum, seed=flags.seed)
    shares = codebook_weights(flags.cb_weights, flags.cb_weights_auto_alpha, corpus.num_codebooks)
    weights = torch.tensor(shares, device=device)
    state = first_state(flags, config, initial, amp_dtype, device, world)
    files = RunFiles(flags.save_dir, run_name(config.num_codebooks, flags.tag))
    if checkpoint is not None:
        restore(state, checkpoint, source, world)
        state.policy.load_state_dict(checkpoint.get("ladder", {}))
        settle_data_change(flags, state, checkpoint["data"], data, source, console)
        forget_another_level(flags, state.guard, saved_flags(checkpoint))
    if world.is_first:
        tidy(files, state, console, resumed=checkpoint is not None)
    state.policy.kept_step = world.from_first(state.policy.kept_step)
    order.changes = state.policy.order_changes

    written = files.metrics if world.is_first else None
    run = Run(
        flags=flags, device=device, amp_dtype=amp_dtype, console=console, files=files,
        metrics=MetricsLog(written, tensorboard=flags.tensorboard, step=state.progress.step),
        state=state, world=world,
        losses=functools.partial(
            state.model.losses, label_smoothing=flags.label_smoothing, weights=weights,
        ),
        compiled=False, train_windows=train_windows, val_windows=val_windows, order=order,
        weights=weights,
        loader=build_loader(flags, train_windows, order, console, device, world), data=data,
        stop=StopRequest(world),
        best_on_disk=(state.progress.best_val, state.progress.best_epoch),
    )  # fmt: skip
    run.metrics.history = checkpoint["history"] if checkpoint is not None else []
    settle_schedule(run, checkpoint)
    settle_threads(run, resumed=checkpoint is not None)
    announce(run, source, resumed=checkpoint is not None)
    return run


def check_windows(flags: argparse.Namespace, train: int, val: int, console: Console) -> None:
    """Raise UsageError where training windows make no step; say where none validate."""
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
    if not val:
        console.problem(
            "no validation windows: val will be n/a and no best checkpoint is kept"
            + ("; lower --ctx, or name files with --val-list" if flags.val_split else "")
        )


def check_size(flags: argparse.Namespace, config: ModelConfig, device: torch.device) -> None:
    """Raise UsageError where the weights alone are more than this machine has memory.

    They are made on its CPU, and Linux gives memory that it has not, and kills without a word.
    """
    with torch.device("meta"):
        model = new_model(flags, config)
    copies = 2 if device.type == "cpu" else 1  # with the EMA
    needed = copies * sum(p.numel() * p.element_size() for p in model.parameters())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UsageError(
            f"--d_model {config.d_model} x --layers {config.layers}: the weights alone take "
            f"{gib(needed)}, this machine has {gib(there)}; lower these (--plan tells what fits)"
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


def check_same(flags: argparse.Namespace, data: dict[str, Any], world: World) -> None:
    """See that every process has the same flags and data; raises ParallelError."""
    facts = {f"--{n}": v for n, v in vars(flags).items() if n not in MACHINE_FLAGS}
    remedy = "start every machine with the same command, over the same files"
    known = {f"data {n}": v for n, v in data.items() if n != "codec"}  # a copy may lack its record
    world.check_same({**facts, **known}, remedy)


def tidy(files: RunFiles, state: TrainState, console: Console, *, resumed: bool) -> None:
    """Remove or set aside what an earlier run, or an earlier part of this one, has left."""
    if resumed:
        files.prune_ring(newest=state.progress.step)
        if not files.ring_steps():  # of a run that had ended, or of a version without a ring
            state.policy.kept_step = None
    elif aside := files.set_aside():
        console.line(f"An earlier run's files were moved to {aside}")
    files.remove_leftovers()


def forget_another_level(flags: argparse.Namespace, guard: Guard, saved: dict[str, Any]) -> None:
    """Let the guard learn anew where flags move loss or gradient norm to another level."""
    now = vars(flags)
    moved = any(now[name] != saved.get(name, now[name]) for name in LEVEL_FLAGS)
    if moved or gone_flags(saved):
        guard.forget()


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
    run.metrics.write(
        "resume" if resumed else "start",
        step=p.step,
        epoch=p.epoch + 1,
        source=source,
        command=shlex.join(["python", *sys.argv]),
        planned_steps=run.planned_steps,
        flags=vars(flags),
        model={**config.to_dict(), "parameters": model.num_parameters()},
        data={**run.data["size"], "frame_rate": run.data["frame_rate"]},
        device=f"{device_name(run.device)}, {precision}" + parallel_words(run),
        libraries=library_versions(),
        code=code_version(Path(__file__).parent.parent),
    )


def parallel_words(run: Run) -> str:
    """`, 4 processes`, or nothing for one."""
    return f", {run.world.size} processes" if run.world.size > 1 else ""


# --- checkpoint and flags -------------------------------------------------------------------------


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
        console.problem(f"falling back to {path}: {complaint}")
    return checkpoint, str(path)


def saved_flags(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's flags, and what its run did by flags that its version did not have."""
    return {**BEFORE_THE_FLAG, **checkpoint["flags"]}


def gone_flags(saved: dict[str, Any]) -> list[str]:
    """Names of the saved flags that did something and that this version no longer has."""
    return [name for name, idle in GONE_FLAGS.items() if saved.get(name, idle) != idle]


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
    # What `auto` is was settled at the first start: another number would be another run.
    explicit = {n: v for n, v in explicit.items() if n not in AUTO_FLAGS or v != "auto"}
    merged = dict(vars(flags))
    merged.update({n: v for n, v in saved.items() if n in merged and n not in COMMAND_FLAGS})
    merged.update(explicit)
    merged["quiet"] = flags.quiet
    console.line(
        f"Resuming at step {progress['step']}, epoch {progress['epoch'] + 1}, "
        f"best val {number(progress['best_val'])} (saved {checkpoint.get('saved_at', '?')})"
    )
    if explicit.get("init_from"):
        console.line("  --init-from is left unread: weights are the run's own (or --no-resume)")
    for name in gone_flags(saved):
        flag = f"--{name.replace('_', '-')} {saved[name]}"
        console.line(f"  {flag} of the saved run: this version has no such flag, goes on without")
    for name, value in explicit.items():
        if name in COMMAND_FLAGS or name not in saved or saved[name] == value or name == "quiet":
            continue
        keeps = name in ARCHITECTURE_FLAGS and not flags.ignore_arch
        if keeps:
            merged[name] = saved[name]
        winner = "the saved architecture stays (--ignore-arch to insist)" if keeps else "asked wins"
        console.line(f"  --{name.replace('_', '-')}: saved {saved[name]}, asked {value}; {winner}")
        if name in BUDGET_FLAGS and merged["schedule"] == "cosine":
            console.line(
                f"  the lr schedule still spans {schedule_words(progress, saved)} and stays at "
                "--eta-min after them; --init-from starts a new schedule from these weights"
            )
    return argparse.Namespace(**merged)


# --- device ---------------------------------------------------------------------------------------


def settle_amp_dtype(
    flags: argparse.Namespace, device: torch.device, world: World, *, resumed: bool
) -> None:
    """Write into the flags what `auto` is, so that a resumed run computes as it did.

    Runs that were saved with `auto` itself took bf16 on every CPU.
    """
    if flags.amp and flags.amp_dtype == "auto":
        was_bf16 = resumed and device.type == "cpu"
        flags.amp_dtype = world.from_first("bf16" if was_bf16 else fast_precision(device))


def pick_amp_dtype(flags: argparse.Namespace, device: torch.device) -> torch.dtype | None:
    """Dtype of mixed precision; None without."""
    if not flags.amp:
        return None
    return PRECISIONS[fast_precision(device) if flags.amp_dtype == "auto" else flags.amp_dtype]


def settle_threads(run: Run, *, resumed: bool) -> None:
    """Take one thread or all on a CPU, by a trial at the first start; a resumed run keeps it.

    So sums keep their order. OMP_NUM_THREADS wins over it. The trial leaves no trace.
    """
    p, most = run.state.progress, torch.get_num_threads()
    if run.device.type != "cpu":
        return
    is_asked = "OMP_NUM_THREADS" in os.environ
    if resumed and not is_asked:
        if p.threads > most:
            run.console.problem(
                f"the run computes with {p.threads} threads, this machine has {most}: its sums are "
                "rounded in another order from here on"
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


# --- data -----------------------------------------------------------------------------------------


def open_data(
    flags: argparse.Namespace, console: Console
) -> tuple[Corpus, WindowDataset, WindowDataset, dict[str, Any]]:
    """Scan, split and index the files; the last item tells one set of windows from another."""
    corpus = scan(
        flags.data,
        tell=console.line,
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
    except OSError as error:
        raise UsageError(
            f"--val-list: expected a text file of validation files, found {error.strerror!r} at "
            f"{flags.val_list}; check the path"
        ) from error
    except ValueError as error:
        raise UsageError(f"--val-list: {error}") from error
    jitter_seed = flags.seed if flags.jitter else None
    train_windows = WindowDataset(
        corpus, train, ctx=flags.ctx, stride=flags.step, jitter_seed=jitter_seed
    )
    # Validation windows do not overlap: each frame counts once, and the same ones in each epoch.
    val_windows = WindowDataset(corpus, val, ctx=flags.ctx, stride=flags.ctx)
    for line in corpus.summary.lines():
        console.line(line)
    for line in corpus.summary.warnings:
        console.problem(line)
    console.line(
        f"windows  train={len(train_windows)}, val={len(val_windows)} (ctx={flags.ctx}, "
        f"step={flags.step}, jitter={'on' if flags.jitter else 'off'}); validation: {train.rule}"
    )
    # Without `jitter`: with it and without, a window has the same number and about the same place.
    identity = {
        "files": corpus.fingerprint(),
        "split": train.fingerprint() + val.fingerprint(),
        "ctx": flags.ctx,
        "step": flags.step,
        "seed": flags.seed,
        "frame_rate": corpus.frame_rate,
        "side_codebooks": corpus.side_codebooks,
        "size": size_of_data(corpus, train, val),
        "codec": corpus.summary.codec and corpus.summary.codec._asdict(),
    }
    return corpus, train_windows, val_windows, identity


def size_of_data(corpus: Corpus, train: Spans, val: Spans) -> dict[str, Any]:
    """What a report or a model card tells of the data: files, and hours on either side."""
    hours = 3600 * corpus.frame_rate
    return {
        "files": len(corpus.files),
        "train_hours": round(float((train.stop - train.start).sum()) / hours, 4),
        "val_hours": round(float((val.stop - val.start).sum()) / hours, 4),
    }


def settle_data_change(
    flags: argparse.Namespace,
    state: TrainState,
    saved: dict[str, Any],
    found: dict[str, Any],
    source: str,
    console: Console,
) -> None:
    """Refuse to resume on other windows, or with --allow-data-change begin the epoch anew."""
    if said := another_codec(saved, found):
        raise CheckpointError(f"{source}: {said}; name its own data, or start anew (--no-resume)")
    found["codec"] = found["codec"] or saved.get("codec")
    identity = found.keys() - {"size", "codec"}  # which follow from the files
    changed = sorted(name for name in identity if saved.get(name) != found[name])
    if not changed:
        return
    said = ", ".join(f"{n} {saved.get(n)!s:.8} -> {found[n]!s:.8}" for n in changed)  # hashes
    if not flags.allow_data_change:
        raise CheckpointError(
            f"{source}: the data is not the data of the saved run ({said}); restore data and "
            "flags, or pass --allow-data-change to go on with what is there now, from the start of "
            "this epoch"
        )
    progress = state.progress
    console.problem(f"the data changed ({said}); epoch {progress.epoch + 1} starts anew")
    state.guard.forget()
    state.policy.forget_windows()
    progress.position = progress.epoch_steps = progress.epoch_refused = 0
    progress.epoch_loss = progress.epoch_ce = progress.epoch_seconds = 0.0


def another_codec(saved: dict[str, Any], found: dict[str, Any]) -> str:
    """What to say where a checkpoint was trained on codes of another codec than the data's."""
    before, now = codec_of(saved), codec_of(found)
    if before is None or now is None or before.weights == now.weights:
        return ""
    return f"trained on codes of codec {before}, the data are of {now}, which mean nothing to it"


def build_loader(
    flags: argparse.Namespace,
    windows: WindowDataset,
    order: EpochOrder,
    console: Console,
    device: torch.device,
    world: World,
) -> Loader:
    """Reads this process's micro-batches, in the epoch's order."""

    def tell_too(text: str) -> None:
        problem(f"{world.name}: {text}")

    return Loader(
        windows,
        EveryNth(order, world),
        threads=flags.num_workers,
        ahead=flags.prefetch,
        pinned=device.type == "cuda",
        tell=console.problem if world.is_first else tell_too,
    )


# --- model and state ------------------------------------------------------------------------------


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
            initial = load_parts(flags.init_from, needed=WEIGHTS_KEYS)
        initial = world.share(initial)
    saved = checkpoint or initial
    if saved is not None and not flags.ignore_arch:
        try:
            config = ModelConfig.from_dict({**saved["architecture"], "dropout": flags.dropout})
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{source or flags.init_from}: its architecture is none of this version ({error}); "
                "use the program that wrote it"
            ) from error
    else:
        names = ("d_model", "layers", "heads", "dropout", "pattern")
        try:
            config = ModelConfig(vocab_sizes, **{name: getattr(flags, name) for name in names})
        except ValueError as error:
            raise UsageError(str(error)) from error
    fits = len(config.vocab_sizes) == len(vocab_sizes) and all(
        have <= v for have, v in zip(vocab_sizes, config.vocab_sizes, strict=False)
    )
    if not fits:
        remedy = "start anew with --no-resume" if checkpoint else "leave out --init-from"
        raise CheckpointError(
            f"{source or flags.init_from}: a model of vocab sizes {list(config.vocab_sizes)}, the "
            f"data has {list(vocab_sizes)}; see --codebooks and --data, or {remedy}"
        )
    return config, initial


def new_model(flags: argparse.Namespace, config: ModelConfig) -> CodesTransformer:
    """With fresh weights, and what the flags say of training it."""
    return CodesTransformer(
        config,
        grad_checkpoint=flags.grad_checkpoint,
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
    model = new_model(flags, config).to(device)
    if initial is not None:
        load_weights(model, initial["ema"], flags.init_from, world)
    return build_state(flags, model, amp_dtype, device)


def build_state(
    flags: argparse.Namespace,
    model: CodesTransformer,
    amp_dtype: torch.dtype | None,
    device: torch.device,
) -> TrainState:
    """Optimizer, scaler, EMA and guard around a model."""
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
    ema = Ema(model, flags.ema)
    return TrainState(model, ema, optimizer, scaler, guard, Progress())


def codebook_weights(choice: str, alpha: float, num_codebooks: int) -> list[float]:
    """Loss weight of each codebook, mean 1. `auto` rises linearly with k; else a comma list."""
    k = num_codebooks
    if choice == "auto":
        weights = [1 + alpha * i / max(k - 1, 1) for i in range(k)]
    else:
        try:
            weights = [float(w) for w in choice.split(",")]
        except ValueError as error:
            raise UsageError(
                f"--cb-weights: expected auto or {k} numbers with commas between, found {choice!r}"
            ) from error
        if len(weights) != k or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise UsageError(
                f"--cb-weights: expected {k} numbers >= 0 and not all 0, one for each codebook, "
                f"found {choice!r}"
            )
    return [w * k / sum(weights) for w in weights]


def plan_of(flags: argparse.Namespace, config: ModelConfig, device: torch.device) -> Plan:
    """Of a run on a device, here or not."""
    return Plan(flags, config, device, pick_amp_dtype(flags, device), new_state)


def new_state(flags: argparse.Namespace, config: ModelConfig) -> TrainState:
    """With fresh weights, whole, on torch's default device."""
    return build_state(flags, new_model(flags, config), None, torch.device("cpu"))
