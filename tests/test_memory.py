"""Memory that tensors let go of is kept."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from mmssl.nn.joint import in_parts
from mmssl.types import Raw

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


HANDED_BACK = """
import numpy as np
from mmssl.memory import hand_back_freed_memory, keep_freed_memory
keep_freed_memory()
def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4 // 1024
arrays = [np.ones(2**20) for _ in range(16)]  # of 8 MiB
last = np.ones(2**17)  # so that they are holes, and not the end of the heap
full = held()
del arrays
print(full - held())
hand_back_freed_memory()
print(full - held())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_holes_between_what_stays_are_handed_back_when_asked() -> None:
    given = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", HANDED_BACK], env=given, capture_output=True, text=True, check=True, timeout=120
    )
    kept, handed_back = (int(line) for line in done.stdout.split())
    assert kept < 8
    assert handed_back > 100


def test_a_batch_in_parts_hands_memory_back_before_each_part_both_times(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr("mmssl.nn.joint.hand_back_freed_memory", lambda: done.append("handed back"))
    weight = torch.ones(3, requires_grad=True)

    def encode(raw: Raw) -> torch.Tensor:
        done.append(raw.ids[0])
        return (raw.data * weight).square()

    def gradient(parts: int) -> torch.Tensor:
        done.clear()
        raw = Raw(torch.arange(12.0).view(4, 3), torch.full((4,), 3), ["a", "b", "c", "d"])
        return torch.autograd.grad(in_parts(encode, raw, parts).sum(), weight)[0]

    whole = gradient(1)
    assert done == ["a"]  # a batch at once keeps its memory
    assert torch.allclose(gradient(2), whole)
    assert done[:4] == ["handed back", "a", "handed back", "c"]
    assert done[4::2] == ["handed back"] * 2
    assert sorted(done[5::2]) == ["a", "c"]
