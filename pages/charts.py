"""Charts over steps as SVG, for a page that shows and scripts them (pages/html.py).

    frame = Frame(low=0, high=5000, epochs=[(2500, 1.0), (5000, 2.0)])
    svg = draw(Chart("Loss", [Line("validation", [(2500, 4.6), (5000, 4.4)], "var(--c2)")]), frame)

Axes fit the healthy part of a run and say how far the rest goes: an explosion must not flatten
what came before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cli.command_line import figure
from pages.html import escaped

Points = list[tuple[int, float]]  # (step, value); a value that is not finite is a gap and a cross
Rows = Sequence[dict[str, Any]]  # of metrics, each with a step
EVENTS = ("skip", "quarantine", "rollback")  # rows of metrics that say what the guard did


class Line(NamedTuple):
    """A series: its colour is CSS; lines without one are grey, and counted in the legend."""

    name: str
    points: Points
    colour: str = ""
    thin: bool = False


class Chart(NamedTuple):
    """Lines over steps, and what else stands in their picture."""

    title: str
    lines: list[Line]
    log: bool = False  # the axis of values
    guides: Sequence[tuple[str, float]] = ()  # level lines: name, value
    events: Sequence[tuple[str, int]] = ()  # marks on the axis of steps: one of EVENTS, step


class Frame(NamedTuple):
    """What all pictures share: the steps from low to high, and what happened there."""

    low: int
    high: int
    epochs: Points  # (step, epoch), as far as known
    onset: tuple[int | None, int | None] = (None, None)  # last good and first bad step of a fault
    healthy: int | None = None  # step of the last healthy file


# --- drawing -------------------------------------------------------------------------------------

CHART = (480, 210)  # units of the view box
LEFT, RIGHT_EDGE, TOP, BOTTOM = 44, 472, 12, 176
POINTS = 240  # that are drawn of a series, at most


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
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{_short(value)}</text>'
    for value in _round_values(frame.low, max(frame.high, frame.low + 1), 6):
        x = _x(value, frame)
        yield f'<text x="{x:.1f}" y="{BOTTOM + 15}" class="mid">{_short(value)}</text>'
        if frame.epochs:
            epoch = min(frame.epochs, key=lambda known: abs(known[0] - value))[1]
            yield f'<text x="{x:.1f}" y="{BOTTOM + 28}" class="mid">ep {epoch:.0f}</text>'


def _short(value: float) -> str:
    if 10_000 <= abs(value) < 10_000_000:
        return f"{value / 1000:.6g}k"
    return f"{value:.6g}" if 1 <= abs(value) < 10_000 else f"{value:.3g}"


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


# --- charts of metrics rows ----------------------------------------------------------------------


def loss_chart(steps: Rows, epochs: Rows) -> Chart:
    """Loss of training steps and epochs, and of validation; rows as in `*_metrics.jsonl`."""
    lines = [
        Line("training step", points_of(steps, "loss"), "var(--c1)", thin=True),
        Line("training epoch", points_of(epochs, "train"), "var(--c3)"),
        Line("validation", points_of(epochs, "val"), "var(--c2)"),
    ]
    return Chart("Loss", lines)


def codebooks_chart(epochs: Rows, vocab_sizes: Sequence[int]) -> Chart:
    """Validation's cross-entropy of each codebook, from blue to red, and that of guessing."""
    rows = [(r["step"], r.get("val_per_codebook")) for r in epochs]
    found = [(step, values) for step, values in rows if isinstance(values, list)]
    count = max((len(values) for _, values in found), default=0)
    lines = [
        Line(
            f"k{k}",
            [(step, _real(values[k])) for step, values in found if k < len(values)],
            f"hsl({225 - 215 * k / max(count - 1, 1):.0f} 75% 52%)",
        )
        for k in range(count)
    ]
    guides = [(f"guessing, ln {v}", math.log(v)) for v in sorted(set(vocab_sizes)) if v > 1]
    return Chart("Val CE per codebook", lines, guides=guides)


def gradient_chart(steps: Rows, events: Sequence[tuple[str, int]]) -> Chart:
    """Norm before clipping, and what the guard did."""
    norm = Line("norm before clipping", points_of(steps, "grad_norm"), "var(--c1)", thin=True)
    return Chart("Gradient norm", [norm], log=True, events=events)


def points_of(rows: Rows, key: str) -> Points:
    """A figure of each row that has it, over steps."""
    return [(r["step"], _real(r[key])) for r in rows if key in r]


def _real(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # JSON's integers have no end
        return math.inf
