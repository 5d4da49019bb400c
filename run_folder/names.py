"""Recognises a run's files by their names, without reading them.

is_of_a_run("rvq_ckpts", os.listdir("rvq_ckpts"))        # True once a run has saved there
is_sample("rvq_9cb_e0005__20250901-120000.npq")          # True
checkpoint_name("rvq_9cb_epoch_e0005__20250901-120000.pt")  # ("rvq_9cb", "archive", 5)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

SAMPLES = "samples"  # folder of evaluation audio, within the run's folder
_RUN_FILE = re.compile(r"rvq_\d+cb(_.+)?_(metrics\.jsonl|(latest|previous|best)\.pt)")
_SAMPLE = re.compile(r"rvq_\d+cb(_.+)?_e\d{4,}__\d{8}-\d{6}")
_KINDS = {  # ending of a checkpoint's name -> its kind; older versions wrote `panic`
    **{name: name for name in ("latest", "previous", "best")},
    r"best_e(\d+)__.*": "best archive",
    r"epoch_e(\d+)__.*": "archive",
    **{rf"{name}_s\d+": name for name in ("panic", "quarantine", "ring")},
}


def is_of_a_run(folder: str, names: Iterable[str]) -> bool:
    """Return whether a folder with files `names` is a run's folder, or its folder of samples."""
    if any(name.startswith("rvq_") and _RUN_FILE.fullmatch(name) for name in names):
        return True
    above, own = os.path.split(os.path.abspath(folder))
    return own == SAMPLES and any(map(_RUN_FILE.fullmatch, os.listdir(above)))


def is_sample(name: str) -> bool:
    """Return whether a file name is that of evaluation audio or its codes."""
    return name.startswith("rvq_") and bool(_SAMPLE.fullmatch(os.path.splitext(name)[0]))


class CheckpointName(NamedTuple):
    """The parts of a checkpoint's file name."""

    run: str  # as `rvq_9cb`; empty for kind "other"
    kind: str  # latest, previous, best, archive, best archive, panic, quarantine, ring, other
    epoch: int | None  # of an archive


def checkpoint_name(path: str | os.PathLike[str]) -> CheckpointName:
    """Split a checkpoint's file name into its parts; kind "other" if no run writes such a name."""
    name = os.path.basename(path)
    for ending, kind in _KINDS.items():
        if m := re.fullmatch(rf"(.+?)_{ending}\.pt", name):
            return CheckpointName(m[1], kind, int(m[2]) if m.re.groups > 1 else None)
    return CheckpointName("", "other", None)
