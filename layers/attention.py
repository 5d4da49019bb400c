"""Causal attention by PyTorch's fused kernels.

    mixed = causal_attention(q, k, v)  # [B, H, T, C] each

B windows, H heads, T frames, C channels of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layers import cpu

MOST_WINDOWS = 65_535  # CUDA's fused kernels lay the batch along a grid axis that ends here


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal scaled dot-product attention; q, k, v and the result are [B, H, T, C]."""
    if cpu.prefers_blocks(q):
        return cpu.blocked_attention(q, k, v)
    with sdpa_kernels():
        if len(q) <= MOST_WINDOWS:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    parts = zip(*(x.split(MOST_WINDOWS) for x in (q, k, v)), strict=True)
    return torch.cat([causal_attention(*part) for part in parts])


def find_sdpa_kernels() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return a context in which SDPA uses flash, memory-efficient or plain kernels.

    cuDNN's kernel is excluded because it recompiles for every shape. An older PyTorch without this
    context manager gets its former one, or none: then SDPA chooses.
    """
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        old = getattr(torch.backends.cuda, "sdp_kernel", None)
        return old if old is not None else contextlib.nullcontext
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return lambda: sdpa_kernel(kernels)


sdpa_kernels = find_sdpa_kernels()
