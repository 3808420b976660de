"""MP3: tell from its content where each token stands."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.masking import random_mask
from mmssl.nn.positions import NoPositions
from mmssl.nn.predictor import places
from mmssl.nn.spread import spread, token_spread
from mmssl.types import Batch, Hide, Loss, valid_mask


class MP3(nn.Module):
    """Masked patch position prediction: no token is told its place, and all places are to be predicted at once.

    Only a random part of the tokens, the context, is attended to; the others see it and are seen by none, so that
    places cannot be told by elimination among all.

    Source: Zhai et al. 2022 (arXiv:2207.07611), section 3.
    Differs from the paper: a clip's places are its own real tokens, however many, so ragged batches are exact. The
        share that is hidden is rounded to the nearest token and drawn from each clip's seed.
    Target: the place of a token in its clip, counted over all axes, the last one fastest.

    Args:
        encoder: without positions, and with a Transformer in which order plays no part.
        positions: most tokens that a clip can have.
        mask_ratio: share of the tokens that are not attended to. Whether the paper has one half could not be confirmed.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "unseen"

    def __init__(self, encoder: Encoder, *, positions: int, mask_ratio: float = 0.5) -> None:
        super().__init__()
        if not isinstance(encoder.positions, NoPositions):
            raise ValueError(
                f"positions: {type(encoder.positions).__name__} tells tokens where they stand, which is what MP3 "
                "predicts; choose none"
            )
        body = encoder.transformer
        if body.causal or body.window is not None or body.bias is not None:
            raise ValueError(
                "transformer.causal, transformer.window, transformer.bias: whom a token sees, and how far off, tells "
                "it where it stands, which is what MP3 predicts; leave all three out"
            )
        if positions < 2 or not 0 < mask_ratio < 1:
            raise ValueError(
                f"objective.positions={positions}, mask_ratio={mask_ratio}: give at least 2 positions, and a share "
                "between 0 and 1"
            )
        self.encoder = encoder
        self.mask_ratio = mask_ratio
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.predict = nn.Linear(encoder.dim, positions)
        nn.init.trunc_normal_(self.predict.weight, std=0.02)
        nn.init.zeros_(self.predict.bias)

    def forward(self, batch: Batch) -> Loss:
        """The cross-entropy over the places of each clip, in nats, summed over its tokens; the count is tokens.

        Raises:
            ValueError: a clip has more tokens than there are positions.
        """
        tokens = self.encoder.tokens(batch.raw)
        lengths = tokens.lengths.cpu()
        most = self.predict.out_features
        if int(lengths.max()) > most:
            row = int(lengths.argmax())
            raise ValueError(
                f"{batch.raw.ids[row]}: {int(lengths[row])} tokens, but objective.positions={most}; crop the clips, or "
                "raise it"
            )
        plan = random_mask(lengths, ratio=self.mask_ratio, seeds=batch.seeds)
        encoded = self.encoder(tokens, plan, self.hide)
        size = tokens.x.shape[1]
        valid = valid_mask(lengths, size)
        clip, place = valid.nonzero().to(encoded.x.device, non_blocking=True).T
        real = places(valid, encoded.x.device)
        logits = self.predict(encoded.tokens.flatten(0, 1).index_select(0, real))[:, :size].float()
        logits = logits.masked_fill(~valid.to(logits.device)[clip], -torch.inf)
        total = F.cross_entropy(logits, place, reduction="sum")
        count = len(real)
        right = logits.detach().argmax(1) == place
        hidden = places(plan.masked[valid], right.device)
        metrics: dict[str, float | Tensor] = {
            "loss": total.detach(),
            "chance": (lengths * lengths.log()).sum(),
            "accuracy": right.sum(),
            "chance_accuracy": len(lengths),  # of each clip, one token
            "feature_std": token_spread(encoded) * count,
            # in units of chance, so that it means the same for any number of places
            "prediction_std": spread(logits.detach().softmax(1)) * size * count,
        }
        loss = Loss(total, count, {name: (value, count) for name, value in metrics.items()})
        loss.metrics["accuracy_unseen"] = right.index_select(0, hidden).sum(), len(hidden)
        return loss

    def after_step(self, step: int) -> None:
        """Nothing here changes with time."""
