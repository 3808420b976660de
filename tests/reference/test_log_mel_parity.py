"""Our log-mel energies are those of transformers' audio functions, which follow librosa."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmssl.modalities.speech.targets import BANDS, FLOOR, log_mel, mel_bank
from mmssl.types import Raw, Tokens

audio_utils = pytest.importorskip("transformers.audio_utils")


@pytest.mark.parametrize("rate", [8_000, 16_000])
def test_band_energies_are_those_of_transformers(rate: int) -> None:
    width, hop, samples = rate // 40, rate // 50, rate // 5
    wave = 0.1 * torch.randn(1, samples, generator=torch.Generator().manual_seed(0))
    size = (samples - width) // hop + 1
    tokens = Tokens(
        x=torch.zeros(1, size, 1),
        lengths=torch.tensor([size]),
        coords=torch.arange(size)[None, :, None],
        axes=("t",),
        grid=(size,),
        step_ms=20.0,
    )
    ours = log_mel(Raw(wave, torch.tensor([samples]), ["noise"], rate=rate), tokens)[0].exp() - FLOOR

    fft, bank = mel_bank(rate, width, BANDS)
    filters = audio_utils.mel_filter_bank(fft // 2 + 1, BANDS, 0.0, rate / 2, rate, norm=None, mel_scale="htk")
    np.testing.assert_allclose(bank.numpy(), filters, atol=1e-5)
    theirs = audio_utils.spectrogram(
        wave[0].double().numpy(),
        audio_utils.window_function(width, "hann"),
        frame_length=width,
        hop_length=hop,
        fft_length=fft,
        power=2.0,
        center=False,
        mel_filters=filters,
    )
    np.testing.assert_allclose(ours.numpy(), theirs.T, rtol=1e-4, atol=1e-5)
