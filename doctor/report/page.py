"""The doctor's page: one HTML file with the verdict, the command, pictures and tables.

    Path("report.html").write_text(as_html([diagnosis], "rvq_ckpts"), encoding="utf-8")

Its policy runs no script but its own and loads nothing.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

from cli.command_line import figure
from doctor.diagnosis import Diagnosis
from doctor.findings import Level
from doctor.reading.summary import Summary
from doctor.report.pictures import charts_of
from doctor.report.terminal import (
    by_step,
    facts_of,
    header,
    notes_of,
    place_of,
    sign_of,
    size_of,
    state_of,
    tone_of,
)
from pages.charts import Frame, draw, share_of
from pages.html import as_page, badge, command, escaped, table

FINDINGS = 300  # shown at most


def as_html(diagnoses: Sequence[Diagnosis], title: str) -> str:
    """One file without anything from outside; charts follow light and dark, phone and paper."""
    body = "".join(map(_section, diagnoses)) or "<p>No checkpoints.</p>"
    return as_page(title, body, STYLE)


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
    healthy = f"<code>{escaped(s.name)}</code><br>{facts_of(d, s)}" if s else "none"
    rows = [("First sign", escaped(sign_of(d))), ("Last healthy", healthy)]
    rows = [("Cause", escaped(cause)), *rows] if cause else rows
    facts = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows)
    to_type = command(d.command) if d.command else ""
    notes = "".join(f'<p class="note">{escaped(note)}</p>' for note in notes_of(d))
    return (
        f'<header><p class="run">{escaped(header(d))}</p><h1>{d.verdict.value}</h1>'
        f'<p class="when">{escaped(when)}</p><dl>{facts}</dl>'
        f"<h2>{'Type this' if d.command else 'What to do'}</h2>{to_type}"
        f'<p class="remedy">{escaped(d.remedy)}</p>{notes}</header>'
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


def _strip(d: Diagnosis, frame: Frame) -> str:
    """Every file as a dot over steps, a lane for each kind."""
    lanes, band = "", ""
    if d.onset[1] is not None:
        left, right = (share_of(x, frame) for x in (d.onset[0] or frame.low, d.onset[1]))
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
    left = f"{share_of(s.step or 0, frame):.2%}"
    title = f"{escaped(s.name)}: step {s.step}, {state}"
    return f'<a href="#{_anchor(s)}" class="{kind}" style="left:{left}" title="{title}"></a>'


def _anchor(s: Summary) -> str:
    return f"file-{zlib.crc32(s.path.encode(errors='surrogatepass')):08x}"


def _findings(d: Diagnosis) -> str:
    found = sorted(d.findings, key=lambda f: (-f.level, f.step or 0))
    rows = [
        ("", (
            badge(f.level.name.lower(), "bad" if f.level >= Level.DIVERGED
                   else "warn" if f.level >= Level.SUSPECT else ""),
            f.check, figure(f.step, "d") if f.step is not None else "-",
            f"{escaped(f.text)}<br><small>{escaped(place_of(f))}</small>",
            figure(f.value), figure(f.baseline), str(f.n or "-"),
        ))
        for f in found[:FINDINGS]
    ]  # fmt: skip
    head = ("level", "check", "step", "what was found", "value", "baseline", "n")
    left = len(found) - len(rows)
    more = f"<p>{left} more findings: --json FILE has them all.</p>" if left else ""
    return f"<h2>Findings</h2>{table(head, rows) if rows else '<p>None.</p>'}{more}"


def _files(d: Diagnosis) -> str:
    rows = []
    for s in by_step(d):
        state = state_of(d, s)
        name = f"<code>{escaped(s.name)}</code>"
        if s.problem:
            name += f"<br><small>{escaped(s.problem.text)}</small>"
        best = "-" if math.isnan(s.best_val) else f"{s.best_val:.4f}"
        last = badge("last healthy", "good") if s is d.last_healthy else ""
        numbers = ["-" if x is None else str(x) for x in (s.step, s.epoch)]
        cells = (badge(str(state), state.tone) + last, *numbers, name, s.kind, size_of(s.size))
        rows.append((_anchor(s), (*cells, best, escaped(s.saved_at))))
    head = ("state", "step", "epoch", "file", "kind", "size", "best val", "saved")
    return f"<h2>Files</h2>{table(head, rows)}"


TENSOR_HEAD = (
    "tensor",
    "shape",
    "optimizer",
    "RMS",
    "largest",
    "raw - EMA",
    "update",
    "stable rank",
    "bad",
)


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
                f"<code>{escaped(p.name)}</code>", " x ".join(map(str, p.shape)),
                p.optimizer or "-", figure(p.rms),
                figure(p.largest), figure(p.ema_distance), figure(p.update_rms),
                figure(p.stable_rank, ".3g"),
                escaped(", ".join(f"{part} {n}" for part, n in p.bad.items() if n) or "-"),
            ))
            for p in s.parameters
        ]  # fmt: skip
        state = state_of(d, s)
        folded += f"<details><summary><code>{escaped(s.name)}</code> step {s.step} "
        folded += f"{badge(str(state), state.tone)}</summary>{table(TENSOR_HEAD, rows)}"
        folded += "</details>"
    note = "<p>The other files' tensors: --csv FILE.</p>"
    return f"<h2>Tensors</h2>{folded}{note}" if folded else ""


STYLE = """
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
.marks .chosen{margin:0 9px 0 17px}.marks>span{white-space:nowrap}
.band{display:inline-block;width:14px;height:11px;background:var(--tint);margin:0 4px 0 12px;
border:1px solid var(--bad);vertical-align:-1px}
"""
