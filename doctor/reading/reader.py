"""From a checkpoint file to its Summary, read in a child process; nothing that it holds is run.

    summary = summarize("rvq_ckpts/rvq_9cb_latest.pt")
    summary.problem          # why the file could not be read, or None

A file is opened safely, described by its own metadata, checked for parts that do not fit, and
measured one tensor at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from doctor.reading.child import in_child
from doctor.reading.container import forget_pages, open_safely
from doctor.reading.measures import measure
from doctor.reading.mismatches import mismatches_of
from doctor.reading.optimizer_state import Member, members_of, settings_of
from doctor.reading.scales import scales_of
from doctor.reading.summary import (
    VECTORS,
    Parameter,
    Problem,
    Scale,
    Summary,
    as_count,
    as_dict,
    as_list,
    as_number,
    as_text,
    as_whole,
    plain,
)
from run_folder.checkpoint import FORMAT
from run_folder.names import checkpoint_name


def summarize(
    path: str | os.PathLike[str], report: Callable[[int], None] = lambda _: None
) -> Summary:
    """Summary of a file, made by a child process; no content of a file makes it raise.

    `report` is called with the number of bytes read so far, while the child works.
    """
    answer = in_child(_read_in_child, str(path), report)
    if isinstance(answer, Problem):
        summary = _blank(str(path))
        summary.problem = answer
        return summary
    return _from_json(answer)


def _read_in_child(path: str, tell: Callable[[int], None]) -> dict[str, Any]:
    return dataclasses.asdict(read_summary(path, tell))


def _from_json(answer: dict[str, Any]) -> Summary:
    parameters = [Parameter(**p) for p in answer.pop("parameters")]
    scales = {part: [Scale(*x) for x in found] for part, found in answer.pop("scales").items()}
    return Summary(**answer, parameters=parameters, scales=scales)


def _blank(path: str) -> Summary:
    _, kind, name_epoch = checkpoint_name(path)
    try:
        facts = os.stat(path)
    except OSError:
        return Summary(path, kind, name_epoch)
    return Summary(path, kind, name_epoch, facts.st_size, facts.st_mtime)


def read_summary(path: str, tell: Callable[[int], None] = lambda _: None) -> Summary:
    """Summary of a file, read in this process.

    Raises:
        Unreadable: the file is unsafe, or no checkpoint.
        CheckpointError: the file is missing or damaged.
    """
    summary = _blank(path)
    content = open_safely(path)
    summary.prefix = content["prefix"]
    _describe(summary, content)
    members = members_of(_optimizer_of(content), content["model"])
    summary.mismatches = mismatches_of(summary, content, members)
    _measure_all(summary, content, members, tell)
    for part, key in (("raw", "model"), ("ema", "ema")):
        summary.scales[part] = scales_of(as_dict(content.get(key)), summary)
    moved = [p for p in summary.parameters if math.isfinite(p.ema_distance)]
    summary.ema_equals_raw = bool(moved) and all(p.ema_distance == 0 for p in moved)
    return summary


def _describe(summary: Summary, content: dict[str, Any]) -> None:
    """What a file contains about itself, in this project's layout or in the older script's.

    The older script saved one plain dictionary.
    """
    is_own = content.get("format") == FORMAT
    progress = as_dict(content.get("progress")) if is_own else content
    architecture = as_dict(content.get("architecture")) if is_own else content
    flags = content.get("flags" if is_own else "cfg")
    scaler = as_dict(content.get("scaler"))
    summary.style = "own" if is_own else "old"
    summary.step = as_count(progress.get("step" if is_own else "global_step"))
    summary.epoch = as_whole(progress.get("epoch"))
    summary.best_val = as_number(progress.get("best_val"))
    summary.vocab_sizes = [as_whole(v) or 0 for v in as_list(architecture.get("vocab_sizes"))]
    summary.saved_at = as_text(content.get("saved_at"))
    summary.scale = as_number(scaler["scale"]) if "scale" in scaler else None
    summary.flags = plain(vars(flags) if isinstance(flags, argparse.Namespace) else as_dict(flags))
    summary.optimizer = settings_of(_optimizer_of(content))
    if is_own:
        summary.architecture, summary.progress = plain(architecture), plain(progress)
        rows = [r for r in as_list(content.get("history")) if isinstance(r, dict)]
        summary.history = plain(rows)
        recent_ce = as_list(as_dict(content.get("guard")).get("recent_ce"))
        summary.recent_ce = [as_number(ce) for ce in recent_ce]


def _optimizer_of(content: dict[str, Any]) -> Any:
    return content.get("optimizer", content.get("opt"))


def _measure_all(
    summary: Summary,
    content: dict[str, Any],
    members: dict[str, Member],
    tell: Callable[[int], None],
) -> None:
    """Fill in the parameters, in network order, and report the bytes read after each."""
    averages = as_dict(content.get("ema"))
    done = 0
    for name, raw in content["model"].items():
        if not (isinstance(name, str) and isinstance(raw, Tensor) and raw.is_floating_point()):
            continue
        if name.endswith(VECTORS):  # a mismatch where they are not finite
            continue
        ema, member = averages.get(name), members.get(name, Member({}, {}))
        summary.parameters.append(measure(name, raw, ema, member, summary))
        for tensor in (raw, ema, *member.state.values()):
            if isinstance(tensor, Tensor):
                forget_pages(tensor)
                done += tensor.numel() * tensor.element_size()
        tell(done)
    summary.parameters.sort(key=lambda p: p.place)
