"""The state dict of an optimizer: its settings, the moments of each parameter, the size of a step.

    settings_of(content["optimizer"])["method"]                         # such as "Muon + AdamW"
    members_of(content["optimizer"], content["model"])["head.weight"].state["exp_avg"]
    moment_bound(0.9, 0.95)                                             # 1.165: abs(m) / sqrt(v)

A param_group is recognised by its settings. The limits on steps hold for all gradients.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from doctor.reading.summary import Parameter, as_dict, as_list, as_number


class Member(NamedTuple):
    """What an optimizer holds for one parameter: its param_group, and its moments by key."""

    group: dict[str, Any]
    state: dict[str, Any]


def settings_of(state: Any) -> dict[str, Any]:
    """Settings of the whole optimizer, as in Summary.optimizer; empty without groups."""
    groups = [group_settings(g) for g in groups_of(state)]
    if not groups:
        return {}
    return {
        "method": " + ".join(dict.fromkeys(g["method"] for g in groups if g["method"])),
        "lr": max(g["lr"] / g["lr_factor"] for g in groups),
        "groups": groups,
    }


def group_settings(group: dict[str, Any]) -> dict[str, Any]:
    """The settings of a param_group that the doctor needs."""
    betas = [as_number(b) for b in as_list(group.get("betas"))]
    factor = as_number(group.get("lr_factor", 1.0))
    return {
        "method": method_of(group),
        "lr_factor": factor if 0 < factor < math.inf else 1.0,
        "betas": betas if len(betas) == 2 else [],
        **{name: as_number(group.get(name)) for name in ("lr", "eps", "momentum", "weight_decay")},
    }


def method_of(group: dict[str, Any]) -> str:
    """The optimizer of a param_group, recognised by its settings; "" if unknown."""
    return "Muon" if "ns_steps" in group else "AdamW" if "betas" in group else ""


def groups_of(state: Any) -> list[dict[str, Any]]:
    """The param_groups of a state dict, as far as they are dictionaries."""
    return [g for g in as_list(as_dict(state).get("param_groups")) if isinstance(g, dict)]


def members_of(state: Any, model: dict[str, Any]) -> dict[str, Member]:
    """Group and moments by parameter name; without names in the file, by the parameters' order."""
    groups, moments = groups_of(state), as_dict(as_dict(state).get("state"))
    group_of = {i: g for g in groups for i in as_list(g.get("params")) if isinstance(i, int)}
    names = _names_of(groups)
    if not names:
        named = [n for n, t in model.items() if isinstance(t, Tensor) and t.is_floating_point()]
        if len(group_of) == len(named):
            names = dict(zip(sorted(group_of), named, strict=True))
    return {
        names[i]: Member(group_of.get(i, {}), s)
        for i, s in moments.items()
        if i in names and isinstance(s, dict)
    }


def _names_of(groups: list[dict[str, Any]]) -> dict[int, str]:
    """Names of parameters by their numbers, where the groups tell them."""
    names: dict[int, str] = {}
    for group in groups:
        pairs = zip(as_list(group.get("params")), as_list(group.get("param_names")), strict=False)
        names.update((i, n) for i, n in pairs if isinstance(i, int) and isinstance(n, str))
    return names


# --- how far a step can go -----------------------------------------------------------------------


def moment_bound(beta1: float, beta2: float) -> float:
    """Largest possible abs(m) / sqrt(v) of Adam, before bias correction (Cauchy-Schwarz).

    m = (1 - b1) sum b1^i g_i and v = (1 - b2) sum b2^i g_i^2; writing b1^i = (b1 / sqrt b2)^i
    sqrt(b2)^i gives m^2 <= v (1 - b1)^2 / ((1 - b2) (1 - b1^2 / b2)). Infinite if b1^2 >= b2.
    """
    if not 0 <= beta1 * beta1 < beta2 < 1:
        return math.inf
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1 * beta1 / beta2))


# Largest singular value after Muon's five Newton-Schulz steps s -> a s + b s^3 + c s^5 from [0, 1],
# with torch's coefficients (Jordan et al. 2024, "Muon").
NEWTON_SCHULZ_GAIN = 1.20236


def describe_steps(parameter: Parameter, group: dict[str, Any]) -> None:
    """Fill in a parameter's optimizer, its rate as a multiple, its decay, the limit of a step.

    Its shape must be known. Adam's update is measured later, from its moments; Muon's is the same
    for all gradients: orthogonalised, an update of shape [A, B] has min(A, B) singular values near
    1, so RMS 1 / sqrt(max(A, B)), and no element above the largest of them; then `adjust_lr_fn`
    scales it by the shape (Jordan et al. 2024; Liu et al. 2025, "Muon is scalable", section 2.2).
    """
    settings = group_settings(group)
    parameter.optimizer, parameter.lr_factor = settings["method"], settings["lr_factor"]
    parameter.decay = settings["weight_decay"]
    if parameter.optimizer == "Muon" and len(parameter.shape) == 2:
        rows, columns = (max(n, 1) for n in parameter.shape)
        ratio = math.sqrt(max(1.0, rows / columns))
        if group.get("adjust_lr_fn") == "match_rms_adamw":
            ratio = 0.2 * math.sqrt(max(rows, columns))
        parameter.update_rms = ratio / math.sqrt(max(rows, columns))
        parameter.step_bound = ratio * NEWTON_SCHULZ_GAIN
        if 0 <= settings["momentum"] < 1:
            parameter.noise_steps = (1 + settings["momentum"]) / (1 - settings["momentum"])
    elif parameter.optimizer == "AdamW" and settings["betas"]:
        parameter.step_bound = moment_bound(*settings["betas"])
