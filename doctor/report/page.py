"""The doctor's page: one HTML file with the verdict, the command, pictures and tables.

    Path("report.html").write_text(as_html([diagnosis], "rvq_ckpts"), encoding="utf-8")

Its policy runs no script but its own and loads nothing.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from doctor.diagnosis import Diagnosis
from doctor.findings import Level
from doctor.reading.summary import Parameter, Summary
from doctor.report import terminal
from pages.charts import (
    EVENTS,
    Chart,
    Frame,
    Line,
    Points,
    codebooks_chart,
    draw,
    gradient_chart,
    loss_chart,
    points_of,
    share_of,
)
from pages.html import render

FINDINGS = 300  # shown at most


def as_html(diagnoses: Sequence[Diagnosis], title: str) -> str:
    """One file without anything from outside; charts follow light and dark, phone and paper."""
    return render(
        "doctor.html",
        title=title,
        runs=[_run(d) for d in diagnoses],
        words=terminal,
        anchor=_anchor,
        most=FINDINGS,
        tone_of_level=terminal.tone_of_level,
    )


def _run(d: Diagnosis) -> dict[str, Any]:
    """What the template shows of a run beside its diagnosis."""
    whole, near = _frames(d)
    when, _, cause = d.headline.partition("; cause: ")
    return {
        "d": d,
        "when": when,
        "cause": cause,
        "onset": _onset(d, whole) if whole else None,
        "lanes": _lanes(d, whole) if whole else [],
        "near": [draw(c, near) for c in charts_of(d, near)] if near else [],
        "whole": [draw(c, whole) for c in charts_of(d, whole)] if whole else [],
        "files": terminal.by_step(d),
        "findings": sorted(d.findings, key=lambda f: (-f.level, f.step or 0)),
        "measured": _measured(d),
    }


def _frames(d: Diagnosis) -> tuple[Frame | None, Frame | None]:
    """Of the whole run, and of the onset where that is a small part of it."""
    rows = [(r["step"], r.get("epoch")) for r in d.run.metrics.rows]
    known = rows + [(s.step, s.epoch) for s in d.run.summaries if s.step is not None]
    if not known:
        return None, None
    epochs = [(step, float(epoch)) for step, epoch in known if isinstance(epoch, int)]
    low, high = min(step for step, _ in known), max(step for step, _ in known)
    healthy = d.last_healthy.step if d.last_healthy else None
    whole = Frame(low, high, epochs, d.onset, healthy)
    if d.onset[1] is None:
        return whole, None
    starts = [x for x in (d.onset[0], healthy) if x is not None and x <= d.onset[1]]
    first = min(starts, default=low)
    margin = max(2 * (d.onset[1] - first), (high - low) // 50)
    near = whole._replace(low=max(low, first - margin), high=min(high, d.onset[1] + margin))
    return whole, near if near.high - near.low < 0.6 * (high - low) else None


LANES = {
    "archives": ("archive", "ring"),
    "latest": ("latest", "previous"),
    "best": ("best", "best archive"),
    "others": ("panic", "quarantine", "other"),
}


def _lanes(d: Diagnosis, frame: Frame) -> list[tuple[str, list[tuple[float, Summary]]]]:
    """Every file with its place over steps, a lane for each kind."""
    lanes = []
    for name, kinds in LANES.items():
        files = [s for s in terminal.by_step(d) if s.kind in kinds and s.step is not None]
        if files:
            lanes.append((name, [(share_of(s.step or 0, frame), s) for s in files]))
    return lanes


def _onset(d: Diagnosis, frame: Frame) -> tuple[float, float] | None:
    """Left end and width of the onset, as shares of the frame."""
    if d.onset[1] is None:
        return None
    left = share_of(d.onset[0] or frame.low, frame)
    return left, share_of(d.onset[1], frame) - left


def _anchor(s: Summary) -> str:
    return f"file-{zlib.crc32(s.path.encode(errors='surrogatepass')):08x}"


def _measured(d: Diagnosis) -> list[Summary]:
    """The files whose tensors matter: last healthy, first in doubt, first bad, newest."""
    bad = next((s for s in d.run.readable if terminal.state_of(d, s).tone == "bad"), None)
    first = next((s for s in d.run.readable if terminal.state_of(d, s).tone != "good"), None)
    newest = d.run.readable[-1] if d.run.readable else None
    chosen = {s.path: s for s in (d.last_healthy, first, bad, newest) if s and s.parameters}
    return sorted(chosen.values(), key=lambda s: s.step or 0)


# --- pictures ------------------------------------------------------------------------------------


def charts_of(d: Diagnosis, frame: Frame) -> list[Chart]:
    """The pictures of a run within a span of steps; those without data are left out."""
    charts = [*_metric_charts(d, frame), *_tensor_charts(d, frame)]
    drawn = (c._replace(lines=[x for x in c.lines if len(x.points) > 1]) for c in charts)
    return [c for c in drawn if c.lines]


def _metric_charts(d: Diagnosis, frame: Frame) -> Iterator[Chart]:
    history = d.run.metrics
    steps = [r for r in history.steps if frame.low <= r["step"] <= frame.high]
    epochs = [r for r in history.epochs if frame.low <= r["step"] <= frame.high]
    files = _files_within(d, frame)
    yield loss_chart(steps, epochs)
    yield codebooks_chart(epochs, d.run.vocab_sizes)
    events = [(e, r["step"]) for e in EVENTS[:2] for r in history.of(e)]
    events += [("rollback", step) for step, _ in history.rewinds]
    events = [(e, step) for e, step in events if frame.low <= step <= frame.high]
    yield gradient_chart(steps, events)
    saved = [(s.step or 0, s.optimizer.get("lr", math.nan)) for s in files if s.optimizer]
    logged = Line("logged", points_of(steps, "lr"), "var(--c1)")
    lines = [logged, Line("in files", saved, "var(--c4)")]
    yield Chart("Learning rate", lines, from_zero=True)
    scales = [(s.step or 0, s.scale) for s in files if s.scale is not None]
    yield Chart("Loss scale of fp16", [Line("scale", scales, "var(--c1)")], log=True)


def _tensor_charts(d: Diagnosis, frame: Frame) -> Iterator[Chart]:
    tensors: dict[str, Found] = {}
    for s in _files_within(d, frame):
        for p in s.parameters:
            tensors.setdefault(p.name, []).append((s.step or 0, p))
    grave = [f for f in d.findings if f.level >= Level.SUSPECT and f.where]
    grave.sort(key=lambda f: f is not d.first_sign)
    named = [f.where.split(" ")[0] for f in grave]
    for title, values in TENSOR_CHARTS.items():
        series = {name: values(found) for name, found in tensors.items()}
        yield Chart(title, _highlighted({n: p for n, p in series.items() if p}, named), log=True)


Found = list[tuple[int, Parameter]]  # a tensor in each file, by step


def _size(found: Found) -> Points:
    """RMS over that of the first file that has any."""
    first = next((p.rms for _, p in found if p.rms > 0 and not p.bad.get("raw")), math.nan)
    return [(step, math.nan if p.bad.get("raw") else p.rms / first) for step, p in found]


TENSOR_CHARTS: dict[str, Callable[[Found], Points]] = {
    "Weights: RMS, first file = 1": _size,
    "Distance raw to EMA, share of RMS": lambda found: [
        (step, p.ema_distance / p.rms) for step, p in found if p.ema_distance * p.rms > 0
    ],
    "Adam's step before lr, RMS": lambda found: [
        (step, p.update_rms) for step, p in found if p.optimizer != "Muon" and p.update_rms > 0
    ],
    "Muon's momentum, RMS": lambda found: [
        (step, p.m_rms) for step, p in found if p.optimizer == "Muon" and p.m_rms > 0
    ],
}


def _files_within(d: Diagnosis, frame: Frame) -> list[Summary]:
    return [s for s in d.run.series if frame.low <= (s.step or 0) <= frame.high]


def _highlighted(series: dict[str, Points], named: list[str]) -> list[Line]:
    """All tensors grey; in colour the accused ones and those that end far from the others."""
    ends = {n: math.log(p[-1][1]) for n, p in series.items() if p and 0 < p[-1][1] < math.inf}
    centre = float(np.median([*ends.values()] or [0.0]))
    apart = {n: abs(end - centre) for n, end in ends.items()}
    far = max(6 * float(np.median([*apart.values()] or [0.0])), math.log(1.5))
    outer = sorted((n for n in apart if apart[n] > far), key=lambda n: -apart[n])
    accused = [n for n in dict.fromkeys(named) if n in series][:3]
    chosen = list(dict.fromkeys([*accused, *outer]))[:4]
    lines = [Line(n, p, "", thin=True) for n, p in series.items() if n not in chosen]
    return lines + [Line(n, series[n], f"var(--c{i})") for i, n in enumerate(chosen, 1)]
