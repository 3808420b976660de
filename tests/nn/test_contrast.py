import math

import pytest
import torch

from mmssl.nn.contrast import contrast, contrast_metrics, draw_negatives

SEEDS = torch.arange(4) + 11


def test_negatives_are_never_the_token_itself_and_never_another_clips() -> None:
    counts = torch.tensor([2, 0, 7, 3])
    negatives = draw_negatives(counts, 50, SEEDS)
    own = torch.cat([torch.arange(n) for n in counts.tolist()])
    size = counts.repeat_interleave(counts)
    assert negatives.shape == (12, 50)
    assert (negatives != own[:, None]).all()
    assert ((negatives >= 0) & (negatives < size[:, None])).all()
    assert set(negatives[2].tolist()) == set(range(1, 7))  # the first of seven meets all six others


def test_negatives_are_uniform_over_the_other_tokens() -> None:
    """Chi-square over the 5 others of each of 6 tokens: 24 degrees of freedom, 51.2 is passed once in a thousand."""
    negatives = draw_negatives(torch.tensor([6]), 6000, torch.tensor([3]))
    seen = torch.stack([row.bincount(minlength=6) for row in negatives]).double()
    assert seen.diagonal().tolist() == [0.0] * 6
    others = seen[~torch.eye(6, dtype=torch.bool)]
    assert float(((others - 1200) ** 2 / 1200).sum()) < 51.2


def test_a_clip_has_the_same_negatives_in_every_batch() -> None:
    together = draw_negatives(torch.tensor([4, 9]), 5, torch.tensor([1, 2]))
    assert torch.equal(together[4:], draw_negatives(torch.tensor([9]), 5, torch.tensor([2])))
    assert not torch.equal(together[:4], draw_negatives(torch.tensor([4]), 5, torch.tensor([2])))


def test_no_token_gives_no_negatives() -> None:
    assert draw_negatives(torch.tensor([0, 0]), 5, torch.tensor([1, 2])).shape == (0, 5)


def test_contrast_is_the_cosine_with_the_own_target_and_the_drawn_ones() -> None:
    torch.manual_seed(0)
    counts = torch.tensor([3, 0, 5])
    prediction, target = torch.randn(8, 4), torch.randn(8, 4)
    negatives = draw_negatives(counts, 6, SEEDS[:3])
    logits = contrast(prediction, target, torch.arange(8), negatives, counts)
    first = torch.tensor([0, 0, 0, 3, 3, 3, 3, 3])
    rivals = target[first[:, None] + negatives]
    expected = torch.cosine_similarity(prediction[:, None], torch.cat([target[:, None], rivals], 1), dim=-1)
    torch.testing.assert_close(logits, expected)


def test_a_negative_that_equals_the_positive_does_not_count() -> None:
    target = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    negatives = torch.tensor([[1, 2], [2, 0], [0, 1]])
    logits = contrast(target, target, torch.tensor([7, 7, 9]), negatives, torch.tensor([3]))
    assert logits.tolist() == [[1.0, -math.inf, 0.0], [1.0, 0.0, -math.inf], [1.0, 0.0, 0.0]]


def test_contrast_stays_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    x, negatives = torch.randn(5, 64), draw_negatives(torch.tensor([5]), 3, SEEDS[:1])
    exact = contrast(x, x, torch.arange(5), negatives, torch.tensor([5]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrast(x, x, torch.arange(5), negatives, torch.tensor([5])), exact)


def test_accuracy_does_not_count_ties_or_frames_without_negatives() -> None:
    inf = math.inf
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, -inf, -inf], [0.0, 1.0, -1.0], [0.5, -inf, 0.4]])
    metrics = contrast_metrics(logits)
    assert metrics["accuracy"] == 2
    assert metrics["chance_accuracy"].item() == pytest.approx(3 * (1 / 3) + 1 / 2)
    assert metrics["chance"].item() == pytest.approx(3 * math.log(3) + math.log(2))
