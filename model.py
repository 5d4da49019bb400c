"""The model: a causal transformer over the K parallel codes of each frame.

    model = CodesTransformer(ModelConfig(vocab_sizes=(1024,) * 9, pattern="depth"))
    logits = model(codes)                        # [B, T, K] int64 -> [B, T, K, V]
    ce, objective = model.losses(codes, label_smoothing=0.05)

    cache = model.new_cache(batch=1, ctx=512)
    state = model.prefill(prompt, cache)         # [B, T, K], T may be 0 -> [B, D]
    frame = model.draw(state, choose)            # -> [B, K]
    state = model.step(frame, cache)             # -> [B, D], of the next frame

The model aligns inputs and outputs itself: logits[:, t, k] predicts codes[:, t, k]. The pattern
decides on which codes this prediction depends. In each pattern, the sum of the log-probabilities is
the log-likelihood of the window:

- parallel: codes[:, t] depends on codes[:, :t]; the K codes of a frame are independent.
- delay: codebook k is delayed by k frames, so codes[:, t, k] depends on all codes left of it in the
  table at `shift`: also lower codebooks of its own frame and of later ones (MusicGen: Copet et al.
  2023, section 2.2).
- depth: a small transformer runs over the K codes of each frame, so codes[:, t, k] depends on
  codes[:, :t] and codes[:, t, :k] (RQ-Transformer: Lee et al. 2022; Moshi: Defossez et al. 2024).

Dimensions: B windows of a micro-batch, T frames, K codebooks, V entries of the largest codebook, D
model width, L layers, H attention heads, C = D / H channels of a head, N = B * T frames, E width of
the depth transformer. A column is the input or output of one time step: a frame, or with delay one
code from each of K frames.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from layers.architecture import PATTERNS, ModelConfig
from layers.attention import causal_attention
from layers.cache import KeyValueCache, LayerCache
from layers.code_rows import CodeRows, Embeddings, Heads
from layers.loss import Losses, head_logits, linear_cross_entropy
from layers.rotary import Rope, rotate

__all__ = ["ABSENT", "PATTERNS", "Choose", "CodesTransformer", "ModelConfig", "shift", "unshift"]

ABSENT = -1  # stands for an unknown code or label; it adds nothing to the embedding
EMBED_STD = 0.001  # standard deviation of embeddings, BOS and head at initialisation
NORM_EPS = 1e-6
EMBED_NORM_EPS = 1e-8  # NORM_EPS would equal a row's initial mean square, EMBED_STD^2
Choose = Callable[[Tensor, int], Tensor]  # logits [B, n, V], first codebook -> codes [B, n]


# --- the delay pattern ---------------------------------------------------------------------------


def shift(codes: Tensor, lag: int) -> Tensor:
    """Delay codebook k by k frames: codes [B, T, K] -> [B, T + lag, K], ABSENT in the empty places.

    Example with K = 3, T = 4, lag = 2; each column is one time step of the model:

        k = 0    a0 a1 a2 a3  .  .
        k = 1     . b0 b1 b2 b3  .
        k = 2     .  . c0 c1 c2 c3

    With lag 0, as in the other patterns, the codes are returned unchanged.
    """
    if not lag:
        return codes
    frames, k = codes.shape[1], codes.shape[2]
    shifted = codes.new_full((len(codes), frames + lag, k), ABSENT)
    for i in range(k):
        shifted[:, i : i + frames, i] = codes[..., i]
    return shifted


def unshift(shifted: Tensor, lag: int) -> Tensor:
    """Invert `shift`: [B, T + lag, K, ...] -> [B, T, K, ...]."""
    if not lag:
        return shifted
    frames = shifted.shape[1] - lag
    return torch.stack([shifted[:, i : i + frames, i] for i in range(shifted.shape[2])], dim=2)


# --- the model -----------------------------------------------------------------------------------


class CodesTransformer(nn.Module):
    """A causal transformer: summed codebook embeddings, pre-norm blocks, rotary positions, K heads.

    No layer has a bias, as in PaLM (Chowdhery et al. 2022, section 2) and Llama. Rotary positions
    need no table, so the same weights work with any ctx. The summed embeddings are RMS-normalised
    before the first block: without this, gradients spike when attention first
    forms (benchmarks/journal.md). In the sum a codebook counts less the later it comes: each one of
    a residual quantiser codes what the ones before it left, which is ever more like noise. The
    embeddings of a window's labels are added to all of its positions behind that normalisation.

    The keyword arguments affect training only: `grad_checkpoint` recomputes blocks in backward
    instead of keeping their activations; `code_dropout` is the probability that an input code is
    replaced by ABSENT, `label_dropout` the probability that a window loses its labels;
    `depth_share` is the share of the frames in the loss of pattern "depth".
    """

    row_offset: Tensor  # [K] int64
    embed_scale: Tensor  # [K]

    def __init__(
        self,
        config: ModelConfig,
        *,
        grad_checkpoint: bool = False,
        code_dropout: float = 0.0,
        label_dropout: float = 0.0,
        depth_share: float = 1.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpoint = grad_checkpoint
        self.code_dropout, self.label_dropout = code_dropout, label_dropout
        # An integer: torch.compile would treat a float that differs between models as a symbol.
        self.drawn_of_1024 = max(1, round(1024 * depth_share))
        k, v, d = config.num_codebooks, max(config.vocab_sizes), config.d_model
        self.embed = Embeddings(d, k, v, config.code_features)
        self.label_embed = None
        if config.labels:  # without random numbers: all else begins as in a model without
            none = torch.zeros(len(config.labels), d)
            self.label_embed = nn.Embedding.from_pretrained(none, freeze=False)
        self.bos = nn.Parameter(torch.empty(d))  # stands for the frame before the first
        self.embed_norm = nn.RMSNorm(d, eps=EMBED_NORM_EPS, elementwise_affine=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(d, eps=NORM_EPS)
        self.depth = DepthTransformer(config) if config.pattern == "depth" else None
        width = config.depth().d_model if self.depth else d
        self.head = Heads(width, k, v, config.code_features)
        self.register_buffer("row_offset", torch.arange(k) * v, persistent=False)
        scale = torch.arange(1, k + 1, dtype=torch.float32) ** -config.embed_fall
        self.register_buffer("embed_scale", scale, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise all weights from normal distributions; gains of norms stay 1.

        Output projections start at zero, so each block begins as the identity, and so do labels;
        input projections keep the variance. Embeddings (which are normalised) and the head start
        small, so the first predictions are uniform; and since Adam's steps do not depend on the
        size of the weights, small rows change direction sooner.
        """
        for name, p in self.named_parameters():
            if name.endswith(("attn.out.weight", "mlp.down.weight", "label_embed.weight")):
                nn.init.zeros_(p)
            elif name.endswith(("attn.qkv.weight", "mlp.up.weight", "proj.weight")):
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            elif name.endswith(("embed.weight", "bos", "head.weight")):
                nn.init.normal_(p, std=EMBED_STD)

    # --- whole windows ---------------------------------------------------------------------------

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map codes [B, T, K] int64 to logits [B, T, K, V]; entries beyond V_k are -inf.

        `labels` [B, n] int64 are the numbers of each window's labels, ABSENT where it has fewer.
        """
        states = self.head_states(self.hidden_states(codes, labels), codes)
        return self.logits_of(states).unflatten(0, codes.shape[:2])

    def losses(
        self,
        codes: Tensor,
        label_smoothing: float = 0.0,
        weights: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Losses:
        """Return the losses of codes [B, T, K] int64 in nats per code; for `labels` see `forward`.

        `weights` [K] are the loss weights of the codebooks, by default equal. In training mode the
        depth transformer gets only a share `depth_share` of the frames, drawn anew in each call: an
        unbiased estimate of the loss at a fraction of the cost.
        """
        hidden, frames = self.hidden_states(codes, labels), codes
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

    def hidden_states(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map codes [B, T, K] to the normalised output of the last block, [B, T + lag, D]."""
        shifted = shift(codes, self.config.lag)
        if self.code_dropout and self.training:
            gone = torch.rand(shifted.shape, device=codes.device) < self.code_dropout
            shifted = shifted.masked_fill(gone, ABSENT)
        x = self.embed_norm(self.embed_past(shifted))
        if labels is not None:
            x = x + self.embed_labels(labels)
        x = F.dropout(x, self.config.dropout, self.training)
        rope = self.config.rope(torch.arange(x.shape[1], device=codes.device))
        first = None
        for block in self.blocks:
            if self.grad_checkpoint and self.training:
                x, first = checkpoint(block, x, rope, first, use_reentrant=False)
            else:
                x, first = block(x, rope, first)
        return self.norm(x)

    def embed_past(self, codes: Tensor) -> Tensor:
        """Map codes [B, T, K] to [B, T, D]: at t the summed embedding of frame t - 1, or BOS."""
        bos = self.bos.expand(len(codes), 1, -1)
        return torch.cat((bos, self.embed_frames(codes[:, :-1])), dim=1)

    def embed_frames(self, codes: Tensor) -> Tensor:
        """Map codes [B, T, K], some of them ABSENT, to summed embeddings [B, T, D]."""
        rows = (codes.clamp(min=0) + self.row_offset).flatten(0, 1)
        scale = None
        if self.config.embed_fall or self.config.lag or (self.code_dropout and self.training):
            scale = ((codes >= 0) * self.embed_scale).flatten(0, 1).to(self.embed.weight.dtype)
        # One bag per frame: gathers and sums without a tensor [B, T, K, D].
        x = F.embedding_bag(rows, self.embed.rows(), mode="sum", per_sample_weights=scale)
        return x.unflatten(0, codes.shape[:2])

    def embed_labels(self, labels: Tensor) -> Tensor:
        """Map labels [B, n], some of them ABSENT, to what they add to each position, [B, 1, D]."""
        assert self.label_embed is not None, "the model has no labels"
        given = labels >= 0
        if self.label_dropout and self.training:
            given &= torch.rand((len(labels), 1), device=labels.device) >= self.label_dropout
        weight = self.label_embed.weight
        rows, scale = labels.clamp(min=0), given.to(weight.dtype)
        return F.embedding_bag(rows, weight, mode="sum", per_sample_weights=scale)[:, None]

    def head_states(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Return the inputs of the heads from the result of `hidden_states` and codes [B, T, K].

        They are [1, N, D] with "parallel", [K, N, D] with "delay", [K, N, E] with "depth".
        """
        if self.depth:
            return self.depth(hidden.flatten(0, 1), codes.flatten(0, 1))
        if self.config.lag:
            heads = hidden[:, :, None].expand(-1, -1, codes.shape[-1], -1)
            return unshift(heads, self.config.lag).flatten(0, 1).transpose(0, 1)
        return hidden.flatten(0, 1)[None]

    def logits_of(self, states: Tensor) -> Tensor:
        """Map the heads' inputs [1 or K, N, D or E] to logits [N, K, V]."""
        if len(states) == 1:
            return self._masked(self.head(states[0]).unflatten(-1, (self.config.num_codebooks, -1)))
        return self._masked(head_logits(states, self.head.by_codebook()).transpose(0, 1))

    def _masked(self, logits: Tensor, first: int = 0) -> Tensor:
        """Set entries that codebooks `first` to first + n - 1 lack to -inf in logits [N, n, V]."""
        sizes = self.config.vocab_sizes
        if min(sizes) < max(sizes):
            for k in range(logits.shape[1]):
                logits[:, k, sizes[first + k] :] = -math.inf
        return logits

    # --- column by column ------------------------------------------------------------------------

    def new_cache(
        self,
        batch: int,
        ctx: int,
        dtype: torch.dtype = torch.float32,
        *,
        static: bool = False,
        labels: Tensor | None = None,
    ) -> KeyValueCache:
        """Return an empty key-value cache for windows of ctx frames, on the model's device.

        All that goes through it is labelled with `labels` [B, n]; see `forward`.
        """
        size = ctx + self.config.lag
        cache = self.config.new_cache(batch, size, self.bos.device, dtype, static=static)
        cache.added = None if labels is None else self.embed_labels(labels).detach()
        return cache

    @torch.no_grad()
    def prefill(self, columns: Tensor, cache: KeyValueCache) -> Tensor:
        """Fill an empty cache with BOS and known columns; return the state [B, D] of the next.

        Columns [B, T, K] are codes after `shift`; T may be 0 and must be less than cache.size.
        """
        x = self.bos.expand(len(columns), 1, -1)
        if columns.shape[1]:
            x = torch.cat((x, self.embed_frames(columns)), dim=1)
        cache.begin(x.shape[1])
        rope = self.config.rope(torch.arange(x.shape[1], device=x.device))
        return self._through_cache(x, rope, cache)

    @torch.no_grad()
    def step(self, column: Tensor, cache: KeyValueCache) -> Tensor:
        """Append the column [B, K] just drawn to the cache; return the state [B, D] of the next."""
        cache.begin(1)
        return self.advance(column, cache)

    def advance(self, column: Tensor, cache: KeyValueCache) -> Tensor:
        """Do the work of `step` after `cache.begin(1)`, with static shapes for torch.compile."""
        rope = self.config.rope(cache.position)
        return self._through_cache(self.embed_frames(column[:, None]), rope, cache)

    def _through_cache(self, x: Tensor, rope: Rope, cache: KeyValueCache) -> Tensor:
        x = self.embed_norm(x)
        if cache.added is not None:
            x = x + cache.added
        first = None
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x, first = block(x, rope, first, layer)
        return self.norm(x[:, -1])

    def new_depth_cache(self, batch: int) -> KeyValueCache | None:
        """Return a cache of a frame's codebooks for `draw`, which serves frame after frame."""
        if self.depth is None:
            return None
        return self.depth.config.new_cache(batch, self.config.num_codebooks, self.bos.device)

    @torch.no_grad()
    def draw(self, state: Tensor, choose: Choose, cache: KeyValueCache | None = None) -> Tensor:
        """Draw the next column [B, K] from its state [B, D]; "depth" draws one codebook at a time.

        `choose(logits [B, n, V], first)` returns codes [B, n] of codebooks first to first + n - 1.
        `cache`, of `new_depth_cache`, may hold another frame; without it one is made.
        """
        if self.depth is None:
            return choose(self.logits_of(state[None]), 0)
        depth, (batch, k) = self.depth, (len(state), self.config.num_codebooks)
        column = torch.zeros(batch, k, dtype=torch.int64, device=state.device)
        cache = cache or self.new_depth_cache(batch)
        assert cache is not None, "the model has depth"
        cache.restart()
        rope = depth.config.rope(torch.arange(k, device=state.device))
        inputs = depth.inputs(state).to(state.dtype)
        for i in range(k):
            cache.begin(1)
            states = depth.step(inputs[:, i : i + 1], column[:, :i], rope, cache)
            logits = self._masked(self.head(states, i)[:, None], i)
            column[:, i] = choose(logits, i)[:, 0]
        return column

    # --- a codec's vectors -----------------------------------------------------------------------

    def learn_vectors(self, vectors: Tensor) -> None:
        """Take the vectors [K, V, code_features] that the codes stand for, once before training."""
        for rows in self._code_rows():
            assert rows.vectors is not None, "the model was built without code_features"
            rows.vectors.copy_(vectors[: rows.k])

    def folded(self) -> CodesTransformer:
        """Return a model with the same output and without vectors; all else is shared."""
        if not self.config.code_features:
            return self
        shared = {id(t): t for t in (*self.parameters(), *self.buffers())}
        model = copy.deepcopy(self, shared)  # what the memo names is not copied
        for rows in model._code_rows():
            rows.fold()
        return model

    def _code_rows(self) -> list[CodeRows]:
        return [module for module in self.modules() if isinstance(module, CodeRows)]

    def num_parameters(self) -> int:
        """Return the number of trainable parameters, embeddings included."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_frame(self, ctx: int) -> int:
        """Return the floating-point operations to train on one frame, forward and backward.

        They are 6 per weight of a matrix product (Kaplan et al. 2020, section 2.1), and 6 * ctx * D
        per layer for the two products of causal attention, of which half is masked. The depth
        transformer processes K positions in its share of the frames, each head one of them.
        """
        weights = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        head = self.head.weight.numel()
        if self.depth:
            inner = sum(p.numel() for p in self.depth.blocks.parameters() if p.dim() == 2)
            head += self.depth.proj.weight.numel() + self.config.num_codebooks * inner
            head = head * self.drawn_of_1024 // 1024
        return 6 * (weights + head) + 6 * self.config.layers * ctx * self.config.d_model


class DepthTransformer(nn.Module):
    """A transformer over the codes of one frame: position k sees the state and codes 0 to k - 1.

    It has its own embeddings, for all codebooks except the last, whose code is never an input.
    """

    row_offset: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        own = config.depth()
        k, v, e = config.num_codebooks, max(config.vocab_sizes), own.d_model
        self.config = own
        self.proj = nn.Linear(config.d_model, k * e, bias=False)  # state -> input of each position
        self.embed = Embeddings(e, k - 1, v, config.code_features)
        self.embed_norm = nn.RMSNorm(e, eps=EMBED_NORM_EPS, elementwise_affine=False)
        self.blocks = nn.ModuleList(Block(own) for _ in range(own.layers))
        self.norm = nn.RMSNorm(e, eps=NORM_EPS)
        self.register_buffer("row_offset", torch.arange(k - 1) * v, persistent=False)

    def forward(self, states: Tensor, codes: Tensor) -> Tensor:
        """Map states [N, D] and codes [N, k], k <= K, to [k, N, E]; the last code is not used."""
        k = codes.shape[1]
        x = self.inputs(states)[:, :k]
        rows = codes[:, :-1] + self.row_offset[: k - 1]
        lower = self.embed_norm(F.embedding(rows, self.embed.rows()))
        x = F.dropout(x + F.pad(lower, (0, 0, 1, 0)), self.config.dropout, self.training)
        rope = self.config.rope(torch.arange(k, device=codes.device))
        first = None
        for block in self.blocks:
            x, first = block(x, rope, first)
        return self.norm(x).transpose(0, 1)

    def inputs(self, states: Tensor) -> Tensor:
        """Map states [N, D] to their contribution to the input of each position, [N, K, E]."""
        return self.proj(states).unflatten(-1, (-1, self.config.d_model))

    def step(self, x: Tensor, lower: Tensor, rope: Rope, cache: KeyValueCache) -> Tensor:
        """Compute position k from its input x [N, 1, E] and the codes `lower` [N, k] -> [N, E].

        `cache` holds the positions before k.
        """
        k = lower.shape[1]
        if k:
            # A code that could not be drawn is ABSENT, which is no row of the embedding.
            rows = lower[:, -1:].clamp(min=0) + self.row_offset[k - 1]
            x = x + self.embed_norm(F.embedding(rows, self.embed.rows()))
        here = rope[0][k : k + 1], rope[1][k : k + 1]
        first = None
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x, first = block(x, here, first, layer)
        return self.norm(x[:, -1])


class Block(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)), with dropout on each update.

    Attention weights have no dropout: with it SDPA could not use its fused kernels.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm1 = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.attn = Attention(config)
        self.norm2 = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.mlp = SquaredReluMlp(config)

    def forward(
        self, x: Tensor, rope: Rope, first: Tensor | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map x [B, T, D] to [B, T, D], and see `Attention` for `first`, which goes on.

        With a cache, x follows the cached positions.
        """
        update, first = self.attn(self.norm1(x), rope, first, cache)
        x = x + F.dropout(update, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training), first


class Attention(nn.Module):
    """Causal self-attention with rotary positions; queries and keys are RMS-normalised by default.

    The normalisation bounds every attention logit by the product of the two gains times sqrt(C), so
    logits cannot diverge (QK-norm: Henry et al. 2020; Dehghani et al. 2023, section 3.2).

    With `value_residual` the values are the mean of the block's own and the first block's: what
    the codes are reaches the last block however often it was mixed (Zhou et al. 2024, "Value
    Residual Learning", there with weights to learn).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.value_residual = config.heads, config.value_residual
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(config.channels, eps=NORM_EPS) if config.qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(
        self, x: Tensor, rope: Rope, first: Tensor | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map x [B, T, D] to [B, T, D]; with a cache, attend to the cached positions as well.

        `first` are the first block's values [B, H, T, C], which the first block, given None,
        returns beside its result, and the others pass on; None without `value_residual`.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        v = v.contiguous()  # a view would keep the whole qkv product in memory until backward
        if first is not None:
            v = torch.lerp(v, first, 0.5)
        elif self.value_residual:
            first = v
        q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if cache is None:
            mixed = causal_attention(rotate(q, rope).type_as(v), rotate(k, rope).type_as(v), v)
        else:
            mixed = cache.attend(rotate(q, rope), rotate(k, rope), v, k)
        return self.out(mixed.transpose(1, 2).flatten(2)), first


class SquaredReluMlp(nn.Module):
    """The MLP down(relu(up(x))^2), after Primer (So et al. 2021)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.mlp_ratio * config.d_model
        self.up = nn.Linear(config.d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, D] to [B, T, D]."""
        hidden = F.relu(self.up(x))
        return self.down(hidden * hidden)  # autocast on CUDA would compute `square` in float32
