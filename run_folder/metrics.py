"""The output of a run: console lines, the progress bar, metrics rows, TensorBoard.

`*_metrics.jsonl` has one JSON object per line, with `event` first; a number that is not finite
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
    """Format seconds as `59s`, `20m 17s`, `2h 05m` or `2d 11h`."""
    s = max(0, round(seconds))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h {s % 3600 // 60:02d}m"
    return f"{s // 86400}d {s % 86400 // 3600:02d}h"


def perplexity(loss: float) -> float | None:
    """Return exp(loss) of a loss in nats; None if the loss is not finite or exp overflows."""
    return math.exp(loss) if math.isfinite(loss) and loss < 709 else None


def number(value: float | None, form: str = ".4f") -> str:
    """Format a number for the console; `n/a` for None, NaN and infinity."""
    return "n/a" if value is None or not math.isfinite(value) else format(value, form)


# --- the console ---------------------------------------------------------------------------------


class Console:
    """Writes lines to standard output, problems to standard error, and a progress bar.

    The bar needs a terminal. `quiet` drops the bar and the details; `silent` drops everything, for
    the ranks other than 0.
    """

    def __init__(self, *, quiet: bool = False, silent: bool = False) -> None:
        self.quiet, self.silent = quiet, silent
        self.has_bar = not quiet and not silent and bool(sys.stderr) and sys.stderr.isatty()
        self.bar: tqdm[Any] | None = None

    def detail(self, text: str) -> None:
        """Write a line, unless `quiet`."""
        if not self.quiet:
            self.line(text)

    def line(self, text: str) -> None:
        """Write a line, also if `quiet`."""
        self._write(text, say)

    def lines(self, texts: Iterable[str]) -> None:
        """Write several lines, also if `quiet`."""
        for text in texts:
            self.line(text)

    def problem(self, text: str) -> None:
        """Write a warning or error to standard error, also if `quiet`."""
        self._write(text, problem)

    def _write(self, text: str, write: Callable[[str], None]) -> None:
        if self.silent:
            return
        with tqdm.external_write_mode():  # keeps the progress bar below the line
            write(text)

    def start_epoch(self, epoch: int, epochs: int, done: int, steps: int) -> None:
        """Show a progress bar of `steps` optimizer steps, of which `done` are done."""
        if self.has_bar:
            label = f"epoch {epoch}/{epochs}"
            self.bar = tqdm(
                total=steps, initial=done, desc=label, unit="step", miniters=1, leave=False
            )

    def advance(self, loss: float, lr: float, frames_per_s: float, left: float) -> None:
        """Advance the bar by a step: loss in nats per code, `left` seconds until the run's end."""
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
    """Format a `step` row of the metrics as a console line.

    `total_steps` is the planned number, 0 if unknown; `left` the seconds until the run's end.
    """
    total = f"/{total_steps}" if total_steps else ""
    return (
        f"epoch {row['epoch']} step {row['step']}{total} | loss {number(row['loss'])} | "
        f"lr {row['lr']:.3e} | grad norm {number(row['grad_norm'], '.3f')} | "
        f"{row['frames_per_s']:.0f} frames/s | skipped {row['skipped']} | "
        f"ends in {duration(left)}"
    )


def gap_of(row: dict[str, Any]) -> float | None:
    """Return val minus train_ce of an `epoch` row, the figure of overfitting; None if unknown."""
    val, train = finite_number(row.get("val")), finite_number(row.get("train_ce"))
    return None if val is None or train is None else val - train


def epoch_lines(row: dict[str, Any], wall: float, total: float, *, is_best: bool) -> list[str]:
    """Format an `epoch` row of the metrics as two lines: figures, then val of each codebook.

    `wall` and `total` are seconds of the epoch and of the run.
    """
    per_codebook = " ".join(f"{number(x, '.3f'):>6}" for x in row["val_per_codebook"])
    star = " | best so far" if is_best else ""
    known = "val_unlabelled" in row
    unlabelled = f" (without labels {number(row['val_unlabelled'])})" if known else ""
    return [
        f"epoch {row['epoch']} validated at step {row['step']} | train {number(row['train'])} | "
        f"val {number(row['val'])}{unlabelled} | gap {number(gap_of(row))} | "
        f"val_obj {number(row['val_obj'])} | "
        f"ppl {number(row['ppl'], '.2f')} | skipped {row['skipped']} | "
        f"{row['frames_per_s']:.0f} frames/s | {duration(wall)}, total {duration(total)}{star}",
        f"      val CE per codebook {per_codebook}",
    ]


# --- metrics -------------------------------------------------------------------------------------

HISTORY_ROWS = 1000  # metrics rows kept in each checkpoint


class MetricsLog:
    """Appends rows to `*_metrics.jsonl` and to TensorBoard, and keeps the newest in memory.

    With path None, for ranks other than 0, nothing is written. This part of the run begins at
    `step`: TensorBoard hides the points of later steps.
    """

    def __init__(self, path: Path | None, *, tensorboard: bool = False, step: int = 0) -> None:
        self.file = open(path or os.devnull, "a+b")  # noqa: SIM115 - open for the whole run
        if self.file.tell():
            self.file.seek(-1, os.SEEK_END)
            if self.file.read(1) != b"\n":  # a killed run may have left half a row
                self.file.write(b"\n")
        self.failed = False  # the newest row was not written
        self.history: list[dict[str, Any]] = []
        self.board_path = board_folder(path) if path and tensorboard else None
        self.board: Any = None
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Hide points after `step` in TensorBoard, because these steps are taken again."""
        if self.board is not None:
            self.board.close()
        if self.board_path is not None:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _ignore_board_errors
            self.board = SummaryWriter(str(self.board_path), purge_step=step + 1)

    def write(self, event: str, **fields: Any) -> dict[str, Any]:
        """Append a row and return it. On a full disk the row is lost, and a warning is printed."""
        row = {"event": event, **fields, "time": round(time.time(), 3)}
        row = {key: _jsonable(value) for key, value in row.items()}
        self.history = [*self.history[-HISTORY_ROWS + 1 :], row]
        try:
            self.file.write(json.dumps(row).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            if not self.failed:  # warn once until a row is written again
                problem(f"metrics rows are not written, training goes on: {in_words(error)}")
            self.failed = True
        else:
            self.failed = False
        self._draw(row)
        return row

    def _draw(self, row: dict[str, Any]) -> None:
        """Add the row's floats to TensorBoard; a full disk ends these curves, not the run."""
        if self.board is None:
            return
        try:
            for name, value in points_of(row).items():
                self.board.add_scalar(name, value, row.get("step", 0))
        except OSError as error:  # raised late: a thread of TensorBoard failed some rows ago
            problem(f"TensorBoard's file gets no more points, training goes on: {in_words(error)}")
            self.board = self.board_path = None

    def close(self) -> None:
        """Flush and close the files; rows that do not fit on a full disk are lost."""
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            if self.board is not None:
                self.board.close()


def points_of(row: dict[str, Any]) -> dict[str, float]:
    """Return the floats of a row by the names of their curves: `step/loss`."""
    floats = ((key, value) for key, value in row.items() if isinstance(value, float))
    return {f"{row['event']}/{key}": x for key, x in floats if key not in ("time", "seconds")}


def _ignore_board_errors(error: threading.ExceptHookArgs) -> None:
    """Ignore OSError in threads: TensorBoard's is handled in `_draw`, our threads raise none."""
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


MAX_METRICS = 256 << 20  # bytes read from the end of a metrics file


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a `*_metrics.jsonl`; lines that are no JSON objects are left out.

    Of a larger file only the last MAX_METRICS bytes are read. Raises OSError.
    """
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
    """Rows of a `*_metrics.jsonl`, oldest first, without those that a resume or rollback undid.

    The known fields of a row have their types; what should be a number and is no finite one is
    None. Rows without event or step are left out: the file may be cut or of another program.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.rewinds: list[tuple[int, float]] = []  # (step returned to, Unix time)
        for row in filter(None, map(_checked_row, rows)):
            if row["event"] in ("start", "resume", "rollback"):
                to = row["to_step"]
                if any(r["step"] > to for r in self.rows):
                    self.rewinds.append((to, row.get("time") or 0.0))
                self.rows = [r for r in self.rows if r["step"] <= to]
            self.rows.append(row)
        self.steps = self.of("step")
        self.epochs = self.of("epoch")  # validations

    def newest_start(self) -> dict[str, Any]:
        """Return the newest `start` or `resume` row; an empty one if there is none."""
        starts = (r for r in reversed(self.rows) if r["event"] in ("start", "resume"))
        return next(starts, {})

    def of(self, event: str) -> list[dict[str, Any]]:
        """Return the rows of an event, in order of steps."""
        return [r for r in self.rows if r["event"] == event]


MOST_WHOLE = 1 << 53  # limit of steps and epochs: larger integers are not exact as floats
NUMBERS = {
    *("loss", "lr", "grad_norm", "train", "train_ce", "val", "val_obj", "val_unlabelled"),
    *("time", "seconds", "lr_scale"),
}


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
    """Return a value from a metrics row or the flags as a float; None if it is no finite number."""
    good = type(value) in (int, float) and abs(value) < 1e300
    return float(value) if good else None


def code_version(folder: Path) -> str | None:
    """Return git's tag or commit of a folder, with `-dirty` for changed files; None without git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--tags"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_jsonable(v) for v in value] if isinstance(value, (list, tuple)) else value


def check_tensorboard(folder: str) -> None:
    """Raise UsageError if TensorBoard is not installed or cannot write to a folder of this name."""
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
    """Return the folder of TensorBoard's event files, beside the metrics file."""
    return metrics.with_name(metrics.name.removesuffix("_metrics.jsonl") + "_tb")
