"""How a run ends: finished, interrupted, stopped by the guard, or failed; each prints what to do.

return ends.finished(run)     # the exit code
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import time
import traceback
from pathlib import Path

import torch

from cli.command_line import EXIT_DONE, in_words, known_cause, unexpected
from cli.shortages import is_out_of_memory, shortage
from cli.waiting import NoAnswerError
from pages.run_page import write_report
from run_folder import wandb_log
from run_folder.metrics import number
from training import samples, saving
from training.building import plan_of
from training.parallel import is_loss_of_peer
from training.state import TrainingRun

EXIT_GUARD = 3  # stopped by the guard


def interrupted(run: TrainingRun) -> int:
    """Save after a signal and print how to resume; return 128 + the signal's number."""
    signal_number = run.stop.signal or signal.SIGTERM
    where = f"saved {run.files.latest} at step {run.state.progress.step}"
    if saving.save(run) is not None:
        where = run.files.latest_in_words()
    saving.finish_save(run)
    name = signal.Signals(signal_number).name
    run.metrics.write("end", step=run.state.progress.step, signal=name)
    update_page(run)
    flag = "--resume" if run.flags.resume else "--no-resume" if run.flags.no_resume else ""
    run.console.line(
        f"Stopped by {name}; {where}. The same command "
        f"{flag and f'without {flag} '}goes on from there."
    )
    return 128 + signal_number


def stopped_by_guard(run: TrainingRun) -> int:
    """Print what to look at and leave `latest` at the last sound save; return EXIT_GUARD."""
    saving.check_save(run, wait=True)
    run.metrics.write("end", step=run.state.progress.step, reason=run.guard_stop)
    update_page(run)
    run.console.problem(
        f"Stopped by the guard at step {run.state.progress.step}: {run.guard_stop}. "
        f"{run.files.latest_in_words()}. To see what happened, run\n"
        f"  python ckpt_doctor.py {run.files.folder}\n"
        f"and look at the refused windows in {run.files.metrics}. The same command goes on from "
        f"`latest` with lr scaled by {run.state.progress.lr_scale:g}; --lr sets another peak."
    )
    return EXIT_GUARD


def finished(run: TrainingRun) -> int:
    """Wait for the last save, remove the step checkpoints, print the result; return EXIT_DONE."""
    p = run.state.progress
    saving.finish_save(run)
    if run.world.is_first:
        run.files.remove_ring()
    run.metrics.write("end", step=p.step, best_val=p.best_val, seconds=round(p.seconds, 3))
    update_page(run)
    best = "nothing validated"
    if p.best_epoch:
        best = f"best val {number(p.best_val)} of epoch {p.best_epoch} in {run.files.best}"
    patience = f"no better val within --patience {run.flags.patience or 0:g}"
    why = f" ({patience})" if run.is_out_of_patience() else ""
    run.console.line(f"Done at step {p.step}{why}: {best}, last state in {run.files.latest}")
    return EXIT_DONE


def failed(run: TrainingRun, error: Exception) -> int | None:
    """Save the state after an error, unless the error came within a step.

    Returns the exit code if a signal was the cause, else None: the caller raises the error again.
    """
    run.console.end_epoch()
    if not run.world.continue_alone():
        return None
    run.stop.record(run.stop.received or 0, False)
    if run.stop.signal is not None and run.between_steps:
        return interrupted(run)  # every process got the signal, and the others ended first
    if run.between_steps and run.failed_saves < saving.MAX_FAILED_SAVES:
        save_first(run)
    if is_out_of_memory(error):
        tell_out_of_memory(run)
    text = f"{type(error).__name__}: {error}"
    run.metrics.write("end", step=run.state.progress.step, error=text)
    update_page(run)
    return None


def close(run: TrainingRun) -> None:
    """Wait for a save in progress, close the metrics, and let Weights & Biases have the last."""
    with contextlib.suppress(OSError, NoAnswerError):
        saving.check_save(run, wait=True)
    run.metrics.close()
    if run.sender is not None:
        wandb_log.end(run.sender, run.files.metrics)


def save_first(run: TrainingRun) -> None:
    """Save before an error ends the run; an error of this save is printed and not raised."""
    run.console.problem(f"failed at step {run.state.progress.step}; saving first")
    run.loader.give_back()
    try:
        saving.save(run)
        saving.finish_save(run)
    except (OSError, NoAnswerError):
        pass  # reported by `check_save`
    except Exception as error:  # memory that was too little for a step may be for the copy too
        run.console.problem(
            f"this save failed too ({in_words(error)}); {run.files.latest_in_words()}"
        )


def tell_out_of_memory(run: TrainingRun) -> None:
    """Print flags that take less memory; the caller raises the error."""
    lines = plan_of(run.flags, run.state.model.config, run.device).advice()
    run.console.problem(
        "\n  ".join(["out of memory; these flags are predicted to take less:", *lines])
    )


def explain(error: BaseException, flags: argparse.Namespace) -> str:
    """Return the message for an error that no part of the trainer raises: its cause, a remedy."""
    if is_out_of_memory(error):
        smaller = "lower --batch, --ctx, --d_model or --layers; --plan prints what fits"
        return f"{shortage(error)}; {smaller}"
    if torch.distributed.is_initialized() and is_loss_of_peer(error):
        return f"another process of the run died ({error}); torchrun names it below"
    return known_cause(error) or unexpected(error, write_traceback(error, flags))


def write_traceback(error: BaseException, flags: argparse.Namespace) -> str:
    """Write the traceback to a file in the run's folder; return where to find it.

    A failure after days of training cannot be repeated just to see its traceback.
    """
    path = Path(flags.save_dir, time.strftime(f"crash_%Y%m%d-%H%M%S_{os.getpid()}.txt"))
    try:
        if not path.parent.is_dir() or flags.plan:
            return "--debug shows where"
        path.write_text("".join(traceback.format_exception(error)))
    except OSError:
        return "--debug shows where"
    return f"traceback in {path}"


def update_page(run: TrainingRun) -> None:
    """Write the run's HTML page again; a failure is printed once and never stops training."""
    if not run.flags.report or not run.world.is_first:
        return
    try:
        write_report(run.files, samples.folder(run.flags))
    except Exception as error:
        if not run.report_failed:
            cause = in_words(error).removeprefix(f"{run.files.report}: ")
            run.console.problem(f"{run.files.report} was not written, training goes on: {cause}")
        run.report_failed = True
    else:
        run.report_failed = False
