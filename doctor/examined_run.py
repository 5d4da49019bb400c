"""One training run as the checks see it: its metrics, its files in order, its learning rate.

    run = ExaminedRun(name, summaries, History(rows))
    run.series                   # one file for each moment, by step
    run.history.steps            # rows of steps that no resume took back

Steps are optimizer steps, losses nats per code.
"""

from __future__ import annotations

import bisect
import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from doctor.reading.summary import MOST_WHOLE, Summary
from training.schedule import lr_at_step


class History:
    """Rows of `*_metrics.jsonl`; apart from them those that a resume or a rollback took back."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.abandoned: list[dict[str, Any]] = []
        self.rewinds: list[tuple[int, float]] = []  # step gone back to, and when
        for row in filter(None, map(_checked_row, rows)):
            if row["event"] in ("start", "resume", "rollback"):
                to = row.get("to_step", row["step"])
                if any(r["step"] > to for r in self.rows):
                    self.rewinds.append((to, row.get("time") or 0.0))
                self.abandoned += [r for r in self.rows if r["step"] > to]
                self.rows = [r for r in self.rows if r["step"] <= to]
            self.rows.append(row)

    def of(self, event: str) -> list[dict[str, Any]]:
        """Rows of an event, in order of steps."""
        return [r for r in self.rows if r.get("event") == event]

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """Rows of single steps."""
        return self.of("step")

    @cached_property
    def epochs(self) -> list[dict[str, Any]]:
        """Rows of validations."""
        return self.of("epoch")

    @cached_property
    def _lr(self) -> tuple[list[int], list[float]]:
        pairs = [(r["step"], r["lr"]) for r in self.steps if isinstance(r.get("lr"), float)]
        return [s for s, _ in pairs], [lr for _, lr in pairs]

    def mean_lr(self, first: int, last: int) -> float:
        """Mean learning rate of the steps in (first, last]; NaN where no row is near."""
        steps, lrs = self._lr
        low, high = bisect.bisect_right(steps, first), bisect.bisect_right(steps, last)
        if high - low >= 2:
            return float(np.mean(lrs[low:high]))
        if not steps or not steps[0] <= last <= steps[-1]:
            return math.nan
        return float(np.interp((first + last) / 2, steps, lrs))

    def is_abandoned(self, summary: Summary) -> bool:
        """Whether a file is of steps that a later resume or rollback took back."""
        saved = _timestamp(summary.saved_at) or summary.modified
        return any((summary.step or 0) > step and saved < time for step, time in self.rewinds)


NUMBERS = ("loss", "lr", "grad_norm", "train", "val", "val_obj", "time", "seconds", "lr_scale")


def _checked_row(row: dict[str, Any]) -> dict[str, Any] | None:
    """A row whose known fields have their types: None where a number was not finite or no number.

    None for rows without event or step: a file may be cut, or be of another program.
    """
    step, event = row.get("step"), row.get("event")
    if not isinstance(event, str) or type(step) is not int or not 0 <= step < MOST_WHOLE:
        return None
    checked = {**row, **{name: finite_number(row[name]) for name in NUMBERS if name in row}}
    if "val_per_codebook" in row:
        values = row["val_per_codebook"]
        checked["val_per_codebook"] = (
            [finite_number(v) for v in values] if type(values) is list else []
        )
    to_step = row.get("to_step", step)
    checked["to_step"] = to_step if type(to_step) is int else step
    checked["flags"] = row["flags"] if isinstance(row.get("flags"), dict) else {}
    epoch = row.get("epoch")
    if type(epoch) is not int or abs(epoch) >= MOST_WHOLE:
        checked.pop("epoch", None)
    return checked


def finite_number(value: Any) -> float | None:
    """A value from a metrics row or the flags; None where it is not finite or no number."""
    good = type(value) in (int, float) and abs(value) < 1e300
    return float(value) if good else None


def _timestamp(text: str) -> float:
    try:
        return datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return 0.0


@dataclass
class ExaminedRun:
    """The files of one run and its metrics."""

    name: str
    summaries: list[Summary]
    history: History
    probes: dict[str, Any] = field(default_factory=dict)  # by path: what doctor/probe.py found
    probe_note: str = ""  # of a probe that nobody asked for: what was done, or why it was not
    on_own_data: bool = False  # whether the probes are on what the files were trained on

    @cached_property
    def readable(self) -> list[Summary]:
        """Files that could be read and belong to the run's present course, by step."""
        found = [s for s in self.summaries if s.problem is None]
        found = [s for s in found if not self.history.is_abandoned(s)]
        return sorted(found, key=lambda s: (s.step or 0, s.saved_at, s.kind))

    @cached_property
    def set_aside(self) -> set[str]:
        """Paths of files that the trainer itself took out of the run; none if there is no other."""
        bad = {s.path for s in self.readable if s.kind in ("panic", "quarantine")}
        return bad if len(bad) < len(self.readable) else set()

    @cached_property
    def series(self) -> list[Summary]:
        """One file for each moment: what can be compared with its neighbours.

        The older script keeps averaged weights in its best files: only its other files count.
        """
        chosen: dict[tuple[int, float, int], Summary] = {}
        for summary in self.readable:
            if summary.step is None or (summary.style != "own" and "best" in summary.kind):
                continue
            if summary.path not in self.set_aside:
                chosen.setdefault(summary.moment, summary)
        return sorted(chosen.values(), key=lambda s: s.moment[:2])

    def previous(self, summary: Summary) -> Summary | None:
        """The file before this one in the series."""
        earlier = [s for s in self.series if (s.step or 0) < (summary.step or 0)]
        return earlier[-1] if earlier else None

    def mean_lr(self, first: int, last: int, after: Summary) -> float:
        """Mean learning rate over (first, last]: from the metrics, the schedule, or the file."""
        found = self.history.mean_lr(first, last)
        if math.isfinite(found):
            return found
        planned = [scheduled_lr(after, step) for step in np.linspace(first + 1, last, 9)]
        if all(map(math.isfinite, planned)):
            return float(np.mean(planned))
        saved = [s.optimizer.get("lr", math.nan) for s in self.readable if s.step is not None]
        return max((lr for lr in saved if math.isfinite(lr)), default=math.nan)


def scheduled_lr(summary: Summary, step: float) -> float:
    """Learning rate that a file's own flags plan for a step, before its groups' factors; or NaN.

    NaN where the schedule runs over seconds: the metrics alone know when a step was taken.
    """
    flags, total = summary.flags, summary.counter("schedule_steps", 0.0)
    schedule = flags.get("schedule", "cosine")
    if summary.style != "own" or not total or flags.get("max_seconds"):
        return math.nan
    if schedule not in ("cosine", "wsd"):
        return math.nan
    return summary.counter("lr_scale", 1.0) * lr_at_step(
        step,
        total,
        lr=summary.flag("lr"),
        eta_min=summary.flag("eta_min"),
        warmup_ratio=summary.flag("warmup_ratio", 0.0),
        schedule=schedule,
        cooldown=max(summary.flag("cooldown", 0.2), 1e-9),  # a hostile file may say 0
    )


def spread_of(values: Sequence[float] | np.ndarray) -> float:
    """Standard deviation of noise that an outlier does not move: from the median distance."""
    return 1.4826 * float(np.median(np.abs(np.array(values) - np.median(values))))
