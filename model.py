"""The model: a causal transformer over the K parallel codes of each frame.

    model = CodesTransformer(ModelConfig(vocab_sizes=(1024,) * 9, pattern="depth"))
    logits = model(codes)                        # [B, T, K] int64 -> [B, T, K, V]
    ce, objective = model.losses(codes, label_smoothing=0.05)

    cache = model.new_cache(batch=1, ctx=512)
    state = model.prefill(prompt, cache)         # [B, T, K], T may be 0 -> [B, D]
    frame = model.draw(state, choose)            # -> [B, K]
    state = model.step(frame, cache)             # -> [B, D], of the next frame

Alignment is the model's contract: logits[:, t, k] predicts codes[:, t, k]. What it may depend on is
the pattern's order; in each the sum of the log-probabilities is the log-likelihood of the window:

- parallel: codes[:, t] given codes[:, :t]; the K codes of a frame are independent of each other.
- delay: codebook k lags k frames behind, so codes[:, t, k] also sees what stands left of it in the
  picture of `shift`: lower codebooks of its own frame, and of later ones (MusicGen: Copet et al.
  2023, section 2.2).
- depth: a small transformer runs over the K codes of each frame, so codes[:, t, k] sees all of
  codes[:, :t] and codes[:, t, :k] (RQ-Transformer: Lee et al. 2022; Moshi: Defossez et al. 2024).

B windows of a micro-batch, T frames, K codebooks, V entries of the largest codebook, D model width,
L layers, H attention heads, C = D / H channels of a head, N = B * T frames, E width of the depth
transformer. A column is what the model takes in or predicts at once: a frame, or with delay one
code of each of K frames.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from layers.attention import causal_attention
from layers.cache import KeyValueCache, LayerCache
from layers.loss import Losses, head_logits, linear_cross_entropy
from layers.rotary import Rope, rotary_angles, rotate

PATTERNS = ("parallel", "delay", "depth")
ABSENT = -1  # in the place of a code: nothing is known here, and nothing is added to the embedding
EMBED_STD = 0.001  # of embeddings, BOS and head at the start
NORM_EPS = 1e-6
EMBED_NORM_EPS = 1e-8  # far below EMBED_STD^2, a row's mean square; NORM_EPS is as large as that
Choose = Callable[[Tensor, int], Tensor]  # logits [B, n, V], first codebook -> codes [B, n]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture: all that is needed to build a model that fits a checkpoint's weights.

    Raises ValueError on sizes that make no model; the message names the flag.
    """

    vocab_sizes: tuple[int, ...]  # V of each codebook; may differ
    d_model: int = 768
    layers: int = 16
    heads: int = 12
    dropout: float = 0.1
    mlp_ratio: int = 4
    rope_base: float = 10_000.0
    qk_norm: bool = True
    pattern: str = "parallel"  # one of PATTERNS
    depth_layers: int = 1  # of the depth transformer; other patterns have none

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab_sizes", tuple(int(v) for v in self.vocab_sizes))
        if not self.vocab_sizes or min(self.vocab_sizes) < 2:
            raise ValueError(f"vocab_sizes: expected at least 2 entries each, {self.vocab_sizes=}")
        if min(self.d_model, self.layers, self.heads, self.mlp_ratio, self.depth_layers) < 1:
            raise ValueError("d_model, layers, heads, mlp_ratio, depth_layers: expected at least 1")
        if self.d_model % self.heads or (self.d_model // self.heads) % 2:
            raise ValueError(
                f"--d_model {self.d_model} over --heads {self.heads}: expected a whole, even "
                f"number of channels per head, found {self.d_model / self.heads:g}; 64 is usual"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout: expected 0 <= dropout < 1, found {self.dropout}")
        if self.pattern not in PATTERNS:
            raise ValueError(f"--pattern: expected one of {PATTERNS}, found {self.pattern!r}")

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

    @property
    def channels(self) -> int:
        """C of the backbone's heads."""
        return self.d_model // self.heads

    @property
    def lag(self) -> int:
        """Frames that the last codebook lags behind the first."""
        return self.num_codebooks - 1 if self.pattern == "delay" else 0

    def depth(self) -> ModelConfig:
        """The depth transformer's own architecture: half the width, in heads of 32 channels."""
        width = max(32, self.d_model // 64 * 32)
        return dataclasses.replace(
            self, d_model=width, heads=width // 32, layers=self.depth_layers, dropout=0.0
        )

    def rope(self, positions: Tensor) -> Rope:
        """Rotary angles of positions [T]."""
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
        """An empty cache of `size` positions for all layers."""
        return KeyValueCache(
            (self.layers, batch, self.heads, size, self.channels),
            base=self.rope_base,
            device=device,
            dtype=dtype,
            static=static,
        )


# --- the delay pattern ---------------------------------------------------------------------------


def shift(codes: Tensor, lag: int) -> Tensor:
    """Delay codebook k by k frames: [B, T, K] -> [B, T + lag, K], ABSENT where nothing is.

    K = 3, T = 4, lag = 2; a column of the picture is a column of the model:

        k = 0    a0 a1 a2 a3  .  .
        k = 1     . b0 b1 b2 b3  .
        k = 2     .  . c0 c1 c2 c3

    With lag 0 the codes stay as they are: the other patterns.
    """
    if not lag:
        return codes
    frames, k = codes.shape[1], codes.shape[2]
    shifted = codes.new_full((len(codes), frames + lag, k), ABSENT)
    for i in range(k):
        shifted[:, i : i + frames, i] = codes[..., i]
    return shifted


def unshift(shifted: Tensor, lag: int) -> Tensor:
    """The way back: [B, T + lag, K, ...] -> [B, T, K, ...]."""
    if not lag:
        return shifted
    frames = shifted.shape[1] - lag
    return torch.stack([shifted[:, i : i + frames, i] for i in range(shifted.shape[2])], dim=2)


# --- the model -----------------------------------------------------------------------------------


class CodesTransformer(nn.Module):
    """Summed codebook embeddings, pre-norm blocks with rotary positions, K heads as one product.

    Biases are left out throughout, as in PaLM (Chowdhery et al. 2022, section 2) and Llama. Rotary
    positions need no table, so any ctx can be trained or sampled with the same weights. The summed
    embeddings are RMS-normalised before the first block: without that, gradients spike when
    attention first forms (benchmarks/journal.md).

    The keywords matter to training alone: `grad_checkpoint` keeps only the inputs of blocks and
    runs blocks again in backward; `code_dropout` is the probability that a code goes in as ABSENT;
    `depth_share` of the frames make depth's loss.
    """

    row_offset: Tensor  # [K] int64

    def __init__(
        self,
        config: ModelConfig,
        *,
        grad_checkpoint: bool = False,
        code_dropout: float = 0.0,
        depth_share: float = 1.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpoint = grad_checkpoint
        self.code_dropout = code_dropout
        # A whole number: a float that differs between models becomes a symbol for the compiler.
        self.drawn_of_1024 = max(1, round(1024 * depth_share))
        k, v, d = config.num_codebooks, max(config.vocab_sizes), config.d_model
        self.embed = nn.Embedding(k * v, d)  # codebook k owns rows k * V to (k + 1) * V
        self.bos = nn.Parameter(torch.empty(d))  # stands for the frame before the first
        self.embed_norm = nn.RMSNorm(d, eps=EMBED_NORM_EPS, elementwise_affine=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(d, eps=NORM_EPS)
        self.depth = DepthTransformer(config) if config.pattern == "depth" else None
        width = config.depth().d_model if self.depth else d
        self.head = Heads(width, k, v)
        self.register_buffer("row_offset", torch.arange(k) * v, persistent=False)
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
            elif name.endswith(("attn.qkv.weight", "mlp.up.weight", "proj.weight")):
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            elif name.endswith(("embed.weight", "bos", "head.weight")):
                nn.init.normal_(p, std=EMBED_STD)

    # --- whole windows ---------------------------------------------------------------------------

    def forward(self, codes: Tensor) -> Tensor:
        """Codes [B, T, K] int64 -> logits [B, T, K, V]; entries a codebook lacks are -inf."""
        states = self.head_states(self.hidden_states(codes), codes)
        return self.logits_of(states).unflatten(0, codes.shape[:2])

    def losses(
        self,
        codes: Tensor,
        label_smoothing: float = 0.0,
        weights: Tensor | None = None,
    ) -> Losses:
        """Losses of codes [B, T, K] under the pattern's order; weights [K] as in `layers/loss.py`.

        In training the depth transformer sees a share `depth_share` of the frames, drawn anew each
        time: an unbiased estimate at a fraction of its cost.
        """
        hidden, frames = self.hidden_states(codes), codes
        if self.depth and self.training and self.drawn_of_1024 < 1024:
            count = codes.shape[0] * codes.shape[1]
            drawn = torch.randperm(count, device=codes.device)
            drawn = drawn[: max(1, count * self.drawn_of_1024 // 1024)]
            hidden, frames = hidden.flatten(0, 1)[drawn][None], codes.flatten(0, 1)[drawn][None]
        return linear_cross_entropy(
            self.head_states(hidden, frames),
            self.head.by_codebook(),
            frames.flatten(0, 1),
            self.config.vocab_sizes,
            weights=weights,
            label_smoothing=label_smoothing,
        )

    def hidden_states(self, codes: Tensor) -> Tensor:
        """Codes [B, T, K] -> the backbone's normalised output [B, T + lag, D]."""
        shifted = shift(codes, self.config.lag)
        if self.code_dropout and self.training:
            gone = torch.rand(shifted.shape, device=codes.device) < self.code_dropout
            shifted = shifted.masked_fill(gone, ABSENT)
        x = self.embed_past(shifted)
        x = F.dropout(self.embed_norm(x), self.config.dropout, self.training)
        rope = self.config.rope(torch.arange(x.shape[1], device=codes.device))
        for block in self.blocks:
            if self.grad_checkpoint and self.training:
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
        return self.norm(x)

    def embed_past(self, codes: Tensor) -> Tensor:
        """Codes [B, T, K] -> [B, T, D]: at frame t the summed embeddings of frame t - 1."""
        bos = self.bos.expand(len(codes), 1, -1)
        return torch.cat((bos, self.embed_frames(codes[:, :-1])), dim=1)

    def embed_frames(self, codes: Tensor) -> Tensor:
        """Codes [B, T, K], some ABSENT -> summed embeddings [B, T, D]."""
        rows = (codes.clamp(min=0) + self.row_offset).flatten(0, 1)
        known = None
        if self.config.lag or (self.code_dropout and self.training):
            known = (codes >= 0).flatten(0, 1).to(self.embed.weight.dtype)
        # One bag per frame: gathers and sums without the [B, T, K, D] in between.
        x = F.embedding_bag(rows, self.embed.weight, mode="sum", per_sample_weights=known)
        return x.unflatten(0, codes.shape[:2])

    def head_states(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """What the heads read: [1, N, D] for all codebooks, [K, N, D], or [K, N, E] of depth."""
        if self.depth:
            return self.depth(hidden.flatten(0, 1), codes.flatten(0, 1))
        if self.config.lag:
            heads = hidden[:, :, None].expand(-1, -1, codes.shape[-1], -1)
            return unshift(heads, self.config.lag).flatten(0, 1).transpose(0, 1)
        return hidden.flatten(0, 1)[None]

    def logits_of(self, states: Tensor) -> Tensor:
        """Head states [1 or K, N, D or E] -> [N, K, V]."""
        if len(states) == 1:
            return self._masked(self.head(states[0]).unflatten(-1, (self.config.num_codebooks, -1)))
        return self._masked(head_logits(states, self.head.by_codebook()).transpose(0, 1))

    def _masked(self, logits: Tensor, first: int = 0) -> Tensor:
        """Logits [N, n, V] of the codebooks from `first` on, -inf at entries that one lacks."""
        sizes = self.config.vocab_sizes
        if min(sizes) < max(sizes):
            for k in range(logits.shape[1]):
                logits[:, k, sizes[first + k] :] = -math.inf
        return logits

    # --- column by column ------------------------------------------------------------------------

    def new_cache(
        self, batch: int, ctx: int, dtype: torch.dtype = torch.float32, *, static: bool = False
    ) -> KeyValueCache:
        """An empty cache for windows of ctx frames, on the model's device."""
        size = ctx + self.config.lag
        return self.config.new_cache(batch, size, self.bos.device, dtype, static=static)

    @torch.no_grad()
    def prefill(self, columns: Tensor, cache: KeyValueCache) -> Tensor:
        """Fill an empty cache with BOS and what is known; state [B, D] of the column after it.

        Columns [B, T, K] are codes as `shift` leaves them; T is less than cache.size and may be 0.
        """
        x = self.bos.expand(len(columns), 1, -1)
        if columns.shape[1]:
            x = torch.cat((x, self.embed_frames(columns)), dim=1)
        cache.begin(x.shape[1])
        rope = self.config.rope(torch.arange(x.shape[1], device=x.device))
        return self._through_cache(x, rope, cache)

    @torch.no_grad()
    def step(self, column: Tensor, cache: KeyValueCache) -> Tensor:
        """Take in the column [B, K] just drawn; state [B, D] of the next."""
        cache.begin(1)
        return self.advance(column, cache)

    def advance(self, column: Tensor, cache: KeyValueCache) -> Tensor:
        """`step` after `cache.begin(1)`: static shapes and tensors alone, so it can be compiled."""
        rope = self.config.rope(cache.position)
        return self._through_cache(self.embed_frames(column[:, None]), rope, cache)

    def _through_cache(self, x: Tensor, rope: Rope, cache: KeyValueCache) -> Tensor:
        x = self.embed_norm(x)
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x = block(x, rope, layer)
        return self.norm(x[:, -1])

    @torch.no_grad()
    def draw(self, state: Tensor, choose: Choose) -> Tensor:
        """Draw the column [B, K] that follows: at once, or for depth one codebook after another.

        `choose(logits [B, n, V], first)` draws codes [B, n] of codebooks first to first + n.
        """
        if self.depth is None:
            return choose(self.logits_of(state[None]), 0)
        depth, (batch, k) = self.depth, (len(state), self.config.num_codebooks)
        column = torch.zeros(batch, k, dtype=torch.int64, device=state.device)
        cache = depth.config.new_cache(batch, k, state.device)
        rope = depth.config.rope(torch.arange(k, device=state.device))
        inputs = depth.inputs(state).to(state.dtype)
        for i in range(k):
            cache.begin(1)
            states = depth.step(inputs[:, i : i + 1], column[:, :i], rope, cache)
            logits = self._masked(self.head(states, i)[:, None], i)
            column[:, i] = choose(logits, i)[:, 0]
        return column

    # --- size ------------------------------------------------------------------------------------

    def num_parameters(self) -> int:
        """Trainable parameters, all tables included."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_frame(self, ctx: int) -> int:
        """Floating-point operations to train on one frame, forward and backward.

        6 per weight of a matrix product (Kaplan et al. 2020, section 2.1) and 6 * ctx * D a layer
        for causal attention's two products, half of whose square is masked. The depth transformer
        works on K positions of its share of the frames, its heads on one each.
        """
        weights = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        head = self.head.weight.numel()
        if self.depth:
            inner = sum(p.numel() for p in self.depth.blocks.parameters() if p.dim() == 2)
            head += self.depth.proj.weight.numel() + self.config.num_codebooks * inner
            head = head * self.drawn_of_1024 // 1024
        return 6 * (weights + head) + 6 * self.config.layers * ctx * self.config.d_model


class Heads(nn.Linear):
    """The heads of K codebooks as one matrix [K * V, D]."""

    def __init__(self, width: int, k: int, v: int) -> None:
        super().__init__(width, k * v, bias=False)
        self.k = k

    def forward(self, x: Tensor, k: int | None = None) -> Tensor:
        """[..., D] -> logits of all codebooks [..., K * V], or of codebook k alone [..., V]."""
        return F.linear(x, self.weight if k is None else self.by_codebook()[k])

    def by_codebook(self) -> Tensor:
        """[K, V, D]."""
        return self.weight.unflatten(0, (self.k, -1))


class DepthTransformer(nn.Module):
    """Blocks over the codes of one frame: position k sees its state and codes 0 to k - 1.

    Its codes have embeddings of their own, of all codebooks but the last, which nothing follows.
    """

    row_offset: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        own = config.depth()
        k, v, e = config.num_codebooks, max(config.vocab_sizes), own.d_model
        self.config = own
        self.proj = nn.Linear(config.d_model, k * e, bias=False)  # of the state, for each position
        self.embed = nn.Embedding((k - 1) * v, e)
        self.embed_norm = nn.RMSNorm(e, eps=EMBED_NORM_EPS, elementwise_affine=False)
        self.blocks = nn.ModuleList(Block(own) for _ in range(own.layers))
        self.norm = nn.RMSNorm(e, eps=NORM_EPS)
        self.register_buffer("row_offset", torch.arange(k - 1) * v, persistent=False)

    def forward(self, states: Tensor, codes: Tensor) -> Tensor:
        """States [N, D], codes [N, k] -> [k, N, E], k <= K; the last code is not looked at."""
        k = codes.shape[1]
        x = self.inputs(states)[:, :k]
        lower = self.embed_norm(self.embed(codes[:, :-1] + self.row_offset[: k - 1]))
        x = x + F.pad(lower, (0, 0, 1, 0))
        rope = self.config.rope(torch.arange(k, device=codes.device))
        for block in self.blocks:
            x = block(x, rope)
        return self.norm(x).transpose(0, 1)

    def inputs(self, states: Tensor) -> Tensor:
        """States [N, D] -> what they give each position, [N, K, E]."""
        return self.proj(states).unflatten(-1, (-1, self.config.d_model))

    def step(self, x: Tensor, lower: Tensor, rope: Rope, cache: KeyValueCache) -> Tensor:
        """Position k from its input [N, 1, E] and codes [N, k] -> [N, E]; `cache` has the rest."""
        k = lower.shape[1]
        if k:
            rows = lower[:, -1:].clamp(min=0) + self.row_offset[k - 1]  # ABSENT: could not be drawn
            x = x + self.embed_norm(self.embed(rows))
        here = rope[0][k : k + 1], rope[1][k : k + 1]
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x = block(x, here, layer)
        return self.norm(x[:, -1])


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each update under dropout in training.

    Dropout stays off the attention weights: there it would push SDPA from its fused kernels.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm1 = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.attn = Attention(config)
        self.norm2 = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.mlp = SquaredReluMlp(config)

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + F.dropout(self.attn(self.norm1(x), rope, cache), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; queries and keys are RMS-normalised by default.

    The norm bounds every attention logit by the product of the two gains times sqrt(C), so that
    they cannot run away (QK-norm: Henry et al. 2020; Dehghani et al. 2023, section 3.2).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(config.channels, eps=NORM_EPS) if config.qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; with a cache over what it holds, too."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        v = v.contiguous()  # a view would keep q and k of the product for backward as well
        q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if cache is None:
            mixed = causal_attention(rotate(q, rope).type_as(v), rotate(k, rope).type_as(v), v)
        else:
            mixed = cache.attend(rotate(q, rope), rotate(k, rope), v, k)
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
        hidden = F.relu(self.up(x))
        return self.down(hidden * hidden)  # CUDA's autocast would make `square` in float32
