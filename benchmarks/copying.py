"""Is what copies found, and nothing else; seconds and memory of the search in hours of music.

    python benchmarks/copying.py             # the bundled tokens; 75 hours are made, 0.4 GB
    python benchmarks/copying.py --data npq_out --hours 0 --frames 1290

Half of the files are training music, the others are held out. Excerpts of two seconds of the first
are planted in noise, as they are or with one frame in eight changed. The limit of half of the
held-out excerpts is tried on the others. The hours are pieces of the training music beside as much
noise.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_path import npq1_head
from measuring import machine, print_table

from sound.copying import ONE_IN, Shared, Track, copy_warning, figures, longest_runs
from sound.corpus import find_npq_files
from sound.npq_format import map_codes, read_header

RATE = 44_100 / 512  # frames per second
TWO_SECONDS = 172  # frames
TRACK = 15_504  # frames, three minutes
Codes = np.ndarray


def tracks_of(paths: list[str]) -> list[Track]:
    """Whole files."""
    return [Track(h, 0, h.num_frames) for h in map(read_header, paths)]


def excerpts(tracks: list[Track], frames: int) -> list[Codes]:
    """All of them that do not overlap, [frames, K] each, in random order."""
    found = [
        np.array(map_codes(track.header)[first : first + frames])
        for track in tracks
        for first in range(0, track.stop - frames + 1, frames)
    ]
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order]


def planted(tracks: list[Track], count: int, changed: int) -> tuple[list[Codes], list[tuple]]:
    """Noise with an excerpt in each, of which so many frames are changed; where it is from."""
    rng = np.random.default_rng(changed)
    samples, places = [], []
    while len(samples) < count:
        track = tracks[rng.integers(len(tracks))]
        first = int(rng.integers(track.stop - TWO_SECONDS))
        excerpt = np.array(map_codes(track.header)[first : first + TWO_SECONDS])
        if len(np.unique(excerpt[:, :3], axis=0)) < TWO_SECONDS // 8:
            continue  # silence
        at = rng.choice(TWO_SECONDS, changed, replace=False)
        excerpt[at] = (excerpt[at] + rng.integers(1, 1024, size=(changed, excerpt.shape[1]))) % 1024
        noise = rng.integers(1024, size=(2 * TWO_SECONDS, excerpt.shape[1]))
        samples.append(np.concatenate((noise[:TWO_SECONDS], excerpt, noise[TWO_SECONDS:])))
        places.append((track.header.path, first - TWO_SECONDS))
    return samples, places


def flagged(shared: list[Shared], frames: int, held_out: int) -> int:
    """How many of samples of so many frames would be a warning."""
    found = (figures(each, frames, held_out, RATE) for each in shared)
    return sum(copy_warning(of_one) is not None for of_one in found)


def longest(shared: list[Shared]) -> int:
    """Frames of the longest near run."""
    return max(each.near.frames for each in shared)


def quality(tracks: list[Track], args: argparse.Namespace) -> list[list[str]]:
    """What is found, and what is flagged, by the limit of the other half of held-out music."""
    music, held_out = tracks[::2], excerpts(tracks[1::2], args.frames)[: 2 * args.count]
    half = len(held_out) // 2
    shared = longest_runs(held_out, music)
    limits = longest(shared[:half]), longest(shared[half:])
    rows = []
    for changed in (0, TWO_SECONDS // ONE_IN):
        samples, places = planted(music, args.count, changed)
        runs = longest_runs(samples, music)
        at_place = sum(
            (each.near.path, each.near.start - each.near.at) == place
            for each, place in zip(runs, places, strict=True)
        )
        least = min(each.near.frames for each in runs)
        warned = flagged(runs, 3 * TWO_SECONDS, max(limits))
        told = f"{at_place} at their place, {least} frames at least; {warned} flagged"
        rows.append(
            [f"planted excerpts of 172 frames, {changed} of them changed", told, str(len(runs))]
        )
    both = (
        flagged(shared[half:], args.frames, limits[0]),
        flagged(shared[:half], args.frames, limits[1]),
    )
    told = f"{both[0]} and {both[1]} flagged; the longest are {limits[0]} and {limits[1]} frames"
    rows.append(
        [f"held-out excerpts of {args.frames} frames, by the other half's limit", told, str(half)]
    )
    by_heart = longest_runs(excerpts(music, args.frames)[: args.count], music)
    told = f"{flagged(by_heart, args.frames, max(limits))} flagged"
    rows.append([f"training excerpts of {args.frames} frames", told, str(len(by_heart))])
    return rows


def make_hours(folder: Path, tracks: list[Track], hours: float) -> list[Track]:
    """Files of three minutes: pieces of the tracks of 32 to 256 frames, every second file noise."""
    rng = np.random.default_rng(0)
    pool = np.concatenate([map_codes(track.header) for track in tracks])
    paths = []
    for number in range(round(hours * 3600 * RATE / TRACK)):
        pieces = rng.integers(32, 257, size=TRACK // 32)
        firsts = rng.integers(len(pool) - 256, size=len(pieces))
        frames = np.concatenate([f + np.arange(n) for f, n in zip(firsts, pieces, strict=True)])
        codes = pool[frames[:TRACK]]
        if number % 2:
            codes = rng.integers(1024, size=codes.shape)
        paths.append(str(folder / f"{number}.npq"))
        Path(paths[-1]).write_bytes(npq1_head(TRACK) + codes.astype("<u2").tobytes())
    return tracks_of(paths)


def memory_mib(field: str) -> float:
    """What this process has in memory (VmRSS), or had at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def searched(samples: list[Codes], music: list[Track]) -> list[str]:
    """A row of the table; in a fresh process, whose memory nothing else has taken before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins with what there is now
    before, read = memory_mib("VmRSS"), [0]
    wall, own = time.perf_counter(), time.process_time()
    longest_runs(samples, music, on_frames=read.append)
    wall, own = time.perf_counter() - wall, time.process_time() - own
    grown = memory_mib("VmHWM") - before
    what = f"{len(samples)} excerpts of {len(samples[0])} frames against {sum(read):,} frames"
    return [what, f"{wall:.1f} s, of the processor {own:.1f} s; {grown:.0f} MiB more", "1"]


def cost(tracks: list[Track], args: argparse.Namespace) -> list[list[str]]:
    """Seconds, and by how much the peak of memory grew, for one sample and 64 excerpts more."""
    samples = excerpts(tracks[1::2], args.frames)[:65]
    with tempfile.TemporaryDirectory() as folder:
        music = make_hours(Path(folder), tracks[::2], args.hours)
        context, rows = multiprocessing.get_context("spawn"), []
        for count in (1, len(samples)):
            with context.Pool(1) as pool:
                rows.append(pool.apply(searched, (samples[:count], music)))
    return rows


def main() -> None:
    """Print both tables as one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    tokens = str(Path(__file__).resolve().parents[1] / "examples" / "tokens")
    parser.add_argument(
        "--data", nargs="+", default=[tokens], help="folders or files, of 16-bit codes"
    )
    parser.add_argument("--frames", type=int, default=860, help="of an excerpt")
    parser.add_argument("--count", type=int, default=100, help="excerpts of a kind at most")
    parser.add_argument("--hours", type=float, default=75.0, help="of music to be made; 0 = none")
    args = parser.parse_args()
    tracks = tracks_of(sorted(find_npq_files(args.data)))
    print(machine())
    print_table(
        ["what", "result", "n"], quality(tracks, args) + (cost(tracks, args) if args.hours else [])
    )


if __name__ == "__main__":
    main()
