"""Files written whole, also on file systems that lack a part of POSIX.

    replace_file(Path("report.html"), page, durable=False)
    temporary = write_beside(path, lambda file: file.write(content))
    replace(temporary, path)
    sync_folder(path.parent)

CIFS, NFS, Lustre, FUSE and shared folders refuse calls that only make a write safer: such a
refusal is reported once and the work goes on. An error that means lost data is raised.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from cli.command_line import UsageError, in_words, problem

TEMPORARY_SUFFIX = ".saving"
ASIDE_SUFFIX = ".replaced"  # of the old file while a new one takes its name
# How file systems say that they do not offer a call. EIO, ENOSPC and the like are not among them.
NOT_OFFERED = {
    *(errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY),
    *(errno.EPERM, errno.EACCES, errno.EBADF, errno.EISDIR),
}
NOT_REPLACED = {*NOT_OFFERED, errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY, errno.ETXTBSY}
_told: set[str] = set()


def tell_once(text: str) -> None:
    """Report a text on standard error once in a process."""
    if text not in _told:
        _told.add(text)
        problem(text)


def write_beside(
    path: Path, write: Callable[[BinaryIO], object], *, durable: bool = True, name: str = ""
) -> Path:
    """Write a hidden file beside `path`, to be renamed to it; returns its path.

    `durable` waits for the disk: else a power cut could leave the name without the data.

    Raises:
        OSError: nothing is left of it.
    """
    temporary = path.with_name(name or f".{path.name}{TEMPORARY_SUFFIX}")
    try:
        with naming(path), open(temporary, "wb") as file:
            write(file)
            file.flush()
            if durable:
                sync(file)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)
        raise
    return temporary


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add a path to system errors without one, such as those of writes and syncs."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_file(
    path: Path, content: bytes | memoryview | Callable[[BinaryIO], object], *, durable: bool
) -> None:
    """Write a file whole or not at all; `content` may also be what writes it.

    `durable` waits for the disk: it survives a power cut.

    Raises:
        OSError: `path` is as it was.
    """
    # Not named after the file, whose name may have the full length of a name.
    name = f".{os.getpid()}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    write = content if callable(content) else lambda file: file.write(content)
    replace(write_beside(path, write, durable=durable, name=name), path)
    if durable:
        sync_folder(path.parent)


def sync(file: BinaryIO) -> None:
    """Wait until the disk has the content of a regular file, where the file system offers that."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NOT_OFFERED or not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise
        tell_once(
            f"{Path(file.name).parent}: this file system cannot sync a file ({error.strerror}); "
            "going on, but a power cut may take what was written last"
        )


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the file system offers that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        tell_once(
            f"{folder}: this file system cannot sync a folder ({error.strerror}); going on, but a "
            "power cut may undo the newest renames"
        )


def replace(source: Path, target: Path) -> None:
    """Rename a file, replacing one of the new name. Each file is whole at any moment.

    Raises:
        OSError: `target` is as it was, and `source` is gone.
    """
    try:
        try:
            os.replace(source, target)
        except OSError as error:
            if error.errno not in NOT_REPLACED or not target.is_file():
                raise
            _replace_by_two_renames(source, target, error)
    except OSError:
        with contextlib.suppress(OSError):
            source.unlink(missing_ok=True)
        raise


def _replace_by_two_renames(source: Path, target: Path, refusal: OSError) -> None:
    """Set the old file aside first. A crash between leaves it there; see `restore_replaced`."""
    aside = target.with_name(f".{target.name}{ASIDE_SUFFIX}")
    try:
        os.rename(target, aside)
    except OSError:
        raise refusal from None  # the existing file was not the reason
    try:
        os.rename(source, target)
    except OSError:
        os.rename(aside, target)
        raise refusal from None
    remove(aside)
    tell_once(
        f"{target.parent}: this file system cannot rename over a file ({refusal.strerror}); going "
        "on with two renames"
    )


def restore_replaced(folder: Path, begin: str) -> None:
    """Give files set aside before a crash their names back; `begin` is how the names begin."""
    for aside in folder.glob(f".{begin}*{ASIDE_SUFFIX}"):
        target = folder / aside.name[1 : -len(ASIDE_SUFFIX)]
        if os.path.lexists(target):
            remove(aside)
        else:
            aside.rename(target)


def remove(path: Path) -> None:
    """Remove a file that is not needed; report it and go on where that fails."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        tell_once(f"{path}: cannot be removed ({error.strerror}); going on, remove it by hand")


def check_writable(folder: Path) -> None:
    """Raise OSError where no file can be made in a folder; before long work, not after it."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def check_output(flag: str, path: str | None, ending: str) -> None:
    """Raise UsageError where no file of that name can be written; one that exists is replaced."""
    if path is None:
        return
    if Path(path).is_dir():
        wrong = f"is a folder; name a file in it, such as {Path(path, 'song' + ending)}"
        raise UsageError(f"{flag} {path}: {wrong}")
    if Path(path).suffix.lower() != ending:
        wrong = f"expected a name that ends in {ending}; try {Path(path).with_suffix(ending)}"
        raise UsageError(f"{flag} {path}: {wrong}")
    try:
        check_writable(Path(path).parent)
    except OSError as error:
        raise UsageError(f"{flag} {path}: its folder {in_words(error)}") from error


def free_space(folder: Path) -> int | None:
    """Free bytes of a folder's disk, or None: some network folders do not know."""
    try:
        disk = shutil.disk_usage(folder)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        return None
    return disk.free if disk.total else None
