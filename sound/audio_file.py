"""Audio files as waveforms: read to the true end of every stream in them, or refused by name.

    waveform, rate = read_audio("song.flac")              # [1, N] float32
    waveform = resample(waveform, rate, 44_100)
    write_wav("back.wav", [waveform], 44_100, waveform.shape)

C = audio channels, N = audio samples per channel. libsndfile decodes, soxr resamples.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import soundfile
import soxr

from cli.disk import replace_file
from sound.audio_streams import (
    CHUNKED,
    DamagedError,
    Stream,
    chunked_stream,
    flac_streams,
    ogg_streams,
    read_at,
    tag_length,
)
from sound.mpeg_streams import mpeg_streams
from sound.npq_format import raise_unless_of_file

if TYPE_CHECKING:
    Waveform = np.ndarray[Any, np.dtype[np.float32]]

READ_BLOCK = 1 << 18  # audio samples a channel: a downmix never holds all of a stereo file
PEAK_LIMIT = 4.0  # 12 dB over full scale: a float file beyond it has other units, or stray values
SILENCE = 1e-4  # half of peak to peak, -80 dBFS: below it there is only dither
CANCELLED = 0.01  # share of the channels' energy below which their mean is not their music
# Bytes of an audio sample, where they are fixed.
SAMPLE_BYTES = {"PCM_S8": 1, "PCM_U8": 1, "ULAW": 1, "ALAW": 1, "PCM_16": 2, "PCM_24": 3}
SAMPLE_BYTES |= {"PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}
# Packed in blocks of varying length, which are not counted here.
UNCOUNTED = ("ALAC", "DWVW", "DPCM")


class AudioError(ValueError):
    """An audio file cannot be used; the message has the path, expected, found, and the remedy."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        expected: str,
        found: object,
        remedy: str = "mend or convert the file, or take it out",
    ) -> None:
        self.found = found
        super().__init__(f"{path}: expected {expected}, found: {found}; {remedy}")


class SilentError(AudioError):
    """An audio file contains only silence."""


def read_audio(path: str | os.PathLike[str], *, stereo: bool = False) -> tuple[Waveform, int]:
    """Read all of a file: a float32 waveform [1, N], the mean of its channels, and its rate in Hz.

    With `stereo` the waveform is [2, N]; a mono file then gives two equal channels. Successive
    streams of a file are joined. Memory: twice the waveform, and once a compressed file.

    Raises:
        SilentError: no channel is louder than SILENCE.
        AudioError: no audio of a known kind, cut off, damaged, empty, of several rates, with
            samples that are not finite or beyond PEAK_LIMIT, more than two channels with `stereo`,
            or channels that cancel each other without `stereo`.
    """
    levels, blocks, rates = _Levels(), [], []
    try:
        with open(path, "rb", opener=_open_regular) as file:
            streams = find_streams(file)
        for stream in streams:
            with _opened(path, stream) as sound:
                rates.append(sound.samplerate)
                if stereo and sound.channels > 2:
                    raise DamagedError("one or two channels", f"{sound.channels} channels")
                for block in _blocks(sound, stream):
                    with np.errstate(over="ignore", invalid="ignore"):  # refused below
                        levels.add(block)
                        blocks.append(_as_channels(block, stereo))
    except DamagedError as error:
        raise AudioError(path, error.expected, error.found) from error
    except (OSError, soundfile.SoundFileError) as error:
        raise_unless_of_file(error)
        found = str(getattr(error, "error_string", error)).rstrip(".")
        raise AudioError(path, "audio that libsndfile reads", found) from error
    if len(set(rates)) > 1:
        found = ", then ".join(f"{rate} Hz" for rate in dict.fromkeys(rates))
        raise AudioError(path, "one sampling rate", found, "split it into its parts")
    if not levels.samples:
        raise AudioError(path, "at least one audio sample", "none")
    levels.check(path, rates[0], stereo=stereo)
    return np.ascontiguousarray(np.concatenate(blocks).T), rates[0]


def find_streams(file: BinaryIO) -> list[Stream]:
    """Every stream of an audio file, in order. Compressed files are read into memory.

    Raises:
        DamagedError: of no known kind, cut short, or with unexplained bytes.
        OSError: it cannot be read.
    """
    start, size = 0, file.seek(0, 2)
    while length := tag_length(read_at(file, start, 10), 0):
        start += length
    head = read_at(file, start, 4)
    if layout := CHUNKED.get(head):
        return [chunked_stream(file, layout, start, size)]
    if walk := {b"fLaC": flac_streams, b"OggS": ogg_streams}.get(head):
        return list(walk(read_at(file, start, size)))
    return mpeg_streams(read_at(file, 0, size))


def starts_as_audio(path: str | os.PathLike[str]) -> bool:
    """Whether a regular file begins as audio of a known kind; True too where it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(4)
    except OSError:
        return True
    if head[:3] == b"ID3" or head in (*CHUNKED, b"fLaC", b"OggS"):
        return True
    # A frame of MPEG audio; UTF-16 text begins with FF FE.
    return head[:1] == b"\xff" and head[1:2] >= b"\xe0" and head[1:2] != b"\xfe"


def _open_regular(path: str, flags: int) -> int:
    """Open a regular file; to open a pipe would wait for its writer."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedError("audio that libsndfile reads", "not a regular file")
    return descriptor


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], stream: Stream) -> Iterator[soundfile.SoundFile]:
    if stream.content is None:
        with soundfile.SoundFile(os.fsencode(path)) as sound:  # a name need not be text
            yield sound
        return
    # Not a BytesIO: Ctrl-C in one of its callbacks from C would be lost.
    with open(os.memfd_create("audio"), "wb") as file:
        file.write(stream.content)
        file.truncate(max(file.tell(), stream.claimed_bytes))
        file.seek(0)
        with soundfile.SoundFile(file.fileno(), closefd=False) as sound:
            yield sound


def _blocks(sound: soundfile.SoundFile, stream: Stream) -> Iterator[Waveform]:
    """Blocks [n, C] of a stream, without the samples that its encoder added.

    Raises:
        DamagedError: another number of samples than expected, or other ones than were encoded.
    """
    subtype, expected = sound.subtype, stream.samples
    if subtype.startswith(UNCOUNTED):
        raise DamagedError("sound whose end can be told", f"{subtype} in {sound.format}")
    width = stream.block_align or SAMPLE_BYTES.get(subtype, 0) * sound.channels
    if stream.audio_bytes is not None and subtype in SAMPLE_BYTES:
        expected = stream.audio_bytes // width
    if expected is None:
        expected = sound.frames
    digest = hashlib.md5(usedforsecurity=False) if stream.md5 and subtype in SAMPLE_BYTES else None
    stop, pos = expected - stream.padding, 0
    while pos < expected:
        block = sound.read(min(READ_BLOCK, expected - pos), dtype="float32", always_2d=True)
        if not len(block):
            break
        if digest:
            digest.update(_as_integers(block, SAMPLE_BYTES[subtype]))
        yield block[max(0, stream.delay - pos) : max(0, stop - pos)]
        pos += len(block)
    found = pos if stream.audio_bytes is None else max(pos, sound.frames)
    if found != expected:
        rate = sound.samplerate
        raise DamagedError(f"{expected / rate:.2f} s of sound", f"{found / rate:.2f} s that decode")
    if digest and digest.digest() != stream.md5:
        raise DamagedError("the sound whose MD5 its header holds", "other sound, so it is damaged")


def _as_integers(block: Waveform, width: int) -> bytes:
    """Samples in [-1, 1) as signed little-endian integers of 1 to 3 bytes."""
    integers = np.ascontiguousarray(np.rint(block * np.float32(1 << 8 * width - 1)).astype("<i4"))
    return integers.view(np.uint8).reshape(*block.shape, 4)[..., :width].tobytes()


def _as_channels(block: Waveform, stereo: bool) -> Waveform:
    """A block [n, C] as the mean of its channels, [n, 1], or as stereo, [n, 2]."""
    if not stereo:
        return block.mean(axis=1, keepdims=True)
    return np.repeat(block, 2, axis=1) if block.shape[1] == 1 else block


class _Levels:
    """Levels of a file, from its blocks of samples [n, C]."""

    def __init__(self) -> None:
        self.samples = self.peak_at = 0  # per channel
        self.peak = self.swing = 0.0  # swing: half of peak to peak, so that an offset is no sound
        self.energy = self.mixed = 0.0  # of the channels, and of their mean

    def add(self, block: Waveform) -> None:
        """Count a block in."""
        if not len(block):
            return
        sizes = np.abs(block).max(axis=1)
        sizes[np.isnan(sizes)] = np.inf
        if (peak := float(sizes.max())) > self.peak:
            self.peak, self.peak_at = peak, self.samples + int(sizes.argmax())
        self.swing = max(self.swing, float(np.ptp(block, axis=0).max()) / 2)
        if block.shape[1] > 1:
            self.energy += len(block) * float(block.var(axis=0, dtype=np.float64).mean())
            self.mixed += len(block) * float(block.mean(axis=1).var(dtype=np.float64))
        self.samples += len(block)

    def check(self, path: str | os.PathLike[str], rate: int, *, stereo: bool) -> None:
        """Raise AudioError where its codes would be noise or silence."""
        if self.peak > PEAK_LIMIT:
            peak = f"{self.peak:.6g}" if self.peak < math.inf else "NaN or infinity"
            expected = f"samples of at most {PEAK_LIMIT:g} (full scale is 1)"
            found = f"a peak of {peak} at {self.peak_at / rate:.3f} s"
            raise AudioError(path, expected, found, "scale the file, or cut the stray samples out")
        if self.swing < SILENCE:
            level = f"{20 * math.log10(self.swing):.0f} dBFS" if self.swing else "nothing at all"
            raise SilentError(path, "sound", f"silence ({level})")
        if not stereo and self.mixed < CANCELLED * self.energy:
            found = f"{self.mixed / self.energy:.1%} of it, since they cancel each other"
            remedy = "keep both with --stereo of encode_npq.py, or turn the polarity of one"
            raise AudioError(path, "the sound in the mean of its channels", found, remedy)


def resample(waveform: Waveform, rate: int, new_rate: int) -> Waveform:
    """Resample [C, N] from `rate` to `new_rate` Hz with soxr, band-limited, phase-linear.

    Sound shorter than one new sample becomes one sample, so that the result is never empty.
    """
    if rate == new_rate:
        return waveform
    new = soxr.resample(waveform.T, rate, new_rate, quality="VHQ").T
    return np.ascontiguousarray(new if new.shape[1] else waveform[:, :1])


def write_wav(
    path: str | os.PathLike[str], chunks: Iterable[Waveform], rate: int, shape: tuple[int, int]
) -> None:
    """Write a waveform as a .wav of 16 bits, whole or not at all; arguments as of `stream_wav`.

    Raises:
        AudioError: it would be larger than a .wav can be.
        OSError: it cannot be written; `path` is as it was.
    """
    content = functools.partial(stream_wav, chunks=chunks, rate=rate, shape=shape)
    replace_file(Path(path), content, durable=False)


def stream_wav(
    file: BinaryIO, chunks: Iterable[Waveform], rate: int, shape: tuple[int, int]
) -> None:
    """Write a .wav of 16 bits to a stream as its chunks [C, n] come, clipped to [-1, 1].

    `rate` is in Hz; `shape` is C and the sum of all n, as the header stands before the sound.

    Raises:
        AudioError: it would be larger than a .wav can be; no chunk was asked for.
        OSError: the stream takes no more.
    """
    channels, length = shape
    frame, size = channels * 2, channels * 2 * length
    if size + 36 >= 1 << 32:
        found = f"{length / rate / 3600:.1f} hours"
        raise AudioError("the sound", "at most 4 GB, as a .wav holds", found, "write fewer frames")
    form = 16, 1, channels, rate, rate * frame, frame, 16
    head = b"RIFF", size + 36, b"WAVE", b"fmt ", *form, b"data", size
    file.write(struct.pack("<4sI4s4sIHHIIHH4sI", *head))
    for chunk in chunks:
        pcm = io.BytesIO()  # libsndfile itself gives no reason where a disk refuses
        soundfile.write(pcm, chunk.T, rate, subtype="PCM_16", format="RAW", endian="LITTLE")
        file.write(pcm.getbuffer())
        file.flush()
