"""A row's part of a shard is its clip, read, cropped, put beside others and embedded as any clip is."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from mmssl.data.batching import collate_samples
from mmssl.data.dataset import ManifestDataset
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.data.scan import scan
from mmssl.data.units import write_shard
from mmssl.modalities.codes import CODES
from mmssl.modalities.codes.reader import probe, read
from mmssl.types import BadClip


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Twelve steps of two codebooks: 0 to 11, and a hundred more."""
    path = tmp_path / "a.safetensors"
    steps = np.arange(12)
    write_shard(path, np.stack([steps, 100 + steps], 1), rate=50, lengths=np.array([7, 5]), of="x")
    return path


def test_a_clip_is_the_steps_that_its_row_names(shard: Path) -> None:
    clip = read(shard, rate=50, codes=[20, 200], first=7, count=5)
    assert clip.tolist() == [[7, 8, 9, 10, 11], [107, 108, 109, 110, 111]]
    assert clip.dtype is torch.int64
    assert read(shard, rate=50, codes=[20, 200]).shape == (2, 12)


def test_rows_are_read_cropped_and_padded_like_sound(shard: Path) -> None:
    path = shard.parent / "train.jsonl"
    parts = [("a", 0, 7), ("b", 7, 5)]
    rows = [
        {"id": id, "codes": {"path": str(shard), "first": first, "count": n}, "seconds": n / 50}
        for id, first, n in parts
    ]
    rows.append({"id": "both", "codes": [rows[1]["codes"], rows[0]["codes"]], "seconds": 0.24})
    write_manifest(path, rows)
    dataset = ManifestDataset(
        Manifest(path),
        media={"codes": CODES.media},
        readers={"codes": lambda source, **part: read(source, rate=50, codes=[20, 200], **part)},
        hints={"codes": CODES.hints},
        augments={"codes": lambda x, rng: CODES.augments["center_crop"](x, rng, seconds=0.12, rate=50)},
        rates={"codes": 50},
    )
    batch = collate_samples([dataset[0, 0], dataset[1, 0], dataset[2, 0]])
    assert batch.raw.data.dtype is torch.int64
    assert batch.raw.lengths.tolist() == [6, 5, 6]
    assert batch.raw.data[1].tolist() == [[7, 8, 9, 10, 11, 0], [107, 108, 109, 110, 111, 0]]
    assert batch.raw.data[2, 0].tolist() == [10, 11, 0, 1, 2, 3]
    random = CODES.augments["random_crop"](
        dataset.read(0, 0).inputs["codes"], np.random.default_rng(1), seconds=0.06, rate=50
    )
    assert random.shape == (2, 3)
    assert (random[1] - random[0] == 100).all()


def test_a_shard_in_a_folder_is_a_clip_and_rows_of_one_shard_have_names_of_their_own(shard: Path) -> None:
    found = scan(shard.parent, media="codes", probe=probe, suffixes=CODES.suffixes)
    assert [(row["id"], row["seconds"]) for row in found.rows] == [("a.safetensors", 0.24)]
    path = shard.parent / "two.jsonl"
    write_manifest(path, [{"codes": {"path": str(shard), "first": n, "count": 2}, "seconds": 0.04} for n in (0, 2)])
    assert [row["id"] for row in Manifest(path)] == ["a.safetensors#0", "a.safetensors#2"]


def test_what_is_no_clip_of_codes_is_named(shard: Path) -> None:
    refused = [
        ({"rate": 100}, "has 50 codes a second, and the frontend reads 100"),
        ({"codes": [20, 105]}, "unit 105 at step 5 is none of the 105"),
        ({"codes": [20]}, "2 labels at each step, where the recipe has codes for 1"),
        ({"first": 9, "count": 5}, "holds 12 units, and not those from 9 to 14"),
        ({"first": 9}, "need 'first' and 'count'"),
    ]
    for settings, said in refused:
        with pytest.raises(BadClip, match=said):
            read(shard, **{"rate": 50, "codes": [20, 200], **settings})  # type: ignore[arg-type]
    with pytest.raises(BadClip, match="read from a file of their own"):
        read(io.BytesIO(b""), rate=50, codes=[2])
    write_shard(shard, np.zeros((3, 1)), rate=None, lengths=np.array([3]), of="x")
    with pytest.raises(BadClip, match="have no rate"):
        probe(shard)
    with pytest.raises(BadClip, match="has no rate, and the frontend reads 50"):
        read(shard, rate=50, codes=[2])
