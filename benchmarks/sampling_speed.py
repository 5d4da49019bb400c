"""Frames per second of sampling: cached, recomputing, Hugging Face's cached step, and the floor.

    python benchmarks/sampling_speed.py                 # 512 wide, 8 layers, ctx 512: two minutes
    python benchmarks/sampling_speed.py --patterns depth --batch 8 --compile --profile

One sample with a full context in every way, in turn, on the same model:

- ours: `sampling.generate`, after a prompt that fills the context, drawing included.
- recomputing: a whole forward pass over a full window for each frame, under autocast for bf16.
- Hugging Face: MusicgenForCausalLM's cached step at a full context, and a plain draw.
- floor: one pass over the bytes of the weights that a frame is multiplied with.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import measuring
import torch
from measuring import PEERS, in_turn, print_table, ratios, seconds_of, spread

from model import PATTERNS, CodesTransformer, ModelConfig
from sound.sampling import Draw, generate

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    measuring.add_shape(parser)
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--batch", type=int, default=1, help="samples drawn at once")
    parser.add_argument("--frames", type=int, default=64, help="of a round, cached ways")
    parser.add_argument("--slow-frames", type=int, default=2, help="of a round, recomputing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--profile", action="store_true", help="of ours, the first pattern")
    parser.add_argument("--json", help="file for all rates")
    return parser.parse_args()


def ours(
    model: CodesTransformer, prompt: torch.Tensor, flags: argparse.Namespace, dtype: torch.dtype
) -> Callable[[], float]:
    """Frames/s of `flags.frames` frames after the prompt, from the first of them to the last."""
    draw = Draw.of(flags.codebooks, top_k=flags.top_k)

    def take() -> float:
        times: list[float] = []

        def on_frame() -> None:
            if len(times) in (0, flags.frames - 1) and flags.device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.perf_counter())

        generate(
            model,
            flags.frames,
            ctx=flags.ctx,
            draw=draw,
            batch=flags.batch,
            prompt=prompt,
            compiled=flags.compile,
            dtype=dtype,
            on_frame=on_frame,
        )
        return (flags.frames - 1) / (times[flags.frames - 1] - times[0])

    return take


@torch.inference_mode()
def recompute(
    model: CodesTransformer, window: torch.Tensor, frames: int, draw: Draw, dtype: torch.dtype
) -> None:
    """Each frame from a whole forward pass over a full window."""
    generator = torch.Generator(window.device).manual_seed(0)
    mixed = dtype != torch.float32
    for _ in range(frames):
        with torch.autocast(window.device.type, torch.bfloat16, enabled=mixed):
            logits = model(window)[:, -1]
        drawn = draw(
            logits, torch.rand(logits.shape[:2], generator=generator, device=logits.device)
        )
        window = torch.cat((window[:, 1:], drawn[:, None]), dim=1)


def musicgen_steps(
    flags: argparse.Namespace, window: torch.Tensor, dtype: torch.dtype
) -> Callable[[], float] | None:
    """Frames/s of Musicgen's cached step behind a full window."""
    model = measuring.musicgen(flags)
    if model is None:
        return None
    model = model.eval().to(flags.device, dtype)
    codes = window.mT.flatten(0, 1)  # [B * K, T]
    generator = torch.Generator(flags.device).manual_seed(0)

    @torch.inference_mode()
    def take() -> float:
        seen = model(codes[:, : flags.ctx - flags.frames], use_cache=True)

        def draw_on() -> None:
            past, logits = seen.past_key_values, seen.logits
            for _ in range(flags.frames):
                shares = logits[:, -1].float().softmax(-1)
                drawn = torch.multinomial(shares, 1, generator=generator)
                step = model(drawn, past_key_values=past, use_cache=True)
                past, logits = step.past_key_values, step.logits

        return flags.frames / seconds_of(draw_on, device=flags.device)

    return take


def floor(model: CodesTransformer, dtype: torch.dtype, device: str) -> Callable[[], float]:
    """Times a second that the weights of all products can be read once.

    The depth transformer's blocks, used K times a frame, count once: they fit a processor's cache.
    """
    weights = [
        m.weight.detach().to(dtype) for m in model.modules() if isinstance(m, torch.nn.Linear)
    ]
    as_words = [w.flatten().view(torch.int32) for w in weights]
    return lambda: 1 / seconds_of(lambda: [w.max() for w in as_words], 5, device)


def main() -> int:
    """Measure and print."""
    flags = parse_flags()
    torch.manual_seed(0)
    shape = f"{flags.d_model}/{flags.layers}/{flags.heads}, ctx {flags.ctx} full"
    print(f"{shape}, {flags.codebooks} x {flags.vocab}, {flags.batch} at once, n = {flags.rounds}")
    print(measuring.machine(flags.device))
    window = torch.randint(flags.vocab, (flags.batch, flags.ctx, flags.codebooks))
    window = window.to(flags.device)
    kept: dict[str, measuring.Rates] = {}
    rows = []
    for dtype in flags.dtypes.split(","):
        for pattern in flags.patterns.split(","):
            ways = make_ways(flags, pattern, DTYPES[dtype], window)
            rates = kept[f"{dtype} {pattern}"] = in_turn(ways, flags.rounds)
            rows.append(row_of(f"{dtype}, {pattern}", rates))
    print_table(
        ["", "ours, frames/s", "recomputing", "ours over it", "Musicgen cached", "ours over it",
         "floor", "% of it"],
        rows,
    )  # fmt: skip
    print("real time of the 44.1 kHz codec: 86 frames/s")
    measuring.write_json(flags.json, flags=vars(flags), rates=kept)
    if flags.profile:
        ways = make_ways(flags, flags.patterns.split(",")[0], DTYPES["bf16"], window)
        with torch.profiler.profile() as profiled:
            ways["ours"]()
        print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
    return 0


def make_ways(
    flags: argparse.Namespace, pattern: str, dtype: torch.dtype, window: torch.Tensor
) -> dict[str, Callable[[], float]]:
    """All ways on one model."""
    sizes = (flags.vocab,) * flags.codebooks
    config = ModelConfig(sizes, flags.d_model, flags.layers, flags.heads, pattern=pattern)
    model = CodesTransformer(config).to(flags.device).eval()
    draw, n = Draw.of(flags.codebooks), flags.slow_frames

    def slow() -> float:
        return n / seconds_of(lambda: recompute(model, window, n, draw, dtype))

    ways = {"ours": ours(model, window[0], flags, dtype), "recomputing": slow}
    if flags.peers and (peer := musicgen_steps(flags, window, dtype)):
        ways["musicgen"] = peer
    return {**ways, "floor": floor(model, dtype, flags.device)}


def row_of(name: str, rates: measuring.Rates) -> list[str]:
    """Of the table."""
    fast = rates["ours"]
    shares = [100 * r for r in ratios(fast, rates["floor"])]
    peer = [PEERS, "-"]
    if "musicgen" in rates:
        peer = [spread(rates["musicgen"]), spread(ratios(fast, rates["musicgen"]), ".1f")]
    slow = [
        spread(rates["recomputing"], ".1f"),
        spread(ratios(fast, rates["recomputing"]), ".1f"),
    ]
    return [name, spread(fast), *slow, *peer, spread(rates["floor"]), spread(shares)]


if __name__ == "__main__":
    sys.exit(main())
