"""Ways to spoil a picture, for measuring: (x (C, H, W), rng, severity) -> the same size. A line in the table adds one.

All are pure, take values in [0, 1] and give values in [0, 1]; severities are 1 to 5.

Source: Hendrycks and Dietterich 2019, ImageNet-C (arXiv:1903.12261), section 3 and appendix A. The paper states no
    severities: all 35 numbers here are those of the code that made ImageNet-C, `make_imagenet_c.py` of the repository
    hendrycks/robustness (commit e0377d4), which its package `imagenet_c` repeats. So are how each is applied: noise and
    impulses for each value, a blur cut off at four deviations whose edges go on, the value of hue, saturation and value
    moved, boxes of whole pixels.
Differs from ImageNet-C: six of its 15 kinds, and gaussian_blur of the four further ones that it keeps for validation;
    no shot noise, no blur of glass, motion, zoom or focus, no weather (frost needs photographs of it) and no elastic
    transform. Pictures of any size: the blur, in pixels of 224 there, goes with the shorter side, and a share of pixels
    stays a share. The authors' sets of smaller pictures, such as CIFAR-10-C, have milder severities of their own.
    Values are not rounded to 8 bit, and a spoiled picture is not stored as JPEG of quality 85 before it is measured.
"""

from __future__ import annotations

import io
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
    reach = int(4 * sigma + 0.5)
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
    """Fewer and larger pixels: means over boxes of whole pixels, each spread over its place."""
    from PIL import Image

    share = at_severity((0.6, 0.5, 0.4, 0.3, 0.25), severity)
    height, width = x.shape[-2:]
    small, box = (max(1, int(width * share)), max(1, int(height * share))), Image.Resampling.BOX
    parts = [Image.fromarray(part.numpy()).resize(small, box).resize((width, height), box) for part in x.float()]
    return torch.stack([torch.from_numpy(np.array(part)) for part in parts]).to(x.dtype)


CORRUPTIONS: dict[str, Callable[..., Tensor]] = {
    "gaussian_noise": gaussian_noise,
    "impulse_noise": impulse_noise,
    "gaussian_blur": gaussian_blur,
    "contrast": contrast,
    "brightness": brightness,
    "jpeg": jpeg,
    "pixelate": pixelate,
}
