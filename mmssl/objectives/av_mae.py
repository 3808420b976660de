"""Audiovisual masked autoencoder: hide most of a video's frames and of its sound, and reconstruct both from both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from mmssl.encoder import Encoders
from mmssl.nn.joined import JointPredictor, encode_jointly
from mmssl.nn.reconstruction import Reconstructed
from mmssl.objectives.paired import masked, reconstruction, refuse_pair
from mmssl.types import Batch, Hide, Loss


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
