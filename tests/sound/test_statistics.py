"""Statistics of codes: beside a slow count, and what they tell apart."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from sound.statistics import compare, describe, entropy, repeats


@pytest.fixture
def music() -> np.ndarray:
    """Six excerpts [6, 200, 3] that hold each frame for three."""
    rng = np.random.default_rng(0)
    return rng.integers(64, size=(6, 67, 3)).repeat(3, axis=1)[:, :200]


def test_counts_are_those_of_a_slow_count(music):
    sample = music[0]
    pairs = [(a, b) for column in sample.T.tolist() for a, b in pairwise(column)]
    assert repeats(sample) == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    for column, found in zip(sample.T.tolist(), entropy(sample), strict=True):
        shares = [n / len(column) for n in Counter(column).values()]
        assert found == pytest.approx(-sum(p * math.log(p) for p in shares))


def test_a_held_frame_and_noise_are_told_from_music(music):
    limit = repeats(music).std() * 4
    for sample, is_more in ((music[0, :1].repeat(200, axis=0), True), (music[0, ::3], False)):
        figures = compare(sample, music)
        gap = figures["repeats"] - figures["repeats_music"]
        assert gap > limit if is_more else gap < -limit
    assert compare(music[0, :1].repeat(200, axis=0), music)["entropy"] == [0, 0, 0]
    figures = compare(music[0], music)
    assert abs(figures["repeats"] - figures["repeats_music"]) < limit
    assert np.allclose(figures["entropy"], figures["entropy_music"], rtol=0.2)


def test_entropy_is_compared_over_equal_lengths(music):
    longer = np.concatenate([music[0], music[1]])
    assert compare(longer, music)["entropy"] == entropy(music[0])
    assert compare(music[0, :50], music[:1])["entropy_music"] == entropy(music[0, :50])


def test_the_line_has_every_figure_or_says_why_not(music):
    figures = compare(music[0], music)
    line = describe(figures)
    assert line.startswith(f"repeats {figures['repeats']:.3f} (held-out music ")
    assert f"entropy {np.mean(figures['entropy']):.2f} nats" in line
    assert compare(music[0, :2], music)["repeats"] == 1
    assert compare(music[0, :1], music) == compare(music[0], music[:0]) == {}
    assert "n/a" in describe({})
