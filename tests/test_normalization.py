"""The constants of normalization, measured over a manifest's clips."""

from pathlib import Path

import pytest
import torch

from mmssl.data.manifest import Manifest, write_manifest
from mmssl.modalities import MODALITIES
from mmssl.modalities.audio.frontend import SpectrogramPatches
from mmssl.normalization import input_statistics
from mmssl.recipe import find
from mmssl.types import Raw


def test_constants_of_normalization_bring_the_spectrograms_to_mean_0_and_deviation_1(
    heard: dict[str, Path], tmp_path: Path
) -> None:
    rows = [*Manifest(heard["train"]), {"audio": "missing.wav", "seconds": 0.5}]
    write_manifest(tmp_path / "train.jsonl", rows)
    found = input_statistics("small/mae_audio", tmp_path / "train.jsonl")
    assert (found.clips, list(found.bad.values())) == (12, ["no such file or directory"])
    frontend = SpectrogramPatches(dim=1, size=[1, 128], mean=found.mean[0], std=found.std[0], deviations=1.0)
    frames = []
    for row in Manifest(heard["train"]):
        wave = MODALITIES["audio"].read(row["audio"], rate=16_000)
        frames.append(frontend(Raw(wave[None], torch.tensor([len(wave)]), ["a"], 16_000)).feat[0])
    values = torch.cat(frames).flatten()
    assert found.values == len(values)
    assert abs(float(values.mean())) < 1e-3
    assert abs(float(values.std()) - 1) < 1e-3
    assert str(found) == f"frontend.mean={found.mean[0]:.6g} frontend.std={found.std[0]:.6g}"
    with pytest.raises(ValueError, match="LogMel normalizes by no constants of the data"):
        input_statistics("small/wav2vec2_speech", heard["train"])


def test_constants_of_normalization_of_video_are_those_of_the_spans_that_training_reads(
    videos: Path, tmp_path: Path
) -> None:
    text = find("small/mae_video").read_text(encoding="utf-8")
    recipe = tmp_path / "spans.yaml"
    recipe.write_text(text.replace("train: []", "train: [{name: random_span, frames: 8}]"), encoding="utf-8")
    path = videos / "train" / "up" / "0.mp4"
    whole = MODALITIES["video"].read(path, rate=8, channels=1)
    write_manifest(tmp_path / "whole.jsonl", [{"video": str(path)}])
    assert input_statistics(recipe, tmp_path / "whole.jsonl").values == whole[:, :8].numel() < whole.numel()
    # two windows of one file, each as long as the span
    rows = [{"id": f"at {start}", "video": str(path), "start": start, "duration": 1.0} for start in (0.0, 0.5)]
    write_manifest(tmp_path / "windows.jsonl", rows)
    found = input_statistics(recipe, tmp_path / "windows.jsonl")
    read = torch.cat([whole[:, :8], whole[:, 4:12]])
    assert (found.clips, found.values) == (2, read.numel())
    assert found.mean[0] == pytest.approx(float(read.mean()), abs=1e-6)
    assert found.std[0] == pytest.approx(float(read.double().std(correction=0)), abs=1e-6)


def test_a_clip_shorter_than_one_token_is_not_measured(heard: dict[str, Path], tmp_path: Path) -> None:
    [first, second] = Manifest(heard["train"])[:2]
    write_manifest(tmp_path / "train.jsonl", [first, {**second, "id": "short", "start": 0.1, "duration": 0.02}])
    found = input_statistics("small/mae_audio", tmp_path / "train.jsonl")
    assert (found.clips, found.bad) == (1, {"short": "is shorter than the 400 that one token needs"})
