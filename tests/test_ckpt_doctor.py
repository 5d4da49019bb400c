"""ckpt_doctor.py as its users run it: real runs, real faults, real processes; its command too."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import processes
from kit.planted_faults import MUON_FAULTS, copy_run, plant, train
from kit.trainer import ROOT, TINY, rows, run_doctor, run_trainer, wait_for

from ckpt_doctor import ExitCode, build_parser, find_checkpoints
from doctor.checks.metrics import check_learning_rate
from doctor.diagnosis import diagnose
from doctor.examined_run import ExaminedRun, scheduled_lr
from doctor.reading.reader import summarize
from doctor.reading.summary import Summary
from doctor.report.terminal import terminal_lines
from run_folder.checkpoint import load_checkpoint
from run_folder.files import save_checkpoint
from run_folder.metrics import RunMetrics

EPOCHS = 8
ADAMW = ("--optim", "adamw", "--lr", "3e-3", "--pattern", "parallel")


@pytest.fixture(scope="session")
def healthy_run(tunes, tmp_path_factory) -> Path:
    """The folder of a run of eight epochs with --optim adamw and an archive of each."""
    folder = tmp_path_factory.mktemp("doctor") / "run"
    flags = ("--epochs", EPOCHS, "--archive-every", 1, "--step", 4, *ADAMW)
    code, output = run_trainer(*TINY, "--data", tunes, "--save_dir", folder, *flags)
    assert code == 0, output
    return folder


@pytest.fixture
def run_folder(healthy_run, tmp_path) -> Path:
    """A copy of it, to be harmed; without hard links, so that a file is harmed alone."""
    shutil.copytree(healthy_run, tmp_path / "run")
    return tmp_path / "run"


def muon_run_of(seed: int, tunes: Path, folder: Path) -> Path:
    """A run of six epochs with --optim muon and an archive of each."""
    flags = ["--data", str(tunes), "--save_dir", str(folder), "--seed", str(seed), *TINY]
    flags += ["--epochs", "6", "--archive-every", "1", "--step", "4", "--optim", "muon"]
    flags += ["--pattern", "parallel"]
    assert train(flags, None, folder.with_name(f"log{seed}")) == 0
    return folder


@pytest.fixture(scope="session")
def muon_run(tunes, tmp_path_factory) -> Path:
    return muon_run_of(0, tunes, tmp_path_factory.mktemp("doctor") / "muon")


@pytest.fixture(scope="session")
def other_muon_run(tunes, tmp_path_factory) -> Path:
    """Of the same shape with another seed."""
    return muon_run_of(1, tunes, tmp_path_factory.mktemp("doctor") / "other")


def findings(folder: Path, tmp_path: Path, *words: str | Path) -> dict[str, Any]:
    """The JSON report of the only run in a folder."""
    run_doctor(folder, "--json", tmp_path / "report.json", *words)
    (run,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    return run


def harm(folder: Path, change: Any, *, from_epoch: int) -> None:
    """Change every checkpoint from an epoch on, as if training had gone on from there."""
    for path in sorted(folder.glob("*.pt")):
        checkpoint = load_checkpoint(path)
        if checkpoint["progress"]["epoch"] >= from_epoch:
            change(checkpoint)
            save_checkpoint({k: v for k, v in checkpoint.items() if k != "format"}, path)


def digest(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of each file."""
    return {
        p.name: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in folder.iterdir()
        if p.is_file()
    }


# --- verdicts ------------------------------------------------------------------------------------


def test_a_healthy_run_is_healthy_and_left_as_it_was(healthy_run, tmp_path):
    before = digest(healthy_run)
    done = run_doctor(
        healthy_run, "--html", tmp_path / "a.html", "--csv", tmp_path / "a.csv",
        "--json", tmp_path / "a.json",
    )  # fmt: skip
    assert done.returncode == ExitCode.HEALTHY, done.stdout
    assert "VERDICT: HEALTHY" in done.stdout
    assert "HEALTHY" in (tmp_path / "a.html").read_text()
    assert (tmp_path / "a.csv").read_text().count("\n") > 100
    assert digest(healthy_run) == before


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_run_whose_rows_forget_is_healthy(optim, tunes, tmp_path):
    """In ten steps, the shortest memory: their moments do not tell where they went."""
    rate = 3e-4 * (25 if optim == "muon" else 1)
    flags = ("--epochs", 8, "--archive-every", 1, "--step", 4, "--optim", optim)
    flags += ("--pattern", "parallel", "--row-decay", 0.1 / rate, "--save_dir", tmp_path / "run")
    code, output = run_trainer(*TINY, "--data", tunes, *flags)
    assert code == 0, output
    assert run_doctor(tmp_path / "run").returncode == ExitCode.HEALTHY


def test_the_printed_command_is_what_a_shell_takes_whatever_the_folder_is_called(good, tmp_path):
    folder = tmp_path / "two\nlines 'and' \udcff"
    folder.mkdir()
    path = good.rename(folder / good.name)
    said = run_doctor(folder, "--no-probe").stdout
    (command,) = re.findall("^RESUME WITH: (.*)$", said, re.MULTILINE)
    script = f"set -- {command}; printf '%s\\0' \"$@\""
    words = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    assert os.fsencode(path) in words.split(b"\0")


def test_a_healthy_run_with_muon_is_healthy_and_says_who_trained_it(muon_run, tmp_path):
    done = run_doctor(muon_run, "--html", tmp_path / "a.html", "--json", tmp_path / "a.json")
    assert done.returncode == ExitCode.HEALTHY, done.stdout
    assert "Muon + AdamW" in done.stdout
    page = (tmp_path / "a.html").read_text()
    assert "Muon + AdamW" in page
    assert "momentum, RMS" in page
    (run,) = json.loads((tmp_path / "a.json").read_text())["runs"]
    methods = [g["method"] for g in run["files"][-1]["optimizer"]["groups"]]
    assert methods[0] == "Muon"
    assert methods[-1] == "AdamW"


@pytest.mark.parametrize("pattern", ["delay", "depth"])
def test_a_healthy_run_of_another_pattern_is_healthy_with_a_probe_too(pattern, tunes, tmp_path):
    folder = tmp_path / "run"
    flags = ("--epochs", 6, "--archive-every", 1, "--optim", "muon")
    code, output = run_trainer(
        *TINY, "--data", tunes, "--save_dir", folder, *flags, "--pattern", pattern
    )
    assert code == 0, output
    done = run_doctor(folder, "--probe-data", tunes, "--json", tmp_path / "report.json")
    assert done.returncode == ExitCode.HEALTHY, done.stdout
    (run,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    grave = [f for f in run["findings"] if f["level"] not in ("info", "warn")]
    assert not grave
    assert all(len(f["probe"]["ema"]["ce"]) == 4 for f in run["files"])


QUICK_FAULTS = ("NaN in a momentum", "a momentum zeroed", "lr of Muon's group x 10")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK_FAULTS else pytest.param(n, marks=pytest.mark.slow) for n in MUON_FAULTS],
)
def test_faults_in_muons_state_are_found(name, muon_run, request, tmp_path):
    copy_run(muon_run, tmp_path / "run")
    fault, rng = MUON_FAULTS[name], np.random.default_rng(5)
    foreign = muon_run
    if name == "momentum of another run":
        foreign = request.getfixturevalue("other_muon_run")
    truth = plant(tmp_path / "run", fault, foreign, rng)
    run = findings(tmp_path / "run", tmp_path)
    grave = [f for f in run["findings"] if f["level"] not in ("info", "warn")]
    named = {f["check"] for f in grave if Path(f["path"] or "").name in truth.bad}
    assert named & set(fault.causes), grave
    assert {Path(f["path"]).name for f in grave if f["path"]} <= truth.bad, "a sound file blamed"
    assert Path(run["last_healthy"]).name not in truth.bad


def explode(checkpoint: dict[str, Any]) -> None:
    """What a blow-up leaves behind."""
    checkpoint["model"]["blocks.1.attn.qkv.weight"] *= 30
    checkpoint["model"]["head.weight"] *= 30


def explode_metrics(folder: Path, from_epoch: int) -> int:
    """The user's case: loss explodes in an epoch, CE of codebooks spikes; the step of it."""
    (path,) = folder.glob("*_metrics.jsonl")
    written = []
    onset = next(r["step"] for r in rows(folder, "epoch") if r["epoch"] == from_epoch - 1) + 20
    for row in rows(folder):
        if row["event"] == "step" and row["step"] >= onset:
            row["loss"] = 10.0 + row["step"] - onset
            row["grad_norm"] = 1e4
        if row["event"] == "epoch" and row["epoch"] >= from_epoch:
            row.update(val=1e6, train=50.0, ppl=None, val_per_codebook=[4.0, 1e6, 1e6, None])
        written.append(json.dumps(row))
    path.write_text("\n".join(written) + "\n")
    return onset


def test_the_users_blow_up_is_dated_and_its_command_trains_on(healthy_run, run_folder, tmp_path):
    harm(run_folder, explode, from_epoch=6)
    onset = explode_metrics(run_folder, 6)
    done = run_doctor(run_folder, "--html", tmp_path / "r.html", "--json", tmp_path / "report.json")
    assert done.returncode == ExitCode.DIVERGED, done.stdout
    (run,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert onset - 10 <= run["onset"]["first_bad_step"] <= onset + 10
    assert "e0005" in run["last_healthy"]
    command = run["command"]
    assert f"RESUME WITH: {command}" in done.stdout, "one line, as it must be typed"

    words = shlex.split(command)
    assert words[:2] == ["python", "train_rvq.py"]
    code, output = run_trainer(*words[2:])
    assert code == 0, output
    clean, saved = rows(healthy_run, "epoch")[-1]["val"], rows(run_folder, "epoch")[-1]["val"]
    assert saved < clean + 0.1, (saved, clean)
    again = run_doctor(run_folder)
    assert again.returncode == ExitCode.HEALTHY, "the files of the lost course are not held against"


def test_one_bad_archive_is_named_and_the_run_goes_on_from_its_newest_file(run_folder, tmp_path):
    (path,) = run_folder.glob("*_epoch_e0004__*.pt")
    checkpoint = load_checkpoint(path)
    checkpoint["model"]["blocks.0.mlp.up.weight"][3, 5] = float("nan")
    save_checkpoint({k: v for k, v in checkpoint.items() if k != "format"}, path)
    done = run_doctor(run_folder)
    assert done.returncode == ExitCode.DIVERGED
    assert "blocks.0.mlp.up.weight" in done.stdout
    assert "latest.pt" in done.stdout.splitlines()[-1]


class Payload:
    """A pickle that would create a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.canary))}",)


def test_a_malicious_file_costs_a_row_and_never_runs(run_folder, tmp_path):
    canary = tmp_path / "canary"
    with zipfile.ZipFile(run_folder / "rvq_4cb_epoch_e0099__20260101-000000.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(canary), protocol=2))
        archive.writestr("archive/version", "3")
    (run_folder / "plain.pt").write_bytes(pickle.dumps(Payload(canary)))
    (run_folder / "cut.pt").write_bytes((run_folder / "rvq_4cb_latest.pt").read_bytes()[:-900])
    os.mkfifo(run_folder / "pipe.pt")
    (run_folder / "dangling.pt").symlink_to("nowhere")
    done = run_doctor(run_folder)
    assert not canary.exists()
    assert done.returncode == ExitCode.CORRUPT
    for said in ("UNSAFE", "posix.system", "cut.pt", "pipe.pt", "dangling.pt", "latest.pt"):
        assert said in done.stdout, said
    assert done.stdout.splitlines()[-1].startswith("RESUME WITH: python train_rvq.py --resume")


def test_what_the_trainer_set_aside_itself_is_no_verdict_on_the_run(run_folder):
    checkpoint = load_checkpoint(run_folder / "rvq_4cb_latest.pt")
    checkpoint["model"]["blocks.0.mlp.up.weight"].fill_(float("nan"))
    aside = run_folder / "rvq_4cb_quarantine_s00000200.pt"
    save_checkpoint({k: v for k, v in checkpoint.items() if k != "format"}, aside)
    done = run_doctor(run_folder)
    assert done.returncode == ExitCode.HEALTHY, done.stdout
    assert "set this file aside" in " ".join(done.stdout.split())


def test_nothing_usable(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"")
    done = run_doctor(tmp_path)
    assert done.returncode == ExitCode.NOTHING
    assert "RESUME WITH" not in done.stdout


def test_old_checkpoints_are_diagnosed_as_far_as_the_checks_apply(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({
        "embeds": torch.nn.ModuleList(torch.nn.Embedding(64, 32) for _ in range(4)),
        "ln_f": torch.nn.LayerNorm(32),
        "heads": torch.nn.ModuleList(torch.nn.Linear(32, 64) for _ in range(4)),
    })  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in (10, 20, 30):
        sum((p * torch.randn_like(p)).sum() for p in model.parameters()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if epoch == 30:
            model["heads"][2].weight.data[5, 5] = float("inf")
        torch.save(
            {"model": model.state_dict(), "opt": optimizer.state_dict(), "epoch": epoch,
             "global_step": epoch * 100, "best_val": 4.5, "vocab_sizes": [64] * 4,
             "cfg": {"lr": 1e-3}, "saved_at": "2025-08-01", "scaler": {}, "scheduler": {}},
            tmp_path / f"rvq_4cb_epoch_e{epoch:04d}__20250801-00000{epoch // 10}.pt",
        )  # fmt: skip
    done = run_doctor(tmp_path)
    assert done.returncode == ExitCode.DIVERGED, done.stdout
    assert "heads.2.weight" in done.stdout
    assert "e0020" in next(x for x in done.stdout.splitlines() if x.startswith("LAST HEALTHY"))
    assert "RESUME WITH" not in done.stdout, "train_rvq.py cannot take these weights over"


# --- the probe, comparing ------------------------------------------------------------------------


def test_the_probe_finds_what_only_running_the_model_shows(run_folder, tunes, tmp_path):
    def turn(checkpoint: dict[str, Any]) -> None:
        head = checkpoint["model"]["head.weight"].unflatten(0, (4, 64))
        head[2] = head[2].roll(7, 0)  # the same rows, each of another code
        ema = checkpoint["ema"]["head.weight"].unflatten(0, (4, 64))
        ema[2] = ema[2].roll(7, 0)

    harm(run_folder, turn, from_epoch=7)
    run = findings(run_folder, tmp_path, "--probe-data", tunes)
    found = [f for f in run["findings"] if f["check"] == "P1"]
    assert found, run["findings"]
    assert "e0006" in run["last_healthy"]


# --- manners -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: PATH"),
        (["nowhere"], "no such file"),
        (["."], "no checkpoint in this folder"),
        (["here/[x]*.pt"], "where [ is a letter of a name, write [[]: 'here/[[]x]*.pt'"),
        (["{run}", "--metrics", "nowhere"], "--metrics nowhere: no such file"),
        (["{run}", "--probe-data", "nowhere"], "--probe-data"),
        (["{run}", "--html", "nowhere/x.html"], "no such folder"),
        (["{run}", "--probe-windows", "0"], "a whole number >= 1"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(healthy_run, words, said, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "[x].pt").touch()
    done = run_doctor(*[w.format(run=healthy_run) for w in words], cwd=tmp_path)
    assert done.returncode == ExitCode.USAGE
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_quoted_glob_of_folders_is_what_a_shell_makes_of_it(healthy_run, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(healthy_run / "rvq_4cb_latest.pt", tmp_path / name / "rvq_4cb_latest.PT")
    found = [str(tmp_path / name / "rvq_4cb_latest.PT") for name in ("a", "b")]
    assert find_checkpoints([f"{tmp_path}/*"]) == find_checkpoints([f"{tmp_path}/[ab]/*"]) == found


def test_json_on_standard_output_is_json_alone(healthy_run):
    assert (
        json.loads(run_doctor(healthy_run, "--json", "-").stdout)["runs"][0]["verdict"] == "HEALTHY"
    )


def test_a_reader_that_leaves_early_is_no_error(healthy_run):
    command = [sys.executable, str(ROOT / "ckpt_doctor.py"), healthy_run]
    _, first, errors = processes.run_and_leave(command)
    assert first
    assert errors == ""


@pytest.mark.parametrize("delay", [0, 0.001, 0.01])
def test_ctrl_c_ends_at_once_and_leaves_no_process(healthy_run, tmp_path, delay):
    """Also in the moment of a fork: the signal comes as soon as the first child is there."""
    many = [shutil.copy(healthy_run / "rvq_4cb_latest.pt", tmp_path / f"{i}.pt") for i in range(60)]
    process = processes.Popen(
        [sys.executable, str(ROOT / "ckpt_doctor.py"), *many],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not children.read_text().strip():
        pass  # a pause would miss the moment
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "Traceback" not in errors

    def is_gone() -> bool:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    wait_for(is_gone, 5)  # an orphan's last moment may outlive its parent's


def test_exit_codes_stand_in_the_help():
    text = build_parser().format_help()
    for code in ExitCode:
        assert re.search(rf"\b{int(code)}\s", text), code


# --- what the checks rest on ---------------------------------------------------------------------


def test_the_planned_lr_is_that_of_the_saved_flags():
    """Linear warm-up over 100 steps, constant, linear fall over the last 250, or 200, of 1000."""
    flags = {"lr": 3e-3, "eta_min": 2e-4, "warmup_ratio": 0.1}
    flags |= {"schedule": "wsd", "cooldown": 0.25}
    summary = Summary("x", "latest", None, style="own", flags=flags)
    summary.progress = {"schedule_steps": 1000, "lr_scale": 0.5}
    for step, lr in ((50, 1.5e-3), (749, 3e-3), (875, 1.6e-3), (1500, 2e-4)):
        assert scheduled_lr(summary, step) == pytest.approx(0.5 * lr, rel=1e-12)
    del flags["cooldown"]  # the default
    assert scheduled_lr(summary, 900) == pytest.approx(0.5 * 1.6e-3)
    del flags["schedule"]  # of a run from before there were two
    assert scheduled_lr(summary, 550) == pytest.approx(0.5 * 1.6e-3)


def test_each_groups_lr_is_held_against_its_own_multiple():
    flags = {"lr": 3e-3, "eta_min": 2e-4, "warmup_ratio": 0.1, "schedule": "wsd"}

    def said(*lrs: float) -> list[str]:
        summary = Summary("x", "latest", None, style="own", step=500, flags=flags)
        summary.progress = {"schedule_steps": 1000}
        groups = [
            {"method": m, "lr": lr, "lr_factor": f}
            for m, lr, f in zip(("Muon", "AdamW", "AdamW"), lrs, (10.0, 0.5, 1.0), strict=True)
        ]
        summary.optimizer = {"lr": 3e-3, "groups": groups}
        run = ExaminedRun("x", [summary], RunMetrics([]))
        return [f"{f.level.name} {f.text}" for f in check_learning_rate(run)]

    assert said(3e-2, 1.5e-3, 3e-3) == []
    assert said(3e-2, 1.5e-3, 3.1e-3)[0].startswith("WARN lr 0.0031")
    assert said(3e-2, 3e-3, 3e-3)[0].startswith("SUSPECT lr 0.003")
    assert "Muon's group at 10 times the run's" in said(3e-3, 1.5e-3, 3e-3)[0]


@pytest.mark.parametrize(
    "row",
    [
        {"event": "step", "step": 5}, {"event": "step", "step": True, "loss": 1},
        {"event": "step", "step": 10**400}, {"event": "epoch", "step": 3, "val_per_codebook": 7},
        {"event": "epoch", "step": 3, "val": "x", "epoch": []}, {"event": 3, "step": 3},
        {"event": "resume", "step": 3, "flags": 7}, {"event": "skip", "step": 3, "reason": None},
        {"event": "step", "step": 6, "loss": 1e308, "lr": "nan", "grad_norm": []}, {"step": 1},
        {"event": "rollback", "step": 9, "to_step": "x"},
    ],
)  # fmt: skip
def test_hostile_metrics_rows_are_survived(row, healthy_run):
    summary = summarize(healthy_run / "rvq_4cb_latest.pt")
    run = ExaminedRun("x", [summary], RunMetrics([*rows(healthy_run), row]))
    lines = terminal_lines(diagnose(run), colour=False)
    assert any(line.startswith(("VERDICT: HEALTHY", "VERDICT: SUSPECT")) for line in lines)
