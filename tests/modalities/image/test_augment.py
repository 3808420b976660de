"""Augmentations keep the range, repeat with their generator, and do what their settings say."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.modalities.image import IMAGE
from mmssl.modalities.image.augment import (
    blur,
    center_crop,
    color_jitter,
    flip,
    gray,
    random_resized_crop,
    resize,
    shift,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


RAMP = torch.arange(48.0).reshape(1, 6, 8) / 47
ALL: list[Callable[..., Tensor]] = [
    partial(random_resized_crop, size=4),
    partial(resize, size=[4, 5]),
    partial(center_crop, size=4),
    partial(flip, p=0.5),
    partial(shift, pixels=2),
    partial(color_jitter),
    partial(gray, p=1.0),
    partial(blur, p=1.0),
]


@pytest.mark.parametrize("augment", ALL, ids=lambda augment: augment.func.__name__)
@pytest.mark.parametrize("channels", [1, 3])
def test_one_generator_one_picture_in_range_and_the_input_untouched(
    augment: Callable[..., Tensor], channels: int
) -> None:
    x = torch.rand(channels, 9, 7, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    first, again = augment(x, rng(3)), augment(x, rng(3))
    assert torch.equal(first, again)
    assert torch.equal(x, before)
    assert first.dtype == torch.float32
    assert len(first) == channels
    assert first.min() >= 0
    assert first.max() <= 1


def test_resize_by_one_number_keeps_the_shape_of_the_picture() -> None:
    assert resize(torch.rand(3, 20, 10), rng(), size=5).shape == (3, 10, 5)
    assert resize(torch.rand(3, 10, 25), rng(), size=5).shape == (3, 5, 12)
    assert resize(torch.rand(3, 1, 1), rng(), size=5).shape == (3, 5, 5)
    assert resize(torch.rand(3, 20, 10), rng(), size=[7, 9]).shape == (3, 7, 9)


def test_resize_averages_over_what_it_leaves_out() -> None:
    stripes = torch.tensor([0.0, 1.0]).repeat(32).expand(1, 8, 64)
    assert resize(stripes, rng(), size=[8, 8])[..., 2:-2] == pytest.approx(torch.full((1, 8, 4), 0.5), abs=0.02)


def test_center_crop_takes_the_middle() -> None:
    assert torch.equal(center_crop(RAMP, rng(), size=[2, 4]), RAMP[:, 2:4, 2:6])
    with pytest.raises(ValueError, match="6 x 8, smaller than the crop of 7 x 7; resize before it"):
        center_crop(RAMP, rng(), size=7)


@pytest.mark.parametrize(("at", "first"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 5)])
def test_a_crop_lies_along_the_longer_side_and_in_the_middle_of_the_other(at: float, first: int) -> None:
    # 5 of the 9 columns and 2 of the 6 rows are left beside a crop of 4
    wide = torch.arange(54.0).reshape(1, 6, 9)
    assert torch.equal(center_crop(wide, rng(), size=4, at=at), wide[:, 1:5, first : first + 4])
    tall = wide.transpose(1, 2)
    assert torch.equal(center_crop(tall, rng(), size=4, at=at), tall[:, first : first + 4, 1:5])
    square = wide[..., :6]
    assert torch.equal(center_crop(square, rng(), size=4, at=at), square[:, 1:5, 1:5])


def test_flip_turns_left_and_right() -> None:
    assert torch.equal(flip(RAMP, rng(), p=1.0)[..., 0], RAMP[..., -1])
    assert torch.equal(flip(RAMP, rng(), p=0.0), RAMP)
    assert 20 < sum(torch.equal(flip(RAMP, rng(seed)), RAMP) for seed in range(64)) < 44


def test_shift_moves_by_every_distance_up_to_its_setting() -> None:
    dot = torch.zeros(1, 5, 5)
    dot[0, 2, 2] = 1
    places = {tuple(shift(dot, rng(seed), pixels=1)[0].nonzero()[0].tolist()) for seed in range(100)}
    assert places == {(row, column) for row in (1, 2, 3) for column in (1, 2, 3)}
    filled = shift(torch.zeros(1, 3, 3), rng(0), pixels=3, fill=0.5)
    assert set(filled.flatten().tolist()) <= {0.0, 0.5}


def test_random_resized_crop_keeps_to_its_share_of_the_area() -> None:
    # red is the row, green the column: the crop's corners tell its size
    rows = torch.linspace(0, 1, 64)[:, None].expand(64, 64)
    picture = torch.stack([rows, rows.T, rows])
    shares, shapes = [], []
    for seed in range(100):
        crop = random_resized_crop(picture, rng(seed), size=64, scale=(0.2, 0.5))
        tall, wide = float(crop[0].max() - crop[0].min()), float(crop[1].max() - crop[1].min())
        shares.append(tall * wide)
        shapes.append(wide / tall)
    assert 0.17 < min(shares) < 0.25
    assert 0.42 < max(shares) < 0.52
    assert 0.7 < min(shapes) < 0.85
    assert 1.15 < max(shapes) < 1.4


@pytest.mark.parametrize("shape", [(3, 200, 4), (3, 4, 200), (3, 1, 1)])
def test_random_resized_crop_takes_pictures_of_any_shape(shape: tuple[int, int, int]) -> None:
    assert random_resized_crop(torch.rand(shape), rng(), size=[8, 6]).shape == (3, 8, 6)


def test_color_jitter_of_nothing_changes_nothing() -> None:
    x = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(color_jitter(x, rng(), brightness=0, contrast=0, saturation=0), x)
    assert torch.equal(color_jitter(x, rng(), p=0.0), x)
    assert not torch.allclose(color_jitter(x, rng()), x)


def test_gray_has_no_saturation_to_change() -> None:
    gray = torch.rand(1, 5, 5, generator=torch.Generator().manual_seed(0)).expand(3, 5, 5)
    assert torch.allclose(color_jitter(gray, rng(), brightness=0, contrast=0, saturation=1), gray, atol=1e-6)


def test_gray_keeps_the_luma_and_drops_the_colors() -> None:
    x = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    plain = gray(x, rng(), p=1.0)
    assert torch.allclose(plain, (0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]).expand(3, 4, 5))
    assert gray(x, rng(), p=0.0) is x


def test_blur_spreads_a_point_as_a_gaussian_does() -> None:
    x = torch.zeros(1, 21, 21)
    x[0, 10, 10] = 1
    spread = blur(x, rng(), sigma=(1.5, 1.5), p=1.0)[0]
    assert spread.sum().item() == pytest.approx(1, abs=1e-5)
    assert (spread[10, 12] / spread[10, 10]).item() == pytest.approx(np.exp(-0.5 * (2 / 1.5) ** 2), rel=1e-5)
    assert torch.allclose(spread, spread.T)
    assert torch.allclose(blur(torch.full((3, 4, 5), 0.3), rng(), p=1.0), torch.full((3, 4, 5), 0.3))
    assert blur(x, rng(), p=0.0) is x


def test_settings_without_sense_are_refused() -> None:
    for wrong in (
        partial(random_resized_crop, size=4, scale=(0.5, 1.5)),
        partial(random_resized_crop, size=4, ratio=(2.0, 1.0)),
        partial(resize, size=[0, 4]),
        partial(shift, pixels=-1),
        partial(center_crop, size=4, at=1.5),
        partial(color_jitter, contrast=1.5),
        partial(blur, sigma=(0.0, 1.0)),
    ):
        with pytest.raises(ValueError, match=wrong.func.__name__):
            wrong(RAMP, rng())


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("resize", {"size": 5}),
    ("resize", {"size": [4, 5]}),
    ("center_crop", {"size": [6, 4]}),
    ("random_resized_crop", {"size": 4}),
    ("flip", {}),
    ("shift", {"pixels": 2}),
    ("color_jitter", {}),
    ("gray", {}),
    ("blur", {"p": 1.0}),
]


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_a_picture_is_as_large_as_its_extent_says(name: str, settings: dict[str, Any]) -> None:
    before = np.array([[6, 8], [9, 7], [31, 6]])
    extent = IMAGE.sizes.get(name, lambda sizes, **settings: sizes)
    after = [list(IMAGE.augments[name](torch.rand(1, *size), rng(), **settings).shape[1:]) for size in before.tolist()]
    assert extent(before, **settings).tolist() == after


def test_every_augmentation_is_held_against_its_extent() -> None:
    assert {name for name, _ in SETTINGS} == set(IMAGE.augments)


def test_resize_by_straight_lines_gives_no_value_that_was_not_between_its_neighbors() -> None:
    x = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(1, 4, 1)
    # halves of the way between the two middles, a quarter and three quarters of a pixel on
    assert resize(x, rng(), size=[4, 8], interpolation="bilinear")[0, 0].tolist() == [0, 0, 0, 0.25, 0.75, 1, 1, 1]
    curved = resize(x, rng(), size=[4, 8])[0, 0]
    assert curved[3] < 0.25
