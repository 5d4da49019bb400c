"""sample_rvq.py and evaluation audio: from checkpoints to codes and sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import TINY, assert_same_tensors, rows
from test_train_rvq import comparable, train

import sample_rvq
import train_rvq
from checkpointing import load_checkpoint
from npq_dataset import map_codes, read_header, write_npq

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


def test_a_signal_ends_a_sample_at_once(music, tmp_path):
    run_flags = ("--epochs", "9", *SOUND[:2], "--eval-frames", "100000000")
    import os
    import signal
    import threading

    argv = [*TINY, "--data", str(music), "--save_dir", str(tmp_path), *run_flags]
    outdir = tmp_path / "samples"

    def interrupt_when_sampling() -> None:
        while not outdir.exists():
            pass
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


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("nowhere.pt", "--npq-out", "{tmp}/x.npq"), 1, "no such checkpoint"),
        (("{checkpoint}",), 2, "--out FILE.wav"),
        (("{checkpoint}", "--out", "{tmp}/no/x.wav"), 2, "its folder does not exist"),
        (("{checkpoint}", "--npq-out", "{tmp}/x.npq", "--frames", "0"), 2, "at least 1"),
        (("{checkpoint}", "--npq-out", "{tmp}/x.npq", "--top-k", "1,2"), 1, "expected 1 or 9"),
        (("{checkpoint}", "--npq-out", "{tmp}/x.npq", "--prompt", "{tmp}/a.npq"), 1, "a.npq"),
        (("{checkpoint}", "--out", "{tmp}/x.wav", "--codec", "{tmp}/no.pth"), 1, "no.pth"),
    ],
)
def test_mistakes_get_one_line_and_write_nothing(
    flags, code, message, checkpoint, tmp_path, capsys
):
    filled = [f.format(checkpoint=checkpoint, tmp=tmp_path) for f in flags]
    try:
        found = sample(*filled)
    except SystemExit as error:
        found = error.code
    assert found == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
