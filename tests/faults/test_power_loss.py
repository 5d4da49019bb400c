"""Power cuts: every state that a disk may be left in while a run saves, and what is loaded then.

The system calls of a real run (create, write, sync, link, rename, unlink, sync of the folder) are
recorded as they pass, then replayed up to each of them. The model of the disk is POSIX's, which is
weaker than a journaling file system's:

- Data of a file is there once it was synced. Before, the file may be empty, cut, or zeros.
- A name points where it pointed at the last sync of its folder, or where any later link, rename or
  unlink put it. Each name goes its own way: later changes may survive where earlier ones are lost,
  and a rename may be seen at one of its two names alone. (ext4 and XFS keep the order and a
  rename in one piece; what holds here holds there.)
- A sync of the folder makes all names before it certain.
"""

from __future__ import annotations

import builtins
import io
import itertools
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from kit.trainer import make_run

import train_rvq
from run_folder.checkpoint import CheckpointError, load_checkpoint
from run_folder.files import RunFiles, load_latest
from training import saving as run_saving

UNSYNCED = ("empty", "cut", "zeros")


class Call(NamedTuple):
    """One recorded call; `inode` is what `name` pointed to, -1 for nothing."""

    kind: str
    name: str = ""
    inode: int = -1


class Recorder:
    """Passes system calls through and keeps them, and the bytes of each file at its sync."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.calls: list[Call] = []
        self.contents: dict[int, bytes] = {}
        self.kept: list[int] = []  # descriptors, so that no inode number is used twice
        self.real = {n: getattr(os, n) for n in ("fsync", "link", "replace", "rename", "unlink")}
        for name in self.real:
            monkeypatch.setattr(os, name, getattr(self, name))
        self.real_open = builtins.open
        monkeypatch.setattr(builtins, "open", self.open)

    def inode(self, path: Any) -> int:
        return os.lstat(path).st_ino

    def mine(self, path: Any) -> bool:
        return isinstance(path, (str, Path)) and Path(path).suffix in (".pt", ".saving")

    def open(self, path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode != "wb" or not self.mine(path):
            return self.real_open(path, mode, *args, **options)
        raw = RecordedFile(path, "wb")
        raw.calls = self.calls
        self.kept.append(os.dup(raw.fileno()))
        self.calls.append(Call("name", Path(path).name, self.inode(path)))
        return io.BufferedWriter(raw)

    def fsync(self, descriptor: int) -> None:
        self.real["fsync"](descriptor)
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self.calls.append(Call("sync folder"))
        else:
            with self.real_open(f"/proc/self/fd/{descriptor}", "rb") as file:
                self.contents[status.st_ino] = file.read()
            self.calls.append(Call("sync", inode=status.st_ino))

    def link(self, source: Any, target: Any) -> None:
        self.real["link"](source, target)
        self.calls.append(Call("name", Path(target).name, self.inode(target)))

    def replace(self, source: Any, target: Any) -> None:
        inode, one_file = self.inode(source), False
        if os.path.lexists(target):
            one_file = inode == self.inode(target)  # then rename does nothing
        self.real["replace"](source, target)
        if not one_file:
            self.calls.append(Call("name", Path(target).name, inode))
            self.calls.append(Call("name", Path(source).name))

    rename = replace

    def unlink(self, path: Any, **options: Any) -> None:
        self.real["unlink"](path, **options)
        if self.mine(path):
            self.calls.append(Call("name", Path(path).name))


class RecordedFile(io.FileIO):
    """Adds each write to the record."""

    calls: list[Call]

    def write(self, data: Any) -> int:
        written = super().write(data)
        self.calls.append(Call("write", inode=os.fstat(self.fileno()).st_ino))
        return written


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory, tunes: Path) -> tuple[Recorder, RunFiles]:
    """Eight saves of a real run: the ring, bests, archives, pruning, saves between epochs."""
    folder = tmp_path_factory.mktemp("run")
    flags = ("--archive-every", "1", "--keep-archived", "2", "--epochs", "5")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = make_run("--data", tunes, "--save_dir", folder, *flags)
        recorder = Recorder(folder, monkeypatch)
        write = run.metrics.write

        def reporting(event: str, **fields: Any) -> dict[str, Any]:
            if event == "save":
                recorder.calls.append(Call("reported", inode=fields["step"]))
            if event == "epoch" and fields["epoch"] in (2, 4):  # one more, between two epochs' ends
                run_saving.save(run)
            return write(event, **fields)

        monkeypatch.setattr(run.metrics, "write", reporting)
        assert train_rvq.train_or_save(run) == 0
    for descriptor in recorder.kept:
        os.close(descriptor)
    return recorder, run.files


class Disk:
    """Names as they may be, and which inodes' data is certain, after a number of calls."""

    def __init__(self) -> None:
        self.names: dict[str, list[int]] = {}  # each name's possible inodes, -1 = absent
        self.synced: set[int] = set()
        self.reported = -1

    def apply(self, call: Call) -> None:
        if call.kind == "name":
            possible = self.names.setdefault(call.name, [-1])
            possible.append(call.inode)
        elif call.kind == "sync folder":
            self.names = {name: [inodes[-1]] for name, inodes in self.names.items()}
        elif call.kind == "sync":
            self.synced.add(call.inode)
        elif call.kind == "write":
            self.synced.discard(call.inode)
        else:
            self.reported = call.inode

    def contents(self, name: str) -> set[tuple[int, str]]:
        """(inode, state of its data) that a name may lead to; (-1, "") for none."""
        found = set()
        for inode in self.names.get(name, [-1]):
            whole = inode == -1 or inode in self.synced
            found |= (
                {(inode, "whole" if inode != -1 else "")}
                if whole
                else {(inode, state) for state in UNSYNCED}
            )
        return found


def put(path: Path, contents: dict[int, bytes], inode: int, state: str) -> None:
    path.unlink(missing_ok=True)
    data = contents.get(inode, b"")
    if inode != -1:
        cut = {
            "whole": data,
            "empty": b"",
            "cut": data[: len(data) // 2],
            "zeros": bytes(len(data)),
        }
        path.write_bytes(cut[state])


def test_the_record_is_of_a_real_run(record):
    recorder, _ = record
    kinds = [call.kind for call in recorder.calls]
    assert kinds.count("reported") == 8
    assert kinds.count("sync folder") >= 8
    assert kinds.count("sync") == 8
    assert kinds.count("write") > 20
    first = [k for k in kinds if k != "write"][:3]
    assert first == ["name", "sync", "name"], "created, synced, and only then linked"


def test_after_a_power_cut_at_any_moment_the_old_or_the_new_state_is_loaded(
    record, tmp_path, capsys
):
    """Fault 2, pitfall 12: never neither, and never older than what was reported as saved."""
    recorder, files = record
    replayed, disk, known = RunFiles(tmp_path, files.name), Disk(), {}
    moments = states = 0

    def step_after(latest: tuple[int, str], previous: tuple[int, str]) -> int | None:
        if (latest, previous) not in known:
            put(replayed.latest, recorder.contents, *latest)
            put(replayed.previous, recorder.contents, *previous)
            try:
                known[latest, previous] = load_latest(replayed)[0]["progress"]["step"]
            except CheckpointError:
                known[latest, previous] = None
            for path in tmp_path.iterdir():
                path.unlink()
        return known[latest, previous]

    for call in recorder.calls:
        disk.apply(call)
        moments += 1
        pairs = itertools.product(
            disk.contents(files.latest.name), disk.contents(files.previous.name)
        )
        for latest, previous in pairs:
            states += 1
            step = step_after(latest, previous)
            if disk.reported >= 0:
                assert step is not None, f"neither, after call {moments}: {call}"
                assert step >= disk.reported
            else:
                assert step is not None or latest[0] == previous[0] == -1, "a first save, half"
    with capsys.disabled():
        print(f"\n{moments} moments, {states} states of the disk, {len(known)} different")
    assert step_after(latest, previous) == disk.reported


def test_no_name_ever_leads_to_data_that_is_not_there(record, tmp_path):
    """Best and archives too: in every state, what is named as a checkpoint loads."""
    recorder, _ = record
    whole = set()
    for inode, data in recorder.contents.items():
        path = tmp_path / f"{inode}.pt"
        path.write_bytes(data)
        load_checkpoint(path)
        whole.add(inode)
    disk = Disk()
    for call in recorder.calls:
        disk.apply(call)
        for name in disk.names:
            if name.endswith(".pt") and not name.startswith("."):
                assert all(state in ("whole", "") for _, state in disk.contents(name)), name
                assert {inode for inode, _ in disk.contents(name)} <= whole | {-1}


@pytest.mark.parametrize("lost", ["sync", "sync folder"])
def test_the_replay_finds_a_save_without_its_syncs(record, lost):
    """The test can fail: without either kind of sync there are states that break the promise."""
    recorder, files = record
    disk, broken = Disk(), False
    for call in recorder.calls:
        if call.kind != lost:
            disk.apply(call)
        states = {state for _, state in disk.contents(files.latest.name)}
        older = len(disk.names.get(files.latest.name, [])) > 1
        broken |= bool(states & set(UNSYNCED)) or (call.kind == "reported" and older)
    assert broken
