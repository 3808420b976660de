"""Features of the clips of manifests, with the numbers of their classes: what is fitted and measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmssl.data.manifest import Manifest
from mmssl.data.text import Classes
from mmssl.embed import Embedder, Layer
from mmssl.evaluation.protocol import Ragged, Split, hold_out
from mmssl.types import Encoded, Raw, Tokens

Clips = str | Path | Manifest


def manifest_of(clips: Clips) -> Manifest:
    return clips if isinstance(clips, Manifest) else Manifest(clips)


def numbers_of(manifest: Manifest, classes: Classes, label: str) -> Tensor:
    """(B,) int64: the class of each row.

    Raises:
        ValueError: a row without label, or with one that is no class, by its place in the manifest.
    """
    numbers = []
    for place, name in enumerate(manifest.values(label)):
        try:
            numbers.append(classes.encode(name))
        except ValueError as error:
            raise ValueError(f"{manifest.place(place)}: {error}") from None
    return torch.tensor(numbers)


def groups_of(manifest: Manifest, by: str | None) -> Tensor | None:
    """(B,) int64: rows that agree in the key `by` have the same number; None without a key."""
    if by is None:
        return None
    names = [str(name) for name in manifest.values(by)]
    numbered = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbered[name] for name in names])


def labelled(
    embedder: Embedder,
    manifest: Manifest,
    *,
    classes: Classes,
    label: str = "label",
    by: str | None = None,
    layers: Sequence[Layer] = (-1,),
    pool: str = "mean",
    **settings: Any,
) -> tuple[Split, int]:
    """Scenes of a manifest's clips with the numbers of their classes, and how many clips could not be read.

    Args:
        by: key of the groups of `Split`.
        settings: see `Embedder.embed`.

    Raises:
        ValueError: a row without label, or with one that is no class, by its place in the manifest.
    """
    numbers, groups = numbers_of(manifest, classes, label), groups_of(manifest, by)
    found = embedder.embed(manifest, layer=list(layers), pool=pool, tokens=False, **settings)
    read = torch.isfinite(found[0].scene).all(1)
    features = {layer: one.scene[read] for layer, one in zip(layers, found, strict=True)}
    groups = None if groups is None else groups[read]
    return Split(features, numbers[read], groups, classes.names), int((~read).sum())


def labelled_tokens(
    embedder: Embedder,
    manifest: Manifest,
    *,
    classes: Classes,
    label: str = "label",
    by: str | None = None,
    layers: Sequence[Layer] = (-1,),
    **settings: Any,
) -> tuple[Split, int]:
    """All tokens of a manifest's clips in place of scenes: see `labelled`. They must have room in memory."""
    numbers, groups = numbers_of(manifest, classes, label), groups_of(manifest, by)
    found: dict[int, list[Tensor]] = {}

    def see(places: list[int], raw: Raw, given: Tokens, encoded: Encoded, layers: list[Tensor]) -> None:
        for row, (place, length) in enumerate(zip(places, given.lengths.tolist(), strict=True)):
            # a copy, so that no padding is kept
            own = (x[row, encoded.n_prefix : encoded.n_prefix + length] for x in layers)
            found[place] = [x.float().cpu().clone() for x in own]

    embedder.each_batch(manifest, see, layers=layers, **settings)
    read = torch.tensor(sorted(found), dtype=torch.int64)
    features = {layer: Ragged([found[place][i] for place in read.tolist()]) for i, layer in enumerate(layers)}
    split = Split(features, numbers[read], None if groups is None else groups[read], classes.names)
    return split, len(manifest) - len(read)


@dataclass(frozen=True)
class Fitting:
    """What is fitted on.

    train: and what settings are chosen on: `valid`, or its groups in turn; None where nothing is to be chosen.
    refit: what is fitted on once settings are chosen.
    said: the end of the protocol line about them.
    skipped: clips that could not be read.
    """

    train: Split
    valid: Split | None
    refit: Literal["train", "train+valid"]
    said: str
    skipped: int


def fitting_of(
    collect: Callable[[Clips, str | None], tuple[Split, int]],
    train: Clips,
    valid: Clips | None,
    *,
    by: str | None,
    choose: bool,
    few: bool,
) -> Fitting:
    """The clips to fit and to choose on.

    Args:
        collect: a manifest and the key of its groups -> its clips, and how many could not be read.
        by, valid: where neither is given, a fifth of the training clips is set aside to choose on.
        choose: whether anything is to be chosen.
        few: whether it is to be fitted on few labels, which those set aside are then not added to.

    Raises:
        ValueError: both `by` and `valid`.
    """
    if by is not None and valid is not None:
        raise ValueError(f"by={by}: leaves out parts of train to choose on, so leave valid out; or leave out by")
    fitting, skipped = collect(train, by)
    if valid is not None:
        chosen_on, also = collect(valid, None)
        return Fitting(fitting, chosen_on, "train", "", skipped + also)
    if by is not None:
        return Fitting(fitting, None, "train", f"; groups are {by}", skipped)
    if not choose:
        return Fitting(fitting, None, "train", "", skipped)
    rest, held = hold_out(fitting.labels)
    said = "; validation is a fifth of the training clips"
    refit: Literal["train", "train+valid"] = "train" if few else "train+valid"
    return Fitting(fitting.pick(rest), fitting.pick(held), refit, said, skipped)
