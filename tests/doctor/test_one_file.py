"""The doctor on one checkpoint with nothing beside it: judged by what it holds, run on its data."""

from __future__ import annotations

import copy
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.checkpoints import content_of
from kit.single_files import Old, OldModel, train_old
from kit.trainer import TINY, run_doctor, run_trainer

from doctor.diagnosis import Verdict, diagnose
from doctor.examined_run import ExaminedRun
from doctor.probe import old_logits
from doctor.reading.reader import summarize
from model import CodesTransformer, ModelConfig
from run_folder.metrics import RunMetrics
from sound.npq_format import write_npq
from train_rvq import parse_flags

Content = dict[str, Any]


def ask(path: Path, *words: str | Path, **options: Any) -> tuple[dict[str, Any], str, int]:
    """The only run of the JSON report, what was printed with its lines joined, the exit code."""
    report = path.parent / "report.json"
    done = run_doctor(path, "--json", report, *words, **options)
    assert report.exists(), done.stderr
    (run,) = json.loads(report.read_text())["runs"]
    return run, " ".join(done.stdout.split()), done.returncode


@pytest.fixture(scope="module")
def trained(tunes, tmp_path_factory) -> Path:
    """A run of some hundred steps, whose tunes are known by heart."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ("--data", tunes, "--save_dir", folder, "--epochs", "6", "--step", "4")
    code, output = run_trainer(*TINY, *flags, "--optim", "adamw", "--lr", "3e-3", timeout=300)
    assert code == 0, output
    return folder / "rvq_4cb_latest.pt"


@pytest.fixture
def lone(trained, tmp_path) -> Path:
    """A copy of its `latest`, to be harmed."""
    return Path(shutil.copyfile(trained, tmp_path / trained.name))


def harm(path: Path, change: Callable[[Content], Any]) -> Path:
    content = content_of(path)
    change(content)
    torch.save(content, path)
    return path


def scaled(factor: float, *words: str, parts: tuple[str, ...] = ("model", "ema")) -> Any:
    def change(content: Content) -> None:
        for part in parts:
            for name, tensor in content[part].items():
                if any(word in name for word in words):
                    content[part][name] = factor * tensor

    return change


def grave(run: dict[str, Any]) -> dict[str, str]:
    """Findings that say DIVERGED or DEAD: where by check."""
    found = run["findings"]
    return {f["check"]: f["where"] for f in found if f["level"] in ("diverged", "dead")}


# --- judged by what it holds ---------------------------------------------------------------------


def test_a_healthy_file_alone_is_healthy(lone):
    run, _, code = ask(lone, "--no-probe")
    assert (run["verdict"], code) == ("HEALTHY", 0)


def in_type(dtype: torch.dtype) -> Any:
    def change(content: Content) -> None:
        for part in ("model", "ema"):
            content[part] = {n: t.to(dtype) for n, t in content[part].items()}

    return change


def as_converged(content: Content) -> None:
    """Hardly any gradient is left: the data is known by heart."""
    for state in content["optimizer"]["state"].values():
        state["exp_avg"] *= 0.05
    for name, raw in content["model"].items():
        content["ema"][name] = raw.lerp(content["ema"][name], 0.05)


@pytest.mark.parametrize(
    "change", [in_type(torch.float16), in_type(torch.bfloat16), as_converged],
    ids=["float16", "bfloat16", "converged"],
)  # fmt: skip
def test_what_is_unusual_is_no_fault(change, lone):
    summary = summarize(harm(lone, change))
    diagnosis = diagnose(ExaminedRun("rvq_4cb", [summary], RunMetrics(summary.history)))
    assert diagnosis.verdict is Verdict.HEALTHY, diagnosis.findings


def test_a_file_from_before_the_first_step_is_healthy(lone):
    def as_begun(content: Content) -> None:
        torch.manual_seed(1)
        model = CodesTransformer(ModelConfig.from_dict(content["architecture"]))
        content["model"] = model.state_dict()
        content["ema"] = copy.deepcopy(content["model"])
        content["optimizer"]["state"] = {}
        for group in content["optimizer"]["param_groups"]:
            group["lr"] = 0.0
        content["progress"].update(step=0, epoch=0, best_val=math.inf, best_epoch=0)
        content["guard"].update(recent_ce=[], losses=[], log_norms=[])
        content["history"] = content["history"][:1]

    run, text, code = ask(harm(lone, as_begun))
    assert (run["verdict"], code) == ("HEALTHY", 0), text


@pytest.mark.parametrize(
    ("change", "check", "where"),
    [
        (scaled(30, "attn.", "mlp."), "A3", "blocks."),
        (scaled(30, "blocks.1.mlp.up", parts=("model",)), "A3", "blocks.1.mlp.up.weight"),
        (scaled(1500, "head.weight"), "A1", "head.weight codebook"),
        (scaled(40, "norm2"), "A5", "norm2"),
        (scaled(20, "q_norm", "k_norm"), "A2", "attn.q_norm.weight"),
        (scaled(30, "embed"), "A4", "embed.weight"),
        (scaled(0, ""), "A3", "blocks."),
        (lambda c: c["guard"].update(recent_ce=[1.0, 27.0, 3.0, 2.0]), "H1", "codebook 1"),
    ],
)
def test_what_a_file_holds_tells_that_it_diverged(change, check, where, lone):
    run, text, code = ask(harm(lone, change), "--no-probe")
    assert (run["verdict"], code) == ("DIVERGED", 3), text
    assert where in grave(run)[check]
    assert "restore a backup" not in text


def test_one_head_is_told_from_the_others(lone):
    def drift(content: Content) -> None:
        for part in ("model", "ema"):
            rows = content[part]["head.weight"].unflatten(0, (4, -1))
            rows[2] += 6 * rows.norm(dim=2).max() * torch.ones(32) / 32**0.5

    run, text, _ = ask(harm(lone, drift), "--no-probe")
    assert run["verdict"] == "DIVERGED", text
    assert grave(run)["A1"] == "head.weight codebook 2"


def test_losses_of_its_own_history_count_where_the_guard_tells_nothing(lone):
    def explode(content: Content) -> None:
        content["guard"]["recent_ce"] = []
        for row in content["history"]:
            row.update({"loss": 27.0} if row["event"] == "step" else {})

    run, _, _ = ask(harm(lone, explode), "--no-probe")
    assert run["verdict"] == "DIVERGED"
    assert "H1" in grave(run)


def test_a_file_that_was_set_aside_is_judged_where_it_is_all_there_is(lone):
    aside = lone.with_name("rvq_4cb_quarantine_s00000200.pt")
    shutil.move(harm(lone, scaled(30, "attn.", "mlp.")), aside)
    run, text, code = ask(aside, "--no-probe")
    assert (run["verdict"], code) == ("DIVERGED", 3), text


# --- the way on ----------------------------------------------------------------------------------


def test_where_only_the_raw_weights_are_lost_the_average_starts_a_new_run(lone):
    run, _, _ = ask(harm(lone, scaled(30, "attn.", "mlp.", parts=("model",))), "--no-probe")
    assert "--init-from" in run["command"]
    code, output = run_trainer(*shlex.split(run["command"])[2:], "--max-steps", "2", timeout=200)
    assert code == 0, output


def test_where_nothing_is_sound_the_command_trains_anew_at_a_lower_rate(lone):
    run, text, _ = ask(harm(lone, scaled(30, "attn.", "mlp.")), "--no-probe")
    assert "averaged weights included" in text
    assert "*_previous.pt" in text
    words = shlex.split(run["command"])
    assert "--init-from" not in words
    assert float(words[words.index("--lr") + 1]) < 3e-3
    device = ("--device", "cpu", "--num_workers", "0", "--eval-audio-every", "0")
    code, output = run_trainer(*words[2:], *device, "--max-steps", "2", timeout=200)
    assert code == 0, output
    (latest,) = (lone.parent / "anew").glob("*_latest.pt")
    assert content_of(latest)["architecture"]["d_model"] == 32


def test_a_new_runs_command_has_only_flags_that_this_version_takes(lone):
    """Saved by a version with --depth-layers, before --optim and --pattern; with a low rate."""

    def age(content: Content) -> None:
        scaled(30, "attn.", "mlp.")(content)
        content["flags"] |= {"depth_layers": 2, "eta_min": 2e-5, "lr": 3e-5, "amp": False}
        del content["flags"]["optim"], content["flags"]["pattern"]

    run, _, _ = ask(harm(lone, age), "--no-probe")
    flags, _ = parse_flags(shlex.split(run["command"])[2:])
    assert (flags.optim, flags.pattern, flags.amp) == ("adamw", "parallel", False)
    assert (flags.lr, flags.eta_min) == (1.5e-5, 1.5e-5)


# --- run on its own data -------------------------------------------------------------------------


def permute_head(content: Content) -> None:
    """Every code gets another's row: nothing in sizes tells."""
    for part in ("model", "ema"):
        rows = content[part]["head.weight"].unflatten(0, (4, -1))
        rows.copy_(rows.roll(7, 1).clone())


def test_it_is_run_on_its_own_data_without_being_asked(lone):
    run, text, _ = ask(lone)
    assert "Run on 4 windows of its own data" in text
    (file,) = run["files"]
    assert len(file["probe"]["raw"]["ce"]) == 4
    assert run["verdict"] == "HEALTHY"
    run, text, _ = ask(lone, "--no-probe")
    assert "own data" not in text
    assert run["files"][0]["probe"] is None
    harm(lone, permute_head)
    assert ask(lone, "--no-probe")[0]["verdict"] == "HEALTHY", "only running it can tell"
    run, text, code = ask(lone)
    assert (run["verdict"], code) == ("DIVERGED", 3), text
    assert "P1" in grave(run)


def test_relative_data_is_found_from_the_folder_of_the_run(lone, tunes, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(tunes, home / "codes")
    (home / "ckpts").mkdir()
    path = Path(shutil.copy(lone, home / "ckpts"))
    harm(path, lambda c: c["flags"].update(data=["codes/*.npq"], save_dir="ckpts"))
    assert "Run on 4 windows" in ask(path, cwd=tmp_path)[1]
    assert "Run on 4 windows" in ask(path, cwd=home)[1]


def test_where_it_cannot_be_run_the_reason_is_said(lone, tunes, tmp_path):
    assert "name no data" in ask(harm(lone, lambda c: c["flags"].update(data=None)))[1]
    harm(lone, lambda c: c["flags"].update(data=["/nowhere/x.npq"]))
    run, text, _ = ask(lone)
    assert "Not run on its own data" in text
    assert "/nowhere/x.npq" in text
    assert run["verdict"] == "HEALTHY", "that is no fault of the file"
    other = tmp_path / "other"
    shutil.copytree(tunes, other)
    (other / "0.npq").unlink()
    harm(lone, lambda c: c["flags"].update(data=[str(other)]))
    assert "has changed since" in ask(lone)[1]


def test_nothing_but_regular_npq_files_is_opened(lone, tmp_path):
    os.mkfifo(tmp_path / "pipe.npq")
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    os.utime(secret, (1, 1))
    for data in (["/dev/zero"], [str(tmp_path / "pipe.npq")], [str(secret)], [str(tmp_path)], [7]):
        harm(lone, lambda c, data=data: c["flags"].update(data=data))
        started = time.monotonic()
        run, text, _ = ask(lone)
        assert "Not run on its own data" in text
        assert "hunter2" not in text
        assert run["verdict"] == "HEALTHY"
        assert time.monotonic() - started < 60


# --- the older script ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old_run(tmp_path_factory) -> tuple[Content, Path]:
    """A checkpoint of the older script, really trained, and its data."""
    folder = tmp_path_factory.mktemp("old")
    rng = np.random.default_rng(0)
    for i in range(3):
        notes = rng.integers(16, size=100).repeat(4)
        codes = np.stack([notes, (5 * notes + 3) % 16, (3 * notes + 1) % 16], 1)
        write_npq(folder / f"{i}.npq", codes, vocab_sizes=[16] * 3, frame_rate=86.0)
    return train_old(Old("", steps=250, lr=3e-3), folder), folder


def test_the_old_models_forward_pass_is_its_own(old_run):
    content, _ = old_run
    model = OldModel([16] * 3, heads=2, ctx=32).eval()
    model.load_state_dict(content["model"])
    codes = torch.randint(16, (20, 3))
    expected = torch.stack([x[0] for x in model(codes[None])], 1)
    found = old_logits(content["model"], codes, heads=2, activation=torch.nn.functional.gelu)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_old_layout_is_run_too(old_run, tmp_path):
    content, data = old_run
    path = tmp_path / "rvq_3cb_latest.pt"
    torch.save(content, path)
    run, text, code = ask(path, "--probe-data", data)
    assert (run["verdict"], code) == ("HEALTHY", 0), text
    ce = run["files"][0]["probe"]["raw"]["ce"]
    assert max(ce) < 2.0, "guessing gives 2.77"
    assert "no fingerprint" in ask(path)[1]
    for k in range(3):
        weight = content["model"][f"heads.{k}.weight"]
        content["model"] = {**content["model"], f"heads.{k}.weight": weight.roll(5, 0)}
    torch.save(content, path)
    assert ask(path)[0]["verdict"] == "HEALTHY", "only running it can tell"
    run, text, code = ask(path, "--probe-data", data)
    assert (run["verdict"], code) == ("DIVERGED", 3), text
    assert "P1" in grave(run)


def test_the_issues_own_old_file_is_diverged_and_its_head_is_named(old_run, tmp_path):
    content, _ = old_run
    content = {**content, "model": dict(content["model"]), "ema": dict(content["ema"])}
    scaled(30, "attn.", "mlp.")(content)
    scaled(1500, "heads.1.weight")(content)
    path = tmp_path / "rvq_3cb_latest.pt"
    torch.save(content, path)
    run, text, code = ask(path)
    assert (run["verdict"], code) == ("DIVERGED", 3), text
    assert "heads.1.weight" in grave(run)["A1"]
    assert "restore a backup" not in text
