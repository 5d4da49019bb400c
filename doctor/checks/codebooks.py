"""Rows of zeros in embeddings and heads: G8.

findings = [*check_codebooks(run)]
"""

from __future__ import annotations

from collections.abc import Iterator

from doctor.examined_run import ExaminedRun
from doctor.findings import Finding, Level, check, in_file


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
