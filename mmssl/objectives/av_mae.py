"""Audiovisual masked autoencoder: hide most of a video's frames and of its sound, and reconstruct both from both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl.encoder import Encoders
from mmssl.nn.joined import JointPredictor, encode_jointly
from mmssl.nn.masking import random_mask
from mmssl.nn.reconstruction import Reconstructed, clip_errors, token_errors
from mmssl.nn.spread import token_spread
from mmssl.types import Batch, Encoded, Hide, Loss, MaskPlan, Tokens

Metrics = dict[str, tuple[float | Tensor, float]]


class AVMAE(nn.Module):
    """Encode what is visible of each modality by its own blocks, then of both in one sequence; a decoder fills in both.

    Source: Georgescu et al. 2022 (Audiovisual Masked Autoencoders, arXiv:2212.05922), section 3: joint reconstruction
        with its encoder of "mid-fusion" and one decoder. With `backbone.own_blocks` of 0 it is their "early fusion".
    Differs from the paper: the share to hide is rounded to the nearest token; the mean is over each clip's hidden
        tokens, so that a long clip counts as much as a short one. Modality inpainting is not here.
    Target: `targets`, values that each modality computes from its raw input, never learned ones. The loss is the mean
        of the two modalities'.

    Args:
        encoder: of two modalities on a trunk, of which the first blocks may be each one's own. They encode visible
            tokens only.
        targets: modality -> what is reconstructed of it; a recipe says the name of one for each.
        mask_ratio: modality -> share of its tokens to hide, anywhere, whatever is hidden of the other.
        decoder_dim, decoder_depth, decoder_heads, decoder_mlp_dim, decoder_eps: of the JointPredictor.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "drop"
    pairs: ClassVar[bool] = True

    def __init__(
        self,
        encoder: Encoders,
        *,
        targets: Mapping[str, Reconstructed],
        mask_ratio: Mapping[str, float],
        decoder_dim: int = 512,
        decoder_depth: int = 4,
        decoder_heads: int = 8,
        decoder_mlp_dim: int | None = None,
        decoder_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        refuse_pair("AV-MAE", encoder, targets, mask_ratio)
        self.encoder = encoder
        self.targets, self.mask_ratio = dict(targets), dict(mask_ratio)
        self.fusion = encoder.joint()
        # norms that the shared blocks have for each modality alone are never called upon
        self.skips_parameters = encoder.own_norms or any(encoder[name].skips_parameters(self.hide) for name in encoder)
        self.predictor = JointPredictor(
            dim_in=self.fusion.dim,
            dim=decoder_dim,
            depth=decoder_depth,
            heads=decoder_heads,
            mlp_dim=decoder_mlp_dim,
            out_dims={name: targets[name].dim for name in encoder},
            eps=decoder_eps,
        )

    def forward(self, batch: Batch) -> Loss:
        """Sum over clips of the mean of both modalities' losses, each the mean over hidden tokens of the mean squared
        error over their values; the count is clips.
        """
        tokens, plans = masked(self.encoder, batch, self.mask_ratio)
        own = self.encoder.own_blocks
        encoded = {name: self.encoder[name](tokens[name], plans[name], self.hide, until=own) for name in self.encoder}
        fused = encode_jointly(self.fusion, encoded)
        losses, metrics = reconstruction(self.predictor, fused, tokens, plans, batch, self.targets)
        total, count = torch.stack(list(losses.values())).mean(), len(batch)
        return Loss(total, count, {"loss": (total.detach(), count), **metrics})

    def after_step(self, step: int) -> None:
        """Nothing here changes with time."""


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
    tokens = {name: encoder[name].tokens(batch.of(name)) for name in encoder}
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
