"""Rollback, quarantine, poisoned runs; in this process and as a real one."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import processes
from kit.checkpoints import assert_same_tensors, comparable
from kit.trainer import ROOT, TINY, make_run, rows, wait_for
from make_codes import make_tune

import train_rvq
from layers.loss import Losses
from npq_dataset import EpochOrder
from run_folder.checkpoint import load_checkpoint
from run_folder.files import QUARANTINE_SIZE, RING_SIZE, RunFiles
from sound.npq_format import write_npq
from training import ends, rollback, rollback_policy
from training import saving as run_saving
from training.guard import Guard
from training.rollback_policy import FORGIVEN_AFTER, MAX_ROLLBACKS, RollbackPolicy, keep_interval
from training.saving import not_finite
from training.state import TrainingRun

FAST = ("--layers", "1", "--batch", "2", "--accum", "1", "--val-every", "10000")
FAST += ("--archive-every", "0", "--log-lr-steps", "100", "--save-every-minutes", "0")
FAST += ("--max-steps", "300", "--pattern", "parallel")


def fast_run(tunes: Path, save_dir: Path, *flags: str | Path) -> TrainingRun:
    """A run of some 300 steps a second, 32 an epoch."""
    return make_run("--data", tunes, "--save_dir", save_dir, *FAST, *flags)


def poison(run: TrainingRun, is_bad: Callable[[int], bool], by: float = math.nan) -> None:
    """Multiply the losses of attempts (steps taken or refused, from 0) that are bad."""
    losses, policy = run.losses, run.state.policy

    def poisoned(codes: torch.Tensor) -> Losses:
        made = losses(codes)
        return Losses(*(x * by for x in made)) if is_bad(policy.attempts) else made

    run.losses = poisoned


# --- the decision --------------------------------------------------------------------------------


def refuse(policy: RollbackPolicy, times: int, every: int = 1) -> list[str | None]:
    """Refusals `every` so many steps; what the policy says after each, none of them in a row."""
    said = []
    for i in range(times * every):
        policy.attempt()
        if i % every == every - 1:
            policy.refuse([i])
            said.append(policy.trouble(refused_in_a_row=1))
    return said


def test_the_next_rung_is_due_after_ten_in_a_row_or_ten_of_the_last_thousand():
    policy = RollbackPolicy()
    assert policy.trouble(9) is None
    assert "10 steps in a row" in policy.trouble(10)
    said = refuse(policy, 10, every=100)
    assert said[:9] == [None] * 9
    assert "of the last 1000" in said[9]
    assert refuse(RollbackPolicy(), 100, every=112) == [None] * 100, (
        "isolated bad windows: 9 in a thousand"
    )


def test_three_events_are_too_many_only_within_some_thousand_steps():
    policy = RollbackPolicy()
    where = {"epoch": 0, "position": 0, "suspects": [], "windows": 100}
    for step in (100, 200, 300):
        assert policy.may_roll_back(step)
        policy.roll_back(step, 0, **where)
    assert not policy.may_roll_back(300)
    assert not policy.may_roll_back(99 + FORGIVEN_AFTER)
    assert policy.may_roll_back(100 + FORGIVEN_AFTER)
    for day in range(1, 50):
        step = day * FORGIVEN_AFTER
        assert RollbackPolicy.may_roll_back(policy, step + 300)
        policy.roll_back(step + 300, step, **where)


def test_a_cut_lr_comes_back_unless_it_is_to_blame(tunes, tmp_path):
    """A NaN window costs no learning rate for good; trouble that returns after steps does."""
    run = fast_run(tunes, tmp_path, "--log-lr-steps", "1")
    poison(run, lambda attempt: attempt in range(5, 25) or attempt in range(120, 130))
    assert train_rvq.train_or_save(run) == 0
    events = rows(tmp_path, "rollback")
    assert [row["lr_scale"] for row in events] == [0.5, 0.25, 0.25]
    assert run.state.progress.lr_scale == run.state.progress.lr_goal == 0.5
    last = rows(tmp_path, "step")[-60:]
    assert [a["lr"] >= b["lr"] for a, b in itertools.pairwise(last)] == [True] * 59


def test_retreats_prefer_the_newest_that_is_a_hundred_steps_older():
    candidates = RollbackPolicy().candidates
    assert candidates(430, [0, 100, 200, 300, 400]) == [300, 200, 100, 0, 400]
    assert candidates(400, [100, 200, 300, 400]) == [300, 200, 100, 400]
    assert candidates(60, [0, 50, 900]) == [0, 50], (
        "at the very start the oldest; never a newer one"
    )
    assert candidates(60, []) == []


def test_the_ring_reaches_a_hundred_steps_back_three_times():
    for planned in (10, 2_000, 5_000, 1_000_000):
        every = keep_interval(planned)
        assert 100 <= every <= 500
        assert (RING_SIZE - 1) * every >= MAX_ROLLBACKS * rollback_policy.ROLLBACK_STEPS


def test_refused_windows_are_barred_up_to_a_fifth_of_the_data():
    policy = RollbackPolicy()
    refuse(policy, 10)
    where = {"epoch": 0, "position": 0, "suspects": [1], "windows": 60}
    policy.roll_back(5, 0, **where)
    assert policy.order_changes[0]["excluded_windows"] == list(range(10))
    refuse(policy, 10)
    policy.roll_back(6, 0, **where)
    assert len(policy.order_changes[1]["excluded_windows"]) == 2
    assert policy.refusals == []


def test_the_policys_state_round_trips_and_old_checkpoints_have_none():
    policy, other = RollbackPolicy(), RollbackPolicy()
    refuse(policy, 5)
    policy.roll_back(5, 0, epoch=1, position=8, suspects=np.array([3]), windows=100)
    refuse(policy, 3)
    state = policy.state_dict()
    other.load_state_dict(state)
    assert other.state_dict() == state
    refuse(other, 1)
    assert policy.state_dict() == state, "nothing shared"
    other.load_state_dict({})


def test_a_policy_saved_under_the_names_of_an_older_version_is_the_same():
    change = {"epoch": 1, "position": 8, "suspects": [3]}
    old = {"attempts": 9, "refusals": [], "events": [7], "kept_step": 4}
    policy = RollbackPolicy()
    policy.load_state_dict({**old, "detours": [{**change, "barred": [1, 2]}]})
    now = {**old, "order_changes": [{**change, "excluded_windows": [1, 2]}]}
    assert policy.state_dict() == now


def test_a_lasting_loss_above_guessing_is_told_from_a_bad_step():
    guard = Guard((64,) * 2)
    good, bad = [math.log(64) - 1] * 2, [math.log(64) - 1, math.log(64) + 0.5]
    for _ in range(100):
        guard.accept(4.0, 1.0, good)
    guard.accept(4.0, 1.0, bad)
    assert guard.worse_than_guessing() is None
    for _ in range(100):
        guard.accept(4.0, 1.0, bad)
    assert "codebook 1" in guard.worse_than_guessing()
    other = Guard((64,) * 2)
    other.load_state_dict(guard.state_dict())
    assert other.worse_than_guessing() == guard.worse_than_guessing()
    guard.forget()
    assert guard.worse_than_guessing() is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_names_the_tensor(bad):
    tensors = {"a": torch.ones(3, 4), "b": torch.full((2,), 1e30), "c": torch.tensor(0.0)}
    assert not_finite(tensors) == []
    tensors["b"][1] = bad
    assert not_finite(tensors) == ["b"]
    assert not_finite({}) == []


# --- the order of windows ------------------------------------------------------------------------


def test_a_detour_changes_the_rest_of_its_epoch_alone():
    order, plain = (EpochOrder(100, batch=4, accum=2, seed=3) for _ in range(2))
    suspects, excluded = plain.permutation(2)[24:40].tolist(), plain.permutation(2)[32:40].tolist()
    order.changes.append(
        {"epoch": 2, "position": 16, "suspects": suspects, "excluded_windows": excluded}
    )
    assert (order.permutation(1) == plain.permutation(1)).all()
    here, there = order.permutation(2), plain.permutation(2)
    assert (here[:16] == there[:16]).all()
    assert (here[16:24] != there[16:24]).any()
    assert sorted(here) == sorted(set(range(100)) - set(suspects))
    assert sorted(order.permutation(3)) == sorted(set(range(100)) - set(excluded))
    order.changes.append({"epoch": 2, "position": 40, "suspects": [], "excluded_windows": []})
    assert (order.permutation(2)[:40] == here[:40]).all()
    assert (order.permutation(2)[40:] != here[40:]).any()
    order.epoch, order.start = 2, 16
    given = np.concatenate(list(order))
    assert (given - 2 * 100 == order.permutation(2)[16 : 16 + len(given)]).all()
    assert len(order) * 4 == len(given) == (order.end() - 16) // 8 * 8


# --- rollback ------------------------------------------------------------------------------------


def test_ten_refusals_restore_everything_together(tunes, tmp_path, monkeypatch):
    """Fault 11: raw weights, moments, EMA, guard, random state; lr cut; other data; one row."""
    run = fast_run(tunes, tmp_path, "--panic-snapshot")
    poison(run, lambda attempt: attempt in range(205, 215))
    before: dict[str, Any] = {}
    original = rollback.roll_back

    def watched(run: TrainingRun, reason: str) -> bool:
        before["ring"] = load_checkpoint(run.files.ring_file(100))
        before["scale"], before["seconds"] = run.state.progress.lr_scale, run.state.progress.seconds
        before["drawn"] = run.order.permutation(run.state.progress.epoch)
        done = original(run, reason)
        before["now"] = comparable(run_saving.checkpoint_of(run))
        assert all(p.grad is None for p in run.state.model.parameters()), "pitfall 3"
        assert run.state.progress.seconds >= before["seconds"], "clocks do not go back"
        assert load_checkpoint(run.files.latest)["progress"]["step"] == 100, "latest is sound"
        run.stop.signal = signal.SIGTERM
        return done

    monkeypatch.setattr(rollback, "roll_back", watched)
    assert train_rvq.train_or_save(run) == 143
    ring, now = comparable(before["ring"]), before["now"]
    for part in ("model", "ema", "optimizer", "scaler", "rng"):
        assert_same_tensors(dict(now[part]), ring[part])
    assert now["guard"]["losses"] == ring["guard"]["losses"]
    assert (now["guard"]["refused"], now["guard"]["refused_in_a_row"]) == (10, 0)
    assert (now["progress"]["step"], now["progress"]["lr_scale"]) == (100, 0.5)
    (row,) = rows(tmp_path, "rollback")
    assert (row["step"], row["to_step"], row["lr_scale"]) == (205, 100, 0.5)
    assert row["file"] == "rvq_4cb_ring_s00000100.pt"
    assert row["skipped_windows"] >= 10
    assert "10 steps in a row" in row["reason"]
    assert load_checkpoint(tmp_path / "rvq_4cb_quarantine_s00000205.pt")["progress"]["step"] == 205
    skip, change = rows(tmp_path, "skip")[0], run.state.policy.order_changes[0]
    left_out = np.array(change["excluded_windows"] + change["suspects"])
    assert skip["windows"][0] in run.train_windows.describe(left_out, skip["epoch"] - 1)


def test_nan_for_ever_rolls_back_three_times_and_stops(tunes, tmp_path, capsys):
    """Fault 11: exit code 3, the doctor's command, weights finite, refusals with their windows."""
    run = fast_run(tunes, tmp_path, "--epochs", "50")
    poison(run, lambda attempt: attempt >= 120)
    assert train_rvq.train_or_save(run) == ends.EXIT_GUARD
    skips, rollbacks = rows(tmp_path, "skip"), rows(tmp_path, "rollback")
    assert [row["lr_scale"] for row in rollbacks] == [0.5, 0.25, 0.125]
    assert [(row["step"], row["to_step"]) for row in rollbacks] == [(120, 0), (0, 0), (0, 0)]
    assert len(skips) == 40
    assert all(len(row["windows"]) == run.windows_per_step for row in skips)
    assert skips[0]["loss"] is None, "JSON has no NaN"
    assert not_finite(load_checkpoint(run.files.latest)["model"]) == []
    said = capsys.readouterr().err
    assert f"python ckpt_doctor.py {tmp_path}" in said
    assert "after 3 rollbacks" in said
    again = fast_run(tunes, tmp_path)
    assert again.state.progress.lr_scale == 0.125, "a restart does not forget"


def test_scattered_refusals_bar_their_windows_and_end(tunes, tmp_path):
    """Bad windows in the data: one rollback, after which they are not drawn again."""
    run = fast_run(tunes, tmp_path, "--max-steps", "140", "--lr", "1e-4", "--no-jitter")
    bad = run.train_windows[np.array([20, 30, 40])].long()
    losses = run.losses

    def poisoned(codes: torch.Tensor) -> Losses:
        made = losses(codes)
        is_bad = (codes[:, None] == bad).flatten(2).all(2).any()
        return Losses(*(x * math.nan for x in made)) if is_bad else made

    run.losses = poisoned
    assert train_rvq.train_or_save(run) == 0
    assert run.state.progress.step == 140
    rollbacks = rows(tmp_path, "rollback")
    assert len(rollbacks) == 1
    assert "of the last 1000" in rollbacks[0]["reason"]
    assert len(rows(tmp_path, "skip")) == 10
    assert not {20, 30, 40} & {*run.order.permutation(run.state.progress.epoch)}


def test_a_corrupt_step_checkpoint_gives_way_to_an_older_one(tunes, tmp_path, capsys):
    run = fast_run(tunes, tmp_path)
    poison(run, lambda attempt: attempt in range(205, 215))
    eager = run.losses

    def damaging(codes: torch.Tensor) -> Losses:
        if run.state.policy.attempts == 210:
            path = run.files.ring_file(100)
            content = path.read_bytes()
            path.unlink()  # other names of these bytes stay whole
            path.write_bytes(content[:-2000])
        if run.state.policy.events:
            run.stop.signal = signal.SIGTERM
        return eager(codes)

    run.losses = damaging
    assert train_rvq.train_or_save(run) == 143
    assert [row["to_step"] for row in rows(tmp_path, "rollback")] == [0]
    assert "ring_s00000100.pt: damaged" in capsys.readouterr().err


def test_without_any_step_checkpoint_the_run_goes_on_with_a_lower_lr(tunes, tmp_path, capsys):
    run = fast_run(tunes, tmp_path, "--max-steps", "40")
    poison(run, lambda attempt: attempt in range(20, 30))
    eager = run.losses

    def removing(codes: torch.Tensor) -> Losses:
        if run.state.policy.attempts == 25:
            run_saving.check_save(run, wait=True)
            run.files.remove_ring()
        return eager(codes)

    run.losses = removing
    assert train_rvq.train_or_save(run) == 0
    (row,) = rows(tmp_path, "rollback")
    assert (row["step"], row["to_step"], row["file"]) == (20, 20, None)
    assert row["lr_scale"] == 0.5
    assert "no step checkpoint could be read" in capsys.readouterr().err


def test_the_lr_after_a_restart_with_a_wrong_lr_follows_the_state_gone_back_to(tunes, tmp_path):
    """--lr 30 times too high: half of the rate that the older state was sound with."""
    run = fast_run(tunes, tmp_path)
    run.losses = interrupting(run, at=105)
    assert train_rvq.train_or_save(run) == 143
    run = fast_run(tunes, tmp_path, "--lr", "0.009")
    poison(run, lambda attempt: attempt in range(112, 122))
    run.losses = interrupting(run, at=122)
    assert train_rvq.train_or_save(run) == 143
    (row,) = rows(tmp_path, "rollback")
    assert (row["to_step"], row["lr_scale"]) == (0, pytest.approx(0.5 / 30))


def interrupting(run: TrainingRun, at: int) -> Callable[[torch.Tensor], Losses]:
    """Losses of a run that a signal reaches in the middle of an attempt."""
    losses = run.losses

    def made(codes: torch.Tensor) -> Losses:
        if run.state.policy.attempts == at:
            run.stop.signal = signal.SIGTERM
        return losses(codes)

    return made


def test_a_rollback_waits_for_the_step_checkpoint_in_flight(tunes, tmp_path, monkeypatch):
    """The disk takes longer than the eleven steps to the event."""
    run = fast_run(tunes, tmp_path, "--max-steps", "20")
    poison(run, lambda attempt: attempt in range(1, 11))
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.5), real(descriptor))[1])
    assert train_rvq.train_or_save(run) == 0
    (row,) = rows(tmp_path, "rollback")
    assert (row["step"], row["to_step"], row["file"]) == (1, 0, "rvq_4cb_ring_s00000000.pt")
    assert [row["step"] for row in rows(tmp_path, "save")] == [0, 0, 20]


def test_a_disk_that_is_full_for_step_checkpoints_alone_ends_no_run(tunes, tmp_path, capsys):
    """Four of them are lost; an epoch's end that is kept in the ring still counts as a save."""
    run = fast_run(tunes, tmp_path)
    full = tmp_path / ".rvq_4cb_latest.pt.saving"
    for failures in range(1, 5):
        full.symlink_to("/dev/full")
        run_saving.save(run, ring=True, may_fail=True)
        assert run_saving.check_save(run, wait=True) is not None
        assert capsys.readouterr().err.count("No space left on device") == 1, failures
    assert (run.failed_saves, run.files.ring_steps()) == (0, [])
    for _ in range(2):
        full.symlink_to("/dev/full")
        run_saving.save(run, ring=True)
        run_saving.check_save(run, wait=True)
    full.symlink_to("/dev/full")
    run_saving.save(run)
    with pytest.raises(OSError, match="No space left"):
        run_saving.check_save(run, wait=True)


def test_an_unsound_state_is_written_once_and_not_at_every_step(tunes, tmp_path):
    """A save that is due by the clock goes to quarantine; the next is due as long after."""
    run = fast_run(tunes, tmp_path, "--max-steps", "110", "--save-every-minutes", "5")
    eager = run.losses

    def spoil(codes: torch.Tensor) -> Losses:
        if run.state.policy.attempts == 50:
            run.state.guard.recent_ce = [math.log(64) + 10] * 4
            run.last_save -= 1000
        return eager(codes)

    run.losses = spoil
    assert train_rvq.train_or_save(run) == 0
    assert [row["step"] for row in rows(tmp_path, "quarantine")][:1] == [51]
    assert len(rows(tmp_path, "quarantine")) == len(rows(tmp_path, "rollback")) + 1 == 2


@pytest.mark.slow
def test_the_ring_is_bounded_and_gone_when_the_run_ends_well(tunes, tmp_path):
    run = fast_run(tunes, tmp_path, "--max-steps", "640")
    seen: set[int] = set()
    save = run.files.save

    def watching(*args: Any, **options: Any) -> Path:
        path = save(*args, **options)
        ring = run.files.ring_steps()
        assert len(ring) <= RING_SIZE
        seen.update(ring)
        return path

    run.files.save = watching
    assert train_rvq.train_or_save(run) == 0
    assert sorted(seen) == [0, 100, 200, 300, 400, 500, 600]
    assert run.files.ring_steps() == []


def test_the_files_of_the_ring_are_the_runs_own(tmp_path):
    files, other = RunFiles(tmp_path, "rvq_4cb"), RunFiles(tmp_path, "rvq_4cb_ring")
    state = {"progress": {"step": 5}}
    for step in (0, 100, 200):
        files.save(state, ring_step=step)
        other.save(state, ring_step=step)
    assert files.ring_steps() == [0, 100, 200]
    files.prune_ring(newest=100)
    assert files.ring_steps() == [0, 100]
    assert other.ring_steps() == [0, 100, 200]
    assert files.ring_file(100) in files.all_files()
    assert files.ring_file(100) in files.others()
    aside = files.set_aside()
    assert (aside / files.ring_file(100).name).exists()
    assert files.ring_steps() == []


# --- quarantine ----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["model", "ema", "moments", "momentum"])
def test_a_state_that_is_not_finite_never_becomes_latest(part, tunes, tmp_path):
    """Fault 8."""
    run = fast_run(tunes, tmp_path, "--max-steps", "30", "--optim", "muon")
    name = "blocks.0.attn.qkv.weight" if part == "momentum" else "head.weight"
    eager, done = run.losses, []

    def spoil(codes: torch.Tensor) -> Losses:
        state = run.state
        if state.progress.step == 20 and not done:
            done.append(1)
            run_saving.check_save(run, wait=True)
            before = run.files.latest.read_bytes()
            weight = state.model.get_parameter(name)
            spoiled = {
                "model": weight,
                "ema": state.ema.model.get_parameter(name),
                "moments": state.optimizer.state[weight].get("exp_avg"),
                "momentum": state.optimizer.state[weight].get("momentum_buffer"),
            }[part]
            with torch.no_grad():
                spoiled[3, 1] = math.nan
            run_saving.save(run)
            assert run.files.latest.read_bytes() == before
        return eager(codes)

    run.losses = spoil
    assert train_rvq.train_or_save(run) == 0, "the run goes on from an older state by itself"
    assert run.state.progress.step == 30
    (row,) = rows(tmp_path, "rollback")
    assert row["to_step"] == 0
    kept = load_checkpoint(next(tmp_path.glob("*_quarantine_s*.pt")))
    assert "not finite" in kept["quarantine"]
    assert name in kept["quarantine"]
    final = load_checkpoint(run.files.latest)
    assert not_finite(final["model"]) == not_finite(final["ema"]) == []


def test_a_state_worse_than_guessing_never_becomes_latest(tunes, tmp_path):
    run = fast_run(tunes, tmp_path, "--max-steps", "110")
    eager, done = run.losses, []

    def spoil(codes: torch.Tensor) -> Losses:
        if run.state.progress.step == 99 and not done:
            done.append(1)
            run.state.guard.recent_ce = [math.log(64) + 0.6] * 4
        return eager(codes)

    run.losses = spoil
    assert train_rvq.train_or_save(run) == 0
    (row,) = rows(tmp_path, "rollback")
    assert (row["step"], row["to_step"]) == (100, 0)
    assert "codebook 0 averages" in row["reason"]
    assert rows(tmp_path, "quarantine")[0]["file"] == "rvq_4cb_quarantine_s00000100.pt"


@pytest.mark.parametrize("moment", ["the last step", "validation"])
def test_a_state_spoiled_at_an_epochs_end_is_no_checkpoint_no_best_and_no_epoch(
    moment, tunes, tmp_path
):
    run = fast_run(tunes, tmp_path, "--max-steps", "70", "--val-every", "1", "--archive-every", "1")
    spoiled: list[int] = []

    def spoiling(losses: Callable[..., Losses], step: int) -> Callable[..., Losses]:
        def made(*args: Any) -> Losses:
            if run.state.progress.step == step and not spoiled:
                spoiled.append(step)
                run.state.ema.model.head.weight.data[3, 1] = math.nan
            return losses(*args)

        return made

    if moment == "validation":
        run.state.ema.model.losses = spoiling(run.state.ema.model.losses, 32)
    else:
        run.losses = spoiling(run.losses, 31)
    assert train_rvq.train_or_save(run) == 0
    assert spoiled
    (bad,) = rows(tmp_path, "quarantine")
    assert (bad["step"], bad["epoch"]) == (32, 1)
    assert "ema head.weight" in bad["reason"]
    assert [row["to_step"] for row in rows(tmp_path, "rollback")] == [0]
    first = rows(tmp_path, "epoch")[0]
    assert rows(tmp_path).index(bad) < rows(tmp_path).index(first), "the epoch is repeated"
    for path in run.files.all_files():
        if path.suffix == ".pt" and "quarantine" not in path.name:
            assert not_finite(load_checkpoint(path)["ema"]) == [], path.name


def test_each_save_asks_once_whether_the_state_is_sound(tunes, tmp_path, monkeypatch):
    """It reads every tensor and waits for the device."""
    run = fast_run(tunes, tmp_path, "--max-steps", "64", "--val-every", "1", "--archive-every", "1")
    asked, real = [], run_saving.not_finite

    def counting(tensors: dict[str, torch.Tensor]) -> list[str]:
        asked.append(run.state.progress.step)
        return real(tensors)

    monkeypatch.setattr(run_saving, "not_finite", counting)
    assert train_rvq.train_or_save(run) == 0
    assert asked == [row["step"] for row in rows(tmp_path, "save")] == [0, 32, 64]


def test_quarantine_keeps_the_newest_few(tmp_path):
    files = RunFiles(tmp_path, "rvq_4cb")
    for number, step in enumerate((50, 40, 30, 20, 10)):  # a run that goes back and back
        path = files.quarantine({"progress": {}}, step, "why")
        os.utime(path, (number, number))
    left = sorted(p.name for p in tmp_path.glob("*_quarantine_*"))
    assert left == [f"rvq_4cb_quarantine_s000000{s}.pt" for s in (10, 20, 30)]
    assert len(left) == QUARANTINE_SIZE


# --- kills ---------------------------------------------------------------------------------------

POISONED = """
import math, os, signal, sys
sys.path[:0] = [{root!r}]
import train_rvq
from layers.loss import Losses
real = train_rvq.set_up

def set_up(*args):
    run = real(*args)
    losses, policy = run.losses, run.state.policy

    def poisoned(codes):
        made = losses(codes)
        bad = any(policy.attempts in range(first, first + 10) for first in {bad})
        return Losses(*(x * math.nan for x in made)) if bad else made

    run.losses = poisoned
    return run

train_rvq.set_up = set_up
sys.exit(train_rvq.main())
"""


def run_poisoned(
    tunes: Path, save_dir: Path, bad: list[int], steps: int, moments: list[int], workers: int = 0
) -> dict[str, Any]:
    """A run poisoned at some attempts, killed when the metrics have so many rows; how it ends."""
    script = [sys.executable, "-c", POISONED.format(root=str(ROOT), bad=bad)]
    flags = [*TINY, *FAST, "--data", tunes, "--save_dir", save_dir, "--max-steps", str(steps)]
    flags += ["--num_workers", str(workers), "--save-every-minutes", "0.002"]
    words = [*script, *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen[bytes]:
        return processes.Popen(
            words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def count() -> int:
        files = list(save_dir.glob("*_metrics.jsonl"))
        return files[0].read_bytes().count(b"\n") if files else 0

    for moment in moments:
        process = start()
        wait_for(lambda p=process, m=moment: p.poll() is not None or count() >= m)
        process.kill()
        process.wait()
    process = start()
    assert process.wait(120) == 0
    return load_checkpoint(save_dir / "rvq_4cb_latest.pt")


def test_killed_right_after_a_rollback_ends_in_the_same_weights(tunes, tmp_path):
    """Fault 11, invariant A: bit for bit the run that was rolled back and never killed."""
    run = fast_run(tunes, tmp_path / "whole", "--max-steps", "120")
    poison(run, lambda attempt: attempt in range(112, 122))
    assert train_rvq.train_or_save(run) == 0
    (row,) = rows(tmp_path / "whole", "rollback")
    assert (row["step"], row["to_step"]) == (112, 0)
    moment = rows(tmp_path / "whole").index(row) + 1
    cut = run_poisoned(tunes, tmp_path / "cut", [112], 120, [moment])
    assert_same_tensors(comparable(cut), comparable(load_checkpoint(run.files.latest)))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_of_rolled_back_runs(seed, workers, tunes, tmp_path):
    """Two rollbacks, up to four kills each; a moment past the end kills nothing."""
    shape = {"bad": [230, 300], "steps": 260, "workers": workers}
    whole = run_poisoned(tunes, tmp_path / "whole", moments=[], **shape)
    assert [row["to_step"] for row in rows(tmp_path / "whole", "rollback")] == [100, 0]
    total = len(rows(tmp_path / "whole"))
    moments = sorted(np.random.default_rng(seed).integers(5, total + 20, size=4).tolist())
    cut = run_poisoned(tunes, tmp_path / "cut", moments=moments, **shape)
    assert_same_tensors(comparable(cut), comparable(whole))


# --- poisoned runs -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def more_tunes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough that a small model does not learn it by heart."""
    folder = tmp_path_factory.mktemp("more")
    rng = np.random.default_rng(3)
    patterns = rng.integers(64, size=(16, 8, 4))
    for i in range(6):
        codes = make_tune(patterns, 1000, rng)
        write_npq(folder / f"{i}.npq", codes, vocab_sizes=[64] * 4, frame_rate=86.13)
    return folder


def last_val(run: TrainingRun) -> float:
    """The last validation of a run that ended well."""
    assert train_rvq.train_or_save(run) == 0
    return rows(Path(run.flags.save_dir), "epoch")[-1]["val"]


def nan_window(run: TrainingRun) -> None:
    poison(run, lambda attempt: attempt in range(250, 262))


def random_codes(run: TrainingRun) -> None:
    losses, policy = run.losses, run.state.policy
    draw = torch.Generator().manual_seed(0)

    def made(codes: torch.Tensor) -> Losses:
        if policy.attempts in range(250, 265):
            codes = torch.randint(64, codes.shape, generator=draw)
        return losses(codes)

    run.losses = made


def lr_bomb(run: TrainingRun) -> None:
    """The optimizer's own rate, 100 times too high for 20 steps."""
    step, policy = run.state.optimizer.step, run.state.policy

    def bombed() -> None:
        for group in run.state.optimizer.param_groups:
            group["lr"] *= 100 if policy.attempts in range(250, 270) else 1
        step()

    run.state.optimizer.step = bombed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_poisoned_runs_end_within_0_05_nats_of_the_clean_run(seed, more_tunes, tmp_path):
    flags = ("--max-steps", "600", "--seed", str(seed), "--no-fused-optim", "--val_split", "0.2")
    clean = last_val(fast_run(more_tunes, tmp_path / "clean", *flags))
    for fault in (nan_window, random_codes, lr_bomb):
        run = fast_run(more_tunes, tmp_path / fault.__name__, *flags)
        fault(run)
        val, back = last_val(run), rows(tmp_path / fault.__name__, "rollback")
        print(f"seed {seed} {fault.__name__}: clean {clean:.4f}, {val:.4f}, {len(back)} rollbacks")
        assert val < clean + 0.05, fault.__name__
        assert back, fault.__name__


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_restart_with_a_wrong_lr_ends_within_0_05_nats(seed, more_tunes, tmp_path):
    flags = ("--max-steps", "600", "--seed", str(seed), "--val_split", "0.2")
    clean = last_val(fast_run(more_tunes, tmp_path / "clean", *flags))
    run = fast_run(more_tunes, tmp_path / "cut", *flags)
    run.losses = interrupting(run, at=250)
    assert train_rvq.train_or_save(run) == 143
    assert last_val(fast_run(more_tunes, tmp_path / "cut", *flags, "--lr", "0.009")) < clean + 0.05
