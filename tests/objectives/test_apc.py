"""APC: each token predicts the one some steps later, and never sees it."""

import pytest
import torch

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.speech.logmel import LogMel
from mmssl.nn.positions import Convolutional, SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.apc import APC
from mmssl.types import Batch, Raw

DIM = 16


def encoder(*, causal=True, positions=None, normalize=False):
    torch.manual_seed(0)
    frontend = LogMel(dim=DIM, bands=10, window_ms=10, hop_ms=10, rate=2000, stack=1, normalize=normalize)
    return Encoder(frontend, Transformer(dim=DIM, depth=2, heads=2, causal=causal), positions or SinCos(DIM))


def features(raw, tokens):
    return tokens.feat


def build(**settings):
    return APC(encoder(), target=features, target_dim=10, **settings)


def clips(samples):
    data = torch.zeros(len(samples), max(samples))
    for row, n in enumerate(samples):
        data[row, :n] = torch.randn(n, generator=torch.Generator().manual_seed(row))
    raw = Raw(data, torch.tensor(samples), [str(i) for i in range(len(samples))], 2000.0)
    return Batch({"speech": raw}, torch.arange(len(samples)))


def test_the_loss_of_predicting_zero_is_the_mean_size_of_what_comes_later():
    model = build(ahead=3)
    torch.nn.init.zeros_(model.predict.weight)
    batch = clips([200, 120, 60])  # 10, 6 and 3 frames of 20 samples: the last has nothing 3 steps ahead
    feat = model.encoder.tokens(batch.raw).feat
    loss = model(batch)
    assert loss.count == 7 + 3
    later = torch.cat([feat[0, 3:10], feat[1, 3:6]])
    assert loss.total.item() == pytest.approx(later.abs().mean(1).sum().item(), rel=1e-5)
    value, count = loss.metrics["repeat"]
    before = torch.cat([feat[0, :7], feat[1, :3]])
    assert count == 10
    assert float(value) == pytest.approx((later - before).abs().mean(1).sum().item(), rel=1e-5)
    value, _ = loss.metrics["chance"]
    assert float(value) == pytest.approx(10 * (later - later.mean(0)).abs().mean().item(), rel=1e-5)


def test_steps_go_down_the_rows_of_a_picture():
    """The target is each patch's own row and column: two rows further down, in the same column."""
    net = Encoder(
        Patches(dim=DIM, size=[2, 2], channels=1, mean=[0.5], std=[0.5]),
        Transformer(dim=DIM, depth=1, heads=2, causal=True),
        SinCos(DIM),
    )
    model = APC(net, target=lambda raw, tokens: tokens.coords.float(), target_dim=2, ahead=2)
    torch.nn.init.zeros_(model.predict.weight)
    raw = Raw(torch.rand(1, 1, 8, 6), torch.ones(1, dtype=torch.int64), ["a"])  # four rows of three patches
    loss = model(Batch({"image": raw}, torch.arange(1)))
    assert loss.count == 6
    # rows 2 and 3, columns 0 to 2, each mean over both numbers: (2 + 0) / 2 ... (3 + 2) / 2
    assert loss.total.item() == pytest.approx((3 * 2 + 3 + 3 * 3 + 3) / 2)
    assert float(loss.metrics["repeat"][0]) == pytest.approx(6 * 2 / 2)


def test_nothing_that_is_predicted_is_seen():
    model = build(ahead=1)
    batch = clips([200])
    wave = batch.raw.data.requires_grad_()
    tokens = model.encoder.tokens(Raw(wave, batch.raw.lengths, batch.raw.ids, 2000.0))
    encoded = model.encoder(tokens).tokens
    for token in (0, 4):
        (grad,) = torch.autograd.grad(encoded[0, token].square().sum(), wave, retain_graph=True)
        end = 20 * (token + 1)  # a frame is 20 samples, without overlap
        assert grad[0, :end].any()
        assert not grad[0, end:].any()


def test_it_learns_what_can_be_foreseen():
    """Two sounds in turn: the one after next is the present one, so the next must be learnt and cannot be repeated."""
    time = torch.arange(800)
    wave = torch.sin(2 * torch.pi * time * torch.where(time // 20 % 2 == 0, 0.1, 0.35))
    batch = Batch({"speech": Raw(wave[None], torch.tensor([800]), ["a"], 2000.0)}, torch.arange(1))
    model = build(ahead=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(batch)
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
    found = {name: float(value) / n for name, (value, n) in loss.metrics.items()}
    assert found["loss"] < 0.5 * found["chance"] < 0.5 * found["repeat"]


def test_clips_with_nothing_ahead_give_zero_and_still_a_graph():
    loss = build(ahead=5)(clips([60, 40]))
    assert loss.count == 0
    assert loss.total.item() == 0.0
    loss.total.backward()


def test_an_encoder_that_sees_what_is_to_come_is_refused():
    with pytest.raises(ValueError, match="transformer.causal=false: APC predicts tokens to come"):
        APC(encoder(causal=False), target=features, target_dim=10)
    with pytest.raises(ValueError, match="positions: Convolutional reads tokens to come"):
        APC(encoder(positions=Convolutional(DIM, kernel=4, groups=2)), target=features, target_dim=10)


def test_learned_targets_and_the_present_are_refused():
    with pytest.raises(ValueError, match="LogMel learns what it measures"):
        build(target_learned=True)
    with pytest.raises(ValueError, match="objective.ahead=0"):
        build(ahead=0)
