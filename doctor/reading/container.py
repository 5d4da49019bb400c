"""Open a checkpoint file that may be broken or hostile: the zip, its pickle, its storages.

    content = open_safely("rvq_ckpts/rvq_9cb_latest.pt")   # its dictionary; tensors stay on disk
    forget_pages(content["model"]["head.weight"])          # after it was read

torch's reader lists the names in the pickle before anything runs, and a file with names that no
checkpoint needs is never loaded. Raises Unreadable with the reason. Called in a limited child.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import pickletools
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from doctor.reading.foreign import (
    LIBRARIES,
    by_container,
    by_folder,
    by_keys,
    prefix_of,
    unwrapping,
)
from doctor.reading.summary import Problem, Unreadable, as_dict, as_list
from run_folder.checkpoint import FORMAT, CheckpointError, map_tensors, read_tensors, verify_file

_maps_files = True  # False once a file had to be read: its pages must not be dropped

SCALAR = np.float64(0).__reduce__()[0]
NUMBERS = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"]}
ALLOWED: list[Any] = [
    *(argparse.Namespace, np.dtype, *NUMBERS),
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
]


def open_safely(path: str) -> dict[str, Any]:
    """The content of a checkpoint file whose container and pickle are safe; tensors are mapped.

    A prefix that a wrapper, such as torch.compile, put before all names is removed; it is the value
    of the key `prefix`.

    Raises:
        Unreadable: its pickle is unsafe, its sizes are wrong, or it is no checkpoint.
        CheckpointError: missing or damaged.
    """
    if os.path.isdir(path):
        _refuse_foreign(by_folder(path))
    if os.path.isfile(path):
        _refuse_foreign(by_container(path))
        _refuse_what_is_no_zip(path)
    verify_file(Path(path))
    with open(path, "rb") as file, torch.serialization.safe_globals(ALLOWED):
        # torch opens no name that is not UTF-8.
        content = _content_of(path, Path(f"/proc/self/fd/{file.fileno()}"))
    _check_storages(path, content)
    if as_dict(content).get("format") == FORMAT and not isinstance(content.get("model"), dict):
        raise Unreadable("corrupt", "lacks `model`, the raw weights")
    if not _is_of_a_trainer_known(as_dict(content)):
        keys = [k for k in as_dict(content) if isinstance(k, str)]
        bare = bool(keys) and all(isinstance(t, Tensor) for t in content.values())
        _refuse_foreign(by_keys(path, keys, bare=bare), content)
    _strip_prefix(content)
    return content


def _is_of_a_trainer_known(content: dict[Any, Any]) -> bool:
    """Whether keys and names are those of this trainer or of the script before it."""
    model = content.get("model")
    if not isinstance(model, dict):
        return False
    names = [n for n in model if isinstance(n, str)]
    heads = (f"{prefix_of(names)}{word}." for word in ("embeds", "heads"))
    old = {"opt", "global_step", "vocab_sizes", "cfg"} & set(content)
    return (
        content.get("format") == FORMAT
        or len(old) >= 2
        or all(any(n.startswith(head) for n in names) for head in heads)
    )


def _refuse_foreign(found: Problem | None, content: Any = None) -> None:
    if found is None:
        return
    facts = ""
    if tensors := list(_tensors(content)):
        facts = f"; {len(tensors)} tensors of {sum(t.numel() for t in tensors):,} numbers in all"
    for part in (content, *as_dict(content).values()):
        if isinstance(part, dict) and any(isinstance(t, Tensor) for t in part.values()):
            facts += unwrapping(n for n in part if isinstance(n, str))
    raise Unreadable("foreign", found.text + facts, found.way)


def _strip_prefix(content: dict[str, Any]) -> None:
    """Remove a wrapper's prefix from the names of weights and of the optimizer's parameters."""
    content["prefix"] = prefix = prefix_of(n for n in content["model"] if isinstance(n, str))
    if not prefix:
        return
    for part in ("model", "ema"):
        if isinstance(content.get(part), dict):
            content[part] = {str(n).removeprefix(prefix): t for n, t in content[part].items()}
    for group in as_list(as_dict(content.get("optimizer")).get("param_groups")):
        if names := as_list(as_dict(group).get("param_names")):
            group["param_names"] = [str(n).removeprefix(prefix) for n in names]


def _content_of(path: str, opened: Path) -> Any:
    """The content by torch's reader, which only rebuilds tensors; `opened` is the same file."""
    global _maps_files
    _refuse_unsafe(path, opened)
    try:
        return map_tensors(opened)
    except OSError:
        _maps_files = False
        return read_tensors(opened)
    except CheckpointError as error:
        raise Unreadable("corrupt", str(error).partition(": ")[2]) from error


def _refuse_what_is_no_zip(path: str) -> None:
    if zipfile.is_zipfile(path):
        return
    with open(path, "rb") as file:
        head = file.read(64)
    what = (
        "neither a zip archive, as torch.save writes it, nor a file of another kind that is known"
    )
    if not head.strip(b"\0"):
        what = "nothing but zero bytes" if head else "empty"
    elif head.startswith(b"PK"):
        what = "cut off: a zip archive without its end"
    raise Unreadable("corrupt", what)


def _refuse_unsafe(path: str, opened: Path) -> None:
    """Refuse a pickle with names that torch's reader does not allow, before anything runs.

    A pickle that the reader cannot list is unsafe too: torch.save writes none.
    """
    with zipfile.ZipFile(path) as container:
        pickles = [e for e in container.infolist() if e.filename.endswith(".pkl")]
        if len(pickles) != 1:
            raise Unreadable("unsafe", f"expected one pickle inside, found {len(pickles)}")
        data = container.read(pickles[0])
    try:
        named = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(opened))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # an opcode that it does not know, or no pickle at all
        why = (str(error) or type(error).__name__).splitlines()[0]
        text = f"torch's safe reader refuses its pickle ({why}); it was not loaded"
        raise Unreadable("unsafe", text) from error
    listed = ", ".join(named[:5])
    if named and all(map(LIBRARIES.fullmatch, named)):
        strings = {a for _, a, _ in pickletools.genops(data) if isinstance(a, str)}
        _, name, way = by_keys(path, strings)
        trust = "weights_only=False), which runs code that it names: only if you trust its source"
        text = f"{name}; its pickle names {listed}, so it was not loaded"
        raise Unreadable("foreign", text, way.replace("weights_only=True)", trust, 1))
    if named:
        raise Unreadable("unsafe", f"its pickle would call {listed}; it was not loaded")


def _check_storages(path: str, content: Any) -> None:
    """Compare the sizes in the pickle with those of the zip's entries: mapping does not."""
    tensors = list(_tensors(content))
    if odd := [t for t in tensors if t.layout != torch.strided or t.is_quantized or t.is_meta]:
        kind = str(odd[0].layout if odd[0].layout != torch.strided else odd[0].dtype)
        raise Unreadable("unsafe", f"holds a tensor of a kind that no training saves ({kind})")
    told = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    with zipfile.ZipFile(path) as container:
        stored = Counter(e.file_size for e in container.infolist() if "/data/" in e.filename)
    surplus = Counter(n for n in told.values() if n) - stored
    if surplus:
        raise Unreadable("corrupt", f"a tensor of {min(surplus)} bytes has no entry of that size")
    size = os.path.getsize(path)
    for tensor in tensors:
        if tensor.numel() * tensor.element_size() > size:  # expanded: torch checks the storage only
            raise Unreadable("corrupt", "a tensor claims more elements than the file has bytes for")


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in nested containers; a container that occurs several times is searched once."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, (dict, list, tuple)) and id(part) not in seen:
            seen.add(id(part))
            waiting += part.values() if isinstance(part, dict) else part


def forget_pages(tensor: Tensor) -> None:
    """Let the kernel drop a mapped tensor's pages: else a whole file counts as memory in use."""
    if not _maps_files:
        return
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = storage.data_ptr() + storage.nbytes() - start
    if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED
        )
