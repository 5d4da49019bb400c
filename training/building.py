"""Builds what trains from flags and an architecture: model, optimizer, scaler, EMA, guard.

config, initial = pick_architecture(flags, checkpoint, source, vocab_sizes)
state = first_state(flags, config, initial, amp_dtype, device, world)
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from cli.command_line import UsageError
from cli.device import PRECISIONS, fast_precision
from model import CodesTransformer, ModelConfig
from run_folder.checkpoint import WEIGHTS_KEYS, CheckpointError
from run_folder.shared_weights import load_parts
from training.ema import Ema
from training.guard import Guard
from training.optimizer import build_optimizer
from training.parallel import ALONE, World
from training.planning import Plan
from training.saving import load_weights
from training.state import Progress, TrainState

EMBED_FALL = 1.0  # of new models; see ModelConfig


def pick_architecture(
    flags: argparse.Namespace,
    checkpoint: dict[str, Any] | None,
    source: str,
    vocab_sizes: tuple[int, ...],
    labels: tuple[str, ...] = (),
    code_features: int = 0,
    world: World = ALONE,
) -> tuple[ModelConfig, dict[str, Any] | None]:
    """Take the architecture from the checkpoint, else from --init-from's file, else from the flags.

    With --ignore-arch the flags always win. `source` is the checkpoint's path, `vocab_sizes` [K]
    and `labels` are those of the data; a new model has these labels, whatever it begins with.
    `code_features` is F of the vectors that a model of the flags begins from; 0: none.
    Returns the architecture and the content of --init-from's file, or None.

    Raises:
        CheckpointError: the saved architecture is unknown, or does not fit the data.
        UsageError: the flags describe no valid architecture.
    """
    initial = None
    if checkpoint is None and flags.init_from:
        if world.is_first:
            initial = load_parts(flags.init_from, needed=WEIGHTS_KEYS)
        initial = world.share(initial)
    saved = checkpoint or initial
    if saved is not None and not flags.ignore_arch:
        try:
            rates = {"dropout": flags.dropout, "depth_dropout": flags.depth_dropout}
            own = {} if checkpoint else {"labels": labels}
            config = ModelConfig.from_dict({**saved["architecture"], **rates, **own})
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{source or flags.init_from}: this version cannot build its architecture "
                f"({error}); use the version that wrote it"
            ) from error
    else:
        sizes = {"d_model": flags.d_model, "layers": flags.layers, "heads": flags.heads}
        try:
            config = ModelConfig(
                vocab_sizes,
                **sizes,
                dropout=flags.dropout,
                depth_dropout=flags.depth_dropout,
                pattern=flags.pattern,
                embed_fall=EMBED_FALL,
                value_residual=True,
                labels=labels,
                code_features=code_features,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
    remedy = "start anew with --no-resume" if checkpoint else "leave out --init-from"
    check_fit(config, vocab_sizes, labels, source or flags.init_from, remedy)
    return config, initial


def check_fit(
    config: ModelConfig,
    vocab_sizes: tuple[int, ...],
    labels: tuple[str, ...],
    source: str,
    remedy: str,
) -> None:
    """Raise CheckpointError unless the model has what the data has."""
    fits = len(config.vocab_sizes) == len(vocab_sizes) and all(
        have <= v for have, v in zip(vocab_sizes, config.vocab_sizes, strict=False)
    )
    if not fits:
        raise CheckpointError(
            f"{source}: the model has vocab sizes {list(config.vocab_sizes)}, the data has "
            f"{list(vocab_sizes)}; see --codebooks and --data, or {remedy}"
        )
    try:
        config.numbers_of(labels)
    except ValueError as error:
        raise CheckpointError(
            f"{source}: {error}; restore --labels, or start a new run with --init-from {source}"
        ) from error


def adapt_labels(initial: dict[str, Any], config: ModelConfig) -> list[str]:
    """Give --init-from's weights the labels of a new run; return lines to print.

    A label that the file lacks begins at zero, one that the run lacks is left out.
    """
    weights, known = initial["ema"], list(initial["architecture"].get("labels", ()))
    rows = weights.pop("label_embed.weight", None)
    if config.labels:
        table = weights["embed.weight"].new_zeros((len(config.labels), config.d_model))
        kept = [name for name in config.labels if name in known]
        if rows is not None and kept:
            table[config.numbers_of(kept)] = rows[[known.index(name) for name in kept]]
        weights["label_embed.weight"] = table
    new = [name for name in config.labels if name not in known]
    lost = [name for name in known if name not in config.labels]
    return [
        f"labels   {what} by --init-from's weights: {', '.join(names)}"
        for what, names in (("not known", new), ("left out, though known", lost))
        if names
    ]


def new_model(flags: argparse.Namespace, config: ModelConfig) -> CodesTransformer:
    """Build a model with fresh weights and the training options of the flags."""
    return CodesTransformer(
        config,
        grad_checkpoint=flags.grad_checkpoint,
        code_dropout=flags.code_dropout,
        label_dropout=flags.label_dropout,
        depth_share=flags.depth_share,
    )


def first_state(
    flags: argparse.Namespace,
    config: ModelConfig,
    initial: dict[str, Any] | None,
    vectors: torch.Tensor | None,
    amp_dtype: torch.dtype | None,
    device: torch.device,
    world: World,
) -> TrainState:
    """Build the state of a new run: fresh weights, or the EMA weights of --init-from's file.

    `vectors` [K, V, code_features] are those of a fresh model with such.
    """
    torch.manual_seed(flags.seed)
    model = new_model(flags, config).to(device)
    if vectors is not None:
        model.learn_vectors(vectors)
    if initial is not None:
        load_weights(model, initial["ema"], flags.init_from, world)
    return build_state(flags, model, amp_dtype, device)


def build_state(
    flags: argparse.Namespace,
    model: CodesTransformer,
    amp_dtype: torch.dtype | None,
    device: torch.device,
) -> TrainState:
    """Build optimizer, gradient scaler, EMA and guard around a model."""
    optimizer = build_optimizer(
        model,
        optim=flags.optim,
        lr=flags.lr,
        weight_decay=flags.weight_decay,
        row_decay=0.0 if flags.row_decay == "auto" else flags.row_decay,  # auto: --batch is sought
        decay_all=flags.decay_all,
        fused=flags.fused_optim,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    memory = max(32, round(1 / (1 - flags.outlier_ema_beta)))
    guard = Guard(model.config.vocab_sizes, factor=flags.outlier_skip_factor, memory=memory)
    ema = Ema(model, flags.ema)
    return TrainState(model, ema, optimizer, scaler, guard, Progress())


def codebook_weights(choice: str, alpha: float, num_codebooks: int) -> list[float]:
    """Return the loss weight of each codebook [K], scaled to a mean of 1.

    `choice` is a comma-separated list of K numbers, or `auto`: 1 + alpha * k / (K - 1).

    Raises:
        UsageError: the list has not K numbers, or numbers that cannot be weights.
    """
    k = num_codebooks
    if choice == "auto":
        weights = [1 + alpha * i / max(k - 1, 1) for i in range(k)]
    else:
        try:
            weights = [float(w) for w in choice.split(",")]
        except ValueError as error:
            raise UsageError(
                f"--cb-weights: expected auto or {k} numbers with commas between, found {choice!r}"
            ) from error
        if len(weights) != k or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise UsageError(
                f"--cb-weights: expected {k} numbers >= 0 and not all 0, one for each codebook, "
                f"found {choice!r}"
            )
    return [w * k / sum(weights) for w in weights]


def plan_of(flags: argparse.Namespace, config: ModelConfig, device: torch.device) -> Plan:
    """Return the plan of a run on a device, which need not be present."""
    return Plan(flags, config, device, pick_amp_dtype(flags, device), new_state)


def new_state(flags: argparse.Namespace, config: ModelConfig) -> TrainState:
    """Build a state with fresh weights on torch's default device, without mixed precision."""
    return build_state(flags, new_model(flags, config), None, torch.device("cpu"))


def settle_amp_dtype(
    flags: argparse.Namespace, device: torch.device, world: World, *, resumed: bool
) -> None:
    """Replace --amp-dtype auto by the device's choice, so that a resume keeps the precision.

    Checkpoints of older versions contain `auto` itself, which meant bf16 on every CPU.
    """
    if flags.amp and flags.amp_dtype == "auto":
        was_bf16 = resumed and device.type == "cpu"
        flags.amp_dtype = world.from_first("bf16" if was_bf16 else fast_precision(device))


def pick_amp_dtype(flags: argparse.Namespace, device: torch.device) -> torch.dtype | None:
    """Return the dtype of mixed precision, or None for --no-amp and where float32 is fastest."""
    if not flags.amp:
        return None
    return PRECISIONS[fast_precision(device) if flags.amp_dtype == "auto" else flags.amp_dtype]
