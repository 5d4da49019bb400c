"""A plateau, overfitting and a val above guessing, told from the rows of a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
from kit.trainer import TINY, rows, run_doctor, run_trainer

from run_folder.metrics import RunMetrics
from run_folder.validations import trouble_of
from sound.npq_format import write_npq

START = {"event": "start", "step": 0, "passes_a_step": 0.1, "model": {"vocab_sizes": [1024] * 9}}


def run_of(vals: list[float | None], trains: list[float] | None = None) -> RunMetrics:
    """A run that validated every pass."""
    trains = trains or [6.0 - 0.01 * i for i in range(len(vals))]
    pairs = enumerate(zip(vals, trains, strict=True), 1)
    validations = [
        {"event": "epoch", "step": 10 * i, "epoch": i, "val": val, "train": train}
        for i, (val, train) in pairs
    ]
    return RunMetrics([START, *validations])


FALLING = [6.5 - 0.1 * i for i in range(12)]
RISING = [*FALLING, *(5.4 + 0.05 * i for i in range(1, 8))]


@pytest.mark.parametrize(
    ("vals", "kind"),
    [
        (FALLING, None),
        ([*FALLING, *[5.42] * 9], None),
        ([*FALLING, *[5.42] * 10], "plateau"),
        ([*FALLING, *[5.42] * 10, 5.39], None),
        (RISING, "overfitting"),
        ([6.9], None),
        ([6.95], None),
        ([6.95, 6.97], "guessing"),
        ([*FALLING, *(5.4 + 0.5 * i for i in range(1, 5))], "guessing"),
        ([None, None], None),
        ([*FALLING, *[5.42] * 10, None], "plateau"),
        ([], None),
    ],
)
def test_what_the_newest_validation_shows(vals: list[float | None], kind: str | None) -> None:
    trouble = trouble_of(run_of(vals))
    assert (trouble and trouble.kind) == kind
    if trouble is not None:
        assert "--patience N" in trouble.text
        assert f"{math.log(1024):.3f}" in trouble.text or "5.400 of step 120" in trouble.text


def test_a_rise_with_train_rising_too_is_no_overfitting() -> None:
    trains = [6.0] * len(FALLING) + [6.0 + 0.1 * i for i in range(7)]
    assert trouble_of(run_of(RISING, trains)) is None


def test_overfitting_is_judged_by_the_train_side_of_the_gap_where_it_is_known() -> None:
    """The objective also falls where only its smoothing or weights were changed."""
    for train_ce, kind in ((5.0, "overfitting"), (5.5, None), (None, "overfitting")):
        metrics = run_of(RISING)
        for row in metrics.epochs:
            row["train_ce"] = 5.2
        metrics.epochs[-1]["train_ce"] = train_ce
        trouble = trouble_of(metrics)
        assert (trouble and trouble.kind) == kind
        if train_ce == 5.0:
            assert "overfitting, gap 0.750;" in trouble.text


def test_rows_of_an_older_version_say_too_little() -> None:
    old = {"event": "start", "step": 0}
    metrics = RunMetrics([old, *run_of(RISING).epochs])
    assert trouble_of(metrics) is None


def test_patience_ends_a_run_that_learns_nothing_and_says_why(tmp_path: Any) -> None:
    """Noise cannot be learned: val rises above guessing as the model learns it by heart."""
    import numpy as np

    rng = np.random.default_rng(0)
    for i in range(4):
        codes = rng.integers(16, size=(150, 2))
        write_npq(tmp_path / f"{i}.npq", codes, vocab_sizes=[16, 16], frame_rate=86.0)
    flags = [*TINY, "--data", tmp_path / "*.npq", "--save_dir", tmp_path / "run", "--dropout", "0"]
    flags += ["--lr", "3e-3", "--ema", "0.9", "--epochs", "400", "--patience", "6"]
    code, said = run_trainer(*flags)
    assert code == 0, said
    assert said.count("is above guessing, 2.773: the model is worse than none") == 1
    (end,) = rows(tmp_path / "run", "end")
    validated = rows(tmp_path / "run", "epoch")
    best = min(validated, key=lambda row: row["val"])
    passes = rows(tmp_path / "run", "start")[0]["passes_a_step"] * (end["step"] - best["step"])
    a_validation = passes / (validated[-1]["epoch"] - best["epoch"])
    assert 6 <= passes < 6 + a_validation
    assert f"Done at step {end['step']} (no better val within --patience 6): best val" in said
    code, again = run_trainer(*flags)
    assert code == 0
    assert "--max-seconds or --patience" in again
    code, longer = run_trainer(*flags, "--patience", "9")
    assert code == 0
    assert rows(tmp_path / "run", "end")[-1]["step"] > end["step"], longer


def test_patience_without_validation_is_refused(tunes: Any, tmp_path: Any) -> None:
    flags = [*TINY, "--data", tunes, "--save_dir", tmp_path, "--val_split", "0", "--patience", "3"]
    code, said = run_trainer(*flags)
    assert code == 2, said
    assert "! --patience 3: expected validation windows, found none; " in said


def test_trainer_page_and_doctor_tell_the_same_gap_of_a_run_that_overfits(tmp_path: Any) -> None:
    """Half of the codes follow a scale, which is learned, and half are noise, known by heart."""
    import numpy as np

    rng = np.random.default_rng(0)
    for i in range(3):
        scale = (np.arange(400)[:, None] // 4 * 3 + np.arange(2)) % 16
        codes = np.where(rng.random((400, 2)) < 0.5, scale, rng.integers(16, size=(400, 2)))
        write_npq(tmp_path / f"{i}.npq", codes, vocab_sizes=[16, 16], frame_rate=86.0)
    (tmp_path / "val.txt").write_text("0.npq\n")
    folder = tmp_path / "run"
    flags = [*TINY, "--data", tmp_path / "*.npq", "--val-list", tmp_path / "val.txt"]
    flags += ["--save_dir", folder, "--d_model", "64", "--dropout", "0", "--lr", "2e-3"]
    flags += ["--label-smoothing", "0", "--ema", "0.95", "--epochs", "40", "--archive-every", "5"]
    code, said = run_trainer(*flags, "--weight-decay", "0")
    assert code == 0, said
    assert "while train falls: overfitting, gap " in said
    newest = rows(folder, "epoch")[-1]
    gap = f"{newest['val'] - newest['train_ce']:.4f}"
    assert f"| gap {gap} |" in said
    assert f"<dd>{gap}: val minus train" in (folder / "rvq_2cb_report.html").read_text()
    examined = run_doctor(folder, "--no-probe")
    assert examined.returncode == 1, examined.stdout
    assert "OVERFITTING" in examined.stdout
    assert f"(gap {gap})" in examined.stdout
