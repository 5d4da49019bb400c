"""cli/file_search.py: folders, globs, names, links, what cannot be read, and what is left out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from kit.trainer import ROOT

from cli.file_search import Found, NothingFoundError, Wanted, search
from run_folder.files import RunFiles, run_name
from run_folder.names import is_of_a_run, is_sample

AUDIO = Wanted((".wav", ".flac"), unreadable={".m4a"}, recognises=lambda path: "yes" in path)
TOKENS = Wanted((".npq",), is_left_out=is_sample, folder_is_left_out=is_of_a_run)


def make(folder: Path, *names: str) -> None:
    """Empty files; a name that ends in / is a folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.touch()


def paths(*words, wanted=AUDIO) -> list[str]:
    return [file.path for file in search(words, wanted).files]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- words ---------------------------------------------------------------------------------------


def test_folders_globs_and_names(here, monkeypatch):
    make(here, "m/a.wav", "m/B.WAV", "m/sub/c.Flac", "m/sub/deep/d.wav", "m/x.jpg", "e.wav")
    inside = ["m/B.WAV", "m/a.wav", "m/sub/c.Flac", "m/sub/deep/d.wav"]
    assert paths("m") == paths("m/*") == paths("m/**") == paths("*", "m")[1:] == inside
    assert paths("m/*.wav") == ["m/a.wav"]
    assert paths("m/**/*.wav") == ["m/a.wav", "m/sub/deep/d.wav"]
    assert paths("m/**/deep") == paths("m/*/*/") == ["m/sub/deep/d.wav"]
    assert paths("m/su?/[c]*") == ["m/sub/c.Flac"]
    assert paths("e.wav", "m/a.wav", "./e.wav") == ["e.wav", "m/a.wav"]
    assert paths(f"{here}/m/sub") == [f"{here}/m/sub/c.Flac", f"{here}/m/sub/deep/d.wav"]
    monkeypatch.setenv("HOME", str(here))
    assert paths("~/e.*") == [f"{here}/e.wav"]
    roots = {file.path: file.root for file in search(["m/*", "e.wav"], AUDIO).files}
    assert roots == {**dict.fromkeys(inside, "m"), "e.wav": ""}


def test_a_glob_finds_what_the_shell_finds(here):
    make(here, "t/a/1.wav", "t/a/b/2.wav", "t/c.d/3.wav", "t/4.wav", "t/.h/5.wav", "t/.6.wav")
    make(here, "t/[x]/7.wav", "t/a/.8.wav")
    words = ("t/*", "t/*/*.wav", "t/**/2.wav", "t/[ac]*", "t/?/*", "t/.h/*.wav", "t/.*", "*/*/b")
    for word in words:
        script = f"shopt -s globstar; printf '%s\\n' {word}"
        shell = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        expanded = [w for w in shell.stdout.split() if w.rpartition("/")[2] not in (".", "..")]
        assert sorted(paths(word)) == sorted(paths(*expanded)), word


def test_a_name_may_have_any_suffix_if_its_content_fits(here):
    make(here, "yes.audio", "cover.jpg", "a.wav")
    found = search(["yes.audio", "cover.jpg", "a.wav"], AUDIO)  # as a shell expands *
    assert [file.path for file in found.files] == ["yes.audio", "a.wav"]
    assert found.lines() == ["passed over: 1 .jpg"]
    assert paths("*") == ["a.wav"]  # whose suffix is not wanted is no match of a glob
    with pytest.raises(NothingFoundError, match=r"'cover.jpg': no .wav .flac in it; passed over"):
        search(["cover.jpg"], AUDIO)


def test_a_word_that_leads_to_nothing(here):
    make(here, "a.wav", "empty/", "m/x.jpg", "m/y.txt")
    for word in ("b.wav", "*.flac", "nowhere/*.wav", "a.wav/b", "a.wav/*", "*/*.wav"):
        with pytest.raises(NothingFoundError, match="there is no such file or folder"):
            search(["a.wav", word], AUDIO)
    for words in (["empty"], ["a.wav", "empty"], ["m", "empty"]):  # a disk that is not mounted?
        with pytest.raises(NothingFoundError, match="'empty': there is nothing in it"):
            search(words, AUDIO)
    for words in (["m"], ["m/*"], ["m/x.jpg", "m"]):
        with pytest.raises(NothingFoundError, match=r"no .wav .flac in it; passed over: 1 .jpg, 1"):
            search(words, AUDIO)
    assert paths("a.wav", "m") == ["a.wav"]


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("[2001] Live/*.wav", "[[]2001] Live/*.wav"),
        ("[2001] Live/cut[12].wav", "[[]2001] Live/cut[12].wav"),
        ("[2001] Liv?/ta[[]ke] what?.wav", None),  # as it should be, but for the folder
        ("*/ta[ke] what?.wav", "*/ta[[]ke] what?.wav"),
        ("./[2001] Live", None),  # a name that exists needs no hint
        ("[3]*", None),
    ],
)
def test_brackets_that_are_letters_get_a_hint(here, pattern, meant):
    make(here, "[2001] Live/cut1.wav", "[2001] Live/ta[ke] what?.wav")
    if pattern == "./[2001] Live":
        assert len(paths(pattern)) == 2
        return
    with pytest.raises(NothingFoundError) as caught:
        search([pattern], AUDIO)
    if meant is not None:
        assert f"write [[]: {meant!r}" in str(caught.value)
        assert paths(meant)
    assert ("write [[]" in str(caught.value)) == (pattern != "[3]*")


# --- links ---------------------------------------------------------------------------------------


def test_links_are_followed_once(here):
    make(here, "store/album/1.wav", "m/2.wav", "m/z/3.wav")
    Path("m/album").symlink_to("../store/album")
    Path("m/later").symlink_to("../store/album")
    Path("m/a").symlink_to("z")  # a folder with a place of its own keeps it
    Path("m/0.wav").symlink_to("2.wav")
    Path("m/4.wav").symlink_to("../store/album/1.wav")
    assert paths("m") == ["m/2.wav", "m/album/1.wav", "m/z/3.wav"]
    assert paths("m", "store") == paths("m")
    assert paths("store", "m") == ["store/album/1.wav", "m/2.wav", "m/z/3.wav"]
    assert paths("m/album", "m/0.wav") == ["m/album/1.wav", "m/0.wav"]


def test_circles_of_links_end_and_say_so(here):
    make(here, "m/1.wav", "m/sub/2.wav", "n/3.wav", "4.wav")
    for link, target in (
        ("m/loop", "."), ("m/sub/up", ".."), ("m/sub/out", "../.."), ("m/self", "self"),
        ("m/n", "../n"), ("n/m", "../m"),
    ):  # fmt: skip
        Path(link).symlink_to(target)
    found = search(["m"], AUDIO)
    assert [file.path for file in found.files] == ["m/1.wav", "m/n/3.wav", "m/sub/2.wav"]
    assert found.lines() == ["passed over: 3 link to a folder above, 1 broken link"]
    for word in ("m/**/*.wav", "**/*.wav", "*/*"):  # two circles: glob.glob would never end
        assert len(paths(word)) == len({os.path.realpath(p) for p in paths(word)}) >= 3
    assert len(paths(".")) == 4


def test_a_deep_tree_is_searched_to_its_end(here):
    """Deeper than Python's recursion goes."""
    folder = os.open(".", os.O_RDONLY)
    for _ in range(1_100):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(os.open("x.wav", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)
    found = [path.count("/") for word in ("d", "**/x.wav") for path in paths(word)]
    subprocess.run(["rm", "-r", "d"], check=True)  # pytest's own removal is recursive
    assert found == [1_100, 1_100]


# --- what cannot be used -------------------------------------------------------------------------


def test_what_is_no_file_under_a_wanted_name_is_refused_by_name(here):
    make(here, "m/ok.wav", "m/folder.wav/in.wav", "m/old.M4A", "m/.hidden.wav", "m/.d/x.wav")
    os.mkfifo("m/pipe.wav")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("m/socket.flac")
    for link, target in (("gone", "nowhere"), ("null", "/dev/null"), ("self", "self.wav")):
        Path(f"m/{link}.wav").symlink_to(target)
    os.mkfifo("m/pipe")
    Path("m/album").symlink_to("/mnt/not mounted")
    found = search(["m"], AUDIO)
    assert [file.path for file in found.files] == ["m/folder.wav/in.wav", "m/ok.wav"]
    why = {path: reason.split(";")[0] for path, reason in found.unusable}
    assert why == {
        "m/folder.wav": "expected a file, found a folder (what is in it was searched)",
        "m/gone.wav": "expected a file, found a broken link",
        "m/null.wav": "expected a file, found a device",
        "m/old.M4A": ".m4a cannot be read",
        "m/pipe.wav": "expected a file, found a pipe",
        "m/self.wav": "expected a file, found a broken link",
        "m/socket.flac": "expected a file, found a socket",
    }
    assert found.lines() == ["passed over: 1 broken link, 1 pipe"]
    again = search(["m/*", "m", f"{here}/m"], AUDIO)
    assert (again.unusable, again.lines()) == (found.unusable, found.lines())
    for word in ("m/pipe", "m/pipe.wav", "m/album", "m/old.M4A"):
        assert [path for path, _ in search([word], AUDIO).unusable] == [word]


def test_a_folder_without_permission_is_named_and_the_rest_found(here):
    """Root may read everything, so this runs as nobody."""
    make(here, "m/a/1.wav", "m/secret/2.wav", "m/blind/3.wav", "m/z/4.wav", "m/z/5.txt")
    (here / "m" / "link").symlink_to("secret/below")
    os.chmod("m/secret", 0o000)
    os.chmod("m/blind", 0o444)  # names can be read there, and nothing else
    script = (
        "import os; from cli.file_search import *; os.geteuid() or os.setuid(65534)\n"
        "for word in ('m', 'm/*', 'm/**/*.wav', 'm/*/*.wav', 'm/secret', 'm/secret/*.wav',"
        " 'm/secret/x/y.wav'):\n"
        "    found = search([word], Wanted(('.wav',)))\n"
        "    print(word, *[f.path for f in found.files], '|', *[p for p, _ in found.unusable])"
    )
    for folder in (here, *here.parents):
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)  # pytest's own are private
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == [
        "m m/a/1.wav m/blind/3.wav m/z/4.wav | m/link m/secret",
        "m/* m/a/1.wav m/blind/3.wav m/z/4.wav | m/link m/secret",
        "m/**/*.wav m/a/1.wav m/z/4.wav | m/blind/3.wav m/link m/secret",
        "m/*/*.wav m/a/1.wav m/z/4.wav | m/blind/3.wav m/link m/secret",
        "m/secret | m/secret",
        "m/secret/*.wav | m/secret",
        "m/secret/x/y.wav | m/secret/x/y.wav",
    ], done.stderr


def test_kinds_are_counted_in_one_line(here):
    make(here, *(f"m/{i}.jpg" for i in range(3)), "m/a.TXT", "m/README", "m/1. some one", "m/o.wav")
    found = search(["m", "m/*", f"{here}/m/0.jpg", "m/o.wav"], AUDIO)
    assert found.lines() == ["passed over: 3 .jpg, 2 without a suffix, 1 .txt"]
    make(here, *(f"m/x.k{i}" for i in range(9)))
    assert search(["m"], AUDIO).lines()[0].endswith(", 1 .k5, 4 of 4 other kinds")


# --- files of runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [run_name(9), run_name(4, "a_b.c")])
def test_a_runs_folder_is_known_by_any_of_its_files(name, here):
    files = RunFiles("run", name)
    for path in (files.latest, files.previous, files.best, files.metrics):
        assert is_of_a_run("run", [path.name, "x.npq"])
    assert not is_of_a_run("run", ["x.npq", ".lock", "rvq_notes.pt", f"{name}.npq", "latest.pt"])
    assert is_sample(f"{name}_e0005__20250901-120000.npq")
    assert is_sample(f"{name}_e12345__20250901-120000.wav")
    assert not is_sample(f"{name}.npq")
    assert not is_sample("my_rvq_9cb_e0005__20250901-120000.npq")


def test_files_of_runs_are_left_out_and_named(here):
    sample = "rvq_4cb_e0001__20250901-120000.npq"
    make(here, "toks/a.npq", "b.npq", f"eval/{sample}", "eval/c.npq", "samples/d.npq")
    make(here, "run/rvq_4cb_metrics.jsonl", f"run/samples/{sample}", "run/song.npq", "run/x/e.npq")
    make(here, "run/rvq_4cb_before_20250901-120000/rvq_4cb_latest.pt", "run/samples/kept.npq")
    data = ["b.npq", "eval/c.npq", "samples/d.npq", "toks/a.npq"]
    for word in (".", "*", "**", "**/*.npq"):
        found = search([word], TOKENS)
        assert [os.path.normpath(file.path) for file in found.files] == data, word
        (line,) = found.lines()
        assert line.startswith("left out, as files of runs are no data: ")
        assert {os.path.normpath(p) for p in line.split(": ")[1].split(", ")} == {"eval", "run"}
    # Whoever names the folder itself has its files, but not what the run put there.
    assert paths("run", wanted=TOKENS) == ["run/song.npq", "run/x/e.npq"]
    assert paths("run/*", wanted=TOKENS) == ["run/song.npq", "run/x/e.npq"]
    assert paths("run/*.npq", wanted=TOKENS) == ["run/song.npq"]
    both = search([".", "run"], TOKENS)
    assert [file.path for file in both.files][-2:] == ["run/song.npq", "run/x/e.npq"]
    for word in (f"eval/{sample}", f"*/{sample}", "run/samples/rvq*", "run/samp*"):
        with pytest.raises(NothingFoundError, match=r"files of runs are no data: (eval|run/samp)"):
            search([word], TOKENS)
    assert paths(f"eval/{sample}", wanted=Wanted((".npq",))) == [f"eval/{sample}"]


def test_names_need_not_be_text(here):
    name = os.fsdecode(b"odd\xff.wav")
    make(here, f"m/{name}", "m/new\nline.wav", os.fsdecode(b"m/\xff.\xfe"))
    found = search(["m/*"], AUDIO)
    assert [file.path for file in found.files] == ["m/new\nline.wav", f"m/{name}"]
    assert found.lines() == ["passed over: 1 without a suffix"]


def test_a_search_can_be_added_to(here):
    make(here, "a.wav", "b.wav")
    found = Found(AUDIO)
    found.add("b.wav")
    found.add(".")
    assert [file.path for file in found.files] == ["b.wav", "./a.wav"]
