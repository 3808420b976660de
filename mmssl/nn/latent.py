"""Targets that are not measured but computed by a teacher: made from its layers, and regressed to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.nn.teacher import Teacher
from mmssl.types import Point, Raw, Tokens, valid_mask

Norm = Literal["none", "layer", "instance"]
# parts of an encoder that a teacher may copy, see `parts_to_copy`
Copied = Literal["frontend", "positions"]


def instance_norm(x: Tensor, lengths: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Bring each channel of each clip to mean 0 and deviation 1 over the clip's real tokens.

    Source: Ulyanov et al. 2016 (arXiv:1607.08022), over real tokens only, so that a clip's target is its own.

    Args:
        x: (B, N, D), zero past each length.
        lengths: (B,) int64 on the CPU.

    Returns:
        (B, N, D), zero past each length.
    """
    if int(lengths.min()) == x.shape[1]:
        variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        return (x - mean) * (variance + eps).rsqrt()
    counts = lengths.to(x.device)[:, None, None]
    real = valid_mask(lengths, x.shape[1], x.device)[..., None]
    centered = (x - x.sum(1, keepdim=True) / counts) * real
    return centered * (centered.square().sum(1, keepdim=True) / counts + eps).rsqrt()


def average_layers(layers: Sequence[Tensor], lengths: Tensor, *, layer_norm: Norm, target_norm: Norm) -> Tensor:
    """The mean of several layers, each normalized before and the mean normalized after.

    Source: Baevski et al. 2022, data2vec (arXiv:2202.03555), section 3.3.

    Args:
        layers: K tensors (B, N, D), zero past each length.
        lengths: (B,) int64 on the CPU.
        layer_norm, target_norm: "instance" over a clip's tokens, see `instance_norm`; "layer" over a token's channels.

    Returns:
        (B, N, D) float32.
    """
    total = _normalized(layers[0], lengths, layer_norm)
    for layer in layers[1:]:
        total = total + _normalized(layer, lengths, layer_norm)
    return _normalized(total / len(layers), lengths, target_norm)


@torch.no_grad()
def averaged_target(
    teacher: Teacher,
    raw: Raw,
    tokens: Tokens | None,
    *,
    layers: Sequence[int],
    point: Point,
    layer_norm: Norm,
    target_norm: Norm,
) -> Tensor:
    """What a teacher makes of whole clips, see `average_layers`.

    Args:
        teacher: of an encoder.
        tokens: of these clips, for a teacher that copies the student's frontend; None to let it read `raw` itself.
        layers, point: which of its layers, see `Encoded.layers`.

    Returns:
        (B, N, D) float32.
    """
    if tokens is None:
        encoder: Any = teacher.module
        tokens = encoder.tokens(raw)
    whole = teacher(tokens, layers=layers, point=point)
    read = [whole.layers[i][:, whole.n_prefix :] for i in layers]
    return average_layers(read, tokens.lengths, layer_norm=layer_norm, target_norm=target_norm)


def regression(prediction: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """The error of each prediction in float32: squared, or smooth L1, summed over D and divided by its root.

    Source: data2vec, section 3.4; the scale is the released code's.

    Args:
        prediction, target: (M, D).
        beta: where smooth L1 goes from squared to absolute; 0 for squared errors throughout.

    Returns:
        (M,)
    """
    prediction, target = prediction.float(), target.float()
    error = (
        F.mse_loss(prediction, target, reduction="none")
        if beta == 0
        else F.smooth_l1_loss(prediction, target, reduction="none", beta=beta)
    )
    return error.sum(1) / prediction.shape[1] ** 0.5


def top_layers(depth: int, top_k: int) -> list[int]:
    """The numbers of the last `top_k` of `depth` layers.

    Raises:
        ValueError: there are not so many.
    """
    if not 1 <= top_k <= depth:
        raise ValueError(f"objective.top_k={top_k}: choose from 1 to transformer.depth={depth} layers to average")
    return list(range(depth - top_k + 1, depth + 1))


def parts_to_copy(encoder: nn.Module, copied: Iterable[Copied]) -> list[str]:
    """Those parts of an encoder that a teacher copies which have parameters.

    Raises:
        ValueError: the teacher is to read tokens of the student's that dropout, dither or stripes have changed.
    """
    parts: list[str] = list(copied)
    frontend = encoder.get_submodule("frontend")
    if "frontend" in parts:
        stripes = getattr(frontend, "stripes", {})
        chances = {
            "dropout": getattr(frontend, "dropout", 0.0),
            "dither": getattr(getattr(frontend, "filterbank", None), "dither", 0.0),
            "stripes": stripes if any(stripes.values()) else 0.0,
        }
        for name, value in chances.items():
            if value:
                raise ValueError(
                    f"frontend.{name}={value}: a teacher that copies the frontend reads the student's tokens, and a "
                    f"target must not depend on {name}; leave it out, or take frontend out of objective.copied"
                )
    return [part for part in parts if next(encoder.get_submodule(part).parameters(), None) is not None]


def _normalized(x: Tensor, lengths: Tensor, norm: Norm) -> Tensor:
    x = x.float()
    if norm == "instance":
        return instance_norm(x, lengths)
    if norm == "layer":
        x = F.layer_norm(x, x.shape[-1:])
    return x
