r"""Train a causal transformer on the codes of a neural audio codec, kept in .npq files.

    python train_rvq.py --data "npq_out/*.npq"     # starts a run, or resumes it
    python train_rvq.py --data "npq_out/*.npq" --resume OLDER.pt
    torchrun --nproc_per_node=4 train_rvq.py --data "npq_out/*.npq" --accum 8
    python train_rvq.py --data demo_codes --device cpu --d_model 64 --layers 2 \
        --heads 2 --ctx 64 --batch 4 --accum 1 --max-steps 30 \
        --save_dir smoke_ckpts

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 stopped by the guard. SIGHUP (closed terminal),
Ctrl-C and SIGTERM save first and exit with 129, 130 and 143.

The file reads from top to bottom: flags, one step, compiling, evaluation, the loop, the end of an
epoch, and `main`; the functions it calls are in training/. A run can be killed at any moment: the
same command resumes from the last checkpoint and, on a CPU, ends with exactly the weights of an
uninterrupted run.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P and -I leave it out
    from cli.command_line import report_import_errors

    report_import_errors()

import numpy as np
import torch
from torch import Tensor

from cli.command_line import (
    EXIT_DONE,
    FlagParser,
    exit_code_of,
    problem,
)
from cli.waiting import NoAnswerError
from npq_dataset import BadFilesError, WindowDataset
from run_folder import flags as flags_of_runs
from run_folder.checkpoint import CheckpointError
from run_folder.lock import FolderLock
from run_folder.metrics import (
    Console,
    RunMetrics,
    epoch_lines,
    perplexity,
    read_metrics,
    step_line,
)
from run_folder.shared_weights import is_shared
from run_folder.validations import trouble_of
from sound.npq_format import NpqError
from training import compiling, dry_run, ends, rollback, samples, saving
from training.loader import Batch
from training.parallel import ParallelError, World, join, leave
from training.rollback_policy import lr_doubling
from training.schedule import cooldown_begins, learning_rate
from training.setup import set_up
from training.state import Stopped, TrainingRun

# --- flags ---------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with all flags that run_folder/flags.py declares, by group."""
    parser = FlagParser(__file__, usage="%(prog)s --data GLOB [GLOB ...] [flags]")
    flags_of_runs.add_to(parser)
    return parser


def parse_flags(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse the command line; return all flags, and separately those that the user gave.

    Exits with code 2 where flags contradict each other.
    """
    parser = build_parser()
    flags = parser.parse_args(argv)
    unset = object()
    blank = argparse.Namespace(**dict.fromkeys(vars(flags), unset))
    given = vars(parser.parse_args(argv, blank))
    explicit = {name: value for name, value in given.items() if value is not unset}
    if flags.resume and flags.no_resume:
        parser.error("--resume and --no-resume contradict each other; give one")
    if flags.resume and flags.init_from:
        parser.error("--resume continues a run and --init-from starts a new one; give one")
    if is_shared(flags.resume or ""):
        parser.error(
            f"--resume {flags.resume}: expected a .pt checkpoint, found weights alone; use "
            "--init-from to start a new run from them"
        )
    if flags.eta_min > flags.lr:
        parser.error(
            f"--eta-min {flags.eta_min:g} is above --lr {flags.lr:g}; lower it, or raise --lr"
        )
    if "accum" in explicit and flags.batch == "auto":
        parser.error("--accum: --batch auto chooses it; leave it out, or give --effective-batch")
    if set(flags.tag) & set('/\\*?[]" ') or not flags.tag.isprintable() or len(flags.tag) > 100:
        parser.error(
            f"--tag: expected at most 100 letters, digits, '.', '-' and '_', found {flags.tag!r}"
        )
    return flags, explicit


# --- one step ------------------------------------------------------------------------------------

MIN_LOSS_SCALE = 1.0  # fp16 gradients that overflow even at this loss scale cannot be trained on


@dataclass(frozen=True)
class StepStats:
    """The result of one optimizer step: losses in nats per code, gradient norm before clipping."""

    loss: float
    ce: list[float]  # [K]
    grad_norm: float
    lr: float
    refused: str | None  # reason of a refusal, None for a step that was taken
    is_overflow: bool = False  # fp16 gradients overflowed; the scaler lowers the loss scale


def train_step(run: TrainingRun, batches: Iterator[Batch]) -> StepStats:
    """Take one optimizer step over `accum` micro-batches.

    A step that the guard refuses changes neither weights nor optimizer nor EMA.
    """
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
    state.scaler.update()  # halves the loss scale after an overflow; does nothing if disabled
    state.optimizer.zero_grad(set_to_none=not run.has_graphs)
    state.policy.attempt()
    p.position += run.windows_per_step
    run.between_steps = True
    return StepStats(loss, ce, grad_norm, lr, refused, overflow)


def backward(run: TrainingRun, batches: Iterator[Batch]) -> Tensor:
    """Compute the gradients of `accum` micro-batches, shared out over all processes.

    Returns [objective, ce of each codebook, gradient norm] over all processes as one float32
    tensor [2 + K] on the device.
    """
    state = run.state
    loss_and_ce = run.world.sum(accumulate(run, batches))
    state.scaler.unscale_(state.optimizer)
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    return torch.cat((loss_and_ce, torch.nn.utils.get_total_norm(gradients)[None]))


def accumulate(run: TrainingRun, batches: Iterator[Batch]) -> Tensor:
    """Accumulate the gradients of this process's micro-batches of one step.

    Returns this process's summand of [objective, ce of each codebook], float32 [1 + K] on the
    device. The codes arrive as 16-bit integers and are widened to int64 on the device.
    """
    flags, p, world = run.flags, run.state.progress, run.world
    loss_and_ce = torch.zeros(1 + len(run.weights), device=run.device)
    if run.has_graphs:
        compiling.own_gradients(run.state.model.parameters())
    mine = range(world.rank, flags.accum, world.size)
    for index, batch in zip(mine, batches, strict=False):
        inputs = run.inputs_of(batch)
        if run.has_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        torch.manual_seed(noise_seed(flags.seed, p.epoch, p.position + index * flags.batch))
        with world.reducing(last=index == mine[-1]):
            with run.autocast():
                losses = run.losses(*inputs)
            run.state.scaler.scale(losses.objective / len(mine)).backward()
        # The sum is a new tensor: CUDA graphs overwrite their outputs at the next micro-batch.
        share = torch.cat((losses.objective.detach()[None], losses.ce)) / flags.accum
        loss_and_ce = loss_and_ce + share
    return loss_and_ce


def noise_seed(seed: int, epoch: int, position: int) -> int:
    """Return the random seed of the micro-batch that begins at window `position` of an epoch.

    Dropout and the drawn frames then depend neither on restarts nor on the number of processes.
    """
    return int(np.random.SeedSequence((seed, epoch, position)).generate_state(1, np.uint64)[0])


def update(run: TrainingRun, lr: float, grad_norm: float) -> None:
    """Clip the gradients, step the optimizer at learning rate `lr`, update the EMA."""
    state = run.state
    if 0 < run.flags.grad_clip < grad_norm:
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, run.flags.grad_clip / (grad_norm + 1e-6))
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    state.optimizer.step()
    state.ema.update(state.progress.step + 1)


# --- compiling -----------------------------------------------------------------------------------


def prepare_losses(run: TrainingRun) -> None:
    """Compile the losses with --compile, or by default on CUDA; else only wrap them for DDP."""
    if run.flags.compile or (run.flags.compile is None and run.device.type == "cuda"):
        compiling.compile_losses(run, lambda count: take_trial(run, count))
    else:
        run.losses = run.world.averaging(run.losses)


def take_trial(run: TrainingRun, count: int) -> None:
    """Take `count` times the micro-batches of a step, all of the first training window."""
    first = np.zeros(run.flags.batch, dtype=np.int64)
    (trial,) = run.loader.read(run.train_windows, [first])
    try:
        for _ in range(count):
            accumulate(run, itertools.repeat(trial))
    except torch.OutOfMemoryError:
        ends.tell_out_of_memory(run)
        raise


# --- evaluation ----------------------------------------------------------------------------------


FEW_WINDOWS = 16  # of training, evaluated beside validation; more where a quarter of it is more


@dataclass(frozen=True)
class Validation:
    """Mean losses of the EMA weights over the validation windows, nats per code; NaN if none."""

    val: float  # plain cross-entropy, mean over codebooks
    val_obj: float  # the training objective
    per_codebook: list[float]
    train_ce: float  # as val, over training windows
    unlabelled: float | None  # val of a labelled model that is not told the labels


def evaluate(run: TrainingRun) -> Validation | None:
    """Validate the EMA weights, without torch.compile; return None if a signal interrupted it.

    The same training windows, evenly spread, are evaluated each time: a quarter as many as
    validation windows, at least FEW_WINDOWS, never more than validation has. Each window has its
    own labels; a labelled model is validated without them too.
    """
    count = len(run.val_windows)
    few = min(count, max(FEW_WINDOWS, count // 4), len(run.train_windows))
    seen = np.linspace(0, len(run.train_windows) - 1, few).astype(np.int64)
    means = [mean_losses(run, run.val_windows, np.arange(count))]
    means.append(mean_losses(run, run.train_windows, seen))
    if run.state.model.label_embed is not None:
        means.append(mean_losses(run, run.val_windows, np.arange(count), labelled=False))
    found = [mean for mean in means if mean is not None]
    if len(found) < len(means):
        return None
    (objective, *ce), (_, *train_ce), *rest = torch.stack(found).tolist()
    unlabelled = [sum(bare) / len(bare) for _, *bare in rest]
    return Validation(
        sum(ce) / len(ce), objective, ce, sum(train_ce) / len(train_ce), *(unlabelled or [None])
    )


@torch.inference_mode()
def mean_losses(
    run: TrainingRun,
    source: WindowDataset,
    numbers: np.ndarray[Any, Any],
    *,
    labelled: bool = True,
) -> Tensor | None:
    """Return [objective, ce of each codebook] of the EMA weights, means over the named windows.

    Float32 [1 + K] on the device, NaN without windows; None if a signal interrupted it.
    """
    flags, model, world = run.flags, run.state.ema.model, run.world
    total = torch.zeros(1 + len(run.weights), device=run.device)
    firsts = np.arange(0, len(numbers), flags.batch * world.size) + flags.batch * world.rank
    mine = [numbers[first : first + flags.batch] for first in firsts]
    # A rank without windows runs one with weight 0: collectives need every rank.
    batches = run.loader.read(source, (w if len(w) else numbers[:1] for w in mine))
    for windows in mine:
        found = next_batches(run, batches, 1)
        if found is None:
            return None
        with run.autocast():
            codes, *labels = run.inputs_of(found[0])
            given = labels if labelled else []
            losses = model.losses(codes, flags.label_smoothing, run.weights, *given)
            total += torch.cat((losses.objective[None], losses.ce)) * len(windows)
    world.sum(total)
    return total / (len(numbers) or math.nan)


# --- the loop ------------------------------------------------------------------------------------


def train(run: TrainingRun) -> int:
    """Train until the run is finished, or stopped by a signal or the guard; return the exit code.

    After a rollback the next epoch may be an earlier one.
    """
    p = run.state.progress
    run.loader.meanwhile = lambda: while_waiting(run)
    if run.is_finished() and p.validated_step == p.step:
        run.console.line(
            f"Nothing to do: the run was finished at step {p.step}. To continue it, give a larger "
            "--epochs, --max-steps, --max-seconds or --patience."
        )
        return EXIT_DONE
    while True:
        epoch_complete = take_steps(run)
        if run.guard_stop is not None:
            return ends.stopped_by_guard(run)
        if run.stop.signal is not None or not close_epoch(run, complete=epoch_complete):
            return ends.interrupted(run)
        if run.is_finished() and p.validated_step == p.step:
            return ends.finished(run)


def take_steps(run: TrainingRun) -> bool:
    """Take steps until the epoch or the run ends, or validation is due; True at the epoch's end.

    A signal or the guard ends it too, always between two steps.
    """
    p, policy = run.state.progress, run.state.policy
    batches, end = start_epoch_batches(run)
    while p.position + run.windows_per_step <= end:
        if run.is_finished() or run.stop.signal is not None or run.guard_stop is not None:
            break
        if validation_due(run, complete=False):
            break
        keep, cools = policy.keep_due(p.step, p.schedule_steps), cooldown_begins(run)
        if keep or cools:  # the archive from before the cooldown lets a run be extended later
            reason = saving.save(run, ring=keep, archive=cools, may_fail=not cools)
            if reason is not None:
                rollback.roll_back(run, reason)
                batches, end = start_epoch_batches(run)
                continue
            p.cooling = p.cooling or cools
        started = time.perf_counter()
        found = next_batches(run, batches, run.flags.accum // run.world.size)
        if found is None:
            break
        stats = train_step(run, iter(found))
        seconds = sync_control(run, time.perf_counter() - started)
        p.seconds += seconds
        p.epoch_seconds += seconds
        p.log_seconds += seconds
        if stats.refused is None:
            report_step(run, stats)
        elif handle_refusal(run, stats):
            batches, end = start_epoch_batches(run)
        saving.check_save(run)
        if run.stop.save:
            saving.save(run)
    run.console.end_epoch()
    return p.position + run.windows_per_step > end


def sync_control(run: TrainingRun, seconds: float = 0.0) -> float:
    """Give all processes the same signals and clock, so that all of them decide alike.

    A signal counts whichever process received it; the clock is rank 0's. Returns rank 0's
    `seconds`, the duration of the step just taken.
    """
    stop, world, every = run.stop, run.world, run.flags.save_every_minutes
    due = 0 < every < (time.perf_counter() - run.last_save) / 60
    if world.size == 1:
        stop.record(0, due)
        return seconds
    clock = (float(due), seconds) if world.is_first else (0.0, 0.0)
    signal_number, save_signal, due, seconds = world.largest(*stop.news(), *clock)
    stop.record(int(signal_number), bool(save_signal or due))
    return seconds


def start_epoch_batches(run: TrainingRun) -> tuple[Iterator[Batch], int]:
    """Return the epoch's remaining micro-batches and the position at which the epoch ends."""
    p, order = run.state.progress, run.order
    order.epoch, order.start = p.epoch, p.position
    done, end = p.position // run.windows_per_step, order.end()
    run.console.end_epoch()
    run.console.start_epoch(p.epoch + 1, run.flags.epochs, done, end // run.windows_per_step)
    return iter(run.loader), end


def next_batches(run: TrainingRun, batches: Iterator[Batch], count: int) -> list[Batch] | None:
    """Read this process's next `count` micro-batches; return None after a signal to stop.

    The program waits for data only here, between two steps: within a step the state is incomplete,
    so a signal could not save it.
    """
    try:
        found = list(itertools.islice(batches, count))
    except Stopped:
        found = []
    sync_control(run)
    return found if run.stop.signal is None else None


def while_waiting(run: TrainingRun) -> None:
    """Respond to signals while waiting for data; called several times a second.

    Raises:
        Stopped: a signal to stop came. A signal to save is served here only without other
            processes; with them, `sync_control` sends it to all after the wait.
    """
    if run.stop.signal is not None or run.stop.received is not None:
        raise Stopped
    if run.world.size == 1:
        saving.check_save(run)
        if run.stop.save:
            # Buffers that the saver allocates in inference mode (validation) would stay read-only.
            with torch.inference_mode(False):
                saving.save(run)


def report_step(run: TrainingRun, stats: StepStats) -> None:
    """Advance the progress bar; every --log-lr-steps write a console line and a metrics row."""
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
        memory_gib=round(run.memory_gib(), 3),
        seconds=round(p.seconds, 3),
    )
    total = 0 if flags.max_seconds else run.planned_steps
    run.console.line(step_line(row, total, run.seconds_left()))
    if (warning := run.pace.note(frames_per_s, p.log_seconds, run.device.type)) is not None:
        run.console.problem(warning)
    p.log_loss, p.log_steps, p.log_seconds = 0.0, 0, 0.0


def handle_refusal(run: TrainingRun, stats: StepStats) -> bool:
    """Log a refused step with its windows; roll back if the policy requires it.

    Returns True after a rollback, where the caller must start the epoch's batches anew.
    """
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
        if state.scaler.get_scale() < MIN_LOSS_SCALE:
            saving.save(run)
            saving.finish_save(run)
            run.guard_stop = (
                "fp16 gradients overflow at every scale; use --amp-dtype bf16 or --no-amp"
            )
        return False
    state.policy.refuse(used)
    trouble = state.policy.trouble(state.guard.refused_in_a_row)
    if trouble is None:
        return False
    if run.flags.panic_snapshot:
        saving.quarantine(run, trouble)
    return rollback.roll_back(run, trouble)


# --- the end of an epoch -------------------------------------------------------------------------


def close_epoch(run: TrainingRun, *, complete: bool) -> bool:
    """Validate if it is due, report it, and save `latest`, `best` and archives.

    Called after the last step of an epoch (`complete`) or where the steps stopped within one.
    Returns False if a signal interrupted the validation.
    """
    p, flags = run.state.progress, run.flags
    started = time.perf_counter()
    epoch = p.epoch + 1
    is_last = run.is_finished() or (complete and epoch >= flags.epochs)
    result = None
    if is_last or validation_due(run, complete=complete):
        result = evaluate(run)
        if result is None:
            return False
        saving.check_save(run, wait=True)  # if it failed, best_val goes back to what is on disk
    # The check comes before the epoch is counted, so that an unsound epoch is repeated.
    if (reason := saving.unsound(run)) is not None:
        saving.quarantine(run, reason)
        rollback.roll_back(run, reason)
        return True
    is_best = result is not None and result.val < p.best_val  # false for NaN
    if result is not None:
        p.validated_step, p.validated_seconds = p.step, p.seconds
        if is_best:
            p.best_val, p.best_epoch = result.val, epoch
        report_epoch(run, result, is_best=is_best, evaluation_seconds=time.perf_counter() - started)
    if complete:
        p.epoch = epoch
        p.begin_epoch()
    archive = complete and flags.archive_every > 0 and epoch % flags.archive_every == 0
    ring = complete and run.state.policy.keep_due(p.step, p.schedule_steps)
    has_audio = complete and flags.eval_audio_every > 0 and epoch % flags.eval_audio_every == 0
    if has_audio or (epoch == 1 and flags.eval_audio_every):
        samples.compare_validation(run)  # before the save, so that `best` always has its figure
    saving.save(run, is_best=is_best, archive=archive, ring=ring, is_sound=True)
    if has_audio:
        samples.write(run)
    if p.validated_step == p.step:
        ends.update_page(run)
    return True


def validation_due(run: TrainingRun, *, complete: bool) -> bool:
    """Return whether to validate now: by training seconds with --val-every-seconds, else epochs."""
    p, flags = run.state.progress, run.flags
    if every := flags.val_every_seconds:
        return p.seconds // every > p.validated_seconds // every
    return complete and (p.epoch + 1) % flags.val_every == 0


def report_epoch(
    run: TrainingRun, result: Validation, *, is_best: bool, evaluation_seconds: float
) -> None:
    """Print the summary of an epoch and write its metrics row.

    The epoch may be incomplete. `evaluation_seconds` is the duration of the validation.
    """
    p = run.state.progress
    steps = max(p.epoch_steps, 1)
    frames = p.epoch_steps * run.windows_per_step * run.flags.ctx
    row = run.metrics.write(
        "epoch",
        step=p.step,
        epoch=p.epoch + 1,
        train=p.epoch_loss / steps if p.epoch_steps else math.nan,
        train_ce=result.train_ce,
        val=result.val,
        val_obj=result.val_obj,
        **({} if result.unlabelled is None else {"val_unlabelled": result.unlabelled}),
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
    report_trouble(run)


def report_trouble(run: TrainingRun) -> None:
    """Warn of a plateau, overfitting or a val above guessing, once until the diagnosis changes."""
    if not run.world.is_first:
        return
    trouble = trouble_of(RunMetrics(read_metrics(run.files.metrics)))
    if trouble is not None and trouble.kind != run.reported_trouble:
        run.console.problem(trouble.text)
    run.reported_trouble = trouble and trouble.kind


# --- a whole run ---------------------------------------------------------------------------------


def train_or_save(run: TrainingRun) -> int:
    """Run `train`; if it fails between two steps, save the state before raising the error."""
    try:
        return train(run)
    except Exception as error:
        if (code := ends.failed(run, error)) is None:
            raise
        return code
    finally:
        ends.close(run)


# --- main ----------------------------------------------------------------------------------------


EXPECTED = (CheckpointError, BadFilesError, NpqError, ParallelError, NoAnswerError, OSError)


def main(argv: list[str] | None = None) -> int:
    """Run the command; turn an error into one message and an exit code."""
    return exit_code_of(lambda: join_and_train(argv), expected=EXPECTED, debug=False)


def join_and_train(argv: list[str] | None) -> int:
    """Join the other processes, parse the flags and train; report a failure once for all ranks."""
    world = join()
    with world.print_once():
        flags, explicit = parse_flags(argv)
    before = "interrupted before the first step; no checkpoint was changed, and the same command "
    return exit_code_of(
        lambda: train_as_one(flags, explicit, world),
        expected=EXPECTED,
        debug=flags.debug,
        interrupted="interrupted; nothing was changed" if flags.plan else f"{before}starts again",
        explain=lambda error: ends.explain(error, flags),
        report=lambda code, message: report_once(world, code, message),
    )


def train_as_one(flags: argparse.Namespace, explicit: dict[str, Any], world: World) -> int:
    """Set up and train, or print the plan; rank 0 alone locks the folder and writes to the console.

    Returns the exit code.
    """
    console = Console(quiet=flags.quiet and not flags.plan, silent=not world.is_first)
    if flags.quiet:
        warnings.filterwarnings("ignore")
    if flags.plan:
        return dry_run.plan(flags, explicit, console) if world.is_first else EXIT_DONE
    with FolderLock(flags.save_dir) if world.is_first else contextlib.nullcontext():
        run = set_up(flags, explicit, console, world)
        prepare_losses(run)
        run.stop.install()
        code = train_or_save(run)
        world.wait()
        return code


def report_once(world: World, code: int, message: str) -> int:
    """Print why the run failed if this process failed first; return the exit code of them all."""
    code_of_first = world.first_failure(code)
    if code_of_first is not None:
        return code_of_first
    problem(message if world.is_first else f"{world.name}: {message}")
    return code


if __name__ == "__main__":
    leave(main())
