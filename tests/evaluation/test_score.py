import json
from pathlib import Path

import numpy as np
import pytest

from mmssl.evaluation.score import Score, average_precisions, bootstrap_rate, jackknife, student, wilson


def test_wilson_interval_by_hand() -> None:
    # 8 of 10, z = 1.96: (0.8 + 0.19207) / 1.38415 -+ 1.96 / 1.38415 * sqrt(0.016 + 0.0096037)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=2e-4)


def test_wilson_interval_stays_within_shares_and_never_shrinks_to_a_point() -> None:
    low, high = wilson(10, 10)
    assert high == pytest.approx(1.0)
    assert high <= 1.0
    assert 0.6 < low < 0.8
    assert wilson(0, 10) == pytest.approx((0.0, 1.0 - low))


def test_interval_over_draws_is_students() -> None:
    # three draws: mean 2, deviation 1, t(0.975, 2 degrees of freedom) = 4.302653
    low, high = student([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)


def test_bootstrap_covers_clips_and_repeats_itself() -> None:
    errors, sizes = [0] * 50 + [4] * 50, [4] * 100
    low, high = bootstrap_rate(errors, sizes)
    assert (low, high) == bootstrap_rate(errors, sizes)
    # clips are right or wrong as a whole, so the deviation is that of 100 coins, not of 400
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / np.sqrt(100), rel=0.15)


def test_draws_of_silence_have_no_rate_and_no_error_is_no_proof() -> None:
    # one clip of three is silent, and one draw in 27 holds it alone
    low, high = bootstrap_rate([1, 0, 0], [0, 2, 3])
    assert low == 0
    # the highest rate that a draw can have: two wrong clips and the shorter of the others
    assert high <= 2 / 2
    assert bootstrap_rate([0] * 5, [3] * 5) == (0.0, wilson(0, 5)[1])
    assert bootstrap_rate([3] * 5, [3] * 5) == (wilson(5, 5)[0], 1.0)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.array([1.0, 2.0, 2.0, 5.0])
    without = (values.sum() - values) / 3
    # t(0.975, 3 degrees of freedom) = 3.182446
    half = 3.182446 * values.std(ddof=1) / 2
    assert jackknife(2.5, without) == pytest.approx((2.5 - half, 2.5 + half), abs=1e-5)
    # clips that are alike are left out alike
    assert jackknife(2.5, without[[0, 1, 3]], np.array([1, 2, 1])) == pytest.approx(jackknife(2.5, without))
    with pytest.raises(ValueError, match="at least two clips in turn, got 1"):
        jackknife(1.0, np.array([1.0]))


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="something to count"):
        bootstrap_rate([], [])


def test_a_score_prints_and_stores_its_protocol(tmp_path: Path) -> None:
    score = Score("knn", 0.9, 0.85, 0.93, 200, "how it was measured", deviation=0.01)
    assert str(score) == "knn: accuracy 90.0 ± 1.0 % (95 % interval 85.0 to 93.0, n = 200)\n  how it was measured"
    score.to_json(tmp_path / "score.json")
    stored = json.loads((tmp_path / "score.json").read_text(encoding="utf-8"))
    assert stored["value"] == 0.9
    assert stored["protocol"] == "how it was measured"
    plain = Score("rank", 31.25, 30, 32.5, 200, "how", metric="RankMe", percent=False)
    assert str(plain) == "rank: RankMe 31.25 (95 % interval 30 to 32.5, n = 200)\n  how"


def test_average_precision_by_hand() -> None:
    truth = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]], dtype=bool)
    # class 0 stands at ranks 1 and 3: (1/1 + 2/3) / 2; class 1 at rank 1 and at a shared 2 and 3: (1/1 + 2/3) / 2
    scores = np.array([[0.9, 0.5, 0.1], [0.8, 0.7, 0.2], [0.7, 0.5, 0.3], [0.1, 0.2, 0.4]])
    found = average_precisions(scores, truth)
    assert found[:2] == pytest.approx([5 / 6, 5 / 6])
    assert np.isnan(found[2])


def test_average_precision_is_scikit_learns_with_ties_too() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    truth = rng.random((50, 6)) < 0.2
    for scores in (rng.random((50, 6)), rng.integers(0, 5, (50, 6)) / 4):
        theirs = [metrics.average_precision_score(truth[:, i], scores[:, i]) for i in range(6)]
        assert average_precisions(scores, truth) == pytest.approx(np.array(theirs))
