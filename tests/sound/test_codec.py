"""sound/codec.py with the real DAC class: tiny random weights, and the bundled demo codec."""

import http.server
import pickle
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from kit.sounds import HOP, K, V, music, save_tiny_dac
from kit.trainer import ROOT
from torch.package import PackageExporter, PackageImporter

from sound import codec as codec_module
from sound.codec import CodecError, load_codec, read_weights


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    return save_tiny_dac(tmp_path_factory.mktemp("codec") / "tiny.pth")


@pytest.fixture
def tiny(tiny_path):
    return load_codec(str(tiny_path))


def si_sdr(estimate, reference):
    error = (estimate.double() - reference.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / error))


# --- coding --------------------------------------------------------------------------------------


def test_codes_are_dacs_own_with_frames_before_codebooks(tiny):
    waveform = torch.from_numpy(music(HOP * 50, channels=2))
    codes = tiny.encode(waveform)
    with torch.no_grad():
        expected = tiny.model.encode(waveform[:, None])[1]  # [B, K, T]
    assert codes.shape == (2, 50, K)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, expected.transpose(1, 2))
    assert len(codes.unique()) > V / 2  # the random codec is not stuck on a few entries
    assert torch.equal(tiny.encode(waveform[1]), codes[1])
    assert torch.equal(tiny.encode(waveform, codebooks=2), codes[..., :2])


@pytest.mark.parametrize("chunk_frames", [37, 100, 299])
def test_chunks_give_the_codes_and_sound_of_the_whole(tiny, chunk_frames):
    waveform = torch.from_numpy(music(HOP * 300 - 7))
    whole = tiny.encode(waveform, chunk_frames=10**9)
    assert whole.shape == (1, 300, K)
    assert torch.equal(tiny.encode(waveform, chunk_frames=chunk_frames), whole)
    sound = tiny.decode(whole, chunk_frames=10**9)
    assert si_sdr(tiny.decode(whole, chunk_frames=chunk_frames), sound) > 90


def test_the_demo_codec_in_chunks():
    demo = load_codec("demo")
    assert (demo.sample_rate, demo.hop_length, demo.num_codebooks) == (44_100, 512, 9)
    waveform = torch.from_numpy(music(44_100 * 2, 44_100))
    whole = demo.encode(waveform, chunk_frames=10**9)
    assert torch.equal(demo.encode(waveform, chunk_frames=64), whole)
    sound = demo.decode(whole, chunk_frames=10**9)
    assert si_sdr(demo.decode(whole, chunk_frames=64), sound) > 90
    assert si_sdr(sound[:, : waveform.shape[1]], waveform) > 0  # it does code the audio


def test_too_little_context_is_heard(tiny):
    """Shows that the tests above can fail."""
    waveform = torch.from_numpy(music(HOP * 300))
    whole = tiny.encode(waveform)
    sound = tiny.decode(whole)
    tiny.context = 0
    assert not torch.equal(tiny.encode(waveform, chunk_frames=50), whole)
    assert si_sdr(tiny.decode(whole, chunk_frames=50), sound) < 40


def test_context_covers_the_receptive_field(tiny):
    waveform = torch.zeros(1, HOP * 201, requires_grad=True)
    tiny.model.encoder(waveform[:, None])[..., 100].sum().backward()
    reached = waveform.grad[0].nonzero() // HOP
    assert 100 - tiny.context <= reached.min() < reached.max() <= 100 + tiny.context
    latents = torch.zeros(1, 16, 201, requires_grad=True)
    tiny.model.decoder(latents)[..., 100 * HOP : 101 * HOP].sum().backward()
    reached = latents.grad[0].nonzero()[:, 1]
    assert 100 - tiny.context <= reached.min() < reached.max() <= 100 + tiny.context


def test_decode_shapes_and_first_codebooks(tiny):
    codes = torch.randint(V, (2, 30, K))
    sound = tiny.decode(codes)
    assert sound.shape == (2, 30 * HOP)
    assert sound.dtype == torch.float32
    torch.testing.assert_close(tiny.decode(codes[1]), sound[1])
    assert not torch.allclose(tiny.decode(codes[..., :2]), sound)
    assert tiny.decode(codes[:, :1]).shape == (2, HOP)


@pytest.mark.parametrize(
    "codes",
    [torch.full((5, K), V), torch.full((5, K), -1), torch.zeros(5, K + 1), torch.zeros(0, K)],
    ids=["too large", "negative", "too many codebooks", "no frames"],
)
def test_bad_codes_are_refused_before_the_model(tiny, codes):
    with pytest.raises(ValueError, match=rf"expected codes \[B, T, 1 to {K}\] in \[0, {V}\)"):
        tiny.decode(codes.long())


def test_bad_waveforms_are_refused(tiny):
    with pytest.raises(ValueError, match=r"found \[1, 0\]"):
        tiny.encode(torch.zeros(1, 0))
    with pytest.raises(ValueError, match=f"at most {K} codebooks"):
        tiny.encode(torch.zeros(1, 100), codebooks=K + 1)


# --- weights -------------------------------------------------------------------------------------


class Evil:
    """Unpickling it creates the canary."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (Path(self.canary),)


def torch_package(path, canary):
    with PackageExporter(path) as package:
        package.save_source_string("evil", f"open({str(canary)!r}, 'w').close()")
        package.save_text("DAC", "DAC.pth", "")
    return lambda: PackageImporter(path).import_module("evil")


def zipped_pickle(path, canary):
    torch.save({"state_dict": Evil(canary), "metadata": {"kwargs": {}}}, path)
    return lambda: torch.load(path, weights_only=False)


def bare_pickle(path, canary):
    path.write_bytes(pickle.dumps(Evil(canary)))
    return lambda: pickle.loads(path.read_bytes())


@pytest.mark.parametrize("make", [torch_package, zipped_pickle, bare_pickle])
def test_code_in_weights_is_refused_and_never_runs(tmp_path, make):
    path, canary = tmp_path / "weights.pth", tmp_path / "canary"
    run_it = make(path, canary)
    start = time.perf_counter()
    with pytest.raises(CodecError, match=r"weights\.pth: refused, nothing was run: expected plain"):
        load_codec(str(path))
    assert time.perf_counter() - start < 1
    assert not canary.exists()
    run_it()
    assert canary.exists()  # the file was dangerous


def test_a_compressed_entry_is_refused_before_it_is_read(tmp_path, tiny_path):
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(tiny_path) as good, zipfile.ZipFile(bomb, "w") as bad:
        for entry in good.infolist():
            kind = zipfile.ZIP_DEFLATED if entry.filename.endswith("/0") else zipfile.ZIP_STORED
            bad.writestr(entry.filename, good.read(entry), kind)
    with pytest.raises(CodecError, match="compressed entries"):
        read_weights(bomb)


def test_broken_and_foreign_weights_are_refused(tmp_path, tiny_path):
    whole = tiny_path.read_bytes()
    path = tmp_path / "weights.pth"
    for content in (b"", b"<html>", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CodecError, match="refused"):
            load_codec(str(path))
    for content in ([1, 2], {"weights": torch.zeros(1)}):
        torch.save(content, path)
        with pytest.raises(CodecError, match="no state_dict and metadata"):
            load_codec(str(path))
    weights = read_weights(tiny_path)
    for metadata in ({"kwargs": {"latent_dim": 24}}, {"kwargs": {"latent_dim": 10**12}}, {}, None):
        torch.save({**weights, "metadata": metadata}, path)  # 10**12 must not be allocated
        with pytest.raises(CodecError, match="do not fit the DAC class"):
            load_codec(str(path))


def test_unknown_names_and_absent_devices(tiny_path):
    with pytest.raises(
        CodecError, match=r"'48khz': expected 44khz, 24khz, 16khz, demo or the path"
    ):
        load_codec("48khz")
    with pytest.raises(CodecError, match=r"cuda:99.*--device"):
        load_codec(str(tiny_path), "cuda:99")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".cache" / "descript" / "dac"


def test_missing_official_weights_say_where_they_go(cache, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(CodecError) as error:
        load_codec("24khz")
    for part in (str(cache), "weights_24khz_8kbps_0.0.4.pth", "releases/download/0.0.4"):
        assert part in str(error.value)
    assert list(cache.iterdir()) == []


def test_official_weights_are_downloaded_once_and_whole(cache, tiny_path, monkeypatch):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            content = tiny_path.read_bytes()
            self.wfile.write(content[:1000] if self.path == "/broken" else content)

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for path in ("broken", "whole"):
            address = f"http://127.0.0.1:{server.server_port}/{path}"
            monkeypatch.setitem(codec_module.OFFICIAL_WEIGHTS, path, (f"{path}.pth", address))
        with pytest.raises(CodecError, match=r"broke off.*put it there as broken\.pth"):
            load_codec("broken")
        assert list(cache.iterdir()) == []
        assert load_codec("whole").num_codebooks == K
        server.shutdown()
    assert load_codec("whole").num_codebooks == K  # from the cache: the server is gone


def test_dac_is_imported_although_torchaudio_is_broken(tmp_path, tiny_path):
    (tmp_path / "torchaudio.py").write_text("raise OSError('libc10_cuda.so: cannot open')")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from sound.codec import load_codec\n"
        "assert not {'torch', 'dac'} & sys.modules.keys(), 'imported before they are needed'\n"
        "print(load_codec(sys.argv[2]).num_codebooks, 'torchaudio' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(tiny_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == f"{K} False\n", done.stderr
