"""Console and metrics: figures that mean something, lines off a terminal, metrics that survive."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from kit.trainer import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from run_folder.files import RunFiles
from run_folder.metrics import (
    HISTORY_ROWS,
    Console,
    MetricsLog,
    RunMetrics,
    board_folder,
    duration,
    number,
    perplexity,
    read_metrics,
)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 710.0])
def test_perplexity_is_not_given_where_it_means_nothing(loss):
    """Fault 21, pitfall 10: exp(max(1e-9, nan)) is 1.00, and exp(710) raises."""
    assert perplexity(loss) is None
    assert number(perplexity(loss)) == "n/a"


def test_perplexity_of_a_loss():
    assert perplexity(4.1932) == pytest.approx(66.23, abs=0.01)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m 00s"), (1217.1, "20m 17s"), (7500, "2h 05m"), (212_400, "2d 11h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_quiet_keeps_lines_and_problems(capsys):
    console = Console(quiet=True)
    console.detail("a")
    console.line("b")
    console.problem("c")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("b\n", "! c\n")


def test_rows_are_valid_json_at_once(tmp_path):
    log = MetricsLog(tmp_path / "x_metrics.jsonl")
    log.write("epoch", val=math.nan, per=[1.0, math.inf], step=3)
    row = json.loads((tmp_path / "x_metrics.jsonl").read_text())  # before close: rows are flushed
    assert next(iter(row)) == "event"
    assert (row["val"], row["per"], row["step"]) == (None, [1.0, None], 3)
    for step in range(2 * HISTORY_ROWS):
        log.write("step", step=step)
    assert len(log.history) == HISTORY_ROWS
    log.close()


def test_half_a_row_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "x_metrics.jsonl"
    path.write_text('{"event": "step"}\n{"event": "st')
    log = MetricsLog(path)
    log.write("resume", step=1)
    log.close()
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[2])["event"] == "resume"


def test_tensorboard_has_each_step_once_after_a_resume_and_a_rollback(tmp_path):
    """A killed run repeats the steps since its last save, a rolled back one those it gave up."""
    path = tmp_path / "x_metrics.jsonl"
    log = MetricsLog(path, tensorboard=True)
    for step in range(1, 9):
        log.write("step", step=step, loss=1.0 * step)
    log.close()
    log = MetricsLog(path, tensorboard=True, step=5)
    for step in range(6, 12):
        log.write("step", step=step, loss=10.0 * step)
    log.rewind(7)
    log.write("step", step=8, loss=800.0)
    log.close()
    board = EventAccumulator(str(board_folder(path))).Reload()
    points = [(e.step, e.value) for e in board.Scalars("step/loss")]
    assert points == [(s, s) for s in range(1, 6)] + [(6, 60), (7, 70), (8, 800)]


def test_a_new_run_gets_a_board_of_its_own(tmp_path):
    files = RunFiles(tmp_path, "x")
    log = MetricsLog(files.metrics, tensorboard=True)
    log.write("step", step=1, loss=2.5)
    log.close()
    aside = files.set_aside()
    assert list((aside / "x_tb").glob("events.*"))
    assert not (tmp_path / "x_tb").exists()


BAR = """
import sys
sys.path.insert(0, {root!r})
from run_folder.metrics import Console
console = Console()
console.start_epoch(1, 3, 0, 10)
for _ in range(10):
    console.advance(4.5, 2e-4, 1234.0, 61.0)
console.bar.refresh()
console.line("a line above the bar")
console.end_epoch()
"""


def test_a_terminal_gets_a_bar_with_loss_lr_rate_and_time_left():
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))
    script = BAR.format(root=str(ROOT))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=child, stderr=child)
    os.close(child)
    shown = ""
    with contextlib.suppress(OSError):  # the end of a terminal is an error
        while chunk := os.read(parent, 4096):
            shown += chunk.decode()
    assert process.wait(60) == 0
    for part in ("epoch 1/3", "loss 4.5000", "lr 2.00e-04", "1234 frames/s", "ends in 1m 01s"):
        assert part in shown
    assert "a line above the bar" in shown


def test_no_bar_off_a_terminal():
    script = BAR.format(root=str(ROOT)).replace("console.bar.refresh()", "assert not console.bar")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "a line above the bar\n"
    assert done.stderr == ""


def test_metrics_survive_a_full_disk(capsys):
    log = MetricsLog(Path("/dev/full"))
    row = log.write("step", step=1)
    assert row["step"] == 1
    assert "metrics rows are not written" in capsys.readouterr().err


def test_a_full_disk_costs_one_line_until_rows_are_written_again(small_disk, capsys):
    disk = small_disk("64k")
    log, long = MetricsLog(disk / "x_metrics.jsonl"), "x" * 6000  # more than a page's rest takes
    for _ in range(2):
        (disk / "filler").write_bytes(bytes(40_000))
        with contextlib.suppress(OSError), open(disk / "filler", "ab", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        for step in range(3):
            log.write("step", step=step, why=long)
        (disk / "filler").unlink()
        log.write("step", step=9, why=long)
    assert capsys.readouterr().err.count("not written, training goes on: No space left") == 2
    assert [r["step"] for r in read_metrics(disk / "x_metrics.jsonl")].count(9) == 2


# --- read back -----------------------------------------------------------------------------------


def test_rows_that_a_resume_took_back_are_left_out():
    told = [{"event": "start", "step": 0, "time": 1.0}]
    told += [{"event": "step", "step": s, "loss": 1.0, "time": 2.0} for s in range(10, 60, 10)]
    told += [{"event": "resume", "step": 20, "time": 9.0}]
    told += [{"event": "step", "step": s, "loss": 2.0, "time": 10.0} for s in (30, 40)]
    steps = RunMetrics(told).steps
    assert [(r["step"], r["loss"]) for r in steps] == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]


@pytest.mark.parametrize("epoch", [10**400, 1 << 53, -(10**30), 1.5, "2", None, True, [1]])
def test_an_epoch_that_is_no_small_integer_is_left_out(epoch):
    (row,) = RunMetrics([{"event": "epoch", "step": 3, "epoch": epoch, "val": 1.0}]).epochs
    assert "epoch" not in row
    assert row["val"] == 1.0


def test_lines_that_are_cut_or_no_objects_are_passed_over(tmp_path):
    path = tmp_path / "x_metrics.jsonl"
    path.write_text('{"event": "step", "step": 1}\n[1]\n{broken\n\n{"event": "st')
    assert read_metrics(path) == [{"event": "step", "step": 1}]
