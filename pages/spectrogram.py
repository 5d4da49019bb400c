"""Draws the spectrogram of a .wav file above an audio player, both embedded in the markup.

    markup = player(Path("samples/x.wav"), modified=os.stat("samples/x.wav").st_mtime_ns)

The sound is compressed as MP3, about 0.2 MB for 15 s.
"""

from __future__ import annotations

import base64
import functools
import io
import math
from pathlib import Path

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from pages.charts import LEFT, RIGHT, WIDTH
from pages.html import render

HZ = 50.0, 20_000.0  # lowest and highest frequency drawn
ROWS = 150  # frequency bands, each one unit of the view box high; script.js repeats this number
COLUMNS = 4096  # at most; a browser shows no picture of 65,536
KEPT = 4  # players kept in memory: those of one page


@functools.lru_cache(KEPT)
def player(path: Path, modified: int) -> Markup:
    """Return the markup of the spectrogram and player of a .wav file.

    `modified`, the file's time stamp, is a part of the cache's key, so a new file is read again.

    Raises:
        OSError, soundfile.LibsndfileError: the file cannot be read, or is no sound.
    """
    import soundfile  # imported late: training does not need it

    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    compressed = io.BytesIO()
    soundfile.write(compressed, wave, rate, format="MP3")
    low, high = HZ
    marks = [("100", 100), ("1k", 1000), ("10k Hz", 10_000)]
    ticks = [(name, ROWS - ROWS * math.log(hz / low) / math.log(high / low)) for name, hz in marks]
    return render(
        "player.html",
        left=LEFT, right=RIGHT, width=WIDTH, rows=ROWS, ticks=ticks, seconds=len(wave) / rate,
        image=_base64(_png(spectrogram(wave.mean(axis=1), rate))),
        sound=_base64(compressed.getvalue()),
    )  # fmt: skip


def spectrogram(wave: NDArray[np.float32], rate: int) -> NDArray[np.float64]:
    """Return levels [ROWS, T] of a waveform [N] in dB relative to its loudest, from -80 to 0.

    The bands are spaced logarithmically over HZ, lowest first. A column is 512 samples, 1/86 s at
    44.1 kHz, or as many more as leave COLUMNS; windows are Hann windows of 2048 samples.
    """
    window, hop = 2048, max(512, math.ceil(len(wave) / COLUMNS))
    padded = np.pad(wave, (window // 2, window // 2 + hop))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(window), axis=1)) ** 2
    edges = np.geomspace(*HZ, ROWS + 1) * window / rate
    sums = np.concatenate((np.zeros((len(power), 1)), power.cumsum(axis=1)), axis=1)
    # At low frequencies a band is narrower than an FFT bin, so the running sum is interpolated.
    bins = np.arange(sums.shape[1]) - 0.5
    between = np.stack([np.interp(edges, bins, row) for row in sums])
    bands = np.diff(between, axis=1) / np.diff(edges)
    levels = 10 * np.log10(bands.T / max(bands.max(), 1e-12) + 1e-8)
    return np.clip(levels, -80, 0)


def _png(levels: NDArray[np.float64]) -> bytes:
    import matplotlib.image as picture

    file = io.BytesIO()
    picture.imsave(file, levels, cmap="magma", vmin=-80, vmax=0, origin="lower", format="png")
    return file.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
