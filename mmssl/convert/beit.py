"""BEiT and Data2VecVision: one ViT under two names, with a bias of relative positions and layer scale.

Each block has a table of the bias, or all share one; in both it goes over differences down, then across, and ends with
the three values of the class token, as here. Keys have no bias in theirs, and ours is zero: one that all keys have
changes no attention. Where theirs takes the mean over patches (`use_mean_pooling`) there is no norm at the end; that
behind the mean belongs to the pooler, which is no part of the encoder. Preprocessors: see `pictures`.

Pictures of another size have the table stretched, as there. Where they are not square, theirs takes the two axes of its
table for each other: such a model is read as its authors meant it, and none is written.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch

from mmssl.convert.layout import Config, Head, Layout, Pair, Settings, linear, row, same
from mmssl.convert.pictures import HALF, patches, picture_grid, sides
from mmssl.convert.videomae import keyless_blocks
from mmssl.convert.vit import (
    CLASS,
    DEFAULTS,
    FIRST_TOKEN,
    HEADS,
    LAYER,
    MASK,
    NAMES,
    PATCHES,
    SELF,
    class_and_table,
    read_vit,
    write_vit,
)

log = logging.getLogger(__name__)

_TABLE = "relative_position_bias.relative_position_bias_table"
_NAMES = NAMES | {"scale1": "lambda_1", "scale2": "lambda_2"}
_BIASES = (f"{NAMES['q']}.bias", f"{NAMES['v']}.bias")


def _read(theirs: Settings, preprocessor: Settings, names: Collection[str]) -> Config:
    own, shared = theirs["use_relative_position_bias"], theirs["use_shared_relative_position_bias"]
    if own and shared:
        raise ValueError(
            "use_relative_position_bias and use_shared_relative_position_bias are both true, and our blocks have "
            "tables of their own or share one"
        )
    ours = read_vit(theirs, preprocessor, names)
    ours["transformer"] |= {
        "drop_path": theirs["drop_path_rate"],
        "layer_scale": theirs["layer_scale_init_value"] or None,
        "final_norm": not theirs["use_mean_pooling"],
        "bias": {"name": "grid", "grid": ours["positions"]["grid"], "shared": shared} if own or shared else None,
    }
    if not theirs["use_absolute_position_embeddings"]:
        ours["positions"] = {"name": "none"}
    down, across = ours["frontend"]["size"]
    height, width = sides(theirs["image_size"])
    if ours["transformer"]["bias"] is not None and height // down != width // across:
        log.warning(
            "image_size=%s: of pictures that are not square transformers takes the axes of the bias for each other; it "
            "is read as its authors meant it, so vectors differ from theirs",
            [height, width],
        )
    return ours


def _write(ours: Config) -> tuple[Config, Config]:
    transformer = ours["transformer"]
    bias = transformer["bias"] or {"grid": [1, 1]}
    if bias["grid"][0] != bias["grid"][-1]:
        raise ValueError(
            f"transformer.bias: a grid of {bias['grid']} is not square, and transformers takes the axes of such a "
            "table for each other"
        )
    theirs, preprocessor = write_vit(ours)
    del theirs["qkv_bias"]
    theirs |= {
        "use_mask_token": ours["encoder"]["mask_token"],
        "use_absolute_position_embeddings": ours["positions"]["name"] == "learned",
        "use_relative_position_bias": bias.get("shared") is False,
        "use_shared_relative_position_bias": bias.get("shared") is True,
        "layer_scale_init_value": transformer["layer_scale"] or 0.0,
        "drop_path_rate": transformer["drop_path"],
        "use_mean_pooling": not transformer["final_norm"],
    }
    return theirs, {**preprocessor, "image_processor_type": "BeitImageProcessor"}


def _pairs(ours: Config, theirs: Settings) -> list[Pair]:
    transformer = ours["transformer"]
    pairs = [
        patches(ours, f"{PATCHES}.weight"),
        same("frontend.project.bias", f"{PATCHES}.bias"),
        *keyless_blocks(ours, LAYER, _NAMES, biases=_BIASES),
    ]
    if transformer["final_norm"]:
        pairs += linear("transformer.norm", "layernorm")
    if ours["encoder"]["mask_token"]:
        pairs.append(row("mask_token", MASK))
    if ours["positions"]["name"] == "learned":
        pairs.append(class_and_table())
    else:
        pairs.append(Pair(("prefix",), (CLASS,), lambda x: [x[0]], lambda x: [x[None]]))
    if transformer["bias"] is not None:
        shared = transformer["bias"]["shared"]
        depth = range(transformer["depth"])
        tables = [f"encoder.{_TABLE}"] if shared else [f"{LAYER.format(i)}.{SELF}.{_TABLE}" for i in depth]
        pairs.append(Pair(("transformer.bias.table",), tuple(tables), lambda *x: [torch.stack(x)], lambda x: list(x)))
    return pairs


def _heads(ours: Config) -> list[Head]:
    if ours["transformer"]["final_norm"]:
        return [FIRST_TOKEN]
    settings = {"pooling": "mean", "head_norm": "layer", "head_eps": ours["transformer"]["eps"]}
    return [Head(settings, linear("head.linear", "classifier"), inside=linear("head.norm", "pooler.layernorm"))]


_SHARED: dict[str, Any] = {
    "modality": "image",
    "defaults": {
        **{name: value for name, value in DEFAULTS.items() if name != "qkv_bias"},
        "use_mask_token": False,
        "use_absolute_position_embeddings": False,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": False,
        "layer_scale_init_value": 0.1,
        "drop_path_rate": 0.1,
        "use_mean_pooling": True,
    },
    "fixed": {},
    "read": _read,
    "write": _write,
    "pairs": _pairs,
    "beside": (*HEADS, "layernorm.", "lm_head.", "decode_head.", "auxiliary_head.", "fpn"),
    "preprocessor": {**HALF, "size": {"height": 224, "width": 224}, "resample": 3},
    "grid": picture_grid,
    "positions": ("learned",),
    "heads": _heads,
}
BEIT = Layout(
    model_type="beit",
    architecture="BeitModel",
    prefixes=("beit.",),
    classifier="BeitForImageClassification",
    **_SHARED,
)
DATA2VEC_VISION = Layout(
    model_type="data2vec-vision",
    architecture="Data2VecVisionModel",
    prefixes=("data2vec_vision.",),
    classifier="Data2VecVisionForImageClassification",
    **_SHARED,
)
