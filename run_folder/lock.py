"""A lock that admits one trainer per folder, also on file systems without locks.

    with FolderLock("rvq_ckpts"):
        ...              # a second trainer gets an error that names this one

The kernel's lock (flock) ends with its process, even if it is killed. Where the file system has no
locks, a file names process and machine instead (filelock's SoftFileLock), so that the same machine
recognises a holder that has died.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
from errno import ENOLCK
from pathlib import Path
from types import TracebackType

from filelock import SoftFileLock, Timeout

from cli.command_line import in_words
from cli.disk import NOT_OFFERED, sync_folder, tell_once
from run_folder.checkpoint import CheckpointError

NO_LOCKS = {*NOT_OFFERED, ENOLCK}


class FolderLock:
    """Context manager that holds a folder, created if necessary, for one process.

    Raises:
        CheckpointError: another process holds the folder (the message names it), or the folder
            cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.path = self.folder / ".lock"
        self.claim = SoftFileLock(self.folder / ".lock_without_flock")

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
            command = " ".join(" ".join(sys.argv).split())[:200]
            name = f"process {os.getpid()} on {socket.gethostname()}: {command}\n"
            self.file.write(name.encode(errors="backslashreplace"))
        return self

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.file.seek(0)
            name = self.file.read().decode(errors="replace").partition("\n")[0]
            raise self._in_use(name or "another process") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise self._unusable(error) from error
            self._claim()
            tell_once(
                f"{self.folder}: this file system has no locks ({error.strerror}); going on with "
                f"{Path(self.claim.lock_file).name} instead, which protects less surely from a "
                "second trainer"
            )
        else:
            if os.path.exists(self.claim.lock_file):  # of a process that could not lock
                self._claim()

    def _claim(self) -> None:
        """Take the file that stands for the lock; one whose process has died is taken over."""
        try:
            self.claim.acquire(timeout=3)  # a dead holder is seen at the second look
        except Timeout as error:
            lines = []
            with contextlib.suppress(OSError):  # it may have been released meanwhile
                lines = Path(error.lock_file).read_text(errors="replace").splitlines()
            is_known = len(lines) > 1 and lines[0].isdecimal()
            holder = f"process {lines[0]} on {lines[1]}" if is_known else "another process"
            remedy = f"; if it has ended, unseen by this machine, remove {error.lock_file}"
            raise self._in_use(holder, remedy) from error
        except OSError as error:
            raise self._unusable(error) from error

    def _in_use(self, holder: str, more: str = "") -> CheckpointError:
        remedy = f"wait for it, stop it, or give this run another --save_dir{more}"
        return CheckpointError(f"{self.folder}: in use by {holder}; {remedy}")

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
            self.claim.release()


def _make_folder(folder: Path) -> None:
    """Create a folder with its parents, durably: each exists even after a power cut."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
