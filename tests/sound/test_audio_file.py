"""sound/audio_file.py: real files of every kind, put together, cut, and with headers that lie."""

import os
import re
import struct

import numpy as np
import pytest
import soundfile
from kit.sounds import RATE, music

from sound.audio_file import AudioError, SilentError, read_audio, resample, write_wav

KINDS = {  # ending -> format, coding; what soundfile writes at 48 kHz
    "wav": ("WAV", "PCM_16"),
    "rf64": ("RF64", "PCM_24"),
    "w64": ("W64", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
UNCOMPRESSED = ("wav", "rf64", "w64", "aiff", "caf")
SECONDS = 2


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Bytes of a file of two seconds by ending, rate and channels; made once."""
    folder, made = tmp_path_factory.mktemp("audio"), {}

    def get(kind, rate=48_000, channels=1):
        key = kind, rate, channels
        if key not in made:
            path = folder / f"a.{kind}"
            container, subtype = KINDS[kind]
            sound = music(SECONDS * rate, rate, channels).T
            soundfile.write(path, sound, rate, format=container, subtype=subtype)
            made[key] = path.read_bytes()
        return made[key]

    return get


@pytest.fixture
def seconds_of(tmp_path):
    """Writes bytes as a file and reads it: its seconds, or the refusal's words."""

    def read(content, **options):
        path = tmp_path / "song.mp3"  # the content decides, not the name
        path.write_bytes(content)
        try:
            waveform, rate = read_audio(path, **options)
        except AudioError as error:
            said = str(error)
        else:
            return waveform.shape[1] / rate
        assert re.fullmatch(r".*: expected .*; (mend|split|scale|keep)[^\n]*", said)
        assert said.startswith(str(path))
        return said

    return read


def put(content, place, layout, value):
    """Bytes with a number written over at a place."""
    changed = bytearray(content)
    struct.pack_into(layout, changed, place, value)
    return bytes(changed)


# --- usual files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_usual_format_is_read(tmp_path, written, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(written(kind, channels=2))
    waveform, rate = read_audio(path)
    assert (waveform.shape, waveform.dtype, rate) == ((1, 96_000), np.float32, 48_000)
    mean = music(96_000, 48_000, channels=2).mean(axis=0)
    assert np.corrcoef(waveform[0], mean)[0, 1] > 0.95
    assert read_audio(path, stereo=True)[0].shape == (2, 96_000)


def test_channels(tmp_path):
    mono, many = tmp_path / "mono.wav", tmp_path / "many.wav"
    soundfile.write(mono, music(100).T, RATE, subtype="FLOAT")
    soundfile.write(many, music(100, channels=6).T, RATE, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(mono, stereo=True)[0], np.repeat(music(100), 2, 0))
    expected = music(100, channels=6).mean(axis=0, keepdims=True)
    np.testing.assert_allclose(read_audio(many)[0], expected, atol=1e-6)
    with pytest.raises(AudioError, match=r"many\.wav: expected one or two channels, found: 6"):
        read_audio(many, stereo=True)


def test_what_is_no_audio_is_refused_by_name(tmp_path, written):
    path, fifo = tmp_path / "text.mp3", tmp_path / "pipe.wav"
    path.write_text("no audio\n" * 100)
    with pytest.raises(AudioError, match="expected wav, flac, ogg, opus, mp3"):
        read_audio(path)
    os.mkfifo(fifo)  # which must not be waited for
    for wrong in (fifo, tmp_path, tmp_path / "missing.wav"):
        with pytest.raises(AudioError, match="audio that libsndfile reads"):
            read_audio(wrong)
    path.write_bytes(b"")
    with pytest.raises(AudioError, match="an empty file"):
        read_audio(path)
    path.write_bytes(written("wav")[:44])
    with pytest.raises(AudioError, match="an end after 0"):
        read_audio(path)


# --- cut off, damaged ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_is_told_wherever_it_is_cut(written, seconds_of, kind):
    whole = written(kind)
    places = [1, 10, 30, 100, *range(1000, len(whole), len(whole) // 17), len(whole) - 1]
    for place in places:
        assert isinstance(found := seconds_of(whole[:place]), str), f"{kind} of {place}: {found} s"


def test_a_cut_mp3_without_a_tag_ends_within_a_frame(written, seconds_of):
    frames = without_tag(written("mp3"))
    assert "the file's end within it" in seconds_of(frames[: len(frames) // 2 + 1])


@pytest.mark.parametrize("kind", ["flac", "ogg", "opus"])
def test_a_flipped_bit_is_told(written, seconds_of, kind):
    """These kinds carry checksums."""
    whole = bytearray(written(kind))
    whole[len(whole) // 2] ^= 1
    assert isinstance(seconds_of(bytes(whole)), str)


def test_flac_is_checked_by_its_md5(written, seconds_of):
    whole = written("flac")
    assert seconds_of(whole) == SECONDS
    assert "MD5" in seconds_of(put(whole, 30, "<I", 0))
    assert seconds_of(whole[:26] + bytes(16) + whole[42:]) == SECONDS  # of a pipe: none


# --- headers that lie ----------------------------------------------------------------------------


def without_tag(mp3):
    """An mp3 without its first frame, where the encoder keeps its Xing or LAME tag."""
    assert b"Xing" in mp3[:200] or b"Info" in mp3[:200]
    return mp3[mp3.index(mp3[:2], 4) :]


def test_a_variable_rate_mp3_without_its_tag(tmp_path, seconds_of):
    """Its first frame is small: from that and the size a decoder guesses 8 s."""
    noise = np.random.default_rng(0).standard_normal((20 * 44_100, 1)).astype(np.float32)
    noise *= np.repeat([1e-4, 0.3], 10 * 44_100)[:, None]
    path = tmp_path / "vbr.mp3"
    soundfile.write(path, noise, 44_100, format="MP3", bitrate_mode="VARIABLE")
    waveform, _ = read_audio(path)
    tagged = path.read_bytes()
    path.write_bytes(without_tag(tagged))
    found, rate = read_audio(path)
    assert 20 <= found.shape[1] / rate < 20.1  # with what the encoder put in front and behind
    np.testing.assert_allclose(found[0, 1105:][: waveform.shape[1]], waveform[0], atol=1e-5)


def test_an_mp3_whose_tag_lies(written, seconds_of):
    whole = written("mp3")
    place = max(whole.find(b"Xing", 0, 200), whole.find(b"Info", 0, 200)) + 8
    (frames,) = struct.unpack_from(">I", whole, place)
    assert seconds_of(put(whole, place, ">I", frames // 3)) == SECONDS
    assert "an end after" in seconds_of(put(whole, place, ">I", frames * 3))
    assert seconds_of(put(whole, place + 4, ">I", 1000)) == SECONDS  # its bytes


def id3(size, claimed=None):
    claimed = size if claimed is None else claimed
    digits = bytes(claimed >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\4\0\0" + digits + b"\0" * size


APE = b"\1\0\0\0\0\0\0\0Title\0x"
APE_FOOTER = b"APETAGEX" + struct.pack("<IIII", 2000, len(APE) + 32, 1, 0) + bytes(8)


def test_tags_around_an_mp3(written, seconds_of):
    whole, plain = written("mp3"), without_tag(written("mp3"))
    v1, lyrics = b"TAG" + b"x" * 125, b"LYRICSBEGINla la000011LYRICS200"
    for tagged in (id3(5000) + whole, id3(50) + id3(9000) + whole, whole + v1):
        assert seconds_of(tagged) == SECONDS
    for tagged in (whole + APE + APE_FOOTER + v1, whole + lyrics + v1, whole + id3(300)):
        assert seconds_of(tagged) == SECONDS
    for tagged in (id3(5000) + plain + APE + APE_FOOTER, plain + v1, plain + bytes(2000)):
        assert seconds_of(tagged) == pytest.approx(SECONDS, abs=0.1)
    assert "sound within it" in seconds_of(id3(100, claimed=9000) + whole)
    assert "sound within it" in seconds_of(id3(100, claimed=1 << 27) + plain)
    assert "other bytes" in seconds_of(id3(100) + b"U" * 9000 + plain)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_behind_the_sound_is_told(written, seconds_of, kind):
    assert isinstance(seconds_of(written(kind) + b"U" * 9999), str)
    other = written("flac" if kind != "flac" else "ogg")
    assert isinstance(seconds_of(written(kind) + other), str)


def test_flac_headers_that_lie(written, seconds_of):
    whole = written("flac")
    (facts,) = struct.unpack_from(">Q", whole, 18)

    def with_samples(samples, content=whole):
        return put(content, 18, ">Q", facts >> 36 << 36 | samples)

    unknown = with_samples(0)[:26] + bytes(16) + whole[42:]  # as of a pipe: no length, no MD5
    for lying in (with_samples(0), with_samples(30_000), unknown, id3(500) + whole):
        assert seconds_of(lying) == SECONDS
    assert "3.00 s, as its header says" in seconds_of(with_samples(144_000))
    for cut in (1, 2, 999, len(whole) // 2):
        assert isinstance(seconds_of(unknown[:-cut]), str)
    assert isinstance(seconds_of(whole[:100] + whole[5000:]), str)


@pytest.mark.parametrize(
    ("kind", "mark", "layout"),
    [
        ("wav", b"data", "<I"),
        ("aiff", b"SSND", ">I"),
        ("caf", b"data", ">q"),
        ("w64", b"data", "<Q"),
        ("rf64", b"ds64", "<Q"),
    ],
)
def test_lengths_that_lie(written, seconds_of, kind, mark, layout):
    whole = written(kind)
    place = whole.index(mark) + {"w64": 16, "rf64": 16}.get(kind, 4)
    (length,) = struct.unpack_from(layout, whole, place)
    assert length > 2 * 48_000
    assert "neither sound nor a tag" in seconds_of(put(whole, place, layout, length // 3))
    assert "as its header says" in seconds_of(put(whole, place, layout, length * 3))
    assert "as its header says" in seconds_of(put(whole, place, layout, length + 2))
    unknown = {"caf": (-1,), "w64": (), "rf64": ()}
    for mark_of_a_pipe in unknown.get(kind, (0, 0x7FFF_F000, 0xFFFF_FFFF)):
        assert seconds_of(put(whole, place, layout, mark_of_a_pipe)) == SECONDS


def test_chunks_of_a_wav(written, seconds_of):
    whole, extra = written("wav"), b"LIST" + struct.pack("<I", 5) + b"INFO!"
    for tail in (extra, extra + b"\0" + extra, b"TAG" + b"x" * 125, bytes(512)):
        assert seconds_of(whole + tail) == SECONDS
    assert seconds_of(whole[:12] + extra + b"\0" + whole[12:]) == SECONDS
    assert "another at byte" in seconds_of(whole + whole[36:])
    assert "neither sound nor a tag" in seconds_of(whole + whole)
    assert "a chunk of sound" in seconds_of(whole[:36] + extra)


# --- more than one stream ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flac", "ogg", "opus", "mp3"])
def test_streams_one_behind_the_other_are_joined(written, seconds_of, kind):
    one, two = written(kind), written(kind, channels=2)
    assert seconds_of(one + one + one) == 3 * SECONDS
    for options in ({}, {"stereo": True}):
        assert seconds_of(one + two, **options) == 2 * SECONDS
    assert isinstance(seconds_of(one + one[: len(one) // 2]), str)
    assert isinstance(seconds_of(one[: len(one) // 2] + one), str)
    if kind != "opus":  # which is of 48 kHz always
        said = seconds_of(one + written(kind, rate=32_000))
        assert "one sampling rate, found: 48000 Hz, then 32000 Hz; split it" in said


def test_mp3s_joined_without_tags(written, seconds_of):
    plain = without_tag(written("mp3"))
    alone = seconds_of(plain)
    assert seconds_of(plain + plain) == pytest.approx(2 * alone)
    assert seconds_of(id3(300) + plain + id3(300) + plain) == pytest.approx(2 * alone)
    assert "other bytes" in seconds_of(plain + b"U" * 20 + plain)
    assert "48000 Hz, then 32000" in seconds_of(plain + without_tag(written("mp3", rate=32_000)))


def test_streams_at_once_are_refused(written, seconds_of):
    one, two = written("ogg"), written("opus")
    first = one.index(b"OggS", 4)
    assert "one stream at a time" in seconds_of(one[:first] + two + one[first:])


# --- levels --------------------------------------------------------------------------------------


@pytest.fixture
def refusal(tmp_path):
    """What is said of samples [N, C], written as 32-bit float; "" where they are taken."""

    def say(samples, subtype="FLOAT", **options):
        path = tmp_path / "levels.wav"
        soundfile.write(path, samples, RATE, subtype=subtype)
        try:
            read_audio(path, **options)
        except AudioError as error:
            return f"{type(error).__name__} {error}"
        return ""

    return say


def test_levels_that_are_no_sound_are_named(refusal):
    sound = music(RATE).T.astype(np.float64)
    for stray in (1e29, -4.5, 3e38):
        spoiled = sound.copy()
        spoiled[4000] = stray
        said = refusal(spoiled)
        assert "expected samples of at most 4 (full scale is 1), found: a peak" in said
        assert f"a peak of {abs(stray):.6g} at 0.500 s; scale" in said
    assert "a peak of 32768 at 0." in refusal(sound / np.abs(sound).max() * 32768)
    assert refusal(sound / np.abs(sound).max() * 3.9) == ""
    both = np.hstack([sound, sound])
    both[4000] = 1e29, -1e29  # whose mean is 0
    assert "a peak of 1e+29 at 0.500 s" in refusal(both)
    for odd, subtype in ((np.nan, "FLOAT"), (-np.inf, "FLOAT"), (1e300, "DOUBLE")):
        spoiled = both / 1e30 + np.hstack([sound, sound])
        spoiled[6000:, 1] = odd
        said = refusal(spoiled, subtype)
        assert "found: a peak of NaN or infinity at 0.750 s; scale" in said


def test_silence_is_judged_by_each_channel(refusal):
    sound = music(RATE).T
    nothing = np.zeros_like(sound)
    assert "SilentError" in refusal(nothing)
    assert "silence (nothing at all)" in refusal(np.hstack([nothing, nothing]))
    assert "silence (-86 dBFS)" in refusal(sound / np.ptp(sound) * 1e-4)
    assert "silence" in refusal(nothing + 0.5)  # an offset is no sound
    assert "silence" in refusal(nothing + 1e-40)
    for options in ({}, {"stereo": True}):
        assert refusal(np.hstack([sound, nothing]), **options) == ""
        assert refusal(np.hstack([nothing, sound * 1e-3]), **options) == ""


def test_channels_that_cancel_are_named(refusal):
    sound, noise = music(RATE).T, music(RATE, channels=2)[1:].T
    for other in (-sound, -0.999 * sound, noise * 1e-3 - sound, 0.7 - sound):
        said = refusal(np.hstack([sound, other]))
        assert "AudioError" in said
        assert "cancel each other; keep both with --stereo" in said
        assert refusal(np.hstack([sound, other]), stereo=True) == ""
    for other in (sound, 0.1 * sound, np.roll(sound, 999), -0.5 * sound):
        assert refusal(np.hstack([sound, other])) == ""


def test_a_silent_file_is_an_audio_error():
    assert issubclass(SilentError, AudioError)  # what other commands expect


# --- rates, writing ------------------------------------------------------------------------------
def test_resampling_keeps_a_tone(tmp_path):
    def tone(rate):
        return np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)[None]

    resampled = resample(tone(48_000), 48_000, 44_100)
    assert resampled.shape == (1, 44_100)
    np.testing.assert_allclose(resampled[:, 500:-500], tone(44_100)[:, 500:-500], atol=1e-4)


def test_wav_files_clip_and_leave_nothing_behind(tmp_path):
    path = tmp_path / "a.wav"
    write_wav(path, [np.array([[0.5, 2.0], [-0.25, -2.0]], np.float32)], RATE, (2, 2))
    samples, rate = soundfile.read(path)
    assert rate == RATE
    np.testing.assert_allclose(samples, [[0.5, -0.25], [1, -1]], atol=1e-4)
    assert list(tmp_path.iterdir()) == [path]
