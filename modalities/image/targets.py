"""What of a picture can be reconstructed, and how to look at it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.modality import Target
from mmssl.modalities.patches import moments, normalized, patches, width
from mmssl.types import Raw, Tokens


def pixels(raw: Raw, tokens: Tokens) -> Tensor:
    """The patches as the frontend reads them, in deviations of the training data: (B, N, P)."""
    return patches(tokens)


def normalized_pixels(raw: Raw, tokens: Tokens) -> Tensor:
    """Each patch brought to mean 0 and deviation 1: (B, N, P).

    Source: He et al. 2022 (arXiv:2111.06377), section 4.1, "reconstruction target". All channels of a patch share one
    mean and one (unbiased) variance.
    """
    return normalized(tokens, plain="pixels")


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
    note = "the mean and deviation of each hidden patch are the true ones, which the model does not know (a leak)"
    return pictures | {"note": note}


TARGETS: dict[str, Target] = {
    "pixels": Target(values=pixels, dim=width, pictures=pixel_pictures),
    "normalized_pixels": Target(values=normalized_pixels, dim=width, pictures=normalized_pixel_pictures),
}
