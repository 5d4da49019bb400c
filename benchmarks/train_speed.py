"""Frames per second of a training step: ours, a plain GPT, Hugging Face's Musicgen, the limit.

    python benchmarks/train_speed.py                          # about two minutes on two cores
    python benchmarks/train_speed.py --variants depth-muon --no-peers --profile

Ours is the trainer's own step (`train_rvq.train_step`: guard, clipping, optimizer, EMA) with its
default flags but for what a variant names. The plain GPT (`plain_gpt.py`) and Musicgen (AdamW,
fused) take the same micro-batches in the same dtype. All ways run in turn. The limit is the matrix
products of a parallel model of this shape alone, forward and the two of backward, in that dtype.
The share of it that a way reaches counts 6 FLOPs per weight of a product and causal attention's
two products (`CodesTransformer.flops_per_frame`), for every way alike.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import measuring
import torch
from measuring import PEERS, in_turn, print_table, ratios, seconds_of, spread
from plain_gpt import PlainGPT
from torch import Tensor

import train_rvq
from training import state as run_state

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    measuring.add_shape(parser)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="fp32: without autocast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", default="depth-muon,parallel-muon,parallel-adamw")
    parser.add_argument("--compile", action="store_true", help="ours, with torch.compile")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--profile", action="store_true", help="of the first variant's step")
    parser.add_argument("--json", help="file for all rates")
    return parser.parse_args()


def make_ours(variant: str, flags: argparse.Namespace, folder: Path) -> run_state.TrainingRun:
    """A run of the trainer with that pattern and optimizer, else its defaults."""
    pattern, optim = variant.split("-")
    recipe = ["--pattern", pattern, "--optim", optim, "--lr", 1e-4]
    batch = ["--batch", flags.batch, "--accum", 1, "--device", flags.device]
    switches = [
        "--compile" if flags.compile else "--no-compile",
        "--amp" if flags.dtype == "bf16" else "--no-amp",
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        return measuring.trainer_run(folder / variant, flags, [*recipe, *batch, *switches])


def peer_step(
    model: torch.nn.Module, objective: Callable[[Tensor], Tensor], flags: argparse.Namespace
) -> Callable[[Tensor], None]:
    """A plain step on codes [B, T, K]."""
    trained = [p for n, p in model.named_parameters() if "encoder_attn" not in n]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.02, fused=True)
    mixed = flags.dtype == "bf16"

    def step(codes: Tensor) -> None:
        with torch.autocast(flags.device, torch.bfloat16, enabled=mixed):
            loss = objective(codes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_peers(flags: argparse.Namespace) -> dict[str, tuple[torch.nn.Module, Callable]]:
    """Model and step of each."""
    shape = (flags.codebooks, flags.vocab, flags.d_model, flags.layers, flags.heads, flags.ctx)
    plain = PlainGPT(*shape).to(flags.device)
    peers = {"plain GPT": (plain, peer_step(plain, lambda c: plain.losses(c, 0.05).mean(), flags))}
    musicgen = measuring.musicgen(flags)
    if musicgen is not None:
        hub = musicgen.to(flags.device).train()

        def objective(codes: Tensor) -> Tensor:
            bos = torch.full_like(codes[:, :1], flags.vocab)
            past = torch.cat((bos, codes[:, :-1]), dim=1).mT.flatten(0, 1)
            return hub(past, labels=codes, use_cache=False).loss

        peers["Hugging Face Musicgen"] = (hub, peer_step(hub, objective, flags))
    return peers


def products(flags: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """All matrix products of a step with parallel heads, one after the other, and their FLOPs."""
    d, n = flags.d_model, flags.batch * flags.ctx
    shapes = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)] * flags.layers
    shapes.append((flags.codebooks * flags.vocab, d))
    make = {"device": flags.device, "dtype": DTYPES[flags.dtype]}
    weights = [torch.randn(s, **make) for s in shapes]
    inputs = {i: torch.randn(n, i, **make) for i in {i for _, i in shapes}}
    slopes = {o: torch.randn(n, o, **make) for o in {o for o, _ in shapes}}

    def work() -> None:
        for weight in weights:
            out, into = weight.shape
            inputs[into] @ weight.T, slopes[out] @ weight, slopes[out].T @ inputs[into]

    return work, 6 * n * sum(o * i for o, i in shapes)


def make_ways(
    flags: argparse.Namespace, folder: Path
) -> tuple[dict[str, Callable[[], float]], dict[str, int]]:
    """Frames/s of one step of each way, and its FLOPs per frame; the limit's rate is FLOP/s."""
    frames, ways, flops = flags.batch * flags.ctx, {}, {}

    def rate(step: Callable[[], object]) -> Callable[[], float]:
        return lambda: frames / seconds_of(step, device=flags.device)

    for variant in flags.variants.split(","):
        run = make_ours(variant, flags, folder)
        feed: Iterator[Tensor] = measuring.micro_batches(run)
        name = "ours, " + variant.replace("-", ", ")
        ways[name] = rate(lambda run=run, feed=feed: train_rvq.train_step(run, feed))
        flops[name] = run.state.model.flops_per_frame(flags.ctx)
    if flags.peers:
        shape = (flags.batch, flags.ctx, flags.codebooks)
        codes = torch.randint(flags.vocab, shape, device=flags.device)
        for name, (model, step) in make_peers(flags).items():
            ways[name] = rate(lambda step=step: step(codes))
            flops[name] = measuring.flops_per_frame(model, flags)
    work, count = products(flags)
    ways["limit"] = lambda: count / seconds_of(work, device=flags.device)
    return ways, flops


def report(flags: argparse.Namespace, rates: measuring.Rates, flops: dict[str, int]) -> None:
    """The table."""
    limit, rows = rates["limit"], []
    for name, per_frame in flops.items():
        speed = rates[name]
        shares = [100 * s * per_frame / peak for s, peak in zip(speed, limit, strict=True)]
        over = [
            spread(ratios(speed, rates[peer]), ".2f") if peer in rates else "-"
            for peer in ("plain GPT", "Hugging Face Musicgen")
        ]
        rows.append([name, spread(speed), f"{per_frame / 1e6:,.0f}", *over, spread(shares, ".0f")])
    if flags.peers and "Hugging Face Musicgen" not in flops:
        rows.append([f"Hugging Face Musicgen {PEERS}", *["-"] * 5])
    at_limit = [peak / flops["plain GPT"] for peak in limit] if "plain GPT" in flops else []
    shown = spread(at_limit) if at_limit else "-"
    gflops = spread([peak / 1e9 for peak in limit])
    rows.append([f"limit: the products alone, {gflops} GFLOP/s", shown, "-", "-", "-", "100"])
    print_table(
        ["", "frames/s", "MFLOP a frame", "over plain", "over Musicgen", "% of the limit"], rows
    )


def profile(step: Callable[[], object]) -> None:
    """Where one step's time goes."""
    with torch.profiler.profile() as profiled:
        step()
    print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def main() -> int:
    """Measure and print."""
    flags = parse_flags()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        ways, flops = make_ways(flags, Path(folder))
        shape = f"{flags.d_model}/{flags.layers}/{flags.heads}, ctx {flags.ctx}"
        size = f"batch {flags.batch}, {flags.codebooks} x {flags.vocab}"
        print(f"{shape}, {size}, {flags.dtype}, n = {flags.rounds} rounds in turn")
        print(measuring.machine(flags.device))
        rates = in_turn(ways, flags.rounds)
        report(flags, rates, flops)
        measuring.write_json(flags.json, flags=vars(flags), rates=rates, flops_per_frame=flops)
        if flags.profile:
            profile(ways[next(iter(flops))])
    return 0


if __name__ == "__main__":
    sys.exit(main())
