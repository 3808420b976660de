"""dBOT: predict what a frozen teacher makes of the hidden tokens; the student is the teacher of the next stage."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.predictor import Predictor, places
from mmssl.nn.spread import spread, token_spread
from mmssl.nn.teacher import Teacher
from mmssl.objectives.mae import MASKS, Mask
from mmssl.types import Batch, Hide, Loss, Raw


class DBOT(nn.Module):
    """Hide most tokens, encode the rest, and predict a frozen teacher's features of the hidden ones.

    A stage is a run: the first has a teacher with random weights, and each further one the encoder of the run before,
    with a student that begins anew.

    Source: Liu et al. 2022, "Exploring target representations for masked autoencoders" (dBOT, arXiv:2209.03917),
        section 4.
    Differs from the released code: the teacher's output is taken after its final norm, and the decoder drops no paths.
    Target: the teacher's output for the whole clip, after its final norm, each token brought to mean 0 and deviation 1.

    Args:
        encoder: encodes the visible tokens only.
        teacher: folder of the run whose encoder is the teacher, of any width and depth but with the same grid of
            tokens; none for random weights.
        teacher_encoder: that encoder; it is copied, kept in float32 and saved with the objective.
        mask, mask_ratio: see `MAE`.
        beta: below this error the loss is square, above it linear; 2 in the released code.
        decoder_dim, decoder_depth, decoder_heads, decoder_mlp_dim, decoder_eps: of the Predictor.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "drop"

    def __init__(
        self,
        encoder: Encoder,
        *,
        teacher_encoder: Encoder,
        teacher: str | None = None,
        mask: Mask = "random",
        mask_ratio: float = 0.75,
        beta: float = 2.0,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        decoder_mlp_dim: int | None = None,
        decoder_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if mask not in MASKS:
            raise ValueError(f"objective.mask={mask!r}: choose one of {', '.join(MASKS)}")
        if beta <= 0:
            raise ValueError(f"objective.beta={beta:g}: the error from which on the loss is linear must be above 0")
        self.encoder = encoder
        self.teacher = Teacher(teacher_encoder)
        self.named = "with random weights" if teacher is None else teacher
        self.mask, self.mask_ratio, self.beta = mask, mask_ratio, beta
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.predictor = Predictor(
            dim_in=encoder.dim,
            dim=decoder_dim,
            depth=decoder_depth,
            heads=decoder_heads,
            mlp_dim=decoder_mlp_dim,
            out_dim=teacher_encoder.dim,
            eps=decoder_eps,
        )

    def forward(self, batch: Batch) -> Loss:
        """Sum over hidden tokens of the mean smooth L1 error over the teacher's features; the count is hidden tokens.

        Raises:
            ValueError: the teacher makes other tokens of a clip.
        """
        tokens = self.encoder.tokens(batch.raw, late=True)
        plan = MASKS[self.mask](tokens, ratio=self.mask_ratio, seeds=batch.seeds)
        encoded = self.encoder(tokens, plan, self.hide)
        prediction = self.predictor(encoded, tokens, plan)  # (M, D)
        features = self._features(batch.raw)
        if features.shape[1] != tokens.x.shape[1]:
            raise ValueError(
                f"objective.teacher: the teacher {self.named} makes {features.shape[1]} tokens of {batch.ids[0]} and "
                f"those beside it, and the student {tokens.x.shape[1]}; give both the same frontend.size"
            )
        hidden = places(plan.masked, prediction.device)
        with torch.autocast(prediction.device.type, enabled=False):
            target = features.flatten(0, 1).index_select(0, hidden)
            prediction = prediction.float()
            losses = F.smooth_l1_loss(prediction, target, beta=self.beta, reduction="none")
            total = losses.mean(1).sum()
        count = len(hidden)
        metrics = {
            "loss": total.detach(),
            "target_std": spread(target) * count,
            "prediction_std": spread(prediction) * count,
            "feature_std": token_spread(encoded) * count,
        }
        return Loss(total, count, {name: (value, count) for name, value in metrics.items()})

    def after_step(self, step: int) -> None:
        """The teacher stays as it is."""

    @torch.no_grad()
    def _features(self, raw: Raw) -> Tensor:
        """(B, N, D) float32."""
        tokens = self.teacher.module.get_submodule("frontend")(raw)
        features = self.teacher(tokens).tokens.float()
        return F.layer_norm(features, features.shape[-1:])
