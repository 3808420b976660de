"""CLIP-Lite: values worked by hand, and which other clip a pair is told from."""

import math

import pytest
import torch
from pairs import batch, given

from mmssl.objectives.clip_lite import CLIPLite, next_other


def nats(logit: float) -> float:
    """Of the answer yes to a logit."""
    return math.log1p(math.exp(-logit))


def test_three_pairs_by_hand() -> None:
    pictures, texts = [(1.0, 0.0), (0.0, 1.0), (0.6, 0.8)], [(1.0, 0.0), (0.8, 0.6), (0.0, -1.0)]
    model = given(CLIPLite, list(zip(pictures, texts, strict=True)), temperature=0.5)
    loss = model(batch(rows=(0, 1, 2)))

    def cosine(i: int, j: int) -> float:
        return sum(x * y for x, y in zip(pictures[i], texts[j], strict=True))

    # their seeds are 0, 2 and 4: the second follows the first, the third the second, and the first the third
    expected = sum(nats(2 * cosine(i, i)) + nats(-2 * cosine(i, j)) for i, j in ((0, 1), (1, 2), (2, 0)))
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)
    assert loss.count == 3
    # 1 > .8, .6 > -1, and -.8 is not above .6
    assert float(loss.metrics["accuracy"][0]) == 2


def test_the_negative_is_the_next_that_is_another() -> None:
    seeds, has = torch.tensor([30, 10, 50, 20, 40]), torch.tensor([True, True, True, False, True])
    own = torch.tensor([0, 1, 2, 4])
    # in the order of seeds, of those that have it: 1, 0, 4, 2
    assert next_other(own, seeds, has, torch.arange(5)).tolist() == [[0, 1, 2, 4], [4, 0, 1, 2]]
    ids = torch.tensor([7, 7, 8, 7, 7])
    assert next_other(own, seeds, has, ids).tolist() == [[0, 1, 2, 4], [2, 2, 1, 2]]
    assert next_other(own, seeds, has, torch.full((5,), 7)).tolist() == [[], []]
    assert next_other(torch.tensor([2]), seeds, torch.arange(5) == 2, torch.arange(5)).tolist() == [[], []]


def test_pairs_that_have_no_other_are_not_counted() -> None:
    vectors = [[[1, 0], [0, 1]], [[0, 1], [1, 0]], [[1, 0], [1, 1]]]
    model = given(CLIPLite, vectors, same="text")
    loss = model(batch(rows=(0, 1, 2), labels=[5, 5, 5]))
    assert loss.count == 0
    assert loss.total.item() == 0
    loss.total.backward()
    assert model.log_scale.grad is not None
    assert model(batch(rows=(0, 1, 2), labels=[5, 5, 6])).count == 3


def test_the_scale_stays_within_one_and_a_hundred() -> None:
    model = given(CLIPLite, [[[1, 0], [1, 0]]])
    for value, kept in ((9.0, 100.0), (-3.0, 1.0)):
        model.log_scale.data.fill_(value)
        model.after_step(1)
        assert model.log_scale.exp().item() == pytest.approx(kept)


def test_a_temperature_out_of_range_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="objective.temperature=2: must be from 0.01 to 1"):
        given(CLIPLite, [[[1, 0], [1, 0]]], temperature=2.0)
