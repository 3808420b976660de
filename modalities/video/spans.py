"""Which part of a file is read: (whole, rng, **settings) -> (start, duration), all in seconds.

A span is chosen before anything is decoded, so of an hour of video no more is decoded than the clip needs. The packets
of the whole file are gone through once, to know when its frames are shown; the process that decodes remembers that of
the files that it was asked for last. A file shorter than the span is taken whole, and gives fewer frames.

A setting called `rate` is filled in from the frontend; recipes do not repeat it.
"""

from __future__ import annotations

import numpy as np


def random_span(whole: float, rng: np.random.Generator, *, frames: int, rate: float) -> tuple[float, float]:
    """So many frames in a row from anywhere."""
    duration = min(_duration(frames, rate), whole)
    return float(rng.uniform(0.0, whole - duration)), duration


def center_span(
    whole: float, rng: np.random.Generator, *, frames: int, rate: float, at: float = 0.5
) -> tuple[float, float]:
    """The frames in the middle, or with `at` elsewhere: 0 is the beginning, 1 the end.

    The same every time: for evaluation.
    """
    if not 0 <= at <= 1:
        raise ValueError(f"center_span: at must be from 0, the beginning, to 1, the end, got {at:g}")
    duration = min(_duration(frames, rate), whole)
    return (whole - duration) * at, duration


def span_extent(seconds_before: np.ndarray, *, frames: int, rate: float, **settings: object) -> np.ndarray:
    """(clips,) seconds before a span of so many frames -> what it leaves."""
    return np.minimum(seconds_before, _duration(frames, rate))


def _duration(frames: int, rate: float) -> float:
    if frames < 1:
        raise ValueError(f"span: frames must be at least 1, got {frames}")
    return frames / rate
