"""layers/: rotary positions and attention, against definitions; the loss: tests/test_model.py."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from kit.trainer import ROOT

from layers import attention, cpu
from layers.attention import causal_attention
from layers.rotary import rotary_angles, rotate

# --- positions -----------------------------------------------------------------------------------


def test_rotation_turns_each_pair_by_its_angle():
    torch.manual_seed(0)
    x, positions = torch.randn(2, 3, 5, 8), torch.tensor([0, 1, 7, 300, 9])
    turned = rotate(x, rotary_angles(positions, channels=8, base=10_000.0))
    for t, i in itertools.product(range(5), range(4)):
        angle = positions[t] * 10_000.0 ** (-2 * i / 8)
        pair = torch.complex(x[:, :, t, i], x[:, :, t, i + 4]) * torch.exp(1j * angle)
        torch.testing.assert_close(turned[:, :, t, i], pair.real)
        torch.testing.assert_close(turned[:, :, t, i + 4], pair.imag)


# --- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 256, 600])
def test_blocked_attention_agrees_with_sdpa(frames):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, frames, 16, requires_grad=True).unbind(0)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    blocked = cpu.blocked_attention(q, k, v)
    torch.testing.assert_close(blocked, expected)
    slope = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(blocked, (q, k, v), slope),
        torch.autograd.grad(expected, (q, k, v), slope),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_causal_in_every_dtype_and_for_more_windows_than_a_kernel_takes(
    dtype, monkeypatch
):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 5, 2, 40, 16).to(dtype)
    scores = (q.float() @ k.float().mT / 4).masked_fill(torch.ones(40, 40).triu(1) > 0, -torch.inf)
    expected = scores.softmax(-1) @ v.float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for most in (attention.MOST_WINDOWS, 2):
        monkeypatch.setattr(attention, "MOST_WINDOWS", most)
        for attend in (causal_attention, torch.compile(causal_attention, backend="eager")):
            mixed = attend(q, k, v)
            assert mixed.dtype == dtype
            torch.testing.assert_close(mixed.float(), expected, atol=tolerance, rtol=tolerance)


def test_blocks_are_for_cpus_in_bfloat16_outside_of_the_compiler():
    half = torch.zeros(1, dtype=torch.bfloat16)
    assert cpu.prefers_blocks(half)
    assert not cpu.prefers_blocks(half.float())
    assert not cpu.prefers_blocks(half.to("meta"))
    asked = torch.compile(cpu.prefers_blocks, fullgraph=True, backend="eager")
    assert not asked(half)


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
from layers.attention import causal_attention
q = torch.randn(1, 2, 5, 4)
future = torch.ones(5, 5).triu(1).bool()
expected = (q @ q.mT / 2).masked_fill(future, -torch.inf).softmax(-1) @ q
print(torch.allclose(causal_attention(q, q, q), expected, atol=1e-5))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == printed, done.stderr
