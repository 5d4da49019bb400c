"""Faults planted on purpose, in training as it runs and in files afterwards, and the truth of them.

    train(argv, TRAINED["lr x 10"](rng, onset=300), log)   # a real run that goes wrong at step 301
    truth = plant(folder, FILE_FAULTS["swapped EMA"], rng)  # a finished run whose files are spoiled

Shared by benchmarks/doctor_scoreboard.py and the tests. Nothing here knows the doctor.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from make_codes import make_tune
from torch import Tensor

import train_rvq
from run_folder.files import save_checkpoint
from sound.npq_format import write_npq
from training import saving as run_saving
from training import state as run_state
from training.ema import Ema
from training.guard import Guard
from training.loader import Batch
from training.optimizer import MUON_FACTOR

Checkpoint = dict[str, Any]


@dataclass
class Truth:
    """What was planted: the doctor must find it, date it, and name one of the causes."""

    onset: int  # first step whose state or metrics are wrong
    causes: tuple[str, ...]  # finding ids, any of which names it
    where: str = ""  # part of a tensor's or codebook's name that the finding must tell
    bad: set[str] = field(default_factory=set)  # names of the files that are wrong


# --- data and runs -------------------------------------------------------------------------------


def make_data(
    folder: Path, *, codebooks: int, vocab: int, files: int, frames: int, noise: float, seed: int
) -> None:
    """Tunes of structured codes, a share `noise` of them replaced at random."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(vocab, size=(16, 8, codebooks))
    folder.mkdir(parents=True)
    for i in range(files):
        codes = make_tune(patterns, frames, rng)
        random = rng.integers(vocab, size=codes.shape)
        codes = np.where(rng.random(codes.shape) < noise, random, codes)
        write_npq(
            folder / f"{i}.npq", codes, vocab_sizes=[vocab] * codebooks, frame_rate=44_100 / 512
        )


@dataclass
class Sabotage:
    """What goes wrong in a training run, from the step after `onset` on."""

    onset: int
    causes: tuple[str, ...]
    where: str = ""
    after: Callable[[run_state.TrainingRun], None] | None = None  # called after each accepted step
    before: Callable[[run_state.TrainingRun], None] | None = None  # called before each step
    lr: Callable[[run_state.TrainingRun, float], float] | None = None  # another learning rate
    codes: Callable[[Tensor], Tensor] | None = None  # other windows
    no_update: bool = False  # steps count and change nothing
    no_average: str = ""  # "frozen" or "raw": what becomes of the EMA
    guarded: bool = True  # False: without the guard, as in the user's first run
    schedule_steps: int | None = None  # of the saved plan

    def truth(self) -> Truth:
        """What the doctor has to find."""
        first = self.onset + (self.after is not None or self.before is None)
        return Truth(first, self.causes, self.where)


def train(argv: Sequence[str], sabotage: Sabotage | None, log: Path) -> int:
    """train_rvq.py's own main, with a fault planted in it or without; its exit code."""
    with open(log, "a", encoding="utf-8") as file, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))
        if sabotage is not None:
            for patch in _patches(sabotage):
                stack.enter_context(patch)
        return train_rvq.main([*argv])


def _changed(batches: Iterator[Batch], change: Callable[[Tensor], Tensor]) -> Iterator[Batch]:
    return (batch._replace(codes=change(batch.codes)) for batch in batches)


def _patches(s: Sabotage) -> Iterator[contextlib.AbstractContextManager[Any]]:
    step, rate, average = train_rvq.train_step, train_rvq.learning_rate, Ema.update

    def active(run: run_state.TrainingRun) -> bool:
        return bool(run.state.progress.step >= s.onset)

    def spoiled_step(run: run_state.TrainingRun, batches: Iterator[Batch]) -> train_rvq.StepStats:
        if s.schedule_steps is not None:
            run.state.progress.schedule_steps = s.schedule_steps
        hit = active(run)
        if hit and s.before:
            s.before(run)
        stats = step(run, _changed(batches, s.codes) if hit and s.codes else batches)
        if hit and s.after and stats.refused is None:
            with torch.no_grad():
                s.after(run)
        return stats

    def spoiled_rate(run: run_state.TrainingRun) -> float:
        return s.lr(run, rate(run)) if s.lr and active(run) else rate(run)

    def spoiled_average(ema: Ema[Any], number: int) -> None:
        if s.no_average and number > s.onset:
            if s.no_average == "raw":
                torch._foreach_copy_(ema.averaged, ema.trained)
            return
        average(ema, number)

    def skipped_update(run: run_state.TrainingRun, lr: float, grad_norm: float) -> None:
        if not active(run):
            real_update(run, lr, grad_norm)

    real_update = train_rvq.update
    yield mock.patch.object(train_rvq, "train_step", spoiled_step)
    yield mock.patch.object(train_rvq, "learning_rate", spoiled_rate)
    if s.no_average:
        yield mock.patch.object(Ema, "update", spoiled_average)
    if s.no_update:
        yield mock.patch.object(train_rvq, "update", skipped_update)
    if not s.guarded:
        yield mock.patch.object(Guard, "judge", return_value=None)
        yield mock.patch.object(run_saving, "unsound", return_value=None)


# --- faults in training --------------------------------------------------------------------------


Change = Callable[[run_state.TrainingRun], None]


def _once(
    change: Callable[[run_state.TrainingRun], None],
) -> Callable[[run_state.TrainingRun], None]:
    done: list[bool] = []

    def after(run: run_state.TrainingRun) -> None:
        if not done:
            change(run)
            done.append(True)

    return after


def _parameter(run: run_state.TrainingRun, name: str) -> Tensor:
    return dict(run.state.model.named_parameters())[name].data


def _block_matrix(rng: np.random.Generator, layers: int = 2) -> str:
    part = rng.choice(["attn.qkv", "attn.out", "mlp.up", "mlp.down"])
    return f"blocks.{rng.integers(layers)}.{part}.weight"


def _rows_of(run: run_state.TrainingRun, table: str, k: int) -> Tensor:
    """Rows of codebook k in "embed" or "head", [V, D]."""
    return _parameter(run, f"{table}.weight").unflatten(0, (len(run.weights), -1))[k]


def nan_layer(rng: np.random.Generator, onset: int) -> Sabotage:
    name = _block_matrix(rng)

    def spoil(run: run_state.TrainingRun) -> None:
        _parameter(run, name).view(-1)[: rng.integers(1, 50)] = math.nan

    # Without the guard, which would roll it back, the next gradients carry it everywhere.
    return Sabotage(onset, ("F1",), after=_once(spoil), guarded=False)


def head_drift(rng: np.random.Generator, onset: int) -> Sabotage:
    k, rate = int(rng.integers(2)), float(rng.uniform(0.01, 0.04))
    pushes: list[Tensor] = []

    def push(run: run_state.TrainingRun) -> None:
        rows = _rows_of(run, "head", k)
        if not pushes:
            way = torch.from_numpy(rng.standard_normal(rows.shape[1])).float()
            pushes.append(way / way.norm() * rows.norm(dim=1).square().mean().sqrt())
        rows += rate * pushes[0]

    return Sabotage(onset, ("G1", "G2"), "head", after=push)


def qkv_growth(rng: np.random.Generator, onset: int) -> Sabotage:
    name = f"blocks.{rng.integers(2)}.attn.qkv.weight"

    def grow(run: run_state.TrainingRun) -> None:
        _parameter(run, name).mul_(1.01)

    return Sabotage(onset, ("G1", "G2"), name, after=grow)


def lr_times(factor: float, *, guarded: bool) -> Callable[[np.random.Generator, int], Sabotage]:
    def fault(_: np.random.Generator, onset: int) -> Sabotage:
        return Sabotage(onset, ("S1",), lr=lambda _, lr: factor * lr, guarded=guarded)

    return fault


def lr_overrun(_: np.random.Generator, onset: int) -> Sabotage:
    def unclamped(run: run_state.TrainingRun, _: float) -> float:
        done = (run.state.progress.step + 1) / onset
        floor, peak = run.flags.eta_min, run.flags.lr
        return float(floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done)))

    return Sabotage(onset, ("S1",), lr=unclamped, schedule_steps=onset)


def scale_collapse(rng: np.random.Generator, onset: int) -> Sabotage:
    left = [int(rng.integers(11, 16))]  # 65536 halves to 32 ... 2

    def overflow(run: run_state.TrainingRun) -> None:
        if left[0] > 0:
            left[0] -= 1
            weight = run.state.model.head.weight
            hook = weight.register_hook(lambda g: (hook.remove(), g * math.inf)[1])

    return Sabotage(onset, ("O4",), before=overflow)


def dead_rows(rng: np.random.Generator, onset: int) -> Sabotage:
    table, k = str(rng.choice(["embed", "head"])), int(rng.integers(2))
    share = float(rng.uniform(0.1, 0.6))

    def kill(run: run_state.TrainingRun) -> None:
        rows = _rows_of(run, table, k)
        rows[: max(1, int(share * len(rows)))] = 0.0

    return Sabotage(onset, ("G8", "G1", "G2"), table, after=kill)


def hidden_lr(rng: np.random.Generator, onset: int) -> Sabotage:
    """Steps nine times too far, while the saved lr is right."""
    old: list[list[Tensor]] = [[]]

    def remember(run: run_state.TrainingRun) -> None:
        old[0] = [p.detach().clone() for p in run.state.model.parameters()]

    def stretch(run: run_state.TrainingRun) -> None:
        for p, q in zip(run.state.model.parameters(), old[0], strict=True):
            p.data.add_(p.data - q, alpha=9.0)

    return Sabotage(onset, ("G1", "G2", "G3"), before=remember, after=stretch)


def label_noise(share: float) -> Callable[[np.random.Generator, int], Sabotage]:
    def fault(_: np.random.Generator, onset: int) -> Sabotage:
        generator = torch.Generator().manual_seed(onset)

        def noisy(codes: Tensor) -> Tensor:
            size = int(codes.max()) + 1
            random = torch.randint(size, codes.shape, generator=generator).to(codes.dtype)
            hit = torch.rand(codes.shape, generator=generator) < share
            return torch.where(hit, random, codes)

        return Sabotage(onset, ("H1", "H2", "H3"), codes=noisy, guarded=False)

    return fault


def frozen_run(_: np.random.Generator, onset: int) -> Sabotage:
    return Sabotage(onset, ("G1", "I4", "O2"), no_update=True)


def frozen_ema(_: np.random.Generator, onset: int) -> Sabotage:
    return Sabotage(onset, ("G3",), no_average="frozen")


def raw_ema(_: np.random.Generator, onset: int) -> Sabotage:
    return Sabotage(onset, ("G3",), no_average="raw")


def _each_step(
    causes: tuple[str, ...], change: Callable[[Tensor, np.random.Generator], Any], part: str = ""
) -> Callable[[np.random.Generator, int], Sabotage]:
    def fault(rng: np.random.Generator, onset: int) -> Sabotage:
        name = f"blocks.{rng.integers(2)}.{part}.weight" if part else _block_matrix(rng)
        return Sabotage(onset, causes, name, after=lambda r: change(_parameter(r, name), rng))

    return fault


def _at_step(
    causes: tuple[str, ...], change: Callable[[Tensor, np.random.Generator], Any], part: str = ""
) -> Callable[[np.random.Generator, int], Sabotage]:
    def fault(rng: np.random.Generator, onset: int) -> Sabotage:
        found = _each_step(causes, change, part)(rng, onset)
        assert found.after
        found.after = _once(found.after)
        return found

    return fault


def _random_like(w: Tensor, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(w.shape))).float()


def moments_lost(_: np.random.Generator, onset: int) -> Sabotage:
    """Zeroed at every step: plain sign descent with steps of 0.1 / sqrt(0.05)."""

    def clear(run: run_state.TrainingRun) -> None:
        for state in run.state.optimizer.state.values():
            for key in MOMENTS & state.keys():
                state[key].zero_()

    return Sabotage(onset, ("O2",), after=clear)


def permuted_embedding(rng: np.random.Generator, onset: int) -> Sabotage:
    def permute(run: run_state.TrainingRun) -> None:
        rows = _rows_of(run, "embed", 0)
        rows.copy_(rows[torch.from_numpy(rng.permutation(len(rows)))])

    return Sabotage(onset, ("G1", "G2", "G3", "H2", "H3"), "", after=_once(permute))


MOVES = ("G1", "G2")
STAYS = ("G1", "G2", "G3")

TRAINED: dict[str, Callable[[np.random.Generator, int], Sabotage]] = {
    "NaN layer": nan_layer,
    "head drift": head_drift,
    "qkv growth": qkv_growth,
    "lr x 10": lr_times(10.0, guarded=True),
    "lr overrun": lr_overrun,
    "scale collapse": scale_collapse,
    "dead rows": dead_rows,
}
TRAINED_EXTRA: dict[str, Callable[[np.random.Generator, int], Sabotage]] = {
    "lr x 30, no guard": lr_times(30.0, guarded=False),
    "lr x 0.01": lr_times(0.01, guarded=True),
    "steps 10 x too long, lr right": hidden_lr,
    "half of the codes random": label_noise(0.5),
    "all codes random": label_noise(1.0),
    "updates stop, steps count": frozen_run,
    "EMA stops": frozen_ema,
    "EMA copies raw": raw_ema,
    "matrix shrinks 1 % a step": _each_step((*MOVES, "G3"), lambda w, _: w.mul_(0.99)),
    "q_norm gain grows 1 % a step": _each_step(MOVES, lambda w, _: w.mul_(1.01), "attn.q_norm"),
    "norm2 gain grows 1 % a step": _each_step(MOVES, lambda w, _: w.mul_(1.01), "norm2"),
    "noise on a matrix each step": _each_step(
        (*MOVES, "G3"), lambda w, r: w.add_(0.02 * w.square().mean().sqrt() * _random_like(w, r))
    ),
    "matrix held still": _each_step((*MOVES, "O2"), lambda w, _: w.copy_(_held(w))),
    "matrix re-drawn once": _at_step(
        (*STAYS, "H2", "H3"), lambda w, r: w.copy_(w.square().mean().sqrt() * _random_like(w, r))
    ),
    "matrix x 3 once": _at_step((*STAYS, "H2", "H3"), lambda w, _: w.mul_(3.0)),
    "matrix zeroed once": _at_step((*STAYS, "H2", "H3"), lambda w, _: w.zero_()),
    "matrix negated once": _at_step((*STAYS, "H2", "H3"), lambda w, _: w.neg_()),
    "embedding rows permuted once": permuted_embedding,
    "moments cleared each step": moments_lost,
}
_kept: dict[int, Tensor] = {}


def _held(w: Tensor) -> Tensor:
    return _kept.setdefault(w.data_ptr(), w.clone())


# --- faults in files -----------------------------------------------------------------------------


@dataclass
class Scene:
    """A checkpoint to spoil, and others to take things from."""

    c: Checkpoint
    older: Checkpoint  # of the same run, some archives before
    foreign: Checkpoint  # of a run of the same shape with another seed
    rng: np.random.Generator


@dataclass(frozen=True)
class FileFault:
    """How a file is spoiled, which of a run's files are, and what names the fault."""

    spoil: Callable[[Scene], str | None]  # changes scene.c; the tensor to be named
    causes: tuple[str, ...]
    spread: str = "moment"  # "moment": all names of one step; "name": one name; "later": and after
    is_raw: bool = False  # spoil takes and returns bytes instead


def _matrix_of(c: Checkpoint, rng: np.random.Generator) -> str:
    names = [n for n, t in c["model"].items() if n.startswith("blocks.") and t.dim() == 2]
    return str(rng.choice(names))


def _on_matrix(
    change: Callable[[Tensor, np.random.Generator], Tensor], *, ema: bool = False, raw: bool = True
) -> Callable[[Scene], str]:
    def spoil(s: Scene) -> str:
        name = _matrix_of(s.c, s.rng)
        seed = int(s.rng.integers(1 << 30))
        for part in ("model",) * raw + ("ema",) * ema:
            weight = s.c[part][name]
            s.c[part][name] = change(weight.clone(), np.random.default_rng(seed))
        return name

    return spoil


def _scaled(factor: float) -> Callable[[Tensor, np.random.Generator], Tensor]:
    return lambda w, _: w * factor


def _redrawn(w: Tensor, rng: np.random.Generator) -> Tensor:
    return w.square().mean().sqrt() * _random_like(w, rng)


def _noisy(share: float) -> Callable[[Tensor, np.random.Generator], Tensor]:
    return lambda w, rng: w + share * _redrawn(w, rng)


def _one_huge(w: Tensor, rng: np.random.Generator) -> Tensor:
    """Flips the highest exponent bit of one weight."""
    bits = w.view(torch.int32).view(-1)
    i = int(rng.integers(len(bits)))
    bits[i] = bits[i] ^ (1 << 30)
    return w


def _some_nan(w: Tensor, rng: np.random.Generator) -> Tensor:
    w.view(-1)[int(rng.integers(w.numel()))] = math.nan
    return w


def _half(w: Tensor, _: np.random.Generator) -> Tensor:
    return (w * 1e6).half().float() * 1e-6


def _other_layer(s: Scene) -> str:
    name = f"blocks.0.{s.rng.choice(['attn.qkv', 'mlp.up', 'mlp.down'])}.weight"
    s.c["model"][name] = s.c["model"][name.replace("blocks.0", "blocks.1")].clone()
    return name


def _swapped_ema(s: Scene) -> None:
    s.c["model"], s.c["ema"] = s.c["ema"], s.c["model"]


def _states(c: Checkpoint) -> dict[Any, dict[str, Tensor]]:
    states: dict[Any, dict[str, Tensor]] = c["optimizer"]["state"]
    return states


FIRST = {"exp_avg", "momentum_buffer"}  # moments by their keys in AdamW's and Muon's state
MOMENTS = {*FIRST, "exp_avg_sq"}


def _foreign_adam(s: Scene) -> None:
    _take_moments(s, s.foreign, MOMENTS)


def _older_adam(s: Scene) -> None:
    _take_moments(s, s.older, {*MOMENTS, "step"})


def _older_adam_right_step(s: Scene) -> None:
    _take_moments(s, s.older, MOMENTS)


def _older_m(s: Scene) -> None:
    _take_moments(s, s.older, FIRST)


def _take_moments(s: Scene, source: Checkpoint, keys: set[str]) -> None:
    for i, state in _states(s.c).items():
        for key in keys & state.keys():
            state[key] = _states(source)[i][key].clone()


def _adam_between_layers(s: Scene) -> None:
    names = [n for g in s.c["optimizer"]["param_groups"] for n in g["param_names"]]
    numbers = [i for g in s.c["optimizer"]["param_groups"] for i in g["params"]]
    index = dict(zip(names, numbers, strict=True))
    states = _states(s.c)
    for name, i in index.items():
        if name.startswith("blocks.0."):
            j = index[name.replace("blocks.0.", "blocks.1.")]
            states[i], states[j] = states[j], states[i]


def _m_and_v_exchanged(s: Scene) -> None:
    for state in _states(s.c).values():
        if "exp_avg" in state:
            state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"]


def _scaled_moment(keys: set[str], factor: float) -> Callable[[Scene], None]:
    def spoil(s: Scene) -> None:
        for state in _states(s.c).values():
            for key in keys & state.keys():
                state[key] = state[key] * factor

    return spoil


def _moments_shuffled(s: Scene) -> None:
    """Each pair (m, v) stays a possible one, but belongs to another weight."""
    for state in _states(s.c).values():
        keys = sorted(MOMENTS & state.keys())
        order = torch.from_numpy(s.rng.permutation(state[keys[0]].numel()))
        for key in keys:
            state[key] = state[key].flatten()[order].view_as(state[key]).clone()


def _negative_v(s: Scene) -> None:
    state = next(state for state in _states(s.c).values() if "exp_avg_sq" in state)
    state["exp_avg_sq"] = state["exp_avg_sq"].clone()
    state["exp_avg_sq"].view(-1)[3] *= -1
    state["exp_avg_sq"].view(-1)[3] -= 1e-12


def _ema_is_raw(s: Scene) -> None:
    s.c["ema"] = {n: t.clone() for n, t in s.c["model"].items()}


def _older_ema(s: Scene) -> None:
    s.c["ema"] = s.older["ema"]


def _older_raw(s: Scene) -> None:
    s.c["model"] = s.older["model"]


def _foreign_model(s: Scene) -> None:
    s.c["model"], s.c["ema"] = s.foreign["model"], s.foreign["ema"]


def _foreign_file(s: Scene) -> None:
    s.c.update(s.foreign)


def _older_weights(s: Scene) -> None:
    """Everything of the older file but step and epoch: a run that writes the same state again."""
    for key in ("model", "ema", "optimizer"):
        s.c[key] = s.older[key]


def _wrong_lr(factor: float) -> Callable[[Scene], None]:
    def spoil(s: Scene) -> None:
        for group in s.c["optimizer"]["param_groups"]:
            group["lr"] *= factor

    return spoil


def _progress(key: str, change: Callable[[Any], Any]) -> Callable[[Scene], None]:
    def spoil(s: Scene) -> None:
        s.c["progress"] = {**s.c["progress"], key: change(s.c["progress"][key])}

    return spoil


def _scale(value: float) -> Callable[[Scene], None]:
    def spoil(s: Scene) -> None:
        fresh = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
        s.c["scaler"] = {**fresh, "_growth_tracker": 0, **s.c["scaler"], "scale": value}

    return spoil


def _without(key: str) -> Callable[[Scene], None]:
    def spoil(s: Scene) -> None:
        del s.c[key]

    return spoil


def _missing_weight(s: Scene) -> str:
    name = _matrix_of(s.c, s.rng)
    del s.c["model"][name]
    return name


def _transposed(s: Scene) -> str:
    name = f"blocks.0.{s.rng.choice(['attn.qkv', 'mlp.up', 'mlp.down'])}.weight"
    s.c["model"][name] = s.c["model"][name].T.contiguous()
    return name


def _transposed_square(s: Scene) -> str:
    s.c["model"]["blocks.0.attn.out.weight"] = s.c["model"]["blocks.0.attn.out.weight"].T.clone()
    return "blocks.0.attn.out.weight"


def _codebook(table: str, change: Callable[[Tensor, np.random.Generator], Tensor]) -> Any:
    def spoil(s: Scene) -> str:
        sizes = s.c["architecture"]["vocab_sizes"]
        k = int(s.rng.integers(len(sizes)))
        weight = s.c["model"][f"{table}.weight"].clone()
        rows = weight.unflatten(0, (len(sizes), -1))
        rows[k] = change(rows[k].clone(), s.rng)
        s.c["model"][f"{table}.weight"] = weight
        return table

    return spoil


def _permuted_rows(w: Tensor, rng: np.random.Generator) -> Tensor:
    return w[torch.from_numpy(rng.permutation(len(w)))]


def _head_negated(s: Scene) -> str:
    """The value rows of one attention head change sign."""
    heads = s.c["architecture"]["heads"]
    name = "blocks.1.attn.qkv.weight"
    weight = s.c["model"][name].clone()
    weight.unflatten(0, (3, heads, -1))[2, int(s.rng.integers(heads))] *= -1
    s.c["model"][name] = weight
    return name


def flip_a_bit(content: bytes, rng: np.random.Generator) -> bytes:
    """One bit somewhere in the file: nearly always in a tensor, whose CRC then is wrong."""
    spoiled = bytearray(content)
    spoiled[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    return bytes(spoiled)


def cut_off(content: bytes, rng: np.random.Generator) -> bytes:
    """A file whose end was never written."""
    return content[: int(len(content) * rng.random())]


def zero_page(content: bytes, rng: np.random.Generator) -> bytes:
    """4 KB that the disk never got."""
    start = int(rng.integers(max(len(content) - 4096, 1)))
    return content[:start] + bytes(4096) + content[start + 4096 :]


FILE_FAULTS: dict[str, FileFault] = {
    "swapped EMA": FileFault(_swapped_ema, ("G3",)),
    "bit flip": FileFault(flip_a_bit, ("I1", "I2"), "name", is_raw=True),
    "exponent flip": FileFault(_on_matrix(_one_huge), ("G2", "G1", "F1", "G3")),
    "truncation": FileFault(cut_off, ("I1",), "name", is_raw=True),
}
ADAM = ("F2", "F3", "I4", "O2", "G3", "O5")
WRONG_ADAM = tuple(
    FileFault(spoil, ADAM)
    for spoil in (
        _foreign_adam, _older_adam, _adam_between_layers, _m_and_v_exchanged, _older_m,
    )
)  # fmt: skip
FILE_FAULTS["wrong Adam"] = WRONG_ADAM[0]
W = WE = ("G1", "G2", "G3")
FILE_EXTRA: dict[str, FileFault] = {
    "NaN in one weight": FileFault(_on_matrix(_some_nan), ("F1",)),
    "NaN in the EMA alone": FileFault(_on_matrix(_some_nan, ema=True, raw=False), ("F1",)),
    "matrix x 3, raw": FileFault(_on_matrix(_scaled(3.0)), W),
    "matrix x 3, raw and EMA": FileFault(_on_matrix(_scaled(3.0), ema=True), WE),
    "matrix x 3, later files": FileFault(_on_matrix(_scaled(3.0), ema=True), WE, "later"),
    "matrix x 1.5, raw and EMA": FileFault(_on_matrix(_scaled(1.5), ema=True), WE),
    "matrix re-drawn, raw": FileFault(_on_matrix(_redrawn), W),
    "matrix re-drawn, raw and EMA": FileFault(_on_matrix(_redrawn, ema=True), WE),
    "matrix zeroed, raw": FileFault(_on_matrix(_scaled(0.0)), W),
    "matrix zeroed, raw and EMA": FileFault(_on_matrix(_scaled(0.0), ema=True), WE),
    "matrix zeroed, one name": FileFault(_on_matrix(_scaled(0.0)), (*W, "I4"), "name"),
    "matrix zeroed, EMA": FileFault(_on_matrix(_scaled(0.0), ema=True, raw=False), ("G3",)),
    "matrix negated": FileFault(_on_matrix(_scaled(-1.0)), W),
    "layer's matrix from another layer": FileFault(_other_layer, W),
    "noise 30 % on a matrix": FileFault(_on_matrix(_noisy(0.3)), W),
    "noise 10 % on a matrix": FileFault(_on_matrix(_noisy(0.1)), W),
    "float16 overflow in a matrix": FileFault(_on_matrix(_half), ("F1",)),
    "square matrix transposed": FileFault(_transposed_square, W),
    "value rows of a head negated": FileFault(_head_negated, W),
    "embedding rows permuted": FileFault(_codebook("embed", _permuted_rows), W),
    "head of a codebook zeroed": FileFault(_codebook("head", _scaled(0.0)), ("G8", *W)),
    "head of a codebook x 3": FileFault(_codebook("head", _scaled(3.0)), W),
    "head rows permuted": FileFault(_codebook("head", _permuted_rows), W),
    "EMA = raw": FileFault(_ema_is_raw, ("G3",)),
    "EMA of an older step": FileFault(_older_ema, ("G3",)),
    "raw of an older step": FileFault(_older_raw, (*W, "O5")),
    "model of another run": FileFault(_foreign_model, W),
    "file of another run": FileFault(_foreign_file, (*W, "I4")),
    "weights and moments stand still": FileFault(_older_weights, ("G1", "I4")),
    "moments zeroed": FileFault(_scaled_moment(MOMENTS, 0.0), ("O2", "F3")),
    "first moments zeroed": FileFault(_scaled_moment(FIRST, 0.0), ("O2",)),
    "first moments x 100": FileFault(_scaled_moment(FIRST, 100.0), ("F3", "O2")),
    "second moments x 100": FileFault(_scaled_moment({"exp_avg_sq"}, 100.0), ("O2",)),
    "second moments / 100": FileFault(_scaled_moment({"exp_avg_sq"}, 0.01), ("F3", "O2")),
    "moments of another run": FileFault(_foreign_adam, ("O2", "G3", "O5")),
    "moments of an older step": FileFault(_older_adam_right_step, ("O2", "G3", "O5")),
    "moments between layers": FileFault(_adam_between_layers, ("O2", "G3", "O5")),
    "moments shuffled in a tensor": FileFault(_moments_shuffled, ("O2", "G3", "O5")),
    "m and v exchanged": FileFault(_m_and_v_exchanged, ("F2", "F3")),
    "a negative second moment": FileFault(_negative_v, ("F2",)),
    "lr field x 10": FileFault(_wrong_lr(10.0), ("S1",)),
    "lr field / 10": FileFault(_wrong_lr(0.1), ("S1",)),
    "step number wrong": FileFault(_progress("step", lambda s: s + 137), ("I4", "S1")),
    "epoch number wrong": FileFault(_progress("epoch", lambda e: e + 2), ("I4",)),
    "best_val rises": FileFault(_progress("best_val", lambda v: v + 0.5), ("S2",)),
    "scale 0.25": FileFault(_scale(0.25), ("O4",)),
    "scale Inf": FileFault(_scale(math.inf), ("F1", "O4")),
    "no optimizer": FileFault(_without("optimizer"), ("I3",)),
    "no EMA": FileFault(_without("ema"), ("I3",)),
    "a weight missing": FileFault(_missing_weight, ("I3",)),
    "a matrix transposed": FileFault(_transposed, ("I3",)),
    "4 KB of zeros": FileFault(zero_page, ("I1",), "name", is_raw=True),
}


def _on_momentum(change: Callable[[Tensor, np.random.Generator], Any]) -> Callable[[Scene], str]:
    """A fault in the momentum of one matrix that Muon trains."""

    def spoil(s: Scene) -> str:
        groups = s.c["optimizer"]["param_groups"]
        names = {i: n for g in groups for i, n in zip(g["params"], g["param_names"], strict=True)}
        held = [i for i, state in _states(s.c).items() if "momentum_buffer" in state]
        i = held[int(s.rng.integers(len(held)))]
        _states(s.c)[i]["momentum_buffer"] = change(
            _states(s.c)[i]["momentum_buffer"].clone(), s.rng
        )
        return str(names[i])

    return spoil


def _muon(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Scene], None]:
    """A fault in the state of every matrix that Muon trains."""

    def spoil(s: Scene) -> None:
        for state in _states(s.c).values():
            if "momentum_buffer" in state:
                change(state)

    return spoil


def _foreign_momentum(s: Scene) -> None:
    _take_moments(s, s.foreign, {"momentum_buffer"})


def _group_lr(number: int, factor: float) -> Callable[[Scene], None]:
    def spoil(s: Scene) -> None:
        s.c["optimizer"]["param_groups"][number]["lr"] *= factor

    return spoil


def _as_adams(state: dict[str, Tensor]) -> None:
    momentum = state.pop("momentum_buffer")
    state.update(step=torch.tensor(9.0), exp_avg=momentum, exp_avg_sq=momentum.square())


# Of checkpoints of --optim muon alone.
MUON_FAULTS: dict[str, FileFault] = {
    "NaN in a momentum": FileFault(_on_momentum(_some_nan), ("F1",)),
    "Inf in a momentum": FileFault(_on_momentum(lambda m, _: m / 0), ("F1",)),
    "a momentum's exponent bit": FileFault(_on_momentum(_one_huge), ("F1", "F3", "O2")),
    "a momentum zeroed": FileFault(_on_momentum(_scaled(0.0)), ("O2",)),
    "all momentum zeroed": FileFault(_scaled_moment({"momentum_buffer"}, 0.0), ("O2",)),
    "momentum x 1000": FileFault(_scaled_moment({"momentum_buffer"}, 1000.0), ("F3", "O2")),
    "momentum x 30": FileFault(_scaled_moment({"momentum_buffer"}, 30.0), ("F3", "O2")),
    "momentum / 100": FileFault(_scaled_moment({"momentum_buffer"}, 0.01), ("O2",)),
    "momentum negated": FileFault(_scaled_moment({"momentum_buffer"}, -1.0), ("G3",)),
    "a momentum transposed": FileFault(
        _on_momentum(lambda m, _: m.T[: len(m) // 2].contiguous()), ("I3",)
    ),
    "a momentum re-drawn": FileFault(_on_momentum(_redrawn), ("G3",)),
    "momentum of another run": FileFault(_foreign_momentum, ("G3", "O2")),
    "momentum missing": FileFault(_muon(lambda s: s.clear()), ("I3",)),
    "Adam's moments in Muon's group": FileFault(_muon(_as_adams), ("I3",)),
    "lr of Muon's group x 10": FileFault(_group_lr(0, 10.0), ("S1",)),
    "lr of the head's group / 10": FileFault(_group_lr(1, 0.1), ("S1",)),
    "factor of Muon's group left out": FileFault(_group_lr(0, 1 / MUON_FACTOR), ("S1",)),
}


def read(path: Path) -> Checkpoint:
    """A checkpoint of this test's own making."""
    found: Checkpoint = torch.load(path, weights_only=True)
    return found


def moments(folder: Path) -> list[tuple[int, list[Path]]]:
    """Steps of a run's files, and the files that were saved at each; links count as files."""
    steps: dict[int, list[Path]] = {}
    seen: dict[int, int] = {}
    for path in sorted(folder.glob("*.pt")):
        inode = path.stat().st_ino
        if inode not in seen:
            seen[inode] = int(torch.load(path, weights_only=True, mmap=True)["progress"]["step"])
        steps.setdefault(seen[inode], []).append(path)
    return sorted(steps.items())


def copy_run(source: Path, target: Path) -> None:
    """A run's files under another folder: checkpoints as links, the metrics as a copy."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".pt":
            os.link(path, target / path.name)
        elif path.suffix == ".jsonl":
            shutil.copyfile(path, target / path.name)


def plant(folder: Path, fault: FileFault, foreign: Path, rng: np.random.Generator) -> Truth:
    """Spoil files of a run at a moment that the generator chooses; the first third stays sound."""
    found = moments(folder)
    at = int(rng.integers(math.ceil(len(found) / 3), len(found)))
    older = found[max(0, at - 3)][1][0]
    truth = Truth(found[at][0], fault.causes)
    last = len(found) if fault.spread == "later" else at + 1
    seed = int(rng.integers(1 << 30))
    for number in range(at, last):
        paths = found[number][1]
        paths = [paths[int(rng.integers(len(paths)))]] if fault.spread == "name" else paths
        content = read(paths[0])
        same = np.random.default_rng(seed)
        if fault.is_raw:
            spoiled = fault.spoil(paths[0].read_bytes(), same)  # type: ignore[call-arg, arg-type]
            for path in paths:
                path.unlink()
                path.write_bytes(spoiled)  # type: ignore[arg-type]
        else:
            scene = Scene(content, read(older), _nearest(foreign, found[number][0]), same)
            truth.where = fault.spoil(scene) or ""
            for path in paths:
                save_checkpoint(scene.c, path)
        truth.bad |= {p.name for p in paths}
    return truth


def _nearest(folder: Path, step: int) -> Checkpoint:
    return read(min(moments(folder), key=lambda m: abs(m[0] - step))[1][0])


# --- faults in the metrics -----------------------------------------------------------------------

Row = dict[str, Any]


def _worse_codebook(row: Row, rng: np.random.Generator, _: int) -> None:
    if row["event"] == "epoch":
        row["val_per_codebook"][1] += 6.0
        row["val"] += 6.0 / len(row["val_per_codebook"])


def _nan_loss(row: Row, _: np.random.Generator, __: int) -> None:
    if row["event"] == "step":
        row["loss"] = None
    if row["event"] == "epoch":
        row["train"] = row["val"] = None
        row["val_per_codebook"] = [None] * len(row["val_per_codebook"])


def _slow_rise(row: Row, _: np.random.Generator, since: int) -> None:
    if row["event"] == "step":
        row["loss"] += 0.02 * since
    if row["event"] == "epoch":
        row["val"] += 0.02 * since
        row["train"] += 0.02 * since


def _exploding_norm(row: Row, _: np.random.Generator, since: int) -> None:
    if row["event"] == "step":
        row["grad_norm"] *= 50
    _no_better(row, _, since)


def _no_better(row: Row, _: np.random.Generator, since: int) -> None:
    if row["event"] == "epoch":
        row["val"] += 0.02 + 0.001 * since


METRICS_FAULTS: dict[str, tuple[Callable[[Row, np.random.Generator, int], None], tuple[str, ...]]]
METRICS_FAULTS = {
    "codebook CE explodes": (_worse_codebook, ("H1", "H2")),
    "loss is NaN": (_nan_loss, ("H3",)),
    "loss and val creep up": (_slow_rise, ("H2", "H3")),
    "gradient norm x 50": (_exploding_norm, ("H3",)),
    "a burst of skips": (_no_better, ("H3",)),
}


def plant_in_metrics(folder: Path, name: str, rng: np.random.Generator) -> Truth:
    """Spoil the rows of a run's metrics from a step on."""
    change, causes = METRICS_FAULTS[name]
    (path,) = folder.glob("*_metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    last = max(r["step"] for r in rows)
    onset = int(last * rng.uniform(0.5, 0.75))
    spoiled: list[Row] = []
    since = 0
    for row in rows:
        if row["step"] >= onset and row["event"] in ("step", "epoch"):
            since += row["event"] == "step"
            change(row, rng, since)
        if row["event"] == "step" and row["step"] >= onset and name == "a burst of skips":
            skip = {"event": "skip", "step": row["step"], "reason": "loss 9 is over 4, 6 sigma"}
            spoiled += [{**skip, "loss": 9.0, "grad_norm": 3.0, "time": row["time"]}] * 3
        spoiled.append(row)
    path.write_text("".join(json.dumps(r) + "\n" for r in spoiled))
    return Truth(onset, causes)
