"""The yardstick: a plain GPT over RVQ codes.

    python benchmarks/plain_gpt.py --train TRAIN/*.npq --val VAL/*.npq --seconds 600 --lr 1e-3

K embedding tables summed, learned positions, LayerNorm, GELU, K separate heads that see only the
past frames, eager AdamW. Prints one JSON line per evaluation: training seconds, steps, val (nats
per code), CE per codebook, frames per second. Its clock counts training steps only. `learning.py`
gives it the same files, windows, shape and seconds as the trainer.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB_SIZE = 1024


def read_npq(path: str) -> Tensor:
    """Codes [T, K], int64."""
    with open(path, "rb") as file:
        magic, version, k, _, _, t = struct.unpack("<4sHHffI", file.read(20))
    assert magic == b"NPQ1", path
    assert version == 1, path
    codes = np.memmap(path, dtype="<u2", mode="r", offset=21 + 4 * k)
    return torch.from_numpy(codes.reshape(t, k).astype(np.int64))


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm."""

    def __init__(self, d: int, h: int, p: float) -> None:
        super().__init__()
        self.h, self.p = h, p
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.o = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(d, 4 * d), nn.GELU(), nn.Dropout(p), nn.Linear(4 * d, d), nn.Dropout(p)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            z.view(b, t, self.h, d // self.h).transpose(1, 2)
            for z in self.qkv(self.n1(x)).chunk(3, -1)
        )
        dropout = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.n2(x))


class PlainGPT(nn.Module):
    """Codes [B, T, K] to K logits [B, T, V], aligned with the codes."""

    def __init__(
        self, k: int, v: int, d: int, layers: int, heads: int, ctx: int, p: float = 0.1
    ) -> None:
        super().__init__()
        self.k, self.v = k, v
        self.emb = nn.ModuleList(nn.Embedding(v + 1, d) for _ in range(k))  # entry v begins
        self.pos = nn.Embedding(ctx, d)
        self.blocks = nn.ModuleList(Block(d, heads, p) for _ in range(layers))
        self.nf = nn.LayerNorm(d)
        self.heads = nn.ModuleList(nn.Linear(d, v) for _ in range(k))
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)

    def forward(self, codes: Tensor) -> list[Tensor]:
        past = torch.cat((torch.full_like(codes[:, :1], self.v), codes[:, :-1]), 1)
        x = sum(e(past[..., i]) for i, e in enumerate(self.emb)) + self.pos.weight[: codes.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.nf(x)
        return [head(x) for head in self.heads]

    def losses(self, codes: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of each codebook [K], nats."""
        logits = self(codes)
        return torch.stack(
            [
                F.cross_entropy(
                    logits[i].reshape(-1, self.v),
                    codes[..., i].reshape(-1),
                    label_smoothing=smoothing,
                )
                for i in range(self.k)
            ]
        )


def amp() -> torch.autocast:
    """bf16 where it pays."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def evaluate(model: PlainGPT, windows: list[Tensor]) -> Tensor:
    """Mean cross-entropy of each codebook [K]."""
    total = torch.zeros(model.k)
    model.eval()
    with torch.no_grad(), amp():
        for i in range(0, len(windows), 8):
            some = windows[i : i + 8]
            total += model.losses(torch.stack(some)).float() * len(some)
    model.train()
    return total / len(windows)


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train", nargs="+", required=True)
    parser.add_argument("--val", nargs="+", required=True)
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--wd", type=float, default=0.02)
    parser.add_argument("--seconds", type=float, default=300, help="of training; 0 = no limit")
    parser.add_argument("--evals", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=0, help="0 = no limit")
    flags = parser.parse_args()
    if not flags.seconds and not flags.max_steps:
        parser.error("--seconds 0 needs --max-steps")
    return flags


def main() -> None:
    """Train for the steps or seconds asked for and print a line at each evaluation."""
    a = parse_flags()
    torch.manual_seed(a.seed)
    rng = np.random.default_rng(a.seed)
    train = [read_npq(f) for f in a.train]
    starts = [(i, s) for i, x in enumerate(train) for s in range(0, len(x) - a.ctx + 1, a.ctx // 2)]
    windows = [
        x[s : s + a.ctx] for x in map(read_npq, a.val) for s in range(0, len(x) - a.ctx + 1, a.ctx)
    ]
    model = PlainGPT(train[0].shape[1], VOCAB_SIZE, a.d, a.layers, a.heads, a.ctx, a.dropout)
    params = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, betas=(0.9, 0.95), weight_decay=a.wd)
    order: list[int] = []
    spent, step, due = 0.0, 0, 1
    model.train()
    while (share := share_done(a, step, spent)) < 1:
        started = time.perf_counter()
        if len(order) < a.batch:
            order = list(rng.permutation(len(starts)))
        chosen = [starts[order.pop()] for _ in range(a.batch)]
        batch = torch.stack([train[i][s : s + a.ctx] for i, s in chosen])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(a.lr, step, share)
        loss = update(model, optimizer, batch)
        step += 1
        spent += time.perf_counter() - started
        if share_done(a, step, spent) * a.evals >= due:
            report(a, spent, step, loss, evaluate(model, windows), params)
            due += 1


def share_done(a: argparse.Namespace, step: int, spent: float) -> float:
    """Of the budget of steps or of seconds, whichever is nearer to its end."""
    by_steps = step / a.max_steps if a.max_steps else 0.0
    return max(by_steps, spent / a.seconds if a.seconds else 0.0)


def learning_rate(peak: float, step: int, share: float) -> float:
    """50 steps of warm-up, times a cosine over the share of the run down to 5 %."""
    return peak * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))


def update(model: PlainGPT, optimizer: torch.optim.Optimizer, batch: Tensor) -> Tensor:
    """One step; the smoothed loss."""
    with amp():
        loss = model.losses(batch, 0.05).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def report(
    a: argparse.Namespace, spent: float, step: int, loss: Tensor, ce: Tensor, params: int
) -> None:
    """A JSON line."""
    row = {
        "seconds": round(spent, 1),
        "step": step,
        "train": round(loss.item(), 4),
        "val": round(float(ce.mean()), 4),
        "per_codebook": [round(float(x), 3) for x in ce],
        "frames_per_s": round(a.batch * a.ctx * step / spent),
        "params_m": round(params / 1e6, 2),
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
