from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmssl.encoder import Encoder
from mmssl.modalities.audio.frontend import SpectrogramPatches
from mmssl.modalities.audio.targets import TARGETS as AUDIO_TARGETS
from mmssl.modalities.speech.logmel import LogMel
from mmssl.modalities.speech.targets import TARGETS
from mmssl.nn.masking import span_mask
from mmssl.nn.positions import Convolutional, SinCos
from mmssl.nn.quantizer import RandomQuantizer
from mmssl.nn.transformer import Transformer
from mmssl.objectives.best_rq import BestRQ
from mmssl.types import Batch, Raw

DIM = 16


def build(*, mask_token: bool = True, **settings: object) -> BestRQ:
    torch.manual_seed(0)
    frontend = LogMel(dim=DIM, bands=8, window_ms=10, hop_ms=5, rate=8000)
    transformer = Transformer(dim=DIM, depth=1, heads=2)
    encoder = Encoder(frontend, transformer, Convolutional(DIM, kernel=5, groups=2), mask_token=mask_token)
    target = TARGETS["features"]
    given = {"target": target.values, "target_dim": target.dim(frontend), "codes": 12, "mask_span": 2, **settings}
    return BestRQ(encoder, **given)  # type: ignore[arg-type]


def clips(samples: list[int], first: int = 0) -> Batch:
    data = torch.zeros(len(samples), max(samples))
    for row, n in enumerate(samples):
        data[row, :n] = torch.randn(n, generator=torch.Generator().manual_seed(first + row)).cumsum(0) / 10
    ids = [f"clip{first + row}" for row in range(len(samples))]
    return Batch({"speech": Raw(data, torch.tensor(samples), ids, 8000)}, torch.arange(len(samples)) + 100 + first)


def test_a_code_is_the_nearest_codeword_after_both_have_length_one() -> None:
    """By the paper's own formula, a difference of normalized vectors, and not by a product."""
    quantizer = RandomQuantizer(dim_in=5, groups=2, codes=9, dim=3, seed=1)
    x = 10 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    codes = quantizer(x)
    assert codes.shape == (40, 2)
    for group in range(2):
        for row in range(40):
            projected = x[row] @ quantizer.projection[group]
            distances = (quantizer.codebook[group] - projected / projected.norm()).norm(dim=1)
            assert codes[row, group] == distances.argmin()
    assert len(codes.unique()) > 5


def test_the_quantizer_is_its_seeds_saved_and_never_trained() -> None:
    torch.manual_seed(5)
    first = build(quantizer_seed=3)
    torch.manual_seed(6)
    second, other = build(quantizer_seed=3), build(quantizer_seed=4)
    assert torch.equal(first.quantizer.projection, second.quantizer.projection)
    assert torch.equal(first.quantizer.codebook, second.quantizer.codebook)
    assert not torch.equal(first.quantizer.codebook, other.quantizer.codebook)
    assert not list(first.quantizer.parameters())
    other.load_state_dict(first.state_dict())
    assert torch.equal(other.quantizer.projection, first.quantizer.projection)
    # Xavier's bound, and codewords of length 1
    assert first.quantizer.projection.abs().max() <= (6 / (16 + 16)) ** 0.5
    torch.testing.assert_close(first.quantizer.codebook.norm(dim=-1), torch.ones(1, 12))


@torch.no_grad()
def test_the_loss_is_cross_entropy_with_the_codes_of_hidden_tokens() -> None:
    objective = build(groups=2).eval()
    batch = clips([1600, 900])
    tokens = objective.encoder.tokens(batch.raw)
    plan = span_mask(tokens.lengths, prob=0.4, span=2, seeds=batch.seeds)
    x = objective.encoder(tokens, plan, "replace").tokens
    expected = 0.0
    for row, length in enumerate(tokens.lengths.tolist()):
        real = tokens.feat[row, :length]
        normal = (real - real.mean(0)) / real.std(0, correction=0)
        codes = objective.quantizer(normal)
        for place in range(length):
            if plan.masked[row, place]:
                for group, scores in enumerate(objective.head(x[row, place]).view(2, 12)):
                    expected += float(scores.logsumexp(0) - scores[codes[place, group]]) / 2
    loss = objective(batch)
    assert loss.count == int(plan.masked.sum())
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_a_clips_codes_are_its_own_whatever_stands_beside_it() -> None:
    objective = build()
    together, alone = clips([900, 1600]), clips([900])
    tokens = objective.encoder.tokens(together.raw)
    one = objective.encoder.tokens(alone.raw)
    size = int(one.lengths[0])
    assert size < tokens.x.shape[1]
    both = objective.codes(together.raw, tokens)
    assert torch.equal(both[0, :size], objective.codes(alone.raw, one)[0])
    assert len(both[1].unique()) > 3


@torch.no_grad()
def test_loudness_and_offset_of_a_value_change_no_code() -> None:
    objective = build()
    batch = clips([1600])
    tokens = objective.encoder.tokens(batch.raw)
    scale = torch.rand(tokens.feat.shape[-1]) + 0.5
    moved = replace(tokens, feat=tokens.feat * scale + 3.0)
    assert torch.equal(objective.codes(batch.raw, moved), objective.codes(batch.raw, tokens))


def gradient(objective: BestRQ, batches: list[Batch]) -> Tensor:
    objective.zero_grad()
    losses = [objective(batch) for batch in batches]
    for loss in losses:
        (loss.total / sum(loss.count for loss in losses)).backward()
    return torch.cat([p.grad.flatten() for p in objective.parameters()])


def test_micro_batches_give_the_gradient_of_one_batch() -> None:
    samples = [1600, 700, 1100]
    objective = build()
    whole = gradient(objective, [clips(samples)])
    parts = gradient(objective, [clips([n], first=i) for i, n in enumerate(samples)])
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)


def test_patches_of_a_spectrogram_have_codes_too() -> None:
    frontend = SpectrogramPatches(dim=DIM, bands=12, size=[4, 4], window_ms=10, hop_ms=2.5, rate=8000)
    net = Encoder(frontend, Transformer(dim=DIM, depth=1, heads=2), SinCos(DIM), mask_token=True)
    target = AUDIO_TARGETS["spectrogram"]
    objective = BestRQ(net, target=target.values, target_dim=target.dim(frontend), codes=12, mask_span=1)
    loss = objective(clips([1600, 900]))
    loss.total.backward()
    assert loss.count > 5
    assert loss.metrics["target_perplexity"][0] / loss.count > 2


def test_a_clip_of_one_token_has_nothing_to_predict_and_no_nan() -> None:
    objective = build()
    loss = objective(clips([objective.encoder.frontend.min_length]))
    loss.total.backward()
    assert (loss.count, loss.total.item()) == (0, 0.0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


def test_learned_targets_and_encoders_without_a_mask_token_are_refused() -> None:
    with pytest.raises(ValueError, match="LogMel learns what it measures, so the codes would move"):
        build(target_learned=True)
    with pytest.raises(ValueError, match="encoder.mask_token=false: BEST-RQ replaces hidden tokens"):
        build(mask_token=False)
    with pytest.raises(ValueError, match="a choice takes a codebook of 2 codes"):
        build(codes=1)
