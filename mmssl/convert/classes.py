"""The head that tells classes: that of their ForImageClassification and the like, and our objective `classify`.

A layout names the ways in which its head reads the encoder. What one of them computes goes both ways; a head that reads
anything else, such as both of two norms, has no counterpart and is left out, here as there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmssl.convert.layout import Config, Head, Layout, Settings, completed, defaults_of
from mmssl.objectives import OBJECTIVES

_SEVERAL, _ONE = "multi_label_classification", "single_label_classification"
# of the objective's settings those that say what the head computes
_COMPUTED = ("pooling", "head_norm", "head_eps", "weighted_layers")


def read_classes(
    layout: Layout, config: Config, given: Settings, beside: Mapping[str, Tensor]
) -> tuple[Config, dict[str, Tensor]]:
    """Our config with objective and classes, and the tensors of the objective.

    Args:
        given: their config.json.
        beside: what their weights hold beside the encoder.

    Raises:
        ValueError: the head computes something else than ours can, or its classes have no names.
    """
    used = {name: tensor for name, tensor in beside.items() if not name.startswith(layout.idle)}
    ways = [way for way in layout.heads(config) if way.names == used.keys()]
    if not ways:
        held = ", ".join(sorted({name.rpartition(".")[0] or name for name in used}))
        raise ValueError(f"objective classify cannot compute a head of {held} as a {layout.model_type} has it")
    kind = given.get("problem_type")
    if kind not in (None, _SEVERAL, _ONE):
        raise ValueError(f"problem_type={kind} in config.json, and objective classify has {_ONE} and {_SEVERAL}")
    tensors, said = _read(ways, used)
    names = _names(given, len(tensors["head.linear.bias"]))
    own = {name: value for name, value in defaults_of(OBJECTIVES["classify"]).items() if name != "class_counts"}
    objective = {**own, **said, "name": "classify", "multi_label": kind == _SEVERAL}
    return {**config, "objective": objective, "classes": names}, tensors


def write_classes(layout: Layout, config: Settings, tensors: Mapping[str, Tensor]) -> tuple[Config, dict[str, Tensor]]:
    """Further settings of their config.json, and the tensors of the head.

    Args:
        config: of a run of `classify`.
        tensors: of its objective.

    Raises:
        ValueError: no head of this layout computes the same.
    """
    ours = _computed(config["objective"])
    ways = layout.heads(completed(config))
    if not ways:
        raise ValueError(f"layout {layout.model_type} has no head that tells classes of this encoder")
    fitting = next((way for way in ways if _computed(way.settings) == ours), None)
    if fitting is None:
        theirs = _computed(ways[0].settings)
        keys = [key for key in _COMPUTED if theirs.get(key) != ours.get(key)]
        there, here = (" ".join(f"{key}={each[key]}" for key in keys if key in each) for each in (theirs, ours))
        raise ValueError(f"{layout.classifier} computes {there}, and this run {here}; --to mmssl keeps it")
    head: dict[str, Tensor] = {}
    for pairs, prefix in ((fitting.pairs, ""), (fitting.inside, layout.prefixes[0])):
        for pair in pairs:
            made = pair.write(*(tensors[name] for name in pair.ours))
            names = [prefix + name for name in pair.theirs]
            head |= {name: tensor.contiguous() for name, tensor in zip(names, made, strict=True)}
    settings = {
        "architectures": [layout.classifier],
        "id2label": {str(number): name for number, name in enumerate(config["classes"])},
        "label2id": {name: number for number, name in enumerate(config["classes"])},
        "problem_type": _SEVERAL if config["objective"].get("multi_label") else _ONE,
    }
    return {**settings, **fitting.given}, head


def _read(ways: list[Head], used: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Settings]:
    """The tensors of the objective and its settings, by the first way that can read them.

    Raises:
        ValueError: none can.
    """
    reason = ""
    for way in ways:
        ours: dict[str, Tensor] = {}
        try:
            for pair in way.pairs + way.inside:
                made = pair.read(*(used[name] for name in pair.theirs))
                ours |= {name: tensor.contiguous() for name, tensor in zip(pair.ours, made, strict=True)}
        except ValueError as error:
            reason = str(error)
        else:
            return ours, way.settings
    raise ValueError(reason)


def _computed(settings: Settings) -> Config:
    """What a head computes; the addend of a norm where there is one."""
    said = {**defaults_of(OBJECTIVES["classify"]), **settings}
    return {key: said[key] for key in _COMPUTED if key != "head_eps" or said["head_norm"] != "none"}


def _names(given: Mapping[str, Any], rows: int) -> list[str]:
    """The name of each class, with its number behind it where another has the same.

    Raises:
        ValueError: config.json names others than the head has rows.
    """
    said = given.get("id2label")
    if said is None:  # as where there are two, and nobody has named them
        return [f"LABEL_{number}" for number in range(rows)]
    try:
        by_id = {int(number): str(name) for number, name in said.items()}
    except (TypeError, ValueError, AttributeError):
        raise ValueError("id2label in config.json gives classes no numbers") from None
    if sorted(by_id) != list(range(rows)):
        raise ValueError(f"id2label in config.json names {len(by_id)} classes, and the head has {rows}")
    times = Counter(by_id.values())
    return [f"{by_id[i]} ({i})" if times[by_id[i]] > 1 else by_id[i] for i in range(rows)]
