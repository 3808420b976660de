"""Denoising: noise as it is said, a target without it, and a loss worked by hand."""

from typing import Any

import pytest
import torch

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.image.targets import TARGETS
from mmssl.modalities.speech.frontend import Waveform
from mmssl.modalities.speech.targets import TARGETS as SPEECH_TARGETS
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.denoise import Denoise, noisy
from mmssl.types import Batch, Raw

SMALL = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def denoise(**settings: Any) -> Denoise:
    torch.manual_seed(0)
    frontend = Patches(dim=16, size=[4, 4], channels=1, mean=[0.5], std=[0.25])
    encoder = Encoder(frontend, Transformer(dim=16, depth=1, heads=2), SinCos(16), prefix=1)
    target = TARGETS["pixels"]
    return Denoise(encoder, target=target.values, target_dim=target.dim(frontend), **SMALL, **settings)


def pictures() -> Batch:
    data = torch.rand(3, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    raw = Raw(data, torch.ones(3, dtype=torch.int64), ["a", "b", "c"])
    return Batch({"image": raw}, torch.tensor([5, 6, 7]))


def test_noise_is_as_strong_as_said_and_each_clips_own() -> None:
    lengths = torch.tensor([40_000, 20_000])
    data = 3.0 * torch.randn(2, 40_000, generator=torch.Generator().manual_seed(0)) + 1.0
    data[1, 20_000:] = torch.nan
    raw = Raw(data, lengths, ["a", "b"], 8000.0)
    found = noisy(raw, torch.tensor([1, 2]), low=0.5, high=0.5)
    for row, n in enumerate(lengths.tolist()):
        added = found.data[row, :n] - data[row, :n]
        assert float(added.std()) == pytest.approx(1.5, rel=0.03)
        assert abs(float((added * (data[row, :n] - 1)).mean())) < 0.15
    assert found.data[1, 20_000:].isnan().all()
    alone = noisy(Raw(data[1:, :20_000], lengths[1:], ["b"], 8000.0), torch.tensor([2]), low=0.5, high=0.5)
    assert torch.equal(alone.data[0], found.data[1, :20_000])


def test_levels_are_drawn_evenly_between_the_two() -> None:
    raw = Raw(torch.randn(300, 400), torch.full((300,), 400), [str(i) for i in range(300)], 8000.0)
    levels = (noisy(raw, torch.arange(300), low=0.2, high=1.0).data - raw.data).std(1) / raw.data.std(1)
    assert 0.15 < levels.min() < 0.3
    assert 0.9 < levels.max() < 1.15
    assert float(levels.mean()) == pytest.approx(0.6, abs=0.05)


def test_the_loss_is_over_all_tokens_against_the_clip_without_noise() -> None:
    objective, batch = denoise(), pictures()
    torch.nn.init.zeros_(objective.out.weight)
    torch.nn.init.constant_(objective.out.bias, 0.25)
    loss = objective(batch)
    values = (batch.raw.data - 0.5) / 0.25
    assert loss.count == 3 * 2 * 3
    torch.testing.assert_close(loss.total, (values - 0.25).square().sum() / 16)


def test_what_is_encoded_has_the_noise() -> None:
    batch = pictures()
    little, much = denoise(noise=[0.0, 1e-6]), denoise(noise=[2.0, 2.0])
    assert (little(batch).total - much(batch).total).abs() > 1e-3


def test_learned_features_and_no_noise_are_refused() -> None:
    with pytest.raises(ValueError, match=r"objective.noise=\[0.0, 0.0\]: .* not both 0"):
        denoise(noise=[0.0, 0.0])
    frontend = Waveform(dim=16, layers=[[8, 10, 5], [8, 8, 4]], rate=8000)
    encoder = Encoder(frontend, Transformer(dim=16, depth=1, heads=2), SinCos(16))
    target = SPEECH_TARGETS["features"]
    with pytest.raises(ValueError, match="Waveform learns what it measures"):
        Denoise(encoder, target=target.values, target_dim=target.dim(frontend), target_learned=target.learned, **SMALL)
