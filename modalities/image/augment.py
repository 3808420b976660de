"""What may be done to a picture before it is embedded. Every function is (x (C, H, W), rng, **settings) -> (C, H', W').

All are pure, take values in [0, 1] and give values in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Size = int | Sequence[int]
Interpolation = Literal["bicubic", "bilinear"]


def resize(x: Tensor, rng: np.random.Generator, *, size: Size, interpolation: Interpolation = "bicubic") -> Tensor:
    """To [height, width]; one number is the shorter side, and the other follows. Antialiased."""
    height, width = resize_extent(np.array([x.shape[-2:]]), size=size)[0].tolist()
    return _interpolate(x, (height, width), interpolation)


def resize_extent(sizes: np.ndarray, *, size: Size, **settings: object) -> np.ndarray:
    """(clips, 2) int64 height and width before `resize` -> after it."""
    if not isinstance(size, int):
        return np.broadcast_to(np.array(_pair(size, "resize")), sizes.shape)
    # cut off and not rounded, as torchvision and transformers have it
    extent: np.ndarray = sizes.astype(np.int64) * size // sizes.min(axis=1, keepdims=True)
    return extent


def center_crop(x: Tensor, rng: np.random.Generator, *, size: Size, at: float = 0.5) -> Tensor:
    """The middle [height, width]; one number is a square.

    Args:
        at: where the crop lies along the picture's longer side: 0 is the left or the top, 1 the right or the bottom. A
            square picture has none, and is cropped in its middle.

    Raises:
        ValueError: the picture is smaller, or `at` lies outside it.
    """
    if not 0 <= at <= 1:
        raise ValueError(f"center_crop: at must be from 0 to 1, got {at}")
    height, width = _pair(size, "center_crop")
    if x.shape[-2] < height or x.shape[-1] < width:
        raise ValueError(
            f"center_crop: the picture is {x.shape[-2]} x {x.shape[-1]}, smaller than the crop of {height} x {width}; "
            "resize before it"
        )
    down, across = (at if own > other else 0.5 for own, other in (x.shape[-2:], x.shape[:-3:-1]))
    top, left = int((x.shape[-2] - height) * down), int((x.shape[-1] - width) * across)
    return x[:, top : top + height, left : left + width]


def crop_extent(sizes: np.ndarray, *, size: Size, **settings: object) -> np.ndarray:
    """(clips, 2) int64 height and width before a crop to `size` -> after it."""
    return np.broadcast_to(np.array(_pair(size, "crop")), sizes.shape)


def random_resized_crop(
    x: Tensor,
    rng: np.random.Generator,
    *,
    size: Size,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """A random part of the picture, brought to [height, width]; one number is a square.

    Source: Szegedy et al. 2015 (arXiv:1409.4842), section 6, with MAE's scale (He et al. 2022, table 8).

    Args:
        scale: least and most of the picture's area.
        ratio: least and most of width / height, drawn evenly in its logarithm.
    """
    height, width = x.shape[-2:]
    if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
        raise ValueError(
            f"random_resized_crop: expected 0 < scale <= 1 and 0 < ratio, low to high, got {scale}, {ratio}"
        )
    wanted = _pair(size, "random_resized_crop")
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        tall, wide = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
        if 0 < tall <= height and 0 < wide <= width:
            break
    else:  # too long or too high a picture: the largest middle part of an allowed shape
        tall, wide = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
    return _interpolate(x[:, top : top + tall, left : left + wide], wanted)


def flip(x: Tensor, rng: np.random.Generator, *, p: float = 0.5) -> Tensor:
    """Left to right, with probability `p`."""
    return x.flip(-1) if rng.random() < p else x


def shift(x: Tensor, rng: np.random.Generator, *, pixels: int, fill: float = 0.0) -> Tensor:
    """Moved by up to `pixels` each way; what comes in is `fill`."""
    if pixels < 0:
        raise ValueError(f"shift: pixels must be at least 0, got {pixels}")
    top, left = rng.integers(2 * pixels + 1, size=2).tolist()
    wider = F.pad(x, (pixels, pixels, pixels, pixels), value=fill)
    return wider[:, top : top + x.shape[-2], left : left + x.shape[-1]]


def color_jitter(
    x: Tensor,
    rng: np.random.Generator,
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    p: float = 1.0,
) -> Tensor:
    """Brightness, contrast and saturation each scaled by 1 - s to 1 + s, in a share `p` of pictures.

    Source: Krizhevsky et al. 2012 in the form of torchvision's ColorJitter, in a fixed order and without hue.
    """
    if min(brightness, contrast, saturation) < 0 or max(brightness, contrast, saturation) > 1:
        raise ValueError(
            f"color_jitter: brightness, contrast and saturation must be from 0 to 1, got {brightness}, {contrast}, "
            f"{saturation}"
        )
    if rng.random() >= p:
        return x
    light, spread, vivid = (float(rng.uniform(1 - s, 1 + s)) for s in (brightness, contrast, saturation))
    x = (x * light).clamp(0, 1)
    x = _blend(x, _gray(x).mean(), spread)
    return _blend(x, _gray(x), vivid) if len(x) == 3 else x


def gray(x: Tensor, rng: np.random.Generator, *, p: float = 0.2) -> Tensor:
    """Without its colors, in as many channels as before, with probability `p`."""
    return _gray(x).expand_as(x) if rng.random() < p else x


def blur(x: Tensor, rng: np.random.Generator, *, sigma: tuple[float, float] = (0.1, 2.0), p: float = 0.5) -> Tensor:
    """By a Gaussian, in a share `p` of pictures; what lies outside is as the edge.

    Args:
        sigma: least and most of its deviation in pixels.
    """
    if not 0 < sigma[0] <= sigma[1]:
        raise ValueError(f"blur: expected 0 < sigma, low to high, got {sigma}")
    if rng.random() >= p:
        return x
    deviation = float(rng.uniform(*sigma))
    reach = math.ceil(3 * deviation)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=x.device) / deviation).square())
    weights = weights / weights.sum()
    wider = F.pad(x[:, None], (reach, reach, reach, reach), mode="replicate")
    across = F.conv2d(wider, weights[None, None, None])
    return F.conv2d(across, weights[None, None, :, None])[:, 0].clamp(0, 1)


def _interpolate(x: Tensor, size: tuple[int, int], mode: Interpolation = "bicubic") -> Tensor:
    if tuple(x.shape[-2:]) == size:
        return x
    # bicubic overshoots at edges
    return F.interpolate(x[None], size=size, mode=mode, antialias=True, align_corners=False)[0].clamp(0, 1)


def _gray(x: Tensor) -> Tensor:
    """(1, H, W) luma (ITU-R BT.601)."""
    return (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True) if len(x) == 3 else x


def _blend(x: Tensor, other: Tensor, share: float) -> Tensor:
    return (share * x + (1.0 - share) * other).clamp(0, 1)


def _pair(size: Size, place: str) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    if height < 1 or width < 1:
        raise ValueError(f"{place}: the size must be at least 1 x 1, got {height} x {width}")
    return height, width
