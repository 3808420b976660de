"""Cross-validation: a recipe fine-tuned and tested once for each value of a key of the rows, such as ESC-50's folds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.assemble import finetune
from mmssl.data.manifest import MEDIA, Manifest, write_manifest
from mmssl.data.text import Classes
from mmssl.evaluation.score import Score, student
from mmssl.objectives import LABELLED
from mmssl.recipe import Recipe
from mmssl.resolve import resolve
from mmssl.tasks.evaluate import evaluate


def cross_validate(recipe: Recipe, key: str, out: Path | None = None) -> Iterator[tuple[str, dict[str, Score]]]:
    """Fine-tune on the rows of `data.train` without those of one value of a key, test on those, for each value in turn.

    Nothing is chosen on the rows that are tested on: early stopping takes `data.valid`, clips of its own. Each run has
    the recipe's seed. The same call goes on where it was cut off. Clips that cannot be read follow `data.on_bad_clip`
    in the test too.

    What the encoder was pretrained on is not seen from here: where that was clips of the rows too, pretrain one encoder
    for each value, on the rows of all others, and name them by the value: `init: runs/mae_{fold}` for the key "fold".

    Args:
        key: of the rows of `data.train`, in which clips that belong together agree: a fold, a speaker.
        out: folder; in it the manifests and the run of each value, by its number. "runs/" and the recipe's name by
            default.

    Yields:
        "key=value" and its scores, then "" and the mean of each score over all values, with its deviation from one to
        the other.

    Raises:
        ValueError: a row without the key, fewer than two values, several processes, a value without its folder of
            `init`, a class that only one value has, a `data.valid` with clips of `data.train` where `trainer.best`
            chooses by it, or folds of other rows in `out`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"folds={key}: folds are trained one by one, in one process; start it without torchrun")
    given, named = recipe, f"{{{key}}}" in str(recipe.get("init"))
    if named and recipe.get("data.train") is not None:
        recipe = _started(given, key, _names(Manifest(str(given.get("data.train"))).values(key))[0])
    recipe = resolve(recipe)
    task = recipe.get("objective.name")
    if task not in LABELLED:
        raise recipe.error("objective.name", f"folds={key}: tests what a run says, so take {' or '.join(LABELLED)}")
    manifest = Manifest(recipe.get("data.train"))
    values = np.array([str(value) for value in manifest.values(key)])
    names = _names(values)
    if len(names) < 2:
        raise ValueError(f"folds={key}: all rows of {manifest.path} have {names[0]!r}; it takes two or more values")
    if recipe.get("trainer.best") is not None and recipe.get("data.valid") is not None:
        shared = len(_clips(recipe.get("data.train")) & _clips(recipe.get("data.valid")))
        if shared:
            raise recipe.error(
                "data.valid",
                f"folds={key}: {shared} of its clips are in data.train, and trainer.best would choose by clips that "
                "are tested on; give clips that are not, or leave trainer.best out",
            )
    if LABELLED[task] == "label":
        _check_labels(manifest, values, key)
    # each before the first is trained
    recipes = [resolve(_started(given, key, name)) for name in names] if named else [recipe] * len(names)
    out = Path("runs", recipe.name) if out is None else out
    parts: list[dict[str, Path]] = []
    for number, name in enumerate(names, start=1):
        parts.append({side: out / "manifests" / f"{number}_{side}.jsonl" for side in ("train", "test")})
        for side, path in parts[-1].items():
            _write_part(path, manifest.select(np.flatnonzero((values == name) == (side == "test"))), key)
    found: list[dict[str, Score]] = []
    for number, (name, part, recipe) in enumerate(zip(names, parts, recipes, strict=True), start=1):
        data = {**recipe.values["data"], "train": str(part["train"])}
        run = finetune(replace(recipe, values={**recipe.values, "data": data}), out / str(number))
        scores = evaluate(
            run,
            task=task,
            test=part["test"],
            device=recipe.get("trainer.device"),
            on_bad_clip=recipe.get("data.on_bad_clip"),
        )
        found.append(scores)
        yield f"{key}={name}", scores
    yield "", {metric: _over([scores[metric] for scores in found], key, names) for metric in found[0]}


def _names(values: Iterable[Any]) -> list[str]:
    """The values of a key, in the order of numbers where they are some."""
    return Classes.from_labels([str(value) for value in values]).names


def _check_labels(manifest: Manifest, values: np.ndarray, key: str) -> None:
    """See that each class is learned by the run that is tested on it.

    Raises:
        ValueError: only rows of one value of the key have it.
    """
    first: dict[str, int] = {}  # class -> the place of its first row
    several = set()
    for place, label in enumerate(manifest.values("label")):
        for one in map(str, label if isinstance(label, list) else [label]):
            if values[first.setdefault(one, place)] != values[place]:
                several.add(one)
    for name, place in first.items():
        if name not in several:
            raise ValueError(
                f"{manifest.place(place)}: the label {name!r} is in {key}={values[place]} alone, so no run that is "
                "tested on it has learned it; leave such rows out, or give them several folds"
            )


def _started(recipe: Recipe, key: str, name: str) -> Recipe:
    """The recipe with the `init` of one value.

    Raises:
        RecipeError: there is no such folder.
    """
    init = str(recipe.get("init")).replace(f"{{{key}}}", name)
    if not Path(init).is_dir():
        raise recipe.error(
            "init",
            f"init={init}: no such folder, for {key}={name}; pretrain a run there, on the rows of all other values",
        )
    return replace(recipe, values={**recipe.values, "init": init})


def _clips(path: str | Path) -> set[str]:
    """What tells the clips of a manifest apart: where each lies, as two folders may both have a 1.wav; else its id."""
    found = set()
    for row in Manifest(os.path.abspath(path)):
        place = {key: row[key] for key in MEDIA if key in row}
        place |= {key: row[key] for key in ("offset", "start") if place and key in row}
        found.add(json.dumps(place or row["id"]))
    return found


def _write_part(path: Path, rows: Iterable[Mapping[str, Any]], key: str) -> None:
    """Write a manifest of some folds, or see that it is there: a run beside it was trained on what it says.

    Raises:
        ValueError: it is there with other rows.
    """
    new = path.with_name(path.name + ".new")
    write_manifest(new, rows)
    if not path.exists():
        os.replace(new, path)
        return
    same = path.read_bytes() == new.read_bytes()
    new.unlink()
    if not same:
        raise ValueError(
            f"{path}: holds folds of other clips, or of another key than {key}, and runs beside it may have learned "
            "from what is to be tested now; choose another --out"
        )


def _over(scores: list[Score], key: str, names: list[str]) -> Score:
    """One score of the same score of all folds."""
    values = [score.value for score in scores]
    low, high = student(values)
    return Score(
        task=scores[0].task,
        value=float(np.mean(values)),
        low=low,
        high=high,
        n=sum(score.n for score in scores),
        protocol=(
            f"mean and deviation over {len(values)} folds, each trained on the clips of all others ({key}); interval "
            "by Student's t over folds, which share most of their training clips"
        ),
        metric=scores[0].metric,
        deviation=float(np.std(values, ddof=1)),
        details={"folds": dict(zip(names, values, strict=True))},
        percent=scores[0].percent,
    )
