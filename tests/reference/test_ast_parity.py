"""Our spectrogram is that of transformers' extractor for AST; the model itself is compared in tests/convert."""

from __future__ import annotations

import pytest
import torch

from mmssl.modalities.audio.frontend import SpectrogramPatches

transformers = pytest.importorskip("transformers")


def test_the_spectrogram_is_that_of_their_feature_extractor() -> None:
    pytest.importorskip("torchaudio", exc_type=ImportError)
    extract = transformers.ASTFeatureExtractor(max_length=98)
    wave = 0.1 * torch.randn(16_000, generator=torch.Generator().manual_seed(2))
    theirs = extract(wave.numpy(), sampling_rate=16_000, return_tensors="pt").input_values[0]
    frontend = SpectrogramPatches(dim=4)
    frames = frontend.filterbank(wave[None], torch.tensor([16_000]))[0]
    mine = (frames - frontend.mean) / frontend.scale
    assert mine.shape == theirs.shape == (98, 128)
    # normalized, a difference of 1e-4 in the logarithm is one of 1.1e-5; see the test of the filterbank for the rest
    assert ((mine - theirs).abs() < 1.1e-5).double().mean() > 0.999
