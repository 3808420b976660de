"""Video files to floating point pixels, sampled by time. What a file is, its content decides.

Decoding is done in a process of its own, see `process.py`; by which decoder, see `decoders.py`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from mmssl.files import open_clip
from mmssl.modalities.video.process import Decoder, Died, borrowed
from mmssl.types import BadClip

log = logging.getLogger(__name__)

LIMIT = 20.0  # seconds in which a decoder must get further
_SLACK = 0.1  # seconds that a segment may be shorter than asked for
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601

Span = Callable[[float], tuple[float, float]]

_said: set[str] = set()
_avoided: set[str] = set()  # files that decord hung or crashed on: once is enough


def read(
    source: str | Path | BinaryIO,
    *,
    rate: float,
    channels: int = 3,
    start: float = 0.0,
    duration: float | None = None,
    span: Span | None = None,
    decoder: Literal["auto", "decord", "pyav"] = "auto",
    limit: float = LIMIT,
) -> Tensor:
    """Frames at `rate` a second, whatever the file's own rate and however uneven: each is the one that is shown in the
    middle of its 1 / rate seconds.

    Time counts from the moment when the first frame appears. Frames are upright, and as large as they are stored: of
    video with pixels that are not square neither side is stretched. Frames that an edit list hides are not there.

    Without `duration` the clip goes to the file's end and has seconds * rate frames, rounded. A frame comes several
    times where the file's own rate is lower than `rate`, or where a frame stands for long; that is logged once,
    and of each file of which a clip is one frame over and over.

    A file that was cut off ends before the first frame that is not whole, and a clip with frames that cannot be
    decoded, or that come from packets known to be broken, is a bad one. Bytes spoiled inside a frame are found by
    PyAV in most frames of H.264, MPEG-4 and AV1 and hardly ever in HEVC, VP8 and VP9; decord finds none. Not found
    either: that a gif was cut off, and that some of the last frames are missing from an mkv, ts or avi that was cut
    off between two and does not store them in the order in which they are shown; the one before stands in their
    place.

    Args:
        source: a path, or a seekable binary file.
        rate: frames per second.
        channels: 3, or 1 (color becomes luma).
        start, duration: seconds. Only what is needed for that part is decoded.
        span: seconds of that part -> (start, duration) in it of what to read: where a clip is drawn from a long file.
        decoder: "auto" takes decord where it is installed and right, and PyAV elsewhere; "decord" asks no question.
            Where decord fails, hangs or crashes, PyAV is tried.
        limit: seconds without a further frame after which a decoder is given up, however long all of them take, and
            more of them where the machine leaves it no core.

    Returns:
        (C, T, H, W) float32 in [0, 1], T >= 1.

    Raises:
        BadClip: missing, empty, damaged, no video at all, shorter than the segment, or no further frame within `limit`.
        ValueError: another number of channels.
    """
    if channels not in (1, 3):
        raise ValueError(f"video is read with 1 or 3 channels, got {channels}")
    name, path, content = _source(source)
    if start < 0 or (duration is not None and duration <= 0):
        raise BadClip(name, f"a segment of {duration} s from {start} s on is none")
    if decoder == "auto" and name in _avoided:
        decoder = "pyav"

    try:
        said, pixels = _attempt(name, path, content, rate, start, duration, span, decoder, limit)
    except Died as first:
        if decoder == "pyav":
            raise BadClip(name, str(first)) from None
        _avoided.add(name)
        _say_once(f"decord hangs or crashes on it ({first})", f"{name}: read by PyAV")
        try:
            said, pixels = _attempt(name, path, content, rate, start, duration, span, "pyav", limit)
        except Died as second:
            raise BadClip(name, f"{second}, by PyAV as by decord") from None
    if said["reason"]:
        _say_once(said["reason"], f"{name}: read by PyAV")
    if said["distinct"] == 1 < len(pixels):
        _say_once(
            f"one frame stands for all {len(pixels)} at {rate:g} a second, so nothing moves in the clip",
            name,
            each=True,
        )
    elif said["distinct"] < len(pixels):
        _say_once(
            "frames come several times where a file's own rate is lower",
            f"{name}: {said['distinct']} frames stand for the {len(pixels)} at {rate:g} a second",
        )
    frames = torch.from_numpy(pixels).permute(3, 0, 1, 2)
    # straight to where they belong: another copy of a long clip is what the memory has no room for
    clip = torch.empty(frames.shape, dtype=torch.float32).copy_(frames).div_(255.0)
    if channels == 1:
        clip = torch.einsum("cthw,c->thw", clip, torch.tensor(_LUMA))[None].clamp_max_(1.0)
    return clip


def frames_of(length: int, *, own_rate: float, rate: float, span: Span | None) -> Tensor:
    """Which of so many frames at `own_rate` a second `read` would give of a file of them: (T,) int64, ascending."""
    # a little later, as in a file: a time that is a frame's first moment must not be rounded to the frame before
    numbers = ((_moments(length / own_rate, rate, span) + 1e-6) * own_rate).astype(np.int64)
    return torch.from_numpy(numbers.clip(max=length - 1))


def probe(source: str | Path | BinaryIO, *, limit: float = LIMIT) -> dict[str, Any]:
    """What a manifest says of a video: `seconds`, `fps`, `frames`, `height`, `width` (upright), `sound` (whether there
    is any), and `decoder`: "pyav" for files that decord does not read, or not right.

    No packet's promise is believed at the end of a file: from its last key frame on it is decoded and counted.

    Raises:
        BadClip: as `read`, but for what only decoding all of it would show.
    """
    name, path, content = _source(source)

    def describe(decord: bool) -> dict[str, Any]:
        with borrowed() as worker:
            _ask(worker, name, {"do": "open", "path": path}, content, limit)
            return _ask(worker, name, {"do": "describe", "decord": decord}, b"", limit)[0]

    try:
        found = describe(decord=True)
    except Died:
        try:
            found = describe(decord=False) | {"reason": "decord hangs or crashes on it"}
        except Died as error:
            raise BadClip(name, str(error)) from None
    return found | {"decoder": "pyav" if found.pop("reason") else "auto"}


def _attempt(
    name: str,
    path: str | None,
    content: bytes,
    rate: float,
    start: float,
    duration: float | None,
    span: Span | None,
    decoder: str,
    limit: float,
) -> tuple[dict[str, Any], np.ndarray]:
    """What the process says of the frames, and the frames, (T, H, W, 3) uint8."""
    with borrowed() as worker:
        seconds = _ask(worker, name, {"do": "open", "path": path}, content, limit)[0]["seconds"]
        if start >= seconds:
            raise BadClip(name, f"the segment starts at {start:g} s, but the file ends at {seconds:g} s")
        left = seconds - start
        if duration is not None and duration > left + _SLACK:
            raise BadClip(name, f"the segment of {duration:g} s from {start:g} s on ends after {left:g} s")
        times = start + _moments(left if duration is None else duration, rate, span)
        return _ask(worker, name, {"do": "frames", "times": times.tolist(), "decoder": decoder}, b"", limit)


def _moments(seconds: float, rate: float, span: Span | None) -> np.ndarray:
    """(T,) seconds at which the frames are looked at that are read of a part so long."""
    start, seconds = (0.0, seconds) if span is None else span(seconds)
    # in the middle of each frame's time, where no rounding can reach the frame before or after
    moments: np.ndarray = start + (np.arange(max(1, round(seconds * rate))) + 0.5) / rate
    return moments


def _ask(
    worker: Decoder, name: str, request: dict[str, Any], content: bytes, limit: float
) -> tuple[dict[str, Any], np.ndarray]:
    answer, pixels = worker.ask(request, content, limit=limit)
    if "unreadable" in answer:
        raise BadClip(name, answer["unreadable"])
    return answer, pixels


def _source(source: str | Path | BinaryIO) -> tuple[str, str | None, bytes]:
    """What to call it, its path, and its content where it has none."""
    if isinstance(source, str | Path):
        with open_clip(source) as file:
            size = os.fstat(file.fileno()).st_size
        if not size:
            raise BadClip(source, "the file is empty")
        return str(source), os.path.abspath(source), b""
    name = str(getattr(source, "name", "video in memory"))
    source.seek(0)
    content = source.read()
    if not content:
        raise BadClip(name, "the file is empty")
    return name, None, content


def _say_once(kind: str, what: str, *, each: bool = False) -> None:
    """Once in all, or with `each` once of each file, which is then all that `what` says."""
    key = what if each else kind
    if key not in _said:
        _said.add(key)
        log.warning("%s: %s (said once for %s)", what, kind, "this file" if each else "all such files")
