"""Places of tensors and kinds of files by their names; values that nobody vouches for."""

from __future__ import annotations

import math

import pytest
import torch

from doctor.reading import summary
from doctor.reading.summary import (
    Unreadable,
    as_count,
    as_number,
    as_whole,
    place_of,
    plain,
)


def test_old_names_sort_as_a_forward_pass_meets_them():
    order = [
        "embeds.0.weight", "embeds.1.weight", "bos", "pos.weight", "blocks.0.norm1.weight",
        "blocks.0.attn.qkv.weight", "blocks.0.attn.out.weight", "blocks.0.norm2.weight",
        "blocks.0.mlp.0.weight", "blocks.0.mlp.3.weight", "blocks.1.norm1.weight",
        "blocks.10.norm1.weight", "ln_f.weight", "heads.0.weight", "heads.10.weight",
    ]  # fmt: skip
    backwards = order[::-1]
    assert sorted(backwards, key=place_of) == order


def test_names_of_a_depth_transformer_and_unknown_ones():
    names = [
        *("blocks.0.mlp.down.weight", "norm.weight", "depth.embed.weight", "depth.proj.weight"),
        *("depth.blocks.0.attn.qkv.weight", "depth.blocks.1.norm1.weight", "depth.norm.weight"),
        *("head.weight", "lag"),
    ]
    places = [place_of(n) for n in names]
    assert places == sorted(places)
    assert places[4].role == "depth.attn.qkv"
    assert places[7].role == "head"
    for odd in ("depth", "depth.", "depth.depth.depth", "blocks.x", "depth.blocks..weight", ""):
        place_of(odd)


def test_more_values_than_a_report_can_hold_are_refused(monkeypatch):
    """However often one container is met."""
    monkeypatch.setattr(summary, "MOST_VALUES", 9)
    shared = [1, 2, 3]  # with itself four values
    assert plain([shared, shared]) == [shared, shared]
    with pytest.raises(Unreadable) as caught:
        plain([shared, shared, 1])
    assert "over 9 values" in caught.value.problem.text


def test_numbers_that_are_none_or_far_too_large():
    for value in (torch.tensor(1 + 2j), torch.ones(1, device="meta"), 10**400, "7", None, [1]):
        assert math.isnan(as_number(value)), value
    for value in (10**30, 1 << 53, -(1 << 53), math.inf, math.nan, 10**400):
        assert as_whole(value) is None
    assert [as_whole(v) for v in ((1 << 53) - 1, 2.9, torch.tensor(3))] == [(1 << 53) - 1, 2, 3]
    assert [as_count(v) for v in (-1, -5.5, 10**30, 0, 7)] == [None, None, None, 0, 7]
