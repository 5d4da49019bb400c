"""pages/run_page.py: a page made of real metrics and sound, opened in a real browser."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from kit.trainer import TINY, rows, run_trainer, start_trainer, wait_for

from pages.run_page import as_html, story_of, write_report
from pages.spectrogram import HZ, ROWS, spectrogram
from run_folder.files import RunFiles
from run_folder.metrics import read_metrics

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = '<script>alert(1)</script>"\x1b[31m\n'
START = {
    "event": "start", "step": 0, "epoch": 1, "planned_steps": 400, "command": f"python {HOSTILE}",
    "flags": {"lr": 2e-4, "tag": HOSTILE, "max_seconds": None}, "device": "cpu, 1 thread",
    "model": {"d_model": 8, "layers": 1, "heads": 1, "pattern": "depth", "parameters": 1000,
              "vocab_sizes": [1024, 1024]},
    "data": {"files": 3, "train_hours": 1.5, "val_hours": 0.1, "frame_rate": 86.13},
}  # fmt: skip


def step_row(step: int, **facts) -> dict:
    row = {"event": "step", "step": step, "epoch": step // 20 + 1, "loss": 5 - step / 100}
    return {**row, "lr": 1e-4, "grad_norm": 0.5, "frames_per_s": 8613.0, "seconds": step, **facts}


def epoch_row(step: int, val: float | None, **facts) -> dict:
    row = {"event": "epoch", "step": step, "epoch": step // 20, "train": 5.0, "val": val}
    row |= {"val_per_codebook": [val, val], "frames_per_s": 8613.0, "seconds": step}
    return {**row, **facts}


def page_of(rows: list[dict], folder: Path = Path("run")) -> str:
    return as_html(story_of(rows), RunFiles(folder, "rvq_2cb"), folder / "samples")


def text_of(page: str) -> str:
    class Text(HTMLParser):
        found = ""

        def handle_data(self, data: str) -> None:
            self.found += f" {data}"

    reader = Text()
    reader.feed(re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.S))
    return " ".join(reader.found.split())


def tags_of(page: str) -> list[tuple[str, list[str]]]:
    """Every tag with the names of its attributes."""

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            found.append((tag, [name for name, _ in attrs]))

    found: list[tuple[str, list[str]]] = []
    Tags().feed(page)
    return found


# --- words ---------------------------------------------------------------------------------------


def test_the_first_words_say_how_good_how_far_and_whether_anything_is_wrong():
    page = page_of([START, *map(step_row, range(10, 201, 10)), epoch_row(200, 4.1932)])
    text = text_of(page)
    assert "val 4.1932 The best so far, in epoch 10." in text
    assert "step 200 of 400; 3m 20s of training, 3m 20s left" in text
    assert "calm 0 steps refused, 0 rollbacks" in text
    assert "100 x real time" in text
    assert '<main class="good">' in page


def test_a_run_that_no_longer_improves_is_a_warning():
    vals = [5.0, 4.2] + [4.3] * 10
    start = {**START, "passes_a_step": 0.05}
    page = page_of([start, *(epoch_row(20 * i + 20, v) for i, v in enumerate(vals))])
    said = "Best 4.2000 in epoch 2, 10 validations ago. val is not below its lowest 4.200"
    assert f"{said} of step 40, 10 passes ago; these can lower it: more music" in text_of(page)
    assert '<main class="warn">' in page


def test_val_stands_beside_train_of_the_same_kind_over_passes_and_late_progress_is_seen():
    start = {**START, "passes_a_step": 0.05}
    vals = [6 * 0.5**i + 4 for i in range(12)]
    trains = [val - 0.1 * i for i, val in enumerate(vals)]
    gaps = [0.1 * i for i in range(12)]
    validated = [
        epoch_row(20 * i + 20, val, train=val + 0.4, train_ce=train)
        for i, (val, train) in enumerate(zip(vals, trains, strict=True))
    ]
    page = page_of([start, *validated])
    titles = ("Val and train, cross-entropy", "The last half of it", "Gap that overfitting opens")
    whole, half, gap = (page.index(f"<b>{title}</b>") for title in titles)
    assert drawn(vals) in page[whole:half]
    assert drawn(trains) in page[whole:half]
    assert 'data-low="120" data-high="240"' in page[half:gap]
    assert drawn(gaps) in page[gap:]
    assert "Gap 1.1000: val minus train of the same kind" in text_of(page)
    assert ">pass</text>" in page
    assert ">pass</text>" not in page_of([START, *validated])


def drawn(values: list[float]) -> str:
    return f'data-v="{" ".join(f"{v:.4g}" for v in values)}"'


@pytest.mark.parametrize(
    ("end", "state", "tone"),
    [
        ({"best_val": 4.0}, "done", "good"),
        ({"signal": "SIGTERM"}, "stopped by SIGTERM, can be resumed", "good"),
        ({"reason": "ten refusals"}, "stopped by the guard: ten refusals", "bad"),
        ({"error": "OSError: full"}, "failed: OSError: full", "bad"),
        (None, "training", "good"),
    ],
)
def test_how_a_run_ended(end, state, tone):
    rows = [START, epoch_row(20, 4.0)] + ([{"event": "end", "step": 20, **end}] if end else [])
    page = page_of(rows)
    assert f"rvq_2cb · {state} ·" in text_of(page)
    assert f'<main class="{tone}">' in page


def test_steps_that_a_rollback_or_a_restart_took_back_are_not_drawn_but_events_stay():
    rows = [START, *map(step_row, (10, 20, 30, 40)), epoch_row(40, 9.0)]
    rows += [
        {"event": "skip", "step": 41, "epoch": 2, "reason": "loss"},
        {"event": "rollback", "step": 41, "epoch": 2, "to_step": 20, "reason": "again"},
    ]
    rows += [step_row(30, loss=1.0), {**START, "event": "resume", "step": 20}, step_row(30, loss=2)]
    story = story_of(rows)
    assert [(r["step"], r["loss"]) for r in story.steps] == [(10, 4.9), (20, 4.8), (30, 2)]
    assert story.epochs == []
    assert [r["event"] for r in story.events] == ["skip", "rollback"]
    assert "again" in text_of(page_of(rows))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"event": "step"}, {"event": "epoch", "step": 3, "epoch": 1}, {}],
        [{"event": "step", "step": 3}, {"event": "epoch", "step": 4, "val": 4.0}],
        [START, epoch_row(20, None)],
        [START, step_row(10, loss=None, grad_norm=None)],
        [{**START, "model": None, "data": None, "flags": None}, epoch_row(20, 4.0)],
        [{"event": "start", "step": 0, "flags": {}}, epoch_row(20, 1e300)],
    ],
    ids=["nothing", "half rows", "no epochs", "no val", "no loss", "older rows", "a huge val"],
)
def test_every_run_has_a_page(rows):
    page = page_of(rows)
    assert "<h1>" in page
    drawn = re.findall(r' (?:d|x|y|width)="([^"]*)"', page)
    assert not [x for x in drawn if "nan" in x or "inf" in x]


HOSTILE_ROWS = [
    {"event": "start", "step": 0, "planned_steps": 400, "command": HOSTILE, "device": HOSTILE,
     "code": HOSTILE, "libraries": {HOSTILE: HOSTILE}, "flags": {HOSTILE: HOSTILE},
     "model": {**START["model"], "d_model": HOSTILE, "pattern": HOSTILE},
     "data": {**START["data"], "files": HOSTILE}},
    {**epoch_row(20, 4.0), "epoch": HOSTILE}, step_row(10, epoch=HOSTILE),
    {"event": "skip", "step": HOSTILE, "epoch": HOSTILE, "reason": HOSTILE},
    {"event": "sample", "step": HOSTILE, "epoch": HOSTILE, "error": HOSTILE},
    {"event": "sample", "step": HOSTILE, "epoch": HOSTILE, "file": HOSTILE},
]  # fmt: skip


@pytest.mark.parametrize("end", ["error", "reason", "signal"])
def test_hostile_words_stay_words(end):
    files = RunFiles("run", HOSTILE.replace("/", ""))
    story = story_of([*HOSTILE_ROWS, {"event": "end", "step": 20, end: HOSTILE}])
    page = as_html(story, files, Path("samples"))
    found = tags_of(page)
    assert [tag for tag, _ in found].count("script") == 1
    assert {name for _, names in found for name in names if name.startswith("on")} == set()
    assert text_of(page).count("alert(1)") > 20
    assert "\x1b" not in page
    assert not re.findall(r"https?:|url\(|@import|<iframe", page)


# --- sound ---------------------------------------------------------------------------------------


def test_a_spectrogram_shows_a_tone_where_it_is():
    rate, seconds = 44_100, 1.0
    time = np.arange(int(rate * seconds)) / rate
    for hz in (100.0, 1000.0, 8000.0):
        levels = spectrogram(np.sin(2 * np.pi * hz * time).astype(np.float32), rate)
        assert levels.shape[0] == ROWS
        assert levels.shape[1] == pytest.approx(seconds * rate / 512, abs=2)
        low, high = HZ
        row = levels[:, 40].argmax()
        found = low * (high / low) ** ((row + 0.5) / ROWS)
        assert abs(math.log2(found / hz)) < 0.15
        assert levels[:, 40].min() == -80


def test_a_long_sound_has_a_picture_that_a_browser_can_show():
    minutes = np.zeros(44_100 * 60 * 30, np.float32)
    minutes[-44_100 * 60 * 15 :] = 0.5 * np.sin(np.arange(44_100 * 60 * 15) * 0.1)
    levels = spectrogram(minutes, 44_100)
    assert levels.shape == (ROWS, pytest.approx(4096, abs=2))
    assert levels[:, 2000].max() == -80
    assert levels[:, 2100].max() > -1


def test_silence_is_dark_and_finite():
    levels = spectrogram(np.zeros(44_100, np.float32), 44_100)
    assert levels.max() == -80


def test_a_sample_whose_sound_failed_or_is_gone_says_so(tmp_path):
    rows = [
        START,
        {"event": "sample", "step": 1, "epoch": 1, "error": "no codec"},
        {
            "event": "sample",
            "step": 2,
            "epoch": 2,
            "file": "gone.npq",
            "repeats": 0.5,
            "shared_seconds": 1.25,
            "shared_seconds_music": 0.1,
        },
    ]
    text = text_of(page_of(rows, tmp_path))
    assert "No sound: no codec" in text
    assert "gone.wav" in text
    assert "repeats 0.500; held-out music -" in text
    assert "shared with training music 1.25 s; held-out music 0.10 s at most" in text


# --- the trainer ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tunes_of_the_demo, tmp_path_factory) -> Path:
    """A folder of a real run with evaluation audio, through the bundled codec."""
    folder = tmp_path_factory.mktemp("run")
    flags = ("--max-steps", "24", "--epochs", "3", "--eval-audio-every", "1", "--eval-frames", "86")
    flags = (*flags, "--eval-dac-repo", "demo", "--data", tunes_of_the_demo, "--save_dir", folder)
    code, output = run_trainer(*TINY, *flags, cwd=folder)  # templates are found from anywhere
    assert code == 0, output
    assert "was not written" not in output
    return folder


def test_the_page_stands_beside_the_run_and_plays(run):
    (report,) = run.glob("*_report.html")
    page = report.read_text()
    (metrics,) = run.glob("*_metrics.jsonl")
    samples = [r for r in read_metrics(metrics) if r["event"] == "sample"]
    assert samples
    assert page.count('src="data:audio/mpeg;base64,') == len(samples)
    assert "done" in text_of(page)[:60]
    for word in ("Val CE per codebook", "Gradient norm", "Learning rate", "Memory, GiB", "torch "):
        assert word in page
    assert len(page) < 400_000


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium to open the page")
def test_chromium_shows_curves_and_plays_the_sound_without_an_error(run):
    from playwright.sync_api import sync_playwright

    (report,) = run.glob("*_report.html")
    told: list[str] = []
    with sync_playwright() as driver:
        options = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 390, "height": 844})  # a phone
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.goto(report.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator("figure:has-text('Val and train') path[data-x]").count() >= 2
        first = page.locator("audio").first
        first.scroll_into_view_if_needed()
        wait_for(lambda: first.evaluate("a => a.readyState") > 0)
        assert first.evaluate("a => a.duration") == pytest.approx(86 * 512 / 44_100, abs=0.06)
        first.evaluate("a => a.play()")
        wait_for(lambda: first.evaluate("a => a.currentTime") > 0.1, 20)
        wait_for(lambda: bool(page.locator(".playhead").first.get_attribute("d")), 20)
        page.locator("button:has-text('Copy')").first.click()
        browser.close()
    assert not told


LABELS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg")) {
    const edge = svg.closest("figure").getBoundingClientRect();
    const labels = [...svg.querySelectorAll("text")].filter(t => t.textContent.trim());
    const boxes = labels.map(t => t.getBoundingClientRect());
    boxes.forEach((a, i) => {
      if (a.left < edge.left || a.right > edge.right) found.push(labels[i].textContent);
      boxes.slice(0, i).forEach((b, j) => {
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > 1 && high > 4) found.push(`${labels[j].textContent} ${labels[i].textContent}`);
      });
    });
  }
  return found;
}"""  # labels that reach over a figure's edge, or lie on another one


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium to open the page")
@pytest.mark.parametrize("width", [390, 1280])
def test_no_label_of_an_axis_is_cut_or_lies_on_another(width, tmp_path):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 844})
        for every in (1, 200, 1740, 12_345, 400_000):
            vals = [4 + 0.00012 * (9 - i) for i in range(10)]
            steps = [step_row(every * i, lr=1.23e-5 * i, memory_gib=0.001 * i) for i in range(11)]
            validated = [
                epoch_row(every * i, val, train_ce=val + 3e-5) for i, val in enumerate(vals, 1)
            ]
            start = {**START, "passes_a_step": 2 / every}
            (tmp_path / "a.html").write_text(page_of([start, *steps, *validated]))
            page.goto((tmp_path / "a.html").as_uri())
            assert page.locator("svg").count() >= 8
            assert page.evaluate(LABELS) == []
        browser.close()


def in_its_place(report: Path) -> None:
    """A folder where the page was; a validation may write one in between."""
    while not report.is_dir():
        report.unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError):
            report.mkdir()


def test_pages_that_cannot_be_written_cost_one_line_until_one_is_and_not_the_run(tunes, tmp_path):
    flags = ("--data", tunes, "--save_dir", tmp_path, "--epochs", "500")
    process = start_trainer(*TINY, *flags, "--quiet")
    report, epochs = tmp_path / "rvq_4cb_report.html", 0
    for _ in range(2):
        wait_for(report.exists)
        in_its_place(report)
        epochs = len(rows(tmp_path, "epoch"))
        wait_for(lambda seen=epochs: len(rows(tmp_path, "epoch")) > seen + 3)
        report.rmdir()
    wait_for(report.exists)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 143
    assert output.count("rvq_4cb_report.html was not written, training goes on") == 2


def test_without_the_flag_there_is_no_page(tunes, tmp_path):
    flags = ("--data", tunes, "--save_dir", tmp_path, "--max-steps", "4", "--no-report")
    assert run_trainer(*TINY, *flags)[0] == 0
    assert not list(tmp_path.glob("*.html"))


def test_a_page_can_be_made_again_from_metrics_that_were_cut(tmp_path):
    files = RunFiles(tmp_path, "rvq_2cb")
    rows = [json.dumps(r) for r in (START, step_row(10), epoch_row(20, 4.5))]
    files.metrics.write_text("\n".join(rows) + '\n{"event": "ep')
    (tmp_path / "samples").mkdir()
    soundfile.write(tmp_path / "samples" / "x.wav", np.zeros(44_100), 44_100)
    assert write_report(files, tmp_path / "samples") == files.report
    assert "val 4.5000" in text_of(files.report.read_text())
