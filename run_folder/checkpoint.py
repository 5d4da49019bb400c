"""One checkpoint file: writing it, saving in the background of training, verified loading.

    dump(checkpoint, file)
    checkpoint = load_checkpoint("rvq_9cb_latest.pt")

Only this file calls torch.save or torch.load on checkpoints. It does not import the model, so that
a checkpoint opens even if its model can no longer be built.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import re
import stat
import struct
import sys
import threading
import weakref
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

FORMAT = "rvq-checkpoint"
FORMAT_VERSION = 1
STATE_KEYS = ("model", "ema", "optimizer", "scaler", "guard", "progress", "rng")
REQUIRED_KEYS = {*STATE_KEYS, "architecture", "flags", "data", "history", "libraries"}
WEIGHTS_KEYS = {"ema", "architecture"}  # enough to start a new run
DOS_FOLDER_BIT = 0x10  # in the external attributes of a zip entry
ALIGNMENT = 64  # bytes, of tensors in host memory, as torch's own
SAVING_NICENESS = 10  # on a busy core, saving gets a tenth of the time that training gets
ANOTHER = "give a .pt file of train_rvq.py, or an older one of the run"  # a remedy


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, unsafe or does not fit; the message contains a remedy."""


# --- one file ------------------------------------------------------------------------------------


def dump(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    """Write a checkpoint's bytes to an open file.

    Raises:
        OSError: the disk is full, read-only or failing.
    """
    try:
        torch.save({"format": FORMAT, "version": FORMAT_VERSION, **checkpoint}, file)
    except RuntimeError as error:
        # torch's writer hides the disk's error behind one of its own.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def size_of(value: Any) -> int:
    """Return the bytes that a checkpoint takes on disk; a slight overestimate."""

    def tensor_bytes(part: Any) -> int:
        if isinstance(part, Tensor):
            return part.numel() * part.element_size() + 1024  # its entry in the zip
        if isinstance(part, dict):
            return sum(map(tensor_bytes, part.values()))
        return sum(map(tensor_bytes, part)) if isinstance(part, (list, tuple)) else 32

    return (1 << 16) + tensor_bytes(value)


def with_tensors(value: Any, use: Callable[[Tensor], Any]) -> Any:
    """Copy nested dicts, lists and tuples with every tensor replaced by `use(tensor)`."""
    if isinstance(value, Tensor):
        return use(value)
    if isinstance(value, dict):
        return {key: with_tensors(part, use) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(with_tensors(part, use) for part in value)
    return value


class BackgroundSaver:
    """Copies a checkpoint and writes the copy in a thread, while training goes on.

    The copy takes as much host memory as the checkpoint, in one block that is kept and reused; for
    CUDA tensors it is page-locked, and `tell` receives one message where it cannot be. Checksums,
    writing and syncing run without the interpreter lock, so training waits only for the copy
    (after CheckFreq, Mohan et al., FAST 2021).
    """

    def __init__(self, tell: Callable[[str], None] = print) -> None:
        self.tell = tell
        self.may_lock = True  # False after page-locking has failed
        self.copies: list[Tensor] = []

    def start(
        self, checkpoint: dict[str, Any], write: Callable[[dict[str, Any]], Path]
    ) -> Future[Path]:
        """Copy the checkpoint, then call `write` with the copy in the background.

        The future receives the result of `write` or its error. Wait for it before the next start,
        which overwrites the copy.
        """
        tensors: list[Tensor] = []
        with_tensors(checkpoint, tensors.append)
        if [(c.shape, c.dtype) for c in self.copies] != [(t.shape, t.dtype) for t in tensors]:
            self.copies = []  # frees the old block before a new one is taken
            self.copies = self._host_tensors(tensors)
        for copy, tensor in zip(self.copies, tensors, strict=True):
            copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if any(t.is_cuda for t in tensors):
            torch.cuda.synchronize()
        rest = iter(self.copies)
        copied = with_tensors(checkpoint, lambda _: next(rest))
        written: Future[Path] = Future()
        # A daemon thread: a disk that hangs must not keep the process from ending.
        work = (written, write, copied)
        threading.Thread(target=_write, args=work, name="saving", daemon=True).start()
        return written

    def _host_tensors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return uninitialised host tensors of the same shapes and dtypes in one block of memory.

        torch's allocator of page-locked memory would round each tensor up to a power of two.
        """
        sizes = [-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in tensors]
        block = torch.empty(sum(sizes), dtype=torch.uint8).numpy()
        if self.may_lock and any(t.is_cuda for t in tensors):
            self._lock_pages(block)

        def at(start: int, like: Tensor) -> Tensor:
            if not like.numel():
                return torch.empty(like.shape, dtype=like.dtype)
            # A storage of its own: torch.save writes the whole storage of a tensor.
            flat = torch.frombuffer(block, dtype=like.dtype, count=like.numel(), offset=start)
            return flat.view(like.shape)

        return list(map(at, itertools.accumulate(sizes, initial=0), tensors))

    def _lock_pages(self, block: Any) -> None:
        """Page-lock a NumPy array until it is freed, so that CUDA copies to it directly."""
        runtime, address = torch.cuda.cudart(), block.ctypes.data
        code = runtime.cudaHostRegister(address, block.nbytes, 0)
        if code == runtime.cudaError.success:
            weakref.finalize(block, runtime.cudaHostUnregister, address)
            return
        self.may_lock = False
        self.tell(
            f"{block.nbytes / 1e6:.0f} MB for copies of the state cannot be page-locked "
            f"({runtime.cudaGetErrorString(code)}), so training waits longer for a save; free "
            "memory, or raise `ulimit -l`"
        )
        with contextlib.suppress(RuntimeError):  # the next kernel reports the same error again
            torch.zeros(1, device="cuda")


def _write(
    written: Future[Path], write: Callable[[dict[str, Any]], Path], copy: dict[str, Any]
) -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), SAVING_NICENESS)
    try:
        written.set_result(write(copy))
    except BaseException as error:
        written.set_exception(error)


# System errors that mean that the file is bad. Others (no descriptor, memory or permission left, a
# server that does not answer) are temporary and say nothing about the file.
OF_A_FILE = {
    *(errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EIO, errno.EINVAL, errno.ENXIO),
    errno.ENAMETOOLONG,
}


def verify_file(path: Path) -> None:
    """Check a checkpoint's zip container: a regular file, no compression, every CRC-32 correct.

    torch.load checks none of this, so flipped bits would load without an error.

    Raises:
        CheckpointError: the file is bad; the message names the file and the reason.
        OSError, MemoryError: the file cannot be read now, and may be good.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(
                f"{path}: expected a regular file, found a folder, pipe or device; give a .pt file"
            )
        with zipfile.ZipFile(path) as archive:
            fault = _fault_of(archive, path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint; check the path") from error
    except (CheckpointError, MemoryError):
        raise
    # A damaged container can raise anything, for example RuntimeError for an "encrypted" flag.
    except Exception as error:
        _raise_unless_of_file(error, path)
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint ({error}); {ANOTHER}"
        ) from error
    if fault:
        raise CheckpointError(f"{path}: {fault}; {ANOTHER}")


def _fault_of(archive: zipfile.ZipFile, path: Path) -> str:
    """Return what torch would read wrongly or could be harmed by; "" if the zip is sound."""
    entries = archive.infolist()
    for entry in entries:
        # torch.save never compresses, and a compressed entry can unpack to any size.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            return f"refused, entry {entry.filename!r} is compressed"
        # For a folder, torch returns uninitialised memory without an error.
        if entry.external_attr & DOS_FOLDER_BIT or entry.is_dir():
            return f"damaged, entry {entry.filename!r} is marked as a folder"
    if sum(entry.file_size for entry in entries) > os.path.getsize(path):
        return "refused, entries overlap"
    # If two readers can disagree on a file's content, torch may read entries that the loop above
    # and the CRC-32s below never checked.
    if len({entry.filename.lower() for entry in entries}) < len(entries):
        return "damaged, two entries have one name"
    if not entries or not _has_one_directory(path, archive.start_dir, len(entries)):
        return "damaged, its zip directory is not at the recorded place"
    damaged = archive.testzip()
    return "" if damaged is None else f"damaged, CRC-32 of {damaged!r} is wrong"


def _raise_unless_of_file(error: Exception, path: Path) -> None:
    """In an exception handler: re-raise a system error outside OF_A_FILE, with the path."""
    if isinstance(error, OSError) and error.errno is not None and error.errno not in OF_A_FILE:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _has_one_directory(path: Path, start: int, count: int) -> bool:
    """Return whether a zip's directory is at `start`, has `count` entries, and ends the file.

    The record END closes a zip; END64 and its locator may come before it. END and END64 each record
    where the directory is, and readers differ on which of them they use: both must agree.
    """
    end, end64, locator = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), "<4sLQL"
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - end.size - 20 - end64.size))
        tail = file.read()
    fields = end.unpack(tail[-end.size :])
    recorded = [fields[4], fields[5], fields[6]]  # entries, bytes, start of the directory
    finish, comment = size - end.size, fields[7]
    sixty_four = tail[-end.size - 20 : -end.size]
    if sixty_four[:4] == b"PK\x06\x07":
        finish -= 20 + end64.size
        wide = end64.unpack(tail[: end64.size])
        located = struct.unpack(locator, sixty_four)
        if wide[0] != b"PK\x06\x06" or located[1:] != (0, finish, 1):
            return False
        full = [0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF]  # in END these mean "see END64"
        if any(a not in (b, c) for a, b, c in zip(recorded, wide[7:], full, strict=True)):
            return False
        recorded = list(wide[7:])
    agrees = recorded == [count, finish - start, start]
    return fields[0] == b"PK\x05\x06" and comment == 0 and agrees


def load_checkpoint(
    path: str | os.PathLike[str], *, needed: set[str] = REQUIRED_KEYS
) -> dict[str, Any]:
    """Verify and read a checkpoint, with its tensors on the CPU; no code from the file is run.

    `needed` are the keys that it must have, by default all that a resume needs.

    Raises:
        CheckpointError: missing, damaged, unsafe, of another program, or of a newer version.
        OSError, MemoryError: the file cannot be read now, and may be good.
    """
    path = Path(path)
    verify_file(path)
    checkpoint = _unpickle(path)
    is_ours = isinstance(checkpoint, dict) and checkpoint.get("format") == FORMAT
    version = checkpoint.get("version") if is_ours else None
    if not isinstance(version, int) or version < 1:
        fault = f"damaged, expected a format version of at least 1, found {version!r}"
        other = f"not a checkpoint of this trainer (no format {FORMAT!r})"
        raise CheckpointError(f"{path}: {fault if is_ours else other}; {ANOTHER}")
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
    """Load any verified file with its tensors memory-mapped, so that they are read when used.

    Raises:
        CheckpointError: refused by the safe reader (weights_only).
        OSError: the file system cannot map files; use `read_tensors`.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY):
        return _unpickle(path, mmap=True)


def read_tensors(path: Path) -> Any:
    """Load any verified file into memory; raises what `map_tensors` raises."""
    return _unpickle(path)


def _unpickle(path: Path, **options: Any) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except MemoryError:
        raise
    except Exception as error:  # a damaged or hostile pickle can fail in any way
        _raise_unless_of_file(error, path)
        _raise_out_of_memory(error, path)
        # Around this sentence, torch advises to load without the safe reader.
        text = re.split(r"WeightsUnpickler error: |\n\n", str(error), maxsplit=1)[-1].strip()
        reason = re.split(r"\.\s|\n", text)[0].removesuffix(".") or type(error).__name__
        raise CheckpointError(
            f"{path}: refused by the safe reader ({reason}); {ANOTHER}"
        ) from error


def _raise_out_of_memory(error: Exception, path: Path) -> None:
    """In an exception handler: raise MemoryError if memory was too little for the file.

    A request for more bytes than the file has is not believed: then the file is bad.
    """
    asked = re.search(
        r"(?:DefaultCPUAllocator: .*you tried to allocate|unable to mmap) (\d+) bytes", str(error)
    )
    if asked and int(asked[1]) <= os.path.getsize(path):
        raise MemoryError(f"{path}: no memory left to read it") from error


# --- random state and library versions ------------------------------------------------------------


@contextlib.contextmanager
def rng_kept() -> Iterator[None]:
    """Restore torch's random state after the block, so that training is not affected by it."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def rng_state() -> dict[str, Any]:
    """Return the state of torch's generators: {"cpu": uint8 [N], "cuda": a list of uint8 [M]}."""
    # Asking CUDA's generators begins CUDA: hundreds of MiB on a card that the run does not use.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the result of `rng_state`; CUDA states only if the number of devices is the same."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def library_versions() -> dict[str, str]:
    """Return the versions of Python, torch, NumPy and CUDA; with others a resume is not exact."""
    numpy = sys.modules["numpy"].__version__ if "numpy" in sys.modules else ""
    return {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "numpy": numpy,
        "cuda": str(torch.version.cuda or ""),
    }
