"""Denoising: noise as it is said, a target without it, and a loss worked by hand."""

from typing import Any

import pytest
import torch

from mmssl.encoder import Encoder
from mmssl.modalities.audio.frontend import SpectrogramPatches
from mmssl.modalities.audio.targets import TARGETS as AUDIO_TARGETS
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
    given: dict[str, Any] = {"pictures": target.pictures, **SMALL, **settings}
    return Denoise(encoder, target=target.values, target_dim=target.dim(frontend), **given)


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


def test_what_is_shown_is_the_clip_its_noise_and_what_is_made_of_all_of_it() -> None:
    objective, batch = denoise(noise=[0.1, 0.5]), pictures()
    torch.nn.init.zeros_(objective.out.weight)
    torch.nn.init.constant_(objective.out.bias, 0.4)
    shown = objective.reconstruct(batch)
    assert list(shown) == ["input", "noisy", "reconstruction", "note"]
    torch.testing.assert_close(shown["input"], batch.raw.data)
    spoiled = noisy(batch.raw, batch.seeds, low=0.1, high=0.5).data
    torch.testing.assert_close(shown["noisy"], spoiled.clamp(0, 1))
    torch.testing.assert_close(shown["reconstruction"], torch.full((3, 1, 8, 12), 0.4 * 0.25 + 0.5))
    assert objective.training
    with pytest.raises(ValueError, match="masked is given, and denoise hides nothing"):
        objective.reconstruct(batch, masked=torch.zeros(3, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="there is no picture of this target"):
        denoise(pictures=None).reconstruct(batch)


def test_noise_can_be_heard_where_sound_can() -> None:
    torch.manual_seed(0)
    frontend = SpectrogramPatches(dim=16, size=[4, 4], bands=8, rate=8000)
    encoder = Encoder(frontend, Transformer(dim=16, depth=1, heads=2), SinCos(16))
    target = AUDIO_TARGETS["spectrogram"]
    given: dict[str, Any] = {"target_dim": target.dim(frontend), "pictures": target.pictures, **SMALL}
    raw = Raw(torch.randn(2, 4000), torch.tensor([4000, 3000]), ["a", "b"], 8000.0)
    shown = Denoise(encoder, target=target.values, **given).reconstruct(Batch({"audio": raw}, torch.tensor([1, 2])))
    assert list(shown["sounds"]) == ["input", "noisy", "reconstruction"]
    assert {x.shape for x in shown["sounds"].values()} == {shown["sounds"]["input"].shape}
    assert not torch.equal(shown["sounds"]["noisy"], shown["sounds"]["input"])


def test_learned_features_and_no_noise_are_refused() -> None:
    with pytest.raises(ValueError, match=r"objective.noise=\[0.0, 0.0\]: .* not both 0"):
        denoise(noise=[0.0, 0.0])
    frontend = Waveform(dim=16, layers=[[8, 10, 5], [8, 8, 4]], rate=8000)
    encoder = Encoder(frontend, Transformer(dim=16, depth=1, heads=2), SinCos(16))
    target = SPEECH_TARGETS["features"]
    with pytest.raises(ValueError, match="Waveform learns what it measures"):
        Denoise(encoder, target=target.values, target_dim=target.dim(frontend), target_learned=target.learned, **SMALL)
