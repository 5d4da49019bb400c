"""Many processes, one run: joining, agreeing, sharing the state, reducing gradients.

    torchrun --nproc_per_node=4 train_rvq.py --data "npq_out/*.npq" --accum 8

    world = join()                                 # alone without torchrun: the rest is free then
    world.shard(model, model.blocks, device)       # FSDP2; without this line DDP
    losses = world.averaging(model, model.losses)  # whose backward averages the gradients
    weights = world.whole(model.state_dict())      # for a checkpoint: not sharded, on rank 0

Every process runs the same program and takes the same decisions. What is not a function of the
shared state (signals, clocks, files) is settled by `largest`, `first` or `from_first`. Rank 0 alone
touches files. Messages about the run go through gloo, gradients on CUDA through NCCL.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler

if TYPE_CHECKING:  # takes most of a second: left to runs that shard
    from torch.distributed.tensor import DTensor

# Others wait so long while rank 0 draws a sample or saves. A process that dies is noticed at once,
# one that hangs after this.
TIMEOUT = datetime.timedelta(hours=1)
T = TypeVar("T")


class ParallelError(RuntimeError):
    """The processes do not fit together; says which one differs, in what, and what to do."""


@dataclass
class World:
    """The processes of a run and this one's place among them; alone unless `join` says more."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    store: Store | None = field(default=None, repr=False)  # outlives a process that dies
    module: Any = field(default=None, repr=False)  # DDP's or FSDP's, which averages the gradients
    is_sharded: bool = False  # each process holds a part of every tensor

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
    def in_turn(self) -> Iterator[None]:
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
        """None for the process that fails first, which must say why; for others its exit code.

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
    def one_voice(self) -> Iterator[None]:
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

    def go_alone(self) -> bool:
        """After a failure: go on as one process where this one holds files and a whole state."""
        can = self.size == 1 or (self.is_first and not self.is_sharded)
        if can:
            self.size, self.module = 1, None
        return can

    def wait(self) -> None:
        """Until all have come to their end; an earlier one would pass for a failure."""
        with contextlib.suppress(RuntimeError):  # another was faster
            self.largest(0)

    # --- the state -------------------------------------------------------------------------------

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
        """Give each process a part of every tensor of a model that has `losses`.

        Each block's are put together while it runs (FSDP: Zhao et al. 2023; ZeRO-3: Rajbhandari et
        al. 2020). The model may lie on the CPU: its parts go to the device block by block.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(device.type, (self.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        # Without resharding, a model that sees no backward would keep its root's parameters whole.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(model, "losses")
        self.is_sharded = True

    def whole(self, value: Any) -> Any:
        """Nested containers with sharded tensors put together, copied to rank 0's CPU.

        Every process must ask, and others get None for tensors. One at a time is whole on the
        devices. Where nothing is sharded the value stays as it is, and is no copy.
        """
        if not self.is_sharded:
            return value
        if isinstance(value, Tensor):
            full = value.full_tensor() if is_part(value) else value.clone()
            return full.detach().cpu() if self.is_first else None
        if isinstance(value, dict):
            return {key: self.whole(part) for key, part in value.items()}
        return [self.whole(part) for part in value] if isinstance(value, list) else value

    def share(self, checkpoint: dict[str, Any] | None) -> dict[str, Any] | None:
        """Rank 0's checkpoint; elsewhere weights and moments are shapes alone, for `place`."""
        outline = self.from_first(_outline(checkpoint) if self.size > 1 else None)
        return checkpoint if self.is_first else outline

    @torch.no_grad()
    def place(self, own: Tensor, saved: Tensor) -> None:
        """Copy rank 0's saved tensor into each process's own."""
        if self.size == 1:
            own.copy_(saved)
            return
        whole = torch.empty(saved.shape, dtype=own.dtype, device=own.device)
        if self.is_first:
            whole.copy_(saved)
        if is_part(own):
            from torch.distributed.tensor import distribute_tensor

            own.copy_(distribute_tensor(whole, own.device_mesh, own.placements))
        else:
            dist.broadcast(whole, 0)
            own.copy_(whole)

    def placed_moments(
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
                    self.place(placed[index][kind], value)
        return placed

    # --- gradients -------------------------------------------------------------------------------

    def averaging(self, model: nn.Module, losses: Callable[[Tensor], T]) -> Callable[[Tensor], T]:
        """The `losses` of a model, of codes [B, T, K], with a backward that averages its gradients.

        By DDP (Li et al. 2020, "PyTorch Distributed"), or by FSDP where the model is sharded.
        """
        if self.size == 1:
            return losses
        if self.is_sharded:
            self.module = model
            return losses
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the old name; torch 2.13 renamed it
            self.module = DistributedDataParallel(
                _Losses(model, losses), broadcast_buffers=False, gradient_as_bucket_view=True
            )
        return self.module

    @contextlib.contextmanager
    def reducing(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: the step's last exchanges gradients."""
        with contextlib.ExitStack() as stack:
            if self.is_sharded and self.module is not None:
                self.module.set_requires_gradient_sync(last)
            if isinstance(self.module, DistributedDataParallel) and not last:
                stack.enter_context(self.module.no_sync())
            yield

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place, on the tensor's device; no host sync."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Norm of all gradients together, a scalar on their device."""
        norm = torch.nn.utils.get_total_norm(gradients)
        return norm.full_tensor() if is_part(norm) else norm


def join() -> World:
    """The world that torchrun started this process in; one process without it.

    Raises:
        ParallelError: the other processes cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    try:
        shared, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        store = meet(shared, rank, size)
        dist.init_process_group(
            store=PrefixStore("group", store), rank=rank, world_size=size, timeout=TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        raise ParallelError(f"the processes could not find each other: {error}") from error
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return World(rank, size, local_rank, PrefixStore("failure", store))


def meet(store: Store, rank: int, size: int) -> Store:
    """A part of the store that is this attempt's alone.

    Torchrun keeps one store over its restarts, and with it the addresses of processes that have
    died. Rank 0 makes up a name; each other process asks for it with a word of its own, so that
    neither takes an old answer, and rank 0 waits for those that live to say that they have it.
    """
    if rank:
        word = uuid.uuid4().hex
        store.set(f"asks/{rank}", word)
        name = store.get(f"answer/{word}").decode()
        store.set(f"{name}/has/{rank}", "")
        return PrefixStore(name, store)
    name = uuid.uuid4().hex
    for other in range(1, size):
        end = time.monotonic() + TIMEOUT.total_seconds()
        while not store.check([f"{name}/has/{other}"]) and time.monotonic() < end:
            store.set(f"answer/{store.get(f'asks/{other}').decode()}", name)
            time.sleep(0.01)
    return PrefixStore(name, store)


def is_part(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is sharded over processes."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if is_part(tensor) else tensor


def is_loss_of_peer(error: BaseException) -> bool:
    """Whether an error means no more than that another process has died."""
    said = str(error).lower()
    network = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
    return network or any(w in said for w in ("closed by peer", "connection reset", "gloo"))


def leave(code: int) -> NoReturn:
    """End this process; one of many at once, since gloo's threads may abort an orderly exit."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class EveryNth(Sampler[T]):
    """This process's micro-batches of an order that all processes share."""

    def __init__(self, order: Sampler[T], world: World) -> None:
        self.order, self.world = order, world

    def __iter__(self) -> Iterator[T]:
        for number, batch in enumerate(self.order):
            if number % self.world.size == self.world.rank:
                yield batch

    def __len__(self) -> int:
        return len(self.order) // self.world.size  # type: ignore[arg-type]


class _Losses(nn.Module):
    """A model and its losses as the module that DDP wants; nothing of it is ever saved."""

    def __init__(self, model: nn.Module, losses: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, codes: Tensor) -> Any:
        """The losses of codes."""
        return self.losses(codes)


def _outline(value: Any) -> Any:
    """Nested containers with every array of floats as its shape: a tensor on meta."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
        return value.to("meta")
    if isinstance(value, dict):
        return {key: _outline(part) for key, part in value.items()}
    return [_outline(part) for part in value] if isinstance(value, list) else value
