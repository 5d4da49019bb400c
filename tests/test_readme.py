"""README, --help and code say the same: flags, defaults, exit codes, files, commands, pictures.

python tests/test_readme.py        # writes the tables of flags into README.md anew
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

import ckpt_doctor
import encode_npq
import run_setup
import sample_rvq
import train_rvq
from checkpointing import REQUIRED_KEYS
from command_line import EXIT_INTERRUPTED, has_default
from run_files import RunFiles

DOORS = {d.__name__: d for d in (train_rvq, encode_npq, sample_rvq, ckpt_doctor)}
README = ROOT / "README.md"
DOCS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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


def table_of(door: str) -> str:
    """Every flag of a door by group, as Markdown."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for group in DOORS[door].build_parser()._action_groups:
        actions = [a for a in group._group_actions if a.dest != "help"]
        if actions and group.title not in ("options", "positional arguments"):
            lines.append(f"| **{group.title}** | | |")
        for action in actions:
            cells = (f"`{name_of(action)}`", default_of(action), action.help or "")
            lines.append(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |")
    return "\n".join(lines)


MARKS = "<!-- flags of {0} -->\n", "\n<!-- end of flags of {0} -->"


def with_tables(text: str) -> str:
    """A README with the tables of flags that the code has now."""
    for door in DOORS:
        first, last = (re.escape(mark.format(door)) for mark in MARKS)
        assert re.search(first, text), f"README has no {MARKS[0].format(door)}"
        table = table_of(door)
        text = re.sub(f"({first}).*?({last})", lambda m, t=table: m[1] + t + m[2], text, flags=re.S)
    return text


def readme() -> str:
    return README.read_text(encoding="utf-8")


# --- flags ---------------------------------------------------------------------------------------


def test_the_tables_of_flags_are_those_of_the_parsers():
    """`PYTHONPATH=. python tests/test_readme.py` mends it."""
    assert readme() == with_tables(readme())


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
    """Every command of this project in a document's code blocks, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M)
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks)).splitlines()
    starts = re.compile(
        r"^(?:\$ )?(?:torchrun .*?|python )(?:train_rvq|encode_npq|sample_rvq|ckpt_)"
    )
    return [line.removeprefix("$ ") for line in lines if starts.match(line) and "..." not in line]


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_every_command_in_the_documents_parses(path):
    found = commands(path)
    assert found or path.name in ("CONTRIBUTING.md",)
    for command in found:
        words = shlex.split(command, comments=True)
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
        assert set(re.findall(r"\bmake ([a-z]+-?[a-z]*)\b", code_of(text))) <= targets, path.name
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
            if not re.match(r"https?:", link):
                assert (path.parent / link).exists(), f"{path.name}: {link}"


def code_of(text: str) -> str:
    return "\n".join(re.findall(r"`[^`\n]+`|^```.*?^```", text, re.S | re.M))


# --- files, checkpoints, exit codes --------------------------------------------------------------


def test_every_file_stands_in_the_file_map():
    text = readme()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt")]:
        assert f"`{path.name}`" in text, path.name


def test_the_files_of_a_run_stand_in_the_readme():
    text = readme()
    for path in vars(RunFiles("", "rvq_{K}cb[_{tag}]")).values():
        if isinstance(path, Path) and path.name:
            ending = path.name.removeprefix("rvq_{K}cb[_{tag}]")
            assert f"{ending}`" in text, ending


def test_every_part_of_a_checkpoint_stands_in_the_readme():
    section = readme().partition("## A checkpoint")[2].partition("\n## ")[0]
    for key in REQUIRED_KEYS:
        assert f"`{key}`" in section, key


def test_exit_codes_are_those_of_the_code():
    section = readme().partition("## Exit codes")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| ([\d, ]+) \| (.+?) \|", section, re.M))
    numbers = {int(n) for cell in rows for n in cell.split(",")}
    assert {0, 1, 2, train_rvq.EXIT_GUARD, 129, EXIT_INTERRUPTED, 143} <= numbers
    assert {int(code) for code in ckpt_doctor.ExitCode} <= numbers


def test_defaults_in_prose_are_those_of_the_parser():
    flags = train_rvq.build_parser().parse_args([])
    assert f"d_model={flags.d_model}, layers={flags.layers}, heads={flags.heads}" in readme()
    assert set(run_setup.COMMAND_FLAGS) <= vars(flags).keys()


if __name__ == "__main__":
    README.write_text(with_tables(readme()), encoding="utf-8")
