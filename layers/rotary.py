"""Rotary position embedding (Su et al. 2021), for whole windows and for single frames in sampling.

rope = rotary_angles(torch.arange(512), channels=64, base=10_000.0)
q, k = rotate(q, rope), rotate(k, rope)  # [B, H, T, C] each
"""

from __future__ import annotations

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cosines and signed sines of each frame's angles, [T, C] each


def rotary_angles(positions: Tensor, channels: int, base: float) -> Rope:
    """Return cosines and signed sines [T, C], float32, for `rotate` at positions [T].

    C is the even number of channels of a head. At position t, pair i has angle t * base^(-2i/C).
    """
    exponent = torch.arange(0, channels, 2, device=positions.device, dtype=torch.float32) / channels
    angle = positions.float()[:, None] * base**-exponent  # [T, C / 2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate each pair (x[i], x[i + C/2]) of x [B, H, T, C] by the angle of its frame."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
