"""CrossVideoMAE: a clip and one frame of it, both reconstructed, told together from all other clips and frames."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl import distributed
from mmssl.encoder import Encoder
from mmssl.nn.heads import mean_pool
from mmssl.nn.masking import random_mask, take, tube_mask
from mmssl.nn.partners import Projector, both_ways
from mmssl.nn.predictor import Predictor
from mmssl.nn.reconstruction import clip_errors, token_errors
from mmssl.nn.seeds import uniform
from mmssl.nn.spread import spread, token_spread
from mmssl.types import Batch, Encoded, Hide, Loss, MaskPlan, Raw, Tokens

_STEP = 1_000_004  # of the draws that are no masks of a clip's clones, see `nn.seeds.uniform`


class CrossVideoMAE(nn.Module):
    """Hide most of a clip twice, and of one of its steps in time once; each tells the others from those of other clips.

    Source: Ahamed et al. 2025 (CrossVideoMAE, arXiv:2502.07811): masked autoencoders of a video and of a sampled frame;
        NT-Xent between two views of the video, and between video and frame, of the clip and of the frame.
    Differs from the paper: one encoder and one decoder see both, where theirs has an image encoder that was pretrained;
        a frame is what one step of the clip's tokens shows, at time 0; the second view of a clip is another mask of it,
        where theirs is an augmented copy. Not known here and chosen: the temperature, the contrasts' weight, the
        projector, and that "frame level" compares the frame with the clip's own visible tokens of that step, which
        masks of tubes leave in every one. Each clip counts the same, however long.
    Target: `target`, values that the modality computes from the clip, never learned ones; and the other views. In
        training the other clips are those of all processes, and the gradient is that of one process on all of them;
        while evaluating, they are those of a micro-batch.

    Args:
        encoder: of clips with a time and other axes.
        target, target_dim, target_learned: see `MAE`.
        mask_ratio, frame_mask_ratio: share to hide of the clip's places, and of the frame's tokens.
        weight: of each of the three contrasts, beside 1 for the error of the clip and of the frame.
        temperature: of the contrasts, constant.
        hidden_dim, dim: of the projector: width of its two hidden layers, and of the space in which views are compared.
        decoder_dim, decoder_depth, decoder_heads, decoder_mlp_dim, decoder_eps: of the Predictor.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "drop"
    contrasts: ClassVar[bool] = True

    def __init__(
        self,
        encoder: Encoder,
        *,
        target: Callable[[Raw, Tokens], Tensor],
        target_dim: int,
        target_learned: bool = False,
        mask_ratio: float = 0.9,
        frame_mask_ratio: float = 0.75,
        weight: float = 0.1,
        temperature: float = 0.1,
        hidden_dim: int = 2048,
        dim: int = 128,
        decoder_dim: int = 384,
        decoder_depth: int = 4,
        decoder_heads: int = 6,
        decoder_mlp_dim: int | None = None,
        decoder_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        axes, name = encoder.frontend.axes, type(encoder.frontend).__name__
        if axes[0] != "t" or len(axes) < 2:
            raise ValueError(
                f"CrossVideoMAE compares a clip with one step of it in time, but the tokens of {name} lie on "
                f"{', '.join(axes)}; choose mae"
            )
        encoder.refuse_learned(target_learned, "CrossVideoMAE reconstructs", choose="a fixed target")
        for setting, value in {"weight": weight, "temperature": temperature}.items():
            if value <= 0:
                raise ValueError(f"objective.{setting}={value:g}: must be above 0")
        self.encoder = encoder
        self.target = target
        self.mask_ratio, self.frame_mask_ratio = mask_ratio, frame_mask_ratio
        self.weight, self.temperature, self.dim = weight, temperature, dim
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.projector = Projector(encoder.dim, hidden_dim=hidden_dim, out_dim=dim)
        self.predictor = Predictor(
            dim_in=encoder.dim,
            dim=decoder_dim,
            depth=decoder_depth,
            heads=decoder_heads,
            mlp_dim=decoder_mlp_dim,
            out_dim=target_dim,
            eps=decoder_eps,
        )

    def forward(self, batch: Batch) -> Loss:
        """Sum over clips of the errors of clip (the mean of its two masks) and frame, and of the weighed contrasts.

        The count is clips. Errors are means over hidden tokens of the mean squared error over their P values; "views",
        "clip" and "frame" are cross-entropies in nats: of the two masks of a clip, of clip and frame, and of the clip's
        tokens of the frame's step and the frame. Of the accuracy, the three are the mean.
        """
        raw, tokens, count = batch.raw, self.encoder.tokens(batch.raw, late=True), len(batch)
        places = math.prod(tokens.grid[1:])
        steps = tokens.lengths.cpu() // places
        step = (uniform(batch.seeds, 1, stream=_STEP)[:, 0] * steps).long()
        frame, index = _frame(tokens, step, places)
        plans = [tube_mask(tokens, ratio=self.mask_ratio, seeds=batch.seeds + other) for other in (0, 1)]
        # other seeds than the clip's: from the same the frame would hide none of the places that the clip shows
        frame_plan = random_mask(frame.lengths, ratio=self.frame_mask_ratio, seeds=batch.seeds + 2)
        seen = [self.encoder(tokens, plan, self.hide) for plan in plans]
        shown = self.encoder(frame, frame_plan, self.hide)

        def of_frame(raw: Raw, _: Tokens) -> Tensor:
            return take(self.target(raw, tokens), index)

        errors, spreads = token_errors(
            self.predictor(seen[0], tokens, plans[0]), self.target, raw, tokens, plans[0].masked
        )
        others, _ = token_errors(self.predictor(seen[1], tokens, plans[1]), self.target, raw, tokens, plans[1].masked)
        frames, _ = token_errors(self.predictor(shown, frame, frame_plan), of_frame, raw, frame, frame_plan.masked)
        of_clip = (clip_errors(errors, plans[0].masked) + clip_errors(others, plans[1].masked)) / 2
        of_its_frame = clip_errors(frames, frame_plan.masked)

        pooled = [mean_pool(each.x, each.lengths, each.n_prefix) for each in (*seen, shown)]
        pooled.append(_of_step(seen[0], plans[0], step, places))
        vectors = torch.stack([self.projector(each) for each in pooled], 1)
        own = distributed.places(len(batch), exchange=self.training).to(vectors.device)
        (everyone,) = distributed.everyone(vectors, exchange=self.training)
        metrics: dict[str, tuple[float | Tensor, float]] = {}
        contrast = vectors.new_zeros(())
        for name, pair, within in (("views", [0, 1], True), ("clip", [0, 2], False), ("frame", [3, 2], False)):
            losses, told = both_ways(
                vectors[:, pair], everyone[:, pair], own, scale=1 / self.temperature, within=within
            )
            contrast = contrast + losses.sum()
            metrics[name] = losses.detach().sum(), count
            for key, (value, n) in told.items():
                before = metrics.get(key, (0.0, 0.0))
                metrics[key] = before[0] + value, before[1] + n
        total = of_clip + of_its_frame + self.weight * contrast
        said: dict[str, tuple[float | Tensor, float]] = {
            "loss": (total.detach(), count),
            "clip_loss": (of_clip.detach(), count),
            "frame_loss": (of_its_frame.detach(), count),
            "feature_std": (token_spread(seen[0]) * count, count),
            # times the root of their width: of unit vectors that point everywhere it is about 1
            "view_std": (spread(vectors.detach()[:, 0] * self.dim**0.5) * count, count),
        }
        return Loss(total, count, {**said, **metrics, **spreads})

    def after_step(self, step: int) -> None:
        """Nothing here changes with time."""


def _frame(tokens: Tokens, step: Tensor, places: int) -> tuple[Tokens, Tensor]:
    """The tokens of one step of each clip, as a clip of that step alone; and (B, places), which they are."""
    index = (step[:, None] * places + torch.arange(places)).to(tokens.x.device)
    coords = tokens.coords[:, :places].clone()
    coords[..., 0] = 0
    feat = None if tokens.feat is None else take(tokens.feat, index)
    lengths = torch.full_like(tokens.lengths, places)
    grid = (1, *tokens.grid[1:])
    return replace(tokens, x=take(tokens.x, index), lengths=lengths, coords=coords, grid=grid, feat=feat), index


def _of_step(encoded: Encoded, plan: MaskPlan, step: Tensor, places: int) -> Tensor:
    """(B, D): the mean of a clip's visible tokens of one step."""
    among = ((plan.keep // places == step[:, None]) & plan.keep_valid).to(encoded.x.device)
    shares = among / among.sum(1, keepdim=True)
    return torch.einsum("bk,bkd->bd", shares.float(), encoded.tokens.float()).to(encoded.x.dtype)
