"""Flags that are declared once: the parser, the model and what follows from the declaration."""

from __future__ import annotations

import itertools

import pytest

from model import PATTERNS
from run_folder.flags import FLAGS, command_words, names, saved_flags
from train_rvq import build_parser
from training.optimizer import ADAMW_FACTOR, MUON_FACTOR

DEFAULTS = vars(build_parser().parse_args([]))


def parsed(*words: str) -> dict:
    return vars(build_parser().parse_args(words))


def test_the_parser_has_these_flags_and_no_others():
    assert list(DEFAULTS) == ["debug", *FLAGS]


def test_what_stands_above_this_floor_is_repeated_rightly():
    assert FLAGS["pattern"].options["choices"] == PATTERNS
    told = FLAGS["optim"].options["help"]
    assert f"{MUON_FACTOR:g} x --lr" in told
    assert f"{ADAMW_FACTOR:g} x, less for a wide head" in told


def test_no_path_is_anybodys_business_but_a_codecs():
    assert [n for n in names("run", "architecture") if FLAGS[n].is_path] == ["eval_dac_repo"]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"data": ["a b", "c"], "jitter": False, "amp": False, "compile": False, "no_resume": True},
        {"cb_weights": "1,2", "eta_min": 0.0, "batch": "auto", "codebooks": 4, "report": False},
    ],
)
def test_words_are_read_back_as_the_values(given):
    values = {n: v for n, v in {**DEFAULTS, **given}.items() if n != "debug"}
    words = itertools.chain(*command_words(values))
    assert parsed(*words) == {**DEFAULTS, **given}


def test_a_run_of_before_a_flag_did_what_its_version_did():
    old = saved_flags({"flags": {"lr": 1.0}})
    before = {"jitter": False, "optim": "adamw", "pattern": "parallel"}
    assert old == {"lr": 1.0, **before, "code_vectors": False, "row_decay": 0.0}
    assert saved_flags({"flags": {"optim": "muon"}})["optim"] == "muon"
