"""The hand-written backwards: against finite differences, and against PyTorch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.autograd import gradcheck

from layers import kernels
from layers.kernels import blocked_attention, dropout, rms_norm, rotated_heads, squared_relu


def exact(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def angles(frames: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.randn(frames, channels // 2, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def test_gradients_are_those_of_finite_differences(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "BLOCK", 3)
    assert gradcheck(rms_norm, (exact(2, 3, 4), exact(4)))
    assert gradcheck(squared_relu, (exact(3, 4),))
    assert gradcheck(lambda x, g: rotated_heads(x, g, rope), (exact(2, 5, 3, 2, 4), exact(2, 4)))
    assert gradcheck(lambda x: rotated_heads(x, None, rope), (exact(2, 5, 3, 2, 4),))
    assert gradcheck(blocked_attention, (exact(2, 2, 8, 4), exact(2, 2, 8, 4), exact(2, 2, 8, 4)))


rope = angles(5, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_agree_with_torch_in_every_dtype(dtype):
    torch.manual_seed(0)
    x, gain = torch.randn(3, 5, 64).to(dtype), torch.randn(64)
    expected = F.rms_norm(x.float(), (64,), gain, 1e-6)
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(rms_norm(x, gain).float(), expected, atol=0, rtol=rounding)
    with torch.autocast("cpu", torch.bfloat16):
        assert rms_norm(x, gain).dtype == torch.bfloat16


def test_heads_are_normalised_turned_and_split_as_the_definitions_say():
    torch.manual_seed(0)
    qkv, gains = exact(2, 5, 3, 2, 4), exact(2, 4)
    q, k, v = rotated_heads(qkv, gains, rope)
    assert torch.equal(v, qkv[:, :, 2].transpose(1, 2))
    for ours, part, gain in ((q, 0, gains[0]), (k, 1, gains[1])):
        x = F.rms_norm(qkv[:, :, part].transpose(1, 2), (4,), gain, 1e-6)
        pair = torch.complex(x[..., :2], x[..., 2:]) * torch.complex(rope[0][:, :2], rope[1][:, 2:])
        torch.testing.assert_close(ours, torch.cat((pair.real, pair.imag), -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_dropout_keeps_the_mean_and_drops_its_share_everywhere(dtype, p):
    torch.manual_seed(0)
    x = torch.ones(4, 250_001, dtype=dtype, requires_grad=True)
    y = dropout(x, p)
    y.sum().backward()
    assert torch.equal(x.grad, y), "the gradient is dropped and scaled alike"
    assert y.detach().double().mean().item() == pytest.approx(
        1, abs=6 * (p / (1 - p) / 1e6) ** 0.5 + 2**-8
    )
    for offset in range(4):  # four elements come from one word of random bits
        assert (y.flatten()[offset::4] == 0).double().mean().item() == pytest.approx(p, abs=0.004)


@pytest.mark.parametrize("frames", [1, 128, 300])
def test_blocked_attention_agrees_with_sdpa(frames):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, frames, 16, requires_grad=True).unbind(0)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(blocked_attention(q, k, v), expected)
    slope = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(blocked_attention(q, k, v), (q, k, v), slope),
        torch.autograd.grad(expected, (q, k, v), slope),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


NO_NEW_API = "sys.modules['torch.nn.attention'] = None"
OLD_API = """
import contextlib
@contextlib.contextmanager
def sdp_kernel(enable_flash=True, enable_math=True, enable_mem_efficient=True):
    print("old", end=" ")
    yield
torch.backends.cuda.sdp_kernel = sdp_kernel
"""


@pytest.mark.parametrize(
    ("before", "printed"),
    [
        ("", "True"),
        (NO_NEW_API + OLD_API, "old True"),
        (NO_NEW_API + "; del torch.backends.cuda.sdp_kernel", "True"),
    ],
    ids=["new", "old", "neither"],
)
def test_sdpa_wrapper_survives_every_api(before, printed):
    """Pitfall 27: the present API, the one before it, and none."""
    script = f"""
import sys, torch
{before}
sys.path.insert(0, {str(ROOT)!r})
from layers import kernels
q = torch.randn(1, 2, 5, 4)
future = torch.ones(5, 5).triu(1).bool()
expected = (q @ q.mT / 2).masked_fill(future, -torch.inf).softmax(-1) @ q
print(torch.allclose(kernels.causal_attention(q, q, q), expected, atol=1e-5))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == printed, done.stderr
