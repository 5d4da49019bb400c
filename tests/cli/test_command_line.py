"""command_line.py: flags that name paths, flags that stand several times, in all four commands."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path

import pytest
from kit.trainer import TINY, run_trainer

import ckpt_doctor
import encode_npq
import sample_rvq
import train_rvq
from cli.command_line import shell_line

DOORS = {d.__name__: d for d in (train_rvq, encode_npq, sample_rvq, ckpt_doctor)}
OF_PATHS = {
    "train_rvq": "--data --val-list --save_dir --resume --init-from --eval-outdir --eval-dac-repo",
    "encode_npq": "AUDIO --out-dir --codec",
    "sample_rvq": "CHECKPOINT --out --npq-out --page --export-safetensors --prompt --against "
    "--codec",
    "ckpt_doctor": "PATH --metrics --probe-data --json --csv --html",
}
CASES = [(door, flag) for door, flags in OF_PATHS.items() for flag in flags.split()]


def action_of(door, flag):
    actions = DOORS[door].build_parser()._actions
    return next(a for a in actions if flag in (*a.option_strings, a.metavar))


def parsed(door, flag, value):
    """What a command makes of a path behind a flag, of the first where there are several."""
    action = action_of(door, flag)
    words = [value] * (action.nargs if isinstance(action.nargs, int) else 1)
    if action.option_strings:
        words = [f"{flag}={value}"] if len(words) == 1 else [flag, *words]
        words += ["checkpoint.pt"] if door in ("sample_rvq", "ckpt_doctor") else []
    found = getattr(DOORS[door].build_parser().parse_args(words), action.dest)
    return str(found[0] if isinstance(found, list) else found)


def refusal(door, flag, value, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(door, flag, value)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"! {flag}: expected ")
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize("door", DOORS)
def test_the_list_of_path_flags_is_whole(door):
    """A new flag whose value is a path shows itself by its metavar."""
    words = ("FILE", "DIR", "PATH", "GLOB", "CODEC", "AUDIO", "CHECKPOINT", "A")
    found = [
        a.option_strings[0] if a.option_strings else a.metavar
        for a in DOORS[door].build_parser()._actions
        if str(a.metavar[0] if isinstance(a.metavar, tuple) else a.metavar).split(".")[0] in words
    ]
    assert sorted(found) == sorted(OF_PATHS[door].split())


@pytest.mark.parametrize(("door", "flag"), CASES)
def test_every_path_flag_expands_a_home_and_nothing_else(door, flag, tmp_path, monkeypatch):
    """A shell leaves `~` behind `=` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ELSEWHERE", "/elsewhere")
    monkeypatch.chdir(tmp_path)
    me = pwd.getpwuid(os.getuid())
    assert parsed(door, flag, "~/toks/*.npq") == f"{tmp_path}/toks/*.npq"
    assert parsed(door, flag, "~") == str(tmp_path)
    assert parsed(door, flag, f"~{me.pw_name}/x") == f"{me.pw_dir.rstrip('/')}/x"
    for plain in ("$ELSEWHERE/x", "x~", "./~/x", "a/~", " x ", "-"):
        assert parsed(door, flag, plain) == plain.removeprefix("./" * (flag == "--out-dir"))


@pytest.mark.parametrize(("door", "flag"), CASES)
def test_a_path_that_cannot_be_meant_is_refused(door, flag, tmp_path, monkeypatch, capsys):
    """A shell's unset variable; a user that is none; a folder `~` that an earlier version made."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert "found ''; name one or leave it out" in refusal(door, flag, "", capsys)
    assert "write ./~nobody_here/x" in refusal(door, flag, "~nobody_here/x", capsys)
    Path("~draft.npq").touch()  # a shell leaves it alone, too
    assert parsed(door, flag, "~draft.npq") == "~draft.npq"
    Path("~/ck").mkdir(parents=True)
    message = refusal(door, flag, "~/ck", capsys)
    assert f"{tmp_path}/home/ck" in message
    assert "./~/ck" in message
    Path(tmp_path, "home", "ck").mkdir(parents=True)
    assert parsed(door, flag, "~/ck") == f"{tmp_path}/home/ck"


@pytest.mark.parametrize("door", DOORS)
def test_flags_of_several_values_may_stand_several_times(door):
    """People append to a command that they keep."""
    for action in DOORS[door].build_parser()._actions:
        if action.nargs == "+" and action.option_strings:
            (flag,) = action.option_strings
            words = [flag, "a", "b", f"{flag}=c", flag, "a"]
            words = ["x.pt", *words] if door in ("sample_rvq", "ckpt_doctor") else words
            flags = DOORS[door].build_parser().parse_args(words)
            assert getattr(flags, action.dest) == ["a", "b", "c", "a"], flag


def test_given_flags_of_several_values_are_seen_as_given():
    _, explicit = train_rvq.parse_flags(["--data", "a", "--data", "b", "--save_dir=x"])
    assert explicit == {"data": ["a", "b"], "save_dir": "x"}


def test_a_second_list_of_validation_files_is_refused(capsys):
    """The music of the first would train."""
    words, parser = ["--val-list", "a.txt", "--val_list", "b.txt"], train_rvq.build_parser()
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    assert stop.value.code == 2
    assert "is given twice" in capsys.readouterr().err
    parser.parse_args(words[:2] * 2)  # the same again is no loss


def test_a_run_under_the_home_folder(tunes, tmp_path):
    """As bash hands it over: it leaves `~` behind `=` alone. Nothing named `~` comes to be."""
    (tmp_path / "toks").symlink_to(tunes)
    words = ("--data=~/toks", "--save_dir=~/ck", *TINY, "--max-steps", "1", "--no-report")
    env = {**os.environ, "HOME": str(tmp_path)}
    code, output = run_trainer(*words, cwd=tmp_path, env=env)
    assert code == 0, output
    assert (tmp_path / "ck" / "rvq_4cb_latest.pt").exists()
    assert sorted(os.listdir(tmp_path)) == ["ck", "toks"]


@pytest.mark.parametrize(
    "name", ["plain", "two words", "it's $HOME", "a\nb", "caf\udce9 'x' \\", "\x1b[31m", "日本", ""]
)
def test_a_printed_command_is_what_a_shell_takes(name):
    line = shell_line(["printf", "%s", name])
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout == os.fsencode(name)
    assert line.isprintable()
