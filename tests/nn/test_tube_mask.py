"""Tube masks: the same places in every step, whatever the clip's length or its batch."""

import pytest
import torch

from mmssl.encoder import Encoder
from mmssl.modalities.speech.logmel import LogMel
from mmssl.modalities.video.frontend import Tubes
from mmssl.nn.masking import tube_mask
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.mae import MAE
from mmssl.types import Raw


def tokens(lengths, height=14, width=14):
    clips = torch.rand(len(lengths), 1, max(lengths), height, width)
    raw = Raw(clips, torch.tensor(lengths), [str(i) for i in range(len(lengths))])
    return Tubes(dim=4, size=(2, 1, 1), channels=1, mean=[0.5], std=[0.5])(raw)


def test_videomae_leaves_160_of_1568_tokens():
    plan = tube_mask(tokens([16, 16]), ratio=0.9, seeds=torch.tensor([3, 4]))
    assert plan.masked.sum(1).tolist() == [8 * 176, 8 * 176]
    assert plan.keep_lengths.tolist() == [160, 160]


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5)])
def test_a_place_is_hidden_in_all_steps_or_in_none(height, width):
    plan = tube_mask(tokens([8, 4, 2], height, width), ratio=0.6, seeds=torch.arange(3))
    hidden = plan.masked.view(3, 4, -1)
    for row, steps in enumerate((4, 2, 1)):
        assert (hidden[row, :steps] == hidden[row, 0]).all()
        assert not hidden[row, steps:].any()
        assert hidden[row, 0].sum() == round(0.6 * height * width)
        assert plan.keep_lengths[row] == steps * (height * width - round(0.6 * height * width))


def test_the_mask_of_a_clip_is_its_own_in_any_batch():
    together = tube_mask(tokens([8, 4], 4, 4), ratio=0.5, seeds=torch.tensor([7, 9]))
    alone = tube_mask(tokens([4], 4, 4), ratio=0.5, seeds=torch.tensor([9]))
    assert torch.equal(together.masked[1, : 2 * 16], alone.masked[0])


def test_places_are_drawn_evenly():
    plan = tube_mask(tokens([2] * 2000, 2, 4), ratio=0.5, seeds=torch.arange(2000))
    # 0.5 plus or minus five standard errors
    assert (plan.masked.float().mean(0) - 0.5).abs().max() < 5 * (0.25 / 2000) ** 0.5


def test_sound_has_no_places():
    raw = Raw(torch.rand(1, 1600), torch.tensor([1600]), ["a"], 16000.0)
    with pytest.raises(ValueError, match="objective.mask=tube: .* these tokens lie on t; choose random"):
        tube_mask(LogMel(dim=4)(raw), ratio=0.5, seeds=torch.arange(1))


def test_a_mask_that_does_not_exist_is_answered_with_those_that_do():
    encoder = Encoder(Tubes(dim=6), Transformer(dim=6, depth=1, heads=1), SinCos(6))
    with pytest.raises(ValueError, match="objective.mask='cube': choose one of random, tube, red, blue, green, purple"):
        MAE(encoder, target=lambda raw, tokens: tokens.feat, target_dim=1536, mask="cube")
