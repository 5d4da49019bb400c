"""encode_npq.py: real audio, a real (tiny, random) DAC, and the door as a process of its own."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
import soundfile
import torch
from kit import processes
from kit.sounds import HOP, RATE, K, V, music, save_tiny_dac

import encode_npq
from cli.command_line import UsageError
from encode_npq import main, to_loudness
from sound.audio_file import SilentError, read_audio, resample
from sound.codec import load_codec
from sound.npq_format import map_codes, read_header, write_npq

DOOR = Path(encode_npq.__file__)


@pytest.fixture(scope="module")
def codec_path(tmp_path_factory):
    return str(save_tiny_dac(tmp_path_factory.mktemp("codec") / "tiny.pth"))


@pytest.fixture
def song(tmp_path):
    """A second of stereo at 16 kHz, to be resampled to the codec's 8 kHz."""
    path = tmp_path / "music" / "song.wav"
    path.parent.mkdir()
    soundfile.write(path, music(2 * RATE, 2 * RATE, channels=2).T, 2 * RATE, subtype="FLOAT")
    return path


def door(*arguments):
    command = [sys.executable, str(DOOR), *map(str, arguments)]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    return processes.run(command, capture_output=True, text=True, check=False, env=ascii_only)


def usage_error(capsys, *arguments):
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    return the_error(capsys)


def the_error(capsys):
    """What stands on standard error: one line, which starts with `!`."""
    message = capsys.readouterr().err
    assert re.fullmatch(r"! [^\n]+\n", message), message
    return message


# --- shifted encodings ---------------------------------------------------------------------------


def test_offsets_encode_the_sound_from_parts_of_a_frame_later(song, codec_path, tmp_path, capsys):
    flags = [str(song.parent), "--out-dir", str(tmp_path / "out"), "--codec", codec_path]
    assert main([*flags, "--offsets", "4"]) == 0
    names = ["song.npq", *(f"song.shift{part}of4.npq" for part in (1, 2, 3))]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.npq")) == names
    codec = load_codec(codec_path)
    waveform, rate = read_audio(song)
    mono = torch.from_numpy(resample(waveform, rate, RATE)).mean(0)
    found = [map_codes(read_header(tmp_path / "out" / name)) for name in names]
    for part, codes in enumerate(found):
        gone = part * HOP // 4
        later = torch.nn.functional.pad(mono[gone:], (0, gone))
        assert codes.tolist() == codec.encode(later).tolist()
    assert not np.array_equal(found[0], found[1])
    assert main([*flags, "--offsets", "4"]) == 0
    assert "0 files written, 4 done before" in capsys.readouterr().out
    assert main([*flags]) == 0  # the unshifted is the same, whatever the offsets
    assert "0 files written, 1 done before" in capsys.readouterr().out
    assert main(["--info", str(tmp_path / "out" / names[2])]) == 0
    assert "shift 2/4" in capsys.readouterr().out
    assert "expected 1 to 16" in usage_error(capsys, *flags, "--offsets", "0")
    assert "--offsets does not go with --decode" in usage_error(
        capsys, tmp_path / "out", "--decode", "--offsets", "4", "--out-dir", tmp_path / "wav"
    )


# --- a folder, as a process ----------------------------------------------------------------------


def test_a_folder_with_bad_files_interrupted_and_finished(tmp_path, codec_path, capsys):
    source, out = tmp_path / "music", tmp_path / "out"
    (source / "album").mkdir(parents=True)
    (source / "cover.jpg").write_bytes(b"no audio, and not named as audio")
    (source / "broken.mp3").write_bytes(os.urandom(3000))
    soundfile.write(source / "silent.flac", np.zeros(RATE), RATE)
    sounds = (music(RATE, RATE, channels=48) * 2**15).astype(np.int16)
    sounds[45] = sounds[47]
    for i, sound in enumerate(sounds):
        folder, suffix = (source, "wav") if i % 2 else (source / "album", "flac")
        soundfile.write(folder / f"t{i:02}.{suffix}", sound, RATE)
    arguments = source, "--out_dir", out, "--codec", codec_path

    command = [sys.executable, str(DOOR), *map(str, arguments)]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with processes.Popen(command, **both, text=True) as process:
        while "ok" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        assert re.search(r"^\d+ files written, 0 done before", process.stdout.read(), re.M)
        assert process.stderr.read() == "! interrupted; the same command goes on from here\n"
    assert process.returncode == 130
    early = {path: path.stat().st_mtime_ns for path in out.rglob("*.npq")}
    assert 1 <= len(early) < 48
    assert not list(out.rglob("*.tmp"))  # nothing half-written

    assert main(list(map(str, arguments))) == 1
    finished, error = capsys.readouterr()
    assert error.startswith("! 1 of 50 files failed, each row says why; ")
    assert f"{48 - len(early)} files written, {len(early)} done before" in finished
    assert (
        f"1 silent, not encoded:\n  {source / 'silent.flac'}: silence (nothing at all)\n"
        in finished
    )
    assert f"{source / 'broken.mp3'}: expected wav, flac, ogg, opus, mp3" in finished
    assert f"{source / 't47.wav'} = {source / 't45.wav'}" in finished
    assert finished.endswith("\npassed over: 1 .jpg\n")
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.npq")}
    assert len(times) == 48
    assert (out / "album" / "t08.npq") in times
    assert early.items() <= times.items()
    for path in times:
        header = read_header(path)
        assert (header.num_frames, header.vocab_sizes) == (RATE // HOP, (V,) * K)

    again = door(*arguments)
    assert again.returncode == 1
    assert "0 files written, 48 done before" in again.stdout
    assert "1 silent" in again.stdout
    assert "1 FAILED" in again.stdout
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_info_needs_no_codec(tmp_path):
    codes = np.tile(np.array([[0, 5], [1, 5]]), (50, 1))
    write_npq(tmp_path / "a.npq", codes, vocab_sizes=[4, 1024], frame_rate=100, bitrate=128)
    program = (
        f"import sys; sys.path.insert(0, {str(DOOR.parent)!r}); import encode_npq\n"
        f"code = encode_npq.main([{str(tmp_path)!r}, '--info'])\n"
        "assert 'dac' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "NPQ1, 2 codebooks (mono)" in lines[0]
    assert "100 frames at 100.0000 frames/s: 1.0 s, source 128 kbit/s" in lines[1]
    assert lines[3].split() == ["0", "4", "2", "(", "50%)", "0.693"]  # ln 2 nats
    assert float(lines[4].split()[-1]) == 0


# --- there and back ------------------------------------------------------------------------------


def test_mono_is_the_codecs_codes_of_the_resampled_downmix(tmp_path, song, codec_path):
    out, back = tmp_path / "out", tmp_path / "back"
    assert main([str(song), "--out-dir", str(out), "--codec", codec_path]) == 0
    header = read_header(out / "song.npq")
    codec = load_codec(codec_path)
    waveform = torch.from_numpy(resample(*read_audio(song), RATE))
    expected = codec.encode(waveform)[0]
    np.testing.assert_array_equal(map_codes(header), expected.numpy())
    assert header.layout == "NPQ1"
    assert header.frame_rate == RATE / HOP
    assert header.bitrate == pytest.approx(song.stat().st_size * 8 / 1000)

    assert main([str(out), "--decode", "--out-dir", str(back), "--codec", codec_path]) == 0
    samples, rate = soundfile.read(back / "song.wav", dtype="float32")
    assert rate == RATE
    np.testing.assert_allclose(samples, codec.decode(expected).numpy(), atol=1e-4)


def test_stereo_is_mid_and_side(tmp_path, song, codec_path):
    out, back = tmp_path / "out", tmp_path / "back"
    flags = ["--stereo", "--mid_codebooks", "5", "--side-codebooks", "3", "--codec", codec_path]
    assert main([str(song), "--out-dir", str(out), *flags]) == 0
    header = read_header(out / "song.npq")
    assert (header.layout, header.num_codebooks, header.side_codebooks) == ("NPQ2", 8, 3)
    codec, codes = load_codec(codec_path), torch.from_numpy(map_codes(header).astype(np.int64))
    left, right = resample(*read_audio(song, stereo=True), RATE)
    mid, side = (torch.from_numpy(c) for c in ((left + right) / 2, (left - right) / 2))
    assert (codes[:, :5] == codec.encode(mid, codebooks=5)).float().mean() > 0.99
    assert (codes[:, 5:] == codec.encode(side, codebooks=3)).float().mean() > 0.99

    assert main([str(out), "--decode", "--out-dir", str(back), "--codec", codec_path]) == 0
    samples, _ = soundfile.read(back / "song.wav", dtype="float32")
    mid, side = codec.decode(codes[:, :5]), codec.decode(codes[:, 5:])
    expected = torch.stack([mid + side, mid - side], dim=1).clamp(-1, 1).numpy()
    np.testing.assert_allclose(samples, expected, atol=1e-4)


def test_decoding_with_another_codec_is_refused(tmp_path, codec_path, capsys):
    path = tmp_path / "a.npq"
    write_npq(path, np.zeros((9, 2), int), vocab_sizes=[1024] * 2, frame_rate=86.13)
    assert main([str(path), "--decode", "--out-dir", str(tmp_path), "--codec", codec_path]) == 1
    printed = capsys.readouterr().out
    assert f"at most {K} codebooks of {V} at 200.00 frames/s" in printed
    assert "found 2 codebooks of 1024 at 86.13 frames/s; name the codec" in printed
    assert list(tmp_path.glob("*.wav")) == []


# --- what is done already ------------------------------------------------------------------------


@pytest.fixture
def encode(tmp_path, song, codec_path, capsys):
    """Runs the command into one folder, with flags behind: exit code and what it said."""

    def run(*flags, inputs=song):
        code = main([str(inputs), "--out-dir", str(tmp_path), "--codec", codec_path, *flags])
        printed, error = capsys.readouterr()
        return code, printed + error

    return run


@pytest.fixture(scope="module")
def other_codec(tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "other.pth"
    torch.manual_seed(1)
    weights = torch.load(save_tiny_dac(path), weights_only=True)
    for tensor in weights["state_dict"].values():
        tensor.mul_(1.01)
    torch.save(weights, path)
    return str(path)


def test_what_is_stale_or_damaged_is_done_again_and_said(tmp_path, song, encode):
    target = tmp_path / "song.npq"
    done, again = (0, "1 done before"), (0, "1 of before made again")

    def ends(result, expected):
        return result[0] == expected[0] and expected[1] in result[1]

    assert ends(encode(), (0, "1 files written, 0 done before"))
    assert ends(encode(), done)
    assert ends(encode("--overwrite"), (0, "1 files written"))
    target.write_bytes(target.read_bytes()[:-1])
    assert ends(encode(), again)
    assert ends(encode(), done)
    os.utime(target, (0, 0))  # as a copy: the codes are those of the record
    assert ends(encode(), done)
    os.utime(song, (2**33, 2**33))  # long ahead: once, and not at each start
    assert ends(encode(), again)
    assert ends(encode(), done)
    os.utime(song, (0, 0))  # an older file in its place
    assert ends(encode(), again)


def test_what_was_made_otherwise_is_never_called_done(tmp_path, encode, other_codec, codec_path):
    """Nor replaced without --overwrite."""
    target = tmp_path / "song.npq"
    assert encode()[0] == 0
    before = target.read_bytes()
    for flags, said in (
        (("--codec", other_codec), f"codec {codec_path}"),
        (("--loudness", "-30"), "loudness None, not -30"),
        (("--codebooks", "2"), f"codebooks {K}, not 2"),
        (("--stereo", "--mid-codebooks", "4"), "side codebooks 0, not 4"),
    ):
        code, printed = encode(*flags)
        assert code == 2
        assert f"1 of 1 targets were made otherwise: {target} (" in printed
        assert said in printed
        assert "use another --out-dir, or --overwrite" in printed
        assert "files written" not in printed
        assert target.read_bytes() == before
        assert encode(*flags, "--overwrite")[0] == 0
        assert target.read_bytes() != before
        assert "1 done before" in encode(*flags)[1]
        assert encode()[0] == 2
        assert encode("--overwrite")[0] == 0
    assert "1 done before" in encode("--codebooks", str(K))[1]  # all of them, as without
    copy = tmp_path / "copy.pth"
    copy.write_bytes(Path(codec_path).read_bytes())
    assert "1 done before" in encode("--codec", str(copy))[1]  # the weights count, not the name


def test_files_of_unknown_origin_are_left_and_said(tmp_path, song, encode):
    target, record = tmp_path / "song.npq", tmp_path / ".encode_npq.jsonl"
    write_npq(target, np.zeros((9, K), int), vocab_sizes=[V] * K, frame_rate=200)
    before = target.read_bytes()
    code, printed = encode()
    assert code == 0
    assert "0 files written, 0 done before" in printed
    assert "1 of unknown origin left as they are: no record" in printed
    assert target.read_bytes() == before
    assert encode("--codebooks", "2")[0] == 2
    assert encode("--overwrite")[0] == 0
    lines = record.read_bytes()
    for damaged in (lines[:-20], b"\xff{" * 9, b'{"file": 1}\n[]\n9\n', b"[" * 10**5, b""):
        record.write_bytes(damaged)
        assert "1 of unknown origin" in encode()[1]
    record.write_bytes(b'\n{"file": "song.npq", "si' + lines)
    assert "1 done before" in encode()[1]
    write_npq(target, np.zeros((200, K), int), vocab_sizes=[V] * K, frame_rate=200)
    assert target.stat().st_size == len(before) - 2 * 9 * K + 2 * 200 * K
    assert "1 of unknown origin" in encode()[1]  # another file in its place, as large
    os.utime(target, (0, 0))
    assert "of unknown origin, and older than its source" in encode()[1]


def test_a_record_alone_makes_nothing_done(tmp_path, encode, other_codec):
    """A kill between the record and the file that it is for."""
    target = tmp_path / "song.npq"
    assert encode("--codec", other_codec)[0] == 0
    old = target.read_bytes()
    assert encode("--overwrite")[0] == 0
    target.write_bytes(old)  # as if the new one had not come into its place
    assert encode()[0] == 2
    assert "1 done before" in encode("--codec", other_codec)[1]


def test_two_encoders_at_once_leave_records_of_all(tmp_path, codec_path):
    source, out = tmp_path / "music", tmp_path / "out"
    source.mkdir()
    for i in range(8):
        soundfile.write(source / f"{i}.wav", music(RATE, RATE).T * (i + 1) / 8, RATE)
    words = [sys.executable, str(DOOR), source, "--out-dir", out, "--codec", codec_path]
    both = [processes.Popen([*words, "--overwrite"], stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert "0 files written, 8 done before" in door(*words[2:]).stdout


def test_decoded_files_know_their_codec(tmp_path, encode, codec_path, other_codec, capsys):
    assert encode()[0] == 0
    back = tmp_path / "back"
    decode = [str(tmp_path / "song.npq"), "--decode", "--out-dir", str(back), "--codec"]
    assert main([*decode, codec_path]) == 0
    os.utime(tmp_path / "song.npq", (2**33, 2**33))
    assert main([*decode, codec_path]) == 0
    assert "its source is another" in capsys.readouterr().out
    assert main([*decode, codec_path]) == 0
    assert "1 done before" in capsys.readouterr().out
    assert main([*decode, other_codec]) == 2
    assert f"codec {codec_path}" in capsys.readouterr().err


def test_info_tells_what_made_a_file(tmp_path, encode, codec_path, capsys):
    assert encode("--loudness", "-30")[0] == 0
    assert main([str(tmp_path / "song.npq"), "--info"]) == 0
    assert re.search(rf"made by codec {codec_path} .*loudness -30", capsys.readouterr().out)


# --- flags, names, loudness ----------------------------------------------------------------------


def test_wrong_usage_says_what_to_do(tmp_path, song, capsys):
    out = ("--out-dir", tmp_path / "out")
    assert "nothing to work on" in usage_error(capsys, *out)
    assert "AUDIO: expected a path, found ''" in usage_error(capsys, "", *out)
    assert "--out-dir is missing" in usage_error(capsys, song)
    assert "no such file" in usage_error(capsys, tmp_path / "*.flac", *out)
    assert "no .npq in it" in usage_error(capsys, song.parent, *out, "--decode")
    assert "need --stereo" in usage_error(capsys, song, *out, "--side-codebooks", 4)
    assert "use --mid-codebooks" in usage_error(capsys, song, *out, "--stereo", "--codebooks", 4)
    assert "expected 1 to 64" in usage_error(capsys, song, *out, "--codebooks", 0)
    assert "expected 1 to 64" in usage_error(capsys, song, *out, "--codebooks", "all")
    assert "> -70 and <= 0" in usage_error(capsys, song, *out, "--loudness", 16)
    assert "--decode does not go with --info" in usage_error(capsys, song, "--info", "--decode")
    assert "--out-dir does not go with" in usage_error(capsys, song, "--info", *out)
    assert "--codebooks does" in usage_error(capsys, song, *out, "--decode", "--codebooks", 4)
    assert "--loudness does" in usage_error(capsys, song, *out, "--decode", "--loudness", 0)
    assert "no .npq in it" in usage_error(capsys, song, *out, "--decode")
    codes = song.with_name("codes.wav")  # such a file need not be called .npq if it is named
    write_npq(codes, np.zeros((9, 2), int), vocab_sizes=[4, 4], frame_rate=100)
    assert "written over itself" in usage_error(capsys, codes, "--decode", "--out-dir", song.parent)
    codes.unlink()
    twin = song.with_suffix(".flac")
    twin.write_bytes(song.read_bytes())
    message = usage_error(capsys, song.parent, *out)
    assert all(str(path) in message for path in (song, twin, tmp_path / "out" / "song.npq"))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_stops_the_run_at_once(tmp_path, song, capsys):
    (tmp_path / "file").touch()
    for folder, reason in (
        (tmp_path / "file", "File exists; expected a folder or nothing there; name another place"),
        (tmp_path / "file" / "deeper", "Not a directory; check the path"),
        (Path("/proc/nothing"), "No such file or directory; check the path"),
    ):
        assert f"--out-dir {folder}: {reason}" in usage_error(capsys, song, "--out-dir", folder)


# --- files that fail, and what stays of a run ----------------------------------------------------


def test_a_file_that_fails_costs_a_row(tmp_path, codec_path, capsys):
    """Text, nothing, half a file; a file that is whole among them is encoded."""
    source, out = tmp_path / "music", tmp_path / "out"
    source.mkdir()
    for name, format in (
        ("w.wav", "WAV"),
        ("f.flac", "FLAC"),
        ("m.mp3", "MP3"),
        ("a.aiff", "AIFF"),
    ):
        rate = 44_100 if format == "MP3" else RATE
        soundfile.write(source / name, music(5 * rate, rate).T, rate, format=format)
        whole = (source / name).read_bytes()
        (source / name).write_bytes(whole[: len(whole) // 2])
    (source / "text.wav").write_text("no audio\n" * 100)
    (source / "empty.ogg").touch()
    (source / "gone.wav").symlink_to("nowhere")
    (source / "folder.wav").mkdir()
    whole = source / "whole.wav"
    soundfile.write(whole, music(RATE, RATE).T, RATE)
    streamed = bytearray(
        whole.read_bytes()
    )  # as a pipe's writer leaves it: no length in its header
    streamed[4:8] = streamed[40:44] = b"\xff" * 4
    (source / "streamed.wav").write_bytes(streamed)

    arguments = [str(source), "--out-dir", str(out), "--codec", codec_path]
    assert main(arguments) == 1
    printed, error = capsys.readouterr()
    assert "2 files written" in printed
    folder, gone, *rows = printed.partition("8 FAILED:\n")[2].splitlines()
    names = [row.split(":")[0].rpartition("/")[2] for row in rows]
    assert names == ["a.aiff", "empty.ogg", "f.flac", "m.mp3", "text.wav", "w.wav"]
    assert "folder.wav: expected a file, found a folder (what is in it was searched)" in folder
    assert "gone.wav: expected a file, found a broken link; rename or remove it" in gone
    assert all(row.endswith("; mend or convert the file, or take it out") for row in rows)
    for row in (rows[0], rows[3], rows[5]):
        assert "as its header says, found: an end after " in row
    assert error.splitlines()[-1].startswith("! 8 of 10 files failed, each row says why;")
    assert "Traceback" not in error
    assert main([*arguments, "--debug"]) == 1
    assert capsys.readouterr().err.count("Traceback") >= 6


@pytest.mark.parametrize(
    "name", [b"with blanks", "ünï 音楽".encode(), b"odd\xff\xfe", "長".encode() * 83]
)
def test_a_name_may_hold_anything(tmp_path, codec_path, name):
    """As a process, whose output is ASCII; the last name is as long as a name can be."""
    path = os.fsencode(tmp_path) + b"/" + name + b".wav"
    soundfile.write(path, music(RATE, RATE).T, RATE, format="WAV")
    out = tmp_path / "out"
    done = door(os.fsdecode(path), "--out-dir", out, "--codec", codec_path)
    assert done.returncode == 0, done.stderr
    (target,) = (n for n in os.listdir(os.fsencode(out)) if n[:1] != b".")
    assert target == name + b".npq"
    back = door(out, "--decode", "--out-dir", tmp_path / "back", "--codec", codec_path)
    assert back.returncode == 0, back.stderr
    assert name + b".wav" in os.listdir(os.fsencode(tmp_path / "back"))


def test_decoding_does_not_replace_an_original(tmp_path, song, codec_path, capsys):
    """It stands beside its .npq, and is older."""
    flags = ["--out-dir", str(song.parent), "--codec", codec_path]
    assert main([str(song), *flags]) == 0
    os.utime(song, (0, 0))
    before = song.read_bytes()
    decode = [str(song.with_suffix(".npq")), "--decode", *flags]
    assert main(decode) == 1
    assert f"{song} is there and is older; --overwrite replaces it" in capsys.readouterr().out
    assert song.read_bytes() == before
    assert main([*decode, "--overwrite"]) == 0
    assert song.read_bytes() != before


def test_a_full_disk_ends_the_run_and_says_so(tmp_path, small_disk, codec_path, capsys):
    source, disk = tmp_path / "music", small_disk("64k")
    source.mkdir()
    for i in range(40):
        soundfile.write(source / f"{i:02}.wav", music(RATE, RATE).T * (i + 1) / 40, RATE)
    assert main([str(source), "--out-dir", str(disk), "--codec", codec_path]) == 1
    printed, error = capsys.readouterr()
    assert re.search(r"^\d+ files written", printed, re.M)
    assert "FAILED" not in printed
    assert re.search(r"^! \S+npq: No space left on device; free some, or name a place", error)
    assert all(read_header(path).num_frames for path in disk.glob("*.npq"))


def test_info_goes_on_after_a_bad_file(tmp_path, song, capsys):
    codes = np.zeros((50, 2), int)
    for name in ("a.npq", "c.npq"):
        write_npq(tmp_path / name, codes, vocab_sizes=[4, 4], frame_rate=100)
    (tmp_path / "b.npq").write_bytes(song.read_bytes())
    assert main([str(tmp_path), str(tmp_path / "a.npq"), "--info"]) == 1
    printed, error = capsys.readouterr()
    assert [line.count("NPQ1") for line in printed.splitlines() if "NPQ1" in line] == [1, 1]
    assert error == (
        f"! {tmp_path}/b.npq: magic: expected NPQ1 or NPQ2, found b'RIFF'; name .npq files only\n"
    )


def test_a_reader_that_leaves_does_not_end_the_work(tmp_path, codec_path):
    """As of `| head -1`."""
    source, out = tmp_path / "music", tmp_path / "out"
    source.mkdir()
    for i in range(4):
        soundfile.write(source / f"{i}.wav", music(RATE, RATE).T * (i + 1) / 4, RATE)
    command = [sys.executable, str(DOOR), source, "--out-dir", out, "--codec", codec_path]
    code, first, errors = processes.run_and_leave(command)
    assert (code, errors) == (0, "")
    assert first.startswith("[1/4]")
    assert len(list(out.glob("*.npq"))) == 4


def test_a_codec_that_cannot_be_had_stops_the_run(tmp_path, song, codec_path, capsys):
    out = ["--out-dir", str(tmp_path)]
    assert main([str(song), *out, "--codec", "mp4"]) == 1
    assert "expected 44khz, 24khz, 16khz, demo" in the_error(capsys)
    assert main([str(song), *out, "--codec", codec_path, "--codebooks", "30"]) == 1
    assert f"has {K} codebooks, found 30 asked for; set --codebooks to at most" in the_error(capsys)
    for device in ("nonsense", "cuda:99", "meta"):  # torch knows "meta", which computes nothing
        assert main([str(song), *out, "--codec", codec_path, "--device", device]) == 2
        message = the_error(capsys)
        assert message.startswith("! --device")
        assert device in message


def targets(*words):
    found = encode_npq.find_files(encode_npq.build_parser().parse_args(list(map(str, words))))
    return sorted(str(job.target) for job in encode_npq.find_jobs(found.files, Path("o"), ".npq"))


def test_targets_mirror_folders_and_globs(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("a/b/one.wav", "a/Two.MP3", "a/._Two.mp3", "x[1].flac")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "x").symlink_to("a/b")
    assert targets(tmp_path / "a") == ["o/Two.npq", "o/b/one.npq"]
    assert targets(tmp_path) == ["o/a/Two.npq", "o/a/b/one.npq", "o/x[1].npq"]
    assert targets(tmp_path / "**" / "*.wav") == ["o/a/b/one.npq"]
    assert targets(files[3], files[0], files[0]) == ["o/one.npq", "o/x[1].npq"]
    monkeypatch.chdir(tmp_path)
    assert targets(".") == targets("*") == targets(tmp_path)
    assert targets("x") == targets("a/b", "a/b/one.wav") == ["o/one.npq"]
    assert targets("./a/*", "x[1].flac") == ["o/Two.npq", "o/b/one.npq", "o/x[1].npq"]


def test_all_names_taken_twice_are_listed_at_once(tmp_path, capsys):
    for name in ("cut.flac", "cut.mp3", "b/cut.wav", "b/cut.ogg", "b/cut.WAV", "b/other.wav"):
        (tmp_path / "music" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "music" / name).touch()
    out = tmp_path / "out"
    with pytest.raises(UsageError) as caught:
        targets(tmp_path / "music", "--out-dir", out)
    music = f"{tmp_path}/music"
    assert str(caught.value).splitlines() == [
        "2 names would be taken twice, nothing was done; rename one of each, name the folder above "
        "both, or use two --out-dir",
        f"  {music}/b/cut.WAV and {music}/b/cut.ogg and {music}/b/cut.wav would become o/b/cut.npq",
        f"  {music}/cut.flac and {music}/cut.mp3 would become o/cut.npq",
    ]
    assert main([music, "--out-dir", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 3
    assert not out.exists()


def some_music(folder, *names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {".WAV": "WAV"}.get(Path(name).suffix)
        soundfile.write(folder / name, music(RATE, RATE).T * (i + 1) / 9, RATE, format=kind)


def test_what_cannot_be_read_is_named_and_the_rest_done(tmp_path, codec_path, capsys):
    """Fault 27."""
    source, out, store = tmp_path / "music", tmp_path / "out", tmp_path / "store"
    some_music(source, "a.wav", "b/c.WAV", "d.w64")
    some_music(store, "album/e.flac")
    (source / "linked").symlink_to(store / "album")
    (source / "round").symlink_to(source)
    for name in ("old.m4a", "b/old.WMA", "x.ape", "cover.jpg", "b/list.txt", "b/more.txt"):
        (source / name).write_bytes(b"no matter")
    os.mkfifo(source / "pipe.wav")
    (source / "null.flac").symlink_to("/dev/null")
    arguments = [str(source), "--out-dir", str(out), "--codec", codec_path]
    assert main(arguments) == 1
    printed, error = capsys.readouterr()
    found = sorted(str(p.relative_to(out)) for p in out.rglob("*.npq"))
    assert found == ["a.npq", "b/c.npq", "d.npq", "linked/e.npq"]
    rows = printed.partition("5 FAILED:\n")[2].splitlines()
    assert [row.split(":")[0].removeprefix(f"  {source}/") for row in rows[:-1]] == [
        "b/old.WMA", "null.flac", "old.m4a", "pipe.wav", "x.ape",
    ]  # fmt: skip
    assert ".wma cannot be read; convert it to .flac, or remove it" in rows[0]
    assert "expected a file, found a pipe" in rows[3]
    assert rows[-1] == "passed over: 2 .txt, 1 .jpg, 1 link to a folder above"
    assert error == "! 5 of 9 files failed, each row says why; the same command tries them again\n"
    assert main([str(source / "old.m4a"), *arguments[1:]]) == 1
    assert main([str(source / "pipe.wav"), *arguments[1:]]) == 1
    capsys.readouterr()
    for name in ("b/old.WMA", "null.flac", "old.m4a", "pipe.wav", "x.ape"):
        (source / name).unlink()
    assert main(arguments) == 0
    printed, error = capsys.readouterr()
    assert printed.endswith("passed over: 2 .txt, 1 .jpg, 1 link to a folder above\n")
    assert error == ""


def test_a_folder_without_permission_is_named_and_the_rest_encoded(tmp_path, codec_path):
    """Root may read everything, so this runs as nobody."""
    source, out = tmp_path / "music", tmp_path / "out"
    some_music(source, "a.wav", "secret/b.wav", "c/d.wav")
    out.mkdir()
    out.chmod(0o777)
    (source / "secret").chmod(0)
    for folder in tmp_path.parents:
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)  # pytest's own are private
    tmp_path.chmod(0o755)
    os.chmod(codec_path, 0o644)
    os.chmod(os.path.dirname(codec_path), 0o755)
    script = (
        "import os, sys, encode_npq; from sound.codec import load_codec; load_codec(sys.argv[-1]);"
        # All that is imported on the way lies where nobody may not read.
        "os.geteuid() or os.setuid(65534); sys.exit(encode_npq.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, str(source), "--out-dir", str(out)]
    done = processes.run(
        [*command, "--codec", codec_path], capture_output=True, text=True, cwd=DOOR.parent
    )
    assert done.returncode == 1, done.stderr
    assert f"1 FAILED:\n  {source}/secret: Permission denied; get the right to" in done.stdout
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.npq")) == ["a.npq", "c/d.npq"]


def test_a_quoted_glob_does_what_the_shells_own_does(tmp_path, codec_path, monkeypatch, capsys):
    """Both may name a cover picture and folders of albums."""
    some_music(tmp_path, "t/one/a.wav", "t/two/b.wav", "t/c.wav")
    (tmp_path / "t" / "cover.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "t" / "rip.log").write_bytes("text of a ripper".encode("utf-16"))
    monkeypatch.chdir(tmp_path)
    by_shell = subprocess.run(["bash", "-c", "echo t/*"], capture_output=True, text=True).stdout
    assert len(by_shell.split()) == 5
    for words in (by_shell.split(), ["t/*"]):
        assert main([*words, "--out-dir", "out", "--overwrite", "--codec", codec_path]) == 0
        printed = capsys.readouterr().out
        assert "3 files written" in printed
        assert printed.endswith("\npassed over: 1 .jpg, 1 .log\n")


def test_a_named_file_may_have_any_suffix(tmp_path, codec_path):
    some_music(tmp_path, "a.wav", "b.mp3", "c.flac", "d.ogg", "e.aiff")
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_suffix(f".{path.stem}"))
    files = sorted(map(str, tmp_path.iterdir()))
    assert main([*files, "--out-dir", str(tmp_path / "out"), "--codec", codec_path]) == 0
    assert len(list((tmp_path / "out").glob("*.npq"))) == 5


def test_samples_of_a_run_are_no_music_to_encode(tmp_path, monkeypatch):
    for name in ("rvq_9cb_metrics.jsonl", "samples/rvq_9cb_e0005__20250901-120000.wav", "x.wav"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).touch()
    (tmp_path / "heard").mkdir()
    (tmp_path / "heard" / "rvq_9cb_e0005__20250901-120000.wav").touch()
    (tmp_path / "song.wav").touch()
    monkeypatch.chdir(tmp_path)
    assert targets(".") == ["o/song.npq"]
    assert targets("run", ".") == ["o/song.npq", "o/x.npq"]


def test_loudness(tmp_path):
    waveform = music(44_100 * 2, 44_100, channels=2)
    louder = to_loudness(waveform, 44_100, -18, "a.wav")
    assert pyloudnorm.Meter(44_100).integrated_loudness(louder.T) == pytest.approx(-18, abs=0.1)
    assert louder.dtype == np.float32
    assert np.abs(to_loudness(waveform, 44_100, 0, "a.wav")).max() == pytest.approx(
        1
    )  # peaks do not clip
    with pytest.raises(SilentError):
        to_loudness(waveform * 1e-4, 44_100, -18, "a.wav")
    with pytest.raises(ValueError, match=r"more than 0\.4 s of audio .* found 0\.40 s"):
        to_loudness(waveform[:, :17_640], 44_100, -18, "a.wav")
    assert to_loudness(waveform[:, :17_641], 44_100, -18, "a.wav").shape == (2, 17_641)
