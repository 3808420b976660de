"""Finding by similarity: how far up the right one is, and which class is nearest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

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


def recall_by_chance(place: int, right: Tensor) -> float:
    """How many queries in the mean find a right target among the first `place` of all, in any order alike.

    Of n targets m are right: 1 - C(n - m, k) / C(n, k) for the first k.

    Args:
        right: (B,) int64, how many of the B targets are right for each query.
    """
    n, missed = len(right), torch.ones(len(right), dtype=torch.float64)
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
