"""Carry on a melody that the model never heard: two sounds, a picture, and how good it is.

    python examples/demo.py demo/run/rvq_9cb_best.pt --out-dir demo

The demo corpus is in just intonation on multiples of the frame rate, 44100 / 512 = 86.13 Hz, and
its notes begin on a grid of 16 frames (examples/README.md). So bin n of a 512-point spectrum of a
frame is the pitch n * 86.13 Hz, and melody, scale and grid can be read off the decoded sound.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import soundfile
from numpy.typing import NDArray

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
ENOUGH_STEPS = 400  # with fewer the melody falls apart
HOP = 512  # audio samples per frame
MELODY_BINS = np.arange(6, 18)  # 517 to 1464 Hz: the scale and the notes between its steps


def main() -> None:
    """Sample, measure, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out-dir", type=Path, default=Path("demo"))
    parser.add_argument("--melody", type=Path, default=HERE / "demo" / "val" / "melody_48.npq")
    parser.add_argument("--prompt-frames", type=int, default=512, help="6 s: one phrase")
    parser.add_argument("--frames", type=int, default=1024, help="of the continuation: 12 s")
    parser.add_argument("--top-p", type=float, default=0.9)
    flags = parser.parse_args()

    both = flags.out_dir / "both.wav"
    door = [sys.executable, str(HERE.parent / "sample_rvq.py"), str(flags.checkpoint)]
    options = {
        "--prompt": flags.melody,
        "--prompt-frames": flags.prompt_frames,
        "--frames": flags.frames,
        "--top-p": flags.top_p,
        "--codec": "demo",
        "--out": both,
    }
    words = [str(word) for pair in options.items() for word in pair]
    subprocess.run([*door, *words, "--with-prompt"], check=True, stdout=subprocess.DEVNULL)
    wave, rate = soundfile.read(both, dtype="float32")
    both.unlink()
    border = flags.prompt_frames * HOP
    soundfile.write(flags.out_dir / "prompt.wav", wave[:border], rate)
    soundfile.write(flags.out_dir / "continuation.wav", wave[border:], rate)

    corpus = json.loads((HERE / "demo" / "corpus.json").read_text())
    print(f"prompt        {describe(wave[:border], corpus)}")
    print(f"continuation  {describe(wave[border:], corpus)}")
    draw(wave, rate, flags.prompt_frames, flags.checkpoint, flags.out_dir / "demo.png")
    for name in ("prompt.wav", "continuation.wav", "demo.png"):
        print(f"wrote {flags.out_dir / name}")
    report = next(flags.checkpoint.parent.glob("*_report.html"))
    print(f"the run as a page: {report}")
    last = json.loads(metrics_of(flags.checkpoint).read_text().splitlines()[-1])
    if told := verdict(last["step"]):
        print(told)


def verdict(steps: int) -> str:
    """Nothing, or why the music of so few steps is not to be judged."""
    if steps >= ENOUGH_STEPS:
        return ""
    return (
        f"Do not judge it by this: the two minutes were enough for {steps} steps, a machine with "
        "nothing else to do takes some 800; end what else runs, and try again"
    )


def read_pitches(wave: NDArray[np.float32]) -> NDArray[np.int64]:
    """The strongest of all melody bins of each frame [T], in or out of the scale."""
    spectrum = np.abs(np.fft.rfft(wave.reshape(-1, HOP), axis=1))
    return MELODY_BINS[spectrum[:, MELODY_BINS].argmax(1)]


def describe(wave: NDArray[np.float32], corpus: dict[str, Any]) -> str:
    """How well scale and grid are kept, and the strongest note of each step."""
    pitches, step = read_pitches(wave), corpus["step_frames"]
    in_scale = np.isin(pitches, corpus["scale_multiples"]).mean()
    changes = np.flatnonzero(np.diff(pitches)) + 1
    # A note that ends a frame late moves all that follow, so lengths tell more than places.
    lengths = np.diff(changes)
    off = np.minimum(lengths % step, -lengths % step)
    on_grid, near = (np.mean(x) if len(x) else np.nan for x in (changes % step == 0, off <= 2))
    steps = pitches[: len(pitches) // step * step].reshape(-1, step)
    notes = [int(np.bincount(frames).argmax()) for frames in steps]
    lines = (
        f"{in_scale:.0%} of frames in the scale",
        f"{on_grid:.0%} of {len(changes)} note changes on the grid ({1 / step:.0%} by chance)",
        f"{near:.0%} of note lengths within 2 frames of whole steps ({5 / step:.0%} by chance)",
        f"notes by step: {' '.join(map(str, notes))}",
    )
    return "\n              ".join(lines)


def metrics_of(checkpoint: Path) -> Path:
    """The metrics of a checkpoint's run; its last row is of the last step."""
    return next(checkpoint.parent.glob("*_metrics.jsonl"))


def draw(
    wave: NDArray[np.float32], rate: int, prompt_frames: int, checkpoint: Path, path: Path
) -> None:
    """Spectrogram of prompt and continuation above the losses of the run."""
    rows = [json.loads(line) for line in metrics_of(checkpoint).read_text().splitlines()]
    steps = [(r["step"], r["loss"]) for r in rows if r["event"] == "step"]
    vals = [(r["step"], r["val"]) for r in rows if r["event"] == "epoch"]

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(12, 7), layout="constrained")
    power = np.abs(np.fft.rfft(wave.reshape(-1, HOP), axis=1))[:, :32] + 1e-4
    seconds = len(wave) / rate
    top.imshow(
        20 * np.log10(power.T),
        origin="lower",
        aspect="auto",
        extent=(0, seconds, 0, 32 * rate / HOP),
        cmap="magma",
    )
    border = prompt_frames * HOP / rate
    top.axvline(border, color="white", linestyle="--")
    top.text(border / 2, 2500, "prompt, never seen in training", color="white", ha="center")
    middle = (border + seconds) / 2
    top.text(middle, 2500, "continuation by the model", color="white", ha="center")
    top.set(xlabel="seconds", ylabel="Hz", title="what the model heard and what it played")
    bottom.plot(*zip(*steps, strict=True), label="training loss")
    bottom.plot(*zip(*vals, strict=True), "o-", label="val (EMA weights)")
    bottom.axhline(np.log(1024), color="grey", linestyle=":", label="guessing: ln 1024")
    bottom.set(xlabel="optimizer step", ylabel="nats per code", ylim=(0, 7.2))
    bottom.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
