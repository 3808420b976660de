"""What becomes of memory that tensors let go of on the CPU."""

from __future__ import annotations

import ctypes
import os
from typing import Any

# of mallopt, in glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Ask glibc to keep memory that is freed, and to give it out again, instead of handing it back to the system.

    By default each large tensor of each update is new memory, which the system clears page by page when it is first
    written: a fifth of the time of a bfloat16 step of MAE base in transformers (benchmarks/README.md). What a process
    holds is then its peak. Without glibc nothing is done, nor where the environment says how it is to keep memory.
    """
    if any(f"MALLOC_{name}_" in os.environ for name in ("TRIM_THRESHOLD", "MMAP_THRESHOLD", "MMAP_MAX")):
        return
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        return
    # A threshold would not do: glibc takes none above 32 MiB, so each larger tensor would still be new memory.
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def hand_back_freed_memory() -> None:
    """Give the system every free page, where glibc holds some: for work whose memory is to stay small.

    Large tensors of equal size do not fill each other's places: glibc aligns a tensor within a place that is a little
    larger, and once a small object has taken what is left over beside it, the next tensor does not fit. The holes of
    many batches in turn add up to more than the tensors ever held; empty, they cost nothing.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Any:
    """A function of the C library; None in musl, macOS and Windows, which lack it."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
