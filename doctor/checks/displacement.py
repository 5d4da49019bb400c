"""How far weights moved, from file to file and from their average: G1 to G3.

    findings = [*check_displacement(run), *check_average(run)]

Tensors are compared with what the optimizer's steps allow and with their own past; the limits that
are not provable are calibrated on healthy runs (benchmarks/journal.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from doctor.examined_run import ExaminedRun, spread_of
from doctor.findings import Cause, Finding, Level, check, in_file
from doctor.reading.optimizer_state import moment_bound
from doctor.reading.summary import NOISE_STEPS, Parameter, Summary


def travel(lr: float, update_rms: float, steps: float, noise_steps: float = NOISE_STEPS) -> float:
    """Distance (RMS) that a tensor covers in `steps` when its gradients are noise.

    Updates of lr * update_rms each, similar within `noise_steps`: a straight line at first, then a
    random walk. Healthy tensors cover 0.2 to 4 times this distance.
    """
    return lr * update_rms * math.sqrt(steps * min(steps, noise_steps))


class _Past(list[float]):
    """Logarithms of the healthy values so far of one quantity of one tensor."""

    def centre(self) -> float:
        return math.exp(float(np.median(self)))

    def z(self, value: float) -> float:
        """Robust z of a value; the deviation is at least a factor of 1.25."""
        return math.log(value / self.centre()) / max(spread_of(self), math.log(1.25))


def _worst(found: list[Finding]) -> Finding:
    """The finding of the tensor that moved farthest, with the number of the others.

    The value of G1 and G3 is a multiple of what is usual, that of G2 an element's way.
    """

    def excess(f: Finding) -> float:
        if f.check != "G2":
            return f.value
        return f.value / f.baseline if f.baseline else math.inf

    return max(found, key=excess).with_others(len(found) - 1)


# --- from file to file ---------------------------------------------------------------------------


@check("G1", "how far a tensor moved between files, by its past and its steps", Level.SUSPECT)
@check("G2", "a weight that moved farther than its optimizer can move it", Level.DIVERGED)
def check_displacement(run: ExaminedRun) -> Iterator[Finding]:
    """G1, G2: how far tensors moved between files, against the learning rate and their past.

    After a leap a file is also compared with the last good one: without a leap from that, only the
    file between was bad; a file that continues a bad one is as bad.
    """
    pasts: dict[str, _Past] = {}
    sound: list[Summary] = []
    bad: tuple[Summary, str] | None = None  # and its worst tensor
    for s in run.series:
        exchanged = (cosine := _cosine(run, s)) is not None and cosine.exchanged
        if not s.parameters or exchanged or any(p.bad.get("raw") for p in s.parameters):
            continue
        good = next((g for g in reversed(sound) if (g.step or 0) < (s.step or 0)), None)
        finding = _leap(run, good, s, pasts) if good else None
        if finding is None and bad and good and _follows(run, s, good, *bad):
            text = f"goes on from {bad[0].name}, which had left its past"
            finding = in_file(s, "G1", text, after=good.step)
        if finding is None:
            sound.append(s)
            bad = None
        else:
            yield finding
            bad = s, finding.where or (bad[1] if bad else "")


def _follows(run: ExaminedRun, s: Summary, good: Summary, bad: Summary, worst: str) -> bool:
    """Whether a file continues a bad one, and not the good one before that."""
    if bad.step == s.step or _leap(run, bad, s, {}) is not None:
        return False
    samples = [
        next((p.sample for p in file.parameters if p.name == worst), []) for file in (s, good, bad)
    ]
    if not all(samples):
        return True
    new, sound, lost = map(np.asarray, samples)
    return float(np.square(new - lost).sum()) < float(np.square(new - sound).sum())


def _leap(run: ExaminedRun, a: Summary, b: Summary, pasts: dict[str, _Past]) -> Finding | None:
    """The finding of the tensor that moved too far from a file to a later one, or of the worst."""
    steps = (b.step or 0) - (a.step or 0)
    if steps <= 0:
        return None
    before = {p.name: p for p in a.parameters}
    lr = run.mean_lr(a.step or 0, b.step or 0, b)
    found: list[Finding] = []
    for p in b.parameters:
        old = before.get(p.name)
        if p.sample and old is not None and old.shape == p.shape and not old.bad and not p.bad:
            move = _Move(a, b, old, p, steps, lr * p.lr_factor)
            past = pasts.setdefault(p.name, _Past())
            if finding := _beyond_reach(move) or _off_pace(move, past):
                found.append(finding)
    provable = [f for f in found if f.check == "G2"]
    return _worst(provable or found) if found else None


class _Move(NamedTuple):
    """A tensor in two files, the steps between them, and the mean learning rate of its group."""

    earlier: Summary
    later: Summary
    old: Parameter
    new: Parameter
    steps: int
    lr: float

    def finding(self, id: str, text: str, **fields: Any) -> Finding:
        """A finding in the later file."""
        return in_file(self.later, id, text, after=self.earlier.step, where=self.new.name, **fields)


def _beyond_reach(move: _Move) -> Finding | None:
    """G2: an element that moved farther than any gradients can move it."""
    old, new = move.old, move.new
    moved = float(np.abs(np.subtract(new.sample, old.sample)).max())
    moved = max(moved, abs(new.largest - old.largest))
    bound = new.step_bound if new.optimizer else moment_bound(0.9, 0.999)
    # Of the largest lr on the way: the mean times a factor that covers warm-up and cosine.
    reach = 2 * move.lr * move.steps * (bound + new.decay * max(old.largest, new.largest))
    if not (math.isfinite(reach) and moved > 1.1 * reach + 1e-6):
        return None
    limit = ", without a learning rate: lr was 0 all the way"
    if reach:
        limit = f"; {new.optimizer or 'Adam'} at lr {move.lr:.2g} can move a weight by {reach:.2g}"
        limit += " at most"
    text = f"{new.name} moved by up to {moved:.3g} in {move.steps} steps{limit}"
    return move.finding("G2", text, value=moved, baseline=reach)


def _off_pace(move: _Move, past: _Past) -> Finding | None:
    """G1: a distance (RMS) of zero, or larger than noise explains; other paces join `past`."""
    old, new, lr, steps = move.old, move.new, move.lr, move.steps
    with np.errstate(over="ignore"):  # beyond float64 the distance is infinite
        moved = float(np.sqrt(np.mean(np.subtract(new.sample, old.sample) ** 2)))
    update = np.nanmax([old.update_rms, new.update_rms, 0.0])
    usual = travel(lr, update, steps, new.noise_steps)
    if not usual or not math.isfinite(usual) or new.numel < 512:
        return None
    if moved == 0:
        text = f"{new.name} has not moved at all in {steps} steps"
        return move.finding("G1", text, cause=Cause.OPTIMIZER, value=0.0)
    pace, n = moved / usual, len(past)
    straight = lr * update * steps / usual  # the pace of a straight line
    leap = pace > 2 * straight if new.optimizer == "Muon" else pace > max(3 * straight, 6)
    if not leap and not (n >= 3 and _bursts(pace, past)):
        past.append(math.log(pace))
        return None
    grown = new.rms / max(old.rms, 1e-12) - 1
    text = (
        f"{new.name} moved {pace:.1f} times what noise at lr {lr:.2g} explains in {steps} "
        f"steps, RMS {old.rms:.3g} -> {new.rms:.3g} ({grown:+.0%})"
    )
    if n >= 3:
        text += f", before {past.centre():.2g} (z {past.z(pace):.0f})"
    baseline = past.centre() if n >= 3 else straight
    return move.finding("G1", text, value=pace, baseline=baseline, n=n)


def _bursts(pace: float, past: _Past) -> bool:
    """Healthy runs stay below 1.7 times the largest and 2.7 times the median of their past."""
    grown = pace / past.centre() > 3.5 and math.log(pace / 2.2) > max(past)
    return grown and pace > 1


# --- from the average ----------------------------------------------------------------------------


@check("G3", "raw weights against EMA, moments against both", Level.SUSPECT, Cause.EMA)
def check_average(run: ExaminedRun) -> Iterator[Finding]:
    """G3: raw weights against their EMA, in size and in direction."""
    pasts: dict[str, _Past] = {}
    before: _Cosine | None = None
    for s in run.series:
        span = _ema_span(s)
        if math.isnan(span):
            continue
        if s.ema_equals_raw and span > 1:
            text = "the EMA equals the raw weights: it is not averaging, or one overwrote the other"
            yield in_file(s, "G3", text)
            continue
        lr = _ema_lr(run, s, span)
        judged = [
            _judge_average(run, s, p, lr * p.lr_factor, span, pasts.setdefault(p.name, _Past()))
            for p in s.measurable
        ]
        if found := [j for j in judged if j]:
            yield _worst(found)
        cosine = _cosine(run, s)
        if cosine is not None:
            yield from _judge_direction(run, s, cosine, before)
            before = cosine


def _ema_span(s: Summary) -> float:
    """Steps over which the EMA averages, warm-up of its decay included; NaN where it is unknown."""
    decay = s.flag("ema")
    if s.style != "own" or not math.isfinite(decay) or not s.step:
        return math.nan
    return 1 / (1 - min(decay, (1 + s.step) / (10 + s.step)))


def _ema_lr(run: ExaminedRun, s: Summary, span: float) -> float:
    """Mean learning rate of the updates that still count in the EMA."""
    return run.mean_lr(max(0, round((s.step or 0) - 2 * span)), s.step or 0, s)


def _judge_average(
    run: ExaminedRun, s: Summary, p: Parameter, lr: float, span: float, past: _Past
) -> Finding | None:
    """A finding where a tensor is too far from its EMA; other distances join `past`."""
    # Late in a run steps may be small, and the average still holds older, larger ones.
    update = p.update_rms if p.optimizer == "Muon" else max(p.update_rms, 0.1)
    usual = travel(lr, update, span, p.noise_steps)
    if (s.step or 0) < 10 or not usual or not math.isfinite(usual + p.ema_distance):
        return None  # of so few steps no average can be judged
    apart, n = p.ema_distance / usual, len(past)
    straight = lr * update * span / usual
    far = apart > 2 * straight if p.optimizer == "Muon" else apart > max(3 * straight, 5)
    burst = n >= 3 and apart > 4 * past.centre() and past.z(apart) > 6 and apart > 2
    if not (far or burst):
        if apart > 0:
            past.append(math.log(apart))
        return None
    text = (
        f"{p.name} is far from its EMA: they differ by RMS {p.ema_distance:.2g}, it has "
        f"{p.rms:.2g}; {apart:.3g} times what {span:.0f} steps at lr {lr:.2g} explain"
    )
    earlier = [e.step for e in run.series if (e.step or 0) < (s.step or 0)]
    return in_file(
        s, "G3", text, after=earlier[-1] if earlier else None, where=p.name, value=apart,
        baseline=past.centre() if n >= 3 else math.nan, n=n,
    )  # fmt: skip


# --- the way to the average ----------------------------------------------------------------------


class _Cosine(NamedTuple):
    """Cosine between raw - EMA, the sum of the latest updates, and the optimizer's next step.

    Expected is `_usual_cosine`, of which healthy runs have 0.24 to 0.82; unrelated vectors of n
    elements have 0 +- 1 / sqrt(n).
    """

    mean: float  # over the tensors, in units of what is usual
    z: float  # that a mean of 1 would have
    lost: float  # share of the tensors whose own cosine may be 0
    lr: float
    tensors: int

    @property
    def exchanged(self) -> bool:
        """Whether raw weights and EMA are exchanged."""
        return self.mean < -0.1 and -self.mean * self.z > 8


DECAYED = 0.2  # share of a tensor that decays within the average's span
ORTHOGONAL = 0.65  # cosine between Muon's momentum and what orthogonalising makes of it


def _usual_cosine(p: Parameter, span: float) -> float:
    """The cosine for noise: the share of the newest updates, which are similar, in the span."""
    alike = math.sqrt(min(1.0, p.noise_steps / span))
    return alike * ORTHOGONAL if p.optimizer == "Muon" else alike


def _moved_by_gradients(run: ExaminedRun, s: Summary, span: float) -> list[Parameter]:
    """Tensors whose way to the average is a sum of updates: decay takes little within the span.

    Where it takes much, its pull and the updates balance, and neither tells where a tensor went.
    """
    lr = _ema_lr(run, s, span)
    return [p for p in s.measurable if not lr * p.lr_factor * p.decay * span > DECAYED]


def _cosine(run: ExaminedRun, s: Summary, method: str = "") -> _Cosine | None:
    """The cosine over all tensors or those of one optimizer; None where it is not meaningful.

    That is so late in a schedule, when older and larger updates make up the sum.
    """
    span = _ema_span(s)
    if math.isnan(span):
        return None
    lr = s.optimizer.get("lr", 0.0)
    measured = [
        (p.update_cos, _usual_cosine(p, span), math.sqrt(p.numel))
        for p in _moved_by_gradients(run, s, span)
        if math.isfinite(p.update_cos) and method in ("", p.optimizer)
    ]
    if len(measured) < 3 or not lr > 0.12 * _ema_lr(run, s, span):
        return None
    expected = sum(usual * root for _, usual, root in measured)
    return _Cosine(
        mean=sum(cos * root for cos, _, root in measured) / expected,
        z=expected / math.sqrt(len(measured)),
        lost=sum(cos * root < 3 for cos, _, root in measured) / len(measured),
        lr=lr,
        tensors=len(measured),
    )


def _judge_direction(
    run: ExaminedRun, s: Summary, now: _Cosine, before: _Cosine | None
) -> Iterator[Finding]:
    """Findings where the optimizer's step has not the direction of the latest updates."""
    baseline = before.mean if before else 0.5
    facts: dict[str, Any] = {"value": now.mean, "baseline": baseline, "n": now.tensors}
    fell = before is not None and before.lost < 0.1 and now.lost >= 0.6 and now.lr > before.lr / 2
    if now.exchanged:
        text = (
            f"{_method(s)}'s steps lead from the raw weights towards the EMA and not away from it "
            f"(cosine {now.mean:.2f} of what noise gives): raw and EMA are exchanged"
        )
        yield in_file(s, "G3", text, **facts)
    elif (muon := _cosine(run, s, "Muon")) and muon.mean < 0.08 and muon.z > 30:
        facts |= {"value": muon.mean, "n": muon.tensors}
        text = (
            f"Muon's momentum has nothing to do with the latest updates of its {muon.tensors} "
            "tensors: it is of other tensors, another state or another run"
        )
        yield in_file(s, "G3", text, cause=Cause.OPTIMIZER, **facts)
    elif (now.mean < 0.08 and now.z > 30) or fell:
        text = (
            f"{_method(s)}'s moments of {now.lost:.0%} of the tensors have nothing to do with "
            "the latest updates: they are of another tensor, another state or another run"
        )
        yield in_file(s, "G3", text, cause=Cause.OPTIMIZER, **facts)
    elif now.mean > 0.25:
        yield from _lost_directions(run, s, now.mean)


def _method(s: Summary) -> str:
    """Name of the optimizer for a sentence."""
    return str(s.optimizer.get("method") or "Adam")


def _lost_directions(run: ExaminedRun, s: Summary, mean: float) -> Iterator[Finding]:
    """Single tensors with moments of another tensor, where the moments of the others are right.

    Foreign moments have a cosine of 0 +- 1 / sqrt(n). Three such deviations are allowed for Muon,
    two for Adam, whose healthy tensors have as little as 0.13 of what is expected.
    """
    span = _ema_span(s)
    measured = _moved_by_gradients(run, s, span)
    expected = {p.name: mean * _usual_cosine(p, span) for p in measured}
    lost = []
    for p in measured:
        allowed, needed = (3, 12) if p.optimizer == "Muon" else (2, 20)  # such deviations
        low = max(0.05 * expected[p.name], allowed / math.sqrt(p.numel))
        if p.update_cos < low and expected[p.name] * math.sqrt(p.numel) > needed:
            lost.append(p)
    if lost:
        text = (
            f"{lost[0].optimizer or 'Adam'}'s moments of {lost[0].name} have nothing to do with "
            "its latest updates"
        )
        finding = in_file(
            s, "G3", text, cause=Cause.OPTIMIZER, where=lost[0].name,
            value=lost[0].update_cos, baseline=expected[lost[0].name], n=len(measured),
        )  # fmt: skip
        yield finding.with_others(len(lost) - 1)
