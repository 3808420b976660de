"""Attention within windows of the token grid, beside the one over the whole clip."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmssl.types import valid_mask


class Windows:
    """Which of the packed tokens of a batch attend to each other where that is not all of a clip.

    Windows hold what real tokens of a clip lie in them: fewer at the edges of the grid and at a clip's end. So nothing
    depends on padding, nor on how long the other clips are.

    Args:
        cells: (B, N) int64 on the CPU, the number of each token's window, see `window_cells`; what stands past a clip's
            length is not read.
        lengths: (B,) int64 on the CPU, real tokens.
        device: of the tokens.
    """

    def __init__(self, cells: Tensor, lengths: Tensor, device: torch.device | str = "cpu") -> None:
        batch, size = cells.shape
        own = cells + (int(cells.max()) + 1) * torch.arange(batch)[:, None]
        _, window, counts = own[valid_mask(lengths, size)].unique(return_inverse=True, return_counts=True)
        self.count, self.largest = len(counts), int(counts.max())
        order = window.argsort(stable=True)
        rank = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        places = torch.empty_like(order)
        places[order] = window[order] * self.largest + rank
        # places that a window leaves empty repeat the first token, which nobody attends to there
        tokens = torch.zeros(self.count * self.largest, dtype=torch.int64)
        tokens[places] = torch.arange(len(order))
        self.tokens, self.places = (index.to(device, non_blocking=True) for index in (tokens, places))
        self.mask: Tensor | None = None
        if int(counts.min()) < self.largest:
            self.mask = valid_mask(counts, self.largest, device)[:, None, None, :]

    def split(self, h: Tensor) -> Tensor:
        """Packed tokens, (M, D) or (B, N, D) -> (windows, tokens of the largest, D)."""
        return h.reshape(-1, h.shape[-1]).index_select(0, self.tokens).view(self.count, self.largest, -1)

    def join(self, rows: Tensor, like: Tensor) -> Tensor:
        """What was split, in the order and shape of the packed tokens `like`."""
        return rows.flatten(0, 1).index_select(0, self.places).view(*like.shape[:-1], -1)


def window_cells(grid: Sequence[int], window: Sequence[int], *, shifted: bool) -> Tensor:
    """The number of the window that each token of a grid lies in: (N,) int64 on the CPU.

    Source: Liu et al. 2021, Swin Transformer (arXiv:2103.14030), section 3.2. Shifted windows lie half a window further
    along every axis. What reaches past an edge is cut off: the same as their cyclic shift with its mask, which keeps
    apart what the shift brought together.

    Args:
        grid: as in `Tokens`.
        window: tokens along each axis.
    """
    cells = torch.zeros(math.prod(grid), dtype=torch.int64)
    places = torch.meshgrid(*[torch.arange(size) for size in grid], indexing="ij")
    for place, size, length in zip(places, window, grid, strict=True):
        offset = size - size // 2 if shifted else 0
        cells = cells * ((length + offset) // size + 1) + ((place + offset) // size).flatten()
    return cells
