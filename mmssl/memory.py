"""What becomes of memory that tensors let go of on the CPU."""

from __future__ import annotations

import ctypes
import os

# of mallopt, in glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Ask glibc to keep memory that is freed, and to give it out again, instead of handing it back to the system.

    By default each large tensor of each update is new memory, which the system clears page by page when it is first
    written: a fifth of the time of a bfloat16 step of MAE base in transformers (benchmarks/README.md). What a process
    holds is then its peak. Without glibc nothing is done, nor where the environment says how it is to keep memory.

    Where torch is not imported yet it is also asked to let tensors of 2 MiB and more begin at whole large pages. glibc
    does not give a place that was aligned to 64 bytes to a tensor of the same size once a small object has taken the
    bytes left over beside it, so each size leaves holes; those left over beside large pages serve other tensors.
    """
    if any(f"MALLOC_{name}_" in os.environ for name in ("TRIM_THRESHOLD", "MMAP_THRESHOLD", "MMAP_MAX")):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once, while it is imported
    # A threshold would not do: glibc takes none above 32 MiB, so each larger tensor would still be new memory.
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
