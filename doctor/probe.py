"""Run checkpoints' models on real windows: what the weights do, and not only what they are.

    probes = probe(summaries, ["npq_out/*.npq"], windows=8)
    probes[path]["raw"]["ce"]      # [K] nats per code

Each model is built and run in a child process, like all reading of checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from doctor.reading.child import in_child
from doctor.reading.container import open_safely
from doctor.reading.summary import Summary, as_count
from model import CodesTransformer, ModelConfig
from npq_dataset import WindowDataset, find_npq_files, scan_corpus, split_corpus

MAX_FRAMES = 512  # of a window: enough for the figures, and quick on a CPU


def probe(summaries: Sequence[Summary], data: Sequence[str], windows: int) -> dict[str, Any]:
    """By path, for raw and EMA weights: figures of `_forward`; or a Problem where it failed.

    Files of other programs, whose models are not known, and those that do not fit are left out.

    Raises:
        NpqError, BadFilesError: the data cannot be read.
    """
    known = [s for s in summaries if s.style == "own" and not s.misfits]
    if not known:
        return {}
    codes = probe_windows(data, known, windows)
    return {s.path: in_child(_probe_in_child, s.path, lambda _: None, codes) for s in known}


def probe_windows(data: Sequence[str], summaries: Sequence[Summary], windows: int) -> np.ndarray:
    """Windows [N, T, K] of 16-bit codes, spread evenly over the files."""
    ctx = min([MAX_FRAMES, *[as_count(s.flags.get("ctx")) or MAX_FRAMES for s in summaries]])
    codebooks = next((len(s.vocab_sizes) for s in summaries if s.vocab_sizes), None)
    corpus = scan_corpus(find_npq_files(list(data)), ctx=ctx, codebooks=codebooks)
    train, _ = split_corpus(corpus, ctx=ctx, val_split=0.0)
    dataset = WindowDataset(corpus, train, ctx=ctx, stride=ctx)
    chosen = np.linspace(0, len(dataset) - 1, min(windows, len(dataset))).astype(np.int64)
    return dataset[chosen].numpy()


def _probe_in_child(path: str, tell: Callable[[int], None], codes: np.ndarray) -> dict[str, Any]:
    content = open_safely(path)
    model = CodesTransformer(ModelConfig.from_dict(content["architecture"])).eval()
    figures: dict[str, Any] = {}
    for part, name in (("model", "raw"), ("ema", "ema")):
        model.load_state_dict(content[part])
        figures[name] = _forward(model, torch.from_numpy(codes).long())
        tell(len(figures))
    return figures


@torch.inference_mode()
def _forward(model: CodesTransformer, codes: torch.Tensor) -> dict[str, Any]:
    """Figures of codes [N, T, K]: "ce" and "entropy" [K], largest log partition and logit, and the
    largest activation that leaves each block ("activations" [L])."""
    activations = [0.0] * len(model.blocks)
    hooks = [
        block.register_forward_hook(_note_largest(activations, layer))
        for layer, block in enumerate(model.blocks)
    ]
    ce, entropy, partition, largest = [], [], 0.0, 0.0
    for window in codes:
        logits = model(window[None]).float()[0]  # [T, K, V]
        log_z = logits.logsumexp(-1)
        target = logits.gather(-1, window[..., None])[..., 0]
        ce.append((log_z - target).mean(0))
        p = logits.softmax(-1)
        entropy.append((log_z - (p * logits.nan_to_num(neginf=0.0)).sum(-1)).mean(0))
        partition = max(partition, float(log_z.abs().max().nan_to_num(math.inf)))
        largest = max(largest, float(logits.amax().nan_to_num(math.inf)))
    for hook in hooks:
        hook.remove()
    return {
        "ce": torch.stack(ce).mean(0).tolist(),
        "entropy": torch.stack(entropy).mean(0).tolist(),
        "log_partition": partition,
        "largest_logit": largest,
        "activations": activations,
    }


def _note_largest(activations: list[float], layer: int) -> Callable[..., None]:
    def hook(_: Any, __: Any, output: torch.Tensor) -> None:
        largest = float(output.abs().max().nan_to_num(math.inf))
        activations[layer] = max(activations[layer], largest)

    return hook
