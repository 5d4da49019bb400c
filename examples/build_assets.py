#!/usr/bin/env python3
"""Rebuild what `examples/` bundles: music tokens, the demo corpus, the tiny codec's decoder.

    python examples/build_assets.py check        # the figures of examples/README.md
    python examples/build_assets.py demo         # the demo corpus, about ten minutes on one core

    apt-get install freedoom fluidsynth fluid-soundfont-gm
    python examples/build_assets.py              # every stage, in the order below

Stages (each needs those before it only where it says so):
  music    Freedoom's music -> build/music/*.wav           needs the three Debian packages
  tokens   build/music -> tokens/train, tokens/val         needs `music`
  demo     melodies -> demo/train, demo/val, corpus.json
  tune     trains the codec's decoder on demo and music    needs `music`; tiny_dac.pth is its result
  check    measures everything and writes check.json       with `music`: the music figures too

`tune` starts from base_decoder.pth and leaves the encoder and the codebooks as they are, so that
tokens keep their meaning. How the base weights came about: examples/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile as sf
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from sound.codec import Codec, load_codec  # noqa: E402
from sound.npq_format import map_codes, read_header, write_npq  # noqa: E402
from sound.statistics import entropy  # noqa: E402

SAMPLE_RATE, HOP = 44_100, 512
FRAME_RATE = SAMPLE_RATE / HOP  # 86.13 frames per second, and the demo's unit of frequency in Hz
CODEBOOKS, VOCAB = 9, 1024
CHUNK_FRAMES = 256  # short chunks stay in a CPU's caches: three times the speed of sound/codec.py

Floats = NDArray[np.float32]
Codes = NDArray[np.uint16]  # [T, K]

# --- the demo's music: just intonation over a fundamental of one frame rate ----------------------
# Every partial is a whole multiple of 44100/512 Hz, so a held note is periodic in one frame of 512
# samples: its frames are identical, and so are its codes, except beside a border between notes.

SCALE = (6, 8, 9, 10, 12, 16)  # so do re mi so do', in multiples of FRAME_RATE: 517 to 1378 Hz
CLOSING_NOTE = 8
CHORDS = {"I": (2, 5, 6), "I7": (2, 5, 7), "V": (3, 6, 9)}  # bass first
CHORD_TONES = {"I": (6, 8, 10, 12, 16), "I7": (6, 8, 10, 12, 16), "V": (6, 9, 12)}
PROGRESSION = ("I", "I7", "V", "I")  # a bar each; one phrase
FORM = "AABA"  # phrases of a piece
STEP_FRAMES, STEPS_PER_BAR = 16, 8
BAR_FRAMES = STEP_FRAMES * STEPS_PER_BAR
PIECES = {"train": range(48), "val": range(48, 56)}
RHYTHMS = ((2, 2, 2, 2), (2, 1, 1, 2, 2), (1, 1, 2, 2, 2), (2, 2, 1, 1, 2), (3, 1, 2, 2))  # steps
CADENCE = (2, 2, 4)
MELODY_PARTIALS = (0.20, 0.09, 0.045, 0.02)  # amplitudes of partials 1 to 4
CHORD_AMPLITUDES = (0.10, 0.04, 0.04)  # a sine each
FADE_SAMPLES = 64  # cross-fade at the start of a note


class Note(NamedTuple):
    """A melody note over a chord for some frames."""

    pitch: int  # multiple of FRAME_RATE
    chord: str
    frames: int


def compose(rng: random.Random) -> list[Note]:
    """A piece of four phrases (AABA), each: motif, motif again, motif moved to V, cadence to do."""
    phrases = {letter: compose_phrase(rng) for letter in sorted(set(FORM))}
    return [note for letter in FORM for note in phrases[letter]]


def compose_phrase(rng: random.Random) -> list[Note]:
    """Four bars over PROGRESSION."""
    rhythm = rng.choice(RHYTHMS)
    moves = [rng.choices((-2, -1, 1, 2), (1, 4, 4, 1))[0] for _ in rhythm[1:]]
    first = rng.choice((8, 10, 12))
    answer = rng.choice(CHORD_TONES["V"])
    starts = (first, first, answer)
    notes = [
        Note(pitch, chord, steps * STEP_FRAMES)
        for start, chord in zip(starts, PROGRESSION, strict=False)
        for pitch, steps in zip(walk(start, moves), rhythm, strict=True)
    ]
    approach = rng.choice(((10, 9), (12, 10), (10, 12), (12, 9)))
    closing = zip((*approach, CLOSING_NOTE), CADENCE, strict=True)
    return notes + [Note(p, PROGRESSION[-1], steps * STEP_FRAMES) for p, steps in closing]


def walk(start: int, moves: Sequence[int]) -> list[int]:
    """Scale notes from `start` on; a move that would leave the scale turns round."""
    places = [SCALE.index(start)]
    for move in moves:
        here = places[-1]
        places.append(here + move if 0 <= here + move < len(SCALE) else here - move)
    return [SCALE[place] for place in places]


def scramble(rng: random.Random, notes: int) -> list[Note]:
    """Notes in any order over any chord: what a model may play that the grammar does not."""
    return [
        Note(rng.choice(SCALE), rng.choice(sorted(CHORDS)), STEP_FRAMES * rng.choice((1, 1, 2)))
        for _ in range(notes)
    ]


def one_frame(pitch: int, chord: str) -> Floats:
    """The 512 samples that a held note repeats."""
    turn = 2 * np.pi * np.arange(HOP) / HOP
    wave = np.zeros(HOP)
    for partial, amplitude in enumerate(MELODY_PARTIALS, start=1):
        wave += amplitude * np.sin(pitch * partial * turn)
    for multiple, amplitude in zip(CHORDS[chord], CHORD_AMPLITUDES, strict=True):
        wave += amplitude * np.sin(multiple * turn)
    return wave.astype(np.float32)


def render(notes: Sequence[Note]) -> Floats:
    """Waveform [sum of frames * 512]; every note begins with its frame."""
    rising = np.linspace(0, 1, FADE_SAMPLES, dtype=np.float32)
    before = np.zeros(HOP, np.float32)
    parts = []
    for note in notes:
        frame = one_frame(note.pitch, note.chord)
        part = np.tile(frame, note.frames)
        part[:FADE_SAMPLES] = rising * frame[:FADE_SAMPLES] + (1 - rising) * before[:FADE_SAMPLES]
        parts.append(part)
        before = frame
    return np.concatenate(parts)


# --- files ---------------------------------------------------------------------------------------


def read_codes(path: Path) -> Codes:
    """All codes [T, K] of a file."""
    return np.array(map_codes(read_header(path)))


def encode(codec: Codec, wave: Floats) -> Codes:
    """Codes [T, K] of a waveform."""
    codes = codec.encode(torch.from_numpy(wave), chunk_frames=CHUNK_FRAMES)
    return codes.numpy().astype(np.uint16)


def write_codes(path: Path, codes: Codes) -> None:
    """Write codes [T, K] as .npq; the bitrate noted is that of 16-bit mono PCM."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_npq(path, codes, vocab_sizes=[VOCAB] * CODEBOOKS, frame_rate=FRAME_RATE, bitrate=705.6)


def decode(codec: Codec, codes: Codes) -> Floats:
    """Waveform [T * 512] of codes [T, K]."""
    as_tensor = torch.from_numpy(codes.astype(np.int64))
    return codec.decode(as_tensor, chunk_frames=CHUNK_FRAMES).numpy()


# --- music: Freedoom's pieces, rendered ----------------------------------------------------------

WADS = "/usr/share/games/doom/{}.wad"
SOUND_FONT = "/usr/share/sounds/sf2/FluidR3_GM.sf2"
LONGEST_SECONDS, LOUDNESS, PEAK = 180, -18.0, 10 ** (-1 / 20)  # s, LUFS, full scale = 1
TRAIN_TRACKS = (  # every fourth of the 59 that the base codec was trained on
    "freedoom1_bunny", "freedoom1_e1m4", "freedoom1_e2m1", "freedoom1_e2m5",
    "freedoom1_e3m3", "freedoom1_e3m7", "freedoom1_intro", "freedoom2_count2",
    "freedoom2_ddtblu", "freedoom2_dm2ttl", "freedoom2_in_cit", "freedoom2_romer2",
    "freedoom2_shawn", "freedoom2_stlks2", "freedoom2_theda2",
)  # fmt: skip
VAL_TRACKS = (  # no training has heard these
    "freedoom1_e1m7", "freedoom1_e1m8", "freedoom1_e2m8",
    "freedoom1_e2m9", "freedoom2_ampie", "freedoom2_openin",
)  # fmt: skip


def make_music(build: Path) -> None:
    """Stage `music`: build/music/<track>.wav, 44.1 kHz mono, from the WAD's MIDI lumps."""
    folder = build / "music"
    folder.mkdir(parents=True, exist_ok=True)
    for track in TRAIN_TRACKS + VAL_TRACKS:
        midi, rendered = folder / f"{track}.mid", folder / f"{track}.tmp.wav"
        midi.write_bytes(music_lump(track))
        fluidsynth = ["fluidsynth", "-ni", "-q", "-r", str(SAMPLE_RATE), "-g", "0.4", "-T", "wav"]
        command = [*fluidsynth, "-O", "float", "-F", str(rendered), SOUND_FONT, str(midi)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        frames = SAMPLE_RATE * (LONGEST_SECONDS + 20)
        stereo = sf.read(rendered, dtype="float32", frames=frames)[0]
        wave = mastered(stereo.mean(1))
        sf.write(folder / f"{track}.wav", wave, SAMPLE_RATE, subtype="PCM_16")
        rendered.unlink()
        print(f"music: {track} {len(wave) / SAMPLE_RATE:.1f} s", flush=True)


def music_lump(track: str) -> bytes:
    """The MIDI file of a track such as freedoom1_e1m7: lump D_E1M7 of freedoom1.wad."""
    wad_name, _, lump_name = track.partition("_")
    wad = Path(WADS.format(wad_name)).read_bytes()
    _, count, directory = struct.unpack_from("<4sII", wad)
    for entry in range(count):
        start, size, name = struct.unpack_from("<II8s", wad, directory + 16 * entry)
        if name.rstrip(b"\0") == f"D_{lump_name.upper()}".encode():
            return wad[start : start + size]
    raise ValueError(f"{WADS.format(wad_name)}: no music lump D_{lump_name.upper()}")


def mastered(wave: Floats) -> NDArray[np.floating[Any]]:
    """Silence off both ends, 180 s at most, fade out, -18 LUFS, soft limit at -1 dB full scale."""
    import pyloudnorm  # type: ignore[import-untyped, unused-ignore]

    loud = np.flatnonzero(np.abs(wave) > 1e-4)
    trimmed = wave[loud[0] : loud[-1] + 1][: SAMPLE_RATE * LONGEST_SECONDS]
    x: NDArray[np.floating[Any]] = trimmed.astype(np.float64)
    x[-SAMPLE_RATE:] *= np.linspace(1, 0, SAMPLE_RATE)
    x = x - x.mean()
    x *= 10 ** ((LOUDNESS - pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(x)) / 20)
    if np.abs(x).max() > PEAK:
        knee, size = 0.7 * PEAK, np.abs(x)
        limited = np.sign(x) * (knee + (PEAK - knee) * np.tanh((size - knee) / (PEAK - knee)))
        x = np.where(size > knee, limited, x)
    return x


def make_tokens(codec: Codec, examples: Path, build: Path) -> None:
    """Stage `tokens`: encode the rendered tracks."""
    for split, tracks in {"train": TRAIN_TRACKS, "val": VAL_TRACKS}.items():
        for track in tracks:
            codes = encode(codec, read_music(build, track))
            write_codes(examples / "tokens" / split / f"{track}.npq", codes)
            print(f"tokens: {split}/{track} {len(codes)} frames", flush=True)


# --- demo: the corpus ----------------------------------------------------------------------------


def demo_pieces(split: str, seed: int) -> Iterator[tuple[str, list[Note]]]:
    """Every piece of a split: its path under demo/ without suffix, its notes."""
    for number in PIECES[split]:
        name = f"{split}/melody_{number:02d}"
        yield name, compose(random.Random(f"{seed} {name}"))


def make_demo(codec: Codec, examples: Path, seed: int) -> None:
    """Stage `demo`: encode the melodies, write what a check needs to read them to corpus.json."""
    for split in PIECES:
        for name, notes in demo_pieces(split, seed):
            codes = encode(codec, render(notes))
            write_codes(examples / "demo" / f"{name}.npq", codes)
            print(f"demo: {name} {len(codes)} frames", flush=True)
    description = json.dumps(describe_demo(seed), indent=2)
    (examples / "demo" / "corpus.json").write_text(description + "\n", encoding="utf-8")


def describe_demo(seed: int) -> dict[str, Any]:
    """The scale, the grid and the grammar of the corpus."""
    return {
        "licence": "MIT",
        "seed": seed,
        "sample_rate": SAMPLE_RATE,
        "hop_samples": HOP,
        "frame_rate_hz": FRAME_RATE,
        "scale_multiples": list(SCALE),
        "scale_hz": [round(pitch * FRAME_RATE, 4) for pitch in SCALE],
        "melody_partial_amplitudes": list(MELODY_PARTIALS),
        "chord_multiples": {name: list(tones) for name, tones in CHORDS.items()},
        "chord_amplitudes": list(CHORD_AMPLITUDES),
        "chord_progression_one_per_bar": list(PROGRESSION),
        "form_of_phrases": FORM,
        "closing_multiple": CLOSING_NOTE,
        "step_frames": STEP_FRAMES,
        "steps_per_bar": STEPS_PER_BAR,
        "bar_frames": BAR_FRAMES,
        "bars_per_piece": len(FORM) * len(PROGRESSION),
        "beats_per_minute": round(60 * FRAME_RATE / (2 * STEP_FRAMES), 2),
        "note_steps": sorted({steps for rhythm in (*RHYTHMS, CADENCE) for steps in rhythm}),
        "rhythms_steps": [list(rhythm) for rhythm in RHYTHMS],
        "cadence_steps": list(CADENCE),
        "pieces": {split: len(numbers) for split, numbers in PIECES.items()},
    }


# --- tune: further training of the decoder -------------------------------------------------------

SCRAMBLED_NOTES = 1000
CROP_FRAMES, EDGE_FRAMES = 40, 4  # no loss on the edges, where a whole piece would give context
MEL_WEIGHT, WAVE_WEIGHT = 15.0, 40.0
LEARNING_RATE, WARMUP_STEPS, EMA_DECAY, CLIP_NORM = 6e-4, 50, 0.995, 50.0


class FastSnake(torch.autograd.Function):
    """snake(x) = x + sin^2(ax) / a in few passes over memory; a third off a training step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor) -> Tensor:
        """Keep sin^2(ax) / a for the backward pass."""
        wave = torch.sin(alpha * x).square_().div_(alpha + 1e-9)
        ctx.save_for_backward(x, wave, alpha)
        return x + wave

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """d snake/dx = 1 + sin 2ax; d snake/da = (x sin 2ax - sin^2(ax) / a) / a."""
        (gradient,), (x, wave, alpha) = gradients, ctx.saved_tensors
        slope = torch.sin(2 * alpha * x)
        to_alpha = (x * slope).sub_(wave).mul_(gradient).sum((0, 2), keepdim=True) / (alpha + 1e-9)
        return slope.add_(1).mul_(gradient), to_alpha


def fast_snake(snake: Any, x: Tensor) -> Tensor:
    """`forward` of dac's Snake1d."""
    result: Tensor = FastSnake.apply(x, snake.alpha)  # type: ignore[no-untyped-call, unused-ignore]
    return result


def mel_distance() -> Callable[[Tensor, Tensor], Tensor]:
    """L1 of log10 mel spectra of [B, samples], summed over five window sizes (DAC's loss)."""
    import librosa

    bands = {2048: 320, 1024: 160, 512: 80, 256: 40, 128: 20}
    filters = {
        size: torch.from_numpy(librosa.filters.mel(sr=SAMPLE_RATE, n_fft=size, n_mels=n)).float()
        for size, n in bands.items()
    }

    def log_mel(x: Tensor, size: int) -> Tensor:
        window = torch.hann_window(size)
        spectrum = torch.stft(x, size, size // 4, window=window, return_complex=True).abs()
        return (filters[size] @ spectrum).clamp(min=1e-3).log10()

    return lambda x, y: sum((log_mel(x, n) - log_mel(y, n)).abs().mean() for n in bands)  # type: ignore[return-value]


@dataclass
class Pool:
    """Audio with its codes, to draw aligned crops from."""

    waves: list[Floats]
    codes: list[Codes]

    def draw(self, rng: np.random.Generator, frames: int) -> tuple[Floats, Codes]:
        """A crop, from each piece as often as its length says: [frames * 512], [frames, K]."""
        lengths = np.array([len(codes) for codes in self.codes], np.float64)
        piece = int(rng.choice(len(lengths), p=lengths / lengths.sum()))
        start = int(rng.integers(0, len(self.codes[piece]) - frames + 1))
        wave = self.waves[piece][start * HOP : (start + frames) * HOP]
        return wave, self.codes[piece][start : start + frames]


def corruption(rng: np.random.Generator, codes: Codes) -> Codes:
    """Codes as an imperfect model would give them: of half the crops, 3 % drawn at random."""
    if rng.random() < 0.5:
        return codes
    wrong = rng.random(codes.shape) < 0.03
    return np.where(wrong, rng.integers(0, VOCAB, codes.shape), codes).astype(np.uint16)


def draw_batch(
    rng: np.random.Generator, codec: Codec, demo: Pool, music: Pool, crops: int
) -> tuple[Tensor, Tensor]:
    """Latents [B, D, frames] and waveforms [B, 1, frames * 512]; crops 0, 2, ... are demo."""
    latents, waves = [], []
    for crop in range(crops):
        is_demo = crop % 2 == 0
        wave, codes = (demo if is_demo else music).draw(rng, CROP_FRAMES)
        codes = corruption(rng, codes) if is_demo else codes
        used = int(rng.integers(1, CODEBOOKS + 1)) if rng.random() < 0.25 else CODEBOOKS
        as_dac = torch.from_numpy(codes[:, :used].astype(np.int64)).T[None]
        latents.append(codec.model.quantizer.from_codes(as_dac)[0])
        waves.append(torch.from_numpy(wave)[None, None])
    return torch.cat(latents), torch.cat(waves)


def tune(examples: Path, build: Path, *, steps: int, seed: int, crops: int = 4) -> None:
    """Stage `tune`: train the base decoder further on demo and music, write tiny_dac.pth."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    codec = codec_with_base_decoder(examples)
    from dac.nn.layers import Snake1d

    Snake1d.forward = fast_snake
    demo, music = demo_pool(codec, examples, seed), music_pool(examples, build)
    decoder = codec.model.decoder.train().requires_grad_(True)
    averaged = {name: value.detach().clone() for name, value in decoder.state_dict().items()}
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=LEARNING_RATE, betas=(0.8, 0.99))
    mel, start = mel_distance(), time.monotonic()
    for step in range(steps):
        progress = min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * max(0.01, progress)
        latents, waves = draw_batch(rng, codec, demo, music, crops)
        mel_loss, wave_loss = decoder_losses(decoder(latents), waves, mel)
        loss = MEL_WEIGHT * mel_loss.mean() + WAVE_WEIGHT * wave_loss.mean()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(decoder.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        average_into(averaged, decoder, min(EMA_DECAY, (step + 1) / (step + 10)))
        if step % 50 == 0 or step == steps - 1:
            demo_wave, music_wave = wave_loss[0::2].mean(), wave_loss[1::2].mean()
            print(
                f"tune: step {step} {time.monotonic() - start:.0f} s  mel {mel_loss.mean():.3f}  "
                f"wave, demo {demo_wave:.3f}  music {music_wave:.3f}",
                flush=True,
            )
        if step % 200 == 199 or step == steps - 1:
            write_codec(examples, averaged, build / "tiny_dac.pth")
    (build / "tiny_dac.pth").replace(examples / "tiny_dac.pth")


def codec_with_base_decoder(examples: Path) -> Codec:
    """The bundled codec as it was before `tune`; encoder and quantiser are the same."""
    codec = load_codec(str(examples / "tiny_dac.pth"))
    base = torch.load(examples / "base_decoder.pth", weights_only=True)["state_dict"]
    own = {name.removeprefix("decoder."): value for name, value in base.items()}
    codec.model.decoder.load_state_dict(own)
    return codec


def decoder_losses(
    decoded: Tensor, waves: Tensor, mel: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Mel distance and relative L1 of the waveform [B], both without the crops' edges."""
    inner = slice(EDGE_FRAMES * HOP, -EDGE_FRAMES * HOP)
    x, y = waves[:, 0, inner], decoded[:, 0, inner]
    return mel(y, x), (y - x).abs().mean(1) / (x.abs().mean(1) + 0.01)


def demo_pool(codec: Codec, examples: Path, seed: int) -> Pool:
    """The training melodies of the demo, and a scrambled piece a quarter their length."""
    pool = Pool([], [])
    for name, notes in demo_pieces("train", seed):
        pool.waves.append(render(notes))
        pool.codes.append(read_codes(examples / "demo" / f"{name}.npq"))
    wave = render(scramble(random.Random(f"{seed} scramble"), SCRAMBLED_NOTES))
    pool.waves.append(wave)
    pool.codes.append(encode(codec, wave))
    return pool


def music_pool(examples: Path, build: Path) -> Pool:
    """The training tracks of Freedoom's music."""
    folder = examples / "tokens" / "train"
    return Pool(
        [read_music(build, track) for track in TRAIN_TRACKS],
        [read_codes(folder / f"{track}.npq") for track in TRAIN_TRACKS],
    )


def read_music(build: Path, track: str) -> Floats:
    """A rendered track, filled up with silence to whole frames."""
    wave = sf.read(build / "music" / f"{track}.wav", dtype="float32")[0]
    return np.pad(wave, (0, -len(wave) % HOP))


@torch.no_grad()
def average_into(averaged: dict[str, Tensor], decoder: nn.Module, decay: float) -> None:
    """Exponential moving average of the weights."""
    for name, value in decoder.state_dict().items():
        averaged[name].lerp_(value, 1 - decay)


def write_codec(examples: Path, decoder: dict[str, Tensor], path: Path) -> None:
    """The bundled codec with another decoder, fp16; the rest stays as it is, to the bit."""
    saved = torch.load(examples / "tiny_dac.pth", weights_only=True)
    saved["state_dict"].update({f"decoder.{name}": v.half() for name, v in decoder.items()})
    kwargs = saved["metadata"]["kwargs"]
    metadata = {"kwargs": kwargs, "licence": "MIT and BSD-3-Clause, see README.md"}
    torch.save({"state_dict": saved["state_dict"], "metadata": metadata}, path)


# --- check: every figure of README.md ------------------------------------------------------------

MUSIC_SECONDS = 30  # from the middle of each held-out track


def check(codec: Codec, examples: Path, build: Path, *, seed: int) -> None:
    """Stage `check`: measure codes and sound, print the figures, write them to check.json."""
    codecs = {"base": codec_with_base_decoder(examples), "tuned": codec}
    figures: dict[str, Any] = {
        "bytes": sum(path.stat().st_size for path in examples.rglob("*") if path.is_file()),
        "demo_codes": measure_codes(sorted((examples / "demo").glob("*/*.npq"))),
        "music_codes": measure_codes(sorted((examples / "tokens").glob("*/*.npq"))),
        "demo_codes_made_again_equal": demo_codes_match(codec, examples, seed),
        "demo_val_phrases_in_train": len(phrases("val", seed) & phrases("train", seed)),
        "demo_held_out": {n: measure_melodies(c, examples, seed) for n, c in codecs.items()},
    }
    if (build / "music").is_dir():
        figures["music_held_out"] = {
            name: measure_music(c, examples, build) for name, c in codecs.items()
        }
    else:
        print(f"check: no {build / 'music'} (stage `music`), so no figures on music")
    report = json.dumps(figures, indent=1)
    (examples / "check.json").write_text(report + "\n", encoding="utf-8")
    print(report)


def measure_codes(paths: Sequence[Path]) -> dict[str, Any]:
    """Size, repeats from frame to frame and unigram entropy, per codebook where it has one."""
    pieces = [read_codes(path) for path in paths]
    together = np.concatenate(pieces)
    repeats = np.concatenate([piece[1:] == piece[:-1] for piece in pieces])
    return {
        "files": len(pieces),
        "frames": len(together),
        "minutes": round(len(together) / FRAME_RATE / 60, 1),
        "distinct_frames": len(np.unique(together, axis=0)),
        "repeat_rate": np.round(repeats.mean(0), 3).tolist(),
        "entropy_nats": np.round(entropy(together), 3).tolist(),
    }


def demo_codes_match(codec: Codec, examples: Path, seed: int) -> float:
    """Share of codes in the bundled validation pieces that encoding them again gives."""
    same = [
        (encode(codec, render(notes)) == read_codes(examples / "demo" / f"{name}.npq")).mean()
        for name, notes in demo_pieces("val", seed)
    ]
    return round(float(np.mean(same)), 6)


def phrases(split: str, seed: int) -> set[tuple[Note, ...]]:
    """The different phrases of a split."""
    found = set()
    for _, notes in demo_pieces(split, seed):
        bars = np.cumsum([note.frames for note in notes]) / BAR_FRAMES
        ends = [i + 1 for i, bar in enumerate(bars) if bar % len(PROGRESSION) == 0]
        found |= {tuple(notes[i:j]) for i, j in zip([0, *ends], ends, strict=False)}
    return found


def measure_melodies(codec: Codec, examples: Path, seed: int) -> dict[str, float]:
    """How near the decoded held-out melodies are, and how well their notes can be read."""
    rows = []
    for name, notes in demo_pieces("val", seed):
        decoded = decode(codec, read_codes(examples / "demo" / f"{name}.npq"))
        written = np.repeat([note.pitch for note in notes], [note.frames for note in notes])
        read = read_pitches(decoded)
        borders = np.flatnonzero(written[1:] != written[:-1]) + 1
        changes = np.flatnonzero(read[1:] != read[:-1]) + 1
        ends = np.cumsum([note.frames for note in notes])[:-1]
        is_right = [np.mean(part) > 0.5 for part in np.split(read == written, ends)]
        rows.append(
            {
                "si_sdr_db": si_sdr(render(notes), decoded),
                "frames_read_right": (read == written).mean(),
                "notes_read_right": np.mean(is_right),
                "changes_on_the_grid": np.mean(changes % STEP_FRAMES == 0),
                "borders_found": np.isin(borders, changes).mean(),
            }
        )
    return {key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]}


def read_pitches(wave: Floats) -> NDArray[np.int64]:
    """The strongest scale note of each frame [T]: bin n of a 512-point spectrum is n * 86.13 Hz."""
    spectrum = np.abs(np.fft.rfft(wave.reshape(-1, HOP), axis=1))
    scale = np.array(SCALE)
    strongest: NDArray[np.int64] = scale[spectrum[:, scale].argmax(1)]
    return strongest


def measure_music(codec: Codec, examples: Path, build: Path) -> dict[str, float]:
    """SI-SDR in dB of each held-out track's middle, and their mean."""
    figures = {}
    for track in VAL_TRACKS:
        codes, wave = read_codes(examples / "tokens/val" / f"{track}.npq"), read_music(build, track)
        length = round(MUSIC_SECONDS * FRAME_RATE)
        first = max(0, (len(codes) - length) // 2)
        decoded = decode(codec, codes[first : first + length])
        figures[track] = round(si_sdr(wave[first * HOP :][: len(decoded)], decoded), 2)
    return {"mean": round(float(np.mean(list(figures.values()))), 2), **figures}


def si_sdr(true: Floats, found: Floats) -> float:
    """Scale-invariant signal-to-distortion ratio, dB."""
    found = found * np.float32((true @ found) / max(1e-9, float(found @ found)))
    return float(10 * np.log10((true @ true) / max(1e-9, float(((true - found) ** 2).sum()))))


# --- the door ------------------------------------------------------------------------------------

# Each stage needs those before it only where the docstring above says so.
STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "music": lambda args: make_music(args.build),
    "tokens": lambda args: make_tokens(bundled(args), args.examples, args.build),
    "demo": lambda args: make_demo(bundled(args), args.examples, args.seed),
    "tune": lambda args: tune(args.examples, args.build, steps=args.steps, seed=args.seed),
    "check": lambda args: check(bundled(args), args.examples, args.build, seed=args.seed),
}


def bundled(args: argparse.Namespace) -> Codec:
    """The bundled codec, as the stages before left it."""
    return load_codec(str(args.examples / "tiny_dac.pth"))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="music tokens demo tune check")
    parser.add_argument("--build", type=Path, default=Path("build"), help="for rendered music")
    parser.add_argument("--examples", type=Path, default=HERE, help="what is read and rewritten")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1200, help="of `tune`")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def main() -> int:
    """Run the stages named, or all, in their order."""
    parser = build_parser()
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"unknown stage {sorted(unknown)}; expected {' '.join(STAGES)}")
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    for stage, run in STAGES.items():
        if not args.stages or stage in args.stages:
            run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
