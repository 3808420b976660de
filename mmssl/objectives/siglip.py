"""SigLIP: of each two clips of different modalities, whether they belong together, yes or no."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl import distributed
from mmssl.encoder import Encoders
from mmssl.nn import joint
from mmssl.nn.heads import AttentionHead
from mmssl.nn.partners import Metrics, info_nce
from mmssl.objectives.paired import in_one_space, refuse_space, skips_parameters
from mmssl.types import Batch, Encoded, Hide, Loss


class SigLIP(nn.Module):
    """Tell each pair from each combination of members of two pairs, every one by itself.

    Source: Zhai et al. 2023 (SigLIP, arXiv:2303.15343), section 3.2 and algorithm 1; across processes as in section
        3.3 and figure 1: the vectors of one process after the other pass by, so memory grows with the clips of a
        process and not with those of all.
    Differs from the paper: as in `CLIP`, any two or more modalities, of which clips may lack some where there are more
        than two, and `same`.
    Target: the batch itself. In training it is that of all processes, and the gradient is that of one process on all
        of it; while evaluating, the loss is that of each micro-batch for itself.

    Args:
        encoder: of the modalities.
        dim: width of the joint space.
        pool: modality -> how its tokens become one vector: "class", the "last" token (of a caption its end), "mean", or
            "attention", the paper's of pictures: a learned query and an MLP, and what they give is not projected, so
            `dim` is the width of that encoder.
        affine: whether projections have a bias, as those of the released models.
        same: key of a row, such as "text": pairs with the same value are no negatives of each other. None where all
            others are.
        temperature: at the start; the scale is one over it, and learned.
        bias: at the start, of all logits; learned. Nearly all combinations are negatives: it begins where they are
            answered right.
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
        dim: int = 768,
        pool: Mapping[str, Literal["mean", "class", "last", "attention"]],
        affine: bool = False,
        same: str | None = None,
        temperature: float = 0.1,
        bias: float = -10.0,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        refuse_space(encoder, pool, chunk)
        if not 0 < temperature <= 1:
            raise ValueError(f"objective.temperature={temperature:g}: must be above 0 and at most 1, and starts at 0.1")
        self.encoder = encoder
        self.pool = dict(pool)
        self.same, self.chunk = same, chunk
        self.skips_parameters = skips_parameters(encoder, self.hide)
        self.dim = dim
        widths = {name: encoder[name].dim for name in encoder}
        attending = [name for name in encoder if pool[name] == "attention"]
        for name in attending:
            if widths[name] != dim:
                raise ValueError(
                    f"objective.pool: {name}: attention: gives vectors as wide as that encoder, which is "
                    f"{widths[name]}, and objective.dim is {dim}; set it to {widths[name]}, or choose another pooling"
                )
        self.attend = nn.ModuleDict({name: AttentionHead(encoder[name].transformer) for name in attending})
        projected = {name: width for name, width in widths.items() if name not in attending}
        self.project = joint.projections(projected, dim, bias=affine)
        self.log_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))
        self.bias = nn.Parameter(torch.tensor([bias]))

    def joint(self, modality: str, encoded: Encoded) -> Tensor:
        """(B, J) float32, of length 1: clips of a modality in the joint space."""
        if modality in self.attend:
            pooled = self.attend[modality](encoded.x.float(), encoded.lengths, encoded.n_prefix)
            return F.normalize(pooled.float(), dim=1)
        return joint.unit_vectors(self.pool[modality], self.project[modality], encoded)

    def forward(self, batch: Batch) -> Loss:
        """Minus the log-likelihood of all answers in nats, summed over combinations; the count is pairs.

        The metric "accuracy" is the share of members whose partner is nearer than all negatives of the micro-batch, in
        both directions.
        """
        vectors, present = self._embedded(batch)
        own = distributed.places(len(batch), exchange=self.training).to(vectors.device)
        labels = joint.labels_of(batch, self.same, own, "SigLIP")
        beside = [present.to(vectors.device), labels]
        with torch.autocast(vectors.device.type, enabled=False):
            answers = partial(_answers, beside)
            if self.training:
                total = distributed.against_all(answers, vectors, self.log_scale, self.bias, beside=beside)
            else:
                total = answers(vectors, vectors, beside, True, self.log_scale, self.bias)
            with torch.no_grad():
                scale, seen = self.log_scale.exp(), vectors.detach()
                _, count, told = info_nce(
                    seen,
                    seen,
                    distributed.places(len(batch), exchange=False).to(seen.device),
                    scale=scale,
                    present=present,
                    everywhere=present,
                    different=labels[:, None] != labels,
                )
        metrics: Metrics = {
            "loss": (total.detach(), count),
            **told,
            "scale": (scale[0] * count, count),
            "bias": (self.bias.detach()[0] * count, count),
        }
        return Loss(total, count, metrics | joint.spreads(self.encoder, vectors, present))

    def after_step(self, step: int) -> None:
        """Nothing here changes with time."""

    def _embedded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, modalities, J) unit vectors, zero where a clip lacks a modality; and on the CPU where not, bool."""
        parts = distributed.parts_of(len(batch), self.chunk, agreed=self.training)
        return in_one_space(batch, self.encoder, self.joint, dim=self.dim, like=self.log_scale, parts=parts)


def _answers(
    beside: Sequence[Tensor],
    vectors: Tensor,
    theirs: Tensor,
    beside_theirs: Sequence[Tensor],
    own: bool,
    log_scale: Tensor,
    bias: Tensor,
) -> Tensor:
    """Minus the log-likelihood of the answers to all combinations of the clips of two processes, a scalar.

    Args:
        vectors, theirs: (B, M, J) and (A, M, J).
        beside, beside_theirs: of each clip which modalities it has, (B, M) bool, and its label, (B,): of clips with one
            label none is a negative.
        own: whether theirs are these very clips: then each is its own positive.
    """
    (present, labels), (everywhere, ids) = beside, beside_theirs
    positive = torch.eye(len(vectors), len(theirs), dtype=torch.bool, device=vectors.device) & own
    told = positive | (labels[:, None] != ids)
    total = vectors.new_zeros(())
    for a, b in combinations(range(vectors.shape[1]), 2):
        logits = (log_scale.exp() * vectors[:, a]) @ theirs[:, b].T + bias
        likelihood = F.logsigmoid(torch.where(positive, logits, -logits))
        total = total - (likelihood * (told & present[:, a, None] & everywhere[:, b])).sum()
    return total
