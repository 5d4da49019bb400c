"""What the run's page costs training: the time of writing it at a validation, and its size.

    OMP_NUM_THREADS=1 python benchmarks/report_cost.py --rounds 9

The metrics are those of a run of 250 epochs of 1,740 steps, with a row for each 50 steps and four
samples of 15 s; the page is written as the trainer writes it. The first page of a process loads
matplotlib and turns four .wav into MP3 and spectrograms; later ones find all but one in memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages.run_page import write_report
from run_folder.files import RunFiles
from run_folder.metrics import MetricsLog

EPOCHS, STEPS, SAMPLES = 250, 1740, 4


def main() -> None:
    """Make a run's metrics and samples, write its page often, print the times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        files, samples = RunFiles(name, "rvq_9cb"), Path(name) / "samples"
        make_run(files, samples)
        first = seconds_of_a_page(files, samples)
        same = [seconds_of_a_page(files, samples) for _ in range(flags.rounds)]
        fresh = []
        for i in range(flags.rounds):
            make_sample(samples / f"{SAMPLES - 1}.wav", seed=i)
            fresh.append(seconds_of_a_page(files, samples))
        rows = files.metrics.read_bytes().count(b"\n")
        print(f"{rows} rows of metrics, page of {files.report.stat().st_size / 1e6:.2f} MB")
        print(f"first page of a process     {first * 1e3:8.0f} ms")
        for what, times in (("with no new sample", same), ("with one new sample", fresh)):
            low, high = min(times) * 1e3, max(times) * 1e3
            middle = statistics.median(times) * 1e3
            print(f"{what:<27} {middle:8.0f} ms ({low:.0f} to {high:.0f}), n = {len(times)}")


def make_run(files: RunFiles, samples: Path) -> None:
    """Metrics of every step logged and of every epoch, as the trainer writes them."""
    rng, log = np.random.default_rng(0), MetricsLog(files.metrics)
    log.write("start", step=0, epoch=1, planned_steps=EPOCHS * STEPS, flags={"lr": 2e-4})
    for step in range(50, EPOCHS * STEPS + 1, 50):
        epoch, loss = step // STEPS + 1, 4.2 + 2.7 * np.exp(-step / 60_000) + rng.normal(0, 0.05)
        rates = {"lr": 2e-4, "grad_norm": float(rng.lognormal(-1, 0.3)), "frames_per_s": 41_000.0}
        log.write(
            "step", step=step, epoch=epoch, loss=float(loss), skipped=0, seconds=step, **rates
        )
        if step % STEPS < 50:
            codebooks = [float(loss) + k / 10 for k in range(9)]
            log.write("epoch", step=step, epoch=epoch, train=float(loss), val=float(loss),
                      val_per_codebook=codebooks, seconds=step, frames_per_s=41_000.0)  # fmt: skip
    samples.mkdir()
    for i in range(SAMPLES):
        make_sample(samples / f"{i}.wav", seed=i)
        log.write("sample", step=step, epoch=epoch, file=f"{i}.npq", distance=0.3)
    log.close()


def make_sample(path: Path, seed: int) -> None:
    """Fifteen seconds of noise in bursts: harder on an encoder than music."""
    rng = np.random.default_rng(seed)
    wave = rng.normal(0, 0.1, 15 * 44_100) * (np.arange(15 * 44_100) % 20_000 < 9_000)
    soundfile.write(path, wave, 44_100, subtype="PCM_16")


def seconds_of_a_page(files: RunFiles, samples: Path) -> float:
    """Of one call."""
    started = time.perf_counter()
    write_report(files, samples)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
