"""Videos made on the spot, with the number of each frame painted into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BITS = 8
FPS = 10


def paint(number: int, height: int = 64, width: int = 64) -> np.ndarray:
    """(H, W, 3): the number's bits as white and black bars from left to right, the lowest first; inverted below."""
    bits = np.repeat([255 if number >> bit & 1 else 0 for bit in range(BITS)], width // BITS)
    picture = np.broadcast_to(bits[None, :, None], (height, width, 3)).astype(np.uint8).copy()
    picture[height // 2 :] = 255 - picture[height // 2 :]
    return picture


def numbers(clip: Any) -> list[int]:
    """What is painted into each frame of (C, T, H, W)."""
    bars = clip.mean(0).unflatten(-1, (BITS, -1))
    inner = bars.shape[-1] // 4
    bars = bars[..., inner : bars.shape[-1] - inner].mean(-1)  # (T, H, BITS)
    height = bars.shape[1]
    above, below = bars[:, height // 8 : height * 3 // 8].mean(1), bars[:, height * 5 // 8 : height * 7 // 8].mean(1)
    assert bool((((above - below).abs()) > 0.5).all()), "no bar code"
    return [int(sum(2**bit for bit in range(BITS) if row[bit] > 0.5)) for row in above]


def write_video(
    path: Path,
    encoder: str,
    *,
    frames: int = 20,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    stamps: Sequence[int] | None = None,
    rotation: int = 0,
    gop: int = 8,
    size: tuple[int, int] = (64, 64),
    draw: Callable[[int], np.ndarray] | None = None,
    sound: str = "",
    sound_from: float = 0.0,
    muxer: dict[str, str] | None = None,
    sound_gap: tuple[float, float] = (0.0, 0.0),
) -> Path:
    """A video of 10 frames/s.

    Args:
        stamps: milliseconds at which each frame is shown instead.
        sound: codec of a sound track with a click after one second.
        sound_from: seconds at which the track starts.
        muxer: options of the container.
        sound_gap: seconds from and to which it has no packets.
    """
    import av

    height, width = size
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream: Any = container.add_stream(encoder, rate=FPS, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        track: Any = container.add_stream(sound, rate=48_000) if sound else None
        packets = []
        for number in range(frames):
            picture = paint(number, height, width) if draw is None else draw(number)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (
                (number, Fraction(1, FPS)) if stamps is None else (stamps[number], Fraction(1, 1000))
            )
            packets += stream.encode(frame)
        packets += stream.encode()
        if track is not None:
            click = _click(track, frames / FPS, sound_from)
            packets += [one for one in click if not sound_gap[0] <= one.pts * one.time_base < sound_gap[1]]
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


def _click(track: Any, seconds: float, start: float) -> list[Any]:
    import av

    track.layout = "mono"
    first = round(start * 48_000)
    time = np.arange(first, round(seconds * 48_000)) / 48_000
    wave = np.where((time >= 1.0) & (time < 1.01), np.sin(2 * np.pi * 1000 * time), 0.0).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 48_000, first, Fraction(1, 48_000)
    context = track.codec_context
    size = context.frame_size or 1024
    cut = av.AudioResampler(format=context.format.name, layout="mono", rate=48_000, frame_size=size)
    packets = []
    for part in [*cut.resample(frame), *cut.resample(None)]:
        packets += track.encode(part)
    return packets + track.encode()


def remux(source: Path, path: Path, change: Callable[[list[Any]], list[Any]]) -> Path:
    """The packets of a video as `change` gives them back, in another file."""
    import av

    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in change([packet for packet in old.demux(old.streams.video[0]) if packet.size]):
            packet.stream = stream
            new.mux(packet)
    return path


@pytest.fixture(scope="session")
def painted() -> Any:
    """The functions above: pytest's importlib mode lets no test import its neighbors."""
    from types import SimpleNamespace

    return SimpleNamespace(paint=paint, numbers=numbers, write=write_video, remux=remux, fps=FPS)
