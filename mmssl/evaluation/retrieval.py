"""Finding by similarity: how far up the right one is, clips of a class by one of them, and which class is nearest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmssl.evaluation.score import Score, student, wilson

PLACES = (1, 5, 10)
CHUNK = 2**24  # similarities held at a time: 64 MB in float32
# Unit vectors of the same thing differ by rounding from one batch to another, and their similarities by less than this.
TIE = 1e-6


def partner_ranks(queries: Tensor, targets: Tensor, same: Tensor | None = None) -> Tensor:
    """At which place each query finds its partner among all targets, from the most similar on; 1 is the first.

    Ties count against the model: a wrong target as near as the partner stands before it, so that one point for
    everything finds the last place and not the first.

    Args:
        queries, targets: (B, J); row i of one is the partner of row i of the other. Lengths do not count.
        same: (B,) equal for rows whose members are partners of each other too; the nearest of them counts. None where
            a row has its own alone.

    Returns:
        (B,) int64.

    Raises:
        ValueError: other shapes, or values that are not finite.
    """
    if queries.shape != targets.shape or queries.ndim != 2 or not len(queries):
        raise ValueError(
            f"retrieval: the queries are {tuple(queries.shape)} and the targets {tuple(targets.shape)}; they need the "
            "same width, and a partner each"
        )
    if not (torch.isfinite(queries).all() and torch.isfinite(targets).all()):
        raise ValueError("retrieval: vectors that are not finite; leave out the clips they belong to")
    # float64, so that what is rounded off is that of the vectors alone
    directions = normalize(targets.double(), dim=1)
    ids = torch.arange(len(targets)) if same is None else same
    ids = ids.to(queries.device)
    ranks = []
    start = 0
    for part in normalize(queries.double(), dim=1).split(max(1, CHUNK // len(targets))):
        similarity = part @ directions.T
        right = ids[start : start + len(part), None] == ids
        partner = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + ((similarity >= partner - TIE) & ~right).sum(1))
        start += len(part)
    return torch.cat(ranks)


def retrieve(
    queries: Tensor, labels: Tensor, bank: Tensor | None = None, bank_labels: Tensor | None = None
) -> dict[str, Score]:
    """How far up each clip finds those of its class: {"map": Score, "at_1": Score, "at_5": Score, "at_10": Score}.

    Similarity is the cosine. Ties count against the model, as in `partner_ranks`. Average precision is the mean of the
    precisions at each right target; queries of a class that no target has are left out.

    Args:
        queries: (B, E).
        labels: (B,) int64, their classes.
        bank, bank_labels: (M, E) and (M,), what is searched; None for the other queries.

    Raises:
        ValueError: features that are not finite, or fewer than two queries with something to be found.
    """
    own = bank is None or bank_labels is None
    targets, target_labels = (queries, labels) if bank is None or bank_labels is None else (bank, bank_labels)
    if not (torch.isfinite(queries).all() and torch.isfinite(targets).all()):
        raise ValueError("retrieval: features that are not finite; leave out the clips they belong to")
    directions = normalize(targets.double(), dim=1)
    precisions, firsts, numbers = [], [], []
    start = 0
    for part in normalize(queries.double(), dim=1).split(max(1, CHUNK // len(targets))):
        here = slice(start, start + len(part))
        right = labels[here, None] == target_labels
        # a right one stands behind the wrong ones as near as itself
        similarity = part @ directions.T - TIE * right
        if own:
            rows = torch.arange(len(part))
            similarity[rows, start + rows], right[rows, start + rows] = -torch.inf, False
        hits = right.gather(1, similarity.argsort(1, descending=True))
        found = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
        number = hits.sum(1)
        precisions.append((found * hits).sum(1) / number)
        firsts.append(1 + hits.int().argmax(1))
        numbers.append(number)
        start += len(part)
    right = torch.cat(numbers)
    asked = right > 0
    n, among = int(asked.sum()), len(targets) - own
    if n < 2:
        raise ValueError(f"retrieval: {n} clips have another of their class to be found, and a mean takes two")
    precision, first, right = torch.cat(precisions)[asked], torch.cat(firsts)[asked], right[asked]
    lost = len(queries) - n
    searched = "each clip among all others" if own else f"among {among:,} clips of train"
    common = f"cosine, {searched}, ties against the model; median rank of the first {float(first.double().median()):g}"
    common += f"; {lost} clips of a class with nothing to be found left out" if lost else ""
    value = float(precision.mean())
    low, high = student(precision.tolist())
    details = {"median_rank": float(first.double().median())}
    scores = {
        "map": Score(
            "retrieval",
            value,
            max(0.0, low),
            min(1.0, high),
            n,
            f"{common}; interval over queries",
            metric="mAP",
            details=details,
        )
    }
    for place in PLACES:
        hit = int((first <= place).sum())
        chance = recall_by_chance(place, right, among)
        scores[f"at_{place}"] = Score(
            "retrieval",
            hit / n,
            *wilson(hit, n),
            n,
            f"{common}; chance {100 * chance:.3g} %",
            metric=f"R@{place}",
            details={**details, "chance": chance},
        )
    return scores


def recall_by_chance(place: int, right: Tensor, targets: int | None = None) -> float:
    """How many queries in the mean find a right target among the first `place` of all, in any order alike.

    Of n targets m are right: 1 - C(n - m, k) / C(n, k) for the first k.

    Args:
        right: (B,) int64, how many of the targets are right for each query.
        targets: how many there are; B by default.
    """
    n, missed = targets or len(right), torch.ones(len(right), dtype=torch.float64)
    for before in range(min(place, n)):
        missed *= (n - right - before).clamp_min(0) / (n - before)
    return float((1 - missed).mean())


def nearest_class(clips: Tensor, names: Tensor, owners: Tensor) -> Tensor:
    """The class whose mean direction is the most similar.

    Source: Radford et al. 2021 (arXiv:2103.00020), section 3.1.4: the directions of a class's prompts are averaged.

    Args:
        clips: (B, J).
        names: (M, J), one for each prompt.
        owners: (M,) int64, the class that each prompt is of; every class has one.

    Returns:
        (B,) int64; among equally near classes the lowest number.
    """
    sums = names.new_zeros(int(owners.max()) + 1, names.shape[1]).index_add(0, owners, normalize(names, dim=1))
    similarity: Tensor = normalize(clips, dim=1) @ normalize(sums, dim=1).T
    return similarity.argmax(1)
