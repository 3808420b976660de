"""Ranks and nearest classes by hand; a collapsed model gets the worst of both."""

import pytest
import torch

from mmssl.evaluation.retrieval import nearest_class, partner_ranks, recall_by_chance, retrieve


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


def test_the_nearest_of_several_right_ones_counts() -> None:
    queries, targets = at(0, 90, 40, 20), at(10, 35, 60, 80)
    # own alone: 0 at 10; 90 has 80 and 60 before 35; 40 has 35 before 60; 20 has all three before 80
    assert partner_ranks(queries, targets).tolist() == [1, 3, 2, 4]
    # rows 1 and 3 agree: 90 is nearest to 80, which is right; 20 has 10 before 35
    assert partner_ranks(queries, targets, torch.tensor([7, 3, 8, 3])).tolist() == [1, 1, 2, 2]
    assert partner_ranks(queries, targets, torch.zeros(4)).tolist() == [1] * 4


def test_right_ones_that_tie_are_no_errors_and_wrong_ones_are() -> None:
    # one point for everything: of five targets two are right and three wrong, which stand before them
    assert partner_ranks(torch.ones(5, 3), torch.ones(5, 3), torch.tensor([0, 0, 1, 1, 1])).tolist() == [4, 4, 3, 3, 3]


def test_chance_is_that_of_a_right_one_among_the_first() -> None:
    # of 4 targets 2 are right: first 1 of 2; among two all but one of the six pairs; among three always
    assert [recall_by_chance(k, torch.full((4,), 2)) for k in (1, 2, 3)] == pytest.approx([1 / 2, 5 / 6, 1])
    # one alone: k of n, and never above one; a mean over queries: 1/4 and three times 3/4
    alone = torch.ones(4, dtype=torch.int64)
    assert [recall_by_chance(k, alone) for k in (1, 3, 9)] == pytest.approx([1 / 4, 3 / 4, 1])
    assert recall_by_chance(1, torch.tensor([1, 3, 3, 3])) == pytest.approx(10 / 16)


def test_many_chunks_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, targets = torch.randn(2, 50, 4)
    whole = partner_ranks(queries, targets)
    same = torch.arange(50) % 20
    by_same = partner_ranks(queries, targets, same)
    monkeypatch.setattr("mmssl.evaluation.retrieval.CHUNK", 150)
    assert torch.equal(partner_ranks(queries, targets), whole)
    assert torch.equal(partner_ranks(queries, targets, same), by_same)
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


def test_finding_clips_of_a_class_by_hand() -> None:
    # from 0: 10 (wrong), 30 (right), 70; from 10: 0, 30, 70, of which none is right; from 30: 10, 0, 70; 70 has none
    scores = retrieve(at(0, 10, 30, 70), torch.tensor([5, 6, 5, 6]))
    # right ones at 2 of 3; at 3; at 2; at 2 (10 lies 60 away, 30 lies 40 away)
    assert scores["map"].value == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    assert [scores[f"at_{k}"].value for k in (1, 5)] == [0, 1]
    assert scores["at_1"].details["chance"] == pytest.approx(1 / 3)
    assert "median rank of the first 2" in scores["map"].protocol


def test_precision_is_that_of_scikit_learn_where_nothing_ties() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    queries, bank = torch.randn(20, 6), torch.randn(57, 6)
    labels, bank_labels = torch.arange(20) % 4, torch.arange(57) % 3
    found = retrieve(queries, labels, bank, bank_labels)
    table = torch.nn.functional.cosine_similarity(queries[:, None].double(), bank[None].double(), dim=2)
    asked = labels < 3  # the bank has no class 3
    by_query = [
        metrics.average_precision_score((bank_labels == label).numpy(), row.numpy())
        for row, label in zip(table[asked], labels[asked], strict=True)
    ]
    assert found["map"].value == pytest.approx(sum(by_query) / len(by_query))
    assert found["map"].n == 15
    assert "among 57 clips of train" in found["map"].protocol
    assert "5 clips of a class with nothing to be found left out" in found["map"].protocol
    first = bank_labels[table[asked].argmax(1)] == labels[asked]
    assert found["at_1"].value == pytest.approx(float(first.double().mean()))


def test_one_point_for_everything_finds_its_class_last(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(24) % 12  # one other of its class among 23: behind all 22 wrong ones
    scores = retrieve(torch.ones(24, 3), labels)
    assert scores["map"].value == pytest.approx(1 / 23)
    assert scores["at_10"].value == 0
    monkeypatch.setattr("mmssl.evaluation.retrieval.CHUNK", 50)
    mixed = torch.randn(24, 3)
    chunked = retrieve(mixed, labels)["map"].value
    monkeypatch.undo()
    assert chunked == pytest.approx(retrieve(mixed, labels)["map"].value)


def test_classes_that_cannot_be_found_are_refused() -> None:
    with pytest.raises(ValueError, match="0 clips have another of their class to be found"):
        retrieve(torch.randn(3, 2), torch.arange(3))
    with pytest.raises(ValueError, match="features that are not finite"):
        retrieve(torch.full((3, 2), torch.nan), torch.zeros(3, dtype=torch.int64))
