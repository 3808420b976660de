"""CLIP: what belongs together lies together in one space, and apart from all else in the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl import distributed
from mmssl.encoder import Encoders
from mmssl.nn.heads import POOLS
from mmssl.nn.spread import spread
from mmssl.types import Batch, Encoded, Hide, Loss

_LARGEST = math.log(100.0)  # of the learned scale; Radford et al., section 2.5


class CLIP(nn.Module):
    """Tell the partner of each member of a pair from the members of all other pairs, in both directions.

    Source: Radford et al. 2021 (CLIP, arXiv:2103.00020), section 2.3 and figure 3; the scale, its start at 1 / 0.07 and
        its bound of 100 as in section 2.5. Sound and text as in CLAP (Wu et al. 2023, arXiv:2211.06687, section 2.1).
    Differs from the paper: any two or more modalities, of which all pairs are told apart by one scale, and where there
        are more than two a clip may lack some; pairs that agree in a key of their rows need not be negatives of each
        other (`same`). Sections 2.3 and 2.5 leave open on what the bound works: here on the weight, after each update.
    Target: the batch itself. In training it is that of all processes, and the gradient is that of one process on all
        of it; while evaluating, the loss is that of each micro-batch for itself.

    Args:
        encoder: of the modalities.
        dim: width of the joint space.
        pool: modality -> how its tokens become one vector: "class", the "last" token (of a caption its end), "mean".
        same: key of a row, such as "text": pairs with the same value are no negatives of each other. None where all
            others are.
        temperature: at the start; the scale is one over it, and learned.
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
        pool: Mapping[str, Literal["mean", "class", "last"]],
        same: str | None = None,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        if set(pool) != set(encoder):
            raise ValueError(
                f"objective.pool={dict(pool)}: name a pooling for each modality, {' and '.join(encoder)}, and no other"
            )
        for name, pooling in pool.items():
            if pooling == "class" and encoder[name].n_prefix == 0:
                raise ValueError(
                    f"objective.pool: {name}: class: this encoder has no class token (modality.{name}.encoder.prefix="
                    "0); set it to 1, or choose mean or last"
                )
        if not 0.01 <= temperature <= 1:
            raise ValueError(f"objective.temperature={temperature:g}: must be from 0.01 to 1, and starts at 0.07")
        self.encoder = encoder
        self.pool = dict(pool)
        self.same = same
        # of more than two modalities a batch may have none of one
        self.skips_parameters = len(encoder) > 2 or any(encoder[name].skips_parameters(self.hide) for name in encoder)
        self.dim = dim
        self.project = nn.ModuleDict({name: _projection(encoder[name].dim, dim) for name in encoder})
        self.log_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))

    def joint(self, modality: str, encoded: Encoded) -> Tensor:
        """(B, J) float32, of length 1: clips of a modality in the joint space."""
        pooled = POOLS[self.pool[modality]](encoded.x, encoded.lengths, encoded.n_prefix)
        return F.normalize(self.project[modality](pooled.float()).float(), dim=1)

    def forward(self, batch: Batch) -> Loss:
        """Cross-entropies in nats, the mean of both directions, summed over pairs; the count is pairs.

        The metric "accuracy" is the share of members whose partner is nearer than all negatives, in both directions.
        """
        vectors, present = self._embedded(batch)
        labels = self._labels(batch, vectors.device)
        everyone, everywhere, ids, start = vectors, present, labels, 0
        if self.training:
            parts = distributed.all_gather(present)
            start = sum(len(part) for part in parts[: distributed.rank()])
            everywhere = torch.cat(parts)
            # one gather for all modalities, so that all ranks exchange the same in the same order
            everyone = distributed.gather(vectors)
            ids = None if labels is None else torch.cat(distributed.all_gather(labels))
        own = torch.arange(start, start + len(batch), device=vectors.device)
        itself = F.one_hot(own, len(everyone)).bool()
        equal = itself if labels is None or ids is None else labels[:, None] == ids
        everywhere = everywhere.to(vectors.device)
        sums = dict.fromkeys(("total", "right", "chance"), vectors.new_zeros(()))
        count = 0
        with torch.autocast(vectors.device.type, enabled=False):
            scale = self.log_scale.exp()
            for a, b in combinations(range(len(self.encoder)), 2):
                both = present[:, a] & present[:, b]
                count += int(both.sum())
                both = both.to(vectors.device)
                # of clips that lack a member, the place is kept and never told apart from anything
                among = (everywhere[:, a] & everywhere[:, b] & ~equal) | itself
                for here, there in ((a, b), (b, a)):
                    logits = (scale * (vectors[:, here] @ everyone[:, there].T)).masked_fill(~among, -torch.inf)
                    losses = F.cross_entropy(logits, own, reduction="none")
                    told = _told(logits.detach(), own) & both
                    sums["total"] = sums["total"] + (losses * both).sum() / 2
                    sums["right"] = sums["right"] + told.sum() / 2
                    sums["chance"] = sums["chance"] + (both / among.sum(1)).sum() / 2
        metrics: dict[str, tuple[float | Tensor, float]] = {
            "loss": (sums["total"].detach(), count),
            "accuracy": (sums["right"], count),
            "chance_accuracy": (sums["chance"], count),
            "scale": (scale.detach()[0] * count, count),
        }
        for place, name in enumerate(self.encoder):
            # times the root of their width: of unit vectors that point everywhere it is about 1
            found = vectors.detach()[:, place][present[:, place].to(vectors.device)] * self.dim**0.5
            metrics[f"{name}_std"] = spread(found) * len(found), len(found)
        return Loss(sums["total"], count, metrics)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Keep the scale from 1 to 100."""
        self.log_scale.clamp_(0.0, _LARGEST)

    def _embedded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, modalities, J) unit vectors, zero where a clip lacks a modality; and on the CPU where not, bool."""
        vectors, present = [], []
        for name in self.encoder:
            rows = batch.rows.get(name, torch.arange(len(batch)) if name in batch.inputs else torch.arange(0))
            # depends on a parameter wherever it is zero: all ranks must have something to send back
            full = self.log_scale.new_zeros(len(batch), self.dim) * self.log_scale
            if len(rows):
                encoder = self.encoder[name]
                found = self.joint(name, encoder(encoder.tokens(batch.of(name))))
                full = found if len(rows) == len(batch) else full.index_copy(0, rows.to(full.device), found)
            vectors.append(full)
            present.append(torch.zeros(len(batch), dtype=torch.bool).index_fill(0, rows, True))
        return torch.stack(vectors, 1), torch.stack(present, 1)

    def _labels(self, batch: Batch, device: torch.device) -> Tensor | None:
        if self.same is None:
            return None
        if batch.labels is None:
            raise ValueError(f"CLIP: every clip needs its {self.same!r}, by which pairs are the same (objective.same)")
        return batch.labels.to(device)


def _projection(width: int, dim: int) -> nn.Linear:
    linear = nn.Linear(width, dim, bias=False)
    nn.init.normal_(linear.weight, std=width**-0.5)
    return linear


def _told(logits: Tensor, own: Tensor) -> Tensor:
    """(B,) bool: whether the partner is nearer than each negative, where there is one."""
    partner = logits.gather(1, own[:, None])
    return ((logits >= partner).sum(1) == 1) & ((logits > -torch.inf).sum(1) > 1)
