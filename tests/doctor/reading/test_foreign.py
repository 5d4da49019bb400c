"""Files of other programs are named for what they are, with a way to their weights that works."""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import shlex
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from kit import processes
from kit.checkpoints import content_of
from kit.trainer import ROOT, run_doctor, run_trainer
from torch import nn

import ckpt_doctor
from doctor.reading.foreign import by_container
from doctor.reading.reader import summarize
from run_folder.shared_weights import export_weights

WEIGHTS = {"wte.weight": torch.ones(5, 4), "h.0.attn.c_attn.weight": torch.ones(4, 4)}
MODULE = {f"module.{n}": t for n, t in WEIGHTS.items()}


def saved(name: str, content: Any, **options: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(content, folder / name, **options)
        return folder / name

    return write


def with_class_of(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Keys as Lightning writes them, its settings in a class of another library."""
    kind = type(name, (dict,), {"__module__": module})
    made = types.ModuleType(module)
    setattr(made, name, kind)
    monkeypatch.setitem(sys.modules, module, made)
    return {"pytorch-lightning_version": "2.5", "state_dict": WEIGHTS, "hyper_parameters": kind()}


def folder_of(*names: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        for name in names:
            path = folder / "model" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith((".safetensors",)):
                safetensors.torch.save_file(WEIGHTS, path)
            elif name.endswith((".pt", ".bin", ".pth")):
                torch.save(WEIGHTS, path)
            else:
                path.write_text("{}")
        return folder / "model"

    return write


def npz(folder: Path) -> Path:
    np.savez_compressed(folder / "weights.npz", a=np.ones(3))
    return folder / "weights.npz"


def pickled(folder: Path) -> Path:
    (folder / "model.pkl").write_bytes(pickle.dumps({"w": [1.0]}))
    return folder / "model.pkl"


def tensors_file(folder: Path) -> Path:
    safetensors.torch.save_file(WEIGHTS, folder / "other.safetensors")
    return folder / "other.safetensors"


def script(folder: Path) -> Path:
    torch.jit.trace(nn.Linear(4, 4), torch.ones(1, 4)).save(str(folder / "traced.pt"))
    return folder / "traced.pt"


def package(folder: Path) -> Path:
    with torch.package.PackageExporter(str(folder / "packed.pt")) as exporter:
        exporter.save_pickle("model", "model.pkl", WEIGHTS)
    return folder / "packed.pt"


def codes(folder: Path) -> Path:
    return next((ROOT / "examples" / "tokens" / "val").glob("*.npq"))


NANOGPT = {
    "model": {f"_orig_mod.{n}": t for n, t in WEIGHTS.items()}, "optimizer": {"state": {}},
    "model_args": {"n_layer": 1}, "iter_num": 5, "best_val_loss": torch.tensor(3.0), "config": {},
}  # fmt: skip
DEEPSPEED = {"module": WEIGHTS, "ds_config": {}, "ds_version": "0.15", "param_shapes": []}
KINDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nanoGPT": (saved("ckpt.pt", NANOGPT), "a nanoGPT checkpoint"),
    "Lightning": (
        saved("last.ckpt", {"pytorch-lightning_version": "2.5", "state_dict": WEIGHTS}),
        "a PyTorch Lightning checkpoint",
    ),
    "DeepSpeed": (saved("mp_rank_00_model_states.pt", DEEPSPEED), "DeepSpeed"),
    "DeepSpeed folder": (
        folder_of("latest", "zero_to_fp32.py", "global_step5/mp_rank_00_model_states.pt"),
        "a DeepSpeed checkpoint",
    ),
    "HF folder": (folder_of("config.json", "model.safetensors"), "a Hugging Face model"),
    "HF Trainer": (
        folder_of("config.json", "model.safetensors", "optimizer.pt", "rng_state.pth"),
        "a Hugging Face model",
    ),
    "HF bin": (saved("pytorch_model.bin", WEIGHTS), "Hugging Face"),
    "safetensors": (tensors_file, "weights (.safetensors)"),
    "npz": (npz, "NumPy arrays (.npz)"),
    "bare": (saved("model.pt", WEIGHTS), "bare state_dict"),
    "bare, DDP": (saved("weights.pt", MODULE), "`module.`"),
    "state_dict": (saved("x.pt", {"state_dict": MODULE, "epoch": 3}), "`module.`"),
    "model_state_dict": (saved("x.pt", {"model_state_dict": WEIGHTS}), "another program"),
    "model": (saved("x.pt", {"model": WEIGHTS, "args": {}}), "another program"),
    "optimizer": (saved("optimizer.pt", {"state": {}, "param_groups": []}), "optimizer"),
    "TorchScript": (script, "a TorchScript model"),
    "torch.package": (package, "torch.package"),
    "old torch": (saved("x.pt", WEIGHTS, _use_new_zipfile_serialization=False), "torch < 1.6"),
    "codes": (codes, "codes (.npq)"),
    "a pickle": (pickled, "a plain Python pickle"),
    "DeepSpeed step": (folder_of("mp_rank_00_model_states.pt"), "a DeepSpeed checkpoint"),
    "sharded HF": (folder_of("config.json", "model-00001-of-00002.safetensors"), "Hugging Face"),
    "a list": (saved("x.pt", [1, 2]), "no checkpoint"),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, tuple[Path, str, int]]:
    """Path, report and exit code of each kind; in this process, which has imported torch."""
    found = {}
    for name, (write, _) in KINDS.items():
        path = write(tmp_path_factory.mktemp("kind"))
        with contextlib.redirect_stdout(io.StringIO()) as told:
            code = ckpt_doctor.main([str(path)])
        found[name] = path, " ".join(told.getvalue().split()), code
    return found


@pytest.mark.parametrize("name", KINDS)
def test_it_is_named_for_what_it_is(name, said):
    _, text, code = said[name]
    assert "VERDICT: FOREIGN" in text, text
    assert KINDS[name][1] in text.partition("VERDICT: ")[2], text
    assert code == 5
    assert "restore a backup" not in text
    assert "RESUME WITH" not in text


@pytest.mark.parametrize(
    "name", ["nanoGPT", "Lightning", "HF bin", "safetensors", "bare", "bare, DDP", "state_dict",
             "model_state_dict", "model", "DeepSpeed", "TorchScript", "old torch"],
)  # fmt: skip
def test_the_way_to_its_weights_works(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problem = summarize(said[name][0]).problem
    line = re.search(r"(safetensors\.)?torch\.(jit\.load|load_file|torch\.load_file|load)\(.*?\)"
                     r"(\['\w+'\])?(\.state_dict\(\))?", problem.way)[0]  # fmt: skip
    weights = eval(line)
    assert all(isinstance(t, torch.Tensor) for t in weights.values())
    assert len(weights) == 2


def test_a_lightning_checkpoint_that_needs_its_library_is_named_and_not_loaded(
    tmp_path, monkeypatch
):
    content = with_class_of("pytorch_lightning", "AttributeDict", monkeypatch)
    problem = summarize(saved("last.ckpt", content)(tmp_path)).problem
    assert problem.kind == "foreign"
    assert "a PyTorch Lightning checkpoint" in problem.text
    assert "only if you trust" in problem.way
    content = with_class_of("somebodys_own_module", "Settings", monkeypatch)
    assert summarize(saved("other.ckpt", content)(tmp_path)).problem.kind == "unsafe"


def test_a_pickled_module_is_not_loaded_and_no_backup_is_spoken_of(tmp_path):
    text = run_doctor(saved("module.pt", nn.Linear(2, 2))(tmp_path)).stdout
    assert "torch.nn.modules.linear.Linear" in text
    assert "backup" not in text


def test_shared_weights_of_this_trainer_say_so(good, tmp_path):
    path = tmp_path / "tunes.safetensors"
    export_weights(content_of(good), path, tell=lambda _: None)
    text = run_doctor(path).stdout
    assert "this trainer shares" in text
    assert "--init-from" in text


def test_no_length_of_a_header_is_taken_for_the_first_byte_of_another_kind(tmp_path):
    """Such as the 0x80 of a pickle; headers are padded to eights."""
    path, found = tmp_path / "other.safetensors", set()
    for padding in range(0, 256, 8):
        safetensors.torch.save_file(WEIGHTS, path, metadata={"padding": "x" * padding})
        found.add(path.read_bytes()[0])
        assert by_container(str(path)).text == "weights (.safetensors)"
    assert len(found) == 32


def test_beside_a_run_a_foreign_file_costs_a_row(good):
    saved("ckpt.pt", NANOGPT)(good.parent)
    done = run_doctor(good.parent, "--no-probe")
    assert "VERDICT: HEALTHY" in done.stdout
    assert "a nanoGPT checkpoint" in done.stdout
    assert done.returncode == 0


@pytest.fixture
def renamed(good) -> Iterator[Callable[[str], Path]]:
    """A whole checkpoint of this trainer whose names all begin with something."""

    def rename(prefix: str) -> Path:
        content = content_of(good)
        for part in ("model", "ema"):
            content[part] = {prefix + n: t for n, t in content[part].items()}
        for group in content["optimizer"]["param_groups"]:
            group["param_names"] = [prefix + n for n in group["param_names"]]
        torch.save(content, good)
        return good

    return rename


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_prefix_is_seen_through_and_the_printed_command_goes_on(prefix, renamed, tunes):
    path = renamed(prefix)
    done = run_doctor(path, "--no-probe")
    assert done.returncode == 1, done.stdout
    assert f"`{prefix}`" in done.stdout
    assert "restore a backup" not in done.stdout
    (command,) = (x for x in done.stdout.splitlines() if x.startswith("RESUME WITH: "))
    repair, resume = command.removeprefix("RESUME WITH: ").split(" && ")
    words = [sys.executable, *shlex.split(repair)[1:]]
    processes.run(words, check=True, capture_output=True)
    code, output = run_trainer(*shlex.split(resume)[2:], "--data", tunes, "--epochs", "3")
    assert code == 0, output
