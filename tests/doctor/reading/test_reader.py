"""What a file says of itself is read whole, whatever it holds, and the file is left as it was."""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.checkpoints import content_of
from kit.single_files import Old, OldModel, train_old

from doctor.reading import child as ckpt_child
from doctor.reading.child import in_child
from doctor.reading.reader import read_summary, summarize
from sound.npq_format import write_npq


def test_a_real_checkpoint_is_described(good):
    summary = summarize(good)
    content = content_of(good)
    assert summary.problem is None
    assert summary.mismatches == []
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


# --- odd contents ---------------------------------------------------------------------------------

ODD_FIELDS = {  # and what is told of it; of a record of the past nothing
    "progress": ([1, 2], "`progress`: expected a dictionary, found list"),
    "flags": ("text", "`flags`: expected a dictionary, found str"),
    "architecture": ({"vocab_sizes": "abc", "d_model": -5}, "architecture builds no model"),
    "optimizer": ({"state": [1], "param_groups": {"a": 1}}, "no optimizer state"),
    "ema": ([torch.ones(2)], "`ema`: expected a dictionary, found list"),
    "history": ({"a": 1}, ""),
    "scaler": (7, ""),
    "saved_at": ({"x": torch.ones(2)}, ""),
    "guard": (None, ""),
}


@pytest.mark.parametrize("key", ODD_FIELDS)
def test_fields_of_the_wrong_kind_cost_no_more_than_the_row(key, good):
    value, told = ODD_FIELDS[key]
    content = content_of(good)
    content[key] = value
    torch.save(content, good)
    summary = summarize(good)
    assert summary.problem is None
    assert len(summary.parameters) == len(content["model"])
    mismatches = "; ".join(summary.mismatches)
    assert told in mismatches if told else mismatches == ""


@pytest.mark.slow
def test_a_huge_history_is_read(good):
    content = content_of(good)
    row = {"event": "step", "step": 1, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5}
    content["history"] = [{**row, "step": i} for i in range(50_000)]
    torch.save(content, good)
    summary = summarize(good)
    assert summary.problem is None
    assert len(summary.history) == 50_000


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


# --- checkpoints of the script before this project ------------------------------------------------


def old_checkpoint(folder: Path, *, namespace: bool = False, numpy: bool = False) -> Any:
    """What the older script saved, from a real training of its kind of model on 3 x 40 codes."""
    codes = np.random.default_rng(0).integers(40, size=(100, 3))
    write_npq(folder / "0.npq", codes, vocab_sizes=[40] * 3, frame_rate=86.0)
    content = train_old(Old("", steps=30, heads=4, ctx=16), folder)
    content["scaler"] = torch.amp.GradScaler("cpu").state_dict()
    if namespace:
        content["cfg"] = argparse.Namespace(**content["cfg"])
    if numpy:
        content |= {"best_val": np.float64(content["best_val"]), "global_step": np.int64(30)}
    return content


@pytest.mark.parametrize("namespace", [False, True])
@pytest.mark.parametrize("numpy", [False, True])
def test_an_old_checkpoint_is_described(namespace, numpy, tmp_path):
    path = tmp_path / "rvq_3cb_epoch_e0012__20250801-101112.pt"
    content = old_checkpoint(tmp_path, namespace=namespace, numpy=numpy)
    torch.save(content, path)
    summary = summarize(path)
    assert summary.problem is None, summary.problem
    assert (summary.style, summary.kind, summary.name_epoch) == ("old", "archive", 12)
    assert (summary.step, summary.epoch) == (30, 12)
    assert summary.best_val == pytest.approx(float(content["best_val"]))
    assert summary.vocab_sizes == [40] * 3
    assert summary.flags["d_model"] == 32
    assert summary.mismatches == []
    assert summary.optimizer["lr"] == content["opt"]["param_groups"][0]["lr"]
    assert summary.scale == 65536.0
    found = {p.name: p for p in summary.parameters}
    assert set(found) == set(content["model"])
    for i, name in enumerate(name for name, _ in OldModel([40] * 3).named_parameters()):
        state = content["opt"]["state"][i]
        assert found[name].adam_step == 30
        assert found[name].m_rms == pytest.approx(float(state["exp_avg"].square().mean().sqrt()))
        assert found[name].m_over_bound == 0
    assert found["heads.2.weight"].zero_rows == {"2": 0}
    qkv = [x.number for x in summary.scales["raw"] if x.where == "blocks.0.attn.qkv.weight"]
    assert qkv == [0, 1, 2, 3], "a figure of each attention head"


def test_an_old_checkpoint_with_other_things_left_out(tmp_path):
    whole = old_checkpoint(tmp_path)
    for key in whole.keys() - {"model"}:
        content = {k: v for k, v in whole.items() if k != key}
        path = tmp_path / f"without_{key}.pt"
        torch.save(content, path)
        summary = summarize(path)
        assert summary.problem is None, (key, summary.problem)
        assert len(summary.parameters) == len(content["model"]), key


# --- nothing is touched, nothing runs away --------------------------------------------------------


def state_of_folder(folder: Path) -> dict[str, Any]:
    return {
        p.name: (p.lstat().st_mtime_ns, p.lstat().st_ino, p.lstat().st_mode, p.lstat().st_size)
        for p in [folder, *folder.iterdir()]
    }


def test_the_folder_is_untouched(adamw_run):
    before = state_of_folder(adamw_run)
    for path in sorted(adamw_run.glob("*.pt")):
        assert summarize(path).problem is None
    assert state_of_folder(adamw_run) == before


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
    content = {"model": weights, "ema": ema, "optimizer": optimizer, "global_step": 9, "cfg": {}}
    torch.save(content, good)
    assert good.stat().st_size > 400_000_000
    del weights, ema, optimizer, content
    before, peak, _ = in_child(peak_memory, str(good))
    print(f"{(peak - before) / 1024:.0f} MB above {before / 1024:.0f}")
    assert (peak - before) < 250 * 1024
