"""When a run goes back to an older state, to which, and what it then leaves out: decisions alone.

    policy.refuse(windows)                                # of the step that the guard refused
    trouble = policy.trouble(guard.refused_in_a_row)      # not None: roll back, or stop
    if policy.may_roll_back(step):
        policy.candidates(step, available)                # steps of states to try, best first

rollback.py carries them out.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

REFUSED_IN_A_ROW = 10  # a rollback after so many refused steps
REFUSED_LATELY, LATELY = 10, 1000  # or after so many of the last so many steps, taken or refused
ROLLBACK_STEPS = 100  # a state so much older than the event has not seen what led to it
MAX_ROLLBACKS = 3  # within FORGIVEN_AFTER steps; then the run stops
FORGIVEN_AFTER = 5000  # steps beyond an event, after which it counts no more
SUSPECT_STEPS = 30  # whose windows the rest of the epoch leaves out: refused and accepted ones
OLD_NAMES = {"detours": "order_changes", "barred": "excluded_windows"}  # in checkpoints
MAX_EXCLUDED = 0.2  # share of the windows that may be left out for good


class RollbackPolicy:
    """Decides what follows when skipping a step does not help: roll back, three times, then stop.

    A refused step costs nothing but its windows. Ten in a row mean that the weights are damaged,
    ten of the last thousand that they, or the data, soon will be: the run then goes back to a state
    at least 100 steps older, with a lower learning rate, without the windows before the event and
    in another order (Chowdhery et al. 2022, section 5.1). Windows of the steps whose refusal led
    there are not drawn again at all, so that bad windows in the data cannot cause it for ever.
    """

    STATE = ("attempts", "refusals", "events", "order_changes", "kept_step")

    def __init__(self) -> None:
        self.attempts = 0  # steps, taken or refused; never goes back
        self.refusals: list[dict[str, Any]] = []  # of the last LATELY steps: attempt, windows
        self.events: list[int] = []  # steps that were rolled back from and are not forgiven yet
        self.order_changes: list[dict[str, Any]] = []  # see npq_dataset.EpochOrder
        self.kept_step: int | None = None  # newest step checkpoint

    def attempt(self) -> None:
        """Count a step, taken or refused."""
        self.attempts += 1

    def refuse(self, windows: Iterable[int]) -> None:
        """Remember the windows of the refused step just counted."""
        self.refusals.append({"attempt": self.attempts, "windows": [int(w) for w in windows]})
        oldest = self.attempts - LATELY
        self.refusals = [r for r in self.refusals if r["attempt"] > oldest]

    def trouble(self, refused_in_a_row: int) -> str | None:
        """Why a rollback is due, or None; call it after a refusal."""
        if refused_in_a_row >= REFUSED_IN_A_ROW:
            return f"{REFUSED_IN_A_ROW} steps in a row were refused"
        if len(self.refusals) >= REFUSED_LATELY:
            return f"{REFUSED_LATELY} of the last {LATELY} steps were refused"
        return None

    def may_roll_back(self, step: int) -> bool:
        """Whether one more rollback is allowed; forgives events that lie far back."""
        self.events = [e for e in self.events if e + FORGIVEN_AFTER > step]
        return len(self.events) < MAX_ROLLBACKS

    def candidates(self, step: int, available: Iterable[int]) -> list[int]:
        """Steps of the available states to try, best first.

        The newest that is old enough, then older ones; where none is, the oldest.
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
        """Record that trouble at step `event` led back to `step`, at a place of the data order.

        `position` counts windows of the epoch. `suspects`, numbers of windows, are left out of the
        rest of it; windows of refused steps of the whole run, at most MAX_EXCLUDED of all
        `windows`.
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
        """Drop what refers to windows by number, after the data changed."""
        self.refusals, self.order_changes = [], []

    def keep_due(self, step: int, planned_steps: int) -> bool:
        """Whether a step checkpoint is due: at the start, and every `keep_interval` steps."""
        if step == self.kept_step:
            return False
        return self.kept_step is None or step % keep_interval(planned_steps) == 0

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {name: copy.deepcopy(getattr(self, name)) for name in self.STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s result, of this version or of one with OLD_NAMES."""
        state = _renamed(copy.deepcopy(dict(state)))
        vars(self).update({name: state[name] for name in self.STATE if name in state})
        self.order_changes = [_renamed(change) for change in self.order_changes]


def _renamed(saved: dict[str, Any]) -> dict[str, Any]:
    return {OLD_NAMES.get(name, name): value for name, value in saved.items()}


def keep_interval(planned_steps: int) -> int:
    """Steps between the step checkpoints to roll back to; a pure function, so a resume agrees.

    A twentieth of the run, but not below 100, where saving a tiny model would begin to show, and
    not above 500: minutes of a large one.
    """
    return min(500, max(100, planned_steps // 20))


def lr_doubling(planned_steps: int) -> int:
    """Accepted steps in which a cut learning rate doubles on its way back.

    A hundredth of the run: three cuts then cost 3 % of it. At most 25; at least 4, over which
    trouble that is the rate's fault has shown itself.
    """
    return min(25, max(4, planned_steps // 100))
