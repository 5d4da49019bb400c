"""The benchmark of passes: which curves it reads, its tables and picture, runs that are kept."""

from __future__ import annotations

import json
import os
import sys

import pytest
from kit import processes
from kit.trainer import ROOT
from learning import Curve, Setup, by_variant, choose, keep_or_compare, reach_lines, rows_of, table

SETUP = Setup(("a",), ("b",), 1000, 4, 20, 50, 4, 32, 2, 2, "")


def curve(variant: str, seed: int, *vals: float) -> Curve:
    """Validations at steps 10, 20, ... of ten steps a second; train at half of val."""
    rows = [
        {"step": 10 * i, "seconds": i, "val": val, "train": val / 2, "ce": [val, val]}
        for i, val in enumerate(vals, 1)
    ]
    return Curve(variant, seed, "--x 1" if variant == "worse" else "", rows, 4000, 0.1)


CURVES = [
    curve("default", 0, 6.0, 4.0, 4.4), curve("default", 1, 6.0, 4.2, 4.4),
    curve("worse", 0, 6.0, 5.5, 5.4), curve("worse", 1, 6.0, 5.2, 5.6),
    curve("plain 1e-3", 0, 6.5, 5.1, 5.2),
]  # fmt: skip


def test_the_table_has_lowest_and_last_and_compares_seed_by_seed():
    head, _, *body = table(SETUP, CURVES)
    assert head.count("|") == body[0].count("|")
    cells = {row.split("|")[1].strip(" *"): [c.strip() for c in row.split("|")] for row in body}
    assert list(cells) == ["default", "plain 1e-3", "worse"], "best first"
    lowest = ["1.00", "4.100 (4.000 to 4.200)", "4 (4 to 4)", "", "4.400 (4.400 to 4.400)"]
    assert cells["default"][3:8] == lowest
    assert cells["default"][8:10] == ["2.200 (2.200 to 2.200)", "2.200 (2.200 to 2.200)"]
    assert cells["worse"][6] == "+1.200 (+1.000 to +1.400)"


def test_when_a_variant_passes_the_yardstick():
    first, *lines = reach_lines(SETUP, CURVES)
    assert first == "plain's lowest val, 5.100, took 20 steps, 2 s"
    assert lines == ["  default: 20 steps, 2 s, 2 of 2 runs", "  worse: never, 0 of 2 runs"]
    assert reach_lines(SETUP, CURVES[:4]) == []


def test_a_val_that_was_not_finite_is_never_the_lowest():
    assert by_variant([curve("default", 0, 6.0, 5.0)])["default"][0].lowest["val"] == 5.0
    rows = [{"step": 1, "val": None}, {"step": 2, "val": 7.0}]
    assert Curve("x", 0, "", rows, 1, 1).lowest["step"] == 2


def test_steps_taken_again_after_a_cut_count_once(tmp_path):
    events = [(10, 5.0), (20, 4.0), (30, 3.9), (20, 4.5)]
    lines = [
        json.dumps({"event": "epoch", "step": s, "val": v, "seconds": s, "val_per_codebook": [v]})
        for s, v in events
    ]
    (tmp_path / "rvq_4cb_metrics.jsonl").write_text("\n".join([*lines, '{"event": "end"}']))
    assert [(r["step"], r["val"]) for r in rows_of(tmp_path)] == [(10, 5.0), (20, 4.5)]


def test_other_flags_under_the_same_name_are_refused(tmp_path):
    keep_or_compare(tmp_path / "x.json", {"flags": "--lr 1", "seed": 0})
    keep_or_compare(tmp_path / "x.json", {"flags": "--lr 1", "seed": 0})
    with pytest.raises(SystemExit, match="flags --lr 1 and not --lr 2"):
        keep_or_compare(tmp_path / "x.json", {"flags": "--lr 2", "seed": 0})


def test_whole_files_are_taken_until_there_are_frames_enough(tunes, capsys):
    files = [str(path) for path in sorted(tunes.glob("*.npq"))]
    assert choose(files[::-1], 301) == (tuple(files[:2]), 600)
    assert choose(files, None) == (tuple(files), 1200)
    assert choose(files, 9999)[1] == 1200
    assert "1,200 frames of the wanted 9,999" in capsys.readouterr().out


@pytest.mark.slow
def test_real_runs_are_made_once(tunes, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "learning.py"), "--out", str(tmp_path)]
    command += ["--data", *(str(tunes / f"{i}.npq") for i in range(3)), "--val"]
    command += [str(tunes / "3.npq"), "--d_model", "32", "--layers", "1", "--heads", "2", "--ctx"]
    command += ["32", "--batch", "4", "--frames", "900", "--passes", "3", "--seeds", "0"]
    command += ["--variants", "default,plain"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        done = processes.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "| **default** |" in done.stdout
        assert "plain's lowest val" in done.stdout
    out = tmp_path / "user"
    (metrics,) = (out / "default-s0").glob("*_metrics.jsonl")
    assert metrics.read_text().count('"event": "start"') == 1, "the second start trains nothing"
    assert rows_of(out / "default-s0")[-1]["train"] is not None
    assert (out / "learning.png").read_bytes().startswith(b"\x89PNG")
