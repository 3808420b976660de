"""Random numbers that depend on a seed and a place, not on what was drawn before.

A mask drawn from a clip's own seed is the same in whatever batch, worker, rank or order the clip comes, and drawing one
for a whole batch is a few integer operations instead of one generator a clip.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def seed_of(*parts: int | str) -> int:
    """A stable 63-bit hash of its arguments: the same on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(seeds: Tensor, n: int, *, stream: int = 0) -> Tensor:
    """n numbers for each seed, uniform in [0, 1).

    Source: the finalizer of SplitMix64 (Steele, Lea and Flood 2014), used as a hash of (seed, stream, place).

    Args:
        seeds: (B,) int64.
        stream: another number gives independent draws for the same seed.

    Returns:
        (B, n) float32 on the CPU.
    """
    with np.errstate(over="ignore"):
        state = _mix(seeds.cpu().numpy().astype(np.uint64) + np.uint64(stream + 1) * _MIX1)
        bits = _mix(state[:, None] + _STEP * np.arange(1, n + 1, dtype=np.uint64))
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))


def normal(seed: int, *shape: int, name: str, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers from a clip's seed; another name gives independent ones, and so does another device."""
    generator = torch.Generator(device).manual_seed(seed_of(name, seed))
    return torch.randn(shape, generator=generator, device=device)


def normal_per_clip(counts: Tensor, dim: int, seeds: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal vectors, the clips' end to end, each clip's from its own seed; other devices give others.

    Args:
        counts: (B,) int64, vectors of each clip.
        dim: their width.
        seeds: (B,) int64.

    Returns:
        (M, dim) float32 on `device`, M the sum of `counts`.
    """
    return draw_per_clip(counts, (dim,), generators_of(seeds, device), lambda part, g: part.normal_(generator=g))


def gumbel_per_clip(counts: Tensor, shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """(M, *shape) Gumbel noise, the clips' end to end, each by its own generator."""
    noise = draw_per_clip(counts, shape, generators, lambda part, g: part.exponential_(generator=g))
    # minus the logarithm of an exponential variable is a Gumbel one; the clamp is against its rare exact zero
    return -noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()


def generators_of(seeds: Tensor, device: torch.device | str) -> list[torch.Generator]:
    """One for each clip, so that noise does not depend on what else is in the batch. Kinds of devices differ."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]


def draw_per_clip(
    counts: Tensor,
    shape: tuple[int, ...],
    generators: list[torch.Generator],
    fill: Callable[[Tensor, torch.Generator], Tensor],
) -> Tensor:
    """(M, *shape) float32, the clips' end to end, each filled by its own generator."""
    out = torch.empty(int(counts.sum()), *shape, device=generators[0].device)
    for part, generator in zip(out.split(counts.tolist()), generators, strict=True):
        fill(part, generator)
    return out


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))
