"""Heads that tell classes: the same logits here and in transformers, both ways, and the others named."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from theirs import LAYOUTS_OF, PREPROCESSORS, clips_of, given, write_json
from torch import Tensor

import mmssl
from mmssl.build import build_encoder, build_objective
from mmssl.convert.folder import convert, open_encoder
from mmssl.embed import Embedder
from mmssl.gather import over_clips
from mmssl.training.checkpoint import export_encoder

transformers = pytest.importorskip("transformers")

NAMES = ["cat", "dog", "cow"]
# name of the model below, class of transformers, further settings
FAMILIES: list[tuple[str, str, dict[str, Any]]] = [
    ("vit", "ViTForImageClassification", {}),
    ("siglip", "SiglipForImageClassification", {}),
    ("dinov2", "Dinov2ForImageClassification", {}),
    ("dinov2 with registers", "Dinov2WithRegistersForImageClassification", {}),
    ("beit, one table", "BeitForImageClassification", {}),
    ("beit, no bias", "BeitForImageClassification", {}),
    ("data2vec vision, a table each", "Data2VecVisionForImageClassification", {}),
    ("videomae for its mean", "VideoMAEForVideoClassification", {}),
    ("ast", "ASTForAudioClassification", {}),
    ("wav2vec2 base", "Wav2Vec2ForSequenceClassification", {}),
    ("wav2vec2 base", "Wav2Vec2ForSequenceClassification", {"use_weighted_layer_sum": True}),
    ("wav2vec2 large", "Wav2Vec2ForSequenceClassification", {}),
    ("hubert large", "HubertForSequenceClassification", {}),
    ("data2vec audio", "Data2VecAudioForSequenceClassification", {}),
    ("wavlm base", "WavLMForSequenceClassification", {"use_weighted_layer_sum": True}),
]
OURS: dict[str, Any] = {
    "format": 1,
    "modality": "image",
    "frontend": {"name": "patches", "size": [4, 4], "channels": 3},
    "positions": {"name": "sincos"},
    "transformer": {"dim": 24, "depth": 2, "heads": 3},
    "encoder": {"prefix": 1},
    "augment_eval": [{"name": "center_crop", "size": [16, 16]}],
    "objective": {"name": "classify", "pooling": "class", "head_norm": "none"},
    "classes": NAMES,
    "vocabulary": None,
}


def with_head(saved: Any, name: str, kind: str, folder: Path, **settings: Any) -> Any:
    """A model of theirs with a head of random weights, saved."""
    body, _ = saved(name)
    theirs = getattr(transformers, kind)
    named = {"id2label": dict(enumerate(NAMES)), "label2id": {label: i for i, label in enumerate(NAMES)}, **settings}
    if kind.startswith("Siglip"):
        config = theirs.config_class(vision_config=body.config.to_dict(), text_config={"vocab_size": 6}, **named)
    else:
        config = type(body.config)(**{**body.config.to_dict(), **named})
        config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = theirs(config).eval()
    inner = model.vision_model if kind.startswith("Siglip") else model.base_model
    assert not [key for key in inner.load_state_dict(body.state_dict(), strict=False).missing_keys if "pool" not in key]
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in ("classifier", "projector", "fc_norm", "pooler", "layer_weights")):
                parameter += 0.5 * torch.randn_like(parameter)
        if kind.startswith("Dinov2"):  # theirs reads two vectors, and ours one
            model.classifier.weight[:, : body.config.hidden_size] = 0.0
    return save(model, name, folder)


def save(model: Any, name: str, folder: Path) -> Any:
    model.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", PREPROCESSORS[LAYOUTS_OF[name].modality])
    return model


def ours_of(embedder: Embedder, clips: list[Any]) -> Tensor:
    found: list[Tensor] = []
    over_clips(
        embedder.clips(clips),
        lambda batch, places: found.append(embedder.objective.predict(batch)),
        1,
        60.0,
        "raise",
        False,
    )
    return torch.cat(found)


def theirs_of(model: Any, clips: list[Any], modality: str) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(given(clip, modality)).logits for clip in clips])


# torch's, of what transformers gives to the attention of WavLM
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize(("name", "kind", "settings"), FAMILIES, ids=[f"{one} {two}" for one, two, _ in FAMILIES])
def test_a_head_says_the_same_here_and_when_it_is_written_again(
    saved: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, kind: str, settings: dict[str, Any]
) -> None:
    model = with_head(saved, name, kind, tmp_path / "theirs", **settings)
    clips, modality = clips_of(name), LAYOUTS_OF[name].modality
    expected = theirs_of(model, clips, modality)
    assert expected.std() > 0.1
    with caplog.at_level(logging.WARNING):
        embedder = mmssl.load(tmp_path / "theirs", device="cpu")
        said = convert(tmp_path / "theirs", tmp_path / "back")
    assert not [record for record in caplog.records if record.name.startswith("mmssl")]
    assert torch.allclose(ours_of(embedder, clips), expected, atol=1e-5)
    assert embedder.predict(clips) == [NAMES[i] for i in expected.argmax(1).tolist()]
    assert said == f'transformers.{kind}.from_pretrained("{tmp_path / "back"}") opens it'
    back, report = getattr(transformers, kind).from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.allclose(theirs_of(back.eval(), clips, modality), expected, atol=1e-5)
    assert back.config.id2label == dict(enumerate(NAMES))
    assert back.config.label2id == {label: i for i, label in enumerate(NAMES)}
    first, second = open_encoder(tmp_path / "theirs"), open_encoder(tmp_path / "back")
    assert first.config == second.config
    assert all(torch.equal(tensor, second.objective[key]) for key, tensor in first.objective.items())


def run_of(folder: Path, *, encoder: dict[str, Any] | None = None, **objective: Any) -> Path:
    """A classifier as a run of ours exports it."""
    torch.manual_seed(0)
    config = {**OURS, "encoder": encoder or OURS["encoder"], "objective": {**OURS["objective"], **objective}}
    body = build_encoder(config)
    made = build_objective(config, body)
    torch.nn.init.normal_(made.head.linear.weight)  # type: ignore[union-attr]
    torch.nn.init.normal_(made.head.linear.bias)  # type: ignore[union-attr]
    export_encoder(folder, body, config, objective=made)
    return folder


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "ViTForImageClassification"),
        ({"multi_label": True}, "ViTForImageClassification"),
        ({"encoder": {"prefix": 0}, "pooling": "mean"}, "SiglipForImageClassification"),
    ],
)
def test_a_classifier_of_ours_is_written_as_theirs(tmp_path: Path, settings: dict[str, Any], kind: str) -> None:
    run = run_of(tmp_path / "run", **settings)
    convert(run, tmp_path / "theirs")
    # by its config.json, as a user opens it
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "theirs").eval()
    assert type(model).__name__ == kind
    assert [model.config.id2label[i] for i in range(3)] == NAMES
    several = settings.get("multi_label", False)
    assert model.config.problem_type == f"{'multi' if several else 'single'}_label_classification"
    clips = list(np.random.default_rng(0).random((2, 3, 16, 16)).astype(np.float32))
    frontend = open_encoder(run).config["frontend"]
    embedder = mmssl.load(run, device="cpu")
    mean, std = (embedder.encoder.frontend.get_buffer(key).view(3, 1, 1) for key in ("mean", "std"))
    assert frontend["name"] == "patches"
    with torch.no_grad():
        theirs = model((torch.from_numpy(np.stack(clips)) - mean) / std).logits
    assert torch.allclose(ours_of(embedder, clips), theirs, atol=1e-5)
    back = mmssl.load(tmp_path / "theirs", device="cpu")
    assert back.predict(clips) == embedder.predict(clips)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"pooling": "mean"},
            "ViTForImageClassification computes pooling=class, and this run pooling=mean; --to mmssl",
        ),
        ({"pooling": "mean", "head_norm": "layer"}, "computes pooling=class head_norm=none, and this run pooling=mean"),
        ({"weighted_layers": True}, "computes weighted_layers=False, and this run weighted_layers=True"),
    ],
)
def test_a_head_that_theirs_cannot_compute_is_left_out_and_it_is_said_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], words: str
) -> None:
    run = run_of(tmp_path / "run", **settings)
    assert convert(run, tmp_path / "theirs").startswith("transformers.ViTModel.")
    [said] = caplog.messages
    assert "the encoder alone is written, and not the head of its objective classify, for " in said
    assert words in said
    assert "classifier" not in (tmp_path / "theirs" / "config.json").read_text()


def changed(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    write_json(path, {**json.loads(path.read_text()), **settings})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"id2label": {"0": "cat", "1": "dog"}}, "id2label in config.json names 2 classes, and the head has 3"),
        ({"id2label": {"first": "cat"}}, "id2label in config.json gives classes no numbers"),
        ({"problem_type": "regression"}, "problem_type=regression in config.json, and objective classify has single"),
    ],
)
def test_a_head_that_tells_no_classes_is_left_out(
    saved: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], words: str
) -> None:
    with_head(saved, "vit", "ViTForImageClassification", tmp_path)
    changed(tmp_path, **settings)
    embedder = mmssl.load(tmp_path, device="cpu")
    assert words in caplog.text
    with pytest.raises(ValueError, match=f"its head was left out when it was read \\(classifier, for {words}"):
        embedder.predict(clips_of("vit"))


@pytest.mark.parametrize(
    ("name", "kind", "settings", "words"),
    [
        (
            "wav2vec2 base",
            "Wav2Vec2ForXVector",
            {},
            "cannot compute a head of classifier, feature_extractor, objective",
        ),
        (
            "wav2vec2 large",
            "Wav2Vec2ForSequenceClassification",
            {"use_weighted_layer_sum": True},
            "cannot compute a head of classifier, layer_weights, projector as a wav2vec2 has it",
        ),
        ("videomae", "VideoMAEForVideoClassification", {}, "cannot compute a head of classifier as a videomae has it"),
    ],
)
def test_a_head_that_ours_cannot_compute_is_left_out(
    saved: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    kind: str,
    settings: dict[str, Any],
    words: str,
) -> None:
    with_head(saved, name, kind, tmp_path, **settings)
    assert not open_encoder(tmp_path).objective
    assert re.search(words, caplog.text)


def test_a_head_on_class_token_and_patches_at_once_is_left_out(
    saved: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_head(saved, "dinov2", "Dinov2ForImageClassification", tmp_path)
    torch.nn.init.normal_(model.classifier.weight)
    save(model, "dinov2", tmp_path)
    assert not open_encoder(tmp_path).objective
    assert "classifier reads the class token and the mean of patches, and objective classify either" in caplog.text


def test_classes_of_one_name_or_of_none_are_told_apart_by_their_numbers(saved: Any, tmp_path: Path) -> None:
    with_head(saved, "vit", "ViTForImageClassification", tmp_path)
    changed(tmp_path, id2label={"0": "crane", "1": "dog", "2": "crane"})
    assert open_encoder(tmp_path).config["classes"] == ["crane (0)", "dog", "crane (2)"]
    path = tmp_path / "config.json"
    write_json(path, {key: value for key, value in json.loads(path.read_text()).items() if key != "id2label"})
    assert open_encoder(tmp_path).config["classes"] == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_a_head_of_several_labels_says_all_that_are_likely(saved: Any, tmp_path: Path) -> None:
    model = with_head(saved, "ast", "ASTForAudioClassification", tmp_path, problem_type="multi_label_classification")
    clips = clips_of("ast")
    expected = theirs_of(model, clips, "audio").sigmoid()
    embedder = mmssl.load(tmp_path, device="cpu")
    assert torch.allclose(embedder.probabilities(clips), expected, atol=1e-5)
    said = embedder.predict(clips)
    assert [set(one or []) for one in said] == [{NAMES[i] for i in range(3) if row[i] > 0.5} for row in expected]
