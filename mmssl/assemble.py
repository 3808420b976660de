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
from mmssl.convert.folder import find, is_transformers, open_encoder, read_transformers
from mmssl.data.batching import Loader, one_pass
from mmssl.data.manifest import Manifest
from mmssl.data.text import CharVocabulary, Classes
from mmssl.encoder import Encoder
from mmssl.loading import DataSettings, build_dataset, build_plan, check_labels, label_of
from mmssl.modalities import MODALITIES
from mmssl.modalities.modality import Modality, Target
from mmssl.nn.bias import BIASES
from mmssl.nn.positions import POSITIONS
from mmssl.nn.transformer import Transformer
from mmssl.objectives import CODERS, LABELLED, OBJECTIVES
from mmssl.recipe import SECTIONS, Recipe, RecipeError, leaves, load, parse
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

# what an objective asks for in its constructor and no recipe can say; (config, encoder) -> value
PROVIDED: dict[str, Callable[[Config, Encoder], Any]] = {
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
    modality = recipe.choice("modality", MODALITIES)
    init = recipe.get("init")
    if init is not None:
        recipe = _with_encoder(recipe, _init_config(recipe, str(init)))
    values: dict[str, Any] = {"modality": recipe.get("modality")}
    values["frontend"] = _named(recipe, "frontend", modality.frontends, given=["dim"])
    values["positions"] = _named(recipe, "positions", POSITIONS, given=["dim"])
    values["transformer"] = recipe.settings("transformer", Transformer)
    if values["transformer"]["bias"] is not None:
        values["transformer"]["bias"] = _named(recipe, "transformer.bias", BIASES, given=["heads", "depth"])
    values["encoder"] = recipe.settings("encoder", Encoder, given=["frontend", "transformer", "positions"])
    named = {"target": modality.targets, "views": modality.views}
    given = ["encoder", *(name for name in PROVIDED if name not in named)]
    values["objective"] = _named(recipe, "objective", OBJECTIVES, given=given, named=named)
    values["augment"] = _augments(recipe, modality)
    values["data"] = recipe.settings("data", DataSettings)
    values["optimizer"] = recipe.settings("optimizer", build_optimizer, given=["objective"])
    values["schedule"] = _named(recipe, "schedule", SCHEDULES, given=["step", "steps"])
    values["trainer"] = recipe.settings("trainer", TrainSettings)
    values["init"] = None if init is None else str(init)
    return replace(recipe, values={name: values[name] for name in SECTIONS})


def build_encoder(config: Config) -> Encoder:
    """An encoder with new weights, from the sections `modality`, `frontend`, `positions`, `transformer`, `encoder`.

    Raises:
        ValueError: settings that do not fit together.
    """
    transformer = Transformer(**config["transformer"])
    frontend = build_frontend(config, dim=transformer.dim)
    positions = _make(POSITIONS, config["positions"], dim=transformer.dim)
    return Encoder(frontend, transformer, positions, **config["encoder"])


def build_frontend(config: Config, *, dim: int) -> Frontend:
    """The frontend alone, for tokens of width `dim`."""
    made: Frontend = _make(MODALITIES[config["modality"]].frontends, config["frontend"], dim=dim)
    return made


def build_objective(config: Config, encoder: Encoder) -> nn.Module:
    """An objective with new weights around an encoder, from the section `objective`.

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
    config = export_config(recipe, manifest)
    torch.manual_seed(settings.seed)
    encoder = recipe.placed(lambda: build_encoder(config))
    if recipe.values["init"] is not None:
        encoder.load_state_dict(open_encoder(recipe.values["init"]).encoder)
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
        objective=objective if config["objective"]["name"] in (*LABELLED, *CODERS) else None,
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


def export_config(recipe: Recipe, manifest: Manifest) -> dict[str, Any]:
    """What config.json holds: all that is needed to build the encoder and the objective again.

    Classes and characters are those of the training manifest.
    """
    values = recipe.values
    key = LABELLED.get(values["objective"]["name"])
    labels = iter(()) if key is None else manifest.values(key)
    return {
        "format": checkpoint.ENCODER_FORMAT,
        **{name: values[name] for name in ("modality", *ENCODER)},
        "augment_eval": values["augment"]["eval"],
        "objective": values["objective"],
        "classes": Classes.from_labels(_flat(labels, values["objective"])).names if key == "label" else None,
        "vocabulary": CharVocabulary.from_texts(labels).symbols if key == "text" else None,
    }


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


def _augments(recipe: Recipe, modality: Modality) -> dict[str, list[dict[str, Any]]]:
    section = recipe.get("augment") or {}
    if not isinstance(section, Mapping):
        raise recipe.error("augment", f"'augment' should be a mapping with train and eval (got {section!r})")
    for side in section:
        if side not in ("train", "eval"):
            raise recipe.unknown(f"augment.{side}", ("train", "eval"))
    found: dict[str, list[dict[str, Any]]] = {}
    for side in ("train", "eval"):
        steps = section.get(side) or []
        if not isinstance(steps, list):
            raise recipe.error(f"augment.{side}", f"'augment.{side}' should be a list of steps (got {steps!r})")
        # the rate and the channels are the frontend's
        given = ["x", "whole", "rng", "rate", "channels"]
        found[side] = []
        for place in range(len(steps)):
            # a span says what is read, so nothing can come before it
            table = {**modality.spans, **modality.augments} if place == 0 else modality.augments
            found[side].append(_named(recipe, f"augment.{side}.{place}", table, given=given))
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
    """The config of the encoder that `init` names."""
    try:
        folder = find(init)
        return read_transformers(folder).config if is_transformers(folder) else checkpoint.read_config(folder)
    except ValueError as error:
        raise recipe.error("init", f"init={error}") from None


def _claim(run: Path, recipe: Recipe) -> bool:
    """Whether the folder holds this very run, to be resumed; the main process looks, so that all agree.

    Raises:
        RecipeError: it holds something else.
    """
    problem, resume = "", False
    if distributed.is_main():
        # told to all before anything is raised: the others would wait for an answer
        try:
            resume = _holds(run, recipe)
        except RecipeError as error:
            problem = str(error)
        except (OSError, ValueError) as error:
            problem = f"{run}: its recipe cannot be read ({error}); choose another folder with --out"
    problem, resume = json.loads(distributed.broadcast_text(json.dumps([problem, resume])))
    if problem:
        raise RecipeError(problem)
    return bool(resume)


def _holds(run: Path, recipe: Recipe) -> bool:
    """Whether a folder holds the run of this recipe; false where there is nothing yet.

    Raises:
        RecipeError: it holds something else.
        OSError, ValueError: its recipe cannot be read.
    """
    if not run.exists():
        return False
    if not run.is_dir():
        raise RecipeError(f"{run}: this is a file; give a folder with --out")
    if not (run / "recipe.yaml").is_file():
        if any(path.name != "recipe.yaml.tmp" for path in run.iterdir()):  # that one is of a run killed as it began
            raise RecipeError(f"{run}: holds files that are not of a run; choose another folder with --out")
        return False
    saved = parse((run / "recipe.yaml").read_text(encoding="utf-8"), source=str(run / "recipe.yaml"))
    # resolved again: a setting that is newer than the run was at its default
    before = dict(leaves(resolve(saved).values))
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
