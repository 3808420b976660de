"""The C library's way with freed memory as it comes: two sides that take turns in one process each need their own."""

from __future__ import annotations

import ctypes

MIB = 2**20


def as_it_comes() -> None:
    """What glibc does when nobody asks, with free memory handed back first so that nothing is inherited.

    Its thresholds rise with what is freed, up to 32 MiB for a tensor of its own and 64 MiB at the end of the heap:
    they are set to where they end, which is as kind as glibc ever gets. Without glibc nothing is done.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):
        return
    library.mallopt(-4, 65_536)  # M_MMAP_MAX
    library.mallopt(-3, 32 * MIB)  # M_MMAP_THRESHOLD
    library.mallopt(-1, 64 * MIB)  # M_TRIM_THRESHOLD
    library.malloc_trim(0)
