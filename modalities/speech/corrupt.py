"""Ways to spoil a recording, for measuring: (x (T,), rng, severity) -> (T,). A line in the table adds one.

All are pure; severities are 1 to 5. The protocol is that of Hendrycks and Dietterich 2019 (arXiv:1903.12261), which has
pictures only: kinds and severities for sound are our own. A setting called `rate` is filled in from the frontend.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mmssl.modalities.modality import at_severity


def noise(x: Tensor, rng: np.random.Generator, *, severity: int) -> Tensor:
    """White noise, 20 to 0 decibels below the recording's own power."""
    decibels = at_severity((20, 15, 10, 5, 0), severity)
    power = x.square().mean() * 10.0 ** (-decibels / 10)
    return x + power.sqrt() * torch.from_numpy(rng.standard_normal(len(x), dtype=np.float32))


def quiet(x: Tensor, rng: np.random.Generator, *, severity: int) -> Tensor:
    """6 to 30 decibels softer."""
    return x * 10.0 ** (-at_severity((6, 12, 18, 24, 30), severity) / 20)


def clipping(x: Tensor, rng: np.random.Generator, *, severity: int) -> Tensor:
    """The loudest 1 to 40 % of samples are cut to the size of those below, as by a microphone turned up too far."""
    share = at_severity((0.01, 0.05, 0.1, 0.2, 0.4), severity)
    sizes = x.abs()
    # numpy's, because torch's takes no more than 16 million samples
    border = float(np.quantile(sizes.numpy(), 1 - share))
    return x.clamp(-border, border)


def low_pass(x: Tensor, rng: np.random.Generator, *, severity: int, rate: int) -> Tensor:
    """Nothing above 0.7 to 0.15 of what the rate can hold."""
    return _band(x, 0.0, at_severity((0.7, 0.5, 0.35, 0.25, 0.15), severity) * rate / 2, rate)


def high_pass(x: Tensor, rng: np.random.Generator, *, severity: int, rate: int) -> Tensor:
    """Nothing below 0.02 to 0.25 of what the rate can hold, as of a small loudspeaker."""
    return _band(x, at_severity((0.02, 0.05, 0.1, 0.15, 0.25), severity) * rate / 2, rate / 2, rate)


def reverberation(x: Tensor, rng: np.random.Generator, *, severity: int, rate: int) -> Tensor:
    """In a room: noise that dies away by 60 decibels in 0.2 to 1.2 s follows each sample, as strong as the sample.

    As loud as before, and as long: what sounds on after the end is cut off.

    Source: the room is Polack's (1988), of exponentially decaying noise.
    """
    seconds = at_severity((0.2, 0.4, 0.6, 0.9, 1.2), severity)
    size = max(2, round(seconds * rate))
    tail = rng.standard_normal(size, dtype=np.float32) * 10.0 ** (-3 * np.arange(size) / size)
    tail[0] = 0
    room = torch.from_numpy((tail / np.sqrt(np.square(tail).sum())).astype(np.float32))
    room[0] = 1
    whole = len(x) + size - 1
    heard = torch.fft.irfft(torch.fft.rfft(x, n=whole) * torch.fft.rfft(room, n=whole), n=whole)[: len(x)]
    return heard * (x.square().mean() / heard.square().mean().clamp_min(1e-20)).sqrt()


def _band(x: Tensor, low: float, high: float, rate: int) -> Tensor:
    """What lies from `low` to `high` hertz."""
    spectrum = torch.fft.rfft(x)
    hertz = torch.fft.rfftfreq(len(x), 1 / rate)
    return torch.fft.irfft(torch.where((hertz >= low) & (hertz <= high), spectrum, 0), n=len(x))


CORRUPTIONS: dict[str, Callable[..., Tensor]] = {
    "noise": noise,
    "quiet": quiet,
    "clipping": clipping,
    "low_pass": low_pass,
    "high_pass": high_pass,
    "reverberation": reverberation,
}
