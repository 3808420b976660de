import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.evaluation.layers import (
    correlation_with_input,
    correlation_with_labels,
    dealt_out,
    fit_cca,
    held_out_cca,
    information_by_layer,
    layer_plot,
    layer_table,
    probe_by_layer,
)
from mmssl.evaluation.probe import fit_linear
from mmssl.evaluation.protocol import Split


def noise(rows: int, width: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, width)))


def test_labels_in_turn_are_dealt_out_like_any_others() -> None:
    # dealt out by place, no fold of five would know the classes of the others
    labels = torch.arange(100) % 10
    scenes = {0: torch.eye(10)[labels] + 0.01 * torch.randn(100, 10, generator=torch.Generator().manual_seed(0))}
    assert correlation_with_labels(scenes, labels).value > 0.95
    assert dealt_out(torch.tensor([2, 0, 2, 2, 0])).tolist() == [2, 0, 3, 4, 1]


@pytest.mark.parametrize("clips", [1, 2, 4])
def test_few_clips_of_each_of_many_classes_fill_all_folds(clips: int) -> None:
    places = dealt_out(torch.arange(50).repeat(clips))
    assert (places % 5).bincount().tolist() == [10 * clips] * 5
    # and no class has two more clips in one fold than in another
    held = torch.stack(
        [(places[torch.arange(50).repeat(clips) == name] % 5).bincount(minlength=5) for name in range(50)]
    )
    assert int((held.max(1).values - held.min(1).values).max()) <= 1


def test_correlations_are_scikit_learns() -> None:
    decomposition = pytest.importorskip("sklearn.cross_decomposition")
    x, other = noise(200, 6, 0), noise(200, 4, 1)
    y = torch.cat([x[:, :2] * 3 + other[:, :2], other[:, 2:] + 0.5 * x[:, 2:4]], 1)
    ours = fit_cca(x, y, ridge=0.0).correlations(x, y)
    theirs = decomposition.CCA(n_components=4, max_iter=5000, tol=1e-12).fit(x.numpy(), y.numpy())
    u, v = theirs.transform(x.numpy(), y.numpy())
    assert ours.tolist() == pytest.approx([np.corrcoef(u[:, i], v[:, i])[0, 1] for i in range(4)], abs=1e-6)


def test_one_dimension_each_is_the_correlation_and_the_ridge_changes_no_direction() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    y = torch.tensor([[1.0], [0.0], [3.0], [4.0]])
    # about their means x is -1.5, -.5, .5, 1.5 and y is -1, -2, 1, 2: 6 over the root of 5 x 10
    for ridge in (0.0, 1.0):
        cca = fit_cca(x, y, ridge=ridge)
        assert cca.correlations(x, y).tolist() == pytest.approx([6 / math.sqrt(50)])
        assert cca.weights.tolist() == [1.0]


def test_pairs_are_weighted_by_what_they_stand_for() -> None:
    # three of four dimensions of y are copies of one that x holds, the fourth is nothing of x
    x, other = noise(4000, 3, 0), noise(4000, 1, 1)
    cca = fit_cca(x, torch.cat([x[:, :1], 2 * x[:, :1], -x[:, :1], other], 1), ridge=0.0)
    assert cca.weights.tolist() == pytest.approx([3 / 4, 1 / 4], abs=0.05)
    y = torch.cat([x[:, :1], 2 * x[:, :1], -x[:, :1], other], 1)
    assert cca.weighted(x, y) == pytest.approx(3 / 4, abs=0.05)


@pytest.mark.parametrize("width", [6, 300])  # fewer features than rows, and more
def test_a_linear_map_has_correlation_one_and_independent_noise_zero(width: int) -> None:
    y, groups = noise(200, 6, 0), torch.arange(200)
    mapping = noise(6, width, 1)
    value, low, high = held_out_cca(y @ mapping, y, groups)
    assert value == pytest.approx(1.0, abs=1e-3)
    # what is independent has 0 on average, and a deviation of one correlation of 40 rows, 1 / sqrt(40), over 5 folds
    value, low, high = held_out_cca(noise(200, width, 2), y, groups)
    assert abs(value) < 3 / math.sqrt(40 * 5)
    assert low < value < high


def test_on_the_rows_that_it_was_fitted_on_noise_has_the_share_of_dimensions() -> None:
    # the square of one correlation with 20 independent dimensions in 60 rows is 20 / 59 on average (Beta(10, 19.5))
    found = []
    for seed in range(60):
        x, y = noise(60, 20, seed), noise(60, 1, 1000 + seed)
        found.append(fit_cca(x, y, ridge=0.0).correlations(x, y).square().item())
    deviation = math.sqrt(10 * 19.5 / (29.5**2 * 30.5))
    assert np.mean(found) == pytest.approx(20 / 59, abs=3 * deviation / math.sqrt(60))


def test_neither_scale_nor_shift_of_a_feature_counts() -> None:
    x, y = noise(60, 4, 0), noise(60, 3, 1)
    y = y + x[:, :3]
    scaled = x * torch.tensor([1.0, 100.0, 1e-3, 5.0]) + 7
    assert held_out_cca(scaled, y, torch.arange(60)) == pytest.approx(held_out_cca(x, y, torch.arange(60)))


def test_only_principal_components_that_hold_the_share_are_kept() -> None:
    x = noise(500, 3, 0)
    y = torch.cat([x[:, :1]] * 99 + [noise(500, 1, 1)], 1)
    # one direction holds 99 of 100 standardized dimensions
    assert fit_cca(x, y, ridge=0.0, keep=0.95).b.shape == (100, 1)
    assert fit_cca(x, y, ridge=0.0).b.shape == (100, 2)


def test_two_labels_are_told_as_well_as_least_squares_tells_them() -> None:
    labels = torch.arange(100) % 2
    scene = noise(100, 3, 0) + labels[:, None]
    score = correlation_with_labels({0: scene, 1: labels[:, None].double()}, labels)
    assert score.details["layers"]["1"]["value"] == pytest.approx(1.0)
    assert score.details["layer"] == 1
    # of one-hot labels of two classes one direction is left: the correlation is that of least squares
    x = torch.cat([scene, torch.ones(100, 1)], 1).numpy()
    told = x @ np.linalg.lstsq(x, labels.double().numpy(), rcond=None)[0]
    both = torch.nn.functional.one_hot(labels).double()
    inside = fit_cca(scene, both, ridge=0.0).correlations(scene, both)
    assert inside.tolist() == pytest.approx([np.corrcoef(told, labels.numpy())[0, 1]])


def test_the_best_layer_speaks_for_all_and_the_table_and_the_plot_have_each() -> None:
    labels = torch.arange(60) % 3
    good = torch.eye(6, dtype=torch.float64)[labels] + 0.01 * noise(60, 6, 0)
    scenes = {-1: noise(60, 6, 1), 0: noise(60, 6, 2), 1: good}
    tokens = {layer: x.repeat_interleave(4, 0) for layer, x in scenes.items()}
    split = Split(scenes, labels)
    fit = lambda train, valid=None, folds=None: fit_linear(train, valid, folds, strengths=1.0)  # noqa: E731
    scores = {
        "input": correlation_with_input(tokens, tokens[0], torch.arange(240) // 4, name="log-mel energies"),
        "labels": correlation_with_labels(scenes, labels),
        "information": information_by_layer(scenes, labels),
        "probe": probe_by_layer(fit, split, None, split),
    }
    assert scores["input"].details["layer"] == 0
    assert [scores[name].details["layer"] for name in ("labels", "information", "probe")] == [1, 1, 1]
    assert scores["information"].value == scores["probe"].value == pytest.approx(1.0)
    assert "test touched once a layer" in scores["probe"].protocol
    lines = layer_table(scores).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "0", "1", "-1"]
    assert lines[2].split()[1:] == [f"{score.details['layers']['1']['value']:.3f}" for score in scores.values()]
    plot = layer_plot(scores)
    assert plot.count("<circle") == 12
    assert ">out</text>" in plot


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="5 folds take at least 10 clips, got 9"):
        held_out_cca(noise(9, 2, 0), noise(9, 2, 1), torch.arange(9))
    with pytest.raises(ValueError, match="not finite"):
        fit_cca(torch.full((4, 2), torch.nan), noise(4, 2, 0), ridge=0.1)
    with pytest.raises(ValueError, match="got 3 and 4"):
        fit_cca(noise(3, 2, 0), noise(4, 2, 0), ridge=0.1)
