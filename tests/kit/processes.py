"""`subprocess.run` and `Popen` for the commands, without the seconds that their imports take.

A command started by `python train_rvq.py` imports PyTorch for 3 to 9 seconds of processor time, and
the tests start hundreds. Here it is forked from a process that has imported the four commands and
done nothing else; from there on it is what it would be: its own process, whose parent is the test,
with its own descriptors, environment and signals, ended by the interpreter's own end. What its
start could decide (Python's flags, variables that are read by then) starts as usual.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import inspect
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = "train_rvq", "encode_npq", "sample_rvq", "ckpt_doctor"
READ_AT_START = "PYTHON", "LC_", "LANG", "OMP_", "MKL_", "OPENBLAS_", "MALLOC_", "TORCH", "LD_"
ENCODING = "PYTHONIOENCODING"  # the one of them that is taken over afterwards
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

# --- the side of the tests -----------------------------------------------------------------------


class Popen(subprocess.Popen):
    """A `subprocess.Popen`, forked from a process that is ready where that is the same."""

    _ready: ClassVar[dict[tuple[tuple[str, str], ...], socket.socket]] = {}

    def _execute_child(self, *options: Any) -> None:
        names = list(inspect.signature(subprocess.Popen._execute_child).parameters)[1:]
        o = dict(zip(names, options, strict=True))
        words = [o["args"]] if isinstance(o["args"], (str, Path)) else list(map(str, o["args"]))
        env = {k: v for k, v in (o["env"] or os.environ).items() if k != "PYTEST_CURRENT_TEST"}
        if o["shell"] or o["preexec_fn"] or o["pass_fds"] or not is_plain(words):
            return super()._execute_child(*options)
        ends = o["p2cread"], o["c2pwrite"], o["errwrite"]
        descriptors = [own if end == -1 else end for own, end in enumerate(ends)]
        request = {
            "words": words[1:],
            "env": env,
            "folder": os.path.abspath(o["cwd"] or os.curdir),
            "session": o["start_new_session"],
        }
        ready = self._from(env)
        adopt_orphans(True)
        try:
            socket.send_fds(ready, [json.dumps(request).encode()], descriptors)
            self.pid = int(ready.recv(99))
        finally:
            adopt_orphans(False)
        self._child_created = True
        self._close_pipe_fds(*(o[n] for n in names if n in PIPES))
        return None

    @classmethod
    def _from(cls, env: dict[str, str]) -> socket.socket:
        """The process with the variables of `env` that are read at the start; started if new."""
        env = {k: v for k, v in env.items() if k != ENCODING}
        key = tuple(sorted((k, v) for k, v in env.items() if k.startswith(READ_AT_START)))
        if key not in cls._ready:
            ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, __file__, str(its.fileno())]
            with its:
                subprocess.Popen(command, env=env, pass_fds=[its.fileno()], cwd=ROOT)
            cls._ready[key] = ours
        return cls._ready[key]


PIPES = "p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"


def is_plain(words: list[str]) -> bool:
    """Whether it is this Python, without flags of its own, and a program or its text."""
    return words[0] == sys.executable and (words[1] == "-c" or words[1].endswith(".py"))


def run(
    command: list[str | Path],
    *,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """As `subprocess.run`."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def run_and_leave(command: list[str | Path]) -> tuple[int, str, str]:
    """Exit code, the first line and all errors, for a reader that leaves then: `| head -1`."""
    with Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        return process.wait(), first, errors


def adopt_orphans(on: bool) -> None:
    """Whether a grandchild whose parent has ended becomes a child of this process (prctl(2))."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


# --- the side of the process that is ready -------------------------------------------------------


def wait_ready(requests: socket.socket) -> dict[str, Any]:
    """Fork for every request; returns one in each of the forked processes."""
    sys.path[0] = str(ROOT)
    for name in COMMANDS:
        __import__(name)
    __import__("torch._dynamo")
    __import__("sound.codec").codec._import_dac()
    gc.freeze()
    while True:
        request, descriptors, *_ = socket.recv_fds(requests, 1 << 20, 3)
        if not request:
            os._exit(0)
        if (parent := os.fork()) == 0:
            parent = os.getpid()
            if os.fork() > 0:
                os._exit(0)
            while os.getppid() == parent:
                time.sleep(0.0005)
            become(json.loads(request), descriptors, requests)
            return json.loads(request)
        os.waitpid(parent, 0)
        for number in descriptors:
            os.close(number)


def become(request: dict[str, Any], descriptors: list[int], requests: socket.socket) -> None:
    """Take over what a start would have given to this process."""
    os.environ.clear()
    os.environ.update(request["env"])
    if request["session"]:
        os.setsid()
    requests.send(str(os.getpid()).encode())
    for own, number in enumerate(descriptors):
        os.dup2(number, own)
    requests.detach()
    os.closerange(3, 1000)
    tempfile.tempdir = None  # TMPDIR may be another
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        by_line = name == "stderr" or "PYTHONUNBUFFERED" in os.environ
        asked = ENCODING in os.environ and name != "stderr"
        stream = open(  # noqa: SIM115
            number,
            "w" if number else "r",
            buffering=1 if number and by_line else -1,
            encoding=os.environ.get(ENCODING) or getattr(sys, name).encoding,
            errors="strict" if asked else getattr(sys, name).errors,
            closefd=False,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    with contextlib.suppress(FileNotFoundError):
        os.chdir(request["folder"])


if __name__ == "__main__":
    request = wait_ready(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = request["words"]
    if sys.argv[0] == "-c":
        sys.path[0] = ""
        exec(compile(sys.argv.pop(1), "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")
