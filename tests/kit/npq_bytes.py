"""The .npq format packed by hand, so that no test of it rests on the writer under test."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

RATE = 86.2  # frames per second


LETTER, DTYPE = "BHI", ("<u1", "<u2", "<u4")  # by the file's dtype_code


def npq1(codes, vocab=1024, *, rate=RATE, bitrate=320.0, width=1, frames=None, k=None) -> bytes:
    """NPQ1 as the table of the format has it; `frames` and `k` may lie."""
    codes = np.asarray(codes)
    vocab = [vocab] * codes.shape[1] if isinstance(vocab, int) else vocab
    return (
        b"NPQ1"
        + struct.pack("<HH", 1, codes.shape[1] if k is None else k)
        + struct.pack("<ff", rate, bitrate)
        + struct.pack("<I", len(codes) if frames is None else frames)
        + struct.pack(f"<{len(vocab)}I", *vocab)
        + struct.pack("<B", width)
        + struct.pack(f"<{codes.size}{LETTER[width]}", *codes.ravel().tolist())
    )


def npq2(codes, k_side, vocab=1024, *, mode=1, version=1, width=1, rate=RATE) -> bytes:
    codes = np.asarray(codes)
    k = codes.shape[1]
    return (
        b"NPQ2"
        + struct.pack("<HB", version, mode)
        + struct.pack("<HH", k - k_side, k_side)
        + struct.pack("<ffI", rate, 320.0, len(codes))
        + struct.pack(f"<{k}I", *[vocab] * k)
        + struct.pack("<B", width)
        + struct.pack(f"<{codes.size}{LETTER[width]}", *codes.ravel().tolist())
    )


def legacy_a(codes, vocab=1024, *, rate=RATE, bitrate=128.0) -> bytes:
    codes = np.asarray(codes)
    k = codes.shape[1]
    head = b"NPQ1" + struct.pack("<iffi", k, rate, bitrate, len(codes))
    vocabulary = struct.pack(f"<{k}i", *[vocab] * k)
    return head + vocabulary + struct.pack(f"<{codes.size}H", *codes.ravel().tolist())


def legacy_b(codes, vocab=1024, *, rate=RATE) -> bytes:
    codes = np.asarray(codes)
    k = codes.shape[1]
    head = b"NPQ1" + struct.pack("<if", k, rate)
    vocabulary = struct.pack(f"<{k}ii", *[vocab] * k, len(codes))
    return head + vocabulary + struct.pack(f"<{codes.size}H", *codes.ravel().tolist())


def some_codes(frames: int, k: int = 4, vocab: int = 1024, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, frames, k]).integers(vocab, size=(frames, k))


def put(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)
