import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.evaluation.probe import fit_linear, fit_path, fit_probe


def clips(count: int, width: int, *, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated features of very different scales, and labels that depend on them with noise."""
    rng = np.random.default_rng(seed)
    mixing, weight = np.random.default_rng(9).normal(size=(2, width, width))
    x = rng.normal(size=(count, width)) @ (mixing * np.logspace(0, -2, width))
    y = (x @ weight[:, :classes] + 2 * rng.normal(size=(count, classes)) * x.std()).argmax(1)
    return torch.from_numpy(x + 5), torch.from_numpy(y)


# more clips than features, and fewer: the features beyond the clips' span take another way
@pytest.mark.parametrize(("count", "width"), [(120, 8), (30, 50)])
@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_probe_is_logistic_regression_on_standardized_features(count: int, width: int, strength: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = clips(count, width)
    probe = fit_probe(x, y, strength=strength, tolerance=1e-8)
    z = (x.numpy() - x.numpy().mean(0)) / x.numpy().std(0)
    theirs = linear_model.LogisticRegression(C=strength, tol=1e-9, max_iter=10_000).fit(z, y.numpy())
    assert probe.weight.T.numpy() == pytest.approx(theirs.coef_, abs=1e-5)
    assert torch.softmax(probe.logits(x), 1).numpy() == pytest.approx(theirs.predict_proba(z), abs=1e-5)


def test_float32_features_are_solved_as_well() -> None:
    x, y = clips(120, 8)
    fine, coarse = (fit_probe(given, y, strength=0.1) for given in (x, x.float()))
    assert torch.softmax(coarse.logits(x), 1).numpy() == pytest.approx(torch.softmax(fine.logits(x), 1), abs=2e-3)


def test_two_classes_are_the_multinomial_form() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = clips(80, 5, classes=2)
    probe = fit_probe(x, y, strength=0.1, tolerance=1e-8)
    z = (x.numpy() - x.numpy().mean(0)) / x.numpy().std(0)
    theirs = linear_model.LogisticRegression(C=0.2, tol=1e-9).fit(z, y.numpy())
    assert torch.softmax(probe.logits(x), 1).numpy() == pytest.approx(theirs.predict_proba(z), abs=1e-5)


def test_warm_start_along_the_path_changes_no_probe() -> None:
    x, y = clips(60, 6)
    path = dict(fit_path(x, y, strengths=[1.0, 0.01, 0.1], tolerance=1e-8))
    assert list(path) == [0.01, 0.1, 1.0]
    for strength, probe in path.items():
        alone = fit_probe(x, y, strength=strength, tolerance=1e-8)
        assert probe.weight.numpy() == pytest.approx(alone.weight.numpy(), abs=1e-5)


def test_standardization_sees_training_clips_only() -> None:
    x, y = clips(60, 6)
    probe = fit_probe(x, y, strength=1.0)
    assert probe.mean.numpy() == pytest.approx(x.mean(0).numpy())
    # a query far off shifts nothing for the others: were the queries standardized among themselves, it would
    queries, _ = clips(10, 6, seed=1)
    outlier = torch.cat([queries, queries[:1] + 1e4])
    assert torch.equal(probe.logits(outlier)[:10], probe.logits(queries))
    # and the validation clips, with which the strength is chosen, move neither mean nor weight
    shifted = (queries + 1e3, torch.zeros(10, dtype=torch.int64))
    fitted = fit_linear((x, y), shifted, strengths=(1.0, 2.0))
    same = fit_probe(x, y, strength=fitted.details["C"])
    assert torch.equal(fitted.predict(queries), same.predict(queries))


def test_a_constant_feature_has_no_say() -> None:
    x, y = clips(60, 4)
    # 1,000 with the rounding of float32, which tells the classes apart by accident
    constant = torch.where(y[:, None] == 0, 1000.0, float(np.nextafter(np.float32(1000), np.float32(0))))
    probe = fit_probe(torch.cat([x.float(), constant.float()], 1), y, strength=1.0)
    assert probe.std[-1] == 1.0
    assert float(probe.weight[-1].abs().max()) < 1e-3


def test_the_strength_is_chosen_on_validation_and_of_equals_the_strongest_penalty() -> None:
    x, y = clips(60, 6)
    best: dict[float, float] = {}
    valid = clips(40, 6, seed=1)[0], clips(40, 6, seed=1)[1]
    for strength in (0.001, 0.1, 10.0):
        probe = fit_probe(x, y, strength=strength)
        best[strength] = float((probe.predict(valid[0]) == valid[1]).double().mean())
    fitted = fit_linear((x, y), valid, strengths=(0.001, 0.1, 10.0))
    assert fitted.valid_accuracy == max(best.values())
    assert fitted.details["C"] == min(c for c, accuracy in best.items() if accuracy == max(best.values()))
    # all right with every strength
    apart = torch.tensor([[-9.0], [-8.0], [8.0], [9.0]]), torch.tensor([0, 0, 1, 1])
    assert fit_linear(apart, apart, strengths=(0.1, 1.0, 10.0)).details["C"] == 0.1


def test_refit_on_both_sees_the_validation_labels_and_says_so() -> None:
    x, y = clips(60, 6)
    valid = clips(40, 6, seed=1)
    alone, both = (fit_linear((x, y), valid, strengths=(0.1, 1.0), refit=refit) for refit in ("train", "train+valid"))
    assert both.details["C"] == alone.details["C"]
    expected = fit_probe(torch.cat([x, valid[0]]), torch.cat([y, valid[1]]), strength=both.details["C"])
    queries = clips(200, 6, seed=2)[0]
    assert torch.equal(both.predict(queries), expected.predict(queries))
    assert not torch.equal(both.predict(queries), alone.predict(queries))
    assert "fitted on train+valid" in both.protocol


def test_classes_that_training_has_not_are_never_predicted() -> None:
    x, y = clips(60, 6)
    probe = fit_probe(x, y * 7, strength=0.1)
    assert probe.classes.tolist() == [0, 7, 14]
    assert set(probe.predict(x).tolist()) <= {0, 7, 14}


@pytest.mark.parametrize(
    ("x", "y", "strengths", "words"),
    [
        (torch.full((4, 2), torch.nan), torch.tensor([0, 1, 0, 1]), [1.0], "not finite"),
        (torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), [1.0], "two classes"),
        (torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]), [0.0], "above 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(x: Tensor, y: Tensor, strengths: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        list(fit_path(x, y, strengths=strengths))
