"""Label sets on disk: shards of units, many clips end to end, and what a row says of its own.

A shard is a safetensors file with `units` (steps, G) uint16, G labels (codebooks) at each step, and `lengths`, how many
steps each clip has; its metadata says how many steps make a second. A row names its part of one:

    "units": {"path": "train.00000.safetensors", "first": 5124, "count": 312}

where without `first` and `count` all of the file is the clip's. Or, where there are few, it holds them itself: {"rate":
50, "values": [3, 3, 17]}, with lists of G for several labels at each step, and without a rate for one step a token. One
whole number is one label for all of the clip.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmssl.files import refuse_special
from mmssl.types import Units

LARGEST = 2**16  # codewords that uint16 can number


def write_shard(path: Path, units: np.ndarray, *, rate: float | None, lengths: np.ndarray, of: str) -> None:
    """Write a shard, all or nothing.

    Args:
        units: (steps, G), from 0 on.
        rate: steps per second; None for one step a token.
        lengths: (clips,) steps of each clip; -1 for one that could not be read.
        of: what clips and codebook these are of, for whoever would write the shard again.
    """
    from safetensors.numpy import save_file

    unfinished = path.with_name(path.name + ".tmp")
    tensors: dict[str, np.ndarray] = {
        "units": np.ascontiguousarray(units, np.uint16),
        "lengths": np.ascontiguousarray(lengths, np.int64),
    }
    metadata = {"of": of} | ({} if rate is None else {"rate": repr(float(rate))})
    try:
        save_file(tensors, unfinished, metadata=metadata)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_lengths(path: Path) -> np.ndarray:
    """(clips,) int64, as `write_shard` was given them."""
    from safetensors import safe_open

    with safe_open(path, "np") as shard:
        return np.asarray(shard.get_tensor("lengths"))


def read_units(value: Any, codes: Sequence[int]) -> Units:
    """The units that a row names, as a batch of one clip.

    Args:
        value: what stands in the row, its path as `Manifest` gives it.
        codes: (G,) how many there are of each label.

    Raises:
        ValueError: it is none of the forms above, or a unit that is not below its number of codes.
    """
    if isinstance(value, bool) or not isinstance(value, int | Mapping):
        raise ValueError(f"units must be an object or one whole number, got {value!r}; `mmssl units` writes them")
    rate: float | None = None
    if isinstance(value, int):
        found = np.array([[value]], np.int64)
    elif "path" in value:
        found, rate = read_shard(value["path"], value.get("first"), value.get("count"))
    else:
        found, rate = _read_values(value)
    check_units(found, codes)
    return Units(torch.from_numpy(found)[None], torch.tensor([len(found)]), rate, torch.zeros(1, dtype=torch.float64))


def cut_units(units: Units, start: float, seconds: float) -> Units:
    """The steps of one clip that lie from `start` on for `seconds`, whole ones.

    Raises:
        ValueError: they have no rate, or end long before the clip does.
    """
    if units.rate is None:
        if start:
            raise ValueError("units of tokens have no time, so no part of a clip can be taken; read it whole")
        return units
    total = int(units.lengths[0])
    if total / units.rate < start + seconds - 2 / units.rate - 0.1:
        raise ValueError(
            f"the units end after {total / units.rate:.2f} s, and the clip after {start + seconds:.2f} s; write them "
            "from these clips"
        )
    first = min(int(start * units.rate + 1e-6), total)
    last = min(int((start + seconds) * units.rate) + 1, total)
    rest = torch.tensor([start - first / units.rate], dtype=torch.float64)
    return Units(units.values[:, first:last], torch.tensor([last - first]), units.rate, rest)


def check_units(found: np.ndarray, codes: Sequence[int]) -> None:
    """See that (steps, G) units are of G codebooks with so many codes.

    Raises:
        ValueError: they are not.
    """
    if found.shape[1] != len(codes):
        raise ValueError(f"{found.shape[1]} labels at each step, where the recipe has codes for {len(codes)}")
    wrong = np.argwhere((found < 0) | (found >= np.asarray(codes)))
    if len(wrong):
        step, label = wrong[0].tolist()
        raise ValueError(
            f"unit {found[step, label]} at step {step} is none of the {codes[label]} that the recipe states; set its "
            "number of codes to that of the codebook"
        )


def read_shard(path: str, first: int | None = None, count: int | None = None) -> tuple[np.ndarray, float | None]:
    """`count` steps of a shard from `first` on, all of it where neither is given: (steps, G) int64; and their rate.

    Raises:
        ValueError: there is no such shard, or it has no such steps.
    """
    from safetensors import SafetensorError, safe_open

    given = {"path": path, "first": first, "count": count}
    whole = first is None and count is None
    if not whole and not all(isinstance(number, int) and number >= 0 for number in (first, count)):
        raise ValueError(f"units in a file need 'first' and 'count', whole numbers from 0 on; got {given}")
    try:
        refuse_special(path)
        with safe_open(path, "np") as shard:
            part = shard.get_slice("units")
            total = part.get_shape()[0]
            first, count = (0, total) if first is None or count is None else (first, count)
            if first + count > total:
                raise ValueError(f"{path} holds {total} units, and not those from {first} to {first + count}")
            rate = (shard.metadata() or {}).get("rate")
            return part[first : first + count].astype(np.int64), None if rate is None else float(rate)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: no units can be read there ({error}); run `mmssl units` again") from None


def _read_values(value: Mapping[str, Any]) -> tuple[np.ndarray, float | None]:
    rate = value.get("rate")
    try:
        found = np.array(value.get("values"))
    except ValueError:
        found = np.empty(0, object)
    if found.dtype.kind not in "iu" or found.ndim not in (1, 2):
        raise ValueError("units need 'values', a list of whole numbers, or of equally long lists of them")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not rate > 0):
        raise ValueError(f"the 'rate' of units is how many there are in a second, a number above 0; got {rate!r}")
    return found.astype(np.int64).reshape(len(found), -1), None if rate is None else float(rate)
