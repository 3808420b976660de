"""From the settings and tensors of a layout to ours, and back."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmssl.convert import LAYOUTS
from mmssl.convert.layout import OF_TRAINING, SECTIONS, Config, Layout, Pair, Settings, completed
from mmssl.convert.pictures import table_of

log = logging.getLogger(__name__)

# how many blocks training has left out so far: nothing that a layout could hold
DRAWS = "transformer.draws"
# buffers of old files, which hold no weights
_NO_WEIGHTS = ("position_ids", "relative_position_index")


def to_ours(
    layout: Layout, given: Settings, preprocessor: Settings, tensors: Mapping[str, Tensor], *, place: object
) -> tuple[Config, dict[str, Tensor], dict[str, Tensor]]:
    """Our config and tensors of an encoder of theirs, and what their file holds beside it.

    Args:
        given: what config.json holds.
        preprocessor: what preprocessor_config.json holds; empty where there is none.
        place: what errors name.

    Raises:
        ValueError: a setting that our encoder cannot have; a tensor that is missing, unknown or of another shape.
    """
    for name, value in layout.fixed.items():
        if given.get(name, value) != value:
            raise ValueError(f"{place}: config.json says {name}={given[name]!r}, and our encoder has only {value!r}")
    inside, rest = _inside(layout, tensors)
    settings = {name: given.get(name, value) for name, value in layout.defaults.items()}
    for name, value in settings.items():
        wanted = _wanted(value, layout.defaults[name])
        if wanted:
            raise ValueError(f"{place}: config.json says {name}={value!r}, and that must be {wanted}; correct it there")
    try:
        said = {name: value for name, value in preprocessor.items() if value is not None}
        read = layout.read(settings, {**layout.preprocessor, **said}, inside.keys())
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{place}: preprocessor_config.json: a size or a scale in it is none that is known here ({error!r}); write "
            "size as {height, width} or {shortest_edge}"
        ) from None
    config = completed({"format": 1, "layout": layout.model_type, **read})
    pairs = layout.pairs(config, settings)
    for name in layout.drawn:
        if name not in inside and any(name in pair.theirs for pair in pairs):
            log.warning("%s: the weights lack '%s', which training alone uses: it is drawn anew", place, name)
            generator = torch.Generator().manual_seed(0)
            inside[name] = torch.rand(config["transformer"]["dim"], generator=generator)
    ours = {DRAWS: torch.zeros((), dtype=torch.int64)} | read_pairs(pairs, inside, kind=layout.model_type, place=place)
    known = {name for pair in pairs for name in pair.theirs}
    beside = {name: tensor for name, tensor in inside.items() if name not in known} | rest
    for name in beside:
        if not name.startswith(layout.beside):
            raise ValueError(
                f"{place}: the weights hold '{name}', which has no place in a {layout.model_type} with this config.json"
            )
    return config, ours, beside


def read_pairs(pairs: Sequence[Pair], tensors: Mapping[str, Tensor], *, kind: str, place: object) -> dict[str, Tensor]:
    """Our tensors of theirs.

    Args:
        kind: what errors call a model that has them.
        place: what errors name.

    Raises:
        ValueError: one of theirs is missing or of another shape.
    """
    ours: dict[str, Tensor] = {}
    for pair in pairs:
        for name in pair.theirs:
            if name not in tensors:
                raise ValueError(f"{place}: the weights lack '{name}', which a {kind} has")
        try:
            made = pair.read(*(tensors[name] for name in pair.theirs))
        except (RuntimeError, IndexError):
            shapes = ", ".join(f"'{name}' {tuple(tensors[name].shape)}" for name in pair.theirs)
            raise ValueError(f"{place}: {shapes}: not the shapes that config.json makes of them") from None
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        ours |= {name: tensor.contiguous() for name, tensor in zip(pair.ours, made, strict=True)}
    return ours


def to_theirs(
    layout: Layout, config: Settings, tensors: Mapping[str, Tensor]
) -> tuple[Config, Config, dict[str, Tensor]]:
    """Their config.json, preprocessor_config.json and tensors of an encoder of ours.

    Raises:
        ValueError: this layout cannot say what the encoder is.
    """
    said = _say(layout, config)
    named = {name: tensor for name, tensor in tensors.items() if name != DRAWS} | said.fixed
    theirs: dict[str, Tensor] = {}
    for pair in said.pairs:
        made = pair.write(*(named.pop(name) for name in pair.ours))
        names = [layout.written + name for name in pair.theirs]
        theirs |= {name: tensor.contiguous() for name, tensor in zip(names, made, strict=True)}
    if named:
        raise ValueError(f"layout {layout.model_type} has no place for '{next(iter(named))}'")
    for sentence in said.remarks:
        log.warning("%s: %s", layout.model_type, sentence)
    head = {"model_type": layout.model_type, "architectures": [layout.architecture], "dtype": "float32"}
    return head | said.settings, said.preprocessor, theirs


@dataclass(frozen=True)
class _Said:
    """What a layout says of an encoder.

    fixed: our tensors that the encoder computes, and theirs holds.
    remarks: what it does not say, one sentence each.
    """

    settings: Config
    preprocessor: Config
    pairs: list[Pair]
    fixed: dict[str, Tensor]
    remarks: list[str]


def _say(layout: Layout, config: Settings) -> _Said:
    ours, fixed = completed(config), {}
    if layout.grid is not None and ours["positions"]["name"] in ("sincos", "flat_sincos"):
        # what is computed here is a table there
        grid = list(layout.grid(ours))
        fixed["positions.table"] = table_of(ours, grid)
        ours["positions"] = {"name": "learned", "grid": grid}
    # parts of another kind have other settings, in which the rest would not be found
    usual = completed(layout.read(layout.defaults, layout.preprocessor, ()))
    kinds = ["frontend.name", *(["positions.name"] if ours["positions"]["name"] not in layout.positions else [])]
    _agree(layout, ours, usual, kinds)
    settings, preprocessor = layout.write(ours)
    full = {**layout.defaults, **settings}
    # first of all: a layout without layer scale has no names for its tensors
    there = completed(layout.read(full, {**layout.preprocessor, **preprocessor}, ()))
    _agree(layout, ours, there, ["transformer.layer_scale"])
    pairs = layout.pairs(ours, full)
    names = {name for pair in pairs for name in pair.theirs}
    back = completed(layout.read(full, {**layout.preprocessor, **preprocessor}, names))
    keys = [f"{section}.{key}" for section in SECTIONS for key in ours[section]]
    _agree(layout, ours, back, [key for key in keys if key not in OF_TRAINING | {"frontend.normalize_eps"}])
    remarks = []
    if back["augment_eval"] != [_plain(step) for step in ours["augment_eval"]]:
        remarks.append(
            f"its preprocessor does {back['augment_eval']}, and here {ours['augment_eval']} comes before embedding; do "
            "that yourself"
        )
    own, other = (side["frontend"].get("normalize_eps") for side in (ours, back))
    if ours["frontend"].get("normalize") and own != other:
        remarks.append(
            f"its preprocessor adds {other:g} to the variance of a clip, and this encoder was trained with {own:g}: "
            "very quiet clips come out differently"
        )
    return _Said(settings, preprocessor, pairs, fixed, remarks)


def layouts_for(config: Settings, wanted: str | None) -> list[Layout]:
    """The layout of this name; without one all that can say what an encoder is, that which it came in before others.

    Raises:
        ValueError: there is none.
    """
    if wanted is not None:
        if wanted not in LAYOUTS:
            raise ValueError(f"layout {wanted!r}: choose one of {', '.join(LAYOUTS)}")
        return [LAYOUTS[wanted]]
    first = config.get("layout")
    fitting = [layout for layout in LAYOUTS.values() if layout.modality == config["modality"]]
    if not fitting:
        known = ", ".join(dict.fromkeys(layout.modality for layout in LAYOUTS.values()))
        raise ValueError(f"no layout of transformers that mmssl writes is of {config['modality']}; they are of {known}")
    found, reasons = [], []
    for layout in sorted(fitting, key=lambda layout: layout.model_type != first):
        try:
            _say(layout, config)
        except ValueError as error:
            reasons.append(str(error))
        else:
            found.append(layout)
    if found:
        return found
    raise ValueError(f"no layout of transformers can say what this encoder is: {'; '.join(reasons)}")


def _wanted(value: Any, usual: Any) -> str:
    """What a setting must be, by what it usually is; empty where it is that."""
    if isinstance(usual, str):
        return "" if isinstance(value, str) else "a name"
    parts = value if isinstance(value, list) else [value]
    if all(isinstance(part, int | float) for part in parts) and (
        isinstance(value, list) or not isinstance(usual, list)
    ):
        return ""
    return (
        "a list of numbers" if isinstance(usual, list) else "true or false" if isinstance(usual, bool) else "a number"
    )


def _inside(layout: Layout, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the encoder by their names in a model without a head, in float32; and all others."""
    prefix = next((prefix for prefix in layout.prefixes if any(name.startswith(prefix) for name in tensors)), "")
    inside, rest = {}, {}
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] in _NO_WEIGHTS:
            continue
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        if name.startswith(prefix):
            short = name.removeprefix(prefix)
            inside[layout.older.get(short, short)] = tensor
        else:
            rest[name] = tensor
    return inside, rest


def _agree(layout: Layout, ours: Config, back: Config, keys: Collection[str]) -> None:
    for key in keys:
        section, _, name = key.partition(".")
        if ours[section].get(name) != back[section].get(name):
            raise ValueError(
                f"layout {layout.model_type} has {key}={back[section].get(name)!r}, and this encoder "
                f"{ours[section].get(name)!r}"
            )


def _plain(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step of augment_eval with the way of resizing written out, and sizes as height and width."""
    plain = dict(step)
    if plain["name"] == "resize":
        plain.setdefault("interpolation", "bicubic")
    if plain["name"] == "center_crop" and isinstance(plain.get("size"), int):
        plain["size"] = [plain["size"]] * 2
    return plain
