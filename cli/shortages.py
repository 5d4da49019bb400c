"""What this machine was short of, where an error says so: memory, threads, temporary files.

    if (said := shortage(error)) is not None: ...   # "out of memory (...); free some, ..."

Libraries give such errors types and words of their own, so they are known by the words.
"""

from __future__ import annotations

import re

MEMORY = "out of memory{}; free some, ask for less, or raise `ulimit -v`"
THREADS = "no more threads or processes can be started{}; raise `ulimit -u` or `ulimit -v`"
PROC = "torch finds no /proc{}; mount it"
TEMPORARY = "no folder for temporary files can be written{}; set TMPDIR to one that can"
# oneDNN names the primitive that found no memory, CUDA's libraries a status, CPython and Rust the
# pointer that was not there.
IN_WORDS = {
    MEMORY: r"out of memory|[Cc]an(no|')t allocate|[Cc]ould not (create|execute) a |bad_alloc|"
    r"ALLOC_FAILED|failed to map segment|error return without exception|pointer is null",
    THREADS: r"can't start new thread|thread constructor failed|Resource temporarily unavailable",
    PROC: r"Failed to initialize cpuinfo",
    TEMPORARY: r"No usable temporary directory",
}
ALLOCATOR = r"\[enforce fail at .*?Allocator: "  # where in torch it happened


def shortage(error: BaseException) -> str | None:
    """What was short and what to do, in one line; None where the error is another one."""
    said = first_line(error)
    for words, pattern in IN_WORDS.items():
        if isinstance(error, OSError) and error.errno is not None and words is not TEMPORARY:
            continue  # the system's own error, which names a path
        if re.search(pattern, said) or (words is MEMORY and isinstance(error, MemoryError)):
            detail = re.sub(ALLOCATOR, "", said)
            return words.format(f" ({detail})" if detail else "")
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory, or the host's, did not suffice."""
    return (shortage(error) or "").startswith("out of memory")


def first_line(error: BaseException) -> str:
    """Of an error's message; empty where it has none."""
    return str(error).strip().partition("\n")[0]
