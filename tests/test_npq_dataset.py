"""npq_dataset.py: the split, windows, the order."""

from __future__ import annotations

import gc
import hashlib
import itertools
import math
import os
import pickle
import shutil
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kit.npq_bytes import RATE, legacy_a, legacy_b, npq1, npq2, put, some_codes

import npq_dataset
from npq_dataset import (
    Corpus,
    EpochOrder,
    Spans,
    WindowDataset,
    find_npq_files,
    scan_corpus,
    split_corpus,
)
from sound.corpus import FILE_COLUMNS, DataSummary, Table, shifted_name
from sound.npq_format import NpqError, map_codes, read_header

# --- the split -----------------------------------------------------------------------------------

CTX = 16


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """200 files of 40 to 60 frames, enough to set whole ones aside."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(200):
        put(folder / f"{i:03d}.npq", npq1(some_codes(40 + i % 21, seed=i)))
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    for i, frames in enumerate((400, 300, 37, 500, 31)):
        put(folder / f"{i}.npq", npq1(some_codes(frames, seed=i)))
    return folder


def frames_of(windows: WindowDataset) -> set[tuple[str, int]]:
    """Every (file, frame) that the windows touch."""
    places = windows.describe(np.arange(len(windows)))
    return {(p["file"], p["frame"] + i) for p in places for i in range(windows.ctx)}


def sides(paths: list[str], val_split: float = 0.2) -> tuple[set[bytes], set[bytes]]:
    """Contents of the files on each side, for the rule that sets whole files aside."""
    corpus = scan_corpus(paths, ctx=CTX)
    train, val = split_corpus(corpus, ctx=CTX, val_split=val_split)
    assert "whole files" in val.rule
    return tuple(
        {Path(p).read_bytes() for p, n in zip(corpus.paths, s.stop - s.start, strict=True) if n}
        for s in (train, val)
    )


@pytest.mark.parametrize("name", ["many", "few"])
@pytest.mark.parametrize("stride", [5, CTX])
def test_no_frame_is_on_both_sides(request, name, stride):
    """Pitfall 11: neither in the spans nor in the windows that come out of them."""
    corpus = scan_corpus(find_npq_files([request.getfixturevalue(name)]), ctx=CTX)
    train, val = split_corpus(corpus, ctx=CTX, val_split=0.2)
    assert ((train.stop <= val.start) | (val.stop <= train.start)).all()
    assert (train.stop - train.start + val.stop - val.start == corpus.files["frames"]).all()
    train_frames = frames_of(WindowDataset(corpus, train, ctx=CTX, stride=stride))
    val_frames = frames_of(WindowDataset(corpus, val, ctx=CTX, stride=CTX))
    assert train_frames
    assert val_frames
    assert not train_frames & val_frames


def test_about_the_wanted_share_is_set_aside(many):
    corpus = scan_corpus(find_npq_files([many]), ctx=CTX)
    _, val = split_corpus(corpus, ctx=CTX, val_split=0.2)
    assert 0.1 < (val.stop - val.start).sum() / corpus.files["frames"].sum() < 0.3


@pytest.mark.parametrize("name", ["many", "few"])
def test_the_split_is_the_same_under_other_names_folders_and_order(request, tmp_path, name):
    paths = find_npq_files([request.getfixturevalue(name)])
    moved = []
    for i, path in enumerate(reversed(paths)):
        moved.append(put(tmp_path / f"{i % 3}" / f"renamed{i * 7 % 211}.npq", b""))
        shutil.copyfile(path, moved[-1])
    assert len(set(moved)) == len(paths)
    random = np.random.default_rng(0)
    corpora = [scan_corpus(p, ctx=CTX) for p in (paths, moved, list(random.permutation(moved)))]
    splits = [split_corpus(c, ctx=CTX, val_split=0.2) for c in corpora]
    assert len({c.fingerprint() for c in corpora}) == 1
    assert len({(train.fingerprint(), val.fingerprint()) for train, val in splits}) == 1
    batches = [
        WindowDataset(c, train, ctx=CTX, stride=5)[np.arange(40)]
        for c, (train, _) in zip(corpora, splits, strict=True)
    ]
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])


def test_a_file_keeps_its_side_when_others_are_added(many):
    paths = find_npq_files([many])
    train, val = sides(paths)
    train_before, val_before = sides(paths[:120])
    assert train_before < train
    assert val_before < val


def test_another_content_gives_another_fingerprint(many):
    paths = find_npq_files([many])
    prints = {scan_corpus(p, ctx=CTX).fingerprint() for p in (paths, paths[:-1], paths[1:])}
    assert len(prints) == 3


def test_few_files_each_give_their_last_frames(few):
    corpus = scan_corpus(find_npq_files([few]), ctx=CTX)
    train, val = split_corpus(corpus, ctx=CTX, val_split=0.1)
    assert "last frames" in val.rule
    frames, given = corpus.files["frames"], val.stop - val.start
    assert (val.stop == frames).all()
    assert (train.start == 0).all()
    assert (train.stop == val.start).all()
    for total, tail in zip(frames.tolist(), given.tolist(), strict=True):
        assert tail in (0, max(CTX, total // 10))
        assert total - tail >= CTX  # 31 frames cannot give a window and keep one
    assert given.sum() >= 0.1 * frames.sum()


@pytest.mark.parametrize("name", ["many", "few"])
def test_no_validation_when_none_is_asked_for(request, name):
    corpus = scan_corpus(find_npq_files([request.getfixturevalue(name)]), ctx=CTX)
    train, val = split_corpus(corpus, ctx=CTX, val_split=0.0)
    assert (train.stop - train.start == corpus.files["frames"]).all()
    assert len(WindowDataset(corpus, val, ctx=CTX, stride=CTX)) == 0


def test_equal_files_never_lie_on_both_sides(tmp_path, many):
    """Pitfall 11: the same codes under two names, by either rule."""
    for i in range(12):
        put(tmp_path / f"{i}.npq", npq1(some_codes(40, seed=i // 4)))
    corpus = scan_corpus(find_npq_files([tmp_path]), ctx=CTX)
    for val_split in (0.05, 0.2, 0.4):
        _, val = split_corpus(corpus, ctx=CTX, val_split=val_split)
        assert "last frames" in val.rule
        given = {}
        for crc, tail in zip(corpus.files["crc"], val.stop - val.start, strict=True):
            given.setdefault(int(crc), set()).add(int(tail))
        assert all(len(tails) == 1 for tails in given.values())
        assert any(tails != {0} for tails in given.values())
    paths = find_npq_files([many])
    copies = [shutil.copyfile(p, tmp_path / f"copy{i}") for i, p in enumerate(paths)]
    train, val = sides([*paths, *map(str, copies)])
    assert not train & val


def listed_files(folder: Path, content: bytes) -> list[str]:
    """Base names of the validation files that a list of this content gives."""
    corpus = scan_corpus(find_npq_files([folder]), ctx=CTX)
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(content)
        train, val = split_corpus(corpus, ctx=CTX, val_split=0.2, val_list=file.name)
    assert ((train.stop == 0) == (val.stop > 0)).all()
    return sorted(os.path.basename(p) for p, n in zip(corpus.paths, val.stop, strict=True) if n)


def test_no_listed_music_trains(tmp_path):
    """A name like a comment, another form of Unicode, a name that two files have."""
    for i, name in enumerate(("a/#9 Dream.npq", "a/Cafe\u0301.npq", "a/01.npq", "b/01.npq")):
        put(tmp_path / name, npq1(some_codes(40, seed=i)))
    listed = "#9 Dream.npq\nCaf\u00e9.npq\n# 01.npq\n".encode()
    assert listed_files(tmp_path, listed) == ["#9 Dream.npq", "Cafe\u0301.npq"]
    with pytest.raises(ValueError, match=r"'01\.npq' fits .*/a/01\.npq and .*/b/01\.npq; put"):
        listed_files(tmp_path, b"01.npq")
    assert listed_files(tmp_path, b"b/01.npq") == ["01.npq"]


def test_copies_of_a_listed_file_validate_too(tmp_path):
    """Else its music would train under another name."""
    for i, seed in enumerate((0, 1, 2, 1, 1)):
        put(tmp_path / f"{i}.npq", npq1(some_codes(40, seed=seed)))
    put(tmp_path / "val.txt", b"1.npq\n3.npq\n")
    corpus = scan_corpus(find_npq_files([tmp_path]), ctx=CTX)
    train, val = split_corpus(corpus, ctx=CTX, val_split=0.2, val_list=tmp_path / "val.txt")
    names = [os.path.basename(p) for p in corpus.paths]
    assert {n for n, stop in zip(names, val.stop, strict=True) if stop} == {
        "1.npq",
        "3.npq",
        "4.npq",
    }
    assert {n for n, stop in zip(names, train.stop, strict=True) if stop} == {"0.npq", "2.npq"}
    assert val.rule == (
        f"files listed in {tmp_path}/val.txt, and 1 with the same codes as one of these"
    )


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf# nothing\r\n\r\n"])
def test_a_list_that_names_no_file_is_an_error(many, content):
    with pytest.raises(ValueError, match="found none"):
        listed_files(many, content)


# --- windows -------------------------------------------------------------------------------------


def write_zoo(folder: Path) -> dict[str, np.ndarray]:
    """A file of every kind; codes [T, 4] by path."""
    codes = [some_codes(n, vocab=200, seed=n) for n in (16, 17, 40, 41, 100, 33)]
    five = some_codes(50, 5, vocab=200)
    contents = [
        (codes[0], npq1(codes[0], 256, width=0)),
        (codes[1], npq1(codes[1], 256, width=1)),
        (codes[2], npq1(codes[2], 256, width=2)),
        (five[:41, :4], npq2(five[:41], 1, 256)),
        (codes[4], legacy_a(codes[4], 256)),
        (codes[5], legacy_b(codes[5], 256)),
        (five[:, :4], npq1(five, 256, width=0)),
        (five[::-1, :4], npq2(five[::-1], 1, 256, width=2)),
    ]
    return {put(folder / f"{i}.npq", c): codes for i, (codes, c) in enumerate(contents)}


@pytest.mark.parametrize("stride", [1, 7, CTX, 50])
def test_windows_are_those_of_a_slow_loop(tmp_path, stride):
    """u8, u16, u32, mid/side and both legacy layouts; of five codebooks the first four."""
    truth = write_zoo(tmp_path)
    corpus = scan_corpus(list(truth), ctx=CTX, codebooks=4)
    assert corpus.summary.files == len(truth)
    train, val = split_corpus(corpus, ctx=CTX, val_split=0.2)
    for spans in (train, val):
        expected, places = [], []
        for i, path in enumerate(corpus.paths):
            start = int(spans.start[i])
            while start + CTX <= int(spans.stop[i]):
                expected.append(truth[path][start : start + CTX].tolist())
                places.append({"file": path, "frame": start})
                start += stride
        windows = WindowDataset(corpus, spans, ctx=CTX, stride=stride)
        assert len(windows) == len(expected)
        assert windows.describe(np.arange(len(windows))) == places
        assert windows[np.arange(len(windows))].tolist() == expected
        shuffled = np.random.default_rng(0).permutation(len(windows))[:9]
        batch = windows[shuffled]
        assert batch.dtype == torch.int16
        assert batch.shape == (min(9, len(windows)), CTX, 4)
        assert batch.tolist() == [expected[i] for i in shuffled]


def shifted_music(folder: Path, parts: int = 3) -> dict[str, list[np.ndarray]]:
    """Five pieces; the codes of each one's encodings, by its name. The last is not shifted."""
    truth = {}
    for piece in range(5):
        name = f"{piece} of five.npq"
        count = parts if piece < 4 else 1
        truth[name] = [some_codes(60 + piece, seed=10 * piece + i) for i in range(count)]
        for part, codes in enumerate(truth[name]):
            put(folder / shifted_name(name, part, parts), npq1(codes))
    return truth


@pytest.mark.parametrize("stride", [CTX, CTX // 2])
def test_windows_take_the_encodings_of_their_music_in_turn(stride, tmp_path):
    truth = shifted_music(tmp_path)
    corpus = scan_corpus(find_npq_files([tmp_path]), ctx=CTX)
    assert sorted(map(os.path.basename, corpus.paths)) == sorted(truth)
    assert corpus.summary.files == 5
    assert corpus.summary.hours == pytest.approx(sum(60 + i for i in range(5)) / RATE / 3600)
    assert "8 more encodings, shifted by parts of a frame" in "\n".join(corpus.summary.lines())
    train, val = split_corpus(corpus, ctx=CTX, val_split=0.3)
    windows = WindowDataset(corpus, train, ctx=CTX, stride=stride)
    seen = [[] for _ in range(len(windows))]  # of each window: its encoding in each epoch
    for epoch in range(6):
        numbers = np.arange(len(windows))
        places = windows.describe(numbers, epoch)
        for window, place in enumerate(places):
            header = read_header(place["file"])
            codes = map_codes(header)[place["frame"] : place["frame"] + CTX]
            assert (
                windows[epoch * len(windows) + numbers[window : window + 1]][0].tolist()
                == codes.tolist()
            )
            name, _, part = Path(place["file"]).stem.partition(".shift")
            assert (
                codes.tolist()
                == truth[f"{name}.npq"][int(part[:1] or 0)][place["frame"] :][:CTX].tolist()
            )
            seen[window].append(int(part[:1] or 0))
    whole = [s for s, place in zip(seen, places, strict=True) if "4 of" not in place["file"]]
    assert all(sorted(s) == [0, 0, 1, 1, 2, 2] for s in whole)
    assert all(a[0] != b[0] for a, b in itertools.pairwise(whole)), "neighbours differ"
    if stride < CTX:  # a frame is in two windows: with three encodings, once more after 1.5 epochs
        assert all(len({a[0], b[0], a[1]}) == 3 for a, b in itertools.pairwise(whole))
    used = [Path(p).name for p, n in zip(corpus.paths, train.stop, strict=True) if n]
    encodings = sum(len(truth[name]) for name in used)
    assert len([track.header.path for track in windows.tracks()]) == encodings
    held_out = WindowDataset(corpus.unshifted(), val, ctx=CTX, stride=CTX)
    assert not any(".shift" in p["file"] for p in held_out.describe(np.arange(len(held_out)), 1))


def test_shifted_encodings_stay_on_the_side_of_their_music(tmp_path):
    """The split of music with and without them is the same, and no frame is on both sides."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    for piece in range(40):
        for part in range(3):
            codes = npq1(some_codes(50, seed=3 * piece + part))
            put(both / shifted_name(f"{piece}.npq", part, 3), codes)
            if not part:
                put(alone / f"{piece}.npq", codes)
    sides = []
    for folder in (alone, both):
        corpus = scan_corpus(find_npq_files([folder]), ctx=CTX)
        _, val = split_corpus(corpus, ctx=CTX, val_split=0.3)
        sides.append(
            sorted(os.path.basename(p) for p, n in zip(corpus.paths, val.stop, strict=True) if n)
        )
    assert sides[0] == sides[1]
    assert 5 <= len(sides[0]) < 20
    prints = {scan_corpus(find_npq_files([f]), ctx=CTX).fingerprint() for f in (alone, both)}
    assert len(prints) == 2  # a resume tells that the data changed


def test_a_file_named_as_a_shift_of_longer_music_is_dropped(tmp_path):
    for name, frames in (("a.npq", 60), ("a.shift1of2.npq", 61), ("b.shift1of2.npq", 50)):
        put(tmp_path / name, npq1(some_codes(frames, seed=frames)))
    summary = scan_corpus(find_npq_files([tmp_path]), ctx=CTX).summary
    assert summary.files == 2  # b stands for itself
    assert list(summary.dropped) == ["not as long as the file that its name says it is a shift of"]


def test_mid_side_files_are_not_mixed_with_mono(tmp_path):
    """Fault 19: the same K can mean other columns; what counts is what is left after the cut."""
    stereo, wide, mono = some_codes(50), some_codes(40, 5), some_codes(30)
    paths = [
        put(tmp_path / "3+1", npq2(stereo, 1)),
        put(tmp_path / "3+2", npq2(wide, 2)),
        put(tmp_path / "4+0", npq1(mono)),
    ]
    corpus = scan_corpus(paths, ctx=CTX, codebooks=4)
    assert (corpus.num_codebooks, corpus.side_codebooks) == (4, 1)
    used = {os.path.basename(p) for p in corpus.paths}
    assert used == {"3+1", "3+2"}
    train, _ = split_corpus(corpus, ctx=CTX, val_split=0.0)
    windows = WindowDataset(corpus, train, ctx=40, stride=40)
    expected = {"3+1": stereo[:40].tolist(), "3+2": wide[:40, :4].tolist()}
    assert windows[np.arange(2)].tolist() == [expected[os.path.basename(p)] for p in corpus.paths]
    corpus = scan_corpus(paths, ctx=CTX, codebooks=3)  # the mid channel alone is mono
    assert (corpus.num_codebooks, corpus.side_codebooks, corpus.summary.files) == (3, 0, 3)


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(2**15, torch.int16), (2**15 + 1, torch.int32), (2**20, torch.int32)]
)
def test_batches_are_wide_enough_for_the_vocabulary(tmp_path, vocab, dtype):
    codes = some_codes(40, 2, vocab=vocab)
    codes[0], codes[1] = vocab - 1, 0
    content = npq1(codes, vocab, width=1 if vocab <= 2**16 else 2)
    corpus = scan_corpus([put(tmp_path / "x.npq", content)], ctx=40)
    train, _ = split_corpus(corpus, ctx=40, val_split=0.0)
    batch = WindowDataset(corpus, train, ctx=40, stride=40)[np.array([0])]
    assert batch.dtype == dtype
    assert batch.tolist() == [codes.tolist()]


def all_windows(paths, *, ctx=CTX, stride=CTX) -> WindowDataset:
    corpus = scan_corpus(paths, ctx=ctx)
    train, _ = split_corpus(corpus, ctx=ctx, val_split=0.0)
    return WindowDataset(corpus, train, ctx=ctx, stride=stride)


def test_the_index_grows_with_files_and_not_with_windows(tmp_path):
    """Pitfall 24."""

    def index_bytes(frames, files):
        folder = tmp_path / f"{frames}_{files}"
        for i in range(files):
            put(folder / f"{i:04d}.npq", npq1(np.full((frames, 1), i), width=0, vocab=256))
        windows = all_windows(find_npq_files([folder]), stride=1)
        arrays = [v.nbytes for v in vars(windows).values() if isinstance(v, np.ndarray)]
        return len(windows), sum(arrays), len(pickle.dumps(windows))

    few, few_bytes, few_pickled = index_bytes(frames=20, files=10)
    more, more_bytes, more_pickled = index_bytes(frames=50_000, files=10)
    assert more > 1000 * few
    assert more_bytes == few_bytes < 10 * 200
    assert abs(more_pickled - few_pickled) < 100
    assert index_bytes(frames=20, files=20)[1] == 2 * few_bytes


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


CHANGES = {
    "cut": lambda path: os.truncate(path, 200),
    "emptied": lambda path: os.truncate(path, 0),
    "replaced": lambda path: replace(path, npq1(some_codes(60, seed=9))),
    "replaced by a shorter one": lambda path: replace(path, npq1(some_codes(20, seed=9))),
    "removed": os.unlink,
    "replaced by a folder": lambda path: (os.unlink(path), os.mkdir(path)),
    "replaced by a FIFO": lambda path: (os.unlink(path), os.mkfifo(path)),
}


def replace(path: str, content: bytes) -> None:
    os.replace(put(Path(f"{path}.new"), content), path)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_during_a_run_gives_a_named_error(tmp_path, change):
    """Fault 18: no SIGBUS, no half window, no file left open."""
    path = put(tmp_path / "x.npq", npq1(some_codes(60)))
    windows = all_windows([path])
    assert windows[np.array([0])].tolist() == [some_codes(60)[:CTX].tolist()]
    before = open_descriptors()
    CHANGES[change](path)
    with pytest.raises(NpqError, match=r"x\.npq: file changed during the run"):
        windows[np.array([2])]
    gc.collect()
    assert open_descriptors() == before


def test_a_read_that_fails_gives_a_named_error(tmp_path, monkeypatch):
    path = put(tmp_path / "x.npq", npq1(some_codes(60)))
    windows = all_windows([path])

    def folder(*_) -> int:  # reading a folder fails in the kernel
        return os.open(tmp_path, os.O_RDONLY)

    monkeypatch.setattr(npq_dataset, "open_unchanged", folder)
    with pytest.raises(IsADirectoryError, match=r"x\.npq"):
        windows[np.array([0])]


# --- jitter --------------------------------------------------------------------------------------


def jittered_by_loops(spans, *, ctx, stride, seed, epoch) -> list[list[int]]:
    """First frames of each file's windows, in Python's own numbers."""
    stream = np.random.MT19937(np.random.SeedSequence(seed, spawn_key=(0,)))
    phases = np.random.RandomState(stream).random_sample(len(spans.start))
    files, outside = [], min(stride, ctx) // 2
    for first, stop, phase in zip(spans.start, spans.stop, phases, strict=True):
        last = int(stop - first) - ctx
        count = len(range(0, last + 1, stride))
        share = (float(phase) + epoch * (math.sqrt(5) - 1) / 2) % 1
        files.append([])
        for rank in range(count):
            start = int((rank + share) * ((last + 2 * outside + 1) / count)) - outside
            files[-1].append(int(first) + min(max(start, 0), last))
    return files


def spans_alone(spans: list[tuple[int, int]], **keywords) -> WindowDataset:
    """Windows that can be located but not read."""
    start, stop = np.array(spans, dtype=np.int64).T
    corpus = Corpus([Table([], np.empty(0, FILE_COLUMNS))], (4,), 0, 1.0, DataSummary())
    return WindowDataset(corpus, Spans(start, stop, ""), **keywords)


def places(windows: WindowDataset, epoch: int) -> np.ndarray:
    """[windows, 2]: file and first frame of each."""
    return np.stack(windows.locate(epoch * len(windows) + np.arange(len(windows))), axis=1)


@pytest.mark.parametrize("stride", [1, 7, CTX, 50])
def test_jittered_windows_are_those_of_a_slow_loop(tmp_path, stride):
    truth = write_zoo(tmp_path)
    corpus = scan_corpus(list(truth), ctx=CTX, codebooks=4)
    for spans in split_corpus(corpus, ctx=CTX, val_split=0.2):
        windows = WindowDataset(corpus, spans, ctx=CTX, stride=stride, jitter_seed=5)
        plain = WindowDataset(corpus, spans, ctx=CTX, stride=stride)
        for epoch in (0, 1, 6, 249):
            starts = jittered_by_loops(spans, ctx=CTX, stride=stride, seed=5, epoch=epoch)
            expected = [
                {"file": path, "frame": s}
                for path, of_file in zip(corpus.paths, starts, strict=True)
                for s in of_file
            ]
            assert windows.describe(np.arange(len(windows)), epoch) == expected
            assert len(windows) == len(plain) == len(expected)
            codes = [truth[p["file"]][p["frame"] : p["frame"] + CTX].tolist() for p in expected]
            assert windows[epoch * len(windows) + np.arange(len(windows))].tolist() == codes
            assert (places(plain, epoch) == places(plain, 0)).all()


def test_golden_jitter():
    """Pinned: a resumed run goes on with the windows that another version of numpy began."""
    windows = spans_alone([(0, 2000), (0, 2100), (10, 1500)], ctx=512, stride=256, jitter_seed=0)
    assert places(windows, 0)[:, 1].tolist() == [
        0, 213, 504, 795, 1086, 1377, 82, 345, 609, 872, 1136, 1400, 1588, 10, 200, 509, 818,
    ]  # fmt: skip
    assert places(windows, 7)[:, 1].tolist() == [
        17, 308, 599, 890, 1181, 1471, 0, 168, 431, 695, 958, 1222, 1486, 10, 301, 610, 919,
    ]  # fmt: skip


def test_jitter_depends_on_seed_and_epoch_alone():
    spans = [(0, 300 + 7 * i) for i in range(50)]
    windows = spans_alone(spans, ctx=32, stride=16, jitter_seed=3)
    n = len(windows)
    epochs = [places(windows, epoch) for epoch in range(4)]
    assert all((a != b).any() for i, a in enumerate(epochs) for b in epochs[:i])
    np.random.seed(1)
    torch.manual_seed(1)
    again = spans_alone(spans, ctx=32, stride=16, jitter_seed=3)
    mixed = np.random.default_rng(0).permutation(4 * n)  # epochs in one batch, in any order
    assert (np.stack(again.locate(mixed), axis=1) == np.concatenate(epochs)[mixed]).all()
    other = spans_alone(spans, ctx=32, stride=16, jitter_seed=4)
    assert (places(other, 0) != epochs[0]).any()


lengths = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 400)), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(lengths, st.integers(2, 64), st.integers(1, 500), st.integers(0, 2**40), st.integers(0, 999))
@example([(0, 64), (5, 63)], 64, 32, 0, 0)
@example([(0, 2**32 - 1)], 2, 2**31, 0, 10**6)
def test_no_jittered_window_leaves_its_span_or_its_place(spans, ctx, stride, seed, epoch):
    spans = [(first, first + length) for first, length in spans]
    plain = spans_alone(spans, ctx=ctx, stride=stride)
    if not len(plain):
        return
    file, start = places(spans_alone(spans, ctx=ctx, stride=stride, jitter_seed=seed), epoch).T
    first, stop = np.array(spans).T
    assert (file == places(plain, epoch)[:, 0]).all()
    assert (first[file] <= start).all()
    assert (start + ctx <= stop[file]).all()
    assert (2 * np.abs(start - places(plain, epoch)[:, 1]) <= 3 * stride).all()
    assert (np.diff(start)[np.diff(file) == 0] > 0).all(), "no two windows are the same"
    is_full = stop[file] - first[file] == ctx
    assert (start[is_full] == first[file][is_full]).all(), "there is no room"


@pytest.mark.parametrize("rule", ["whole files", "tails", "list"])
def test_jitter_never_reads_a_validation_frame(rule, many, few, tmp_path):
    """Pitfall 11, in every epoch and to the last frame."""
    corpus = scan_corpus(find_npq_files([few if rule == "tails" else many]), ctx=CTX)
    listed = put(tmp_path / "val.txt", b"003.npq\n007.npq\n") if rule == "list" else None
    train, val = split_corpus(corpus, ctx=CTX, val_split=0.2, val_list=listed)
    assert (val.stop > val.start).any()
    windows = WindowDataset(corpus, train, ctx=CTX, stride=5, jitter_seed=0)
    seen = np.zeros((len(corpus.paths), int(corpus.files["frames"].max())), dtype=bool)
    for epoch in range(60):
        file, start = places(windows, epoch).T
        seen[file[:, None], start[:, None] + np.arange(CTX)] = True
    frame = np.arange(seen.shape[1])
    usable = (train.start[:, None] <= frame) & (frame < train.stop[:, None])
    usable &= (train.stop - train.start >= CTX)[:, None]
    assert (seen == usable).all(), "all that may be read is read, and nothing else"


@pytest.mark.parametrize("frames", [16, 17, 40, 203, 210])
@pytest.mark.parametrize("stride", [1, 4, 7, 8, 16, 24, 100])
def test_jitter_covers_a_file_evenly(frames, stride):
    """Each frame is reached; but for the ends, each about as often as any other."""
    windows = spans_alone([(0, frames)], ctx=CTX, stride=stride, jitter_seed=1)
    epochs = 500
    seen = np.zeros(frames)
    for epoch in range(epochs):
        for start in places(windows, epoch)[:, 1]:
            seen[start : start + CTX] += 1
    mean = epochs * len(windows) * CTX / frames
    assert seen.sum() == pytest.approx(mean * frames)
    assert seen.min() > 0
    if stride > 1 and frames >= 200:  # with a stride of 1 every start is used in each epoch
        assert seen.min() > 0.1 * mean
        inner = seen[CTX:-CTX]
        assert inner.max() < 1.1 * inner.min()
        assert 0.9 * mean < inner.mean() < 1.25 * mean


def test_a_few_epochs_lie_far_apart():
    """The golden ratio: n starts of a window leave no gap of twice their mean distance or more."""
    windows = spans_alone([(0, 512 + 255)], ctx=512, stride=256, jitter_seed=2)
    for n in (4, 10, 30):
        starts = sorted({int(places(windows, e)[0, 1]) for e in range(n)} | {0, 255})
        assert max(np.diff(starts)) < 2 * 512 / n + 2


# --- the order -----------------------------------------------------------------------------------


def epoch_of(order: EpochOrder, epoch: int, start: int = 0) -> list[list[int]]:
    order.epoch, order.start = epoch, start
    batches = [b.tolist() for b in order]
    assert len(batches) == len(order)
    return batches


def test_golden_permutations():
    """Pinned: a resumed run goes on in the order that another version of numpy began."""
    order = EpochOrder(1000, batch=1, accum=1, seed=0)
    assert order.permutation(0)[:8].tolist() == [312, 366, 936, 406, 27, 144, 324, 854]
    assert order.permutation(1)[:8].tolist() == [518, 727, 123, 23, 926, 364, 215, 578]
    large = EpochOrder(100_000, batch=1, accum=1, seed=1234).permutation(7)
    assert hashlib.sha256(large.astype("<i8").tobytes()).hexdigest()[:16] == "809694dd4a056bb0"


def test_a_shuffle_makes_no_second_copy():
    """Pitfall 24: an epoch can have many millions of windows."""
    order = EpochOrder(1_000_000, batch=8, accum=1, seed=0)
    order.epoch, order.start = 3, 16
    tracemalloc.start()
    try:
        next(iter(order))
        assert tracemalloc.get_traced_memory()[1] < 1.1 * 8e6
    finally:
        tracemalloc.stop()


def test_the_order_depends_on_seed_and_epoch_alone():
    """Pitfall 18."""
    order = EpochOrder(200, batch=4, accum=2, seed=5)
    first, second = epoch_of(order, 0), epoch_of(order, 1)
    assert first != second
    np.random.seed(3)
    torch.manual_seed(3)
    again = EpochOrder(200, batch=4, accum=2, seed=5)
    assert epoch_of(again, 1) == second  # without having been through epoch 0
    assert epoch_of(again, 0) == first
    assert epoch_of(EpochOrder(200, batch=4, accum=2, seed=6), 0) != first
    # Other batches, same order of windows.
    wide = EpochOrder(200, batch=8, accum=1, seed=5)
    assert np.array_equal(np.concatenate(epoch_of(wide, 0)), np.concatenate(first))


@pytest.mark.parametrize("windows", [0, 7, 8, 9, 100, 103, 104])
def test_an_epoch_is_whole_groups_of_distinct_windows(windows):
    """Pitfall 3: an optimizer step never sees a part of its micro-batches."""
    batches = epoch_of(EpochOrder(windows, batch=4, accum=2, seed=0), 0)
    assert len(batches) == windows // 8 * 2
    assert all(len(b) == 4 for b in batches)
    used = [w for b in batches for w in b]
    assert len(set(used)) == len(used)
    assert set(used) <= set(range(windows))


def test_numbers_count_on_from_epoch_to_epoch():
    order = EpochOrder(103, batch=4, accum=2, seed=0)
    for epoch in (0, 1, 7):
        given = np.concatenate(epoch_of(order, epoch))
        assert (given - epoch * 103 == order.permutation(epoch)[:96]).all()


def test_start_skips_exactly_what_was_used():
    """Pitfall 18: after every optimizer step of an epoch."""
    order = EpochOrder(103, batch=4, accum=2, seed=0)
    whole = epoch_of(order, 3)
    for steps in range(len(whole) // 2 + 1):
        assert epoch_of(order, 3, start=steps * 8) == whole[steps * 2 :]
