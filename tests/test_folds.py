"""Cross-validation over the values of a key."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mmssl
from mmssl.cli import app
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.folds import cross_validate
from mmssl.recipe import load

RECIPE = """
modality: image
frontend: {name: patches, size: [4, 4]}
positions: {name: sincos}
transformer: {dim: 8, depth: 1, heads: 2}
objective: {name: classify, class_weights: balanced}
data: {batch_size: 4}
optimizer: {lr: 0.02}
schedule: {name: constant}
trainer: {steps: 20, device: cpu, threads: 1}
"""


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Dark and bright pictures in three folds; in the third of them the labels are the wrong way round."""
    rows = []
    for i in range(12):
        fold, bright = i % 3, i // 3 % 2
        shade = (40, 210)[bright] + i
        Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(tmp_path / f"{i}.png")
        label = ("dark", "bright")[bright if fold < 2 else 1 - bright]
        rows.append({"id": f"clip {i}", "image": str(tmp_path / f"{i}.png"), "label": label, "fold": 10 * fold})
    write_manifest(tmp_path / "all.jsonl", rows)
    (tmp_path / "toy.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path / "all.jsonl"


def test_each_fold_is_tested_by_a_run_that_never_saw_it(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", str(tmp_path / "toy.yaml"), f"data.train={manifest}", "--folds", "fold"]
    with pytest.raises(SystemExit) as ended:
        app([*command, "--out", str(tmp_path / "runs")])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for number, fold in enumerate((0, 10, 20), start=1):
        parts = {
            side: Manifest(tmp_path / "runs" / "manifests" / f"{number}_{side}.jsonl") for side in ("train", "test")
        }
        assert {row["fold"] for row in parts["test"]} == {fold}
        assert sorted(row["id"] for part in parts.values() for row in part) == sorted(
            row["id"] for row in Manifest(manifest)
        )
        # what was trained can be asked at once
        files = [row["image"] for row in parts["test"]]
        assert set(mmssl.load(tmp_path / "runs" / str(number), device="cpu").predict(files)) <= {"dark", "bright"}
        assert f"fold={fold}: classify: accuracy" in said
    scores = json.loads((tmp_path / "runs" / "scores.json").read_text())
    values = [scores[f"fold={fold}"]["accuracy"]["value"] for fold in (0, 10, 20)]
    whole = scores["all"]["accuracy"]
    assert whole["details"] == {"folds": dict(zip(("0", "10", "20"), values, strict=True))}
    assert whole["value"] == pytest.approx(sum(values) / 3)
    assert whole["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert whole["n"] == 12
    assert values[2] == 0.0  # what is the wrong way round can only be told wrongly by the two others


def test_folds_that_are_none_are_said_in_a_sentence(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(tmp_path / "toy.yaml", [f"data.train={manifest}"])
    with pytest.raises(ValueError, match=r"all.jsonl:1: the row has no 'speaker', only fold, id, image, label"):
        next(cross_validate(recipe, "speaker", tmp_path / "runs"))
    rows = [{**row, "fold": 1} for row in Manifest(manifest)]
    write_manifest(tmp_path / "one.jsonl", rows)
    with pytest.raises(ValueError, match=r"folds=fold: all rows of .*one.jsonl have '1'; it takes two or more"):
        next(cross_validate(load(tmp_path / "toy.yaml", [f"data.train={tmp_path / 'one.jsonl'}"]), "fold"))
    unlabelled = [f"data.train={manifest}", "objective={name: mae, target: pixels}"]
    with pytest.raises(ValueError, match="folds=fold: tests what a run says, so take ctc or classify"):
        next(cross_validate(load(tmp_path / "toy.yaml", unlabelled), "fold"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="folds=fold: folds are trained one by one, in one process"):
        next(cross_validate(recipe, "fold"))


def test_a_class_that_one_fold_alone_has_is_refused_before_any_is_trained(manifest: Path, tmp_path: Path) -> None:
    rows = [{**row, "label": "rare"} if row["id"] == "clip 4" else row for row in Manifest(manifest)]
    write_manifest(tmp_path / "rare.jsonl", rows)
    recipe = load(tmp_path / "toy.yaml", [f"data.train={tmp_path / 'rare.jsonl'}"])
    with pytest.raises(ValueError, match=r"rare.jsonl:5: the label 'rare' is in fold=10 alone, so no run that is"):
        next(cross_validate(recipe, "fold", tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_runs_are_never_tested_on_clips_that_they_learned_from(manifest: Path, tmp_path: Path) -> None:
    rows = [{**row, "speaker": i // 4} for i, row in enumerate(Manifest(manifest))]
    write_manifest(manifest, rows)
    recipe = load(tmp_path / "toy.yaml", [f"data.train={manifest}", "trainer.steps=1"])
    first = dict(cross_validate(recipe, "fold", tmp_path / "runs"))
    before = (tmp_path / "runs" / "manifests" / "1_test.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"1_train.jsonl: holds folds of other clips, .* choose another --out"):
        next(cross_validate(recipe, "speaker", tmp_path / "runs"))
    # what is there stays, and the same call goes on
    assert (tmp_path / "runs" / "manifests" / "1_test.jsonl").read_bytes() == before
    assert dict(cross_validate(recipe, "fold", tmp_path / "runs")) == first
    write_manifest(manifest, [{**row, "label": "bright" if i == 0 else row["label"]} for i, row in enumerate(rows)])
    with pytest.raises(ValueError, match="holds folds of other clips"):
        next(cross_validate(recipe, "fold", tmp_path / "runs"))


def test_a_bad_clip_follows_the_recipe_in_the_test_too(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"no picture")
    settings = [f"data.train={manifest}", "trainer.steps=1"]
    with pytest.raises(ValueError, match=r"0\.png"):
        next(cross_validate(load(tmp_path / "toy.yaml", settings), "fold", tmp_path / "stopped"))
    skipped = load(tmp_path / "toy.yaml", [*settings, "data.on_bad_clip=skip"])
    scores = dict(cross_validate(skipped, "fold", tmp_path / "runs"))
    assert [scores[name]["accuracy"].n for name in ("fold=0", "fold=10", "fold=20", "")] == [3, 4, 4, 11]


def test_nothing_is_chosen_by_clips_that_are_tested_on(manifest: Path, tmp_path: Path) -> None:
    rows = list(Manifest(manifest))
    (tmp_path / "apart").mkdir()
    for row in rows[:2]:
        (tmp_path / "apart" / Path(row["image"]).name).write_bytes(Path(row["image"]).read_bytes())
    # the same names in another folder are other clips; another name in the manifest makes none of the same file
    apart = [{**row, "image": str(tmp_path / "apart" / Path(row["image"]).name)} for row in rows[:2]]
    write_manifest(tmp_path / "apart" / "valid.jsonl", apart)
    write_manifest(tmp_path / "shared.jsonl", [*apart, {**rows[5], "id": "renamed"}])
    best = ["trainer.steps=1", "trainer.eval_every=1", "trainer.best=accuracy", f"data.train={manifest}"]
    recipe = load(tmp_path / "toy.yaml", [*best, f"data.valid={tmp_path / 'shared.jsonl'}"])
    with pytest.raises(ValueError, match="data.valid.* 1 of its clips are in data.train, .* leave trainer.best out"):
        next(cross_validate(recipe, "fold", tmp_path / "runs"))
    recipe = load(tmp_path / "toy.yaml", [*best, f"data.valid={tmp_path / 'apart' / 'valid.jsonl'}"])
    assert next(cross_validate(recipe, "fold", tmp_path / "runs"))[0] == "fold=0"


def test_each_fold_starts_from_the_encoder_of_its_own(manifest: Path, tmp_path: Path) -> None:
    settings = ["objective={name: mae, target: pixels}", f"data.train={manifest}", "trainer.steps=1"]
    for fold in (0, 10):
        pretrained = load(tmp_path / "toy.yaml", [*settings, f"trainer.seed={fold}"])
        mmssl.train(pretrained, tmp_path / f"mae_{fold}")
    started = ["trainer.steps=1", f"data.train={manifest}", f"init={tmp_path}/mae_{{fold}}"]
    recipe = load(tmp_path / "toy.yaml", started)
    with pytest.raises(ValueError, match=r"init=.*mae_20: no such folder, for fold=20; pretrain"):
        next(cross_validate(recipe, "fold", tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
    mmssl.train(load(tmp_path / "toy.yaml", [*settings, "trainer.seed=20"]), tmp_path / "mae_20")
    scores = dict(cross_validate(recipe, "fold", tmp_path / "runs"))
    assert list(scores) == ["fold=0", "fold=10", "fold=20", ""]
    for number, fold in enumerate((0, 10, 20), start=1):
        assert load(tmp_path / "runs" / str(number) / "recipe.yaml").get("init") == str(tmp_path / f"mae_{fold}")
