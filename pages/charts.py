"""Draws charts over steps as SVG, with templates/chart.html; script.js adds a cursor.

    frame = Frame(low=0, high=5000, epochs=[(2500, 1.0), (5000, 2.0)])
    svg = draw(Chart("Loss", [Line("validation", [(2500, 4.6), (5000, 4.4)], "var(--c2)")]), frame)

Axes fit the healthy part of a run, and a note says how far the rest goes: a loss that explodes must
not flatten the curve before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from cli.command_line import figure
from pages.html import render
from run_folder.metrics import gap_of

Points = Sequence[tuple[float, float]]  # (step, value); one that is not finite is drawn as a cross
Rows = Sequence[dict[str, Any]]  # metrics rows, each with a step
EVENTS = ("skip", "quarantine", "rollback")  # metrics rows of what the guard did


class Line(NamedTuple):
    """A line of a chart; `colour` is CSS, and lines without one are drawn grey, without a name."""

    name: str
    points: Points
    colour: str = ""
    thin: bool = False


class Chart(NamedTuple):
    """Lines over steps, with guides and event marks."""

    title: str
    lines: list[Line]
    log: bool = False  # logarithmic axis of values
    from_zero: bool = False  # the axis of values begins at 0, or contains it
    guides: Sequence[tuple[str, float]] = ()  # horizontal lines: name, value
    events: Sequence[tuple[str, int]] = ()  # marks on the axis of steps: one of EVENTS, step


class Frame(NamedTuple):
    """The axis of steps that all charts of a page share, and the marks on it."""

    low: float  # first step
    high: float  # last step
    epochs: Points  # (step, epoch), as far as known
    onset: tuple[int | None, int | None] = (None, None)  # last good and first bad step of a fault
    healthy: int | None = None  # step of the last healthy file
    passes_a_step: float | None = None  # passes over the music in a step, if known
    unit: str = "step"  # of the axis, as it is called there


# --- drawing -------------------------------------------------------------------------------------

# Units of the SVG's view box; script.js repeats these numbers.
WIDTH, HEIGHT = 480, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 472, 12, 176
POINTS = 240  # points drawn of a line, at most
LABEL = 6  # characters of a tick's label that fit beside the axis, also on a phone


class Axis(NamedTuple):
    """An axis of values, linear or log10; values outside low to high are drawn at its edge."""

    low: float
    high: float
    log: bool

    def y(self, value: float) -> float:
        """Return the y coordinate of a value in the view box."""
        share = (_scaled(value, self.log) - self.low) / (self.high - self.low)
        return BOTTOM - (BOTTOM - TOP) * min(1.0, max(0.0, share))

    def ticks(self) -> list[float]:
        """Return round values within the axis, at most six."""
        if self.log and self.high - self.low >= 1.5:
            exponents = range(math.ceil(self.low), math.floor(self.high) + 1)
            return [10.0**e for e in exponents][:: max(1, -(-len(exponents) // 5))]
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        return _round_values(low, high)


def _scaled(value: Any, log: bool) -> Any:
    """Return a value or an array, or its log10, clipped so that it is finite."""
    value = np.clip(value, -1e290, 1e290)
    return np.log10(np.maximum(value, 1e-290)) if log else value


def _round_values(low: float, high: float, count: int = 5) -> list[float]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def fit_axis(chart: Chart, good_until: float) -> Axis:
    """Return an axis that shows the values up to step `good_until`, and the beginning of the rest.

    A loss that explodes to 1e30 would flatten everything before it. So if all values together span
    more than four times the healthy ones, the axis ends 0.6 of the healthy span beyond them.
    Outliers beyond ten times the 5 to 95 % range of the healthy values do not count as healthy.
    """
    points = np.array([p for line in chart.lines for p in line.points], float).reshape(-1, 2)
    points = points[np.isfinite(points[:, 1]) & (not chart.log or points[:, 1] > 0)]
    every = _scaled(points[:, 1], chart.log) if len(points) else np.zeros(1)
    good = every[points[:, 0] <= good_until] if len(points) else every
    good = good if len(good) >= 3 else every
    low, high = good.min(), good.max()
    q05, q95 = np.quantile(good, [0.05, 0.95])
    if q95 > q05:
        low, high = max(low, q05 - 10 * (q95 - q05)), min(high, q95 + 10 * (q95 - q05))
    guides = [_scaled(v, chart.log) for _, v in chart.guides]
    least, most = every.min(), every.max()
    if most - least > 4 * (high - low):
        room = max(0.6 * (high - low), 1.0 if chart.log else 0.05 * abs(high))
        least, most = max(least, low - room), min(most, high + room)
    low, high = min([least, *guides]), max([most, *guides])
    low, high = (min(low, 0.0), max(high, 0.0)) if chart.from_zero else (low, high)
    margin = max(0.06 * (high - low), 0.02 if chart.log else 0.005 * abs(high), 1e-12)
    margin = min(margin, 9.0) if chart.log else margin
    bottom = low if chart.from_zero and low == 0 else low - margin
    return Axis(float(bottom), float(high + margin), chart.log)


def draw(chart: Chart, frame: Frame) -> Markup:
    """Render a chart as a figure with inline SVG; it contains steps and values for the cursor."""
    until = frame.onset[0] if frame.onset[1] is not None else None
    axis = fit_axis(chart, math.inf if until is None else until)
    ticks = axis.ticks()
    labels, power = labels_of(ticks)
    heights = [round(axis.y(value), 1) for value in ticks]
    return render(
        "chart.html",
        chart=chart, frame=frame, power=power, beyond=_off_scale(chart, axis),
        width=WIDTH, height=HEIGHT, left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM,
        onset=_onset(frame), healthy=_healthy(frame),
        values=list(zip(heights, labels, strict=True)), steps=_steps(frame),
        below="pass" if frame.passes_a_step else "epoch" if frame.epochs else "",
        guides=[(round(axis.y(value), 1), name) for name, value in chart.guides],
        strokes=[_stroke(line, axis, frame) for line in chart.lines],
        events=[(_x(step, frame), event, step) for event, step in chart.events],
        grey=sum(not line.colour for line in chart.lines),
        counts={e: sum(name == e for name, _ in chart.events) for e in EVENTS},
    )  # fmt: skip


def share_of(step: float, frame: Frame) -> float:
    """Return the place of a step in a frame, from 0 (low or before) to 1 (high or beyond)."""
    return min(1.0, max(0.0, (step - frame.low) / (frame.high - frame.low or 1)))


def _x(step: float, frame: Frame) -> float:
    return round(LEFT + (RIGHT - LEFT) * share_of(step, frame), 1)


def _onset(frame: Frame) -> tuple[float, float] | None:
    """Return left edge and width of the span from the last good to the first bad step, or None."""
    good, bad = frame.onset
    if bad is None or bad < frame.low:
        return None
    left = _x(frame.low if good is None else good, frame)
    return left, max(3.0, round(_x(bad, frame) - left, 1))


def _healthy(frame: Frame) -> float | None:
    if frame.healthy is None or not frame.low <= frame.healthy <= frame.high:
        return None
    return _x(frame.healthy, frame)


def _steps(frame: Frame) -> list[tuple[float, str, str]]:
    """Return the ticks of the axis of steps: x, step, and passes or else the nearest epoch."""
    known, found = np.array([step for step, _ in frame.epochs], float), []
    span = frame.high - frame.low or 1
    for value in _round_values(frame.low, frame.low + span, 6):
        below = ""
        if frame.passes_a_step:
            below = f"{value * frame.passes_a_step:.3g}"
        elif frame.epochs:
            below = f"{frame.epochs[int(np.abs(known - value).argmin())][1]:.0f}"
        found.append((_x(value, frame), _short(value), below))
    return found


def labels_of(ticks: Sequence[float]) -> tuple[list[str], int]:
    """Return the labels of ticks, all different, and the power of ten by which they are divided."""
    labels = [_short(value) for value in ticks]
    if all(len(label) <= LABEL for label in labels):
        return labels, 0
    power = math.floor(math.log10(max(abs(value) for value in ticks)))
    return [f"{value / 10.0**power:.6g}" for value in ticks], power


def _short(value: float) -> str:
    return f"{value / 1000:.6g}k" if 10_000 <= abs(value) < 10_000_000 else f"{value:.6g}"


def thinned(points: Points, count: int = POINTS) -> Points:
    """Return about `count` points or fewer that keep every spike.

    Each stretch keeps its minimum, its maximum and its first value that is not finite.
    """
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


class Stroke(NamedTuple):
    """A line as SVG paths, and as steps and values for the cursor."""

    line: Line
    path: str
    dots: str  # a dot at each point, if there are few
    crosses: str  # a cross for each value that is not finite
    steps: str
    values: str
    last: str  # the last finite value, for the legend


def _stroke(line: Line, axis: Axis, frame: Frame) -> Stroke:
    points, path, dots, crosses, pen = thinned(line.points), "", "", "", "M"
    for step, value in points:
        x, y = _x(step, frame), axis.y(value)
        if math.isfinite(value) and not (axis.log and value <= 0):
            path += f"{pen}{x:.1f} {y:.1f}"
            dots += f"M{x:.1f} {y:.1f}h0"
            pen = "L"
        else:
            crosses += f"M{x - 3:.1f} {TOP}l6 6m0-6l-6 6"
            pen = "M"
    dots = "" if line.thin or len(points) > 40 else dots
    steps = " ".join(str(step) for step, _ in points)
    values = " ".join(f"{value:.4g}" for _, value in points)
    last = next((v for _, v in reversed(line.points) if math.isfinite(v)), math.nan)
    words = f"{last:,.0f}" if 1000 <= abs(last) < 1e7 else figure(last, ".3g")
    return Stroke(line, path, dots, crosses, steps, values, words)


def _off_scale(chart: Chart, axis: Axis) -> str:
    """Return a note on the values above the axis, and on those that are not finite."""
    top = 10**axis.high if axis.log else axis.high
    beyond = [v for line in chart.lines for _, v in line.points if top < v < math.inf]
    lost = any(not math.isfinite(v) for line in chart.lines for _, v in line.points)
    words = [f"▲ up to {max(beyond):.2g}"] if beyond else []
    return " and ".join([*words, *(["NaN"] if lost else [])])


# --- charts of metrics rows ----------------------------------------------------------------------


def loss_chart(steps: Rows, epochs: Rows) -> Chart:
    """Return the chart of training and validation loss from rows of `*_metrics.jsonl`."""
    lines = [
        Line("training step", points_of(steps, "loss"), "var(--c1)", thin=True),
        Line("training epoch", points_of(epochs, "train"), "var(--c3)"),
        Line("validation", points_of(epochs, "val"), "var(--c2)"),
    ]
    return Chart("Loss", lines)


def val_chart(epochs: Rows) -> Chart:
    """Return the chart of val and train as plain cross-entropy, without smoothing and weights."""
    lines = [
        Line("validation", points_of(epochs, "val"), "var(--c2)"),
        Line("training", points_of(epochs, "train_ce"), "var(--c3)"),
        Line("validation without labels", points_of(epochs, "val_unlabelled"), "var(--c4)"),
    ]
    return Chart("Val and train, cross-entropy", lines)


def gap_chart(epochs: Rows) -> Chart:
    """Return the chart of val minus train, the gap that overfitting opens."""
    gaps = [(r["step"], _real(gap_of(r))) for r in epochs if "train_ce" in r]
    line = Line("val minus train", gaps, "var(--c4)")
    return Chart("Gap that overfitting opens", [line], from_zero=True)


def codebooks_chart(epochs: Rows, vocab_sizes: Sequence[int]) -> Chart:
    """Return the chart of each codebook's val, from blue to red, with ln V as guides."""
    rows = [(r["step"], r.get("val_per_codebook")) for r in epochs]
    found = [(step, values) for step, values in rows if isinstance(values, list)]
    count = max((len(values) for _, values in found), default=0)
    lines = [
        Line(
            f"k{k}",
            [(step, _real(values[k])) for step, values in found if k < len(values)],
            hue(k, count),
        )
        for k in range(count)
    ]
    guides = [(f"guessing, ln {v}", math.log(v)) for v in sorted(set(vocab_sizes)) if v > 1]
    return Chart("Val CE per codebook", lines, guides=guides)


def hue(index: int, count: int) -> str:
    """Return a line's colour, from blue to red."""
    return f"hsl({225 - 215 * index / max(count - 1, 1):.0f} 75% 52%)"


def gradient_chart(steps: Rows, events: Sequence[tuple[str, int]]) -> Chart:
    """Return the chart of the gradient norm before clipping, with what the guard did."""
    norm = Line("norm before clipping", points_of(steps, "grad_norm"), "var(--c1)", thin=True)
    return Chart("Gradient norm", [norm], log=True, events=events)


def points_of(rows: Rows, key: str) -> Points:
    """Return (step, value) of field `key` for each row that has it."""
    return [(r["step"], _real(r[key])) for r in rows if key in r]


def _real(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # JSON's integers have no end
        return math.inf
