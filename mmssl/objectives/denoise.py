"""Denoising autoencoder: reconstruct what the frontend measures from a clip with noise on it; no token is hidden."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.linear import Linear
from mmssl.nn.positions import sincos
from mmssl.nn.predictor import places
from mmssl.nn.seeds import normal, uniform
from mmssl.nn.spread import spread, token_spread
from mmssl.nn.transformer import Transformer
from mmssl.types import Batch, Encoded, Frontend, Hide, Loss, Raw, Tokens, valid_mask

_TIME = {2: 1, 5: 2}  # axes of a batch that may be ragged -> the axis of time
_LEVEL = 1_000_002  # of the draws that are no masks of a clip's clones, see `uniform`


class Denoise(nn.Module):
    """Put noise on a clip, encode all of it, and predict its values without the noise with a small decoder.

    Source: Vincent et al. 2008, "Extracting and composing robust features with denoising autoencoders", with noise of
        many levels as in Chen et al. 2024 (l-DAE, arXiv:2401.14404), which finds that little else of a diffusion model
        matters for what is learned.
    Differs from l-DAE: noise is put on the samples or pixels themselves, not on the principal components of patches;
        errors at all levels weigh alike; encoder and decoder are those of MAE.
    Target: `target`, values that the modality computes from the clip without noise. Never learned ones.

    Args:
        encoder: encodes all tokens.
        target, target_dim, target_learned, pictures: see `MAE`.
        noise: least and most of the noise's deviation, in deviations of the clip's own values; drawn for each clip.
        decoder_dim, decoder_depth, decoder_heads, decoder_mlp_dim, decoder_eps: of the decoder's Transformer.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "none"

    def __init__(
        self,
        encoder: Encoder,
        *,
        target: Callable[[Raw, Tokens], Tensor],
        target_dim: int,
        target_learned: bool = False,
        pictures: Callable[[Frontend, Tokens, Tensor, Tensor], dict[str, Any]] | None = None,
        noise: tuple[float, float] = (0.0, 1.4),
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        decoder_mlp_dim: int | None = None,
        decoder_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        encoder.refuse_learned(target_learned, "Denoise reconstructs")
        low, high = noise
        if not 0 <= low <= high or high == 0:
            raise ValueError(
                f"objective.noise={list(noise)}: give the least and the most deviation of the noise, from 0 up and not "
                "both 0"
            )
        self.encoder = encoder
        self.target = target
        self.pictures = pictures
        self.low, self.high = low, high
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.embed = Linear(encoder.dim, decoder_dim)
        self.decoder = Transformer(
            dim=decoder_dim, depth=decoder_depth, heads=decoder_heads, mlp_dim=decoder_mlp_dim, eps=decoder_eps
        )
        self.out = Linear(decoder_dim, target_dim)
        for linear in (self.embed, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, batch: Batch) -> Loss:
        """Sum over tokens of the mean squared error over their P values; the count is tokens."""
        raw = batch.raw
        tokens = self.encoder.tokens(noisy(raw, batch.seeds, low=self.low, high=self.high))
        encoded = self.encoder(tokens)
        real = places(valid_mask(tokens.lengths, tokens.x.shape[1]), tokens.x.device)
        prediction = self._decode(encoded, tokens).flatten(0, 1).index_select(0, real)  # (M, P)
        with torch.no_grad(), torch.autocast(prediction.device.type, enabled=False):
            target = self.target(raw, self.encoder.tokens(raw)).flatten(0, 1).index_select(0, real).float()
        with torch.autocast(prediction.device.type, enabled=False):
            prediction = prediction.float()
            total = (prediction - target).square().mean(1).sum()
        count = len(real)
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
    def reconstruct(self, batch: Batch, *, masked: Tensor | None = None) -> dict[str, Any]:
        """What the model sees of a batch, noise as in training, and what it makes of it, for looking at.

        Args:
            masked: None, as nothing is hidden.

        Returns:
            "input", "noisy" and "reconstruction", all of which is predicted; the rest as `MAE.reconstruct` has it.

        Raises:
            ValueError: this target cannot be drawn, or `masked` is given.
        """
        if self.pictures is None:
            raise ValueError(
                "objective.target: there is no picture of this target; those of pixels and patches have one"
            )
        if masked is not None:
            raise ValueError("reconstruct: masked is given, and denoise hides nothing; leave it out")
        training = self.training
        self.eval()
        spoiled = noisy(batch.raw, batch.seeds, low=self.low, high=self.high)
        tokens, given = self.encoder.tokens(batch.raw), self.encoder.tokens(spoiled)
        prediction = self._decode(self.encoder(given), given).float()
        self.train(training)
        everything = tokens.valid
        values = torch.where(everything[..., None], prediction, self.target(batch.raw, tokens).float())
        shown = self.pictures(self.encoder.frontend, tokens, everything, values)
        seen = self.pictures(self.encoder.frontend, given, ~everything, self.target(spoiled, given).float())
        return _with_noise(shown, seen)

    def _decode(self, encoded: Encoded, tokens: Tokens) -> Tensor:
        """(B, N, P); what stands past a clip's length is no prediction."""
        h = self.embed(encoded.x)
        coords = tokens.coords[:1] if tokens.coords.stride(0) == 0 else tokens.coords
        # a class token has no place: its position is zero
        added = F.pad(sincos(coords, h.shape[-1]), (0, 0, encoded.n_prefix, 0))
        h, _ = self.decoder(h + added.to(h.dtype), encoded.lengths)
        return self.out(h[:, encoded.n_prefix :])


def _with_noise(shown: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Any]:
    """Pictures and sounds of a reconstruction, with those of the noisy input in the place of what is hidden."""
    found: dict[str, Any] = {}
    for name, value in shown.items():
        if name == "masked":
            found["noisy"] = seen["input"]
        else:
            found[name] = _with_noise(value, seen[name]) if isinstance(value, Mapping) else value
    return found


def noisy(raw: Raw, seeds: Tensor, *, low: float, high: float) -> Raw:
    """Clips with normal noise on them, each at a level of its own.

    Args:
        seeds: (B,) int64, one for each clip's draw.
        low, high: least and most of the noise's deviation, in deviations of the clip's own values.
    """
    levels = (low + (high - low) * uniform(seeds, 1, stream=_LEVEL)[:, 0]).tolist()
    data = raw.data.clone()
    for clip, length, level, seed in zip(data, raw.lengths.tolist(), levels, seeds.tolist(), strict=True):
        real = clip.narrow(_TIME[data.ndim] - 1, 0, length) if data.ndim in _TIME else clip
        noise = normal(seed, *real.shape, name="denoise", device=data.device)
        real += level * real.std(correction=0) * noise
    return replace(raw, data=data)
