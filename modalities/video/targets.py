"""What of a clip can be reconstructed, and how to look at it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmssl.modalities.modality import Target
from mmssl.modalities.patches import patches, width
from mmssl.modalities.video.frontend import Tubes
from mmssl.types import Raw, Tokens

_EPS = 1e-6  # of the deviation, as Tong et al. have it


def pixels(raw: Raw, tokens: Tokens) -> Tensor:
    """The tubes as the frontend reads them, in deviations of the training data: (B, N, P)."""
    return patches(tokens)


def normalized_pixels(raw: Raw, tokens: Tokens) -> Tensor:
    """Each channel of each tube brought to mean 0 and deviation 1: (B, N, P).

    Source: Tong et al. 2022, VideoMAE (arXiv:2203.12602), and its released code: each channel for itself, the unbiased
    deviation with 1e-6 added, where MAE joins the channels and adds to the variance.
    Differs: the 1e-6 counts in deviations of the training data, not in units of [0, 1].
    """
    tubes = _by_channel(raw, tokens)
    mean, deviation = _moments(tubes)
    return ((tubes - mean) / deviation).flatten(2)


def untube(values: Tensor, grid: Sequence[int], size: Sequence[int], channels: int) -> Tensor:
    """Tubes back to clips, the inverse of what `Tubes` does.

    Args:
        values: (B, N, P), each tube ordered frame, row, column, channel.
        grid: tubes in time, down and across.
        size: frames, height and width of a tube.

    Returns:
        (B, C, T, H, W).
    """
    (steps, down, across), (deep, tall, wide) = grid, size
    clip = values.reshape(len(values), steps, down, across, deep, tall, wide, channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return clip.reshape(len(values), channels, steps * deep, down * tall, across * wide)


def pixel_pictures(frontend: Tubes, tokens: Tokens, masked: Tensor, values: Tensor) -> dict[str, Any]:
    """Clips of a reconstruction of `pixels`.

    Args:
        tokens: (B, N) of the input.
        masked: (B, N) bool, True = hidden.
        values: (B, N, P), predictions where hidden and the target elsewhere.

    Returns:
        "input", "masked" (hidden tubes gray), "reconstruction": (B, C, T, H, W) in [0, 1]; "rate", frames a
        second; "note": "".
    """

    def lay(tubes: Tensor) -> Tensor:
        return untube(tubes, tokens.grid, frontend.size, frontend.channels)

    def draw(tubes: Tensor) -> Tensor:
        return (lay(tubes) * frontend.get_buffer("std") + frontend.get_buffer("mean")).clamp(0, 1)

    source = draw(patches(tokens))
    hidden = lay(masked[..., None].expand_as(values))
    return {
        "input": source,
        "masked": torch.where(hidden, 0.5, source),
        "reconstruction": draw(values),
        "rate": frontend.rate,
        "note": "",
    }


def normalized_pixel_pictures(frontend: Tubes, tokens: Tokens, masked: Tensor, values: Tensor) -> dict[str, Any]:
    """Pictures of a reconstruction of `normalized_pixels`; see `pixel_pictures`.

    The model never predicts a tube's means and deviations, so they can only be taken from the hidden tube itself: the
    picture shows more than the model knows, and its note says so.
    """
    tubes = patches(tokens).unflatten(-1, (-1, frontend.channels))
    mean, deviation = _moments(tubes)
    unnormalized = values.unflatten(-1, (-1, frontend.channels)) * deviation + mean
    pictures = pixel_pictures(frontend, tokens, masked, unnormalized.flatten(2))
    note = "the means and deviations of each predicted tube are the true ones, which the model does not know (a leak)"
    return pictures | {"note": note}


def _by_channel(raw: Raw, tokens: Tokens) -> Tensor:
    """(B, N, frames x rows x columns, C)."""
    tubes = patches(tokens)
    channels = raw.data.shape[1]
    if tubes.shape[-1] < 2 * channels:
        raise ValueError(
            "objective.target=normalized_pixels: a tube of one pixel has no deviation; choose pixels, or larger tubes "
            "with frontend.size"
        )
    return tubes.unflatten(-1, (-1, channels))


def _moments(tubes: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, pixels, C) -> mean and deviation of each channel, (B, N, 1, C)."""
    mean = tubes.mean(-2, keepdim=True)
    # torch's own deviation over this axis, which is not the last one, is slower
    deviation = torch.linalg.vector_norm(tubes - mean, dim=-2, keepdim=True) / math.sqrt(tubes.shape[-2] - 1)
    return mean, deviation + _EPS


TARGETS: dict[str, Target] = {
    "pixels": Target(values=pixels, dim=width, pictures=pixel_pictures),
    "normalized_pixels": Target(values=normalized_pixels, dim=width, pictures=normalized_pixel_pictures),
}
