"""Weights to share: the EMA as .safetensors, the rest in its metadata, and a model card beside it.

    export_weights(load_checkpoint("rvq_9cb_best.pt"), "tunes.safetensors", tell=print)
    parts = load_parts("tunes.safetensors", needed=WEIGHTS_KEYS)  # or the path of a checkpoint
    parts["ema"], parts["architecture"]

The format has no checksum, so the metadata contain one of the whole content. The metadata of a file
are checked before anything is built from them; no model is needed here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
import shlex
import stat
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from cli.disk import naming, replace_file
from run_folder.checkpoint import OF_A_FILE, CheckpointError, load_checkpoint
from run_folder.flags import command_words, names
from run_folder.metrics import number

SUFFIX = ".safetensors"
FORMAT = "rvq-weights"
FORMAT_VERSION = 1
# What a shared file is made of: the parts that a checkpoint must have to become one.
SHARED_KEYS = {"ema", "architecture", "data", "flags", "progress"}
SHARED_DATA = ("frame_rate", "side_codebooks", "size")
SHARED_PROGRESS = ("step", "epoch", "best_val", "best_epoch", "held_out_run")
CODEC_NAME = re.compile(r"\w+")  # and not the path of a weights file


def is_shared(path: str | os.PathLike[str]) -> bool:
    """Whether a path names weights to share, and not a checkpoint: by its ending."""
    return Path(path).suffix.lower() == SUFFIX


# --- writing -------------------------------------------------------------------------------------


def export_weights(
    checkpoint: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    tell: Callable[[str], object],
) -> Path:
    """Write the EMA weights of a checkpoint that has SHARED_KEYS, float32; returns their path.

    After a crash at any moment `path` holds the old content or the new, whole. The model card is
    `path` with the ending .md; one that was edited is left as it is. `tell` is given a line for
    each file. Weights are held in memory twice more.

    Raises:
        CheckpointError: weights that are not finite; nothing is written.
        OSError: the disk is full, read-only or failing.
    """
    path = Path(path)
    weights = {n: t.detach().float().cpu().contiguous() for n, t in checkpoint["ema"].items()}
    if bad := _not_finite(weights):
        raise CheckpointError(
            f"{path}: not written, {len(bad)} tensors are not finite, first {bad[0]}; export an "
            "older checkpoint, ckpt_doctor.py tells which is healthy"
        )
    metadata = _metadata_of(checkpoint)
    metadata["sha256"] = _digest(metadata, weights)
    replace_file(path, to_bytes(weights, metadata), durable=True)
    tell(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    _write_card(path.with_suffix(".md"), model_card(checkpoint, path.name), tell)
    return path


def _not_finite(weights: dict[str, Tensor]) -> list[str]:
    return sorted(name for name, tensor in weights.items() if not tensor.isfinite().all())


def _metadata_of(checkpoint: dict[str, Any]) -> dict[str, str]:
    """Texts only, as the format demands; no paths, which belong to this machine alone."""
    progress = _picked(checkpoint["progress"], SHARED_PROGRESS) | _validated(checkpoint)
    parts = {
        "architecture": checkpoint["architecture"],
        "data": _picked(checkpoint["data"], SHARED_DATA),
        "flags": shared_flags(checkpoint["flags"]),
        "progress": {n: v for n, v in progress.items() if n != "val_per_codebook"},
        "libraries": checkpoint.get("libraries", {}),
    }
    texts = {name: json.dumps(_without_infinity(part)) for name, part in parts.items()}
    return {"format": FORMAT, "version": str(FORMAT_VERSION), **texts}


def shared_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that are set and shape the run, none of machine or user; a codec by its name."""
    shared = _picked(flags, names("run", "architecture"))
    kept = {name: value for name, value in shared.items() if value is not None}
    if not CODEC_NAME.fullmatch(kept.get("eval_dac_repo", "")):
        kept.pop("eval_dac_repo", None)
    return kept


def _picked(part: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: part[key] for key in keys if key in part}


def _without_infinity(part: dict[str, Any]) -> dict[str, Any]:
    """JSON has none, and no NaN."""
    odd = {n: None for n, v in part.items() if isinstance(v, float) and not math.isfinite(v)}
    return part | odd


def _validated(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """`val` and `val_per_codebook` of these weights, if the history contains them."""
    for row in reversed(checkpoint.get("history", [])):
        if row["event"] == "epoch" and row["step"] == checkpoint["progress"]["step"]:
            return _picked(row, ("val", "val_per_codebook"))
    return {}


def _newest(checkpoint: dict[str, Any], field: str) -> dict[str, Any]:
    """The newest row of the history with a field, or an empty one."""
    return next((r for r in reversed(checkpoint.get("history", [])) if field in r), {})


def _digest(metadata: dict[str, str], weights: dict[str, Tensor]) -> str:
    """SHA-256 over the metadata but itself, and over names, shapes and bytes of the weights."""
    said = sorted((key, text) for key, text in metadata.items() if key != "sha256")
    digest = hashlib.sha256(json.dumps(said).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


# --- the model card ------------------------------------------------------------------------------

CARD = Path(__file__).with_name("model_card.md")  # with fields of str.format
STAMP = b"\n<!-- as written by the trainer; sha256 %s -->\n"


def model_card(checkpoint: dict[str, Any], file_name: str) -> str:
    """Markdown with the facts of a checkpoint about its model; TODO where only a person knows."""
    flags, labels = shared_flags(checkpoint["flags"]), checkpoint["architecture"].get("labels", [])
    facts = _facts(checkpoint, flags)
    return CARD.read_text(encoding="utf-8").format(
        title=Path(file_name).stem,
        file=shlex.quote(file_name),
        codec=flags.get("eval_dac_repo", "44khz"),
        label="".join(f" --label {shlex.quote(n)}" for n in labels[:1]),
        facts="\n".join(f"| {name} | {fact} |" for name, fact in facts.items()),
        command=_command({**({"labels": "labels.csv"} if labels else {}), **flags}),
    )


def _facts(checkpoint: dict[str, Any], flags: dict[str, Any]) -> dict[str, str]:
    architecture, data = checkpoint["architecture"], checkpoint["data"]
    progress, validated = checkpoint["progress"], _validated(checkpoint)
    vocab_sizes, side = architecture["vocab_sizes"], data["side_codebooks"]
    listed = {"vocab_sizes", "labels"}
    shape = {name: value for name, value in architecture.items() if name not in listed}
    hours = "{files} files; {train_hours:.2f} hours to train, {val_hours:.2f} hours to validate"
    facts = {
        "parameters": f"{sum(t.numel() for t in checkpoint['ema'].values()) / 1e6:.2f} M",
        "architecture": ", ".join(f"{name} {value}" for name, value in shape.items()),
        "codebooks": f"{len(vocab_sizes)}" + f", the last {side} of the side channel" * (side > 0),
        "vocab sizes": ", ".join(map(str, vocab_sizes)),
        "frame rate": f"{data['frame_rate']:.2f} frames per second",
        "codec": flags.get("eval_dac_repo", "TODO"),
        "data": hours.format(**data["size"]) if data.get("size") else "not recorded",
        "trained": f"{progress['step']} steps, {progress['epoch']} whole epochs",
        "val": _nats(validated.get("val")) + f"; best {_nats(progress['best_val'])}, of epoch "
        f"{progress['best_epoch']}",
    }
    if copied := _newest(checkpoint, "shared_seconds"):
        facts["shared with training music"] = (
            f"{copied['shared_seconds']:.2f} s in the sample of epoch {copied['epoch']}; held-out "
            f"music {number(copied.get('shared_seconds_music'), '.2f')} s at most"
        )
    if labels := architecture.get("labels"):
        facts["labels"] = ", ".join(labels).replace("|", r"\|")
    if per_codebook := validated.get("val_per_codebook"):
        facts["val per codebook"] = ", ".join(f"{value:.4f}" for value in per_codebook)
    return facts


def _nats(value: float | None) -> str:
    known = value is not None and math.isfinite(value)
    return f"{value:.4f} nats per code" if known else "not known"


def _command(flags: dict[str, Any]) -> str:
    """The command that trains with these flags, wrapped for a page."""
    given = map(shlex.join, command_words(flags))
    words = ["python train_rvq.py", '--data "npq_out/*.npq"', *given]
    text = " ".join(word.replace(" ", "\0") for word in words)  # a flag and its value stay together
    lines = textwrap.wrap(text, 74, break_on_hyphens=False)
    return " \\\n    ".join(lines).replace("\0", " ")


def _write_card(path: Path, text: str, tell: Callable[[str], object]) -> None:
    if path.exists() and not _is_unedited(path):
        tell(f"kept {path}, which is edited or not ours; remove it to have it written anew")
        return
    content = text.encode(errors="replace")  # a file's name need not be text
    stamp = STAMP % hashlib.sha256(content).hexdigest().encode()
    replace_file(path, content + stamp, durable=True)
    tell(f"wrote {path}; fill in what it marks as TODO")


def _is_unedited(path: Path) -> bool:
    content = path.read_bytes()
    text = content[: content.rfind(STAMP[:10])]
    return content == text + STAMP % hashlib.sha256(text).hexdigest().encode()


# --- reading -------------------------------------------------------------------------------------


def load_parts(path: str | os.PathLike[str], *, needed: set[str]) -> dict[str, Any]:
    """Verify and read a checkpoint, or weights to share: a dict with at least the `needed` parts.

    Of a .safetensors file these can be `ema` (float32, on the CPU), `architecture`, `data`, `flags`
    and `progress`. Whether the weights fit the architecture is left to the model's strict load, but
    the architecture is no larger than what the weights can fill. Never runs code from the file.

    Raises:
        CheckpointError: missing, damaged, of another program, of a newer version, or lacks a part.
    """
    path = Path(path)
    if not is_shared(path):
        return load_checkpoint(path, needed=needed)
    if missing := needed - SHARED_KEYS:
        raise CheckpointError(
            f"{path}: shared weights have no {', '.join(sorted(missing))}; name a checkpoint (.pt)"
        )
    metadata, weights = _read(path)
    if metadata.get("sha256") != _digest(metadata, weights):
        raise _damaged(path, "its checksum is wrong")
    if bad := _not_finite(weights):
        raise _damaged(path, f"{len(bad)} tensors are not finite, first {_shown(bad[0])}")
    parts = {name: _part(path, metadata, name) for name in sorted(FIELDS)}
    _check_size(path, parts["architecture"], weights)
    return {"ema": weights, **parts}


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged, {why}; copy, download or export it again")


def _shown(value: Any) -> str:
    """A value of a file, short, and without control characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    return short.repr(value)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata of our format, and float32 tensors.

    Read and not mapped: a map changes with the file, and ends the process where the file is cut.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: expected a file, found a folder or device; name a file")
        with naming(path):
            content = path.read_bytes()
        weights = from_bytes(content)  # which checks the header that is parsed here
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; check the path") from error
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno not in OF_A_FILE:
            raise  # no fault of the file
        raise _damaged(path, f"or no .safetensors file: {_shown(str(error))}") from error
    metadata = header.get("__metadata__", {})
    _check_format(path, metadata)
    if wrong := sorted(n for n, t in weights.items() if t.dtype != torch.float32):
        raise _damaged(path, f"{_shown(wrong[0])} is not float32")
    return metadata, weights


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not weights of this trainer: expected format {FORMAT!r} in its metadata, "
            f"found {_shown(metadata.get('format'))}; name a file that --export-safetensors wrote"
        )
    version = metadata.get("version", "")
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise _damaged(path, f"format version {_shown(version)} is none")
    if int(version) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version}, this program reads up to {FORMAT_VERSION}; use the "
            "newer program that wrote it"
        )


# --- what a file may contain ---------------------------------------------------------------------


Accepts = Callable[[Any], bool]


def _whole(low: int, high: int = 1 << 20) -> tuple[str, Accepts]:
    return f"{low} to {high}", lambda x: type(x) is int and low <= x <= high


def _real(low: float, high: float) -> tuple[str, Accepts]:
    return f"a number, {low:g} to {high:g}", lambda x: type(x) in (int, float) and low <= x <= high


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(map(_whole(2)[1], value))


def _are_labels(value: Any) -> bool:
    good = isinstance(value, list) and all(type(x) is str and x.isprintable() and x for x in value)
    return good and len(set(value)) == len(value)


SWITCH = "true or false", lambda x: type(x) is bool
# Fields that the program reads: the accepted values in words and as a test. All but NEEDED may be
# missing.
FIELDS: dict[str, dict[str, tuple[str, Accepts]]] = {
    "architecture": {
        "vocab_sizes": ("a list of numbers from 2 on", _are_sizes),
        "labels": ("a list of different names", _are_labels),
        **dict.fromkeys(("d_model", "layers", "heads", "mlp_ratio", "depth_layers"), _whole(1)),
        "dropout": _real(0, 1),
        "depth_dropout": _real(0, 1),
        "rope_base": _real(1, 1e12),
        "qk_norm": SWITCH,
        "value_residual": SWITCH,
        "embed_fall": _real(0, 10),
        "code_features": _whole(0),
        "pattern": ("a name", lambda x: type(x) is str),
    },
    "data": {"frame_rate": _real(1e-3, 1e6), "side_codebooks": _whole(0)},
    "flags": {
        "ctx": _whole(2),
        "amp": SWITCH,
        "amp_dtype": ("bf16, fp16, ...", lambda x: x in ("bf16", "fp16", "float32", "auto")),
        "eval_dac_repo": ("a name", lambda x: type(x) is str and bool(CODEC_NAME.fullmatch(x))),
    },
    "progress": {
        **dict.fromkeys(("step", "epoch"), _whole(0, 1 << 60)),
        "held_out_run": _whole(-1, 1 << 60),
    },
}
NEEDED = {
    *("vocab_sizes", "d_model", "layers", "heads"),
    *("frame_rate", "side_codebooks", "ctx", "step", "epoch"),
}


def _part(path: Path, metadata: dict[str, str], name: str) -> dict[str, Any]:
    """One part of the metadata, parsed; raises CheckpointError where a field is not as expected."""
    try:
        part = json.loads(metadata.get(name, ""))
    except (ValueError, RecursionError):
        part = None
    if not isinstance(part, dict):
        found = _shown(metadata.get(name))
        raise _damaged(path, f"metadata {name!r}: expected a JSON object, found {found}")
    for field, (expected, accepts) in FIELDS[name].items():
        if (field in part or field in NEEDED) and not accepts(part.get(field)):
            found = _shown(part.get(field))
            raise _damaged(path, f"metadata {name!r}: expected {field} {expected}, found {found}")
    return part


def _check_size(path: Path, architecture: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Refuse an architecture far larger than the weights, before memory is taken to build it."""
    sizes, width = architecture["vocab_sizes"], architecture["d_model"]
    depth = architecture.get("depth_layers", 1) if architecture.get("pattern") == "depth" else 0
    mlps = architecture["layers"] * architecture.get("mlp_ratio", 1) * width * width
    labels = len(architecture.get("labels", ())) * width
    vectors = len(sizes) * max(sizes) * architecture.get("code_features", 0)
    least = max(len(sizes) * max(sizes) * width, labels, mlps, depth * 32 * 32, vectors)
    if least > (found := sum(tensor.numel() for tensor in weights.values())):
        raise _damaged(path, f"its architecture takes {least} weights or more, it has {found}")
