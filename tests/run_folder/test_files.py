"""run_folder/files.py: names, links, killed and failed saves, full disks, falling back."""

from __future__ import annotations

import builtins
import contextlib
import copy
import errno
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import types
from pathlib import Path

import pytest
import torch
from kit.checkpoints import NAME, content, hidden, in_child, step_of, tiny, tree

from run_folder import files as run_files
from run_folder.checkpoint import (
    BackgroundSaver,
    CheckpointError,
    dump,
    load_checkpoint,
    size_of,
    with_tensors,
)
from run_folder.files import RunFiles, find_run, load_latest, run_name, save_checkpoint

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


def test_a_copy_is_one_block_of_memory_and_the_file_is_that_of_the_state(files):
    """Page-locked tensor by tensor it took 1.6 times the state."""
    kinds = [torch.arange(n, dtype=d) for n in (0, 1, 5000) for d in (torch.bfloat16, torch.uint8)]
    state = {**tiny(1), "model": dict(enumerate([*kinds, torch.ones(()), torch.eye(9)[:, 2:4]]))}
    seen = []
    BackgroundSaver().start(state, lambda c: seen.append(c) or files.save(c)).result(30)
    assert content(load_checkpoint(files.latest)["model"]) == content(state["model"])
    copies = [t for t in seen[0]["model"].values() if t.numel()]
    size = copies[-1].data_ptr() + copies[-1].nbytes - copies[0].data_ptr()
    assert 0 < size <= sum(t.nbytes + 64 for t in copies)
    dump(seen[0], at_once := io.BytesIO())
    dump(with_tensors(state, torch.clone), directly := io.BytesIO())
    assert at_once.getvalue() == directly.getvalue()


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
    with pytest.raises(CheckpointError, match="there is no other"):
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
