"""A guard that fires when it should, and only then."""

from __future__ import annotations

import math
import random

import pytest

from training.guard import WARM_UP, Guard

VOCAB = (1024,) * 9
CE = [4.5] * 9


def settled(level: float = 4.5, noise: float = 0.05, steps: int = 200, seed: int = 0) -> Guard:
    """A guard after many ordinary steps."""
    guard, rng = Guard(VOCAB), random.Random(seed)
    for _ in range(steps):
        guard.accept(level + rng.gauss(0, noise), math.exp(rng.gauss(-1, 0.2)))
    return guard


@pytest.mark.parametrize("factor", [3, 10])
def test_a_loss_of_three_or_ten_times_is_refused(factor):
    """Fault 10, pitfall 1: an average that absorbs the spike first would let both pass."""
    assert "loss" in settled().judge(4.5 * factor, 0.4, CE)


def test_a_loss_of_1_2_times_is_not():
    assert settled().judge(4.5 * 1.2, 0.4, CE) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_at_any_time(bad):
    """Fault 9, pitfalls 2 and 5: from the very first step on, and again and again."""
    for guard in (Guard(VOCAB), settled()):
        for _ in range(3):
            assert guard.judge(bad, 0.4, CE) == "loss is not finite"
            assert guard.judge(4.5, 0.4, [*CE[:-1], bad]) == "loss is not finite"
            assert guard.judge(4.5, bad, CE) == "gradient norm is not finite"
            guard.refuse()
        assert guard.judge(4.5, 0.4, CE) is None, "an ordinary step is accepted afterwards"


def test_a_codebook_far_worse_than_guessing_is_refused_from_the_first_step():
    guard = Guard(VOCAB)
    assert guard.judge(7.0, 0.4, [math.log(1024) + 0.9] * 9) is None
    assert "codebook 8" in guard.judge(7.0, 0.4, [6.9] * 8 + [math.log(1024) + 1.1])


def test_a_gradient_spike_is_refused():
    assert "gradient norm" in settled().judge(4.5, 50.0, CE)


def test_drift_and_calm_are_not_refused():
    """Fault 10: +0.01 a step, and a loss that never changes."""
    drifting, calm = Guard(VOCAB), Guard(VOCAB)
    for step in range(2000):
        assert drifting.judge(4.5 + 0.01 * step, 0.4, CE) is None
        drifting.accept(4.5 + 0.01 * step, 0.4)
        assert calm.judge(4.5, 0.4, CE) is None
        calm.accept(4.5, 0.4)


def test_no_false_refusal_in_100_000_noisy_falling_steps():
    rng, guard = random.Random(1), Guard(VOCAB)
    for step in range(100_000):
        loss = 4.2 + 2.7 * math.exp(-step / 3000) + rng.gauss(0, 0.08)
        norm = math.exp(rng.gauss(-1, 0.35))
        assert guard.judge(loss, norm, CE) is None, step
        guard.accept(loss, norm)


def test_refused_steps_leave_the_limits_alone():
    """Pitfall 1: compare first, add only what was accepted."""
    guard = settled()
    before = guard.state_dict()
    for _ in range(5):
        assert guard.judge(45.0, 0.4, CE)
        guard.refuse()
    after = guard.state_dict()
    assert (after["losses"], after["log_norms"]) == (before["losses"], before["log_norms"])
    assert (after["refused"], after["refused_in_a_row"]) == (5, 5)


def test_a_lasting_change_is_learned_after_forget():
    """Fault 10: no freeze."""
    guard = settled()
    assert guard.judge(6.5, 0.4, CE)
    guard.forget()
    for _ in range(WARM_UP + 5):
        assert guard.judge(6.5, 0.4, CE) is None
        guard.accept(6.5, 0.4)


def test_guard_state_round_trips():
    guard, restored = settled(), Guard(VOCAB)
    restored.load_state_dict(guard.state_dict())
    assert restored.state_dict() == guard.state_dict()
    assert restored.judge(6.0, 0.4, CE) == guard.judge(6.0, 0.4, CE) is not None
