import pytest
import torch
from torch import Tensor

from mmssl.evaluation.protocol import Fitted, Split, draw_labels, hold_out, measure

LABELS = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 0])


def plain(train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor] | None) -> Fitted:
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

    def counting(train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor] | None) -> Fitted:
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

    def fit(train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor] | None) -> Fitted:
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
    with pytest.raises(ValueError, match=r"classes that training has not: \[2\]"):
        measure(plain, split, None, Split(torch.zeros(1, 1), torch.tensor([2])), task="plain")
    with pytest.raises(ValueError, match="one row a label"):
        Split(torch.zeros(3, 1), LABELS)
