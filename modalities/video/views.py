"""Two views of a clip: (raw, frontend) -> the one that is seen, and the one that is to be told from it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmssl.nn.seeds import uniform
from mmssl.types import Frontend, Raw

_GAP = (4 / 30, 48 / 30)  # seconds
_PLACE = 1_000_003  # of the draws that are no masks of a clip's clones, see `uniform`


def check_frames(raw: Raw, frontend: Frontend) -> None:
    """Raises ValueError where a clip has no two moments for `frames`."""
    deep = frontend.min_length
    for name, length in zip(raw.ids, raw.lengths.tolist(), strict=True):
        if length < 2 * deep:
            raise ValueError(
                f"{name}: {length} frames have no two moments of {deep}; set frontend.size to tubes of fewer frames, "
                "or leave such clips out"
            )


def frames(raw: Raw, frontend: Frontend) -> tuple[Raw, Raw]:
    """Two moments of a clip, each as many frames as a token has (one in the paper): an earlier and a later one.

    Source: Gupta et al. 2023, SiamMAE (arXiv:2305.14344), section 3: the later one is 4 to 48 frames of 30 frames/s
    after the earlier one, here as seconds, as many of them as the clip has.

    Raises:
        ValueError: clips without seeds or rate, or one that has no two moments.
    """
    if raw.seeds is None or raw.rate is None:
        raise ValueError("frames: the clips have no seeds or no rate to draw two moments by; give Raw.seeds, Raw.rate")
    check_frames(raw, frontend)
    deep = frontend.min_length
    gap, start = uniform(raw.seeds, 2, stream=_PLACE).T
    # how far from one moment's first frame to the other's: at least past its last
    least, most = (max(deep, round(seconds * raw.rate)) for seconds in _GAP)
    furthest = raw.lengths - deep
    low, high = furthest.clamp_max(least), furthest.clamp_max(most)
    apart = low + (gap * (high - low + 1)).long()
    first = (start * (furthest - apart + 1)).long()

    def moment(begin: Tensor) -> Raw:
        parts = [clip[:, n : n + deep] for clip, n in zip(raw.data, begin.tolist(), strict=True)]
        return replace(raw, data=torch.stack(parts), lengths=torch.full_like(raw.lengths, deep))

    return moment(first), moment(first + apart)
