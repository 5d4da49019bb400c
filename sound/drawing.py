"""A sample on its way: the prompt before it, its codes as they are drawn, the files they go to.

    prompt = read_prompt("song.flac", None, checkpoint, codec, tell=print)       # [T, K]
    drawing = Drawing(stream(model, 5000, batch=TOGETHER, ...), prompt, 5000)
    write_sample(flags, checkpoint, 0, drawing, codec)                           # .wav and .npq

T = frames, K = codebooks.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cli.command_line import UsageError
from sound.audio_file import read_audio, resample, stream_wav, write_wav
from sound.codec import Codec
from sound.npq_format import check_codes, map_codes, read_header, write_npq
from sound.origin import are_different, codec_of, find_all

if TYPE_CHECKING:
    from sound.audio_file import Waveform

TOGETHER = 4  # samples in a batch: on a CPU one alone takes a tenth less time at most
STDOUT = "-"


def is_npq(path: str) -> bool:
    """Whether a prompt is codes, and not audio."""
    return path.lower().endswith(".npq")


def read_prompt(
    path: str,
    frames: int | None,
    checkpoint: dict[str, Any],
    codec: Codec | None,
    *,
    tell: Callable[[str], None],
) -> torch.Tensor:
    """The first `frames` codes [T, K] of .npq or audio, with as many codebooks as the model has.

    Audio needs the codec. `tell` is given a warning where the codes are of another one.

    Raises:
        UsageError: too few codebooks, another side channel, or a code that the model does not have.
    """
    sizes = torch.tensor(checkpoint["architecture"]["vocab_sizes"])
    k, side = len(sizes), checkpoint["data"]["side_codebooks"]
    if codec is not None and not is_npq(path):
        waveform, rate = read_audio(path, stereo=side > 0)
        waveform = resample(waveform, rate, codec.sample_rate)
        return codec.encode_channels(torch.from_numpy(waveform), k - side, side)[:frames]
    header = read_header(path)
    mid = header.num_codebooks - header.side_codebooks
    if header.num_codebooks < k or max(0, k - mid) != side:
        raise UsageError(
            f"--prompt {path}: expected {k} codebooks, {side} of them side ones, found "
            f"{header.num_codebooks}, {header.side_codebooks} of them side ones; encode it as the "
            "training data was"
        )
    trained = codec_of(checkpoint["data"])
    (record,) = find_all([(os.path.realpath(path), header.file_size, check_codes(header))])
    if record and are_different(record.codec_id, trained):
        tell(
            f"--prompt {path}: codes of codec {record.codec_id}, the training data's are "
            f"of {trained}: expect noise"
        )
    codes = torch.from_numpy(map_codes(header)[:frames, :k].astype(np.int64))
    if (codes >= sizes).any():
        frame, book = (codes >= sizes).nonzero()[0].tolist()
        raise UsageError(
            f"--prompt {path}: expected codes below {sizes[book]} in codebook {book}, "
            f"found {codes[frame, book]} in frame {frame}; name one of the training data's codec"
        )
    return codes


class Drawing:
    """Samples that are drawn together, as far as they are asked for; their codes are kept.

    Always TOGETHER at a time, as a batch of another size rounds otherwise and so draws otherwise:
    the first samples are the same however many are asked for.
    """

    def __init__(self, source: Iterator[torch.Tensor], before: torch.Tensor, frames: int) -> None:
        """Of the codes [TOGETHER, n, K] that `source` yields, which follow `before` [T, K]."""
        self.source, self.ready = source, len(before)
        self.new = len(before), len(before) + frames  # first and last + 1
        shape = TOGETHER, self.new[1], before.shape[1]
        self.codes = torch.empty(shape, dtype=torch.int32)  # 11 MB for an hour of each
        self.codes[:, : self.ready] = before
        self.seconds = 0.0  # of drawing

    def read(self, sample: int, start: int, stop: int) -> torch.Tensor:
        """Frames of a sample, [stop - start, K] int64; those that are not there yet are drawn."""
        while self.ready < stop:
            started = time.perf_counter()
            new = next(self.source)
            self.seconds += time.perf_counter() - started
            self.codes[:, self.ready : self.ready + new.shape[1]] = new
            self.ready += new.shape[1]
        return self.codes[sample, start:stop].long()


def numbered(path: str, index: int, count: int) -> Path:
    """`song.wav`, or `song_2.wav` when several samples are drawn."""
    whole = Path(path)
    return whole if count == 1 else whole.with_name(f"{whole.stem}_{index + 1}{whole.suffix}")


def write_sample(
    flags: argparse.Namespace,
    checkpoint: dict[str, Any],
    number: int,
    drawing: Drawing,
    codec: Codec | None,
) -> list[Path]:
    """Write the .wav and .npq asked for of a sample; the prompt is decoded before it either way.

    The sound is decoded and written while it is drawn. Returns the files.
    """
    side, written = checkpoint["data"]["side_codebooks"], []
    first, total = drawing.new
    if flags.with_prompt:
        first = 0
    read = functools.partial(drawing.read, number % TOGETHER)
    if flags.out and codec is not None:
        chunks = _from_sample(codec.decode_channels(read, total, side), first * codec.hop_length)
        shape = 2 if side else 1, (total - first) * codec.hop_length
        if flags.out == STDOUT:
            with open(1, "wb", closefd=False) as file:
                stream_wav(file, chunks, codec.sample_rate, shape)
        else:
            written.append(numbered(flags.out, number, flags.samples))
            write_wav(written[-1], chunks, codec.sample_rate, shape)
    if flags.npq_out:
        written.append(numbered(flags.npq_out, number, flags.samples))
        write_npq(
            written[-1],
            read(first, total).numpy(),
            vocab_sizes=checkpoint["architecture"]["vocab_sizes"],
            frame_rate=checkpoint["data"]["frame_rate"],
            side_codebooks=side,
        )
    return written


def _from_sample(chunks: Iterator[Waveform], first: int) -> Iterator[Waveform]:
    """Chunks [C, n] of a waveform from its audio sample `first` on."""
    for chunk in chunks:
        if first < chunk.shape[1]:
            yield chunk[:, first:]
        first = max(0, first - chunk.shape[1])
