"""What a layout of transformers is: its settings and the names of its tensors, beside ours."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmssl.encoder import Encoder
from mmssl.modalities import MODALITIES
from mmssl.nn.bias import BIASES
from mmssl.nn.positions import POSITIONS
from mmssl.nn.transformer import Transformer

Config = dict[str, Any]
Settings = Mapping[str, Any]

SECTIONS = ("frontend", "positions", "transformer", "encoder")
# how training treats an encoder, and not what it computes: a layout need not be able to say these
OF_TRAINING = {
    "frontend.grad_mult",
    "frontend.dropout",
    "positions.train_grid",
    "transformer.dropout",
    "transformer.attention_dropout",
    "transformer.activation_dropout",
    "transformer.drop_path",
    "transformer.layer_drop",
    "transformer.init",
}


@dataclass(frozen=True)
class Pair:
    """Tensors of ours, the tensors of theirs that hold the same, and the way from one to the other.

    ours, theirs: names.
    read: theirs, in that order -> ours.
    write: ours, in that order -> theirs.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Callable[..., Sequence[Tensor]]
    write: Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Head:
    """One way in which a head of theirs tells classes from what the encoder makes of a clip.

    settings: those of our objective `classify` that compute the same.
    pairs: tensors of that objective, and theirs beside the encoder.
    inside: the same of those that are part of the encoder there.
    given: what config.json says of it beside its classes.
    """

    settings: Settings
    pairs: list[Pair]
    inside: list[Pair] = field(default_factory=list)
    given: Settings = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Of all tensors of theirs."""
        return {name for pair in self.pairs + self.inside for name in pair.theirs}


@dataclass(frozen=True)
class Layout:
    """One way in which transformers lays an encoder out, and how that is said here.

    model_type: what config.json calls it.
    architecture: the class of transformers that opens what is written.
    modality: of its inputs.
    defaults: the settings of config.json that are read, and what they are where it leaves them out.
    fixed: settings that our encoder has in one way only, and that way.
    read: (their settings, their preprocessor's, the names of their tensors) -> our config, in which defaults may be
        left out.
    write: our config -> (their settings, their preprocessor's). What it cannot say need not be looked at: the settings
        are read back, and must come to the same config.
    pairs: (our config, their settings) -> every tensor of the encoder.
    prefixes: what the names begin with in a model that has a head.
    written: what the names begin with in what is written, where every version of transformers reads it so.
    beside: how the names of tensors begin that are no part of the encoder.
    nested: the key of config.json that holds the settings, in a model of several towers.
    preprocessor: what their preprocessor does where its file does not say so.
    drawn: tensors that published files may lack, because embedding does not use them: drawn anew, of width D.
    older: how names end in files of older versions, and how they end today.
    grid: our config -> the cells of a table of positions, to write fixed positions into; None where there is no table.
    positions: kinds of positions that it can say beside that of its defaults.
    classifier: the class of transformers that opens it with a head that tells classes; empty where there is none.
    heads: our config -> the ways in which that head computes what our objective `classify` can.
    idle: how the names of tensors begin that stand beside such a head and are not used.
    """

    model_type: str
    architecture: str
    modality: str
    defaults: Settings
    fixed: Settings
    read: Callable[[Settings, Settings, Collection[str]], Config]
    write: Callable[[Config], tuple[Config, Config]]
    pairs: Callable[[Config, Settings], list[Pair]]
    prefixes: tuple[str, ...]
    written: str = ""
    beside: tuple[str, ...] = ()
    nested: str | None = None
    preprocessor: Settings = field(default_factory=dict)
    drawn: tuple[str, ...] = ()
    older: Mapping[str, str] = field(default_factory=dict)
    grid: Callable[[Config], Sequence[int]] | None = None
    positions: tuple[str, ...] = ()
    classifier: str = ""
    heads: Callable[[Config], list[Head]] = lambda config: []
    idle: tuple[str, ...] = ()


@dataclass(frozen=True)
class Towers:
    """A model of an image and a text tower with a space that they share.

    model_type, architecture: see `Layout`.
    image, text: its towers; of a text tower the preprocessor is its tokenizer, see `mmssl.convert.towers`.
    objective: of ours, that trains such a space.
    settings: its settings, of which the model has but these.
    space: name of a tensor of theirs that is as long as the space is wide.
    pairs: (our config of the image tower) -> every tensor of the objective, theirs by their whole names.
    more: settings of theirs beside those of the layouts, by the key of config.json.
    """

    model_type: str
    architecture: str
    image: Layout
    text: Layout
    objective: str
    settings: Settings
    space: str
    pairs: Callable[[Config], list[Pair]]
    more: Mapping[str, Settings] = field(default_factory=dict)


def same(ours: str, theirs: str) -> Pair:
    """One tensor that is the same in both."""
    return Pair((ours,), (theirs,), lambda x: [x], lambda x: [x])


def linear(ours: str, theirs: str) -> list[Pair]:
    """The weight and the bias of a map or a norm."""
    return [same(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]


def row(ours: str, theirs: str) -> Pair:
    """A vector that theirs holds with axes of size 1 in front, (1, 1, D)."""
    return Pair((ours,), (theirs,), lambda x: [x.flatten()], lambda x: [x[None, None]])


def joined(ours: str, *theirs: str) -> Pair:
    """Queries, keys and values, which are one tensor here and three there."""
    return Pair((ours,), theirs, lambda *parts: [torch.cat(parts)], lambda x: x.chunk(len(theirs)))


def zeros(ours: str, *shape: int) -> Pair:
    """A bias of ours that theirs does not have."""
    return Pair((ours,), (), lambda: [torch.zeros(shape)], lambda x: [])


def blocks(
    config: Config, layer: str, names: Mapping[str, str], *, bias: bool = True, ours: str = "transformer"
) -> list[Pair]:
    """The tensors of all blocks.

    Args:
        layer: their name of a block, with {} for its number.
        names: their names within it, of ours: norm1, norm2, out, up, down, q, k, v, and scale1 and scale2 where there
            is layer scale.
        bias: whether queries, keys and values have one; ours is zero where theirs have none.
        ours: our name of the Transformer.
    """
    pairs: list[Pair] = []
    dim = config["transformer"]["dim"]
    for i in range(config["transformer"]["depth"]):
        block, there = f"{ours}.blocks.{i}", layer.format(i)
        for mine, name in (
            ("norm1", "norm1"),
            ("norm2", "norm2"),
            ("attention.out", "out"),
            ("mlp.up", "up"),
            ("mlp.down", "down"),
        ):
            pairs += linear(f"{block}.{mine}", f"{there}.{names[name]}")
        q, k, v = (f"{there}.{names[name]}" for name in "qkv")
        qkv = f"{block}.attention.qkv"
        pairs.append(joined(f"{qkv}.weight", *(f"{part}.weight" for part in (q, k, v))))
        if bias:
            pairs.append(joined(f"{qkv}.bias", *(f"{part}.bias" for part in (q, k, v))))
        else:
            pairs.append(zeros(f"{qkv}.bias", 3 * dim))
        if config["transformer"]["layer_scale"] is not None:
            pairs.append(same(f"{block}.attention.scale", f"{there}.{names['scale1']}"))
            pairs.append(same(f"{block}.mlp.scale", f"{there}.{names['scale2']}"))
    return pairs


def defaults_of(constructor: Callable[..., Any]) -> dict[str, Any]:
    """The settings of a constructor that may be left out."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def completed(config: Settings) -> Config:
    """A config with every default of the constructors written out, as JSON would give it back."""
    kind = MODALITIES[config["modality"]]
    made = {
        "frontend": kind.frontends[config["frontend"]["name"]],
        "positions": POSITIONS[config["positions"]["name"]],
        "transformer": Transformer,
        "encoder": Encoder,
    }
    sections = {}
    for section, constructor in made.items():
        sections[section] = {**defaults_of(constructor), **config[section]}
    transformer = sections["transformer"]
    transformer["mlp_dim"] = transformer["mlp_dim"] or 4 * transformer["dim"]
    if transformer["bias"] is not None:
        bias = transformer["bias"]
        transformer["bias"] = {"name": bias["name"], **defaults_of(BIASES[bias["name"]]), **bias}
    done: Config = json.loads(json.dumps({**config, **sections}))
    return done
