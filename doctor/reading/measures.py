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
    """All figures of one floating-point tensor; EMA and state count where they have its shape."""
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
        parameter.zero_rows = {k: int((t == 0).all(1).sum()) for k, t in tables}
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


class _Sums:
    """Sums over a tensor's elements, in double precision, filled a chunk at a time."""

    def __init__(self) -> None:
        self.values: Counter[str] = Counter()

    def add(self, name: str, tensor: Tensor) -> None:
        self.values[name] += float(tensor)  # type: ignore[assignment]

    def rms(self, name: str, count: int) -> float:
        return math.sqrt(max(self.values[name], 0.0) / max(count, 1))


def _measure_elements(
    parameter: Parameter, parts: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    """Fill in what sums over elements tell: w are weights, e their EMA, d = w - e, u the update."""
    sums, bad = _Sums(), Counter[str]()
    parameter.largest = 0.0
    for first in range(0, parameter.numel, CHUNK):
        span = slice(first, first + CHUNK)
        chunk = {part: finite_chunk(flat[span], part, bad) for part, flat in parts.items()}
        w, e = chunk["raw"], chunk.get("ema")
        parameter.largest = max(parameter.largest, float(w.abs().max()))
        sums.add("w", w.square().sum())
        d = None
        if e is not None:
            d = w - e
            sums.add("e", e.square().sum())
            sums.add("d", d.square().sum())
        if "momentum" in chunk:
            _add_momentum(sums, chunk["momentum"], d)
        elif "m" in chunk:
            _add_moments(parameter, sums, chunk["m"], chunk["v"], d, settings)
    parameter.bad = {part: n for part, n in bad.items() if n}
    _note_sums(parameter, sums, set(parts))


def _note_sums(parameter: Parameter, sums: _Sums, parts: set[str]) -> None:
    count, values = parameter.numel, sums.values
    parameter.rms = sums.rms("w", count)
    if "ema" in parts:
        parameter.ema_rms, parameter.ema_distance = sums.rms("e", count), sums.rms("d", count)
    if "momentum" in parts or ("m" in parts and count):
        parameter.m_rms = sums.rms("m", count)
        norms = math.sqrt(max(values["d"] * values["u"], 0.0))
        parameter.update_cos = values["du"] / norms if norms else math.nan
    if "m" in parts and count:
        parameter.v_root = sums.rms("v", count)
        parameter.v_zero = values["zero"] / count
        parameter.update_rms = sums.rms("u", count)


def finite_chunk(chunk: Tensor, what: str, bad: Counter[str]) -> Tensor:
    """A chunk in double precision, its non-finite values counted and replaced by zero."""
    chunk = chunk.detach().double()
    if not math.isfinite(float(chunk.sum())):  # ten times as fast as looking at each
        finite = torch.isfinite(chunk)
        bad[what] += int((~finite).sum())
        chunk = chunk.masked_fill(~finite, 0.0)
    return chunk


def _add_momentum(sums: _Sums, m: Tensor, d: Tensor | None) -> None:
    """Muon goes the way of its momentum, once orthogonalised, which would take a product a file."""
    sums.add("m", m.square().sum())
    sums.add("u", m.square().sum())
    if d is not None:
        sums.add("du", -(d * m).sum())


def _add_moments(
    parameter: Parameter,
    sums: _Sums,
    m: Tensor,
    v: Tensor,
    d: Tensor | None,
    settings: dict[str, Any],
) -> None:
    beta1, beta2 = settings["betas"] or (math.nan, math.nan)
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        beta1 = beta2 = math.nan
    eps, step = settings["eps"], max(parameter.adam_step, 1.0)
    parameter.v_negative += int((v < 0).sum())
    root = v.clamp_min(0.0).sqrt()
    # float32's v underflows below gradients of 4e-23, and a sum of rounded terms may be 1 % off.
    over = m.abs() > 1.01 * parameter.step_bound * root + 1e-18
    parameter.m_over_bound += int(over.sum())
    sums.add("m", m.square().sum())
    sums.add("v", v.clamp_min(0.0).sum())
    sums.add("zero", (root == 0).sum())
    u = m / (1 - beta1**step) / (root / math.sqrt(1 - beta2**step) + eps)
    sums.add("u", u.square().sum())
    if d is not None:
        sums.add("du", -(d * u).sum())


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
