"""The scale of weights by themselves, without data and without earlier files: A1 to A5.

    findings = list(check_scales(run))

Raw weights and their average are judged alike. The limits follow from what softmax needs and from
the reach of an optimizer's steps; each is several times the value of healthy runs
(benchmarks/journal.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from doctor.checks.displacement import travel
from doctor.examined_run import ExaminedRun
from doctor.findings import Cause, Finding, Level, check, in_file
from doctor.reading.summary import Parameter, Scale, Summary
from run_folder.metrics import finite_number

LOGITS = 3.0  # times sqrt(2 ln V); healthy: 0.2 to 1.1
ATTENTION = 60.0  # healthy: 0.1 to 3, and to 45 in runs that are too hot and still learn
GAIN = 8.0  # RMS of the gains or biases of a norm; healthy: 0.6 to 1.7
MATRIX = 30.0  # RMS times sqrt(columns): 1 keeps an input's size; healthy: 0.1 to 13
REACH = 4.0  # times what a random walk of the optimizer's steps covers; healthy: up to 1
UNLIKE = 10.0  # times the median of the others: layers of one role, codebooks of one table
AHEAD = 5.0  # times the size of its average
HEAD_REACH = 16.0  # of the head, which is pushed one way at first; healthy: up to 4
# A file contains its lr, but not always that of all its steps: below these no size is a finding.
SMALL, SMALL_TABLE, SMALL_OLD_TABLE = 4.0, 0.5, 3.0


@check("A1", "logits of a codebook, by head and last gain: size, offset, bias", Level.DIVERGED)
@check("A2", "attention logits of random inputs", Level.DIVERGED)
@check("A3", "a matrix against its start, its steps, other layers, its EMA", Level.DIVERGED)
@check("A4", "embedding, positions, head against their start and each other", Level.DIVERGED)
@check("A5", "gains and biases of the norms", Level.DIVERGED)
def check_scales(run: ExaminedRun) -> Iterator[Finding]:
    """A1 to A5: logits, attention, matrices, tables of codebooks, gains; the worst of each."""
    for s in run.readable:
        for part in ("raw", "ema"):
            over: dict[str, list[Finding]] = {}
            for figures in (_of_logits, _of_attention, _of_matrices, _of_tables):
                for f in figures(s, part):
                    if f.value > f.baseline:
                        over.setdefault(f.check, []).append(f)
            for found in over.values():
                worst = max(found, key=lambda f: f.value / f.baseline)
                yield worst.with_others(len(found) - 1)


def _figure(
    s: Summary, part: str, id: str, where: str, text: str, value: float, limit: float, n: int = 0
) -> Finding:
    """A figure of the raw weights or of their average, which is a fault if it is over its limit."""
    of, cause = ("", Cause.INSTABILITY) if part == "raw" else ("averaged ", Cause.EMA)
    facts = {"where": where, "value": value, "baseline": limit, "n": n}
    return in_file(s, id, f"{of}{where}: {text}", cause=cause, **facts)


def _of_logits(s: Summary, part: str) -> Iterator[Finding]:
    """A1. Normal logits of deviation r pick one of V codes with certainty once r^2 / 2 > ln V.

    Beyond that cross-entropy has no gradient that would make them larger.
    """
    texts = {
        "logits": "logits of a state of random direction have RMS",
        "offset": "all logits have in common RMS",
        "bias": "biases have RMS",
    }
    for x in s.scales.get(part, []):
        if x.what not in texts or not 0 <= x.number < len(s.vocab_sizes):
            continue
        enough = math.sqrt(2 * math.log(max(s.vocab_sizes[x.number], 2)))
        others = _others(s, part, x)
        limit = enough**2 if x.what == "bias" else LOGITS * enough
        if x.what != "logits" and others:  # softmax does not see what all codes share
            limit = min(limit, max(UNLIKE * others, enough / 2))
        text = f"{texts[x.what]} {x.value:.3g}, where {enough:.2g} tells its codes apart"
        text += f" and other codebooks have {others:.2g}" if others else ""
        where = f"{x.where} codebook {x.number}"
        yield _figure(s, part, "A1", where, text, x.value, limit, len(s.vocab_sizes))


def _others(s: Summary, part: str, scale: Scale) -> float:
    """Median of the same figure over the other codebooks; 0 where there are none."""
    values = [x.value for x in s.scales[part] if x.what == scale.what and x.number != scale.number]
    return float(np.median(values)) if values else 0.0


def _of_attention(s: Summary, part: str) -> Iterator[Finding]:
    """A2, A5. Logits of random queries and keys; what norms multiply their unit input by."""
    for x in s.scales.get(part, []):
        if x.what == "attention":
            text = f"attention logits of head {x.number} have RMS {x.value:.3g} for random inputs"
            yield _figure(s, part, "A2", x.where, text, x.value, ATTENTION)
    for p in s.parameters:
        if len(p.shape) == 1 and "norm" in p.place.role:
            size = _size(p, part)
            yield _figure(
                s, part, "A5", p.name, f"RMS {size:.3g} of a norm's gains or biases", size, GAIN
            )


def _size(p: Parameter, part: str) -> float:
    return p.rms if part == "raw" else p.ema_rms


def _of_matrices(s: Summary, part: str) -> Iterator[Finding]:
    """A3. Matrices between hidden states against their start, each other and their average."""
    matrices = [
        p for p in s.parameters
        if len(p.shape) == 2 and not p.place.role.endswith(("embed", "head", "pos"))
    ]  # fmt: skip
    for p in matrices:
        size, unit = _size(p, part), math.sqrt(max(p.shape[1], 1))
        if size == 0 and (s.step or 0) >= 10:  # some start at zero, and the first step moves them
            yield _figure(s, part, "A3", p.name, f"zero throughout after {s.step} steps", 1.0, 0.5)
        alike = [_size(q, part) * unit for q in matrices if q.place.role == p.place.role]
        others = float(np.median(alike)) if len(alike) > 2 else math.inf
        reach = _reach(s, p)
        floor = 0.0 if _tells_all(s) else SMALL
        limit = min(MATRIX, max(SMALL, UNLIKE * others), max(floor, reach * unit))
        text = f"RMS {size:.3g}, {size * unit:.3g} times what keeps a product's size"
        if math.isfinite(others):
            text += f"; other layers {others:.2g} times"
        if math.isfinite(reach):
            text += f"; {s.step} steps make it {reach:.2g} at most"
        yield _figure(s, part, "A3", p.name, text, size * unit, limit, len(alike))
        if part == "raw" and p.ema_rms > 0 and size * unit > SMALL:
            text = f"RMS {size:.3g}, its average {p.ema_rms:.3g}"
            yield _figure(s, part, "A3", p.name, text, size, AHEAD * p.ema_rms)


def _tells_all(s: Summary) -> bool:
    """Whether its history goes back to the first start of the run, and so contains every lr."""
    first = s.history[0] if s.history else {}
    return first.get("event") == "start" and first.get("step") == 0


def _reach(s: Summary, p: Parameter) -> float:
    """Largest RMS that the steps so far make of a tensor's start; infinite where that is unknown.

    Matrices start at deviation 1 / sqrt(columns) or less, tables at 0.001 or, in the older script,
    at 1 or less. A random walk is what noise makes of the steps.
    """
    saved = [s.flag("lr", 0.0), s.optimizer.get("lr", 0.0)]
    saved += [finite_number(row.get("lr")) or 0.0 for row in s.history]
    lr = max((x for x in saved if math.isfinite(x)), default=0.0)
    if not lr or s.step is None or s.flags.get("init_from"):
        return math.inf
    start, role = max(p.shape[1], 1) ** -0.5, p.place.role
    if role.endswith(("embed", "pos", "head")) and s.style == "own":
        start = 0.001
    elif role.endswith(("embed", "pos")):
        start = 1.0
    update = p.update_rms if p.optimizer == "Muon" else 0.25
    times = HEAD_REACH if role == "head" else REACH
    # A random start is not exactly of this size, and the first steps all go in one direction.
    return 2 * start + times * travel(lr * p.lr_factor, update, s.step + 10, p.noise_steps)


def _of_tables(s: Summary, part: str) -> Iterator[Finding]:
    """A4. Tables against their start, and a codebook's longest embedding against the others'."""
    for p in s.parameters:
        if p.place.role.endswith(("embed", "pos", "head")):
            size, limit = _size(p, part), _reach(s, p)
            if not _tells_all(s):
                limit = max(limit, SMALL_OLD_TABLE if s.style == "old" else SMALL_TABLE)
            text = f"RMS {size:.3g}; {s.step} steps make it {limit:.2g} at most"
            yield _figure(s, part, "A4", p.name, text, size, limit)
    for x in s.scales.get(part, []):
        if x.what == "embedding" and (others := _others(s, part, x)):
            text = f"its longest row has norm {x.value:.3g}, those of other codebooks {others:.2g}"
            yield _figure(s, part,
                "A4", f"{x.where} codebook {x.number}", text, x.value, UNLIKE * others,
                len(s.vocab_sizes),
            )  # fmt: skip
