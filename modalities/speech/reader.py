"""Sound files to mono waveforms. What a file is, its content decides; what its header promises is not believed."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mmssl.files import open_clip
from mmssl.types import BadClip

_BLOCK = 1 << 20  # frames decoded at a time: a header that promises an hour costs no memory before the hour is there
_SLACK = 0.1  # seconds that a segment may be shorter than asked for: MP3 encoders pad and cut by some 50 ms
_GAP = 0.02  # seconds by which the times of a video's sound may run ahead of its samples; containers round to some ms
_LONGEST_GAP = 3600.0  # seconds; a clock that is set anew in the middle of a file may jump by a day, in gigabytes
_LOWEST = 50  # samples a second; a header that says 1 would make seven hours at 16 kHz of a second at 24 kHz
_OPEN = 0x7FFFF000  # bytes: FFmpeg, sox and arecord leave 2^32 - 1, 2^31 - 1 and less, or 2^31 where they do not know
_UNKNOWN = 1 << 62  # frames: libsndfile says 2^63 - 1 where a header leaves the length open, as encoders in a pipe do
# libsndfile 1.2.2 finds a place in these to the sample; in Ogg Vorbis and MP3 it now and then lands elsewhere
_SEEKS = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC"}
# seconds that are decoded before a place in Opus, whose decoder remembers: from there on it is the whole within 1e-6
_WARM_UP = 0.5


def read(
    source: str | Path | BinaryIO,
    *,
    rate: int,
    start: float = 0.0,
    duration: float | None = None,
    span: Callable[[float], tuple[float, float]] | None = None,
) -> Tensor:
    """A mono waveform at `rate`, from wav, flac, ogg, opus, aiff (soundfile) or mp3, m4a, webm, mp4 ... (PyAV).

    Channels are averaged. n samples at another rate become ceil(n * rate / own rate), as torchaudio and librosa count
    them. A wav, ogg or mp3 file that was cut off gives what is there; a flac or m4a file is refused. The sound of a
    video starts with its first frame: silence stands where it comes later and in the gaps of its timestamps, and what
    is heard before is left out.

    Args:
        source: a path, or a seekable binary file.
        start, duration: seconds. In wav, flac, aiff, au, caf and opus only that part is decoded, elsewhere all up to
            its end.
        span: (seconds of that) -> (start, duration): which part of it is wanted, chosen once its true length is known;
            only that part is decoded where the above holds and the header says the length.

    Returns:
        (T,) float32, T >= 1, in [-1, 1] as far as the file is: floating point files may go beyond, and are left so.

    Raises:
        BadClip: missing, empty, damaged, no sound at all, NaN or infinite samples, or not as long as the segment.
    """
    with _opened(source) as (file, name):
        if start < 0 or (duration is not None and duration <= 0):
            raise BadClip(name, f"a segment of {duration} s from {start} s on is none")
        wave, own_rate, _ = _decode(file, name, start, duration, span)
    if not len(wave):
        raise BadClip(name, "holds no samples")
    if own_rate < _LOWEST:
        raise BadClip(name, f"its header says {own_rate} samples a second; below {_LOWEST} is no sound")
    finite = np.isfinite(wave)
    if not finite.all():
        bad = int((~finite).sum())
        raise BadClip(name, f"{bad} of {len(wave)} samples are NaN or infinite, the first is number {finite.argmin()}")
    wave = resample(wave, own_rate, rate)
    if not np.isfinite(wave).all():
        raise BadClip(name, f"its samples are too large to be resampled from {own_rate} to {rate} Hz")
    return torch.from_numpy(wave)


def samples_of(span: Callable[[float], tuple[float, float]], length: int, rate: float) -> slice:
    """Which of so many samples a span chooses, at least one; see `read`."""
    first, seconds = span(length / rate)
    begin = min(round(first * rate), length - 1)
    return slice(begin, begin + max(1, round(seconds * rate)))


def probe(source: str | Path | BinaryIO) -> dict[str, Any]:
    """What a manifest says of a sound file: `seconds`, `rate`, `channels`; and `remark` where a wav file was cut off.

    The header's length is taken where its last frame can be read and nothing follows it; otherwise, and for what
    soundfile does not read, the file is decoded and counted.

    Raises:
        BadClip: as `read`, but for what only decoding all of it would show.
    """
    import soundfile

    with _opened(source) as (file, name):
        try:
            chained = _is_chained(file)
            with _sound(file) as sound:
                frames, rate, channels = sound.frames, sound.samplerate, sound.channels
                honest = not chained and _ends_there(sound)
        except soundfile.LibsndfileError:
            honest = False
        if not honest:
            file.seek(0)
            wave, rate, channels = _decode(file, name, 0.0, None)
            frames = len(wave)
        missing = _missing(file)
    if not frames:
        raise BadClip(name, "holds no samples")
    found: dict[str, Any] = {"seconds": frames / rate, "rate": rate, "channels": channels}
    if missing:
        stated = found["seconds"] / (1 - missing)
        found["remark"] = f"ends after {found['seconds']:.3f} s, where its header states {stated:.3f} s"
    return found


def _missing(file: BinaryIO | io.FileIO) -> float:
    """The share of the samples that a wav file's header states and the file does not hold; libsndfile hides it."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return 0.0
    while len(head := file.read(8)) == 8:
        stated = int.from_bytes(head[4:], "little")
        if head[:4] == b"data":
            there = size - file.tell()
            # writers in a pipe, who cannot go back to the header, leave 0 or some of the largest numbers in it
            return 1 - there / stated if there < stated < _OPEN else 0.0
        file.seek(stated + stated % 2, io.SEEK_CUR)
    return 0.0


def resample(wave: np.ndarray, old: float, new: float) -> np.ndarray:
    """(T,) float32 at `old` samples a second -> (ceil(T * new / old),) at `new`, without delay.

    By soxr rather than torchaudio, whose kernel for rates without a common factor (44,101 to 16,000) takes gigabytes.
    """
    if old == new:
        return wave
    import soxr

    length = -int(-len(wave) * new // old)
    # soxr rounds the length; so it gets silence enough to make one sample more, and the end is cut
    wave = np.concatenate([wave, np.zeros(int(old // new) + 2, np.float32)])
    return np.ascontiguousarray(soxr.resample(wave, old, new, quality="HQ")[:length])


@contextmanager
def _opened(source: str | Path | BinaryIO) -> Iterator[tuple[BinaryIO | io.FileIO, str]]:
    """The source as a binary file that holds something, and what to call it."""
    if not isinstance(source, str | Path):
        name = str(getattr(source, "name", "sound in memory"))
        if not source.seek(0, io.SEEK_END):
            raise BadClip(name, "the file is empty")
        source.seek(0)
        yield source, name
        return
    with ExitStack() as stack:
        # unbuffered: soundfile moves the descriptor's own place
        file = stack.enter_context(open_clip(source, buffering=0))
        if not os.fstat(file.fileno()).st_size:
            raise BadClip(source, "the file is empty")
        yield file, str(source)


def _sound(file: BinaryIO | io.FileIO) -> Any:
    """soundfile's view of a file that stands at its start."""
    import soundfile

    # a descriptor is read without Python's lock, and has no name whose suffix could decide
    return soundfile.SoundFile(file.fileno() if isinstance(file, io.FileIO) else file, closefd=False)


def _is_chained(file: BinaryIO | io.FileIO) -> bool:
    """Whether the last page of an Ogg file is of another stream than the first. Leaves the file at its start."""
    head = file.read(18)
    end = b""
    if head[:4] == b"OggS":
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - (1 << 16)))  # a page is no longer
        end = file.read(1 << 16)
    file.seek(0)
    last = end.rfind(b"OggS")
    return 0 <= last <= len(end) - 18 and end[last + 14 : last + 18] != head[14:]


def _ends_there(sound: Any) -> bool:
    """Whether the last frame that the header states can be read, and nothing follows it."""
    sound.seek(sound.frames - 1)
    return bool(sound.buffer_read_into(np.empty((2, sound.channels), np.float32), "float32") == 1)


def _decode(
    file: BinaryIO | io.FileIO,
    name: str,
    start: float,
    duration: float | None,
    span: Callable[[float], tuple[float, float]] | None = None,
) -> tuple[np.ndarray, int, int]:
    """(T,) float32 mono at the file's own rate, that rate, and how many channels there were."""
    import soundfile

    def chosen(wave: np.ndarray, rate: int) -> np.ndarray:
        return wave if span is None or not len(wave) else wave[samples_of(span, len(wave), rate)].copy()

    chained = _is_chained(file)
    try:
        sound = _sound(file)
    except soundfile.LibsndfileError as error:
        file.seek(0)
        wave, rate, channels = _decode_by_pyav(file, name, start, duration, error.error_string)
        return chosen(wave, rate), rate, channels
    open_end = sound.frames > _UNKNOWN or (sound.format.startswith("WAV") and not sound.frames)
    if sound.format == "MP3" or sound.subtype == "GSM610" or open_end or chained:
        # soundfile seeks after every read, which libsndfile does wrongly in MP3 (the second block starts with rubbish)
        # and not at all in GSM and in FLAC of unknown length; a wav whose header says 0 it takes for empty, and of Ogg
        # files one after the other, as radio on the web writes them, it sees the first
        sound.close()
        file.seek(0)
        wave, rate, channels = _decode_by_pyav(file, name, start, duration, f"{sound.format} is left to PyAV")
        return chosen(wave, rate), rate, channels
    with sound:
        rate = sound.samplerate
        first, count = round(start * rate), _frames(duration, rate)
        seeks = sound.seekable() and (sound.format in _SEEKS or sound.subtype == "OPUS")
        try:
            if span is not None and seeks and first < sound.frames:
                if _ends_there(sound):
                    there = sound.frames - first if count is None else min(count, sound.frames - first)
                    _check_segment(name, start, duration, there / rate)
                    part = samples_of(span, there, rate)
                    return _part(sound, first + part.start, min(part.stop, there) - part.start), rate, sound.channels
                sound.seek(0)
            if first and seeks:
                wave = _part(sound, first, count)
            else:
                wave = np.concatenate(list(_from(first, _blocks(sound, None if count is None else first + count))))
        except soundfile.LibsndfileError as error:
            if first >= sound.frames:
                raise _outside(name, start, sound.frames / rate) from None
            raise BadClip(name, f"damaged or cut off: {error.error_string.rstrip('.')}") from None
    if first and not len(wave):
        raise _outside(name, start, sound.frames / rate)
    _check_segment(name, start, duration, len(wave) / rate)
    return chosen(wave, rate), rate, sound.channels


def _part(sound: Any, first: int, count: int | None) -> np.ndarray:
    """Up to `count` mono frames from frame `first` on, of a file that seeks; None: to its real end."""
    early = min(first, round(_WARM_UP * sound.samplerate)) if sound.subtype == "OPUS" else 0
    sound.seek(first - early)
    return np.concatenate(list(_from(early, _blocks(sound, None if count is None else early + count))))


def _blocks(sound: Any, count: int | None) -> Iterator[np.ndarray]:
    """Up to `count` mono frames from where the file stands; None: to its real end."""
    # one more, so that an honest header takes one call; telephone codecs, such as G.721, know no places
    expected = max(0, sound.frames - (sound.tell() if sound.seekable() else 0)) + 1
    while True:
        size = min(_BLOCK, expected if count is None else min(count, expected))
        block = np.empty((size, sound.channels), np.float32)
        got = sound.buffer_read_into(block, "float32")  # unlike read(), not stopped by the header's length
        yield block[:got, 0] if sound.channels == 1 else block[:got].mean(axis=1, dtype=np.float32)
        count = None if count is None else count - got
        if got < size or count == 0:
            return
        expected = _BLOCK


def _from(first: int, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """What comes from frame `first` on."""
    total = 0
    for block in blocks:
        yield block[max(0, first - total) :].copy()  # not a view, which would keep what is skipped in memory
        total += len(block)


def _decode_by_pyav(
    file: BinaryIO | io.FileIO, name: str, start: float, duration: float | None, tried: str
) -> tuple[np.ndarray, int, int]:
    import av

    blocks, total = [], 0
    try:
        with av.open(_nameless(file)) as container:
            if not container.streams.audio:
                raise BadClip(name, "there is no sound in it")
            stream = container.streams.audio[0]
            rate, channels = stream.rate, stream.channels
            first, count = round(start * rate), _frames(duration, rate)
            plain = av.AudioResampler(format="fltp", rate=rate)
            seen = _first_picture(file, container)
            origin: float | None = None  # the time of the first sample
            for frame in _whole_frames(container, stream):
                if seen is not None and frame.time is not None:
                    if origin is None:
                        origin = min(seen, frame.time)
                        first += round((seen - origin) * rate)
                    missing = round((frame.time - origin) * rate) - total
                    if missing > (_GAP * rate if total else 0):
                        missing = missing if count is None else min(missing, first + count - total)
                        if missing > _LONGEST_GAP * rate:
                            raise BadClip(
                                name,
                                f"its sound stops at {total / rate:g} s for {missing / rate:g} s, more than an hour; "
                                "cut the file there",
                            )
                        blocks.append(np.zeros(max(0, missing - max(0, first - total)), np.float32))
                        total += missing
                for part in plain.resample(frame):
                    block = part.to_ndarray().mean(axis=0, dtype=np.float32)
                    blocks.append(block[max(0, first - total) :])
                    total += len(block)
                if count is not None and total >= first + count:
                    break
    except (av.FFmpegError, ValueError, IndexError) as error:
        if isinstance(error, BadClip):
            raise
        raise BadClip(name, _pyav_reason(error, total, tried)) from None
    wave = np.concatenate([*blocks, np.empty(0, np.float32)])[:count]
    if first and not len(wave):
        raise _outside(name, start, total / rate)
    _check_segment(name, start, duration, len(wave) / rate)
    return wave, rate, channels


def _whole_frames(container: Any, stream: Any) -> Iterator[Any]:
    """The frames of a stream, up to its end or its first packet that is damaged.

    Behind the last frame of an mp3 file tags and rubbish may stand, which count as packets: they are left alone.

    Raises:
        InvalidDataError: sound goes on behind a damaged packet, or it is no mp3 file.
    """
    import av

    damaged: Exception | None = None
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.InvalidDataError as error:
            if container.format.name != "mp3":
                raise
            damaged = damaged or error
            continue
        if damaged is not None and frames:
            raise damaged
        yield from frames


def _first_picture(file: BinaryIO | io.FileIO, container: Any) -> float | None:
    """Seconds at which the first frame of a video appears that can be decoded, from where its sound is counted too.

    None for sound alone. What was cut out of a longer recording may start with frames that need others before them.
    """
    import av

    # a cover picture has no time
    seen = [
        n
        for n, one in enumerate(container.streams.video)
        if not int(one.disposition) & 0x400 and one.start_time is not None
    ]
    if not seen:
        return None
    place = None if isinstance(file, io.FileIO) else file.tell()
    file.seek(0)
    with av.open(_nameless(file)) as again:  # whose packets may be gone through
        stream = again.streams.video[seen[0]]
        begin = stream.start_time
        for number, packet in enumerate(again.demux(stream)):
            if packet.is_discard:
                break  # an edit list has said where it starts
            if packet.is_keyframe and packet.pts is not None:
                # in H.264 and HEVC what is shown before the first key needs others, elsewhere it may do without
                if number or stream.codec_context.name in ("h264", "hevc"):
                    begin = max(begin, packet.pts)
                break
        seconds = float(begin * stream.time_base)
    if place is not None:
        file.seek(place)
    return seconds


def _pyav_reason(error: Exception, decoded: int, tried: str) -> str:
    said = getattr(error, "strerror", None) or str(error)
    if decoded:
        return f"damaged or cut off: {said} (after {decoded} samples)"
    return f"not a sound file that can be read (soundfile: {tried.rstrip('.')}; PyAV: {said})"


def _nameless(file: BinaryIO | io.FileIO) -> Any:
    """The same bytes without a file's name, whose suffix FFmpeg would go by."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if isinstance(file, io.FileIO) else file


def _frames(duration: float | None, rate: int) -> int | None:
    return None if duration is None else max(1, round(duration * rate))


def _outside(name: str, start: float, seconds: float) -> BadClip:
    return BadClip(name, f"the segment starts at {start:g} s, but the file ends at {seconds:g} s")


def _check_segment(name: str, start: float, duration: float | None, got: float) -> None:
    if duration is not None and got < duration - _SLACK:
        raise BadClip(name, f"the segment of {duration:g} s from {start:g} s on ends after {got:g} s, with the file")
