"""Two parts of a sound: of its own seed, half as long, found in it, and in one place of it or another."""

from dataclasses import replace

import pytest
import torch

from mmssl.modalities.audio.frontend import SpectrogramPatches
from mmssl.modalities.audio.views import check_segments, segments
from mmssl.types import Raw

FRONTEND = SpectrogramPatches(dim=8, size=(16, 128))
LENGTHS = torch.tensor([4000, 3001, 801])
# every sample is its own place, so that a part says where it is from; what is past a clip's end is -1
SOUNDS = Raw(
    torch.arange(4000.0).repeat(3, 1).where(torch.arange(4000) < LENGTHS[:, None], -1.0),
    LENGTHS,
    ["a", "b", "c"],
    16_000.0,
    seeds=torch.tensor([5, 6, 7]),
)


def test_a_part_is_half_of_its_own_clip_and_nothing_of_the_padding() -> None:
    for view in segments(SOUNDS, FRONTEND):
        assert view.lengths.tolist() == [2000, 1500, 400]
        for part, length, whole in zip(view.data, view.lengths.tolist(), LENGTHS.tolist(), strict=True):
            first = int(part[0])
            assert torch.equal(part[:length], torch.arange(first, first + length, dtype=torch.float32))
            assert 0 <= first <= whole - length
            assert not part[length:].any()


def test_parts_depend_on_the_seed_of_their_clip_alone() -> None:
    together, moved = segments(SOUNDS, FRONTEND), segments(replace(SOUNDS, seeds=torch.tensor([8, 6, 9])), FRONTEND)
    alone = segments(SOUNDS.part(slice(1, 2)), FRONTEND)
    for view, other, one in zip(together, moved, alone, strict=True):
        assert torch.equal(view.data[1, :1500], other.data[1, :1500])
        assert torch.equal(view.data[1, :1500], one.data[0, :1500])
        assert one.ids == ["b"]
    assert not torch.equal(together[0].data[0], moved[0].data[0])
    assert not torch.equal(together[0].data, together[1].data)


def test_parts_come_from_everywhere_in_a_clip() -> None:
    n = 2000
    raw = Raw(torch.arange(1000.0).repeat(n, 1), torch.full((n,), 1000), ["a"] * n, 16_000.0, seeds=torch.arange(n))
    one, other = (view.data[:, 0] for view in segments(raw, FRONTEND))
    for first in (one, other):
        assert first.min() < 5
        assert first.max() > 495
        # the mean of a uniform number from 0 to 500, within five of its standard errors
        assert first.mean() == pytest.approx(250, abs=5 * 500 / (12 * n) ** 0.5)
    assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 5 / n**0.5


def test_a_clip_too_short_for_two_parts_is_named() -> None:
    short = replace(SOUNDS, lengths=torch.tensor([4000, 799, 801]))
    for check in (check_segments, segments):
        with pytest.raises(ValueError, match="b: 799 samples, and half of them are fewer than the 400 of a token"):
            check(short, FRONTEND)
    with pytest.raises(ValueError, match="segments: the clips have no seeds"):
        segments(replace(SOUNDS, seeds=None), FRONTEND)
