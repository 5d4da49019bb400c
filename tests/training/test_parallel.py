"""training/parallel.py: runs of several real processes over gloo against one process.

Ranks are started as torchrun starts them, by torchrun itself where its part matters.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.trainer import ROOT, TINY, end_ranks, rows, start_ranks, wait_for

import train_rvq
from npq_dataset import EpochOrder
from run_folder.checkpoint import load_checkpoint
from train_rvq import noise_seed
from training.parallel import EveryNth, World

# The defaults: Muon, dropout 0.1, pattern depth, bf16. Sums of gradients round in another order,
# and Muon's iteration in bf16 makes of that a few 1e-5 in the loss; without either it is 1e-6.
NEAR = 3e-4
EXACT = ("--no-amp", "--optim", "adamw")
STEPS = 8


def start(
    processes: int,
    *flags: str | Path,
    torchrun: tuple[str, ...] = (),
    script: Path = ROOT / "train_rvq.py",
) -> Any:
    """Torchrun with a trainer, as a user starts it."""
    launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    return subprocess.Popen(
        [sys.executable, *launch, *torchrun, str(script), *TINY, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def run(processes: int, *flags: str | Path) -> tuple[int, str]:
    """The first exit code that is not 0, and everything printed."""
    if processes == 1:
        return train_rvq.main([*TINY, *map(str, flags)]), ""
    codes, output = end_ranks(start_ranks(processes, *flags))
    return next(filter(None, codes), 0), output


def processes_of(save_dir: Path) -> dict[int, list[int]]:
    """Process numbers of trainers that write to a folder, by rank."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_text().split("\0")
            rank = re.search(r"\0RANK=(\d+)", (entry / "environ").read_text())
        except OSError:
            continue
        if str(save_dir) in command and rank:
            found.setdefault(int(rank[1]), []).append(int(entry.name))
    return {rank: sorted(numbers) for rank, numbers in found.items()}


def figures(save_dir: Path) -> list[float]:
    """Loss and gradient norm of every step, val and val_obj of every validation."""
    steps = {r["step"]: [r["loss"], r["grad_norm"]] for r in rows(save_dir, "step")}
    vals = {r["step"]: [r["val"], r["val_obj"]] for r in rows(save_dir, "epoch")}
    return [x for table in (steps, vals) for step in sorted(table) for x in table[step]]


def assert_same_run(save_dir: Path, other: Path, near: float) -> None:
    torch.testing.assert_close(figures(save_dir), figures(other), rtol=near, atol=near)


def flags(tunes: Path, *more: str | Path) -> tuple[str | Path, ...]:
    """Of a run of STEPS steps that logs each."""
    every = ("--log-lr-steps", "1", "--max-steps", str(STEPS), "--accum", "4")
    return ("--data", tunes, *every, *more)


# --- in one process ------------------------------------------------------------------------------


def test_micro_batches_are_dealt_out_in_turn():
    order = EpochOrder(50, batch=3, accum=4, seed=1)
    order.epoch, order.start = 1, 12
    whole = [batch.tolist() for batch in order]
    parts = [EveryNth(order, World(rank, 2)) for rank in (0, 1)]
    dealt = [[batch.tolist() for batch in part] for part in parts]
    assert [len(d) for d in dealt] == [len(whole) // 2] * 2
    assert [b for pair in zip(*dealt, strict=True) for b in pair] == whole


def test_noise_depends_on_its_place_alone():
    seeds = {noise_seed(s, e, p) for s in range(3) for e in range(10) for p in range(0, 600, 6)}
    assert len(seeds) == 3 * 10 * 100
    assert noise_seed(0, 3, 12) == noise_seed(0, 3, 12) < 2**64


# --- many processes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tunes, tmp_path_factory) -> Path:
    """The run in one process."""
    save_dir = tmp_path_factory.mktemp("alone")
    assert run(1, *flags(tunes, "--save_dir", save_dir))[0] == 0
    return save_dir


def test_two_processes_are_one_run(tunes, tmp_path, alone):
    code, output = run(2, *flags(tunes, "--save_dir", tmp_path))
    assert code == 0, output
    assert ", 2 processes" in output
    assert output.count("Done at step") == 1
    assert_same_run(tmp_path, alone, NEAR)
    mine, its = (load_checkpoint(d / "rvq_4cb_latest.pt") for d in (tmp_path, alone))
    assert mine.keys() == its.keys()
    assert mine["guard"].keys() == its["guard"].keys()
    for part in ("model", "ema"):
        assert mine[part].keys() == its[part].keys()


def test_two_processes_are_one_labelled_run(halves, tmp_path):
    """Label dropout and rows that a micro-batch lacks are the same, however it is shared."""
    more = ("--labels", "folders", "--label-dropout", "0.5", *EXACT)
    for processes in (1, 2):
        flags_ = flags(halves, *more, "--save_dir", tmp_path / str(processes))
        code, output = run(processes, *flags_)
        assert code == 0, output
    assert_same_run(tmp_path / "2", tmp_path / "1", 1e-5)
    vals = [rows(tmp_path / n, "epoch")[-1]["val_unlabelled"] for n in "12"]
    assert vals[0] == pytest.approx(vals[1], rel=1e-5)
    shutil.copytree(halves / "low", tmp_path / "other" / "low")
    begun = ("--init-from", tmp_path / "2" / "rvq_4cb_latest.pt", "--save_dir", tmp_path / "new")
    code, output = run(2, "--data", tmp_path / "other", *more, *begun, "--max-steps", "1")
    assert code == 0, output
    assert "left out, though known by --init-from's weights: high" in output


def test_ctrl_c_saves_once_and_one_process_goes_on(tunes, tmp_path):
    """And SIGUSR1 to any process saves without an end."""
    end = ("--max-steps", "200", *EXACT)  # it must not end before it is told to
    command = flags(tunes, "--save_dir", tmp_path / "cut", *end)
    trainers = start(2, *command, "--num_workers", "1")
    wait_for(lambda: any(tmp_path.glob("cut/*.jsonl")) and len(rows(tmp_path / "cut", "step")) >= 2)
    os.kill(processes_of(tmp_path / "cut")[1][0], signal.SIGUSR1)
    wait_for(lambda: any(r["step"] % 4 for r in rows(tmp_path / "cut", "save")))  # within an epoch
    os.kill(trainers.pid, signal.SIGINT)
    output, _ = trainers.communicate(timeout=100)
    assert trainers.returncode != 0
    assert output.count("Stopped by SIGINT; saved") == 1, output
    assert processes_of(tmp_path / "cut") == {}
    assert 2 <= len(rows(tmp_path / "cut", "step")) < 200
    assert run(1, *command, "--num_workers", "0")[0] == 0
    assert run(1, *flags(tunes, "--save_dir", tmp_path / "whole", *end))[0] == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole", 1e-5)


def test_the_slurm_script_of_the_documents_saves_and_asks_to_be_queued_again(tunes, tmp_path):
    """Signals go to the script alone, as Slurm sends them; `scontrol` notes what it is told."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^#!/bin/bash\n.*?(?=^```)", page, re.S | re.M)
    for name, text in {
        "torchrun": f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n',
        "scontrol": f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n',
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    save_dir = tmp_path / "run"
    here = {"npq_out/*.npq": str(tunes), "nproc_per_node=4": "nproc_per_node=2"}
    here["--accum 8 --quiet"] = " ".join([*TINY, f"--save_dir {save_dir} --epochs 100000"])
    for words, others in here.items():
        assert script.count(words) == 1
        script = script.replace(words, others)
    (tmp_path / "job.sh").write_text(script)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    steps = 0
    for number, event in ((signal.SIGUSR1, "start"), (signal.SIGTERM, "resume")):
        job = subprocess.Popen(["bash", tmp_path / "job.sh"], cwd=ROOT, env=env)
        try:
            wait_for(lambda s=steps, j=job: newest_step(save_dir) > s or j.poll() is not None)
            job.send_signal(number)
            assert job.wait(60) != 0  # of torchrun that was ended
        finally:
            job.kill()
            for process in itertools.chain(*processes_of(save_dir).values()):
                os.kill(process, signal.SIGKILL)  # torchrun ends when they have
        *_, begun, end = [r for r in rows(save_dir) if r["event"] in ("start", "resume", "end")]
        assert (begun["event"], begun["step"], end["signal"]) == (event, steps, "SIGTERM")
        assert (tmp_path / "told").read_text() == "requeue 77\n"  # once, and not when cancelled
        steps = end["step"]
        assert load_checkpoint(save_dir / "rvq_4cb_latest.pt")["progress"]["step"] == steps


def newest_step(save_dir: Path) -> int:
    """Step of the newest row of the metrics, if there is any."""
    written = rows(save_dir) if any(save_dir.glob("*_metrics.jsonl")) else []
    return written[-1]["step"] if written else 0


def test_micro_batches_that_cannot_be_shared_are_named(tunes, tmp_path):
    trainers = start(2, *flags(tunes, "--save_dir", tmp_path, "--accum", "5"))
    output, _ = trainers.communicate(timeout=200)
    assert trainers.returncode == 1  # torchrun's own
    assert output.count("! ") == 1, output
    assert "expected a multiple of the 2 processes" in output
    assert "use --accum 4 or 6" in output
    assert len(re.findall(r"exitcode +: 2 ", output)) == 2, output
    assert not list(tmp_path.glob("rvq*"))


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes(tunes, tmp_path):
    """2, then 4, then 2, then 1, as four times 1."""
    for name, counts in (("1", [1, 1, 1, 1]), ("n", [2, 4, 2, 1])):
        for count, end in zip(counts, (4, 8, 12, 16), strict=True):
            more = (*EXACT, "--max-steps", str(end))
            code, output = run(count, *flags(tunes, "--save_dir", tmp_path / name, *more))
            assert code == 0, output
    assert len(rows(tmp_path / "n", "resume")) == 3
    assert len(rows(tmp_path / "n", "step")) == 16
    assert_same_run(tmp_path / "n", tmp_path / "1", 1e-5)


@pytest.mark.slow
def test_four_processes_are_one_run(tunes, tmp_path):
    for count in (1, 4):
        command = flags(tunes, "--save_dir", tmp_path / str(count), *EXACT)
        command += ("--grad-clip", "0.1", "--grad-checkpoint", "--code-dropout", "0.1")
        code, output = run(count, *command)
        assert code == 0, output
    assert_same_run(tmp_path / "4", tmp_path / "1", 1e-5)


@pytest.mark.slow
def test_a_killed_process_restarts_all_and_the_run_goes_on(tunes, tmp_path, alone):
    command = flags(tunes, "--save_dir", tmp_path)
    command += ("--num_workers", "1", "--save-every-minutes", "0.0001")
    trainers = start(2, *command, torchrun=("--max-restarts=3",))
    wait_for(lambda: any(tmp_path.glob("*.jsonl")) and len(rows(tmp_path, "step")) >= 3)
    os.kill(processes_of(tmp_path)[1][0], signal.SIGKILL)
    output, _ = trainers.communicate(timeout=200)
    assert trainers.returncode == 0, output
    assert "Resuming at step" in output
    assert processes_of(tmp_path) == {}
    assert_same_run(tmp_path, alone, NEAR)


@pytest.mark.slow
def test_two_machines_share_nothing_but_the_data(tunes, tmp_path, alone):
    """Two torchruns that meet at an address; the second one's folder holds no checkpoint."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    nodes = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d")
    trainers = []
    for node in ("a", "b"):
        launch = ("-m", "torch.distributed.run", *nodes, f"--rdzv_endpoint={endpoint}")
        command = flags(tunes, "--save_dir", tmp_path / node)
        words = [sys.executable, *launch, ROOT / "train_rvq.py", *TINY, *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        trainers.append(subprocess.Popen(list(map(str, words)), env=environment, **pipes))
    outputs = [t.communicate(timeout=200)[0] for t in trainers]
    assert [t.returncode for t in trainers] == [0, 0], outputs
    (first,) = [n for n in ("a", "b") if list((tmp_path / n).glob("*.jsonl"))]
    (other,) = {"a", "b"} - {first}
    assert {p.name for p in (tmp_path / other).iterdir()} <= {".checked_files.json"}
    assert_same_run(tmp_path / first, alone, NEAR)


@pytest.mark.slow
def test_data_that_differs_is_named_with_its_rank(tunes, tmp_path):
    """As two machines, of which one lacks a file."""
    other = tmp_path / "other"
    other.mkdir()
    for path in sorted(tunes.glob("*.npq"))[1:]:
        (other / path.name).write_bytes(path.read_bytes())
    script = tmp_path / "two_machines.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"data = {[str(tunes), str(other)]!r}[int(os.environ['RANK'])]\n"
        "sys.argv[sys.argv.index('DATA')] = data\n"
        "import train_rvq\n"
        "train_rvq.leave(train_rvq.main())\n"
    )
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script))
    command = [sys.executable, *launch, *TINY, "--data", "DATA", "--save_dir", str(tmp_path / "r")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert re.search(r"! .*rank 1 on \S+ differs from rank 0 on \S+: data files", done.stderr)


@pytest.mark.slow
def test_rollback_and_guard_are_the_same_everywhere(tunes, tmp_path):
    """A guard that refuses for ever: refusals, rollbacks, the guard's exit, on all ranks."""
    script = tmp_path / "wrecked.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train_rvq\n"
        "from training.guard import Guard\n"
        "judge = Guard.judge\n"
        "def refuse_all_after(self, loss, norm, ce):\n"
        "    return 'test' if len(self.losses) >= 3 else judge(self, loss, norm, ce)\n"
        "Guard.judge = refuse_all_after\n"
        "train_rvq.leave(train_rvq.main())\n"
    )
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script))
    command = [sys.executable, *launch, *TINY, "--data", str(tunes), "--save_dir", str(tmp_path)]
    command += ["--panic-snapshot", "--epochs", "50"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.stderr.count("Stopped by the guard") == 1, done.stderr
    assert len(re.findall(r"exitcode +: 3 ", done.stderr)) == 2
    assert len(rows(tmp_path, "rollback")) == 3


@pytest.mark.slow
def test_a_failing_process_ends_all_with_its_own_message(tunes, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train_rvq\n"
        "step = train_rvq.train_step\n"
        "def fail(run, batches):\n"
        "    if run.world.rank == 1 and run.state.progress.step == 3:\n"
        "        raise ValueError('planted')\n"
        "    return step(run, batches)\n"
        "train_rvq.train_step = fail\n"
        "train_rvq.leave(train_rvq.main())\n"
    )
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script))
    command = [sys.executable, *launch, *TINY, "--data", str(tunes), "--save_dir", str(tmp_path)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    told = re.search(r"! rank 1 on \S+: ValueError: planted; .*traceback in (\S+)\)", done.stderr)
    assert told, done.stderr
    assert 'raise ValueError("planted")' in Path(told[1]).read_text().replace("'", '"')
    assert done.stderr.count("Traceback") <= 1, "torchrun's own"
    assert load_checkpoint(tmp_path / "rvq_4cb_latest.pt")["progress"]["step"] == 3
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_compiled_is_the_same_run(tunes, tmp_path):
    for count in (1, 2):
        command = flags(tunes, "--save_dir", tmp_path / str(count), *EXACT, "--dropout", "0")
        more = ("--compile",) if count == 2 else ()
        code, output = run(count, *command, "--depth-share", "1", *more)
        assert code == 0, output
        assert "torch.compile failed" not in output
        assert count == 1 or "compiled in" in output
    assert_same_run(tmp_path / "2", tmp_path / "1", 1e-4)


WATCHED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import train_rvq
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 4096  # of a tiny model all would be one bucket
prepare, step = train_rvq.prepare_losses, train_rvq.train_step

def exchange(state, bucket):
    with torch.profiler.record_function("exchange"):
        return allreduce_hook(state, bucket)

def prepare_losses(run):
    prepare(run)
    run.world.module.register_comm_hook(None, exchange)

def train_step(run, batches):
    with torch.profiler.profile() as profile:
        stats = step(run, batches)
    begun = {{name: [e.time_range.start for e in profile.events() if e.name == name]
             for name in ("exchange", "CompiledFunctionBackward")}}
    print("early", sum(t < max(begun["CompiledFunctionBackward"]) for t in begun["exchange"]),
          "of", len(begun["exchange"]), "compiled", run.compiled, flush=True)
    return stats

train_rvq.prepare_losses, train_rvq.train_step = prepare_losses, train_step
train_rvq.leave(train_rvq.main())
"""


@pytest.mark.slow
def test_gradients_are_exchanged_while_a_compiled_backward_still_runs(tunes, tmp_path):
    """As one graph it hands over all of them at its end, and the exchange has nothing beside it."""
    (tmp_path / "watched.py").write_text(WATCHED)
    command = flags(tunes, "--save_dir", tmp_path / "run", "--compile", "--max-steps", "3")
    trainers = start(2, *command, script=tmp_path / "watched.py")
    output, _ = trainers.communicate(timeout=300)
    assert trainers.returncode == 0, output
    said = re.findall(r"early (\d+) of (\d+) compiled True", output)
    assert said.count(("0", "1")) == 2, "DDP finds the order of the gradients in its first step"
    assert said.count(("1", "2")) == 2 * 2, output
