"""Decides when a run rolls back, to which state, and which windows it leaves out afterwards.

    policy.refuse(windows)                                # of the step that the guard refused
    trouble = policy.trouble(guard.refused_in_a_row)      # not None: roll back, or stop
    if policy.may_roll_back(step):
        policy.candidates(step, available)                # steps of states to try, best first

rollback.py carries out these decisions.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

REFUSED_IN_A_ROW = 10  # refused steps in a row that cause a rollback
REFUSED_LATELY, LATELY = 10, 1000  # or 10 refused of the last 1000 steps, taken or refused
ROLLBACK_STEPS = 100  # a rollback goes back so many steps: older states are taken to be sound
MAX_ROLLBACKS = 3  # within FORGIVEN_AFTER steps; then the run stops
FORGIVEN_AFTER = 5000  # steps after which a rollback no longer counts
SUSPECT_STEPS = 30  # the windows of so many steps before a rollback are left out of the epoch
OLD_NAMES = {"detours": "order_changes", "barred": "excluded_windows"}  # keys in old checkpoints
MAX_EXCLUDED = 0.2  # share of all windows that may be left out for the rest of the run


class RollbackPolicy:
    """Decides on rollbacks, where refusing single steps does not help; after three the run stops.

    A refused step costs nothing but its windows. Ten in a row show that the weights are damaged,
    ten of the last thousand that they soon may be. The run then returns to a state at least 100
    steps older, with a lower learning rate, another data order, and without the windows of the
    steps before the event (Chowdhery et al. 2022, section 5.1). The windows of the refused steps
    are never drawn again, so that bad windows in the data cannot cause rollbacks for ever.
    """

    STATE = ("attempts", "refusals", "events", "order_changes", "kept_step")

    def __init__(self) -> None:
        self.attempts = 0  # steps, taken or refused; a rollback does not lower it
        self.refusals: list[dict[str, Any]] = []  # attempt and windows, of the last LATELY steps
        self.events: list[int] = []  # steps of the rollbacks that still count
        self.order_changes: list[dict[str, Any]] = []  # see npq_dataset.EpochOrder
        self.kept_step: int | None = None  # step of the newest step checkpoint

    def attempt(self) -> None:
        """Count a step, taken or refused."""
        self.attempts += 1

    def refuse(self, windows: Iterable[int]) -> None:
        """Remember the windows of a refused step, just counted by `attempt`."""
        self.refusals.append({"attempt": self.attempts, "windows": [int(w) for w in windows]})
        oldest = self.attempts - LATELY
        self.refusals = [r for r in self.refusals if r["attempt"] > oldest]

    def trouble(self, refused_in_a_row: int) -> str | None:
        """Return why a rollback is due, or None; call it after each refusal."""
        if refused_in_a_row >= REFUSED_IN_A_ROW:
            return f"{REFUSED_IN_A_ROW} steps in a row were refused"
        if len(self.refusals) >= REFUSED_LATELY:
            return f"{REFUSED_LATELY} of the last {LATELY} steps were refused"
        return None

    def may_roll_back(self, step: int) -> bool:
        """Return whether one more rollback is allowed; drop those more than FORGIVEN_AFTER old."""
        self.events = [e for e in self.events if e + FORGIVEN_AFTER > step]
        return len(self.events) < MAX_ROLLBACKS

    def candidates(self, step: int, available: Iterable[int]) -> list[int]:
        """Return the steps of the available states to try, best first.

        States at least ROLLBACK_STEPS old come first, newest first; then younger ones, oldest
        first.
        """
        oldest_first = sorted(available)
        old_enough = [s for s in oldest_first if s <= step - ROLLBACK_STEPS]
        too_young = [s for s in oldest_first if step - ROLLBACK_STEPS < s <= step]
        return old_enough[::-1] + too_young

    def roll_back(
        self,
        event: int,
        step: int,
        *,
        epoch: int,
        position: int,
        suspects: Iterable[int],
        windows: int,
    ) -> None:
        """Record a rollback from step `event` to `step`, and change the data order from there.

        The state is at window `position` of `epoch`. The window numbers `suspects` are left out of
        the rest of the epoch. Windows of refused steps are left out of the rest of the run, at most
        MAX_EXCLUDED of all `windows`.
        """
        room = int(MAX_EXCLUDED * windows) - sum(
            len(c["excluded_windows"]) for c in self.order_changes
        )
        refused = Counter(w for r in self.refusals for w in r["windows"])
        self.events.append(event)
        self.kept_step = step
        self.order_changes.append(
            {
                "epoch": epoch,
                "position": position,
                "suspects": [int(w) for w in suspects],
                "excluded_windows": sorted(w for w, _ in refused.most_common(max(0, room))),
            }
        )
        self.refusals = []

    def forget_windows(self) -> None:
        """Drop all window numbers, after the data changed."""
        self.refusals, self.order_changes = [], []

    def keep_due(self, step: int, planned_steps: int) -> bool:
        """Return whether a step checkpoint is due: at the start and every `keep_interval` steps."""
        if step == self.kept_step:
            return False
        return self.kept_step is None or step % keep_interval(planned_steps) == 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain lists and numbers."""
        return {name: copy.deepcopy(getattr(self, name)) for name in self.STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`, also of versions that used OLD_NAMES."""
        state = _renamed(copy.deepcopy(dict(state)))
        vars(self).update({name: state[name] for name in self.STATE if name in state})
        self.order_changes = [_renamed(change) for change in self.order_changes]


def _renamed(saved: dict[str, Any]) -> dict[str, Any]:
    return {OLD_NAMES.get(name, name): value for name, value in saved.items()}


def keep_interval(planned_steps: int) -> int:
    """Return the number of steps between step checkpoints: a twentieth of the run, 100 to 500.

    Below 100 saving would slow a tiny model down; above 500 a rollback would lose many minutes of a
    large one.
    """
    return min(500, max(100, planned_steps // 20))


def lr_doubling(planned_steps: int) -> int:
    """Return the number of accepted steps in which a lowered learning rate doubles: 4 to 25.

    It is a hundredth of the run, so three halvings cost 3 % of it. In 4 steps, trouble caused by
    the learning rate shows itself again.
    """
    return min(25, max(4, planned_steps // 100))
