"""Learning rate, losses, gradients and the probe's results: S1, S2, H1 to H4, P1.

    findings = [*check_learning_rate(run), *check_validation(run), *check_probe(run)]

Losses are nats per code, k numbers codebooks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from doctor.examined_run import ExaminedRun, scheduled_lr, spread_of
from doctor.findings import Cause, Finding, Level, check, in_file, in_metrics
from doctor.reading.summary import Summary
from run_folder.metrics import finite_number, gap_of, number
from run_folder.validations import OVERFIT_RISE, finite_validations, overfits

LASTING = 0.1  # nats above guessing that an average may have; the guard's own limit
BADLY = 1.0  # ... and a few windows of a codebook that is being learned

# --- learning rate, best value -------------------------------------------------------------------


@check("S1", "learning rate against schedule and flags", Level.SUSPECT, Cause.LEARNING_RATE)
def check_learning_rate(run: ExaminedRun) -> Iterator[Finding]:
    """S1: the saved and the logged learning rate against the schedule."""
    for s in run.readable:
        planned = scheduled_lr(s, s.step or 0)
        if not s.step or not math.isfinite(planned) or s.kind in ("panic", "quarantine"):
            continue
        groups = s.optimizer.get("groups") or [{"lr": s.optimizer.get("lr", math.nan)}]
        off = [f for g in groups if (f := _judge_lr(s, g, planned * g.get("lr_factor", 1.0)))]
        if off:
            yield max(off, key=lambda f: (f.level, abs(f.value - f.baseline)))
    yield from _check_logged_lr(run)
    yield from _check_saved_lr(run)


def _judge_lr(s: Summary, group: dict[str, Any], planned: float) -> Finding | None:
    """A group's saved learning rate against the planned one, which includes its factor."""
    lr = group["lr"]
    recovers = s.counter("lr_scale", 1.0) != s.counter("lr_goal", 1.0)
    if not abs(lr - planned) > (0.05 if recovers else 0.01) * planned + 1e-12:
        return None
    level = Level.SUSPECT if lr > 1.5 * planned or lr < planned / 1.5 else Level.WARN
    text = f"lr {lr:.3g} at step {s.step}, the schedule says {planned:.3g}"
    if len(s.optimizer.get("groups", [])) > 1 and (factor := group.get("lr_factor", 1.0)) != 1:
        text += f" ({group['method']}'s group at {factor:g} times the run's)"
    return in_file(s, "S1", text, level=level, value=lr, baseline=planned)


class _Course:
    """The highest value of a learning rate, and the lowest one after that."""

    def __init__(self) -> None:
        self.peak, self.lowest = 0.0, math.inf

    def rises_again(self, lr: float) -> bool:
        return self.lowest < 0.9 * self.peak and lr > 1.1 * self.lowest

    def add(self, lr: float) -> None:
        if lr < self.peak:
            self.lowest = min(self.lowest, lr)
        self.peak = max(self.peak, lr)


def _check_logged_lr(run: ExaminedRun) -> Iterator[Finding]:
    """In one process lr rises only during the warm-up; a restart may raise it by its flags."""
    planned = 0.0  # --lr of the process; 0 where it did not tell
    course = _Course()
    for row in run.metrics.rows:
        if row["event"] in ("start", "resume", "rollback"):
            course = _Course()  # after a rollback, which cuts it, lr comes back step by step
        if row["event"] in ("start", "resume"):
            before, planned = planned, finite_number(row["flags"].get("lr")) or 0.0
            if before and planned > 3 * before:
                step = row["step"]
                text = f"a restart raised --lr from {before:g} to {planned:g} at step {step}"
                yield in_metrics("S1", text, step + 1, after=step, value=planned, baseline=before)
        lr = row.get("lr")
        if row["event"] != "step" or not isinstance(lr, float):
            continue
        above = lr > 1.05 * (planned or math.inf)
        if above or course.rises_again(lr):
            limit = planned if above else course.lowest
            what = "the flags allow" if above else "it had fallen to"
            text = f"lr {lr:.3g} at step {row['step']}, {what} {limit:.3g}"
            earlier = [r["step"] for r in run.metrics.steps if r["step"] < row["step"]]
            after = earlier[-1] if earlier else None
            yield in_metrics("S1", text, row["step"], value=lr, baseline=limit, after=after)
            return
        course.add(lr)


def _check_saved_lr(run: ExaminedRun) -> Iterator[Finding]:
    """Files of the older script contain no schedule: an lr that rises after it had fallen."""
    course, before = _Course(), None
    for s in run.series:
        lr = s.optimizer.get("lr", math.nan)
        epochs = s.flag("epochs", 0.0)
        if s.style == "own" or not math.isfinite(lr):
            continue
        if course.rises_again(lr):
            text = f"lr rose to {lr:.3g} after it had fallen to {course.lowest:.3g}"
            if epochs and s.epoch is not None and s.epoch > epochs:
                text += f"; epoch {s.epoch} lies beyond the plan of {epochs:g}"
            yield in_file(s, "S1", text, value=lr, baseline=course.lowest, after=before)
        course.add(lr)
        before = s.step


@check("S2", "best value that rises", Level.WARN, Cause.FILE)
def check_best(run: ExaminedRun) -> Iterator[Finding]:
    """S2: the best value can only fall."""
    best, before = math.inf, None
    for s in run.series:
        if math.isfinite(s.best_val):
            if s.best_val > best + 1e-9:
                text = f"best val is {s.best_val:.4f}, an earlier file has {best:.4f}"
                yield in_file(s, "S2", text, value=s.best_val, baseline=best, after=before)
            best = min(best, s.best_val)
        before = s.step


# --- losses and gradients ------------------------------------------------------------------------


@check("H1", "a codebook predicted worse than by guessing", Level.DIVERGED)
def check_guessing(run: ExaminedRun) -> Iterator[Finding]:
    """H1: a codebook predicted worse than by guessing, in a file's own latest steps or in val."""
    for s in run.readable:
        yield from _guesses_lately(s)
    if overfits(run.metrics):
        return
    before, lowest = None, math.inf
    for row in run.metrics.epochs:
        values, train = row.get("val_per_codebook") or [], finite_number(row.get("train"))
        # A codebook that is hardly learned may fit other music worse than guessing does.
        margin = BADLY if train is not None and train < lowest else LASTING
        lowest = min(lowest, math.inf if train is None else train)
        for k, (value, size) in enumerate(zip(values, run.vocab_sizes, strict=False)):
            guess = math.log(max(size, 2))
            if value is None or value > guess + margin:
                said = "not finite" if value is None else f"{value:.3f}"
                text = f"val CE of codebook {k} is {said}, guessing gives {guess:.3f}"
                yield in_metrics(
                    "H1", text, row["step"], after=before, where=f"codebook {k}",
                    value=value if value is not None else math.inf, baseline=guess,
                )  # fmt: skip
                return
        before = row["step"]


def _guesses_lately(s: Summary) -> Iterator[Finding]:
    """H1: the guard's average over the latest steps; without it the last losses of the history.

    The guard lets no such state become a checkpoint.
    """
    limits = [math.log(max(size, 2)) + LASTING for size in s.vocab_sizes]
    pairs = list(zip(s.recent_ce, limits, strict=False))
    over = [k for k, (ce, limit) in enumerate(pairs) if not ce <= limit]
    if over:
        k = max(over, key=lambda k: s.recent_ce[k])
        ce, where = s.recent_ce[k], f"codebook {k}"
        text = f"CE of {where} averaged {ce:.3f} over the latest steps, guessing gives "
        text += f"{limits[k] - LASTING:.3f} ({len(over)} of {len(pairs)} codebooks)"
        guess = limits[k] - LASTING
        yield in_file(s, "H1", text, where=where, value=ce, baseline=guess, n=len(pairs))
        return
    rows = [r for r in s.history if r.get("event") == "step"][-3:]
    losses = [x for r in rows if (x := finite_number(r.get("loss"))) is not None]
    if len(losses) == 3 and not pairs and limits and min(losses) > max(limits):
        text = f"its last losses are {losses[0]:.3f} to {losses[-1]:.3f}, guessing gives at most "
        guess = max(limits) - LASTING
        yield in_file(s, "H1", f"{text}{guess:.3f}", value=losses[-1], baseline=guess, n=3)


@check("H2", "val far above its best, twice in a row", Level.SUSPECT)
@check("H4", "val that rises while train falls", Level.OVERFIT, Cause.OVERFITTING)
def check_validation(run: ExaminedRun) -> Iterator[Finding]:
    """H2, H4: val well above its best, twice in a row: overfitting or instability."""
    epochs = finite_validations(run.metrics)
    if len(epochs) < 4:
        return
    vals = [r["val"] for r in epochs]
    rises = overfits(run.metrics)
    margin = OVERFIT_RISE if rises else max(0.1, 6 * spread_of(np.diff(vals)) / math.sqrt(2))
    best, rise = _best_and_rise(vals, margin)
    if rise is None:
        return
    lowest, at = vals[best], epochs[best]["step"]
    if rises:
        text = (
            f"val {vals[-1]:.3f} has left its best {lowest:.3f} of step {at} smoothly while train "
            f"still falls (gap {number(gap_of(epochs[-1]))}): overfitting, not instability"
        )
        first = epochs[best + 1]["step"]
        yield in_metrics("H4", text, first, after=at, value=vals[-1], baseline=lowest, n=len(vals))
        return
    text = f"val {vals[rise]:.3f} is {vals[rise] - lowest:.2f} above its best {lowest:.3f}"
    yield in_metrics(
        "H2", text, epochs[rise]["step"], after=epochs[rise - 1]["step"], value=vals[rise],
        baseline=lowest, n=rise,
    )  # fmt: skip


def _best_and_rise(vals: list[float], margin: float) -> tuple[int, int | None]:
    """Positions of the best value, and of the first that is, like the next, far above it."""
    best = 0
    for i, value in enumerate(vals):
        if min(value, vals[min(i + 1, len(vals) - 1)]) > vals[best] + margin:
            return best, i
        if value < vals[best]:
            best = i
    return best, None


@check("H3", "loss or gradient norm that leaves its past; refused steps, rollbacks", Level.SUSPECT)
def check_steps_of_training(run: ExaminedRun) -> Iterator[Finding]:
    """H3: jumps of loss and gradient norm, steps that the guard refused."""
    yield from _check_losses(run)
    yield from _check_gradient_norms(run)
    yield from _check_refusals(run)


def _check_losses(run: ExaminedRun) -> Iterator[Finding]:
    """The first loss far above the 40 before it that stays there for three steps."""
    rows = run.metrics.steps
    losses = [r.get("loss") for r in rows]
    for i, row in enumerate(rows):
        past = [x for x in losses[max(0, i - 40) : i] if isinstance(x, float)]
        if len(past) < 8:
            continue
        value, after = losses[i], rows[i - 1]["step"]
        centre = float(np.median(past))
        spread = max(spread_of(past), 0.02 * centre)
        stays = all(not isinstance(x, float) or x > centre + 6 * spread for x in losses[i : i + 3])
        if not isinstance(value, float) or (value > centre + 8 * spread and stays):
            said = f"{value:.3f}" if isinstance(value, float) else "not finite"
            text = f"loss jumps to {said} at step {row['step']} from about {centre:.3f}, and stays"
            yield in_metrics(
                "H3", text, row["step"], level=Level.DIVERGED, after=after, baseline=centre,
                value=value if isinstance(value, float) else math.inf, n=len(past),
            )  # fmt: skip
            return


def _check_gradient_norms(run: ExaminedRun) -> Iterator[Finding]:
    """The first of three successive norms above ten times the median of the 60 before."""
    rows = [r for r in run.metrics.steps if isinstance(r.get("grad_norm"), float)]
    norms = [r["grad_norm"] for r in rows]
    for i in range(12, len(rows)):
        centre = float(np.median(norms[max(0, i - 60) : i]))
        if min(norms[i : i + 3]) > 10 * centre and i + 3 <= len(norms):
            text = (
                f"gradient norm rises to {norms[i]:.3g} at step {rows[i]['step']} and stays there"
            )
            yield in_metrics(
                "H3", text, rows[i]["step"], after=rows[i - 1]["step"], value=norms[i],
                baseline=centre, n=min(i, 60),
            )  # fmt: skip
            return


def _check_refusals(run: ExaminedRun) -> Iterator[Finding]:
    """Rollbacks, quarantines, and steps that the guard refused, but not for overflows."""
    skips, total = run.metrics.of("skip"), max([1, *(r["step"] for r in run.metrics.rows)])
    bad = [r for r in skips if "overflow" not in str(r.get("reason"))]
    for event in ("rollback", "quarantine"):
        for row in run.metrics.of(event)[:1]:
            first = min([r["step"] for r in bad] or [row["step"]])
            text = f"{event} at step {row['step']}: {str(row.get('reason'))[:100]}"
            yield in_metrics("H3", text, row["step"], after=first - 1, value=len(bad))
    if len(bad) >= 10 and len(bad) > 0.01 * total:
        text = f"the guard refused {len(bad)} of {total} steps, first at step {bad[0]['step']}"
        at = bad[0]["step"]
        yield in_metrics("H3", text, at, after=at - 1, value=len(bad) / total, baseline=0.01)


# --- models at work ------------------------------------------------------------------------------


@check("P1", "models that were run: loss against guessing and against earlier", Level.SUSPECT)
def check_probe(run: ExaminedRun) -> Iterator[Finding]:
    """P1: models run on real windows, against guessing and against earlier files."""
    best: dict[str, float] = {}
    activations: dict[str, float] = {}
    for s in (s for s in run.readable if s.path in run.probes):
        answer = run.probes[s.path]
        if not isinstance(answer, dict):
            text = f"the probe failed: {answer.text}"
            yield in_file(s, "P1", text, level=Level.WARN, cause=Cause.FILE)
            continue
        for part, figures in answer.items():
            yield from _judge_losses(run, s, part, figures["ce"], best)
            largest, before = max(figures["activations"], default=0.0), activations.get(part)
            if before is not None and largest > 5 * before:
                text = f"activations of the {part} model reach {largest:.3g}, before {before:.3g}"
                yield in_file(s, "P1", text, value=largest, baseline=before)
            activations[part] = min(largest, before or math.inf)


def _judge_losses(
    run: ExaminedRun, s: Summary, part: str, losses: list[float], best: dict[str, float]
) -> Iterator[Finding]:
    """Losses [K] of a file's raw or EMA weights against guessing and the best mean so far."""
    weights = "raw weights" if part == "raw" else "EMA"
    cause = Cause.INSTABILITY if part == "raw" else Cause.EMA
    for k, (ce, size) in enumerate(zip(losses, s.vocab_sizes, strict=True)):
        if not ce <= math.log(size) + BADLY:
            text = f"{weights}: CE of codebook {k} is {ce:.3f}, guessing gives {math.log(size):.3f}"
            yield in_file(
                s, "P1", text, level=Level.DIVERGED, cause=cause, where=f"codebook {k}", value=ce,
                baseline=math.log(size),
            )  # fmt: skip
            return
    mean_ce, known = float(np.mean(losses)), best.get(part, math.inf)
    learned = float(np.mean(s.recent_ce)) if s.recent_ce else s.best_val
    guessing = float(np.mean(np.log(s.vocab_sizes)))
    # The EMA may lag behind; the raw weights cannot be far from the losses of their steps.
    if mean_ce > guessing + 3 * LASTING:
        text = f"{weights}: CE {mean_ce:.3f} on the probe's windows, guessing gives {guessing:.3f}"
        facts = {"value": mean_ce, "baseline": guessing, "n": len(losses)}
        yield in_file(s, "P1", text, level=Level.DIVERGED, cause=cause, **facts)
    elif part == "raw" and mean_ce > learned + max(0.5, (guessing - learned) / 2):
        text = f"{weights}: CE {mean_ce:.3f}, the file itself speaks of {learned:.3f}"
        level = Level.DIVERGED if run.on_own_data else Level.SUSPECT
        yield in_file(s, "P1", text, level=level, cause=cause, value=mean_ce, baseline=learned)
    if mean_ce > known + max(0.1, 0.1 * known):
        text = (
            f"{weights}: CE {mean_ce:.3f} on the probe's windows, an earlier file has {known:.3f}"
        )
        yield in_file(s, "P1", text, cause=cause, value=mean_ce, baseline=known)
    best[part] = min(known, mean_ce)
