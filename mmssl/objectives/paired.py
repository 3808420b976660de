"""What objectives of pairs share: clips of modalities in one space, and two modalities that are hidden in part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mmssl.encoder import Encoders
from mmssl.nn import joint
from mmssl.nn.joined import JointPredictor
from mmssl.nn.masking import random_mask
from mmssl.nn.partners import Metrics
from mmssl.nn.reconstruction import Reconstructed, clip_errors, token_errors
from mmssl.nn.spread import token_spread
from mmssl.types import Batch, Encoded, Hide, MaskPlan, Raw, Tokens

_LARGEST = math.log(100.0)  # of a learned scale; Radford et al. 2021 (CLIP, arXiv:2103.00020), section 2.5


def refuse_space(encoder: Encoders, pool: Mapping[str, str], chunk: int | None = None) -> None:
    """Raises ValueError where there is no pooling for each modality, or clips cannot be encoded `chunk` at a time."""
    joint.refuse_pools(pool, {name: encoder[name].n_prefix for name in encoder})
    joint.refuse_chunk(chunk, [encoder[name].transformer.layer_drop for name in encoder])


def skips_parameters(encoder: Encoders, hide: Hide) -> bool:
    """See `Encoder.skips_parameters`; and of more than two modalities a batch may have none of one."""
    return len(encoder) > 2 or any(encoder[name].skips_parameters(hide) for name in encoder)


def begin_scale(temperature: float) -> nn.Parameter:
    """(1,) the logarithm of a scale that is learned, from 1 to 100, and begins at one over `temperature`.

    Raises:
        ValueError: it would begin outside these bounds.
    """
    if not 0.01 <= temperature <= 1:
        raise ValueError(f"objective.temperature={temperature:g}: must be from 0.01 to 1, and starts at 0.07")
    return nn.Parameter(torch.tensor([-math.log(temperature)]))


@torch.no_grad()
def bound_scale(log_scale: Tensor) -> None:
    """Bring the scale back to 1 to 100, in place."""
    log_scale.clamp_(0.0, _LARGEST)


def in_one_space(
    batch: Batch,
    encoder: Encoders,
    into: Callable[[str, Encoded], Tensor],
    *,
    dim: int,
    like: Tensor,
    parts: int = 1,
) -> tuple[Tensor, Tensor]:
    """The clips of a batch, nothing of them hidden.

    Args:
        into: (modality, encoded clips) -> (B, J) vectors.
        dim, like, parts: see `joint.embedded`.

    Returns:
        (B, modalities, J) vectors, zero where a clip lacks a modality; and on the CPU where not, bool.
    """

    def vectors(name: str, raw: Raw) -> Tensor:
        return into(name, encoder[name](encoder[name].tokens(raw)))

    return joint.embedded(batch, encoder, vectors, dim=dim, like=like, parts=parts)


def refuse_pair(
    objective: str, encoder: Encoders, targets: Mapping[str, Reconstructed], mask_ratio: Mapping[str, float]
) -> None:
    """Raises ValueError where there are not two modalities, a share to hide of each, and fixed targets."""
    if len(encoder) != 2:
        raise ValueError(f"modality: {objective} joins two modalities, and these are {', '.join(encoder)}")
    if set(mask_ratio) != set(encoder) or not all(0 < ratio < 1 for ratio in mask_ratio.values()):
        raise ValueError(
            f"objective.mask_ratio={dict(mask_ratio)}: give a share of the tokens to hide, between 0 and 1, for each "
            f"of {' and '.join(encoder)}"
        )
    for name in encoder:
        encoder[name].refuse_learned(targets[name].learned, f"{objective} reconstructs", choose="a fixed target")


def masked(
    encoder: Encoders, batch: Batch, ratios: Mapping[str, float]
) -> tuple[dict[str, Tokens], dict[str, MaskPlan]]:
    """Modality -> its tokens, and which of them are hidden, each modality's by themselves."""
    tokens = {name: encoder[name].tokens(batch.of(name), late=True) for name in encoder}
    plans = {
        # other seeds for each: grids of one size would be hidden in the same places otherwise
        name: random_mask(tokens[name].lengths, ratio=ratios[name], seeds=batch.seeds + place)
        for place, name in enumerate(encoder)
    }
    return tokens, plans


def reconstruction(
    predictor: JointPredictor,
    fused: Mapping[str, Encoded],
    tokens: Mapping[str, Tokens],
    plans: Mapping[str, MaskPlan],
    batch: Batch,
    targets: Mapping[str, Reconstructed],
) -> tuple[dict[str, Tensor], Metrics]:
    """Modality -> the error of its hidden tokens, summed over clips, see `clip_errors`; and what to log of them."""
    predictions = predictor(fused, tokens, plans)
    losses: dict[str, Tensor] = {}
    metrics: Metrics = {}
    for name, prediction in predictions.items():
        hidden, values = plans[name].masked, targets[name].values
        errors, spreads = token_errors(prediction, values, batch.of(name), tokens[name], hidden)
        losses[name] = clip_errors(errors, hidden)
        metrics[f"{name}_loss"] = losses[name].detach(), len(batch)
        spreads["feature_std"] = token_spread(fused[name]) * len(batch), len(batch)
        for key, (value, count) in spreads.items():
            before = metrics.get(key, (0.0, 0.0))
            metrics[key] = before[0] + value, before[1] + count
    return losses, metrics
