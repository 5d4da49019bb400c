"""doctor/report: four forms of one diagnosis, for tired eyes, programs and hostile names."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest

from cli.command_line import printable
from doctor.diagnosis import Diagnosis, Verdict, diagnose
from doctor.examined_run import ExaminedRun
from doctor.findings import Cause, Finding, Level
from doctor.reading.summary import Parameter, Problem, Summary
from doctor.report import page as page_of_doctor
from doctor.report.page import as_html, charts_of
from doctor.report.terminal import as_csv, as_json, terminal_lines
from pages.charts import Axis, Chart, Frame, Line, draw, fit_axis, thinned
from run_folder.metrics import RunMetrics

HOSTILE = "<script>alert(1)<!--\x1b[31m\n\u202e\udce9\"'.pt"
COMMAND = "python train_rvq.py --resume 'a b.pt' --save_dir " + "long/" * 30


def a_file(step: int, tensors: int = 2, **facts) -> Summary:
    parameters = [
        Parameter(f"blocks.{i}.attn.qkv.weight", [96, 32], "float32", {}, rms=0.1, update_rms=0.2)
        for i in range(tensors)
    ]
    name = facts.pop("name", f"rvq_2cb_epoch_e{step // 10:04d}__20250801-101112.pt")
    fields = {"epoch": step // 10, "size": 2_012_345_678, "style": "own", "best_val": 4.2} | facts
    return Summary(f"run/{name}", "archive", None, step=step, parameters=parameters, **fields)


def rows_of_a_run(steps: int, broken_after: int = 10**9) -> list[dict]:
    rows = []
    for step in range(5, steps, 5):
        k = step - broken_after
        loss = None if k > 90 else 4.5 if k <= 0 else 4.5 * 10 ** (k / 3)
        rows.append({"event": "step", "step": step, "loss": loss, "lr": 1e-3, "grad_norm": loss})
        if step % 10 == 0:
            each = {"val": loss, "val_per_codebook": [loss, loss]}
            rows.append({"event": "epoch", "step": step, "epoch": step // 10, **each})
    return rows


def a_sick_run(files: int = 9, tensors: int = 2, **facts) -> Diagnosis:
    """Healthy to step 50, a leap from step 60 on, and a file that would not be loaded."""
    summaries = [a_file(10 * i, tensors) for i in range(1, files)]
    bad = [s for s in summaries if (s.step or 0) >= 60]
    findings = [
        Finding("G1", Level.SUSPECT, Cause.INSTABILITY, "blocks.1 moved", s.path, s.step,
                after=50, where="blocks.1.attn.qkv.weight", value=9.5, baseline=0.9, n=5)
        for s in bad
    ]  # fmt: skip
    text = "its pickle would call os.system"
    unsafe = Summary("run/evil.pt", "other", None, problem=Problem("unsafe", text))
    findings.append(Finding("I2", Level.UNSAFE, Cause.FILE, text, unsafe.path))
    fields = {
        "run": ExaminedRun("run/rvq_2cb", [unsafe, *summaries], RunMetrics(rows_of_a_run(100, 55))),
        "verdict": Verdict.DIVERGED,
        "headline": "between step 50 (epoch 5) and step 60 (epoch 6); cause: instability",
        "findings": findings,
        "first_sign": findings[0],
        "onset": (50, 60),
        "last_healthy": summaries[4],
        "command": COMMAND,
        "remedy": "Goes back to the last healthy state.",
    }
    return Diagnosis(**(fields | facts))


# --- terminal ------------------------------------------------------------------------------------


def test_the_last_lines_say_what_when_and_what_to_type():
    lines = terminal_lines(a_sick_run(), colour=False)
    assert lines[-1] == f"RESUME WITH: {COMMAND}"
    words = (
        "VERDICT: DIVERGED between step 50",
        "FIRST SIGN: G1",
        "LAST HEALTHY: rvq_2cb_epoch_e0",
    )
    starts = [next(i for i, x in enumerate(lines) if x.startswith(w)) for w in words]
    assert starts == sorted(starts)
    assert starts[0] > len(lines) - 12
    assert "(value 9.5, baseline 0.9, n 5)" in " ".join(x.strip() for x in lines)


def test_lines_fit_80_columns_without_colour_codes():
    lines = terminal_lines(a_sick_run(), colour=False)
    assert max(map(len, lines[:-1])) <= 80
    assert "\x1b" not in "".join(lines)


def test_kinds_of_findings_that_are_left_out_are_counted():
    d = a_sick_run()
    d.findings = [dataclasses.replace(d.findings[0], check=f"X{i}") for i in range(15)]
    text = "\n".join(terminal_lines(d, colour=False))
    assert "... and 3 more kinds of findings" in text
    d.findings = d.findings[:12]
    assert "more kinds" not in "\n".join(terminal_lines(d, colour=False))


def test_colour_changes_nothing_but_colour():
    d = a_sick_run()
    painted = [re.sub(r"\x1b\[[\d;]*m", "", x) for x in terminal_lines(d, colour=True)]
    assert painted == terminal_lines(d, colour=False)
    assert any("\x1b[" in x for x in terminal_lines(d, colour=True))


def test_a_long_table_leaves_out_healthy_rows_alone_and_says_how_many():
    d = a_sick_run(files=70)
    d.findings = [f for f in d.findings if f.step is None or f.step % 50 == 0]
    text = "\n".join(terminal_lines(d, colour=False))
    for step in (100, 350, 650):
        assert re.search(rf"^ *{step} .*suspect G1$", text, re.M)
    left = int(re.search(r"\((\d+) files without findings left out", text)[1])
    shown = re.findall(r"archive +2.01 GB", text)
    assert left > 30
    assert left + len(shown) == 69


def test_files_are_sorted_by_step_and_the_unreadable_stands_last_with_its_problem():
    table = [
        x for x in terminal_lines(a_sick_run(), colour=False) if " archive " in x or "evil" in x
    ]
    assert [x.split()[0] for x in table[:8]] == [str(10 * i) for i in range(1, 9)]
    assert "unsafe I2" in table[8]
    assert any(x.strip() == "its pickle would call os.system" for x in
               terminal_lines(a_sick_run(), colour=False))  # fmt: skip


def test_a_file_saved_after_the_onset_is_not_called_healthy():
    d = a_sick_run(findings=[])
    lines = terminal_lines(d, colour=False)
    assert sum(line.endswith("after onset") for line in lines) == 3


# --- JSON, CSV -----------------------------------------------------------------------------------


def test_json_is_strict_and_complete():
    d = a_sick_run()
    d.run.summaries[1].parameters[0].rms = math.inf
    report = json.loads(json.dumps(as_json([d]), allow_nan=False))
    run = report["runs"][0]
    assert (report["format"], report["verdict"], run["verdict"]) == (1, "DIVERGED", "DIVERGED")
    assert run["onset"] == {"last_good_step": 50, "first_bad_step": 60}
    assert run["first_sign"]["baseline"] == 0.9
    assert run["command"] == COMMAND
    files = {f["path"]: f for f in run["files"]}
    assert files["run/evil.pt"]["problem"]["kind"] == "unsafe"
    assert files[d.run.summaries[-1].path]["state"] == "suspect"
    tensor = files[d.run.summaries[1].path]["parameters"][0]
    assert tensor["rms"] is None
    assert "sample" not in tensor


def test_the_worst_run_gives_the_verdict_of_the_report():
    healthy = a_sick_run(verdict=Verdict.HEALTHY)
    assert as_json([a_sick_run(), healthy])["verdict"] == "DIVERGED"
    assert as_json([])["verdict"] == "NOTHING USABLE"


def test_csv_has_a_row_for_each_tensor_and_one_for_what_was_not_read():
    table = list(csv.DictReader(io.StringIO(as_csv([a_sick_run()]), newline="")))
    assert len(table) == 8 * 2 + 1
    assert table[0]["tensor"] == "blocks.0.attn.qkv.weight"
    assert float(table[0]["rms"]) == 0.1
    assert table[0]["ema_rms"] == ""
    assert (table[-1]["file"], table[-1]["state"]) == ("run/evil.pt", "unsafe")


# --- the page ------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Tags and attributes of a page, and whether every tag was closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def a_hostile_run() -> Diagnosis:
    d = a_sick_run()
    s = a_file(90, name=HOSTILE, saved_at=HOSTILE)
    s.parameters[0].name = s.parameters[0].optimizer = HOSTILE
    s.parameters[0].bad = {HOSTILE: 3}
    d.run.summaries += [s]
    d.run.name = HOSTILE
    bad = Finding("F1", Level.DEAD, Cause.FILE, HOSTILE, s.path, 90, where=HOSTILE)
    d.findings += [bad]
    d.first_sign, d.last_healthy, d.remedy, d.command = bad, s, HOSTILE, HOSTILE
    d.headline = f"{HOSTILE}; cause: {HOSTILE}"
    return d


def test_hostile_names_stay_text_in_every_form():
    d = a_hostile_run()
    page = as_html([d], HOSTILE)
    tags = Tags(page)
    assert not tags.open
    assert [tag for tag, _ in tags.found].count("script") == 1
    assert not [name for _, attributes in tags.found for name in attributes if name[:2] == "on"]
    page.encode()  # a surrogate would fail here
    as_csv([d]).encode()
    json.dumps(as_json([d]), allow_nan=False).encode()
    for line in terminal_lines(d, colour=False):
        assert line == printable(line)


def test_the_page_loads_nothing_and_its_policy_says_so():
    page = as_html([a_sick_run()], "run")
    assert "default-src 'none'" in page
    assert not re.findall(r"https?:|url\(|@import|<img|<iframe", page)
    sources = [a.get("src") or a.get("href") for _, a in Tags(page).found]
    assert {x[0] for x in sources if x} <= {"#", "d"}  # anchors and the empty icon
    assert "file://" not in page


CASES = {
    "sick": a_sick_run(),
    "no metrics": a_sick_run(run=ExaminedRun("r", [a_file(10), a_file(20)], RunMetrics([]))),
    "one file": diagnose(ExaminedRun("r", [a_file(10)], RunMetrics([]))),
    "nothing readable": diagnose(
        ExaminedRun(
            "r", [Summary("x.pt", "other", None, problem=Problem("corrupt", "cut"))], RunMetrics([])
        )
    ),
    "metrics alone": a_sick_run(run=ExaminedRun("r", [], RunMetrics(rows_of_a_run(100, 55)))),
    "old": a_sick_run(run=ExaminedRun("r", [a_file(10, style="old", size=0, best_val=math.nan)],
                              RunMetrics([{"event": "step", "step": 0, "loss": "?", "lr": None},
                                       {"event": "epoch", "step": 0, "val_per_codebook": 3}]))),
    "no way on": a_sick_run(onset=(None, 60), last_healthy=None, command=None, first_sign=None),
    "no step": diagnose(
        ExaminedRun("r", [Summary("x.pt", "latest", None, style="old")], RunMetrics([]))
    ),
}  # fmt: skip


@pytest.mark.parametrize("d", CASES.values(), ids=CASES)
def test_every_form_copes_with(d):
    page = as_html([d, d], "two runs")
    assert not Tags(page).open
    assert page.count(f"<h1>{d.verdict.value}</h1>") == 2
    drawn = [a.get(k, "") for _, a in Tags(page).found for k in ("d", "x", "y", "width", "style")]
    assert not [x for x in drawn if "nan" in x or "inf" in x]
    assert max(len(x) for x in terminal_lines(d, colour=False) if "RESUME" not in x) <= 80
    json.dumps(as_json([d]), allow_nan=False)
    as_csv([d])


def test_a_page_of_40_archives_of_180_tensors_is_small():
    page = as_html([a_sick_run(files=41, tensors=180)], "large")
    assert len(page) < 2_000_000


# --- pictures ------------------------------------------------------------------------------------


def explosion(log: bool) -> tuple[Chart, Axis]:
    points = [(s, 4.5 + 0.1 * (s % 3)) for s in range(100)]
    points += [(100 + s, 5.0 * 10.0**s) for s in range(30)] + [(130, math.inf), (131, math.nan)]
    chart = Chart("loss", [Line("loss", points, "red")], log)
    return chart, fit_axis(chart, 99)


def test_an_explosion_does_not_press_the_healthy_part_flat():
    _, axis = explosion(log=False)
    assert abs(axis.y(4.5) - axis.y(4.7)) > 60  # of 164 units
    assert axis.y(1e30) == axis.y(1e300) < axis.y(4.7)


@pytest.mark.parametrize("values", [[0.0], [1e308, -1e308], [5.0, 5.0], [1e-320, 1e308], []])
@pytest.mark.parametrize("log", [False, True])
def test_axes_of_strange_values_have_ticks_that_are_few_and_inside(values, log):
    axis = fit_axis(Chart("x", [Line("x", list(enumerate(values)), "red")], log), math.inf)
    assert axis.low < axis.high
    assert len(axis.ticks()) <= 12
    assert all(12 <= axis.y(x) <= 176 for x in [*axis.ticks(), *values])


@pytest.mark.parametrize(
    "values",
    [
        [2e-4] * 9, [1e-5, 2e-4], [1.99e-4, 2.01e-4], [0.19918, 0.1996], [4.1931, 4.1938],
        [41_000.0] * 3, [1.02e7, 1.06e7], [3e-14, 3.1e-14], [1e12, 2e12], [99_999.0, 1e5],
    ],
)  # fmt: skip
@pytest.mark.parametrize("log", [False, True])
def test_labels_of_an_axis_are_short_and_tell_its_ticks_apart(values, log):
    chart = Chart("x", [Line("x", list(enumerate(values)), "red")], log)
    text = draw(chart, Frame(0, len(values), []))
    labels = re.findall(r'class="end">([^<]*)<', text)
    assert 2 <= len(labels) == len(set(labels))
    assert max(map(len, labels)) <= 6  # as many as stand beside the axis on a phone


def test_an_axis_of_negative_values_from_zero_contains_it():
    axis = fit_axis(Chart("gap", [Line("gap", [(0, -2.0), (1, -1.0)])], from_zero=True), math.inf)
    assert axis.low < -2.0
    assert axis.high > 0
    assert 0 in axis.ticks()


def test_an_axis_from_zero_has_a_tick_there_and_shares_its_height_truly():
    chart = Chart("memory", [Line("GiB", [(0, 9.0), (1, 10.0)], "red")], from_zero=True)
    axis = fit_axis(chart, math.inf)
    assert (axis.low, axis.y(0.0), axis.ticks()[0]) == (0.0, 176, 0.0)
    assert (176 - axis.y(9.0)) / (176 - axis.y(10.0)) == pytest.approx(0.9)


def test_charts_of_tensors_show_what_the_files_hold():
    d = a_sick_run()
    for s in d.run.series:
        for p in s.parameters:
            p.rms, p.ema_distance = s.step / 100, s.step / 1000
    charts = {c.title: c for c in charts_of(d, Frame(20, 70, []))}
    steps = [20, 30, 40, 50, 60, 70]
    for line in charts["Weights: RMS, first file = 1"].lines:
        assert line.points == [(step, pytest.approx(step / 20)) for step in steps]
    for line in charts["Distance raw to EMA, share of RMS"].lines:
        assert line.points == [(step, pytest.approx(0.1)) for step in steps]


def test_a_short_onset_in_a_long_run_has_pictures_of_its_own():
    files = [a_file(step) for step in range(1000, 11_000, 1000)]
    d = a_sick_run(
        run=ExaminedRun("r", files, RunMetrics([])), onset=(5000, 5010), last_healthy=None
    )
    whole, near = page_of_doctor._frames(d)
    assert (whole.low, whole.high) == (1000, 10_000)
    assert (near.low, near.high) == (5000 - 180, 5010 + 180)
    d.onset = (1000, 9000)
    assert page_of_doctor._frames(d)[1] is None, "most of the run"


def test_thinning_keeps_spikes_gaps_and_both_ends():
    points = [(step, 1.0 + step % 7 / 100) for step in range(10_000)]
    points[4321] = (4321, 99.0)
    points[7000] = (7000, math.nan)
    kept = thinned(points)
    assert len(kept) <= 250
    assert {points[0], points[4321], points[-1]} <= set(kept)
    assert [step for step, value in kept if math.isnan(value)] == [7000]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium to open the page")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_opens_the_page_on_a_phone_and_runs_its_script_alone(scheme, tmp_path):
    from playwright.sync_api import sync_playwright

    path = tmp_path / "report.html"
    path.write_text(as_html([a_hostile_run(), a_sick_run()], "report"), encoding="utf-8")
    told: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.goto(path.as_uri())
        assert page.locator("h1").all_inner_texts() == ["DIVERGED"] * 2
        assert page.locator("button:has-text('Copy')").count() == 2  # that the script puts there
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.locator(".charts svg").first.hover()
        assert page.locator(".at").first.inner_text().startswith("step ")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(251, 250, 248)", "dark": "rgb(19, 20, 23)"}[scheme]
        browser.close()
    assert not told
