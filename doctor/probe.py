"""Run the models of checkpoints on real windows.

    probes = probe(summaries, ["npq_out/*.npq"], windows=8)
    probes[path]["raw"]["ce"]               # [K] nats per code
    probe_own_data(summary)                 # the same, on the data named by its own flags

Each model is built and run in a child process with limits, like all reading of checkpoints.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from doctor.reading.child import in_child
from doctor.reading.container import open_safely
from doctor.reading.summary import (
    Problem,
    Summary,
    Unreadable,
    as_count,
    as_dict,
    as_list,
    as_number,
    as_text,
    as_whole,
)
from model import CodesTransformer, ModelConfig
from npq_dataset import Corpus, WindowDataset, find_npq_files, scan_corpus, split_corpus

MAX_FRAMES = 512  # of a window: enough for the figures, and quick on a CPU
Forward = Callable[[Tensor], Tensor]  # of a model: codes [T, K] -> logits [T, K, V], -inf: no code
# Limits of the automatic probe, which no flag asked for:
WINDOWS, SECONDS, MOST_PARAMETERS = 4, 60.0, 400_000_000


def probe(summaries: Sequence[Summary], data: Sequence[str], windows: int) -> dict[str, Any]:
    """By path, for raw and EMA weights: figures of `_figures`; or a Problem where it failed.

    Files of this trainer that do not fit their own architecture, or that know music by its labels
    alone, are left out.

    Raises:
        NpqError, BadFilesError: the data cannot be read.
    """
    known = [s for s in summaries if s.style == "old" or not (s.mismatches or needs_labels(s))]
    if not known:
        return {}
    ctx = min(as_count(s.flags.get("ctx")) or MAX_FRAMES for s in known)
    ctx = min(ctx, MAX_FRAMES)
    codebooks = next((len(s.vocab_sizes) for s in known if s.vocab_sizes), None)
    corpus = scan_corpus(find_npq_files(list(data)), ctx=ctx, codebooks=codebooks)
    codes = _windows(corpus, ctx, windows)
    return {s.path: in_child(_probe_in_child, s.path, lambda _: None, codes) for s in known}


def needs_labels(summary: Summary) -> bool:
    """Whether a model never saw music without labels, which the probe does not know."""
    return bool(summary.architecture.get("labels")) and summary.flag("label_dropout") == 0


def probe_own_data(summary: Summary) -> dict[str, Any] | Problem:
    """Figures of a file on windows of its training data; a Problem where that is not possible.

    Its flags name the data, relative to the present folder or to that of its run; the data must
    have the fingerprint saved in the file.
    """
    answer: dict[str, Any] | Problem = in_child(
        _probe_own_in_child, summary.path, lambda _: None, silence=SECONDS
    )
    return answer


def _windows(corpus: Corpus, ctx: int, windows: int, val_split: float = 0.0) -> np.ndarray:
    """Windows [N, T, K] of 16-bit codes, spread evenly over the files' share for training."""
    train, _ = split_corpus(corpus, ctx=ctx, val_split=val_split)
    dataset = WindowDataset(corpus, train, ctx=ctx, stride=ctx)
    chosen = np.linspace(0, len(dataset) - 1, min(windows, len(dataset))).astype(np.int64)
    return dataset[chosen].numpy()


# --- in the child --------------------------------------------------------------------------------


def _probe_own_in_child(path: str, tell: Callable[[int], None]) -> dict[str, Any]:
    content = open_safely(path)
    count = sum(t.numel() for t in content["model"].values() if isinstance(t, Tensor))
    if count > MOST_PARAMETERS:
        raise Unreadable("missing", f"its {count:,} parameters would take long")
    flags, told = as_dict(content.get("flags")), as_dict(content.get("data"))
    patterns = [os.path.expanduser(p) for p in map(as_text, as_list(flags.get("data"))) if p]
    if not patterns:
        raise Unreadable("missing", "its flags name no data")
    ctx, split = as_count(flags.get("ctx")) or MAX_FRAMES, as_number(flags.get("val_split"))
    corpus = scan_corpus(
        _own_files(path, patterns, as_text(flags.get("save_dir"))),
        ctx=ctx,
        codebooks=as_count(flags.get("codebooks")),
        skip_bad=flags.get("skip_bad_files") is True,
    )
    if corpus.fingerprint() != told.get("files"):
        raise Unreadable("missing", f"the data at {', '.join(patterns)} has changed since")
    codes = _windows(corpus, ctx, WINDOWS, split if 0 < split < 1 else 0.0)
    return _probe_content(content, codes[:, :MAX_FRAMES])


def _own_files(path: str, patterns: list[str], save_dir: str) -> list[str]:
    """Regular .npq files only: a hostile file may name others, which must not be opened."""
    folder = os.path.dirname(os.path.abspath(path))
    home = folder[: -len(save_dir)] if save_dir and folder.endswith(f"/{save_dir}") else folder
    for base in dict.fromkeys((os.getcwd(), home)):
        try:
            found = find_npq_files([os.path.join(base, p) for p in patterns])
        except (FileNotFoundError, ValueError):
            continue
        return [f for f in found if f.endswith(".npq") and os.path.isfile(f)]
    raise Unreadable("missing", f"the data that its flags name is not here: {', '.join(patterns)}")


def _probe_in_child(path: str, tell: Callable[[int], None], codes: np.ndarray) -> dict[str, Any]:
    return _probe_content(open_safely(path), codes)


def _probe_content(content: dict[str, Any], codes: np.ndarray) -> dict[str, Any]:
    windows = torch.from_numpy(codes).long()
    parts = {"raw": content["model"], "ema": as_dict(content.get("ema"))}
    if not isinstance(content.get("architecture"), dict):
        return _probe_old(content, {k: w for k, w in parts.items() if w}, windows)
    model = CodesTransformer(ModelConfig.from_dict(content["architecture"])).eval()
    figures = {}
    for name, weights in parts.items():
        model.load_state_dict(weights)
        largest: list[float] = []

        def note(_: Any, __: Any, output: Any, largest: list[float] = largest) -> None:
            largest.append(float(output[0].abs().max().nan_to_num(math.inf)))

        hooks = [block.register_forward_hook(note) for block in model.blocks]
        found = _figures(lambda window: model(window[None])[0], windows)
        for hook in hooks:
            hook.remove()
        by_window = np.reshape(largest, (len(windows), len(hooks)))
        figures[name] = {**found, "activations": by_window.max(0).tolist()}
    return figures


@torch.inference_mode()
def _figures(forward: Forward, codes: Tensor) -> dict[str, Any]:
    """Of codes [N, T, K]: "ce" and "entropy" [K], largest log partition and logit."""
    ce, entropy, partition, largest = [], [], 0.0, 0.0
    for window in codes:
        logits = forward(window).float()  # [T, K, V]
        log_z = logits.logsumexp(-1)
        target = logits.gather(-1, window[..., None])[..., 0]
        ce.append((log_z - target).mean(0))
        p = logits.softmax(-1)
        entropy.append((log_z - (p * logits.nan_to_num(neginf=0.0)).sum(-1)).mean(0))
        partition = max(partition, float(log_z.abs().max().nan_to_num(math.inf)))
        largest = max(largest, float(logits.amax().nan_to_num(math.inf)))
    return {
        "ce": torch.stack(ce).mean(0).tolist(),
        "entropy": torch.stack(entropy).mean(0).tolist(),
        "log_partition": partition,
        "largest_logit": largest,
    }


# --- the older script's model --------------------------------------------------------------------

ACTIVATIONS = (F.gelu, F.relu, F.silu)


def _probe_old(
    content: dict[str, Any], parts: dict[str, dict[str, Tensor]], windows: Tensor
) -> dict[str, Any]:
    """Figures by "raw" and "ema", with the activation and the heads that fit best.

    The file contains no activation and perhaps no number of heads. A model that has diverged fits
    with none.
    """
    cfg = content.get("cfg")
    heads = as_whole((cfg if isinstance(cfg, dict) else getattr(cfg, "__dict__", {})).get("heads"))
    if (positions := _positions(parts["raw"])) is not None:
        windows = windows[:, : len(positions)]

    def figures(part: str, windows: Tensor, heads: int, activation: Forward) -> dict[str, Any]:
        return _figures(lambda codes: old_logits(parts[part], codes, heads, activation), windows)

    readings = list(itertools.product(dict.fromkeys((heads or 1, 1)), ACTIVATIONS))
    losses = [float(np.mean(figures("raw", windows[:1], *r)["ce"])) for r in readings]
    chosen = readings[int(np.argmin(np.nan_to_num(losses, nan=np.inf)))]
    return {part: {**figures(part, windows, *chosen), "activations": []} for part in parts}


def old_logits(
    weights: dict[str, Tensor], codes: Tensor, heads: int, activation: Forward
) -> Tensor:
    """The older script's model on codes [T, K]: logits [T, K, V] of the codes at the same places.

    A pre-norm transformer with biases, LayerNorm and learned positions over summed embeddings.
    """
    w = {name: tensor.float() for name, tensor in weights.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"))

    embedded = [w[f"embeds.{k}.weight"][codes[:, k]] for k in range(codes.shape[1])]
    x = torch.stack(embedded).sum(0)[:-1]
    if "bos" in w:
        x = torch.cat((w["bos"].reshape(1, -1), x))
    if (positions := _positions(w)) is not None:
        x = x + positions[: len(x)]
    blocks = {n.split(".attn.")[0] for n in w if ".attn.qkv.weight" in n}
    for block in sorted(blocks, key=lambda name: int(name.rpartition(".")[2])):
        up, *_, down = sorted({n.rpartition(".")[0] for n in w if n.startswith(f"{block}.mlp.")})
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x))
        q, k, v = qkv.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)  # [H, T, C] each
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(f"{block}.attn.out", mixed.transpose(0, 1).flatten(1))
        x = x + linear(down, activation(linear(up, norm(f"{block}.norm2", x))))
    x = norm("ln_f", x)
    logits = [linear(f"heads.{k}", x).T for k in range(codes.shape[1])]
    padded = torch.nn.utils.rnn.pad_sequence(logits, padding_value=-math.inf)  # [V, K, T]
    return F.pad(padded, (len(codes) - len(x), 0)).permute(2, 1, 0)  # without BOS: first frame even


def _positions(weights: dict[str, Tensor]) -> Tensor | None:
    """Learned positions [T, D], if there are any."""
    found = weights.get("pos.weight", weights.get("pos"))
    return None if found is None else found.reshape(-1, found.shape[-1])
