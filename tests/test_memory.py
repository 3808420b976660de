"""Memory that tensors let go of is kept."""

import os
import platform
import subprocess
import sys

import pytest

ROUNDS = """
import resource, sys
import numpy as np
from mmssl.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def update():
    arrays = [np.ones(size * 2**17) for size in (8, 8, 40)]  # MiB; glibc takes no threshold above 32
update()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    update()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> int:
    """Pages that the system had to hand out in twenty updates, after a first one."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | environment
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS, how], env=given, capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_the_memory_of_an_update_serves_the_next() -> None:
    kept, given_back = faults("kept"), faults("as it is")
    assert 10 * kept < given_back
    # who sets a threshold has thought about it
    assert 10 * kept < faults("kept", MALLOC_TRIM_THRESHOLD_="65536")
    assert 10 * kept < faults("kept", MALLOC_MMAP_MAX_="65536", MALLOC_MMAP_THRESHOLD_="131072")
