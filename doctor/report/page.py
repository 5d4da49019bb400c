"""The doctor's page: one HTML file with the verdict, the command, pictures and tables.

    Path("report.html").write_text(as_html([diagnosis], "rvq_ckpts"), encoding="utf-8")

Its policy runs no script but its own and loads nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from doctor.diagnosis import Diagnosis
from doctor.findings import Level
from doctor.reading.summary import Summary
from doctor.report import terminal
from doctor.report.pictures import charts_of
from pages.charts import Frame, draw, share_of
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
        tone_of_level=_tone_of_level,
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


def _tone_of_level(level: Level) -> str:
    return "bad" if level >= Level.DIVERGED else "warn" if level >= Level.SUSPECT else ""


def _measured(d: Diagnosis) -> list[Summary]:
    """The files whose tensors matter: last healthy, first in doubt, first bad, newest."""
    bad = next((s for s in d.run.readable if terminal.state_of(d, s).tone == "bad"), None)
    first = next((s for s in d.run.readable if terminal.state_of(d, s).tone != "good"), None)
    newest = d.run.readable[-1] if d.run.readable else None
    chosen = {s.path: s for s in (d.last_healthy, first, bad, newest) if s and s.parameters}
    return sorted(chosen.values(), key=lambda s: s.step or 0)
