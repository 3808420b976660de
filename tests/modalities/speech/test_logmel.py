"""The log-mel frontend: torch's own short-time transform, stacked and normalized over real frames."""

import pytest
import torch

from mmssl.modalities.speech.logmel import LogMel
from mmssl.modalities.speech.targets import FLOOR, mel_bank
from mmssl.types import Raw


def clip(*waves, rate=8000.0):
    data = torch.nn.utils.rnn.pad_sequence(list(waves), batch_first=True)
    return Raw(data, torch.tensor([len(w) for w in waves]), [f"clip{i}" for i in range(len(waves))], rate)


def test_features_are_those_of_torchs_short_time_transform():
    torch.manual_seed(0)
    wave = torch.randn(1000)
    frontend = LogMel(dim=4, bands=10, rate=8000, normalize=False)
    fft, bank = mel_bank(8000, 200, 10)
    # 25 and 10 ms are 200 and 80 samples, and (1000 - 200) // 80 + 1 = 11 frames make 5 pairs
    frames = torch.stack([wave[80 * i : 80 * i + 200] for i in range(10)])
    power = torch.fft.rfft(frames * torch.hann_window(200), n=fft).abs() ** 2
    expected = (power @ bank + FLOOR).log().view(5, 20)
    tokens = frontend(clip(wave))
    assert tokens.lengths.tolist() == [5]
    assert torch.allclose(tokens.feat[0], expected, atol=1e-4)
    assert torch.allclose(tokens.x[0], frontend.project(expected), atol=1e-4)
    assert tokens.step_ms == 20


def test_a_clip_is_normalized_over_its_own_bands_and_frames_together():
    torch.manual_seed(0)
    waves = torch.randn(4000), 3 * torch.randn(1500)
    tokens = LogMel(dim=4, bands=10, rate=8000)(clip(*waves))
    for row, n in enumerate(tokens.lengths):
        energies = tokens.feat[row, :n]
        assert energies.mean().abs() < 1e-4
        assert abs(float(energies.std(correction=0)) - 1) < 2e-3


def test_loudness_goes_and_the_spectrum_stays():
    frontend = LogMel(dim=4, bands=10, rate=8000)
    time = torch.arange(4000) / 8000
    low, high = torch.sin(2 * torch.pi * 300 * time), torch.sin(2 * torch.pi * 3000 * time)
    noise = 0.01 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    soft, loud, other = frontend(clip(low + noise, 8 * (low + noise), high + noise)).feat
    assert torch.allclose(soft, loud, atol=1e-3)
    # the tone's place on the mel axis is there in the clip's mean already
    assert soft.reshape(-1, 10).mean(0).argmax() < other.reshape(-1, 10).mean(0).argmax()


def test_lengths_are_the_valid_tokens_for_any_length():
    frontend = LogMel(dim=4, bands=10, rate=8000, stack=3)
    lengths = torch.randint(frontend.min_length, 4000, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    raw = clip(*(torch.ones(n) for n in lengths))
    tokens = frontend(raw)
    assert torch.equal(frontend.lengths(raw), tokens.valid.sum(1))
    assert int(tokens.lengths.min()) >= 1


def test_an_impulse_lights_up_the_tokens_over_it():
    frontend = LogMel(dim=4, bands=10, rate=8000, normalize=False)
    quiet = torch.zeros(4000)
    click = quiet.clone()
    click[80 * 20 + 50] = 1.0  # at place 130 of frame 19, near its middle, and at 50 of frame 20: tokens 9 and 10
    moved = (frontend(clip(click)).feat - frontend(clip(quiet)).feat).abs().amax(-1)[0]
    assert moved.nonzero()[:, 0].tolist() == [9, 10]
    assert moved.argmax() == 9


def test_a_clip_shorter_than_one_token_is_named():
    frontend = LogMel(dim=4, bands=10, rate=8000)
    with pytest.raises(ValueError, match=r"clip1: 279 samples are shorter than one token, 280"):
        frontend(clip(torch.zeros(400), torch.zeros(279)))


def test_silence_is_finite():
    assert LogMel(dim=4, bands=10, rate=8000)(clip(torch.zeros(800))).x.isfinite().all()
