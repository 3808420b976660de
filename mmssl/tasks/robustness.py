"""Of the tasks of `mmssl evaluate`: how much a probe that was fitted on clean clips gets wrong of spoiled ones."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmssl.data.text import Classes
from mmssl.embed import Embedder, Layer
from mmssl.evaluation.probe import STRENGTHS, fit_linear
from mmssl.evaluation.protocol import Split, choose
from mmssl.evaluation.robustness import SEVERITIES, corruption_score
from mmssl.evaluation.score import Score, wilson
from mmssl.modalities import MODALITIES
from mmssl.nn.seeds import seed_of
from mmssl.tasks.labelled import Clips, fitting_of, labelled, manifest_of, numbers_of


def measure_robustness(
    embedder: Embedder,
    test: Clips,
    *,
    train: Clips,
    valid: Clips | None = None,
    by: str | None = None,
    label: str = "label",
    layers: Sequence[Layer] = (-1,),
    pool: str = "mean",
    strength: float | None = None,
    against: str | Path | None = None,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Score]:
    """Errors of a linear probe of clean features on clips that are spoiled in every kind and severity.

    A clip is spoiled as the encoder would get it, after cropping; by its name, so that no other order changes it.

    Source: Hendrycks and Dietterich 2019 (arXiv:1903.12261), section 4; adaptation after Schneider et al. 2020
        (arXiv:2006.16971), section 3.
    Differs from Schneider et al.: what is adapted are the means and deviations by which the probe standardizes its
        features, taken from the spoiled test clips of one kind and severity, all of them and without their labels, in
        the place of those of training. Statistics within the encoder stay as they are.

    Args:
        test, train, valid, by, label, pool, strength: as for the linear probe, see `evaluate`.
        layers: of which the best on validation is taken.
        against: JSON that the same task wrote of another model: see `corruption_error`.
        seed: of what is random in spoiling.
        settings: see `Embedder.embed`.

    Returns:
        {"clean", "mce", "mce_adapted"}, shares of clips told wrongly; relative ones where `against` is given.

    Raises:
        ValueError: a modality without corruptions, or an `against` that holds no such scores.
    """
    kinds = MODALITIES[embedder.modality].corruptions
    if not kinds:
        raise ValueError(f"task=corruption: there is no way to spoil {embedder.modality}; choose another task")
    theirs = None if against is None else _errors(against)
    classes = Classes.from_labels(manifest_of(train).values(label))

    def collect(clips: Clips, by: str | None) -> tuple[Split, int]:
        return labelled(
            embedder, manifest_of(clips), classes=classes, label=label, by=by, layers=layers, pool=pool, **settings
        )

    given = fitting_of(collect, train, valid, by=by, choose=strength is None or len(layers) > 1, few=False)
    fit = partial(fit_linear, refit=given.refit, strengths=STRENGTHS if strength is None else strength)
    layer, fitted = choose(fit, given.train, given.valid)
    adapt = fitted[layer].adapt
    assert adapt is not None

    manifest = manifest_of(test)
    numbers, clips = (
        numbers_of(manifest, classes, label),
        embedder.clips(manifest),
    )

    def features(change: Callable[[Tensor, str], Tensor] | None) -> Tensor:
        given = clips if change is None else clips.changed(change)
        [found] = embedder.embed(given, layer=[layer], pool=pool, tokens=False, **settings)
        return found.scene

    clean = features(None)
    read = torch.isfinite(clean).all(1)
    truth = numbers[read]
    missed = int((fitted[layer].predict(clean[read]) != truth).sum())
    # adapted too, for adaptation also mends what clean test clips differ in from training, such as a new speaker
    missed_adapted = int((adapt(clean[read])(clean[read]) != truth).sum())
    wrong: dict[str, np.ndarray] = {}
    adapted: dict[str, np.ndarray] = {}
    for kind, spoil in kinds.items():
        plain, other = [], []
        for severity in SEVERITIES:
            x = features(_spoiler(spoil, embedder, kind, severity, seed))[read]
            plain.append((fitted[layer].predict(x) != truth).numpy())
            other.append((adapt(x)(x) != truth).numpy())
        wrong[kind], adapted[kind] = np.stack(plain), np.stack(other)

    skipped = given.skipped + int((~read).sum())
    relative = "" if against is None else f", relative to those of {Path(against).name}"
    note = (
        f"{fitted[layer].protocol}; layer {layer}; clean training clips; {embedder.name}, pool {pool}{given.said}"
        + (f"; {skipped} clips could not be read" if skipped else "")
    )
    how = f"mean error over {len(wrong)} kinds ({', '.join(wrong)}) of {len(SEVERITIES)} severities{relative}"
    moved = "the probe's standardization re-estimated on each kind and severity of test clips, without labels"
    n = len(truth)
    low, high = wilson(missed, n)
    scores = {
        "clean": Score("corruption", missed / n, low, high, n, f"clean test clips; {note}", "clean error"),
        "mce": corruption_score(wrong, "mean corruption error", f"{how}; interval over clips; {note}", against=theirs),
        "mce_adapted": corruption_score(
            adapted,
            "mean corruption error, adapted",
            f"{how}; {moved}; interval over clips; {note}",
            against=theirs,
        ),
    }
    extra = {
        "clean": missed / n,
        "clean_adapted": missed_adapted / n,
        "layer": layer,
        "pool": pool,
        "encoder": embedder.name,
    }
    return {name: replace(score, details={**score.details, **extra}) for name, score in scores.items()}


def _spoiler(
    spoil: Callable[..., Tensor], embedder: Embedder, kind: str, severity: int, seed: int
) -> Callable[[Tensor, str], Tensor]:
    """A clip and its name -> the clip spoiled."""
    known = inspect.signature(spoil).parameters
    settings = embedder.encoder.frontend.reader_settings
    given = {name: value for name, value in settings.items() if name in known}

    def change(x: Tensor, name: str) -> Tensor:
        return spoil(x, np.random.default_rng(seed_of(seed, kind, severity, name)), severity=severity, **given)

    return change


def _errors(path: str | Path) -> Mapping[str, Sequence[float]]:
    """The errors of each kind that a file of scores holds.

    Raises:
        ValueError: it holds none.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["mce"]["details"]["errors"]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError):
        raise ValueError(f"against={path}: holds no scores of --task corruption, as --out writes them") from None
    return dict(found)
