"""Numerics, frames/s, MFU, memory and compile time of the user's runs on a GPU, in one go.

    make bench-gpu                                        # ends within 10 minutes
    python benchmarks/gpu.py --shapes run3 --modes eager,compile --json gpu.json
    python benchmarks/gpu.py --device cpu --shapes tiny --modes eager,compile

The default recipe (depth pattern, Muon, dropout, EMA, guard) at the shapes of Run #2, Run #3 and
896/20/14: eager, compiled, and compiled with CUDA graphs. First gpu_numerics.py compares losses
with the CPU's; where one is off, the exit code is 1. Each row is a process of its own, so that peak
memory is its own and one that runs out of memory or time costs only its row. Peak memory stands
beside what `--plan` predicts of it, which is without torch.compile. MFU counts
`CodesTransformer.flops_per_frame` against the device's dense bf16 peak; beside it the share of the
rate that a large bf16 product reaches here.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import torch
from measuring import print_table, seconds_of, spread

import train_rvq
from training import building
from training.memory_prediction import CONTEXT


class Shape(NamedTuple):
    """A run's model and micro-batch."""

    d_model: int
    layers: int
    heads: int
    ctx: int
    batch: int
    codebooks: int = 9
    vocab: int = 1024


SHAPES = {
    "run2": Shape(768, 16, 12, ctx=1280, batch=4),
    "run3": Shape(768, 16, 12, ctx=512, batch=6),
    "896": Shape(896, 20, 14, ctx=512, batch=6),
    "tiny": Shape(32, 1, 1, ctx=16, batch=2, codebooks=2, vocab=16),
}
MODES = {"eager": None, "compile": "default", "graphs": "reduce-overhead"}  # --compile-mode
# Dense bf16 TFLOP/s with float32 sums, from the makers' data sheets; the first name that fits.
PEAKS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312,
    "L40S": 362, "L4": 121, "A6000": 155, "A10": 125,
    "RTX 5090": 210, "RTX 4090": 165, "RTX 4080": 97, "RTX 3090": 71,
}  # fmt: skip


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--shapes", default="run3,run2,896", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--modes", default="eager,compile,graphs")
    parser.add_argument("--batch", type=int, help="micro-batch; without it the run's own")
    parser.add_argument("--steps", type=int, default=10, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.5, help="rows after these are left out")
    parser.add_argument("--no-numerics", action="store_true", help="speed and memory alone")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--device-tflops", type=float, help="dense bf16 peak; without it by name")
    parser.add_argument("--json", default="gpu.json", help="all rates, beside the table")
    parser.add_argument("--row", nargs=2, help="measure this shape and mode alone, print JSON")
    return parser.parse_args()


def measure(flags: argparse.Namespace, shape: Shape, mode: str) -> dict[str, Any]:
    """One row: rates of each round, seconds of set-up and compilation, peak memory."""
    if flags.batch:
        shape = shape._replace(batch=flags.batch)
    on_gpu = flags.device.startswith("cuda")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        argv = ["--batch", shape.batch, "--accum", 1, "--device", flags.device, "--no-compile"]
        argv += ["--compile-mode", MODES[mode]] if MODES[mode] else []
        run = measuring.trainer_run(Path(folder), argparse.Namespace(**shape._asdict()), argv)
        feed = measuring.micro_batches(run)
        started = time.perf_counter()
        if MODES[mode]:
            run.flags.compile = True
            train_rvq.prepare_losses(run)
            if not run.compiled:
                raise RuntimeError("torch.compile failed; the trainer goes on without it")
        for _ in range(3):  # warm up; CUDA graphs are recorded here
            train_rvq.train_step(run, feed)
        warm_up = time.perf_counter() - started
        frames = shape.batch * shape.ctx
        rates = [
            frames / seconds_of(lambda: train_rvq.train_step(run, feed), flags.steps, flags.device)
            for _ in range(flags.rounds)
        ]
    plan = building.plan_of(run.flags, run.state.model.config, run.device)
    return {
        "frames_per_s": rates,
        "warm_up_s": warm_up,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "plan_gb": (plan.predict().total - CONTEXT) / 1e9 if on_gpu else None,
        "flops_per_frame": run.state.model.flops_per_frame(shape.ctx),
        "parameters": run.state.model.num_parameters(),
        "batch": shape.batch,
    }


def one_row(flags: argparse.Namespace) -> int:
    """In a process of its own; the last line is the row."""
    shape, mode = flags.row
    try:
        row = measure(flags, SHAPES[shape], mode)
    except torch.OutOfMemoryError:
        row = {"error": "out of memory"}
    except Exception as error:  # one row must not cost the others
        reason = (str(error).strip() or "no message").splitlines()[0]
        row = {"error": f"{type(error).__name__}: {reason}"}
    print(json.dumps(row))
    return 0


def numerics_are_off(flags: argparse.Namespace) -> bool:
    """Whether losses on the device differ from the CPU's; the table is printed."""
    script = Path(__file__).with_name("gpu_numerics.py")
    modes = ",".join(mode for mode in flags.modes.split(",") if MODES.get(mode))
    command = [sys.executable, str(script), "--device", flags.device, "--modes", modes]
    return subprocess.run(command).returncode != 0


def row_of(shape: str, mode: str, seconds: float) -> dict[str, Any]:
    """The row that a process of its own measured in so many seconds, or its error."""
    own = [sys.executable, __file__, *sys.argv[1:], "--row", shape, mode]
    try:
        done = subprocess.run(own, capture_output=True, text=True, timeout=max(0.0, seconds))
        row = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        row = {"error": "no time left; give more --minutes"}
    except (IndexError, ValueError):
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        row = {"error": f"exit {done.returncode}: {last}"}
    return {"shape": shape, "mode": mode, **row}


def product_tflops(device: str) -> float:
    """What a large bf16 product reaches on this device."""
    size = 8192 if device.startswith("cuda") else 512
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    seconds_of(lambda: a @ b, 3, device)
    return max(2 * size**3 / seconds_of(lambda: a @ b, 10, device) for _ in range(5)) / 1e12


def peak_tflops(flags: argparse.Namespace) -> float | None:
    """Of --device-tflops, or of the data sheet."""
    if flags.device_tflops or not flags.device.startswith("cuda"):
        return flags.device_tflops
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def cells(row: dict[str, Any], peak: float | None, product: float) -> list[str]:
    """Of the table."""
    shape = "/".join(map(str, SHAPES.get(row["shape"], ())[:4]))
    name = [f"{row['shape']} {shape}", row["mode"]]
    if "error" in row:
        return [*name, row["error"], *["-"] * 6]
    tflops = [r * row["flops_per_frame"] / 1e12 for r in row["frames_per_s"]]
    shares = [spread([100 * t / p for t in tflops], ".3g") if p else "-" for p in (peak, product)]
    memory = ["-" if row[m] is None else f"{row[m]:.2f}" for m in ("peak_gb", "plan_gb")]
    rest = [spread(row["frames_per_s"]), *shares, *memory, f"{row['warm_up_s']:.0f}"]
    return [*name, f"{row['parameters'] / 1e6:.0f}, {row['batch']}", *rest]


def main() -> int:
    """Compare with the CPU, measure every row, print the tables; 1 if anything is off."""
    started, flags = time.perf_counter(), parse_flags()
    if flags.device.startswith("cuda") and not torch.cuda.is_available():
        print("! benchmarks/gpu.py needs a CUDA device, found none; --device cpu --shapes tiny "
              "tries it out", file=sys.stderr)  # fmt: skip
        return 2
    if flags.row:
        return one_row(flags)
    is_off = not flags.no_numerics and numerics_are_off(flags)
    peak, product = peak_tflops(flags), product_tflops(flags.device)
    print(measuring.machine(flags.device))
    print(f"bf16: data sheet {peak or 'unknown'} TFLOP/s, a large product {product:.3g}")
    print(f"n = {flags.rounds} rounds of {flags.steps} steps, micro-batches of random codes")
    if flags.device.startswith("cuda"):
        torch.cuda.empty_cache()
    rows = [
        row_of(shape, mode, 60 * flags.minutes - (time.perf_counter() - started))
        for shape in flags.shapes.split(",")
        for mode in flags.modes.split(",")
    ]
    print_table(
        ["", "mode", "M parameters, batch", "frames/s", "MFU, %", "% of the product", "peak GB",
         "--plan GB", "compile and 3 steps, s"],
        [cells(row, peak, product) for row in rows],
    )  # fmt: skip
    measuring.write_json(
        flags.json, device=measuring.machine(flags.device), peak=peak, product=product, rows=rows
    )
    return int(is_off or all("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
