"""Notices when training has become far slower than usual, for example beside another process.

pace = Pace()
if (warning := pace.note(frames_per_s, seconds, "cpu")) is not None:
    print(warning)
"""

from __future__ import annotations

import os

SLOW_FACTOR = 3.0  # below a third of the usual speed, training is slow
SLOW_SECONDS = 60.0  # seconds of slow training in a row before a warning
MEMORY = 0.1  # weight of the newest interval in the usual speed


class Pace:
    """Keeps the usual speed, averaged over intervals that were not slow, and times slow spells."""

    def __init__(self) -> None:
        self.usual = 0.0  # frames a second
        self.slow_seconds = 0.0
        self.has_warned = False

    def note(self, frames_per_s: float, seconds: float, device_type: str) -> str | None:
        """Add an interval of `seconds`; return a warning with a remedy, once for a slow spell."""
        if frames_per_s * SLOW_FACTOR >= self.usual:
            share = MEMORY if self.usual else 1.0
            self.usual += share * (frames_per_s - self.usual)
            self.slow_seconds, self.has_warned = 0.0, False
            return None
        self.slow_seconds += seconds
        if self.slow_seconds < SLOW_SECONDS or self.has_warned:
            return None
        self.has_warned = True
        remedy = "check with `nvidia-smi` and `top` what else is running"
        if device_type == "cpu":
            threads = os.environ.get("OMP_NUM_THREADS")
            remedy = "end what else is running (`top` shows it)"
            if threads != "1":
                remedy += (
                    ", or stop with Ctrl-C and go on with OMP_NUM_THREADS=1 before the command"
                )
        return (
            f"training is slow: {frames_per_s:.0f} frames/s for {self.slow_seconds:.0f} s, where "
            f"{self.usual:.0f} frames/s were usual; {remedy}"
        )
