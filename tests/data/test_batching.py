"""Plans keep to their bounds and lose nothing; loaders resume, share out and repeat exactly."""

import gc
import itertools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.data.batching import BatchPlan, Loader, collate_samples, one_pass
from mmssl.data.dataset import ManifestDataset, Sample
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.types import BadClip, Batch

LENGTHS = np.random.default_rng(0).uniform(0.5, 10.0, 500).astype(np.float32)


BOUNDS: list[dict[str, Any]] = [{"batch_size": 16}, {"max_length": 40.0}, {"batch_size": 6, "max_length": 40.0}]
PLANS = [
    BatchPlan(LENGTHS, bucket=bucket, shuffle=shuffle, **bound)
    for bound, bucket, shuffle in itertools.product(BOUNDS, (True, False), (True, False))
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.batch_size}-{p.max_length}-{p.bucket}-{p.shuffle}")
def test_a_plan_keeps_its_bounds_and_every_clip_once(plan: BatchPlan) -> None:
    for epoch in (0, 3):
        batches = plan.batches(epoch)
        assert sorted(np.concatenate(batches).tolist()) == list(range(500))
        assert len(batches) == plan.count(epoch)
        for place, batch in enumerate(batches):
            assert np.array_equal(batch, plan.batch(epoch, place))
            assert 0 < len(batch) <= (plan.batch_size or 500)
            assert len(batch) * LENGTHS[batch].max() <= (plan.max_length or np.inf)


@pytest.mark.parametrize(
    "plan",
    [plan for plan in PLANS if not (plan.bucket and plan.shuffle)],
    ids=lambda p: f"{p.batch_size}-{p.max_length}-{p.bucket}-{p.shuffle}",
)
def test_a_plan_takes_as_many_clips_as_fit(plan: BatchPlan) -> None:
    order, starts = plan._plan(0)
    for start, end in itertools.pairwise([*starts.tolist(), len(order)]):
        if end < len(order):
            more = order[start : end + 1]
            full = plan.batch_size is not None and len(more) > plan.batch_size
            assert full or len(more) * LENGTHS[more].max() > (plan.max_length or np.inf)


def test_batches_of_hundreds_are_cut_right() -> None:
    lengths = np.full(1000, 0.5)
    assert [len(batch) for batch in BatchPlan(lengths, max_length=150).batches(0)].count(300) == 3
    sizes = sorted(len(batch) for batch in BatchPlan(lengths, max_length=150, batch_size=256).batches(0))
    assert sizes == [232, 256, 256, 256]


def test_an_epoch_is_the_same_every_time_and_another_epoch_is_not() -> None:
    def flat(epoch: int, **settings: Any) -> list[int]:
        return np.concatenate(BatchPlan(LENGTHS, max_length=40, **settings).batches(epoch)).tolist()

    assert flat(3) == flat(3)
    assert flat(3) != flat(4)
    assert flat(3) != flat(3, seed=1)
    assert flat(3, shuffle=False) == flat(4, shuffle=False, seed=1)
    plan = BatchPlan(LENGTHS, max_length=40)
    plan.batches(4)
    assert np.concatenate(plan.batches(3)).tolist() == flat(3)


def test_neighbors_change_from_epoch_to_epoch() -> None:
    plan = BatchPlan(LENGTHS, batch_size=10)
    first, second = ({frozenset(batch.tolist()) for batch in plan.batches(epoch)} for epoch in (0, 1))
    assert len(first & second) <= 5  # of 50: at the ends, where neighbors are further apart than the jitter reaches


def test_bucketing_saves_padding() -> None:
    shuffled = BatchPlan(LENGTHS, batch_size=16, bucket=False).padding()
    bucketed = BatchPlan(LENGTHS, batch_size=16).padding()
    sorted_ = BatchPlan(LENGTHS, batch_size=16, shuffle=False).padding()
    assert shuffled > 0.4
    assert bucketed < 0.1
    assert sorted_ < 0.04
    assert BatchPlan(np.array([1.0, 3.0]), batch_size=2).padding() == pytest.approx(1 / 3)


def test_without_shuffling_and_buckets_clips_stay_in_order() -> None:
    batches = BatchPlan(LENGTHS, batch_size=200, bucket=False, shuffle=False).batches(5)
    assert [batch.tolist() for batch in batches] == [list(range(0, 200)), list(range(200, 400)), list(range(400, 500))]


def test_pictures_are_shuffled_although_all_lengths_are_equal() -> None:
    order = np.concatenate(BatchPlan(np.ones(1000), batch_size=1000).batches(0))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15


def test_clips_beyond_the_bound_are_refused_or_alone() -> None:
    lengths = np.array([1.0, 9.0, 2.0, 7.5])
    with pytest.raises(ValueError, match=r"2 of 4 clips are longer .* \(5\), the longest has 9; raise that bound"):
        BatchPlan(lengths, max_length=5)
    batches = BatchPlan(lengths, max_length=5, longer="alone", shuffle=False).batches(0)
    assert [batch.tolist() for batch in batches] == [[0, 2], [3], [1]]


def test_plans_without_sense_are_refused() -> None:
    for lengths, settings in (
        (LENGTHS, {}),
        (LENGTHS, {"batch_size": 0}),
        (np.array([]), {"batch_size": 1}),
        (np.array([1.0, 0.0]), {"batch_size": 1}),
        (np.array([1.0, np.nan]), {"batch_size": 1}),
    ):
        with pytest.raises(ValueError, match="batch"):
            BatchPlan(lengths, **settings)


# loading


def read(source: Any) -> Tensor:
    number = int(Path(source).stem)
    if number >= 100:
        raise BadClip(source, "unreadable")
    return torch.full((number % 7 + 1,), float(number))


def jitter(clip: Tensor, rng: np.random.Generator) -> Tensor:
    return clip + float(rng.random())


def number(row: dict[str, Any]) -> int:
    return row["label"]


def make(folder: Path, numbers: list[int], **settings: Any) -> tuple[ManifestDataset, BatchPlan]:
    rows = [{"audio": str(folder / f"{n}.txt"), "seconds": (n % 7 + 1) / 10, "label": n} for n in numbers]
    write_manifest(folder / "a.jsonl", rows)
    manifest = Manifest(folder / "a.jsonl")
    dataset = ManifestDataset(
        manifest,
        media={"sound": "audio"},
        readers={"sound": read},
        augments={"sound": jitter},
        rates={"sound": 10.0},
        label=number,
        **settings,
    )
    return dataset, BatchPlan(manifest.lengths(), max_length=1.5)


def take(loader: Loader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def same(a: Batch, b: Batch) -> bool:
    return (
        a.ids == b.ids
        and torch.equal(a.raw.data, b.raw.data)
        and torch.equal(a.seeds, b.seeds)
        and a.labels is not None
        and b.labels is not None
        and torch.equal(a.labels, b.labels)
    )


def test_a_loader_goes_through_epochs_and_counts_what_it_handed_out(tmp_path: Path) -> None:
    dataset, plan = make(tmp_path, list(range(30)))
    counts = [plan.count(epoch) for epoch in range(3)]
    loader = Loader(dataset, plan)
    batches = take(loader, sum(counts))
    assert loader.consumed == sum(counts)
    assert loader.epoch == 3.0
    for epoch, end in enumerate(np.cumsum(counts)):
        ids = [id for batch in batches[end - counts[epoch] : end] for id in batch.ids]
        assert sorted(ids) == sorted(f"{n}.txt" for n in range(30))
    for batch, wanted in zip(batches, plan.batches(0), strict=False):
        assert batch.ids == [f"{n}.txt" for n in wanted]


@pytest.mark.parametrize("consumed", [1, 5, 17])
def test_a_loader_resumes_anywhere_from_one_number(tmp_path: Path, consumed: int) -> None:
    unbroken = take(Loader(*make(tmp_path, list(range(30)))), 20)
    dataset, plan = make(tmp_path, list(range(30)))
    resumed = take(Loader(dataset, plan, consumed=consumed), 20 - consumed)
    assert all(map(same, unbroken[consumed:], resumed))


@pytest.mark.parametrize("world", [1, 3])
def test_going_on_in_a_late_epoch_plans_no_epoch_before_it(
    tmp_path: Path, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, plan = make(tmp_path, list(range(30)))
    unbroken = Loader(dataset, plan)
    batches = take(unbroken, plan.count(0) + plan.count(1) + 5)
    assert unbroken.epoch_start == (2, plan.count(0) + plan.count(1))
    more = take(Loader(dataset, plan, consumed=unbroken.consumed), 12)
    planned = []
    count = plan.count
    monkeypatch.setattr(plan, "count", lambda epoch: planned.append(epoch) or count(epoch))
    loaders = [
        Loader(dataset, plan, rank=rank, world=world, consumed=len(batches), epoch_start=unbroken.epoch_start)
        for rank in range(world)
    ]
    parts = [take(loader, 12 // world) for loader in loaders]
    assert all(map(same, more, [batch for step in zip(*parts, strict=True) for batch in step]))
    assert min(planned) == 2


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_out_what_one_process_takes(tmp_path: Path, world: int) -> None:
    dataset, plan = make(tmp_path, list(range(30)))
    alone = take(Loader(dataset, plan, consumed=4), 12)
    loaders = [Loader(dataset, plan, rank=rank, world=world, consumed=4) for rank in range(world)]
    parts = [take(loader, 12 // world) for loader in loaders]
    together = [batch for step in zip(*parts, strict=True) for batch in step]
    assert all(map(same, alone, together))
    assert {loader.consumed for loader in loaders} == {16}


@pytest.mark.processes
def test_workers_change_nothing(tmp_path: Path) -> None:
    dataset, plan = make(tmp_path, [*range(30), 105], on_bad_clip="skip", max_bad_share=0.1)
    loaders = [
        Loader(dataset, plan, workers=workers, consumed=3, bad_clips=tmp_path / f"{workers}") for workers in (0, 2)
    ]
    one, other = (take(loader, 14) for loader in loaders)
    assert all(map(same, one, other))
    assert (tmp_path / "0").read_text() == (tmp_path / "2").read_text() != ""
    passes = [list(one_pass(dataset, plan, workers=workers)) for workers in (0, 2)]
    assert all(map(same, *passes))


@pytest.mark.processes
def test_a_bad_clip_keeps_its_sentence_on_the_way_from_a_worker(tmp_path: Path) -> None:
    dataset, plan = make(tmp_path, [1, 2, 103])
    with pytest.raises(BadClip, match="103.txt: unreadable") as caught:
        take(Loader(dataset, plan, workers=1), 5)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.processes)])
def test_loading_leaves_the_global_random_state_alone(tmp_path: Path, workers: int) -> None:
    dataset, plan = make(tmp_path, list(range(10)))
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    take(Loader(dataset, plan, workers=workers), 3)
    list(one_pass(dataset, plan, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before


def test_the_next_batches_are_read_while_one_is_used(tmp_path: Path) -> None:
    dataset, plan = make(tmp_path, list(range(30)))
    seen = []
    dataset.label = lambda row: seen.append(row["id"]) or 0
    batches = iter(Loader(dataset, plan))
    first = next(batches)
    deadline = time.monotonic() + 5
    while len(seen) <= len(first) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(seen) > len(first)
    time.sleep(0.02)
    assert len(seen) < 30  # and no further than that


def test_an_abandoned_loader_leaves_no_thread_behind(tmp_path: Path) -> None:
    batches = iter(Loader(*make(tmp_path, list(range(30)))))
    next(batches)
    assert any(thread.name == "mmssl-loader" for thread in threading.enumerate())
    batches.close()  # what dropping it does
    gc.collect()
    assert not any(thread.name == "mmssl-loader" for thread in threading.enumerate())


def test_errors_of_the_reading_thread_reach_the_caller(tmp_path: Path) -> None:
    dataset, plan = make(tmp_path, list(range(10)))

    def broken(samples: list[Sample]) -> Batch:
        raise ZeroDivisionError("in collate")

    with pytest.raises(ZeroDivisionError, match="in collate"):
        take(Loader(dataset, plan, broken), 1)
    with pytest.raises(ZeroDivisionError, match="in collate"):
        list(one_pass(dataset, plan, broken))


def test_skipped_clips_are_replaced_in_training_and_too_many_end_it(tmp_path: Path) -> None:
    dataset, plan = make(tmp_path, [*range(30), 105], on_bad_clip="skip", max_bad_share=0.05)
    loader = Loader(dataset, plan)
    batches = take(loader, plan.count(0))
    assert sum(len(batch) for batch in batches) == 31
    assert "105.txt" not in {id for batch in batches for id in batch.ids}
    assert len(loader.bad) == 1
    dataset, plan = make(tmp_path, [*range(30), 105, 106], on_bad_clip="skip", max_bad_share=0.05)
    with pytest.raises(ValueError, match="2 of 32 clips cannot be read"):
        take(Loader(dataset, plan), plan.count(0))


def test_what_stands_in_for_a_bad_clip_keeps_the_bound_of_its_batch(tmp_path: Path) -> None:
    # 42 of 0.1 s, as short as bad clip 105 is said to be, in batches of 14; the others are longer
    numbers = [*range(0, 98, 7)] * 3 + [n for n in range(98) if n % 7]
    dataset, plan = make(tmp_path, [*numbers, 105], on_bad_clip="skip", max_bad_share=0.1)
    found = set()
    for epoch in range(30):
        [(place, clips)] = [(i, batch) for i, batch in enumerate(plan.batches(epoch)) if len(numbers) in batch]
        before = sum(plan.count(past) for past in range(epoch))
        [batch] = take(Loader(dataset, plan, consumed=before + place, epoch_start=(epoch, before)), 1)
        assert len(batch) == len(clips) > 2
        assert len(batch) * batch.raw.data.shape[1] <= 15
        found |= {name for name, row in zip(batch.ids, clips, strict=True) if row == len(numbers)}
    assert len(found) > 3  # not one clip for all of them


def test_who_may_stand_in_is_as_short_as_the_batch_has_room_for_and_not_in_it() -> None:
    lengths = np.repeat(np.array([1.0, 2.0, 4.0], np.float32), 30)
    plan = BatchPlan(lengths, max_length=4.0)
    assert plan.stand_ins(np.array([0, 1])).tolist() == [*range(2, 60)]
    assert plan.stand_ins(np.array([60])).tolist() == [*range(60), *range(61, 90)]
    assert plan.stand_ins(np.arange(4)).tolist() == [*range(4, 30)]
    assert BatchPlan(lengths, batch_size=2).stand_ins(np.array([0, 1])).tolist() == [*range(2, 90)]
    # where there are few others, those that it has may do as well
    few = BatchPlan(lengths[::6], max_length=4.0)
    assert few.stand_ins(np.arange(4)).tolist() == [*range(5)]


def test_one_pass_gives_every_clip_once_and_leaves_out_bad_ones(tmp_path: Path) -> None:
    dataset, plan = make(tmp_path, [*range(30), 105], on_bad_clip="skip", max_bad_share=0.05)
    ordered = BatchPlan(dataset.manifest.lengths(), max_length=1.5, shuffle=False)
    batches = list(one_pass(dataset, ordered, bad_clips=tmp_path / "bad.jsonl"))
    assert sorted(id for batch in batches for id in batch.ids) == sorted(f"{n}.txt" for n in range(30))
    lengths = torch.cat([batch.raw.lengths for batch in batches]).tolist()
    assert lengths == sorted(lengths)
    assert '"105.txt"' in (tmp_path / "bad.jsonl").read_text()
    parts = [list(one_pass(dataset, plan, rank=rank, world=2)) for rank in range(2)]
    assert sorted(id for part in parts for batch in part for id in batch.ids) == sorted(f"{n}.txt" for n in range(30))
    assert list(one_pass(*make(tmp_path, [105], on_bad_clip="skip", max_bad_share=1.0))) == []
    dataset, plan = make(tmp_path, [1, 105])
    with pytest.raises(BadClip):
        list(one_pass(dataset, plan))


def test_loaders_without_sense_are_refused(tmp_path: Path) -> None:
    dataset, plan = make(tmp_path, list(range(10)))
    with pytest.raises(ValueError, match="the batch plan is for 500 clips, the manifest has 10"):
        Loader(dataset, BatchPlan(LENGTHS, batch_size=2))
    with pytest.raises(ValueError, match=r"rank must be from 0 to 1 \(of 2 processes\), got 2"):
        Loader(dataset, plan, rank=2, world=2)


# collating


def sample(id: str, clip: Tensor, label: Any = None, seed: int = 0) -> Sample:
    return Sample(id, {"x": clip}, {"x": 10.0 if clip.ndim == 1 else None}, label, seed)


def test_waves_are_padded_with_zeros() -> None:
    big = (1 << 63) - 1
    batch = collate_samples([sample("a", torch.ones(2), seed=big), sample("b", torch.full((3,), 2.0))])
    assert batch.raw.data.tolist() == [[1, 1, 0], [2, 2, 2]]
    assert batch.raw.lengths.tolist() == [2, 3]
    assert batch.raw.rate == 10.0
    assert batch.ids == ["a", "b"]
    assert batch.seeds.tolist() == [big, 0]
    assert batch.labels is None
    assert batch.label_lengths is None


def test_pictures_are_stacked_and_must_be_of_one_size() -> None:
    batch = collate_samples([sample("a", torch.zeros(3, 4, 5)), sample("b", torch.ones(3, 4, 5))])
    assert batch.raw.data.shape == (2, 3, 4, 5)
    assert batch.raw.lengths.tolist() == [1, 1]
    assert batch.raw.rate is None
    with pytest.raises(ValueError, match=r"x: a is 3 x 4 x 5 and b is 3 x 5 x 4, but .* in `augment`, .* resize"):
        collate_samples([sample("a", torch.zeros(3, 4, 5)), sample("b", torch.ones(3, 5, 4))])


def test_labels_are_classes_or_padded_characters() -> None:
    clip = torch.ones(1)
    classes = collate_samples([sample("a", clip, 3), sample("b", clip, 1)])
    assert classes.labels is not None
    assert classes.labels.tolist() == [3, 1]
    assert classes.label_lengths is None
    texts = collate_samples([sample("a", clip, [5, 6]), sample("b", clip, []), sample("c", clip, [7])])
    assert texts.labels is not None
    assert texts.label_lengths is not None
    assert texts.labels.tolist() == [[5, 6], [0, 0], [7, 0]]
    assert texts.label_lengths.tolist() == [2, 0, 1]
    assert texts.labels.dtype == texts.label_lengths.dtype == torch.int64
    for odd in (None, 3):
        with pytest.raises(ValueError, match=f"labels: a has .5. and b has {odd}; all must be alike"):
            collate_samples([sample("a", clip, [5]), sample("b", clip, odd)])
