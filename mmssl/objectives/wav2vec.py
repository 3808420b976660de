"""wav2vec 1.0: from what was heard so far, say of features of the clip whether they come some steps later."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from mmssl.encoder import Encoder
from mmssl.nn.contrast import binary_chance, binary_cross_entropy, contrast_steps, steps_metrics
from mmssl.types import Batch, Hide, Loss


class Wav2Vec(nn.Module):
    """For each of several steps ahead, a yes or no: are these the features that come then?

    Source: Schneider, Baevski, Collobert and Auli 2019 (arXiv:1904.05862), section 2.
    Differs from the paper: the context network is the shared causal Transformer, not nine or twelve convolutions, so it
        sees the whole past and not the last 210 or 810 ms. Negatives never are the positive itself; the released code
        lays their places out by time and clip and reads them by clip and time, so that there they may be. The inner
        product is divided by the root of its width. Features are normalized as the frontend does, without the log
        compression of the released large model. Steps go along the first axis of the tokens.
    Target: the frontend's features, learned with the rest and not detached: what is constant cannot be told from its
        negatives, so they do not collapse.

    Args:
        encoder: causal, with positions that read no content.
        steps: predict so many steps ahead, each by an affine map of its own.
        negatives: for each target, all of them counted as much as the positive (the paper's lambda is their number);
            those of a target are the same for all steps.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "none"

    def __init__(self, encoder: Encoder, *, steps: int = 12, negatives: int = 10) -> None:
        super().__init__()
        encoder.refuse_lookahead("wav2vec")
        if steps < 1 or negatives < 1:
            raise ValueError(f"objective.steps={steps}, negatives={negatives}: both must be at least 1")
        self.encoder = encoder
        self.steps, self.negatives = steps, negatives
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.predict = nn.ModuleList(nn.Linear(encoder.dim, encoder.frontend.feature_dim) for _ in range(steps))

    def forward(self, batch: Batch) -> Loss:
        """The binary cross-entropies of the positive and its negatives, summed over tokens and steps ahead, in nats.

        The count is predictions, so that the mean is that of 1 + `negatives` answers.
        """
        tokens = self.encoder.tokens(batch.raw)
        if tokens.feat is None:
            raise ValueError("wav2vec predicts the frontend's features, and this frontend gives none")
        context = self.encoder(tokens).tokens
        predictions = [predict(context) for predict in self.predict]
        logits = contrast_steps(predictions, tokens.feat, tokens, negatives=self.negatives, seeds=batch.seeds)
        scores = torch.cat(logits)
        total = binary_cross_entropy(scores)
        count = len(scores)
        metrics = steps_metrics(logits, predictions[0], tokens.feat, tokens) | {"loss": (total.detach(), count)}
        metrics["chance"] = binary_chance(self.negatives) * count, count
        return Loss(total, count, metrics)

    def after_step(self, step: int) -> None:
        """Nothing here changes with time."""
