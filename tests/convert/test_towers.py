"""Models of an image and a text tower: one space of pictures and captions, as transformers computes it."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from theirs import PREPROCESSORS, TRUNK, given, write_json
from torch import Tensor
from typer.testing import CliRunner

import mmssl
from mmssl.cli import app
from mmssl.convert.folder import convert, open_encoder

transformers = pytest.importorskip("transformers")
KINDS = ["clip", "siglip"]
CAPTIONS = ["a red heart", "Two  RED boxes, and a heart that is far too long", "a", "box"]
START, END = "<|startoftext|>", "<|endoftext|>"
_TEXT = {**TRUNK, "hidden_size": 20, "intermediate_size": 28, "max_position_embeddings": 14}


def clip_tokenizer() -> Any:
    letters = [*string.ascii_lowercase, *string.punctuation]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", START, END]
    merges = [("r", "e"), ("re", "d</w>")]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=14)


def siglip_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    pieces = ["<unk>", "</s>", "▁", *string.ascii_lowercase, "▁red", "▁heart"]
    made = Tokenizer(models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces[::-1])][::-1], unk_id=0))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "model_input_names": ["input_ids"]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=14, **marks)


def build(kind: str, tokenizer: Any, **text: Any) -> Any:
    """A model away from the zeros and ones of a fresh one."""
    torch.manual_seed(0)
    marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    # as published, a table has more rows than there are tokens
    text = {**_TEXT, "vocab_size": len(tokenizer) + 3, "projection_size": 24, **marks, **text}
    config = {"text_config": text, "vision_config": {**TRUNK, "image_size": 16, "patch_size": 4}, "projection_dim": 16}
    name = "CLIP" if kind == "clip" else "Siglip"
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any, Path]]:
    """A model, its tokenizer and the folder of both, by the kind."""
    made: dict[str, tuple[Any, Any, Path]] = {}

    def save(kind: str) -> tuple[Any, Any, Path]:
        if kind not in made:
            tokenizer = clip_tokenizer() if kind == "clip" else siglip_tokenizer()
            made[kind] = build(kind, tokenizer), tokenizer, tmp_path_factory.mktemp(kind)
            for part in made[kind][:2]:
                part.save_pretrained(made[kind][2])
            write_json(made[kind][2] / "preprocessor_config.json", PREPROCESSORS["image"])
        return made[kind]

    return save


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.random((3, 16, 16)).astype(np.float32) for _ in range(3)]


def unit(features: Any) -> Tensor:
    return torch.nn.functional.normalize(features.pooler_output, dim=1)


@torch.no_grad()
def their_texts(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    padding = "max_length" if model.config.model_type == "siglip" else True
    return unit(model.get_text_features(**tokenizer(texts, padding=padding, truncation=True, return_tensors="pt")))


@torch.no_grad()
def their_pictures(model: Any) -> Tensor:
    return unit(model.get_image_features(torch.cat([given(clip, "image") for clip in pictures()])))


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_and_captions_lie_where_theirs_do(towers: Any, kind: str) -> None:
    model, tokenizer, folder = towers(kind)
    embedder = mmssl.load(folder, device="cpu")
    assert embedder.modalities == ["image", "text"]
    seen = embedder.embed(pictures(), modality="image").scene
    assert torch.allclose(seen, their_pictures(model), atol=1e-5)
    read = embedder.embed(CAPTIONS, modality="text").scene
    assert torch.allclose(read, their_texts(model, tokenizer, CAPTIONS), atol=1e-5)
    # and alone as in a batch
    for row, text in enumerate(CAPTIONS):
        assert torch.allclose(embedder.embed(text, modality="text").scene[0], read[row], atol=1e-5)
    assert (read[1:] - read[0]).abs().amax(1).min() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_told_apart_by_the_scale_and_bias_of_theirs(towers: Any, kind: str) -> None:
    model, _, folder = towers(kind)
    objective = mmssl.load(folder, device="cpu").objective
    assert objective.log_scale.item() == pytest.approx(model.logit_scale.item())
    if kind == "siglip":
        assert objective.bias.item() == pytest.approx(model.logit_bias.item())


def test_old_files_of_clip_that_name_another_end_are_read_as_theirs(towers: Any, tmp_path: Path) -> None:
    _, tokenizer, folder = towers("clip")
    model = build("clip", tokenizer, eos_token_id=2)
    shutil.copytree(folder, tmp_path / "old")
    model.save_pretrained(tmp_path / "old")
    read = mmssl.load(tmp_path / "old", device="cpu").embed(CAPTIONS, modality="text").scene
    assert torch.allclose(read, their_texts(model, tokenizer, CAPTIONS), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_half_precision_are_read(towers: Any, tmp_path: Path, kind: str) -> None:
    source, folder = towers(kind)[2], tmp_path / "half"
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")
    found = open_encoder(folder)
    assert {tensor.dtype for tensor in found.objective.values()} == {torch.float32}
    half, whole = (mmssl.load(path, device="cpu").embed(CAPTIONS, modality="text").scene for path in (folder, source))
    assert torch.allclose(half, whole, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_a_run_and_is_written_back_the_same(towers: Any, tmp_path: Path, kind: str) -> None:
    model, tokenizer, folder = towers(kind)
    convert(folder, tmp_path / "run", to="mmssl")
    said = convert(tmp_path / "run", tmp_path / "back")
    architecture = type(model).__name__
    assert said.startswith(f"transformers.{architecture}.from_pretrained")
    back = getattr(transformers, architecture).from_pretrained(tmp_path / "back").eval()
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert torch.allclose(their_pictures(back), their_pictures(model), atol=1e-6)
    assert torch.allclose(their_texts(back, own, CAPTIONS), their_texts(model, tokenizer, CAPTIONS), atol=1e-6)
    first, second = open_encoder(tmp_path / "run"), open_encoder(tmp_path / "back")
    assert all(torch.equal(tensor, second.encoder[name]) for name, tensor in first.encoder.items())
    assert all(torch.equal(tensor, second.objective[name]) for name, tensor in first.objective.items())
    assert first.config["modality"] == second.config["modality"]
    assert first.config["objective"] == second.config["objective"]
    # and one tower of it alone
    convert(folder, tmp_path / "vision", to=f"{kind}_vision_model")
    alone = mmssl.load(tmp_path / "vision", device="cpu").embed(pictures()).tokens
    assert torch.equal(alone, mmssl.load(folder, device="cpu").embed(pictures(), modality="image").tokens)


def test_it_is_measured_and_searched_as_a_run_is(towers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    folder, rows = towers("clip")[2], []
    for n, pixels in enumerate(pictures()):
        Image.fromarray((pixels.transpose(1, 2, 0) * 255).astype(np.uint8)).save(f"{n}.png")
        rows.append({"id": str(n), "image": f"{n}.png", "text": CAPTIONS[n], "label": "ab"[n % 2]})
    Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("classes.yaml").write_text(yaml.safe_dump({"classes": {"a": "red heart", "b": "box"}}), encoding="utf-8")
    for arguments, word in (
        (["evaluate", folder, "--task", "zero-shot", "--test", "test.jsonl", "--classes", "classes.yaml"], "zero-shot"),
        (["evaluate", folder, "--task", "retrieval", "--test", "test.jsonl"], "R@1 image to text"),
        (["embed", folder, "test.jsonl", "--modality", "image", "--index", "pictures.index"], "pictures.index"),
        (["search", "pictures.index", "a red heart"], "a red heart"),
    ):
        result = CliRunner().invoke(app, [*map(str, arguments)])
        assert result.exit_code == 0, result.output
        assert word in result.output


def test_each_side_of_a_run_begins_with_a_tower(towers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in KINDS:
        folder = towers(kind)[2]
        found = open_encoder(folder)
        Image.new("RGB", (16, 16)).save("0.png")
        row = json.dumps({"image": "0.png", "text": "a red heart"}) + "\n"
        Path("train.jsonl").write_text(row * 2, encoding="utf-8")
        settings = [f"init.{name}={folder}" for name in ("image", "text")]
        sides = "[{name: resize, size: [16, 16]}]"
        settings += ["data.train=train.jsonl", f"modality.image.augment={{train: {sides}, eval: {sides}}}"]
        settings += ["trainer={steps: 1, device: cpu}", "schedule.warmup=1", "optimizer={lr: 1e-12, weight_decay: 0}"]
        settings += ["data.batch_size=2", "tokenizer=null", "objective.same=text"]
        if kind == "siglip":
            pool = "{image: attention, text: last}"
            settings.append(f"objective={{name: siglip, dim: 24, pool: {pool}, affine: true, same: text}}")
        run = open_encoder(mmssl.train("small/clip_emoji", f"{kind}-run", settings))
        assert run.config["tokenizer"] == found.config["tokenizer"]
        assert all(torch.allclose(run.encoder[name], tensor, atol=1e-9) for name, tensor in found.encoder.items())


def test_a_run_of_the_recipe_of_the_paper_opens_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("0.png")
    Path("train.jsonl").write_text(json.dumps({"image": "0.png", "text": "a red heart"}) + "\n", encoding="utf-8")
    sizes = "dim: 16, depth: 1, heads: 2, activation: quick_gelu, eps: 1e-5"
    settings = [
        "data={train: train.jsonl, batch_size: 1}",
        "trainer={steps: 1, device: cpu}",
        "schedule.warmup=1",
        "tokenizer.entries=258",
        "objective.dim=8",
        "modality.image.frontend.size=[4, 4]",
        "modality.image.positions.grid=[4, 4]",
        f"modality.image.transformer={{{sizes}, input_norm: true}}",
        "modality.image.augment={train: [], eval: []}",
        f"modality.text.transformer={{{sizes}, causal: true}}",
    ]
    run = mmssl.train("paired/clip_image_text_base", "run", settings)
    convert(run, "theirs")
    model = transformers.CLIPModel.from_pretrained("theirs").eval()
    embedder = mmssl.load(run, device="cpu")
    theirs = their_texts(model, transformers.AutoTokenizer.from_pretrained("theirs"), CAPTIONS[:1] + CAPTIONS[2:])
    ours = embedder.embed(CAPTIONS[:1] + CAPTIONS[2:], modality="text").scene
    assert torch.allclose(ours, theirs, atol=1e-5)
    frontend = embedder.config["modality"]["image"]["frontend"]
    mean, std = (torch.tensor(frontend[key])[:, None, None] for key in ("mean", "std"))
    pixels = torch.stack([(torch.from_numpy(clip) - mean) / std for clip in pictures()])
    with torch.no_grad():
        theirs = unit(model.get_image_features(pixels))
    assert torch.allclose(embedder.embed(pictures(), modality="image").scene, theirs, atol=1e-5)


def changed(folder: Path, file: str, **settings: Any) -> None:
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    for name, value in settings.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    write_json(folder / file, content)


def short_table(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    save_file({**tensors, name: tensors[name][:9].clone()}, folder / "model.safetensors")


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return change


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "clip",
            lambda folder: changed(folder, "config.json", text_config={"eos_token_id": 7}),
            "text_config: config.json says eos_token_id=7, so captions are pooled at id 7, and tokenizer.json ends",
        ),
        ("clip", short_table, "tokenizer.json has ids up to .*, and the text tower a table of 9; copy the tokenizer"),
        ("clip", without("text_projection.weight"), "the weights lack 'text_projection.weight', which a clip has"),
        (
            "siglip",
            without("vision_model.head.probe"),
            "the weights lack 'vision_model.head.probe', which a siglip has",
        ),
        (
            "siglip",
            lambda folder: changed(folder, "tokenizer_config.json", pad_token="<none>"),
            "tokenizer_config.json says pad_token='<none>', which tokenizer.json does not have",
        ),
        (
            "siglip",
            lambda folder: changed(folder, "tokenizer_config.json", padding_side="left"),
            "padding_side='left', and captions are filled up at their end here",
        ),
        ("clip", lambda folder: (folder / "tokenizer.json").write_text("{}"), "no tokenizer can be read from it"),
    ],
)
def test_what_does_not_belong_together_is_one_sentence(
    towers: Any, tmp_path: Path, kind: str, change: Callable[[Path], Any], message: str
) -> None:
    shutil.copytree(towers(kind)[2], tmp_path / "bad")
    change(tmp_path / "bad")
    with pytest.raises(ValueError, match=message):
        mmssl.load(tmp_path / "bad", device="cpu")


@pytest.mark.parametrize(
    ("change", "to", "message"),
    [
        ({"pool": {"image": "mean", "text": "last"}}, "transformers", "layout clip has pool=.*, and this run .*mean"),
        (
            {"name": "slip"},
            "transformers",
            "is of image and text with the objective slip; say whose encoder to write alone, by modality",
        ),
        ({}, "siglip", "is of image and text with the objective clip, and named siglip"),
        ({}, "hubert", "holds an encoder of image and text, and none of speech"),
    ],
)
def test_a_run_that_theirs_cannot_be_is_refused(
    towers: Any, tmp_path: Path, change: dict[str, Any], to: str, message: str
) -> None:
    run = tmp_path / "run"
    convert(towers("clip")[2], run, to="mmssl")
    changed(run, "config.json", objective=change)
    with pytest.raises(ValueError, match=message):
        convert(run, tmp_path / "theirs", to=to)
