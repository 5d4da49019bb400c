"""The size of logits, attention and offsets that weights make of random inputs.

    scales_of(content["model"], summary)     # [Scale("logits", "head.weight", 3, 1.7), ...]

A norm gives states of unit size times its gain, so the weights alone determine the output for a
state of random direction. One file can thus be judged without data and without earlier files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from doctor.reading.measures import tables_of
from doctor.reading.summary import Scale, Summary, as_whole, place_of

HEAD_CHANNELS = 32  # of the depth transformer


def scales_of(weights: dict[Any, Any], summary: Summary) -> list[Scale]:
    """All figures of a model's weights; tensors that are not as expected are left out."""
    known = {
        n: t for n, t in weights.items()
        if isinstance(n, str) and isinstance(t, Tensor) and t.is_floating_point()
    }  # fmt: skip
    gains = {place_of(n).role: t.float() for n, t in known.items() if t.dim() == 1}
    last = gains.get("depth.norm", gains.get("norm"))
    found: list[Scale] = []
    for name, tensor in known.items():
        place = place_of(name)
        if place.role in ("head", "embed") and tensor.dim() == 2:
            rows = _rows_of(name.removesuffix(".weight"), known)
            for k, table in tables_of(rows, place.codebook, summary.vocab_sizes):
                found += _of_table(name, k, table.float(), last, place.role)
        elif place.role == "head.bias":
            found.append(Scale("bias", name, place.codebook, _rms(tensor.float())))
        elif place.role.endswith("attn.qkv") and tensor.dim() == 2:
            found += _of_attention(name, tensor.float(), known, summary)
    return found


def _rows_of(name: str, known: dict[str, Tensor]) -> Tensor:
    """All rows of a table, with what it adds by its codec's vectors; see `layers/code_rows.py`."""
    weight, vectors, proj = (known.get(f"{name}.{x}") for x in ("weight", "vectors", "proj"))
    assert weight is not None, "it is what was found"
    if vectors is None or proj is None or vectors.dim() != 3 or proj.dim() != 3:
        return weight
    shape = len(vectors), vectors.shape[2], weight.shape[1]
    if proj.shape != shape or len(weight) != vectors.shape[0] * vectors.shape[1]:
        return weight  # a mismatch, which is told by itself
    return weight.float() + (vectors.float() @ proj.float()).flatten(0, 1)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _of_table(name: str, k: int, table: Tensor, last: Tensor | None, role: str) -> Iterator[Scale]:
    """Figures of codebook k's rows [V, D] in an embedding or a head, behind the last gain [D].

    The common part of all codes has no effect in softmax, so it is a figure of its own.
    """
    if role == "embed":
        yield Scale("embedding", name, k, float(table.norm(dim=1).max()))
        return
    if last is not None and last.shape == table.shape[1:]:
        table = table * last
    mean = table.mean(0)
    yield Scale("logits", name, k, _rms((table - mean).norm(dim=1)))
    yield Scale("offset", name, k, float(mean.norm()))


def _of_attention(
    name: str, qkv: Tensor, known: dict[str, Tensor], summary: Summary
) -> Iterator[Scale]:
    """RMS of a block's attention logits over random normalised inputs.

    From the gains of QK-norm, or without it ||G Wq^T Wk G|| / sqrt(C) of each head, with the gains
    G of the norm before.
    """
    block = name.removesuffix("attn.qkv.weight")
    gains = [known.get(f"{block}attn.{part}_norm.weight") for part in "qk"]
    if gains[0] is not None and gains[1] is not None:
        if gains[0].shape == gains[1].shape:
            yield Scale("attention", f"{block}attn.q_norm.weight", 0, _rms(gains[0] * gains[1]))
        return
    width, gain = qkv.shape[1], known.get(f"{block}norm1.weight")
    heads = as_whole(summary.architecture.get("heads", summary.flags.get("heads"))) or 1
    heads = width // HEAD_CHANNELS if name.startswith("depth.") else heads
    if len(qkv) != 3 * width or heads < 1 or width % heads:
        return
    if gain is not None and gain.shape == (width,):
        qkv = qkv * gain
    q, k, _ = qkv.unflatten(0, (3, heads, -1))  # [H, C, D] each
    squares = ((q @ q.mT) * (k @ k.mT)).sum((1, 2)).clamp_min(0.0) / (width // heads)
    for head, square in enumerate(squares.tolist()):
        yield Scale("attention", name, head, math.sqrt(square))
