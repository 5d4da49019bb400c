"""Whether drawn codes move as music does: repeats and entropy, beside those of held-out music.

    figures = compare(codes, excerpts)        # a sample [T, K], held-out music [N, T, K]
    print(describe(figures))

A model that is drawn from freely tends to hold its frames or to fall silent: its codes repeat more
than music's and come from fewer entries. Low is no better than high; near the music is good.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def repeats(codes: Array) -> Array:
    """Share of codes that equal the one before in their codebook: [..., T, K] -> [...], T > 1."""
    return (codes[..., 1:, :] == codes[..., :-1, :]).mean(axis=(-2, -1))


def entropy(codes: Array) -> list[float]:
    """Entropy of each codebook's frequencies, nats: [T, K] -> K numbers, at most ln T."""
    shares = [np.unique(column, return_counts=True)[1] / len(column) for column in codes.T]
    return [float(-(p * np.log(p)).sum()) for p in shares]


def compare(sample: Array, excerpts: Array) -> dict[str, Any]:
    """Figures of a sample [T, K] beside held-out excerpts [N, T, K] of about its length.

    `repeats` with `repeats_music` and `repeats_sd` (mean and standard deviation over the excerpts),
    `entropy` and `entropy_music` (K numbers, nats). Empty for a sample of one frame or no excerpts:
    there is nothing to count.
    """
    length = min(len(sample), excerpts.shape[1])
    if length < 2 or not len(excerpts):
        return {}
    music = repeats(excerpts[:, :length])
    return {
        "repeats": float(repeats(sample)),
        "repeats_music": float(music.mean()),
        "repeats_sd": float(music.std()),
        "entropy": entropy(sample[:length]),
        "entropy_music": np.mean([entropy(e[:length]) for e in excerpts], axis=0).tolist(),
    }


def describe(figures: dict[str, Any]) -> str:
    """One console line of `compare`'s figures."""
    if not figures:
        return "repeats n/a: no held-out music to compare with"
    own, music = (float(np.mean(figures[name])) for name in ("entropy", "entropy_music"))
    return (
        f"repeats {figures['repeats']:.3f} (held-out music {figures['repeats_music']:.3f}, "
        f"sd {figures['repeats_sd']:.3f}) | entropy {own:.2f} nats ({music:.2f})"
    )
