"""wav2vec 1.0: from what was heard so far, say of features of the clip whether they come some steps later."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.contrast import contrast_ahead, contrast_metrics, draw_others
from mmssl.nn.predictor import places
from mmssl.nn.spread import spread
from mmssl.types import Batch, Hide, Loss, valid_mask


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
        others = draw_others(tokens.lengths, self.negatives, batch.seeds)
        step = math.prod(tokens.grid[1:])
        predictions = [predict(context) for predict in self.predict]
        logits = [
            contrast_ahead(prediction, tokens.feat, others, tokens.lengths, shift=ahead * step)
            for ahead, prediction in enumerate(predictions, 1)
        ]
        scores = torch.cat(logits)
        total = F.softplus(-scores[:, 0]).sum() + F.softplus(scores[:, 1:]).sum()
        count = len(scores)
        real = places(valid_mask(tokens.lengths, context.shape[1]), context.device)
        prediction, features = (
            F.normalize(x.detach().flatten(0, 1).index_select(0, real).float(), dim=-1) * x.shape[-1] ** 0.5
            for x in (predictions[0], tokens.feat)
        )
        metrics: dict[str, tuple[float | Tensor, float]] = {"loss": (total.detach(), count)}
        metrics |= {name: (value, count) for name, value in contrast_metrics(scores.detach()).items()}
        metrics["chance"] = self.chance * count, count
        for ahead in {1, self.steps}:
            of = logits[ahead - 1].detach()
            metrics[f"accuracy_{ahead}"] = contrast_metrics(of)["accuracy"], len(of)
        metrics["prediction_std"] = spread(prediction) * count, count
        metrics["feature_std"] = spread(features) * count, count
        return Loss(total, count, metrics)

    @property
    def chance(self) -> float:
        """The least loss of answers that are the same for all: yes with probability 1 / (1 + `negatives`)."""
        k = self.negatives
        return math.log(1 + k) + k * math.log((1 + k) / k)

    def after_step(self, step: int) -> None:
        """Nothing here changes with time."""
