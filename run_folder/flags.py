"""The flags of a run, each declared once: what it means, and what a resume and others do with it.

    parser = FlagParser(__file__, usage="%(prog)s --data GLOB [flags]")
    add_to(parser)
    names("run", "architecture")                         # what a card of shared weights lists
    command_words({"lr": 1e-4, "amp": False})            # [["--lr", "0.0001"], ["--no-amp"]]

They are part of what a run leaves on the disk, so they stand below all that read them: the trainer,
the card of shared weights, the doctor. Scopes:

- run: shapes what is trained, or which of it is the best. A resume keeps it unless another value is
  given; a card names it, and so does the doctor's command for a new run.
- architecture: as run, but a resume keeps it whatever is given, unless --ignore-arch is.
- machine: where, how fast, what is kept and shown. A resume keeps it unless another value is given.
- command: of one start, never taken from a checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cli.command_line import (
    Once,
    Several,
    at_least,
    file_path,
    fraction,
    fraction_or_one,
    not_negative,
    number_or_auto,
    positive,
)

Scope = Literal["run", "architecture", "machine", "command"]
SWITCH = argparse.BooleanOptionalAction


@dataclass(frozen=True)
class Flag:
    """A flag as the parser takes it, and what follows from a value of it."""

    spelling: str  # `--d_model`
    group: str  # its title in --help
    scope: Scope
    options: dict[str, Any]  # of add_argument
    moves_loss: bool = False  # shifts loss or gradient norm: the guard learns their level anew
    is_budget: bool = False  # ends the run; a cosine keeps the length that it began with
    is_settled: bool = False  # `auto` becomes a value at the first start, and that is saved
    may_differ: bool = False  # among the processes of a run; paths may in any case
    before: Any = None  # what a run did that was saved before the flag existed

    @property
    def is_path(self) -> bool:
        """Whether it names files."""
        return self.options.get("type") is file_path


FLAGS: dict[str, Flag] = {}  # by name in the parsed flags, in the order of --help
# Flags that moved the loss or its gradient and have gone, with the value that did nothing.
GONE_FLAGS = {"z_loss": 0.0, "embed_grad": 1.0}


def in_group(title: str) -> Callable[..., None]:
    """The function that declares a flag of a group: spelling, fields of Flag, add_argument's."""

    def add(spelling: str, *, scope: Scope, **options: Any) -> None:
        facts = {n: options.pop(n) for n in Flag.__annotations__.keys() & options.keys()}
        name = spelling[2:].replace("-", "_")
        FLAGS[name] = Flag(spelling, title, scope, options, **facts)

    return add


# --- the flags; defaults are run #3 of the notes that this trainer was made for ------------------

# fmt: off
add = in_group("data")
add("--data", scope="machine", type=file_path, action=Several, nargs="+", metavar="GLOB",
    help="globs, folders or .npq files")
add("--ctx", scope="run", type=at_least(2), default=512, help="frames in a window")
add("--step", scope="run", type=at_least(1),
    help="frames between window starts; without it ctx // 2")
add("--jitter", scope="run", moves_loss=True, before=False, action=SWITCH, default=True,
    help="shift training windows from epoch to epoch")
add("--val_split", scope="run", type=fraction, default=0.05,
    help="share of the data that validates")
add("--val-list", scope="machine", type=file_path, action=Once, metavar="FILE",
    help="text file of validation files; overrides --val_split")
add("--codebooks", scope="architecture", type=at_least(1),
    help="use the first so many codebooks of each file")
add("--skip-bad-files", scope="machine", action="store_true",
    help="train without files that are not valid .npq")
add("--num_workers", scope="machine", may_differ=True, type=at_least(0, 256), default=2,
    help="threads that read ahead; 0 = each micro-batch is read when its turn comes")
add("--persistent-workers", scope="machine", may_differ=True, action=SWITCH, default=True,
    help="taken for older commands' sake: threads stay in any case")
add("--prefetch", scope="machine", may_differ=True, type=at_least(1, 1000), default=6,
    help="micro-batches that each thread reads ahead")

add = in_group("model")
add("--d_model", scope="architecture", type=at_least(2, 65536), default=768, help="width")
add("--layers", scope="architecture", type=at_least(1, 1000), default=16, help="transformer blocks")
add("--heads", scope="architecture", type=at_least(1), default=12, help="attention heads")
add("--dropout", scope="run", moves_loss=True, type=fraction, default=0.1,
    help="on embeddings and on each block's two outputs")
add("--pattern", scope="architecture", before="parallel",
    choices=("parallel", "delay", "depth"), default="depth",
    help="what a code may depend on within its frame; see model.py")
add("--depth-share", scope="run", type=fraction_or_one, default=0.5,
    help="depth: share of the frames in each micro-batch that its loss is made of")
add("--code-dropout", scope="run", moves_loss=True, type=fraction, default=0.0,
    help="share of the input codes that training hides")
add("--grad-checkpoint", scope="machine", action=SWITCH, default=False,
    help="recompute blocks to save memory")

add = in_group("optimisation")
add("--batch", scope="run", moves_loss=True, is_settled=True, type=number_or_auto, default=6,
    metavar="N|auto",
    help="windows in a micro-batch; auto: the most that fit, and --accum to match")
add("--accum", scope="run", moves_loss=True, type=at_least(1), default=6,
    help="micro-batches in an optimizer step, over all processes")
add("--effective-batch", scope="command", type=at_least(1, 10**9), metavar="N",
    help="windows in an optimizer step: sets --accum to N / --batch; auto without it: 36")
add("--epochs", scope="run", is_budget=True, type=at_least(1), default=250,
    help="with windows half a --ctx apart, one is two passes over the music")
add("--max-steps", scope="run", is_budget=True, type=at_least(1),
    help="end after so many optimizer steps")
add("--max-seconds", scope="run", is_budget=True, type=positive,
    help="end after so many training seconds, over all starts")
add("--patience", scope="run", type=positive, metavar="N",
    help="end after so many passes over the music without a lower val")
add("--optim", scope="run", before="adamw", choices=("muon", "adamw"), default="muon",
    help="muon: Muon for matrices within the model at 100 x --lr, AdamW for the rest at 25 x, "
         "less for a wide head")
add("--lr", scope="run", type=positive, default=2e-4, help="peak learning rate")
add("--schedule", scope="run", choices=("cosine", "wsd"), default="cosine",
    help="of the lr after warm-up: a cosine, or stable and then a linear cooldown")
add("--cooldown", scope="run", type=fraction_or_one, default=0.2,
    help="wsd: share of the run that it takes")
add("--weight-decay", scope="run", type=not_negative, default=0.02,
    help="on the matrices of the blocks and head")
add("--warmup-ratio", scope="run", type=fraction, default=0.01,
    help="share of the run with rising lr")
add("--eta-min", scope="run", type=not_negative, default=1e-5,
    help="lr at and after the end of the schedule")
add("--ema", scope="run", type=fraction, default=0.999, help="decay of the averaged weights")
add("--label-smoothing", scope="run", moves_loss=True, type=fraction, default=0.05,
    help="share spread over all entries")
add("--cb-weights", scope="run", moves_loss=True, default="auto", metavar="auto|w0,w1,...",
    help="codebooks' loss weights")
add("--cb-weights-auto-alpha", scope="run", moves_loss=True, type=not_negative, default=0.5,
    help="auto: 1 + alpha * k / (K - 1)")
add("--grad-clip", scope="run", type=not_negative, default=1.0,
    help="largest gradient norm; 0 = off")
add("--seed", scope="run", type=at_least(0), default=0, help="of weights, dropout and data order")

add = in_group("stability")
add("--outlier-skip-factor", scope="run", type=not_negative, default=6.0,
    help="refuse steps so many sigma above the recent past; 0 = only absolute limits")
add("--outlier-ema-beta", scope="run", type=fraction, default=1 - 1 / 128,
    help="the guard looks back over 1 / (1 - beta) accepted steps")
add("--decay-all", scope="run", action=SWITCH, default=False,
    help="weight decay on embeddings and gains as well")
add("--panic-lr-mul", scope="run", type=positive, default=0.5,
    help="factor on lr at each rollback")
add("--panic-snapshot", scope="machine", action=SWITCH, default=False,
    help="keep the state before a rollback too, as *_quarantine_sNNNNNNNN.pt")

add = in_group("speed")
add("--device", scope="machine", metavar="NAME",
    help="cuda, cuda:1, mps or cpu; without it the best device present")
add("--amp", scope="run", action=SWITCH, default=True, help="mixed precision")
add("--amp-dtype", scope="run", is_settled=True, choices=("auto", "bf16", "fp16"), default="auto",
    help="auto: bf16 where the device is fast in it, else fp16, on a CPU float32")
add("--compile", scope="machine", action=SWITCH, help="torch.compile; without it on for CUDA only")
add("--compile-mode", scope="machine", choices=("default", "reduce-overhead", "max-autotune"),
    default="default",
    help="reduce-overhead and max-autotune use CUDA graphs")
add("--fused-optim", scope="machine", action=SWITCH, default=True, help="fused AdamW")

add = in_group("planning")
add("--plan", scope="command", action="store_true",
    help="print memory, time and disk that the run will take, and do nothing else")
add("--memory-gb", scope="command", type=positive,
    help="memory to fit into, GiB; without it what is free on the device, if that is here")
add("--device-tflops", scope="command", type=positive,
    help="TFLOP/s of the device's matrix products; without it a step is timed, if that is here")
add("--mfu", scope="command", type=fraction_or_one, default=0.35,
    help="share of them that training reaches")

add = in_group("checkpoints")
add("--save_dir", scope="command", type=file_path, metavar="DIR", default="rvq_ckpts",
    help="folder of the run's files")
add("--tag", scope="machine", default="", help="part of the files' names")
add("--resume", scope="command", type=file_path, metavar="PATH",
    help="go on from this checkpoint and not from *_latest.pt")
add("--no-resume", scope="command", action="store_true",
    help="start anew; an earlier run's files are set aside")
add("--init-from", scope="command", type=file_path, metavar="PATH",
    help="start a new run from the EMA weights of a checkpoint or .safetensors")
add("--ignore-arch", scope="command", action="store_true",
    help="take the architecture from flags when resuming")
add("--allow-data-change", scope="command", action="store_true",
    help="resume although data or windows changed")
add("--archive-every", scope="machine", type=at_least(0), default=10,
    help="epochs between archives; 0 = none")
add("--keep-archived", scope="machine", type=at_least(1), default=20,
    help="archives of each kind to keep")
add("--save-every-minutes", scope="machine", type=not_negative, default=15.0,
    help="within epochs; 0 = never")

add = in_group("evaluation")
add("--val-every", scope="run", type=at_least(1), default=1, help="epochs between validations")
add("--val-every-seconds", scope="run", type=positive,
    help="training seconds between validations; overrides --val-every")
add("--eval-audio-every", scope="machine", type=at_least(0), default=5,
    help="epochs between samples; 0 = none")
add("--eval-frames", scope="machine", type=at_least(1), default=1290,
    help="length of a sample (1290 = 15 s)")
add("--eval-temperature", scope="machine", type=positive, default=1.0, help="of sampling")
add("--eval-top-k", scope="machine", type=at_least(0), default=0,
    help="draw from the k likeliest; 0 = all")
add("--eval-top-p", scope="machine", type=fraction_or_one, default=1.0,
    help="draw from this much probability")
add("--eval-outdir", scope="machine", type=file_path, metavar="DIR",
    help="folder of samples; without it `samples` in --save_dir")
add("--eval-on-cpu", scope="machine", action=SWITCH, default=True, help="decode audio on the CPU")
add("--eval-dac-repo", scope="run", type=file_path, default="44khz", metavar="CODEC",
    help="codec of samples: 44khz, 24khz, 16khz, demo (bundled, lo-fi) or a path")

add = in_group("logging")
add("--log-lr-steps", scope="machine", type=at_least(1), default=50,
    help="steps between loss and lr lines")
add("--report", scope="machine", action=SWITCH, default=True,
    help="keep *_report.html up to date: curves, sound and facts of the run on one page")
add("--quiet", scope="command", action="store_true",
    help="no bar, no start-up details, no library warnings")
add("--tensorboard", scope="machine", action=SWITCH, default=False,
    help="write event files beside the metrics")
# fmt: on

# --- what follows from them ----------------------------------------------------------------------


def add_to(parser: argparse.ArgumentParser) -> None:
    """Declare all flags, by group."""
    for title, flags in itertools.groupby(FLAGS.values(), key=lambda flag: flag.group):
        group = parser.add_argument_group(title)
        for flag in flags:
            group.add_argument(flag.spelling, **flag.options)


def names(*scopes: Scope) -> list[str]:
    """Those of some scopes."""
    return [name for name, flag in FLAGS.items() if flag.scope in scopes]


def saved_flags(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's flags, and what its run did by flags that its version did not have."""
    before = {name: flag.before for name, flag in FLAGS.items() if flag.before is not None}
    return {**before, **checkpoint["flags"]}


def gone_flags(saved: Mapping[str, Any]) -> list[str]:
    """Names of the saved flags that did something and that this version no longer has."""
    return [name for name, idle in GONE_FLAGS.items() if saved.get(name, idle) != idle]


def spelled(name: str) -> str:
    """`--cb-weights` for `cb_weights`, of a flag that has gone too."""
    return f"--{name.replace('_', '-')}"


def command_words(values: Mapping[str, Any]) -> list[list[str]]:
    """Each flag with its values, as a command has them; None and a switch that cannot be off go."""
    words = []
    for name, value in values.items():
        is_switch = FLAGS[name].options.get("action") is SWITCH
        if isinstance(value, bool):
            if value or is_switch:
                words.append([spelled(name if value else f"no_{name}")])
        elif value is not None:
            listed = value if isinstance(value, list) else [value]
            words.append([spelled(name), *map(str, listed)])
    return words
