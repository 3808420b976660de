"""Siamese masked autoencoder: reconstruct a view of a clip, nearly all of it hidden, from another one seen whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.cross import CrossPredictor
from mmssl.nn.masking import random_mask
from mmssl.nn.reconstruction import token_errors
from mmssl.nn.spread import token_spread
from mmssl.types import Batch, Frontend, Hide, Loss, Raw, Tokens


class SiamMAE(nn.Module):
    """Encode one view of a clip whole and the little that is visible of another; a decoder brings the two together.

    Source: Gupta et al. 2023 (SiamMAE, arXiv:2305.14344), section 3: a frame of a video, and a later one; Eymaël et al.
        2024 (CropMAE, arXiv:2403.17823), section 3: a picture, and a crop of it.
    Differs from the papers: the share to hide is rounded to the nearest token, where CropMAE's .985 leaves 2 of 196.
    Target: `target`, values that the modality computes from the hidden view. Never learned ones.

    Args:
        encoder: shared by both views.
        target, target_dim, target_learned: see `MAE`.
        views: (raw, frontend) -> the view that is seen and the one that is to be reconstructed. What is drawn comes
            from the seeds of `raw`.
        mask_ratio: share of the tokens of the second view to hide; .95 in SiamMAE.
        decoder_dim, decoder_depth, decoder_heads, decoder_mlp_dim, decoder_eps: of the CrossPredictor.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "drop"

    def __init__(
        self,
        encoder: Encoder,
        *,
        target: Callable[[Raw, Tokens], Tensor],
        target_dim: int,
        target_learned: bool = False,
        views: Callable[[Raw, Frontend], tuple[Raw, Raw]] | None,
        mask_ratio: float = 0.95,
        decoder_dim: int = 256,
        decoder_depth: int = 4,
        decoder_heads: int = 8,
        decoder_mlp_dim: int | None = None,
        decoder_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        name = type(encoder.frontend).__name__
        if views is None:
            raise ValueError(f"SiamMAE compares two views of a clip, and there are none for {name}; choose mae")
        encoder.refuse_learned(target_learned, "SiamMAE reconstructs", choose="a fixed target")
        self.encoder = encoder
        self.target, self.views = target, views
        self.mask_ratio = mask_ratio
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.predictor = CrossPredictor(
            dim_in=encoder.dim,
            dim=decoder_dim,
            depth=decoder_depth,
            heads=decoder_heads,
            mlp_dim=decoder_mlp_dim,
            out_dim=target_dim,
            eps=decoder_eps,
        )

    def forward(self, batch: Batch) -> Loss:
        """Sum over hidden tokens of the mean squared error over their P values; the count is hidden tokens.

        Raises:
            ValueError: a clip that has no two views.
        """
        seen, shown = self.views(batch.raw, self.encoder.frontend)
        others, tokens = self.encoder.tokens(seen), self.encoder.tokens(shown, late=True)
        plan = random_mask(tokens.lengths, ratio=self.mask_ratio, seeds=batch.seeds)
        other, encoded = self.encoder(others), self.encoder(tokens, plan, self.hide)
        prediction = self.predictor(encoded, tokens, plan, other, others)  # (M, P)
        errors, found = token_errors(prediction, self.target, shown, tokens, plan.masked)
        total, count = errors.sum(), len(errors)
        spreads = {**found, "feature_std": (token_spread(other) * count, count)}
        return Loss(total, count, {"loss": (total.detach(), count), **spreads})

    def after_step(self, step: int) -> None:
        """Nothing here changes with time."""
