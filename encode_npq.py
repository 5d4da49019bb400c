"""Audio to .npq token files, and back.

    python encode_npq.py music/ --out-dir npq_out --codec 44khz         # with all folders in it
    python encode_npq.py "music/*.flac" --out-dir npq_out --stereo      # mid/side: 9 + 4 codebooks
    python encode_npq.py npq_out/song.npq --decode --out-dir wav_out    # back to .wav
    python encode_npq.py npq_out --info                                 # headers and statistics

Codecs: 44khz, 24khz, 16khz (official DAC), demo (bundled, lo-fi), or the path of a DAC's weights.
What is done already is skipped. One waveform at a time is held in memory: 0.6 GB for an hour of
mono at 44.1 kHz. Exit code: 0 done, 1 failed (a file, or all), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

import npq_format as npq
from codec import CodecError, load_codec, read_audio, resample, write_wav
from npq_dataset import FRAME_RATE_TOLERANCE, find_npq_files

if TYPE_CHECKING:
    from codec import Codec, Waveform

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf")
SILENCE = 1e-4  # peak of -80 dBFS: below it there is only dither

# --- flags ---------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; every flag of two words is accepted with `-` and with `_`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="AUDIO", help="folders, quoted globs or files; .npq to decode")
    add("--out-dir", "--out_dir", type=Path, help="where the files go; folders are mirrored")
    add("--codec", default="44khz", help="44khz (default), 24khz, 16khz, demo or a path")
    add("--codebooks", type=_count, help="keep the first so many; default: all the codec has")
    add("--stereo", action="store_true", help="code mid and side (NPQ2), not a mono downmix")
    add("--mid-codebooks", "--mid_codebooks", type=_count, help="with --stereo; default 9")
    add("--side-codebooks", "--side_codebooks", type=_count, help="with --stereo; default 4")
    add("--loudness", type=float, metavar="LUFS", help="bring each file to this loudness, e.g. -16")
    add("--device", help="cpu, cuda, ...; default: cpu to decode, the best one to encode")
    add("--overwrite", action="store_true", help="do again what is done already")
    add("--decode", action="store_true", help="turn .npq files into .wav")
    add("--info", action="store_true", help="print headers and code statistics, write nothing")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= npq.MAX_CODEBOOKS:
        raise argparse.ArgumentTypeError(f"expected 1 to {npq.MAX_CODEBOOKS}, found {text}")
    return int(text)


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other; fill in the defaults that depend on others."""
    if args.info and args.decode:
        parser.error("--info and --decode exclude each other")
    if not args.info and args.out_dir is None:
        parser.error("--out-dir is missing: say where the files go")
    if args.stereo and args.codebooks:
        parser.error("--codebooks is for mono; use --mid-codebooks and --side-codebooks")
    if not args.stereo and (args.mid_codebooks or args.side_codebooks):
        parser.error("--mid-codebooks and --side-codebooks need --stereo")
    if args.loudness is not None and not -70 < args.loudness <= 0:
        parser.error(f"--loudness: expected above -70 and at most 0 LUFS, found {args.loudness:g}")
    if args.stereo:
        args.codebooks = args.mid_codebooks or 9
    args.side_codebooks = (args.side_codebooks or 4) if args.stereo else 0
    args.device = args.device or ("cpu" if args.decode else "best")


# --- what there is to do -------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One file to make out of another."""

    source: Path
    target: Path


def find_jobs(
    patterns: Sequence[str], out_dir: Path, suffixes: Sequence[str], new_suffix: str
) -> list[Job]:
    """Expand folders (recursively), globs and files; the targets mirror the folders below each.

    Raises:
        ValueError: a pattern matches nothing, or two files would give the same target.
    """
    sources: dict[Path, Path] = {}  # target -> source
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            root, matches = path, sorted(path.rglob("*"))
        elif path.exists():
            root, matches = path.parent, [path]  # a file that is named may have any suffix
        else:
            root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if matches != [path]:  # names with a leading dot: macOS leaves such files beside the music
            matches = [p for p in matches if p.suffix.lower() in suffixes and p.name[0] != "."]
        if not matches:
            raise ValueError(f"{pattern!r}: no such file, or none of {' '.join(suffixes)} in it")
        for source in matches:
            target = out_dir / source.relative_to(root).with_suffix(new_suffix)
            other = sources.setdefault(target, source)
            if other != source and not os.path.samefile(other, source):
                raise ValueError(
                    f"{other} and {source} would both become {target}; "
                    "rename one, name the folder above both, or use two --out-dir"
                )
    return [Job(source, target) for target, source in sources.items()]


def is_done(job: Job, args: argparse.Namespace) -> bool:
    """Whether the target is there, no older than its source, valid, and of the shape asked for."""
    try:
        if job.target.stat().st_mtime_ns < job.source.stat().st_mtime_ns:
            return False
        if args.decode:
            return True
        header = npq.read_header(job.target)
    except (OSError, npq.NpqError):
        return False
    mid, side = header.num_codebooks - header.side_codebooks, header.side_codebooks
    return side == args.side_codebooks and mid == (args.codebooks or mid)


# --- how it goes ---------------------------------------------------------------------------------


class SilentError(Exception):
    """A file holds nothing but silence."""


@dataclass
class Report:
    """What became of each file; a progress bar on a terminal, plain lines elsewhere."""

    done_before: int
    done: int = 0
    seconds: float = 0.0  # of audio
    silent: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def pace(self) -> str:
        """Hours of audio so far, and the speed."""
        speed = self.seconds / max(time.monotonic() - self.start, 1e-9)
        return f"{self.seconds / 3600:.2f} hours, {speed:.1f}x real time"

    def run(self, jobs: Sequence[Job], work: Callable[[Job], float]) -> None:
        """Do every job; a file that cannot be coded is noted and does not end the run."""
        bar = tqdm(jobs, unit="file", disable=not sys.stderr.isatty())
        for number, job in enumerate(bar, 1):
            outcome = "ok"
            try:
                job.target.parent.mkdir(parents=True, exist_ok=True)
                self.seconds += work(job)
                self.done += 1
            except SilentError:
                outcome = "silent"
                self.silent.append(str(job.source))
            except (OSError, ValueError, RuntimeError) as error:
                outcome, where = "failed", f"{job.source}: "
                self.failed.append(where + str(error).removeprefix(where))
            bar.set_postfix_str(self.pace)
            if bar.disable:
                print(f"[{number}/{len(jobs)}] {job.source}: {outcome} ({self.pace})", flush=True)

    def lines(self) -> list[str]:
        """Summary for the console: totals, then every silent, repeated or failed file."""
        lines = [f"{self.done} files written, {self.done_before} done before ({self.pace})"]
        for title, files in (
            ("silent, not encoded", self.silent),
            ("with the same audio as another, encoded all the same", self.duplicates),
            ("FAILED", self.failed),
        ):
            if files:
                lines += [f"{len(files)} {title}:", *(f"  {file}" for file in files)]
        return lines


# --- one file ------------------------------------------------------------------------------------


class Coder:
    """Encodes or decodes a file at a time; the codec is loaded when the first file needs it."""

    def __init__(self, args: argparse.Namespace, report: Report) -> None:
        self.args, self.report = args, report
        self.seen: dict[bytes, Path] = {}  # digest of the audio -> the first file that held it

    @cached_property
    def codec(self) -> Codec:
        """The codec, when it has as many codebooks as the flags ask for."""
        codec = load_codec(self.args.codec, self.args.device)
        asked = max(self.args.codebooks or 1, self.args.side_codebooks)
        if asked > codec.num_codebooks:
            has = f"codec {self.args.codec!r} has {codec.num_codebooks} codebooks"
            raise CodecError(f"{has}, found {asked} asked for; ask for fewer")
        return codec

    def encode(self, job: Job) -> float:
        """Turn audio into .npq; returns the seconds of audio."""
        import torch

        waveform, rate = read_audio(job.source, stereo=self.args.stereo)
        seconds: float = waveform.shape[1] / rate
        if max(waveform.max(), -waveform.min()) < SILENCE:
            raise SilentError
        first = self.seen.setdefault(hashlib.blake2b(waveform.data).digest(), job.source)
        if first != job.source:
            self.report.duplicates.append(f"{job.source} = {first}")
        if self.args.loudness is not None:
            waveform = to_loudness(waveform, rate, self.args.loudness)
        resampled = torch.from_numpy(resample(waveform, rate, self.codec.sample_rate))
        k_side = self.args.side_codebooks
        codes = self.codec.encode_channels(resampled, self.args.codebooks, k_side)
        npq.write_npq(
            job.target,
            codes.numpy(),
            vocab_sizes=[self.codec.codebook_size] * codes.shape[1],
            frame_rate=self.codec.frame_rate,
            bitrate=job.source.stat().st_size * 8 / 1000 / seconds,
            side_codebooks=k_side,
        )
        return seconds

    def decode(self, job: Job) -> float:
        """Turn .npq into .wav; returns the seconds of audio."""
        import torch

        header, codec = npq.read_header(job.source), self.codec
        side = header.side_codebooks
        mid = header.num_codebooks - side
        has = codec.num_codebooks, codec.codebook_size, codec.frame_rate
        needs = max(mid, side), max(header.vocab_sizes), header.frame_rate
        off = abs(needs[2] / has[2] - 1)  # real files carry frames / duration, not the nominal rate
        if needs[0] > has[0] or needs[1] != has[1] or off > FRAME_RATE_TOLERANCE:
            shape = "{} codebooks of {} at {:.2f} frames/s"
            wanted = f"at most {shape.format(*has)}, as codec {self.args.codec!r} has"
            remedy = "name the codec that made the file: --codec"
            raise npq.NpqError(job.source, "codes", wanted, shape.format(*needs), remedy)
        codes = torch.from_numpy(npq.map_codes(header).astype(np.int64))
        write_wav(job.target, codec.decode_channels(codes, side).numpy(), codec.sample_rate)
        return header.num_frames / codec.frame_rate


def to_loudness(waveform: Waveform, rate: int, target: float) -> Waveform:
    """Scale [C, N] to `target` LUFS (ITU-R BS.1770-4), or as far as the peak stays within 1."""
    import pyloudnorm  # type: ignore[import-untyped, unused-ignore]

    found = pyloudnorm.Meter(rate).integrated_loudness(waveform.T)
    if not math.isfinite(found):  # nothing above the standard's gate of -70 LUFS
        raise SilentError
    gain = min(10 ** ((target - found) / 20), 1 / float(np.abs(waveform).max()))
    return waveform * np.float32(gain)


# --- --info --------------------------------------------------------------------------------------


def print_info(patterns: Sequence[str]) -> int:
    """Print header and statistics of every file; the exit code says whether all were valid."""
    failed = 0
    for path in find_npq_files(patterns):
        try:
            header = npq.read_header(path)
            npq.check_codes(header)
            print("\n".join(info_lines(header)))
        except npq.NpqError as error:
            failed += 1
            print(f"FAILED {error}")
    return int(failed > 0)


def info_lines(h: npq.NpqHeader) -> list[str]:
    """Header, and per codebook how many entries are used and the entropy; codes must be valid."""
    channels = f"mid + {h.side_codebooks} of them side" if h.side_codebooks else "mono"
    lines = [
        f"{h.path}: {h.layout}, {h.num_codebooks} codebooks ({channels}), {h.file_size:,} bytes",
        f"  {h.num_frames:,} frames at {h.frame_rate:.4f} frames/s: {h.hours * 3600:.1f} s, "
        f"source {h.bitrate:.0f} kbit/s",
        "  codebook  vocab size  used          entropy (nats)",
    ]
    codes = npq.map_codes(h)
    for k, size in enumerate(h.vocab_sizes):
        counts = np.bincount(codes[:, k], minlength=size)
        share = counts[counts > 0] / h.num_frames
        entropy = -float(np.sum(share * np.log(share)))
        lines.append(
            f"  {k:8}  {size:10}  {len(share):5} ({len(share) / size:4.0%})  {entropy:8.3f}"
        )
    return lines


# --- main ----------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the door; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_args(parser, args)
    suffixes, new_suffix = ((".npq",), ".wav") if args.decode else (AUDIO_SUFFIXES, ".npq")
    try:
        if args.info:
            return print_info(args.inputs)
        jobs = find_jobs(args.inputs, args.out_dir, suffixes, new_suffix)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    todo = [job for job in jobs if args.overwrite or not is_done(job, args)]
    report = Report(done_before=len(jobs) - len(todo))
    coder = Coder(args, report)
    try:
        report.run(todo, coder.decode if args.decode else coder.encode)
    except CodecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\n".join([*report.lines(), "interrupted; the same command goes on from here"]))
        return 130
    print("\n".join(report.lines()))
    return int(bool(report.failed))


if __name__ == "__main__":
    sys.exit(main())
