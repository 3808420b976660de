"""Every file gives the sound that is in it, or one sentence."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mmssl.modalities.speech.reader import probe, read, resample
from mmssl.types import BadClip

RATE = 16000


def tone(seconds: float, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


# name -> (settings of soundfile, or of PyAV where it writes no such files; how far off samples may be, away from the
# ends, where codecs are inexact): a new format is a new line
FORMATS: dict[str, tuple[dict[str, str], float]] = {
    "pcm_16.wav": ({}, 1e-4),
    "pcm_24.wav": ({"subtype": "PCM_24"}, 1e-4),
    "float.wav": ({"subtype": "FLOAT"}, 1e-4),
    "gsm.wav": ({"subtype": "GSM610"}, 0.1),
    "a.flac": ({}, 1e-4),
    "a.aiff": ({}, 1e-4),
    "a.au": ({}, 1e-4),
    "a.caf": ({}, 1e-4),
    "a.mp3": ({}, 0.05),
    "vorbis.ogg": ({"subtype": "VORBIS"}, 0.05),
    "opus.ogg": ({"subtype": "OPUS"}, 0.05),
    "a.opus": ({"subtype": "OPUS", "format": "OGG"}, 0.05),
    "a.oga": ({"subtype": "VORBIS", "format": "OGG"}, 0.05),
    "a.m4a": ({"container": "ipod"}, 0.05),
    "a.mka": ({"container": "matroska"}, 0.05),
    "sound_of.mp4": ({"container": "mp4"}, 0.05),
    "a.aac": ({"container": "adts"}, 0.05),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, wave: np.ndarray, rate: int = RATE, **settings: str) -> Path:
        if "container" in settings:
            return write_aac(tmp_path / name, wave, rate, **settings)
        soundfile.write(tmp_path / name, wave, rate, **settings)
        return tmp_path / name

    return write


def write_aac(
    path: Path, wave: np.ndarray, rate: int = RATE, *, container: str = "ipod", codec: str = "aac", size: int = 1024
) -> Path:
    import av

    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        for start in range(0, len(wave), size):
            part = wave[None, start : start + size]
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, start
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_sound(write: Callable[..., Path], name: str) -> None:
    settings, off = FORMATS[name]
    wave = tone(1.0)
    path = write(name, wave, **settings)
    got = read(path, rate=RATE)
    assert got.dtype == torch.float32
    # bare AAC does not say that a block before the sound is its encoder's; it and GSM fill up their last block
    before = 1024 if name == "a.aac" else 0
    assert 0 <= len(got) - before - RATE < (1024 if "container" in settings or name == "gsm.wav" else 1)
    assert np.abs(got.numpy()[before : before + RATE] - wave)[2000:14000].max() < off
    assert probe(path)["seconds"] == len(got) / RATE


def test_what_soundfile_cannot_read_is_read_by_pyav(tmp_path: Path) -> None:
    wave = tone(1.0)
    path = write_aac(tmp_path / "a.m4a", wave)
    got = read(path, rate=RATE).numpy()
    assert np.abs(got[4000:12000] - wave[4000:12000]).max() < 0.05
    assert probe(path)["seconds"] == len(got) / RATE
    assert np.array_equal(read(path, rate=RATE, start=0.125, duration=0.25), got[2000:6000])
    assert np.array_equal(read(io.BytesIO(path.read_bytes()), rate=RATE), got)


def test_dolby_sound_is_read(tmp_path: Path) -> None:
    path = write_aac(tmp_path / "a.ac3", tone(1.0, 48000), 48000, container="ac3", codec="ac3", size=1536)
    got = read(path, rate=48000).numpy()
    # its coder is late by a block of 256
    assert np.abs(got[256:40000] - tone(1.0, 48000)[: 40000 - 256])[2000:].max() < 0.05
    assert probe(path)["seconds"] == len(got) / 48000


def test_the_content_decides_and_not_the_suffix(write: Callable[..., Path], tmp_path: Path) -> None:
    right = write("a.flac", tone(0.1))
    for name in ("flac.mp3", "flac.raw", "flac.m4a", "flac"):
        wrong = tmp_path / name
        wrong.write_bytes(right.read_bytes())
        assert torch.equal(read(wrong, rate=RATE), read(right, rate=RATE))
    m4a = write_aac(tmp_path / "a.m4a", tone(0.1))
    m4a.rename(tmp_path / "m4a.wav")
    assert len(read(tmp_path / "m4a.wav", rate=RATE)) > 1000


def test_a_file_in_memory_gives_the_same_as_on_disk(write: Callable[..., Path]) -> None:
    path = write("a.wav", tone(0.1))
    with open(path, "rb") as file:
        file.read(10)  # wherever it stands
        assert torch.equal(read(file, rate=RATE), read(path, rate=RATE))
    assert torch.equal(read(io.BytesIO(path.read_bytes()), rate=RATE), read(path, rate=RATE))


def test_channels_are_averaged(write: Callable[..., Path]) -> None:
    waves = np.stack([np.full(100, value, np.float32) for value in (0.1, 0.2, 0.3, 0.4, -0.1, -0.2, -0.3, 0.4)], axis=1)
    path = write("a.wav", waves, subtype="FLOAT")
    assert read(path, rate=RATE) == pytest.approx(np.full(100, 0.1), abs=1e-6)
    assert probe(path) == {"seconds": 100 / RATE, "rate": RATE, "channels": 8}


@pytest.mark.parametrize(("old", "count"), [(8000, 4001), (44100, 22051), (96000, 48005), (44101, 1234), (RATE, 77)])
def test_resampling_keeps_the_tone_and_gives_ceil_of_the_length(old: int, count: int) -> None:
    wave = tone(1.0, old)[:count]
    got = resample(wave, old, RATE)
    assert len(got) == math.ceil(count * RATE / old)
    assert got.dtype == np.float32
    want = tone(1.0)[: len(got)]
    edge = 200  # the filter reaches into the silence around the clip
    assert np.abs(got - want)[edge : len(got) - edge].max(initial=0.0) < 2e-3


def test_a_96_khz_file_is_resampled(write: Callable[..., Path]) -> None:
    assert len(read(write("a.wav", tone(0.25, 96000), 96000), rate=RATE)) == 4000


@pytest.mark.parametrize("rate", [RATE, 8000, 96000])
def test_a_clip_of_one_sample_is_one_sample_or_what_that_is_at_the_rate(write: Callable[..., Path], rate: int) -> None:
    got = read(write("a.wav", np.full(1, 0.5, np.float32), rate), rate=RATE)
    assert len(got) == math.ceil(RATE / rate)
    assert got.isfinite().all()


def test_silence_stays_silence(write: Callable[..., Path]) -> None:
    assert not read(write("a.wav", np.zeros(800, np.float32), 8000), rate=RATE).any()


@pytest.mark.parametrize("name", FORMATS)
def test_a_segment_is_that_part_of_the_whole(write: Callable[..., Path], name: str) -> None:
    # at 48 kHz libsndfile seeks wrongly in every MP3 and in some Ogg Vorbis
    rate = 48000
    path = write(name, tone(2.0, rate) * np.linspace(0, 1, 2 * rate, dtype=np.float32), rate, **FORMATS[name][0])
    whole = read(path, rate=rate)
    for start in (0.013, 0.25, 1.1):
        first = round(start * rate)
        assert torch.equal(read(path, rate=rate, start=start, duration=0.5), whole[first : first + 24000])
        assert torch.equal(read(path, rate=rate, start=start), whole[first:])


@pytest.mark.parametrize("name", FORMATS)
def test_a_span_is_that_part_of_the_segment_that_it_is_drawn_from(write: Callable[..., Path], name: str) -> None:
    rate = 48000
    path = write(name, tone(2.0, rate) * np.linspace(0, 1, 2 * rate, dtype=np.float32), rate, **FORMATS[name][0])
    told: list[float] = []

    def span(seconds: float) -> tuple[float, float]:
        told.append(seconds)
        return 0.3 * seconds, 0.4

    for segment in ({}, {"start": 0.5}, {"start": 0.25, "duration": 1.5}):
        for wanted in (RATE, rate):
            wave = read(path, rate=rate, **segment).numpy()
            first = round(0.3 * len(wave))
            want = resample(wave[first : first + 19200], rate, wanted)
            got = read(path, rate=wanted, span=span, **segment)
            assert told.pop() == len(wave) / rate
            assert np.abs(got.numpy() - want).max() < 1e-6
    with pytest.raises(BadClip, match=r"segment of 3 s from 0.25 s on ends after 1\.\d"):
        read(path, rate=RATE, start=0.25, duration=3.0, span=span)


@pytest.mark.parametrize("name", ["pcm_16.wav", "a.flac", "a.aiff", "a.au", "a.caf", "a.opus"])
def test_no_more_is_decoded_than_the_segment_or_span(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = write(name, np.tile(tone(1.0), 20), **FORMATS[name][0])
    decoded: list[int] = []
    read_into = soundfile.SoundFile.buffer_read_into

    def counted(self: soundfile.SoundFile, block: np.ndarray, dtype: str) -> int:
        decoded.append(len(block))
        return int(read_into(self, block, dtype))

    monkeypatch.setattr(soundfile.SoundFile, "buffer_read_into", counted)
    assert len(read(path, rate=RATE, start=15.0, duration=0.5)) == RATE // 2
    assert len(read(path, rate=RATE, span=lambda seconds: (seconds - 1.0, 0.5))) == RATE // 2
    assert sum(decoded) < 3 * RATE


@pytest.mark.parametrize("channels", [1, 2])
def test_a_place_in_opus_is_where_the_whole_has_it(write: Callable[..., Path], channels: int) -> None:
    """Over many pages, with steps in loudness, which its decoder remembers."""
    draw = np.random.default_rng(0)
    loud = draw.uniform(0.0, 1.0, 300).repeat(1600).astype(np.float32)
    wave = np.stack([np.tile(tone(1.0, hertz=440.0 * (1 + i)), 30) * loud for i in range(channels)], axis=1)
    path = write("a.opus", wave + 0.1 * draw.standard_normal(wave.shape).astype(np.float32), **FORMATS["a.opus"][0])
    whole = read(path, rate=RATE)
    for first in draw.integers(1, len(whole) - 800, 30).tolist():
        part = read(path, rate=RATE, start=first / RATE, duration=0.05)
        assert float((part - whole[first : first + 800]).abs().max()) < 1e-6


def test_a_long_mp3_has_no_rubbish_where_blocks_meet(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmssl.modalities.speech.reader._BLOCK", 5000)
    wave = tone(1.0, 48000)
    got = read(write("a.mp3", wave, 48000), rate=48000).numpy()
    assert np.abs(got - wave)[2000:46000].max() < 0.05


def test_a_segment_outside_of_the_file_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    for path in (write("a.wav", tone(0.5)), write("a.flac", tone(0.5)), write_aac(tmp_path / "a.m4a", tone(0.5))):
        with pytest.raises(BadClip, match="segment starts at 2 s, but the file ends at 0.5"):
            read(path, rate=RATE, start=2.0)
        with pytest.raises(BadClip, match=r"segment of 1 s from 0.25 s on ends after 0.2"):
            read(path, rate=RATE, start=0.25, duration=1.0)
        with pytest.raises(BadClip, match="is none"):
            read(path, rate=RATE, start=-1.0)


def test_blocks_of_a_long_file_join_without_a_seam(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a.flac", np.stack([tone(0.5), tone(0.5)], axis=1))
    whole = read(path, rate=RATE)
    monkeypatch.setattr("mmssl.modalities.speech.reader._BLOCK", 1000)
    assert torch.equal(read(path, rate=RATE), whole)
    assert torch.equal(read(path, rate=RATE, start=0.1, duration=0.3), whole[1600:6400])


def test_what_was_cut_off_gives_what_is_there_or_one_sentence(write: Callable[..., Path], tmp_path: Path) -> None:
    wave = tone(6.0) + np.random.default_rng(0).uniform(-0.1, 0.1, 6 * RATE).astype(np.float32)

    def cut(path: Path) -> Path:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        return path

    for path in (cut(write("a.wav", wave)), cut(write("a.mp3", wave)), cut(write("a.ogg", wave))):
        got = read(path, rate=RATE)
        assert 0.3 * len(wave) < len(got) < 0.7 * len(wave)
        assert probe(path)["seconds"] == len(got) / RATE  # the header of the mp3 still promises all of it
    assert probe(tmp_path / "a.wav")["remark"] == "ends after 2.999 s, where its header states 6.000 s"
    flac = cut(write("a.flac", wave))
    m4a = cut(write_aac(tmp_path / "a.m4a", wave))
    for path, reason in ((flac, "damaged or cut off"), (m4a, "not a sound file that can be read")):
        for function in (probe, lambda path: read(path, rate=RATE)):
            with pytest.raises(BadClip, match=f"{path.name}: {reason}"):
                function(path)


@pytest.mark.parametrize("behind", [bytes(5000), b"LYRICSBEGIN" + b"la " * 9 + b"000038LYRICS200TAG".ljust(143, b"\0")])
def test_what_stands_behind_the_last_frame_of_an_mp3_is_no_damage(write: Callable[..., Path], behind: bytes) -> None:
    path = write("a.mp3", tone(2.0))
    whole = read(path, rate=RATE)
    path.write_bytes(path.read_bytes() + behind)
    assert torch.equal(read(path, rate=RATE)[: len(whole)], whole)
    assert probe(path)["seconds"] == pytest.approx(len(whole) / RATE, abs=0.05)


def test_an_mp3_with_a_hole_is_refused(write: Callable[..., Path]) -> None:
    path = write("a.mp3", tone(4.0))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 800] = bytes(800)
    path.write_bytes(content)
    with pytest.raises(BadClip, match="damaged or cut off: Invalid data"):
        read(path, rate=RATE)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_files_one_after_the_other_are_read_to_their_end(write: Callable[..., Path], subtype: str) -> None:
    first = write("a.ogg", tone(1.0, hertz=440.0), subtype=subtype)
    second = write("b.ogg", tone(2.0, hertz=880.0), subtype=subtype)
    joined = first.with_name("joined.ogg")
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    wave = read(joined, rate=RATE)
    assert len(wave) == pytest.approx(3 * RATE, abs=0.05 * RATE)
    assert probe(joined)["seconds"] == pytest.approx(len(wave) / RATE)
    for start, hertz in ((0.2, 440), (2.0, 880)):
        part = read(joined, rate=RATE, start=start, duration=0.5).numpy()
        assert np.abs(np.fft.rfft(part)).argmax() * 2 == hertz


def test_a_header_is_not_believed(write: Callable[..., Path]) -> None:
    path = write("a.flac", tone(0.1))
    content = bytearray(path.read_bytes())
    # the last 36 of the 64 bits from byte 18 on are STREAMINFO's count of samples
    assert int.from_bytes(content[18:26]) & (1 << 36) - 1 == 1600
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])  # unknown, as an encoder in a pipe writes it
    path.write_bytes(content)
    assert len(read(path, rate=RATE)) == 1600
    assert len(read(path, rate=RATE, start=0.05)) == 800
    assert probe(path)["seconds"] == 0.1
    content[21:26] = bytes([content[21] | 0x0F, 255, 255, 255, 255])  # 68 billion, 275 GB
    path.write_bytes(content)
    with pytest.raises(BadClip, match="damaged or cut off"):
        read(path, rate=RATE)


@pytest.mark.parametrize("stated", [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_wav_whose_header_leaves_its_length_open_is_whole(write: Callable[..., Path], stated: int) -> None:
    path = write("a.wav", tone(0.1))
    content = path.read_bytes()
    place = content.index(b"data") + 4
    path.write_bytes(content[:place] + stated.to_bytes(4, "little") + content[place + 4 :])
    assert torch.equal(read(path, rate=RATE), read(io.BytesIO(content), rate=RATE))
    assert probe(path) == {"seconds": 0.1, "rate": RATE, "channels": 1}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinite_samples_are_named(write: Callable[..., Path], value: float) -> None:
    wave = tone(0.1)
    wave[[100, 200]] = value
    with pytest.raises(BadClip, match="2 of 1600 samples are NaN or infinite, the first is number 100"):
        read(write("a.wav", wave, subtype="FLOAT"), rate=RATE)


@pytest.mark.parametrize("name", ["a.wav G721_32", "a.wav NMS_ADPCM_32", "a.au G723_40"])
def test_telephone_codecs_that_know_no_places_are_read_whole_and_in_part(tmp_path: Path, name: str) -> None:
    path, wave = tmp_path / name.split()[0], tone(0.5)
    soundfile.write(path, wave, RATE, subtype=name.split()[1])
    whole = read(path, rate=RATE)
    # what differs in length is the codec's own block
    assert np.corrcoef(whole[: len(wave)].numpy(), wave[: len(whole)])[0, 1] > 0.98
    assert abs(len(whole) - 8000) < 300
    assert torch.equal(read(path, rate=RATE, start=0.1, duration=0.2), whole[1600:4800])


def test_a_header_with_hardly_a_sample_a_second_is_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(BadClip, match="its header says 1 samples a second; below 50 is no sound"):
        read(write("a.wav", tone(0.1), 1), rate=RATE)


def test_samples_too_large_for_the_resampler_are_a_bad_clip(write: Callable[..., Path]) -> None:
    loud = (tone(0.5, 8000) * 3e38).astype(np.float32)
    with pytest.raises(BadClip, match="too large to be resampled from 8000 to 16000 Hz"):
        read(write("a.wav", loud, 8000, subtype="FLOAT"), rate=RATE)


def test_what_is_no_sound_gets_one_sentence(tmp_path: Path, write: Callable[..., Path]) -> None:
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "page.wav").write_bytes(b"<html><body>404 not found</body></html>" * 20)
    (tmp_path / "zeros.wav").write_bytes(bytes(5000))
    (tmp_path / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(20000))
    write("none.wav", np.zeros(0, np.float32))
    sentences = {
        "missing.wav": "no such file or directory",
        ".": "is a directory",
        "empty.wav": "the file is empty",
        "page.wav": "not a sound file that can be read",
        "zeros.wav": "not a sound file that can be read",
        "noise.mp3": "not a sound file that can be read",
        "none.wav": "holds no samples",
    }
    for name, sentence in sentences.items():
        for function in (probe, lambda path: read(path, rate=RATE)):
            with pytest.raises(BadClip, match=sentence) as caught:
                function(tmp_path / name)
            assert caught.value.path == str(tmp_path / name)
            assert "\n" not in str(caught.value)
    with pytest.raises(BadClip, match="sound in memory: the file is empty"):
        read(io.BytesIO(), rate=RATE)


def test_a_picture_is_no_sound(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "a.jpg")
    with pytest.raises(BadClip, match="there is no sound in it|not a sound file"):
        read(tmp_path / "a.jpg", rate=RATE)
