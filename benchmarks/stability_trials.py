"""What each stability measure does when something goes wrong, at tiny size.

    python benchmarks/stability_trials.py --seeds 20     # 15 to 20 minutes on two cores

Every measure is switched on or off beside what ships, and each variant trains through the same
planted instabilities, without guard and ladder, which would hide the difference. A run has diverged
when its last validation is not finite, or more than 0.5 nats above the calm runs of what ships.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from make_codes import FRAMES_PER_NOTE, NOTES, make_tune  # noqa: E402

from model import CodesTransformer, ModelConfig  # noqa: E402
from train_rvq import lr_at_step  # noqa: E402
from training.optimizer import parameter_groups  # noqa: E402

K, V, CTX, BATCH, VAL = 4, 64, 32, 8, 32
LR, EVENT, LENGTH = 3e-3, 0.4, 0.15  # the event's start and length as shares of the run
MARGIN = 0.5  # nats

VARIANTS: dict[str, dict[str, float | bool]] = {
    "what ships": {},
    "without QK-norm": {"qk_norm": False},
    "z-loss 1e-4": {"z_loss": 1e-4},
    "decay on everything": {"decay_all": True},
    "float32": {"bf16": False},
    "embedding gradient x 0.1": {"embed_grad": 0.1},
    "without gradient clipping": {"clip": 0.0},
}
FAULTS = ("calm", "lr x 30", "lr x 100", "qkv x 10", "random codes")


def windows_of(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation windows [N, CTX, K] of tunes over the same notes."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(V, size=(NOTES, FRAMES_PER_NOTE, K))
    tunes = [make_tune(patterns, 2000, rng) for _ in range(4)]
    cut = [tune[: len(tune) // CTX * CTX].reshape(-1, CTX, K) for tune in tunes]
    return torch.from_numpy(np.concatenate(cut[:3])), torch.from_numpy(cut[3][:VAL])


def train(variant: str, fault: str, seed: int, steps: int, width: int) -> dict[str, float]:
    """One run; last validation in nats per code, the largest gradient norm, seconds a step."""
    made = {"qk_norm": True, "z_loss": 0.0, "decay_all": False, "bf16": True, "clip": 1.0}
    made = {**made, "embed_grad": 1.0, **VARIANTS[variant]}
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    train_windows, val_windows = windows_of(seed)
    config = ModelConfig((V,) * K, width, 2, 2, qk_norm=bool(made["qk_norm"]))
    model = CodesTransformer(config, embed_grad=made["embed_grad"])
    groups = parameter_groups(model, 0.02, decay_all=bool(made["decay_all"]))
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
    first, last = round(EVENT * steps), round((EVENT + LENGTH) * steps)
    largest, started = 0.0, time.perf_counter()
    for step in range(steps):
        codes = train_windows[torch.randint(len(train_windows), (BATCH,))]
        if fault == "random codes" and first <= step < last:
            codes = torch.randint(V, codes.shape)
        if fault == "qkv x 10" and step == first:
            with torch.no_grad():
                for block in model.blocks:
                    block.attn.qkv.weight.mul_(10)
        lr = lr_at_step(step + 1, steps, lr=LR, eta_min=1e-5, warmup_ratio=0.01)
        if fault.startswith("lr x") and first <= step < last:
            lr *= float(fault.split()[-1])
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(made["bf16"])):
            model.losses(codes, 0.05, made["z_loss"]).objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), made["clip"] or math.inf)
        largest = max(largest, norm.item())
        optimizer.step()
        optimizer.zero_grad()
    seconds = (time.perf_counter() - started) / steps
    with torch.no_grad():
        val = model.eval().losses(val_windows).ce.mean().item()
    return {"val": val, "norm": largest, "seconds": seconds}


def trial(steps: int, width: int, key: tuple[str, str, int]) -> dict[str, float]:
    """`train` in a worker process."""
    return train(*key, steps=steps, width=width)


def main() -> None:
    """Run all, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=2)
    flags = parser.parse_args()
    keys = list(itertools.product(VARIANTS, FAULTS, range(flags.seeds)))
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(flags.jobs) as pool:
        results = pool.map(functools.partial(trial, flags.steps, flags.width), keys, chunksize=4)
    by = dict(zip(keys, results, strict=True))

    calm = statistics.median(by["what ships", "calm", s]["val"] for s in range(flags.seeds))
    print(f"{flags.seeds} seeds, {flags.steps} steps, width {flags.width}; calm val {calm:.3f}")
    print("cells: runs that diverged, median val (lowest to highest), median largest grad norm\n")
    print("| variant | " + " | ".join(FAULTS) + " |")
    print("|---" * (len(FAULTS) + 1) + "|")
    for variant in VARIANTS:
        cells = []
        for fault in FAULTS:
            runs = [by[variant, fault, s] for s in range(flags.seeds)]
            vals = [r["val"] for r in runs]
            diverged = sum(not v <= calm + MARGIN for v in vals)  # true for NaN as well
            finite = sorted(v for v in vals if math.isfinite(v)) or [math.nan]
            norm = statistics.median(r["norm"] for r in runs)
            cells.append(
                f"{diverged}/{flags.seeds}, {statistics.median(finite):.3f} "
                f"({finite[0]:.3f} to {finite[-1]:.3f}), {norm:.1f}"
            )
        print(f"| {variant} | " + " | ".join(cells) + " |")
    pace = statistics.median(r["seconds"] for r in results)
    print(
        f"\n{len(keys)} runs in {time.perf_counter() - started:.0f} s, {1e3 * pace:.1f} ms a step"
    )


if __name__ == "__main__":
    main()
