"""Ranks and nearest classes by hand; a collapsed model gets the worst of both."""

import pytest
import torch

from mmssl.evaluation.retrieval import nearest_class, partner_ranks


def at(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_ranks_by_hand() -> None:
    queries, targets = at(0, 90, 40), at(10, 35, 60)
    # 0 is nearest to 10, its own; 90 to 60 and then 35, its own; 40 to 35, then 60, its own
    assert partner_ranks(queries, targets).tolist() == [1, 2, 2]
    assert partner_ranks(7 * queries, targets / 3).tolist() == [1, 2, 2]


def test_ties_count_against_the_model() -> None:
    same = torch.ones(5, 3)
    assert partner_ranks(torch.rand(5, 3), same).tolist() == [5] * 5
    assert partner_ranks(same, at(0, 0, 90, 90, 0) @ torch.rand(2, 3)).tolist() != [1] * 5
    doubled = at(0, 0, 90)
    assert partner_ranks(doubled, doubled + 1e-9).tolist() == [2, 2, 1]


def test_many_chunks_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, targets = torch.randn(2, 50, 4)
    whole = partner_ranks(queries, targets)
    monkeypatch.setattr("mmssl.evaluation.retrieval.CHUNK", 150)
    assert torch.equal(partner_ranks(queries, targets), whole)
    table = torch.nn.functional.cosine_similarity(queries[:, None], targets[None], dim=2)
    order = table.argsort(1, descending=True)
    assert whole.tolist() == [1 + order[row].tolist().index(row) for row in range(50)]


def test_the_nearest_class_is_that_of_the_mean_of_its_prompts() -> None:
    # class 0 has prompts at 0 and 60 degrees, so it lies at 30; class 1 at 100; lengths do not count
    prompts, owners = at(0, 60, 100) * torch.tensor([[5.0], [1.0], [9.0]]), torch.tensor([0, 0, 1])
    assert nearest_class(at(30, 64, 66, 180), prompts, owners).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("queries", "targets", "sentence"),
    [
        (torch.ones(2, 3), torch.ones(3, 3), "a partner each"),
        (torch.ones(0, 3), torch.ones(0, 3), "a partner each"),
        (torch.ones(2, 3), torch.full((2, 3), torch.nan), "not finite"),
    ],
)
def test_what_cannot_be_ranked_is_refused(queries, targets, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        partner_ranks(queries, targets)
