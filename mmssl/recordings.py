"""Long recordings in overlapping windows: what a model computes at a time does not grow with a recording's length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmssl.types import Encoded, Raw, Tokens

# a batch -> its tokens, what the encoder gives, and the layers asked for, each (B, prefix + N, D)
Encode = Callable[[Raw], tuple[Tokens, Encoded, list[Tensor]]]


def overlap_of(window: float, overlap: float | None) -> float:
    """Seconds that two windows share; where it is not said a quarter of one, and at most one second."""
    return min(1.0, window / 4) if overlap is None else overlap


@dataclass(frozen=True)
class Windows:
    """How recordings are cut.

    length, overlap: of a window and of two neighbors, in raw units (samples, frames).
    at_a_time: windows computed together.
    """

    length: int
    overlap: int
    at_a_time: int

    @classmethod
    def of_seconds(
        cls, window: float, overlap: float | None, *, rate: float | None, batch_size: int, batch_seconds: float
    ) -> Windows:
        """From seconds.

        Args:
            overlap: see `overlap_of`.
            rate: raw units per second; None where there is no time.

        Raises:
            ValueError: windows that are no longer than they overlap, or clips without time.
        """
        if rate is None:
            raise ValueError(f"window={window:g}: pictures have no time to be cut along; leave window out")
        overlap = overlap_of(window, overlap)
        if not 0 <= overlap < window:
            raise ValueError(f"window={window:g}, overlap={overlap:g}: seconds, the overlap from 0 to below the window")
        at_a_time = max(1, min(batch_size, int(batch_seconds / window)))
        return cls(round(window * rate), round(overlap * rate), at_a_time)


def time_axis(raw: Raw) -> int:
    """The axis of its data that time lies on."""
    return 1 if raw.data.ndim == 2 else 2


def encode_long(raw: Raw, encode: Encode, windows: Windows, *, step: int) -> tuple[Tokens, Encoded, list[Tensor]]:
    """One recording, window by window, put together as if it had been encoded at once.

    Windows begin at whole token steps, so that each token of a window is a token of the recording. Where two windows
    overlap, each gives the half that is nearer to its middle: a token is never averaged, and has at least half of the
    overlap around it on both sides but for the recording's own ends. The last window is moved back until it is full.
    Whatever a frontend or encoder measures over a clip, such as the mean that is taken away, it measures over a window.
    The class token and registers are means over the windows.

    Args:
        raw: of one clip that is longer than a window, on any device.
        encode: a batch of windows.
        step: raw units from one token step to the next.

    Returns:
        As `encode`, on the CPU, `Tokens.feat` left out.

    Raises:
        ValueError: the overlap is so short that tokens between two windows would be lost.
    """
    total, time = int(raw.lengths[0]), time_axis(raw)
    hop = (windows.length - windows.overlap) // step * step
    last = -(-(total - windows.length) // step) * step
    starts = [*range(0, total - windows.length, max(hop, 1)), last]
    pieces = [(start, min(windows.length, total - start)) for start in starts]

    prefix: Tensor | None = None
    coords: list[Tensor] = []
    kept: list[list[Tensor]] = []
    place = end = 0  # of `pieces`; and the first step that no window before has computed
    while place < len(pieces):
        # the last may be shorter by less than a step
        same = [piece for piece in pieces[place : place + windows.at_a_time] if piece[1] == pieces[place][1]]
        data = torch.cat([raw.data.narrow(time, start, length) for start, length in same])
        lengths = torch.tensor([length for _, length in same])
        given, encoded, layers = encode(Raw(data, lengths, raw.ids * len(same), raw.rate))
        each = given.x.shape[1] // given.grid[0]  # tokens of a step
        for row, (start, _) in enumerate(same):
            begin = start // step
            size = int(given.lengths[row]) // each
            after = pieces[place + row + 1][0] // step if place + row + 1 < len(pieces) else None
            if after is not None and begin + size < after:
                raise ValueError(
                    f"{raw.ids[0]}: windows of {windows.length} that share {windows.overlap} leave out tokens between "
                    f"them, for one gives {size} tokens along time, {step} apart; make overlap longer or window shorter"
                )
            low = 0 if not place + row else (begin + end) // 2
            high = begin + size if after is None else (after + begin + size) // 2
            part = slice((low - begin) * each, (high - begin) * each)
            at = given.coords[row, part].cpu().clone()
            at[:, given.axes.index("t")] += begin
            coords.append(at)
            own = [x[row].float().cpu() for x in layers]
            front = torch.stack([x[: encoded.n_prefix] for x in own])
            prefix = front if prefix is None else prefix + front
            # a copy, so that the rest of the window is let go of
            kept.append([x[encoded.n_prefix :][part].clone() for x in own])
            end = begin + size
        place += len(same)

    assert prefix is not None
    joined = [torch.cat([front / len(pieces), *parts])[None] for front, *parts in zip(prefix, *kept, strict=True)]
    n_prefix = prefix.shape[1]
    lengths = torch.tensor([joined[0].shape[1] - n_prefix])
    tokens = replace(
        given,
        x=joined[0][:, n_prefix:],
        lengths=lengths,
        coords=torch.cat(coords)[None],
        grid=(int(lengths[0]) // each, *given.grid[1:]),
        feat=None,
        pre_norm=None,
    )
    return tokens, Encoded(joined[0], lengths + n_prefix, {}, n_prefix), joined


def by_steps(x: Tensor, lengths: Tensor, times: Tensor, per_step: int) -> tuple[Tensor, Tensor, Tensor]:
    """One token for each step of time: the mean over the bands or patches of that step.

    Args:
        x: (B, N, D), time outermost.
        lengths: (B,).
        times: (B, N) of each token.
        per_step: tokens of a step.

    Returns:
        (B, N / per_step, D), its lengths and its times.
    """
    return x.unflatten(1, (-1, per_step)).mean(2), lengths // per_step, times[:, ::per_step]
