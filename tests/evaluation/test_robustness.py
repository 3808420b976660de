import numpy as np
import pytest
import torch

from mmssl.evaluation.probe import fit_probe
from mmssl.evaluation.robustness import corruption_error, corruption_score

WRONG = {
    # 2 severities of 4 clips: errors of 1/4 and 3/4, and of 0 and 1/2
    "noise": np.array([[1, 0, 0, 0], [1, 1, 1, 0]], dtype=bool),
    "blur": np.array([[0, 0, 0, 0], [1, 1, 0, 0]], dtype=bool),
}


def test_errors_by_hand_alone_and_against_another_model() -> None:
    value, low, high = corruption_error(WRONG)
    assert value == pytest.approx((0.5 + 0.25) / 2)
    assert low < value < high
    # (1/4 + 3/4) / (1/2 + 1/2) and (0 + 1/2) / (1/4 + 0)
    relative = corruption_error(WRONG, {"noise": [0.5, 0.5], "blur": [0.25, 0.0]})
    assert relative[0] == pytest.approx((1 + 2) / 2)
    score = corruption_score(WRONG, "mCE", "how", against=None)
    assert score.details["errors"] == {"noise": [0.25, 0.75], "blur": [0.0, 0.5]}
    assert score.n == 4


def test_a_model_against_itself_has_one() -> None:
    own = {kind: wrong.mean(1).tolist() for kind, wrong in WRONG.items()}
    assert corruption_error(WRONG, own)[0] == pytest.approx(1.0)


def test_the_interval_is_over_clips_and_not_over_kinds() -> None:
    # each clip is told wrongly in every kind and severity or in none: as wide as the interval of 4 clips alone
    clip = np.array([1, 1, 0, 0], dtype=bool)
    wide = corruption_error({kind: np.tile(clip, (5, 1)) for kind in "abcdef"})
    assert wide == corruption_error({"a": clip[None]})


def test_an_adapted_probe_undoes_shift_and_scale_of_features() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(60, 5)))
    y = (x[:, 0] > 0).long()
    probe = fit_probe(x, y, strength=1.0)
    moved = x * torch.tensor([3.0, 0.1, 1.0, 9.0, 2.0]) - 40
    assert torch.equal(probe.adapted(moved).predict(moved), probe.predict(x))
    assert not torch.equal(probe.predict(moved), probe.predict(x))
    assert torch.equal(probe.adapted(moved).weight, probe.weight)


@pytest.mark.parametrize(
    ("against", "words"),
    [
        ({"noise": [0.5, 0.5]}, "has errors of noise, and here they are of blur, noise"),
        ({"noise": [0.5], "blur": [0.5, 0.5]}, "noise has 1 severities, and here it has 2"),
        ({"noise": [0.5, 0.5], "blur": [0.0, 0.0]}, "makes no error of blur"),
    ],
)
def test_models_that_do_not_compare_are_refused(against: dict[str, list[float]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        corruption_error(WRONG, against)
