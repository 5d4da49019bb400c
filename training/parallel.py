"""Many processes, one run: joining, agreeing, the same state everywhere, averaged gradients.

    torchrun --nproc_per_node=4 train_rvq.py --data "npq_out/*.npq" --accum 8

    world = join()                                 # one process without torchrun: the rest is free
    losses = world.averaging(objective)            # its backward averages the gradients (DDP)

Every process runs the same program and takes the same decisions. What is not a function of the
shared state (signals, clocks, files) is settled by `largest`, `first` or `from_first`. Rank 0 alone
touches the run's files. Messages about the run go through gloo, gradients on CUDA through NCCL.
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

# Others wait so long while rank 0 draws a sample or saves. A process that dies is noticed at once,
# one that hangs after this.
TIMEOUT = datetime.timedelta(hours=1)
LAUNCH = "start many processes by torchrun, or one without WORLD_SIZE"
T = TypeVar("T")


class ParallelError(RuntimeError):
    """The processes do not fit together; the message names which one, in what, and the remedy."""


@dataclass
class World:
    """The processes of a run and this one's place among them; alone unless `join` finds others."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    store: Store | None = field(default=None, repr=False)  # outlives a process that dies
    module: DistributedDataParallel | None = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this process owns the files and the console."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """`rank 3 on node2`."""
        return f"rank {self.rank} on {socket.gethostname()}"

    # --- agreeing --------------------------------------------------------------------------------

    def largest(self, *numbers: float) -> list[float]:
        """The largest that any process gives of each number; one exchange between CPUs."""
        if self.size == 1:
            return list(numbers)
        all_numbers = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(all_numbers, dist.ReduceOp.MAX)
        return all_numbers.tolist()

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, value: T | None) -> T | None:
        """The value of the lowest rank that has one."""
        return next((v for v in self.gather(value) if v is not None), None)

    def from_first(self, value: T) -> T:
        """Rank 0's value."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
        return values[0]

    @contextlib.contextmanager
    def rank0_first(self) -> Iterator[None]:
        """Rank 0 first, then the first process of each other machine, then the rest.

        What the first of a machine reads and remembers, the others need not.
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
        told = self.gather((self.name, dict(facts)))
        for name, theirs in told[1:]:
            differing = [n for n in facts if theirs[n] != told[0][1][n]]
            if differing:
                listed = ", ".join(f"{n} {theirs[n]}, not {told[0][1][n]}" for n in differing)
                raise ParallelError(f"{name} differs from {told[0][0]}: {listed}; {remedy}")

    # --- failing ---------------------------------------------------------------------------------

    def first_failure(self, code: int) -> int | None:
        """None for the process that fails first, which must report it; for others its exit code.

        Those that wait for a process that has failed fail too, and have nothing to add.
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
        """Around what may print and exit: where every process would, the first to do so prints."""
        if self.size == 1:
            yield
            return
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                yield
        except SystemExit as error:
            code = int(error.code or 0)
            told = self.first_failure(code)
            if told is None:
                print(said.getvalue(), end="", file=sys.stderr, flush=True)
            raise SystemExit(code if told is None else told) from None

    def continue_alone(self) -> bool:
        """After a failure: go on as one process if this is the one that holds the files."""
        if self.is_first:
            self.size, self.module = 1, None
        return self.is_first

    def wait(self) -> None:
        """Until all have come to their end; an earlier one would pass for a failure."""
        with contextlib.suppress(RuntimeError):  # another was faster
            self.largest(0)

    # --- the state -------------------------------------------------------------------------------

    def share(self, checkpoint: dict[str, Any] | None) -> dict[str, Any] | None:
        """Rank 0's checkpoint; elsewhere weights and moments are shapes alone, for `scatter`."""
        outline = self.from_first(_outline(checkpoint) if self.size > 1 else None)
        return checkpoint if self.is_first else outline

    @torch.no_grad()
    def scatter(self, own: Tensor, saved: Tensor) -> None:
        """Copy rank 0's saved tensor into each process's own."""
        if self.is_first:
            own.copy_(saved)
        if self.size > 1:
            dist.broadcast(own, 0)

    def scatter_moments(
        self, saved: dict[int, dict[str, Any]], optimizer: torch.optim.Optimizer
    ) -> dict[int, dict[str, Any]]:
        """A saved optimizer state, by index of the parameter, as each process holds it."""
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
        """A module of codes [B, T, K] -> losses, with a backward that averages its gradients.

        By DistributedDataParallel (Li et al. 2020, "PyTorch Distributed").
        """
        if self.size == 1:
            return objective
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the old name; torch 2.13 renamed it
            self.module = DistributedDataParallel(
                objective, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        return self.module

    @contextlib.contextmanager
    def reducing(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: the step's last exchanges gradients."""
        with contextlib.nullcontext() if self.module is None or last else self.module.no_sync():
            yield

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place, on the tensor's device; no host sync."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


ALONE = World()


def join() -> World:
    """The world that torchrun started this process in; one process without it.

    Raises:
        ParallelError: the other processes cannot be reached.
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
    # In a thread, as the call serves no signals for an hour.
    joining = in_thread(lambda: _meet(rank, size), "joining")
    sign = (0, f"rank {rank} waits for the others of {size} processes")
    patience = 2 * TIMEOUT.total_seconds()  # its own ends sooner
    store = wait_for(joining, lambda: sign, patience=patience)
    return World(rank, size, local_rank, PrefixStore("failure", store))


def _from_torchrun(name: str, default: str) -> int:
    """A whole number of the environment."""
    text = os.environ.get(name) or default
    try:
        return int(text)
    except ValueError:
        raise ParallelError(f"{name}: expected a whole number, found {text!r}; {LAUNCH}") from None


def _meet(rank: int, size: int) -> Store:
    """Join the other processes; the store that they share."""
    try:
        shared, *_ = next(rendezvous("env://", rank, size, timeout=TIMEOUT))
        # torchrun keeps one store over its restarts, and in it addresses of processes that died.
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
    """Whether an error means no more than that another process has died."""
    said = str(error).lower()
    network = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
    return network or any(w in said for w in ("closed by peer", "connection reset", "gloo"))


def leave(code: int) -> NoReturn:
    """End this process at once: an orderly exit waits for threads that a dead disk may hold.

    And of many processes gloo's threads may abort it.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never there
            stream.flush()
    os._exit(code)


class EveryNth(Generic[T]):
    """This process's micro-batches of an order that all processes share."""

    def __init__(self, order: Iterable[T], world: World) -> None:
        self.order, self.world = order, world

    def __iter__(self) -> Iterator[T]:
        return itertools.islice(self.order, self.world.rank, None, self.world.size)


def _outline(value: Any) -> Any:
    """Nested containers with every array of floats as its shape: a tensor on meta."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
        return value.to("meta")
    if isinstance(value, dict):
        return {key: _outline(part) for key, part in value.items()}
    return [_outline(part) for part in value] if isinstance(value, list) else value
