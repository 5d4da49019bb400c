"""The model: a causal transformer over the K parallel codes of each frame.

    model = CodesTransformer(ModelConfig(vocab_sizes=(1024,) * 9))
    logits = model(codes)                        # [B, T, K] int64 -> [B, T, K, V]
    losses = model.losses(codes, label_smoothing=0.05)

    cache = KeyValueCache(model, batch=1, ctx=512)
    logits = model.prefill(prompt, cache)        # [B, T, K], T may be 0 -> [B, K, V]
    logits = model.step(frame, cache)            # [B, K], drawn from them -> [B, K, V]

Alignment is the model's contract: logits[:, t] predicts codes[:, t] from codes[:, :t]. Nobody
outside shifts anything.

B windows of a micro-batch, T frames, K codebooks, V entries of the largest codebook, D model width,
H attention heads, C = D / H channels of a head.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture: all that is needed to build a model that fits a checkpoint's weights."""

    vocab_sizes: tuple[int, ...]  # V of each codebook; may differ
    d_model: int = 768
    layers: int = 16
    heads: int = 12
    dropout: float = 0.1
    mlp_ratio: int = 4
    rope_base: float = 10_000.0
    qk_norm: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab_sizes", tuple(int(v) for v in self.vocab_sizes))
        if not self.vocab_sizes or min(self.vocab_sizes) < 2:
            raise ValueError(f"vocab_sizes: expected at least 2 entries each, {self.vocab_sizes=}")
        if min(self.d_model, self.layers, self.heads, self.mlp_ratio) < 1:
            raise ValueError("d_model, layers, heads and mlp_ratio: expected at least 1 each")
        if self.d_model % self.heads or (self.d_model // self.heads) % 2:
            raise ValueError(
                f"--d_model {self.d_model} over --heads {self.heads}: expected a whole, even "
                f"number of channels per head, found {self.d_model / self.heads:g}; 64 is usual"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout: expected 0 <= dropout < 1, found {self.dropout}")

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for a checkpoint; `from_dict` is the way back."""
        return {**dataclasses.asdict(self), "vocab_sizes": list(self.vocab_sizes)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> ModelConfig:
        """Build from `to_dict`'s result; raises ValueError on fields that this version lacks."""
        unknown = set(saved) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(
                f"architecture: unknown fields {sorted(unknown)}; a newer version saved it"
            )
        return cls(**saved)

    @property
    def num_codebooks(self) -> int:
        """K."""
        return len(self.vocab_sizes)


class Losses(NamedTuple):
    """Mean losses over the frames of a batch, nats per code, float32 [K] each."""

    ce: Tensor  # plain cross-entropy
    objective: Tensor  # with label smoothing and z-loss; what training minimises


class CodesTransformer(nn.Module):
    """Summed codebook embeddings, pre-norm blocks with rotary positions, K heads as one product.

    Biases are left out throughout, as in PaLM (Chowdhery et al. 2022, section 2) and Llama. Rotary
    positions need no table, so any ctx can be trained or sampled with the same weights. The summed
    embeddings are RMS-normalised before the first block: without that, gradients spike when
    attention first forms (benchmarks/README.md).
    """

    row_offset: Tensor
    sizes: Tensor
    absent: Tensor | None

    def __init__(
        self, config: ModelConfig, *, grad_checkpoint: bool = False, embed_grad: float = 1.0
    ) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpoint = grad_checkpoint
        self.embed_grad = embed_grad
        k, v, d = config.num_codebooks, max(config.vocab_sizes), config.d_model
        self.embed = nn.Embedding(k * v, d)  # codebook k owns rows k * V to (k + 1) * V
        self.bos = nn.Parameter(torch.empty(d))  # stands for the frame before the first
        self.embed_norm = nn.RMSNorm(d, eps=1e-8, elementwise_affine=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(d, eps=NORM_EPS)
        self.head = nn.Linear(d, k * v, bias=False)
        self.register_buffer("row_offset", torch.arange(k) * v, persistent=False)  # [K]
        sizes = torch.tensor(config.vocab_sizes)
        self.register_buffer("sizes", sizes, persistent=False)  # [K]
        absent = torch.arange(v) >= sizes[:, None] if min(config.vocab_sizes) < v else None
        self.register_buffer("absent", absent, persistent=False)  # [K, V] bool, None if all equal
        self.init_weights()

    def init_weights(self) -> None:
        """Normal weights; gains are one already.

        Outputs of blocks start at zero, so each block begins as the identity; inputs of blocks
        keep the variance. Embeddings are normalised and the head's logits should begin even, so
        both start small: Adam's steps have a size of their own, and turn small rows sooner.
        """
        for name, p in self.named_parameters():
            if name.endswith(("attn.out.weight", "mlp.down.weight")):
                nn.init.zeros_(p)
            elif name.endswith(("attn.qkv.weight", "mlp.up.weight")):
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            elif name in ("embed.weight", "bos", "head.weight"):
                nn.init.normal_(p, std=0.001)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes [B, T, K] int64 -> logits [B, T, K, V]; entries a codebook lacks are -inf."""
        x = self.embed_past(codes)
        if self.embed_grad != 1.0:  # of the tables alone (GLM-130B: Zeng et al. 2022)
            x = self.embed_grad * x + (1 - self.embed_grad) * x.detach()
        x = self.dropout(self.embed_norm(x))
        rope = rotary_angles(torch.arange(codes.shape[1], device=codes.device), self.config)
        for block in self.blocks:
            if self.grad_checkpoint and self.training:
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
        return self.logits_of(x)

    def embed_past(self, codes: Tensor) -> Tensor:
        """Codes [B, T, K] -> [B, T, D]: at frame t the summed embeddings of frame t - 1."""
        bos = self.bos.expand(len(codes), 1, -1)
        return torch.cat((bos, self.embed_frames(codes[:, :-1])), dim=1)

    def embed_frames(self, codes: Tensor) -> Tensor:
        """Codes [B, T, K] -> summed embeddings [B, T, D]."""
        rows = (codes + self.row_offset).flatten(0, 1)
        # One bag per frame: gathers and sums without the [B, T, K, D] in between.
        return F.embedding_bag(rows, self.embed.weight, mode="sum").unflatten(0, codes.shape[:2])

    def logits_of(self, x: Tensor) -> Tensor:
        """Last hidden states [B, T, D] -> [B, T, K, V]."""
        logits = self.head(self.norm(x)).unflatten(-1, (self.config.num_codebooks, -1))
        return logits if self.absent is None else logits.masked_fill(self.absent, -math.inf)

    def prefill(self, prompt: Tensor, cache: KeyValueCache) -> Tensor:
        """Fill an empty cache with BOS and a prompt; logits [B, K, V] of the frame after it.

        Of a prompt [B, T, K] longer than ctx - 1 frames the last ctx - 1 count. T may be 0.
        """
        prompt = prompt[:, max(0, prompt.shape[1] - cache.ctx + 1) :]
        x = self.bos.expand(len(prompt), 1, -1)
        if prompt.shape[1]:
            x = torch.cat((x, self.embed_frames(prompt)), dim=1)
        cache.begin(x.shape[1])
        return self._through_cache(x, torch.arange(x.shape[1], device=x.device), cache)

    def step(self, frame: Tensor, cache: KeyValueCache) -> Tensor:
        """Take in the frame [B, K] just drawn; logits [B, K, V] of the next."""
        cache.begin(1)
        return self.advance(frame, cache)

    def advance(self, frame: Tensor, cache: KeyValueCache) -> Tensor:
        """`step` after `cache.begin(1)`: static shapes and tensors alone, so it can be compiled."""
        return self._through_cache(self.embed_frames(frame[:, None]), cache.position, cache)

    def _through_cache(self, x: Tensor, positions: Tensor, cache: KeyValueCache) -> Tensor:
        x = self.embed_norm(x)
        rope = rotary_angles(positions, self.config)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, cache.layer(layer))
        cache.position += x.shape[1]
        return self.logits_of(x[:, -1:])[:, 0]

    def losses(self, codes: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Losses:
        """Cross-entropy of codes [B, T, K] given their past, per codebook.

        Label smoothing spreads its share evenly over the V_k entries that the codebook has
        (Szegedy et al. 2016, section 7). The z-loss is the square of the log partition, and keeps
        it near 0 (Chowdhery et al. 2022, section 5).
        """
        logits = self(codes).float()
        log_partition = logits.logsumexp(-1)  # [B, T, K]
        target = logits.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
        ce = (log_partition - target).mean((0, 1))
        objective = ce
        if z_loss:
            objective = objective + z_loss * log_partition.square().mean((0, 1))
        if not label_smoothing:
            return Losses(ce, objective)
        present = logits if self.absent is None else logits.masked_fill(self.absent, 0.0)
        even = (target - present.sum(-1) / self.sizes).mean((0, 1))
        return Losses(ce, objective + label_smoothing * even)

    def num_parameters(self) -> int:
        """Trainable parameters, all tables included."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_frame(self, ctx: int) -> int:
        """Floating-point operations to train on one frame, forward and backward.

        6 per weight of a matrix product (Kaplan et al. 2020, section 2.1) and 6 * ctx * D a layer
        for causal attention's two products, half of whose square is masked.
        """
        weights = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        weights += self.head.weight.numel()
        return 6 * weights + 6 * self.config.layers * ctx * self.config.d_model


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.attn = Attention(config)
        self.norm2 = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.mlp = SquaredReluMlp(config)
        # Dropout stays off the attention weights: there it would push SDPA from its fused kernels.
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.dropout(self.attn(self.norm1(x), rope, cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Causal self-attention with rotary positions; queries and keys are RMS-normalised by default.

    The norm bounds every attention logit by the product of the two gains times sqrt(C), so that
    they cannot run away (QK-norm: Henry et al. 2020; Dehghani et al. 2023, section 3.2).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.d_model // config.heads
        self.heads = config.heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.q_norm = nn.RMSNorm(channels, eps=NORM_EPS) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(channels, eps=NORM_EPS) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; with a cache over what it holds, too."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, H, C]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, T, C] each
        q, k = self.q_norm(q.float()), self.k_norm(k.float())
        rotated = rotate(q, rope).to(v.dtype), rotate(k, rope).to(v.dtype)
        mixed = causal_attention(*rotated, v) if cache is None else cache.attend(*rotated, v, k)
        return self.out(mixed.transpose(1, 2).flatten(2))


class SquaredReluMlp(nn.Module):
    """down(relu(up(x))^2), after Primer (So et al. 2021)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.mlp_ratio * config.d_model
        self.up = nn.Linear(config.d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.down(F.relu(self.up(x)).square())


# --- positions -----------------------------------------------------------------------------------

NORM_EPS = 1e-6


Rope = tuple[Tensor, Tensor]


def rotary_angles(positions: Tensor, config: ModelConfig) -> Rope:
    """Factors of `rotate`, [T, C] float32 each: the angle of pair i at t is t * base^(-2i/C).

    Rotary position embedding (Su et al. 2021).
    """
    channels = config.d_model // config.heads
    exponent = torch.arange(0, channels, 2, device=positions.device, dtype=torch.float32) / channels
    angle = positions.float()[:, None] * config.rope_base**-exponent  # [T, C / 2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (x[i], x[i + C/2]) of [B, H, T, C] by the angle of its frame."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


# --- the cache of sampling -----------------------------------------------------------------------


class KeyValueCache:
    """Keys and values of BOS and the newest ctx - 1 frames: [L, B, H, ctx, C] each.

    Past ctx frames the oldest frame gives way, but BOS stays in slot 0, turned so that it always
    seems as far away as in training at the farthest: models lean on their first position, and fall
    apart when it leaves (attention sinks: Xiao et al. 2023).
    """

    def __init__(
        self, model: CodesTransformer, *, batch: int, ctx: int, dtype: torch.dtype | None = None
    ) -> None:
        config, weight = model.config, model.head.weight
        channels = config.d_model // config.heads
        shape = (config.layers, batch, config.heads, ctx, channels)
        self.config, self.ctx = config, ctx
        self.keys = torch.zeros(shape, device=weight.device, dtype=dtype or weight.dtype)
        self.values = torch.zeros_like(self.keys)
        unrotated = (*shape[:3], 1, channels)
        self.bos_keys = torch.zeros(unrotated, device=weight.device)  # float32
        self.position = torch.zeros(1, dtype=torch.int64, device=weight.device)  # of the next input
        self.host_position = 0  # the same; known without reading the device
        self.is_full = False

    def begin(self, inputs: int) -> None:
        """Settle where the next inputs go and what they see: all on the device, no host read."""
        self.prefilling = self.host_position == 0
        self.is_full = self.host_position >= self.ctx
        self.host_position += inputs
        if self.prefilling:
            return
        last, p = self.ctx - 1, self.position
        self.slot = torch.where(p <= last, p, 1 + (p - 1) % last)  # [1]
        if self.is_full:
            self.bos_rope = rotary_angles(p - last, self.config)
        else:
            self.seen = (torch.arange(self.ctx, device=p.device) <= p)[None]  # [1, ctx]

    def layer(self, index: int) -> LayerCache:
        """The part of one block."""
        return LayerCache(self, self.keys[index], self.values[index], self.bos_keys[index])


class LayerCache(NamedTuple):
    """One block's keys and values [B, H, ctx, C], and its BOS key before rotation."""

    cache: KeyValueCache
    keys: Tensor
    values: Tensor
    bos_key: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, unrotated_k: Tensor) -> Tensor:
        """Store k and v [B, H, T, C] and attend over all that is held; T = 1 but for a prefill."""
        cache = self.cache
        if cache.prefilling:
            self.keys[:, :, : k.shape[2]] = k
            self.values[:, :, : k.shape[2]] = v
            self.bos_key.copy_(unrotated_k[:, :, :1])
            return causal_attention(q, k, v)
        self.keys.index_copy_(2, cache.slot, k)
        self.values.index_copy_(2, cache.slot, v)
        if cache.is_full:
            self.keys[:, :, :1] = rotate(self.bos_key, cache.bos_rope).to(k.dtype)
        seen = None if cache.is_full else cache.seen
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=seen)


# --- attention kernels ---------------------------------------------------------------------------


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention over the past, [B, H, T, C] each, by the best kernel."""
    with sdpa_kernels():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def find_sdpa_kernels() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """The context that lets SDPA choose flash, memory-efficient or plain kernels.

    PyTorch 2.3 moved it and changed its arguments. Older: the old name. None: SDPA's own choice.
    cuDNN's kernel is left out: it recompiles for every shape.
    """
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        old = getattr(torch.backends.cuda, "sdp_kernel", None)
        return old if old is not None else contextlib.nullcontext
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return lambda: sdpa_kernel(kernels)


sdpa_kernels = find_sdpa_kernels()
