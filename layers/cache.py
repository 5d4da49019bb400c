"""The key-value cache of sampling.

    cache = KeyValueCache((8, 1, 8, 512, 64), base=10_000.0, device=torch.device("cpu"))
    cache.begin(1)                                    # one more input
    mixed = cache.layers[0].attend(q, k, v, k_before_rotation)

L layers, B samples, H heads, T frames, C channels of a head. A column is what the model takes in
at once; column 0 is BOS.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from layers.attention import causal_attention
from layers.rotary import rotary_angles, rotate


class KeyValueCache:
    """Keys and values of BOS and the newest size - 1 columns: [L, B, H, size, C] each.

    Past `size` the oldest column gives way, but BOS stays in slot 0, turned so that it always seems
    as far away as in training at the farthest: models lean on their first position, and fall apart
    when it leaves (attention sinks: Xiao et al. 2023).

    A step attends over the slots in use; with `static` over all of them, the others masked. Then
    its shapes never change and only the device counts, so that it can be compiled and replayed as a
    CUDA graph.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        *,
        base: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        static: bool = False,
    ) -> None:
        """Of `shape` [L, B, H, size, C]; `base` is that of the rotary angles."""
        layers, *_, self.size, self.channels = shape
        self.base, self.static = base, static
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.bos_keys = torch.zeros((*shape[:3], 1, self.channels), device=device)  # float32
        self.layers = [
            LayerCache(self, self.keys[i], self.values[i], self.bos_keys[i]) for i in range(layers)
        ]
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # of the newest input
        self.slot = torch.zeros_like(self.position)  # where it goes
        self.host_position = 0  # of the next input; known without reading the device
        self.added: Tensor | None = None  # [B, 1, D], what labels add to every input

    def restart(self) -> None:
        """Begin another sequence; nothing of the one before is looked at."""
        self.host_position = 0

    def begin(self, inputs: int) -> None:
        """Set where the next inputs go and what they see, without reading from the device."""
        p, last = self.host_position, self.size - 1
        self.host_position += inputs
        self.prefilling, is_full = p == 0, p > last
        self.held = self.size if self.static else min(p + 1, self.size)
        self.unseen: Tensor | None = None  # [1, size], -inf where nothing is yet
        if self.static and p:
            self._begin_static()
            return
        self.position.fill_(p + inputs - 1)
        self.slot.fill_(p if p <= last else 1 + (p - 1) % last)
        if is_full:
            self._turn_bos()

    def _begin_static(self) -> None:
        """Do the work of `begin(1)` from what the device holds, whatever the position."""
        last = self.size - 1
        self.position += 1
        round_again = 1 + (self.position - 1) % last
        self.slot.copy_(torch.where(self.position > last, round_again, self.position))
        empty = torch.arange(self.size, device=self.slot.device) > self.position
        self.unseen = torch.zeros_like(self.keys[0, 0, 0, :, 0]).masked_fill(empty, -math.inf)
        self._turn_bos()

    def _turn_bos(self) -> None:
        """Turn BOS so that it seems size - 1 frames away at most."""
        beyond = (self.position - (self.size - 1)).clamp(min=0)
        rope = rotary_angles(beyond, self.channels, self.base)
        self.keys[..., :1, :] = rotate(self.bos_keys, rope)


class LayerCache(NamedTuple):
    """One block's keys and values [B, H, size, C], and its BOS key before rotation."""

    cache: KeyValueCache
    keys: Tensor
    values: Tensor
    bos_key: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, unrotated_k: Tensor) -> Tensor:
        """Store k and v [B, H, T, C] and attend over all that is held; T = 1 but for a prefill.

        One query is best served by plain products: SDPA's kernels on CPUs took 3 times as long in
        float32 and 10 times in bfloat16 (benchmarks/README.md).
        """
        cache, dtype = self.cache, self.keys.dtype
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if cache.prefilling:
            self.keys[:, :, : k.shape[2]] = k
            self.values[:, :, : k.shape[2]] = v
            self.bos_key.copy_(unrotated_k[:, :, :1])
            return causal_attention(q, k, v)
        self.keys.index_copy_(2, cache.slot, k)
        self.values.index_copy_(2, cache.slot, v)
        keys, values = self.keys[:, :, : cache.held], self.values[:, :, : cache.held]
        scores = (q * q.shape[-1] ** -0.5) @ keys.mT
        if cache.unseen is not None:
            scores = scores + cache.unseen
        return scores.softmax(-1) @ values
