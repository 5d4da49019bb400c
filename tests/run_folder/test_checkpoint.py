"""run_folder/checkpoint.py: hostile files, cuts and flipped bits are refused; exactness."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import re
import resource
import shutil
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from kit.checkpoints import content, in_child, step_of, tiny

from run_folder.checkpoint import (
    FORMAT,
    FORMAT_VERSION,
    REQUIRED_KEYS,
    STATE_KEYS,
    CheckpointError,
    library_versions,
    load_checkpoint,
    map_tensors,
    rng_kept,
    rng_state,
    set_rng_state,
    verify_file,
)
from run_folder.files import save_checkpoint

# --- one file ------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    """Pitfall 13: through the safe reader, which this content passes."""
    path = tmp_path / "x.pt"
    save_checkpoint(tiny(3), path)
    loaded = load_checkpoint(path)
    assert (loaded.pop("format"), loaded.pop("version")) == (FORMAT, FORMAT_VERSION)
    assert content(loaded) == content(tiny(3))
    assert os.listdir(tmp_path) == ["x.pt"]
    assert torch.load(path, weights_only=True)["format"] == FORMAT


def test_a_save_replaces_the_file_and_keeps_other_links_to_the_old_one(tmp_path):
    """Pitfall 12: the old bytes are never written over."""
    save_checkpoint(tiny(1), tmp_path / "x.pt")
    os.link(tmp_path / "x.pt", tmp_path / "kept.pt")
    save_checkpoint(tiny(2), tmp_path / "x.pt")
    assert step_of(tmp_path / "x.pt") == 2
    assert step_of(tmp_path / "kept.pt") == 1


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("form", ["zip", "old torch", "bare pickle", "hidden in the state"])
def test_a_malicious_pickle_never_runs(tmp_path, form):
    """Fault 6: the canary is never created, and is by a reader that is not safe."""
    path, canary = tmp_path / "x.pt", tmp_path / "canary"
    evil = {"format": FORMAT, "version": 1, **tiny(1), "model": Evil(canary)}
    if form == "zip":
        torch.save(Evil(canary), path)
    elif form == "old torch":
        torch.save(evil, path, _use_new_zipfile_serialization=False)
    elif form == "bare pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        load_checkpoint(path)
    assert not canary.exists()
    if form == "bare pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert canary.exists()


def test_a_compressed_entry_is_refused_in_under_a_second(tmp_path):
    """Fault 6: zeros, 128 MiB of them, never unpacked."""
    path, zeros = tmp_path / "x.pt", bytes(1 << 20)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("archive/data.pkl", "w") as entry,
    ):
        for _ in range(128):
            entry.write(zeros)
    assert path.stat().st_size < 1e6
    started = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="compressed"):
            load_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < 1


def test_overlapping_entries_are_refused_in_under_a_second(tmp_path):
    """Fault 6: a thousand names for one stored megabyte."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
        archive.filelist *= 1000
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="overlap"):
        load_checkpoint(path)
    assert time.monotonic() - started < 1


def write_zip(path: Path, pickled: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")


FOREIGN = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello" * 100),
    "empty zip": lambda path: zipfile.ZipFile(path, "w").close(),
    "another zip": lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "b"),
    "no pickle in it": lambda path: write_zip(path, b""),
    "half a pickle": lambda path: write_zip(
        path, pickle.dumps(tiny(1)["history"], protocol=2)[:20]
    ),
    "pop of nothing": lambda path: write_zip(path, b"\x80\x02R."),
    "bare pickle": lambda path: path.write_bytes(pickle.dumps({"format": FORMAT})),
    "a tensor": lambda path: torch.save(torch.ones(3), path),
    "another's dict": lambda path: torch.save({"model": {}}, path),
    "no version": lambda path: torch.save({"format": FORMAT, **tiny(1)}, path),
    "version text": lambda path: torch.save({"format": FORMAT, "version": "1", **tiny(1)}, path),
    "version 0": lambda path: torch.save({"format": FORMAT, "version": 0, **tiny(1)}, path),
    "old torch": lambda path: torch.save(tiny(1), path, _use_new_zipfile_serialization=False),
    "folder": lambda path: path.mkdir(),
    "fifo": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
    "missing": lambda path: None,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, kind):
    """Faults 4 and 6."""
    path = tmp_path / "x.pt"
    FOREIGN[kind](path)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"x\.pt: "):
        load_checkpoint(path)
    assert time.monotonic() - started < 2


def test_a_newer_version_is_refused(tmp_path):
    newer = {"format": FORMAT, "version": FORMAT_VERSION + 1, **tiny(1)}
    torch.save(newer, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"format version 2, this program reads up to 1"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("key", sorted(REQUIRED_KEYS))
def test_a_missing_part_is_named(tmp_path, key):
    """Fault 7: optimizer, scaler, EMA and all else that a resume needs."""
    checkpoint = tiny(1)
    del checkpoint[key]
    save_checkpoint(checkpoint, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=f"lacks {key}") as caught:
        load_checkpoint(tmp_path / "x.pt")
    assert ("--init-from" in str(caught.value)) == (key not in ("ema", "architecture"))
    assert set(STATE_KEYS) <= REQUIRED_KEYS


# --- damage --------------------------------------------------------------------------------------


def flip(path: Path, whole: bytes, bit: int) -> None:
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)


def test_a_checkpoint_cut_at_any_length_is_refused(tmp_path):
    """Fault 4: every length, not some."""
    path = tmp_path / "x.pt"
    save_checkpoint(tiny(1), path)
    for length in range(path.stat().st_size - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match=r"x\.pt: damaged"):
            load_checkpoint(path)


@pytest.mark.parametrize("n", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path, n):
    """Pitfall 13, fault 4: n flips; what loads is bit for bit what was saved."""
    path = tmp_path / "x.pt"
    save_checkpoint(tiny(1), path)
    whole, truth = path.read_bytes(), content(load_checkpoint(path))
    refused = harmless = 0
    for bit in random.Random(0).sample(range(8 * len(whole)), n):
        flip(path, whole, bit)
        try:
            assert content(load_checkpoint(path)) == truth, f"bit {bit} loads other content"
            harmless += 1
        except CheckpointError:
            refused += 1
    print(f"{len(whole)} bytes, {n} flips: {refused} refused, {harmless} without effect")
    assert refused > harmless > 0  # padding, time stamps and attributes are nobody's content


@pytest.mark.parametrize(
    ("field", "bit", "reason"), [(8, 0, "encrypted"), (10, 3, "compressed"), (38, 4, "folder")]
)
def test_a_flipped_bit_in_the_zip_directory_is_found_at_every_entry(tmp_path, field, bit, reason):
    """Fault 4: torch.load would take a "folder" for a tensor and return stale memory."""
    path = tmp_path / "x.pt"
    save_checkpoint(tiny(1), path)
    whole = path.read_bytes()
    records = [found.start() for found in re.finditer(b"PK\x01\x02", whole)]
    assert len(records) > 5
    for record in records:
        flip(path, whole, 8 * (record + field) + bit)
        with pytest.raises(CheckpointError, match=reason):
            load_checkpoint(path)


def test_a_flipped_bit_in_the_records_at_the_zips_end_is_found(tmp_path):
    """Fault 4: END64, its locator and END, which tell readers where the directory is."""
    path = tmp_path / "x.pt"
    save_checkpoint(tiny(1), path)
    whole, free = path.read_bytes(), {*range(4, 16), *range(80, 86)}  # sizes, versions, disks
    for byte in sorted({*range(56 + 20 + 22)} - free):
        flip(path, whole, 8 * (len(whole) - 98 + byte))
        with pytest.raises(CheckpointError, match=r"x\.pt: "):
            load_checkpoint(path)


def test_a_flipped_bit_in_a_tensor_is_always_found(tmp_path):
    """Pitfall 13: torch.load alone reads it in silence."""
    path = tmp_path / "x.pt"
    save_checkpoint(tiny(1), path)
    whole, weights = path.read_bytes(), tiny(1)["model"]["w"].numpy().tobytes()
    start = whole.index(weights)
    for bit in range(0, 8 * len(weights), 5):
        flip(path, whole, 8 * start + bit)
        with pytest.raises(CheckpointError, match="CRC-32"):
            verify_file(path)
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["w"], tiny(1)["model"]["w"])


def test_a_second_directory_behind_the_first_is_refused(tmp_path):
    """Fault 4: zipfile takes the one, torch the other, and no checksum of its entries is looked at.

    Found by benchmarks/fuzz_files.py at example 736,769: a flipped byte, and the end written twice.
    """
    path = tmp_path / "x.pt"
    save_checkpoint(tiny(1), path)
    whole, truth = path.read_bytes(), content(load_checkpoint(path))
    start = whole.index(tiny(1)["model"]["w"].numpy().tobytes())
    broken = bytearray(whole)
    broken[start] ^= 1
    silent = 0
    for at in range(len(whole) - 1200, len(whole), 11):
        path.write_bytes(bytes(broken) + whole[at:])
        with contextlib.suppress(Exception):  # torch alone takes many of them
            loaded = torch.load(path, weights_only=True)
            silent += content(loaded) != truth
        with pytest.raises(CheckpointError, match=r"x\.pt: "):
            load_checkpoint(path)
    assert silent > 10


def test_two_entries_of_one_name_are_refused(tmp_path):
    """Fault 4: zipfile checks the last one, torch may read the first, whatever its case."""
    path = tmp_path / "x.pt"
    save_checkpoint(tiny(1), path)
    for name in ("archive/data.pkl", "archive/DATA.pkl"):
        twice = tmp_path / "twice.pt"
        shutil.copy(path, twice)
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with zipfile.ZipFile(twice, "a") as second:
                second.writestr(name, archive.read("archive/data.pkl"))
        with pytest.raises(CheckpointError, match="one name"):
            load_checkpoint(twice)


def test_a_machine_short_of_memory_is_no_fault_of_the_file(tmp_path):
    """The file is mapped twice: there is room for once, so torch's own mapping fails."""
    path = tmp_path / "x.pt"
    save_checkpoint({**tiny(1), "model": {"w": torch.ones(16 << 20)}}, path)

    def read() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + path.stat().st_size * 3 // 2
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with pytest.raises(MemoryError, match="no memory left to read it"):
            map_tensors(path)

    assert in_child(read) == 0


# --- the random state ----------------------------------------------------------------------------


def test_the_random_state_survives_a_checkpoint_and_a_detour(tmp_path):
    """Pitfall 18."""
    torch.manual_seed(3)
    torch.rand(5)
    save_checkpoint({**tiny(1), "rng": rng_state()}, tmp_path / "x.pt")
    with rng_kept():
        torch.rand(100)
    expected = torch.rand(5)
    torch.rand(7)
    set_rng_state(load_checkpoint(tmp_path / "x.pt")["rng"])
    assert torch.equal(torch.rand(5), expected)


def test_a_device_that_is_not_used_is_not_begun(monkeypatch):
    """A card beside a run on the CPU: asking its generators would begin CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (torch.cuda, torch.cuda.random):
        monkeypatch.setattr(module, "device_count", lambda: 1)
    assert not torch.cuda.is_initialized()
    state = rng_state()
    assert state["cuda"] == []
    set_rng_state({**state, "cuda": [torch.zeros(16, dtype=torch.uint8)]})
    assert not torch.cuda.is_initialized()


def test_versions_that_decide_about_exactness_are_recorded():
    assert library_versions()["torch"] == str(torch.__version__)
    assert library_versions()["numpy"] == np.__version__
