"""Whether drawn codes repeat training music: the longest run of frames that both have.

    (shared,) = longest_runs([codes], train_windows.tracks())      # a sample [T, K]
    shared.near.frames, shared.near.path, shared.near.start        # and shared.exact

Two frames are the same where their lower three codebooks are; the higher ones are noise that no
copy keeps. A run is exact, or near with at most one frame in eight different. What is held is no
music: a run has at least ten distinct shared frames (silence flickers between seven), and ends
where 128 frames (a second and a half of DAC) pass without a shared one that differs from the three
before it. So a held frame, silence and loops of two or three frames do not count.

Seed and extend, as BLAST does (Altschul et al. 1990): a seed is four frames running, the last
unlike the other three. Every exact run has one; a near run is found by those between two of its
differences. The samples' seeds are in a table, and the files are read past it once, in blocks, so
memory does not grow with them. They are not mapped: a map ends the process where a file is cut.

T = frames, K = codebooks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from sound.npq_format import NpqHeader, file_changed, open_unchanged

Array = np.ndarray[Any, Any]

BOOKS = 3  # lower codebooks that are compared
ONE_IN = 8  # frames of a near run, of which one may differ
DISTINCT, HELD, SEED = 10, 128, 4  # frames, see above
LEAST_COPY = (
    43  # frames, half a second: no run up to it is a copy, nor up to twice held-out music's
)
PIECE = 4096  # frames; a longer sample is searched in such pieces, each half over the next
BLOCK = 1 << 17  # frames read at once
BATCH = 1 << 19  # frames compared at once
TABLE_BITS = 22  # a table that the processor's cache holds
BREAK = 1 << 32  # a weight that no run outweighs


class Run(NamedTuple):
    """A run of frames that a sample shares with a file; 0 frames: there is none."""

    frames: int = 0
    at: int = 0  # its first frame in the sample
    path: str = ""
    start: int = 0  # its first frame in the file


class Shared(NamedTuple):
    """The longest runs of a sample: all frames equal, and at most one in ONE_IN different."""

    exact: Run
    near: Run


class Track(NamedTuple):
    """Frames [start, stop) of an .npq file."""

    header: NpqHeader
    start: int
    stop: int


def figures(shared: Shared, length: int, held_out: int, frame_rate: float) -> dict[str, Any]:
    """Fields of a `sample` row: frames, seconds, the file's name and where in it, in seconds.

    `length` is the sample's, and `held_out` the longest near run of held-out music, in frames; -1
    where that is not known.
    """
    frames = {"": shared.near.frames, "_exact": shared.exact.frames, "_music": held_out}
    known = {name: count for name, count in frames.items() if count >= 0}
    return {
        "frames": length,
        **{f"shared_frames{name}": count for name, count in known.items()},
        **{f"shared_seconds{name}": round(n / frame_rate, 3) for name, n in known.items()},
        "shared_file": os.path.basename(shared.near.path),
        "shared_from": round(shared.near.start / frame_rate, 3),
    }


def describe(figures: dict[str, Any]) -> str:
    """One console line of `figures`."""
    music = (
        f"{figures['shared_seconds_music']:.2f} s" if "shared_seconds_music" in figures else "n/a"
    )
    where = f", {figures['shared_file']} at {figures['shared_from']:.1f} s"
    return (
        f"shared with training music {figures['shared_seconds']:.2f} s (held-out music {music}), "
        f"exactly {figures['shared_seconds_exact']:.2f} s" + where * bool(figures["shared_file"])
    )


def copy_warning(figures: dict[str, Any]) -> str | None:
    """What to say of a sample that copies; None if it does not, or nobody knows what music does.

    A copy has a run of twice the frames of held-out music's, or of nearly all of the sample: three
    quarters of the way from there to its length, where music repeats itself so much.
    """
    held_out, length = figures.get("shared_frames_music"), figures["frames"]
    if held_out is None:
        return None
    limit = max(LEAST_COPY, min(2 * held_out, (held_out + 3 * length) // 4))
    if figures["shared_frames"] <= limit:
        return None
    return (
        f"repeats {figures['shared_seconds']:.1f} s ({figures['shared_frames']} frames) of "
        f"{figures['shared_file']} from {figures['shared_from']:.1f} s on, held-out music "
        f"{figures['shared_seconds_music']:.2f} s at most: the model knows it by heart; take an "
        "earlier checkpoint, or train on more music or with more dropout"
    )


def report_copies(
    samples: Sequence[dict[str, Any]],
    *,
    tell: Callable[[str], object],
    warn: Callable[[str], object],
) -> list[str]:
    """Say what each sample shares with training music, of its `figures`; returns the lines."""
    lines = []
    for number, found in enumerate(samples, start=1):
        name = f"sample {number}" if len(samples) > 1 else "the sample"
        lines.append(describe(found))
        tell(f"{name}: {lines[-1]}")
        if warning := copy_warning(found):
            warn(f"{name} {warning}")
            lines[-1] += f"; it {warning}"
    if any("shared_frames_music" not in found for found in samples):
        warn(
            "what held-out music shares with the training music is not known, as the training made "
            "no evaluation audio before it saved, or is of an older version: no copy is warned of"
        )
    return lines


def longest_runs(
    samples: Sequence[Array],
    tracks: Iterable[Track],
    *,
    on_frames: Callable[[int], object] = lambda _: None,
) -> list[Shared]:
    """Find the longest run that each sample [T, K] (integers) shares with any of the tracks.

    `on_frames` is called with the number of frames after each block read; what it raises ends the
    search. In samples of more than PIECE frames, runs of more than half of that may be cut to it.

    Raises:
        NpqError: a file is no longer the one whose header was read.
        OSError: a file cannot be read.
    """
    search = _Search(samples)
    for track in tracks if samples else ():
        for first, keys in _blocks(track, overlap=search.width):
            search.look_in(keys, track.header.path, first)
            on_frames(min(BLOCK, track.stop - first))
    return [Shared(*runs) for runs in zip(*search.best, strict=True)]


def _blocks(track: Track, *, overlap: int) -> Iterator[tuple[int, Array]]:
    """First frame and keys of each block of a track; the next block begins `overlap` before."""
    h = track.header
    row_bytes = h.dtype.itemsize * h.num_codebooks
    descriptor = open_unchanged(h.path, h.file_size, h.mtime_ns)
    try:
        for first in range(track.start, track.stop, BLOCK):
            size = row_bytes * min(BLOCK + overlap, track.stop - first)
            content = os.pread(descriptor, size, h.codes_offset + first * row_bytes)
            if len(content) < size:
                raise file_changed(h.path, f"{h.file_size} bytes", "a shorter file")
            yield first, _keys(np.frombuffer(content, h.dtype).reshape(-1, h.num_codebooks))
    finally:
        os.close(descriptor)


def _keys(codes: Array) -> Array:
    """The lower codebooks of each frame as one number: [T, K] -> int64 [T]."""
    keys: Array = codes[:, 0].astype(np.int64)
    for column in codes.T[1:BOOKS]:
        keys <<= 20  # no vocabulary is larger
        keys |= column.astype(np.int64)
    return keys


def _hashes(keys: Array) -> Array:
    """Hash of every SEED frames running: int64 [..., T] -> uint64 [..., T - SEED + 1]."""
    windows = sliding_window_view(np.ascontiguousarray(keys).view(np.uint64), SEED, axis=-1)
    total = np.zeros(windows.shape[:-1], np.uint64)
    for i in range(SEED):
        total += windows[..., i]
        total *= np.uint64(0x9E3779B97F4A7C15)  # odd, so that all bits reach the high ones
    return total


class _Search:
    """The samples in pieces [P, width], their seeds sorted by hash, and the longest runs so far."""

    def __init__(self, samples: Sequence[Array]) -> None:
        cuts = [
            (owner, at, _keys(codes[at : at + PIECE]))
            for owner, codes in enumerate(samples)
            for at in range(0, max(1, len(codes) - PIECE // 2), PIECE // 2)
        ]
        self.width = max((len(keys) for *_, keys in cuts), default=0)
        self.owner, self.at = (np.array([cut[i] for cut in cuts], np.int64) for i in (0, 1))
        self.best = [[Run()] * len(samples) for _ in Shared._fields]
        self.pieces = np.full((len(cuts), max(self.width, SEED)), -1, np.int64)  # -1 is no key
        for row, (*_, keys) in zip(self.pieces, cuts, strict=True):
            row[: len(keys)] = keys
        self.is_new = self.pieces >= 0
        for back in range(1, SEED):
            self.is_new[:, back:] &= self.pieces[:, back:] != self.pieces[:, :-back]
        piece, at = np.nonzero(self.is_new[:, SEED - 1 :])
        hashes = _hashes(self.pieces)[piece, at]
        order = np.argsort(hashes)
        self.hashes, self.seed_piece, self.seed_at = hashes[order], piece[order], at[order]
        self.table = np.zeros(1 << TABLE_BITS, bool)  # whether a seed's hash has these high bits
        self.table[_place(hashes)] = True

    def look_in(self, keys: Array, path: str, first: int) -> None:
        """Search a block of keys [T] that begins with frame `first` of a file."""
        if len(keys) < SEED:
            return
        hashes, width = _hashes(keys), self.pieces.shape[1]
        found = np.flatnonzero(self.table[_place(hashes)])
        low, high = (np.searchsorted(self.hashes, hashes[found], s) for s in ("left", "right"))
        found, low, counts = (x[high > low] for x in (found, low, high - low))
        block = np.pad(keys, width, constant_values=-2)  # which equals neither a key nor -1
        batches = np.flatnonzero(np.diff(np.cumsum(counts) // BATCH)) + 1
        for part in np.split(np.arange(len(found)), batches) if len(found) else ():
            n = counts[part]
            seeds = np.arange(n.sum()) + np.repeat(low[part] - np.cumsum(n) + n, n)
            shift = width + found[part].repeat(n) - self.seed_at[seeds]
            pairs, number = np.unique(
                self.seed_piece[seeds] * len(block) + shift, return_counts=True
            )
            pairs = pairs[np.argsort(-number)]  # long runs first: fewer are longer than these
            for some in np.array_split(pairs, 1 + len(pairs) * width // BATCH):
                self._compare(block, path, first - width, *np.divmod(some, len(block)))

    def _compare(self, block: Array, path: str, first: int, piece: Array, shift: Array) -> None:
        """Note the longer runs where the pieces [N] lie over frames `shift` of a block."""
        equal = self.pieces[piece] == sliding_window_view(block, self.pieces.shape[1])[shift]
        exact, near = (np.array([run.frames for run in runs]) + 1 for runs in self.best)
        needed = np.minimum(exact, near - near // ONE_IN)  # shared frames of a longer run
        enough = equal.sum(axis=1) >= needed[self.owner[piece]]
        piece, shift, equal = piece[enough], shift[enough], equal[enough]
        for best, penalty in zip(self.best, (BREAK, ONE_IN - 1), strict=True):
            row, start, stop = _runs(equal, equal & self.is_new[piece], penalty)
            owner = self.owner[piece[row]]
            longer = stop - start > np.array([run.frames for run in best])[owner]
            for i in sorted(np.flatnonzero(longer), key=lambda i: start[i] - stop[i]):
                r, a, b = int(row[i]), int(start[i]), int(stop[i])
                shared = self.pieces[piece[r], a:b][equal[r, a:b]]
                if b - a > best[owner[i]].frames and len(np.unique(shared)) >= DISTINCT:
                    places = int(self.at[piece[r]]) + a, path, first + int(shift[r]) + a
                    best[owner[i]] = Run(b - a, *places)


def _runs(equal: Array, shows: Array, penalty: int) -> tuple[Array, Array, Array]:
    """The longest run up to each end of a stretch of shared frames: row, start and stop, [M] each.

    `equal` [N, T] are the shared frames and `shows` those that are not held. A shared frame weighs
    1, another -penalty, and no run weighs less than 0: it starts where the sum before it is the
    first that is not above the sum at its end.
    """
    width = equal.shape[1] + 1  # with a break behind each row
    equal = np.pad(equal, ((0, 0), (0, 1))).ravel()
    shows = np.pad(shows, ((0, 0), (0, 1)), constant_values=True).ravel()
    number = np.arange(len(equal))
    is_held = number - np.maximum.accumulate(np.where(shows, number, 0)) > HELD
    counts = equal & ~is_held
    weights = np.where(counts, 1, np.where(is_held, -BREAK, -penalty))
    weights[width - 1 :: width] = -BREAK
    sums = np.cumsum(weights)
    lowest = np.minimum.accumulate(np.where(counts, sums - weights, BREAK))
    ends = np.flatnonzero(counts[:-1] & ~counts[1:])
    starts = np.searchsorted(-lowest, -sums[ends])
    row = ends // width
    return row, starts - row * width, ends + 1 - row * width


def _place(hashes: Array) -> Array:
    """Place of each hash in the table."""
    return (hashes >> np.uint64(64 - TABLE_BITS)).view(np.int64)
