"""Evaluation audio: draws a sample from the EMA weights and writes codes and sound to a folder.

samples.write(run)            # also prints a line and writes a metrics row; never ends training
samples.folder(run.flags)     # --eval-outdir
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cli.command_line import in_words
from cli.waiting import in_thread, wait_for
from run_folder.names import SAMPLES
from sound import copying
from sound.npq_format import write_npq
from sound.sampling import Draw, generate
from sound.statistics import compare, describe
from training.state import Stopped, TrainingRun

Codes = np.ndarray[Any, Any]
SEARCH_SECONDS = 60.0  # that a sample is compared with the training music at most


def write(run: TrainingRun) -> None:
    """Draw a sample from the EMA weights; write its codes and its sound to --eval-outdir.

    A failure never stops training; it is printed in one line and written to the metrics.
    """
    p, started = run.state.progress, time.perf_counter()
    if not run.world.is_first:
        return
    label = label_in_turn(run)
    outcome: dict[str, Any]
    codes: Codes | None = None
    try:
        codes, path = draw(run, label)
        decode(run, codes, path.with_suffix(".wav"))
    except Stopped:
        return
    except Exception as error:  # a missing codec, a full disk, no memory left: train on
        run.console.problem(f"evaluation audio failed, training goes on: {in_words(error)}")
        outcome = {"error": str(error)}
    else:
        seconds = round(time.perf_counter() - started, 3)
        of = f", label {label}" if label else ""
        run.console.detail(f"sample   {path.with_suffix('.wav')} ({seconds:.1f} s{of})")
        outcome = {"file": path.name, "sample_seconds": seconds}
    figures: dict[str, Any] = {"label": label} if label else {}
    if codes is not None:
        figures |= statistics(run, codes) | compare_with_training(run, codes)
    run.metrics.write("sample", step=p.step, epoch=p.epoch, **outcome, **figures)


def draw(run: TrainingRun, label: str | None) -> tuple[Codes, Path]:
    """Draw a sample from the EMA weights; return its codes [T, K] int64 and the .npq file of them.

    Raises:
        Stopped: a signal came.
        OSError: the file cannot be written.
    """
    p, flags, config = run.state.progress, run.flags, run.state.model.config

    def stop_on_signal() -> None:
        if run.stop.signal is not None or run.stop.received is not None:
            raise Stopped

    folder(flags).mkdir(parents=True, exist_ok=True)  # drawing takes minutes: fail before it
    drawn = generate(
        run.state.ema.model,
        flags.eval_frames,
        ctx=flags.ctx,
        draw=Draw.of(
            config.num_codebooks,
            flags.eval_temperature,
            flags.eval_top_k,
            flags.eval_top_p,
            flags.eval_min_p,
            flags.eval_repeat_penalty,
        ),
        seed=flags.seed + p.epoch,
        dtype=run.amp_dtype,
        on_frame=stop_on_signal,
        labels=[label] if label else [],
    )
    codes: Codes = drawn[0].numpy()
    while (path := folder(flags) / sample_name(run)).exists():
        time.sleep(0.1)  # a run begun anew within a second has the same names
    write_npq(
        path,
        codes,
        vocab_sizes=config.vocab_sizes,
        frame_rate=run.data["frame_rate"],
        side_codebooks=run.data["side_codebooks"],
    )
    return codes, path


def label_in_turn(run: TrainingRun) -> str | None:
    """Return the label of this epoch's sample, each in its turn; None if the model has none."""
    labels, turn = run.state.model.config.labels, 1
    if run.flags.eval_audio_every:
        turn = run.state.progress.epoch // run.flags.eval_audio_every
    return labels[(turn - 1) % len(labels)] if labels else None


def sample_name(run: TrainingRun) -> str:
    """Return the name of a sample of this moment: run, epoch, local time."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return f"{run.files.name}_e{run.state.progress.epoch:04d}__{stamp}.npq"


def decode(run: TrainingRun, codes: Codes, path: Path) -> None:
    """Decode codes [T, K] int64 with the codec of --eval-dac-repo and write a WAV file.

    Raises:
        UsageError: codebooks or frame rate of the codec do not match the model's.
    """
    from sound.audio_file import write_wav  # imported late: training does not need a codec
    from sound.codec import check_codec, load_codec

    name, side = run.flags.eval_dac_repo, run.data["side_codebooks"]
    codec = load_codec(name, "cpu" if run.flags.eval_on_cpu else str(run.device))
    sizes = run.state.model.config.vocab_sizes
    check_codec(codec, "--eval-dac-repo", name, sizes, run.data, run.console.problem)
    drawn = torch.from_numpy(codes)
    chunks = codec.decode_channels(lambda start, stop: drawn[start:stop], len(codes), side)
    shape = 2 if side else 1, len(codes) * codec.hop_length
    write_wav(path, chunks, codec.sample_rate, shape)


def statistics(run: TrainingRun, codes: Codes) -> dict[str, Any]:
    """Compare the statistics of sampled codes [T, K] with those of the validation music.

    Prints a line and returns the fields for the sample's metrics row, none of them on a failure.
    """
    try:
        length = min(len(codes), 2048)
        read = run.loader.begin(lambda: run.val_windows.excerpts(length))
        figures = compare(codes, run.loader.result(read, run.val_windows))
    except Stopped:
        return {}
    except Exception as error:  # a file that changed, no memory left: train on
        run.console.problem(f"statistics of the sample failed, training goes on: {in_words(error)}")
        return {}
    run.console.line(f"         {describe(figures)}")
    return figures


def compare_validation(run: TrainingRun) -> None:
    """Find the longest run that validation music shares with training music, once in a run.

    It is kept in the progress as `held_out_run`: a sample that shares a much longer one is a copy.
    """
    if run.world.is_first and run.state.progress.held_out_run < 0:
        frames = run.flags.eval_frames
        found = _search(run, lambda: [*run.val_windows.excerpts(frames)], "validation music")
        if found:
            run.state.progress.held_out_run = max(shared.near.frames for shared in found)


def compare_with_training(run: TrainingRun, codes: Codes) -> dict[str, Any]:
    """Find the longest run that sampled codes [T, K] share with training music.

    Prints a line, and a warning if they copy; returns the fields for the sample's metrics row.
    """
    found = _search(run, lambda: [codes], "the sample")
    if not found:
        return {}
    held_out, rate = run.state.progress.held_out_run, run.data["frame_rate"]
    figures = copying.figures(found[0], len(codes), held_out, rate)
    run.console.line(f"         {copying.describe(figures)}")
    if warning := copying.copy_warning(figures):
        run.console.problem(f"the sample {warning}")
    return figures


def _search(
    run: TrainingRun, samples: Callable[[], list[Codes]], name: str
) -> list[copying.Shared]:
    """Search the training music for runs of `samples`; nothing after a signal or a failure.

    75 hours take a second or two once they are in memory; SEARCH_SECONDS end any search.
    """
    began, hours = time.monotonic(), 0.0

    def on_frames(frames: int) -> None:
        nonlocal hours
        hours += frames / run.data["frame_rate"] / 3600
        if run.stop.signal is not None or run.stop.received is not None:
            raise Stopped
        if time.monotonic() - began > SEARCH_SECONDS:
            raise TimeoutError(f"{SEARCH_SECONDS:.0f} s were over after {hours:.1f} hours of it")

    def search() -> list[copying.Shared]:
        return copying.longest_runs(samples(), run.train_windows.tracks(), on_frames=on_frames)

    try:
        return wait_for(
            in_thread(search, "comparing"),
            lambda: (hours, "the training music"),
            meanwhile=run.loader.meanwhile,
            tell=run.console.problem,
        )
    except Stopped:
        return []
    except Exception as error:  # a file that changed, no memory left: train on
        run.console.problem(f"{name} was not compared with the training music: {in_words(error)}")
        return []


def folder(flags: argparse.Namespace) -> Path:
    """Return the folder of evaluation audio: --eval-outdir, or `samples` in --save_dir."""
    return Path(flags.eval_outdir or Path(flags.save_dir) / SAMPLES)
