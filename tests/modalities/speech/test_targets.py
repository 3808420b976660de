from __future__ import annotations

import math

import pytest
import torch

from mmssl.modalities.speech.targets import BANDS, FLOOR, TARGETS, log_mel, mel_bank, normalized_log_mel
from mmssl.types import Raw, Tokens

RATE, HOP, WIDTH = 16_000, 320, 400


def tokens_of(raw: Raw, step_ms: float | None = 20.0) -> Tokens:
    """As wav2vec 2.0's frontend cuts clips: one token for each whole window of 25 ms."""
    lengths = (raw.lengths - WIDTH) // HOP + 1
    size = int(lengths.max())
    return Tokens(
        x=torch.zeros(len(raw), size, 2),
        lengths=lengths,
        coords=torch.arange(size)[None, :, None].expand(len(raw), -1, -1),
        axes=("t",),
        grid=(size,),
        feat=torch.zeros(len(raw), size, 5),
        step_ms=step_ms,
    )


def waves(samples: list[int]) -> Raw:
    data = torch.zeros(len(samples), max(samples))
    generator = torch.Generator().manual_seed(0)
    for row, n in zip(data, samples, strict=True):
        row[:n] = 0.1 * torch.randn(n, generator=generator)
    return Raw(data, torch.tensor(samples), [str(n) for n in samples], rate=RATE)


def test_there_is_one_frame_for_each_token_as_wide_as_it_says() -> None:
    raw = waves([16_000, 4_000])
    values = log_mel(raw, tokens_of(raw))
    assert values.shape == (2, 49, BANDS)
    assert values.dtype == torch.float32
    assert TARGETS["log_mel"].dim(None) == BANDS
    assert (values[1, 12:] == 0).all()
    assert (values[1, :12] != 0).all()


@pytest.mark.parametrize("target", [log_mel, normalized_log_mel])
def test_a_clip_has_the_same_frames_alone_and_padded_with_garbage(target) -> None:
    raw = waves([9_000, 3_000, 401])
    together = target(raw, tokens_of(raw))
    raw.data[1, 3_000:] = torch.nan
    raw.data[2, 401:] = 50.0
    garbage = target(raw, tokens_of(raw))
    for i, n in enumerate([9_000, 3_000, 401]):
        alone = Raw(raw.data[i : i + 1, :n], torch.tensor([n]), ["x"], rate=RATE)
        frames = target(alone, tokens_of(alone))
        torch.testing.assert_close(together[i : i + 1, : frames.shape[1]], frames, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(garbage[i : i + 1, : frames.shape[1]], frames, rtol=1e-5, atol=1e-5)
    assert (garbage[2, 1:] == 0).all()


def test_a_tone_lights_up_the_band_whose_peak_it_stands_on() -> None:
    top = 2595 * math.log10(1 + 8000 / 700)
    for band in (5, 20, 35):
        peak = 700 * (10 ** (top * (band + 1) / (BANDS + 1) / 2595) - 1)
        wave = torch.sin(2 * math.pi * peak * torch.arange(2000) / RATE)[None]
        raw = Raw(wave, torch.tensor([2000]), ["tone"], rate=RATE)
        assert (log_mel(raw, tokens_of(raw))[0].argmax(-1) == band).all()


def test_frame_i_sees_the_samples_of_token_i_only() -> None:
    raw = waves([4_000])
    raw.data.zero_()
    raw.data[0, 1_300] = 1.0  # tokens 3 (960 to 1360) and 4 (1280 to 1680) read it, no other does
    loud = (log_mel(raw, tokens_of(raw))[0] > math.log(2 * FLOOR)).any(-1)
    assert loud.nonzero()[:, 0].tolist() == [3, 4]


def test_silence_is_the_floor() -> None:
    raw = waves([4_000])
    raw.data.zero_()
    torch.testing.assert_close(log_mel(raw, tokens_of(raw)), torch.full((1, 12, BANDS), math.log(FLOOR)))
    assert (normalized_log_mel(raw, tokens_of(raw)).abs() < 1e-3).all()


def test_normalized_bands_do_not_know_how_loud_the_clip_is() -> None:
    raw = waves([8_000])
    values = normalized_log_mel(raw, tokens_of(raw))
    torch.testing.assert_close(values.mean(1), torch.zeros(1, BANDS), rtol=0, atol=1e-4)
    torch.testing.assert_close(values.square().mean(1), torch.ones(1, BANDS), rtol=0, atol=0.01)
    louder = Raw(raw.data * 3, raw.lengths, raw.ids, rate=RATE)
    torch.testing.assert_close(normalized_log_mel(louder, tokens_of(louder)), values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rate", "bands"), [(8_000, 40), (16_000, 40), (16_000, 128), (44_100, 80)])
def test_no_band_is_empty(rate: int, bands: int) -> None:
    fft, bank = mel_bank(rate, rate // 40, bands)
    assert bank.shape == (fft // 2 + 1, bands)
    assert (bank.sum(0) > 0).all()
    assert float(bank.min()) >= 0
    assert float(bank.max()) <= 1


def test_sound_without_a_rate_is_refused() -> None:
    raw = waves([4_000])
    with pytest.raises(ValueError, match="needs sound with a rate"):
        log_mel(Raw(raw.data, raw.lengths, raw.ids), tokens_of(raw))


def test_features_of_the_frontend_are_named_as_learned() -> None:
    assert TARGETS["features"].learned
    assert not TARGETS["log_mel"].learned
    assert not TARGETS["normalized_log_mel"].learned
