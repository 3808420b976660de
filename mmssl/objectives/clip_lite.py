"""CLIP-Lite: a pair is told from one wrong pair, so nothing hangs on how large a batch is."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl import distributed
from mmssl.encoder import Encoders
from mmssl.nn import joint
from mmssl.nn.partners import Metrics
from mmssl.objectives.paired import begin_scale, bound_scale, in_one_space, refuse_space, skips_parameters
from mmssl.types import Batch, Encoded, Hide, Loss


class CLIPLite(nn.Module):
    """For each pair one more of its first member and somebody else's second: yes to the one, no to the other.

    Source: Shrivastava et al. 2021 (CLIP-Lite, arXiv:2112.07133), section 3: a bound on the mutual information by the
        divergence of Jensen and Shannon (Nowozin et al. 2016, arXiv:1606.00709; Hjelm et al. 2019, arXiv:1808.06670,
        equation 4). Its gradient wants one negative for each positive, where CLIP's bound wants as many as there are.
    Differs from the paper: the critic is CLIP's, a cosine between linear projections times a learned scale within
        CLIP's bounds, where the paper's projections are residual blocks; no prior on the picture's features. Any two
        or more modalities, of which clips may lack some where there are more than two, and `same`, as in `CLIP`.
    Target: the batch itself. The negative is the member of the clip whose seed comes next after the clip's own: in
        training among those of all processes, so that their number and order change nothing.

    Args:
        encoder: of the modalities; of two, the first in the recipe meets a wrong member of the second.
        dim: width of the joint space.
        pool: modality -> how its tokens become one vector: "class", the "last" token (of a caption its end), "mean".
        same: key of a row, such as "text": a pair's negative has another value. None where any other clip will do.
        temperature: at the start; the scale is one over it, and learned.
        chunk: see `CLIP`.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "none"
    pairs: ClassVar[bool] = True
    contrasts: ClassVar[bool] = True

    def __init__(
        self,
        encoder: Encoders,
        *,
        dim: int = 512,
        pool: Mapping[str, joint.Pooling],
        same: str | None = None,
        temperature: float = 0.07,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        refuse_space(encoder, pool, chunk)
        self.encoder = encoder
        self.pool = dict(pool)
        self.same, self.chunk = same, chunk
        self.skips_parameters = skips_parameters(encoder, self.hide)
        self.dim = dim
        self.project = joint.projections({name: encoder[name].dim for name in encoder}, dim)
        self.log_scale = begin_scale(temperature)

    def joint(self, modality: str, encoded: Encoded) -> Tensor:
        """(B, J) float32, of length 1: clips of a modality in the joint space."""
        return joint.unit_vectors(self.pool[modality], self.project[modality], encoded)

    def forward(self, batch: Batch) -> Loss:
        """Minus the bound in nats, summed over the pairs that have a negative; the count is these pairs.

        The metric "accuracy" is the share of them that are nearer than their negative.
        """
        vectors, present = self._embedded(batch)
        own = distributed.places(len(batch), exchange=self.training)
        labels = joint.labels_of(batch, self.same, own, "CLIP-Lite")
        everyone, everywhere, ids, seeds = distributed.everyone(
            vectors, present, labels, batch.seeds, exchange=self.training
        )
        total = (everyone.sum() + self.log_scale.sum()) * 0  # on each process, whatever it has, all are exchanged
        right, count = vectors.new_zeros(()), 0
        with torch.autocast(vectors.device.type, enabled=False):
            scale = self.log_scale.exp()
            for a, b in combinations(range(len(self.encoder)), 2):
                negative = next_other(own[present[:, a] & present[:, b]], seeds, everywhere[:, b], ids)
                mine, other = negative.to(vectors.device)
                yes = scale * (everyone[mine, a] * everyone[mine, b]).sum(1)
                no = scale * (everyone[mine, a] * everyone[other, b]).sum(1)
                total = total + (F.softplus(-yes) + F.softplus(no)).sum()
                right = right + (yes > no).sum()
                count += len(mine)
        metrics: Metrics = {
            "loss": (total.detach(), count),
            "accuracy": (right, count),
            "scale": (scale.detach()[0] * count, count),
        }
        return Loss(total, count, metrics | joint.spreads(self.encoder, vectors, present))

    def after_step(self, step: int) -> None:
        """Keep the scale from 1 to 100."""
        bound_scale(self.log_scale)

    def _embedded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, modalities, J) unit vectors, zero where a clip lacks a modality; and on the CPU where not, bool."""
        parts = distributed.parts_of(len(batch), self.chunk, agreed=self.training)
        return in_one_space(batch, self.encoder, self.joint, dim=self.dim, like=self.log_scale, parts=parts)


def next_other(own: Tensor, seeds: Tensor, has: Tensor, ids: Tensor) -> Tensor:
    """For each clip the one whose seed comes next, around the corner too, that is not the same.

    Args:
        own: (B,) int64 clips, all of which have the modality.
        seeds: (A,) int64 of all clips.
        has: (A,) bool, which of them have the modality.
        ids: (A,) equal where two are the same.

    Returns:
        (2, M) int64: the clips that have such a one, in the order of `own`, and that one.
    """
    order = seeds.argsort()
    order = order[has[order]]
    place = torch.zeros_like(seeds)
    place[order] = torch.arange(len(order))
    found = torch.full_like(own, -1)
    for step in range(1, len(order)):
        left = (found < 0).nonzero()[:, 0]
        if not len(left):
            break
        candidate = order[(place[own[left]] + step) % len(order)]
        good = ids[candidate] != ids[own[left]]
        found[left[good]] = candidate[good]
    return torch.stack([own, found])[:, found >= 0]
