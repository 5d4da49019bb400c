"""What the validations of a run say: val has stopped falling, is overfitting, or above guessing.

    trouble = trouble_of(RunMetrics(read_metrics(files.metrics)))
    print(trouble.text if trouble else "val falls")

One judgement for all: the trainer prints it, the page shows it, and the doctor's verdict
OVERFITTING is the same rule.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from run_folder.metrics import RunMetrics, finite_number

STALE_PASSES = 10.0  # passes over the music without a new lowest val are a plateau
FIRST_PASSES = 2.0  # val may be above guessing before
OVERFIT_RISE = 0.1  # nats that val has risen above its lowest value
REMEDY = (
    "what moves it: more music, a smaller model, or --init-from the best with a longer --ctx; the "
    "best is kept, and --patience N ends such a run by itself"
)


class Trouble(NamedTuple):
    """Its kind (plateau, overfitting or guessing) and a line that says what to do."""

    kind: str
    text: str


def trouble_of(metrics: RunMetrics) -> Trouble | None:
    """What is wrong with the newest validation; None where val falls, or too little is known.

    Passes are counted from the newest `start` or `resume` row, which says how many a step is.
    """
    starts = [row for row in metrics.rows if row["event"] in ("start", "resume")]
    start = starts[-1] if starts else {}
    passes_a_step = finite_number(start.get("passes_a_step")) or 0.0
    validations = finite_validations(metrics)
    if not validations or not passes_a_step:
        return None
    newest, best = validations[-1], min(validations, key=lambda row: row["val"])
    val, passes = newest["val"], (newest["step"] - best["step"]) * passes_a_step
    guessing = mean_of_guessing(start)
    if guessing < val and newest["step"] * passes_a_step >= FIRST_PASSES:
        said = f"val {val:.3f} is above guessing, {guessing:.3f}: this model of this music is worse"
        return Trouble("guessing", f"{said} than none; {REMEDY}")
    since = f"its lowest {best['val']:.3f} of step {best['step']}, {passes:.0f} passes ago"
    if overfits(metrics):
        said = f"val {val:.3f} has risen from {since}, while train falls: overfitting"
        return Trouble("overfitting", f"{said}; {REMEDY}")
    if passes >= STALE_PASSES:
        return Trouble("plateau", f"val has not fallen below {since}; {REMEDY}")
    return None


def finite_validations(metrics: RunMetrics) -> list[dict[str, Any]]:
    """Rows of the validations whose val is a number."""
    return [row for row in metrics.epochs if isinstance(row.get("val"), float)]


def mean_of_guessing(start: dict[str, Any]) -> float:
    """Val of an even guess, nats per code: the mean of ln V; infinite where V is not known."""
    sizes = (start.get("model") or {}).get("vocab_sizes") or []
    return float(np.mean(np.log(sizes))) if sizes else math.inf


def overfits(metrics: RunMetrics) -> bool:
    """Whether val rises smoothly from its lowest value while train still falls.

    A blow-up is a jump; overfitting spreads its rise over many validations.
    """
    rows = [row for row in finite_validations(metrics) if isinstance(row.get("train"), float)]
    if len(rows) < 5:
        return False
    after = rows[int(np.argmin([row["val"] for row in rows])) :]
    if len(after) < 4 or after[-1]["val"] < after[0]["val"] + OVERFIT_RISE:
        return False
    rises = np.diff([row["val"] for row in after])
    smooth = rises.max() < 0.6 * rises[rises > 0].sum() and (rises > 0).mean() >= 0.6
    return bool(smooth and after[-1]["train"] <= after[0]["train"])
