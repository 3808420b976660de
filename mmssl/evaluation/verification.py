"""Whether two clips are of one speaker, or of one class: told by how alike their features are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmssl.evaluation.score import Score, wilson

# trials of either kind: all pairs up to some 1,000 clips, and a draw of them beyond
MOST_TRIALS = 2**19
PRIORS = (0.01, 0.05)  # of VoxCeleb's papers, and of its challenge since 2020
DRAWS = 200
STOPS = 4096  # thresholds at which draws for the interval are measured, evenly among the trials' own


def verify(
    features: Tensor,
    first: np.ndarray,
    second: np.ndarray,
    target: np.ndarray,
    *,
    center: Tensor | None = None,
    trials: str = "all pairs",
) -> dict[str, Score]:
    """Error rates of telling pairs of one class from pairs of two, by the cosine of their features.

    Args:
        features: (B, E).
        first, second: (P,) places of the two clips of each trial.
        target: (P,) bool, True where both are of one class.
        center: (E,) taken from all features before, such as the mean of training clips.
        trials: what they are, for the protocol line.

    Returns:
        {"eer": Score, "min_dcf_0.01": Score, "min_dcf_0.05": Score}

    Raises:
        ValueError: features that are not finite, or no trial of either kind.
    """
    if not torch.isfinite(features).all():
        raise ValueError("verify: features are not finite; leave out the clips they belong to")
    x = normalize(features.double() - (0.0 if center is None else center.double()), dim=1).numpy()
    scores = np.concatenate(
        [
            np.einsum("pe,pe->p", x[first[start : start + 2**16]], x[second[start : start + 2**16]])
            for start in range(0, len(first), 2**16)
        ]
        or [np.zeros(0)]
    )
    # the same two directions differ in their last digits by the order of sums: equal is what is equal to 12 digits
    scores = scores.round(12)
    values = _rates(*_curve(scores, target))

    # clips are drawn anew, and a trial counts as often as both of its clips were drawn
    order = np.argsort(-scores, kind="stable")
    used, places = np.unique(np.stack([first, second]), return_inverse=True)
    one, other = places.reshape(2, -1)[:, order]
    ends = _ends(scores[order])
    ends = ends[np.unique(np.linspace(0, len(ends) - 1, min(len(ends), STOPS)).round().astype(np.int64))]
    starts, right = np.append(0, ends[:-1] + 1), target[order]
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        times = np.bincount(rng.integers(len(used), size=len(used)), minlength=len(used)).astype(np.float64)
        weights = times[one] * times[other]
        hits = np.add.reduceat(weights * right, starts)
        wrong = np.add.reduceat(weights, starts) - hits
        if hits.any() and wrong.any():
            drawn.append(_rates(*_shares(hits.cumsum(), wrong.cumsum())))
    how = "cosine of features" + ("" if center is None else ", centered on the training clips")
    interval = "interval over clips drawn anew, the classes as they are"
    n_target = int(target.sum())
    counts = f"{trials}: {n_target:,} of one class, {len(target) - n_target:,} of two"
    found = {}
    for i, name in enumerate(["eer", *(f"min_dcf_{prior:g}" for prior in PRIORS)]):
        low, high = np.quantile([rates[i] for rates in drawn], [0.025, 0.975])
        if values[i] == 0:  # no draw of clips shows an error that none of them has
            high = wilson(0, len(used))[1]
        metric = "equal error rate" if i == 0 else f"minimum detection cost at a prior of {PRIORS[i - 1]:g}"
        costs = "" if i == 0 else "; a miss costs as much as a false alarm, and not to look at the clips costs 1"
        protocol = f"{how}; {counts}{costs}; {interval}"
        details = {"targets": n_target, "nontargets": len(target) - n_target}
        found[name] = Score(
            "verify", values[i], float(low), float(high), len(used), protocol, metric, details=details, percent=i == 0
        )
    return found


def equal_error_rate(scores: np.ndarray, target: np.ndarray) -> float:
    """Where as large a share of pairs of one class is missed as of pairs of two is taken for one.

    Trials of equal score are accepted or rejected together. Between two thresholds the shares are taken to lie on the
    line that joins them, so that they always meet.

    Args:
        scores: (P,) the higher, the more alike.
        target: (P,) bool, True where both clips are of one class.

    Raises:
        ValueError: no trial of either kind.
    """
    return _rates(*_curve(scores, target))[0]


def min_dcf(scores: np.ndarray, target: np.ndarray, *, prior: float) -> float:
    """The least cost of a threshold, in units of what it costs to look at no clip at all.

    prior * missed + (1 - prior) * false alarms at the best threshold, over the smaller of prior and 1 - prior.

    Source: the plan of NIST's 2016 speaker recognition evaluation, with both costs at 1.

    Args:
        scores, target: see `equal_error_rate`.
        prior: how likely both clips of a trial are of one class.

    Raises:
        ValueError: no trial of either kind, or a prior that is not between 0 and 1.
    """
    if not 0 < prior < 1:
        raise ValueError(f"verify: a prior lies between 0 and 1, got {prior}")
    return _least_cost(*_curve(scores, target), prior)


def _least_cost(missed: np.ndarray, alarms: np.ndarray, prior: float) -> float:
    return float((prior * missed + (1 - prior) * alarms).min() / min(prior, 1 - prior))


def _rates(missed: np.ndarray, alarms: np.ndarray) -> list[float]:
    """The equal error rate, and the least cost at each of `PRIORS`."""
    # the first threshold at which no more is missed than is falsely accepted; before it there is always another
    after = int(np.argmax(missed <= alarms))
    gap = missed[after - 1] - alarms[after - 1], missed[after] - alarms[after]
    share = gap[0] / (gap[0] - gap[1])
    equal = missed[after - 1] + share * (missed[after] - missed[after - 1])
    return [float(equal), *(_least_cost(missed, alarms, prior) for prior in PRIORS)]


def _curve(scores: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(thresholds,) shares missed and shares of false alarms, from accepting nothing to accepting everything."""
    if target.all() or not target.any():
        raise ValueError(
            f"verify: {int(target.sum())} trials of one class and {int((~target).sum())} of two; it takes both"
        )
    order = np.argsort(-scores, kind="stable")
    right, ends = target[order], _ends(scores[order])
    return _shares(right.cumsum()[ends], (~right).cumsum()[ends])


def _ends(ranked: np.ndarray) -> np.ndarray:
    """The last place of each run of equal scores: trials of equal score are accepted together."""
    return np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)


def _shares(hits: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accepted trials of either kind, counted up from the highest score, to shares missed and of false alarms."""
    return np.append(1.0, 1 - hits / hits[-1]), np.append(0.0, wrong / wrong[-1])


def said_pairs(first: np.ndarray, n: int) -> str:
    """What `all_pairs` gave of `n` clips, for a protocol line."""
    return "all pairs" if len(first) == n * (n - 1) // 2 else "pairs drawn at random"


def all_pairs(labels: Tensor, *, most: int = MOST_TRIALS, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair of two clips once; where there are more than `most` of either kind, a random draw of so many.

    Returns:
        (P,) places of the first clips, of the second ones, and whether both are of one class.
    """
    numbers = labels.numpy()
    n = len(numbers)
    sizes = np.unique(numbers, return_counts=True)[1]
    same = int((sizes * (sizes - 1) // 2).sum())
    if max(same, n * (n - 1) // 2 - same) <= most:
        first, second = np.triu_indices(n, 1)
        return first, second, numbers[first] == numbers[second]
    rng = np.random.default_rng(seed)
    by_class = np.argsort(numbers, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    # pairs of one class: every class by its share of them, then two of its clips
    shares = sizes * (sizes - 1.0)
    drawn = rng.choice(len(sizes), size=min(same, most), p=shares / shares.sum()) if same else np.zeros(0)
    chosen = drawn.astype(np.int64)
    one = rng.integers(sizes[chosen])
    other = (one + 1 + rng.integers(sizes[chosen] - 1)) % sizes[chosen]
    inside = by_class[starts[chosen] + one], by_class[starts[chosen] + other]
    left, right = rng.integers(n, size=(2, 4 * most))
    apart = np.flatnonzero(numbers[left] != numbers[right])[:most]
    first = np.concatenate([inside[0], left[apart]])
    second = np.concatenate([inside[1], right[apart]])
    return first, second, numbers[first] == numbers[second]


def read_trials(path: str | Path, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Trials as VoxCeleb lists them: a line is 1 or 0, for one class or two, and the names of two clips.

    Args:
        ids: of the clips, in their order. A name in the list may also be the end of the path that an id is, from a
            folder on, where no other id ends so.

    Returns:
        See `all_pairs`.

    Raises:
        ValueError: a line that is no trial, or that names no clip of `ids`, or several, by its line.
    """
    places: dict[str, int] = {}
    for place, name in enumerate(ids):
        parts = name.split("/")
        for start in range(1, len(parts)):
            ending = "/".join(parts[start:])
            places[ending] = -1 if ending in places else place
    whole: set[str] = set()
    for place, name in enumerate(ids):
        places[name] = -1 if name in whole else place
        whole.add(name)
    found: list[tuple[int, int, bool]] = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.split()
            if not fields:
                continue
            if len(fields) != 3 or fields[0] not in ("0", "1"):
                raise ValueError(f"{path}:{number}: expected 1 or 0 and two names of clips, got {line.strip()[:60]!r}")
            for name in fields[1:]:
                if places.get(name, -1) < 0:
                    known = "several clips are called or end so" if name in places else "there is no such clip"
                    raise ValueError(f"{path}:{number}: {name!r}: {known}; give the ids of the test manifest's rows")
            found.append((places[fields[1]], places[fields[2]], fields[0] == "1"))
    if not found:
        raise ValueError(f"{path}: no trial in it; a line is 1 or 0 and the names of two clips")
    first, second, target = zip(*found, strict=True)
    return np.array(first), np.array(second), np.array(target)
