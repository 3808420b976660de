"""Image: a picture cut into patches, each one token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmssl.nn.linear import Linear
from mmssl.types import Frontend, Raw, Tokens


class Patches(Frontend):
    """Non-overlapping patches of a picture of any size and any number of channels, projected to the model's width.

    Source: Dosovitskiy et al. 2021 (arXiv:2010.11929), section 3.1.

    Args:
        dim: width of the tokens.
        size: height and width of a patch in pixels.
        channels: of the pictures: 1 gray, 3 color, or any other number for arrays.
        mean, std: of each channel over the training data, for pictures in [0, 1]; the pictures are brought to mean 0
            and deviation 1 with them. They belong to the frontend, so they travel with its weights.
        cut: whether pictures that are no whole number of patches lose what is left over at the bottom and the right,
            as a convolution leaves it out; they are refused otherwise.
    """

    axes: ClassVar[tuple[str, ...]] = ("h", "w")
    learned: ClassVar[bool] = False
    late: ClassVar[bool] = True

    def __init__(
        self,
        *,
        dim: int,
        size: Sequence[int] = (16, 16),
        channels: int = 3,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        cut: bool = False,
    ) -> None:
        super().__init__()
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"frontend.mean, frontend.std: {len(mean)} and {len(std)} numbers, but frontend.channels={channels}; "
                "give one number for each channel"
            )
        self.dim, self.feature_dim = dim, channels * math.prod(size)
        self.size, self.channels, self.cut = tuple(size), channels, cut
        self.min_length = 1
        self.reader_settings: dict[str, Any] = {"channels": channels}
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(list(mean))[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(list(std))[:, None, None], persistent=False)
        self.project = Linear(self.feature_dim, dim)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def grid(self, raw: Raw) -> tuple[int, int]:
        """Patches down and across.

        Raises:
            ValueError: the picture is not a whole number of patches, or has other channels.
        """
        channels, height, width = raw.data.shape[1:]
        if channels != self.channels:
            raise ValueError(f"{raw.ids[0]}: {channels} channels, but frontend.channels={self.channels}")
        left_over = height % self.size[0] or width % self.size[1]
        if (left_over and not self.cut) or height < self.size[0] or width < self.size[1]:
            raise ValueError(
                f"{raw.ids[0]}: {height} x {width} pixels are not a whole number of {self.size[0]} x {self.size[1]} "
                "patches; add a resize or crop to `augment`"
            )
        return height // self.size[0], width // self.size[1]

    def measured(self, raw: Raw) -> Tensor:
        """(M, C): all pixels, of which `mean` and `std` are the constants."""
        return raw.data.transpose(0, 1).flatten(1).T

    def lengths(self, raw: Raw) -> Tensor:
        return torch.full((len(raw),), math.prod(self.grid(raw)))

    def forward(self, raw: Raw, *, late: bool = False) -> Tokens:
        (down, across), (tall, wide) = self.grid(raw), self.size
        x = (raw.data[..., : down * tall, : across * wide] - self.mean) / self.std
        # within a patch: row, column, channel last, the order of released weights
        x = x.unflatten(3, (across, wide)).unflatten(2, (down, tall)).permute(0, 2, 4, 3, 5, 1)
        feat = x.reshape(len(x), down * across, self.feature_dim)
        rows = torch.arange(down, device=x.device)
        columns = torch.arange(across, device=x.device)
        coords = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).view(1, -1, 2)
        return Tokens(
            x=feat if late else self.project(feat),
            lengths=self.lengths(raw),
            coords=coords.expand(len(x), -1, -1),
            axes=self.axes,
            grid=(down, across),
            feat=feat,
            project=self.project if late else None,
        )
