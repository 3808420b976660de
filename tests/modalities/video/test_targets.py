"""What of a clip is reconstructed: worked by hand, and against its own inverse."""

import pytest
import torch

from mmssl.modalities.video.frontend import Tubes
from mmssl.modalities.video.targets import TARGETS, untube
from mmssl.types import Raw


def raw(data, lengths=None):
    lengths = [data.shape[2]] * len(data) if lengths is None else lengths
    return Raw(data, torch.tensor(lengths), [f"clip{i}" for i in range(len(data))])


def plain(size=(2, 4, 4), channels=3):
    return Tubes(dim=6, size=size, channels=channels, mean=[0.0] * channels, std=[1.0] * channels)


def test_tubes_laid_back_are_the_clip():
    clips = torch.rand(2, 3, 4, 8, 12)
    tokens = plain()(raw(clips))
    assert torch.equal(untube(TARGETS["pixels"].values(raw(clips), tokens), tokens.grid, (2, 4, 4), 3), clips)


def test_each_channel_of_a_tube_is_normalized_for_itself():
    # one tube of 2 frames of 1 x 2 pixels: a channel 0, 1, 2, 3 and a channel ten times that, and 5 more
    first = torch.arange(4.0).view(1, 1, 2, 1, 2)
    clips = torch.cat([first, 10 * first + 5], 1)
    frontend = plain((2, 1, 2), channels=2)
    got = TARGETS["normalized_pixels"].values(raw(clips), frontend(raw(clips)))
    deviation = (5 / 3) ** 0.5  # unbiased: the squares of 1.5, 0.5, 0.5, 1.5 add up to 5
    expected = (torch.arange(4.0) - 1.5) / deviation
    assert got.shape == (1, 1, 8)
    assert torch.allclose(got.view(4, 2)[:, 0], expected, atol=1e-5)
    assert torch.allclose(got.view(4, 2)[:, 1], expected, atol=1e-5)


def test_a_flat_tube_and_padding_are_zero():
    clips = torch.rand(2, 3, 4, 4, 4)
    clips[0] = 0.3
    tokens = plain()(raw(clips, [4, 2]))
    got = TARGETS["normalized_pixels"].values(raw(clips, [4, 2]), tokens)
    assert got[0].abs().max() < 0.2  # rounding noise over 1e-6
    assert not got[1, 1:].any()
    assert got[1, 0].any()


def test_a_tube_of_one_pixel_has_no_deviation():
    clips = torch.rand(1, 3, 2, 2, 2)
    with pytest.raises(ValueError, match="a tube of one pixel has no deviation"):
        TARGETS["normalized_pixels"].values(raw(clips), plain((1, 1, 1))(raw(clips)))


@pytest.mark.parametrize("name", TARGETS)
def test_pictures_of_the_truth_are_the_clip(name):
    torch.manual_seed(0)
    frontend = Tubes(dim=6, size=(2, 4, 4))
    clips = torch.rand(2, 3, 8, 8, 12)
    tokens = frontend(raw(clips))
    masked = torch.zeros(2, tokens.x.shape[1], dtype=torch.bool)
    masked[:, 0] = True
    shown = TARGETS[name].pictures(frontend, tokens, masked, TARGETS[name].values(raw(clips), tokens))
    assert torch.allclose(shown["input"], clips, atol=1e-5)
    assert torch.allclose(shown["reconstruction"], clips, atol=1e-4)
    gray = torch.zeros(8, 8, 12, dtype=torch.bool)
    gray[:2, :4, :4] = True
    assert (shown["masked"][:, :, gray] == 0.5).all()
    assert torch.equal(shown["masked"][:, :, ~gray], shown["input"][:, :, ~gray])
    assert shown["rate"] == frontend.rate
    assert ("leak" in shown["note"]) == (name == "normalized_pixels")
