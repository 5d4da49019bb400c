"""The files that a command's arguments name: folders, globs and files, by one set of rules.

    found = search(["music", "more/*"], Wanted({".wav", ".flac"}, unreadable={".m4a"}))
    for file in found.files: file.path, file.root
    print(*found.lines(), sep="\\n")             # passed over: 3 .jpg, 1 .txt

A folder is searched recursively, a suffix also counts in upper case, and each file counts once,
whatever paths lead to it. Links are followed, but not to a folder above the link. Names with a
leading dot are left out, as by a shell. What cannot be read is noted and ends nothing.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import itertools
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

MOST_KINDS = 8  # in the line that counts what was passed over
MOST_BRACKETS = 4  # parts of a glob whose brackets are tried as letters, for a hint
NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
NO_RIGHT = "get the right to read it, or take it out"


class NothingFoundError(FileNotFoundError):
    """An argument leads to no usable file; the message contains the argument and the reason."""


@dataclass(frozen=True)
class Wanted:
    """Which files a search is for."""

    suffixes: Collection[str]  # lower case, with the dot
    unreadable: Collection[str] = ()  # suffixes of the same kind of content in unreadable formats
    recognises: Callable[[str], bool] = lambda _: True  # accepts a named file of another suffix
    is_left_out: Callable[[str], bool] = lambda _: False  # rejects by name, though the suffix fits
    folder_is_left_out: Callable[[str, Iterable[str]], bool] = lambda *_: False  # path, names in it


class FoundFile(NamedTuple):
    """A file to use, and the searched folder, where a mirrored tree begins."""

    path: str
    root: str


def search(words: Iterable[str | os.PathLike[str]], wanted: Wanted) -> Found:
    """Search the files, folders and globs that the words name.

    Raises:
        NothingFoundError: a word leads to nothing, or all together to no usable file.
    """
    found, names = Found(wanted), [os.fspath(word) for word in words]
    for name in names:
        found.add(name)
    if not found.used and not found.refused:
        reasons = [f"no {' '.join(wanted.suffixes)} in it", *found.lines()]
        raise NothingFoundError(f"{', '.join(map(repr, names))}: {'; '.join(reasons)}")
    return found


def expand(pattern: str) -> list[str]:
    """The paths that fit a glob, sorted, of files and folders alike.

    Raises:
        NothingFoundError: there is none, or a folder on the way cannot be read.
    """
    found = Found(Wanted(()))
    _, paths = found._expand(pattern)
    if found.refused:
        raise NothingFoundError(": ".join(found.unusable[0]))
    if not paths:
        raise NothingFoundError(f"{pattern!r}: {found._no_such(pattern)}")
    return paths


class Found:
    """What a search found: files to use, files that cannot be used, and what it passed over."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        # By place: a path whose folders, though not itself, are free of links.
        self.used: dict[str, FoundFile] = {}
        self.refused: dict[str, tuple[str, str]] = {}  # path, why
        self.passed_over: dict[str, str] = {}  # kind
        self.left_out: dict[str, str] = {}  # the folder to name; a folder's own place, or a file's
        self.matches: list[tuple[bool, str, str]] = []  # of a word: is a link, path, place
        self.met = 0  # files of any kind

    @property
    def files(self) -> list[FoundFile]:
        """The files to use: in the order of the words, sorted within each."""
        return list(self.used.values())

    @property
    def unusable(self) -> list[tuple[str, str]]:
        """Path and reason of what would be of use, and cannot be read."""
        return sorted(self.refused.values())

    def lines(self) -> list[str]:
        """For the console: what was passed over, counted by kind, and what was left out."""
        lines = []
        found = Counter(self.passed_over.values()).items()
        if kinds := sorted(found, key=lambda kind: (-kind[1], kind[0])):
            counts = [f"{count} {kind}" for kind, count in kinds[:MOST_KINDS]]
            if rest := kinds[MOST_KINDS:]:
                counts.append(f"{sum(n for _, n in rest)} of {len(rest)} other kinds")
            lines.append(f"passed over: {', '.join(counts)}")
        if self.left_out:
            places = Counter(self.left_out.values())
            where = [f"{p} ({n} files)" if n > 1 else p for p, n in sorted(places.items())]
            lines.append(f"left out, as files of runs are no data: {', '.join(where)}")
        return lines

    # --- words -----------------------------------------------------------------------------------

    def add(self, word: str) -> None:
        """Search the file, folder or glob of one more word.

        Raises:
            NothingFoundError: it does not exist or is empty: perhaps a disk is not mounted.
        """
        before, self.matches = self.met, []
        path = os.path.expanduser(word)
        root, paths, is_named = os.path.dirname(path), [path], True
        if not os.path.lexists(path):
            root, paths, is_named = *self._expand(path), False
        for each in paths:
            if os.path.isdir(each):
                root = each if is_named else root
                self._take_folder(each)
            if not (is_named and os.path.isdir(each)):
                self._take(each, _place(each), is_named=is_named)
        for _, each, place in sorted(self.matches):
            self.used.setdefault(place, FoundFile(each, root))
        if self.met == before:
            why = "there is nothing in it" if paths else self._no_such(path)
            raise NothingFoundError(f"{word!r}: {why}")

    def _no_such(self, pattern: str) -> str:
        """Why nothing fits; where brackets belong to the name of a file, how to write them."""
        parts = pattern.split("/")
        marked = [i for i, part in enumerate(parts) if "[" in part][:MOST_BRACKETS]
        for count in range(len(marked), 0, -1):
            for chosen in itertools.combinations(marked, count):
                escaped = [p.replace("[", "[[]") if i in chosen else p for i, p in enumerate(parts)]
                if Found(self.wanted)._expand("/".join(escaped))[1]:
                    meant = "/".join(escaped)
                    return f"nothing fits; where [ is a letter of a name, write [[]: {meant!r}"
        return "there is no such file or folder"

    # --- globs -----------------------------------------------------------------------------------

    def _expand(self, pattern: str) -> tuple[str, list[str]]:
        """The folder before the first part with a wildcard, and the paths that fit, sorted.

        Like `glob.glob`, which silently skips folders that it may not read, and does not end where
        links form two circles.
        """
        parts = [part for part in pattern.split("/") if part]
        first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        root = os.path.join("/" if pattern.startswith("/") else "", *parts[:first])
        status = self._status(root or ".")
        if status is None or (parts[first:] and not stat.S_ISDIR(status.st_mode)):
            return root, []
        paths = sorted(set(self._fitting(root, parts[first:])))
        return root, [p for p in paths if os.path.isdir(p)] if pattern.endswith("/") else paths

    def _fitting(self, folder: str, parts: list[str]) -> Iterator[str]:
        """Paths below a folder that fit the parts of a glob."""
        if not parts:
            yield folder or "."
        elif parts[:2] == ["**", "**"]:
            yield from self._fitting(folder, parts[1:])
        elif parts[0] == "**":
            for below, *_ in self._walk(folder or ".") if parts[1:] else [(folder,)]:
                yield from self._fitting(below if folder else below[2:], parts[1:])
        else:
            for name in self._names_like(folder, parts[0]):
                path = os.path.join(folder, name)
                is_folder = self._is_folder(path)
                if is_folder and name != parts[0] and self._leave_out(path):
                    continue
                if is_folder or (not parts[1:] and os.path.lexists(path)):
                    yield from self._fitting(path, parts[1:])

    def _names_like(self, folder: str, part: str) -> list[str]:
        """Names in a folder that fit a part of a glob; without wildcards the part itself."""
        if not glob.has_magic(part):
            return [part]
        fits = re.compile(fnmatch.translate(part)).match
        names = [entry.name for entry in self._entries(folder or ".")]
        return [name for name in names if fits(name) and (name[0] != "." or part[0] == ".")]

    # --- folders ---------------------------------------------------------------------------------

    def _walk(self, top: str) -> Iterator[tuple[str, str, list[os.DirEntry[str]]]]:
        """A folder and all below it, each once: its path, its place, its entries.

        The targets of links come last, so that a folder that is also below `top` itself gets its
        path there.
        """
        seen: set[tuple[int, int]] = set()
        folders, links = [(top, os.path.realpath(top))], deque[str]()
        while folders or links:
            if folders:
                folder, place = folders.pop()
            else:
                folder = links.popleft()
                place = os.path.realpath(folder)
            status = self._status(folder)
            if status is None or (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = [entry for entry in self._entries(folder) if entry.name[0] != "."]
            if folder != top and self._leave_out(folder, [entry.name for entry in entries]):
                continue
            yield folder, place, entries
            below = [e for e in entries if not _is_regular(e) and self._is_folder(e.path)]
            links += [e.path for e in below if e.is_symlink() and not _leads_up(e.path)]
            real = [e for e in reversed(below) if not e.is_symlink()]  # the last is taken first
            folders += [(e.path, os.path.join(place, e.name)) for e in real]

    def _is_folder(self, path: str) -> bool:
        status = self._status(path)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._refuse(folder, f"{error.strerror}; {NO_RIGHT}")
            return []

    def _leave_out(self, folder: str, names: Iterable[str] | None = None) -> bool:
        """Whether a folder that no word names is left out; notes it."""
        if names is None:
            names = [entry.name for entry in self._entries(folder)]
        if is_left_out := self.wanted.folder_is_left_out(folder, names):
            self.met += 1
            self.left_out.setdefault(_place(folder), folder)
        return is_left_out

    def _take_folder(self, top: str) -> None:
        """Note everything in a folder."""
        self.left_out.pop(_place(top), None)  # where an earlier word left it out
        for _, place, entries in self._walk(top):
            for entry in entries:
                if _is_regular(entry):
                    self._take_file(entry.path, os.path.join(place, entry.name))
                else:
                    self._take(entry.path, os.path.join(place, entry.name))

    # --- files -----------------------------------------------------------------------------------

    def _take(self, path: str, place: str, *, is_named: bool = False) -> None:
        """Note a path of any kind, named by a word or met in a folder."""
        status = self._status(path)
        if place in self.refused:
            return
        if status is not None and stat.S_ISREG(status.st_mode):
            place, is_link = os.path.realpath(path), os.path.islink(path)
            self._take_file(path, place, is_named=is_named, is_link=is_link)
            return
        kind, wanted = _kind_of(path, status), self.wanted
        if is_named or _suffix(path) in (*wanted.suffixes, *wanted.unreadable):
            searched = " (what is in it was searched)" if kind == "folder" else ""
            self._refuse(path, f"expected a file, found a {kind}{searched}; rename or remove it")
        elif kind != "folder":
            self.met += 1
            self.passed_over[place] = kind

    def _take_file(
        self, path: str, place: str, *, is_named: bool = False, is_link: bool = False
    ) -> None:
        """Note a regular file."""
        self.met += 1
        suffix, wanted = _suffix(path), self.wanted
        if suffix in wanted.unreadable:
            self._refuse(path, f"{suffix} cannot be read; convert it to .flac, or remove it")
        elif suffix not in wanted.suffixes and not (is_named and wanted.recognises(path)):
            if place not in self.used:
                is_usual = re.fullmatch(r"\.[\w-]{1,9}", suffix)
                self.passed_over[place] = suffix if is_usual else "without a suffix"
        elif wanted.is_left_out(os.path.basename(path)):
            self.left_out[place] = os.path.dirname(path) or "."
        else:
            self.passed_over.pop(place, None)
            self.matches.append((is_link, path, place))

    def _status(self, path: str) -> os.stat_result | None:
        """Status of a path's target; None where there is none, or where it is refused."""
        try:
            return os.stat(path)
        except OSError as error:
            if error.errno not in NOTHING_THERE:
                self._refuse(path, f"{error.strerror}; {NO_RIGHT}")
            return None

    def _refuse(self, path: str, why: str) -> None:
        self.met += 1
        self.refused.setdefault(_place(path), (path, why))


def real_paths(paths: Iterable[str]) -> Iterator[str]:
    """os.path.realpath of each; once for each folder, which makes it five times as fast."""
    real_folders: dict[str, str] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in real_folders:
            real_folders[folder] = os.path.realpath(folder)
        is_link = os.path.islink(path)
        yield os.path.realpath(path) if is_link else os.path.join(real_folders[folder], name)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _place(path: str) -> str:
    """A path whose folders are free of links."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder or "."), name)


def _is_regular(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is a regular file; most file systems need no call for that."""
    try:
        return entry.is_file(follow_symlinks=False)
    except OSError:
        return False


def _leads_up(link: str) -> bool:
    """Whether a link leads to a folder that contains it: following it would never end."""
    target, place = os.path.realpath(link), os.path.realpath(os.path.dirname(link) or ".")
    return os.path.join(place, "").startswith(os.path.join(target, ""))


def _kind_of(path: str, status: os.stat_result | None) -> str:
    if status is None:
        return "broken link"
    if stat.S_ISDIR(status.st_mode):
        return "link to a folder above" if os.path.islink(path) and _leads_up(path) else "folder"
    if stat.S_ISFIFO(status.st_mode):
        return "pipe"
    return "socket" if stat.S_ISSOCK(status.st_mode) else "device"
