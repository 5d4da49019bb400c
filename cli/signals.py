"""Signals of a command: as Ctrl-C, and where they would do harm deferred.

with signals_interrupt():        # SIGTERM and SIGHUP raise SignalInterrupt
    with signals_deferred():     # until the block ends
        import dac
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class SignalInterrupt(KeyboardInterrupt):
    """SIGTERM, or the SIGHUP of a closed terminal; its only argument is the signal's number."""


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that it leaves nothing half-made."""

    def interrupt(number: int, _: object) -> None:
        raise SignalInterrupt(number)

    usual = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in usual:  # the others are ignored on purpose, as by nohup
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in usual:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Let signals that interrupt take effect at the end of the block.

    For imports, as libraries swallow exceptions raised within theirs, and for forks. A signal mask
    is not enough: another thread, such as a progress bar's, would receive the signal.
    """
    waiting: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if callable(handler := signal.getsignal(number)):
                before[number] = handler
                signal.signal(number, lambda received, _: waiting.append(received))
    try:
        yield
    finally:
        for deferred, handler in before.items():
            signal.signal(deferred, handler)
    if waiting:
        before[waiting[0]](waiting[0], None)


def code_of_interruption(error: KeyboardInterrupt) -> int:
    """128 + the signal's number: 130 for Ctrl-C."""
    is_other = isinstance(error, SignalInterrupt)
    return 128 + int(error.args[0] if is_other else signal.SIGINT)
