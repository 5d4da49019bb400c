"""run_folder/lock.py: one trainer a folder, however the one before it ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from run_folder.checkpoint import (
    CheckpointError,
)
from run_folder.lock import FolderLock

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, ready, seconds: float = 60) -> None:
    with FolderLock(folder):
        ready.set()
        time.sleep(seconds)


def try_lock(folder: Path, answer) -> None:
    try:
        with FolderLock(folder):
            answer.put("")
    except CheckpointError as error:
        answer.put(str(error))


def locked_by(folder: Path) -> str:
    """What another process hears that wants the folder; empty if it gets it."""
    answer = FORK.SimpleQueue()
    process = FORK.Process(target=try_lock, args=(folder, answer))
    process.start()
    process.join()
    return answer.get()


def test_a_second_trainer_is_refused_and_told_who_is_first(tmp_path):
    """Fault 16."""
    folder = tmp_path / "new" / "run"
    with FolderLock(folder):
        message = locked_by(folder)
        assert f"process {os.getpid()} on " in message
        assert str(folder) in message
        assert "--save_dir" in message
        assert f"process {os.getpid()} on " in locked_by(folder)  # the refusal wiped nothing
    assert locked_by(folder) == ""
    assert (folder / ".lock").read_text() == ""


def test_a_killed_trainer_frees_its_folder(tmp_path):
    """Fault 16."""
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    assert f"process {process.pid} " in locked_by(tmp_path)
    process.kill()
    process.join()
    assert locked_by(tmp_path) == ""
    with FolderLock(tmp_path):
        assert f"process {os.getpid()} " in locked_by(tmp_path)
        assert str(process.pid) not in (tmp_path / ".lock").read_text()


def test_a_loader_process_that_outlives_the_trainer_does_not_hold_its_folder(tmp_path):
    """Fault 16: a forked process shares open files, and an flock with them."""
    pids = FORK.SimpleQueue()

    def train():
        with FolderLock(tmp_path):
            pid = os.fork()
            if pid:
                pids.put(pid)
            time.sleep(60)

    process = FORK.Process(target=train)
    process.start()
    loader = pids.get()
    try:
        assert f"process {process.pid} " in locked_by(tmp_path)  # the child's exit of it frees none
        process.kill()
        process.join()
        assert locked_by(tmp_path) == ""
        os.kill(loader, 0)  # alive all the while
    finally:
        os.kill(loader, signal.SIGKILL)


def test_the_lock_is_free_after_an_exception(tmp_path):
    with pytest.raises(ZeroDivisionError), FolderLock(tmp_path):
        1 / 0  # noqa: B018
    assert locked_by(tmp_path) == ""
