"""Writes the HTML page of a run: its state, curves, evaluation audio, flags and versions.

    write_report(RunFiles("rvq_ckpts", "rvq_9cb"), Path("rvq_ckpts/samples"))

Everything comes from the run's metrics and samples, so the page can be written again at any time.
It is one file that loads no other: the curves (SVG) and the sound (MP3) are embedded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from cli.command_line import shell_line
from cli.disk import replace_file
from pages.charts import (
    EVENTS,
    Chart,
    Frame,
    Line,
    Points,
    Rows,
    codebooks_chart,
    draw,
    gap_chart,
    gradient_chart,
    loss_chart,
    points_of,
    val_chart,
)
from pages.html import render
from pages.spectrogram import KEPT, player
from run_folder.files import RunFiles
from run_folder.metrics import (
    RunMetrics,
    finite_number,
    gap_of,
    number,
    perplexity,
    read_metrics,
)
from run_folder.validations import Trouble, trouble_of

EVENT_ROWS = 30  # newest guard events in the table
HALF = 4  # validations that the last half of a run needs for a chart of its own

# --- the facts of a run --------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """A run's metrics rows by kind, without steps and epochs that a rollback or a resume undid."""

    start: dict[str, Any]  # the newest `start` or `resume` row: flags, versions, model, data
    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]  # validations
    events: list[dict[str, Any]]  # what the guard did
    samples: list[dict[str, Any]]
    end: dict[str, Any] | None  # None while the run goes on, or if it was killed
    newest: dict[str, Any]  # the newest row with a step
    trouble: Trouble | None  # found in the newest validation

    @property
    def flags(self) -> dict[str, Any]:
        """The flags of the newest start."""
        return self.start.get("flags") or {}

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the validation with the lowest val, or None."""
        finite = [r for r in self.epochs if isinstance(r.get("val"), float)]
        return min(finite, key=lambda r: r["val"], default=None)

    @property
    def since_best(self) -> int:
        """Number of validations after the best one."""
        best = self.best
        return len(self.epochs) - 1 - self.epochs.index(best) if best else len(self.epochs)

    @property
    def gap(self) -> float | None:
        """Val minus train of the same kind at the newest validation, or None."""
        return gap_of(self.epochs[-1]) if self.epochs else None

    @property
    def seconds(self) -> float:
        """Training seconds since the run's very first start."""
        return float(self.last("seconds") or 0)

    @property
    def share_done(self) -> float:
        """Share of the planned seconds or steps that is done, 0 to 1."""
        step = int(self.newest.get("step") or 0)
        if seconds := self.flags.get("max_seconds"):
            return min(1.0, self.seconds / float(seconds))
        return min(1.0, step / max(int(self.start.get("planned_steps") or 0), step, 1))

    @property
    def seconds_left(self) -> float:
        """Estimated training seconds to the planned end; 0 if unknown."""
        share = self.share_done
        return self.seconds / share - self.seconds if share else 0.0

    def last(self, key: str) -> Any:
        """Return the newest value of a field of `step` or `epoch` rows, or None."""
        rows = sorted([*self.epochs[-1:], *self.steps[-1:]], key=lambda r: r["step"])
        return next((r[key] for r in reversed(rows) if r.get(key) is not None), None)


def story_of(rows: Sequence[dict[str, Any]]) -> Story:
    """Sort the rows of a `*_metrics.jsonl`, given oldest first, by kind."""
    metrics = RunMetrics(rows)
    start: dict[str, Any] = {}
    newest: dict[str, Any] = {}
    events, samples, end = [], [], None
    for row in rows:
        event = row.get("event")
        newest = row if isinstance(row.get("step"), int) else newest
        if event in ("start", "resume"):
            start, end = row, None
        elif event == "sample":
            samples.append(row)
        elif event == "end":
            end = row
        elif event in EVENTS:
            events.append(row)
    trouble = trouble_of(metrics)
    return Story(start, metrics.steps, metrics.epochs, events, samples, end, newest, trouble)


# --- the page ------------------------------------------------------------------------------------


def write_report(files: RunFiles, samples: Path) -> Path:
    """Write the page atomically beside the run's checkpoints; return its path.

    `samples` is the folder of evaluation audio.

    Raises:
        OSError: the metrics cannot be read or the page cannot be written; an older page stays.
    """
    story = story_of(read_metrics(files.metrics))
    page = as_html(story, files, samples).encode()
    replace_file(files.report, page, durable=False)  # a lost page can be written again
    return files.report


def as_html(story: Story, files: RunFiles, samples: Path) -> str:
    """Return the page as HTML; `samples` is the folder of evaluation audio."""
    frame = _frame(story)
    curves, inside = ([draw(c, frame) for c in charts] for charts in _charts(story))
    curves[1:1] = _last_half(story, frame)
    doctor = f"{files.name}_doctor.html"
    return render(
        "run.html",
        title=f"{files.name}: {headline(story)}",
        name=files.name,
        tone=tone_of(story),
        headline=headline(story),
        story=story,
        written=time.strftime("%Y-%m-%d %H:%M", time.localtime(story.newest.get("time") or 0)),
        perplexity=perplexity(story.epochs[-1].get("val") or math.nan) if story.epochs else None,
        curves=curves,
        inside=inside,
        samples=[_sample(row, samples) for row in story.samples[: -KEPT - 1 : -1]],
        event_rows=EVENT_ROWS,
        best_path=shell_line([str(files.best)]),
        folder=shell_line([str(files.folder)]),
        doctor=doctor,
        doctor_path=shell_line([str(files.folder / doctor)]),
        is_examined=(files.folder / doctor).exists(),
    )


def tone_of(story: Story) -> str:
    """Return the colour of a run's state.

    It is `bad` if the run failed, the guard stopped it or val is not finite, `warn` for trouble
    with val or after a rollback or quarantine, else `good`.
    """
    val = story.epochs[-1].get("val") if story.epochs else None
    if {"reason", "error"} & (story.end or {}).keys() or (story.epochs and val is None):
        return "bad"
    return "warn" if story.trouble or any(r["event"] != "skip" for r in story.events) else "good"


def headline(story: Story) -> str:
    """Return the page's headline: `val 4.1932`, or that there is no validation yet."""
    return f"val {number(story.epochs[-1].get('val'))}" if story.epochs else "no validation yet"


def _frame(story: Story) -> Frame:
    rows = [*story.steps, *story.epochs]
    known = [(r["step"], r.get("epoch")) for r in rows]
    epochs: Points = [(step, float(epoch)) for step, epoch in known if isinstance(epoch, int)]
    passes_a_step = finite_number(story.start.get("passes_a_step"))
    high = max((r["step"] for r in rows), default=1)
    return Frame(0, high, epochs, passes_a_step=passes_a_step)


def _last_half(story: Story, frame: Frame) -> list[Markup]:
    """Draw val and train of the last half, whose progress is too small for the whole chart."""
    rows = [r for r in story.epochs if r["step"] >= frame.high // 2]
    if len(rows) < HALF or len(rows) == len(story.epochs):
        return []
    chart = val_chart(rows)._replace(title="The last half of it")
    return [draw(c, frame._replace(low=rows[0]["step"])) for c in _with_points([chart])]


def _charts(story: Story) -> tuple[list[Chart], list[Chart]]:
    """Return the charts of a run's quality and those of its inner workings, without empty ones."""
    steps, epochs = story.steps, story.epochs
    sizes = (story.start.get("model") or {}).get("vocab_sizes") or []
    events = [(r["event"], r["step"]) for r in story.events if isinstance(r.get("step"), int)]
    curves = [val_chart(epochs), gap_chart(epochs), codebooks_chart(epochs, sizes)]
    inside = [
        loss_chart(steps, ()),
        gradient_chart(steps, events),
        _one_line("Learning rate", steps, "lr"),
        _one_line("Frames a second", steps, "frames_per_s"),
        _one_line("Memory, GiB at most", steps, "memory_gib"),
    ]
    return _with_points(curves), _with_points(inside)


def _one_line(title: str, rows: Rows, key: str) -> Chart:
    return Chart(title, [Line(key, points_of(rows, key), "var(--c1)")], from_zero=True)


def _with_points(charts: Sequence[Chart]) -> list[Chart]:
    drawn = (c._replace(lines=[x for x in c.lines if x.points]) for c in charts)
    return [c for c in drawn if c.lines]


class Sample(NamedTuple):
    """Evaluation audio: its metrics row, and a player or the reason why there is none."""

    row: dict[str, Any]
    player: Markup | None
    problem: str


def _sample(row: dict[str, Any], folder: Path) -> Sample:
    if error := row.get("error"):
        return Sample(row, None, f"No sound: {error}")
    path = (folder / str(row.get("file", ""))).with_suffix(".wav")
    try:
        return Sample(row, player(path, path.stat().st_mtime_ns), "")
    except Exception as failure:  # the file is missing or no sound; the page must be written anyway
        return Sample(row, None, f"{path.name}: {failure}")
