"""Drawing codes from a trained model, frame by frame, with a key-value cache.

    draw = Draw.of(9, temperature=0.9, top_k=200)                   # the same for 9 codebooks
    codes = generate(model, frames=1290, ctx=512, draw=draw)        # [1, 1290, 9]
    more = generate(model, frames=1290, ctx=512, draw=draw, prompt=codes[0])

B samples at once, T frames, K codebooks, V entries of the largest.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layers.cache import KeyValueCache
from layers.cpu import PackedLinear, QuickNorm
from model import ABSENT, CodesTransformer, ModelConfig, shift, unshift

TO_DRAW = -2  # in the place of a code that is not known yet
COLUMNS_BEFORE_GRAPH = 1  # it loads kernels and makes work space, which no graph can hold
COLDEST = 1e-30  # logits over less overflow; what is drawn is the likeliest code long before


class NotFiniteError(ValueError):
    """The model's logits are not finite: there is nothing to draw from."""

    def __init__(self, frame: int) -> None:
        super().__init__(
            f"the model's logits are not finite from frame {frame} of the sample on: its weights "
            "have diverged; take an older checkpoint, ckpt_doctor.py tells which is healthy"
        )


@dataclass(frozen=True)
class Draw:
    """How codes are drawn from logits, for each codebook: [K] values each."""

    temperature: tuple[float, ...]
    top_k: tuple[int, ...]  # draw from the k likeliest; 0 = all
    top_p: tuple[float, ...]  # draw from the likeliest that hold this much probability; 1 = all

    @classmethod
    def of(
        cls,
        num_codebooks: int,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
    ) -> Draw:
        """Spread single values over the codebooks.

        Raises:
            ValueError: a list of neither 1 nor K values, temperature <= 0, top_k < 0, top_p not in
                (0, 1].
        """
        spread: list[tuple[Any, ...]] = []
        for name, value in (("temperature", temperature), ("top-k", top_k), ("top-p", top_p)):
            values = list(value) if isinstance(value, Sequence) else [value]
            if len(values) not in (1, num_codebooks):
                raise ValueError(
                    f"{name}: expected 1 or {num_codebooks} values, found {len(values)}"
                )
            spread.append(tuple(values * (num_codebooks // len(values))))
        draw = cls(*spread)
        if min(draw.temperature) <= 0 or min(draw.top_k) < 0:
            raise ValueError("expected temperature > 0 and top-k >= 0")
        if not all(0 < p <= 1 for p in draw.top_p):
            raise ValueError("expected 0 < top-p <= 1")
        return draw

    def __call__(self, logits: Tensor, uniform: Tensor, first: int = 0) -> Tensor:
        """Logits [B, n, V] of codebooks `first` to first + n - 1 -> codes [B, n] int64.

        `uniform` [B, n] are random numbers in [0, 1). On the same device, without a host read.
        ABSENT where logits are not finite.
        """
        of = slice(first, first + logits.shape[1])
        logits = self._temper(logits.float(), of)
        if any(self.top_k[of]) or min(self.top_p[of]) < 1:
            logits = self._narrow(logits, of)
        # Each number is looked up in the summed probabilities. It is scaled by the last sum, which
        # strays from 1, and kept off 0, so that an entry without probability is never hit.
        summed = logits.softmax(-1).cumsum(-1)
        target = (uniform[..., None] * summed[..., -1:]).clamp(min=1e-30)
        codes = torch.searchsorted(summed, target)[..., 0]
        return codes.masked_fill(codes == logits.shape[-1], ABSENT)  # NaN is found nowhere

    def _temper(self, logits: Tensor, of: slice) -> Tensor:
        temperature = [max(t, COLDEST) for t in self.temperature[of]]
        if len(set(temperature)) == 1:
            return logits / temperature[0]
        return logits / _limits(self, logits.device).temperature[of, None]

    def _narrow(self, logits: Tensor, of: slice) -> Tensor:
        """Set to -inf what top-k (Fan et al. 2018) and top-p (Holtzman et al. 2020) leave out."""
        vocab, limits = logits.shape[-1], _limits(self, logits.device)
        most = max(min(k or vocab, vocab) for k in self.top_k[of])
        likeliest, order = logits.topk(most)  # a whole sort takes far longer
        probabilities = (likeliest - logits.logsumexp(-1, keepdim=True)).exp()
        before = probabilities.cumsum(-1) - probabilities  # held by likelier entries
        rank = torch.arange(most, device=logits.device)
        dropped = (rank >= limits.top_k[of, None]) | (before >= limits.top_p[of, None])
        dropped[..., 0] = False  # the likeliest always stays
        kept = likeliest.masked_fill(dropped, -torch.inf)
        return torch.full_like(logits, -torch.inf).scatter(-1, order, kept)


class _Limits(NamedTuple):
    """The values of a Draw as tensors [K] on a device, where no limit is out of all reach."""

    temperature: Tensor  # float32
    top_k: Tensor  # int64
    top_p: Tensor  # float32


@functools.lru_cache(maxsize=8)
def _limits(draw: Draw, device: torch.device) -> _Limits:
    """Make them once: a GPU waits for the host at each new tensor of the host's numbers."""
    return _Limits(
        torch.tensor([max(t, COLDEST) for t in draw.temperature], device=device),
        torch.tensor([k or torch.iinfo(torch.int64).max for k in draw.top_k], device=device),
        torch.tensor([p if p < 1 else torch.inf for p in draw.top_p], device=device),
    )


@torch.inference_mode()
def generate(
    model: CodesTransformer,
    frames: int,
    *,
    ctx: int,
    draw: Draw,
    seed: int = 0,
    batch: int = 1,
    prompt: Tensor | None = None,
    compiled: bool = False,
    dtype: torch.dtype | None = None,
    on_frame: Callable[[], object] = lambda: None,
) -> Tensor:
    """Draw `frames` new frames after an optional prompt [T, K]; codes [B, frames, K] int64.

    The model sees at most ctx frames, as in training. `compiled` compiles the one step of static
    shape; on CUDA a frame, drawing included, is replayed as one CUDA graph instead. Products are
    made in `dtype`, without it in that of the weights. `on_frame` is called after each frame. The
    model is left in evaluation mode.

    Raises:
        ValueError: the prompt has not K codebooks, or a code that is not below its vocab size.
        NotFiniteError: the model has diverged.
    """
    model.eval()
    device, k, lag = model.bos.device, model.config.num_codebooks, model.config.lag
    generator = torch.Generator(device).manual_seed(seed)
    known = _known_columns(prompt, model.config, ctx).to(device)
    if dtype is not None:
        model = packed_copy(model, dtype, eager=not compiled)
    # A CPU attends faster in float32: it has no products of one row in bfloat16.
    kept = torch.float32 if device.type == "cpu" else dtype or torch.float32
    cache = model.new_cache(batch, ctx, kept, static=compiled)
    in_graph = compiled and device.type == "cuda"
    by_inductor = compiled and not in_graph
    advance = torch.compile(model.advance, fullgraph=True) if by_inductor else model.advance
    start = known.shape[1] - lag
    columns = torch.empty((batch, start + frames + lag, k), dtype=torch.int64, device=device)
    columns[:, :start] = known[:, :start]
    here = known.new_empty(k)  # what of the present column is given
    # Made outside of the graph, in the order of drawing: with depth one codebook after another.
    numbers = torch.empty((k, batch) if model.depth else (batch, k), device=device)
    uniform = numbers.mT if model.depth else numbers
    state = model.prefill(columns[:, :start], cache)
    take = _column_taker(model, advance, cache, draw, state, here, uniform)
    for i, codes in enumerate(_given_codes(known[0, start:], frames)):
        here.copy_(codes)
        numbers.uniform_(generator=generator)
        if in_graph and i == COLUMNS_BEFORE_GRAPH:
            take = _recorded(take)
        columns[:, start + i] = drawn = take()
        if i == 0 and ((drawn == ABSENT) & (codes == TO_DRAW)).any():
            raise NotFiniteError(0)
        on_frame()
    codes = unshift(columns, lag)[:, start:]
    if (spoiled := (codes < 0).any(-1).any(0)).any():
        raise NotFiniteError(int(spoiled.nonzero()[0]))
    return codes


def _column_taker(
    model: CodesTransformer,
    advance: Callable[[Tensor, KeyValueCache], Tensor],
    cache: KeyValueCache,
    draw: Draw,
    state: Tensor,
    here: Tensor,
    uniform: Tensor,
) -> Callable[[], Tensor]:
    """Return a function that takes a column [B, K] and moves `state` [B, D] on to the next one.

    It draws by the random numbers `uniform` [B, K] where `here` [K] is TO_DRAW. Both are read anew
    in each call and stay in their places, so that a CUDA graph can replay it.
    """
    inner = model.new_depth_cache(len(uniform))

    def choose(logits: Tensor, first: int) -> Tensor:
        return draw(logits, uniform[:, first : first + logits.shape[1]], first)

    def take_column() -> Tensor:
        drawn = torch.where(here == TO_DRAW, model.draw(state, choose, inner), here)
        cache.begin(1)
        state.copy_(advance(drawn, cache))
        return drawn

    return take_column


def _given_codes(known: Tensor, frames: int) -> Iterator[Tensor]:
    """Yield the codes [K] of each new column that are not drawn; TO_DRAW in all other places.

    The first are `known` [lag, K]; in the last `lag` columns lower codebooks have ended: ABSENT.
    """
    lag, k = known.shape
    free, index = known.new_full((k,), TO_DRAW), torch.arange(k, device=known.device)
    for i in range(frames + lag):
        codes = known[i] if i < lag else free
        yield codes if i < frames else codes.masked_fill(index <= i - frames, ABSENT)


def _recorded(action: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record what an action launches on a GPU as a CUDA graph; return what launches all at once.

    The action must have been done before, so that nothing is loaded in it, and its tensors must
    stay in their places. Its result is overwritten at the next call.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = action()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _known_columns(prompt: Tensor | None, config: ModelConfig, ctx: int) -> Tensor:
    """Columns [1, T + lag, K] of a prompt's newest T <= ctx - 1 frames, as `shift` lays them out.

    The last `lag` columns hold codes of the prompt beside some that are still TO_DRAW.
    """
    k, lag = config.num_codebooks, config.lag
    if prompt is None:
        prompt = torch.empty((0, k), dtype=torch.int64)
    if prompt.shape[1:] != (k,) or (prompt >= torch.tensor(config.vocab_sizes)).any():
        raise ValueError(
            f"prompt: expected codes [T, {k}] below {config.vocab_sizes}, found "
            f"{list(prompt.shape)} up to {prompt.max().item() if prompt.numel() else 0}"
        )
    prompt = prompt[max(0, len(prompt) - ctx + 1) :]
    to_draw = prompt.new_full((lag, k), TO_DRAW)
    return shift(torch.cat((prompt, to_draw))[None], lag)[:, : len(prompt) + lag]


def packed_copy(
    model: CodesTransformer, dtype: torch.dtype, *, eager: bool = True
) -> CodesTransformer:
    """A copy whose products are made in `dtype`, for few rows; it shares all other weights.

    The compiler takes neither oneDNN's layout nor the quick norm: they come with `eager` alone.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    packed = copy.deepcopy(model, shared).eval()  # what the memo names is not copied
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            parts = model.config.num_codebooks if model.depth and module is model.head else 1
            packed.set_submodule(name, PackedLinear(module.weight, dtype, parts, eager=eager))
        elif eager and isinstance(module, nn.RMSNorm) and model.embed.weight.is_cpu:
            packed.set_submodule(name, QuickNorm(module))
    return packed
