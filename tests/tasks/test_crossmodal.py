"""Retrieval and zero-shot classes of a run on several modalities, against what its vectors say."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from mmssl.cli import app
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.tasks.crossmodal import read_prompts, retrieval, zero_shot
from mmssl.types import Embeddings


class Known:
    """In place of an Embedder: words and pictures whose directions are known."""

    name = "known"
    modalities = ("image", "text")
    shares_space = True

    def __init__(self, places: dict[str, float]) -> None:
        self.places = places

    def embed(self, inputs, *, modality, tokens, **settings):
        keys = [row[modality] for row in inputs] if isinstance(inputs, Manifest) else inputs
        angles = torch.tensor([self.places[Path(key).name] for key in keys]).deg2rad()
        return SimpleNamespace(scene=torch.stack([angles.cos(), angles.sin()], 1)) if tokens is False else Embeddings


@pytest.fixture
def rows(tmp_path: Path) -> Manifest:
    write_manifest(
        tmp_path / "a.jsonl",
        [
            {"image": "0.png", "text": "zero", "label": "low"},
            {"image": "9.png", "text": "ninety", "label": "high"},
            {"image": "4.png", "text": "forty", "label": "low"},
            {"image": "4.png", "label": "high"},
        ],
    )
    return Manifest(tmp_path / "a.jsonl")


PLACES = {"0.png": 0.0, "9.png": 90.0, "4.png": 40.0, "zero": 10.0, "ninety": 35.0, "forty": 60.0}


def test_recall_counts_the_rows_that_have_both(rows: Manifest) -> None:
    scores = retrieval(Known(PLACES), rows)
    assert list(scores) == [f"{way}_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    # the ranks of pictures are 1, 2 and 2; of words 10: 0 is nearest; 35: 40, 0, 90; 60: 40
    assert scores["image_to_text_at_1"].value == pytest.approx(1 / 3)
    assert scores["text_to_image_at_1"].value == pytest.approx(2 / 3)
    assert scores["image_to_text_at_5"].value == 1
    assert scores["image_to_text_at_1"].details["median_rank"] == 2
    assert scores["text_to_image_at_1"].n == 3
    assert "retrieval: R@1 image to text 33.3 %" in str(scores["image_to_text_at_1"])
    assert "ties against the model; chance 33.3 %; median rank 2" in scores["image_to_text_at_1"].protocol


def test_rows_that_agree_in_a_key_are_right_for_each_other(rows: Manifest, tmp_path: Path) -> None:
    # of pictures 0 (low), 90 (high) and 40 (low): 90 has 60 before 35; 40 has 35, which is high, before 10 and 60
    scores = retrieval(Known(PLACES), rows, same="label")
    assert scores["image_to_text_at_1"].value == pytest.approx(1 / 3)
    # of words 10 (low), 35 (high) and 60 (low): 35 has 40 and 0 before 90
    assert scores["text_to_image_at_1"].value == pytest.approx(2 / 3)
    assert scores["image_to_text_at_5"].value == 1
    # the first is right for two rows by 2 of 3, for one by 1 of 3: 5/9
    assert scores["image_to_text_at_1"].details["chance"] == pytest.approx(5 / 9)
    assert scores["image_to_text_at_1"].protocol.startswith(
        "each of 3 clips finds one that agrees in 'label' among 3, of which 1 to 2 do, ties against the model; chance "
        "55.6 %; median rank 2; known"
    )
    twice = [{"image": f"{n}.png", "text": word} for n, word in ((0, "zero"), (9, "zero"), (4, "zero"))]
    write_manifest(tmp_path / "twice.jsonl", twice)
    alike = Manifest(tmp_path / "twice.jsonl")
    assert retrieval(Known(PLACES), alike)["image_to_text_at_1"].value == 0  # three captions that are one
    assert retrieval(Known(PLACES), alike, same="text")["image_to_text_at_1"].value == 1
    with pytest.raises(ValueError, match=r"twice.jsonl:1: the row has no 'speaker', only id, image, text"):
        retrieval(Known(PLACES), alike, same="speaker")


def test_zero_shot_goes_to_the_nearest_name(rows: Manifest, tmp_path: Path) -> None:
    (tmp_path / "names.yaml").write_text("templates: ['at {}']\nclasses: {low: [zero, ten], high: ninety}\n")
    places = PLACES | {"at zero": 0.0, "at ten": 20.0, "at ninety": 80.0}
    # low lies at 10 and high at 80: 0 and 40 are low, 90 is high; the last row's 40 should be high
    score = zero_shot(Known(places), rows, classes=tmp_path / "names.yaml")["accuracy"]
    assert score.value == 0.75
    assert "the nearest of 2 classes by 3 prompts" in score.protocol


def test_prompts_are_every_name_in_every_template(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"templates": ["{}", "a {} here"], "classes": {"A": ["x", "y"], "B": "z"}}))
    assert read_prompts(path) == {"A": ["x", "a x here", "y", "a y here"], "B": ["z", "a z here"]}
    path.write_text("classes: [cat, dog]")
    assert read_prompts(path) == {"cat": ["cat"], "dog": ["dog"]}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[cat, dog]", "names no classes"),
        ("classes: {}", "names no classes"),
        ("classes: [cat]", "there must be two classes at least"),
        ("classes: [yes, no]", "True is no text; write it in quotes"),
        ("classes: [cat, dog]\ntemplate: ['{}']", "more than classes and templates"),
        ("classes: [cat, dog]\ntemplates: [a picture]", "must hold one {}"),
        ("classes: {a: [], b: c}", "each with a name"),
        ("classes: [", "cannot be read as YAML"),
    ],
)
def test_a_file_of_names_that_cannot_be_used_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "names.yaml").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_prompts(tmp_path / "names.yaml")


def test_a_label_without_a_name_is_refused_by_its_line(rows: Manifest, tmp_path: Path) -> None:
    (tmp_path / "names.yaml").write_text("classes: [low, middle]")
    with pytest.raises(ValueError, match=r"a.jsonl:2: the label 'high' is no class of .*names.yaml"):
        zero_shot(Known(PLACES), rows, classes=tmp_path / "names.yaml")


def test_other_encoders_and_rows_are_refused(rows: Manifest, tmp_path: Path) -> None:
    one = SimpleNamespace(modalities=["image"], name="one")
    with pytest.raises(ValueError, match="task=retrieval: one is of image alone; give a run on several"):
        retrieval(one, rows)
    write_manifest(tmp_path / "b.jsonl", [{"text": "zero"}])
    with pytest.raises(ValueError, match=r"b.jsonl: no row has two of image, text"):
        retrieval(Known(PLACES), Manifest(tmp_path / "b.jsonl"))
    two = SimpleNamespace(modalities=["image", "speech"], name="two", shares_space=True)
    with pytest.raises(ValueError, match="task=zero-shot: two is of image and speech, and classes are told by text"):
        zero_shot(two, rows, classes="names.yaml")


def test_the_commands_measure_a_run(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmssl.assemble import train
    from mmssl.recipe import load

    monkeypatch.chdir(tmp_path)
    files = sorted((pictures / "train").rglob("*.png"))[:6]
    kinds = [(file, file.parent.name) for file in files]
    rows = [{"image": str(file), "text": kind, "label": kind, "name": n} for n, (file, kind) in enumerate(kinds)]
    write_manifest("train.jsonl", rows)
    Path("names.yaml").write_text("classes: [checks, stripes]")
    small = ["transformer={dim: 16, depth: 1, heads: 2}", "tokenizer.entries=258", "trainer={steps: 1, device: cpu}"]
    train(load("small/clip_emoji", ["data.train=train.jsonl", "data.workers=0", *small]), Path("run"))
    for arguments, said in (
        (["--task", "retrieval"], ["R@1 image to text", "R@10 text to image"]),
        (["--task", "retrieval", "--same", "text"], ["agrees in 'text' among 6, of which 6 do", "chance 100 %"]),
        (
            ["--task", "retrieval", "--modality", "image", "--layer", "1"],
            ["retrieval: mAP", "each clip among all others"],
        ),
        (["--task", "zero-shot", "--classes", "names.yaml"], ["zero-shot: accuracy"]),
        (["--task", "knn", "--modality", "image", "--train", "train.jsonl", "--layer", "-1", "--k", "1"], ["accuracy"]),
    ):
        done = CliRunner().invoke(app, ["evaluate", "run", "--test", "train.jsonl", *arguments])
        assert done.exit_code == 0, done.output
        for text in said:
            assert text in done.output
    assert CliRunner().invoke(app, ["evaluate", "run", "--test", "train.jsonl", "--task", "zero-shot"]).exit_code == 2
