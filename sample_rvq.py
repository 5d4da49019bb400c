r"""Draw music from a checkpoint: codes, and their sound.

    python sample_rvq.py rvq_ckpts/rvq_9cb_best.pt --frames 1290 --out song.wav
    python sample_rvq.py rvq_ckpts/rvq_9cb_best.pt --frames 1290 --out more.wav --prompt song.flac
    python sample_rvq.py rvq_ckpts/rvq_9cb_best.pt --frames 1290 --npq-out song.npq --seed 3 \
        --compare "held_out/*.npq"

A prompt is an .npq file or audio; the sample carries it on. Exit code: 0 done, 1 failed, 2 wrong
usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from checkpointing import CheckpointError, load_checkpoint
from code_statistics import compare, describe, read_excerpts
from codec import AudioError, CodecError, load_codec, read_audio, resample, write_wav
from model import CodesTransformer, ModelConfig
from npq_dataset import Spans, WindowDataset, find_npq_files, scan_corpus
from npq_format import NpqError, map_codes, read_header, write_npq
from sampling import Draw, generate


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    add = parser.add_argument
    add("checkpoint", help="any checkpoint of train_rvq.py")
    add("--frames", type=int, default=1290, help="new frames to draw; 1290 are 15 s at 44.1 kHz")
    add("--out", metavar="FILE.wav", help="where the sound goes")
    add("--npq-out", "--npq_out", metavar="FILE.npq", help="where the codes go")
    add("--prompt", metavar="FILE", help=".npq or audio to carry on")
    add("--prompt-frames", "--prompt_frames", type=int, help="use only its first so many frames")
    add("--with-prompt", "--with_prompt", action="store_true", help="write the prompt too")
    add("--samples", type=int, default=1, help="how many at once; names get _1, _2 ...")
    add("--temperature", type=numbers(float), default=[1.0], help="a value, or a comma list of K")
    add("--top-k", "--top_k", type=numbers(int), default=[0], help="likewise; 0 = all entries")
    add("--top-p", "--top_p", type=numbers(float), default=[1.0], help="likewise; 1 = all")
    add("--seed", type=int, default=0, help="the same seed draws the same codes")
    add("--ctx", type=int, help="frames the model looks back; without it as in training")
    add("--raw", action="store_true", help="raw weights, not their average (EMA)")
    add("--codec", help="44khz, 24khz, 16khz, demo or a path; without it as in training")
    add("--compare", nargs="+", metavar="GLOB",
        help=".npq files of music; print how far the samples' statistics are from theirs")
    add("--device", default="best", help="of the model; decoding is on the CPU")
    add("--amp", action=argparse.BooleanOptionalAction,
        help="products in bfloat16; without it as in training")
    add("--compile", action="store_true", help="pays from some thousand frames on")
    # fmt: on
    return parser


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Argument type: a number or a comma list of them."""

    def parse(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected numbers, found {text!r}") from error

    return parse


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags that make sense together; else exits with code 2."""
    parser = build_parser()
    flags = parser.parse_args(argv)
    if not flags.out and not flags.npq_out:
        parser.error("name --out FILE.wav, --npq-out FILE.npq or both")
    for name in ("frames", "samples"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name}: expected at least 1, found {getattr(flags, name)}")
    for path in filter(None, (flags.out, flags.npq_out)):
        if not Path(path).parent.is_dir():
            parser.error(f"{path}: its folder does not exist; create it first")
    return flags


def load_model(checkpoint: dict[str, Any], *, raw: bool, device: str) -> CodesTransformer:
    """The checkpoint's model in evaluation mode, with averaged or raw weights."""
    if device == "best":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = CodesTransformer(ModelConfig.from_dict(checkpoint["architecture"]))
    model.load_state_dict(checkpoint["model" if raw else "ema"])
    return model.to(device).eval()


def read_prompt(
    flags: argparse.Namespace, checkpoint: dict[str, Any], codec_name: str
) -> torch.Tensor | None:
    """Codes [T, K] of the prompt, from .npq or audio, with as many codebooks as the model has."""
    if flags.prompt is None:
        return None
    k, side = len(checkpoint["architecture"]["vocab_sizes"]), checkpoint["data"]["side_codebooks"]
    if flags.prompt.endswith(".npq"):
        codes = torch.from_numpy(map_codes(read_header(flags.prompt)).astype(np.int64))
    else:
        codec = load_codec(codec_name)
        waveform, rate = read_audio(flags.prompt, stereo=side > 0)
        waveform = resample(waveform, rate, codec.sample_rate)
        codes = codec.encode_channels(torch.from_numpy(waveform), k - side, side)
    if codes.shape[1] < k:
        raise ValueError(
            f"{flags.prompt}: expected {k} codebooks, found {codes.shape[1]}; encode it with more"
        )
    return codes[: flags.prompt_frames, :k]


def read_music(flags: argparse.Namespace, checkpoint: dict[str, Any]) -> WindowDataset | None:
    """The music of --compare, whole files, with the model's codebooks."""
    if flags.compare is None:
        return None
    k, side = len(checkpoint["architecture"]["vocab_sizes"]), checkpoint["data"]["side_codebooks"]
    corpus = scan_corpus(find_npq_files(flags.compare), ctx=2, codebooks=k)
    if corpus.side_codebooks != side:
        raise ValueError(
            f"--compare: expected {side} side codebooks of {k}, found {corpus.side_codebooks}; "
            "name files encoded as the training data"
        )
    frames = corpus.files["frames"]
    spans = Spans(frames * 0, frames, "whole files")
    return WindowDataset(corpus, spans, ctx=flags.frames, stride=flags.frames)


def compare_samples(codes: torch.Tensor, music: WindowDataset) -> None:
    """Print how far each sample [frames, K] is from the music; codes [samples, frames, K]."""
    excerpts = read_excerpts(music, codes.shape[1])
    for i, sample in enumerate(codes):
        name = f"sample {i + 1}: " if len(codes) > 1 else ""
        print(name + describe(compare(sample.numpy(), excerpts)))


def numbered(path: str, index: int, count: int) -> Path:
    """`song.wav`, or `song_2.wav` when several samples are drawn."""
    whole = Path(path)
    return whole if count == 1 else whole.with_name(f"{whole.stem}_{index + 1}{whole.suffix}")


def draw_samples(
    flags: argparse.Namespace, checkpoint: dict[str, Any], prompt: torch.Tensor | None
) -> torch.Tensor:
    """Codes [samples, frames, K], with a progress bar that tells how much faster than real time."""
    model = load_model(checkpoint, raw=flags.raw, device=flags.device)
    k, frame_rate = model.config.num_codebooks, checkpoint["data"]["frame_rate"]
    draw = Draw.of(k, flags.temperature, flags.top_k, flags.top_p)
    mixed = checkpoint["flags"].get("amp", False) if flags.amp is None else flags.amp
    started = time.perf_counter()
    with tqdm(total=flags.frames, unit="frame", disable=None) as bar:

        def on_frame() -> None:
            seconds = time.perf_counter() - started
            bar.set_postfix_str(f"{(bar.n + 1) / frame_rate / seconds:.2f} x real time", False)
            bar.update()

        codes = generate(
            model,
            flags.frames,
            ctx=flags.ctx or checkpoint["flags"]["ctx"],
            draw=draw,
            seed=flags.seed,
            batch=flags.samples,
            prompt=prompt,
            compiled=flags.compile,
            dtype=torch.bfloat16 if mixed else None,
            on_frame=on_frame,
        ).cpu()
    seconds = time.perf_counter() - started
    times = flags.frames / frame_rate / seconds
    print(f"{flags.samples} x {flags.frames} frames in {seconds:.1f} s, {times:.2f} x real time")
    return codes


def write_samples(
    flags: argparse.Namespace,
    checkpoint: dict[str, Any],
    prompt: torch.Tensor | None,
    codes: torch.Tensor,
    codec_name: str,
) -> None:
    """The .npq and .wav files asked for; the prompt is decoded before a sample either way."""
    side = checkpoint["data"]["side_codebooks"]
    before = codes.new_empty((0, codes.shape[2])) if prompt is None else prompt
    kept = 0 if flags.with_prompt else len(before)
    codec = load_codec(codec_name) if flags.out else None
    for i, sample in enumerate(codes):
        whole = torch.cat((before, sample))
        if flags.npq_out:
            header = write_npq(
                numbered(flags.npq_out, i, len(codes)),
                whole[kept:].numpy(),
                vocab_sizes=checkpoint["architecture"]["vocab_sizes"],
                frame_rate=checkpoint["data"]["frame_rate"],
                side_codebooks=side,
            )
            print(f"wrote {header.path}")
        if codec is not None:
            waveform = codec.decode_channels(whole, side)[:, kept * codec.hop_length :]
            path = numbered(flags.out, i, len(codes))
            write_wav(path, waveform.numpy(), codec.sample_rate)
            print(f"wrote {path}")


def main(argv: list[str] | None = None) -> int:
    """Load, draw, write; mistakes become one line and an exit code."""
    flags = parse_flags(argv)
    try:
        checkpoint = load_checkpoint(flags.checkpoint)
        codec_name = flags.codec or checkpoint["flags"]["eval_dac_repo"]
        if flags.out:
            load_codec(codec_name)  # before minutes of drawing, not after
        prompt = read_prompt(flags, checkpoint, codec_name)
        music = read_music(flags, checkpoint)
        codes = draw_samples(flags, checkpoint, prompt)
        write_samples(flags, checkpoint, prompt, codes, codec_name)
        if music is not None:
            compare_samples(codes, music)
    except (CheckpointError, CodecError, AudioError, NpqError, ValueError, OSError) as error:
        print(f"! {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("! interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
