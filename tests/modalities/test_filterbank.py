"""Our filterbank is torchaudio's, which is Kaldi's, for each option; and a clip's is its own in any batch."""

import math

import pytest
import torch

from mmssl.modalities.filterbank import FLOOR, Filterbank, triangles

PLAIN = {
    "bands": 128,
    "window_ms": 25.0,
    "hop_ms": 10.0,
    "window": "hanning",
    "low": 20.0,
    "high": 0.0,
    "preemphasis": 0.97,
    "rate": 16_000,
}
OPTIONS = [
    {},
    {"bands": 40},
    {"bands": 23, "low": 0.0},
    {"window_ms": 32.0, "hop_ms": 8.0},
    {"window_ms": 16.5, "hop_ms": 12.5},
    {"window": "povey"},
    {"window": "hamming"},
    {"window": "rectangular"},
    {"low": 50.0, "high": 7600.0},
    {"high": -400.0},
    {"preemphasis": 0.0},
    {"preemphasis": 0.5},
    {"rate": 8_000, "bands": 80},
    {"rate": 22_050},
    {"rate": 48_000, "bands": 64, "low": 50.0, "high": 14_000.0},
]


def noise(samples, seed=0):
    """Noise that is stronger at low pitch, on a constant offset, as recordings are."""
    white = torch.randn(samples, generator=torch.Generator().manual_seed(seed))
    return 0.1 * white + 0.02 * white.cumsum(0) / 10 + 0.2


def torchaudios(wave, settings):
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi", exc_type=ImportError)
    return kaldi.fbank(
        wave[None],
        num_mel_bins=settings["bands"],
        frame_length=settings["window_ms"],
        frame_shift=settings["hop_ms"],
        window_type=settings["window"],
        low_freq=settings["low"],
        high_freq=settings["high"],
        preemphasis_coefficient=settings["preemphasis"],
        sample_frequency=settings["rate"],
        dither=0.0,
    )


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_energies_are_torchaudios(option):
    settings = PLAIN | option
    wave = noise(settings["rate"] // 2)
    theirs = torchaudios(wave.double(), settings)
    lengths = torch.tensor([len(wave)])
    filterbank = Filterbank(**settings)
    # in float32 both round: a few of ten thousand bins are so weak beside their neighbors that it shows
    share = ((filterbank(wave[None], lengths)[0] - theirs).abs() < 1e-4).double().mean()
    assert share > 0.999
    assert ((torchaudios(wave, settings) - theirs).abs() < 1e-4).double().mean() > 0.999
    exact = filterbank.double()(wave.double()[None], lengths)[0]
    assert exact.shape == theirs.shape
    assert (exact - theirs).abs().max() < 1e-4


def test_a_click_in_silence_is_within_rounding_of_torchaudios():
    wave = torch.zeros(8000)
    wave[::500] = 0.5  # one in every frame or two, and none of its bins is weak
    ours = Filterbank(**PLAIN)(wave[None], torch.tensor([8000]))[0]
    assert (ours - torchaudios(wave, PLAIN)).abs().max() < 1e-4


def test_silence_is_kaldis_floor_and_a_constant_offset_is_silence():
    filterbank = Filterbank(**PLAIN)
    for wave in (torch.zeros(1, 4000), torch.full((1, 4000), 0.25)):
        assert torch.equal(filterbank(wave, torch.tensor([4000])), torch.full((1, 23, 128), math.log(FLOOR)))
    assert round(math.log(FLOOR), 4) == -15.9424  # as the papers' constants presume


@pytest.mark.parametrize("fill", [0.0, 3.0, torch.nan])
def test_a_clip_is_its_own_in_a_ragged_batch(fill):
    filterbank = Filterbank(**PLAIN)
    lengths = torch.tensor([8000, 400, 399, 5001, 170_000])
    waves = torch.full((5, 170_000), fill)
    for row, n in enumerate(lengths.tolist()):
        waves[row, :n] = noise(n, seed=row)
    together = filterbank(waves, lengths)
    assert filterbank.frames(lengths).tolist() == [48, 1, 0, 29, 1061]
    assert together.isfinite().all()
    for row, n in enumerate(lengths.tolist()):
        size = int(filterbank.frames(lengths[row]))
        if size:
            alone = filterbank(waves[row : row + 1, :n], lengths[row : row + 1])
            assert torch.allclose(together[row, :size], alone[0], atol=1e-5)
        assert (together[row, size:] == math.log(FLOOR)).all()


def test_filters_worked_by_hand():
    # Bands 1127 ln(1 + f / 700) apart: with low 0, high 700 and one band the peak lies at half of ln 2.
    bank = triangles(1400, 14, 1, high=700.0, sides="mel")[:, 0]
    mel = [math.log(1 + 100 * i / 700) / math.log(2) for i in range(8)]
    expected = [min(2 * x, 2 - 2 * x) for x in mel]
    assert torch.allclose(bank, torch.tensor(expected), atol=1e-5)
    # the same corners, 0, 700 (sqrt 2 - 1) and 700 Hz, with sides straight in Hz
    bank = triangles(1400, 14, 1, high=700.0, sides="hertz")[:, 0]
    peak = 700 * (math.sqrt(2) - 1)
    expected = [min(100 * i / peak, (700 - 100 * i) / (700 - peak)) for i in range(8)]
    assert torch.allclose(bank, torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"low": 9000.0}, "must lie between 0 and half the rate, 8000 Hz"),
        ({"high": 9000.0}, "must lie between 0 and half the rate"),
        ({"hop_ms": 0.01}, "make them longer"),
        ({"dither": -1.0}, "a deviation is at least 0"),
        ({"window": "hann"}, "choose one of hanning, povey, hamming, rectangular"),
    ],
)
def test_settings_that_make_no_sense_say_so(wrong, said):
    with pytest.raises(ValueError, match=said):
        Filterbank(**PLAIN | wrong)


def test_dither_is_noise_of_the_clips_own_seed_and_none_without():
    plain, dithered = Filterbank(**PLAIN), Filterbank(**PLAIN, dither=0.01)
    lengths, seeds = torch.tensor([8000, 4000]), torch.tensor([5, 6])
    waves = torch.zeros(2, 8000)
    assert torch.equal(dithered(waves, lengths), plain(waves, lengths))
    energies = dithered(waves, lengths, seeds)
    assert torch.equal(plain(waves, lengths, seeds), plain(waves, lengths))
    assert not waves.any()
    assert torch.equal(energies, dithered(waves, lengths, seeds))
    assert torch.allclose(energies[1, :23], dithered(waves[1:, :4000], lengths[1:], seeds[1:])[0], atol=1e-5)
    assert (energies[1, 23:] == math.log(FLOOR)).all()
    # the energy of such noise, in the band above the noise's own mean, by another generator
    other = 0.01 * torch.randn(1, 80_000, generator=torch.Generator().manual_seed(0))
    expected = plain(other, torch.tensor([80_000]))[0, :, 64:].mean()
    assert energies[0, :48, 64:].mean() == pytest.approx(float(expected), abs=0.1)
