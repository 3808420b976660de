"""The frame asked for is the frame got, in every format that a user has; what cannot be read costs one clip."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmssl.modalities.speech.reader import read as read_sound
from mmssl.modalities.video import decoders, process, reader
from mmssl.modalities.video.reader import probe, read
from mmssl.types import BadClip

# inherited by every process that these tests start
os.environ["MMSSL_TESTS_OF"] = str(os.getpid())
MARK = f"MMSSL_TESTS_OF={os.getpid()}".encode()

linux = pytest.mark.skipif(not Path("/proc/self").exists(), reason="counts processes in /proc")

HEVC = {"x265-params": "log-level=none:pools=none:frame-threads=1:open-gop=0"}
HEVC_OPEN = {"x265-params": "log-level=none:pools=none:frame-threads=1"}
OPEN = {"x264-params": "open-gop=1:keyint=8:bframes=3:b-adapt=0"}
UNEVEN = [0, 40, 140, 160, 400, 450, 500, 900, 1000, 1030, 1100, 1210, 1300, 1333, 1400, 1500, 1520, 1600, 1800, 1900]

# name -> (encoder, settings of `write_video`, which decoder `auto` ends with): a new format is a new line
FORMATS: dict[str, tuple[str, dict[str, Any], str]] = {
    "h264.mp4": ("libx264", {}, "decord"),
    "h264_sound.mp4": ("libx264", {"sound": "aac"}, "decord"),
    "h264_one_gop.mp4": ("libx264", {"gop": 250}, "decord"),
    "h264.mov": ("libx264", {}, "decord"),
    "h264_sound.mkv": ("libx264", {"sound": "libopus"}, "decord"),
    "h264_open.mp4": ("libx264", {"options": OPEN}, "pyav"),
    "h264.avi": ("libx264", {"options": {"bf": "0"}}, "pyav"),
    "h264_uneven.mp4": ("libx264", {"stamps": UNEVEN}, "decord"),
    "h264_uneven.mkv": ("libx264", {"stamps": UNEVEN}, "decord"),
    "h264_sound.mov": ("libx264", {"sound": "aac"}, "decord"),
    "h264.ts": ("libx264", {}, "pyav"),
    "hevc.mp4": ("libx265", {"options": HEVC}, "decord"),
    "hevc_sound.mp4": ("libx265", {"options": HEVC, "sound": "aac"}, "decord"),
    "hevc_uneven.mp4": ("libx265", {"options": HEVC, "stamps": UNEVEN}, "decord"),
    "hevc_open.mp4": ("libx265", {"options": HEVC_OPEN}, "pyav"),
    "hevc_open_uneven.mkv": ("libx265", {"options": HEVC_OPEN, "stamps": UNEVEN}, "pyav"),
    "hevc_sound.mkv": ("libx265", {"options": HEVC, "sound": "aac"}, "decord"),
    "vp8.webm": ("libvpx", {"options": {"auto-alt-ref": "1", "lag-in-frames": "16"}}, "decord"),
    "vp9.webm": ("libvpx-vp9", {}, "decord"),
    "vp9_sound.webm": ("libvpx-vp9", {"sound": "libopus"}, "decord"),
    "vp9.mkv": ("libvpx-vp9", {}, "decord"),
    "vp9.mp4": ("libvpx-vp9", {}, "decord"),
    "vp9_uneven.webm": ("libvpx-vp9", {"stamps": UNEVEN}, "decord"),
    "av1.mp4": ("libsvtav1", {"options": {"preset": "12"}}, "pyav"),
    "av1.webm": ("libsvtav1", {"options": {"preset": "12"}}, "pyav"),
    "av1_uneven.mp4": ("libsvtav1", {"options": {"preset": "12"}, "stamps": UNEVEN}, "pyav"),
    "av1_sound.mkv": ("libsvtav1", {"options": {"preset": "12"}, "sound": "libopus"}, "pyav"),
    "mpeg4.avi": ("mpeg4", {}, "pyav"),
    "mpeg4_sound.avi": ("mpeg4", {"sound": "pcm_s16le"}, "pyav"),
    "mpeg4_b_frames.avi": ("mpeg4", {"options": {"bf": "2"}}, "pyav"),
    "mpeg4.mkv": ("mpeg4", {}, "decord"),
    "mpeg4_sound.mp4": ("mpeg4", {"sound": "aac"}, "decord"),
    "mpeg4_uneven.mp4": ("mpeg4", {"stamps": UNEVEN}, "decord"),
    "mpeg2.mpg": ("mpeg2video", {}, "pyav"),
    "mjpeg.avi": ("mjpeg", {"pixels": "yuvj420p"}, "pyav"),
    "gif.gif": ("gif", {"pixels": "rgb8"}, "pyav"),
    "gif_uneven.gif": ("gif", {"pixels": "rgb8", "stamps": [10 * (stamp // 10) for stamp in UNEVEN]}, "pyav"),
}


@pytest.fixture(scope="module")
def files(painted: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, (encoder, settings, _) in FORMATS.items():
        painted.write(folder / name, encoder, **settings)
    return folder


@pytest.fixture(autouse=True)
def nothing_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_said", set())
    monkeypatch.setattr(reader, "_avoided", set())


def shown(stamps: list[int], at: float) -> int:
    """The number of the frame on the screen."""
    return max(number for number, stamp in enumerate(stamps) if stamp <= 1000 * at)


@pytest.mark.parametrize("name", FORMATS)
def test_the_frame_asked_for_is_the_frame_got(files: Path, painted: Any, name: str) -> None:
    _, settings, last = FORMATS[name]
    found = probe(files / name)
    stamps = settings.get("stamps", [100 * number for number in range(20)])
    assert found["seconds"] == pytest.approx(2.0, abs=0.11)  # a container may not say how long the last frame stands
    assert found["frames"] == 20
    assert (found["height"], found["width"]) == (64, 64)
    assert found["sound"] == ("sound" in settings)
    assert found["decoder"] == ("auto" if last == "decord" else "pyav")
    for decoder in {"auto", "pyav", last}:
        whole = read(files / name, rate=10, decoder=decoder)
        assert whole.dtype == torch.float32
        assert whole.shape == (3, round(10 * found["seconds"]), 64, 64)
        assert painted.numbers(whole) == [shown(stamps, (k + 0.5) / 10) for k in range(whole.shape[1])]
        # far into the file, behind each of its key frames, finer than its own rate, from memory
        content = io.BytesIO((files / name).read_bytes())
        for start in (0.7, 1.2):
            part = read(content, rate=16, start=start, duration=0.5, decoder=decoder)
            assert painted.numbers(part) == [shown(stamps, start + (k + 0.5) / 16) for k in range(8)]


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "av1.mp4", "mpeg4_b_frames.avi", "gif.gif"])
def test_the_log_says_once_which_decoder_is_not_taken(files: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            read(files / name, rate=10)
    assert len(caplog.records) == (FORMATS[name][2] == "pyav")
    kind = {"mpeg4_b_frames.avi": "avi"}.get(name, name.partition(".")[0])
    assert all(f"{name}: read by PyAV: it is {kind} (said once" in text for text in caplog.messages)


def test_pyav_alone_does_everything(files: Path, painted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on Arm and Apple silicon, where decord has no wheel."""
    (tmp_path / "decord.py").write_text("raise ImportError('no decord here')")
    process.stop()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    try:
        for name in FORMATS:
            stamps = FORMATS[name][1].get("stamps", [100 * number for number in range(20)])
            clip = read(files / name, rate=5, start=0.5, duration=1.0)
            assert painted.numbers(clip) == [shown(stamps, 0.5 + (k + 0.5) / 5) for k in range(5)]
            assert probe(files / name)["frames"] == 20
    finally:
        process.stop()


@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_a_phone_held_sideways_gives_upright_frames(painted: Any, tmp_path: Path, rotation: int, decoder: Any) -> None:
    def turned(number: int) -> np.ndarray:
        # as the sensor lies: what the player turns back counterclockwise
        return np.ascontiguousarray(np.rot90(painted.paint(number, 64, 96), -rotation // 90))

    size = (64, 96) if rotation == 180 else (96, 64)
    path = painted.write(tmp_path / "a.mp4", "libx264", rotation=rotation, size=size, draw=turned, frames=4)
    clip = read(path, rate=10, decoder=decoder)
    assert clip.shape == (3, 4, 64, 96)
    assert painted.numbers(clip) == [0, 1, 2, 3]
    assert (probe(path)["height"], probe(path)["width"]) == (64, 96)


def test_frames_before_the_cut_of_an_edit_list_are_not_there(painted: Any, tmp_path: Path) -> None:
    """As `ffmpeg -ss 0.5 -c copy` cuts: from a key frame on, with the frames before the cut kept and hidden."""

    def cut(packets: list[Any]) -> list[Any]:
        for packet in packets:
            packet.pts -= round(0.5 / packet.time_base)
            packet.dts -= round(0.5 / packet.time_base)
        return packets

    path = painted.remux(painted.write(tmp_path / "a.mp4", "libx264", frames=40), tmp_path / "b.mp4", cut)
    found = probe(path)
    assert found["frames"] == 35
    assert found["seconds"] == pytest.approx(3.5)
    assert found["decoder"] == "pyav"
    assert painted.numbers(read(path, rate=10)) == list(range(5, 40))
    assert painted.numbers(read(path, rate=10, start=2.0, duration=0.3)) == [25, 26, 27]


def hollow(count: int) -> Any:
    """The last packets hold a unit that is no picture, as some recorders end a file."""

    def change(packets: list[Any]) -> list[Any]:
        import av

        for place in range(len(packets) - count, len(packets)):
            empty: Any = av.Packet(b"\0\0\0\x03\x46\x01\x50")
            old = packets[place]
            empty.pts, empty.dts, empty.duration, empty.time_base = old.pts, old.dts, old.duration, old.time_base
            packets[place] = empty
        return packets

    return change


@pytest.fixture(scope="module")
def long(painted: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return painted.write(tmp_path_factory.mktemp("long") / "a.mp4", "libx265", frames=200, gop=50, options=HEVC)


@pytest.mark.parametrize("count", [2, 131])
def test_frames_that_a_container_promises_and_does_not_hold(
    long: Path, painted: Any, tmp_path: Path, count: int
) -> None:
    path = painted.remux(long, tmp_path / "a.mp4", hollow(count))
    found = probe(path)
    assert found["frames"] == 200 - count
    assert found["decoder"] == "pyav"
    got = painted.numbers(read(path, rate=10))
    # B-frames go first, so the last ones may have gaps before them; none is made up
    assert got[: 190 - count] == list(range(190 - count))
    assert got == sorted(got)
    with pytest.raises(BadClip, match=r"the segment starts at 60 s, but the file ends at"):
        read(path, rate=10, start=60.0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda whole: b"", "the file is empty"),
        (lambda whole: b"<html><body>404 Not Found</body></html>" * 50, "not a video that can be read"),
        (lambda whole: b"ffconcat version 1.0\nfile '/etc/passwd'\n", "not a video that can be read"),
        (lambda whole: np.random.default_rng(0).bytes(5000), "not a video that can be read|there is no"),
        (lambda whole: whole[: len(whole) * 2 // 3], "not a video that can be read|there is no video"),
    ],
    ids=["empty", "html", "list of files", "random", "truncated"],
)
def test_what_is_no_video_is_one_sentence(files: Path, tmp_path: Path, make: Any, sentence: str) -> None:
    (tmp_path / "a.mp4").write_bytes(make((files / "h264.mp4").read_bytes()))
    for look in (lambda path: read(path, rate=10), probe):
        with pytest.raises(BadClip, match=f"a.mp4: .*({sentence})"):
            look(tmp_path / "a.mp4")


def test_a_missing_file_and_sound_alone_are_named(painted: Any, tmp_path: Path) -> None:
    import soundfile

    soundfile.write(tmp_path / "a.wav", np.zeros(800), 8000)
    with pytest.raises(BadClip, match="there is no video in it"):
        read(tmp_path / "a.wav", rate=10)
    with pytest.raises(BadClip, match="no such file"):
        read(tmp_path / "b.mp4", rate=10)


@pytest.mark.parametrize("name", ["h264_sound.mkv", "vp9.webm", "mpeg4.avi", "h264.ts"])
def test_a_file_that_was_cut_off_gives_what_is_there_or_one_sentence(
    files: Path, painted: Any, tmp_path: Path, name: str
) -> None:
    whole = (files / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    try:
        clip = read(tmp_path / name, rate=10)
    except BadClip:
        return
    assert 1 < clip.shape[1] < 20
    assert painted.numbers(clip) == list(range(clip.shape[1]))


FPS = 10  # of all that is written here

# whose index stands before the frames, so that what is there can be read
FRONT = {"movflags": "faststart"}


def cut(path: Path, share: float, *, within: bool = True) -> int:
    """Leaves that share of a file's bytes, or somewhat more, up to where a packet ends.

    Returns:
        How many frames are there of which, and before which, none is missing.
    """
    import av

    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        stored = [(packet.pts * packet.time_base * FPS, packet.pos + packet.size) for packet in packets]
    content = path.read_bytes()
    left = int(share * len(content))
    if not within:
        left = min(end for _, end in stored if end >= left)
    path.write_bytes(content[:left])
    there = {number for number, end in stored if end <= left}
    return min(number for number in range(len(stored) + 1) if number not in there)


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_a_clip_ends_before_the_frame_that_was_cut_through(painted: Any, tmp_path: Path, share: float) -> None:
    """A decoder makes such a frame up, gray or from the one before."""
    count = cut(painted.write(tmp_path / "a.mp4", "mpeg4", frames=60, muxer=FRONT), share)
    assert 1 < count < 50
    for decoder in ("auto", "pyav"):
        assert painted.numbers(read(tmp_path / "a.mp4", rate=10, decoder=decoder)) == list(range(count))


@pytest.mark.parametrize("within", [True, False], ids=["within a frame", "between frames"])
@pytest.mark.parametrize("share", [0.95, 0.7])
@pytest.mark.parametrize(
    ("encoder", "options"), [("libx264", {}), ("libx265", HEVC), ("mpeg4", {}), ("mpeg4", {"bf": "2"})]
)
def test_what_a_manifest_counts_in_a_file_that_was_cut_off_is_what_is_read(
    painted: Any, tmp_path: Path, encoder: str, options: dict[str, str], share: float, within: bool
) -> None:
    path = painted.write(tmp_path / "a.mp4", encoder, frames=200, gop=24, options=options, muxer=FRONT)
    whole = cut(path, share, within=within)
    found = probe(path)
    assert found["decoder"] == "pyav"
    assert found["seconds"] == pytest.approx(found["frames"] / FPS)
    # up to two before the gap may be left out, because nothing says that there is none between them
    assert whole - 2 <= found["frames"] <= whole
    assert painted.numbers(read(path, rate=FPS)) == list(range(found["frames"]))


def test_nothing_is_made_up_behind_bytes_that_were_lost_up_to_the_next_key(painted: Any, tmp_path: Path) -> None:
    path = painted.write(tmp_path / "a.ts", "libx264", frames=60, options={"bf": "0"})
    content = path.read_bytes()
    middle = len(content) // 188 // 2 * 188  # between two of the transport's packets
    path.write_bytes(content[:middle] + content[middle + 3 * 188 :])
    got = []
    for number in range(60):
        with contextlib.suppress(BadClip):
            got += painted.numbers(read(path, rate=10, start=number / 10, duration=0.1))
    with pytest.raises(BadClip, match=r"damaged or cut off: the frame at .* cannot be decoded"):
        read(path, rate=10)
    assert probe(path)["decoder"] == "pyav"
    lost = sorted(set(range(60)) - set(got))
    assert got == sorted(set(got))
    assert lost == list(range(lost[0], lost[-1] + 1))
    assert lost[-1] % 8 == 7  # a key comes every 8 frames


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.ts"])
def test_what_was_cut_out_in_the_middle_of_a_group_begins_with_the_first_frame_that_can_be_decoded(
    painted: Any, tmp_path: Path, name: str, decoder: Any
) -> None:
    whole = painted.write(tmp_path / f"whole{name}", "libx264", frames=24, options={"bf": "0"})  # a key every 8
    path = painted.remux(whole, tmp_path / name, lambda packets: packets[3:])
    assert painted.numbers(read(path, rate=10, decoder=decoder)) == list(range(8, 24))
    assert painted.numbers(read(path, rate=10, start=1.0, duration=0.5, decoder=decoder)) == list(range(18, 23))
    found = probe(path)
    assert found["frames"] == 16
    assert found["seconds"] == pytest.approx(1.6)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_frames_that_need_a_group_which_was_cut_off_are_not_there(painted: Any, tmp_path: Path, name: str) -> None:
    keys: list[int] = []

    def from_the_second_key(packets: list[Any]) -> list[Any]:
        keys.extend(place for place, packet in enumerate(packets) if packet.is_keyframe)
        return packets[keys[1] :]

    whole = painted.write(tmp_path / f"whole{name}", "libx265", frames=40, options=HEVC_OPEN | {"bf": "3"})
    path = painted.remux(whole, tmp_path / name, from_the_second_key)
    got = painted.numbers(read(path, rate=10))
    assert got == list(range(got[0], 40))
    assert got[0] >= keys[1]
    assert probe(path)["frames"] == len(got)


def test_frames_that_change_their_size_come_in_that_of_the_first(painted: Any, tmp_path: Path) -> None:
    import av

    for first, second in ((64, 128), (128, 64)):
        path = tmp_path / f"{first}.webm"
        with av.open(str(path), "w") as joined:
            for place, size in enumerate((first, second)):
                part = painted.write(tmp_path / f"part{size}.webm", "libvpx", frames=10, size=(size, size))
                with av.open(str(part)) as old:
                    own = old.streams.video[0]
                    stream = stream if place else joined.add_stream_from_template(own)  # noqa: F821 of the first turn
                    for packet in old.demux(own):
                        if packet.size:
                            later = round(place / own.time_base)
                            packet.pts, packet.dts, packet.stream = packet.pts + later, packet.dts + later, stream
                            joined.mux(packet)
        for decoder in ("pyav", "decord"):
            clip = read(path, rate=10, decoder=decoder)  # type: ignore[arg-type]
            assert clip.shape[2:] == (first, first)
            assert painted.numbers(clip) == [*range(10), *range(10)]


def test_the_content_of_a_file_opens_no_other(painted: Any, tmp_path: Path) -> None:
    painted.write(tmp_path / "inner.ts", "libx264")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2.0,\ninner.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "a.m3u8").write_text(playlist)
    with pytest.raises(BadClip, match="not a video that can be read"):
        read(tmp_path / "a.m3u8", rate=10)


def test_holes_are_not_filled_with_other_frames(files: Path, tmp_path: Path) -> None:
    content = bytearray((files / "vp9.webm").read_bytes())
    content[len(content) // 3 :] = bytes(len(content) - len(content) // 3)
    (tmp_path / "a.webm").write_bytes(content)
    with pytest.raises(BadClip):
        read(tmp_path / "a.webm", rate=10, start=1.5, duration=0.3)


def test_frames_that_come_again_are_said_to(files: Path, painted: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert painted.numbers(read(files / "h264.mp4", rate=20, duration=0.2)) == [0, 0, 1, 1]
        read(files / "hevc.mp4", rate=20, duration=0.2)
    assert len(caplog.messages) == 1
    assert "2 frames stand for the 4 at 20 a second" in caplog.messages[0]


def test_a_clip_in_which_nothing_moves_is_named_with_its_file(
    files: Path, painted: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        read(files / "vp9.mp4", rate=20, duration=0.2)  # frames of another file come again
        for name in ("h264.mp4", "hevc.mp4"):
            for start in (0.0, 1.0):
                assert len(set(painted.numbers(read(files / name, rate=40, start=start, duration=0.1)))) == 1
        assert painted.numbers(read(files / "h264.mp4", rate=10, duration=0.1)) == [0]
    for name, text in zip(("h264.mp4", "hevc.mp4"), caplog.messages[1:], strict=True):
        assert f"{name}: one frame stands for all 4 at 40 a second, so nothing moves in the clip (said once" in text


def test_a_short_file_gives_fewer_frames_and_none_twice(painted: Any, tmp_path: Path) -> None:
    path = painted.write(tmp_path / "a.mp4", "libx264", frames=6)
    clip = read(path, rate=10, span=lambda whole: (0.0, min(1.6, whole)))
    assert painted.numbers(clip) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(BadClip, match=r"the segment of 1.6 s from 0 s on ends after 0.6 s"):
        read(path, rate=10, duration=1.6)
    alone = painted.write(tmp_path / "b.mp4", "libx264", frames=1)
    assert painted.numbers(read(alone, rate=10)) == [0]


def test_a_span_is_chosen_within_the_segment(files: Path, painted: Any) -> None:
    asked = []

    def span(whole: float) -> tuple[float, float]:
        asked.append(whole)
        return 0.3, 0.2

    assert painted.numbers(read(files / "h264.mp4", rate=10, start=0.5, duration=1.0, span=span)) == [8, 9]
    assert painted.numbers(read(files / "h264.mp4", rate=10, start=0.5, span=span)) == [8, 9]
    assert asked == [1.0, pytest.approx(1.5)]


def test_one_channel_is_luma(files: Path) -> None:
    color, gray = (read(files / "h264.mp4", rate=10, duration=0.2, channels=channels) for channels in (3, 1))
    assert gray.shape == (1, 2, 64, 64)
    assert torch.allclose(gray[0], 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2], atol=1e-6)
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        read(files / "h264.mp4", rate=10, channels=2)


def most_memory(process_id: int | str = "self") -> int:
    """The most bytes that a process has held so far; of this one, since it was asked before."""
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            if process_id == "self":
                Path("/proc/self/clear_refs").write_text("5")
            return int(line.split()[1]) * 1024
    raise AssertionError


@linux
def test_memory_has_room_for_a_clip_once(painted: Any, tmp_path: Path) -> None:
    steady = painted.paint(5, 256, 256)
    # transport streams are PyAV's: how many frames decord holds in a queue of its own depends on the moment
    for name, count in (("short.ts", 2), ("long.ts", 200)):
        settings = {"gop": 250, "size": (256, 256), "options": {"preset": "ultrafast"}}
        painted.write(tmp_path / name, "libx264", frames=count, draw=lambda number: steady, **settings)
    values = 3 * 200 * 256 * 256
    process.stop()
    probe(tmp_path / "short.ts")
    [decoder] = process._idle
    before = most_memory(decoder._process.pid)
    probe(tmp_path / "long.ts")
    assert most_memory(decoder._process.pid) - before < values / 2  # frames that are counted are not kept
    most_memory()
    before = most_memory()
    clip = read(tmp_path / "long.ts", rate=10)
    assert clip.numel() == values
    assert clip.is_contiguous()
    assert most_memory() - before < 6 * values  # 4 bytes of each, and that which it was made of


def test_a_file_is_gone_through_once_until_it_changes(
    painted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = []
    whole = decoders.read_timeline
    monkeypatch.setattr(decoders, "read_timeline", lambda file, alive: walks.append(file.name) or whole(file, alive))
    monkeypatch.setattr(decoders, "_known", OrderedDict())
    monkeypatch.setattr(decoders, "KNOWN", 11)

    def count(name: str) -> int:
        session = decoders._Session(str(tmp_path / name), b"", lambda: None)
        session.file.close()
        return len(session.timeline.stamps)

    for name in "ab":
        painted.write(tmp_path / f"{name}.mp4", "mpeg4", frames=5)
    assert [count("a.mp4"), count("b.mp4"), count("a.mp4")] == [5, 5, 5]
    assert len(walks) == 2
    painted.write(tmp_path / "b.mp4", "mpeg4", frames=6)
    assert [count("b.mp4"), count("a.mp4")] == [6, 5]
    assert len(walks) == 3
    # of more frames than there is room for, the one that nobody asked for longest goes
    painted.write(tmp_path / "c.mp4", "mpeg4", frames=6)
    assert [count("c.mp4"), count("a.mp4"), count("b.mp4")] == [6, 5, 6]
    assert [Path(name).name for name in walks[3:]] == ["c.mp4", "b.mp4"]


# processes


BROKEN = {
    "crashes": ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "the decoder crashed (exit code -11)"),
    # as decord's own endless loop does, it never lets go of Python's lock
    "hangs": ("import ctypes\nctypes.PyDLL(None).pause()", "no frame within 1.5 s"),
}


@linux
@pytest.mark.parametrize("kind", BROKEN)
def test_a_decoder_that_crashes_or_hangs_costs_one_more_try(
    files: Path,
    painted: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    program, sentence = BROKEN[kind]
    (tmp_path / "decord.py").write_text(program)
    process.stop()
    before = running()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    try:
        begun = time.monotonic()
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert painted.numbers(read(files / "h264.mp4", rate=10, duration=0.3, limit=1.5)) == [0, 1, 2]
        # it is not asked for that file again, or each time would cost the limit
        assert time.monotonic() - begun < 4.5
        assert len(caplog.messages) == 1
        assert f"decord hangs or crashes on it ({sentence})" in caplog.messages[0]
        assert probe(files / "h264.mp4", limit=1.5)["decoder"] == "pyav"
    finally:
        process.stop()
    assert running() <= before


@linux
@pytest.mark.parametrize(("wants_core", "least"), [(True, 0.8), (False, 0.2)])
def test_a_decoder_that_gets_no_core_is_given_more_time(
    monkeypatch: pytest.MonkeyPatch, wants_core: bool, least: float
) -> None:
    monkeypatch.setattr(process, "_computed", lambda pid: (0.0, wants_core))
    monkeypatch.setattr(process, "PATIENCE", 4)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    begun = time.monotonic()
    watch = process._Watch(sleeper, 0.2)
    sleeper.wait(30)
    assert watch.late
    assert time.monotonic() - begun >= least
    watch.end()


@linux
def test_a_process_that_gets_no_core_is_not_ended_by_its_own_alarm(
    files: Path, painted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_computed", lambda pid: (0.0, True))  # as if others left it none
    (tmp_path / "decord.py").write_text("import time\ntime.sleep(3)\nraise ImportError")
    process.stop()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    try:
        with process.borrowed() as decoder:
            decoder.ask({"do": "open", "path": str(files / "h264.mp4")}, limit=1.5)
            asked = {"do": "frames", "times": [0.0], "decoder": "auto"}
            assert decoder.ask(asked, limit=1.5)[0]["decoder"] == "pyav"
    finally:
        process.stop()


@linux
def test_it_is_told_who_computes_from_who_waits() -> None:
    for program, computes in (("while True: pass", True), ("import time; time.sleep(60)", False)):
        one = subprocess.Popen([sys.executable, "-c", program])
        try:
            time.sleep(1.5)
            before, wants_core = process._computed(one.pid)
            assert wants_core == computes
            time.sleep(0.5)
            assert (process._computed(one.pid)[0] > before) == computes
        finally:
            one.kill()
            one.wait()
    assert process._computed(one.pid) == (0.0, False)


# what a decode process finds in the place of decord: each 0.06 s a frame
SLOW = {
    "pyav": """
import time, __main__
whole = __main__._whole_frames
def slowly(*where):
    for frame in whole(*where):
        time.sleep(0.06)
        yield frame
__main__._whole_frames = slowly
raise ImportError
""",
    "decord": """
import time, __main__
import numpy as np
__main__.STRIDE = 4
class DECORDError(Exception): pass
class VideoReader:
    def __init__(self, file, num_threads): pass
    def __len__(self): return 20
    def get_batch(self, numbers):
        time.sleep(0.06 * len(numbers))
        self.numbers = numbers
        return self
    def asnumpy(self):
        return np.stack([np.load({folder!r} + "/frames.npy")[number] for number in self.numbers])
""",
}


@pytest.mark.parametrize("kind", SLOW)
def test_a_limit_is_for_standing_still_and_not_for_the_whole(
    files: Path, painted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    np.save(tmp_path / "frames.npy", np.stack([painted.paint(number) for number in range(20)]))
    (tmp_path / "decord.py").write_text(SLOW[kind].replace("{folder!r}", repr(str(tmp_path))))
    process.stop()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    try:
        read(files / "h264.mp4", rate=10, duration=0.1)  # starting takes its time, too
        begun = time.monotonic()
        assert painted.numbers(read(files / "h264.mp4", rate=10, limit=0.7)) == list(range(20))
        assert time.monotonic() - begun > 1.0
        assert not reader._avoided
    finally:
        process.stop()


def test_frames_on_the_way_to_one_are_not_taken_for_it(painted: Any, tmp_path: Path) -> None:
    path = painted.write(tmp_path / "a.mp4", "libx264", frames=200, gop=250, options={"preset": "ultrafast"})
    for decoder in ("decord", "pyav"):
        assert painted.numbers(read(path, rate=0.1, decoder=decoder)) == [50, 150]
        assert painted.numbers(read(path, rate=10, start=18.0, duration=0.3, decoder=decoder)) == [180, 181, 182]


def running() -> set[int]:
    """Processes that decode and descend from this one, whoever started them; other tests may have theirs."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, state = (folder / "cmdline").read_bytes(), (folder / "stat").read_text().rpartition(")")[2]
            ours = MARK in (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if ours and b"video/decoders.py" in command and not state.strip().startswith("Z"):
            found.add(int(folder.name))
    return found


@linux
def test_one_process_serves_many_clips_and_a_bad_one_does_not_end_it(files: Path, tmp_path: Path) -> None:
    process.stop()
    before = running()
    (tmp_path / "a.mp4").write_bytes(b"rubbish")
    for _ in range(3):
        read(files / "h264.mp4", rate=10)
        with pytest.raises(BadClip):
            read(tmp_path / "a.mp4", rate=10)
    assert len(running() - before) == 1
    process.stop()
    assert running() <= before


@linux
@pytest.mark.parametrize("end", ["raise SystemExit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_no_process_is_left_however_a_program_ends(files: Path, end: str) -> None:
    before = running()
    program = (
        "import os, signal\nfrom mmssl.modalities.video.reader import read\n"
        f"print(read({str(files / 'h264.mp4')!r}, rate=10).shape, flush=True)\n{end}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "torch.Size([3, 20, 64, 64])" in done.stdout, done.stderr
    patience = time.monotonic() + 5
    while running() - before and time.monotonic() < patience:
        time.sleep(0.02)
    assert running() <= before


@linux
def test_a_forked_worker_starts_its_own(files: Path, painted: Any) -> None:
    def work(answers: Any) -> None:
        answers.put((painted.numbers(read(files / "h264.mp4", rate=10, duration=0.3)), os.getpid()))

    read(files / "h264.mp4", rate=10)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    worker = context.Process(target=work, args=(answers,), daemon=True)
    worker.start()
    # both at once: a shared process would give each the other's frames
    mine = [painted.numbers(read(files / "hevc.mp4", rate=10, start=1.0, duration=0.3)) for _ in range(5)]
    assert answers.get(timeout=20)[0] == [0, 1, 2]
    worker.join()
    assert mine == [[10, 11, 12]] * 5


# sound


@pytest.mark.parametrize(
    ("name", "encoder", "sound", "start"),
    [
        ("a.mp4", "libx264", "aac", 0.0),
        ("a.mkv", "libx264", "aac", 0.0),
        ("a.webm", "libvpx-vp9", "libopus", 0.0),
        ("late.mp4", "libx264", "aac", 0.3),
        ("late.mkv", "libx264", "pcm_s16le", 0.3),
        ("early.mkv", "libx264", "pcm_s16le", -0.25),
    ],
)
def test_sound_is_in_time_with_the_frames(
    painted: Any, tmp_path: Path, name: str, encoder: str, sound: str, start: float
) -> None:
    """The click sounds when frame 10 appears, wherever the sound track starts."""
    path = painted.write(tmp_path / name, encoder, sound=sound, sound_from=start)
    wave = read_sound(path, rate=16_000)
    click = (wave.abs() > 0.3).nonzero()[:, 0] / 16_000
    assert float(click.min()) == pytest.approx(1.0, abs=0.005)
    assert float(click.max()) == pytest.approx(1.01, abs=0.005)
    part = read_sound(path, rate=16_000, start=0.9, duration=0.5)
    assert float((part.abs() > 0.3).nonzero()[0]) / 16_000 == pytest.approx(0.1, abs=0.005)
    assert painted.numbers(read(path, rate=10, start=1.0, duration=0.1)) == [10]


@pytest.mark.parametrize(("name", "sound"), [("a.mp4", "aac"), ("a.mkv", "aac"), ("a.ts", "aac")])
def test_sound_of_what_was_cut_out_starts_with_the_first_frame_that_can_be_decoded(
    painted: Any, tmp_path: Path, name: str, sound: str
) -> None:
    import av

    whole = painted.write(tmp_path / f"whole{name}", "libx264", frames=24, options={"bf": "0"}, sound=sound)
    path = tmp_path / name
    with av.open(str(whole)) as old, av.open(str(path), "w") as new:
        streams = {one.index: new.add_stream_from_template(one) for one in old.streams}
        for packet in old.demux():
            if packet.size and packet.pts * packet.time_base >= 0.3:  # a key comes after .8 s
                packet.stream = streams[packet.stream.index]
                new.mux(packet)
    assert painted.numbers(read(path, rate=10))[0] == 8
    for source in (path, io.BytesIO(path.read_bytes())):
        wave = read_sound(source, rate=16_000)
        assert float((wave.abs() > 0.3).nonzero()[0]) / 16_000 == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize(("name", "sound"), [("a.mp4", "aac"), ("a.mkv", "aac"), ("a.mkv", "pcm_s16le")])
def test_sound_stays_in_time_after_a_gap(painted: Any, tmp_path: Path, name: str, sound: str) -> None:
    path = painted.write(tmp_path / name, "libx264", frames=30, sound=sound, sound_gap=(0.3, 0.8))
    wave = read_sound(path, rate=16_000)
    click = (wave.abs() > 0.3).nonzero()[:, 0] / 16_000
    assert float(click.min()) == pytest.approx(1.0, abs=0.005)
    assert float(click.max()) == pytest.approx(1.01, abs=0.005)
    assert len(wave) == pytest.approx(3 * 16_000, abs=0.03 * 16_000)
    for start, duration in ((0.1, 0.3), (0.5, 0.1), (0.6, 0.6), (0.9, 0.5)):  # into it, within, out of it, after it
        first, size = round(start * 16_000), round(duration * 16_000)
        part = read_sound(path, rate=16_000, start=start, duration=duration)
        assert len(part) == size
        # resampled by itself, a part is silent beyond its ends
        assert float((part - wave[first : first + size]).abs()[200:-200].max()) < 1e-3


def test_a_gap_of_more_than_an_hour_is_one_sentence(
    painted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmssl.modalities.speech.reader._LONGEST_GAP", 0.4)
    path = painted.write(tmp_path / "a.mkv", "libx264", sound="pcm_s16le", sound_gap=(0.3, 0.8))
    with pytest.raises(BadClip, match=r"a.mkv: its sound stops at 0\.\d+ s for 0\.\d+ s, more than an hour; cut"):
        read_sound(path, rate=16_000)
