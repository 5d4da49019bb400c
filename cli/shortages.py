"""Errors that mean a shortage of this machine: of memory, threads, temporary files.

    if (said := shortage(error)) is not None: ...   # "out of memory (...); free some, ..."

Libraries use types and messages of their own for such errors, so the message decides.
"""

from __future__ import annotations

import re

MEMORY = "out of memory{}; free some, ask for less, or raise `ulimit -v`"
THREADS = "no more threads or processes can be started{}; raise `ulimit -u` or `ulimit -v`"
PROC = "torch finds no /proc{}; mount it"
TEMPORARY = "no folder for temporary files can be written{}; set TMPDIR to one that can"
# oneDNN reports the primitive without memory, CUDA's libraries a status, CPython and Rust a null
# pointer, and CPython 3.11 a depth that does not match where memory ends within a syntax tree.
IN_WORDS = {
    MEMORY: r"out of memory|[Cc]an(no|')t allocate|[Cc]ould not (create|execute) a |bad_alloc|"
    r"ALLOC_FAILED|failed to map segment|error return without exception|pointer is null|"
    r"AST constructor recursion depth mismatch",
    THREADS: r"can't start new thread|thread constructor failed|Resource temporarily unavailable",
    PROC: r"Failed to initialize cpuinfo",
    TEMPORARY: r"No usable temporary directory",
}
ALLOCATOR = r"\[enforce fail at .*?Allocator: "  # the place in torch's code


def shortage(error: BaseException) -> str | None:
    """The shortage and its remedy in one line; None for another kind of error."""
    said = first_line(error)
    for words, pattern in IN_WORDS.items():
        if isinstance(error, OSError) and error.errno is not None and words is not TEMPORARY:
            continue  # an error of the system, which contains a path
        if re.search(pattern, said) or (words is MEMORY and isinstance(error, MemoryError)):
            detail = re.sub(ALLOCATOR, "", said)
            return words.format(f" ({detail})" if detail else "")
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a device or of the host was not enough."""
    return (shortage(error) or "").startswith("out of memory")


def first_line(error: BaseException) -> str:
    """First line of an error's message; empty where it has none."""
    return str(error).strip().partition("\n")[0]
