"""Fixed patches as targets, whatever they were cut from: pictures, spectrograms, video."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.types import Frontend, Tokens

_EPS = 1e-6  # of the variance, as He et al. have it


def patches(tokens: Tokens) -> Tensor:
    """The values of each patch as the frontend hands them on: (B, N, P) float32.

    Raises:
        ValueError: it hands on none.
    """
    if tokens.feat is None:
        raise ValueError(
            "objective.target: pixels and spectrograms can only be had from a frontend that hands on its patches as "
            "features"
        )
    return tokens.feat.float()


def normalized(tokens: Tokens, *, plain: str) -> Tensor:
    """Each patch brought to mean 0 and (unbiased) deviation 1: (B, N, P).

    Args:
        plain: the name of the target that is not normalized, for the error.

    Raises:
        ValueError: patches of one value.
    """
    values = patches(tokens)
    size = values.shape[-1]
    if size < 2:
        raise ValueError(
            f"objective.target=normalized_{plain}: a patch of one value has no deviation; choose {plain}, or larger "
            "patches with frontend.size"
        )
    # A layer norm is the quickest way over the patches, but takes the biased variance.
    bias = (size - 1) / size
    return F.layer_norm(values, (size,), eps=_EPS * bias) * bias**0.5


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, P) -> mean and deviation of each patch as `normalized` takes them, (B, N, 1)."""
    variance, mean = torch.var_mean(values, -1, keepdim=True)
    return mean, (variance + _EPS).sqrt()


def width(frontend: Frontend) -> int:
    """The P of a frontend."""
    return frontend.feature_dim
