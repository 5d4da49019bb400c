"""Do the statistics of samples come nearer to held-out music's as the validation loss falls?

    OMP_NUM_THREADS=1 python benchmarks/sample_statistics.py             # the bundled melodies
    OMP_NUM_THREADS=1 python benchmarks/sample_statistics.py --music     # the bundled real tracks

Trains a small model, draws samples at several steps, and compares them with the held-out files as
the trainer does; raw weights, temperature 1. Beside them: training music, the same
with its frames shuffled, codes drawn from frequencies alone, uniform noise, and one frame held.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import CodesTransformer, ModelConfig  # noqa: E402
from npq_dataset import Spans, WindowDataset, find_npq_files, scan_corpus  # noqa: E402
from sound.npq_format import map_codes, read_header  # noqa: E402
from sound.sampling import Draw, generate  # noqa: E402
from train_rvq import lr_at_step  # noqa: E402
from training.code_statistics import Excerpts, Figure, compare, read_excerpts  # noqa: E402
from training.optimizer import parameter_groups  # noqa: E402

CTX, BATCH, LR = 128, 8, 3e-3

NAMES = ("distance", "histograms", "transitions", "codebooks", "repeats")


def whole_files(folder: Path, ctx: int) -> WindowDataset:
    corpus = scan_corpus(find_npq_files([folder]), ctx=2)
    frames = corpus.files["frames"]
    return WindowDataset(corpus, Spans(frames * 0, frames, "whole files"), ctx=ctx, stride=ctx)


def windows_of(folder: Path) -> torch.Tensor:
    windows = whole_files(folder, CTX)
    return windows[np.arange(len(windows))].long()


def checkpoints(corpus: Path, flags: argparse.Namespace) -> Iterator[tuple[int, float, np.ndarray]]:
    """Train on windows from anywhere; at powers of two: step, val and samples [N, T, K]."""
    torch.manual_seed(flags.seed)
    rng = np.random.default_rng(flags.seed)
    pieces = [map_codes(read_header(p)) for p in find_npq_files([corpus / "train"])]
    frames = np.array([len(piece) for piece in pieces])
    val_windows = windows_of(corpus / "val")[:: flags.thin]
    model = CodesTransformer(ModelConfig((1024,) * pieces[0].shape[1], flags.width, 2, 2))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.02), lr=LR, betas=(0.9, 0.95))
    for step in range(flags.steps + 1):
        if step == flags.steps or step in (0, 16, 32, 64, 128, 256, 512):
            yield step, *measured(model, val_windows, flags)
        lr = lr_at_step(step + 1, flags.steps, lr=LR, eta_min=1e-5, warmup_ratio=0.05)
        for group in optimizer.param_groups:
            group["lr"] = lr
        files = rng.choice(len(pieces), BATCH, p=frames / frames.sum())
        starts = [int(rng.integers(frames[f] - CTX + 1)) for f in files]
        windows = [pieces[f][s : s + CTX] for f, s in zip(files, starts, strict=True)]
        codes = torch.from_numpy(np.stack(windows).astype(np.int64))
        model.losses(codes).ce.mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def measured(
    model: CodesTransformer, val_windows: torch.Tensor, flags: argparse.Namespace
) -> tuple[float, np.ndarray]:
    """Validation loss in nats per code, and samples as the trainer draws them."""
    model.eval()
    with torch.no_grad():
        val = np.mean([model.losses(part).ce.mean().item() for part in val_windows.split(BATCH)])
    draw, seed = Draw.of(model.config.num_codebooks), flags.seed
    codes = generate(model, flags.frames, ctx=CTX, draw=draw, seed=seed, batch=flags.samples)
    model.train()
    return float(val), codes.numpy()


def controls(train_music: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """What the figures should tell apart, each [count, T, K]."""
    rng = np.random.default_rng(0)
    music = train_music[np.linspace(0, len(train_music) - 1, count).astype(int)]
    every = train_music.reshape(-1, music.shape[2])
    columns = [rng.choice(every[:, k], music.shape[:2]) for k in range(music.shape[2])]
    return {
        "training music": music,
        "its frames shuffled": np.stack([rng.permutation(piece) for piece in music]),
        "frequencies alone": np.stack(columns, axis=2),
        "uniform noise": rng.integers(1024, size=music.shape),
        "one frame held": np.repeat(music[:, :1], music.shape[1], axis=1),
    }


def row(label: str, val: str, samples: np.ndarray, held_out: Excerpts) -> list[dict[str, Figure]]:
    """Print a line of the table: median and range of the distance, medians of the rest."""
    found = [compare(sample, held_out) for sample in samples]
    values = {name: [figures[name].sample for figures in found] for name in NAMES}
    middle = [f"{statistics.median(values[name]):.3f}" for name in NAMES]
    middle[0] += f" ({min(values['distance']):.3f} to {max(values['distance']):.3f})"
    print(f"| {label} | {val} | " + " | ".join(middle) + " |", flush=True)
    return found


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def main() -> None:
    """Train, draw, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--music", action="store_true", help="real tracks, not the melodies")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--thin", type=int, default=4, help="validate on every so many-th window")
    parser.add_argument("--samples", type=int, default=4, help="of each checkpoint")
    parser.add_argument("--frames", type=int, default=1290)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    corpus = ROOT / "examples" / ("tokens" if flags.music else "demo")
    held_out = read_excerpts(whole_files(corpus / "val", CTX), flags.frames)

    print(f"{len(held_out.codes)} held-out excerpts, n = {flags.samples} samples a row, {flags}\n")
    print("| | val | " + " | ".join(NAMES) + " |")
    print("|---" * (len(NAMES) + 2) + "|")
    vals, medians = [], []
    for step, val, samples in checkpoints(corpus, flags):
        figures = row(f"step {step}", f"{val:.3f}", samples, held_out)
        vals.append(val)
        medians.append(statistics.median(f["distance"].sample for f in figures))
    music = figures[0]
    level = " | ".join(f"{music[name].music:.3f}, sd {music[name].spread:.3f}" for name in NAMES)
    print(f"| held-out music | | {level} |")
    train_music = read_excerpts(whole_files(corpus / "train", CTX), flags.frames).codes
    for label, samples in controls(train_music, flags.samples).items():
        row(label, "", samples, held_out)
    gaps = [abs(m - music["distance"].music) for m in medians]
    for name, values in (("distance", medians), ("its gap to held-out music", gaps)):
        rho = np.corrcoef(ranks(vals), ranks(values))[0, 1]
        print(f"rank correlation of val and {name}: {rho:.2f}, n = {len(vals)} checkpoints")


if __name__ == "__main__":
    main()
