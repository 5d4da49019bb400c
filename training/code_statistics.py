"""How far the statistics of drawn codes lie from those of held-out music.

    excerpts = read_excerpts(val_windows, frames=len(sample))
    figures = compare(sample, excerpts)               # sample [T, K]
    print(describe(figures))

A sample of 1,290 frames is short: n draws in m cells are off by about m / (8 n ln 2) bits of
Jensen-Shannon divergence by chance alone, 0.14 for a histogram over 1,024 entries. So codes are
counted in groups of equal frequency, 64 or 72 cells a table (0.01 bits), and every figure stands
beside the one that excerpts of held-out music, of the same length, get against the rest of it. The
sample's is near that level if it is like the music, far above if not, and below if it is more
average than any one piece, as codes are that were drawn from frequencies alone.

N excerpts, or P pieces of a sample, of T frames; K codebooks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from npq_dataset import WindowDataset

Array = np.ndarray[Any, Any]

FINE, COARSE = 64, 8  # groups of codes: for histograms, and for each side of a pair
MAX_EXCERPTS, MAX_FRAMES = 64, 2048  # so that at most 131,072 frames of music are read
MIN_EXCERPTS, MIN_FRAMES = 8, 16  # excerpts are halved, down to MIN_FRAMES, to have so many


@dataclass(frozen=True)
class Excerpts:
    """Held-out music: codes [N, T, K] int64, and the number of each one's file [N]."""

    codes: Array
    files: Array


@dataclass(frozen=True)
class Figure:
    """One statistic of a sample, and mean and standard deviation of it over held-out excerpts."""

    sample: float
    music: float
    spread: float


# --- from music to figures -----------------------------------------------------------------------


def read_excerpts(windows: WindowDataset, frames: int) -> Excerpts:
    """At most MAX_EXCERPTS of `frames` frames, evenly spread over what the windows cover.

    They are shorter where `frames` exceeds MAX_FRAMES, or the music is too short for MIN_EXCERPTS.
    """
    frames = min(frames, MAX_FRAMES)
    while len(cut := windows.recut(frames)) < MIN_EXCERPTS and frames >= 2 * MIN_FRAMES:
        frames //= 2
    numbers = np.linspace(0, len(cut) - 1, min(len(cut), MAX_EXCERPTS)).astype(np.int64)
    return Excerpts(cut[numbers].numpy().astype(np.int64), cut.locate(numbers)[0])


def compare(sample: Array, excerpts: Excerpts) -> dict[str, Figure]:
    """Figures of a sample [T, K]; empty if it has one frame, or the music fewer than two excerpts.

    `histograms` (of codes), `transitions` (pairs of a code and the next frame's) and `codebooks`
    (pairs of a code and the next codebook's in the frame, K > 1) are divergences in bits, 0 to 1,
    in the mean over codebooks; `distance` is the mean of the three. `repeats` is the share of codes
    equal to the one before. A sample longer than the excerpts is cut to pieces of their length. An
    excerpt is held against the other files, a sample against the same sets of files in the mean;
    excerpts of one single file stand for a file each.

    Raises:
        ValueError: sample and music have different numbers of codebooks.
    """
    if sample.shape[1] != excerpts.codes.shape[2]:
        found = f"{excerpts.codes.shape[2]} in the music and {sample.shape[1]} in the sample"
        raise ValueError(f"statistics of codes: expected equal numbers of codebooks, found {found}")
    length = min(len(sample), excerpts.codes.shape[1])
    if len(excerpts.codes) < 2 or length < 2:
        return {}
    music, files = excerpts.codes[:, :length], excerpts.files
    if (files == files[0]).all():
        files = np.arange(len(files))
    pieces = sample[: len(sample) // length * length].reshape(-1, length, sample.shape[1])
    vocab_size = 1 + max(int(music.max()), int(sample.max()))
    counts = counted(music.reshape(1, -1, music.shape[2]), vocab_size)[0]
    fine, coarse = equal_mass_groups(counts, FINE), equal_mass_groups(counts, COARSE)
    drawn, held_out = tables(pieces, fine, coarse), tables(music, fine, coarse)
    scores = {name: distances(drawn[name], held_out[name], files) for name in drawn}
    of_sample, of_music = (np.mean(side, axis=0) for side in zip(*scores.values(), strict=True))
    scores = {"distance": (of_sample, of_music), **scores}
    scores["repeats"] = (repeats(pieces), repeats(music))
    return {
        name: Figure(float(x.mean()), float(y.mean()), float(y.std()))
        for name, (x, y) in scores.items()
    }


def describe(figures: dict[str, Figure]) -> str:
    """One console line of `compare`'s: each figure of the sample, in brackets the music's."""
    if not figures:
        return "n/a, there are no two excerpts of held-out music to compare with"
    whole, *parts = figures.items()
    words = [f"{name} {f.sample:.3f} ({f.music:.3f})" for name, f in parts]
    distance, f = whole
    words.insert(0, f"{distance} {f.sample:.3f} (held-out music {f.music:.3f}, sd {f.spread:.3f})")
    return " | ".join(words)


def flat(figures: dict[str, Figure]) -> dict[str, float | None]:
    """The same for a metrics row: `name`, `name_music` and `name_sd`; `distance` None if empty."""
    row: dict[str, float | None] = {} if figures else {"distance": None}
    for name, f in figures.items():
        row |= {name: f.sample, f"{name}_music": f.music, f"{name}_sd": f.spread}
    return row


# --- counting ------------------------------------------------------------------------------------


def counted(cells: Array, size: int) -> Array:
    """How often each cell, 0 to size - 1, occurs over T: [N, T, K] -> [N, K, size]."""
    n, _, k = cells.shape
    table = np.arange(n * k).reshape(n, 1, k)
    counts = np.bincount((table * size + cells).ravel(), minlength=n * k * size)
    return counts.reshape(n, k, size)


def equal_mass_groups(counts: Array, groups: int) -> Array:
    """The group, 0 to groups - 1, of each code: [K, V] counts -> [K, V].

    Codes stand in order of frequency, and each group gets about the same share of all counts; a
    code of more than that share stands alone. Codes never seen join the rarest.
    """
    order = np.argsort(-counts, axis=1, kind="stable")
    ordered = np.take_along_axis(counts, order, axis=1)
    middle = (ordered.cumsum(axis=1) - ordered / 2) / ordered.sum(axis=1, keepdims=True)
    group = np.minimum((groups * middle).astype(np.int64), groups - 1)
    result = np.empty_like(group)
    np.put_along_axis(result, order, group, axis=1)
    return result


def tables(codes: Array, fine: Array, coarse: Array) -> dict[str, Array]:
    """Counts [N, K, cells] of codes [N, T, K], for each statistic, in groups [K, V] of codes.

    A transition's cells are pairs of groups, and one more for each group: the very same code again.
    """
    each = np.arange(codes.shape[2])
    group = coarse[each, codes]
    step = np.where(codes[:, 1:] == codes[:, :-1], COARSE, group[:, 1:])
    found = {
        "histograms": counted(fine[each, codes], FINE),
        "transitions": counted(group[:, :-1] * (COARSE + 1) + step, COARSE * (COARSE + 1)),
    }
    if codes.shape[2] > 1:
        found["codebooks"] = counted(group[:, :, :-1] * COARSE + group[:, :, 1:], COARSE**2)
    return found


def repeats(codes: Array) -> Array:
    """Share of codes that equal the one before in their codebook: [N, T, K] -> [N]."""
    return (codes[:, 1:] == codes[:, :-1]).mean(axis=(1, 2))


# --- distances -----------------------------------------------------------------------------------


def distances(drawn: Array, music: Array, files: Array) -> tuple[Array, Array]:
    """Distance of each table of a sample [P, ...] and of music [N, ...] to the other files' music.

    A sample has no file of its own: its distances are means over leaving out each in turn.
    """
    whole, left_out = music.sum(axis=0), np.unique(files)
    of_sample, of_music = np.zeros(len(drawn)), np.empty(len(music))
    for file in left_out:
        own = files == file
        rest = whole - music[own].sum(axis=0)
        of_music[own] = distance(music[own], rest)
        of_sample += distance(drawn, rest) / len(left_out)
    return of_sample, of_music


def distance(counts: Array, rest: Array) -> Array:
    """Divergence of shares, mean over codebooks: counts [N, K, cells] and [K, cells] -> [N]."""
    shares = (x / x.sum(axis=-1, keepdims=True) for x in (counts, rest))
    return divergence(*shares).mean(axis=-1)


def divergence(p: Array, q: Array) -> Array:
    """Jensen-Shannon divergence over the last axis, in bits, from 0 to 1 (Lin 1991)."""
    middle = (p + q) / 2

    def relative_entropy(x: Array) -> Array:
        ratio = np.divide(x, middle, out=np.ones_like(middle), where=x > 0)
        return (x * np.log2(ratio)).sum(axis=-1)

    return (relative_entropy(p) + relative_entropy(q)) / 2
