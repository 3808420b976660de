"""Who may see which labels: settings and layer are chosen on validation, and the test set is touched once.

Whatever is fitted (kNN, linear probe) goes through `measure`, so that no evaluation can choose on the test set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmssl.evaluation.score import Score, student, wilson


@dataclass(frozen=True)
class Ragged:
    """The tokens of clips, of each as many as it has: (N, D) tensors. Rows are picked as of a tensor."""

    clips: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, places: Tensor) -> Ragged:
        return Ragged([self.clips[place] for place in torch.arange(len(self))[places].tolist()])


Known = tuple[Tensor, Tensor]  # (B, E) features and their (B,) labels
RaggedKnown = tuple[Ragged, Tensor]
Folds = Sequence[tuple[Tensor, Tensor]]  # places to fit on, and places to choose on


@dataclass(frozen=True)
class Split:
    """Labelled clips.

    features: (B, E), or all tokens of each clip; or one such for each layer.
    labels: (B,) int64, from 0.
    groups: (B,) int64, such as speakers, to be left out one after the other where something is chosen.
    names: what each class is called, where that is known.
    """

    features: Tensor | Ragged | Mapping[Any, Any]
    labels: Tensor
    groups: Tensor | None = None
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for layer, features in self.layers.items():
            shape = (len(features), "tokens") if isinstance(features, Ragged) else tuple(features.shape)
            if len(shape) != 2 or shape[0] != len(self.labels):
                raise ValueError(
                    f"layer {layer}: features must be one row a label, got {shape} for {len(self.labels)} labels"
                )

    @property
    def layers(self) -> Mapping[Any, Any]:
        """Features by layer; -1 where only one was given."""
        return self.features if isinstance(self.features, Mapping) else {-1: self.features}

    def pick(self, places: Tensor) -> Split:
        """The clips at `places`."""
        features = {layer: x[places] for layer, x in self.layers.items()}
        groups = None if self.groups is None else self.groups[places]
        return replace(self, features=features, labels=self.labels[places], groups=groups)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Fitted:
    """A classifier that is ready for the test.

    predict: (Q, E), or what it was fitted on, -> (Q,) classes.
    valid_accuracy: of the settings chosen, where they were chosen; the mean over folds. None where nothing was.
    protocol: its part of the protocol line.
    vectors: (Q, E) -> (Q, P) what the classifier makes of features before it tells classes; None where that is nothing.
    adapt: features without labels -> the classifier, standardized as they are; None where nothing is standardized.
    """

    predict: Callable[[Any], Tensor]
    valid_accuracy: float | None
    protocol: str
    details: dict[str, Any] = field(default_factory=dict)
    adapt: Callable[[Any], Callable[[Any], Tensor]] | None = None
    vectors: Callable[[Any], Tensor] | None = None


def accuracy(found: Tensor, labels: Tensor) -> float:
    """The share of classes found that are right."""
    return float((found == labels.to(found.device)).double().mean())


def balanced_accuracy(found: Tensor, labels: Tensor) -> float:
    """The share of classes found that are right, each class of `labels` counting the same.

    Source: Brodersen et al. 2010, "The balanced accuracy and its posterior distribution"; for two classes or more it is
        scikit-learn's `balanced_accuracy_score`.
    """
    right = (found == labels.to(found.device)).double().cpu()
    return float(torch.stack([right[labels == name].mean() for name in labels.unique()]).mean())


def said_balanced(balanced: float, labels: Tensor) -> str:
    """The part of a protocol line where the largest class has a fourth more clips than the smallest, else nothing."""
    _, counts = labels.unique(return_counts=True)
    if int(counts.max()) < 1.25 * int(counts.min()):
        return ""
    return f"; each class counting the same {100 * balanced:.1f} %"


class Fit(Protocol):
    """Such as `fit_knn`, `fit_attentive`: settings are chosen on `valid` or by `folds` of train, then it is fitted."""

    def __call__(self, train: Any, valid: Any = None, folds: Folds | None = None) -> Fitted: ...


K = TypeVar("K", Known, RaggedKnown)


def choices_on(train: K, valid: K | None, folds: Folds | None) -> tuple[list[tuple[K, K]], str]:
    """The pairs to fit and to choose on, and how to call that in a protocol line.

    Raises:
        ValueError: both validation clips and folds.
    """
    if valid is not None and folds is not None:
        raise ValueError("settings are chosen on validation clips or by leaving out groups of training, not on both")
    if folds is None:
        return ([] if valid is None else [(train, valid)]), "on validation"
    (x, y) = train
    pairs: Any = [((x[fitted], y[fitted]), (x[held], y[held])) for fitted, held in folds]
    return pairs, f"leaving out each of {len(folds)} groups in turn"


def leave_out(groups: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each group in turn to choose on, and all others to fit on.

    Raises:
        ValueError: there is only one group.
    """
    names = groups.unique()
    if len(names) < 2:
        raise ValueError(f"leaving out groups takes at least two of them, got {len(names)}")
    return [(torch.nonzero(groups != name)[:, 0], torch.nonzero(groups == name)[:, 0]) for name in names]


def draw_labels(
    labels: Tensor,
    *,
    per_class: int | None = None,
    share: float | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Places of a random few labels of every class, ascending.

    Args:
        labels: (B,) classes.
        per_class: labels of each class.
        share: of each class's labels, 0 to 1, rounded, at least one.
        seed: another seed, another draw; the same seed, the same draw.
        names: what each class is called, for the error.

    Raises:
        ValueError: both or neither is given, a share beyond 0 to 1, or a class with fewer labels than asked for.
    """
    if (per_class is None) == (share is None):
        raise ValueError(f"give either labels per class or their share, got {per_class} and {share}")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share of the labels: above 0 and at most 1, got {share:g}")
    rng = np.random.default_rng(seed)
    chosen = []
    for label in labels.unique().tolist():
        places = torch.nonzero(labels == label)[:, 0].numpy()
        wanted = per_class if per_class is not None else max(1, round(len(places) * (share or 0.0)))
        if not 1 <= wanted <= len(places):
            raise ValueError(f"class {_called(label, names)} has {len(places)} labels, and {wanted} were asked for")
        chosen.append(rng.permutation(places)[:wanted])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def _called(label: int, names: Sequence[str] | None) -> str:
    """A class as a message names it."""
    return str(label) if names is None else repr(names[label])


def hold_out(labels: Tensor, *, share: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Places of the clips to fit on and of those to choose on, the same share of every class of two clips or more."""
    classes, counts = labels.unique(return_counts=True)
    several = torch.nonzero(torch.isin(labels, classes[counts > 1]))[:, 0]
    if not len(several):
        raise ValueError(f"{len(labels)} training clips are too few to set some aside; give validation clips")
    held = several[draw_labels(labels[several], share=share, seed=seed)]
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[held] = False
    if not rest.any():
        raise ValueError(f"{len(labels)} training clips are too few to set some aside; give validation clips")
    return torch.nonzero(rest)[:, 0], held


def choose(fit: Fit, train: Split, valid: Split | None) -> tuple[int, dict[int, Fitted]]:
    """Fit on each layer, and name the one of highest validation accuracy, of equal ones the lowest; see `measure`."""
    fitted = {}
    for layer in sorted(train.layers, key=_numbers_first):
        known = None if valid is None else (valid.layers[layer], valid.labels)
        folds = None if train.groups is None else leave_out(train.groups)
        fitted[layer] = fit((train.layers[layer], train.labels), known, folds)
    return max(fitted, key=lambda layer: fitted[layer].valid_accuracy or 0.0), fitted


def _numbers_first(layer: object) -> tuple[bool, object]:
    """What puts layers in order, sums of several by weights at the end."""
    return not isinstance(layer, int), layer


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
        fit: such as `fit_knn`, `fit_linear` or `fit_attentive`, their settings bound.
        train, valid, test: with the same layers each. Where there are several, the one of highest validation accuracy
            is kept, of equal ones the lowest. Where train has groups, they are left out one after the other in place
            of validation: a handful of speakers is too few for one of them to speak for the others.
        task: name of the score.
        per_class, share: fit on a few labels of every class only, drawn `draws` times; the whole procedure is
            repeated for every draw, the choice of layer included. Validation keeps all its labels.
        note: end of the protocol line: what the features are.

    Raises:
        ValueError: several layers and no validation clips, none that could be read, no draw, or labels that training
            does not know.
    """
    if len(test) == 0 or len(train) == 0:
        raise ValueError(f"{task}: nothing to measure with {len(train)} training and {len(test)} test clips")
    if valid is not None and len(valid) == 0:
        raise ValueError(f"{task}: none of the validation clips is left to choose on; leave them out, or give others")
    if draws < 1:
        raise ValueError(f"{task}: draws={draws}: take at least one draw of labels")
    if len(train.layers) > 1 and valid is None and train.groups is None:
        raise ValueError(f"{task}: to choose among {len(train.layers)} layers takes validation clips")
    unknown = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if unknown:
        called = ", ".join(_called(label, train.names) for label in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ValueError(
            f"{task}: the test set has classes of which training has no clip that could be read: {called}{more}; give "
            "it some, or take theirs out of the test set"
        )

    few = per_class is not None or share is not None
    n_draws = draws if few else 1
    values, balanced, details, protocol = [], [], [], ""
    for seed in range(n_draws):
        part = train
        if few:
            drawn = draw_labels(train.labels, per_class=per_class, share=share, seed=seed, names=train.names)
            part = train.pick(drawn)
        best, fitted = choose(fit, part, valid)
        # of layers that are weighed the name is no number, and no key of JSON either
        by_layer = {
            layer if isinstance(layer, int) else "weighted": found.valid_accuracy for layer, found in fitted.items()
        }
        said = fitted[best].predict(test.layers[best])
        values.append(accuracy(said, test.labels))
        balanced.append(balanced_accuracy(said, test.labels))
        own = {"layer": best, "valid": by_layer, "n_train": len(part), "balanced_accuracy": balanced[-1]}
        details.append({**fitted[best].details, **own})
        protocol = fitted[best].protocol

    if len(train.layers) > 1:
        kept = sorted({detail["layer"] for detail in details}, key=_numbers_first)
        where = "on validation" if train.groups is None else "in the same way"
        protocol += f"; layer {' or '.join(map(str, kept))} of {len(train.layers)}, {where}"
    labels = f"{per_class} labels a class" if per_class is not None else f"{100 * (share or 0):g} % of the labels"
    protocol += f"; {labels}, {n_draws} draws" if few else f"; {len(train):,} labels"
    protocol += "; test touched once" if n_draws == 1 else "; test touched once a draw"
    protocol += said_balanced(float(np.mean(balanced)), test.labels)
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
