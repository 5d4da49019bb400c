"""The probe's windows are of the files that it can run, whatever the others say of theirs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.checkpoints import content_of
from kit.trainer import run_doctor, train

from doctor.probe import probe
from doctor.reading.reader import summarize


def spoiled(good: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a file, changed."""
    content, path = content_of(good), good.with_name("rvq_4cb_previous.pt")
    change(content)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("ctx", [math.inf, 10**30, -3, 0, "x", None])
def test_a_file_with_an_odd_ctx_is_probed_like_the_others(ctx, good, tunes):
    odd = spoiled(good, lambda content: content["flags"].update(ctx=ctx))
    found = probe([summarize(odd), summarize(good)], [str(tunes)], windows=1)
    assert found[str(odd)] == found[str(good)]
    assert len(found[str(good)]["raw"]["ce"]) == 4


def test_a_file_that_does_not_fit_is_left_out_and_spoils_no_other(good, tunes):
    odd = spoiled(good, lambda content: content["architecture"].update(vocab_sizes=[64] * 7))
    found = probe([summarize(odd), summarize(good)], [str(tunes)], windows=1)
    assert list(found) == [str(good)]
    assert probe([summarize(odd)], [str(tunes)], windows=1) == {}, "not one that can be run"


@pytest.mark.parametrize("rate", ["0", "0.1"])
def test_a_model_with_labels_fits_and_is_probed_where_it_knows_music_without(
    rate, halves, tmp_path
):
    flags = ("--data", halves, "--labels", "folders", "--label-dropout", rate, "--max-steps", "2")
    train(*flags, "--save_dir", tmp_path)
    path = tmp_path / "rvq_4cb_latest.pt"
    summary = summarize(path)
    assert summary.mismatches == []
    assert {p.name: p.bad for p in summary.parameters}["label_embed.weight"] == {}
    assert list(probe([summary], [str(halves)], windows=1)) == [str(path)] * (rate != "0")
    note = "labels alone (--label-dropout 0)." if rate == "0" else "Run on 4 windows of its own"
    assert note in " ".join(run_doctor(path).stdout.split())
