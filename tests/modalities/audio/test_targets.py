import math

import pytest
import torch

from mmssl.modalities.audio.frontend import SpectrogramPatches
from mmssl.modalities.audio.targets import (
    TARGETS,
    normalized_spectrogram,
    normalized_spectrogram_pictures,
    spectrogram,
    spectrogram_pictures,
    unpatch,
)
from mmssl.modalities.filterbank import FLOOR
from mmssl.types import Raw


def sounds(lengths=(1000, 600)) -> Raw:
    data = 0.1 * torch.randn(len(lengths), max(lengths), generator=torch.Generator().manual_seed(0))
    return Raw(data, torch.tensor(lengths), [str(i) for i in range(len(lengths))], 8000.0)


def frontend(**settings) -> SpectrogramPatches:
    torch.manual_seed(0)
    return SpectrogramPatches(dim=4, **{"bands": 12, "size": [2, 4], "rate": 8000} | settings)


@pytest.mark.parametrize("stride", [None, [1, 2]])
def test_unpatch_is_the_inverse_of_cutting_into_patches(stride) -> None:
    raw, front = sounds((1000,)), frontend(stride=stride)
    tokens = front(raw)
    back = unpatch(spectrogram(raw, tokens), tokens, front) * front.scale + front.mean
    frames = front.filterbank(raw.data, raw.lengths)  # 11 frames, the patches reach over 12, or 11 where they overlap
    torch.testing.assert_close(back[:, :11], frames)
    torch.testing.assert_close(back[:, 11:], torch.full_like(back[:, 11:], math.log(FLOOR)))


def test_each_patch_has_mean_0_and_deviation_1_and_silence_is_zero() -> None:
    raw, front = sounds(), frontend()
    values = normalized_spectrogram(raw, front(raw))
    whole = values[0, :15]  # 5 steps of 3; the sixth goes on with silence
    torch.testing.assert_close(whole.mean(-1), torch.zeros(15), rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.std(-1), torch.ones(15), rtol=0, atol=1e-3)
    raw.data.zero_()
    assert not normalized_spectrogram(raw, front(raw)).any()


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_target_is_as_wide_as_it_says_and_fixed(name: str) -> None:
    raw, front = sounds(), frontend()
    tokens = front(raw)
    values = TARGETS[name].values(raw, tokens)
    assert values.shape == (*tokens.x.shape[:2], TARGETS[name].dim(front))
    assert values.dtype == torch.float32
    assert not values.requires_grad
    assert not TARGETS[name].learned
    assert not values[~tokens.valid].any()


@pytest.mark.parametrize("name", sorted(TARGETS))
@pytest.mark.parametrize("stride", [None, [1, 2]])
def test_a_perfect_prediction_looks_like_the_input(name: str, stride) -> None:
    raw, front = sounds(), frontend(stride=stride)
    tokens = front(raw)
    masked = torch.zeros(tokens.x.shape[:2], dtype=torch.bool)
    masked[:, 0] = True
    draw = TARGETS[name].pictures
    assert draw is not None
    shown = draw(front, tokens, masked, TARGETS[name].values(raw, tokens))
    torch.testing.assert_close(shown["reconstruction"], shown["input"], rtol=1e-4, atol=1e-3)
    assert shown["input"].amax((1, 2, 3)).tolist() == [1.0, 1.0]
    # the first token is the first time and the lowest pitch: at the left, at the bottom
    assert (shown["masked"][:, 0, -4:, :2] == 0.5).all()
    torch.testing.assert_close(shown["masked"][:, :, :-4], shown["input"][:, :, :-4])
    torch.testing.assert_close(shown["masked"][..., 2:], shown["input"][..., 2:])
    # the second clip has (600 - 200) / 80 + 1 = 6 frames; behind them is nothing to see
    assert not any(shown[key][1, :, :, 6:].any() for key in ("input", "masked", "reconstruction"))


def test_a_picture_that_shows_more_than_the_model_knows_says_so() -> None:
    raw, front = sounds(), frontend()
    tokens = front(raw)
    masked = tokens.valid
    guess = torch.zeros_like(tokens.feat)
    leaking = normalized_spectrogram_pictures(front, tokens, masked, guess)
    honest = spectrogram_pictures(front, tokens, masked, guess)
    assert "leak" in leaking["note"]
    assert honest["note"] == ""
    # nothing was predicted, yet each patch has its true mean: that is the leak
    assert leaking["reconstruction"][0].std() > 2 * honest["reconstruction"][0].std()


@pytest.mark.parametrize("stride", [None, [8, 8]])
def test_a_spectrogram_can_be_heard(stride) -> None:
    """A tone stays at its pitch, about as loud as it was, and is heard where nothing is hidden."""
    front = SpectrogramPatches(dim=4, bands=64, size=(8, 16), stride=stride, rate=8000)
    wave = 0.3 * torch.sin(2 * math.pi * 1000 * torch.arange(8000) / 8000)
    raw = Raw(wave[None], torch.tensor([8000]), ["tone"], 8000.0)
    tokens = front(raw)
    masked = tokens.coords[..., 0] >= tokens.grid[0] // 2
    shown = spectrogram_pictures(front, tokens, masked, spectrogram(raw, tokens))
    assert list(shown["sounds"]) == ["input", "masked", "reconstruction"]
    assert shown["rate"] == 8000
    heard = shown["sounds"]["reconstruction"][0]
    assert len(heard) == 80 * 104  # 98 frames, and silence to the end of the last patch
    torch.testing.assert_close(heard, shown["sounds"]["input"][0])
    middle = heard[2000:6000]
    assert abs(int(torch.fft.rfft(middle).abs().argmax()) * 2 - 1000) < 60  # of half a second; a band is that wide
    assert 0.5 < float(middle.square().mean().sqrt() / wave.square().mean().sqrt()) < 2
    first, second = shown["sounds"]["masked"][0].split(4000)[:2]
    assert second[1000:].square().mean() < 1e-3 * first.square().mean()


def test_one_frame_can_be_heard_and_frames_that_leave_gaps_cannot() -> None:
    front = frontend(size=[1, 4])
    raw = sounds((200,))
    tokens = front(raw)
    shown = spectrogram_pictures(front, tokens, tokens.valid, spectrogram(raw, tokens))
    assert shown["sounds"]["input"].shape == (1, 80)
    wild = front.filterbank.sound(torch.tensor([[500.0, torch.nan, -torch.inf] * 4]).expand(1, 3, 12))
    assert wild.isfinite().all()
    gaps = frontend(hop_ms=20.0)
    tokens = gaps(raw)
    shown = spectrogram_pictures(gaps, tokens, tokens.valid, spectrogram(raw, tokens))
    assert "sounds" not in shown
    with pytest.raises(ValueError, match="frames of 200 samples every 160 cannot be made sound of again"):
        gaps.filterbank.sound(torch.zeros(1, 3, 12))
