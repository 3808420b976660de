"""How much is told wrongly of clips that were spoiled, by a classifier that has seen clean ones only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mmssl.evaluation.score import Score, bootstrap_rate

SEVERITIES = (1, 2, 3, 4, 5)


def corruption_error(
    wrong: Mapping[str, np.ndarray], against: Mapping[str, Sequence[float]] | None = None
) -> tuple[float, float, float]:
    """The mean corruption error, and its 95 % interval by the bootstrap over clips.

    The mean over kinds of the mean error over severities. With `against` the errors of each kind, summed over its
    severities, are divided by another model's before the mean over kinds is taken, so that kinds that are hard for any
    model count as those that are easy.

    Source: Hendrycks and Dietterich 2019 (arXiv:1903.12261), section 4, "CE" and "mCE".

    Args:
        wrong: kind -> (severities, n) bool, whether a clip was told wrongly.
        against: kind -> error of another model at each severity; None for errors as they are.

    Raises:
        ValueError: `against` has other kinds or severities, or makes no error of some kind.
    """
    if against is not None and set(against) != set(wrong):
        raise ValueError(
            f"against: has errors of {', '.join(sorted(against))}, and here they are of {', '.join(sorted(wrong))}"
        )
    parts = []
    for kind, found in wrong.items():
        whole = float(len(found)) if against is None else float(sum(against[kind]))
        if against is not None and len(against[kind]) != len(found):
            raise ValueError(f"against: {kind} has {len(against[kind])} severities, and here it has {len(found)}")
        if whole <= 0:
            raise ValueError(f"against: that model makes no error of {kind}, and errors cannot be divided by none")
        parts.append(found.sum(0) / whole)
    of_clip = np.mean(parts, 0)
    low, high = bootstrap_rate(of_clip.tolist(), [1.0] * len(of_clip))
    return float(of_clip.mean()), low, high


def corruption_score(
    wrong: Mapping[str, np.ndarray], metric: str, protocol: str, *, against: Mapping[str, Sequence[float]] | None
) -> Score:
    """`corruption_error` with the errors of each kind and severity in its details."""
    value, low, high = corruption_error(wrong, against)
    errors = {kind: found.mean(1).tolist() for kind, found in wrong.items()}
    n = next(iter(wrong.values())).shape[1]
    return Score("corruption", value, low, high, n, protocol, metric, details={"errors": errors})
