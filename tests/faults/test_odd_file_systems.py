"""File systems that lack a part of POSIX: one warning, and everything works.

Fault 25: CIFS, NFS, Lustre, FUSE, shared folders. Calls are refused in real processes by
`odd_file_system.c`, with the numbers that such file systems give.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kit import processes
from kit.checkpoints import assert_same_tensors
from kit.trainer import ROOT, TINY, start_trainer, wait_for

from run_folder.checkpoint import load_checkpoint

# Everything that a run, the encoder and shared weights do to files, three times over, in seconds.
WORK = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import numpy as np
import torch
from cli.disk import replace_file
from run_folder.checkpoint import load_checkpoint
from run_folder.files import RunFiles, load_latest, run_name
from run_folder.lock import FolderLock
from sound.npq_format import map_codes, read_header, write_npq

folder = Path(sys.argv[1])
codes = np.arange(80).reshape(40, 2) % 64
parts = ("model", "ema", "optimizer", "scaler", "guard", "progress", "rng", "architecture", "flags",
         "data", "history", "libraries")
with FolderLock(folder):
    files = RunFiles(folder, run_name(4))
    for step in range(1, 7):
        state = {{**dict.fromkeys(parts, {{}}), "model": {{"w": torch.full((100,), float(step))}}}}
        files.save(state, best_epoch=step, archive_epoch=step, ring_step=step, keep_archived=2)
        replace_file(folder / "page.html", b"page %d" % step, durable=True)
        write_npq(folder / "codes.npq", codes, vocab_sizes=[64] * 2, frame_rate=86.13)
    checkpoint, path, complaints = load_latest(files)
    assert not complaints and path == files.latest
    assert checkpoint["model"]["w"][0] == 6
    assert load_checkpoint(files.previous)["model"]["w"][0] == 5
    assert load_checkpoint(files.best)["model"]["w"][0] == 6
    assert (folder / "page.html").read_bytes() == b"page 6"
    assert (map_codes(read_header(folder / "codes.npq")) == codes).all()
    files.remove_leftovers()
hidden = sorted(p.name for p in folder.iterdir() if p.name.startswith("."))
print("left", *hidden)
"""


def work(env: dict[str, str], faults: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Do all that in a folder whose file system refuses some calls."""
    folder.mkdir(exist_ok=True)
    return processes.run(
        [sys.executable, "-c", WORK, str(folder)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**env, "FAULTS": faults, "FAULTS_IN": str(folder)},
    )


# A warning of each call that is not offered, which stands beside the numbers it may refuse by.
WARNED = {
    "fsync-folder": "cannot sync a folder", "open-folder": "cannot sync a folder",
    "fsync-file": "cannot sync a file", "flock": "has no locks", "replace": "cannot rename over",
}  # fmt: skip
REFUSED = [
    "fsync-folder=EINVAL flock=ENOLCK replace=EPERM link=EPERM statvfs=ENOSYS",
    "fsync-folder=ENOTSUP flock=ENOSYS replace=EEXIST link=EMLINK mmap=ENODEV",
    "fsync-folder=ENOSYS flock=ENOTSUP replace=ENOTSUP chmod=EPERM utime=EPERM",
    "fsync-folder=EBADF flock=EINVAL replace=EBUSY fsync-file=EINVAL",
    "fsync-folder=EACCES fsync-file=ENOSYS",
    "open-folder=EACCES",
    "unlink=EPERM",
]


def numbered(faults: str) -> str:
    """Names of errors as the numbers that the kernel gives."""
    calls = (fault.partition("=") for fault in faults.split())
    return " ".join(f"{call}={getattr(errno, name)}" for call, _, name in calls)


@pytest.mark.parametrize("faults", REFUSED)
def test_calls_that_are_not_offered_cost_a_warning_each_at_most(faults, tmp_path, odd_file_system):
    done = work(odd_file_system, numbered(faults), tmp_path / "run")
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    if faults.startswith("unlink"):  # a line for each file that is left
        assert said
        assert all("cannot be removed (Operation not permitted); going on" in s for s in said)
        return
    expected = {WARNED[c] for c in re.findall(r"([\w-]+)=", faults) if c in WARNED}
    assert len(said) == len(expected), said
    assert all(any(words in line for line in said) for words in expected), said
    assert done.stdout == "left .lock\n"


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("call", ["fsync-file", "fsync-folder"])
def test_what_says_that_data_was_not_written_is_an_error(call, name, tmp_path, odd_file_system):
    done = work(odd_file_system, numbered(f"{call}={name}"), tmp_path / "run")
    assert done.returncode == 1
    assert os.strerror(getattr(errno, name)) in done.stderr


ALL = "fsync-folder=EINVAL flock=ENOLCK chmod=EPERM link=EPERM replace=EPERM statvfs=ENOSYS"


def test_a_run_on_the_oddest_file_system_ends_as_on_a_plain_one(tunes, tmp_path, odd_file_system):
    """Killed by SIGKILL on the way, and resumed without a manual step."""
    odd, plain = tmp_path / "odd", tmp_path / "plain"
    env = {**odd_file_system, "FAULTS": numbered(ALL), "FAULTS_IN": str(odd)}
    flags = [*TINY, "--data", tunes, "--epochs", "3", "--archive-every", "1"]
    flags += ["--save-every-minutes", "0.001"]
    process = start_trainer(*flags, "--save_dir", odd, env=env)
    wait_for(lambda: (odd / "rvq_4cb_latest.pt").exists() or process.poll() is not None)
    process.kill()
    process.communicate()
    process = start_trainer(*flags, "--save_dir", odd, env=env)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    warnings = [line for line in output.splitlines() if line.startswith("! ")]
    assert sorted(w.partition(": this file system ")[2][:18] for w in warnings) == [
        "cannot rename over", "cannot sync a fold", "has no locks (No l"
    ], output  # fmt: skip
    process = start_trainer(*flags, "--save_dir", plain)
    assert process.wait(timeout=100) == 0
    same = ("model", "ema", "optimizer", "rng", "guard")
    ends = [load_checkpoint(f / "rvq_4cb_latest.pt") for f in (odd, plain)]
    assert_same_tensors(*({name: end[name] for name in same} for end in ends))
    assert not list(odd.glob("*.saving")) + list(odd.glob(".*.replaced"))
    assert not (odd / ".lock_without_flock").exists()


def test_latest_is_called_the_last_good_one_only_while_it_is(tunes, tmp_path, odd_file_system):
    """A folder that cannot be synced for an EIO: the new file has the name already."""
    env = {**odd_file_system, "FAULTS": numbered("fsync-folder=EIO"), "FAULTS_IN": str(tmp_path)}
    process = start_trainer(
        *TINY, "--data", tunes, "--save_dir", tmp_path, "--epochs", "1", env=env
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "failed (Input/output error" in output
    assert "rvq_4cb_latest.pt is the new one, which a power cut may still destroy" in output
    assert "last good one" not in output


# --- files that cannot be read now ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["EACCES", "EMFILE", "ESTALE"])
def test_a_latest_that_cannot_be_read_now_is_not_called_damaged(
    name, tunes, adamw_run, tmp_path, odd_file_system
):
    """It would be renamed, and the run would go on from an older state."""
    folder = tmp_path / "run"
    shutil.copytree(adamw_run, folder)
    before = {p.name: p.read_bytes() for p in folder.glob("*.pt")}
    latest = folder / "rvq_4cb_latest.pt"
    env = {**odd_file_system, "FAULTS": numbered(f"open-read={name}"), "FAULTS_IN": str(latest)}
    process = start_trainer(*TINY, "--data", tunes, "--save_dir", folder, env=env)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert f"! {latest}: {os.strerror(getattr(errno, name))}" in output
    assert {p.name: p.read_bytes() for p in folder.glob("*.pt")} == before


@pytest.mark.parametrize(("name", "code"), [("EMFILE", 1), ("ETIMEDOUT", 1), ("EIO", 0)])
def test_only_files_that_are_bad_themselves_are_passed_over(
    name, code, tunes, tmp_path, odd_file_system
):
    """Else one descriptor short, and a run trains on other data than it was given."""
    fault = {"FAULTS": numbered(f"open-read={name}"), "FAULTS_IN": str(tunes / "2.npq")}
    flags = [*TINY, "--data", tunes, "--save_dir", tmp_path, "--skip-bad-files", "--plan"]
    process = start_trainer(*flags, env={**odd_file_system, **fault})
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    if code:
        assert f"2.npq: {os.strerror(getattr(errno, name))}" in output
    else:
        assert "dropped  1 files" in output


# --- encoder, sampling, doctor --------------------------------------------------------------------


def command(
    env: dict[str, str], faults: str, folder: Path, *words: str | Path
) -> subprocess.CompletedProcess[str]:
    return processes.run(
        [sys.executable, str(ROOT / words[0]), *map(str, words[1:])],
        capture_output=True,
        text=True,
        timeout=100,
        env={**env, "FAULTS": numbered(faults), "FAULTS_IN": str(folder)},
    )


def test_the_encoder_works_there_too(tmp_path, odd_file_system):
    import soundfile

    (tmp_path / "music").mkdir()
    tone = np.sin(np.arange(44_100) / 20) * 0.3
    soundfile.write(tmp_path / "music" / "a.wav", tone, 44_100)
    faults = f"{ALL} mmap=ENODEV fsync-file=EINVAL utime=EPERM"
    out, wav = ("--out-dir", tmp_path / "out"), ("--out-dir", tmp_path / "wav")
    for words in (
        (tmp_path / "music", *out, "--codec", "demo"),
        (tmp_path / "out", "--decode", *wav, "--codec", "demo"),
        (tmp_path / "out", "--info"),
    ):
        done = command(odd_file_system, faults, tmp_path, "encode_npq.py", *words)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "a.npq").stat().st_mode & 0o777 == 0o666 & ~umask()
    assert soundfile.info(tmp_path / "wav" / "a.wav").frames > 40_000


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_sampling_and_the_doctor_read_there_too(adamw_run, tmp_path, odd_file_system):
    """Without maps: weights to share and checkpoints are read instead, and none is accused."""
    faults, shared = "mmap=ENODEV", tmp_path / "x.safetensors"
    best = adamw_run / "rvq_4cb_best.pt"
    sampler = ("sample_rvq.py", best, "--export-safetensors", shared)
    assert command(odd_file_system, faults, tmp_path, *sampler).returncode == 0
    drawn = tmp_path / "x.npq"
    sampler = ("sample_rvq.py", shared, "--npq-out", drawn, "--frames", "20")
    done = command(odd_file_system, faults, tmp_path, *sampler)
    assert done.returncode == 0, done.stderr
    plain = command(odd_file_system, "", adamw_run, "ckpt_doctor.py", adamw_run, "--json", "-")
    odd = command(odd_file_system, faults, adamw_run, "ckpt_doctor.py", adamw_run, "--json", "-")
    assert json.loads(plain.stdout) == json.loads(odd.stdout)
    assert plain.returncode == odd.returncode


# --- one trainer per folder, without locks --------------------------------------------------------

HOLD = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from cli.command_line import problem
from run_folder.checkpoint import CheckpointError
from run_folder.lock import FolderLock
try:
    with FolderLock(sys.argv[1]):
        print("mine", flush=True)
        time.sleep(float(sys.argv[2]))
except CheckpointError as error:
    print(error, flush=True)
"""


class Holder:
    """A process that wants a folder, with locks or without."""

    def __init__(self, env: dict[str, str], folder: Path, seconds: float, *, locks: bool = False):
        faults = {} if locks else {"FAULTS": numbered("flock=ENOLCK")}
        self.process = processes.Popen(
            [sys.executable, "-c", HOLD, str(folder), str(seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**env, **faults},
        )

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@pytest.mark.parametrize("locks", [(False, False), (False, True)], ids=str)
def test_a_second_trainer_is_refused_without_locks(locks, tmp_path, odd_file_system):
    """Fault 16; also where the second one could lock."""
    first = Holder(odd_file_system, tmp_path, 60, locks=locks[0])
    assert first.answer() == "mine\n"
    answer = Holder(odd_file_system, tmp_path, 0, locks=locks[1]).answer()
    assert f"{tmp_path}: in use by process {first.process.pid} on " in answer
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    assert Holder(odd_file_system, tmp_path, 0, locks=locks[1]).answer() == "mine\n"


def test_the_claim_goes_with_its_holder(tmp_path, odd_file_system):
    holder = Holder(odd_file_system, tmp_path, 0)
    assert holder.answer() == "mine\n"
    holder.process.wait()
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_a_holder_on_another_machine_is_believed_and_the_remedy_named(tmp_path, odd_file_system):
    claim = tmp_path / ".lock_without_flock"
    claim.write_text("1\nnode7\n12345\n")
    for locks in (False, True):
        answer = Holder(odd_file_system, tmp_path, 0, locks=locks).answer()
        assert "in use by process 1 on node7; wait for it" in answer
        assert answer.endswith(f"if it has ended, unseen by this machine, remove {claim}\n")
    claim.unlink()
    assert Holder(odd_file_system, tmp_path, 0).answer() == "mine\n"


def test_a_process_number_that_was_given_again_holds_nothing(tmp_path, odd_file_system):
    """By the time at which the process began."""
    first = Holder(odd_file_system, tmp_path, 60)
    assert first.answer() == "mine\n"
    claim = tmp_path / ".lock_without_flock"
    _, *rest = claim.read_text().splitlines()
    first.process.kill()
    first.process.wait()
    claim.write_text("\n".join((str(os.getpid()), *rest)) + "\n")
    assert Holder(odd_file_system, tmp_path, 0).answer() == "mine\n"


def test_of_many_that_find_a_dead_holder_one_gets_the_folder(tmp_path, odd_file_system):
    first = Holder(odd_file_system, tmp_path, 60)
    assert first.answer() == "mine\n"
    first.process.kill()
    first.process.wait()
    many = [Holder(odd_file_system, tmp_path, 8) for _ in range(6)]
    answers = [each.answer() for each in many]
    assert answers.count("mine\n") == 1, answers
    assert all("in use by process" in a for a in answers if a != "mine\n")


def test_a_crash_between_two_renames_loses_no_name(tmp_path):
    from run_folder.files import RunFiles

    files = RunFiles(tmp_path, "rvq_4cb")
    (tmp_path / ".rvq_4cb_best.pt.replaced").write_bytes(b"best")
    (tmp_path / ".rvq_4cb_latest.pt.replaced").write_bytes(b"old")
    files.latest.write_bytes(b"new")
    files.remove_leftovers()
    assert files.best.read_bytes() == b"best"
    assert files.latest.read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rvq_4cb_best.pt", "rvq_4cb_latest.pt"]
