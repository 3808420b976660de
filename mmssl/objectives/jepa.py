"""JEPA: from what is visible of a clip, predict what a slow copy of the encoder makes of blocks that are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.block_masks import rectangles
from mmssl.nn.masking import plan_of
from mmssl.nn.predictor import Predictor
from mmssl.nn.spread import feature_spread, spread
from mmssl.nn.teacher import Teacher, ema_decay
from mmssl.types import Batch, Encoded, Hide, Loss, MaskPlan, Raw, Tokens, valid_mask


@dataclass(frozen=True)
class Views:
    """What is seen and what is predicted from it.

    plan: R contexts, one for each clip and set of blocks.
    context: (Q,) the context from which each question is answered.
    asked: (Q, N) bool, True = to be predicted; hidden in its context.
    """

    plan: MaskPlan
    context: Tensor
    asked: Tensor


class JEPA(nn.Module):
    """Regress to a teacher's output at blocks of hidden tokens, with a narrow Transformer between.

    Source: Assran et al. 2023, I-JEPA (arXiv:2301.08243), section 3; defaults of its ViT-H/14. With `context` [1, 1],
        `separately` false, two sets of `blocks` and `error` "l1", Bardes et al. 2024, V-JEPA (arXiv:2404.08471).
    Differs from the papers: blocks have sizes of their own, see `nn.block_masks.rectangles`, and clips any length;
        there is one mask vector for all sets; where blocks cover a whole context, one token stays visible. Every
        predicted token counts the same, where V-JEPA's code has each set of blocks count the same.
    Target: the teacher's output for the whole clip, each token brought to mean 0 and deviation 1 over its channels. The
        teacher is an exponential moving average of the whole encoder; it moves once for each update of the optimizer,
        and its weights, in float32, are saved with the objective's. No gradient reaches it.

    Args:
        encoder: works on the visible tokens only.
        blocks: [count, least share, greatest share] of the blocks to predict, for each set of them; every set has a
            context of its own.
        aspect: least and greatest ratio of a block's height to its width, in units of the clip's own.
        context: least and greatest share of the clip that the context's block covers, before blocks are cut out of it;
            [1, 1] for all that is not predicted.
        separately: whether each block is predicted by itself; all of a set together otherwise.
        edges: false draws blocks as the released code of I-JEPA does, which never reach the last row and column; those
            of V-JEPA's code do.
        error: "smooth_l1" or "l1".
        predictor_dim, predictor_depth, predictor_heads: of the Predictor.
        ema_decay, ema_decay_end, ema_updates: of the teacher, see `nn.teacher.ema_decay`.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "drop"

    def __init__(
        self,
        encoder: Encoder,
        *,
        blocks: Sequence[tuple[int, float, float]] = ((4, 0.15, 0.2),),
        aspect: tuple[float, float] = (0.75, 1.5),
        context: tuple[float, float] = (0.85, 1.0),
        separately: bool = True,
        edges: bool = True,
        error: Literal["smooth_l1", "l1"] = "smooth_l1",
        predictor_dim: int = 384,
        predictor_depth: int = 12,
        predictor_heads: int = 16,
        ema_decay: float = 0.996,
        ema_decay_end: float = 1.0,
        ema_updates: int = 187_500,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.blocks, self.aspect, self.context = list(blocks), aspect, context
        self.separately, self.edges = separately, edges
        self.error = {"smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss}[error]
        self.first_decay, self.last_decay, self.ema_updates = ema_decay, ema_decay_end, ema_updates
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.teacher = Teacher(encoder)
        self.predictor = Predictor(
            dim_in=encoder.dim,
            dim=predictor_dim,
            depth=predictor_depth,
            heads=predictor_heads,
            out_dim=encoder.dim,
        )

    def forward(self, batch: Batch) -> Loss:
        """Sum over predicted tokens of the mean error over their channels; the count is predicted tokens."""
        tokens = self.encoder.tokens(batch.raw)
        views = self.draw(tokens, batch.seeds)
        prediction = self._predict(tokens, views).float()
        question, place = views.asked.nonzero().unbind(1)
        clip = views.plan.rows[views.context[question]]
        whole = self.target(batch.raw)
        of = (clip * views.asked.shape[1] + place).to(whole.device, non_blocking=True)
        target = whole.flatten(0, 1).index_select(0, of)
        total = self.error(prediction, target, reduction="none").mean(1).sum()
        count = len(target)
        metrics: dict[str, Tensor | float] = {
            "loss": total.detach(),
            "target_std": spread(target) * count,
            "prediction_std": spread(prediction) * count,
            "feature_std": feature_spread(tokens) * count,
            "teacher_decay": self.teacher.decay * count,
        }
        return Loss(total, count, {name: (value, count) for name, value in metrics.items()})

    def after_step(self, step: int) -> None:
        decay = ema_decay(step, first=self.first_decay, last=self.last_decay, updates=self.ema_updates)
        self.teacher.update(self.encoder, decay)

    @torch.no_grad()
    def target(self, raw: Raw) -> Tensor:
        """(B, N, D) float32: what is to be predicted for every token of a batch."""
        whole = self.teacher(cast(Encoder, self.teacher.module).tokens(raw))
        return F.layer_norm(whole.tokens.float(), whole.tokens.shape[-1:])

    def draw(self, tokens: Tokens, seeds: Tensor) -> Views:
        """Contexts and blocks of each clip, from its own seed."""
        lengths, clips = tokens.lengths.cpu(), torch.arange(len(tokens.lengths))
        valid = valid_mask(lengths, tokens.x.shape[1])
        seen, context, asked = [], [], []
        for number, (count, least, most) in enumerate(self.blocks):
            blocks = rectangles(
                tokens,
                count=count,
                scale=(least, most),
                aspect=self.aspect,
                seeds=seeds,
                stream=2 * number,
                edges=self.edges,
            )
            around = rectangles(
                tokens,
                count=1,
                scale=self.context,
                aspect=(1.0, 1.0),
                seeds=seeds,
                stream=2 * number + 1,
                edges=self.edges or self.context[0] == 1,
            )[:, 0]
            hidden = blocks.any(1)
            visible = around & ~hidden
            # a block over all that the context has: then all else is the context, or else one token
            visible = torch.where(visible.any(1, keepdim=True), visible, valid & ~hidden)
            bare = ~visible.any(1)
            visible[bare, 0] = True
            blocks[bare, :, 0] = False
            each = blocks if self.separately else blocks.any(1, keepdim=True)
            seen.append(visible)
            context.append((clips + number * len(clips)).repeat_interleave(each.shape[1]))
            asked.append(each.flatten(0, 1))
        hidden = valid.repeat(len(seen), 1) & ~torch.cat(seen)
        plan = plan_of(hidden, lengths.repeat(len(seen)), rows=clips.repeat(len(seen)))
        return Views(plan, torch.cat(context), torch.cat(asked))

    def _predict(self, tokens: Tokens, views: Views) -> Tensor:
        """(M, D), one row for each True of `views.asked`."""
        encoded, plan, of = self.encoder(tokens, views.plan, self.hide), views.plan, views.context
        # every question has its context, encoded once, to itself
        shown = Encoded(
            encoded.x.index_select(0, of.to(encoded.x.device)), encoded.lengths[of], {}, n_prefix=encoded.n_prefix
        )
        copies = MaskPlan(plan.rows[of], plan.masked[of], plan.keep[of], plan.keep_lengths[of])
        return self.predictor(shown, tokens, copies, predicted=views.asked)
