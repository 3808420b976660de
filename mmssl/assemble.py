"""Recipe -> encoder, objective, loaders, run: the one file that knows every room."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmssl import distributed
from mmssl.build import Config, build_encoders, build_objective, make
from mmssl.convert.folder import encoder_of, open_encoder
from mmssl.data.batching import Loader, one_pass
from mmssl.data.manifest import Manifest, captions_of
from mmssl.data.text import CharVocabulary, Classes, class_name
from mmssl.data.turns import Turns
from mmssl.encoder import Encoder, Encoders
from mmssl.loading import DataSettings, build_dataset, build_plan, check_labels, cut_captions, label_of
from mmssl.modalities import MODALITIES
from mmssl.objectives import CODERS, DRAWING, LABELLED, OBJECTIVES, PAIRED
from mmssl.objectives.omni import Omni
from mmssl.recipe import Recipe, RecipeError, apart, leaves, load, members, parse
from mmssl.resolve import ENCODER, init_config, resolve
from mmssl.training import checkpoint
from mmssl.training.loop import train as train_loop
from mmssl.training.optimizer import build_optimizer
from mmssl.training.resume import LOCK, trained_on
from mmssl.training.schedule import SCHEDULES
from mmssl.training.settings import TrainSettings
from mmssl.types import Batch
from mmssl.validation import Validation, spells

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
    # nor does it change what a batch teaches
    "objective.chunk",
    "trainer.log_every",
    "trainer.eval_every",
    "trainer.save_every",
    "trainer.keep",
    "trainer.stop_on",
    "trainer.device",
    "trainer.threads",
}


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

    alone = apart(recipe)
    for one in alone.values():
        one.placed(partial(DataSettings, **one.values["data"]))
    manifests = {name: Manifest(one.values["data"]["train"]) for name, one in alone.items()}
    spoken = next((name for name in manifests if name in MODALITIES and MODALITIES[name].tokenizers), next(iter(alone)))
    config = export_config(recipe, manifests[spoken], run)
    torch.manual_seed(settings.seed)
    encoder = recipe.placed(lambda: build_encoders(config))
    _begin(encoder, recipe)
    objective = recipe.placed(lambda: build_objective(config, encoder))
    optimizer = recipe.placed(lambda: build_optimizer(objective.to(device), **recipe.values["optimizer"]))
    bad_clips = run / "bad_clips.jsonl"
    ranks: dict[str, Any] = {"rank": distributed.rank(), "world": distributed.world_size(), "bad_clips": bad_clips}
    loaders, passes, texts = {}, [], None
    for name, one in alone.items():
        data, own = one.values["data"], {**config, "objective": one.values["objective"]}
        body = encoder[name] if isinstance(objective, Omni) and isinstance(encoder, Encoders) else encoder
        loaders[name] = Loader(
            build_dataset(one, own, body, manifests[name], side="train"),
            build_plan(one, manifests[name], side="train"),
            workers=data["workers"],
            note=cut_captions(manifests[name], body),
            **ranks,
        )
        if data["valid"] is None:
            continue
        valid = Manifest(data["valid"])
        held_out = build_dataset(one, own, body, valid, side="eval")
        if config["vocabulary"] is not None:
            texts = _texts(valid)
            held_out.label = partial(_spelled, CharVocabulary(config["vocabulary"]))
        if data["on_bad_clip"] == "raise" and held_out.label is not None:
            check_labels(held_out.label, valid)
        passes.append(partial(one_pass, held_out, build_plan(one, valid, side="eval"), **ranks))
    loader: Loader | Turns = next(iter(loaders.values()))
    if isinstance(objective, Omni):
        loader = Turns(loaders, objective.weights, accumulate=settings.accumulate, seed=settings.seed)
    evaluate = None
    if passes:
        batches = partial(_one_after_the_other, passes)
        evaluate = Validation(objective, batches, config, device, settings.precision, run / "pictures", texts)
    schedule = dict(recipe.values["schedule"])
    multiplier = partial(SCHEDULES[schedule.pop("name")], steps=settings.steps, **schedule)
    recipe.placed(lambda: _check_schedule(multiplier, settings.steps))
    export = partial(
        checkpoint.export_encoder,
        run,
        encoder,
        config,
        objective=objective if config["objective"]["name"] in (*LABELLED, *CODERS, *DRAWING, *PAIRED) else None,
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
        data=_said_of(manifests),
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


def _begin(encoder: Encoder | Encoders, recipe: Recipe) -> None:
    """Give encoders the weights that `init` names, in place; with a shared backbone the others' blocks get them too."""
    init = recipe.values["init"]
    if init is None:
        return
    if isinstance(encoder, Encoder):
        encoder.load_state_dict(encoder_of(open_encoder(init), recipe.values["modality"]).encoder)
        return
    for name, folder in init.items():
        encoder[name].load_state_dict(encoder_of(open_encoder(folder), name).encoder)
        for other in encoder if encoder.shared else ():
            encoder[other].transformer.load_state_dict(encoder[name].transformer.state_dict())


def _check_schedule(multiplier: Callable[[int], float], steps: int) -> None:
    """See that a schedule has a rate at both ends of a run, rather than when it gets there."""
    for step in (1, steps):
        rate = multiplier(step)
        if isinstance(rate, complex) or not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"schedule: would multiply the rate by {rate} at update {step}; it must be at least 0")


def export_config(recipe: Recipe, manifest: Manifest, run: Path | None = None) -> dict[str, Any]:
    """What config.json holds: all that is needed to build the encoder and the objective again.

    Classes and characters are those of the training manifest, and so is a tokenizer that is learned.

    Args:
        run: folder of a run that may go on; its classes, characters and tokenizer stay the same.

    Raises:
        RecipeError: settings that cannot be used, or labels that the run did not begin with.
    """
    values = recipe.values
    key = LABELLED.get(values["objective"]["name"])
    labels = iter(()) if key is None else manifest.values(key)
    if isinstance(values["modality"], str):
        encoder = {"modality": values["modality"], **_exported(values)}
    else:
        encoder = {key: values[key] for key in ("backbone", "transformer") if key in values}
        encoder["modality"] = {name: _exported(own) for name, own in values["modality"].items()}
    names: dict[str, list[str] | None] = {
        "classes": Classes.from_labels(_flat(labels, manifest, values["objective"])).names if key == "label" else None,
        "vocabulary": CharVocabulary.from_texts(labels).symbols if key == "text" else None,
    }
    kept = {} if run is None or key is None else _by_main(partial(_began_with, run))
    for name in names.keys() & kept.keys():
        new = sorted(set(names[name] or ()) - set(kept[name]))
        if new:
            more = f" (and {len(new) - 1} more)" if len(new) > 1 else ""
            raise recipe.error(
                "data.train",
                f"data.train: {new[0]!r}{more} is not in the {name} that the run in {run} began with, so its model has "
                "no output for it; take out the rows that have it, or choose another folder with --out",
            )
        names[name] = kept[name]
    config = {
        "format": checkpoint.ENCODER_FORMAT,
        **encoder,
        "objective": values["objective"],
        **names,
        **({} if (tokenizer := learn_tokenizer(recipe, manifest, run)) is None else {"tokenizer": tokenizer}),
    }
    if values["objective"].get("class_weights") is not None and not values["objective"].get("multi_label"):
        classes = Classes(config["classes"])
        counts = Counter(classes.encode(label) for label in manifest.values("label"))
        config["class_counts"] = kept.get("class_counts") or [counts[number] for number in range(len(classes))]
    return config


def _began_with(run: Path) -> dict[str, Any]:
    """What config.json of a run that goes on holds of its labels: the model knows them by number."""
    going_on = checkpoint.latest(run / "checkpoints", say=lambda sentence: None) is not None
    # where the disk was full there may be none yet
    config = checkpoint.read_config(run) if going_on and (run / "config.json").is_file() else {}
    return {name: config[name] for name in ("classes", "vocabulary", "class_counts") if config.get(name) is not None}


def _one_after_the_other(passes: Sequence[Callable[[], Iterator[Batch]]]) -> Iterator[Batch]:
    for batches in passes:
        yield from batches()


def _exported(values: Config) -> dict[str, Any]:
    """What config.json holds of the encoder of one modality."""
    return {**{name: values[name] for name in ENCODER if name in values}, "augment_eval": values["augment"]["eval"]}


def learn_tokenizer(recipe: Recipe, rows: Iterable[Mapping[str, Any]], run: Path | None = None) -> str | None:
    """The tokenizer of a run, as JSON: that of `init`, that which the run has already, or a new one.

    The main process makes it, so that all have the same.

    Raises:
        RecipeError: settings that cannot be used, or no captions.
    """
    if recipe.values["tokenizer"] is None:
        for name in members(recipe.values):
            key = "init" if isinstance(recipe.values["modality"], str) else f"init.{name}"
            if MODALITIES[name].tokenizers and recipe.get(key) is not None:
                return init_config(recipe, key, name).get("tokenizer")
        return None

    def tokenizer() -> str:
        kept = None if run is None else run / checkpoint.TOKENIZER
        if kept is not None and kept.is_file():
            return kept.read_text(encoding="utf-8")
        table = next(kind.tokenizers for name in members(recipe.values) if (kind := MODALITIES[name]).tokenizers)
        texts = (text for row in rows for text in captions_of(row))
        made: str = recipe.placed(lambda: make(table, recipe.values["tokenizer"], texts=texts))
        return made

    return str(_by_main(tokenizer))


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
        # these two are of a run killed as it began
        if any(path.name not in (LOCK, "recipe.yaml.tmp") for path in run.iterdir()):
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
    differing = [key for key in before | now if not _practical(key) and before.get(key) != now.get(key)]
    elsewhere = [key for key in differing if _section_key(key) == "data.train"]
    if elsewhere and _same_rows(run, recipe):
        differing = [key for key in differing if key not in elsewhere]
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


def _practical(key: str) -> bool:
    """Whether a dotted key, which may go on with a modality, is one of `PRACTICAL`."""
    return _section_key(key) in PRACTICAL


def _section_key(key: str) -> str:
    """A dotted key without the modality that it may go on with."""
    return ".".join(key.split(".")[:2])


def _same_rows(run: Path, recipe: Recipe) -> bool:
    """Whether the training manifests of a recipe hold the rows that a run was trained on, wherever those were then."""
    known = trained_on(run)
    names = {name: one.values["data"]["train"] for name, one in apart(recipe).items()} if known else {}
    return bool(known) and known == _said_of({name: Manifest(path) for name, path in names.items()})


def _said_of(manifests: Mapping[str, Manifest]) -> dict[str, str]:
    """What a checkpoint says of the training data, see `train` of the loop."""
    return {
        f"data.train.{name}" if len(manifests) > 1 else "data.train": f"{len(manifest)} rows ({manifest.digest})"
        for name, manifest in manifests.items()
    }


def _flat(labels: Iterable[Any], manifest: Manifest, objective: Config) -> Iterator[Any]:
    """Labels one by one, where a row may have a list of them.

    Raises:
        ValueError: one is no label, by the place of its row.
    """
    several = objective.get("multi_label")
    for place, label in enumerate(labels):
        for one in label if several and isinstance(label, list) else [label]:
            try:
                class_name(one)
            except ValueError as error:
                raise ValueError(f"{manifest.place(place)}: {error}") from None
            yield one


def _texts(manifest: Manifest) -> dict[str, str]:
    """id -> transcript, of the rows that have one.

    Raises:
        ValueError: two rows of one id have several, by the place of the second.
    """
    texts: dict[str, str] = {}
    for place, row in enumerate(manifest):
        if "text" in row and texts.setdefault(row["id"], row["text"]) != row["text"]:
            raise ValueError(
                f"{manifest.place(place)}: a row before it has the same id, {row['id']}, and another text, and error "
                "rates go by ids; give each row an id of its own"
            )
    return texts


def _spelled(vocabulary: CharVocabulary, row: dict[str, Any]) -> list[int]:
    """A held-out clip's characters; none where the vocabulary lacks one: that is the model's fault, not the clip's."""
    known = not isinstance(row.get("text"), str) or spells(vocabulary, row["text"])
    return list(label_of("text", vocabulary.encode, row)) if known else []
