"""Faults of a single file: I1 to I4, F1 and G8.

    findings = [*check_container(run), *check_keys(run), *check_steps(run), *check_finite(run)]

None of them is a matter of degree: they are faults in any run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from doctor.examined_run import ExaminedRun
from doctor.findings import Cause, Finding, Level, check, in_file
from doctor.reading.foreign import wrapped_by
from doctor.reading.summary import Summary


@check("I1", "the container: stored entries, CRC-32, sizes", Level.CORRUPT, Cause.FILE)
@check("I2", "names that the pickle would call", Level.UNSAFE, Cause.FILE)
def check_container(run: ExaminedRun) -> Iterator[Finding]:
    """I1, I2: files that could not be read, and the reason."""
    for s in run.summaries:
        if s.problem is None:
            continue
        id = "I2" if s.problem.kind == "unsafe" else "I1"
        # A file of another program beside a run's files is no fault of the run.
        level = {"level": Level.WARN} if s.problem.kind == "foreign" else {}
        yield in_file(s, id, s.problem.text, **level)


@check("I3", "keys and shapes against the saved architecture", Level.INCOMPATIBLE, Cause.FILE)
def check_keys(run: ExaminedRun) -> Iterator[Finding]:
    """I3: keys and shapes against the architecture and among each other."""
    for s in run.readable:
        if s.mismatches:
            more = f" and {len(s.mismatches) - 3} more" if len(s.mismatches) > 3 else ""
            yield in_file(s, "I3", "; ".join(s.mismatches[:3]) + more)
        if s.prefix:
            text = (
                f"all its names begin with `{s.prefix}`: it was saved from inside "
                f"{wrapped_by(s.prefix)}, and nothing else is wrong with them"
            )
            yield in_file(s, "I3", text, level=Level.SUSPECT)


@check("I4", "epoch in the name, Adam's count of steps, copies", Level.SUSPECT, Cause.FILE)
def check_steps(run: ExaminedRun) -> Iterator[Finding]:
    """I4: epoch in the name, Adam's count of steps, differing files of one step."""
    for s in run.readable:
        yield from _check_name(s)
        yield from _check_adams_count(s)
    yield from _check_copies(run)


def _check_name(s: Summary) -> Iterator[Finding]:
    if s.name_epoch is None or s.epoch is None or s.style != "own":
        return
    held = s.progress.get("best_epoch") if s.kind == "best archive" else s.epoch
    if held != s.name_epoch:
        yield in_file(s, "I4", f"its name says epoch {s.name_epoch}, it holds epoch {held}")


def _check_adams_count(s: Summary) -> Iterator[Finding]:
    counts = sorted({p.adam_step for p in s.parameters if math.isfinite(p.adam_step)})
    if len(counts) > 1:
        text = f"Adam has taken {counts[0]:.0f} to {counts[-1]:.0f} steps on its tensors"
        yield in_file(s, "I4", text, cause=Cause.OPTIMIZER)
    elif counts and s.style == "own" and s.step not in (None, counts[0]):
        text = f"Adam has taken {counts[0]:.0f} steps, the run {s.step}"
        yield in_file(s, "I4", text, cause=Cause.OPTIMIZER, value=counts[0], baseline=s.step)


def _check_copies(run: ExaminedRun) -> Iterator[Finding]:
    """Files of one step and second must be copies; where they differ the minority is suspect."""
    moments: dict[tuple[int, float], Counter[int]] = {}
    for s in run.readable:
        if s.style == "own" and s.step:
            moments.setdefault(s.moment[:2], Counter())[s.moment[2]] += 1
    for s in run.readable:
        contents = moments.get(s.moment[:2], Counter())
        if len(contents) > 1 and contents[s.moment[2]] <= contents.total() / 2:
            yield in_file(s, "I4", f"differs from another file of the same moment, step {s.step}")


PART_NAMES = {
    "raw": "weights",
    "ema": "EMA",
    "m": "first moments",
    "v": "second moments",
    "momentum": "Muon's momentum",
}


@check("F1", "NaN and Inf in weights, EMA, moments: the first bad tensor", Level.DEAD)
def check_finite(run: ExaminedRun) -> Iterator[Finding]:
    """F1: NaN and Inf, the first bad tensor in network order."""
    for s in run.readable:
        bad = [p for p in s.parameters if p.bad]
        if not bad:
            continue
        parts = sorted({part for p in bad for part in p.bad}, key=list(PART_NAMES).index)
        first = min((p for p in bad if parts[0] in p.bad), key=lambda p: p.place)
        total = sum(sum(p.bad.values()) for p in bad)
        text = (
            f"{total} values are NaN or Inf in {', '.join(PART_NAMES[p] for p in parts)}; first in "
            f"the network: {first.name}"
        )
        cause = Cause.INSTABILITY if "raw" in parts else Cause.OPTIMIZER
        if parts == ["ema"]:
            cause = Cause.EMA
        yield in_file(s, "F1", text, cause=cause, where=first.name, value=total)
    for s in run.readable:
        if s.scale is not None and not math.isfinite(s.scale):
            text = f"GradScaler's scale is {s.scale}"
            yield in_file(s, "F1", text, cause=Cause.SCALER, value=s.scale)


@check("G8", "dead codes: rows of a codebook that are zero", Level.SUSPECT)
def check_codebooks(run: ExaminedRun) -> Iterator[Finding]:
    """Rows of embeddings and heads start at random, and training never makes one exactly zero."""
    sound: dict[tuple[str, str], int | None] = {}  # last step without zero rows
    for s in run.series:
        for p in s.parameters:
            for k, zero in p.zero_rows.items():
                where = f"{p.name} codebook {k}"
                if not zero:
                    sound[p.name, k] = s.step
                    continue
                size = p.shape[0] // len(p.zero_rows)
                text = f"{zero} of {size} rows of codebook {k} in {p.name} are zero: dead codes"
                yield in_file(s, "G8", text, after=sound.get((p.name, k)), where=where, value=zero)
