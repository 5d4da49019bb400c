"""Reads micro-batches in threads, in order and ahead of their use; no wait lasts for ever.

    loader = Loader(windows, order, threads=2, ahead=6)
    for batch in loader: ...          # batch.codes [B, ctx, K] int16, in the order's order
    for batch in loader.read(val_windows, numbers): ...

Threads are enough, processes are not needed: reading a window takes 10 us of Python, and the slow
part, the disk, runs without the interpreter lock. Threads need no sockets, shared memory or
semaphores, which can be full, missing or left locked by a process that died, and errors arrive
unchanged.
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
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from cli.command_line import UsageError, problem, say
from cli.shortages import first_line
from cli.waiting import carry_out, in_thread, wait_for
from npq_dataset import Corpus, WindowDataset, roots_of_npq_files, scan_corpus
from sound.labels import FOLDERS, Labels, read_labels

T = TypeVar("T")
RESERVE = 8  # file descriptors kept back for a save, which takes three at once
Jobs = queue.SimpleQueue[Callable[[], None] | None]


class Batch(NamedTuple):
    """A micro-batch: codes [B, ctx, K] and, of labelled windows, labels [B, n] padded with -1."""

    codes: Tensor
    labels: Tensor | None = None


class Loader:
    """Reads windows in `threads` threads, up to `threads * ahead` micro-batches before their use.

    `order` yields the window numbers [B] of each micro-batch; `pinned` page-locks the batches for
    CUDA. While a batch is awaited, `meanwhile` is called several times a second and may raise to
    end the wait; `tell` receives a message when the wait is long.
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
        self.ahead = threads * ahead  # with threads=0, one thread reads each batch on demand
        self.pinned, self.tell = pinned, tell
        self.meanwhile: Callable[[], None] = lambda: None
        self.reserve = [os.open(os.devnull, os.O_RDONLY) for _ in range(RESERVE)]
        self.jobs: Jobs = queue.SimpleQueue()
        count = max(1, threads)
        for _ in range(count):
            threading.Thread(target=_work, args=(self.jobs,), name="reading", daemon=True).start()
        weakref.finalize(self, _dismiss, self.jobs, count, self.reserve)

    def __iter__(self) -> Iterator[Batch]:
        return self.read(self.windows, self.order)

    def read(
        self, windows: WindowDataset, batches: Iterable[np.ndarray[Any, Any]]
    ) -> Iterator[Batch]:
        """Yield the windows of each of `batches` (arrays of window numbers).

        Raises:
            NpqError, OSError: a file cannot be read.
            NoAnswerError: a read did not return in time.
        """
        begun: collections.deque[Future[Batch]] = collections.deque()

        def batch_of(numbers: np.ndarray[Any, Any]) -> Batch:
            return Batch(windows[numbers], windows.labels_of(numbers))

        rest = iter(batches)
        try:
            while True:
                while len(begun) <= self.ahead and (numbers := next(rest, None)) is not None:
                    begun.append(self.begin(functools.partial(batch_of, numbers)))
                if not begun:
                    return
                codes, labels = self.result(begun.popleft(), windows)
                yield Batch(
                    self.page_locked(codes), None if labels is None else self.page_locked(labels)
                )
        finally:
            for future in begun:
                future.cancel()

    def page_locked(self, tensor: Tensor) -> Tensor:
        """Return a tensor in page-locked memory with `pinned`, until it fails, which is told."""
        if self.pinned:
            try:
                return tensor.pin_memory()
            except RuntimeError as error:
                self.pinned = False
                self.tell(
                    f"micro-batches cannot be page-locked ({first_line(error)}), so each waits for "
                    "its copy to the device; free memory, or raise `ulimit -l`"
                )
        return tensor

    def give_back(self) -> None:
        """Close the reserved file descriptors after a failure, so that a save can open files."""
        while self.reserve:
            os.close(self.reserve.pop())

    def begin(self, work: Callable[[], T]) -> Future[T]:
        """Give `work` to the reading threads; the future receives its result or error."""
        future: Future[T] = Future()
        self.jobs.put(functools.partial(carry_out, future, work))
        return future

    def result(self, future: Future[T], windows: WindowDataset) -> T:
        """Wait for work that reads these windows; return its result or raise its error."""
        return wait_for(
            future,
            windows.sign,
            meanwhile=lambda: self.meanwhile(),
            tell=self.tell,
        )


def scan(
    patterns: Sequence[str],
    *,
    labels: str | None = None,
    tell: Callable[[str], None] = say,
    **options: Any,
) -> Corpus:
    """Find files by glob patterns, scan them and read their labels from --labels, if it is given.

    `options` are those of `scan_corpus`.

    Raises:
        NoAnswerError: reading a file or folder neither succeeds nor fails in time.
        UsageError: the labels cannot be read, or do not fit the files.
        BadFilesError, NpqError, OSError: see `find_npq_files` and `scan_corpus`.
    """
    at = "the data"

    def begins(path: str) -> None:
        nonlocal at
        at = path

    def work() -> Corpus:
        roots = roots_of_npq_files(patterns, tell=tell)
        corpus = scan_corpus(list(roots), on_file=begins, **options)
        if labels is not None:
            begins(labels)
            corpus.labels = _labels(labels, roots, corpus.paths)
        return corpus

    return wait_for(in_thread(work, "scanning"), lambda: (at, at))


def _labels(source: str, roots: dict[str, str], paths: list[str]) -> Labels:
    try:
        return read_labels(source, roots, paths)
    except OSError as error:
        raise UsageError(
            f"--labels: expected {FOLDERS} or a CSV file, found {error.strerror!r} at {source}; "
            "check the path"
        ) from error
    except ValueError as error:
        raise UsageError(f"--labels: {error}") from error


def _work(jobs: Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # otherwise the last batch stays in memory while the thread waits


def _dismiss(jobs: Jobs, count: int, reserve: list[int]) -> None:
    for _ in range(count):
        jobs.put(None)
    while reserve:
        os.close(reserve.pop())
