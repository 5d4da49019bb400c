"""Weights to share: what comes back, what is never told, what a damaged or hostile file can do."""

from __future__ import annotations

import copy
import json
import os
import random
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
from kit import processes
from kit.checkpoints import assert_same_tensors
from kit.trainer import ROOT, TINY, run_trainer, train, wait_for
from safetensors.torch import load_file, save_file

from model import CodesTransformer, ModelConfig
from run_folder import shared_weights as sharing
from run_folder.checkpoint import WEIGHTS_KEYS, CheckpointError, load_checkpoint
from run_folder.flags import names
from run_folder.shared_weights import (
    FORMAT,
    SHARED_KEYS,
    export_weights,
    load_parts,
    model_card,
)
from train_rvq import build_parser

SMALL = {  # the least that can be shared
    "ema": {"bos": torch.arange(8.0), "embed.weight": torch.ones(64, 8)},
    "architecture": {"vocab_sizes": [16, 16, 16, 16], "d_model": 8, "layers": 1, "heads": 2},
    "data": {"frame_rate": 86.13, "side_codebooks": 0},
    "flags": {"ctx": 32},
    "progress": {"step": 5, "epoch": 1, "best_val": float("inf"), "best_epoch": 0},
}


@pytest.fixture(scope="module")
def best(tunes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Best checkpoint of a short run."""
    save_dir = tmp_path_factory.mktemp("a_folder_of_mine")
    train("--data", tunes, "--save_dir", save_dir, "--epochs", "1", "--tag", "secret_tag")
    return save_dir / "rvq_4cb_secret_tag_best.pt"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return export(SMALL, tmp_path / "small.safetensors")


def export(checkpoint, path: Path, said: list[str] | None = None) -> Path:
    return export_weights(checkpoint, path, tell=[].append if said is None else said.append)


def forged(path: Path, weights=None, **texts: str | None) -> Path:
    """SMALL with other metadata, None for none, and the checksum that belongs to it."""
    metadata = sharing._metadata_of(SMALL)
    metadata = {k: v for k, v in {**metadata, **texts}.items() if v is not None}
    weights = SMALL["ema"] if weights is None else weights
    if "sha256" not in texts:
        metadata["sha256"] = sharing._digest(metadata, weights)
    save_file(weights, path, metadata)
    return path


# --- there and back ------------------------------------------------------------------------------


def test_weights_and_all_that_sampling_needs_come_back(best, tmp_path):
    checkpoint = load_checkpoint(best)
    parts = load_parts(export(checkpoint, tmp_path / "x.safetensors"), needed=SHARED_KEYS)
    assert_same_tensors(parts["ema"], dict(checkpoint["ema"]))
    assert parts["architecture"] == checkpoint["architecture"]
    for name in ("ctx", "amp", "lr", "cb_weights"):
        assert parts["flags"][name] == checkpoint["flags"][name]
    assert parts["data"]["frame_rate"] == checkpoint["data"]["frame_rate"]
    assert parts["progress"]["val"] == parts["progress"]["best_val"] > 0
    model = CodesTransformer(ModelConfig.from_dict(parts["architecture"]))
    model.load_state_dict(parts["ema"], strict=True)


def test_labels_are_on_the_card_and_come_back(tmp_path):
    names = ["Earth, Wind", "a|b"]
    checkpoint = {**SMALL, "architecture": {**SMALL["architecture"], "labels": names}}
    path = export(checkpoint, tmp_path / "x.safetensors")
    assert load_parts(path, needed=SHARED_KEYS)["architecture"]["labels"] == names
    card = path.with_suffix(".md").read_text()
    assert r"| labels | Earth, Wind, a\|b |" in card
    assert "--codec 44khz --label 'Earth, Wind' --out song.wav" in card
    assert "--labels labels.csv" in card
    assert "label" not in model_card(SMALL, "x.safetensors").replace("label-", "")


@pytest.mark.parametrize("labels", [["a", "a"], [""], ["a\n"], [1], "ab", ["x"] * 9 + ["y"], {}])
def test_odd_labels_are_refused(labels, tmp_path):
    text = json.dumps({**SMALL["architecture"], "labels": labels})
    with pytest.raises(CheckpointError, match="expected labels a list of different names"):
        load_parts(forged(tmp_path / "x.safetensors", architecture=text), needed=SHARED_KEYS)
    many = json.dumps({**SMALL["architecture"], "labels": [str(i) for i in range(1000)]})
    with pytest.raises(CheckpointError, match="its architecture takes 8000 weights or more"):
        load_parts(forged(tmp_path / "y.safetensors", architecture=many), needed=SHARED_KEYS)


def test_one_function_opens_checkpoints_too(best):
    checkpoint = load_checkpoint(best)
    assert_same_tensors(load_parts(best, needed=WEIGHTS_KEYS)["ema"], checkpoint["ema"])


def test_the_file_is_one_of_the_format_and_may_be_read_by_all(shared):
    assert_same_tensors(load_file(shared), SMALL["ema"])
    mask = os.umask(0)
    os.umask(mask)
    assert shared.stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_is_of_this_machine_or_person_is_not_told(best, tmp_path):
    checkpoint = load_checkpoint(best)
    for name in ("eval_dac_repo", "val_list", "init_from", "eval_outdir"):
        checkpoint["flags"][name] = "/home/me/a_folder_of_mine/weights.pth"
    export(checkpoint, tmp_path / "x.safetensors")
    told = (tmp_path / "x.safetensors").read_bytes() + (tmp_path / "x.md").read_bytes()
    for secret in (b"a_folder_of_mine", b"secret_tag", b"weights.pth", b"/home", b"tunes"):
        assert secret not in told
    flags = load_parts(tmp_path / "x.safetensors", needed=SHARED_KEYS)["flags"]
    assert set(flags) <= set(names("run", "architecture")) - {"eval_dac_repo"}


def test_a_codec_is_told_by_its_name():
    assert sharing.shared_flags({"eval_dac_repo": "demo"}) == {"eval_dac_repo": "demo"}
    assert sharing.shared_flags({"eval_dac_repo": "weights.pth"}) == {}


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    checkpoint = copy.deepcopy(SMALL)
    checkpoint["ema"]["bos"][3] = float("nan")
    with pytest.raises(CheckpointError, match="1 tensors are not finite, first bos; export an old"):
        export(checkpoint, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(small_disk):
    path = export(SMALL, small_disk("1m") / "x.safetensors")
    large = {**SMALL, "ema": {"embed.weight": torch.ones(500_000)}}
    with pytest.raises(OSError, match="No space"):
        export(large, path)
    assert_same_tensors(load_parts(path, needed=WEIGHTS_KEYS)["ema"], SMALL["ema"])
    assert sorted(p.name for p in path.parent.iterdir()) == ["x.md", "x.safetensors"]


def test_a_name_may_have_the_full_length_of_a_name(tmp_path):
    path = export(SMALL, tmp_path / f"{'x' * 243}.safetensors")
    assert_same_tensors(load_parts(path, needed=WEIGHTS_KEYS)["ema"], SMALL["ema"])


def test_a_kill_while_writing_leaves_a_whole_file(tmp_path):
    path = tmp_path / "x.safetensors"
    paths = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
    script = (
        f"import sys; sys.path[:0] = {paths!r}\n"
        "import torch, test_shared_weights as t\n"
        "for i in range(10**6):\n"
        "    weights = {'embed.weight': torch.full((400_000,), float(i))}\n"
        f"    t.export({{**t.SMALL, 'ema': weights}}, t.Path({str(path)!r}))\n"
    )
    process = processes.Popen([sys.executable, "-c", script])
    wait_for(path.exists)
    first = path.stat().st_ino
    wait_for(lambda: path.stat().st_ino != first)
    process.send_signal(signal.SIGKILL)
    process.wait()
    weights = load_parts(path, needed=WEIGHTS_KEYS)["ema"]["embed.weight"]
    assert (weights == weights[0]).all()


# --- the card ------------------------------------------------------------------------------------


def test_the_card_tells_what_is_known(best):
    checkpoint = load_checkpoint(best)
    del checkpoint["data"]["size"]  # older runs have none
    assert "| data | not recorded |" in model_card(checkpoint, "x.safetensors")
    checkpoint["data"]["size"] = {"files": 4, "train_hours": 10.25, "val_hours": 0.5}
    card = model_card(checkpoint, "x.safetensors")
    (row,) = [r for r in checkpoint["history"] if r["event"] == "epoch"]
    parameters = sum(t.numel() for t in checkpoint["ema"].values())
    for told in (
        f"| parameters | {parameters / 1e6:.2f} M |",
        "| data | 4 files; 10.25 hours to train, 0.50 hours to validate |",
        f"| trained | {row['step']} steps, 1 whole epochs |",
        f"| val | {row['val']:.4f} nats per code; best {row['val']:.4f} nats per code, of epoch",
        "| val per codebook | " + ", ".join(f"{v:.4f}" for v in row["val_per_codebook"]),
        "| vocab sizes | 64, 64, 64, 64 |",
        "sample_rvq.py x.safetensors --codec 44khz",
        "--init-from x.safetensors",
        "license: TODO",
    ):
        assert told in card
    assert card.startswith("---\n")
    assert card.count("- TODO") == 4


def test_the_card_tells_whether_the_newest_sample_copies():
    samples = [{"event": "sample", "epoch": e, "shared_seconds": 1.5 * e} for e in (5, 10)]
    samples[1]["shared_seconds_music"] = 0.25
    rows = [*samples, {"event": "step", "step": 9}]
    row = "| shared with training music | 15.00 s in the sample of epoch 10; held-out music 0.25 s"
    assert row in model_card({**SMALL, "history": rows}, "x.safetensors")
    row = "| shared with training music | 7.50 s in the sample of epoch 5; held-out music n/a s at"
    assert row in model_card({**SMALL, "history": rows[:1]}, "x.safetensors")
    assert "shared with" not in model_card({**SMALL, "history": rows[2:]}, "x.safetensors")


def test_the_cards_command_trains_alike(best):
    flags = load_checkpoint(best)["flags"]
    command = sharing._command(sharing.shared_flags(flags))
    assert max(map(len, command.splitlines())) <= 80
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["python", "train_rvq.py"]
    parsed = vars(build_parser().parse_args(words[2:]))
    shared = names("run", "architecture")
    assert {n: parsed[n] for n in shared} == {n: flags[n] for n in shared}


def test_without_a_validation_val_is_not_known():
    assert "| val | not known; best not known, of epoch 0 |" in model_card(SMALL, "x.safetensors")


def test_a_card_is_written_anew_until_it_is_edited(tmp_path):
    path, card = tmp_path / "x.safetensors", tmp_path / "x.md"
    export(SMALL, path)
    later = {**SMALL, "progress": {**SMALL["progress"], "step": 77}}
    said: list[str] = []
    export(later, path, said)
    assert "77 steps" in card.read_text()
    assert said == [f"wrote {path} (0.0 MB)", f"wrote {card}; fill in what it marks as TODO"]
    edited = card.read_text().replace("license: TODO", "license: mit")
    card.write_text(edited)
    said.clear()
    export(SMALL, path, said)
    assert card.read_text() == edited
    assert said[1].startswith(f"kept {card}, which is edited")


# --- damaged and hostile files -------------------------------------------------------------------


def test_no_flipped_bit_loads_in_silence(shared):
    whole = shared.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    places = [*range(8 * 8), *rng.sample(range(8 * 8, 8 * header), 1000)]
    places += rng.sample(range(8 * header, 8 * len(whole)), 200)
    found = load_parts(shared, needed=SHARED_KEYS)
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        shared.write_bytes(damaged)
        try:
            parts = load_parts(shared, needed=SHARED_KEYS)
        except CheckpointError:
            continue
        assert_same_tensors(parts, found)  # another spelling of the same content


def test_cut_and_lengthened_files_are_refused(shared):
    whole = shared.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        shared.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            load_parts(shared, needed=WEIGHTS_KEYS)
    shared.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        load_parts(shared, needed=WEIGHTS_KEYS)


def architecture(**fields) -> str:
    return json.dumps({**SMALL["architecture"], **fields})


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            {"format": "pt"},
            "expected format 'rvq-weights' in its metadata, found 'pt'; name a file",
        ),
        ({"format": None}, "found None"),
        ({"version": "2"}, "version 2, this program reads up to 1; use the newer program"),
        ({"version": "-1"}, "format version '-1' is none"),
        ({"version": "9" * 9999}, "is none"),
        ({"version": None}, "format version '' is none"),
        ({"sha256": None}, "its checksum is wrong"),
        ({"sha256": "0" * 64}, "its checksum is wrong"),
        ({"architecture": None}, "metadata 'architecture': expected a JSON object"),
        ({"architecture": "{"}, "expected a JSON object, found '{'"),
        ({"architecture": "[" * 200_000}, "expected a JSON"),
        ({"architecture": "[]"}, "expected a JSON object, found"),
        ({"architecture": '{"layers": 1' + "0" * 5000 + "}"}, "expected a JSON"),
        ({"architecture": architecture(d_model=True)}, "expected d_model 1 to 1048576, found True"),
        ({"architecture": architecture(layers=10**9)}, "expected layers"),
        (
            {"architecture": architecture(layers=10**6)},
            "takes 64000000 weights or more, it has 520",
        ),
        (
            {"architecture": architecture(depth_layers=999, pattern="depth")},
            "takes 1022976 weights",
        ),
        ({"architecture": architecture(vocab_sizes=[])}, "expected vocab_sizes"),
        ({"architecture": architecture(vocab_sizes=[16, "x"])}, "expected vocab_sizes"),
        ({"architecture": architecture(vocab_sizes=[2] * 10**5)}, "takes 1600000 weights"),
        ({"architecture": architecture(dropout=float("nan"))}, "expected dropout"),
        ({"architecture": architecture(pattern="\x1b[2J" * 99, rope_base="x")}, "rope_base"),
        ({"data": '{"frame_rate": 1e999, "side_codebooks": 0}'}, "expected frame_rate a number"),
        ({"data": '{"frame_rate": 86.1}'}, "expected side_codebooks 0 to 1048576, found None"),
        ({"flags": '{"ctx": "5"}'}, "expected ctx 2 to 1048576, found '5'"),
        ({"flags": '{"ctx": 32, "eval_dac_repo": "/etc/passwd"}'}, "expected eval_dac_repo a name"),
        ({"progress": '{"step": -1, "epoch": 0}'}, "expected step"),
        ({"progress": '"\x1b[2J"'}, "expected a JSON"),
    ],
)
def test_what_a_file_says_is_checked(texts, message, tmp_path):
    path = forged(tmp_path / "x.safetensors", **texts)
    with pytest.raises(CheckpointError) as caught:
        load_parts(path, needed=SHARED_KEYS)
    told = str(caught.value)
    assert told.startswith(f"{path}: ")
    assert message in told
    assert told.isprintable()
    assert len(told) < 400


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"bos": torch.zeros(999, dtype=torch.int16)}, "'bos' is not float32"),
        ({"bos": torch.full((999,), float("inf"))}, "1 tensors are not finite, first 'bos'"),
        ({}, "takes 512 weights or more, it has 0"),
    ],
)
def test_tensors_are_checked(weights, message, tmp_path):
    path = forged(tmp_path / "x.safetensors", weights=weights)
    with pytest.raises(CheckpointError, match=message):
        load_parts(path, needed=SHARED_KEYS)


def test_what_is_no_file_of_ours_is_one_error(tmp_path):
    folder, fifo = tmp_path / "folder.safetensors", tmp_path / "fifo.safetensors"
    text, plain = tmp_path / "text.safetensors", tmp_path / "plain.safetensors"
    folder.mkdir()
    os.mkfifo(fifo)
    text.write_text("weights\n" * 99)
    save_file({"a": torch.zeros(3)}, plain)
    header = b'{"\x1b[2J":{"dtype":"' + b"\xc2\x9b2J" * 9999 + b'"}}'
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes(len(header).to_bytes(8, "little") + header)
    for path, message in {
        odd: "damaged, or no .safetensors file",
        tmp_path / "none.safetensors": "no such file; check the path",
        folder: "found a folder",
        fifo: "found a folder or device",
        text: "damaged, or no .safetensors file",
        plain: f"expected format {FORMAT!r}",
    }.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            load_parts(path, needed=WEIGHTS_KEYS)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400


def test_a_part_that_is_never_shared_is_told(shared):
    with pytest.raises(CheckpointError, match=r"have no model, optimizer; name a checkpoint"):
        load_parts(shared, needed={"ema", "model", "optimizer"})


# --- the trainer ---------------------------------------------------------------------------------


def test_a_run_starts_from_shared_weights(tunes, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    code, output = run_trainer(*TINY, "--data", tunes, "--max-steps", "6", "--save_dir", first)
    assert code == 0, output
    best, shared = load_checkpoint(first / "rvq_4cb_best.pt"), first / "rvq_4cb_best.safetensors"
    export_weights(best, shared, tell=print)
    parts = load_parts(shared, needed=WEIGHTS_KEYS)
    assert_same_tensors(parts["ema"], {n: t.float() for n, t in best["ema"].items()})
    assert "hours to train" in (first / "rvq_4cb_best.md").read_text()

    flags = ("--data", tunes, "--max-steps", "2", "--init-from", shared, "--ctx", "64")
    code, output = run_trainer(
        *TINY, *flags, "--save_dir", second, "--lr", "1e-9", "--eta-min", "0"
    )
    assert code == 0, output
    assert f"EMA weights of {shared}" in output
    started = load_checkpoint(second / "rvq_4cb_latest.pt")["model"]
    for name, tensor in parts["ema"].items():
        assert torch.allclose(started[name], tensor, atol=1e-4), name


def test_weights_alone_are_not_resumed_from(tunes, tmp_path):
    code, output = run_trainer("--data", tunes, "--resume", tmp_path / "x.safetensors")
    assert code == 2
    assert "--init-from" in output
    assert len(output.splitlines()) == 1
