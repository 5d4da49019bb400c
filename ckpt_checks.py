"""What is wrong with a run: checks over the summaries of its checkpoints and its metrics.

    findings = [f for check in CHECKS for f in check(Run(name, summaries, History(rows)))]

Each check is a function that takes a run and yields findings; CHECKS lists them. A finding belongs
to one file or, found in the metrics, to a step. Provable limits come first; the others compare a
tensor with its own past and with what Adam's step size allows, and are calibrated on healthy runs
(benchmarks/README.md).

Steps are optimizer steps, losses nats per code, k numbers codebooks.
"""

from __future__ import annotations

import bisect
import datetime
import enum
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ckpt_summary import NOISE_STEPS, Parameter, Rows, Summary, moment_bound


class Level(enum.IntEnum):
    """How bad a finding is; a file is as bad as its worst finding."""

    INFO = 0
    WARN = 1
    SUSPECT = 2
    OVERFIT = 3
    DIVERGED = 4
    DEAD = 5
    INCOMPATIBLE = 6
    CORRUPT = 7
    UNSAFE = 8


class Cause(enum.Enum):
    """What a finding points to; decides the remedy."""

    FILE = "damaged or foreign file"
    INSTABILITY = "instability"
    LEARNING_RATE = "learning rate"
    OPTIMIZER = "optimizer state"
    EMA = "averaged weights"
    SCALER = "fp16 loss scale"
    OVERFITTING = "overfitting"


@dataclass(frozen=True)
class Finding:
    """One thing that a check found."""

    check: str  # id in the table of README.md, such as "F1"
    level: Level
    cause: Cause
    text: str
    path: str | None = None  # the file it was found in; None: in the metrics
    step: int | None = None  # first step at which it is known to hold
    after: int | None = None  # last step at which it is known not to
    where: str = ""  # tensor or codebook
    value: float = math.nan
    baseline: float = math.nan
    n: int = 0  # values behind the baseline


# --- the metrics ---------------------------------------------------------------------------------


class History:
    """Rows of `*_metrics.jsonl`; apart from them those that a resume or a rollback took back."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.abandoned: list[dict[str, Any]] = []
        self.rewinds: list[tuple[int, float]] = []  # step gone back to, and when
        for row in filter(None, map(_checked_row, rows)):
            if row["event"] in ("start", "resume", "rollback"):
                to = row.get("to_step", row["step"])
                if any(r["step"] > to for r in self.rows):
                    self.rewinds.append((to, row.get("time") or 0.0))
                self.abandoned += [r for r in self.rows if r["step"] > to]
                self.rows = [r for r in self.rows if r["step"] <= to]
            self.rows.append(row)

    def of(self, event: str) -> list[dict[str, Any]]:
        """Rows of an event, in order of steps."""
        return [r for r in self.rows if r.get("event") == event]

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """Rows of single steps."""
        return self.of("step")

    @cached_property
    def epochs(self) -> list[dict[str, Any]]:
        """Rows of validations."""
        return self.of("epoch")

    @cached_property
    def _lr(self) -> tuple[list[int], list[float]]:
        pairs = [(r["step"], r["lr"]) for r in self.steps if isinstance(r.get("lr"), float)]
        return [s for s, _ in pairs], [lr for _, lr in pairs]

    def mean_lr(self, first: int, last: int) -> float:
        """Mean learning rate of the steps in (first, last]; NaN where no row is near."""
        steps, lrs = self._lr
        low, high = bisect.bisect_right(steps, first), bisect.bisect_right(steps, last)
        if high - low >= 2:
            return float(np.mean(lrs[low:high]))
        if not steps or not steps[0] <= last <= steps[-1]:
            return math.nan
        return float(np.interp((first + last) / 2, steps, lrs))

    def is_abandoned(self, summary: Summary) -> bool:
        """Whether a file is of steps that a later resume or rollback took back."""
        saved = _timestamp(summary.saved_at) or summary.modified
        return any((summary.step or 0) > step and saved < time for step, time in self.rewinds)


NUMBERS = ("loss", "lr", "grad_norm", "train", "val", "val_obj", "time", "seconds", "lr_scale")


def _checked_row(row: dict[str, Any]) -> dict[str, Any] | None:
    """A row whose known fields have their types: None where a number was not finite or no number.

    None for rows without event or step: a file may be cut, or be of another program.
    """
    step, event = row.get("step"), row.get("event")
    if not isinstance(event, str) or type(step) is not int or not 0 <= step < 1 << 53:
        return None
    checked = {**row, **{name: _number(row[name]) for name in NUMBERS if name in row}}
    if "val_per_codebook" in row:
        values = row["val_per_codebook"]
        checked["val_per_codebook"] = [_number(v) for v in values] if type(values) is list else []
    to_step = row.get("to_step", step)
    checked["to_step"] = to_step if type(to_step) is int else step
    checked["flags"] = row["flags"] if isinstance(row.get("flags"), dict) else {}
    if type(row.get("epoch")) is not int:
        checked.pop("epoch", None)
    return checked


def _number(value: Any) -> float | None:
    good = type(value) in (int, float) and abs(value) < 1e300
    return float(value) if good else None


def _timestamp(text: str) -> float:
    try:
        return datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return 0.0


# --- a run ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """The files of one run and its metrics."""

    name: str
    summaries: list[Summary]
    history: History
    probes: dict[str, Any] = field(default_factory=dict)  # by path: what ckpt_probe.py found

    @cached_property
    def readable(self) -> list[Summary]:
        """Files that could be read and belong to the run's present course, by step."""
        found = [s for s in self.summaries if s.problem is None]
        found = [s for s in found if not self.history.is_abandoned(s)]
        return sorted(found, key=lambda s: (s.step or 0, s.saved_at, s.kind))

    @cached_property
    def series(self) -> list[Summary]:
        """One file for each moment: what can be compared with its neighbours.

        The older script keeps averaged weights in its best files: only its other files count.
        """
        chosen: dict[tuple[int, float, int], Summary] = {}
        for summary in self.readable:
            if summary.step is None or (summary.style != "own" and "best" in summary.kind):
                continue
            if summary.kind not in ("panic", "quarantine"):
                chosen.setdefault(summary.moment, summary)
        return sorted(chosen.values(), key=lambda s: s.moment[:2])

    def previous(self, summary: Summary) -> Summary | None:
        """The file before this one in the series."""
        earlier = [s for s in self.series if (s.step or 0) < (summary.step or 0)]
        return earlier[-1] if earlier else None

    def mean_lr(self, first: int, last: int, after: Summary) -> float:
        """Mean learning rate over (first, last]: from the metrics, the schedule, or the file."""
        found = self.history.mean_lr(first, last)
        if math.isfinite(found):
            return found
        planned = [scheduled_lr(after, step) for step in np.linspace(first + 1, last, 9)]
        if all(map(math.isfinite, planned)):
            return float(np.mean(planned))
        saved = [s.optimizer.get("lr", math.nan) for s in self.readable if s.step is not None]
        return max((lr for lr in saved if math.isfinite(lr)), default=math.nan)


def scheduled_lr(summary: Summary, step: float) -> float:
    """Learning rate that a file's own flags plan for a step, before its groups' factors; or NaN.

    Linear warm-up, then a cosine to eta_min or, for schedule `wsd` (warm-up, stable, decay: Hu et
    al. 2024), a constant and a linear fall to eta_min over the last share `cooldown`.
    """
    flags, total = summary.flags, summary.counter("schedule_steps", 0.0)
    schedule = flags.get("schedule", "cosine")
    if summary.style != "own" or not total or flags.get("max_seconds"):
        return math.nan
    if schedule not in ("cosine", "wsd"):
        return math.nan
    lr, floor = summary.flag("lr"), summary.flag("eta_min")
    warmup, scale = summary.flag("warmup_ratio", 0.0) * total, summary.counter("lr_scale", 1.0)
    if step < warmup:
        return scale * lr * step / warmup
    if schedule == "wsd":
        fall = max(summary.flag("cooldown", 0.2) * total, 1e-9)
        return scale * (floor + (lr - floor) * min(1.0, max(0.0, total - step) / fall))
    done = min(1.0, (step - warmup) / max(total - warmup, 1e-9))
    return scale * (floor + (lr - floor) * 0.5 * (1 + math.cos(math.pi * done)))


Check = Callable[[Run], Iterator[Finding]]


def _in_file(
    summary: Summary, check: str, level: Level, cause: Cause, text: str, **facts: Any
) -> Finding:
    return Finding(check, level, cause, text, path=summary.path, step=summary.step, **facts)


# --- files: container, keys, steps ---------------------------------------------------------------


def check_container(run: Run) -> Iterator[Finding]:
    """I1, I2: what could not be read, and why."""
    for s in run.summaries:
        if s.problem is None:
            continue
        unsafe = s.problem.kind == "unsafe"
        level = Level.UNSAFE if unsafe else Level.CORRUPT
        if s.problem.kind == "foreign":
            level = Level.INCOMPATIBLE
        yield _in_file(s, "I2" if unsafe else "I1", level, Cause.FILE, s.problem.text)


def check_keys(run: Run) -> Iterator[Finding]:
    """I3: keys and shapes against the architecture and among each other."""
    for s in run.readable:
        if s.misfits:
            more = f" and {len(s.misfits) - 3} more" if len(s.misfits) > 3 else ""
            text = "; ".join(s.misfits[:3]) + more
            yield _in_file(s, "I3", Level.INCOMPATIBLE, Cause.FILE, text)


def check_steps(run: Run) -> Iterator[Finding]:
    """I4: epoch in the name, Adam's own count of steps, files of one moment that differ."""
    for s in run.readable:
        if s.name_epoch is not None and s.epoch is not None and s.style == "own":
            best = s.progress.get("best_epoch") if s.kind == "best archive" else s.epoch
            if best != s.name_epoch:
                text = f"its name says epoch {s.name_epoch}, it holds epoch {best}"
                yield _in_file(s, "I4", Level.SUSPECT, Cause.FILE, text)
        counts = sorted({p.adam_step for p in s.parameters if math.isfinite(p.adam_step)})
        if len(counts) > 1:
            text = f"Adam has taken {counts[0]:.0f} to {counts[-1]:.0f} steps on its tensors"
            yield _in_file(s, "I4", Level.SUSPECT, Cause.OPTIMIZER, text)
        elif counts and s.style == "own" and counts[0] != s.step:
            text = f"Adam has taken {counts[0]:.0f} steps, the run {s.step}"
            yield _in_file(
                s, "I4", Level.SUSPECT, Cause.OPTIMIZER, text, value=counts[0], baseline=s.step
            )
    yield from _same_moment(run)


def _same_moment(run: Run) -> Iterator[Finding]:
    """Files of one step and second must be copies; where they differ the few are suspect."""
    moments: dict[tuple[int, float], Counter[int]] = {}
    for s in run.readable:
        if s.style == "own" and s.step:
            moments.setdefault(s.moment[:2], Counter())[s.moment[2]] += 1
    for s in run.readable:
        contents = moments.get(s.moment[:2], Counter())
        if len(contents) > 1 and contents[s.moment[2]] <= contents.total() / 2:
            text = f"differs from another file of the same moment, step {s.step}"
            yield _in_file(s, "I4", Level.SUSPECT, Cause.FILE, text)


# --- weights and moments: absolute limits --------------------------------------------------------

PART_NAMES = {
    "raw": "weights",
    "ema": "EMA",
    "m": "first moments",
    "v": "second moments",
    "momentum": "Muon's momentum",
}


def check_finite(run: Run) -> Iterator[Finding]:
    """F1: NaN and Inf, the first bad tensor in network order."""
    for s in run.readable:
        bad = [(p, part, n) for p in s.parameters for part, n in p.bad.items()]
        if not bad:
            continue
        parts = sorted({part for _, part, _ in bad}, key=list(PART_NAMES).index)
        first = min((b for b in bad if b[1] == parts[0]), key=lambda b: b[0].place)
        total = sum(n for _, _, n in bad)
        text = (
            f"{total} values are NaN or Inf in {', '.join(PART_NAMES[p] for p in parts)}; first in "
            f"the network: {first[0].name}"
        )
        cause = Cause.INSTABILITY if "raw" in parts else Cause.OPTIMIZER
        if parts == ["ema"]:
            cause = Cause.EMA
        yield _in_file(s, "F1", Level.DEAD, cause, text, where=first[0].name, value=total)
    for s in run.readable:
        if s.scale is not None and not math.isfinite(s.scale):
            text = f"GradScaler's scale is {s.scale}"
            yield _in_file(s, "F1", Level.DEAD, Cause.SCALER, text, value=s.scale)


def check_moments(run: Run) -> Iterator[Finding]:
    """F2, F3: what no sequence of gradients can produce."""
    for s in run.readable:
        negative = [p for p in s.parameters if p.v_negative]
        if negative:
            p = negative[0]
            text = f"{p.v_negative} second moments of {p.name} are negative"
            yield _in_file(s, "F2", Level.CORRUPT, Cause.OPTIMIZER, text, where=p.name)
        over = [p for p in s.parameters if p.m_over_bound]
        if over:
            p = max(over, key=lambda p: p.m_over_bound)
            bound = moment_bound(*s.optimizer["betas"])
            text = (
                f"{p.m_over_bound} elements of {p.name} have abs(m) > {bound:.3g} sqrt(v), which "
                f"no gradients can make ({len(over)} tensors)"
            )
            yield _in_file(s, "F3", Level.CORRUPT, Cause.OPTIMIZER, text, where=p.name)


def check_momentum(run: Run) -> Iterator[Finding]:
    """F3, O2 of Muon: momentum that clipped gradients cannot make, that left its past, or is lost.

    torch's Muon keeps a running mean of gradients, so none is longer than the longest of them.
    """
    clip, past = _largest_clip(run), list[float]()
    for s in run.series:
        members = [p for p in s.parameters if p.optimizer == "Muon" and math.isfinite(p.m_rms)]
        if not members or any(p.bad.get("momentum") for p in members) or (s.step or 0) < 10:
            continue
        if still := [p for p in members if p.m_rms == 0]:
            text = f"no gradient ever reached {still[0].name}, or its momentum was cleared"
            finding = _in_file(
                s, "O2", Level.SUSPECT, Cause.OPTIMIZER, text, where=still[0].name, value=0.0
            )
            yield _with_others(finding, len(still) - 1)
            continue
        longest = max(members, key=_momentum_norm)
        norm = math.hypot(*map(_momentum_norm, members))
        if norm > 1.01 * clip:
            text = (
                f"Muon's momentum has norm {norm:.3g}, most of it in {longest.name}; gradients "
                f"clipped to {clip:g} cannot make it"
            )
            yield _in_file(
                s, "F3", Level.CORRUPT, Cause.OPTIMIZER, text, where=longest.name, value=norm,
                baseline=clip,
            )  # fmt: skip
        else:
            yield from _judge_momentum(run, s, norm, past)


def _momentum_norm(p: Parameter) -> float:
    return p.m_rms * math.sqrt(math.prod(p.shape))


def _largest_clip(run: Run) -> float:
    """Largest --grad-clip of the run's starts; infinite where one did not clip or did not tell."""
    flags = [s.flags for s in run.readable if s.style == "own"]
    flags += [r["flags"] for r in run.history.rows if r["event"] in ("start", "resume")]
    clips = [_number(f.get("grad_clip")) or math.inf for f in flags]
    return max(clips, default=math.inf)


def _judge_momentum(run: Run, s: Summary, norm: float, past: list[float]) -> Iterator[Finding]:
    """Against the norms of the latest gradients, of which healthy runs have 0.01 to 0.08."""
    near = [
        r["grad_norm"] for r in run.history.steps
        if isinstance(r.get("grad_norm"), float) and -40 < r["step"] - (s.step or 0) <= 0
    ]  # fmt: skip
    usual = float(np.median(near)) if near else 1.0
    share, n = norm / max(usual, 1e-30), len(past)
    centre = float(np.median(past)) if past else share
    limit = 8 if near else 30
    if n >= 3 and not 1 / limit < share / centre < limit:
        text = f"Muon's momentum has norm {norm:.2g}, {share / centre:.2g} times what it had before"
        text += f", at gradients of norm {usual:.2g}" if near else ""
        yield _in_file(
            s, "O2", Level.SUSPECT, Cause.OPTIMIZER, text, value=share, baseline=centre, n=n
        )
    else:
        past.append(share)


def check_updates(run: Run) -> Iterator[Finding]:
    """O1, O2, O3: the step that Adam takes; of Muon, whose step has one size, O3 alone."""
    seen: dict[str, list[float]] = {}
    for s in run.series:
        for p in _matrices(s):
            yield from _check_update(s, p, seen.setdefault(p.name, []))
    for s in run.series:
        lr = s.optimizer.get("lr", math.nan)
        large = [(lr * p.lr_factor * p.update_rms / p.rms, p) for p in _matrices(s) if p.rms > 1e-2]
        worst = max(large, key=lambda pair: pair[0], default=None)
        if worst and worst[0] > 1e-2 and lr > 0.5 * _peak_lr(run, s):
            text = f"a step changes {worst[1].name} by {worst[0]:.1%} of its size"
            yield _in_file(
                s, "O3", Level.WARN, Cause.LEARNING_RATE, text, where=worst[1].name, value=worst[0]
            )


def _check_update(s: Summary, p: Parameter, past: list[float]) -> Iterator[Finding]:
    if p.optimizer == "Muon" or not math.isfinite(p.update_rms) or p.adam_step < 10:
        return
    if p.v_zero == 1.0:
        text = f"no gradient ever reached {p.name}, or its moments were cleared"
        yield _in_file(s, "O2", Level.SUSPECT, Cause.OPTIMIZER, text, where=p.name, value=0.0)
        return
    usual = float(np.median(past)) if past else 0.229
    # Rows of an embedding that are never drawn have no moments and take no steps.
    rms = p.update_rms / math.sqrt(max(1 - p.v_zero, 1e-3))
    # A tensor that is pushed one way step after step comes near 1, and does so early in a run.
    if rms > 0.6 and len(past) >= 3 and rms > 2.5 * usual:
        text = f"RMS of Adam's step on {p.name} is {rms:.2f}; noise alone gives 0.23"
        yield _in_file(
            s, "O2", Level.SUSPECT, Cause.OPTIMIZER, text, where=p.name, value=rms,
            baseline=usual, n=len(past),
        )  # fmt: skip
    elif rms < 0.03 and rms < usual / 4:
        text = f"RMS of Adam's step on {p.name} is {rms:.3f}: it hardly moves"
        yield _in_file(
            s, "O2", Level.SUSPECT, Cause.OPTIMIZER, text, where=p.name, value=rms,
            baseline=usual, n=len(past),
        )  # fmt: skip
    else:
        past.append(rms)
    if p.v_tiny > 0.01:
        text = f"{p.v_tiny:.0%} of {p.name}'s second moments lie below eps: eps sets their step"
        yield _in_file(s, "O1", Level.WARN, Cause.OPTIMIZER, text, where=p.name, value=p.v_tiny)


def _matrices(summary: Summary) -> list[Parameter]:
    """Tensors with enough elements for statistics."""
    return [p for p in summary.parameters if math.prod(p.shape) >= 512 and not p.bad]


def _peak_lr(run: Run, summary: Summary) -> float:
    saved = [s.optimizer.get("lr", math.nan) for s in run.readable]
    return max([summary.flag("lr", 0.0), *[x for x in saved if math.isfinite(x)]])


def check_scale(run: Run) -> Iterator[Finding]:
    """O4: a loss scale that has collapsed."""
    for s in run.readable:
        if s.scale is None or not math.isfinite(s.scale) or s.scale >= 128:
            continue
        level = Level.SUSPECT if s.scale < 1 else Level.WARN
        text = f"GradScaler's scale is down to {s.scale:g}: fp16 gradients overflow at every scale"
        # Below 128 small gradients vanish; below 1 all of them do.
        yield _in_file(s, "O4", max(level, Level.SUSPECT), Cause.SCALER, text, value=s.scale)


# --- weights against their past ------------------------------------------------------------------


def travel(lr: float, update_rms: float, steps: float, noise_steps: float = NOISE_STEPS) -> float:
    """Distance that a tensor covers in so many steps when its gradients are noise.

    Updates of lr * update_rms each, alike within `noise_steps`: a straight line at first, a random
    walk after. Healthy tensors cover 0.2 to 4 of it.
    """
    return lr * update_rms * math.sqrt(steps * min(steps, noise_steps))


@dataclass
class _Past:
    """Values of one quantity of one tensor that were judged healthy, as logarithms."""

    values: list[float] = field(default_factory=list)

    def z(self, value: float) -> float:
        """Robust z of a value; floor of the deviation: a factor of 1.25."""
        centre = float(np.median(self.values))
        spread = 1.4826 * float(np.median(np.abs(np.array(self.values) - centre)))
        return (math.log(value) - centre) / max(spread, math.log(1.25))

    def centre(self) -> float:
        return math.exp(float(np.median(self.values)))


def check_displacement(run: Run) -> Iterator[Finding]:
    """G1, G2: how far tensors moved between files, against the learning rate and their past.

    After a leap a file is compared with the last good one too: where that shows no leap the file
    between was bad alone; where a file only goes on from a bad one it is as bad.
    """
    pasts: dict[str, _Past] = {}
    sound: list[Summary] = []
    bad: tuple[Summary, str] | None = None  # and its worst tensor
    for s in run.series:
        exchanged = (cosine := _cosine(run, s)) is not None and cosine.exchanged
        if not s.parameters or exchanged or any(p.bad.get("raw") for p in s.parameters):
            continue
        good = next((g for g in reversed(sound) if (g.step or 0) < (s.step or 0)), None)
        leap = _leap(run, good, s, pasts) if good else None
        follows = bad is not None and good is not None and _follows(run, s, good, *bad)
        if leap is not None or follows:
            text = f"goes on from {bad[0].name}, which had left its past" if bad else ""
            finding = leap or _in_file(
                s, "G1", Level.SUSPECT, Cause.INSTABILITY, text, after=good.step if good else None
            )
            yield finding
            bad = s, finding.where or (bad[1] if bad else "")
        else:
            sound.append(s)
            bad = None


def _follows(run: Run, s: Summary, good: Summary, bad: Summary, worst: str) -> bool:
    """Whether a file goes on from a bad one, and not from the good one before that."""
    if bad.step == s.step or _leap(run, bad, s, {}) is not None:
        return False
    samples = [
        next((p.sample for p in file.parameters if p.name == worst), []) for file in (s, good, bad)
    ]
    if not all(samples):
        return True
    new, sound, lost = map(np.asarray, samples)
    return float(np.square(new - lost).sum()) < float(np.square(new - sound).sum())


def _leap(run: Run, a: Summary, b: Summary, pasts: dict[str, _Past]) -> Finding | None:
    """The worst of the tensors that moved too far from a file to a later one; it names how many."""
    before = {p.name: p for p in a.parameters}
    steps = (b.step or 0) - (a.step or 0)
    lr = run.mean_lr(a.step or 0, b.step or 0, b)
    found: list[tuple[float, Finding]] = []
    for p in b.parameters:
        old = before.get(p.name)
        if old is not None and old.shape == p.shape and not old.bad and not p.bad and steps > 0:
            past = pasts.setdefault(p.name, _Past())
            found += _judge_move(a, b, old, p, lr * p.lr_factor, steps, past)
    for check in ("G2", "G1"):
        of_check = [f for f in found if f[1].check == check]
        if of_check:
            return _with_others(max(of_check, key=lambda f: f[0])[1], len(of_check) - 1)
    return None


def _with_others(finding: Finding, others: int) -> Finding:
    if not others:
        return finding
    text = f"{finding.text} (and {others} more tensors)"
    return Finding(**{**finding.__dict__, "text": text})


def _judge_move(
    a: Summary, b: Summary, old: Parameter, new: Parameter, lr: float, steps: int, past: _Past
) -> Iterator[tuple[float, Finding]]:
    difference = np.subtract(new.sample, old.sample)
    moved, furthest = float(np.sqrt(np.mean(difference**2))), float(np.abs(difference).max())
    furthest = max(furthest, abs(new.largest - old.largest))
    update = np.nanmax([old.update_rms, new.update_rms, 0.0])
    facts = {"after": a.step, "where": new.name}
    bound = new.step_bound if new.optimizer else moment_bound(0.9, 0.999)
    decay = b.optimizer.get("weight_decay", 0.0)
    # Of the largest lr on the way: the mean times a factor that covers warm-up and cosine.
    reach = 2 * lr * steps * (bound + decay * max(old.largest, new.largest))
    if math.isfinite(reach) and furthest > 1.1 * reach + 1e-6:
        text = (
            f"{new.name} moved by up to {furthest:.3g} in {steps} steps; {new.optimizer or 'Adam'} "
            f"at lr {lr:.2g} can "
            f"move a weight by {reach:.2g} at most"
        )
        yield furthest / reach, _in_file(
            b, "G2", Level.DIVERGED, Cause.INSTABILITY, text, value=furthest, baseline=reach,
            **facts,
        )  # fmt: skip
        return
    usual = travel(lr, update, steps, new.noise_steps)
    if not usual or not math.isfinite(usual) or math.prod(new.shape) < 512:
        return
    pace = moved / usual
    straight = lr * update * steps / usual  # the pace of a straight line
    if moved == 0:
        text = f"{new.name} has not moved at all in {steps} steps"
        yield 1.0, _in_file(b, "G1", Level.SUSPECT, Cause.OPTIMIZER, text, value=0.0, **facts)
        return
    n = len(past.values)
    ratio = pace / past.centre() if n >= 3 else math.nan
    leap = pace > 2 * straight if new.optimizer == "Muon" else pace > max(3 * straight, 6)
    # Healthy runs stay below 1.7 times the largest and 2.7 times the median of their past.
    burst = n >= 3 and ratio > 3.5 and math.log(pace / 2.2) > max(past.values) and pace > 1
    if leap or burst:
        grown = new.rms / max(old.rms, 1e-12) - 1
        text = (
            f"{new.name} moved {pace:.1f} times what noise at lr {lr:.2g} explains in {steps} "
            f"steps, RMS {old.rms:.3g} -> {new.rms:.3g} ({grown:+.0%})"
        )
        if n >= 3:
            text += f", before {past.centre():.2g} (z {past.z(pace):.0f})"
        baseline = past.centre() if n >= 3 else straight
        yield pace, _in_file(
            b, "G1", Level.SUSPECT, Cause.INSTABILITY, text, value=pace, baseline=baseline, n=n,
            **facts,
        )  # fmt: skip
    else:
        past.values.append(math.log(pace))


def check_average(run: Run) -> Iterator[Finding]:
    """G3: raw weights against their EMA, in size and in direction."""
    pasts: dict[str, _Past] = {}
    before: _Cosine | None = None
    for s in run.series:
        window = _window(s)
        if math.isnan(window):
            continue
        if s.ema_equals_raw and window > 1:
            text = "the EMA equals the raw weights: it is not averaging, or one overwrote the other"
            yield _in_file(s, "G3", Level.SUSPECT, Cause.EMA, text)
            continue
        lr = _window_lr(run, s, window)
        found = [
            f for p in _matrices(s)
            for f in _judge_average(
                run, s, p, lr * p.lr_factor, window, pasts.setdefault(p.name, _Past())
            )
        ]  # fmt: skip
        if found:
            yield _with_others(max(found, key=lambda f: f[0])[1], len(found) - 1)
        cosine = _cosine(run, s)
        if cosine is not None:
            yield from _judge_direction(run, s, cosine, before)
            before = cosine


def _window(s: Summary) -> float:
    """Steps over which the EMA averages, warm-up of its decay included; NaN where it is unknown."""
    decay = s.flag("ema")
    if s.style != "own" or not math.isfinite(decay) or not s.step:
        return math.nan
    return 1 / (1 - min(decay, (1 + s.step) / (10 + s.step)))


def _window_lr(run: Run, s: Summary, window: float) -> float:
    return run.mean_lr(max(0, round((s.step or 0) - 2 * window)), s.step or 0, s)


def _judge_average(
    run: Run, s: Summary, p: Parameter, lr: float, window: float, past: _Past
) -> Iterator[tuple[float, Finding]]:
    usual = travel(lr, p.update_rms, window, p.noise_steps)
    if not usual or not math.isfinite(usual) or not math.isfinite(p.ema_distance):
        return
    apart = p.ema_distance / usual
    straight = lr * p.update_rms * window / usual
    n = len(past.values)
    far = apart > 2 * straight if p.optimizer == "Muon" else apart > max(3 * straight, 5)
    burst = n >= 3 and apart > 4 * past.centre() and past.z(apart) > 6 and apart > 2
    near = n >= 3 and apart < past.centre() / 20 and apart < 0.02
    if far or burst or near:
        what = "near" if near else "far from"
        text = (
            f"{p.name} is {what} its EMA: they differ by RMS {p.ema_distance:.2g}, it has "
            f"{p.rms:.2g}; {apart:.3g} times what {window:.0f} steps at lr {lr:.2g} explain"
        )
        before = run.previous(s)
        facts = {"where": p.name, "value": apart, "n": n, "after": before.step if before else None}
        if n >= 3:
            facts["baseline"] = past.centre()
        yield apart, _in_file(s, "G3", Level.SUSPECT, Cause.EMA, text, **facts)
    elif apart > 0:
        past.values.append(math.log(apart))


class _Cosine(NamedTuple):
    """Between raw minus EMA, the sum of the latest updates, and the way that the optimizer goes.

    It is about `_usual_cosine`, of which healthy runs have 0.24 to 0.82; n elements that have
    nothing to do with each other have 0 +- 1 / sqrt(n).
    """

    mean: float  # over the tensors, in units of what is usual
    z: float  # that a mean of 1 would have
    lost: float  # share of the tensors whose own cosine may be 0
    lr: float
    tensors: int

    @property
    def exchanged(self) -> bool:
        """Whether raw and EMA stand in each other's place."""
        return self.mean < -0.1 and -self.mean * self.z > 8


ORTHOGONAL = 0.65  # cosine between Muon's momentum and what orthogonalising makes of it


def _usual_cosine(p: Parameter, window: float) -> float:
    """Of noise: the part of a window of updates that the newest, which are alike, make up."""
    alike = math.sqrt(min(1.0, p.noise_steps / window))
    return alike * ORTHOGONAL if p.optimizer == "Muon" else alike


def _cosine(run: Run, s: Summary, method: str = "") -> _Cosine | None:
    """Of all tensors or one optimizer's; None late in a schedule, when the sum is of older, larger
    updates and says nothing."""
    window = _window(s)
    if math.isnan(window):
        return None
    measured = [
        (p.update_cos, _usual_cosine(p, window), math.sqrt(math.prod(p.shape)))
        for p in _matrices(s)
        if math.isfinite(p.update_cos) and method in ("", p.optimizer)
    ]  # fmt: skip
    lr = s.optimizer.get("lr", 0.0)
    if len(measured) < 3 or not lr > 0.12 * _window_lr(run, s, window):
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
    run: Run, s: Summary, now: _Cosine, before: _Cosine | None
) -> Iterator[Finding]:
    facts = {"value": now.mean, "baseline": before.mean if before else 0.5, "n": now.tensors}
    fell = before is not None and before.lost < 0.1 and now.lost >= 0.6 and now.lr > before.lr / 2
    if now.exchanged:
        text = (
            f"{_method(s)}'s steps lead from the raw weights towards the EMA and not away from it "
            f"(cosine {now.mean:.2f} of what noise gives): raw and EMA are exchanged"
        )
        yield _in_file(s, "G3", Level.SUSPECT, Cause.EMA, text, **facts)
    elif (muon := _cosine(run, s, "Muon")) and muon.mean < 0.08 and muon.z > 30:
        facts |= {"value": muon.mean, "n": muon.tensors}
        text = (
            f"Muon's momentum has nothing to do with the latest updates of its {muon.tensors} "
            "tensors: it is of other tensors, another state or another run"
        )
        yield _in_file(s, "G3", Level.SUSPECT, Cause.OPTIMIZER, text, **facts)
    elif (now.mean < 0.08 and now.z > 30) or fell:
        text = (
            f"{_method(s)}'s moments of {now.lost:.0%} of the tensors have nothing to do with "
            "the latest updates: they are of another tensor, another state or another run"
        )
        yield _in_file(s, "G3", Level.SUSPECT, Cause.OPTIMIZER, text, **facts)
    elif now.mean > 0.25:
        yield from _lost_directions(s, now.mean)


def _method(s: Summary) -> str:
    """Name of the optimizer for a sentence."""
    return str(s.optimizer.get("method") or "Adam")


def _lost_directions(s: Summary, mean: float) -> Iterator[Finding]:
    """Single tensors whose moments are not theirs, where those of the others are."""
    measured, window = _matrices(s), _window(s)
    expected = {p.name: mean * _usual_cosine(p, window) for p in measured}
    lost = [
        p for p in measured
        if p.update_cos < 0.05 * expected[p.name]
        and expected[p.name] * math.sqrt(math.prod(p.shape)) > 12
    ]  # fmt: skip
    if lost:
        text = (
            f"{lost[0].optimizer or 'Adam'}'s moments of {lost[0].name} have nothing to do with "
            "its latest updates"
        )
        finding = _in_file(
            s, "G3", Level.SUSPECT, Cause.OPTIMIZER, text, where=lost[0].name,
            value=lost[0].update_cos, baseline=expected[lost[0].name], n=len(measured),
        )  # fmt: skip
        yield _with_others(finding, len(lost) - 1)


def check_attention(run: Run) -> Iterator[Finding]:
    """G4, G6: bounds of attention logits, gains of the norms."""
    gains: dict[str, float] = {}
    for s in run.series:
        for p in s.parameters:
            if len(p.shape) != 1 or p.bad or not p.name.endswith("weight") or not _is_gain(p):
                continue
            before = gains.get(p.name)
            doubled = before is not None and p.rms > 2 * before and p.rms > 2
            is_query = p.place.role.endswith(("attn.q_norm", "attn.k_norm"))
            if p.largest > 10 or doubled:
                text = f"gains of {p.name}: RMS {p.rms:.3g}, largest {p.largest:.3g}"
                if is_query:
                    text += "; the attention logits that they bound can run away"
                yield _in_file(
                    s, "G4" if is_query else "G6", Level.SUSPECT, Cause.INSTABILITY, text,
                    where=p.name, value=p.largest, baseline=before or 1.0,
                )  # fmt: skip
            else:
                gains[p.name] = p.rms
    yield from _logit_growth(run)


def _is_gain(p: Parameter) -> bool:
    """Whether it is the gain of a norm, as far as a name can tell."""
    return "norm" in p.name or "ln" in p.name


def _logit_growth(run: Run) -> Iterator[Finding]:
    """Of models without QK-norm, whose logits nothing else bounds."""
    before: dict[str, list[float]] = {}
    for s in run.series:
        if any(p.place.role == "attn.q_norm" for p in s.parameters):
            continue
        for p in s.parameters:
            pairs = enumerate(zip(before.get(p.name, []), p.logit_bounds, strict=False))
            ratios = [(y / max(x, 1e-9), head) for head, (x, y) in pairs]
            ratio, head = max(ratios, default=(0.0, 0))
            if ratio > 3:
                text = (
                    f"{p.name}: the bound of head {head}'s attention logits grew {ratio:.1f} fold"
                )
                yield _in_file(
                    s, "G4", Level.SUSPECT, Cause.INSTABILITY, text, where=p.name, value=ratio
                )
            elif p.logit_bounds:
                before[p.name] = p.logit_bounds


def check_ranks(run: Run) -> Iterator[Finding]:
    """G5: matrices that collapse towards one direction."""
    for a, b in zip(run.series, run.series[1:], strict=False):
        before = {p.name: p.stable_rank for p in a.parameters}
        for p in b.parameters:
            old = before.get(p.name, math.nan)
            # The head and outputs of blocks start at zero and find their rank in the first epochs.
            if (
                p.stable_rank < 0.5 * old
                and old > 6
                and not p.place.role.endswith(("head", "embed"))
            ):
                level = Level.SUSPECT if p.stable_rank < 1.5 else Level.INFO
                text = f"stable rank of {p.name} fell from {old:.1f} to {p.stable_rank:.1f}"
                yield _in_file(
                    b, "G5", level, Cause.INSTABILITY, text, where=p.name, value=p.stable_rank,
                    baseline=old, after=a.step,
                )  # fmt: skip


def check_codebooks(run: Run) -> Iterator[Finding]:
    """G7, G8: rows of heads and embeddings, by codebook, against the last good file."""
    good: dict[tuple[str, int], tuple[Rows, int]] = {}
    for s in run.series:
        for p in s.parameters:
            yield from _judge_table(s, p, good)


def _judge_table(
    s: Summary, p: Parameter, good: dict[tuple[str, int], tuple[Rows, int]]
) -> Iterator[Finding]:
    known = {
        r.codebook: good[p.name, r.codebook][0] for r in p.rows if (p.name, r.codebook) in good
    }
    typical = float(np.median([r.median for r in p.rows])) if len(p.rows) >= 3 else math.nan
    ratios = [
        r.median / max(known[r.codebook].median, 1e-12) for r in p.rows if r.codebook in known
    ]
    growth = float(np.median(ratios)) if len(ratios) >= 3 else 1.0  # of the table as a whole
    for r in p.rows:
        said = _judge_rows(p, r, known.get(r.codebook), typical, growth)
        if said is None:
            good[p.name, r.codebook] = r, s.step or 0
            continue
        check, text, value, baseline = said
        after = good[p.name, r.codebook][1] if r.codebook in known else None
        yield _in_file(
            s, check, Level.SUSPECT, Cause.INSTABILITY, text, value=value, after=after,
            baseline=baseline, where=f"{p.name} codebook {r.codebook}",
        )  # fmt: skip


def _judge_rows(
    p: Parameter, r: Rows, old: Rows | None, typical: float, growth: float
) -> tuple[str, str, float, float] | None:
    """Check, text, value and baseline of what is wrong with a codebook's rows, or None."""
    which = f"codebook {r.codebook} in {p.name}"
    if r.zero:  # rows start at random: training never makes one exactly zero
        before = old.zero if old else math.nan
        size = p.shape[0] // max(len(p.rows), 1)
        return "G8", f"{r.zero} of {size} rows of {which} are zero: dead codes", r.zero, before
    if old is not None and r.low < 0.3 * old.low:
        text = f"the shortest rows of {which} shrank to norm {r.low:.2g}, before {old.low:.2g}"
        return "G8", text, r.low, old.low
    jumped = old is not None and not 0.4 < r.median / max(old.median * growth, 1e-12) < 4
    settled = old is not None and old.median > 0.05
    stands_out = not math.isnan(typical) and not 0.2 < r.median / max(typical, 1e-12) < 5
    if (stands_out and (old is None or jumped)) or (jumped and settled):
        ground = old.median if old else typical
        text = (
            f"rows of {which} have norm {r.median:.3g}, {'before' if old else 'elsewhere'} "
            f"{ground:.3g}"
        )
        return "G7", text, r.median, ground
    return None


# --- learning rate, best value -------------------------------------------------------------------


def check_learning_rate(run: Run) -> Iterator[Finding]:
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
    lr = group["lr"]
    recovers = s.counter("lr_scale", 1.0) != s.counter("lr_goal", 1.0)
    if not abs(lr - planned) > (0.05 if recovers else 0.01) * planned + 1e-12:
        return None
    level = Level.SUSPECT if lr > 1.5 * planned or lr < planned / 1.5 else Level.WARN
    text = f"lr {lr:.3g} at step {s.step}, the schedule says {planned:.3g}"
    if len(s.optimizer.get("groups", [])) > 1 and (factor := group.get("lr_factor", 1.0)) != 1:
        text += f" ({group['method']}'s group at {factor:g} times the run's)"
    return _in_file(s, "S1", level, Cause.LEARNING_RATE, text, value=lr, baseline=planned)


def _check_logged_lr(run: Run) -> Iterator[Finding]:
    """Within one process lr rises in the warm-up alone; a restart may raise it by its flags."""
    flags: dict[str, Any] = {}
    peak, lowest = 0.0, math.inf
    for row in run.history.rows:
        if row["event"] == "rollback":
            peak, lowest = 0.0, math.inf  # cut, it comes back step by step
        if row["event"] in ("start", "resume"):
            asked, had = _number(row["flags"].get("lr")) or 0.0, _number(flags.get("lr")) or 0.0
            if had and asked > 3 * had:
                text = f"a restart raised --lr from {had:g} to {asked:g} at step {row['step']}"
                yield Finding(
                    "S1", Level.SUSPECT, Cause.LEARNING_RATE, text, step=row["step"] + 1,
                    after=row["step"], value=asked, baseline=had,
                )  # fmt: skip
            flags = row["flags"]
            peak, lowest = 0.0, math.inf
        lr = row.get("lr")
        if row["event"] != "step" or not isinstance(lr, float):
            continue
        planned = _number(flags.get("lr")) or math.inf
        rose = lowest < 0.9 * peak and lr > 1.1 * lowest
        if lr > 1.05 * planned or rose:
            against = planned if lr > 1.05 * planned else lowest
            what = "the flags allow" if lr > 1.05 * planned else "it had fallen to"
            text = f"lr {lr:.3g} at step {row['step']}, {what} {against:.3g}"
            yield Finding(
                "S1", Level.SUSPECT, Cause.LEARNING_RATE, text, step=row["step"], value=lr,
                baseline=against, after=_row_before(run.history, row["step"]),
            )  # fmt: skip
            return
        peak, lowest = max(peak, lr), min(lowest, lr) if peak > lr else lowest


def _row_before(history: History, step: int) -> int | None:
    earlier = [r["step"] for r in history.steps if r["step"] < step]
    return earlier[-1] if earlier else None


def _check_saved_lr(run: Run) -> Iterator[Finding]:
    """Files of the older script carry no schedule: lr that rises after it had fallen."""
    peak, lowest, before = 0.0, math.inf, None
    for s in run.series:
        lr = s.optimizer.get("lr", math.nan)
        epochs = s.flag("epochs", 0.0)
        if s.style == "own" or not math.isfinite(lr):
            continue
        if lowest < 0.9 * peak and lr > 1.1 * lowest:
            text = f"lr rose to {lr:.3g} after it had fallen to {lowest:.3g}"
            if epochs and s.epoch is not None and s.epoch > epochs:
                text += f"; epoch {s.epoch} lies beyond the plan of {epochs:g}"
            yield _in_file(
                s, "S1", Level.SUSPECT, Cause.LEARNING_RATE, text, value=lr, baseline=lowest,
                after=before,
            )  # fmt: skip
        peak, before = max(peak, lr), s.step
        lowest = min(lowest, lr) if peak > lr else lowest


def check_best(run: Run) -> Iterator[Finding]:
    """S2: the best value can only fall."""
    best, before = math.inf, None
    for s in run.series:
        if math.isfinite(s.best_val):
            if s.best_val > best + 1e-9:
                text = f"best val is {s.best_val:.4f}, an earlier file has {best:.4f}"
                yield _in_file(
                    s, "S2", Level.WARN, Cause.FILE, text, value=s.best_val, baseline=best,
                    after=before,
                )  # fmt: skip
            best = min(best, s.best_val)
        before = s.step


# --- the metrics ---------------------------------------------------------------------------------


def check_guessing(run: Run) -> Iterator[Finding]:
    """H1: a codebook predicted worse than by guessing."""
    sizes = next((s.vocab_sizes for s in run.readable if s.vocab_sizes), [])
    if _overfits(run.history):
        return
    before = None
    for row in run.history.epochs:
        values = row.get("val_per_codebook") or []
        for k, (value, size) in enumerate(zip(values, sizes, strict=False)):
            limit = math.log(max(size, 2)) + 0.1
            if value is None or value > limit:
                said = "not finite" if value is None else f"{value:.3f}"
                text = f"val CE of codebook {k} is {said}, guessing gives {limit - 0.1:.3f}"
                yield Finding(
                    "H1", Level.DIVERGED, Cause.INSTABILITY, text, step=row["step"], after=before,
                    where=f"codebook {k}", value=value if value is not None else math.inf,
                    baseline=limit - 0.1,
                )  # fmt: skip
                return
        before = row["step"]


def check_validation(run: Run) -> Iterator[Finding]:
    """H2, H4: val well above its best, twice in a row: overfitting or instability."""
    epochs = [r for r in run.history.epochs if isinstance(r.get("val"), float)]
    if len(epochs) < 4:
        return
    vals = [r["val"] for r in epochs]
    best, rise = 0, None  # positions of the best value, and of the first far above it
    noise = 1.4826 * float(np.median(np.abs(np.diff(vals) - np.median(np.diff(vals)))))
    overfits = _overfits(run.history)
    margin = 0.1 if overfits else max(0.1, 6 * noise / math.sqrt(2))
    for i, value in enumerate(vals):
        if min(value, vals[min(i + 1, len(vals) - 1)]) > vals[best] + margin:
            rise = i
            break
        if value < vals[best]:
            best = i
    if rise is None:
        return
    lowest, at = vals[best], epochs[best]["step"]
    if overfits:
        text = (
            f"val {vals[-1]:.3f} has left its best {lowest:.3f} of step {at} smoothly while train "
            "still falls: overfitting, not instability"
        )
        yield Finding(
            "H4", Level.OVERFIT, Cause.OVERFITTING, text, step=epochs[best + 1]["step"], after=at,
            value=vals[-1], baseline=lowest, n=len(vals),
        )  # fmt: skip
        return
    text = f"val {vals[rise]:.3f} is {vals[rise] - lowest:.2f} above its best {lowest:.3f}"
    yield Finding(
        "H2", Level.SUSPECT, Cause.INSTABILITY, text, step=epochs[rise]["step"],
        after=epochs[rise - 1]["step"], value=vals[rise], baseline=lowest, n=rise,
    )  # fmt: skip


def _overfits(history: History) -> bool:
    """Whether val rises smoothly over the last third while train falls."""
    rows = [
        r for r in history.epochs
        if isinstance(r.get("val"), float) and isinstance(r.get("train"), float)
    ]  # fmt: skip
    vals = [r["val"] for r in rows]
    if len(rows) < 5:
        return False
    low = int(np.argmin(vals))
    after = rows[low:]
    if len(after) < 4 or after[-1]["val"] < vals[low] + 0.1:
        return False
    rises = np.diff([r["val"] for r in after])
    train_falls = after[-1]["train"] <= after[0]["train"]
    # A blow-up is a jump; overfitting spreads its rise over many validations.
    smooth = rises.max() < 0.6 * rises[rises > 0].sum() and (rises > 0).mean() >= 0.6
    return bool(train_falls and smooth)


def check_steps_of_training(run: Run) -> Iterator[Finding]:
    """H3: losses and gradient norms that leave their past, steps that the guard refused."""
    rows = run.history.steps
    losses = [r.get("loss") for r in rows]
    for i, row in enumerate(rows):
        past = [x for x in losses[max(0, i - 40) : i] if isinstance(x, float)]
        if len(past) < 8:
            continue
        value, after = losses[i], rows[i - 1]["step"]
        centre = float(np.median(past))
        spread = max(1.4826 * float(np.median(np.abs(np.array(past) - centre))), 0.02 * centre)
        stays = all(not isinstance(x, float) or x > centre + 6 * spread for x in losses[i : i + 3])
        if not isinstance(value, float) or (value > centre + 8 * spread and stays):
            said = f"{value:.3f}" if isinstance(value, float) else "not finite"
            text = f"loss jumps to {said} at step {row['step']} from about {centre:.3f}, and stays"
            yield Finding(
                "H3", Level.DIVERGED, Cause.INSTABILITY, text, step=row["step"], after=after,
                value=value if isinstance(value, float) else math.inf, baseline=centre, n=len(past),
            )  # fmt: skip
            break
    yield from _check_gradient_norms(run)
    yield from _check_refusals(run)


def _check_gradient_norms(run: Run) -> Iterator[Finding]:
    rows = [r for r in run.history.steps if isinstance(r.get("grad_norm"), float)]
    norms = [r["grad_norm"] for r in rows]
    for i in range(12, len(rows)):
        centre = float(np.median(norms[max(0, i - 60) : i]))
        if min(norms[i : i + 3]) > 10 * centre and i + 3 <= len(norms):
            text = (
                f"gradient norm rises to {norms[i]:.3g} at step {rows[i]['step']} and stays there"
            )
            yield Finding(
                "H3", Level.SUSPECT, Cause.INSTABILITY, text, step=rows[i]["step"],
                after=rows[i - 1]["step"], value=norms[i], baseline=centre, n=min(i, 60),
            )  # fmt: skip
            return


def _check_refusals(run: Run) -> Iterator[Finding]:
    skips, total = run.history.of("skip"), max([1, *(r["step"] for r in run.history.rows)])
    bad = [r for r in skips if "overflow" not in str(r.get("reason"))]
    for event in ("rollback", "quarantine"):
        for row in run.history.of(event)[:1]:
            first = min([r["step"] for r in bad] or [row["step"]])
            text = f"{event} at step {row['step']}: {str(row.get('reason'))[:100]}"
            yield Finding(
                "H3", Level.SUSPECT, Cause.INSTABILITY, text, step=row["step"], after=first - 1,
                value=len(bad),
            )  # fmt: skip
    if len(bad) >= 10 and len(bad) > 0.01 * total:
        text = f"the guard refused {len(bad)} of {total} steps, first at step {bad[0]['step']}"
        yield Finding(
            "H3", Level.SUSPECT, Cause.INSTABILITY, text, step=bad[0]["step"],
            after=bad[0]["step"] - 1, value=len(bad) / total, baseline=0.01,
        )  # fmt: skip


def check_probe(run: Run) -> Iterator[Finding]:
    """P1: models run on real windows: against guessing, and against the files before."""
    best: dict[str, float] = {}
    activations: dict[str, float] = {}
    for s in (s for s in run.readable if s.path in run.probes):
        answer = run.probes[s.path]
        if not isinstance(answer, dict):
            yield _in_file(s, "P1", Level.WARN, Cause.FILE, f"the probe failed: {answer.text}")
            continue
        for part, figures in answer.items():
            yield from _judge_probe(run, s, part, figures, best)
            largest, before = max(figures["activations"]), activations.get(part)
            if before is not None and largest > 5 * before:
                text = f"activations of the {part} model reach {largest:.3g}, before {before:.3g}"
                yield _in_file(
                    s, "P1", Level.SUSPECT, Cause.INSTABILITY, text, value=largest, baseline=before
                )
            activations[part] = min(largest, before or math.inf)


def _judge_probe(
    run: Run, s: Summary, part: str, figures: dict[str, Any], best: dict[str, float]
) -> Iterator[Finding]:
    weights = "raw weights" if part == "raw" else "EMA"
    cause = Cause.INSTABILITY if part == "raw" else Cause.EMA
    for k, (ce, size) in enumerate(zip(figures["ce"], s.vocab_sizes, strict=True)):
        if not ce <= math.log(size) + 0.1:
            text = f"{weights}: CE of codebook {k} is {ce:.3f}, guessing gives {math.log(size):.3f}"
            yield _in_file(
                s, "P1", Level.DIVERGED, cause, text, where=f"codebook {k}", value=ce,
                baseline=math.log(size),
            )  # fmt: skip
            return
    mean_ce, known = float(np.mean(figures["ce"])), best.get(part, math.inf)
    if mean_ce > known + max(0.1, 0.1 * known):
        text = (
            f"{weights}: CE {mean_ce:.3f} on the probe's windows, an earlier file has {known:.3f}"
        )
        yield _in_file(s, "P1", Level.SUSPECT, cause, text, value=mean_ce, baseline=known)
    best[part] = min(known, mean_ce)


CHECKS: tuple[Check, ...] = (
    check_container, check_keys, check_steps, check_finite, check_moments, check_momentum,
    check_updates, check_scale, check_displacement, check_average, check_attention, check_ranks,
    check_codebooks, check_learning_rate, check_best, check_guessing, check_validation,
    check_steps_of_training, check_probe,
)  # fmt: skip
