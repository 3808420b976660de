"""Two views of a picture: (raw, frontend) -> the one that is seen, and the one that is to be told from it.

What a view draws depends on the picture's seed alone, so that it can be drawn again.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mmssl.modalities.image.augment import blur, color_jitter, flip, gray, random_resized_crop
from mmssl.nn.seeds import seed_of
from mmssl.types import Frontend, Raw

_SCALE = (0.3, 0.6)


def crops(raw: Raw, frontend: Frontend) -> tuple[Raw, Raw]:
    """The picture itself, and a random part of it brought to the same size.

    Source: Eymaël et al. 2024, CropMAE (arXiv:2403.17823), section 3, "global-to-local": a part of .3 to .6 of the
    picture's area. The picture is itself a crop in training, of .5 to 1, which `augment` makes.

    Raises:
        ValueError: pictures without seeds.
    """
    if raw.seeds is None:
        raise ValueError("crops: the pictures have no seeds to draw a crop from; give Raw.seeds")
    height, width = raw.data.shape[-2:]
    parts = [
        random_resized_crop(x, np.random.default_rng(seed_of("crops", seed)), size=(height, width), scale=_SCALE)
        for x, seed in zip(raw.data, raw.seeds.tolist(), strict=True)
    ]
    return raw, replace(raw, data=torch.stack(parts))


def distortions(raw: Raw, frontend: Frontend) -> tuple[Raw, Raw]:
    """Two random parts of the picture, of .08 to 1 of its area: at its size, mirrored, recolored, blurred.

    Source: Chen et al. 2020, SimCLR (arXiv:2002.05709), appendix A, with the strengths of MoCo v2 (arXiv:2003.04297),
    which SLIP takes over (Mu et al. 2021, arXiv:2112.12750, section 3.1): colors .4 in .8 of the views, no colors in
    .2, blurred in .5. Hue stays as it is. The picture is itself a crop in training, which `augment` makes.

    Raises:
        ValueError: pictures without seeds.
    """
    if raw.seeds is None:
        raise ValueError("distortions: the pictures have no seeds to draw views from; give Raw.seeds")
    size = tuple(raw.data.shape[-2:])

    def view(number: int, x: Tensor, seed: int) -> Tensor:
        rng = np.random.default_rng(seed_of("distortions", number, seed))
        x = flip(random_resized_crop(x, rng, size=size, scale=(0.08, 1.0)), rng)
        return blur(gray(color_jitter(x, rng, p=0.8), rng), rng)

    one, other = (
        torch.stack([view(number, x, seed) for x, seed in zip(raw.data, raw.seeds.tolist(), strict=True)])
        for number in (0, 1)
    )
    return replace(raw, data=one), replace(raw, data=other)
