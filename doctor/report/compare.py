"""What changed between two checkpoints, tensor by tensor.

    result = compare("rvq_9cb_previous.pt", "rvq_9cb_latest.pt")
    print("\\n".join(comparison_lines(result)))

Both files are read like any other: opcodes first, mapped, in a child process with limits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor

from doctor.reading.child import in_child
from doctor.reading.container import forget_pages, open_safely
from doctor.reading.measures import CHUNK, finite_chunk
from doctor.reading.optimizer_state import method_of, methods_of
from doctor.reading.summary import Problem, Unreadable, plain
from run_folder.checkpoint import FORMAT, CheckpointError

PARTS = ("model", "ema")
SETTINGS = ("lr", "lr_factor", "weight_decay", "betas", "eps", "momentum", "adjust_lr_fn")


def compare(a: str, b: str) -> dict[str, Any] | Problem:
    """Differences of two checkpoint files, or why one could not be read.

    Returns:
        "paths"; "optimizers" of both, such as "Muon + AdamW"; "facts": [name, in a, in b] of what
        is no tensor and differs; "tensors": a dict for each tensor of the raw weights and the EMA,
        largest relative change first.
    """
    answer: dict[str, Any] | Problem = in_child(_compare_in_child, a, lambda _: None, b)
    return answer


def _compare_in_child(a: str, tell: Callable[[int], None], b: str) -> dict[str, Any]:
    first, second = _open(a), _open(b)
    facts_a, facts_b = _facts(first), _facts(second)
    facts = [
        [name, facts_a.get(name, "-"), facts_b.get(name, "-")]
        for name in sorted(facts_a.keys() | facts_b.keys())
        if facts_a.get(name, "-") != facts_b.get(name, "-")
    ]
    tensors = []
    for part in PARTS:
        old, new = first.get(part) or {}, second.get(part) or {}
        for name in old.keys() | new.keys():
            tensors.append({"part": part, "name": name, **_change(old.get(name), new.get(name))})
            tell(len(tensors))
    tensors.sort(key=lambda t: (-t["change"], t["part"], t["name"]))
    optimizers = [methods_of(c.get("optimizer", c.get("opt"))) for c in (first, second)]
    return {"paths": [a, b], "optimizers": optimizers, "facts": facts, "tensors": tensors}


def _open(path: str) -> dict[str, Any]:
    """What a file holds; the reason why it cannot be read names it, for there are two."""
    try:
        return open_safely(path)
    except Unreadable as error:
        raise Unreadable(error.problem.kind, f"{path}: {error.problem.text}") from error
    except CheckpointError as error:
        raise Unreadable("corrupt", str(error)) from error


def _facts(content: dict[str, Any]) -> dict[str, Any]:
    """Plain values by dotted name: progress, flags, architecture, settings of the optimizer."""
    kept: dict[str, Any] = {}
    own = content.get("format") == FORMAT
    sections = ("progress", "flags", "architecture", "data", "scaler", "libraries", "cfg")
    for section in sections:
        value = content.get(section)
        if isinstance(value, dict):
            kept.update({f"{section}.{k}": plain(v) for k, v in value.items()})
    for name in () if own else ("epoch", "best_val", "vocab_sizes", "global_step"):
        kept[name] = plain(content.get(name))
    kept["saved_at"] = plain(content.get("saved_at"))
    groups = (content.get("optimizer") or content.get("opt") or {}).get("param_groups") or []
    for i, group in enumerate(groups):
        kept[f"optimizer.{i}"] = method_of(group) or "-"
        kept.update({f"optimizer.{i}.{k}": plain(group[k]) for k in SETTINGS if k in group})
    return kept


def _change(old: Any, new: Any) -> dict[str, Any]:
    """RMS before, after and of the difference, over finite values; shapes where they differ."""
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return {"change": math.inf, "note": "only in " + ("A" if isinstance(old, Tensor) else "B")}
    if old.shape != new.shape:
        return {"change": math.inf, "note": f"shape {tuple(old.shape)} -> {tuple(new.shape)}"}
    sums: Counter[str] = Counter()
    bad_old: Counter[str] = Counter()
    bad_new: Counter[str] = Counter()
    a, b = old.reshape(-1), new.reshape(-1)
    largest = 0.0
    for start in range(0, a.numel(), CHUNK):
        x = finite_chunk(a[start : start + CHUNK], "bad", bad_old)
        y = finite_chunk(b[start : start + CHUNK], "bad", bad_new)
        d = y - x
        largest = max(largest, float(d.abs().max()))
        for key, value in (("a", x), ("b", y), ("d", d)):
            sums[key] += float(value.square().sum())  # type: ignore[assignment]
    forget_pages(old)
    forget_pages(new)
    count = max(a.numel(), 1)
    before, after, moved = (math.sqrt(sums[key] / count) for key in "abd")
    note = f"{bad_old['bad']} -> {bad_new['bad']} not finite" if bad_old or bad_new else ""
    change = math.inf if note else moved / before if before else math.inf if moved else 0.0
    return {
        "change": change, "before": before, "after": after, "moved": moved, "largest": largest,
        "note": note,
    }  # fmt: skip


def comparison_lines(result: dict[str, Any]) -> list[str]:
    """The table that --compare prints."""
    pairs = zip("AB", result["paths"], result["optimizers"], strict=True)
    lines = [f"{letter} {path} ({method or 'no optimizer'})" for letter, path, method in pairs]
    lines.append("")
    lines += [f"  {name}: {_short(a)} -> {_short(b)}" for name, a, b in result["facts"]]
    lines += ["", f"  {'change':>9} {'RMS A':>10} {'RMS B':>10} {'largest':>10}  tensor"]
    same = 0
    for t in result["tensors"]:
        name = t["name"] if t["part"] == "model" else f"{t['name']} (EMA)"
        if t["change"] == 0:
            same += 1
        elif "before" in t:
            note = f"  {t['note']}" if t["note"] else ""
            lines.append(
                f"  {t['change']:>9.2%} {t['before']:>10.4g} {t['after']:>10.4g} "
                f"{t['largest']:>10.3g}  {name}{note}"
            )
        else:
            lines.append(f"  {'':>9} {'':>10} {'':>10} {'':>10}  {name}: {t['note']}")
    return [*lines, f"  {same} of {len(result['tensors'])} tensors are the same"]


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
