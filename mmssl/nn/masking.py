"""Where to hide: plain functions from lengths and seeds to a MaskPlan.

Every function hides real tokens only, counts its ratio in each row's real tokens, and draws from the clips' own seeds
(see `nn.seeds`), so a clip has the same mask in whatever batch it comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from mmssl.nn.seeds import uniform
from mmssl.types import MaskPlan, Tokens, valid_mask

# of the draws that are no masks of a clip's clones, see `uniform`; those count from 0
_START, _STRIPES = 1_000_000, 1_000_001
# deviations in tokens of the Gaussians by which noise is blurred a little, `fine`, and more, `coarse`
_FINE, _COARSE = 0.5, 2.0

Color = Literal["red", "blue", "green", "purple"]
# (fine, coarse) -> what is left of each frequency of white noise; red, green and blue together are white
COLORS: dict[Color, Callable[[Tensor, Tensor], Tensor]] = {
    "red": lambda fine, coarse: coarse,
    "blue": lambda fine, coarse: 1 - fine,
    "green": lambda fine, coarse: fine - coarse,
    "purple": lambda fine, coarse: 1 - (fine - coarse),
}


def random_mask(lengths: Tensor, *, ratio: float, seeds: Tensor, clones: int = 1) -> MaskPlan:
    """Hide a random share of each row's tokens.

    Source: He et al. 2022 (arXiv:2111.06377), section 3. The share is rounded to the nearest token, and at least one
    token stays visible and one is hidden wherever a row has two.

    Args:
        lengths: (B,) int64, real tokens.
        ratio: share of tokens to hide, in (0, 1).
        seeds: (B,) int64.
        clones: masked copies of each clip, each with a mask of its own.

    Raises:
        ValueError: ratio outside (0, 1).
    """
    lengths = lengths.cpu()
    size = int(lengths.max())
    noise = torch.cat([uniform(seeds, size, stream=2 * copy) for copy in range(clones)], 1).view(-1, size)
    rows, lengths = clone(lengths, clones)
    return plan_of(_lowest(noise, lengths, ratio), lengths, rows=rows)


def color_mask(tokens: Tokens, *, color: Color, ratio: float, seeds: Tensor) -> MaskPlan:
    """Hide where noise of a color is lowest.

    "red" leaves the low frequencies of white noise and hides large patches, "blue" the high ones and hides single
    tokens that lie apart, "green" the middle ones and hides patches of a few tokens, spread evenly over the clip, and
    "purple" all but those.

    Source: Hinojosa et al. 2024, ColorMAE (arXiv:2407.13036), section 3: white noise blurred by a Gaussian, what that
    takes away, the difference of two blurs, and what that takes away.
    Differs from the paper: noise is drawn for each clip on its own grid, whatever the axes, and not cropped from stored
        maps; it wraps around at the edges, so that each place is hidden equally often; and the deviations of the two
        Gaussians, in tokens, are chosen here, the same for all colors.

    Args:
        tokens: their grid and lengths are read.
        ratio: share of tokens to hide, in (0, 1); rounded as in `random_mask`.
        seeds: (B,) int64.

    Raises:
        ValueError: ratio outside (0, 1).
    """
    lengths, rest = tokens.lengths.cpu(), tuple(tokens.grid[1:])
    noise = uniform(seeds, int(lengths.max())).double() - 0.5
    for n in lengths.unique().tolist():
        rows = lengths == n
        grid = (n // math.prod(rest), *rest)
        axes = tuple(range(1, 1 + len(grid)))
        square = torch.zeros(grid, dtype=torch.float64)  # of the frequency, in cycles per token
        for axis in torch.meshgrid(*[torch.fft.fftfreq(size, dtype=torch.float64) for size in grid], indexing="ij"):
            square += axis.square()
        fine, coarse = (torch.exp(-2 * (math.pi * deviation) ** 2 * square) for deviation in (_FINE, _COARSE))
        spectrum = torch.fft.fftn(noise[rows, :n].view(-1, *grid), dim=axes) * COLORS[color](fine, coarse)
        noise[rows, :n] = torch.fft.ifftn(spectrum, dim=axes).real.flatten(1)
    return plan_of(_lowest(noise, lengths, ratio), lengths)


def tube_mask(tokens: Tokens, *, ratio: float, seeds: Tensor) -> MaskPlan:
    """Hide the same random places in every time step.

    Source: Tong et al. 2022, VideoMAE (arXiv:2203.12602), section 3.3, "tube masking": what moves little cannot be read
    off its neighbors in time. The share is rounded to the nearest place (176 of 196 at 0.9, as in the paper).

    Args:
        tokens: with time and at least one other axis; their grid and lengths are read.
        ratio: share of places to hide, in (0, 1).
        seeds: (B,) int64.

    Raises:
        ValueError: ratio outside (0, 1), or tokens that lie on other axes.
    """
    if tokens.axes[0] != "t" or len(tokens.axes) < 2:
        raise ValueError(
            f"objective.mask=tube: the same places are hidden in every time step, but these tokens lie on "
            f"{', '.join(tokens.axes)}; choose random"
        )
    steps, places = tokens.grid[0], math.prod(tokens.grid[1:])
    one = random_mask(torch.full((len(tokens.lengths),), places), ratio=ratio, seeds=seeds).masked
    lengths = tokens.lengths.cpu()
    return plan_of(one.repeat(1, steps) & valid_mask(lengths, steps * places), lengths)


def running_cells(tokens: Tokens, *, ratio: float, seeds: Tensor) -> Tensor:
    """Which tokens a decoder works for: in each 2 x 2 cell of places some, and in the next time step the next ones.

    Source: Wang et al. 2023, VideoMAE V2 (arXiv:2303.16727), section 3.2, "running cell masking", after Qing et al.
    2022 (arXiv:2207.11660). The four places of a cell are taken in turn, row by row; where in that turn a clip's first
    step stands is drawn from its seed. Over four steps every place is left out equally often.

    Args:
        tokens: with time and two other axes; their coordinates and lengths are read.
        ratio: share of tokens to leave out: 0.25, 0.5 or 0.75.
        seeds: (B,) int64.

    Returns:
        (B, N) bool on the CPU, True = worked for; only real tokens are.

    Raises:
        ValueError: another ratio, or tokens that lie on other axes.
    """
    if len(tokens.axes) != 3 or tokens.axes[0] != "t":
        raise ValueError(
            f"objective.decoder_mask=running_cells: cells run over time and two other axes, but these tokens lie on "
            f"{', '.join(tokens.axes)}; leave it out"
        )
    if ratio not in (0.25, 0.5, 0.75):
        raise ValueError(
            f"objective.decoder_mask_ratio={ratio}: one, two or three of the four places of a cell can be left out; "
            "choose 0.25, 0.5 or 0.75"
        )
    # from the grid and not from the coordinates, which lie on the accelerator
    step, row, column = torch.meshgrid(*[torch.arange(size) for size in tokens.grid], indexing="ij")
    turn = (2 * (row % 2) + column % 2 - step).flatten()
    start = (4 * uniform(seeds, 1, stream=_START)).long()
    taken = (turn - start) % 4 < 4 * (1 - ratio)
    return taken & valid_mask(tokens.lengths.cpu(), taken.shape[1])


def span_mask(
    lengths: Tensor, *, prob: float, span: int, seeds: Tensor, min_spans: int = 2, clones: int = 1
) -> MaskPlan:
    """Hide runs of consecutive tokens; runs may overlap.

    Source: Baevski et al. 2020 (arXiv:2006.11477), section 3.1, with `prob` as its released code has it: the share of
    tokens drawn as hidden *before* overlap (.65 hides about half), not the paper's share of starting points (.065).
    The number of runs is prob * length / span, rounded up or down at random; their starts are drawn without
    replacement.

    A row too short for `min_spans` runs gets shorter runs, and always keeps a visible token: no clip is refused and
    none is hidden whole.

    Args:
        lengths: (B,) int64, real tokens.
        prob: expected share of hidden tokens before overlap.
        span: tokens in a run.
        min_spans: least number of runs in a row.
        seeds: (B,) int64.
        clones: masked copies of each clip, each with a mask of its own.
    """
    if prob <= 0 or span < 1:
        raise ValueError(f"mask_prob={prob}, mask_span={span}: both must be greater than 0")
    lengths = lengths.cpu()
    size = int(lengths.max())
    noise = torch.cat([uniform(seeds, size + 1, stream=2 * copy + 1) for copy in range(clones)], 1)
    # the first number of a row, not its last: where the last stands depends on what else is in the batch
    chance, noise = noise.view(-1, size + 1).split([1, size], 1)
    rows, lengths = clone(lengths, clones)
    # a run may cover half of a short row at most, so that something is left to predict from
    width = torch.full_like(lengths, span).minimum((lengths // 2).clamp_min(1))
    starts = lengths - width + 1
    count = (prob * lengths / width + chance[:, 0]).floor().long()
    count = torch.minimum(count.clamp_min(min_spans), starts)
    place = torch.arange(size)
    rank = noise.masked_fill(place >= starts[:, None], 2.0).argsort(1).argsort(1)
    begins = (rank < count[:, None]).long()
    # a token is hidden when a run began within the last `width` places: a difference of running sums
    total = torch.nn.functional.pad(begins.cumsum(1), (1, 0))
    masked = total[:, 1:] > total.gather(1, (place + 1 - width[:, None]).clamp_min(0))
    whole = masked.sum(1) >= lengths
    if whole.any():
        first = noise.masked_fill(~valid_mask(lengths, size), 2.0).argmin(1)
        masked[whole, first[whole]] = False
    return plan_of(masked, lengths, rows=rows)


def axis_mask(lengths: Tensor, *, grid: Sequence[int], ratios: Sequence[float], seeds: Tensor) -> MaskPlan:
    """Hide whole steps of each axis: all tokens of some times, all tokens of some frequencies.

    Source: Huang et al. 2022 (Audio-MAE, arXiv:2207.06405), section 3, "fine-tuning"; after SpecAugment, Park et
    al. 2019 (arXiv:1904.08779). The shares are of a clip's own steps and rounded to the nearest; one step of each axis
    stays visible, and so does a token.

    Args:
        lengths: (B,) int64, real tokens.
        grid: as in `Tokens`.
        ratios: share of the steps to hide along each axis of the grid, in [0, 1).
        seeds: (B,) int64.
    """
    lengths, size = lengths.cpu(), math.prod(grid)
    valid = valid_mask(lengths, size)
    masked = torch.zeros_like(valid)
    for axis, ratio in enumerate(ratios):
        place = torch.arange(size) // math.prod(grid[axis + 1 :]) % grid[axis]
        extent = place.masked_fill(~valid, -1).amax(1) + 1  # the clip's own, not the batch's
        hidden = torch.minimum((extent * ratio).round().long(), extent - 1)
        noise = uniform(seeds, grid[axis], stream=axis)
        rank = noise.masked_fill(~valid_mask(extent, grid[axis]), 2.0).argsort(1).argsort(1)
        masked |= (rank < hidden[:, None])[:, place]
    return plan_of(masked & valid, lengths)


def stripes(lengths: Tensor, bands: int, *, time: float, frequency: float, seeds: Tensor) -> Tensor:
    """One run of frames and one of bands of each clip, as long as is drawn, to be put to the mean.

    Source: Park et al. 2019, SpecAugment (arXiv:1904.08779), section 2, steps 2 and 3, without warping.
    Differs from the paper: lengths go up to a share of the clip's own frames, not to a number of them, so that no
        clip is too short.

    Args:
        lengths: (B,) int64, real frames.
        time, frequency: most of the frames and of the bands that are taken, in [0, 1].
        seeds: (B,) int64.

    Returns:
        (B, T, F) bool on the CPU, True = taken; no frame past a clip's length is.
    """
    draws = uniform(seeds, 4, stream=_STRIPES)

    def run(sizes: Tensor, share: float, length: Tensor, start: Tensor, longest: int) -> Tensor:
        length = (length * ((sizes * share).floor() + 1)).floor()
        begin = (start * (sizes - length + 1)).floor()
        place = torch.arange(longest)
        return (place >= begin[:, None]) & (place < (begin + length)[:, None])

    times = run(lengths.cpu(), time, draws[:, 0], draws[:, 1], int(lengths.max()))
    high = run(torch.full_like(lengths, bands), frequency, draws[:, 2], draws[:, 3], bands)
    return (times[:, :, None] | high[:, None]) & valid_mask(lengths, times.shape[1])[..., None]


def plan_of(masked: Tensor, lengths: Tensor, *, rows: Tensor | None = None) -> MaskPlan:
    """The plan of an explicit mask: (R, N) bool, True = hidden, and the (R,) real tokens of each row."""
    visible = valid_mask(lengths, masked.shape[1]) & ~masked
    keep_lengths = visible.sum(1)
    # a stable sort puts the visible places first and leaves them in ascending order
    keep = visible.int().sort(dim=1, descending=True, stable=True).indices[:, : max(int(keep_lengths.max()), 1)]
    keep = keep.masked_fill(~valid_mask(keep_lengths, keep.shape[1]), 0)
    rows = torch.arange(len(masked)) if rows is None else rows
    return MaskPlan(rows=rows, masked=masked, keep=keep, keep_lengths=keep_lengths)


def plan_given(masked: Tensor, tokens: Tokens) -> MaskPlan:
    """The plan of a mask that was not drawn.

    Raises:
        ValueError: it is no mask of these tokens, or it leaves a clip nothing to predict from.
    """
    valid = tokens.valid.cpu()
    if masked.dtype != torch.bool or masked.shape != valid.shape:
        kind = f"{tuple(masked.shape)} {str(masked.dtype).removeprefix('torch.')}"
        raise ValueError(
            f"reconstruct: masked is {kind}, but these clips have {tuple(valid.shape)} tokens; give one bool for each, "
            "True where it is to be hidden"
        )
    for row, hidden in enumerate(masked):
        if not (valid[row] & ~hidden).any():
            raise ValueError(
                f"reconstruct: masked hides all tokens of clip {row}; leave one to predict the others from"
            )
        if (hidden & ~valid[row]).any():
            raise ValueError(
                f"reconstruct: masked hides tokens of clip {row} past its {int(valid[row].sum())} real ones; set "
                "them to False"
            )
    return plan_of(masked, tokens.lengths)


def channel_mask(batch: int, channels: int, *, prob: float, span: int, seeds: Tensor) -> Tensor:
    """Hide runs of channels of whole clips, for fine-tuning: (B, C) bool, True = to be zeroed.

    Source: Baevski et al. 2020, appendix B (after SpecAugment, Park et al. 2019). `prob` as in `span_mask`.
    """
    lengths = torch.full((batch,), channels)
    return span_mask(lengths, prob=prob, span=span, min_spans=0, seeds=seeds + 1).masked


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each row: (R, N, D) at (R, K) -> (R, K, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _lowest(noise: Tensor, lengths: Tensor, ratio: float) -> Tensor:
    """(R, N) bool, True for the share `ratio` of each row's real tokens where the noise is lowest."""
    return first(noise, lengths, hidden_count(lengths, ratio))


def hidden_count(lengths: Tensor, ratio: float) -> Tensor:
    """(R,) tokens to hide: the share rounded to the nearest, at least one hidden and one visible where there are two.

    Raises:
        ValueError: ratio outside (0, 1).
    """
    if not 0 < ratio < 1:
        raise ValueError(f"mask_ratio={ratio}: the share of tokens to hide must lie between 0 and 1")
    hidden = (lengths * ratio).round().long()
    return torch.minimum(hidden.clamp_min(1), lengths - 1).clamp_min(0)


def first(order: Tensor, lengths: Tensor, count: Tensor) -> Tensor:
    """(R, N) bool, True for the `count` real tokens of each row that come first; of equal ones, those on the left."""
    # padding sorts last and is never reached
    rank = order.masked_fill(~valid_mask(lengths, order.shape[1]), torch.inf).argsort(dim=1, stable=True).argsort(1)
    return rank < count[:, None]


def clone(lengths: Tensor, clones: int) -> tuple[Tensor, Tensor]:
    """(R,) the clip of each of its copies, and (R,) its length; R = B x clones."""
    rows = torch.arange(len(lengths)).repeat_interleave(clones)
    return rows, lengths[rows]
