"""What a run says: console lines, the progress bar, metrics rows, TensorBoard.

`*_metrics.jsonl` holds one JSON object a line with `event` first; a number that is not finite
becomes null, since JSON has no NaN.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cli.command_line import UsageError, in_words, problem, say

# --- words ---------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """`59s`, `20m 17s`, `2h 05m`, `2d 11h`."""
    s = max(0, round(seconds))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h {s % 3600 // 60:02d}m"
    return f"{s // 86400}d {s % 86400 // 3600:02d}h"


def perplexity(loss: float) -> float | None:
    """exp(loss), or None where that means nothing: loss not finite, or exp beyond a float."""
    return math.exp(loss) if math.isfinite(loss) and loss < 709 else None


def number(value: float | None, form: str = ".4f") -> str:
    """A figure for the console; `n/a` for None, NaN and infinity."""
    return "n/a" if value is None or not math.isfinite(value) else format(value, form)


# --- the console ---------------------------------------------------------------------------------


class Console:
    """Lines on standard output, problems on standard error, and a bar where there is a terminal.

    `quiet` leaves epoch lines, learning-rate lines and problems, and drops the rest; `silent` drops
    everything, in a process that repeats what another one says.
    """

    def __init__(self, *, quiet: bool = False, silent: bool = False) -> None:
        self.quiet, self.silent = quiet, silent
        self.has_bar = not quiet and not silent and bool(sys.stderr) and sys.stderr.isatty()
        self.bar: tqdm[Any] | None = None

    def detail(self, text: str) -> None:
        """A line that `quiet` drops."""
        if not self.quiet:
            self.line(text)

    def line(self, text: str) -> None:
        """A line that always stands."""
        self._write(text, say)

    def lines(self, texts: Iterable[str]) -> None:
        """Several such."""
        for text in texts:
            self.line(text)

    def problem(self, text: str) -> None:
        """Something went wrong or was refused."""
        self._write(text, problem)

    def _write(self, text: str, write: Callable[[str], None]) -> None:
        if self.silent:
            return
        with tqdm.external_write_mode():  # the bar, if there is one, stays below
            write(text)

    def start_epoch(self, epoch: int, epochs: int, done: int, steps: int) -> None:
        """Begin a bar over an epoch's optimizer steps."""
        if self.has_bar:
            label = f"epoch {epoch}/{epochs}"
            self.bar = tqdm(
                total=steps, initial=done, desc=label, unit="step", miniters=1, leave=False
            )

    def advance(self, loss: float, lr: float, frames_per_s: float, left: float) -> None:
        """One step on: loss in nats, frames per second, seconds left in the run."""
        if self.bar is not None:
            facts = f"loss {number(loss)}, lr {lr:.2e}, {frames_per_s:.0f} frames/s"
            self.bar.set_postfix_str(f"{facts}, run ends in {duration(left)}", refresh=False)
            self.bar.update()

    def end_epoch(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def step_line(row: dict[str, Any], total_steps: int, left: float) -> str:
    """The `--log-lr-steps` line: loss and rates since the last one."""
    total = f"/{total_steps}" if total_steps else ""
    return (
        f"epoch {row['epoch']} step {row['step']}{total} | loss {number(row['loss'])} | "
        f"lr {row['lr']:.3e} | grad norm {number(row['grad_norm'], '.3f')} | "
        f"{row['frames_per_s']:.0f} frames/s | skipped {row['skipped']} | "
        f"ends in {duration(left)}"
    )


def epoch_lines(row: dict[str, Any], wall: float, total: float, *, is_best: bool) -> list[str]:
    """The summary of an epoch: figures on one line, cross-entropy of each codebook below."""
    per_codebook = " ".join(f"{number(x, '.3f'):>6}" for x in row["val_per_codebook"])
    star = " | best so far" if is_best else ""
    return [
        f"epoch {row['epoch']} validated at step {row['step']} | train {number(row['train'])} | "
        f"val {number(row['val'])} | val_obj {number(row['val_obj'])} | "
        f"ppl {number(row['ppl'], '.2f')} | skipped {row['skipped']} | "
        f"{row['frames_per_s']:.0f} frames/s | {duration(wall)}, total {duration(total)}{star}",
        f"      val CE per codebook {per_codebook}",
    ]


# --- metrics -------------------------------------------------------------------------------------

HISTORY_ROWS = 1000  # of metrics that travel in a checkpoint


class MetricsLog:
    """Appends rows to `*_metrics.jsonl` and TensorBoard; keeps the newest in memory.

    Without a path nothing is written: another process does. TensorBoard forgets what it was told
    after `step`, where this part of the run begins.
    """

    def __init__(self, path: Path | None, *, tensorboard: bool = False, step: int = 0) -> None:
        self.file = open(path or os.devnull, "ab")  # noqa: SIM115 - open for the whole run
        if path and self.file.tell() and not _ends_with_newline(path):
            self.file.write(b"\n")  # a killed run may have left half a row
        self.failed = False  # the newest row was not written
        self.history: list[dict[str, Any]] = []
        self.board_path = board_folder(path) if path and tensorboard else None
        self.board: Any = None
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Let TensorBoard forget later steps: they are taken once more."""
        if self.board is not None:
            self.board.close()
        if self.board_path is not None:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _pass_over_board
            self.board = SummaryWriter(str(self.board_path), purge_step=step + 1)

    def write(self, event: str, **fields: Any) -> dict[str, Any]:
        """Append a row at once; returns it. A full disk costs the row, never the run."""
        row = {"event": event, **fields, "time": round(time.time(), 3)}
        row = {key: _jsonable(value) for key, value in row.items()}
        self.history = [*self.history[-HISTORY_ROWS + 1 :], row]
        try:
            self.file.write(json.dumps(row).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            if not self.failed:  # once until a row is written again
                problem(f"metrics rows are not written, training goes on: {in_words(error)}")
            self.failed = True
        else:
            self.failed = False
        self._draw(row)
        return row

    def _draw(self, row: dict[str, Any]) -> None:
        """Points of TensorBoard's curves; a full disk ends them, and not the run."""
        if self.board is None:
            return
        try:
            for key, value in row.items():
                if isinstance(value, float) and key not in ("time", "seconds"):
                    self.board.add_scalar(f"{row['event']}/{key}", value, row.get("step", 0))
        except OSError as error:  # of its thread, some rows ago
            problem(f"TensorBoard's file gets no more points, training goes on: {in_words(error)}")
            self.board = self.board_path = None

    def close(self) -> None:
        """Flush and close; rows that a full disk does not take are lost."""
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            if self.board is not None:
                self.board.close()


def _pass_over_board(error: threading.ExceptHookArgs) -> None:
    """For threads: a system error of TensorBoard's is met by `_draw` too; ours raise none."""
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


MAX_METRICS = 256 << 20  # bytes read of a metrics file, from its end


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a *_metrics.jsonl; lines that are cut or are no JSON objects are passed over."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - MAX_METRICS))
        lines = file.read().splitlines()
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


class RunMetrics:
    """Rows of a `*_metrics.jsonl`, oldest first, without those that a resume or rollback took back.

    The known fields of a row have their types; a number that was not finite, or none, is None. Rows
    without event or step are left out: a file may be cut, or be of another program.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.rewinds: list[tuple[int, float]] = []  # step gone back to, and when
        for row in filter(None, map(_checked_row, rows)):
            if row["event"] in ("start", "resume", "rollback"):
                to = row["to_step"]
                if any(r["step"] > to for r in self.rows):
                    self.rewinds.append((to, row.get("time") or 0.0))
                self.rows = [r for r in self.rows if r["step"] <= to]
            self.rows.append(row)
        self.steps = self.of("step")
        self.epochs = self.of("epoch")  # validations

    def of(self, event: str) -> list[dict[str, Any]]:
        """Rows of an event, in order of steps."""
        return [r for r in self.rows if r["event"] == event]


MOST_WHOLE = 1 << 53  # of steps and epochs: floats count no further, and NumPy not much
NUMBERS = ("loss", "lr", "grad_norm", "train", "val", "val_obj", "time", "seconds", "lr_scale")


def _checked_row(row: dict[str, Any]) -> dict[str, Any] | None:
    step, event, epoch = row.get("step"), row.get("event"), row.get("epoch")
    if not isinstance(event, str) or type(step) is not int or not 0 <= step < MOST_WHOLE:
        return None
    checked = {**row, **{name: finite_number(row[name]) for name in NUMBERS if name in row}}
    if "val_per_codebook" in row:
        values = row["val_per_codebook"]
        checked["val_per_codebook"] = (
            [finite_number(v) for v in values] if type(values) is list else []
        )
    to_step = row.get("to_step", step)
    checked["to_step"] = to_step if type(to_step) is int else step
    checked["flags"] = row["flags"] if isinstance(row.get("flags"), dict) else {}
    if type(epoch) is not int or abs(epoch) >= MOST_WHOLE:
        checked.pop("epoch", None)
    return checked


def finite_number(value: Any) -> float | None:
    """A value from a row of metrics or the flags; None where it is not finite or no number."""
    good = type(value) in (int, float) and abs(value) < 1e300
    return float(value) if good else None


def code_version(folder: Path) -> str | None:
    """Tag or commit that git knows a folder by, with `-dirty` where files differ; None without."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--tags"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip() or None


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_jsonable(v) for v in value] if isinstance(value, (list, tuple)) else value


def check_tensorboard(folder: str) -> None:
    """Raise UsageError where it is not installed, or cannot write to a folder of this name."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            "--tensorboard: expected the package, found none; `pip install tensorboard`, or leave "
            "the flag out"
        )
    try:
        os.path.abspath(folder).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"--tensorboard: expected a --save_dir whose path is text (UTF-8), found {folder!r}; "
            "rename it, or leave the flag out"
        ) from error


def board_folder(metrics: Path) -> Path:
    """Folder of TensorBoard's event files, beside a run's metrics."""
    return metrics.with_name(metrics.name.removesuffix("_metrics.jsonl") + "_tb")
