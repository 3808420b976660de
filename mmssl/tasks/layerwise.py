"""Of the tasks of `mmssl evaluate`: what each layer of an encoder holds, in one pass over the clips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmssl.data.manifest import Manifest
from mmssl.data.text import Classes
from mmssl.embed import Embedder
from mmssl.evaluation.layers import (
    correlation_with_input,
    correlation_with_labels,
    information_by_layer,
    probe_by_layer,
)
from mmssl.evaluation.probe import STRENGTHS, fit_linear
from mmssl.evaluation.protocol import Split
from mmssl.evaluation.score import Score
from mmssl.modalities import MODALITIES
from mmssl.nn.pooling import Pool
from mmssl.tasks.labelled import Clips, fitting_of, labelled, manifest_of, numbers_of
from mmssl.types import Encoded, Raw, Tokens

MOST_TOKENS = 5_000  # that are compared with what was measured, drawn evenly from all clips


def measure_layers(
    embedder: Embedder,
    test: Clips,
    *,
    train: Clips | None = None,
    valid: Clips | None = None,
    by: str | None = None,
    label: str = "label",
    pool: str = "mean",
    strength: float | None = None,
    labels_per_class: int | None = None,
    label_share: float | None = None,
    draws: int = 5,
    **settings: Any,
) -> dict[str, Score]:
    """What each layer holds of what was measured and of the classes.

    Source: Pasad, Chou and Livescu 2021, "Layer-wise analysis of a self-supervised speech representation model"
        (arXiv:2107.04734), section 3.
    Differs from the paper: correlations are those of held-out clips; labels are of whole clips and not of phones or
        words; the mutual information is normalized, with as many clusters as classes.

    Args:
        test: what is measured on; rows with labels where classes are to be told.
        train, valid, by, strength, labels_per_class, label_share, draws: of the linear probes; see `evaluate`.
        label, pool: of clips; tokens are compared with what was measured one by one.
        settings: see `Embedder.embed`.

    Returns:
        {"input", CCA with log-mel energies or pixels, where the modality measures such; "labels", CCA with labels, and
        "information", of k-means clusters about them, where rows have labels; "probe", where there is `train`}. Each
        is that of the best layer, and has all of them in its details.

    Raises:
        ValueError: an encoder without layers, too few clips, or training clips and no labels.
    """
    if not embedder.depth:
        raise ValueError(f"task=layers: {embedder.name} has no layers to compare; leave the baseline out")
    if train is None and any(given is not None for given in (valid, by, strength, labels_per_class, label_share)):
        raise ValueError("task=layers: valid, by, strength and few labels are of probes, which take train; give it")
    manifest = manifest_of(test)
    layers = [-1, *range(embedder.depth + 1)]
    has_labels = len(manifest) > 0 and label in manifest[0]
    if train is not None and not has_labels:
        raise ValueError(f"task=layers: probes need a {label!r} in the rows of test; leave train out, or give labels")
    scenes, tokens, reference, owners = _one_pass(embedder, manifest, layers, pool, settings)
    read = torch.isfinite(scenes[-1]).all(1)
    known = {layer: x[read] for layer, x in scenes.items()}
    scores = {}
    if reference is not None:
        name = _measured(embedder)[1]
        scores["input"] = correlation_with_input(tokens, reference, owners, name=name)
    skipped = int((~read).sum())
    if has_labels:
        classes = Classes.from_labels(manifest.values(label))
        numbers = numbers_of(manifest, classes, label)[read]
        scores["labels"] = correlation_with_labels(known, numbers)
        scores["information"] = information_by_layer(known, numbers)
    if train is not None:
        classes = Classes.from_labels(manifest_of(train).values(label))
        few = labels_per_class is not None or label_share is not None

        def collect(clips: Clips, by: str | None) -> tuple[Split, int]:
            return labelled(
                embedder, manifest_of(clips), classes=classes, label=label, by=by, layers=layers, pool=pool, **settings
            )

        given = fitting_of(collect, train, valid, by=by, choose=strength is None, few=few)
        fit = partial(fit_linear, refit=given.refit, strengths=STRENGTHS if strength is None else strength)
        testing = Split(known, numbers_of(manifest, classes, label)[read])
        share: dict[str, Any] = {"per_class": labels_per_class, "share": label_share, "draws": draws}
        scores["probe"] = probe_by_layer(fit, given.train, given.valid, testing, **share)
        scores["probe"] = replace(scores["probe"], protocol=scores["probe"].protocol + given.said)
        skipped += given.skipped
    if not scores:
        raise ValueError(
            f"task=layers: {embedder.modality} measures nothing to compare with, and the rows have no {label!r}"
        )
    note = f"{embedder.name}, pool {pool}" + (f"; {skipped} clips could not be read" if skipped else "")
    extra = {"pool": pool, "encoder": embedder.name, "modality": embedder.modality}
    return {
        name: replace(score, protocol=f"{score.protocol}; {note}", details={**score.details, **extra})
        for name, score in scores.items()
    }


def _measured(embedder: Embedder) -> tuple[Any, str]:
    """What the modality measures, (raw, tokens) -> (B, N, P), and what to call it; (None, "") where it is nothing."""
    kind = MODALITIES[embedder.modality]
    if kind.measured is None:
        return None, ""
    name, called = kind.measured
    return kind.targets[name].values, called


def _one_pass(
    embedder: Embedder, manifest: Manifest, layers: Sequence[int], pool: str, settings: dict[str, Any]
) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor | None, Tensor]:
    """Scenes (B, E) by layer, NaN for a clip that could not be read; and a draw of tokens with what was measured there.

    Returns:
        scenes; tokens (n, D) by layer, what was measured (n, P) or None, and the clip of each token (n,), all ordered
        by clip.
    """
    pooling, (measured, _) = Pool.named(pool), _measured(embedder)
    stride = math.ceil(len(manifest) / MOST_TOKENS)  # of the clips whose tokens are drawn
    each = max(1, MOST_TOKENS // len(manifest))
    scenes: dict[int, Tensor] = {}
    drawn: dict[int, tuple[Tensor, Tensor]] = {}  # clip -> tokens of all layers (layers, n, D), and (n, P)

    def see(places: list[int], raw: Raw, given: Tokens, encoded: Encoded, found: list[Tensor]) -> None:
        for layer, x in zip(layers, found, strict=True):
            pooled = pooling(x, encoded, given).float().cpu()
            scenes.setdefault(layer, torch.full((len(manifest), pooled.shape[1]), torch.nan))[places] = pooled
        if measured is None:
            return
        there = measured(raw, given)
        for row, (place, length) in enumerate(zip(places, given.lengths.tolist(), strict=True)):
            if place % stride == 0:
                # by the clip's place, so that neither batches nor their order change the draw
                rng = np.random.default_rng(place)
                chosen = torch.from_numpy(np.sort(rng.permutation(length)[:each])).to(there.device)
                x = torch.stack([layer[row, encoded.n_prefix + chosen] for layer in found])
                drawn[place] = x.float().cpu(), there[row, chosen].float().cpu()

    embedder.each_batch(manifest, see, layers=layers, **settings)
    if not scenes:
        raise ValueError(f"{manifest.path}: none of the {len(manifest)} clips can be read")
    if not drawn:
        return scenes, {}, None, torch.zeros(0, dtype=torch.int64)
    places = sorted(drawn)
    owners = torch.cat([torch.full((len(drawn[place][1]),), place // stride) for place in places])
    joined = torch.cat([drawn[place][0] for place in places], 1)
    tokens = dict(zip(layers, joined, strict=True))
    return scenes, tokens, torch.cat([drawn[place][1] for place in places]), owners
