"""The towers of CLIP and SigLIP, and what brings them into one space.

Their last hidden state of CLIP is our last layer, and our output that after the norm which theirs gives to the class
token alone: its class token is their `pooler_output`. CLIP's patches have no bias: ours goes into the positions when it
is written. Preprocessors: see `pictures`; that of texts is the tokenizer, see `towers`.

Projections, scale and SigLIP's pooling head are the objective's, as in a run of `clip` or `siglip`. CLIP pools a
caption at `eos_token_id`, or in old files, where that is 2, at the largest id: either must be the mark that the
tokenizer puts at the end, which no caption can spell, so that it is the last token here. SigLIP fills captions up to
the context, attends to all of it and pools the last token; its pooling head maps the query, which is done once and for
all here.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from mmssl.convert.layout import Config, Head, Layout, Pair, Settings, Towers, blocks, linear, same
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
            **({"cut": True} if side % size else {}),
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


def _read_text(theirs: Settings, tokenizer: Settings, names: Collection[str]) -> Config:
    longest = theirs["max_position_embeddings"]
    return {
        "modality": "text",
        "frontend": {"name": "tokens", "context": min(longest, tokenizer["longest"])},
        "positions": {"name": "learned", "grid": [longest]},
        "transformer": {
            **{mine: theirs[name] for name, mine in _SIZES.items()},
            "norm": "pre",
            "eps": theirs["layer_norm_eps"],
            "activation": activation(theirs),
        },
        "encoder": {},
        "augment_eval": [],
    }


def _read_clip_text(theirs: Settings, tokenizer: Settings, names: Collection[str]) -> Config:
    ours, end = _read_text(theirs, tokenizer, names), theirs["eos_token_id"]
    ours["transformer"]["causal"] = True
    pooled = tokenizer["entries"] - 1 if end == 2 else end
    if tokenizer["end"] != pooled:
        raise ValueError(
            f"config.json says eos_token_id={end!r}, so captions are pooled at id {pooled!r}, and tokenizer.json ends "
            f"them with {tokenizer['end']!r}; copy the tokenizer of this model, or take it out to read the vision tower"
        )
    return ours


def _read_siglip_text(theirs: Settings, tokenizer: Settings, names: Collection[str]) -> Config:
    ours = _read_text(theirs, tokenizer, names)
    ours["frontend"]["pad"] = theirs["pad_token_id"] if tokenizer["pad"] is None else tokenizer["pad"]
    return ours


def _write_text(ours: Config) -> tuple[Config, Config]:
    transformer = ours["transformer"]
    theirs = {
        **{name: transformer[mine] for name, mine in _SIZES.items()},
        "layer_norm_eps": transformer["eps"],
        "hidden_act": hidden_act(ours),
        "max_position_embeddings": (ours["positions"].get("grid") or [ours["frontend"]["context"]])[0],
    }
    return theirs, {"longest": ours["frontend"]["context"]}


def _write_siglip_text(ours: Config) -> tuple[Config, Config]:
    theirs, tokenizer = _write_text(ours)
    pad = ours["frontend"]["pad"]
    if pad is None:
        raise ValueError("layout siglip_text_model fills captions up to the context, and this encoder does not")
    return theirs | {"pad_token_id": pad}, tokenizer | {"pad": pad}


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


def _pairs_text(ours: Config, theirs: Settings) -> list[Pair]:
    return [
        same("frontend.table.weight", "embeddings.token_embedding.weight"),
        same("positions.table", _TABLE),
        *linear("transformer.norm", "final_layer_norm"),
        *blocks(ours, _LAYER, _NAMES),
    ]


_SCALE = Pair(("log_scale",), ("logit_scale",), lambda x: [x.view(1)], lambda x: [x.view(())])


def _joint_clip(ours: Config) -> list[Pair]:
    return [
        same("project.image.weight", "visual_projection.weight"),
        same("project.text.weight", "text_projection.weight"),
        _SCALE,
    ]


def _joint_siglip(ours: Config) -> list[Pair]:
    dim, head, there = ours["transformer"]["dim"], "attend.image", "vision_model.head"
    attention = Pair(
        tuple(f"{head}.attention.{name}" for name in ("query", "kv.weight", "kv.bias")),
        tuple(f"{there}.{name}" for name in ("probe", "attention.in_proj_weight", "attention.in_proj_bias")),
        lambda probe, weight, bias: [weight[:dim] @ probe.flatten() + bias[:dim], weight[dim:], bias[dim:]],
        lambda query, weight, bias: [
            query[None, None],
            torch.cat([torch.eye(dim), weight]),
            torch.cat([torch.zeros(dim), bias]),
        ],
    )
    return [
        attention,
        *linear(f"{head}.attention.out", f"{there}.attention.out_proj"),
        *linear(f"{head}.norm", f"{there}.layernorm"),
        *linear(f"{head}.mlp.up", f"{there}.mlp.fc1"),
        *linear(f"{head}.mlp.down", f"{there}.mlp.fc2"),
        *linear("project.text", "text_model.head"),
        same("log_scale", "logit_scale"),
        same("bias", "logit_bias"),
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
CLIP_VISION = Layout(
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
SIGLIP_VISION = Layout(
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
_TEXT_DEFAULTS: dict[str, Any] = {
    **{name: _DEFAULTS[name] for name in (*_SIZES, "hidden_act", "layer_norm_eps")},
    "max_position_embeddings": 77,
}
_TEXT: dict[str, Any] = {
    "modality": "text",
    "fixed": {},
    "prefixes": ("text_model.",),
    "written": "text_model.",
    "pairs": _pairs_text,
    "grid": lambda ours: [ours["frontend"]["context"]],
    "preprocessor": {"longest": 77, "entries": 49_408, "end": 49_407, "pad": None},
}
CLIP_TEXT = Layout(
    model_type="clip_text_model",
    architecture="CLIPTextModel",
    defaults=_TEXT_DEFAULTS
    | {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, "eos_token_id": 49_407},
    read=_read_clip_text,
    write=_write_text,
    beside=(*_BESIDE, "vision_model."),
    **_TEXT,
)
SIGLIP_TEXT = Layout(
    model_type="siglip_text_model",
    architecture="SiglipTextModel",
    defaults=_TEXT_DEFAULTS
    | {
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
    },
    read=_read_siglip_text,
    write=_write_siglip_text,
    beside=(*_BESIDE, "logit_bias", "head.", "vision_model."),
    **_TEXT,
)
CLIP = Towers(
    model_type="clip",
    architecture="CLIPModel",
    image=CLIP_VISION,
    text=CLIP_TEXT,
    objective="clip",
    settings={"pool": {"image": "class", "text": "last"}},
    space="text_projection.weight",
    pairs=_joint_clip,
)
SIGLIP = Towers(
    model_type="siglip",
    architecture="SiglipModel",
    image=SIGLIP_VISION,
    text=SIGLIP_TEXT,
    objective="siglip",
    settings={"pool": {"image": "attention", "text": "last"}, "affine": True},
    space="text_model.head.weight",
    pairs=_joint_siglip,
    more={"vision_config": {"vision_use_head": True}},
)
