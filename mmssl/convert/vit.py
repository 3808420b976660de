"""ViT, ViTMAE and DINOv2: blocks with a norm before each branch, and one at the end.

The class token of theirs has a position of its own, which is added to it once and for all here; it is zero in what is
written. Where theirs has no bias of queries, keys and values, ours is zero. A table of positions that is fixed here is
written as a learned one, except for ViTMAE, whose own is fixed. Preprocessors: see `pictures`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from mmssl.convert.layout import Config, Head, Layout, Pair, Settings, blocks, linear, row, same
from mmssl.convert.pictures import (
    HALF,
    IMAGENET,
    SIZE_DEFAULTS,
    SIZES,
    activation,
    channels,
    hidden_act,
    patches,
    picture_grid,
    picture_size,
    preprocessor_of,
    sides,
    steps_of,
    table_of,
)

SELF = "attention.attention"
NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
    "q": f"{SELF}.query",
    "k": f"{SELF}.key",
    "v": f"{SELF}.value",
}
_DINO = NAMES | {
    "norm1": "norm1",
    "norm2": "norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
    "scale1": "layer_scale1.lambda1",
    "scale2": "layer_scale2.lambda1",
}
LAYER = "encoder.layer.{}"
PATCHES = "embeddings.patch_embeddings.projection"
CLASS, TABLE, MASK = "embeddings.cls_token", "embeddings.position_embeddings", "embeddings.mask_token"


def trunk(theirs: Settings) -> dict[str, Any]:
    """Our section `transformer` of their settings."""
    return {
        **{mine: theirs[name] for name, mine in SIZES.items() if name in theirs},
        "norm": "pre",
        "eps": theirs["layer_norm_eps"],
        "activation": activation(theirs),
    }


def their_trunk(ours: Config) -> Config:
    """Their settings of our section `transformer`."""
    transformer = ours["transformer"]
    return {
        **{name: transformer[mine] for name, mine in SIZES.items()},
        "layer_norm_eps": transformer["eps"],
        "hidden_act": hidden_act(ours),
    }


def read_vit(theirs: Settings, preprocessor: Settings, names: Collection[str]) -> Config:
    (height, width), (tall, wide) = sides(theirs["image_size"]), sides(theirs["patch_size"])
    return {
        "modality": "image",
        "frontend": {
            "name": "patches",
            "size": [tall, wide],
            "channels": theirs["num_channels"],
            **channels(preprocessor, theirs["num_channels"]),
            **({"cut": True} if height % tall or width % wide else {}),
        },
        "positions": {"name": "learned", "grid": [height // tall, width // wide]},
        "transformer": trunk(theirs),
        "encoder": {"prefix": 1, "mask_token": MASK in names},
        "augment_eval": steps_of(preprocessor),
    }


def _read_vit_mae(theirs: Settings, preprocessor: Settings, names: Collection[str]) -> Config:
    ours = read_vit(theirs, preprocessor, names)
    ours["positions"] = {"name": "sincos", "train_grid": ours["positions"]["grid"]}
    return ours


def _read_dinov2(theirs: Settings, preprocessor: Settings, names: Collection[str]) -> Config:
    hidden, gated = int(theirs["hidden_size"] * theirs["mlp_ratio"]), theirs["use_swiglu_ffn"]
    ours = read_vit(theirs, preprocessor, names)
    ours["transformer"] |= {
        "mlp_dim": _gated_dim(hidden) if gated else hidden,
        "drop_path": theirs["drop_path_rate"],
        "layer_scale": theirs["layerscale_value"],
    }
    if gated:
        ours["transformer"]["activation"] = "swiglu"
    return ours


def _gated_dim(hidden: int) -> int:
    """Two thirds of it, which a gate makes as many weights of, rounded up to a multiple of 8."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def _read_registers(theirs: Settings, preprocessor: Settings, names: Collection[str]) -> Config:
    ours = _read_dinov2(theirs, preprocessor, names)
    ours["encoder"]["prefix"] = 1 + theirs["num_register_tokens"]
    ours["positions"]["antialias"] = True
    return ours


def write_vit(ours: Config) -> tuple[Config, Config]:
    frontend = ours["frontend"]
    theirs = {
        **their_trunk(ours),
        "image_size": plain(picture_size(ours)),
        "patch_size": plain(frontend["size"]),
        "num_channels": frontend["channels"],
        "qkv_bias": True,
    }
    return theirs, preprocessor_of(ours, "ViTImageProcessor")


def _write_vit_mae(ours: Config) -> tuple[Config, Config]:
    # as a model that embeds it hides nothing
    theirs, preprocessor = write_vit(ours)
    return {**theirs, "mask_ratio": 0.0}, preprocessor


def _write_dinov2(ours: Config) -> tuple[Config, Config]:
    theirs, preprocessor = write_vit(ours)
    transformer = ours["transformer"]
    del theirs["intermediate_size"]
    gated = transformer["activation"] == "swiglu"
    dim, inner = transformer["dim"], transformer["mlp_dim"]
    ratios = [ratio for ratio in range(1, 17) if (_gated_dim(ratio * dim) if gated else ratio * dim) == inner]
    theirs |= {
        "mlp_ratio": next(iter(ratios), 4),  # another width is found out when it is read back
        "use_swiglu_ffn": gated,
        # where there is none it is not None there, which is read back and refused
        "layerscale_value": 1.0 if transformer["layer_scale"] is None else transformer["layer_scale"],
        "drop_path_rate": transformer["drop_path"],
        "use_mask_token": ours["encoder"]["mask_token"],
    }
    return theirs, {**preprocessor, "image_processor_type": "BitImageProcessor"}


def _write_registers(ours: Config) -> tuple[Config, Config]:
    theirs, preprocessor = _write_dinov2(ours)
    return {**theirs, "num_register_tokens": max(ours["encoder"]["prefix"] - 1, 0)}, preprocessor


def plain(size: Sequence[int]) -> int | list[int]:
    """One number of two equal ones."""
    return size[0] if size[0] == size[1] else list(size)


def body(ours: Config, theirs: Settings, names: dict[str, str] = NAMES) -> list[Pair]:
    """All but the class token and the positions."""
    pairs = [
        patches(ours, f"{PATCHES}.weight"),
        same("frontend.project.bias", f"{PATCHES}.bias"),
        *linear("transformer.norm", "layernorm"),
        *blocks(ours, LAYER, names, bias=theirs["qkv_bias"]),
    ]
    if ours["encoder"]["mask_token"]:
        pairs.append(row("mask_token", MASK))
    return pairs


def _pairs_vit(ours: Config, theirs: Settings) -> list[Pair]:
    return [*body(ours, theirs), class_and_table()]


def class_and_table() -> Pair:
    """A class token and a table of positions with one for it."""
    return Pair(
        ("prefix", "positions.table"),
        (CLASS, TABLE),
        lambda first, table: [first[0] + table[0, :1], table[0, 1:]],
        lambda prefix, table: [prefix[None], torch.cat([torch.zeros_like(prefix), table])[None]],
    )


def _pairs_vit_mae(ours: Config, theirs: Settings) -> list[Pair]:
    table = table_of(ours, picture_grid(ours))

    def read(first: Tensor, given: Tensor) -> list[Tensor]:
        if given.shape[1] != 1 + len(table) or not torch.allclose(given[0, 1:], table, atol=1e-4):
            raise ValueError(
                f"{TABLE}: these are not the sines and cosines of a ViTMAE; with model_type vit in its config.json "
                "the table can be read as a learned one"
            )
        return [first[0] + given[0, :1]]

    def write(prefix: Tensor) -> list[Tensor]:
        return [prefix[None], torch.cat([torch.zeros_like(prefix), table])[None]]

    return [*body(ours, theirs), Pair(("prefix",), (CLASS, TABLE), read, write)]


def _pairs_dinov2(ours: Config, theirs: Settings) -> list[Pair]:
    gated = {"up": "mlp.weights_in", "down": "mlp.weights_out"} if theirs["use_swiglu_ffn"] else {}
    shared = [pair for pair in body(ours, theirs, _DINO | gated) if pair.ours != ("mask_token",)]
    if ours["encoder"]["mask_token"]:
        shared.append(Pair(("mask_token",), (MASK,), lambda x: [x[0]], lambda x: [x[None]]))
    return [*shared, class_and_table()]


def _pairs_registers(ours: Config, theirs: Settings) -> list[Pair]:
    # registers have no position there
    registers = Pair(
        ("prefix", "positions.table"),
        (CLASS, "embeddings.register_tokens", TABLE),
        lambda first, more, table: [torch.cat([first[0] + table[0, :1], more[0]]), table[0, 1:]],
        lambda prefix, table: [
            prefix[None, :1],
            prefix[None, 1:],
            torch.cat([torch.zeros_like(prefix[:1]), table])[None],
        ],
    )
    return [*_pairs_dinov2(ours, theirs)[:-1], registers]


def _heads_vit(ours: Config) -> list[Head]:
    return [FIRST_TOKEN]


def _heads_dinov2(ours: Config) -> list[Head]:
    # theirs reads the class token and the mean of patches side by side, ours either: the other has weights of zero
    bias = same("head.linear.bias", "classifier.bias")
    return [
        Head({"pooling": "class", "head_norm": "none"}, [_half(0), bias]),
        Head({"pooling": "mean", "head_norm": "none"}, [_half(1), bias]),
    ]


def _half(which: int) -> Pair:
    def read(both: Tensor) -> list[Tensor]:
        halves = both.chunk(2, dim=1)
        if halves[1 - which].any():
            raise ValueError("classifier reads the class token and the mean of patches, and objective classify either")
        return [halves[which]]

    def write(own: Tensor) -> list[Tensor]:
        return [torch.cat([torch.zeros_like(own), own] if which else [own, torch.zeros_like(own)], 1)]

    return Pair(("head.linear.weight",), ("classifier.weight",), read, write)


FIRST_TOKEN = Head({"pooling": "class", "head_norm": "none"}, linear("head.linear", "classifier"))
HEADS = ("pooler.", "classifier.", "decoder.", "fc_norm.")
DEFAULTS: dict[str, Any] = {
    **SIZE_DEFAULTS,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}
_VIT_PREPROCESSOR: dict[str, Any] = {**HALF, "size": {"height": 224, "width": 224}, "resample": 2}
_DINO_DEFAULTS: dict[str, Any] = {
    **{name: value for name, value in DEFAULTS.items() if name != "intermediate_size"},
    "layer_norm_eps": 1e-6,
    "patch_size": 14,
    "mlp_ratio": 4,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
    "drop_path_rate": 0.0,
}
CROPPED: dict[str, Any] = {
    "do_center_crop": True,
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
}
VIT = Layout(
    model_type="vit",
    architecture="ViTModel",
    modality="image",
    defaults=DEFAULTS,
    fixed={},
    read=read_vit,
    write=write_vit,
    pairs=_pairs_vit,
    prefixes=("vit.",),
    beside=HEADS,
    preprocessor=_VIT_PREPROCESSOR,
    grid=picture_grid,
    classifier="ViTForImageClassification",
    heads=_heads_vit,
)
VIT_MAE = Layout(
    model_type="vit_mae",
    architecture="ViTMAEModel",
    modality="image",
    defaults=DEFAULTS,
    fixed={},
    read=_read_vit_mae,
    write=_write_vit_mae,
    pairs=_pairs_vit_mae,
    prefixes=("vit.",),
    beside=HEADS,
    preprocessor=_VIT_PREPROCESSOR | IMAGENET,
)
DINOV2 = Layout(
    model_type="dinov2",
    architecture="Dinov2Model",
    modality="image",
    defaults=_DINO_DEFAULTS,
    fixed={},
    read=_read_dinov2,
    write=_write_dinov2,
    pairs=_pairs_dinov2,
    prefixes=("dinov2.",),
    beside=HEADS,
    preprocessor=CROPPED | IMAGENET,
    grid=picture_grid,
    classifier="Dinov2ForImageClassification",
    heads=_heads_dinov2,
)
DINOV2_WITH_REGISTERS = Layout(
    model_type="dinov2_with_registers",
    architecture="Dinov2WithRegistersModel",
    modality="image",
    defaults=_DINO_DEFAULTS | {"patch_size": 16, "num_register_tokens": 4},
    fixed={},
    read=_read_registers,
    write=_write_registers,
    pairs=_pairs_registers,
    prefixes=("dinov2_with_registers.",),
    beside=HEADS,
    preprocessor=CROPPED | IMAGENET,
    grid=picture_grid,
    classifier="Dinov2WithRegistersForImageClassification",
    heads=_heads_dinov2,
)
