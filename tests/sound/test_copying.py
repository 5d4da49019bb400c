"""Runs that samples share with training music: found where planted, and by a slow reference."""

from __future__ import annotations

import numpy as np
import pytest
from kit.npq_bytes import npq1, npq2, put
from kit.trainer import ROOT

from sound import copying
from sound.copying import (
    DISTINCT,
    HELD,
    ONE_IN,
    Run,
    Shared,
    Track,
    copy_warning,
    figures,
    longest_runs,
)
from sound.npq_format import NpqError, map_codes, read_header

TOKENS = sorted((ROOT / "examples" / "tokens").rglob("*.npq"))
SECONDS_2 = 172  # frames of 44,100 / 512 a second


def tracks_of(paths):
    return [Track(h, 0, h.num_frames) for h in map(read_header, paths)]


def slow_runs(sample, music, one_in):
    """Longest run by its definition: frames, first frame in the sample, first in the music."""
    best = (0, 0, 0)
    for shift in range(1 - len(sample), len(music)):
        equal = [
            0 <= i + shift < len(music) and tuple(sample[i][:3]) == tuple(music[i + shift][:3])
            for i in range(len(sample))
        ]
        frames = [tuple(frame[:3]) for frame in sample]
        shows = [
            equal[i] and frames[i] not in frames[max(0, i - 3) : i] for i in range(len(frames))
        ]
        for start in (i for i, same in enumerate(equal) if same):
            shown, distinct, different = (
                max((i for i in range(start) if shows[i]), default=0),
                set(),
                0,
            )
            for i in range(start, len(sample)):
                shown = i if shows[i] else shown
                if i - shown > HELD:
                    break
                different += not equal[i]
                distinct |= {frames[i]} if equal[i] else set()
                length = i + 1 - start
                is_run = equal[i] and different <= (length // one_in if one_in else 0)
                if is_run and len(distinct) >= DISTINCT and length > best[0]:
                    best = (length, start, start + shift)
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("held", [1, 4])
def test_runs_are_those_of_a_slow_search_by_definition(tmp_path, seed, held):
    """Few different frames, some of them held, so that runs of all kinds meet by chance."""
    rng = np.random.default_rng([seed, held])
    alphabet = rng.integers(1024, size=(int(rng.integers(16, 25)), 4))
    music, sample = (
        alphabet[np.repeat(rng.integers(len(alphabet), size=n), rng.integers(1, held + 1, size=n))]
        for n in (160, 50)
    )
    sample[20:40] = music[70:90]
    path = put(tmp_path / "music.npq", npq1(music))
    (found,) = longest_runs([sample], tracks_of([path]))
    assert found.exact.frames == slow_runs(sample, music, 0)[0]
    assert found.near.frames == slow_runs(sample, music, ONE_IN)[0]
    assert held > 1 or found.exact.frames >= 20
    for run in found:
        ours = sample[run.at : run.at + run.frames, :3]
        theirs = music[run.start : run.start + run.frames, :3]
        assert (ours != theirs).any(axis=1).sum() <= (run is found.near) * run.frames // ONE_IN


def test_held_frames_and_short_loops_are_no_runs(tmp_path):
    rng = np.random.default_rng(0)
    frame = rng.integers(1024, size=(40, 9))
    still = {
        "held": frame[np.zeros(400, int)],
        "loop of two": frame[np.arange(400) % 2],
        "loop of three": frame[np.arange(400) % 3],
        "silence that flickers": frame[rng.integers(3, size=400)],
    }
    music = put(tmp_path / "music.npq", npq1(np.concatenate([*still.values(), frame])))
    for name, codes in still.items():
        sample = np.concatenate((rng.integers(1024, size=(50, 9)), codes, frame[20:24] + 1))
        (found,) = longest_runs([sample % 1024], tracks_of([music]))
        assert (found.exact.frames, found.near.frames) == (0, 0), name


def test_what_is_held_too_long_does_not_lengthen_a_run(tmp_path):
    """Twelve shared frames before 300 of shared silence are no run of 312."""
    frame = np.random.default_rng(0).integers(1024, size=(16, 9))
    music = frame[[*range(12), *[12] * 300, 13, 14, 15]]
    path = put(tmp_path / "music.npq", npq1(music))
    (found,) = longest_runs([music], tracks_of([path]))
    assert found.exact.frames == 12 + 1 + HELD
    (found,) = longest_runs([frame[[*range(12), *[12] * 100, 13, 14, 15]]], tracks_of([path]))
    assert found.exact.frames == 112  # it goes on where the file still holds its frame
    short = np.delete(music, slice(100, 290), axis=0)
    (found,) = longest_runs([short], tracks_of([put(tmp_path / "short.npq", npq1(short))]))
    assert found.exact.frames == len(short)  # a note that is held for less is part of its music


@pytest.mark.parametrize(("distinct", "counts"), [(DISTINCT - 1, False), (DISTINCT, True)])
def test_silence_that_flickers_between_several_frames_is_no_run(tmp_path, distinct, counts):
    rng = np.random.default_rng(0)
    codes = rng.integers(1024, size=(distinct, 9))[rng.integers(distinct, size=400)]
    path = put(tmp_path / "music.npq", npq1(codes))
    (found,) = longest_runs([codes], tracks_of([path]))
    assert (found.exact.frames == found.near.frames == 400) == counts
    assert (found.exact.frames == found.near.frames == 0) != counts


def planted(rng, excerpt, *, changed):
    """Held-out-like noise around an excerpt [T, K] that differs in so many frames."""
    copy = excerpt.copy()
    at = rng.choice(len(copy), changed, replace=False)
    copy[at] = (copy[at] + rng.integers(1, 1024, size=(changed, copy.shape[1]))) % 1024
    noise = rng.integers(1024, size=(600, copy.shape[1]))
    return np.concatenate((noise[:317], copy, noise[317:]))


@pytest.mark.parametrize("changed", [0, SECONDS_2 // ONE_IN])
def test_planted_excerpts_of_two_seconds_are_all_found(changed):
    """In real codes, each at its place."""
    rng = np.random.default_rng(changed)
    tracks = tracks_of(map(str, TOKENS))
    places = []
    while len(places) < 50:
        track = tracks[rng.integers(len(tracks))]
        first = int(rng.integers(track.stop - SECONDS_2))
        excerpt = np.array(map_codes(track.header)[first : first + SECONDS_2])
        if len(np.unique(excerpt[:, 0])) > SECONDS_2 // 4:  # not silence
            places.append((track.header.path, first, excerpt))
    samples = [planted(rng, excerpt, changed=changed) for *_, excerpt in places]
    for shared, (path, first, _) in zip(longest_runs(samples, tracks), places, strict=True):
        run = shared.near if changed else shared.exact
        assert run.path == path
        assert run.start - first == run.at - 317
        assert run.frames >= (SECONDS_2 - 24 if changed else SECONDS_2)


def test_only_the_frames_of_a_track_that_are_named_are_searched(tmp_path):
    codes = np.random.default_rng(0).integers(1024, size=(900, 9))
    header = read_header(put(tmp_path / "music.npq", npq1(codes)))
    sample = codes[500:600]
    assert longest_runs([sample], [Track(header, 0, 520)])[0].exact.frames == 20
    assert longest_runs([sample], [Track(header, 590, 900)])[0].exact == (10, 90, header.path, 590)
    assert longest_runs([sample], [Track(header, 0, 500)])[0].exact.frames == 0


def test_runs_over_the_borders_of_blocks_and_pieces_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "BLOCK", 64)
    monkeypatch.setattr(copying, "PIECE", 256)
    monkeypatch.setattr(copying, "BATCH", 1 << 10)
    codes = np.random.default_rng(0).integers(1024, size=(900, 9))
    path = put(tmp_path / "music.npq", npq1(codes))
    read = []
    for first in range(0, 700, 37):
        sample = np.concatenate((codes[::-1], codes[first : first + 128]))
        (found,) = longest_runs([sample], tracks_of([path]), on_frames=read.append)
        assert found.exact == (128, 900, path, first)
        assert found.near == found.exact
    assert sum(read) == 900 * 19


@pytest.mark.parametrize("pack", [lambda c: npq1(c[:, :2]), lambda c: npq2(c, 4), npq1])
def test_lower_codebooks_alone_are_compared(tmp_path, pack):
    """All that there are of fewer than three, whatever the width of the codes and their order."""
    codes = np.random.default_rng(0).integers(1024, size=(300, 9))
    path = put(tmp_path / "music.npq", pack(codes))
    sample = codes[100:200].astype(np.int64)
    sample[:, 3:] = 0
    if read_header(path).num_codebooks == 2:
        sample = sample[:, :2]
    assert longest_runs([sample], tracks_of([path]))[0].exact == (100, 0, path, 100)
    sample[50, 1] += 1
    shared = longest_runs([sample], tracks_of([path]))[0]
    assert (shared.exact.frames, shared.near.frames) == (50, 100)


@pytest.mark.parametrize("frames", [0, 1, 3])
def test_a_sample_or_track_shorter_than_a_seed_shares_nothing(tmp_path, frames):
    codes = np.random.default_rng(0).integers(1024, size=(300, 9))
    path = put(tmp_path / "music.npq", npq1(codes))
    short = put(tmp_path / "short.npq", npq1(codes[:3]))
    assert longest_runs([codes[:frames]], tracks_of([path, short]))[0].near.frames == 0
    assert longest_runs([codes[:100]], tracks_of([short]))[0].near.frames == 0
    assert longest_runs([], tracks_of([path])) == []


def test_a_file_that_is_cut_meanwhile_is_an_error_with_its_name(tmp_path):
    codes = np.random.default_rng(0).integers(1024, size=(300, 9))
    path = put(tmp_path / "music.npq", npq1(codes))
    tracks = tracks_of([path])
    put(tmp_path / "music.npq", npq1(codes)[:-100])
    with pytest.raises(NpqError, match=r"music\.npq: file changed"):
        longest_runs([codes], tracks)


def test_a_copy_is_longer_than_twice_what_held_out_music_shows_and_than_half_a_second():
    def warning(frames: int, held_out: int, length: int = 1290) -> str | None:
        run = Run(frames, 100, "music/song.npq", 1000)
        return copy_warning(figures(Shared(run, run), length, held_out, 100.0))

    limits = {0: 43, 21: 43, 22: 44, 100: 200}
    assert not any(warning(limit, held_out) for held_out, limit in limits.items())
    assert all(warning(limit + 1, held_out) for held_out, limit in limits.items())
    assert not warning(900, -1)  # nobody knows
    assert not warning(610, 508, length=645)  # of music that repeats itself for 508 frames
    assert warning(611, 508, length=645)  # nearly all of the sample
    assert not warning(645, 645, length=645)
    assert "repeats 9.0 s (900 frames) of song.npq from 10.0 s on, held-out music 0.22 s" in str(
        warning(900, 22)
    )
