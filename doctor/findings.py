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
        """The same finding, which also mentions how many other tensors it applies to."""
        text = f"{self.text} (and {others} more tensors)" if others else self.text
        return dataclasses.replace(self, text=text)


# --- checks --------------------------------------------------------------------------------------

Function = Callable[["ExaminedRun"], Iterator[Finding]]


class Check(NamedTuple):
    """What a check looks at, and what its findings are unless they say otherwise."""

    function: Function
    text: str
    level: Level
    cause: Cause


CHECKS: dict[str, Check] = {}  # by id; doctor/checks fills it
FAMILIES = "IFOGASHP"  # first letters of ids, in the order of a report


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


def in_file(summary: Summary, id: str, text: str, **fields: Any) -> Finding:
    """A finding in a file, at the file's step; `fields` are the others of a Finding."""
    return in_metrics(id, text, summary.step, path=summary.path, **fields)


def in_metrics(id: str, text: str, step: int | None, **fields: Any) -> Finding:
    """A finding in the metrics, at a step; level and cause are the check's unless given."""
    usual = {"level": CHECKS[id].level, "cause": CHECKS[id].cause}
    return Finding(id, text=text, step=step, **(usual | fields))
