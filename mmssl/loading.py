"""What a recipe says of its data -> readers, augmentations, datasets, batch plans."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from torch import Tensor

from mmssl.data.batching import BatchPlan
from mmssl.data.dataset import ATTEMPTS, ManifestDataset
from mmssl.data.manifest import Manifest, captions_of
from mmssl.data.text import CharVocabulary, Classes
from mmssl.data.units import read_units
from mmssl.encoder import Encoder, Encoders
from mmssl.modalities import MODALITIES
from mmssl.objectives import LABELLED
from mmssl.recipe import Recipe, members
from mmssl.types import BadClip, Frontend, Raw

COUNTED = 100_000  # captions of a manifest that are looked at for whether they are cut

Config = Mapping[str, Any]
Span = Callable[..., tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The section `data` of a recipe; where modalities learn in turn, that of one of them.

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


def build_reader(modality: str, frontend: Frontend) -> Callable[..., Tensor]:
    """(path or binary file, **{start, duration}) -> the clip as this frontend reads it, not augmented."""
    return partial(MODALITIES[modality].read, **frontend.reader_settings)


def build_augment(steps: Sequence[Mapping[str, Any]], modality: str, frontend: Frontend) -> Augment:
    """One function of the steps that a recipe lists; what the frontend fixes, such as the rate, is filled in."""
    table, given = MODALITIES[modality].augments, frontend.reader_settings
    return Augment(tuple(_step(table, step, given) for step in steps if step["name"] in table))


def build_cut(steps: Sequence[Mapping[str, Any]], modality: str, frontend: Frontend) -> Cut | None:
    """What the same steps leave of a clip, in units along time; None where they leave all of it."""
    table, given = MODALITIES[modality].cuts, frontend.reader_settings
    parts = tuple(_step(table, step, given) for step in steps if step["name"] in table)
    return Cut(parts) if parts else None


def build_span(steps: Sequence[Mapping[str, Any]], modality: str, frontend: Frontend) -> Span | None:
    """Which part of a clip is to be read, (seconds, rng=generator) -> (start, duration); None for all."""
    table, given = MODALITIES[modality].spans, frontend.reader_settings
    return next((_step(table, step, given) for step in steps if step["name"] in table), None)


def _span_extent(steps: Sequence[Mapping[str, Any]], modality: str, frontend: Frontend) -> float:
    """How many seconds of a long clip are read."""
    kind, given = MODALITIES[modality], frontend.reader_settings
    forever = np.array([1e9])
    parts = [_step(kind.durations, step, given)(forever) for step in steps if step["name"] in kind.spans]
    return float(min(parts, default=forever)[0])


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


@dataclass(frozen=True)
class Cut:
    """Crops along time, one after the other: of so many units those that stay."""

    parts: tuple[Callable[[int], slice], ...]

    def __call__(self, length: int) -> slice:
        first, stop = 0, length
        for part in self.parts:
            kept = part(stop - first)
            first, stop = first + kept.start, first + kept.stop
        return slice(first, stop)


def clips_of(
    manifest: Manifest,
    frontends: Mapping[str, Frontend],
    steps: Mapping[str, Sequence[Mapping[str, Any]]],
    **settings: Any,
) -> ManifestDataset:
    """The clips of a manifest as frontends read them, after the steps that a recipe lists.

    Args:
        frontends, steps: by modality.
        settings: further ones of `ManifestDataset`.
    """
    # the longest first: the others are drawn within it
    order = sorted(frontends, key=lambda name: -_span_extent(steps[name], name, frontends[name]))
    spans = {name: build_span(steps[name], name, frontends[name]) for name in order}
    cuts = {name: build_cut(steps[name], name, frontend) for name, frontend in frontends.items()}
    return ManifestDataset(
        manifest,
        media={name: MODALITIES[name].media for name in frontends},
        readers={name: build_reader(name, frontend) for name, frontend in frontends.items()},
        hints={name: MODALITIES[name].hints for name in frontends},
        spans={name: span for name, span in spans.items() if span is not None},
        augments={name: build_augment(steps[name], name, frontend) for name, frontend in frontends.items()},
        cuts={name: cut for name, cut in cuts.items() if cut is not None},
        rates={name: frontend.reader_settings.get("rate") for name, frontend in frontends.items()},
        **settings,
    )


def extents(
    values: Config, side: str, table: Mapping[str, Callable[..., np.ndarray]], before: np.ndarray
) -> np.ndarray:
    """What clips measure after the steps of one side, at most.

    Args:
        values: the sections of one modality.
        table: the modality's `durations` or `sizes`.
    """
    for step in values["augment"][side]:
        if step["name"] in table:
            before = _step(table, step, {"rate": values["frontend"].get("rate")})(before)
    return before


def build_dataset(
    recipe: Recipe, config: Config, encoder: Encoder | Encoders, manifest: Manifest, *, side: Literal["train", "eval"]
) -> ManifestDataset:
    """The clips of a manifest as an objective wants them; `side` chooses the augmentations.

    A row may lack a modality where there are more than two: those that it has still make a pair.

    Raises:
        RecipeError: a setting outside its range, or pictures of several sizes that are to lie in one batch.
        ValueError: a row that names no file of the modality.
    """
    own = members(recipe.values)
    frontends = {name: (encoder if isinstance(encoder, Encoder) else encoder[name]).frontend for name in own}
    data = recipe.placed(lambda: DataSettings(**recipe.values["data"]))
    steps = {name: values["augment"][side] for name, values in own.items()}
    if data.cache and any(build_span(steps[name], name, frontend) for name, frontend in frontends.items()):
        raise recipe.error(
            "data.cache",
            f"data.cache=true would keep one span of each clip, and augment.{side} draws another each time",
        )
    same = config["objective"].get("same")
    if same is not None and len(manifest) and same not in (first := manifest[0]):
        raise recipe.error(
            "objective.same",
            f"objective.same={same}: {manifest.place(0)} has no {same!r}, only {', '.join(sorted(first))}; name a key "
            "that rows of the same kind agree in, such as text, or null where every other row is another",
        )
    # copies without weights: what is sent to loader workers must not lie on a GPU
    bare = {name: copy.deepcopy(frontend).to("meta") for name, frontend in frontends.items()}
    fits = {name: partial(_fits, frontend, _view_check(config["objective"], name)) for name, frontend in bare.items()}
    dataset = clips_of(
        manifest,
        frontends,
        steps,
        fits={name: partial(check, None) for name, check in fits.items()},
        optional=list(own) if len(own) > 2 else (),
        label=labeler(config),
        units=unit_sets(config["objective"]),
        seed=recipe.values["trainer"]["seed"],
        on_bad_clip=data.on_bad_clip,
        max_bad_share=data.max_bad_share,
        cache=data.cache,
        draws=side == "train",
    )
    timed = [name for name in own if dataset.rates[name] is not None]
    whole = [name for name in timed if name not in dataset.spans]
    if whole and len(whole) < len(timed):
        place = "augment" if len(own) == 1 else f"modality.{whole[0]}.augment"
        raise recipe.error(
            place,
            f"{place}.{side}: all of {whole[0]} is read, and of {' and '.join(set(timed) - set(whole))} a span, so "
            "they would not be of the same time; begin it with random_span or center_span",
        )
    if dataset.units:
        _check_units(recipe, dataset)
    for name, frontend in frontends.items():
        if "h" in frontend.axes and data.batch_size != 1 and not _one_size(own[name], side):
            if len(own) == 1:  # heights and widths of a row are those of its only picture
                _check_sizes(recipe, manifest, side)
            dataset.fits[name] = partial(fits[name], _first_size(dataset, name))
    return dataset


def _one_size(values: Config, side: str) -> bool:
    """Whether pictures of whatever size are of the same one after the steps of one side."""
    one, other = _sizes(values, side, [[301, 170], [211, 411]])
    return one == other


def _sizes(values: Config, side: str, before: Sequence[Sequence[int]]) -> list[list[int]]:
    """Heights and widths after the steps of one side."""
    return extents(values, side, MODALITIES[values["modality"]].sizes, np.array(before)).tolist()


def _check_sizes(recipe: Recipe, manifest: Manifest, side: str) -> None:
    """See that the sizes that the rows state come to one.

    Raises:
        RecipeError: they do not.
    """
    first, first_id = None, ""
    for place, row in enumerate(manifest):
        if not all(isinstance(row.get(key), int) for key in ("height", "width")):
            continue
        [size] = _sizes(recipe.values, side, [[row["height"], row["width"]]])
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
            found = dataset.read(place, 0).inputs
        except BadClip:
            continue
        if modality in found:
            return tuple(found[modality].shape[-2:])
    return None


def _view_check(objective: Config, name: str) -> Callable[[Raw, Frontend], None] | None:
    """What says whether a clip of one modality has the views that an objective compares; None where every clip has."""
    own = (objective.get("of") or {}).get(name, objective)
    views = own.get("views") or (own.get("self_supervised") or {}).get(name)
    return None if views is None else MODALITIES[name].view_checks.get(views)


def _fits(
    frontend: Frontend,
    view_check: Callable[[Raw, Frontend], None] | None,
    size: tuple[int, ...] | None,
    raw: Raw,
) -> None:
    """Raises ValueError where a clip is none for the frontend or the views, or its pictures are of another size."""
    frontend.lengths(raw)
    if view_check is not None:
        view_check(raw, frontend)
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
    data, training = recipe.placed(lambda: DataSettings(**recipe.values["data"])), side == "train"
    # pictures have no length, and captions are short; neither states seconds
    timed = {
        name: own for name, own in members(recipe.values).items() if MODALITIES[name].media not in ("image", "text")
    }
    by_length = bool(timed) and (data.bucket or data.max_seconds is not None)
    if data.batch_size is None and (data.max_seconds is None or not by_length):
        raise recipe.error(
            "data", "micro-batches have no bound: set data.batch_size, or data.max_seconds for sound and video"
        )
    lengths = np.ones(len(manifest), np.float32)
    if by_length:
        stated = manifest.lengths({MODALITIES[name].media for name in timed})
        each = [extents(own, side, MODALITIES[name].durations, stated) for name, own in timed.items()]
        lengths = np.stack(each).max(0)
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


def cut_captions(manifest: Manifest, encoder: Encoder | Encoders) -> str:
    """How many captions of a manifest are longer than their context, in a sentence; empty where none is."""
    each = [encoder] if isinstance(encoder, Encoder) else [encoder[name] for name in encoder]
    tokenizers = (one.frontend.reader_settings.get("tokenizer") for one in each)
    tokenizer = next((found for found in tokenizers if found is not None), None)
    if tokenizer is None:
        return ""
    cut, seen = tokenizer.count_cut((text for row in manifest for text in captions_of(row)), most=COUNTED)
    if not cut:
        return ""
    which = f"{seen} captions" if seen < COUNTED else f"the first {seen} captions"
    return f"{manifest.path}: {cut} of {which} are longer than frontend.context={tokenizer.context}, and are cut"


def labeler(config: Config) -> Callable[[dict[str, Any]], Any] | None:
    """Row -> its label as the objective wants it; None where it wants none."""
    key = LABELLED.get(config["objective"]["name"])
    if key is None:
        same = config["objective"].get("same")
        return None if same is None else partial(label_of, same, _digest)
    if key != "label":
        return partial(label_of, key, CharVocabulary(config["vocabulary"]).encode)
    classes = Classes(config["classes"])
    return partial(label_of, key, classes.encode_all if config["objective"].get("multi_label") else classes.encode)


def unit_sets(objective: Config) -> dict[str, list[int]]:
    """Key of a row -> how many codes there are of each label in the label set that it names; empty where none is."""
    sets = {**(objective.get("units") or {}), **(objective.get("topics") or {})}
    return {key: [codes] if isinstance(codes, int) else list(codes) for key, codes in sets.items()}


def _check_units(recipe: Recipe, dataset: ManifestDataset) -> None:
    """See that the first row has its units, and that augmentation leaves every token where its unit is.

    Raises:
        RecipeError: a step moves tokens.
        ValueError: the row's units cannot be read.
    """
    kind, augment = MODALITIES[recipe.values["modality"]], recipe.values["augment"]
    train, held_out = (
        [step for step in augment[side] if step["name"] not in (*kind.spans, "gain", "noise")]
        for side in ("train", "eval")
    )
    moves = next((step["name"] for step in train + held_out if step["name"] in kind.durations), None)
    if moves is not None or train != held_out:
        what = moves or " and ".join(step["name"] for step in train + held_out)
        instead = "random_span instead" if kind.spans else "the same steps for train and eval, as units were written"
        raise recipe.error("augment.train", f"augment.train: {what} moves clips away from their units; use {instead}")
    row = dataset.manifest[0]
    try:
        for key, codes in dataset.units.items():
            if key not in row:
                raise ValueError(
                    f"no {key!r}; the row has {', '.join(sorted(row))}, and `mmssl units` writes such keys"
                )
            read_units(row[key], codes)
    except ValueError as error:
        raise ValueError(f"{dataset.manifest.place(0)}: {error}") from None


def check_labels(label: Callable[[dict[str, Any]], Any], manifest: Manifest) -> None:
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


def _digest(value: Any) -> int:
    """A whole number for a value of a row: equal for equal values, and hardly ever for others."""
    text = json.dumps(value, sort_keys=True)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def label_of(key: str, encode: Callable[[Any], Any], row: dict[str, Any]) -> Any:
    """What stands at a key of a row, encoded.

    Raises:
        ValueError: the row has no such key, or `encode` does not know its value.
    """
    if key not in row:
        raise ValueError(f"the row has no {key!r}, which this objective learns from; it has {', '.join(sorted(row))}")
    return encode(row[key])
