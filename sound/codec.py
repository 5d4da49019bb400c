"""Waveform <-> codes with the Descript Audio Codec (DAC): the only file that knows DAC.

    codec = load_codec("44khz")                           # or 24khz, 16khz, demo, a path of weights
    codes = codec.encode(waveform)                        # [1, N] float32 -> [1, T, K]
    waveform = codec.decode(codes)

B = batch, C = audio channels, N = audio samples, T = frames, K = codebooks. torch and dac are
imported where they are used, as both imports take seconds. The codec is that of Kumar et al. 2023,
"High-Fidelity Audio Compression with Improved RVQGAN".
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import shutil
import sys
import types
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cli.command_line import UsageError, raise_known_cause
from cli.disk import replace_file
from cli.signals import signals_deferred
from sound.npq_format import FRAME_RATE_TOLERANCE
from sound.origin import CodecId, are_different, codec_of

if TYPE_CHECKING:
    import numpy as np
    import torch

    Read = Callable[[int, int], torch.Tensor]

# --- weights -------------------------------------------------------------------------------------

DEMO_WEIGHTS = Path(__file__).parent.parent / "examples" / "tiny_dac.pth"
DAC_RELEASES = "https://github.com/descriptinc/descript-audio-codec/releases/download"
OFFICIAL_WEIGHTS = {  # name -> file in the cache of `python -m dac download`, where it comes from
    "44khz": ("weights_44khz_8kbps_0.0.1.pth", f"{DAC_RELEASES}/0.0.1/weights.pth"),
    "24khz": ("weights_24khz_8kbps_0.0.4.pth", f"{DAC_RELEASES}/0.0.4/weights_24khz.pth"),
    "16khz": ("weights_16khz_8kbps_0.0.5.pth", f"{DAC_RELEASES}/0.0.5/weights_16khz.pth"),
}


class CodecError(Exception):
    """No codec: its weights are missing, refused or not of DAC, or the device is absent."""


def find_weights(name: str, *, download: bool = True) -> Path:
    """Path of a codec's weights: an official model (downloaded if need be), `demo`, or a path.

    Raises:
        CodecError: no such name or file, or an official file that can't be downloaded.
    """
    if name == "demo":
        return DEMO_WEIGHTS
    if name in OFFICIAL_WEIGHTS:
        file, address = OFFICIAL_WEIGHTS[name]
        path = Path.home() / ".cache" / "descript" / "dac" / file
        if not download and not os.access(path, os.R_OK):  # also in another user's home
            raise CodecError(f"codec {name!r}: its weights are not at {path}")
        if not path.exists():
            _download(address, path)
        return path
    if not Path(name).is_file():
        names = ", ".join((*OFFICIAL_WEIGHTS, "demo"))
        raise CodecError(f"codec {name!r}: expected {names} or the path of a weights file")
    return Path(name)


def codec_id(name: str) -> CodecId:
    """Identify a codec by its name and the SHA-256 of its weights; errors as of `find_weights`."""
    path = find_weights(name)
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise CodecError(f"codec {name!r}: {path}: {error.strerror}; check the path") from error
    return CodecId(name, digest.hexdigest())


def _download(address: str, path: Path) -> None:
    """Fetch weights to `path`, whole or not at all (dac's own download may leave half a file)."""

    def fetch(file: BinaryIO) -> None:
        with urllib.request.urlopen(address, timeout=30) as reply:
            shutil.copyfileobj(reply, file)
        file.flush()
        if not zipfile.is_zipfile(file.name):  # a zip's directory stands at its end
            raise OSError("the download broke off or is no weights file")

    print(f"downloading {address}", file=sys.stderr, flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, fetch, durable=False)
    except OSError as error:
        raise CodecError(
            f"weights {path} are missing and could not be downloaded ({error}); "
            f"fetch {address} on any machine and put it there as {path.name}"
        ) from error


def read_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read {"state_dict", "metadata"} of a DAC without running code from the file.

    Not by `DAC.load`: it tries torch.package first, and to open one runs the code inside.

    Raises:
        CodecError: a torch.package, a pickle that holds more than tensors, or no DAC weights.
    """
    import torch

    def refusal(found: object) -> CodecError:
        expected = "plain weights, as DAC's `model.save(path, package=False)` writes them"
        return CodecError(f"{path}: refused, nothing was run: expected {expected}, found {found}")

    try:
        with open(path, "rb") as file:
            entries = zipfile.ZipFile(file).infolist()
            if any(entry.filename.endswith("/.data/extern_modules") for entry in entries):
                raise refusal("a torch.package, which brings code of its own")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise refusal("compressed entries, which torch never writes")
            file.seek(0)
            weights: Any = torch.load(file, map_location="cpu", weights_only=True)
    except CodecError:
        raise
    except Exception as error:  # a hostile pickle makes torch.load raise anything
        raise_known_cause(error)
        raise refusal(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(weights, dict) or not {"state_dict", "metadata"} <= weights.keys():
        raise refusal("no state_dict and metadata")
    return weights


def codebook_vectors(name: str) -> tuple[torch.Tensor, float]:
    """The vectors [K, V, F] float32 that a codec's codes stand for, and its frames per second.

    The codec is neither built nor downloaded: `dac` is not needed.

    Raises:
        CodecError: its weights are not at hand, refused, or not of a DAC.
    """
    import torch

    path = find_weights(name, download=False)
    weights = read_weights(path)
    try:
        made, tensors = weights["metadata"]["kwargs"], weights["state_dict"]
        rate = made["sample_rate"] / math.prod(made["encoder_rates"])
        entry = "quantizer.quantizers.{}.codebook.weight"
        books = [tensors[entry.format(k)].float() for k in range(made["n_codebooks"])]
        return torch.stack(books), rate
    except Exception as error:  # metadata may be anything
        raise CodecError(f"{path}: no codebooks of a DAC in it: {error!r}") from error


def _import_dac() -> Any:
    """Import dac, also where torchaudio's wheel does not match torch's.

    audiotools, beneath dac, imports torchaudio for effects that no codec needs, and a mismatched
    wheel raises OSError (libc10_cuda.so). An empty module then stands in while dac is imported.
    """
    stand_in = types.ModuleType("torchaudio")
    try:
        import torchaudio  # type: ignore[import-untyped, unused-ignore]  # noqa: F401
    except (ImportError, OSError):
        sys.modules["torchaudio"] = stand_in
    try:
        with signals_deferred(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dac is older than what it rests on
            import dac
    finally:
        if sys.modules.get("torchaudio") is stand_in:
            del sys.modules["torchaudio"]
    return dac


# --- the codec -----------------------------------------------------------------------------------

CHUNK_FRAMES = 512  # 6 s at 44.1 kHz: decoding with the official model needs about 1 GB for it


def load_codec(name: str, device: str = "cpu") -> Codec:
    """Load `44khz`, `24khz`, `16khz`, `demo` or a path; device "best" is a GPU if there is one.

    Raises:
        CodecError: weights missing, refused or unfit, or the device is absent.
    """
    import torch

    if device == "best":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    path = find_weights(name)
    weights = read_weights(path)
    dac_class = _import_dac().DAC
    known = inspect.signature(dac_class).parameters
    try:
        kwargs = {k: v for k, v in weights["metadata"]["kwargs"].items() if k in known}
        # On "meta" nothing is allocated or initialised; the file's tensors then take their places.
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # dac uses torch's old weight_norm
            model = dac_class(**kwargs)
        model.load_state_dict(weights["state_dict"], assign=True)
    except Exception as error:  # metadata may be anything
        raise_known_cause(error)
        raise CodecError(f"{path}: these weights do not fit the DAC class: {error!r}") from error
    try:
        model = model.float().eval().requires_grad_(False).to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises both for an absent device
        raise_known_cause(error)
        raise CodecError(f"device {device!r}: {error}; pass another --device") from error
    return Codec(model)


def check_codec(
    codec: Codec,
    flag: str,
    name: str,
    vocab_sizes: Sequence[int],
    data: Mapping[str, Any],
    tell: Callable[[str], object],
) -> None:
    """Check that a codec decodes a model's codes; `tell` it where it is not their own.

    `data` are the data facts of a checkpoint, and the codec is the one called `name` by a `flag`.

    Raises:
        UsageError: other codebooks, entries or frames per second.
    """
    trained = codec_of(data)
    if trained is not None and are_different(asked := codec_id(name), trained):
        tell(f"codec {asked} is not {trained} of the training data: expect noise; see {flag}")
    if odd := codec.mismatch(vocab_sizes, data["side_codebooks"], data["frame_rate"]):
        raise UsageError(
            f"{flag} {name}: the codec has {odd[0]}, the model makes {odd[1]}; name the codec that "
            "the training data was encoded with"
        )


class Codec:
    """A DAC model that codes audio of any length in bounded memory.

    A long waveform is coded in chunks, each with `context` frames of its neighbours on both sides,
    which are cut off again. The context covers the receptive field and chunks start on frame
    borders, so the result equals that of the whole waveform at once up to float rounding, also at
    its ends. (dac's own `compress` turns the padding of all layers off and differs at the ends.)
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.sample_rate: int = int(model.sample_rate)  # Hz
        self.hop_length: int = int(model.hop_length)  # audio samples per frame
        self.num_codebooks: int = int(model.n_codebooks)
        self.codebook_size: int = int(model.codebook_size)
        # `delay` is half the receptive field of encoder and decoder together, in audio samples.
        self.context: int = math.ceil(model.delay / self.hop_length)

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop_length

    def mismatch(
        self, vocab_sizes: Sequence[int], side_codebooks: int, frame_rate: float
    ) -> tuple[str, str] | None:
        """What the codec has and what the codes need, in words; None where it can decode them."""
        has = self.num_codebooks, self.codebook_size, self.frame_rate
        mid = len(vocab_sizes) - side_codebooks
        needs = max(mid, side_codebooks), max(vocab_sizes), frame_rate
        off = abs(needs[2] / has[2] - 1)  # real files carry frames / duration, not the nominal rate
        if needs[0] <= has[0] and needs[1] == has[1] and off <= FRAME_RATE_TOLERANCE:
            return None
        shape = "{} codebooks of {} at {:.2f} frames/s"
        return shape.format(*has), shape.format(*needs)

    def encode(
        self,
        waveform: torch.Tensor,
        *,
        codebooks: int | None = None,
        chunk_frames: int = CHUNK_FRAMES,
    ) -> torch.Tensor:
        """Codes [B, T, K] of a waveform [B, N], or [T, K] of [N]; int64, on the CPU.

        The waveform is float32 at `sample_rate`, its last frame is padded with zeros: T is
        ceil(N / hop_length). `codebooks` is the number of first codebooks to keep. Memory in
        addition to waveform and codes: the activations of one chunk.

        Raises:
            ValueError: no audio, or more codebooks than the codec has.
        """
        import torch

        if waveform.ndim == 1:
            return self.encode(waveform[None], codebooks=codebooks, chunk_frames=chunk_frames)[0]
        k, hop = codebooks or self.num_codebooks, self.hop_length
        if waveform.ndim != 2 or waveform.shape[1] == 0 or k > self.num_codebooks:
            raise ValueError(
                f"expected a waveform [B, N] and at most {self.num_codebooks} codebooks, "
                f"found {list(waveform.shape)} and {k}"
            )
        frames = math.ceil(waveform.shape[1] / hop)
        codes = torch.empty(waveform.shape[0], frames, k, dtype=torch.int64)
        for first, last, start, stop in self._chunks(frames, chunk_frames):
            chunk = waveform[:, start * hop : stop * hop]
            chunk = torch.nn.functional.pad(chunk, (0, (stop - start) * hop - chunk.shape[1]))
            with torch.no_grad():
                _, found, *_ = self.model.encode(chunk[:, None].to(self.model.device), k)
            codes[:, first:last] = found.transpose(1, 2)[:, first - start : last - start]
        return codes

    def decode(self, codes: torch.Tensor, *, chunk_frames: int = CHUNK_FRAMES) -> torch.Tensor:
        """Waveform [B, N] of codes [B, T, K], or [N] of [T, K]; float32, on the CPU.

        N is T * hop_length. K may be less than the codec's: fewer codebooks, a coarser sound.

        Raises:
            ValueError: codes of another shape, or not in [0, codebook_size).
        """
        import torch

        if codes.ndim == 2:
            return self.decode(codes[None], chunk_frames=chunk_frames)[0]
        if codes.ndim != 3 or codes.numel() == 0:
            raise ValueError(f"expected {self._decodable}, found shape {list(codes.shape)}")
        frames = codes.shape[1]
        chunks = self._decoded(lambda start, stop: codes[:, start:stop], frames, chunk_frames)
        return torch.cat(list(chunks), dim=1)

    def _decoded(
        self, read: Read, frames: int, chunk_frames: int = CHUNK_FRAMES
    ) -> Iterator[torch.Tensor]:
        """Yield the waveform [B, n] of chunk after chunk of the codes [B, n, K] that `read` has."""
        import torch

        hop = self.hop_length
        for first, last, start, stop in self._chunks(frames, chunk_frames):
            codes = read(start, stop)
            if codes.shape[2] > self.num_codebooks:
                raise ValueError(f"expected {self._decodable}, found shape {list(codes.shape)}")
            if codes.min() < 0 or codes.max() >= self.codebook_size:
                found = f"{int(codes.min())} to {int(codes.max())}"
                raise ValueError(f"expected {self._decodable}, found {found}")
            chunk = codes.transpose(1, 2).long().to(self.model.device)
            with torch.no_grad():
                audio = self.model.decode(self.model.quantizer.from_codes(chunk)[0])[:, 0]
            kept = audio[:, (first - start) * hop : (last - start) * hop].cpu()
            # With an odd stride (24 and 16 kHz) the last frame is 8 samples short: zeros.
            yield torch.nn.functional.pad(kept, (0, (last - first) * hop - kept.shape[1]))

    @property
    def _decodable(self) -> str:
        return f"codes [B, T, 1 to {self.num_codebooks}] in [0, {self.codebook_size})"

    def encode_channels(
        self, waveform: torch.Tensor, mid_codebooks: int | None = None, side_codebooks: int = 0
    ) -> torch.Tensor:
        """Codes [T, K] of a waveform [C, N]: mono, or with side codebooks mid/side, mid first.

        mid = (left + right) / 2 and side = (left - right) / 2. Errors as `encode`.
        """
        import torch

        if not side_codebooks:
            return self.encode(waveform.mean(0), codebooks=mid_codebooks)
        left, right = waveform
        both = torch.stack(((left + right) / 2, (left - right) / 2))
        mid, side = self.encode(
            both, codebooks=mid_codebooks and max(mid_codebooks, side_codebooks)
        )
        return torch.cat((mid[:, :mid_codebooks], side[:, :side_codebooks]), dim=1)

    def decode_channels(
        self, read: Read, frames: int, side_codebooks: int = 0
    ) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
        """Yield the waveform, [1, n] or with side codebooks [2, n], of chunk after chunk of codes.

        `read(start, stop)` returns codes [stop - start, K], the last `side_codebooks` columns of
        the side channel. So they need not all be there at the first chunk, nor their sound in
        memory at the last. Errors as `decode`.
        """
        import torch

        def of(columns: slice) -> Iterator[torch.Tensor]:
            return self._decoded(lambda start, stop: read(start, stop)[None, :, columns], frames)

        if not side_codebooks:
            yield from (chunk.numpy() for chunk in of(slice(None)))
            return
        both = zip(of(slice(-side_codebooks)), of(slice(-side_codebooks, None)), strict=True)
        for mid, side in both:
            yield torch.cat((mid + side, mid - side)).numpy()  # left, right

    def _chunks(self, frames: int, chunk_frames: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield frames [first, last) to keep, of frames [start, stop) to code.

        All windows have one length, also the first and the last: a shorter one may get another
        convolution kernel, whose rounding can change a code where two entries are nearly equal.
        """
        window = chunk_frames + 2 * self.context
        for first in range(0, frames, chunk_frames):
            start = max(0, min(first - self.context, frames - window))
            yield first, min(first + chunk_frames, frames), start, min(start + window, frames)
