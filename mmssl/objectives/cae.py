"""Context autoencoder: predict what the encoder makes of hidden tokens, and from that alone what was hidden."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.block_masks import BLOCK_MASKS
from mmssl.nn.linear import Linear
from mmssl.nn.masking import plan_given, plan_of, take
from mmssl.nn.positions import sincos
from mmssl.nn.predictor import places
from mmssl.nn.regressor import Regressor
from mmssl.nn.spread import spread, token_spread
from mmssl.nn.transformer import Transformer
from mmssl.types import Batch, Encoded, Frontend, Hide, Loss, MaskPlan, Raw, Tokens, valid_mask

Mask = Literal["blocks", "inverse_blocks", "beit_blocks"]


class CAE(nn.Module):
    """Encode the visible tokens; a regressor turns them into latents of the hidden ones, which a decoder alone reads.

    The prediction is made where the encoder's output lies: the regressor's latents must equal what the same encoder
    makes of the hidden tokens, seen without the visible ones. So the encoder is left with telling what is there, and
    the decoder with the pretext task.

    Source: Chen et al. 2022 (arXiv:2202.03026), section 3.
    Differs from the paper: the target is measured, where the paper classifies the codes of DALL-E's tokenizer, whose
        weights are published as pickles; every clip has exactly the share `mask_ratio` hidden (see `nn.block_masks`);
        clips may be ragged, on any axes; regressor and decoder have no layer scale; the latents to align with are made
        without dropout.
    Target: `target`, values that the modality computes from the raw input, as for `MAE`; never learned ones. And the
        encoder's own output for the hidden tokens, which no gradient reaches.

    Args:
        encoder: encodes the visible tokens, and, for alignment, the hidden ones.
        target, target_dim, target_learned, pictures: see `MAE`.
        mask, mask_ratio, mask_size: see `Data2Vec`; "beit_blocks" is the paper's, for tokens on two axes.
        alignment_weight: of the mean squared error of a latent, beside that of a hidden token's values.
        regressor_depth, regressor_heads: of the Regressor, as wide as the encoder.
        decoder_depth, decoder_heads: of the decoder's Transformer, as wide as the encoder.

    Raises:
        ValueError: a learned target, or heads that do not divide the encoder's width.
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
        mask: Mask = "beit_blocks",
        mask_ratio: float = 0.5,
        mask_size: int | Sequence[int] = 16,
        alignment_weight: float = 2.0,
        regressor_depth: int = 4,
        regressor_heads: int = 12,
        decoder_depth: int = 4,
        decoder_heads: int = 12,
    ) -> None:
        super().__init__()
        encoder.refuse_learned(
            target_learned, "CAE reconstructs", choose="a fixed target such as log_mel, or Wav2Vec2 for waveforms"
        )
        if encoder.dim % decoder_heads:
            raise ValueError(f"objective.decoder_heads={decoder_heads}: must divide transformer.dim={encoder.dim}")
        self.encoder = encoder
        self.target = target
        self.pictures = pictures
        self.mask, self.mask_ratio, self.mask_size = BLOCK_MASKS[mask], mask_ratio, mask_size
        self.alignment_weight = alignment_weight
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.regressor = Regressor(dim=encoder.dim, depth=regressor_depth, heads=regressor_heads)
        self.decoder = Transformer(dim=encoder.dim, depth=decoder_depth, heads=decoder_heads)
        self.out = Linear(encoder.dim, target_dim)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, batch: Batch) -> Loss:
        """Sum over hidden tokens of the mean squared errors over their P values and over their D latent channels, the
        latter `alignment_weight` times; the count is hidden tokens.
        """
        tokens, plan = self._hide(batch)
        device = tokens.x.device
        encoded, hidden, latents, prediction = self._predict(tokens, plan)
        # hidden tokens among these rows of them alone, and among all tokens, in the same order
        real, among = places(hidden.keep_valid, device), places(plan.masked, device)
        own = self.aligned(tokens, hidden).flatten(0, 1).index_select(0, real)
        # a target may hold a product of its own, as log_mel does
        with torch.autocast(device.type, enabled=False):
            target = self.target(batch.raw, tokens).flatten(0, 1).index_select(0, among).detach().float()
            prediction, latents = prediction.float(), latents.float()
            reconstruction = (prediction - target).square().mean(1).sum()
            alignment = (latents - own).square().mean(1).sum()
            total = reconstruction + self.alignment_weight * alignment
        count = len(real)
        metrics = {
            "loss": total.detach(),
            "reconstruction": reconstruction.detach(),
            "alignment": alignment.detach(),
            "target_std": spread(target) * count,
            "prediction_std": spread(prediction) * count,
            "latent_std": spread(own) * count,
            "feature_std": token_spread(encoded) * count,
        }
        return Loss(total, count, {name: (value, count) for name, value in metrics.items()})

    def after_step(self, step: int) -> None:
        """Nothing here changes with time."""

    @torch.no_grad()
    def reconstruct(self, batch: Batch, *, masked: Tensor | None = None) -> dict[str, Any]:
        """What the model sees of a batch and what it makes of it, for looking at: see `MAE.reconstruct`.

        Raises:
            ValueError: this target cannot be drawn, or `masked` does not fit the batch.
        """
        if self.pictures is None:
            raise ValueError(
                "objective.target: there is no picture of this target; those of pixels and patches have one"
            )
        training = self.training
        self.eval()
        tokens, plan = self._hide(batch, masked)
        prediction = self._predict(tokens, plan)[3]
        self.train(training)
        values = self.target(batch.raw, tokens).float().clone()  # it may be the tokens' own features
        masked = plan.masked.to(values.device)
        values[masked] = prediction.float()
        return self.pictures(self.encoder.frontend, tokens, masked, values)

    def _hide(self, batch: Batch, masked: Tensor | None = None) -> tuple[Tokens, MaskPlan]:
        tokens = self.encoder.tokens(batch.raw, late=True)
        if masked is None:
            return tokens, self.mask(tokens, ratio=self.mask_ratio, size=self.mask_size, seeds=batch.seeds)
        return tokens, plan_given(masked.cpu(), tokens)

    def _predict(self, tokens: Tokens, plan: MaskPlan) -> tuple[Encoded, MaskPlan, Tensor, Tensor]:
        """What is visible, encoded; the plan that keeps what is hidden; and of M hidden tokens, in the row-major order
        of `plan.masked`, the (M, D) latents and the (M, P) values predicted.
        """
        device = tokens.x.device
        # the same clips with what is hidden and what is visible changed about
        hidden = plan_of(valid_mask(tokens.lengths, tokens.x.shape[1]) & ~plan.masked, tokens.lengths)
        encoded = self.encoder(tokens, plan, self.hide)
        coords = tokens.coords[:1] if tokens.coords.stride(0) == 0 else tokens.coords
        at = sincos(coords, self.encoder.dim).expand(*tokens.x.shape[:2], -1)
        visible_at, hidden_at = (take(at, one.keep.to(device, non_blocking=True)) for one in (plan, hidden))
        latents = self.regressor(encoded, visible_at, hidden_at, hidden.keep_lengths)
        decoded, _ = self.decoder(latents + hidden_at, hidden.keep_lengths)
        real = places(hidden.keep_valid, device)
        prediction = self.out(decoded.flatten(0, 1).index_select(0, real))
        return encoded, hidden, latents.flatten(0, 1).index_select(0, real), prediction

    @torch.no_grad()
    def aligned(self, tokens: Tokens, hidden: MaskPlan) -> Tensor:
        """(B, Q, D) float32: what the encoder makes of the tokens that `hidden` keeps, without dropout."""
        training = self.encoder.training
        self.encoder.eval()
        encoded = self.encoder(tokens, hidden, self.hide)
        self.encoder.train(training)
        return encoded.tokens.float()
