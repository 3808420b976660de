import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mmssl.data.batching import collate_samples
from mmssl.data.dataset import ManifestDataset
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.data.units import cut_units, read_lengths, read_units, write_shard
from mmssl.modalities.speech.augment import random_span
from mmssl.modalities.speech.reader import read
from mmssl.types import BadClip


def test_a_shard_gives_each_clip_its_own_steps(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_shard(path, np.arange(12).reshape(6, 2), rate=50, lengths=np.array([2, -1, 4]), of="x")
    units = read_units({"path": str(path), "first": 2, "count": 4}, [20, 20])
    assert units.values.tolist() == [[[4, 5], [6, 7], [8, 9], [10, 11]]]
    assert (units.lengths.tolist(), units.rate, units.starts.tolist()) == ([4], 50.0, [0.0])
    assert read_lengths(path).tolist() == [2, -1, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_row_may_hold_its_units_itself_and_a_number_is_one_for_the_clip() -> None:
    units = read_units({"rate": 25, "values": [3, 3, 1]}, [4])
    assert (units.values.tolist(), units.rate) == ([[[3], [3], [1]]], 25.0)
    assert read_units({"values": [[1, 2], [3, 4]]}, [5, 5]).values.tolist() == [[[1, 2], [3, 4]]]
    topic = read_units(7, [8])
    assert (topic.values.tolist(), topic.rate) == ([[[7]]], None)


@pytest.mark.parametrize(
    ("value", "codes", "said"),
    [
        ("3", [4], "units must be an object or one whole number"),
        ({"values": [1.5]}, [4], "a list of whole numbers"),
        ({"values": [[1], [1, 2]]}, [4], "equally long lists"),
        ({"values": [1], "rate": 0}, [4], "a number above 0; got 0"),
        ({"values": [0, 4]}, [4], "unit 4 at step 1 is none of the 4"),
        ({"values": [0, -1]}, [4], "unit -1 at step 1"),
        ({"values": [0, 1]}, [4, 4], "1 labels at each step, where the recipe has codes for 2"),
        ({"path": "nowhere.safetensors", "first": 0, "count": 1}, [4], "nowhere.safetensors: no units can be read"),
        ({"path": "nowhere.safetensors", "first": -1, "count": 1}, [4], "whole numbers from 0 on"),
    ],
)
def test_what_is_no_label_set_is_refused(value: object, codes: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_units(value, codes)


def test_a_shard_that_is_shorter_than_its_row_says_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", np.zeros((3, 1)), rate=None, lengths=np.array([3]), of="x")
    with pytest.raises(ValueError, match="holds 3 units, and not those from 2 to 4"):
        read_units({"path": str(tmp_path / "a.safetensors"), "first": 2, "count": 2}, [4])


def test_a_cut_keeps_the_steps_that_the_part_touches_and_how_far_into_the_first_it_begins() -> None:
    units = read_units({"rate": 10, "values": list(range(10))}, [10])
    part = cut_units(units, 0.25, 0.3)  # from within step 2 to within step 5
    assert part.values[0, :, 0].tolist() == [2, 3, 4, 5]
    assert part.starts.item() == pytest.approx(0.05)
    assert cut_units(units, 0.0, 1.05).values.shape[1] == 10
    with pytest.raises(ValueError, match="the units end after 1.00 s, and the clip after 2.00 s"):
        cut_units(units, 0.5, 1.5)
    with pytest.raises(ValueError, match="no part of a clip can be taken"):
        cut_units(read_units({"values": [1]}, [2]), 0.5, 1.0)


def test_a_spans_units_are_those_of_its_own_sound(tmp_path: Path) -> None:
    """Every 20 ms of the sound has its number as its level, and its number as its unit."""
    for name, steps in (("a", 100), ("b", 60)):
        soundfile.write(tmp_path / f"{name}.wav", np.repeat(np.arange(steps) / 128, 160), 8000, subtype="FLOAT")
    rows = [
        {"audio": f"{name}.wav", "seconds": 0.02 * steps, "units": {"rate": 50, "values": list(range(steps))}}
        for name, steps in (("a", 100), ("b", 60))
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = ManifestDataset(
        Manifest(tmp_path / "m.jsonl"),
        media={"speech": "audio"},
        readers={"speech": lambda path, **part: read(path, rate=8000, **part)},
        spans={"speech": lambda seconds, rng: random_span(seconds, rng, seconds=0.8, step_ms=20)},
        rates={"speech": 8000},
        units={"units": [100]},
    )
    begun = set()
    for epoch in range(6):
        batch = collate_samples([dataset[0, epoch], dataset[1, epoch]])
        units = batch.units["units"]
        assert batch.raw.lengths.tolist() == [6400, 6400]
        for row in range(2):
            levels = (batch.raw.data[row, ::160] * 128).round().long()
            assert torch.equal(units.values[row, :40, 0], levels)
            begun.add(int(levels[0]))
        assert units.starts.abs().max() < 1e-9
    assert len(begun) > 4


def test_paths_of_units_move_with_the_manifest(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(800), 8000)
    row = {"audio": str(tmp_path / "a.wav"), "units": {"path": str(tmp_path / "s.safetensors"), "first": 0, "count": 1}}
    write_manifest(tmp_path / "m.jsonl", [row])
    assert json.loads((tmp_path / "m.jsonl").read_text())["units"]["path"] == "s.safetensors"
    assert Manifest(tmp_path / "m.jsonl")[0]["units"]["path"] == str(tmp_path / "s.safetensors")


def test_a_clip_with_bad_units_is_a_bad_clip(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 8000)
    write_manifest(tmp_path / "m.jsonl", [{"id": "a", "audio": str(tmp_path / "a.wav"), "seconds": 1.0}])
    dataset = ManifestDataset(
        Manifest(tmp_path / "m.jsonl"),
        media={"speech": "audio"},
        readers={"speech": lambda path, **part: read(path, rate=8000, **part)},
        rates={"speech": 8000},
        units={"units": [5]},
    )
    with pytest.raises(BadClip, match="a: the row has no 'units'.*`mmssl units` writes it"):
        dataset.read(0, 0)
