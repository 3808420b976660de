"""APC: from what was heard so far, predict what is measured a few steps ahead."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.linear import Linear
from mmssl.nn.predictor import places
from mmssl.nn.spread import mean_distance, spread, token_spread
from mmssl.types import Batch, Hide, Loss, Raw, Tokens, valid_mask


class APC(nn.Module):
    """Autoregressive predictive coding: each token's output is mapped to the values of the token some steps later.

    Source: Chung, Hsu, Tang and Glass 2019 (arXiv:1904.03240), section 2, with a Transformer as in Chung and Glass 2020
        (arXiv:1910.12607), section 2.1.
    Differs from the papers: steps go along the first axis of the tokens, which is time where there is one and rows of a
        picture elsewhere, so that any frontend serves. A frontend that normalizes over the clip tells every token the
        clip's mean and deviation, as the papers' normalization over a speaker or an utterance does.
    Target: `target`, values that the modality computes from the raw input. Never learned ones.

    Args:
        encoder: causal, with positions that read no content.
        target: (raw, tokens) -> (B, N, P).
        target_dim: P.
        target_learned: whether the target is learned features of the frontend, which cannot be reconstructed.
        ahead: steps from a token to what it predicts. Windows of neighboring frames overlap: at few steps the answer is
            in the question.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "none"

    def __init__(
        self,
        encoder: Encoder,
        *,
        target: Callable[[Raw, Tokens], Tensor],
        target_dim: int,
        target_learned: bool = False,
        ahead: int = 5,
    ) -> None:
        super().__init__()
        encoder.refuse_lookahead("APC")
        encoder.refuse_learned(
            target_learned, "APC predicts", choose="a fixed target such as log_mel, or CPC for waveforms"
        )
        if ahead < 1:
            raise ValueError(f"objective.ahead={ahead}: what is predicted lies at least 1 step ahead")
        self.encoder = encoder
        self.target = target
        self.ahead = ahead
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.predict = Linear(encoder.dim, target_dim)
        nn.init.xavier_uniform_(self.predict.weight)
        nn.init.zeros_(self.predict.bias)

    def forward(self, batch: Batch) -> Loss:
        """Sum over predicted tokens of the mean distance over their P values; the count is predicted tokens."""
        tokens = self.encoder.tokens(batch.raw)
        encoded = self.encoder(tokens)
        shift = self.ahead * math.prod(tokens.grid[1:])
        now = places(valid_mask(tokens.lengths - shift, tokens.x.shape[1]), tokens.x.device)
        prediction = self.predict(encoded.tokens.flatten(0, 1).index_select(0, now))
        # a target may hold a product of its own, as log_mel does
        with torch.autocast(prediction.device.type, enabled=False):
            values = self.target(batch.raw, tokens).flatten(0, 1).detach().float()
            target, prediction = values.index_select(0, now + shift), prediction.float()
            total = (prediction - target).abs().mean(1).sum()
        count = len(now)
        metrics = {
            "loss": total.detach(),
            "chance": mean_distance(target) * count,
            "repeat": (values.index_select(0, now) - target).abs().mean(1).sum(),
            "target_std": spread(target) * count,
            "prediction_std": spread(prediction) * count,
            "feature_std": token_spread(encoded) * count,
        }
        return Loss(total, count, {name: (value, count) for name, value in metrics.items()})

    def after_step(self, step: int) -> None:
        """Nothing here changes with time."""
