"""NPC: a prediction sees around its frame and never the frame itself."""

import pytest
import torch

from mmssl.encoder import Encoder
from mmssl.modalities.audio.frontend import SpectrogramPatches
from mmssl.modalities.speech.logmel import LogMel
from mmssl.nn.positions import Convolutional, SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.npc import NPC, MaskedConv
from mmssl.types import Batch, Raw

DIM = 16


def features(raw, tokens):
    return tokens.feat


def encoder(*, window=1, depth=2, positions=None, prefix=0):
    torch.manual_seed(0)
    # frames without overlap, each of its own samples only
    frontend = LogMel(dim=DIM, bands=6, window_ms=10, hop_ms=10, rate=2000, stack=1, normalize=False)
    body = Transformer(dim=DIM, depth=depth, heads=2, window=window)
    return Encoder(frontend, body, positions or SinCos(DIM), prefix=prefix)


def build(body=None, **settings):
    return NPC(body or encoder(), **{"target": features, "target_dim": 6, "kernel": 11, "context_dim": 8, **settings})


def clips(samples):
    data = torch.zeros(len(samples), max(samples))
    for row, n in enumerate(samples):
        data[row, :n] = torch.randn(n, generator=torch.Generator().manual_seed(row))
    raw = Raw(data, torch.tensor(samples), [str(i) for i in range(len(samples))], 2000.0)
    return Batch({"speech": raw}, torch.arange(len(samples)))


def test_a_masked_convolution_is_a_sum_over_its_outer_taps():
    conv = MaskedConv(dim_in=1, dim=1, kernel=7, gap=1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]))  # of places -3, -2, 2 and 3
        x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
        out = conv(x[None, :, None])[0, :, 0]
    sums = [
        3 * 0.3 + 4 * 0.4,
        3 * 0.4 + 4 * 0.5,
        2 * 0.1 + 3 * 0.5 + 4 * 0.6,
        1 * 0.1 + 2 * 0.2 + 3 * 0.6,
        1 * 0.2 + 2 * 0.3,
        1 * 0.3 + 2 * 0.4,
    ]
    assert torch.allclose(out, torch.tensor(sums).tanh())


@pytest.mark.parametrize(("window", "depth", "hidden", "prefix"), [(1, 2, 1, 0), (1, 2, 0, 2), (2, 1, 1, 0)])
def test_a_prediction_sees_its_surroundings_and_neither_itself_nor_what_is_hidden(window, depth, hidden, prefix):
    model = build(encoder(window=window, depth=depth, prefix=prefix), hidden=hidden)
    batch = clips([600])
    frames = 30
    wave = batch.raw.data.requires_grad_()
    tokens = model.encoder.tokens(Raw(wave, batch.raw.lengths, batch.raw.ids, 2000.0))
    inner = range(1, depth)
    encoded = model.encoder(tokens, layers=inner)
    outputs = [encoded.layers[i][:, prefix:] for i in inner] + [encoded.tokens]
    context = sum(conv(h) for conv, h in zip(model.contexts, outputs, strict=True))
    (grad,) = torch.autograd.grad(context[0, 15].sum(), wave)
    seen = grad.view(frames, 20).abs().sum(1) > 0
    far = 5 + window * depth  # the kernel reaches 5 tokens, and the last block sees so much further
    assert seen.tolist() == [hidden < abs(frame - 15) <= far for frame in range(frames)]


def test_the_loss_of_predicting_zero_is_the_mean_size_of_the_frames():
    model = build()
    torch.nn.init.zeros_(model.predict.weight)
    batch = clips([200, 60])
    feat = model.encoder.tokens(batch.raw).feat
    loss = model(batch)
    assert loss.count == 10 + 3
    real = torch.cat([feat[0], feat[1, :3]])
    assert loss.total.item() == pytest.approx(real.abs().mean(1).sum().item(), rel=1e-5)
    value, count = loss.metrics["chance"]
    assert float(value) / count == pytest.approx((real - real.mean(0)).abs().mean().item(), rel=1e-5)


def test_what_would_show_a_frame_to_its_own_prediction_is_refused():
    with pytest.raises(ValueError, match="transformer.window: NPC hides a frame"):
        build(encoder(window=None))
    with pytest.raises(ValueError, match="positions: Convolutional reads the frames that NPC hides"):
        build(encoder(positions=Convolutional(DIM, kernel=4, groups=2)))
    with pytest.raises(ValueError, match="objective.kernel=7: an odd number of taps, of which 7 are left out"):
        build(kernel=7)  # two blocks of window 1 and one hidden token leave out 2 * 3 + 1
    with pytest.raises(ValueError, match="objective.kernel=10"):
        build(kernel=10)
    with pytest.raises(ValueError, match="LogMel learns what it measures"):
        build(target_learned=True)


def test_tokens_that_lie_on_more_than_time_are_refused():
    frontend = SpectrogramPatches(dim=DIM, size=[4, 4], bands=8, window_ms=10, hop_ms=5, rate=2000)
    with pytest.raises(ValueError, match="the tokens of SpectrogramPatches lie on t, f"):
        build(Encoder(frontend, Transformer(dim=DIM, depth=1, heads=2, window=1), SinCos(DIM)))
