from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmssl.evaluation.knn import fit_knn
from mmssl.evaluation.probe import fit_linear
from mmssl.evaluation.protocol import (
    Fitted,
    Folds,
    Known,
    Split,
    balanced_accuracy,
    draw_labels,
    hold_out,
    leave_out,
    measure,
)

LABELS = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 0])


def plain(train: Known, valid: Known | None = None, folds: Folds | None = None) -> Fitted:
    """Predicts a clip's first feature, whatever it was fitted on."""

    def predict(x: Tensor) -> Tensor:
        return x[:, 0].long()

    accuracy = None if valid is None else float((predict(valid[0]) == valid[1]).double().mean())
    return Fitted(predict, accuracy, f"plain, {len(train[0])} clips")


def test_few_labels_are_drawn_of_every_class_and_repeatably() -> None:
    places = draw_labels(LABELS, per_class=2, seed=3)
    assert LABELS[places].bincount().tolist() == [2, 2]
    assert torch.equal(places, draw_labels(LABELS, per_class=2, seed=3))
    assert len({tuple(draw_labels(LABELS, per_class=2, seed=seed).tolist()) for seed in range(5)}) > 1
    assert LABELS[draw_labels(LABELS, share=0.5)].bincount().tolist() == [3, 2]
    assert LABELS[draw_labels(LABELS, share=0.01)].bincount().tolist() == [1, 1]


def test_more_labels_than_a_class_has_are_refused() -> None:
    with pytest.raises(ValueError, match="class 1 has 4 labels, and 5"):
        draw_labels(LABELS, per_class=5)
    with pytest.raises(ValueError, match="either"):
        draw_labels(LABELS)


def test_clips_set_aside_are_not_fitted_on() -> None:
    rest, held = hold_out(LABELS, share=0.25)
    assert sorted([*rest.tolist(), *held.tolist()]) == list(range(10))
    assert LABELS[held].bincount().tolist() == [2, 1]


def test_the_layer_is_chosen_on_validation_whatever_the_test_says() -> None:
    right, wrong = LABELS[:, None].double(), 1 - LABELS[:, None].double()
    train = Split({0: wrong, 1: wrong, 2: wrong}, LABELS)
    valid = Split({0: wrong, 1: right, 2: right}, LABELS)
    test = Split({0: right, 1: wrong, 2: right}, LABELS)
    score = measure(plain, train, valid, test, task="plain")
    assert score.details["layer"] == 1  # of the two that are equal on validation the lower
    assert score.value == 0.0
    assert "layer 1 of 3, on validation" in score.protocol
    with pytest.raises(ValueError, match="validation"):
        measure(plain, train, None, test, task="plain")


def test_the_test_set_is_touched_once() -> None:
    asked: list[int] = []

    def counting(train: Known, valid: Known | None = None, folds: Folds | None = None) -> Fitted:
        fitted = plain(train, valid)

        def predict(x: Tensor) -> Tensor:
            asked.append(len(x))
            return fitted.predict(x)

        return Fitted(predict, fitted.valid_accuracy, "counting")

    features = {layer: LABELS[:, None].double() for layer in range(4)}
    test = Split({layer: x[:7] for layer, x in features.items()}, LABELS[:7])
    measure(counting, Split(features, LABELS), Split(features, LABELS), test, task="plain")
    assert asked == [7]


def test_few_labels_are_measured_over_draws() -> None:
    by_draw: list[int] = []

    def fit(train: Known, valid: Known | None = None, folds: Folds | None = None) -> Fitted:
        by_draw.append(len(train[0]))
        # one draw in four is wrong throughout
        value = 1.0 if len(by_draw) % 4 else 0.0
        return Fitted(lambda x: (x[:, 0] * value + (1 - x[:, 0]) * (1 - value)).long(), None, "fit")

    split = Split(LABELS[:, None].double(), LABELS)
    score = measure(fit, split, None, split, task="few", per_class=2, draws=4)
    assert by_draw == [4] * 4
    assert score.details["values"] == [1.0, 1.0, 1.0, 0.0]
    assert (score.value, score.deviation) == pytest.approx((0.75, 0.5))
    assert "2 labels a class, 4 draws" in score.protocol


def test_a_test_class_that_training_has_not_is_refused() -> None:
    split = Split(LABELS[:, None].double(), LABELS)
    others = Split(torch.zeros(8, 1), torch.arange(2, 10))
    with pytest.raises(
        ValueError, match=r"no clip that could be read: 2, 3, 4, 5, 6 and 3 more; give it some, or take"
    ):
        measure(plain, split, None, others, task="plain")
    called = replace(split, names=["cat", "cow", "dog"]).pick(torch.arange(len(LABELS)))
    with pytest.raises(ValueError, match=r"no clip that could be read: 'dog'; give"):
        measure(plain, called, None, others.pick(torch.tensor([0])), task="plain")
    with pytest.raises(ValueError, match=r"class 'cow' has 4 labels, and 5 were asked for"):
        measure(plain, called, None, called, task="plain", per_class=5)
    with pytest.raises(ValueError, match="one row a label"):
        Split(torch.zeros(3, 1), LABELS)


def test_groups_are_left_out_in_turn() -> None:
    folds = [(fitted.tolist(), held.tolist()) for fitted, held in leave_out(torch.tensor([5, 2, 5, 7]))]
    assert folds == [([0, 2, 3], [1]), ([1, 3], [0, 2]), ([0, 1, 2], [3])]
    with pytest.raises(ValueError, match="at least two"):
        leave_out(torch.zeros(3))


def test_what_holds_within_a_group_only_is_not_chosen() -> None:
    # feature 0 tells the group and the class within it, so it is right for clips of a known group alone; feature 1
    # tells the class a little less well, in all groups
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2
    groups = torch.arange(80) // 20
    shifting = 10.0 * groups + (labels ^ (groups % 2)) + 0.01 * torch.randn(80, generator=generator)
    steady = labels + 0.4 * torch.randn(80, generator=generator)
    features = {0: shifting[:, None], 1: steady[:, None] + 5}
    features[0] = torch.cat([features[0], features[0].square()], 1)
    split = Split(features, labels, groups)
    test = Split({0: torch.zeros(4, 2), 1: torch.tensor([[5.0], [6.0]] * 2)}, torch.tensor([0, 1, 0, 1]))
    score = measure(fit_linear, split, None, test, task="linear")
    assert score.details["layer"] == 1
    assert score.value == 1.0
    assert "leaving out each of 4 groups in turn" in score.protocol
    assert "layer 1 of 2, in the same way" in score.protocol
    with pytest.raises(ValueError, match="not on both"):
        measure(fit_linear, split, split, test, task="linear")


def test_folds_choose_by_their_mean_and_then_all_of_train_is_fitted() -> None:
    # a clip of class 1 sits among those of class 0 in the first group: its nearest in the second is of class 0
    angles = torch.deg2rad(torch.tensor([0.0, 4, 8, 12, 6, 1, 4.5, 9, 13, 6.5]))
    train = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 0, 0, 0, 1, 0, 0, 0, 0, 0])
    fitted = fit_knn(train, folds=leave_out(torch.arange(10) // 5), k=(1, 5))
    assert fitted.details["k"] == 5
    assert fitted.valid_accuracy == pytest.approx((1.0 + 0.8) / 2)
    assert fit_knn(train, k=50).details["k"] == 10  # all clips of both groups


def test_what_leaves_nothing_to_choose_or_to_draw_is_refused() -> None:
    split = Split({-1: torch.zeros(4, 1)}, torch.tensor([0, 0, 1, 1]))
    nothing = Split({-1: torch.zeros(0, 1)}, torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="some: none of the validation clips is left to choose on"):
        measure(fit_knn, split, nothing, split, task="some")
    with pytest.raises(ValueError, match="some: draws=0: take at least one draw"):
        measure(fit_knn, split, None, split, task="some", per_class=1, draws=0)
    for share in (0.0, -0.5, 1.5):
        with pytest.raises(ValueError, match="share of the labels: above 0 and at most 1, got"):
            draw_labels(split.labels, share=share)
    for k in ([], 0, [0, 5]):
        with pytest.raises(ValueError, match=r"kNN: k=.* from 1 up"):
            fit_knn((split.layers[-1], split.labels), k=k)


def test_numbered_layers_come_before_sums_of_them() -> None:
    split = Split({((0, 0.5), (1, 0.5)): torch.zeros(4, 1), 1: torch.zeros(4, 1)}, torch.tensor([0, 0, 1, 1]))
    score = measure(fit_knn, split, split, split, task="some")
    assert score.details["layer"] == 1


def test_balanced_accuracy_is_scikit_learns_and_is_said_where_classes_are_unequal() -> None:
    from sklearn.metrics import balanced_accuracy_score

    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.full((n,), name) for name, n in ((0, 40), (1, 8), (3, 2))])
    found = torch.where(torch.rand(50, generator=generator) < 0.6, labels, 0)
    assert balanced_accuracy(found, labels) == pytest.approx(balanced_accuracy_score(labels, found))

    def always_first(train: Known, valid: Known | None = None, folds: Folds | None = None) -> Fitted:
        return Fitted(lambda x: torch.zeros(len(x), dtype=torch.int64), None, "always the first")

    split = Split({-1: torch.zeros(50, 1)}, labels)
    score = measure(always_first, split, None, split, task="first")
    assert score.value == pytest.approx(0.8)
    assert score.details["balanced_accuracy"] == pytest.approx(1 / 3)
    assert "each class counting the same 33.3 %" in score.protocol
    even = Split({-1: torch.zeros(4, 1)}, torch.tensor([0, 0, 1, 1]))
    assert "each class" not in measure(always_first, even, None, even, task="first").protocol
