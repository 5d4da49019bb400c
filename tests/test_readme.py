"""README, --help and code say the same: flags, defaults, exit codes, files, commands, pictures.

python tests/test_readme.py        # writes docs/flags.md and the table in docs/doctor.md anew
"""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from pathlib import Path

import pytest
from kit.trainer import ROOT

import ckpt_doctor
import encode_npq
import sample_rvq
import train_rvq
from cli.command_line import has_default
from doctor.findings import CHECKS, ids_in_order
from run_folder.checkpoint import REQUIRED_KEYS
from run_folder.files import RunFiles
from training.ends import EXIT_GUARD

DOORS = {d.__name__: d for d in (train_rvq, encode_npq, sample_rvq, ckpt_doctor)}
README = ROOT / "README.md"
FLAGS = ROOT / "docs" / "flags.md"
DOCTOR = ROOT / "docs" / "doctor.md"
FORMATS = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
SCRIPTS = [ROOT / f"{name}.py" for name in DOORS]
DOCS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE = [
    *(p for p in DOCS if p != FLAGS),
    *(ROOT / "benchmarks" / name for name in ("README.md", "reliability.md")),
    ROOT / "examples" / "README.md",
]
OF_OTHERS = {  # flags of torchrun, sbatch, wsl and mypy
    *("--standalone", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"),
    *("--max-restarts", "--shutdown-timeout", "--signal", "--strict", "--install"),
    *("--nodes", "--gpus", "--cpus-per-task", "--time", "--requeue", "--open-mode"),
}


def name_of(action: argparse.Action) -> str:
    """As the table shows a flag: `--ctx N`, `--[no-]amp`, `PATH`."""
    if not action.option_strings:
        return str(action.metavar or action.dest)
    name = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return name.replace("--", "--[no-]", 1)
    if action.nargs == 0:
        return name
    if action.choices is not None:
        return f"{name} {'/'.join(map(str, action.choices))}"
    metavar = action.metavar or getattr(action.type, "__name__", "TEXT")
    return f"{name} {' '.join(metavar) if isinstance(metavar, tuple) else metavar}"


def default_of(action: argparse.Action) -> str:
    if not has_default(action):
        return ""
    return "on" if action.default is True else str(action.default)


def row(*cells: str) -> str:
    """A line of a Markdown table; a bar within a cell does not end it."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table_of(door: str) -> list[str]:
    """Every flag of a command by group, as lines of a Markdown table."""
    lines = [row("flag", "default", "meaning"), "|---|---|---|"]
    for group in DOORS[door].build_parser()._action_groups:
        actions = [a for a in group._group_actions if a.dest != "help"]
        if actions and group.title not in ("options", "positional arguments"):
            lines.append(row(f"**{group.title}**", "", ""))
        lines += [row(f"`{name_of(a)}`", default_of(a), a.help or "") for a in actions]
    return lines


def flags_page() -> str:
    """docs/flags.md as the parsers have it now."""
    lines = [
        "# Every flag",
        "",
        "Names of several words may be written with `-` or `_`. `--[no-]x` is a switch: off",
        "without default unless its meaning says otherwise. `--help` of a command says the same.",
    ]
    for door in DOORS:
        lines += ["", f"## {door}.py", "", *table_of(door)]
    return "\n".join(lines) + "\n"


def doctors_page() -> str:
    """docs/doctor.md with the table of the checks as they register themselves now."""
    before, _, rest = DOCTOR.read_text(encoding="utf-8").partition("| id |")
    after = rest.partition("\n\n")[2]
    rows = [(id, CHECKS[id].text, CHECKS[id].level.name.lower()) for id in ids_in_order()]
    table = [row("id", "what it looks at", "level"), "|---|---|---|", *(row(*r) for r in rows)]
    return "\n".join([before + table[0], *table[1:], "", after])


def readme() -> str:
    return README.read_text(encoding="utf-8")


# --- flags ---------------------------------------------------------------------------------------


def test_the_page_of_flags_is_that_of_the_parsers():
    expected = flags_page()
    assert FLAGS.read_text(encoding="utf-8") == expected, "`python tests/test_readme.py` mends it"


def test_the_table_of_the_doctors_page_is_that_of_its_checks():
    page = DOCTOR.read_text(encoding="utf-8")
    assert page == doctors_page(), "`python tests/test_readme.py` mends it"
    for path in (ROOT / "doctor").rglob("*.py"):
        written = set(re.findall(r'"([A-Z][1-9])"', path.read_text(encoding="utf-8")))
        assert written <= CHECKS.keys(), path


@pytest.mark.parametrize("door", DOORS)
def test_help_tells_the_flags_of_the_page_and_no_other(door, monkeypatch):
    """By what a user sees, which the page is not made from: names, meanings and defaults."""
    monkeypatch.setenv("COLUMNS", "80")
    told = DOORS[door].build_parser().format_help()
    page = FLAGS.read_text(encoding="utf-8").partition(f"\n## {door}.py\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \| (.*?) ?\| (.+) \|$", page, re.M)
    flags = {name.split()[0] for name, _, _ in rows if name.startswith("-")}
    assert flags == set(re.findall(r"^  (--\S+)", told, re.M))
    in_a_line = " ".join(told.split())
    for name, default, meaning in rows:
        end = f"{meaning} ({default})" if default else meaning
        assert end.replace("\\|", "|") in in_a_line, name


@pytest.mark.parametrize("door", DOORS)
def test_every_flag_has_help_and_a_group(door):
    for group in DOORS[door].build_parser()._action_groups:
        for action in group._group_actions:
            assert action.help, action.option_strings
            if group.title in ("options", "positional arguments"):
                assert action.dest in ("help", "debug"), f"{action.dest} stands in no group"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_help_is_at_most_80_columns(door, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    text = DOORS[door].build_parser().format_help()
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^exit codes?: 0 ", text, re.I | re.M), "exit codes stand in --help"


# --- commands ------------------------------------------------------------------------------------


def commands(path: Path) -> list[str]:
    """Every command of this project in a document's code blocks or a command's docstring."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        blocks = re.findall(r"^    +(.*)", ast.get_docstring(ast.parse(text)) or "", re.M)
    else:
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks)).splitlines()  # continued lines joined
    starts = re.compile(
        r"^(?:\$ )?(?:torchrun .*?|python )(?:train_rvq|encode_npq|sample_rvq|ckpt_)"
    )
    return [line.removeprefix("$ ") for line in lines if starts.match(line) and "..." not in line]


@pytest.mark.parametrize("path", [*DOCS, *SCRIPTS], ids=lambda p: p.name)
def test_every_command_in_documents_and_docstrings_parses(path):
    found = commands(path)
    assert bool(found) == (path.name not in ("CONTRIBUTING.md", "flags.md", "formats.md"))
    for command in found:
        words = shlex.split(re.split(r" [|>] ", command)[0], comments=True)
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        door = DOORS[words[at].removesuffix(".py")]
        door.build_parser().parse_args(words[at + 1 :])


def test_the_users_three_runs_stand_in_the_readme():
    """Flags of the notes' commands, with their values."""
    runs = [c for c in commands(README) if "--epochs" in c]
    assert len(runs) >= 3
    wanted = ("--ctx 1280 --batch 8 --epochs 300", "--epochs 350", "--tag base512")
    for words in wanted:
        assert any(words in run for run in runs), words


def test_make_targets_and_linked_files_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", code_of(text))) <= targets, path.name
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
            if not re.match(r"https?:", link):
                assert (path.parent / link).exists(), f"{path.name}: {link}"


@pytest.mark.parametrize("path", PROSE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_flags_that_documents_name_exist(path):
    code = code_of(path.read_text(encoding="utf-8"))
    scripts = [p for folder in ("benchmarks", "examples") for p in (ROOT / folder).glob("*.py")]
    known = {s for d in DOORS.values() for a in d.build_parser()._actions for s in a.option_strings}
    for script in scripts:
        known |= set(re.findall(r'"(--[\w-]+)"', script.read_text(encoding="utf-8")))
    known = {flag.replace("_", "-") for flag in known} | OF_OTHERS
    for flag in re.findall(r"(?<![\w-])--(?:no-|\[no-\])?[a-z][\w-]*", code):
        name = flag.replace("_", "-").replace("[no-]", "")
        assert {name, name.replace("--no-", "--")} & known, flag
    for name in re.findall(r"[\w/]+\.(?:py|md|svg)\b", code):
        folders = (ROOT, path.parent, *(ROOT / f for f in ("benchmarks", "examples", "tests")))
        assert name == "utils.py" or any((folder / name).exists() for folder in folders), name


def code_of(text: str) -> str:
    """What a document sets in code: words within lines, and blocks."""
    return "\n".join(re.findall(r"`[^`\n]+`|^```.*?^```", text, re.S | re.M))


# --- files, checkpoints, exit codes --------------------------------------------------------------


def test_every_file_and_room_stands_in_the_map():
    text = readme()
    rooms = [path.parent for path in ROOT.glob("*/__init__.py")]
    assert len(rooms) == 7
    for path in [*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt"), *rooms]:
        assert f"`{path.name}{'/' * path.is_dir()}`" in text, path.name


def test_the_readme_has_200_lines_at_most():
    assert len(readme().splitlines()) <= 200


def test_the_files_of_a_run_stand_in_the_documents():
    for path in vars(RunFiles("", "rvq_{K}cb[_{tag}]")).values():
        if isinstance(path, Path) and path.name:
            ending = path.name.removeprefix("rvq_{K}cb[_{tag}]")
            assert f"{ending}`" in FORMATS, ending


def test_every_part_of_a_checkpoint_stands_in_the_documents():
    section = FORMATS.partition("## A checkpoint")[2].partition("\n## ")[0]
    for key in REQUIRED_KEYS:
        assert f"`{key}`" in section, key


def test_exit_codes_are_those_of_the_code():
    section = FORMATS.partition("## Exit codes")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| ([\d, ]+) \| (.+?) \|", section, re.M))
    numbers = {int(n) for cell in rows for n in cell.split(",")}
    of_training = {0, 1, 2, EXIT_GUARD, 129, 130, 143}
    assert numbers == of_training | {int(code) for code in ckpt_doctor.ExitCode}


def test_defaults_in_prose_are_those_of_the_parser():
    flags = train_rvq.build_parser().parse_args([])
    assert f"d_model={flags.d_model}, layers={flags.layers}, heads={flags.heads}" in readme()


if __name__ == "__main__":
    FLAGS.write_text(flags_page(), encoding="utf-8")
    DOCTOR.write_text(doctors_page(), encoding="utf-8")
