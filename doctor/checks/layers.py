"""What became of single layers: norms and attention, ranks, rows of codebooks: G4 to G8.

    findings = [*check_attention(run), *check_ranks(run), *check_codebooks(run)]

Each is compared with the same layer of the file before, or of the last that was healthy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from doctor.examined_run import ExaminedRun
from doctor.findings import Finding, Level, check, in_file
from doctor.reading.summary import Parameter, Rows, Summary


@check("G4", "attention logits that grow from file to file", Level.SUSPECT)
@check("G6", "gains of the norms that grow from file to file", Level.SUSPECT)
def check_attention(run: ExaminedRun) -> Iterator[Finding]:
    """G4, G6: gains of the norms, bounds of attention logits."""
    gains: dict[str, float] = {}
    for s in run.series:
        for p in s.parameters:
            if _is_gain(p) and not p.bad:
                yield from _check_gain(s, p, gains)
    yield from _check_logit_bounds(run)


def _is_gain(p: Parameter) -> bool:
    """Whether it is the gain of a norm, as far as a name can tell."""
    named = p.name.endswith("weight") and ("norm" in p.name or "ln" in p.name)
    return named and len(p.shape) == 1


def _check_gain(s: Summary, p: Parameter, gains: dict[str, float]) -> Iterator[Finding]:
    """Against the last healthy RMS in `gains`, which a healthy one replaces."""
    before = gains.get(p.name)
    if before is None or not (p.rms > 2 * before and p.rms > 2):
        gains[p.name] = p.rms
        return
    text = f"gains of {p.name}: RMS {p.rms:.3g}, before {before:.3g}, largest {p.largest:.3g}"
    bounds_logits = p.place.role.endswith(("attn.q_norm", "attn.k_norm"))
    if bounds_logits:
        text += "; the attention logits that they bound can run away"
    id = "G4" if bounds_logits else "G6"
    yield in_file(s, id, text, where=p.name, value=p.rms, baseline=before)


def _check_logit_bounds(run: ExaminedRun) -> Iterator[Finding]:
    """Growth from file to file, in models without QK-norm, whose logits nothing else bounds."""
    before: dict[tuple[str, int], float] = {}
    for s in run.series:
        for x in s.scales.get("raw", []):
            if x.what != "attention" or "norm" in x.where:
                continue
            ratio = x.value / max(before.get((x.where, x.number), math.inf), 1e-9)
            if ratio > 3:
                text = f"{x.where}: the attention logits of head {x.number} grew {ratio:.1f} fold"
                yield in_file(s, "G4", text, where=x.where, value=ratio)
            else:
                before[x.where, x.number] = x.value


@check("G5", "stable rank of the matrices", Level.INFO)
def check_ranks(run: ExaminedRun) -> Iterator[Finding]:
    """G5: matrices that collapse towards one direction."""
    for a, b in zip(run.series, run.series[1:], strict=False):
        before = {p.name: p.stable_rank for p in a.parameters}
        for p in b.parameters:
            old = before.get(p.name, math.nan)
            # The head and outputs of blocks start at zero and find their rank in the first epochs.
            collapsed = p.stable_rank < 0.5 * old and old > 6
            if not collapsed or p.place.role.endswith(("head", "embed")):
                continue
            level = Level.SUSPECT if p.stable_rank < 1.5 else Level.INFO
            text = f"stable rank of {p.name} fell from {old:.1f} to {p.stable_rank:.1f}"
            yield in_file(
                b, "G5", text, level=level, where=p.name, value=p.stable_rank, baseline=old,
                after=a.step,
            )  # fmt: skip


@check("G7", "rows of a codebook in embedding or head that jump", Level.SUSPECT)
@check("G8", "rows of a codebook that died or shrank", Level.SUSPECT)
def check_codebooks(run: ExaminedRun) -> Iterator[Finding]:
    """G7, G8: rows of heads and embeddings, by codebook, against the last good file."""
    good: dict[tuple[str, int], tuple[Rows, int]] = {}
    for s in run.series:
        for p in s.parameters:
            yield from _judge_table(s, p, good)


def _judge_table(
    s: Summary, p: Parameter, good: dict[tuple[str, int], tuple[Rows, int]]
) -> Iterator[Finding]:
    """Against `good`, by table and codebook the last good rows and their step, which it renews."""
    known = {
        r.codebook: good[p.name, r.codebook][0] for r in p.rows if (p.name, r.codebook) in good
    }
    typical = float(np.median([r.median for r in p.rows])) if len(p.rows) >= 3 else math.nan
    ratios = [
        r.median / max(known[r.codebook].median, 1e-12) for r in p.rows if r.codebook in known
    ]
    growth = float(np.median(ratios)) if len(ratios) >= 3 else 1.0  # of the table as a whole
    for r in p.rows:
        said = _judge_rows(p, r, known.get(r.codebook), typical, growth)
        if said is None:
            good[p.name, r.codebook] = r, s.step or 0
            continue
        id, text, value, baseline = said
        after = good[p.name, r.codebook][1] if r.codebook in known else None
        where = f"{p.name} codebook {r.codebook}"
        yield in_file(s, id, text, value=value, after=after, baseline=baseline, where=where)


def _judge_rows(
    p: Parameter, r: Rows, old: Rows | None, typical: float, growth: float
) -> tuple[str, str, float, float] | None:
    """Id, text, value and baseline of what is wrong with a codebook's rows, or None."""
    which = f"codebook {r.codebook} in {p.name}"
    if r.zero:  # rows start at random: training never makes one exactly zero
        before = old.zero if old else math.nan
        size = p.shape[0] // max(len(p.rows), 1)
        return "G8", f"{r.zero} of {size} rows of {which} are zero: dead codes", r.zero, before
    if old is not None and r.low < 0.3 * old.low:
        text = f"the shortest rows of {which} shrank to norm {r.low:.2g}, before {old.low:.2g}"
        return "G8", text, r.low, old.low
    jumped = old is not None and not 0.4 < r.median / max(old.median * growth, 1e-12) < 4
    settled = old is not None and old.median > 0.05
    # Codes that never come keep their short first rows: where some rows are long, none has shrunk.
    short = r.median < 0.2 * typical and r.largest < typical
    stands_out = short or r.median > 5 * typical  # never, where `typical` is NaN
    if old is not None and jumped and (settled or stands_out):
        text = f"rows of {which} have norm {r.median:.3g}, before {old.median:.3g}"
        return "G7", text, r.median, old.median
    return None
