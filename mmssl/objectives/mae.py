"""Masked autoencoder: reconstruct what the frontend measures from the few tokens that are left visible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.masking import COLORS, color_mask, plan_given, random_mask, running_cells, tube_mask
from mmssl.nn.predictor import Predictor
from mmssl.nn.reconstruction import token_errors
from mmssl.nn.seeds import normal_per_clip
from mmssl.nn.spread import token_spread
from mmssl.types import Batch, Frontend, Hide, Loss, MaskPlan, Raw, Tokens

Mask = Literal["random", "tube", "red", "blue", "green", "purple"]
DecoderMask = Literal["running_cells"]
# (tokens, ratio, seeds) -> MaskPlan
MASKS: dict[Mask, Callable[..., MaskPlan]] = {
    "random": lambda tokens, **settings: random_mask(tokens.lengths, **settings),
    "tube": tube_mask,
    **{color: partial(color_mask, color=color) for color in COLORS},
}
# (tokens, ratio, seeds) -> (B, N) bool, True = the decoder works for it
DECODER_MASKS: dict[DecoderMask, Callable[..., Tensor]] = {"running_cells": running_cells}


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
            arXiv:2205.09113); "tube" the same places in every time step (Tong et al. 2022, VideoMAE, arXiv:2203.12602);
            "red", "blue", "green" and "purple" where noise of that color is lowest, of which green, patches of a few
            tokens, is the paper's best (Hinojosa et al. 2024, ColorMAE, arXiv:2407.13036; see `color_mask`).
        mask_ratio: share of each clip's tokens to hide; or [first, last, updates], to go evenly from the first share
            to the last over that many updates of the optimizer, and stay there.
        decoder_mask: "running_cells" leaves hidden tokens out of the decoder and of the loss (Wang et al. 2023,
            VideoMAE V2, arXiv:2303.16727); none by default.
        decoder_mask_ratio: share of all tokens that `decoder_mask` leaves out.
        position_noise: variance of normal noise on the positions of the mask vectors while training, in the units of
            the encoder's output, so that no place is learned by heart (FlexPredict: Bar et al. 2023, arXiv:2308.00566).
        decoder_dim, decoder_depth, decoder_heads, decoder_mlp_dim, decoder_eps: of the Predictor.
        decoder_window, decoder_global_blocks: of the Predictor; Audio-MAE has windows of [4, 4] tokens.
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
        mask_ratio: float | tuple[float, float, int] = 0.75,
        decoder_mask: DecoderMask | None = None,
        decoder_mask_ratio: float = 0.5,
        position_noise: float = 0.0,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        decoder_mlp_dim: int | None = None,
        decoder_eps: float = 1e-6,
        decoder_window: Sequence[int] | None = None,
        decoder_global_blocks: int = 0,
    ) -> None:
        super().__init__()
        encoder.refuse_learned(
            target_learned, "MAE reconstructs", choose="a fixed target such as log_mel, or Wav2Vec2 for waveforms"
        )
        if mask not in MASKS:
            raise ValueError(f"objective.mask={mask!r}: choose one of {', '.join(MASKS)}")
        if decoder_mask is not None and decoder_mask not in DECODER_MASKS:
            raise ValueError(
                f"objective.decoder_mask={decoder_mask!r}: choose {', '.join(DECODER_MASKS)}, or leave it out"
            )
        first, last, updates = (mask_ratio, mask_ratio, 1) if isinstance(mask_ratio, int | float) else mask_ratio
        if not (0 < first < 1 and 0 < last < 1 and updates >= 1):
            raise ValueError(
                f"objective.mask_ratio={mask_ratio}: a share of the tokens to hide lies between 0 and 1, and one that "
                "changes takes at least 1 update; give a share, or [first share, last share, updates]"
            )
        axes = encoder.frontend.axes
        if decoder_window is not None and len(decoder_window) != len(axes):
            raise ValueError(
                f"objective.decoder_window={list(decoder_window)}: give the tokens of a window along each axis, "
                f"{', '.join(axes)}"
            )
        if position_noise < 0:
            raise ValueError(f"objective.position_noise={position_noise}: a variance is at least 0")
        self.encoder = encoder
        self.target = target
        self.pictures = pictures
        self.mask, self.decoder_mask, self.decoder_mask_ratio = mask, decoder_mask, decoder_mask_ratio
        self.position_noise = position_noise
        self.first_ratio, self.last_ratio, self.ratio_updates = first, last, updates
        # saved where masks depend on it, so that a run that is resumed draws the same ones
        self.updates: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64), persistent=first != last)
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.predictor = Predictor(
            dim_in=encoder.dim,
            dim=decoder_dim,
            depth=decoder_depth,
            heads=decoder_heads,
            mlp_dim=decoder_mlp_dim,
            out_dim=target_dim,
            eps=decoder_eps,
            window=decoder_window,
            global_blocks=decoder_global_blocks,
        )

    def forward(self, batch: Batch) -> Loss:
        """Sum over predicted tokens of the mean squared error over their P values; the count is predicted tokens."""
        tokens, plan = self._hide(batch)
        encoded = self.encoder(tokens, plan, self.hide)
        predicted = plan.masked
        if self.decoder_mask is not None:
            settings = {"ratio": self.decoder_mask_ratio, "seeds": batch.seeds}
            predicted = predicted & DECODER_MASKS[self.decoder_mask](tokens, **settings)
        prediction = self.predictor(  # (M, P)
            encoded,
            tokens,
            plan,
            predicted=None if self.decoder_mask is None else predicted,
            noise=self._noise(predicted.sum(1), batch.seeds, encoded.x) if self.training else None,
        )
        errors, found = token_errors(prediction, self.target, batch.raw, tokens, predicted)
        total, count = errors.sum(), len(errors)
        spreads = {**found, "feature_std": (token_spread(encoded) * count, count)}
        return Loss(total, count, {"loss": (total.detach(), count), **spreads})

    def after_step(self, step: int) -> None:
        self.updates.fill_(step)

    @property
    def mask_ratio(self) -> float:
        """The share to hide after the updates so far."""
        if self.first_ratio == self.last_ratio:
            return self.last_ratio
        gone = min(int(self.updates) / self.ratio_updates, 1.0)
        return self.first_ratio + gone * (self.last_ratio - self.first_ratio)

    @torch.no_grad()
    def reconstruct(self, batch: Batch, *, masked: Tensor | None = None) -> dict[str, Any]:
        """What the model sees of a batch and what it makes of it, for looking at.

        Hidden tokens show the prediction, visible ones their own values.

        Args:
            masked: (B, N) bool, True = hidden; drawn as in training by default.

        Returns:
            "input", "masked" and "reconstruction", as `pictures` draws them: (B, C, H, W), or (B, C, T, H, W) with
            "rate", frames a second; "sounds" with their "rate" where they can be heard; and "note", what to print.

        Raises:
            ValueError: this target cannot be drawn, or `masked` does not fit the batch.
        """
        if self.pictures is None:
            raise ValueError(
                "objective.target: there is no picture of this target; pixels and normalized_pixels have one"
            )
        training = self.training
        self.eval()
        tokens, plan = self._hide(batch, masked)
        prediction = self.predictor(self.encoder(tokens, plan, self.hide), tokens, plan)
        self.train(training)
        values = self.target(batch.raw, tokens).float().clone()  # it may be the tokens' own features
        masked = plan.masked.to(values.device)
        values[masked] = prediction.float()
        return self.pictures(self.encoder.frontend, tokens, masked, values)

    def _noise(self, counts: Tensor, seeds: Tensor, like: Tensor) -> Tensor | None:
        """(M, D) for so many tokens of each clip, the clips' end to end, each from its own seed."""
        if self.position_noise == 0:
            return None
        return normal_per_clip(counts, like.shape[-1], seeds, like.device) * self.position_noise**0.5

    def _hide(self, batch: Batch, masked: Tensor | None = None) -> tuple[Tokens, MaskPlan]:
        tokens = self.encoder.tokens(batch.raw, late=True)
        if masked is None:
            return tokens, MASKS[self.mask](tokens, ratio=self.mask_ratio, seeds=batch.seeds)
        return tokens, plan_given(masked.cpu(), tokens)
