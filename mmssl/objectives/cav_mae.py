"""Contrastive audiovisual masked autoencoder: reconstruct both modalities from both, and tell which belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl import distributed
from mmssl.encoder import Encoders
from mmssl.nn.heads import mean_pool
from mmssl.nn.joined import JointPredictor, encode_jointly
from mmssl.nn.joint import labels_of, spreads
from mmssl.nn.partners import both_ways
from mmssl.nn.reconstruction import Reconstructed
from mmssl.objectives.paired import masked, reconstruction, refuse_pair
from mmssl.types import Batch, Encoded, Hide, Loss


class CAVMAE(nn.Module):
    """What is visible goes through blocks of its modality, then three times through shared ones: sound, frames, both.

    Source: Gong et al. 2022 (CAV-MAE, arXiv:2210.07839), section 2.3, with the numbers of the authors' scripts: of each
        modality alone the mean over tokens is told from those of other clips; of both together hidden tokens are
        reconstructed. With `backbone: {name: shared, own_blocks: 11, own_norms: true}` the last of 12 blocks is the
        joint one, and has norms for sound, for frames and for both.
    Differs from the paper: the contrast goes both ways, and the negatives are those of all processes, where the
        released code has one way and those of one GPU; a recipe starts from new weights, where theirs are an image
        MAE's; the error of a modality is the mean over each clip's hidden tokens, so that clips of any length count the
        same; pairs that agree in a key of their rows need not be negatives of each other (`same`). Vectors that say of
        an encoder's tokens which modality they are would only add to what projects them.
    Target: `targets`, values that each modality computes from its raw input, never learned ones; and the batch itself.
        In training it is that of all processes, and the gradient is that of one process on all of it; while
        evaluating, it is a micro-batch.

    Args:
        encoder: of two modalities on a trunk.
        targets: modality -> what is reconstructed of it; a recipe says the name of one for each.
        mask_ratio: modality -> share of its tokens to hide, for both losses.
        weight: of the contrast, beside 1 for the error of each modality.
        temperature: of the contrast, constant.
        same: key of a row, such as "text": pairs with the same value are no negatives of each other. None where all
            others are.
        decoder_dim, decoder_depth, decoder_heads, decoder_mlp_dim, decoder_eps: of the JointPredictor.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "drop"
    pairs: ClassVar[bool] = True
    contrasts: ClassVar[bool] = True

    def __init__(
        self,
        encoder: Encoders,
        *,
        targets: Mapping[str, Reconstructed],
        mask_ratio: Mapping[str, float],
        weight: float = 0.01,
        temperature: float = 0.05,
        same: str | None = None,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        decoder_mlp_dim: int | None = None,
        decoder_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        refuse_pair("CAV-MAE", encoder, targets, mask_ratio)
        if weight <= 0:
            raise ValueError(f"objective.weight={weight:g}: must be above 0; without the contrast choose av_mae")
        if temperature <= 0:
            raise ValueError(f"objective.temperature={temperature:g}: must be above 0")
        self.encoder = encoder
        self.targets, self.mask_ratio = dict(targets), dict(mask_ratio)
        self.weight, self.temperature, self.same = weight, temperature, same
        self.fusion = encoder.joint()
        self.dim = self.fusion.dim
        self.skips_parameters = any(encoder[name].skips_parameters(self.hide) for name in encoder)
        self.predictor = JointPredictor(
            dim_in=self.dim,
            dim=decoder_dim,
            depth=decoder_depth,
            heads=decoder_heads,
            mlp_dim=decoder_mlp_dim,
            out_dims={name: targets[name].dim for name in encoder},
            eps=decoder_eps,
        )

    def joint(self, modality: str, encoded: Encoded) -> Tensor:
        """(B, D) float32, of length 1: clips of a modality in the space of both."""
        return F.normalize(mean_pool(encoded.x, encoded.lengths, encoded.n_prefix).float(), dim=1)

    def forward(self, batch: Batch) -> Loss:
        """Sum over clips of both errors and the weighed contrast, a mean of both ways; the count is clips.

        The errors are means over hidden tokens of the mean squared error over their values, "contrast" is a
        cross-entropy in nats.
        """
        tokens, plans = masked(self.encoder, batch, self.mask_ratio)
        own = self.encoder.own_blocks
        encoded = {
            name: self.encoder[name](tokens[name], plans[name], self.hide, layers=[own]) for name in self.encoder
        }
        below = {name: replace(each, x=each.layers[own]) for name, each in encoded.items()}
        fused = encode_jointly(self.fusion, below)
        errors, metrics = reconstruction(self.predictor, fused, tokens, plans, batch, self.targets)
        pairs = torch.stack([self.joint(name, each) for name, each in encoded.items()], 1)
        places = distributed.places(len(batch), exchange=self.training).to(pairs.device)
        labels = labels_of(batch, self.same, places, "CAV-MAE")
        everyone, ids = distributed.everyone(pairs, labels, exchange=self.training)
        losses, told = both_ways(pairs, everyone, places, scale=1 / self.temperature, negatives=labels[:, None] != ids)
        contrast, count = losses.sum(), len(batch)
        total = torch.stack(list(errors.values())).sum() + self.weight * contrast
        losses_said = {"loss": (total.detach(), count), "contrast": (contrast.detach(), count)}
        stds = spreads(self.encoder, pairs, torch.ones(pairs.shape[:2], dtype=torch.bool))
        return Loss(total, count, {**losses_said, **metrics, **told, **stds})

    def after_step(self, step: int) -> None:
        """Nothing here changes with time."""
