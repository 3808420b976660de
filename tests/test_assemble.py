"""From a recipe to parts: what is resolved, what is exported, and which clips go together."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmssl import distributed
from mmssl.assemble import finetune, pretrain, train
from mmssl.build import build_encoder, build_frontend, build_objective
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.embed import load as load_encoder
from mmssl.loading import build_augment, build_plan
from mmssl.objectives.mae import MAE
from mmssl.recipe import Recipe, RecipeError, load, parse
from mmssl.resolve import resolve
from mmssl.tasks.evaluate import evaluate
from mmssl.training.checkpoint import read_encoder, read_tensors
from mmssl.types import BadClip, Batch, Loss, Raw
from mmssl.validation import Validation

TOY = ["transformer.dim=16", "transformer.depth=2", "transformer.heads=2"]
TOY += ["data.batch_size=4", "data.workers=0", "trainer.steps=2", "trainer.eval_every=2", "schedule.warmup=0"]
MEDIA = {"seen": "image", "heard": "audio"}
DECODER = ["objective.decoder_dim=16", "objective.decoder_depth=1", "objective.decoder_heads=2"]


@pytest.fixture(scope="session")
def image_rows(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a manifest of the pictures of a split, each row changed by a function."""
    folder = tmp_path_factory.mktemp("rows")

    def write(split: str, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row) -> Path:
        path = folder / f"{split}_{len(list(folder.iterdir()))}.jsonl"
        files = sorted((pictures / split).rglob("*.png"))
        write_manifest(path, [change({"image": str(file), "label": file.parent.name}) for file in files])
        return path

    return write


def mae(image_rows: Callable[..., Path], *overrides: str) -> Recipe:
    data = [f"data.train={image_rows('train')}", f"data.valid={image_rows('test')}"]
    return load("small/mae_image", [*data, *TOY, *DECODER, *overrides])


def classify(image_rows: Callable[..., Path], *overrides: str) -> Recipe:
    data = [f"data.train={image_rows('train')}", f"data.valid={image_rows('test')}"]
    return load("small/classify_image", [*data, *TOY, *overrides])


@pytest.fixture(scope="session")
def run(image_rows: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(
        mae(image_rows, "transformer.dropout=0.3", "transformer.drop_path=0.2"), tmp_path_factory.mktemp("run")
    )


def test_a_resolved_recipe_says_everything_and_resolves_to_itself(image_rows: Callable[..., Path]) -> None:
    resolved = resolve(mae(image_rows))
    assert resolved.get("transformer.norm") == "pre"
    assert resolved.get("data.max_bad_share") == 0.01
    assert resolved.get("objective.target") == "normalized_pixels"
    again = resolve(parse(resolved.dump(), source="again.yaml"))
    assert again.values == resolved.values


def test_what_is_exported_is_all_it_takes_to_build_the_encoder(run: Path) -> None:
    config, tensors, head = read_encoder(run)
    encoder = build_encoder(config)
    encoder.load_state_dict(tensors)
    # the decoder too, by which the run shows what it makes of hidden patches
    objective = build_objective(config, encoder)
    assert set(head) == {name for name in objective.state_dict() if not name.startswith("encoder.")}
    assert config["classes"] is None
    assert json.loads((run / "config.json").read_text()) == config
    found = load_encoder(run).embed(torch.rand(2, 1, 16, 16))
    assert found.scene.shape == (2, 16)


def test_evaluation_leaves_pictures(run: Path) -> None:
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["README.txt", "update_2.png"]
    assert "rows, from the top: input, masked, reconstruction" in (run / "pictures" / "README.txt").read_text()


@pytest.mark.parametrize(
    ("recipe", "clips", "rows", "settings"),
    [
        ("small/denoise_image", "seen", "input, noisy, reconstruction", DECODER),
        (
            "small/cae_image",
            "seen",
            "input, masked, reconstruction",
            [f"objective.{part}_{size}" for part in ("regressor", "decoder") for size in ("depth=1", "heads=2")],
        ),
        ("small/tera_speech", "heard", "input, altered, reconstruction", []),
    ],
)
def test_other_objectives_that_reconstruct_leave_pictures_too(
    request: pytest.FixtureRequest, tmp_path: Path, recipe: str, clips: str, rows: str, settings: list[str]
) -> None:
    files = request.getfixturevalue(clips)
    data = [f"data.train={files['train']}", f"data.valid={files['test']}"]
    run = pretrain(load(recipe, [*data, *TOY, *settings]), tmp_path / "run")
    assert (run / "pictures" / "update_2.png").is_file()
    assert f"rows, from the top: {rows}" in (run / "pictures" / "README.txt").read_text()
    # and with what is exported afterwards
    (shown,) = load_encoder(run).reconstruct([json.loads(files["test"].read_text().splitlines()[0])[MEDIA[clips]]])
    assert shown is not None
    assert ", ".join(shown).startswith(rows)


def test_every_checkpoint_leaves_an_encoder(
    image_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: Validation, step: int) -> dict[str, float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Validation, "__call__", die)
    with pytest.raises(KeyboardInterrupt):
        train(mae(image_rows, "trainer.save_every=1"), tmp_path / "run")
    saved = read_tensors(tmp_path / "run" / "checkpoints" / "step_1" / "model.safetensors")
    exported = read_encoder(tmp_path / "run")[1]
    assert all(torch.equal(tensor, saved[f"encoder.{name}"]) for name, tensor in exported.items())


def test_fine_tuning_keeps_the_encoder_and_takes_the_rates(
    run: Path, image_rows: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = resolve(load("small/classify_image", [f"init={run}", "transformer.dropout=0.5", "data.train=x"]))
    assert recipe.get("transformer.dim") == 16
    assert recipe.get("transformer.dropout") == 0.5
    # left out of the recipe: the default, not the 0.2 of pretraining; the recipe's own is 0.1
    assert resolve(load("small/classify_image", [f"init={run}", "data.train=x"])).get("transformer.drop_path") == 0.1
    assert recipe.get("transformer.attention_dropout") == 0.0


def test_settings_that_are_newer_than_the_pretrained_run_are_at_their_default(run: Path, tmp_path: Path) -> None:
    config = read_encoder(run)[0]
    del config["transformer"]["bias"]
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    recipe = resolve(load("small/classify_image", [f"init={tmp_path / 'older'}", "data.train=x"]))
    assert recipe.values["transformer"]["bias"] is None
    # so what a run keeps of its recipe can be read again, to go on
    assert resolve(recipe).values == recipe.values


def test_fine_tuning_starts_from_the_pretrained_weights(
    run: Path, image_rows: Callable[..., Path], tmp_path: Path
) -> None:
    plain = [name for name in TOY if not name.startswith("transformer")]
    data = [f"data.train={image_rows('train')}", f"init={run}", "objective.freeze_encoder=true"]
    tuned = finetune(load("small/classify_image", [*data, *plain]), tmp_path / "tuned")
    before, after = read_encoder(run)[1], read_encoder(tuned)[1]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_encoder(tuned)[2]


def test_a_run_of_several_labels_a_clip_is_trained_measured_and_asked(
    run: Path, image_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """From manifest to answers, with blocks that begin one by one and a head on weighted layers."""
    average_precision_score = pytest.importorskip("sklearn.metrics").average_precision_score

    def tag(row: dict[str, Any]) -> dict[str, Any]:
        number = int(Path(row["image"]).stem)
        return {**row, "label": [*([row["label"]] if number % 5 else []), *(["bright"] if number > 7 else [])]}

    train_rows, test_rows = image_rows("train", tag), image_rows("test", tag)
    settings = ["multi_label=true", "label_smoothing=0", "weighted_layers=true", "unfreeze_every=2"]
    tuned = finetune(
        load(
            "small/classify_image",
            [
                f"data.train={train_rows}",
                f"data.valid={test_rows}",
                f"init={run}",
                "data.batch_size=4",
                "data.workers=0",
            ]
            + ["trainer.steps=3", "trainer.eval_every=3", "trainer.threads=1", "schedule={name: constant}"]
            + [f"objective.{setting}" for setting in settings],
        ),
        tmp_path / "tuned",
    )
    # of two blocks the last began with the first update, the other with the third, and nothing before them did
    before, after = read_encoder(run)[1], read_encoder(tuned)[1]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("transformer.blocks.")}
    assert read_encoder(tuned)[0]["classes"] == ["bright", "checks", "stripes"]

    embedder = load_encoder(tuned, device="cpu")
    found = embedder.probabilities(test_rows)
    labels = list(Manifest(test_rows).values("label"))
    truth = [[name in names for name in ("bright", "checks", "stripes")] for names in labels]
    score = evaluate(tuned, task="classify", test=test_rows)["map"]
    assert score.value == pytest.approx(average_precision_score(truth, found.numpy(), average="macro"))

    # the objective as training left it says the same
    config = read_encoder(tuned)[0]
    objective: Any = build_objective(config, build_encoder(config))
    objective.load_state_dict(read_tensors(tuned / "checkpoints" / "step_3" / "model.safetensors"))
    assert objective.layer_weights.scores.any()
    files = [row["image"] for row in Manifest(test_rows)]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file), np.float32) / 255)[None] for file in files])
    raw = Raw(pixels, torch.ones(len(files), dtype=torch.int64), files)
    with torch.no_grad():
        own = objective.eval().predict(Batch({"image": raw}, torch.zeros(len(files), dtype=torch.int64))).sigmoid()
    torch.testing.assert_close(found, own)
    for threshold in (0.5, float(own.median())):
        expected = [
            sorted((name for name, p in zip(config["classes"], row, strict=True) if p > threshold)) for row in found
        ]
        assert [sorted(said or []) for said in embedder.predict(files, threshold=threshold)] == expected
    assert embedder.predict(files) == embedder.predict(files, threshold=0.5)


def test_labels_are_those_of_the_training_manifest(image_rows: Callable[..., Path], tmp_path: Path) -> None:
    odd = image_rows("test", lambda row: {**row, "label": "dots"})
    recipe = classify(image_rows, f"data.valid={odd}")
    with pytest.raises(ValueError, match=rf"{odd}:1: the label 'dots' is not among the 2 classes \(checks, stripes\)"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()  # before the first update
    some = image_rows("test", lambda row: {**row, "label": row["label"] if "0" in row["image"] else "dots"})
    skipping = classify(image_rows, f"data.valid={some}", "data.on_bad_clip=skip", "data.max_bad_share=1")
    train(skipping, tmp_path / "skipping")
    bare = image_rows("train", lambda row: {"image": row["image"]})
    with pytest.raises(ValueError, match=f"{bare}:1: the row has no 'label'"):
        train(classify(image_rows, f"data.train={bare}"), tmp_path / "other")
    for label, way in ((None, "text or a number"), (["a", "b"], "text or a number; a list of them takes obj")):
        none = image_rows("train", lambda row, label=label: {**row, "label": label})
        with pytest.raises(ValueError, match=rf"{none}:1: the label .* is no class: it must be {way}"):
            train(classify(image_rows, f"data.train={none}"), tmp_path / "other")


def test_what_a_schedule_comes_to_is_seen_before_the_first_update(
    image_rows: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = classify(image_rows, "schedule={name: polynomial, final: -0.1}")
    with pytest.raises(RecipeError, match=r"schedule: would multiply the rate by -0.1 at update \d+; it must be"):
        train(recipe, tmp_path / "run")


def rewrite(manifest: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in change(rows)), encoding="utf-8")


def notes(run: Path) -> list[str]:
    said = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["note"] for line in said if "not to the bit" in line.get("note", "")]


def test_a_run_goes_on_with_the_classes_that_it_began_with(image_rows: Callable[..., Path], tmp_path: Path) -> None:
    recipe = classify(image_rows, "objective.class_weights=balanced", "data.valid=null")
    rows, folder = Path(recipe.get("data.train")), tmp_path / "run"
    whole = rows.read_text(encoding="utf-8")
    train(recipe, folder)
    config = (folder / "config.json").read_bytes()
    assert json.loads(config)["classes"] == ["checks", "stripes"]

    rewrite(rows, lambda rows: [{**row, "label": row["label"].replace("checks", "zigzag")} for row in rows])
    with pytest.raises(RecipeError, match=r"data.train: 'zigzag' is not in the classes that the run in .* began with"):
        train(recipe, folder)
    assert (folder / "config.json").read_bytes() == config

    # without clips of one class the other keeps its number, and its weight
    rewrite(rows, lambda rows: [row for row in map(json.loads, whole.splitlines()) if row["label"] == "stripes"])
    train(recipe, folder)
    assert (folder / "config.json").read_bytes() == config
    [note] = notes(folder)
    assert re.search(r"because of data\.train 12 rows \(\w{16}\) -> 6 rows \(\w{16}\)$", note)

    # a folder without a checkpoint is begun with the classes of now
    shutil.rmtree(folder / "checkpoints")
    rows.write_text(whole.replace('"label": "checks"', '"label": "zigzag"'), encoding="utf-8")
    train(recipe, folder)
    assert json.loads((folder / "config.json").read_text())["classes"] == ["stripes", "zigzag"]


def test_a_run_goes_on_with_the_characters_that_it_began_with(sounds: Path, tmp_path: Path) -> None:
    files = sorted((sounds / "train").rglob("*.wav"))
    rows = [{"audio": str(file), "seconds": 0.7, "text": file.parent.name} for file in files]
    write_manifest(tmp_path / "train.jsonl", rows)
    sizes = ["positions.kernel=4", "objective.mask_prob=0", "data.max_seconds=null"]
    settings = [f"data.train={tmp_path / 'train.jsonl'}", *sizes, *TOY[:-1]]
    folder = train("small/ctc_speech", tmp_path / "run", settings)
    config = (folder / "config.json").read_bytes()
    assert json.loads(config)["vocabulary"] == ["<blank>", "|", *"ghilow"]
    rewrite(tmp_path / "train.jsonl", lambda rows: [{**row, "text": "hi"} for row in rows])
    train("small/ctc_speech", folder, settings)
    assert (folder / "config.json").read_bytes() == config
    rewrite(tmp_path / "train.jsonl", lambda rows: [{**row, "text": "haé"} for row in rows])
    with pytest.raises(RecipeError, match=r"data.train: 'a' \(and 1 more\) is not in the vocabulary that the run in"):
        train("small/ctc_speech", folder, settings)


def test_a_run_whose_folders_were_moved_says_nothing_of_other_data(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    shutil.copytree(pictures / "train", here / "clips")
    files = sorted((here / "clips").rglob("*.png"))
    write_manifest(here / "train.jsonl", [{"id": file.name, "image": str(file)} for file in files])
    write_manifest(here / "lists" / "train.jsonl", [{"id": file.name, "image": str(file)} for file in files])
    monkeypatch.chdir(here)
    settings = [*TOY, *DECODER, "trainer.eval_every=0"]
    for manifest, run in (("train.jsonl", "run"), ("lists/train.jsonl", "other")):
        train("small/mae_image", run, [f"data.train={manifest}", *settings])
    there = tmp_path / "there"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(here, there)
    shutil.rmtree(here)
    monkeypatch.chdir(there)
    for manifest, run in (("train.jsonl", "run"), ("lists/train.jsonl", "other")):
        text = Path(manifest).read_text(encoding="utf-8")
        Path(manifest).write_text(text.replace(str(here), str(there)), encoding="utf-8")  # paths that are no longer
        train("small/mae_image", run, [f"data.train={manifest}", *settings])
        assert not notes(Path(run))
    rewrite(Path("train.jsonl"), lambda rows: rows[::-1])
    train("small/mae_image", "run", ["data.train=train.jsonl", *settings])
    assert "because of data.train 12 rows" in notes(Path("run"))[0]


def test_a_run_goes_on_with_the_same_rows_wherever_its_manifest_is_now(pictures: Path, tmp_path: Path) -> None:
    files = sorted((pictures / "train").rglob("*.png"))
    rows = [{"id": file.name, "image": str(file)} for file in files]
    paths = {name: tmp_path / name / "train.jsonl" for name in ("old", "new", "other")}
    run, settings = tmp_path / "run", [*TOY, *DECODER, "trainer.eval_every=0"]

    def go_on(name: str, *overrides: str) -> None:
        train("small/mae_image", run, [f"data.train={paths[name]}", *settings, *overrides])

    write_manifest(paths["old"], rows)
    go_on("old")
    paths["new"].parent.mkdir()
    paths["old"].rename(paths["new"])
    go_on("new")
    assert not notes(run)
    assert str(paths["new"]) in (run / "recipe.yaml").read_text()
    write_manifest(paths["other"], rows[::-1])
    with pytest.raises(RecipeError, match=r"holds another run, in which data\.train is '.*new/train\.jsonl'"):
        go_on("other")
    with pytest.raises(RecipeError, match=r"holds another run, in which trainer\.seed is 0 and not 1"):
        go_on("new", "trainer.seed=1")
    shutil.rmtree(run / "checkpoints")  # nothing says what it was trained on
    write_manifest(paths["old"], rows)
    with pytest.raises(RecipeError, match=r"holds another run, in which data\.train is"):
        go_on("old")


def test_validation_does_not_depend_on_batches(image_rows: Callable[..., Path], tmp_path: Path) -> None:
    lines = []
    for size in (1, 3, 4):
        recipe = classify(image_rows, f"data.batch_size={size}", "optimizer.lr=1e-12", "optimizer.weight_decay=0")
        folder = train(recipe, tmp_path / str(size))
        lines.append(json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["evaluation"])
    for line in lines[1:]:
        assert line["loss"] == pytest.approx(lines[0]["loss"], rel=1e-5)
        assert line["accuracy"] == lines[0]["accuracy"]


def test_error_rates_while_training_are_those_of_the_command(sounds: Path, tmp_path: Path) -> None:
    def rows(split: str, strange: str) -> Path:
        files = sorted((sounds / split).rglob("*.wav"))
        texts = [strange, *[file.parent.name for file in files[1:]]]
        path = tmp_path / f"{split}.jsonl"
        pairs = zip(files, texts, strict=True)
        write_manifest(path, [{"audio": str(file), "seconds": 0.7, "text": text} for file, text in pairs])
        return path

    # the second word has a character that no training text has: no loss, and a word that is wrong
    data = [f"data.train={rows('train', 'low')}", f"data.valid={rows('test', 'low z')}", "data.on_bad_clip=skip"]
    sizes = ["positions.kernel=4", "objective.mask_prob=0", "data.max_seconds=null", "optimizer.lr=0.01"]
    # as the command computes: in bfloat16 two characters that are nearly as likely change places
    sizes.append("trainer.precision=float32")
    folder = train("small/ctc_speech", tmp_path / "run", [*data, *sizes, *TOY[:-1], "trainer.steps=2"])
    while_training = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["evaluation"]
    scores = evaluate(folder, task="ctc", test=tmp_path / "test.jsonl")
    assert scores["wer"].details["words"] == 5
    assert while_training["wer"] == scores["wer"].value
    assert while_training["cer"] == scores["cer"].value
    assert while_training["unspelled"] == 1 / 4
    assert not (folder / "bad_clips.jsonl").exists()


def test_held_out_texts_that_share_an_id_are_refused(sounds: Path, tmp_path: Path) -> None:
    def rows(name: str, ids: Sequence[str], texts: Sequence[str]) -> Path:
        path, file = tmp_path / f"{name}.jsonl", str(next(sounds.rglob("*.wav")))
        pairs = zip(ids, texts, strict=True)
        write_manifest(path, [{"id": id, "audio": file, "seconds": 0.7, "text": text} for id, text in pairs])
        return path

    train_rows, valid = rows("train", "aa", ["low", "high"]), rows("valid", "aba", ["low", "high", "high"])
    with pytest.raises(ValueError, match=f"{valid}:3: a row before it has the same id, a, and another text"):
        train("small/ctc_speech", tmp_path / "run", [f"data.train={train_rows}", f"data.valid={valid}", *TOY[:-1]])
    assert not (tmp_path / "run").exists()


def test_a_stopped_run_can_be_used_and_goes_on_with_other_practical_settings(
    image_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [f"data.train={image_rows('train')}", f"data.valid={image_rows('test')}"]
    command = [*data, *TOY, *DECODER, "trainer.steps=4"]
    whole = train("small/mae_image", tmp_path / "whole", command)

    def interrupt(self: Validation, step: int) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    cut = tmp_path / "cut"
    monkeypatch.setattr(Validation, "__call__", interrupt)
    with pytest.raises(SystemExit) as end:
        train("small/mae_image", cut, [*command, "data.cache=false", "trainer.log_every=1"])
    monkeypatch.undo()
    assert end.value.code == 0
    assert (cut / "checkpoints" / "latest").read_text().strip() == "step_2"
    half = (cut / "encoder.safetensors").read_bytes()
    train("small/mae_image", cut, command)
    assert half != (cut / "encoder.safetensors").read_bytes() == (whole / "encoder.safetensors").read_bytes()


def test_a_run_goes_on_with_settings_that_are_newer_than_it(image_rows: Callable[..., Path], tmp_path: Path) -> None:
    folder = train(mae(image_rows, "transformer.activation=gelu"), tmp_path / "run")
    saved = folder / "recipe.yaml"
    text = saved.read_text(encoding="utf-8")
    older = re.sub(r"(?m)^ +activation: gelu\n", "", text)
    assert older != text
    saved.write_text(older, encoding="utf-8")
    data = load(saved).get("data.train")
    assert train(mae(image_rows, f"data.train={data}"), folder) == folder
    saved.write_text(older, encoding="utf-8")
    with pytest.raises(RecipeError, match="another run, in which transformer.activation is 'gelu' and"):
        train(mae(image_rows, f"data.train={data}", "transformer.activation=quick_gelu"), folder)


@pytest.mark.parametrize(
    ("saved", "sentence"),
    [
        (b"modality: image\nobjectiv: {name: mae}\n", "recipe.yaml"),
        (b"modality: [image\n", "recipe.yaml"),
        (b"\xff\xfe\x00", "its recipe cannot be read"),
    ],
)
def test_a_saved_recipe_that_is_broken_is_told_to_all_processes_before_any_of_them_ends(
    saved: bytes,
    sentence: str,
    image_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "recipe.yaml").write_bytes(saved)
    recipe, told = mae(image_rows), []
    monkeypatch.setattr(distributed, "broadcast_text", lambda text: told.append(text) or text)
    with pytest.raises(RecipeError, match=sentence) as main:
        pretrain(recipe, tmp_path)
    assert len(told) == 1
    # another process, which does not look, and gets what the main one sent
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "broadcast_text", lambda text: told[0])
    with pytest.raises(RecipeError) as other:
        pretrain(recipe, tmp_path)
    assert str(other.value) == str(main.value)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_folder_without_a_checkpoint_is_begun_again_by_the_same_command_alone(
    image_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml.tmp").write_text("modality: im")  # killed as it began
    (folder / "lock").touch()
    recipe = mae(image_rows)

    def die(self: Validation, step: int) -> dict[str, float]:
        raise SystemError("killed")

    monkeypatch.setattr("mmssl.training.loop._Run.save", lambda self: folder)
    monkeypatch.setattr(Validation, "__call__", die)
    with pytest.raises(SystemError, match="killed"):
        train(recipe, folder)
    monkeypatch.undo()
    assert (folder / "recipe.yaml").is_file()
    sentence = "seed is 0 and not 1; it has no checkpoint, so unless it is still running there is nothing in it worth"
    with pytest.raises(RecipeError, match=sentence):
        train(mae(image_rows, "trainer.seed=1", f"data.train={recipe.get('data.train')}"), folder)
    train(recipe, folder)
    with pytest.raises(RecipeError, match="seed is 0 and not 1; choose another folder with --out, or remove this one"):
        train(mae(image_rows, "trainer.seed=1", f"data.train={recipe.get('data.train')}"), folder)


def test_settings_that_do_not_fit_are_placed(image_rows: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="command line 'transformer.heads=5': transformer.heads=5: must divide"):
        train(mae(image_rows, "transformer.heads=5"), tmp_path / "run")
    with pytest.raises(
        RecipeError, match="command line 'trainer.accumulate=0': trainer.accumulate=0: must be at least 1"
    ):
        train(mae(image_rows, "trainer.accumulate=0"), tmp_path / "run")
    with pytest.raises(RecipeError, match="unknown augment.train.0.name 'flop'. Did you mean 'flip'"):
        train(mae(image_rows, "augment.train=[{name: flop}]"), tmp_path / "run")
    with pytest.raises(RecipeError, match="unknown key 'augment.trian'. Did you mean 'augment.train'"):
        train(mae(image_rows, "augment.trian=[]"), tmp_path / "run")
    with pytest.raises(RecipeError, match="unknown objective.target 'pixel'"):
        train(mae(image_rows, "objective.target=pixel"), tmp_path / "run")
    with pytest.raises(RecipeError, match="micro-batches have no bound: set data.batch_size"):
        train(mae(image_rows, "data.batch_size=null"), tmp_path / "run")
    for setting in ("batch_size=0", "workers=-1", "max_seconds=0", "max_bad_share=2"):
        with pytest.raises(RecipeError, match=f"^command line 'data.{setting}': data.{setting}: must be "):
            train(mae(image_rows, f"data.{setting}"), tmp_path / "run")
    with pytest.raises(RecipeError, match="^command line 'trainer.seed=-1': trainer.seed=-1: must be at least 0"):
        train(mae(image_rows, "trainer.seed=-1"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def of_sizes(folder: Path, sizes: Sequence[tuple[int, int]], *, stated: bool) -> Path:
    """A manifest of gray pictures of (height, width)."""
    rows: list[dict[str, Any]] = []
    for number, (height, width) in enumerate(sizes):
        path = folder / f"{number}.png"
        Image.fromarray(np.full((height, width), 9 * number, np.uint8)).save(path)
        rows.append({"image": str(path)} | ({"height": height, "width": width} if stated else {}))
    write_manifest(folder / "sizes.jsonl", rows)
    return folder / "sizes.jsonl"


def test_pictures_of_several_sizes_are_found_before_the_first_update(tmp_path: Path) -> None:
    path = of_sizes(tmp_path, [(16, 16), (16, 16), (8, 16)], stated=True)

    def go(name: str, *overrides: str) -> Path:
        recipe = load("small/mae_image", [f"data.train={path}", *TOY, *DECODER, "trainer.eval_every=0", *overrides])
        return train(recipe, tmp_path / name)

    sentence = (
        r"augment.train leaves 0.png at 16 x 16 pixels and 2.png \(.*sizes.jsonl:3\) at 8 x 16, but a batch holds .* "
        "add for example a resize and a center_crop, or set data.batch_size to 1"
    )
    with pytest.raises(RecipeError, match=sentence):
        go("refused", "augment.train=[]")
    with pytest.raises(RecipeError, match="leaves 0.png at 32 x 32 pixels and 2.png .* at 32 x 64"):
        go("refused", "augment.train=[{name: resize, size: 32}]")
    assert not (tmp_path / "refused").exists()
    go("resized", "augment.train=[{name: resize, size: [16, 16]}]")
    go("cropped", "augment.train=[{name: resize, size: 16}, {name: center_crop, size: 16}, {name: flip}]")
    go("alone", "augment.train=[]", "data.batch_size=1")


def test_a_picture_of_another_size_than_the_first_is_a_bad_clip(tmp_path: Path) -> None:
    path = of_sizes(tmp_path, [(1, 1), (16, 16), (16, 16), (8, 16), (16, 16)], stated=False)
    data = [f"data.train={path}", *TOY, *DECODER, "trainer.eval_every=0", "augment.train=[]", "trainer.log_every=1"]
    with pytest.raises(
        BadClip, match=r"(0.png: 1 x 1 pixels are not|3.png: 8 x 16 pixels, where the first) .* \(at .*sizes"
    ):
        train(load("small/mae_image", data), tmp_path / "stopped")
    run = train(load("small/mae_image", [*data, "data.on_bad_clip=skip", "data.max_bad_share=0.5"]), tmp_path / "run")
    bad = [json.loads(line) for line in (run / "bad_clips.jsonl").read_text().splitlines()]
    assert {row["id"] for row in bad} == {"0.png", "3.png"}
    notes = [row["note"] for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "note" in row]
    assert notes[-1] == f"{path}: 2 of 5 clips could not be read so far; they are named in {run / 'bad_clips.jsonl'}"


@pytest.fixture
def speech_rows(tmp_path: Path) -> Path:
    """Three clips of 1, 4 and 9 s that no test reads."""
    path = tmp_path / "speech.jsonl"
    write_manifest(path, [{"audio": f"{seconds}.wav", "seconds": seconds} for seconds in (1.0, 4.0, 9.0)])
    return path


def test_crops_bound_what_a_clip_adds_to_a_batch(speech_rows: Path) -> None:
    def lengths(*overrides: str) -> list[float]:
        recipe = resolve(load("small/wav2vec2_speech", [f"data.train={speech_rows}", *overrides]))
        return build_plan(recipe, Manifest(speech_rows), side="train").lengths.tolist()

    assert lengths("augment.train=[]") == [1.0, 4.0, 9.0]
    assert lengths("augment.train=[{name: random_crop, seconds: 3}]") == [1.0, 3.0, 3.0]
    # played at 0.8 of its speed, a second takes 1.25; and a crop is made longer by what follows it
    speed, crop = "{name: speed, factors: [0.8, 2]}", "{name: center_crop, seconds: 4}"
    assert lengths(f"augment.train=[{speed}]") == pytest.approx([1.25, 5.0, 11.25])
    assert lengths(f"augment.train=[{speed}, {crop}]") == pytest.approx([1.25, 4.0, 4.0])
    assert lengths(f"augment.train=[{crop}, {speed}]") == pytest.approx([1.25, 5.0, 5.0])
    with pytest.raises(
        RecipeError,
        match=r"command line 'data.max_seconds=5': data.max_seconds=5: 1 of 3 clips are longer than a whole",
    ):
        lengths("augment.train=[]", "data.max_seconds=5")


def test_augmentations_get_the_rate_of_the_frontend(speech_rows: Path) -> None:
    recipe = resolve(load("small/wav2vec2_speech", [f"data.train={speech_rows}", "frontend.rate=8000"]))
    frontend = build_frontend(recipe.values, dim=1)
    augment = build_augment([{"name": "random_crop", "seconds": 0.5}], "speech", frontend)
    assert augment(torch.zeros(16_000), np.random.default_rng(0)).shape == (4_000,)
    with pytest.raises(RecipeError, match="unknown key 'augment.train.0.rate'. Keys here: seconds"):
        resolve(load("small/wav2vec2_speech", ["augment.train=[{name: random_crop, seconds: 1, rate: 8000}]"]))


def test_a_stages_teacher_is_the_encoder_of_the_run_before(
    run: Path, image_rows: Callable[..., Path], tmp_path: Path
) -> None:
    def stage(*overrides: str) -> Recipe:
        data = [f"data.train={image_rows('train')}", f"data.valid={image_rows('test')}"]
        return load("small/dbot_image", [*data, *TOY, *DECODER, "trainer.save_every=2", *overrides])

    def saved(folder: Path) -> dict[str, torch.Tensor]:
        return read_tensors(folder / "checkpoints" / "step_2" / "model.safetensors")

    before = read_encoder(run)[1]
    second = saved(pretrain(stage(f"objective.teacher={run}"), tmp_path / "second"))
    assert all(torch.equal(second[f"teacher.module.{name}"], tensor) for name, tensor in before.items())
    first = saved(pretrain(stage(), tmp_path / "first"))
    name = "frontend.project.weight"
    assert not torch.equal(first[f"teacher.module.{name}"], before[name])
    # student and teacher are two draws of random weights
    assert (first[f"teacher.module.{name}"] - first[f"encoder.{name}"]).abs().max() > 0.1
    with pytest.raises(RecipeError, match=r"nowhere: no such folder"):
        pretrain(stage(f"objective.teacher={tmp_path / 'nowhere'}"), tmp_path / "third")


def test_views_are_named_where_a_modality_has_some(image_rows: Callable[..., Path], tmp_path: Path) -> None:
    data = [f"data.train={image_rows('train')}", "data.valid=null", *TOY, *DECODER]
    settings = "objective={name: siam_mae, target: normalized_pixels, views: crops, mask_ratio: 0.9}"
    assert (pretrain(load("small/mae_image", [settings, *data]), tmp_path / "run") / "encoder.safetensors").is_file()
    with pytest.raises(RecipeError, match="unknown objective.views 'frames'.* Known: crops"):
        resolve(load("small/mae_image", [settings.replace("crops", "frames"), *data]))
    sound = settings.replace("normalized_pixels", "log_mel").replace(", views: crops", "")
    with pytest.raises(RecipeError, match="two views of a clip, and there are none for LogMel"):
        pretrain(load("small/tera_speech", [sound, *data]), tmp_path / "none")


def test_a_run_over_a_folder_of_which_a_third_is_broken_uses_every_good_clip(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted((sounds / "train").rglob("*.wav"))[:12]
    rows = []
    for number, file in enumerate(files):
        content = file.read_bytes()
        broken = {0: b"", 3: b"<html>", 7: content[:30], 10: None}.get(number, content)
        if broken is not None:
            (tmp_path / f"{number}.wav").write_bytes(broken)
        rows.append({"audio": str(tmp_path / f"{number}.wav"), "seconds": 0.6, "id": str(number)})
    write_manifest(tmp_path / "train.jsonl", rows)
    seen: set[str] = set()
    forward = MAE.forward

    def watched(self: MAE, batch: Batch) -> Loss:
        seen.update(batch.ids)
        return forward(self, batch)

    monkeypatch.setattr(MAE, "forward", watched)
    settings = [f"data.train={tmp_path / 'train.jsonl'}", "data.on_bad_clip=skip", "data.max_bad_share=0.34"]
    toy = [*TOY, *DECODER, "frontend.rate=8000", "trainer.eval_every=0", "trainer.steps=3"]  # an epoch is 3 updates
    folder = pretrain(load("small/mae_audio", [*settings, *toy]), tmp_path / "run")
    bad = [json.loads(line) for line in (folder / "bad_clips.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in bad) == ["0", "10", "3", "7"]
    assert all(row["reason"] and row["path"] == str(tmp_path / f"{row['id']}.wav") for row in bad)
    assert seen == {str(number) for number in range(12)} - {"0", "3", "7", "10"}
