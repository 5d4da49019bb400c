"""Files made up by Hypothesis: one kind of exception or the truth, whatever the bytes.

`benchmarks/fuzz_files.py` does the same without shrinking, a thousand a second.
"""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path

import fuzz_files
import numpy as np
import pytest
from fuzz_files import (
    BOUNDARIES,
    checkpoint_reader,
    checkpoint_seed,
    content,
    npq_seeds,
    pickle_of,
    put,
    read_npq,
    with_pickle,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from run_folder.checkpoint import load_checkpoint
from sound.npq_format import NpqError, read_header

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of odd pickles
EXAMPLES = pytest.mark.parametrize("n", [100, pytest.param(10_000, marks=pytest.mark.slow)])


def run(n: int, test, *strategies) -> None:
    """The test with n examples; the same ones each time."""
    settings(max_examples=n, deadline=None, derandomize=True, database=None)(
        given(*strategies)(test)
    )()


def numbers(bits: int):
    """Unsigned; often at a boundary."""
    inside = [b for b in BOUNDARIES if b < 1 << bits]
    return st.sampled_from(inside) | st.integers(0, (1 << bits) - 1) | st.integers(0, 20)


# (place, what) with place a share of the length: cut, insert, delete, overwrite.
PLACES = st.floats(0, 1) | st.floats(0, 0.02)
EDITS = st.lists(
    st.tuples(
        PLACES,
        st.tuples(st.just("cut"))
        | st.tuples(st.sampled_from(["insert", "overwrite"]), st.binary(min_size=1, max_size=64))
        | st.tuples(st.just("overwrite"), numbers(32).map(lambda x: struct.pack("<I", x)))
        | st.tuples(st.just("delete"), st.integers(1, 64))
        | st.tuples(st.just("flip"), st.integers(0, 7)),
    ),
    min_size=1,
    max_size=5,
)


def edited(whole: bytes, edits) -> bytes:
    changed = bytearray(whole)
    for share, (kind, *what) in edits:
        at = min(int(share * len(changed)), max(len(changed) - 1, 0))
        if kind == "cut":
            del changed[at:]
        elif kind == "insert":
            changed[at:at] = what[0]
        elif kind == "overwrite":
            put(changed, at, what[0])
        elif kind == "delete":
            del changed[at : at + what[0]]
        elif changed:
            changed[at] ^= 1 << what[0]
    return bytes(changed)


@EXAMPLES
def test_any_header_is_read_as_it_stands_or_refused(n, tmp_path):
    """Fault 17: every field of NPQ1, each on its own, over a payload that may or may not fit."""
    path = tmp_path / "x.npq"

    def check(version, k, rate, bitrate, frames, vocab, width, payload):
        head = struct.pack("<4sHHffI", b"NPQ1", version, k, rate, bitrate, frames)
        sizes = (vocab * 70)[: k % 70]
        fits = frames * k * (1, 2, 4)[width % 3]
        body = bytes(fits) if payload is None and fits < 10_000 else payload or b""
        path.write_bytes(head + struct.pack(f"<{len(sizes)}IB", *sizes, width) + body)
        try:
            header = read_header(path)
        except NpqError:
            return
        assert read_npq(path) in ("valid", "refused")
        if version == 1 and header.num_codebooks == k:
            assert (header.num_frames, list(header.vocab_sizes)) == (frames, sizes)
            assert math.isclose(header.frame_rate, rate, rel_tol=1e-6)

    floats = st.floats(width=32) | st.sampled_from([86.1, 0.0, 1.0, 9_999.0])
    likely = st.integers(1, 9)
    run(n, check, st.just(1) | numbers(16), likely | numbers(16), floats, floats,
        likely | numbers(32), st.lists(numbers(32) | st.integers(2, 1024), min_size=1, max_size=9),
        st.integers(0, 2) | numbers(8), st.none() | st.binary(max_size=200))  # fmt: skip


@EXAMPLES
def test_any_edit_of_an_npq_is_refused_or_true(n, tmp_path):
    """Faults 17 and 18: all layouts."""
    seeds, path = npq_seeds(tmp_path), tmp_path / "x.npq"

    def check(seed, edits):
        path.write_bytes(edited(seed, edits))
        assert read_npq(path) in ("valid", "refused")

    run(n, check, st.sampled_from(seeds), EDITS)


@EXAMPLES
def test_any_edit_of_a_checkpoint_is_refused_or_without_effect(n, tmp_path):
    """Fault 4."""
    whole, path = checkpoint_seed(tmp_path), tmp_path / "x.pt"
    read = checkpoint_reader(content(load_checkpoint(tmp_path / "seed.pt")))

    def check(edits):
        path.write_bytes(edited(whole, edits))
        assert read(path) in ("valid", "refused")

    run(n, check, EDITS)


@EXAMPLES
def test_any_edit_of_a_pickle_under_a_right_checksum_is_refused_or_a_checkpoint(n, tmp_path):
    """Fault 6: what the CRC-32 cannot catch meets the safe reader."""
    whole, path = checkpoint_seed(tmp_path), tmp_path / "x.pt"
    pickled, read = pickle_of(whole), checkpoint_reader(None)

    def check(edits):
        path.write_bytes(with_pickle(whole, edited(pickled, edits)))
        assert read(path) in ("valid", "refused")

    run(n, check, EDITS)


def test_the_fast_mutator_counts_and_keeps_what_fails(tmp_path, monkeypatch, capsys):
    """1,000 examples; then a reader that is broken on purpose must be found out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fuzz_files.py", "--count", "1000"])
    assert fuzz_files.main() == 0
    assert "0 of 1000 failed" in capsys.readouterr().out
    monkeypatch.setattr(fuzz_files, "NpqError", KeyError)
    assert fuzz_files.main() == 1
    monkeypatch.undo()
    (kept,) = tmp_path.glob("fuzz_npq_0_*.bin")
    assert str(kept) in capsys.readouterr().out
    assert read_npq(kept) == "refused"


def test_what_the_mutator_calls_valid_is_what_was_written(tmp_path):
    """The seeds themselves are valid, so a refusal is the edit's doing."""
    for number, seed in enumerate(npq_seeds(tmp_path)):
        path = Path(tmp_path / f"{number}.npq")
        path.write_bytes(seed)
        assert read_npq(path) == "valid"
        assert np.asarray(read_header(path).vocab_sizes).min() >= 2
    whole = checkpoint_seed(tmp_path)
    (tmp_path / "again.pt").write_bytes(with_pickle(whole, pickle_of(whole)))
    read = checkpoint_reader(content(load_checkpoint(tmp_path / "seed.pt")))
    assert read(tmp_path / "again.pt") == "valid"
