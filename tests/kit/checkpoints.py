"""What checkpoints hold, and whether two of them are the same."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from run_folder.checkpoint import REQUIRED_KEYS, load_checkpoint, rng_state
from run_folder.files import run_name


def content_of(path: Path) -> dict[str, Any]:
    """What a checkpoint holds."""
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def assert_same_tensors(a: Any, b: Any, path: str = "") -> None:
    """Equality of nested checkpoints, tensors bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same_tensors(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_tensors(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    else:
        assert a == b, path


CLOCKS = {"seconds", "elapsed", "epoch_seconds", "log_seconds", "validated_seconds"}
OF_AUDIO = {"held_out_run"}  # known once evaluation audio was made


def comparable(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What must be equal after a resume: all but clocks, file names and figures of audio."""
    kept = ("model", "ema", "optimizer", "scaler", "guard", "ladder", "rng", "architecture", "data")
    progress = {n: v for n, v in checkpoint["progress"].items() if n not in CLOCKS | OF_AUDIO}
    return {**{name: checkpoint[name] for name in kept}, "progress": progress}


NAME = run_name(4, "t")


def tiny(step: int) -> dict:
    """A checkpoint of every kind of content, told apart by its step."""
    values = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(5, 7, generator=values), "b": torch.zeros(3, dtype=torch.bfloat16)}
    return {
        **{key: {} for key in REQUIRED_KEYS},
        "model": weights,
        "ema": {"w": torch.full((5, 7), torch.nan)},
        "optimizer": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{}]},
        "progress": {"step": step, "best": 1.5, "name": "ü", "none": None},
        "rng": rng_state(),
        "history": [{"epoch": 1, "train": 0.1 + 0.2}],
    }


def content(value):
    """Nested content to compare with ==; tensors as dtype, shape and bytes: NaN equals itself."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.flatten().view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, dict):
        return [(k, content(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [content(v) for v in value]
    return type(value).__name__, repr(value)


def step_of(path: Path) -> int:
    return load_checkpoint(path)["progress"]["step"]


def tree(folder: Path) -> dict[str, object]:
    """Names and bytes of everything in a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else os.lstat(p).st_mode
        for p in sorted(folder.rglob("*"))
    }


def hidden(folder: Path) -> list[str]:
    return [n for n in os.listdir(folder) if n.startswith(".")]


def in_child(action) -> int:
    """Run in a forked process; its wait status."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            action()
            os._exit(0)
        os._exit(1)
    return os.waitpid(pid, 0)[1]
