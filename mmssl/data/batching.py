"""From clips to micro-batches: which clips go together, in which order, loaded ahead, resumable by one number."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmssl.data.dataset import ATTEMPTS, BadClips, ManifestDataset, Sample
from mmssl.types import BadClip, Batch, Raw, Units

AHEAD = 2  # micro-batches that the thread, or each worker, reads before they are asked for


class BatchPlan:
    """The micro-batches of each epoch: a function of (seed, epoch), whatever the number of ranks.

    Every clip is in exactly one micro-batch of an epoch, the last ones of which may be small; none is dropped.

    Args:
        lengths: (clips,) in seconds, tokens or any other unit.
        batch_size: most clips of a micro-batch.
        max_length: most length of a micro-batch with its padding: clips times the longest of them.
        bucket: put clips of similar length together.
        shuffle: another order every epoch; without, clips stay in order (with `bucket`: in order of length).
        jitter: with `bucket` and `shuffle`, lengths are compared after each is stretched by up to this share, at random
            and anew every epoch; so neighbors change and padding grows by about half of it.
        longer: what to do with clips longer than `max_length`: refuse, or give each a micro-batch of its own.

    Raises:
        ValueError: no bound at all, a length that is no number above 0, or clips longer than `max_length`.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_size: int | None = None,
        max_length: float | None = None,
        bucket: bool = True,
        seed: int = 0,
        shuffle: bool = True,
        jitter: float = 0.1,
        longer: Literal["refuse", "alone"] = "refuse",
    ) -> None:
        lengths = np.asarray(lengths)
        if batch_size is None and max_length is None:
            raise ValueError("batches need a bound: give batch_size, max_length or both")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not len(lengths) or not np.isfinite(lengths).all() or lengths.min() <= 0:
            raise ValueError("batches need the length of at least one clip, and each must be a number above 0")
        over = 0 if max_length is None else int((lengths > max_length).sum())
        if over and longer == "refuse":
            raise ValueError(
                f"{over} of {len(lengths)} clips are longer than a whole micro-batch may be ({max_length:g}), the "
                f"longest has {lengths.max():g}; raise that bound, crop clips in `augment`, or leave these out"
            )
        self.lengths = lengths
        self.batch_size = batch_size
        self.max_length = max_length
        self.bucket = bucket
        self.seed = seed
        self.shuffle = shuffle
        self.jitter = jitter
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def batches(self, epoch: int) -> list[np.ndarray]:
        """The clips of each micro-batch of an epoch."""
        order, starts = self._plan(epoch)
        return np.split(order, starts[1:])

    def count(self, epoch: int) -> int:
        """Micro-batches of an epoch; under `max_length` it differs a little from epoch to epoch."""
        if self.max_length is None and self.batch_size is not None:
            return -(-len(self.lengths) // self.batch_size)
        return len(self._plan(epoch)[1])

    def batch(self, epoch: int, place: int) -> np.ndarray:
        """The clips of one micro-batch."""
        order, starts = self._plan(epoch)
        return order[starts[place] : starts[place + 1] if place + 1 < len(starts) else len(order)]

    def stand_ins(self, clips: np.ndarray) -> np.ndarray:
        """The clips of which any may take the place of one of a micro-batch, which stays within `max_length`.

        Those that it has already are among them only where there are few others, which may be bad too: a clip that is
        there twice would be a negative of itself.
        """
        if self.max_length is None:
            fit = np.full(len(self.lengths), True)
        else:
            fit = self.lengths <= np.float64(self.max_length / len(clips))
        fit[clips] = False
        if fit.sum() < ATTEMPTS:
            fit[clips] = True
        return np.flatnonzero(fit)

    def padding(self, epoch: int = 0) -> float:
        """The share of an epoch's padded length that is padding."""
        padded = sum(len(batch) * float(self.lengths[batch].max()) for batch in self.batches(epoch))
        return 1.0 - float(self.lengths.sum(dtype=np.float64)) / padded

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Clips in order, and where each micro-batch starts."""
        kept = self._epoch  # read once: a loader's thread may be at another epoch
        if kept is not None and kept[0] == epoch:
            return kept[1:]
        generator = np.random.default_rng([self.seed, epoch])
        count = len(self.lengths)
        if self.bucket and self.shuffle:
            stretch = generator.uniform(1.0, 1.0 + self.jitter, count)
            # equal lengths (pictures, cropped clips) leave the order to the stretch, which is then a plain shuffle
            order = np.argsort(self.lengths * stretch)
        elif self.bucket:
            order = np.argsort(self.lengths, kind="stable")
        else:
            order = generator.permutation(count) if self.shuffle else np.arange(count)
        starts = self._cut(self.lengths[order])
        if self.bucket and self.shuffle:
            ends = np.append(starts[1:], count)
            mixed = generator.permutation(len(starts))
            order = np.concatenate([order[starts[i] : ends[i]] for i in mixed])
            starts = np.concatenate([[0], np.cumsum((ends - starts)[mixed])[:-1]])
        self._epoch = (epoch, order, starts)
        return order, starts

    def _cut(self, lengths: np.ndarray) -> np.ndarray:
        """Where micro-batches start when each takes as many of the next clips as the bounds allow."""
        count = len(lengths)
        if self.max_length is None:
            return np.arange(0, count, self.batch_size)
        starts = [0]
        window = 16
        while True:
            ahead = lengths[starts[-1] : starts[-1] + min(window, self.batch_size or window)]
            padded = np.maximum.accumulate(ahead) * np.arange(1, len(ahead) + 1)
            fit = int(np.searchsorted(padded, self.max_length, side="right"))
            if fit == len(ahead) == window and window != self.batch_size:
                window *= 2  # all that was looked at fits, and more may
                continue
            starts.append(starts[-1] + max(1, fit))
            if starts[-1] >= count:
                return np.array(starts[:-1])
            window = 2 * max(8, fit)


class Loader:
    """Micro-batches without end, epoch after epoch.

    Rank r of w takes the global micro-batches r, w + r, 2w + r, ... of the plan, so that the whole state of all ranks
    is one number: the global micro-batches consumed, with which another number of ranks may go on as well.

    The global random state of torch is neither read nor moved.

    Args:
        workers: processes that read, one thread each; 0 reads in one thread of this process, which is enough while
            decoding (which leaves Python's lock) is quicker than a training step.
        consumed: global micro-batches already consumed.
        epoch_start: an epoch, and the global micro-batches before it. Counting starts there: under `max_length` the
            size of an epoch is known only once it is planned, so going on in the hundredth would plan all before it.
            It moves along with `consumed`, and is one number for all ranks too.
        bad_clips: the file to name bad clips in.
        note: what is to be said of the clips before one is read.

    Raises (from iterating):
        BadClip, ValueError: as the dataset and `BadClips` say.
    """

    def __init__(
        self,
        dataset: ManifestDataset,
        plan: BatchPlan,
        collate: Callable[[list[Sample]], Batch] | None = None,
        *,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        consumed: int = 0,
        epoch_start: tuple[int, int] = (0, 0),
        bad_clips: str | Path | None = None,
        note: str = "",
    ) -> None:
        _check(dataset, plan, rank, world)
        self.note = note
        self.dataset = dataset
        self.plan = plan
        self.collate = collate or collate_samples
        self.workers = workers
        self.rank = rank
        self.world = world
        self.consumed = consumed
        self.epoch_start = epoch_start
        self.bad = BadClips(bad_clips, manifest=dataset.manifest, max_share=dataset.max_bad_share)
        self.epoch = 0.0

    def __iter__(self) -> Generator[Batch, None, None]:
        """Go on after what is consumed; a batch counts as consumed once it is handed out."""
        wanted = _endless(self.plan, self.consumed + self.rank, self.world, self.epoch_start)
        batches = _Batches(self.dataset, self.collate, self.plan)
        with closing(_fetch(batches, wanted, self.workers)) as fetched:
            for item in fetched:
                if isinstance(item, Exception):
                    raise item
                self.bad.add(item.bad)
                assert item.batch is not None
                self.consumed += self.world
                self.epoch, self.epoch_start = item.epoch, item.epoch_start
                yield item.batch

    @property
    def remark(self) -> str:
        """What is to be said of the clips, and of those that could not be read; empty where that is nothing."""
        return "; ".join(part for part in (self.note, self.bad.remark) if part)


def one_pass(
    dataset: ManifestDataset,
    plan: BatchPlan,
    collate: Callable[[list[Sample]], Batch] | None = None,
    *,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    epoch: int = 0,
    bad_clips: str | Path | None = None,
) -> Iterator[Batch]:
    """Every clip exactly once, for evaluation and embedding, in the plan's order; `Batch.ids` tells which is which.

    With on_bad_clip "skip" a bad clip is left out and named: another one in its place would count twice.

    Raises:
        BadClip, ValueError: as the dataset and `BadClips` say.
    """
    _check(dataset, plan, rank, world)
    report = BadClips(bad_clips, manifest=dataset.manifest, max_share=dataset.max_bad_share)
    wanted = (((epoch, 0), epoch, plan.batch(epoch, place)) for place in range(rank, plan.count(epoch), world))
    batches = _Batches(dataset, collate or collate_samples)
    with closing(_fetch(batches, wanted, workers)) as fetched:
        for item in fetched:
            if isinstance(item, Exception):
                raise item
            report.add(item.bad)
            if item.batch is not None:
                yield item.batch


def collate_samples(samples: list[Sample]) -> Batch:
    """One batch: what has a length padded with zeros to the longest, pictures stacked, labels padded with 0.

    Of a modality that some samples lack, the batch has the others' and says which they are.

    Raises:
        ValueError: pictures or frames of several sizes, or labels of some clips only.
    """
    inputs, rows = {}, {}
    for name in dict.fromkeys(name for sample in samples for name in sample.inputs):
        having = [row for row, sample in enumerate(samples) if name in sample.inputs]
        if len(having) < len(samples):
            rows[name] = torch.tensor(having)
        ids = [samples[row].id for row in having]
        clips = [samples[row].inputs[name] for row in having]
        if clips[0].ndim == 4:
            data, lengths = _pad_video(name, ids, clips)
        else:
            data, lengths = _stack_pictures(name, ids, clips) if clips[0].ndim == 3 else _pad_steps(clips)
        inputs[name] = Raw(data, lengths, ids, samples[0].rates[name], starts=_starts(name, samples, having))
    labels, label_lengths = _labels(samples)
    seeds = torch.tensor([sample.seed for sample in samples], dtype=torch.int64)
    units = {key: _pad_units(key, samples) for key in samples[0].units}
    return Batch(inputs, seeds, labels, label_lengths, units, rows)


def _starts(name: str, samples: list[Sample], having: list[int]) -> Tensor | None:
    """Where what was read of each clip begins, see `Raw.starts`."""
    if not any(name in samples[row].starts for row in having):
        return None
    return torch.tensor([samples[row].starts.get(name, 0.0) for row in having], dtype=torch.float64)


def _pad_units(key: str, samples: list[Sample]) -> Units:
    found = [sample.units[key] for sample in samples]
    for sample, units in zip(samples, found, strict=True):
        if units.rate != found[0].rate:
            raise ValueError(
                f"{key}: {samples[0].id} has {_per_second(found[0].rate)} and {sample.id} has "
                f"{_per_second(units.rate)}; write the units of all clips in the same way"
            )
    return Units(
        torch.nn.utils.rnn.pad_sequence([units.values[0] for units in found], batch_first=True),
        torch.cat([units.lengths for units in found]),
        found[0].rate,
        torch.cat([units.starts for units in found]),
    )


def _per_second(rate: float | None) -> str:
    return "a unit for each token" if rate is None else f"{rate:g} units a second"


def _pad_steps(clips: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(L,) waveforms, or (G, T) codes."""
    lengths = torch.tensor([clip.shape[-1] for clip in clips], dtype=torch.int64)
    data = clips[0].new_zeros(len(clips), *clips[0].shape[:-1], int(lengths.max()))
    for row, clip in zip(data, clips, strict=True):
        row[..., : clip.shape[-1]] = clip
    return data, lengths


def _stack_pictures(name: str, ids: list[str], clips: list[Tensor]) -> tuple[Tensor, Tensor]:
    for id, clip in zip(ids, clips, strict=True):
        if clip.shape != clips[0].shape:
            first, other = (" x ".join(map(str, shape)) for shape in (clips[0].shape, clip.shape))
            raise ValueError(
                f"{name}: {ids[0]} is {first} and {id} is {other}, but a batch holds pictures of one size; bring them "
                "to one in `augment`, for example with resize and center_crop"
            )
    return torch.stack(clips), torch.ones(len(clips), dtype=torch.int64)


def _pad_video(name: str, ids: list[str], clips: list[Tensor]) -> tuple[Tensor, Tensor]:
    # a first frame of each, which must be alike as pictures must
    first, _ = _stack_pictures(name, ids, [clip[:, 0] for clip in clips])
    lengths = torch.tensor([clip.shape[1] for clip in clips], dtype=torch.int64)
    data = first.new_zeros(len(clips), first.shape[1], int(lengths.max()), *first.shape[2:])
    for row, clip in zip(data, clips, strict=True):
        row[:, : clip.shape[1]] = clip
    return data, lengths


def _labels(samples: list[Sample]) -> tuple[Tensor | None, Tensor | None]:
    labels = [sample.label for sample in samples]
    if all(label is None for label in labels):
        return None, None
    if all(isinstance(label, int) for label in labels):
        return torch.tensor(labels, dtype=torch.int64), None
    rows = [torch.tensor(label, dtype=torch.int64) for label in labels if isinstance(label, list)]
    if len(rows) < len(labels):
        odd = next(sample for sample in samples if type(sample.label) is not type(labels[0]))
        raise ValueError(f"labels: {samples[0].id} has {labels[0]!r} and {odd.id} has {odd.label!r}; all must be alike")
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


# (epoch, micro-batches before it), epochs done with this micro-batch, clips
_Wanted = tuple[tuple[int, int], float, np.ndarray]


@dataclass(frozen=True)
class _Fetched:
    """A micro-batch (None: every clip of it was bad), and what was met on the way."""

    batch: Batch | None
    epoch: float
    epoch_start: tuple[int, int]
    bad: list[dict[str, Any]]


class _Batches(Dataset["_Fetched | ValueError"]):
    """Micro-batches by what is wanted of them.

    Errors that have a sentence for the user are handed back as values: a worker's exceptions come back from torch as
    a page of traceback, and those with arguments of their own as something else altogether.

    Args:
        plan: says which clips may take the place of a bad one; None to leave bad clips out.
    """

    def __init__(
        self, dataset: ManifestDataset, collate: Callable[[list[Sample]], Batch], plan: BatchPlan | None = None
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.plan = plan

    def __getitem__(self, wanted: _Wanted) -> _Fetched | ValueError:
        start, done, clips = wanted
        epoch = start[0]
        samples: list[Sample] = []
        bad: list[dict[str, Any]] = []
        try:
            for index in clips.tolist():
                if self.plan is not None:
                    samples.append(self.dataset[index, epoch, partial(self.plan.stand_ins, clips)])
                    bad += samples[-1].bad
                    continue
                try:
                    samples.append(self.dataset.read(index, epoch))
                except BadClip as error:
                    if self.dataset.on_bad_clip == "raise":
                        raise self.dataset.refusal(index, error) from None
                    bad.append(self.dataset.describe(index, epoch, error))
            return _Fetched(self.collate(samples) if samples else None, done, start, bad)
        except ValueError as error:
            return error


def _endless(plan: BatchPlan, first: int, step: int, start: tuple[int, int]) -> Iterator[_Wanted]:
    """The plan's micro-batches first, first + step, first + 2 step, ..., counted through all epochs from `start` on."""
    epoch, before = start if start[1] <= first else (0, 0)
    place = first - before
    while True:
        while place >= (count := plan.count(epoch)):
            place -= count
            before += count
            epoch += 1
        yield (epoch, before), epoch + (place + 1) / count, plan.batch(epoch, place)
        place += step


_Item = _Fetched | Exception


def _fetch(batches: _Batches, wanted: Iterable[_Wanted], workers: int) -> Generator[_Item, None, None]:
    return _fetch_in_processes(batches, wanted, workers) if workers else _fetch_in_thread(batches, wanted)


def _fetch_in_processes(batches: _Batches, wanted: Iterable[_Wanted], workers: int) -> Generator[_Item, None, None]:
    loader: DataLoader[_Item] = DataLoader(
        batches,
        batch_size=None,
        sampler=wanted,
        collate_fn=_same,
        num_workers=workers,
        prefetch_factor=AHEAD,
        # a loader without one draws from the global random state, and a resumed run would differ from the unbroken one
        generator=torch.Generator().manual_seed(0),
    )
    yield from loader


def _same(item: Any) -> Any:
    return item


def _fetch_in_thread(batches: _Batches, wanted: Iterable[_Wanted]) -> Generator[_Item, None, None]:
    ready: queue.Queue[_Item | None] = queue.Queue(maxsize=AHEAD)
    stopped = threading.Event()

    def put(item: _Item | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in wanted:
                if stopped.is_set() or not put(batches[item]):
                    return
            put(None)
        except Exception as error:  # whatever it is, it belongs to whoever waits for the batch
            put(error)

    thread = threading.Thread(target=work, name="mmssl-loader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            yield item
    finally:
        stopped.set()
        thread.join()


def _check(dataset: ManifestDataset, plan: BatchPlan, rank: int, world: int) -> None:
    if len(plan.lengths) != len(dataset):
        raise ValueError(f"the batch plan is for {len(plan.lengths)} clips, the manifest has {len(dataset)}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be from 0 to {world - 1} (of {world} processes), got {rank}")
