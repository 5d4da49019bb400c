"""The codec's vectors of the codes, for a new model to begin from.

    features, line = find_code_vectors(flags, data)       # [K, V, F], or None

A code is the number of an entry in a codec's codebook. Entries with near vectors sound alike, which
the numbers do not tell and a model learns slowly: of V entries each is seen once in V frames. With
the vectors, val falls in four passes lower than without in sixty (benchmarks/journal.md).

Which codec made the codes, the record beside the files says, or the codes themselves: from frame to
frame sound changes little, so the vectors of neighbours are nearer than those of a wrong codec.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from torch import Tensor

from cli.waiting import in_thread, wait_for
from npq_dataset import WindowDataset
from sound.codec import OFFICIAL_WEIGHTS, CodecError, codebook_vectors
from sound.npq_format import FRAME_RATE_TOLERANCE
from sound.origin import codec_of
from training.data import Data

FRAMES = 20_000  # of the data that are looked at
SHUFFLES = 50  # of a codebook, to know how near neighbours are by chance
FAR = 6.0  # standard deviations from chance; the bundled music is at 30


def find_code_vectors(flags: argparse.Namespace, data: Data) -> tuple[Tensor | None, str]:
    """Find the features [K, V, F] of the data's codec among those at hand, and a line to print."""
    known = codec_of(data.facts)
    names = [known.name] if known else []
    names += [
        name for name in (flags.eval_dac_repo, "demo", *OFFICIAL_WEIGHTS) if name not in names
    ]
    codes = sample_of(data.train)
    for name in names:
        try:
            vectors, frame_rate = codebook_vectors(name)
        except CodecError:  # the codec is not there
            continue
        if abs(data.corpus.frame_rate / frame_rate - 1) > FRAME_RATE_TOLERANCE:
            continue
        mid = len(data.corpus.vocab_sizes) - data.corpus.side_codebooks
        books = [*range(mid), *range(data.corpus.side_codebooks)]
        if max(books) >= len(vectors) or {*data.corpus.vocab_sizes} != {vectors.shape[1]}:
            continue
        vectors = vectors[books]
        apart, deviations = nearness(vectors[0], codes[..., 0])
        if deviations > FAR:
            return features_of(vectors), (
                f"codes    begin from the vectors of codec {name}: neighbouring frames lie "
                f"{apart:.2f} times as far apart as by chance"
            )
    return None, (
        "codes    of no codec at hand: what each one means is learned from the data alone, and val "
        "stays higher; name the codec with --eval-dac-repo (docs/training.md)"
    )


def features_of(vectors: Tensor) -> Tensor:
    """Vectors [K, V, n] with their directions and lengths: [K, V, 2 n + 1].

    A codec finds an entry by its direction and decodes the vector. Each number is scaled to mean 0
    and deviation 1 over the entries of a codebook.
    """
    lengths = vectors.norm(dim=2, keepdim=True)
    features = torch.cat((vectors, vectors / lengths.clamp(min=1e-12), lengths), dim=2)
    deviations = features.std(1, keepdim=True).clamp(min=1e-12)
    return (features - features.mean(1, keepdim=True)) / deviations


def sample_of(windows: WindowDataset) -> Tensor:
    """Some windows [N, ctx, K] from all over the data, int64."""
    count = min(len(windows), max(1, FRAMES // windows.ctx))
    numbers = np.linspace(0, len(windows) - 1, count).astype(np.int64)
    return wait_for(in_thread(lambda: windows[numbers], "reading"), windows.sign).long()


def nearness(vectors: Tensor, codes: Tensor) -> tuple[float, float]:
    """How near neighbours lie, for vectors [V, F] and codes [N, T] of a codebook.

    Returns the mean square distance of neighbours with different codes, relative to that with the
    vectors shuffled among the codes, and how many standard deviations of the latter it is below 1.
    """
    pairs = torch.stack((codes[:, :-1], codes[:, 1:])).flatten(1)
    one, other = pairs[:, pairs[0] != pairs[1]]
    if not len(one):
        return math.nan, 0.0
    generator = torch.Generator().manual_seed(0)
    shuffles = [torch.randperm(len(vectors), generator=generator) for _ in range(SHUFFLES)]

    def apart(table: Tensor) -> float:
        return float((table[one] - table[other]).square().sum(-1).mean())

    chance = np.array([apart(vectors[shuffle]) for shuffle in shuffles])
    found = apart(vectors)
    return found / chance.mean(), float((chance.mean() - found) / max(chance.std(), 1e-30))
