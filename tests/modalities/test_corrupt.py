"""Ways to spoil a clip, of every modality that has some."""

import inspect
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from mmssl.modalities import MODALITIES
from mmssl.modalities.image import corrupt as image
from mmssl.modalities.speech import corrupt as speech

CASES = [(modality, kind) for modality, one in MODALITIES.items() for kind in one.corruptions]
RATE = 8000


def clip(modality: str) -> Tensor:
    rng = np.random.default_rng(0)
    if modality in ("speech", "audio"):
        # something in every band
        tone = 0.3 * torch.sin(2 * math.pi * 100 * torch.arange(4000) / RATE)
        return tone + 0.1 * torch.from_numpy(rng.standard_normal(4000).astype(np.float32))
    shape = (3, 4, 64, 96) if modality == "video" else (3, 64, 96)
    return torch.from_numpy(rng.uniform(size=shape).astype(np.float32))


def spoil(modality: str, kind: str, severity: int, seed: int = 0) -> Tensor:
    function = MODALITIES[modality].corruptions[kind]
    given: dict[str, Any] = {"rate": RATE} if "rate" in inspect.signature(function).parameters else {}
    return function(clip(modality), np.random.default_rng(seed), severity=severity, **given)


@pytest.mark.parametrize(("modality", "kind"), CASES)
def test_a_clip_keeps_its_size_and_range_and_gets_worse_with_severity(modality: str, kind: str) -> None:
    clean = clip(modality)
    spoiled = [spoil(modality, kind, severity) for severity in range(1, 6)]
    for x in spoiled:
        assert (x.shape, x.dtype) == (clean.shape, clean.dtype)
        assert bool(torch.isfinite(x).all())
        if modality in ("image", "video"):
            assert 0 <= float(x.min()) <= float(x.max()) <= 1
    far = [float((x - clean).square().mean()) for x in spoiled]
    assert far[0] > 0
    assert far[-1] > far[0] or kind == "reverberation"  # echoes are as strong in any room, and only last longer
    assert torch.equal(spoil(modality, kind, 3), spoiled[2])  # the same generator, the same clip
    assert torch.equal(clip(modality), clean)
    for severity in (0, 6):
        with pytest.raises(ValueError, match=f"severity={severity}: must be from 1 to 5"):
            spoil(modality, kind, severity)


def test_pictures_by_hand() -> None:
    rng = np.random.default_rng(0)
    x = torch.tensor([0.0, 1.0]).repeat(1, 4, 2)
    assert image.contrast(x, rng, severity=1)[0, 0].tolist() == pytest.approx([0.3, 0.7, 0.3, 0.7])
    # hue and saturation stay: all three channels by the same factor, black becomes gray
    color = torch.tensor([[0.5, 0.0], [0.25, 0.0], [0.0, 0.0]])[:, None]
    lighter = image.brightness(color, rng, severity=1)
    assert lighter[:, 0].flatten().tolist() == pytest.approx([0.6, 0.1, 0.3, 0.1, 0.0, 0.1])
    # 4 of 0.5 are 2: means of 2 x 2
    squares = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]]).repeat(2, 1)[None]
    assert image.pixelate(squares, rng, severity=2)[0, 0].tolist() == [0.5, 0.5, 1.0, 1.0]
    flat = torch.full((3, 40, 40), 0.5)
    torch.testing.assert_close(image.gaussian_blur(flat, rng, severity=5), flat)
    salt = image.impulse_noise(torch.full((1, 200, 200), 0.5), rng, severity=5)
    assert float((salt == 0).float().mean()) == pytest.approx(0.135, abs=0.01)
    assert float((salt == 1).float().mean()) == pytest.approx(0.135, abs=0.01)


def test_a_blur_of_a_point_is_the_bell_in_pixels_of_224() -> None:
    point = torch.zeros(1, 224, 224)
    point[0, 112, 112] = 1
    seen = image.gaussian_blur(point, np.random.default_rng(0), severity=2)[0]
    # a normal density of deviation 2 in each direction
    assert float(seen[112, 112]) == pytest.approx(1 / (2 * math.pi * 4), rel=0.01)
    assert float(seen[112, 114] / seen[112, 112]) == pytest.approx(math.exp(-0.5), rel=1e-4)


@pytest.mark.parametrize("severity", range(1, 6))
def test_severities_are_those_that_imagenet_c_was_made_with(severity: int) -> None:
    rng = np.random.default_rng(severity)
    gray = torch.full((3, 224, 224), 0.3)
    noise = image.gaussian_noise(torch.full((3, 224, 224), 0.5), rng, severity=severity) - 0.5
    # by the share within a tenth, where nothing is cut off: an erf of the deviation
    within = math.erf(0.1 / (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1] / math.sqrt(2))
    assert float((noise.abs() < 0.1).double().mean()) == pytest.approx(within, abs=0.005)
    hit = image.impulse_noise(gray, rng, severity=severity) != gray
    assert float(hit.double().mean()) == pytest.approx((0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1], abs=0.005)
    lighter = image.brightness(gray, rng, severity=severity)
    torch.testing.assert_close(lighter, gray + 0.1 * severity)
    ramp = torch.linspace(0, 1, 224).expand(3, 224, 224)
    flatter = image.contrast(ramp, rng, severity=severity)
    assert float(flatter.max() - flatter.min()) == pytest.approx((0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1], abs=1e-6)
    picture = torch.from_numpy(rng.integers(0, 256, (3, 224, 224), dtype=np.uint8))
    whole = Image.fromarray(picture.permute(1, 2, 0).numpy())
    sigma, share, quality = ((1, 0.6, 25), (2, 0.5, 18), (3, 0.4, 15), (4, 0.3, 10), (6, 0.25, 7))[severity - 1]
    blurred = gaussian_filter(picture.double().numpy() / 255, (0, sigma, sigma), mode="nearest")
    spoiled = image.gaussian_blur(picture.double() / 255, rng, severity=severity)
    assert np.abs(spoiled.numpy() - blurred).max() < 1e-6
    boxes = whole.resize((int(224 * share),) * 2, Image.Resampling.BOX).resize((224, 224), Image.Resampling.BOX)
    seen = image.pixelate(picture / 255, rng, severity=severity).permute(1, 2, 0).numpy() * 255
    assert np.abs(seen - np.asarray(boxes, np.float32)).max() < 1.001  # theirs is rounded across, then down
    file = io.BytesIO()
    whole.save(file, "JPEG", quality=quality)
    with Image.open(file) as stored:
        seen = image.jpeg(picture / 255, rng, severity=severity).permute(1, 2, 0).numpy() * 255
        assert np.abs(seen - np.asarray(stored, np.float32)).max() < 1e-3


def test_sound_by_hand() -> None:
    rng = np.random.default_rng(0)
    time = torch.arange(4000) / RATE
    low, high = (torch.sin(2 * math.pi * hertz * time) for hertz in (100, 3000))
    torch.testing.assert_close(speech.low_pass(low + high, rng, severity=2, rate=RATE), low, atol=1e-3, rtol=0)
    torch.testing.assert_close(speech.high_pass(low + high, rng, severity=2, rate=RATE), high, atol=1e-3, rtol=0)
    torch.testing.assert_close(speech.quiet(low, rng, severity=1), low * 10**-0.3)
    rising = torch.arange(1, 101).float()
    assert float(speech.clipping(rising, rng, severity=5).max()) == pytest.approx(60.4)  # the 0.6 quantile of 1 to 100
    wave = torch.from_numpy(rng.standard_normal(200_000).astype(np.float32))
    added = speech.noise(wave, rng, severity=3) - wave
    assert float(wave.square().mean() / added.square().mean()) == pytest.approx(10.0, rel=0.02)


def test_an_impulse_in_a_room_rings_by_60_decibels_in_its_time() -> None:
    x = torch.zeros(4000)
    x[0] = 1
    heard = speech.reverberation(x, np.random.default_rng(0), severity=2, rate=RATE)  # 0.4 s are 3,200 samples
    assert float(heard.square().mean()) == pytest.approx(float(x.square().mean()), rel=1e-4)
    assert float(heard[0].square() / heard[1:].square().sum()) == pytest.approx(1.0, rel=1e-3)
    # of noise that falls by 60 decibels over 3,200 samples the power falls by a thousandth root each 160 samples
    early, late = (float(heard[start : start + 800].square().mean()) for start in (1, 1601))
    assert 10 * math.log10(early / late) == pytest.approx(30, abs=1.5)
    assert float(heard[3200:].abs().max()) < 1e-5
