"""How far apart things lie: the number that shows a collapse while it happens."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.nn.predictor import places
from mmssl.types import Encoded, Tokens, valid_mask


@torch.no_grad()
def spread(values: Tensor) -> Tensor:
    """The standard deviation over items of each value, averaged over values: 0 says that all items are the same.

    Args:
        values: (M, D) items; none of them have no spread.
    """
    if not len(values):
        return values.new_zeros((), dtype=torch.float32)
    values = values.float()
    # by hand: torch's own deviation over the first axis is ten times as slow
    return (values - values.mean(0)).square().mean(0).sqrt().mean()


@torch.no_grad()
def token_spread(encoded: Encoded) -> Tensor:
    """`spread` of all real tokens of a batch, without class token and registers."""
    real = valid_mask(encoded.lengths, encoded.x.shape[1])
    real[:, : encoded.n_prefix] = False
    return spread(encoded.x.flatten(0, 1).index_select(0, places(real, encoded.x.device)))


@torch.no_grad()
def mean_distance(values: Tensor) -> Tensor:
    """How far items lie from their mean, averaged over values: the mean absolute error of predicting that mean.

    Args:
        values: (M, D) items; none of them lie nowhere, at distance 0.
    """
    if not len(values):
        return values.new_zeros((), dtype=torch.float32)
    values = values.float()
    return (values - values.mean(0)).abs().mean()


@torch.no_grad()
def feature_spread(tokens: Tokens) -> Tensor:
    """`spread` of the frontend's features over all real tokens of a batch; of its tokens where it gives none."""
    features = tokens.x if tokens.feat is None else tokens.feat
    real = valid_mask(tokens.lengths, features.shape[1])
    return spread(features.flatten(0, 1).index_select(0, places(real, features.device)))
