"""pages/listening_page.py and sample_rvq.py --page: real checkpoints, heard in a real browser."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from kit import processes
from kit.sounds import HOP, RATE, K, V, save_tiny_dac
from kit.trainer import ROOT, rows, train, wait_for

import sample_rvq
from pages.listening_page import distinct_names
from run_folder.checkpoint import load_checkpoint
from run_folder.files import save_checkpoint
from run_folder.shared_weights import export_weights
from sound.npq_format import write_npq

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = '<img src=x onerror="alert(1)">\x1b[31m\n.pt'
DRAWN = ("--frames", "40", "--samples", "3", "--seed", "5")


@pytest.fixture(scope="module")
def run(tunes_of_the_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a run of two epochs, with an archive of each; its codec is the bundled one."""
    folder = tmp_path_factory.mktemp("run")
    flags = ("--epochs", "2", "--archive-every", "1", "--eval-dac-repo", "demo")
    flags += ("--pattern", "parallel")
    train("--data", tunes_of_the_demo, "--save_dir", folder, *flags)
    return folder


@pytest.fixture(scope="module")
def archives(run: Path) -> list[Path]:
    return sorted(run.glob("*_epoch_e*.pt"))


@pytest.fixture(scope="module")
def page(archives: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of both archives, and of other weights by a hostile name and without metrics."""
    folder = tmp_path_factory.mktemp("page")
    content = load_checkpoint(archives[0])
    content["ema"]["head.weight"].mul_(0.1)
    save_checkpoint(content, folder / HOSTILE)
    assert sample(*archives, folder / HOSTILE, *DRAWN, "--page", folder / "listen.html") == 0
    return folder / "listen.html"


def sample(*words: object) -> int:
    return sample_rvq.main([str(word) for word in words])


def test_each_checkpoint_is_drawn_alike_and_stands_beside_its_val_and_passes(page, archives, run):
    text = page.read_text()
    assert text.count("data:audio/mpeg;base64,") == text.count("data:image/png;base64,") == 9
    passes = rows(run, "start")[0]["passes_a_step"]
    for path, row in zip(archives, rows(run, "epoch"), strict=True):
        head = text[text.index(f"<b>{path.name}</b>") :][:200]
        assert f"val {row['val']:.4f}<br>" in head
        assert f"{row['step'] * passes:.3g} passes, step {row['step']}" in head
    sounds = re.findall(r"audio/mpeg;base64,([^\"]+)", text)
    assert len(set(sounds)) == 9
    assert not re.findall(r"https?:|@import|<iframe|<img", text)


def test_curves_of_all_runs_lie_in_one_chart_and_what_has_none_says_so(page, run, tmp_path):
    epochs = rows(run, "epoch")
    vals = " ".join(f"{row['val']:.4g}" for row in epochs)
    text = page.read_text()
    assert f'data-v="{vals}"' in text
    assert text.count('aria-label="Val of each run over passes"') == 1
    assert ".pt has no curve: its name is not one that a run gives." in text
    other = tmp_path / "other" / "rvq_9cb_latest.pt"
    other.parent.mkdir()
    shutil.copyfile(run / "rvq_9cb_latest.pt", other)
    flags = ("--frames", "2", "--page", tmp_path / "a.html")
    assert sample(run / other.name, other, *flags) == 0
    text = (tmp_path / "a.html").read_text()
    assert f"other/{other.name} has no curve: {other.parent / 'rvq_9cb_metrics.jsonl'}: " in text
    metrics = [json.loads(line) for line in (run / "rvq_9cb_metrics.jsonl").open()]
    higher = [{**r, "val": r["val"] + 1} if r["event"] == "epoch" else r for r in metrics]
    (other.parent / "rvq_9cb_metrics.jsonl").write_text("\n".join(map(json.dumps, higher)))
    assert sample(run / other.name, other, *flags) == 0
    text = (tmp_path / "a.html").read_text()
    assert "has no curve" not in text
    for above, name in ((0, run.name), (1, "other")):
        vals = " ".join(f"{row['val'] + above:.4g}" for row in epochs)
        assert f'data-v="{vals}"><title>{name}/rvq_9cb</title>' in text


def test_a_column_sounds_as_its_checkpoint_alone_and_as_the_same_weights_beside_it(
    page, archives, tmp_path
):
    same = shutil.copyfile(archives[1], tmp_path / "same.pt")
    assert sample(archives[1], same, *DRAWN, "--page", tmp_path / "a.html") == 0
    both = re.findall(r"audio/mpeg;base64,([^\"]+)", (tmp_path / "a.html").read_text())
    assert (
        both[::2] == both[1::2] == re.findall(r"audio/mpeg;base64,([^\"]+)", page.read_text())[1::3]
    )


def test_each_is_heard_through_its_own_codec_and_carries_on_the_same_prompt(archives, tmp_path):
    codec = save_tiny_dac(tmp_path / "tiny.pth")
    codes = np.random.default_rng(0).integers(V, size=(400, K))
    write_npq(tmp_path / "a.npq", codes, vocab_sizes=[V] * K, frame_rate=RATE / HOP)
    flags = ("--epochs", "1", "--archive-every", "1", "--eval-dac-repo", codec)
    train("--data", tmp_path / "a.npq", "--save_dir", tmp_path / "run", *flags)
    (other,) = (tmp_path / "run").glob("*_epoch_e*.pt")
    soundfile.write(tmp_path / "prompt.wav", 0.3 * np.sin(np.arange(22_050) * 0.1), 22_050)
    drawn = ("--frames", "40", "--prompt", tmp_path / "prompt.wav", "--prompt-frames", "9")
    assert sample(archives[0], other, *drawn, "--page", tmp_path / "a.html") == 0
    text = (tmp_path / "a.html").read_text()
    sounds = map(base64.b64decode, re.findall(r"audio/mpeg;base64,([^\"]+)", text))
    assert [soundfile.info(io.BytesIO(sound)).samplerate for sound in sounds] == [44_100, RATE]


def test_the_size_is_said_and_what_the_page_is(page, archives, tmp_path, capsys):
    out = tmp_path / "listen.html"
    assert (
        sample(
            archives[0], "--frames", "4", "--temperature", "0.9", "--top-p", "0.95", "--page", out
        )
        == 0
    )
    size = f"{out.stat().st_size / 1e6:.1f} MB"
    assert f"wrote {out} ({size}); open it in a browser" in capsys.readouterr().out
    assert f"{size}, works without a network" in out.read_text()
    assert "<dt>temperature</dt><dd>0.9</dd>" in out.read_text()
    assert "<dt>top p</dt><dd>0.95</dd>" in out.read_text()


def test_each_checkpoint_draws_with_the_threads_it_was_trained_with(
    archives, tmp_path, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before, used, draw = torch.get_num_threads(), [], sample_rvq.begin

    def begin(*arguments: Any) -> Any:
        used.append(torch.get_num_threads())
        return draw(*arguments)

    monkeypatch.setattr(sample_rvq, "begin", begin)
    content, paths = load_checkpoint(archives[0]), [tmp_path / f"{n}.pt" for n in range(3)]
    for count, path in zip((2, 1, 2), paths, strict=True):
        content["progress"]["threads"] = count
        save_checkpoint(content, path)
    try:
        torch.set_num_threads(2)
        assert sample(*paths, "--frames", "2", "--page", tmp_path / "a.html") == 0
    finally:
        torch.set_num_threads(before)
    assert used == [2, 1, 2]


def test_weights_to_share_have_their_val_too(run, archives, tmp_path):
    shared = export_weights(load_checkpoint(archives[1]), tmp_path / "a.safetensors", tell=print)
    assert sample(shared, "--frames", "2", "--page", tmp_path / "a.html") == 0
    text = (tmp_path / "a.html").read_text()
    assert f"val {rows(run, 'epoch')[1]['val']:.4f}<br>" in text
    assert "a.safetensors has no curve" in text


def test_a_sample_that_copies_says_so_on_the_page(archives, tmp_path, capsys):
    content, path = load_checkpoint(archives[0]), tmp_path / "a.pt"
    content["progress"]["held_out_run"] = 0
    save_checkpoint(content, path)
    drawn = ("--frames", "80", "--seed", "3")
    assert sample(path, *drawn, "--npq-out", tmp_path / "music.npq") == 0
    flags = ("--against", tmp_path / "music.npq", "--page", tmp_path / "a.html")
    assert sample(path, archives[1], *drawn, *flags) == 0
    (warning,) = re.findall(r"! the sample (repeats .* of music.npq .*)", capsys.readouterr().err)
    first, second = re.findall(
        r"shared with training music[^<]*", (tmp_path / "a.html").read_text()
    )
    assert first.endswith(f"; it {html.escape(warning)}")
    assert "repeats" not in second


def test_names_are_told_apart():
    assert distinct_names(["a/x.pt", "b/y.pt"]) == ["x.pt", "y.pt"]
    assert distinct_names(["a/x.pt", "b/x.pt", "y.pt"]) == ["a/x.pt", "b/x.pt", "y.pt"]
    assert distinct_names(["1/a/x.pt", "2/a/x.pt"]) == ["1/a/x.pt", "2/a/x.pt"]
    assert distinct_names(["x.pt", "./x.pt", "x.pt"]) == ["x.pt", "x.pt (2)", "x.pt (3)"]
    assert distinct_names(["/x.pt", "/a/x.pt"]) == ["//x.pt", "a/x.pt"]


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--out", "a.wav"), "found 2 checkpoints; name one, or add --page FILE.html"),
        (("--page", "a.html", "--out", "a.wav"), "--page is written alone"),
        (("--page", "a.png"), "expected a name that ends in .html; try a.html"),
        (("--page", "a.html", "--with-prompt"), "there is no prompt"),
    ],
)
def test_flags_that_do_not_fit(flags, said, archives, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sample(*archives, *flags) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["damaged", "missing", "of another codec", "without labels"])
def test_a_checkpoint_that_cannot_be_opened_is_named_and_nothing_is_drawn(
    fault, archives, tmp_path, capsys
):
    bad, out = tmp_path / "bad.pt", tmp_path / "a.html"
    if fault == "damaged":
        bad.write_bytes(archives[0].read_bytes()[:-1000])
    elif fault == "of another codec":
        content = load_checkpoint(archives[0])
        content["data"]["frame_rate"] = 50.0
        save_checkpoint(content, bad)
    flags: list[object] = ["--frames", "2", "--page", out]
    if fault == "without labels":
        shutil.copyfile(archives[0], bad)
        flags += ["--label", "jazz"]
    first = [] if fault == "without labels" else archives[:1]
    assert sample(*first, bad, archives[1], *flags) in (1, 2)
    told = capsys.readouterr()
    assert told.err.startswith(f"! {bad}: ")
    assert told.err.count("\n") == 1
    assert "x real time" not in told.out
    assert not out.exists()


def test_weights_that_are_not_finite_cost_their_column_and_exit_code_1(archives, tmp_path, capsys):
    content, bad = load_checkpoint(archives[0]), tmp_path / "bad.pt"
    content["ema"]["head.weight"][:] = math.inf
    save_checkpoint(content, bad)
    out = tmp_path / "a.html"
    assert sample(bad, archives[1], "--frames", "2", "--page", out) == 1
    assert f"! {bad}: the model's logits are not finite from frame 0" in capsys.readouterr().err
    text = out.read_text()
    assert text.count("data:audio/mpeg;base64,") == 1
    assert "No sound: the model&#39;s logits are not finite from frame 0" in text


def test_ctrl_c_leaves_no_half_page_and_no_sound_behind(archives, tmp_path):
    out, temporary = tmp_path / "a.html", tmp_path / "temporary"
    temporary.mkdir()
    out.write_text("an older page")
    flags = ("--frames", "1000000", "--page", out)
    process = processes.Popen(
        [sys.executable, ROOT / "sample_rvq.py", *archives, *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == f"{archives[0].name}:\n"
        wait_for(lambda: any(temporary.rglob("*.saving")))  # its sound is being drawn
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said == "! interrupted; nothing was written\n"
    assert out.read_text() == "an older page"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.html", "temporary"]


# --- in a browser --------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(page: Path, width: int = 1280) -> Iterator[Any]:
    """The page in Chromium, without a network; errors of its script fail the test."""
    from playwright.sync_api import sync_playwright

    told: list[str] = []
    with sync_playwright() as driver:
        options = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        context = browser.new_context(viewport={"width": width, "height": 844}, offline=True)
        tab = context.new_page()
        tab.on("console", lambda message: told.append(message.text))
        tab.on("pageerror", lambda error: told.append(str(error)))
        tab.goto(page.as_uri())
        yield tab
        browser.close()
    assert not told


needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium to open the page")


def shown(tab: Any, row: int) -> list[str]:
    return tab.locator("tbody tr").nth(row).locator(".who").all_inner_texts()


def played(tab: Any, row: int) -> list[str]:
    """Ends of the sounds of a row, in the order of its columns."""
    sounds = tab.locator("tbody tr").nth(row).locator("audio")
    return [sound.get_attribute("src")[-4000:] for sound in sounds.all()]


@needs_chromium
def test_blind_names_are_letters_until_a_choice_which_a_reload_keeps(page):
    with opened(page) as tab:
        names, sounds = shown(tab, 0), [played(tab, row) for row in range(3)]
        button = tab.get_by_role("button", name="Listen blind")
        orders = set()
        for _ in range(12):
            button.press("Enter")  # by keyboard
            now = [played(tab, row) for row in range(3)]
            orders |= {tuple(map(sounds[r].index, now[r])) for r in range(3)}
            if len(orders) > 3:
                break
            tab.get_by_role("button", name="Show all names").click()
            assert [played(tab, row) for row in range(3)] == sounds
        assert len(orders) > 3, "each row is shuffled"
        assert [shown(tab, row) for row in range(3)] == [["A", "B", "C"]] * 3
        visible, hidden = tab.locator("body").inner_text(), tab.locator("thead")
        assert not [name for name in names if name in visible]
        assert not hidden.is_visible()
        labels = tab.locator("audio").evaluate_all("all => all.map(a => a.ariaLabel)")
        assert labels[3:6] == ["Sample 2, A", "Sample 2, B", "Sample 2, C"]

        tab.get_by_role("button", name="Choose B, Sample 2").press("Space")
        chosen = names[sounds[1].index(now[1][1])]
        assert shown(tab, 1)[1] == chosen
        assert [shown(tab, row) for row in (0, 2)] == [["A", "B", "C"]] * 2
        status = tab.get_by_role("status").inner_text()
        assert "1 of 3 chosen" in status
        assert [f"{name}: {int(name == chosen)}" in status for name in names] == [True] * 3
        tab.get_by_role("button", name="Your choice").click()  # the first one counts
        tab.reload()
        assert [played(tab, row) for row in range(3)] == now
        assert tab.get_by_role("status").inner_text() == status
        tab.get_by_role("button", name="Show all names").click()
        assert shown(tab, 0) == names
        assert [played(tab, row) for row in range(3)] == sounds
        assert tab.locator("thead").is_visible()


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_one_sound_plays_at_a_time(width, page):
    with opened(page, width) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        if width == 390:
            edges = tab.locator("audio, .who, thead b").evaluate_all(
                "all => all.map(e => e.getBoundingClientRect()).map(b => [b.left, b.right])"
            )
            assert all(left >= 0 and right <= width for left, right in edges)
        first, second = tab.locator("audio").first, tab.locator("audio").nth(1)
        first.evaluate("a => { a.loop = true; return a.play(); }")
        wait_for(lambda: first.evaluate("a => a.currentTime") > 0)
        second.evaluate("a => { a.loop = true; return a.play(); }")
        wait_for(lambda: first.evaluate("a => a.paused"))
        assert not second.evaluate("a => a.paused")
