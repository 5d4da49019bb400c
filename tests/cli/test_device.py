"""Precision and threads by what they are worth here, kept on resume; a pace that falls."""

from __future__ import annotations

import os
import subprocess

import demo
import pytest
import torch
from kit.trainer import TINY, make_run, rows, run_trainer, train

import sample_rvq
from cli import device as devices
from run_folder.checkpoint import load_checkpoint
from run_folder.files import save_checkpoint
from training.building import pick_amp_dtype
from training.pace import SLOW_SECONDS, Pace
from training.setup import settle_threads

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    """torch's own number for a machine of two cores, whatever the tests run with."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "expected"), [(0.3, "bf16"), (4.0, "float32")])
def test_a_cpu_takes_bf16_only_where_its_products_are_faster(ratio, expected, monkeypatch):
    """Times of two kinds of machine; the products themselves are timed in the next test."""
    times = {None: 1.0, torch.bfloat16: ratio}
    monkeypatch.setattr(devices, "_time_of_product", times.__getitem__)
    assert devices.fast_precision(CPU) == expected


def test_products_are_really_timed():
    small, large = (devices._time_of_product(None, size) for size in (32, 1024))
    assert 0 < small < large


def test_the_precision_is_saved_and_kept_on_another_machine(tunes, tmp_path, monkeypatch):
    monkeypatch.setattr("training.building.fast_precision", lambda _: "float32")
    saved = train("--data", tunes, "--save_dir", tmp_path, "--max-steps", "1")
    assert saved["flags"]["amp_dtype"] == "float32"
    monkeypatch.setattr("training.building.fast_precision", lambda _: "bf16")
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--amp", "--amp-dtype", "auto")
    assert run.amp_dtype is None
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--amp-dtype", "bf16")
    assert run.amp_dtype is torch.bfloat16


def test_a_run_of_before_that_was_bf16_by_auto_stays_so(tunes, tmp_path, monkeypatch):
    train("--data", tunes, "--save_dir", tmp_path, "--max-steps", "1")
    path = tmp_path / "rvq_4cb_latest.pt"
    old = load_checkpoint(path)
    old["flags"]["amp_dtype"] = "auto"
    save_checkpoint({k: v for k, v in old.items() if k != "format"}, path)
    monkeypatch.setattr("training.building.fast_precision", lambda _: "float32")
    assert make_run("--data", tunes, "--save_dir", tmp_path).amp_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("trained", "given", "device", "expected"),
    [
        ({"amp": True, "amp_dtype": "bf16"}, None, "cpu", torch.bfloat16),
        ({"amp": True, "amp_dtype": "auto"}, None, "cpu", torch.bfloat16),
        ({"amp": True, "amp_dtype": "fp16"}, None, "cuda", torch.float16),
        ({"amp": True, "amp_dtype": "fp16"}, None, "cpu", None),
        ({"amp": True, "amp_dtype": "float32"}, None, "cpu", None),
        ({"amp": False, "amp_dtype": "fp16"}, None, "cuda", None),
        ({"amp": True, "amp_dtype": "fp16"}, False, "cuda", None),
        ({}, None, "cpu", None),
    ],
)
def test_samples_are_drawn_in_the_precision_of_the_training(trained, given, device, expected):
    flags = sample_rvq.build_parser().parse_args(["x.pt"])
    flags.amp = given
    assert sample_rvq.pick_dtype(flags, {"flags": trained}, torch.device(device)) is expected


def test_a_plan_for_a_card_that_is_not_here_is_in_bf16():
    flags = make_flags("--amp-dtype", "auto")
    assert pick_amp_dtype(flags, torch.device("cuda")) is torch.bfloat16


def make_flags(*words: str):
    from train_rvq import parse_flags

    return parse_flags([*TINY, *words])[0]


# --- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slower", "expected"), [(2, 1), (1, 2)])
def test_the_faster_number_of_threads_is_taken(slower, expected, two_threads):
    def work() -> None:
        torch.ones(10).sum()
        if torch.get_num_threads() == slower:
            subprocess.run(["sleep", "0.02"], check=True)

    count, times = devices.faster_thread_count(work)
    assert count == expected == torch.get_num_threads()
    assert times[slower] > times[expected]


def test_the_trial_leaves_no_trace_and_its_number_is_kept(
    tunes, tmp_path, two_threads, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(
        "training.setup.faster_thread_count", lambda work: (work(), (1, {1: 0.1}))[1]
    )
    run = make_run("--data", tunes, "--save_dir", tmp_path / "a")
    weights = {n: t.clone() for n, t in run.state.model.state_dict().items()}
    state = torch.get_rng_state()
    settle_threads(run, resumed=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, weights[n]) for n, t in run.state.model.state_dict().items())
    assert all(p.grad is None for p in run.state.model.parameters())


def test_a_run_says_times_and_keeps_its_threads_over_a_resume(tunes, tmp_path):
    environment = {n: v for n, v in os.environ.items() if n != "OMP_NUM_THREADS"}
    flags = ("--data", tunes, "--save_dir", tmp_path)
    code, output = run_trainer(*TINY, *flags, "--max-steps", "2", env=environment)
    assert code == 0, output
    if (os.cpu_count() or 1) == 1:
        pytest.skip("one core has one number of threads")
    assert "threads  " in output
    assert "ms with 1" in output
    path = tmp_path / "rvq_4cb_latest.pt"
    saved = load_checkpoint(path)
    assert saved["progress"]["threads"] in (1, os.cpu_count())
    for threads in (1, 2):
        saved["progress"]["threads"] = threads
        save_checkpoint({k: v for k, v in saved.items() if k != "format"}, path)
        code, output = run_trainer(*TINY, *flags, "--max-steps", "2", env=environment)
        assert "ms with" not in output
        assert rows(tmp_path, "resume")[-1]["device"].startswith(f"cpu, {threads} thread")


def test_omp_num_threads_wins(tunes, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = ("--data", tunes, "--save_dir", tmp_path, "--max-steps", "1")
    code, output = run_trainer(*TINY, *flags, env=environment)
    assert code == 0, output
    assert "ms with" not in output
    assert rows(tmp_path, "start")[0]["device"].startswith("cpu, 1 thread,")


def test_fewer_cores_than_the_run_computed_with_are_told(tunes, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    train("--data", tunes, "--save_dir", tmp_path, "--max-steps", "1")
    path = tmp_path / "rvq_4cb_latest.pt"
    saved = load_checkpoint(path)
    saved["progress"]["threads"] = 64
    save_checkpoint({k: v for k, v in saved.items() if k != "format"}, path)
    make_run("--data", tunes, "--save_dir", tmp_path, "--max-steps", "2")
    assert "the run used 64 threads, this machine has 1" in capsys.readouterr().err


# --- pace ----------------------------------------------------------------------------------------


def test_a_slow_spell_is_told_once_with_its_remedy(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    pace = Pace()
    assert all(pace.note(rate, 20.0, "cpu") is None for rate in (900, 1100, 1000, 400, 1000))
    told = [pace.note(200, 25.0, "cpu") for _ in range(6)]
    assert [t is not None for t in told] == [False, False, True, False, False, False]
    assert "200 frames/s for 75 s" in told[2]
    assert "OMP_NUM_THREADS=1" in told[2]
    assert pace.note(1000, 20.0, "cpu") is None
    told = [pace.note(100, SLOW_SECONDS, "cuda") for _ in range(2)]
    assert "nvidia-smi" in told[0]
    assert told[1] is None


def test_the_demo_says_when_it_had_too_few_steps():
    assert "56 steps" in demo.verdict(56)
    assert demo.verdict(800) == ""
