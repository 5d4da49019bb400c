"""The data of a run: the train / validation split of a corpus, its windows, their order.

    corpus = scan_corpus(find_npq_files(["npq_out"]), ctx=512)
    train, val = split_corpus(corpus, ctx=512, val_split=0.05)
    windows = WindowDataset(corpus, train, ctx=512, stride=256, jitter_seed=0)
    batch = windows[np.array([0, 7, 9])]              # [3, 512, K] int16

sound/corpus.py finds and checks the files. Windows are read from them with preadv, not through a
memory map. Where every window is in another file, that is 2.5 times as fast, because a map costs
page faults and an unmap; resident memory stays flat; and a file that is cut during the run gives a
short read, which is an error with a name, where a map would end the process by SIGBUS. Maps of a
few long files are read 1.9 times as fast, at rates that no training needs (benchmarks/journal.md).

B = batch, K = codebooks.
"""

from __future__ import annotations

import copy
import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from cli.file_list import listed_files
from sound.copying import Track
from sound.corpus import (
    BadFilesError,
    Corpus,
    find_npq_files,
    roots_of_npq_files,
    scan_corpus,
)
from sound.npq_format import CODE_DTYPES, file_changed, open_unchanged, read_header

# fmt: off
__all__ = [
    "BadFilesError", "Corpus", "EpochOrder", "Spans", "WindowDataset", "find_npq_files",
    "roots_of_npq_files", "scan_corpus", "split_corpus",
]
# fmt: on

# --- the split -----------------------------------------------------------------------------------

MIN_VAL_FILES = 5  # fewer whole files than this would make `val` a matter of single tracks


@dataclass
class Spans:
    """Frames [start, stop) of each file that one side of the split may use: int64 [files]."""

    start: np.ndarray[Any, Any]
    stop: np.ndarray[Any, Any]
    rule: str  # how the split was made, for the console

    def fingerprint(self) -> str:
        """Tells one side of a split from another."""
        return hashlib.sha256(self.start.tobytes() + self.stop.tobytes()).hexdigest()[:16]


def split_corpus(
    corpus: Corpus, *, ctx: int, val_split: float, val_list: str | os.PathLike[str] | None = None
) -> tuple[Spans, Spans]:
    """Train and validation spans; no frame is in both.

    A file's side follows from a hash of its own codes alone, so the split is the same on every
    machine, under every name, and a file keeps its side when others are added. With too few files
    for that (fewer than MIN_VAL_FILES would validate) each file gives one block at its end.
    `val_list` names the validation files, one path or base name a line, and overrides both; files
    of the same codes as a listed one validate too.

    Raises:
        OSError, ValueError: `val_list` cannot be read, is no list of names, names no file, or has a
        line that fits no file of the data, or several.
    """
    frames = corpus.files["frames"]
    nothing = np.zeros_like(frames)
    if val_list is not None:
        is_val, rule = _listed(corpus, val_list)
    else:
        is_val = _shares_of(corpus.files) < val_split
        rule = "whole files, chosen by a hash of their codes"
        share = frames[is_val].sum() / frames.sum()
        if is_val.sum() < MIN_VAL_FILES or share > 3 * val_split:
            tail = _tails(corpus.files, ctx, val_split)
            rule = "the last frames of each file (too few files to set whole ones aside)"
            return Spans(nothing, frames - tail, rule), Spans(frames - tail, frames, rule)
    train, val = np.where(is_val, 0, frames), np.where(is_val, frames, 0)
    return Spans(nothing, train, rule), Spans(nothing, val, rule)


def _listed(corpus: Corpus, val_list: str | os.PathLike[str]) -> tuple[np.ndarray[Any, Any], str]:
    """Which files a list names or hold the same codes as one of these, bool [files]; the rule."""
    listed = listed_files(corpus.paths, val_list)
    if not listed:
        raise ValueError(
            f"{val_list}: expected names of files, one a line, found none; for a run without "
            "validation leave the list out and pass --val_split 0"
        )
    content = np.stack([corpus.files["crc"], corpus.files["frames"]])
    is_other = (np.diff(content) != 0).any(axis=0)  # equal ones stand side by side
    group = np.concatenate(([0], np.cumsum(is_other)))
    is_val = np.isin(group, group[listed])
    copies = np.count_nonzero(is_val) - len(listed)
    also = f", and {copies} with the same codes as one of these" if copies else ""
    return is_val, f"files listed in {val_list}{also}"


def _shares_of(files: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A number in [0, 1) for each file that depends on its codes alone."""
    hashes = (
        hashlib.sha256(f"{crc} {frames}".encode()).digest()[:8]
        for crc, frames in files[["crc", "frames"]].tolist()
    )
    return np.fromiter((int.from_bytes(h, "big") / 2**64 for h in hashes), float, len(files))


def _tails(files: np.ndarray[Any, Any], ctx: int, val_split: float) -> np.ndarray[Any, Any]:
    """Frames each file gives to validation: its share, but a window, until all is given."""
    frames = files["frames"]
    tails = np.zeros_like(frames)
    wanted, given, last = val_split * frames.sum(), 0, -1.0
    shares = _shares_of(files)
    for i in np.argsort(shares, kind="stable"):
        tail = max(ctx, int(frames[i] * val_split))
        # Files of equal content stand side by side here, and all of them give or none.
        if (given < wanted or shares[i] == last) and frames[i] - tail >= ctx:
            tails[i], given, last = tail, given + tail, shares[i]
    return tails


# --- windows -------------------------------------------------------------------------------------

GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 spread evenly, however many there are


class WindowDataset(Dataset[torch.Tensor]):
    """Windows of `ctx` frames every `stride` frames, each read from its place on disk.

    Indexed by an array of window numbers, it returns a whole batch: [B, ctx, K], int16 (int32 where
    a vocabulary exceeds 2^15), so that codes travel narrow and are widened on the device. The index
    is a few numbers per file and a binary search. A file is open only while a window is read, which
    costs some microseconds and checks each time that it is unchanged. Threads may share it.

    Numbers count on from epoch to epoch: epoch * len + window. With a `jitter_seed` each file's
    windows move together, to other frames in each epoch, as (seed, epoch, file) alone say. A window
    never leaves its span, and stays within one and a half strides of its place without jitter.
    Where a corpus has several encodings of its music, neighbouring windows read different ones, and
    a window another one in each epoch. Without either every epoch is the same.
    """

    def __init__(
        self,
        corpus: Corpus,
        spans: Spans,
        *,
        ctx: int,
        stride: int,
        jitter_seed: int | None = None,
    ) -> None:
        self.tables, self.spans = corpus.tables, spans
        self.num_codebooks = corpus.num_codebooks
        self.labels: torch.Tensor | None = None  # [files, n] int64, see `Labels`
        if corpus.labels is not None:
            self.labels = torch.from_numpy(corpus.labels.of_file)
        self.dtype = np.dtype(np.int16 if max(corpus.vocab_sizes) <= 2**15 else np.int32)
        self.reading: dict[int, str] = {}  # thread -> the file that it reads
        self.reads = 0  # that have ended
        self.phase = None if jitter_seed is None else _phases(jitter_seed, len(spans.start))
        self._cut(ctx, stride)

    def _cut(self, ctx: int, stride: int) -> None:
        self.ctx, self.stride = ctx, stride
        self.last_start = self.spans.stop - self.spans.start - ctx  # < 0: no window fits
        counts = np.where(self.last_start >= 0, self.last_start // stride + 1, 0)
        self.last_window = np.cumsum(counts)  # exclusive, per file
        self.first_window = self.last_window - counts
        self.outside = min(stride, ctx) // 2  # frames; of both see _jittered
        self.part = (self.last_start + (2 * self.outside + 1)) / np.maximum(counts, 1)

    def excerpts(self, frames: int, most: int = 64) -> np.ndarray[Any, Any]:
        """At most `most` excerpts [N, frames, K] int64, evenly spread over what the windows cover.

        Shorter ones where the files hold none of that length, down to 16 frames; then none.
        """
        other = copy.copy(self)
        other._cut(frames, frames)
        if not len(other) and frames >= 32:
            return self.excerpts(frames // 2, most)
        numbers = np.linspace(0, len(other) - 1, min(len(other), most)).astype(np.int64)
        return other[numbers].numpy().astype(np.int64)

    def __len__(self) -> int:
        return int(self.last_window[-1])

    @property
    def frames(self) -> int:
        """Frames of music in the spans that the windows are cut from."""
        return int((self.spans.stop - self.spans.start).sum())

    def locate(
        self, numbers: np.ndarray[Any, Any]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """File numbers and first frames of window numbers, both [B]."""
        epoch, window = np.divmod(numbers, len(self))
        file = np.searchsorted(self.last_window, window, side="right")
        rank = window - self.first_window[file]
        if self.phase is None:
            return file, self.spans.start[file] + rank * self.stride
        share = (self.phase[file] + epoch * GOLDEN) % 1.0
        return file, self.spans.start[file] + self._jittered(file, rank, share)

    def _jittered(
        self,
        file: np.ndarray[Any, Any],
        rank: np.ndarray[Any, Any],
        share: np.ndarray[Any, Any],
    ) -> np.ndarray[Any, Any]:
        """First frames [B], counted from the span's, of the rank-th windows of files.

        A file's possible starts are cut into as many equal parts as it has windows, and each window
        starts at the same share of its part, so that a file's windows stay a grid and cover it
        evenly. From epoch to epoch the share goes on by the golden ratio, modulo 1 (Weyl 1916): the
        starts of the first n epochs lie about 1 / n of a part apart, for every n. The first and the
        last part reach half a stride beyond the span, and a start there becomes its end: else a
        file's first and last frames would hardly ever be seen.
        """
        start = ((rank + share) * self.part[file]).astype(np.int64) - self.outside
        return np.minimum(np.maximum(start, 0), self.last_start[file])

    def tracks(self) -> Iterator[Track]:
        """The spans of the files that the windows are cut from, to be read as a whole."""
        for number in np.flatnonzero(self.spans.stop > self.spans.start).tolist():
            for path, row in {t.paths[number]: t.files[number] for t in self.tables}.items():
                *_, size, mtime_ns, _ = row.item()
                header = replace(read_header(path), file_size=size, mtime_ns=mtime_ns)
                yield Track(header, int(self.spans.start[number]), int(self.spans.stop[number]))

    def describe(self, windows: np.ndarray[Any, Any], epoch: int = 0) -> list[dict[str, Any]]:
        """Where windows of an epoch lie, for logs: file and first frame."""
        numbers = epoch * len(self) + windows
        places = zip(self._turns(numbers).tolist(), *self.locate(numbers), strict=True)
        return [{"file": self.tables[t].paths[f], "frame": int(s)} for t, f, s in places]

    def _turns(self, numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Which table each window number [B] is read from.

        As many windows as overlap on a frame take as many encodings, and the next epoch goes on
        behind them, so that a frame is seen in all encodings before it is seen in one again.
        """
        epoch, window = np.divmod(numbers, len(self))
        overlap = max(1, round(self.ctx / self.stride))
        return (window + overlap * epoch) % len(self.tables)

    def __getitem__(self, numbers: np.ndarray[Any, Any]) -> torch.Tensor:
        batch = np.empty((len(numbers), self.ctx, self.num_codebooks), self.dtype)
        files, starts = self.locate(numbers)
        columns = self._turns(numbers).tolist(), files.tolist(), starts.tolist()
        for row, turn, file, start in zip(batch, *columns, strict=True):
            _, _, codebooks, dtype_code, *_ = self.tables[turn].files[file].item()
            dtype = CODE_DTYPES[dtype_code]
            if codebooks == self.num_codebooks and dtype.itemsize == self.dtype.itemsize:
                self._read_into(row.data, turn, file, start)  # as it lies on disk
            else:
                codes = np.empty((self.ctx, codebooks), dtype)
                self._read_into(codes.data, turn, file, start)
                row[:] = codes[:, : self.num_codebooks]
        return torch.from_numpy(batch)

    def labels_of(self, numbers: np.ndarray[Any, Any]) -> torch.Tensor | None:
        """The labels [B, n] int64 of windows, padded with -1; None without --labels."""
        return None if self.labels is None else self.labels[self.locate(numbers)[0]]

    def _read_into(self, buffer: memoryview, turn: int, file: int, start: int) -> None:
        """Fill the buffer [ctx, codebooks] with a file's frames from `start` on, of a table.

        Raises:
            OSError: names the file.
            NpqError: the file is no longer what it was when it was scanned.
        """
        (paths, files), thread = self.tables[turn], threading.get_ident()
        path, (offset, *_, size, mtime_ns, _) = paths[file], files[file].item()
        position = offset + start * buffer.nbytes // self.ctx
        self.reading[thread] = path
        try:
            descriptor = open_unchanged(path, size, mtime_ns)
            try:
                found = os.preadv(descriptor, [buffer], position)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from error
        finally:
            del self.reading[thread]
        self.reads += 1
        if found != buffer.nbytes:
            raise file_changed(path, f"{size} bytes", f"an end at byte {position + found}")

    def sign(self) -> tuple[int, str]:
        """Number of reads that have ended, and a file that is being read, for `wait_for`."""
        return self.reads, next(iter(list(self.reading.values())), "the data")


def _phases(seed: int, files: int) -> np.ndarray[Any, Any]:
    """Where in [0, 1) each file's jitter begins; a stream apart from those of the order."""
    bits = np.random.MT19937(np.random.SeedSequence(seed, spawn_key=(0,)))
    return np.random.RandomState(bits).random_sample(files)


class EpochOrder(Sampler[Any]):
    """Batches of window numbers in an order that depends on (seed, epoch, changes) alone.

    The numbers that it gives out are epoch * num_windows + window, so that the epoch reaches loader
    processes with each batch; everywhere else a window has the same number in all epochs.

    Only whole groups of batch * accum windows are given out: optimizer steps are never partial.
    `start` skips windows of the present epoch that a resumed run has used. Each rollback of a run
    adds a change, {"epoch", "position", "suspects", "excluded_windows"}: from that position on the
    order is another one, without the suspects in that epoch and without the excluded windows in it
    and all later ones.
    """

    def __init__(self, num_windows: int, *, batch: int, accum: int, seed: int) -> None:
        self.num_windows, self.batch, self.seed = num_windows, batch, seed
        self.group = batch * accum
        self.epoch = self.start = 0
        self.changes: list[dict[str, Any]] = []

    def permutation(self, epoch: int) -> np.ndarray[Any, Any]:
        """The window numbers of an epoch, shuffled.

        RandomState's streams are frozen for good, Generator's are not (NEP 19).
        """
        order = self._shuffled(np.arange(self.num_windows), epoch)
        for number, change in enumerate(self.changes, start=1):
            if change["epoch"] > epoch:
                continue
            is_here = change["epoch"] == epoch
            used, rest = np.split(order, [change["position"] if is_here else 0])
            left_out = change["excluded_windows"] + (change["suspects"] if is_here else [])
            rest = rest[~np.isin(rest, left_out)]
            order = np.concatenate((used, self._shuffled(rest, epoch, number)))
        return order

    def _shuffled(self, windows: np.ndarray[Any, Any], *key: int) -> np.ndarray[Any, Any]:
        bits = np.random.MT19937(np.random.SeedSequence([self.seed, *key]))
        np.random.RandomState(bits).shuffle(windows)  # in place: millions of numbers
        return windows

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        order = self.permutation(self.epoch)[self.start :]
        order += self.epoch * self.num_windows
        for first in range(0, len(order) // self.group * self.group, self.batch):
            yield order[first : first + self.batch]

    def end(self) -> int:
        """How many windows the present epoch has."""
        return len(self.permutation(self.epoch)) if self.changes else self.num_windows

    def __len__(self) -> int:
        return (self.end() - self.start) // self.group * (self.group // self.batch)
