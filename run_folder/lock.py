"""A lock that admits one trainer per folder, also on file systems without locks.

    with FolderLock("rvq_ckpts"):
        ...              # a second trainer gets an error that names this one

The kernel's lock (flock) ends with its process, even if it is killed. Where the file system has no
locks, a claim file names the machine, the process and its start time, so that the same machine can
recognise a holder that has died.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from cli.command_line import in_words
from cli.disk import NOT_OFFERED, sync_folder, tell_once
from run_folder.checkpoint import CheckpointError

NO_LOCKS = {*NOT_OFFERED, errno.ENOLCK}


class FolderLock:
    """Context manager that holds a folder, created if necessary, for one process.

    Raises:
        CheckpointError: another process holds the folder (the message names it), or the folder
            cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.path = self.folder / ".lock"
        self.claim = self.folder / ".lock_without_flock"
        self.mine = b""  # content of this process's claim file, if it made one

    def __enter__(self) -> FolderLock:
        try:
            _make_folder(self.folder)
            self.file = open(self.path, "ab+", buffering=0)
        except OSError as error:
            raise self._unusable(error) from error
        # A forked process may outlive a killed trainer and must not hold the lock.
        os.register_at_fork(after_in_child=self.file.close)
        try:
            self._lock()
        except BaseException:
            self.file.close()
            raise
        with contextlib.suppress(OSError):  # on a full disk the lock file stays without a name
            self.file.truncate(0)
            self.file.write(_this_process())
        return self

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.file.seek(0)
            raise self._in_use(_Holder(self.file.read())) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise self._unusable(error) from error
            self._refuse(self.path)
            self._make_claim()
            tell_once(
                f"{self.folder}: this file system has no locks ({error.strerror}); going on with "
                f"{self.claim.name} instead, which protects less surely from a second trainer"
            )
        else:
            self._refuse(self.claim)

    def _refuse(self, path: Path) -> bytes:
        """Raise CheckpointError if a live process may have written `path`; return its content."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return b""
        if content not in (b"", self.mine) and not (holder := _Holder(content)).is_dead():
            raise self._in_use(holder, path)
        return content

    def _make_claim(self) -> None:
        """Create the claim file exclusively, after moving a dead holder's away."""
        self.mine = _this_process()
        for attempt in range(20):
            try:
                with open(self.claim, "xb") as file:
                    file.write(self.mine)
            except FileExistsError:
                pass
            except OSError as error:
                raise self._unusable(error) from error
            # A process that took this file for a dead holder's puts it back; see `_take_away`.
            time.sleep(0.1)
            found = self._refuse(self.claim)
            if found == self.mine:
                return
            if found or attempt > 10:  # an empty file may be one that is being written
                self._take_away(found)
        raise self._in_use(_Holder(b""))

    def _take_away(self, dead: bytes) -> None:
        """Remove the claim file with content `dead`; a file with other content is put back."""
        away = self.claim.with_name(f"{self.claim.name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.rename(self.claim, away)
            if away.read_bytes() != dead:
                os.rename(away, self.claim)
            else:
                away.unlink()

    def _in_use(self, holder: _Holder, path: Path | None = None) -> CheckpointError:
        remedy = "wait for it, stop it, or give this run another --save_dir"
        if path is not None and not holder.is_of_here():
            remedy += f"; if it has ended, which cannot be seen from this machine, remove {path}"
        return CheckpointError(f"{self.folder}: in use by {holder.name}; {remedy}")

    def _unusable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"--save_dir {self.folder}: cannot be used: {in_words(error)}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # the disk may have become read-only
            self.file.truncate(0)
        self.file.close()
        with contextlib.suppress(OSError):
            if self.mine and self.claim.read_bytes() == self.mine:
                self.claim.unlink()


# --- who holds it --------------------------------------------------------------------------------


def _this_process() -> bytes:
    """Return two lines: the process in words, and a JSON object that identifies it."""
    command = " ".join(" ".join(sys.argv).split())[:200]
    name = f"process {os.getpid()} on {socket.gethostname()}: {command}"
    facts = {"pid": os.getpid(), "start": _start_of(os.getpid()), **_machine()}
    return f"{name}\n{json.dumps(facts)}\n".encode(errors="backslashreplace")


def _machine() -> dict[str, str]:
    """Return what identifies this machine, its boot and its namespace of process numbers."""
    facts = {"host": socket.gethostname()}
    with contextlib.suppress(OSError):
        facts["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        facts["pids"] = os.readlink("/proc/self/ns/pid")
        facts["machine"] = Path("/etc/machine-id").read_text().strip()
    return facts


def _start_of(pid: Any) -> str:
    """Return the start of a process in clock ticks since boot; empty if it does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _lives(pid: Any, start: Any) -> bool:
    """Return whether process `pid` exists and began at `start`, as far as /proc shows it."""
    if found := _start_of(pid):
        return bool(found == start)
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except OSError:  # the process of another user, which /proc may hide
        pass
    return True


class _Holder:
    """The process named in a lock file, which may be cut off or written by an older version."""

    def __init__(self, content: bytes) -> None:
        name, _, rest = content.decode(errors="replace").partition("\n")
        self.name = name.strip() or "another process"
        self.facts: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            self.facts = dict(json.loads(rest))

    def is_of_here(self) -> bool:
        """Return whether the holder is of this boot and namespace, so that /proc can show it."""
        here = _machine()
        return "boot" in here and all(self.facts.get(n) == here.get(n) for n in ("boot", "pids"))

    def is_dead(self) -> bool:
        """Return whether the holder has certainly ended: it is gone, or the machine rebooted."""
        here, facts = _machine(), self.facts
        if self.is_of_here():
            return not _lives(facts.get("pid"), facts.get("start"))
        is_same = all(facts.get(n) == here.get(n) for n in ("host", "machine"))
        return is_same and bool(here.get("machine")) and facts.get("boot") != here.get("boot")


def _make_folder(folder: Path) -> None:
    """Create a folder with its parents, durably: each exists even after a power cut."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
