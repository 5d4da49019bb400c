"""What a stranger does wrong with train_rvq.py: one line that says what to do, and nothing lost."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kit import processes
from kit.trainer import ROOT, TINY, start_trainer, wait_for

import train_rvq
from sound.npq_format import write_npq

MAIN = [sys.executable, str(ROOT / "train_rvq.py")]


@pytest.fixture(scope="module")
def place(tunes, tmp_path_factory) -> Path:
    """A folder of things to get wrong, with a finished run in `run`."""
    place = tmp_path_factory.mktemp("place")
    flags = ["--data", str(tunes), "--save_dir", str(place / "run"), "--max-steps", "16", "--quiet"]
    assert train_rvq.main([*TINY, *flags, "--no-report"]) == 0
    latest = (place / "run" / "rvq_4cb_latest.pt").read_bytes()
    (place / "cut.pt").write_bytes(latest[: len(latest) // 2])
    torch.save({"weights": torch.ones(3)}, place / "other.pt")
    torch.save(torch.nn.Linear(2, 2), place / "module.pt")
    (place / "weights.safetensors").write_bytes(b"\x10" + bytes(30))
    (place / "file").write_text("keep me")
    (place / "empty").mkdir()
    (place / "sound").mkdir()
    (place / "sound" / "a.wav").write_bytes(b"RIFF" + bytes(100))
    (place / "all.txt").write_text("0.npq\n1.npq\n2.npq\n3.npq\n")
    (place / "wrong.txt").write_text("no.npq\n")
    shutil.copytree(tunes, place / "broken")
    os.truncate(place / "broken" / "2.npq", 100)
    codes = torch.randint(128, (300, 4), generator=torch.Generator().manual_seed(0)).numpy()
    write_npq(place / "v128.npq", codes, vocab_sizes=[128] * 4, frame_rate=86.13)
    return place


def files_of(folder: Path) -> dict[str, bytes]:
    """All but the lock, and the record of files that were checked, which is made again."""
    passing = (".lock", ".checked_files.json")
    kept = (p for p in folder.rglob("*") if p.is_file() and p.name not in passing)
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


def ending(flags: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard error of a call in this process."""
    try:
        code = train_rvq.main(flags)
    except SystemExit as error:
        code = int(str(error.code))
    return code, capsys.readouterr().err


# Flags, exit code, words of the remedy. "{p}" is the place; RUN goes on with the finished run.
RUN = "--save_dir {p}/run --max-steps 24 "
USES = [
    ("", 2, "--data"),
    ("--data {p}/nowhere", 1, "name folders, .npq files or quoted globs"),
    ("--data {p}/empty", 1, "name folders, .npq files or quoted globs"),
    ("--data {p}/sound", 1, "encode_npq.py makes .npq of audio"),
    ("--data {p}/nowhere\udcff", 1, "name folders, .npq files or quoted globs"),
    ("--data=~nobody_here/toks", 2, "write ./~nobody_here/toks for that very name"),
    ("--val-list a.txt --val-list b.txt", 2, "--val-list: is given twice, with other values"),
    ("--lr -1e-3", 2, "--lr: expected a number > 0"),
    ("--lr nan", 2, "--lr: expected a number > 0"),
    ("--lr 1e300", 2, "--lr: expected a number < 1e+30, found '1e300'"),
    ("--eta-min 1", 2, "lower it, or raise --lr"),
    ("--dropout 1.5", 2, "expected a number >= 0 and < 1"),
    ("--row-decay x", 2, "expected auto or a number >= 0, found 'x'"),
    ("--layers 1000000", 2, "--layers: expected 1 to 1000"),
    ("--d_model 65536 --heads 1024 --layers 900", 2, "this machine has"),
    ("--d_model 63", 2, "even number of channels per head"),
    ("--heads 5", 2, "--heads 5"),
    ("--device cuda:7", 2, "--device cuda:7"),
    ("--device gpu", 2, "expected cuda, cuda:1, mps or cpu"),
    ("--device gpu --plan", 2, "expected cuda, mps or cpu"),
    ("--num_workers 1000000", 2, "--num_workers: expected 0 to 256"),
    ("--batch 0", 2, "expected auto or a whole number >= 1, found '0'"),
    ("--batch some", 2, "expected auto or a whole number"),
    ("--batch 1000000000", 2, "lower these, --ctx or --step, or add data"),
    ("--batch auto --accum 2", 2, "leave it out, or give --effective-batch"),
    ("--memory-gb 0 --plan", 2, "expected a number > 0"),
    ("--mfu 2 --plan", 2, "expected a number > 0 and <= 1"),
    ("--effective-batch 7", 2, "--batch can be one of [1, 7]"),
    ("--cb-weights 1,2", 2, "expected 4 numbers"),
    ("--cb-weights nan --plan", 2, "--cb-weights: expected 4 numbers >= 0 and not all 0"),
    ("--cb-weights 0,0,0,0", 2, "expected 4 numbers >= 0 and not all 0"),
    ("--cb-weights -1,2,3,4", 2, "expected 4 numbers >= 0 and not all 0"),
    ("--val-list {p}/all.txt", 2, "shorten it"),
    ("--val-list {p}/wrong.txt", 2, "write base names or paths that --data matches"),
    ("--val-list {p}/no.txt", 2, "--val-list"),
    ("--labels folder", 2, "expected folders or a CSV file, found 'No such file or directory'"),
    ("--labels {p}/file", 2, "--labels: "),
    ("--val-list {p}", 2, "expected a text file of validation files, found 'Is a directory'"),
    ("--tag a\nb", 2, "--tag: expected at most 100 letters"),
    ("--tensorboard --save_dir {p}/\udcff", 2, "--save_dir whose path is text (UTF-8)"),
    ("--compile=3", 2, "takes no value, found '3'"),
    ("--maxsteps 3", 2, "did you mean --max-steps?"),
    ("rubbish", 2, "a glob or a path with blanks in quotes"),
    ("--save_dir {p}/file", 1, "expected a folder or nothing there"),
    ("--save_dir {p}/file/below", 1, "expected a folder or nothing there"),
    ("--save_dir=", 2, "--save_dir: expected a path, found ''"),
    ("--resume=", 2, "--resume: expected a path, found ''"),
    (RUN + "--resume {p}/no.pt", 1, "no such checkpoint; check the path"),
    (RUN + "--resume {p}/cut.pt", 1, "give a .pt file of train_rvq.py"),
    (RUN + "--resume {p}/other.pt", 1, "give a .pt file of train_rvq.py"),
    (RUN + "--resume {p}/module.pt", 1, "give a .pt file of train_rvq.py"),
    (RUN + "--resume {p}/weights.safetensors", 2, "use --init-from"),
    (RUN + "--resume x.pt --init-from y.pt", 2, "give one"),
    (RUN + "--resume x.pt --no-resume", 2, "contradict"),
    (RUN + "--data {p}/v128.npq --accum 1", 1, "or start anew with --no-resume"),
    (RUN + "--init-from {p}/no.pt --no-resume", 1, "no such checkpoint; check the path"),
    (RUN + "--ctx 16", 1, "ctx 32 -> 16"),
    (RUN + "--optim adamw", 1, "start from its weights alone with --init-from"),
    (RUN + "--d_model 64 --ignore-arch", 1, "leave out --ignore-arch"),
]


@pytest.mark.parametrize(("use", "code", "remedy"), USES, ids=[use for use, *_ in USES])
def test_a_mistake_is_one_line_that_says_what_to_do(use, code, remedy, place, tunes, capsys):
    words = [w.format(p=place, tunes=tunes) for w in use.split(" ") if w]
    data = [] if "--data" in use or not use else ["--data", str(tunes)]
    where = [] if "--save_dir" in use else ["--save_dir", str(place / "new")]
    before = files_of(place)
    found, said = ending([*TINY, *data, *where, *words], capsys)
    assert found == code, said
    assert said.startswith("! "), said
    assert said.count("\n") == 1, said
    assert remedy in said
    assert files_of(place) == before


@pytest.mark.parametrize(
    ("damage", "use", "first"),
    [
        ((), "--data {p}/broken", "mend or remove them, or pass --skip-bad-files"),
        ((), "--ctx 5000", "change --ctx or --codebooks, or the data"),
        ((), "--codebooks 99", "change --ctx or --codebooks, or the data"),
        (("latest", "previous"), "", "resume as below, or start anew with --no-resume"),
    ],
    ids=["broken", "ctx", "codebooks", "damaged"],
)
def test_a_list_says_first_what_to_do(damage, use, first, place, tunes, tmp_path, capsys):
    save_dir = tmp_path / "run"
    shutil.copytree(place / "run", save_dir)
    for name in damage:
        os.truncate(save_dir / f"rvq_4cb_{name}.pt", 500)
    before = files_of(save_dir)
    data = [] if "--data" in use else ["--data", str(tunes)]
    other = [] if damage else ["--tag", "other"]
    words = use.format(p=place).split()
    code, said = ending([*TINY, *data, "--save_dir", str(save_dir), *other, *words], capsys)
    assert code == 1, said
    assert first in said.splitlines()[0]
    assert all(line.startswith(("!", "  ", "dropped")) for line in said.splitlines())
    assert files_of(save_dir) == before


def test_a_finished_run_says_what_goes_on(place, tunes, capsys):
    flags = [*TINY, "--data", str(tunes), "--save_dir", str(place / "run"), "--no-report"]
    assert train_rvq.main([*flags, "--max-steps", "16"]) == 0
    assert "give a larger --epochs, --max-steps, --max-seconds or" in capsys.readouterr().out


def run(*flags: str | Path, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    command = [*MAIN, *map(str, flags)]
    return processes.run(command, text=True, env=environment, timeout=60, **options)


@pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user")
def test_what_may_not_be_read_or_written_is_named(tunes, tmp_path):
    """Also: a folder within the data that cannot be read does not go missing in silence."""
    data = tmp_path / "data"
    shutil.copytree(tunes, data)
    shutil.copytree(tunes, data / "secret")
    script = (
        "import sys, os, train_rvq; from pathlib import Path; place = Path(sys.argv[1]);"
        "os.chmod(place / 'data/secret', 0o700); os.chmod(place / 'data', 0o755);"
        "os.chmod(place, 0o777); os.umask(0);"
        "os.mkdir(place / 'mine'); os.mkdir(place / 'mine' / 'not', 0o755);"
        "os.setuid(65534);"
        "print(train_rvq.main(['--data', f'{place}/data', '--save_dir', f'{place}/mine']));"
        "print(train_rvq.main(['--data', f'{place}/d*', '--save_dir', f'{place}/mine', '--plan',"
        " '--skip-bad-files', '--ctx', '32', '--d_model', '32', '--layers', '1', '--heads', '2',"
        " '--device-tflops', '1']));"
        "print(train_rvq.main(['--data', f'{place}/data', '--save_dir', f'{place}/mine/not']))"
    )
    for folder in tmp_path.parents:
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)  # pytest's own are private
    done = processes.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    first, unread, unwritten = done.stderr.splitlines()
    printed = done.stdout.splitlines()
    assert [line for line in printed if line.isdigit()] == ["1", "0", "1"]
    assert first.startswith("! 1 of 5 files are not valid .npq; mend or remove them, or pass")
    assert f"{data / 'secret'}: folder: expected a readable folder, found" in unread
    assert f"dropped  1 files, 0.00 hours: not valid: folder {data / 'secret'}" in printed
    assert f"--save_dir {tmp_path}/mine/not: cannot be used" in unwritten
    assert not list((tmp_path / "mine" / "not").iterdir())


def test_streams_that_are_closed_or_full_cost_no_checkpoint(tunes, tmp_path):
    flags = [*TINY, "--data", tunes, "--max-steps", "2", "--no-report", "--save_dir"]
    command = " ".join(map(str, [*MAIN, *flags]))
    done = subprocess.run(f"{command} {tmp_path}/a >&- 2>&-", shell=True, timeout=60)
    assert done.returncode == 0
    assert (tmp_path / "a" / "rvq_4cb_latest.pt").exists()
    with open("/dev/full", "w") as full:
        assert run(*flags, tmp_path / "b", stdout=full, stderr=full).returncode == 0
    assert (tmp_path / "b" / "rvq_4cb_latest.pt").exists()


@pytest.mark.parametrize("seconds", [0.3, 0.9])
def test_ctrl_c_while_starting_says_so_and_shows_no_traceback(seconds, tunes, tmp_path):
    """During the imports, or the set-up on a fast machine."""
    command = [*MAIN, *TINY, "--data", tunes, "--save_dir", tmp_path / "run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "the same command" in output


def test_a_full_disk_for_the_metrics_does_not_change_the_exit(tunes, small_disk, tmp_path):
    """What the last rows could not write must not end a run over again, at its close."""
    disk = small_disk("5m")
    flags = [*TINY, "--data", tunes, "--save_dir", disk, "--epochs", "9999", "--no-report"]
    process = start_trainer(*flags, "--archive-every", "0", "--save-every-minutes", "0")
    wait_for(lambda: (disk / "rvq_4cb_latest.pt").exists())
    with contextlib.suppress(OSError), open(disk / "fill", "wb", buffering=0) as fill:
        while True:
            fill.write(bytes(1 << 12))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "Traceback" not in output
    last = output.strip().splitlines()[-1]
    assert re.match(rf"! {disk}.*No space left.*; free some", last), output


@pytest.mark.parametrize("door", ["train_rvq", "encode_npq", "sample_rvq", "ckpt_doctor"])
def test_a_python_without_the_packages_is_told_in_a_line(door):
    command = [sys.executable, "-S", str(ROOT / f"{door}.py"), "--help"]  # -S: no site-packages
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("! the package ")
    assert "pip install -r requirements.txt" in line
