"""Patches: torch's own convolution, in the published order, for any size and number of channels."""

import pytest
import torch

from mmssl.modalities.image.frontend import Patches
from mmssl.types import Raw


def raw(data):
    return Raw(data, torch.ones(len(data), dtype=torch.int64), [f"picture{i}" for i in range(len(data))])


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 12), (3, 16, 8), (5, 4, 4)])
def test_tokens_are_those_of_a_strided_convolution(channels, height, width):
    torch.manual_seed(0)
    mean, std = torch.rand(channels), torch.rand(channels) + 0.5
    frontend = Patches(dim=6, size=(4, 4), channels=channels, mean=mean.tolist(), std=std.tolist())
    pictures = torch.rand(2, channels, height, width)
    weight = frontend.project.weight.view(6, 4, 4, channels).permute(0, 3, 1, 2)
    normalized = (pictures - mean[:, None, None]) / std[:, None, None]
    expected = torch.nn.functional.conv2d(normalized, weight, frontend.project.bias, stride=4)
    tokens = frontend(raw(pictures))
    assert torch.allclose(tokens.x, expected.flatten(2).transpose(1, 2), atol=1e-5)
    assert tokens.grid == (height // 4, width // 4)
    assert torch.equal(frontend.lengths(raw(pictures)), tokens.valid.sum(1))


def test_an_impulse_lights_up_its_token_coordinate_and_value():
    frontend = Patches(dim=6, size=(2, 4), channels=3, mean=[0, 0, 0], std=[1, 1, 1])
    pictures = torch.zeros(1, 3, 6, 8)
    pictures[0, 2, 3, 5] = 1  # channel 2, row 3, column 5: patch (1, 1), inside it row 1, column 1
    tokens = frontend(raw(pictures))
    token, value = tokens.feat[0].nonzero()[0].tolist()
    assert token == 1 * 2 + 1
    assert tokens.coords[0, token].tolist() == [1, 1]
    assert value == (1 * 4 + 1) * 3 + 2  # row, column, channel last


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((1, 3, 9, 8), r"picture0: 9 x 8 pixels are not a whole number of 4 x 4 patches; add a resize"),
        ((1, 3, 1, 1), r"picture0: 1 x 1 pixels"),
        ((1, 1, 8, 8), r"picture0: 1 channels, but frontend.channels=3"),
    ],
)
def test_pictures_that_do_not_fit_are_named(shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        Patches(dim=6, size=(4, 4))(raw(torch.zeros(shape)))


def test_one_mean_is_needed_for_each_channel():
    with pytest.raises(ValueError, match="3 and 3 numbers, but frontend.channels=1"):
        Patches(dim=6, channels=1)
