"""Ways to spoil a picture, for measuring: (x (C, H, W), rng, severity) -> the same size. A line in the table adds one.

All are pure, take values in [0, 1] and give values in [0, 1]; severities are 1 to 5.

Source: Hendrycks and Dietterich 2019, ImageNet-C (arXiv:1903.12261), section 3 and appendix A; severities as in its
    released code.
Differs from the paper: seven of its 15 kinds; what is measured in pixels there, of pictures of 224, is scaled with the
    shorter side.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.modalities.modality import at_severity

_SIDE = 224  # pixels, of the pictures that the severities were made for


def gaussian_noise(x: Tensor, rng: np.random.Generator, *, severity: int) -> Tensor:
    """Normal noise on every value."""
    deviation = at_severity((0.08, 0.12, 0.18, 0.26, 0.38), severity)
    noise = torch.from_numpy(rng.standard_normal(tuple(x.shape), dtype=np.float32))
    return (x + deviation * noise).clamp(0, 1)


def impulse_noise(x: Tensor, rng: np.random.Generator, *, severity: int) -> Tensor:
    """Some values become 0 or 1, with even chances."""
    share = at_severity((0.03, 0.06, 0.09, 0.17, 0.27), severity)
    drawn = torch.from_numpy(rng.random(tuple(x.shape), dtype=np.float32))
    return torch.where(drawn < share, (drawn < share / 2).to(x.dtype), x)


def gaussian_blur(x: Tensor, rng: np.random.Generator, *, severity: int) -> Tensor:
    """Out of focus; the edges go on as they are."""
    sigma = at_severity((1, 2, 3, 4, 6), severity) * min(x.shape[-2:]) / _SIDE
    reach = math.ceil(3 * sigma)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    weights = (weights / weights.sum()).to(x.dtype)
    wide = F.pad(x[:, None], (reach, reach, reach, reach), mode="replicate")
    across = F.conv2d(wide, weights[None, None, None, :])
    return F.conv2d(across, weights[None, None, :, None])[:, 0].clamp(0, 1)


def contrast(x: Tensor, rng: np.random.Generator, *, severity: int) -> Tensor:
    """Each channel nearer to its mean."""
    mean = x.mean((1, 2), keepdim=True)
    return (mean + at_severity((0.4, 0.3, 0.2, 0.1, 0.05), severity) * (x - mean)).clamp(0, 1)


def brightness(x: Tensor, rng: np.random.Generator, *, severity: int) -> Tensor:
    """Lighter: the value of hue, saturation and value grows."""
    value = x.amax(0, keepdim=True)
    lighter = (value + at_severity((0.1, 0.2, 0.3, 0.4, 0.5), severity)).clamp(max=1)
    # black has no hue, and becomes gray
    return torch.where(value > 0, x * lighter / value.clamp_min(1e-6), lighter.expand_as(x)).clamp(0, 1)


def jpeg(x: Tensor, rng: np.random.Generator, *, severity: int) -> Tensor:
    """Compressed as JPEG and read again; other channels than one or three each for itself, as a gray picture."""
    from PIL import Image

    quality = round(at_severity((25, 18, 15, 10, 7), severity))
    parts = []
    for part in [x] if len(x) in (1, 3) else x.split(1):
        whole = (part * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        file = io.BytesIO()
        Image.fromarray(whole[..., 0] if len(part) == 1 else whole).save(file, format="JPEG", quality=quality)
        with Image.open(file) as read:
            parts.append(torch.from_numpy(np.array(read)).view(*part.shape[1:], len(part)).permute(2, 0, 1))
    return torch.cat(parts).to(x.dtype) / 255


def pixelate(x: Tensor, rng: np.random.Generator, *, severity: int) -> Tensor:
    """Fewer and larger pixels: means over areas, each spread over its place."""
    share = at_severity((0.6, 0.5, 0.4, 0.3, 0.25), severity)
    small = [max(1, int(side * share)) for side in x.shape[-2:]]
    means = F.interpolate(x[None], size=small, mode="area")
    return F.interpolate(means, size=x.shape[-2:], mode="nearest")[0]


CORRUPTIONS: dict[str, Callable[..., Tensor]] = {
    "gaussian_noise": gaussian_noise,
    "impulse_noise": impulse_noise,
    "gaussian_blur": gaussian_blur,
    "contrast": contrast,
    "brightness": brightness,
    "jpeg": jpeg,
    "pixelate": pixelate,
}
