"""What of a picture can be reconstructed, and how to look at it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.modality import Target
from mmssl.modalities.patches import moments, normalized, patches, width
from mmssl.types import Raw, Tokens

_EPS = 1e-6  # of a histogram's length
_BINS, _CELL = 9, 8  # of a histogram of gradients: orientations, and the pixels of a cell's side


def pixels(raw: Raw, tokens: Tokens) -> Tensor:
    """The patches as the frontend reads them, in deviations of the training data: (B, N, P)."""
    return patches(tokens)


def normalized_pixels(raw: Raw, tokens: Tokens) -> Tensor:
    """Each patch brought to mean 0 and deviation 1: (B, N, P).

    Source: He et al. 2022 (arXiv:2111.06377), section 4.1, "reconstruction target". All channels of a patch share one
    mean and one (unbiased) variance.
    """
    return normalized(tokens, plain="pixels")


def hog(raw: Raw, tokens: Tokens) -> Tensor:
    """Histograms of oriented gradients: (B, N, cells of a patch x C x 9).

    Of each channel, the differences of the pixels to the right and left of each, and below and above it, vote with
    their size for one of nine orientations (a direction and its opposite are one), in cells of 8 x 8 pixels, or of the
    whole patch where that is smaller. Each cell's histogram is brought to length 1; that of an even cell is zero.

    Source: Dalal and Triggs 2005, section 6; as a target Wei et al. 2022, MaskFeat (arXiv:2112.09133), section 3.2, and
        Wang et al. 2023, FG-MAE (arXiv:2310.18653).
    Differs from Dalal and Triggs, as MaskFeat does: a vote goes to one bin and one cell whole, and a cell is normalized
        alone.
    """
    picture = raw.data.float()
    # replicated at the edges, where a difference is then to the pixel itself
    wider = F.pad(picture, (1, 1, 1, 1), mode="replicate")
    right = wider[..., 1:-1, 2:] - wider[..., 1:-1, :-2]
    down = wider[..., 2:, 1:-1] - wider[..., :-2, 1:-1]
    size, bins = torch.hypot(right, down), (torch.atan2(down, right) * (_BINS / math.pi)).floor().long() % _BINS
    high, wide = (pixels // patches for pixels, patches in zip(picture.shape[-2:], tokens.grid, strict=True))
    cell = _cell(high), _cell(wide)
    # bin by bin, so that never more than one picture of votes lies in memory
    votes = [F.avg_pool2d(torch.where(bins == i, size, 0.0), cell, divisor_override=1) for i in range(_BINS)]
    cells = F.normalize(torch.stack(votes, -1), dim=-1, eps=_EPS)  # (B, C, cells down, cells across, 9)
    cells = cells.unflatten(3, (tokens.grid[1], -1)).unflatten(2, (tokens.grid[0], -1))
    return cells.permute(0, 2, 4, 3, 5, 1, 6).flatten(3).flatten(1, 2)


def unpatch(values: Tensor, grid: Sequence[int], size: Sequence[int], channels: int) -> Tensor:
    """Patches back to pictures, the inverse of what `Patches` does.

    Args:
        values: (B, N, P), each patch ordered row, column, channel.
        grid: patches down and across.
        size: height and width of a patch.

    Returns:
        (B, C, H, W).
    """
    (down, across), (tall, wide) = grid, size
    picture = values.reshape(len(values), down, across, tall, wide, channels).permute(0, 5, 1, 3, 2, 4)
    return picture.reshape(len(values), channels, down * tall, across * wide)


def pixel_pictures(frontend: Patches, tokens: Tokens, masked: Tensor, values: Tensor) -> dict[str, Any]:
    """Pictures of a reconstruction of `pixels`.

    Args:
        tokens: (B, N) of the input.
        masked: (B, N) bool, True = hidden.
        values: (B, N, P), predictions where hidden and the target elsewhere.

    Returns:
        "input", "masked" (hidden patches gray), "reconstruction": (B, C, H, W) in [0, 1]; "note": "".
    """

    def lay(values: Tensor) -> Tensor:
        return unpatch(values, tokens.grid, frontend.size, frontend.channels)

    def draw(values: Tensor) -> Tensor:
        return (lay(values) * frontend.get_buffer("std") + frontend.get_buffer("mean")).clamp(0, 1)

    source = draw(patches(tokens))
    hidden = lay(masked[..., None].expand_as(values))
    return {
        "input": source,
        "masked": torch.where(hidden, 0.5, source),
        "reconstruction": draw(values),
        "note": "",
    }


def normalized_pixel_pictures(frontend: Patches, tokens: Tokens, masked: Tensor, values: Tensor) -> dict[str, Any]:
    """Pictures of a reconstruction of `normalized_pixels`; see `pixel_pictures`.

    The model never predicts a patch's mean and deviation, so they can only be taken from the hidden patch itself: the
    picture shows more than the model knows, and its note says so.
    """
    mean, deviation = moments(patches(tokens))
    pictures = pixel_pictures(frontend, tokens, masked, values * deviation + mean)
    note = "the mean and deviation of each predicted patch are the true ones, which the model does not know (a leak)"
    return pictures | {"note": note}


def _cell(side: int) -> int:
    """The side of a cell in a patch of this side."""
    return min(_CELL, side)


def _histograms(frontend: Patches) -> int:
    if any(side % _cell(side) for side in frontend.size):
        raise ValueError(
            f"objective.target=hog: cells of {_CELL} x {_CELL} pixels do not fill a patch of frontend.size="
            f"{list(frontend.size)}; choose sides of at most {_CELL} pixels, or multiples of it"
        )
    return _BINS * frontend.channels * math.prod(side // _cell(side) for side in frontend.size)


TARGETS: dict[str, Target] = {
    "pixels": Target(values=pixels, dim=width, pictures=pixel_pictures),
    "normalized_pixels": Target(values=normalized_pixels, dim=width, pictures=normalized_pixel_pictures),
    "hog": Target(values=hog, dim=_histograms),
}
