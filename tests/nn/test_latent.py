"""Targets from layers: norms over real tokens only, the mean worked by hand, the error of the paper."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmssl.nn.latent import average_layers, instance_norm, regression, top_layers
from mmssl.nn.teacher import ema_decay

LENGTHS = torch.tensor([9, 5, 1])


def layer(seed):
    x = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(seed)) * 3 + 2
    return x * (torch.arange(9) < LENGTHS[:, None])[..., None]


def test_instance_norm_of_each_clip_is_torchs_without_its_padding():
    ours = instance_norm(layer(0), LENGTHS)
    for row, n in enumerate(LENGTHS.tolist()):
        alone = layer(0)[row : row + 1, :n]
        if n > 1:  # torch refuses a single token, whose deviation is 0
            torch.testing.assert_close(ours[row : row + 1, :n], F.instance_norm(alone.transpose(1, 2)).transpose(1, 2))
        torch.testing.assert_close(instance_norm(alone, torch.tensor([n])), ours[row : row + 1, :n])
        assert not ours[row, n:].any()
    assert not ours[2].any()


def test_a_target_is_the_mean_of_normalized_layers_worked_by_hand():
    # one channel, two tokens: each layer becomes -1, 1 or 1, -1 whatever its scale, so the two cancel
    up, down = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[90.0], [10.0]]])
    settings = {"lengths": torch.tensor([2]), "target_norm": "none"}
    torch.testing.assert_close(
        average_layers([up, up], layer_norm="instance", **settings), torch.tensor([[[-1.0], [1.0]]]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        average_layers([up, down], layer_norm="instance", **settings), torch.zeros(1, 2, 1), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        average_layers([up, down], layer_norm="none", **settings), torch.tensor([[[45.5], [6.5]]])
    )


@pytest.mark.parametrize("layer_norm", ["none", "layer", "instance"])
@pytest.mark.parametrize("target_norm", ["none", "layer", "instance"])
def test_a_clips_target_is_the_same_alone_and_beside_a_longer_one(layer_norm, target_norm):
    settings = {"layer_norm": layer_norm, "target_norm": target_norm}
    together = average_layers([layer(0), layer(1)], LENGTHS, **settings)
    for row, n in enumerate(LENGTHS.tolist()):
        alone = average_layers([layer(i)[row : row + 1, :n] for i in (0, 1)], LENGTHS[row : row + 1], **settings)
        torch.testing.assert_close(together[row, :n], alone[0])
        assert not together[row, n:].any()


def test_a_target_is_float32_whatever_the_layers_are():
    given = [layer(0).bfloat16(), layer(1).bfloat16()]
    exact = average_layers([x.float() for x in given], LENGTHS, layer_norm="instance", target_norm="layer")
    ours = average_layers(given, LENGTHS, layer_norm="instance", target_norm="layer")
    assert ours.dtype == torch.float32
    assert torch.equal(ours, exact)


def test_the_error_worked_by_hand():
    prediction, target = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0]]), torch.zeros(2, 4)
    # (1 + 4) / 2 and 25 / 2
    assert regression(prediction, target, beta=0.0).tolist() == [2.5, 12.5]
    # below beta e^2 / (2 beta), above it e - beta / 2: (1 / 4 + 4 / 4) / 2, and (5 - 1) / 2
    assert regression(prediction, target, beta=2.0).tolist() == [0.625, 2.0]


def test_the_last_layers_are_averaged():
    assert top_layers(12, 8) == [5, 6, 7, 8, 9, 10, 11, 12]
    for wrong in (0, 13):
        with pytest.raises(ValueError, match=rf"objective.top_k={wrong}: choose from 1 to transformer.depth=12"):
            top_layers(12, wrong)


def test_the_decay_goes_evenly_over_its_updates_and_stays():
    decays = [ema_decay(step, first=0.9, last=0.99, updates=3) for step in range(1, 6)]
    for ours, expected in zip(decays, [0.93, 0.96, 0.99, 0.99, 0.99], strict=True):
        assert math.isclose(ours, expected)
    assert ema_decay(1, first=0.9, last=0.99, updates=0) == 0.99
