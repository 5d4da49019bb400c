"""One checkpoint file as numbers: read without running it, a tensor at a time, in a child process.

    summary = summarize("rvq_ckpts/rvq_9cb_latest.pt")
    summary.problem          # why the file could not be read, or None
    summary.parameters[0]    # norms, counts and distances of one tensor, raw, EMA and moments

The child may allocate little more than its file takes, write nothing and run for minutes, so a
hostile or broken file costs one row of a report. What it hands back is JSON, never a pickle.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import json
import math
import mmap
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import numbers
import os
import pickletools
import re
import resource
import signal
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from checkpointing import FORMAT, REQUIRED_KEYS, CheckpointError, map_tensors, verify_file
from model import CodesTransformer, ModelConfig

SAMPLE = 1024  # elements of each tensor that are kept, to measure how far it moved between files
CHUNK = 1 << 18  # elements at a time: the temporaries of a chunk stay in the processor's caches
MOST_VALUES = 5_000_000  # of flags, progress or history
NOISE_STEPS = 19.0  # over which Adam's updates stay alike: (1 + b1) / (1 - b1) at b1 = 0.9
SILENCE = 120.0  # seconds without a sign of life after which a child is given up

ProblemKind = Literal["missing", "unsafe", "corrupt", "foreign"]


class Problem(NamedTuple):
    """Why a file could not be read."""

    kind: ProblemKind
    text: str


@dataclasses.dataclass
class Rows:
    """The rows of one codebook in an embedding or a head: norms [V], and how far they lean."""

    codebook: int
    median: float  # of the rows' norms
    low: float  # that one row in twenty stays below
    largest: float
    zero: int  # rows of zeros
    drift: float  # norm of the mean row, in units of the rows' root mean square norm


@dataclasses.dataclass
class Parameter:
    """One tensor of the model with its average and its moments. NaN stands for "not there"."""

    name: str
    shape: list[int]
    dtype: str
    bad: dict[str, int]  # non-finite values in "raw", "ema", "m", "v" and Muon's "momentum"
    optimizer: str = ""  # "AdamW" or "Muon"; "" where it is not known
    lr_factor: float = 1.0  # its group's multiple of the run's learning rate
    noise_steps: float = NOISE_STEPS  # over which its optimizer's updates stay alike
    step_bound: float = math.inf  # farthest that a step can move an element, over lr
    rms: float = math.nan
    largest: float = math.nan
    ema_rms: float = math.nan
    ema_distance: float = math.nan  # RMS of raw - EMA
    m_rms: float = math.nan  # of the first moment, which is Muon's momentum
    v_root: float = math.nan  # root of the mean second moment
    v_negative: int = 0
    m_over_bound: int = 0  # elements where abs(m) > C sqrt(v), which no gradients can produce
    v_zero: float = math.nan  # share of second moments that are zero: no gradient ever came
    v_tiny: float = math.nan  # share, of those that are not, whose root is below eps
    update_rms: float = math.nan  # of the optimizer's step before lr
    update_cos: float = math.nan  # between raw - EMA and the way that Adam, or momentum, goes
    adam_step: float = math.nan
    stable_rank: float = math.nan  # squared Frobenius norm over squared spectral norm
    sample: list[float] = dataclasses.field(default_factory=list)
    rows: list[Rows] = dataclasses.field(default_factory=list)
    logit_bounds: list[float] = dataclasses.field(default_factory=list)  # of each attention head

    @property
    def place(self) -> Place:
        """Where in the network it stands."""
        return place_of(self.name)


@dataclasses.dataclass
class Summary:
    """What the doctor knows of one file."""

    path: str
    kind: str  # latest, previous, best, archive, best archive, panic, quarantine, ring, other
    name_epoch: int | None  # that the file's name tells
    size: int = 0
    modified: float = 0.0
    problem: Problem | None = None
    style: str = "unknown"  # "own", "old": of the script before this project, or "unknown"
    step: int | None = None
    epoch: int | None = None
    saved_at: str = ""
    best_val: float = math.nan
    vocab_sizes: list[int] = dataclasses.field(default_factory=list)
    architecture: dict[str, Any] = dataclasses.field(default_factory=dict)
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    misfits: list[str] = dataclasses.field(default_factory=list)  # keys and shapes
    # "method", such as "Muon + AdamW", Adam's betas and eps, largest decay, and the run's "lr":
    # a group's over its factor; "groups" have their own.
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    scale: float | None = None  # of the GradScaler
    ema_equals_raw: bool = False
    parameters: list[Parameter] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        """File name."""
        return os.path.basename(self.path)

    def flag(self, name: str, default: float = math.nan) -> float:
        """A flag of the run as a number; the default where it is none."""
        value = _real(self.flags.get(name))
        return default if math.isnan(value) else value

    def counter(self, name: str, default: float = math.nan) -> float:
        """A number of the run's progress; the default where it is none."""
        value = _real(self.progress.get(name))
        return default if math.isnan(value) else value

    @functools.cached_property
    def moment(self) -> tuple[int, float, int]:
        """Step, training seconds and content: equal for copies of one state of a run."""
        content = tuple(
            (p.name, p.rms, p.ema_rms, p.m_rms, p.v_root, *p.sample[:4]) for p in self.parameters
        )
        return self.step or 0, self.counter("seconds", 0.0), hash(repr(content))


# --- names ---------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a tensor stands: sorts in the order in which a forward pass meets it."""

    stage: int
    layer: int
    part: int
    codebook: int
    role: str


BLOCK_PARTS = (
    *("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.out"),
    *("norm2", "mlp.up", "mlp.down"),
)
OLD_PARTS = {"mlp.0": "mlp.up", "mlp.3": "mlp.down"}
STAGES = (
    *(("embed", "embeds"), ("bos",), ("pos",), ("blocks",), ("norm", "ln_f")),
    *(("depth",), ("head", "heads")),
)
LAST = 1 << 30  # layer of what follows the blocks of a depth transformer


def place_of(name: str) -> Place:
    """Place of a parameter by its name, in this project's models and in the older script's.

    What belongs to a depth transformer has the roles of the main one after `depth.`; a name that is
    not known stands last, under a role of its own.
    """
    words = name.removeprefix("_orig_mod.").split(".")
    if words[0] == "depth" and len(words) > 1:
        inner = place_of(".".join(words[1:]))
        layer = LAST if inner.role in ("norm", "head") else inner.layer
        return Place(
            STAGES.index(("depth",)), layer, inner.part, inner.codebook, f"depth.{inner.role}"
        )
    stage = next((i for i, names in enumerate(STAGES) if words[0] in names), len(STAGES))
    kind = ".bias" if words[-1] == "bias" else ""
    if words[0] == "blocks" and len(words) > 2 and words[1].isdigit():
        part_name = ".".join(words[2:-1])
        part_name = OLD_PARTS.get(part_name, part_name)
        part = BLOCK_PARTS.index(part_name) if part_name in BLOCK_PARTS else len(BLOCK_PARTS)
        return Place(stage, int(words[1]), part, -1, part_name + kind)
    codebook = int(words[1]) if len(words) > 2 and words[1].isdigit() else -1
    role = STAGES[stage][0] if stage < len(STAGES) else name
    return Place(stage, -1, 0, codebook, role + kind)


FILE_KINDS = (
    (r".*_latest\.pt", "latest"),
    (r".*_previous\.pt", "previous"),
    (r".*_best_e\d+__.*\.pt", "best archive"),
    (r".*_epoch_e\d+__.*\.pt", "archive"),
    (r".*_best\.pt", "best"),
    (r".*_panic_s\d+\.pt", "panic"),
    (r".*_quarantine_s\d+\.pt", "quarantine"),
    (r".*_ring_s\d+\.pt", "ring"),
)


def kind_of(path: str | os.PathLike[str]) -> tuple[str, int | None]:
    """Kind of a checkpoint by its file name, and the epoch that the name tells."""
    name = os.path.basename(path)
    kind = next((k for pattern, k in FILE_KINDS if re.fullmatch(pattern, name)), "other")
    told = re.search(r"_e(\d+)__", name)
    return kind, int(told[1]) if told else None


# --- the parent: a child process per file --------------------------------------------------------


def summarize(
    path: str | os.PathLike[str], report: Callable[[int], None] = lambda _: None
) -> Summary:
    """Summary of a file, made by a child process; never raises for what a file holds.

    `report` is told the bytes that were read so far, as the child goes on.
    """
    answer = in_child(_read_in_child, str(path), report)
    if isinstance(answer, Problem):
        summary = _blank(str(path))
        summary.problem = answer
        return summary
    return _from_json(answer)


def in_child(
    work: Callable[..., Any],
    path: str,
    report: Callable[[int], None] = lambda _: None,
    *arguments: Any,
) -> Any | Problem:
    """Run `work(path, tell, *arguments)` in a child with limits; its JSON answer or a Problem.

    The child is forked: the parent never computes with tensors, so there are no threads to lose.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = pipe = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(pipe, work, path, *arguments), daemon=True)
    sys.stdout.flush()
    with contextlib.ExitStack() as at_end:
        at_end.callback(ours.close)
        with ctrl_c_deferred():  # a child that is not yet known could not be ended
            child.start()
            at_end.callback(_end, child)
        theirs.close()
        return _answer(child, ours, report)


def _answer(
    child: multiprocessing.process.BaseProcess,
    ours: multiprocessing.connection.Connection,
    report: Callable[[int], None],
) -> Any | Problem:
    try:
        while ours.poll(SILENCE):
            message = json.loads(ours.recv_bytes())
            if "bytes" in message:
                report(message["bytes"])
            elif "problem" in message:
                return Problem(*message["problem"])
            else:
                return message["answer"]
        return Problem("corrupt", f"not read within {SILENCE:.0f} seconds of silence; given up")
    except EOFError:
        child.join()
        code = child.exitcode or 0
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Problem("corrupt", f"the process that read it died ({reason})")


def _end(child: multiprocessing.process.BaseProcess) -> None:
    child.kill()
    child.join()


@contextlib.contextmanager
def ctrl_c_deferred() -> Iterator[None]:
    """Let a SIGINT take effect at the block's end.

    A signal mask would not do: another thread, such as a progress bar's, would take the signal and
    raise it here all the same.
    """
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting and callable(before):
        before(signal.SIGINT, None)


def _child(
    pipe: tuple[multiprocessing.connection.Connection, multiprocessing.connection.Connection],
    work: Callable[..., Any],
    path: str,
    *arguments: Any,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends the child
    ours, connection = pipe
    ours.close()  # so that sending to a parent that is gone fails, and does not wait for ever

    def tell(number_of_bytes: int) -> None:
        connection.send_bytes(json.dumps({"bytes": number_of_bytes}).encode())

    warnings.simplefilter("ignore")  # of torch and NumPy, on what a file holds
    try:
        torch.set_num_threads(1)  # memory is the limit; threads would wait for each other
        _limit_this_process([path, *(a for a in arguments if isinstance(a, str))])
        message = {"answer": work(path, tell, *arguments)}
    except Unreadable as error:
        message = {"problem": error.problem}
    except CheckpointError as error:
        message = {"problem": Problem("corrupt", str(error).removeprefix(f"{path}: "))}
    except MemoryError:
        message = {"problem": Problem("corrupt", "needs far more memory than its size; refused")}
    except Exception as error:  # a hostile file can make anything fail
        first = (str(error).splitlines() or [""])[0]
        message = {"problem": Problem("corrupt", f"{type(error).__name__}: {first}"[:300])}
    connection.send_bytes(json.dumps(message).encode())


def _limit_this_process(paths: list[str]) -> None:
    """No files written, no core, memory by the files' size, minutes of computing."""
    size = sum(map(os.path.getsize, paths))
    with open("/proc/self/status") as file:
        held = dict(line.split(":", 1) for line in file)
    mapped, data = (int(held[name].split()[0]) << 10 for name in ("VmSize", "VmData"))
    # Threads and torch's first use reserve address space without using it; a mapped file is data.
    _lower(resource.RLIMIT_AS, mapped + 3 * size + (6 << 30))
    _lower(resource.RLIMIT_DATA, data + 2 * size + (512 << 20))
    _lower(resource.RLIMIT_CPU, 120 + size // 5_000_000)
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_CORE, 0)


def _lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, hard))


def _blank(path: str) -> Summary:
    kind, name_epoch = kind_of(path)
    try:
        facts = os.stat(path)
    except OSError:
        return Summary(path, kind, name_epoch)
    return Summary(path, kind, name_epoch, facts.st_size, facts.st_mtime)


def _from_json(answer: dict[str, Any]) -> Summary:
    parameters = [
        Parameter(**{**p, "rows": [Rows(**r) for r in p["rows"]]}) for p in answer.pop("parameters")
    ]
    return Summary(**answer, parameters=parameters)


# --- the child: container, pickle, tensors -------------------------------------------------------

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


class Unreadable(Exception):
    """A file that is not a checkpoint to be read, and why."""

    def __init__(self, kind: ProblemKind, text: str) -> None:
        self.problem = Problem(kind, text)


def _read_in_child(path: str, tell: Callable[[int], None]) -> dict[str, Any]:
    return dataclasses.asdict(read_summary(path, tell))


def read_summary(path: str, tell: Callable[[int], None] = lambda _: None) -> Summary:
    """Summary of a file, read in this process.

    Raises:
        CheckpointError: the file is missing, damaged or refused by the safe reader.
    """
    summary = _blank(path)
    content = open_safely(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise Unreadable("foreign", "not a checkpoint: no dictionary with `model`")
    if content.get("format") == FORMAT:
        _describe_own(summary, content)
    else:
        _describe_old(summary, content)
    members = _optimizer_members(content.get("optimizer", content.get("opt")), content["model"])
    _note_misfits(summary, content, members)
    average = _dict(content.get("ema"))
    done = 0
    for name, raw in content["model"].items():
        if isinstance(name, str) and isinstance(raw, Tensor) and raw.is_floating_point():
            ema = average.get(name)
            group, state = members.get(name, ({}, {}))
            tensors = [t for t in (raw, ema, *state.values()) if isinstance(t, Tensor)]
            summary.parameters.append(_measure(name, raw, ema, group, state, summary))
            for tensor in tensors:
                forget_pages(tensor)
                done += tensor.numel() * tensor.element_size()
            tell(done)
    summary.parameters.sort(key=lambda p: p.place)
    moved = [p for p in summary.parameters if math.isfinite(p.ema_distance)]
    summary.ema_equals_raw = bool(moved) and all(p.ema_distance == 0 for p in moved)
    return summary


def open_safely(path: str) -> Any:
    """What a checkpoint file holds, tensors mapped from disk, after its container and pickle pass.

    Raises:
        CheckpointError: missing, damaged, or refused by the safe reader.
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
    with zipfile.ZipFile(path) as archive:
        pickles = [e for e in archive.infolist() if e.filename.endswith(".pkl")]
        if len(pickles) != 1:
            raise Unreadable("unsafe", f"expected one pickle inside, found {len(pickles)}")
        if pickles[0].file_size > 256 << 20:
            raise Unreadable("unsafe", "its pickle is larger than 256 MB")
        data = archive.read(pickles[0])
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
    with zipfile.ZipFile(path) as archive:
        stored = Counter(e.file_size for e in archive.infolist() if "/data/" in e.filename)
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


# --- what the checkpoint says of itself ----------------------------------------------------------


def _describe_own(summary: Summary, content: dict[str, Any]) -> None:
    summary.style = "own"
    missing = sorted(REQUIRED_KEYS - set(content))
    summary.misfits += [f"lacks `{key}`" for key in missing]
    progress, flags = _dict(content.get("progress")), _dict(content.get("flags"))
    architecture = _dict(content.get("architecture"))
    summary.step, summary.epoch = _whole(progress.get("step")), _whole(progress.get("epoch"))
    summary.saved_at = _text(content.get("saved_at"))
    summary.best_val = _real(progress.get("best_val"))
    summary.vocab_sizes = [_whole(v) or 0 for v in _list(architecture.get("vocab_sizes"))]
    summary.architecture, summary.flags = plain(architecture), plain(flags)
    summary.progress = plain(progress)
    summary.history = plain([r for r in _list(content.get("history")) if isinstance(r, dict)])
    summary.optimizer = _optimizer_settings(content.get("optimizer"))
    summary.scale = _scale(content.get("scaler"))


def _describe_old(summary: Summary, content: dict[str, Any]) -> None:
    """The plain dictionary of the script that this project replaces, as far as it goes."""
    known = {"opt", "global_step", "vocab_sizes", "cfg"} & set(content)
    summary.style = "old" if known else "unknown"
    cfg = content.get("cfg")
    summary.flags = plain(vars(cfg) if isinstance(cfg, argparse.Namespace) else _dict(cfg))
    summary.step = _whole(content.get("global_step"))
    summary.epoch = _whole(content.get("epoch"))
    summary.saved_at = _text(content.get("saved_at"))
    summary.best_val = _real(content.get("best_val"))
    summary.vocab_sizes = [_whole(v) or 0 for v in _list(content.get("vocab_sizes"))]
    summary.optimizer = _optimizer_settings(content.get("opt", content.get("optimizer")))
    summary.scale = _scale(content.get("scaler"))


def _optimizer_settings(state: Any) -> dict[str, Any]:
    groups = [_group_settings(g) for g in _groups(state)]
    if not groups:
        return {}
    adam = next((g for g in groups if g["method"] != "Muon"), groups[0])
    return {
        "method": methods_of(state),
        "lr": max(g["lr"] / g["lr_factor"] for g in groups),
        "initial_lr": max(_real(g.get("initial_lr")) for g in _groups(state)),
        "betas": adam["betas"],
        "eps": adam["eps"],
        "weight_decay": max(g["weight_decay"] for g in groups),
        "groups": groups,
    }


def _group_settings(group: dict[str, Any]) -> dict[str, Any]:
    """What the doctor needs of a param_group; the optimizer is told by the settings it has."""
    betas = [_real(b) for b in _list(group.get("betas"))]
    factor = _real(group.get("lr_factor", 1.0))
    return {
        "method": method_of(group),
        "lr": _real(group.get("lr")),
        "lr_factor": factor if 0 < factor < math.inf else 1.0,
        "betas": betas if len(betas) == 2 else [],
        "eps": _real(group.get("eps")),
        "momentum": _real(group.get("momentum")),
        "weight_decay": _real(group.get("weight_decay")),
        "tensors": len(_list(group.get("params"))),
    }


def methods_of(state: Any) -> str:
    """The optimizers of a state dict by name, such as "AdamW" or "Muon + AdamW"; "" for none."""
    return " + ".join(dict.fromkeys(filter(None, map(method_of, _groups(state)))))


def method_of(group: dict[str, Any]) -> str:
    """The optimizer of a param_group by the settings that it has; "" where it is not known."""
    return "Muon" if "ns_steps" in group else "AdamW" if "betas" in group else ""


def _groups(state: Any) -> list[dict[str, Any]]:
    return [g for g in _list(_dict(state).get("param_groups")) if isinstance(g, dict)]


def _scale(state: Any) -> float | None:
    state = _dict(state)
    return _real(state["scale"]) if "scale" in state else None


Member = tuple[dict[str, Any], dict[str, Any]]


def _optimizer_members(state: Any, model: dict[str, Any]) -> dict[str, Member]:
    """Group and moments by parameter name; without names in the file, by the parameters' order."""
    groups, moments = _groups(state), _dict(_dict(state).get("state"))
    names: dict[int, str] = {}
    for group in groups:
        pairs = zip(_list(group.get("params")), _list(group.get("param_names")), strict=False)
        names.update((i, n) for i, n in pairs if isinstance(i, int) and isinstance(n, str))
    home = {i: g for g in groups for i in _list(g.get("params")) if isinstance(i, int)}
    if not names:
        named = [n for n, t in model.items() if isinstance(t, Tensor) and t.is_floating_point()]
        if len(home) == len(named):
            names = dict(zip(sorted(home), named, strict=True))
    return {
        names[i]: (home.get(i, {}), s)
        for i, s in moments.items()
        if i in names and isinstance(s, dict)
    }


def _note_misfits(summary: Summary, content: dict[str, Any], members: dict[str, Member]) -> None:
    """Kinds, keys and shapes: against the saved architecture, EMA and moments against the model."""
    shapes = _shapes(content["model"])
    for key in ("progress", "flags", "architecture", "ema", "optimizer", "opt"):
        if not isinstance(content.get(key, {}), (dict, type(None))):
            found = type(content[key]).__name__
            summary.misfits.append(f"`{key}`: expected a dictionary, found {found}")
    summary.misfits += [f"raw {n} is no tensor" for n in content["model"] if n not in shapes]
    if summary.style == "own" and summary.architecture:
        try:
            summary.misfits += _differences("raw", shapes, _expected_shapes(summary.architecture))
        except (ValueError, TypeError, RuntimeError) as error:
            summary.misfits.append(f"architecture builds no model: {error}")
    if ema := _dict(content.get("ema")):
        summary.misfits += _differences("EMA", _shapes(ema), shapes)
    if any(name.startswith("_orig_mod.") for name in shapes):
        summary.misfits.append("names begin with _orig_mod.: a compiled module was saved")
    if not members and (summary.step or 0) > 0:
        summary.misfits.append("no optimizer state")
    summary.misfits += _odd_groups(content.get("optimizer", content.get("opt")))
    for name, (_, state) in members.items():
        summary.misfits += _odd_moments(name, state, shapes.get(name))
    if summary.style == "own" and members:
        summary.misfits += _odd_methods(summary, members)
        if lost := sorted(shapes.keys() - members.keys()):
            summary.misfits.append(f"no optimizer state for {', '.join(lost[:3])}")


def _shapes(tensors: dict[Any, Any]) -> dict[str, tuple[int, ...]]:
    named = ((n, t) for n, t in tensors.items() if isinstance(n, str) and isinstance(t, Tensor))
    return {n: tuple(t.shape) for n, t in named}


def _odd_groups(state: Any) -> list[str]:
    """What the optimizer's param_groups should not be."""
    groups = _dict(state).get("param_groups", [])
    if not isinstance(groups, list):
        return [f"optimizer param_groups: expected a list, found {type(groups).__name__}"]
    odd = [
        f"optimizer group {i}: expected a dictionary, found {type(g).__name__}"
        for i, g in enumerate(groups)
        if not isinstance(g, dict)
    ]
    for i, group in enumerate(_groups(state)):
        for key in ("params", "param_names", "betas"):
            if key in group and not isinstance(group[key], (list, tuple)):
                found = type(group[key]).__name__
                odd.append(f"optimizer group {i}: expected a list `{key}`, found {found}")
        if (betas := group.get("betas")) is not None and len(_list(betas)) != 2:
            odd.append(f"optimizer group {i}: expected two `betas`")
    return odd


STATE_KEYS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}


def _odd_methods(summary: Summary, members: dict[str, Member]) -> list[str]:
    """Moments that a group's optimizer would lack or not have, and a --optim that is another."""
    odd = []
    for name, (group, state) in members.items():
        method = method_of(group)
        expected = STATE_KEYS.get(method, set())
        foreign = set().union(*STATE_KEYS.values()) - expected if expected else set()
        odd += [f"{method} has no {key} of {name}" for key in sorted(expected - state.keys())]
        odd += [f"{method} has a foreign {key} of {name}" for key in sorted(foreign & state.keys())]
    said, method = summary.flags.get("optim", "adamw"), summary.optimizer.get("method", "")
    if said in ("adamw", "muon") and method and (said == "muon") != ("Muon" in method):
        odd.append(f"--optim {said}, but the optimizer's groups are of {method}")
    return odd


def _odd_moments(name: str, state: dict[str, Any], shape: tuple[int, ...] | None) -> list[str]:
    """What a parameter's optimizer state should not be: `step` is a number, moments its shape."""
    odd = []
    for key, moment in state.items():
        if not isinstance(moment, Tensor):
            if key != "step" or not isinstance(moment, numbers.Real):
                odd.append(f"optimizer {key} of {name} is no tensor")
        elif moment.dim() and shape is not None and moment.shape != shape:
            odd.append(f"optimizer {key} of {name} is {tuple(moment.shape)}")
    return odd


def _expected_shapes(architecture: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    if not 0 < int(architecture.get("layers", 1)) <= 1000:
        raise ValueError(f"{architecture['layers']} layers")
    with _Unfilled():
        model = CodesTransformer(ModelConfig.from_dict(architecture))
    return {name: tuple(p.shape) for name, p in model.state_dict().items()}


class _Unfilled(TorchFunctionMode):
    """Leaves new weights unfilled: memory that is never touched costs nothing.

    The meta device would do, but filling a tensor there imports the compiler, for seconds.
    """

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in ("normal_", "kaiming_uniform_", "zeros_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _differences(
    what: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> list[str]:
    return [
        f"{what} {n}: expected {expected.get(n, 'nothing')}, found {found.get(n, 'nothing')}"
        for n in sorted(found.keys() | expected.keys())
        if found.get(n) != expected.get(n)
    ]


def _dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _real(value: Any) -> float:
    """A number as float, NumPy's and a tensor of one element too; NaN for anything else."""
    if isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.numel() == 1):
        with contextlib.suppress(OverflowError):
            return float(value)
    return math.nan


def _whole(value: Any) -> int | None:
    real = _real(value)
    return int(real) if math.isfinite(real) else None


def plain(value: Any) -> Any:
    """JSON's types alone; numbers of other types as float, anything else as its type's name.

    Raises:
        Unreadable: more than MOST_VALUES, a shared container's counted wherever it is met.
    """
    count = 0

    def walk(part: Any) -> Any:
        nonlocal count
        count += 1
        if count > MOST_VALUES:
            raise Unreadable("corrupt", f"flags or history of over {MOST_VALUES:,} values; refused")
        if isinstance(part, dict):
            return {str(k): walk(v) for k, v in part.items()}
        if isinstance(part, (list, tuple)):
            return [walk(v) for v in part]
        if isinstance(part, int) and part.bit_length() > 64:
            return "(a huge number)"
        if isinstance(part, (int, float, str, type(None))):
            return part
        number = _real(part)
        return f"({type(part).__name__})" if math.isnan(number) else number

    return walk(value)


# --- one tensor ----------------------------------------------------------------------------------


def moment_bound(beta1: float, beta2: float) -> float:
    """Largest possible abs(m) / sqrt(v) of Adam, before bias correction (Cauchy-Schwarz).

    m = (1 - b1) sum b1^i g_i and v = (1 - b2) sum b2^i g_i^2; writing b1^i = (b1 / sqrt b2)^i
    sqrt(b2)^i gives m^2 <= v (1 - b1)^2 / ((1 - b2) (1 - b1^2 / b2)). Infinite if b1^2 >= b2.
    """
    if not 0 <= beta1 * beta1 < beta2 < 1:
        return math.inf
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1 * beta1 / beta2))


def newton_schulz_gain(coefficients: list[float], steps: int) -> float:
    """Largest singular value that Muon's Newton-Schulz iteration leaves; 1.20 with torch's own.

    It divides a matrix by its Frobenius norm, so that singular values lie in [0, 1], and takes each
    to a s + b s^3 + c s^5, `steps` times (Jordan et al. 2024, "Muon"). Infinite for other settings.
    """
    if len(coefficients) != 3 or not 1 <= steps <= 20:
        return math.inf
    a, b, c = coefficients
    s = np.linspace(0.0, 1.0, 10_001)
    with np.errstate(all="ignore"):
        for _ in range(steps):
            s = a * s + b * s**3 + c * s**5
        gain = float(np.abs(s).max())
    return gain if math.isfinite(gain) else math.inf


def _describe_muon(parameter: Parameter, group: dict[str, Any]) -> None:
    """How far a step of Muon goes: all that is known of it beforehand, whatever the gradients.

    Orthogonalised, an update of shape [A, B] has min(A, B) singular values near 1, so RMS
    1 / sqrt(max(A, B)), and no element above the largest of them; then `adjust_lr_fn` scales it by
    the shape (Jordan et al. 2024; Liu et al. 2025, "Muon is scalable", section 2.2).
    """
    rows, columns = parameter.shape
    ratio = math.sqrt(max(1.0, rows / max(columns, 1)))
    if group.get("adjust_lr_fn") == "match_rms_adamw":
        ratio = 0.2 * math.sqrt(max(rows, columns))
    coefficients = [_real(c) for c in _list(group.get("ns_coefficients"))]
    gain = newton_schulz_gain(coefficients, _whole(group.get("ns_steps")) or 0)
    parameter.update_rms = ratio / math.sqrt(max(rows, columns, 1))
    parameter.step_bound = ratio * gain
    momentum = _real(group.get("momentum"))
    if 0 <= momentum < 1:
        parameter.noise_steps = (1 + momentum) / (1 - momentum)


def _measure(
    name: str,
    raw: Tensor,
    ema: Any,
    group: dict[str, Any],
    state: dict[str, Any],
    summary: Summary,
) -> Parameter:
    parameter = Parameter(name, list(raw.shape), str(raw.dtype).removeprefix("torch."), {})
    fitting = {
        key: t.reshape(-1)
        for key, t in {**state, "ema": ema}.items()
        if isinstance(t, Tensor) and t.shape == raw.shape
    }
    settings = _group_settings(group)
    parameter.optimizer, parameter.lr_factor = settings["method"], settings["lr_factor"]
    if parameter.optimizer == "Muon" and raw.dim() == 2:
        _describe_muon(parameter, group)
    elif parameter.optimizer == "AdamW" and settings["betas"]:
        parameter.step_bound = moment_bound(*settings["betas"])
    parameter.adam_step = _real(state.get("step"))
    _measure_elements(parameter, raw.reshape(-1), fitting, settings)
    stride = max(1, raw.numel() // SAMPLE)
    parameter.sample = raw.reshape(-1)[::stride][:SAMPLE].float().tolist()
    if parameter.bad.get("raw") or not raw.numel():
        return parameter
    matrix = raw.detach()
    if matrix.dim() == 2 and min(matrix.shape) >= 16:
        parameter.stable_rank = _stable_rank(matrix)
    place = parameter.place
    if place.role in ("embed", "head") and matrix.dim() == 2:
        parameter.rows = _rows_of_codebooks(matrix, place.codebook, summary.vocab_sizes)
    if place.role == "attn.qkv" and matrix.dim() == 2:
        heads = _whole(summary.architecture.get("heads", summary.flags.get("heads"))) or 0
        parameter.logit_bounds = _logit_bounds(matrix, heads)
    return parameter


class _Sums:
    """Sums over a tensor's elements, in double precision, filled a chunk at a time."""

    def __init__(self) -> None:
        self.values: Counter[str] = Counter()

    def add(self, name: str, tensor: Tensor) -> None:
        self.values[name] += float(tensor)  # type: ignore[assignment]

    def rms(self, name: str, count: int) -> float:
        return math.sqrt(max(self.values[name], 0.0) / max(count, 1))


def _measure_elements(
    parameter: Parameter, raw: Tensor, others: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    """Fill in what sums over elements tell; `others` by the optimizer's keys, and "ema"."""
    sums, count = _Sums(), raw.numel()
    bad: Counter[str] = Counter()
    largest = 0.0
    ema, m, v = (others.get(key) for key in ("ema", "exp_avg", "exp_avg_sq"))
    momentum = others.get("momentum_buffer") if parameter.optimizer == "Muon" else None
    for first in range(0, count, CHUNK):
        span = slice(first, first + CHUNK)
        w = finite_chunk(raw[span], "raw", bad)
        largest = max(largest, float(w.abs().max()))
        sums.add("w", w.square().sum())
        d = None
        if ema is not None:
            e = finite_chunk(ema[span], "ema", bad)
            d = w - e
            sums.add("e", e.square().sum())
            sums.add("d", d.square().sum())
        if momentum is not None:
            _add_momentum(sums, finite_chunk(momentum[span], "momentum", bad), d)
        elif m is not None and v is not None:
            moments = finite_chunk(m[span], "m", bad), finite_chunk(v[span], "v", bad)
            _add_moments(parameter, sums, *moments, d, settings)
    parameter.bad = {part: n for part, n in bad.items() if n}
    parameter.rms, parameter.largest = sums.rms("w", count), largest
    values = sums.values
    if ema is not None:
        parameter.ema_rms, parameter.ema_distance = sums.rms("e", count), sums.rms("d", count)
    if momentum is not None or (m is not None and v is not None and count):
        parameter.m_rms = sums.rms("m", count)
        norms = math.sqrt(max(values["d"] * values["u"], 0.0))
        parameter.update_cos = values["du"] / norms if norms else math.nan
    if momentum is None and m is not None and v is not None and count:
        parameter.v_root = sums.rms("v", count)
        parameter.v_zero = values["zero"] / count
        parameter.v_tiny = values["tiny"] / max(count - values["zero"], 1)
        parameter.update_rms = sums.rms("u", count)


def finite_chunk(chunk: Tensor, what: str, bad: Counter[str]) -> Tensor:
    """A chunk in double precision, its non-finite values counted and replaced by zero."""
    chunk = chunk.detach().double()
    if not math.isfinite(float(chunk.sum())):  # ten times as fast as looking at each
        finite = torch.isfinite(chunk)
        bad[what] += int((~finite).sum())
        chunk = chunk.masked_fill(~finite, 0.0)
    return chunk


def _add_momentum(sums: _Sums, m: Tensor, d: Tensor | None) -> None:
    """Muon goes the way of its momentum, once orthogonalised, which would take a product a file."""
    sums.add("m", m.square().sum())
    sums.add("u", m.square().sum())
    if d is not None:
        sums.add("du", -(d * m).sum())


def _add_moments(
    parameter: Parameter,
    sums: _Sums,
    m: Tensor,
    v: Tensor,
    d: Tensor | None,
    settings: dict[str, Any],
) -> None:
    beta1, beta2 = settings.get("betas") or (math.nan, math.nan)
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        beta1 = beta2 = math.nan
    eps, step = settings.get("eps", 1e-8), max(parameter.adam_step, 1.0)
    parameter.v_negative += int((v < 0).sum())
    root = v.clamp_min(0.0).sqrt()
    # float32's v underflows below gradients of 4e-23, and a sum of rounded terms may be 1 % off.
    over = m.abs() > 1.01 * moment_bound(beta1, beta2) * root + 1e-18
    parameter.m_over_bound += int(over.sum())
    sums.add("m", m.square().sum())
    sums.add("v", v.clamp_min(0.0).sum())
    sums.add("zero", (root == 0).sum())
    sums.add("tiny", ((root > 0) & (root < eps)).sum())
    u = m / (1 - beta1**step) / (root / math.sqrt(1 - beta2**step) + eps)
    sums.add("u", u.square().sum())
    if d is not None:
        sums.add("du", -(d * u).sum())


def _stable_rank(matrix: Tensor) -> float:
    """Squared Frobenius norm over squared spectral norm, the latter by power iteration."""
    matrix = matrix.float()
    probe = torch.ones(matrix.shape[1]) + 0.1 * torch.arange(matrix.shape[1]).remainder(7)
    spectral = torch.tensor(0.0)
    for _ in range(12):
        image = matrix @ (probe / probe.norm().clamp_min(1e-30))
        spectral = image.norm()
        probe = matrix.T @ image
    return float(matrix.norm().square() / spectral.square().clamp_min(1e-30))


def _rows_of_codebooks(matrix: Tensor, codebook: int, vocab_sizes: list[int]) -> list[Rows]:
    """Facts of each codebook's rows; a joint table [K * V, D] holds V rows for each.

    Rows after these, up to V, stand for codes that a pattern leaves open.
    """
    if codebook >= 0:
        return [_rows(matrix, codebook)]
    rows = len(vocab_sizes) * max(vocab_sizes, default=0)
    if not rows or not rows <= len(matrix) <= rows + max(vocab_sizes):
        return []
    tables = matrix[:rows].unflatten(0, (len(vocab_sizes), -1))
    return [_rows(t[:v], k) for k, (t, v) in enumerate(zip(tables, vocab_sizes, strict=True))]


def _rows(table: Tensor, codebook: int) -> Rows:
    table = table.float()
    norms = table.norm(dim=1)
    scale = float(norms.square().mean().sqrt())
    return Rows(
        codebook,
        float(norms.median()),
        float(norms.quantile(0.05)),
        float(norms.max()),
        int((norms == 0).sum()),
        float(table.mean(0).norm()) / scale if scale else 0.0,
    )


def _logit_bounds(qkv: Tensor, heads: int) -> list[float]:
    """Product of the spectral norms of each head's query and key maps, over sqrt(C).

    Times the squared norm of the normalised input it bounds the head's attention logits in a model
    without QK-norm; its growth is what tells.
    """
    rows, width = qkv.shape
    if heads < 1 or rows != 3 * width or width % heads:
        return []
    q, k, _ = qkv.float().unflatten(0, (3, heads, -1))  # [H, C, D] each
    norms = torch.linalg.matrix_norm(q, ord=2) * torch.linalg.matrix_norm(k, ord=2)
    return (norms / math.sqrt(width // heads)).tolist()
