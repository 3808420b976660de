"""Whether clips unlike those of training are told from those like them, by their distance alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmssl.evaluation.score import Z95, Score

CHUNK = 2**24  # similarities held at a time


def distances(bank: Tensor, queries: Tensor, *, k: int) -> Tensor:
    """(Q,) float64: from each query to the `k`-th nearest of the bank, all scaled to unit length; Euclidean.

    Source: Sun, Ming, Zhu and Li 2022 (arXiv:2204.06507), section 3.

    Args:
        bank: (B, E) training features.
        queries: (Q, E).
        k: the last of the bank where it holds fewer.

    Raises:
        ValueError: features that are not finite, an empty bank, or k below 1.
    """
    if k < 1 or not len(bank):
        raise ValueError(f"ood: k must be at least 1 and the bank not empty, got k = {k} and {len(bank)} clips")
    for name, features in (("training", bank), ("test", queries)):
        if not torch.isfinite(features).all():
            raise ValueError(f"ood: {name} features are not finite; leave out the clips they belong to")
    k = min(k, len(bank))
    directions = normalize(bank.double(), dim=1).T
    found = []
    for part in queries.split(max(1, CHUNK // len(bank))):
        nearest = (normalize(part.double(), dim=1) @ directions).topk(k, dim=1).values[:, -1]
        # float64 sums in another order differ in the last digits, of which a root near 0 makes many: cosines that are
        # equal are equal to 12 digits
        found.append((2 - 2 * nearest.round(decimals=12)).clamp_min(0).sqrt())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """How often a clip from outside lies farther away than one from inside; half of each tie.

    Source: Mann and Whitney 1947; as scikit-learn's `roc_auc_score`.

    Raises:
        ValueError: no clip of either kind.
    """
    if not len(inside) or not len(outside):
        raise ValueError(f"ood: {len(inside)} clips from inside and {len(outside)} from outside; it takes both")
    ordered = np.sort(inside)
    below, through = (np.searchsorted(ordered, outside, side=side) for side in ("left", "right"))
    return float((below + through).mean() / (2 * len(inside)))


def newcombe(value: float, n: int, m: int) -> tuple[float, float]:
    """95 % interval of an area under the curve over n and m clips; within 0 and 1, and no point even at 1.

    Source: Newcombe 2006, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic. Part
    2", Statistics in Medicine 25, method 5: areas whose own deviation, by Hanley and McNeil's formula, reaches `value`.
    """
    pairs, balance = n * m, (n + m) / 2 - 1

    def reach(area: float) -> float:
        room = 1 + balance * ((1 - area) / (2 - area) + area / (1 + area))
        return Z95 * float(np.sqrt(max(area * (1 - area) * room / pairs, 0.0)))

    def border(far: float) -> float:
        near = value
        for _ in range(60):  # halved until float64 ends
            middle = (near + far) / 2
            near, far = (middle, far) if abs(middle - value) <= reach(middle) else (near, middle)
        return near

    return border(0.0), border(1.0)


def measure_novelty(train: Tensor, inside: Tensor, outside: Tensor, *, k: int = 20) -> dict[str, Score]:
    """The area under the ROC curve of telling `outside` from `inside` by the distance from `train`: {"auroc": Score}.

    Args:
        train, inside, outside: (., E) features; neither of the two was seen in training.
        k: see `distances`.

    Raises:
        ValueError: see `distances` and `auroc`.
    """
    near, far = (distances(train, features, k=k).numpy() for features in (inside, outside))
    value = auroc(near, far)
    low, high = newcombe(value, len(near), len(far))
    protocol = (
        f"distance to neighbor {min(k, len(train))} among {len(train):,} training clips, unit length; {len(near):,} "
        f"clips from inside, {len(far):,} from outside; interval by Newcombe's method 5"
    )
    return {"auroc": Score("ood", value, low, high, len(near) + len(far), protocol, metric="AUROC")}
