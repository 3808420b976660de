"""Tubes: torch's own convolution in three axes, VideoMAE's order of values, for any size and ragged in time."""

import pytest
import torch

from mmssl.modalities.video.frontend import Tubes
from mmssl.nn.positions import SinCos, sincos
from mmssl.types import Raw


def raw(data, lengths=None, rate=None):
    lengths = [data.shape[2]] * len(data) if lengths is None else lengths
    return Raw(data, torch.tensor(lengths), [f"clip{i}" for i in range(len(data))], rate)


@pytest.mark.parametrize(
    ("channels", "size", "shape"),
    [(3, (2, 4, 4), (4, 8, 12)), (1, (1, 4, 8), (3, 16, 8)), (2, (4, 2, 2), (8, 2, 6)), (3, (2, 4, 4), (5, 4, 4))],
)
def test_tokens_are_those_of_a_strided_convolution(channels, size, shape):
    torch.manual_seed(0)
    mean, std = torch.rand(channels), torch.rand(channels) + 0.5
    frontend = Tubes(dim=6, size=size, channels=channels, mean=mean.tolist(), std=std.tolist())
    clips = torch.rand(2, channels, *shape)
    weight = frontend.project.weight.view(6, *size, channels).permute(0, 4, 1, 2, 3)
    normalized = (clips - mean[:, None, None, None]) / std[:, None, None, None]
    # a convolution too leaves out frames that fill no whole tube
    expected = torch.nn.functional.conv3d(normalized, weight, frontend.project.bias, stride=size)
    tokens = frontend(raw(clips))
    assert torch.allclose(tokens.x, expected.flatten(2).transpose(1, 2), atol=1e-5)
    assert tokens.grid == expected.shape[2:]
    assert torch.equal(frontend.lengths(raw(clips)), tokens.valid.sum(1))


def test_an_impulse_lights_up_its_token_coordinate_and_value():
    frontend = Tubes(dim=6, size=(2, 2, 4), channels=3, mean=[0, 0, 0], std=[1, 1, 1])
    clips = torch.zeros(1, 3, 6, 6, 8)
    clips[0, 2, 5, 3, 5] = 1  # channel 2, frame 5, row 3, column 5: tube (2, 1, 1), inside it frame 1, row 1, column 1
    tokens = frontend(raw(clips))
    token, value = tokens.feat[0].nonzero()[0].tolist()
    assert token == (2 * 3 + 1) * 2 + 1
    assert tokens.coords[0, token].tolist() == [2, 1, 1]
    assert value == ((1 * 2 + 1) * 4 + 1) * 3 + 2  # frame, row, column, channel last
    added = SinCos(12)(tokens.x, tokens)[0, token]
    # two numbers for a sine and two for a cosine would be four an axis: column, row, then time
    assert torch.allclose(added, torch.cat([sincos(torch.tensor([[place]]), 4)[0] for place in (1, 1, 2)]))


def test_every_place_of_a_clip_has_a_position_of_its_own():
    frontend = Tubes(dim=24, size=(2, 4, 4))
    tokens = frontend(raw(torch.rand(1, 3, 16, 28, 20)))
    table = SinCos(24)(tokens.x, tokens)[0]
    distance = torch.cdist(table, table) + 9 * torch.eye(len(table))
    assert len(table) == 8 * 7 * 5
    assert distance.min() > 0.05


def test_a_token_lasts_as_long_as_its_frames():
    tokens = Tubes(dim=6, size=(2, 4, 4), rate=8)(raw(torch.rand(1, 3, 4, 4, 4), rate=8.0))
    assert (tokens.step_ms, tokens.span_ms) == (250, 250)


def test_what_is_measured_are_the_pixels_of_real_frames_by_channel():
    clips = torch.rand(2, 3, 4, 5, 6)
    clips[1, :, 3:] = torch.nan
    measured = Tubes(dim=6).measured(raw(clips, [4, 3]))
    expected = torch.cat([clip.transpose(0, 1)[:n].movedim(1, -1).reshape(-1, 3) for clip, n in zip(clips, (4, 3))])
    assert torch.equal(measured, expected)


def test_what_comes_after_the_last_whole_tube_changes_nothing():
    torch.manual_seed(0)
    frontend = Tubes(dim=6, size=(2, 4, 4))
    clips = torch.rand(2, 3, 7, 8, 4)
    tokens = frontend(raw(clips, [7, 3]))
    other = clips.clone()
    other[0, :, 6:], other[1, :, 2:] = torch.nan, torch.inf
    assert tokens.lengths.tolist() == [6, 2]
    assert torch.equal(frontend(raw(other, [7, 3])).x, tokens.x)
    assert torch.equal(frontend(raw(other, [7, 3])).feat, tokens.feat)


@pytest.mark.parametrize(
    ("shape", "lengths", "rate", "sentence"),
    [
        (
            (1, 3, 2, 9, 8),
            [2],
            None,
            r"clip0: frames of 9 x 8 pixels are not a whole number of 4 x 4 patches; add a re",
        ),
        ((1, 1, 2, 8, 8), [2], None, r"clip0: 1 channels, but frontend.channels=3"),
        ((2, 3, 2, 8, 8), [2, 1], None, r"clip1: 1 frames are fewer than the 2 that one token needs"),
        ((1, 3, 2, 8, 8), [2], 25.0, r"clip0: 25 frames/s, but this frontend reads 7.5; sample the clip anew"),
    ],
)
def test_clips_that_do_not_fit_are_named(shape, lengths, rate, sentence):
    with pytest.raises(ValueError, match=sentence):
        Tubes(dim=6, size=(2, 4, 4))(raw(torch.zeros(shape), lengths, rate))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"channels": 1}, "3 and 3 numbers, but frontend.channels=1"),
        ({"size": (16, 16)}, r"frontend.size=\[16, 16\]: give frames, height and width"),
        ({"rate": 0}, "frontend.rate=0: frames per second must be above 0"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Tubes(dim=6, **settings)
