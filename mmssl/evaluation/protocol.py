"""Who may see which labels: settings and layer are chosen on validation, and the test set is touched once.

Whatever is fitted (kNN, linear probe) goes through `measure`, so that no evaluation can choose on the test set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmssl.evaluation.score import Score, student, wilson


@dataclass(frozen=True)
class Split:
    """Labelled clips.

    features: (B, E), or one such tensor for each layer.
    labels: (B,) int64, from 0.
    """

    features: Tensor | Mapping[int, Tensor]
    labels: Tensor

    def __post_init__(self) -> None:
        for layer, features in self.layers.items():
            if features.ndim != 2 or len(features) != len(self.labels):
                raise ValueError(
                    f"layer {layer}: features must be one row a label, got {tuple(features.shape)} for "
                    f"{len(self.labels)} labels"
                )

    @property
    def layers(self) -> Mapping[int, Tensor]:
        """Features by layer; -1 where only one was given."""
        return {-1: self.features} if isinstance(self.features, Tensor) else self.features

    def pick(self, places: Tensor) -> Split:
        """The clips at `places`."""
        return Split({layer: x[places] for layer, x in self.layers.items()}, self.labels[places])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Fitted:
    """A classifier that is ready for the test.

    predict: (Q, E) -> (Q,) classes.
    valid_accuracy: of the settings chosen; None where nothing was chosen on validation.
    protocol: its part of the protocol line.
    """

    predict: Callable[[Tensor], Tensor]
    valid_accuracy: float | None
    protocol: str
    details: dict[str, Any] = field(default_factory=dict)


Fit = Callable[[tuple[Tensor, Tensor], "tuple[Tensor, Tensor] | None"], Fitted]


def draw_labels(labels: Tensor, *, per_class: int | None = None, share: float | None = None, seed: int = 0) -> Tensor:
    """Places of a random few labels of every class, ascending.

    Args:
        labels: (B,) classes.
        per_class: labels of each class.
        share: of each class's labels, 0 to 1, rounded, at least one.
        seed: another seed, another draw; the same seed, the same draw.

    Raises:
        ValueError: both or neither is given, or a class has fewer labels than asked for.
    """
    if (per_class is None) == (share is None):
        raise ValueError(f"give either labels per class or their share, got {per_class} and {share}")
    rng = np.random.default_rng(seed)
    chosen = []
    for label in labels.unique().tolist():
        places = torch.nonzero(labels == label)[:, 0].numpy()
        wanted = per_class if per_class is not None else max(1, round(len(places) * (share or 0.0)))
        if not 1 <= wanted <= len(places):
            raise ValueError(f"class {label} has {len(places)} labels, and {wanted} were asked for")
        chosen.append(rng.permutation(places)[:wanted])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def hold_out(labels: Tensor, *, share: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Places of the clips to fit on and of those to choose on, the same share of every class."""
    held = draw_labels(labels, share=share, seed=seed)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[held] = False
    if not rest.any():
        raise ValueError(f"{len(labels)} training clips are too few to set some aside; give validation clips")
    return torch.nonzero(rest)[:, 0], held


def measure(
    fit: Fit,
    train: Split,
    valid: Split | None,
    test: Split,
    *,
    task: str,
    per_class: int | None = None,
    share: float | None = None,
    draws: int = 5,
    note: str = "",
) -> Score:
    """Fit on train, choose layer and settings on validation, touch the test set once.

    Args:
        fit: such as `fit_knn` or `fit_linear`, their settings bound.
        train, valid, test: with the same layers each. Where there are several, the one of highest validation accuracy
            is kept, of equal ones the lowest.
        task: name of the score.
        per_class, share: fit on a few labels of every class only, drawn `draws` times; the whole procedure is
            repeated for every draw, the choice of layer included. Validation keeps all its labels.
        note: end of the protocol line: what the features are.

    Raises:
        ValueError: several layers and no validation clips, or labels that training does not know.
    """
    if len(test) == 0 or len(train) == 0:
        raise ValueError(f"{task}: nothing to measure with {len(train)} training and {len(test)} test clips")
    if len(train.layers) > 1 and valid is None:
        raise ValueError(f"{task}: to choose among {len(train.layers)} layers takes validation clips")
    unknown = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if unknown:
        raise ValueError(f"{task}: the test set has classes that training has not: {unknown[:5]}")

    few = per_class is not None or share is not None
    n_draws = draws if few else 1
    values, details, protocol = [], [], ""
    for seed in range(n_draws):
        part = train.pick(draw_labels(train.labels, per_class=per_class, share=share, seed=seed)) if few else train
        fitted, by_layer = {}, {}
        for layer in sorted(train.layers):
            known = None if valid is None else (valid.layers[layer], valid.labels)
            fitted[layer] = fit((part.layers[layer], part.labels), known)
            by_layer[layer] = fitted[layer].valid_accuracy
        best = max(sorted(fitted), key=lambda layer: fitted[layer].valid_accuracy or 0.0)
        predictions = fitted[best].predict(test.layers[best])
        values.append(float((predictions == test.labels.to(predictions.device)).double().mean()))
        details.append({**fitted[best].details, "layer": best, "valid": by_layer, "n_train": len(part)})
        protocol = fitted[best].protocol

    if len(train.layers) > 1:
        kept = sorted({detail["layer"] for detail in details})
        protocol += f"; layer {' or '.join(map(str, kept))} of {len(train.layers)}, on validation"
    labels = f"{per_class} labels a class" if per_class is not None else f"{100 * (share or 0):g} % of the labels"
    protocol += f"; {labels}, {n_draws} draws" if few else f"; {len(train):,} labels"
    protocol += "; test touched once" if n_draws == 1 else "; test touched once a draw"
    if note:
        protocol += f"; {note}"
    value = float(np.mean(values))
    if n_draws > 1:
        low, high = student(values)
        protocol += "; interval over draws of labels, not of test clips"
        return Score(
            task, value, max(0.0, low), min(1.0, high), len(test), protocol,
            deviation=float(np.std(values, ddof=1)), details={"values": values, "draws": details},
        )  # fmt: skip
    low, high = wilson(value * len(test), len(test))
    return Score(task, value, low, high, len(test), protocol, details=details[0])
