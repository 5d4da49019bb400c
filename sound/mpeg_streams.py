"""Streams of sound in mp3 files, found by walking frame by frame to the end.

    mpeg_streams(Path("song.mp3").read_bytes())         # [Stream]; raises DamagedError

Such a file has no header: only a Xing, LAME or VBRI tag contains its length and the samples that
the encoder added. Files that were put together play one after the other.

Layouts: ISO/IEC 11172-3 and 13818-3, MPEG 2.5, and the tags as their encoders write them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from sound.audio_streams import PADDING, DamagedError, Stream, cut_short, tag_length

KINDS = "wav, flac, ogg, opus, mp3, aiff, caf or w64"
BIT_RATES = {  # kbit/s by MPEG version, 2 for all later ones, and bit rate index
    1: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
DECODER_DELAY = 529  # samples by which a decoder's sound comes late
LONGEST_FRAME = 1441  # bytes
XING_SLACK = 1  # some writers count the tag's own frame too


class _Kind(NamedTuple):
    """What the frames of one stream have in common."""

    version: int  # 1, or 2 for the lower rates
    rate: int
    channels: int

    @property
    def samples(self) -> int:
        """Per channel and frame."""
        return 1152 if self.version == 1 else 576


def _mpeg_frame(data: bytes, pos: int) -> tuple[_Kind, int] | None:
    """Kind and bytes of the frame at `pos`; None where there is none. No free format."""
    head = data[pos : pos + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bit_rate, rate = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer != 3 or bit_rate in (0, 15) or rate == 3:
        return None
    hertz = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    kind = _Kind(1 if version == 3 else 2, hertz, 1 if head[3] >= 0xC0 else 2)
    bits = BIT_RATES[kind.version][bit_rate - 1] * 1000
    return kind, kind.samples // 8 * bits // hertz + (head[2] >> 1 & 1)


def _is_chain(data: bytes, pos: int) -> bool:
    """Whether three frames of one kind follow each other at `pos`, or fewer up to the end."""
    kinds: set[_Kind] = set()
    for _ in range(3):
        frame = _mpeg_frame(data, pos)
        if frame is None:
            return bool(kinds) and (pos == len(data) or tag_length(data, pos) > 0)
        kinds.add(frame[0])
        pos += frame[1]
    return len(kinds) == 1 and pos <= len(data)


def _next_chain(data: bytes, pos: int, stop: int) -> int:
    """Position in [pos, stop) where frames begin again, or `stop`."""
    places = (m.start() for m in re.compile(rb"\xff[\xe2-\xff]").finditer(data, pos, stop))
    return next((place for place in places if _is_chain(data, place)), stop)


class _Tag(NamedTuple):
    """Content of a Xing, LAME or VBRI tag, a frame that describes those behind it."""

    frames: int = 0  # 0: unknown
    delay: int = 0  # samples that the encoder added in front
    padding: int = 0  # and at the end


def _tag_in(frame: bytes, kind: _Kind) -> _Tag | None:
    """The tag that a frame contains instead of sound, or None."""
    if frame[36:40] == b"VBRI":
        return _Tag(int.from_bytes(frame[50:54], "big"))
    side = {(1, 2): 32, (1, 1): 17, (2, 2): 17, (2, 1): 9}[kind.version, kind.channels]
    places = [p for p in (4 + side, 6 + side) if frame[p : p + 4] in (b"Xing", b"Info")]
    if not places:
        return None
    flags = int.from_bytes(frame[places[0] + 4 : places[0] + 8], "big")
    pos = places[0] + 8
    frames = int.from_bytes(frame[pos : pos + 4], "big") if flags & 1 else 0
    pos += sum(size for bit, size in ((1, 4), (2, 4), (4, 100), (8, 4)) if flags & bit)
    is_lame = frame[pos : pos + 1] > b"\0" and len(frame) >= pos + 24
    gaps = int.from_bytes(frame[pos + 21 : pos + 24], "big") if is_lame else 0
    return _Tag(frames, gaps >> 12, gaps & 0xFFF)


class _Run:
    """Frames of one kind, and the tag before them."""

    def __init__(self, kind: _Kind, tag: _Tag | None) -> None:
        self.kind, self.tag = kind, tag or _Tag()
        self.frames: list[bytes] = []

    def is_whole(self) -> bool:
        """Whether the tag counts exactly these frames; raises DamagedError where it counts more."""
        promised, found = self.tag.frames, len(self.frames)
        if promised > found + XING_SLACK:
            length = self.kind.samples / self.kind.rate
            raise cut_short(f"{promised * length:.2f} s", f"{found * length:.2f} s")
        return 0 < promised == found

    def stream(self) -> Stream:
        """The stream, with the samples that the encoder added as far as the tag contains them."""
        tag, has_gaps = self.tag, self.tag.delay or self.tag.padding
        return Stream(
            b"".join(self.frames),
            len(self.frames) * self.kind.samples,
            delay=tag.delay + DECODER_DELAY if has_gaps else 0,
            padding=max(0, tag.padding - DECODER_DELAY),
            claimed_bytes=len(self.frames) * LONGEST_FRAME,
        )


def mpeg_streams(data: bytes) -> list[Stream]:
    """The streams of one or several successive .mp3 files, each with a tag or without."""
    runs: list[_Run] = []
    strange: list[tuple[int, int]] = []  # where bytes that are neither frame nor tag begin and end
    pos = 0
    while pos < len(data):
        kind, length = _mpeg_frame(data, pos) or (None, 0)
        is_next = bool(runs) and kind == runs[-1].kind and pos + length <= len(data)
        if kind and (is_next or _is_chain(data, pos)):
            frame = data[pos : pos + length]
            tag = _tag_in(frame, kind)
            if tag or not is_next:
                runs.append(_Run(kind, tag))
            if not tag:
                runs[-1].frames.append(frame)
        elif length := tag_length(data, pos):
            if _next_chain(data, pos + 10, pos + length) < min(pos + length, len(data)):
                raise DamagedError(f"a tag of {length:,} bytes at byte {pos:,}", "sound within it")
        else:
            length = _next_chain(data, pos + 1, len(data)) - pos
            strange.append((pos, pos + length))
        pos += length
    if not runs:
        raise DamagedError(KINDS, "none of these" if data else "an empty file")
    is_whole = all([run.is_whole() for run in runs])  # noqa: C419 -- each may raise
    _check_strange(data, strange, runs[-1].kind, is_whole=is_whole)
    return [run.stream() for run in runs]


def _check_strange(
    data: bytes, strange: list[tuple[int, int]], kind: _Kind, *, is_whole: bool
) -> None:
    """Refuse a last frame that is cut off, and bytes that may have been sound.

    Where tags confirm every frame, more bytes are allowed before and between files, but not at the
    end.
    """
    for start, stop in strange:
        is_last, is_first = stop == len(data), start == 0
        frame = _mpeg_frame(data, start)
        if is_last and not is_whole and frame and frame[0] == kind and start + frame[1] > stop:
            raise DamagedError(
                f"a frame of {frame[1]} bytes at byte {start:,}", "the file's end within it"
            )
        is_padding = not data[start:stop].strip(b"\0") and stop - start <= PADDING
        most = 0 if is_last else 16 * PADDING if is_whole else LONGEST_FRAME * is_first
        if not is_padding and stop - start > most:
            raise DamagedError("frames of sound", f"{stop - start:,} other bytes at byte {start:,}")
