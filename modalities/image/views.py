"""Two views of a picture: (raw, frontend) -> the one that is seen, and the one that is to be told from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from mmssl.modalities.image.augment import random_resized_crop
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
