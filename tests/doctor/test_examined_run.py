"""Rows of metrics that nobody vouches for."""

from __future__ import annotations

import pytest

from doctor.examined_run import History


@pytest.mark.parametrize("epoch", [10**400, 1 << 53, -(10**30), 1.5, "2", None, True, [1]])
def test_an_epoch_that_is_no_small_integer_is_left_out(epoch):
    (row,) = History([{"event": "epoch", "step": 3, "epoch": epoch, "val": 1.0}]).epochs
    assert "epoch" not in row
    assert row["val"] == 1.0
