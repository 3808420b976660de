"""The vision towers of CLIP and SigLIP.

Their last hidden state of CLIP is our last layer, and our output that after the norm which theirs gives to the class
token alone: its class token is their `pooler_output`. CLIP's projection to the space of texts and SigLIP's pooling head
are no part of the encoder. CLIP's patches have no bias: ours goes into the positions when it is written. Preprocessors:
see `pictures`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from mmssl.convert.layout import Config, Head, Layout, Pair, Settings, blocks, linear, same
from mmssl.convert.pictures import (
    HALF,
    SIZE_DEFAULTS,
    activation,
    channels,
    hidden_act,
    patches,
    picture_grid,
    picture_size,
    preprocessor_of,
    steps_of,
)

_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "out": "self_attn.out_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
}
_LAYER = "encoder.layers.{}"
_PATCHES, _TABLE = "embeddings.patch_embedding", "embeddings.position_embedding.weight"
_SIZES = {
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_dim",
    "attention_dropout": "attention_dropout",
}


def _read_siglip(theirs: Settings, preprocessor: Settings, names: Collection[str]) -> Config:
    size, side = theirs["patch_size"], theirs["image_size"]
    return {
        "modality": "image",
        "frontend": {
            "name": "patches",
            "size": [size, size],
            "channels": theirs["num_channels"],
            **channels(preprocessor, theirs["num_channels"]),
        },
        "positions": {"name": "learned", "grid": [side // size, side // size]},
        "transformer": {
            **{mine: theirs[name] for name, mine in _SIZES.items()},
            "norm": "pre",
            "eps": theirs["layer_norm_eps"],
            "activation": activation(theirs),
        },
        "encoder": {},
        "augment_eval": steps_of(preprocessor),
    }


def _read_clip(theirs: Settings, preprocessor: Settings, names: Collection[str]) -> Config:
    ours = _read_siglip(theirs, preprocessor, names)
    ours["transformer"]["input_norm"] = True
    ours["encoder"]["prefix"] = 1
    return ours


def _write_siglip(ours: Config) -> tuple[Config, Config]:
    transformer, frontend = ours["transformer"], ours["frontend"]
    theirs = {
        **{name: transformer[mine] for name, mine in _SIZES.items()},
        "layer_norm_eps": transformer["eps"],
        "hidden_act": hidden_act(ours),
        # square in theirs
        "image_size": picture_size(ours)[0],
        "patch_size": frontend["size"][0],
        "num_channels": frontend["channels"],
        "vision_use_head": False,
    }
    return theirs, preprocessor_of(ours, "SiglipImageProcessor")


def _write_clip(ours: Config) -> tuple[Config, Config]:
    theirs, preprocessor = _write_siglip(ours)
    del theirs["vision_use_head"]
    return theirs, {**preprocessor, "image_processor_type": "CLIPImageProcessor"}


def _pairs_siglip(ours: Config, theirs: Settings) -> list[Pair]:
    return [
        patches(ours, f"{_PATCHES}.weight"),
        same("frontend.project.bias", f"{_PATCHES}.bias"),
        same("positions.table", _TABLE),
        *linear("transformer.norm", "post_layernorm"),
        *blocks(ours, _LAYER, _NAMES),
    ]


def _pairs_clip(ours: Config, theirs: Settings) -> list[Pair]:
    table = Pair(
        ("frontend.project.bias", "prefix", "positions.table"),
        ("embeddings.class_embedding", _TABLE),
        lambda first, table: [torch.zeros_like(first), (first + table[0])[None], table[1:]],
        lambda bias, prefix, table: [prefix[0], torch.cat([torch.zeros_like(prefix), table + bias])],
    )
    return [
        patches(ours, f"{_PATCHES}.weight"),
        table,
        # theirs is spelled so
        *linear("transformer.input_norm", "pre_layrnorm"),
        *linear("transformer.norm", "post_layernorm"),
        *blocks(ours, _LAYER, _NAMES),
    ]


def _heads_siglip(ours: Config) -> list[Head]:
    return [Head({"pooling": "mean", "head_norm": "none"}, linear("head.linear", "classifier"))]


_DEFAULTS: dict[str, Any] = {
    **{name: SIZE_DEFAULTS.get(name, 0.0) for name in _SIZES},
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_SHARED: dict[str, Any] = {
    "modality": "image",
    "fixed": {},
    "prefixes": ("vision_model.",),
    "written": "vision_model.",
    "nested": "vision_config",
    "grid": picture_grid,
}
_BESIDE = ("text_model.", "logit_scale", "text_projection.", "visual_projection.")
CLIP = Layout(
    model_type="clip_vision_model",
    architecture="CLIPVisionModel",
    defaults=_DEFAULTS,
    read=_read_clip,
    write=_write_clip,
    pairs=_pairs_clip,
    beside=_BESIDE,
    preprocessor={
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
    },
    **_SHARED,
)
SIGLIP = Layout(
    model_type="siglip_vision_model",
    architecture="SiglipVisionModel",
    defaults=_DEFAULTS | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    read=_read_siglip,
    write=_write_siglip,
    pairs=_pairs_siglip,
    beside=(*_BESIDE, "logit_bias", "head.", "classifier."),
    preprocessor={**HALF, "size": {"height": 224, "width": 224}, "resample": 3},
    classifier="SiglipForImageClassification",
    heads=_heads_siglip,
    idle=("head.",),
    **_SHARED,
)
