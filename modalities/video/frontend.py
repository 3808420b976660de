"""Video: a clip cut into tubes, each one token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmssl.nn.linear import Linear
from mmssl.types import Frontend, Raw, Tokens, valid_mask


class Tubes(Frontend):
    """Non-overlapping tubes, a patch over a few frames, of clips of any number of frames and any size.

    Source: Tong et al. 2022, VideoMAE (arXiv:2203.12602), section 3.3, "cube embedding".

    Frames at the end that fill no whole tube are left out.

    Args:
        dim: width of the tokens.
        size: frames, height and width of a tube.
        rate: frames per second that clips are read at, whatever the rate of their files.
        channels: 3 color, 1 gray, or any other number for arrays.
        mean, std: of each channel over the training data, for pixels in [0, 1]; the pixels are brought to mean 0 and
            deviation 1 with them. They belong to the frontend, so they travel with its weights.
    """

    axes: ClassVar[tuple[str, ...]] = ("t", "h", "w")
    learned: ClassVar[bool] = False
    late: ClassVar[bool] = True

    def __init__(
        self,
        *,
        dim: int,
        size: Sequence[int] = (2, 16, 16),
        rate: float = 7.5,
        channels: int = 3,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        if len(size) != 3 or min(size) < 1:
            raise ValueError(f"frontend.size={list(size)}: give frames, height and width of a tube, each at least 1")
        if rate <= 0:
            raise ValueError(f"frontend.rate={rate}: frames per second must be above 0")
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"frontend.mean, frontend.std: {len(mean)} and {len(std)} numbers, but frontend.channels={channels}; "
                "give one number for each channel"
            )
        self.dim, self.feature_dim = dim, channels * math.prod(size)
        self.size, self.channels, self.rate = tuple(size), channels, rate
        self.min_length = self.size[0]
        self.reader_settings: dict[str, Any] = {"rate": rate, "channels": channels}
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(list(mean))[:, None, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(list(std))[:, None, None, None], persistent=False)
        self.project = Linear(self.feature_dim, dim)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def measured(self, raw: Raw) -> Tensor:
        """(M, C): the pixels of all real frames, of which `mean` and `std` are the constants."""
        valid = valid_mask(raw.lengths, raw.data.shape[2], raw.data.device)
        return raw.data.permute(0, 2, 3, 4, 1)[valid].flatten(0, -2)

    def lengths(self, raw: Raw) -> Tensor:
        down, across = self._patches(raw)
        for name, frames in zip(raw.ids, raw.lengths.tolist(), strict=True):
            if frames < self.min_length:
                raise ValueError(f"{name}: {frames} frames are fewer than the {self.min_length} that one token needs")
        return torch.div(raw.lengths, self.size[0], rounding_mode="floor") * (down * across)

    def forward(self, raw: Raw, *, late: bool = False) -> Tokens:
        if raw.rate is not None and raw.rate != self.rate:
            raise ValueError(
                f"{raw.ids[0]}: {raw.rate:g} frames/s, but this frontend reads {self.rate:g}; sample the clip anew"
            )
        lengths, (down, across), (deep, tall, wide) = self.lengths(raw), self._patches(raw), self.size
        steps = int(lengths.max()) // (down * across)
        x = (raw.data[:, :, : steps * deep] - self.mean) / self.std
        # within a tube: frame, row, column, channel last, as VideoMAE orders what it reconstructs
        x = x.view(len(x), self.channels, steps, deep, down, tall, across, wide).permute(0, 2, 4, 6, 3, 5, 7, 1)
        feat = x.reshape(len(x), steps * down * across, self.feature_dim)
        valid = None
        if int(lengths.min()) < feat.shape[1]:
            # where, not a product: what stands in the padding may be NaN
            valid = valid_mask(lengths, feat.shape[1], feat.device)[..., None]
            feat = torch.where(valid, feat, 0.0)
        tokens = feat if late else self.project(feat)
        if valid is not None and not late:
            tokens = tokens * valid
        axes = [torch.arange(size, device=x.device) for size in (steps, down, across)]
        coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(1, -1, 3)
        return Tokens(
            x=tokens,
            lengths=lengths,
            coords=coords.expand(len(x), -1, -1),
            axes=self.axes,
            grid=(steps, down, across),
            feat=feat,
            step_ms=1000 * deep / self.rate,
            span_ms=1000 * deep / self.rate,
            project=self.project if late else None,
        )

    def _patches(self, raw: Raw) -> tuple[int, int]:
        """Tubes down and across.

        Raises:
            ValueError: the frames are not a whole number of tubes high or wide, or have other channels.
        """
        channels, _, height, width = raw.data.shape[1:]
        _, tall, wide = self.size
        if channels != self.channels:
            raise ValueError(f"{raw.ids[0]}: {channels} channels, but frontend.channels={self.channels}")
        if height % tall or width % wide or not height or not width:
            raise ValueError(
                f"{raw.ids[0]}: frames of {height} x {width} pixels are not a whole number of {tall} x {wide} patches; "
                "add a resize or crop to `augment`"
            )
        return height // tall, width // wide
