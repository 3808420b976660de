"""SLIP: CLIP, and two views of a picture told from those of all other pictures by the same encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl import distributed
from mmssl.encoder import Encoders
from mmssl.nn import joint
from mmssl.nn.heads import POOLS
from mmssl.nn.partners import Projector, both_ways, info_nce
from mmssl.objectives.paired import begin_scale, bound_scale, in_one_space, refuse_space, skips_parameters
from mmssl.types import Batch, Encoded, Frontend, Hide, Loss, Raw

Views = Callable[[Raw, Frontend], tuple[Raw, Raw]]


class SLIP(nn.Module):
    """CLIP's loss, and SimCLR's over two more views of each clip of the modalities that are named.

    Source: Mu et al. 2021 (SLIP, arXiv:2112.12750), section 3 and algorithm 1; SimCLR: Chen et al. 2020
        (arXiv:2002.05709), section 2.1 and algorithm 1.
    Differs from the paper: the norms within the head are LayerNorms (see `Projector`). The views are of the picture
        that CLIP sees, which is a crop, and not of the whole one. Beyond that as in `CLIP`; pairs that are the `same`
        are no negatives here either.
    Target: the batch itself, as in `CLIP`: in both losses that of all processes, with the gradient of one process.

    Args:
        encoder, dim, pool, same, temperature, chunk: see `CLIP`.
        self_supervised: modality -> the name of what makes two views of its clips.
        view_makers: modality -> that: (raw, frontend) -> two views.
        ssl_weight: of SimCLR's loss beside CLIP's.
        ssl_temperature: of SimCLR's loss; it stays.
        ssl_hidden, ssl_dim: widths of the head's two hidden layers, and of what it gives.
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
        self_supervised: Mapping[str, str],
        view_makers: Mapping[str, Views],
        same: str | None = None,
        temperature: float = 0.07,
        ssl_weight: float = 1.0,
        ssl_temperature: float = 0.1,
        ssl_hidden: int = 4096,
        ssl_dim: int = 256,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        refuse_space(encoder, pool, chunk)
        if not ssl_temperature > 0:
            raise ValueError(f"objective.ssl_temperature={ssl_temperature:g}: must be above 0")
        if not self_supervised:
            raise ValueError("objective.self_supervised: names no modality whose views are compared; choose clip")
        self.encoder = encoder
        self.pool = dict(pool)
        self.same, self.chunk = same, chunk
        self.views = dict(view_makers)
        self.ssl_weight, self.ssl_temperature, self.ssl_dim = ssl_weight, ssl_temperature, ssl_dim
        self.skips_parameters = skips_parameters(encoder, self.hide)
        self.dim = dim
        self.project = joint.projections({name: encoder[name].dim for name in encoder}, dim)
        self.heads = nn.ModuleDict(
            {name: Projector(encoder[name].dim, hidden_dim=ssl_hidden, out_dim=ssl_dim) for name in self.views}
        )
        self.log_scale = begin_scale(temperature)

    def joint(self, modality: str, encoded: Encoded) -> Tensor:
        """(B, J) float32, of length 1: clips of a modality in the joint space."""
        return joint.unit_vectors(self.pool[modality], self.project[modality], encoded)

    def forward(self, batch: Batch) -> Loss:
        """CLIP's loss over pairs plus `ssl_weight` times SimCLR's over clips, in nats; the count is pairs.

        With three or more modalities a clip's views count once for each pair that it is a part of.

        The metrics "accuracy" and "view_accuracy" are the shares of members, and of views, whose partner is nearer
        than all negatives.
        """
        vectors, present, views = self._embedded(batch)
        own = distributed.places(len(batch), exchange=self.training).to(vectors.device)
        labels = joint.labels_of(batch, self.same, own, "SLIP")
        everyone, all_views, everywhere, ids = distributed.everyone(
            vectors, views, present, labels, exchange=self.training
        )
        different, scale = labels[:, None] != ids, self.log_scale.exp()
        members = present.sum(1)
        pairs = (members * (members - 1) // 2).to(vectors.device)
        total, count, metrics = info_nce(
            vectors, everyone, own, scale=scale, present=present, everywhere=everywhere, different=different
        )
        metrics |= {"clip_loss": (total.detach(), count), "scale": (scale.detach()[0] * count, count)}
        for place, name in enumerate(self.views):
            which = list(self.encoder).index(name)
            losses, told = both_ways(
                views[:, place],
                all_views[:, place],
                own,
                scale=1 / self.ssl_temperature,
                within=True,
                present=present[:, which],
                negatives=different & everywhere[:, which].to(vectors.device),
            )
            loss = losses.sum()
            total = total + self.ssl_weight * (losses * pairs).sum()
            right, clips = told["accuracy"]
            for metric, value in (("view_loss", loss.detach()), ("view_accuracy", right)):
                before = metrics.get(metric, (0.0, 0.0))
                metrics[metric] = before[0] + value, before[1] + clips
        metrics["loss"] = total.detach(), count
        return Loss(total, count, metrics | joint.spreads(self.encoder, vectors, present))

    def after_step(self, step: int) -> None:
        """Keep the scale from 1 to 100."""
        bound_scale(self.log_scale)

    def _embedded(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """As in `CLIP`; and (B, those with views, 2, P) unit vectors of views, zero where a clip lacks the modality."""
        parts = distributed.parts_of(len(batch), self.chunk, agreed=self.training)
        like = self.log_scale
        vectors, present = in_one_space(batch, self.encoder, self.joint, dim=self.dim, like=like, parts=parts)
        views, _ = joint.embedded(batch, self.views, self._of_views, dim=2 * self.ssl_dim, like=like, parts=parts)
        return vectors, present, views.unflatten(2, (2, self.ssl_dim))

    def _of_views(self, modality: str, raw: Raw) -> Tensor:
        """(B, 2 P), the first view's vector and the second's."""
        encoder, head = self.encoder[modality], self.heads[modality]
        views = self.views[modality](raw, encoder.frontend)
        encoded = [encoder(encoder.tokens(view)) for view in views]
        pool = POOLS[self.pool[modality]]
        return torch.cat([head(pool(own.x, own.lengths, own.n_prefix)) for own in encoded], 1)
