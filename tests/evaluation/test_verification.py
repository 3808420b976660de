from pathlib import Path

import numpy as np
import pytest
import torch

from mmssl.evaluation import verification
from mmssl.evaluation.score import wilson
from mmssl.evaluation.verification import all_pairs, equal_error_rate, min_dcf, read_trials, verify

YES, NO = True, False


def test_error_rates_by_hand() -> None:
    # of four pairs of one class and five of two, ranked: at 0.5 one of 4 is missed and 1 of 5 accepted, and at 0.45
    # one of 4 and 2 of 5: they meet where both are 0.25, a quarter of the way along alarms
    scores = np.array([0.9, 0.8, 0.7, 0.5, 0.45, 0.3, 0.2, 0.1, 0.05])
    target = np.array([YES, YES, NO, YES, NO, YES, NO, NO, NO])
    assert equal_error_rate(scores, target) == pytest.approx(0.25)
    # at a prior of 0.05 nothing beats accepting the first two: 0.05 * 2/4 over 0.05
    assert min_dcf(scores, target, prior=0.05) == pytest.approx(0.5)
    # at an even prior: (0.5 * 1/4 + 0.5 * 1/5) / 0.5 after four, and (0.5 * 0 + 0.5 * 2/5) / 0.5 after six
    assert min_dcf(scores, target, prior=0.5) == pytest.approx(0.4)


def test_error_rates_between_two_thresholds_lie_on_the_line_that_joins_them() -> None:
    # missed and alarms go from (1, 0) to (1/2, 0) to (0, 1): on the last line they meet at 1/3
    scores, target = np.array([3.0, 2.0, 2.0]), np.array([YES, YES, NO])
    assert equal_error_rate(scores, target) == pytest.approx(1 / 3)


def test_equal_scores_are_accepted_together() -> None:
    target = np.array([YES, NO, YES, NO, NO])
    assert equal_error_rate(np.zeros(5), target) == pytest.approx(0.5)
    assert min_dcf(np.zeros(5), target, prior=0.01) == 1.0
    # any order of equal scores
    scores = np.array([1.0, 1.0, 0.0, 0.0, 0.0])
    order = np.array([1, 0, 4, 3, 2])
    assert equal_error_rate(scores, target) == equal_error_rate(scores[order], target[order])


def test_a_perfect_and_a_reversed_order() -> None:
    scores, target = np.array([4.0, 3.0, 2.0, 1.0]), np.array([YES, YES, NO, NO])
    assert equal_error_rate(scores, target) == min_dcf(scores, target, prior=0.01) == 0.0
    assert equal_error_rate(-scores, target) == 1.0
    assert min_dcf(-scores, target, prior=0.01) == 1.0


def test_the_curve_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    target = rng.random(300) < 0.3
    for scores in (rng.standard_normal(300) + target, rng.integers(0, 6, 300) + target):
        alarms, hits, _ = metrics.roc_curve(target, scores, drop_intermediate=False)
        costs = (0.05 * (1 - hits) + 0.95 * alarms) / 0.05
        assert min_dcf(scores, target, prior=0.05) == pytest.approx(costs.min())
        # along the curve false alarms less misses only rise, from -1 to 1
        equal = np.interp(0.0, alarms + hits - 1, alarms)
        assert equal_error_rate(scores, target) == pytest.approx(equal, abs=1e-12)


def test_all_pairs_are_each_pair_once() -> None:
    first, second, target = all_pairs(torch.tensor([0, 1, 0, 1]))
    pairs = {(int(a), int(b)): bool(t) for a, b, t in zip(first, second, target, strict=True)}
    assert pairs == {(0, 1): NO, (0, 2): YES, (0, 3): NO, (1, 2): NO, (1, 3): YES, (2, 3): NO}


def test_of_too_many_pairs_some_of_either_kind_are_drawn() -> None:
    labels = torch.arange(50) % 3
    first, second, target = all_pairs(labels, most=40)
    assert (int(target.sum()), int((~target).sum())) == (40, 40)
    assert ((labels[first] == labels[second]).numpy() == target).all()
    assert (first != second).all()
    assert len(set(labels[first[target]].tolist())) == 3
    again = all_pairs(labels, most=40)
    assert np.array_equal(first, again[0])


def test_speakers_that_sound_apart_are_told_and_the_score_says_how() -> None:
    torch.manual_seed(0)
    labels = torch.arange(24) % 4
    features = torch.eye(8)[labels] + 0.05 * torch.randn(24, 8)
    found = verify(features * (1 + torch.rand(24, 1)), *all_pairs(labels))
    assert set(found) == {"eer", "min_dcf_0.01", "min_dcf_0.05"}
    assert found["eer"].value == found["min_dcf_0.05"].value == 0.0
    # no error among 24 clips does not say that there are none
    assert found["eer"].high == found["min_dcf_0.05"].high == wilson(0, 24)[1]
    assert "60 of one class, 216 of two" in found["eer"].protocol
    assert "prior of 0.05" in found["min_dcf_0.05"].metric
    weak = verify(features + 2 * torch.randn(24, 8), *all_pairs(labels))["eer"]
    assert 0.2 < weak.low < weak.value < weak.high < 0.8


def test_the_interval_of_many_trials_is_that_of_their_own_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    labels = torch.arange(40) % 4
    features = torch.eye(8)[labels] + 0.6 * torch.randn(40, 8)
    every = verify(features, *all_pairs(labels))["eer"]
    monkeypatch.setattr(verification, "STOPS", 100)  # of 780
    some = verify(features, *all_pairs(labels))["eer"]
    assert some.value == every.value
    assert (some.low, some.high) == pytest.approx((every.low, every.high), abs=0.01)
    assert (some.low, some.high) != (every.low, every.high)


def test_a_common_direction_is_taken_away_by_centering() -> None:
    torch.manual_seed(0)
    labels = torch.arange(24) % 4
    # four directions, in any length: from far away clips are near each other that are near the center
    directions = torch.eye(8, dtype=torch.float64)[labels] + 0.02 * torch.randn(24, 8)
    shifted = directions * 10 ** torch.linspace(-1, 1, 24)[:, None] + 1000
    centered = verify(shifted, *all_pairs(labels), center=torch.full((8,), 1000.0))["eer"]
    assert centered.value == 0.0
    assert verify(shifted, *all_pairs(labels))["eer"].value > 0.3
    assert "centered on the training clips" in centered.protocol


def test_trials_are_read_by_ids_and_by_the_ends_of_paths(tmp_path: Path) -> None:
    path = tmp_path / "trials.txt"
    path.write_text("1 s1/a.wav s1/b.wav\n\n0 /data/s1/a.wav s2/a.wav\n")
    ids = ["/data/s1/a.wav", "/data/s1/b.wav", "/data/s2/a.wav"]
    first, second, target = read_trials(path, ids)
    assert (first.tolist(), second.tolist(), target.tolist()) == ([0, 0], [1, 2], [True, False])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 a.wav\n", "trials.txt:1: expected 1 or 0 and two names of clips, got '1 a.wav'"),
        ("yes s1/a.wav s2/a.wav\n", "trials.txt:1: expected 1 or 0"),
        ("1 s1/a.wav s2/a.wav\n1 s1/a.wav c.wav", "trials.txt:2: 'c.wav': there is no such clip"),
        ("1 a.wav s2/a.wav", "trials.txt:1: 'a.wav': several clips are called or end so"),
        ("\n", "no trial in it"),
    ],
)
def test_trials_that_are_none_are_named_with_their_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "trials.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_trials(tmp_path / "trials.txt", ["/data/s1/a.wav", "/data/s2/a.wav"])


def test_a_trial_of_a_name_that_two_clips_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trials.txt").write_text("1 a b\n0 a c\n")
    with pytest.raises(ValueError, match="trials.txt:1: 'a': several clips are called or end so"):
        read_trials(tmp_path / "trials.txt", ["a", "b", "c", "a"])


def test_what_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(ValueError, match="3 trials of one class and 0 of two; it takes both"):
        verify(torch.randn(3, 2), *all_pairs(torch.zeros(3)))
    with pytest.raises(ValueError, match="not finite"):
        verify(torch.full((3, 2), torch.nan), *all_pairs(torch.arange(3)))
    with pytest.raises(ValueError, match="a prior lies between 0 and 1, got 1"):
        min_dcf(np.arange(2.0), np.array([YES, NO]), prior=1)
