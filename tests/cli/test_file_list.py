"""cli/file_list.py: what the lines of --val-list may call a file, and what is doubtful."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from cli.file_list import listed_files

COMPOSED = "Café.npq"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(paths: list[str], text: str | bytes) -> list[str]:
    """The files, which are made, that a list of this text names."""
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    Path("list.txt").write_bytes(os.fsencode(text))
    return [paths[i] for i in listed_files(paths, "list.txt")]


def test_a_line_that_names_a_file_is_no_comment():
    paths = ["t/#9 Dream.npq", "t/9.npq", "t/# 1.npq"]
    assert listed(paths, "#9 Dream.npq") == paths[:1]
    assert listed(paths, "t/#9 Dream.npq\r\n  # 1.npq \n") == [paths[0], paths[2]]
    assert listed(paths, "# #9 Dream.npq\n#9.npq\n#\n# t/9.npq\n#t/9.npq\n9.npq") == ["t/9.npq"]
    assert listed(["#9 Dream.npq"], "#9 Dream.npq") == ["#9 Dream.npq"]


def test_a_name_that_fits_two_files_is_refused_with_both():
    paths = ["a/01.npq", "b/01.npq", "b/c/01.npq", "a/02.npq"]
    message = r"1 lines fit several files: '01\.npq' fits a/01\.npq and b/01\.npq, and more; put "
    with pytest.raises(ValueError, match=message):
        listed(paths, "02.npq\n01.npq\n")
    with pytest.raises(ValueError, match=r"2 lines fit .*'02.npq' .*not in the data: 3.npq; write"):
        listed([*paths, "b/02.npq"], "02.npq\n3.npq\n01.npq\n")
    assert listed(paths, "a/01.npq\nc/01.npq") == ["a/01.npq", "b/c/01.npq"]
    assert listed(paths, "b\\01.npq") == ["b/01.npq"]
    Path("a").rename("x")
    with pytest.raises(ValueError, match=r"'d/01.npq' fits a/d/01.npq and b/d/01.npq; put"):
        listed(["a/d/01.npq", "b/d/01.npq"], "d/01.npq")


def test_a_file_named_by_its_place_is_told_from_others_of_its_name(here):
    paths = ["01.npq", "b/01.npq", f"{here}/c/01.npq"]
    assert listed(paths, "./01.npq") == ["01.npq"]
    assert listed(paths, f"{here}/01.npq\n{here}/b/../b/01.npq\n./c/01.npq") == paths
    with pytest.raises(ValueError, match=r"fits 01\.npq and b/01\.npq, .* as in \./01\.npq"):
        listed(paths, "01.npq")
    for elsewhere in ("./d/01.npq", "../01.npq", "/c/01.npq", "d/01.npq", "1.npq", "b/"):
        with pytest.raises(ValueError, match="1 listed files are not in the data"):
            listed(paths, elsewhere)
    Path("x/c").mkdir(parents=True)
    Path("x/c/01.npq").touch()
    os.chdir("x")  # where c/01.npq is a file that is not in the data
    Path("list.txt").write_text("c/01.npq")
    with pytest.raises(ValueError, match="not in the data"):
        listed_files(paths, "list.txt")


def test_links_on_the_way_do_not_matter(here):
    Path("real/deep").mkdir(parents=True)
    Path("real/deep/a.npq").touch()
    Path("link").symlink_to("real/deep")
    Path("alias.npq").symlink_to("link/a.npq")
    for path in ("real/deep/a.npq", "link/a.npq", "alias.npq"):
        for line in (
            "real/deep/a.npq",
            "link/a.npq",
            "alias.npq",
            f"{here}/link/a.npq",
            "deep/a.npq",
        ):
            Path("list.txt").write_text(line)
            assert listed_files([path], "list.txt") == [0], (path, line)


@pytest.mark.parametrize(("disk", "line"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_forms_of_unicode_are_one_name(disk, line, here):
    assert listed([f"t/{disk}", "t/a.npq"], line) == [f"t/{disk}"]
    assert listed([f"{disk}/1.npq", "t/1.npq"], f"{line}/1.npq") == [f"{disk}/1.npq"]
    assert listed([f"{disk}/1.npq"], f"{here}/{line}/1.npq") == [f"{disk}/1.npq"]
    assert listed([f"a/{disk}/1.npq", "a/1.npq"], f"{line}/1.npq") == [f"a/{disk}/1.npq"]


def test_two_files_that_look_alike_are_told_apart_by_their_paths():
    paths = [f"t/{COMPOSED}", f"t/{DECOMPOSED}"]
    with pytest.raises(ValueError, match="1 lines fit several files"):
        listed(paths, COMPOSED)
    assert listed(paths, paths[0]) == paths[:1]
    assert listed(paths, paths[1]) == paths[1:]


def test_blanks_belong_to_a_name_where_a_file_is_called_so():
    paths = ["t/ a.npq", "t/a.npq", "t/b .npq", "t/c.npq "]
    assert listed(paths, " a.npq") == ["t/ a.npq"]
    assert listed(paths, "  a.npq\t\n") == ["t/a.npq"]
    assert listed(paths, "b .npq\r\nc.npq \r\n") == ["t/b .npq", "t/c.npq "]


def test_what_differs_in_case_is_shown_and_not_guessed():
    with pytest.raises(
        ValueError, match=r"data: Song\.NPQ \(there is t/song\.npq\), other\.npq; write"
    ):
        listed(["t/song.npq"], "other.npq\nSong.NPQ\n")


def test_names_said_twice_count_once():
    assert listed(["t/a.npq", "t/b.npq"], "a.npq\nt/a.npq\n./t/a.npq\na.npq") == ["t/a.npq"]
    assert listed(["t/a.npq"], "# nothing\n\n") == []


NAMES = ["t/1.npq", "t/2.npq", "t/3.npq"]
LINES = "1.npq\r\n2.npq\r\n3.npq\r\n"


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf# held out\r\n1.npq\r\n\r\nt/sub/../2.npq\r\n \t# more\r  3.npq  \t\n  \n",
        LINES.encode("utf-16"),  # as PowerShell's `>` writes
        b"\xfe\xff" + LINES.encode("utf-16-be"),
    ],
)
def test_a_list_of_any_editor_is_read(content):
    assert listed(NAMES, content) == NAMES


def test_a_list_with_the_separators_of_windows():
    """As written where a file has that name, which may hold a backslash here."""
    paths = ["music/a/one.npq", "music/a/two.npq", "music/b/one.npq", "music/a\\one.npq"]
    for line, path in (
        (b"music\\a\\two.npq\r\n", paths[1]),
        (b".\\music\\b\\one.npq\n", paths[2]),
        (b"a\\one.npq", paths[3]),
        (b"music/a\\one.npq", paths[3]),
    ):
        assert listed(paths, line) == [path]


def test_a_listed_name_need_not_be_text():
    paths = [os.fsdecode(b"\xff\xfe.npq"), "caf\xe9 \u2028.npq", "plain.npq"]
    assert listed(paths, "plain.npq\n" + "\n".join(paths[:2])) == paths


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"3.npq\n03.npq\nsong.npq\n", r"2 listed files are not in the data: 03\.npq, song\.npq;"),
        (b"D:\\music\\3.npq\r\n", r"1 listed files are not in the data: D:\\music\\3\.npq;"),
        (b"NPQ1\1\0\2\0", "found a binary file"),
        ("3.npq".encode("utf-16-le"), "found a binary file"),
    ],
)
def test_a_list_that_does_not_fit_the_data_is_an_error(content, message):
    with pytest.raises(ValueError, match=message):
        listed(NAMES, content)


def test_a_long_list_of_files_of_one_name_is_read_in_good_time(here):
    paths = [f"/elsewhere/{i}/codes.npq" for i in range(20_000)]
    Path("list.txt").write_text("".join(f"{i}/codes.npq\n" for i in range(0, 20_000, 2)))
    assert listed_files(paths, "list.txt") == list(range(0, 20_000, 2))
