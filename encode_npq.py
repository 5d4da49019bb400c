"""Audio to .npq token files, and back.

    python encode_npq.py music/ --out-dir npq_out             # and its folders
    python encode_npq.py "*.flac" --out-dir npq_out --stereo  # mid + side
    python encode_npq.py music/ --out-dir npq_out --offsets 4 # 4 encodings
    python encode_npq.py npq_out --decode --out-dir wav_out   # back to .wav
    python encode_npq.py npq_out --info                       # headers, usage

Finished files are skipped, so that the same command goes on after an interruption; files made with
another codec or other flags are refused until --overwrite is given. Memory: one waveform at a time,
0.6 GB for an hour of mono at 44.1 kHz.

Exit codes: 0 done, 1 failed (a file, or all), 2 wrong usage; interrupted: 129, 130, 143.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import itertools
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P and -I leave it out
    from cli.command_line import report_import_errors

    report_import_errors()

import numpy as np
from tqdm import tqdm

from cli.command_line import (
    EXIT_DONE,
    EXIT_FAILED,
    FlagParser,
    UsageError,
    at_least,
    exit_code_of,
    file_path,
    in_words,
    number,
    print_result,
    problem,
    say,
    unexpected,
)
from cli.disk import check_writable, replace
from cli.file_search import Found, FoundFile, NothingFoundError, Wanted, search
from run_folder.names import is_of_a_run, is_sample
from sound import npq_format as npq
from sound.audio_file import SilentError, read_audio, resample, starts_as_audio, write_wav
from sound.codec import CodecError, load_codec
from sound.corpus import shifted_name
from sound.done_before import Job, Judge, sort_out
from sound.origin import Record, find_all
from sound.statistics import entropy

if TYPE_CHECKING:
    from sound.audio_file import Waveform
    from sound.codec import Codec

# fmt: off
AUDIO_SUFFIXES = (
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".caf", ".w64",
    ".rf64",
)
UNREADABLE = (  # sound that libsndfile cannot read, or whose end cannot be found here
    ".m4a", ".m4b", ".m4p", ".mp4", ".aac", ".adts", ".alac", ".3gp", ".amr", ".ac3", ".eac3",
    ".dts", ".wma", ".asf", ".ape", ".wv", ".tta", ".tak", ".ofr", ".shn", ".mpc", ".mka", ".weba",
    ".webm", ".spx", ".ra", ".rm", ".dsf", ".dff", ".voc", ".sph", ".8svx", ".iff", ".avr", ".paf",
    ".sd2", ".aa", ".aax", ".au", ".snd", ".mp2", ".mp1",
)
# fmt: on
LOUDNESS_BLOCK = 0.4  # seconds; ITU-R BS.1770-4 measures no less
NPQ = Wanted((".npq",), recognises=npq.starts_as_npq)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

# --- flags ---------------------------------------------------------------------------------------

ENCODING = ("codebooks", "offsets", "stereo", "mid_codebooks", "side_codebooks", "loudness")
WRITING = ("out_dir", "overwrite", "decode")


def build_parser() -> FlagParser:
    """All flags, by group."""
    parser = FlagParser(__file__, usage="%(prog)s AUDIO [AUDIO ...] --out-dir DIR [flags]")
    loudness = number("a number > -70 and <= 0", lambda x: -70 < x <= 0)
    codebooks = at_least(1, npq.MAX_CODEBOOKS)

    # fmt: off
    add = parser.add_argument_group("files").add_argument
    add("inputs", type=file_path, nargs="*", metavar="AUDIO",
        help="folders (with all in them), quoted globs or files; .npq with --decode and --info")
    add("--out-dir", type=lambda text: Path(file_path(text)), metavar="DIR",
        help="where the files go; folders are mirrored")
    add("--overwrite", action="store_true",
        help="do again what is done, and replace what is there and was made otherwise")

    add = parser.add_argument_group("instead of encoding").add_argument
    add("--decode", action="store_true", help="turn .npq files into .wav")
    add("--info", action="store_true", help="print headers and code statistics, write nothing")

    add = parser.add_argument_group("codec").add_argument
    add("--codec", type=file_path, default="44khz", metavar="CODEC",
        help="a path of DAC weights, demo (bundled, lo-fi), or official: 16khz, 24khz, 44khz")
    add("--device", metavar="DEVICE",
        help="cpu, cuda, cuda:1 or mps; without it cpu to decode, the best present to encode")
    add("--codebooks", type=codebooks, help="keep the first so many; without it all")
    add("--offsets", type=at_least(1, 16), metavar="N",
        help="encode each file N times, shifted by parts of a frame: other codes of the same "
        "sound, from which train_rvq.py learns more")

    add = parser.add_argument_group("sound").add_argument
    add("--stereo", action="store_true", help="code mid and side (NPQ2), not a mono downmix")
    add("--mid-codebooks", type=codebooks, help="with --stereo; without it 9")
    add("--side-codebooks", type=codebooks, help="with --stereo; without it 4")
    add("--loudness", type=loudness, metavar="LUFS",
        help="bring each file to this loudness, e.g. -16; peaks never clip")
    # fmt: on
    return parser


def settle(flags: argparse.Namespace) -> None:
    """Refuse flags that contradict each other; fill in the defaults that depend on others.

    Raises:
        UsageError: flags that do not fit together.
    """
    if not flags.inputs:
        raise UsageError("nothing to work on: name folders, quoted globs or files")
    unset = (None, False)  # by identity: a loudness of 0 equals False
    given = {n for n in (*ENCODING, *WRITING) if not any(getattr(flags, n) is u for u in unset)}
    for action, unfit in (("info", (*WRITING, *ENCODING)), ("decode", ENCODING)):
        if getattr(flags, action) and (odd := [name for name in unfit if name in given]):
            raise UsageError(f"--{odd[0].replace('_', '-')} does not go with --{action}; drop one")
    if not flags.info and flags.out_dir is None:
        raise UsageError("--out-dir is missing: say where the files go")
    if flags.stereo and flags.codebooks:
        raise UsageError("--codebooks is for mono; use --mid-codebooks and --side-codebooks")
    if not flags.stereo and given & {"mid_codebooks", "side_codebooks"}:
        raise UsageError("--mid-codebooks and --side-codebooks need --stereo")
    if flags.stereo:
        flags.codebooks = flags.mid_codebooks or 9
    flags.side_codebooks = (flags.side_codebooks or 4) if flags.stereo else 0
    flags.offsets = flags.offsets or 1
    flags.device = flags.device or ("cpu" if flags.decode else "best")


# --- what there is to do -------------------------------------------------------------------------


def find_files(flags: argparse.Namespace) -> Found:
    """The files that the flags name: audio to encode, or .npq to decode or describe.

    Raises:
        UsageError: there is no usable file.
    """
    wanted = NPQ
    if not (flags.decode or flags.info):
        wanted = Wanted(AUDIO_SUFFIXES, UNREADABLE, starts_as_audio, is_sample, is_of_a_run)
    try:
        return search(flags.inputs, wanted)
    except NothingFoundError as error:
        raise UsageError(f"{error}; name folders, quoted globs or files") from error


def find_jobs(
    files: Iterable[FoundFile], out_dir: Path, new_suffix: str, parts: int = 1
) -> list[Job]:
    """A job for each file and each shift by parts of a frame; the targets mirror the folders.

    Raises:
        UsageError: files would give the same target, or one would be written over itself.
    """
    sources: dict[Path, list[tuple[str, int]]] = {}  # and parts, by target
    for (path, root), part in itertools.product(files, range(parts)):
        target = out_dir / Path(path).relative_to(root).with_suffix(new_suffix)
        target = target.with_name(shifted_name(target.name, part, parts))
        sources.setdefault(target, []).append((path, part))
        if os.path.realpath(target) == os.path.realpath(path):
            raise UsageError(f"{path} would be written over itself; use another --out-dir")
    clashes = [
        f"{' and '.join(path for path, _ in of)} would become {target}"
        for target, of in sources.items() if len(of) > 1
    ]  # fmt: skip
    if clashes:
        remedy = "rename one of each, name the folder above both, or use two --out-dir"
        lines = clashes if len(clashes) > 1 else []
        what = f"{len(clashes)} names would be taken twice" if lines else clashes[0]
        raise UsageError("\n  ".join([f"{what}, nothing was done; {remedy}", *lines]))
    return [Job(Path(path), target, part) for target, ((path, part),) in sources.items()]


def make_out_dir(folder: Path) -> None:
    """Make the folder of the targets; raises UsageError where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
    except OSError as error:
        raise UsageError(f"--out-dir {in_words(error)}") from error


# --- how it goes ---------------------------------------------------------------------------------


AGAIN, SILENT, FAILED = "of before made again", "silent, not encoded", "FAILED"
TWICE = "with the same audio as another, encoded all the same"


@dataclass
class Report:
    """The outcome for each file."""

    done: int = 0
    done_before: int = 0
    unknown: int = 0
    seconds: float = 0.0  # of audio
    files: dict[str, list[str]] = field(  # by what is said of them, in the order of the summary
        default_factory=lambda: {title: [] for title in (AGAIN, SILENT, TWICE, FAILED)}
    )
    start: float = field(default_factory=time.monotonic)

    @property
    def pace(self) -> str:
        """Hours of audio so far, and the speed."""
        speed = self.seconds / max(time.monotonic() - self.start, 1e-9)
        return f"{self.seconds / 3600:.2f} hours, {speed:.1f}x real time"

    def lines(self) -> list[str]:
        """Summary for the console: totals, then every silent, repeated or failed file."""
        lines = [f"{self.done} files written, {self.done_before} done before ({self.pace})"]
        if self.unknown:
            lines.append(
                f"{self.unknown} of unknown origin left as they are: no record tells the codec and "
                "flags that made them (--overwrite makes them anew)"
            )
        for title, files in self.files.items():
            if files:
                lines += [f"{len(files)} {title}:", *(f"  {file}" for file in files)]
        return lines


def do_all(
    jobs: Sequence[Job], work: Callable[[Job], float], report: Report, *, debug: bool
) -> None:
    """Do every job; a file that cannot be coded is noted and does not end the run.

    A progress bar on a terminal, plain lines elsewhere.

    Raises:
        CodecError, OSError: an error that every other file would meet too.
    """
    with tqdm(jobs, unit="file", miniters=1, leave=False, disable=not sys.stderr.isatty()) as bar:
        for count, job in enumerate(bar, 1):
            outcome = "ok"
            try:
                job.target.parent.mkdir(parents=True, exist_ok=True)
                report.seconds += work(job)
                report.done += 1
                if job.why:
                    report.files[AGAIN].append(f"{job.target}: {job.why}")
            except CodecError:
                raise
            except SilentError as error:
                outcome = "silent"
                report.files[SILENT].append(f"{job.source}: {error.found}")
            except Exception as error:
                if isinstance(error, OSError) and error.errno in NO_ROOM:
                    raise OSError(error.errno, error.strerror, str(job.target)) from error
                outcome, where = "failed", f"{job.source}: "
                is_told = isinstance(error, (OSError, ValueError, RuntimeError)) and str(error)
                why = in_words(error) if is_told else unexpected(error)
                report.files[FAILED].append(where + why.splitlines()[0].removeprefix(where))
                if debug:
                    traceback.print_exc()
            bar.set_postfix_str(report.pace)
            if bar.disable:
                say(f"[{count}/{len(jobs)}] {job.source}: {outcome} ({report.pace})")


# --- one file ------------------------------------------------------------------------------------


class Coder:
    """Encodes or decodes a file at a time; the codec is loaded when the first file needs it."""

    def __init__(self, judge: Judge, report: Report) -> None:
        self.flags, self.judge, self.report = judge.flags, judge, report
        self.seen: dict[bytes, Path] = {}  # digest of the audio -> the first file that held it

    @cached_property
    def codec(self) -> Codec:
        """The codec; raises CodecError where it has fewer codebooks than the flags request."""
        codec = load_codec(self.flags.codec, self.flags.device)
        asked = max(self.flags.codebooks or 1, self.flags.side_codebooks)
        if asked > (most := codec.num_codebooks):
            which = "--mid-codebooks and --side-codebooks" if self.flags.stereo else "--codebooks"
            raise CodecError(
                f"codec {self.flags.codec!r} has {most} codebooks, found {asked} asked for; "
                f"set {which} to at most {most}"
            )
        return codec

    def encode(self, job: Job) -> float:
        """Turn audio into .npq; returns the seconds of audio."""
        import torch
        import torch.nn.functional as F

        source = job.source.stat()  # before it is read: it may change meanwhile
        waveform, rate = read_audio(job.source, stereo=self.flags.stereo)
        seconds: float = waveform.shape[1] / rate
        first = self.seen.setdefault(hashlib.blake2b(waveform.data).digest(), job.source)
        if first != job.source and not job.part:
            self.report.files[TWICE].append(f"{job.source} = {first}")
        if self.flags.loudness is not None:
            waveform = to_loudness(waveform, rate, self.flags.loudness, job.source)
        resampled = torch.from_numpy(resample(waveform, rate, self.codec.sample_rate))
        gone = job.part * self.codec.hop_length // self.flags.offsets
        resampled = F.pad(resampled[:, gone:], (0, gone))  # as many frames for each shift
        k_side = self.flags.side_codebooks
        codes = self.codec.encode_channels(resampled, self.flags.codebooks, k_side)
        settings = self.judge.settings(job, codes.shape[1] - k_side, self.codec.num_codebooks)
        with self.published(job, settings, source) as path:
            npq.write_npq(
                path,
                codes.numpy(),
                vocab_sizes=[self.codec.codebook_size] * codes.shape[1],
                frame_rate=self.codec.frame_rate,
                bitrate=source.st_size * 8 / 1000 / seconds,
                side_codebooks=k_side,
            )
        return seconds

    def decode(self, job: Job) -> float:
        """Turn .npq into .wav; returns the seconds of audio."""
        import torch

        source = job.source.stat()
        if job.target.exists() and not (self.flags.overwrite or job.why):  # an original, perhaps
            raise ValueError(f"{job.target} is there and is older; --overwrite replaces it")
        header, codec = npq.read_header(job.source), self.codec
        side = header.side_codebooks
        if odd := codec.mismatch(header.vocab_sizes, side, header.frame_rate):
            wanted = f"at most {odd[0]}, as codec {self.flags.codec!r} has"
            remedy = "name the codec that made the file: --codec"
            raise npq.NpqError(job.source, "codes", wanted, odd[1], remedy)
        codes = npq.map_codes(header)
        shape = 2 if side else 1, len(codes) * codec.hop_length
        read = lambda a, b: torch.from_numpy(codes[a:b].astype(np.int64))  # noqa: E731
        chunks = codec.decode_channels(read, len(codes), side)
        with self.published(job, self.judge.settings(job, 0, 0), source) as path:
            write_wav(path, chunks, codec.sample_rate, shape)
        return header.num_frames / codec.frame_rate

    @contextlib.contextmanager
    def published(
        self, job: Job, settings: dict[str, Any], source: os.stat_result
    ) -> Iterator[Path]:
        """A path to write to, which becomes the target once its record is written."""
        path = job.target.with_name(f".encode_npq.{os.getpid()}.tmp")
        try:
            yield path
            self.judge.records.add(job.target, path, self.judge.codec, settings, source)
            replace(path, job.target)
        finally:
            path.unlink(missing_ok=True)


def to_loudness(waveform: Waveform, rate: int, target: float, path: Path) -> Waveform:
    """Scale [C, N] of `path` to `target` LUFS (ITU-R BS.1770-4), or as far as peaks stay within 1.

    Raises:
        SilentError: nothing is louder than -70 LUFS.
        ValueError: too short to be measured.
    """
    import pyloudnorm  # type: ignore[import-untyped, unused-ignore]

    if waveform.shape[1] <= LOUDNESS_BLOCK * rate:
        seconds = waveform.shape[1] / rate
        raise ValueError(
            f"expected more than {LOUDNESS_BLOCK} s of audio to measure its loudness, "
            f"found {seconds:.2f} s; leave it or --loudness out"
        )
    found = pyloudnorm.Meter(rate).integrated_loudness(waveform.T)
    if not math.isfinite(found):  # nothing above the standard's gate of -70 LUFS
        raise SilentError(path, "sound above -70 LUFS", "quieter than that throughout")
    gain = min(10 ** ((target - found) / 20), 1 / float(np.abs(waveform).max()))
    return waveform * np.float32(gain)


# --- --info --------------------------------------------------------------------------------------


def print_info(found: Found) -> int:
    """Print header and statistics of every file; the exit code says whether all were valid."""
    failed = 0
    for path, _ in (*found.files, *found.unusable):
        try:
            header = npq.read_header(path)
            crc = npq.check_codes(header)
            (record,) = find_all([(os.path.realpath(path), header.file_size, crc)])
            print_result("\n".join((*info_lines(header), origin_line(record))))
        except npq.NpqError as error:
            failed += 1
            problem(str(error))
    for line in found.lines():
        say(line)
    return EXIT_FAILED if failed else EXIT_DONE


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
    for k, (size, nats) in enumerate(zip(h.vocab_sizes, entropy(codes), strict=True)):
        used = len(np.unique(codes[:, k]))
        lines.append(f"  {k:8}  {size:10}  {used:5} ({used / size:4.0%})  {nats:8.3f}")
    return lines


def origin_line(record: Record | None) -> str:
    """The codec and the settings that made a file, as a line of --info."""
    if record is None:
        return "  made by an unknown codec: no record of it"
    said = ", ".join(f"{name.replace('_', ' ')} {v}" for name, v in record.settings.items())
    return f"  made by codec {record.codec_id}: {said}"


# --- main ----------------------------------------------------------------------------------------


def run(flags: argparse.Namespace) -> int:
    """Do the work that the flags request; returns the exit code."""
    settle(flags)
    found = find_files(flags)
    if flags.info:
        return print_info(found)
    jobs = find_jobs(found.files, flags.out_dir, ".wav" if flags.decode else ".npq", flags.offsets)
    judge = Judge(flags)
    todo, done, unknown = sort_out(jobs, judge)
    report = Report(done_before=done, unknown=unknown)
    report.files[FAILED] += [f"{path}: {why}" for path, why in found.unusable]
    if todo:
        make_out_dir(flags.out_dir)
        if flags.device != "best":
            from cli.device import pick_device  # torch takes seconds

            flags.device = str(pick_device(flags.device))
    coder = Coder(judge, report)
    try:
        do_all(todo, coder.decode if flags.decode else coder.encode, report, debug=flags.debug)
    finally:
        say("\n".join((*report.lines(), *found.lines())))
    if failed := len(report.files[FAILED]):
        count = f"{failed} of {len(jobs) + len(found.unusable)} files failed"
        problem(f"{count}, each row says why; the same command tries them again")
    return EXIT_FAILED if failed else EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    flags = build_parser().parse_args(argv)
    return exit_code_of(
        lambda: run(flags),
        expected=(CodecError, OSError),
        debug=flags.debug,
        interrupted="interrupted; the same command goes on from here",
    )


if __name__ == "__main__":
    sys.exit(main())
