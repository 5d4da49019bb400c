"""Single checkpoints, diverged and healthy, of this trainer and of the script before it.

    path = make(root, "muon at lr 0.1")          # trained here, or spoiled after it was
    TRUTH["muon at lr 0.1"]                      # what a DIVERGED must name; None: healthy

Shared by benchmarks/doctor_scoreboard.py and the tests. Nothing here knows the doctor.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.planted_faults import Checkpoint, Sabotage, make_data, read, train
from model import ModelConfig
from run_folder.files import save_checkpoint
from sound.npq_format import map_codes, read_header
from training import setup

TOKENS = Path(__file__).resolve().parents[2] / "examples" / "tokens" / "val"
DATA: dict[str, dict[str, Any]] = {
    "tunes": {"codebooks": 4, "vocab": 64, "files": 4, "frames": 1500, "noise": 0.0},
    "pairs": {"codebooks": 2, "vocab": 256, "files": 5, "frames": 1500, "noise": 0.2},
    "nines": {"codebooks": 9, "vocab": 64, "files": 6, "frames": 1200, "noise": 0.03},
    "tiny": {"codebooks": 3, "vocab": 64, "files": 3, "frames": 400, "noise": 0.3},
}


# --- the older script ----------------------------------------------------------------------------


class OldBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.Module()
        self.attn.qkv, self.attn.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.attn.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class OldModel(nn.Module):
    """Codes [B, T, K] -> logits [B, T, V] of each codebook at the same places."""

    def __init__(
        self, sizes: list[int], width: int = 32, layers: int = 2, heads: int = 1, ctx: int = 16
    ) -> None:
        super().__init__()
        self.embeds = nn.ModuleList(nn.Embedding(v, width) for v in sizes)
        self.bos = nn.Parameter(torch.zeros(width))
        self.pos = nn.Embedding(ctx, width)
        self.blocks = nn.ModuleList(OldBlock(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, v) for v in sizes)

    def forward(self, codes: Tensor) -> list[Tensor]:
        x = torch.stack([e(codes[..., k]) for k, e in enumerate(self.embeds)]).sum(0)
        x = torch.cat((self.bos.expand(len(codes), 1, -1), x[:, :-1]), 1)
        x = x + self.pos(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return [head(self.ln_f(x)) for head in self.heads]


@dataclass(frozen=True)
class Old:
    """A training by the older script: AdamW, cosine, an EMA without warm-up of its decay."""

    data: str
    steps: int = 300
    lr: float = 1e-3
    width: int = 32
    layers: int = 2
    heads: int = 2
    ctx: int = 32
    std: float | None = None  # of normal initial weights; torch's own without it
    clip: float = 1.0
    bf16: bool = False
    seed: int = 0
    blown: tuple[int, float] | None = None  # from this step on at that lr

    def lr_at(self, step: int) -> float:
        if self.blown and step >= self.blown[0]:
            return self.blown[1]
        warm = min(1.0, (step + 1) / (1 + 0.01 * self.steps))
        return self.lr * warm * (0.55 + 0.45 * math.cos(math.pi * step / max(self.steps, 1)))


def train_old(run: Old, folder: Path) -> Checkpoint:
    """What the older script saved after a real training of its kind of model."""
    torch.manual_seed(run.seed)
    rng = np.random.default_rng(run.seed)
    files = [map_codes(read_header(p)).astype(np.int64) for p in sorted(folder.glob("*.npq"))]
    sizes = list(read_header(next(folder.glob("*.npq"))).vocab_sizes)
    model = OldModel(sizes, run.width, run.layers, run.heads, run.ctx)
    if run.std:
        for m in model.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=run.std)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=0.02)
    losses: list[float] = []
    for step in range(run.steps):
        optimizer.param_groups[0]["lr"] = run.lr_at(step)
        windows = []
        for file in (files[i] for i in rng.integers(len(files), size=4)):
            first = int(rng.integers(len(file) - run.ctx))
            windows.append(file[first : first + run.ctx])
        codes = torch.from_numpy(np.stack(windows))
        with torch.autocast("cpu", torch.bfloat16, enabled=run.bf16):
            logits = model(codes)
        ce = [F.cross_entropy(x.float().flatten(0, 1), codes[..., k].flatten())
              for k, x in enumerate(logits)]  # fmt: skip
        optimizer.zero_grad()
        torch.stack(ce).mean().backward()
        if run.clip:
            nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        optimizer.step()
        losses.append(float(torch.stack(ce).mean().detach()))
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 0.01)
    best = min((float(np.mean(losses[i : i + 20])) for i in range(max(1, run.steps - 20))),
               default=math.inf) if losses else math.inf  # fmt: skip
    cfg = {"data": [str(folder)], "d_model": run.width, "layers": run.layers, "heads": run.heads,
           "ctx": run.ctx, "lr": run.lr, "epochs": 300, "amp": run.bf16}  # fmt: skip
    return {
        "model": model.state_dict(), "opt": optimizer.state_dict(), "scaler": {}, "scheduler": {},
        "epoch": 12, "best_val": best, "cfg": cfg, "vocab_sizes": sizes, "global_step": run.steps,
        "saved_at": "2025-08-01 10:11:12", "ema": average.state_dict(),
    }  # fmt: skip


Content = dict[str, Any]

# --- this trainer --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Own:
    """A training by train_rvq.py."""

    data: str
    flags: str
    blown: tuple[int, float] | None = None  # from this step on at that lr, without the guard
    qk_norm: bool = True  # False as of a version that had a flag for it


COMMON = (
    "--device cpu --num_workers 0 --eval-audio-every 0 --quiet --log-lr-steps 5 --no-report "
    "--save-every-minutes 0 --archive-every 0 --epochs 400 --val-every 4 "
)
SMALL = "--d_model 32 --layers 2 --heads 2 --ctx 32 --batch 4 --accum 1 "
DEEP = "--d_model 48 --layers 5 --heads 4 --ctx 64 --batch 2 --accum 1 "
WIDE = "--d_model 96 --layers 2 --heads 3 --ctx 64 --step 64 --batch 4 --accum 1 "


def train_own(run: Own, data: Path, folder: Path) -> Path:
    """Its `latest`."""
    sabotage = None
    if run.blown:
        onset, lr = run.blown
        sabotage = Sabotage(onset, (), lr=lambda _, __: lr, guarded=False)
    words = ["--data", str(data), "--save_dir", str(folder), *COMMON.split(), *run.flags.split()]
    log, pick = folder.with_name(folder.name + ".log"), setup.pick_architecture

    def as_then(*arguments: Any) -> tuple[ModelConfig, Content | None]:
        config, source = pick(*arguments)
        return dataclasses.replace(config, qk_norm=run.qk_norm), source

    with mock.patch.object(setup, "pick_architecture", as_then):
        if train(words, sabotage, log) != 0:
            raise RuntimeError(f"{log}: the trainer failed")
    return next(folder.glob("*_latest.pt"))


# --- the set -------------------------------------------------------------------------------------

ADAMW, MUON = "--optim adamw --pattern parallel ", "--optim muon "
HEALTHY: dict[str, Own | Old] = {
    "adamw": Own("tunes", SMALL + ADAMW + "--lr 3e-3 --max-steps 400"),
    "adamw without qk-norm": Own(
        "tunes", SMALL + ADAMW + "--lr 3e-3 --max-steps 400", qk_norm=False
    ),
    "muon, depth": Own("tunes", SMALL + MUON + "--lr 3e-4 --max-steps 300"),
    "muon, delay": Own("nines", SMALL + MUON + "--pattern delay --max-steps 250"),
    "muon, hot": Own("tunes", SMALL + MUON + "--pattern parallel --lr 1e-3 --max-steps 300"),
    "one step": Own("tunes", SMALL + ADAMW + "--lr 3e-3 --max-steps 1"),
    "twelve steps": Own("nines", SMALL + MUON + "--lr 1e-3 --max-steps 12"),
    "high dropout": Own("nines", SMALL + MUON + "--dropout 0.5 --code-dropout 0.3 --max-steps 250"),
    "learned by heart": Own(
        "tiny",
        SMALL
        + ADAMW
        + "--lr 2e-3 --dropout 0 --weight-decay 0 --label-smoothing 0 --max-steps 900",
    ),
    "fine-tuned": Own("tunes", SMALL + "--lr 1e-4 --init-from {adamw} --max-steps 60"),
    "fp16, wsd": Own(
        "tunes", SMALL + ADAMW + "--lr 1e-3 --amp-dtype fp16 --schedule wsd --max-steps 200"
    ),
    "strong decay": Own(
        "pairs", DEEP + ADAMW + "--lr 2e-3 --weight-decay 0.3 --decay-all --max-steps 200"
    ),
    "deep": Own("nines", DEEP + MUON + "--pattern delay --max-steps 150", qk_norm=False),
    "wide": Own("pairs", WIDE + MUON + "--lr 1e-4 --max-steps 120"),
    "float32": Own("nines", SMALL + ADAMW + "--lr 1e-2 --no-amp --max-steps 250"),
    "real tokens": Own("tokens", WIDE + ADAMW + "--lr 1e-3 --max-steps 80"),
    "long": Own("tunes", SMALL + ADAMW + "--lr 3e-3 --dropout 0 --max-steps 2500"),
    "long, muon": Own("tunes", SMALL + MUON + "--pattern parallel --max-steps 2500"),
    "old": Old("tunes"),
    "old, before the first step": Old("tunes", steps=0),
    "old, one step": Old("pairs", steps=1),
    "old, normal weights": Old("tunes", std=0.02, width=64, layers=3, heads=4),
    "old, deep": Old("nines", layers=6, steps=200, lr=2e-3),
    "old, long": Old("tunes", steps=3000),
    "old, hot": Old("pairs", lr=1e-2),
    "old, learned by heart": Old("tiny", steps=1500, lr=3e-3),
    "old, bf16": Old("nines", bf16=True),
    "old, real tokens": Old("tokens", width=64, heads=4, ctx=64, steps=80),
}
BLOWN: dict[str, Own | Old] = {
    "muon at lr 0.1": Own("tunes", SMALL + MUON + "--max-steps 160", (80, 0.1)),
    "muon at lr 0.1 from the start": Own("nines", SMALL + MUON + "--max-steps 100", (0, 0.1)),
    "muon at lr 0.2, parallel": Own(
        "tunes", SMALL + MUON + "--pattern parallel --seed 3 --max-steps 160", (80, 0.2)
    ),
    "muon at lr 0.1, delay": Own(
        "pairs", DEEP + MUON + "--pattern delay --max-steps 120", (60, 0.1)
    ),
    "muon at lr 0.1, float32": Own("nines", SMALL + MUON + "--no-amp --max-steps 120", (60, 0.1)),
    "adamw at lr 3": Own("tunes", SMALL + ADAMW + "--lr 3e-3 --max-steps 160", (80, 3.0)),
    "old at lr 0.1": Old("tunes", steps=200, blown=(100, 0.1)),
    "old at lr 0.1, normal weights": Old(
        "tunes", std=0.02, width=64, layers=3, heads=4, steps=200, blown=(100, 0.1), seed=1
    ),
    "old at lr 0.2, not clipped": Old("nines", steps=160, clip=0.0, blown=(80, 0.2)),
    "old at lr 0.1, bf16": Old("pairs", steps=160, bf16=True, blown=(80, 0.1)),
    "old at lr 1": Old("tunes", steps=120, blown=(60, 1.0)),
}


def _scaled(factor: float, *words: str, parts: tuple[str, ...] = ("model", "ema")) -> Any:
    """All tensors whose names have one of the words, in the raw weights and the average."""

    def spoil(c: Content) -> None:
        for part in parts:
            for name, tensor in c[part].items():
                if any(word in name for word in words):
                    c[part][name] = tensor * factor

    return spoil


def _codebook(table: str, k: int, change: Callable[[Tensor], Tensor]) -> Any:
    """Rows of codebook k in the head or the embedding, of either layout."""

    def spoil(c: Content) -> None:
        for part in ("model", "ema"):
            weights = c[part]
            if (name := f"{table}s.{k}.weight") in weights:
                weights[name] = change(weights[name])
            else:
                whole = weights[f"{table}.weight"].clone()
                sizes = c["architecture"]["vocab_sizes"]
                rows = whole.unflatten(0, (len(sizes), -1))
                rows[k] = change(rows[k])
                weights[f"{table}.weight"] = whole

    return spoil


def _drifted(rows: Tensor) -> Tensor:
    """Pushed one way, to six times the rows' own size."""
    way = torch.linspace(-1, 1, rows.shape[1])
    return rows + 6 * way / way.norm() * rows.norm(dim=1).square().mean().sqrt()


def _drifted_bias(c: Content) -> None:
    for part in ("model", "ema"):
        c[part]["heads.2.bias"] = c[part]["heads.2.bias"] + torch.linspace(5, 40, 64)


# What is spoiled, how, and what must be named.
SPOILED: dict[str, tuple[str, Callable[[Content], None], str]] = {
    "matrices x 30": ("adamw", _scaled(30, "attn.", "mlp."), "blocks."),
    "matrices x 30, muon": ("muon, depth", _scaled(30, "attn.", "mlp."), "blocks."),
    "one matrix x 30, raw": ("adamw", _scaled(30, "blocks.1.mlp.up", parts=("model",)), "1.mlp.up"),
    "one matrix x 30 of five": ("deep", _scaled(30, "blocks.3.attn.out"), "blocks.3.attn.out"),
    "a head x 1500": ("muon, delay", _codebook("head", 4, lambda w: 1500 * w), "codebook 4"),
    "a head that drifted": ("muon, depth", _codebook("head", 2, _drifted), "codebook 2"),
    "an embedding x 1500": ("long", _codebook("embed", 1, lambda w: 1500 * w), "codebook 1"),
    "embeddings x 30": ("adamw", _scaled(30, "embed"), "embed"),
    "gains x 40": ("muon, delay", _scaled(40, "blocks.0.norm2"), "blocks.0.norm2"),
    "qkv x 12, no qk-norm": ("adamw without qk-norm", _scaled(12, "0.attn.qkv"), "0.attn.qkv"),
    "q and k gains x 15": ("adamw", _scaled(15, "1.attn.q_norm", "1.attn.k_norm"), "1.attn.q_norm"),
    "old: matrices x 30, a head x 1500": (
        "old",
        lambda c: (_scaled(30, "attn.", "mlp.")(c), _scaled(1500, "heads.1.weight")(c)),
        "heads.1",
    ),
    "old: matrices x 30": ("old, normal weights", _scaled(30, "attn.", "mlp."), "blocks."),
    "old: a head x 1500": ("old, deep", _codebook("head", 7, lambda w: 1500 * w), "heads.7"),
    "old: a bias that drifted": ("old, long", _drifted_bias, "heads.2.bias"),
    "old: last gain x 40": ("old, real tokens", _scaled(40, "ln_f.weight"), "ln_f"),
    "old: qkv x 12": ("old, bf16", _scaled(12, "blocks.1.attn.qkv"), "blocks.1.attn.qkv"),
    "old: embeddings x 30": ("old, hot", _scaled(30, "embeds."), "embeds"),
    "old: NaN": ("old", _scaled(math.nan, "blocks.1.mlp.3"), "blocks.1.mlp.3"),
}
TRUTH: dict[str, str | None] = {
    **dict.fromkeys(HEALTHY),
    **dict.fromkeys(BLOWN, ""),
    **{name: where for name, (_, _, where) in SPOILED.items()},
}


def make(root: Path, name: str) -> Path:
    """The path of one checkpoint, in a folder of its own and nothing beside it."""
    folder = root / "alone" / name.replace(" ", "_").replace(",", "").replace(":", "")
    if found := list(folder.glob("*.pt")):
        return found[0]
    if name in SPOILED:
        base, spoil, _ = SPOILED[name]
        source = make(root, base)
        content = read(source)
        spoil(content)
    else:
        run = {**HEALTHY, **BLOWN}[name]
        data = data_at(root, run.data)
        if isinstance(run, Old):
            content, source = train_old(run, data), Path("rvq_4cb_latest.pt")
        else:
            flags = run.flags
            if "{adamw}" in flags:
                flags = flags.format(adamw=make(root, "adamw"))
            work = root / "work" / folder.name
            work.parent.mkdir(parents=True, exist_ok=True)
            source = train_own(Own(run.data, flags, run.blown), data, work)
            content = read(source)
            shutil.rmtree(work)
    folder.mkdir(parents=True)
    if "progress" in content:
        save_checkpoint({k: v for k, v in content.items() if k != "format"}, folder / source.name)
    else:
        torch.save(content, folder / source.name)
    return folder / source.name


def data_at(root: Path, name: str) -> Path:
    """The folder of a training's data, made where it is not there."""
    if name == "tokens":
        return TOKENS
    folder = root / name
    if not folder.exists():
        make_data(folder, **DATA[name], seed=sorted(DATA).index(name))
    return folder
