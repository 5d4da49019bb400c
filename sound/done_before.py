"""What encode_npq.py has done before, by the records beside its targets.

    judge = Judge(flags)
    todo, done, unknown = sort_out(jobs, judge)

A target made with another codec or other flags does not count as done, and stays until --overwrite.
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
from typing import Any

from cli.command_line import UsageError
from sound import npq_format as npq
from sound.codec import codec_id
from sound.origin import CodecId, Records

ENCODER = 1  # to be raised when the same audio, codec and flags give other codes than before


@dataclass(frozen=True)
class Job:
    """One file to make out of another."""

    source: Path
    target: Path
    part: int = 0  # of --offsets parts of a frame, by which the sound begins later
    why: str = ""  # why an existing target is made again


class Verdict(enum.Enum):
    """What to do about an existing target."""

    DONE = "made of this source, with this codec and these settings"
    AGAIN = "is made again"
    UNKNOWN = "may have been, and stays"
    OTHER = "made otherwise, and stays until --overwrite is given"


class Judge:
    """Judges existing targets by the records beside them."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags, self.records = flags, Records()

    @cached_property
    def codec(self) -> CodecId:
        """The requested codec; its weights are read when they are first needed."""
        return codec_id(self.flags.codec)

    def settings(self, job: Job, codebooks: int, most: int) -> dict[str, Any]:
        """All settings that decide the content of a target, beside codec and source."""
        if self.flags.decode:
            return {"decoder": ENCODER}
        sides = {"side_codebooks": self.flags.side_codebooks, "loudness": self.flags.loudness}
        shift = {"shift": f"{job.part}/{self.flags.offsets}"} if job.part else {}
        return {"encoder": ENCODER, "codebooks": codebooks, "of": most, **sides, **shift}

    def verdict(self, job: Job) -> tuple[Verdict, str]:
        """The verdict on a job whose target exists, and its reason."""
        try:
            header = None if self.flags.decode else npq.read_header(job.target)
            record, source = self.records.find(job.target), job.source.stat()
        except (npq.NpqError, OSError) as error:
            return Verdict.AGAIN, f"it could not be read ({getattr(error, 'field', error)})"
        if record is None:
            return self._of_unknown(job, header, source)
        most = record.settings.get("of", 0)
        wanted = self.settings(job, self.flags.codebooks or most, most)
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
        """The verdict on a target without a record: of another program or an older version."""
        if header is not None:
            side = header.side_codebooks
            mid = header.num_codebooks - side
            if side != self.flags.side_codebooks or mid != (self.flags.codebooks or mid):
                return Verdict.OTHER, f"of unknown origin, {mid} + {side} side codebooks"
        if job.target.stat().st_mtime_ns >= source.st_mtime_ns:
            return Verdict.UNKNOWN, ""
        # Without a reason `decode` refuses: sound of unknown origin may be an original.
        return Verdict.AGAIN, "of unknown origin, and older than its source" if header else ""


def sort_out(jobs: Sequence[Job], judge: Judge) -> tuple[list[Job], int, int]:
    """The jobs to do, and the numbers of those that are done and those of unknown origin.

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
    return todo, counts[Verdict.DONE], counts[Verdict.UNKNOWN]
