"""Modalities that take turns: the same on every rank, at the rates asked for, and from any update on."""

import itertools

import numpy as np
import pytest
import torch

from mmssl.data import turns as room
from mmssl.data.batching import BatchPlan, Loader
from mmssl.data.dataset import ManifestDataset
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.data.turns import Turns

CLIPS = {"image": 7, "audio": 5, "video": 11}
WEIGHTS = {"image": 2.0, "audio": 1.0, "video": 1.0}


@pytest.fixture
def make(tmp_path):
    """(rank, world, accumulate) -> turns over clips that are a number each."""

    def read(path, **_):
        return torch.full((1, 1, 1), float(path.rpartition("/")[2]))

    def made(rank=0, world=1, accumulate=1, weights=WEIGHTS, seed=0):
        loaders = {}
        for name, count in CLIPS.items():
            path = tmp_path / f"{name}.jsonl"
            write_manifest(path, [{"image": str(tmp_path / f"{n}"), "id": f"{name}{n}"} for n in range(count)])
            manifest = Manifest(path)
            clips = ManifestDataset(manifest, media={name: "image"}, readers={name: read}, seed=seed)
            plan = BatchPlan(np.ones(count), batch_size=2, seed=seed)
            loaders[name] = Loader(clips, plan, rank=rank, world=world)
        return Turns(loaders, weights, accumulate=accumulate, seed=seed)

    return made


def take(turns, count):
    """(modality, ids, seeds) of so many micro-batches."""
    batches = iter(turns)
    found = [
        (*batch.inputs, tuple(batch.ids), tuple(batch.seeds.tolist())) for batch in itertools.islice(batches, count)
    ]
    batches.close()
    return found


def test_every_rank_draws_the_same_and_together_they_are_one_process(make):
    one = take(make(accumulate=4), 24)
    # two ranks with two micro-batches an update each: of the four of one process the first takes every other one
    ranks = [take(make(rank=rank, world=2, accumulate=2), 12) for rank in (0, 1)]
    assert [name for name, *_ in ranks[0]] == [name for name, *_ in ranks[1]]
    assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == one
    assert len({name for name, *_ in one}) == 3
    for update in range(0, 24, 4):
        assert len({name for name, *_ in one[update : update + 4]}) == 1


def test_a_modality_has_the_micro_batches_that_it_has_by_itself(make):
    together = [batch for batch in take(make(), 60) if batch[0] == "video"]
    turns = make(weights={"image": 1e-9, "audio": 1e-9, "video": 1.0})
    assert together == take(turns, len(together))
    # six a pass over eleven clips, and then the next epoch in another order
    assert len(together) > 12
    assert sorted(name for _, ids, _ in together[:6] for name in ids) == sorted(f"video{n}" for n in range(11))
    assert together[:6] != together[6:12]


@pytest.mark.parametrize("after", [1, 5, 13])
def test_what_is_resumed_goes_on_as_if_it_had_never_stopped(make, after, monkeypatch):
    # with updates on both sides of a block that is drawn at once
    monkeypatch.setattr(room, "_DRAWN", 4)
    whole, first = take(make(accumulate=2), 40), make(accumulate=2)
    assert take(first, 2 * after) == whole[: 2 * after]
    second = make(accumulate=2)
    second.consumed, second.epoch_start = first.consumed, first.epoch_start
    assert take(second, 40 - 2 * after) == whole[2 * after :]
    assert second.consumed == 40


def test_modalities_are_drawn_at_their_weights(make):
    turns = make()
    drawn = [turns.modality(update) for update in range(10_000)]
    before = turns.before(10_000)
    assert before == {name: drawn.count(name) for name in CLIPS}
    for name, weight in WEIGHTS.items():
        # four deviations of a binomial share of 1/4 or 1/2
        assert abs(before[name] / 10_000 - weight / 4) < 0.02
    other = make(seed=1)
    assert [other.modality(update) for update in range(50)] != drawn[:50]


def test_bad_clips_of_all_are_told(make):
    turns = make()
    for name in ("image", "video"):
        turns.loaders[name].note = f"{name} is odd"
    assert turns.remark == "image is odd; video is odd"
