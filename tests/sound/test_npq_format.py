"""The .npq format: bytes packed by hand, every broken header, writes that fail or are killed."""

from __future__ import annotations

import math
import os
import resource
import signal
import struct
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.npq_bytes import DTYPE, RATE, legacy_a, legacy_b, npq1, npq2, put, some_codes

from sound.npq_format import NpqError, check_codes, map_codes, read_header, write_npq


def refusal(path) -> NpqError:
    with pytest.raises(NpqError) as caught:
        check_codes(read_header(path))
    return caught.value


# --- the format: golden bytes --------------------------------------------------------------------

CODES = [[0, 1, 2], [253, 254, 255], [7, 0, 9], [1, 1, 1]]


@pytest.mark.parametrize("width", [0, 1, 2])
def test_npq1_golden_bytes(tmp_path, width):
    path = put(tmp_path / "x.npq", npq1(CODES, [256, 255, 256], width=width))
    header = read_header(path)
    assert (header.layout, header.num_codebooks, header.side_codebooks) == ("NPQ1", 3, 0)
    assert (header.num_frames, header.codes_offset) == (4, 21 + 4 * 3)
    assert header.frame_rate == struct.unpack("<f", struct.pack("<f", RATE))[0]
    assert (header.bitrate, header.vocab_sizes) == (320.0, (256, 255, 256))
    assert header.file_size == header.expected_size == 33 + 12 * (1, 2, 4)[width]
    codes = map_codes(header)
    assert codes.dtype == np.dtype(DTYPE[width])
    assert codes.tolist() == CODES
    assert not codes.flags.writeable
    check_codes(header)


def test_npq1_codes_use_their_whole_width(tmp_path):
    big = [[0, 65_535, 2**20 - 1]]
    header = read_header(put(tmp_path / "x.npq", npq1(big, 2**20, width=2)))
    assert map_codes(header).tolist() == big
    header = read_header(put(tmp_path / "y.npq", npq1([[65_535]], 65_536)))
    assert map_codes(header).tolist() == [[65_535]]
    check_codes(header)


@pytest.mark.parametrize("width", [0, 1, 2])
def test_npq2_golden_bytes(tmp_path, width):
    header = read_header(put(tmp_path / "x.npq", npq2(CODES, 1, 256, width=width)))
    assert (header.layout, header.num_codebooks, header.side_codebooks) == ("NPQ2", 3, 1)
    assert header.codes_offset == 4 + 2 + 1 + 2 + 2 + 4 + 4 + 4 + 4 * 3 + 1
    assert map_codes(header).tolist() == CODES


def test_npq2_channel_mode_decides_about_side_codebooks(tmp_path):
    assert read_header(put(tmp_path / "mono", npq2(CODES, 0, mode=0))).side_codebooks == 0
    for wrong in (npq2(CODES, 1, mode=0), npq2(CODES, 0, mode=1), npq2(CODES, 1, mode=2)):
        assert "channel mode" in str(refusal(put(tmp_path / "wrong", wrong)))
    assert "channel mode" in str(refusal(put(tmp_path / "all side", npq2(CODES, 3))))
    assert "version" in str(refusal(put(tmp_path / "newer", npq2(CODES, 1, version=2))))


@pytest.mark.parametrize(
    ("pack", "layout", "offset", "bitrate"),
    [(legacy_a, "legacy A", 20 + 4 * 3, 128.0), (legacy_b, "legacy B", 16 + 4 * 3, 0.0)],
)
def test_legacy_golden_bytes(tmp_path, pack, layout, offset, bitrate):
    header = read_header(put(tmp_path / "x.npq", pack(CODES)))
    assert (header.layout, header.codes_offset, header.bitrate) == (layout, offset, bitrate)
    assert map_codes(header).tolist() == CODES
    # Only when the size fits to the byte.
    for wrong in (pack(CODES)[:-1], pack(CODES) + b"\0"):
        assert refusal(put(tmp_path / "y.npq", wrong)).field == "version"


def test_the_writer_emits_golden_bytes(tmp_path):
    codes = np.array([[1, 2], [1023, 511]])
    write_npq(tmp_path / "1", codes, vocab_sizes=[1024, 512], frame_rate=50, bitrate=320)
    assert (tmp_path / "1").read_bytes() == bytes.fromhex(
        "4e505131 0100 0200 00004842 0000a043 02000000 00040000 00020000 01 01000200 ff03ff01"
    )
    for vocab, width in ((2**16, 2), (2**16 + 1, 4)):
        header = write_npq(tmp_path / "w", codes, vocab_sizes=[vocab, 512], frame_rate=50)
        assert header.dtype.itemsize == width
    write_npq(tmp_path / "2", codes, vocab_sizes=[1024, 512], frame_rate=50, side_codebooks=1)
    assert (tmp_path / "2").read_bytes() == bytes.fromhex(
        "4e505132 0100 01 0100 0100 00004842 00000000 02000000 00040000 00020000 01"
        "01000200 ff03ff01"
    )


# --- the format: broken files --------------------------------------------------------------------


@pytest.mark.parametrize("pack", [npq1, lambda codes: npq2(codes, 2)], ids=["NPQ1", "NPQ2"])
def test_every_prefix_is_reported_as_truncated(tmp_path, pack):
    """Pitfall 22, fault 17: a truncated v1 is a truncated v1, never an unknown format."""
    whole = pack(some_codes(20, 9))
    path = put(tmp_path / "x.npq", whole)
    read_header(path)
    for length in range(len(whole) - 1, -1, -1):
        os.truncate(path, length)
        error = refusal(path)
        assert error.field in ("header", "size")
        assert "truncated" in str(error)


@pytest.mark.parametrize("pack", [legacy_a, legacy_b])
def test_every_prefix_of_a_legacy_file_is_refused(tmp_path, pack):
    whole = pack(some_codes(20, 9))
    path = put(tmp_path / "x.npq", whole)
    read_header(path)
    for length in range(len(whole) - 1, -1, -1):
        os.truncate(path, length)
        refusal(path)


def test_every_single_bit_flip_of_a_header(tmp_path):
    """Fault 17: all 456 flips at K = 9 give NpqError or a valid file, nothing else."""
    whole = bytearray(npq1(some_codes(20, 9)))
    refused_at = {}
    for bit in range(57 * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path = put(tmp_path / "x.npq", flipped)
        try:
            header = read_header(path)
            check_codes(header)
            assert header.expected_size == len(whole)
            assert header.num_codebooks == 9
        except NpqError:
            refused_at.setdefault(bit // 8, set()).add(bit % 8)
    # Magic, version, K, T and dtype code: not one flip passes.
    assert all(len(refused_at[byte]) == 8 for byte in (*range(8), *range(16, 20), 56))
    # Frame rate, bitrate and vocabulary hold other sane values, too.
    assert sum(map(len, refused_at.values())) < 456


# What NPQ1 allows, by field: (offset, struct letter, {value: allowed?})
EXTREMES = {
    "version": (4, "H", {0: False, 2: False, 0xFFFF: False}),
    "K": (6, "H", {0: False, 1: False, 65: False, 0xFFFF: False}),
    "frame rate": (8, "f", {0.0: 0, 1.0: 1, 3.4e38: 0, -1.0: 0, math.nan: 0, math.inf: 0}),
    "bitrate": (12, "f", {0.0: 1, 1.0: 1, 3.4e38: 1, -1.0: 0, math.nan: 0, math.inf: 0}),
    "T": (16, "I", {0: False, 1: False, 2**32 - 1: False}),
    "first V": (20, "I", {0: 0, 1: 0, 2**16: 1, 2**16 + 1: 0, 2**32 - 1: 0}),
    "last V": (52, "I", {0: 0, 1: 0, 2**16: 1, 2**16 + 1: 0, 2**32 - 1: 0}),
    "dtype": (56, "B", {0: False, 2: False, 3: False, 255: False}),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_every_field_at_its_extremes(tmp_path, name):
    """Fault 17: 0, 1, max, -1 (max, where there is no sign), NaN and infinity."""
    offset, letter, cases = EXTREMES[name]
    for value, allowed in cases.items():
        content = bytearray(npq1(some_codes(20, 9)))
        struct.pack_into(f"<{letter}", content, offset, value)
        path = put(tmp_path / "x.npq", content)
        if allowed:
            check_codes(read_header(path))
        else:
            refusal(path)


@pytest.mark.parametrize("pack", [legacy_a, legacy_b])
def test_every_legacy_field_at_its_extremes(tmp_path, pack):
    """Fault 17: each 4-byte field at 0, -1, the largest int, NaN and infinity."""
    whole, fields = pack(some_codes(20, 9)), (20 if pack is legacy_a else 16) + 36
    for offset in range(4, fields, 4):
        for bits in (0, 2**32 - 1, 2**31 - 1, 0x7FC00000, 0x7F800000):
            content = bytearray(whole)
            struct.pack_into("<I", content, offset, bits)
            path = put(tmp_path / "x.npq", content)
            try:
                header = read_header(path)
            except NpqError:
                continue
            assert offset == 12  # only layout A's bitrate takes any of these
            assert header.bitrate == 0


def test_huge_numbers_allocate_nothing(tmp_path):
    """Fault 17: T and K at their largest, in every layout: no allocation over 10 MB."""
    lies = [npq1([[1]], frames=2**32 - 1), npq1([[1]], k=0xFFFF), npq1([[1]], k=64)]
    for pack in (legacy_a, legacy_b):
        for offset in range(4, 24, 4):
            content = bytearray(pack(CODES))
            struct.pack_into("<i", content, offset, 2**31 - 1)
            lies.append(bytes(content))
    wide = bytearray(npq2(CODES, 1))
    struct.pack_into("<HH", wide, 7, 0xFFFF, 0xFFFF)
    lies.append(bytes(wide))
    truth = put(tmp_path / "sparse.npq", npq1([[1]], frames=2**32 - 1, width=0, vocab=256))
    os.truncate(truth, 25 + 2**32 - 1)  # really 4 GiB of codes, none of them on the disk
    tracemalloc.start()
    try:
        for lie in lies:
            refusal(put(tmp_path / "x.npq", lie))
        assert read_header(truth).num_frames == 2**32 - 1
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_codes_are_checked_in_bounded_memory(tmp_path):
    path = put(tmp_path / "x.npq", npq1([[1]], frames=32 << 20, width=0, vocab=256))
    os.truncate(path, 25 + (32 << 20))
    tracemalloc.start()
    try:
        check_codes(read_header(path))
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_payload_one_byte_short_or_long(tmp_path):
    """Fault 18."""
    whole = npq1(some_codes(20, 9))
    error = refusal(put(tmp_path / "short.npq", whole[:-1]))
    assert error.field == "size"
    assert "417 bytes, found 416 bytes (truncated)" in str(error)
    error = refusal(put(tmp_path / "long.npq", whole + b"\0"))
    assert "417 bytes, found 418 bytes (too long)" in str(error)


@pytest.mark.parametrize("name", ["fifo", "folder", "dangling", "missing", "device", "nul\0byte"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, name):
    path = tmp_path / name
    if name == "fifo":
        os.mkfifo(path)
    elif name == "folder":
        path.mkdir()
    elif name == "dangling":
        path.symlink_to("nowhere")
    elif name == "device":
        path.symlink_to("/dev/zero")
    started = time.monotonic()
    error = refusal(path)
    assert error.field == "file"
    assert name in str(error)
    assert time.monotonic() - started < 1


def test_an_error_says_path_field_expected_found_and_remedy(tmp_path):
    error = refusal(put(tmp_path / "song.flac", b"fLaC" + bytes(100)))
    assert str(error) == (
        f"{tmp_path}/song.flac: magic: expected NPQ1 or NPQ2, found b'fLaC'; name .npq files only"
    )


def test_each_codebook_has_its_own_vocabulary(tmp_path):
    fine = [[9, 99], [0, 98]]
    check_codes(read_header(put(tmp_path / "x.npq", npq1(fine, [10, 100]))))
    error = refusal(put(tmp_path / "y.npq", npq1([[9, 99], [10, 0]], [10, 100])))
    assert "found 10 in frame 1, codebook 0" in str(error)


def test_a_map_of_a_file_that_changed_since_is_refused(tmp_path):
    path = put(tmp_path / "x.npq", npq1(some_codes(20)))
    header = read_header(path)
    os.truncate(path, 100)
    with pytest.raises(NpqError, match="changed during the run"):
        map_codes(header)


def test_headers_of_many_files_are_small(tmp_path):
    """Pitfall 24: 200,000 of them wait for the codes to be checked."""
    path = put(tmp_path / "a.npq", npq1(some_codes(20, 9)))
    tracemalloc.start()
    try:
        headers = [read_header(path) for _ in range(1000)]
        assert tracemalloc.get_traced_memory()[0] < 500 * len(headers)
    finally:
        tracemalloc.stop()


# --- the writer ----------------------------------------------------------------------------------


@st.composite
def tracks(draw):
    k = draw(st.integers(1, 9))
    vocab = draw(st.lists(st.integers(2, 2**20), min_size=k, max_size=k))
    frames = draw(st.lists(st.tuples(*[st.integers(0, v - 1) for v in vocab]), min_size=1))
    return np.array(frames), vocab, draw(st.integers(0, k - 1))


@settings(max_examples=100, deadline=None)
@given(tracks(), st.floats(0.125, 9_999, width=32), st.floats(0, 1e6, width=32))
def test_write_then_read(tmp_path_factory, track, rate, bitrate):
    codes, vocab, side = track
    path = tmp_path_factory.getbasetemp() / "round_trip.npq"
    written = write_npq(
        path, codes, vocab_sizes=vocab, frame_rate=rate, bitrate=bitrate, side_codebooks=side
    )
    header = read_header(path)
    assert header == written
    assert (header.layout, header.side_codebooks) == ("NPQ2" if side else "NPQ1", side)
    assert header.vocab_sizes == tuple(vocab)
    assert (header.frame_rate, header.bitrate) == (rate, bitrate)
    assert np.array_equal(map_codes(header), codes)
    check_codes(header)


GOOD = {"codes": np.array([[1, 2], [3, 0]]), "vocab_sizes": [1024, 4], "frame_rate": RATE}
REFUSED = {
    "code equal to V": {"codes": np.array([[1, 2], [3, 4]])},
    "negative code": {"codes": np.array([[1, 2], [-1, 0]])},
    "float codes": {"codes": np.ones((2, 2))},
    "bool codes": {"codes": np.ones((2, 2), dtype=bool)},
    "one dimension": {"codes": np.array([1, 2])},
    "no frames": {"codes": np.zeros((0, 2), dtype=int)},
    "no codebooks": {"codes": np.zeros((2, 0), dtype=int), "vocab_sizes": []},
    "65 codebooks": {"codes": np.zeros((2, 65), dtype=int), "vocab_sizes": [4] * 65},
    "70,000 codebooks": {"codes": np.zeros((1, 70_000), dtype=int), "vocab_sizes": [4] * 70_000},
    "another number of sizes": {"vocab_sizes": [1024]},
    "vocabulary of one": {"vocab_sizes": [1024, 1]},
    "vocabulary too large": {"vocab_sizes": [1024, 2**20 + 1]},
    "vocabulary over 32 bits": {"vocab_sizes": [1024, 2**32]},
    "negative vocabulary": {"vocab_sizes": [1024, -4]},
    "frame rate 0": {"frame_rate": 0.0},
    "frame rate that a float32 rounds to 0": {"frame_rate": 1e-46},
    "frame rate that a float32 rounds to 10,000": {"frame_rate": 9_999.9999},
    "frame rate that no float32 holds": {"frame_rate": 1e300},
    "frame rate NaN": {"frame_rate": math.nan},
    "bitrate below 0": {"bitrate": -1.0},
    "bitrate infinite": {"bitrate": math.inf},
    "side codebooks only": {"side_codebooks": 2},
    "too many side codebooks": {"side_codebooks": 3},
    "side codebooks below 0": {"side_codebooks": -1},
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_write_leaves_the_old_file_alone(tmp_path, case):
    path = tmp_path / "x.npq"
    write_npq(path, **GOOD)
    before = path.read_bytes()
    with pytest.raises(NpqError):
        write_npq(path, **{**GOOD, **REFUSED[case]})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.npq"]


def in_child(action) -> int:
    """Run in a forked process; its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def test_a_full_disk_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "x.npq"
    write_npq(path, **GOOD)
    before = path.read_bytes()

    def write_over_the_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        with pytest.raises(OSError, match="File too large"):
            write_npq(path, some_codes(10_000), vocab_sizes=[1024] * 4, frame_rate=RATE)

    assert in_child(write_over_the_limit) == 0
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.npq"]


@pytest.mark.parametrize("place", ["fsync", "replace"])
@pytest.mark.parametrize("before", [True, False])
def test_a_writer_killed_leaves_the_old_file_or_the_new(tmp_path, place, before):
    path = tmp_path / "x.npq"
    write_npq(path, **GOOD)
    old, system_call = path.read_bytes(), getattr(os, place)

    def deadly(*args):
        if not before:
            system_call(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    def write():
        setattr(os, place, deadly)
        write_npq(path, **{**GOOD, "frame_rate": 50.0})

    assert in_child(write) == signal.SIGKILL
    renamed = place == "replace" and not before
    assert read_header(path).frame_rate == pytest.approx(50.0 if renamed else RATE)
    assert len(path.read_bytes()) == len(old)
    assert list(tmp_path.glob("*.npq")) == [path]  # what was left half-written is no .npq
