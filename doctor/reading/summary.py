"""One checkpoint file as plain data: figures and text, and nothing that can run.

    summary.problem          # why the file could not be read, or None
    summary.parameters[0]    # norms, counts and distances of one tensor, raw, EMA and moments
    sorted(summary.parameters, key=lambda p: p.place)  # as a forward pass meets them

reader.py makes a Summary of a file; the checks see no other data of files. Below it are the places
of tensors in the network, and the conversion of untrusted values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
import os
from typing import Any, Literal, NamedTuple

from torch import Tensor

from run_folder.metrics import MOST_WHOLE

MOST_VALUES = 5_000_000  # of flags, progress or history
NOISE_STEPS = 19.0  # over which Adam's updates stay alike: (1 + b1) / (1 - b1) at b1 = 0.9

ProblemKind = Literal["missing", "unsafe", "corrupt", "foreign"]


class Problem(NamedTuple):
    """Why a file could not be read."""

    kind: ProblemKind
    text: str
    way: str = ""  # to the weights of a foreign file


class Unreadable(Exception):
    """A file cannot be read as a checkpoint; `problem` is the reason."""

    def __init__(self, kind: ProblemKind, text: str, way: str = "") -> None:
        self.problem = Problem(kind, text, way)


@dataclasses.dataclass
class Parameter:
    """One tensor of the model with its average and its moments. NaN stands for "not there"."""

    name: str
    shape: list[int]
    dtype: str
    bad: dict[str, int]  # non-finite values in "raw", "ema", "m", "v" and Muon's "momentum"
    optimizer: str = ""  # "AdamW" or "Muon"; "" where it is not known
    lr_factor: float = 1.0  # its group's multiple of the run's learning rate
    decay: float = 0.0  # its group's weight decay
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
    update_rms: float = math.nan  # of the optimizer's step before lr
    update_cos: float = math.nan  # between raw - EMA and the way that Adam, or momentum, goes
    adam_step: float = math.nan
    sample: list[float] = dataclasses.field(default_factory=list)
    # By codebook, as text: rows of an embedding or a head that are zero throughout.
    zero_rows: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def place(self) -> Place:
        """Where in the network it stands."""
        return place_of(self.name)

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class Scale(NamedTuple):
    """One figure of one part of the model: a codebook's, or an attention head's.

    what: "logits" and their "offset", RMS over codes for a state of random direction, the mean over
    the codes taken out of the one and being the other; "bias", RMS; "attention", RMS of its logits
    for random queries and keys; "embedding", the longest row's norm.
    """

    what: str
    where: str
    number: int  # of the codebook or head
    value: float


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
    mismatches: list[str] = dataclasses.field(default_factory=list)  # keys and shapes
    prefix: str = ""  # of all names in the file, as a wrapper's: "module."; taken off here
    # "method", such as "Muon + AdamW", Adam's betas and eps, largest decay, and the run's "lr":
    # a group's over its factor; "groups" have their own.
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    scale: float | None = None  # of the GradScaler
    ema_equals_raw: bool = False
    parameters: list[Parameter] = dataclasses.field(default_factory=list)
    scales: dict[str, list[Scale]] = dataclasses.field(default_factory=dict)  # of "raw" and "ema"
    recent_ce: list[float] = dataclasses.field(default_factory=list)  # [K], of the latest steps

    @property
    def name(self) -> str:
        """File name."""
        return os.path.basename(self.path)

    def flag(self, name: str, default: float = math.nan) -> float:
        """A flag of the run as a number; the default where it is none."""
        return as_number(self.flags.get(name), default)

    def counter(self, name: str, default: float = math.nan) -> float:
        """A number of the run's progress; the default where it is none."""
        return as_number(self.progress.get(name), default)

    @property
    def measurable(self) -> list[Parameter]:
        """Tensors of finite values that have enough of them for statistics."""
        return [p for p in self.parameters if p.numel >= 512 and not p.bad]

    @functools.cached_property
    def moment(self) -> tuple[int, float, int]:
        """Step, training seconds and content: equal for copies of one state of a run."""
        content = tuple(
            (p.name, p.rms, p.ema_rms, p.m_rms, p.v_root, *p.sample[:4]) for p in self.parameters
        )
        return self.step or 0, self.counter("seconds", 0.0), hash(repr(content))


# --- names ---------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Position of a tensor in the network; sorts in the order of a forward pass."""

    order: tuple[int, ...]
    codebook: int  # -1: none, or all
    role: str


VECTORS = ".vectors"  # end of the names of what a codec's codes stand for, which is never trained
STAGES = ("embed", "label_embed", "bos", "pos", "proj", "blocks", "norm", "depth", "head")
PARTS = (
    *("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.out"),
    *("norm2", "mlp.up", "mlp.down"),
)
OLD_NAMES = {"embeds": "embed", "heads": "head", "ln_f": "norm"}
OLD_NAMES |= {"mlp.0": "mlp.up", "mlp.3": "mlp.down"}


def place_of(name: str) -> Place:
    """Place of a parameter by its name, in this project's models and in the older script's.

    What belongs to a depth transformer has the roles of the main one after `depth.`; a name that is
    not known stands last, under a role of its own.
    """
    depth, inner = ("depth.", name[6:]) if name.startswith("depth.") else ("", name)
    first, *rest = inner.split(".")
    number = int(rest[0]) if len(rest) > 1 and rest[0].isdecimal() else -1
    is_block = first == "blocks" and number >= 0
    part = ".".join(rest[1:-1]) if is_block else first
    part = OLD_NAMES.get(part, part)
    stage = "blocks" if is_block else part
    role = depth + (part if stage in STAGES else inner) + ".bias" * (rest[-1:] == ["bias"])
    stages = (stage, "") if not depth else ("depth", stage)
    order = [(*STAGES, x).index(x) for x in stages]
    order += [number if is_block else -1, (*PARTS, part).index(part)]
    return Place(tuple(order), -1 if is_block else number, role)


# --- untrusted values ----------------------------------------------------------------------------


def as_dict(value: Any) -> dict[Any, Any]:
    """A dictionary; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """A list, of a tuple too; an empty one for anything else."""
    return list(value) if isinstance(value, (list, tuple)) else []


def as_text(value: Any) -> str:
    """A string; an empty one for anything else."""
    return value if isinstance(value, str) else ""


def as_number(value: Any, default: float = math.nan) -> float:
    """A number as float, NumPy's and a tensor of one element too; the default for anything else."""
    if isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.numel() == 1):
        with contextlib.suppress(OverflowError, RuntimeError):  # too large; complex, meta
            return default if math.isnan(value) else float(value)
    return default


def as_whole(value: Any) -> int | None:
    """A number below MOST_WHOLE in size, without its fraction; None for anything else."""
    real = as_number(value)
    return int(real) if abs(real) < MOST_WHOLE else None


def as_count(value: Any) -> int | None:
    """A whole number that is not negative; None for anything else."""
    whole = as_whole(value)
    return whole if whole is not None and whole >= 0 else None


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
        number = as_number(part)
        return f"({type(part).__name__})" if math.isnan(number) else number

    return walk(value)
