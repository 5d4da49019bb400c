"""A child process that reads a file is held to its limits."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

from doctor.reading.child import in_child


def grow_memory(path: str, tell: Any) -> None:
    held = []
    while True:
        held.append(torch.empty(1 << 28, dtype=torch.uint8))  # never touched: costs nothing


def spin(path: str, tell: Any) -> None:
    while True:
        pass


def write_a_file(path: str, tell: Any) -> int:
    try:
        with open(path + ".written", "w") as file:
            file.write("x")
    except OSError:
        return 1
    return 0


def fall_over(path: str, tell: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_child_is_held_to_its_limits(good):
    assert "memory" in in_child(grow_memory, str(good)).text
    assert in_child(write_a_file, str(good)) == 1
    assert "SIGKILL" in in_child(fall_over, str(good)).text
    assert "no answer within 0.4 seconds" in in_child(spin, str(good), silence=0.4).text
