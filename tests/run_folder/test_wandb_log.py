"""--wandb: the metrics' rows in Weights & Biases, which can neither hold up nor end a run.

The package is optional. Where it is installed its offline mode is tested. A package of that name
which notes what it is given, or fails, stands for it elsewhere: the process is the real one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest
from kit.trainer import TINY, rows, run_trainer, start_trainer, train, wait_for

from cli.command_line import UsageError
from run_folder import wandb_log
from run_folder.metrics import points_of

NOTES = """
import json, os, sys, time

def note(**what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(what) + "\\n")

class Settings:
    def __init__(self, **options): pass

class Run:
    offline, dir = True, "nowhere"
    def define_metric(self, name, step_metric): note(axis=step_metric)
    def log(self, points):
        if os.environ.get("FAULT") == "crash": os.kill(os.getpid(), 9)
        if os.environ.get("FAULT") == "stall": time.sleep(8)
        if os.environ.get("FAULT") == "error": raise ValueError("no more\\nof this")
        note(points=points)
    def finish(self):
        if os.environ.get("FAULT") == "hang": time.sleep(8)
        note(finished=True)

def init(**options):
    note(init=options["id"], project=options["project"], lr=options["config"]["lr"])
    if os.environ.get("FAULT") == "question": note(answer=input("who are you? "))
    return Run()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package called wandb, for this process and those it starts; where it notes what it got."""
    folder = tmp_path / "package"
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "__init__.py").write_text(NOTES)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    return tmp_path / "notes"


def noted(path: Path, kind: str) -> list:
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [note[kind] for note in found if kind in note]


def test_the_rows_arrive_once_and_a_resumed_run_goes_on_in_the_same_one(tunes, tmp_path, package):
    flags = ("--data", tunes, "--save_dir", tmp_path / "run", "--wandb", "songs", "--max-steps")
    train(*flags, "20", stop_at=13)
    train(*flags, "20")
    written = [{**points_of(row), "step": row["step"]} for row in rows(tmp_path / "run")]
    assert noted(package, "points") == written
    assert {name for row in written for name in row} >= {"step/loss", "epoch/val", "step"}
    assert noted(package, "axis") == ["step"] * 2
    assert noted(package, "finished") == [True] * 2
    first, second = noted(package, "init")
    assert first == second
    assert noted(package, "project") == ["songs"] * 2
    assert noted(package, "lr") == [3e-4] * 2
    train(*flags, "10", "--no-resume")
    assert noted(package, "init")[2] != first  # a new run is a new one there


@pytest.mark.parametrize("fault", ["error", "crash", "stall", "hang", "question"])
def test_its_faults_do_not_end_a_run(fault, tunes, tmp_path, package, monkeypatch, capfd):
    """An error, SIGKILL, a row that is not taken, no end, and a question at the terminal."""
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setattr(wandb_log, "WAIT", 0.5 if fault in ("hang", "stall") else 60.0)
    flags = ("--data", tunes, "--save_dir", tmp_path / "run", "--wandb", "songs", "--epochs", "2")
    train(*flags)  # and ends with code 0
    said = capfd.readouterr().err
    assert rows(tmp_path / "run")[-1]["event"] == "end"
    assert "! not all rows have reached Weights & Biases" in said
    told = "Weights & Biases gets no more rows, training goes on: "
    assert said.count(told) == (fault in ("error", "question"))
    assert (f"{told}no more\n" in said) == (fault == "error")
    assert not noted(package, "answer")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_the_trainers(number, tunes, tmp_path, package):
    """Those of a terminal go to the whole group: the run is saved, and the last rows are sent."""
    flags = ("--data", tunes, "--save_dir", tmp_path / "run", "--wandb", "songs")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = start_trainer(*TINY, *flags, "--epochs", "100000", env=env, start_new_session=True)
    try:
        wait_for(lambda: len(noted(package, "points")) > 3 or process.poll() is not None)
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, output
    assert f"Stopped by {signal.Signals(number).name}; saved" in output
    assert len(noted(package, "points")) == len(rows(tmp_path / "run"))
    assert noted(package, "finished")


def test_without_the_package_a_line_says_how_to_install_it(tunes, tmp_path):
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("the package is installed")
    flags = ("--data", tunes, "--save_dir", tmp_path / "run", "--wandb", "songs")
    code, output = run_trainer(*TINY, *flags, "--epochs", "1")
    assert code == 2
    assert output.splitlines() == [
        "! --wandb: expected the package, found none; `pip install wandb`, or leave the flag out"
    ]
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("rvq_*"))


def test_a_folder_of_its_name_is_not_the_package(tmp_path, monkeypatch):
    """Which it leaves where a script has run: such a folder could be imported."""
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("the package is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("wandb") is not None
    with pytest.raises(UsageError, match="pip install wandb"):
        wandb_log.check_wandb()


def test_the_package_itself_keeps_the_rows_offline(tunes, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ("--data", tunes, "--save_dir", tmp_path / "run", "--wandb", "songs", "--max-steps")
    train(*flags, "10")
    train(*flags, "20")
    kept = sorted((tmp_path / "run").glob("rvq_4cb_wandb/wandb/offline-run-*/*.wandb"))
    assert len(kept) == 2
    assert len({path.name for path in kept}) == 1
    for path in kept:
        assert b"step/loss" in path.read_bytes()
        assert b"epoch/val" in path.read_bytes()
