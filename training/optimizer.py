"""The optimizer: AdamW for all, or Muon for the matrices of the blocks and AdamW for the rest.

    optimizer = build_optimizer(model, optim="muon", lr=2e-4, weight_decay=0.02)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    optimizer.step()

Each group of parameters runs at its own multiple of the learning rate, kept in the group as
`lr_factor`, so that one --lr serves both optimizers and every width (benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:  # takes most of a second: left to runs that shard
    from torch.distributed.tensor import DTensor

BETAS = (0.9, 0.95)

# Multiples of --lr under Muon. At the default 2e-4 its steps have a spectral norm of 0.02, whatever
# the width (Jordan et al. 2024), and AdamW's elements move by 5e-3.
MUON_FACTOR = 100.0
ADAMW_FACTOR = 25.0
# A head's logits sum over the width, so beyond this one its rate falls as the width grows (Yang et
# al. 2022, table 8).
HEAD_WIDTH = 256


def build_optimizer(
    model: nn.Module,
    *,
    optim: str,
    lr: float,
    weight_decay: float,
    decay_all: bool = False,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """`adamw`: AdamW (Loshchilov and Hutter 2019) for all; `muon`: see `MuonWithAdamW`.

    The rates of all groups start at `lr`, without their `lr_factor`. Weight decay spares embeddings
    and gains, but with `decay_all`. `fused` is AdamW's, a kernel for all tensors at once.
    """
    if optim == "adamw":
        groups = parameter_groups(model, weight_decay, decay_all=decay_all)
        return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=fused)
    hidden, others = muon_groups(model, weight_decay, decay_all=decay_all)
    is_sharded = any(hasattr(p, "device_mesh") for p in model.parameters())
    return MuonWithAdamW(
        (ShardedMuon if is_sharded else torch.optim.Muon)([hidden], lr=lr),
        torch.optim.AdamW(others, lr=lr, betas=BETAS, fused=fused),
    )


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_all: bool = False
) -> list[dict[str, Any]]:
    """For AdamW alone: matrices of products, which decay; all else, which does with decay_all."""
    named = list(model.named_parameters())
    decayed = [(n, p) for n, p in named if p.dim() == 2 and not n.endswith("embed.weight")]
    rest = [(n, p) for n, p in named if p.dim() != 2 or n.endswith("embed.weight")]
    return [
        {"params": decayed, "weight_decay": weight_decay, "lr_factor": 1.0},
        {"params": rest, "weight_decay": weight_decay if decay_all else 0.0, "lr_factor": 1.0},
    ]


def muon_groups(
    model: nn.Module, weight_decay: float, *, decay_all: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The group of Muon, and AdamW's: the head, then embeddings, BOS vector and gains."""
    named = list(model.named_parameters())
    hidden = [(n, p) for n, p in named if is_hidden_matrix(n, p)]
    head = [(n, p) for n, p in named if n == "head.weight"]
    rest = [(n, p) for n, p in named if n != "head.weight" and not is_hidden_matrix(n, p)]
    head_factor = ADAMW_FACTOR * min(1.0, HEAD_WIDTH / head[0][1].shape[1])
    everywhere = weight_decay if decay_all else 0.0
    return {"params": hidden, "weight_decay": weight_decay, "lr_factor": MUON_FACTOR}, [
        {"params": head, "weight_decay": weight_decay, "lr_factor": head_factor},
        {"params": rest, "weight_decay": everywhere, "lr_factor": ADAMW_FACTOR},
    ]


def is_hidden_matrix(name: str, p: Tensor) -> bool:
    """Whether a parameter is a matrix between hidden states: of the blocks, or into depth."""
    return p.dim() == 2 and not name.endswith(("embed.weight", "head.weight"))


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the hidden matrices, AdamW for all else, behind one state and one state_dict.

    Muon replaces the momentum of a matrix by the nearest orthogonal one, so that every direction
    moves alike (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        groups = [*muon.param_groups, *adamw.param_groups]
        super().__init__([p for group in groups for p in group["params"]], {})
        self.parts = (muon, adamw)
        self.param_groups = groups
        self._share()

    def _share(self) -> None:
        """Let both parts work on this optimizer's groups and state."""
        muon, adamw = self.parts
        muon.param_groups, adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        muon.state = adamw.state = self.state

    def step(self) -> None:  # type: ignore[override]
        """One step of each; a closure would be called twice, so none is taken."""
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; it makes new groups and a new state, which both parts must see."""
        super().load_state_dict(state_dict)
        self._share()


# --- Muon on sharded matrices --------------------------------------------------------------------


class ShardedMuon(torch.optim.Muon):
    """Muon where each process holds some rows of every matrix.

    A matrix must be whole to be made orthogonal. Each process does this for its share of the
    matrices, whose rows travel to it and back in the bf16 that the iteration works in; momentum and
    weights stay where they are (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.3,
    which has every process do it for all).
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """As torch's, on this process's rows."""
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            held.sort(key=Tensor.numel, reverse=True)  # equal ones in a row: even shares

            def orthogonal(matrix: Tensor, group: dict[str, Any] = group) -> Tensor:
                return newton_schulz(
                    matrix, group["ns_coefficients"], group["ns_steps"], group["eps"]
                )

            rows = [self._nesterov(p, group["momentum"]).bfloat16() for p in held]
            for p, update in zip(held, by_whole_matrices(orthogonal, rows, held), strict=True):
                tallness = max(1.0, p.shape[0] / p.shape[1])
                own = p.to_local()
                own.mul_(1 - group["lr"] * group["weight_decay"])
                own.add_(update, alpha=-group["lr"] * tallness**0.5)

    def _nesterov(self, p: Any, momentum: float) -> Tensor:
        """Move the momentum of this process's rows; the update that follows from it."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, requires_grad=False)
        gradient, average = p.grad.to_local(), state["momentum_buffer"].to_local()
        average.lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


def newton_schulz(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """About the nearest orthogonal matrix, in bf16, as torch.optim.Muon makes it.

    A quintic Newton-Schulz iteration (Jordan et al. 2024): x <- (a + b x x^T + c (x x^T)^2) x, from
    a norm of 1 at most; it wants no more rows than columns.
    """
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16().mT if is_tall else matrix.bfloat16()
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def by_whole_matrices(
    change: Callable[[Tensor], Tensor], rows: Sequence[Tensor], like: Sequence[DTensor]
) -> list[Tensor]:
    """Change matrices of which each process holds some rows; its rows of the results.

    `rows` are this process's, `like` the sharded matrices they are of. Matrix i is made whole on
    process i modulo their number; two exchanges serve all matrices.
    """
    mesh = like[0].device_mesh
    rank, size, group = mesh.get_local_rank(), mesh.size(), mesh.get_group()

    def count(i: int, holder: int) -> int:
        """Elements of matrix i that a process holds."""
        height, width = like[i].shape
        most = -(-height // size)  # rows of all but the last holders, as torch.chunk has them
        return max(0, min(most, height - holder * most)) * width

    mine = range(rank, len(rows), size)
    by_owner = [i for owner in range(size) for i in range(owner, len(rows), size)]
    sent = [sum(count(i, rank) for i in range(o, len(rows), size)) for o in range(size)]
    received = [sum(count(i, holder) for i in mine) for holder in range(size)]
    ours = torch.cat([rows[i].flatten() for i in by_owner])
    theirs = ours.new_empty(sum(received))
    dist.all_to_all_single(theirs, ours, received, sent, group=group)

    pieces = theirs.split([count(i, holder) for holder in range(size) for i in mine])
    for place, i in enumerate(mine):
        parts = pieces[place :: len(mine)]  # of each holder, views into `theirs`
        whole = change(torch.cat(parts).view(like[i].shape)).flatten()
        for part, new in zip(parts, whole.split([len(p) for p in parts]), strict=True):
            part.copy_(new)
    dist.all_to_all_single(ours, theirs, sent, received, group=group)
    changed = dict(zip(by_owner, ours.split([count(i, rank) for i in by_owner]), strict=True))
    return [changed[i].view_as(part) for i, part in enumerate(rows)]


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Tensor]]:
    """Every tensor of the optimizer's state that a sound run keeps finite, with its name."""
    saved = optimizer.state_dict()
    names = [n for group in saved["param_groups"] for n in group["param_names"]]
    for index, state in saved["state"].items():
        yield from ((f"{kind} of {names[index]}", t) for kind, t in state.items() if t.dim())
