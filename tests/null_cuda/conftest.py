"""Tests of CUDA's paths on a device without a card: `make test-null-cuda`.

Real are PyTorch's allocator, pinned memory, streams, autocast, GradScaler, compiler, Triton and
ptxas, CUDA-graph trees, and copies between host and device. Kernels do nothing, so no number that
the device computes means anything: what is seen is control flow, dtypes, launches, waits, graphs.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from sound import sampling
from training import saving

if not hasattr(ctypes.CDLL(None), "null_cuda_reset"):  # of runtime.cpp
    collect_ignore_glob = ["test_*"]


@pytest.fixture(autouse=True)
def finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed on the device: that sums and codes are finite has to be said for it."""
    launch_sums = saving.not_finite

    def not_finite(tensors: dict[str, torch.Tensor]) -> list[str]:
        launch_sums(tensors)
        return []

    monkeypatch.setattr(saving, "not_finite", not_finite)
    monkeypatch.setattr(sampling, "check_finite", lambda codes, first: codes.zero_())


@pytest.fixture(autouse=True)
def without_compiled_code() -> None:
    """Each test compiles for itself, from the compiler's cache on disk."""
    torch._dynamo.reset()
