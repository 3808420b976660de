"""What `mmssl manifest --stats` measures: the constants by which a frontend normalizes clips such as a manifest's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from mmssl.build import build_frontend
from mmssl.data.batching import collate_samples
from mmssl.data.manifest import Manifest
from mmssl.loading import clips_of
from mmssl.modalities import MODALITIES
from mmssl.progress import bar
from mmssl.recipe import load as load_recipe
from mmssl.resolve import resolve
from mmssl.types import BadClip


@dataclass(frozen=True)
class Statistics:
    """Constants of normalization.

    mean, std: of each channel; one of a spectrogram.
    clips, values: how many were measured, values of each channel.
    bad: path -> reason, of the clips that could not be read.
    """

    mean: list[float]
    std: list[float]
    clips: int
    values: int
    bad: dict[str, str]

    def __str__(self) -> str:
        """As settings of a recipe, to be written on the command line."""
        settings = []
        for name, values in (("mean", self.mean), ("std", self.std)):
            numbers = ",".join(f"{value:.6g}" for value in values)
            settings.append(f"frontend.{name}={numbers if len(values) == 1 else f'[{numbers}]'}")
        return " ".join(settings)


def input_statistics(recipe: str | Path, clips: str | Path | Manifest, *, progress: bool = False) -> Statistics:
    """The mean and deviation of what a recipe's frontend normalizes, over the clips of a manifest, one after the other.

    Clips are not augmented; where training reads a span of a video, one span of each is measured.

    Args:
        recipe: a shipped recipe by its name, or a file; its frontend says what is measured, at which rate and how.

    Raises:
        ValueError: this frontend has no such constants, or no clip can be read.
    """
    manifest = clips if isinstance(clips, Manifest) else Manifest(clips)
    resolved = resolve(load_recipe(recipe, [f"data.train={json.dumps(str(manifest.path))}"]))
    name = resolved.values["modality"]
    if not isinstance(name, str) or MODALITIES[name].tokenizers:
        what = name if isinstance(name, str) else " and ".join(name)
        raise ValueError(
            f"{recipe}: is for {what}; constants are measured of one modality, of sound, pictures or video"
        )
    frontend = build_frontend(resolved.values, dim=1)
    # a span is how training reads a video; the other steps augment it
    spans = [step for step in resolved.values["augment"]["train"] if step["name"] in MODALITIES[name].spans]
    dataset = clips_of(manifest, {name: frontend}, {name: spans})
    measured, count, bad = 0, 0, {}
    total = squares = torch.zeros((), dtype=torch.float64)
    with bar("measuring", len(manifest), shown=progress) as advance:
        for place in range(len(manifest)):
            advance(1)
            try:
                raw = collate_samples([dataset.read(place, 0)]).raw
                if int(raw.lengths[0]) < frontend.min_length:
                    raise BadClip(raw.ids[0], f"is shorter than the {frontend.min_length} that one token needs")
            except BadClip as error:
                bad[error.path] = error.reason
                continue
            values = frontend.measured(raw).double()
            measured += 1
            count += len(values)
            total, squares = total + values.sum(0), squares + values.square().sum(0)
    if not measured:
        path, reason = next(iter(bad.items()))
        raise ValueError(f"none of the {len(manifest)} clips can be read; the first is {path} ({reason})")
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return Statistics(mean.tolist(), std.tolist(), measured, count, bad)
