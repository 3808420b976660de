"""Augmentations repeat with their generator, leave their input alone, and do what their settings say."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.modalities.speech import SPEECH
from mmssl.modalities.speech.augment import center_crop, center_span, gain, noise, random_crop, speed

RATE = 1000
RAMP = torch.linspace(-1, 1, 1000)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    "augment",
    [
        partial(random_crop, seconds=0.3, rate=RATE),
        partial(center_crop, seconds=0.3, rate=RATE),
        partial(gain, decibels=6.0),
        partial(noise),
        partial(speed),
    ],
    ids=lambda augment: augment.func.__name__,
)
def test_one_generator_one_clip_and_the_input_untouched(augment: Callable[..., Tensor]) -> None:
    x = RAMP.clone()
    first, again = augment(x, rng(1)), augment(x, rng(1))
    assert torch.equal(first, again)
    assert torch.equal(x, RAMP)
    assert first.dtype == torch.float32
    silent = augment(torch.zeros(1000), rng(1))
    assert not silent.any()


def test_random_crop_is_a_piece_from_anywhere() -> None:
    starts = set()
    for seed in range(50):
        crop = random_crop(RAMP, rng(seed), seconds=0.25, rate=RATE)
        start = int(torch.searchsorted(RAMP, crop[0]))
        assert torch.equal(crop, RAMP[start : start + 250])
        starts.add(start)
    assert min(starts) < 100
    assert max(starts) > 650
    assert {int(random_crop(RAMP[:3], rng(seed), seconds=0.002, rate=RATE)[0] == RAMP[1]) for seed in range(20)} == {
        0,
        1,
    }


def test_shorter_clips_stay_whole() -> None:
    for crop in (random_crop, center_crop):
        assert torch.equal(crop(RAMP[:100], rng(), seconds=0.25, rate=RATE), RAMP[:100])


def test_center_crop_is_the_middle() -> None:
    assert torch.equal(center_crop(RAMP, rng(), seconds=0.5, rate=RATE), RAMP[250:750])
    for at, first in ((0.0, 0), (0.25, 125), (1.0, 500)):
        assert torch.equal(center_crop(RAMP, rng(), seconds=0.5, rate=RATE, at=at), RAMP[first : first + 500])
    assert torch.equal(center_crop(RAMP, rng(), seconds=5.0, rate=RATE, at=1.0), RAMP)
    with pytest.raises(ValueError, match="center_crop: at must be from 0, the beginning, to 1, the end, got 50"):
        center_crop(RAMP, rng(), seconds=0.5, rate=RATE, at=50)
    with pytest.raises(ValueError, match="center_span: at must be from 0, the beginning, to 1, the end, got -1"):
        center_span(5.0, rng(), seconds=0.5, at=-1)


def test_gain_stays_within_its_decibels() -> None:
    factors = [float(gain(torch.ones(1), rng(seed), decibels=6.0)) for seed in range(100)]
    assert 10 ** (-6 / 20) <= min(factors) < 0.6
    assert 1.6 < max(factors) <= 10 ** (6 / 20)


def test_noise_is_as_far_below_the_clip_as_asked_for() -> None:
    wave = torch.sin(torch.arange(20000) * 0.1)
    added = noise(wave, rng(), snr=(20.0, 20.0)) - wave
    assert 10 * math.log10(float(wave.square().mean() / added.square().mean())) == pytest.approx(20.0, abs=0.2)
    assert torch.equal(noise(wave, rng(), p=0.0), wave)


def test_speed_changes_length_and_pitch() -> None:
    wave = torch.sin(2 * math.pi * 50 * torch.arange(4000) / RATE)
    faster = speed(wave, rng(), factors=(1.25,))
    assert len(faster) == 3200
    want = torch.sin(2 * math.pi * 62.5 * torch.arange(3200) / RATE)
    assert (faster - want)[200:-200].abs().max() < 0.01
    assert len(speed(wave[:7], rng(), factors=(0.9,))) == math.ceil(7 / 0.9)
    assert torch.equal(speed(wave, rng(), factors=(1.0,)), wave)


def test_settings_without_sense_are_refused() -> None:
    for wrong in (
        partial(random_crop, seconds=0.0, rate=RATE),
        partial(gain, decibels=-1.0),
        partial(noise, snr=(20.0, 10.0)),
        partial(noise, p=2.0),
        partial(speed, factors=()),
        partial(speed, factors=(0.0,)),
    ):
        with pytest.raises(ValueError, match="crop|gain|noise|speed"):
            wrong(RAMP, rng())


SETTINGS: dict[str, dict[str, Any]] = {
    "random_crop": {"seconds": 0.4, "rate": RATE},
    "center_crop": {"seconds": 0.4, "rate": RATE},
    "gain": {"decibels": 6.0},
    "noise": {},
    "speed": {"factors": [0.8, 1.0, 1.3]},
}


@pytest.mark.parametrize("name", SPEECH.augments)
def test_no_clip_becomes_longer_than_its_extent_says(name: str) -> None:
    before = np.array([0.1, 0.4, 1.0], np.float32)
    extent = SPEECH.durations.get(name, lambda seconds, **settings: seconds)
    bounds = extent(before, **{key: value for key, value in SETTINGS[name].items() if key != "rate"})
    for seconds, bound in zip(before, bounds, strict=True):
        x = RAMP[: round(RATE * float(seconds))]
        longest = max(len(SPEECH.augments[name](x, rng(seed), **SETTINGS[name])) for seed in range(20))
        assert longest == pytest.approx(RATE * bound, abs=1)
