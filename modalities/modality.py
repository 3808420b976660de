"""What a modality offers to the rest of the toolkit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from mmssl.types import Frontend, Raw


@dataclass(frozen=True)
class Target:
    """What an objective may reconstruct.

    values: (raw, tokens) -> (B, N, P) float32, aligned with the tokens.
    dim: the P of a frontend.
    learned: whether the values are learned features of the frontend itself.
    pictures: (frontend, tokens, masked, values) -> what to look at, where there is something to see.
    """

    values: Callable[..., Tensor]
    dim: Callable[[Any], int]
    learned: bool = False
    pictures: Callable[..., dict[str, Any]] | None = None


@dataclass(frozen=True)
class Modality:
    """One row of the table `MODALITIES`.

    media: the manifest key that names its files: speech and sound are both "audio"; or holds what it reads: "text".
    suffixes: of the files that `mmssl manifest` looks for.
    frontends, augments, targets: what a recipe may name.
    durations: of the augmentations and spans that change how long a clip is: (clips,) seconds, and their settings ->
        the same afterwards, at most.
    cuts: of the augmentations that leave the same part of a clip every time: (units along time, and their settings) ->
        those that stay.
    sizes: of the augmentations that change how large a picture is: (clips, 2) height and width, and their settings ->
        the same afterwards.
    read: (source, **frontend.reader_settings) -> the raw clip.
    probe: source -> what a manifest row says of a file; "remark", where there is one, is for the user instead. None
        where there is no file.
    hints: keys of that which `read` takes too.
    spans: what a recipe may name as the first of its augmentations, to be read instead of the whole clip:
        (seconds, generator, **settings) -> (start, duration).
    views: two views of each clip, for an objective that compares them: (raw, frontend) -> (seen, to be told from it).
    view_checks: of the views that not every clip has: (raw, frontend), a ValueError where a clip has none, so that it
        is a bad clip where it is read.
    tokenizers: what a recipe may name to make tokens of what is read: (texts, **settings) -> JSON, which its frontends
        take.
    refuses: objective -> why it makes no sense here.
    measured: the one of `targets` that is what was measured itself, and what to call it: what layers of an encoder are
        compared with. None where values are numbers of codes or words.
    corruptions: ways to spoil a clip, to measure with: (x, generator, severity=1 to 5, **settings) -> the same size.
    """

    name: str
    media: str
    suffixes: frozenset[str]
    frontends: dict[str, type[Frontend]]
    read: Callable[..., Tensor]
    probe: Callable[..., dict[str, Any]] | None
    augments: dict[str, Callable[..., Tensor]]
    targets: dict[str, Target]
    durations: dict[str, Callable[..., np.ndarray]] = field(default_factory=dict)
    cuts: dict[str, Callable[..., slice]] = field(default_factory=dict)
    sizes: dict[str, Callable[..., np.ndarray]] = field(default_factory=dict)
    hints: tuple[str, ...] = ()
    spans: dict[str, Callable[..., tuple[float, float]]] = field(default_factory=dict)
    views: dict[str, Callable[[Raw, Frontend], tuple[Raw, Raw]]] = field(default_factory=dict)
    view_checks: dict[str, Callable[[Raw, Frontend], None]] = field(default_factory=dict)
    tokenizers: dict[str, Callable[..., str]] = field(default_factory=dict)
    refuses: dict[str, str] = field(default_factory=dict)
    measured: tuple[str, str] | None = None
    corruptions: dict[str, Callable[..., Tensor]] = field(default_factory=dict)


def at_severity(values: Sequence[float], severity: int) -> float:
    """The value of a severity, which counts from 1.

    Raises:
        ValueError: there is no such severity.
    """
    if not 1 <= severity <= len(values):
        raise ValueError(f"severity={severity}: must be from 1 to {len(values)}")
    return values[severity - 1]
