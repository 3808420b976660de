"""Models of transformers, tiny and with random weights: what they compute is computed here, and back.

Every layout is saved by transformers itself, loaded here and compared layer by layer, written here, opened by
transformers and compared with itself.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mmssl
from mmssl.assemble import build_encoder, build_objective
from mmssl.convert import LAYOUTS, REFUSED
from mmssl.convert.folder import convert, find, open_encoder, read_weights
from mmssl.convert.layout import completed
from mmssl.training.checkpoint import export_encoder

transformers = pytest.importorskip("transformers")

_TRUNK: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "attn_implementation": "eager",
}
_SPEECH = _TRUNK | {
    "conv_dim": [12, 12, 12],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 6,
}
_LARGE = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
_IMAGE = _TRUNK | {"image_size": 16, "patch_size": 4}
_DINO = {name: value for name, value in _IMAGE.items() if name != "intermediate_size"}
_VIDEO = _IMAGE | {"num_frames": 4, "tubelet_size": 2}
# frames that the strides do not come out even with
AST_FRAMES, AST_BANDS = 59, 36
_AUDIO = _TRUNK | {"patch_size": 16, "max_length": AST_FRAMES, "num_mel_bins": AST_BANDS}

# name -> class of the model, of its config, settings
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "wav2vec2 base": ("Wav2Vec2Model", "Wav2Vec2Config", _SPEECH),
    "wav2vec2 large": ("Wav2Vec2Model", "Wav2Vec2Config", _SPEECH | _LARGE),
    "wav2vec2 with its pretraining head": ("Wav2Vec2ForPreTraining", "Wav2Vec2Config", _SPEECH),
    "hubert base": ("HubertModel", "HubertConfig", _SPEECH),
    "hubert large": ("HubertModel", "HubertConfig", _SPEECH | _LARGE),
    "data2vec audio": ("Data2VecAudioModel", "Data2VecAudioConfig", _SPEECH | {"num_conv_pos_embeddings": 3}),
    "vit": ("ViTModel", "ViTConfig", _IMAGE),
    "vit not square, no biases": ("ViTModel", "ViTConfig", _IMAGE | {"image_size": [16, 24], "qkv_bias": False}),
    "vit_mae": ("ViTMAEModel", "ViTMAEConfig", _IMAGE | {"mask_ratio": 0.0}),
    "dinov2": ("Dinov2Model", "Dinov2Config", _DINO),
    "dinov2 giant": ("Dinov2Model", "Dinov2Config", _DINO | {"use_swiglu_ffn": True}),
    "dinov2 with registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", _DINO),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", _IMAGE),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", _IMAGE | {"vision_use_head": False}),
    "videomae": ("VideoMAEModel", "VideoMAEConfig", _VIDEO | {"use_mean_pooling": False}),
    "videomae for its mean": ("VideoMAEModel", "VideoMAEConfig", _VIDEO),
    "ast": ("ASTModel", "ASTConfig", _AUDIO),
}
SPEECH = [name for name, (kind, _, _) in MODELS.items() if "Wav2Vec2" in kind or "Hubert" in kind or "Audio" in kind]


def build(name: str) -> Any:
    """A model away from the zeros and ones of a fresh one, behind which a forgotten bias or norm could hide."""
    kind, config, settings = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    if kind == "ViTMAEModel":  # whose table is zero in a fresh model, and not in a fresh part of it
        fresh = type(model.embeddings)(model.config)
        fresh.initialize_weights()
        model.embeddings.position_embeddings.data = fresh.position_embeddings.data
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A model by its name, and the folder that it saved itself in."""
    made: dict[str, tuple[Any, Path]] = {}

    def save(name: str) -> tuple[Any, Path]:
        if name not in made:
            model, folder = build(name), tmp_path_factory.mktemp("theirs")
            model.save_pretrained(folder)
            _write(folder / "preprocessor_config.json", PREPROCESSORS[LAYOUTS_OF[name].modality])
            made[name] = model, folder
        return made[name]

    return save


# as published: mean and deviation of each channel, and nothing is resized, so that tiny pictures stay as they are
PREPROCESSORS: dict[str, dict[str, Any]] = {
    "speech": {"do_normalize": True, "sampling_rate": 16_000},
    "image": {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "do_resize": False, "do_center_crop": False},
    "video": {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "do_resize": False, "do_center_crop": False},
    "audio": {"mean": -6.0, "std": 3.0, "do_normalize": True, "sampling_rate": 16_000},
}
LAYOUTS_OF = {
    name: next(layout for layout in LAYOUTS.values() if layout.architecture == kind.replace("ForPreTraining", "Model"))
    for name, (kind, _, _) in MODELS.items()
}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def clips_of(name: str) -> list[np.ndarray]:
    """Two clips; of speech and audio one is shorter, one of audio longer than a model reads."""
    rng = np.random.default_rng(0)
    modality = LAYOUTS_OF[name].modality
    if modality == "speech":
        return [rng.standard_normal(n).astype(np.float32) / 50 for n in (900, 613)]
    if modality == "audio":
        return [rng.standard_normal(n).astype(np.float32) / 10 for n in (4_000, 16_000)]
    size = [16, 24] if "not square" in name else [16, 16]
    return [rng.random((3, *([4] if modality == "video" else []), *size)).astype(np.float32) for _ in range(2)]


def run(model: Any, clip: np.ndarray, modality: str) -> list[Tensor]:
    """What transformers computes of one clip: (N, D) after each layer, and the output at the end."""
    settings = PREPROCESSORS[modality]
    model, more = getattr(model, "wav2vec2", model), {}
    if modality == "speech":
        extract = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
        given = extract(clip, sampling_rate=16_000, return_tensors="pt").input_values
    elif modality == "audio":
        extract = transformers.ASTFeatureExtractor(
            num_mel_bins=AST_BANDS, max_length=AST_FRAMES, mean=settings["mean"], std=settings["std"]
        )
        given = extract(clip, sampling_rate=16_000, return_tensors="pt").input_values
    else:
        mean, std = (torch.tensor(settings[f"image_{key}"]) for key in ("mean", "std"))
        given = ((torch.from_numpy(clip).movedim(0, -1) - mean) / std).movedim(-1, -3)[None]
    if model.config.model_type == "vit_mae":  # which shuffles patches by this, also where it hides none
        more["noise"] = torch.arange(given.shape[-2] * given.shape[-1] // 16)[None].float()
    with torch.no_grad():
        out = model(given, output_hidden_states=True, **more)
        layers = [*out.hidden_states[: model.config.num_hidden_layers], out.last_hidden_state]
        if model.config.model_type == "clip_vision_model":
            # their norm at the end is for the class token alone
            layers.append(model.post_layernorm(out.last_hidden_state))
    return [layer[0] for layer in layers]


def time_first(x: Tensor) -> Tensor:
    """Tokens of AST, over frequency first, in our order, over time first."""
    bands = (AST_BANDS - 16) // 10 + 1
    return torch.cat([x[:2], x[2:].view(bands, -1, x.shape[1]).transpose(0, 1).flatten(0, 1)])


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_that_of_transformers(saved: Any, name: str) -> None:
    model, folder = saved(name)
    clips, modality = clips_of(name), LAYOUTS_OF[name].modality
    embedder = mmssl.load(folder, device="cpu")
    assert embedder.modality == modality
    depth = embedder.depth
    # the last layer before the final norm has no counterpart but CLIP's
    ours = [*range(depth + 1), -1] if name == "clip" else [*range(depth), -1]
    found = embedder.embed(clips, layer=ours, pool="mean")
    prefix = embedder.encoder.n_prefix
    for row, clip in enumerate(clips):
        theirs = run(model, clip, modality)
        assert len(theirs) == len(ours)
        for mine, layer in zip(found, theirs, strict=True):
            layer = time_first(layer) if modality == "audio" else layer
            tokens = mine.tokens[row][mine.valid[row]]
            assert torch.allclose(tokens, layer[prefix:], atol=1e-5), (tokens - layer[prefix:]).abs().max()
            assert tokens.std() > 0.05
        # the class token, of which only some layouts have one
        if prefix:
            first = embedder.embed([clip], pool="class").scene[0]
            assert torch.allclose(first, theirs[-1][0], atol=1e-5)


@pytest.mark.parametrize("name", ["wav2vec2 large", "hubert large"])
def test_a_padded_batch_is_theirs_where_they_are_right(saved: Any, name: str) -> None:
    # with a norm of each frame; a group norm of theirs, and stacked convolutions, hear the padding
    model, folder = saved(name)
    clips = clips_of(name)
    extract = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    batch = extract(clips, sampling_rate=16_000, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**batch).last_hidden_state
    found = mmssl.load(folder, device="cpu").embed(clips)
    for row in range(2):
        real = found.valid[row]
        assert torch.allclose(found.tokens[row][real], theirs[row, : int(real.sum())], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_opens_in_transformers_and_is_the_same_to_the_bit(
    saved: Any, name: str, tmp_path: Path
) -> None:
    model, folder = saved(name)
    layout = LAYOUTS_OF[name]
    said = convert(folder, tmp_path / "back")
    assert said.startswith(f"transformers.{layout.architecture}.from_pretrained")
    back, report = getattr(transformers, layout.architecture).from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager"
    )
    # their pooler is no part of an encoder
    assert not {key for key in report["missing_keys"] if not key.startswith("pooler.")}
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    for clip in clips_of(name):
        for before, after in zip(run(model, clip, layout.modality), run(back.eval(), clip, layout.modality), strict=True):
            assert torch.equal(before, after)
    # and read again it is the same here, settings and tensors
    first, second = open_encoder(folder), open_encoder(tmp_path / "back")
    assert first.config == second.config
    assert first.encoder.keys() == second.encoder.keys()
    for key, tensor in first.encoder.items():
        assert torch.equal(tensor, second.encoder[key]), key


@pytest.mark.parametrize("name", ["wav2vec2 base", "wav2vec2 large", "hubert base", "data2vec audio", "siglip", "videomae"])
def test_there_and_back_gives_the_same_tensors_under_the_same_names(saved: Any, name: str, tmp_path: Path) -> None:
    # where there is no class token, whose position is added to it once and for all
    _, folder = saved(name)
    convert(folder, tmp_path / "back")
    before, after = read_weights(folder), read_weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
