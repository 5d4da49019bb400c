"""The names that a run gives its checkpoints are those by which they are known again."""

from __future__ import annotations

import torch

from run_folder.files import RunFiles
from run_folder.names import checkpoint_name


def test_every_name_that_a_run_gives_is_known(tmp_path):
    files = RunFiles(tmp_path, "rvq_9cb_x_best")
    for _ in range(2):
        files.save({"model": torch.ones(3)}, best_epoch=3, archive_epoch=4, ring_step=7)
    files.quarantine({"model": torch.ones(3)}, 7, "why")
    told = {checkpoint_name(path) for path in tmp_path.glob("*.pt")}
    assert {name.run for name in told} == {"rvq_9cb_x_best"}
    assert {(name.kind, name.epoch) for name in told} == {
        *((kind, None) for kind in ("latest", "previous", "best", "ring", "quarantine")),
        *(("best archive", 3), ("archive", 4)),
    }


def test_names_of_older_versions_and_of_others():
    assert checkpoint_name("a/rvq_9cb_panic_s00000012.pt") == ("rvq_9cb", "panic", None)
    twice = "rvq_9cb_epoch_e0355__20250801-101112-2.pt"  # in one second
    assert checkpoint_name(twice) == ("rvq_9cb", "archive", 355)
    assert checkpoint_name("model.pt") == ("", "other", None)
