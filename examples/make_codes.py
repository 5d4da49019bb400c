"""Write small .npq files whose codes have structure that a tiny model learns in seconds.

    python examples/make_codes.py demo_codes --files 8 --frames 2000

Each file is a tune: notes of eight frames, each followed by a neighbour on a ring of sixteen, as
in a random walk. A note is one fixed pattern of codes, so that the frames within it can be learned
exactly and the next note only as one of three: about 0.14 nats per frame are left to chance. No
codec made these codes; they only train.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sound.npq_format import write_npq

NOTES = 16
FRAMES_PER_NOTE = 8
FRAME_RATE = 44_100 / 512  # 86.13 frames per second


def make_tune(patterns: np.ndarray, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Codes [frames, K]: a random walk over the notes of `patterns` [NOTES, FRAMES_PER_NOTE, K]."""
    moves = rng.integers(-1, 2, size=frames // FRAMES_PER_NOTE + 1)
    notes = (rng.integers(NOTES) + np.cumsum(moves)) % NOTES
    return patterns[notes].reshape(-1, patterns.shape[-1])[:frames]


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--frames", type=int, default=2000, help="of each file")
    parser.add_argument("--codebooks", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=64, help="entries of each codebook")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()

    rng = np.random.default_rng(flags.seed)
    patterns = rng.integers(flags.vocab, size=(NOTES, FRAMES_PER_NOTE, flags.codebooks))
    flags.folder.mkdir(parents=True, exist_ok=True)
    for i in range(flags.files):
        write_npq(
            flags.folder / f"tune{i:03d}.npq",
            make_tune(patterns, flags.frames, rng),
            vocab_sizes=[flags.vocab] * flags.codebooks,
            frame_rate=FRAME_RATE,
        )
    print(f"{flags.files} files of {flags.frames} frames in {flags.folder}")


if __name__ == "__main__":
    main()
