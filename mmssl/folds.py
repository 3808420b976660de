"""Cross-validation: a recipe fine-tuned and tested once for each value of a key of the rows, such as ESC-50's folds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmssl.assemble import finetune
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.data.text import Classes
from mmssl.evaluation.score import Score, student
from mmssl.objectives import LABELLED
from mmssl.recipe import Recipe
from mmssl.resolve import resolve
from mmssl.tasks.evaluate import evaluate


def cross_validate(recipe: Recipe, key: str, out: Path | None = None) -> Iterator[tuple[str, dict[str, Score]]]:
    """Fine-tune on the rows of `data.train` without those of one value of a key, test on those, for each value in turn.

    Nothing is chosen on the rows that are tested on: early stopping takes `data.valid`, clips of its own. Each run has
    the recipe's seed. The same call goes on where it was cut off.

    Args:
        key: of the rows of `data.train`, in which clips that belong together agree: a fold, a speaker.
        out: folder; in it the manifests and the run of each value, by its number. "runs/" and the recipe's name by
            default.

    Yields:
        "key=value" and its scores, then "" and the mean of each score over all values, with its deviation from one to
        the other.

    Raises:
        ValueError: a row without the key, fewer than two values, or several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"folds={key}: folds are trained one by one, in one process; start it without torchrun")
    recipe = resolve(recipe)
    task = recipe.get("objective.name")
    if task not in LABELLED:
        raise recipe.error("objective.name", f"folds={key}: tests what a run says, so take {' or '.join(LABELLED)}")
    manifest = Manifest(recipe.get("data.train"))
    values = np.array([str(value) for value in manifest.values(key)])
    names = Classes.from_labels(values.tolist()).names  # in the order of numbers, where they are some
    if len(names) < 2:
        raise ValueError(f"folds={key}: all rows of {manifest.path} have {names[0]!r}; it takes two or more values")
    out = Path("runs", recipe.name) if out is None else out
    found: list[dict[str, Score]] = []
    for number, name in enumerate(names, start=1):
        parts = {side: out / "manifests" / f"{number}_{side}.jsonl" for side in ("train", "test")}
        for side, path in parts.items():
            write_manifest(path, manifest.select(np.flatnonzero((values == name) == (side == "test"))))
        data = {**recipe.values["data"], "train": str(parts["train"])}
        run = finetune(replace(recipe, values={**recipe.values, "data": data}), out / str(number))
        scores = evaluate(run, task=task, test=parts["test"], device=recipe.get("trainer.device"))
        found.append(scores)
        yield f"{key}={name}", scores
    yield "", {metric: _over([scores[metric] for scores in found], key, names) for metric in found[0]}


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
