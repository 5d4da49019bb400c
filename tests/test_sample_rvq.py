"""sample_rvq.py and evaluation audio: from checkpoints to codes and sound."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from kit import processes
from kit.checkpoints import assert_same_tensors, comparable
from kit.trainer import ROOT, TINY, make_run, rows, run_trainer, train, wait_for

import sample_rvq
import train_rvq
from npq_dataset import WindowDataset, find_npq_files, scan_corpus, split_corpus
from run_folder.checkpoint import CheckpointError, load_checkpoint
from run_folder.files import save_checkpoint
from run_folder.shared_weights import export_weights
from sound.audio_file import write_wav
from sound.codec import CodecError, codec_id, load_codec
from sound.npq_format import map_codes, read_header, write_npq
from sound.origin import CodecId, Records
from sound.statistics import compare, describe
from training import samples
from training.resume import settle_data_change

SHORT = ("--frames", "20")
SOUND = ("--eval-audio-every", "1", "--eval-frames", "12", "--eval-dac-repo", "demo")


@pytest.fixture(scope="module")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of the bundled codec's shape: 9 codebooks of 1024."""
    folder = tmp_path_factory.mktemp("music")
    rng = np.random.default_rng(0)
    for i in range(2):
        codes = rng.integers(1024, size=(400, 9))
        write_npq(folder / f"{i}.npq", codes, vocab_sizes=[1024] * 9, frame_rate=86.1328125)
    return folder


@pytest.fixture(scope="module")
def checkpoint(music: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Best checkpoint of a short run, which has sampled after its only epoch."""
    save_dir = tmp_path_factory.mktemp("run")
    train("--data", music, "--save_dir", save_dir, "--epochs", "1", *SOUND)
    return save_dir / "rvq_9cb_best.pt"


def sample(*flags: str | Path) -> int:
    return sample_rvq.main([str(f) for f in flags])


def codes_in(path: Path) -> np.ndarray:
    return np.array(map_codes(read_header(path)))


def test_evaluation_audio_is_written_and_named(checkpoint):
    folder = checkpoint.parent / "samples"
    (npq,), (wav,) = folder.glob("*.npq"), folder.glob("*.wav")
    assert npq.name.startswith("rvq_9cb_e0001__")
    assert wav.stem == npq.stem
    assert codes_in(npq).shape == (12, 9)
    assert soundfile.info(wav).frames == 12 * 512
    assert soundfile.info(wav).samplerate == 44_100
    assert rows(checkpoint.parent, "sample")[0]["file"] == npq.name


def test_evaluation_audio_leaves_the_training_as_it_was(music, checkpoint, tmp_path):
    """Fault 22: the same weights and random state with and without samples."""
    quiet = train("--data", music, "--save_dir", tmp_path, "--epochs", "1")
    latest = load_checkpoint(checkpoint.with_name("rvq_9cb_latest.pt"))
    assert_same_tensors(comparable(latest), comparable(quiet))


def test_a_codec_that_fails_is_one_line_and_training_goes_on(music, tmp_path, capsys):
    """Fault 22."""
    nowhere = str(tmp_path / "nowhere.pth")
    flags = ("--epochs", "2", *SOUND[:-1], nowhere)
    train("--data", music, "--save_dir", tmp_path, *flags)
    said = capsys.readouterr().err
    assert said.count("evaluation audio failed, training goes on") == 2
    assert "nowhere.pth" in said
    assert [row["epoch"] for row in rows(tmp_path, "epoch")] == [1, 2]


def test_evaluation_audio_comes_with_its_repeats_and_the_musics(music, tmp_path, capsys):
    train("--data", music, "--save_dir", tmp_path, "--epochs", "1", *SOUND)
    (row,) = rows(tmp_path, "sample")
    (npq,) = (tmp_path / "samples").glob("*.npq")
    windows = held_out(music, tmp_path / "rvq_9cb_latest.pt")
    figures = compare(codes_in(npq).astype(np.int64), windows.excerpts(12))
    assert {name: row[name] for name in figures} == figures
    assert figures["repeats_sd"] >= 0
    assert f" {describe(figures)}\n" in capsys.readouterr().out


def held_out(music: Path, checkpoint: Path) -> WindowDataset:
    """Validation windows, cut as the trainer cuts them."""
    flags = load_checkpoint(checkpoint)["flags"]
    corpus = scan_corpus(find_npq_files([music]), ctx=flags["ctx"])
    _, val = split_corpus(corpus, ctx=flags["ctx"], val_split=flags["val_split"])
    return WindowDataset(corpus, val, ctx=flags["ctx"], stride=flags["ctx"])


def test_a_codec_that_fails_leaves_the_statistics(music, tmp_path):
    flags = ("--epochs", "1", *SOUND[:-1], str(tmp_path / "nowhere.pth"))
    train("--data", music, "--save_dir", tmp_path, *flags)
    (row,) = rows(tmp_path, "sample")
    assert "nowhere.pth" in row["error"]
    assert row["repeats_music"] >= 0


def test_without_validation_windows_there_are_no_statistics(music, tmp_path, capsys):
    flags = ("--epochs", "1", "--val_split", "0", *SOUND)
    train("--data", music, "--save_dir", tmp_path, *flags)
    assert "repeats n/a: no held-out music" in capsys.readouterr().out
    assert "repeats" not in rows(tmp_path, "sample")[0]


def test_statistics_that_fail_are_one_line_and_training_goes_on(music, tmp_path, capsys):
    """The validation file is cut while the sample, already drawn, is decoded, and is back after."""
    run, held_out = tmp_path / "run", tmp_path / "held_out.npq"
    train_on, validate_on = sorted(music.glob("*.npq"))
    shutil.copy(validate_on, held_out)
    (tmp_path / "list.txt").write_text(f"{held_out}\n")

    def cut_once_drawn() -> None:
        whole, times = held_out.read_bytes(), held_out.stat()
        wait_for(lambda: any(run.glob("samples/*.npq")))
        os.truncate(held_out, 100)
        wait_for(lambda: rows(run, "sample"))
        held_out.write_bytes(whole)
        os.utime(held_out, ns=(times.st_atime_ns, times.st_mtime_ns))

    thread = threading.Thread(target=cut_once_drawn)
    thread.start()
    files = ("--data", train_on, held_out, "--val-list", tmp_path / "list.txt")
    flags = ("--epochs", "2", *SOUND, "--eval-frames", "400", "--pattern", "parallel")
    train(*files, "--save_dir", run, *flags)
    thread.join()
    assert "statistics of the sample failed, training goes on" in capsys.readouterr().err
    assert [row["epoch"] for row in rows(run, "epoch")] == [1, 2]
    first, second = rows(run, "sample")
    assert "repeats" not in first
    assert "repeats" in second


# --- does it copy? -------------------------------------------------------------------------------

LEARN = [
    *("--epochs", "24", "--pattern", "parallel", "--ctx", "64", "--step", "8", "--batch", "8"),
    *("--accum", "1", "--dropout", "0", "--lr", "1e-3", "--label-smoothing", "0", "--ema", "0.9"),
    *("--no-amp", "--eval-audio-every", "24", "--eval-frames", "200", "--eval-temperature", "0.3"),
    *("--eval-dac-repo", "demo"),
]


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Last checkpoint of a run that has learned two files of noise by heart; a third validates."""
    folder = tmp_path_factory.mktemp("by_heart")
    rng = np.random.default_rng(0)
    for i in range(3):
        codes = rng.integers(256, size=(300, 3))
        write_npq(folder / f"{i}.npq", codes, vocab_sizes=[256] * 3, frame_rate=86.1328125)
    (folder / "held_out.txt").write_text("2.npq\n")
    train("--data", folder, "--val-list", folder / "held_out.txt", "--save_dir", folder, *LEARN)
    return folder / "rvq_3cb_latest.pt"


def test_evaluation_audio_that_copies_is_a_warning(by_heart):
    """In the row, and the limit in the checkpoint that is saved before the only sample."""
    (row,) = rows(by_heart.parent, "sample")
    assert row["shared_frames"] > 86
    assert row["shared_seconds"] == pytest.approx(row["shared_frames"] / 86.1328125, abs=1e-3)
    assert row["shared_file"] in ("0.npq", "1.npq")
    assert row["shared_frames_music"] == 0
    assert load_checkpoint(by_heart)["progress"]["held_out_run"] == 0


def test_a_best_checkpoint_from_before_the_first_sample_has_the_limit(music, tmp_path):
    flags = ("--epochs", "1", *SOUND, "--eval-audio-every", "5")
    train("--data", music, "--save_dir", tmp_path, *flags)
    assert not rows(tmp_path, "sample")
    assert load_checkpoint(tmp_path / "rvq_9cb_best.pt")["progress"]["held_out_run"] == 0


@pytest.mark.parametrize("share", [False, True])
def test_a_sample_that_copies_is_a_warning(share, by_heart, tmp_path, capsys):
    weights, card = by_heart, tmp_path / "x.md"
    if share:
        weights = tmp_path / "x.safetensors"
        assert sample(by_heart, "--export-safetensors", weights) == 0
        assert card.exists()
    capsys.readouterr()
    flags = ("--npq-out", tmp_path / "x.npq", "--frames", "200", "--samples", "2")
    music = [by_heart.with_name(f"{i}.npq") for i in range(2)]
    assert sample(weights, *flags, "--temperature", "0.3", "--against", *music) == 0
    out, err = capsys.readouterr()
    assert out.count(": shared with training music ") == 2
    assert err.count("! sample ") == err.count("the model knows it by heart") == 2
    assert "held-out music 0.00 s at most" in err
    assert sample(weights, *flags, "--temperature", "9", "--against", *music) == 0
    out, err = capsys.readouterr()
    assert out.count("shared with training music 0.00 s (held-out music 0.00 s)") == 2
    assert not err


def test_a_page_reads_what_its_checkpoints_share_once(checkpoint, music, tmp_path, capsys):
    """And warns once of a checkpoint that was trained with another codec."""
    parts, other = load_checkpoint(checkpoint), tmp_path / "other.pt"
    parts["data"]["codec"] = {"name": "44khz", "weights": "0" * 64}
    save_checkpoint(parts, other)
    flags = ("--frames", "4", "--codec", "demo", "--page", tmp_path / "x.html")
    assert sample(checkpoint, other, *flags, "--against", music / "0.npq") == 0
    out, err = capsys.readouterr()
    assert out.count("data     1 files") == 1
    assert out.count("shared with training music") == 2
    assert err.count("expect noise") == 1


def test_samples_that_do_not_fit_into_memory_are_refused(checkpoint, tmp_path):
    """The codes of four samples take 1.4 GB, and there are 0.5 left."""
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv.pop(1)); import sample_rvq\n"
        "has = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (has + (1 << 29),) * 2)\n"
        "sys.exit(sample_rvq.main())"
    )
    flags = (checkpoint, "--npq-out", tmp_path / "x.npq", "--frames", "10000000")
    command = [sys.executable, "-c", code, ROOT, *flags, "--device", "cpu", "--no-amp"]
    done = processes.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "! 1 x 10000000 frames do not fit into memory; lower --samples" in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_what_held_out_music_shows_no_copy_is_warned_of(by_heart, tmp_path, capsys):
    parts = load_checkpoint(by_heart)
    del parts["progress"]["held_out_run"]  # of an older version
    save_checkpoint(parts, tmp_path / "older.pt")
    flags = ("--npq-out", tmp_path / "x.npq", "--frames", "200", "--temperature", "0.3")
    against = ("--against", by_heart.with_name("0.npq"), by_heart.with_name("1.npq"))
    assert sample(tmp_path / "older.pt", *flags, *against) == 0
    out, err = capsys.readouterr()
    assert "(held-out music n/a)" in out
    assert "is not known" in err
    assert "by heart" not in err


def test_music_that_validates_is_not_training_music(music, tmp_path):
    """Evaluation audio is compared with the training part of each file."""
    run = make_run("--data", music, "--save_dir", tmp_path, *SOUND)
    tracks = list(run.train_windows.tracks())
    assert sum(track.stop - track.start for track in tracks) == run.train_windows.frames < 800
    (last,) = run.val_windows.excerpts(32)[-1:]
    assert samples.compare_with_training(run, last)["shared_frames"] == 0
    (first,) = run.train_windows.excerpts(32)[:1]
    assert samples.compare_with_training(run, first)["shared_frames"] == 32


def test_training_files_of_other_codebooks_are_refused(checkpoint, odd, tmp_path, capsys):
    assert sample(checkpoint, "--npq-out", tmp_path / "x.npq", "--against", odd / "few.npq") == 2
    said = capsys.readouterr().err
    assert said.startswith("! --against: no usable .npq file among 1; ")
    assert "4 codebooks, the run uses 9" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("trouble", ["signal", "time", "file"])
def test_a_search_that_ends_early_leaves_no_figure(trouble, music, tmp_path, monkeypatch, capsys):
    for path in music.glob("*.npq"):
        shutil.copy(path, tmp_path)
    run = make_run("--data", tmp_path, "--save_dir", tmp_path / "run", *SOUND)
    codes = run.train_windows.excerpts(32)[0]
    capsys.readouterr()
    match trouble:
        case "signal":
            run.stop.received = signal.SIGTERM
        case "time":
            monkeypatch.setattr(samples, "SEARCH_SECONDS", 0.0)
        case "file":
            os.truncate(run.train_windows.tables[0].paths[0], 100)
    samples.compare_validation(run)
    assert samples.compare_with_training(run, codes) == {}
    assert run.state.progress.held_out_run == -1
    said = capsys.readouterr().err.splitlines()
    wanted = {"signal": (), "time": ("0 s were over after",), "file": ("file changed", "size")}
    assert len(said) == (0 if trouble == "signal" else 2)
    for line in said:
        assert "was not compared with the training music: " in line
        assert any(word in line for word in wanted[trouble])


# --- a sample and signals ------------------------------------------------------------------------


def test_a_signal_ends_a_sample_at_once(music, tmp_path):
    run_flags = ("--epochs", "9", *SOUND[:2], "--eval-frames", "100000000")
    argv = [*TINY, "--data", str(music), "--save_dir", str(tmp_path), *run_flags]
    outdir = tmp_path / "samples"

    def interrupt_when_sampling() -> None:
        try:
            wait_for(outdir.exists)
        finally:  # also where it is not made: the sample has no end of its own
            os.kill(os.getpid(), signal.SIGTERM)

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    thread = threading.Thread(target=interrupt_when_sampling)
    thread.start()
    try:
        assert train_rvq.main(argv) == 143
    finally:
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert load_checkpoint(tmp_path / "rvq_9cb_latest.pt")["progress"]["epoch"] == 1


def test_wav_and_npq_of_several_samples(checkpoint, tmp_path, capsys):
    out, npq = tmp_path / "a.wav", tmp_path / "a.npq"
    flags = ("--frames", "20", "--samples", "2", "--codec", "demo", "--seed", "7")
    assert sample(checkpoint, "--out", out, "--npq-out", npq, *flags) == 0
    first, second = codes_in(tmp_path / "a_1.npq"), codes_in(tmp_path / "a_2.npq")
    assert first.shape == second.shape == (20, 9)
    assert (first != second).any()
    assert soundfile.info(tmp_path / "a_2.wav").frames == 20 * 512
    assert "x real time" in capsys.readouterr().out
    again = tmp_path / "b.npq"
    assert sample(checkpoint, "--npq-out", again, *flags) == 0
    assert (codes_in(tmp_path / "b_1.npq") == first).all(), "the same seed, the same codes"


def test_another_codec_than_the_trainings_is_told(checkpoint, music, tmp_path, capsys):
    content, path = load_checkpoint(checkpoint), tmp_path / "rvq_9cb_best.pt"
    assert content["data"]["codec"] is None  # no record tells
    demo, other = codec_id("demo"), CodecId("other", "0" * 64)
    prompt = tmp_path / "prompt.npq"
    shutil.copyfile(music / "0.npq", prompt)
    Records().add(prompt, prompt, other, {}, prompt.stat())
    flags = [path, "--frames", "4", "--out", tmp_path / "a.wav", "--codec", "demo"]
    for codec in (None, "odd", demo._asdict()):
        save_checkpoint({**content, "data": {**content["data"], "codec": codec}}, path)
        assert sample(*flags) == 0
        assert "expect noise" not in capsys.readouterr().err
    save_checkpoint({**content, "data": {**content["data"], "codec": other._asdict()}}, path)
    assert sample(*flags, "--prompt", prompt, "--prompt-frames", "3") == 0
    assert f"! codec {demo} is not {other} of the training data" in capsys.readouterr().err
    save_checkpoint({**content, "data": {**content["data"], "codec": demo._asdict()}}, path)
    assert sample(*flags, "--prompt", prompt, "--prompt-frames", "3") == 0
    assert f"! --prompt {prompt}: codes of codec {other}" in capsys.readouterr().err


def test_evaluation_audio_of_a_codec_of_another_shape_is_told_and_training_goes_on(
    tunes, tmp_path, capsys
):
    train("--data", tunes, "--save_dir", tmp_path, "--epochs", "1", *SOUND)
    told = "--eval-dac-repo demo: the codec has 9 codebooks of 1024"
    assert told in capsys.readouterr().err
    (row,) = rows(tmp_path, "sample")
    assert told in row["error"]
    assert list((tmp_path / "samples").glob("*.npq"))
    assert not list((tmp_path / "samples").glob("*.wav"))


def test_a_run_is_not_resumed_on_another_codecs_codes(capsys):
    def settle(before, now):
        found = {"size": {}, "codec": now}
        settle_data_change(
            argparse.Namespace(allow_data_change=True), None, {"codec": before}, found, "a.pt", None
        )
        return found["codec"]

    one, two = ({"name": name, "weights": name * 64} for name in "ab")
    with pytest.raises(CheckpointError, match=r"a.pt: trained on .* a \(a{8}\), the data are of b"):
        settle(one, two)
    assert settle(one, None) == one  # still known
    assert settle(None, two) == two
    assert settle({**one, "name": "renamed"}, one) == one


@pytest.mark.parametrize("amp", ["--amp", "--no-amp"])
def test_several_samples_begin_with_what_their_seed_draws_alone(amp, checkpoint, tmp_path):
    flags = (checkpoint, "--frames", "60", "--seed", "3", amp, "--npq-out")
    assert sample(*flags, tmp_path / "alone.npq") == 0
    assert sample(*flags, tmp_path / "a.npq", "--samples", "3") == 0
    assert sample(*flags, tmp_path / "b.npq", "--samples", "6") == 0
    several = [codes_in(tmp_path / f"b_{i}.npq").tolist() for i in range(1, 7)]
    assert codes_in(tmp_path / "alone.npq").tolist() == several[0]
    assert [codes_in(tmp_path / f"a_{i}.npq").tolist() for i in range(1, 4)] == several[:3]
    assert all(a != b for a, b in itertools.combinations(several, 2))


@pytest.mark.parametrize("rate", [44_100, 96_000, 192_000])
@pytest.mark.parametrize("samples", [2, 511])
def test_a_prompt_may_be_shorter_than_a_frame(rate, samples, checkpoint, tmp_path):
    soundfile.write(tmp_path / "p.wav", 0.1 * np.resize([1.0, -1.0], samples), rate)
    flags = ("--prompt", tmp_path / "p.wav", "--codec", "demo", "--frames", "2", "--with-prompt")
    assert sample(checkpoint, *flags, "--npq-out", tmp_path / "a.npq") == 0
    assert codes_in(tmp_path / "a.npq").shape == (3, 9)


def test_a_diverged_checkpoint_is_told_in_a_line(checkpoint, tmp_path, capsys):
    content = load_checkpoint(checkpoint)
    content["ema"]["head.weight"][:] = math.inf
    save_checkpoint(content, tmp_path / "inf.pt")
    assert sample(tmp_path / "inf.pt", "--npq-out", tmp_path / "a.npq", "--frames", "3") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "logits are not finite from frame 0" in line
    assert "ckpt_doctor.py" in line


def test_prompts_from_npq_and_audio_are_carried_on(checkpoint, music, tmp_path):
    prompt = music / "0.npq"
    flags = ("--frames", "6", "--prompt-frames", "10", "--codec", "demo")
    both, new = tmp_path / "both.npq", tmp_path / "new.npq"
    assert sample(checkpoint, "--prompt", prompt, "--npq-out", both, "--with-prompt", *flags) == 0
    assert sample(checkpoint, "--prompt", prompt, "--npq-out", new, *flags) == 0
    assert (codes_in(both)[:10] == codes_in(prompt)[:10]).all()
    assert (codes_in(both)[10:] == codes_in(new)).all()
    wav = tmp_path / "tone.wav"
    soundfile.write(wav, np.sin(np.arange(22_050) * 0.1) * 0.3, 22_050)
    out = tmp_path / "carried.wav"
    assert sample(checkpoint, "--prompt", wav, "--out", out, "--with-prompt", *flags) == 0
    assert soundfile.info(out).frames == (10 + 6) * 512


@pytest.fixture(scope="module")
def shared(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's weights, made by the door."""
    path = tmp_path_factory.mktemp("shared") / "tunes.safetensors"
    assert sample(checkpoint, "--export-safetensors", path) == 0
    return path


def test_an_export_alone_draws_nothing(shared, checkpoint, capsys):
    assert sorted(p.name for p in shared.parent.iterdir()) == ["tunes.md", "tunes.safetensors"]
    assert sample(checkpoint, "--export_safetensors", shared) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0].split(";")[0] for line in said] == [
        f"wrote {shared}",
        f"wrote {shared.with_suffix('.md')}",
    ]


def test_shared_weights_draw_what_the_checkpoint_draws(shared, checkpoint, tmp_path):
    flags = ("--frames", "20", "--seed", "3", "--npq-out")
    assert sample(checkpoint, *flags, tmp_path / "a.npq") == 0
    assert sample(shared, *flags, tmp_path / "b.npq") == 0
    assert (codes_in(tmp_path / "a.npq") == codes_in(tmp_path / "b.npq")).all()


def test_shared_weights_that_name_no_codec_take_the_usual_one(checkpoint, tmp_path, monkeypatch):
    parts, opened = load_checkpoint(checkpoint), []
    parts["flags"]["eval_dac_repo"] = str(tmp_path / "weights.pth")
    path = export_weights(parts, tmp_path / "x.safetensors", tell=print)

    def refuse(name):
        opened.append(name)
        raise CodecError("none here")

    monkeypatch.setattr(sample_rvq, "load_codec", refuse)
    for flags in ((path,), (checkpoint,), (path, "--codec", "16khz")):
        assert sample(*flags, "--out", tmp_path / "x.wav") == 1
    assert opened == ["44khz", "demo", "16khz"]


def test_weights_that_do_not_fit_their_architecture_are_one_line(checkpoint, tmp_path, capsys):
    parts = load_checkpoint(checkpoint)
    for field, message in {"layers": "do not fit its own", "d_model": "no model of this"}.items():
        architecture = {**parts["architecture"], field: parts["architecture"][field] - 1}
        path = tmp_path / f"{field}.safetensors"
        export_weights({**parts, "architecture": architecture}, path, tell=print)
        assert sample(path, "--npq-out", tmp_path / "x.npq") == 1
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert not (tmp_path / "x.npq").exists()


def test_a_name_that_exists_is_written_over(checkpoint, tmp_path):
    out = tmp_path / "a.npq"
    out.write_text("old")
    assert sample(checkpoint, "--npq-out", out, "--frames", "5") == 0
    assert codes_in(out).shape == (5, 9)


def test_ctrl_c_tells_what_was_written(checkpoint, tmp_path):
    weights, out = tmp_path / "w.safetensors", tmp_path / "x.npq"
    flags = ("--export-safetensors", weights, "--npq-out", out, "--frames", "10000000")
    process = processes.Popen(
        [sys.executable, ROOT / "sample_rvq.py", checkpoint, *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout.readline().startswith(f"wrote {weights} (")
    assert process.stdout.readline().startswith(f"wrote {weights.with_suffix('.md')}; fill in")
    time.sleep(0.5)  # into the drawing
    process.send_signal(signal.SIGINT)
    try:
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said == f"! interrupted; already written: {weights}\n"
    assert not out.exists()


# --- sound as it is drawn ------------------------------------------------------------------------


def streamed(checkpoint: Path, *flags: object) -> processes.Popen:
    command = [sys.executable, ROOT / "sample_rvq.py", checkpoint, "--out", "-", *flags]
    return processes.Popen(
        [str(word) for word in (*command, "--codec", "demo")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=False,
    )  # fmt: skip


@pytest.mark.parametrize("flags", [(), ("--prompt-frames", "30"), ("--with-prompt",)])
def test_a_stream_equals_the_file_and_the_whole_decode(flags, checkpoint, music, tmp_path):
    if flags:
        flags = ("--prompt", music / "0.npq", *flags)
    flags = ("--frames", 1100, *flags)  # three chunks
    named = ("--npq-out", tmp_path / "a.npq", "--codec", "demo")
    assert sample(checkpoint, "--out", tmp_path / "a.wav", *named, *flags) == 0
    sound, errors = streamed(checkpoint, *flags).communicate(timeout=240)
    assert sound == (tmp_path / "a.wav").read_bytes(), errors
    drawn = codes_in(tmp_path / "a.npq").astype(np.int64)
    if "--prompt-frames" not in flags:  # the codec looks back into the prompt
        whole = load_codec("demo").decode(torch.from_numpy(drawn))[None].numpy()
        write_wav(tmp_path / "b.wav", [whole], 44_100, whole.shape)
        assert sound == (tmp_path / "b.wav").read_bytes()


def test_sound_comes_while_it_is_drawn_and_its_reader_may_leave(checkpoint):
    process = streamed(checkpoint, "--frames", 1_000_000)
    assert process.stdout.read(44)[:4] == b"RIFF"
    assert len(process.stdout.read(512 * 512 * 2)) == 512 * 512 * 2  # a chunk of three hours
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(60) == 0
    assert errors.splitlines()[-1] == "! standard output was closed; the sample ends there"


def test_ctrl_c_ends_a_stream_and_says_that_some_of_it_is_out(checkpoint):
    process = streamed(checkpoint, "--frames", 1_000_000)
    assert process.stdout.read(44)[:4] == b"RIFF"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.endswith(b"! interrupted; already written: what standard output got\n")


def test_sound_is_not_written_into_a_terminal(checkpoint):
    master, terminal = os.openpty()
    process = processes.Popen(
        [sys.executable, ROOT / "sample_rvq.py", checkpoint, "--out", "-"],
        stdout=terminal, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    _, errors = process.communicate(timeout=60)
    os.close(terminal)
    os.close(master)
    assert process.returncode == 2
    assert "standard output is a terminal; add `| ffplay -`" in errors


def test_a_wav_of_over_4_gb_is_refused_before_its_first_frame(checkpoint, tmp_path, capsys):
    out = tmp_path / "long.wav"
    assert sample(checkpoint, "--out", out, "--codec", "demo", "--frames", "5000000") == 1
    assert "at most 4 GB, as a .wav holds, found: 16.1 hours; write" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


NPQ = ("--npq-out", "{tmp}/x.npq")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("nowhere.pt", *NPQ), 1, "no such checkpoint; check the path"),
        (("{music}", *NPQ), 1, "found a folder, pipe or device; give a .pt file"),
        (("{music}/0.npq", *NPQ), 1, "not a checkpoint (File is not a zip file); give a .pt file"),
        (("nowhere.safetensors", *NPQ), 1, "no such file"),
        (("{checkpoint}",), 2, "name --out FILE.wav"),
        (("{checkpoint}", "--out", "{tmp}/no/x.wav"), 2, "/no: No such file or directory; check"),
        (("{checkpoint}", "--out", "{tmp}/x.mp3"), 2, "a name that ends in .wav; try {tmp}/x.wav"),
        (("{checkpoint}", "--out", "{tmp}"), 2, "is a folder; name a file in it"),
        (("{checkpoint}", "--export-safetensors", "{tmp}/x.pt"), 2, "ends in .safetensors"),
        (("{checkpoint}", *NPQ, "--frames", "0"), 2, "--frames: expected 1 to"),
        (("{checkpoint}", *NPQ, "--ctx", "1"), 2, "--ctx: expected 2 to"),
        (("{checkpoint}", *NPQ, "--seed", "-1"), 2, "--seed: expected a whole number >= 0"),
        (("{checkpoint}", *NPQ, "--temperature", "0"), 2, "--temperature: expected a number > 0"),
        (("{checkpoint}", *NPQ, "--temperature", "1,nan"), 2, "> 0, found 'nan'"),
        (("{checkpoint}", *NPQ, "--top-p", "1.5"), 2, "--top-p: expected a number > 0 and <= 1"),
        (("{checkpoint}", *NPQ, "--top-k", "1,2"), 2, "--top-k: expected 1 or 9 values"),
        (("{checkpoint}", *NPQ, "--prompt", "{tmp}/a.npq"), 2, "a.npq: no such file"),
        (("{checkpoint}", *NPQ, "--prompt", "{odd}/few.npq"), 2, "expected 9 codebooks"),
        (("{checkpoint}", *NPQ, "--prompt", "{odd}/side.npq"), 2, "4 of them side ones; encode"),
        (("{checkpoint}", *NPQ, "--prompt", "{odd}/high.npq"), 2, "found 1500 in frame 2"),
        (("{checkpoint}", *NPQ, "--prompt", "{checkpoint}", "--codec", "demo"), 1, "none of these"),
        (("{checkpoint}", *NPQ, "--prompt-frames", "3"), 2, "there is no prompt"),
        (("{checkpoint}", *NPQ, "--with_prompt"), 2, "--with-prompt: there is no prompt"),
        (("{checkpoint}", *NPQ, "--prompt", "{odd}/one.wav", "--codec", "demo"), 1, "silence"),
        (("{checkpoint}", *NPQ, "--device", "meta"), 2, "--device: expected cuda, cuda:1"),
        (("{checkpoint}", *NPQ, "--device", "mps"), 2, "--device mps: not usable here"),
        (("{checkpoint}", "--out", "-", "--samples", "2"), 2, "takes one sample"),
        (("{checkpoint}", *NPQ, "--min-p", "1"), 2, "--min-p"),
        (("{checkpoint}", *NPQ, "--repeat-penalty", "1,2"), 2, "--repeat-penalty: expected 1 or 9"),
        (("{labelled}", *NPQ, "--label", "loud"), 2,
         "--label: unknown label 'loud'; the model knows 'high', 'low'\n"),
        (("{labelled}", *NPQ, "--label", "low,loud"), 2, "unknown label 'loud'; the model"),
        (("{labelled}", *NPQ, "--label", ""), 2, "unknown label ''; the model knows"),
        (("{checkpoint}", *NPQ, "--label", "low"), 2, "knows none: it was trained without --lab"),
        (("{labelled}", *NPQ, "--guidance", "2"), 2, "--guidance 2: there is nothing to guide to"),
        (("{labelled}", *NPQ, "--label", "low", "--guidance", "0"), 2, "expected a number > 0"),
        (("{labelled}", "--label", "low", "--export-safetensors", "{tmp}/x.safetensors"), 2,
         "--label: nothing is drawn"),
        (("{checkpoint}", *NPQ, "--fames", "3"), 2, "did you mean --frames?"),
        (("{checkpoint}", "--out", "{tmp}/x.wav", "--codec", "{tmp}/no.pth"), 1, "no.pth"),
        (("{odd}/other.safetensors", "--out", "{tmp}/x.wav", "--codec", "demo"), 2, "75.00 frames"),
        (("{shared}", *NPQ, "--raw"), 2, "--raw: shared weights are averages"),
        (("{shared}", "--export-safetensors", "{tmp}/x.safetensors"), 2, "is such a file; copy it"),
        (("{checkpoint}", *NPQ, "--against", "{odd}/no*.npq"), 1, "no .npq file matches"),
        (("{checkpoint}", "--against", "x", "--export-safetensors", "{tmp}/x.safetensors"), 2,
         "--against: nothing is drawn"),
        (("{checkpoint}", "--prompt", "x", "--export-safetensors", "{tmp}/x.safetensors"), 2,
         "--prompt: nothing is drawn"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line_and_write_nothing(
    flags, code, message, checkpoint, labelled, shared, music, odd, tmp_path, capsys
):
    places = {"checkpoint": checkpoint, "shared": shared, "music": music, "odd": odd}
    places["labelled"] = labelled
    filled = [f.format(tmp=tmp_path, **places) for f in flags]
    try:
        found = sample(*filled)
    except SystemExit as error:
        found = error.code
    said = capsys.readouterr().err
    assert found == code
    assert message.format(tmp=tmp_path) in said
    assert [line[:2] for line in said.splitlines()] == ["! "]
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def odd(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and weights that do not fit what they are used with."""
    folder = tmp_path_factory.mktemp("odd")
    soundfile.write(folder / "one.wav", [0.1], 96_000)
    rng = np.random.default_rng(1)
    shape = {"vocab_sizes": [1024] * 9, "frame_rate": 86.1328125}
    few = {**shape, "vocab_sizes": [1024] * 4}
    write_npq(folder / "few.npq", rng.integers(1024, size=(40, 4)), **few)
    write_npq(folder / "side.npq", rng.integers(1024, size=(40, 9)), side_codebooks=4, **shape)
    high = rng.integers(1024, size=(40, 9))
    high[2, 5] = 1500
    write_npq(folder / "high.npq", high, vocab_sizes=[2048] * 9, frame_rate=86.1328125)
    parts = load_checkpoint(checkpoint)
    parts["data"] = {**parts["data"], "frame_rate": 75.0}
    export_weights(parts, folder / "other.safetensors", tell=print)
    return folder


# --- labels --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(halves: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Best checkpoint of a run over music of codes below 8 and from 8 on, labelled so."""
    save_dir = tmp_path_factory.mktemp("labelled")
    flags = ("--epochs", "8", "--eval-audio-every", "2", "--eval-frames", "5", "--ctx", "8")
    train("--data", halves, "--labels", "folders", "--save_dir", save_dir, *flags)
    return save_dir / "rvq_4cb_best.pt"


def share_of_low(*flags: str | Path) -> float:
    """Share of the codes that are below 8, in 16 samples of 64 frames."""
    out = Path(flags[-1])
    assert sample(*flags[:-1], "--npq-out", out, "--samples", "16", "--frames", "64") == 0
    return float(np.mean([codes_in(path) < 8 for path in out.parent.glob(f"{out.stem}_*.npq")]))


def test_a_model_obeys_its_label_and_plays_both_without(labelled, tmp_path):
    low = share_of_low(labelled, "--label", "low", tmp_path / "low.npq")
    high = share_of_low(labelled, "--label", "high", tmp_path / "high.npq")
    row = rows(labelled.parent, "epoch")[-1]
    assert row["val"] < row["val_unlabelled"]
    assert low > 0.75
    assert high < 0.25
    assert 0.25 < share_of_low(labelled, tmp_path / "bare.npq") < 0.75
    guided = share_of_low(labelled, "--label", "low", "--guidance", "3", tmp_path / "guided.npq")
    assert guided > max(low, 0.95)


def test_shared_weights_play_the_same_labels(labelled, tmp_path):
    shared = tmp_path / "x.safetensors"
    export_weights(load_checkpoint(labelled), shared, tell=lambda _: None)
    for i, weights in enumerate((labelled, shared)):
        out = tmp_path / f"{i}.npq"
        assert sample(weights, "--npq-out", out, "--label", "low", "--guidance", "2", *SHORT) == 0
    assert np.array_equal(codes_in(tmp_path / "0.npq"), codes_in(tmp_path / "1.npq"))


def test_guidance_of_one_is_no_guidance(labelled, tmp_path):
    for name, more in (("a", ()), ("b", ("--guidance", "1"))):
        out = tmp_path / f"{name}.npq"
        assert sample(labelled, "--npq-out", out, "--label", "low", *SHORT, *more) == 0
    assert np.array_equal(codes_in(tmp_path / "a.npq"), codes_in(tmp_path / "b.npq"))


def test_evaluation_audio_goes_through_the_labels_in_turn(labelled, music, tmp_path):
    found = [(row["epoch"], row["label"]) for row in rows(labelled.parent, "sample")]
    assert found == [(2, "high"), (4, "low"), (6, "high"), (8, "low")]
    for i, name in enumerate(("one", "two")):
        (tmp_path / "music" / name).mkdir(parents=True)
        shutil.copy(music / f"{i}.npq", tmp_path / "music" / name)
    flags = ("--data", tmp_path / "music", "--labels", "folders", "--epochs", "1", *SOUND)
    code, said = run_trainer(*TINY, *flags, "--save_dir", tmp_path / "run")
    assert code == 0
    assert re.search(r"\nsample   .*\.wav \(\d+\.\d s, label one\)\n", said), said
    page = (tmp_path / "run" / "rvq_9cb_report.html").read_text()
    assert re.search(r"<span>step \d+, one</span>", page)
    assert "validation without labels" in page
