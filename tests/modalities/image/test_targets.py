from __future__ import annotations

import pytest
import torch

from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.image.targets import (
    TARGETS,
    normalized_pixel_pictures,
    normalized_pixels,
    pixel_pictures,
    pixels,
    unpatch,
)
from mmssl.types import Raw


def pictures(batch: int = 2, channels: int = 3, height: int = 4, width: int = 6) -> Raw:
    data = torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(0))
    return Raw(data, torch.ones(batch, dtype=torch.int64), [str(i) for i in range(batch)])


def frontend(size: tuple[int, int] = (2, 3), channels: int = 3) -> Patches:
    torch.manual_seed(0)
    mean, std = [0.4, 0.5, 0.6][:channels], [0.2, 0.25, 0.3][:channels]
    return Patches(dim=8, size=size, channels=channels, mean=mean, std=std)


def test_unpatch_is_the_inverse_of_cutting_into_patches() -> None:
    raw, front = pictures(), frontend()
    tokens = front(raw)
    back = unpatch(pixels(raw, tokens), tokens.grid, front.size, 3) * front.std + front.mean
    torch.testing.assert_close(back, raw.data)


def test_a_patch_of_four_values_is_normalized_as_worked_by_hand() -> None:
    raw = Raw(torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]]), torch.ones(1, dtype=torch.int64), ["a"])
    tokens = Patches(dim=4, size=(2, 2), channels=1, mean=[0.0], std=[1.0])(raw)
    # mean 3, squares 4 + 1 + 0 + 9 = 14, unbiased variance 14 / 3
    expected = torch.tensor([[[-2.0, -1.0, 0.0, 3.0]]]) / (14 / 3 + 1e-6) ** 0.5
    torch.testing.assert_close(normalized_pixels(raw, tokens), expected)


def test_channels_of_a_patch_share_one_mean_and_one_deviation() -> None:
    raw, front = pictures(), frontend()
    values = normalized_pixels(raw, front(raw))
    torch.testing.assert_close(values.mean(-1), torch.zeros(2, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(values.std(-1), torch.ones(2, 4), rtol=0, atol=1e-4)
    assert values.view(2, 4, 6, 3).mean(2).abs().max() > 0.05


def test_an_even_patch_has_no_values_rather_than_infinite_ones() -> None:
    raw, front = pictures(), frontend()
    raw.data.fill_(0.5)
    flat = Patches(dim=8, size=(2, 3), mean=[0.5] * 3, std=[0.2] * 3)
    assert normalized_pixels(raw, flat(raw)).abs().max() == 0
    assert torch.isfinite(normalized_pixels(raw, front(raw))).all()


def test_a_patch_of_one_value_has_no_deviation_and_says_so() -> None:
    raw, front = pictures(channels=1), frontend(size=(1, 1), channels=1)
    with pytest.raises(ValueError, match="a patch of one value has no deviation; choose pixels"):
        normalized_pixels(raw, front(raw))


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_target_is_as_wide_as_it_says_and_fixed(name: str) -> None:
    raw, front = pictures(), frontend()
    tokens = front(raw)
    values = TARGETS[name].values(raw, tokens)
    assert values.shape == (2, 4, TARGETS[name].dim(front))
    assert values.dtype == torch.float32
    assert not values.requires_grad
    assert not TARGETS[name].learned


@pytest.mark.parametrize("name", sorted(name for name in TARGETS if TARGETS[name].pictures))
def test_a_perfect_prediction_looks_like_the_input(name: str) -> None:
    raw, front = pictures(), frontend()
    tokens = front(raw)
    masked = torch.tensor([[True, False, False, False], [False, False, False, True]])
    draw = TARGETS[name].pictures
    assert draw is not None
    shown = draw(front, tokens, masked, TARGETS[name].values(raw, tokens))
    torch.testing.assert_close(shown["input"], raw.data)
    torch.testing.assert_close(shown["reconstruction"], raw.data, rtol=1e-4, atol=1e-4)
    # the first patch of the first picture is gray, and the rest of that picture is as it was
    assert (shown["masked"][0, :, :2, :3] == 0.5).all()
    torch.testing.assert_close(shown["masked"][0, :, 2:], raw.data[0, :, 2:])
    torch.testing.assert_close(shown["masked"][0, :, :, 3:], raw.data[0, :, :, 3:])


def test_a_picture_that_shows_more_than_the_model_knows_says_so() -> None:
    raw, front = pictures(), frontend()
    tokens = front(raw)
    masked = torch.ones(2, 4, dtype=torch.bool)
    guess = torch.zeros(2, 4, 18)
    leaking = normalized_pixel_pictures(front, tokens, masked, guess)
    honest = pixel_pictures(front, tokens, masked, guess)
    assert "leak" in leaking["note"]
    assert honest["note"] == ""
    # nothing was predicted, yet each patch has its true mean: that is the leak
    assert (leaking["reconstruction"][0] - leaking["reconstruction"][1]).abs().max() > 0.05
    assert (honest["reconstruction"][0] == honest["reconstruction"][1]).all()
