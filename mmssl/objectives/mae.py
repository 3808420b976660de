"""Masked autoencoder: reconstruct what the frontend measures from the few tokens that are left visible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.masking import random_mask, tube_mask
from mmssl.nn.predictor import Predictor, places
from mmssl.nn.spread import spread, token_spread
from mmssl.types import Batch, Frontend, Hide, Loss, MaskPlan, Raw, Tokens

Mask = Literal["random", "tube"]
# (tokens, ratio, seeds) -> MaskPlan
MASKS: dict[Mask, Callable[..., MaskPlan]] = {
    "random": lambda tokens, **settings: random_mask(tokens.lengths, **settings),
    "tube": tube_mask,
}


class MAE(nn.Module):
    """Hide most tokens, encode the rest, and predict the values of the hidden ones with a small decoder.

    Source: He et al. 2022 (arXiv:2111.06377), section 3 and appendix A.1.
    Differs from the paper: the share to hide is rounded to the nearest token; each clip's mask comes from its own seed;
        any frontend with fixed features serves, on ragged clips too.
    Target: `target`, values that the modality computes from the raw input: pixels, or pixels normalized in each patch.
        Never learned ones.

    Args:
        encoder: encodes the visible tokens only.
        target: (raw, tokens) -> (B, N, P).
        target_dim: P.
        target_learned: whether the target is learned features of the frontend, which cannot be reconstructed.
        pictures: (frontend, tokens, masked, values) -> pictures of the target's values, for `reconstruct`.
        mask: "random" hides tokens anywhere (over space and time of video: Feichtenhofer et al. 2022, MAE-ST,
            arXiv:2205.09113); "tube" the same places in every time step (Tong et al. 2022, VideoMAE, arXiv:2203.12602).
        mask_ratio: share of each clip's tokens to hide.
        decoder_dim, decoder_depth, decoder_heads, decoder_mlp_dim, decoder_eps: of the Predictor.
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
        pictures: Callable[[Frontend, Tokens, Tensor, Tensor], dict[str, Any]] | None = None,
        mask: Mask = "random",
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        decoder_mlp_dim: int | None = None,
        decoder_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if target_learned:
            name = type(encoder.frontend).__name__
            raise ValueError(
                f"MAE reconstructs what the frontend measures, and {name} learns what it measures, so the target would "
                "collapse onto the prediction; choose a fixed target such as log_mel, or Wav2Vec2 for waveforms"
            )
        if mask not in MASKS:
            raise ValueError(f"objective.mask={mask!r}: choose one of {', '.join(MASKS)}")
        self.encoder = encoder
        self.target = target
        self.pictures = pictures
        self.mask, self.mask_ratio = mask, mask_ratio
        # nothing is replaced here, so a mask token that the encoder may have gets no gradient
        self.skips_parameters = (
            encoder.mask_token is not None
            or encoder.transformer.layer_drop > 0
            or getattr(encoder.frontend, "grad_mult", 1.0) == 0
        )
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
        """Sum over hidden tokens of the mean squared error over their P values; the count is hidden tokens."""
        tokens, plan = self._hide(batch)
        encoded = self.encoder(tokens, plan, self.hide)
        prediction = self.predictor(encoded, tokens, plan)  # (M, P)
        hidden = places(plan.masked, prediction.device)
        # a target may hold a product of its own, as log_mel does
        with torch.autocast(prediction.device.type, enabled=False):
            target = self.target(batch.raw, tokens).flatten(0, 1).index_select(0, hidden).detach().float()
            prediction = prediction.float()
            total = (prediction - target).square().mean(1).sum()
        count = len(hidden)
        metrics = {
            "loss": total.detach(),
            "target_std": spread(target) * count,
            "prediction_std": spread(prediction) * count,
            "feature_std": token_spread(encoded) * count,
        }
        return Loss(total, count, {name: (value, count) for name, value in metrics.items()})

    def after_step(self, step: int) -> None:
        """Nothing here changes with time."""

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> dict[str, Any]:
        """What the model sees of a batch and what it makes of it, for looking at.

        Hidden tokens show the prediction, visible ones their own values.

        Returns:
            "input", "masked" and "reconstruction", as `pictures` draws them: (B, C, H, W); and "note", what to print
            with them.

        Raises:
            ValueError: this target cannot be drawn.
        """
        if self.pictures is None:
            raise ValueError(
                "objective.target: there is no picture of this target; pixels and normalized_pixels have one"
            )
        training = self.training
        self.eval()
        tokens, plan = self._hide(batch)
        prediction = self.predictor(self.encoder(tokens, plan, self.hide), tokens, plan)
        self.train(training)
        values = self.target(batch.raw, tokens).float().clone()  # it may be the tokens' own features
        masked = plan.masked.to(values.device)
        values[masked] = prediction.float()
        return self.pictures(self.encoder.frontend, tokens, masked, values)

    def _hide(self, batch: Batch) -> tuple[Tokens, MaskPlan]:
        tokens = self.encoder.tokens(batch.raw)
        return tokens, MASKS[self.mask](tokens, ratio=self.mask_ratio, seeds=batch.seeds)
