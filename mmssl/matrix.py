"""Which objective goes with which modality, found by putting each pair together.

There is no list of pairs that fit: each is assembled as `mmssl pretrain` would, and what its parts say is the answer.
The contract tests train every pair that is not refused here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import Any

from mmssl.assemble import learn_tokenizer
from mmssl.build import build_encoder, build_objective
from mmssl.modalities import MODALITIES
from mmssl.objectives import OBJECTIVES, PAIRED, SEVERAL
from mmssl.recipe import Recipe, load, members, shipped
from mmssl.resolve import resolve

# modality/frontend
SOURCES = tuple(f"{name}/{frontend}" for name, kind in MODALITIES.items() for frontend in kind.frontends)

# those that learn from one modality
ALONE = tuple(name for name in OBJECTIVES if name not in SEVERAL)

# what makes an objective's own parts small, and has nothing to do with whether a pair fits
_SMALL = {
    f"{part}_{size}": n
    for part in ("decoder", "predictor", "regressor")
    for size, n in {"dim": 16, "depth": 1, "heads": 2}.items()
}


def refusal(objective: str, source: str) -> str | None:
    """The sentence that answers who tries an objective over a source; None where they fit.

    Settings that must be given are those of a recipe, and all others the constructors' defaults, of a tiny model; where
    a target or views must be given, any that fit will do.

    Args:
        objective: one of `ALONE`.
        source: one of `SOURCES`.
    """
    modality, frontend = source.split("/")
    own = _recipe_of("objective", objective)
    written = own["objective"]
    parameters = inspect.signature(OBJECTIVES[objective]).parameters
    required = [name for name in written if name in parameters and parameters[name].default is inspect.Parameter.empty]
    small = {"name": objective, **{name: size for name, size in _SMALL.items() if name in parameters}}
    kind = MODALITIES[modality]
    # what is chosen by name from a table of the modality, and so differs from one to another
    tables: dict[str, Mapping[str, Any]] = {"target": kind.targets, "views": kind.views}
    choices = [list(tables.get(name, {})) or [written[name]] for name in required]
    # learned positions have a size and convolutions an axis, which an objective does not ask for; some ask for none
    positions = "none" if own["positions"]["name"] == "none" else "sincos"
    values = {
        "modality": modality,
        "tokenizer": {"name": "byte_bpe"} if kind.tokenizers else None,
        # without its rate of dropout, which some teachers want to be 0
        # without what is left to chance while it trains, from which no target may come
        "frontend": {
            key: value
            for key, value in _recipe_of("frontend", frontend)["frontend"].items()
            if key not in ("dropout", "dither", "stripes")
        },
        "positions": {"name": positions},
        "transformer": {**own["transformer"], "dim": 16, "heads": 2},
        "encoder": own.get("encoder"),
        "data": {"train": "train.jsonl", "batch_size": 1},
        "trainer": {"steps": 1},
        "optimizer": own["optimizer"],
        "schedule": own["schedule"],
    }
    first = None
    for chosen in product(*choices):
        sentence = _complaint({**values, "objective": {**small, **dict(zip(required, chosen, strict=True))}})
        if sentence is None:
            return None
        first = first or sentence
    return first


@cache
def table() -> str:
    """All pairs in Markdown, aligned for a terminal; recipes by size, refusals by the number of their sentence."""
    sizes: dict[tuple[str, str], set[str]] = {}
    for name, values in _recipes():
        if "objective" not in values:
            continue
        size = "small" if name.startswith("small/") else name.rpartition("_")[2]
        source = f"{values['modality']}/{values['frontend']['name']}"
        sizes.setdefault((values["objective"]["name"], source), set()).add(size)
    notes: list[str] = []
    cells = {}
    for pair in product(ALONE, SOURCES):
        sentence = refusal(*pair)
        if sentence is None:
            cells[pair] = f"yes: {', '.join(sorted(sizes[pair]))}" if pair in sizes else "yes"
        else:
            notes += [sentence] if sentence not in notes else []
            cells[pair] = f"no ({notes.index(sentence) + 1})"
    rows = [["objective", *SOURCES], *([name, *(cells[name, source] for source in SOURCES)] for name in ALONE)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    paired = f"Not in the table: {', '.join(PAIRED)}, for several modalities at once, of different keys of a row."
    paired += " And omni, which has any of these, but those with labels, learn from several modalities in turn."
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1)), "", paired]) + "\n"


def _complaint(values: dict[str, Any]) -> str | None:
    """What is said of a recipe that cannot be built, without the place."""
    recipe = Recipe("matrix", "matrix", values)
    try:
        resolved = resolve(recipe)
        config = {**resolved.values, "classes": ["a", "b"], "vocabulary": ["a", "b", " "]}
        config["tokenizer"] = learn_tokenizer(resolved, [{"text": "a"}])
        recipe.placed(lambda: build_objective(config, build_encoder(config)))
    except ValueError as error:
        return str(error).removeprefix("matrix: ")
    return None


def _recipe_of(section: str, name: str) -> Mapping[str, Any]:
    """The values of the first shipped recipe in which a section has a name."""
    found = [values for _, values in _recipes() if section in values and values[section]["name"] == name]
    if not found:
        raise ValueError(f"{section}.name={name}: no shipped recipe has it; add one")
    return found[0]


@cache
def _recipes() -> list[tuple[str, Mapping[str, Any]]]:
    """Name and values; of a recipe for several modalities the sections of each, which have no objective."""
    return [(name, own) for name in shipped() for own in members(load(name).values).values()]
