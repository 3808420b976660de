"""Models of transformers, tiny and with random weights, for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.convert import LAYOUTS

transformers = pytest.importorskip("transformers")

TRUNK: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "attn_implementation": "eager",
}
SPEECH = TRUNK | {
    "conv_dim": [12, 12, 12],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 6,
}
LARGE = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
_IMAGE = TRUNK | {"image_size": 16, "patch_size": 4}
_DINO = {name: value for name, value in _IMAGE.items() if name != "intermediate_size"}
_DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 20,
}
_VIDEO = _IMAGE | _DECODER | {"num_frames": 4, "tubelet_size": 2}
# frames that the strides do not come out even with
AST_FRAMES, AST_BANDS = 59, 36
_AUDIO = TRUNK | {"patch_size": 16, "max_length": AST_FRAMES, "num_mel_bins": AST_BANDS}

# with a bias of relative positions. Of 45 tokens: ranges of distances of all widths, and some beyond the last
_DEEP = {"num_hidden_layers": 3}
_WAVLM = SPEECH | _DEEP | {"num_buckets": 16, "max_bucket_distance": 30}
_GRID = _IMAGE | _DEEP
OWN_TABLES, _ONE_TABLE = {"use_relative_position_bias": True}, {"use_shared_relative_position_bias": True}
_PLAIN = {"use_absolute_position_embeddings": True, "use_mean_pooling": False, "use_mask_token": True}
_BEIT, _D2V = ("BeitModel", "BeitConfig"), ("Data2VecVisionModel", "Data2VecVisionConfig")
RELATIVE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "wavlm base": ("WavLMModel", "WavLMConfig", _WAVLM),
    "wavlm large": ("WavLMModel", "WavLMConfig", _WAVLM | LARGE),
    "beit, one table": (*_BEIT, _GRID | _ONE_TABLE),
    "beit, a table each": (*_BEIT, _GRID | OWN_TABLES | {"use_mean_pooling": False, "use_mask_token": True}),
    "beit, both positions, no layer scale": (*_BEIT, _GRID | OWN_TABLES | _PLAIN | {"layer_scale_init_value": 0.0}),
    "beit, no bias": (*_BEIT, _GRID | _PLAIN),
    "data2vec vision, one table": (*_D2V, _GRID | _ONE_TABLE),
    "data2vec vision, a table each": (*_D2V, _GRID | OWN_TABLES | {"use_mean_pooling": False}),
}
# name -> class of the model, of its config, settings
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "wav2vec2 base": ("Wav2Vec2Model", "Wav2Vec2Config", SPEECH),
    "wav2vec2 large": ("Wav2Vec2Model", "Wav2Vec2Config", SPEECH | LARGE),
    "wav2vec2 with its pretraining head": ("Wav2Vec2ForPreTraining", "Wav2Vec2Config", SPEECH),
    "hubert base": ("HubertModel", "HubertConfig", SPEECH),
    "hubert large": ("HubertModel", "HubertConfig", SPEECH | LARGE),
    "data2vec audio": ("Data2VecAudioModel", "Data2VecAudioConfig", SPEECH | {"num_conv_pos_embeddings": 3}),
    "vit": ("ViTModel", "ViTConfig", _IMAGE),
    "vit not square, no biases": ("ViTModel", "ViTConfig", _IMAGE | {"image_size": [16, 24], "qkv_bias": False}),
    "vit_mae": ("ViTMAEModel", "ViTMAEConfig", _IMAGE | _DECODER | {"mask_ratio": 0.0}),
    "dinov2": ("Dinov2Model", "Dinov2Config", _DINO),
    "dinov2 giant": ("Dinov2Model", "Dinov2Config", _DINO | {"use_swiglu_ffn": True}),
    "dinov2 with registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", _DINO),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", _IMAGE),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", _IMAGE | {"vision_use_head": False}),
    # pictures that are no whole number of patches, as those of SigLIP so400m of patches of 14
    "vit with a margin": ("ViTModel", "ViTConfig", _IMAGE | {"image_size": [18, 23]}),
    "siglip with a margin": (
        "SiglipVisionModel",
        "SiglipVisionConfig",
        _IMAGE | {"image_size": 19, "vision_use_head": False},
    ),
    "dinov2 with a ratio": ("Dinov2Model", "Dinov2Config", _DINO | {"use_swiglu_ffn": True, "mlp_ratio": 3}),
    "videomae": ("VideoMAEModel", "VideoMAEConfig", _VIDEO | {"use_mean_pooling": False}),
    "videomae for its mean": ("VideoMAEModel", "VideoMAEConfig", _VIDEO),
    "ast": ("ASTModel", "ASTConfig", _AUDIO),
    **RELATIVE,
}
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


def build(name: str) -> Any:
    """A model away from the zeros and ones of a fresh one, behind which a forgotten bias or norm could hide."""
    kind, config, settings = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                far = 1.0 if any(part in key for part in ("table", "gru", "rel_attn")) else 0.1
                parameter += far * torch.randn_like(parameter)
    if kind == "ViTMAEModel":  # whose table is zero in a fresh model, and not in a fresh part of it
        fresh = type(model.embeddings)(model.config)
        fresh.initialize_weights()
        model.embeddings.position_embeddings.data = fresh.position_embeddings.data
    return model


def write_json(path: Path, content: dict[str, Any]) -> None:
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
    if "margin" in name:
        size = [18, 23] if name.startswith("vit") else [19, 19]
    return [rng.random((3, *([4] if modality == "video" else []), *size)).astype(np.float32) for _ in range(2)]


def given(clip: np.ndarray, modality: str) -> Tensor:
    """What their preprocessor makes of a clip."""
    settings = PREPROCESSORS[modality]
    if modality in ("speech", "audio"):
        extract = (
            transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
            if modality == "speech"
            else transformers.ASTFeatureExtractor(
                num_mel_bins=AST_BANDS, max_length=AST_FRAMES, mean=settings["mean"], std=settings["std"]
            )
        )
        return extract(clip, sampling_rate=16_000, return_tensors="pt").input_values
    mean, std = (torch.tensor(settings[f"image_{key}"]) for key in ("mean", "std"))
    return ((torch.from_numpy(clip).movedim(0, -1) - mean) / std).movedim(-1, -3)[None]


def run(model: Any, clip: np.ndarray, modality: str) -> list[Tensor]:
    """What transformers computes of one clip: (N, D) after each layer, and the output at the end."""
    model, more = getattr(model, "wav2vec2", model), {}
    x = given(clip, modality)
    if model.config.model_type == "vit_mae":  # which shuffles patches by this, also where it hides none
        more["noise"] = torch.arange(x.shape[-2] * x.shape[-1] // 16)[None].float()
    with torch.no_grad():
        out = model(x, output_hidden_states=True, **more)
        layers = [*out.hidden_states[: model.config.num_hidden_layers], out.last_hidden_state]
        if model.config.model_type == "clip_vision_model":
            # their norm at the end is for the class token alone
            layers.append(model.post_layernorm(out.last_hidden_state))
    return [layer[0] for layer in layers]
