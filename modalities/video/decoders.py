"""Frames of a video file by the time at which they are shown: decord where it is right, PyAV for everything else.

Run as a program, this file answers requests on its standard input. It is run so, in a process of its own (see
`process.py`), because decoders crash and hang on damaged files; it imports neither torch nor mmssl, to start quickly.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import time
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np

# What decord was never seen to be wrong on. It refuses AV1 and gif; from MPEG transport streams, from AVI whose frames
# are not shown as they are stored, and behind the key of an open group of frames, which x265 writes where nobody tells
# it not to, it gives wrong frames without a word.
BOXES = "mov,mp4,m4a,3gp,3g2,mj2"
DECORD_CONTAINERS = {BOXES, "matroska,webm"}
DECORD_CODECS = {"h264", "hevc", "vp9", "vp8", "mpeg4", "mjpeg"}
_START = re.compile(b"\0\0\1.", re.DOTALL)  # of a unit of H.264 or HEVC, with the byte that says what it is
STRIDE = 50  # frames that decord decodes without a sign of life
KNOWN = 2_000_000  # frames in the timelines that are kept: 16 MB


class Unreadable(Exception):
    """One sentence: why there is nothing to be had from a file."""


@dataclass
class Timeline:
    """When each frame of a file is shown.

    stamps: of the frames that are shown, in the file's own units of time, ascending.
    keys: those of them that can be decoded without others; the first of `stamps` where decoding starts at the front.
    base: seconds of one unit.
    seconds: from the first frame's appearance to the last one's end.
    edited: whether the file holds frames that are not to be shown.
    leading: whether frames are stored behind a key and shown before it ("open groups of pictures").
    broken: whether packets are not as they were written, or not there: the file was cut off, or lost bytes.
    """

    stamps: Sequence[int]
    keys: Sequence[int]
    base: float
    seconds: float
    container: str
    codec: str
    edited: bool
    leading: bool
    broken: bool
    sound: bool

    def at(self, time: float) -> int:
        """The number of the frame that is shown `time` seconds after the first one appears."""
        # a little later: a time that is a frame's first moment must not be rounded to the frame before
        stamp = self.stamps[0] + (time + 1e-6) / self.base
        return max(bisect_right(self.stamps, stamp) - 1, 0)

    def key_before(self, number: int) -> int:
        """The number of the frame from which decoding frame `number` starts."""
        place = bisect_right(self.keys, self.stamps[number]) - 1
        return bisect_left(self.stamps, self.keys[place]) if place >= 0 else 0


def read_timeline(file: BinaryIO, alive: Callable[[], None]) -> Timeline:
    """The frames of a file, from its packets: none is decoded where every packet says when its frame is shown.

    It begins with the first frame that can be decoded, which in what was cut out of a longer recording is its first
    key, and ends before a broken packet that no key comes after. What a broken packet holds in the middle of a file,
    and what follows it up to the next key, has its place and cannot be decoded.

    Args:
        alive: called after each packet and each frame.

    Raises:
        Unreadable: no video, or no frame in it.
    """
    with _opened(file) as (container, stream):
        shown: list[tuple[int, int, bool]] = []  # stamp, duration, whether it is a key
        complete, edited, leading, broken, key = True, False, False, False, 0
        end: tuple[int, int | None] | None = None  # packets before a broken one, and when that is decoded
        last: int | None = None  # when the one before is
        holds_picture = _picture_test(stream.codec_context)
        for packet in container.demux(stream):
            alive()
            if not packet.size:
                continue  # the end
            if packet.is_corrupt:
                broken = True
                end = end or (len(shown), packet.dts)
            elif packet.is_keyframe:
                end = None
            if packet.is_discard:
                edited = True
            elif packet.pts is None:
                complete = False
            elif holds_picture(packet):
                shown.append((packet.pts, packet.duration or 0, packet.is_keyframe))
                if packet.is_keyframe or len(shown) == 1:
                    key = packet.pts
                leading |= packet.pts < key
            last = packet.dts
        if container.format.name == BOXES and _ends_within_its_media(file):
            broken = True
            end = end or (len(shown), last)
        if end is not None:
            # a frame is never shown before it is decoded: up to then none of those that are lost is missing
            count, last_whole = end
            shown = [one for one in shown[:count] if last_whole is None or one[0] <= last_whole]
        shown.sort()
        stamps = [stamp for stamp, _, _ in shown]
        if not complete or len(set(stamps)) < len(stamps):
            shown = _decode_timeline(container, stream, alive)
            stamps = [stamp for stamp, _, _ in shown]
        first_key = next((stamp for stamp, _, key in shown if key), None)
        if first_key is not None and stamps[0] < first_key:
            front = {one[0] for one in _decode_timeline(container, stream, alive, until=first_key)}
            shown = [one for one in shown if one[0] >= first_key or one[0] in front]
            stamps = [stamp for stamp, _, _ in shown]
        if not stamps:
            raise Unreadable("it is cut off within its first frames" if broken else "there is no frame in it")
        base, rate = float(stream.time_base), float(stream.average_rate or stream.base_rate or 0)
        stands = shown[-1][1] * base or (1 / rate if rate else 0.0)
        return Timeline(
            stamps=array("q", stamps),
            keys=array("q", [stamp for stamp, _, key in shown if key] if complete else stamps[:1]),
            base=base,
            seconds=(stamps[-1] - stamps[0]) * base + stands,
            container=container.format.name,
            codec=stream.codec_context.codec.canonical_name,
            edited=edited,
            leading=leading,
            broken=broken,
            sound=bool(container.streams.audio),
        )


def by_pyav(
    file: BinaryIO,
    timeline: Timeline,
    numbers: list[int],
    alive: Callable[[], None],
    *,
    take: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """Frames by their numbers, ascending: (H, W, 3) uint8 each, upright, up to the first that cannot be decoded.

    Args:
        alive: called after each frame that is decoded.
        take: what to give of each of them in the place of its pixels, which take memory.
    """
    import av

    take = take or _upright
    found: dict[int, Any] = {}
    stamps = [timeline.stamps[number] for number in numbers]
    wanted = set(stamps)
    with _opened(file) as (container, stream):
        try:
            for group in _groups(stamps, timeline.keys):
                for start in (group[0], timeline.stamps[0]):
                    if start > timeline.stamps[0]:
                        container.seek(start, stream=stream)
                    else:
                        container.seek(min(0, start), stream=stream)
                    for frame in _whole_frames(container, stream):
                        alive()
                        if frame.pts in wanted and frame.pts not in found and not frame.is_corrupt:
                            found[frame.pts] = take(frame)
                        if frame.pts is not None and frame.pts >= group[-1]:
                            break
                    if all(stamp in found for stamp in group[1:]):
                        break  # a seek that lands too late, which damaged indices make it do, is mended from the front
        except av.FFmpegError:
            pass  # what was decoded before is still good
    frames = []
    for stamp in stamps:
        if stamp not in found:
            break
        frames.append(found[stamp])
    return frames


def by_decord(
    file: str | BinaryIO, timeline: Timeline, numbers: list[int], alive: Callable[[], None], *, check: bool = True
) -> list[np.ndarray]:
    """Frames by their numbers, ascending: (H, W, 3) uint8 each.

    decord says nothing before all is done that it was asked for. So it is asked for little at a time, on long ways for
    frames that nobody wants, too; `alive` is called after each time.

    Raises:
        Unreadable: decord cannot read the file, or, with `check`, counts other frames in it than the timeline: then its
            numbers are others, or it would look for ever for those that are not there.
    """
    import decord

    try:
        reader = decord.VideoReader(file, num_threads=1)
        if check and len(reader) != len(timeline.stamps):
            raise Unreadable("decord counts other frames than are shown")
        alive()
        frames: list[np.ndarray] = []
        for way, portion in _portions(timeline, numbers):
            for between in way:
                reader.get_batch([between])
                alive()
            frames.extend(reader.get_batch(portion).asnumpy())
            alive()
    except (RuntimeError, decord.DECORDError, OSError) as error:
        raise Unreadable("decord fails on it") from error
    return frames


def _portions(timeline: Timeline, numbers: list[int]) -> Iterator[tuple[range, list[int]]]:
    """The numbers in portions for each of which some `STRIDE` frames are decoded, and the frames on the way to each."""
    way, portion, decoded, reached = range(0), list[int](), 0, 0
    for number in numbers:
        start = max(reached, timeline.key_before(number))
        reached = number + 1
        if portion and decoded + reached - start > STRIDE:
            yield way, portion
            portion = []
        if not portion:
            way, decoded = range(start + STRIDE, number, STRIDE), 0
        portion.append(number)
        decoded += reached - start
    yield way, portion


class _opened:
    """PyAV's view of a file that stands at its start: (container, the video stream to be seen)."""

    def __init__(self, file: BinaryIO) -> None:
        import av

        self.file = file
        file.seek(0)
        try:
            # an object without a name: neither does a suffix decide what it is, nor can its content name other files
            self.container = av.open(SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell))
        except (av.FFmpegError, ValueError, OSError, IndexError) as error:
            raise Unreadable(f"not a video that can be read ({getattr(error, 'strerror', None) or error})") from None

    def __enter__(self) -> tuple[Any, Any]:
        streams = [s for s in self.container.streams.video if not int(s.disposition) & 0x400]  # no cover pictures
        if not streams or streams[0].codec_context is None or self.container.format.name == "tty":
            self.container.close()
            raise Unreadable("there is no video in it")
        stream = streams[0]
        # threads over frames can deadlock when decoding ends early
        stream.codec_context.thread_type = "SLICE"
        stream.codec_context.thread_count = 1
        return self.container, stream

    def __exit__(self, *exception: object) -> None:
        self.container.close()


def _ends_within_its_media(file: BinaryIO) -> bool:
    """Whether a file of boxes (mp4, mov) is shorter than the box that holds its packets."""
    before = file.tell()
    size = file.seek(0, os.SEEK_END)
    place, kind = 0, b""
    while place + 16 <= size:
        file.seek(place)
        head = file.read(16)
        length = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4], "big")
        if length < 8:
            break  # the last one, whose end is the file's
        place, kind = place + length, head[4:8]
    file.seek(before)  # where FFmpeg left it
    return kind == b"mdat" and place > size


def _groups(stamps: Sequence[int], keys: Sequence[int]) -> list[list[int]]:
    """The stamps that can be decoded from the same key, behind that key."""
    groups: list[list[int]] = []
    for stamp in stamps:
        place = bisect_right(keys, stamp) - 1
        start = keys[place] if place >= 0 else stamps[0]
        if groups and groups[-1][0] == start:
            groups[-1].append(stamp)
        else:
            groups.append([start, stamp])
    return groups


def _decode_timeline(
    container: Any, stream: Any, alive: Callable[[], None], *, until: int | None = None
) -> list[tuple[int, int, bool]]:
    """For files whose packets do not say when they are shown (AVI with B-frames): what decoding all of it says.

    Of others, whose packets do not say what can be decoded of their front: what decoding them up to a stamp says.
    """
    import av

    container.seek(0, stream=stream)
    shown = []
    try:
        for frame in _whole_frames(container, stream):
            alive()
            if frame.pts is not None and not (until is not None and frame.is_corrupt):
                shown.append((frame.pts, frame.duration or 0, False))
                if until is not None and frame.pts >= until:
                    break
    except av.FFmpegError:
        pass  # a file that was cut off: what is there
    return sorted({stamp: (stamp, duration, key) for stamp, duration, key in shown}.values())


def _whole_frames(container: Any, stream: Any) -> Iterator[Any]:
    """The frames from here on, without those of broken packets and of what follows them up to the next key.

    A decoder would make them up: gray, or from frames that are not theirs.
    """
    lost = False
    for packet in container.demux(stream):
        if packet.is_corrupt and not lost:
            lost = True
            yield from stream.decode(None)  # what it holds back of the frames before
        elif lost and packet.is_keyframe and not packet.is_corrupt:
            lost = False
            stream.codec_context.flush_buffers()
        if not lost:
            yield from packet.decode()


def _upright(frame: Any) -> np.ndarray:
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, round(frame.rotation / 90) % 4)


def _in_one_size(frames: list[np.ndarray]) -> list[np.ndarray]:
    """All as large as the first of them: joined files and recordings of calls change their size on the way.

    decord does so by itself.
    """
    import av

    height, width = frames[0].shape[:2]
    for place, frame in enumerate(frames):
        if frame.shape != frames[0].shape:
            whole = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            frames[place] = whole.reformat(width, height).to_ndarray(format="rgb24")
    return frames


def _upright_size(frame: Any) -> tuple[int, int]:
    """Height and width."""
    return (frame.width, frame.height) if round(frame.rotation / 90) % 2 else (frame.height, frame.width)


def _picture_test(codec: Any) -> Callable[[Any], bool]:
    """packet -> whether it holds a picture: containers count as frames those that hold parameters or nothing, too.

    Packets are looked at where they lie, and only as far as the first picture.
    """
    extra = bytes(codec.extradata or b"")
    if codec.name == "vp8":
        return lambda packet: bool(memoryview(packet)[0] & 0x10)  # the others are references that are never shown
    if codec.name not in ("h264", "hevc"):
        return lambda packet: True
    hevc = codec.name == "hevc"
    size = 0  # of the length before each unit; 0 where start codes stand there
    if extra[:1] == b"\x01" and len(extra) > 21:
        size = (extra[21 if hevc else 4] & 3) + 1

    def is_picture(head: int) -> bool:
        return (head >> 1 & 0x3F) < 32 if hevc else 1 <= head & 0x1F <= 5

    def test(packet: Any) -> bool:
        data = memoryview(packet)
        place = 0
        while size and place + size < len(data):
            if is_picture(data[place + size]):
                return True
            place += size + int.from_bytes(data[place : place + size], "big")
        return not size and any(is_picture(data[start.end() - 1]) for start in _START.finditer(data))

    return test


_known: OrderedDict[tuple[str, int, int], Timeline] = OrderedDict()  # the one that was asked for last is the last


def _timeline(file: BinaryIO, alive: Callable[[], None]) -> Timeline:
    """The file's timeline, for which all of it is gone through once; see `read_timeline`."""
    if isinstance(file, io.BytesIO):
        return read_timeline(file, alive)
    status = os.fstat(file.fileno())
    which = (file.name, status.st_size, status.st_mtime_ns)
    if which not in _known:
        _known[which] = read_timeline(file, alive)
        while len(_known) > 1 and sum(len(line.stamps) for line in _known.values()) > KNOWN:
            _known.popitem(last=False)
    _known.move_to_end(which)
    return _known[which]


class _Session:
    """The file that a process is asked about."""

    def __init__(self, path: str | None, content: bytes, alive: Callable[[], None]) -> None:
        self.path = path
        self.file: BinaryIO = io.BytesIO(content) if path is None else open(path, "rb")  # noqa: SIM115 kept open
        self.timeline = _timeline(self.file, alive)

    def describe(self, alive: Callable[[], None], *, decord: bool) -> dict[str, Any]:
        """What a manifest says of the file. The end is decoded from its last key on: there containers over-report."""
        line = self.timeline
        reason = self._declined()
        first = line.keys[-1] if line.keys else line.stamps[0]
        tail = [number for number, stamp in enumerate(line.stamps) if stamp >= first]
        decoded = by_pyav(self.file, line, tail, alive, take=_upright_size)
        count, seconds = len(line.stamps) - len(tail) + len(decoded), line.seconds
        if len(decoded) < len(tail):
            reason = "its last frames cannot be decoded"
            seconds = (line.stamps[count] - line.stamps[0]) * line.base
            decoded = decoded or by_pyav(self.file, line, [0], alive, take=_upright_size)
        if not decoded or not count:
            raise Unreadable("its frames cannot be decoded")
        if decord and not reason:
            try:
                by_decord(self.path or self._rewound(), line, [count - 1], alive)
            except Unreadable as error:
                reason = str(error)
            except ImportError:
                pass  # nothing can be said against a decoder that is not here
        height, width = decoded[0]
        return {
            "seconds": seconds,
            "fps": count / seconds,
            "frames": count,
            "height": height,
            "width": width,
            "sound": line.sound,
            "reason": reason,
        }

    def frames(
        self, times: list[float], decoder: str, alive: Callable[[], None]
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        """How it was had, and what is shown at each of `times`: (H, W, 3) uint8."""
        line = self.timeline
        numbers = [line.at(time) for time in times]
        unique = sorted(set(numbers))
        reason = self._declined() if decoder == "auto" else ""
        found: list[np.ndarray] | None = None
        if decoder == "decord" or (decoder == "auto" and not reason):
            try:
                found = by_decord(self.path or self._rewound(), line, unique, alive, check=decoder == "auto")
            except (Unreadable, ImportError) as error:
                if isinstance(error, Unreadable):
                    reason = str(error)
        used = "pyav" if found is None else "decord"
        if found is None:
            found = by_pyav(self.file, line, unique, alive)
            if len(found) < len(unique):
                lost = (line.stamps[unique[len(found)]] - line.stamps[0]) * line.base
                raise Unreadable(f"damaged or cut off: the frame at {lost:.2f} s cannot be decoded")
            found = _in_one_size(found)
        places = {number: place for place, number in enumerate(unique)}
        said = {"decoder": used, "reason": reason, "distinct": len(unique)}
        return said, [found[places[number]] for number in numbers]

    def _declined(self) -> str:
        """Why decord is not to be asked; empty where it is."""
        line = self.timeline
        if line.edited:
            return "an edit list hides frames of it"
        if line.broken:
            return "it is damaged or cut off"
        if line.codec not in DECORD_CODECS:
            return f"it is {line.codec}"
        if line.container not in DECORD_CONTAINERS:
            return f"it is {line.container}"
        return "frames of it are shown before the key frame that they follow" if line.leading else ""

    def _rewound(self) -> BinaryIO:
        self.file.seek(0)
        return self.file


class _Life:
    """Says now and then, when called, that something is being done: the time limit counts from there."""

    def __init__(self, limit: float, alarm: float, answers: BinaryIO) -> None:
        self.limit, self.alarm, self.answers = limit, alarm, answers
        self._begin()

    def __call__(self) -> None:
        if time.monotonic() - self.said > self.limit / 10:
            self.answers.write(b'{"alive": true}\n')
            self.answers.flush()
            self._begin()

    def _begin(self) -> None:
        self.said = time.monotonic()
        if hasattr(signal, "alarm"):
            # not handled, so that it ends this process whatever holds Python's lock, also where nobody is left to do so
            signal.setitimer(signal.ITIMER_REAL, self.alarm)


def serve() -> None:
    """Answer requests, a line of JSON each (and as many bytes as its "size" says), until the input ends.

    An answer is a line of JSON, and as many bytes as its "size" says. Before it come lines of JSON {"alive": true}: a
    request may take for ever, but no more than the seconds of its "limit" from one of them to the next: whoever asked
    sees to that, and knows whether the machine was busy. The seconds of its "alarm" are for when nobody is there to.
    """
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries that print would garble the answers
    session: _Session | None = None
    while line := requests.readline():
        request = json.loads(line)
        content = requests.read(request.get("size", 0))
        alive = _Life(request["limit"], request["alarm"], answers)
        frames: list[np.ndarray] = []
        try:
            if request["do"] == "open":
                session = None
                session = _Session(request["path"], content, alive)
                answer: dict[str, Any] = {"seconds": session.timeline.seconds}
            elif session is None:
                answer = {"unreadable": "no file is open"}
            elif request["do"] == "describe":
                answer = session.describe(alive, decord=request["decord"])
            else:
                answer, frames = session.frames(request["times"], request["decoder"], alive)
                answer |= {"shape": (len(frames), *frames[0].shape), "size": sum(frame.nbytes for frame in frames)}
        except (Unreadable, OSError) as error:
            answer = {"unreadable": str(error)}
        if hasattr(signal, "alarm"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(answer).encode() + b"\n")
        for frame in frames:
            answers.write(np.ascontiguousarray(frame).data)
        answers.flush()


if __name__ == "__main__":
    serve()
