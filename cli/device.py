"""The device that computes: which one, how precisely, with how many threads.

device = pick_device(flags.device)
dtype = PRECISIONS[fast_precision(device)]           # of mixed precision; None: float32
count, times = faster_thread_count(lambda: step())   # 1, {2: 0.21, 1: 0.012}
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import time
from collections.abc import Callable

import torch

from cli.command_line import UsageError

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": None}
TRIAL_SECONDS = 0.3  # that a number of threads is timed for
LARGE_SECONDS = 1.0  # with one thread: then it is matrix products, which gain by every thread


def pick_device(wanted: str | None, local_rank: int | None = None) -> torch.device:
    """The requested device, or the best present one; an absent one is an error.

    With a local rank, the process takes the CUDA device of that number.

    Raises:
        UsageError: no such device here.
    """
    if local_rank is not None and wanted in (None, "cuda") and torch.cuda.is_available():
        wanted = f"cuda:{local_rank}"
    if wanted is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", wanted):
        raise UsageError(f"--device: expected cuda, cuda:1, mps or cpu, found {wanted!r}")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:  # torch raises both for an absent device
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise UsageError(
            f"--device {wanted}: not usable here ({reason}); leave the flag out to take the best "
            "device present, or pass --device cpu"
        ) from error
    return device


def device_name(device: torch.device) -> str:
    """`cuda: NVIDIA H100`, `cpu, 16 threads`."""
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else str(device)


def tune_for(device: torch.device) -> None:
    """Settings of the whole process that make a device faster."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if device.type == "cpu" and not any(name.startswith("MALLOC_") for name in os.environ):
        # glibc keeps freed memory: to fetch its pages again took a tenth of a step.
        trim_threshold, mmap_threshold = -1, -3  # as in <malloc.h>
        with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(trim_threshold, -1)
            mallopt(mmap_threshold, 32 << 20)  # the most it accepts


def fast_precision(device: torch.device) -> str:
    """A key of PRECISIONS: bf16 where the device is fast in it, else fp16, on a CPU float32."""
    if device.type == "cpu":
        return "bf16" if _time_of_product(torch.bfloat16) < _time_of_product(None) else "float32"
    is_here = device.type == "cuda" and torch.cuda.is_available()
    if is_here and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return "bf16"


def _time_of_product(dtype: torch.dtype | None, size: int = 384) -> float:
    """Seconds of a matrix product on the CPU, the least of six: other processes may disturb one.

    A CPU without instructions for bf16 converts and takes several times as long as in float32,
    one that has them (AVX512_BF16, AMX, Arm's BF16) a third.
    """
    a = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - started)
    return min(times)


def faster_thread_count(work: Callable[[], object]) -> tuple[int, dict[int, float]]:
    """One thread or torch's default number, whichever does `work` faster; and the seconds of each.

    Threads that share a core with another busy process wait for each other at every small
    operation, so one thread can be many times as fast as two. The faster number stays set.
    """
    most, times = torch.get_num_threads(), dict[int, float]()
    for count in (1, most):
        torch.set_num_threads(count)
        started = time.perf_counter()
        work()  # the first call also creates buffers
        times[count] = time.perf_counter() - started
        if times[count] > LARGE_SECONDS:
            break
        started, done = time.perf_counter(), 0
        while done == 0 or time.perf_counter() - started < TRIAL_SECONDS:
            work()
            done += 1
        times[count] = (time.perf_counter() - started) / done
    fastest = most if most not in times else min(times, key=lambda count: times[count])
    torch.set_num_threads(fastest)
    return fastest, times
