"""Recipe -> encoder, objective, loaders, run: the one file that knows every room.

A recipe is first resolved: every section is checked against what it becomes, and every default is written out. What is
built later is built from these plain values alone, so a saved config.json goes on meaning the same when a default
changes.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmssl import distributed
from mmssl.convert.folder import Exported, find, is_transformers, open_encoder, read_transformers
from mmssl.data.batching import Loader, one_pass
from mmssl.data.manifest import Manifest
from mmssl.data.text import CharVocabulary, Classes
from mmssl.encoder import Encoder, Encoders
from mmssl.loading import DataSettings, build_dataset, build_plan, check_labels, cut_captions, label_of
from mmssl.modalities import MODALITIES
from mmssl.modalities.modality import Modality, Target
from mmssl.nn.bias import BIASES
from mmssl.nn.positions import POSITIONS
from mmssl.nn.transformer import Transformer
from mmssl.objectives import CODERS, LABELLED, OBJECTIVES, PAIRED
from mmssl.recipe import OWN, SECTIONS, Recipe, RecipeError, leaves, load, members, parse
from mmssl.training import checkpoint
from mmssl.training.loop import train as train_loop
from mmssl.training.optimizer import build_optimizer
from mmssl.training.schedule import SCHEDULES
from mmssl.training.settings import TrainSettings
from mmssl.types import Frontend
from mmssl.validation import Validation, spells

ENCODER = ("frontend", "positions", "transformer", "encoder")
# of an encoder that was pretrained, a recipe for fine-tuning may set these alone: they are no part of what it learned
RATES = ("dropout", "attention_dropout", "activation_dropout", "drop_path", "layer_drop", "dither", "stripes")
# settings that say how a run is done and not what comes out of it: a run may be resumed with others
PRACTICAL = {
    "data.valid",
    "data.on_bad_clip",
    "data.max_bad_share",
    "data.workers",
    "data.cache",
    # with another number of processes it is set anew, so that the batch of an update stays the same
    "trainer.accumulate",
    "trainer.sharding",
    "trainer.log_every",
    "trainer.eval_every",
    "trainer.save_every",
    "trainer.keep",
    "trainer.stop_on",
    "trainer.device",
    "trainer.threads",
}

Config = Mapping[str, Any]
Span = Callable[..., tuple[float, float]]
_SEVERAL = "write them as modality: {image: {...}, text: {...}}"
# what the program gives a frontend
GIVEN = ("dim", "tokenizer")

# what an objective asks for in its constructor and no recipe can say; (config, encoder) -> value
PROVIDED: dict[str, Callable[[Config, Any], Any]] = {
    "target": lambda config, encoder: target.values if (target := _target(config)) else None,
    "target_dim": lambda config, encoder: target.dim(encoder.frontend) if (target := _target(config)) else 0,
    "target_learned": lambda config, encoder: (
        (target := _target(config)) is not None and target.learned and encoder.frontend.learned
    ),
    "pictures": lambda config, encoder: target.pictures if (target := _target(config)) else None,
    "views": lambda config, encoder: MODALITIES[config["modality"]].views.get(config["objective"]["views"]),
    "teacher_encoder": lambda config, encoder: _teacher(config),
    "n_characters": lambda config, encoder: len(config["vocabulary"]),
    "n_classes": lambda config, encoder: len(config["classes"]),
}


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with every section checked and every default written out.

    Raises:
        RecipeError: a setting that is missing, unknown, or of the wrong type.
    """
    named: dict[str, Mapping[str, Any]] = {}
    if isinstance(recipe.get("modality"), Mapping):
        values = _several(recipe)
    else:
        modality = recipe.choice("modality", MODALITIES)
        if recipe.get("init") is not None:
            recipe = _with_encoder(recipe, _init_config(recipe, str(recipe.get("init"))))
        objective = recipe.get("objective.name")
        if objective in PAIRED:
            raise recipe.error("objective.name", f"{objective} brings several modalities together; {_SEVERAL}")
        if recipe.get("backbone") is not None:
            raise recipe.error("backbone", f"backbone: is of several modalities; leave it out, or {_SEVERAL}")
        refuse(modality, str(objective), recipe)
        values = {"modality": modality.name, "tokenizer": _tokenizer(recipe, modality), **_own(recipe, modality)}
        named = {"target": modality.targets, "views": modality.views}
    init = recipe.get("init")
    given = ["encoder", *(name for name in PROVIDED if name not in named)]
    values["objective"] = _named(recipe, "objective", OBJECTIVES, given=given, named=named)
    values["data"] = recipe.settings("data", DataSettings)
    values["optimizer"] = recipe.settings("optimizer", build_optimizer, given=["objective"])
    values["schedule"] = _named(recipe, "schedule", SCHEDULES, given=["step", "steps"])
    values["trainer"] = recipe.settings("trainer", TrainSettings)
    if "backbone" in values and values["optimizer"]["layer_decay"] is not None:
        raise recipe.error(
            "optimizer.layer_decay", "optimizer.layer_decay: goes by the depth of one encoder; leave it out for several"
        )
    if "backbone" in values and values["trainer"]["accumulate"] > 1:
        raise recipe.error(
            "trainer.accumulate",
            f"trainer.accumulate={values['trainer']['accumulate']}: {recipe.get('objective.name')} tells the pairs of "
            "a micro-batch apart, so several would have another loss than one; set it to 1, and data.batch_size as "
            "high as memory goes, or use more processes",
        )
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
    that writes none takes that of the recipe.
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
    media = [MODALITIES[name].media for name in names]
    if len(media) < 2 or len(set(media)) < len(media):
        raise recipe.error("modality", f"modality: needs two or more that read different keys of a row (got {media})")
    objective = recipe.get("objective.name")
    recipe.choice("objective.name", OBJECTIVES)
    if objective not in PAIRED:
        what = f"{objective} learns from one modality, and these are {' and '.join(names)}"
        raise recipe.error("objective.name", f"{what}; choose {' or '.join(PAIRED)}")
    for section in OWN:
        if section != "transformer" and recipe.get(section) is not None:
            raise recipe.error(
                section, f"'{section}' stands below each modality here, as modality.{names[0]}.{section}"
            )
    if recipe.get("init") is not None:
        raise recipe.error("init", f"init: holds one encoder, and these are {' and '.join(names)}; leave it out")
    backbone = recipe.get("backbone", "separate")
    if backbone not in ("separate", "shared"):
        raise recipe.error("backbone", f"backbone: should be 'separate' or 'shared' (got {backbone!r})")
    if recipe.get("transformer") is not None and all(recipe.get(f"modality.{name}.transformer") for name in names):
        raise recipe.error("transformer", "transformer: each modality has its own here; leave this one out")
    values: dict[str, Any] = {"backbone": backbone, "tokenizer": None, "modality": {}}
    if backbone == "shared":
        values["transformer"] = _transformer(recipe)
    for name in names:
        modality, at = MODALITIES[name], f"modality.{name}."
        if modality.tokenizers:
            values["tokenizer"] = _tokenizer(recipe, modality)
        own = recipe
        if backbone == "shared" and recipe.get(f"{at}transformer") is not None:
            raise recipe.error(f"{at}transformer", f"'{at}transformer': is shared; write it once, as 'transformer'")
        if recipe.get(f"{at}transformer") is None:
            sections = {**recipe.values["modality"][name], "transformer": recipe.get("transformer")}
            own = replace(recipe, values={**recipe.values, "modality": {name: sections}})
        found = _own(own, modality, at)
        values["modality"][name] = {key: found[key] for key in OWN if key != "transformer" or backbone == "separate"}
    if values["tokenizer"] is None and recipe.get("tokenizer") is not None:
        raise recipe.error("tokenizer", f"tokenizer: {' and '.join(names)} are read without one; leave the section out")
    return values


def build_encoders(config: Config) -> Encoder | Encoders:
    """The encoder of a config with new weights, or where it is for several modalities all of them.

    Raises:
        ValueError: settings that do not fit together.
    """
    if isinstance(config["modality"], str):
        return build_encoder(config)
    trunk = Transformer(**config["transformer"]) if config["backbone"] == "shared" else None
    return Encoders({name: build_encoder(own, trunk) for name, own in members(config).items()})


def build_encoder(config: Config, transformer: Transformer | None = None) -> Encoder:
    """An encoder with new weights, from the sections `modality`, `frontend`, `positions`, `transformer`, `encoder`.

    Args:
        transformer: that of another encoder, to be shared.

    Raises:
        ValueError: settings that do not fit together.
    """
    transformer = transformer or Transformer(**config["transformer"])
    frontend = build_frontend(config, dim=transformer.dim)
    positions = _make(POSITIONS, config["positions"], dim=transformer.dim)
    return Encoder(frontend, transformer, positions, **config["encoder"])


def build_frontend(config: Config, *, dim: int) -> Frontend:
    """The frontend alone, for tokens of width `dim`."""
    kind = MODALITIES[config["modality"]]
    given = {"tokenizer": config["tokenizer"]} if kind.tokenizers else {}
    made: Frontend = _make(kind.frontends, config["frontend"], dim=dim, **given)
    return made


def build_objective(config: Config, encoder: Encoder | Encoders) -> nn.Module:
    """An objective with new weights around an encoder, or around several, from the section `objective`.

    Raises:
        ValueError: settings that do not fit together, or an encoder that cannot serve this objective.
    """
    settings = dict(config["objective"])
    objective = OBJECTIVES[settings.pop("name")]
    wanted = inspect.signature(objective).parameters
    settings |= {name: value(config, encoder) for name, value in PROVIDED.items() if name in wanted}
    made: nn.Module = objective(encoder, **settings)
    return made


def train(recipe: Recipe | str | Path, run: str | Path | None = None, overrides: Sequence[str] = ()) -> Path:
    """Train what a recipe says, and export the encoder: a shipped recipe by name, a file, or one that was loaded.

    The same recipe in the same folder goes on from the latest checkpoint.

    Args:
        run: folder of the run; "runs/" and the recipe's name by default.
        overrides: "key=value", when `recipe` is a name or a file.

    Returns:
        the folder.

    Raises:
        RecipeError: settings that cannot be used, or a folder that holds another run.
        RunStopped: see `mmssl.training.loop.train`.
    """
    recipe = resolve(recipe if isinstance(recipe, Recipe) else load(recipe, overrides))
    run = Path("runs", recipe.name) if run is None else Path(run)
    settings = recipe.placed(lambda: TrainSettings(**recipe.values["trainer"]))
    device = distributed.setup(settings.device)
    resume = _claim(run, recipe)

    data = recipe.values["data"]
    recipe.placed(lambda: DataSettings(**data))
    manifest = Manifest(data["train"])
    config = export_config(recipe, manifest, run)
    torch.manual_seed(settings.seed)
    encoder = recipe.placed(lambda: build_encoders(config))
    if recipe.values["init"] is not None:
        encoder.load_state_dict(encoder_of(open_encoder(recipe.values["init"]), config["modality"]).encoder)
    objective = recipe.placed(lambda: build_objective(config, encoder))
    optimizer = recipe.placed(lambda: build_optimizer(objective.to(device), **recipe.values["optimizer"]))
    bad_clips = run / "bad_clips.jsonl"
    loader = Loader(
        build_dataset(recipe, config, encoder, manifest, side="train"),
        build_plan(recipe, manifest, side="train"),
        workers=data["workers"],
        rank=distributed.rank(),
        world=distributed.world_size(),
        bad_clips=bad_clips,
        note=cut_captions(manifest, encoder),
    )
    evaluate = None
    if data["valid"] is not None:
        valid = Manifest(data["valid"])
        held_out = build_dataset(recipe, config, encoder, valid, side="eval")
        texts = None
        if config["vocabulary"] is not None:
            texts = {row["id"]: row["text"] for row in valid if "text" in row}
            held_out.label = partial(_spelled, CharVocabulary(config["vocabulary"]))
        if data["on_bad_clip"] == "raise" and held_out.label is not None:
            check_labels(held_out.label, valid)
        batches = partial(
            one_pass,
            held_out,
            build_plan(recipe, valid, side="eval"),
            rank=distributed.rank(),
            world=distributed.world_size(),
            bad_clips=bad_clips,
        )
        evaluate = Validation(objective, batches, config, device, settings.precision, run / "pictures", texts)
    schedule = dict(recipe.values["schedule"])
    multiplier = partial(SCHEDULES[schedule.pop("name")], steps=settings.steps, **schedule)
    recipe.placed(lambda: multiplier(1))
    export = partial(
        checkpoint.export_encoder,
        run,
        encoder,
        config,
        objective=objective if config["objective"]["name"] in (*LABELLED, *CODERS, *PAIRED) else None,
    )
    train_loop(
        objective,
        loader,
        run=run,
        optimizer=optimizer,
        schedule=multiplier,
        settings=settings,
        evaluate=evaluate,
        export=export,
        recipe=recipe.dump(),
        resume=resume,
    )
    return run


def pretrain(recipe: Recipe, run: Path | None = None) -> Path:
    """`train` for objectives without labels."""
    recipe.choice("objective.name", OBJECTIVES)
    if recipe.get("objective.name") in LABELLED:
        raise recipe.error("objective.name", f"{recipe.get('objective.name')} learns from labels: use mmssl finetune")
    return train(recipe, run)


def finetune(recipe: Recipe, run: Path | None = None) -> Path:
    """`train` for objectives with labels, from the encoder of the run that `init` names, or from new weights."""
    recipe.choice("objective.name", OBJECTIVES)
    if recipe.get("objective.name") not in LABELLED:
        raise recipe.error("objective.name", f"{recipe.get('objective.name')} needs no labels: use mmssl pretrain")
    return train(recipe, run)


def export_config(recipe: Recipe, manifest: Manifest, run: Path | None = None) -> dict[str, Any]:
    """What config.json holds: all that is needed to build the encoder and the objective again.

    Classes and characters are those of the training manifest, and so is a tokenizer that is learned.

    Args:
        run: folder of a run that may go on; its tokenizer stays the same.
    """
    values = recipe.values
    key = LABELLED.get(values["objective"]["name"])
    labels = iter(()) if key is None else manifest.values(key)
    if isinstance(values["modality"], str):
        encoder = {"modality": values["modality"], **_exported(values)}
    else:
        encoder = {key: values[key] for key in ("backbone", "transformer") if key in values}
        encoder["modality"] = {name: _exported(own) for name, own in values["modality"].items()}
    return {
        "format": checkpoint.ENCODER_FORMAT,
        **encoder,
        "objective": values["objective"],
        "classes": Classes.from_labels(_flat(labels, values["objective"])).names if key == "label" else None,
        "vocabulary": CharVocabulary.from_texts(labels).symbols if key == "text" else None,
        **({} if (tokenizer := learn_tokenizer(recipe, manifest, run)) is None else {"tokenizer": tokenizer}),
    }


def _exported(values: Config) -> dict[str, Any]:
    """What config.json holds of the encoder of one modality."""
    return {**{name: values[name] for name in ENCODER if name in values}, "augment_eval": values["augment"]["eval"]}


def encoder_of(found: Exported, modality: str) -> Exported:
    """What was exported, as the encoder of one modality: of a run on several, that of this one.

    Raises:
        ValueError: it is of another.
    """
    own = members(found.config)
    if modality not in own:
        raise ValueError(f"{found.folder}: holds an encoder of {' and '.join(own)}, and none of {modality}")
    if isinstance(found.config["modality"], str):
        return found
    tensors = {
        name.removeprefix(f"{modality}."): tensor
        for name, tensor in found.encoder.items()
        if name.startswith(f"{modality}.")
    }
    nothing = {"format": found.config["format"], "objective": None, "classes": None, "vocabulary": None}
    return Exported({**nothing, **own[modality]}, tensors, {}, found.folder)


def refuse(modality: Modality, objective: str, recipe: Recipe | None = None) -> None:
    """See that an objective makes sense for a modality.

    Raises:
        ValueError: it does not; with a recipe a RecipeError.
    """
    if objective in modality.refuses:
        sentence = f"objective {objective} is not for {modality.name}: it {modality.refuses[objective]}"
        raise ValueError(sentence) if recipe is None else recipe.error("objective.name", sentence)


def learn_tokenizer(recipe: Recipe, rows: Iterable[Mapping[str, Any]], run: Path | None = None) -> str | None:
    """The tokenizer of a run, as JSON: that of `init`, that which the run has already, or a new one.

    The main process makes it, so that all have the same.

    Raises:
        RecipeError: settings that cannot be used, or no captions.
    """
    if recipe.values["tokenizer"] is None:
        init = recipe.values["init"]
        return None if init is None else _init_config(recipe, init).get("tokenizer")

    def make() -> str:
        kept = None if run is None else run / checkpoint.TOKENIZER
        if kept is not None and kept.is_file():
            return kept.read_text(encoding="utf-8")
        table = next(kind.tokenizers for name in members(recipe.values) if (kind := MODALITIES[name]).tokenizers)
        texts = (row["text"] for row in rows if "text" in row)
        made: str = recipe.placed(lambda: _make(table, recipe.values["tokenizer"], texts=texts))
        return made

    return str(_by_main(make))


def _tokenizer(recipe: Recipe, modality: Modality) -> dict[str, Any] | None:
    """The section `tokenizer`, checked; None for a modality that has none, and where the encoder brings its own."""
    if not modality.tokenizers:
        if recipe.get("tokenizer") is not None:
            raise recipe.error("tokenizer", f"tokenizer: {modality.name} is read without one; leave the section out")
        return None
    if recipe.get("init") is not None:
        return None
    return _named(recipe, "tokenizer", modality.tokenizers, given=["texts"])


def _make(table: Mapping[str, Callable[..., Any]], section: Mapping[str, Any], **given: Any) -> Any:
    """What a section with a `name` becomes."""
    settings = dict(section)
    return table[settings.pop("name")](**given, **settings)


def _named(
    recipe: Recipe,
    section: str,
    table: Mapping[str, Callable[..., Any]],
    *,
    given: Sequence[str],
    named: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """A section that says by `name` what it becomes, checked."""
    chosen = recipe.choice(f"{section}.name", table)
    return {"name": recipe.get(f"{section}.name"), **recipe.settings(section, chosen, given=given, named=named)}


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


def _with_encoder(recipe: Recipe, config: Config) -> Recipe:
    """The recipe with the encoder's sections of a run; of its own it keeps the rates."""
    init = recipe.get("init")
    if config["modality"] != recipe.get("modality"):
        raise recipe.error(
            "init", f"{init} holds an encoder of {config['modality']}, and this recipe is for {recipe.get('modality')}"
        )
    sections: dict[str, Any] = {}
    for section in ENCODER:
        # a rate that the recipe leaves out is the constructor's default, as in any recipe, and not that of pretraining
        there = sections[section] = {key: value for key, value in config[section].items() if key not in RATES}
        for key, value in (recipe.get(section) or {}).items():
            place = f"{section}.{key}"
            if key in RATES:
                there[key] = value
            elif key not in there and recipe.get(f"{section}.name") == there.get("name"):
                raise recipe.unknown(place, config[section])
            elif recipe.place(place).startswith("command line") and value != there.get(key):
                raise recipe.error(
                    place,
                    f"the encoder comes from init={init}, where {place} is {there.get(key)!r}; "
                    f"only {', '.join(RATES)} may be set",
                )
    return replace(recipe, values={**recipe.values, **sections})


def _init_config(recipe: Recipe, init: str) -> dict[str, Any]:
    """The config of the encoder that `init` names; of a run on several modalities, that of the recipe's."""
    try:
        folder = find(init)
        config = read_transformers(folder).config if is_transformers(folder) else checkpoint.read_config(folder)
        return dict(members(config).get(str(recipe.get("modality")), config))
    except ValueError as error:
        raise recipe.error("init", f"init={error}") from None


def _claim(run: Path, recipe: Recipe) -> bool:
    """Whether the folder holds this very run, to be resumed; the main process looks, so that all agree.

    Raises:
        RecipeError: it holds something else.
    """
    return bool(_by_main(partial(_holds, run, recipe)))


def _by_main(make: Callable[[], Any]) -> Any:
    """What the main process makes, as JSON carries it, for all; and all raise what it raises, or they would wait.

    Raises:
        RecipeError: it could not.
    """
    problem, made = "", None
    if distributed.is_main():
        try:
            made = make()
        except (OSError, ValueError) as error:
            problem = str(error) or repr(error)
    problem, made = json.loads(distributed.broadcast_text(json.dumps([problem, made])))
    if problem:
        raise RecipeError(problem)
    return made


def _holds(run: Path, recipe: Recipe) -> bool:
    """Whether a folder holds the run of this recipe; false where there is nothing yet.

    Raises:
        RecipeError: it holds something else, or a recipe that cannot be read.
    """
    if not run.exists():
        return False
    if not run.is_dir():
        raise RecipeError(f"{run}: this is a file; give a folder with --out")
    if not (run / "recipe.yaml").is_file():
        if any(path.name != "recipe.yaml.tmp" for path in run.iterdir()):  # that one is of a run killed as it began
            raise RecipeError(f"{run}: holds files that are not of a run; choose another folder with --out")
        return False
    try:
        saved = parse((run / "recipe.yaml").read_text(encoding="utf-8"), source=str(run / "recipe.yaml"))
        # resolved again: a setting that is newer than the run was at its default
        before = dict(leaves(resolve(saved).values))
    except RecipeError:
        raise
    except (OSError, ValueError) as error:
        raise RecipeError(f"{run}: its recipe cannot be read ({error}); choose another folder with --out") from None
    now = dict(leaves(recipe.values))
    differing = [key for key in before | now if key not in PRACTICAL and before.get(key) != now.get(key)]
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        # not taken over by itself: that run may have begun a minute ago, and be running
        way_out = (
            "choose another folder with --out, or remove this one"
            if checkpoint.latest(run / "checkpoints", say=lambda sentence: None) is not None
            else "it has no checkpoint, so unless it is still running there is nothing in it worth keeping: "
            "remove it, or choose another folder with --out"
        )
        raise RecipeError(
            f"{run}: holds another run, in which {key} is {before.get(key)!r} and not {now.get(key)!r}{more}; {way_out}"
        )
    return True


def _flat(labels: Iterable[Any], objective: Config) -> Iterator[Any]:
    """Labels one by one, where a row may have a list of them."""
    several = objective.get("multi_label")
    for label in labels:
        yield from label if several and isinstance(label, list) else [label]


def _spelled(vocabulary: CharVocabulary, row: dict[str, Any]) -> list[int]:
    """A held-out clip's characters; none where the vocabulary lacks one: that is the model's fault, not the clip's."""
    known = not isinstance(row.get("text"), str) or spells(vocabulary, row["text"])
    return list(label_of("text", vocabulary.encode, row)) if known else []


def _teacher(config: Config) -> Encoder:
    """The encoder of the run that `objective.teacher` names, or one with new weights.

    Raises:
        ValueError: the folder holds no encoder of this modality.
    """
    folder = config["objective"]["teacher"]
    if folder is None:
        return build_encoder(config)
    found = open_encoder(folder)
    theirs = found.config
    if theirs["modality"] != config["modality"]:
        raise ValueError(
            f"objective.teacher={folder}: holds an encoder of {theirs['modality']}, and this recipe is for "
            f"{config['modality']}; give the folder of another run"
        )
    encoder = build_encoder(theirs)
    encoder.load_state_dict(found.encoder)
    return encoder


def _target(config: Config) -> Target | None:
    """None where an objective does without one."""
    name = config["objective"]["target"]
    return None if name is None else MODALITIES[config["modality"]].targets[name]
