"""Faults of an optimizer's state: F2, F3, O2 and O4.

    findings = [*check_moments(run), *check_updates(run), *check_scale(run)]

Moments that no gradients can make are proof; the size of a step is compared with earlier files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from doctor.examined_run import ExaminedRun
from doctor.findings import Cause, Finding, Level, check, in_file
from doctor.reading.summary import Parameter, Summary
from run_folder.metrics import finite_number


@check("F2", "second moments below zero", Level.CORRUPT, Cause.OPTIMIZER)
@check("F3", "moments that no clipped gradients can make", Level.CORRUPT, Cause.OPTIMIZER)
def check_moments(run: ExaminedRun) -> Iterator[Finding]:
    """F2, F3: moments that no sequence of gradients can produce."""
    for s in run.readable:
        negative = [p for p in s.parameters if p.v_negative]
        if negative:
            p = negative[0]
            text = f"{p.v_negative} second moments of {p.name} are negative"
            yield in_file(s, "F2", text, where=p.name)
        over = [p for p in s.parameters if p.m_over_bound]
        if over:
            p = max(over, key=lambda p: p.m_over_bound)
            text = (
                f"{p.m_over_bound} elements of {p.name} have abs(m) > {p.step_bound:.3g} sqrt(v), "
                f"which no gradients can make ({len(over)} tensors)"
            )
            yield in_file(s, "F3", text, where=p.name)
    yield from _check_momentum(run)


def _check_momentum(run: ExaminedRun) -> Iterator[Finding]:
    """F3, O2 of Muon: momentum that clipped gradients cannot make, that leapt, or that is zero.

    torch's Muon keeps a running mean of gradients, so it is no longer than the longest of them.
    """
    clip, past = _largest_clip(run), list[float]()
    for s in run.series:
        trained = [p for p in s.parameters if p.optimizer == "Muon" and math.isfinite(p.m_rms)]
        if not trained or any(p.bad.get("momentum") for p in trained) or (s.step or 0) < 10:
            continue
        if still := [p for p in trained if p.m_rms == 0]:
            text = f"no gradient ever reached {still[0].name}, or its momentum was cleared"
            finding = in_file(s, "O2", text, where=still[0].name, value=0.0)
            yield finding.with_others(len(still) - 1)
            continue
        longest = max(trained, key=_momentum_norm)
        norm = math.hypot(*map(_momentum_norm, trained))
        if norm > 1.01 * clip:
            text = (
                f"Muon's momentum has norm {norm:.3g}, most of it in {longest.name}; gradients "
                f"clipped to {clip:g} cannot make it"
            )
            yield in_file(s, "F3", text, where=longest.name, value=norm, baseline=clip)
        else:
            yield from _judge_momentum(run, s, norm, past)


def _momentum_norm(p: Parameter) -> float:
    return p.m_rms * math.sqrt(p.numel)


def _largest_clip(run: ExaminedRun) -> float:
    """Largest --grad-clip of the run's starts; infinite where one is unknown or did not clip."""
    flags = [s.flags for s in run.readable if s.style == "own"]
    flags += [r["flags"] for r in run.metrics.rows if r["event"] in ("start", "resume")]
    clips = [finite_number(f.get("grad_clip")) or math.inf for f in flags]
    return max(clips, default=math.inf)


def _judge_momentum(
    run: ExaminedRun, s: Summary, norm: float, past: list[float]
) -> Iterator[Finding]:
    """O2: the norm of the momentum over that of the latest gradients; healthy: 0.01 to 0.08."""
    near = [
        r["grad_norm"] for r in run.metrics.steps
        if isinstance(r.get("grad_norm"), float) and -40 < r["step"] - (s.step or 0) <= 0
    ]  # fmt: skip
    usual = float(np.median(near)) if near else 1.0
    share, n = norm / max(usual, 1e-30), len(past)
    centre = float(np.median(past)) if past else share
    limit = 8 if near else 30
    if n >= 3 and not 1 / limit < share / centre < limit:
        text = f"Muon's momentum has norm {norm:.2g}, {share / centre:.2g} times what it had before"
        text += f", at gradients of norm {usual:.2g}" if near else ""
        yield in_file(s, "O2", text, value=share, baseline=centre, n=n)
    else:
        past.append(share)


@check("O2", "RMS of Adam's step, size of Muon's momentum", Level.SUSPECT, Cause.OPTIMIZER)
def check_updates(run: ExaminedRun) -> Iterator[Finding]:
    """O2: the size of Adam's step; Muon's is constant."""
    pasts: dict[str, list[float]] = {}
    for s in run.series:
        for p in s.measurable:
            yield from _check_update(s, p, pasts.setdefault(p.name, []))


def _check_update(s: Summary, p: Parameter, past: list[float]) -> Iterator[Finding]:
    """O2: the RMS of Adam's step before lr, against `past`, which healthy values join."""
    if p.optimizer == "Muon" or not math.isfinite(p.update_rms) or p.adam_step < 10:
        return
    if p.v_zero == 1.0:
        text = f"no gradient ever reached {p.name}, or its moments were cleared"
        yield in_file(s, "O2", text, where=p.name, value=0.0)
        return
    usual = float(np.median(past)) if past else 0.229
    # Rows of an embedding whose code never occurs have no moments and do not move.
    rms = p.update_rms / math.sqrt(max(1 - p.v_zero, 1e-3))
    text = ""
    # A tensor that moves in one direction at every step comes near 1; it may early in a run.
    if rms > 0.6 and len(past) >= 3 and rms > 2.5 * usual:
        text = f"RMS of Adam's step on {p.name} is {rms:.2f}; noise alone gives 0.23"
    elif rms == 0 or (len(past) >= 3 and rms < 0.03 and rms < usual / 4):
        text = f"RMS of Adam's step on {p.name} is {rms:.3f}: it hardly moves"
    if text:
        yield in_file(s, "O2", text, where=p.name, value=rms, baseline=usual, n=len(past))
    else:
        past.append(rms)


@check("O4", "the fp16 loss scale", Level.SUSPECT, Cause.SCALER)
def check_scale(run: ExaminedRun) -> Iterator[Finding]:
    """O4: a loss scale that has collapsed: below 128 small gradients vanish in fp16."""
    for s in run.readable:
        if s.scale is None or not math.isfinite(s.scale) or s.scale >= 128:
            continue
        text = f"GradScaler's scale is down to {s.scale:g}: fp16 gradients overflow at every scale"
        yield in_file(s, "O4", text, value=s.scale)
