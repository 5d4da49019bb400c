"""The doctor's page: one HTML file with the verdict, the command, pictures and tables.

    Path("report.html").write_text(as_html([diagnosis], "rvq_ckpts"), encoding="utf-8")

Its policy runs no script but its own and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import math
import zlib
from collections.abc import Iterable, Sequence

from ckpt_checks import Level
from ckpt_diagnosis import Diagnosis
from ckpt_pictures import Frame, charts_of, draw, share_of
from ckpt_report import (
    by_step,
    escaped,
    facts_of,
    figure,
    header,
    notes_of,
    place_of,
    sign_of,
    size_of,
    state_of,
    tone_of,
)
from ckpt_summary import Summary

FINDINGS = 300  # shown at most


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
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head>"
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
    healthy = f"<code>{escaped(s.name)}</code><br>{facts_of(d, s)}" if s else "none"
    rows = [("First sign", escaped(sign_of(d))), ("Last healthy", healthy)]
    rows = [("Cause", escaped(cause)), *rows] if cause else rows
    facts = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows)
    command = ""
    if d.command:
        words = " ".join(f"<span>{escaped(word)}</span>" for word in d.command.split(" "))
        command = f'<div class="command"><code>{words}</code></div>'
    notes = "".join(f'<p class="note">{escaped(note)}</p>' for note in notes_of(d))
    return (
        f'<header><p class="run">{escaped(header(d))}</p><h1>{d.verdict.value}</h1>'
        f'<p class="when">{escaped(when)}</p><dl>{facts}</dl>'
        f"<h2>{'Type this' if d.command else 'What to do'}</h2>{command}"
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
    whole = Frame(low, high, d.onset, healthy, epochs)
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
            f"{escaped(f.text)}<br><small>{escaped(place_of(f))}</small>",
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
        name = f"<code>{escaped(s.name)}</code>"
        if s.problem:
            name += f"<br><small>{escaped(s.problem.text)}</small>"
        best = "-" if math.isnan(s.best_val) else f"{s.best_val:.4f}"
        last = _badge("last healthy", "good") if s is d.last_healthy else ""
        numbers = ["-" if x is None else str(x) for x in (s.step, s.epoch)]
        cells = (_badge(str(state), state.tone) + last, *numbers, name, s.kind, size_of(s.size))
        rows.append((_anchor(s), (*cells, best, escaped(s.saved_at))))
    head = ("state", "step", "epoch", "file", "kind", "size", "best val", "saved")
    return f"<h2>Files</h2>{_html_table(head, rows)}"


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
.event{stroke-width:1.5;stroke:var(--warn)}.event.rollback,.event.quarantine{stroke:var(--bad)}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12px;color:var(--soft);min-height:18px}
.legend>span{overflow-wrap:anywhere}.legend .mass{opacity:1}
.key::before{content:"";display:inline-block;width:12px;height:3px;background:var(--c);
margin-right:5px;vertical-align:middle;border-radius:2px}
.tick{color:var(--warn)}.tick.rollback,.tick.quarantine{color:var(--bad)}
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
