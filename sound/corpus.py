"""The files of a run as a corpus: found, headers and codes checked, unfit files dropped.

    corpus = scan_corpus(find_npq_files(["npq_out"]), ctx=512)
    print(*corpus.summary.lines(), sep="\\n")
    corpus.vocab_sizes, corpus.frame_rate, corpus.files["frames"].sum()

K = codebooks, V = entries of a codebook.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cli.disk import replace_file
from cli.file_search import NothingFoundError, Wanted, real_paths, search
from run_folder.names import is_of_a_run, is_sample
from sound.labels import Labels
from sound.npq_format import (
    CODE_DTYPES,
    FRAME_RATE_TOLERANCE,
    NpqError,
    NpqHeader,
    check_codes,
    read_header,
    starts_as_npq,
)
from sound.origin import CodecId, find_all

T = TypeVar("T")
R = TypeVar("R")
# As `shifted_name` makes them.
SHIFTED = re.compile(
    r"(?s:(?P<stem>.+))\.shift(?P<part>[1-9]\d*)of(?P<parts>[1-9]\d*)(?P<suffix>\.\w+)"
)
COLUMN_NAMES = "offset", "frames", "codebooks", "dtype_code", "size", "mtime_ns", "crc"
FILE_COLUMNS = np.dtype([(name, "i8") for name in COLUMN_NAMES])


@dataclass
class DataSummary:
    """What a scan used, and what it dropped and why: counts of files and hours."""

    files: int = 0
    hours: float = 0.0
    layouts: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, tuple[int, float]] = field(default_factory=dict)  # reason -> (files, hours)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    codec: CodecId | None = None  # that made the codes, where records name it

    def drop(self, reason: str, hours: float = 0.0) -> None:
        """Count a file that is not used."""
        files, total = self.dropped.get(reason, (0, 0.0))
        self.dropped[reason] = (files + 1, total + hours)

    def lines(self) -> list[str]:
        """For the console: one line for what is used, one for each reason, one for each note."""
        layouts = ", ".join(f"{n} {layout}" for layout, n in sorted(self.layouts.items()))
        used = f"data     {self.files} files, {self.hours:.2f} hours used ({layouts})"
        dropped = [
            f"dropped  {files} files, {hours:.2f} hours: {reason}"
            for reason, (files, hours) in sorted(self.dropped.items())
        ]
        notes = [f"note     {note}" for note in self.notes]
        codec = self.codec or "unknown: no record of encode_npq.py beside the files"
        return [used, f"codec    {codec}", *dropped, *notes]


class Table(NamedTuple):
    """Files as columns, so that 200,000 of them cost megabytes and not objects."""

    paths: list[str]
    files: np.ndarray[Any, Any]  # FILE_COLUMNS


@dataclass
class Corpus:
    """The files of a run, one for each piece of music.

    Files are sorted by content (CRC-32 of the codes, then frames), so that the same music gives the
    same windows in the same order on every machine, whatever the folders and names. Where a piece
    is also there shifted by parts of a frame (`encode_npq.py --offsets`), these files are in
    further tables, row by row; a piece with fewer encodings than others has some of them twice.
    """

    tables: list[Table]
    vocab_sizes: tuple[int, ...]  # V of each codebook, the largest over the files
    side_codebooks: int  # of the K, so many at the end hold the side channel; 0 = mono
    frame_rate: float  # median over the files, frames per second
    summary: DataSummary
    labels: Labels | None = None

    def unshifted(self) -> Corpus:
        """The corpus with one encoding of each piece, the first."""
        return dataclasses.replace(self, tables=self.tables[:1])

    @property
    def paths(self) -> list[str]:
        """The file of each piece, as it was encoded first."""
        return self.tables[0].paths

    @property
    def files(self) -> np.ndarray[Any, Any]:
        """The columns of `paths`."""
        return self.tables[0].files

    @property
    def num_codebooks(self) -> int:
        """K."""
        return len(self.vocab_sizes)

    def fingerprint(self) -> str:
        """SHA-256 over codes and vocabulary; equal wherever the same music lies."""
        digest = hashlib.sha256(repr(self.vocab_sizes).encode())
        for _, files in self.tables:
            # Stacked: a view of two fields would carry the others' bytes along as padding.
            digest.update(np.stack([files["crc"], files["frames"]]).tobytes())
        return digest.hexdigest()


class BadFilesError(ValueError):
    """Some files are not valid .npq; lists them."""


NPQ_FILES = Wanted((".npq",), recognises=starts_as_npq)
TRAINING_FILES = dataclasses.replace(
    NPQ_FILES, is_left_out=is_sample, folder_is_left_out=is_of_a_run
)


def find_npq_files(
    patterns: Iterable[str | os.PathLike[str]], *, tell: Callable[[str], None] = lambda _: None
) -> list[str]:
    """The paths of `roots_of_npq_files`."""
    return list(roots_of_npq_files(patterns, tell=tell))


def roots_of_npq_files(
    patterns: Iterable[str | os.PathLike[str]], *, tell: Callable[[str], None] = lambda _: None
) -> dict[str, str]:
    """Expand globs, folders (searched recursively) and file names; each real file once.

    By path, the folder that was searched: the named one, or that of a named file, or the one before
    a glob's first wildcard. Unreadable paths come last, for `scan_corpus` to refuse by name. Files
    that a run wrote are left out. `tell` is called with a line of what was passed over, and one of
    what was left out.

    Raises:
        FileNotFoundError: a pattern matches nothing.
    """
    try:
        found = search(patterns, TRAINING_FILES)
    except NothingFoundError as error:
        raise FileNotFoundError(
            f"no .npq file matches {error}; name folders, .npq files or quoted globs "
            "(encode_npq.py makes .npq of audio)"
        ) from error
    for line in found.lines():
        tell(line)
    unusable = {path: os.path.dirname(path) for path, _ in found.unusable}
    return {**{file.path: file.root for file in found.files}, **unusable}


def scan_corpus(
    paths: Sequence[str],
    *,
    ctx: int,
    codebooks: int | None = None,
    skip_bad: bool = False,
    checked_file: str | os.PathLike[str] | None = None,
    on_file: Callable[[str], None] = lambda _: None,
) -> Corpus:
    """Read every header, check every code, keep the files that fit together, count the rest.

    The run's K is `codebooks`, or else the K with the most hours. With `codebooks` given, files
    with more are cut to their first codebooks (an RVQ is coarse to fine; of an NPQ2 file the mid
    channel comes first). Files with other codebooks, another frame rate than the median or fewer
    than `ctx` frames are dropped.

    `checked_file` stores which files were read before (JSON: path -> size, mtime, CRC), so that a
    resumed run does not read everything again. `on_file` is called with each file before it is
    read.

    Raises:
        BadFilesError: files that are not valid .npq, unless `skip_bad`; or no file is left to use;
            or codes of two codecs.
    """
    summary = DataSummary()
    bad: list[NpqError] = []
    headers = _keep_good(zip(paths, paths, strict=True), read_header, bad, on_file)
    shape = _shape_of_run(headers, codebooks)
    frame_rate = _median_rate(h for h in headers if _shape_taken(h, codebooks) == shape)
    fitting = []
    for h in headers:
        if (taken := _shape_taken(h, codebooks)) != shape:
            summary.drop(f"{taken} codebooks, the run uses {shape} (see --codebooks)", h.hours)
        elif abs(h.frame_rate / frame_rate - 1) > FRAME_RATE_TOLERANCE:
            summary.drop(f"frame rate {h.frame_rate:.2f}, the run's is {frame_rate:.2f}", h.hours)
        elif h.num_frames < ctx:
            summary.drop(f"shorter than a window of {ctx} frames", h.hours)
        else:
            fitting.append(h)
    checked = _CheckedFiles(checked_file)
    with_paths = zip(fitting, real_paths(h.path for h in fitting), strict=True)
    good = _keep_good(((h.path, (h, real)) for h, real in with_paths), checked, bad, on_file)
    checked.save()
    if bad and not skip_bad:
        lines = [f"  {error}" for error in bad[:10]] + ["  ..."] * (len(bad) > 10)
        raise BadFilesError(
            f"{len(bad)} of {len(paths)} files are not valid .npq; mend or remove them, or pass "
            "--skip-bad-files to train without them:\n" + "\n".join(lines)
        )
    for refused in bad:
        what = f"folder {refused.path}" if refused.field == "folder" else refused.field
        summary.drop(f"not valid: {what}")
    if not good:
        raise BadFilesError(
            f"no usable .npq file among {len(paths)}; change --ctx or --codebooks, or the data, as "
            "the reasons say:\n" + "\n".join(summary.lines()[2:])
        )
    _note_codec(good, summary)
    return _corpus_of(good, shape, frame_rate, summary)


def _note_codec(good: Sequence[tuple[int, NpqHeader]], summary: DataSummary) -> None:
    """Note the codec that made the codes; raises BadFilesError where there are two."""
    all_paths = [h.path for _, h in good]
    files = (
        (real, h.file_size, crc) for real, (crc, h) in zip(real_paths(all_paths), good, strict=True)
    )
    paths: dict[str, list[str]] = {}  # by the weights of their codec; "" where unknown
    names: dict[str, CodecId] = {}
    loudness = set()
    for path, record in zip(all_paths, find_all(files), strict=True):
        paths.setdefault(record.weights if record else "", []).append(path)
        if record is not None:
            names[record.weights] = record.codec_id
            loudness.add(str(record.settings.get("loudness")))
    unknown = len(paths.get("", ()))
    if len(names) > 1:
        made = (
            f"{codec} made {len(paths[key])} files, such as {paths[key][0]}"
            for key, codec in sorted(names.items(), key=lambda named: named[1])
        )
        raise BadFilesError(
            f"codes of {len(names)} codecs, which mean nothing to each other: {'; '.join(made)}; "
            "train on those of one, and keep each in its own folder"
        )
    summary.codec = next(iter(names.values()), None)
    if unknown and names:
        summary.warnings.append(
            f"{unknown} of {len(good)} files are of an unknown codec, such as "
            f"{paths[''][0]}, the others of {summary.codec}; make sure that it is the same"
        )
    if len(loudness) > 1:
        levels = ", ".join(sorted(loudness))
        summary.notes.append(f"encoded with different --loudness: {levels}")


class _Shape(NamedTuple):
    """Number of codebooks that a run takes from a file, and of those at the end for the side."""

    codebooks: int
    side: int

    def __str__(self) -> str:
        mid = self.codebooks - self.side
        return f"{mid} + {self.side} side" if self.side else f"{self.codebooks}"


def _shape_taken(header: NpqHeader, codebooks: int | None) -> _Shape:
    """All codebooks of a file, or the first `codebooks`."""
    taken = min(header.num_codebooks, codebooks or header.num_codebooks)
    mid = header.num_codebooks - header.side_codebooks
    return _Shape(taken, max(0, taken - mid))


def _shape_of_run(headers: Sequence[NpqHeader], codebooks: int | None) -> _Shape:
    """The shape with the most frames, among those with as many codebooks as asked for."""
    frames: Counter[_Shape] = Counter()
    for h in headers:
        shape = _shape_taken(h, codebooks)
        if codebooks in (None, shape.codebooks):
            frames[shape] += h.num_frames
    return max(frames, key=lambda shape: (frames[shape], shape), default=_Shape(codebooks or 0, 0))


def _median_rate(headers: Iterable[NpqHeader]) -> float:
    """The median frame rate, which is that of a file; NaN without files."""
    return statistics.median_high([h.frame_rate for h in headers] or [math.nan])


def _keep_good(
    files: Iterable[tuple[str, T]],
    read: Callable[[T], R],
    bad: list[NpqError],
    on_file: Callable[[str], None],
) -> list[R]:
    """What `read` makes of each file's second part; errors of those not valid go to `bad`."""
    good: list[R] = []
    for path, file in files:
        on_file(path)
        try:
            good.append(read(file))
        except NpqError as error:
            bad.append(error)
    return good


def _corpus_of(
    good: Sequence[tuple[int, NpqHeader]], shape: _Shape, frame_rate: float, summary: DataSummary
) -> Corpus:
    """The corpus of files that fit, in the order of their content."""
    pieces = _by_music(good, summary)
    headers = [piece[0][1] for piece in pieces]
    most = max(map(len, pieces))
    tables = [_table([piece[i % len(piece)] for piece in pieces]) for i in range(most)]
    vocabularies = {h.vocab_sizes[: shape.codebooks] for piece in pieces for _, h in piece}
    if len(vocabularies) > 1:
        summary.notes.append(
            f"{len(vocabularies)} different vocabularies; each codebook takes the largest size"
        )
    files = tables[0].files
    is_repeated = (np.diff(files["crc"]) == 0) & (np.diff(files["frames"]) == 0)  # in their order
    if repeated := np.count_nonzero(is_repeated):
        summary.notes.append(f"{repeated} files hold the same codes as another file")
    if most > 1:
        shifted = sum(map(len, pieces)) - len(pieces)
        summary.notes.append(
            f"{shifted} more encodings, shifted by parts of a frame: training takes them in turn"
        )
    summary.files, summary.hours = len(headers), sum(h.hours for h in headers)
    summary.layouts.update(h.layout for h in headers)
    vocab_sizes = tuple(max(sizes) for sizes in zip(*vocabularies, strict=True))
    return Corpus(tables, vocab_sizes, shape.side, frame_rate, summary)


def _table(files: Sequence[tuple[int, NpqHeader]]) -> Table:
    columns = [  # as in FILE_COLUMNS
        (h.codes_offset, h.num_frames, h.num_codebooks, CODE_DTYPES.index(h.dtype),
         h.file_size, h.mtime_ns, crc)
        for crc, h in files
    ]  # fmt: skip
    return Table([h.path for _, h in files], np.array(columns, dtype=FILE_COLUMNS))


# --- shifted encodings ---------------------------------------------------------------------------


def shifted_name(name: str, part: int, parts: int) -> str:
    """Name of a file's encoding that begins `part` of `parts` of a frame later; 0: its own."""
    stem, suffix = os.path.splitext(name)
    return f"{stem}.shift{part}of{parts}{suffix}" if part else name


def _by_music(
    good: Sequence[tuple[int, NpqHeader]], summary: DataSummary
) -> list[list[tuple[int, NpqHeader]]]:
    """The encodings of each piece of music, by their names, the least shifted one first.

    They have equally many frames; one that has not is of other music, and dropped.
    """
    pieces: dict[str, list[tuple[float, int, NpqHeader]]] = {}
    for crc, h in good:
        found = SHIFTED.fullmatch(h.path)
        name, shift = h.path, 0.0
        if found:
            name, shift = found["stem"] + found["suffix"], int(found["part"]) / int(found["parts"])
        pieces.setdefault(name, []).append((shift, crc, h))
    kept = []
    for piece in pieces.values():
        piece.sort(key=lambda encoding: encoding[0])
        length = piece[0][2].num_frames
        for _, _, h in (encoding for encoding in piece if encoding[2].num_frames != length):
            summary.drop("not as long as the file that its name says it is a shift of", h.hours)
        kept.append([(crc, h) for _, crc, h in piece if h.num_frames == length])
    return sorted(kept, key=lambda piece: (piece[0][0], piece[0][1].num_frames, piece[0][1].path))


class _CheckedFiles:
    """CRCs of files whose codes were all in range, stored by path, size and time stamp.

    Only a cache: where it cannot be read or written, the files are read again.
    """

    def __init__(self, store: str | os.PathLike[str] | None) -> None:
        self.store, self.is_changed = store, False
        self.known: dict[str, Any] = {}
        if store is not None:
            with contextlib.suppress(OSError, ValueError, TypeError):
                self.known = dict(json.loads(Path(store).read_bytes()))

    def __call__(self, file: tuple[NpqHeader, str]) -> tuple[int, NpqHeader]:
        """CRC-32 and header of a file, of (header, path without links); NpqError for a bad code."""
        header, path = file
        stamp = [header.file_size, header.mtime_ns]
        match self.known.get(path):
            case [size, mtime_ns, int(crc)] if [size, mtime_ns] == stamp:
                return crc, header
        crc = check_codes(header)
        self.known[path], self.is_changed = [*stamp, crc], True
        return crc, header

    def save(self) -> None:
        if self.store is not None and self.is_changed:
            with contextlib.suppress(OSError):  # json.dump would take ten times as long as dumps
                replace_file(Path(self.store), json.dumps(self.known).encode(), durable=False)
