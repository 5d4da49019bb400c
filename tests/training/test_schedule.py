"""The learning rate's budget over the starts of a run: it never comes back once it has fallen."""

from __future__ import annotations

import shutil

import pytest
from kit.trainer import make_run, train

from run_folder.checkpoint import load_checkpoint
from run_folder.files import save_checkpoint
from training.schedule import learning_rate, schedule_position

BUDGETS = [("--max-seconds", "2"), ("--max-steps", "6"), ("--epochs", "2")]


def rates(run, seconds: list[float]) -> list[float]:
    """Learning rates as the run's clock and steps go on."""
    found = []
    for now in seconds:
        run.state.progress.seconds, run.state.progress.step = now, round(10 * now)
        found.append(learning_rate(run))
    return found


def finished(folder, tunes, *budget: str):
    train("--data", tunes, "--save_dir", folder, *budget)
    return folder / "rvq_4cb_latest.pt"


@pytest.fixture(scope="module", params=BUDGETS, ids=lambda b: b[0])
def ended(request, tunes, tmp_path_factory):
    """The folder of a run that has used up its budget."""
    return finished(tmp_path_factory.mktemp("ended"), tunes, *request.param).parent


@pytest.mark.parametrize(
    "longer", [("--max-seconds", "900"), ("--max-steps", "900"), ("--epochs", "90")]
)
def test_a_finished_cosine_run_that_is_prolonged_stays_at_its_lowest_rate(
    longer, ended, tunes, tmp_path
):
    """Pitfall 7: more seconds are another budget of the run, and none of the schedule."""
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    end = load_checkpoint(tmp_path / "rvq_4cb_latest.pt")["progress"]
    run = make_run("--data", tunes, "--save_dir", tmp_path, *longer)
    p = run.state.progress
    assert (p.schedule_steps, p.schedule_seconds) == (
        end["schedule_steps"], end["schedule_seconds"],
    )  # fmt: skip
    assert rates(run, [max(p.seconds, 2.0), 30, 500, 2000]) == [run.flags.eta_min] * 4


def test_a_checkpoint_of_before_keeps_the_seconds_that_it_was_planned_for(tunes, tmp_path):
    path = finished(tmp_path, tunes, "--max-seconds", "1")
    old = load_checkpoint(path)
    del old["progress"]["schedule_seconds"]
    save_checkpoint({k: v for k, v in old.items() if k != "format"}, path)
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--max-seconds", "900")
    assert schedule_position(run)[1] == 1
    assert rates(run, [2.0, 450.0]) == [run.flags.eta_min] * 2


def test_the_banner_says_what_the_schedule_still_spans(tunes, tmp_path):
    from kit.trainer import TINY, run_trainer

    finished(tmp_path, tunes, "--max-seconds", "1")
    flags = ("--data", tunes, "--save_dir", tmp_path, "--max-seconds", "1.1")
    code, output = run_trainer(*TINY, *flags)
    assert code == 0, output
    assert "the lr schedule still spans 1 training seconds" in output


def test_wsd_over_seconds_is_prolonged_before_its_cooldown_and_not_after(tunes, tmp_path):
    wsd = ("--schedule", "wsd", "--cooldown", "0.2")
    train("--data", tunes, "--save_dir", tmp_path, "--max-seconds", "900", *wsd, stop_at=3)
    run = make_run("--data", tunes, "--save_dir", tmp_path, "--max-seconds", "9000")
    assert schedule_position(run)[1] == 9000
    assert rates(run, [7000.0]) == [run.flags.lr]
