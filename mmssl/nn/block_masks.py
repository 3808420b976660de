"""Masks that hide, or leave visible, blocks of neighbors: spans of time, rectangles of a picture, boxes of a video.

Every clip has exactly the share hidden that was asked for, so clips of one length have one count, whatever was cropped
from where: masks are drawn for the tokens that are there. As in `nn.masking`, all is drawn from the clips' own seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.nn.masking import clone, first, hidden_count, plan_of
from mmssl.nn.seeds import uniform
from mmssl.types import MaskPlan, Tokens, valid_mask

BlockMask = Literal["blocks", "inverse_blocks", "beit_blocks"]
_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
# rectangles tried for a clip before what is left to hide is hidden anywhere
_TRIES = 64


def block_mask(
    tokens: Tokens,
    *,
    ratio: float,
    size: int | Sequence[int],
    seeds: Tensor,
    clones: int = 1,
    inverse: bool = False,
) -> MaskPlan:
    """Hide random blocks of one size until exactly the share `ratio` is hidden; or show them until the rest is visible.

    Source: spans of time as in Baevski et al. 2020 (arXiv:2006.11477), section 3.1; inverse blocks, which stay visible,
    as in Baevski et al. 2023, data2vec 2.0 (arXiv:2212.07525), section 3.4; for spectrograms Chen et al. 2024, EAT
    (arXiv:2401.03497), section 3.1. Blocks may overlap.
    Differs from the released code: blocks come in a random order until the count is reached, the last one cut short,
    where the code draws a number of them and then hides or shows single tokens to make counts equal. A block that
    reaches over an edge goes on at the other side, so all tokens are hidden equally often; with the code those at the
    edges are seen less often where blocks stay visible.

    Args:
        tokens: their grid and lengths are read.
        ratio: share of tokens to hide, in (0, 1), rounded as in `random_mask`.
        size: tokens of a block along each axis; one number for all.
        seeds: (B,) int64.
        clones: masked copies of each clip, each with a mask of its own.
        inverse: whether blocks are what stays visible.

    Raises:
        ValueError: ratio outside (0, 1), or another number of sizes than axes.
    """
    grid = tuple(tokens.grid)
    sizes = (size,) * len(grid) if isinstance(size, int) else tuple(size)
    if len(sizes) != len(grid) or min(sizes) < 1:
        raise ValueError(
            f"objective.mask_size={size}: a block has a size of at least 1 along each of the axes "
            f"{', '.join(tokens.axes)}; give one number, or one for each axis"
        )
    rest, size_of_all = math.prod(grid[1:]), math.prod(grid)
    noise = torch.stack([uniform(seeds, size_of_all, stream=2 * copy) for copy in range(clones)], 1)
    # of tokens that the same block covers first, any may be left out where it is cut short
    ties = torch.stack([uniform(seeds, size_of_all, stream=2 * copy + 1) for copy in range(clones)], 1)
    order = ties.double() * 2.0**-24
    for n in tokens.lengths.unique().tolist():
        clips = tokens.lengths == n
        own = (n // rest, *grid[1:])
        blocks = [min(block, there) for block, there in zip(sizes, own, strict=True)]
        begins = noise[clips, :, :n].view(-1, 1, *own)
        around = [wide for block in reversed(blocks) for wide in (block - 1, 0)]
        # the place in the order of the first block that covers a token
        covered = -_POOL[len(grid)](-F.pad(begins, around, mode="circular"), blocks, stride=1)
        order[clips, :, :n] += covered.view(-1, clones, n)
    order = order.flatten(0, 1)
    rows, lengths = clone(tokens.lengths.cpu(), clones)
    hidden = hidden_count(lengths, ratio)
    if not inverse:
        return plan_of(first(order, lengths, hidden), lengths, rows=rows)
    visible = first(order, lengths, lengths - hidden)
    return plan_of(valid_mask(lengths, order.shape[1]) & ~visible, lengths, rows=rows)


def beit_mask(tokens: Tokens, *, ratio: float, size: int | Sequence[int], seeds: Tensor, clones: int = 1) -> MaskPlan:
    """Hide rectangles of random area and shape until exactly the share `ratio` is hidden.

    Source: Bao et al. 2022, BEiT (arXiv:2106.08254), algorithm 1: an area from `size` to what is left to hide, a ratio
    of height to width from 0.3 to 1 / 0.3.
    Differs from the paper: the last rectangle is cut so that counts are equal.

    Args:
        tokens: on two axes; their grid and lengths are read.
        ratio: share of tokens to hide, in (0, 1), rounded as in `random_mask`.
        size: the least tokens of a rectangle, 16 in the paper.
        seeds: (B,) int64.
        clones: masked copies of each clip, each with a mask of its own.

    Raises:
        ValueError: ratio outside (0, 1), tokens on one or three axes, or a size for each axis.
    """
    if len(tokens.grid) != 2:
        raise ValueError(
            f"objective.mask=beit_blocks: rectangles lie on two axes, but these tokens lie on "
            f"{', '.join(tokens.axes)}; choose blocks"
        )
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"objective.mask_size={size}: the least tokens of a rectangle are one number of at least 1")
    across = tokens.grid[1]
    rows, lengths = clone(tokens.lengths.cpu(), clones)
    hidden = hidden_count(lengths, ratio)
    draws = torch.cat([uniform(seeds, 4 * _TRIES, stream=2 * copy) for copy in range(clones)], 1)
    # what no rectangle covers comes last, at random
    order = _TRIES + torch.cat(
        [uniform(seeds, math.prod(tokens.grid), stream=2 * copy + 1) for copy in range(clones)], 1
    )
    order = order.view(len(rows), -1)
    for row, drawn in enumerate(draws.view(len(rows), _TRIES, 4).tolist()):
        down, left = int(lengths[row]) // across, int(hidden[row])
        places = order[row, : down * across].view(down, across)
        for n, (area, shape, top, start) in enumerate(drawn):
            if left <= 0:
                break
            area = size + area * max(left - size, 0)
            shape = 0.3 ** (1 - 2 * shape)
            height = min(max(round((area * shape) ** 0.5), 1), down)
            width = min(max(round((area / shape) ** 0.5), 1), across)
            y, x = int(top * (down - height + 1)), int(start * (across - width + 1))
            block = places[y : y + height, x : x + width]
            left -= int((block >= _TRIES).sum())
            block.clamp_max_(n)
    return plan_of(first(order, lengths, hidden), lengths, rows=rows)


def rectangles(
    tokens: Tokens,
    *,
    count: int,
    scale: Sequence[float],
    aspect: Sequence[float],
    seeds: Tensor,
    stream: int = 0,
    edges: bool = True,
) -> Tensor:
    """Rectangles of random area and shape in each clip: spans of time on one axis, the same in every step of video.

    Source: Assran et al. 2023, I-JEPA (arXiv:2301.08243), section 3 and appendix A; over time as in Bardes et al.
    2024, V-JEPA (arXiv:2404.08471), section 3.
    Differs from the released code: each rectangle has an area and a shape of its own, where the code draws them once
    for a batch; a shape is relative to the clip's, so that a share of a long spectrogram is that share as well, and
    drawn evenly in its logarithm.

    Args:
        tokens: their grid and lengths are read.
        count: rectangles of each clip; they may overlap.
        scale: least and greatest share of the clip's places.
        aspect: least and greatest ratio of height to width, each in units of the clip's own.
        seeds: (B,) int64.
        stream: another number gives independent draws.
        edges: whether rectangles reach the last row and column as well; the released code of I-JEPA draws so that they
            never do.

    Returns:
        (B, count, N) bool on the CPU, real tokens only.

    Raises:
        ValueError: shares outside (0, 1], or an order that is none.
    """
    if not 0 < scale[0] <= scale[1] <= 1 or not 0 < aspect[0] <= aspect[1] or count < 1:
        raise ValueError(
            f"objective.blocks={[count, *scale]}, aspect={list(aspect)}: at least one block, with shares of the clip "
            "from above 0 to 1 and ratios above 0, the least one first"
        )
    lengths, grid = tokens.lengths.cpu(), tuple(tokens.grid)
    across = grid[-1] if len(grid) > 1 else 1
    # the clip's own extent in time, not the batch's
    down = torch.full_like(lengths, grid[1]) if len(grid) == 3 else lengths // across
    share, shape, top, left = uniform(seeds, 4 * count, stream=stream).view(-1, 4, count, 1).unbind(1)
    down = down[:, None, None]
    share = scale[0] + share * (scale[1] - scale[0])
    shape = aspect[0] * (aspect[1] / aspect[0]) ** shape
    spare = 0 if edges else 1
    height = down * (share if len(grid) == 1 else (share * shape).sqrt())
    height = torch.minimum(height.round().long().clamp_min(1), (down - spare).clamp_min(1))
    width = (across * (share / shape).sqrt()).round().long().clamp(1, max(across - spare, 1))
    top = (top * (down - height + 1 - spare).clamp_min(1)).long()
    left = (left * (across - width + 1 - spare).clamp_min(1)).long()
    place = torch.arange(math.prod(grid))
    row, column = place // across % grid[max(len(grid) - 2, 0)], place % across
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    return inside & valid_mask(lengths, len(place))[:, None]


# (tokens, ratio, size, seeds, clones) -> MaskPlan
BLOCK_MASKS: dict[BlockMask, Callable[..., MaskPlan]] = {
    "blocks": block_mask,
    "inverse_blocks": partial(block_mask, inverse=True),
    "beit_blocks": beit_mask,
}
