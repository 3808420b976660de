"""CLIP: what belongs together lies together in one space, and apart from all else in the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from mmssl import distributed
from mmssl.encoder import Encoders
from mmssl.nn import joint
from mmssl.nn.partners import info_nce
from mmssl.objectives.paired import begin_scale, bound_scale, in_one_space, refuse_space, skips_parameters
from mmssl.types import Batch, Encoded, Hide, Loss


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
        chunk: clips that are encoded at a time, for batches that do not fit the memory; each is encoded twice then,
            see `joint.in_parts`. None for all at once.
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
        """Cross-entropies in nats, the mean of both directions, summed over pairs; the count is pairs.

        The metric "accuracy" is the share of members whose partner is nearer than all negatives, in both directions.
        """
        vectors, present = self._embedded(batch)
        own = distributed.places(len(batch), exchange=self.training).to(vectors.device)
        labels = joint.labels_of(batch, self.same, own, "CLIP")
        # one gather for all modalities, so that all ranks exchange the same in the same order
        everyone, everywhere, ids = distributed.everyone(vectors, present, labels, exchange=self.training)
        scale = self.log_scale.exp()
        total, count, told = info_nce(
            vectors,
            everyone,
            own,
            scale=scale,
            present=present,
            everywhere=everywhere,
            different=labels[:, None] != ids,
        )
        metrics = {"loss": (total.detach(), count), **told, "scale": (scale.detach()[0] * count, count)}
        return Loss(total, count, metrics | joint.spreads(self.encoder, vectors, present))

    def after_step(self, step: int) -> None:
        """Keep the scale from 1 to 100."""
        bound_scale(self.log_scale)

    def _embedded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, modalities, J) unit vectors, zero where a clip lacks a modality; and on the CPU where not, bool."""
        parts = distributed.parts_of(len(batch), self.chunk, agreed=self.training)
        return in_one_space(batch, self.encoder, self.joint, dim=self.dim, like=self.log_scale, parts=parts)
