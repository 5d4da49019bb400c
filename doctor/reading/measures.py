"""One tensor as numbers: its size, its EMA, its optimizer's moments, and what its role adds.

    parameter = measure("head.weight", raw, ema, members["head.weight"], summary)
    parameter.rms, parameter.ema_distance, parameter.update_rms

Tensors are mapped from disk and read a chunk at a time, in double precision, so that one of 2 GB
takes a few megabytes. Values that are not finite are counted and left out.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from doctor.reading.optimizer_state import Member, describe_steps, group_settings
from doctor.reading.summary import Parameter, Summary, as_number

SAMPLE = 1024  # elements of each tensor that are kept, to measure how far it moved between files
CHUNK = 1 << 18  # elements at a time: the temporaries of a chunk stay in the processor's caches


def measure(name: str, raw: Tensor, ema: Any, member: Member, summary: Summary) -> Parameter:
    """All figures of one floating-point tensor; an EMA or state of another shape is left out."""
    parameter = Parameter(name, list(raw.shape), str(raw.dtype).removeprefix("torch."), {})
    describe_steps(parameter, member.group)
    parameter.adam_step = as_number(member.state.get("step"))
    parts = _parts(parameter, raw, {**member.state, "ema": ema})
    _measure_elements(parameter, parts, group_settings(member.group))
    stride = max(1, raw.numel() // SAMPLE)
    parameter.sample = raw.reshape(-1)[::stride][:SAMPLE].double().tolist()
    place, whole = parameter.place, raw.numel() and not parameter.bad.get("raw")
    if place.role in ("embed", "head") and raw.dim() == 2 and whole:
        tables = tables_of(raw.detach(), place.codebook, summary.vocab_sizes)
        parameter.zero_rows = {str(k): int((t == 0).all(1).sum()) for k, t in tables}
    return parameter


def _parts(parameter: Parameter, raw: Tensor, others: dict[str, Any]) -> dict[str, Tensor]:
    """Flat tensors of the raw shape: "raw", then "ema" and "momentum", or "m" and "v", if any."""
    fitting = {
        key: tensor.reshape(-1)
        for key, tensor in others.items()
        if isinstance(tensor, Tensor) and tensor.shape == raw.shape
    }
    keys = {"ema": "ema"}
    if parameter.optimizer == "Muon":
        keys["momentum"] = "momentum_buffer"
    elif "exp_avg" in fitting and "exp_avg_sq" in fitting:
        keys |= {"m": "exp_avg", "v": "exp_avg_sq"}
    return {"raw": raw.reshape(-1), **{p: fitting[k] for p, k in keys.items() if k in fitting}}


# --- by element ----------------------------------------------------------------------------------

SUMS = tuple((x, x) for x in ("raw", "ema", "apart", "m", "momentum", "update"))
SUMS += (("apart", "update"),)  # of products of elements


def _measure_elements(
    parameter: Parameter, parts: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    """Fill in the figures that are sums over elements, a chunk at a time."""
    sums: Any = Counter()
    bad = Counter[str]()
    for first in range(0, parameter.numel, CHUNK):
        span = slice(first, first + CHUNK)
        chunk = {part: finite_chunk(flat[span], part, bad) for part, flat in parts.items()}
        sums["largest"] = max(sums["largest"], float(chunk["raw"].abs().max()))
        if "ema" in chunk:
            chunk["apart"] = chunk["raw"] - chunk["ema"]
        if "momentum" in chunk:
            # Muon's update is its momentum, orthogonalised: that would take a matrix product.
            chunk["update"] = chunk["momentum"]
        elif "m" in chunk:
            chunk["update"] = _adams_update(parameter, sums, chunk["m"], chunk["v"], settings)
        for a, b in SUMS:
            if a in chunk and b in chunk:
                sums[a, b] += float(chunk[a] @ chunk[b])
    parameter.bad = {part: n for part, n in bad.items() if n}
    parameter.largest = sums["largest"]

    def rms(part: str) -> float:
        return math.sqrt(sums[part, part] / parameter.numel) if (part, part) in sums else math.nan

    parameter.rms, parameter.ema_rms, parameter.ema_distance = map(rms, ("raw", "ema", "apart"))
    parameter.m_rms = rms("momentum" if "momentum" in parts else "m")
    norms = math.sqrt(sums["apart", "apart"] * sums["update", "update"])
    if norms:
        # The update is subtracted, so it points against the way that the weights went.
        parameter.update_cos = -sums["apart", "update"] / norms
    if "v" in sums:
        parameter.v_root = math.sqrt(sums["v"] / parameter.numel)
        parameter.v_zero = sums["zero"] / parameter.numel
        parameter.v_negative, parameter.m_over_bound = sums["negative"], sums["over"]
        parameter.update_rms = rms("update")


def finite_chunk(chunk: Tensor, what: str, bad: Counter[str]) -> Tensor:
    """A chunk in double precision, its non-finite values counted and replaced by zero."""
    chunk = chunk.detach().double()
    if not math.isfinite(float(chunk.sum())):  # ten times as fast as looking at each
        finite = torch.isfinite(chunk)
        bad[what] += int((~finite).sum())
        chunk = chunk.masked_fill(~finite, 0.0)
    return chunk


def _adams_update(
    parameter: Parameter, sums: Any, m: Tensor, v: Tensor, settings: dict[str, Any]
) -> Tensor:
    """Adam's update before lr; counts moments that are impossible or zero."""
    beta1, beta2 = settings["betas"] or (math.nan, math.nan)
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        beta1 = beta2 = math.nan
    step, root = max(parameter.adam_step, 1.0), v.clamp_min(0.0).sqrt()
    # float32's v underflows below gradients of 4e-23, and a sum of rounded terms may be 1 % off.
    over = m.abs() > 1.01 * parameter.step_bound * root + 1e-18
    sums.update(negative=int((v < 0).sum()), over=int(over.sum()), zero=int((root == 0).sum()))
    sums["v"] += float(root @ root)
    return m / (1 - beta1**step) / (root / math.sqrt(1 - beta2**step) + settings["eps"])


# --- by role -------------------------------------------------------------------------------------


def tables_of(matrix: Tensor, codebook: int, vocab_sizes: list[int]) -> list[tuple[int, Tensor]]:
    """Number and rows [V_k, D] of each codebook in an embedding or head.

    A joint table [K * V, D] holds V rows for each; rows after these, up to V, stand for codes that
    a pattern leaves open.
    """
    if codebook >= 0:
        return [(codebook, matrix)]
    rows = len(vocab_sizes) * max(vocab_sizes, default=0)
    if not rows or not rows <= len(matrix) <= rows + max(vocab_sizes):
        return []
    tables = matrix[:rows].unflatten(0, (len(vocab_sizes), -1))
    pairs = zip(tables, vocab_sizes, strict=True)
    return [(k, t[:v]) for k, (t, v) in enumerate(pairs) if v > 0]
