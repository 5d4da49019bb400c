"""The words of a diagnosis: checks and their findings, how bad one is, what it points to, when.

    @check("F2", "second moments below zero", Level.CORRUPT, Cause.OPTIMIZER)
    def check_moments(run: ExaminedRun) -> Iterator[Finding]:
        yield in_file(run.summaries[0], "F2", "3 second moments of head.weight are negative")

A finding belongs to one file or, found in the metrics, to a step. Steps are optimizer steps.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from doctor.reading.summary import Summary

if TYPE_CHECKING:
    from doctor.examined_run import ExaminedRun


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


# --- checks --------------------------------------------------------------------------------------

Function = Callable[["ExaminedRun"], Iterator[Finding]]


class Check(NamedTuple):
    """What a check looks at, and what its findings are unless they say otherwise."""

    function: Function
    text: str
    level: Level
    cause: Cause


CHECKS: dict[str, Check] = {}  # by id; doctor/checks fills it
FAMILIES = "IFOGASHP"  # first letters of ids, in the order in which findings of one step are told


def check(
    id: str, text: str, level: Level, cause: Cause = Cause.INSTABILITY
) -> Callable[[Function], Function]:
    """Register a function that takes a run and yields findings; one may stand for several ids."""

    def register(function: Function) -> Function:
        CHECKS[id] = Check(function, text, level, cause)
        return function

    return register


def ids_in_order() -> list[str]:
    """Ids of all checks, family by family."""
    return sorted(CHECKS, key=lambda id: (FAMILIES.index(id[0]), id))


def in_file(
    summary: Summary,
    id: str,
    text: str,
    *,
    level: Level | None = None,
    cause: Cause | None = None,
    **facts: Any,
) -> Finding:
    """A finding of a check in a file, at the file's step; `facts` are the other fields."""
    found = in_metrics(id, text, summary.step, level=level, cause=cause, **facts)
    return dataclasses.replace(found, path=summary.path)


def in_metrics(
    id: str,
    text: str,
    step: int | None,
    *,
    level: Level | None = None,
    cause: Cause | None = None,
    **facts: Any,
) -> Finding:
    """A finding of a check in the metrics, at a step; `facts` are the other fields."""
    usual = CHECKS[id]
    level = usual.level if level is None else level
    return Finding(id, level, cause or usual.cause, text, step=step, **facts)
