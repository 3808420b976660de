"""What may be done to a clip before it is embedded. Every function is (x (C, T, H, W), rng, **settings) -> clip.

All are pure, take values in [0, 1] and give values in [0, 1]. What is drawn is drawn once for the whole clip: a crop or
a color of its own in each frame would look like motion. Which part of a long file is read, `spans.py` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mmssl.modalities.image import augment as image

Size = int | Sequence[int]

# corners, middle, middles of the sides, middles of the quarters, in quarters of what is left beside the crop
_PLACES = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (0, 2), (4, 2), (2, 0), (2, 4), (1, 1), (1, 3), (3, 1), (3, 3)]


def resize(
    x: Tensor, rng: np.random.Generator, *, size: Size, interpolation: image.Interpolation = "bicubic"
) -> Tensor:
    """To [height, width]; one number is the shorter side, and the other follows. Antialiased."""
    return image.resize(x.flatten(0, 1), rng, size=size, interpolation=interpolation).unflatten(0, x.shape[:2])


def center_crop(x: Tensor, rng: np.random.Generator, *, size: Size, at: float = 0.5) -> Tensor:
    """The middle [height, width] of every frame, or with `at` another part of it, as for pictures.

    Raises:
        ValueError: the frames are smaller, or `at` lies outside them.
    """
    return image.center_crop(x.flatten(0, 1), rng, size=size, at=at).unflatten(0, x.shape[:2])


def random_resized_crop(
    x: Tensor,
    rng: np.random.Generator,
    *,
    size: Size,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """The same random part of every frame, brought to [height, width]; one number is a square.

    Source: Feichtenhofer et al. 2022, MAE-ST (arXiv:2205.09113), section 4; settings as for pictures.
    """
    frames = image.random_resized_crop(x.flatten(0, 1), rng, size=size, scale=scale, ratio=ratio)
    return frames.unflatten(0, x.shape[:2])


def multi_scale_crop(
    x: Tensor, rng: np.random.Generator, *, size: Size, scales: Sequence[float] = (1.0, 0.875, 0.75, 0.66)
) -> Tensor:
    """The same part of every frame, from one of 13 places, brought to [height, width]; one number is a square.

    Source: Wang et al. 2016, TSN (arXiv:1608.00859), section 3.2, "scale jittering" and "corner cropping", with the
    places and scales of its released code, which VideoMAE has too.

    Args:
        scales: of the crop's height and width to the shorter side; height and width take the same or neighboring ones.
    """
    if not scales or min(scales) <= 0 or max(scales) > 1:
        raise ValueError(f"multi_scale_crop: scales must be above 0 and at most 1, got {list(scales)}")
    height, width = x.shape[-2:]
    shapes = [(tall, wide) for i, tall in enumerate(scales) for j, wide in enumerate(scales) if abs(i - j) <= 1]
    tall, wide = (max(1, round(min(height, width) * scale)) for scale in shapes[int(rng.integers(len(shapes)))])
    down, across = _PLACES[int(rng.integers(len(_PLACES)))]
    top, left = (height - tall) * down // 4, (width - wide) * across // 4
    wanted = (size, size) if isinstance(size, int) else size
    return resize(x[..., top : top + tall, left : left + wide], rng, size=wanted)


def flip(x: Tensor, rng: np.random.Generator, *, p: float = 0.5) -> Tensor:
    """Left to right, with probability `p`: not where labels tell left from right."""
    return image.flip(x, rng, p=p)


def shift(x: Tensor, rng: np.random.Generator, *, pixels: int, fill: float = 0.0) -> Tensor:
    """Moved by up to `pixels` each way; what comes in is `fill`."""
    return image.shift(x.flatten(0, 1), rng, pixels=pixels, fill=fill).unflatten(0, x.shape[:2])


def color_jitter(
    x: Tensor,
    rng: np.random.Generator,
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    p: float = 1.0,
) -> Tensor:
    """Brightness, contrast and saturation, each scaled by one number for the whole clip, in a share `p` of clips.

    Source: Qian et al. 2021, CVRL (arXiv:2008.03800), section 3.3, "temporally consistent spatial augmentation"; the
    colors are changed as for pictures.
    """
    # all frames below each other are one picture: so its mean, about which contrast turns, is the clip's
    tall = image.color_jitter(
        x.flatten(1, 2), rng, brightness=brightness, contrast=contrast, saturation=saturation, p=p
    )
    return tall.view(x.shape)


def gray(x: Tensor, rng: np.random.Generator, *, p: float = 0.2) -> Tensor:
    """All frames without their colors, in as many channels as before, with probability `p`.

    Source: as for `color_jitter`.
    """
    return image.gray(x.flatten(1, 2), rng, p=p).view(x.shape)


def blur(x: Tensor, rng: np.random.Generator, *, sigma: tuple[float, float] = (0.1, 2.0), p: float = 0.5) -> Tensor:
    """All frames by the same Gaussian, in a share `p` of clips; settings as for pictures.

    Source: as for `color_jitter`.
    """
    return image.blur(x.flatten(0, 1), rng, sigma=sigma, p=p).unflatten(0, x.shape[:2])
