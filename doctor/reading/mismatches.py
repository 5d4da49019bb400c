"""Whether the parts of a checkpoint fit together: keys and shapes, moments and parameters.

    mismatches_of(summary, content, members_of(content["optimizer"], content["model"]))  # sentences

A file of this project is compared with the model that its saved architecture builds, the EMA and
the moments of any file with its own weights.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from doctor.reading.optimizer_state import Member, groups_of, method_of
from doctor.reading.summary import VECTORS, Summary, as_dict, as_list
from model import CodesTransformer, ModelConfig
from run_folder.checkpoint import REQUIRED_KEYS

Shapes = dict[str, tuple[int, ...]]  # of tensors by name


def mismatches_of(
    summary: Summary, content: dict[str, Any], members: dict[str, Member]
) -> list[str]:
    """What does not fit in a file, a sentence each; its own description is in the summary."""
    shapes = _shapes(content["model"])
    return [
        *_odd_keys(summary, content),
        *(f"raw {name} is no tensor" for name in content["model"] if name not in shapes),
        *_odd_weights(summary, content, shapes),
        *_odd_vectors(content),
        *_odd_optimizer(summary, content, members, shapes),
    ]


def _odd_keys(summary: Summary, content: dict[str, Any]) -> list[str]:
    """Keys that are missing, and those that hold no dictionary."""
    odd = []
    if summary.style == "own":
        odd += [f"lacks `{key}`" for key in sorted(REQUIRED_KEYS - set(content))]
        odd += ["its progress contains no step"] * (summary.step is None)
    for key in ("progress", "flags", "architecture", "ema", "optimizer", "opt"):
        if not isinstance(content.get(key, {}), (dict, type(None))):
            odd.append(f"`{key}`: expected a dictionary, found {type(content[key]).__name__}")
    return odd


# --- weights -------------------------------------------------------------------------------------


def _shapes(tensors: dict[Any, Any]) -> Shapes:
    named = ((n, t) for n, t in tensors.items() if isinstance(n, str) and isinstance(t, Tensor))
    return {n: tuple(t.shape) for n, t in named}


def _odd_weights(summary: Summary, content: dict[str, Any], shapes: Shapes) -> list[str]:
    """Raw weights against the saved architecture, the EMA against the raw weights."""
    odd = []
    if summary.style == "own" and summary.architecture:
        try:
            odd += _differences("raw", shapes, _expected_shapes(summary.architecture))
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            odd.append(f"architecture builds no model: {error}")
    if ema := as_dict(content.get("ema")):
        odd += _differences("EMA", _shapes(ema), shapes)
    return odd


def _odd_vectors(content: dict[str, Any]) -> list[str]:
    """A codec's vectors of the codes that are not finite, or of which the EMA has others."""
    odd, ema = [], as_dict(content.get("ema"))
    for name, found in content["model"].items():
        if isinstance(name, str) and isinstance(found, Tensor) and name.endswith(VECTORS):
            if not found.isfinite().all():
                odd.append(f"raw {name} is not finite")
            elif isinstance(ema.get(name), Tensor) and not torch.equal(found, ema[name]):
                odd.append(f"EMA {name} is not the raw one")
    return odd


def _expected_shapes(architecture: dict[str, Any]) -> Shapes:
    if not 0 < int(architecture.get("layers", 1)) <= 1000:
        raise ValueError(f"{architecture['layers']} layers")
    with _Unfilled():
        model = CodesTransformer(ModelConfig.from_dict(architecture))
    return {name: tuple(p.shape) for name, p in model.state_dict().items()}


class _Unfilled(TorchFunctionMode):
    """Leaves new weights unfilled: memory that is never written costs nothing.

    The meta device would do the same, but to fill a tensor there imports the compiler, for seconds.
    """

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in ("normal_", "kaiming_uniform_", "zeros_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _differences(what: str, found: Shapes, expected: Shapes) -> list[str]:
    return [
        f"{what} {n}: expected {expected.get(n, 'nothing')}, found {found.get(n, 'nothing')}"
        for n in sorted(found.keys() | expected.keys())
        if found.get(n) != expected.get(n)
    ]


# --- the optimizer -------------------------------------------------------------------------------


def _odd_optimizer(
    summary: Summary, content: dict[str, Any], members: dict[str, Member], shapes: Shapes
) -> list[str]:
    """Groups and moments, against the weights and against the flags."""
    odd = []
    # Of the older script's files only their weights can be used, so one may be without.
    if not members and (summary.step or 0) > 0 and (summary.style == "own" or "opt" in content):
        odd.append("no optimizer state")
    odd += _odd_groups(content.get("optimizer", content.get("opt")))
    for name, member in members.items():
        odd += _odd_moments(name, member.state, shapes.get(name))
    if summary.style == "own" and members:
        odd += _odd_methods(summary, members)
        trained = {name for name in shapes if not name.endswith(VECTORS)}
        if lost := sorted(trained - members.keys()):
            odd.append(f"no optimizer state for {', '.join(lost[:3])}")
    return odd


def _odd_groups(state: Any) -> list[str]:
    """Groups whose `betas` are not two; what else a group lacks is missing from its parameters."""
    return [
        f"optimizer group {i}: expected two `betas`"
        for i, group in enumerate(groups_of(state))
        if "betas" in group and len(as_list(group["betas"])) != 2
    ]


STATE_KEYS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}


def _odd_methods(summary: Summary, members: dict[str, Member]) -> list[str]:
    """Moments that are missing or of another optimizer, and a --optim of another optimizer."""
    odd = []
    for name, (group, state) in members.items():
        method = method_of(group)
        expected = STATE_KEYS.get(method, set())
        foreign = set().union(*STATE_KEYS.values()) - expected if expected else set()
        odd += [f"{method} has no {key} of {name}" for key in sorted(expected - state.keys())]
        odd += [f"{method} has a foreign {key} of {name}" for key in sorted(foreign & state.keys())]
    said, method = summary.flags.get("optim", "adamw"), summary.optimizer.get("method", "")
    if said in ("adamw", "muon") and method and (said == "muon") != ("Muon" in method):
        odd.append(f"--optim {said}, but the optimizer's groups are of {method}")
    return odd


def _odd_moments(name: str, state: dict[str, Any], shape: tuple[int, ...] | None) -> list[str]:
    """Entries of a parameter's state other than a number `step` and moments of its shape."""
    odd = []
    for key, moment in state.items():
        if not isinstance(moment, Tensor):
            if key != "step" or not isinstance(moment, numbers.Real):
                odd.append(f"optimizer {key} of {name} is no tensor")
        elif moment.dim() and shape is not None and moment.shape != shape:
            odd.append(f"optimizer {key} of {name} is {tuple(moment.shape)}")
    return odd
