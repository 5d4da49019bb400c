"""From .npq files to micro-batches: scans and splits the files, indexes windows, reads ahead.

data = open_data(flags, console)
loader = build_loader(flags, data.train, order, console, device, world)
"""

from __future__ import annotations

import argparse
import os
from typing import Any, NamedTuple

import torch

from cli.command_line import UsageError, problem
from npq_dataset import Corpus, EpochOrder, Spans, WindowDataset, split_corpus
from run_folder.metrics import Console
from sound.labels import NONE
from training.loader import Loader, scan
from training.parallel import EveryNth, World


class Data(NamedTuple):
    """The scanned files of a run and their training and validation windows."""

    corpus: Corpus
    train: WindowDataset
    val: WindowDataset
    facts: dict[str, Any]  # identify the windows; saved in the checkpoint as `data`

    def number_labels(self, numbers: list[int]) -> None:
        """Give the windows' labels the model's numbers, one for each label of the corpus."""
        translated = torch.tensor([*numbers, NONE])  # -1 is its last
        for windows in (self.train, self.val):
            assert windows.labels is not None, "the data has labels"
            windows.labels = translated[windows.labels]


def open_data(flags: argparse.Namespace, console: Console) -> Data:
    """Scan, split and index the files of --data, and print a summary.

    Raises:
        UsageError: --val-list or --labels cannot be read, or does not fit the files.
        BadFilesError, NpqError, NoAnswerError: files of --data are bad or cannot be read.
    """
    corpus = scan(
        flags.data,
        labels=flags.labels,
        tell=console.line,
        ctx=flags.ctx,
        codebooks=flags.codebooks,
        skip_bad=flags.skip_bad_files,
        checked_file=os.path.join(flags.save_dir, ".checked_files.json")
        if os.path.isdir(flags.save_dir)  # --plan does not create it
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
    # Validation windows do not overlap and have neither jitter nor shift: each frame counts once.
    val_windows = WindowDataset(corpus.unshifted(), val, ctx=flags.ctx, stride=flags.ctx)
    console.lines(corpus.summary.lines())
    for line in corpus.summary.warnings:
        console.problem(line)
    tell_labels(corpus, train, val, console)
    console.line(
        f"windows  train={len(train_windows)}, val={len(val_windows)} (ctx={flags.ctx}, "
        f"step={flags.step}, jitter={'on' if flags.jitter else 'off'}); validation: {train.rule}"
    )
    # `jitter` is left out: it changes neither the numbers of windows nor, by much, their places.
    facts = {
        "files": corpus.fingerprint(),
        "split": train.fingerprint() + val.fingerprint(),
        "ctx": flags.ctx,
        "step": flags.step,
        "seed": flags.seed,
        "frame_rate": corpus.frame_rate,
        "side_codebooks": corpus.side_codebooks,
        "size": size_of_data(corpus, train, val),
        "codec": corpus.summary.codec and corpus.summary.codec._asdict(),
        "labels": corpus.labels and corpus.labels.fingerprint(),
    }
    return Data(corpus, train_windows, val_windows, facts)


def size_of_data(corpus: Corpus, train: Spans, val: Spans) -> dict[str, Any]:
    """Return the number of files and the hours of training and validation data."""
    hours = 3600 * corpus.frame_rate
    return {
        "files": len(corpus.files),
        "train_hours": round(float((train.stop - train.start).sum()) / hours, 4),
        "val_hours": round(float((val.stop - val.start).sum()) / hours, 4),
    }


def tell_labels(corpus: Corpus, train: Spans, val: Spans, console: Console) -> None:
    """Print the labels with their files and hours, and warn of what is odd about them."""
    if corpus.labels is None:
        return
    hours = [(side.stop - side.start) / corpus.frame_rate / 3600 for side in (train, val)]
    console.lines(corpus.labels.lines(*hours))
    for line in (*corpus.labels.warnings, *corpus.labels.untrained(hours[0])):
        console.problem(f"--labels {line}")


def build_loader(
    flags: argparse.Namespace,
    windows: WindowDataset,
    order: EpochOrder,
    console: Console,
    device: torch.device,
    world: World,
) -> Loader:
    """Build the loader of this process's share of the micro-batches, in the epoch's order."""

    def report_with_rank(text: str) -> None:
        problem(f"{world.name}: {text}")

    return Loader(
        windows,
        EveryNth(order, world),
        threads=flags.num_workers,
        ahead=flags.prefetch,
        pinned=device.type == "cuda",
        tell=console.problem if world.is_first else report_with_rank,
    )
