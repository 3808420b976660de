"""What `mmssl evaluate` measures of a run on several modalities: retrieval, and classes by their names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mmssl.data.manifest import Manifest, with_content
from mmssl.embed import Embedder
from mmssl.evaluation.retrieval import PLACES, nearest_class, partner_ranks, recall_by_chance
from mmssl.evaluation.score import Score, wilson
from mmssl.modalities import MODALITIES


def retrieval(embedder: Embedder, test: Manifest, *, same: str | None = None, **settings: Any) -> dict[str, Score]:
    """How often the partner of a clip is among the 1, 5 and 10 most similar ones, of each modality to each other.

    Source: recall as in Karpathy and Fei-Fei 2015 (arXiv:1412.2306), section 4.1, and the median rank beside it.
        Ties count against the model.

    Args:
        test: rows that have several of the modalities; each pair of them is measured on the rows that have both.
        same: key of a row, such as "text" or "label": members of all rows with the same value are right, and the
            nearest of them counts. None where a row's own partner alone is.
        settings: see `Embedder.embed`.

    Returns:
        "image_to_text_at_1" and so on; the median rank is in each one's details.

    Raises:
        ValueError: an encoder of one modality only, rows that have no two of them, or one without the key.
    """
    several(embedder, "retrieval")
    scores: dict[str, Score] = {}
    for pair in combinations(embedder.modalities, 2):
        rows = test.having([MODALITIES[name].media for name in pair])
        if not len(rows):
            continue
        vectors = [_embedded(embedder, rows, name, settings) for name in pair]
        read = torch.isfinite(torch.cat(vectors, 1)).all(1)
        if not read.any():
            raise ValueError(f"{test.path}: no row has both {' and '.join(pair)} that can be read")
        skipped, n = int((~read).sum()), int(read.sum())
        ids = (torch.arange(len(rows)) if same is None else _numbered(rows, same))[read]
        _, inverse, counts = ids.unique(return_inverse=True, return_counts=True)
        right = counts[inverse]
        finds = f"its own partner among {n:,}"
        if same is not None:
            least, most = int(right.min()), int(right.max())
            many = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            finds = f"one that agrees in {same!r} among {n:,}, of which {many} do"
        for here, there in ((0, 1), (1, 0)):
            ranks = partner_ranks(vectors[here][read], vectors[there][read], ids)
            median = float(ranks.double().quantile(0.5))
            what = f"{pair[here]} to {pair[there]}"
            for place in PLACES:
                found = int((ranks <= place).sum())
                low, high = wilson(found, n)
                chance = recall_by_chance(place, right)
                protocol = (
                    f"each of {n:,} clips finds {finds}, ties against the model; chance {100 * chance:.3g} %; median "
                    f"rank {median:g}; {embedder.name}"
                )
                protocol += f"; {skipped} clips could not be read" if skipped else ""
                scores[f"{what.replace(' ', '_')}_at_{place}"] = Score(
                    "retrieval",
                    found / n,
                    low,
                    high,
                    n,
                    protocol,
                    metric=f"R@{place} {what}",
                    details={"median_rank": median, "chance": chance, "same": same, "encoder": embedder.name},
                )
    if not scores:
        raise ValueError(
            f"{test.path}: no row has two of {', '.join(embedder.modalities)}, and retrieval goes between them"
        )
    return scores


def zero_shot(
    embedder: Embedder,
    test: Manifest,
    *,
    classes: str | Path,
    modality: str | None = None,
    label: str = "label",
    **settings: Any,
) -> dict[str, Score]:
    """How often a clip is nearest to the name of its class.

    Source: Radford et al. 2021 (arXiv:2103.00020), section 3.1.

    Args:
        classes: see `read_prompts`.
        modality: of the clips; may be left out where the run has one beside text.
        label: the key of a row that holds its class.
        settings: see `Embedder.embed`.

    Raises:
        ValueError: a run without text or of it alone, a file that cannot be used, or a label that it does not have.
    """
    several(embedder, "zero-shot")
    others = [name for name in embedder.modalities if name != "text"]
    if len(others) == len(embedder.modalities):
        raise ValueError(f"task=zero-shot: {embedder.name} is of {' and '.join(others)}, and classes are told by text")
    if modality is None and len(others) > 1:
        raise ValueError(f"task=zero-shot: say whether the clips are {' or '.join(others)}, by modality (--modality)")
    modality = others[0] if modality is None else modality
    prompts = read_prompts(classes)
    names = list(prompts)
    truth = []
    for place, value in enumerate(test.values(label)):
        if str(value) not in prompts:
            raise ValueError(f"{test.place(place)}: the label {value!r} is no class of {classes}")
        truth.append(names.index(str(value)))
    texts = [prompt for own in prompts.values() for prompt in own]
    owners = torch.tensor([number for number, own in enumerate(prompts.values()) for _ in own])
    directions = embedder.embed(texts, modality="text", tokens=False).scene
    vectors = _embedded(embedder, test, modality, settings)
    read = torch.isfinite(vectors).all(1)
    right = nearest_class(vectors[read], directions, owners) == torch.tensor(truth)[read]
    n, correct, skipped = len(right), int(right.sum()), int((~read).sum())
    low, high = wilson(correct, n)
    protocol = (
        f"the nearest of {len(names)} classes by {len(texts)} prompts of {classes}, nothing fitted; {embedder.name}"
        + (f"; {skipped} clips could not be read" if skipped else "")
    )
    details = {"encoder": embedder.name, "classes": len(names), "prompts": len(texts)}
    return {"accuracy": Score("zero-shot", correct / n, low, high, n, protocol, details=details)}


def read_prompts(path: str | Path) -> dict[str, list[str]]:
    """Class -> its prompts, of a YAML or JSON file such as

    templates: ["{}", "a drawing of {}"]
    classes: {Flags: [flag, flag of a country], Symbols: symbol}

    `classes` may be a list too, where each is called as its label is; without `templates` a name is its own prompt.

    Raises:
        ValueError: the file cannot be read, or says something else.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    form = "write templates: ['a picture of {}'] and classes: {LABEL: [name, ...]}"
    if not isinstance(found, Mapping) or not found.get("classes") or not found.keys() <= {"templates", "classes"}:
        raise ValueError(f"{path}: names no classes, or more than classes and templates; {form}")
    templates, classes = found.get("templates") or ["{}"], found["classes"]
    if not isinstance(classes, Mapping):
        classes = {name: name for name in classes}
    named = {label: own if isinstance(own, list) else [own] for label, own in classes.items()}
    for text in [*templates, *named, *(name for own in named.values() for name in own)]:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}: {text!r} is no text; write it in quotes")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"{path}: the template {template!r} must hold one {{}}, where the name goes")
    if len(named) < 2 or not all(named.values()):
        raise ValueError(f"{path}: there must be two classes at least, each with a name; {form}")
    return {label: [t.replace("{}", name) for name in own for t in templates] for label, own in named.items()}


def several(embedder: Embedder, task: str) -> None:
    """Raises ValueError where an encoder is of one modality only, or of several that share no space."""
    if len(embedder.modalities) < 2:
        raise ValueError(
            f"task={task}: {embedder.name} is of {embedder.modalities[0]} alone; give a run on several modalities"
        )
    if not embedder.shares_space:
        raise ValueError(
            f"task={task}: the modalities of {embedder.name} share no space, in which one is found by another; give a "
            "run on pairs, such as one of clip or cav_mae"
        )


def _numbered(rows: Manifest, key: str) -> Tensor:
    """(rows,) int64, equal for rows that agree in a key; of several texts the first counts, which is the one read."""
    known: dict[str, int] = {}
    values = ((with_content(value) or [value])[0] if key == "text" else value for value in rows.values(key))
    return torch.tensor([known.setdefault(json.dumps(value, sort_keys=True), len(known)) for value in values])


def _embedded(embedder: Embedder, rows: Manifest, modality: str, settings: Mapping[str, Any]) -> Tensor:
    return embedder.embed(rows, modality=modality, tokens=False, **settings).scene
