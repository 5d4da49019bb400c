"""The .npq format: one file. Read, check, map, write.

    header = read_header("song.npq")                  # strict; a bad file raises NpqError
    codes = map_codes(header)                         # [T, K], read-only memory map
    check_codes(header)                               # every code, once
    write_npq("new.npq", codes, vocab_sizes=header.vocab_sizes, frame_rate=header.frame_rate)

K = codebooks, T = frames, V = entries of a codebook. Everything on disk is little-endian.
"""

from __future__ import annotations

import errno
import functools
import math
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cli.disk import NOT_OFFERED, replace_file

MAGICS = b"NPQ1", b"NPQ2"
MAX_CODEBOOKS = 64
MAX_VOCAB_SIZE = 2**20
MAX_FRAME_RATE = 10_000.0  # frames per second, exclusive
FRAME_RATE_TOLERANCE = 0.02  # relative; encoders store T / duration, which strays by 0.1 %
CODE_DTYPES = np.dtype("<u1"), np.dtype("<u2"), np.dtype("<u4")  # by the file's dtype_code
NO_DTYPE = np.dtype("V1")  # stands for a dtype_code that does not exist
# O_NONBLOCK: opening a FIFO returns at once, so that it can be refused by its type.
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
FIXED_BYTES = 20  # the shortest fixed part of a header, common to every layout
LONGEST_HEADER = 23 + 4 * MAX_CODEBOOKS + 1  # NPQ2 with every codebook
CHECK_CHUNK_BYTES = 4 << 20


class NpqError(ValueError):
    """A file is not a valid .npq; the message has path, field, expected, found, and the remedy."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        field: str,
        expected: object,
        found: object,
        remedy: str = "encode the track again or restore the file from a copy",
    ) -> None:
        self.path, self.field, self.expected, self.found = str(path), field, expected, found
        self.remedy = remedy
        super().__init__(f"{self.path}: {field}: expected {expected}, found {found}; {remedy}")


@dataclass(frozen=True, slots=True)
class NpqHeader:
    """The content of a file's header, with the file's size and time stamp when it was read."""

    path: str
    layout: str  # "NPQ1", "NPQ2", "legacy A" or "legacy B"
    num_codebooks: int  # K, mid and side together
    side_codebooks: int  # the last so many columns hold the side channel; 0 = mono
    num_frames: int  # T
    frame_rate: float  # frames per second
    bitrate: float  # kbit/s of the source file, informational
    vocab_sizes: tuple[int, ...]  # V of each codebook
    dtype: np.dtype[Any]  # of a code on disk
    codes_offset: int  # bytes before the first code
    file_size: int
    mtime_ns: int

    @property
    def hours(self) -> float:
        """Length of the track."""
        return self.num_frames / self.frame_rate / 3600

    @property
    def expected_size(self) -> int:
        """Bytes that a whole file has."""
        return self.codes_offset + self.dtype.itemsize * self.num_frames * self.num_codebooks


def read_header(path: str | os.PathLike[str]) -> NpqHeader:
    """Read and check a header; nothing larger than the header is read or allocated.

    Reads NPQ1, NPQ2 and the two legacy layouts. A legacy layout counts only when the file cannot be
    NPQ1 (version 1 and K >= 1), every field is sane and the size matches to the byte.

    Raises:
        NpqError: not a regular file, unreadable, or any field or the size is wrong.
    """
    path = os.fspath(path)
    head, status = _read_head(path)
    magic, version, codebooks = struct.unpack_from("<4sHH", head)
    if magic not in MAGICS:
        raise NpqError(path, "magic", "NPQ1 or NPQ2", magic, "name .npq files only")

    is_ours = magic == b"NPQ2" or (version == 1 and codebooks >= 1)
    for layout in [magic.decode()] if is_ours else ["legacy A", "legacy B"]:
        header = _parse(layout, head, path, status.st_size, status.st_mtime_ns)
        problem = _problem(header)
        if problem is None:
            return header
        if is_ours:
            raise NpqError(path, *problem)
    raise NpqError(path, "version", "1, or a legacy layout that fits to the byte", version)


def starts_as_npq(path: str) -> bool:
    """Whether a regular file begins as an .npq; also True where it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(len(MAGICS[0])) in MAGICS
    except OSError:
        return True


def _read_head(path: str) -> tuple[bytes, os.stat_result]:
    """The first bytes of a file, enough for any header, and its status."""
    try:
        descriptor = os.open(path, OPEN_FLAGS)
        try:
            status = os.fstat(descriptor)
            head = os.read(descriptor, LONGEST_HEADER) if stat.S_ISREG(status.st_mode) else None
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise_unless_of_file(error)
        what, remedy = "folder" if os.path.isdir(path) else "file", "check path and permissions"
        raise NpqError(path, what, f"a readable {what}", error, remedy) from error
    if head is None:
        found = "a folder, pipe or device"
        raise NpqError(path, "file", "a regular file", found, "name .npq files")
    if len(head) < FIXED_BYTES:
        expected = f"{FIXED_BYTES} bytes (file truncated)"
        raise NpqError(path, "header", expected, f"{len(head)} bytes")
    return head, status


class _Layout(NamedTuple):
    """How a header begins, up to the vocab sizes; behind them legacy B has its frames."""

    fields: str  # names of the fixed fields
    form: str  # their struct
    size: str  # struct letter of a vocab size


LAYOUTS = {
    "NPQ1": _Layout("version k frame_rate bitrate frames", "<4xHHffI", "I"),
    "NPQ2": _Layout("version mode mid side frame_rate bitrate frames", "<4xHBHHffI", "I"),
    "legacy A": _Layout("k frame_rate bitrate frames", "<4xiffi", "i"),
    "legacy B": _Layout("k frame_rate", "<4xif", "i"),
}


def _parse(layout: str, head: bytes, path: str, size: int, mtime_ns: int) -> NpqHeader:
    """A header as one of LAYOUTS, unchecked; an impossible K leaves vocab_sizes empty."""
    names, form, letter = LAYOUTS[layout]
    pos, vocab_sizes = struct.calcsize(form), tuple[int, ...]()
    dtype: np.dtype[Any] = CODE_DTYPES[1]
    values = struct.unpack_from(form, head.ljust(pos, b"\0"))
    f = {"side": 0, "bitrate": 0.0, **dict(zip(names.split(), values, strict=True))}
    if layout == "NPQ2":
        # Mode 0 is mono and has no side codebooks; mode 1 is mid/side and has both. Anything else
        # is no header.
        sane = f["version"] == 1 and f["mid"] and (f["mode"], f["side"] > 0) in ((0, 0), (1, 1))
        f["k"] = f["mid"] + f["side"] if sane else 0
    if 1 <= (k := f["k"]) <= MAX_CODEBOOKS:
        vocab_sizes = _unpack_sizes(letter, head[pos : pos + 4 * k].ljust(4 * k, b"\0"))
    pos += 4 * k
    if "version" in f:
        code = head[pos] if 0 <= pos < len(head) else 255
        dtype, pos = CODE_DTYPES[code] if code < len(CODE_DTYPES) else NO_DTYPE, pos + 1
    if "frames" not in f:
        frames = int.from_bytes(head[max(0, pos) :][:4], "little", signed=True)
        f["frames"], pos = frames if vocab_sizes else 0, pos + 4
    read = f["side"], f["frames"], f["frame_rate"], f["bitrate"]
    return NpqHeader(path, layout, k, *read, vocab_sizes, dtype, pos, size, mtime_ns)


@functools.lru_cache  # nearly all files of a corpus have the same: one tuple for all
def _unpack_sizes(letter: str, content: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(content) // 4}{letter}", content)


def _problem(header: NpqHeader) -> tuple[str, object, object] | None:
    """The first field that is not sane: (field, expected, found). K comes before all else."""
    h = header
    if not 1 <= h.num_codebooks <= MAX_CODEBOOKS:
        expected = f"1 to {MAX_CODEBOOKS} codebooks, version 1"
        return "codebooks, version and channel mode", expected, h.num_codebooks
    if h.file_size < h.codes_offset:
        return "header", f"{h.codes_offset} bytes (file truncated)", f"{h.file_size} bytes"
    if h.num_frames < 1:
        return "frames", "at least 1", h.num_frames
    if not 0 < h.frame_rate < MAX_FRAME_RATE:  # False for NaN
        return "frame rate", f"above 0 and below {MAX_FRAME_RATE:g}", h.frame_rate
    if not 0 <= h.bitrate < math.inf:
        return "bitrate", "finite and not negative", h.bitrate
    if h.dtype == NO_DTYPE:
        return "dtype code", "0, 1 or 2", "another"
    largest = min(MAX_VOCAB_SIZE, 2 ** (8 * h.dtype.itemsize))
    if not all(2 <= v <= largest for v in h.vocab_sizes):
        return "vocab sizes", f"2 to {largest} each", h.vocab_sizes
    if h.file_size != h.expected_size:
        kind = "truncated" if h.file_size < h.expected_size else "too long"
        return "size", f"{h.expected_size} bytes", f"{h.file_size} bytes ({kind})"
    return None


# Errors of a file or its place. The others are of this process or this moment (no descriptor or
# memory left, a server that does not answer) and no fault of the file.
OF_A_FILE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EIO),
    *(errno.EISDIR, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV, errno.EINVAL),
}


def raise_unless_of_file(error: Exception) -> None:
    """In a handler: raise a system error again that is no fault of its file."""
    if isinstance(error, OSError) and error.errno not in OF_A_FILE:
        raise error


# --- codes ---------------------------------------------------------------------------------------


def map_codes(header: NpqHeader) -> np.ndarray[Any, Any]:
    """Codes [T, K] as a read-only memory map in the file's dtype; read where mapping is impossible.

    For one file as a whole. Training reads windows in another way, for reasons in npq_dataset.py.

    Raises:
        NpqError: the file is no longer the one whose header was read.
    """
    descriptor = open_unchanged(header.path, header.file_size, header.mtime_ns)
    try:
        # Private: some network file systems map no other way.
        kind, may = mmap.MAP_PRIVATE, mmap.PROT_READ
        mapped: Any = mmap.mmap(descriptor, header.file_size, flags=kind, prot=may)
    except OSError as error:
        if error.errno not in NOT_OFFERED | {errno.ENODEV}:
            raise
        mapped = os.pread(descriptor, header.file_size, 0)
    finally:
        os.close(descriptor)
    count = header.num_frames * header.num_codebooks
    flat = np.frombuffer(mapped, header.dtype, count, header.codes_offset)
    return flat.reshape(header.num_frames, header.num_codebooks)


def open_unchanged(path: str, size: int, mtime_ns: int) -> int:
    """A descriptor of a file; raises NpqError where it is not the file that was scanned."""
    try:
        descriptor = os.open(path, OPEN_FLAGS)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise
        raise file_changed(path, "the file that was there at the start", error) from error
    now = os.fstat(descriptor)
    if (now.st_size, now.st_mtime_ns) != (size, mtime_ns):
        os.close(descriptor)
        raise file_changed(
            path, f"{size} bytes, untouched", f"{now.st_size} bytes, or a newer file"
        )
    return descriptor


def file_changed(path: str, expected: object, found: object) -> NpqError:
    """The error of a file that has changed since the run began."""
    remedy = "leave the files alone during a run; resume to go on from the last checkpoint"
    return NpqError(path, "file changed during the run", expected, found, remedy)


def check_codes(header: NpqHeader) -> int:
    """Read every code once, in bounded memory; return the CRC-32 of the codes on disk.

    Raises:
        NpqError: a code is not below its codebook's vocab size, with the first such frame and
        codebook.
    """
    crc, frame = 0, 0
    row_bytes = header.dtype.itemsize * header.num_codebooks
    smallest = min(header.vocab_sizes)
    try:
        with open(header.path, "rb", buffering=0) as file:
            file.seek(header.codes_offset)
            while chunk := file.read(max(1, CHECK_CHUNK_BYTES // row_bytes) * row_bytes):
                crc = zlib.crc32(chunk, crc)
                codes = np.frombuffer(chunk, header.dtype, len(chunk) // header.dtype.itemsize)
                # The flat maximum is many times faster than one for each codebook.
                if codes.max() >= smallest:
                    _refuse_bad_code(header, codes.reshape(-1, header.num_codebooks), frame)
                frame += len(chunk) // row_bytes
    except OSError as error:
        raise_unless_of_file(error)
        raise NpqError(header.path, "codes", "a readable file", error, "check the disk") from error
    if frame != header.num_frames:
        raise file_changed(header.path, f"{header.num_frames} frames", f"{frame} frames")
    return crc


def _refuse_bad_code(header: NpqHeader, codes: np.ndarray[Any, Any], first_frame: int) -> None:
    """Raise NpqError for the first of codes [T, K] that is not below its vocab size, if any is."""
    bad = np.argwhere((codes < 0) | (codes >= np.array(header.vocab_sizes)))
    if len(bad):
        frame, k = (int(i) for i in bad[0])
        found = f"{codes[frame, k]} in frame {first_frame + frame}, codebook {k}"
        raise NpqError(header.path, "codes", f"0 to {header.vocab_sizes[k] - 1}", found)


# --- writing -------------------------------------------------------------------------------------


def write_npq(
    path: str | os.PathLike[str],
    codes: np.ndarray[Any, Any],
    *,
    vocab_sizes: Sequence[int],
    frame_rate: float,
    bitrate: float = 0.0,
    side_codebooks: int = 0,
) -> NpqHeader:
    """Write codes [T, K] (integers) as NPQ1, or as NPQ2 mid/side if there are side codebooks.

    The last `side_codebooks` columns hold the side channel. `frame_rate` is in frames per second,
    `bitrate` (of the source file) in kbit/s. The file appears whole or not at all: it is written
    under another name, synced, and renamed.

    Raises:
        NpqError: codes or fields that the format cannot hold. Nothing is written then.
        OSError: the file cannot be written.
    """
    path, codes = os.fspath(path), np.asarray(codes)
    if codes.ndim != 2 or codes.dtype.kind not in "iu" or codes.shape[1] != len(vocab_sizes):
        expected = f"integers [T, {len(vocab_sizes)}], one column per vocab size"
        found = f"{codes.dtype} {list(codes.shape)}"
        raise NpqError(path, "codes", expected, found, "pass codes as [T, K]")
    dtype = CODE_DTYPES[1] if max(vocab_sizes, default=0) <= 2**16 else CODE_DTYPES[2]
    try:
        head = _header_bytes(len(codes), vocab_sizes, frame_rate, bitrate, side_codebooks, dtype)
    except (struct.error, OverflowError) as error:
        expected = "values that fit their fields"
        raise NpqError(path, "header", expected, error, "nothing was written") from error
    # The check is of the header as it will be read: a float32 rounds.
    layout = head[:4].decode()
    size = len(head) + dtype.itemsize * codes.size
    header = _parse(layout, head, path, size, mtime_ns=0)
    if problem := _problem(header):
        raise NpqError(path, *problem, remedy="nothing was written")
    if codes.min() < 0 or codes.max() >= min(vocab_sizes):
        _refuse_bad_code(header, codes, 0)
    content = head + np.ascontiguousarray(codes, dtype=dtype).tobytes()
    replace_file(Path(path), content, durable=True)
    return read_header(path)


def _header_bytes(
    frames: int,
    vocab_sizes: Sequence[int],
    frame_rate: float,
    bitrate: float,
    side_codebooks: int,
    dtype: np.dtype[Any],
) -> bytes:
    """NPQ1, or NPQ2 if there are side codebooks; struct.error for what does not fit its field."""
    k, code = len(vocab_sizes), CODE_DTYPES.index(dtype)
    tail = struct.pack(f"<ffI{k}IB", frame_rate, bitrate, frames, *vocab_sizes, code)
    if side_codebooks:
        return struct.pack("<4sHBHH", b"NPQ2", 1, 1, k - side_codebooks, side_codebooks) + tail
    return struct.pack("<4sHH", b"NPQ1", 1, k) + tail
