"""Val over training seconds: variants of the recipe and a plain GPT, at equal time and shape.

    python benchmarks/learning.py --variants default,plain --seconds 600 --seeds 2
    python benchmarks/learning.py --variants all --extra "lr-5e-4=--lr 5e-4" --out lr_runs
    python benchmarks/learning.py --from lr_runs/learning.json      # table and picture again

Each variant is `train_rvq.py` as a process with flags that differ from the default in one thing;
`plain` is `plain_gpt.py` at each of `--plain-lrs`, of which the best counts. Runs go one at a time,
all variants of a seed in turn. Every run is kept in `learning.json` in `--out` as soon as it ends:
the same command goes on where it was cut, and one with more seeds or variants adds to it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from npq_dataset import find_npq_files  # noqa: E402

VARIANTS: dict[str, tuple[str, str]] = {
    "default": ("", "what ships"),
    "adamw": ("--optim adamw --lr 1e-3", "no Muon; at plain's best learning rate"),
    "lr-5e-5": ("--lr 5e-5", "a quarter of the peak learning rate"),
    "lr-1e-3": ("--lr 1e-3", "five times the peak learning rate"),
    "parallel": ("--pattern parallel", "codes of a frame independent of each other"),
    "delay": ("--pattern delay", "codebook k lags k frames"),
    "depth": ("--pattern depth", "a transformer over the codes of a frame"),
    "depth-share-0.25": ("--pattern depth --depth-share 0.25", "its loss on fewer frames"),
    "depth-share-1": ("--pattern depth --depth-share 1", "its loss on all frames"),
    "no-jitter": ("--no-jitter", "the same windows in each epoch"),
    "code-dropout-0.1": ("--code-dropout 0.1", "a tenth of the input codes hidden"),
    "wsd": ("--schedule wsd", "stable, then a cooldown over the last fifth"),
    "warmup-0.05": ("--warmup-ratio 0.05", "longer rise of the learning rate"),
    "decay-0.1": ("--weight-decay 0.1", "stronger weight decay"),
    "ctx-128": ("--ctx 128 --batch 16", "as many frames a step; val over shorter windows"),
    "ctx-512": ("--ctx 512 --batch 4", "as many frames a step; val over longer windows"),
    "batch-16": ("--batch 16", "half the steps, of twice the frames"),
    "batch-4": ("--batch 4", "twice the steps, of half the frames"),
    "dropout-0": ("--dropout 0", "without dropout"),
    "dropout-0.3": ("--dropout 0.3", "more dropout"),
    "smoothing-0": ("--label-smoothing 0", "without label smoothing"),
    "even-weights": ("--cb-weights-auto-alpha 0", "all codebooks weigh the same"),
    "ema-0.99": ("--ema 0.99", "average over some 100 steps"),
    "ema-0.9999": ("--ema 0.9999", "average over some 10,000 steps"),
}
PLAIN = "plain"  # and the learning rate behind it: plain-1e-3


@dataclass(frozen=True)
class Setup:
    """What all runs share."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    seconds: float
    evals: int
    d_model: int
    layers: int
    heads: int
    ctx: int
    batch: int


class Job(NamedTuple):
    """A run to be made: the function takes a folder for the run's files."""

    variant: str
    seed: int
    flags: str
    make: Callable[[Path], dict[str, Any]]


class RunFailed(RuntimeError):
    """A process ended badly; the message is the end of its output."""


# --- one run -------------------------------------------------------------------------------------


def train(setup: Setup, flags: str, seed: int, folder: Path) -> dict[str, Any]:
    """The trainer as a process: validations, parameters, steps, frames per second."""
    folder.mkdir(parents=True, exist_ok=True)
    val_list = folder / "val.txt"
    val_list.write_text("".join(f"{os.path.abspath(f)}\n" for f in find_npq_files(setup.val)))
    output = run_process(
        *(ROOT / "train_rvq.py", "--data", *setup.train, *setup.val, "--val-list", val_list),
        *("--device", "cpu", "--d_model", setup.d_model, "--layers", setup.layers),
        *("--heads", setup.heads, "--ctx", setup.ctx, "--batch", setup.batch, "--accum", 1),
        *("--max-seconds", setup.seconds, "--epochs", 100_000),
        *("--val-every-seconds", setup.seconds / setup.evals, "--eval-audio-every", 0),
        *("--archive-every", 0, "--seed", seed, "--save_dir", folder, *shlex.split(flags)),
    )
    (metrics,) = folder.glob("*_metrics.jsonl")
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    used = next(e["flags"] for e in events if e["event"] == "start")
    rows = [row_of(e, e["val_per_codebook"]) for e in events if e["event"] == "epoch"]
    frames = rows[-1]["step"] * used["batch"] * used["accum"] * used["ctx"]
    return {
        "params_m": float(re.findall(r"([\d.]+) M parameters", output)[0]),
        "steps": rows[-1]["step"],
        "frames_per_s": round(frames / rows[-1]["seconds"]),
        "refused": sum(e["event"] == "skip" for e in events),
        "rows": rows,
    }


def train_plain(setup: Setup, lr: str, seed: int, _: Path) -> dict[str, Any]:
    """The yardstick as a process, on the same windows; it writes no files."""
    output = run_process(
        *(ROOT / "benchmarks" / "plain_gpt.py", "--train", *find_npq_files(setup.train)),
        *("--val", *find_npq_files(setup.val), "--d", setup.d_model, "--layers", setup.layers),
        *("--heads", setup.heads, "--ctx", setup.ctx, "--batch", setup.batch, "--lr", lr),
        *("--seconds", setup.seconds, "--evals", setup.evals, "--seed", seed),
    )
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    last = events[-1]
    return {
        "params_m": last["params_m"],
        "steps": last["step"],
        "frames_per_s": last["frames_per_s"],
        "refused": 0,
        "rows": [row_of(e, e["per_codebook"]) for e in events],
    }


def row_of(event: dict[str, Any], ce: list[float]) -> dict[str, Any]:
    """A validation: training seconds, step, nats per code."""
    kept = {name: event[name] for name in ("seconds", "step", "val")}
    return {**kept, "ce": [None if x is None else round(x, 4) for x in ce]}


def run_process(*words: object) -> str:
    """Standard output of a script of the project and its flags; raises RunFailed."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunFailed("\n".join((done.stdout + done.stderr).strip().splitlines()[-12:]))
    return done.stdout


# --- all runs ------------------------------------------------------------------------------------


def measure(file: Path, setup: Setup, jobs: Sequence[Job]) -> list[str]:
    """Make the runs that the file does not hold, and add each to it; returns what failed."""
    runs, failed = kept_runs(file, setup), []
    for i, job in enumerate(jobs, 1):
        key = (job.variant, job.seed)
        known = next((r for r in runs if (r["variant"], r["seed"]) == key), None)
        if known is None:
            print(f"[{i}/{len(jobs)}] {job.variant}, seed {job.seed} {job.flags}", flush=True)
            started, load = time.time(), round(os.getloadavg()[0], 2)
            try:
                with tempfile.TemporaryDirectory() as folder:
                    found = job.make(Path(folder))
            except RunFailed as error:
                print(f"! failed:\n{error}", file=sys.stderr)
                last = str(error).splitlines()[-1]
                failed.append(f"{job.variant}, seed {job.seed}: {last}")
                continue
            known = {"variant": job.variant, "seed": job.seed, "flags": job.flags, **found}
            known |= {"commit": commit(), "load": load, "wall_s": round(time.time() - started)}
            runs.append(known)
            write(file, {"setup": asdict(setup), "runs": runs})
        elif known["flags"] != job.flags:
            raise SystemExit(
                f"{file}: {job.variant} was run with {known['flags']!r}, now asked with "
                f"{job.flags!r}; give it another name or another --out"
            )
        print("\n".join(run_lines(known)), flush=True)
    return failed


def kept_runs(file: Path, setup: Setup) -> list[dict[str, Any]]:
    """Runs of an earlier start, which must have been of the same data, shape and seconds."""
    if not file.exists():
        return []
    kept = json.loads(file.read_text())
    asked = json.loads(json.dumps(asdict(setup)))
    if differing := [n for n, value in asked.items() if kept["setup"].get(n) != value]:
        said = ", ".join(f"{n} {kept['setup'].get(n)} and not {asked[n]}" for n in differing)
        raise SystemExit(f"{file} holds runs of {said}; give another --out")
    return list(kept["runs"])


def write(file: Path, content: dict[str, Any]) -> None:
    """Replace the file at once, so that a kill leaves the old one or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1))
    part.replace(file)


def commit() -> str:
    """Of the code that ran, with a mark if it was changed since."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def run_lines(run: dict[str, Any]) -> list[str]:
    """A run's figures, and a line for each of its validations."""
    head = (
        f"{run['variant']}, seed {run['seed']}: {run['params_m']:.2f} M parameters, "
        f"{run['steps']} steps, {run['refused']} refused, {run['frames_per_s']} frames/s"
    )
    if "wall_s" in run:
        head += f", {run['wall_s']} s in all, load {run['load']} before"
    columns = "  seconds     val  " + " ".join(f"{f'k{k}':>6}" for k in range(len(ce_end(run))))
    return [head, columns] + [
        f"  {row['seconds']:7.1f}  {shown(row['val'])}  " + " ".join(map(shown, row["ce"]))
        for row in run["rows"]
    ]


def shown(value: float | None) -> str:
    """Six characters; a value that was not finite is None."""
    return f"{value:6.3f}" if value is not None else "   n/a"


# --- what the runs say ---------------------------------------------------------------------------


def time_to_reach(rows: Iterable[dict[str, Any]], target: float) -> float | None:
    """Training seconds until val is at most the target, linear between validations; or None.

    A run that is there at its first validation gets that one's time: at most so long.
    """
    before = None
    for row in rows:
        if row["val"] is None:
            continue
        if row["val"] <= target:
            if before is None:
                return float(row["seconds"])
            share = (before["val"] - target) / (before["val"] - row["val"])
            return float(before["seconds"] + share * (row["seconds"] - before["seconds"]))
        before = row
    return None


def final_val(run: dict[str, Any]) -> float:
    """At the end of the run; infinity where it was not finite, so that it is never the best."""
    val = run["rows"][-1]["val"]
    return float("inf") if val is None else float(val)


def ce_end(run: dict[str, Any]) -> list[float]:
    """Cross-entropy of each codebook at the end, nats."""
    return list(run["rows"][-1]["ce"])


def by_variant(runs: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs of each variant, best mean of final vals first."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda r: r["seed"]):
        grouped.setdefault(run["variant"], []).append(run)
    return dict(sorted(grouped.items(), key=lambda item: statistics.mean(map(final_val, item[1]))))


def best_of(grouped: dict[str, list[dict[str, Any]]], family: str) -> str | None:
    """The best variant that is the family or is called after it: plain-1e-3 for plain."""
    return next((n for n in grouped if n == family or n.startswith(f"{family}-")), None)


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """`mean (min to max)`, or the value alone."""
    mean = format(statistics.mean(values), form)
    low, high = format(min(values), form), format(max(values), form)
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def table(
    runs: Sequence[dict[str, Any]], seconds: float, *, base: str, yardstick: str
) -> list[str]:
    """Markdown: a row for each variant; differences from `base` are taken seed by seed."""
    grouped = by_variant(runs)
    measured_by = best_of(grouped, yardstick)
    target = statistics.mean(map(final_val, grouped[measured_by])) if measured_by else None
    base_of = {run["seed"]: final_val(run) for run in grouped.get(base, [])}
    reach = f"reaches {measured_by}'s end" + (f" ({target:.3f})" if target is not None else "")
    lines = [
        f"| variant | flags | M params | frames/s | final val | minus {base} | n | {reach} |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in grouped.items():
        pairs = [final_val(r) - base_of[r["seed"]] for r in found if r["seed"] in base_of]
        cells = [
            f"**{name}**" if name in (base, measured_by) else name,
            f"`{found[0]['flags']}`" if found[0]["flags"] else "",
            f"{found[0]['params_m']:.2f}",
            f"{statistics.mean(r['frames_per_s'] for r in found):,.0f}",
            spread([final_val(r) for r in found]),
            spread(pairs, "+.3f") if pairs and name != base else "",
            str(len(found)),
            reached(found, target, seconds) if target is not None else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def reached(found: Sequence[dict[str, Any]], target: float, seconds: float) -> str:
    """Time to reach the target as a share of the budget; how many do not reach it."""
    times = [time_to_reach(run["rows"], target) for run in found]
    shares = [100 * t / seconds for t in times if t is not None]
    missed = f"{len(times) - len(shares)} of {len(times)} never"
    if not shares:
        return missed
    return f"{spread(shares, '.0f')} %" + (f", {missed}" if len(shares) < len(times) else "")


def codebook_table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: final CE of each codebook, means over seeds."""
    grouped = by_variant(runs)
    count = max(len(ce_end(run)) for run in runs)
    lines = [f"| variant | {' | '.join(f'k{k}' for k in range(count))} |"]
    lines.append("|---" + "|---:" * count + "|")
    for name, found in grouped.items():
        means = np.array([ce_end(run) for run in found], dtype=float).mean(axis=0)
        lines.append(f"| {name} | {' | '.join(f'{x:.3f}' for x in means)} |")
    return lines


# --- the picture ---------------------------------------------------------------------------------


def draw(
    path: Path, runs: Sequence[dict[str, Any]], seconds: float, *, base: str, yardstick: str
) -> None:
    """Val over training seconds, mean and range over seeds, and below it CE of each codebook."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    grouped = by_variant(runs)
    measured_by = best_of(grouped, yardstick)
    rest = (n for n in grouped if n not in (base, measured_by))
    looks = {n: (f"C{i % 10}", "-" if i < 10 else "-.") for i, n in enumerate(rest, 1)}
    looks |= {base: ("C0", "-")} | ({measured_by: ("black", "--")} if measured_by else {})
    count = max(len(ce_end(run)) for run in runs)
    small_rows = -(-count // 3)
    figure = plt.figure(figsize=(11, 4.6 + 2.1 * small_rows), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[4.6, 2.1 * small_rows])
    upper, lower = halves
    axes = upper.subplots()
    for name, found in grouped.items():
        end = statistics.mean(map(final_val, found))
        label = f"{name}  {end:.3f}" + (f"  n = {len(found)}" if len(found) > 1 else "")
        curve(axes, found, None, *looks[name], label, name == base)
    axes.set(xlabel="training seconds", ylabel="val, nats per code", xlim=(0, 1.01 * seconds))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, title="final val")
    small = lower.subplots(small_rows, 3, sharex=True, squeeze=False).flatten()
    for k, panel in enumerate(small):
        panel.set_visible(k < count)
        for name, found in grouped.items() if k < count else ():
            curve(panel, found, k, *looks[name], name, name == base)
        panel.set_title(f"codebook {k}", fontsize=9)
        panel.set_xlim(0, 1.01 * seconds)
    lower.supxlabel("training seconds", fontsize=9)
    lower.supylabel("CE on validation, nats", fontsize=9)
    for panel in (axes, *small):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curve(
    axes: Any,
    found: Sequence[dict[str, Any]],
    k: int | None,
    colour: str,
    style: str,
    label: str,
    bold: bool,
) -> None:
    """Val, or CE of codebook k: mean over seeds, range shaded, at the first seed's seconds."""
    some = [
        [(r["seconds"], r["val"] if k is None else r["ce"][k]) for r in run["rows"]]
        for run in found
    ]
    curves = [np.array(points, dtype=float).T for points in some]
    x = curves[0][0]
    y = np.array([np.interp(x, seconds, values) for seconds, values in curves])
    width = 2.2 if bold or style == "--" else 1.2
    axes.plot(x, y.mean(axis=0), color=colour, linestyle=style, linewidth=width, label=label)
    axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.15, linewidth=0)


# --- main ----------------------------------------------------------------------------------------


def report(file: Path, *, base: str, yardstick: str, only: Sequence[str] = ()) -> None:
    """Tables on standard output and a picture beside the file of runs."""
    kept = json.loads(file.read_text())
    runs = [r for r in kept["runs"] if not only or r["variant"] in only]
    if not runs:
        raise SystemExit(f"{file}: no run of {', '.join(only) or 'any variant'}")
    setup = kept["setup"]
    shape = "{d_model} wide, {layers} layers, {heads} heads, ctx {ctx}, batch {batch}"
    commits = ", ".join(sorted({run["commit"] for run in runs}))
    print(f"\n{setup['seconds']:g} training seconds, {shape.format(**setup)}, commit {commits}\n")
    print("\n".join(table(runs, setup["seconds"], base=base, yardstick=yardstick)))
    print("\nCE of each codebook at the end:\n")
    print("\n".join(codebook_table(runs)))
    picture = file.with_suffix(".png")
    draw(picture, runs, setup["seconds"], base=base, yardstick=yardstick)
    print(f"\nruns in {file}, picture in {picture}")


def jobs_of(
    setup: Setup, variants: dict[str, str], lrs: Sequence[str], seeds: Iterable[int]
) -> list[Job]:
    """Runs in turn: all variants of a seed, then the next seed."""
    jobs = []
    for seed in seeds:
        for name, flags in variants.items():
            if name == PLAIN:
                for lr in lrs:
                    make = functools.partial(train_plain, setup, lr, seed)
                    jobs.append(Job(f"{PLAIN}-{lr}", seed, f"--lr {lr}", make))
            else:
                jobs.append(Job(name, seed, flags, functools.partial(train, setup, flags, seed)))
    return jobs


def named_flags(text: str) -> tuple[str, str]:
    """`NAME=FLAGS` in its two parts."""
    name, equals, flags = text.partition("=")
    if not name or not equals or name.startswith("-"):
        raise argparse.ArgumentTypeError(f"expected NAME=FLAGS, found {text!r}")
    return name, flags


def add_setup_flags(parser: argparse.ArgumentParser, *, ctx: int, batch: int) -> None:
    """Data, shape and budget, as in every benchmark of learning."""
    tokens = ROOT / "examples" / "tokens"
    add = parser.add_argument
    add("--data", nargs="+", default=[str(tokens / "train")], help="folders, globs or .npq files")
    add("--val", nargs="+", default=[str(tokens / "val")], help="the same, to validate on")
    add("--seconds", type=float, default=600, help="of training; validations do not count")
    add("--seeds", type=int, default=2, help="seeds 0, 1, ... of each variant")
    add("--evals", type=int, default=10, help="validations of a run")
    add("--d_model", type=int, default=256)
    add("--layers", type=int, default=6)
    add("--heads", type=int, default=8)
    add("--ctx", type=int, default=ctx)
    add("--batch", type=int, default=batch)
    add("--from", dest="file", type=Path, help="only the table and picture of this file of runs")


def setup_of(flags: argparse.Namespace) -> Setup:
    """The part of the flags that all runs share."""
    return Setup(
        train=tuple(flags.data), val=tuple(flags.val), seconds=flags.seconds, evals=flags.evals,
        d_model=flags.d_model, layers=flags.layers, heads=flags.heads, ctx=flags.ctx,
        batch=flags.batch,
    )  # fmt: skip


def main() -> int:
    """Run, print, draw; 1 where a run failed."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="variants: " + "; ".join(f"{n} ({f or why})" for n, (f, why) in VARIANTS.items()),
    )
    add_setup_flags(parser, ctx=256, batch=8)
    parser.add_argument("--variants", help="comma list, or all; without it default,plain")
    parser.add_argument("--extra", nargs="+", type=named_flags, default=[], metavar="NAME=FLAGS")
    parser.add_argument("--plain-lrs", nargs="+", default=["3e-4", "1e-3", "2e-3"])
    parser.add_argument("--out", type=Path, default=Path("learning_runs"))
    flags = parser.parse_args()
    sides = {"base": "default", "yardstick": PLAIN}
    if flags.file:
        report(flags.file, **sides, only=flags.variants.split(",") if flags.variants else ())
        return 0
    known = {PLAIN: ""} | {name: words for name, (words, _) in VARIANTS.items()}
    chosen = flags.variants or f"default,{PLAIN}"
    names = list(known) if chosen == "all" else chosen.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--variants: no {', '.join(unknown)}; there are {', '.join(known)}")
    variants = {name: known[name] for name in names} | dict(flags.extra)
    setup, file = setup_of(flags), flags.out / "learning.json"
    jobs = jobs_of(setup, variants, flags.plain_lrs, range(flags.seeds))
    failed = measure(file, setup, jobs)
    if file.exists():
        report(file, **sides)
    for text in failed:
        print(f"\n! failed: {text}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
