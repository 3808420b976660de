"""TERA: what is altered, how often, and that the loss counts what it says."""

import pytest
import torch

from mmssl.encoder import Encoder
from mmssl.modalities.speech.frontend import Waveform
from mmssl.modalities.speech.logmel import LogMel
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.tera import TERA
from mmssl.types import Batch, Raw

DIM = 16


def build(**settings):
    torch.manual_seed(0)
    frontend = LogMel(dim=DIM, bands=10, window_ms=10, hop_ms=5, rate=2000, stack=settings.pop("stack", 2))
    return TERA(Encoder(frontend, Transformer(dim=DIM, depth=1, heads=2), SinCos(DIM)), **settings)


def clips(samples, first=0):
    data = torch.zeros(len(samples), max(samples))
    for row, n in enumerate(samples):
        data[row, :n] = torch.randn(n, generator=torch.Generator().manual_seed(first + row))
    seeds = torch.arange(len(samples)) + 100 + first
    return Batch({"speech": Raw(data, torch.tensor(samples), [str(i) for i in range(len(samples))], 2000.0)}, seeds)


def altered(model, clips=2000, frames=40, bands=10, value=None):
    """Many clips of frames that are all different, and what became of them."""
    shape = clips, frames, bands
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 1 if value is None else torch.full(shape, value)
    out, hidden = model.alter(x, torch.full((clips,), frames), torch.arange(clips))
    return x, out, hidden


def test_only_hidden_values_are_altered():
    x, out, hidden = altered(build(noise_prob=0.0))
    assert torch.equal(out[~hidden], x[~hidden])
    assert 0.1 < hidden.float().mean() < 0.4


def test_chosen_times_are_zeroed_replaced_or_kept_as_often_as_in_the_paper():
    x, out, hidden = altered(build(band_share=0.0, noise_prob=0.0))
    times = hidden[..., 0]
    assert torch.equal(hidden, times[..., None].expand_as(hidden))
    zeroed = torch.tensor([bool((out[i][times[i]] == 0).all()) for i in range(len(x))])
    kept = (out == x).flatten(1).all(1)
    replaced = ~zeroed & ~kept
    # of 2,000 clips; five deviations of a binomial are 90 and 67
    assert abs(zeroed.sum() - 1600) < 90
    assert abs(replaced.sum() - 200) < 67
    assert abs(kept.sum() - 200) < 67
    row = int(replaced.nonzero()[0])
    for time in times[row].nonzero()[:, 0]:
        assert any(torch.equal(out[row, time], other) for other in x[row])  # a frame of the same clip
        assert not torch.equal(out[row, time], x[row, time])


def test_bands_are_one_run_of_any_width_up_to_the_share():
    _, out, hidden = altered(build(time_prob=0.0, noise_prob=0.0, band_share=0.3))
    assert torch.equal(hidden, (out == 0))
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))  # the same bands at all times
    bands = hidden[:, 0]
    widths = bands.sum(1)
    counts = torch.bincount(widths)
    assert len(counts) == 4  # none to three of ten
    assert (counts - 500).abs().max() < 100  # five deviations of a binomial of 2,000 at 1/4
    edges = (bands[:, 1:] != bands[:, :-1]).sum(1) + bands[:, 0].long() + bands[:, -1].long()
    assert set(edges[widths > 0].tolist()) == {2}
    # runs of one band lie on each of the ten
    assert (bands[widths == 1].sum(0) > 0).all()


def test_noise_comes_to_some_clips_and_has_its_deviation():
    x, out, hidden = altered(build(noise_prob=0.25, noise_std=0.5, band_share=0.1, time_prob=0.0))
    change = (out - x).masked_fill(hidden, 0.0)
    noisy = change.flatten(1).any(1)
    assert abs(noisy.sum() - 500) < 97
    assert change[noisy][~hidden[noisy]].std().item() == pytest.approx(0.5, rel=0.02)


def test_what_is_altered_belongs_to_the_clip():
    model = build(noise_prob=1.0)
    x = torch.randn(3, 30, 10)
    lengths, seeds = torch.tensor([30, 12, 21]), torch.tensor([5, 6, 7])
    x[1, 12:] = x[2, 21:] = 0
    together, hidden = model.alter(x, lengths, seeds)
    for row, n in enumerate(lengths):
        alone, own = model.alter(x[row : row + 1, :n], lengths[row : row + 1], seeds[row : row + 1])
        assert torch.equal(together[row, :n], alone[0])
        assert torch.equal(hidden[row, :n], own[0])
        assert not together[row, n:].any()
        assert not hidden[row, n:].any()


def test_a_zeroed_value_never_reaches_the_encoder():
    model = build(noise_prob=0.0, band_share=0.3)
    x, out, hidden = altered(model, clips=50)
    gone = hidden & (out == 0)
    again, _ = model.alter(x.masked_fill(gone, 99.0), torch.full((50,), 40), torch.arange(50))
    zeroed = gone.flatten(1).sum(1) == hidden.flatten(1).sum(1)  # no clip whose frames were replaced or kept
    assert zeroed.sum() > 30
    assert torch.equal(again[zeroed], out[zeroed])


def test_the_loss_of_predicting_zero_is_the_mean_size_of_what_was_altered():
    model = build(noise_prob=0.0)
    torch.nn.init.zeros_(model.predict[-1].weight)
    batch = clips([400, 150, 90])
    feat = model.encoder.tokens(batch.raw).feat
    frames = feat.view(3, -1, 10)
    assert frames.shape[1] == 2 * feat.shape[1]  # two frames a token, taken apart
    lengths = 2 * model.encoder.frontend.lengths(batch.raw)
    _, hidden = model.alter(frames, lengths, batch.seeds)
    loss = model(batch)
    assert loss.count == hidden.sum()
    assert loss.total.item() == pytest.approx(frames[hidden].abs().sum().item(), rel=1e-5)
    found = {name: float(value) / n for name, (value, n) in loss.metrics.items()}
    assert found["prediction_std"] == 0
    assert found["target_std"] > 0.1


def test_chance_is_the_loss_of_the_mean_frame():
    model = build(stack=1)
    batch = clips([200])
    frames = model.encoder.tokens(batch.raw).feat[0]
    value, count = model(batch).metrics["chance"]
    assert float(value) / count == pytest.approx((frames - frames.mean(0)).abs().mean().item(), rel=1e-5)


def test_a_clip_of_one_token_gives_a_loss_with_a_graph():
    model = build(band_share=0.0)
    loss = model(clips([30]))
    loss.total.backward()
    assert torch.isfinite(loss.total)


def test_what_is_shown_is_what_was_measured_altered_and_predicted():
    model, batch = build(noise_prob=0.0), clips((300, 200))
    torch.nn.init.zeros_(model.predict[-1].weight)
    shown = model.reconstruct(batch)
    assert list(shown) == ["input", "altered", "reconstruction", "note"]
    first, altered, made = (shown[name] for name in ("input", "altered", "reconstruction"))
    tokens = model.encoder.tokens(batch.raw)
    frames = 2 * tokens.lengths
    assert first.shape == (2, 1, 10, int(frames[0]))
    # each from its own least to its own largest value, and nothing past the end
    for row in range(2):
        own = first[row, 0, :, : int(frames[row])]
        assert (float(own.min()), float(own.max())) == (0.0, 1.0)
        # zero is predicted everywhere, which a clip brought to mean 0 has in one place of its range
        assert made[row, 0, :, : int(frames[row])].unique().numel() == 1
    for x in (first, altered, made):
        assert (x[1, 0, :, int(frames[1]) :] == 0).all()
    # the lowest band is the last row, the first frame the first column
    measured = tokens.feat[0].unflatten(1, (-1, 10)).flatten(0, 1)
    low, high = measured.min(), measured.max()
    torch.testing.assert_close(first[0, 0, -1, 0], (measured[0, 0] - low) / (high - low))
    assert 0 < float((altered != first).float().mean()) < 0.6
    assert model.training
    with pytest.raises(ValueError, match="masked is given, and tera draws what it alters"):
        model.reconstruct(batch, masked=torch.zeros(2, 3, dtype=torch.bool))


def test_what_cannot_be_altered_is_refused():
    wave = Encoder(
        Waveform(dim=DIM, layers=[[8, 10, 5]], rate=2000), Transformer(dim=DIM, depth=1, heads=2), SinCos(DIM)
    )
    with pytest.raises(ValueError, match="Waveform makes no tokens of whole frames; choose frontend logmel"):
        TERA(wave)
    with pytest.raises(ValueError, match="nothing is left to reconstruct"):
        build(time_prob=0.0, band_share=0.0)
    with pytest.raises(ValueError, match="band_share=1.5"):
        build(band_share=1.5)
