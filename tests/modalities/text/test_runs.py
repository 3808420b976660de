"""Runs on captions: the tokenizer is a part of the run, and what was trained embeds sentences by itself."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mmssl
from mmssl.assemble import train
from mmssl.cli import app
from mmssl.data.manifest import write_manifest
from mmssl.recipe import RecipeError, load
from mmssl.resolve import resolve
from mmssl.types import BadClip

RECIPE = """# toy
modality: text
tokenizer: {name: byte_bpe, entries: 300}
frontend: {name: tokens, context: 8}
positions: {name: learned, grid: [8]}
transformer: {dim: 16, depth: 2, heads: 2, causal: true}
encoder: {}
objective: {name: classify, pooling: last}
augment: {}
data: {batch_size: 4}
optimizer: {lr: 0.001}
schedule: {name: constant}
trainer: {steps: 2, log_every: 1, device: cpu, threads: 1}
"""
ROWS = [{"text": f"a {color} {thing}", "label": color} for color in ("red", "blue") for thing in ("heart", "box")]
LONG = {"text": "a red heart and a very long tail behind it", "label": "red"}


def written(folder: Path, rows, text: str = RECIPE) -> Path:
    write_manifest(folder / "train.jsonl", rows)
    (folder / "toy.yaml").write_text(text, encoding="utf-8")
    return folder / "toy.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    recipe = written(folder, [*ROWS, LONG])
    return train(recipe, folder / "run", [f"data.train={folder / 'train.jsonl'}"])


def test_a_run_embeds_sentences_files_and_manifests_alike(run: Path, tmp_path: Path) -> None:
    encoder = mmssl.load(run, device="cpu")
    out = encoder.embed(["a red heart", "a box"], pool="last")
    assert out.scene.shape == (2, 16)
    assert out.ids == ["a red heart", "a box"]
    assert torch.equal(out.scene[1], out.tokens[1, int(out.valid[1].sum()) - 1])
    (tmp_path / "captions.txt").write_text("a red heart\n\na box\n", encoding="utf-8")
    for inputs in (str(tmp_path / "captions.txt"), tmp_path / "captions.txt"):
        assert torch.allclose(encoder.embed(inputs, pool="last").scene, out.scene, atol=1e-6)
    manifest = encoder.embed(str(run.parent / "train.jsonl"), pool="last")
    assert torch.allclose(manifest.scene[0], out.scene[0], atol=1e-5)
    assert manifest.ids[0] == "a red heart"


def test_the_command_embeds_a_sentence(run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["embed", str(run), "a red heart", "--out", str(tmp_path / "a.npz")])
    assert done.exit_code == 0, done.output
    with np.load(tmp_path / "a.npz") as file:
        assert file["scene"].shape == (1, 16)


def test_long_captions_are_counted_and_named_once(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    [note] = [line["note"] for line in lines if "cut" in line.get("note", "")]
    assert "1 of 5 captions are longer than frontend.context=8, and are cut" in note
    with caplog.at_level(logging.WARNING):
        mmssl.load(run, device="cpu").embed([LONG["text"], "a box", LONG["text"]])
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 captions are longer than the context of 8 tokens, and were cut"
    ]


def test_an_empty_caption_is_a_bad_clip(run: Path, tmp_path: Path) -> None:
    encoder = mmssl.load(run, device="cpu")
    with pytest.raises(BadClip, match="the caption ' ' is empty"):
        encoder.embed(["a box", " "])
    assert encoder.embed(["a box", " "], on_bad_clip="skip").bad == {" ": "the caption ' ' is empty"}
    recipe = written(tmp_path, [*ROWS, {"id": "odd", "text": "", "label": "red"}])
    settings = [f"data.train={tmp_path / 'train.jsonl'}"]
    with pytest.raises(BadClip, match=r"odd: the caption '' is empty \(at .*train.jsonl:5\)"):
        train(recipe, tmp_path / "one", settings)
    train(recipe, tmp_path / "two", [*settings, "data.on_bad_clip=skip", "data.max_bad_share=0.5"])
    [bad] = (tmp_path / "two" / "bad_clips.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(bad)["id"] == "odd"


def test_a_file_of_captions_has_one_in_each_line_and_must_be_there(run: Path, tmp_path: Path) -> None:
    encoder = mmssl.load(run, device="cpu")
    file = tmp_path / "some words.TXT"
    file.write_text("\ufeffa red heart\r\n\na \u2028 box\n", encoding="utf-8", newline="")
    assert encoder.embed(str(file)).ids == ["a red heart", "a \u2028 box"]
    assert encoder.embed("not a file.txt").ids == ["not a file.txt"]
    with pytest.raises(ValueError, match="captions.txt: no such file or directory; give a text file with a caption in"):
        encoder.embed("captions.txt")
    with pytest.raises(ValueError, match="is a directory; give a text file with a caption in each line"):
        encoder.embed(str(tmp_path))


def test_a_run_goes_on_with_its_own_tokenizer(run: Path, tmp_path: Path) -> None:
    recipe = written(tmp_path, ROWS)
    settings = [f"data.train={tmp_path / 'train.jsonl'}"]
    out = train(recipe, tmp_path / "run", settings)
    before = (out / "tokenizer.json").read_text(encoding="utf-8")
    written(tmp_path, [{"text": "other words altogether", "label": "red"}, *ROWS])
    train(recipe, out, settings)
    assert (out / "tokenizer.json").read_text(encoding="utf-8") == before


def test_another_run_starts_from_the_encoder_and_its_tokenizer(run: Path, tmp_path: Path) -> None:
    text = RECIPE.replace("tokenizer: {name: byte_bpe, entries: 300}\n", "")
    recipe = written(tmp_path, [{"text": "completely different", "label": color} for color in ("red", "blue")], text)
    settings = [f"data.train={tmp_path / 'train.jsonl'}", f"init={run}"]
    out = train(recipe, tmp_path / "run", settings)
    assert (out / "tokenizer.json").read_text() == (run / "tokenizer.json").read_text()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["tokenizer=null"], "'tokenizer.name' is missing; one of: byte_bpe, pretrained"),
        (["tokenizer.entries=x"], "tokenizer.entries: .*integer"),
        (["objective={name: mae, target: pixels}"], "objective mae is not for text: it predicts what stands in a file"),
        (["modality=image"], "tokenizer: image is read without one; leave the section out"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(settings, sentence, tmp_path: Path) -> None:
    recipe = written(tmp_path, ROWS)
    with pytest.raises(RecipeError, match=sentence):
        resolve(load(recipe, ["data.train=train.jsonl", *settings]))
