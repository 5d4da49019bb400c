r"""Draw music from a checkpoint: codes and sound; or make shared weights of it.

    python sample_rvq.py rvq_9cb_best.pt --out song.wav
    python sample_rvq.py rvq_9cb_best.pt --out more.wav --prompt song.flac
    python sample_rvq.py rvq_9cb_best.pt --out jazz.wav --label jazz
    python sample_rvq.py rvq_9cb_best.pt --npq-out song.npq --frames 5000 \
        --seed 3
    python sample_rvq.py rvq_9cb_best.pt --out - --frames 300000 | ffplay -
    python sample_rvq.py rvq_9cb_best.pt --export-safetensors tunes.safetensors
    python sample_rvq.py tunes.safetensors --out song.wav --codec 44khz
    python sample_rvq.py rvq_9cb_best.pt --out song.wav --against npq_out
    python sample_rvq.py run/*_epoch_*.pt --samples 3 --page listen.html

A prompt is an .npq file or audio; the sample carries it on.

Exit code: 0 done, 1 failed, 2 wrong usage; interrupted: 129, 130, 143.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P and -I leave it out
    from cli.command_line import report_import_errors

    report_import_errors()

import numpy as np
import torch
from tqdm import tqdm

from cli.command_line import (
    EXIT_DONE,
    EXIT_FAILED,
    FlagParser,
    Several,
    UsageError,
    at_least,
    exit_code_of,
    file_path,
    fraction,
    fraction_or_one,
    list_of,
    not_negative,
    positive,
    problem,
    say,
)
from cli.device import PRECISIONS, fast_precision, pick_device
from cli.disk import check_output
from cli.shortages import is_out_of_memory
from cli.signals import code_of_interruption
from model import CodesTransformer, ModelConfig
from npq_dataset import BadFilesError, WindowDataset, find_npq_files, scan_corpus, split_corpus
from pages.listening_page import Cell, Column, column_of, distinct_names, write_page
from pages.spectrogram import player
from run_folder.checkpoint import CheckpointError
from run_folder.shared_weights import SHARED_KEYS, SUFFIX, export_weights, is_shared, load_parts
from sound.audio_file import AudioError
from sound.codec import Codec, CodecError, check_codec, load_codec
from sound.copying import figures, longest_runs, report_copies
from sound.drawing import STDOUT, TOGETHER, Drawing, is_npq, numbered, read_prompt, write_sample
from sound.labels import labels_in
from sound.npq_format import NpqError
from sound.origin import CodecId, are_different, codec_of
from sound.sampling import Draw, NotFiniteError, load_model, stream

USUAL_CODEC = "44khz"  # where the weights do not say what they were trained with
NEEDED = {"ema", "architecture", "data", "flags", "progress"}
DRAW_FLAGS = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")

# --- flags ---------------------------------------------------------------------------------------


def build_parser() -> FlagParser:
    """All flags, by group."""
    parser = FlagParser(__file__, usage="%(prog)s CHECKPOINT [flags]")
    # fmt: off
    add = parser.add_argument_group("weights").add_argument
    add("checkpoints", type=file_path, nargs="+", metavar="CHECKPOINT",
        help="any checkpoint of train_rvq.py, or shared weights (.safetensors); several for --page")
    add("--raw", action="store_true", help="raw weights, not their average (EMA)")

    add = parser.add_argument_group("output").add_argument
    add("--out", type=file_path, metavar="FILE.wav",
        help="where the sound goes; - is standard output, which it reaches as it is drawn")
    add("--npq-out", type=file_path, metavar="FILE.npq", help="where the codes go")
    add("--page", type=file_path, metavar="FILE.html",
        help="one page to hear and compare the samples of several checkpoints, also blind")
    add("--with-prompt", action="store_true", help="write the prompt too")
    add("--export-safetensors", type=file_path, metavar="FILE.safetensors",
        help="write the EMA weights to share, and a model card beside them; without --out and "
        "--npq-out nothing is drawn")

    add = parser.add_argument_group("what is drawn").add_argument
    add("--frames", type=at_least(1, 10**7), default=1290, metavar="N",
        help="new frames; 1290 are 15 s at 44.1 kHz")
    add("--samples", type=at_least(1, 10**4), default=1, metavar="N",
        help="how many; names get _1, _2 ...")
    add("--prompt", type=file_path, metavar="FILE", help=".npq or audio to carry on")
    add("--prompt-frames", type=at_least(1), metavar="N", help="use only its first so many frames")
    add("--seed", type=at_least(0), default=0, metavar="N",
        help="the same seed draws the same codes, of several samples the same first ones")
    add("--label", metavar="NAME,...",
        help="what to play, of the labels that the model was trained with; an unknown one lists "
        "them, without any it plays as without labels")
    add("--guidance", type=positive, default=1.0, metavar="X",
        help="with --label: by how much more of it than the model itself would play; 2 is clear, "
        "and takes twice the work")
    add("--against", type=file_path, action=Several, nargs="+", metavar="GLOB",
        help=".npq files of the training: tells the longest run of frames that each sample shares "
        "with one, and warns of a copy")

    add = parser.add_argument_group("how it is drawn").add_argument
    add("--temperature", type=list_of(positive), default="1", metavar="X,...",
        help="a value, or a comma list of one for each codebook")
    add("--top-k", type=list_of(at_least(0)), default="0", metavar="N,...",
        help="likewise; draw from the k likeliest codes; 0 = all")
    add("--top-p", type=list_of(fraction_or_one), default="1", metavar="X,...",
        help="likewise; draw from the likeliest codes that hold this much probability")
    add("--min-p", type=list_of(fraction), default="0", metavar="X,...",
        help="likewise; leave out codes less than this many times as likely as the likeliest; "
        "0 = none")
    add("--repeat-penalty", type=list_of(not_negative), default="0", metavar="X,...",
        help="likewise; lower a code's logit by this times its share of the newest 64 frames, "
        "against held chords and silence; 0 = off, 4 is strong")
    add("--ctx", type=at_least(2, 1 << 20), metavar="N",
        help="frames that the model looks back; without it as in training")

    add = parser.add_argument_group("codec and machine").add_argument
    add("--codec", type=file_path, metavar="CODEC",
        help="44khz, 24khz, 16khz, demo or a path; without it as in training, or 44khz where the "
        "weights do not say")
    add("--device", default="best", metavar="NAME",
        help="of the model: best, cpu, cuda, cuda:1 or mps; decoding is on the CPU")
    add("--amp", action=argparse.BooleanOptionalAction,
        help="products in bfloat16; without it as in training")
    add("--compile", action="store_true",
        help="compile the step of a frame, for long samples; on CUDA replay it as a CUDA graph")
    # fmt: on
    return parser


def check_flags(flags: argparse.Namespace) -> None:
    """Raise UsageError where flags do not fit together, or a name cannot be written or read."""
    draws = flags.out or flags.npq_out or flags.page
    if not draws and not flags.export_safetensors:
        raise UsageError(
            "name --out FILE.wav, --npq-out FILE.npq, --page FILE.html or --export-safetensors "
            f"FILE{SUFFIX}"
        )
    if flags.page and (flags.out or flags.npq_out or flags.export_safetensors):
        raise UsageError("--page is written alone; leave --out, --npq-out and the export out")
    if (count := len(flags.checkpoints)) > 1 and not flags.page:
        raise UsageError(f"found {count} checkpoints; name one, or add --page FILE.html")
    for flag in ("against", "prompt", "label"):
        if getattr(flags, flag) is not None and not draws:
            wrong = "nothing is drawn; name --out or --npq-out, or leave it out"
            raise UsageError(f"--{flag}: {wrong}")
    if flags.guidance != 1 and flags.label is None:
        raise UsageError(
            f"--guidance {flags.guidance:g}: there is nothing to guide to; add --label"
        )
    for flag in ("prompt_frames", "with_prompt"):
        if getattr(flags, flag) and not flags.prompt:
            flag = flag.replace("_", "-")
            raise UsageError(f"--{flag}: there is no prompt; name it with --prompt")
    if flags.prompt and not Path(flags.prompt).is_file():
        raise UsageError(f"--prompt {flags.prompt}: no such file; name an .npq or audio file")
    if any(map(is_shared, flags.checkpoints)) and flags.raw:
        raise UsageError("--raw: shared weights are averages (EMA) alone; leave it out")
    if is_shared(flags.checkpoint) and flags.export_safetensors:
        raise UsageError(f"--export-safetensors: {flags.checkpoint} is such a file; copy it")
    if flags.out == STDOUT and flags.samples > 1:
        raise UsageError("--out - takes one sample; leave --samples out, or name --out FILE.wav")
    if flags.out == STDOUT and os.isatty(1):
        raise UsageError("--out -: standard output is a terminal; add `| ffplay -` or `> song.wav`")
    if flags.out != STDOUT:
        check_output("--out", flags.out, ".wav")
    check_output("--page", flags.page, ".html")
    check_output("--npq-out", flags.npq_out, ".npq")
    check_output("--export-safetensors", flags.export_safetensors, SUFFIX)


# --- what the flags name -------------------------------------------------------------------------


def pick_dtype(
    flags: argparse.Namespace, checkpoint: dict[str, Any], device: torch.device
) -> torch.dtype | None:
    """Precision of the products: the run's own where the device is fast in it; None: float32.

    A CPU is slow in fp16, and bf16 rounds more: it draws such a run in float32.
    """
    trained = checkpoint["flags"]
    was_mixed = trained.get("amp", False)
    if not (was_mixed if flags.amp is None else flags.amp):
        return None
    name = trained.get("amp_dtype", "auto") if was_mixed else fast_precision(device)
    if name == "fp16" and device.type == "cpu":
        name = "float32"
    return PRECISIONS["bf16" if name == "auto" else name]


def open_codec(
    flags: argparse.Namespace, checkpoint: dict[str, Any], shared: Shared
) -> Codec | None:
    """The codec of the sound asked for, or of the prompt; before minutes of drawing, not after.

    Raises:
        CodecError: there is no such codec.
        UsageError: it is not the codec of these codes.
    """
    if not flags.out and (flags.prompt is None or is_npq(flags.prompt)):
        return None
    name = flags.codec or checkpoint["flags"].get("eval_dac_repo") or USUAL_CODEC
    codec, sizes = shared.codec(name), checkpoint["architecture"]["vocab_sizes"]
    check_codec(codec, "--codec", name, sizes, checkpoint["data"], problem)
    return codec


def read_draw(flags: argparse.Namespace, checkpoint: dict[str, Any]) -> Draw:
    """How codes are drawn; raises UsageError on a list that is not as long as the codebooks."""
    codebooks = len(checkpoint["architecture"]["vocab_sizes"])
    try:
        return Draw.of(codebooks, *(getattr(flags, flag) for flag in DRAW_FLAGS))
    except ValueError as error:
        raise UsageError(f"--{error}, as many as the model has codebooks") from error


def pick_labels(flags: argparse.Namespace, config: ModelConfig) -> list[str]:
    """The labels asked for; raises UsageError for one that the model does not know."""
    if flags.label is None:
        return []
    labels = labels_in(flags.label, config.labels) or [""]
    try:
        config.numbers_of(labels)
    except ValueError as error:
        raise UsageError(f"--label: {error}") from error
    return list(dict.fromkeys(labels))


def read_training_files(
    against: tuple[str, ...], codebooks: int
) -> tuple[WindowDataset, CodecId | None]:
    """The whole files of --against that have the model's codebooks, and their codec; all checked.

    Raises:
        FileNotFoundError: a pattern matches nothing.
        UsageError: files that are not valid, of two codecs, or none with the model's codebooks.
    """
    paths = find_npq_files(against, tell=say)
    try:
        corpus = scan_corpus(paths, ctx=1, codebooks=codebooks)
    except BadFilesError as error:
        raise UsageError(f"--against: {error}") from error
    for line in (*corpus.summary.lines(), *corpus.summary.warnings):
        say(line)
    whole, _ = split_corpus(corpus, ctx=1, val_split=0)
    return WindowDataset(corpus, whole, ctx=1, stride=1), corpus.summary.codec


class Shared:
    """What several checkpoints may need: each codec, and the files of --against, are read once."""

    def __init__(self) -> None:
        self.codec = functools.cache(load_codec)
        self.music = functools.cache(read_training_files)


class Opened(NamedTuple):
    """What the flags name for a checkpoint, beside its model."""

    draw: Draw
    codec: Codec | None
    prompt: torch.Tensor | None
    music: WindowDataset | None


def open_all(flags: argparse.Namespace, checkpoint: dict[str, Any], shared: Shared) -> Opened:
    """Open all that the flags name, before minutes of drawing and not after them."""
    device_of(flags)  # raises where there is none such
    draw = read_draw(flags, checkpoint)
    codec = open_codec(flags, checkpoint, shared)
    prompt = music = None
    if flags.prompt is not None:
        prompt = read_prompt(flags.prompt, flags.prompt_frames, checkpoint, codec, tell=problem)
    if flags.against is not None:
        music, made = shared.music(tuple(flags.against), len(draw.top_k))
        if are_different(made, trained := codec_of(checkpoint["data"])):
            problem(f"--against: codes of {made}, the training data's are of {trained}")
    return Opened(draw, codec, prompt, music)


def open_model(flags: argparse.Namespace, checkpoint: dict[str, Any]) -> CodesTransformer:
    """The model on its device; computes with the threads that the training found best."""
    count = checkpoint["progress"].get("threads", 0)
    if count and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(count, torch.get_num_threads()))
    model = load_model(checkpoint, flags.checkpoint, raw=flags.raw, device=device_of(flags))
    pick_labels(flags, model.config)  # raises where one is unknown
    return model


def device_of(flags: argparse.Namespace) -> torch.device:
    """The device of --device, by default the best one of this machine."""
    return pick_device(None if flags.device == "best" else flags.device)


# --- drawing -------------------------------------------------------------------------------------


def begin(
    flags: argparse.Namespace,
    checkpoint: dict[str, Any],
    model: CodesTransformer,
    draw: Draw,
    prompt: torch.Tensor | None,
    bar: tqdm[Any],
) -> Iterator[Drawing]:
    """Yield the drawings of all samples asked for, TOGETHER in each; a bar shows their progress."""
    before = torch.empty((0, model.config.num_codebooks)) if prompt is None else prompt
    labels = pick_labels(flags, model.config)
    for first in range(0, flags.samples, TOGETHER):
        # Far from any --seed, as the next seed's sample is another command's first.
        (seed,) = np.random.SeedSequence((flags.seed, first)).generate_state(1, np.uint64)
        source = stream(
            model,
            flags.frames,
            ctx=flags.ctx or checkpoint["flags"]["ctx"],
            draw=draw,
            seed=int(seed >> 1) if first else flags.seed,
            batch=TOGETHER,
            prompt=prompt,
            compiled=flags.compile,
            dtype=pick_dtype(flags, checkpoint, model.bos.device),
            on_frame=bar.update,
            labels=labels,
            guidance=flags.guidance,
        )
        yield Drawing(source, before, flags.frames)


def sample(
    flags: argparse.Namespace, checkpoint: dict[str, Any], opened: Opened, written: list[Path]
) -> list[str]:
    """Draw and write; returns what --against found of each sample."""
    draw, codec, prompt, music = opened
    model = open_model(flags, checkpoint)
    batches, seconds, count = -(-flags.samples // TOGETHER), 0.0, 0
    drawn: list[np.ndarray[Any, Any]] = []
    bar = tqdm(total=flags.frames * batches, unit="frame", miniters=1, disable=None)
    try:
        with bar:
            for drawing in begin(flags, checkpoint, model, draw, prompt, bar):
                for _ in range(min(TOGETHER, flags.samples - count)):
                    for path in write_sample(flags, checkpoint, count, drawing, codec):
                        written.append(path)
                        if not flags.page:  # whose .wav files are temporary
                            say(f"wrote {path}")
                    if music is not None:
                        drawn.append(drawing.read(count % TOGETHER, *drawing.new).numpy())
                    count += 1
                seconds += drawing.seconds
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(
            f"{flags.samples} x {flags.frames} frames do not fit into memory; lower --samples, "
            "--frames or --ctx, or name another --device"
        ) from error
    rate = checkpoint["data"]["frame_rate"]
    times = flags.frames * batches / rate / seconds
    say(f"{flags.samples} x {flags.frames} frames in {seconds:.1f} s, {times:.2f} x real time")
    if music is None:
        return []
    held_out = checkpoint["progress"].get("held_out_run", -1)
    with tqdm(total=music.frames, unit="frame", unit_scale=True, disable=None) as bar:
        shared = longest_runs(drawn, music.tracks(), on_frames=bar.update)
    found = [figures(each, flags.frames, held_out, rate) for each in shared]
    return report_copies(found, tell=say, warn=problem)


# --- the page ------------------------------------------------------------------------------------


def draw_page(flags: argparse.Namespace, needed: set[str]) -> int:
    """Draw from each checkpoint alike, and write the page to compare them by ear.

    All are opened before one is drawn, and one model at a time is in memory. Returns the exit code:
    1 where weights that draw nothing finite left a column without sound.
    """
    each = [argparse.Namespace(**{**vars(flags), "checkpoint": c}) for c in flags.checkpoints]
    columns: list[Column] = []
    opened: list[Opened] = []
    threads, shared = torch.get_num_threads(), Shared()
    with tempfile.TemporaryDirectory() as folder:
        for number, one in enumerate(each):
            one.out = str(Path(folder, f"{number}.wav"))
            with naming(one.checkpoint):
                checkpoint = load_parts(one.checkpoint, needed=needed)
                opened.append(open_all(one, checkpoint, shared))
                open_model(one, checkpoint)
        names = distinct_names(flags.checkpoints)
        for one, name, ready in zip(each, names, opened, strict=True):
            say(f"{name}:")
            torch.set_num_threads(threads)  # of which each run takes those that it trained with
            with naming(one.checkpoint):
                checkpoint = load_parts(one.checkpoint, needed=needed)
                columns.append(draw_column(one, name, checkpoint, ready))
    size = write_page(Path(flags.page), columns, facts_of(flags))
    say(f"wrote {flags.page} ({size}); open it in a browser")
    return EXIT_DONE if all(c.cells[0].player for c in columns) else EXIT_FAILED


@contextlib.contextmanager
def naming(checkpoint: str) -> Iterator[None]:
    """Add the checkpoint to errors that name only a flag, as several are given."""
    try:
        yield
    except (UsageError, CodecError) as error:
        raise type(error)(f"{checkpoint}: {error}") from error


def draw_column(
    flags: argparse.Namespace, name: str, checkpoint: dict[str, Any], opened: Opened
) -> Column:
    """Draw one checkpoint's samples for the page, by way of temporary .wav files."""
    column, count = column_of(flags.checkpoint, name, checkpoint), flags.samples
    try:
        lines = sample(flags, checkpoint, opened, []) or [""] * count
    except NotFiniteError as error:
        problem(f"{flags.checkpoint}: {error}")
        return column._replace(cells=[Cell(None, f"No sound: {error}")] * count)
    paths = [numbered(flags.out, number, count) for number in range(count)]
    players = [player(path, path.stat().st_mtime_ns) for path in paths]
    return column._replace(cells=[*map(Cell, players, lines)])


def facts_of(flags: argparse.Namespace) -> dict[str, Any]:
    """Seed, frames and what else was given of the flags, for the head of the page."""
    usual = vars(build_parser().parse_args(flags.checkpoints))
    shown = vars(flags).keys() - {"checkpoint", "checkpoints", "page", "samples", "debug"}
    given = {n: getattr(flags, n) for n in sorted(shown) if getattr(flags, n) != usual[n]}
    words = {n: ", ".join(map(str, v)) if isinstance(v, list) else v for n, v in given.items()}
    facts = {"seed": flags.seed, "frames": flags.frames, **words}
    return {name.replace("_", " "): fact for name, fact in facts.items()}


# --- main ----------------------------------------------------------------------------------------


def work(flags: argparse.Namespace) -> int:
    """Load, export, draw, write; tells what was written when it is interrupted."""
    flags.checkpoint = flags.checkpoints[0]
    check_flags(flags)
    written: list[Path] = []
    needed = NEEDED | ({"model"} if flags.raw else set())
    try:
        if flags.page:
            return draw_page(flags, needed)
        exports = flags.export_safetensors
        needed |= SHARED_KEYS if exports else set()
        checkpoint = load_parts(flags.checkpoint, needed=needed)
        if exports:
            written.append(export_weights(checkpoint, exports, tell=say))
        if flags.out or flags.npq_out:
            with contextlib.redirect_stdout(sys.stderr if flags.out == STDOUT else sys.stdout):
                sample(flags, checkpoint, open_all(flags, checkpoint, Shared()), written)
    except BrokenPipeError:
        problem("standard output was closed; the sample ends there")
    except KeyboardInterrupt as error:
        done = [*map(str, written), *["what standard output got"] * (flags.out == STDOUT)]
        told = f"already written: {', '.join(done)}" if done else "nothing was written"
        problem(f"interrupted; {told}")
        return code_of_interruption(error)
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Mistakes become one line and an exit code."""
    flags = build_parser().parse_args(argv)
    expected = (CheckpointError, CodecError, AudioError, NotFiniteError, NpqError, OSError)
    return exit_code_of(lambda: work(flags), expected=expected, debug=flags.debug)


if __name__ == "__main__":
    sys.exit(main())
