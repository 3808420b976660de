"""Pictures and their sounds from the recipe on: reconstructed together, embedded apart, and found by each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmssl
from mmssl.assemble import export_config, train
from mmssl.build import build_encoders
from mmssl.cli import app
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.loading import build_dataset
from mmssl.recipe import RecipeError, load
from mmssl.resolve import resolve

RECIPE = """# toy
modality:
  image:
    frontend: {name: patches, size: [4, 4], mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
    positions: {name: sincos}
    encoder: {}
  audio:
    frontend: {name: spectrogram, size: [4, 4], bands: 8, window_ms: 10, rate: 8000}
    positions: {name: sincos}
    encoder: {}
backbone: {name: shared, own_blocks: 1, own_norms: true}
transformer: {dim: 16, depth: 2, heads: 2}
objective:
  name: cav_mae
  targets: {image: pixels, audio: spectrogram}
  mask_ratio: {image: 0.5, audio: 0.5}
  decoder_dim: 16
  decoder_depth: 1
  decoder_heads: 2
data: {train: train.jsonl, valid: train.jsonl, batch_size: 4}
optimizer: {lr: 0.003}
schedule: {name: constant}
trainer: {steps: 3, log_every: 1, eval_every: 3, device: cpu, threads: 1}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import soundfile

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for n in range(6):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
        soundfile.write(tmp_path / f"{n}.wav", rng.normal(0, 0.1, 2000 + 300 * n), 8000)
    Path("toy.yaml").write_text(RECIPE, encoding="utf-8")
    rows = [{"image": f"{n}.png", "audio": f"{n}.wav", "seconds": 0.25 + 0.0375 * n} for n in range(6)]
    write_manifest("train.jsonl", rows)
    return tmp_path


def test_a_run_of_cav_mae_embeds_both_sides_and_is_measured_by_retrieval(folder: Path) -> None:
    run = train("toy.yaml", "run")
    encoder = mmssl.load(run, device="cpu")
    assert encoder.modalities == ["image", "audio"]
    for name, files in (("image", ["0.png", "1.png"]), ("audio", ["0.wav", "5.wav"])):
        out = encoder.embed(files, modality=name)
        assert out.scene.shape == (2, 16)
        assert torch.allclose(out.scene.norm(dim=1), torch.ones(2), atol=1e-6)
        alone = encoder.embed(files[0], modality=name)
        assert torch.allclose(alone.scene[0], out.scene[0], atol=1e-5)
        mean = torch.nn.functional.normalize(alone.tokens[0].mean(0), dim=0)
        assert torch.allclose(alone.scene[0], mean, atol=1e-5)
    done = CliRunner().invoke(app, ["evaluate", "run", "--task", "retrieval", "--test", "train.jsonl"])
    assert done.exit_code == 0, done.output
    assert "R@1 image to audio" in done.output


def test_a_run_of_av_mae_has_encoders_and_no_space_of_both(folder: Path) -> None:
    run = train("toy.yaml", "run", ["objective.name=av_mae", "trainer.accumulate=2", "backbone.own_norms=false"])
    encoder = mmssl.load(run, device="cpu")
    out = encoder.embed(["0.wav", "1.wav"], modality="audio")
    assert torch.allclose(out.scene[0], out.tokens[0, out.valid[0]].mean(0), atol=1e-5)
    with pytest.raises(ValueError, match="pool='joint': run shares no space with another modality"):
        encoder.embed("0.png", modality="image", pool="joint")
    done = CliRunner().invoke(app, ["evaluate", "run", "--task", "retrieval", "--test", "train.jsonl"])
    assert done.exit_code == 2
    assert "share no space" in " ".join(done.output.replace("│", " ").split())


def test_a_resolved_recipe_is_resolved_to_itself(folder: Path) -> None:
    first = resolve(load("toy.yaml"))
    (folder / "again.yaml").write_text(first.dump(), encoding="utf-8")
    assert resolve(load("again.yaml")).values == first.values


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["objective.targets={image: pixels}"], "'objective.targets' should name one for each of image, audio"),
        (["objective.targets=pixels"], "'objective.targets' should name one for each of image, audio .got 'pixels'."),
        (["objective.targets={image: pixels, audio: pixels}"], "unknown objective.targets.audio 'pixels'"),
        (["trainer.accumulate=2"], "trainer.accumulate=2: cav_mae tells the pairs .* as high as memory goes, or use"),
        (["modality=image"], "cav_mae brings several modalities together"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(folder: Path, settings: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        resolve(load("toy.yaml", settings))


def test_a_span_of_one_goes_with_a_span_of_the_other(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "video": "a.mp4", "audio": "a.mp4"}\n')
    settings = [f"data.train={tmp_path / 'rows.jsonl'}", "modality.audio.augment={}"]
    recipe = resolve(load("small/av_mae_video", settings))
    manifest = Manifest(tmp_path / "rows.jsonl")
    config = export_config(recipe, manifest)
    with pytest.raises(RecipeError, match="all of audio is read, and of video a span, so they would not"):
        build_dataset(recipe, config, build_encoders(config), manifest, side="train")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["backbone=separate"], "backbone=separate: no block sees several modalities; set it to shared"),
        (["objective.mask_ratio={image: 0.5, audio: 1.5}"], "objective.mask_ratio=.*between 0 and 1"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(folder: Path, settings: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        train("toy.yaml", "run", settings)
