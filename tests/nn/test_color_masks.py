"""Masks of colored noise: an exact ratio, the frequencies of their color, no place preferred."""

import math

import pytest
import torch

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.video.frontend import Tubes
from mmssl.nn.masking import COLORS, color_mask, random_mask
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.mae import MAE
from mmssl.types import Batch, Raw


def raw_pictures(n, height=14, width=14):
    return Raw(torch.rand(n, 1, height, width), torch.ones(n, dtype=torch.int64), [str(i) for i in range(n)])


def patches(dim=4):
    return Patches(dim=dim, size=(1, 1), channels=1, mean=[0.5], std=[0.5])


def clips(lengths, height=4, width=6):
    raw = Raw(torch.rand(len(lengths), 1, max(lengths), height, width), torch.tensor(lengths), ["a"] * len(lengths))
    return Tubes(dim=4, size=(2, 1, 1), channels=1, mean=[0.5], std=[0.5])(raw)


each_color = pytest.mark.parametrize("color", COLORS)


@each_color
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75])
def test_the_share_is_exact_in_every_clip(color, ratio):
    plan = color_mask(patches()(raw_pictures(5)), color=color, ratio=ratio, seeds=torch.arange(5))
    assert plan.masked.sum(1).tolist() == [round(ratio * 196)] * 5
    assert plan.keep_lengths.tolist() == [196 - round(ratio * 196)] * 5


@each_color
def test_the_mask_of_a_clip_is_its_own_in_any_batch(color):
    together = color_mask(clips([8, 4, 6]), color=color, ratio=0.5, seeds=torch.tensor([7, 9, 3]))
    alone = color_mask(clips([4]), color=color, ratio=0.5, seeds=torch.tensor([9]))
    assert torch.equal(together.masked[1, :48], alone.masked[0])
    assert together.masked.sum(1).tolist() == [48, 24, 36]
    assert not together.masked[1, 48:].any()


@each_color
def test_places_are_drawn_evenly(color):
    plan = color_mask(patches()(raw_pictures(2000, 4, 6)), color=color, ratio=0.5, seeds=torch.arange(2000))
    # 0.5 plus or minus five standard errors
    assert (plan.masked.float().mean(0) - 0.5).abs().max() < 5 * (0.25 / 2000) ** 0.5


def test_two_places_are_alike_as_often_as_the_difference_of_two_gaussians_says():
    """The sign of normal noise of correlation r agrees with its neighbor's by 2 / pi asin r; of white noise by 0."""
    tokens, seeds = patches()(raw_pictures(300, 16, 16)), torch.arange(300)

    def alike(plan, distance):
        grid = 2.0 * plan.masked.view(-1, 16, 16) - 1
        return float((grid * grid.roll(distance, 2)).mean())

    def product(distance):
        """Of a blur of deviation 0.5 less one of 2 with itself, so far apart."""
        terms = ((1, 0.5**2 + 0.5**2), (-2, 0.5**2 + 2**2), (1, 2**2 + 2**2))
        return sum(sign * math.exp(-(distance**2) / (2 * variance)) / variance for sign, variance in terms)

    green = color_mask(tokens, color="green", ratio=0.5, seeds=seeds)
    white = random_mask(tokens.lengths, ratio=0.5, seeds=seeds)
    for distance in (1, 2, 4):
        expected = 2 / math.pi * math.asin(product(distance) / product(0))
        # five errors of a mean of 76,800 values of +-1; hiding exactly half takes 1 / 255 off
        assert alike(green, distance) == pytest.approx(expected - 1 / 255, abs=0.018)
        assert alike(white, distance) == pytest.approx(-1 / 255, abs=0.018)
    assert alike(green, 1) > 0.1
    assert alike(green, 2) < -0.03


# color -> whether low, middle and high frequencies are stronger than in white noise
BANDS = {
    "red": (True, False, False),
    "blue": (False, False, True),
    "green": (False, True, False),
    "purple": (True, False, True),
}


@each_color
def test_a_mask_has_the_frequencies_of_its_color(color):
    """By the power of the mask as +-1, whose mean over all frequencies but 0 is that of white noise, 1."""
    plan = color_mask(patches()(raw_pictures(300, 16, 16)), color=color, ratio=0.5, seeds=torch.arange(300))
    power = torch.fft.fft2(2.0 * plan.masked.view(-1, 16, 16) - 1).abs().square().mean(0) / 256
    across = torch.fft.fftfreq(16)
    distance = (across[:, None].square() + across.square()).sqrt()
    assert float(power[distance > 0].mean()) == pytest.approx(256 / 255)
    for (low, high), stronger in zip(((0, 0.1), (0.18, 0.3), (0.45, 1.0)), BANDS[color], strict=True):
        band = float(power[(distance > low) & (distance <= high)].mean())
        assert band > 1.1 if stronger else band < 0.85


def test_a_share_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"mask_ratio=1\.0: .* between 0 and 1"):
        color_mask(patches()(raw_pictures(1)), color="green", ratio=1.0, seeds=torch.arange(1))


@each_color
def test_an_autoencoder_takes_it_by_name(color):
    torch.manual_seed(0)
    frontend = patches(16)
    encoder = Encoder(frontend, Transformer(dim=16, depth=1, heads=2), SinCos(16))
    sizes = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    model = MAE(encoder, target=lambda raw, tokens: tokens.feat, target_dim=1, mask=color, **sizes)
    loss = model(Batch({"image": raw_pictures(3, 4, 6)}, torch.arange(3)))
    assert loss.count == 3 * 18
