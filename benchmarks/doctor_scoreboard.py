"""How well ckpt_doctor.py does on healthy runs and on runs with planted faults.

    python benchmarks/doctor_scoreboard.py                # 12 faults x 5 seeds: the published score
    python benchmarks/doctor_scoreboard.py --extra        # and what lies beyond the list
    python benchmarks/doctor_scoreboard.py --quick        # one seed, fewer healthy runs
    python benchmarks/doctor_scoreboard.py --muon --extra # the same of runs with --optim muon
    python benchmarks/doctor_scoreboard.py --pattern depth # of runs with another --pattern
    python benchmarks/doctor_scoreboard.py --single       # one file alone, diverged or healthy
    python benchmarks/doctor_scoreboard.py --ablate       # what would be lost without each check
    python benchmarks/doctor_scoreboard.py --keep runs    # leave the runs there; a second start
                                                          # trains only what is missing

Every run is a real training by train_rvq.py's main at tiny size; tests/kit/planted_faults.py plants
faults, in training or in the files, at a step that the seed draws, and remembers the truth. Then
`ckpt_doctor.py FOLDER --json` judges each folder. Ends with 1 under these figures: 57 of 60
found, 54 dated within one archive, at most one false alarm in 50 healthy checkpoints.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import io
import json
import math
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from kit import single_files  # noqa: E402
from kit.planted_faults import (  # noqa: E402
    FILE_EXTRA,
    FILE_FAULTS,
    METRICS_FAULTS,
    MUON_FAULTS,
    TRAINED,
    TRAINED_EXTRA,
    WRONG_ADAM,
    Sabotage,
    Truth,
    copy_run,
    make_data,
    moments,
    plant,
    plant_in_metrics,
    train,
)

import ckpt_doctor  # noqa: E402
from doctor.checks import findings_of  # noqa: E402
from doctor.diagnosis import Diagnosis, conclude  # noqa: E402
from doctor.findings import Level, ids_in_order  # noqa: E402

QUICK = ("NaN layer", "head drift", "lr x 10", "scale collapse", "wrong Adam", "swapped EMA",
         "bit flip", "truncation")  # fmt: skip
GRAVE = ("suspect", "overfit", "diverged", "dead", "incompatible", "corrupt", "unsafe")
COMMON = [
    *("--device", "cpu", "--num_workers", "0", "--eval-audio-every", "0", "--quiet"),
    *("--log-lr-steps", "5", "--archive-every", "1", "--save-every-minutes", "0"),
]


@dataclass(frozen=True)
class Shape:
    """Data and flags of a kind of run."""

    data: dict[str, Any]
    flags: str
    epochs: int


SHAPES = (
    Shape(
        {"codebooks": 4, "vocab": 64, "files": 4, "frames": 1500, "noise": 0.0},
        "--d_model 32 --layers 2 --heads 2 --ctx 32 --batch 4 --accum 2 --lr 3e-3",
        12,
    ),
    Shape(
        {"codebooks": 2, "vocab": 256, "files": 5, "frames": 1500, "noise": 0.2},
        "--d_model 64 --layers 3 --heads 4 --ctx 64 --batch 4 --accum 1 --lr 1e-3 --ema 0.99 "
        "--dropout 0",
        10,
    ),
    Shape(
        {"codebooks": 3, "vocab": 100, "files": 6, "frames": 2400, "noise": 0.1},
        "--d_model 48 --layers 2 --heads 4 --ctx 128 --batch 2 --accum 3 --lr 2e-3 --ema 0.98 "
        "--weight-decay 0.1 --warmup-ratio 0.1",
        14,
    ),
    Shape(
        {"codebooks": 4, "vocab": 64, "files": 4, "frames": 1200, "noise": 0.05},
        "--d_model 32 --layers 2 --heads 2 --ctx 32 --batch 4 --accum 1 --lr 5e-4 --ema 0.9 "
        "--amp-dtype fp16",
        10,
    ),
    Shape(
        {"codebooks": 9, "vocab": 64, "files": 6, "frames": 1200, "noise": 0.03},
        "--d_model 32 --layers 2 --heads 4 --ctx 32 --batch 8 --accum 1 --lr 1e-2 --no-amp "
        "--label-smoothing 0 --dropout 0.2",
        12,
    ),
)
SMALL = "--d_model 32 --layers 2 --heads 2 --ctx 32 --batch 4 --accum 1 "
MUON_RATE = 0.1  # of the rates here, which are AdamW's: Muon's groups run at multiples of --lr
# Beside the five shapes, each run twice: (shape whose data is taken, starts of the trainer).
HEALTHY_EXTRA: dict[str, tuple[int, tuple[str, ...]]] = {
    "lr decays to eta_min": (
        0, (SMALL + "--lr 3e-3 --eta-min 1e-6 --epochs 30 --archive-every 3",)
    ),
    "warm-up alone": (0, (SMALL + "--lr 3e-3 --warmup-ratio 0.9 --epochs 6 --max-steps 400",)),
    "resumed": (1, (SMALL + "--lr 2e-3 --epochs 8 --max-steps 350", "--epochs 8 --max-steps 2000")),
    "archives thinned": (0, (SMALL + "--lr 2e-3 --epochs 14 --keep-archived 5",)),
    "time budget": (3, (SMALL + "--lr 2e-3 --epochs 500 --max-seconds 8",)),
    "three epochs": (2, (SMALL + "--lr 3e-3 --epochs 3",)),
    "lr 3e-2": (4, (SMALL + "--lr 3e-2 --epochs 8",)),
    "real tokens": (
        -1,
        ("--d_model 32 --layers 2 --heads 2 --ctx 128 --step 512 --batch 4 --accum 1 --lr 2e-3 "
         "--epochs 6",),
    ),
}  # fmt: skip


@dataclass
class Case:
    """One folder to diagnose, and what is true of it."""

    fault: str
    folder: Path
    truth: Truth | None  # None: healthy


@dataclass
class Verdict:
    """What the doctor said of one folder."""

    verdict: str
    exit_code: int
    findings: list[dict[str, Any]]  # check, level, path, step, after, where, text
    last_good: int | None
    first_bad: int | None
    last_healthy: str


# --- making the runs -----------------------------------------------------------------------------


def in_background(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of jobs, two processes at a time; each has one thread."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    _jobs[:] = jobs
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        return list(pool.map(_call, range(len(jobs))))


_jobs: list[Callable[[], Any]] = []


def _call(number: int) -> Any:
    return _jobs[number]()


def remembered(folder: Path, make: Callable[[], Truth | None]) -> Truth | None:
    """Make a run in a folder, or take what an earlier start left there."""
    note = folder.with_name(folder.name + ".truth")
    if not note.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of a start that was cut off
        truth = make()
        note.write_bytes(pickle.dumps(truth))
    return pickle.loads(note.read_bytes())


class Bench:
    """Folders of one scoreboard: data, healthy runs, and cases."""

    def __init__(
        self, root: Path, *, quick: bool = False, muon: bool = False, pattern: str = "parallel"
    ) -> None:
        self.root, self.quick, self.muon, self.pattern = root, quick, muon, pattern
        root.mkdir(parents=True, exist_ok=True)
        for number, shape in enumerate(SHAPES):
            if not (root / f"data{number}").exists():
                make_data(root / f"data{number}", **shape.data, seed=number)

    def data(self, number: int) -> Path:
        return self.root / f"data{number}" if number >= 0 else ROOT / "examples/tokens/val"

    def healthy(self, number: int, seed: int) -> Path:
        return self.root / f"healthy{number}_{seed}"

    def train(
        self, folder: Path, data: Path, starts: Iterable[str], sabotage: Sabotage | None = None
    ) -> None:
        for flags in starts:
            words = ["--data", str(data), "--save_dir", str(folder), *COMMON]
            words += ["--optim", "muon" if self.muon else "adamw", "--pattern", self.pattern]
            words += flags.split()
            if self.muon:
                for at in (i for i, word in enumerate(words) if word == "--lr"):
                    words[at + 1] = f"{MUON_RATE * float(words[at + 1]):g}"
            log = folder.with_name(folder.name + ".log")
            code = train(words, sabotage, log)
            if code not in (0, 3):  # done, or stopped by the guard
                raise RuntimeError(f"{log}: the trainer ended with {code}")

    def train_shape(
        self, folder: Path, number: int, seed: int, sabotage: Sabotage | None = None, more: str = ""
    ) -> None:
        shape = SHAPES[number]
        epochs = 8 if self.quick else shape.epochs
        flags = f"{shape.flags} --epochs {epochs} --seed {seed}{more}"
        self.train(folder, self.data(number), [flags], sabotage)

    def last_step(self, number: int) -> int:
        return moments(self.healthy(number, 0))[-1][0]


def make_healthy(bench: Bench, shapes: Iterable[int], extra: Iterable[str]) -> list[Case]:
    jobs: list[Callable[[], Any]] = []
    cases = []
    for number in shapes:
        for seed in (0, 1):
            folder = bench.healthy(number, seed)
            cases.append(Case(f"shape {number}", folder, None))
            jobs.append(_job(folder, bench.train_shape, folder, number, seed))
    for name in extra:
        number, starts = HEALTHY_EXTRA[name]
        folder = bench.root / name.replace(" ", "_")
        cases.append(Case(name, folder, None))
        jobs.append(_job(folder, bench.train, folder, bench.data(number), starts))
    in_background(jobs)
    return cases


def _job(folder: Path, make: Callable[..., Any], *arguments: Any) -> Callable[[], Truth | None]:
    return lambda: remembered(folder, lambda: make(*arguments))


def make_faults(bench: Bench, faults: Sequence[str], seeds: Sequence[int]) -> list[Case]:
    """A folder for every fault and seed."""
    folders = [
        (fault, seed, bench.root / f"fault_{fault}_{seed}".replace(" ", "_").replace("/", "by"))
        for fault in faults
        for seed in seeds
    ]
    jobs = [_job(folder, make_fault, bench, fault, seed, folder) for fault, seed, folder in folders]
    truths = in_background(jobs)
    return [Case(f, folder, t) for (f, _, folder), t in zip(folders, truths, strict=True)]


def make_fault(bench: Bench, fault: str, seed: int, folder: Path) -> Truth:
    number = seed % len(SHAPES)
    rng = np.random.default_rng([seed, *fault.encode()])
    sabotages, files = {**TRAINED, **TRAINED_EXTRA}, {**FILE_FAULTS, **FILE_EXTRA, **MUON_FAULTS}
    if fault == "overfit":
        return make_overfit(bench, seed, folder)
    if fault == "lr 1 without warm-up":
        flags = f"{SHAPES[number].flags} --lr 1 --warmup-ratio 0 --epochs 4"
        bench.train(folder, bench.data(number), [flags])
        return Truth(1, ("S1", "H1", "H2", "H3", "G1"))
    if fault in sabotages:
        last = bench.last_step(number)
        sabotage = sabotages[fault](rng, int(last * rng.uniform(0.4, 0.75)))
        precision = " --amp --amp-dtype fp16" if fault == "scale collapse" else ""
        bench.train_shape(folder, number, 0, sabotage, precision)
        return with_bad_files(folder, sabotage.truth())
    copy_run(bench.healthy(number, 0), folder)
    if fault in METRICS_FAULTS:
        return plant_in_metrics(folder, fault, rng)
    chosen = files[fault] if fault != "wrong Adam" else WRONG_ADAM[seed % len(WRONG_ADAM)]
    if fault == "bit flip" and seed % 5 >= 3:  # such that the CRC is right
        chosen = files["exponent flip"]
    return plant(folder, chosen, bench.healthy(number, 1), rng)


def with_bad_files(folder: Path, truth: Truth) -> Truth:
    at = truth.onset + ("O4" in truth.causes)  # overflows are refused: no step is counted
    truth.bad = {p.name for step, paths in moments(folder) if step >= at for p in paths}
    return truth


def make_overfit(bench: Bench, seed: int, folder: Path) -> Truth:
    """Two tiny noisy files, a large model, no dropout; it begins where val is lowest."""
    data = bench.root / f"tiny{seed}"
    shutil.rmtree(data, ignore_errors=True)
    make_data(data, codebooks=3, vocab=64, files=3, frames=400, noise=0.3, seed=100 + seed)
    listed = data / "val.txt"
    listed.write_text("0.npq\n")
    flags = (
        f"--val-list {listed} --d_model 64 --layers 2 --heads 4 --ctx 32 --batch 4 --accum 1 "
        f"--lr {(1e-3, 2e-3, 3e-3)[seed % 3]} --dropout 0 --weight-decay 0 --label-smoothing 0 "
        f"--epochs 40 --archive-every 2 --ema 0.95 --seed {seed}"
    )
    bench.train(folder, data, [flags])
    (path,) = folder.glob("*_metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    epochs = [r for r in rows if r["event"] == "epoch"]
    best = min(epochs, key=lambda r: r["val"])["step"]
    return Truth(best + 1, ("H4",))


# --- asking the doctor ---------------------------------------------------------------------------


def ask(folder: Path, *more: str) -> Verdict:
    """What the doctor says of a folder."""
    report = folder.with_name(folder.name + ".json")
    report.unlink(missing_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        code = ckpt_doctor.main([str(folder), "--json", str(report), *more])
    if not report.exists():
        raise RuntimeError(f"{folder}: the doctor ended with {code}")
    (run,) = json.loads(report.read_text())["runs"]
    return Verdict(
        run["verdict"], code, run["findings"], run["onset"]["last_good_step"],
        run["onset"]["first_bad_step"], os.path.basename(run["last_healthy"] or ""),
    )  # fmt: skip


# --- each check switched off ---------------------------------------------------------------------

CONCLUSIONS = ("verdict", "part", "date", "command")


def ablate(folders: Sequence[Path], *more: str) -> None:
    """Print for each check in how many folders what would change if it found nothing."""
    counts = Counter[tuple[str, str]]()
    for changes in in_background([lambda f=f: _changes(f, *more) for f in folders]):
        counts.update((id, what) for id, changed in changes.items() for what in changed)
    head = ("speaks", "alone", *CONCLUSIONS)
    print(
        f"\nwithout a check, of {len(folders)} folders\n      " + " ".join(f"{h:>8}" for h in head)
    )
    for id in ids_in_order():
        print(f"{id:<5} " + " ".join(f"{counts[id, what]:>8}" for what in head))


def _changes(folder: Path, *more: str) -> dict[str, list[str]]:
    """By check that finds anything: what it alone decides; the folder is read once.

    "alone" means that no other check finds anything that is more than information.
    """
    (run,) = ckpt_doctor.read_runs(ckpt_doctor.build_parser().parse_args([str(folder), *more]))
    found = findings_of(run)
    whole, changes = _conclusions(conclude(run, found)), {}
    for id in dict.fromkeys(f.check for f in found):
        rest = [f for f in found if f.check != id]
        less = _conclusions(conclude(run, rest))
        alone = ["alone"] * all(f.level == Level.INFO for f in rest)
        changed = [c for c, a, b in zip(CONCLUSIONS, whole, less, strict=True) if a != b]
        changes[id] = ["speaks", *alone, *changed]
    return changes


def _conclusions(d: Diagnosis) -> tuple[Any, ...]:
    """What CONCLUSIONS names: the part is that of the first sign, or of the worst finding."""
    sign = d.first_sign or max(d.findings, key=lambda f: f.level, default=None)
    return d.verdict, sign and sign.where, d.onset, (d.command, d.remedy)


# --- one file alone ------------------------------------------------------------------------------

SINGLE_QUICK = (
    *("adamw", "muon, depth", "one step", "old", "old, before the first step"),
    *("old at lr 1", "matrices x 30", "a head that drifted", "old: matrices x 30, a head x 1500"),
)


def run_singles(bench: Bench, names: Sequence[str], *, ablated: bool) -> bool:
    """Judge each file with nothing beside it and no data: the worst that a user can have."""
    for data in single_files.DATA:
        single_files.data_at(bench.root, data)
    later = {*single_files.SPOILED, "fine-tuned"}
    bases = {single_files.SPOILED[n][0] for n in names if n in single_files.SPOILED}
    bases |= {"adamw"} if "fine-tuned" in names else set()
    for stage in (sorted({*names, *bases} - later), [n for n in names if n in later]):
        in_background([lambda n=n: single_files.make(bench.root, n) for n in stage])
    folders = [single_files.make(bench.root, n).parent for n in names]
    if ablated:
        ablate(folders, "--no-probe")
        return True
    answers = in_background([lambda f=f: ask(f, "--no-probe") for f in folders])
    called = named = sick = accused = sound = 0
    for name, said in zip(names, answers, strict=True):
        where = single_files.TRUTH[name]
        lost = [f for f in said.findings if f["level"] in ("diverged", "dead")]
        if where is None:
            sound, wrong = sound + 1, said.verdict not in ("HEALTHY", "OVERFITTING")
            accused += wrong
        else:
            is_called = said.verdict in ("DIVERGED", "DEAD")
            is_named = any(f["where"] and where in f"{f['where']} {f['text']}" for f in lost)
            sick, called, named = sick + 1, called + is_called, named + is_named
            wrong = not (is_called and is_named)
        checks = " ".join(dict.fromkeys(f"{f['check']}:{f['where'] or '-'}" for f in lost))
        print(f"{'WRONG' if wrong else 'right'}  {name:<36} {said.verdict:<11} {checks[:90]}")
    print(
        f"\n{called} of {sick} diverged files called DIVERGED or DEAD, the guilty part named in "
        f"{named}; {accused} of {sound} healthy ones accused"
    )
    return called >= 0.95 * sick and named >= 0.8 * sick and not accused


# --- judging -------------------------------------------------------------------------------------


@dataclass
class Score:
    """How one case went."""

    case: Case
    said: Verdict
    found: bool = False
    dated: bool = False
    named: bool = False  # cause and tensor
    resumable: bool = False  # the file that it would go on from is sound
    blamed: int = 0  # sound files with a grave finding
    checks: str = ""  # what found it


def judge(case: Case, said: Verdict) -> Score:
    """Hold what the doctor said against the truth."""
    score, truth = Score(case, said), case.truth
    assert truth is not None
    series = moments(case.folder) if not _unreadable(case) else []
    steps = [step for step, _ in series] or [truth.onset]
    onset = _archive(steps, truth.onset)
    grave = [f for f in said.findings if f["level"] in GRAVE]
    sound = [f for f in grave if f["path"] and Path(f["path"]).name not in truth.bad]
    score.blamed = len({f["path"] for f in sound}) if truth.bad else 0
    hits = [f for f in grave if _touches(f, truth, steps, onset)]
    score.found = said.verdict != "HEALTHY" and said.exit_code != 0 and bool(hits)
    score.named = any(
        f["check"] in truth.causes and truth.where in f"{f['where']} {f['text']}" for f in hits
    )
    if score.found and truth.bad and said.first_bad is None:
        score.dated = any(f["path"] and Path(f["path"]).name in truth.bad for f in grave)
    elif score.found and said.first_bad is not None:
        # Overfitting begins at the best val, which is the last good step.
        dated = said.last_good + 1 if "H4" in truth.causes and said.last_good else said.first_bad
        score.dated = abs(_archive(steps, dated) - onset) <= 1
    score.checks = _summary(hits)
    score.resumable = bool(said.last_healthy) and said.last_healthy not in truth.bad
    return score


def _unreadable(case: Case) -> bool:
    return case.truth is not None and "I1" in case.truth.causes


def _archive(steps: list[int], step: int) -> int:
    """Number of the first archive that holds a step."""
    return bisect.bisect_left(steps, step)


def _touches(finding: dict[str, Any], truth: Truth, steps: list[int], onset: int) -> bool:
    if finding["path"] and truth.bad:
        return Path(finding["path"]).name in truth.bad
    return finding["step"] is None or _archive(steps, finding["step"]) >= onset - 1


def _summary(findings: list[dict[str, Any]]) -> str:
    earliest = sorted(findings, key=lambda f: f["step"] or 0)
    return " ".join(dict.fromkeys(f"{f['check']}:{f['where'] or '-'}" for f in earliest[:4]))


def false_alarms(case: Case, said: Verdict) -> tuple[int, int, list[str]]:
    """Checkpoints of a healthy run, those with a grave finding, and the findings."""
    steps = {p.name: step for step, paths in moments(case.folder) for p in paths}
    grave = [f for f in said.findings if f["level"] in GRAVE]
    accused = {steps[Path(f["path"]).name] for f in grave if f["path"]}
    lines = [f"{case.folder.name} {f['check']} {f['level']} {f['step']} {f['text']}" for f in grave]
    return len(set(steps.values())), len(accused), lines


# --- the table -----------------------------------------------------------------------------------


def print_scores(title: str, scores: list[Score], *, verbose: bool) -> None:
    print(f"\n{title:<36} found  onset  cause  resume  blamed   n")
    for fault in dict.fromkeys(s.case.fault for s in scores):
        of = [s for s in scores if s.case.fault == fault]
        print(
            f"{fault:<36} {sum(s.found for s in of):>5}  {sum(s.dated for s in of):>5}  "
            f"{sum(s.named for s in of):>5}  {sum(s.resumable for s in of):>6}  "
            f"{sum(s.blamed for s in of):>6} {len(of):>3}"
        )
        for s in of:
            if verbose or not (s.found and s.dated):
                print(f"    {s.case.folder.name}: {describe(s)}")
    totals = [sum(getattr(s, n) for s in scores) for n in ("found", "dated", "named", "resumable")]
    print(f"{'in all':<36} " + "  ".join(f"{t:>5}" for t in totals) + f" of {len(scores)}")


def describe(score: Score) -> str:
    truth = score.case.truth
    assert truth is not None
    marks = "".join(
        letter if yes else "-"
        for letter, yes in zip(
            "fdnr", (score.found, score.dated, score.named, score.resumable), strict=True
        )
    )
    return (
        f"{marks} planted at {truth.onset} {truth.where}, said {score.said.verdict} from "
        f"{score.said.first_bad}, by {score.checks or 'nothing'}"
        + (f", {score.blamed} sound files blamed" if score.blamed else "")
    )


def print_healthy(cases: list[Case], answers: list[Verdict]) -> tuple[int, int]:
    files = alarms = runs = 0
    lines: list[str] = []
    for case, said in zip(cases, answers, strict=True):
        count, accused, said_lines = false_alarms(case, said)
        files, alarms, lines = files + count, alarms + accused, lines + said_lines
        runs += said.verdict != "HEALTHY"
    print(
        f"\nhealthy: {alarms} of {files} checkpoints and {runs} of {len(cases)} runs accused "
        f"(checkpoints of different steps)"
    )
    for line in lines:
        print(f"    {line}")
    return files, alarms


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="of each fault")
    parser.add_argument(
        "--quick", action="store_true", help="one seed of eight faults, two healthy runs"
    )
    parser.add_argument("--extra", action="store_true", help="also the faults beyond the list")
    parser.add_argument("--muon", action="store_true", help="train with --optim muon")
    parser.add_argument("--pattern", default="parallel", help="of the runs' models")
    parser.add_argument(
        "--single", action="store_true", help="single files instead of runs' folders"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="FAULT", help="these faults alone")
    parser.add_argument(
        "--ablate", action="store_true", help="what each check decides, instead of the score"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make the runs there, leave them")
    parser.add_argument("--verbose", action="store_true", help="a line for every case")
    flags = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        root = (flags.keep or Path(name)).absolute()
        bench = Bench(root, quick=flags.quick, muon=flags.muon, pattern=flags.pattern)
        every = SINGLE_QUICK if flags.quick else tuple(single_files.TRUTH)
        if flags.single:
            passed = run_singles(bench, flags.only or every, ablated=flags.ablate)
        else:
            passed = run_bench(bench, flags)
    print(f"{time.perf_counter() - started:.0f} s")
    return 0 if passed else 1


def run_bench(bench: Bench, flags: argparse.Namespace) -> bool:
    listed = [*TRAINED, "overfit", *(f for f in FILE_FAULTS if f != "exponent flip")]
    seeds = [0] if flags.quick else list(range(flags.seeds))
    shapes = sorted({s % len(SHAPES) for s in seeds})
    healthy = make_healthy(bench, shapes, () if flags.quick else HEALTHY_EXTRA)
    chosen = flags.only or (QUICK if flags.quick else listed)
    faulty = make_faults(bench, chosen, seeds)
    beyond = []
    if flags.extra:
        extra = [
            *TRAINED_EXTRA,
            "lr 1 without warm-up",
            "exponent flip",
            *FILE_EXTRA,
            *METRICS_FAULTS,
            *(MUON_FAULTS if flags.muon else ()),
        ]
        beyond = make_faults(bench, extra, seeds[:2])
    print(
        f"runs made: {len(healthy)} healthy, {len(faulty) + len(beyond)} with a fault", flush=True
    )
    cases = [*healthy, *faulty, *beyond]
    if flags.ablate:
        ablate([c.folder for c in cases])
        return True
    answers = in_background([lambda c=c: ask(c.folder) for c in cases])
    files, alarms = print_healthy(healthy, answers[: len(healthy)])
    scores = [judge(c, a) for c, a in zip(faulty, answers[len(healthy) :], strict=False)]
    print_scores("planted faults of the list", scores, verbose=flags.verbose)
    if beyond:
        others = answers[len(healthy) + len(faulty) :]
        more = [judge(c, a) for c, a in zip(beyond, others, strict=True)]
        print_scores("beyond the list", more, verbose=True)
    n = len(scores)
    found, dated = sum(s.found for s in scores), sum(s.dated for s in scores)
    allowed = math.ceil(files / 50)
    passed = found >= 0.95 * n and dated >= 0.9 * n and alarms <= allowed
    print(
        f"\n{found} of {n} found (at least {math.ceil(0.95 * n)}), {dated} dated within one "
        f"archive ({math.ceil(0.9 * n)}), {alarms} false alarms in {files} healthy checkpoints "
        f"({allowed} at most): {'passed' if passed else 'FAILED'}"
    )
    return passed


if __name__ == "__main__":
    sys.exit(main())
