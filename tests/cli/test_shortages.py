"""What libraries say when the machine is short of something, and what the user reads then."""

from __future__ import annotations

import pytest

from cli.command_line import unexpected
from cli.shortages import is_out_of_memory

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: "
SAID = [
    (MemoryError(), "out of memory; free some"),
    (RuntimeError("could not create a primitive"), "out of memory (could not create a primitive)"),
    (RuntimeError("could not execute a primitive"), "out of memory (could not execute a"),
    (RuntimeError(f"{ALLOCATOR}can't allocate memory: you tried\nmore"), "out of memory (can't"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory (CUDA"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), "out of memory (CUDA error"),
    (ImportError("libtorch.so: failed to map segment from shared object"), "out of memory (lib"),
    (SystemError("error return without exception set"), "out of memory (error return"),
    (SystemError("AST constructor recursion depth mismatch (before=1)"), "out of memory (AST"),
    (RuntimeError("Failed to initialize cpuinfo!"), "torch finds no /proc"),
    (RuntimeError("can't start new thread"), "no more threads or processes"),
    (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "no folder for temp"),
    (OSError(24, "Too many open files"), "Too many open files; raise `ulimit -n`"),
    (BlockingIOError(11, "Resource temporarily unavailable"), "Resource temporarily unavailable; "),
    (ValueError("a mistake of ours"), "ValueError: a mistake of ours; a fault of the program"),
]


@pytest.mark.parametrize(("error", "begins"), SAID, ids=[begins for _, begins in SAID])
def test_only_what_the_machine_is_not_short_of_is_a_fault_of_the_program(error, begins):
    said = unexpected(error)
    assert said.startswith(begins)
    assert "\n" not in said
    assert "; " in said
    assert is_out_of_memory(error) == begins.startswith("out of memory")
