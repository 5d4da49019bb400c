"""sound/labels.py: labels by folder and by CSV file; nothing that is odd passes in silence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from kit.npq_bytes import npq1, put

from sound.corpus import roots_of_npq_files
from sound.labels import Labels, labels_in, read_labels

FILES = ("a.npq", "jazz/1.npq", "jazz/live/2.npq", "rock/1.npq", "rock/3.npq")


@pytest.fixture
def music(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in FILES:
        put(tmp_path / "music" / name, npq1([[1]]))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "music"


def labelled(source: str, *data: str) -> tuple[dict[str, list[str]], list[str]]:
    """Labels of each file that --data finds, and the warnings."""
    roots = roots_of_npq_files(data)
    labels = read_labels(source, roots, list(roots))
    names = ([labels.names[i] for i in row if i >= 0] for row in labels.of_file)
    return dict(zip(roots, names, strict=True)), labels.warnings


@pytest.mark.parametrize("music_at", ["music", "./music/", "{here}/music", "music/../music"])
def test_the_label_is_the_first_folder_below_what_was_named(music_at, music):
    found, warnings = labelled("folders", music_at.format(here=music.parent))
    expected = [[], ["jazz"], ["jazz"], ["rock"], ["rock"]]
    assert dict(zip(FILES, expected, strict=True)) == {
        os.path.relpath(path, music): labels for path, labels in found.items()
    }
    assert len(warnings) == 1
    assert "1 files have no label and train without: " in warnings[0]
    assert "music/a.npq" in warnings[0]


@pytest.mark.parametrize(
    "data",
    [
        ["music/jazz/1.npq", "music/rock/1.npq"],  # files
        ["music/*/1.npq"],  # a glob
        ["music/rock", "music/jazz/1.npq"],  # a folder that has all its files in itself
        ["music/rock/*", "music/j*/1.npq"],
        ["music/rock/", "{here}/music/jazz/[1]*.npq"],
    ],
)
def test_globs_files_and_folders_of_one_label_are_labelled_alike(data, music):
    found, warnings = labelled("folders", *(d.format(here=music.parent) for d in data))
    assert {os.path.relpath(p, music): x for p, x in found.items()}.items() >= {
        "jazz/1.npq": ["jazz"], "rock/1.npq": ["rock"],
    }.items()  # fmt: skip
    assert warnings == []


def test_folders_in_the_working_folder(music, monkeypatch):
    monkeypatch.chdir(music)
    for data in (["."], ["**/*.npq"], ["*.npq", "jazz", "rock"]):
        found, _ = labelled("folders", *data)
        by_path = {os.path.normpath(path): labels for path, labels in found.items()}
        assert by_path["rock/1.npq"] == ["rock"], data
        assert by_path["a.npq"] == ([] if len(data) == 1 else ["music"]), data


def test_one_label_for_all_is_told(music):
    found, warnings = labelled("folders", "music/rock")
    assert set(map(tuple, found.values())) == {("rock",)}
    assert warnings == ["all files have the one label 'rock': it tells nothing apart"]


ROWS = 'path,label\n# mine\nmusic/a.npq, slow ,"Earth, Wind"\nlive/2.npq,slow,\nrock/1.npq\n\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_of_a_csv_file(encoding, end, music):
    with open("x.csv", "w", encoding=encoding, newline=end) as file:
        file.write(ROWS + "gone.npq,slow\nJAZZ/1.NPQ,x\n")
    found, warnings = labelled("x.csv", "music")
    assert {p: x for p, x in found.items() if x} == {
        "music/a.npq": ["Earth, Wind", "slow"], "music/jazz/live/2.npq": ["slow"],
    }  # fmt: skip
    assert warnings == [
        "x.csv: 2 rows name no file of the data: JAZZ/1.NPQ (there is music/jazz/1.npq), gone.npq",
        "3 files have no label and train without: music/jazz/1.npq, music/rock/1.npq, "
        "music/rock/3.npq",
    ]


def test_either_form_of_unicode_is_one_name(music):
    put(music / "Cafe\u0301.npq", npq1([[1]]))
    Path("x.csv").write_text("Caf\u00e9.npq,Bjo\u0308rk\na.npq,Bjo\u0308rk\n")
    found, _ = labelled("x.csv", "music")
    assert found["music/Cafe\u0301.npq"] == ["Bj\u00f6rk"] == labels_in("Bjo\u0308rk", ())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.npq,slow\nmusic/a.npq,slow", "lines 1 and 2 are of one file, music/a.npq; put all"),
        ("a.npq,Slow\nrock/3.npq,slow", "'Slow' .music/a.npq. and 'slow' .* differ only in case"),
        ("a.npq,e\u0301\n3.npq,\u00e9", r"'e\\u0301' .* and '\\xe9' .* case or Unicode form"),
        ("1.npq,slow\n", r"1 lines fit several files: '1\.npq' fits .* and .*; put folders"),
        ('a.npq,"slow\n', "line 1: no CSV"),
        ('a.npq,"sl\now"\n', r"a label of at most 200 printable characters, found 'sl\\now'"),
        (f"a.npq,{'x' * 201}\n", "at most 200 printable"),
        (",slow\n", "line 1: expected a path, found none"),
        ("b.npq;slow\n", "names a file of the data: b.npq;slow"),
        ("", "names a file of the data: it is empty"),
        ("a.npq\n", "expected labels, found none for all 5 files"),
        ("a.npq\0", "found a binary file"),
    ],
)
def test_what_is_wrong_with_a_csv_file_is_named(rows, message, music):
    Path("x.csv").write_text(rows)
    with pytest.raises(ValueError, match=message):
        labelled("x.csv", "music")


def test_folders_that_differ_in_case_or_are_no_text_are_named(music):
    put(music / "Jazz" / "4.npq", npq1([[1]]))
    with pytest.raises(ValueError, match=r"'jazz' .*'Jazz'|'Jazz' .*'jazz'"):
        labelled("folders", "music")
    os.rename(music / "Jazz", os.fsencode(music) + b"/\xff")
    with pytest.raises(ValueError, match="printable characters, found"):
        labelled("folders", "music")


def test_labels_without_training_music_are_named_and_many_are_cut():
    names = tuple(f"{i:02}" for i in range(60))
    labels = Labels(names, np.arange(60)[:, None])
    train = np.arange(60) / 10
    assert labels.untrained(train) == ["no music to train on has 00: nothing is learned of it"]
    lines = labels.lines(train, train)
    assert lines[0] == "label    59: 1 files, 5.90 hours to train, 5.90 to validate"
    assert lines[50:] == ["label    and 10 with less to train"]


def test_labels_of_a_flag():
    known = ("Earth, Wind", "a", "b")
    assert labels_in("Earth, Wind", known) == ["Earth, Wind"]
    assert labels_in('a, b,"Earth, Wind"', known) == ["a", "b", "Earth, Wind"]
    assert labels_in("", known) == []
