"""What guard, ladder and metrics cost of a training step, as a ratio within one run.

    python benchmarks/guard_overhead.py --steps 400

Two answers from the same steps of a real run. Timed: the share of each step that its bookkeeping
takes, clocked piece by piece. Interleaved: blocks of ten steps with all of it and with none of it,
in turn; the ratio of each pair of neighbours. The second also sees what a clock around the
pieces would miss, but not less than the machine's noise. Writing a step checkpoint comes apart.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_rvq  # noqa: E402
from run_folder.metrics import Console  # noqa: E402
from training import saving as run_saving  # noqa: E402
from training import setup as run_setup  # noqa: E402
from training import state as run_state  # noqa: E402
from training.stability import keep_interval  # noqa: E402

BLOCK = 10  # steps


def make_run(flags: argparse.Namespace, folder: Path) -> run_state.Run:
    """A run over invented codes that never ends by itself."""
    make = [sys.executable, str(ROOT / "examples" / "make_codes.py"), str(folder / "codes")]
    shape = ["--codebooks", "9", "--vocab", str(flags.vocab), "--frames", str(20 * flags.ctx)]
    subprocess.run([*make, *shape], check=True, stdout=subprocess.DEVNULL)
    width = ["--d_model", flags.d_model, "--layers", flags.layers, "--heads", 2]
    batch = ["--ctx", flags.ctx, "--batch", flags.batch, "--accum", 1]
    place = ["--data", folder / "codes", "--save_dir", folder / "run", "--num_workers", 0]
    argv = [*width, *batch, *place, "--device", "cpu", "--epochs", 10**6, "--lr", 1e-4]
    parsed, explicit = train_rvq.parse_flags([str(a) for a in argv])
    (folder / "run").mkdir()
    return run_setup.set_up(parsed, explicit, Console(quiet=True))


class Bookkeeping:
    """Clocks what a step does for safety and history, or takes it out."""

    def __init__(self, run: run_state.Run) -> None:
        self.run, self.seconds, self.is_on = run, 0.0, True
        guard, ladder = run.state.guard, run.state.ladder
        nothing = lambda *_, **__: None  # noqa: E731
        for owner, name in (
            (guard, "judge"), (guard, "accept"), (ladder, "attempt"), (ladder, "keep_due"),
            (run.metrics, "write"), (run.console, "line"),
        ):  # fmt: skip
            setattr(owner, name, self._clocked(getattr(owner, name), nothing))

    def _clocked(self, do: Callable[..., Any], nothing: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if not self.is_on:
                return nothing()
            started = time.perf_counter()
            result = do(*args, **options)
            self.seconds += time.perf_counter() - started
            return result

        return call


def one_step(run: run_state.Run, batches: Iterator[torch.Tensor], book: Bookkeeping) -> None:
    """What `take_steps` does for a step; a metrics row every --log-lr-steps."""
    p, ladder = run.state.progress, run.state.ladder
    ladder.keep_due(p.step, p.schedule_steps)
    stats = train_rvq.train_step(run, batches)
    if book.is_on and p.step % run.flags.log_lr_steps == 0:
        row = run.metrics.write("step", step=p.step, loss=stats.loss, lr=stats.lr, ce=stats.ce)
        run.console.line(f"step {row['step']} loss {stats.loss:.4f}")


def batches_of(run: run_state.Run) -> Iterator[torch.Tensor]:
    """Micro-batches for ever."""
    while True:
        yield from run.loader


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--d_model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ctx", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=256)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = make_run(flags, Path(folder))
        book, batches = Bookkeeping(run), batches_of(run)
        for _ in range(150):  # the guard's past must be full
            one_step(run, batches, book)
        shares, blocks = clock(run, batches, book, flags.steps)
        saves = []
        for _ in range(5):
            began = time.perf_counter()
            run_saving.save(run, ring=True)
            saves.append(time.perf_counter() - began)  # what the steps wait for
            run_saving.finish_save(run)
    report(shares, blocks, saves, run)


def clock(
    run: run_state.Run, batches: Iterator[torch.Tensor], book: Bookkeeping, steps: int
) -> tuple[list[float], dict[bool, list[float]]]:
    """Shares of the steps with bookkeeping; seconds a step of each block with and without."""
    shares: list[float] = []
    blocks: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * steps // BLOCK):
        book.is_on = number % 2 == 0
        began = time.perf_counter()
        for _ in range(BLOCK):
            book.seconds, started = 0.0, time.perf_counter()
            one_step(run, batches, book)
            if book.is_on:
                shares.append(book.seconds / (time.perf_counter() - started))
        blocks[book.is_on].append((time.perf_counter() - began) / BLOCK)
    return shares, blocks


def report(
    shares: list[float], blocks: dict[bool, list[float]], saves: list[float], run: run_state.Run
) -> None:
    """Print the three answers."""
    shares.sort()
    step = statistics.median(blocks[True])
    ratios = sorted(a / b for a, b in zip(blocks[True], blocks[False], strict=True))
    n, m = len(shares), len(ratios)
    print(f"step {1e3 * step:.2f} ms, {run.state.model.num_parameters() / 1e6:.2f} M parameters")
    print(
        f"timed        {100 * statistics.median(shares):.2f} % of a step (n = {n} steps, "
        f"middle 90 %: {100 * shares[n // 20]:.2f} to {100 * shares[-n // 20]:.2f} %)"
    )
    print(
        f"interleaved  ratio {statistics.median(ratios):.4f} (n = {m} pairs of {BLOCK} steps, "
        f"middle half: {ratios[m // 4]:.4f} to {ratios[-m // 4]:.4f})"
    )
    save, every = statistics.median(saves), keep_interval(10**6)
    print(
        f"step checkpoint  {1e3 * save:.0f} ms, every {every} steps of a long run: "
        f"{100 * save / (every * step):.2f} % (every 100 of a short one: "
        f"{100 * save / (100 * step):.2f} %)"
    )


if __name__ == "__main__":
    main()
