"""SLIP: SimCLR's loss worked by hand, and what is CLIP's is CLIP's."""

import math

import pytest
import torch
import torch.nn.functional as F
from pairs import POOL, batch, encoders

from mmssl.modalities.image.views import distortions
from mmssl.nn import partners
from mmssl.nn.partners import both_ways
from mmssl.objectives.clip import CLIP
from mmssl.objectives.slip import SLIP

VIEWS = {"self_supervised": {"image": "distortions"}, "view_makers": {"image": distortions}}
BODY = {"dim": 8, "pool": {name: POOL[name] for name in ("image", "text")}}


def slip(**settings) -> SLIP:
    return SLIP(encoders("image", "text"), **BODY, **VIEWS, ssl_hidden=12, ssl_dim=6, **settings)


def by_hand(views, negatives, temperature):
    """views[clip][side]; negatives[clip]: the others."""

    def alike(a, b):
        return math.exp(sum(x * y for x, y in zip(a, b, strict=True)) / temperature)

    total = 0.0
    for i, others in enumerate(negatives):
        for side in (0, 1):
            mine, partner = views[i][side], views[i][1 - side]
            wrong = sum(alike(mine, views[j][k]) for j in others for k in (0, 1))
            total += math.log((alike(mine, partner) + wrong) / alike(mine, partner)) / 2
    return total


def test_two_views_of_three_pictures_by_hand() -> None:
    views = [[(1.0, 0.0), (0.6, 0.8)], [(0.0, 1.0), (-0.6, 0.8)], [(-1.0, 0.0), (0.8, -0.6)]]
    own = torch.arange(3)
    for equal, negatives in (
        (torch.eye(3).bool(), [[1, 2], [0, 2], [0, 1]]),
        (torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool(), [[2], [2], [0, 1]]),
    ):
        found = torch.tensor(views)
        losses, told = both_ways(found, found, own, scale=2.0, within=True, negatives=~equal)
        assert losses.sum().item() == pytest.approx(by_hand(views, negatives, 0.5), rel=1e-5)
    # where 0 and 1 are the same: (1, 0) has .6 with its partner and .8 with a view of 2, the other three of them are
    # right, and both views of 2 have -.8 with each other; each counts half
    assert told["accuracy"][0].item() == 1.5


def test_pictures_that_are_not_there_are_told_from_nothing() -> None:
    views = torch.nn.functional.normalize(torch.randn(4, 2, 5), dim=2)
    own, here = torch.arange(4), torch.tensor([True, False, True, True])
    negatives = here.expand(4, 4)
    losses, told = both_ways(views, views, own, scale=10.0, within=True, present=here, negatives=negatives)
    some = views[here]
    expected, told_some = both_ways(some, some, torch.arange(3), scale=10.0, within=True)
    assert losses[1] == 0
    assert torch.allclose(losses[here], expected)
    assert told == told_some


def test_without_views_it_is_clip() -> None:
    model = slip(ssl_weight=0.0)
    clip = CLIP(encoders("image", "text"), **BODY)
    clip.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("heads")})
    ours, theirs = model(batch()), clip(batch())
    assert torch.allclose(ours.total, theirs.total)
    assert ours.count == theirs.count


def test_the_views_weigh_as_much_as_is_said() -> None:
    once, twice = slip(ssl_weight=1.0)(batch()), slip(ssl_weight=2.0)(batch())
    clip, views = (float(once.metrics[name][0]) for name in ("clip_loss", "view_loss"))
    assert views > 0
    assert once.total.item() == pytest.approx(clip + views, rel=1e-5)
    assert twice.total.item() == pytest.approx(clip + 2 * views, rel=1e-5)


def test_the_views_weigh_as_much_among_three_modalities() -> None:
    names = "image", "text", "speech"
    model = SLIP(encoders(*names), dim=8, pool=POOL, **VIEWS, ssl_hidden=12, ssl_dim=6)
    found = model(batch(*names))
    total, count = found.metrics["loss"]
    parts = [found.metrics[name] for name in ("clip_loss", "view_loss")]
    assert (count, [of for _, of in parts]) == (12, [12, 4])
    assert float(total) / count == pytest.approx(sum(float(value) / of for value, of in parts), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": 0.0}, "objective.temperature=0: must be from 0.01 to 1"),
        ({"ssl_temperature": 0.0}, "objective.ssl_temperature=0: must be above 0"),
        ({"self_supervised": {}, "view_makers": {}}, "names no modality whose views are compared; choose clip"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(settings, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        SLIP(encoders("image", "text"), **BODY, **{**VIEWS, **settings})


@pytest.mark.parametrize("within", [False, True])
def test_rows_that_are_told_in_parts_are_told_the_same(monkeypatch: pytest.MonkeyPatch, within: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = F.normalize(torch.randn(7, 2, 5, generator=generator), dim=2)
    here = torch.tensor([True, True, False, True, True, True, True])
    negatives = torch.rand(7, 7, generator=generator) < 0.7
    found = []
    for most in (2**21, 15, 1):  # all rows, two at a time, one at a time
        monkeypatch.setattr(partners, "_LOGITS", most)
        pairs, scale = start.clone().requires_grad_(), torch.tensor(8.0, requires_grad=True)
        given = {"scale": scale, "within": within, "present": here, "negatives": negatives}
        losses, told = both_ways(pairs, pairs, torch.arange(7), **given)
        losses.sum().backward()
        found.append([losses.detach(), pairs.grad, scale.grad, told["accuracy"][0], told["chance_accuracy"][0]])
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-5, atol=1e-6)
