"""The same numbers as transformers' wav2vec 2.0, at tiny random weights, with masks, negatives and noise handed in."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmssl.convert.layout import completed, linear
from mmssl.convert.speech import WAV2VEC2
from mmssl.encoder import Encoder
from mmssl.modalities.speech.frontend import Waveform
from mmssl.nn.masking import plan_of
from mmssl.nn.positions import Convolutional
from mmssl.nn.transformer import Transformer
from mmssl.objectives.wav2vec2 import Draws, Wav2Vec2, draw_negatives, masked_places
from mmssl.types import Raw, Tokens

transformers = pytest.importorskip("transformers")

LAYERS = [[12, 10, 5], [12, 3, 2], [12, 2, 2]]
TEMPERATURE = 1.7
FORMS = pytest.mark.parametrize("form", ["group", "layer"])


def build_theirs(form: str):
    config = transformers.Wav2Vec2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        conv_dim=[channels for channels, _, _ in LAYERS],
        conv_kernel=[kernel for _, kernel, _ in LAYERS],
        conv_stride=[stride for _, _, stride in LAYERS],
        feat_extract_norm=form,
        conv_bias=form == "layer",
        do_stable_layer_norm=form == "layer",
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        num_codevector_groups=2,
        num_codevectors_per_group=5,
        codevector_dim=16,
        proj_codevector_dim=16,
        num_negatives=7,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        feat_quantizer_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
    )
    model = transformers.Wav2Vec2ForPreTraining(config)
    for part in model.modules():  # norms that do nothing would hide a swap of two of them
        if isinstance(part, nn.LayerNorm | nn.GroupNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)
    model.quantizer.temperature = TEMPERATURE
    return model.train()


def build_ours(form: str) -> Wav2Vec2:
    transformer = Transformer(dim=24, depth=2, heads=4, mlp_dim=40, norm="pre" if form == "layer" else "post", eps=1e-5)
    frontend = Waveform(dim=24, layers=LAYERS, norm=form, bias=form == "layer", normalize=False)
    return Wav2Vec2(
        Encoder(frontend, transformer, Convolutional(24, kernel=8, groups=4), mask_token=True),
        negatives=7,
        groups=2,
        codes=5,
        dim=16,
        feature_penalty=0.0,
        feature_dropout=0.0,
        gumbel=(TEMPERATURE, 0.5, 1.0),
    ).train()


def pairs(ours: Wav2Vec2, theirs) -> list[tuple[str, nn.Parameter, list[nn.Parameter], object]]:
    """Our parameter, theirs that it is made of, and how: the encoder as `mmssl convert` reads it, and the head."""
    form = theirs.config.feat_extract_norm
    encoder = {
        "modality": "speech",
        "frontend": {"name": "waveform", "layers": LAYERS, "norm": form, "bias": form == "layer"},
        "positions": {"name": "conv", "kernel": 8, "groups": 4},
        "transformer": {"dim": 24, "depth": 2, "heads": 4},
        "encoder": {"mask_token": True},
    }
    known = [
        (f"encoder.{pair.ours[0]}", [f"wav2vec2.{name}" for name in pair.theirs], pair.read)
        for pair in WAV2VEC2.pairs(completed(encoder), {})
    ]
    head = [
        *linear("quantizer.logits", "quantizer.weight_proj"),
        *linear("project_context", "project_hid"),
        *linear("project_target", "project_q"),
    ]
    known += [(pair.ours[0], list(pair.theirs), pair.read) for pair in head]
    known.append(("quantizer.codebook", ["quantizer.codevectors"], lambda x: [x.view(2, 5, 8)]))
    own, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    return [
        (name, own[name], [other[one] for one in many], lambda *b, read=read: read(*b)[0]) for name, many, read in known
    ]


@pytest.fixture
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """One batch through both, with everything random injected. Lengths differ in the layer form only, because their
    group norm takes its statistics over padding too."""
    form = request.param
    torch.manual_seed(3)
    theirs, ours = build_theirs(form), build_ours(form)
    matched = pairs(ours, theirs)
    with torch.no_grad():
        for _, a, b, make in matched:
            a.copy_(make(*b))
    samples = torch.tensor([900, 900, 900] if form == "group" else [900, 700, 410])
    data = torch.randn(3, 900)
    data[torch.arange(900) >= samples[:, None]] = 0.0
    tokens = ours.encoder.tokens(Raw(data, samples, ["a", "b", "c"], 16_000))
    size = tokens.x.shape[1]
    masked = (torch.rand(3, size) < 0.5) & tokens.valid
    index, counts = masked_places(plan_of(masked, tokens.lengths))
    negatives = draw_negatives(counts, 7, torch.tensor([5, 6, 7]))
    noise = -torch.empty(3 * size, 2, 5).exponential_().log()

    # theirs counts places in the batch where ours counts hidden frames of the clip
    places = torch.zeros(3 * size, 7, dtype=torch.long)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    places[index] = index[first[:, None] + negatives]

    def gumbel_softmax(scores: torch.Tensor, tau: float, hard: bool) -> torch.Tensor:
        soft = ((scores.view_as(noise) + noise) / tau).softmax(-1)
        chosen = nn.functional.one_hot(soft.argmax(-1), 5) + (soft - soft.detach())
        return chosen.view_as(scores)

    monkeypatch.setattr(nn.functional, "gumbel_softmax", gumbel_softmax)
    inputs = {"attention_mask": (torch.arange(900) < samples[:, None]).long()} if form == "layer" else {}
    out = theirs(data, mask_time_indices=masked, sampled_negative_indices=places.view(3, size, 7), **inputs)
    plan = plan_of(masked, tokens.lengths)
    draws = Draws(plan=plan, negatives=negatives, noise=noise[index])
    return SimpleNamespace(
        ours=ours, theirs=theirs, tokens=tokens, plan=plan, out=out, loss=ours.loss_from(tokens, draws), pairs=matched,
        inputs={"input_values": data, "mask_time_indices": masked, **inputs}, counts=counts,
    )  # fmt: skip


BOTH = pytest.mark.parametrize("both", ["group", "layer"], indirect=True)


@BOTH
def test_every_parameter_has_its_counterpart(both: SimpleNamespace) -> None:
    """Otherwise a parameter left out of the copy could be one that does not matter."""
    assert {id(a) for _, a, _, _ in both.pairs} == {id(a) for a in both.ours.parameters()}
    assert {id(b) for _, _, many, _ in both.pairs for b in many} == {id(b) for b in both.theirs.parameters()}


@BOTH
def test_the_encoder_gives_the_same(both: SimpleNamespace) -> None:
    theirs = both.theirs.wav2vec2(**both.inputs).last_hidden_state
    ours = both.ours.encoder(both.tokens, both.plan, "replace").x
    valid = both.tokens.valid
    assert (ours - theirs)[valid].abs().max() < 1e-5
    assert theirs[valid].std() > 0.1


@BOTH
def test_contrast_diversity_and_their_sum_are_the_same(both: SimpleNamespace) -> None:
    metrics = both.loss.metrics
    assert both.loss.count == both.counts.sum()
    assert metrics["without_negatives"][0] == 0
    assert metrics["chance"][0] / both.loss.count < math.log(8)  # so some negatives equal their positive and are out
    for ours, theirs in (
        (metrics["contrastive"][0], both.out.contrastive_loss),
        (metrics["diversity"][0], both.out.diversity_loss),
        (metrics["soft_perplexity"][0] / both.loss.count * 2, both.out.codevector_perplexity),
        (both.loss.total, both.out.loss),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@BOTH
def test_all_gradients_are_the_same(both: SimpleNamespace) -> None:
    both.out.loss.backward()
    both.loss.total.backward()
    largest = max(float(b.grad.abs().max()) for _, _, many, _ in both.pairs for b in many)
    for name, a, many, make in both.pairs:
        theirs = make(*(b.grad for b in many))
        # relative to the gradient's own size; the bias of keys has none, by the symmetry of the softmax
        scale = max(float(theirs.norm()), 1e-3 * largest)
        assert float((a.grad - theirs).norm()) / scale < 1e-5, name


def test_base_has_as_many_parameters() -> None:
    with torch.device("meta"):
        theirs = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config())
        ours = Wav2Vec2(
            Encoder(
                Waveform(dim=768, norm="group", normalize=False, grad_mult=0.1),
                Transformer(dim=768, depth=12, heads=12, norm="post"),
                Convolutional(768),
                mask_token=True,
            )
        )
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) == 95_044_608


def test_the_evaluation_codes_are_the_likeliest_ones_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    theirs, ours = build_theirs("layer").eval(), build_ours("layer").eval()
    with torch.no_grad():
        for _, a, b, make in pairs(ours, theirs):
            a.copy_(make(*b))
    features = torch.randn(1, 30, 12)
    vectors, _ = theirs.quantizer(features, mask_time_indices=torch.ones(1, 30, dtype=torch.bool))
    torch.testing.assert_close(ours.quantizer(features[0]).vectors, vectors[0])


def test_tokens_keep_the_features_before_the_projection() -> None:
    """Guards the fixture: the quantizer reads what theirs calls extract_features."""
    torch.manual_seed(0)
    theirs, ours = build_theirs("layer").eval(), build_ours("layer").eval()
    with torch.no_grad():
        for _, a, b, make in pairs(ours, theirs):
            a.copy_(make(*b))
    data = torch.randn(2, 600)
    tokens: Tokens = ours.encoder.tokens(Raw(data, torch.tensor([600, 600]), ["a", "b"], 16_000))
    torch.testing.assert_close(tokens.feat, theirs.wav2vec2(data).extract_features, rtol=1e-4, atol=1e-5)
