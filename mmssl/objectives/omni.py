"""One trunk for several modalities without pairs: each learns by itself, in turn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl.encoder import Encoders
from mmssl.types import Batch, Loss


class Omni(nn.Module):
    """Train the encoders of several modalities, each by an objective of its own, in updates of one modality each.

    Source: Girdhar et al. 2022 (OmniMAE, arXiv:2206.08356), section 3, for masked autoencoders of pictures and videos.
    Differs from the paper: any modalities, with frontends and decoders of their own, and any objective that needs
        neither pairs nor labels; a picture is one and no video of two frames.
    Target: that of the objective. A teacher is one modality's alone, its copy of the trunk included.

    Args:
        encoder: of the modalities, usually on one trunk; without one they learn nothing from each other.
        of: modality -> the objective around its encoder. A recipe gives settings, in which each value may be a mapping
            from modality to value.
        weights: modality -> how often it is drawn, relative to the others; equally often by default. The loader draws,
            one modality for each update.

    Raises:
        ValueError: weights of other modalities, or that are not above 0.
    """

    label: ClassVar[str | None] = None
    several: ClassVar[bool] = True
    # what other modalities learn from
    skips_parameters: ClassVar[bool] = True

    def __init__(
        self, encoder: Encoders, *, of: Mapping[str, nn.Module], weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        weights = dict.fromkeys(encoder, 1.0) if weights is None else weights
        if set(weights) != set(encoder) or not all(0 < weight < math.inf for weight in weights.values()):
            raise ValueError(
                f"objective.weights={dict(weights)}: give a number above 0 for each modality, {' and '.join(encoder)}, "
                "and no other, or leave it out to draw all equally often"
            )
        self.encoder = encoder
        self.of = nn.ModuleDict(of)
        self.weights = {name: float(weights[name]) for name in encoder}
        # of each modality: to its objective they are all that there are
        self.updates: Tensor
        self.register_buffer("updates", torch.zeros(len(encoder), dtype=torch.int64))
        self.latest = next(iter(encoder))

    def forward(self, batch: Batch) -> Loss:
        """The loss of the batch's modality, which its metrics are named after."""
        name = self._modality(batch)
        if self.training:
            self.latest = name
        loss: Loss = self.of[name](batch)
        updates = self.updates[list(self.encoder).index(name)].float()
        metrics = {**loss.metrics, "updates": (updates, 1.0)}
        return Loss(loss.total, loss.count, {f"{name}/{metric}": value for metric, value in metrics.items()})

    def after_step(self, step: int) -> None:
        """Tell the objective that learned, with the number of its own updates."""
        place = list(self.encoder).index(self.latest)
        self.updates[place] += 1
        self.of[self.latest].after_step(int(self.updates[place]))  # type: ignore[operator]

    def statistics(self, batch: Batch) -> Tensor:
        """See `training.gradients.share_statistics`; nothing where the batch's objective needs none."""
        inner = self.of[self._modality(batch)]
        if not hasattr(inner, "statistics"):
            return self.updates.new_zeros(1, dtype=torch.float32)
        found: Tensor = inner.statistics(batch)  # type: ignore[operator]
        return found

    @property
    def global_statistics(self) -> Tensor | None:
        return getattr(self.of[self.latest], "global_statistics", None)

    @global_statistics.setter
    def global_statistics(self, sums: Tensor | None) -> None:
        # an update is of one modality, and the others' objectives are not asked
        for inner in self.of.values():
            if hasattr(inner, "statistics"):
                inner.global_statistics = sums  # type: ignore[assignment]

    def _modality(self, batch: Batch) -> str:
        if len(batch.inputs) != 1:
            raise ValueError(f"Omni: a batch is of one modality, and this one has {' and '.join(sorted(batch.inputs))}")
        return next(iter(batch.inputs))
