"""Sends the rows of a run's metrics to Weights & Biases, from a process of its own.

    sender = start(files.metrics, "my-project", vars(flags))     # in the trainer
    end(sender, files.metrics)                                   # sends what is left

The process follows the metrics file. So nothing of that package (its network, its questions at a
terminal, its handlers, its crash) can hold up, end or signal the training, and no row is lost.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from cli.command_line import UsageError, problem, say
from cli.shortages import first_line
from run_folder.metrics import points_of

PAUSE = 2.0  # seconds between two looks at the file
WAIT = 30.0  # seconds that the trainer waits at its end for the last rows to be sent
GIVE_UP = 600  # seconds after which they are given up
CHILD = "import sys; sys.path.insert(0, {!r}); from run_folder.wandb_log import follow; follow()"


def check_wandb() -> None:
    """Raise UsageError if the package is not installed."""
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # without origin it is a folder of that name
        raise UsageError(
            "--wandb: expected the package, found none; `pip install wandb`, or leave the flag out"
        )


def start(metrics: Path, project: str, flags: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start to send the rows that are appended to a metrics file from now on.

    A run that goes on does so in Weights & Biases too: its id is kept beside the metrics, in the
    folder of that package's files. Raises OSError.
    """
    name = metrics.name.removesuffix("_metrics.jsonl")
    folder = metrics.with_name(f"{name}_wandb")
    folder.mkdir(exist_ok=True)
    kept = folder / "run_id"
    if not kept.exists():
        kept.write_text(secrets.token_hex(4))
    of_run = {"project": project, "id": kept.read_text(), "dir": str(folder)}
    of_run["name"] = f"{metrics.absolute().parent.name}/{name}"
    where = {"metrics": str(metrics), "offset": metrics.stat().st_size}
    code = CHILD.format(str(Path(__file__).resolve().parents[1]))
    sender = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True
    )
    assert sender.stdin is not None
    sender.stdin.write(json.dumps({**where, "run": {**of_run, "config": flags}}).encode() + b"\n")
    sender.stdin.flush()
    return sender


def end(sender: subprocess.Popen[bytes], metrics: Path) -> None:
    """Let the rows that are left be sent, but wait WAIT seconds for them at most."""
    assert sender.stdin is not None
    try:
        sender.stdin.close()
        failed = sender.wait(WAIT) != 0
    except (OSError, subprocess.TimeoutExpired):
        failed = True
    if failed:
        problem(f"not all rows have reached Weights & Biases; all are in {metrics}")


def follow() -> None:
    """Send the rows of a file, as the first line of standard input says, until that ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends after the trainer, which they are for
    trainer = open(os.dup(0), "rb")  # noqa: SIM115 - open until the end
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a question gets no answer, at once
    facts, ended = json.loads(trainer.readline()), threading.Event()
    threading.Thread(target=_await_end, args=(trainer, ended), daemon=True).start()
    try:
        import wandb

        settings = wandb.Settings(console="off", silent=True)
        run = wandb.init(**facts["run"], resume="allow", settings=settings)
        say(f"wandb    {'offline, ' + run.dir if run.offline else run.url}")
        run.define_metric("*", step_metric="step")
        with open(facts["metrics"], "rb") as file:
            file.seek(facts["offset"])
            is_last = False
            while not is_last:
                is_last = ended.wait(PAUSE)
                while (line := file.readline()).endswith(b"\n"):
                    row = json.loads(line)
                    run.log({**points_of(row), "step": row.get("step", 0)})
                file.seek(-len(line), os.SEEK_CUR)  # half a row
        run.finish()
    except BaseException as error:
        problem(f"Weights & Biases gets no more rows, training goes on: {first_line(error)}")
        os._exit(1)


def _await_end(trainer: BinaryIO, ended: threading.Event) -> None:
    """Wait for the trainer's end; some time later let go of its output, whose reader may wait."""
    trainer.read()
    ended.set()
    time.sleep(WAIT)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    signal.alarm(GIVE_UP)
