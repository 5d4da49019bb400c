"""Exact resuming: cut at every step, with and without reading ahead, accumulation and amp."""

from __future__ import annotations

import pytest
from kit.checkpoints import assert_same_tensors, comparable
from kit.trainer import train


def cut_and_compare(tunes, folder, cuts, epochs: int, *flags: str) -> int:
    """Fault 14: the number of cuts; the end of each is that of the whole run, bit for bit."""
    flags = ("--data", tunes, "--epochs", str(epochs), "--dropout", "0.2", *flags)
    whole = comparable(train(*flags, "--save_dir", folder / "whole"))
    moments = list(range(1, whole["progress"]["step"] + 1))[cuts]
    for n in moments:
        save_dir = folder / f"cut{n}"
        stopped = train(*flags, "--save_dir", save_dir, stop_at=n)
        assert stopped["progress"]["step"] == n
        assert_same_tensors(comparable(train(*flags, "--save_dir", save_dir)), whole)
    return len(moments)


def test_cut_in_the_second_epoch_with_workers_accumulation_and_no_amp(tunes, tmp_path):
    flags = ("--num_workers", "2", "--accum", "3", "--no-amp")
    assert cut_and_compare(tunes, tmp_path, slice(6, 7), 2, *flags) == 1


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["--amp", "--no-amp"])
@pytest.mark.parametrize("accum", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_cut_at_every_step_of_three_epochs(workers, accum, amp, tunes, tmp_path):
    flags = ("--num_workers", str(workers), "--accum", str(accum), amp)
    cuts = cut_and_compare(tunes, tmp_path, slice(None), 3, *flags)
    assert cuts == {1: 48, 3: 15}[accum]
