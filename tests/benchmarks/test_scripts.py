"""benchmarks/: each script measures and prints its table at a tiny size, without any peer."""

from __future__ import annotations

import json
import math
import os
import re
import sys

import gpu_numerics
import numpy as np
import pytest
import torch
from kit import processes
from kit.trainer import ROOT

TINY = "--d_model 32 --layers 1 --heads 1 --ctx 16 --codebooks 2 --vocab 16 --rounds 1"


def table_of(script: str, flags: str, cwd, code: int = 0) -> tuple[list[list[str]], str]:
    """Cells of the printed table, and all that was printed."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *flags.split()]
    done = processes.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines[2:]], done.stdout


def number(cell: str) -> float:
    return float(cell.split(" ")[0].replace(",", ""))


def test_train_speed_has_ours_the_peers_and_the_limit(tmp_path):
    rows, _ = table_of("train_speed.py", f"{TINY} --batch 2 --json rates.json", tmp_path)
    names = [row[0] for row in rows]
    assert names[:4] == [
        "ours, depth, muon", "ours, parallel, muon", "ours, parallel, adamw", "plain GPT",
    ]  # fmt: skip
    assert names[4].startswith("Hugging Face Musicgen")
    assert names[5].startswith("limit: the products alone")
    assert all(number(row[1]) > 0 for row in rows[:4])
    saved = json.loads((tmp_path / "rates.json").read_text())
    assert len(saved["rates"]["plain GPT"]) == 1
    assert number(rows[3][1]) == round(saved["rates"]["plain GPT"][0])


def test_sampling_speed_has_every_pattern_and_dtype(tmp_path):
    rows, printed = table_of("sampling_speed.py", f"{TINY} --frames 4 --top-k 3", tmp_path)
    expected = [f"{d}, {p}" for d in ("bf16", "fp32") for p in ("parallel", "delay", "depth")]
    assert [row[0] for row in rows] == expected
    assert all(number(row[1]) > 0 and number(row[2]) > 0 and number(row[6]) > 0 for row in rows)
    assert "86 frames/s" in printed


def test_cpu_variants_has_a_row_for_each_variant(tmp_path):
    rows, _ = table_of("cpu_variants.py", f"{TINY} --batch 2 --accum 1 --frames 3", tmp_path)
    assert [row[0] for row in rows] == [
        "training", "training without blocked attention",
        *(f"drawing, {pattern}{way}" for pattern in ("parallel", "depth") for way in (
            "", " without packed products", " without quick norms", " without any",
        )),
    ]  # fmt: skip
    assert all(number(row[1]) > 0 for row in rows)


def test_checkpoint_speed_has_saving_and_loading(tmp_path):
    rows, _ = table_of("checkpoint_speed.py", "--megabytes 8 --rounds 1 --folder .", tmp_path)
    assert [row[0] for row in rows] == [
        "save, in the background", "save, in its way", "torch.save and fsync",
        "limit: the bytes written and synced", "load, checked", "torch.load",
        "limit: the bytes read",
    ]  # fmt: skip
    assert all(number(row[1]) > 0 for row in rows)


@pytest.mark.parametrize("mode", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
def test_gpu_measures_a_mode_and_outlives_a_row_that_fails(mode, tmp_path):
    tiny = "--device cpu --rounds 1 --steps 1 --device-tflops 0.1 --no-numerics"
    rows, _ = table_of("gpu.py", f"{tiny} --shapes none,tiny --modes {mode}", tmp_path)
    assert [row[1] for row in rows] == [mode] * 2
    assert rows[0][2].startswith("KeyError")
    assert number(rows[1][3]) > 0
    assert number(rows[1][4]) > 0
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert ["error" in row for row in saved["rows"]] == [True, False]


def test_copies_are_found_and_held_out_music_is_none(tmp_path):
    rows, _ = table_of("copying.py", "--hours 0.1 --count 100", tmp_path)
    exact, near, held_out, by_heart, *cost = rows
    assert exact[1:] == ["100 at their place, 172 frames at least; 100 flagged", "100"]
    assert near[1].startswith("100 at their place, ")
    assert near[1].endswith("; 100 flagged")
    assert held_out[1].startswith("0 and 0 flagged")
    assert number(held_out[2]) >= 50
    assert by_heart[1:] == ["100 flagged", "100"]
    assert all("against 31,008 frames" in row[0] for row in cost)


def test_numerics_of_a_device_are_compared_with_the_cpus(tmp_path):
    rows, _ = table_of("gpu_numerics.py", "--device cpu --modes=", tmp_path)
    assert [row[:2] for row in rows] == [["eager", "float32"], ["eager", "bf16"]]
    assert all(row[-1] == "ok" for row in rows)


def test_numerics_that_are_off_are_called_so():
    losses, norms = np.linspace(4, 1, 20), np.ones(20)

    def verdict(losses: np.ndarray, norms: np.ndarray) -> str:
        return gpu_numerics.compared("", "float32", reference, (losses, norms))[-1]

    reference = (losses, norms)
    assert verdict(losses, norms) == "ok"
    wrong = [(losses * 0, norms), (losses * math.nan, norms), (losses + 0.3, norms)]
    wrong += [(losses, norms * 0), (losses, norms * math.nan), (losses, norms * 1.33)]
    assert {verdict(*pair) for pair in wrong} == {"OFF"}


def test_gpu_says_what_it_needs(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    done = processes.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("! benchmarks/gpu.py needs a CUDA device")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_labels_trains_and_counts_by_label(tmp_path):
    flags = f"--steps 2 --samples 2 --frames 8 --folder {tmp_path / 'kept'}"
    for said in (table_of("labels.py", flags, tmp_path)[1] for _ in range(2)):  # made; kept
        lines = said.splitlines()[-6:]
        assert re.fullmatch(r"val \d\.\d{4} with labels, \d\.\d{4} without", lines[0])
        assert [line[:30].rstrip() for line in lines[1:]] == [
            *(f"--label {name} --guidance {g}" for g in (1, 2) for name in ("lower", "upper")),
            "no label",
        ]
        assert all(line.endswith("upper of 2 x 8 frames") for line in lines[1:])
