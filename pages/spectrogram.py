"""A .wav as a player below its spectrogram, both as data within the markup.

    markup = player(Path("samples/x.wav"), modified=os.stat("samples/x.wav").st_mtime_ns)

Sound becomes MP3, about 0.2 MB for 15 s.
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

HZ = 50.0, 20_000.0  # lowest and highest that is drawn
ROWS = 150  # bands, each one unit of the view box high; script.js knows it too
KEPT = 4  # players in memory: those of one page


@functools.lru_cache(KEPT)
def player(path: Path, modified: int) -> Markup:
    """Markup of a .wav file; `modified`, when the file was written, makes a new file a new entry.

    Raises:
        OSError, soundfile.LibsndfileError: the file cannot be read, or is no sound.
    """
    import soundfile  # training runs without it

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
    """Levels [F, T] of a waveform [N] in dB below its loudest, -80 to 0; F is logarithmic in Hz.

    F covers HZ, lowest first; a column is 1/86 s at 44.1 kHz. Hann windows of 2048.
    """
    window, hop = 2048, 512
    padded = np.pad(wave, (window // 2, window // 2 + hop))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(window), axis=1)) ** 2
    edges = np.geomspace(*HZ, ROWS + 1) * window / rate
    sums = np.concatenate((np.zeros((len(power), 1)), power.cumsum(axis=1)), axis=1)
    # Between two edges lies less than a bin at low frequencies: the running sum is interpolated.
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
