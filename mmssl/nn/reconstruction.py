"""How far predictions of hidden tokens lie from their target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmssl.nn.predictor import places
from mmssl.nn.spread import spread
from mmssl.types import Raw, Tokens


@dataclass(frozen=True)
class Reconstructed:
    """What is predicted of the hidden tokens of one modality.

    values: (raw, tokens) -> (B, N, P).
    dim: P.
    learned: whether they are learned features of the frontend, which cannot be reconstructed.
    """

    values: Callable[[Raw, Tokens], Tensor]
    dim: int
    learned: bool = False


def token_errors(
    prediction: Tensor, target: Callable[[Raw, Tokens], Tensor], raw: Raw, tokens: Tokens, predicted: Tensor
) -> tuple[Tensor, dict[str, tuple[float | Tensor, float]]]:
    """The mean squared error of each predicted token over its P values, and how far predictions and targets spread.

    Args:
        prediction: (M, P), in the row-major order of `predicted`.
        target: (raw, tokens) -> (B, N, P).
        predicted: (B, N) bool on the CPU, True at M tokens.

    Returns:
        (M,) float32; and name -> (sum, count) for the log.
    """
    hidden = places(predicted, prediction.device)
    # a target may hold a product of its own, as log_mel does
    with torch.autocast(prediction.device.type, enabled=False):
        values = target(raw, tokens).flatten(0, 1).index_select(0, hidden).detach().float()
        prediction = prediction.float()
        errors = (prediction - values).square().mean(1)
    count = len(hidden)
    return errors, {
        "target_std": (spread(values) * count, count),
        "prediction_std": (spread(prediction) * count, count),
    }


def clip_errors(errors: Tensor, predicted: Tensor) -> Tensor:
    """The mean error of each clip's predicted tokens, summed over clips: each clip counts the same, however long.

    Args:
        errors: (M,), in the row-major order of `predicted`.
        predicted: (B, N) bool on the CPU, True at M tokens.
    """
    counts = predicted.sum(1)
    shares = counts.clamp_min(1).reciprocal().repeat_interleave(counts)
    return (errors * shares.to(errors.device, non_blocking=True)).sum()
