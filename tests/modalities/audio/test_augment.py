import numpy as np
import pytest
import torch

from mmssl.modalities import MODALITIES
from mmssl.modalities.audio.augment import roll


def test_a_rolled_clip_begins_elsewhere_and_loses_nothing() -> None:
    x = torch.arange(50.0)
    starts = {int(roll(x, np.random.default_rng(seed))[0]) for seed in range(20)}
    assert len(starts) > 10
    moved = roll(x, np.random.default_rng(3))
    assert torch.equal(moved, x.roll(int(moved.argmin())))


def test_a_share_of_clips_is_left_as_it_is() -> None:
    x = torch.arange(1000.0)
    still = sum(torch.equal(roll(x, np.random.default_rng(seed), p=0.3), x) for seed in range(200))
    assert 110 < still < 170  # 140 expected, with a deviation of 6.5
    assert torch.equal(roll(x, np.random.default_rng(0), p=0.0), x)
    with pytest.raises(ValueError, match="share of clips from 0 to 1"):
        roll(x, np.random.default_rng(0), p=2.0)


def test_audio_has_what_speech_has() -> None:
    assert set(MODALITIES["audio"].augments) == set(MODALITIES["speech"].augments) | {"roll"}
    # a rolled clip is as long as before
    assert MODALITIES["audio"].durations == MODALITIES["speech"].durations
