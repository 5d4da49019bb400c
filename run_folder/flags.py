"""The flags of a run, each declared once: what it means, and what a resume and others do with it.

    parser = FlagParser(__file__, usage="%(prog)s --data GLOB [flags]")
    add_to(parser)
    names("run", "architecture")                         # the flags on a card of shared weights
    command_words({"lr": 1e-4, "amp": False})            # [["--lr", "0.0001"], ["--no-amp"]]

A run saves its flags in its checkpoints, and the trainer, the card of shared weights and the doctor
read them from there. The scope of a flag decides how they are used:

- run: affects the trained weights or the choice of the best. A resume keeps the saved value unless
  another is given; the card and the doctor's command for a new run contain it.
- architecture: as run, but a resume keeps the saved value in any case, except with --ignore-arch.
- machine: affects place, speed, files kept and output. A resume keeps the saved value unless
  another is given.
- command: affects one start and is never taken from a checkpoint.
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
    or_auto,
    positive,
)

Scope = Literal["run", "architecture", "machine", "command"]
SWITCH = argparse.BooleanOptionalAction


@dataclass(frozen=True)
class Flag:
    """The declaration of a flag: arguments of add_argument, and how a resume treats its value."""

    spelling: str  # as on the command line, `--d_model`
    group: str  # title in --help
    scope: Scope
    options: dict[str, Any]  # keyword arguments of add_argument
    moves_loss: bool = False  # a change shifts loss or gradient norm, so the guard forgets them
    is_budget: bool = False  # ends the run; a cosine schedule keeps its first length all the same
    is_settled: bool = False  # the first start replaces `auto` by a value, which is saved
    may_differ: bool = False  # among the processes of a run, as paths may
    before: Any = None  # the value that runs without this flag, of older versions, trained with

    @property
    def is_path(self) -> bool:
        """Whether the value is a path or a list of paths."""
        return self.options.get("type") is file_path


FLAGS: dict[str, Flag] = {}  # by name in the parsed namespace, in the order of --help
# Removed flags that changed the loss or its gradient, with the value that had no effect.
GONE_FLAGS = {"z_loss": 0.0, "embed_grad": 1.0}


def in_group(title: str) -> Callable[..., None]:
    """Return a function that declares flags of a group.

    It takes the spelling, fields of `Flag`, and keyword arguments of add_argument.
    """

    def add(spelling: str, *, scope: Scope, **options: Any) -> None:
        facts = {n: options.pop(n) for n in Flag.__annotations__.keys() & options.keys()}
        name = spelling[2:].replace("-", "_")
        FLAGS[name] = Flag(spelling, title, scope, options, **facts)

    return add


# --- the flags -----------------------------------------------------------------------------------

# fmt: off
add = in_group("data")
add("--data", scope="machine", type=file_path, action=Several, nargs="+", metavar="GLOB",
    help="globs, folders or .npq files")
add("--ctx", scope="run", type=at_least(2), default=512, help="frames in a window")
add("--step", scope="run", type=at_least(1),
    help="frames between window starts; default: ctx // 2")
add("--jitter", scope="run", moves_loss=True, before=False, action=SWITCH, default=True,
    help="shift training windows from epoch to epoch")
add("--val_split", scope="run", type=fraction, default=0.05,
    help="share of the data held out for validation")
add("--val-list", scope="machine", type=file_path, action=Once, metavar="FILE",
    help="text file of validation files; overrides --val_split")
add("--labels", scope="machine", type=file_path, action=Once, metavar="folders|FILE",
    help="label the music: by the first folder below what --data names, or a CSV file of path,"
         "label,... rows")
add("--codebooks", scope="architecture", type=at_least(1),
    help="number of codebooks to use, the first ones of each file; default: all")
add("--skip-bad-files", scope="machine", action="store_true",
    help="leave out files that are not valid .npq instead of stopping")
add("--num_workers", scope="machine", may_differ=True, type=at_least(0, 256), default=2,
    help="threads that read ahead; 0 = read each micro-batch when it is needed")
add("--persistent-workers", scope="machine", may_differ=True, action=SWITCH, default=True,
    help="accepted for older commands, without effect: the threads always persist")
add("--prefetch", scope="machine", may_differ=True, type=at_least(1, 1000), default=6,
    help="micro-batches that each thread reads ahead")

add = in_group("model")
add("--d_model", scope="architecture", type=at_least(2, 65536), default=768,
    help="width of the model")
add("--layers", scope="architecture", type=at_least(1, 1000), default=16, help="transformer blocks")
add("--heads", scope="architecture", type=at_least(1), default=12, help="attention heads")
add("--dropout", scope="run", moves_loss=True, type=fraction, default=0.1,
    help="dropout rate on embeddings and on the two updates of each block")
add("--pattern", scope="architecture", before="parallel",
    choices=("parallel", "delay", "depth"), default="depth",
    help="which codes of its own frame a code may depend on; see model.py")
add("--depth-share", scope="run", type=fraction_or_one, default=0.5,
    help="with --pattern depth: share of the frames of a micro-batch in the loss, drawn at random")
add("--depth-dropout", scope="run", moves_loss=True, type=fraction, default=0.0,
    help="with --pattern depth: dropout rate in the depth transformer")
add("--code-dropout", scope="run", moves_loss=True, type=fraction, default=0.0,
    help="share of the input codes hidden during training")
add("--label-dropout", scope="run", moves_loss=True, type=fraction, default=0.1,
    help="with --labels: share of the windows that are shown without, so that it plays without too")
add("--code-vectors", scope="architecture", before=False, action=SWITCH, default=True,
    help="begin from what the codes stand for in the codec that made them, if its weights are here")
add("--grad-checkpoint", scope="machine", action=SWITCH, default=False,
    help="recompute blocks in the backward pass to save memory")

add = in_group("optimisation")
add("--batch", scope="run", moves_loss=True, is_settled=True, type=or_auto(at_least(1)), default=6,
    metavar="N|auto",
    help="windows in a micro-batch; auto: as many as fit into memory, with --accum to match")
add("--accum", scope="run", moves_loss=True, type=at_least(1), default=6,
    help="micro-batches in an optimizer step, over all processes")
add("--effective-batch", scope="command", type=at_least(1, 10**9), metavar="N",
    help="windows in an optimizer step: sets --accum to N / --batch; default for --batch auto: 36")
add("--epochs", scope="run", is_budget=True, type=at_least(1), default=250,
    help="epochs to train; with the default --step an epoch is two passes over the music")
add("--max-steps", scope="run", is_budget=True, type=at_least(1),
    help="optimizer steps after which the run ends")
add("--max-seconds", scope="run", is_budget=True, type=positive,
    help="training seconds after which the run ends, summed over all starts")
add("--patience", scope="run", type=positive, metavar="N",
    help="passes over the music without a lower val after which the run ends")
add("--optim", scope="run", before="adamw", choices=("muon", "adamw"), default="muon",
    help="muon: Muon for the hidden matrices at 100 x --lr, AdamW for the rest at 25 x, "
         "less for a wide head; adamw: AdamW for all")
add("--lr", scope="run", type=positive, default=2e-4, help="peak learning rate")
add("--schedule", scope="run", choices=("cosine", "wsd"), default="cosine",
    help="lr after the warm-up; cosine: a half cosine; wsd: constant, then a linear cooldown")
add("--cooldown", scope="run", type=fraction_or_one, default=0.2,
    help="with --schedule wsd: share of the run in which the lr falls")
add("--weight-decay", scope="run", type=not_negative, default=0.02,
    help="weight decay of the matrices of blocks and head")
add("--row-decay", scope="run", is_settled=True, before=0.0, type=or_auto(not_negative),
    default="auto", metavar="X|auto",
    help="weight decay of the rows of single codes in embeddings and heads, beside what they have "
         "of a codec's vectors; auto: so that they forget within a pass over the music, or 0 with "
         "--dropout 0")
add("--warmup-ratio", scope="run", type=fraction, default=0.01,
    help="share of the run in which the lr rises")
add("--eta-min", scope="run", type=not_negative, default=1e-5,
    help="lr at and after the end of the schedule")
add("--ema", scope="run", type=fraction, default=0.999, help="decay of the averaged weights")
add("--label-smoothing", scope="run", moves_loss=True, type=fraction, default=0.05,
    help="share of the target probability spread evenly over all codes")
add("--cb-weights", scope="run", moves_loss=True, default="auto", metavar="auto|w0,w1,...",
    help="loss weight of each codebook")
add("--cb-weights-auto-alpha", scope="run", moves_loss=True, type=not_negative, default=0.5,
    help="with --cb-weights auto: codebook k of K has weight 1 + alpha * k / (K - 1)")
add("--grad-clip", scope="run", type=not_negative, default=1.0,
    help="largest gradient norm; 0 = no clipping")
add("--seed", scope="run", type=at_least(0), default=0,
    help="random seed of weights, dropout and data order")

add = in_group("stability")
add("--outlier-skip-factor", scope="run", type=not_negative, default=6.0,
    help="refuse steps whose loss or gradient norm is so many standard deviations above the recent "
         "mean; 0 = only absolute limits")
add("--outlier-ema-beta", scope="run", type=fraction, default=1 - 1 / 128,
    help="the guard compares with the last 1 / (1 - beta) accepted steps")
add("--decay-all", scope="run", action=SWITCH, default=False,
    help="weight decay on embeddings and gains as well")
add("--panic-lr-mul", scope="run", type=positive, default=0.5,
    help="factor on the lr at each rollback")
add("--panic-snapshot", scope="machine", action=SWITCH, default=False,
    help="save the state before each rollback as *_quarantine_sNNNNNNNN.pt")

add = in_group("speed")
add("--device", scope="machine", metavar="NAME",
    help="cuda, cuda:1, mps or cpu; default: the best device present")
add("--amp", scope="run", action=SWITCH, default=True, help="mixed precision")
add("--amp-dtype", scope="run", is_settled=True, default="auto",
    choices=("auto", "bf16", "fp16", "float32"),
    help="dtype of mixed precision; auto: bf16 if the device is fast in it, else fp16, on a CPU "
         "float32, which is the same as --no-amp")
add("--compile", scope="machine", action=SWITCH, help="use torch.compile; default: on CUDA only")
add("--compile-mode", scope="machine", choices=("default", "reduce-overhead", "max-autotune"),
    default="default",
    help="mode of torch.compile; the last two use CUDA graphs")
add("--fused-optim", scope="machine", action=SWITCH, default=True, help="use the fused AdamW")

add = in_group("planning")
add("--plan", scope="command", action="store_true",
    help="print the memory, time and disk space that the run will take, and do nothing else")
add("--memory-gb", scope="command", type=positive,
    help="memory to fit into, GiB; default: what is free on the device, if it is present")
add("--device-tflops", scope="command", type=positive,
    help="peak TFLOP/s of the device's matrix products; default: time a step, if it is present")
add("--mfu", scope="command", type=fraction_or_one, default=0.35,
    help="share of --device-tflops that training reaches (model FLOPs utilisation)")

add = in_group("checkpoints")
add("--save_dir", scope="command", type=file_path, metavar="DIR", default="rvq_ckpts",
    help="folder of the run's files")
add("--tag", scope="machine", default="", help="name of the run, a part of its files' names")
add("--resume", scope="command", type=file_path, metavar="PATH",
    help="resume from this checkpoint instead of *_latest.pt")
add("--no-resume", scope="command", action="store_true",
    help="start a new run; an earlier run's files are moved to a dated folder")
add("--init-from", scope="command", type=file_path, metavar="PATH",
    help="start a new run from the EMA weights of a checkpoint or .safetensors")
add("--ignore-arch", scope="command", action="store_true",
    help="take the architecture from the flags when resuming")
add("--allow-data-change", scope="command", action="store_true",
    help="resume although the data or its windows changed")
add("--archive-every", scope="machine", type=at_least(0), default=10,
    help="epochs between archives; 0 = none")
add("--keep-archived", scope="machine", type=at_least(1), default=20,
    help="archives of each kind to keep")
add("--save-every-minutes", scope="machine", type=not_negative, default=15.0,
    help="minutes between saves of *_latest.pt within an epoch; 0 = none")

add = in_group("evaluation")
add("--val-every", scope="run", type=at_least(1), default=1, help="epochs between validations")
add("--val-every-seconds", scope="run", type=positive,
    help="training seconds between validations; overrides --val-every")
add("--eval-audio-every", scope="machine", type=at_least(0), default=5,
    help="epochs between samples of evaluation audio; 0 = none")
add("--eval-frames", scope="machine", type=at_least(1), default=1290,
    help="frames in a sample (1290 = 15 s at 86 frames a second)")
add("--eval-temperature", scope="machine", type=positive, default=1.0,
    help="temperature of sampling")
add("--eval-top-k", scope="machine", type=at_least(0), default=0,
    help="draw from the k most likely codes; 0 = all")
add("--eval-top-p", scope="machine", type=fraction_or_one, default=1.0,
    help="draw from the most likely codes that together have this probability")
add("--eval-min-p", scope="machine", type=fraction, default=0.0,
    help="leave out codes less than this many times as likely as the likeliest; 0 = none")
add("--eval-repeat-penalty", scope="machine", type=not_negative, default=0.0,
    help="lower a code's logit by this times its share of the newest 64 frames; 0 = off")
add("--eval-outdir", scope="machine", type=file_path, metavar="DIR",
    help="folder of samples; default: `samples` in --save_dir")
add("--eval-on-cpu", scope="machine", action=SWITCH, default=True, help="decode audio on the CPU")
add("--eval-dac-repo", scope="run", type=file_path, default="44khz", metavar="CODEC",
    help="codec of samples: 44khz, 24khz, 16khz, demo (bundled, lo-fi) or a path")

add = in_group("logging")
add("--log-lr-steps", scope="machine", type=at_least(1), default=50,
    help="steps between console lines with loss and lr")
add("--report", scope="machine", action=SWITCH, default=True,
    help="keep *_report.html up to date: curves, sound and facts of the run on one page")
add("--quiet", scope="command", action="store_true",
    help="print no progress bar, start-up details or library warnings")
add("--tensorboard", scope="machine", action=SWITCH, default=False,
    help="write TensorBoard event files beside the metrics")
add("--wandb", scope="machine", metavar="PROJECT",
    help="send the metrics to this project of Weights & Biases too (`pip install wandb`)")
# fmt: on

# --- what the declarations imply -----------------------------------------------------------------


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add all flags to a parser, by group."""
    for title, flags in itertools.groupby(FLAGS.values(), key=lambda flag: flag.group):
        group = parser.add_argument_group(title)
        for flag in flags:
            group.add_argument(flag.spelling, **flag.options)


def names(*scopes: Scope) -> list[str]:
    """Return the names of the flags of these scopes."""
    return [name for name, flag in FLAGS.items() if flag.scope in scopes]


def saved_flags(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's flags; flags that its version lacked have the value it trained with."""
    before = {name: flag.before for name, flag in FLAGS.items() if flag.before is not None}
    return {**before, **checkpoint["flags"]}


def gone_flags(saved: Mapping[str, Any]) -> list[str]:
    """Return the names of saved flags that had an effect and no longer exist."""
    return [name for name, idle in GONE_FLAGS.items() if saved.get(name, idle) != idle]


def spelled(name: str) -> str:
    """Return `--d_model` for `d_model`; of a removed flag, and of `no_amp`, with dashes."""
    return FLAGS[name].spelling if name in FLAGS else f"--{name.replace('_', '-')}"


def command_words(values: Mapping[str, Any]) -> list[list[str]]:
    """Return the words of a command for each flag: spelling and values.

    Left out are None, and False of a switch that has no `--no-` form.
    """
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
