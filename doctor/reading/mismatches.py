"""Whether what a checkpoint holds fits together: kinds, keys and shapes, moments and parameters.

    misfits_of(summary, content, members_of(content["optimizer"], content["model"]))  # sentences

A file of this project is held against the model that its saved architecture builds, any file's EMA
and moments against its own weights.
"""

from __future__ import annotations

import numbers
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from doctor.reading.optimizer_state import Member, groups_of, method_of
from doctor.reading.summary import Summary, as_dict, as_list
from model import CodesTransformer, ModelConfig
from run_folder.checkpoint import REQUIRED_KEYS

Shapes = dict[str, tuple[int, ...]]  # of tensors by name


def misfits_of(summary: Summary, content: dict[str, Any], members: dict[str, Member]) -> list[str]:
    """What does not fit in a file whose own words are in the summary already, a sentence each."""
    shapes = _shapes(content["model"])
    return [
        *_odd_keys(summary, content),
        *(f"raw {name} is no tensor" for name in content["model"] if name not in shapes),
        *_odd_weights(summary, content, shapes),
        *_odd_optimizer(summary, content, members, shapes),
    ]


def _odd_keys(summary: Summary, content: dict[str, Any]) -> list[str]:
    """Keys that are missing, and those that hold no dictionary."""
    missing = sorted(REQUIRED_KEYS - set(content)) if summary.style == "own" else []
    odd = [f"lacks `{key}`" for key in missing]
    if summary.style == "own" and summary.step is None:
        odd.append("its progress tells no step")
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


def _expected_shapes(architecture: dict[str, Any]) -> Shapes:
    if not 0 < int(architecture.get("layers", 1)) <= 1000:
        raise ValueError(f"{architecture['layers']} layers")
    with _Unfilled():
        model = CodesTransformer(ModelConfig.from_dict(architecture))
    return {name: tuple(p.shape) for name, p in model.state_dict().items()}


class _Unfilled(TorchFunctionMode):
    """Leaves new weights unfilled: memory that is never touched costs nothing.

    The meta device would do, but filling a tensor there imports the compiler, for seconds.
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
        if lost := sorted(shapes.keys() - members.keys()):
            odd.append(f"no optimizer state for {', '.join(lost[:3])}")
    return odd


def _odd_groups(state: Any) -> list[str]:
    """What the optimizer's param_groups should not be."""
    groups = as_dict(state).get("param_groups", [])
    if not isinstance(groups, list):
        return [f"optimizer param_groups: expected a list, found {type(groups).__name__}"]
    odd = [
        f"optimizer group {i}: expected a dictionary, found {type(g).__name__}"
        for i, g in enumerate(groups)
        if not isinstance(g, dict)
    ]
    for i, group in enumerate(groups_of(state)):
        for key in ("params", "param_names", "betas"):
            if key in group and not isinstance(group[key], (list, tuple)):
                found = type(group[key]).__name__
                odd.append(f"optimizer group {i}: expected a list `{key}`, found {found}")
        if (betas := group.get("betas")) is not None and len(as_list(betas)) != 2:
            odd.append(f"optimizer group {i}: expected two `betas`")
    return odd


STATE_KEYS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}


def _odd_methods(summary: Summary, members: dict[str, Member]) -> list[str]:
    """Moments that a group's optimizer would lack or not have, and a --optim that is another."""
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
    """What a parameter's optimizer state should not be: `step` is a number, moments its shape."""
    odd = []
    for key, moment in state.items():
        if not isinstance(moment, Tensor):
            if key != "step" or not isinstance(moment, numbers.Real):
                odd.append(f"optimizer {key} of {name} is no tensor")
        elif moment.dim() and shape is not None and moment.shape != shape:
            odd.append(f"optimizer {key} of {name} is {tuple(moment.shape)}")
    return odd
