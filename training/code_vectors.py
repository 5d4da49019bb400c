"""The codec's vectors of the codes, for a new model to begin from.

    features, line = find_code_vectors(flags, data)       # [K, V, F], or None

A code is the number of an entry in a codec's codebook. Entries with near vectors sound alike, which
the numbers do not tell and a model learns slowly: of V entries each is seen once in V frames. With
the vectors, val falls in four passes lower than without in sixty (benchmarks/journal.md).

Which codec made the codes is told by the codes: from frame to frame they move otherwise in their
own codec than where its entries are shuffled, mostly less far. The one that the record beside the
files names is tried first.
"""

from __future__ import annotations

import argparse

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
SURE = 100.0  # chi-square beyond which no other codec comes; half a minute of music has 170


def find_code_vectors(flags: argparse.Namespace, data: Data) -> tuple[Tensor | None, str]:
    """Find the features [K, V, F] of the data's codec among those at hand, and a line to print."""
    known = codec_of(data.facts)
    first = [known.name] if known else []
    codes, absent = sample_of(data.train), []
    for name in dict.fromkeys([*first, flags.eval_dac_repo, "demo", *OFFICIAL_WEIGHTS]):
        try:
            vectors, frame_rate = codebook_vectors(name)
        except CodecError:
            absent.append(name)
            continue
        if abs(data.corpus.frame_rate / frame_rate - 1) > FRAME_RATE_TOLERANCE:
            continue
        mid = len(data.corpus.vocab_sizes) - data.corpus.side_codebooks
        books = [*range(mid), *range(data.corpus.side_codebooks)]
        if max(books) >= len(vectors) or {*data.corpus.vocab_sizes} != {vectors.shape[1]}:
            continue
        vectors = vectors[books]
        chi_square = surprise(vectors, codes)
        if chi_square > SURE:
            return features_of(vectors), (
                f"codes    begin from the vectors of codec {name}, in which they move as in no "
                f"other (chi-square {chi_square:.0f}, by chance {len(books)})"
            )
    return None, (
        f"codes    of no codec at hand (not here: {', '.join(absent) or 'none'}): the model learns "
        "from the data alone what each one means, and val stays higher; see docs/training.md"
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


def surprise(vectors: Tensor, codes: Tensor) -> float:
    """How unlike chance codes [N, T, K] move through vectors [K, V, F]: chi-square, K expected.

    Of each codebook the mean square distance of neighbouring frames with different codes is
    compared with the same where its vectors are shuffled among the codes.
    """
    generator, total = torch.Generator().manual_seed(0), 0.0
    for k, table in enumerate(vectors):
        pairs = torch.stack((codes[:, :-1, k], codes[:, 1:, k])).flatten(1)
        one, other = pairs[:, pairs[0] != pairs[1]]
        if not len(one):
            continue
        tables = [table] + [
            table[torch.randperm(len(table), generator=generator)] for _ in range(SHUFFLES)
        ]
        apart = [float((t[one] - t[other]).square().sum(-1).mean()) for t in tables]
        chance = np.array(apart[1:])
        total += ((apart[0] - chance.mean()) / max(chance.std(), 1e-30)) ** 2
    return total
