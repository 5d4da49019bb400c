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

from doctor.reading.summary import Unreadable
from run_folder.checkpoint import CheckpointError, map_tensors, verify_file

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

    Raises:
        Unreadable: its pickle is unsafe or refused, its storages lie, or it is no checkpoint.
        CheckpointError: missing or damaged.
    """
    if os.path.isfile(path) and not zipfile.is_zipfile(path):
        raise Unreadable("corrupt", _not_a_zip(path))
    verify_file(Path(path))
    refuse_unsafe_pickle(path)
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals(ALLOWED):
            # torch opens no name that is not UTF-8.
            content = map_tensors(Path(f"/proc/self/fd/{file.fileno()}"))
    except CheckpointError as error:
        raise Unreadable("corrupt", str(error).partition(": ")[2]) from error
    _check_storages(path, content)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise Unreadable("foreign", "not a checkpoint: no dictionary with `model`")
    return content


def _not_a_zip(path: str) -> str:
    with open(path, "rb") as file:
        head = file.read(64)
    if not head.strip(b"\0"):
        return "nothing but zero bytes" if head else "empty"
    if head.startswith(b"PK"):
        return "cut off: a zip archive without its end"
    return "not a zip archive; a checkpoint of torch < 1.6, or no checkpoint"


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
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = storage.data_ptr() + storage.nbytes() - start
    if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED
        )
