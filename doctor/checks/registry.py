"""All checks of a run, in the order in which their findings are told.

    findings = [f for check in CHECKS for f in check(Run(name, summaries, History(rows)))]

Each check is a function that takes a run and yields findings; docs/doctor.md has what it looks at.
Provable limits come first; the others compare a tensor with its own past and with what the
optimizer's steps allow, and are calibrated on healthy runs (benchmarks/journal.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from doctor.checks.displacement import check_average, check_displacement
from doctor.checks.files import check_container, check_finite, check_keys, check_steps
from doctor.checks.layers import check_attention, check_codebooks, check_ranks
from doctor.checks.metrics import (
    check_best,
    check_guessing,
    check_learning_rate,
    check_probe,
    check_steps_of_training,
    check_validation,
)
from doctor.checks.optimizer import check_moments, check_momentum, check_scale, check_updates
from doctor.checks.scale import check_scales
from doctor.examined_run import Run
from doctor.findings import Finding

Check = Callable[[Run], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (
    check_container, check_keys, check_steps, check_finite, check_moments, check_momentum,
    check_updates, check_scale, check_displacement, check_average, check_attention, check_ranks,
    check_scales, check_codebooks, check_learning_rate, check_best, check_guessing,
    check_validation, check_steps_of_training, check_probe,
)  # fmt: skip
