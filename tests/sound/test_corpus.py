"""sound/corpus.py: files found and scanned, codes checked, the codec that made them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from kit.npq_bytes import legacy_a, npq1, npq2, put, some_codes

from sound.corpus import BadFilesError, find_npq_files, scan_corpus
from sound.npq_format import read_header, write_npq
from sound.origin import CodecId, Records


def test_files_are_found_by_folder_glob_and_name_each_once(tmp_path, monkeypatch):
    a = put(tmp_path / "a.npq", b"")
    b = put(tmp_path / "deep" / "er" / "B.NPQ", b"")
    odd = put(tmp_path / "odd" / "c [live].npq", b"")
    put(tmp_path / "notes.txt", b"")
    put(tmp_path / ".hidden.npq", b"")
    (tmp_path / "link.npq").symlink_to(a)
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    told = []
    assert sorted(find_npq_files([tmp_path], tell=told.append)) == sorted([a, b, odd])
    assert told == ["passed over: 1 .txt, 1 link to a folder above"]
    assert find_npq_files([a, tmp_path / "*.npq", tmp_path / "deep"]) == [a, b]
    assert find_npq_files([f"{tmp_path}/**/B.*"]) == [b]
    assert find_npq_files([odd, f"{tmp_path}/d*"]) == [odd, b]
    for nothing in (tmp_path / "none*", tmp_path / "deep" / "x.npq", tmp_path / "odd" / "[x]"):
        with pytest.raises(FileNotFoundError, match="name folders"):
            find_npq_files([a, nothing])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_npq_files(["~/a.n*"]) == [a]  # as an earlier version saved it


def test_a_named_file_is_known_by_its_content(tmp_path):
    """A shell's own * names everything there is."""
    names = [put(tmp_path / "a.npq", npq1([[1]])), put(tmp_path / "b.codes", npq1([[1]]))]
    names += [put(tmp_path / "cover.jpg", b"\xff\xd8"), put(tmp_path / "list.json", b"{}")]
    assert find_npq_files(names) == names[:2]


def test_a_file_reached_by_several_ways_counts_once(tmp_path, monkeypatch):
    a = put(tmp_path / "real" / "deep" / "a.npq", b"")
    (tmp_path / "also").symlink_to(tmp_path / "real" / "deep")
    (tmp_path / "real" / "b.npq").symlink_to(a)
    (tmp_path / "loop").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for ways in ([a, "also"], [a, "also/a.npq"], [a, "real"], [a, "loop/also/../../real/deep"]):
        assert find_npq_files(ways) == [a]
    assert find_npq_files(["real/../also", a]) == ["real/../also/a.npq"]


@pytest.mark.parametrize("kind", ["folder", "dangling link", "pipe", "device"])
def test_what_is_no_file_is_not_passed_over(tmp_path, kind):
    """Pitfall 22, fault 27: nothing is dropped without a word."""
    put(tmp_path / "a.npq", npq1(some_codes(20)))
    odd = tmp_path / "b.npq"
    if kind == "folder":
        put(odd / "c.npq", npq1(some_codes(20, seed=1)))
    elif kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to("nowhere" if kind == "dangling link" else "/dev/null")
    with pytest.raises(BadFilesError, match=r"b\.npq: file: expected a re[a-z]+ file"):
        scan_corpus(find_npq_files([tmp_path]), ctx=16)
    summary = scan_corpus(find_npq_files([tmp_path]), ctx=16, skip_bad=True).summary
    assert (summary.files, summary.dropped) == (1 + (kind == "folder"), {"not valid: file": (1, 0)})


def test_a_bad_code_in_the_last_frame_of_the_last_file(tmp_path):
    """Pitfall 23, fault 18: named with its frame and codebook, before any training."""
    for i in range(3):
        codes = some_codes(100_000 if i == 2 else 50, 9, seed=i)
        if i == 2:
            codes[-1, 8] = 1024
        put(tmp_path / f"{i}.npq", npq1(codes))
    with pytest.raises(BadFilesError) as caught:
        scan_corpus(find_npq_files([tmp_path]), ctx=16)
    assert "1 of 3 files" in str(caught.value)
    assert f"{tmp_path}/2.npq: codes: expected 0 to 1023, found 1024" in str(caught.value)
    assert "in frame 99999, codebook 8;" in str(caught.value)


def mixed_folder(folder: Path) -> list[str]:
    for i in range(5):
        put(folder / f"good{i}.npq", npq1(some_codes(100, seed=i), rate=86.1998 + i * 3e-4))
    put(folder / "nominal.npq", npq1(some_codes(100, seed=5), rate=44_100 / 512))
    put(folder / "nine.npq", npq1(some_codes(40, 9)))
    put(folder / "two.npq", npq1(some_codes(40, 2)))
    put(folder / "slow.npq", npq1(some_codes(100, seed=6), rate=50.0))
    put(folder / "short1.npq", npq1(some_codes(15)))
    put(folder / "short2.npq", npq1(some_codes(15, seed=1)))
    put(folder / "stereo.npq", npq2(some_codes(100, seed=7), 1))
    put(folder / "old.npq", legacy_a(some_codes(100, seed=8)))
    return find_npq_files([folder])


def test_dropped_files_are_counted_by_reason(tmp_path):
    """Pitfall 22, fault 19."""
    summary = scan_corpus(mixed_folder(tmp_path), ctx=16).summary
    assert summary.files == 7
    assert summary.layouts == {"NPQ1": 6, "legacy A": 1}
    assert summary.hours == pytest.approx(700 / 86.2 / 3600, rel=1e-3)
    counts = {reason: files for reason, (files, _) in summary.dropped.items()}
    assert counts == {
        "9 codebooks, the run uses 4 (see --codebooks)": 1,
        "2 codebooks, the run uses 4 (see --codebooks)": 1,
        "3 + 1 side codebooks, the run uses 4 (see --codebooks)": 1,
        "frame rate 50.00, the run's is 86.20": 1,
        "shorter than a window of 16 frames": 2,
    }
    lines = "\n".join(summary.lines())
    assert "7 files" in lines
    assert "2 files, 0.00 hours: shorter than a window of 16 frames" in lines


def test_bad_files_are_listed_or_counted_when_skipped(tmp_path):
    """Pitfall 22."""
    for i in range(3):
        put(tmp_path / f"good{i}.npq", npq1(some_codes(100, seed=i)))
    put(tmp_path / "cut1.npq", npq1(some_codes(100))[:-1])
    put(tmp_path / "cut2.npq", npq1(some_codes(100))[:-7])
    put(tmp_path / "code1.npq", npq1([[1024] * 4] * 20))
    put(tmp_path / "code2.npq", npq1([[1, 1, 1, 1]] * 19 + [[1, 1, 1, 1024]]))
    paths = find_npq_files([tmp_path])
    with pytest.raises(BadFilesError) as caught:
        scan_corpus(paths, ctx=16)
    assert "4 of 7 files" in str(caught.value)
    assert "--skip-bad-files" in str(caught.value)
    assert all(f"{n}.npq:" in str(caught.value) for n in ("cut1", "cut2", "code1", "code2"))
    summary = scan_corpus(paths, ctx=16, skip_bad=True).summary
    assert summary.files == 3
    assert summary.dropped == {"not valid: size": (2, 0.0), "not valid: codes": (2, 0.0)}


def test_no_usable_file_is_an_error_that_says_why(tmp_path):
    """Fault 19."""
    path = put(tmp_path / "short.npq", npq1(some_codes(15)))
    with pytest.raises(BadFilesError, match=r"1 files.*shorter than a window"):
        scan_corpus([path], ctx=16)
    with pytest.raises(BadFilesError, match=r"1 files.*4 codebooks, the run uses 12"):
        scan_corpus([path], ctx=8, codebooks=12)
    bad = put(tmp_path / "bad.npq", b"")
    with pytest.raises(BadFilesError, match="not valid: header"):
        scan_corpus([bad], ctx=16, skip_bad=True)
    with pytest.raises(BadFilesError):
        scan_corpus([], ctx=16)


def test_files_of_another_k_have_no_say_in_the_frame_rate(tmp_path):
    """Fault 19: and of two rates one is the run's, not the mean of both, which would drop all."""
    long = put(tmp_path / "long.npq", npq1(some_codes(500)))
    others = [put(tmp_path / f"{i}.npq", npq1(some_codes(20, 2), rate=50.0)) for i in range(5)]
    corpus = scan_corpus([long, *others], ctx=16)
    assert (corpus.num_codebooks, corpus.summary.files) == (4, 1)
    slow = put(tmp_path / "slow.npq", npq1(some_codes(499), rate=50.0))
    corpus = scan_corpus([long, slow], ctx=16)
    assert corpus.summary.files == 1
    assert corpus.frame_rate in (50.0, read_header(long).frame_rate)


def test_a_tie_between_two_k_does_not_depend_on_the_order(tmp_path):
    a = put(tmp_path / "a.npq", npq1(some_codes(50, 3)))
    b = put(tmp_path / "b.npq", npq1(some_codes(50, 4)))
    found = {scan_corpus(p, ctx=16).num_codebooks for p in ([a, b], [b, a])}
    assert found == {4}


def test_mixed_vocabularies_take_the_largest_and_say_so(tmp_path):
    """Fault 19."""
    a = put(tmp_path / "a.npq", npq1(some_codes(50, 2, vocab=10), [10, 1024]))
    b = put(tmp_path / "b.npq", npq1(some_codes(50, 2, vocab=20, seed=1), [64, 20]))
    corpus = scan_corpus([a, b], ctx=16)
    assert corpus.vocab_sizes == (64, 1024)
    assert any("2 different vocabularies" in note for note in corpus.summary.notes)


def test_duplicates_are_noted(tmp_path):
    paths = [put(tmp_path / f"{i}.npq", npq1(some_codes(50, seed=i % 3))) for i in range(5)]
    notes = scan_corpus(paths, ctx=16).summary.notes
    assert notes == ["2 files hold the same codes as another file"]
    assert scan_corpus(paths[:3], ctx=16).summary.notes == []


def test_codes_are_checked_once_per_path_size_and_time(tmp_path):
    path, store = tmp_path / "x.npq", tmp_path / "checked.json"
    other = put(tmp_path / "other.npq", npq1(some_codes(50, seed=1)))
    put(path, npq1(some_codes(50)))
    stamp = path.stat().st_mtime_ns
    first = scan_corpus([str(path), other], ctx=16, checked_file=store)
    # A bad code under an unchanged size and time: the scan does not see it, so it did not read it.
    put(path, npq1([*some_codes(49).tolist(), [1024] * 4]))
    os.utime(path, ns=(stamp, stamp))
    again = scan_corpus([str(path), other], ctx=16, checked_file=store)
    assert again.fingerprint() == first.fingerprint()
    with pytest.raises(BadFilesError, match="frame 49"):
        scan_corpus([str(path), other], ctx=16)
    # With another time it does.
    os.utime(path, ns=(stamp + 1, stamp + 1))
    with pytest.raises(BadFilesError, match="frame 49"):
        scan_corpus([str(path), other], ctx=16, checked_file=store)


@pytest.mark.parametrize(
    "store", [b"", b"{", b"[]", b"[1]", b"\xff", '{"PATH": 5}', '{"PATH": [1]}']
)
def test_a_damaged_list_of_checked_files_only_costs_time(tmp_path, store):
    path = put(tmp_path / "x.npq", npq1(some_codes(50)))
    content = store if isinstance(store, bytes) else store.replace("PATH", path).encode()
    put(tmp_path / "checked.json", content)
    corpus = scan_corpus([path], ctx=16, checked_file=tmp_path / "checked.json")
    assert corpus.summary.files == 1
    scan_corpus([path], ctx=16, checked_file=tmp_path / "checked.json")


# --- which codec made the codes ------------------------------------------------------------------


def made_by(folder, codec, count=1, **settings):
    """Files of other codes each, with records as encode_npq.py leaves them."""
    folder.mkdir(exist_ok=True)
    for _ in range(count):
        path = folder / f"{len(list(folder.glob('*.npq')))}.npq"
        codes = np.random.default_rng(list(str(path).encode())).integers(64, size=(50, 4))
        write_npq(path, codes, vocab_sizes=[64] * 4, frame_rate=86.13)
        if codec is not None:
            Records().add(path, path, codec, settings, path.stat())
    return folder


def test_codes_of_two_codecs_are_refused_and_unknown_ones_told(tmp_path):
    demo, other = CodecId("demo", "d" * 64), CodecId("44khz", "4" * 64)
    one = made_by(tmp_path / "one", demo, 2, loudness=None)
    two = made_by(tmp_path / "two", other)
    unknown = made_by(tmp_path / "unknown", None, 3)

    def summary(*folders):
        return scan_corpus(find_npq_files(folders), ctx=20).summary

    said = r"2 codecs, .*44khz \(44444444\) made 1 files, such as .*demo \(dddddddd\) made 2 files"
    with pytest.raises(BadFilesError, match=said):
        summary(one, two)
    with pytest.raises(BadFilesError, match="codes of 2 codecs"):
        summary(made_by(tmp_path / "both", demo), made_by(tmp_path / "both", other))
    known = summary(one)
    assert (known.codec, known.notes, known.warnings) == (demo, [], [])
    assert known.lines()[1] == "codec    demo (dddddddd)"
    taken = summary(unknown)
    assert (taken.codec, taken.notes, taken.warnings) == (None, [], [])
    assert taken.lines()[1] == "codec    unknown: no record of encode_npq.py beside the files"
    mixed = summary(one, unknown)
    (warning,) = mixed.warnings
    assert warning.startswith("3 of 5 files are of an unknown codec, such as ")
    assert mixed.codec == demo
    (one / ".encode_npq.jsonl").write_bytes(b"\xff\n{}\n")
    assert summary(one).codec is None


def test_a_record_follows_the_codes_and_not_the_name(tmp_path):
    demo = CodecId("demo", "d" * 64)
    folder = made_by(tmp_path / "a", demo, 2, loudness=-16)
    made_by(folder, demo, 1, loudness=None)
    (folder / "0.npq").rename(folder / "renamed.npq")
    (tmp_path / "link.npq").symlink_to(folder / "renamed.npq")
    summary = scan_corpus([str(tmp_path / "link.npq")], ctx=20).summary
    assert summary.codec == demo
    write_npq(folder / "1.npq", np.ones((50, 4), int), vocab_sizes=[64] * 4, frame_rate=86.13)
    summary = scan_corpus(find_npq_files([folder]), ctx=20).summary
    assert summary.warnings  # replaced by one of another origin
    assert summary.notes == ["encoded with different --loudness: -16, None"]
