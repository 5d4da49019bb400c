"""Charts of a diagnosed run: its metrics, and what its files say of every tensor.

frame = Frame(low=0, high=5000, epochs=[], onset=(4000, 4200), healthy=4000)
svg = "".join(draw(chart, frame) for chart in charts_of(diagnosis, frame))
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from doctor.diagnosis import Diagnosis
from doctor.findings import Level
from doctor.reading.summary import Parameter, Summary
from pages.charts import (
    EVENTS,
    Chart,
    Frame,
    Line,
    Points,
    codebooks_chart,
    gradient_chart,
    loss_chart,
    points_of,
)


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
    sizes = next((s.vocab_sizes for s in d.run.readable if s.vocab_sizes), [])
    yield codebooks_chart(epochs, sizes)
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
    tensors: dict[str, list[tuple[int, Parameter]]] = {}
    for s in _files_within(d, frame):
        for p in s.parameters:
            tensors.setdefault(p.name, []).append((s.step or 0, p))
    grave = [f for f in d.findings if f.level >= Level.SUSPECT and f.where]
    grave.sort(key=lambda f: f is not d.first_sign)
    named = [f.where.split(" ")[0] for f in grave]
    size = {name: _relative(found) for name, found in tensors.items()}
    yield Chart("Weights: RMS, first file = 1", _highlighted(size, named), log=True)
    apart = {
        name: [(step, p.ema_distance / p.rms) for step, p in found if p.ema_distance * p.rms > 0]
        for name, found in tensors.items()
    }
    yield Chart("Distance raw to EMA, share of RMS", _highlighted(apart, named), log=True)
    update = {
        name: [(step, p.update_rms) for step, p in found if p.update_rms > 0]
        for name, found in tensors.items()
        if found[-1][1].optimizer != "Muon"
    }
    yield Chart("Adam's step before lr, RMS", _highlighted(update, named), log=True)
    momentum = {
        name: [(step, p.m_rms) for step, p in found if p.m_rms > 0]
        for name, found in tensors.items()
        if found[-1][1].optimizer == "Muon"
    }
    yield Chart("Muon's momentum, RMS", _highlighted(momentum, named), log=True)


def _files_within(d: Diagnosis, frame: Frame) -> list[Summary]:
    return [s for s in d.run.series if frame.low <= (s.step or 0) <= frame.high]


def _relative(found: list[tuple[int, Parameter]]) -> Points:
    """RMS over that of the first file that has any."""
    first = next((p.rms for _, p in found if p.rms > 0 and not p.bad.get("raw")), math.nan)
    return [(step, math.nan if p.bad.get("raw") else p.rms / first) for step, p in found]


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
