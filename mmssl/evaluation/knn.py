"""Classification by the labels of the nearest training clips: nothing is fitted, so there is little to tune."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmssl.evaluation.protocol import Fitted, Folds, Known, accuracy, choices_on

CHUNK = 2**24  # similarities held at a time: 64 MB


def knn_predict(bank: Tensor, labels: Tensor, queries: Tensor, *, k: int = 20, temperature: float = 0.07) -> Tensor:
    """The class with the heaviest vote among the `k` training clips of highest cosine similarity.

    A neighbor of similarity s votes with exp(s / temperature). Ties: among equally near clips those that come first
    in the bank are neighbors, and among equally heavy classes the lowest number wins.

    Source: Wu et al. 2018 (arXiv:1805.01978), section 3.4; k and temperature as in DINO (arXiv:2104.14294).

    Args:
        bank: (B, E) training features.
        labels: (B,) their classes, from 0.
        queries: (Q, E) features to classify.
        k: neighbors; all of the bank where it holds fewer.
        temperature: the smaller, the more the nearest alone decides.

    Returns:
        (Q,) int64 classes.

    Raises:
        ValueError: features that are not finite, an empty bank, or sizes that do not fit.
    """
    if len(bank) != len(labels) or bank.shape[1:] != queries.shape[1:] or len(bank) == 0:
        raise ValueError(
            f"kNN: the bank is {tuple(bank.shape)} with {len(labels)} labels and the queries are "
            f"{tuple(queries.shape)}; it needs one label a row, one width, and at least one row"
        )
    if k < 1 or temperature <= 0:
        raise ValueError(f"kNN: k must be at least 1 and the temperature above 0, got k = {k} and {temperature}")
    for name, features in (("bank", bank), ("queries", queries)):
        if not torch.isfinite(features).all():
            raise ValueError(f"kNN: the {name} holds values that are not finite; leave out the clips they belong to")
    k = min(k, len(bank))
    directions = normalize(bank.float(), dim=1).T
    n_classes = int(labels.max()) + 1
    predictions = []
    for part in queries.split(max(1, CHUNK // len(bank))):
        similarity = normalize(part.float(), dim=1) @ directions
        votes, neighbors = _nearest(similarity, k)
        # relative to the nearest, so that no temperature overflows; float64, so that equal votes add up equally
        weight = ((votes - votes[:, :1]).double() / temperature).exp()
        heap = torch.zeros(len(part), n_classes, dtype=torch.float64, device=part.device)
        heap.scatter_add_(1, labels.to(part.device)[neighbors], weight)
        predictions.append(heap.argmax(1))
    return torch.cat(predictions) if predictions else torch.zeros(0, dtype=torch.int64)


def _nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their places; of equal ones the first."""
    values, places = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    if values.shape[1] > k:
        # topk leaves open which of several equal values it returns: rows with a tie at the border are sorted in full
        tied = values[:, k - 1] == values[:, k]
        if tied.any():
            ordered, order = similarity[tied].sort(dim=1, descending=True, stable=True)
            values[tied], places[tied] = ordered[:, : k + 1], order[:, : k + 1]
    return values[:, :k], places[:, :k]


def fit_knn(
    train: Known,
    valid: Known | None = None,
    folds: Folds | None = None,
    *,
    k: int | Sequence[int] = 20,
    temperature: float = 0.07,
    refit: Literal["train", "train+valid"] = "train",
) -> Fitted:
    """A nearest-neighbor classifier; of several `k` the best on validation is kept, of equal ones the smallest.

    Args:
        folds: of train, in place of `valid`.
        refit: "train+valid" adds the validation clips to the bank, once k is chosen.

    Raises:
        ValueError: no `k`, one below 1, or several and no validation clips to choose on.
    """
    choices = [k] if isinstance(k, int) else sorted(k)
    if not choices or choices[0] < 1:
        raise ValueError(f"kNN: k={k}: give one number of neighbors from 1 up, or several")
    pairs, where = choices_on(train, valid, folds)
    if len(choices) > 1 and not pairs:
        raise ValueError(f"kNN: to choose k among {choices} takes validation clips; give some, or one k")

    accuracies: dict[int, float] = {}
    for choice in choices if pairs else []:
        right = [
            accuracy(knn_predict(*bank, queries, k=choice, temperature=temperature), labels)
            for bank, (queries, labels) in pairs
        ]
        accuracies[choice] = sum(right) / len(right)
    best = max(choices, key=lambda choice: accuracies.get(choice, 0.0))
    features, labels = train
    if refit == "train+valid" and valid is not None:
        features, labels = torch.cat([features, valid[0]]), torch.cat([labels, valid[1]])
    used = min(best, len(features))
    how = "" if len(choices) == 1 else f" (of {', '.join(map(str, choices))}, {where})"
    return Fitted(
        predict=lambda queries: knn_predict(features, labels, queries, k=used, temperature=temperature),
        valid_accuracy=accuracies.get(best),
        protocol=f"cosine kNN in {refit}, k = {used}{how}, votes exp(s / {temperature:g})",
        details={"k": used, "temperature": temperature, "refit": refit},
    )
