"""Clips through a function, in groups that were read ahead, and what comes out put together clip by clip."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from mmssl.clips import Clips, Item, groups, windows
from mmssl.data.batching import collate_samples
from mmssl.progress import bar
from mmssl.types import BadClip, Batch, Embeddings, valid_mask

log = logging.getLogger(__name__)


def over_clips(
    clips: Clips,
    compute: Callable[[Batch, list[int]], None],
    batch_size: int,
    batch_seconds: float,
    on_bad_clip: str,
    progress: bool,
    *,
    all_may_be_bad: bool = False,
) -> tuple[list[str], dict[str, str]]:
    """Call `compute` on groups of clips that were read ahead; ids in order, and the reasons of bad clips."""
    names, bad, left_out = [""] * len(clips), {}, 0
    for window in over_windows(clips, compute, batch_size, batch_seconds, on_bad_clip, progress):
        for item in window:
            names[item.place] = item.name
            if item.error is not None:
                bad[item.name] = item.error.reason
                left_out += 1
    if left_out == len(clips) and not all_may_be_bad:
        first = next(iter(bad))
        raise ValueError(f"none of the {len(clips)} clips can be read; the first is {first} ({bad[first]})")
    return names, bad


@torch.no_grad()  # not inference mode: what is returned may be trained on
def over_windows(
    clips: Clips,
    compute: Callable[[Batch, list[int]], None],
    batch_size: int,
    batch_seconds: float,
    on_bad_clip: str,
    progress: bool,
    places: range | None = None,
    begin: Callable[[list[Item]], None] = lambda window: None,
) -> Iterator[list[Item]]:
    """Read clips ahead, and yield each window of them once `compute` was called on all of its groups.

    Args:
        places: of the clips; all by default.
        begin: called with each window before it is computed.
    """
    check_grouping(batch_size, batch_seconds, on_bad_clip)
    count = len(clips) if places is None else len(places)
    tokenizer = clips.frontend.reader_settings.get("tokenizer")
    before = 0 if tokenizer is None else tokenizer.cut
    with closing(windows(clips, batch_size, places)) as ahead, bar("embedding", count, shown=progress) as advance:
        for window in ahead:
            begin(window)
            good = []
            for item in window:
                if item.error is None:
                    good.append(item)
                elif on_bad_clip == "raise":
                    line = clips.line(item.place)
                    raise BadClip(
                        item.error.path,
                        f"{item.error.reason}{f' (at {line})' if line else ''}; on_bad_clip=skip (--on-bad-clip "
                        "skip) goes on without such clips",
                    )
            for group in groups(good, batch_size, batch_seconds):
                samples = [item.sample for item in group if item.sample is not None]
                compute(collate_samples(samples), [item.place for item in group])
                advance(len(group))
            advance(len(window) - len(good))
            yield window
    if tokenizer is not None and tokenizer.cut > before:
        log.warning(
            "%d of %d captions are longer than the context of %d tokens, and were cut",
            tokenizer.cut - before,
            count,
            tokenizer.context,
        )


def check_grouping(batch_size: int, batch_seconds: float, on_bad_clip: str) -> None:
    """
    Raises:
        ValueError: clips cannot be grouped so.
    """
    if batch_size < 1 or batch_seconds <= 0:
        raise ValueError(f"batch_size={batch_size}, batch_seconds={batch_seconds}: both must be above 0")
    if on_bad_clip not in ("raise", "skip"):
        raise ValueError(f"on_bad_clip={on_bad_clip!r}: choose raise or skip")


def overflowed(names: Sequence[str], bad: Mapping[str, str], gathered: Sequence[Gathered]) -> list[str]:
    """The clips that were read and whose vectors are no numbers, as those of enormous samples are."""
    scenes = [into.scene for into in gathered if into.scene is not None]
    if not scenes:
        return []
    finite = torch.stack([scene.isfinite().all(1) for scene in scenes]).all(0)
    return [name for name, fine in zip(names, finite.tolist(), strict=True) if not fine and name not in bad]


class Gathered:
    """The embeddings of one layer, put together clip by clip."""

    def __init__(self, count: int, *, keep: bool) -> None:
        self.count = count
        self.keep = keep
        self.scene: Tensor | None = None
        self.tokens: dict[int, Tensor] = {}
        self.times: dict[int, Tensor] = {}

    def add(self, places: list[int], scene: Tensor, x: Tensor, lengths: Tensor, times: Tensor | None) -> None:
        """Scenes (B, E), tokens (B, N, D) and their times (B, N) of the clips at `places`."""
        if self.scene is None:
            self.scene = torch.full((self.count, scene.shape[1]), torch.nan)
        self.scene[places] = scene.float().cpu()
        if not self.keep:
            return
        x, times = x.float().cpu(), None if times is None else times.cpu()
        for row, (place, length) in enumerate(zip(places, lengths.tolist(), strict=True)):
            # a copy, so that no padding is kept
            self.tokens[place] = x[row, :length].clone()
            if times is not None:
                self.times[place] = times[row, :length].clone()

    def result(self, names: list[str], bad: dict[str, str]) -> Embeddings:
        """All of them, padded to the longest; it lets go of what it held."""
        if self.scene is None:
            self.scene = torch.zeros(self.count, 0)
        longest = max((len(x) for x in self.tokens.values()), default=0)
        width = next((x.shape[1] for x in self.tokens.values()), 0)
        tokens = torch.zeros(self.count if longest else len(names), longest, width)
        lengths = torch.zeros(self.count, dtype=torch.int64)
        times = torch.zeros(self.count, longest) if self.times else None
        for place in list(self.tokens):
            x = self.tokens.pop(place)
            tokens[place, : len(x)], lengths[place] = x, len(x)
            if times is not None:
                times[place, : len(x)] = self.times.pop(place)
        return Embeddings(self.scene, tokens, valid_mask(lengths, longest), times, names, bad)
