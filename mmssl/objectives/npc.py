"""NPC: predict each frame from those around it, never from itself, all of them at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.linear import Linear
from mmssl.nn.positions import READ_CONTENT
from mmssl.nn.predictor import places
from mmssl.nn.spread import mean_distance, spread, token_spread
from mmssl.types import Batch, Hide, Loss, Raw, Tokens, valid_mask


class MaskedConv(nn.Module):
    """A convolution over time whose middle taps are left out, and a tanh.

    Args:
        dim_in, dim: widths.
        kernel: taps, those in the middle counted; odd.
        gap: the taps at most so far from the middle are left out.
    """

    def __init__(self, *, dim_in: int, dim: int, kernel: int, gap: int) -> None:
        super().__init__()
        self.reach, self.gap = kernel // 2, gap
        bound = math.sqrt(3.0 / (dim_in * 2 * (self.reach - gap)))
        self.weight = nn.Parameter(torch.empty(dim, dim_in, 2 * (self.reach - gap)).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, h: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, dim)."""
        before, after = self.weight.chunk(2, 2)
        middle = before.new_zeros(1, 1, 1).expand(*before.shape[:2], 2 * self.gap + 1)
        weight = torch.cat([before, middle, after], 2)
        return F.conv1d(h.transpose(1, 2), weight, self.bias, padding=self.reach).transpose(1, 2).tanh()


class NPC(nn.Module):
    """Non-autoregressive predictive coding: masked convolutions over every block's output see around the target.

    Block i of a Transformer with a window sees i windows to each side. So the convolution over its output leaves out
    the target, what shall stay hidden beside it, and i windows more: nothing of these ever reaches the prediction.

    Source: Liu, Chung and Glass 2021 (arXiv:2011.00406), section 2.
    Differs from the paper: the blocks beneath the masked convolutions are the shared Transformer's with a window, not
        convolutions of kernel 3; they are what is exported, so an embedding sees its own frame. There is no vector
        quantization before the prediction.
    Target: `target`, values that the modality computes from the raw input. Never learned ones.

    Args:
        encoder: over tokens in time, with a window and positions that read no content.
        target: (raw, tokens) -> (B, N, P).
        target_dim: P.
        target_learned: whether the target is learned features of the frontend, which cannot be reconstructed.
        kernel: taps of each masked convolution, those left out counted.
        hidden: tokens to each side of the target that are hidden with it; windows of neighboring frames overlap.
        context_dim: width of the sum of the masked convolutions.
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
        kernel: int = 15,
        hidden: int = 1,
        context_dim: int = 512,
    ) -> None:
        super().__init__()
        name = type(encoder.frontend).__name__
        if encoder.frontend.axes != ("t",):
            raise ValueError(
                f"NPC predicts a frame from those around it in time, and the tokens of {name} lie on "
                f"{', '.join(encoder.frontend.axes)}; choose APC, which goes along one of several axes"
            )
        window = encoder.transformer.window
        if window is None:
            raise ValueError(
                "transformer.window: NPC hides a frame from its own prediction, so it must be known how far a block "
                "sees; set it to 1"
            )
        if isinstance(encoder.positions, READ_CONTENT):
            raise ValueError(
                f"positions: {type(encoder.positions).__name__} reads the frames that NPC hides; choose sincos, "
                "flat_sincos, learned or none"
            )
        encoder.refuse_learned(target_learned, "NPC predicts")
        gaps = [hidden + window * block for block in range(1, encoder.depth + 1)]
        if kernel % 2 == 0 or hidden < 0 or kernel // 2 <= gaps[-1]:
            raise ValueError(
                f"objective.kernel={kernel}: an odd number of taps, of which {2 * gaps[-1] + 1} are left out over the "
                f"last of {encoder.depth} blocks (hidden={hidden}, window={window}); raise it, or set a lower depth, "
                "window or hidden"
            )
        self.encoder = encoder
        self.target = target
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.contexts = nn.ModuleList(
            MaskedConv(dim_in=encoder.dim, dim=context_dim, kernel=kernel, gap=gap) for gap in gaps
        )
        self.predict = Linear(context_dim, target_dim)
        nn.init.xavier_uniform_(self.predict.weight)
        nn.init.zeros_(self.predict.bias)

    def forward(self, batch: Batch) -> Loss:
        """Sum over tokens of the mean distance over their P values; the count is tokens."""
        tokens = self.encoder.tokens(batch.raw)
        inner = range(1, self.encoder.depth)
        encoded = self.encoder(tokens, layers=inner)
        outputs = [encoded.layers[i][:, encoded.n_prefix :] for i in inner] + [encoded.tokens]
        context = torch.stack([conv(h) for conv, h in zip(self.contexts, outputs, strict=True)]).sum(0)
        real = places(valid_mask(tokens.lengths, context.shape[1]), context.device)
        prediction = self.predict(context.flatten(0, 1).index_select(0, real))
        # a target may hold a product of its own, as log_mel does
        with torch.autocast(prediction.device.type, enabled=False):
            target = self.target(batch.raw, tokens).flatten(0, 1).index_select(0, real).detach().float()
            prediction = prediction.float()
            total = (prediction - target).abs().mean(1).sum()
        count = len(real)
        metrics = {
            "loss": total.detach(),
            "chance": mean_distance(target) * count,
            "target_std": spread(target) * count,
            "prediction_std": spread(prediction) * count,
            "feature_std": token_spread(encoded) * count,
        }
        return Loss(total, count, {name: (value, count) for name, value in metrics.items()})

    def after_step(self, step: int) -> None:
        """Nothing here changes with time."""
