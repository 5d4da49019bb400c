"""Odd machines and extreme values: each command ends by itself, in words and with the right code.

The commands run as `main` in a forked process whose limits are lowered for real; what depends on
the start of Python runs as a user starts it. New limits and values are rows of the tables.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from kit.trainer import ROOT, TINY, run_trainer

import ckpt_doctor
import encode_npq
import sample_rvq
import train_rvq
from run_folder.checkpoint import load_checkpoint
from sound.codec import load_codec

SECONDS = 60  # after which a command hangs
DOORS = {
    "train": train_rvq, "encode": encode_npq, "decode": encode_npq, "info": encode_npq,
    "sample": sample_rvq, "export": sample_rvq, "doctor": ckpt_doctor,
}  # fmt: skip


@pytest.fixture(scope="module")
def words(tunes: Path, tunes_of_the_demo: Path, tmp_path_factory) -> dict[str, list[str]]:
    """A small command line of every kind; {out} is a folder to write to."""
    load_codec("demo")  # imports here what each forked process would import for itself
    place = tmp_path_factory.mktemp("place")
    (place / "music").mkdir()
    tone = np.sin(np.arange(3 * 44_100) / 20) * 0.3
    soundfile.write(place / "music" / "a.wav", tone, 44_100)
    flags = ["--data", tunes_of_the_demo, "--save_dir", place / "run", "--max-steps", "1"]
    code, output = run_trainer(*TINY, *flags)
    assert code == 0, output
    best = place / "run" / "rvq_9cb_best.pt"
    drawn = [best, "--frames", 2, "--codec", "demo"]
    kinds: dict[str, list[object]] = {
        "train": [*TINY, "--data", tunes, "--max-steps", 2, "--save_dir", "{out}/run"],
        "encode": [place / "music", "--codec", "demo", "--out-dir", "{out}"],
        "decode": [tunes_of_the_demo, "--decode", "--codec", "demo", "--out-dir", "{out}"],
        "info": [tunes, "--info"],
        "sample": [*drawn, "--out", "{out}/x.wav", "--npq-out", "{out}/x.npq"],
        "export": [best, "--export-safetensors", "{out}/x.safetensors"],
        "doctor": [place / "run", "--html", "{out}/x.html", "--json", "{out}/x.json"],
    }
    return {kind: list(map(str, command)) for kind, command in kinds.items()}


def ending(
    door: object, command: list[str], out: Path, prepare: Callable[[], object]
) -> tuple[int, str]:
    """Exit code, and all that was printed, of a command in a process that is prepared first."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.chdir(out)
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
            for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)  # and not pytest's, nor an earlier test's
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.alarm(SECONDS)
            prepare()
            code = door.main([w.format(out=out) for w in command])  # type: ignore[attr-defined]
        except SystemExit as error:
            code = int(str(error.code))
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def limited(kind: int, limit: int) -> Callable[[], None]:
    """Lowers a limit of the process; one of memory to what it has and so much more."""

    def lower() -> None:
        os.closerange(3, 1000)  # as a shell starts it
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        has = pages * resource.getpagesize() if kind == resource.RLIMIT_AS else 0
        resource.setrlimit(kind, (has + limit, has + limit))

    return lower


# --- limits --------------------------------------------------------------------------------------

MEMORY, FILE_SIZE, FILES = resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE
NO_MEMORY, NO_FILES = r"out of memory|can't start new thread", "Too many open files; raise `ulimit"
BIG = "--d_model 1024 --layers 8"  # half a GB of weights, of which the first fit
CURVES = "--tensorboard --log-lr-steps 1 --step 1 --max-steps 120 --no-report"
LIMITS = [
    ("train", MEMORY, 20 << 20, 1, NO_MEMORY, BIG),
    ("train", MEMORY, 100 << 20, 1, NO_MEMORY, BIG),
    ("train", FILE_SIZE, 2000, 1, "rvq_4cb_latest.pt: File too large; raise `ulimit -f`", ""),
    ("train", FILE_SIZE, 20 << 10, 1, "TensorBoard's file gets no more points", CURVES),
    ("encode", FILE_SIZE, 0, 1, "File too large; raise `ulimit -f`", ""),
    ("decode", FILE_SIZE, 2000, 1, "melody_00.npq: .*File too large; raise `ulimit -f`", ""),
    ("sample", FILE_SIZE, 2000, 1, r"x\.wav: File too large; raise `ulimit -f`", ""),
    ("export", FILE_SIZE, 2000, 1, r"x\.safetensors: File too large; raise `ulimit -f`", ""),
    ("doctor", FILE_SIZE, 2000, 5, r"x\.json: File too large; raise `ulimit -f`", ""),
    *((kind, FILES, 4, 1, NO_FILES, "") for kind in ("train", "info", "sample")),
    ("doctor", FILES, 4, 5, NO_FILES, ""),
]


@pytest.mark.parametrize(
    ("kind", "limit", "most", "code", "cause", "more"),
    LIMITS,
    ids=[f"{kind}-{limit}-{most}" for kind, limit, most, *_ in LIMITS],
)
def test_what_is_short_is_named_and_nothing_is_left_half(
    kind, limit, most, code, cause, more, words, tmp_path
):
    command = [*words[kind], *more.split()]
    found, said = ending(DOORS[kind], command, tmp_path, limited(limit, most))
    assert found == code, said
    assert re.search(cause, said), said
    assert not is_an_accusation(said)
    whole = (".pt", ".wav", ".safetensors", ".json", ".html")
    names = [p.name for p in tmp_path.rglob("[!.]*") if p.suffix in whole]
    assert not names or limit != FILE_SIZE


def is_an_accusation(said: str) -> bool:
    """Of the program or of a file."""
    return any(w in said for w in ("a fault of the program", "Traceback", "restore a backup"))


# --- streams, folders, processes -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["train", "encode", "sample", "doctor"])
@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)], ids=str)
def test_streams_that_are_closed_cost_nothing(kind, closed, words, tmp_path):
    """As with `>&-`: Python has None for them then."""

    def close() -> None:
        for number in closed:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)

    found, said = ending(DOORS[kind], words[kind], tmp_path, close)
    assert found == 0, said
    assert any(p.suffix in (".pt", ".npq", ".wav", ".html") for p in tmp_path.rglob("*"))


def full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.parametrize(
    ("kind", "more", "code"),
    [("info", "", 1), ("doctor", "--json -", 5), ("encode", "", 0), ("train", "", 0)],
)
def test_only_what_was_asked_for_must_be_printed(kind, more, code, words, tmp_path):
    """On a full disk: a table that is lost is an error, a line of progress none."""
    found, said = ending(DOORS[kind], [*words[kind], *more.split()], tmp_path, full)
    assert found == code, said
    assert bool(code) == ("! standard output: No space left on device; free some" in said)


def in_removed_folder() -> None:
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir("../gone")


def with_names(**names: str) -> Callable[[], None]:
    return lambda: os.environ.update(names)


LAUNCHED = "start several processes with torchrun, or one without WORLD_SIZE"
TOGETHER = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SURROUNDINGS = [
    ("train", in_removed_folder, 0, ""),
    ("encode", in_removed_folder, 0, ""),
    ("doctor", in_removed_folder, 0, ""),
    ("train", with_names(RANK="x", LOCAL_RANK="-1"), 0, ""),
    ("train", with_names(WORLD_SIZE="1"), 0, ""),
    ("train", with_names(WORLD_SIZE="abc"), 1, LAUNCHED),
    ("train", with_names(WORLD_SIZE="2"), 1, LAUNCHED),
    ("train", with_names(**TOGETHER, RANK="5"), 1, "found 5, 2 and 0; " + LAUNCHED),
    ("train", with_names(**{**TOGETHER, "MASTER_PORT": "x"}, RANK="0"), 1, LAUNCHED),
    ("train", with_names(COLUMNS="9" * 30, LINES="-1"), 0, ""),
    ("doctor", with_names(COLUMNS="0", LINES="x", TZ="Nowhere/Mars:+99"), 0, ""),
]


@pytest.mark.parametrize(("kind", "prepare", "code", "remedy"), SURROUNDINGS)
def test_odd_surroundings_are_no_fault_of_the_program(kind, prepare, code, remedy, words, tmp_path):
    found, said = ending(DOORS[kind], words[kind], tmp_path, prepare)
    assert found == code, said
    assert remedy in said
    assert said.count("! ") == bool(code) or code == 0
    assert "Traceback" not in said


def test_ctrl_c_ends_a_process_that_waits_for_the_others(words, tmp_path):
    """Rank 1 of two, and no rank 0: the call itself serves no signal for an hour."""

    def interrupted() -> None:
        with_names(**TOGETHER, RANK="1")()
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    found, said = ending(train_rvq, words["train"], tmp_path, interrupted)
    assert found == 130, said
    assert "! interrupted" in said


@pytest.mark.parametrize("kind", ["encode", "sample", "doctor"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_as_ctrl_c_does(kind, number, words, tmp_path):
    def signalled_when_it_writes() -> None:
        def hook(event: str, details: tuple[object, ...]) -> None:
            if event == "open" and str(details[0]).startswith(f"{tmp_path}/"):
                os.kill(os.getpid(), number)

        sys.addaudithook(hook)

    found, said = ending(DOORS[kind], words[kind], tmp_path, signalled_when_it_writes)
    assert found == 128 + number, said
    assert "! interrupted; " in said.splitlines()[-1]
    assert not list(tmp_path.rglob("*.tmp"))


# --- as a user starts Python ---------------------------------------------------------------------

STARTS = [
    ("encode", {"PYTHONWARNINGS": "error"}, "", 0, ""),
    ("train", {"PYTHONOPTIMIZE": "2", "OMP_NUM_THREADS": "abc"}, "", 0, ""),
    ("doctor", {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}, "", 0, ""),
    ("train", {}, "ulimit -v 300000", 1, NO_MEMORY),
    *(
        pytest.param("encode", {}, *row, marks=pytest.mark.slow)  # as forked above
        for row in (("ulimit -f 0", 1, "raise `ulimit -f`"), ("exec >&- 2>&- <&-", 0, ""))
    ),
]


@pytest.mark.parametrize(("kind", "environment", "before", "code", "cause"), STARTS)
def test_a_start_under_odd_conditions(kind, environment, before, code, cause, words, tmp_path):
    door = ROOT / f"{DOORS[kind].__name__}.py"
    command = [sys.executable, str(door), *(w.format(out=tmp_path) for w in words[kind])]
    done = subprocess.run(
        ["bash", "-c", f'{before or ":"}; "$@"', "bash", *command],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        env={**os.environ, **environment},
    )
    assert done.returncode == code, done.stderr
    assert re.search(cause, done.stdout + done.stderr), done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("isa", "expected"), [("AVX2", "float32")])
def test_auto_is_float32_on_a_cpu_without_instructions_for_bf16(isa, expected, tunes, tmp_path):
    """oneDNN is kept from them, as on a laptop: bf16 then takes hundreds of times as long."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    flags = ["--data", tunes, "--save_dir", tmp_path, "--max-steps", "1", "--amp-dtype", "auto"]
    code, output = run_trainer(*TINY, *flags, env=environment)
    assert code == 0, output
    assert load_checkpoint(tmp_path / "rvq_4cb_latest.pt")["flags"]["amp_dtype"] == expected


# --- values --------------------------------------------------------------------------------------

EXTREMES = [
    *("0", "1", "2", "-1", "1e30", "1" + "0" * 30, "9" * 18, str(2**63), str(2**64), "1e-40"),
    *("5e-324", "1e29", "3e38", "nan", "inf", "-inf", "1e3", "", "x" * 5000, " 5", "+5", "0x10"),
    *("1_0", "0." + "9" * 18, "1,2,3", "\u0663", "\udcff", "\0"),
]


def flags_with_values(door: object) -> Iterator[str]:
    """Flags of a command that take a value which is no path and no choice."""
    for action in door.build_parser()._actions:  # type: ignore[attr-defined]
        is_path = getattr(action.type, "__name__", "") in ("file_path", "<lambda>")
        if action.option_strings and action.nargs != 0 and not is_path and not action.choices:
            yield action.option_strings[0]


@pytest.mark.parametrize("door", [train_rvq, encode_npq, sample_rvq, ckpt_doctor])
def test_a_parser_takes_a_value_or_refuses_it_in_a_line(door, capsys):
    first, parser = [] if door is train_rvq else ["x"], door.build_parser()
    for flag in flags_with_values(door):
        for value in EXTREMES:
            code = 0
            try:
                parser.parse_args([*first, f"{flag}={value}"])
            except SystemExit as error:
                code = int(str(error.code))
            said = capsys.readouterr().err
            assert code in (0, 2)
            assert said.startswith(f"! {flag}: expected ") or code == 0, said
            assert said.count("\n") == bool(code)
            assert len(said) < 400


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train", "encode", "sample", "doctor"])
def test_what_a_parser_takes_is_done_or_refused(kind, words, tmp_path):
    """Every flag with every value that its parser takes, in a whole run of each."""
    door = DOORS[kind]
    for flag in flags_with_values(door):
        for value in EXTREMES[:-2]:
            command = [*words[kind], f"{flag}={value}"]
            try:
                with open(os.devnull, "w") as nowhere:
                    sys.stderr, usual = nowhere, sys.stderr
                    door.build_parser().parse_args(command)
            except SystemExit:
                continue
            finally:
                sys.stderr = usual
            out = tmp_path / re.sub(r"\W", "_", f"{flag}_{value}")[:100]
            out.mkdir(exist_ok=True)
            found, said = ending(door, command, out, lambda: torch.set_num_threads(1))
            assert found in (0, 1, 2, 3), f"{flag}={value}: {found}, {said}"
            assert "a fault of the program" not in said, f"{flag}={value}: {said}"
            assert found == 0 or "! " in said, f"{flag}={value}: {said}"
