"""The files that a text file names, one a line.

    numbers = listed_files(["toks/a.npq", "toks/#9 Dream.npq"], "val.txt")

A line is a base name, a path, or the end of a path: a name with as many of its folders as make it
unique. A line that begins with # is a comment, unless a file has this name.
"""

from __future__ import annotations

import codecs
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cli.file_search import real_paths

MOST_SHOWN = 5  # of the lines that are wrong


def listed_files(paths: Sequence[str], file_list: str | os.PathLike[str]) -> list[int]:
    """Numbers of the files that a list names, ascending.

    Raises:
        OSError: the list cannot be read.
        ValueError: it is not text, or lines fit no file, or several.
    """
    named = files_named(paths, lines_of(file_list))
    problems = [named.doubtful] if named.doubtful else []
    if named.missing:
        problems.append(
            f"{named.missing} listed files are not in the data: {named.examples}; write base names "
            "or paths that --data matches, one a line"
        )
    if problems:
        raise ValueError(f"{file_list}: {'; '.join(problems)}")
    return sorted(set(named.files.values()))


class Named(NamedTuple):
    """What the lines of a list mean, by their index; comments are left out."""

    files: dict[int, int]  # number of the file
    missing: int  # lines that fit none
    examples: str  # some of these, with hints
    doubtful: str  # about lines that fit several, or empty


def files_named(paths: Sequence[str], lines: Sequence[str]) -> Named:
    """Find the files that lines name."""
    names = _Names(paths)
    named: dict[int, int] = {}
    missing, doubtful, example = [], [], ""
    for index, line in enumerate(lines):
        files = names.meant_by(line)
        if len(files) == 1:
            named[index] = files[0]
        elif files:
            both = " and ".join(paths[i] for i in files[:2])
            doubtful.append(f"{line.strip()!r} fits {both}" + ", and more" * (len(files) > 2))
            example = os.path.join(".", paths[files[0]])
        elif not line.lstrip().startswith("#"):
            missing.append(line.strip())
    shown = [line + names.nearly(line) for line in sorted(missing)[:MOST_SHOWN]]
    told = (
        f"{len(doubtful)} lines fit several files: {', '.join(doubtful[:MOST_SHOWN])}; put folders "
        f"before such a name, as in {example}"
    )
    return Named(named, len(missing), ", ".join(shown), told if doubtful else "")


def lines_of(file_list: str | os.PathLike[str]) -> list[str]:
    """The lines of a list that are not blank."""
    # Not splitlines: it splits at characters that a name may hold.
    return [line for line in re.split(r"[\r\n]+", text_of(file_list)) if line.strip()]


def text_of(file_list: str | os.PathLike[str]) -> str:
    """The text of a list; raises OSError, and ValueError for a binary file.

    UTF-8, or UTF-16 with a byte order mark, as PowerShell's `>` writes. A name need not be text.
    """
    content = Path(file_list).read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = content.decode("utf-16", errors="replace")
    else:
        text = os.fsdecode(content.removeprefix(codecs.BOM_UTF8))
    if "\0" in text:
        raise ValueError(f"{file_list}: expected names of files, one a line, found a binary file")
    return text


class _Names:
    """Files by the names that a line may use for them.

    Names are compared in the composed form of Unicode (NFC): a list and a disk may use different
    forms that look alike. Where two files differ only in that, an exact path selects its own.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self.by_path: dict[str, list[int]] = {}
        self.by_end: dict[str, set[int]] = {}  # the last part, and the last two
        self.ways = list(zip(paths, real_paths(paths), strict=True))
        for i, (path, real) in enumerate(self.ways):
            for spelling in {path, real, composed(real)}:
                self.by_path.setdefault(spelling, []).append(i)
            for way in {path, real}:
                folder, _, name = composed(way).rpartition("/")
                for end in (name, f"{folder.rpartition('/')[2]}/{name}"):
                    self.by_end.setdefault(end, set()).add(i)

    def meant_by(self, line: str) -> list[int]:
        """Numbers of the files that fit a line: as written, stripped, or with \\ as separator."""
        for text in (line, line.strip()):
            for spelling in (text, text.replace("\\", "/")):
                if files := self._called(spelling):
                    return files
        return []

    def _called(self, spelling: str) -> list[int]:
        end = composed(spelling)
        if "/" not in spelling and end in self.by_end:
            return sorted(self.by_end[end])
        real = os.path.realpath(spelling)
        for path in (spelling, real, composed(real)):
            if path in self.by_path:
                return self.by_path[path]
        if spelling.startswith(("/", "./", "../")) or os.path.lexists(spelling):
            return []  # the path of another file
        alike = self.by_end.get("/".join(end.split("/")[-2:]), ())
        return sorted(
            i for i in alike if any(composed(f"/{w}").endswith(f"/{end}") for w in self.ways[i])
        )

    def nearly(self, line: str) -> str:
        """` (there is ...)` where only upper and lower case differ."""
        name = os.path.basename(line.replace("\\", "/"))
        for path, _ in self.ways:
            if (found := os.path.basename(path)) != name and found.casefold() == name.casefold():
                return f" (there is {path})"
        return ""


def composed(name: str) -> str:
    """A name in the composed form of Unicode (NFC)."""
    return unicodedata.normalize("NFC", name)
