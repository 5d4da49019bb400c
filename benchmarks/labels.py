"""Whether a model plays the label it is asked for: the demo's notes in two scales, as two labels.

    python benchmarks/labels.py                     # some five minutes on one core

The demo corpus' notes, as they were encoded, are put together anew: pieces of the notes 6, 9, 12
(times 86 Hz) in one folder, of 8, 10, 16 in another, over the same chords. `train_rvq.py --labels
folders` learns them. Samples of each label, begun without a prompt, are decoded, and the share of
frames whose strongest melody note is of the label's scale is counted.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from build_assets import decode, demo_pieces, read_codes, write_codes  # noqa: E402
from demo import read_pitches  # noqa: E402

from run_folder.shared_weights import load_parts  # noqa: E402
from sample_rvq import NEEDED, load_model  # noqa: E402
from sound.codec import load_codec  # noqa: E402
from sound.sampling import Draw, generate  # noqa: E402

SCALES = {"lower": (6, 9, 12), "upper": (8, 10, 16)}
PIECES = {"train": 24, "val": 4}
PIECE_FRAMES = 2048
SEED = 1  # of the demo corpus


def make_corpus(folder: Path) -> None:
    """Pieces of each scale, in a folder of its name; val pieces of notes that no other has."""
    rng = random.Random(SEED)
    for split, count in PIECES.items():
        notes: dict[str, list[Any]] = {name: [] for name in SCALES}
        for piece, played in demo_pieces(split, SEED):
            codes, at = read_codes(ROOT / "examples" / "demo" / f"{piece}.npq"), 0
            for note in played:
                for name in (n for n, scale in SCALES.items() if note.pitch in scale):
                    notes[name].append(codes[at : at + note.frames])
                at += note.frames
        for name, pool in notes.items():
            for number in range(count):
                parts: list[Any] = []
                while sum(map(len, parts)) < PIECE_FRAMES:
                    parts.append(rng.choice(pool))
                write_codes(folder / name / f"{split}_{number}.npq", np.concatenate(parts))
    listed = (f"{name}/val_{i}.npq\n" for name in SCALES for i in range(PIECES["val"]))
    (folder / "val.txt").write_text("".join(listed))


def train(folder: Path, steps: int) -> Path:
    """The best checkpoint of a run over the corpus."""
    subprocess.run(
        [
            *(sys.executable, ROOT / "train_rvq.py", "--data", folder, "--labels", "folders"),
            *("--val-list", folder / "val.txt", "--save_dir", folder / "run", "--device", "cpu"),
            *("--d_model", "128", "--layers", "4", "--heads", "4", "--dropout", "0"),
            *("--ctx", "128", "--batch", "8", "--accum", "1", "--warmup-ratio", "0.05"),
            *("--label-smoothing", "0", "--max-steps", str(steps), "--eval-audio-every", "0"),
        ],
        check=True,
    )
    return folder / "run" / "rvq_9cb_best.pt"


def shares(codes: torch.Tensor) -> dict[str, float]:
    """Share of the frames of samples [N, T, K] in each scale, by their sound."""
    codec = load_codec("demo")
    pitches = np.concatenate([read_pitches(decode(codec, c.numpy())) for c in codes])
    return {name: float(np.isin(pitches, scale).mean()) for name, scale in SCALES.items()}


def main() -> None:
    """Make the corpus, train, draw, count."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--samples", type=int, default=20, help="of each label and guidance")
    parser.add_argument("--frames", type=int, default=256, help="of a sample: 256 are 3 s")
    parser.add_argument("--folder", type=Path, help="to keep corpus and run, or to use them again")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.folder or Path(temporary)
        best = folder / "run" / "rvq_9cb_best.pt"
        if not best.exists():
            make_corpus(folder)
            best = train(folder, flags.steps)
        metrics = (folder / "run" / "rvq_9cb_metrics.jsonl").read_text()
        rows = map(json.loads, metrics.splitlines())
        val = min((r for r in rows if r["event"] == "epoch"), key=lambda r: r["val"])
        print(f"val {val['val']:.4f} with labels, {val['val_unlabelled']:.4f} without")
        checkpoint = load_parts(best, needed=NEEDED)
        model = load_model(checkpoint, str(best), raw=False, device=torch.device("cpu"))
    options: dict[str, Any] = {"ctx": 128, "draw": Draw.of(9, top_p=0.9), "batch": flags.samples}
    for label, guidance in (*((name, g) for g in (1.0, 2.0) for name in SCALES), ("", 1.0)):
        labels = [label] if label else []
        codes = generate(model, flags.frames, labels=labels, guidance=guidance, **options)
        found = ", ".join(f"{share:.1%} {name}" for name, share in shares(codes).items())
        asked = f"--label {label} --guidance {guidance:g}" if label else "no label"
        print(f"{asked:30} {found} of {flags.samples} x {flags.frames} frames", flush=True)


if __name__ == "__main__":
    main()
