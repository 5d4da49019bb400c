"""What encode_npq.py has done before, told by the records that lie beside its targets.

    judge = Judge(flags)
    todo, done, unknown = sort_out(jobs, judge)

What was made with another codec or other flags is never done, and stays until --overwrite.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from cli.command_line import UsageError
from sound import npq_format as npq
from sound.codec import codec_id
from sound.origin import CodecId, Records

ENCODER = 1  # goes up when the same audio, codec and flags give something else than before


@dataclass(frozen=True)
class Job:
    """One file to make out of another."""

    source: Path
    target: Path
    why: str = ""  # that a target of before is made again


class Verdict(enum.Enum):
    """What is to be done where there is a target."""

    DONE = "made of this source, with this codec and these settings"
    AGAIN = "is made again"
    UNKNOWN = "may have been, and stays"
    OTHER = "made otherwise, and stays until --overwrite is given"


class Judge:
    """Tells what is done from what is not, by the records that lie beside the targets."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags, self.records = flags, Records()

    @cached_property
    def codec(self) -> CodecId:
        """The codec asked for; looked for when there is something to compare or to make."""
        return codec_id(self.flags.codec)

    def settings(self, codebooks: int, most: int) -> dict[str, Any]:
        """Everything beside codec and source that decides what is written."""
        if self.flags.decode:
            return {"decoder": ENCODER}
        sides = {"side_codebooks": self.flags.side_codebooks, "loudness": self.flags.loudness}
        return {"encoder": ENCODER, "codebooks": codebooks, "of": most, **sides}

    def verdict(self, job: Job) -> tuple[Verdict, str]:
        """Of a job whose target is there, and why."""
        try:
            header = None if self.flags.decode else npq.read_header(job.target)
            record, source = self.records.find(job.target), job.source.stat()
        except (npq.NpqError, OSError) as error:
            return Verdict.AGAIN, f"it could not be read ({getattr(error, 'field', error)})"
        if record is None:
            return self._of_unknown(job, header, source)
        most = record.settings.get("of", 0)
        wanted = self.settings(self.flags.codebooks or most, most)
        unlike = [
            f"{name.replace('_', ' ')} {record.settings.get(name)}, not {value}"
            for name, value in wanted.items()
            if record.settings.get(name) != value
        ]
        if record.weights != self.codec.weights:
            unlike.insert(0, f"codec {record.codec_id}, not {self.codec}")
        if unlike:
            return Verdict.OTHER, "; ".join(unlike)
        if (source.st_size, source.st_mtime_ns) != (record.source_size, record.source_mtime_ns):
            return Verdict.AGAIN, "its source is another"
        return Verdict.DONE, ""

    def _of_unknown(
        self, job: Job, header: npq.NpqHeader | None, source: os.stat_result
    ) -> tuple[Verdict, str]:
        """Of a target without a record: of another program, or of before there were records."""
        is_older = job.target.stat().st_mtime_ns < source.st_mtime_ns
        if header is None:
            return (Verdict.AGAIN if is_older else Verdict.UNKNOWN), ""  # decode refuses the first
        side = header.side_codebooks
        mid = header.num_codebooks - side
        if side != self.flags.side_codebooks or mid != (self.flags.codebooks or mid):
            return Verdict.OTHER, f"of unknown origin, {mid} + {side} side codebooks"
        if is_older:
            return Verdict.AGAIN, "of unknown origin, and older than its source"
        return Verdict.UNKNOWN, ""


class Sorted(NamedTuple):
    """What is to be done, and how much need not be."""

    todo: list[Job]
    done: int
    unknown: int


def sort_out(jobs: Sequence[Job], judge: Judge) -> Sorted:
    """Tell the jobs that are left to do from those that are done, or may be.

    Raises:
        UsageError: targets that were made otherwise, and --overwrite is not given.
        CodecError: there is no such codec.
    """
    todo, others, counts = [], [], Counter[Verdict]()
    for job in jobs:
        if judge.flags.overwrite or not os.path.lexists(job.target):
            todo.append(job)
            continue
        verdict, why = judge.verdict(job)
        counts[verdict] += 1
        if verdict is Verdict.AGAIN:
            todo.append(dataclasses.replace(job, why=why))
        elif verdict is Verdict.OTHER:
            others.append(f"{job.target} ({why})")
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UsageError(
            f"{len(others)} of {len(jobs)} targets were made otherwise: {', '.join(others[:3])}"
            f"{more}; use another --out-dir, or --overwrite to replace them"
        )
    return Sorted(todo, counts[Verdict.DONE], counts[Verdict.UNKNOWN])
