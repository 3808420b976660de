"""vq-wav2vec: nothing but codewords reaches the context, and the units are theirs."""

import math

import pytest
import torch

from mmssl.encoder import Encoder
from mmssl.modalities.speech.frontend import Waveform
from mmssl.nn.positions import SinCos
from mmssl.nn.quantizer import KMeansQuantizer
from mmssl.nn.transformer import Transformer
from mmssl.objectives.vq_wav2vec import VQWav2Vec
from mmssl.types import Batch, Raw

DIM = 16


def build(quantizer, *, causal=True, **settings):
    torch.manual_seed(0)
    frontend = Waveform(dim=DIM, layers=[[8, 10, 5], [8, 4, 4]], normalize=False, rate=1000)
    net = Encoder(frontend, Transformer(dim=DIM, depth=1, heads=2, causal=causal), SinCos(DIM))
    return VQWav2Vec(net, quantizer=quantizer, **{"codes": 6, "steps": 2, "negatives": 4, **settings})


def clips(samples, first=0):
    data = torch.zeros(len(samples), max(samples))
    for row, n in enumerate(samples):
        data[row, :n] = torch.randn(n, generator=torch.Generator().manual_seed(first + row))
    raw = Raw(data, torch.tensor(samples), [str(i) for i in range(len(samples))], 1000.0)
    return Batch({"speech": raw}, torch.arange(len(samples)) + 100 + first)


each = pytest.mark.parametrize("quantizer", ["gumbel", "kmeans"])


def test_k_means_takes_the_nearest_codeword_of_each_group():
    torch.manual_seed(0)
    quantizer = KMeansQuantizer(dim=6, groups=2, codes=5)
    x = torch.randn(40, 6)
    vectors, codes, distance = quantizer(x)
    for i in range(40):
        total = 0.0
        for g in range(2):
            part = quantizer.norm(x[i, 3 * g : 3 * g + 3] @ quantizer.project[g])
            squares = (quantizer.codebook[g] - part).square().sum(1)
            assert codes[i, g] == squares.argmin()
            assert torch.equal(vectors[i, 3 * g : 3 * g + 3], quantizer.codebook[g, codes[i, g]])
            total += squares.min().item()
        assert distance[i].item() == pytest.approx(1.25 * total / 6, rel=1e-4)


def test_the_gradient_goes_straight_through_k_means_and_a_codeword_moves_to_its_vectors():
    torch.manual_seed(0)
    quantizer = KMeansQuantizer(dim=4, groups=1, codes=3)
    x = torch.randn(10, 4, requires_grad=True)
    vectors, codes, distance = quantizer(x)
    vectors.sum().backward(retain_graph=True)
    assert quantizer.codebook.grad is None or not quantizer.codebook.grad.any()
    assert quantizer.norm.bias.grad.tolist() == [10.0] * 4  # as if nothing stood between
    quantizer.zero_grad()
    distance.sum().backward()
    with torch.no_grad():
        split = quantizer.norm(x @ quantizer.project[0])
        for v in range(3):
            own = split[codes[:, 0] == v]
            expected = (2 / 4) * (len(own) * quantizer.codebook[0, v] - own.sum(0))
            assert torch.allclose(quantizer.codebook.grad[0, v], expected, atol=1e-5)


@each
def test_codes_are_those_of_the_clip_and_of_nothing_else(quantizer):
    model = build(quantizer)
    together, tokens = model.codes(clips([400, 200]).raw)
    alone, short = model.codes(clips([200], first=1).raw)
    n = short.lengths
    assert together.shape == (2, int(tokens.lengths[0]), 2)
    assert torch.equal(together[1, : n[0]], alone[0])
    assert not together[1, n[0] :].any()
    assert together.max() < 6
    assert len(together[0].unique()) > 1


@each
def test_clips_with_the_same_codes_have_the_same_context(quantizer):
    """The context sees codewords only: what differs within a code is gone."""
    model = build(quantizer, codes=1).eval()  # every feature has the same code
    seen = []
    model.encoder.register_forward_hook(lambda module, args, output: seen.append(output.tokens))
    model(clips([200]))
    model(clips([200], first=5))
    assert torch.equal(seen[0], seen[1])


@each
def test_a_dead_codebook_reads_as_one(quantizer):
    found = build(quantizer, codes=1)(clips([300])).metrics
    found = {name: float(value) / n for name, (value, n) in found.items()}
    assert found["code_perplexity"] == pytest.approx(1.0)
    assert found["target_std"] == pytest.approx(0.0, abs=1e-6)
    assert found["accuracy"] == 0.0
    assert found["chance"] == pytest.approx(math.log(5) + 4 * math.log(1.25))


def test_the_distance_counts_as_often_as_a_clip_is_predicted():
    model = build("kmeans")
    batch = clips([400, 120])
    tokens = model.encoder.tokens(batch.raw)
    expected, count = 0.0, 0
    for row, n in enumerate(tokens.lengths.tolist()):
        predictions = (n - 1) + (n - 2)
        expected += predictions * model.quantizer(tokens.feat[row, :n])[2].mean().item()
        count += predictions
    loss = model(batch)
    assert loss.count == count
    extra = loss.total.item() - float(loss.metrics["contrastive"][0])
    assert extra == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("quantizer", ["gumbel", "kmeans"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(quantizer):
    samples = [400, 120, 30, 260]
    model = build(quantizer)
    model(clips(samples)).total.backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    for row, n in enumerate(samples):
        model(clips([n], first=row)).total.backward()
    parts = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.cosine_similarity(whole, parts, dim=0) > 0.99999
    assert torch.allclose(whole.norm(), parts.norm(), rtol=1e-4)


def test_evaluation_draws_no_noise():
    model = build("gumbel").eval()
    batch = clips([300])
    assert torch.equal(model(batch).total, model(batch).total)
    assert model._noise(model.encoder.tokens(batch.raw), batch.seeds) is None


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="transformer.causal=false: vq-wav2vec"):
        build("gumbel", causal=False)
    with pytest.raises(ValueError, match="objective.quantizer='lloyd': choose gumbel or kmeans"):
        build("lloyd")
    with pytest.raises(ValueError, match="quantizer.dim=8: must be a multiple of groups=3"):
        build("kmeans", groups=3)
