"""What the layouts of picture and video encoders have in common: patches, tables of positions, preprocessors.

From preprocessor_config.json come `image_mean` and `image_std` (0 and 1 where `do_normalize` is false), `size`,
`crop_size` and `resample`. Pictures are rounded to 256 values after being resized there, and not here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmssl.convert.layout import Config, Pair, Settings
from mmssl.nn.positions import POSITIONS
from mmssl.types import Tokens

# their name -> ours
SIZES = {
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_dim",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
SIZE_DEFAULTS = dict(zip(SIZES, (768, 12, 12, 3072, 0.0, 0.0), strict=True))
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_FILTERS = {2: "bilinear", 3: "bicubic"}
_AXES = {1: ("t",), 2: ("h", "w"), 3: ("t", "h", "w")}


def sides(value: int | Sequence[int] | Mapping[str, int]) -> list[int]:
    """Height and width, of a number for both, of both, or of a mapping."""
    if isinstance(value, int):
        return [value, value]
    given = [value["height"], value["width"]] if isinstance(value, Mapping) else list(value)
    if len(given) != 2 or not all(isinstance(side, int) for side in given):
        raise TypeError(f"{value!r} is no height and width")
    return given


def activation(theirs: Settings) -> str:
    """Our name of `hidden_act`.

    Raises:
        ValueError: we have no such activation.
    """
    name = theirs["hidden_act"]
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act={name!r}: our Transformer has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def hidden_act(ours: Config) -> str:
    """Their name of our activation; one of no such name gives another, and is found out when it is read back."""
    return next((name for name, mine in ACTIVATIONS.items() if mine == ours["transformer"]["activation"]), "gelu")


def channels(preprocessor: Settings, count: int) -> dict[str, Any]:
    """Our mean and deviation of each channel."""
    if not preprocessor.get("do_normalize", True):
        return {"mean": [0.0] * count, "std": [1.0] * count}
    found = {
        name: list(value) if isinstance(value := preprocessor[f"image_{name}"], Sequence) else [value] * count
        for name in ("mean", "std")
    }
    for name, values in found.items():
        if not all(isinstance(value, int | float) for value in values):
            raise ValueError(
                f"preprocessor_config.json: image_{name}={preprocessor[f'image_{name}']!r} must be one number, or one "
                "for each channel"
            )
    return found


def steps_of(preprocessor: Settings) -> list[dict[str, Any]]:
    """What is done to a picture before it is embedded.

    Raises:
        ValueError: a way of resizing, or a scale of pixels, that we do not have.
    """
    if preprocessor.get("do_rescale", True) and not math.isclose(preprocessor.get("rescale_factor", 1 / 255), 1 / 255):
        raise ValueError(
            f"preprocessor_config.json: rescale_factor={preprocessor['rescale_factor']:g}, and our frontends read "
            "pixels in [0, 1]"
        )
    for name, wanted in (("do_rescale", True), ("do_pad", False)):
        if preprocessor.get(name, wanted) is not wanted:
            raise ValueError(f"preprocessor_config.json: {name}={preprocessor[name]}, and here it is always {wanted}")
    steps: list[dict[str, Any]] = []
    size, cropped = preprocessor["size"], preprocessor.get("do_center_crop", False)
    if isinstance(size, int) and cropped:  # of files older than the mapping, and what a crop follows is no square
        size = {"shortest_edge": size}
    if preprocessor.get("do_resize", True):
        if preprocessor["resample"] not in _FILTERS:
            raise ValueError(
                f"preprocessor_config.json: resample={preprocessor['resample']}, and pictures are resized bilinear (2) "
                "or bicubic (3) here"
            )
        shorter = size["shortest_edge"] if isinstance(size, Mapping) and "shortest_edge" in size else None
        steps.append(
            {
                "name": "resize",
                "size": sides(size) if shorter is None else shorter,
                "interpolation": _FILTERS[preprocessor["resample"]],
            }
        )
    if cropped:
        steps.append({"name": "center_crop", "size": sides(preprocessor.get("crop_size", size))})
    return steps


def preprocessor_of(ours: Config, kind: str) -> Config:
    """Their preprocessor of our means and steps; what it cannot say is found out when it is read back."""
    frontend = ours["frontend"]
    steps = {step["name"]: step for step in ours["augment_eval"]}
    filters = {name: number for number, name in _FILTERS.items()}
    theirs: Config = {
        "image_processor_type": kind,
        "do_normalize": True,
        "image_mean": frontend["mean"],
        "image_std": frontend["std"],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_resize": "resize" in steps,
        "do_center_crop": "center_crop" in steps,
    }
    if "resize" in steps:
        size = steps["resize"]["size"]
        theirs["resample"] = filters[steps["resize"].get("interpolation", "bicubic")]
        theirs["size"] = (
            {"shortest_edge": size} if isinstance(size, int) else dict(zip(("height", "width"), size, strict=True))
        )
    if "center_crop" in steps:
        theirs["crop_size"] = dict(zip(("height", "width"), sides(steps["center_crop"]["size"]), strict=True))
    return theirs


def picture_size(ours: Config) -> list[int]:
    """Height and width of what is embedded, in pixels: of a table of positions, else of the steps before it.

    Raises:
        ValueError: neither says so.
    """
    tall, wide = ours["frontend"]["size"][-2:]
    positions, bias = ours["positions"], ours["transformer"]["bias"] or {}
    grid = positions.get("grid") or positions.get("train_grid") or bias.get("grid")
    for step in reversed(ours["augment_eval"]):
        if step["name"] == "center_crop" or (step["name"] == "resize" and not isinstance(step["size"], int)):
            height, width = sides(step["size"])
            # of a table of another grid the pictures are of another size than those it is for
            if grid is None or [height // tall, width // wide] == list(grid[-2:]):
                return [height, width]
    if grid is not None:
        return [grid[-2] * tall, grid[-1] * wide]
    raise ValueError(
        "augment_eval: does not say how large pictures are, and transformers wants to know; end it with a center_crop "
        "to [height, width] in config.json"
    )


def picture_grid(ours: Config) -> list[int]:
    """Patches down and across."""
    (tall, wide), (height, width) = ours["frontend"]["size"][-2:], picture_size(ours)
    return [height // tall, width // wide]


def table_of(ours: Config, grid: Sequence[int]) -> Tensor:
    """(N, D): fixed positions over a grid."""
    settings = dict(ours["positions"])
    positions = POSITIONS[settings.pop("name")](ours["transformer"]["dim"], **settings)
    coords = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).view(1, -1, len(grid))
    x = torch.zeros(1, math.prod(grid), ours["transformer"]["dim"])
    tokens = Tokens(x, torch.tensor([x.shape[1]]), coords, _AXES[len(grid)], tuple(grid))
    table: Tensor = positions(x, tokens)[0]
    return table


def patches(ours: Config, theirs: str) -> Pair:
    """The projection of patches: (D, channels, ..., height, width) there, (D, ... * height * width * channels) here."""
    frontend = ours["frontend"]
    shape = (ours["transformer"]["dim"], *frontend["size"], frontend["channels"])
    return Pair(
        ("frontend.project.weight",),
        (theirs,),
        lambda x: [x.movedim(1, -1).flatten(1)],
        lambda x: [x.view(shape).movedim(-1, 1)],
    )
