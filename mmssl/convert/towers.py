"""Models of an image and a text tower: read as a run on pairs exports them, and written from one.

From tokenizer.json come the ids of a caption and the mark that ends it, from tokenizer_config.json `model_max_length`,
beyond which captions are cut, and `pad_token`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmssl.convert import TOWERS
from mmssl.convert.layout import Config, Settings, Towers, defaults_of
from mmssl.convert.translate import read_pairs, to_ours, to_theirs
from mmssl.modalities.text.tokenizer import Tokenizer, pretrained
from mmssl.objectives import OBJECTIVES
from mmssl.recipe import members

TOKENIZER = "tokenizer.json"
_LONGEST = 10_000  # tokens, of a tokenizer that is only asked what it is
_TABLE = "frontend.table.weight"


def read_towers(
    towers: Towers,
    given: Settings,
    preprocessor: Settings,
    tokenizer: Settings,
    tensors: Mapping[str, Tensor],
    *,
    folder: Path,
) -> tuple[Config, dict[str, Tensor], dict[str, Tensor]]:
    """Config, encoders and objective of a model of theirs.

    Args:
        given, preprocessor, tokenizer: what config.json, preprocessor_config.json and tokenizer_config.json hold; the
            last two may be empty.
        tensors: of all of the model.
        folder: with the tokenizer.json.

    Raises:
        ValueError: a setting or a tensor that we have no counterpart of, or a tokenizer that is not this model's.
    """
    try:
        text = pretrained([], source=str(folder))
        made = Tokenizer(text, _LONGEST)
        said = _said_of(made, tokenizer)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    encoder: dict[str, Tensor] = {}
    modality: dict[str, Config] = {}
    for layout, key, beside in ((towers.image, "vision_config", preprocessor), (towers.text, "text_config", said)):
        own, weights, _ = to_ours(layout, given.get(key) or {}, beside, floats, place=f"{folder}: {key}")
        encoder |= {f"{layout.modality}.{name}": tensor for name, tensor in weights.items()}
        modality[layout.modality] = {name: value for name, value in own.items() if name not in ("format", "modality")}
    table = encoder[f"text.{_TABLE}"]
    if len(table) < len(made):
        raise ValueError(
            f"{folder}: tokenizer.json has ids up to {len(made) - 1}, and the text tower a table of {len(table)}; copy "
            "the tokenizer of this model"
        )
    # rows that no token has
    encoder[f"text.{_TABLE}"] = table[: len(made)].clone()
    pairs = towers.pairs({**modality["image"], "modality": "image"})
    objective = read_pairs(pairs, floats, kind=towers.model_type, place=folder)
    config = {
        "format": 1,
        "layout": towers.model_type,
        "modality": modality,
        "backbone": "separate",
        "tokenizer": text,
        "objective": {
            "name": towers.objective,
            **defaults_of(OBJECTIVES[towers.objective]),
            **towers.settings,
            "dim": len(floats[towers.space]),
        },
        "classes": None,
        "vocabulary": None,
    }
    return config, encoder, objective


def write_towers(
    config: Settings, encoder: Mapping[str, Tensor], objective: Mapping[str, Tensor], *, wanted: str | None
) -> tuple[Config, dict[str, Tensor], dict[str, Any]]:
    """Their config.json, tensors, and other files by name, of a run on pictures and captions.

    Args:
        wanted: the name of theirs; by default that which the objective is of.

    Raises:
        ValueError: they have no model of these modalities, this objective or these settings.
    """
    towers = _towers_for(config, wanted)
    given: Config = {"model_type": towers.model_type, "architectures": [towers.architecture], "dtype": "float32"}
    tensors: dict[str, Tensor] = {}
    files: dict[str, Any] = {}
    for layout, key, file in (
        (towers.image, "vision_config", "preprocessor_config.json"),
        (towers.text, "text_config", "tokenizer_config.json"),
    ):
        own, start = members(config)[layout.modality], f"{layout.modality}."
        weights = {name.removeprefix(start): tensor for name, tensor in encoder.items() if name.startswith(start)}
        settings, files[file], made = to_theirs(layout, own, weights)
        given[key] = {**settings, **towers.more.get(key, {})}
        tensors |= made
    for pair in towers.pairs(dict(members(config)["image"])):
        written = zip(pair.theirs, pair.write(*(objective[name] for name in pair.ours)), strict=True)
        tensors |= {name: tensor.contiguous() for name, tensor in written}
    # how wide the space is CLIP reads here, and SigLIP there
    given["projection_dim"] = given["text_config"]["projection_size"] = config["objective"]["dim"]
    text = config["tokenizer"]
    longest, pad = (files["tokenizer_config.json"].get(name) for name in ("longest", "pad"))
    tokenizer = Tokenizer(text, longest)
    marks = tokenizer.marks
    if pad is None and (not marks or marks[-1] == 2):
        raise ValueError(
            f"the tokenizer ends captions with ids {marks[-1:]}, and a {towers.model_type} finds their end by an id "
            "that is there and not 2; train with another tokenizer"
        )
    given["text_config"] |= {"vocab_size": len(tokenizer)} | (
        {} if not marks else {"bos_token_id": marks[0], "eos_token_id": marks[-1]}
    )
    files[TOKENIZER] = json.loads(text)
    files["tokenizer_config.json"] = {
        # not theirs of that name, which would split captions in its own way whatever tokenizer.json says
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "pad_token": tokenizer.name_of(marks[-1] if pad is None else pad),
        "model_input_names": ["input_ids", *(["attention_mask"] if pad is None else [])],
    }
    return given, tensors, files


def _towers_for(config: Settings, wanted: str | None) -> Towers:
    own = " and ".join(config["modality"])
    objective = config["objective"] or {"name": None}
    towers = next((each for each in TOWERS.values() if each.objective == objective["name"]), None)
    if towers is None or set(config["modality"]) != {"image", "text"} or wanted not in (None, towers.model_type):
        raise ValueError(
            f"no layout of transformers that mmssl writes is of {own} with the objective {objective['name']}"
            f"{f', and named {wanted}' if wanted else ''}; say whose encoder to write alone, by modality (--modality)"
        )
    settings = {"backbone": config["backbone"], **defaults_of(OBJECTIVES[towers.objective]), **objective}
    for name, value in {"backbone": "separate", **towers.settings}.items():
        if settings[name] != value:
            raise ValueError(f"layout {towers.model_type} has {name}={value!r}, and this run {settings[name]!r}")
    return towers


def _said_of(tokenizer: Tokenizer, given: Settings) -> Config:
    """What stands for a preprocessor of texts: the longest caption, ids, the id at the end and that of padding.

    Raises:
        ValueError: padding that the tokenizer does not have, or in front of captions.
    """
    pad, marks = given.get("pad_token"), tokenizer.marks
    name = pad.get("content") if isinstance(pad, Mapping) else pad
    if name is not None and tokenizer.id_of(name) is None:
        raise ValueError(
            f"tokenizer_config.json says pad_token={name!r}, which tokenizer.json does not have; copy both"
        )
    if given.get("padding_side", "right") != "right":
        raise ValueError(
            f"tokenizer_config.json says padding_side={given['padding_side']!r}, and captions are filled up at their "
            "end here"
        )
    return {
        "longest": given.get("model_max_length", _LONGEST),
        "entries": len(tokenizer),
        "end": marks[-1] if marks else None,
        "pad": None if name is None else tokenizer.id_of(name),
    }
