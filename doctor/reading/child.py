"""Work on a hostile file in a child process that may do little and cannot harm its parent.

    answer = in_child(work, "rvq_ckpts/rvq_9cb_latest.pt")   # of work(path, report)
    answer.text if isinstance(answer, Problem) else answer["figures"]

The child may allocate little more than the size of its file, write nothing, and run for minutes. So
a hostile or broken file costs one row of a report. The child answers in JSON, never in a pickle.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from cli.command_line import in_words
from cli.shortages import first_line, is_out_of_memory
from cli.signals import signals_deferred
from doctor.reading.summary import Problem, Unreadable
from run_folder.checkpoint import CheckpointError

SILENCE = 120.0  # seconds without a message after which a child is given up


def in_child(
    work: Callable[..., Any],
    path: str,
    report: Callable[[int], None] = lambda _: None,
    *arguments: Any,
    silence: float = SILENCE,
) -> Any | Problem:
    """Run `work(path, report, *arguments)` in a child with limits; its JSON answer or a Problem.

    `report` here is called with each number that the work reports. A child that sends nothing for
    `silence` seconds is ended. It is forked: the parent never computes with tensors, so it has no
    threads that a fork would lose.

    Raises:
        MemoryError: this machine has none left, which is no fault of the file.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = pipe = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(pipe, work, path, *arguments), daemon=True)
    sys.stdout.flush()
    with contextlib.ExitStack() as at_end:
        at_end.callback(ours.close)
        with signals_deferred():  # a child that is not yet known could not be ended
            child.start()
            at_end.callback(child.join)
            at_end.callback(child.kill)  # before the join: callbacks run in reverse
        theirs.close()
        try:
            while ours.poll(silence):
                kind, content = json.loads(ours.recv_bytes())
                if kind == "answer":
                    return content
                if kind == "problem":
                    return Problem(*content)
                if kind == "short":
                    raise MemoryError(f"to read {path}")
                report(content)
            return Problem("corrupt", f"no answer within {silence:g} seconds; given up")
        except EOFError:
            child.join()
            code = child.exitcode or 0
            reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Problem("corrupt", f"the process that read it died ({reason})")


def _child(
    pipe: tuple[multiprocessing.connection.Connection, multiprocessing.connection.Connection],
    work: Callable[..., Any],
    path: str,
    *arguments: Any,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends the child
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ours, theirs = pipe
    ours.close()  # so that a message to a parent that has ended fails, and does not wait forever

    def send(kind: str, content: Any) -> None:
        theirs.send_bytes(json.dumps((kind, content)).encode())

    send(*_work(work, path, functools.partial(send, "progress"), *arguments))


def _work(
    work: Callable[..., Any], path: str, report: Callable[[int], None], *arguments: Any
) -> tuple[str, Any]:
    """The "answer" of the work, or its "problem", or "short" where this machine lacks memory."""
    is_own_limit = True
    warnings.simplefilter("ignore")  # of torch and NumPy, about the content of a file
    try:
        torch.set_num_threads(1)  # memory is the limit; threads would wait for each other
        is_own_limit = _limit_this_process([path, *(a for a in arguments if isinstance(a, str))])
        return "answer", work(path, report, *arguments)
    except Unreadable as error:
        return "problem", error.problem
    except Exception as error:
        if not is_own_limit and is_out_of_memory(error):
            return "short", None
        return "problem", _problem_of(error, path)


def _problem_of(error: Exception, path: str) -> Problem:
    """The problem of a file that made its reader fail with an error."""
    if isinstance(error, CheckpointError):
        text = str(error).removeprefix(f"{path}: ")
    elif isinstance(error, OSError):  # no permission, a server that fails: perhaps no fault of it
        text = f"cannot be read now: {in_words(error).removeprefix(f'{path}: ')}"
    elif isinstance(error, MemoryError):
        text = "needs far more memory than its size; refused"
    else:  # a hostile file can make anything fail
        text = f"{type(error).__name__}: {first_line(error)}"[:300]
    return Problem("corrupt", text)


def _limit_this_process(paths: list[str]) -> bool:
    """No files written, no core, memory by the files' size, minutes of computing.

    Returns whether these limits of memory hold, and not lower ones that were set before.
    """
    size = sum(map(os.path.getsize, paths))
    with open("/proc/self/status") as file:
        held = dict(line.split(":", 1) for line in file)
    mapped, data = (int(held[name].split()[0]) << 10 for name in ("VmSize", "VmData"))
    # Threads and torch's first use reserve address space without using it; a mapped file is data.
    space = _lower(resource.RLIMIT_AS, mapped + 3 * size + (6 << 30))
    space &= _lower(resource.RLIMIT_DATA, data + 2 * size + (512 << 20))
    _lower(resource.RLIMIT_CPU, 120 + size // 5_000_000)
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_CORE, 0)
    return space


def _lower(limit: int, value: int) -> bool:
    """Set a limit unless a lower one is set; returns whether it was set."""
    _, hard = resource.getrlimit(limit)
    if is_lower := hard == resource.RLIM_INFINITY or value <= hard:
        resource.setrlimit(limit, (value, hard))
    return is_lower
