"""A run as one page: how it goes, its curves, its sound, and what it was made with.

    write_report(RunFiles("rvq_ckpts", "rvq_9cb"), Path("rvq_ckpts/samples"))

All of it is read from the run's metrics and samples, so the page can be made again at any time. It
is one file that loads nothing: curves are SVG, sound is MP3, both within it.
"""

from __future__ import annotations

import base64
import functools
import io
import math
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cli.command_line import figure
from pages.charts import (
    CHART,
    EVENTS,
    LEFT,
    RIGHT_EDGE,
    Chart,
    Frame,
    Line,
    Points,
    Rows,
    codebooks_chart,
    draw,
    gradient_chart,
    loss_chart,
    points_of,
)
from pages.html import as_page, badge, command, escaped, table
from run_folder.checkpoint import replace_file
from run_folder.files import RunFiles
from run_folder.metrics import duration, number, perplexity, read_metrics

SAMPLES = 4  # newest ones that are in the page, at about 0.2 MB each
EVENT_ROWS = 30  # newest ones in the table
PATIENCE = 10  # validations without a better one, and a fifth of all, make a run look stuck

# --- what is known of a run ----------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """A run's metrics, sorted. Steps and epochs that a rollback or a restart took back are out."""

    start: dict[str, Any]  # the newest `start` or `resume` row: flags, versions, model, data
    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]  # validations
    events: list[dict[str, Any]]  # what the guard did
    samples: list[dict[str, Any]]
    end: dict[str, Any] | None  # None while the run goes on, or when it was killed
    newest: dict[str, Any]  # row that has a step

    @property
    def flags(self) -> dict[str, Any]:
        """Those of the newest start."""
        return self.start.get("flags") or {}

    @property
    def best(self) -> dict[str, Any] | None:
        """The validation with the lowest val."""
        finite = [r for r in self.epochs if isinstance(r.get("val"), float)]
        return min(finite, key=lambda r: r["val"], default=None)

    @property
    def since_best(self) -> int:
        """Validations after the best one."""
        best = self.best
        return len(self.epochs) - 1 - self.epochs.index(best) if best else len(self.epochs)

    @property
    def is_stuck(self) -> bool:
        """Whether val has not improved for long."""
        return self.since_best >= max(PATIENCE, len(self.epochs) // 5)

    @property
    def share_done(self) -> float:
        """Of the planned seconds, steps or epochs; 0 to 1."""
        flags, step = self.flags, int(self.newest.get("step") or 0)
        if seconds := flags.get("max_seconds"):
            return min(1.0, float(self.last("seconds") or 0) / float(seconds))
        return min(1.0, step / max(int(self.start.get("planned_steps") or 0), step, 1))

    def last(self, key: str) -> Any:
        """The newest value of a figure of steps or validations."""
        rows = sorted([*self.epochs[-1:], *self.steps[-1:]], key=lambda r: r["step"])
        return next((r[key] for r in reversed(rows) if r.get(key) is not None), None)


def story_of(rows: Iterable[dict[str, Any]]) -> Story:
    """Sort the rows of a `*_metrics.jsonl`, given oldest first."""
    kept: dict[str, list[dict[str, Any]]] = {"step": [], "epoch": []}
    start: dict[str, Any] = {}
    newest: dict[str, Any] = {}
    events, samples, end = [], [], None
    for row in rows:
        event, has_step = row.get("event"), isinstance(row.get("step"), int)
        newest = row if has_step else newest
        if event in ("start", "resume", "rollback"):
            back = row.get("to_step", row.get("step")) or 0
            kept = {name: [r for r in old if r["step"] <= back] for name, old in kept.items()}
        if event in ("start", "resume"):
            start, end = row, None
        elif event in kept and has_step:
            kept[event].append(row)
        elif event == "sample":
            samples.append(row)
        elif event == "end":
            end = row
        if event in EVENTS:
            events.append(row)
    return Story(start, kept["step"], kept["epoch"], events, samples, end, newest)


# --- the page ------------------------------------------------------------------------------------


def write_report(files: RunFiles, samples: Path) -> Path:
    """Write the page beside the run's checkpoints, whole or not at all; returns its path.

    Raises:
        OSError: no metrics, or no page can be written; an older page is as it was.
    """
    story = story_of(read_metrics(files.metrics))
    page = as_html(story, files, samples).encode()
    replace_file(files.report, page, durable=False)  # it can be made again
    return files.report


def as_html(story: Story, files: RunFiles, samples: Path) -> str:
    """The page; `samples` is the folder that holds the run's .wav files."""
    frame = _frame(story)
    first, more = _charts(story)
    body = "".join((
        f'<main class="{tone_of(story)}">', _header(story, files),
        _pictures("Curves", first, frame), _sound(story, samples),
        _pictures("Inside", more, frame), _events(story), _made_with(story, files), "</main>",
    ))  # fmt: skip
    return as_page(f"{files.name}: {headline(story)}", body, STYLE)


def tone_of(story: Story) -> str:
    """`bad` where the guard stopped the run or val means nothing, `warn` where it is stuck."""
    val = story.epochs[-1].get("val") if story.epochs else None
    if {"reason", "error"} & (story.end or {}).keys() or (story.epochs and val is None):
        return "bad"
    return "warn" if story.is_stuck or any(r["event"] != "skip" for r in story.events) else "good"


def headline(story: Story) -> str:
    """`val 4.1932`, or that there is none yet."""
    return f"val {number(story.epochs[-1].get('val'))}" if story.epochs else "no validation yet"


def _header(story: Story, files: RunFiles) -> str:
    """What is read in ten seconds: how good, how far, whether anything is wrong."""
    facts = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in _facts(story))
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(story.newest.get("time") or 0))
    share = story.share_done
    return (
        f'<header><p class="run">{escaped(files.name)} &middot; {_state(story)} &middot; {made}</p>'
        f"<h1>{headline(story)}</h1>"
        f'<p class="when">{_verdict(story)}</p>'
        f'<div class="progress" title="{share:.0%} done"><i style="width:{share:.2%}"></i></div>'
        f"<dl>{facts}</dl></header>"
    )


def _state(story: Story) -> str:
    if story.end is None:
        return "training"
    if error := story.end.get("error"):
        return f"failed: {escaped(error)}"
    if reason := story.end.get("reason"):
        return f"stopped by the guard: {escaped(reason)}"
    signal = story.end.get("signal")
    return f"stopped by {escaped(signal)}, to go on" if signal else "done"


def _verdict(story: Story) -> str:
    """One sentence on where val stands."""
    best = story.best
    if best is None:
        return "Curves and sound come with the first validation that has a finite val."
    where = f"epoch {best.get('epoch', '?')}"
    if story.since_best == 0:
        return f"The best so far, in {where}."
    stuck = ": it no longer falls" if story.is_stuck else ""
    validations = "validation" if story.since_best == 1 else "validations"
    return f"Best {best['val']:.4f} in {where}, {story.since_best} {validations} ago{stuck}."


def _facts(story: Story) -> list[tuple[str, str]]:
    """Rows of the header: a name and markup."""
    step, planned = story.newest.get("step") or 0, story.start.get("planned_steps")
    seconds = float(story.last("seconds") or 0)
    share = story.share_done
    left = f", {duration(seconds / share - seconds)} left" if 0 < share < 1 and seconds else ""
    of = f" of {planned:,}" if planned and not story.flags.get("max_seconds") else ""
    rows = [("Progress", f"step {step:,}{of}; {duration(seconds)} of training{left}")]
    refused = sum(r["event"] == "skip" for r in story.events)
    back = sum(r["event"] == "rollback" for r in story.events)
    word = badge("calm", "good") if not story.events else badge("look below", "warn")
    rows.append(("Guard", f"{word}{refused} steps refused, {back} rollbacks"))
    speed, rate = story.last("frames_per_s"), (story.start.get("data") or {}).get("frame_rate")
    if speed and rate:
        memory = story.last("memory_gib")
        most = f"; memory {memory:.2f} GiB at most" if memory else ""
        rows.append(
            ("Speed", f"{speed:,.0f} frames/s, {speed / rate:,.0f} x as fast as they sound{most}")
        )
    if story.epochs and (ppl := perplexity(story.epochs[-1].get("val") or math.nan)):
        vocab = (story.start.get("model") or {}).get("vocab_sizes") or [0]
        guess = f"; guessing is {max(vocab):,}" if max(vocab) > 1 else ""
        rows.append(("Perplexity", f"{ppl:,.3g}: as unsure as between so many codes{guess}"))
    return rows


def _frame(story: Story) -> Frame:
    rows = [*story.steps, *story.epochs]
    known = [(r["step"], r.get("epoch")) for r in rows]
    epochs: Points = [(step, float(epoch)) for step, epoch in known if isinstance(epoch, int)]
    return Frame(0, max((r["step"] for r in rows), default=1), epochs)


def _charts(story: Story) -> tuple[list[Chart], list[Chart]]:
    """Those that say how good a run is, and those that say how it works."""
    steps, epochs = story.steps, story.epochs
    sizes = (story.start.get("model") or {}).get("vocab_sizes") or []
    events = [(r["event"], r["step"]) for r in story.events if isinstance(r.get("step"), int)]
    more = [
        gradient_chart(steps, events),
        _one_line("Learning rate", steps, "lr"),
        _one_line("Frames a second", steps, "frames_per_s"),
        _one_line("Memory, GiB at most", steps, "memory_gib"),
    ]
    return [loss_chart(steps, epochs), codebooks_chart(epochs, sizes)], more


def _one_line(title: str, rows: Rows, key: str) -> Chart:
    return Chart(title, [Line(key, points_of(rows, key), "var(--c1)")])


def _pictures(title: str, charts: Sequence[Chart], frame: Frame) -> str:
    drawn = [c._replace(lines=[x for x in c.lines if x.points]) for c in charts]
    figures = "".join(draw(c, frame) for c in drawn if c.lines)
    return f'<h2>{title}</h2><div class="charts">{figures}</div>' if figures else ""


def _events(story: Story) -> str:
    """What the guard did, the newest first."""
    rows = [
        ("", (badge(r["event"], "warn" if r["event"] == "skip" else "bad"),
              str(r.get("step", "-")), str(r.get("epoch", "-")), escaped(r.get("reason", ""))))
        for r in reversed(story.events[-EVENT_ROWS:])
    ]  # fmt: skip
    left = len(story.events) - len(rows)
    more = f"<p>and {left} before; all stand in the metrics.</p>" if left else ""
    if not rows:
        return ""
    return f"<h2>The guard</h2>{table(('event', 'step', 'epoch', 'why'), rows)}{more}"


# --- sound ---------------------------------------------------------------------------------------

SPECTRUM_HZ = 50.0, 20_000.0  # lowest and highest that is drawn
SPECTRUM_ROWS = 150  # bands, each one unit of the view box high; pages/html.py's script knows it


def _sound(story: Story, folder: Path) -> str:
    """The newest samples, to hear and to see."""
    newest = [_sample(row, folder) for row in story.samples[: -SAMPLES - 1 : -1]]
    return f'<h2>Evaluation audio</h2><div class="sounds">{"".join(newest)}</div>' if newest else ""


def _sample(row: dict[str, Any], folder: Path) -> str:
    head = f"<b>epoch {row.get('epoch')}</b><span>step {row.get('step')}</span>"
    picture, note = "", ""
    if error := row.get("error"):
        note = f'<p class="note">No sound: {escaped(error)}</p>'
    else:
        path = (folder / str(row.get("file", ""))).with_suffix(".wav")
        try:
            picture = embedded(path, path.stat().st_mtime_ns)
        except Exception as failure:  # the file is gone, or no sound: the page is no place to die
            note = f'<p class="note">{escaped(path.name)}: {escaped(failure)}</p>'
    if isinstance(row.get("distance"), float):
        music = figure(row.get("distance_music"), ".3f")
        note += f'<p class="legend">distance {row["distance"]:.3f}; held-out music {music}</p>'
    return f'<figure class="sample"><figcaption>{head}</figcaption>{picture}{note}</figure>'


@functools.lru_cache(SAMPLES)
def embedded(path: Path, modified: int) -> str:  # `modified` makes a new file a new entry
    """A .wav as a player with its spectrogram above, both as data within the markup."""
    import soundfile  # training runs without it

    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    compressed = io.BytesIO()
    soundfile.write(compressed, wave, rate, format="MP3")
    sound = base64.b64encode(compressed.getvalue()).decode()
    player = f'<audio controls preload="metadata" src="data:audio/mpeg;base64,{sound}"></audio>'
    return _picture_of_sound(wave.mean(axis=1), rate) + player


def _picture_of_sound(wave: NDArray[np.float32], rate: int) -> str:
    """Spectrogram of a waveform [N] as SVG, with the charts' width and margins."""
    width, height = RIGHT_EDGE - LEFT, SPECTRUM_ROWS
    image = base64.b64encode(_png(spectrogram(wave, rate))).decode()
    seconds, (low, high) = len(wave) / rate, SPECTRUM_HZ

    def y(hz: float) -> float:
        return height - height * math.log(hz / low) / math.log(high / low)

    ticks = "".join(
        f'<text x="{LEFT - 6}" y="{y(hz) + 4:.0f}" class="end">{name}</text>'
        for hz, name in ((100, "100"), (1000, "1k"), (10_000, "10k Hz"))
    )
    ticks += "".join(
        f'<text x="{LEFT + width * share:.0f}" y="{height + 16}" class="{place}">'
        f"{seconds * share:.0f} s</text>"
        for share, place in ((0, "start"), (0.5, "mid"), (1, "end"))
    )
    return (
        f'<svg viewBox="0 0 {CHART[0]} {height + 20}" role="img" '
        'aria-label="spectrogram; click to play from there">'
        f'<image href="data:image/png;base64,{image}" x="{LEFT}" y="0" width="{width}" '
        f'height="{height}" preserveAspectRatio="none"/>{ticks}'
        '<path class="playhead" d=""/></svg>'
    )


def spectrogram(wave: NDArray[np.float32], rate: int) -> NDArray[np.float64]:
    """Levels [F, T] of a waveform [N] in dB below its loudest, -80 to 0; F is logarithmic in Hz.

    F covers SPECTRUM_HZ, lowest first; a column is 1/86 s at 44.1 kHz. Hann windows of 2048.
    """
    window, hop = 2048, 512
    padded = np.pad(wave, (window // 2, window // 2 + hop))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(window), axis=1)) ** 2
    low, high = SPECTRUM_HZ
    edges = np.geomspace(low, high, SPECTRUM_ROWS + 1) * window / rate
    sums = np.concatenate((np.zeros((len(power), 1)), power.cumsum(axis=1)), axis=1)
    # Between two edges lies less than a bin at low frequencies: the running sum is interpolated.
    bins = np.arange(sums.shape[1]) - 0.5
    between = np.stack([np.interp(edges, bins, row) for row in sums])
    bands = np.diff(between, axis=1) / np.diff(edges)
    levels = 10 * np.log10(bands.T / max(bands.max(), 1e-12) + 1e-8)
    return np.clip(levels, -80, 0)


def _png(levels: NDArray[np.float64]) -> bytes:
    import matplotlib.image as picture

    file = io.BytesIO()
    picture.imsave(file, levels, cmap="magma", vmin=-80, vmax=0, origin="lower", format="png")
    return file.getvalue()


# --- what it was made with -----------------------------------------------------------------------


def _made_with(story: Story, files: RunFiles) -> str:
    start = story.start
    model, data = start.get("model") or {}, start.get("data") or {}
    rows = [
        ("model", _model_words(model)),
        ("data", _data_words(data)),
        ("device", escaped(start.get("device", "-"))),
        ("code", escaped(start.get("code") or "no git checkout")),
        ("libraries", escaped(_joined(start.get("libraries") or {}))),
    ]
    cells = [("", (name, text)) for name, text in rows]
    flags = [
        ("", (f"<code>--{escaped(name)}</code>", f"<code>{escaped(value)}</code>"))
        for name, value in sorted(story.flags.items())
        if value is not None and value != ""
    ]
    return (
        f"<h2>What next</h2>{_next_commands(story, files)}"
        f"<h2>Made with</h2>{table(('', ''), cells)}"
        f"<details><summary>All {len(flags)} flags</summary>{table(('flag', 'value'), flags)}"
        "</details>"
    )


def _model_words(model: dict[str, Any]) -> str:
    if not model:
        return "-"
    return escaped(
        f"{model['d_model']} wide, {model['layers']} layers, {model['heads']} heads, "
        f"{model['pattern']}: {model['parameters'] / 1e6:.2f} M parameters; "
        f"{len(model['vocab_sizes'])} codebooks of {max(model['vocab_sizes'])}"
    )


def _data_words(data: dict[str, Any]) -> str:
    if not data:
        return "-"
    return escaped(
        f"{data['files']} files, {data['train_hours']:.2f} hours to train on and "
        f"{data['val_hours']:.2f} to validate; {data['frame_rate']:.2f} frames a second"
    )


def _joined(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value)


def _next_commands(story: Story, files: RunFiles) -> str:
    """To go on, to listen, to ask the doctor; from the folder that the run was started in."""
    page = f"{files.name}_doctor.html"
    doctor = f"python ckpt_doctor.py {shlex.quote(str(files.folder))} --html "
    doctor += shlex.quote(str(files.folder / page))
    link = f' <a href="{escaped(page)}">The doctor\'s page</a> lies beside this one.'
    known = link if (files.folder / page).exists() else ""
    best = shlex.quote(str(files.best))
    rows = [("Listen to the best weights", f"python sample_rvq.py {best} --out song.wav")]
    if story.end is None or "best_val" not in story.end:
        rows.insert(0, ("Go on after a stop", story.start.get("command") or "the same command"))
    parts = [f"<p>{title}:</p>{command(text)}" for title, text in rows]
    return "".join(parts) + f"<p>Ask the doctor what is wrong:{known}</p>{command(doctor)}"


STYLE = """
.progress{height:8px;border-radius:4px;background:var(--rule);margin:0 0 18px;overflow:hidden}
.progress i{display:block;height:100%;background:var(--tone);border-radius:4px}
.sample audio{width:100%;margin-top:8px;height:40px}.sample svg{cursor:pointer}
.playhead{stroke:#fff;stroke-width:1.5}.sample figcaption span{color:var(--soft)}
h2+p{margin-top:0}main>p{margin:12px 0 4px}
"""
