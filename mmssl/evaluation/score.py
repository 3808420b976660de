"""A measured value with its interval and the one line that says how it was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """One number of an evaluation, fit to be printed, compared and stored.

    task: "linear", "knn", "ctc", ...
    value: a share between 0 and 1 (an error rate may pass 1), printed as percent; where `percent` is false a plain
        number, printed as it is. The mean where there are several draws of labels.
    low, high: 95 % interval of `value`; `protocol` says what it covers.
    n: test clips.
    protocol: how it was measured, in one line.
    deviation: of one draw of labels from another; None where there is only one.
    details: what was chosen and on what, as plain values.
    """

    task: str
    value: float
    low: float
    high: float
    n: int
    protocol: str
    metric: str = "accuracy"
    deviation: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    percent: bool = True

    def __str__(self) -> str:
        if not self.percent:
            return (
                f"{self.task}: {self.metric} {self.value:.4g} "
                f"(95 % interval {self.low:.4g} to {self.high:.4g}, n = {self.n:,})\n  {self.protocol}"
            )
        deviation = "" if self.deviation is None else f" ± {100 * self.deviation:.1f}"
        return (
            f"{self.task}: {self.metric} {100 * self.value:.1f}{deviation} % "
            f"(95 % interval {100 * self.low:.1f} to {100 * self.high:.1f}, n = {self.n:,})\n  {self.protocol}"
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """The score as JSON text, written to `path` where one is given."""
        text = json.dumps(asdict(self), ensure_ascii=False, indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text


def write_scores(path: str | Path, scores: Mapping[str, Score]) -> None:
    """Scores by name as JSON, in folders that are made."""
    plain = {name: asdict(score) for name, score in scores.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(plain, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def wilson(correct: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of `n` independent trials; within 0 and 1, and no point even at 0 or n correct.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22.

    Raises:
        ValueError: there is no trial.
    """
    if n < 1:
        raise ValueError(f"an interval needs at least one trial, got n = {n}")
    share, scale = correct / n, 1 + Z95**2 / n
    middle = (share + Z95**2 / (2 * n)) / scale
    half = Z95 / scale * np.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def average_precisions(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """For each class, the mean of the precisions at each clip that has it, the clips ranked by their score.

    Source: as scikit-learn's `average_precision_score`: clips of equal score are one step of the ranking.

    Args:
        scores: (B, classes).
        truth: (B, classes) bool.

    Returns:
        (classes,), NaN for a class that no clip has. Their mean over the others is what AudioSet calls mAP.
    """
    found = np.full(scores.shape[1], np.nan)
    for column in np.flatnonzero(truth.any(0)):
        order = np.argsort(-scores[:, column], kind="stable")
        ranked, hits = scores[order, column], truth[order, column].cumsum()
        last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of each run of equal scores
        found[column] = np.sum(np.diff(hits[last], prepend=0) * hits[last] / (last + 1)) / hits[-1]
    return found


def student(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of a few independent draws, by Student's t distribution."""
    from scipy.special import stdtrit  # here, because it costs a third of a second

    if len(values) < 2:
        raise ValueError(f"the spread over draws needs at least two draws, got {len(values)}")
    half = stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(len(values))
    mean = np.mean(values)
    return float(mean - half), float(mean + half)


def jackknife(value: float, without: np.ndarray, counts: np.ndarray | None = None) -> tuple[float, float]:
    """95 % interval of a smooth statistic from what it is without each clip, or without each group of clips.

    Deterministic, and right for statistics that a bootstrap biases because it draws clips twice (entropies, ranks).

    Source: Tukey 1958; Efron and Tibshirani 1993, "An introduction to the bootstrap", chapter 11. By Student's t.

    Args:
        value: of all clips.
        without: (G,) the statistic where one clip or group is left out.
        counts: (G,) how many clips each of these values stands for; None for one each.

    Raises:
        ValueError: fewer than two values.
    """
    from scipy.special import stdtrit

    weights = np.ones(len(without)) if counts is None else np.asarray(counts, dtype=np.float64)
    n = weights.sum()
    if n < 2:
        raise ValueError(f"a jackknife leaves out at least two clips in turn, got {int(n)}")
    mean = float(np.average(without, weights=weights))
    error = np.sqrt((n - 1) / n * (weights * (np.asarray(without) - mean) ** 2).sum())
    half = stdtrit(n - 1, 0.975) * error
    return float(value - half), float(value + half)


def bootstrap_rate(errors: Sequence[float], sizes: Sequence[float], *, draws: int = 1000) -> tuple[float, float]:
    """95 % interval of sum(errors) / sum(sizes) when the clips, not their words, are drawn anew.

    Words of one clip fail together, so an interval over words alone would be too narrow. The draws are seeded: the
    same errors give the same interval.

    Source: Bisani and Ney 2004, "Bootstrap estimates for confidence intervals in ASR performance evaluation".

    Args:
        errors: of each clip, such as wrong words.
        sizes: of each clip, such as words said.
        draws: of as many clips, with replacement. Without any error the upper limit is Wilson's, of clips, and where
            all of each clip is wrong the lower one.
    """
    if len(errors) == 0 or sum(sizes) <= 0:
        raise ValueError(f"an error rate needs something to count, got {len(errors)} clips of size {sum(sizes)}")
    pairs = np.stack([np.asarray(errors, dtype=np.float64), np.asarray(sizes, dtype=np.float64)], axis=1)
    rng = np.random.default_rng(0)
    # one draw at a time: all at once would hold draws x clips
    sums = np.stack([pairs[rng.integers(len(pairs), size=len(pairs))].sum(0) for _ in range(draws)])
    counted = sums[sums[:, 1] > 0]  # a draw of nothing but silence has no rate
    low, high = np.quantile(counted[:, 0] / counted[:, 1], [0.025, 0.975])
    # where nothing went wrong no draw is wrong: then so many clips say how much may have been missed
    if not pairs[:, 0].any():
        return float(low), wilson(0, len(pairs))[1]
    if (pairs[:, 0] == pairs[:, 1]).all():
        return wilson(len(pairs), len(pairs))[0], float(high)
    return float(low), float(high)
