from typing import Any

import pytest

from mmssl.training import health
from mmssl.training.health import (
    chance_plateau,
    constant_prediction,
    dead_codebook,
    diagnose,
    exploding_gradient,
    fast_teacher,
    free_targets,
    high_rate,
    not_finite,
)


def history(
    lines: int = 12,
    every: int = 100,
    *,
    grad_norm: Any = 1.0,
    weight_size: Any = lambda i: 0.05,
    **metrics: Any,
) -> list[dict[str, Any]]:
    """A log whose metrics are constant, or functions of the line's place."""

    def at(value: Any, i: int) -> Any:
        return value(i) if callable(value) else value

    return [
        {
            "step": every * (i + 1),
            "loss": 1.0,
            "lr": 1e-3,
            "grad_norm": at(grad_norm, i),
            "weight_size": weight_size(i),
            "weight_size_before": weight_size(i - 1),
            "metrics": {name: at(value, i) for name, value in metrics.items()},
        }
        for i in range(lines)
    ]


def test_a_healthy_run_and_one_that_says_nothing_get_no_verdict() -> None:
    healthy = history(
        accuracy=0.4,
        chance_accuracy=1 / 101,
        code_perplexity=90.0,
        soft_perplexity=150.0,
        codes=320,
        prediction_std=0.6,
        target_std=1.0,
        feature_std=0.8,
        teacher_decay=0.99,
        target_norms=1,
    )
    assert diagnose(healthy) == diagnose(history()) == diagnose([]) == {}


def test_one_code_for_all_frames_is_a_dead_codebook() -> None:
    said = dead_codebook(history(code_perplexity=1.1, soft_perplexity=1.2, codes=320))
    assert said is not None
    assert "1.1 of 320 codewords" in said
    assert "1.2" in said
    assert dead_codebook(history(code_perplexity=1.1)) is not None


def test_what_counts_as_dead_grows_with_the_codebook() -> None:
    assert dead_codebook(history(code_perplexity=5.0, codes=320)) is not None
    assert dead_codebook(history(code_perplexity=5.0, codes=32)) is None


def test_a_codebook_that_lives_again_is_not_dead() -> None:
    assert dead_codebook(history(code_perplexity=lambda i: 1.0 if i < 11 else 40.0, codes=320)) is None


def test_guessing_is_a_plateau_and_twice_chance_is_not() -> None:
    said = chance_plateau(history(accuracy=0.0101, chance_accuracy=1 / 101))
    assert said is not None
    assert "accuracy 0.0101" in said
    assert chance_plateau(history(accuracy=0.02, chance_accuracy=1 / 101)) is None


def test_guessing_at_a_rate_that_is_still_rising_is_no_plateau() -> None:
    lines = history(accuracy=0.01, chance_accuracy=0.01)
    for i, line in enumerate(lines):
        line["lr"] = 1e-6 * (i + 1)
    assert chance_plateau(lines) is None
    for line in lines[-5:]:
        line["lr"] = 1e-5
    assert chance_plateau(lines) is not None


@pytest.mark.parametrize("name", ["unit_perplexity", "target_perplexity", "mfcc/unit_perplexity"])
def test_labels_that_are_nearly_all_the_same_are_named(name: str) -> None:
    few, enough = (diagnose(history(2, 50, **{name: value})) for value in (1.4, 2.0))
    assert "nearly all targets are alike: 1.4 labels are in use" in few["constant_prediction"]
    assert enough == {}


def test_of_two_classes_seven_of_ten_right_is_above_chance() -> None:
    assert chance_plateau(history(accuracy=0.7, chance_accuracy=0.5)) is None
    assert chance_plateau(history(accuracy=0.55, chance_accuracy=0.5)) is not None


def test_the_start_of_a_run_is_not_judged() -> None:
    young = history(lines=12, every=10, accuracy=0.01, chance_accuracy=0.01, code_perplexity=1.0, prediction_std=0.0)
    assert diagnose(young) == {}
    assert diagnose(history(lines=4, every=1000, code_perplexity=1.0)) == {}


def test_predictions_that_are_all_alike_are_named() -> None:
    said = constant_prediction(history(prediction_std=0.002, target_std=1.0))
    assert said is not None
    assert "predictions are alike" in said
    assert constant_prediction(history(prediction_std=0.002, target_std=0.1)) is None


@pytest.mark.parametrize("what", ["target", "feature"])
def test_targets_or_features_that_are_all_alike_are_named(what: str) -> None:
    said = constant_prediction(history(**{f"{what}_std": 0.001}))
    assert said is not None
    assert f"all {what}s are alike" in said


def test_a_gradient_a_hundred_times_its_usual_size_explodes() -> None:
    said = exploding_gradient(history(grad_norm=lambda i: 500.0 if i == 11 else 2.0))
    assert said is not None
    assert "norm is 500, 250 times its usual 2" in said
    assert exploding_gradient(history(grad_norm=lambda i: 100.0 if i == 11 else 2.0)) is None


def test_a_gradient_that_was_always_large_does_not_explode() -> None:
    assert exploding_gradient(history(grad_norm=500.0)) is None


def test_a_rate_above_half_of_the_weights_is_too_high() -> None:
    line = history(1, 10)[0]
    said = high_rate([{**line, "lr": 0.03}])
    assert said is not None
    assert "the rate is 0.03 and a typical weight 0.05" in said
    assert "below 0.025" in said
    assert high_rate([{**line, "lr": 0.02}]) is None


def test_weights_that_treble_within_200_updates_explode() -> None:
    for lines, every in ((4, 50), (20, 10), (1, 200), (1, 1000)):
        said = high_rate(history(lines, every, weight_size=lambda i: 0.05 if i < 0 else 0.2))
        assert said is not None
        assert f"a typical weight is 0.2, and was 0.05 only {lines * every} updates before" in said
    assert high_rate(history(weight_size=lambda i: 0.05 if i < 0 else 0.14)) is None


def test_weights_may_grow_over_a_long_run() -> None:
    # by a fifth in 100 updates, which is more than a thousandfold in 4,000
    assert high_rate(history(40, weight_size=lambda i: 0.05 * 1.2**i)) is None
    assert high_rate(history(40, weight_size=lambda i: 0.05 * 1.8**i)) is not None


def test_what_exploded_long_ago_and_is_level_now_is_not_named_any_more() -> None:
    assert high_rate(history(3, 100, weight_size=lambda i: 0.05 if i < 0 else 0.2)) is None


def test_a_teacher_without_memory_is_named_at_the_first_line() -> None:
    said = fast_teacher(history(1, 10, teacher_decay=0.0))
    assert said is not None
    assert "decay is 0, so it is the student of the last 1 updates" in said
    assert fast_teacher(history(1, 10, teacher_decay=0.9)) is None
    assert fast_teacher(history(1, 10, teacher_decay=0.89)) is not None


def test_targets_that_nothing_normalizes_are_named_at_the_first_line() -> None:
    assert free_targets(history(1, 10, target_norms=0)) is not None
    assert free_targets(history(1, 10, target_norms=1)) is None


@pytest.mark.parametrize("what", ["target", "feature"])
def test_what_is_the_same_to_four_digits_needs_no_patience(what: str) -> None:
    said = constant_prediction(history(5, 10, **{f"{what}_std": 1e-5}))
    assert said is not None
    assert f"all {what}s are alike" in said
    assert constant_prediction(history(4, 10, **{f"{what}_std": 1e-5})) is None
    assert constant_prediction(history(5, 10, **{f"{what}_std": 1e-3})) is None
    assert constant_prediction(history(5, 10, **{f"{what}_std": lambda i: 1e-5 if i else 1e-3})) is None


def test_one_label_for_all_is_nothing_to_tell_apart() -> None:
    said = constant_prediction(history(1, 50, accuracy=1.0, chance_accuracy=1.0))
    assert said is not None
    assert "the commonest is 100.0% of them" in said
    assert constant_prediction(history(1, 50, accuracy=1.0, chance_accuracy=0.98)) is None


def test_targets_that_lose_nine_tenths_of_their_deviation_shrink() -> None:
    said = constant_prediction(history(8, 25, target_std=lambda i: 0.5 / 2**i))
    assert said is not None
    assert "the targets shrink: their deviation is 0.0039, and was 0.5 at update 25" in said
    assert constant_prediction(history(8, 25, target_std=lambda i: 0.5 / 1.3**i)) is None


def test_a_metric_that_was_not_finite_gives_no_verdict_of_its_own() -> None:
    assert diagnose(history(code_perplexity=None, accuracy=None, chance_accuracy=0.5, grad_norm=None)) == {}


def test_the_clips_of_a_bad_update_are_named() -> None:
    assert "at update 7 from these clips: a, b;" in not_finite(7, ["a", "b"])
    assert "and 12 more" in not_finite(7, [str(i) for i in range(20)])


def test_every_verdict_can_stop_a_run() -> None:
    assert set(health.NAMES) == {
        "dead_codebook",
        "chance_plateau",
        "constant_prediction",
        "exploding_gradient",
        "high_rate",
        "fast_teacher",
        "free_targets",
        "not_finite",
    }


def test_of_modalities_in_turn_each_is_judged_by_its_own_lines() -> None:
    # a dead codebook of speech, which only every other line tells of
    names = {"speech/code_perplexity": 1.2, "speech/codes": 320.0, "image/accuracy": 0.9, "image/chance_accuracy": 0.1}
    lines = history(16, **names)
    for line in lines[::2]:
        del line["metrics"]["speech/code_perplexity"]
        del line["metrics"]["speech/codes"]
    assert list(diagnose(lines)) == ["dead_codebook"]
    assert diagnose(lines)["dead_codebook"].startswith("speech: only 1.2 of 320 codewords are in use")
    assert diagnose(history(16, **names | {"speech/code_perplexity": 90.0})) == {}
    # what is of all of them is said once, and of none
    assert diagnose(history(16, weight_size=lambda i: 1e-3, **names))["high_rate"].startswith("the rate is")


def test_a_modality_is_as_old_as_its_own_updates() -> None:
    guessing: dict[str, Any] = {"speech/accuracy": 0.01, "speech/chance_accuracy": 0.01}
    # drawn in every eighth update, it has had 200 of 1,600
    assert diagnose(history(16, **guessing, **{"speech/updates": lambda i: 12.5 * (i + 1)})) == {}
    assert set(diagnose(history(16, **guessing, **{"speech/updates": lambda i: 100.0 * (i + 1)}))) == {"chance_plateau"}
