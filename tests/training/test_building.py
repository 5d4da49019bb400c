"""training/building.py and a run with --labels: what it keeps, adds, refuses, and learns."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from kit.checkpoints import assert_same_tensors, comparable
from kit.trainer import TINY, make_run, rows, train

import train_rvq
from cli.device import PRECISIONS
from run_folder.checkpoint import load_checkpoint
from run_folder.shared_weights import export_weights, load_parts
from training.building import pick_amp_dtype, plan_of

FOLDERS = ("--labels", "folders")


def test_every_precision_that_a_run_can_save_is_one_that_a_command_can_give():
    for name in PRECISIONS:
        flags = train_rvq.parse_flags(["--amp-dtype", name])[0]
        assert pick_amp_dtype(flags, torch.device("cpu")) is PRECISIONS[name]


def test_every_window_has_the_label_of_its_file(halves, tmp_path):
    run = make_run("--data", halves, "--save_dir", tmp_path, *FOLDERS, "--num_workers", "2")
    assert run.state.model.config.labels == ("high", "low")
    for windows in (run.loader, run.loader.read(run.val_windows, np.arange(4)[:, None])):
        for codes, labels in windows:
            assert labels.tolist() == [[int(low)] for low in (codes < 8).all((1, 2))]


@pytest.mark.parametrize("pattern", ["parallel", "delay", "depth"])
def test_a_labelled_run_resumes_exactly_and_val_is_told_with_labels_and_without(
    pattern, halves, tmp_path
):
    flags = ("--data", halves, *FOLDERS, "--epochs", "2", "--pattern", pattern)
    whole = train(*flags, "--save_dir", tmp_path / "whole", "--no-amp")
    for cut in (1, 7, whole["progress"]["step"]):
        save_dir = tmp_path / f"cut{cut}"
        train(*flags, "--save_dir", save_dir, "--no-amp", stop_at=cut)
        resumed = train("--data", halves, "--save_dir", save_dir, "--no-amp")  # labels are kept
        assert_same_tensors(comparable(resumed), comparable(whole))
    assert whole["architecture"]["labels"] == ["high", "low"]
    assert whole["model"]["label_embed.weight"].all()

    run = make_run(*flags, "--save_dir", tmp_path / "whole", "--no-amp")
    numbers = np.arange(len(run.val_windows))
    codes, labels = run.val_windows[numbers].long(), run.val_windows.labels_of(numbers)
    with torch.no_grad():
        told = run.state.ema.model.losses(codes, labels=labels).ce.mean().item()
        not_told = run.state.ema.model.losses(codes).ce.mean().item()
    row = rows(tmp_path / "whole", "epoch")[-1]
    assert row["val"] == pytest.approx(told, rel=1e-5)
    assert row["val_unlabelled"] == pytest.approx(not_told, rel=1e-5)
    assert told != not_told


def test_label_dropout_is_part_of_the_run(halves, tmp_path):
    flags = ("--data", halves, *FOLDERS, "--max-steps", "3", "--save_dir")
    with_, without = (
        train(*flags, tmp_path / rate, "--label-dropout", rate)["model"] for rate in ("0.5", "0")
    )
    assert not torch.equal(with_["head.weight"], without["head.weight"])


def test_a_run_without_labels_has_none_of_their_traces(tunes, tmp_path):
    saved = train("--data", tunes, "--save_dir", tmp_path, "--epochs", "1")
    assert "labels" not in saved["architecture"]
    assert "label_embed.weight" not in saved["model"]
    assert "val_unlabelled" not in rows(tmp_path, "epoch")[-1]


def test_other_labels_are_refused_by_name(halves, tmp_path, capsys):
    data, csv = shutil.copytree(halves, tmp_path / "data"), tmp_path / "x.csv"
    listed = [f"{half}/{i}.npq,{half}\n" for half in ("high", "low") for i in range(3)]
    csv.write_text("".join(listed))
    flags = ("--data", data, "--save_dir", tmp_path / "run", "--epochs", "2")
    train(*flags, *FOLDERS, stop_at=3)
    argv = [*TINY, *map(str, flags), "--labels"]

    def complaint(*more: str | Path) -> str:
        assert train_rvq.main([*argv, *map(str, more)]) == 1
        return capsys.readouterr().err

    csv.write_text("".join(reversed(listed[1:])) + "high/0.npq,low\n")  # a file's own
    assert "the data is not the data of the saved run (labels " in complaint(csv)
    csv.write_text("".join(listed) + "".join(listed[:1]).replace("high/0", "low/9"))
    csv.write_text(csv.read_text().replace("low/0.npq,low", "low/0.npq,new"))
    for more in ((), ("--allow-data-change",)):
        said = complaint(csv, *more)
        assert "unknown label 'new'; the model knows 'high', 'low'; restore --labels" in said
    csv.write_text("".join(listed))  # the same labels, said otherwise
    train(*flags, "--labels", csv, stop_at=5)
    csv.write_text("".join(listed[3:]))  # fewer: numbers are those of the model
    run = make_run(*flags, "--labels", csv, "--allow-data-change")
    assert set(run.train_windows.labels.flatten().tolist()) == {-1, 1}


def test_labels_for_a_run_without_are_refused(halves, tmp_path, capsys):
    flags = ("--data", halves, "--save_dir", tmp_path, "--epochs", "2")
    train(*flags, stop_at=3)
    assert train_rvq.main([*TINY, *map(str, flags), *FOLDERS]) == 1
    said = capsys.readouterr().err
    assert "the model knows none: it was trained without --labels" in said
    assert "start a new run with --init-from" in said


def test_init_from_adds_labels_and_keeps_the_rows_of_equal_names(halves, tmp_path, capsys):
    train("--data", halves, "--save_dir", tmp_path / "a", "--epochs", "1")
    plain = load_checkpoint(tmp_path / "a" / "rvq_4cb_best.pt")
    flags = ("--data", halves, "--epochs", "1", "--init-from")
    saved = train(
        *flags, tmp_path / "a" / "rvq_4cb_best.pt", "--save_dir", tmp_path / "b", *FOLDERS,
        stop_at=1,
    )  # fmt: skip
    assert "labels   not known by --init-from's weights: high, low\n" in capsys.readouterr().out
    run = make_run(
        *flags, tmp_path / "a" / "rvq_4cb_best.pt", "--save_dir", tmp_path / "c", *FOLDERS
    )
    begun = dict(run.state.model.state_dict())
    assert not begun.pop("label_embed.weight").any()
    assert_same_tensors(begun, dict(plain["ema"]))

    train("--data", halves, "--save_dir", tmp_path / "b", "--epochs", "1")
    saved = load_checkpoint(tmp_path / "b" / "rvq_4cb_latest.pt")
    shared = export_weights(saved, tmp_path / "b.safetensors", tell=lambda _: None)
    other = shutil.copytree(halves / "low", tmp_path / "data" / "low").parent
    shutil.copytree(halves / "high", other / "aaa")
    capsys.readouterr()
    run = make_run("--data", other, "--init-from", shared, "--save_dir", tmp_path / "d", *FOLDERS)
    begun = run.state.model.state_dict()["label_embed.weight"]
    assert torch.equal(begun[1], saved["ema"]["label_embed.weight"][1])
    assert not begun[0].any()
    said = capsys.readouterr().out
    assert "labels   not known by --init-from's weights: aaa\n" in said
    assert "labels   left out, though known by --init-from's weights: high\n" in said
    assert load_parts(shared, needed={"architecture"})["architecture"]["labels"] == ["high", "low"]

    run = make_run("--data", halves, "--init-from", shared, "--save_dir", tmp_path / "e")
    assert run.state.model.label_embed is None
    assert "left out, though known by --init-from's weights: high, low\n" in capsys.readouterr().out


def test_a_plan_counts_the_labels(halves, tmp_path):
    weights = []
    for flags in ((), FOLDERS):
        run = make_run("--data", halves, "--save_dir", tmp_path / f"{len(flags)}", *flags)
        memory = plan_of(run.flags, run.state.model.config, run.device).predict()
        weights.append([memory.parts[part] for part in ("weights", "gradients", "EMA")])
    assert [b - a for a, b in zip(*weights, strict=True)] == [2 * 32 * 4] * 3
