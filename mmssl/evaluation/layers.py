"""What each layer of an encoder holds: of what was measured, and of the classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b, file_digest
from html import escape
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mmssl.evaluation.clusters import cluster
from mmssl.evaluation.probe import principal, standardization
from mmssl.evaluation.protocol import Fit, Split, measure
from mmssl.evaluation.score import Score, student

FOLDS = 5
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # in variances of a standardized feature
COLORS = ("#4477aa", "#ee6677", "#228833", "#aa3377")
OUTPUT = -1

Values = Mapping[int, tuple[float, float, float]]  # layer -> value, low, high


@dataclass(frozen=True)
class CCA:
    """Directions of two sets of features along which they are correlated most, one pair after the other.

    x_mean, x_std, y_mean, y_std: of the rows that it was fitted on.
    a: (D, k) and b: (P, k), of standardized features.
    weights: (k,) the part of y that each pair stands for; they add up to 1.
    """

    x_mean: Tensor
    x_std: Tensor
    y_mean: Tensor
    y_std: Tensor
    a: Tensor
    b: Tensor
    weights: Tensor

    def correlations(self, x: Tensor, y: Tensor) -> Tensor:
        """(n, D) and (n, P), rows that belong together -> (k,); 0 for a pair that does not vary in them."""
        u = (x.double() - self.x_mean) / self.x_std @ self.a
        v = (y.double() - self.y_mean) / self.y_std @ self.b
        u, v = u - u.mean(0), v - v.mean(0)
        scale = (u.square().sum(0) * v.square().sum(0)).sqrt()
        return torch.where(scale > 1e-12, (u * v).sum(0) / scale.clamp_min(1e-12), 0.0)

    def weighted(self, x: Tensor, y: Tensor) -> float:
        """The mean of the correlations by `weights`."""
        return float(self.correlations(x, y) @ self.weights)


def fit_cca(x: Tensor, y: Tensor, *, ridge: float, keep: float = 1.0) -> CCA:
    """Regularized canonical correlation analysis of standardized features.

    Source: Hotelling 1936; the ridge on x is Vinod's (1976), the principal components of y are as in SVCCA (Raghu et
        al. 2017, arXiv:1706.05806), and the weights those of Morcos et al. 2018 (arXiv:1806.05759), section 2.2,
        "projection weighting", as Pasad et al. 2021 (arXiv:2107.04734) use them.
    Differs from Morcos et al.: pairs are weighted by what they stand for in y, which is the same for every x, and not
        by what they stand for in x.

    Args:
        x: (n, D).
        y: (n, P).
        ridge: added to the variance along each principal axis of x.
        keep: of y, so many principal components as hold this share of its variance.

    Raises:
        ValueError: rows that do not belong together, less than two, or values that are not finite.
    """
    return fit_ccas(x, y, ridges=[ridge], keep=keep)[0]


def fit_ccas(x: Tensor, y: Tensor, *, ridges: Sequence[float], keep: float = 1.0) -> list[CCA]:
    """Several ridges on the same rows: see `fit_cca`."""
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"CCA: takes two rows or more that belong together, got {len(x)} and {len(y)}")
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError("CCA: features are not finite; leave out the clips they belong to")
    n = len(x)
    x, y = x.double(), y.double()
    (x_mean, x_std), (y_mean, y_std) = standardization(x), standardization(y)
    axes, u, spread = principal((x - x_mean) / x_std)
    theirs, v, also = principal((y - y_mean) / y_std)
    order = also.argsort(descending=True)
    share = also[order].cumsum(0) / also.sum().clamp_min(1e-12)
    # the first that reaches the share is still needed; what is left of nothing is no direction
    kept = order[
        (share - also[order] / also.sum().clamp_min(1e-12) < keep - 1e-12) & (also[order] > 1e-10 * also.max())
    ]
    real = spread > 1e-10 * spread.max()
    axes, u, spread = axes[:, real], u[:, real], spread[real] / n
    theirs, v = theirs[:, kept] * (n / also[kept]).sqrt(), v[:, kept] * (n / also[kept]).sqrt()
    across = u.T @ v / n
    found = []
    for ridge in ridges:
        scale = (spread + ridge).rsqrt()
        left, _, right = torch.linalg.svd(scale[:, None] * across, full_matrices=False)
        b = theirs @ right.T
        # of each standardized dimension of y, what it has in common with each pair's direction
        weights = ((y - y_mean) / y_std).T @ (v @ right.T)
        weights = weights.abs().sum(0)
        a = axes @ (scale[:, None] * left)
        found.append(CCA(x_mean, x_std, y_mean, y_std, a, b, weights / weights.sum().clamp_min(1e-300)))
    return found


def held_out_cca(x: Tensor, y: Tensor, groups: Tensor, *, keep: float = 1.0) -> tuple[float, float, float]:
    """Canonical correlation of rows that had no part in the directions: its mean over folds, and the interval.

    For each of `FOLDS` folds the ridge is the one that is best on the next fold when fitted on all others; then the
    directions are fitted on all but the fold itself. Without held-out rows the correlation of anything with
    anything comes near 1 where there are few of them; so measured, what is independent has 0 on average.

    Args:
        x: (n, D), y: (n, P).
        groups: (n,) int64 from 0, such as the clip of each token: group g belongs to fold g % `FOLDS`.
        keep: see `fit_cca`.

    Raises:
        ValueError: a fold without two rows, or see `fit_cca`.
    """
    fold = groups % FOLDS
    if int(fold.bincount(minlength=FOLDS).min()) < 2:
        raise ValueError(f"CCA: {FOLDS} folds take at least {2 * FOLDS} clips, got {len(groups.unique())}")
    values = []
    for held in range(FOLDS):
        nxt = (held + 1) % FOLDS
        known, choose, out = (fold != held) & (fold != nxt), fold == nxt, fold == held
        tried = [cca.weighted(x[choose], y[choose]) for cca in fit_ccas(x[known], y[known], ridges=RIDGES, keep=keep)]
        ridge = RIDGES[max(range(len(RIDGES)), key=tried.__getitem__)]
        values.append(fit_cca(x[fold != held], y[fold != held], ridge=ridge, keep=keep).weighted(x[out], y[out]))
    low, high = student(values)
    return sum(values) / FOLDS, max(-1.0, low), min(1.0, high)


def correlation_with_input(tokens: Mapping[int, Tensor], reference: Tensor, owners: Tensor, *, name: str) -> Score:
    """How far what was measured can be told linearly from each layer, token by token.

    Args:
        tokens: layer -> (n, D).
        reference: (n, P) what was measured where the token is, such as log-mel energies.
        owners: (n,) the clip of each.
        name: of the reference.
    """
    values = {layer: held_out_cca(x, reference, owners, keep=0.99) for layer, x in tokens.items()}
    protocol = (
        f"canonical correlation with {name}, weighted by the part of its variance (99 % kept) that each pair stands "
        f"for, {len(reference):,} tokens; directions and ridge from the other of {FOLDS} folds of clips, interval over "
        "folds"
    )
    return over_layers("input", f"CCA with {name}", values, int(owners.unique().numel()), protocol, percent=False)


def correlation_with_labels(scenes: Mapping[int, Tensor], labels: Tensor) -> Score:
    """How far classes can be told linearly from each layer: CCA with one-hot labels.

    Args:
        scenes: layer -> (B, E).
        labels: (B,) int64 classes.
    """
    _, numbers = labels.unique(return_inverse=True)
    targets, places = one_hot(numbers).double(), dealt_out(numbers)
    values = {layer: held_out_cca(x, targets, places) for layer, x in scenes.items()}
    protocol = (
        f"canonical correlation with {targets.shape[1]} one-hot labels, weighted by the part of them that each pair "
        f"stands for; directions and ridge from the other of {FOLDS} folds of clips, interval over folds"
    )
    return over_layers("labels", "CCA with labels", values, len(labels), protocol, percent=False)


def dealt_out(numbers: Tensor) -> Tensor:
    """(B,) int64, the place of each clip when they lie class by class.

    Modulo the number of folds it deals each class out evenly, going on from one class to the next, so that folds are
    equally large even where every class has fewer clips than there are folds.
    """
    places = torch.empty_like(numbers)
    places[numbers.argsort(stable=True)] = torch.arange(len(numbers))
    return places


def information_by_layer(scenes: Mapping[int, Tensor], labels: Tensor) -> Score:
    """Normalized mutual information of labels with k-means clusters of each layer: see `cluster`."""
    found = {layer: cluster(x, labels)["nmi"] for layer, x in scenes.items()}
    values = {layer: (score.value, score.low, score.high) for layer, score in found.items()}
    protocol = next(iter(found.values())).protocol
    return over_layers("information", "normalized mutual information", values, len(labels), protocol, percent=False)


def probe_by_layer(
    fit: Fit,
    train: Split,
    valid: Split | None,
    test: Split,
    *,
    per_class: int | None = None,
    share: float | None = None,
    draws: int = 5,
) -> Score:
    """The accuracy of a classifier fitted on each layer for itself: see `measure`."""

    def only(split: Split | None, layer: int) -> Split | None:
        return None if split is None else replace(split, features={layer: split.layers[layer]})

    found = {}
    for layer in sorted(test.layers):
        known, testing = only(train, layer), only(test, layer)
        assert known is not None
        assert testing is not None
        found[layer] = measure(
            fit, known, only(valid, layer), testing, task="layers", per_class=per_class, share=share, draws=draws
        )
    values = {layer: (score.value, score.low, score.high) for layer, score in found.items()}
    best = max(sorted(values), key=lambda layer: values[layer][0])
    protocol = found[best].protocol.replace("test touched once", "test touched once a layer")
    return over_layers("probe", "probe accuracy", values, len(test), protocol, percent=True)


def over_layers(task: str, metric: str, values: Values, n: int, protocol: str, *, percent: bool) -> Score:
    """One score of several layers: the highest, of equal ones the lowest layer, and all of them in its details."""
    best = max(sorted(values), key=lambda layer: values[layer][0])
    value, low, high = values[best]
    layers = {str(i): {"value": value, "low": low, "high": high} for i, (value, low, high) in sorted(values.items())}
    said = "highest of the layers on the clips measured; the table has all"
    return Score(
        f"layers/{task}", value, low, high, n, f"{protocol}; layer {best}, {said}", metric,
        details={"layer": best, "layers": layers}, percent=percent,
    )  # fmt: skip


def layers_file(run: str | Path, modality: str) -> Path:
    """Where a run's folder keeps what the layers of one of its encoders hold, for its page."""
    return Path(run) / f"layers_{modality}.json"


def weights_of(run: str | Path) -> str | None:
    """What tells the weights in the folder of a run from those of another time; None where there are none."""
    file = Path(run) / "encoder.safetensors"
    if not file.is_file():
        return None
    with file.open("rb") as content:
        return file_digest(content, partial(blake2b, digest_size=8)).hexdigest()


def read_layers(path: str | Path) -> dict[str, Score]:
    """Scores over layers, as `write_scores` has written them.

    Raises:
        ValueError: the file holds none.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        scores = {str(name): Score(**row) for name, row in found.items()}
        rows = [(int(i), row) for score in scores.values() for i, row in score.details["layers"].items()]
        whole = all(isinstance(row[key], int | float) for _, row in rows for key in ("value", "low", "high"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        rows, whole = [], False
    if not rows or not whole:
        raise ValueError(f"{path}: holds no scores of layers; let mmssl evaluate --task layers write it again")
    return scores


def layer_table(scores: Mapping[str, Score]) -> str:
    """The values of each layer in lines; -1 is the output after the final norm."""
    columns = {name: score.details["layers"] for name, score in scores.items()}
    layers = sorted({int(i) for column in columns.values() for i in column})
    # the output comes last, where it is computed
    layers = [i for i in layers if i >= 0] + [i for i in layers if i < 0]
    lines = ["layer " + " ".join(f"{name:>12}" for name in columns)]
    for i in layers:
        cells = [f"{column[str(i)]['value']:>12.3f}" if str(i) in column else " " * 12 for column in columns.values()]
        lines.append(f"{i:>5} " + " ".join(cells))
    return "\n".join(lines)


def layer_plot(scores: Mapping[str, Score], *, width: int = 640, height: int = 360) -> str:
    """The values of each layer as a picture, SVG, with their intervals; the output after the final norm is "out"."""
    layers = sorted({int(i) for score in scores.values() for i in score.details["layers"]})
    layers = [i for i in layers if i >= 0] + [i for i in layers if i < 0]
    left, right, top, bottom = 44, 16, 16 + 18 * len(scores), 44
    floor = min([0.0, *(row["low"] for score in scores.values() for row in score.details["layers"].values())])

    def x(layer: int) -> float:
        return left + (layers.index(layer) + 0.5) * (width - left - right) / len(layers)

    def y(value: float) -> float:
        return height - bottom - (value - floor) / (1 - floor) * (height - top - bottom)

    drawn = []
    for share in range(6):
        level = floor + share * (1 - floor) / 5
        drawn.append(f'<line x1="{left}" x2="{width - right}" y1="{y(level):.1f}" y2="{y(level):.1f}" stroke="#ddd"/>')
        drawn.append(f'<text x="{left - 6}" y="{y(level) + 4:.1f}" text-anchor="end">{level:.2g}</text>')
    for i in layers:
        drawn.append(f'<text x="{x(i):.1f}" y="{height - 26}" text-anchor="middle">{"out" if i < 0 else i}</text>')
    drawn.append(f'<text x="{(left + width - right) / 2:.1f}" y="{height - 8}" text-anchor="middle">layer</text>')
    for place, ((name, score), color) in enumerate(zip(scores.items(), COLORS, strict=False)):
        rows = {int(i): row for i, row in score.details["layers"].items()}
        order = [i for i in layers if i in rows]
        for i in order:
            span = f'y1="{y(rows[i]["low"]):.1f}" y2="{y(min(1.0, rows[i]["high"])):.1f}"'
            drawn.append(f'<line x1="{x(i):.1f}" x2="{x(i):.1f}" {span} stroke="{color}" stroke-opacity="0.4"/>')
            note = f"<title>{escape(name)}, layer {i}: {rows[i]['value']:.4g}</title>"
            spot = f'cx="{x(i):.1f}" cy="{y(rows[i]["value"]):.1f}"'
            drawn.append(f'<circle {spot} r="3" fill="{color}">{note}</circle>')
        spots = " ".join(f"{x(i):.1f},{y(rows[i]['value']):.1f}" for i in order if i >= 0)
        drawn.append(f'<polyline points="{spots}" fill="none" stroke="{color}"/>')
        drawn.append(f'<text x="{left}" y="{14 + 18 * place}" style="fill:{color}">{escape(score.metric)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>{"".join(drawn)}</svg>\n'
    )
