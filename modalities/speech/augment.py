"""What may be done to a waveform before it is embedded. Every function is (x (T,), rng, **settings) -> (T',), and pure.

Crops take codes, (G, T), too.

A setting called `rate` is filled in from the frontend; recipes do not repeat it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmssl.modalities.speech.reader import resample


def random_crop(x: Tensor, rng: np.random.Generator, *, seconds: float, rate: int) -> Tensor:
    """A piece of at most `seconds`, from anywhere; shorter clips stay whole."""
    size = _samples(seconds, rate)
    if x.shape[-1] <= size:
        return x
    start = int(rng.integers(x.shape[-1] - size + 1))
    return x[..., start : start + size]


def center_crop(x: Tensor, rng: np.random.Generator, *, seconds: float, rate: int, at: float = 0.5) -> Tensor:
    """The middle `seconds`, or with `at` others: 0 is the beginning, 1 the end. Shorter clips stay whole.

    The same every time: for evaluation.
    """
    return x[..., center_part(x.shape[-1], seconds=seconds, rate=rate, at=at)]


def center_part(length: int, *, seconds: float, rate: float, at: float = 0.5) -> slice:
    """Which of so many samples `center_crop` leaves."""
    _check_place("center_crop", at)
    size = _samples(seconds, rate)
    start = max(0, int((length - size) * at))
    return slice(start, min(start + size, length))


def crop_extent(seconds_before: np.ndarray, *, seconds: float, **settings: object) -> np.ndarray:
    """(clips,) seconds before a crop to `seconds` -> after it."""
    return np.minimum(seconds_before, seconds)


def random_span(
    whole: float, rng: np.random.Generator, *, seconds: float, step_ms: float = 20.0
) -> tuple[float, float]:
    """A piece of at most `seconds` from anywhere, read instead of the whole: (start, duration) in seconds.

    Unlike `random_crop` it is known where the piece lies, so units are cut as the sound is. It starts at a whole number
    of steps: made the step of the tokens, the piece's tokens are tokens of the whole clip.
    """
    if not (seconds > 0 and step_ms > 0):
        raise ValueError(f"random_span: seconds and step_ms must be above 0, got {seconds} and {step_ms}")
    duration = min(seconds, whole)
    steps = int((whole - duration) * 1000 / step_ms + 1e-6)
    return int(rng.integers(steps + 1)) * step_ms / 1000, duration


def center_span(whole: float, rng: np.random.Generator, *, seconds: float, at: float = 0.5) -> tuple[float, float]:
    """The middle `seconds`, or with `at` others, read instead of the whole: 0 is the beginning, 1 the end.

    The same every time: for evaluation, beside a `center_span` of video, with which it shows the same time.
    """
    if seconds <= 0:
        raise ValueError(f"center_span: seconds must be above 0, got {seconds}")
    _check_place("center_span", at)
    duration = min(seconds, whole)
    return (whole - duration) * at, duration


def span_extent(seconds_before: np.ndarray, *, seconds: float, **settings: object) -> np.ndarray:
    """(clips,) seconds before a span -> after it."""
    return np.minimum(seconds_before, np.float32(seconds))


def gain(x: Tensor, rng: np.random.Generator, *, decibels: float) -> Tensor:
    """Louder or softer by up to `decibels`."""
    if decibels < 0:
        raise ValueError(f"gain: decibels is how far up and down, so at least 0, got {decibels}")
    return x * 10.0 ** (rng.uniform(-decibels, decibels) / 20.0)


def noise(x: Tensor, rng: np.random.Generator, *, snr: tuple[float, float] = (10.0, 40.0), p: float = 1.0) -> Tensor:
    """White noise in a share `p` of clips, `snr` decibels below the clip's own power; silence stays silent."""
    low, high = snr
    if low > high or not 0 <= p <= 1:
        raise ValueError(f"noise: expected snr from low to high and p from 0 to 1, got {snr} and {p}")
    if rng.random() >= p:
        return x
    power = x.square().mean() * 10.0 ** (-rng.uniform(low, high) / 10.0)
    return x + power.sqrt() * torch.from_numpy(rng.standard_normal(len(x), dtype=np.float32))


def speed(x: Tensor, rng: np.random.Generator, *, factors: tuple[float, ...] = (0.9, 1.0, 1.1)) -> Tensor:
    """Played faster or slower, by one of `factors` at random: T becomes ceil(T / factor), and the pitch moves along.

    Source: Ko et al. 2015, "Audio augmentation for speech recognition", section 2.1.
    """
    _slowest(factors)
    factor = float(rng.choice(np.asarray(factors)))
    return torch.from_numpy(resample(x.numpy(), factor, 1.0))


def speed_extent(seconds_before: np.ndarray, *, factors: Sequence[float]) -> np.ndarray:
    """(clips,) seconds before `speed` -> after it, played as slowly as it may be."""
    return seconds_before / np.float32(_slowest(factors))


def _slowest(factors: Sequence[float]) -> float:
    if not factors or min(factors) <= 0:
        raise ValueError(f"speed: factors must be above 0, got {factors}")
    return min(factors)


def _check_place(name: str, at: float) -> None:
    if not 0 <= at <= 1:
        raise ValueError(f"{name}: at must be from 0, the beginning, to 1, the end, got {at:g}")


def _samples(seconds: float, rate: float) -> int:
    size = round(seconds * rate)
    if size < 1:
        raise ValueError(f"crop: {seconds} s at {rate} Hz is less than one sample")
    return size
