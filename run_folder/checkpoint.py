"""One checkpoint: its bytes, saving beside training, verified load.

    dump(checkpoint, file)
    checkpoint = load_checkpoint("rvq_9cb_latest.pt")

This is the only place that calls torch.save or torch.load on checkpoints. It knows nothing of the
model, so that a checkpoint can be opened whose model no longer builds.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import stat
import struct
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

FORMAT = "rvq-checkpoint"
FORMAT_VERSION = 1
STATE_KEYS = ("model", "ema", "optimizer", "scaler", "guard", "progress", "rng")
REQUIRED_KEYS = {*STATE_KEYS, "architecture", "flags", "data", "history", "libraries"}
WEIGHTS_KEYS = {"ema", "architecture"}  # what a new run can start from
DOS_FOLDER_BIT = 0x10  # of a zip entry's external attributes
SAVING_NICENESS = 10  # a tenth of the share of a processor that training gets where both want it
ANOTHER = "name a .pt file of train_rvq.py, or an older one of the run"  # a remedy


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, unsafe or does not fit; says which, why, and what to do."""


# --- one file ------------------------------------------------------------------------------------


def dump(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    """Write a checkpoint's bytes to an open file.

    Raises:
        OSError: the disk is full, read-only or failing.
    """
    try:
        torch.save({"format": FORMAT, "version": FORMAT_VERSION, **checkpoint}, file)
    except RuntimeError as error:
        # torch's writer covers the disk's error with one of its own.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def size_of(value: Any) -> int:
    """Bytes that a checkpoint will take on disk, a little over: tensors, names, padding."""

    def tensor_bytes(part: Any) -> int:
        if isinstance(part, Tensor):
            return part.numel() * part.element_size() + 1024  # its entry in the zip
        if isinstance(part, dict):
            return sum(map(tensor_bytes, part.values()))
        return sum(map(tensor_bytes, part)) if isinstance(part, (list, tuple)) else 32

    return (1 << 16) + tensor_bytes(value)


class BackgroundSaver:
    """Writes a checkpoint in a thread, from a copy, while training goes on.

    The copies lie in host memory that is kept and used again, page-locked for tensors of a CUDA
    device: one more state in host memory. torch's writer and the kernel hold no interpreter lock
    while they checksum, copy and sync, so what training pays is the copy (after CheckFreq, Mohan
    et al., FAST 2021).
    """

    def __init__(self) -> None:
        self.copies: dict[tuple[Any, ...], Tensor] = {}

    def start(
        self, checkpoint: dict[str, Any], write: Callable[[dict[str, Any]], Path]
    ) -> Future[Path]:
        """Copy the checkpoint, then `write` the copy in the background.

        Wait for the future before the next start: the copy's memory is used again.
        """
        copy = self._copied(checkpoint, ())
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        written: Future[Path] = Future()
        # A daemon: a disk that hangs must not hold up the end of the process.
        work = (written, write, copy)
        threading.Thread(target=_write, args=work, name="saving", daemon=True).start()
        return written

    def _copied(self, value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            copy = self.copies.get(path)
            if copy is None or (copy.shape, copy.dtype) != (value.shape, value.dtype):
                copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self.copies[path] = copy
            return copy.copy_(value.detach(), non_blocking=value.is_cuda)
        if isinstance(value, dict):
            return {key: self._copied(part, (*path, key)) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copied(part, (*path, i)) for i, part in enumerate(value))
        return value


def _write(
    written: Future[Path], write: Callable[[dict[str, Any]], Path], copy: dict[str, Any]
) -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), SAVING_NICENESS)
    try:
        written.set_result(write(copy))
    except BaseException as error:
        written.set_exception(error)


# Errors of the system that say that a file is bad. Others are of this process or this moment (no
# descriptor, memory or permission, a server that does not answer) and say nothing of it.
OF_A_FILE = {
    *(errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EIO, errno.EINVAL, errno.ENXIO),
    errno.ENAMETOOLONG,
}


def verify_file(path: Path) -> None:
    """Check a checkpoint's container: a regular zip, nothing compressed, every CRC-32 right.

    torch.load does none of this, so flipped bits would load in silence.

    Raises:
        CheckpointError: names the file and what is wrong with it.
        OSError, MemoryError: it cannot be read now, and nothing is known of it.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(
                f"{path}: expected a regular file, found a folder, pipe or device; name a .pt file"
            )
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            for entry in entries:
                # Compressed entries are never ours and can unpack to any size.
                if (
                    entry.compress_type != zipfile.ZIP_STORED
                    or entry.file_size != entry.compress_size
                ):
                    raise CheckpointError(
                        f"{path}: refused, entry {entry.filename!r} is compressed; {ANOTHER}"
                    )
                # torch "reads" a folder's bytes without a word, as whatever memory held before.
                if entry.external_attr & DOS_FOLDER_BIT or entry.is_dir():
                    raise CheckpointError(
                        f"{path}: damaged, entry {entry.filename!r} is marked as a folder; "
                        f"{ANOTHER}"
                    )
            if sum(entry.file_size for entry in entries) > os.path.getsize(path):
                raise CheckpointError(f"{path}: refused, entries overlap; {ANOTHER}")
            # Where two readers could differ on what is in a file, torch could read what the loop
            # above and the CRC-32s below never saw.
            if len({entry.filename.lower() for entry in entries}) < len(entries):
                raise CheckpointError(f"{path}: damaged, two entries have one name; {ANOTHER}")
            if not entries or not _has_one_directory(path, archive.start_dir, len(entries)):
                raise CheckpointError(
                    f"{path}: damaged, its directory is not where it says it is; {ANOTHER}"
                )
            damaged = archive.testzip()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint; check the path") from error
    except (CheckpointError, MemoryError):
        raise
    # A damaged container can fail in many ways: RuntimeError for a flipped "encrypted" flag ...
    except Exception as error:
        _raise_unless_of_file(error, path)
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint ({error}); {ANOTHER}"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged, CRC-32 of {damaged!r} is wrong; {ANOTHER}")


def _raise_unless_of_file(error: Exception, path: Path) -> None:
    """In a handler: raise a system error again, with the path, that does not make a file bad."""
    if isinstance(error, OSError) and error.errno is not None and error.errno not in OF_A_FILE:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _has_one_directory(path: Path, start: int, count: int) -> bool:
    """Whether a zip's directory begins at `start`, has `count` entries and nothing else after it.

    The end of a zip is the record END, before it END64 and its locator if there are those; each
    says where the directory is, and readers differ on which they believe and where they look.
    """
    end, end64, locator = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), "<4sLQL"
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - end.size - 20 - end64.size))
        tail = file.read()
    fields = end.unpack(tail[-end.size :])
    found = [fields[4], fields[5], fields[6]]  # entries, bytes, start
    finish, comment = size - end.size, fields[7]
    sixty_four = tail[-end.size - 20 : -end.size]
    if sixty_four[:4] == b"PK\x06\x07":
        finish -= 20 + end64.size
        wide = end64.unpack(tail[: end64.size])
        said = struct.unpack(locator, sixty_four)
        if wide[0] != b"PK\x06\x06" or said[1:] != (0, finish, 1):
            return False
        full = [0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF]  # stands for "see END64"
        if any(a not in (b, c) for a, b, c in zip(found, wide[7:], full, strict=True)):
            return False
        found = list(wide[7:])
    right = found == [count, finish - start, start]
    return fields[0] == b"PK\x05\x06" and comment == 0 and right


def load_checkpoint(
    path: str | os.PathLike[str], *, needed: set[str] = REQUIRED_KEYS
) -> dict[str, Any]:
    """Verify and read a checkpoint, tensors on the CPU. Never runs code from the file.

    `needed` are the parts that it must have; without an argument all that a resume takes.

    Raises:
        CheckpointError: missing, damaged, unsafe, of another program, or of a newer version.
        OSError, MemoryError: it cannot be read now.
    """
    path = Path(path)
    verify_file(path)
    checkpoint = _unpickle(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of this trainer (no format {FORMAT!r}); {ANOTHER}"
        )
    version = checkpoint.get("version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path}: damaged, format version {version!r} is none; {ANOTHER}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version}, this program reads up to "
            f"{FORMAT_VERSION}; use the newer program that wrote it"
        )
    if missing := needed - set(checkpoint):
        remedy = ANOTHER if missing & WEIGHTS_KEYS else f"start anew with --init-from {path}"
        raise CheckpointError(f"{path}: lacks {', '.join(sorted(missing))}; {remedy}")
    return checkpoint


def map_tensors(path: Path) -> Any:
    """Whatever a verified file holds, its tensors mapped from disk and not read.

    Raises:
        CheckpointError: refused by the safe reader.
        OSError: the file system maps no files; see `read_tensors`.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY):
        return _unpickle(path, mmap=True)


def read_tensors(path: Path) -> Any:
    """The same, all of it in memory."""
    return _unpickle(path)


def _unpickle(path: Path, **options: Any) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except MemoryError:
        raise
    except Exception as error:  # a damaged or hostile pickle can fail in any way
        _raise_unless_of_file(error, path)
        _raise_out_of_memory(error, path)
        # What torch says before and after that sentence is advice to load without safety.
        told = re.split(r"WeightsUnpickler error: |\n\n", str(error), maxsplit=1)[-1].strip()
        reason = re.split(r"\.\s|\n", told)[0].removesuffix(".") or type(error).__name__
        raise CheckpointError(
            f"{path}: refused by the safe reader ({reason}); {ANOTHER}"
        ) from error


def _raise_out_of_memory(error: Exception, path: Path) -> None:
    """In a handler: a file that takes more memory than there is is no bad one, unless it lies."""
    asked = re.search(
        r"(?:DefaultCPUAllocator: .*you tried to allocate|unable to mmap) (\d+) bytes", str(error)
    )
    if asked and int(asked[1]) <= os.path.getsize(path):
        raise MemoryError(f"{path}: no memory left to read it") from error


# --- what a run's exactness depends on ------------------------------------------------------------


@contextlib.contextmanager
def rng_kept() -> Iterator[None]:
    """Run something without moving the random state that training will go on from."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def rng_state() -> dict[str, Any]:
    """State of torch's generators: {"cpu": uint8 tensor, "cuda": list of uint8 tensors}."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned; a device that is absent now is left out."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def library_versions() -> dict[str, str]:
    """Versions that decide whether a resumed run can be exact."""
    numpy = sys.modules["numpy"].__version__ if "numpy" in sys.modules else ""
    return {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "numpy": numpy,
        "cuda": str(torch.version.cuda or ""),
    }
