"""ViC-MAE: reconstruct each of two views of a clip, and tell their pooled tokens from those of other clips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl import distributed
from mmssl.encoder import Encoder
from mmssl.nn.heads import mean_pool
from mmssl.nn.masking import random_mask
from mmssl.nn.partners import Projector, both_ways
from mmssl.nn.predictor import Predictor
from mmssl.nn.reconstruction import clip_errors, token_errors
from mmssl.nn.spread import spread, token_spread
from mmssl.types import Batch, Frontend, Hide, Loss, Raw, Tokens


class ViCMAE(nn.Module):
    """A masked autoencoder of two views, whose visible tokens, pooled, must find each other among all other clips'.

    Source: Hernandez, Villegas and Ordonez 2023 (ViC-MAE, arXiv:2303.12001), section 3, with the numbers of the
        authors' repository: two frames of a video, or two views of a picture; both masked, encoded and reconstructed;
        the mean of the visible tokens, without the class token, through an MLP; NT-Xent on top.
    Differs from the paper: pictures, video or sound, not several in one run; what views there are, the modality says;
        the MLP's norms are LayerNorms (see `Projector`). Where views are of several lengths, each clip counts the same.
    Target: `target`, values that the modality computes from each view, never learned ones; and the other view. In
        training the other clips are those of all processes, and the gradient is that of one process on all of them;
        while evaluating, they are those of a micro-batch.

    Args:
        encoder: of both views.
        target, target_dim, target_learned: see `MAE`.
        views: (raw, frontend) -> two views of each clip, as many tokens in one as in the other. What is drawn comes
            from the seeds of `raw`.
        mask_ratio: share of the tokens of each view to hide, each with a mask of its own.
        weight: share of the contrast in the loss; the rest is the reconstruction's.
        temperature: of the contrast, constant.
        hidden_dim, dim: of the MLP: width of its two hidden layers, and of the space in which clips are told apart.
        decoder_dim, decoder_depth, decoder_heads, decoder_mlp_dim, decoder_eps: of the Predictor.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "drop"
    contrasts: ClassVar[bool] = True

    def __init__(
        self,
        encoder: Encoder,
        *,
        target: Callable[[Raw, Tokens], Tensor],
        target_dim: int,
        target_learned: bool = False,
        views: Callable[[Raw, Frontend], tuple[Raw, Raw]] | None,
        mask_ratio: float = 0.5,
        weight: float = 0.03,
        temperature: float = 0.1,
        hidden_dim: int = 4096,
        dim: int = 128,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        decoder_mlp_dim: int | None = None,
        decoder_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        name = type(encoder.frontend).__name__
        if views is None:
            raise ValueError(f"ViC-MAE compares two views of a clip, and there are none for {name}; choose mae")
        encoder.refuse_learned(target_learned, "ViC-MAE reconstructs", choose="a fixed target")
        if not 0 < weight < 1:
            raise ValueError(f"objective.weight={weight:g}: the contrast's share of the loss lies between 0 and 1")
        if temperature <= 0:
            raise ValueError(f"objective.temperature={temperature:g}: must be above 0")
        self.encoder = encoder
        self.target, self.views = target, views
        self.mask_ratio, self.weight, self.temperature = mask_ratio, weight, temperature
        self.dim = dim
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.projector = Projector(encoder.dim, hidden_dim=hidden_dim, out_dim=dim)
        self.predictor = Predictor(
            dim_in=encoder.dim,
            dim=decoder_dim,
            depth=decoder_depth,
            heads=decoder_heads,
            mlp_dim=decoder_mlp_dim,
            out_dim=target_dim,
            eps=decoder_eps,
        )

    def forward(self, batch: Batch) -> Loss:
        """Sum over clips of both losses, weighed, each the mean of both views; the count is clips.

        "reconstruction" is the mean squared error over the hidden tokens of a view, "contrast" the cross-entropy in
        nats of finding the other view.

        Raises:
            ValueError: a clip that has no two views, or views of several sizes.
        """
        both = _both(*self.views(batch.raw, self.encoder.frontend))
        tokens = self.encoder.tokens(both, late=True)
        # two masks for each clip, of which each view takes one
        plan = random_mask(tokens.lengths[::2], ratio=self.mask_ratio, seeds=batch.seeds, clones=2)
        plan = replace(plan, rows=torch.arange(len(both)))
        encoded = self.encoder(tokens, plan, self.hide)
        errors, spreads = token_errors(self.predictor(encoded, tokens, plan), self.target, both, tokens, plan.masked)
        reconstruction = clip_errors(errors, plan.masked) / 2
        pairs = self.projector(mean_pool(encoded.x, encoded.lengths, encoded.n_prefix)).view(len(batch), 2, -1)
        own = distributed.places(len(batch), exchange=self.training).to(pairs.device)
        (everyone,) = distributed.everyone(pairs, exchange=self.training)
        losses, told = both_ways(pairs, everyone, own, scale=1 / self.temperature, within=True)
        contrast = losses.sum()
        total, count = (1 - self.weight) * reconstruction + self.weight * contrast, len(batch)
        metrics: dict[str, tuple[float | Tensor, float]] = {
            "loss": (total.detach(), count),
            "reconstruction": (reconstruction.detach(), count),
            "contrast": (contrast.detach(), count),
            **told,
            **spreads,
            "feature_std": (token_spread(encoded) * count, count),
            # times the root of their width: of unit vectors that point everywhere it is about 1
            "view_std": (spread(pairs.detach()[:, 0] * self.dim**0.5) * count, count),
        }
        return Loss(total, count, metrics)

    def after_step(self, step: int) -> None:
        """Nothing here changes with time."""


def _both(one: Raw, other: Raw) -> Raw:
    """Both views of each clip, one after the other: 2B clips.

    Raises:
        ValueError: they are of several sizes.
    """
    if one.data.shape != other.data.shape or not torch.equal(one.lengths, other.lengths):
        sizes = " and ".join(" x ".join(map(str, view.data.shape[1:])) for view in (one, other))
        raise ValueError(f"views: those of a clip must be of one size, and these are {sizes}; choose other views")
    return replace(
        one,
        data=torch.stack([one.data, other.data], 1).flatten(0, 1),
        lengths=one.lengths.repeat_interleave(2),
        ids=[name for name in one.ids for _ in range(2)],
        seeds=None if one.seeds is None else one.seeds.repeat_interleave(2),
    )
