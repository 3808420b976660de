"""Every frame of a clip is changed in the same way, and all of it follows the generator."""

import inspect

import numpy as np
import pytest
import torch

from mmssl.modalities.image import IMAGE
from mmssl.modalities.video import VIDEO
from mmssl.modalities.video.augment import color_jitter, flip, multi_scale_crop, resize
from mmssl.modalities.video.spans import center_span, random_span

SETTINGS = {
    "resize": {"size": 12},
    "center_crop": {"size": [8, 10], "at": 1.0},
    "random_resized_crop": {"size": [8, 10]},
    "multi_scale_crop": {"size": 8},
    "flip": {},
    "shift": {"pixels": 3},
    "color_jitter": {},
    "gray": {"p": 0.5},
    "blur": {},
}
SHAPES = {"resize": (12, 15), "center_crop": (8, 10), "random_resized_crop": (8, 10), "multi_scale_crop": (8, 8)}


def still(frames=5, height=16, width=20):
    """A clip whose frames are all the same picture."""
    picture = torch.rand(3, 1, height, width, generator=torch.Generator().manual_seed(0))
    return picture.expand(3, frames, height, width).contiguous()


@pytest.mark.parametrize("name", VIDEO.augments)
def test_a_still_clip_stays_still(name):
    changed = set()
    for seed in range(8):
        got = VIDEO.augments[name](still(), np.random.default_rng(seed), **SETTINGS[name])
        assert got.shape == (3, 5, *SHAPES.get(name, (16, 20)))
        assert torch.allclose(got, got[:, :1].expand_as(got), atol=1e-6)
        assert got.min() >= 0
        assert got.max() <= 1
        again = VIDEO.augments[name](still(), np.random.default_rng(seed), **SETTINGS[name])
        assert torch.equal(got, again)
        changed.add(got.sum().item())
    assert (len(changed) > 1) == (name not in ("resize", "center_crop"))


@pytest.mark.parametrize("name", VIDEO.augments)
def test_frames_are_as_large_as_their_extent_says(name):
    before = np.array([[16, 20], [21, 13], [12, 12]])
    extent = VIDEO.sizes.get(name, lambda sizes, **settings: sizes)
    for size, bound in zip(before.tolist(), extent(before, **SETTINGS[name]).tolist(), strict=True):
        got = VIDEO.augments[name](still(2, *size), np.random.default_rng(0), **SETTINGS[name])
        assert list(got.shape) == [3, 2, *bound]


def test_frames_are_resized_each_for_itself():
    clip = torch.rand(3, 4, 16, 20)
    got = resize(clip, np.random.default_rng(0), size=[8, 10])
    for frame in range(4):
        alone = resize(clip[:, frame : frame + 1], np.random.default_rng(0), size=[8, 10])
        assert torch.allclose(got[:, frame], alone[:, 0], atol=1e-6)


def test_contrast_turns_about_the_mean_of_the_whole_clip():
    clip = torch.cat([torch.full((1, 1, 2, 2), 0.2), torch.full((1, 1, 2, 2), 0.6)], 1)
    got = color_jitter(clip, np.random.default_rng(0), brightness=0.0, contrast=0.5, saturation=0.0)
    # the mean, 0.4, stays; about a mean of each frame nothing would move
    assert torch.allclose(got.mean(), torch.tensor(0.4))
    assert not torch.allclose(got, clip)


@pytest.mark.parametrize("name", ["gray", "blur"])
def test_every_frame_is_changed_as_a_picture_is(name):
    clip = torch.rand(3, 5, 16, 20, generator=torch.Generator().manual_seed(0))
    for seed in range(4):
        got = VIDEO.augments[name](clip, np.random.default_rng(seed), **SETTINGS[name])
        for frame in range(5):
            alone = IMAGE.augments[name](clip[:, frame], np.random.default_rng(seed), **SETTINGS[name])
            assert torch.allclose(got[:, frame], alone, atol=1e-6)


def test_a_flip_can_be_turned_off():
    clip = torch.rand(3, 2, 4, 6)
    assert torch.equal(flip(clip, np.random.default_rng(0), p=0.0), clip)
    assert torch.equal(flip(clip, np.random.default_rng(0), p=1.0), clip.flip(-1))


def test_scales_of_a_crop_are_the_shorter_side_and_its_shares():
    rows = torch.arange(40.0).view(1, 1, 40, 1).expand(1, 2, 40, 60) / 60
    columns = torch.arange(60.0).view(1, 1, 1, 60).expand(1, 2, 40, 60) / 60
    seen = set()
    for seed in range(200):
        got = multi_scale_crop(torch.cat([rows, columns]), np.random.default_rng(seed), size=[40, 40], scales=[1, 0.5])
        tall, wide = (round(60 * (x.max() - x.min()).item()) + 1 for x in got)
        seen.add((tall, wide))
    assert seen == {(40, 40), (40, 20), (20, 40), (20, 20)}
    with pytest.raises(ValueError, match="scales must be above 0 and at most 1"):
        multi_scale_crop(torch.rand(1, 1, 4, 4), np.random.default_rng(0), size=4, scales=[2.0])


def test_a_span_lies_anywhere_in_the_file_and_in_its_middle_for_evaluation():
    rng = np.random.default_rng(0)
    starts = [random_span(10.0, rng, frames=16, rate=8) for _ in range(500)]
    assert {duration for _, duration in starts} == {2.0}
    first = [start for start, _ in starts]
    assert 0 <= min(first) < 0.2
    assert 7.8 < max(first) <= 8.0
    assert center_span(10.0, rng, frames=16, rate=8) == (4.0, 2.0)


@pytest.mark.parametrize("name", VIDEO.spans)
def test_a_span_is_as_long_as_its_extent_says(name):
    before = np.array([0.5, 2.0, 2.25, 60.0], np.float32)
    after = [VIDEO.spans[name](float(whole), np.random.default_rng(0), frames=16, rate=8)[1] for whole in before]
    assert VIDEO.durations[name](before, frames=16, rate=8).tolist() == after == [0.5, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("name", VIDEO.spans)
def test_a_file_shorter_than_the_span_is_taken_whole(name):
    assert VIDEO.spans[name](1.5, np.random.default_rng(0), frames=16, rate=8) == (0.0, 1.5)
    with pytest.raises(ValueError, match="frames must be at least 1"):
        VIDEO.spans[name](1.5, np.random.default_rng(0), frames=0, rate=8)
    assert list(inspect.signature(VIDEO.spans[name]).parameters)[:2] == ["whole", "rng"]


def test_a_center_span_lies_in_the_middle_or_where_it_is_told_to() -> None:
    rng = np.random.default_rng(0)
    assert center_span(10.0, rng, frames=16, rate=8) == (4.0, 2.0)
    assert [center_span(10.0, rng, frames=16, rate=8, at=at) for at in (0.0, 0.25, 1.0)] == [
        (0.0, 2.0),
        (2.0, 2.0),
        (8.0, 2.0),
    ]
    assert center_span(1.5, rng, frames=16, rate=8, at=1.0) == (0.0, 1.5)
    for at in (-1, 1.5, 50):
        with pytest.raises(ValueError, match=f"center_span: at must be from 0, the beginning, to 1, the end, got {at}"):
            center_span(10.0, rng, frames=16, rate=8, at=at)
