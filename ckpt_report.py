"""What the doctor says, in four forms: terminal lines, JSON, CSV, one HTML page with pictures.

    print(*terminal_lines(diagnosis, colour=True), sep="\\n")
    Path("report.html").write_text(as_html([diagnosis], "rvq_ckpts"))

File and tensor names are hostile input: control characters are escaped everywhere, markup in the
page, whose policy runs no script but its own and loads nothing.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import enum
import hashlib
import html
import io
import math
import textwrap
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ckpt_checks import Finding, Level
from ckpt_diagnosis import GRAVITY, Diagnosis, Verdict
from ckpt_summary import Parameter, Summary

FORMAT = 1  # of the JSON report
WIDTH = 80  # columns of a terminal
TABLE_ROWS = 30  # of healthy files; bad ones are always shown
GROUPS = 12  # of findings on a terminal
FINDINGS = 300  # in the page

# --- words ---------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Text on one line without control, direction and surrogate characters: these as escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def figure(value: float | None, form: str = ".4g") -> str:
    """A number; `-` for None and NaN, `inf` beyond floats."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def size_of(count: int) -> str:
    """`719 KB`, `2.1 GB`."""
    power = min(4, int(math.log(max(count, 1), 1000)))
    return f"{count / 1000**power:.3g} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"


class State(NamedTuple):
    """How a file is: a word, the id of its worst finding, a tone."""

    word: str
    check: str
    tone: str  # good, warn or bad

    def __str__(self) -> str:
        return f"{self.word} {self.check}".rstrip()


def state_of(d: Diagnosis, s: Summary) -> State:
    """State of a file, from its own findings and from what the metrics say of its step."""
    level = d.state_of(s)
    check = next((f.check for f in d.findings if f.path == s.path and f.level == level > 0), "")
    if level >= Level.SUSPECT:
        return State(level.name.lower(), check, "bad" if level >= Level.DIVERGED else "warn")
    if s.step is not None and d.run.history.is_abandoned(s):
        return State("taken back", "", "warn")
    if s.step is not None and d.onset[1] is not None and s.step >= d.onset[1]:
        return State("after onset", "", "warn")
    return State("healthy", check, "good")


def tone_of(verdict: Verdict) -> str:
    """Colour of a verdict: good, warn or bad."""
    tones = {Verdict.HEALTHY: "good", Verdict.SUSPECT: "warn", Verdict.OVERFITTING: "warn"}
    return tones.get(verdict, "bad")


def evidence(f: Finding) -> str:
    """`value 9.63, baseline 0.9, n 12`, as far as known."""
    words = [("value", f.value), ("baseline", f.baseline)]
    parts = [f"{word} {figure(x)}" for word, x in words if not math.isnan(x)]
    return ", ".join([*parts, *([f"n {f.n}"] if f.n else [])])


def place_of(f: Finding) -> str:
    """The file that a finding is of, or the metrics."""
    return printable(f.path.rpartition("/")[2]) if f.path else "metrics"


def sign_of(d: Diagnosis) -> str:
    """The first sign in one sentence; without one the worst finding."""
    f = d.first_sign or max(d.findings, key=lambda f: f.level, default=None)
    if f is None or f.level < Level.SUSPECT:
        return "none"
    facts = evidence(f)
    text = f"{f.check} {printable(f.text)}" + (f" ({facts})" if facts else "")
    return text if d.first_sign else f"{place_of(f)}: {text}"


def facts_of(d: Diagnosis, s: Summary) -> str:
    """`step 489600, epoch 340, intact, finite, val 4.2100`."""
    val = next((r.get("val") for r in d.run.history.epochs if r["step"] == s.step), None)
    facts = [f"step {s.step}", f"epoch {s.epoch}" if s.epoch is not None else "", "intact, finite"]
    facts.append(f"val {val:.4f}" if isinstance(val, float) else "")
    facts.append(f"best val {s.best_val:.4f}" if math.isfinite(s.best_val) else "")
    return ", ".join(filter(None, facts))


def notes_of(d: Diagnosis) -> list[str]:
    """What could not be checked, and why."""
    notes = []
    if len(d.run.series) == 1:
        notes.append("One checkpoint only: the absolute checks ran, none against its past.")
    if not d.run.history.rows:
        notes.append("No metrics: nothing between two files can be dated.")
    return notes


def by_step(d: Diagnosis) -> list[Summary]:
    """All files, by step; those without a step last."""
    return sorted(d.run.summaries, key=lambda s: (s.step is None, s.step or 0, s.kind, s.name))


# --- terminal ------------------------------------------------------------------------------------

ANSI = {"good": "32", "warn": "33", "bad": "31", "strong": "1", "faint": "2"}


def terminal_lines(d: Diagnosis, *, colour: bool) -> list[str]:
    """The report of one run at 80 columns; the verdict and the command, which is one line, last."""

    def paint(text: str, *styles: str) -> str:
        codes = ";".join(ANSI[style] for style in styles)
        return f"\x1b[{codes}m{text}\x1b[0m" if colour else text

    lines = [paint(_header(d), "strong"), ""]
    lines += [paint(text, style) if style else text for text, style in _table(d)]
    lines += ["", *(paint(text, style) if style else text for text, style in _grouped(d))]
    lines += ["", *_wrapped("NOTE: ", " ".join(notes_of(d)))]
    verdict = f"{d.verdict.value} {printable(d.headline)}"
    block = _wrapped("VERDICT: ", verdict)
    lines += [paint(text, tone_of(d.verdict), "strong") for text in block]
    lines += _wrapped("FIRST SIGN: ", sign_of(d))
    s = d.last_healthy
    healthy = f"{printable(s.name)} ({facts_of(d, s)})" if s else "none"
    lines += _wrapped("LAST HEALTHY: ", healthy)
    lines += _wrapped("REMEDY: ", printable(d.remedy))
    if d.command:
        lines.append(paint("RESUME WITH: ", "strong") + printable(d.command))
    return lines


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=label, subsequent_indent="  ", break_on_hyphens=False
    )


def _header(d: Diagnosis) -> str:
    rows = len(d.run.history.rows)
    files = len(d.run.summaries)
    return f"{printable(d.run.name)}: {files} files, {rows or 'no'} rows of metrics"


HEAD = ("step", "epoch", "file", "kind", "size", "best val", "state")
RIGHT = (0, 1, 4, 5)  # columns of numbers


def _table(d: Diagnosis) -> Iterator[tuple[str, str]]:
    """Lines of the table of files, each with its style."""
    shown = _rows_to_show(d)
    cells = {s.path: _cells(d, s) for s in shown if s}
    widths = [max(map(len, column)) for column in zip(HEAD, *cells.values(), strict=True)]
    widths[2] = min(widths[2], WIDTH - (sum(widths) - widths[2]) - 2 * (len(HEAD) - 1))
    widths[2] = max(widths[2], 12)
    yield _row(HEAD, widths), "faint"
    for s in shown:
        if s is None:
            count = len(d.run.summaries) - len(cells)
            yield f"  ({count} files without findings left out; --json FILE has all)", "faint"
            continue
        yield _row(cells[s.path], widths), state_of(d, s).tone
        if s.problem:
            yield from ((text, "bad") for text in _wrapped("    ", printable(s.problem.text)))


def _cells(d: Diagnosis, s: Summary) -> tuple[str, ...]:
    best = "-" if math.isnan(s.best_val) else f"{s.best_val:.4f}"
    numbers = ["-" if x is None else str(x) for x in (s.step, s.epoch)]
    name = printable(s.name).removeprefix(f"{printable(d.run.name).rpartition('/')[2]}_")
    return (*numbers, name, s.kind, size_of(s.size), best, str(state_of(d, s)))


def _row(cells: Sequence[str], widths: list[int]) -> str:
    padded = [
        _elide(cell, width).rjust(width) if i in RIGHT else _elide(cell, width).ljust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _elide(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 5]}..{text[-3:]}"


def _rows_to_show(d: Diagnosis) -> list[Summary | None]:
    """Every file with a grave finding, the neighbours of the last healthy one, and both ends."""
    files = by_step(d)
    if len(files) <= TABLE_ROWS:
        return list(files)
    anchors = [i for i, s in enumerate(files) if s is d.last_healthy] + [0, len(files) - 1]
    near = {j for i in anchors for j in range(i - 3, i + 4)}
    kept = [
        s if i in near or d.state_of(s) >= Level.SUSPECT else None for i, s in enumerate(files)
    ]  # fmt: skip
    # One line stands for all that is left out, where the first of them would be.
    first = next((i for i, s in enumerate(kept) if s is None), None)
    return [s for i, s in enumerate(kept) if s is not None or i == first]


def _grouped(d: Diagnosis) -> Iterator[tuple[str, str]]:
    """Findings of a check and level as one, the worst first."""
    groups: dict[tuple[int, str], list[Finding]] = {}
    for f in sorted(d.findings, key=lambda f: (-f.level, f.step or 0)):
        groups.setdefault((-f.level, f.check), []).append(f)
    for (level, check), found in list(groups.items())[:GROUPS]:
        f = found[0]
        others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        where = f"{place_of(f)}: " if f.path else f"metrics, step {f.step}: "
        label = f"{Level(-level).name:<9}{check:<3}"
        tone = {Level.INFO: "faint", Level.WARN: ""}.get(Level(-level), "")
        for text in _wrapped(f"{label} ", f"{where}{printable(f.text)}{others}"):
            yield text, tone
    if not groups:
        yield "No findings.", "good"
    if len(groups) > GROUPS:
        yield f"... and {len(groups) - GROUPS} more kinds of findings; --json FILE has all", "faint"


# --- JSON, CSV -----------------------------------------------------------------------------------


def as_json(diagnoses: Sequence[Diagnosis]) -> dict[str, Any]:
    """Everything as JSON's types; what is not finite as null. `verdict` is the worst run's."""
    worst = max((d.verdict for d in diagnoses), key=GRAVITY.index, default=Verdict.NOTHING)
    report = {"format": FORMAT, "verdict": worst, "runs": [_run_as_dict(d) for d in diagnoses]}
    return _plain(report)


def _run_as_dict(d: Diagnosis) -> dict[str, Any]:
    return {
        "run": d.run.name,
        "verdict": d.verdict,
        "headline": d.headline,
        "onset": {"last_good_step": d.onset[0], "first_bad_step": d.onset[1]},
        "first_sign": d.first_sign and _finding_as_dict(d.first_sign),
        "last_healthy": d.last_healthy and d.last_healthy.path,
        "command": d.command,
        "remedy": d.remedy,
        "notes": notes_of(d),
        "metrics_rows": len(d.run.history.rows),
        "findings": [_finding_as_dict(f) for f in d.findings],
        "files": [_file_as_dict(d, s) for s in by_step(d)],
    }


def _finding_as_dict(f: Finding) -> dict[str, Any]:
    return {**dataclasses.asdict(f), "level": f.level.name.lower()}


def _file_as_dict(d: Diagnosis, s: Summary) -> dict[str, Any]:
    fields = {field.name: getattr(s, field.name) for field in dataclasses.fields(s)}
    del fields["history"]
    return {
        **fields,
        "state": state_of(d, s).word,
        "checks": sorted({f.check for f in d.findings if f.path == s.path}),
        "problem": s.problem and s.problem._asdict(),
        "probe": d.run.probes.get(s.path),
        "parameters": [
            {k: v for k, v in dataclasses.asdict(p).items() if k != "sample"} for p in s.parameters
        ],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


NUMBERS = (
    *("rms", "largest", "ema_rms", "ema_distance", "m_rms", "v_root", "v_negative"),
    *("m_over_bound", "v_zero", "v_tiny", "update_rms", "update_cos", "adam_step", "stable_rank"),
)
BAD = ("raw", "ema", "m", "v")


def as_csv(diagnoses: Sequence[Diagnosis]) -> str:
    """A row for each tensor of each file; one without a tensor for a file that was not read."""
    text = io.StringIO()
    table = csv.writer(text)
    head = ("run", "file", "kind", "step", "epoch", "state", "tensor", "shape", "dtype")
    table.writerow([*head, *NUMBERS, *(f"bad_{part}" for part in BAD)])
    for d in diagnoses:
        for s in by_step(d):
            start = [printable(d.run.name), printable(s.path), s.kind, s.step, s.epoch]
            start.append(state_of(d, s).word)
            table.writerows([*start, *_csv_cells(p)] for p in s.parameters)
            if not s.parameters:
                table.writerow(start)
    return text.getvalue()


def _csv_cells(p: Parameter) -> list[Any]:
    numbers = [getattr(p, name) for name in NUMBERS]
    shape = "x".join(map(str, p.shape))
    known = ["" if isinstance(x, float) and math.isnan(x) else x for x in numbers]
    return [printable(p.name), shape, p.dtype, *known, *(p.bad.get(part, 0) for part in BAD)]


# --- pictures: what is drawn ---------------------------------------------------------------------

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


EVENTS = ("skip", "panic", "rollback")


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
    }
    yield Chart("Adam's step before lr, RMS", _highlighted(update, named), log=True)


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


# --- pictures: SVG -------------------------------------------------------------------------------

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
        f"<figure><figcaption><b>{_escaped(chart.title)}</b>"
        f'{_off_scale(chart, axis)}<span class="at"></span></figcaption>'
        f'<svg viewBox="0 0 {CHART[0]} {CHART[1]}" data-low="{frame.low}" data-high="{frame.high}" '
        f'role="img" aria-label="{_escaped(chart.title)} over steps">{"".join(parts)}'
        f'<path class="cursor" d=""/></svg><div class="legend">{"".join(legend)}</div></figure>'
    )


def _x(step: float, frame: Frame) -> float:
    return LEFT + (RIGHT_EDGE - LEFT) * min(1.0, max(0.0, _share(step, frame)))


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
    title = f"<title>{_escaped(line.name)}</title>"
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
        f'<span style="--c:{line.colour}" class="key">{_escaped(line.name)} '
        f"<output>{figure(last, '.3g')}</output></span>"
    )


# --- the page ------------------------------------------------------------------------------------


def _escaped(text: object) -> str:
    return html.escape(printable(str(text)))


def as_html(diagnoses: Sequence[Diagnosis], title: str) -> str:
    """One file without anything from outside; charts follow light and dark, phone and paper."""
    key = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{key}'"
    body = "".join(map(_section, diagnoses)) or "<p>No checkpoints.</p>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}; img-src data:">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{_escaped(title)}</title><style>{STYLE}</style></head>"
        f"<body>{body}<script>{SCRIPT}</script></body></html>\n"
    )


def _section(d: Diagnosis) -> str:
    whole, near = _frames(d)
    pictures = "".join(draw(c, whole) for c in charts_of(d, whole)) if whole else ""
    closer = "".join(draw(c, near) for c in charts_of(d, near)) if near else ""
    return "".join((
        f'<main class="{tone_of(d.verdict)}">', _first_screen(d), _strip(d, whole) if whole else "",
        f'<h2>Around the onset</h2><div class="charts">{closer}</div>' if closer else "",
        f'<h2>The whole run</h2><div class="charts">{pictures}</div>' if pictures else "",
        _findings(d), _files(d), _tensors(d), "</main>",
    ))  # fmt: skip


def _first_screen(d: Diagnosis) -> str:
    """Verdict, when, cause, last healthy file, command: what is read at three in the morning."""
    when, _, cause = d.headline.partition("; cause: ")
    s = d.last_healthy
    healthy = f"<code>{_escaped(s.name)}</code><br>{facts_of(d, s)}" if s else "none"
    rows = [("First sign", _escaped(sign_of(d))), ("Last healthy", healthy)]
    rows = [("Cause", _escaped(cause)), *rows] if cause else rows
    facts = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows)
    command = ""
    if d.command:
        words = " ".join(f"<span>{_escaped(word)}</span>" for word in d.command.split(" "))
        command = f'<div class="command"><code>{words}</code></div>'
    notes = "".join(f'<p class="note">{_escaped(note)}</p>' for note in notes_of(d))
    return (
        f'<header><p class="run">{_escaped(_header(d))}</p><h1>{d.verdict.value}</h1>'
        f'<p class="when">{_escaped(when)}</p><dl>{facts}</dl>'
        f"<h2>{'Type this' if d.command else 'What to do'}</h2>{command}"
        f'<p class="remedy">{_escaped(d.remedy)}</p>{notes}</header>'
    )


def _frames(d: Diagnosis) -> tuple[Frame | None, Frame | None]:
    """Of the whole run, and of the onset where that is a small part of it."""
    rows = [(r["step"], r.get("epoch")) for r in d.run.history.rows]
    known = rows + [(s.step, s.epoch) for s in d.run.summaries if s.step is not None]
    if not known:
        return None, None
    epochs = [(step, float(epoch)) for step, epoch in known if isinstance(epoch, int)]
    low, high = min(step for step, _ in known), max(step for step, _ in known)
    healthy = d.last_healthy.step if d.last_healthy else None
    whole = Frame(low, high, d.onset, healthy, epochs)
    if d.onset[1] is None:
        return whole, None
    starts = [x for x in (d.onset[0], healthy) if x is not None and x <= d.onset[1]]
    first = min(starts, default=low)
    margin = max(2 * (d.onset[1] - first), (high - low) // 50)
    near = whole._replace(low=max(low, first - margin), high=min(high, d.onset[1] + margin))
    return whole, near if near.high - near.low < 0.6 * (high - low) else None


LANES = {
    "archives": ("archive", "step"),
    "latest": ("latest", "previous"),
    "best": ("best", "best archive"),
    "others": ("panic", "quarantine", "other"),
}


def _strip(d: Diagnosis, frame: Frame) -> str:
    """Every file as a dot over steps, a lane for each kind."""
    lanes, band = "", ""
    if d.onset[1] is not None:
        left, right = (_share(x, frame) for x in (d.onset[0] or frame.low, d.onset[1]))
        band = f'<i class="onset" style="left:{left:.2%};width:{right - left:.2%}"></i>'
    for name, kinds in LANES.items():
        files = [s for s in by_step(d) if s.kind in kinds and s.step is not None]
        dots = "".join(_dot(d, s, frame) for s in files)
        if files:
            lanes += f'<div class="lane"><span>{name}</span><div>{band}{dots}</div></div>'
    marks = [("dot good", "healthy"), ("dot warn", "in doubt"), ("dot bad", "bad")]
    marks += [("dot good chosen", "last healthy"), ("band", "onset")]
    key = "".join(f'<span><i class="{kind}"></i>{word}</span> ' for kind, word in marks)
    return (
        f'<h2>Files over steps</h2><div class="strip">{lanes}</div><p class="marks">{key}</p>'
        if lanes
        else ""
    )


def _dot(d: Diagnosis, s: Summary, frame: Frame) -> str:
    state = state_of(d, s)
    kind = f"dot {state.tone}" + (" chosen" if s is d.last_healthy else "")
    left = f"{_share(s.step or 0, frame):.2%}"
    title = f"{_escaped(s.name)}: step {s.step}, {state}"
    return f'<a href="#{_anchor(s)}" class="{kind}" style="left:{left}" title="{title}"></a>'


def _share(step: float, frame: Frame) -> float:
    return (step - frame.low) / max(frame.high - frame.low, 1)


def _anchor(s: Summary) -> str:
    return f"file-{zlib.crc32(s.path.encode(errors='surrogatepass')):08x}"


def _html_table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Rows: an anchor or nothing, and cells that are markup already."""
    cells = "".join(f"<th>{name}</th>" for name in head)
    body = ""
    for anchor, row in rows:
        start = f'<tr id="{anchor}">' if anchor else "<tr>"
        body += start + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
    table = f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _badge(word: str, tone: str) -> str:
    return f'<span class="badge {tone}">{word}</span>'


def _findings(d: Diagnosis) -> str:
    found = sorted(d.findings, key=lambda f: (-f.level, f.step or 0))
    rows = [
        ("", (
            _badge(f.level.name.lower(), "bad" if f.level >= Level.DIVERGED
                   else "warn" if f.level >= Level.SUSPECT else ""),
            f.check, figure(f.step, "d") if f.step is not None else "-",
            f"{_escaped(f.text)}<br><small>{_escaped(place_of(f))}</small>",
            figure(f.value), figure(f.baseline), str(f.n or "-"),
        ))
        for f in found[:FINDINGS]
    ]  # fmt: skip
    head = ("level", "check", "step", "what was found", "value", "baseline", "n")
    left = len(found) - len(rows)
    more = f"<p>{left} more findings: --json FILE has them all.</p>" if left else ""
    table = _html_table(head, rows) if rows else "<p>None.</p>"
    return f"<h2>Findings</h2>{table}{more}"


def _files(d: Diagnosis) -> str:
    rows = []
    for s in by_step(d):
        state = state_of(d, s)
        name = f"<code>{_escaped(s.name)}</code>"
        if s.problem:
            name += f"<br><small>{_escaped(s.problem.text)}</small>"
        best = "-" if math.isnan(s.best_val) else f"{s.best_val:.4f}"
        last = _badge("last healthy", "good") if s is d.last_healthy else ""
        numbers = ["-" if x is None else str(x) for x in (s.step, s.epoch)]
        cells = (_badge(str(state), state.tone) + last, *numbers, name, s.kind, size_of(s.size))
        rows.append((_anchor(s), (*cells, best, _escaped(s.saved_at))))
    head = ("state", "step", "epoch", "file", "kind", "size", "best val", "saved")
    return f"<h2>Files</h2>{_html_table(head, rows)}"


TENSOR_HEAD = ("tensor", "shape", "RMS", "largest", "raw - EMA", "update", "stable rank", "bad")


def _tensors(d: Diagnosis) -> str:
    """Numbers of each tensor in the files that matter, folded."""
    bad = next((s for s in d.run.readable if state_of(d, s).tone == "bad"), None)
    first = next((s for s in d.run.readable if state_of(d, s).tone != "good"), None)
    newest = d.run.readable[-1] if d.run.readable else None
    chosen = {s.path: s for s in (d.last_healthy, first, bad, newest) if s and s.parameters}
    folded = ""
    for s in sorted(chosen.values(), key=lambda s: s.step or 0):
        rows = [
            ("", (
                f"<code>{_escaped(p.name)}</code>", " x ".join(map(str, p.shape)), figure(p.rms),
                figure(p.largest), figure(p.ema_distance), figure(p.update_rms),
                figure(p.stable_rank, ".3g"),
                _escaped(", ".join(f"{part} {n}" for part, n in p.bad.items() if n) or "-"),
            ))
            for p in s.parameters
        ]  # fmt: skip
        state = state_of(d, s)
        folded += f"<details><summary><code>{_escaped(s.name)}</code> step {s.step} "
        folded += f"{_badge(str(state), state.tone)}</summary>{_html_table(TENSOR_HEAD, rows)}"
        folded += "</details>"
    note = "<p>The other files' tensors: --csv FILE.</p>"
    return f"<h2>Tensors</h2>{folded}{note}" if folded else ""


STYLE = """
:root{--bg:#fbfaf8;--card:#fff;--ink:#1c1d21;--soft:#66686f;--rule:#e3e1dc;--good:#18794e;
--warn:#9a5b00;--bad:#c22431;--tint:#c2243118;--c1:#2f6fd6;--c2:#c2410c;--c3:#7a5cc4;--c4:#0f8a8a;
--mass:#a9abb2}
@media (prefers-color-scheme:dark){:root{--bg:#131417;--card:#1b1d21;--ink:#ecebe8;--soft:#9b9da5;
--rule:#33353b;--good:#4cc38a;--warn:#f0a53a;--bad:#ff6b70;--tint:#ff6b7026;--c1:#74a7ff;
--c2:#ff9a5c;--c3:#b8a1f5;--c4:#4fd1c5;--mass:#62656e}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 24px 56px}
.good{--tone:var(--good)}.warn{--tone:var(--warn)}.bad{--tone:var(--bad)}
header{background:var(--card);border:1px solid var(--rule);border-top:6px solid var(--tone);
border-radius:10px;padding:20px 28px 24px}
.run{margin:0;color:var(--soft);font-size:13px;overflow-wrap:anywhere}
h1{margin:6px 0 0;font-size:clamp(40px,9vw,72px);line-height:1.05;letter-spacing:-.02em;
color:var(--tone)}
.when{margin:6px 0 18px;font-size:clamp(18px,3.4vw,25px);line-height:1.3;font-weight:600}
dl{display:grid;grid-template-columns:max-content 1fr;gap:8px 20px;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
h2{font-size:19px;margin:34px 0 10px}header h2{margin:20px 0 6px;font-size:15px;color:var(--soft);
font-weight:400}
code{font:13px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
overflow-wrap:anywhere}
.command{display:flex;gap:12px;align-items:center;background:var(--bg);border:1px solid var(--rule);
border-radius:8px;padding:12px 12px 12px 16px}
.command code{flex:1;font-size:15px;user-select:all}
.command span{display:inline-block;max-width:100%}
button{font:inherit;font-weight:600;color:var(--card);background:var(--ink);border:0;
border-radius:6px;padding:9px 18px;cursor:pointer}
button:focus-visible,.dot:focus-visible{outline:3px solid var(--c1);outline-offset:2px}
.remedy{margin:8px 0 0}.note{margin:8px 0 0;color:var(--warn)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:16px}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:10px;
padding:12px 14px;break-inside:avoid;min-width:0}
figcaption{display:flex;justify-content:space-between;gap:12px;font-size:14px}
.at{color:var(--soft);font-variant-numeric:tabular-nums;white-space:nowrap}
svg{display:block;width:100%;height:auto;overflow:visible;touch-action:pan-y}
svg text{font-size:11px;fill:var(--soft)}.end{text-anchor:end}.mid{text-anchor:middle}
svg path{fill:none;vector-effect:non-scaling-stroke}
.grid{stroke:var(--rule)}.guide{stroke:var(--soft);stroke-dasharray:5 4}
.line{stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.thin{stroke:var(--c);stroke-width:1.2;stroke-linejoin:round}
.mass{stroke:var(--mass);stroke-width:.8;opacity:.55}
.nan{stroke:var(--bad);stroke-width:1.5}.off{color:var(--bad);font-weight:600;font-size:12px;margin-left:auto;
white-space:nowrap}
.dots{stroke:var(--c);stroke-width:5;stroke-linecap:round}
.onset{fill:var(--tint);stroke:var(--bad);stroke-width:.5}
.healthy{stroke:var(--good);stroke-width:2;stroke-dasharray:2 3}
.cursor{stroke:var(--ink);opacity:.5}
.event{stroke-width:1.5;stroke:var(--warn)}.event.rollback,.event.panic{stroke:var(--bad)}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12px;color:var(--soft);min-height:18px}
.legend>span{overflow-wrap:anywhere}.legend .mass{opacity:1}
.key::before{content:"";display:inline-block;width:12px;height:3px;background:var(--c);
margin-right:5px;vertical-align:middle;border-radius:2px}
.tick{color:var(--warn)}.tick.rollback,.tick.panic{color:var(--bad)}
output{color:var(--ink);font-variant-numeric:tabular-nums}
.strip{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:10px 22px}
.lane{display:flex;align-items:center;height:30px;font-size:12px;color:var(--soft)}
.lane>span{width:70px;flex:none}.lane>div{position:relative;flex:1;height:1px;
background:var(--rule)}
.dot{position:absolute;top:-5px;width:11px;height:11px;margin-left:-5px;border-radius:50%;
background:var(--tone);opacity:.85}
.dot.bad{border-radius:1px;transform:rotate(45deg)}.dot.warn{border-radius:2px}
.dot.chosen{box-shadow:0 0 0 3px var(--card),0 0 0 5px var(--good);z-index:1;opacity:1}
.strip .onset{position:absolute;top:-15px;height:30px;min-width:3px;background:var(--tint)}
.marks{font-size:12px;color:var(--soft);margin:8px 0 0}.marks .dot{position:static;
display:inline-block;margin:0 4px 0 12px;vertical-align:-1px}
.marks>span{white-space:nowrap}
.band{display:inline-block;width:14px;height:11px;background:var(--tint);margin:0 4px 0 12px;
border:1px solid var(--bad);vertical-align:-1px}
.wide{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:13px}
th,td{text-align:left;padding:6px 12px;vertical-align:top;border-top:1px solid var(--rule);
font-variant-numeric:tabular-nums}
thead th{border:0;color:var(--soft);font-weight:400;white-space:nowrap}td{min-width:52px}
td code{overflow-wrap:normal;font-size:12px}small{color:var(--soft);font-size:12px}
tr:target td{background:var(--tint)}
.badge{color:var(--tone,var(--soft));font-weight:600;white-space:nowrap;margin-right:8px}
details{margin:8px 0}summary{cursor:pointer;padding:4px 0}
@media (max-width:600px){svg text{font-size:13px}
main{padding:10px 10px 40px}header{padding:14px 16px 18px}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}.command{flex-direction:column;
align-items:stretch}}
@media print{button{display:none}body{background:#fff}.wide{overflow:visible}}
"""

# The cursor of one chart moves those beside it; the readings are the points nearest to its step.
SCRIPT = """
"use strict";
for (const code of document.querySelectorAll(".command code")) {
  const button = document.createElement("button");
  button.textContent = "Copy";
  code.after(button);
  button.onclick = async () => {
    getSelection().selectAllChildren(code);
    try { await navigator.clipboard.writeText(code.textContent); }
    catch { document.execCommand("copy"); }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  };
}
const numbers = text => text ? text.split(" ").map(Number) : [];
for (const group of document.querySelectorAll(".charts")) {
  const charts = [...group.querySelectorAll("figure")].map(figure => {
    const paths = [...figure.querySelectorAll("path[data-x]")];
    const outputs = [...figure.querySelectorAll("output")];
    return {
      svg: figure.querySelector("svg"), at: figure.querySelector(".at"),
      cursor: figure.querySelector(".cursor"),
      series: paths.map((path, i) => ({
        x: numbers(path.dataset.x), v: path.dataset.v.split(" "),
        output: outputs[i], last: outputs[i].textContent,
      })),
    };
  });
  const point = share => {
    for (const chart of charts) {
      const {low, high} = chart.svg.dataset;
      const step = Number(low) + share * (high - low);
      chart.cursor.setAttribute("d", `M${44 + share * 428} 12V176`);
      chart.at.textContent = `step ${Math.round(step)}`;
      for (const s of chart.series) {
        let best = 0;
        s.x.forEach((x, i) => { if (Math.abs(x - step) < Math.abs(s.x[best] - step)) best = i; });
        s.output.textContent = s.v[best];
      }
    }
  };
  const leave = () => charts.forEach(chart => {
    chart.cursor.setAttribute("d", "");
    chart.at.textContent = "";
    chart.series.forEach(s => { s.output.textContent = s.last; });
  });
  for (const chart of charts) {
    chart.svg.addEventListener("pointermove", event => {
      const box = chart.svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * 480;
      point(Math.min(1, Math.max(0, (x - 44) / 428)));
    });
    chart.svg.addEventListener("pointerleave", leave);
  }
}
"""
