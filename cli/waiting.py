"""Waits that react to signals, report what they wait for, and end.

    scan = in_thread(lambda: scan_corpus(paths, on_file=seen.append))
    corpus = wait_for(scan, lambda: (len(seen), seen[-1]))

A disk or a network folder can take minutes, or never answer, and a thread that waits for it cannot
be ended. So work that may block is done in a thread that does not delay the end of the process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from cli.command_line import problem

FIRST_WORD = 30.0  # seconds without progress until the first line about it; then twice as long ...
PATIENCE = 600.0  # ... and until the wait ends: a file server that restarts needs some minutes
TICK = 0.2  # seconds between two checks of signals
T = TypeVar("T")
Sign = tuple[object, str]  # a value that changes as the work goes on; the place of the work


class NoAnswerError(RuntimeError):
    """A wait without an answer; the message contains the place, the time and the remedy."""


def in_thread(work: Callable[[], T], name: str = "working") -> Future[T]:
    """Start work in a thread that does not delay the end of the process."""
    future: Future[T] = Future()
    threading.Thread(target=carry_out, args=(future, work), name=name, daemon=True).start()
    return future


def carry_out(future: Future[T], work: Callable[[], T]) -> None:
    """Do work unless it was cancelled, and set the future's result or exception."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def wait_for(
    future: Future[T],
    sign: Callable[[], Sign],
    *,
    meanwhile: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = problem,
    patience: float | None = None,
) -> T:
    """The result of a thread's work; its exception is raised here.

    `meanwhile` is called every TICK seconds and ends the wait by raising. The wait goes on as long
    as the first part of `sign` changes.

    Raises:
        NoAnswerError: `patience` seconds without a change, or PATIENCE. The thread is left alone.
    """
    most = PATIENCE if patience is None else patience
    seen, waited, word, looked = object(), 0.0, FIRST_WORD, time.monotonic()
    while not future.done():
        wait([future], timeout=TICK)
        meanwhile()
        (mark, place), now = sign(), time.monotonic()
        # A long gap means that this process itself was stopped; most of it does not count.
        waited, looked = waited + min(now - looked, 10 * TICK), now
        if mark != seen:
            seen, waited, word = mark, 0.0, FIRST_WORD
        if waited >= most:
            raise NoAnswerError(
                f"{place}: no answer for {most:.0f} s; see to its disk or network folder, "
                "then the same command goes on"
            )
        if waited >= word:
            tell(f"{place}: waiting since {waited:.0f} s (for {most:.0f} s at most)")
            word *= 2
    return future.result()
