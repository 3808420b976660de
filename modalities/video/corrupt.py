"""Ways to spoil a clip, for measuring: those of pictures, frame by frame, with noise of its own in each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mmssl.modalities.image import corrupt as image


def _each_frame(spoil: Callable[..., Tensor], x: Tensor, rng: np.random.Generator, *, severity: int) -> Tensor:
    return torch.stack([spoil(frame, rng, severity=severity) for frame in x.unbind(1)], 1)


CORRUPTIONS: dict[str, Callable[..., Tensor]] = {
    name: partial(_each_frame, spoil) for name, spoil in image.CORRUPTIONS.items()
}
