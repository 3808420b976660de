"""ViT, ViTMAE, DINOv2, VideoMAE and AST: blocks with a norm before each branch, and one at the end.

The class token of theirs has a position of its own, which is added to it once and for all here; it is zero in what is
written. Where theirs has no bias of queries, keys or values, ours is zero; where theirs has none of keys, ours is left
out, as a bias that all keys have changes no attention. A table of positions that is fixed here is written as a learned
one.

Preprocessors: see `pictures`. Of VideoMAE `num_frames` is taken from config.json: so many frames from the middle of a
file, but at the frontend's own 7.5 frames per second (every fourth of 30), which theirs leaves to its user. Of AST
`mean`, `std`, `do_normalize` and `sampling_rate` are the preprocessor's, `num_mel_bins` and `max_length` are
config.json's, and the filterbank is Kaldi's with a Hann window, as there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from mmssl.convert.layout import Config, Layout, Pair, Settings, blocks, linear, row, same
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

_SELF = "attention.attention"
NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
    "q": f"{_SELF}.query",
    "k": f"{_SELF}.key",
    "v": f"{_SELF}.value",
}
_DINO = NAMES | {
    "norm1": "norm1",
    "norm2": "norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
    "scale1": "layer_scale1.lambda1",
    "scale2": "layer_scale2.lambda1",
}
_LAYER = "encoder.layer.{}"
_PATCHES = "embeddings.patch_embeddings.projection"
_CLASS, _TABLE, _MASK = "embeddings.cls_token", "embeddings.position_embeddings", "embeddings.mask_token"


def _trunk(theirs: Settings) -> dict[str, Any]:
    return {
        **{mine: theirs[name] for name, mine in SIZES.items() if name in theirs},
        "norm": "pre",
        "eps": theirs["layer_norm_eps"],
        "activation": activation(theirs),
    }


def _their_trunk(ours: Config) -> Config:
    transformer = ours["transformer"]
    return {
        **{name: transformer[mine] for name, mine in SIZES.items()},
        "layer_norm_eps": transformer["eps"],
        "hidden_act": hidden_act(ours),
    }


def _read_vit(theirs: Settings, preprocessor: Settings, names: Collection[str]) -> Config:
    (height, width), (tall, wide) = sides(theirs["image_size"]), sides(theirs["patch_size"])
    return {
        "modality": "image",
        "frontend": {
            "name": "patches",
            "size": [tall, wide],
            "channels": theirs["num_channels"],
            **channels(preprocessor, theirs["num_channels"]),
        },
        "positions": {"name": "learned", "grid": [height // tall, width // wide]},
        "transformer": _trunk(theirs),
        "encoder": {"prefix": 1, "mask_token": _MASK in names},
        "augment_eval": steps_of(preprocessor),
    }


def _read_vit_mae(theirs: Settings, preprocessor: Settings, names: Collection[str]) -> Config:
    ours = _read_vit(theirs, preprocessor, names)
    ours["positions"] = {"name": "sincos", "train_grid": ours["positions"]["grid"]}
    return ours


def _read_dinov2(theirs: Settings, preprocessor: Settings, names: Collection[str]) -> Config:
    hidden, gated = int(theirs["hidden_size"] * theirs["mlp_ratio"]), theirs["use_swiglu_ffn"]
    ours = _read_vit(theirs, preprocessor, names)
    ours["transformer"] |= {
        # two thirds of it, which a gate makes as many weights of, rounded up to a multiple of 8
        "mlp_dim": (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden,
        "drop_path": theirs["drop_path_rate"],
        "layer_scale": theirs["layerscale_value"],
    }
    if gated:
        ours["transformer"]["activation"] = "swiglu"
    return ours


def _read_registers(theirs: Settings, preprocessor: Settings, names: Collection[str]) -> Config:
    ours = _read_dinov2(theirs, preprocessor, names)
    ours["encoder"]["prefix"] = 1 + theirs["num_register_tokens"]
    return ours


def _read_videomae(theirs: Settings, preprocessor: Settings, names: Collection[str]) -> Config:
    (height, width), (tall, wide) = sides(theirs["image_size"]), sides(theirs["patch_size"])
    deep = theirs["tubelet_size"]
    return {
        "modality": "video",
        "frontend": {
            "name": "tubes",
            "size": [deep, tall, wide],
            "channels": theirs["num_channels"],
            **channels(preprocessor, theirs["num_channels"]),
        },
        "positions": {
            "name": "flat_sincos",
            "grid": [theirs["num_frames"] // deep, height // tall, width // wide],
        },
        "transformer": {**_trunk(theirs), "final_norm": not theirs["use_mean_pooling"]},
        "encoder": {},
        "augment_eval": [{"name": "center_span", "frames": theirs["num_frames"]}, *steps_of(preprocessor)],
    }


def _read_ast(theirs: Settings, preprocessor: Settings, names: Collection[str]) -> Config:
    size, bands, frames = theirs["patch_size"], theirs["num_mel_bins"], theirs["max_length"]
    stride = [theirs["time_stride"], theirs["frequency_stride"]]
    plain = {"mean": 0.0, "std": 0.5}  # which, as two deviations are 1, leaves energies as they are
    return {
        "modality": "audio",
        "frontend": {
            "name": "spectrogram",
            "size": [size, size],
            "stride": stride,
            "bands": bands,
            "frames": frames,
            "rate": preprocessor["sampling_rate"],
            **({name: preprocessor[name] for name in plain} if preprocessor["do_normalize"] else plain),
        },
        "positions": {
            "name": "learned",
            "grid": [(frames - size) // stride[0] + 1, (bands - size) // stride[1] + 1],
        },
        "transformer": _trunk(theirs),
        "encoder": {"prefix": 2},
        "augment_eval": [],
    }


def _write_vit(ours: Config) -> tuple[Config, Config]:
    frontend = ours["frontend"]
    theirs = {
        **_their_trunk(ours),
        "image_size": _plain(picture_size(ours)),
        "patch_size": _plain(frontend["size"]),
        "num_channels": frontend["channels"],
        "qkv_bias": True,
    }
    return theirs, preprocessor_of(ours, "ViTImageProcessor")


def _write_vit_mae(ours: Config) -> tuple[Config, Config]:
    # as a model that embeds it hides nothing
    theirs, preprocessor = _write_vit(ours)
    return {**theirs, "mask_ratio": 0.0}, preprocessor


def _write_dinov2(ours: Config) -> tuple[Config, Config]:
    theirs, preprocessor = _write_vit(ours)
    transformer = ours["transformer"]
    del theirs["intermediate_size"]
    gated = transformer["activation"] == "swiglu"
    theirs |= {
        "mlp_ratio": 4 if gated else transformer["mlp_dim"] // transformer["dim"],
        "use_swiglu_ffn": gated,
        "layerscale_value": transformer["layer_scale"],
        "drop_path_rate": transformer["drop_path"],
        "use_mask_token": ours["encoder"]["mask_token"],
    }
    return theirs, {**preprocessor, "image_processor_type": "BitImageProcessor"}


def _write_registers(ours: Config) -> tuple[Config, Config]:
    theirs, preprocessor = _write_dinov2(ours)
    return {**theirs, "num_register_tokens": max(ours["encoder"]["prefix"] - 1, 0)}, preprocessor


def _write_videomae(ours: Config) -> tuple[Config, Config]:
    frontend = ours["frontend"]
    deep, tall, wide = frontend["size"]
    span = next((step["frames"] for step in ours["augment_eval"] if step["name"] == "center_span"), None)
    grid = ours["positions"].get("grid")
    theirs = {
        **_their_trunk(ours),
        "image_size": _plain(picture_size(ours)),
        "patch_size": _plain([tall, wide]),
        "tubelet_size": deep,
        "num_frames": grid[0] * deep if grid is not None else span or deep,
        "num_channels": frontend["channels"],
        "qv_bias": True,
        "use_mean_pooling": not ours["transformer"]["final_norm"],
    }
    return theirs, preprocessor_of(ours, "VideoMAEImageProcessor")


def _write_ast(ours: Config) -> tuple[Config, Config]:
    frontend = ours["frontend"]
    size, stride = frontend["size"], frontend["stride"] or frontend["size"]
    theirs = {
        **_their_trunk(ours),
        "patch_size": size[0],
        "time_stride": stride[0],
        "frequency_stride": stride[1],
        "num_mel_bins": frontend["bands"],
        "max_length": frontend["frames"] or 1024,
        "qkv_bias": True,
    }
    preprocessor = {
        "feature_extractor_type": "ASTFeatureExtractor",
        "feature_size": 1,
        "padding_value": 0.0,
        "num_mel_bins": frontend["bands"],
        "max_length": theirs["max_length"],
        "sampling_rate": frontend["rate"],
        "do_normalize": True,
        "mean": frontend["mean"],
        "std": frontend["std"],
    }
    return theirs, preprocessor


def _plain(size: Sequence[int]) -> int | list[int]:
    """One number of two equal ones."""
    return size[0] if size[0] == size[1] else list(size)


def _shared(ours: Config, theirs: Settings, names: dict[str, str] = NAMES) -> list[Pair]:
    """All but the class token and the positions."""
    pairs = [
        patches(ours, f"{_PATCHES}.weight"),
        same("frontend.project.bias", f"{_PATCHES}.bias"),
        *linear("transformer.norm", "layernorm"),
        *blocks(ours, _LAYER, names, bias=theirs["qkv_bias"]),
    ]
    if ours["encoder"]["mask_token"]:
        pairs.append(row("mask_token", _MASK))
    return pairs


def _pairs_vit(ours: Config, theirs: Settings) -> list[Pair]:
    return [*_shared(ours, theirs), _class_and_table()]


def _class_and_table() -> Pair:
    return Pair(
        ("prefix", "positions.table"),
        (_CLASS, _TABLE),
        lambda first, table: [first[0] + table[0, :1], table[0, 1:]],
        lambda prefix, table: [prefix[None], torch.cat([torch.zeros_like(prefix), table])[None]],
    )


def _pairs_vit_mae(ours: Config, theirs: Settings) -> list[Pair]:
    table = table_of(ours, picture_grid(ours))

    def read(first: Tensor, given: Tensor) -> list[Tensor]:
        if given.shape[1] != 1 + len(table) or not torch.allclose(given[0, 1:], table, atol=1e-4):
            raise ValueError(
                f"{_TABLE}: these are not the sines and cosines of a ViTMAE; with model_type vit in its config.json "
                "the table can be read as a learned one"
            )
        return [first[0] + given[0, :1]]

    def write(prefix: Tensor) -> list[Tensor]:
        return [prefix[None], torch.cat([torch.zeros_like(prefix), table])[None]]

    return [*_shared(ours, theirs), Pair(("prefix",), (_CLASS, _TABLE), read, write)]


def _pairs_dinov2(ours: Config, theirs: Settings) -> list[Pair]:
    gated = {"up": "mlp.weights_in", "down": "mlp.weights_out"} if theirs["use_swiglu_ffn"] else {}
    shared = [pair for pair in _shared(ours, theirs, _DINO | gated) if pair.ours != ("mask_token",)]
    if ours["encoder"]["mask_token"]:
        shared.append(Pair(("mask_token",), (_MASK,), lambda x: [x[0]], lambda x: [x[None]]))
    return [*shared, _class_and_table()]


def _pairs_registers(ours: Config, theirs: Settings) -> list[Pair]:
    # registers have no position there
    registers = Pair(
        ("prefix", "positions.table"),
        (_CLASS, "embeddings.register_tokens", _TABLE),
        lambda first, more, table: [torch.cat([first[0] + table[0, :1], more[0]]), table[0, 1:]],
        lambda prefix, table: [
            prefix[None, :1],
            prefix[None, 1:],
            torch.cat([torch.zeros_like(prefix[:1]), table])[None],
        ],
    )
    return [*_pairs_dinov2(ours, theirs)[:-1], registers]


def _pairs_videomae(ours: Config, theirs: Settings) -> list[Pair]:
    pairs = [
        patches(ours, f"{_PATCHES}.weight"),
        same("frontend.project.bias", f"{_PATCHES}.bias"),
        *keyless_blocks(ours, _LAYER, bias=theirs["qv_bias"]),
    ]
    return [*pairs, *linear("transformer.norm", "layernorm")] if ours["transformer"]["final_norm"] else pairs


def keyless_blocks(config: Config, layer: str, *, bias: bool = True, ours: str = "transformer") -> list[Pair]:
    """The tensors of all blocks of VideoMAE, whose keys have no bias; see `blocks`."""
    pairs = blocks(config, layer, NAMES, bias=False, ours=ours)
    if not bias:
        return pairs
    for i in range(config["transformer"]["depth"]):
        mine, there = f"{ours}.blocks.{i}.attention.qkv.bias", f"{layer.format(i)}.{_SELF}"
        pairs.remove(next(pair for pair in pairs if pair.ours == (mine,)))
        pairs.append(
            Pair(
                (mine,),
                (f"{there}.q_bias", f"{there}.v_bias"),
                lambda q, v: [torch.cat([q, torch.zeros_like(q), v])],
                lambda x: x.chunk(3)[::2],
            )
        )
    return pairs


def _pairs_ast(ours: Config, theirs: Settings) -> list[Pair]:
    # frequency is the outer axis there, of the tokens and of the values of a patch, and time here
    times, bands = ours["positions"]["grid"]
    dim, size = ours["transformer"]["dim"], ours["frontend"]["size"]
    distillation = "embeddings.distillation_token"
    shared = _shared({**ours, "frontend": {**ours["frontend"], "channels": 1}}, theirs)
    projection = Pair(
        ("frontend.project.weight",),
        (f"{_PATCHES}.weight",),
        lambda x: [x[:, 0].transpose(1, 2).flatten(1)],
        lambda x: [x.view(dim, *size).transpose(1, 2)[:, None]],
    )
    table = Pair(
        ("prefix", "positions.table"),
        (_CLASS, distillation, _TABLE),
        lambda first, second, table: [
            torch.cat([first[0], second[0]]) + table[0, :2],
            table[0, 2:].view(bands, times, dim).transpose(0, 1).flatten(0, 1),
        ],
        lambda prefix, table: [
            prefix[None, :1],
            prefix[None, 1:],
            torch.cat([torch.zeros_like(prefix), table.view(times, bands, dim).transpose(0, 1).flatten(0, 1)])[None],
        ],
    )
    return [*(pair for pair in shared if pair.ours != projection.ours), projection, table]


_HEADS = ("pooler.", "classifier.", "decoder.", "fc_norm.")
_VIT: dict[str, Any] = {
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
    **{name: value for name, value in _VIT.items() if name != "intermediate_size"},
    "layer_norm_eps": 1e-6,
    "patch_size": 14,
    "mlp_ratio": 4,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
    "drop_path_rate": 0.0,
}
_CROPPED: dict[str, Any] = {
    "do_center_crop": True,
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
}
VIT = Layout(
    model_type="vit",
    architecture="ViTModel",
    modality="image",
    defaults=_VIT,
    fixed={},
    read=_read_vit,
    write=_write_vit,
    pairs=_pairs_vit,
    prefixes=("vit.",),
    beside=_HEADS,
    preprocessor=_VIT_PREPROCESSOR,
    grid=picture_grid,
)
VIT_MAE = Layout(
    model_type="vit_mae",
    architecture="ViTMAEModel",
    modality="image",
    defaults=_VIT,
    fixed={},
    read=_read_vit_mae,
    write=_write_vit_mae,
    pairs=_pairs_vit_mae,
    prefixes=("vit.",),
    beside=_HEADS,
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
    beside=_HEADS,
    preprocessor=_CROPPED | IMAGENET,
    grid=picture_grid,
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
    beside=_HEADS,
    preprocessor=_CROPPED | IMAGENET,
    grid=picture_grid,
)
VIDEOMAE = Layout(
    model_type="videomae",
    architecture="VideoMAEModel",
    modality="video",
    defaults={
        **{name: value for name, value in _VIT.items() if name != "qkv_bias"},
        "num_frames": 16,
        "tubelet_size": 2,
        "qv_bias": True,
        "use_mean_pooling": True,
    },
    fixed={},
    read=_read_videomae,
    write=_write_videomae,
    pairs=_pairs_videomae,
    prefixes=("videomae.",),
    beside=(*_HEADS, "encoder_to_decoder.", "mask_token", "position_embeddings"),
    preprocessor=_CROPPED | IMAGENET | {"size": {"shortest_edge": 224}, "resample": 2},
)
AST = Layout(
    model_type="audio-spectrogram-transformer",
    architecture="ASTModel",
    modality="audio",
    defaults={
        **SIZE_DEFAULTS,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "patch_size": 16,
        "qkv_bias": True,
        "frequency_stride": 10,
        "time_stride": 10,
        "max_length": 1024,
        "num_mel_bins": 128,
    },
    fixed={},
    read=_read_ast,
    write=_write_ast,
    pairs=_pairs_ast,
    prefixes=("audio_spectrogram_transformer.",),
    beside=_HEADS,
    preprocessor={
        "sampling_rate": 16_000,
        "do_normalize": True,
        "mean": -4.2677393,
        "std": 4.5689974,
    },
)
