"""model.py: alignment, causality, losses against slow references, the CUDA path without CUDA."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from kit.models import CONFIG, make_codes, make_model
from torch.utils._python_dispatch import TorchDispatchMode

from model import (
    ABSENT,
    PATTERNS,
    CodesTransformer,
    ModelConfig,
    shift,
    unshift,
)


def sees(pattern: str, t: int, k: int, frame: int, codebook: int) -> bool:
    """Whether the pattern's order puts code (frame, codebook) before code (t, k)."""
    return {
        "parallel": frame < t,
        "delay": frame + codebook < t + k,
        "depth": (frame, codebook) < (t, k) and (frame < t or codebook < k),
    }[pattern]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_depend_on_what_the_pattern_puts_before_them_and_on_all_of_it(pattern):
    config = dataclasses.replace(CONFIG, pattern=pattern)
    model, codes = make_model(config).eval(), make_codes(config, frames=6)
    before = model(codes)
    for frame in range(6):
        for codebook in range(3):
            changed = codes.clone()
            changed[:, frame, codebook] = (changed[:, frame, codebook] + 5) % 16
            moved = (model(changed) - before).abs().amax((0, 3)) > 1e-7
            expected = [[sees(pattern, t, k, frame, codebook) for k in range(3)] for t in range(6)]
            assert moved.tolist() == expected, (frame, codebook)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_likelihoods_of_all_windows_sum_to_one(pattern):
    """By enumeration: the K cross-entropies of a window sum to minus its log-likelihood."""
    config = ModelConfig((3, 2, 2), d_model=32, layers=2, heads=2, dropout=0.0, pattern=pattern)
    model = make_model(config).eval()
    frames = list(itertools.product(*map(range, config.vocab_sizes)))
    windows = torch.tensor(list(itertools.product(frames, frames)))  # [144, 2, 3]
    with torch.no_grad():
        ce = torch.stack([model.losses(window[None]).ce for window in windows])
    likelihood = (-ce.sum(1) * windows.shape[1]).exp()
    assert likelihood.sum().item() == pytest.approx(1, abs=1e-5)
    assert likelihood.max() > 2 * likelihood.min()


def test_shift_and_unshift_against_loops():
    codes = make_codes()
    shifted = shift(codes, 2)
    for t in range(codes.shape[1] + 2):
        for k in range(3):
            inside = 0 <= t - k < codes.shape[1]
            expected = codes[:, t - k, k] if inside else torch.full((2,), ABSENT)
            assert torch.equal(shifted[:, t, k], expected)
    assert torch.equal(unshift(shifted, 2), codes)


def test_a_share_of_the_frames_estimates_the_whole():
    config = dataclasses.replace(CONFIG, pattern="depth")
    codes = make_codes(frames=32)
    whole, share = make_model(config).train(), make_model(config, depth_share=0.25).train()
    expected = whole.losses(codes, 0.05)
    drawn = [share.losses(codes, 0.05) for _ in range(300)]
    mean = torch.stack([losses.objective for losses in drawn]).mean()
    torch.testing.assert_close(mean, expected.objective, rtol=0.01, atol=0)
    assert len({losses.objective.item() for losses in drawn}) > 200, "drawn anew each time"
    torch.testing.assert_close(share.eval().losses(codes, 0.05).ce, expected.ce)


def test_code_dropout_hides_inputs_in_training_alone():
    codes = make_codes()
    other = codes.clone()
    other[:, 0] = (other[:, 0] + 5) % 16
    model = make_model(code_dropout=1 - 1e-9).train()
    assert torch.equal(model(codes), model(other)), "nothing of the past is left"
    assert not torch.equal(model.eval()(codes), model(other))
    torch.testing.assert_close(model(codes), make_model().eval()(codes))


def test_later_codebooks_count_less_and_absent_codes_nothing():
    falling, codes = make_model(dataclasses.replace(CONFIG, embed_fall=2.0)), make_codes()
    codes[1, 3, 1] = ABSENT
    rows = falling.embed.weight.unflatten(0, (3, 16))
    expected = sum(rows[k][codes[..., k].clamp(min=0)] / (k + 1) ** 2 for k in range(3))
    expected[1, 3] -= rows[1][0] / 4
    torch.testing.assert_close(falling.embed_frames(codes), expected)


def test_dropout_in_depth_is_of_training_and_of_depth_alone():
    config = dataclasses.replace(CONFIG, pattern="depth", depth_dropout=0.5)
    model, codes = make_model(config).train(), make_codes()
    hidden = model.hidden_states(codes)
    assert torch.equal(hidden, model.hidden_states(codes)), "--dropout is 0"
    first, second = (model.head_states(hidden, codes) for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    first, second = (model.head_states(hidden, codes) for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match=r"--depth-dropout: expected 0 <= rate < 1, found 1\.5"):
        dataclasses.replace(CONFIG, depth_dropout=1.5)


@pytest.mark.parametrize("value_residual", [True, False])
def test_logits_match_a_slow_reference(value_residual):
    """Loops over frames, codebooks and heads, in float64, against the vectorised forward."""
    config = dataclasses.replace(CONFIG, value_residual=value_residual)
    model, codes = make_model(config).eval().double(), make_codes()
    w = dict(model.named_parameters())
    b, t, k = codes.shape
    d, heads = CONFIG.d_model, CONFIG.heads
    c = d // heads

    def norm(x, gain, eps=1e-6):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain

    def rotate(x, frame):
        out = x.clone()
        for i in range(c // 2):
            a = torch.tensor(frame * 10_000.0 ** (-2 * i / c), dtype=torch.float32)
            out[i] = x[i] * a.cos() - x[i + c // 2] * a.sin()
            out[i + c // 2] = x[i + c // 2] * a.cos() + x[i] * a.sin()
        return out

    expected = torch.zeros(b, t, k, 16, dtype=torch.float64)
    for n in range(b):
        x = torch.empty(t, d, dtype=torch.float64)
        for f in range(t):
            past = [w["embed.weight"][i * 16 + codes[n, f - 1, i]] for i in range(k)]
            x[f] = norm(sum(past) if f else w["bos"], 1, eps=1e-8)
        for layer in range(CONFIG.layers):
            p = f"blocks.{layer}."
            qkv = norm(x, w[p + "norm1.weight"]) @ w[p + "attn.qkv.weight"].T
            if value_residual and layer == 0:
                first = qkv[:, 2 * d :].clone()
            elif value_residual:
                qkv[:, 2 * d :] = (qkv[:, 2 * d :] + first) / 2
            mixed = torch.zeros(t, d, dtype=torch.float64)
            for h in range(heads):
                q, key, v = (qkv[:, part * d + h * c : part * d + (h + 1) * c] for part in range(3))
                q = norm(q.float(), w[p + "attn.q_norm.weight"])
                key = norm(key.float(), w[p + "attn.k_norm.weight"])
                for f in range(t):
                    scores = torch.stack(
                        [rotate(q[f], f) @ rotate(key[g], g) / math.sqrt(c) for g in range(f + 1)]
                    )
                    mixed[f, h * c : (h + 1) * c] = scores.softmax(0) @ v[: f + 1]
            x = x + mixed @ w[p + "attn.out.weight"].T
            hidden = (norm(x, w[p + "norm2.weight"]) @ w[p + "mlp.up.weight"].T).clamp(min=0) ** 2
            x = x + hidden @ w[p + "mlp.down.weight"].T
        logits = norm(x, w["norm.weight"]) @ w["head.weight"].T
        for i in range(k):
            expected[n, :, i] = logits[:, i * 16 : (i + 1) * 16]
    torch.testing.assert_close(model(codes), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
@pytest.mark.parametrize("vocab_sizes", [(16, 7, 11), (16, 16, 16)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_losses_and_gradients_match_cross_entropy_per_codebook(pattern, vocab_sizes, smoothing):
    config = ModelConfig(vocab_sizes, 32, layers=1, heads=2, dropout=0.0, pattern=pattern)
    model, codes = make_model(config).double(), make_codes(config)
    weights = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    losses = model.losses(codes, smoothing, weights)
    logits, expected = model(codes), 0.0
    for k, v in enumerate(config.vocab_sizes):
        assert logits[:, :, k, v:].isneginf().all(), "entries a codebook lacks cannot be drawn"
        flat, target = logits[:, :, k, :v].reshape(-1, v), codes[:, :, k].reshape(-1)
        torch.testing.assert_close(losses.ce[k], F.cross_entropy(flat, target))
        smoothed = F.cross_entropy(flat, target, label_smoothing=smoothing)
        expected = expected + weights[k] / 3 * smoothed
    torch.testing.assert_close(losses.objective, expected)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(3 * losses.objective, parameters)
    for (name, _), a, b in zip(
        model.named_parameters(), ours, torch.autograd.grad(3 * expected, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_the_activation_stays_in_its_inputs_dtype():
    """Autocast on CUDA makes powers in float32, `square` too: 29 % more memory in run #3."""
    called = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    mlp = make_model().blocks[0].mlp
    with Names(), torch.autocast("cpu", torch.bfloat16):
        mlp(torch.randn(3, 32))
    assert "mul" in called
    assert "pow" not in called


def test_a_new_model_guesses_evenly():
    model = CodesTransformer(ModelConfig((1024,) * 9, 128, 4, 4))
    ce = model.losses(make_codes(model.config)).ce
    assert (ce - math.log(1024)).abs().max() < 0.1


def test_config_round_trips_and_refuses_what_does_not_fit():
    assert ModelConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(ValueError, match="newer version"):
        ModelConfig.from_dict({**CONFIG.to_dict(), "moon_phase": 1})
    with pytest.raises(ValueError, match="--heads 12"):
        ModelConfig((1024,) * 9, d_model=100, heads=12)


@pytest.mark.parametrize(
    ("shape", "millions"), [((512, 12, 8), 47.2), ((768, 16, 12), 127.4), ((896, 20, 14), 209.2)]
)
def test_parameter_counts_of_the_usual_sizes(shape, millions):
    with torch.device("meta"):
        model = CodesTransformer(ModelConfig((1024,) * 9, *shape))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.05)
    d, layers, _ = shape
    by_hand = 6 * (12 * layers * d * d + 9 * 1024 * d) + 6 * layers * 512 * d
    assert model.flops_per_frame(512) == by_hand


def test_grad_checkpointing_changes_no_gradient():
    codes = make_codes()
    plain, checkpointed = make_model(), make_model(grad_checkpoint=True)
    for model in (plain, checkpointed):
        model.train().losses(codes).objective.backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_the_same_weights_take_a_longer_ctx():
    model = make_model().eval()
    long, short = make_codes(frames=40), make_codes(frames=40)[:, :12]
    torch.testing.assert_close(model(long)[:, :12], model(short))


def test_forward_and_backward_run_on_meta_without_a_host_read():
    """CUDA without CUDA: on meta a stray CPU tensor and every .item() raise. Pitfall 9."""
    with torch.device("meta"):
        model = CodesTransformer(CONFIG)
        codes = torch.empty(2, 12, 3, dtype=torch.int64)
    losses = model.losses(codes, 0.05)
    losses.objective.backward()
    assert losses.ce.is_meta
    assert all(p.grad.is_meta for p in model.parameters())


def test_one_gather_and_one_head_product_whatever_k():
    """Pitfall 25."""
    counts = []
    for k in (2, 9):
        config = ModelConfig((16,) * k, d_model=32, layers=1, heads=2)
        model, codes = make_model(config), make_codes(config)
        with torch.profiler.profile() as profile:
            model(codes)
        calls = {e.key: e.count for e in profile.key_averages()}
        products = calls["aten::mm"] + calls.get("aten::bmm", 0)
        counts.append((products, calls["aten::embedding_bag"]))
    assert counts[0] == counts[1]
    assert counts[0][1] == 1


def test_the_model_attends_by_a_fused_kernel():
    """It takes the shapes and layouts that the model gives it; CPUs have one too."""
    with torch.profiler.profile() as profile:
        make_model()(make_codes())
    kernels = {e.key for e in profile.key_averages() if "scaled_dot_product" in e.key}
    assert any("flash" in name for name in kernels), kernels


@pytest.mark.parametrize("pattern", PATTERNS)
def test_traces_without_a_graph_break_and_agrees_with_eager(pattern):
    model, codes = make_model(dataclasses.replace(CONFIG, pattern=pattern)), make_codes()
    compiled = torch.compile(model.losses, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(codes, 0.05), model.losses(codes, 0.05)
    torch.testing.assert_close(ours.ce, theirs.ce)
    torch.testing.assert_close(ours.objective, theirs.objective)


def test_compiles_with_all_that_training_adds():
    """Dropout of states and codes, vectors, a share of the frames, bfloat16: no graph break."""
    config = ModelConfig((16, 16, 7), 32, 1, 2, dropout=0.1, pattern="depth", code_features=3)
    model = make_model(config, code_dropout=0.1, depth_share=0.5).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = torch.compile(model.losses, fullgraph=True)(make_codes(config), 0.05)
    losses.objective.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- labels --------------------------------------------------------------------------------------

LABELLED = dataclasses.replace(CONFIG, labels=("a", "b", "c"))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_labels_add_their_rows_to_every_position_and_absent_ones_nothing(pattern):
    """Against the model without: its normalised embeddings moved by hand."""
    model = make_model(dataclasses.replace(LABELLED, pattern=pattern)).eval()
    plain = make_model(dataclasses.replace(CONFIG, pattern=pattern)).eval()
    rows = model.state_dict()["label_embed.weight"]
    others = {n: t for n, t in model.state_dict().items() if n != "label_embed.weight"}
    plain.load_state_dict(others)
    codes = make_codes(batch=3)
    labels = torch.tensor([[2, ABSENT], [ABSENT, ABSENT], [0, 1]])
    with torch.no_grad():
        assert torch.equal(model(codes)[1], plain(codes)[1])
        found = model(codes, labels)
        torch.testing.assert_close(found[1], plain(codes)[1])
        for window, added in ((0, rows[2]), (2, rows[0] + rows[1])):
            hook = plain.embed_norm.register_forward_hook(lambda *x, added=added: x[2] + added)
            torch.testing.assert_close(found[window], plain(codes)[window], rtol=1e-4, atol=1e-5)
            hook.remove()
    assert (found[0] - plain(codes)[0]).abs().amax((1, 2)).min() > 1e-3  # the first frame too


def test_labels_begin_at_zero_and_leave_the_other_weights_as_they_are_without():
    weights = []
    for config in (CONFIG, LABELLED):
        torch.manual_seed(0)
        weights.append(CodesTransformer(config).state_dict())
    assert not weights[1].pop("label_embed.weight").any()
    assert all(torch.equal(t, weights[1].pop(n)) for n, t in weights[0].items())
    assert not weights[1]


def test_label_dropout_leaves_out_whole_windows_and_only_in_training():
    model = CodesTransformer(LABELLED, label_dropout=0.25)
    torch.nn.init.ones_(model.label_embed.weight)
    labels = torch.tensor([[0, 1, ABSENT]]).expand(4000, -1)
    torch.manual_seed(0)
    sums = model.train().embed_labels(labels)[:, 0, 0]
    assert set(sums.tolist()) == {0.0, 2.0}
    assert 0.22 < (sums == 0).float().mean() < 0.28
    state = torch.get_rng_state()
    assert set(model.eval().embed_labels(labels)[:, 0, 0].tolist()) == {2.0}
    assert torch.equal(state, torch.get_rng_state())


def test_an_architecture_without_labels_is_saved_as_before():
    assert "labels" not in CONFIG.to_dict()
    assert ModelConfig.from_dict(CONFIG.to_dict()) == CONFIG
    assert ModelConfig.from_dict(LABELLED.to_dict()) == LABELLED
    assert LABELLED.numbers_of(["c", "a"]) == [2, 0]
    with pytest.raises(ValueError, match="unknown label 'x'; the model knows 'a', 'b', 'c'"):
        LABELLED.numbers_of(["a", "x"])
    with pytest.raises(ValueError, match="unknown label 'x'; the model knows none: it was trained"):
        CONFIG.numbers_of(["x"])
    with pytest.raises(ValueError, match="different names"):
        dataclasses.replace(CONFIG, labels=("a", "a"))
