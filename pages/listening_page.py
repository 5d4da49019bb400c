"""Writes the page that compares checkpoints by ear: players side by side, val, curves, blind mode.

    column = column_of("run/rvq_9cb_best.pt", "rvq_9cb_best.pt", checkpoint)
    size = write_page(Path("listen.html"), [column._replace(cells=cells), ...], {"seed": 0})

One file that loads no other: the curves (SVG), spectrograms (PNG) and sound (MP3) are embedded. The
blind mode is in script.js.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from cli.command_line import in_words
from cli.disk import replace_file
from pages.charts import Chart, Frame, Line, Points, draw, hue
from pages.html import render
from run_folder.files import RunFiles, megabytes
from run_folder.metrics import RunMetrics, finite_number, read_metrics
from run_folder.names import checkpoint_name


class Cell(NamedTuple):
    """A sample: its player, or None where the checkpoint could not draw, and a line below it."""

    player: Markup | None
    line: str


class Column(NamedTuple):
    """A checkpoint: what is known of it, and its samples."""

    name: str
    step: int
    val: float | None  # nats per code at this step
    passes: float | None  # over the music, up to this step
    run: str  # path of the metrics file beside it; "" if it cannot be read
    curve: Points  # (passes, val) of the whole run
    no_curve: str  # why `curve` is empty, or ""
    cells: Sequence[Cell] = ()


def column_of(path: str, name: str, checkpoint: dict[str, Any]) -> Column:
    """Return the column of a loaded checkpoint or of shared weights, still without samples.

    Val is in the checkpoint, passes and curve in the metrics file of the run beside it.
    """
    progress = checkpoint["progress"]
    step = int(progress["step"])
    own = RunMetrics(checkpoint.get("history") or [])
    vals = [row.get("val") for row in own.epochs if row["step"] == step]
    val = vals[-1] if vals else finite_number(progress.get("val"))
    run, rows, no_curve = _metrics_beside(path)
    metrics = RunMetrics(rows)
    start = metrics.newest_start() or own.newest_start()
    passes_a_step = finite_number(start.get("passes_a_step"))
    if not passes_a_step:
        return Column(name, step, val, None, run, [], no_curve or f"{run} lacks passes_a_step")
    known = [(row["step"], row.get("val")) for row in metrics.epochs]
    curve = [(round(n * passes_a_step, 4), v) for n, v in known if v is not None]
    return Column(name, step, val, round(step * passes_a_step, 4), run, curve, no_curve)


def _metrics_beside(path: str) -> tuple[str, list[dict[str, Any]], str]:
    """Return path and rows of the metrics file of a checkpoint's run, or why there are none."""
    name = checkpoint_name(path).run
    if not name:
        return "", [], "its name is not one that a run gives"
    metrics = RunFiles(os.path.dirname(os.path.abspath(path)), name).metrics
    try:
        return str(metrics), read_metrics(metrics), ""
    except OSError as error:
        return "", [], in_words(error)


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Return file names, with as many folders before them as tell them apart, or else a number."""
    whole = [Path(os.path.abspath(path)).parts for path in paths]
    names: list[str] = []
    for parts in whole:
        others = [other for other in whole if other != parts]
        length = 1
        while any(other[-length:] == parts[-length:] for other in others):
            length += 1
        name = "/".join(parts[-length:])
        again = sum(before == parts for before in whole[: len(names)])
        names.append(f"{name} ({again + 1})" if again else name)
    return names


def write_page(path: Path, columns: Sequence[Column], facts: dict[str, Any]) -> str:
    """Write the page atomically; return its size in words. `facts` are how the samples were drawn.

    Raises:
        OSError: the page cannot be written; an older one stays.
    """
    players = "".join(str(cell.player) for column in columns for cell in column.cells)
    values = {
        "title": "Which checkpoint?",
        "columns": columns,
        "facts": facts,
        "rows": list(zip(*(column.cells for column in columns), strict=True)),
        "curves": _curves(columns),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "key": hashlib.sha256(players.encode()).hexdigest(),  # the browser's memory is by page
    }
    size = megabytes(len(render("listen.html", size="", **values).encode()))
    page = render("listen.html", size=size, **values)
    replace_file(path, page.encode(), durable=True)
    return size


def _curves(columns: Sequence[Column]) -> list[Markup]:
    """Draw val over passes of all runs in one chart, and a dot for each checkpoint."""
    runs = {column.run: column.curve for column in columns if column.curve}
    names = [name.removesuffix("_metrics.jsonl") for name in distinct_names(list(runs))]
    marks = [
        Line(c.name, [(c.passes, c.val)], "")
        for c in columns
        if c.passes is not None and c.val is not None
    ]
    lines = [Line(name, curve) for name, curve in zip(names, runs.values(), strict=True)] + marks
    if not lines:
        return []
    coloured = [line._replace(colour=hue(i, len(lines))) for i, line in enumerate(lines)]
    high = max(passes for line in lines for passes, _ in line.points)
    return [draw(Chart("Val of each run", coloured), Frame(0, high, [], unit="pass"))]
