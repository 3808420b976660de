"""A recipe checked: every section against what it becomes, and every default written out.

What is built later is built from these plain values alone, so a saved config.json goes on meaning the same when a
default changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmssl.build import PROVIDED, Config
from mmssl.convert.folder import find, is_transformers, read_transformers
from mmssl.encoder import Encoder
from mmssl.loading import DataSettings
from mmssl.modalities import MODALITIES
from mmssl.modalities.modality import Modality
from mmssl.nn.bias import BIASES
from mmssl.nn.positions import POSITIONS
from mmssl.nn.transformer import Transformer
from mmssl.nn.trunk import twin
from mmssl.objectives import CONTRASTING, LABELLED, OBJECTIVES, PAIRED, SEVERAL
from mmssl.recipe import OWN, SECTIONS, Recipe, by_modality, members, settings_of
from mmssl.training import checkpoint
from mmssl.training.optimizer import build_optimizer
from mmssl.training.schedule import SCHEDULES
from mmssl.training.settings import TrainSettings

ENCODER = ("frontend", "positions", "transformer", "encoder")
# of an encoder that was pretrained, a recipe for fine-tuning may set these alone: they are no part of what it learned
RATES = ("dropout", "attention_dropout", "activation_dropout", "drop_path", "layer_drop", "dither", "stripes")
# what the program gives a frontend
GIVEN = ("dim", "tokenizer")
_SEVERAL = "write them as modality: {image: {...}, text: {...}}"


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with every section checked and every default written out.

    Raises:
        RecipeError: a setting that is missing, unknown, or of the wrong type.
    """
    named: dict[str, Mapping[str, Any]] = {}
    each: dict[str, Mapping[str, Mapping[str, Any]]] = {}
    if isinstance(recipe.get("modality"), Mapping):
        values = _several(recipe)
        each = {"targets": {name: MODALITIES[name].targets for name in values["modality"]}}
    else:
        modality = recipe.choice("modality", MODALITIES)
        if isinstance(recipe.get("init"), Mapping):
            raise recipe.error(
                "init", f"init: names modalities, and this recipe is for {modality.name}; write init=RUN"
            )
        if recipe.get("init") is not None:
            recipe = replace(recipe, values={**recipe.values, **_begun(recipe, "init", modality.name)})
        objective = recipe.get("objective.name")
        if objective in SEVERAL:
            raise recipe.error("objective.name", f"{objective} brings several modalities together; {_SEVERAL}")
        if recipe.get("backbone") is not None:
            raise recipe.error("backbone", f"backbone: is of several modalities; leave it out, or {_SEVERAL}")
        refuse(modality, str(objective), recipe)
        tokenizer = _tokenizer(recipe, modality, begun=recipe.get("init") is not None)
        values = {"modality": modality.name, "tokenizer": tokenizer, **_own(recipe, modality)}
        named = {"target": modality.targets, "views": modality.views}
    given = ["encoder", *(name for name in PROVIDED if name not in {**named, **each})]
    if recipe.get("objective.name") in SEVERAL and recipe.get("objective.name") not in PAIRED:
        values["objective"], values["data"] = _omni(recipe, given), _data_by_modality(recipe)
    else:
        values["objective"] = _named(recipe, "objective", OBJECTIVES, given=given, named=named, each=each)
        values["data"] = recipe.settings("data", DataSettings)
    values["optimizer"] = recipe.settings("optimizer", build_optimizer, given=["objective"])
    values["schedule"] = _named(recipe, "schedule", SCHEDULES, given=["step", "steps"])
    values["trainer"] = recipe.settings("trainer", TrainSettings)
    if "backbone" in values and values["optimizer"]["layer_decay"] is not None:
        raise recipe.error(
            "optimizer.layer_decay", "optimizer.layer_decay: goes by the depth of one encoder; leave it out for several"
        )
    inside = [values["objective"], *(values["objective"].get("of") or {}).values()]
    telling = next((one for one in inside if one["name"] in CONTRASTING), None)
    if telling is not None and values["trainer"]["accumulate"] > 1:
        higher = ", or higher with objective.chunk" if "chunk" in telling else ""
        raise recipe.error(
            "trainer.accumulate",
            f"trainer.accumulate={values['trainer']['accumulate']}: {telling['name']} tells the pairs of "
            "a micro-batch apart, so several would have another loss than one; set it to 1, and data.batch_size as "
            f"high as memory goes{higher}, or use more processes",
        )
    some_lack = values["objective"]["name"] in PAIRED and len(values["modality"]) > 2
    if some_lack and values["trainer"]["sharding"] == "full":
        raise recipe.error(
            "trainer.sharding",
            "trainer.sharding=full: a batch of one process may lack a modality that another's has, and processes "
            "wait for each other at each block; leave it out for three or more modalities",
        )
    best, name = values["trainer"]["best"], values["objective"]["name"]
    several = values["objective"].get("multi_label", False)
    told = {"wer": name == "ctc", "cer": name == "ctc", "accuracy": name != "omni", "map": several}
    if not told.get(str(best), True):
        raise recipe.error("trainer.best", f"trainer.best={best}: evaluations of {name} give none; choose loss")
    init = recipe.get("init")
    if isinstance(init, Mapping):
        values["init"] = {name: str(folder) for name, folder in init.items() if folder is not None} or None
    else:
        values["init"] = None if init is None else str(init)
    return replace(recipe, values={name: values[name] for name in SECTIONS if name in values})


def _own(recipe: Recipe, modality: Modality, at: str = "") -> dict[str, Any]:
    """The sections that make the encoder of one modality, checked; `at` is what stands before their keys."""
    return {
        "frontend": _named(recipe, f"{at}frontend", modality.frontends, given=GIVEN),
        "positions": _named(recipe, f"{at}positions", POSITIONS, given=["dim"]),
        "transformer": _transformer(recipe, at),
        "encoder": recipe.settings(f"{at}encoder", Encoder, given=["frontend", "transformer", "positions"]),
        "augment": _augments(recipe, modality, at),
    }


def _transformer(recipe: Recipe, at: str = "") -> dict[str, Any]:
    """The section `transformer`, checked, and that of its biases within."""
    found = recipe.settings(f"{at}transformer", Transformer)
    if found["bias"] is not None:
        found["bias"] = _named(recipe, f"{at}transformer.bias", BIASES, given=["heads", "depth"])
    return found


def _several(recipe: Recipe) -> dict[str, Any]:
    """The sections that make the encoders of several modalities, checked.

    With `backbone: shared` the section `transformer` is that of all; with "separate" each modality has its own, and one
    that writes none takes that of the recipe. `{name: shared, own_blocks: 2}` shares all but the first two blocks.
    A modality that `init` names has the sections of that encoder; where blocks are shared, `transformer` is its too.
    """
    names = list(recipe.get("modality"))
    for name in names:
        if name not in MODALITIES:
            raise recipe.unknown(f"modality.{name}", MODALITIES)
        sections = recipe.get(f"modality.{name}")
        if not isinstance(sections, Mapping):
            raise recipe.error(f"modality.{name}", f"'modality.{name}' should be a mapping of {', '.join(OWN)}")
        for section in sections:
            if section not in OWN:
                raise recipe.unknown(f"modality.{name}.{section}", OWN)
    objective = recipe.get("objective.name")
    recipe.choice("objective.name", OBJECTIVES)
    if objective not in SEVERAL:
        if len(names) == 1:
            one = f"{objective} learns from {names[0]} alone; write modality: {names[0]}, and its sections at the top"
            raise recipe.error("modality", one)
        what = f"{objective} learns from one modality, and these are {' and '.join(names)}"
        raise recipe.error("objective.name", f"{what}; choose {' or '.join(SEVERAL)}")
    media = [MODALITIES[name].media for name in names]
    if len(media) < 2 or (objective in PAIRED and len(set(media)) < len(media)):
        raise recipe.error("modality", f"modality: needs two or more that read different keys of a row (got {media})")
    for section in OWN:
        if section != "transformer" and recipe.get(section) is not None:
            raise recipe.error(
                section, f"'{section}' stands below each modality here, as modality.{names[0]}.{section}"
            )
    backbone = _backbone(recipe)
    begun = _inits(recipe, names, shared=backbone != "separate")
    if recipe.get("transformer") is not None and all(recipe.get(f"modality.{name}.transformer") for name in names):
        raise recipe.error("transformer", "transformer: each modality has its own here; leave this one out")
    for name in begun:
        sections = _begun(recipe, f"init.{name}", name, at=f"modality.{name}.", shared=backbone != "separate")
        common = {} if backbone == "separate" else {"transformer": sections.pop("transformer")}
        modalities = {**recipe.values["modality"], name: {**recipe.values["modality"][name], **sections}}
        recipe = replace(recipe, values={**recipe.values, **common, "modality": modalities})
    values: dict[str, Any] = {"backbone": backbone, "tokenizer": None, "modality": {}}
    if backbone != "separate":
        values["transformer"] = _transformer(recipe)
    for name in names:
        modality, at = MODALITIES[name], f"modality.{name}."
        if modality.tokenizers:
            values["tokenizer"] = _tokenizer(recipe, modality, begun=name in begun)
        own = recipe
        if backbone != "separate" and recipe.get(f"{at}transformer") is not None:
            raise recipe.error(f"{at}transformer", f"'{at}transformer': is shared; write it once, as 'transformer'")
        if recipe.get(f"{at}transformer") is None:
            sections = {**recipe.values["modality"][name], "transformer": recipe.get("transformer")}
            own = replace(recipe, values={**recipe.values, "modality": {name: sections}})
        found = _own(own, modality, at)
        values["modality"][name] = {key: found[key] for key in OWN if key != "transformer" or backbone == "separate"}
    if recipe.get("tokenizer") is not None and not any(MODALITIES[name].tokenizers for name in names):
        raise recipe.error("tokenizer", f"tokenizer: {' and '.join(names)} are read without one; leave the section out")
    return values


def _inits(recipe: Recipe, names: Sequence[str], *, shared: bool) -> list[str]:
    """The modalities whose encoders begin with the weights that `init` names, checked."""
    init = recipe.get("init")
    if init is not None and not isinstance(init, Mapping):
        raise recipe.error(
            "init",
            f"init: holds one encoder, and these are {' and '.join(names)}; say whose it is, such as "
            f"init.{names[0]}={init}",
        )
    found = [name for name, folder in (init or {}).items() if folder is not None]
    for name in found:
        if name not in names:
            raise recipe.unknown(f"init.{name}", names)
    if shared and len(found) > 1:
        raise recipe.error(
            "init",
            f"init: {' and '.join(found)} share blocks, which can begin with the weights of one of them alone; leave "
            "out the others, or set backbone=separate",
        )
    return found


def _omni(recipe: Recipe, given: Sequence[str]) -> dict[str, Any]:
    """The section `objective` of `omni`, checked, with the objective of each modality written out below `of`.

    What is written there is an objective's section, or one for each modality, and any setting in it may be by modality.
    """
    names = list(recipe.get("modality"))
    written = recipe.get("objective")
    of = {}
    for name in names:
        modality = MODALITIES[name]
        section = settings_of(written, name, names).get("of")
        if not isinstance(section, Mapping):
            raise recipe.error(
                "objective.of", f"'objective.of' should be the section of an objective for {name} (got {section!r})"
            )
        one = replace(recipe, values={"objective": {"of": settings_of(section, name, names)}})
        one.choice("objective.of.name", OBJECTIVES)
        inner = str(one.get("objective.of.name"))
        if inner in LABELLED or inner in SEVERAL:
            what = "learns from labels" if inner in LABELLED else "is itself one of several modalities"
            raise recipe.error("objective.of.name", f"objective.of.name: {inner} {what}; choose mae, data2vec2 or such")
        refuse(modality, inner, one, "objective.of.name")
        named: dict[str, Mapping[str, Any]] = {"target": modality.targets, "views": modality.views}
        provided = [key for key in ("encoder", *PROVIDED) if key not in named]
        of[name] = _named(one, "objective.of", OBJECTIVES, given=provided, named=named)
    outer = replace(recipe, values={"objective": {key: value for key, value in written.items() if key != "of"}})
    return {**_named(outer, "objective", OBJECTIVES, given=given), "of": of}


def _data_by_modality(recipe: Recipe) -> dict[str, Any]:
    """The section `data` in which any setting may be by modality, checked."""
    names = list(recipe.get("modality"))
    written = recipe.get("data") or {}
    for key, value in written.items():
        unknown = [name for name in value if name not in names] if isinstance(value, dict) else []
        if unknown:
            raise recipe.error(
                f"data.{key}", f"data.{key}: {unknown[0]!r} is none of this recipe's modalities {', '.join(names)}"
            )
    each = {}
    for name in names:
        section = settings_of(written, name, names)
        if "train" not in section:
            raise recipe.error("data", f"data.train: there is none of {name}; write it as data.train.{name}=FILE")
        each[name] = replace(recipe, values={"data": section}).settings("data", DataSettings)
    return {
        key: {name: own[key] for name, own in each.items()} if by_modality(written.get(key), names) else value
        for key, value in each[names[0]].items()
    }


def _backbone(recipe: Recipe) -> str | dict[str, Any]:
    """The section `backbone`, checked: "separate", "shared", or {name: shared} with settings of `twin`."""
    backbone = recipe.get("backbone", "separate")
    if isinstance(backbone, Mapping) and backbone.get("name") == "shared":
        settings = recipe.settings("backbone", twin, given=["trunk"])
        return {"name": "shared", **settings} if any(settings.values()) else "shared"
    if backbone not in ("separate", "shared"):
        raise recipe.error(
            "backbone",
            f"backbone: should be 'separate', 'shared' or {{name: shared, own_blocks: 2, own_norms: true}} (got "
            f"{backbone!r})",
        )
    return str(backbone)


def refuse(modality: Modality, objective: str, recipe: Recipe | None = None, key: str = "objective.name") -> None:
    """See that an objective makes sense for a modality.

    Raises:
        ValueError: it does not; with a recipe a RecipeError.
    """
    if objective in modality.refuses:
        sentence = f"objective {objective} is not for {modality.name}: it {modality.refuses[objective]}"
        raise ValueError(sentence) if recipe is None else recipe.error(key, sentence)


def _tokenizer(recipe: Recipe, modality: Modality, *, begun: bool) -> dict[str, Any] | None:
    """The section `tokenizer`, checked; None for a modality that has none, and where `init` brings its own."""
    if not modality.tokenizers:
        if recipe.get("tokenizer") is not None:
            raise recipe.error("tokenizer", f"tokenizer: {modality.name} is read without one; leave the section out")
        return None
    if begun:
        return None
    return _named(recipe, "tokenizer", modality.tokenizers, given=["texts"])


def _named(
    recipe: Recipe,
    section: str,
    table: Mapping[str, Callable[..., Any]],
    *,
    given: Sequence[str],
    named: Mapping[str, Mapping[str, Any]] | None = None,
    each: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> dict[str, Any]:
    """A section that says by `name` what it becomes, checked."""
    chosen = recipe.choice(f"{section}.name", table)
    return {
        "name": recipe.get(f"{section}.name"),
        **recipe.settings(section, chosen, given=given, named=named, each=each),
    }


def _augments(recipe: Recipe, modality: Modality, at: str) -> dict[str, list[dict[str, Any]]]:
    sides = recipe.get(f"{at}augment") or {}
    if not isinstance(sides, Mapping):
        raise recipe.error(f"{at}augment", f"'{at}augment' should be a mapping with train and eval (got {sides!r})")
    for side in sides:
        if side not in ("train", "eval"):
            raise recipe.unknown(f"{at}augment.{side}", ("train", "eval"))
    found: dict[str, list[dict[str, Any]]] = {}
    for side in ("train", "eval"):
        steps = sides.get(side) or []
        if not isinstance(steps, list):
            section = f"{at}augment.{side}"
            raise recipe.error(section, f"'{section}' should be a list of steps (got {steps!r})")
        # the rate and the channels are the frontend's
        given = ["x", "whole", "rng", "rate", "channels"]
        found[side] = []
        for place in range(len(steps)):
            # a span says what is read, so nothing can come before it
            table = {**modality.spans, **modality.augments} if place == 0 else modality.augments
            found[side].append(_named(recipe, f"{at}augment.{side}.{place}", table, given=given))
    return found


def _begun(recipe: Recipe, key: str, modality: str, *, at: str = "", shared: bool = False) -> dict[str, Any]:
    """The sections of the encoder that is named at `key`, which is "init" or "init.image"; the rates are the recipe's.

    Args:
        at: what stands before the keys of the modality's sections.
        shared: whether the recipe's section `transformer` is that of all its modalities.
    """
    config: Config = init_config(recipe, key, modality)
    init, whose = recipe.get(key), f"{key} is" if at else "this recipe is"
    if config["modality"] != modality:
        theirs = " and ".join(members(config))
        raise recipe.error(key, f"{init} holds an encoder of {theirs}, and {whose} for {modality}")
    # what is newer than that run was at its default
    config = _own(replace(recipe, values=dict(config), places={}), MODALITIES[modality])
    sections: dict[str, Any] = {}
    for section in ENCODER:
        # a rate that the recipe leaves out is the constructor's default, as in any recipe, and not that of pretraining
        there = sections[section] = {key: value for key, value in config[section].items() if key not in RATES}
        common = section == "transformer" and recipe.get(f"{at}{section}") is None
        written = section if common else f"{at}{section}"
        for name, value in (recipe.get(written) or {}).items():
            place = f"{written}.{name}"
            if name in RATES:
                there[name] = value
            elif common and at and not shared:
                continue  # of the other modalities
            elif name not in there and recipe.get(f"{written}.name") == there.get("name"):
                raise recipe.unknown(place, config[section])
            elif recipe.place(place).startswith("command line") and value != there.get(name):
                raise recipe.error(
                    place,
                    f"the encoder comes from {key}={init}, where {section}.{name} is {there.get(name)!r}; "
                    f"only {', '.join(RATES)} may be set",
                )
    return sections


def init_config(recipe: Recipe, key: str, modality: str) -> dict[str, Any]:
    """The config of the encoder that is named at `key`, see `_begun`; of a run on several, that of this modality."""
    try:
        folder = find(str(recipe.get(key)))
        config = read_transformers(folder).config if is_transformers(folder) else checkpoint.read_config(folder)
        return dict(members(config).get(modality, config))
    except ValueError as error:
        raise recipe.error(key, f"{key}={error}") from None
