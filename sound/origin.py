"""Which codec, settings and source made a file of encode_npq.py: a record that lies beside it.

    records = Records()
    records.add(target, written, codec, settings, source)      # before `written` becomes `target`
    record = records.find(target)                              # None: of unknown origin

The .npq format has no room for it. Each folder has a file RECORDS with one JSON object a line,
that is only ever appended to: two encoders at once, or a line cut by a crash, cost no other line.
A record counts for the one content that it was written for, by size and time stamp, or else by the
CRC-32 of the codes; so a file that was copied stays known, and one that was replaced does not.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from cli.command_line import printable
from sound.npq_format import NpqError, check_codes, read_header

RECORDS = ".encode_npq.jsonl"


class CodecId(NamedTuple):
    """A codec: the name it was asked for by, and SHA-256 of its weights, which identifies it."""

    name: str
    weights: str

    def __str__(self) -> str:
        return printable(f"{self.name} ({self.weights[:8]})")


def codec_of(facts: Mapping[str, Any]) -> CodecId | None:
    """The codec that the data facts of a checkpoint name; None where they do not, as older ones."""
    found = facts.get("codec")
    if not isinstance(found, dict) or found.keys() != {"name", "weights"}:
        return None
    return CodecId(**found) if all(isinstance(v, str) for v in found.values()) else None


def are_different(one: CodecId | None, other: CodecId | None) -> bool:
    """Whether two codecs are known and have other weights."""
    return one is not None and other is not None and one.weights != other.weights


def another_codec(saved: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What to say where a checkpoint was trained on codes of another codec than the data's."""
    before, now = codec_of(saved), codec_of(found)
    if not are_different(before, now):
        return ""
    return f"trained on codes of codec {before}, the data are of {now}, which mean nothing to it"


@dataclass(frozen=True)
class Record:
    """A line of RECORDS."""

    file: str  # name in its folder
    size: int  # bytes
    mtime_ns: int
    crc: int  # of the codes; -1 for sound
    codec: str
    weights: str
    settings: dict[str, Any]  # all else that decides the codes
    source_size: int
    source_mtime_ns: int

    @property
    def codec_id(self) -> CodecId:
        """The codec that was used."""
        return CodecId(self.codec, self.weights)


class Records:
    """The records of folders, each read when it is first asked for."""

    def __init__(self) -> None:
        self.folders: dict[Path, list[Record]] = {}

    def of(self, folder: Path) -> list[Record]:
        """Those of a folder, oldest first; none where they cannot be read."""
        if folder not in self.folders:
            self.folders[folder] = list(_read(folder / RECORDS))
        return self.folders[folder]

    def find(self, path: Path) -> Record | None:
        """The record of a file with its present content.

        Raises:
            OSError: the file is not there.
        """
        status = path.stat()
        same = [r for r in self.of(path.parent) if (r.file, r.size) == (path.name, status.st_size)]
        for record in reversed(same):
            if record.mtime_ns == status.st_mtime_ns:
                return record
        crc = _crc(path) if any(r.crc >= 0 for r in same) else None
        for record in reversed(same):
            if record.crc == crc:
                with contextlib.suppress(OSError):  # only saves the next search the reading
                    self._append(path.parent, replace(record, mtime_ns=status.st_mtime_ns))
                return record
        return None

    def add(
        self,
        target: Path,
        written: Path,
        codec: CodecId,
        settings: dict[str, Any],
        source: os.stat_result,
    ) -> None:
        """Record what `written` holds, which is to be renamed to `target`.

        Raises:
            OSError: the record cannot be written.
        """
        status, crc = written.stat(), _crc(written)
        now = target.name, status.st_size, status.st_mtime_ns, -1 if crc is None else crc
        record = Record(*now, *codec, settings, source.st_size, source.st_mtime_ns)
        self._append(target.parent, record)

    def _append(self, folder: Path, record: Record) -> None:
        # A line break on either side: the line before may have been cut off.
        line = f"\n{json.dumps(asdict(record))}\n".encode()
        with open(folder / RECORDS, "ab", buffering=0) as file:
            file.write(line)
        self.of(folder).append(record)


def find_all(files: Iterable[tuple[str, int, int]]) -> Iterator[Record | None]:
    """The record of each file, of (path without links, size, CRC-32 of the codes), in order.

    By content alone: a file that was renamed within its folder is known.
    """
    records = Records()
    known: dict[str, dict[tuple[int, int], Record]] = {}
    for path, size, crc in files:
        folder = os.path.dirname(path)
        if folder not in known:
            known[folder] = {(r.size, r.crc): r for r in records.of(Path(folder))}
        yield known[folder].get((size, crc))


def _crc(path: Path) -> int | None:
    """CRC-32 of the codes; None of what is no .npq."""
    try:
        return check_codes(read_header(path))
    except NpqError:
        return None


def _read(path: Path) -> Iterator[Record]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    kinds = {"settings": dict, **dict.fromkeys(("file", "codec", "weights"), str)}
    for line in lines:
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError, RecursionError):
            continue
        if all(type(value) is kinds.get(name, int) for name, value in vars(record).items()):
            yield record
