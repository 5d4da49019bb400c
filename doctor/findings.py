"""The words of a diagnosis: how bad a finding is, what it points to, where and when it holds.

    finding = in_file(summary, "F1", Level.DEAD, Cause.INSTABILITY, "12 values are NaN")
    finding.level >= Level.SUSPECT

A finding belongs to one file or, found in the metrics, to a step. Steps are optimizer steps.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from dataclasses import dataclass
from typing import Any

from doctor.reading.summary import Summary


class Level(enum.IntEnum):
    """How bad a finding is; a file is as bad as its worst finding."""

    INFO = 0
    WARN = 1
    SUSPECT = 2
    OVERFIT = 3
    DIVERGED = 4
    DEAD = 5
    INCOMPATIBLE = 6
    CORRUPT = 7
    UNSAFE = 8


class Cause(enum.Enum):
    """What a finding points to; decides the remedy."""

    FILE = "damaged or foreign file"
    INSTABILITY = "instability"
    LEARNING_RATE = "learning rate"
    OPTIMIZER = "optimizer state"
    EMA = "averaged weights"
    SCALER = "fp16 loss scale"
    OVERFITTING = "overfitting"


@dataclass(frozen=True)
class Finding:
    """One thing that a check found."""

    check: str  # id in the table of docs/doctor.md, such as "F1"
    level: Level
    cause: Cause
    text: str
    path: str | None = None  # the file it was found in; None: in the metrics
    step: int | None = None  # first step at which it is known to hold
    after: int | None = None  # last step at which it is known not to
    where: str = ""  # tensor or codebook
    value: float = math.nan
    baseline: float = math.nan
    n: int = 0  # values behind the baseline

    def with_others(self, others: int) -> Finding:
        """The same for a tensor that stands for others too."""
        if not others:
            return self
        return dataclasses.replace(self, text=f"{self.text} (and {others} more tensors)")


def in_file(
    summary: Summary, check: str, level: Level, cause: Cause, text: str, **facts: Any
) -> Finding:
    """A finding in a file, at the file's step; `facts` are the other fields."""
    return Finding(check, level, cause, text, path=summary.path, step=summary.step, **facts)
