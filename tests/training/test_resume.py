"""Resuming: exact weights, flags that win or stay, other data, longer and shorter plans."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from typing import Any

import numpy as np
import pytest
import torch
from kit.checkpoints import assert_same_tensors, comparable
from kit.trainer import TINY, make_run, rows, train

import train_rvq
from cli import command_line
from layers.loss import Losses
from run_folder.checkpoint import load_checkpoint
from run_folder.files import save_checkpoint
from run_folder.metrics import Console
from sound.npq_format import write_npq
from train_rvq import parse_flags
from training.resume import settle_data_change
from training.setup import set_up


def test_interrupted_at_every_step_ends_in_the_same_weights(tunes, tmp_path):
    """Fault 14, pitfall 18: bit for bit, cut after each of its steps and gone on every time."""
    flags = ("--data", tunes, "--epochs", "2", "--dropout", "0.2", "--save_dir")
    whole = comparable(train(*flags, tmp_path / "whole"))
    steps = whole["progress"]["step"]
    assert steps > 10
    for n in range(1, steps + 1):
        assert train(*flags, tmp_path / "cut", stop_at=n)["progress"]["step"] == n
    assert_same_tensors(comparable(train(*flags, tmp_path / "cut")), whole)
    trained = [[row["train"] for row in rows(tmp_path / d, "epoch")] for d in ("cut", "whole")]
    assert trained[0] == trained[1]


def test_interrupted_in_validation_saves_raw_weights_as_raw(tunes, tmp_path, monkeypatch):
    """Pitfall 19, fault 13."""
    flags = ("--data", tunes, "--epochs", "2", "--save_dir")
    whole = comparable(train(*flags, tmp_path / "whole"))
    run = make_run(*flags, tmp_path / "cut")
    model = run.state.ema.model
    losses = model.losses

    def interrupting(*args: Any) -> Losses:
        run.stop.signal = signal.SIGINT
        return losses(*args)

    monkeypatch.setattr(model, "losses", interrupting)
    assert train_rvq.train_or_save(run) == 130
    saved = load_checkpoint(run.files.latest)
    assert_same_tensors(dict(saved["model"]), dict(run.state.model.state_dict()))
    assert_same_tensors(comparable(train(*flags, tmp_path / "cut")), whole)


def test_a_damaged_latest_falls_back_and_still_ends_right(tunes, tmp_path, capsys):
    """Fault 4."""
    flags = ("--data", tunes, "--epochs", "3", "--save_dir")
    whole = comparable(train(*flags, tmp_path / "whole"))
    train(*flags, tmp_path / "cut", stop_at=20)
    latest = tmp_path / "cut" / "rvq_4cb_latest.pt"
    latest.write_bytes(latest.read_bytes()[:-1000])
    assert_same_tensors(comparable(train(*flags, tmp_path / "cut")), whole)
    assert "rvq_4cb_latest.pt: damaged" in capsys.readouterr().err


def test_explicit_flags_win_architecture_stays_and_the_banner_says_so(tunes, tmp_path, capsys):
    flags = ("--data", tunes, "--save_dir", tmp_path, "--epochs", "2")
    train(*flags, stop_at=3)
    capsys.readouterr()
    run = make_run(*flags, "--d_model", "64", "--weight-decay", "0.3", "--label-smoothing", "0.1")
    said = capsys.readouterr().out
    assert "Resuming at step 3" in said
    assert "--d_model: saved 32, given 64; the saved value stays" in said
    assert "--weight-decay: saved 0.02, given 0.3; the given value is used" in said
    assert run.state.model.config.d_model == 32
    assert run.state.optimizer.param_groups[0]["weight_decay"] == 0.3, "pitfall 17"
    assert run.flags.label_smoothing == 0.1


def test_arch_flags_may_be_left_out_when_resuming(tunes, tmp_path):
    train("--data", tunes, "--save_dir", tmp_path, "--tag", "base", stop_at=3)
    parsed, explicit = parse_flags(["--save_dir", str(tmp_path)])
    run = set_up(parsed, explicit, Console(quiet=True))
    assert run.state.progress.step == 3
    assert (run.flags.d_model, run.flags.batch, run.flags.tag) == (32, 4, "base")


def test_a_run_from_before_jitter_goes_on_without_it(tunes, tmp_path, capsys):
    """A flag that the saved run did not have must not switch itself on in the middle."""
    flags = ("--data", tunes, "--epochs", "2", "--save_dir")
    whole = comparable(train(*flags, tmp_path / "whole", "--no-jitter"))
    old = train(*flags, tmp_path / "cut", "--no-jitter", stop_at=11)
    del old["flags"]["jitter"]
    save_checkpoint(old, tmp_path / "cut" / "rvq_4cb_latest.pt")
    assert not make_run(*flags, tmp_path / "cut").flags.jitter
    capsys.readouterr()
    run = make_run(*flags, tmp_path / "cut", "--jitter")
    assert "--jitter: saved False, given True; the given value is used" in capsys.readouterr().out
    assert run.train_windows.phase is not None
    assert run.state.progress.position == 3 * run.windows_per_step, "the epoch goes on"
    assert not run.state.guard.losses, "of another level"
    resumed = train(*flags, tmp_path / "cut")
    assert_same_tensors(comparable(resumed), whole)
    assert resumed["flags"]["jitter"] is False
    with_it = train(*flags, tmp_path / "jittered")
    assert with_it["flags"]["jitter"] is True
    assert not torch.equal(with_it["model"]["head.weight"], whole["model"]["head.weight"])


def test_ignore_arch_lists_what_does_not_fit(tunes, tmp_path, capsys):
    """Fault 7."""
    flags = ("--data", tunes, "--save_dir", tmp_path)
    train(*flags, stop_at=3)
    before = (tmp_path / "rvq_4cb_latest.pt").read_bytes()
    argv = [*TINY, *map(str, flags), "--ignore-arch", "--d_model", "64"]
    assert train_rvq.main(argv) == 1
    said = capsys.readouterr().err
    assert "another architecture" in said
    assert "(128, 32) -> (256, 64)" in said
    assert (tmp_path / "rvq_4cb_latest.pt").read_bytes() == before


def test_a_longer_plan_does_not_raise_the_lr(tunes, tmp_path):
    """Pitfall 7, by the whole program."""
    flags = ("--data", tunes, "--save_dir", tmp_path, "--log-lr-steps", "1")
    train(*flags, "--epochs", "1")
    train(*flags, "--epochs", "3")
    rates = [row["lr"] for row in rows(tmp_path, "step")]
    peak = rates.index(max(rates))
    assert len(rates) > 20
    assert all(a >= b for a, b in itertools.pairwise(rates[peak:]))
    assert rates[-1] == pytest.approx(1e-5)


def test_a_finished_run_is_left_alone(tunes, tmp_path, capsys):
    flags = ("--data", tunes, "--save_dir", tmp_path, "--epochs", "1")
    train(*flags)
    before = (tmp_path / "rvq_4cb_latest.pt").read_bytes()
    train(*flags)
    assert "Nothing to do" in capsys.readouterr().out
    assert (tmp_path / "rvq_4cb_latest.pt").read_bytes() == before


def test_other_data_is_refused_until_it_is_allowed(tunes, tmp_path, capsys):
    """Fault 15."""
    data = shutil.copytree(tunes, tmp_path / "data")
    flags = ("--data", data, "--save_dir", tmp_path / "run", "--epochs", "2")
    train(*flags, stop_at=3)
    codes = np.random.default_rng(0).integers(64, size=(300, 4))
    write_npq(data / "new.npq", codes, vocab_sizes=[64] * 4, frame_rate=86.13)
    assert train_rvq.main([*TINY, *map(str, flags)]) == 1
    assert "--allow-data-change" in capsys.readouterr().err
    train(*flags, "--allow-data-change")
    assert rows(tmp_path / "run", "epoch")[-1]["epoch"] == 2


def test_what_held_out_music_shows_is_of_the_data_of_the_run(tunes, tmp_path):
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--allow-data-change")
    for saved, kept in ((dict(run.data), 7), ({**run.data, "files": "of others"}, -1)):
        run.state.progress.held_out_run = 7
        settle_data_change(run.flags, run.state, saved, run.data, "x.pt", run.console)
        assert run.state.progress.held_out_run == kept


@pytest.mark.parametrize("workers", [("0", "2"), ("2", "0")], ids="->".join)
def test_other_workers_give_the_same_result(workers, tunes, tmp_path):
    """Fault 15."""
    flags = ("--data", tunes, "--epochs", "2", "--save_dir")
    whole = comparable(train(*flags, tmp_path / "whole"))
    train(*flags, tmp_path / "cut", "--num_workers", workers[0], stop_at=11)  # in epoch 2
    resumed = comparable(train(*flags, tmp_path / "cut", "--num_workers", workers[1]))
    assert_same_tensors(resumed, whole)


def test_another_batch_with_as_many_windows_a_step_gives_the_same_steps(tunes, tmp_path, capsys):
    """Fault 15: the same windows in the same order; sums in another order, so not bit for bit."""
    flags = ("--data", tunes, "--epochs", "2", "--dropout", "0", "--no-amp", "--depth-share", "1")
    flags += ("--optim", "adamw", "--lr", "1e-3", "--save_dir")  # Muon rounds to bf16
    whole = train(*flags, tmp_path / "whole")
    train(*flags, tmp_path / "cut", stop_at=5)
    resumed = train(*flags, tmp_path / "cut", "--batch", "2", "--accum", "4")
    assert "--batch: saved 4, given 2; the given value is used" in capsys.readouterr().out
    assert resumed["progress"]["step"] == whole["progress"]["step"]
    for name, weight in whole["model"].items():
        torch.testing.assert_close(resumed["model"][name], weight, rtol=1e-2, atol=1e-3)


def test_another_accumulation_in_the_middle_of_an_epoch_uses_no_window_twice(tunes, tmp_path):
    """Fault 15: 5 steps of 8 windows, then of 12; what does not fill a step is left over."""
    flags = ("--data", tunes, "--epochs", "2", "--save_dir", tmp_path)
    train(*flags, stop_at=5)
    run = make_run(*flags, "--accum", "3")
    used, eager = [], run.train_windows.__class__.__getitem__
    order = run.order.permutation(0)
    assert run.state.progress.position == 40
    run.order.start = 40
    for windows in run.order:
        used += windows.tolist()
        assert eager(run.train_windows, windows).shape[0] == len(windows)
    assert used == order[40 : 40 + 24].tolist()
    assert train_rvq.train_or_save(run) == 0
    assert run.state.progress.step == 5 + 2 + 5


def test_with_every_checkpoint_bad_nothing_is_overwritten(tunes, tmp_path, capsys):
    """Fault 5: no fresh start either."""
    flags = ("--data", tunes, "--save_dir", tmp_path, "--epochs", "2")
    train(*flags)
    for path in tmp_path.glob("rvq_*.pt"):
        os.truncate(path, path.stat().st_size // 2)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("rvq_*")}
    assert train_rvq.main([*TINY, *map(str, flags)]) == 1
    said = capsys.readouterr().err
    assert "nothing was changed" in said
    assert "rvq_4cb_best.pt" in said
    assert {p.name: p.read_bytes() for p in tmp_path.glob("rvq_*")} == before


def test_a_checkpoint_without_moments_can_start_a_new_run_alone(tunes, tmp_path, capsys):
    """Fault 7: the error names what is missing and the flag."""
    checkpoint = train("--data", tunes, "--save_dir", tmp_path / "a", "--epochs", "1")
    del checkpoint["optimizer"]
    save_checkpoint(checkpoint, tmp_path / "poor.pt")
    flags = (*TINY, "--data", str(tunes), "--save_dir", str(tmp_path / "b"), "--epochs", "1")
    assert train_rvq.main([*flags, "--resume", str(tmp_path / "poor.pt")]) == 1
    assert f"lacks optimizer; start anew with --init-from {tmp_path}" in capsys.readouterr().err
    assert train_rvq.main([*flags, "--init-from", str(tmp_path / "poor.pt")]) == 0


def test_renamed_and_moved_files_are_the_same_data(tunes, tmp_path):
    flags = ("--save_dir", tmp_path / "run", "--epochs", "2")
    train("--data", tunes, *flags, stop_at=3)
    moved = tmp_path / "moved"
    moved.mkdir()
    for i, path in enumerate(sorted(tunes.iterdir())):
        shutil.copy(path, moved / f"song{9 - i}.npq")
    resumed = comparable(train("--data", moved, *flags))
    whole = train("--data", tunes, "--save_dir", tmp_path / "whole", "--epochs", "2")
    assert_same_tensors(resumed, comparable(whole))


def test_init_from_starts_a_new_run_with_another_ctx(tunes, tmp_path):
    train("--data", tunes, "--save_dir", tmp_path / "a", "--epochs", "1")
    first = load_checkpoint(tmp_path / "a" / "rvq_4cb_best.pt")
    flags = ("--data", tunes, "--save_dir", tmp_path / "b", "--ctx", "64", "--epochs", "1")
    run = make_run(*flags, "--init-from", tmp_path / "a" / "rvq_4cb_best.pt", "--batch", "2")
    assert run.state.progress.step == 0
    assert not run.state.optimizer.state
    assert_same_tensors(dict(run.state.model.state_dict()), dict(first["ema"]))
    assert train_rvq.train_or_save(run) == 0


def test_no_resume_sets_the_earlier_run_aside(tunes, tmp_path):
    flags = ("--data", tunes, "--save_dir", tmp_path, "--epochs", "1")
    train(*flags)
    old = {p.name: p.read_bytes() for p in tmp_path.glob("rvq_*")}
    train(*flags, "--no-resume", "--seed", "5")
    (aside,) = tmp_path.glob("*_before_*")
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == old


def test_fp16_and_ema_and_scaler_survive_a_resume(tunes, tmp_path):
    flags = ("--data", tunes, "--epochs", "1", "--amp-dtype", "fp16", "--save_dir")
    whole = comparable(train(*flags, tmp_path / "whole"))
    train(*flags, tmp_path / "cut", stop_at=4)
    assert whole["scaler"]["scale"] > 0
    assert_same_tensors(comparable(train(*flags, tmp_path / "cut")), whole)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_validating_within_epochs_changes_no_weight_and_resumes_exactly(workers, tunes, tmp_path):
    flags = ("--data", tunes, "--epochs", "2", "--num_workers", workers, "--archive-every", "0")
    plain = train(*flags, "--save_dir", tmp_path / "plain")
    timed = (*flags, "--val-every-seconds", "1e-9", "--save_dir")
    every_step = train(*timed, tmp_path / "timed")
    train(*timed, tmp_path / "cut", stop_at=5)
    cut = train(*timed, tmp_path / "cut")
    steps = every_step["progress"]["step"]
    assert [r["step"] for r in rows(tmp_path / "timed", "epoch")] == list(range(1, steps + 1))
    for other in (every_step, cut):
        assert_same_tensors(weights_and_rng(other), weights_and_rng(plain))


def weights_and_rng(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What validating must leave alone; the best value is not among it."""
    return {name: checkpoint[name] for name in ("model", "ema", "optimizer", "guard", "rng")}


WSD = ("--schedule", "wsd", "--cooldown", "0.25", "--archive-every", "0", "--epochs", "99")


def test_a_wsd_run_is_extended_from_where_its_cooldown_began(tunes, tmp_path, capsys):
    """A run of 16 steps gone on to 40 from its archive ends as one planned for 40."""
    flags = ("--data", tunes, *WSD)
    straight = train(*flags, "--save_dir", tmp_path / "straight", "--max-steps", "40")
    train(*flags, "--save_dir", tmp_path / "short", "--max-steps", "16")
    (archive,) = (tmp_path / "short").glob("*_epoch_e*.pt")
    assert load_checkpoint(archive)["progress"]["step"] == 12
    with pytest.raises(command_line.UsageError, match="cooldown has begun before step 16"):
        make_run("--save_dir", tmp_path / "short", "--max-steps", "40")
    extended = train(
        *("--save_dir", tmp_path / "long", "--resume", archive, "--max-steps", "40"), "--quiet"
    )
    for part in ("model", "ema", "optimizer", "guard", "rng"):  # the policy counts by the plan
        assert_same_tensors(dict(extended[part]), dict(straight[part]))


def test_a_wsd_run_is_ended_early_by_fewer_steps(tunes, tmp_path):
    flags = ("--data", tunes, *WSD, "--save_dir", tmp_path)
    train(*flags, "--max-steps", "4000", stop_at=9)
    train("--save_dir", tmp_path, "--max-steps", "12")
    rates = {row["step"]: row["lr"] for row in rows(tmp_path, "step")}
    assert rates[10] == pytest.approx((3e-4 - 1e-5) * 2 / 3 + 1e-5)
