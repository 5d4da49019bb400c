"""Free samples of a checkpoint: how they repeat by the way of drawing; val far beyond ctx.

    python benchmarks/free_samples.py demo/run/rvq_9cb_best.pt --music "examples/demo/val/*.npq"

First table: repeats (share of codes equal to the one before) of `--samples` samples of `--frames`
frames without a prompt, beside excerpts of the music; how many lie within two deviations of it.

Second table: cross-entropy of the music's own frames by their distance from the start, in windows
of ctx, with the sliding cache that sampling uses, and with the newest ctx - 1 frames filled anew
for each of them, which takes ctx times as long. Nats per code, paired; mean and standard error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import CodesTransformer
from npq_dataset import find_npq_files
from run_folder.shared_weights import load_parts
from sample_rvq import NEEDED, load_model
from sound.npq_format import map_codes, read_header
from sound.sampling import Draw, generate
from sound.statistics import repeats

WAYS: tuple[dict[str, float], ...] = (
    {},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"repeat_penalty": 4},
    {"top_p": 0.9, "repeat_penalty": 4},
    {"top_p": 0.9, "repeat_penalty": 6},
    {"min_p": 0.05, "repeat_penalty": 4},
)


def print_repeats(model: CodesTransformer, music: list[Any], flags: argparse.Namespace) -> None:
    """The table of ways to draw."""
    n = flags.frames
    excerpts = np.stack([c[i : i + n] for c in music for i in range(0, len(c) - n + 1, n)])
    own = repeats(excerpts)
    mean, deviation = own.mean(), own.std()
    print(f"music: repeats {mean:.3f}, sd {deviation:.3f}, n = {len(own)}")
    for way in WAYS:
        draw = Draw.of(model.config.num_codebooks, **way)
        options = {"ctx": flags.ctx, "draw": draw, "seed": flags.seed, "batch": flags.samples}
        found = repeats(generate(model, n, **options).numpy())
        near = int((abs(found - mean) <= 2 * deviation).sum())
        name = ", ".join(f"{key} {value:g}" for key, value in way.items()) or "all probability"
        print(
            f"{name:34} {found.mean():.3f} (sd {found.std():.3f}, {found.min():.3f} to "
            f"{found.max():.3f}), {near} of {len(found)} within 2 sd of music",
            flush=True,
        )


@torch.no_grad()
def print_drift(model: CodesTransformer, music: list[Any], flags: argparse.Namespace) -> None:
    """The table by distance from the start."""
    ctx, rng = flags.ctx, np.random.default_rng(flags.seed)
    differences: list[list[tuple[float, float]]] = [[] for _ in range(flags.windows)]
    for codes in music:
        whole = torch.from_numpy(codes[: flags.windows * ctx])[None]
        cache = model.new_cache(1, ctx)
        state = model.prefill(whole[:, :0], cache)
        asked = {w * ctx + int(i) for w in range(flags.windows) for i in rng.permutation(ctx)[:8]}
        for at in range(whole.shape[1]):
            if at in asked:
                window = whole[:, max(0, at - ctx + 1) : at]
                anew = model.prefill(window, model.new_cache(1, ctx))
                pair = tuple(cross_entropy(model, s, whole[:, at]) for s in (state, anew))
                differences[at // ctx].append(pair)
            state = model.step(whole[:, at], cache)
    print(f"\nval by distance (ctx {ctx}): sliding, filled anew, difference")
    for window, pairs in enumerate(differences):
        if pairs:
            slid, anew = np.array(pairs).T
            error = (slid - anew).std() / len(pairs) ** 0.5
            print(
                f"{window} to {window + 1} x ctx  {slid.mean():.3f}  {anew.mean():.3f}  "
                f"{(slid - anew).mean():+.4f} (se {error:.4f}), n = {len(pairs)}",
                flush=True,
            )


def cross_entropy(model: CodesTransformer, state: Tensor, frame: Tensor) -> float:
    """Mean cross-entropy, nats per code, of a frame [1, K] by its state [1, D]."""
    total = 0.0

    def given(logits: Tensor, first: int) -> Tensor:
        nonlocal total
        codes = frame[:, first : first + logits.shape[1]]
        total += float(F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="sum"))
        return codes

    model.draw(state, given)
    return total / frame.shape[1]


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--music", nargs="+", required=True, help="held-out .npq files")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--frames", type=int, default=645)
    parser.add_argument("--windows", type=int, default=6, help="distance to measure, in ctx")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    checkpoint = load_parts(flags.checkpoint, needed=NEEDED)
    model = load_model(checkpoint, flags.checkpoint, raw=False, device=torch.device("cpu"))
    flags.ctx = checkpoint["flags"]["ctx"]
    k = model.config.num_codebooks
    files = find_npq_files(flags.music)
    music = [map_codes(read_header(f))[:, :k].astype(np.int64) for f in files]
    print_repeats(model, music, flags)
    print_drift(model, music, flags)


if __name__ == "__main__":
    main()
