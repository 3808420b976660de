"""Whether the clips of a class lie together: k-means without labels, compared with the classes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmssl.evaluation.score import Score, jackknife

STARTS = 10


def cluster(features: Tensor, labels: Tensor, *, seed: int = 0) -> dict[str, Score]:
    """How far k-means finds the classes: {"nmi": Score, "ari": Score}.

    There are as many clusters as classes. Features are scaled to unit length, as for kNN; of ten starts by k-means++
    the one that ends tightest is kept.

    Args:
        features: (B, E).
        labels: (B,) their classes, which k-means does not see.

    Raises:
        ValueError: features that are not finite, or a single class.
    """
    from sklearn.cluster import KMeans  # costs a second

    if not torch.isfinite(features).all():
        raise ValueError("cluster: features are not finite; leave out the clips they belong to")
    classes, truth = np.unique(labels.numpy(), return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"cluster: takes clips of at least two classes, got {len(labels)} of {len(classes)}")
    x = normalize(features.double(), dim=1).numpy()
    found = KMeans(len(classes), n_init=STARTS, random_state=seed).fit_predict(x)
    table = contingency(truth, found)
    protocol = (
        f"k-means of features of unit length, {len(classes)} clusters, as many as classes, best of {STARTS} starts by "
        "k-means++; interval by the jackknife over clips, the clusters as they are"
    )
    details = {"clusters": len(classes), "seed": seed}
    scores = {}
    for name, metric, statistic in (
        ("nmi", "normalized mutual information", mutual_information),
        ("ari", "adjusted Rand index", rand_index),
    ):
        value, without, counts = statistic(table)
        low, high = jackknife(value, without, counts)
        scores[name] = Score(
            "cluster", value, low, min(1.0, high), len(labels), protocol, metric, details=details, percent=False
        )
    return scores


def contingency(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(classes, clusters) int64: the clips of each class in each cluster."""
    table = np.zeros((truth.max() + 1, found.max() + 1), dtype=np.int64)
    np.add.at(table, (truth, found), 1)
    return table


def mutual_information(table: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Mutual information of classes and clusters over the mean of their entropies: 1 if they agree, 0 if independent.

    Source: as scikit-learn's `normalized_mutual_info_score` with its arithmetic mean.

    Returns:
        The value; what it is where a clip of each occupied cell is left out; and how many clips that cell has.
    """

    def normalized(cells: np.ndarray, rows: np.ndarray, columns: np.ndarray, n: float) -> np.ndarray:
        # each argument a sum of x log x, in which entropies of counts are differences
        of_classes, of_clusters = math.log(n) - rows / n, math.log(n) - columns / n
        shared = of_classes + of_clusters - (math.log(n) - cells / n)
        mean = (of_classes + of_clusters) / 2
        # one class and one cluster agree, by the convention of scikit-learn
        certain = mean < 1e-12
        return np.where(certain, 1.0, np.maximum(shared, 0.0) / np.where(certain, 1.0, mean))

    return _over_counts(table, lambda x: np.where(x > 0, x * np.log(np.maximum(x, 1)), 0.0), normalized)


def rand_index(table: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The share of pairs of clips on which classes and clusters agree, adjusted so that chance has 0 and 1 is perfect.

    Source: Hubert and Arabie 1985, "Comparing partitions", equation 5; as scikit-learn's `adjusted_rand_score`.

    Returns:
        See `mutual_information`.
    """

    def adjusted(cells: np.ndarray, rows: np.ndarray, columns: np.ndarray, n: float) -> np.ndarray:
        by_chance = rows * columns / (n * (n - 1) / 2) if n > 1 else rows * 0.0
        room = (rows + columns) / 2 - by_chance
        certain = np.abs(room) < 1e-12
        return np.where(certain, 1.0, (cells - by_chance) / np.where(certain, 1.0, room))

    return _over_counts(table, lambda x: x * (x - 1) / 2, adjusted)


def _over_counts(
    table: np.ndarray, of_count: Callable[[np.ndarray], np.ndarray], statistic: Callable[..., np.ndarray]
) -> tuple[float, np.ndarray, np.ndarray]:
    """A statistic of three sums over counts: of cells, of rows, of columns; and without one clip of each cell.

    A clip that is left out lowers one cell, one row and one column by 1, so nothing is summed anew.
    """
    n = int(table.sum())
    rows, columns = table.sum(1), table.sum(0)
    sums = [float(of_count(counts.astype(np.float64)).sum()) for counts in (table, rows, columns)]
    value = float(statistic(*(np.array(total) for total in sums), n))
    row, column = np.nonzero(table)
    counts = table[row, column]
    less = []
    for total, lowered in zip(sums, (counts, rows[row], columns[column]), strict=True):
        x = lowered.astype(np.float64)
        less.append(total - of_count(x) + of_count(x - 1))
    return value, statistic(*less, n - 1), counts
