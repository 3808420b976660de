"""What becomes of memory that tensors let go of on the CPU."""

from __future__ import annotations

import ctypes
import os

# of mallopt, in glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 * 2**20  # bytes; glibc refuses more


def keep_freed_memory() -> None:
    """Ask glibc to keep memory that is freed, and to give it out again, instead of handing it back to the system.

    By default each large tensor of each update is new memory, which the system clears page by page when it is first
    written: a fifth of the time of a bfloat16 step of MAE base in transformers (benchmarks/README.md). What a process
    holds is then its peak. Without glibc nothing is done, nor where the environment sets one of these thresholds.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
