"""Whole clips told apart: the space in which that is done, and what it costs to be wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.nn.linear import Linear


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


def tell_partners(
    here: Tensor, everyone: Tensor, partner: Tensor, *, scale: Tensor | float, itself: Tensor | None = None
) -> tuple[Tensor, dict[str, tuple[float | Tensor, float]]]:
    """Cross-entropy, in nats, of telling the partner of each vector from all others.

    Source: van den Oord et al. 2018 (InfoNCE, arXiv:1807.03748), section 2.3; with `itself` among the others but left
        out, NT-Xent of Chen et al. 2020 (SimCLR, arXiv:2002.05709), section 2.1.

    Args:
        here: (B, J) of length 1.
        everyone: (G, J) of length 1, of all processes.
        partner: (B,) int64, the place of each one's partner among everyone.
        scale: one over the temperature.
        itself: (B,) int64, the place of each one itself among everyone, where it is there.

    Returns:
        (B,) float32; and name -> (sum, count) for the log: "accuracy" is the share whose partner is nearer than all
        others, "chance_accuracy" that of equal guesses.
    """
    with torch.autocast(here.device.type, enabled=False):
        logits = scale * (here.float() @ everyone.float().T)
        if itself is not None:
            logits = logits.scatter(1, itself[:, None], -torch.inf)
        losses = F.cross_entropy(logits, partner, reduction="none")
    known = logits.detach()
    count, others = len(known), (known > -torch.inf).sum(1) - 1
    # where there is no other, nothing was told
    right = ((known >= known.gather(1, partner[:, None])).sum(1) == 1) & (others > 0)
    chance = (others > 0).div(others + 1)
    return losses, {"accuracy": (right.sum(), count), "chance_accuracy": (chance.sum(), count)}


def both_ways(
    pairs: Tensor, everyone: Tensor, first: int, *, scale: Tensor | float, within: bool
) -> tuple[Tensor, dict[str, tuple[float | Tensor, float]]]:
    """`tell_partners` of both members of each pair, the mean of the two: (B,).

    Args:
        pairs: (B, 2, J) of length 1.
        everyone: (G, 2, J), those of all processes.
        first: the place of the first of `pairs` among everyone.
        within: whether a member is told from the members of its own kind as well, as in SimCLR, and not only from those
            of the other, as in CLIP.
    """
    own = torch.arange(first, first + len(pairs), device=pairs.device)
    sides = []
    for side in (0, 1):
        if within:
            among = torch.cat([everyone[:, 1 - side], everyone[:, side]])
            itself = own + len(everyone)
        else:
            among, itself = everyone[:, 1 - side], None
        sides.append(tell_partners(pairs[:, side], among, own, scale=scale, itself=itself))
    (one, said), (other, said_too) = sides
    return (one + other) / 2, {
        name: (said[name][0] + said_too[name][0], said[name][1] + said_too[name][1]) for name in said
    }
