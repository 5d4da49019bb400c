"""Labels of a corpus' files: what a model learns to tell apart, and can be asked for.

    labels = read_labels("folders", roots, corpus.paths)     # or the path of a CSV file
    labels.names                                             # ("jazz", "rock")
    labels.of_file                                           # [files, n], numbers of names

Names are kept in the composed form of Unicode (NFC), in which disks and keyboards may differ.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cli.file_list import MOST_SHOWN, composed, files_named, text_of

FOLDERS = "folders"  # the value of --labels that names no file
HEADS = ("path", "file")  # first cell of a CSV file's heading
LONGEST = 200  # characters of a label
MOST_LINES = 50  # of the labels that are printed
NONE = -1  # where a file has fewer labels than another


@dataclass
class Labels:
    """The labels of a corpus: `of_file` [files, n] int64 are numbers of `names`, or NONE."""

    names: tuple[str, ...]  # sorted
    of_file: np.ndarray[Any, Any]
    warnings: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        """Tells these labels of these files from others."""
        return hashlib.sha256(repr(self.names).encode() + self.of_file.tobytes()).hexdigest()[:16]

    def sums(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Sum values [files] over the files of each label: [labels]."""
        file, place = np.nonzero(self.of_file != NONE)
        return np.bincount(self.of_file[file, place], values[file], len(self.names))

    def lines(self, train: np.ndarray[Any, Any], val: np.ndarray[Any, Any]) -> list[str]:
        """For the console: each label with its files and hours, from both sides' hours [files]."""
        count, hours, held_out = map(self.sums, (np.ones(len(train)), train, val))
        lines = [
            f"label    {self.names[i]}: {count[i]:.0f} files, {hours[i]:.2f} hours to train, "
            f"{held_out[i]:.2f} to validate"
            for i in np.argsort(-hours, kind="stable")
        ]
        rest = len(lines) - MOST_LINES
        return lines[:MOST_LINES] + [f"label    and {rest} with less to train"] * (rest > 0)

    def untrained(self, train: np.ndarray[Any, Any]) -> list[str]:
        """A line that names the labels without training hours, if there are some."""
        lost = [name for name, hours in zip(self.names, self.sums(train), strict=True) if not hours]
        return [f"no music to train on has {_some(lost)}: nothing is learned of it"] * bool(lost)


def read_labels(
    source: str | os.PathLike[str], roots: Mapping[str, str], used: Sequence[str]
) -> Labels:
    """The labels of the files `used`: each one's folder, or what a CSV file says of it.

    `roots` has the searched folder of every file that was found. With FOLDERS a file's label is the
    first folder below that, or the searched folder itself where all of its files lie in it. Else a
    row of the CSV file is a path, as in `listed_files`, and any number of labels.

    Raises:
        OSError: the CSV file cannot be read.
        ValueError: it is no CSV file, fits no file, or one several, or a file has two rows; a label
            that cannot be printed, or that differs from another in case or Unicode form alone.
    """
    warnings: list[str] = []
    given = _folders(roots) if source == FOLDERS else _rows(source, list(roots), warnings)
    found = [given.get(path, ()) for path in used]
    names = _checked(zip(used, found, strict=True))
    numbers = {name: number for number, name in enumerate(names)}
    of_file = np.full((len(used), max(map(len, found), default=0)), NONE, np.int64)
    for row, labels in zip(of_file, found, strict=True):
        own = sorted({numbers[composed(label)] for label in labels})
        row[: len(own)] = own
    bare = [path for path, labels in zip(used, found, strict=True) if not labels]
    if not names:
        raise ValueError(f"{source}: expected labels, found none for all {len(used)} files")
    if bare:
        warnings.append(f"{len(bare)} files have no label and train without: {_some(bare)}")
    elif len(names) == 1:
        warnings.append(f"all files have the one label {names[0]!r}: it tells nothing apart")
    return Labels(names, of_file, warnings)


def _folders(roots: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The label of each file by its folder."""

    @functools.cache
    def below(folder: str, root: str) -> str:
        relative = os.path.relpath(folder or ".", root or ".")
        return "" if relative == "." else relative.split("/")[0]

    first = {path: below(os.path.dirname(path), root) for path, root in roots.items()}
    parted = {roots[path] for path, folder in first.items() if folder}
    own = {root: os.path.basename(os.path.abspath(root)) for root in set(roots.values()) - parted}
    named = {path: folder or own.get(roots[path], "") for path, folder in first.items()}
    return {path: (folder,) for path, folder in named.items() if folder}


def _rows(
    source: str | os.PathLike[str], paths: Sequence[str], warnings: list[str]
) -> dict[str, tuple[str, ...]]:
    """The labels of each file that has a row in a CSV file."""
    rows: list[list[str]] = []
    lines: list[int] = []
    reader = csv.reader(io.StringIO(text_of(source), newline=""), strict=True)
    try:
        for row in reader:
            if row and row[0].strip():
                rows.append(row)
                lines.append(reader.line_num)
            elif any(cell.strip() for cell in row):
                raise ValueError(f"{source}: line {reader.line_num}: expected a path, found none")
    except csv.Error as error:
        raise ValueError(f"{source}: line {reader.line_num}: no CSV ({error})") from error
    if rows and rows[0][0].strip().casefold() in HEADS:
        del rows[0], lines[0]
    named = files_named(paths, [row[0] for row in rows])
    if named.doubtful:
        raise ValueError(f"{source}: {named.doubtful}")
    if not named.files:
        raise ValueError(
            f"{source}: expected rows of an .npq file and its labels, commas between, found none "
            f"that names a file of the data: {named.examples or 'it is empty'}"
        )
    if named.missing:
        told = f"{named.missing} rows name no file of the data: {named.examples}"
        warnings.append(f"{source}: {told}")
    row_of: dict[int, int] = {}
    for index, file in named.files.items():
        if (first := row_of.setdefault(file, index)) != index:
            raise ValueError(
                f"{source}: lines {lines[first]} and {lines[index]} are of one file, "
                f"{paths[file]}; put all of its labels into one row"
            )
    cells = {paths[file]: map(str.strip, rows[index][1:]) for file, index in row_of.items()}
    return {path: tuple(filter(None, labels)) for path, labels in cells.items()}


def _checked(files: Iterable[tuple[str, Sequence[str]]]) -> tuple[str, ...]:
    """The labels of files, composed and sorted; raises ValueError for those that cannot be used."""
    met: dict[str, tuple[str, str]] = {}  # by what is left without case: spelling, a file
    for path, labels in files:
        for label in labels:
            if not label.isprintable() or len(label) > LONGEST:
                raise ValueError(
                    f"{path}: expected a label of at most {LONGEST} printable characters, found "
                    f"{label[:LONGEST]!r}; rename it"
                )
            spelling, other = met.setdefault(composed(label).casefold(), (label, path))
            if spelling != label:
                raise ValueError(
                    f"labels {spelling!a} ({other}) and {label!a} ({path}) differ only "
                    "in case or Unicode form; spell them alike"
                )
    return tuple(sorted(composed(spelling) for spelling, _ in met.values()))


def labels_in(text: str, known: Sequence[str]) -> list[str]:
    """The labels of a flag's value: one that is known, or names with commas between, as in CSV."""
    text = composed(text)
    cells = [text] if text in known else next(csv.reader([text], skipinitialspace=True), [])
    return [cell.strip() for cell in cells]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:MOST_SHOWN]) + ", ..." * (len(names) > MOST_SHOWN)
