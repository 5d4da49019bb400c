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


def _measure_elements(
    parameter: Parameter, parts: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    """Fill in the figures that are sums over elements, a chunk at a time.

    In the names of the sums w are weights, e their EMA, d = w - e, u the update.
    """
    sums, bad = Counter[str](), Counter[str]()
    parameter.largest = 0.0
    for first in range(0, parameter.numel, CHUNK):
        span = slice(first, first + CHUNK)
        chunk = {part: finite_chunk(flat[span], part, bad) for part, flat in parts.items()}
        w, e = chunk["raw"], chunk.get("ema")
        parameter.largest = max(parameter.largest, float(w.abs().max()))
        _add(sums, ww=w @ w)
        d = None
        if e is not None:
            d = w - e
            _add(sums, ee=e @ e, dd=d @ d)
        if "momentum" in chunk:
            # Muon's update is its momentum, orthogonalised: that would take a matrix product.
            u = m = chunk["momentum"]
            _add(sums, mm=m @ m)
        elif "m" in chunk:
            u = _add_moments(parameter, sums, chunk["m"], chunk["v"], settings)
        else:
            continue
        _add(sums, uu=u @ u, du=-(d @ u) if d is not None else 0.0)
    parameter.bad = {part: n for part, n in bad.items() if n}
    _note_sums(parameter, sums, set(parts))


def _add(sums: Counter[str], **values: Tensor | float) -> None:
    for name, value in values.items():
        sums[name] += float(value)  # type: ignore[assignment]


def _note_sums(parameter: Parameter, sums: Counter[str], parts: set[str]) -> None:
    count = parameter.numel

    def rms(name: str) -> float:
        return math.sqrt(max(sums[name], 0.0) / max(count, 1))

    parameter.rms = rms("ww")
    if "ema" in parts:
        parameter.ema_rms, parameter.ema_distance = rms("ee"), rms("dd")
    if "momentum" in parts or ("m" in parts and count):
        parameter.m_rms = rms("mm")
        norms = math.sqrt(max(sums["dd"] * sums["uu"], 0.0))
        parameter.update_cos = sums["du"] / norms if norms else math.nan
    if "m" in parts and count:
        parameter.v_root = rms("v")
        parameter.v_zero = sums["zero"] / count
        parameter.update_rms = rms("uu")


def finite_chunk(chunk: Tensor, what: str, bad: Counter[str]) -> Tensor:
    """A chunk in double precision, its non-finite values counted and replaced by zero."""
    chunk = chunk.detach().double()
    if not math.isfinite(float(chunk.sum())):  # ten times as fast as looking at each
        finite = torch.isfinite(chunk)
        bad[what] += int((~finite).sum())
        chunk = chunk.masked_fill(~finite, 0.0)
    return chunk


def _add_moments(
    parameter: Parameter, sums: Counter[str], m: Tensor, v: Tensor, settings: dict[str, Any]
) -> Tensor:
    """Count impossible moments, add up the others; returns Adam's update before lr."""
    beta1, beta2 = settings["betas"] or (math.nan, math.nan)
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        beta1 = beta2 = math.nan
    eps, step = settings["eps"], max(parameter.adam_step, 1.0)
    parameter.v_negative += int((v < 0).sum())
    root = v.clamp_min(0.0).sqrt()
    # float32's v underflows below gradients of 4e-23, and a sum of rounded terms may be 1 % off.
    over = m.abs() > 1.01 * parameter.step_bound * root + 1e-18
    parameter.m_over_bound += int(over.sum())
    _add(sums, mm=m @ m, v=root @ root, zero=(root == 0).sum())
    return m / (1 - beta1**step) / (root / math.sqrt(1 - beta2**step) + eps)


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
