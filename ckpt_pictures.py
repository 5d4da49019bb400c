"""Charts of a run over its steps, as SVG that a page of its own can show.

    frame = Frame(low=0, high=5000, onset=(4000, 4200), healthy=4000, epochs=[])
    svg = "".join(draw(chart, frame) for chart in charts_of(diagnosis, frame))

Axes fit the healthy part of a run and say how far the rest goes: an explosion must not flatten
what came before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ckpt_checks import Level
from ckpt_diagnosis import Diagnosis
from ckpt_report import escaped, figure
from ckpt_summary import Parameter, Summary

Points = list[tuple[int, float]]  # (step, value); a value that is not finite is a gap and a cross


class Line(NamedTuple):
    """A series: its colour is CSS; a line without a colour stays in the grey mass."""

    name: str
    points: Points
    colour: str = ""
    thin: bool = False


class Chart(NamedTuple):
    """Lines over steps, and what else stands in their picture."""

    title: str
    lines: list[Line]
    log: bool = False
    guides: Sequence[tuple[str, float]] = ()
    events: Sequence[tuple[str, int]] = ()


class Frame(NamedTuple):
    """What all pictures share: the steps from low to high, and what happened there."""

    low: int
    high: int
    onset: tuple[int | None, int | None]
    healthy: int | None
    epochs: Points


def charts_of(d: Diagnosis, frame: Frame) -> list[Chart]:
    """The pictures of a run within a span of steps; those without data are left out."""
    charts = [*_metric_charts(d, frame), *_tensor_charts(d, frame)]
    drawn = (c._replace(lines=[x for x in c.lines if len(x.points) > 1]) for c in charts)
    return [c for c in drawn if c.lines]


EVENTS = ("skip", "quarantine", "rollback")


def _metric_charts(d: Diagnosis, frame: Frame) -> Iterator[Chart]:
    history = d.run.history
    steps = [r for r in history.steps if frame.low <= r["step"] <= frame.high]
    epochs = [r for r in history.epochs if frame.low <= r["step"] <= frame.high]
    files = _files_within(d, frame)
    loss = Line("training step", _pairs(steps, "loss"), "var(--c1)", thin=True)
    train = Line("training epoch", _pairs(epochs, "train"), "var(--c3)")
    yield Chart("Loss", [loss, train, Line("validation", _pairs(epochs, "val"), "var(--c2)")])
    sizes = next((s.vocab_sizes for s in d.run.readable if s.vocab_sizes), [])
    guides = [(f"guessing, ln {v}", math.log(v)) for v in sorted(set(sizes)) if v > 1]
    yield Chart("Val CE per codebook", _codebooks(epochs), guides=guides)
    events = [(e, r["step"]) for e in EVENTS[:2] for r in history.of(e)]
    events += [("rollback", step) for step, _ in history.rewinds]
    events = [(e, step) for e, step in events if frame.low <= step <= frame.high]
    norm = Line("norm before clipping", _pairs(steps, "grad_norm"), "var(--c1)", thin=True)
    yield Chart("Gradient norm", [norm], log=True, events=events)
    saved = [(s.step or 0, s.optimizer.get("lr", math.nan)) for s in files if s.optimizer]
    logged = Line("logged", _pairs(steps, "lr"), "var(--c1)")
    yield Chart("Learning rate", [logged, Line("in files", saved, "var(--c4)")])
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


def _pairs(rows: list[dict[str, Any]], key: str) -> Points:
    return [(r["step"], _real(r[key])) for r in rows if key in r]


def _real(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # JSON's integers have no end
        return math.inf


def _codebooks(epochs: list[dict[str, Any]]) -> list[Line]:
    """A line for each codebook, from blue to red."""
    rows = [(r["step"], r.get("val_per_codebook")) for r in epochs]
    found = [(step, values) for step, values in rows if isinstance(values, list)]
    count = max((len(values) for _, values in found), default=0)
    return [
        Line(
            f"k{k}",
            [(step, _real(values[k])) for step, values in found if k < len(values)],
            f"hsl({225 - 215 * k / max(count - 1, 1):.0f} 75% 52%)",
        )
        for k in range(count)
    ]


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


# --- SVG -----------------------------------------------------------------------------------------

CHART = (480, 210)  # units of the view box
LEFT, RIGHT_EDGE, TOP, BOTTOM = 44, 472, 12, 176
POINTS = 240  # of a series that are drawn


class Axis(NamedTuple):
    """A scale of values, linear or logarithmic; what lies outside is drawn at its edge."""

    low: float
    high: float
    log: bool

    def y(self, value: float) -> float:
        """Height of a value in the view box."""
        share = (_scaled(value, self.log) - self.low) / (self.high - self.low)
        return BOTTOM - (BOTTOM - TOP) * min(1.0, max(0.0, share))

    def ticks(self) -> list[float]:
        """Round values within the scale, at most six."""
        if self.log and self.high - self.low >= 1.5:
            exponents = range(math.ceil(self.low), math.floor(self.high) + 1)
            return [10.0**e for e in exponents][:: max(1, -(-len(exponents) // 5))]
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        return _round_values(low, high)


def _scaled(value: float, log: bool) -> float:
    value = min(1e290, max(-1e290, value))
    return math.log10(max(value, 1e-290)) if log else value


def _round_values(low: float, high: float, count: int = 5) -> list[float]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def fit_axis(chart: Chart, good_until: float) -> Axis:
    """A scale that shows the healthy part and the beginning of what left it.

    A loss that explodes to 1e30 would press all before it flat: the scale ends 0.6 healthy spans
    beyond the healthy values, or at ten times their 5 to 95 % range, where all takes over four.
    """
    points = [(step, v) for line in chart.lines for step, v in line.points if math.isfinite(v)]
    points = [(step, v) for step, v in points if v > 0 or not chart.log]
    every = [_scaled(v, chart.log) for _, v in points] or [0.0]
    good = [_scaled(v, chart.log) for step, v in points if step <= good_until]
    good = good if len(good) >= 3 else every
    low, high = min(good), max(good)
    q05, q95 = np.quantile(good, [0.05, 0.95])
    if q95 > q05:
        low, high = max(low, q05 - 10 * (q95 - q05)), min(high, q95 + 10 * (q95 - q05))
    guides = [_scaled(v, chart.log) for _, v in chart.guides]
    if max(every) - min(every) > 4 * (high - low):
        room = max(0.6 * (high - low), 1.0 if chart.log else 0.05 * abs(high))
        low, high = max(min(every), low - room), min(max(every), high + room)
    else:
        low, high = min(every), max(every)
    low, high = min([low, *guides]), max([high, *guides])
    margin = max(0.06 * (high - low), 0.02 if chart.log else 0.005 * abs(high), 1e-12)
    margin = min(margin, 9.0) if chart.log else margin
    return Axis(float(low - margin), float(high + margin), chart.log)


def draw(chart: Chart, frame: Frame) -> str:
    """A chart as a figure with inline SVG; steps and values travel along for the cursor."""
    until = frame.onset[0] if frame.onset[1] is not None else None
    axis = fit_axis(chart, math.inf if until is None else until)
    parts = [_bands(frame), *_grid(axis, frame)]
    parts += [_guide(name, axis.y(value)) for name, value in chart.guides]
    parts += [_path(line, axis, frame) for line in chart.lines]
    parts += [f'<path class="event {e}" d="M{x:.1f} {BOTTOM}v-14"><title>{e} at step {step}</title>'
              "</path>" for e, step in chart.events for x in [_x(step, frame)]]  # fmt: skip
    legend = [_legend(line) for line in chart.lines if line.colour]
    grey = sum(not line.colour for line in chart.lines)
    legend += [f'<span class="mass">{grey} other tensors</span>'] if grey else []
    counts = {e: sum(name == e for name, _ in chart.events) for e in EVENTS}
    legend += [f'<span class="tick {e}">{e} {n}</span>' for e, n in counts.items() if n]
    return (
        f"<figure><figcaption><b>{escaped(chart.title)}</b>"
        f'{_off_scale(chart, axis)}<span class="at"></span></figcaption>'
        f'<svg viewBox="0 0 {CHART[0]} {CHART[1]}" data-low="{frame.low}" data-high="{frame.high}" '
        f'role="img" aria-label="{escaped(chart.title)} over steps">{"".join(parts)}'
        f'<path class="cursor" d=""/></svg><div class="legend">{"".join(legend)}</div></figure>'
    )


def share_of(step: float, frame: Frame) -> float:
    """Where a step lies in a frame: 0 at its left end, 1 at its right."""
    return (step - frame.low) / max(frame.high - frame.low, 1)


def _x(step: float, frame: Frame) -> float:
    return LEFT + (RIGHT_EDGE - LEFT) * min(1.0, max(0.0, share_of(step, frame)))


def _bands(frame: Frame) -> str:
    """The span of the onset, and the step of the last healthy file."""
    text = ""
    if frame.onset[1] is not None and frame.onset[1] >= frame.low:
        left = _x(frame.low if frame.onset[0] is None else frame.onset[0], frame)
        width = max(3.0, _x(frame.onset[1], frame) - left)
        text += f'<rect class="onset" x="{left:.1f}" y="{TOP}" width="{width:.1f}" '
        text += f'height="{BOTTOM - TOP}"><title>onset</title></rect>'
    if frame.healthy is not None and frame.low <= frame.healthy <= frame.high:
        x = _x(frame.healthy, frame)
        text += f'<path class="healthy" d="M{x:.1f} {TOP}V{BOTTOM}"><title>last healthy file'
        text += "</title></path>"
    return text


def _grid(axis: Axis, frame: Frame) -> Iterator[str]:
    for value in axis.ticks():
        y = axis.y(value)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT_EDGE}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{value:.3g}</text>'
    for value in _round_values(frame.low, max(frame.high, frame.low + 1), 6):
        x = _x(value, frame)
        yield f'<text x="{x:.1f}" y="{BOTTOM + 15}" class="mid">{_short(value)}</text>'
        if frame.epochs:
            epoch = min(frame.epochs, key=lambda known: abs(known[0] - value))[1]
            yield f'<text x="{x:.1f}" y="{BOTTOM + 28}" class="mid">ep {epoch:.0f}</text>'


def _short(step: float) -> str:
    return f"{step / 1000:.6g}k" if abs(step) >= 10_000 else f"{step:.6g}"


def _guide(name: str, y: float) -> str:
    return (
        f'<path class="guide" d="M{LEFT} {y:.1f}H{RIGHT_EDGE}"/>'
        f'<text x="{LEFT + 4}" y="{y - 4:.1f}">{name}</text>'
    )


def thinned(points: Points, count: int = POINTS) -> Points:
    """At most `count` points that keep every spike: the extremes, and a gap, of each stretch."""
    if len(points) <= count:
        return points
    size = math.ceil(len(points) / (count // 2))
    kept: set[int] = {0, len(points) - 1}
    for first in range(0, len(points), size):
        span = range(first, min(first + size, len(points)))
        finite = [i for i in span if math.isfinite(points[i][1])]
        if finite:
            kept |= {min(finite, key=lambda i: points[i][1])}
            kept |= {max(finite, key=lambda i: points[i][1])}
        if len(finite) < len(span):
            kept.add(next(i for i in span if not math.isfinite(points[i][1])))
    return [points[i] for i in sorted(kept)]


def _path(line: Line, axis: Axis, frame: Frame) -> str:
    points, path, dots, crosses, pen = thinned(line.points), "", "", "", "M"
    for step, value in points:
        x = _x(step, frame)
        if math.isfinite(value) and not (axis.log and value <= 0):
            path += f"{pen}{x:.1f} {axis.y(value):.1f}"
            dots += f"M{x:.1f} {axis.y(value):.1f}h0"
            pen = "L"
        else:
            crosses += f"M{x - 3:.1f} {TOP}l6 6m0-6l-6 6"
            pen = "M"
    kind = "mass" if not line.colour else "thin" if line.thin else "line"
    data = ""
    if line.colour:
        steps = " ".join(str(step) for step, _ in points)
        values = " ".join(f"{value:.4g}" for _, value in points)
        data = f' style="--c:{line.colour}" data-x="{steps}" data-v="{values}"'
    title = f"<title>{escaped(line.name)}</title>"
    text = f'<path class="{kind}" d="{path}"{data}>{title}</path>'
    if line.colour and not line.thin and len(points) <= 40:
        text += f'<path class="dots" style="--c:{line.colour}" d="{dots}"/>'
    return text + (f'<path class="nan" d="{crosses}"/>' if crosses and line.colour else "")


def _off_scale(chart: Chart, axis: Axis) -> str:
    """How far what is drawn at the upper edge really goes."""
    top = 10**axis.high if axis.log else axis.high
    beyond = [v for line in chart.lines for _, v in line.points if top < v < math.inf]
    lost = any(not math.isfinite(v) for line in chart.lines for _, v in line.points)
    words = [f"&#9650; up to {max(beyond):.2g}"] if beyond else []
    words += ["NaN"] if lost else []
    return f'<span class="off">{" and ".join(words)}</span>' if words else ""


def _legend(line: Line) -> str:
    last = next((v for _, v in reversed(line.points) if math.isfinite(v)), math.nan)
    return (
        f'<span style="--c:{line.colour}" class="key">{escaped(line.name)} '
        f"<output>{figure(last, '.3g')}</output></span>"
    )
