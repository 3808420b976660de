"""data2vec: from a clip with hidden tokens, predict what a slow copy of the model makes of the whole clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.block_masks import BLOCK_MASKS, BlockMask
from mmssl.nn.latent import Copied, Norm, averaged_target, parts_to_copy, regression, top_layers
from mmssl.nn.predictor import places
from mmssl.nn.spread import feature_spread, spread
from mmssl.nn.teacher import Teacher, ema_decay
from mmssl.types import Batch, Hide, Loss, Point, Raw, Tokens


class Data2Vec(nn.Module):
    """Regress at each hidden token to the mean of the top layers of a teacher that sees everything.

    Source: Baevski et al. 2022 (arXiv:2202.03555), section 3; defaults of the speech model.
    Differs from the paper: every clip has exactly the share `mask_ratio` hidden (see `nn.block_masks`); the statistics
        of the instance norm leave padding out.
    Target: `top_k` layers of the teacher for the clip without a mask, each normalized, and their mean. The teacher is
        an exponential moving average of the encoder; it moves once for each update of the optimizer, and its weights,
        in float32, are saved with the objective's. No gradient reaches it.

    Args:
        encoder: with a mask token.
        mask: "blocks" hides spans of time or blocks of neighbors, "beit_blocks" rectangles of random shape,
            "inverse_blocks" all but blocks.
        mask_ratio: share of each clip's tokens to hide.
        mask_size: tokens of a block along each axis, one number for all; the least tokens of one for "beit_blocks".
        top_k: layers to average, the last ones.
        target_point: "mlp" takes what a block's MLP gives, before the residual, "block" its output.
        layer_norm: of each layer, before they are averaged: "instance" over a clip's tokens, "layer" over channels.
        target_norm: of the mean.
        beta: where smooth L1 goes from squared to absolute; 0 for squared errors.
        ema_decay, ema_decay_end, ema_updates: of the teacher, see `nn.teacher.ema_decay`.
        copied: parts of the encoder that the teacher copies at each update; it averages all others. Where it copies the
            frontend it reads the student's tokens, which saves a pass.

    Raises:
        ValueError: the encoder has no mask token, or settings that do not fit it.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "replace"

    def __init__(
        self,
        encoder: Encoder,
        *,
        mask: BlockMask = "blocks",
        mask_ratio: float = 0.49,
        mask_size: int | Sequence[int] = 10,
        top_k: int = 8,
        target_point: Point = "mlp",
        layer_norm: Norm = "instance",
        target_norm: Norm = "none",
        beta: float = 0.0,
        ema_decay: float = 0.999,
        ema_decay_end: float = 0.9999,
        ema_updates: int = 30_000,
        copied: Sequence[Copied] = ("frontend", "positions"),
    ) -> None:
        super().__init__()
        if encoder.mask_token is None:
            raise ValueError("encoder.mask_token=false: data2vec replaces hidden tokens, set it to true")
        self.encoder = encoder
        self.mask, self.mask_ratio, self.mask_size = BLOCK_MASKS[mask], mask_ratio, mask_size
        self.layers = top_layers(encoder.depth, top_k)
        self.target_point, self.layer_norm, self.target_norm = target_point, layer_norm, target_norm
        self.beta = beta
        self.first_decay, self.last_decay, self.ema_updates = ema_decay, ema_decay_end, ema_updates
        self.shares_tokens = "frontend" in copied
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.teacher = Teacher(encoder, copy=parts_to_copy(encoder, copied))
        self.predict = nn.Linear(encoder.dim, encoder.dim)

    def forward(self, batch: Batch) -> Loss:
        """Sum over hidden tokens of the error, see `nn.latent.regression`; the count is hidden tokens."""
        tokens = self.encoder.tokens(batch.raw)
        plan = self.mask(tokens, ratio=self.mask_ratio, size=self.mask_size, seeds=batch.seeds)
        encoded = self.encoder(tokens, plan, self.hide)
        hidden = places(plan.masked, encoded.x.device)
        prediction = self.predict(encoded.tokens.flatten(0, 1).index_select(0, hidden))
        target = self.target(batch.raw, tokens).flatten(0, 1).index_select(0, hidden)
        total = regression(prediction, target, beta=self.beta).sum()
        count = len(hidden)
        metrics: dict[str, Tensor | float] = {
            "loss": total.detach(),
            "target_std": spread(target) * count,
            "prediction_std": spread(prediction) * count,
            "feature_std": feature_spread(tokens) * count,
            "teacher_decay": self.teacher.decay * count,
            "target_norms": ((self.layer_norm != "none") + (self.target_norm != "none")) * count,
        }
        return Loss(total, count, {name: (value, count) for name, value in metrics.items()})

    def after_step(self, step: int) -> None:
        decay = ema_decay(step, first=self.first_decay, last=self.last_decay, updates=self.ema_updates)
        self.teacher.update(self.encoder, decay)

    def target(self, raw: Raw, tokens: Tokens) -> Tensor:
        """(B, N, D) float32: what is to be predicted for every token of a batch, and the student's tokens of it."""
        return averaged_target(
            self.teacher,
            raw,
            tokens if self.shares_tokens else None,
            layers=self.layers,
            point=self.target_point,
            layer_norm=self.layer_norm,
            target_norm=self.target_norm,
        )
