"""From findings to a verdict, the last healthy checkpoint, and the command that goes on from it.

    diagnosis = diagnose(ExaminedRun(name, summaries, RunMetrics(rows)))
    diagnosis.verdict, diagnosis.onset, diagnosis.last_healthy, diagnosis.command

The worst finding decides the verdict, the first in time the cause and the onset. The run goes on
from a file without a grave finding, saved before any trouble in the metrics.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
import os
import re
from dataclasses import dataclass

from cli.command_line import shell_line
from doctor.checks import findings_of
from doctor.examined_run import ExaminedRun
from doctor.findings import Cause, Finding, Level
from doctor.reading.summary import Summary
from run_folder.flags import FLAGS, Scope, command_words, names, saved_flags
from run_folder.validations import finite_validations


class Verdict(enum.Enum):
    """What became of a run."""

    HEALTHY = "HEALTHY"
    FOREIGN = "FOREIGN"
    SUSPECT = "SUSPECT"
    OVERFITTING = "OVERFITTING"
    CORRUPT = "CORRUPT"
    UNSAFE = "UNSAFE"
    DIVERGED = "DIVERGED"
    DEAD = "DEAD"
    NOTHING = "NOTHING USABLE"


VERDICT_OF = {
    Level.SUSPECT: Verdict.SUSPECT,
    Level.OVERFIT: Verdict.OVERFITTING,
    Level.DIVERGED: Verdict.DIVERGED,
    Level.DEAD: Verdict.DEAD,
    Level.INCOMPATIBLE: Verdict.CORRUPT,
    Level.CORRUPT: Verdict.CORRUPT,
    Level.UNSAFE: Verdict.UNSAFE,
}
# The state of the weights matters more than one damaged file, which has neighbours.
GRAVITY = list(Verdict)
FILE_CHECKS = ("I1", "I2", "I3", "I4", "S2")  # about one file and not about its run


@dataclass
class Diagnosis:
    """All that a report shows of one run."""

    run: ExaminedRun
    verdict: Verdict
    headline: str  # follows the verdict's word
    findings: list[Finding]  # by step; those of files without a step first
    first_sign: Finding | None
    onset: tuple[int | None, int | None]  # last step known good, first step known bad
    last_healthy: Summary | None
    command: str | None
    remedy: str  # what the command changes and why, or what to do without a command

    def state_of(self, summary: Summary) -> Level:
        """How bad a file is: the worst finding in it or in a copy; INFO where there is none."""
        return max((f.level for f in self.findings_of(summary)), default=Level.INFO)

    def findings_of(self, summary: Summary) -> list[Finding]:
        """Findings in a file and in its copies under other names."""
        copies = copies_of(self.run, summary)
        return [
            f for f in self.findings
            if f.path == summary.path or (f.path in copies and f.check not in FILE_CHECKS)
        ]  # fmt: skip


def copies_of(run: ExaminedRun, summary: Summary) -> set[str]:
    """Paths of the files with the same state of the run, this one included."""
    if summary.problem is not None or not summary.parameters:
        return {summary.path}
    return {s.path for s in run.readable if s.moment == summary.moment}


def diagnose(run: ExaminedRun) -> Diagnosis:
    """Run every check and draw the conclusions."""
    return conclude(run, findings_of(run))


def conclude(run: ExaminedRun, found: list[Finding]) -> Diagnosis:
    """The diagnosis that follows from what checks found in a run."""
    findings = _forgive_what_healed(run, found)
    findings.sort(key=lambda f: (-1 if f.step is None else f.step, -f.level))
    grave = [f for f in findings if f.level >= Level.SUSPECT]
    trouble = [f for f in grave if not _is_of_a_file(f) and f.step is not None]
    first_sign = min(trouble, key=lambda f: (f.step, -f.level), default=None)
    verdict = max((VERDICT_OF[f.level] for f in grave), key=GRAVITY.index, default=Verdict.HEALTHY)
    if not run.readable:
        verdict = Verdict.FOREIGN if _foreign(run) else Verdict.NOTHING
    onset = _onset(run, first_sign)
    healthy = _last_healthy(run, findings, trouble)
    cause = _cause(grave, first_sign)
    command, remedy = _way_on(run, verdict, cause, healthy, findings)
    headline = _headline(run, verdict, grave, onset, cause)
    return Diagnosis(run, verdict, headline, findings, first_sign, onset, healthy, command, remedy)


def _foreign(run: ExaminedRun) -> list[Summary]:
    """Files that are no run of this trainer."""
    return [s for s in run.summaries if s.problem is not None and s.problem.kind == "foreign"]


def _is_of_a_file(finding: Finding) -> bool:
    return finding.check in FILE_CHECKS and finding.cause is Cause.FILE


def _forgive_what_healed(run: ExaminedRun, findings: list[Finding]) -> list[Finding]:
    """Warnings instead of signs of instability before the best val, and in files set aside."""
    guessing = math.log(max([2, *run.vocab_sizes])) if run.vocab_sizes else math.inf
    vals = [(r["val"], r["step"]) for r in finite_validations(run.metrics) if r["val"] < guessing]
    healed = min(vals)[1] if vals else -1

    def softened(f: Finding) -> Finding:
        if f.level < Level.SUSPECT:
            return f
        if f.path in run.set_aside:
            why = "the trainer itself set this file aside"
        elif f.check in ("H1", "H2", "H3") and f.step is not None and f.step < healed:
            why = "val recovered since"
        else:
            return f
        return dataclasses.replace(f, level=Level.WARN, text=f"{f.text}; {why}")

    return [softened(f) for f in findings]


def _onset(run: ExaminedRun, first: Finding | None) -> tuple[int | None, int | None]:
    if first is None or first.step is None:
        return None, None
    before = [s.step for s in run.series if s.step is not None and s.step < first.step]
    known = [x for x in (first.after, max(before, default=None)) if x is not None]
    return (max(known) if known else None), first.step


def _last_healthy(
    run: ExaminedRun, findings: list[Finding], trouble: list[Finding]
) -> Summary | None:
    """The newest file without a grave finding that was saved before any trouble in the metrics."""
    bad = {f.path for f in findings if f.level >= Level.SUSPECT and f.path}
    sick = {f.path for f in findings if f.level >= Level.SUSPECT and not _is_of_a_file(f)}
    bad |= {copy for s in run.readable if s.path in sick for copy in copies_of(run, s)}
    events = [f for f in trouble if f.path is None]
    limit = min(((f.after if f.after is not None else (f.step or 1) - 1) for f in events),
                default=math.inf)  # fmt: skip
    good = [
        s for s in run.readable
        if s.path not in bad and s.step is not None and s.step <= limit
        and s.path not in run.set_aside
    ]  # fmt: skip
    by_kind = ("latest", "archive", "previous", "ring", "best", "best archive", "other")
    return max(good, key=lambda s: (s.step or 0, -by_kind.index(s.kind)), default=None)


def _cause(grave: list[Finding], first: Finding | None) -> Cause | None:
    """The cause of the first sign; a learning rate already wrong then explains an instability."""
    if first is None:
        return grave[0].cause if grave else None
    if any(f.cause is Cause.LEARNING_RATE and (f.step or 0) <= (first.step or 0) for f in grave):
        return Cause.LEARNING_RATE
    same_step = [f for f in grave if f.step == first.step and f.path]
    order = (Cause.SCALER, Cause.EMA, Cause.OPTIMIZER)
    if first.cause is Cause.INSTABILITY or not same_step:
        return first.cause
    return next((c for c in order if any(f.cause is c for f in same_step)), first.cause)


def _headline(
    run: ExaminedRun,
    verdict: Verdict,
    grave: list[Finding],
    onset: tuple[int | None, int | None],
    cause: Cause | None,
) -> str:
    files = {f.path for f in grave if f.path}
    if verdict is Verdict.FOREIGN:
        first, *others = [f"{s.name} is {s.problem.text}" for s in _foreign(run) if s.problem]
        more = f" (and {len(others)} more files)" if others else ""
        return f"{first}{more}: no run of this trainer"
    if verdict is Verdict.NOTHING:
        return f"none of {len(run.summaries)} files can be read"
    if verdict is Verdict.HEALTHY:
        count, moments = len(run.summaries), len(run.series)
        return (
            f"{count} file{'s' * (count != 1)} of {moments} moment{'s' * (moments != 1)} of the "
            "run, no grave finding"
        )
    if onset[1] is None:
        return f"{len(files)} of {len(run.summaries)} files"
    when = f"between {_moment(run, onset[0])} and {_moment(run, onset[1])}"
    if onset[0] is None:
        when = f"by {_moment(run, onset[1])}"
    return f"{when}; cause: {cause.value}" if cause else when


def _moment(run: ExaminedRun, step: int | None) -> str:
    """`step 498000 (epoch 346)`."""
    if step is None:
        return "the start"
    known: list[tuple[int, int]] = [
        (s.step, s.epoch) for s in run.series if s.step is not None and s.epoch is not None
    ]
    rows = run.metrics.steps + run.metrics.epochs
    known += [(r["step"], r["epoch"]) for r in rows if isinstance(r.get("epoch"), int)]
    near = min(known, key=lambda pair: abs(pair[0] - step), default=None)
    return f"step {step}" + (f" (epoch {near[1]})" if near else "")


# --- the way on ----------------------------------------------------------------------------------


def _way_on(
    run: ExaminedRun,
    verdict: Verdict,
    cause: Cause | None,
    healthy: Summary | None,
    findings: list[Finding],
) -> tuple[str | None, str]:
    if verdict is Verdict.FOREIGN:
        ways = dict.fromkeys(s.problem.way for s in _foreign(run) if s.problem)
        return (
            None,
            f"There is nothing to mend here. To get at what it holds: {'; or '.join(ways)}.",
        )
    if verdict is Verdict.NOTHING:
        if any(s.problem is not None and s.problem.kind == "unsafe" for s in run.summaries):
            return None, (
                "None was loaded: a pickle that names more than tensors can run any code. No file "
                "of this trainer does; let nothing open it unless you trust where it comes from."
            )
        return None, "No file can be read: restore a backup, or start anew with --no-resume."
    if healthy is None:
        return _without_healthy(run, findings)
    if healthy.style != "own":
        return None, (
            f"{healthy.name} is of an older script, whose weights train_rvq.py cannot take over: "
            f"resume it there{'' if verdict is Verdict.HEALTHY else ', at half the lr'}, or train "
            "anew here."
        )
    command = ["python", "train_rvq.py", "--resume", healthy.path, *_folder_flags(run, healthy)]
    lr = healthy.flag("lr", 0.0)
    if verdict is Verdict.HEALTHY:
        return shell_line(command), "Nothing is wrong; this goes on from the newest state."
    if cause is Cause.OVERFITTING:
        return _against_overfitting(command, healthy)
    if cause is Cause.SCALER:
        return shell_line([*command, "--amp-dtype", "bf16"]), "bf16 needs no loss scale."
    if cause is Cause.LEARNING_RATE and lr:
        return (
            shell_line([*command, "--lr", f"{lr:g}", "--panic-lr-mul", "0.5"]),
            "Goes back to before the learning rate left its plan, and follows the plan again.",
        )
    if cause is Cause.INSTABILITY and verdict in (Verdict.DIVERGED, Verdict.DEAD) and lr:
        return (
            shell_line([*command, "--lr", f"{lr / 2:g}", "--panic-lr-mul", "0.5"]),
            "Goes back to the last healthy state, at half the learning rate.",
        )
    return shell_line(command), "Goes back to the newest file that nothing is wrong with."


def _folder_flags(run: ExaminedRun, summary: Summary) -> list[str]:
    """The run's folder and tag; the checkpoint contains all other flags."""
    folder = os.path.dirname(summary.path) or "."
    tag = re.fullmatch(r"rvq_\d+cb_(.+)", os.path.basename(run.name))
    return ["--save_dir", folder, *(["--tag", tag[1]] if tag else [])]


def _without_healthy(run: ExaminedRun, findings: list[Finding]) -> tuple[str | None, str]:
    """The command where no file is healthy: repaired names, averaged weights, or a new start."""
    if wrapped := [s for s in run.readable if s.prefix and s.style == "own"]:
        bad = {f.path for f in findings if f.level >= Level.SUSPECT and f.check != "I3"}
        if (s := wrapped[-1]).path not in bad and not s.mismatches:
            return _without_prefix(run, s)
    lost = {
        f.path for f in findings
        if (f.check in FILE_CHECKS and f.level >= Level.SUSPECT)
        or (f.cause is Cause.EMA and f.level >= Level.DIVERGED)
    }  # fmt: skip
    for s in reversed(run.readable):
        whole = s.style == "own" and s.path not in lost
        if not whole or any(p.bad.get("ema") or math.isnan(p.ema_rms) for p in s.parameters):
            continue
        command = ["python", "train_rvq.py", "--init-from", s.path, *_new_run(s, "from_ema", "run")]
        return shell_line(command), (
            "No file is healthy, but this one's averaged weights show nothing: a new run starts "
            "from them, at a lower learning rate. Listen to them first."
        )
    newest = run.readable[-1]
    others = (
        "Older files of the run, if there are any (*_previous.pt, *_best.pt, *_epoch_*.pt), may"
    )
    if not newest.flags.get("data"):
        return None, f"Nothing here is sound. {others} be: name them too. Else train anew."
    command = ["python", "train_rvq.py", *_new_run(newest, "anew", "run", "architecture")]
    return shell_line(command), (
        f"Nothing here is sound, averaged weights included. {others} be: name them too. Else this "
        "trains anew, at a lower learning rate."
    )


def _without_prefix(run: ExaminedRun, s: Summary) -> tuple[str, str]:
    """The command that writes a copy without the prefix of all names and goes on from it."""
    copy = f"{os.path.splitext(s.path)[0]}_unwrapped.pt"
    script = (
        f"import torch; c = torch.load({s.path!r}, weights_only=True); "
        f"cut = lambda names: [n.removeprefix({s.prefix!r}) for n in names]; "
        "c.update({k: dict(zip(cut(c[k]), c[k].values())) for k in ('model', 'ema')}); "
        "[g.update(param_names=cut(g['param_names'])) for g in c['optimizer']['param_groups']]; "
        f"torch.save(c, {copy!r})"
    )
    resume = ["python", "train_rvq.py", "--resume", copy, *_folder_flags(run, s)]
    return f"{shell_line(['python', '-c', script])} && {shell_line(resume)}", (
        "Its weights are sound and only their names are not: this writes a copy whose names are "
        "right and goes on from that."
    )


SANE_LR = 1e-3  # for both optimizers


def _new_run(summary: Summary, folder: str, *scopes: Scope) -> list[str]:
    """Flags of a new run in a folder beside the old one: saved flags of some scopes, a lower lr."""
    saved = saved_flags({"flags": summary.flags})
    wanted = {name: saved.get(name) for name in ("data", "val_list", "labels", *names(*scopes))}
    values = {n: v for n, v in wanted.items() if v != FLAGS[n].options.get("default")}
    if lr := min(summary.flag("lr", 0.0) / 2, SANE_LR):
        lowest = min(lr, summary.flag("eta_min", FLAGS["eta_min"].options["default"]))
        values |= {"lr": f"{lr:g}", "eta_min": f"{lowest:g}"}
    place = os.path.join(os.path.dirname(summary.path) or ".", folder)
    return ["--save_dir", place, *itertools.chain(*command_words(values))]


def _against_overfitting(command: list[str], healthy: Summary) -> tuple[str, str]:
    dropout = min(0.5, healthy.flag("dropout", 0.0) + 0.1)
    decay = 2 * healthy.flag("weight_decay", 0.02)
    flags = ["--dropout", f"{dropout:g}", "--weight-decay", f"{decay:g}"]
    return shell_line([*command, *flags]), (
        "Weights are sound, the data is learned by heart: add data, or go on from before the rise "
        "with more dropout and weight decay. For sampling take the best file."
    )
