import numpy as np
import pytest
import torch

from mmssl.evaluation.clusters import cluster, contingency, mutual_information, rand_index


def test_both_measures_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for classes, clusters, n in ((2, 2, 9), (3, 5, 40), (10, 4, 200), (1, 3, 12), (3, 1, 12), (1, 1, 5)):
        truth, found = rng.integers(classes, size=n), rng.integers(clusters, size=n)
        truth[:classes], found[:clusters] = range(classes), range(clusters)
        table = contingency(truth, found)
        theirs = metrics.normalized_mutual_info_score(truth, found), metrics.adjusted_rand_score(truth, found)
        assert (mutual_information(table)[0], rand_index(table)[0]) == pytest.approx(theirs, abs=1e-12)


def test_measures_by_hand() -> None:
    # two classes of two, one clip astray: both entropies are of 1/2, 1/2 and of 3/4, 1/4
    table = np.array([[2, 0], [1, 1]])
    classes, clusters = np.log(2), 2 * np.log(2) - 0.75 * np.log(3)
    shared = classes + clusters - 1.5 * np.log(2)
    assert mutual_information(table)[0] == pytest.approx(shared / ((classes + clusters) / 2))
    # 1 pair together in both, 2 in classes, 3 in clusters, of 6: (1 - 1) / (2.5 - 1)
    assert rand_index(table)[0] == pytest.approx(0.0)
    assert mutual_information(np.diag([3, 2]))[0] == rand_index(np.diag([3, 2]))[0] == pytest.approx(1.0)


@pytest.mark.parametrize("statistic", [mutual_information, rand_index])
def test_what_is_left_out_is_left_out(statistic: object) -> None:
    table = np.array([[4, 1, 0], [0, 2, 3]])
    _, without, counts = statistic(table)  # type: ignore[operator]
    cells = np.argwhere(table)
    assert counts.tolist() == table[table > 0].tolist()
    for (row, column), value in zip(cells, without, strict=True):
        less = table.copy()
        less[row, column] -= 1
        assert value == pytest.approx(statistic(less)[0])  # type: ignore[operator]


def test_clips_that_lie_apart_are_found_whatever_their_length() -> None:
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    directions = torch.eye(8)[labels] + 0.01 * torch.randn(60, 8)
    scores = cluster(directions * (0.1 + 9 * torch.rand(60, 1)), labels)
    assert scores["nmi"].value == scores["ari"].value == pytest.approx(1.0)
    assert "3 clusters" in scores["nmi"].protocol
    assert str(scores["ari"]).startswith("cluster: adjusted Rand index 1 (95 % interval")
    mixed = cluster(torch.randn(60, 8), labels)
    assert mixed["ari"].value < 0.2
    assert mixed["ari"].low < mixed["ari"].value < mixed["ari"].high


def test_what_cannot_be_clustered_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two classes, got 3 of 1"):
        cluster(torch.randn(3, 2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="not finite"):
        cluster(torch.full((3, 2), torch.nan), torch.arange(3))
