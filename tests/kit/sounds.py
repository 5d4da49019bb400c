"""A tiny DAC of the real class, and something for it to encode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sound import codec as codec_module

RATE, HOP, K, V = 8000, 40, 6, 64  # of the tiny DAC


def save_tiny_dac(path: Path) -> Path:
    """Random weights of a DAC with an odd stride, as the 24 and 16 kHz models have one."""
    torch.manual_seed(0)
    model = codec_module._import_dac().DAC(
        encoder_dim=8,
        encoder_rates=[2, 4, 5],
        latent_dim=16,
        decoder_dim=32,
        decoder_rates=[5, 4, 2],
        n_codebooks=K,
        codebook_size=V,
        codebook_dim=4,
        sample_rate=RATE,
    )
    model.save(path, package=False)
    return path


def music(samples, rate=RATE, channels=1):
    """Tones and noise, float32 [C, N]."""
    random, seconds = np.random.default_rng(1), np.arange(samples) / rate
    tones = sum(0.1 * np.sin(2 * np.pi * f * seconds) for f in (111, 333, 1234))
    return (tones + 0.05 * random.standard_normal((channels, samples))).astype(np.float32)
