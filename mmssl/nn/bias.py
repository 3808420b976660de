"""What attention adds to its scores for where two tokens lie relative to each other: functions of coordinates.

Each is a module called as `bias(coords, tokens, prefix)` that returns for each block what to add there: (1 or R, heads,
P + N, P + N), 1 where all clips have the same coordinates. The row is the token that looks, the column that which it
looks at, and the first P are class token and registers.

    coords: (1 or R, N, A), the place of each token that is encoded; what stands past a row's length is not read.
    tokens: those of the frontend, hidden ones as well, for their grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.nn.linear import Linear
from mmssl.types import Tokens


class DistanceBuckets(nn.Module):
    """A learned value for each head and range of distances in time: exact for near tokens, coarser the further away.

    Source: Raffel et al. 2020, T5 (arXiv:1910.10683), section 2.1, and its released code; the numbers as in WavLM (Chen
    et al. 2022, arXiv:2110.13900).
    All blocks share the values. A class token has none, neither where it looks nor where it is looked at.

    Args:
        buckets: half of them for tokens ahead, and half for the token itself and those behind. Of each half the first
            half is one step wide, and the rest grows with the logarithm of the distance.
        furthest: steps from which on all distances share the last one.
    """

    def __init__(self, heads: int, depth: int, *, buckets: int = 320, furthest: int = 800) -> None:
        super().__init__()
        if buckets < 4 or buckets % 4 or furthest <= buckets // 4:
            raise ValueError(
                f"transformer.bias: buckets={buckets} and furthest={furthest}; buckets divide by 4, and the furthest "
                "is more than a quarter of them"
            )
        self.depth, self.buckets, self.furthest = depth, buckets, furthest
        self.table = nn.Parameter(torch.randn(buckets, heads) * 0.02)

    def forward(self, coords: Tensor, tokens: Tokens, prefix: int) -> list[Tensor]:
        """See the module.

        Raises:
            ValueError: the tokens lie on more than the axis of time.
        """
        if coords.shape[-1] != 1:
            raise ValueError(
                f"transformer.bias: buckets measures distances in time alone, and these tokens lie on the axes "
                f"{', '.join(tokens.axes)}; choose grid"
            )
        ahead = coords[:, None, :, 0] - coords[:, :, None, 0]
        values = F.embedding(self._bucket(ahead), self.table).permute(0, 3, 1, 2)
        return [F.pad(values, (prefix, 0, prefix, 0))] * self.depth

    def _bucket(self, ahead: Tensor) -> Tensor:
        """Steps ahead, negative ones behind -> the number of their range."""
        half, exact = self.buckets // 2, self.buckets // 4
        distance = ahead.abs()
        # near ones are clamped, because the logarithm of zero is no number to round
        growth = (distance.clamp(min=exact).float() / exact).log() / math.log(self.furthest / exact)
        coarse = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
        return torch.where(distance < exact, distance, coarse) + half * (ahead > 0)


class GridTable(nn.Module):
    """A learned value for each head and each difference of two places on a grid, and three for a class token.

    Source: Liu et al. 2021, Swin (arXiv:2103.14030), section 3.2, "Relative position bias", over the whole picture;
    the three of a class token as in the released code of BEiT (Bao et al. 2022, arXiv:2106.08254): where it looks at
    others, where it is looked at, and at itself. Registers are treated as it is.
    A picture of another size has the table stretched (bilinear), as in MiDaS 3.1 (Birkl et al. 2023,
    arXiv:2307.14460); time is not stretched, and a clip may be shorter than the grid.

    Args:
        grid: tokens along each axis.
        shared: one table for all blocks, rather than one each.
    """

    def __init__(self, heads: int, depth: int, *, grid: Sequence[int], shared: bool = False) -> None:
        super().__init__()
        self.depth, self.grid = depth, tuple(grid)
        self.spans = tuple(2 * size - 1 for size in grid)
        self.table = nn.Parameter(torch.zeros(1 if shared else depth, math.prod(self.spans) + 3, heads))

    def forward(self, coords: Tensor, tokens: Tokens, prefix: int) -> list[Tensor]:
        """See the module.

        Raises:
            ValueError: the tokens go on past the grid in time, or are no picture and of another size.
        """
        table, spans = self._table(tokens)
        away = coords[:, :, None] - coords[:, None, :]
        cell = torch.zeros_like(away[..., 0])
        for axis, span in enumerate(spans):
            cell = cell * span + (away[..., axis] + span // 2)
        cells, size = math.prod(spans), prefix + coords.shape[1]
        places = cell.new_full((len(cell), size, size), cells + 2)
        places[:, :prefix, prefix:] = cells
        places[:, prefix:, :prefix] = cells + 1
        places[:, prefix:, prefix:] = cell
        values = [F.embedding(places, own).permute(0, 3, 1, 2) for own in table]
        return values if len(values) == self.depth else values * self.depth

    def _table(self, tokens: Tokens) -> tuple[Tensor, tuple[int, ...]]:
        """The table for tokens on this grid, and the differences along each axis that it holds."""
        grid = tuple(tokens.grid)
        if len(grid) == len(self.grid) and all(
            new <= old if axis == "t" else new == old
            for old, new, axis in zip(self.grid, grid, tokens.axes, strict=True)
        ):
            return self.table, self.spans
        if tokens.axes != ("h", "w") or len(self.grid) != 2:
            raise ValueError(
                f"transformer.bias: a table of a grid of {self.grid} does not reach over {grid} tokens; crop the clips"
            )
        spans = tuple(2 * size - 1 for size in grid)
        cells = self.table[:, :-3].transpose(1, 2).unflatten(-1, self.spans)
        stretched = F.interpolate(cells, size=spans, mode="bilinear", align_corners=False)
        return torch.cat([stretched.flatten(2).transpose(1, 2), self.table[:, -3:]], 1), spans


class ALiBi(nn.Module):
    """Each head looks away from what is far, by a slope of its own times a learned scale.

    Source: Press, Smith and Lewis 2022 (arXiv:2108.12409), section 3, whose slopes these are; on both sides of a token
    and with learned scales as in data2vec 2.0 (Baevski et al. 2023, arXiv:2212.07525) for speech and its released code:
    one scale for each head, at first 1, and never below 0.
    Differs from both: where tokens lie on several axes the distance is the straight one, on grids of any size.
    A class token has none, neither where it looks nor where it is looked at.

    Args:
        per_layer: scales of their own for each block.
    """

    def __init__(self, heads: int, depth: int, *, per_layer: bool = False) -> None:
        super().__init__()
        self.depth = depth
        self.table = nn.Parameter(torch.ones(depth if per_layer else 1, heads))
        self.slopes: Tensor
        self.register_buffer("slopes", torch.tensor(_slopes(heads)), persistent=False)

    def forward(self, coords: Tensor, tokens: Tokens, prefix: int) -> list[Tensor]:
        """See the module."""
        distance = (coords[:, :, None] - coords[:, None, :]).to(self.slopes.dtype).norm(dim=-1)
        away = F.pad(-self.slopes[:, None, None] * distance[:, None], (prefix, 0, prefix, 0))
        values = [scale[:, None, None] * away for scale in self.table.clamp_min(0)]
        return values if len(values) == self.depth else values * self.depth


def _slopes(heads: int) -> list[float]:
    """2^(-8/heads), 2^(-16/heads), ..., 2^-8; where their number is no power of two, those of the next lower one, and
    then every second of those of its double."""
    lower = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * i / lower) for i in range(1, lower + 1)]
    return slopes + [2 ** (-8 * i / (2 * lower)) for i in range(1, 2 * lower + 1, 2)][: heads - lower]


class Gate(nn.Module):
    """How much of a head's bias a token takes, by its content.

    Source: Chen et al. 2022, WavLM (arXiv:2110.13900), "gated relative position bias" in the section on the model's
    structure, after Chi et al. 2022, XLM-E (arXiv:2106.16138).
    Differs from the paper, as its released code does: each of the two gates is the sigmoid of a sum of four linear maps
    with biases, of what goes into the attention and not of its queries, and the update gate weighs
    `reset * scale - 1` on top of 2.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = Linear(dim // heads, 8)
        self.scale = nn.Parameter(torch.ones(heads))

    def forward(self, h: Tensor) -> Tensor:
        """(..., D) -> (..., heads)."""
        parts = self.project(h.unflatten(-1, (self.heads, -1))).unflatten(-1, (2, 4))
        update, reset = parts.sum(-1).sigmoid().unbind(-1)
        return update * (reset * self.scale - 1) + 2


BIASES: dict[str, type[nn.Module]] = {"buckets": DistanceBuckets, "grid": GridTable, "alibi": ALiBi}


def build_bias(settings: Mapping[str, Any], *, heads: int, depth: int) -> nn.Module:
    """What `transformer.bias` names.

    Raises:
        ValueError: there is none of this name.
    """
    rest = dict(settings)
    name = rest.pop("name", None)
    if name not in BIASES:
        raise ValueError(f"transformer.bias: name={name!r}; one of {', '.join(BIASES)}")
    return BIASES[name](heads, depth, **rest)
