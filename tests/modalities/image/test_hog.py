"""Histograms of oriented gradients, against the definition written out pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch

from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.image.targets import TARGETS, hog
from mmssl.types import Raw


def raw_of(data: torch.Tensor) -> Raw:
    return Raw(data, torch.ones(len(data), dtype=torch.int64), [str(i) for i in range(len(data))])


def frontend(size: tuple[int, int], channels: int = 1) -> Patches:
    return Patches(dim=4, size=size, channels=channels, mean=[0.5] * channels, std=[0.5] * channels)


def histogram(plane: list[list[float]], top: int, left: int, tall: int, wide: int) -> list[float]:
    """Of the cell of one channel that begins at a row and a column."""
    height, width = len(plane), len(plane[0])
    votes = [0.0] * 9
    for row in range(top, top + tall):
        for column in range(left, left + wide):
            right = plane[row][min(column + 1, width - 1)] - plane[row][max(column - 1, 0)]
            down = plane[min(row + 1, height - 1)][column] - plane[max(row - 1, 0)][column]
            degrees = math.degrees(math.atan2(down, right)) % 180
            votes[min(int(degrees / 20), 8)] += math.sqrt(right**2 + down**2)
    length = math.sqrt(sum(vote**2 for vote in votes))
    return [vote / length for vote in votes]


@pytest.mark.parametrize(("size", "cell"), [((16, 8), (8, 8)), ((8, 8), (8, 8)), ((4, 16), (4, 8))])
def test_each_patch_holds_the_histograms_of_its_cells(size: tuple[int, int], cell: tuple[int, int]) -> None:
    raw = raw_of(torch.rand(1, 2, 16, 32, generator=torch.Generator().manual_seed(0)))
    front = frontend(size, channels=2)
    values = hog(raw, front(raw))
    (high, wide), planes = size, raw.data[0].double().tolist()
    expected = []
    for top in range(0, 16, high):
        for left in range(0, 32, wide):
            places = [(y, x) for y in range(top, top + high, cell[0]) for x in range(left, left + wide, cell[1])]
            expected.append([v for y, x in places for plane in planes for v in histogram(plane, y, x, *cell)])
    torch.testing.assert_close(values[0], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert values.shape[-1] == TARGETS["hog"].dim(front)


@pytest.mark.parametrize(("slope", "orientation"), [((1, 0), 0), ((-1, 0), 0), ((0, 1), 4), ((1, 1), 2), ((1, -1), 6)])
def test_a_slope_has_one_orientation_whichever_way_it_goes(slope: tuple[int, int], orientation: int) -> None:
    """Bins of 20 degrees: 0 is in the first, 45 in the third, 90 in the fifth, 135 in the seventh."""
    y, x = torch.arange(24.0)[:, None], torch.arange(24.0)
    raw = raw_of((0.5 + 0.01 * (slope[0] * x + slope[1] * y)).expand(1, 1, 24, 24))
    middle = hog(raw, frontend((8, 8))(raw))[0, 4]
    torch.testing.assert_close(middle, torch.eye(9)[orientation], rtol=0, atol=1e-5)


def test_contrast_and_brightness_do_not_count() -> None:
    raw = raw_of(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    front = frontend((16, 16), channels=3)
    paler = raw_of(0.3 + 0.25 * raw.data)
    torch.testing.assert_close(hog(paler, front(paler)), hog(raw, front(raw)), rtol=1e-3, atol=1e-4)


def test_an_even_picture_has_no_orientation() -> None:
    raw = raw_of(torch.full((1, 3, 16, 16), 0.3))
    front = frontend((16, 16), channels=3)
    values = hog(raw, front(raw))
    assert values.shape == (1, 1, 108)  # 4 cells of 9 bins in 3 channels, as in MaskFeat
    assert not values.any()


def test_a_patch_that_cells_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective.target=hog: cells of 8 x 8 pixels do not fill .*\[14, 14\]"):
        TARGETS["hog"].dim(frontend((14, 14)))
