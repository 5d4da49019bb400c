"""The optimizer: AdamW for all, or Muon for the matrices of the blocks and AdamW for the rest.

    optimizer = build_optimizer(model, optim="muon", lr=2e-4, weight_decay=0.02)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    optimizer.step()

Each group of parameters runs at its own multiple of the learning rate, kept in the group as
`lr_factor`, so that one --lr serves both optimizers and every width (benchmarks/journal.md).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from layers.code_rows import CodeRows

BETAS = (0.9, 0.95)

# Multiples of --lr under Muon. At the default 2e-4 its steps have a spectral norm of 0.02, whatever
# the width (Jordan et al. 2024), and AdamW's elements move by 5e-3.
MUON_FACTOR = 100.0
ADAMW_FACTOR = 25.0
# A head's logits sum over the width, so beyond this one its rate falls as the width grows (Yang et
# al. 2022, table 8).
HEAD_WIDTH = 256
# Elements of a stack of matrices: launches of so many no longer count, and memory does.
STACK = 2**27
# Steps of Muon's iteration on a Gram matrix before it is made anew: with all five it drifts.
AT_ONCE = 3


def build_optimizer(
    model: nn.Module,
    *,
    optim: str,
    lr: float,
    weight_decay: float,
    row_decay: float = 0.0,
    decay_all: bool = False,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """`adamw`: AdamW (Loshchilov and Hutter 2019) for all; `muon`: see `MuonWithAdamW`.

    The rates of all groups start at `lr`, without their `lr_factor`. Weight decay spares embeddings
    and gains, but with `decay_all`; where it is not 0, `row_decay` is that of the rows of single
    codes, in embeddings and heads. `fused` is AdamW's, a kernel for all tensors at once.
    """
    if optim == "adamw":
        groups = parameter_groups(model, weight_decay, decay_all=decay_all)
    else:
        hidden, groups = muon_groups(model, weight_decay, decay_all=decay_all)
    if row_decay:
        groups = decay_rows(model, groups, row_decay)
    adamw = torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=fused)
    return adamw if optim == "adamw" else MuonWithAdamW(StackedMuon([hidden], lr=lr), adamw)


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


def decay_rows(
    model: nn.Module, groups: list[dict[str, Any]], row_decay: float
) -> list[dict[str, Any]]:
    """Take the rows of single codes out of AdamW's groups into groups of their own.

    Each is seen once in V frames, and learned by heart before anything else.
    """
    modules = model.named_modules()
    rows = {f"{name}.weight" for name, module in modules if isinstance(module, CodeRows)}
    split = []
    for group in groups:
        own = [(n, p) for n, p in group["params"] if n in rows]
        rest = [(n, p) for n, p in group["params"] if n not in rows]
        split += [{**group, "params": rest}] if rest else []
        split += [{**group, "params": own, "weight_decay": row_decay}] if own else []
    return split


def is_hidden_matrix(name: str, p: Tensor) -> bool:
    """Whether a parameter is a matrix between hidden states: of the blocks, or into depth."""
    return p.dim() == 2 and not name.endswith(("embed.weight", "head.weight"))


class StackedMuon(torch.optim.Muon):
    """torch's Muon, with its state, for alike matrices at a time: a fifth of its launches.

    Alike are matrices of one shape, lying or standing: what makes one orthogonal does the other.
    Of the settings it knows Nesterov's momentum and the rate of the original alone, the defaults.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step of every matrix that has a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[tuple(sorted(p.shape))].append(p)
            for matrices in alike.values():
                matrices.sort(key=lambda p: p.shape[0] <= p.shape[1])  # tall ones first
                count = max(1, STACK // matrices[0].numel())
                for first in range(0, len(matrices), count):
                    self._move(matrices[first : first + count], group)

    def _move(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Move alike matrices, the tall ones first."""
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in matrices]
        gradients = [p.grad for p in matrices if p.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        tall = sum(p.shape[0] > p.shape[1] for p in matrices)
        parts = [torch.stack(ahead[:tall]).mT] if tall else []
        parts += [torch.stack(ahead[tall:])] if tall < len(matrices) else []
        moves = orthogonalized(
            torch.cat(parts), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        rows, columns = sorted(matrices[0].shape, reverse=True)
        if tall:
            rate = group["lr"] * math.sqrt(rows / columns)
            standing = list(moves[:tall].mT.contiguous().unbind())
            torch._foreach_add_(matrices[:tall], standing, alpha=-rate)
        if tall < len(matrices):
            torch._foreach_add_(matrices[tall:], list(moves[tall:].unbind()), alpha=-group["lr"])


def orthogonalized(
    stack: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7
) -> Tensor:
    """Matrices [N, m, n], m <= n, with their singular values brought near 1: new, float32.

    By Newton and Schulz's iteration x <- (a + b g + c g^2) x in bfloat16, where g = x x^T (Jordan
    et al. 2024). Where m is not n, the factors of `AT_ONCE` steps come from the small g alone, and
    x is multiplied once by their product; g strays from x x^T meanwhile, so it is made anew then.
    """
    a, b, c = coefficients
    x = stack.bfloat16()
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    at_once = steps_at_once(x.shape[1], x.shape[2])
    for first in range(0, steps, at_once):
        gram = x @ x.mT
        product = factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        scale = a  # x is to be multiplied by scale + product
        for _ in range(min(at_once, steps - first) - 1):
            gram = torch.baddbmm(gram, factor, gram, beta=a)
            gram = torch.baddbmm(gram, gram, factor, beta=a)
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            product = torch.baddbmm(product, factor, product, beta=a).add_(factor, alpha=scale)
            scale *= a
        x = torch.baddbmm(x, product, x, beta=scale)
    return x.to(stack.dtype, memory_format=torch.contiguous_format)


def steps_at_once(rows: int, columns: int) -> int:
    """How many steps the small Gram matrix alone carries before it is made anew."""
    return 1 if rows == columns else AT_ONCE


def muon_flops(model: nn.Module, steps: int = 5) -> float:
    """Floating-point operations that `orthogonalized` takes in an optimizer step."""
    flops = 0
    for name, p in model.named_parameters():
        if is_hidden_matrix(name, p):
            m, n = sorted(p.shape)
            restarts = math.ceil(steps / steps_at_once(m, n))
            flops += restarts * 4 * m * m * n + (steps + 3 * (steps - restarts)) * 2 * m**3
    return float(flops)


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


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Tensor]]:
    """Every tensor of the optimizer's state that a sound run keeps finite, with its name."""
    saved = optimizer.state_dict()
    names = [n for group in saved["param_groups"] for n in group["param_names"]]
    for index, state in saved["state"].items():
        yield from ((f"{kind} of {names[index]}", t) for kind, t in state.items() if t.dim())
