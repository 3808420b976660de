"""CPC: from what was heard so far, tell the features that come some steps later from others of the clip."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from mmssl.encoder import Encoder
from mmssl.nn.contrast import contrast_steps, steps_metrics
from mmssl.types import Batch, Hide, Loss


class CPC(nn.Module):
    """Contrastive predictive coding: for each of several steps ahead, name the features among negatives (InfoNCE).

    Source: van den Oord, Li and Vinyals 2018 (arXiv:1807.03748), sections 2, 3.1 (audio) and 3.2 (pictures).
    Differs from the paper: the context network is the shared causal Transformer, not a GRU. Negatives are other tokens
        of the same clip, never the positive itself, where the paper takes other clips as well. The inner product is
        divided by the root of its width. Steps go along the first axis of the tokens: time, or the rows of a picture,
        whose patches do not overlap here and are each predicted from all patches before them.
    Target: the frontend's features, learned with the rest and not detached: what is constant cannot be told from its
        negatives, so they do not collapse.

    Args:
        encoder: causal, with positions that read no content.
        steps: predict so many steps ahead, each by a linear map of its own.
        negatives: for each target; those of a target are the same for all steps.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "none"

    def __init__(self, encoder: Encoder, *, steps: int = 12, negatives: int = 128) -> None:
        super().__init__()
        encoder.refuse_lookahead("CPC")
        if steps < 1 or negatives < 1:
            raise ValueError(f"objective.steps={steps}, negatives={negatives}: both must be at least 1")
        self.encoder = encoder
        self.steps, self.negatives = steps, negatives
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.predict = nn.ModuleList(
            nn.Linear(encoder.dim, encoder.frontend.feature_dim, bias=False) for _ in range(steps)
        )

    def forward(self, batch: Batch) -> Loss:
        """The loss in nats, summed over tokens and steps ahead; the count is predictions."""
        tokens = self.encoder.tokens(batch.raw)
        if tokens.feat is None:
            raise ValueError("CPC predicts the frontend's features, and this frontend gives none")
        context = self.encoder(tokens).tokens
        predictions = [predict(context) for predict in self.predict]
        logits = contrast_steps(predictions, tokens.feat, tokens, negatives=self.negatives, seeds=batch.seeds)
        scores = torch.cat(logits)
        total = (scores.logsumexp(1) - scores[:, 0]).sum()
        count = len(scores)
        metrics = steps_metrics(logits, predictions[0], tokens.feat, tokens) | {"loss": (total.detach(), count)}
        return Loss(total, count, metrics)

    def after_step(self, step: int) -> None:
        """Nothing here changes with time."""
