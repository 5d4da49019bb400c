"""Streams of sound in audio files, found by walking a file to its end.

    flac_streams(Path("song.flac").read_bytes())       # [Stream]; raises DamagedError

libsndfile reads at most the samples that a header promises, and only the first stream. Here chunks,
frames and pages are counted, and no header is trusted. MPEG is in mpeg_streams.py.

Layouts: RIFF with EBU Tech 3306 (RF64), AIFF-C, CAF, Wave64; RFC 9639 (FLAC); RFC 3533 (Ogg).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

PADDING = 4096  # zero bytes that may follow the sound, to the end of a disk's sector


class DamagedError(ValueError):
    """A file is cut short, damaged or of an unknown kind; with what was expected and found."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found: {found}")
        self.expected, self.found = expected, found


@dataclass(frozen=True)
class Stream:
    """One stream of sound, in a form that libsndfile reads to its end."""

    content: bytes | None = None  # None: the file as it is
    samples: int | None = None  # per channel, expected from the decoder; None: libsndfile's count
    audio_bytes: int | None = None  # of uncompressed sound, instead of `samples`
    block_align: int = 0  # bytes of one sample of all channels, where the file contains it
    delay: int = 0  # samples that the encoder added in front
    padding: int = 0  # samples that it added at the end
    md5: bytes = b""  # of the samples as little-endian integers; empty where unknown
    claimed_bytes: int = 0  # size shown to libsndfile, which guesses the length of an mp3 from it


def read_at(file: BinaryIO, position: int, count: int) -> bytes:
    """Up to `count` bytes."""
    file.seek(position)
    return file.read(count)


def tag_length(data: bytes, pos: int) -> int:
    """Bytes of the ID3, APE or Lyrics3 tag that begins at `pos`; 0 where none does."""
    if data.startswith(b"ID3", pos) and len(data) - pos >= 10:
        a, b, c, d = (byte & 0x7F for byte in data[pos + 6 : pos + 10])
        footer = 10 if data[pos + 5] & 0x10 else 0
        return 10 + (a << 21 | b << 14 | c << 7 | d) + footer
    if data.startswith(b"TAG", pos):
        return 227 if data.startswith(b"TAG+", pos) else 128
    if data.startswith(b"LYRICSBEGIN", pos):
        end = re.compile(b"LYRICS200|LYRICSEND").search(data, pos)
        return end.end() - pos if end else 0
    mark = data.find(b"APETAGEX", pos, pos + (1 << 24))
    if mark < 0 or len(data) - mark < 32:
        return 0
    items_and_footer = int.from_bytes(data[mark + 12 : mark + 16], "little")
    if mark == pos:  # a header, which older tags lack
        return 32 + items_and_footer
    return items_and_footer if mark + 32 - items_and_footer == pos else 0


def check_end(rest: bytes, size: int) -> None:
    """Raise DamagedError where the `size` bytes behind the sound are more than tags and padding.

    `rest` contains the first of them, as many as a tag may have.
    """
    pos = 0
    while pos < len(rest) and (length := tag_length(rest, pos)):
        pos += length
    if size - pos > PADDING or rest[pos:].strip(b"\0"):
        raise DamagedError(
            "an end behind the sound", f"{size - pos:,} bytes more that are neither sound nor a tag"
        )


# --- uncompressed: chunks -------------------------------------------------------------------------


class _Layout(NamedTuple):
    """How a container lays out its chunks of id, size and body."""

    first: int  # bytes before the first chunk
    id_bytes: int
    size: str  # struct format
    sound: bytes  # id of the chunk of sound
    before: int = 0  # bytes in that chunk before the sound
    is_inclusive: bool = False  # sizes count id and size too
    align: int = 2


CHUNKED = {
    b"RIFF": _Layout(12, 4, "<I", b"data"),
    b"RIFX": _Layout(12, 4, ">I", b"data"),
    b"RF64": _Layout(12, 4, "<I", b"data"),
    b"BW64": _Layout(12, 4, "<I", b"data"),
    b"FORM": _Layout(12, 4, ">I", b"SSND", before=8),
    b"caff": _Layout(8, 4, ">q", b"data", before=4, align=1),
    b"riff": _Layout(40, 16, "<Q", b"data", is_inclusive=True, align=8),  # Wave64
}


def chunked_stream(file: BinaryIO, layout: _Layout, start: int, size: int) -> Stream:
    """The one chunk of sound of a .wav, .aiff, .caf or .w64; `size` of the file, in bytes."""
    pos, stream = start + layout.first, None
    long_size = block_align = 0
    while chunk := _chunk_at(file, layout, pos):
        name, body, length = chunk
        if name in CHUNKED or (name != layout.sound and not 0 <= length <= size - body):
            break
        if name == b"ds64":  # of RF64: the size that 32 bits cannot hold
            long_size = int.from_bytes(read_at(file, body + 8, 8), "little")
        elif name == b"fmt ":
            block_align = int.from_bytes(read_at(file, body + 12, 2), "little")
        elif name == layout.sound:
            if stream is not None:
                raise DamagedError("one chunk of sound", f"another at byte {pos:,}")
            if length == 0xFFFF_FFFF and long_size:
                length = long_size
            content = None
            if _is_open(file, layout, body, length, size - body):
                content = None if length > 0 else _closed(file, layout, body, size)
                length = size - body
            if body + length > size:
                raise cut_short(f"{length:,} bytes of sound", f"{size - body:,}")
            stream = Stream(content, audio_bytes=length - layout.before, block_align=block_align)
        pos = body + length
        if length % layout.align and not _chunk_at(file, layout, pos):  # some leave the pad out
            pos += -length % layout.align
    if stream is None:
        raise DamagedError("a chunk of sound", f"none in {size:,} bytes")
    check_end(read_at(file, pos, 1 << 24), size - pos)
    return stream


def _chunk_at(file: BinaryIO, layout: _Layout, pos: int) -> tuple[bytes, int, int] | None:
    """Id (4 bytes), place of the body and its length; None where no chunk begins."""
    count = layout.id_bytes + struct.calcsize(layout.size)
    head = read_at(file, pos, count)
    if len(head) < count or not re.match(rb"[ -~]{4}", head):
        return None
    (length,) = struct.unpack(layout.size, head[layout.id_bytes :])
    return head[:4], pos + len(head), length - len(head) * layout.is_inclusive


def _is_open(file: BinaryIO, layout: _Layout, body: int, length: int, rest: int) -> bool:
    """Whether the size of a chunk of sound means "unknown", as of a writer into a pipe."""
    if length <= layout.before < rest:
        return length < 0 or not _chunk_at(file, layout, body + length)
    is_mark = 0x7FFF_F000 <= length <= 0x8000_0000 or 0xFFFF_F000 <= length <= 0xFFFF_FFFF
    return length > rest and is_mark


def _closed(file: BinaryIO, layout: _Layout, body: int, size: int) -> bytes:
    """The file with the true length in its chunk of sound, which reaches to the end."""
    data = bytearray(read_at(file, 0, size))
    struct.pack_into(layout.size, data, body - struct.calcsize(layout.size), size - body)
    return bytes(data)


def cut_short(promised: str, found: str) -> DamagedError:
    """The error of a file with less sound than its header promises."""
    return DamagedError(f"{promised}, as its header says", f"an end after {found}")


# --- FLAC: frames ---------------------------------------------------------------------------------


def flac_streams(data: bytes) -> Iterator[Stream]:
    """The streams of one or several successive .flac files."""
    starts = [m.start() for m in re.finditer(rb"fLaC[\x00\x80]\x00\x00\x22", data)]
    if not starts:
        raise DamagedError("a FLAC header", "none")
    for start, stop in zip(starts, [*starts[1:], len(data)], strict=True):
        yield _flac_stream(data[start:stop])


def _flac_stream(data: bytes) -> Stream:
    """The stream of one .flac, with its counted samples in the header."""
    pos, is_last = 4, False
    while not is_last and pos + 4 <= len(data):
        is_last = data[pos] >= 0x80
        pos += 4 + int.from_bytes(data[pos + 1 : pos + 4], "big")
    facts = int.from_bytes(data[18:26], "big")  # rate, channels - 1, bits - 1, samples
    rate, promised = facts >> 44 or 1, facts & (1 << 36) - 1
    sample_bits = ((facts >> 41 & 7) + 1) * ((facts >> 36 & 31) + 2)  # uncompressed, side channel
    frames = list(_flac_frames(data, pos))
    samples = sum(count for _, count in frames)
    last, count = frames[-1] if frames else (pos, 0)
    if samples < promised:
        raise cut_short(f"{promised / rate:.2f} s", f"{samples / rate:.2f} s")
    md5 = data[26:42] if any(data[26:42]) else b""
    if not promised and not md5 and _crc(data[last:], 16, 0x8005):
        raise DamagedError("a whole frame at its end", "a part of one")
    check_end(b"", len(data) - last - 32 - count * sample_bits // 8)  # a frame has no more
    counted = (facts >> 36 << 36 | samples).to_bytes(8, "big")
    return Stream(data[:18] + counted + data[26:], samples, md5=md5)


def _flac_frames(data: bytes, pos: int) -> Iterator[tuple[int, int]]:
    """Position and samples per channel of each frame, up to the first missing one."""
    mark = data[pos : pos + 2]
    frames = samples = 0
    while pos >= 0 and mark in (b"\xff\xf8", b"\xff\xf9"):
        number, count = _flac_header(data[pos : pos + 16]) or (-1, 0)
        if number == (samples if mark[1] & 1 else frames):  # varying blocks are numbered by sample
            yield pos, count
            frames, samples = frames + 1, samples + count
        pos = data.find(mark, pos + 2)


def _flac_header(head: bytes) -> tuple[int, int] | None:
    """Number and samples per channel of a frame, from its first 16 bytes; None for other bytes."""
    size, rate, pos = head[2] >> 4, head[2] & 15, 5
    if len(head) < 8 or size == 0 or rate == 15 or head[3] & 1:
        return None
    number, ones = head[4], 8 - (head[4] ^ 0xFF).bit_length()  # as UTF-8 does
    if ones:
        number &= 0x7F >> ones
        pos = 4 + ones
        for byte in head[5:pos]:
            number = number << 6 | byte & 0x3F
    extra = {6: 1, 7: 2}.get(size, 0)
    count = int.from_bytes(head[pos : pos + extra], "big") + 1
    if not extra:
        count = 192 if size == 1 else 576 << size - 2 if size < 6 else 256 << size - 8
    pos += extra + {12: 1, 13: 2, 14: 2}.get(rate, 0)
    is_whole = pos < len(head) and not _crc(head[: pos + 1], 8, 0x07)
    return (number, count) if is_whole else None


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    """A CRC, highest bit first; 0 for data followed by its own CRC."""
    crc, top = 0, 1 << bits - 1
    for byte in data:
        crc ^= byte << bits - 8
        for _ in range(8):
            crc = (crc << 1) ^ polynomial if crc & top else crc << 1
        crc &= (1 << bits) - 1
    return crc


# --- Ogg: pages -----------------------------------------------------------------------------------

BOS, EOS = 2, 4  # flags of a stream's first and last page
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class _Page(NamedTuple):
    flags: int
    granule: int  # samples so far; -1: no packet ends here
    serial: int
    sequence: int
    crc: int


def ogg_streams(data: bytes) -> Iterator[Stream]:
    """The successive streams of an .ogg or .opus file."""
    pos, start, before = 0, -1, _Page(0, 0, 0, -1, 0)
    while data.startswith(b"OggS", pos):
        page, stop = _ogg_page(data, pos)
        if page.flags & BOS and start >= 0:
            raise DamagedError(
                "one stream at a time", f"another before the first ends, at byte {pos:,}"
            )
        if page.flags & BOS:
            start, before = pos, page
        elif (page.serial, page.sequence) != (before.serial, before.sequence + 1) or start < 0:
            raise DamagedError(
                f"page {before.sequence + 1} of its stream at byte {pos:,}", f"page {page.sequence}"
            )
        if page.granule == -1:
            page = page._replace(granule=before.granule)
        if page.granule < before.granule:
            raise DamagedError("a page's time behind the one before", f"another at byte {pos:,}")
        if page.flags & EOS:
            yield Stream(data[start:stop])
            start = -1
        pos, before = stop, page
    if start >= 0:
        raise DamagedError(
            "a page that ends the stream", f"an end of the file, or no page, at byte {pos:,}"
        )
    check_end(data[pos:], len(data) - pos)


def _ogg_page(data: bytes, pos: int) -> tuple[_Page, int]:
    """A page and its end."""
    head = data[pos : pos + 27].ljust(27, b"\0")
    segments = data[pos + 27 : pos + 27 + head[26]]
    stop = pos + 27 + head[26] + sum(segments)
    page = _Page(*struct.unpack("<BqIII", head[5:26]))
    if len(data) < stop or len(segments) < head[26]:
        raise DamagedError(f"a whole page at byte {pos:,}", "the file's end within it")
    # Ogg's CRC-32 is zlib's with all bits in the other order and without inversions.
    content = (head[:22] + bytes(4) + data[pos + 26 : stop]).translate(REVERSED)
    crc = zlib.crc32(content, 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    if int(f"{crc:032b}"[::-1], 2) != page.crc:
        raise DamagedError(f"a page at byte {pos:,}", "one whose checksum is wrong")
    return page, stop
