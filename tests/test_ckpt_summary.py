"""Reading one file: hostile and broken ones cost a row; figures against slow references."""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import os
import pickle
import resource
import signal
import struct
import time
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, run_trainer
from planted_faults import cut_off, flip_a_bit, train
from torch import nn

import ckpt_child
import ckpt_measures
from ckpt_child import in_child
from ckpt_container import pickle_globals
from ckpt_optimizer import moment_bound, newton_schulz_gain
from ckpt_reader import read_summary, summarize
from ckpt_summary import Parameter, Summary, kind_of, place_of

# --- real files ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def run_folder(tunes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of two epochs with --optim adamw."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--data", tunes, "--save_dir", folder, "--epochs", "2", "--archive-every", "1"]
    flags += [*TINY, "--optim", "adamw", "--lr", "3e-3", "--pattern", "parallel"]
    code, output = run_trainer(*flags)
    assert code == 0, output
    return folder


@pytest.fixture
def good(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of its `latest`, to spoil."""
    path = tmp_path / "rvq_4cb_latest.pt"
    path.write_bytes((run_folder / "rvq_4cb_latest.pt").read_bytes())
    return path


def content_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {e.filename: archive.read(e) for e in archive.infolist()}


def write_zip(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
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


def test_a_real_checkpoint_is_described(good):
    summary = summarize(good)
    content = content_of(good)
    assert summary.problem is None
    assert summary.misfits == []
    assert (summary.style, summary.kind) == ("own", "latest")
    assert summary.step == content["progress"]["step"] > 0
    assert summary.epoch == 2
    assert summary.vocab_sizes == [64] * 4
    assert {p.name for p in summary.parameters} == set(content["model"])
    assert [p.place for p in summary.parameters] == sorted(p.place for p in summary.parameters)
    assert all(p.adam_step == summary.step and not p.bad for p in summary.parameters)
    assert summary.history == json.loads(json.dumps(content["history"]))
    assert not summary.ema_equals_raw


def test_progress_is_told_in_bytes_of_tensors(good):
    told: list[int] = []
    summarize(good, told.append)
    content = content_of(good)
    moments = content["optimizer"]["state"].values()
    tensors = [*content["model"].values(), *content["ema"].values()]
    tensors += [t for state in moments for t in state.values()]
    assert told == sorted(told)
    assert told[-1] == sum(t.numel() * t.element_size() for t in tensors)


# --- hostile pickles -----------------------------------------------------------------------------


def hostile_pickles(canary: Path) -> dict[str, bytes]:
    """Pickles that make the canary file when they are run, by every opcode that can call."""
    name = str(canary).encode()
    text = struct.pack("<I", len(name)) + name
    touch = b"X" + text + b"\x85R."  # ( canary, ) REDUCE

    def unicode(word: str) -> bytes:
        return b"\x8c" + bytes([len(word)]) + word.encode()

    command = f"touch {canary}".encode()
    run = b"X" + struct.pack("<I", len(command)) + command

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
        "GLOBAL of builtins": b"\x80\x02cbuiltins\nexec\nX"
        + struct.pack("<I", len(name) + 18)
        + b"open('" + name + b"','w').close"[:11] + b"()" + b"\x85R.",
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
        "os.remove": b"\x80\x02cos\nremove\n" + touch,
        "attribute of a safe module": b"\x80\x04" + unicode("torch") + unicode("load") + b"\x93"
        + run + b"\x85R.",
        "dotted name": b"\x80\x04" + unicode("collections") + unicode("OrderedDict.__init__")
        + b"\x93" + run + b"\x85R.",
        "unsafe after STOP": pickle.dumps({"model": {}}) + b"cos\nsystem\n" + run + b"\x85R.",
    }  # fmt: skip


NAMES = sorted(hostile_pickles(Path("x")))


@pytest.mark.parametrize("name", NAMES)
def test_no_pickle_is_run(name, good, tmp_path):
    canary = tmp_path / "canary"
    data = hostile_pickles(canary)[name]
    with_pickle(good, data)
    problem = problem_of(good)
    assert not canary.exists()
    if name not in ("unsafe after STOP",):  # nobody reads on after STOP
        assert problem.startswith("unsafe"), problem


@pytest.mark.parametrize("name", NAMES)
def test_the_canary_would_have_sung(name, tmp_path):
    """The files above are a danger: pickle itself runs most of them."""
    harmless = ("EXT", "BUILD", "os.remove", "attribute of a safe module", "dotted name")
    if name in (*harmless, "unsafe after STOP", "GLOBAL of builtins", "DUP"):
        pytest.skip("refused by pickle, or no call that writes")
    canary = tmp_path / "canary"
    pickle.loads(hostile_pickles(canary)[name])
    assert canary.exists()


def test_names_are_read_off_the_opcodes_as_pickle_would():
    class Probe(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found.append(f"{module}.{name}")
            return super().find_class(module, name)

    values = (OrderedDict(a=1), argparse.Namespace(a=1), nn.Linear(1, 1), Path("a"), {1: print})
    for value in values:
        for protocol in range(6):
            found: list[str] = []
            data = pickle.dumps(value, protocol)
            Probe(io.BytesIO(data)).load()
            assert set(found) <= set(pickle_globals(data)), protocol


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
        write_zip_of_pairs(good, [*others, *((name, data) for data in pair)])
        problem_of(good)
        assert not canary.exists()


def write_zip_of_pairs(path: Path, entries: list[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            archive.writestr(name, data)


# --- containers that are not what they seem ------------------------------------------------------


@pytest.mark.slow
def test_compressed_entries_are_refused_at_once(good):
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join(bomb.compress(bytes(1 << 24)) for _ in range(64)) + bomb.flush()
    entries = entries_of(good)
    name = next(n for n in entries if "/data/" in n)
    write_zip(good, entries | {name: b""})
    with zipfile.ZipFile(good, "w", zipfile.ZIP_DEFLATED) as archive:
        for other, data in entries.items():
            archive.writestr(other, data if other != name else bytes(1 << 26))
    assert len(packed) < 2 << 20
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


def spoil_pickle(good: Path, change: Any) -> Path:
    """A file whose pickle is rebuilt with other arguments for its tensors."""
    entries = entries_of(good)
    name = next(n for n in entries if n.endswith("data.pkl"))
    return with_pickle(good, change(entries[name]))


def tensor_pickle(
    numel: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0
) -> bytes:
    """{"model": {"w": a tensor on storage 0 as told}} as torch.save would pickle it."""

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

    Pickler(out, protocol=2).dump({"model": {"w": Tensor()}})
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


@pytest.mark.slow
def test_shared_containers_are_not_walked_once_for_each_reference(good):
    """Forty lists, each holding the one before twice: 2^40 references when walked."""
    content = content_of(good)
    nested: list[Any] = []
    for _ in range(40):
        nested = [nested, nested]
    for key in ("flags", "history", "extra"):
        torch.save({**content, key: {"a": nested} if key == "flags" else [nested]}, good)
        started = time.monotonic()
        summarize(good)
        assert time.monotonic() - started < 20, key


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
    own: dict[str, Any] = {"model": {"w": 1}}
    own["model"]["self"] = own["model"]
    endless: list[Any] = []
    endless.append(endless)
    own["history"] = own["flags"] = endless
    summarize(with_pickle(good, pickle.dumps(own, protocol=2)))


# --- broken files --------------------------------------------------------------------------------


def test_files_that_are_no_checkpoints(tmp_path, tunes):
    path = tmp_path / "rvq_4cb_latest.pt"
    for content in (b"", b"\0", b"\0" * 5000, b"PK", b"PK\x03\x04" + bytes(99), b"hello\n" * 100,
                    b"{}", next(tunes.iterdir()).read_bytes()):  # fmt: skip
        path.write_bytes(content)
        assert problem_of(path).startswith("corrupt")
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))  # safetensors
    problem_of(path)
    write_zip(path, {"readme.txt": b"hello"})
    problem_of(path)
    write_zip(path, {})
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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(good):
    good.chmod(0)
    summary = summarize(good)
    good.chmod(0o600)
    assert summary.problem is not None


def test_names_that_are_not_text(good):
    odd = os.fsencode(good.parent) + b"/rvq_4cb_\xff\xfe\n_latest.pt"
    os.rename(good, odd)
    assert summarize(os.fsdecode(odd)).problem is None


def test_other_kinds_of_torch_files(tmp_path):
    path = tmp_path / "rvq_4cb_latest.pt"
    state = {"model": {"w": torch.ones(3)}}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert "torch < 1.6" in problem_of(path)
    torch.save(nn.Linear(2, 2), path)
    assert problem_of(path).startswith("unsafe")
    for value in (torch.ones(3), [1, 2], 7, None, {"a": 1}, {"model": torch.ones(3)}, {"model": 1}):
        torch.save(value, path)
        assert problem_of(path).startswith("foreign")


def test_torchscript_and_package_archives(tmp_path):
    path = tmp_path / "rvq_4cb_latest.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    problem_of(path)
    with torch.package.PackageExporter(str(path)) as package:
        package.save_source_string("m", "import os\n")
        package.save_pickle("model", "model.pkl", {"a": 1})
    problem_of(path)


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
        assert not summary.misfits
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


# --- odd contents --------------------------------------------------------------------------------


def save(path: Path, model: dict[str, Any], **others: Any) -> Path:
    torch.save({"model": model, "global_step": 5, **others}, path)
    return path


def test_odd_tensors_are_measured_or_passed_over(tmp_path):
    model = {
        "int": torch.arange(10),
        "bool": torch.ones(4, dtype=torch.bool),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0),
        "empty rows": torch.empty(0, 32),
        "f16": torch.full((32, 32), 2.0, dtype=torch.float16),
        "bf16": torch.full((32, 32), 2.0, dtype=torch.bfloat16),
        "f64": torch.full((32, 32), 2.0, dtype=torch.float64),
        "f8": torch.full((32, 32), 2.0).to(torch.float8_e4m3fn),
        "parameter": nn.Parameter(torch.full((32, 32), 2.0)),
        "grad": torch.full((32, 32), 2.0, requires_grad=True),
        "view": torch.full((64, 64), 2.0)[::2, ::2],
        "transposed": torch.full((16, 64), 2.0).T,
        "expanded": torch.full((1,), 2.0).expand(4),
        "text": "hello",
        "number": 7,
        "none": None,
        "list": [torch.ones(3)],
        5: torch.ones(3),
    }
    summary = summarize(save(tmp_path / "rvq_4cb_latest.pt", model))
    assert summary.problem is None, summary.problem
    found = {p.name: p for p in summary.parameters}
    for name in ("f16", "bf16", "f64", "f8", "parameter", "grad", "view", "transposed"):
        assert found[name].rms == 2.0, name
        assert found[name].bad == {}
    assert found["scalar"].rms == 3.0


@pytest.mark.parametrize("kind", ["complex", "sparse", "quantised", "meta", "csr"])
def test_odder_tensors_cost_no_more_than_the_row(kind, tmp_path):
    odd = {
        "complex": lambda: torch.ones(8, dtype=torch.complex64),
        "sparse": lambda: torch.eye(8).to_sparse(),
        "quantised": lambda: torch.quantize_per_tensor(torch.ones(8), 0.1, 0, torch.qint8),
        "meta": lambda: torch.empty(8, device="meta"),
        "csr": lambda: torch.eye(8).to_sparse_csr(),
    }[kind]()
    summary = summarize(save(tmp_path / "rvq_4cb_latest.pt", {"odd": odd, "w": torch.ones(9)}))
    assert summary.problem or any(p.name == "w" for p in summary.parameters)


def test_float8_and_half_with_bad_values(tmp_path):
    weight = torch.ones(20, 20, dtype=torch.float16)
    weight[0, 0], weight[1, 1], weight[2, 2] = math.inf, -math.inf, math.nan
    summary = summarize(save(tmp_path / "a.pt", {"w": weight}))
    assert summary.parameters[0].bad == {"raw": 3}
    assert summary.parameters[0].rms == pytest.approx(math.sqrt(397 / 400))


ODD_FIELDS = {
    "progress": [1, 2],
    "flags": "text",
    "architecture": {"vocab_sizes": "abc", "d_model": -5},
    "history": {"a": 1},
    "optimizer": {"state": [1], "param_groups": {"a": 1}},
    "scaler": 7,
    "saved_at": {"x": torch.ones(2)},
    "ema": [torch.ones(2)],
    "guard": None,
}


@pytest.mark.parametrize("key", ODD_FIELDS)
def test_fields_of_the_wrong_kind_cost_no_more_than_the_row(key, good):
    content = content_of(good)
    content[key] = ODD_FIELDS[key]
    torch.save(content, good)
    summary = summarize(good)
    assert summary.problem or summary.misfits or key in ("saved_at", "history", "scaler", "guard")
    if summary.problem is None:
        assert len(summary.parameters) == len(content["model"])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda o: o.update(param_groups=[]),
        lambda o: o.update(param_groups=[1, 2]),
        lambda o: o["param_groups"][0].update(betas=(0.9,)),
        lambda o: o["param_groups"][0].update(betas="ab"),
        lambda o: o["param_groups"][0].update(betas=(0.999, 0.9)),
        lambda o: o["param_groups"][0].update(betas=(1.0, 1.0)),
        lambda o: o["param_groups"][0].update(params=5),
        lambda o: o["param_groups"][0].update(param_names=None),
        lambda o: o["param_groups"][0].update(lr=None),
        lambda o: o["param_groups"][0].update(lr=torch.tensor(1e-3)),
        lambda o: o["param_groups"][0].pop("lr"),
        lambda o: o["param_groups"][0].pop("eps"),
        lambda o: o["state"].update({0: None}),
        lambda o: o["state"][0].update(exp_avg=None),
        lambda o: o["state"][0].update(exp_avg=torch.ones(3)),
        lambda o: o["state"][0].update(exp_avg=torch.arange(3)),
        lambda o: o["state"][0].update(step=7),
        lambda o: o["state"][0].update(step=torch.tensor(math.inf)),
        lambda o: o["state"][0].update(step=torch.tensor(-4.0)),
        lambda o: o["state"][0].update(step=torch.ones(5)),
        lambda o: o["state"][0].pop("exp_avg_sq"),
        lambda o: o["state"][0].update(max_exp_avg_sq=3.0),
    ],
)  # fmt: skip
def test_odd_optimizers_cost_no_more_than_the_row(spoil, good):
    content = content_of(good)
    content["optimizer"] = copy.deepcopy(content["optimizer"])
    spoil(content["optimizer"])
    torch.save(content, good)
    summary = summarize(good)
    assert summary.problem is None, summary.problem
    assert len(summary.parameters) == len(content["model"])


@pytest.mark.slow
def test_a_huge_history_is_read(good):
    content = content_of(good)
    row = {"event": "step", "step": 1, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5}
    content["history"] = [{**row, "step": i} for i in range(50_000)]
    torch.save(content, good)
    summary = summarize(good)
    assert summary.problem is None
    assert len(summary.history) == 50_000


def test_keys_and_shapes_that_do_not_fit(good):
    original = content_of(good)

    def misfits(change: Any) -> str:
        content = dict(original, model=dict(original["model"]))
        change(content)
        torch.save(content, good)
        return "; ".join(summarize(good).misfits)

    name = "blocks.0.attn.qkv.weight"
    assert misfits(lambda c: None) == ""
    assert name in misfits(lambda c: c["model"].pop(name))
    assert name in misfits(lambda c: c["model"].update({name: c["model"][name].T}))
    assert "extra" in misfits(lambda c: c["model"].update(extra=torch.ones(3)))
    assert "`rng`" in misfits(lambda c: c.pop("rng"))
    assert "optimizer" in misfits(lambda c: c.pop("optimizer"))
    assert "EMA" in misfits(lambda c: c.update(ema={name: torch.ones(3)}))
    assert "scaler" in misfits(lambda c: c.pop("scaler"))


def test_names_of_a_compiled_module(tmp_path):
    weights = {f"_orig_mod.blocks.{i}.attn.qkv.weight": torch.randn(96, 32) for i in range(2)}
    summary = summarize(save(tmp_path / "rvq_4cb_latest.pt", weights))
    assert "_orig_mod." in "; ".join(summary.misfits)
    assert [p.place.layer for p in summary.parameters] == [0, 1]


# --- checkpoints of the script before this project -----------------------------------------------


class OldBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.Module()
        self.attn.qkv, self.attn.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.attn.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(self.norm2(x))


class OldModel(nn.Module):
    def __init__(self, sizes: list[int], width: int = 32, ctx: int = 16) -> None:
        super().__init__()
        self.embeds = nn.ModuleList(nn.Embedding(v, width) for v in sizes)
        self.bos = nn.Parameter(torch.zeros(width))
        self.pos = nn.Embedding(ctx, width)
        self.blocks = nn.ModuleList(OldBlock(width) for _ in range(2))
        self.ln_f = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, v) for v in sizes)

    def forward(self, codes: torch.Tensor) -> list[torch.Tensor]:
        x = sum(e(codes[..., k]) for k, e in enumerate(self.embeds))
        x = torch.cat((self.bos.expand(len(codes), 1, -1), x[:, :-1]), 1)
        x = x + self.pos(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return [head(self.ln_f(x)) for head in self.heads]


def old_checkpoint(steps: int = 30, *, namespace: bool = False, numpy: bool = False) -> Any:
    """What the older script saved, from a real training of its kind of model."""
    torch.manual_seed(0)
    sizes = [40, 40, 40]
    model = OldModel(sizes)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    codes = torch.randint(40, (16, 16, 3))
    for _ in range(steps):
        losses = [
            nn.functional.cross_entropy(logits.flatten(0, 1), codes[..., k].flatten())
            for k, logits in enumerate(model(codes))
        ]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 0.1)
    cfg: Any = {"d_model": 32, "heads": 4, "layers": 2, "lr": 2e-3, "epochs": 300, "amp": True}
    best = float(torch.stack(losses).mean())
    return {
        "model": model.state_dict(),
        "opt": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "scheduler": scheduler.state_dict(),
        "epoch": 12,
        "best_val": np.float64(best) if numpy else best,
        "cfg": argparse.Namespace(**cfg) if namespace else cfg,
        "vocab_sizes": sizes,
        "global_step": np.int64(steps) if numpy else steps,
        "saved_at": "2025-08-01 10:11:12",
        "ema": average.state_dict(),
    }


@pytest.mark.parametrize("namespace", [False, True])
@pytest.mark.parametrize("numpy", [False, True])
def test_an_old_checkpoint_is_described(namespace, numpy, tmp_path):
    path = tmp_path / "rvq_3cb_epoch_e0012__20250801-101112.pt"
    content = old_checkpoint(namespace=namespace, numpy=numpy)
    torch.save(content, path)
    summary = summarize(path)
    assert summary.problem is None, summary.problem
    assert (summary.style, summary.kind, summary.name_epoch) == ("old", "archive", 12)
    assert (summary.step, summary.epoch) == (30, 12)
    assert summary.best_val == pytest.approx(float(content["best_val"]))
    assert summary.vocab_sizes == [40] * 3
    assert summary.flags["d_model"] == 32
    assert summary.misfits == []
    assert summary.optimizer["lr"] == content["opt"]["param_groups"][0]["lr"]
    assert summary.scale == 65536.0
    found = {p.name: p for p in summary.parameters}
    assert set(found) == set(content["model"])
    for i, name in enumerate(name for name, _ in OldModel([40] * 3).named_parameters()):
        state = content["opt"]["state"][i]
        assert found[name].adam_step == 30
        assert found[name].m_rms == pytest.approx(float(state["exp_avg"].square().mean().sqrt()))
        assert found[name].m_over_bound == 0
    assert [r.codebook for r in found["heads.2.weight"].rows] == [2]
    assert len(found["blocks.0.attn.qkv.weight"].logit_bounds) == 4


def test_an_old_checkpoint_with_other_things_left_out(tmp_path):
    for key in ("opt", "scaler", "scheduler", "epoch", "best_val", "cfg", "vocab_sizes", "ema",
                "global_step", "saved_at"):  # fmt: skip
        content = old_checkpoint(2)
        del content[key]
        path = tmp_path / f"without_{key}.pt"
        torch.save(content, path)
        summary = summarize(path)
        assert summary.problem is None, (key, summary.problem)
        assert len(summary.parameters) == len(content["model"]), key


def test_old_names_sort_as_a_forward_pass_meets_them():
    order = [
        "embeds.0.weight", "embeds.1.weight", "bos", "pos.weight", "blocks.0.norm1.weight",
        "blocks.0.attn.qkv.weight", "blocks.0.attn.out.weight", "blocks.0.norm2.weight",
        "blocks.0.mlp.0.weight", "blocks.0.mlp.3.weight", "blocks.1.norm1.weight",
        "blocks.10.norm1.weight", "ln_f.weight", "heads.0.weight", "heads.10.weight",
    ]  # fmt: skip
    backwards = order[::-1]
    assert sorted(backwards, key=place_of) == order
    assert place_of("_orig_mod." + order[5]) == place_of(order[5])


def test_names_of_a_depth_transformer_and_unknown_ones():
    names = [
        *("blocks.0.mlp.down.weight", "norm.weight", "depth.embed.weight", "depth.proj.weight"),
        *("depth.blocks.0.attn.qkv.weight", "depth.blocks.1.norm1.weight", "depth.norm.weight"),
        *("head.weight", "lag"),
    ]
    places = [place_of(n) for n in names]
    assert [p.stage for p in places] == sorted(p.stage for p in places)
    assert places[4] < places[5] < places[6] < places[7] < places[8]
    assert places[4].role == "depth.attn.qkv"
    assert places[7].role == "head"
    for odd in ("depth", "depth.", "depth.depth.depth", "blocks.x", "depth.blocks..weight", ""):
        place_of(odd)


def test_kinds_by_name():
    assert kind_of("a/rvq_9cb_latest.pt") == ("latest", None)
    assert kind_of("rvq_9cb_x_best_e0012__20250801-101112.pt") == ("best archive", 12)
    assert kind_of("rvq_9cb_epoch_e0355__20250801-101112-2.pt") == ("archive", 355)
    assert kind_of("rvq_9cb_best.pt") == ("best", None)
    assert kind_of("rvq_9cb_panic_s00000012.pt") == ("panic", None)
    assert kind_of("model.pt") == ("other", None)


# --- figures against slow references -------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(run_folder: Path) -> tuple[dict[str, Any], dict[str, Parameter], dict[str, Any]]:
    path = run_folder / "rvq_4cb_latest.pt"
    content = content_of(path)
    states = {}
    for group in content["optimizer"]["param_groups"]:
        for name, number in zip(group["param_names"], group["params"], strict=True):
            states[name] = content["optimizer"]["state"][number]
    return content, {p.name: p for p in summarize(path).parameters}, states


def rms(tensor: torch.Tensor) -> float:
    values = tensor.flatten().double().tolist()
    return math.sqrt(math.fsum(x * x for x in values) / len(values))


def test_sizes_and_distances(measured):
    content, found, states = measured
    for name, weight in content["model"].items():
        p, state = found[name], states[name]
        assert p.rms == pytest.approx(rms(weight))
        assert p.largest == pytest.approx(float(weight.abs().max()))
        assert p.ema_rms == pytest.approx(rms(content["ema"][name]))
        difference = weight.double() - content["ema"][name].double()
        assert p.ema_distance == pytest.approx(rms(difference))
        assert p.m_rms == pytest.approx(rms(state["exp_avg"]))
        assert p.v_root == pytest.approx(math.sqrt(float(state["exp_avg_sq"].double().mean())))
        assert p.shape == list(weight.shape)


def test_adams_step_is_the_one_that_the_optimizer_takes(measured):
    """Against torch's own AdamW: one more step with a gradient that leaves m / sqrt(v) alone."""
    content, found, states = measured
    for name, p in found.items():
        state = {k: v.clone() for k, v in states[name].items()}
        weight = nn.Parameter(content["model"][name].double())
        m, v = state["exp_avg"].double(), state["exp_avg_sq"].double()
        t = float(state["step"])
        u = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        assert p.update_rms == pytest.approx(rms(u), rel=1e-6)
        optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
        # After a step with gradient g: 0.9 m' + 0.1 g = m and 0.95 v' + 0.05 g^2 = v at g = 0.
        before = {"step": torch.tensor(t - 1), "exp_avg": m / 0.9, "exp_avg_sq": v / 0.95}
        optimizer.state[weight] = before
        weight.grad = torch.zeros_like(weight)
        old = weight.detach().clone()
        optimizer.step()
        assert rms(old - weight.detach()) == pytest.approx(p.update_rms, rel=1e-6)
        d = (content["model"][name].double() - content["ema"][name].double()).flatten()
        cos = -float(d @ u.flatten()) / float(d.norm() * u.norm())
        assert p.update_cos == pytest.approx(cos, abs=1e-6)


def test_stable_rank_against_singular_values(measured, tmp_path):
    content, found, _ = measured
    for name, p in found.items():
        weight = content["model"][name]
        if weight.dim() == 2:
            s = torch.linalg.svdvals(weight.double())
            assert p.stable_rank == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=0.15)
    torch.manual_seed(0)
    low = torch.randn(64, 1) @ torch.randn(1, 48)
    summary = summarize(save(tmp_path / "a.pt", {"w": low, "z": torch.zeros(32, 32)}))
    assert summary.parameters[0].stable_rank == pytest.approx(1.0, rel=1e-4)


def test_rows_of_codebooks(measured):
    content, found, _ = measured
    for name in ("embed.weight", "head.weight"):
        tables = content["model"][name].double().unflatten(0, (4, 64))
        assert [r.codebook for r in found[name].rows] == [0, 1, 2, 3]
        for r, table in zip(found[name].rows, tables, strict=True):
            norms = [rms(row) * math.sqrt(len(row)) for row in table]
            assert r.largest == pytest.approx(max(norms), rel=1e-5)
            assert sorted(norms)[31] <= r.median * 1.00001
            assert r.median <= sorted(norms)[32] * 1.00001
            assert r.low == pytest.approx(float(np.quantile(norms, 0.05)), rel=1e-4)
            assert r.zero == 0
            mean_row = float(table.mean(0).norm())
            assert r.drift == pytest.approx(mean_row / math.sqrt(np.mean(np.square(norms))), 1e-4)


def test_bounds_of_attention_logits_hold(tmp_path):
    torch.manual_seed(0)
    qkv = torch.randn(96, 32)
    content = {"model": {"blocks.0.attn.qkv.weight": qkv}, "cfg": {"heads": 4}, "global_step": 1}
    path = tmp_path / "a.pt"
    torch.save(content, path)
    bounds = summarize(path).parameters[0].logit_bounds
    x = torch.randn(500, 32)
    x = x / x.norm(dim=1, keepdim=True)
    q, k, _ = (x @ qkv.T).unflatten(1, (3, 4, 8)).unbind(1)
    for head, bound in enumerate(bounds):
        logits = q[:, head] @ k[:, head].T / math.sqrt(8)
        assert float(logits.abs().max()) <= bound


def test_bad_values_are_counted_in_their_place(good):
    content = content_of(good)
    name = "blocks.1.mlp.up.weight"
    content["model"][name].view(-1)[[3, 70]] = math.nan
    content["ema"][name].view(-1)[5] = -math.inf
    for group in content["optimizer"]["param_groups"]:
        if name in group["param_names"]:
            number = group["params"][group["param_names"].index(name)]
    state = content["optimizer"]["state"][number]
    state["exp_avg"].view(-1)[:4] = math.inf
    state["exp_avg_sq"].view(-1)[9] = -1.0
    torch.save(content, good)
    bad = {p.name: p for p in summarize(good).parameters if p.bad or p.v_negative}
    assert bad[name].bad == {"raw": 2, "ema": 1, "m": 4}
    assert bad[name].v_negative == 1
    assert list(bad) == [name]


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.8, 0.99), (0.0, 0.9)])
def test_the_bound_on_moments_holds_and_is_tight(betas):
    b1, b2 = betas
    bound, worst = moment_bound(b1, b2), 0.0
    rng = np.random.default_rng(0)
    sequences = [rng.standard_normal(400) * rng.choice([1, 1e-3, 1e3]) for _ in range(200)]
    sequences += [rng.standard_cauchy(60) for _ in range(100)]
    sequences += [np.where(rng.random(100) < 0.05, 1.0, 0.0) for _ in range(50)]
    # Cauchy-Schwarz holds with equality for g_i in proportion to (b1 / b2)^age.
    sequences += [(b1 / b2) ** np.arange(400)[::-1] if b1 else np.array([0.0, 1.0])]
    for gradients in sequences:
        m = v = 0.0
        for g in gradients:
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            if v:
                worst = max(worst, abs(m) / math.sqrt(v))
    assert worst <= bound * (1 + 1e-9)
    assert worst > 0.999 * bound


def test_the_bound_on_moments_as_published():
    assert moment_bound(0.9, 0.95) == pytest.approx(1.165, abs=1e-3)
    assert moment_bound(0.9, 0.999) == pytest.approx(7.27, abs=1e-2)
    assert moment_bound(0.95, 0.9) == math.inf
    assert moment_bound(math.nan, 0.9) == math.inf


def test_moments_over_the_bound_are_counted_and_no_others(good):
    assert all(p.m_over_bound == 0 for p in summarize(good).parameters)
    content = content_of(good)
    state = content["optimizer"]["state"][0]
    m, v = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
    v[:7] = m[:7].abs().clamp_min(1e-6).square() / 1.3**2
    m[:7] = m[:7].sign() * m[:7].abs().clamp_min(1e-6)
    v[7:11] = m[7:11].square().clamp_min(1e-12) / 1.1**2
    expected = int((m[:7] != 0).sum())
    torch.save(content, good)
    assert sum(p.m_over_bound for p in summarize(good).parameters) == expected


def test_chunks_change_nothing(good, monkeypatch):
    whole = summarize(good).parameters
    monkeypatch.setattr(ckpt_measures, "CHUNK", 1000)
    for a, b in zip(whole, summarize(good).parameters, strict=True):
        assert a.sample == b.sample
        assert b.rms == pytest.approx(a.rms)
        assert b.update_cos == pytest.approx(a.update_cos)
        assert b.ema_distance == pytest.approx(a.ema_distance)


# --- Muon ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def muon_run(tunes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`latest` of a real run with --optim muon."""
    folder = tmp_path_factory.mktemp("muon")
    flags = ["--data", str(tunes), "--save_dir", str(folder), "--epochs", "1", *TINY]
    flags += ["--optim", "muon", "--pattern", "parallel"]
    assert train(flags, None, folder / "log") == 0
    return folder / "rvq_4cb_latest.pt"


@pytest.fixture
def muon(muon_run: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    path = tmp_path / "rvq_4cb_latest.pt"
    path.write_bytes(muon_run.read_bytes())
    return path


def muon_states(content: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """State by name of the parameters in Muon's groups."""
    groups = [g for g in content["optimizer"]["param_groups"] if "ns_steps" in g]
    states = content["optimizer"]["state"]
    return {
        n: states[i] for g in groups for i, n in zip(g["params"], g["param_names"], strict=True)
    }


def test_a_muon_checkpoint_is_described(muon):
    summary, content = summarize(muon), content_of(muon)
    states = muon_states(content)
    assert summary.problem is None
    assert summary.misfits == []
    assert summary.optimizer["method"] == "Muon + AdamW"
    assert summary.optimizer["betas"] == [0.9, 0.95]
    groups = content["optimizer"]["param_groups"]
    assert [g["lr"] for g in summary.optimizer["groups"]] == [g["lr"] for g in groups]
    base = groups[0]["lr"] / groups[0].get("lr_factor", 1.0)
    assert summary.optimizer["lr"] == pytest.approx(base)
    for p in summary.parameters:
        assert (p.optimizer == "Muon") == (p.name in states)
        if p.name in states:
            momentum, weight = states[p.name]["momentum_buffer"], content["model"][p.name]
            assert p.m_rms == pytest.approx(rms(momentum))
            assert math.isnan(p.adam_step)
            assert math.isnan(p.v_root)
            d = (weight - content["ema"][p.name]).double().flatten()
            m = momentum.double().flatten()
            assert p.update_cos == pytest.approx(-float(d @ m / d.norm() / m.norm()), abs=1e-6)
        else:
            assert p.adam_step == summary.step


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 128)])
def test_a_step_of_muon_is_as_large_as_told(adjust, shape, tmp_path):
    """Against torch's own, for gradients of every kind of spectrum."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, adjust_lr_fn=adjust)
    sizes, furthest = [], 0.0
    for power in (0.0, 0.5, 1.0, 3.0):
        u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        weight.grad = u @ torch.diag(s * torch.arange(1, len(s) + 1).float() ** -power) @ v
        optimizer.state.clear()
        before = weight.detach().clone()
        optimizer.step()
        sizes.append(rms(before - weight.detach()))
        furthest = max(furthest, float((before - weight.detach()).abs().max()))
    state = optimizer.state_dict()
    state["param_groups"][0]["param_names"] = ["w"]
    torch.save({"model": {"w": weight.detach()}, "opt": state, "global_step": 1}, tmp_path / "a.pt")
    (p,) = summarize(tmp_path / "a.pt").parameters
    assert 0.7 * p.update_rms < sizes[0] < 1.2 * p.update_rms
    assert max(sizes) < p.update_rms * newton_schulz_gain([3.4445, -4.775, 2.0315], 5)
    assert furthest < p.step_bound


def test_no_singular_value_leaves_the_iteration_above_its_gain():
    """bfloat16 rounds to 1 in 256."""
    gain = newton_schulz_gain([3.4445, -4.775, 2.0315], 5)
    assert gain == pytest.approx(1.2024, abs=1e-3)
    largest = 0.0
    for first in np.linspace(0.01, 1.0, 100):
        rest = math.sqrt(max(0.0, 1 - first * first))
        s = torch.linalg.svdvals(
            torch.optim._muon._zeropower_via_newtonschulz(
                torch.diag(torch.tensor([first, rest])), (3.4445, -4.775, 2.0315), 5, 1e-7
            ).float()
        )
        largest = max(largest, float(s[0]))
    assert 1.1 < largest < 1.02 * gain
    assert newton_schulz_gain([3.0], 5) == newton_schulz_gain([9.0, 9.0, 9.0], 20) == math.inf


def test_momentum_that_is_missing_foreign_or_not_finite(muon):
    content = content_of(muon)
    name, state = next(iter(muon_states(content).items()))
    momentum = state["momentum_buffer"]
    momentum.view(-1)[:5] = math.nan
    torch.save(content, muon)
    bad = {p.name: p.bad for p in summarize(muon).parameters if p.bad}
    assert bad == {name: {"momentum": 5}}

    state["momentum_buffer"] = momentum[1:].clone()
    torch.save(content, muon)
    assert [m for m in summarize(muon).misfits if "momentum_buffer" in m and name in m]

    del state["momentum_buffer"]
    state["exp_avg"] = torch.zeros(3)
    torch.save(content, muon)
    misfits = " ".join(summarize(muon).misfits)
    assert f"Muon has no momentum_buffer of {name}" in misfits
    assert f"Muon has a foreign exp_avg of {name}" in misfits


def test_an_optimizer_other_than_the_flags_say(muon):
    content = content_of(muon)
    content["flags"]["optim"] = "adamw"
    torch.save(content, muon)
    assert "--optim adamw, but" in " ".join(summarize(muon).misfits)


@pytest.mark.parametrize("key", ["ns_steps", "ns_coefficients", "momentum", "lr_factor", "lr"])
@pytest.mark.parametrize("value", [None, "x", 10**30, -1.0, math.nan, [1.0], 0])
def test_odd_settings_of_muon_cost_no_more_than_the_row(key, value, muon):
    content = content_of(muon)
    content["optimizer"]["param_groups"][0][key] = value
    torch.save(content, muon)
    assert summarize(muon).problem is None


# --- nothing is touched, nothing runs away -------------------------------------------------------


def state_of_folder(folder: Path) -> dict[str, Any]:
    return {
        p.name: (p.lstat().st_mtime_ns, p.lstat().st_ino, p.lstat().st_mode, p.lstat().st_size)
        for p in [folder, *folder.iterdir()]
    }


def test_the_folder_is_untouched(run_folder):
    before = state_of_folder(run_folder)
    for path in sorted(run_folder.glob("*.pt")):
        assert summarize(path).problem is None
    assert state_of_folder(run_folder) == before


def grow_memory(path: str, tell: Any) -> None:
    held = []
    while True:
        held.append(torch.empty(1 << 28, dtype=torch.uint8))  # never touched: costs nothing


def spin(path: str, tell: Any) -> None:
    while True:
        pass


def write_a_file(path: str, tell: Any) -> int:
    try:
        with open(path + ".written", "w") as file:
            file.write("x")
    except OSError:
        return 1
    return 0


def fall_over(path: str, tell: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_child_is_held_to_its_limits(good, monkeypatch):
    assert "memory" in in_child(grow_memory, str(good)).text
    assert in_child(write_a_file, str(good)) == 1
    assert "SIGKILL" in in_child(fall_over, str(good)).text
    monkeypatch.setattr(ckpt_child, "SILENCE", 0.5)
    assert "silence" in in_child(spin, str(good)).text


def peak_memory(path: str, tell: Any) -> list[int]:
    """Peak resident memory before and after a file is read, and the anonymous part now, in KB."""

    def now(field: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field))

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = now("VmRSS")
    read_summary(path, tell)
    return [before, now("VmHWM"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]


@pytest.mark.slow
def test_memory_stays_bounded_on_a_large_file(good, monkeypatch):
    """400 MB of weights, EMA and moments in tensors of 25 MB."""
    monkeypatch.setattr(ckpt_child, "_limit_this_process", lambda _: None)
    weights = {f"blocks.{i}.mlp.up.weight": torch.randn(4096, 1536) for i in range(4)}
    names = list(weights)
    optimizer = {
        "state": {
            i: {"step": torch.tensor(9.0), "exp_avg": 0.01 * torch.randn(4096, 1536),
                "exp_avg_sq": torch.rand(4096, 1536)}
            for i in range(4)
        },
        "param_groups": [{"params": list(range(4)), "param_names": names, "lr": 1e-3,
                          "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}],
    }  # fmt: skip
    ema = {n: w + 0.01 for n, w in weights.items()}
    torch.save({"model": weights, "ema": ema, "optimizer": optimizer, "global_step": 9}, good)
    assert good.stat().st_size > 400_000_000
    del weights, ema, optimizer
    before, peak, _ = in_child(peak_memory, str(good))
    print(f"{(peak - before) / 1024:.0f} MB above {before / 1024:.0f}")
    assert (peak - before) < 250 * 1024
