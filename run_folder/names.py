"""What a run's files are called, for those who must tell them from data without reading them.

is_of_a_run("rvq_ckpts", os.listdir("rvq_ckpts"))        # True once a run has saved there
is_sample("rvq_9cb_e0005__20250901-120000.npq")          # True
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

SAMPLES = "samples"  # folder of evaluation audio within that of the run
_RUN_FILE = re.compile(r"rvq_\d+cb(_.+)?_(metrics\.jsonl|(latest|previous|best)\.pt)")
_SAMPLE = re.compile(r"rvq_\d+cb(_.+)?_e\d{4,}__\d{8}-\d{6}")


def is_of_a_run(folder: str, names: Iterable[str]) -> bool:
    """Whether a folder, by the names in it, is one that a run keeps, or the samples of one."""
    if any(name.startswith("rvq_") and _RUN_FILE.fullmatch(name) for name in names):
        return True
    above, own = os.path.split(os.path.abspath(folder))
    return own == SAMPLES and any(map(_RUN_FILE.fullmatch, os.listdir(above)))


def is_sample(name: str) -> bool:
    """Whether a file, by its name, was drawn by a run's model: evaluation audio or its codes."""
    return name.startswith("rvq_") and bool(_SAMPLE.fullmatch(os.path.splitext(name)[0]))
