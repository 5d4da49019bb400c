"""One training run as the checks see it: its metrics, its files in order, its learning rate.

    run = ExaminedRun(name, summaries, RunMetrics(rows))
    run.series                   # one file for each moment, by step

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

from doctor.reading.summary import Summary
from run_folder.metrics import RunMetrics
from training.schedule import lr_at_step


@dataclass
class ExaminedRun:
    """The files of one run and its metrics."""

    name: str
    summaries: list[Summary]
    metrics: RunMetrics
    probes: dict[str, Any] = field(default_factory=dict)  # by path: what doctor/probe.py found
    probe_note: str = ""  # on the automatic probe: what was done, or why not
    on_own_data: bool = False  # whether the probes use the training data of the files

    def is_abandoned(self, summary: Summary) -> bool:
        """Whether a later resume or rollback took back the steps of a file."""
        try:
            time_saved = datetime.datetime.strptime(summary.saved_at, "%Y-%m-%dT%H:%M:%S%z")
            saved = time_saved.timestamp()
        except ValueError:
            saved = summary.modified
        rewinds = self.metrics.rewinds
        return any((summary.step or 0) > step and saved < time for step, time in rewinds)

    @cached_property
    def readable(self) -> list[Summary]:
        """Files that could be read and belong to the run's present course, by step."""
        found = [s for s in self.summaries if s.problem is None]
        found = [s for s in found if not self.is_abandoned(s)]
        return sorted(found, key=lambda s: (s.step or 0, s.saved_at, s.kind))

    @cached_property
    def vocab_sizes(self) -> list[int]:
        """V of each codebook; empty where no file contains it."""
        return next((s.vocab_sizes for s in self.readable if s.vocab_sizes), [])

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

    @cached_property
    def _logged_lr(self) -> tuple[list[int], list[float]]:
        rows = [r for r in self.metrics.steps if isinstance(r.get("lr"), float)]
        return [r["step"] for r in rows], [r["lr"] for r in rows]

    def mean_lr(self, first: int, last: int, after: Summary) -> float:
        """Mean learning rate over (first, last]: from the metrics, the schedule, or the file."""
        steps, lrs = self._logged_lr
        low, high = bisect.bisect_right(steps, first), bisect.bisect_right(steps, last)
        if high - low >= 2:
            return float(np.mean(lrs[low:high]))
        if steps and steps[0] <= last <= steps[-1]:
            return float(np.interp((first + last) / 2, steps, lrs))
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
