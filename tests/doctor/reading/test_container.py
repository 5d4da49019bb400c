"""Hostile and broken files are refused, at once, unharmed and without being run."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.planted_faults import cut_off, flip_a_bit
from torch import nn

from doctor.reading.reader import summarize
from doctor.reading.summary import Summary


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {e.filename: archive.read(e) for e in archive.infolist()}


def write_zip(path: Path, entries: Any, compression: int = zipfile.ZIP_STORED) -> None:
    """Of a dictionary, or of pairs, of which two may have one name."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items() if isinstance(entries, dict) else entries:
            archive.writestr(name, data)


def with_pickle(path: Path, data: bytes) -> Path:
    """The same checkpoint around another pickle, every CRC right."""
    entries = entries_of(path)
    name = next(n for n in entries if n.endswith("data.pkl"))
    write_zip(path, {**entries, name: data})
    return path


def problem_of(path: Path | str) -> str:
    """Why a file is refused, as "kind: text"; at once, and without a change to it."""
    before = Path(path).read_bytes() if os.path.isfile(path) else None
    started = time.monotonic()
    summary = summarize(str(path))
    assert time.monotonic() - started < 20
    assert summary.problem is not None, "it was read"
    if before is not None:
        assert Path(path).read_bytes() == before
    assert "\n" not in summary.problem.text
    return f"{summary.problem.kind}: {summary.problem.text}"


# --- hostile pickles ------------------------------------------------------------------------------


def hostile_pickles(canary: Path) -> dict[str, bytes]:
    """Pickles that make the canary file when they are run, by every opcode that can call."""

    def unicode(word: str) -> bytes:
        return b"\x8c" + bytes([len(word)]) + word.encode()

    def text(words: str) -> bytes:
        return b"X" + struct.pack("<I", len(words.encode())) + words.encode()

    name, run = str(canary).encode(), text(f"touch {canary}")

    class ByReduce:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {canary}",)

    class Deep:
        def __reduce__(self) -> Any:
            return eval, (f"open({str(canary)!r}, 'w').close()",)

    system = b"\x80\x04" + unicode("os") + unicode("system")
    memoised = b"\x80\x04" + unicode("os") + b"\x94" + unicode("system") + b"\x94" + b"00"
    return {
        "GLOBAL": b"\x80\x02cos\nsystem\n" + run + b"\x85R.",
        "GLOBAL of builtins": b"\x80\x02cbuiltins\nexec\n"
        + text(f"open({str(canary)!r}, 'w').close()") + b"\x85R.",
        "posix": b"\x80\x02cposix\nsystem\n" + run + b"\x85R.",
        "INST": b"(S'touch " + name + b"'\nios\nsystem\n.",
        "OBJ": b"\x80\x02(cos\nsystem\n" + run + b"o.",
        "STACK_GLOBAL": system + b"\x93" + run + b"\x85R.",
        "STACK_GLOBAL from the memo": memoised + b"h\x00h\x01\x93" + run + b"\x85R.",
        "STACK_GLOBAL beside safe strings": b"\x80\x04"
        + unicode("os") + unicode("system") + b"\x93" + unicode("collections")
        + unicode("OrderedDict") + b"00" + run + b"\x85R.",
        "STACK_GLOBAL with strings swapped": b"\x80\x04"
        + unicode("collections") + b"\x940" + unicode("OrderedDict") + b"\x940"
        + unicode("os") + b"\x940" + unicode("system") + b"\x940"
        + b"h\x02h\x03\x93" + run + b"\x85R.",
        "memo overwritten": b"\x80\x04"
        + unicode("os") + b"q\x000" + unicode("system") + b"q\x010"
        + b"h\x00h\x01" + unicode("collections") + b"q\x000" + unicode("OrderedDict") + b"q\x010"
        + b"\x93" + run + b"\x85R.",
        "POP between the names": b"\x80\x04"
        + unicode("os") + unicode("system") + unicode("torch") + unicode("Size") + b"00\x93" + run
        + b"\x85R.",
        "DUP": b"\x80\x04" + unicode("os") + b"2" + b"0" + unicode("system") + b"\x93" + run
        + b"\x85R.",
        "EXT": b"\x80\x02\x82\x01" + run + b"\x85R.",
        "PROTO 5": pickle.dumps({"model": {}, "x": ByReduce()}, protocol=5),
        "PROTO 0": pickle.dumps({"model": {}, "x": ByReduce()}, protocol=0),
        "eval in depth": pickle.dumps({"model": {"a": [[[Deep()]]]}}),
        "BUILD": b"\x80\x02cos\nsystem\n}X\x01\x00\x00\x00aX\x01\x00\x00\x00bsb.",
        "os.mkdir": b"\x80\x02cos\nmkdir\n" + text(str(canary)) + b"\x85R.",
        "attribute of a safe module": b"\x80\x04" + unicode("torch") + unicode("save") + b"\x93N"
        + text(str(canary)) + b"\x86R.",
        "dotted name": b"\x80\x04" + unicode("torch") + unicode("os.system")
        + b"\x93" + run + b"\x85R.",
        "unsafe after STOP": pickle.dumps({"model": {}}) + b"cos\nsystem\n" + run + b"\x85R.",
    }  # fmt: skip


NAMES = sorted(hostile_pickles(Path("x")))
SILENT = ("BUILD", "EXT", "unsafe after STOP")  # for pickle too: no such registry, nothing to set


@pytest.mark.parametrize("name", NAMES)
def test_no_pickle_is_run(name, good, tmp_path):
    canary = tmp_path / "canary"
    data = hostile_pickles(canary)[name]
    with_pickle(good, data)
    problem = problem_of(good)
    assert not canary.exists()
    if name not in ("unsafe after STOP",):  # nobody reads on after STOP
        assert problem.startswith("unsafe"), problem


@pytest.mark.parametrize("name", sorted({*NAMES} - {*SILENT}))
def test_the_canary_would_have_sung(name, tmp_path):
    """The files above are a danger: pickle itself runs them."""
    canary = tmp_path / "canary"
    pickle.loads(hostile_pickles(canary)[name])
    assert canary.exists()


def test_more_than_one_pickle_or_a_nested_archive(good, tmp_path):
    canary = tmp_path / "canary"
    entries = entries_of(good)
    folder = next(iter(entries)).split("/")[0]
    bad = hostile_pickles(canary)["GLOBAL"]
    for name in ("other.pkl", f"{folder}/code.pkl", f"{folder}/data.pkl/data.pkl"):
        write_zip(good, {**entries, name: bad})
        assert problem_of(good).startswith("unsafe")
    write_zip(good, {**entries, f"{folder}/inner.zip": good.read_bytes()})
    summarize(good)
    assert not canary.exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name(good, tmp_path):
    """Readers differ in which of the two they take."""
    canary = tmp_path / "canary"
    entries = entries_of(good)
    name = next(n for n in entries if n.endswith("data.pkl"))
    bad = hostile_pickles(canary)["GLOBAL"]
    others = [(n, data) for n, data in entries.items() if n != name]
    for pair in ((entries[name], bad), (bad, entries[name])):
        write_zip(good, [*others, *((name, data) for data in pair)])
        problem_of(good)
        assert not canary.exists()


# --- containers that are not what they seem -------------------------------------------------------


@pytest.mark.slow
def test_compressed_entries_are_refused_at_once(good):
    """A quarter of a gigabyte of zeros in less than a megabyte."""
    entries = entries_of(good)
    name = next(n for n in entries if "/data/" in n)
    write_zip(good, {**entries, name: bytes(1 << 28)}, zipfile.ZIP_DEFLATED)
    assert good.stat().st_size < 1 << 20
    started = time.monotonic()
    assert "compressed" in problem_of(good)
    assert time.monotonic() - started < 2


def test_sizes_that_the_directory_claims(good):
    """10 GB in a directory entry of a file of a few hundred KB."""
    data = bytearray(good.read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        for offset in (20, 24):
            data[at + offset : at + offset + 4] = struct.pack("<I", 0xF0000000)
        at = data.find(b"PK\x01\x02", at + 4)
    good.write_bytes(data)
    problem_of(good)


def tensor_pickle(
    numel: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0
) -> bytes:
    """A checkpoint of the older script, of one tensor on storage 0 as told, as torch.save's."""

    class Storage:
        pass

    out = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", numel)
            return None

    class Tensor:
        def __reduce__(self) -> Any:
            arguments = (Storage(), offset, shape, stride, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    Pickler(out, protocol=2).dump({"model": {"w": Tensor()}, "global_step": 1, "vocab_sizes": [8]})
    return out.getvalue()


@pytest.mark.parametrize(
    ("numel", "shape", "stride", "offset"),
    [
        (1 << 40, (1 << 40,), (1,), 0),
        (1000, (1000,), (1,), 0),
        (64, (1 << 20, 1 << 20), (0, 0), 0),
        (64, (8, 8), (1 << 40, 1), 0),
        (64, (8,), (1,), 1 << 40),
        (64, (8,), (1,), 60),
        (64, (8, 8), (8, -1), 0),
        (64, (8,), (1,), -8),
        (64, (-1,), (1,), 0),
        (-1, (8,), (1,), 0),
    ],
    ids=["huge", "more than stored", "expanded", "far stride", "far offset", "over the end",
         "negative stride", "negative offset", "negative shape", "negative storage"],
)  # fmt: skip
def test_tensors_that_claim_what_is_not_there(numel, shape, stride, offset, tmp_path):
    path = tmp_path / "rvq_4cb_latest.pt"
    torch.save({"model": {"w": torch.zeros(64)}}, path)
    with_pickle(path, tensor_pickle(numel, shape, stride, offset))
    problem_of(path)


def test_the_forged_tensors_read_well_when_they_are_honest(tmp_path):
    path = tmp_path / "rvq_4cb_latest.pt"
    torch.save({"model": {"w": torch.arange(64.0)}}, path)
    with_pickle(path, tensor_pickle(64, (4, 8), (8, 1), 16))
    summary = summarize(path)
    assert summary.problem is None
    assert summary.parameters[0].largest == 47


def test_pickles_that_eat_memory_or_never_end(good, tmp_path):
    nested = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    bombs = {
        "deep": nested,
        "long string": b"\x80\x02X\xff\xff\xff\x7f" + b"a" * 100 + b".",
        "long int": b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\x01" * 100 + b".",
        "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        "decimal": b"\x80\x02I" + b"9" * 4000 + b"\n.",
    }
    original = good.read_bytes()
    for data in bombs.values():
        good.write_bytes(original)
        problem_of(with_pickle(good, data))


def copying_bomb(name: bytes, argument: bytes, copies: int) -> bytes:
    """A pickle that calls a harmless type on one long argument over and over."""
    call = b"h\x00h\x01R"
    return b"\x80\x02](c" + name + b"q\x00" + argument + b"\x85q\x01" + call * copies + b"e."


@pytest.mark.slow
def test_calls_of_harmless_types_cannot_fill_the_memory(good):
    numbers = b"(" + b"K\x01" * 50_000 + b"t"
    pairs = b"](" + b"".join(b"M" + struct.pack("<H", i) + b"N\x86" for i in range(20_000)) + b"e"
    for name, argument in ((b"torch\nSize\n", numbers), (b"collections\nOrderedDict\n", pairs)):
        with_pickle(good, copying_bomb(name, argument, 100_000))
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        problem_of(good)
        after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        assert max(after, before) < 3 << 20, "KB of resident memory"


def test_containers_that_hold_themselves(good):
    own: dict[str, Any] = {"format": "rvq-checkpoint", "model": {"w": 1}}
    own["model"]["self"] = own["model"]
    endless: list[Any] = []
    endless.append(endless)
    own["history"] = own["flags"] = endless
    mismatches = summarize(with_pickle(good, pickle.dumps(own, protocol=2))).mismatches
    assert "raw self is no tensor" in mismatches
    assert "`flags`: expected a dictionary, found list" in mismatches


# --- broken files ---------------------------------------------------------------------------------


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "rvq_4cb_latest.pt"
    for content in (b"", b"\0", b"\0" * 5000, b"PK", b"PK\x03\x04" + bytes(99), b"hello\n" * 100,
                    b"{}"):  # fmt: skip
        path.write_bytes(content)
        assert problem_of(path).startswith("corrupt")
    for entries in ({"readme.txt": b"hello"}, {}):
        write_zip(path, entries)
        problem_of(path)


def test_things_that_are_no_files(tmp_path):
    missing, folder, pipe, link = (tmp_path / n for n in ("a.pt", "b.pt", "c.pt", "d.pt"))
    folder.mkdir()
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "nowhere")
    loop = tmp_path / "e.pt"
    loop.symlink_to(loop)
    for path in (missing, folder, pipe, link, loop, Path("/dev/zero"), Path("/dev/null")):
        started = time.monotonic()
        problem_of(path)
        assert time.monotonic() - started < 3


def test_a_file_without_permission(good, monkeypatch):
    good.chmod(0)
    good.parent.chmod(0o711)
    monkeypatch.chdir(good.parent)  # the folders above are private
    if os.geteuid() == 0:  # root may read everything; this is another user's process
        os.seteuid(65_534)
    try:
        summary = summarize(good.name)
    finally:
        os.seteuid(os.getuid())
    assert summary.problem is not None
    assert "Permission denied" in summary.problem.text


def test_names_that_are_not_text(good):
    odd = os.fsencode(good.parent) + b"/rvq_4cb_\xff\xfe\n_latest.pt"
    os.rename(good, odd)
    assert summarize(os.fsdecode(odd)).problem is None


def test_other_kinds_of_torch_files(tmp_path):
    path = tmp_path / "rvq_4cb_latest.pt"
    torch.save(nn.Linear(2, 2), path)
    assert problem_of(path).startswith("unsafe")
    for value in (torch.ones(3), [1, 2], 7, None, {"a": 1}, {"model": torch.ones(3)}, {"model": 1}):
        torch.save(value, path)
        assert problem_of(path).startswith("foreign")


def test_truncated_at_many_lengths(good):
    whole = good.read_bytes()
    rng = np.random.default_rng(0)
    for length in [0, 1, 3, 4, 30, len(whole) - 1, len(whole) - 22, len(whole) - 23,
                   *map(int, rng.integers(len(whole), size=15))]:  # fmt: skip
        good.write_bytes(whole[:length])
        assert problem_of(good).startswith("corrupt"), length
    good.write_bytes(cut_off(whole, rng))
    problem_of(good)


def assert_harmless(good: Path, spoiled: bytes, before: Summary) -> bool:
    """A spoiled file is refused, or reads as before; whether it was refused."""
    good.write_bytes(spoiled)
    summary = summarize(good)
    if summary.problem is None:
        assert not summary.mismatches
        assert [p.sample for p in summary.parameters] == [p.sample for p in before.parameters]
        assert [repr(p) for p in summary.parameters] == [repr(p) for p in before.parameters]
    return summary.problem is not None


def test_single_bits_flipped(good):
    whole, before = good.read_bytes(), summarize(good)
    rng = np.random.default_rng(1)
    refused = sum(assert_harmless(good, flip_a_bit(whole, rng), before) for _ in range(25))
    assert refused >= 20  # the rest hit padding and time stamps


@pytest.mark.slow
def test_many_single_bits_flipped(good):
    whole, before = good.read_bytes(), summarize(good)
    rng = np.random.default_rng(2)
    refused = sum(assert_harmless(good, flip_a_bit(whole, rng), before) for _ in range(400))
    at = whole.find(b"PK\x01\x02")
    for _ in range(400):  # in the directory at the end, and in the first header with the pickle
        spoiled = bytearray(whole)
        where = int(rng.integers(at, len(whole)) if rng.random() < 0.7 else rng.integers(2000))
        spoiled[where] ^= 1 << int(rng.integers(8))
        assert_harmless(good, bytes(spoiled), before)
    assert refused > 350
