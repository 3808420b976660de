"""The encoder: what is hidden cannot be seen, what is padding cannot be heard, order does not matter."""

import pytest
import torch

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.speech.frontend import Waveform
from mmssl.nn.masking import random_mask
from mmssl.nn.positions import POSITIONS, Convolutional, SinCos
from mmssl.nn.transformer import Transformer
from mmssl.types import Raw


def speech(**settings):
    torch.manual_seed(0)
    frontend = Waveform(dim=16, layers=[[8, 10, 5], [8, 3, 2], [8, 2, 2]])
    positions = Convolutional(16, kernel=8, groups=4)
    return Encoder(frontend, Transformer(dim=16, depth=2, heads=2), positions, **settings).eval()


def image(**settings):
    torch.manual_seed(0)
    return Encoder(Patches(dim=16, size=(4, 4)), Transformer(dim=16, depth=2, heads=2), SinCos(16), **settings).eval()


def waves(lengths):
    torch.manual_seed(1)
    return Raw(torch.randn(len(lengths), max(lengths)), torch.tensor(lengths), list("abcdef")[: len(lengths)], 16_000.0)


def pictures(n=3):
    torch.manual_seed(1)
    return Raw(torch.rand(n, 3, 16, 12), torch.ones(n, dtype=torch.int64), list("abcdef")[:n])


CASES = [(speech, waves([1200, 700, 300])), (image, pictures())]


@pytest.mark.parametrize(("build", "raw"), CASES)
@pytest.mark.parametrize("hide", ["drop", "replace"])
def test_a_hidden_token_cannot_be_seen(build, raw, hide):
    encoder = build(mask_token=True, prefix=1)
    tokens = encoder.tokens(raw)
    plan = random_mask(tokens.lengths, ratio=0.5, seeds=torch.arange(len(raw)), clones=2)
    seen = encoder(tokens, plan, hide).x
    tokens.x.data[plan.masked[::2]] += 7  # hidden in the first copy only
    moved = (encoder(tokens, plan, hide).x - seen).abs().amax((1, 2))
    assert (moved[::2] == 0).all()
    assert (moved[1::2] > 0).all()


@pytest.mark.parametrize(("build", "raw"), CASES)
def test_dropped_tokens_take_their_positions_with_them(build, raw):
    encoder = build(prefix=2)
    tokens = encoder.tokens(raw)
    plan = random_mask(tokens.lengths, ratio=0.5, seeds=torch.arange(len(raw)))
    encoded = encoder(tokens, plan, "drop", layers=[0])
    seen = tokens.x.masked_fill(plan.masked[..., None], 0)
    expected = tokens.x + encoder.positions(seen, tokens)
    for row, n in enumerate(plan.keep_lengths):
        assert torch.allclose(encoded.layers[0][row, 2 : 2 + n], expected[row][plan.keep[row, :n]], atol=1e-6)
        assert encoded.lengths[row] == n + 2
    assert encoded.tokens.shape[1] == plan.keep.shape[1]


@pytest.mark.parametrize(("build", "raw"), CASES)
def test_permuting_the_batch_permutes_the_result(build, raw):
    encoder = build()
    order = torch.tensor([2, 0, 1])
    shuffled = Raw(raw.data[order], raw.lengths[order], [raw.ids[i] for i in order], raw.rate)
    first, second = encoder(encoder.tokens(raw)), encoder(encoder.tokens(shuffled))
    assert torch.allclose(first.x[order], second.x, atol=1e-5)


def test_a_plan_and_a_way_to_hide_come_together():
    encoder = speech()
    tokens = encoder.tokens(waves([600]))
    with pytest.raises(ValueError, match="hide='drop'"):
        encoder(tokens, None, "drop")
    plan = random_mask(tokens.lengths, ratio=0.5, seeds=torch.arange(1))
    with pytest.raises(ValueError, match="hide='none'"):
        encoder(tokens, plan)
    with pytest.raises(ValueError, match="encoder.mask_token is false"):
        encoder(tokens, plan, "replace")


def test_widths_must_agree():
    with pytest.raises(ValueError, match="frontend.dim=16: must equal transformer.dim=32"):
        Encoder(Patches(dim=16), Transformer(dim=32, depth=1, heads=2), SinCos(32))


def test_two_encoders_may_hold_one_transformer():
    trunk = Transformer(dim=16, depth=1, heads=2)
    one = Encoder(Patches(dim=16, size=(4, 4)), trunk, SinCos(16))
    two = Encoder(Waveform(dim=16), trunk, Convolutional(16, kernel=8, groups=4))
    assert one.transformer is two.transformer


@pytest.mark.parametrize(("build", "raw"), CASES)
@pytest.mark.parametrize("hide", ["none", "drop", "replace", "unseen"])
def test_a_mask_token_is_left_without_gradient_by_all_who_replace_nothing(build, raw, hide):
    encoder = build(mask_token=True)
    tokens = encoder.tokens(raw)
    plan = None if hide == "none" else random_mask(tokens.lengths, ratio=0.5, seeds=torch.arange(len(raw)))
    encoder(tokens, plan, hide).x.sum().backward()
    assert encoder.skips_parameters(hide) == (encoder.mask_token.grad is None) == (hide != "replace")
    assert not build().skips_parameters(hide)


def test_blocks_left_out_and_features_that_are_not_trained_get_no_gradient():
    assert Encoder(
        Patches(dim=16, size=(4, 4)), Transformer(dim=16, depth=2, heads=2, layer_drop=0.1), SinCos(16)
    ).skips_parameters("none")
    encoder = speech()
    encoder.frontend.grad_mult = 0.0
    encoder(encoder.tokens(waves([1200, 700]))).x.sum().backward()
    assert encoder.skips_parameters("none")
    assert any(parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_through_which_a_token_sees_later_ones_are_refused_to_look_ahead_and_no_others(name):
    torch.manual_seed(0)
    settings = {"flat_sincos": {"grid": [4, 3]}, "learned": {"grid": [4, 3]}}
    settings |= {"conv": {"kernel": 4, "groups": 4}, "stacked_conv": {"kernel": 3, "groups": 4}}
    body = Transformer(dim=16, depth=1, heads=2, causal=True)
    encoder = Encoder(Patches(dim=16, size=(4, 4)), body, POSITIONS[name](16, **settings.get(name, {}))).eval()
    tokens = encoder.tokens(pictures())
    before = encoder(tokens).tokens[:, :6]
    tokens.x.data[:, 6:] += 1
    if torch.equal(encoder(tokens).tokens[:, :6], before):
        encoder.refuse_lookahead("looking ahead")
    else:
        with pytest.raises(ValueError, match=f"{type(encoder.positions).__name__} reads tokens to come"):
            encoder.refuse_lookahead("looking ahead")
