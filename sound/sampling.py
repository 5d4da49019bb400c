"""Drawing codes from a trained model, frame by frame, with a key-value cache.

    draw = Draw.of(9, temperature=0.9, top_k=200)                   # the same for 9 codebooks
    codes = generate(model, frames=1290, ctx=512, draw=draw)        # [1, 1290, 9]
    more = generate(model, frames=1290, ctx=512, draw=draw, prompt=codes[0])
    for new in stream(model, frames=10**6, ctx=512, draw=draw):     # [1, 64, 9] at a time

B samples at once, T frames, K codebooks, V entries of the largest.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layers.cache import KeyValueCache
from layers.cpu import PackedLinear, QuickNorm
from model import ABSENT, CodesTransformer, ModelConfig, shift, unshift
from run_folder.checkpoint import CheckpointError
from sound.guidance import Guided

TO_DRAW = -2  # in the place of a code that is not known yet
COLUMNS_BEFORE_GRAPH = 1  # it loads kernels and makes work space, which no graph can hold
AT_ONCE = 64  # frames that are handed on together: a GPU waits for the host each time
NEWEST = 64  # frames in which a code's share counts against it: 0.75 s at 44.1 kHz
COLDEST = 1e-30  # logits over less overflow; what is drawn is the likeliest code long before


class NotFiniteError(ValueError):
    """The model's logits are not finite: there is nothing to draw from."""

    def __init__(self, frame: int) -> None:
        super().__init__(
            f"the model's logits are not finite from frame {frame} of the sample on: its weights "
            "have diverged; take an older checkpoint, ckpt_doctor.py tells which is healthy"
        )


def load_model(
    checkpoint: dict[str, Any], path: str, *, raw: bool, device: torch.device
) -> CodesTransformer:
    """A checkpoint's model in evaluation mode, with averaged or raw weights.

    Raises:
        CheckpointError: no model of this version, or weights of another one.
    """
    try:
        config = ModelConfig.from_dict(checkpoint["architecture"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: no model of this version ({error})") from error
    model = CodesTransformer(config)
    try:
        model.load_state_dict(checkpoint["model" if raw else "ema"])
    except RuntimeError as error:  # a line for each tensor that differs
        differing = str(error).splitlines()[1:2]
        raise CheckpointError(
            f"{path}: weights that do not fit its own architecture ({''.join(differing).strip()}); "
            "get it anew from where it came from"
        ) from error
    return model.to(device).eval()


@dataclass(frozen=True)
class Draw:
    """How codes are drawn from logits, for each codebook: [K] values each."""

    temperature: tuple[float, ...]
    top_k: tuple[int, ...]  # draw from the k likeliest; 0 = all
    top_p: tuple[float, ...]  # draw from the likeliest that hold this much probability; 1 = all
    min_p: tuple[float, ...]  # draw from those at least this many times as likely as the likeliest
    repeat_penalty: tuple[float, ...]  # a code's logit loses this times its share of the newest

    @classmethod
    def of(
        cls,
        num_codebooks: int,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        min_p: float | Sequence[float] = 0.0,
        repeat_penalty: float | Sequence[float] = 0.0,
    ) -> Draw:
        """Spread single values over the codebooks.

        Raises:
            ValueError: a list of neither 1 nor K values, temperature <= 0, top_k < 0, top_p not in
                (0, 1], min_p not in [0, 1), repeat_penalty < 0 or infinite.
        """
        spread: list[tuple[Any, ...]] = []
        given = (temperature, top_k, top_p, min_p, repeat_penalty)
        for field, value in zip(dataclasses.fields(cls), given, strict=True):
            values = list(value) if isinstance(value, Sequence) else [value]
            if len(values) not in (1, num_codebooks):
                raise ValueError(
                    f"{field.name.replace('_', '-')}: expected 1 or {num_codebooks} values, found "
                    f"{len(values)}"
                )
            spread.append(tuple(values * (num_codebooks // len(values))))
        draw = cls(*spread)
        if min(draw.temperature) <= 0 or min(draw.top_k) < 0:
            raise ValueError("expected temperature > 0 and top-k >= 0")
        if not all(0 < p <= 1 for p in draw.top_p) or not all(0 <= p < 1 for p in draw.min_p):
            raise ValueError("expected 0 < top-p <= 1 and 0 <= min-p < 1")
        if not all(0 <= p < math.inf for p in draw.repeat_penalty):
            raise ValueError("expected repeat-penalty >= 0")
        return draw

    @property
    def looks_back(self) -> bool:
        """Whether `__call__` needs the newest frames."""
        return any(self.repeat_penalty)

    def __call__(
        self, logits: Tensor, uniform: Tensor, first: int = 0, newest: Tensor | None = None
    ) -> Tensor:
        """Logits [B, n, V] of codebooks `first` to first + n - 1 -> codes [B, n] int64.

        `uniform` [B, n] are random numbers in [0, 1), `newest` [NEWEST, B, K] the frames before,
        where it `looks_back`. On the same device, without a host read. ABSENT where logits are not
        finite.
        """
        of, logits = slice(first, first + logits.shape[1]), logits.float()
        if newest is not None and any(self.repeat_penalty[of]):
            logits = self._penalise(logits, newest[..., of], of)
        logits = self._temper(logits, of)
        if any(self.top_k[of]) or min(self.top_p[of]) < 1 or any(self.min_p[of]):
            logits = self._narrow(logits, of)
        # Each number is looked up in the summed probabilities. It is scaled by the last sum, which
        # strays from 1, and kept off 0, so that an entry without probability is never hit.
        summed = logits.softmax(-1).cumsum(-1)
        target = (uniform[..., None] * summed[..., -1:]).clamp(min=1e-30)
        codes = torch.searchsorted(summed, target)[..., 0]
        return codes.masked_fill(codes == logits.shape[-1], ABSENT)  # NaN is found nowhere

    def _penalise(self, logits: Tensor, newest: Tensor, of: slice) -> Tensor:
        """Lower the logits of codes by their share of the newest frames [NEWEST, B, n]."""
        shares = torch.zeros_like(logits)
        counted = (newest != ABSENT).float() / NEWEST
        shares.scatter_add_(-1, newest.clamp(min=0).permute(1, 2, 0), counted.permute(1, 2, 0))
        return logits - shares * _limits(self, logits.device).repeat_penalty[of, None]

    def _temper(self, logits: Tensor, of: slice) -> Tensor:
        temperature = [max(t, COLDEST) for t in self.temperature[of]]
        if len(set(temperature)) == 1:
            return logits / temperature[0]
        return logits / _limits(self, logits.device).temperature[of, None]

    def _narrow(self, logits: Tensor, of: slice) -> Tensor:
        """Set to -inf what top-k, top-p and min-p leave out.

        Fan et al. 2018, Holtzman et al. 2020 and Nguyen et al. 2025.
        """
        vocab, limits = logits.shape[-1], _limits(self, logits.device)
        most = max(min(k or vocab, vocab) for k in self.top_k[of])
        likeliest, order = logits.topk(most)  # a whole sort takes far longer
        probabilities = (likeliest - logits.logsumexp(-1, keepdim=True)).exp()
        before = probabilities.cumsum(-1) - probabilities  # held by likelier entries
        rank = torch.arange(most, device=logits.device)
        dropped = (rank >= limits.top_k[of, None]) | (before >= limits.top_p[of, None])
        dropped |= probabilities < limits.min_p[of, None] * probabilities[..., :1]
        dropped[..., 0] = False  # the likeliest always stays
        kept = likeliest.masked_fill(dropped, -torch.inf)
        return torch.full_like(logits, -torch.inf).scatter(-1, order, kept)


class _Limits(NamedTuple):
    """The values of a Draw as tensors [K] on a device, where no limit is out of all reach."""

    temperature: Tensor  # float32
    top_k: Tensor  # int64
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    repeat_penalty: Tensor  # float32


@functools.lru_cache(maxsize=8)
def _limits(draw: Draw, device: torch.device) -> _Limits:
    """Make them once: a GPU waits for the host at each new tensor of the host's numbers."""
    return _Limits(
        torch.tensor([max(t, COLDEST) for t in draw.temperature], device=device),
        torch.tensor([k or torch.iinfo(torch.int64).max for k in draw.top_k], device=device),
        torch.tensor([p if p < 1 else torch.inf for p in draw.top_p], device=device),
        torch.tensor(draw.min_p, device=device),
        torch.tensor(draw.repeat_penalty, device=device),
    )


def generate(model: CodesTransformer, frames: int, **options: Any) -> Tensor:
    """Draw `frames` new frames; codes [B, frames, K] int64 on the CPU. Options as of `stream`."""
    return torch.cat(list(stream(model, frames, **options)), dim=1)


@torch.inference_mode()
def stream(
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
    labels: Sequence[str] = (),
    guidance: float = 1.0,
) -> Iterator[Tensor]:
    """Draw `frames` new frames after an optional prompt [T, K]; yield codes [B, n, K] int64.

    They are on the CPU and come as they are drawn, n = AT_ONCE frames at a time, the last ones
    perhaps fewer, so that memory does not grow with `frames`. The model sees at most ctx frames, as
    in training. `compiled` compiles the one step of static shape; on CUDA a frame, drawing
    included, is replayed
    as one CUDA graph instead. Products are made in `dtype`, without it in that of the weights.
    `on_frame` is called after each frame. All samples have the `labels`; with another `guidance`
    than 1 they are drawn as guidance.py says. The model is left in evaluation mode.

    Raises:
        ValueError: the prompt has not K codebooks, or a code that is not below its vocab size; a
            label that the model does not know, guidance without labels.
        NotFiniteError: the model has diverged.
    """
    model.eval()
    device, k, lag = model.bos.device, model.config.num_codebooks, model.config.lag
    generator = torch.Generator(device).manual_seed(seed)
    known = _known_columns(prompt, model.config, ctx).to(device)
    rows, cache = _with_cache(model, batch, ctx, dtype, compiled, labels, guidance)
    in_graph = compiled and device.type == "cuda"
    by_inductor = compiled and not in_graph
    advance = torch.compile(rows.advance, fullgraph=True) if by_inductor else rows.advance
    start = known.shape[1] - lag
    state = rows.prefill(known[:, :start].expand(batch, -1, -1), cache)
    column = _Column(rows, draw, state, known[0, :start])
    take: Callable[[], Tensor] = functools.partial(column.take, advance, cache)
    columns = torch.empty((batch, AT_ONCE + lag, k), dtype=torch.int64, device=device)
    filled = 0  # of `columns`: the last `lag` of those yielded, which their frames need, and on
    for i, codes in enumerate(_given_codes(known[0, start:], frames)):
        column.given.copy_(codes)
        column.numbers.uniform_(generator=generator)
        if in_graph and i == COLUMNS_BEFORE_GRAPH:
            take = _recorded(take)
        columns[:, filled] = drawn = take()
        filled += 1
        if i == 0:
            check_finite(drawn.cpu()[:, None, codes.cpu() == TO_DRAW], 0)
        on_frame()
        if filled == AT_ONCE + lag or i + 1 == frames + lag:
            new = unshift(columns[:, :filled], lag).to("cpu", copy=True)
            check_finite(new, i + 1 - filled)
            yield new
            columns[:, :lag], filled = columns[:, filled - lag : filled].clone(), lag


def check_finite(codes: Tensor, first: int) -> None:
    """Raise NotFiniteError if a code of [B, n, K] could not be drawn; `first` is frame 0 of n."""
    if (spoiled := (codes < 0).any(-1).any(0)).any():
        raise NotFiniteError(first + int(spoiled.nonzero()[0]))


def _with_cache(
    model: CodesTransformer,
    batch: int,
    ctx: int,
    dtype: torch.dtype | None,
    static: bool,
    labels: Sequence[str],
    guidance: float,
) -> tuple[CodesTransformer | Guided, KeyValueCache]:
    """Return the model as it draws, and an empty cache for samples with `labels`; see `stream`."""
    if guidance != 1 and not labels:
        raise ValueError("guidance: expected labels, found none")
    numbers = torch.tensor([model.config.numbers_of(labels)] * batch, device=model.bos.device)
    model = model.folded()  # else each frame would make all rows anew
    if dtype is not None:
        model = packed_copy(model, dtype, eager=not static)
    # A CPU attends faster in float32: it has no products of one row in bfloat16.
    kept = torch.float32 if model.bos.is_cpu else dtype or torch.float32
    rows = Guided(model, guidance) if guidance != 1 else model
    return rows, rows.new_cache(batch, ctx, kept, static=static, labels=numbers if labels else None)


class _Column:
    """The columns drawn, one after another, from buffers that stay in their places for CUDA graphs.

    Set `given` [K] int64 (TO_DRAW: to be drawn) and `numbers` anew before each `take`.
    """

    def __init__(
        self, model: CodesTransformer | Guided, draw: Draw, state: Tensor, before: Tensor
    ) -> None:
        """Of the state [B, ...] after the columns `before` [T, K]."""
        self.model, self.draw, self.state = model, draw, state
        batch, k = len(state), model.config.num_codebooks
        self.inner = model.new_depth_cache(batch)
        self.given = before.new_empty(k)
        # Made outside of the graph, in the order of drawing: with depth one codebook after another.
        self.numbers = torch.empty((k, batch) if model.depth else (batch, k), device=state.device)
        self.uniform = self.numbers.mT if model.depth else self.numbers  # [B, K]
        self.newest = None
        if draw.looks_back:
            self.newest = before.new_full((NEWEST, batch, k), ABSENT)
            self.newest[max(0, NEWEST - len(before)) :] = before[-NEWEST:, None]

    def take(
        self, advance: Callable[[Tensor, KeyValueCache], Tensor], cache: KeyValueCache
    ) -> Tensor:
        """Draw the codes that are not given; return the column [B, K] and move on to the next."""
        drawn = torch.where(
            self.given == TO_DRAW, self.model.draw(self.state, self._choose, self.inner), self.given
        )
        if self.newest is not None:
            self.newest.copy_(torch.cat((self.newest[1:], drawn[None])))
        cache.begin(1)
        self.state.copy_(advance(drawn, cache))
        return drawn

    def _choose(self, logits: Tensor, first: int) -> Tensor:
        uniform = self.uniform[:, first : first + logits.shape[1]]
        return self.draw(logits, uniform, first, self.newest)


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
