"""Find what is wrong with a training run, and the command that saves it.

    python ckpt_doctor.py rvq_ckpts                # a folder, files or globs
    python ckpt_doctor.py rvq_ckpts --html report.html --json report.json
    python ckpt_doctor.py rvq_ckpts --probe-data "npq_out/*.npq"
    python ckpt_doctor.py rvq_9cb_latest.pt        # one file alone

Exit code: 0 healthy, 1 suspect or overfitting, 2 wrong usage, 3 diverged or dead, 4 corrupt or
unsafe, 5 nothing usable or of other programs (or the doctor itself failed), 130 interrupted.

Files are only read, each in a child process with limits; no pickle is run, and only the requested
reports are written. The metrics beside the checkpoints are found automatically.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import enum
import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P and -I leave it out
    from cli.command_line import report_import_errors

    report_import_errors()

from tqdm import tqdm

from cli.command_line import (
    FlagParser,
    Several,
    UsageError,
    at_least,
    exit_code_of,
    file_path,
    has_colour,
    print_result,
)
from cli.disk import replace_file
from cli.file_search import NothingFoundError, expand
from doctor.diagnosis import GRAVITY, Diagnosis, Verdict, diagnose
from doctor.examined_run import ExaminedRun
from doctor.probe import WINDOWS, needs_labels, probe, probe_own_data
from doctor.reading.foreign import by_folder
from doctor.reading.reader import summarize
from doctor.reading.summary import Problem, Summary
from doctor.report.page import as_html
from doctor.report.terminal import as_csv, as_json, terminal_lines
from npq_dataset import BadFilesError
from run_folder.metrics import RunMetrics, read_metrics
from run_folder.names import checkpoint_name
from sound.npq_format import NpqError


class ExitCode(enum.IntEnum):
    """Exit codes of the doctor, as in --help and docs/formats.md."""

    HEALTHY = 0
    SUSPECT = 1
    USAGE = 2
    DIVERGED = 3
    CORRUPT = 4
    NOTHING = 5
    INTERRUPTED = 130


EXIT_CODES = {
    Verdict.HEALTHY: ExitCode.HEALTHY,
    Verdict.SUSPECT: ExitCode.SUSPECT,
    Verdict.OVERFITTING: ExitCode.SUSPECT,
    Verdict.DIVERGED: ExitCode.DIVERGED,
    Verdict.DEAD: ExitCode.DIVERGED,
    Verdict.CORRUPT: ExitCode.CORRUPT,
    Verdict.UNSAFE: ExitCode.CORRUPT,
    Verdict.FOREIGN: ExitCode.NOTHING,
    Verdict.NOTHING: ExitCode.NOTHING,
}
SUFFIXES = (".pt", ".pth", ".ckpt")


def build_parser() -> FlagParser:
    """All flags."""
    parser = FlagParser(__file__, usage="%(prog)s PATH [PATH ...] [flags]")
    # fmt: off
    add = parser.add_argument_group("what to look at").add_argument
    add("paths", type=file_path, nargs="+", metavar="PATH", help="folders, checkpoints or globs")
    add("--metrics", type=file_path, metavar="FILE",
        help="the run's *_metrics.jsonl, if it lies elsewhere")
    add("--probe-data", type=file_path, action=Several, nargs="+", metavar="GLOB",
        help=".npq files to run the models on")
    add("--no-probe", action="store_true",
        help="do not run a lone file's model on the data that it was trained on")
    add("--probe-windows", type=at_least(1), default=8, help="windows of it")

    add = parser.add_argument_group("reports").add_argument
    add("--json", type=file_path, metavar="FILE",
        help="write everything that was found; - for standard output")
    add("--csv", type=file_path, metavar="FILE", help="write a row for each file and tensor")
    add("--html", type=file_path, metavar="FILE", help="write one page with pictures")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    """Read, diagnose, report; returns the exit code."""
    flags = build_parser().parse_args(argv)
    return exit_code_of(
        lambda: examine(flags),
        expected=(BadFilesError, NpqError),
        debug=flags.debug,
        interrupted="interrupted; nothing was changed",
        failed=ExitCode.NOTHING,
    )


def examine(flags: argparse.Namespace) -> int:
    """Diagnose and report as the flags say."""
    for name in filter(None, (flags.csv, flags.html, flags.json)):
        if name != "-" and not os.path.isdir(os.path.dirname(name) or "."):
            raise UsageError(f"{name}: no such folder, the report would be lost; make it first")
        if os.path.isdir(name):
            raise UsageError(f"{name} is a folder; name a file for the report")
    diagnoses = [diagnose(run) for run in read_runs(flags)]
    report(flags, diagnoses)
    return EXIT_CODES[max((d.verdict for d in diagnoses), key=GRAVITY.index)]


# --- files to runs -------------------------------------------------------------------------------


def read_runs(flags: argparse.Namespace) -> list[ExaminedRun]:
    """Every named file, summarised and sorted into the runs that wrote them."""
    runs = []
    for name, members in group_by_run(summarize_all(find_checkpoints(flags.paths))).items():
        run = ExaminedRun(name, members, RunMetrics(metrics_rows(flags.metrics, name, members)))
        if flags.probe_data:
            try:
                run.probes = probe(run.readable, flags.probe_data, flags.probe_windows)
            except (NpqError, BadFilesError, FileNotFoundError) as error:
                raise UsageError(f"--probe-data: {error}") from error
        elif len(run.series) == 1 and not flags.no_probe:
            probe_alone(run, run.series[0])
        runs.append(run)
    return runs


def probe_alone(run: ExaminedRun, s: Summary) -> None:
    """Run a lone file's model on its own data, or note why that is not possible."""
    answer: dict[str, Any] | Problem
    if s.style == "old":
        answer = Problem("missing", "the older script saved no fingerprint of it")
    elif s.mismatches:
        answer = Problem("missing", "it does not fit its own architecture")
    elif needs_labels(s):
        answer = Problem("missing", "it knows music by its labels alone (--label-dropout 0)")
    else:
        answer = probe_own_data(s)
    if isinstance(answer, Problem):
        remedy = "" if needs_labels(s) else "; --probe-data GLOB runs it"
        run.probe_note = f"Not run on its own data: {answer.text}{remedy}."
    else:
        run.probes[s.path], run.on_own_data = answer, True
        run.probe_note = f"Run on {WINDOWS} windows of its own data; --no-probe leaves that out."


def find_checkpoints(words: Sequence[str]) -> list[str]:
    """Paths of the checkpoints in folders, globs and files, each once, in the given order."""
    found: dict[str, None] = {}
    for word in itertools.chain.from_iterable(map(as_by_a_shell, words)):
        matches = [word]
        if os.path.isdir(word):
            names = sorted(n for n in os.listdir(word) if n.lower().endswith(SUFFIXES))
            matches = [os.path.join(word, n) for n in names if not n.startswith(".")]
            if by_folder(word) and all(checkpoint_name(n).kind == "other" for n in names):
                matches = [word]  # a checkpoint as a folder, of another program
            if not matches:
                kinds = ", *".join(SUFFIXES)
                raise UsageError(f"{word}: no checkpoint in this folder (*{kinds})")
        found.update(dict.fromkeys(os.path.normpath(m) for m in matches))
    return list(found)


def as_by_a_shell(word: str) -> list[str]:
    """The word itself where such a path exists, else the paths that it matches as a glob."""
    try:
        return [word] if os.path.lexists(word) else expand(word)
    except NothingFoundError as error:
        raise UsageError(f"{error}; name checkpoints, a folder or a glob") from error


def summarize_all(paths: Sequence[str]) -> list[Summary]:
    """Summaries with a progress bar; hard links of one file are read once."""
    sizes = [os.path.getsize(path) if os.path.isfile(path) else 0 for path in paths]
    known: dict[object, Summary] = {}
    summaries = []
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, miniters=1, disable=None) as bar:
        done = 0

        def advance(read: int) -> None:
            bar.update(done + read - bar.n)

        for path, size in zip(paths, sizes, strict=True):
            bar.set_description(os.path.basename(path)[-40:])
            identity: object = path
            with contextlib.suppress(OSError):
                status = os.stat(path)
                identity = status.st_dev, status.st_ino
            if identity not in known:
                known[identity] = summarize(path, advance)
            _, kind, name_epoch = checkpoint_name(path)
            twin = known[identity]
            summaries.append(dataclasses.replace(twin, path=path, kind=kind, name_epoch=name_epoch))
            done += size
            advance(0)
    return summaries


def group_by_run(summaries: Iterable[Summary]) -> dict[str, list[Summary]]:
    """Files by folder and name of their run; other names join the only run of their folder."""
    runs: dict[str, list[Summary]] = {}
    others: list[Summary] = []
    for summary in summaries:
        name = checkpoint_name(summary.path).run
        if not name:
            others.append(summary)
        else:
            folder = os.path.dirname(summary.path)
            runs.setdefault(os.path.join(folder, name), []).append(summary)
    for summary in others:
        folder = os.path.dirname(summary.path)
        homes = [name for name in runs if os.path.dirname(name) == folder]
        home = homes[0] if len(homes) == 1 else folder or "."
        runs.setdefault(home, []).append(summary)
    return runs


def metrics_rows(given: str | None, name: str, members: list[Summary]) -> list[dict[str, Any]]:
    """Rows of the metrics file; without one the last rows, from the newest checkpoint."""
    path = Path(given or f"{name}_metrics.jsonl")
    if path.is_file():
        return read_metrics(path)
    if given:
        raise UsageError(f"--metrics {given}: no such file; leave it out to take the run's own")
    newest = max((s for s in members if s.history), key=lambda s: s.step or 0, default=None)
    return newest.history if newest else []


# --- reports -------------------------------------------------------------------------------------


def report(flags: argparse.Namespace, diagnoses: list[Diagnosis]) -> None:
    """Print the tables and write the requested files."""
    if flags.json == "-":
        print_result(json.dumps(as_json(diagnoses), allow_nan=False, indent=1))
    else:
        colour = has_colour(sys.stdout)
        for i, diagnosis in enumerate(diagnoses):
            print_result("\n" * bool(i) + "\n".join(terminal_lines(diagnosis, colour=colour)))
    if flags.json and flags.json != "-":
        write_report(flags.json, json.dumps(as_json(diagnoses), allow_nan=False, indent=1))
    if flags.csv:
        write_report(flags.csv, as_csv(diagnoses))
    if flags.html:
        write_report(flags.html, as_html(diagnoses, ", ".join(d.run.name for d in diagnoses)))


def write_report(path: str, text: str) -> None:
    """Write a report whole or not at all; to a pipe or a device directly."""
    place, content = Path(os.path.realpath(path)), text.encode(errors="backslashreplace")
    if place.is_file() or not place.exists():
        replace_file(place, content, durable=False)
    else:
        place.write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
