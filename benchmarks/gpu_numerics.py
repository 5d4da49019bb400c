"""Whether a device computes what the CPU does: losses of 20 steps, in every precision and mode.

    python benchmarks/gpu_numerics.py                    # begins `make bench-gpu`; 1 if one is off
    python benchmarks/gpu_numerics.py --device cpu --modes compile

The trainer's own steps from the same weights over the same windows, without dropout. The codes
repeat, so that the loss falls within the 20 steps and wrong gradients show in it; wrong sums of
gradients show in the norms of the first steps. A row of `accum 3` compares three micro-batches with
the CPU's one batch.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

import measuring
import numpy as np
import torch
from measuring import print_table

import train_rvq

STEPS, BATCH, CTX, VOCAB, CODEBOOKS = 20, 6, 64, 64, 4
LEAST_FALL = 1.0  # nats; less, and wrong gradients would not show
EARLY = 3  # steps whose gradient norms are compared: rounding has not yet grown in them
# Nats between two losses of a step, and the share between two gradient norms. Measured on a CPU:
# 0.09 and 0.3 % between bf16 and float32, 0.07 and 0.3 % between accum 3 and one batch in float32,
# 0.13 and 31 % where the first of three micro-batches is lost.
TOLERANCE = {"float32": (0.15, 0.02), "bf16": (0.3, 0.05)}
Steps = tuple[list[float], list[float]]
MODES = {"compile": "default", "graphs": "reduce-overhead", "autotuned": "max-autotune"}


def steps(device: str, precision: str, *, accum: int = 1, mode: str | None = None) -> Steps:
    """Loss and gradient norm of STEPS steps; RuntimeError where `mode` was not used in the end."""
    t, k = np.arange(40 * CTX)[:, None], np.arange(CODEBOOKS)
    codes = (t // 2 + 5 * k) % VOCAB
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        shape = argparse.Namespace(d_model=128, layers=2, heads=2, ctx=CTX, vocab=VOCAB)
        argv = ["--device", device, "--batch", BATCH // accum, "--accum", accum, "--lr", 3e-3]
        argv += ["--dropout", 0, "--depth-share", 1, "--warmup-ratio", 0, "--no-jitter"]
        argv += ["--amp", "--amp-dtype", "bf16"] if precision == "bf16" else ["--no-amp"]
        argv += ["--compile", "--compile-mode", mode] if mode else ["--no-compile"]
        run = measuring.trainer_run(Path(folder), shape, argv, codes)
        if run.compiled != bool(mode):
            raise RuntimeError("the trainer did without torch.compile")
        feed = measuring.micro_batches(run)
        stats = [train_rvq.train_step(run, feed) for _ in range(STEPS)]
        return [s.loss for s in stats], [s.grad_norm for s in stats]


def compared(name: str, precision: str, reference: Steps, found: Steps) -> list[str]:
    """Cells of a row; the last is `ok`, or what is wrong."""
    losses, norms = (np.array(pair) for pair in zip(reference, found, strict=True))
    apart = float(np.abs(losses[1] - losses[0]).max())
    norms_apart = float(np.abs(norms[1] / norms[0] - 1)[:EARLY].max())
    most_apart, most_norms_apart = TOLERANCE[precision]
    first, last = losses[1][[0, -1]]
    is_ok = apart <= most_apart and norms_apart <= most_norms_apart and first - last >= LEAST_FALL
    cells = [f"{first:.4f}", f"{last:.4f}", f"{apart:.2g} of {most_apart:g}"]
    return [
        *(name, precision, *cells, f"{norms_apart:.1%} of {most_norms_apart:.0%}"),
        "ok" if is_ok else "OFF",  # NaN is off too
    ]


def main() -> int:
    """Compare, print the table; 1 if a row is off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--modes", default=",".join(MODES), help=f"of {', '.join(MODES)}")
    flags = parser.parse_args()
    cases = [("eager", precision, 1, None) for precision in TOLERANCE]
    for mode in filter(None, flags.modes.split(",")):
        cases += [(f"{mode}, accum 3", precision, 3, MODES[mode]) for precision in TOLERANCE]
    references = {precision: steps("cpu", precision) for precision in TOLERANCE}
    rows = []
    for name, precision, accum, mode in cases:
        try:
            found = steps(flags.device, precision, accum=accum, mode=mode)
            rows.append(compared(name, precision, references[precision], found))
        except Exception as error:  # one row must not cost the others
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            rows.append([name, precision, *["-"] * 4, f"OFF: {reason}"])
        torch._dynamo.reset()
    print(f"losses of {STEPS} steps on {measuring.machine(flags.device)} against the CPU")
    print_table(["", "precision", "first", "last", "losses apart", "norms apart", "verdict"], rows)
    wrong = [f"{row[0]} in {row[1]}" for row in rows if row[-1] != "ok"]
    if wrong:
        print(f"! {flags.device} is off the CPU: {'; '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
