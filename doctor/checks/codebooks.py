"""What became of the rows of each codebook in embeddings and heads, from file to file: G8.

findings = [*check_codebooks(run)]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from doctor.examined_run import ExaminedRun
from doctor.findings import Finding, Level, check, in_file
from doctor.reading.summary import Parameter, Rows


@check("G8", "rows of a codebook that died or shrank", Level.SUSPECT)
def check_codebooks(run: ExaminedRun) -> Iterator[Finding]:
    """G8: rows of heads and embeddings against those of the last good file."""
    good: dict[tuple[str, int], tuple[Rows, int]] = {}
    for s in run.series:
        for p in s.parameters:
            for r in p.rows:
                old, after = good.get((p.name, r.codebook), (None, None))
                said = _judge_rows(p, r, old)
                if said is None:
                    good[p.name, r.codebook] = r, s.step or 0
                    continue
                text, facts = said
                where = f"{p.name} codebook {r.codebook}"
                yield in_file(s, "G8", text, after=after, where=where, **facts)


def _judge_rows(p: Parameter, r: Rows, old: Rows | None) -> tuple[str, dict[str, Any]] | None:
    """Text, value and baseline of what is wrong with a codebook's rows, or None."""
    which = f"codebook {r.codebook} in {p.name}"
    if r.zero:  # rows start at random: training never makes one exactly zero
        size = p.shape[0] // max(len(p.rows), 1)
        text = f"{r.zero} of {size} rows of {which} are zero: dead codes"
        return text, {"value": r.zero, **({"baseline": old.zero} if old else {})}
    if old is not None and r.low < 0.3 * old.low:
        text = f"the shortest rows of {which} shrank to norm {r.low:.2g}, before {old.low:.2g}"
        return text, {"value": r.low, "baseline": old.low}
    return None
