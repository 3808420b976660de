import pytest
import torch
from torch import Tensor

from mmssl.evaluation import knn
from mmssl.evaluation.knn import fit_knn, knn_predict


def directions(*degrees: float) -> Tensor:
    """Vectors at these angles, of different lengths, which must not matter."""
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], 1) * torch.arange(1.0, len(degrees) + 1)[:, None]


def test_near_neighbors_outweigh_many_far_ones() -> None:
    # cosines 1, .5, .5 at T = .07: e^14.29 for class 1 against 2 e^7.14 for class 0
    bank, labels = directions(0, 60, -60), torch.tensor([1, 0, 0])
    assert knn_predict(bank, labels, directions(0), k=3).tolist() == [1]
    # at T = 1 the votes are e and 2 sqrt(e): 2.72 against 3.30
    assert knn_predict(bank, labels, directions(0), k=3, temperature=1.0).tolist() == [0]
    assert knn_predict(bank, labels, directions(0), k=1, temperature=1.0).tolist() == [1]


def test_of_equally_near_clips_the_first_in_the_bank_are_neighbors() -> None:
    same = directions(30).expand(5, 2)
    assert knn_predict(same, torch.tensor([2, 2, 0, 0, 0]), directions(0), k=3).tolist() == [2]
    assert knn_predict(same, torch.tensor([0, 0, 2, 2, 2]), directions(0), k=3).tolist() == [0]


def test_of_equally_heavy_classes_the_lowest_wins() -> None:
    bank = directions(30, -30)
    assert knn_predict(bank, torch.tensor([3, 1]), directions(0), k=2).tolist() == [1]


def test_votes_follow_the_formula_on_random_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(40, 6, generator=generator), torch.randn(25, 6, generator=generator)
    labels = torch.randint(0, 4, (40,), generator=generator)
    expected = []
    for query in queries:
        cosines = torch.cosine_similarity(bank, query[None])
        votes = [0.0] * 4
        for place in cosines.argsort(descending=True)[:7].tolist():
            votes[int(labels[place])] += float((cosines[place] / 0.1).exp())
        expected.append(votes.index(max(votes)))
    assert knn_predict(bank, labels, queries, k=7, temperature=0.1).tolist() == expected
    monkeypatch.setattr(knn, "CHUNK", 40 * 4)  # 25 queries in pieces of 4
    assert knn_predict(bank, labels, queries, k=7, temperature=0.1).tolist() == expected


def test_more_neighbors_than_clips_take_all_clips() -> None:
    assert knn_predict(directions(0, 90), torch.tensor([0, 1]), directions(10), k=20).tolist() == [0]


def test_k_is_chosen_on_validation() -> None:
    # one clip of class 1 sits among those of class 0: the nearest neighbor is wrong, the vote of all is right
    bank, labels = directions(0, 4, 8, 12, 6), torch.tensor([0, 0, 0, 0, 1])
    fitted = fit_knn((bank, labels), (directions(6), torch.tensor([0])), k=(1, 5))
    assert fitted.details["k"] == 5
    assert fitted.valid_accuracy == 1.0
    with pytest.raises(ValueError, match="validation"):
        fit_knn((bank, labels), None, k=(1, 5))


def test_what_cannot_be_compared_is_refused() -> None:
    bank, labels = directions(0, 90), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="not finite"):
        knn_predict(bank, labels, torch.full((1, 2), torch.nan))
    with pytest.raises(ValueError, match="one width"):
        knn_predict(bank, labels, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="temperature above 0"):
        knn_predict(bank, labels, directions(0), temperature=0.0)
