"""Data-parallel training: join the processes, share decisions and state, average gradients.

    torchrun --nproc_per_node=4 train_rvq.py --data "npq_out/*.npq" --accum 8

    world = join()                                 # without torchrun: one process, no exchange
    losses = world.averaging(objective)            # its backward averages the gradients (DDP)

Every process runs the same program and takes the same decisions. What the shared state does not
determine (signals, clocks, files) goes through `largest`, `first` or `from_first`. Rank 0 alone
touches the run's files. These exchanges use gloo; gradients on CUDA use NCCL.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import itertools
import os
import socket
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from cli.shortages import first_line
from cli.waiting import in_thread, wait_for
from run_folder.checkpoint import with_tensors

# Ranks wait this long for one another: rank 0 may be drawing a sample or saving. A process that
# dies is noticed at once, one that hangs only after this time.
TIMEOUT = datetime.timedelta(hours=1)
LAUNCH = "start several processes with torchrun, or one without WORLD_SIZE"
T = TypeVar("T")


class ParallelError(RuntimeError):
    """The processes cannot form one run; the message names the process, the cause and a remedy."""


@dataclass
class World:
    """The processes of a run and the rank of this one; by default a single process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # rank among the processes of this machine
    store: Store | None = field(default=None, repr=False)  # outlives a process that dies
    module: DistributedDataParallel | None = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0, which owns the files and the console."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """The name of this process in messages, as `rank 3 on node2`."""
        return f"rank {self.rank} on {socket.gethostname()}"

    # --- agreeing --------------------------------------------------------------------------------

    def largest(self, *numbers: float) -> list[float]:
        """Return the elementwise maximum of `numbers` over all processes; one exchange by gloo."""
        if self.size == 1:
            return list(numbers)
        all_numbers = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(all_numbers, dist.ReduceOp.MAX)
        return all_numbers.tolist()

    def gather(self, value: T) -> list[T]:
        """Return every process's value, by rank; values must be picklable."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, value: T | None) -> T | None:
        """Return the value of the lowest rank whose value is not None, or None."""
        return next((v for v in self.gather(value) if v is not None), None)

    def from_first(self, value: T) -> T:
        """Return rank 0's value in every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
        return values[0]

    @contextlib.contextmanager
    def rank0_first(self) -> Iterator[None]:
        """Run the block in rank 0, then in one process of each other machine, then in the rest.

        The first process of a machine fills caches on disk and in memory that the others use.
        """
        turn = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.largest(0)
        yield
        for _ in range(2 - turn):
            self.largest(0)

    def check_same(self, facts: Mapping[str, Any], remedy: str) -> None:
        """Compare facts that must be equal in every process.

        Raises:
            ParallelError: names the first process that differs from rank 0, and in what.
        """
        (name0, facts0), *others = self.gather((self.name, dict(facts)))
        for name, theirs in others:
            differing = [n for n in facts if theirs[n] != facts0[n]]
            if differing:
                listed = ", ".join(f"{n} {theirs[n]}, not {facts0[n]}" for n in differing)
                raise ParallelError(f"{name} differs from {name0}: {listed}; {remedy}")

    # --- failing ---------------------------------------------------------------------------------

    def first_failure(self, code: int) -> int | None:
        """Return None in the process that fails first, which must report it; its code in the rest.

        Processes that wait for a failed one fail too; their errors are only a consequence.
        """
        if self.store is None:
            return None
        try:
            if self.store.add("failures", 1) == 1:
                self.store.set("code", str(code))
                return None
            return int(self.store.get("code"))
        except RuntimeError:  # torchrun itself is gone
            return None

    @contextlib.contextmanager
    def print_once(self) -> Iterator[None]:
        """Let only one process print where all would print the same and exit (help, usage errors).

        Output of the block is held back, and printed by the first process that exits.
        """
        if self.size == 1:
            yield
            return
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                yield
        except SystemExit as error:
            code = int(error.code or 0)
            code_of_first = self.first_failure(code)
            if code_of_first is None:
                print(output.getvalue(), end="", file=sys.stderr, flush=True)
            raise SystemExit(code if code_of_first is None else code_of_first) from None

    def continue_alone(self) -> bool:
        """After a failure, make rank 0 a world of its own, so that it can save; True in rank 0."""
        if self.is_first:
            self.size, self.module = 1, None
        return self.is_first

    def wait(self) -> None:
        """Wait until every process is done; one that exits earlier would look like a failure."""
        with contextlib.suppress(RuntimeError):  # another process has left already
            self.largest(0)

    # --- the state -------------------------------------------------------------------------------

    def share(self, checkpoint: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return rank 0's checkpoint, or None if it has none.

        In other ranks its floating-point tensors are on the meta device: `scatter` sends them.
        """
        outline = self.from_first(with_tensors(checkpoint, _outline) if self.size > 1 else None)
        return checkpoint if self.is_first else outline

    @torch.no_grad()
    def scatter(self, own: Tensor, saved: Tensor) -> None:
        """Copy rank 0's `saved` tensor into `own` of every process, in place."""
        if self.is_first:
            own.copy_(saved)
        if self.size > 1:
            dist.broadcast(own, 0)

    def scatter_moments(
        self, saved: dict[int, dict[str, Any]], optimizer: torch.optim.Optimizer
    ) -> dict[int, dict[str, Any]]:
        """Send rank 0's saved optimizer state, by index of the parameter, to every process.

        Moments arrive on the device and with the dtype of their parameter.
        """
        if self.size == 1:
            return saved
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        placed = {}
        for index, state in saved.items():
            placed[index] = dict(state)
            for kind, value in state.items():
                if isinstance(value, Tensor) and value.dim():
                    placed[index][kind] = torch.zeros_like(parameters[index], requires_grad=False)
                    self.scatter(placed[index][kind], value)
        return placed

    # --- gradients -------------------------------------------------------------------------------

    def averaging(self, objective: nn.Module) -> nn.Module:
        """Wrap a module in DistributedDataParallel, whose backward averages the gradients.

        Returns it unchanged for one process (Li et al. 2020, "PyTorch Distributed").
        """
        if self.size == 1:
            return objective
        with warnings.catch_warnings():
            # torch 2.13 renamed broadcast_buffers to forward_sync_buffers and warns of it.
            warnings.simplefilter("ignore", FutureWarning)
            self.module = DistributedDataParallel(
                objective, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        return self.module

    @contextlib.contextmanager
    def reducing(self, *, last: bool) -> Iterator[None]:
        """Wrap forward and backward of a micro-batch: only the step's last exchanges gradients."""
        with contextlib.nullcontext() if self.module is None or last else self.module.no_sync():
            yield

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place, on its device, without a host sync."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


ALONE = World()


def join() -> World:
    """Join the processes that torchrun started; without torchrun, return a world of one process.

    Raises:
        ParallelError: torchrun's variables are wrong, or the other processes cannot be reached.
        NoAnswerError: the others did not come within two hours.
    """
    size = _from_torchrun("WORLD_SIZE", "1")
    if size == 1:
        return World()
    rank, local_rank = _from_torchrun("RANK", "-1"), _from_torchrun("LOCAL_RANK", "0")
    if not 0 <= rank < size or local_rank < 0:
        raise ParallelError(
            f"expected 0 <= RANK < WORLD_SIZE and LOCAL_RANK >= 0, found {rank}, {size} and "
            f"{local_rank}; {LAUNCH}"
        )
    # In a thread: the call can block for an hour, in which the process would ignore signals.
    joining = in_thread(lambda: _meet(rank, size), "joining")
    sign = (0, f"rank {rank} waits for the others of {size} processes")
    patience = 2 * TIMEOUT.total_seconds()  # the call's own timeout ends sooner
    store = wait_for(joining, lambda: sign, patience=patience)
    return World(rank, size, local_rank, PrefixStore("failure", store))


def _from_torchrun(name: str, default: str) -> int:
    """Read a whole number from an environment variable that torchrun sets."""
    text = os.environ.get(name) or default
    try:
        return int(text)
    except ValueError:
        raise ParallelError(f"{name}: expected a whole number, found {text!r}; {LAUNCH}") from None


def _meet(rank: int, size: int) -> Store:
    """Join the other processes and return the store that they share."""
    try:
        shared, *_ = next(rendezvous("env://", rank, size, timeout=TIMEOUT))
        # torchrun keeps its store over restarts, with the addresses of processes that died.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"attempt {attempt}", shared)
        dist.init_process_group(
            store=PrefixStore("group", store), rank=rank, world_size=size, timeout=TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        raise ParallelError(
            f"the processes could not find each other: {first_line(error)}; {LAUNCH}"
        ) from error
    return store


def is_loss_of_peer(error: BaseException) -> bool:
    """Return whether an error means only that another process has died."""
    text = str(error).lower()
    network = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
    return network or any(w in text for w in ("closed by peer", "connection reset", "gloo"))


def leave(code: int) -> NoReturn:
    """End this process at once with an exit code, after flushing its output.

    An orderly exit would wait for threads that a dead disk may block, and gloo's threads may abort
    it where there are several processes.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()
    os._exit(code)


class EveryNth(Generic[T]):
    """Yields this process's micro-batches of an order that all processes share: every size-th."""

    def __init__(self, order: Iterable[T], world: World) -> None:
        self.order, self.world = order, world

    def __iter__(self) -> Iterator[T]:
        return itertools.islice(self.order, self.world.rank, None, self.world.size)


def _outline(tensor: Tensor) -> Tensor:
    """Return a floating-point tensor on the meta device; others and numbers as they are."""
    return tensor.to("meta") if tensor.is_floating_point() and tensor.dim() else tensor
