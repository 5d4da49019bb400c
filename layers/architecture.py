"""The architecture of a model: all that is needed to rebuild it for a checkpoint's weights.

config = ModelConfig(vocab_sizes=(1024,) * 9, pattern="depth")
ModelConfig.from_dict(config.to_dict()) == config
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layers.cache import KeyValueCache
from layers.rotary import Rope, rotary_angles

PATTERNS = ("parallel", "delay", "depth")  # in which the codes of a frame depend on each other


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The fields of an architecture; older checkpoints lack the later ones.

    Raises:
        ValueError: the sizes are invalid; the message names the flag.
    """

    vocab_sizes: tuple[int, ...]  # V of each codebook; may differ
    d_model: int = 768
    layers: int = 16
    heads: int = 12
    dropout: float = 0.1
    mlp_ratio: int = 4
    rope_base: float = 10_000.0
    qk_norm: bool = True
    value_residual: bool = False  # blocks attend to the mean of their own and the first's values
    pattern: str = "parallel"  # one of PATTERNS
    depth_layers: int = 1  # layers of the depth transformer, with pattern "depth" only
    depth_dropout: float = 0.0  # dropout of the depth transformer
    embed_fall: float = 0.0  # the embeddings of codebook k enter the sum times (k + 1) ** -fall
    code_features: int = 0  # numbers of a codec's vector that the model knows of each code
    labels: tuple[str, ...] = ()  # names of what a window can be labelled with

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab_sizes", tuple(int(v) for v in self.vocab_sizes))
        object.__setattr__(self, "labels", tuple(map(str, self.labels)))
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels: expected different names, found {self.labels}")
        if not self.vocab_sizes or min(self.vocab_sizes) < 2:
            raise ValueError(f"vocab_sizes: expected at least 2 entries each, {self.vocab_sizes=}")
        if min(self.d_model, self.layers, self.heads, self.mlp_ratio, self.depth_layers) < 1:
            raise ValueError("d_model, layers, heads, mlp_ratio, depth_layers: expected at least 1")
        if self.d_model % self.heads or (self.d_model // self.heads) % 2:
            raise ValueError(
                f"--d_model {self.d_model} over --heads {self.heads}: expected a whole, even "
                f"number of channels per head, found {self.d_model / self.heads:g}; 64 is usual"
            )
        if self.code_features < 0:
            raise ValueError(f"code_features: expected a number >= 0, found {self.code_features}")
        if not 0 <= self.embed_fall < math.inf:
            raise ValueError(f"embed_fall: expected a number >= 0, found {self.embed_fall}")
        for name in ("dropout", "depth_dropout"):
            if not 0 <= (rate := getattr(self, name)) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: expected 0 <= rate < 1, found {rate}")
        if self.pattern not in PATTERNS:
            raise ValueError(f"--pattern: expected one of {PATTERNS}, found {self.pattern!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain types for a checkpoint; `from_dict` is the inverse."""
        fields = {**dataclasses.asdict(self), "vocab_sizes": list(self.vocab_sizes)}
        labels = list(fields.pop("labels"))
        return {**fields, "labels": labels} if labels else fields  # versions before know none

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> ModelConfig:
        """Build from the result of `to_dict`; raises ValueError on unknown or invalid fields."""
        unknown = set(saved) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(
                f"architecture: unknown fields {sorted(unknown)}; a newer version saved it"
            )
        return cls(**saved)

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks, K."""
        return len(self.vocab_sizes)

    def numbers_of(self, labels: Sequence[str]) -> list[int]:
        """Return the numbers of labels by name; raises ValueError for one that the model lacks."""
        known = {name: number for number, name in enumerate(self.labels)}
        if unknown := [name for name in labels if name not in known]:
            raise ValueError(
                f"unknown label {', '.join(map(repr, unknown))}; the model knows "
                + (", ".join(map(repr, self.labels)) or "none: it was trained without --labels")
            )
        return [known[name] for name in labels]

    @property
    def channels(self) -> int:
        """Channels of an attention head, C."""
        return self.d_model // self.heads

    @property
    def lag(self) -> int:
        """Frames by which the last codebook is delayed: K - 1 with pattern "delay", else 0."""
        return self.num_codebooks - 1 if self.pattern == "delay" else 0

    def depth(self) -> ModelConfig:
        """Return the depth transformer's architecture: half the width, heads of 32 channels."""
        width = max(32, self.d_model // 64 * 32)
        return dataclasses.replace(
            self,
            d_model=width,
            heads=width // 32,
            layers=self.depth_layers,
            dropout=self.depth_dropout,
        )

    def rope(self, positions: Tensor) -> Rope:
        """Return the rotary factors of positions [T]; see `rotary_angles`."""
        return rotary_angles(positions, self.channels, self.rope_base)

    def new_cache(
        self,
        batch: int,
        size: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        static: bool = False,
    ) -> KeyValueCache:
        """Return an empty key-value cache of `size` positions for all layers."""
        return KeyValueCache(
            (self.layers, batch, self.heads, size, self.channels),
            base=self.rope_base,
            device=device,
            dtype=dtype,
            static=static,
        )
