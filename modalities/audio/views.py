"""Two views of a sound: (raw, frontend) -> the one that is seen, and the one that is to be told from it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmssl.nn.seeds import uniform
from mmssl.types import Frontend, Raw

_PLACE = 1_000_004  # of the draws that are no masks of a clip's clones, see `uniform`


def segments(raw: Raw, frontend: Frontend) -> tuple[Raw, Raw]:
    """Two parts of a sound, each half as long, anywhere in it: they may overlap.

    Source: Saeed, Grangier and Zeghidour 2021, COLA (arXiv:2010.10915), section 3.1: segments of one clip belong
    together. There they are .96 s of a clip of 10 s; half of it leaves short events in both.

    Raises:
        ValueError: clips without seeds, or one too short for half of it to be a token.
    """
    if raw.seeds is None:
        raise ValueError("segments: the clips have no seeds to draw two parts by; give Raw.seeds")
    check_segments(raw, frontend)
    half = raw.lengths // 2
    starts = (uniform(raw.seeds, 2, stream=_PLACE) * (raw.lengths - half + 1)[:, None]).long()

    def part(begin: Tensor) -> Raw:
        found = [clip[n : n + length] for clip, n, length in zip(raw.data, begin.tolist(), half.tolist(), strict=True)]
        return replace(raw, data=pad_sequence(found, batch_first=True), lengths=half)

    return part(starts[:, 0]), part(starts[:, 1])


def check_segments(raw: Raw, frontend: Frontend) -> None:
    """Raises ValueError where half of a clip is too short for `frontend`."""
    for name, length in zip(raw.ids, raw.lengths.tolist(), strict=True):
        if length // 2 < frontend.min_length:
            raise ValueError(
                f"{name}: {length} samples, and half of them are fewer than the {frontend.min_length} of a token; "
                "leave such clips out"
            )
