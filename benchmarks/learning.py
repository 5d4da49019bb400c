"""Where val stops falling and what moves it: variants of the recipe over passes, at equal steps.

    python benchmarks/learning.py --regime user                      # the default, three seeds
    python benchmarks/learning.py --regime album --variants default,decay-0.2,plain --seeds 0
    python benchmarks/learning.py --regime user --extra "mine=--weight-decay 0.3 --dropout 0.2"
    python benchmarks/learning.py --from learning_runs/user          # tables and picture again

A regime is a size of corpus, a shape, and a number of passes (each training frame seen once).
A variant is `train_rvq.py` as a process with flags that differ from the default in one thing;
`plain` is `plain_gpt.py` at `--plain-lr`. Steps are equal, so a busy machine changes no value.
Each run has a folder in `--out`: the same command goes on where it was cut, one with more seeds or
variants adds to it, and two commands with different `--seeds` share the work of two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from npq_dataset import find_npq_files  # noqa: E402
from sound.corpus import SHIFTED  # noqa: E402
from sound.npq_format import read_header  # noqa: E402


class Regime(NamedTuple):
    """Frames of training music (None: all there is), shape, passes over the music."""

    frames: int | None
    d_model: int
    layers: int
    heads: int
    passes: float
    flags: str = ""


REGIMES = {
    "user": Regime(243_000, 128, 4, 4, 60),  # 0.7 codes a parameter, as 20 hours for 131 M
    "user-240": Regime(243_000, 128, 4, 4, 240),
    "album": Regime(49_000, 256, 6, 8, 60),  # 0.05 codes a parameter: a first album
    "few": Regime(None, 256, 6, 8, 12, "--lr 1e-3"),
}
VARIANTS = {
    "default": "",
    "decay-0.1": "--weight-decay 0.1 --decay-all",
    "decay-0.2": "--weight-decay 0.2 --decay-all",
    "decay-0.5": "--weight-decay 0.5 --decay-all",
    "decay-0.1-hidden-0.2": "--weight-decay 0.1 --decay-all --code-dropout 0.2",
    "decay-0.2-hidden-0.1": "--weight-decay 0.2 --decay-all --code-dropout 0.1",
    "decay-0.3-dropout-0.2": "--weight-decay 0.3 --decay-all --dropout 0.2",
    "smoothing-0.1": "--label-smoothing 0.1",
    "dropout-0.2": "--dropout 0.2",
    "no-code-vectors": "--no-code-vectors",
    "depth-dropout-0.2": "--depth-dropout 0.2",
    "hidden-0.1": "--code-dropout 0.1",
    "even-weights": "--cb-weights-auto-alpha 0",
    "weights-0.3": "--cb-weights-auto-alpha 0.3",
    "weights-0.7": "--cb-weights-auto-alpha 0.7",
    "no-jitter": "--no-jitter",
    "ema-0.99": "--ema 0.99",
    "ema-0.9999": "--ema 0.9999",
    "adamw": "--optim adamw --lr 1e-3",
    "wsd": "--schedule wsd",
    "parallel": "--pattern parallel",
    "delay": "--pattern delay",
    "depth-share-0.125": "--depth-share 0.125",
    "depth-share-0.25": "--depth-share 0.25",
    "depth-share-1": "--depth-share 1",
}
PLAIN = "plain"


@dataclass(frozen=True)
class Setup:
    """What all runs of a folder share."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    frames: int  # of training music
    codebooks: int
    steps: int
    ctx: int
    batch: int
    d_model: int
    layers: int
    heads: int
    flags: str

    def passes(self, step: int) -> float:
        """Times that each training frame was seen, on the average."""
        return step * self.batch * self.ctx / self.frames


class Curve(NamedTuple):
    """A run's validations: step, val, train, CE per codebook; parameters and seconds a step."""

    variant: str
    seed: int
    flags: str
    rows: list[dict[str, Any]]
    parameters: float
    seconds_a_step: float

    @property
    def lowest(self) -> dict[str, Any]:
        """The validation with the lowest val; one that was not finite never is."""
        return min(self.rows, key=lambda row: np.inf if row["val"] is None else row["val"])

    @property
    def last(self) -> dict[str, Any]:
        """The validation at the end."""
        return self.rows[-1]


class RunFailed(RuntimeError):
    """A process ended badly; the message is the end of its output."""


# --- runs ----------------------------------------------------------------------------------------


def commands(setup: Setup, folder: Path, flags: str, seed: int) -> list[str]:
    """The trainer's own command: it goes on by itself where an earlier start was cut."""
    val_list = folder / "val.txt"
    val_list.write_text("".join(f"{path}\n" for path in setup.val))
    words = [ROOT / "train_rvq.py", "--data", *setup.train, *setup.val, "--val-list", val_list]
    words += ["--device", "cpu", "--d_model", setup.d_model, "--layers", setup.layers]
    words += ["--heads", setup.heads, "--ctx", setup.ctx, "--batch", setup.batch, "--accum", 1]
    words += ["--epochs", 10**6, "--max-steps", setup.steps, "--eval-audio-every", 0]
    words += ["--archive-every", 0, "--no-report", "--seed", seed, "--save_dir", folder]
    return [str(word) for word in (*words, *shlex.split(setup.flags), *shlex.split(flags))]


def plain_command(setup: Setup, lr: str, seed: int) -> list[str]:
    """The yardstick on the same windows; it starts anew where it was cut."""
    words = [ROOT / "benchmarks" / "plain_gpt.py", "--train", *setup.train, "--val", *setup.val]
    words += ["--d", setup.d_model, "--layers", setup.layers, "--heads", setup.heads]
    words += ["--ctx", setup.ctx, "--batch", setup.batch, "--lr", lr, "--seed", seed]
    words += ["--seconds", 0, "--max-steps", setup.steps, "--evals", 30]
    return [str(word) for word in words]


def run(setup: Setup, out: Path, variant: str, flags: str, seed: int) -> None:
    """Make or finish one run in its folder; raises RunFailed."""
    folder = out / f"{variant}-s{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    about = {"variant": variant, "seed": seed, "flags": flags}
    keep_or_compare(folder / "about.json", about)
    if finished(setup, folder):
        return
    is_plain = variant == PLAIN
    words = plain_command(setup, flags, seed) if is_plain else commands(setup, folder, flags, seed)
    log = folder / "output.txt"
    with log.open("w") as output:
        done = subprocess.run([sys.executable, *words], stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RunFailed("\n".join(log.read_text().strip().splitlines()[-8:]))
    if is_plain:
        log.replace(folder / "plain.jsonl")


def keep_or_compare(file: Path, content: dict[str, Any]) -> None:
    """Runs of other data, shape, steps or flags must not be taken for these."""
    content = json.loads(json.dumps(content))
    kept = json.loads(file.read_text()) if file.exists() else content
    if differing := [name for name, value in content.items() if kept.get(name) != value]:
        said = ", ".join(f"{n} {kept.get(n)} and not {content[n]}" for n in differing)
        raise SystemExit(f"{file} is of runs with {said}; give another name or another --out")
    file.write_text(json.dumps(content, indent=1))


def finished(setup: Setup, folder: Path) -> bool:
    """Whether the run has validated its last step."""
    rows = rows_of(folder)
    return bool(rows) and rows[-1]["step"] >= setup.steps


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Validations of a run in order; a step that was taken again after a cut counts once."""
    rows: dict[int, dict[str, Any]] = {}
    for file in (*folder.glob("*_metrics.jsonl"), *folder.glob("plain.jsonl")):
        for line in file.read_text().splitlines():
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("event", "epoch") == "epoch" and event.get("val") is not None:
                rows = {step: row for step, row in rows.items() if step < event["step"]}
                rows[event["step"]] = {
                    "step": event["step"],
                    "val": event["val"],
                    "train": event.get("train_ce"),  # plain's is smoothed
                    "seconds": event["seconds"],
                    "ce": event.get("val_per_codebook") or event["per_codebook"],
                }
    return list(rows.values())


def curve_of(folder: Path) -> Curve | None:
    """What the run in a folder came to; None where it has not validated yet."""
    rows, about = rows_of(folder), json.loads((folder / "about.json").read_text())
    if not rows:
        return None
    texts = [f.read_text() for n in ("output.txt", "plain.jsonl") if (f := folder / n).exists()]
    pattern = r'([\d.]+) M parameters|"params_m": ([\d.]+)'
    found = re.search(pattern, "\n".join(texts))
    millions = float(found[1] or found[2]) if found else float("nan")
    last = rows[-1]
    name = f"{PLAIN} {about['flags']}" if about["variant"] == PLAIN else about["variant"]
    flags = "" if about["variant"] == PLAIN else about["flags"]
    return Curve(name, about["seed"], flags, rows, 1e6 * millions, last["seconds"] / last["step"])


# --- what the runs say ---------------------------------------------------------------------------


def by_variant(curves: Iterable[Curve]) -> dict[str, list[Curve]]:
    """Runs of each variant, best mean of lowest vals first."""
    grouped: dict[str, list[Curve]] = {}
    for curve in sorted(curves, key=lambda c: c.seed):
        grouped.setdefault(curve.variant, []).append(curve)
    return dict(
        sorted(grouped.items(), key=lambda i: statistics.mean(c.lowest["val"] for c in i[1]))
    )


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """`mean (min to max)`, or the value alone."""
    mean = format(statistics.mean(values), form)
    low, high = format(min(values), form), format(max(values), form)
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def table(setup: Setup, curves: Sequence[Curve]) -> list[str]:
    """Markdown: a row for each variant; differences from the default are taken seed by seed."""
    grouped = by_variant(curves)
    base = {c.seed: c.lowest["val"] for c in grouped.get("default", [])}
    lines = [
        "| variant | flags | codes a parameter | lowest val | after passes | minus default "
        "| last val | train at the end | gap | passes | ms a step | n |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in grouped.items():
        pairs = [c.lowest["val"] - base[c.seed] for c in found if c.seed in base]
        train = [c.last["train"] for c in found if c.last["train"] is not None]
        gaps = [c.last["val"] - c.last["train"] for c in found if c.last["train"] is not None]
        cells = [
            f"**{name}**" if name == "default" else name,
            f"`{found[0].flags}`" if found[0].flags else "",
            f"{setup.frames * setup.codebooks / found[0].parameters:.2f}",
            spread([c.lowest["val"] for c in found]),
            spread([setup.passes(c.lowest["step"]) for c in found], ".0f"),
            spread(pairs, "+.3f") if pairs and name != "default" else "",
            spread([c.last["val"] for c in found]),
            spread(train) if train else "",
            spread(gaps) if gaps else "",
            spread([setup.passes(c.last["step"]) for c in found], ".0f"),
            f"{statistics.mean(1000 * c.seconds_a_step for c in found):.0f}",
            str(len(found)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def reach_lines(setup: Setup, curves: Sequence[Curve]) -> list[str]:
    """When each variant passes the lowest val of the plain GPT, in its own and plain's terms."""
    grouped = by_variant(curves)
    plain = next((found for name, found in grouped.items() if name.startswith(PLAIN)), None)
    if plain is None:
        return []
    target = statistics.mean(c.lowest["val"] for c in plain)
    steps = statistics.mean(c.lowest["step"] for c in plain)
    seconds = steps * statistics.mean(c.seconds_a_step for c in plain)
    lines = [f"plain's lowest val, {target:.3f}, took {steps:.0f} steps, {seconds:.0f} s"]
    for name, found in grouped.items():
        if found is not plain:
            times = [next((r for r in c.rows if r["val"] <= target), None) for c in found]
            reached = [row for row in times if row is not None]
            said = (
                "never"
                if not reached
                else (
                    f"{statistics.mean(r['step'] for r in reached):.0f} steps, "
                    f"{statistics.mean(r['seconds'] for r in reached):.0f} s"
                )
            )
            lines.append(f"  {name}: {said}, {len(reached)} of {len(times)} runs")
    return lines


def codebook_table(curves: Sequence[Curve]) -> list[str]:
    """Markdown: CE of each codebook where val is lowest, means over seeds."""
    grouped = by_variant(curves)
    count = len(curves[0].lowest["ce"])
    lines = [f"| variant | {' | '.join(f'k{k}' for k in range(count))} |"]
    lines.append("|---" + "|---:" * count + "|")
    for name, found in grouped.items():
        means = np.array([c.lowest["ce"] for c in found], dtype=float).mean(axis=0)
        lines.append(f"| {name} | {' | '.join(f'{x:.3f}' for x in means)} |")
    return lines


def draw(path: Path, setup: Setup, curves: Sequence[Curve]) -> None:
    """Val (full) and train (dashed) over passes: means over seeds, the range of val shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 6), layout="constrained")
    for i, (name, found) in enumerate(by_variant(curves).items()):
        shared = sorted(set.intersection(*({r["step"] for r in c.rows} for c in found)))
        rows = [{r["step"]: r for r in c.rows} for c in found]
        x = [setup.passes(step) for step in shared]
        y = np.array([[of[step]["val"] for step in shared] for of in rows], dtype=float)
        look: dict[str, Any] = {"color": f"C{i % 10}", "linewidth": 2 if name == "default" else 1.2}
        label = f"{name}  {statistics.mean(c.lowest['val'] for c in found):.3f}"
        axes.plot(x, y.mean(0), label=label + f"  n = {len(found)}" * (len(found) > 1), **look)
        axes.fill_between(x, y.min(0), y.max(0), color=look["color"], alpha=0.15, linewidth=0)
        train = [[of[step]["train"] or np.nan for step in shared] for of in rows]
        axes.plot(x, np.mean(train, axis=0), linestyle="--", **look)
    axes.set(xlabel="passes over the music", ylabel="nats per code: val, train dashed")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, title="lowest val")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(out: Path, only: Sequence[str] = ()) -> None:
    """Tables on standard output and a picture beside the runs."""
    kept = json.loads((out / "setup.json").read_text())
    setup = Setup(**{**kept, "train": tuple(kept["train"]), "val": tuple(kept["val"])})
    folders = sorted(file.parent for file in out.glob("*/about.json"))
    curves = [curve for folder in folders if (curve := curve_of(folder))]
    curves = [c for c in curves if not only or c.variant.split()[0] in only]
    if not curves:
        raise SystemExit(f"{out}: no run of {', '.join(only) or 'any variant'} has validated")
    print(
        f"\n{setup.frames:,} frames, {setup.steps} steps are {setup.passes(setup.steps):.0f} "
        f"passes; {setup.d_model} wide, {setup.layers} layers, {setup.heads} heads, ctx "
        f"{setup.ctx}, batch {setup.batch} {setup.flags}\n"
    )
    print("\n".join(table(setup, curves)))
    print("\n" + "\n".join(reach_lines(setup, curves)))
    print("\nCE of each codebook where val is lowest:\n")
    print("\n".join(codebook_table(curves)))
    draw(out / "learning.png", setup, curves)
    print(f"\nruns in {out}, picture in {out / 'learning.png'}")


# --- main ----------------------------------------------------------------------------------------


def choose(files: Sequence[str], wanted: int | None) -> tuple[tuple[str, ...], int]:
    """Whole files from the beginning of the sorted list until there are as many frames.

    Shifted encodings come behind the file that they are of, and count with it.
    """
    chosen: list[str] = []
    frames = 0
    for path in sorted(files):
        is_shifted = bool(SHIFTED.fullmatch(path))
        if wanted is not None and frames >= wanted and not is_shifted:
            break
        chosen.append(os.path.abspath(path))
        frames += 0 if is_shifted else read_header(path).num_frames
    if wanted is not None and frames < wanted:
        print(f"! {frames:,} frames of the wanted {wanted:,}: fewer codes a parameter")
    return tuple(chosen), frames


def setup_of(flags: argparse.Namespace) -> Setup:
    """The part of the flags that all runs share."""
    regime = REGIMES[flags.regime]
    train, frames = choose(find_npq_files(flags.data), flags.frames or regime.frames)
    passes = flags.passes or regime.passes
    return Setup(
        train=train,
        val=tuple(map(os.path.abspath, sorted(find_npq_files(flags.val)))),
        frames=frames,
        codebooks=read_header(train[0]).num_codebooks,
        steps=flags.steps or round(passes * frames / (flags.ctx * flags.batch)),
        ctx=flags.ctx,
        batch=flags.batch,
        d_model=flags.d_model or regime.d_model,
        layers=flags.layers or regime.layers,
        heads=flags.heads or regime.heads,
        flags=regime.flags,
    )


def named_flags(text: str) -> tuple[str, str]:
    """`NAME=FLAGS` in its two parts."""
    name, equals, flags = text.partition("=")
    if not equals or not re.fullmatch(r"\w[\w.-]*", name):
        raise argparse.ArgumentTypeError(f"expected NAME=FLAGS, found {text!r}")
    return name, flags


def build_parser() -> argparse.ArgumentParser:
    """The flags; a regime's numbers can be overridden one by one."""
    tokens = ROOT / "examples" / "tokens"
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="variants: " + "; ".join(f"{n} ({f})" for n, f in VARIANTS.items() if f),
    )
    add = parser.add_argument
    add("--regime", choices=REGIMES, default="user")
    add("--variants", default="default", help="comma list of those below, and plain")
    add("--extra", nargs="+", type=named_flags, default=[], metavar="NAME=FLAGS")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--data", nargs="+", default=[str(tokens / "train")], help="folders, globs or .npq files")
    add("--val", nargs="+", default=[str(tokens / "val")], help="the same, to validate on")
    for name in ("frames", "passes", "steps", "d_model", "layers", "heads"):
        add(f"--{name}", type=int, help="instead of the regime's")
    add("--ctx", type=int, default=256)
    add("--batch", type=int, default=8)
    add("--plain-lr", default="1e-3")
    add("--out", type=Path, default=ROOT / "learning_runs")
    add("--from", dest="made", type=Path, help="only the tables and picture of this folder")
    return parser


def main() -> int:
    """Run, print, draw; 1 where a run failed."""
    parser = build_parser()
    flags = parser.parse_args()
    if flags.made:
        report(flags.made, flags.variants.split(",") if flags.variants != "default" else ())
        return 0
    known = VARIANTS | {PLAIN: flags.plain_lr} | dict(flags.extra)
    names = [*flags.variants.split(","), *(name for name, _ in flags.extra)]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--variants: no {', '.join(unknown)}; there are {', '.join(known)}")
    setup, out, failed = setup_of(flags), flags.out / flags.regime, []
    out.mkdir(parents=True, exist_ok=True)
    keep_or_compare(out / "setup.json", asdict(setup))
    for seed in flags.seeds:
        for name in dict.fromkeys(names):
            print(f"{name}, seed {seed} {known[name]}", flush=True)
            try:
                run(setup, out, name, known[name], seed)
            except RunFailed as error:
                failed.append(f"{name}, seed {seed}: {error}")
    report(out)
    for text in failed:
        print(f"\n! failed: {text}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
