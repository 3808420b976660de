"""Shards of codes, as `mmssl units` writes them (see `mmssl.data.units`) -> tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mmssl.data.units import check_units, read_shard
from mmssl.types import BadClip


def read(
    source: str | Path | BinaryIO,
    *,
    rate: float,
    codes: Sequence[int],
    first: int | None = None,
    count: int | None = None,
) -> Tensor:
    """The codes of one clip.

    Args:
        source: a shard.
        rate: steps per second that the shard must have.
        codes: (G,) how many codes each codebook has.
        first, count: which of the shard's steps are the clip's; all of them by default.

    Returns:
        (G, T) int64.

    Raises:
        BadClip: it cannot be read, or its codes are others.
    """
    if not isinstance(source, str | Path):
        raise BadClip(getattr(source, "name", "file"), "codes are read from a file of their own; give its path")
    try:
        found, own = read_shard(str(source), first, count)
        check_units(found, codes)
    except ValueError as error:
        raise BadClip(source, str(error).removeprefix(f"{source}: ")) from None
    if own != rate:
        stated = "no rate" if own is None else f"{own:g} codes a second"
        raise BadClip(source, f"has {stated}, and the frontend reads {rate:g}; set frontend.rate to that of the codes")
    return torch.from_numpy(found.T.copy())


def probe(source: str | Path) -> dict[str, Any]:
    """What a manifest row says of a shard that is one clip.

    Raises:
        BadClip: it holds no codes along time.
    """
    try:
        found, rate = read_shard(str(source))
    except ValueError as error:
        raise BadClip(source, str(error).removeprefix(f"{source}: ")) from None
    if rate is None:
        raise BadClip(source, "its units have no rate, and a clip of codes lies along time; write those of sound")
    return {"seconds": round(len(found) / rate, 6)}
