"""The house: floors, sizes, what may be imported and called where, the docstring's command."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = {
    "kernels": 0, "npq_format": 0, "checkpointing": 0, "codec": 0, "optimizer": 0,
    "parallel": 0, "command_line": 0,
    "losses": 1, "npq_dataset": 1, "sharing": 1,
    "model": 2, "stability": 2, "reporting": 2, "code_statistics": 2,
    "sampling": 3, "memory_prediction": 3, "planning": 4,
    "run_files": 1, "run_state": 4, "run_saving": 5, "run_report": 5, "run_setup": 6,
    "ckpt_summary": 3,
    "ckpt_child": 4, "ckpt_container": 4, "ckpt_optimizer": 4, "ckpt_findings": 4, "ckpt_run": 4,
    "ckpt_misfits": 5, "ckpt_measures": 5, "ckpt_probe": 5,
    "ckpt_checks_files": 5, "ckpt_checks_optimizer": 5, "ckpt_checks_motion": 5,
    "ckpt_checks_layers": 5, "ckpt_checks_metrics": 5,
    "ckpt_reader": 6, "ckpt_compare": 6, "ckpt_checks": 6, "ckpt_diagnosis": 7,
    "page": 1, "charts": 2, "ckpt_report": 8, "ckpt_pictures": 9, "ckpt_page": 10,
    "train_rvq": 11, "sample_rvq": 11, "encode_npq": 11, "ckpt_doctor": 11,
}  # fmt: skip
SOURCES = sorted(ROOT.glob("*.py"))


def imports_of(path) -> set[str]:
    """Modules of this project that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names & FLOORS.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_imports_point_down(path):
    floor = FLOORS[path.stem]
    for name in imports_of(path):
        assert FLOORS[name] < floor, f"{path.name} (floor {floor}) imports {name}"


def test_the_checkpoint_file_knows_no_model_and_training_no_codec_at_import():
    assert not imports_of(ROOT / "checkpointing.py")
    script = "import sys, train_rvq; assert 'dac' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_one_place_calls_torch_save_and_load():
    for path in SOURCES:
        if path.stem not in ("checkpointing", "codec"):
            assert not re.search(r"torch\.(save|load)\(", path.read_text()), path.name
        for call in re.findall(r"torch\.load\([^\n]*", path.read_text()):
            assert "weights_only=True" in call, path.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name != "build_parser":
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{path.name}: {node.name} has {length} lines"


def test_the_docstrings_smoke_command_runs(tmp_path):
    doc = ast.get_docstring(ast.parse((ROOT / "train_rvq.py").read_text()))
    command = doc[doc.index("python train_rvq.py --data demo_codes") :].split("\n\n")[0]
    words = shlex.split(command.replace("\\\n", " "))
    make = [sys.executable, str(ROOT / "examples" / "make_codes.py"), "demo_codes"]
    subprocess.run([*make, "--files", "3"], cwd=tmp_path, check=True)
    run = [sys.executable, str(ROOT / words[1]), *words[2:]]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Done at step 30" in done.stdout
    assert (tmp_path / "smoke_ckpts" / "rvq_4cb_latest.pt").exists()


def test_ci_calls_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()
