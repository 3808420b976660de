"""What of a recording can be reconstructed; log-mel energies are also the baseline that learned features must beat."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.modalities.filterbank import triangles
from mmssl.modalities.modality import Target
from mmssl.modalities.speech.cqt import cqt, n_bins
from mmssl.types import Frontend, Raw, Tokens, valid_mask

BANDS = 40
WINDOW_MS = 25.0
# About the energy of the rounding noise of 16-bit samples, so that silence does not reach for minus infinity.
FLOOR = 1e-6


def log_mel(raw: Raw, tokens: Tokens) -> Tensor:
    """The logarithm of mel band energies, one frame for each token.

    Frame i starts where token i's receptive field starts and spans 25 ms, as that field does in wav2vec 2.0. A clip's
    frames are the same alone and beside a longer one.

    Returns:
        (B, N, BANDS) float32 natural logarithms, zero past each length.

    Raises:
        ValueError: the batch has no rate, or the tokens no step in time.
    """
    if raw.rate is None or tokens.step_ms is None:
        raise ValueError("log_mel: needs sound with a rate and tokens with a step in time")
    hop = round(raw.rate * tokens.step_ms / 1000)
    width = round(raw.rate * WINDOW_MS / 1000)
    size = tokens.x.shape[1]
    fft, bank = mel_bank(int(raw.rate), width, BANDS)
    # where, not a product: what stands in the padding may be NaN
    wave = torch.where(valid_mask(raw.lengths, raw.data.shape[1], raw.data.device), raw.data.float(), 0.0)
    wave = F.pad(wave, (0, max((size - 1) * hop + width - wave.shape[1], 0)))
    frames = wave.unfold(1, width, hop)[:, :size]  # (B, L) -> (B, N, width)
    spectrum = torch.fft.rfft(frames * torch.hann_window(width, device=wave.device), n=fft)
    power = spectrum.real.square() + spectrum.imag.square()
    energies = (power @ bank.to(wave.device) + FLOOR).log()
    return energies * tokens.valid[..., None]


def normalized_log_mel(raw: Raw, tokens: Tokens) -> Tensor:
    """`log_mel` with each band brought to mean 0 and deviation 1 over the clip: loudness and channel go.

    Returns:
        (B, N, BANDS) float32, zero past each length.
    """
    energies, valid = log_mel(raw, tokens), tokens.valid[..., None]
    count = tokens.lengths.to(energies.device)[:, None, None]
    mean = energies.sum(1, keepdim=True) / count
    centered = (energies - mean) * valid
    variance = centered.square().sum(1, keepdim=True) / count
    # A band that stays at the floor has no deviation to divide by.
    return centered / (variance + 1e-4).sqrt()


def features(raw: Raw, tokens: Tokens) -> Tensor:
    """What the frontend itself measures: learned, where it is made of convolutions."""
    if tokens.feat is None:
        raise ValueError("objective.target=features: this frontend does not hand on its features")
    return tokens.feat


def mel_bank(rate: int, width: int, bands: int) -> tuple[int, Tensor]:
    """`triangles` from 0 to half the rate, over a Fourier transform that is fine enough for them.

    Returns:
        the size of the Fourier transform, the smallest power of two that leaves no band empty; and the weights,
        (fft // 2 + 1, bands).
    """
    fft = 2 ** math.ceil(math.log2(width))
    while not bool((triangles(rate, fft, bands, sides="hertz").sum(0) > 0).all()):
        fft *= 2
    return fft, triangles(rate, fft, bands, sides="hertz")


def _feature_dim(frontend: Frontend) -> int:
    return frontend.feature_dim


def _bands(frontend: Frontend) -> int:
    return BANDS


def _cqt_dim(frontend: Frontend) -> int:
    return n_bins(frontend.reader_settings["rate"])


TARGETS: dict[str, Target] = {
    "log_mel": Target(values=log_mel, dim=_bands),
    "normalized_log_mel": Target(values=normalized_log_mel, dim=_bands),
    "cqt": Target(values=cqt, dim=_cqt_dim),
    "features": Target(values=features, dim=_feature_dim, learned=True),
}
