"""The waveform frontend: torch's own convolutions, exact on ragged batches in both forms of norm."""

import pytest
import torch
import torch.nn.functional as F

from mmssl.modalities.speech.frontend import WAV2VEC2_LAYERS, Waveform, conv_lengths
from mmssl.types import Raw

LAYERS = [[24, 10, 5], [20, 3, 2], [16, 3, 2], [16, 2, 2]]
FORMS = {"group": {"norm": "group", "normalize": False}, "layer": {"norm": "layer", "normalize": True, "bias": True}}


def build(form, **settings):
    torch.manual_seed(0)
    frontend = Waveform(dim=12, layers=LAYERS, **FORMS[form], **settings).double()
    for p in frontend.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return frontend


def batch(lengths, fill=0.0):
    torch.manual_seed(1)
    data = torch.randn(len(lengths), max(lengths)).double()
    for row, n in enumerate(lengths):
        data[row, n:] = fill
    return Raw(data, torch.tensor(lengths), [f"clip{i}" for i in range(len(lengths))], 16_000.0)


def with_torch(frontend, wave):
    """The same stack, as the paper's drawing has it: channels first, one clip, nn.functional.conv1d."""
    if frontend.normalize:
        wave = F.layer_norm(wave, wave.shape)
    h, width = wave[None, None], 1
    for i, (channels, kernel, stride) in enumerate(frontend.layers):
        weight = frontend.weights[i].view(kernel, width, channels).permute(2, 1, 0)
        h = F.conv1d(h, weight, None if frontend.biases is None else frontend.biases[i], stride=stride)
        norm = frontend.norms[min(i, len(frontend.norms) - 1)]
        if frontend.group and i == 0:
            h = F.group_norm(h, channels, norm.weight, norm.bias)
        if not frontend.group:
            h = F.layer_norm(h.transpose(1, 2), (channels,), norm.weight, norm.bias).transpose(1, 2)
        h, width = F.gelu(h), channels
    return frontend.project(frontend.norm(h.transpose(1, 2)))[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [[4000, 1234, 2777], [900, 900], [115]])
def test_tokens_and_gradients_are_those_of_torchs_convolutions_clip_by_clip(form, lengths):
    frontend, raw = build(form), batch(lengths, fill=9.0)
    tokens = frontend(raw)
    alone = [with_torch(frontend, wave[:n]) for wave, n in zip(raw.data, lengths, strict=True)]
    for row, expected in enumerate(alone):
        assert len(expected) == tokens.lengths[row]
        assert torch.allclose(tokens.x[row, : len(expected)], expected, atol=1e-10)
        assert tokens.x[row, len(expected) :].abs().sum() == 0
    ours = torch.autograd.grad(tokens.x.pow(2).sum(), list(frontend.parameters()))
    theirs = torch.autograd.grad(sum(x.pow(2).sum() for x in alone), list(frontend.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_what_padding_holds_changes_nothing(form):
    frontend = build(form)
    silent, loud = (frontend(batch([1000, 400], fill=fill)).x for fill in (0.0, torch.inf))
    assert torch.equal(silent, loud)


def test_lengths_are_the_numbers_of_the_paper():
    # worked with floor((n - kernel) / stride) + 1 layer by layer
    samples = torch.tensor([399, 400, 719, 720, 16_000, 250_000, 320_000, 480_000])
    assert conv_lengths(samples, WAV2VEC2_LAYERS).tolist() == [0, 1, 1, 2, 49, 781, 999, 1499]
    assert Waveform(dim=8).min_length == 400


def test_lengths_are_the_valid_tokens_for_any_length():
    frontend = Waveform(dim=4, layers=[[4, 10, 5], [4, 3, 2], [4, 2, 2]])
    lengths = torch.randint(frontend.min_length, 800, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    raw = batch(lengths)
    tokens = frontend(Raw(raw.data.float(), raw.lengths, raw.ids, raw.rate))
    assert torch.equal(frontend.lengths(raw), tokens.valid.sum(1))
    assert torch.equal(frontend.lengths(raw), (tokens.x != 0).any(-1).sum(1))


def test_a_clip_shorter_than_one_token_is_named():
    with pytest.raises(ValueError, match=r"clip1: 399 samples are shorter than one token, 400"):
        Waveform(dim=8)(Raw(torch.zeros(2, 800), torch.tensor([800, 399]), ["clip0", "clip1"], 16_000.0))


def test_another_rate_is_refused():
    with pytest.raises(ValueError, match=r"clip0: 8000 Hz, but this frontend reads 16000 Hz"):
        Waveform(dim=8)(Raw(torch.zeros(1, 800), torch.tensor([800]), ["clip0"], 8000.0))


@pytest.mark.parametrize("form", FORMS)
def test_silence_is_finite(form):
    raw = Raw(torch.zeros(1, 800).double(), torch.tensor([800]), ["silence"], 16_000.0)
    assert build(form)(raw).x.isfinite().all()


def test_an_impulse_lights_up_the_token_over_it():
    frontend = Waveform(dim=8, normalize=False).eval()
    quiet = torch.zeros(1, 16_000)
    for token in (0, 7, 48):
        click = quiet.clone()
        click[0, token * 320 + 200] = 1.0  # the middle of the token's 400 samples
        raws = [Raw(wave, torch.tensor([16_000]), ["x"], 16_000.0) for wave in (quiet, click)]
        moved = (frontend(raws[1]).x - frontend(raws[0]).x).norm(dim=-1)[0]
        assert moved.argmax() == token
        assert moved.nonzero()[:, 0].tolist() in ([token], [token - 1, token], [token, token + 1])
    assert frontend(raws[0]).step_ms == 20


def test_the_gradient_multiplier_scales_the_convolutions_alone():
    raw = batch([500])
    gradients = []
    for factor in (1.0, 0.1, 0.0):
        frontend = build("layer", grad_mult=factor)
        frontend(raw).x.pow(2).sum().backward()
        gradients.append((frontend.weights[1].grad, frontend.project.weight.grad))
    assert torch.allclose(gradients[1][0], 0.1 * gradients[0][0])
    assert gradients[2][0] is None
    assert torch.equal(gradients[1][1], gradients[0][1])
    assert torch.equal(gradients[2][1], gradients[0][1])


def test_bfloat16_is_float32_within_its_precision():
    frontend = Waveform(dim=16, layers=LAYERS).eval()
    raw = batch([3000, 1500])
    raw = Raw(raw.data.float(), raw.lengths, raw.ids, raw.rate)
    exact = frontend(raw).x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = frontend(raw).x
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"layers": [[8, 2, 3]]}, "must have kernel >= stride"),
        ({"norm": "group", "bias": True}, "frontend.bias=true"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Waveform(dim=8, **settings)


@pytest.mark.parametrize("eps", [1e-5, 1e-7])
def test_what_is_added_to_the_variance_of_a_clip_is_a_setting(eps):
    loud = batch([400])
    wave = 1e-3 * loud.data
    front = build("layer", normalize_eps=eps)
    given = front(Raw(wave, loud.lengths, loud.ids, loud.rate)).feat
    front.normalize = False
    by_hand = (wave - wave.mean()) / (wave.var(unbiased=False) + eps).sqrt()
    assert torch.allclose(given, front(Raw(by_hand, loud.lengths, loud.ids, loud.rate)).feat)
