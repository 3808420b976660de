"""TERA: reconstruct log-mel frames of which some times, bands and magnitudes were altered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.linear import Linear
from mmssl.nn.masking import span_mask
from mmssl.nn.predictor import places
from mmssl.nn.seeds import uniform
from mmssl.nn.spread import mean_distance, spread, token_spread
from mmssl.types import Batch, Encoded, Hide, Loss, Tokens, valid_mask

# of the draws that are no spans of a mask, see `uniform`
_STREAM = 2_000_000
# shares of the clips in which the chosen frames are set to zero, and in which they are replaced
_ZEROED, _REPLACED = 0.8, 0.1


class TERA(nn.Module):
    """Alter frames along time, frequency and magnitude, and reconstruct the frames that were measured.

    Source: Liu, Li and Lee 2021 (arXiv:2007.06028), section III; `time_prob` alone is Mockingjay (arXiv:1910.12638).
    Differs from the paper: each clip draws from its own seed, also whether it gets noise; a clip too short for a span
        gets a shorter one and keeps a frame. As in the released code, the loss counts the values that were altered in
        time or frequency, those that were left as they are among them, and noise alone is not reconstructed.
    Target: the frontend's features, which must be fixed: frames of a log-mel spectrogram.

    Args:
        encoder: over a frontend whose features are whole frames of a spectrogram.
        time_prob, time_span: see `span_mask`, in frames; 0 to alter no times. The chosen frames are set to zero in 80 %
            of the clips, replaced by others of the clip in 10 %, and left as they are in 10 %.
        band_share: at most so many of the bands, one run of any width up to it, are set to zero; 0 for none.
        noise_prob, noise_std: chance that normal noise is added to a clip, and its deviation.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "none"
    pictures: ClassVar[bool] = True

    def __init__(
        self,
        encoder: Encoder,
        *,
        time_prob: float = 0.15,
        time_span: int = 7,
        band_share: float = 0.2,
        noise_prob: float = 0.15,
        noise_std: float = 0.2,
    ) -> None:
        super().__init__()
        if not encoder.frontend.bands:
            name = type(encoder.frontend).__name__
            raise ValueError(
                f"TERA alters the frames of a spectrogram, and {name} makes no tokens of whole "
                "frames; choose frontend logmel"
            )
        if not (0 <= time_prob < 1 and 0 <= band_share < 1 and 0 <= noise_prob <= 1) or noise_std < 0:
            raise ValueError(
                f"objective.time_prob={time_prob}, band_share={band_share}, noise_prob={noise_prob}, "
                f"noise_std={noise_std}: shares and chances lie between 0 and 1, and a deviation is at least 0"
            )
        if time_prob == 0 and band_share == 0:
            raise ValueError(
                "objective.time_prob=0, band_share=0: nothing is left to reconstruct, set one of them above 0"
            )
        self.encoder = encoder
        self.time_prob, self.time_span = time_prob, time_span
        self.band_share = band_share
        self.noise_prob, self.noise_std = noise_prob, noise_std
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.predict = nn.Sequential(
            Linear(encoder.dim, encoder.dim),
            nn.GELU(),
            nn.LayerNorm(encoder.dim),
            Linear(encoder.dim, encoder.frontend.feature_dim),
        )
        for part in self.predict:
            if isinstance(part, Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def forward(self, batch: Batch) -> Loss:
        """Sum over altered values of the distance to what was measured; the count is altered values."""
        tokens, frames, lengths = self._frames(batch)
        altered, hidden = self.alter(frames, lengths, batch.seeds)
        encoded = self._encode(tokens, altered)
        prediction = self.predict(encoded.tokens)
        with torch.autocast(prediction.device.type, enabled=False):
            prediction = prediction.float().view_as(frames)
            total = ((prediction - frames).abs() * hidden.to(frames.device)).sum()
        count = int(hidden.sum())
        real = places(valid_mask(lengths, frames.shape[1]), frames.device)
        measured, predicted = (values.flatten(0, 1).index_select(0, real) for values in (frames, prediction))
        metrics = {
            "loss": total.detach(),
            "chance": mean_distance(measured) * count,
            "target_std": spread(measured) * count,
            "prediction_std": spread(predicted) * count,
            "feature_std": token_spread(encoded) * count,
        }
        return Loss(total, count, {name: (value, count) for name, value in metrics.items()})

    def after_step(self, step: int) -> None:
        """Nothing here changes with time."""

    @torch.no_grad()
    def reconstruct(self, batch: Batch, *, masked: Tensor | None = None) -> dict[str, Any]:
        """What the model sees of a batch and what it makes of it, for looking at: time to the right, low bands below.

        Args:
            masked: None, as what is altered is drawn.

        Returns:
            "input", "altered" and "reconstruction", all of which is predicted: (B, 1, F, T) in [0, 1], from the least
            to the largest value of a clip, 0 past its end; and "note", what to print.

        Raises:
            ValueError: `masked` is given.
        """
        if masked is not None:
            raise ValueError("reconstruct: masked is given, and tera draws what it alters; leave it out")
        training = self.training
        self.eval()
        tokens, frames, lengths = self._frames(batch)
        altered, _ = self.alter(frames, lengths, batch.seeds)
        prediction = self.predict(self._encode(tokens, altered).tokens).float().view_as(frames)
        self.train(training)
        valid = valid_mask(lengths, frames.shape[1], frames.device)[..., None]
        least = frames.masked_fill(~valid, torch.inf).amin((1, 2), keepdim=True)
        most = frames.masked_fill(~valid, -torch.inf).amax((1, 2), keepdim=True)

        def draw(x: Tensor) -> Tensor:
            shares = ((x - least) / (most - least).clamp_min(1e-6)).clamp(0, 1)
            return shares.masked_fill(~valid, 0.0).transpose(1, 2).flip(1)[:, None]

        rows = {"input": frames, "altered": altered, "reconstruction": prediction}
        return {**{name: draw(x.float()) for name, x in rows.items()}, "note": ""}

    def _frames(self, batch: Batch) -> tuple[Tokens, Tensor, Tensor]:
        """What the frontend makes of a batch, its (B, T, F) frames, and how many of each clip are real."""
        tokens = self.encoder.tokens(batch.raw)
        assert tokens.feat is not None
        frames = tokens.feat.detach().unflatten(2, (-1, self.encoder.frontend.bands)).flatten(1, 2)
        return tokens, frames, tokens.lengths * (frames.shape[1] // tokens.x.shape[1])

    def _encode(self, tokens: Tokens, altered: Tensor) -> Encoded:
        assert tokens.feat is not None
        x = self.encoder.frontend.project(altered.view_as(tokens.feat))
        encoded: Encoded = self.encoder(replace(tokens, x=torch.where(tokens.valid[..., None], x, 0.0)))
        return encoded

    def alter(self, frames: Tensor, lengths: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Alter clips, each by its own seed.

        Args:
            frames: (B, T, F).
            lengths: (B,) real frames.
            seeds: (B,) int64.

        Returns:
            (B, T, F) altered frames, zero past each length; (B, T, F) bool on the CPU, True = to be reconstructed.
        """
        size, bands = frames.shape[1:]
        device = frames.device
        chance, place, width, start, noisy = uniform(seeds, 5, stream=_STREAM).T[..., None]
        valid = valid_mask(lengths, size)
        times = torch.zeros_like(valid)
        if self.time_prob:
            plan = span_mask(lengths, prob=self.time_prob, span=self.time_span, min_spans=1, seeds=seeds)
            times = plan.masked
        run = (width * (int(self.band_share * bands) + 1)).floor()  # bands that are hidden
        first = (start * (bands - run + 1)).floor()
        band = torch.arange(bands)
        within = (band >= first) & (band < first + run)

        # the same frames some steps on, round the clip's end: never a chosen frame itself, wherever there are two
        ahead = 1 + (place * (lengths[:, None] - 1)).long()
        source = ((torch.arange(size) + ahead) % lengths[:, None]).to(device)
        others = frames.gather(1, source[..., None].expand(-1, -1, bands))
        zeroed, replaced = times & (chance < _ZEROED), times & (chance >= _ZEROED) & (chance < _ZEROED + _REPLACED)
        altered = torch.where(replaced.to(device)[..., None], others, frames)
        altered = altered.masked_fill((zeroed[..., None] | within[:, None]).to(device), 0.0)
        if self.noise_std:
            # not uniform's numbers, which would be as many as all values of all clips on the CPU
            for row in (noisy[:, 0] < self.noise_prob).nonzero()[:, 0].tolist():
                generator = torch.Generator(device).manual_seed(int(seeds[row]))
                n = int(lengths[row])
                noise = torch.randn(n, bands, generator=generator, device=device)
                altered[row, :n] += self.noise_std * noise
        hidden = (times[..., None] | within[:, None]) & valid[..., None]
        return altered, hidden
