from __future__ import annotations

import cmath
import math

import pytest
import torch

from mmssl.modalities.speech.cqt import LOWEST, OCTAVES, PER_OCTAVE, cqt, kernels, n_bins, pitches
from mmssl.modalities.speech.logmel import LogMel
from mmssl.modalities.speech.targets import TARGETS
from mmssl.types import Raw, Tokens

RATE, HOP, SPAN = 8000, 160, 200
Q = 1 / (2 ** (1 / 48) - 1)


def tokens_of(raw: Raw) -> Tokens:
    lengths = (raw.lengths - SPAN) // HOP + 1
    size = int(lengths.max())
    coords = torch.arange(size)[None, :, None].expand(len(raw), -1, -1)
    x = torch.zeros(len(raw), size, 2)
    return Tokens(x, lengths, coords, ("t",), (size,), step_ms=1000 * HOP / raw.rate, span_ms=1000 * SPAN / raw.rate)


def raw_of(*waves: torch.Tensor, rate: float = RATE) -> Raw:
    data = torch.nn.utils.rnn.pad_sequence(list(waves), batch_first=True)
    return Raw(data, torch.tensor([len(wave) for wave in waves]), [str(i) for i in range(len(waves))], rate)


def tone(hertz: float, samples: int, amplitude: float = 1.0) -> torch.Tensor:
    return amplitude * torch.sin(2 * math.pi * hertz * torch.arange(samples, dtype=torch.float64) / RATE).float()


def noise(samples: int, seed: int) -> torch.Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def test_there_are_48_bins_in_each_of_seven_octaves_below_half_the_rate() -> None:
    assert n_bins(24_000) == OCTAVES * PER_OCTAVE == 336
    pitch = pitches(24_000)
    assert pitch[0] == LOWEST
    torch.testing.assert_close(pitch[48:], 2 * pitch[:-48])
    # the band of the last bin of 8 kHz ends below 4 kHz, and that of the next one does not
    assert pitches(RATE)[-1] * (1 + 2 / Q) <= 4000 < pitches(RATE)[-1] * 2 ** (1 / 48) * (1 + 2 / Q)
    assert [kernel.shape[1] // 2 for kernel in kernels(RATE, torch.device("cpu"))] == [48] * 6 + [43]


@pytest.mark.parametrize("place", [60, 108, 156, 301])
def test_a_tone_is_in_the_bin_of_its_pitch_by_half_its_amplitude(place: int) -> None:
    """Four octaves of one note among them, 48 bins apart."""
    hertz = LOWEST * 2 ** (place / 48)
    raw = raw_of(tone(hertz, 3 * RATE, amplitude=0.6))
    middle = cqt(raw, tokens_of(raw))[0, 70:80]
    assert (middle.argmax(1) == place).all()
    expected = 0.3 * math.sqrt(Q * RATE / hertz)
    torch.testing.assert_close(middle[:, place], torch.full((10,), expected), rtol=1e-3, atol=0)
    # further than two bins away a Hann window lets hardly anything through
    assert middle[:, : place - 5].max() < 0.02 * expected


def test_every_value_is_the_definitions_sum_over_a_window() -> None:
    wave = noise(1000, 0)
    raw = raw_of(wave)
    found = cqt(raw, tokens_of(raw))[0]
    for frame, place in ((0, 330), (2, 250), (3, 120), (5, 30)):
        hertz = LOWEST * 2 ** (place / 48)
        width = Q * RATE / hertz
        middle = frame * HOP + SPAN // 2
        total, weights = 0j, 0.0
        for time in range(-math.floor(width / 2), math.floor(width / 2) + 1):
            weight = 0.5 + 0.5 * math.cos(2 * math.pi * time / width)
            weights += weight
            if 0 <= middle + time < len(wave):
                total += weight * float(wave[middle + time]) * cmath.exp(-2j * math.pi * hertz * time / RATE)
        assert float(found[frame, place]) == pytest.approx(math.sqrt(width) * abs(total) / weights, rel=1e-4)


def test_a_click_is_loudest_in_the_frame_of_the_token_in_whose_middle_it_is() -> None:
    wave = torch.zeros(4000)
    wave[7 * HOP + SPAN // 2] = 1.0
    raw = raw_of(wave)
    high = cqt(raw, tokens_of(raw))[0, :, -10:].sum(1)
    assert high.argmax() == 7
    assert high[6] == pytest.approx(float(high[8]), rel=1e-4)


def test_a_clip_has_the_same_frames_alone_and_padded_with_garbage() -> None:
    waves = [noise(6000, 1), noise(1500, 2), noise(SPAN, 3)]
    raw = raw_of(*waves)
    raw.data[1, 1500:] = torch.nan
    raw.data[2, SPAN:] = 50.0
    together = cqt(raw, tokens_of(raw))
    for row, wave in enumerate(waves):
        alone = raw_of(wave)
        frames = cqt(alone, tokens_of(alone))[0]
        assert torch.equal(together[row, : len(frames)], frames)
        assert not together[row, len(frames) :].any()


def test_long_clips_are_worked_on_in_pieces_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = raw_of(noise(3000, 4))
    whole = cqt(raw, tokens_of(raw))
    monkeypatch.setattr("mmssl.modalities.speech.cqt._PIECE", 5)
    torch.testing.assert_close(cqt(raw, tokens_of(raw)), whole)


def test_it_is_a_target_as_wide_as_the_rate_allows() -> None:
    raw = raw_of(noise(1000, 5))
    assert TARGETS["cqt"].dim(LogMel(dim=2, rate=RATE)) == TARGETS["cqt"].values(raw, tokens_of(raw)).shape[2] == 331
    assert not TARGETS["cqt"].learned


def test_sound_without_a_rate_is_refused() -> None:
    raw = raw_of(noise(1000, 6))
    with pytest.raises(ValueError, match="cqt: needs sound with a rate"):
        cqt(Raw(raw.data, raw.lengths, raw.ids), tokens_of(raw))
