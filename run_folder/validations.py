"""Judges a run's validations: a plateau, overfitting, or a val above guessing.

    trouble = trouble_of(RunMetrics(read_metrics(files.metrics)))
    print(trouble.text if trouble else "val falls")

The trainer prints this judgement, the run's page shows it, and the doctor's verdict OVERFITTING
uses the same rule.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from run_folder.metrics import RunMetrics, finite_number, gap_of, number

STALE_PASSES = 10.0  # passes over the music without a new lowest val that make a plateau
FIRST_PASSES = 2.0  # passes in which val may be above guessing
OVERFIT_RISE = 0.1  # nats above its lowest value at which a smoothly rising val is overfitting
REMEDY = (
    "these can lower it: more music, encode_npq.py --offsets 4, a smaller model, or --init-from "
    "the best with a longer --ctx; the best is kept, and --patience N ends such a run by itself"
)


class Trouble(NamedTuple):
    """A kind of trouble (plateau, overfitting or guessing) and a line with figures and remedy."""

    kind: str
    text: str


def trouble_of(metrics: RunMetrics) -> Trouble | None:
    """Return what is wrong with the newest validation; None if val falls or too little is known.

    The newest `start` or `resume` row contains the passes per step.
    """
    start = metrics.newest_start()
    passes_a_step = finite_number(start.get("passes_a_step")) or 0.0
    validations = finite_validations(metrics)
    if not validations or not passes_a_step:
        return None
    newest, best = validations[-1], min(validations, key=lambda row: row["val"])
    val, passes = newest["val"], (newest["step"] - best["step"]) * passes_a_step
    guessing = mean_of_guessing(start)
    if guessing < val and newest["step"] * passes_a_step >= FIRST_PASSES:
        said = f"val {val:.3f} is above guessing, {guessing:.3f}: the model is worse than none"
        return Trouble("guessing", f"{said}; {REMEDY}")
    since = f"its lowest {best['val']:.3f} of step {best['step']}, {passes:.0f} passes ago"
    if overfits(metrics):
        gap = number(gap_of(newest), ".3f")
        said = f"val {val:.3f} has risen from {since}, while train falls: overfitting, gap {gap}"
        return Trouble("overfitting", f"{said}; {REMEDY}")
    if passes >= STALE_PASSES:
        return Trouble("plateau", f"val is not below {since}; {REMEDY}")
    return None


def finite_validations(metrics: RunMetrics) -> list[dict[str, Any]]:
    """Return the rows of the validations with a finite val."""
    return [row for row in metrics.epochs if isinstance(row.get("val"), float)]


def mean_of_guessing(start: dict[str, Any]) -> float:
    """Return the val of a uniform prediction: the mean of ln V over codebooks, nats per code.

    `start` is a `start` row of the metrics; without vocab sizes in it the result is infinite.
    """
    sizes = (start.get("model") or {}).get("vocab_sizes") or []
    return float(np.mean(np.log(sizes))) if sizes else math.inf


def overfits(metrics: RunMetrics) -> bool:
    """Return whether val rises smoothly from its lowest value while train does not rise.

    Train is `train_ce`, the other side of the gap, or the objective where rows of an older version
    lack it. A divergence rises in one jump; overfitting spreads its rise over many validations.
    """
    rows = [row for row in finite_validations(metrics) if isinstance(row.get("train"), float)]
    if len(rows) < 5:
        return False
    after = rows[int(np.argmin([row["val"] for row in rows])) :]
    if len(after) < 4 or after[-1]["val"] < after[0]["val"] + OVERFIT_RISE:
        return False
    rises = np.diff([row["val"] for row in after])
    smooth = rises.max() < 0.6 * rises[rises > 0].sum() and (rises > 0).mean() >= 0.6
    train = "train_ce" if all(isinstance(row.get("train_ce"), float) for row in after) else "train"
    return bool(smooth and after[-1][train] <= after[0][train])
