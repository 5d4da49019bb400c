"""What a run's files are called, for those who must tell them from data without reading them.

is_of_a_run("rvq_ckpts", os.listdir("rvq_ckpts"))        # True once a run has saved there
is_sample("rvq_9cb_e0005__20250901-120000.npq")          # True
checkpoint_name("rvq_9cb_epoch_e0005__20250901-120000.pt")  # ("rvq_9cb", "archive", 5)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

SAMPLES = "samples"  # folder of evaluation audio within that of the run
_RUN_FILE = re.compile(r"rvq_\d+cb(_.+)?_(metrics\.jsonl|(latest|previous|best)\.pt)")
_SAMPLE = re.compile(r"rvq_\d+cb(_.+)?_e\d{4,}__\d{8}-\d{6}")
_KINDS = {  # of checkpoints, by what follows the run's name; `panic` is of older versions
    **{name: name for name in ("latest", "previous", "best")},
    r"best_e(\d+)__.*": "best archive",
    r"epoch_e(\d+)__.*": "archive",
    **{rf"{name}_s\d+": name for name in ("panic", "quarantine", "ring")},
}


def is_of_a_run(folder: str, names: Iterable[str]) -> bool:
    """Whether a folder, by the names in it, is one that a run keeps, or the samples of one."""
    if any(name.startswith("rvq_") and _RUN_FILE.fullmatch(name) for name in names):
        return True
    above, own = os.path.split(os.path.abspath(folder))
    return own == SAMPLES and any(map(_RUN_FILE.fullmatch, os.listdir(above)))


def is_sample(name: str) -> bool:
    """Whether a file, by its name, was drawn by a run's model: evaluation audio or its codes."""
    return name.startswith("rvq_") and bool(_SAMPLE.fullmatch(os.path.splitext(name)[0]))


class CheckpointName(NamedTuple):
    """What a checkpoint's file name tells: its run, its kind, and of an archive the epoch."""

    run: str
    kind: str  # latest, previous, best, archive, best archive, panic, quarantine, ring, other
    epoch: int | None


def checkpoint_name(path: str | os.PathLike[str]) -> CheckpointName:
    """The parts of a file name; kind "other", without a run, where it is no name of a run's."""
    name = os.path.basename(path)
    for ending, kind in _KINDS.items():
        if told := re.fullmatch(rf"(.+?)_{ending}\.pt", name):
            return CheckpointName(told[1], kind, int(told[2]) if told.re.groups > 1 else None)
    return CheckpointName("", "other", None)
