"""A diagnosis as words, lines of a terminal, JSON and CSV.

    print(*terminal_lines(diagnosis, colour=True), sep="\\n")
    json.dumps(as_json([diagnosis]), allow_nan=False)

File and tensor names are hostile input: control characters are escaped everywhere.
"""

from __future__ import annotations

import csv
import dataclasses
import enum
import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cli.command_line import figure, printable
from doctor.diagnosis import GRAVITY, Diagnosis, Verdict
from doctor.findings import Finding, Level
from doctor.reading.summary import Parameter, Summary

FORMAT = 1  # of the JSON report
WIDTH = 80  # columns of a terminal
TABLE_ROWS = 30  # of healthy files; bad ones are always shown
GROUPS = 12  # of findings on a terminal

# --- words ---------------------------------------------------------------------------------------


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
    """State of a file, from its own findings and from the metrics of its step."""
    if s.problem is not None and s.problem.kind == "foreign":
        return State("foreign", "", "warn")
    level = d.state_of(s)
    check = next((f.check for f in d.findings_of(s) if f.level == level > 0), "")
    if level >= Level.SUSPECT:
        return State(level.name.lower(), check, tone_of_level(level))
    if s.step is not None and d.run.is_abandoned(s):
        return State("taken back", "", "warn")
    newest_good = (d.last_healthy.step if d.last_healthy else None) or 0
    if d.onset[1] is not None and (s.step or 0) >= max(d.onset[1], newest_good + 1):
        return State("after onset", "", "warn")
    return State("healthy", check, "good")


def tone_of_level(level: Level) -> str:
    """Colour of a level: bad or warn; empty for what is no reason to act."""
    return "bad" if level >= Level.DIVERGED else "warn" if level >= Level.SUSPECT else ""


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
    val = next((r.get("val") for r in d.run.metrics.epochs if r["step"] == s.step), None)
    facts = [f"step {s.step}", f"epoch {s.epoch}" if s.epoch is not None else "", "intact, finite"]
    facts.append(f"val {val:.4f}" if isinstance(val, float) else "")
    facts.append(f"best val {s.best_val:.4f}" if math.isfinite(s.best_val) else "")
    return ", ".join(filter(None, facts))


def notes_of(d: Diagnosis) -> list[str]:
    """What could not be checked, and why."""
    notes = []
    if len(d.run.series) == 1:
        notes.append("One checkpoint only: the absolute checks ran, none against its past.")
    notes += filter(None, [printable(d.run.probe_note)])
    if not d.run.metrics.rows:
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

    lines = [paint(header(d), "strong"), ""]
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


def header(d: Diagnosis) -> str:
    """The run, and what there is of it."""
    rows = len(d.run.metrics.rows)
    files = len(d.run.summaries)
    methods = dict.fromkeys(s.optimizer.get("method") for s in d.run.readable)
    optimizer = "".join(f", {method}" for method in methods if method)
    return f"{printable(d.run.name)}: {files} files, {rows or 'no'} rows of metrics{optimizer}"


HEAD = ("step", "epoch", "file", "kind", "size", "best val", "state")
RIGHT = (0, 1, 4, 5)  # columns of numbers


def _table(d: Diagnosis) -> Iterator[tuple[str, str]]:
    """Lines of the table of files, each with its style."""
    shown = _rows_to_show(d)
    cells = [_cells(d, s) for s in shown]
    widths = [max(map(len, column)) for column in zip(HEAD, *cells, strict=True)]
    widths[2] = min(widths[2], WIDTH - (sum(widths) - widths[2]) - 2 * (len(HEAD) - 1))
    widths[2] = max(widths[2], 12)
    yield _row(HEAD, widths), "faint"
    for s, row in zip(shown, cells, strict=True):
        yield _row(row, widths), state_of(d, s).tone
        if s.problem:
            yield from ((text, "bad") for text in _wrapped("    ", printable(s.problem.text)))
    if count := len(d.run.summaries) - len(shown):
        yield f"  ({count} files without findings left out; --json FILE has all)", "faint"


def _cells(d: Diagnosis, s: Summary) -> tuple[str, ...]:
    best = "-" if math.isnan(s.best_val) else f"{s.best_val:.4f}"
    numbers = ["-" if x is None else str(x) for x in (s.step, s.epoch)]
    name = printable(s.name).removeprefix(f"{printable(d.run.name).rpartition('/')[2]}_")
    return (*numbers, name, s.kind, size_of(s.size), best, str(state_of(d, s)))


def _row(cells: Sequence[str], widths: list[int]) -> str:
    padded = []
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        shown = cell if len(cell) <= width else f"{cell[: width - 5]}..{cell[-3:]}"
        padded.append(shown.rjust(width) if i in RIGHT else shown.ljust(width))
    return "  ".join(padded).rstrip()


def _rows_to_show(d: Diagnosis) -> list[Summary]:
    """Every file with a grave finding, the neighbours of the last healthy one, and both ends."""
    files = by_step(d)
    if len(files) <= TABLE_ROWS:
        return files
    anchors = [i for i, s in enumerate(files) if s is d.last_healthy] + [0, len(files) - 1]
    near = {j for i in anchors for j in range(i - 3, i + 4)}
    return [s for i, s in enumerate(files) if i in near or d.state_of(s) >= Level.SUSPECT]


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
        "metrics_rows": len(d.run.metrics.rows),
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


LEFT_OUT = ("name", "shape", "bad", "sample", "zero_rows")  # or in columns of their own
NUMBERS = [f.name for f in dataclasses.fields(Parameter) if f.name not in LEFT_OUT]
BAD = ("raw", "ema", "m", "v", "momentum")


def as_csv(diagnoses: Sequence[Diagnosis]) -> str:
    """A row for each tensor of each file; one without a tensor for a file that was not read."""
    text = io.StringIO()
    table = csv.writer(text)
    head = ("run", "file", "kind", "step", "epoch", "state", "tensor", "shape")
    table.writerow([*head, *NUMBERS, *(f"bad_{part}" for part in BAD)])
    for d in diagnoses:
        for s in by_step(d):
            start = [d.run.name, s.path, s.kind, s.step, s.epoch, state_of(d, s).word]
            for p in s.parameters:
                cells = [*start, p.name, "x".join(map(str, p.shape))]
                cells += [getattr(p, name) for name in NUMBERS]
                table.writerow(map(_csv_cell, [*cells, *(p.bad.get(part, 0) for part in BAD)]))
            if not s.parameters:
                table.writerow(map(_csv_cell, start))
    return text.getvalue()


def _csv_cell(value: Any) -> Any:
    """Nothing for NaN; text on one line."""
    if isinstance(value, str):
        return printable(value)
    return "" if isinstance(value, float) and math.isnan(value) else value
