import numpy as np
import pytest
import torch

from mmssl.evaluation.novelty import auroc, distances, measure_novelty, newcombe


def test_the_distance_is_that_to_the_kth_neighbor_on_the_sphere() -> None:
    bank = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    queries = torch.tensor([[5.0, 0.0]])
    assert [float(distances(bank, queries, k=k)) for k in (1, 2, 3, 9)] == pytest.approx([0, 2**0.5, 2, 2])


def test_the_area_is_scikit_learns_with_ties_too() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for inside, outside in ((rng.random(40), rng.random(30) + 0.2), (rng.integers(0, 5, 40), rng.integers(1, 6, 30))):
        truth = np.repeat([0, 1], [40, 30])
        assert auroc(inside, outside) == pytest.approx(metrics.roc_auc_score(truth, np.append(inside, outside)))
    assert auroc(np.zeros(3), np.zeros(2)) == 0.5


def test_clips_that_lie_alike_are_ties_whatever_rounding_makes_of_them() -> None:
    bank = torch.randn(60, 24, generator=torch.Generator().manual_seed(0))
    copies = measure_novelty(bank, bank[:30].clone(), bank[30:] * 3.7, k=1)["auroc"]
    assert copies.value == 0.5
    one_way = torch.rand(60, 1, generator=torch.Generator().manual_seed(1)) * bank[:1]
    assert measure_novelty(one_way[:20], one_way[20:40], one_way[40:], k=5)["auroc"].value == 0.5


def test_the_interval_holds_its_own_equation_and_is_no_point_at_the_end() -> None:
    low, high = newcombe(0.8, 30, 20)
    assert 0 < low < 0.8 < high < 1
    for area in (low, high):
        # Hanley and McNeil's variance with both sizes at their mean, where the two differ
        balance = (30 + 20) / 2 - 1
        variance = area * (1 - area) * (1 + balance * (1 - area) / (2 - area) + balance * area / (1 + area)) / 600
        assert abs(area - 0.8) == pytest.approx(1.959964 * variance**0.5, rel=1e-5)
    low, high = newcombe(1.0, 30, 20)
    assert 0.8 < low < 1.0 == high
    assert newcombe(0.0, 30, 20) == pytest.approx((0.0, 1 - low))


def test_the_interval_covers_what_it_should() -> None:
    rng = np.random.default_rng(0)
    # areas of two normal distributions a deviation apart: the truth is known, Phi(1 / sqrt(2))
    held = 0
    for _ in range(200):
        value = auroc(rng.standard_normal(25), 1 + rng.standard_normal(25))
        low, high = newcombe(value, 25, 25)
        held += low <= 0.760250 <= high
    assert 180 <= held <= 200


def test_clips_from_elsewhere_are_told_by_their_distance() -> None:
    torch.manual_seed(0)
    train, inside = torch.randn(2, 50, 6) + torch.tensor([4.0, 0, 0, 0, 0, 0])
    outside = torch.randn(30, 6) - torch.tensor([4.0, 0, 0, 0, 0, 0])
    score = measure_novelty(train, inside, outside, k=5)["auroc"]
    assert score.value == pytest.approx(1.0)
    assert "neighbor 5 among 50 training clips" in score.protocol
    assert "50 clips from inside, 30 from outside" in score.protocol
    assert measure_novelty(train, inside, inside, k=5)["auroc"].value == pytest.approx(0.5)


def test_what_has_no_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="the bank not empty, got k = 1 and 0 clips"):
        distances(torch.zeros(0, 2), torch.ones(1, 2), k=1)
    with pytest.raises(ValueError, match="training features are not finite"):
        distances(torch.full((2, 2), torch.nan), torch.ones(1, 2), k=1)
    with pytest.raises(ValueError, match="0 clips from inside and 2 from outside"):
        auroc(np.zeros(0), np.zeros(2))
