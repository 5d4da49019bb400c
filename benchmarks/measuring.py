"""What the speed benchmarks share: rounds in turn, medians with their range, peers, a real run."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_rvq
from run_folder.metrics import Console
from sound.npq_format import write_npq
from training import setup as run_setup
from training import state as run_state
from training.loader import Batch

PEERS = "not installed: pip install -r requirements-bench.txt"

Rates = dict[str, list[float]]  # of each way, round by round


def seconds_of(work: Callable[[], object], times: int = 1, device: str = "cpu") -> float:
    """Wall time of one of `times` calls; on CUDA until the device is done."""
    started = time.perf_counter()
    for _ in range(times):
        work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def in_turn(ways: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> Rates:
    """What each way returns, in rounds A B C A B C; the first `warm_up` rounds do not count."""
    rates: Rates = {name: [] for name in ways}
    for number in range(-warm_up, rounds):
        for name, way in ways.items():
            rate = way()
            if number >= 0:
                rates[name].append(rate)
    return rates


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """Median and range."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def ratios(rates: Sequence[float], over: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(rates, over, strict=True)]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """As Markdown."""
    print("| " + " | ".join(header) + " |")
    print("|---" + "|---:" * (len(header) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def machine(device: str = "cpu") -> str:
    """Processor or GPU, threads, cores this process may use, load of the last minute."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads on {cores} cores, "
        f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )


def add_shape(parser: argparse.ArgumentParser, *, layers: int = 8) -> None:
    """Flags of the model's shape; the defaults are those of the figures."""
    parser.add_argument("--d_model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--codebooks", type=int, default=9)
    parser.add_argument("--vocab", type=int, default=1024)


def write_json(path: str | None, **facts: Any) -> None:
    """Every rate, beside the table."""
    if path:
        Path(path).write_text(json.dumps(facts, indent=1) + "\n")


def musicgen(flags: argparse.Namespace, dropout: float = 0.1) -> torch.nn.Module | None:
    """Hugging Face's decoder of the same shape, without text; None where it is not installed."""
    try:
        from transformers import MusicgenDecoderConfig, MusicgenForCausalLM
    except ImportError:
        return None
    config = MusicgenDecoderConfig(
        vocab_size=flags.vocab,
        max_position_embeddings=2 * flags.ctx,
        num_hidden_layers=flags.layers,
        ffn_dim=4 * flags.d_model,
        num_attention_heads=flags.heads,
        hidden_size=flags.d_model,
        num_codebooks=flags.codebooks,
        dropout=dropout,
        pad_token_id=flags.vocab,
        bos_token_id=flags.vocab,
        attn_implementation="sdpa",
    )
    return MusicgenForCausalLM(config)


def product_weights(model: torch.nn.Module) -> int:
    """Elements of the matrices that a frame is multiplied with; no cross-attention."""
    return sum(
        m.weight.numel()
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "encoder_attn" not in name
    )


def flops_per_frame(model: torch.nn.Module, flags: argparse.Namespace) -> int:
    """Of training, by the rule of `CodesTransformer.flops_per_frame`, for any GPT."""
    return 6 * (product_weights(model) + flags.layers * flags.ctx * flags.d_model)


def trainer_run(
    folder: Path,
    flags: argparse.Namespace,
    argv: Sequence[object],
    codes: np.ndarray[Any, Any] | None = None,
) -> run_state.TrainingRun:
    """A real run of the trainer over `codes` [T, K], or random ones, that never ends by itself."""
    if codes is None:
        rng = np.random.default_rng(0)
        codes = rng.integers(flags.vocab, size=(40 * flags.ctx, flags.codebooks))
    (folder / "codes").mkdir(parents=True)
    path = folder / "codes" / "a.npq"
    write_npq(path, codes, vocab_sizes=(flags.vocab,) * codes.shape[1], frame_rate=86.13)
    shape = ["--d_model", flags.d_model, "--layers", flags.layers, "--heads", flags.heads]
    place = ["--data", folder / "codes", "--save_dir", folder / "run", "--num_workers", 0]
    endless = ["--ctx", flags.ctx, "--epochs", 10**6, "--outlier-skip-factor", 0]
    words = [str(a) for a in (*shape, *place, *endless, *argv)]
    parsed, explicit = train_rvq.parse_flags(words)
    (folder / "run").mkdir()
    run = run_setup.set_up(parsed, explicit, Console(quiet=True))
    train_rvq.prepare_losses(run)
    return run


def micro_batches(run: run_state.TrainingRun) -> Iterator[Batch]:
    """For ever."""
    while True:
        yield from run.loader
