"""The house: floors, sizes, what may be imported and called where, the docstring's command."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import shlex
import subprocess
import sys

import pytest
from kit.trainer import ROOT

FLOORS = {
    "cli": 0, "layers": 0,
    "model": 1, "run_folder": 1,
    "sound": 2, "pages": 2,
    "npq_dataset": 3,
    "training": 4,
    "doctor": 5,
    "train_rvq": 6, "encode_npq": 6, "sample_rvq": 6, "ckpt_doctor": 6,
}  # fmt: skip
COMMANDS = [name for name, floor in FLOORS.items() if floor == 6]
BESIDE = ("tests/", "benchmarks/", "examples/")
TRACKED = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
SOURCES = [ROOT / f for f in TRACKED.stdout.split() if not f.startswith(BESIDE)]


def module_of(path) -> str:
    """Dotted name of a source file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imports_of(path) -> set[str]:
    """Modules of this project that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & MODULES.keys()


def room(module: str) -> str:
    """The folder or top file that a module belongs to."""
    return module.partition(".")[0]


def test_every_source_file_stands_in_a_room():
    assert len(SOURCES) > 40
    assert {room(name) for name in MODULES} == FLOORS.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    for imported in imports_of(MODULES[name]):
        if room(imported) != room(name):
            assert FLOORS[room(imported)] < FLOORS[room(name)], f"{name} imports {imported}"
            assert room(imported) not in COMMANDS, f"{name} imports a command"


def test_no_circle_of_imports():
    graph = {name: imports_of(path) for name, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_checkpoint_file_knows_nothing_of_ours_and_the_doctor_only_the_schedule():
    assert not imports_of(MODULES["run_folder.checkpoint"])
    for name in MODULES:
        if room(name) in ("doctor", "ckpt_doctor"):
            from_training = {m for m in imports_of(MODULES[name]) if room(m) == "training"}
            assert from_training <= {"training", "training.schedule"}, name


def test_tests_mirror_the_rooms_and_none_imports_another():
    tests = [ROOT / f for f in TRACKED.stdout.split() if f.startswith("tests/")]
    folders = {p.relative_to(ROOT / "tests").parts[0] for p in tests if p.parent != ROOT / "tests"}
    assert folders <= FLOORS.keys() | {"faults", "kit", "benchmarks", "null_cuda"}
    for path in tests:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = [n for n in names if n.split(".")[-1].startswith(("test_", "conftest"))]
            assert not found, f"{path.name} imports {found}: what tests share stands in tests/kit"


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"train_rvq"}))
def test_a_command_starts_from_another_folder(name, tmp_path):
    command = [sys.executable, str(ROOT / f"{name}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


def test_one_place_calls_torch_save_and_load():
    for path in SOURCES:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        told = [c for c in calls if re.fullmatch(r"torch\.(save|load)", ast.unparse(c.func))]
        assert module_of(path) in ("run_folder.checkpoint", "sound.codec") or not told, path.name
        for call in told:
            is_safe = "weights_only=True" in ast.unparse(call)
            assert is_safe or ast.unparse(call.func) == "torch.save", path.name


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name != "build_parser":
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{path.name}: {node.name} has {length} lines"


def test_the_docstrings_smoke_command_runs_from_another_folder_and_imports_no_codec(tmp_path):
    doc = ast.get_docstring(ast.parse((ROOT / "train_rvq.py").read_text()))
    command = doc[doc.index("python train_rvq.py --data demo_codes") :].split("\n\n")[0]
    words = shlex.split(command.replace("\\\n", " "))
    make = [sys.executable, str(ROOT / "examples" / "make_codes.py"), "demo_codes"]
    subprocess.run([*make, "--files", "3"], cwd=tmp_path, check=True)
    run = [sys.executable, str(ROOT / words[1]), *words[2:]]
    done = subprocess.run(
        run, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Done at step 30" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "model" in imported
    assert "dac" not in imported
    assert (tmp_path / "smoke_ckpts" / "rvq_4cb_latest.pt").exists()


def test_ci_ends_with_make_test():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"
