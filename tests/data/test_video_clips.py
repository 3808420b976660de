"""Video through dataset, batches, training and embedding: spans, hints, ragged clips, broken files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mmssl
from mmssl.assemble import pretrain
from mmssl.data.batching import collate_samples
from mmssl.data.dataset import ManifestDataset, Sample
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.data.scan import scan
from mmssl.loading import _view_check, build_plan
from mmssl.modalities import MODALITIES
from mmssl.modalities.video.frontend import Tubes
from mmssl.modalities.video.spans import random_span
from mmssl.modalities.video.views import check_frames
from mmssl.objectives.classify import mix
from mmssl.objectives.mae import MAE
from mmssl.recipe import RecipeError, load
from mmssl.resolve import resolve
from mmssl.types import BadClip, Batch, Loss, Raw

TOY = [
    "data.batch_size=4",
    "data.cache=false",
    "transformer.dim=24",
    "transformer.depth=1",
    "objective.decoder_dim=24",
    "objective.decoder_depth=1",
    "trainer.steps=4",
    "trainer.save_every=0",
    "trainer.eval_every=0",
    "trainer.precision=float32",
    "schedule.warmup=1",
    "augment.train=[{name: random_span, frames: 8}]",
    "augment.eval=[{name: center_span, frames: 8}]",
]


def recorded(source: Any, **settings: Any) -> torch.Tensor:
    """A reader whose clip of 10 s at 2 frames/s says at which second it starts."""
    start, duration = settings["span"](10.0) if "span" in settings else (0.0, 10.0)
    return torch.full((1, round(2 * duration), 2, 2), start)


def dataset(manifest: Manifest, **settings: Any) -> ManifestDataset:
    return ManifestDataset(
        manifest, media={"video": "video"}, readers={"video": recorded}, rates={"video": 2.0}, **settings
    )


def span(whole: float, rng: np.random.Generator) -> tuple[float, float]:
    return random_span(whole, rng, frames=4, rate=2)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    rows = [{"video": f"{name}.mp4", "seconds": 10.0} for name in "abcdef"]
    write_manifest(tmp_path / "a.jsonl", rows)
    return Manifest(tmp_path / "a.jsonl")


def starts(data: ManifestDataset, epoch: int) -> list[float]:
    return [float(data[place, epoch].inputs["video"][0, 0, 0, 0]) for place in range(len(data))]


def test_a_span_depends_on_seed_epoch_and_id_alone(manifest: Manifest) -> None:
    first = dataset(manifest, spans={"video": span})
    assert first[0, 0].inputs["video"].shape == (1, 4, 2, 2)
    assert len(set(starts(first, 0))) == 6
    assert starts(first, 0) == starts(dataset(manifest, spans={"video": span}), 0)
    assert starts(first, 0)[::-1] == starts(dataset(manifest.select(np.arange(6)[::-1]), spans={"video": span}), 0)
    assert not set(starts(first, 0)) & set(starts(first, 1))
    assert not set(starts(first, 0)) & set(starts(dataset(manifest, spans={"video": span}, seed=1), 0))


def test_sound_that_outlasts_the_pictures_is_drawn_where_there_are_pictures(tmp_path: Path) -> None:
    def heard(source: Any, **settings: Any) -> torch.Tensor:
        start, duration = settings["span"](16.0)
        return torch.full((round(8 * duration),), start)

    def four_seconds(whole: float, rng: np.random.Generator) -> tuple[float, float]:
        return random_span(whole, rng, frames=32, rate=8)

    write_manifest(tmp_path / "m.jsonl", [{"video": "a.mp4", "audio": "a.mp4", "seconds": 10.0}])
    clips = ManifestDataset(
        Manifest(tmp_path / "m.jsonl"),
        media={"video": "video", "audio": "audio"},
        readers={"video": recorded, "audio": heard},
        rates={"video": 2.0, "audio": 8.0},
        spans={"audio": four_seconds, "video": span},
    )
    begin = [[float(x.flatten()[0]) for x in clips.read(0, epoch).inputs.values()] for epoch in range(200)]
    assert all(0 <= sound <= picture <= sound + 2 for picture, sound in begin)
    assert max(sound for _, sound in begin) > 5.5  # of 6 at most
    # and it is said where in the clip that lies, though all of what the row says was read
    assert clips.read(0, 0).starts["audio"] == pytest.approx(begin[0][1])


def test_kept_clips_and_spans_exclude_each_other(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="data.cache=true: a kept clip would be the same part every time"):
        dataset(manifest, spans={"video": span}, cache=True)


def test_a_reader_gets_the_hints_of_its_row_and_no_others(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a.jsonl", [{"video": "a.mp4", "decoder": "pyav", "fps": 25.0, "start": 1.0}])
    got = []

    def reader(source: str, **settings: Any) -> torch.Tensor:
        got.append(settings)
        return torch.zeros(1, 2, 2, 2)

    for hints in ({"video": ("decoder",)}, {}):
        data = ManifestDataset(
            Manifest(tmp_path / "a.jsonl"), media={"video": "video"}, readers={"video": reader}, hints=hints
        )
        data.read(0, 0)
    assert got == [{"start": 1.0, "decoder": "pyav"}, {"start": 1.0}]


def test_clips_joined_in_time_and_clips_that_are_too_short_or_too_long(tmp_path: Path) -> None:
    rows = [{"video": ["a.mp4", "b.mp4"], "seconds": 20.0}, {"id": "long", "video": "c.mp4", "seconds": 5.0}]
    write_manifest(tmp_path / "a.jsonl", rows)
    data = dataset(Manifest(tmp_path / "a.jsonl"))
    assert data.read(0, 0).inputs["video"].shape == (1, 40, 2, 2)
    with pytest.raises(BadClip, match="long: 10.00 s long where its row says 5 s"):
        data.read(1, 0)
    tubes = Tubes(dim=4, size=[41, 1, 1], channels=1, mean=[0.5], std=[0.5])
    data = dataset(Manifest(tmp_path / "a.jsonl"), fits={"video": tubes.lengths})
    with pytest.raises(BadClip, match="40 frames are fewer than the 41 that one token needs"):
        data.read(0, 0)


def sample(name: str, clip: torch.Tensor) -> Sample:
    return Sample(name, {"video": clip}, {"video": 8.0}, None, 0)


def test_clips_of_several_frame_counts_are_padded_at_the_end() -> None:
    one, two = torch.rand(3, 5, 4, 6), torch.rand(3, 2, 4, 6)
    raw = collate_samples([sample("a", one), sample("b", two)]).raw
    assert raw.data.shape == (2, 3, 5, 4, 6)
    assert raw.lengths.tolist() == [5, 2]
    assert raw.rate == 8.0
    assert torch.equal(raw.data[0], one)
    assert torch.equal(raw.data[1, :, :2], two)
    assert not raw.data[1, :, 2:].any()
    with pytest.raises(ValueError, match="video: a is 3 x 4 x 6 and b is 3 x 4 x 4, but a batch holds pictures of one"):
        collate_samples([sample("a", one), sample("b", two[..., :4])])


def test_clips_are_mixed_where_they_overlap() -> None:
    data = torch.zeros(2, 1, 4, 1, 1)
    data[0], data[1, :, :2] = 1.0, 3.0
    raw = Raw(data, torch.tensor([4, 2]), ["a", "b"])
    mixed, own = mix(raw, torch.tensor([5, 6]), alpha=1.0)
    share = (3.0 - mixed.data[0, 0, 0, 0, 0]) / 2.0  # of itself: 1 s + 3 (1 - s)
    assert 0 < share < 1
    assert torch.allclose(mixed.data[0, 0, :, 0, 0], torch.tensor([3 - 2 * share, 3 - 2 * share, 1.0, 1.0]))
    assert torch.allclose(own[0], 1 - (1 - share) * 2 / 4)
    assert not mixed.data[1, :, 2:].any()


def test_a_span_bounds_what_a_clip_adds_to_a_batch(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a.jsonl", [{"video": f"{n}.mp4", "seconds": n} for n in (1.0, 4.0, 3600.0)])

    def lengths(steps: str) -> list[float]:
        data = [f"augment.train={steps}", "data.bucket=true", "frontend.rate=5"]
        recipe = resolve(load("small/mae_video", [f"data.train={tmp_path / 'a.jsonl'}", *data]))
        planned: list[float] = build_plan(recipe, Manifest(tmp_path / "a.jsonl"), side="train").lengths.tolist()
        return planned

    assert lengths("[{name: resize, size: 32}]") == [1.0, 4.0, 3600.0]
    assert lengths("[{name: random_span, frames: 10}, {name: resize, size: 32}]") == [1.0, 2.0, 2.0]


def test_videos_of_several_sizes_are_told_apart_before_the_first_update(videos: Path, tmp_path: Path) -> None:
    rows = [{"video": str(path), "seconds": 2.0} for path in sorted((videos / "train").rglob("*.mp4"))[:4]]
    frames = [Image.fromarray(np.full((48, 32), 10 * number, np.uint8)) for number in range(16)]
    frames[0].save(tmp_path / "odd.gif", save_all=True, append_images=frames[1:], duration=130)
    rows += [{"video": str(tmp_path / "odd.gif"), "seconds": 2.08}]

    def go(name: str, stated: bool, *overrides: str) -> Path:
        kind = MODALITIES["video"]
        write_manifest(tmp_path / "a.jsonl", [row | (kind.probe(row["video"]) if stated else {}) for row in rows])
        return pretrain(
            load("small/mae_video", [f"data.train={tmp_path / 'a.jsonl'}", *TOY, *overrides]), tmp_path / name
        )

    with pytest.raises(RecipeError, match=r"augment.train leaves .* at 32 x 32 pixels and odd.gif .* at 48 x 32"):
        go("refused", True)
    assert not (tmp_path / "refused").exists()
    run = go("skipped", False, "data.on_bad_clip=skip", "data.max_bad_share=0.5")
    [bad] = [json.loads(line) for line in (run / "bad_clips.jsonl").read_text(encoding="utf-8").splitlines()]
    assert bad["id"] == "odd.gif"
    assert bad["reason"].startswith("48 x 32 pixels, where the first clip of the manifest has 32 x 32")
    go("cropped", True, "augment.train=[{name: random_span, frames: 8}, {name: center_crop, size: 32}]")


@pytest.mark.parametrize("method", ["siam_mae", "vic_mae"])
def test_a_clip_of_one_frame_has_no_two_moments_and_is_a_bad_clip_where_it_is_read(method: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((16, 16), 20 * number, np.uint8)) for number in range(8)]
    for name in "abc":
        frames[0].save(tmp_path / f"{name}.gif", save_all=True, append_images=frames[1:], duration=125)
    rows = [{"id": name, "video": str(tmp_path / f"{name}.gif"), "start": 0.0, "duration": 1.0} for name in "abc"]
    rows.append({**rows[0], "id": "still", "duration": 0.125})
    write_manifest(tmp_path / "all.jsonl", rows)
    given = [f"data.train={tmp_path / 'all.jsonl'}", *TOY, "augment.train=[]", "trainer.steps=2"]
    given = [one for one in given if not one.startswith("augment.eval")]
    with pytest.raises(
        BadClip, match=r"still: 1 frames have no two moments of 1; .*all\.jsonl.*; data.on_bad_clip=skip goes on"
    ):
        pretrain(load(f"small/{method}_video", given), tmp_path / "ended")
    skipping = ["data.on_bad_clip=skip", "data.max_bad_share=0.25"]
    run = pretrain(load(f"small/{method}_video", [*given, *skipping]), tmp_path / "run")
    [bad] = [json.loads(line) for line in (run / "bad_clips.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (bad["id"], bad["reason"][:35]) == ("still", "1 frames have no two moments of 1; ")
    assert (run / "encoder.safetensors").exists()


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "siam_mae", "views": "frames"},
        {"name": "slip", "self_supervised": {"video": "frames", "image": "crops"}},
        {"name": "omni", "of": {"video": {"name": "vic_mae", "views": "frames"}, "image": {"name": "mae"}}},
    ],
)
def test_two_moments_are_asked_for_wherever_a_recipe_names_them(objective: dict[str, Any]) -> None:
    assert _view_check(objective, "video") is check_frames
    if objective["name"] != "siam_mae":
        assert _view_check(objective, "image") is None
    assert _view_check({"name": "mae"}, "video") is None


def test_a_run_over_a_folder_with_broken_files_uses_the_good_ones_and_names_the_bad(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for number, content in enumerate(sorted((videos / "train").rglob("*.mp4"))[:12]):
        (folder / f"{number}.mp4").write_bytes(content.read_bytes())
    kind = MODALITIES["video"]
    rows = scan(folder, media="video", probe=kind.probe, suffixes=kind.suffixes, progress=False).rows
    assert len(rows) == 12
    write_manifest(tmp_path / "train.jsonl", rows)
    whole = (folder / "0.mp4").read_bytes()
    # after the manifest was written: files break while they are used
    for number, broken in enumerate((b"", b"<html>", whole[: len(whole) // 2], None)):
        path = folder / f"{number}.mp4"
        path.unlink() if broken is None else path.write_bytes(broken)
    skipping = [f"data.train={tmp_path / 'train.jsonl'}", "data.on_bad_clip=skip", "data.max_bad_share=0.34"]
    seen: set[str] = set()
    forward = MAE.forward

    def watched(self: MAE, batch: Batch) -> Loss:
        seen.update(batch.ids)
        return forward(self, batch)

    monkeypatch.setattr(MAE, "forward", watched)
    run = pretrain(load("small/mae_video", [*TOY, *skipping, "trainer.steps=3"]), tmp_path / "run")  # an epoch
    monkeypatch.undo()
    bad = [json.loads(line) for line in (run / "bad_clips.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(row["id"] for row in bad) == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]
    assert all(row["reason"] and row["path"] == str(folder / row["id"]) for row in bad)
    assert seen == {f"{number}.mp4" for number in range(4, 12)}

    encoder = mmssl.load(run)
    good = [folder / f"{number}.mp4" for number in (4, 5, 6)]
    out = encoder.embed([*good, folder / "1.mp4"], on_bad_clip="skip")
    # the middle 8 of 16 frames, from 500 ms on: 4 steps of 4 x 4 patches, 250 ms each
    assert out.tokens.shape == (4, 64, 24)
    assert out.valid.sum(1).tolist() == [64, 64, 64, 0]
    assert out.scene[3].isnan().all()
    assert out.time_ms is not None
    assert out.time_ms[0, ::16].tolist() == [625, 875, 1125, 1375]
    clip = kind.read(good[0], rate=8, channels=1, start=0.5, duration=1.0)
    assert torch.allclose(encoder.embed(clip).scene[0], out.scene[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"a clip is \(channels, frames, height, width\)"):
        encoder.embed(clip[0])
