"""Checks of a run, one file a family; each registers itself (`check` in doctor/findings.py).

    findings = findings_of(run)

Provable limits come first. The others compare a tensor with its earlier values and with the reach
of the optimizer's steps; they are calibrated on healthy runs (benchmarks/journal.md).
"""

from __future__ import annotations

import importlib
import pkgutil

from doctor.examined_run import ExaminedRun
from doctor.findings import CHECKS, Finding, ids_in_order

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def findings_of(run: ExaminedRun) -> list[Finding]:
    """The findings of all checks, families in the order of the table in docs/doctor.md."""
    functions = dict.fromkeys(CHECKS[id].function for id in ids_in_order())
    return [finding for function in functions for finding in function(run)]
