"""Several modalities that take turns: which one an update is of, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing

import numpy as np

from mmssl.data.batching import Loader
from mmssl.types import Batch

_DRAWN = 4096  # updates whose modalities are drawn at once


class Turns:
    """Micro-batches of several loaders without end, all those of an update from the same one.

    Which one is drawn anew for each update, from its number and the seed alone: every rank draws the same, a run that
    is resumed goes on with what it would have had, and another number of ranks changes nothing as long as an update
    has as many micro-batches. The micro-batches of a modality follow each other as they would by themselves.

    Args:
        loaders: modality -> its micro-batches, of the same rank.
        weights: modality -> how often it is drawn, relative to the others.
        accumulate: micro-batches of an update on each rank.
        seed: of the run.
    """

    # each loader counts its epochs from the first: under `max_length` resuming plans all that were, one after the other
    epoch_start = (0, 0)

    def __init__(
        self, loaders: Mapping[str, Loader], weights: Mapping[str, float], *, accumulate: int = 1, seed: int = 0
    ) -> None:
        self.loaders = dict(loaders)
        self.names = list(loaders)
        self.edges = np.cumsum([weights[name] for name in self.names])
        self.accumulate = accumulate
        self.seed = seed
        self.world = next(iter(self.loaders.values())).world
        self.consumed = 0
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def modality(self, update: int) -> str:
        """Which one the update of this number, counted from 0, is of."""
        return self.names[self._drawn(update // _DRAWN)[update % _DRAWN]]

    def before(self, update: int) -> dict[str, int]:
        """How many updates before this one are of each modality."""
        blocks = [self._drawn(block) for block in range(update // _DRAWN)]
        drawn = np.concatenate([*blocks, self._drawn(update // _DRAWN)[: update % _DRAWN]])
        return dict(zip(self.names, np.bincount(drawn, minlength=len(self.names)).tolist(), strict=True))

    def __iter__(self) -> Iterator[Batch]:
        """Go on after what is consumed; a micro-batch counts as consumed once it is handed out."""
        size = self.accumulate * self.world
        update = self.consumed // size
        with ExitStack() as stack:
            batches = {}
            for name, count in self.before(update).items():
                self.loaders[name].consumed, self.loaders[name].epoch_start = count * size, (0, 0)
                batches[name] = stack.enter_context(closing(iter(self.loaders[name])))
            while True:
                for _ in range(self.accumulate):
                    batch = next(batches[self.modality(update)])
                    self.consumed += self.world
                    yield batch
                update += 1

    @property
    def remark(self) -> str:
        """What is to be said of the clips of all loaders; empty where that is nothing."""
        return "; ".join(loader.remark for loader in self.loaders.values() if loader.remark)

    def _drawn(self, block: int) -> np.ndarray:
        """The modalities of updates block * _DRAWN on, as places among the names."""
        if self._block[0] != block:
            found = np.random.default_rng([self.seed, block]).uniform(0.0, self.edges[-1], _DRAWN)
            self._block = block, np.minimum(np.searchsorted(self.edges, found, side="right"), len(self.names) - 1)
        return self._block[1]
