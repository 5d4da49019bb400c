"""Reads mutated .npq files and checkpoints, many a second, until something else than a named error.

    python benchmarks/fuzz_files.py --minutes 480          # a night
    python benchmarks/fuzz_files.py --count 100000 --seed 3

Valid files are flipped, cut, spliced and given boundary values, in one process. An .npq must give
NpqError or a header that is true of the file; a checkpoint CheckpointError or its very content; a
checkpoint whose pickle is mutated under a right CRC-32 CheckpointError or a dict with every part.
Anything else, or an example over five seconds, is saved and ends it with exit code 1; after a crash
of the whole process the input is the file named at the start.
"""

from __future__ import annotations

import argparse
import io
import random
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from run_folder.checkpoint import (
    REQUIRED_KEYS,
    CheckpointError,
    load_checkpoint,
    rng_state,
)
from run_folder.files import save_checkpoint
from sound.npq_format import NpqError, check_codes, map_codes, read_header, write_npq

SLOWEST = 5.0  # seconds that one example may take
BOUNDARIES = [0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**20, 2**20 + 1, 2**31 - 1]
BOUNDARIES += [2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
FLOATS = [0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), 1e-40, 3.4e38, 9_999.9, 10_000.0]

# --- mutation ------------------------------------------------------------------------------------


def mutate(content: bytes, rng: random.Random, others: list[bytes], hot: int) -> bytes:
    """One to four edits, half of them among the first `hot` bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = edit(bytearray(content), rng, others, hot)
    return content


def edit(content: bytearray, rng: random.Random, others: list[bytes], hot: int) -> bytes:
    end = hot if rng.random() < 0.5 else len(content)
    at = rng.randrange(max(1, min(end, len(content))))
    length = min(rng.choice((1, 2, 4, 8, 64, 1024)), len(content) - at)
    kind = rng.randrange(9)
    if not content or kind == 0:
        return bytes(content[:at])
    if kind == 1:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        form = rng.choice(("<B", "<H", "<I", "<Q", ">I"))
        top = 256 ** struct.calcsize(form)
        put(content, at, struct.pack(form, rng.choice(BOUNDARIES) % top))
    elif kind == 3:
        put(content, at, struct.pack("<f", rng.choice(FLOATS)))
    elif kind == 4:
        del content[at : at + length]
    elif kind == 5:
        content[at:at] = content[at : at + length]
    elif kind == 6:
        other = rng.choice(others)
        start = rng.randrange(len(other))
        put(content, at, other[start : start + length])
    elif kind == 7:
        put(content, at, rng.randbytes(length))
    else:
        content += rng.choice((b"\0" * length, rng.randbytes(length), bytes(content[at:])))
    return bytes(content)


def put(content: bytearray, at: int, new: bytes) -> None:
    """Write over, without a change of length."""
    new = new[: len(content) - at]
    content[at : at + len(new)] = new


# --- what is read --------------------------------------------------------------------------------


class Target(NamedTuple):
    """A kind of file: seeds, how a mutation becomes the file, and what reading it may give."""

    seeds: list[bytes]
    hot: int
    wrap: Callable[[bytes], bytes]
    read: Callable[[Path], str]  # "refused" or "valid"; raises otherwise


def npq_seeds(folder: Path) -> list[bytes]:
    rng, seeds = np.random.default_rng(0), []
    for k, side, vocab in ((9, 0, 1024), (1, 0, 2), (4, 0, 256), (13, 4, 1024), (3, 1, 70_000)):
        codes = rng.integers(vocab, size=(20, k))
        path = folder / "seed.npq"
        write_npq(path, codes, vocab_sizes=[vocab] * k, frame_rate=86.1, side_codebooks=side)
        seeds.append(path.read_bytes())
    codes = rng.integers(1024, size=(20, 9))
    payload, vocab_sizes = codes.astype("<u2").tobytes(), struct.pack("<9i", *[1024] * 9)
    seeds.append(b"NPQ1" + struct.pack("<iffi", 9, 86.1, 1.0, 20) + vocab_sizes + payload)
    seeds.append(
        b"NPQ1" + struct.pack("<if", 9, 86.1) + vocab_sizes + struct.pack("<i", 20) + payload
    )
    return seeds


def read_npq(path: Path) -> str:
    try:
        header = read_header(path)
        check_codes(header)
        codes = map_codes(header)
    except NpqError:
        return "refused"
    assert header.expected_size == path.stat().st_size
    assert codes.shape == (header.num_frames, header.num_codebooks)
    assert (codes < np.asarray(header.vocab_sizes)).all(), "a code beyond its vocabulary"
    return "valid"


def checkpoint_seed(folder: Path) -> bytes:
    values = torch.Generator().manual_seed(0)
    weights = {"w": torch.randn(5, 7, generator=values), "b": torch.zeros(3, dtype=torch.bfloat16)}
    state: dict[str, Any] = {
        **{key: {} for key in sorted(REQUIRED_KEYS)},
        "model": weights,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "progress": {"step": 3, "name": "ü", "none": None, "big": 1 << 40},
        "rng": rng_state(),
        "history": [{"epoch": 1, "train": 0.1 + 0.2}],
    }
    save_checkpoint(state, folder / "seed.pt")
    return (folder / "seed.pt").read_bytes()


def content(value: Any) -> Any:
    """To compare with ==: tensors as dtype, shape and bytes."""
    if isinstance(value, torch.Tensor):
        raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), raw
    if isinstance(value, dict):
        return [(k, content(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [content(v) for v in value]
    return type(value).__name__, repr(value)


def checkpoint_reader(truth: Any) -> Callable[[Path], str]:
    """What loads must be `truth`; with None, anything that has every part."""

    def read(path: Path) -> str:
        try:
            loaded = load_checkpoint(path)
        except CheckpointError:
            return "refused"
        assert truth is None or content(loaded) == truth, "loads other content"
        assert set(loaded) >= REQUIRED_KEYS
        return "valid"

    return read


def with_pickle(whole: bytes, pickled: bytes) -> bytes:
    """The checkpoint with another pickle in it, every CRC-32 right: what reaches torch's reader."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            is_pickle = entry.filename.endswith("/data.pkl")
            new.writestr(entry.filename, pickled if is_pickle else old.read(entry))
    return out.getvalue()


def pickle_of(whole: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        return archive.read(name)


def targets_in(folder: Path) -> dict[str, Target]:
    whole = checkpoint_seed(folder)
    truth = content(load_checkpoint(folder / "seed.pt"))
    pickled = pickle_of(whole)
    return {
        "npq": Target(npq_seeds(folder), 64, bytes, read_npq),
        "checkpoint": Target([whole], len(whole), bytes, checkpoint_reader(truth)),
        "pickle": Target(
            [pickled], len(pickled), lambda p: with_pickle(whole, p), checkpoint_reader(None)
        ),
    }


# --- the loop ------------------------------------------------------------------------------------


def try_one(target: Target, content_: bytes, path: Path) -> str:
    """ "refused", "valid", or the traceback of what should not have come out."""
    path.write_bytes(content_)
    started = time.perf_counter()
    try:
        outcome = target.read(path)
    except Exception:
        return traceback.format_exc()
    seconds = time.perf_counter() - started
    return outcome if seconds < SLOWEST else f"took {seconds:.1f} s"


def fuzz(args: argparse.Namespace, folder: Path) -> int:
    targets, counts = targets_in(folder), Counter[tuple[str, str]]()
    names = [args.only] if args.only else ["npq", "npq", "npq", "checkpoint", "pickle"]
    path, number, started = folder / "input", 0, time.monotonic()
    print(f"seed {args.seed}; the present input is {path}", flush=True)
    while number < (args.count or float("inf")):
        if args.minutes and time.monotonic() - started > 60 * args.minutes:
            break
        rng = random.Random(f"{args.seed}:{number}")
        name = names[number % len(names)]
        target = targets[name]
        content_ = mutate(rng.choice(target.seeds), rng, target.seeds, target.hot)
        outcome = try_one(target, target.wrap(content_), path)
        number += 1
        counts[name, outcome if outcome in ("refused", "valid") else "failed"] += 1
        if outcome not in ("refused", "valid"):
            kept = Path(f"fuzz_{name}_{args.seed}_{number}.bin")
            kept.write_bytes(path.read_bytes())
            print(f"{outcome}\nexample {number} ({name}) failed; its input is {kept.resolve()}")
            return 1
    seconds = time.monotonic() - started
    for (name, outcome), count in sorted(counts.items()):
        print(f"{name:10} {outcome:8} {count}")
    print(f"0 of {number} failed in {seconds:.0f} s, {number / seconds:.0f} a second")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--count", type=int, help="stop after so many examples")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other examples")
    parser.add_argument("--only", choices=("npq", "checkpoint", "pickle"), help="one kind")
    args = parser.parse_args()
    if not (args.minutes or args.count):
        parser.error("give --minutes or --count")
    warnings.filterwarnings("ignore")
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        return fuzz(args, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
