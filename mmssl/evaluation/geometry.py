"""How features fill their space: of how many directions they make use, without any label."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmssl.evaluation.score import Score, jackknife

GROUPS = 10  # left out in turn for the interval


def rank_me(features: Tensor, *, epsilon: float = 1e-7) -> float:
    """The effective rank of features: exp of the entropy of their singular values.

    exp(-sum p log p) with p = s / |s|_1 + epsilon, s the singular values, features as they are, not centered. From 1,
    where all lie on one line, to the smaller of clips and width.

    Source: Garrido et al. 2023, "RankMe" (arXiv:2210.02885), section 3, equations 1 and 2.

    Args:
        features: (B, E).
        epsilon: of the formula.

    Raises:
        ValueError: no clip, or features that are not finite or all 0.
    """
    if not len(features) or not torch.isfinite(features).all() or not features.any():
        raise ValueError(f"rank: takes finite features that are not all 0, got {tuple(features.shape)}")
    values = torch.linalg.svdvals(features.double())
    p = values / values.sum() + epsilon
    return float((-(p * p.log()).sum()).exp())


def spread(features: Tensor) -> float:
    """The mean over dimensions of the deviation (population) of features scaled to unit length.

    0 where all clips have the same direction; 1 / sqrt(E) where directions are even over the sphere.

    Source: Chen and He 2021, "SimSiam" (arXiv:2011.10566), section 4.1.

    Args:
        features: (B, E).

    Raises:
        ValueError: no clip, or features that are not finite.
    """
    if not len(features) or not torch.isfinite(features).all():
        raise ValueError(f"rank: takes finite features of at least one clip, got {tuple(features.shape)}")
    return float(normalize(features.double(), dim=1).std(0, correction=0).mean())


def measure_rank(features: Tensor) -> dict[str, Score]:
    """Effective rank and spread: {"rank_me": Score, "spread": Score}.

    Raises:
        ValueError: fewer clips than are left out for the interval, or features that cannot be measured.
    """
    n, width = features.shape
    if n < GROUPS:
        raise ValueError(f"rank: leaves out each of {GROUPS} groups of clips for its interval, got {n} clips")
    # clips of a manifest often come sorted: every tenth, not the first tenth
    group = torch.arange(n) % GROUPS
    parts = [features[group != g] for g in range(GROUPS)]

    def score(metric: str, of: Callable[[Tensor], float], protocol: str) -> Score:
        value = of(features)
        low, high = jackknife(value, np.array([of(part) for part in parts]))
        interval = f"interval by the jackknife over {GROUPS} groups of clips"
        return Score("rank", value, low, high, n, f"{protocol}; {interval}", metric, percent=False)

    most = min(n, width)
    return {
        "rank_me": score(
            "RankMe", rank_me, f"effective rank of {n:,} x {width} features, not centered, of at most {most:,}"
        ),
        "spread": score(
            "spread",
            spread,
            f"mean deviation of a dimension of unit vectors; even directions have {width**-0.5:.4g}, 1 / sqrt({width})",
        ),
    }
