"""Chunked against whole-file coding: equal codes? the same sound? at what cost?

python benchmarks/codec_roundtrip.py                                # 60 s that it makes up
python benchmarks/codec_roundtrip.py song.flac --codec 44khz --seconds 120
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sound.codec import CHUNK_FRAMES, Codec, load_codec, read_audio, resample

WHOLE = 1 << 40  # frames: one chunk, however long the file is


def synthesise(seconds: float, rate: int) -> np.ndarray:
    """Decaying chords with vibrato and noise bursts, float32 [1, N]: every half second another."""
    random, time_s = np.random.default_rng(0), np.arange(int(seconds * rate)) / rate
    notes = 55 * 2 ** (random.integers(0, 36, (int(seconds * 2) + 1, 3)) / 12)  # Hz
    since_onset = time_s % 0.5
    waveform = 0.1 * random.standard_normal(len(time_s)) * np.exp(-60 * since_onset)
    for pitch in notes[(time_s * 2).astype(int)].T:
        phase = 2 * np.pi * pitch * since_onset + 0.3 * np.sin(2 * np.pi * 5 * time_s)
        for partial in range(1, 6):
            waveform += 0.08 / partial * np.sin(partial * phase) * np.exp(-3 * since_onset)
    return waveform.astype(np.float32)[None]


def si_sdr(estimate: torch.Tensor, reference: torch.Tensor) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (arXiv:1811.02508)."""
    estimate, reference = estimate.double(), reference.double()
    target = reference * (estimate * reference).sum() / reference.square().sum()
    return float(10 * torch.log10(target.square().sum() / (estimate - target).square().sum()))


def timed(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float, float]:
    """Result, seconds, and the process's peak memory so far in MB (ru_maxrss: KB on Linux)."""
    start = time.perf_counter()
    result = work()
    elapsed = time.perf_counter() - start
    return result, elapsed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(codec: Codec, waveform: torch.Tensor, chunk_frames: int) -> None:
    seconds = waveform.shape[1] / codec.sample_rate
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    # Chunked first: the peak only ever grows, and whole coding is what needs the most.
    codes, encode_s, encode_mb = timed(lambda: codec.encode(waveform, chunk_frames=chunk_frames))
    sound, decode_s, decode_mb = timed(lambda: codec.decode(codes, chunk_frames=chunk_frames))
    whole, whole_encode_s, whole_encode_mb = timed(
        lambda: codec.encode(waveform, chunk_frames=WHOLE)
    )
    whole_sound, whole_decode_s, whole_decode_mb = timed(
        lambda: codec.decode(codes, chunk_frames=WHOLE)
    )
    same = codes == whole
    inner = same[:, codec.context : -codec.context].double().mean()
    print(
        f"  codes equal         {same.double().mean():.4%}, away from the file's ends {inner:.4%}"
    )
    print(
        f"  SI-SDR              {si_sdr(sound, whole_sound):.1f} dB, chunked against whole decode"
    )
    original = si_sdr(sound[:, : waveform.shape[1]], waveform)
    print(f"  SI-SDR              {original:.1f} dB, decoded against the audio itself")
    for name, chunked_s, whole_s, chunked_mb, whole_mb in (
        ("encode", encode_s, whole_encode_s, encode_mb, whole_encode_mb),
        ("decode", decode_s, whole_decode_s, decode_mb, whole_decode_mb),
    ):
        print(f"  {name}              {seconds / chunked_s:.1f}x real time chunked, "
              f"{seconds / whole_s:.1f}x whole; peak memory so far {chunked_mb:.0f} MB chunked, "
              f"{whole_mb:.0f} MB whole ({loaded:.0f} MB before)")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="audio; default: 60 s that the program makes up")
    parser.add_argument("--codec", default="demo", help="44khz, 24khz, 16khz, demo or a path")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or best")
    parser.add_argument("--seconds", type=float, default=60.0, help="take this much of each")
    parser.add_argument("--chunk-frames", "--chunk_frames", type=int, default=CHUNK_FRAMES,
                        help="frames of a chunk")  # fmt: skip
    args = parser.parse_args(argv)

    codec = load_codec(args.codec, args.device)
    print(f"codec {args.codec}: {codec.num_codebooks} x {codec.codebook_size} at "
          f"{codec.frame_rate:.2f} frames/s, chunks of {args.chunk_frames} + 2 x {codec.context} "
          f"frames, {args.device}, {torch.get_num_threads()} threads")  # fmt: skip
    for file in args.files or [None]:
        if file is None:
            waveform = synthesise(args.seconds, codec.sample_rate)
        else:
            waveform = resample(*read_audio(file), codec.sample_rate)
        waveform = waveform[:, : int(args.seconds * codec.sample_rate)]
        print(f"{file or 'made up'}: {waveform.shape[1] / codec.sample_rate:.1f} s")
        measure(codec, torch.from_numpy(np.ascontiguousarray(waveform)), args.chunk_frames)
    return 0


if __name__ == "__main__":
    sys.exit(main())
