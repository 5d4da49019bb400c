"""checkpoint.py and files.py of run_folder: killed saves, full disks, flipped bits, the lock."""

from __future__ import annotations

import builtins
import contextlib
import copy
import errno
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
import tracemalloc
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from run_folder import files as run_files
from run_folder.checkpoint import (
    FORMAT,
    FORMAT_VERSION,
    REQUIRED_KEYS,
    STATE_KEYS,
    BackgroundSaver,
    CheckpointError,
    library_versions,
    load_checkpoint,
    rng_kept,
    rng_state,
    set_rng_state,
    size_of,
    verify_file,
)
from run_folder.files import RunFiles, find_run, load_latest, run_name, save_checkpoint
from run_folder.lock import FolderLock

NAME = run_name(4, "t")


def tiny(step: int) -> dict:
    """A checkpoint of every kind of content, told apart by its step."""
    values = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(5, 7, generator=values), "b": torch.zeros(3, dtype=torch.bfloat16)}
    return {
        **{key: {} for key in REQUIRED_KEYS},
        "model": weights,
        "ema": {"w": torch.full((5, 7), torch.nan)},
        "optimizer": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{}]},
        "progress": {"step": step, "best": 1.5, "name": "ü", "none": None},
        "rng": rng_state(),
        "history": [{"epoch": 1, "train": 0.1 + 0.2}],
    }


def content(value):
    """Nested content to compare with ==; tensors as dtype, shape and bytes: NaN equals itself."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.flatten().view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, dict):
        return [(k, content(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [content(v) for v in value]
    return type(value).__name__, repr(value)


def step_of(path: Path) -> int:
    return load_checkpoint(path)["progress"]["step"]


def tree(folder: Path) -> dict[str, object]:
    """Names and bytes of everything in a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else os.lstat(p).st_mode
        for p in sorted(folder.rglob("*"))
    }


def hidden(folder: Path) -> list[str]:
    return [n for n in os.listdir(folder) if n.startswith(".")]


def in_child(action) -> int:
    """Run in a forked process; its wait status."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            action()
            os._exit(0)
        os._exit(1)
    return os.waitpid(pid, 0)[1]


@pytest.fixture
def files(tmp_path) -> RunFiles:
    return RunFiles(tmp_path, NAME)


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


# --- a run's files -------------------------------------------------------------------------------


def test_latest_and_previous_take_turns(files):
    for step in range(1, 5):
        assert files.save(tiny(step)) == files.latest
        assert step_of(files.latest) == step
        assert not files.previous.exists() if step == 1 else step_of(files.previous) == step - 1
    assert sorted(os.listdir(files.folder)) == [files.latest.name, files.previous.name]


def test_names_of_a_run(tmp_path):
    assert (run_name(9), run_name(9, "base512")) == ("rvq_9cb", "rvq_9cb_base512")
    files = RunFiles(tmp_path, "rvq_9cb_base512")
    files.save(tiny(1), best_epoch=7, archive_epoch=12)
    assert files.latest.name == "rvq_9cb_base512_latest.pt"
    assert files.best.name == "rvq_9cb_base512_best.pt"
    assert files.metrics.name == "rvq_9cb_base512_metrics.jsonl"
    stamp = r"__\d{8}-\d{6}\.pt"
    names = " ".join(p.name for k in ("best", "epoch") for p in files.archives(k))
    assert re.fullmatch(
        rf"rvq_9cb_base512_best_e0007{stamp} rvq_9cb_base512_epoch_e0012{stamp}", names
    )


def test_best_latest_and_archives_share_their_bytes(files):
    """Pitfall 16: 2 GB each, once."""
    files.save(tiny(1), best_epoch=1, archive_epoch=1)
    links = [files.latest, files.best, *files.archives("epoch"), *files.archives("best")]
    assert len(links) == 4
    assert len({p.stat().st_ino for p in links}) == 1
    files.save(tiny(2))
    assert step_of(files.best) == 1
    assert files.previous.stat().st_ino == files.best.stat().st_ino
    assert step_of(files.latest) == 2


def no_links(*_, **__):
    raise OSError(errno.EPERM, "this file system has no hard links")


def test_copies_take_the_place_of_links_where_there_are_none(files, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    for step in (1, 2):
        files.save(tiny(step), best_epoch=step, archive_epoch=step)
    paths = [files.latest, files.best, *files.archives("epoch"), *files.archives("best")]
    assert [step_of(p) for p in paths] == [2, 2, 1, 2, 1, 2]
    assert step_of(files.previous) == 1
    assert len({p.stat().st_ino for p in paths}) == 6
    assert not hidden(files.folder)


def test_archives_of_both_kinds_are_pruned_oldest_first(files):
    """Pitfall 16; what `latest`, `previous` and `best` hold is never pruned."""
    files.save(tiny(1), best_epoch=1)
    for epoch in range(2, 9):
        best = epoch if epoch < 6 else None
        files.save(tiny(epoch), best_epoch=best, archive_epoch=epoch, keep_archived=3)
    assert [step_of(p) for p in files.archives("epoch")] == [6, 7, 8]
    assert [step_of(p) for p in files.archives("best")] == [3, 4, 5]
    files.save(tiny(9), archive_epoch=9, keep_archived=1)
    assert [step_of(p) for p in files.archives("epoch")] == [9]
    assert [step_of(p) for p in files.archives("best")] == [5]
    assert (step_of(files.latest), step_of(files.previous), step_of(files.best)) == (9, 8, 5)


def test_pruning_leaves_other_runs_and_files_alone(files):
    other = RunFiles(files.folder, run_name(4, "t2"))
    untagged = RunFiles(files.folder, run_name(4))
    for run in (other, untagged):
        run.save(tiny(1), best_epoch=1, archive_epoch=1)
    (files.folder / "notes.txt").write_text("mine")
    before = tree(files.folder)
    for epoch in range(1, 5):
        files.save(tiny(epoch), best_epoch=epoch, archive_epoch=epoch, keep_archived=1)
    after = tree(files.folder)
    assert {name: after.get(name) for name in before} == before


def test_archives_are_ordered_by_epoch_beyond_four_digits(files):
    for epoch in (9_998, 9_999, 10_000, 10_001):
        files.save(tiny(epoch), archive_epoch=epoch, keep_archived=3)
    assert [step_of(p) for p in files.archives("epoch")] == [9_999, 10_000, 10_001]


def test_two_saves_in_one_second_do_not_collide(files):
    """Fault 23: the same epoch, as after a rescue, five times over."""
    for step in range(1, 6):
        files.save(tiny(step), best_epoch=1, archive_epoch=1)
    for kind in ("epoch", "best"):
        assert [step_of(p) for p in files.archives(kind)] == [1, 2, 3, 4, 5]


def test_a_clock_set_back_changes_no_order(files, monkeypatch):
    """Fault 23: the newest epochs are kept, whatever their dates say."""
    real = run_files.datetime.datetime
    for epoch, year in ((1, 2030), (2, 2029), (3, 2031), (4, 2001)):
        clock = types.SimpleNamespace(now=lambda year=year: real(year, 1, 1))
        monkeypatch.setattr(run_files, "datetime", types.SimpleNamespace(datetime=clock))
        files.save(tiny(epoch), archive_epoch=epoch, keep_archived=2)
    assert [step_of(p) for p in files.archives("epoch")] == [3, 4]
    assert [step_of(p) for p in files.others()[:2]] == [4, 3]


# --- in the background ---------------------------------------------------------------------------


def test_what_is_written_is_the_state_of_the_moment_and_not_of_the_writing(files):
    """Weights, counters and history change while the thread has yet to write."""
    saver, go_on, state = BackgroundSaver(), threading.Event(), tiny(1)
    truth = content(copy.deepcopy(state))
    written = saver.start(state, lambda c: go_on.wait(30) and files.save(c))
    state["model"]["w"].zero_()
    state["optimizer"]["state"][0]["step"] += 1
    state["progress"]["step"] = 99
    state["history"].append({"epoch": 2})
    go_on.set()
    assert written.result(30) == files.latest
    loaded = load_checkpoint(files.latest)
    assert content({key: loaded[key] for key in state}) == truth


def test_the_copys_memory_is_used_again_until_shapes_change(files):
    saver, seen = BackgroundSaver(), []
    for step, rows in ((1, 5), (2, 5), (3, 6)):
        state = {**tiny(step), "model": {"w": torch.full((rows, 7), float(step))}}
        saver.start(state, lambda c: seen.append(c["model"]["w"]) or files.save(c)).result(30)
        assert torch.equal(load_checkpoint(files.latest)["model"]["w"], state["model"]["w"])
    assert seen[0].data_ptr() == seen[1].data_ptr()
    assert seen[2].shape == (6, 7)


def test_a_copy_of_a_view_is_saved_without_the_tensor_behind_it(files):
    state = {**tiny(1), "model": {"w": torch.ones(1_000_000)[:3]}}
    BackgroundSaver().start(state, files.save).result(30)
    assert files.latest.stat().st_size < 100_000


def test_an_error_in_the_background_comes_with_the_result(files):
    (files.folder / f".{files.latest.name}.saving").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        BackgroundSaver().start(tiny(1), files.save).result(30)


def test_the_size_of_a_checkpoint_is_foreseen(files):
    """Never too small, and not much too large."""
    for count in (1, 1000, 300_000):
        state = {**tiny(1), "model": {"w": torch.ones(count)}}
        files.save(state)
        assert files.latest.stat().st_size < size_of(state) < files.latest.stat().st_size + 80_000


# --- a disk that gets full -----------------------------------------------------------------------


def large(step: int) -> dict:
    """About 0.4 MB."""
    return {**tiny(step), "model": {"w": torch.full((100_000,), float(step))}}


def test_the_oldest_archives_make_room_and_only_as_many_as_needed(small_disk):
    """Fault 3, pitfall 16: on a real disk of 3 MB that keeps up to six of these files."""
    files, said = RunFiles(small_disk("3m"), NAME), []
    files.save(large(1), best_epoch=1, archive_epoch=1)  # `best` holds on to these bytes
    for epoch in range(2, 20):
        files.save(large(epoch), archive_epoch=epoch, keep_archived=100, tell=said.append)
        assert step_of(files.latest) == epoch
        assert step_of(files.previous) == epoch - 1
        assert step_of(files.best) == 1
    left = [step_of(p) for p in files.archives("epoch")]
    assert left[0] == 1, "removing it would have freed nothing"
    assert left[1:] == list(range(left[1], 20))
    assert len(left) >= 5
    assert len(said) == left[1] - 2, "one at a time"
    assert re.search(r"0\.\d MB free, 0\.5 MB needed; removed 1 old archives \(0\.4 MB\)", said[0])
    assert "t_epoch_e0002__" in said[0]
    assert not hidden(files.folder)


def test_archives_stay_where_all_of_them_would_not_do(small_disk):
    """Fault 3: the message has the figures, and nothing was given up for it."""
    files = RunFiles(small_disk("3m"), NAME)
    for epoch in range(1, 4):
        files.save(large(epoch), best_epoch=epoch, archive_epoch=epoch)
    before = tree(files.folder)
    huge = {**tiny(9), "model": {"w": torch.ones(1_000_000)}}
    with pytest.raises(
        OSError, match=r"4\.1 MB needed, 1\.\d MB free and 0\.4 MB in arch"
    ) as caught:
        files.save(huge)
    assert caught.value.errno == errno.ENOSPC
    assert tree(files.folder) == before


def test_room_is_never_made_of_what_a_run_may_roll_back_to(small_disk):
    """An archive that is a step checkpoint too frees nothing, and stays."""
    files, said = RunFiles(small_disk("3m"), NAME), []
    files.save(large(1), archive_epoch=1, ring_step=1)
    for epoch in range(2, 12):
        files.save(large(epoch), archive_epoch=epoch, keep_archived=100, tell=said.append)
    assert said
    assert files.ring_steps() == [1]
    left = [step_of(p) for p in files.archives("epoch")]
    assert left[0] == 1
    assert left[1] > 2


def test_both_kinds_of_archives_go_by_age(small_disk):
    """An archive of both kinds frees its bytes when both names are gone."""
    files, said = RunFiles(small_disk("3m"), NAME), []
    for epoch in range(1, 5):
        files.save(large(epoch), best_epoch=epoch, archive_epoch=epoch)
    for epoch in range(5, 9):
        files.save(large(epoch), keep_archived=100, tell=said.append)
    files.save(large(9), archive_epoch=9, tell=said.append)
    files.make_room(shutil.disk_usage(files.folder).free + 300_000, said.append)
    assert "removed 2 old archives (0.4 MB)" in said[-1]
    assert "best_e0001__" in said[-1]
    assert "epoch_e0001__" in said[-1]
    assert [step_of(p) for p in files.archives("epoch")] == [2, 3, 4, 9]


def test_copies_in_place_of_links_are_counted(small_disk, monkeypatch):
    """Once the file system has shown that it has no links, a best save takes four times as much."""
    monkeypatch.setattr(os, "link", no_links)
    files = RunFiles(small_disk("4m"), NAME)
    for step in (1, 2):
        files.save(large(step))
    before = tree(files.folder)
    (files.folder / "filler").write_bytes(bytes(2_300_000))
    with pytest.raises(OSError, match=r"1\.9 MB needed, 1\.\d MB free"):
        files.save(large(3), best_epoch=3)
    assert {**tree(files.folder), "filler": 0} == {**before, "filler": 0}


def test_a_read_only_disk_is_an_os_error(small_disk):
    """Fault 3: a real EROFS."""
    folder = small_disk("3m")
    files = prepared(folder / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    before = tree(files.folder)
    with pytest.raises(OSError, match="Read-only file system"):
        save_third(files)
    assert tree(files.folder) == before
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    assert_sound(files, {2})


# --- saves that fail -----------------------------------------------------------------------------


def prepared(folder: Path) -> RunFiles:
    """Two saves done: latest 2, previous 1, best 1, an archive of each kind and epoch."""
    files = RunFiles(folder, NAME)
    folder.mkdir(parents=True)
    files.save(tiny(1), best_epoch=1, archive_epoch=1)
    files.save(tiny(2), archive_epoch=2)
    return files


def save_third(files: RunFiles) -> None:
    files.save(tiny(3), best_epoch=3, archive_epoch=3, keep_archived=1)


def assert_sound(files: RunFiles, steps: set[int]) -> None:
    """Old or new, never neither; everything with a name loads; the next save mends the rest."""
    checkpoint, path, complaints = load_latest(files)
    assert checkpoint["progress"]["step"] in steps
    assert (path, complaints) == (files.latest, [])
    for path in files.all_files():
        load_checkpoint(path)
    files.remove_leftovers()
    assert not hidden(files.folder)
    before = step_of(files.latest)
    files.save(tiny(9))
    assert (step_of(files.latest), step_of(files.previous)) == (9, before)
    assert not hidden(files.folder)


def die_before_call(number: int) -> list[str]:
    """Patch the system calls of a save so that the process is killed before the n-th of them."""
    calls: list[str] = []

    def counted(name, call):
        def deadly(*args, **kwargs):
            if name != "open" or (len(args) > 1 and args[1] == "wb"):
                calls.append(name)
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return deadly

    for name in ("fsync", "link", "replace", "unlink"):
        setattr(os, name, counted(name, getattr(os, name)))
    builtins.open = counted("open", builtins.open)
    return calls


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_killed_before_each_system_call_of_a_save(tmp_path, links):
    """Fault 2: before open, before and after fsync, each link and replace, and while pruning."""
    template, number, seen = prepared(tmp_path / "0").folder, 0, set()
    while True:
        number += 1
        files = RunFiles(shutil.copytree(template, tmp_path / str(number)), NAME)

        def save(files=files, number=number):
            if not links:
                os.link = no_links
            die_before_call(number)
            save_third(files)

        status = in_child(save)
        if status == 0:
            break
        assert status == signal.SIGKILL
        seen.add((step_of(files.latest), step_of(files.best), len(files.archives("epoch"))))
        assert_sound(files, {2, 3})
    assert number > 15  # so many points there were
    # Old all through; best first (pitfall 14); new before pruning; new and pruned.
    assert seen >= {(2, 1, 2), (2, 3, 3), (3, 3, 3), (3, 3, 1)}
    assert step_of(files.latest) == 3


def test_bytes_are_on_the_disk_before_they_get_a_name(files, tmp_path):
    """Pitfall 12: sync, rename, sync the folder; or power loss leaves a name without content."""
    record = tmp_path / "calls"

    def save():
        calls = die_before_call(0)
        files.save(tiny(1), best_epoch=1)
        record.write_text(" ".join(calls))

    assert in_child(save) == 0
    calls = record.read_text().split()
    assert calls[:2] == ["open", "fsync"]
    assert calls.index("fsync") < calls.index("link") < calls.index("replace")
    assert calls[-1] == "fsync"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_killed_in_the_middle_of_writing(tmp_path, share):
    """Fault 2: by the kernel, at a given byte."""
    files = prepared(tmp_path / "x")
    limit = int(files.latest.stat().st_size * share)

    def save():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save_third(files)

    assert os.WTERMSIG(in_child(save)) == signal.SIGXFSZ
    assert len(hidden(files.folder)) == 1
    assert_sound(files, {2})


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("size", [1, 300_000], ids=["small", "large"])
def test_a_full_disk_is_an_os_error_and_leaves_latest_alone(tmp_path, share, size):
    """Fault 3: OSError, which the trainer survives, and not torch's RuntimeError over it."""
    files = prepared(tmp_path / "x")
    big = {**tiny(3), "model": {"w": torch.ones(size)}}
    save_checkpoint(big, tmp_path / "whole.pt")
    limit, before = int((tmp_path / "whole.pt").stat().st_size * share), tree(files.folder)

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(OSError, match="File too large"):
            files.save(big, best_epoch=3, archive_epoch=3)

    assert in_child(save) == 0
    assert tree(files.folder) == before
    assert_sound(files, {2})


def test_a_device_without_space_is_an_os_error(files):
    """Fault 3: a real ENOSPC."""
    files.save(tiny(1))
    (files.folder / f".{files.latest.name}.saving").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        files.save(tiny(2))
    assert caught.value.errno == errno.ENOSPC
    assert_sound(files, {1})


def test_a_failing_write_is_an_os_error(files):
    """Fault 3: a real EIO; the first page of a process's memory cannot be written."""
    files.save(tiny(1))
    (files.folder / f".{files.latest.name}.saving").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error") as caught:
        files.save(tiny(2))
    assert caught.value.errno == errno.EIO
    assert_sound(files, {1})


def test_a_vanished_folder_is_an_os_error(tmp_path):
    """Fault 3."""
    files = prepared(tmp_path / "x")
    shutil.rmtree(files.folder)
    with pytest.raises(OSError, match="No such file"):
        save_third(files)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", range(1, 6))
@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_a_disk_that_fails_leaves_latest_alone(tmp_path, monkeypatch, call, number, links):
    """Fault 3: an input/output error at each sync and rename; no half-written file stays behind."""
    files, real, calls = prepared(tmp_path / "x"), getattr(os, call), []

    def failing(*args):
        calls.append(call)
        if len(calls) == number:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        if not links:
            patch.setattr(os, "link", no_links)
        with contextlib.suppress(OSError):
            save_third(files)
            assert len(calls) < number  # no error where there was none to come
    assert not hidden(files.folder)
    assert_sound(files, {2, 3})


def test_other_errors_while_saving_stay_what_they_are(files):
    files.save(tiny(1))
    with pytest.raises(Exception, match=r"pickle|local object") as caught:
        files.save({**tiny(2), "history": lambda: None})
    assert not isinstance(caught.value, OSError)
    assert_sound(files, {1})


def test_leftovers_of_this_run_alone_are_removed(files):
    files.save(tiny(1))
    kept = [".lock", f".{run_name(9)}_latest.pt.saving", f".{NAME}_latest.pt", "x.saving"]
    for name in (*kept, f".{NAME}_latest.pt.saving", f".{NAME}_epoch_e0001__2.pt.saving"):
        (files.folder / name).write_text("half")
    files.remove_leftovers()
    assert sorted(os.listdir(files.folder)) == sorted([*kept, files.latest.name])


# --- finding and loading -------------------------------------------------------------------------


def test_a_run_is_found_by_its_tag(tmp_path):
    """Pitfall 15: a tag finds its own run or none, never another."""
    assert find_run(tmp_path, "", None) is None
    assert find_run(tmp_path / "missing", "", None) is None
    RunFiles(tmp_path, run_name(4, "a")).save(tiny(1))
    assert find_run(tmp_path, "a", None).name == "rvq_4cb_a"
    assert find_run(tmp_path, "", None).name == "rvq_4cb_a"  # the only one there is
    assert find_run(tmp_path, "b", None) is None
    assert find_run(tmp_path, "a", 9) is None
    RunFiles(tmp_path, run_name(4, "a_b")).save(tiny(2))
    assert find_run(tmp_path, "a", None).name == "rvq_4cb_a"
    assert find_run(tmp_path, "a_b", None).name == "rvq_4cb_a_b"
    with pytest.raises(CheckpointError, match=r"rvq_4cb_a, rvq_4cb_a_b.*--tag or --resume"):
        find_run(tmp_path, "", None)
    RunFiles(tmp_path, run_name(4)).save(tiny(3))
    assert find_run(tmp_path, "", None).name == "rvq_4cb"  # the untagged one is meant
    RunFiles(tmp_path, run_name(9)).save(tiny(4))
    with pytest.raises(CheckpointError, match="rvq_4cb, rvq_9cb"):
        find_run(tmp_path, "", None)
    assert find_run(tmp_path, "", 9).name == "rvq_9cb"


def test_a_run_is_found_by_previous_alone_and_by_a_dangling_latest(tmp_path):
    """Fault 5: a run whose `latest` is lost is not started anew."""
    files = RunFiles(tmp_path, run_name(4))
    for step in (1, 2):
        files.save(tiny(step))
    files.latest.unlink()
    assert find_run(tmp_path, "", None).name == "rvq_4cb"
    checkpoint, path, complaints = load_latest(files)
    assert (checkpoint["progress"]["step"], path) == (1, files.previous)
    assert "no such checkpoint" in complaints[0]
    files.previous.unlink()
    files.latest.symlink_to("nowhere")
    assert find_run(tmp_path, "", None).name == "rvq_4cb"


DAMAGE = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zero bytes": lambda path: os.truncate(path, 0),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "fifo": lambda path: (path.unlink(), os.mkfifo(path)),
    "dangling": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_latest_falls_back_and_never_costs_the_good_one(files, damage):
    """Fault 4: named, set apart, and the next save does not rotate it over `previous`."""
    for step in (1, 2):
        files.save(tiny(step))
    DAMAGE[damage](files.latest)
    checkpoint, path, complaints = load_latest(files)
    assert (checkpoint["progress"]["step"], path) == (1, files.previous)
    assert len(complaints) == 1
    assert str(files.latest) in complaints[0]
    (aside,) = files.folder.glob(f"{NAME}_damaged_*.pt")
    assert os.path.lexists(aside)
    assert not os.path.lexists(files.latest)
    files.save(tiny(2))
    assert (step_of(files.latest), step_of(files.previous)) == (2, 1)
    assert load_latest(files)[1:] == (files.latest, [])


@pytest.mark.parametrize("damage", DAMAGE)
def test_with_both_damaged_all_is_listed_and_nothing_touched(files, damage):
    """Fault 5: what else could be resumed is offered, newest first."""
    for step in (1, 2, 3):
        files.save(tiny(step), best_epoch=1 if step == 1 else None, archive_epoch=step)
    archives = files.archives("epoch")
    for path in (files.latest, files.previous):  # not through a link, which an archive shares
        os.replace(shutil.copy(path, f"{path}.copy"), path)
        DAMAGE[damage](path)
    before = tree(files.folder)
    with pytest.raises(CheckpointError) as caught:
        load_latest(files)
    message = str(caught.value)
    assert tree(files.folder) == before
    assert f"{files.latest}: " in message
    assert f"{files.previous}: " in message
    assert "--no-resume" in message
    offers = [line.split()[1] for line in message.splitlines() if line.startswith("  --resume")]
    assert offers == [str(p) for p in [*reversed(archives), *files.archives("best"), files.best]]


def test_nothing_to_offer_is_said(files):
    files.latest.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no other one"):
        load_latest(files)
    assert files.latest.read_bytes() == b""


# --- starting anew -------------------------------------------------------------------------------


def test_an_earlier_run_is_set_aside_whole(files):
    """Pitfall 15: a new run overwrites nothing, and other runs stay where they are."""
    other = RunFiles(files.folder, run_name(4, "t2"))
    other.save(tiny(7))
    assert files.set_aside() is None
    for step in (1, 2, 3):
        files.save(tiny(step), best_epoch=step, archive_epoch=step)
    files.metrics.write_text("{}\n")
    (files.folder / "notes.txt").write_text("mine")
    before = tree(files.folder)
    aside = files.set_aside()
    mine = {n for n in before if n.startswith(f"{NAME}_")}
    assert tree(aside) == {n: before[n] for n in mine}
    assert {p.name for p in files.folder.iterdir()} == {*before, aside.name} - mine
    assert find_run(files.folder, "t", 4) is None
    assert files.set_aside() is None


def test_setting_aside_twice_in_one_second_loses_nothing(files):
    """Fault 23."""
    places = []
    for step in (1, 2, 3):
        files.save(tiny(step))
        places.append(files.set_aside())
    assert [step_of(p / files.latest.name) for p in places] == [1, 2, 3]


def test_a_dangling_latest_is_set_aside_too(files):
    files.latest.symlink_to("nowhere")
    aside = files.set_aside()
    assert os.readlink(aside / files.latest.name) == "nowhere"
    assert not os.path.lexists(files.latest)


# --- the lock ------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, ready, seconds: float = 60) -> None:
    with FolderLock(folder):
        ready.set()
        time.sleep(seconds)


def try_lock(folder: Path, answer) -> None:
    try:
        with FolderLock(folder):
            answer.put("")
    except CheckpointError as error:
        answer.put(str(error))


def locked_by(folder: Path) -> str:
    """What another process hears that wants the folder; empty if it gets it."""
    answer = FORK.SimpleQueue()
    process = FORK.Process(target=try_lock, args=(folder, answer))
    process.start()
    process.join()
    return answer.get()


def test_a_second_trainer_is_refused_and_told_who_is_first(tmp_path):
    """Fault 16."""
    folder = tmp_path / "new" / "run"
    with FolderLock(folder):
        message = locked_by(folder)
        assert f"process {os.getpid()} on " in message
        assert str(folder) in message
        assert "--save_dir" in message
        assert f"process {os.getpid()} on " in locked_by(folder)  # the refusal wiped nothing
    assert locked_by(folder) == ""
    assert (folder / ".lock").read_text() == ""


def test_a_killed_trainer_frees_its_folder(tmp_path):
    """Fault 16."""
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    assert f"process {process.pid} " in locked_by(tmp_path)
    process.kill()
    process.join()
    assert locked_by(tmp_path) == ""
    with FolderLock(tmp_path):
        assert f"process {os.getpid()} " in locked_by(tmp_path)
        assert str(process.pid) not in (tmp_path / ".lock").read_text()


def test_a_loader_process_that_outlives_the_trainer_does_not_hold_its_folder(tmp_path):
    """Fault 16: a forked process shares open files, and an flock with them."""
    pids = FORK.SimpleQueue()

    def train():
        with FolderLock(tmp_path):
            pid = os.fork()
            if pid:
                pids.put(pid)
            time.sleep(60)

    process = FORK.Process(target=train)
    process.start()
    loader = pids.get()
    try:
        assert f"process {process.pid} " in locked_by(tmp_path)  # the child's exit of it frees none
        process.kill()
        process.join()
        assert locked_by(tmp_path) == ""
        os.kill(loader, 0)  # alive all the while
    finally:
        os.kill(loader, signal.SIGKILL)


def test_the_lock_is_free_after_an_exception(tmp_path):
    with pytest.raises(ZeroDivisionError), FolderLock(tmp_path):
        1 / 0  # noqa: B018
    assert locked_by(tmp_path) == ""


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


def test_versions_that_decide_about_exactness_are_recorded():
    assert library_versions()["torch"] == str(torch.__version__)
    assert library_versions()["numpy"] == np.__version__
