"""One self-contained HTML page: its frame, its style, its script, tables and escapes.

    Path("x.html").write_text(as_page("A run", "<main>...</main>"), encoding="utf-8")

Nothing is loaded and no script but this file's runs: the page's own policy says so. It follows
light and dark, phone and paper. What it shows may be hostile: names go through `escaped`.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence

from cli.command_line import printable


def as_page(title: str, body: str, style: str = "") -> str:
    """The whole file around a body; `style` adds rules."""
    key = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{key}'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}; img-src data:; '
        'media-src data:"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escaped(title)}</title><style>{STYLE}{style}</style></head>"
        f"<body>{body}<script>{SCRIPT}</script></body></html>\n"
    )


def escaped(text: object) -> str:
    """Text for HTML: neither markup nor control characters."""
    return html.escape(printable(str(text)))


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Rows: an anchor or nothing, and cells that are markup already."""
    cells = "".join(f"<th>{name}</th>" for name in head)
    body = ""
    for anchor, row in rows:
        start = f'<tr id="{anchor}">' if anchor else "<tr>"
        body += start + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
    whole = f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{whole}</div>'


def badge(word: str, tone: str) -> str:
    """A word in the colour of `good`, `warn` or `bad`; grey without."""
    return f'<span class="badge {tone}">{word}</span>'


def command(text: str) -> str:
    """A command to copy, which breaks between words alone."""
    words = " ".join(f"<span>{escaped(word)}</span>" for word in text.split(" "))
    return f'<div class="command"><code>{words}</code></div>'


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
.charts,.sounds{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:16px}
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
# Its numbers are those of pages/charts.py's view box.
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
// A spectrogram shows where its sound is, and plays it from where it is clicked.
for (const sample of document.querySelectorAll(".sample")) {
  const audio = sample.querySelector("audio"), picture = sample.querySelector("svg");
  if (!audio) continue;
  const head = picture.querySelector(".playhead");
  audio.ontimeupdate = () => {
    head.setAttribute("d", `M${44 + audio.currentTime / audio.duration * 428} 0V150`);
  };
  picture.onclick = event => {
    const box = picture.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * 480 - 44) / 428;
    audio.currentTime = Math.min(1, Math.max(0, share)) * audio.duration;
    audio.play();
  };
}
"""
