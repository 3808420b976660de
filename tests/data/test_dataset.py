"""Samples depend on seed, epoch and id alone; bad clips are named, replaced and counted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.data.dataset import BadClips, ManifestDataset, Sample
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.types import BadClip, Raw


def read(source: Any, start: float = 0.0, duration: float | None = None) -> Tensor:
    """A clip is a text file of numbers, 10 to a second."""
    try:
        content = source.read() if hasattr(source, "read") else Path(source).read_bytes()
        clip = torch.tensor([float(number) for number in content.split()])
    except (OSError, ValueError) as error:
        raise BadClip(source, f"unreadable ({type(error).__name__})") from None
    first = round(start * 10)
    return clip[first : None if duration is None else first + round(duration * 10)]


def jitter(clip: Tensor, rng: np.random.Generator) -> Tensor:
    return clip + torch.from_numpy(rng.random(len(clip), dtype=np.float32))


def make(folder: Path, count: int, bad: tuple[int, ...] = ()) -> Manifest:
    rows = []
    for i in range(count):
        (folder / f"{i}.txt").write_text("x" if i in bad else " ".join([str(i)] * (i % 5 + 1)))
        rows.append({"id": f"clip{i}", "audio": str(folder / f"{i}.txt"), "seconds": (i % 5 + 1) / 10, "label": i % 3})
    write_manifest(folder / "a.jsonl", rows)
    return Manifest(folder / "a.jsonl")


def dataset(manifest: Manifest, **settings: Any) -> ManifestDataset:
    return ManifestDataset(
        manifest, **{"media": {"sound": "audio"}, "readers": {"sound": read}, "rates": {"sound": 10.0}, **settings}
    )


def same(a: Sample, b: Sample) -> bool:
    return (a.id, a.seed, a.label) == (b.id, b.seed, b.label) and torch.equal(a.inputs["sound"], b.inputs["sound"])


def test_a_row_becomes_a_sample(tmp_path: Path) -> None:
    sample = dataset(make(tmp_path, 5), label=lambda row: row["label"])[2, 0]
    assert sample.id == "clip2"
    assert sample.inputs["sound"].tolist() == [2, 2, 2]
    assert sample.rates == {"sound": 10.0}
    assert sample.label == 2
    assert sample.bad == []
    assert 0 <= sample.seed < 1 << 63


def test_randomness_depends_on_seed_epoch_and_id_alone(tmp_path: Path) -> None:
    manifest = make(tmp_path, 6)
    first = dataset(manifest, augments={"sound": jitter})
    for i in (5, 1, 3):
        first[i, 7]
    alone = dataset(manifest.select([4, 3]), augments={"sound": jitter})
    assert same(first[3, 7], alone[1, 7])
    for other in (first[3, 8], dataset(manifest, augments={"sound": jitter}, seed=1)[3, 7]):
        assert other.seed != first[3, 7].seed
        assert not torch.equal(other.inputs["sound"], first[3, 7].inputs["sound"])
    assert len({first[i, e].seed for i in range(6) for e in range(6)}) == 36


def test_seeds_are_the_same_on_every_machine(tmp_path: Path) -> None:
    # blake2b("0\x1f0\x1fclip0") of 8 bytes, as `b2sum -l 64` gives it, read as little endian without its lowest bit
    digest = "bbd6d8bf7e24b1f4"
    assert dataset(make(tmp_path, 1))[0, 0].seed == int.from_bytes(bytes.fromhex(digest), "little") >> 1


def test_the_cache_keeps_what_was_read_and_not_what_was_augmented(tmp_path: Path) -> None:
    manifest = make(tmp_path, 3)
    plain, cached = (dataset(manifest, augments={"sound": jitter}, cache=cache) for cache in (False, True))
    first = cached[2, 0]
    (tmp_path / "2.txt").unlink()
    assert same(cached[2, 0], first)
    assert not same(cached[2, 1], first)
    with pytest.raises(BadClip):
        plain[2, 0]


def test_slices_segments_and_parts_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("....1 2 3 4....")
    (tmp_path / "b.txt").write_text("5 6 7 8")
    tar, txt = str(tmp_path / "a.tar"), str(tmp_path / "b.txt")
    rows = [
        {"audio": tar, "offset": 4, "size": 7},
        {"audio": txt, "start": 0.1, "duration": 0.2},
        {"audio": {"path": tar, "offset": 4, "size": 7, "start": 0.2}},
        {"audio": [{"path": tar, "offset": 4, "size": 3}, txt, {"path": txt, "start": 0.3}]},
    ]
    write_manifest(tmp_path / "a.jsonl", rows)
    clips = dataset(Manifest(tmp_path / "a.jsonl"))
    got = [clips[i, 0].inputs["sound"].tolist() for i in range(4)]
    assert got == [[1, 2, 3, 4], [6, 7], [3, 4], [1, 2, 5, 6, 7, 8, 8]]


def test_a_row_may_have_several_modalities(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1 2")
    (tmp_path / "b.txt").write_text("3")
    write_manifest(tmp_path / "a.jsonl", [{"audio": str(tmp_path / "a.txt"), "image": str(tmp_path / "b.txt")}])
    clips = ManifestDataset(
        Manifest(tmp_path / "a.jsonl"),
        media={"speech": "audio", "image": "image"},
        readers={"speech": read, "image": read},
        rates={"speech": 10.0},
    )
    sample = clips[0, 0]
    assert {name: clip.tolist() for name, clip in sample.inputs.items()} == {"speech": [1, 2], "image": [3]}
    assert sample.rates == {"speech": 10.0, "image": None}


def test_a_picture_has_no_part_of_the_time_that_its_row_says(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1 2 3 4")
    path = str(tmp_path / "a.txt")
    rows = [
        {"audio": path, "image": path, "start": 0.2},
        {"audio": path, "image": {"path": path}, "start": 0.1, "duration": 0.2},
        {"audio": path, "video": {"path": path, "start": 0}, "start": 0.3},
    ]
    write_manifest(tmp_path / "a.jsonl", rows)
    media = {key: key for key in ("audio", "image", "video")}
    clips = ManifestDataset(
        Manifest(tmp_path / "a.jsonl"), media=media, readers=dict.fromkeys(media, read), optional=list(media)
    )
    found = [{name: clip.tolist() for name, clip in clips[place, 0].inputs.items()} for place in range(3)]
    assert found[0] == {"audio": [3, 4], "image": [1, 2, 3, 4]}
    assert found[1] == {"audio": [2, 3], "image": [1, 2, 3, 4]}
    assert found[2] == {"audio": [4], "video": [1, 2, 3, 4]}


def test_a_bad_clip_stops_a_run_that_does_not_skip(tmp_path: Path) -> None:
    sentence = r"1.txt: unreadable \(ValueError\) \(at .*a.jsonl:2\); data.on_bad_clip=skip goes on without such clips$"
    with pytest.raises(BadClip, match=sentence):
        dataset(make(tmp_path, 3, bad=(1,)))[1, 0]


def test_a_bad_clip_in_a_shard_is_named_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("....x....")
    write_manifest(tmp_path / "a.jsonl", [{"audio": str(tmp_path / "a.tar"), "offset": 4, "size": 1}])
    with pytest.raises(BadClip, match=r"a.tar#4: unreadable \(ValueError\)"):
        dataset(Manifest(tmp_path / "a.jsonl"))[0, 0]


def test_a_skipped_clip_is_named_and_replaced_by_the_same_other_one(tmp_path: Path) -> None:
    manifest = make(tmp_path, 20, bad=(3, 4))
    first, again = (dataset(manifest, on_bad_clip="skip") for _ in range(2))
    sample = first[3, 2]
    assert same(sample, again[3, 2])
    assert sample.id not in ("clip3", "clip4")
    assert sample.bad[0] == {
        "id": "clip3",
        "path": str(tmp_path / "3.txt"),
        "reason": "unreadable (ValueError)",
        "epoch": 2,
        "manifest": str(tmp_path / "a.jsonl"),
    }
    assert len({first[3, epoch].id for epoch in range(20)}) > 5  # not one clip for all of them
    with pytest.raises(BadClip):
        first.read(3, 2)


def test_lines_are_not_counted_for_clips_that_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def label(row: dict[str, Any]) -> int:
        if row["label"] == 2:
            raise ValueError("no label fits")
        return 0

    monkeypatch.setattr(Manifest, "place", lambda self, index: pytest.fail("the manifest was read up to the clip"))
    clips = dataset(make(tmp_path, 20, bad=(3,)), label=label, on_bad_clip="skip")
    assert [clips[i, 0].bad[0]["id"] for i in (2, 3)] == ["clip2", "clip3"]


def test_where_everything_is_bad_the_search_ends(tmp_path: Path) -> None:
    with pytest.raises(BadClip, match="unreadable .*; and so were 19 clips taken at random in its place"):
        dataset(make(tmp_path, 4, bad=(0, 1, 2, 3)), on_bad_clip="skip")[0, 0]


def test_a_label_that_does_not_fit_makes_a_bad_clip_with_its_line(tmp_path: Path) -> None:
    def label(row: dict[str, Any]) -> int:
        if row["label"] == 2:
            raise ValueError("the label 2 is not among the 2 classes (0, 1)")
        return row["label"]

    manifest = make(tmp_path, 6)
    with pytest.raises(
        BadClip, match=r"clip2: the label 2 is not among the 2 classes \(0, 1\) \(at .*a.jsonl:3\); data."
    ):
        dataset(manifest, label=label)[2, 0]
    assert dataset(manifest, label=label, on_bad_clip="skip")[2, 0].label in (0, 1)


def test_a_clip_that_the_frontend_or_an_augmentation_cannot_take_is_a_bad_clip(tmp_path: Path) -> None:
    def two(raw: Raw) -> None:
        if raw.lengths[0] < 2:
            raise ValueError(f"{raw.ids[0]}: {int(raw.lengths[0])} samples at {raw.rate} Hz are too few")

    def crop(clip: Tensor, rng: np.random.Generator) -> Tensor:
        if len(clip) < 2:
            raise ValueError("crop: the clip is too short; leave it out")
        return clip[:1]

    manifest = make(tmp_path, 3)
    assert len(dataset(manifest, fits={"sound": two})[1, 0].inputs["sound"]) == 2
    refused = r"clip0: 1 samples at 10.0 Hz are too few \(at .*a.jsonl:1\); data.on_bad_clip=skip goes on without"
    with pytest.raises(BadClip, match=refused):
        dataset(manifest, fits={"sound": two})[0, 0]
    with pytest.raises(BadClip, match="clip2: 1 samples"):  # as it is after augmentation
        dataset(manifest, fits={"sound": two}, augments={"sound": crop})[2, 0]
    with pytest.raises(BadClip, match="clip0: crop: the clip is too short; leave it out"):
        dataset(manifest, augments={"sound": crop})[0, 0]
    assert dataset(manifest, fits={"sound": two}, on_bad_clip="skip")[0, 0].bad[0]["id"] == "clip0"


def test_a_clip_much_longer_than_its_row_says_is_a_bad_clip(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(["1"] * 100))
    rows = [{"audio": str(tmp_path / "a.txt"), "seconds": seconds} for seconds in (2.0, 9.0)]
    write_manifest(tmp_path / "a.jsonl", rows)
    clips = dataset(Manifest(tmp_path / "a.jsonl"))
    with pytest.raises(
        BadClip, match=r"10.00 s long where its row says 2 s; write the manifest again \(at .*a.jsonl:1\)"
    ):
        clips[0, 0]
    assert len(clips[1, 0].inputs["sound"]) == 100


def test_members_of_a_pair_that_go_on_for_different_times_are_a_bad_clip(tmp_path: Path) -> None:
    for name, steps in (("long", 40), ("same", 16), ("short", 10)):
        (tmp_path / name).write_text(str(steps))

    def zeros(path: str) -> Tensor:
        return torch.zeros(int(Path(path).read_text()))

    sound = {"audio": str(tmp_path / "long"), "seconds": 4}
    rows = [{**sound, "video": str(tmp_path / name)} for name in ("same", "short")]
    write_manifest(tmp_path / "pairs.jsonl", rows)
    pairs = ManifestDataset(
        Manifest(tmp_path / "pairs.jsonl"),
        media={"audio": "audio", "video": "video", "text": "text"},
        optional=["audio", "video", "text"],
        readers={"audio": zeros, "video": zeros, "text": zeros},
        rates={"audio": 10.0, "video": 4.0},
    )
    assert set(pairs[0, 0].inputs) == {"audio", "video"}
    with pytest.raises(BadClip, match="its audio is 4.00 s long and its video is 2.50 s long; give each its start"):
        pairs[1, 0]


def test_a_row_without_the_modality_is_named_by_its_line(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a.jsonl", [{"audio": "a.wav"}, {"image": "a.png"}])
    with pytest.raises(ValueError, match="a.jsonl:2: no 'audio', which sound reads; the row has id, image"):
        dataset(Manifest(tmp_path / "a.jsonl"), on_bad_clip="skip")


def test_settings_without_sense_are_refused(tmp_path: Path) -> None:
    manifest = make(tmp_path, 1)
    with pytest.raises(ValueError, match="on_bad_clip: expected raise or skip, got 'ignore'"):
        dataset(manifest, on_bad_clip="ignore")
    with pytest.raises(ValueError, match="max_bad_share: expected a share of the clips from 0 to 1, got 5"):
        dataset(manifest, max_bad_share=5)


def bad(id: str, manifest: Manifest, epoch: int = 0) -> dict[str, Any]:
    return {"id": id, "path": f"{id}.txt", "reason": "why", "epoch": epoch, "manifest": str(manifest.path)}


def test_bad_clips_are_written_once_each(tmp_path: Path) -> None:
    manifest = make(tmp_path, 10)
    clips = BadClips(tmp_path / "run" / "bad_clips.jsonl", manifest=manifest, max_share=0.5)
    clips.add([bad("a", manifest), bad("b", manifest), bad("a", manifest)])
    clips.add([bad("a", manifest, epoch=1)])
    clips.add([])
    written = [json.loads(line) for line in (tmp_path / "run" / "bad_clips.jsonl").read_text().splitlines()]
    assert written == [bad("a", manifest), bad("b", manifest)]
    assert len(clips) == 2
    assert clips.remark.startswith(f"{manifest.path}: 2 of 10 clips could not be read so far; they are named in ")


def test_what_other_ranks_note_is_read_once(tmp_path: Path) -> None:
    manifest, path = make(tmp_path, 10), tmp_path / "bad_clips.jsonl"
    first, second = (BadClips(path, manifest=manifest, max_share=1.0) for _ in range(2))
    assert first.remark == ""
    first.add([bad("a", manifest)])
    second.add([bad("b", manifest)])
    assert len(second) == 2
    # lines that were read are not read again: what is put in their place is not noticed
    text = path.read_text()
    path.write_text(text.replace('"id": "a"', '"id": "x"').replace('"id": "b"', '"id": "y"'))
    second.add([bad("c", manifest)])
    assert len(second) == 3


def test_too_many_bad_clips_end_the_run_also_after_resuming_and_over_ranks(tmp_path: Path) -> None:
    manifest = make(tmp_path, 10)
    path = tmp_path / "bad_clips.jsonl"
    ranks = [BadClips(path, manifest=manifest, max_share=0.3) for _ in range(2)]
    ranks[0].add([bad("a", manifest), bad("b", manifest)])
    ranks[1].add([bad("c", manifest)])
    other = {**bad("z", manifest), "manifest": "valid.jsonl"}
    path.write_text(path.read_text() + json.dumps(other) + '\n{"id": "half')
    resumed = BadClips(path, manifest=manifest, max_share=0.3)
    assert len(resumed) == 3
    path.write_text(path.read_text() + "\n")
    with pytest.raises(
        ValueError, match=r"a.jsonl: 4 of 10 clips cannot be read \(40.00%\), more than max_bad_share"
    ) as e:
        ranks[1].add([bad("d", manifest)])
    assert "the last is d.txt (why), all are in" in str(e.value)


def test_without_a_file_bad_clips_are_counted_in_memory(tmp_path: Path) -> None:
    manifest = make(tmp_path, 4)
    clips = BadClips(None, manifest=manifest, max_share=0.25)
    clips.add([bad("a", manifest)])
    clips.add([bad("a", manifest)])
    with pytest.raises(ValueError, match="2 of 4 clips"):
        clips.add([bad("b", manifest)])


def test_parts_that_do_not_go_on_one_after_the_other_are_a_bad_clip(tmp_path: Path) -> None:
    sizes = {"a": (3, 2, 8, 8), "b": (3, 4, 8, 8), "c": (3, 2, 8, 6)}
    for name in sizes:
        (tmp_path / name).write_bytes(b"x")
    rows = [{"id": pair, "video": [str(tmp_path / name) for name in pair]} for pair in ("ab", "ac")]
    write_manifest(tmp_path / "m.jsonl", rows)
    dataset = ManifestDataset(
        Manifest(tmp_path / "m.jsonl"),
        media={"video": "video"},
        readers={"video": lambda path: torch.zeros(sizes[Path(path).name])},
    )
    assert dataset[0, 0].inputs["video"].shape == (3, 6, 8, 8)
    with pytest.raises(BadClip, match=r"ac: its parts are of sizes \(3, 8, 8\) and \(3, 8, 6\)"):
        dataset[1, 0]
