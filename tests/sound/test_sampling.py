"""sound/sampling.py and the model's cache: cached equals uncached, draws follow their limits."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import pytest
import torch
from kit.models import CONFIG, make_codes, make_model
from torch.overrides import TorchFunctionMode

from layers.rotary import rotate
from model import (
    PATTERNS,
    CodesTransformer,
    ModelConfig,
    shift,
)
from sound import sampling
from sound.sampling import NEWEST, Draw, NotFiniteError, generate, packed_copy, stream

ANY = Draw.of(3)


def uniform_like(logits: torch.Tensor) -> torch.Tensor:
    """Random numbers to draw each code of these logits by."""
    return torch.rand(logits.shape[:2], generator=torch.Generator().manual_seed(0))


def banded_reference(model: CodesTransformer, codes: torch.Tensor, ctx: int) -> torch.Tensor:
    """Logits [B, T + 1, K, V] without a cache: each query sees BOS and the newest ctx - 1 frames.

    Written as loops over queries, from the rule alone: BOS seems min(p, ctx - 1) frames away.
    """
    config = model.config
    x = torch.cat((model.bos.expand(len(codes), 1, -1), model.embed_frames(codes)), dim=1)
    x, length = model.embed_norm(x), x.shape[1]
    for block in model.blocks:
        attn = block.attn
        qkv = attn.qkv(block.norm1(x)).unflatten(-1, (3, config.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if block is model.blocks[0]:
            first = v
        v = (v + first) / 2  # of the first block: its own
        q, k = attn.q_norm(q), attn.k_norm(k)
        mixed = torch.empty_like(q)
        for p in range(length):
            seen = [0, *range(max(1, p - ctx + 2), p + 1)] if p else [0]
            positions = torch.tensor([max(0, p - ctx + 1), *seen[1:]])
            query = rotate(q[:, :, p : p + 1], config.rope(torch.tensor([p])))
            keys = rotate(k[:, :, seen], config.rope(positions))
            weights = (query @ keys.mT / math.sqrt(q.shape[-1])).softmax(-1)
            mixed[:, :, p : p + 1] = weights @ v[:, :, seen]
        x = x + attn.out(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return model.logits_of(model.norm(x).flatten(0, 1)[None]).unflatten(0, (-1, length))


@pytest.mark.parametrize("prompt_frames", [0, 1, 5])
def test_cached_equals_uncached_within_ctx(prompt_frames):
    model, codes = make_model().eval(), make_codes(frames=12)
    expected = model(codes)
    cache = model.new_cache(2, ctx=20)
    state = model.prefill(codes[:, :prompt_frames], cache)
    torch.testing.assert_close(model.logits_of(state[None]), expected[:, prompt_frames])
    for frame in range(prompt_frames, 11):
        state = model.step(codes[:, frame], cache)
        torch.testing.assert_close(model.logits_of(state[None]), expected[:, frame + 1])


@pytest.mark.parametrize("prompt_frames", [0, 1, 5])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_drawn_is_drawn_from_the_logits_of_training(pattern, prompt_frames, monkeypatch):
    """Each draw's logits are those that one uncached pass over the sample gives its codes."""
    config = ModelConfig((16, 9, 16), d_model=32, layers=2, heads=2, pattern=pattern)
    model, prompt = make_model(config).eval(), make_codes(config, 1, 12)[0, :prompt_frames]
    drawn_from: dict[int, list[torch.Tensor]] = {k: [] for k in range(3)}
    draw = Draw.__call__

    def record(self, logits, uniform, first, newest):
        for i in range(logits.shape[1]):
            drawn_from[first + i].append(logits[:, i])
        return draw(self, logits, uniform, first, newest)

    monkeypatch.setattr(Draw, "__call__", record)
    codes = generate(model, 10, ctx=20, draw=ANY, batch=2, prompt=prompt)
    expected = model(torch.cat((prompt.expand(2, -1, -1), codes), dim=1))[:, prompt_frames:]
    for k in range(3):
        lag = (
            k if pattern == "delay" else 0
        )  # before that its places are known, or before the start
        logits = torch.stack(drawn_from[k], dim=1)[:, lag : lag + 10]
        torch.testing.assert_close(logits, expected[:, :, k])


@pytest.mark.parametrize("static", [False, True])
def test_cached_equals_uncached_past_ctx(static):
    model, codes = make_model().eval(), make_codes(frames=30)
    expected = banded_reference(model, codes, ctx=8)
    cache = model.new_cache(2, ctx=8, static=static)
    state = model.prefill(codes[:, :3], cache)
    for frame in range(3, 30):
        logits = model.logits_of(state[None])
        torch.testing.assert_close(logits, expected[:, frame], rtol=1e-4, atol=1e-5)
        if static:
            cache.host_position = 3  # what a replayed CUDA graph was recorded at
        state = model.step(codes[:, frame], cache)


def test_the_same_seed_draws_the_same_codes_cached_uncached_and_compiled():
    model = make_model().eval()
    cached = generate(model, 14, ctx=16, draw=ANY, seed=3, batch=2)
    generator = torch.Generator().manual_seed(3)
    slow = torch.zeros(2, 14, 3, dtype=torch.int64)
    with torch.no_grad():
        for frame in range(14):
            uniform = torch.rand((2, 3), generator=generator)
            slow[:, frame] = ANY(model(slow[:, : frame + 1])[:, frame], uniform)
    assert torch.equal(cached, slow)
    assert torch.equal(
        cached, generate(model, 14, ctx=16, draw=ANY, seed=3, batch=2, compiled=True)
    )
    with torch.compiler.set_stance("fail_on_recompile"):  # the step's shapes are static
        generate(model, 10, ctx=16, draw=ANY, batch=2, compiled=True)
    options = {"ctx": 16, "draw": ANY, "seed": 3, "batch": 2, "dtype": torch.float32}
    assert torch.equal(cached, generate(model, 14, compiled=True, **options))
    assert not torch.equal(cached, generate(model, 14, ctx=16, draw=ANY, seed=4, batch=2))
    assert not torch.equal(cached[0], cached[1])


STATIC = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.cuda),  # there a frame is a CUDA graph
]


@pytest.mark.parametrize("device", STATIC)
@pytest.mark.parametrize("prompt_frames", [0, 1, 20])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_static_step_draws_the_same_codes(pattern, prompt_frames, device):
    config = dataclasses.replace(CONFIG, pattern=pattern)
    model, prompt = make_model(config).eval().to(device), make_codes(config, 1, 20)[0]
    draw = Draw.of(3, 0.9, [7, 0, 3], [0.95, 0.9, 1.0])
    options: dict[str, Any] = {"ctx": 8, "draw": draw, "batch": 2, "prompt": prompt[:prompt_frames]}
    with torch.compiler.set_stance("force_eager"):
        static = generate(model, 24, compiled=True, **options)
    assert torch.equal(static, generate(model, 24, **options))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_products_draw_what_plain_ones_draw_and_share_all_other_weights(pattern):
    config = dataclasses.replace(CONFIG, pattern=pattern)
    model = make_model(config).eval()
    names = [name for name, _ in model.named_modules()]
    plain = generate(model, 12, ctx=8, draw=ANY, batch=2)
    assert torch.equal(plain, generate(model, 12, ctx=8, draw=ANY, batch=2, dtype=torch.float32))
    packed = packed_copy(model, torch.bfloat16)
    assert packed.embed.weight is model.embed.weight
    assert [name for name, _ in model.named_modules()] == names
    assert isinstance(model.head, torch.nn.Linear)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bfloat16_samples_come_from_the_logits_of_autocast(pattern):
    """One step after a prompt: what training in mixed precision would predict there."""
    config = dataclasses.replace(CONFIG, pattern=pattern)
    model, codes = make_model(config).eval(), make_codes(config, batch=2, frames=6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(codes)[:, -1, 0].float()
    packed = packed_copy(model, torch.bfloat16)
    cache, columns = packed.new_cache(2, ctx=8), shift(codes, config.lag)
    packed.prefill(columns[:, :4], cache)
    state = packed.step(columns[:, 4], cache)
    logits = []

    def choose(of: torch.Tensor, first: int) -> torch.Tensor:
        logits.append(of)
        return of.argmax(-1)

    packed.draw(state, choose)
    exact = model(codes)[:, -1, 0]
    error = (logits[0][:, 0] - exact).abs().max()
    assert 0 < error < 3 * (expected - exact).abs().max()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_long_prompt_counts_by_its_last_frames(pattern):
    model = make_model(dataclasses.replace(CONFIG, pattern=pattern)).eval()
    prompt = make_codes(frames=40, batch=1)[0]
    whole = generate(model, 5, ctx=8, draw=ANY, prompt=prompt)
    assert torch.equal(whole, generate(model, 5, ctx=8, draw=ANY, prompt=prompt[-7:]))
    assert not torch.equal(whole, generate(model, 5, ctx=8, draw=ANY))


def test_a_prompt_of_another_vocabulary_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="expected codes"):
        generate(model, 2, ctx=8, draw=ANY, prompt=torch.full((4, 3), 16))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_entries_that_a_codebook_lacks_are_never_drawn(pattern):
    model = make_model(ModelConfig((16, 5, 11), 32, 1, 2, pattern=pattern))
    codes = generate(model, 300, ctx=8, draw=Draw.of(3, temperature=5.0))
    assert [int(m) for m in codes.amax((0, 1))] == [15, 4, 10]


def test_draws_follow_the_probabilities():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(20_000, 1, 4)
    counts = Draw.of(1)(logits, uniform_like(logits)).flatten().bincount() / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.79}, {0, 1}),
        ({"top_p": 0.81}, {0, 1, 2}),
        ({"top_p": 1e-9}, {0}),
        ({"top_k": 3, "top_p": 0.6}, {0, 1}),
        ({"min_p": 0.59}, {0, 1}),
        ({"min_p": 0.61}, {0}),
        ({"min_p": 0.2, "top_p": 0.9}, {0, 1, 2}),
        ({"min_p": 0.2, "top_k": 2}, {0, 1}),
        ({"temperature": 0.01}, {0}),
        ({"temperature": 1e-40}, {0}),
        ({"temperature": 1e-320, "top_p": 1e-320}, {0}),
        ({"temperature": 9e29, "top_k": 2}, {0, 1}),
    ],
)
def test_top_k_top_p_and_min_p_keep_the_likeliest(options, kept):
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(4000, 1, 4)
    codes = Draw.of(1, **options)(logits, uniform_like(logits))
    assert set(codes.unique().tolist()) == kept


class Made(TorchFunctionMode):
    """Counts tensors made of the host's numbers, each of which a GPU waits for."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__ in ("tensor", "new_tensor", "as_tensor", "item", "tolist")
        return func(*args, **(kwargs or {}))


def test_a_draw_waits_for_the_host_once():
    draw = Draw.of(3, [0.8, 0.9, 1.1], [5, 0, 3], [0.9, 1.0, 0.5], [0.1, 0, 0], [4, 0, 1])
    newest = torch.randint(16, (NEWEST, 2, 3))
    counts = []
    for _ in range(3):
        with Made() as made:
            draw(torch.randn(2, 3, 16), torch.rand(2, 3), 0, newest)
        counts.append(made.count)
    assert counts[0] > 0, "what is counted is seen"
    assert counts[1:] == [0, 0]


def test_a_cache_of_depth_serves_frame_after_frame():
    model = make_model(dataclasses.replace(CONFIG, pattern="depth")).eval()
    cache = model.new_depth_cache(2)
    states = torch.randn(3, 2, model.config.d_model)
    for state in states:
        seen: list[list[torch.Tensor]] = [[], []]
        for logits, own in zip(seen, (None, cache), strict=True):

            def choose(found: torch.Tensor, _: int, logits: Any = logits) -> torch.Tensor:
                logits.append(found)
                return found.argmax(-1)

            model.draw(state, choose, own)
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
        assert len(seen[0]) == model.config.num_codebooks


def test_temperatures_may_differ_per_codebook_down_to_nothing():
    logits = torch.log(torch.tensor([0.2, 0.3, 0.5])).expand(2000, 2, 3)
    codes = Draw.of(2, temperature=[1e-40, 1.0])(logits, uniform_like(logits))
    assert [codes[:, k].unique().tolist() for k in range(2)] == [[2], [0, 1, 2]]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("spoil", ["norm.weight", "head.weight"])
def test_a_diverged_model_is_named_and_draws_nothing(spoil, pattern):
    model = make_model(dataclasses.replace(CONFIG, pattern=pattern)).eval()
    with torch.no_grad():
        model.get_parameter(spoil)[0] = math.nan
    with pytest.raises(NotFiniteError, match=r"logits are not finite from frame 0 .* ckpt_doctor"):
        generate(model, 3, ctx=8, draw=ANY)


def test_limits_may_differ_per_codebook():
    logits = torch.zeros(2000, 3, 8) - torch.arange(8) * 0.01
    draw = Draw.of(3, top_k=[1, 3, 0])
    codes = draw(logits, uniform_like(logits))
    assert [len(codes[:, k].unique()) for k in range(3)] == [1, 3, 8]
    with pytest.raises(ValueError, match="expected 1 or 3 values, found 2"):
        Draw.of(3, top_p=[0.5, 0.9])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_repeat_penalty_lowers_each_logit_by_its_codes_share_of_the_newest(pattern, monkeypatch):
    """Against a loop, with a prompt shorter than what counts, per codebook."""
    config = ModelConfig((8, 5, 8), d_model=32, layers=1, heads=2, pattern=pattern)
    model, prompt = make_model(config).eval(), make_codes(config, 1, 12)[0]
    tempered: list[tuple[torch.Tensor, torch.Tensor]] = []
    penalise = Draw._penalise

    def record(self, logits, newest, of):
        tempered.append((logits, penalise(self, logits, newest, of)))
        return tempered[-1][1]

    monkeypatch.setattr(Draw, "_penalise", record)
    draw = Draw.of(3, repeat_penalty=[9.0, 0.0, 3.0])
    codes = generate(model, 70, ctx=90, draw=draw, prompt=prompt)
    table = shift(torch.cat((prompt[None], codes), dim=1), config.lag)[0]
    calls = iter(tempered)
    for column in range(12, 82):
        for books in [(0,), (2,)] if pattern == "depth" else [(0, 1, 2)]:
            logits, lowered = next(calls)
            for i, k in enumerate(books):
                newest = table[max(0, column - NEWEST) : column, k]
                for code in range(8):
                    share = int((newest == code).sum()) / NEWEST  # what is not there counts too
                    expected = logits[0, i, code] - draw.repeat_penalty[k] * share
                    assert lowered[0, i, code] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("at_once", [1, 7, 20])
def test_a_stream_is_the_same_however_many_frames_come_at_once(at_once, pattern, monkeypatch):
    config = ModelConfig((8, 5, 8), d_model=32, layers=1, heads=2, pattern=pattern)
    model, prompt = make_model(config).eval(), make_codes(config, 1, 9)[0]
    whole = generate(model, 20, ctx=12, draw=ANY, batch=2, prompt=prompt)
    monkeypatch.setattr(sampling, "AT_ONCE", at_once)
    parts = list(stream(model, 20, ctx=12, draw=ANY, batch=2, prompt=prompt))
    assert [part.shape[1] for part in parts[:-1]] == [at_once] * (len(parts) - 1)
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_what_is_not_finite_is_named_by_its_frame(monkeypatch):
    """Far into a sample: the frames before were handed on."""
    model = make_model().eval()
    advance, came = model.advance, []

    def spoiled(column, cache):
        state = advance(column, cache)
        return state * math.nan if cache.host_position == 1 + 70 else state

    monkeypatch.setattr(model, "advance", spoiled)
    with pytest.raises(NotFiniteError, match="from frame 70 of the sample on"):
        came.extend(stream(model, 100, ctx=200, draw=ANY))
    assert sum(part.shape[1] for part in came) == sampling.AT_ONCE


def test_the_cached_step_is_faster_than_recomputing_the_window():
    torch.manual_seed(0)
    model = CodesTransformer(ModelConfig((64,) * 4, 128, 2, 2)).eval()
    started = time.perf_counter()
    codes = generate(model, 64, ctx=256, draw=Draw.of(4))
    cached = (time.perf_counter() - started) / 64
    window = codes.repeat(1, 4, 1)
    started = time.perf_counter()
    with torch.inference_mode():
        for _ in range(8):
            model(window)
    assert cached < (time.perf_counter() - started) / 8 / 2


# --- labels and guidance -------------------------------------------------------------------------

LABELLED = dataclasses.replace(CONFIG, labels=("a", "b"))


def drawn_slowly(
    model: CodesTransformer, frames: int, draw: Draw, labels: list[int], guidance: float, batch: int
) -> torch.Tensor:
    """Codes [B, T, K]: for each code one pass over all before it, with labels and one without."""
    generator, k = torch.Generator().manual_seed(5), model.config.num_codebooks
    codes = torch.zeros(batch, frames, k, dtype=torch.int64)
    known = torch.tensor([labels] * batch)
    with torch.no_grad():
        for frame in range(frames):
            shape = (k, batch) if model.depth else (batch, k)
            uniform = torch.rand(shape, generator=generator)
            uniform = uniform.mT if model.depth else uniform
            for book in range(k):
                told = model(codes[:, : frame + 1], known)[:, frame, book]
                bare = model(codes[:, : frame + 1])[:, frame, book]
                mixed = torch.stack([bare[:, v] + guidance * (told[:, v] - bare[:, v])
                                     if v < model.config.vocab_sizes[book] else bare[:, v]
                                     for v in range(told.shape[1])], dim=1)  # fmt: skip
                codes[:, frame, book] = draw(mixed[:, None], uniform[:, [book]], book)[:, 0]
    return codes


@pytest.mark.parametrize("guidance", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("pattern", ["parallel", "depth"])
def test_guidance_mixes_the_logits_of_two_rows_that_hear_the_same(pattern, guidance):
    config = dataclasses.replace(LABELLED, pattern=pattern, vocab_sizes=(16, 9, 16))
    model, draw = make_model(config).eval(), Draw.of(3, 0.8, 12, 0.95)
    options: dict[str, Any] = {"ctx": 16, "draw": draw, "seed": 5, "batch": 3, "guidance": guidance}
    found = generate(model, 12, labels=["b", "a"], **options)
    assert torch.equal(found, drawn_slowly(model, 12, draw, [1, 0], guidance, 3))
    other = generate(model, 12, labels=["a"], **options)
    assert not torch.equal(found, other)


@pytest.mark.parametrize("device", STATIC)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_labels_in_the_static_step_beyond_ctx_and_behind_a_prompt(pattern, guidance, device):
    config = dataclasses.replace(LABELLED, pattern=pattern)
    model, prompt = make_model(config).to(device), make_codes(config, 1, 12)[0, :5].to(device)
    draw = Draw.of(3, repeat_penalty=2.0)
    options: dict[str, Any] = {"ctx": 8, "draw": draw, "batch": 2, "prompt": prompt}
    options |= {"labels": ["b"], "guidance": guidance, "seed": 1}
    cached = generate(model, 14, **options)
    assert torch.equal(cached, generate(model, 14, compiled=True, **options))
    assert not torch.equal(cached, generate(model, 14, **{**options, "labels": ["a"]}))


def test_guidance_of_one_and_no_label_are_the_model_itself():
    model, plain = make_model(LABELLED).eval(), make_model(CONFIG).eval()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if "label" not in n})
    options: dict[str, Any] = {"ctx": 16, "draw": ANY, "seed": 2, "batch": 2}
    assert torch.equal(generate(model, 9, **options), generate(plain, 9, **options))
    with torch.no_grad():
        assert model.label_embed is not None
        model.label_embed.weight.zero_()
    for labels in (["a"], []):
        assert torch.equal(
            generate(model, 9, labels=labels, **options), generate(plain, 9, **options)
        )


def test_labels_that_cannot_be_played_are_refused():
    options: dict[str, Any] = {"ctx": 16, "draw": ANY}
    with pytest.raises(ValueError, match="unknown label 'x'; the model knows 'a', 'b'"):
        generate(make_model(LABELLED), 2, labels=["x"], **options)
    with pytest.raises(ValueError, match="the model knows none"):
        generate(make_model(), 2, labels=["a"], **options)
    with pytest.raises(ValueError, match="guidance: expected labels"):
        generate(make_model(LABELLED), 2, guidance=2.0, **options)
