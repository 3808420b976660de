import pytest
import torch

from mmssl.modalities.speech.mfcc import MFCC, _slopes


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    white = torch.randn(samples, generator=torch.Generator().manual_seed(seed))
    return 0.1 * white + 0.002 * white.cumsum(0)


@pytest.mark.parametrize("rate", [16_000, 8_000])
def test_they_are_torchaudios_which_are_kaldis(rate: int) -> None:
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi", exc_type=ImportError)
    from torchaudio.functional import compute_deltas

    wave = noise(5000)
    plain = kaldi.mfcc(wave[None], sample_frequency=rate, use_energy=False).t()
    first = compute_deltas(plain)
    wanted = torch.cat([plain, first, compute_deltas(first)]).t()
    [found] = MFCC(rate=rate)(wave[None], torch.tensor([5000]))
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 2e-3 * wanted.abs().max()


def test_a_clip_alone_equals_the_same_clip_beside_a_longer_one() -> None:
    mfcc = MFCC(rate=8000)
    short, long = noise(1500), noise(4000, seed=1)
    both = torch.full((2, 4000), torch.nan)
    both[0, :1500], both[1] = short, long
    found = mfcc(both, torch.tensor([1500, 4000]))
    [alone] = mfcc(short[None], torch.tensor([1500]))
    assert torch.equal(found[0, : len(alone)], alone)
    assert not found[0, len(alone) :].any()
    assert found.isfinite().all()


def test_slopes_of_a_ramp_are_its_step_by_hand() -> None:
    """At the edges, where the clip goes on as it is: (2 * (2 - 0) + (1 - 0)) / 10 steps of 3."""
    ramp = 3.0 * torch.arange(6.0)[:, None]
    torch.testing.assert_close(_slopes(ramp)[:, 0], torch.tensor([1.5, 2.4, 3.0, 3.0, 2.4, 1.5]))
    assert not _slopes(torch.full((1, 2), 7.0)).any()
