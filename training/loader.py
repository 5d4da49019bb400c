"""Micro-batches read in threads: ahead of their use, in order, and never waited for without an end.

    loader = Loader(windows, order, threads=2, ahead=6)
    for codes in loader: ...                          # [B, ctx, K], as the order says
    for codes in loader.read(val_windows, numbers): ...

Threads and no processes: reading a window takes 10 us of Python, and what takes long, the disk,
holds no interpreter lock. So nothing has to travel through sockets, shared memory or semaphores,
which can be full, missing or left locked by a process that died; an error arrives as it was raised.
"""

from __future__ import annotations

import collections
import functools
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from cli.command_line import problem, say
from cli.waiting import carry_out, in_thread, wait_for
from npq_dataset import Corpus, WindowDataset, find_npq_files, scan_corpus

T = TypeVar("T")
RESERVE = 8  # descriptors; a save takes three at once
Jobs = queue.SimpleQueue[Callable[[], None] | None]


class Loader:
    """Reads windows with `threads` threads, each up to `ahead` micro-batches before their use.

    `meanwhile` is called several times a second while one is waited for, and may end that by
    raising; `tell` receives the message of a long wait.
    """

    def __init__(
        self,
        windows: WindowDataset,
        order: Iterable[np.ndarray[Any, Any]],
        *,
        threads: int,
        ahead: int,
        pinned: bool = False,
        tell: Callable[[str], None] = problem,
    ) -> None:
        self.windows, self.order = windows, order
        self.ahead = threads * ahead  # none without threads: one reads each when it is asked for
        self.pinned, self.tell = pinned, tell
        self.meanwhile: Callable[[], None] = lambda: None
        self.reserve = [os.open(os.devnull, os.O_RDONLY) for _ in range(RESERVE)]
        self.jobs: Jobs = queue.SimpleQueue()
        count = max(1, threads)
        for _ in range(count):
            threading.Thread(target=_work, args=(self.jobs,), name="reading", daemon=True).start()
        weakref.finalize(self, _dismiss, self.jobs, count, self.reserve)

    def __iter__(self) -> Iterator[Tensor]:
        return self.read(self.windows, self.order)

    def read(
        self, windows: WindowDataset, batches: Iterable[np.ndarray[Any, Any]]
    ) -> Iterator[Tensor]:
        """Batches of windows [B, ctx, K], in turn.

        Raises:
            NpqError, OSError: of the file that cannot be read.
            NoAnswerError: a read did not return.
        """
        begun: collections.deque[Future[Tensor]] = collections.deque()
        rest = iter(batches)
        try:
            while True:
                while len(begun) <= self.ahead and (numbers := next(rest, None)) is not None:
                    begun.append(self.begin(functools.partial(windows.__getitem__, numbers)))
                if not begun:
                    return
                codes = self.result(begun.popleft(), windows)
                yield codes.pin_memory() if self.pinned else codes
        finally:
            for future in begun:
                future.cancel()

    def give_back(self) -> None:
        """After a failure: free descriptors for a save, which may be what is short."""
        self.windows.open_files.close()
        while self.reserve:
            os.close(self.reserve.pop())

    def begin(self, work: Callable[[], T]) -> Future[T]:
        """Hand work to the threads."""
        future: Future[T] = Future()
        self.jobs.put(functools.partial(carry_out, future, work))
        return future

    def result(self, future: Future[T], windows: WindowDataset) -> T:
        """Of work that reads these windows."""
        return wait_for(
            future,
            windows.open_files.sign,
            meanwhile=lambda: self.meanwhile(),
            tell=self.tell,
        )


def scan(patterns: Sequence[str], *, tell: Callable[[str], None] = say, **options: Any) -> Corpus:
    """Find and scan files as `find_npq_files` and `scan_corpus` do, whose options it takes.

    Raises:
        NoAnswerError: a file or folder cannot be read and does not fail either.
    """
    at = "the data"

    def begins(path: str) -> None:
        nonlocal at
        at = path

    def work() -> Corpus:
        return scan_corpus(find_npq_files(patterns, tell=tell), on_file=begins, **options)

    return wait_for(in_thread(work, "scanning"), lambda: (at, at))


def _work(jobs: Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # else the last batch stays in memory while the thread waits


def _dismiss(jobs: Jobs, count: int, reserve: list[int]) -> None:
    for _ in range(count):
        jobs.put(None)
    while reserve:
        os.close(reserve.pop())
