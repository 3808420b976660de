"""Speech: a waveform -> log-mel energies -> one token for every few frames; only the projection is learned."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.modalities.speech.frontend import refuse_short
from mmssl.modalities.speech.targets import FLOOR, mel_bank
from mmssl.nn.linear import Linear
from mmssl.types import Frontend, Raw, Tokens, valid_mask


class LogMel(Frontend):
    """Log-mel frames, normalized over the clip and stacked into tokens.

    Source: the input of most speech models before wav2vec 2.0, and of its successors on mels (Chung et al. 2021,
    w2v-BERT, arXiv:2108.06209). Where there are hours of speech rather than weeks, convolutions over samples have first
    to learn what this starts from.

    Args:
        dim: width of the tokens.
        bands: mel bands.
        window_ms, hop_ms: of a frame.
        stack: frames in a token; 2 of 10 ms give a token every 20 ms.
        normalize: bring the energies of a clip to mean 0 and deviation 1 over all its bands and real frames. Loudness
            goes and the clip's own spectrum stays: with each band brought to mean 0, a short word loses what tells it
            from others.
        dropout: on the tokens.
        rate: samples per second that the clips must have.
    """

    axes: ClassVar[tuple[str, ...]] = ("t",)
    learned: ClassVar[bool] = False

    def __init__(
        self,
        *,
        dim: int,
        bands: int = 80,
        window_ms: float = 25.0,
        hop_ms: float = 10.0,
        stack: int = 2,
        normalize: bool = True,
        dropout: float = 0.0,
        rate: int = 16_000,
    ) -> None:
        super().__init__()
        self.dim, self.feature_dim, self.bands = dim, bands * stack, bands
        self.stack, self.normalize, self.dropout, self.rate = stack, normalize, dropout, rate
        self.window, self.hop = round(rate * window_ms / 1000), round(rate * hop_ms / 1000)
        self.min_length = self.window + (stack - 1) * self.hop
        self.reader_settings: dict[str, Any] = {"rate": rate}
        self.bank: Tensor
        self.taper: Tensor
        self.fft, bank = mel_bank(rate, self.window, bands)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("taper", torch.hann_window(self.window), persistent=False)
        self.project = Linear(self.feature_dim, dim)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def lengths(self, raw: Raw) -> Tensor:
        refuse_short(raw, self.min_length)
        frames = torch.div(raw.lengths - self.window, self.hop, rounding_mode="floor") + 1
        return torch.div(frames, self.stack, rounding_mode="floor")

    def forward(self, raw: Raw) -> Tokens:
        if raw.rate is not None and raw.rate != self.rate:
            raise ValueError(
                f"{raw.ids[0]}: {raw.rate:g} Hz, but this frontend reads {self.rate} Hz; resample the clip"
            )
        lengths = self.lengths(raw)
        size = int(lengths.max())
        with torch.autocast(raw.data.device.type, enabled=False):
            feat = self._energies(raw, lengths)
        x = F.dropout(self.project(feat), self.dropout, self.training)
        if int(lengths.min()) < size:
            x = x * valid_mask(lengths, size, x.device)[..., None]
        return Tokens(
            x=x,
            lengths=lengths,
            coords=torch.arange(size, device=x.device)[None, :, None].expand(len(x), -1, -1),
            axes=self.axes,
            grid=(size,),
            feat=feat,
            step_ms=1000 * self.stack * self.hop / self.rate,
            span_ms=1000 * self.min_length / self.rate,
        )

    def _energies(self, raw: Raw, lengths: Tensor) -> Tensor:
        """(B, L) samples -> (B, N, stack * bands), zero past each length."""
        frames = int(lengths.max()) * self.stack
        real = valid_mask(lengths * self.stack, frames, raw.data.device)[..., None]
        # where, not a product: what stands in the padding may be NaN
        wave = torch.where(valid_mask(raw.lengths, raw.data.shape[1], raw.data.device), raw.data.float(), 0.0)
        windows = wave.unfold(1, self.window, self.hop)[:, :frames]
        spectrum = torch.fft.rfft(windows * self.taper, n=self.fft)
        power = spectrum.real.square() + spectrum.imag.square()
        energies = (power @ self.bank + FLOOR).log() * real
        if self.normalize:
            count = (lengths * self.stack * self.bank.shape[1]).to(energies.device)[:, None, None]
            centered = (energies - energies.sum((1, 2), keepdim=True) / count) * real
            # a clip that stays at the floor has no deviation to divide by
            energies = centered / (centered.square().sum((1, 2), keepdim=True) / count + 1e-4).sqrt()
        return energies.view(len(energies), -1, self.feature_dim)
