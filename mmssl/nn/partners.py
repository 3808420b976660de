"""Whole clips told apart: an MLP to the space in which that is done, and what it costs to be wrong."""

from __future__ import annotations

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmssl.nn.linear import Linear

Metrics = dict[str, tuple[float | Tensor, float]]
_LOGITS = 2**21  # that are kept at a time: 8 MB


class Projector(nn.Module):
    """An MLP from pooled tokens to the space in which clips are told apart, with a norm and a ReLU after each layer.

    Source: Chen et al. 2020 (SimCLR, arXiv:2002.05709), section 2.1.
    Differs from the papers that use it: norms are LayerNorms. The statistics of BatchNorm are those of a micro-batch on
        one process, so neither micro-batches nor processes would add up to one batch.

    Args:
        dim: width of the pooled tokens.
        hidden_dim, depth: width and number of the layers before the last.
        out_dim: width of the space.
    """

    def __init__(self, dim: int, *, hidden_dim: int, out_dim: int, depth: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [Linear(dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.ReLU()]
            dim = hidden_dim
        self.layers = nn.Sequential(*layers, Linear(dim, out_dim))
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, D) -> (B, J) float32, of length 1."""
        return F.normalize(self.layers(pooled).float(), dim=1)


def both_ways(
    pairs: Tensor,
    everyone: Tensor,
    own: Tensor,
    *,
    scale: Tensor | float,
    within: bool = False,
    present: Tensor | None = None,
    negatives: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Cross-entropy, in nats, of telling the partner of each member of a pair from the members of other pairs.

    Source: van den Oord et al. 2018 (InfoNCE, arXiv:1807.03748), section 2.3, both ways as in Radford et al. 2021
        (CLIP, arXiv:2103.00020), figure 3; `within` the own kind as well, NT-Xent of Chen et al. 2020 (SimCLR,
        arXiv:2002.05709), section 2.1.

    Args:
        pairs: (B, 2, J) of length 1; `everyone` (A, 2, J), those of all processes.
        own: (B,) int64, which of all each pair is.
        scale: one over the temperature.
        within: whether a member is told from the members of its own kind too, and not only from those of the other.
        present: (B,) bool on the CPU, which pairs count; all of them where it is not given.
        negatives: (B, A) bool, which of all each pair is told from, where that is not every other one. What it says of
            a pair and itself is not read.

    Returns:
        (B,) float32, the mean of both ways, 0 for pairs that do not count; and name -> (sum, count) for the log:
        "accuracy" is the share of members whose partner is nearer than all negatives, "chance_accuracy" that of equal
        guesses.
    """
    here = torch.ones(len(pairs), dtype=torch.bool) if present is None else present
    counts, count = here.to(pairs.device), int(here.sum())
    losses, right, chance = [], pairs.new_zeros(()), pairs.new_zeros(())
    rows = torch.arange(len(pairs), device=pairs.device).split(max(1, _LOGITS // max(1, len(everyone))))
    for part in rows:
        given = (pairs[part], everyone, own[part], scale, within, None if negatives is None else negatives[part])
        # of many clips the logits of all would be most of what a step keeps, and cost little to compute again
        found = _told(*given) if len(rows) == 1 else checkpoint(_told, *given, use_reentrant=False)
        losses.append(found[0])
        right = right + found[1][counts[part]].sum()
        chance = chance + found[2][counts[part]].sum()
    return torch.cat(losses) * counts, {"accuracy": (right, count), "chance_accuracy": (chance, count)}


def _told(
    pairs: Tensor,
    everyone: Tensor,
    own: Tensor,
    scale: Tensor | float,
    within: bool,
    negatives: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) the mean cross-entropy of both ways; the share of both members that was told; and that of equal guesses."""
    itself = own[:, None] == torch.arange(len(everyone), device=own.device)
    others = ~itself if negatives is None else negatives & ~itself
    # first those of the other kind, where the partner is, whom nobody lacks: a pair that does not count has it as well
    among = torch.cat([others | itself, others], 1) if within else others | itself
    choices = among.sum(1)
    several = choices > 1  # where there is no other, nothing was told
    losses = right = pairs.new_zeros(len(pairs), dtype=torch.float32)
    with torch.autocast(pairs.device.type, enabled=False):
        for side in (0, 1):
            kinds = [everyone[:, 1 - side], everyone[:, side]] if within else [everyone[:, 1 - side]]
            logits = ((scale * pairs[:, side].float()) @ torch.cat(kinds).float().T).masked_fill(~among, -torch.inf)
            losses = losses + F.cross_entropy(logits, own, reduction="none") / 2
            found = logits.detach()
            right = right + ((found >= found.gather(1, own[:, None])).sum(1) == 1) * several / 2
    return losses, right, several / choices


def info_nce(
    vectors: Tensor,
    everyone: Tensor,
    own: Tensor,
    *,
    scale: Tensor | float,
    present: Tensor,
    everywhere: Tensor,
    different: Tensor,
) -> tuple[Tensor, float, Metrics]:
    """`both_ways` of each two of M modalities, of which a clip may lack some.

    Args:
        vectors: (B, M, J) of length 1; `everyone` (A, M, J), those of all processes.
        own, scale: see `both_ways`.
        present: (B, M) bool on the CPU, whether a clip has a modality; `everywhere` (A, M).
        different: (B, A) bool, which clips may be told from which.

    Returns:
        the sum over pairs; how many pairs there are; and the metrics of `both_ways`.
    """
    total = right = chance = vectors.new_zeros(())
    count = 0.0
    everywhere = everywhere.to(vectors.device)
    for pair in map(list, combinations(range(vectors.shape[1]), 2)):
        losses, told = both_ways(
            vectors[:, pair],
            everyone[:, pair],
            own,
            scale=scale,
            present=present[:, pair].all(1),
            negatives=different & everywhere[:, pair].all(1),
        )
        total = total + losses.sum()
        right, chance = right + told["accuracy"][0], chance + told["chance_accuracy"][0]
        count += told["accuracy"][1]
    return total, count, {"accuracy": (right, count), "chance_accuracy": (chance, count)}
