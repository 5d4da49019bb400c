"""Statistics of codes: counting beside a slow reference, and what the figures tell apart."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest

from npq_dataset import Spans, WindowDataset, find_npq_files, scan_corpus
from sound.npq_format import write_npq
from training.code_statistics import (
    COARSE,
    FINE,
    MAX_EXCERPTS,
    MAX_FRAMES,
    Excerpts,
    compare,
    describe,
    distance,
    divergence,
    equal_mass_groups,
    flat,
    read_excerpts,
    repeats,
    tables,
)

NOTES, HELD, V, K = 24, 6, 200, 3


def music(seed: int, frames: int, vocab_sizes: tuple[int, ...] = (V,) * K) -> np.ndarray:
    """A piece [frames, K]: a random walk over notes that all pieces share, each held for a while.

    A tenth of the codes is noise, drawn evenly.
    """
    shared, rng = np.random.default_rng(99), np.random.default_rng(seed)
    notes = np.stack([shared.integers(v, size=NOTES) for v in vocab_sizes], axis=1)
    moves = rng.integers(-1, 2, size=frames // HELD + 1)
    walk = np.repeat((rng.integers(NOTES) + np.cumsum(moves)) % NOTES, HELD)[:frames]
    noise = noise_of(rng, frames, vocab_sizes)
    return np.where(rng.random((frames, len(vocab_sizes))) < 0.1, noise, notes[walk])


def noise_of(rng: np.random.Generator, frames: int, vocab_sizes: tuple[int, ...]) -> np.ndarray:
    return np.stack([rng.integers(v, size=frames) for v in vocab_sizes], axis=1)


def held_out(frames: int = 1290, **shape) -> Excerpts:
    """Two excerpts of each of twelve pieces."""
    codes = np.stack([music(i, frames * 2, **shape) for i in range(12)])
    return Excerpts(codes.reshape(24, frames, -1), np.repeat(np.arange(12), 2))


@pytest.fixture(scope="module")
def excerpts() -> Excerpts:
    return held_out()


# --- counting ------------------------------------------------------------------------------------


def slow_divergence(p, q) -> float:
    total = 0.0
    for a, b in zip(p, q, strict=True):
        for x in (a, b):
            total += x * math.log2(x / ((a + b) / 2)) / 2 if x > 0 else 0.0
    return total


def slow_distance(table, rest) -> float:
    """[K, cells] both."""
    pairs = zip(table, rest, strict=True)
    found = [slow_divergence([x / sum(a) for x in a], [x / sum(b) for x in b]) for a, b in pairs]
    return sum(found) / len(found)


def test_counts_equal_the_slow_references():
    rng = np.random.default_rng(0)
    codes = rng.integers(5, size=(2, 40, K))
    fine, coarse = rng.integers(FINE, size=(K, 5)), rng.integers(COARSE, size=(K, 5))
    found = tables(codes, fine, coarse)
    wanted = {name: np.zeros_like(t) for name, t in found.items()}
    for n in range(2):
        for t in range(40):
            for k in range(K):
                code = codes[n, t, k]
                wanted["histograms"][n, k, fine[k, code]] += 1
                if t:
                    before = codes[n, t - 1, k]
                    cell = COARSE if code == before else coarse[k, code]
                    wanted["transitions"][n, k, coarse[k, before] * (COARSE + 1) + cell] += 1
                if k:
                    row = coarse[k - 1, codes[n, t, k - 1]]
                    wanted["codebooks"][n, k - 1, row * COARSE + coarse[k, code]] += 1
    for name, table in found.items():
        assert (table == wanted[name]).all(), name
    same = [sum(c[t, k] == c[t - 1, k] for t in range(1, 40) for k in range(K)) for c in codes]
    assert repeats(codes).tolist() == pytest.approx([s / (39 * K) for s in same])


def test_distances_equal_the_slow_reference():
    rng = np.random.default_rng(1)
    table, rest = rng.poisson(1.0, size=(3, K, 20)), rng.poisson(2.0, size=(K, 20))
    assert distance(table, rest) == pytest.approx([slow_distance(t, rest) for t in table])


def test_divergence_of_known_pairs():
    """The middle one by hand: H(3/4, 1/4) - H(1/2, 1/2) / 2."""
    p = np.array([[1.0, 0.0], [1.0, 0.0], [0.3, 0.7]])
    q = np.array([[0.0, 1.0], [0.5, 0.5], [0.3, 0.7]])
    assert divergence(p, q) == pytest.approx([1.0, 0.811278 - 0.5, 0.0], abs=1e-6)


def test_groups_hold_equal_shares_and_a_frequent_code_stands_alone():
    counts = np.array([[1] * 64, [1000] + [10] * 63])
    even, heavy = equal_mass_groups(counts, 8)
    assert np.bincount(even).tolist() == [8] * 8
    assert (heavy == heavy[0]).sum() == 1
    unseen = equal_mass_groups(np.array([[5, 0, 5, 0]]), 2)[0]
    assert unseen.tolist() == [0, 1, 1, 1]


# --- what the figures tell apart -----------------------------------------------------------------


def test_music_scores_at_the_level_of_held_out_music(excerpts):
    for seed in range(100, 105):
        figure = compare(music(seed, 1290), excerpts)["distance"]
        assert abs(figure.sample - figure.music) < 3 * figure.spread


def test_held_out_music_that_is_the_sample_scores_at_their_level(excerpts):
    found = [compare(codes, excerpts)["distance"].sample for codes in excerpts.codes]
    level = compare(excerpts.codes[0], excerpts)["distance"]
    assert np.mean(found) == pytest.approx(level.music, rel=0.1)
    assert np.mean(found) < level.music, "its own file is among the music eleven times of twelve"


def test_shuffled_frames_keep_the_histograms_and_lose_the_transitions(excerpts):
    sample = music(100, 1290)
    shuffled = sample[np.random.default_rng(0).permutation(1290)]
    before, after = compare(sample, excerpts), compare(shuffled, excerpts)
    assert after["histograms"] == before["histograms"]
    assert after["codebooks"] == before["codebooks"]
    t = before["transitions"]
    assert abs(t.sample - t.music) < 3 * t.spread
    assert after["transitions"].sample > t.music + 5 * t.spread
    assert after["repeats"].sample < before["repeats"].sample / 5


def test_codebooks_drawn_apart_lose_only_each_other(excerpts):
    """Each codebook is another piece's."""
    apart = np.stack([music(100 + k, 1290)[:, k] for k in range(K)], axis=1)
    figures = compare(apart, excerpts)
    c = figures["codebooks"]
    assert c.sample > c.music + 3 * c.spread
    assert figures["transitions"].sample < 3 * figures["transitions"].music


def test_uniform_noise_scores_worst(excerpts):
    rng = np.random.default_rng(0)
    piece = music(100, 1290)
    others = [piece, piece[rng.permutation(1290)], music(101, 1290)]
    noise = compare(noise_of(rng, 1290, (V,) * K), excerpts)["distance"]
    assert noise.sample > max(compare(x, excerpts)["distance"].sample for x in others)
    assert noise.sample > noise.music + 5 * noise.spread


def test_codes_more_average_than_a_piece_lie_below_the_level(excerpts):
    rng = np.random.default_rng(0)
    every = excerpts.codes.reshape(-1, K)
    figure = compare(every[rng.integers(len(every), size=1290)], excerpts)["histograms"]
    assert figure.sample < figure.music - figure.spread


# --- shapes --------------------------------------------------------------------------------------


def test_vocabularies_of_different_sizes():
    sizes = (8, 200, 1024)
    pool = held_out(600, vocab_sizes=sizes)
    figure = compare(music(100, 600, sizes), pool)["distance"]
    assert abs(figure.sample - figure.music) < 3 * figure.spread
    outside = np.full((600, 3), 4095)  # codes that no piece has
    assert compare(outside, pool)["histograms"].sample > 0.9


def test_one_codebook_has_no_pairs_of_codebooks():
    pool = held_out(600, vocab_sizes=(50,))
    figures = compare(music(100, 600, (50,)), pool)
    assert list(figures) == ["distance", "histograms", "transitions", "repeats"]
    assert all(math.isfinite(x) for f in figures.values() for x in (f.sample, f.music, f.spread))


def test_very_short_samples(excerpts):
    """Held-out excerpts are cut as short, so even two frames are compared like with like."""
    found = [compare(music(s, 2), excerpts)["distance"] for s in range(100, 140)]
    assert np.mean([f.sample for f in found]) == pytest.approx(found[0].music, rel=0.2)
    assert compare(music(100, 1), excerpts) == {}


def test_long_samples_are_compared_piece_by_piece(excerpts):
    whole = compare(music(100, 1290 * 4 + 5), excerpts)["distance"]
    pieces = [music(100, 1290 * 4 + 5)[i * 1290 :][:1290] for i in range(4)]
    each = [compare(p, excerpts)["distance"].sample for p in pieces]
    assert whole.sample == pytest.approx(np.mean(each))


def test_excerpts_of_one_file_stand_for_a_file_each(excerpts):
    one = Excerpts(excerpts.codes, np.zeros(24, dtype=np.int64))
    assert compare(music(100, 1290), one)["distance"].music > 0


def test_without_two_excerpts_there_is_no_figure_and_it_says_so(excerpts):
    for count in (0, 1):
        figures = compare(
            music(100, 1290), Excerpts(excerpts.codes[:count], excerpts.files[:count])
        )
        assert figures == {}
    assert describe({}).startswith("n/a")
    assert flat({}) == {"distance": None}


def test_other_numbers_of_codebooks_are_refused(excerpts):
    with pytest.raises(ValueError, match="3 in the music and 2 in the sample"):
        compare(music(100, 1290)[:, :2], excerpts)


def test_words_and_metrics_fields(excerpts):
    figures = compare(music(100, 1290), excerpts)
    row = flat(figures)
    assert set(row) == {n + end for n in figures for end in ("", "_music", "_sd")}
    assert list(figures) == ["distance", "histograms", "transitions", "codebooks", "repeats"]
    parts = [figures[n].sample for n in ("histograms", "transitions", "codebooks")]
    assert row["distance"] == pytest.approx(np.mean(parts))
    assert f"held-out music {figures['distance'].music:.3f}, sd " in describe(figures)


# --- reading -------------------------------------------------------------------------------------


def windows_of(folder: Path, lengths: list[int], ctx: int = 32) -> WindowDataset:
    """Whole files of music, one for each length."""
    for i, frames in enumerate(lengths):
        codes = music(i, frames)
        write_npq(folder / f"{i}.npq", codes, vocab_sizes=[V] * K, frame_rate=86.13)
    corpus = scan_corpus(find_npq_files([folder]), ctx=ctx)
    frames = corpus.files["frames"]
    return WindowDataset(corpus, Spans(frames * 0, frames, ""), ctx=ctx, stride=ctx)


def test_excerpts_are_evenly_spread_and_bounded(tmp_path):
    windows = windows_of(tmp_path, [30_000, 60_000])
    found = read_excerpts(windows, 200)
    assert found.codes.shape == (MAX_EXCERPTS, 200, K)
    long_file = int(np.argmax(windows.files["frames"]))
    assert np.mean(found.files == long_file) == pytest.approx(2 / 3, abs=0.03)
    again = read_excerpts(windows, 200)
    assert (found.codes == again.codes).all(), "the same files, the same figures"
    assert read_excerpts(windows, 10**8).codes.shape[1] == MAX_FRAMES
    assert len(windows) == 30_000 // 32 + 60_000 // 32, "the windows themselves stay"


def test_little_music_gives_shorter_excerpts(tmp_path):
    windows = windows_of(tmp_path, [300, 500])
    found = read_excerpts(windows, 1290)
    assert found.codes.shape == (9, 80, K)
    assert compare(music(100, 1290), found)["distance"].music > 0


def test_no_validation_windows_give_no_excerpts(tmp_path):
    windows = windows_of(tmp_path, [300])
    windows.spans.start[:] = windows.spans.stop
    assert read_excerpts(windows, 1290).codes.shape == (0, 20, K)


def test_half_a_second_is_enough():
    """1,290 frames of 9 x 1024 against all that is ever read of the music."""
    rng = np.random.default_rng(0)
    pool = Excerpts(rng.integers(1024, size=(64, MAX_FRAMES, 9)), np.arange(64))
    compare(pool.codes[0], pool)
    started = time.process_time()
    compare(rng.integers(1024, size=(1290, 9)), pool)
    assert time.process_time() - started < 0.5, "measured: 0.05 s"
