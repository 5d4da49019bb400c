"""Opening a checkpoint file that may be broken or hostile: the zip, its pickle, its storages.

    content = open_safely("rvq_ckpts/rvq_9cb_latest.pt")   # its dictionary; tensors lie on disk
    forget_pages(content["model"]["head.weight"])          # once it was read

The opcodes of the pickle are read before anything runs, and a file that names what no checkpoint
needs is never loaded. Raises Unreadable with the reason. Called in a child process with limits.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import pickletools
import re
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
    Foreign,
    by_container,
    by_folder,
    by_keys,
    prefix_of,
    unwrapping,
)
from doctor.reading.summary import Unreadable, as_dict, as_list
from run_folder.checkpoint import FORMAT, CheckpointError, map_tensors, read_tensors, verify_file

_maps_files = True  # False once a file had to be read: of what was, no page may be dropped

SAFE_GLOBALS = re.compile(
    r"torch\._utils\._rebuild_(tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch\.\w+Storage|torch\.storage\.\w+Storage|torch\.(Size|device)"
    r"|torch\.(b?float\d*|double|half|u?int\d*|long|short|bool|float8_\w+)"
    r"|collections\.(OrderedDict|defaultdict)"
    r"|argparse\.Namespace"  # cfg of older scripts: only attributes are set
    r"|numpy\.dtype|numpy\._?core\.multiarray\.scalar|_codecs\.encode"  # best_val of such
)
SCALAR = np.float64(0).__reduce__()[0]
NUMBERS = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"]}
ALLOWED: list[Any] = [
    *(argparse.Namespace, np.dtype, *NUMBERS),
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
]
# All that torch.save's pickler writes and torch's safe reader reads. With no other a name can be
# put together, or taken off the stack, where reading the opcodes in turn would not see it.
OPCODES = re.compile(
    r"PROTO|STOP|GLOBAL|REDUCE|NEWOBJ|BUILD|BINPERSID|MARK|(LONG_)?BIN(PUT|GET)|APPENDS?|SETITEMS?"
    r"|NONE|NEWTRUE|NEWFALSE|BININT[12]?|LONG1|BINFLOAT|BINUNICODE|EMPTY_(TUPLE|LIST|DICT)"
    r"|TUPLE[123]?"
)


def open_safely(path: str) -> dict[str, Any]:
    """What a checkpoint file holds, tensors mapped from disk, after its container and pickle pass.

    `prefix` is what a wrapper, such as of torch.compile, had put before all names; it is taken off.

    Raises:
        Unreadable: its pickle is unsafe or refused, its storages lie, or it is no checkpoint.
        CheckpointError: missing or damaged.
    """
    if os.path.isdir(path) or os.path.isfile(path):
        _refuse_foreign(by_folder(path) if os.path.isdir(path) else by_container(path))
    if os.path.isfile(path) and not zipfile.is_zipfile(path):
        raise Unreadable("corrupt", _not_a_zip(path))
    verify_file(Path(path))
    refuse_unsafe_pickle(path)
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals(ALLOWED):
            # torch opens no name that is not UTF-8.
            content = _content_of(Path(f"/proc/self/fd/{file.fileno()}"))
    except CheckpointError as error:
        raise Unreadable("corrupt", str(error).partition(": ")[2]) from error
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
    """Whether it is of this trainer, or of the script before it, as far as keys and names tell."""
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


def _refuse_foreign(found: Foreign | None, content: Any = None) -> None:
    if found is None:
        return
    facts = ""
    if tensors := list(_tensors(content)):
        facts = f"; {len(tensors)} tensors of {sum(t.numel() for t in tensors):,} numbers in all"
    for part in (content, *as_dict(content).values()):
        if isinstance(part, dict) and any(isinstance(t, Tensor) for t in part.values()):
            facts += unwrapping(n for n in part if isinstance(n, str))
    raise Unreadable("foreign", found.name + facts, found.way)


def _strip_prefix(content: dict[str, Any]) -> None:
    """Take off what a wrapper put before the names of weights and of the optimizer's parameters."""
    content["prefix"] = prefix = prefix_of(n for n in content["model"] if isinstance(n, str))
    if not prefix:
        return
    for part in ("model", "ema"):
        if isinstance(content.get(part), dict):
            content[part] = {str(n).removeprefix(prefix): t for n, t in content[part].items()}
    for group in as_list(as_dict(content.get("optimizer")).get("param_groups")):
        if names := as_list(as_dict(group).get("param_names")):
            group["param_names"] = [str(n).removeprefix(prefix) for n in names]


def _content_of(path: Path) -> Any:
    global _maps_files
    try:
        return map_tensors(path)
    except OSError:
        _maps_files = False
        return read_tensors(path)


def _not_a_zip(path: str) -> str:
    with open(path, "rb") as file:
        head = file.read(64)
    if not head.strip(b"\0"):
        return "nothing but zero bytes" if head else "empty"
    if head.startswith(b"PK"):
        return "cut off: a zip archive without its end"
    return (
        "neither a zip archive, as torch.save writes it, nor a file of another kind that is known"
    )


def refuse_unsafe_pickle(path: str) -> None:
    """Read a checkpoint's pickle without running it; refuse foreign names and foreign opcodes.

    A pickle can call any function that it names; these names are its GLOBAL opcodes.
    """
    with zipfile.ZipFile(path) as container:
        pickles = [e for e in container.infolist() if e.filename.endswith(".pkl")]
        if len(pickles) != 1:
            raise Unreadable("unsafe", f"expected one pickle inside, found {len(pickles)}")
        if pickles[0].file_size > 256 << 20:
            raise Unreadable("unsafe", "its pickle is larger than 256 MB")
        data = container.read(pickles[0])
    named = {n for n in pickle_globals(data) if not SAFE_GLOBALS.fullmatch(n)}
    if named:
        listed = ", ".join(sorted(named)[:5])
        if all(map(LIBRARIES.fullmatch, named)):
            strings = {a for _, a, _ in pickletools.genops(data) if isinstance(a, str)}
            name, way = by_keys(path, strings)
            trust = (
                "weights_only=False), which runs code that it names: only if you trust its source"
            )
            raise Unreadable(
                "foreign", f"{name}; its pickle names {listed}, so it was not loaded",
                way.replace("weights_only=True)", trust, 1),
            )  # fmt: skip
        raise Unreadable("unsafe", f"its pickle would call {listed}; it was not loaded")
    used = {op.name for op, _, _ in pickletools.genops(data)}
    if foreign := {name for name in used if not OPCODES.fullmatch(name)}:
        listed = ", ".join(sorted(foreign)[:5])
        raise Unreadable("unsafe", f"torch.save writes no {listed} in a pickle; it was not loaded")


def pickle_globals(data: bytes) -> Iterator[str]:
    """Dotted names that a pickle would import, from its opcodes."""
    strings: list[str] = []
    memo: dict[int, str] = {}
    last = ""
    for op, argument, _ in pickletools.genops(data):
        if op.name == "STACK_GLOBAL":
            # Where the two names did not come as plain strings nothing is known: that is unsafe.
            yield ".".join(strings[-2:]) if len(strings) >= 2 else "a name that is computed"
        elif op.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif op.name in ("EXT1", "EXT2", "EXT4"):
            yield f"extension {argument}"
        elif isinstance(argument, str) and op.name != "PERSID":
            strings.append(argument)
            last = argument
        elif op.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument or 0)] = last
        elif op.name == "MEMOIZE":
            memo[len(memo)] = last
        elif op.name in ("GET", "BINGET", "LONG_BINGET"):
            strings.append(memo.get(int(argument or 0), "?"))


def _check_storages(path: str, content: Any) -> None:
    """The sizes that the pickle tells must be those of the zip's entries: mapping checks none."""
    told = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(content)}
    with zipfile.ZipFile(path) as container:
        stored = Counter(e.file_size for e in container.infolist() if "/data/" in e.filename)
    surplus = Counter(n for n in told.values() if n) - stored
    if surplus:
        raise Unreadable("corrupt", f"a tensor of {min(surplus)} bytes has no entry of that size")
    size = os.path.getsize(path)
    for tensor in _tensors(content):
        if tensor.numel() * tensor.element_size() > size:  # expanded: torch checks the storage only
            raise Unreadable("corrupt", "a tensor claims more elements than the file has bytes for")


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in nested containers, each of which is looked into once, however often it is met."""
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
    """Let the kernel drop a mapped tensor's pages, or a whole file would count as memory in use."""
    if not _maps_files:
        return
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = storage.data_ptr() + storage.nbytes() - start
    if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED
        )
