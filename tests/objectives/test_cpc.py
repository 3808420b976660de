"""CPC and the first wav2vec: what each step is told from, and losses worked by hand."""

import math

import pytest
import torch

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.speech.frontend import Waveform
from mmssl.nn.contrast import contrast_ahead, draw_others
from mmssl.nn.positions import Convolutional, SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.cpc import CPC
from mmssl.objectives.wav2vec import Wav2Vec
from mmssl.types import Batch, Raw

DIM = 16


def encoder(*, causal=True, positions=None):
    torch.manual_seed(0)
    frontend = Waveform(dim=DIM, layers=[[8, 10, 5], [8, 4, 4]], normalize=False, rate=1000)
    return Encoder(frontend, Transformer(dim=DIM, depth=2, heads=2, causal=causal), positions or SinCos(DIM))


def build(kind, **settings):
    body = encoder()
    torch.manual_seed(1)
    return kind(body, **{"steps": 3, "negatives": 4, **settings})


def clips(samples, first=0):
    data = torch.zeros(len(samples), max(samples))
    for row, n in enumerate(samples):
        data[row, :n] = torch.randn(n, generator=torch.Generator().manual_seed(first + row))
    raw = Raw(data, torch.tensor(samples), [str(i) for i in range(len(samples))], 1000.0)
    return Batch({"speech": raw}, torch.arange(len(samples)) + 100 + first)


each = pytest.mark.parametrize("kind", [CPC, Wav2Vec])


def test_negatives_are_all_others_of_the_clip_equally_often_and_never_the_target_itself():
    lengths = torch.tensor([7, 1, 4])
    drawn = draw_others(lengths, 3000, torch.tensor([1, 2, 3]))
    assert drawn.shape == (3, 7, 3000)
    for row, n in ((0, 7), (2, 4)):
        for token in range(n):
            counts = torch.bincount(drawn[row, token], minlength=7)
            assert counts[token] == 0
            assert not counts[n:].any()
            expected = 3000 / (n - 1)
            others = counts[[other for other in range(n) if other != token]]
            # five deviations of a binomial
            assert (others - expected).abs().max() < 5 * math.sqrt(expected * (1 - 1 / (n - 1)))
    assert not drawn[1].any()


def test_negatives_belong_to_the_clip_and_differ_between_targets():
    together = draw_others(torch.tensor([9, 5]), 20, torch.tensor([3, 4]))
    assert torch.equal(draw_others(torch.tensor([5]), 20, torch.tensor([4]))[0], together[1, :5])
    assert not torch.equal(together[0, 0], together[0, 8])


def test_scores_ahead_are_worked_by_hand():
    prediction = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]], [[1.0, 1.0], [9.0, 9.0], [9.0, 9.0]]])
    target = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[7.0, 8.0], [9.0, 0.0], [0.0, 0.0]]])
    others = torch.tensor([[[1], [2], [0]], [[1], [0], [0]]])
    scores = contrast_ahead(prediction, target, others, torch.tensor([3, 2]), shift=1)
    # clip 0: token 0 against target 1, told from 2; token 1 against target 2, told from 0. Clip 1: token 0 against 1.
    expected = torch.tensor([[3.0, 5.0], [12.0, 4.0], [9.0, 15.0]]) / math.sqrt(2)
    assert torch.allclose(scores, expected)
    assert torch.allclose(
        contrast_ahead(prediction, target, others, torch.tensor([3, 2]), shift=2),
        torch.tensor([[6 - 1.0, 1.0]]) / math.sqrt(2),
    )
    assert contrast_ahead(prediction, target, others, torch.tensor([3, 2]), shift=3).shape == (0, 2)
    assert contrast_ahead(prediction, target, others, torch.tensor([3, 2]), shift=7).shape == (0, 2)


@each
def test_the_loss_is_a_plain_loop_over_tokens_steps_and_negatives(kind):
    model = build(kind).double()
    batch = clips([200, 110, 55])
    raw = batch.raw
    batch = Batch({"speech": Raw(raw.data.double(), raw.lengths, raw.ids, raw.rate)}, batch.seeds)
    tokens = model.encoder.tokens(batch.raw)
    context = model.encoder(tokens).tokens
    others = draw_others(tokens.lengths, 4, batch.seeds)
    losses = []
    for row, n in enumerate(tokens.lengths.tolist()):
        for ahead in (1, 2, 3):
            for token in range(n - ahead):
                guess = model.predict[ahead - 1](context[row, token])
                among = [token + ahead, *others[row, token + ahead].tolist()]
                scores = torch.stack([guess @ tokens.feat[row, place] for place in among]) / math.sqrt(8)
                if kind is CPC:
                    losses.append(-scores.log_softmax(0)[0])
                else:
                    losses.append(-scores[0].sigmoid().log() - (1 - scores[1:].sigmoid()).log().sum())
    loss = model(batch)
    assert loss.count == len(losses)
    assert loss.total.item() == pytest.approx(sum(losses).item(), rel=1e-5)


@each
def test_constant_predictions_and_features_are_at_chance(kind):
    model = build(kind)
    with torch.no_grad():
        for predict in model.predict:
            predict.weight.zero_()
            if predict.bias is not None:
                predict.bias.zero_()
    found = {name: float(value) / n for name, (value, n) in model(clips([300, 200])).metrics.items()}
    assert found["accuracy"] == 0.0  # ties are no answers
    assert found["chance_accuracy"] == pytest.approx(1 / 5)
    assert found["prediction_std"] == 0.0
    if kind is CPC:
        assert found["loss"] == pytest.approx(math.log(5)) == pytest.approx(found["chance"])
    else:
        assert found["loss"] == pytest.approx(5 * math.log(2))
        # yes with probability 1/5: log 5 for the positive, and log 5/4 for each of four negatives
        assert found["chance"] == pytest.approx(math.log(5) + 4 * math.log(1.25))
        assert found["chance"] < found["loss"]


@each
def test_the_target_is_not_detached(kind):
    model = build(kind)
    batch = clips([200])
    tokens = model.encoder.tokens(batch.raw)
    model.encoder.transformer.requires_grad_(False)
    model.encoder.frontend.project.requires_grad_(False)
    model.encoder.frontend.project.weight.zero_()  # the context then knows nothing of the features
    model(batch).total.backward()
    assert model.encoder.frontend.weights[0].grad.any()
    assert tokens.feat.requires_grad


@each
def test_steps_go_down_the_rows_of_a_picture(kind):
    net = Encoder(
        Patches(dim=DIM, size=[2, 2], channels=1, mean=[0.5], std=[0.5]),
        Transformer(dim=DIM, depth=1, heads=2, causal=True),
        SinCos(DIM),
    )
    raw = Raw(torch.rand(2, 1, 8, 6), torch.ones(2, dtype=torch.int64), ["a", "b"])  # four rows of three patches
    loss = kind(net, steps=2, negatives=3)(Batch({"image": raw}, torch.arange(2)))
    assert loss.count == 2 * (9 + 6)


@each
def test_it_learns_to_tell_what_comes_next(kind):
    """Twenty pitches in turn, one a token. No answer that is the same for all gets below chance."""
    model = build(kind, steps=2, negatives=8)
    time = torch.arange(1200)
    pitch = 20.0 * (1 + time // 20 % 20)
    wave = torch.sin(2 * math.pi * pitch * time / 1000)
    batch = Batch({"speech": Raw(wave[None], torch.tensor([1200]), ["a"], 1000.0)}, torch.arange(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(batch)
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
    found = {name: float(value) / n for name, (value, n) in loss.metrics.items()}
    assert found["loss"] < found["chance"]
    assert found["accuracy"] > 2 * found["chance_accuracy"]
    assert {"accuracy_1", "accuracy_2"} <= set(found)


@each
def test_clips_too_short_to_predict_anything_give_zero_and_still_a_graph(kind):
    loss = build(kind)(clips([26, 27]))
    assert loss.count == 0
    assert loss.total.item() == 0.0
    loss.total.backward()
    assert all(math.isfinite(float(value)) for value, _ in loss.metrics.values())


@each
def test_what_cannot_predict_is_refused(kind):
    with pytest.raises(ValueError, match="transformer.causal=false"):
        kind(encoder(causal=False))
    with pytest.raises(ValueError, match="positions: Convolutional reads tokens to come"):
        kind(encoder(positions=Convolutional(DIM, kernel=4, groups=2)))
    with pytest.raises(ValueError, match="objective.steps=0, negatives=4: both must be at least 1"):
        build(kind, steps=0)
