"""Recipe -> encoder, objective, loaders, run: the one file that knows every room.

A recipe is first resolved: every section is checked against what it becomes, and every default is written out. What is
built later is built from these plain values alone, so a saved config.json goes on meaning the same when a default
changes.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

import numpy as np
import torch
from torch import Tensor, nn

from mmssl import distributed
from mmssl.data.batching import BatchPlan, Loader, one_pass
from mmssl.data.dataset import ATTEMPTS, ManifestDataset
from mmssl.data.manifest import Manifest
from mmssl.data.text import CharVocabulary, Classes
from mmssl.encoder import Encoder
from mmssl.evaluation.speech import error_rates
from mmssl.modalities import MODALITIES
from mmssl.modalities.modality import Modality
from mmssl.nn.positions import POSITIONS
from mmssl.nn.transformer import Transformer
from mmssl.objectives import OBJECTIVES
from mmssl.recipe import SECTIONS, Recipe, RecipeError, leaves, load, parse
from mmssl.training import checkpoint
from mmssl.training.loop import train as train_loop
from mmssl.training.optimizer import build_optimizer
from mmssl.training.pictures import write_sheet
from mmssl.training.schedule import SCHEDULES
from mmssl.training.settings import TrainSettings
from mmssl.types import BadClip, Batch, Frontend, Loss, Raw

FORMAT = 1
ENCODER = ("frontend", "positions", "transformer", "encoder")
# of an encoder that was pretrained, a recipe for fine-tuning may set these alone: they are no part of what it learned
RATES = ("dropout", "attention_dropout", "activation_dropout", "drop_path", "layer_drop")
# settings that say how a run is done and not what comes out of it: a run may be resumed with others
PRACTICAL = {
    "data.valid",
    "data.on_bad_clip",
    "data.max_bad_share",
    "data.workers",
    "data.cache",
    # with another number of processes it is set anew, so that the batch of an update stays the same
    "trainer.accumulate",
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
    "target": lambda config, encoder: _target(config).values,
    "target_dim": lambda config, encoder: _target(config).dim(encoder.frontend),
    "target_learned": lambda config, encoder: _target(config).learned and encoder.frontend.learned,
    "pictures": lambda config, encoder: _target(config).pictures,
    "n_characters": lambda config, encoder: len(config["vocabulary"]),
    "n_classes": lambda config, encoder: len(config["classes"]),
}


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The section `data` of a recipe.

    Args:
        train, valid: manifests; without `valid` nothing is evaluated while training.
        batch_size: most clips of a micro-batch.
        max_seconds: most seconds of a micro-batch, padding included.
        bucket: put clips of similar length together.
        workers: processes that read clips; 0 reads in a thread.
        on_bad_clip: "raise" stops at the first clip that cannot be read, "skip" counts and names it and goes on.
        max_bad_share: of the clips, beyond which "skip" stops too.
        cache: keep decoded clips in memory.

    Raises:
        ValueError: a value outside its range.
    """

    train: str
    valid: str | None = None
    batch_size: int | None = None
    max_seconds: float | None = None
    bucket: bool = True
    workers: int = 0
    on_bad_clip: Literal["raise", "skip"] = "raise"
    max_bad_share: float = 0.01
    cache: bool = False

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data.{name}={value}: must be at least {least}")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"data.max_seconds={self.max_seconds}: must be above 0; leave it out for no such bound")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"data.max_bad_share={self.max_bad_share}: must be a share of the clips, from 0 to 1")


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with every section checked and every default written out.

    Raises:
        RecipeError: a setting that is missing, unknown, or of the wrong type.
    """
    modality = recipe.choice("modality", MODALITIES)
    init = recipe.get("init")
    if init is not None:
        recipe = _with_encoder(recipe, read_config(_run_folder(recipe, init)))
    values: dict[str, Any] = {"modality": recipe.get("modality")}
    values["frontend"] = _named(recipe, "frontend", modality.frontends, given=["dim"])
    values["positions"] = _named(recipe, "positions", POSITIONS, given=["dim"])
    values["transformer"] = recipe.settings("transformer", Transformer)
    values["encoder"] = recipe.settings("encoder", Encoder, given=["frontend", "transformer", "positions"])
    given = [name for name in PROVIDED if name != "target"]
    values["objective"] = _named(
        recipe, "objective", OBJECTIVES, given=["encoder", *given], named={"target": modality.targets}
    )
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


def build_reader(config: Config, frontend: Frontend) -> Callable[..., Tensor]:
    """(path or binary file, **{start, duration}) -> the clip as this frontend reads it, not augmented."""
    return partial(MODALITIES[config["modality"]].read, **frontend.reader_settings)


def build_augment(steps: Sequence[Mapping[str, Any]], modality: str, frontend: Frontend) -> Augment:
    """One function of the steps that a recipe lists; what the frontend fixes, such as the rate, is filled in."""
    table, given = MODALITIES[modality].augments, frontend.reader_settings
    return Augment(tuple(_step(table, step, given) for step in steps if step["name"] in table))


def build_span(steps: Sequence[Mapping[str, Any]], modality: str, frontend: Frontend) -> Span | None:
    """Which part of a clip is to be read, (seconds, rng=generator) -> (start, duration); None for all."""
    table, given = MODALITIES[modality].spans, frontend.reader_settings
    return next((_step(table, step, given) for step in steps if step["name"] in table), None)


def _step(
    table: Mapping[str, Callable[..., Any]], step: Mapping[str, Any], given: Mapping[str, Any]
) -> Callable[..., Any]:
    """The function that a step names, with its settings, and of what is `given` with that which it knows."""
    settings = dict(step)
    function = table[settings.pop("name")]
    known = inspect.signature(function).parameters
    return partial(function, **settings, **{name: value for name, value in given.items() if name in known})


@dataclass(frozen=True)
class Augment:
    """Augmentations one after the other."""

    steps: tuple[Callable[..., Tensor], ...]

    def __call__(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        for step in self.steps:
            x = step(x, rng)
        return x


def extents(
    recipe: Recipe, side: str, table: Mapping[str, Callable[..., np.ndarray]], before: np.ndarray
) -> np.ndarray:
    """What clips measure after the steps of one side, at most; `table` is the modality's `durations` or `sizes`."""
    for step in recipe.values["augment"][side]:
        if step["name"] in table:
            before = _step(table, step, {"rate": recipe.values["frontend"].get("rate")})(before)
    return before


def build_dataset(
    recipe: Recipe, config: Config, encoder: Encoder, manifest: Manifest, *, side: Literal["train", "eval"]
) -> ManifestDataset:
    """The clips of a manifest as an objective wants them; `side` chooses the augmentations.

    Raises:
        RecipeError: a setting outside its range, or pictures of several sizes that are to lie in one batch.
        ValueError: a row that names no file of the modality.
    """
    name, frontend = config["modality"], encoder.frontend
    data = _placed(recipe, lambda: DataSettings(**recipe.values["data"]))
    steps = recipe.values["augment"][side]
    span = build_span(steps, name, frontend)
    if data.cache and span is not None:
        raise recipe.error(
            "data.cache",
            f"data.cache=true would keep one span of each clip, and augment.{side} draws another each time",
        )
    # a copy without weights: what is sent to loader workers must not lie on a GPU
    lengths = copy.deepcopy(frontend).to("meta").lengths
    dataset = ManifestDataset(
        manifest,
        media={name: MODALITIES[name].media},
        readers={name: build_reader(config, frontend)},
        hints={name: MODALITIES[name].hints},
        spans={} if span is None else {name: span},
        augments={name: build_augment(steps, name, frontend)},
        rates={name: frontend.reader_settings.get("rate")},
        fits={name: lengths},
        label=_labeler(config),
        seed=recipe.values["trainer"]["seed"],
        on_bad_clip=data.on_bad_clip,
        max_bad_share=data.max_bad_share,
        cache=data.cache,
    )
    if "h" in frontend.axes and data.batch_size != 1 and not _one_size(recipe, side):
        _check_sizes(recipe, manifest, side)
        dataset.fits = {name: partial(_fits, lengths, _first_size(dataset, name))}
    return dataset


def _one_size(recipe: Recipe, side: str) -> bool:
    """Whether pictures of whatever size are of the same one after the steps of one side."""
    one, other = _sizes(recipe, side, [[301, 170], [211, 411]])
    return one == other


def _sizes(recipe: Recipe, side: str, before: Sequence[Sequence[int]]) -> list[list[int]]:
    """Heights and widths after the steps of one side."""
    return extents(recipe, side, MODALITIES[recipe.values["modality"]].sizes, np.array(before)).tolist()


def _check_sizes(recipe: Recipe, manifest: Manifest, side: str) -> None:
    """See that the sizes that the rows state come to one.

    Raises:
        RecipeError: they do not.
    """
    first, first_id = None, ""
    for place, row in enumerate(manifest):
        if not all(isinstance(row.get(key), int) for key in ("height", "width")):
            continue
        [size] = _sizes(recipe, side, [[row["height"], row["width"]]])
        if first is None:
            first, first_id = size, row["id"]
        elif size != first:
            raise recipe.error(
                f"augment.{side}",
                f"augment.{side} leaves {first_id} at {first[0]} x {first[1]} pixels and {row['id']} "
                f"({manifest.place(place)}) at {size[0]} x {size[1]}, but a batch holds pictures of one size; add for "
                "example a resize and a center_crop, or set data.batch_size to 1",
            )


def _first_size(dataset: ManifestDataset, modality: str) -> tuple[int, ...] | None:
    """Height and width of the first clip that can be read; None where none of the first few can."""
    for place in range(min(len(dataset), ATTEMPTS)):
        try:
            return tuple(dataset.read(place, 0).inputs[modality].shape[-2:])
        except BadClip:
            continue
    return None


def _fits(lengths: Callable[[Raw], Tensor], size: tuple[int, ...] | None, raw: Raw) -> None:
    """Raises ValueError where a clip is none for the frontend, or its pictures are of another size than the others."""
    lengths(raw)
    own = tuple(raw.data.shape[-2:])
    if size is not None and own != size:
        raise ValueError(
            f"{own[0]} x {own[1]} pixels, where the first clip of the manifest has {size[0]} x {size[1]}, and a batch "
            "holds pictures of one size; bring them to one in `augment`, for example with resize and center_crop"
        )


def build_plan(recipe: Recipe, manifest: Manifest, *, side: Literal["train", "eval"]) -> BatchPlan:
    """Which clips go together: shuffled anew in each epoch for "train", every clip in order of length for "eval".

    Raises:
        RecipeError: no bound, one outside its range, or clips that are longer than it.
        ValueError: a row that does not state its length.
    """
    data, training = _placed(recipe, lambda: DataSettings(**recipe.values["data"])), side == "train"
    modality = recipe.values["modality"]
    by_length = MODALITIES[modality].media != "image" and (data.bucket or data.max_seconds is not None)
    if data.batch_size is None and (data.max_seconds is None or not by_length):
        raise recipe.error(
            "data", "micro-batches have no bound: set data.batch_size, or data.max_seconds for sound and video"
        )
    lengths = np.ones(len(manifest), np.float32)
    if by_length:
        lengths = extents(recipe, side, MODALITIES[modality].durations, manifest.lengths())
    try:
        return BatchPlan(
            lengths,
            batch_size=data.batch_size,
            max_length=data.max_seconds if by_length else None,
            bucket=data.bucket and by_length,
            seed=recipe.values["trainer"]["seed"],
            shuffle=training,
            longer="refuse" if training else "alone",
        )
    except ValueError as error:  # the rest was seen to above
        raise recipe.error("data.max_seconds", f"data.max_seconds={data.max_seconds}: {error}") from None


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
    settings = _placed(recipe, lambda: TrainSettings(**recipe.values["trainer"]))
    device = distributed.setup(settings.device)
    resume = _claim(run, recipe)

    data = recipe.values["data"]
    _placed(recipe, lambda: DataSettings(**data))
    manifest = Manifest(data["train"])
    config = export_config(recipe, manifest)
    torch.manual_seed(settings.seed)
    encoder = _placed(recipe, lambda: build_encoder(config))
    if recipe.values["init"] is not None:
        encoder.load_state_dict(checkpoint.read_encoder(Path(recipe.values["init"]))[1])
    objective = _placed(recipe, lambda: build_objective(config, encoder))
    optimizer = _placed(recipe, lambda: build_optimizer(objective.to(device), **recipe.values["optimizer"]))
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
            _check_labels(held_out.label, valid)
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
    _placed(recipe, lambda: multiplier(1))
    export = partial(
        checkpoint.export_encoder,
        run,
        encoder,
        config,
        objective=objective if config["objective"]["name"] in LABELLED else None,
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


# objective -> the key of a manifest's rows that it learns from
LABELLED: dict[str, str] = {
    name: label for name, objective in OBJECTIVES.items() if (label := getattr(objective, "label", None)) is not None
}


def export_config(recipe: Recipe, manifest: Manifest) -> dict[str, Any]:
    """What config.json holds: all that is needed to build the encoder and the objective again.

    Classes and characters are those of the training manifest.
    """
    values = recipe.values
    key = LABELLED.get(values["objective"]["name"])
    labels = iter(()) if key is None else manifest.values(key)
    return {
        "format": FORMAT,
        **{name: values[name] for name in ("modality", *ENCODER)},
        "augment_eval": values["augment"]["eval"],
        "objective": values["objective"],
        "classes": Classes.from_labels(_flat(labels, values["objective"])).names if key == "label" else None,
        "vocabulary": CharVocabulary.from_texts(labels).symbols if key == "text" else None,
    }


def read_config(run: Path) -> dict[str, Any]:
    """The config.json of a run folder.

    Raises:
        ValueError: there is none, or it is of another format.
    """
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"{run}: no config.json here, so this is no folder of a run; a run writes it when it ends")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: this is not JSON ({error}); copy or export it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: this is no description of an encoder; copy or export it again")
    if config.get("format") != FORMAT:
        raise ValueError(f"{path}: format {config.get('format')!r}, but this version of mmssl reads {FORMAT}")
    return config


@dataclass(frozen=True)
class Validation:
    """The mean loss and metrics of an objective over held-out clips, and error rates where it writes text.

    Where the objective can draw what it makes of pictures, some of the first clips go to the folder `pictures`.

    texts: id -> transcript, for an objective that writes text. Error rates are over all of them, as `mmssl evaluate`
        has it; one that the vocabulary cannot spell has no loss, and "unspelled" is the share of these.
    """

    objective: Any
    batches: Callable[[], Iterator[Batch]]
    config: Config
    device: torch.device
    precision: str
    pictures: Path
    texts: Mapping[str, str] | None = None

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        sums: dict[str, tuple[float, float]] = {}
        said: list[tuple[str, str]] = []
        drawn = False
        for batch in self.batches():
            batch = batch.to(self.device)
            if not drawn and distributed.is_main() and getattr(self.objective, "pictures", None) is not None:
                shown = self.objective.reconstruct(batch)
                note = shown.pop("note")
                write_sheet(self.pictures / f"update_{step}.png", shown, note=note)
                drawn = True
            metrics: dict[str, tuple[float | Tensor, float]] = {}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                learnt: Batch | None = batch
                if self.texts is not None:
                    said += self._transcribe(batch, self.texts)
                    learnt = self._spelled(batch, self.texts)
                    metrics["unspelled"] = len(batch) - (0 if learnt is None else len(learnt)), len(batch)
                if learnt is not None:
                    loss: Loss = self.objective(learnt)
                    metrics |= {**loss.metrics, "loss": (loss.total, loss.count)}
            for name, (value, count) in metrics.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + float(value), before[1] + float(count))
        # every process saw other clips, and a metric may be one process's alone
        shares = [json.loads(text) for text in distributed.gather_text(json.dumps([sums, said]))]
        scores = {}
        for name in dict.fromkeys(name for share, _ in shares for name in share):
            total, count = (sum(share[name][i] for share, _ in shares if name in share) for i in (0, 1))
            if count:
                scores[name] = total / count
        pairs = [pair for _, part in shares for pair in part]
        if any(reference for reference, _ in pairs):
            references, hypotheses = zip(*pairs, strict=True)
            rates = error_rates(references, hypotheses, decoding="best path")
            scores |= {name: rate.value for name, rate in rates.items()}
        return scores

    def _transcribe(self, batch: Batch, texts: Mapping[str, str]) -> list[tuple[str, str]]:
        """(reference, hypothesis) of each clip."""
        vocabulary = CharVocabulary(self.config["vocabulary"])
        hypotheses = [vocabulary.decode(ids) for ids in self.objective.predict(batch)]
        references = [" ".join(normalize("NFC", texts[name]).split()) for name in batch.ids]
        return list(zip(references, hypotheses, strict=True))

    def _spelled(self, batch: Batch, texts: Mapping[str, str]) -> Batch | None:
        """The clips whose transcripts the vocabulary can spell; None where there are none."""
        vocabulary = CharVocabulary(self.config["vocabulary"])
        rows = [row for row, name in enumerate(batch.ids) if _spells(vocabulary, texts[name])]
        if len(rows) == len(batch):
            return batch
        assert batch.labels is not None
        assert batch.label_lengths is not None
        inputs = {
            name: replace(raw, data=raw.data[rows], lengths=raw.lengths[rows], ids=[raw.ids[row] for row in rows])
            for name, raw in batch.inputs.items()
        }
        spelled = Batch(inputs, batch.seeds[rows], batch.labels[rows], batch.label_lengths[rows])
        return spelled if rows else None


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


def _run_folder(recipe: Recipe, init: Any) -> Path:
    path = Path(str(init))
    if not path.is_dir():
        raise recipe.error("init", f"init={init}: no such folder; give the folder of a run, such as runs/wav2vec2_base")
    return path


def _claim(run: Path, recipe: Recipe) -> bool:
    """Whether the folder holds this very run, to be resumed; the main process looks, so that all agree.

    Raises:
        RecipeError: it holds something else.
    """
    problem, resume = "", False
    if distributed.is_main() and run.exists():
        if not run.is_dir():
            problem = f"{run}: this is a file; give a folder with --out"
        elif (run / "recipe.yaml").is_file():
            resume = True
            before = dict(leaves(parse((run / "recipe.yaml").read_text(encoding="utf-8"), source="recipe.yaml").values))
            now = dict(leaves(recipe.values))
            differing = [key for key in before | now if key not in PRACTICAL and before.get(key) != now.get(key)]
            if differing:
                key = differing[0]
                more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
                problem = (
                    f"{run}: holds another run, in which {key} is {before.get(key)!r} and not {now.get(key)!r}{more}; "
                )
                # not taken over by itself: that run may have begun a minute ago, and be running
                problem += (
                    "choose another folder with --out, or remove this one"
                    if checkpoint.latest(run / "checkpoints", say=lambda sentence: None) is not None
                    else "it has no checkpoint, so unless it is still running there is nothing in it worth keeping: "
                    "remove it, or choose another folder with --out"
                )
        elif any(path.name != "recipe.yaml.tmp" for path in run.iterdir()):  # that one is of a run killed as it began
            problem = f"{run}: holds files that are not of a run; choose another folder with --out"
    problem, resume = json.loads(distributed.broadcast_text(json.dumps([problem, resume])))
    if problem:
        raise RecipeError(problem)
    return bool(resume)


def _placed(recipe: Recipe, make: Callable[[], Any]) -> Any:
    """What `make` gives; a complaint that begins with a setting is put behind the place where that was written."""
    try:
        return make()
    except ValueError as error:
        setting = re.match(r"\w+\.\w+", str(error))
        raise RecipeError(f"{recipe.place(setting[0] if setting else '')}: {error}") from error


def _labeler(config: Config) -> Callable[[dict[str, Any]], Any] | None:
    key = LABELLED.get(config["objective"]["name"])
    if key is None:
        return None
    if key != "label":
        return partial(_label, key, CharVocabulary(config["vocabulary"]).encode)
    classes = Classes(config["classes"])
    return partial(_label, key, classes.encode_all if config["objective"].get("multi_label") else classes.encode)


def _check_labels(label: Callable[[dict[str, Any]], Any], manifest: Manifest) -> None:
    """See that training knows the labels of held-out clips: these are read at the first evaluation only.

    Raises:
        ValueError: it does not, by the place of the row.
    """
    for place, row in enumerate(manifest):
        try:
            label(row)
        except ValueError as error:
            raise ValueError(
                f"{manifest.place(place)}: {error}; correct data.valid, or set data.on_bad_clip=skip to leave such "
                "clips out"
            ) from None


def _label(key: str, encode: Callable[[Any], Any], row: dict[str, Any]) -> Any:
    if key not in row:
        raise ValueError(f"the row has no {key!r}, which this objective learns from; it has {', '.join(sorted(row))}")
    return encode(row[key])


def _flat(labels: Iterable[Any], objective: Config) -> Iterator[Any]:
    """Labels one by one, where a row may have a list of them."""
    several = objective.get("multi_label")
    for label in labels:
        yield from label if several and isinstance(label, list) else [label]


def _spelled(vocabulary: CharVocabulary, row: dict[str, Any]) -> list[int]:
    """A held-out clip's characters; none where the vocabulary lacks one: that is the model's fault, not the clip's."""
    known = not isinstance(row.get("text"), str) or _spells(vocabulary, row["text"])
    return list(_label("text", vocabulary.encode, row)) if known else []


def _spells(vocabulary: CharVocabulary, text: str) -> bool:
    try:
        vocabulary.encode(text)
    except ValueError:
        return False
    return True


def _target(config: Config) -> Any:
    return MODALITIES[config["modality"]].targets[config["objective"]["target"]]
