"""VideoMAE: a ViT over tubes, without a class token, and positions of tubes as if they lay in one line.

Keys have no bias in theirs, and ours is zero, or left out: one that all keys have changes no attention.

Preprocessor: see `pictures`. `num_frames` is taken from config.json: so many frames from the middle of a file, but at
the frontend's own 7.5 frames per second (every fourth of 30), which theirs leaves to its user.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from mmssl.convert.layout import Config, Head, Layout, Pair, Settings, blocks, linear, same
from mmssl.convert.pictures import IMAGENET, channels, patches, picture_size, preprocessor_of, sides, steps_of
from mmssl.convert.vit import CROPPED, DEFAULTS, HEADS, LAYER, NAMES, PATCHES, SELF, plain, their_trunk, trunk

_BIASES = (f"{SELF}.q_bias", f"{SELF}.v_bias")


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
        "transformer": {**trunk(theirs), "final_norm": not theirs["use_mean_pooling"]},
        "encoder": {},
        "augment_eval": [{"name": "center_span", "frames": theirs["num_frames"]}, *steps_of(preprocessor)],
    }


def _write_videomae(ours: Config) -> tuple[Config, Config]:
    frontend = ours["frontend"]
    deep, tall, wide = frontend["size"]
    span = next((step["frames"] for step in ours["augment_eval"] if step["name"] == "center_span"), None)
    grid = ours["positions"].get("grid")
    theirs = {
        **their_trunk(ours),
        "image_size": plain(picture_size(ours)),
        "patch_size": plain([tall, wide]),
        "tubelet_size": deep,
        "num_frames": grid[0] * deep if grid is not None else span or deep,
        "num_channels": frontend["channels"],
        "qv_bias": True,
        "use_mean_pooling": not ours["transformer"]["final_norm"],
    }
    return theirs, preprocessor_of(ours, "VideoMAEImageProcessor")


def _pairs_videomae(ours: Config, theirs: Settings) -> list[Pair]:
    pairs = [
        patches(ours, f"{PATCHES}.weight"),
        same("frontend.project.bias", f"{PATCHES}.bias"),
        *keyless_blocks(ours, LAYER, biases=_BIASES if theirs["qv_bias"] else ()),
    ]
    return [*pairs, *linear("transformer.norm", "layernorm")] if ours["transformer"]["final_norm"] else pairs


def keyless_blocks(
    config: Config,
    layer: str,
    names: Mapping[str, str] = NAMES,
    *,
    biases: Sequence[str] = _BIASES,
    ours: str = "transformer",
) -> list[Pair]:
    """The tensors of all blocks where keys have no bias; see `blocks`.

    Args:
        biases: their names of those of queries and of values within a block; empty where they have none either.
    """
    pairs = blocks(config, layer, names, bias=False, ours=ours)
    if not biases:
        return pairs
    for i in range(config["transformer"]["depth"]):
        mine, there = f"{ours}.blocks.{i}.attention.qkv.bias", layer.format(i)
        pairs.remove(next(pair for pair in pairs if pair.ours == (mine,)))
        pairs.append(
            Pair(
                (mine,),
                tuple(f"{there}.{name}" for name in biases),
                lambda q, v: [torch.cat([q, torch.zeros_like(q), v])],
                lambda x: x.chunk(3)[::2],
            )
        )
    return pairs


def _heads(ours: Config) -> list[Head]:
    # with a norm at the end theirs reads the first token alone
    if ours["transformer"]["final_norm"]:
        return []
    settings = {"pooling": "mean", "head_norm": "layer", "head_eps": 1e-5}
    return [Head(settings, [*linear("head.norm", "fc_norm"), *linear("head.linear", "classifier")])]


VIDEOMAE = Layout(
    model_type="videomae",
    architecture="VideoMAEModel",
    modality="video",
    defaults={
        **{name: value for name, value in DEFAULTS.items() if name != "qkv_bias"},
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
    beside=(*HEADS, "encoder_to_decoder.", "mask_token", "position_embeddings"),
    preprocessor=CROPPED | IMAGENET | {"size": {"shortest_edge": 224}, "resample": 2},
    classifier="VideoMAEForVideoClassification",
    heads=_heads,
)
