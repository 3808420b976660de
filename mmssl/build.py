"""Config -> frontend, encoder, objective with new weights: plain values in, modules out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mmssl.convert.folder import open_encoder
from mmssl.encoder import Encoder, Encoders
from mmssl.modalities import MODALITIES
from mmssl.modalities.modality import Target
from mmssl.nn.positions import POSITIONS
from mmssl.nn.reconstruction import Reconstructed
from mmssl.nn.transformer import Transformer
from mmssl.nn.trunk import twin
from mmssl.objectives import OBJECTIVES
from mmssl.recipe import members
from mmssl.types import Frontend

Config = Mapping[str, Any]

# what an objective asks for in its constructor and no recipe can say; (config, encoder) -> value
PROVIDED: dict[str, Callable[[Config, Any], Any]] = {
    "target": lambda config, encoder: target.values if (target := _target(config)) else None,
    "target_dim": lambda config, encoder: target.dim(encoder.frontend) if (target := _target(config)) else 0,
    "target_learned": lambda config, encoder: (
        (target := _target(config)) is not None and target.learned and encoder.frontend.learned
    ),
    "targets": lambda config, encoder: {
        name: _reconstructed(MODALITIES[name].targets[chosen], encoder[name].frontend)
        for name, chosen in config["objective"]["targets"].items()
    },
    "pictures": lambda config, encoder: target.pictures if (target := _target(config)) else None,
    "views": lambda config, encoder: MODALITIES[config["modality"]].views.get(config["objective"]["views"]),
    "view_makers": lambda config, encoder: _view_makers(config),
    "teacher_encoder": lambda config, encoder: _teacher(config),
    "of": lambda config, encoder: {
        name: build_objective({**config, **own, "objective": config["objective"]["of"][name]}, encoder[name])
        for name, own in members(config).items()
    },
    "n_characters": lambda config, encoder: len(config["vocabulary"]),
    "n_classes": lambda config, encoder: len(config["classes"]),
    "class_counts": lambda config, encoder: config.get("class_counts"),
}


def build_encoders(config: Config) -> Encoder | Encoders:
    """The encoder of a config with new weights, or where it is for several modalities all of them.

    Raises:
        ValueError: settings that do not fit together.
    """
    if isinstance(config["modality"], str):
        return build_encoder(config)
    own = members(config)
    if config["backbone"] == "separate":
        return Encoders({name: build_encoder(each) for name, each in own.items()})
    settings = {} if config["backbone"] == "shared" else {**config["backbone"]}
    settings.pop("name", None)
    trunk = Transformer(**config["transformer"])
    first, *others = own
    bodies = {first: trunk, **{name: twin(trunk, **settings) for name in others}}
    return Encoders({name: build_encoder(each, bodies[name]) for name, each in own.items()})


def build_encoder(config: Config, transformer: Transformer | None = None) -> Encoder:
    """An encoder with new weights, from the sections `modality`, `frontend`, `positions`, `transformer`, `encoder`.

    Args:
        transformer: one that holds blocks of other encoders, see `mmssl.nn.trunk`.

    Raises:
        ValueError: settings that do not fit together.
    """
    transformer = transformer or Transformer(**config["transformer"])
    frontend = build_frontend(config, dim=transformer.dim)
    positions = make(POSITIONS, config["positions"], dim=transformer.dim)
    return Encoder(frontend, transformer, positions, **config["encoder"])


def build_frontend(config: Config, *, dim: int) -> Frontend:
    """The frontend alone, for tokens of width `dim`."""
    kind = MODALITIES[config["modality"]]
    given = {"tokenizer": config["tokenizer"]} if kind.tokenizers else {}
    made: Frontend = make(kind.frontends, config["frontend"], dim=dim, **given)
    return made


def build_objective(config: Config, encoder: Encoder | Encoders) -> nn.Module:
    """An objective with new weights around an encoder, or around several, from the section `objective`.

    Raises:
        ValueError: settings that do not fit together, or an encoder that cannot serve this objective.
    """
    settings = dict(config["objective"])
    objective = OBJECTIVES[settings.pop("name")]
    wanted = inspect.signature(objective).parameters
    settings |= {name: value(config, encoder) for name, value in PROVIDED.items() if name in wanted}
    made: nn.Module = objective(encoder, **settings)
    return made


def make(table: Mapping[str, Callable[..., Any]], section: Mapping[str, Any], **given: Any) -> Any:
    """What a section with a `name` becomes."""
    settings = dict(section)
    return table[settings.pop("name")](**given, **settings)


def _teacher(config: Config) -> Encoder:
    """The encoder of the run that `objective.teacher` names, or one with new weights.

    Raises:
        ValueError: the folder holds no encoder of this modality.
    """
    folder = config["objective"]["teacher"]
    if folder is None:
        return build_encoder(config)
    found = open_encoder(folder)
    theirs = found.config
    if theirs["modality"] != config["modality"]:
        raise ValueError(
            f"objective.teacher={folder}: holds an encoder of {theirs['modality']}, and this recipe is for "
            f"{config['modality']}; give the folder of another run"
        )
    encoder = build_encoder(theirs)
    encoder.load_state_dict(found.encoder)
    return encoder


def _reconstructed(target: Target, frontend: Frontend) -> Reconstructed:
    return Reconstructed(target.values, target.dim(frontend), target.learned and frontend.learned)


def _view_makers(config: Config) -> dict[str, Callable[..., Any]]:
    """What makes the views that `objective.self_supervised` names for each modality.

    Raises:
        ValueError: it names a modality that the recipe does not have, or views that there are not.
    """
    found = {}
    for name, views in config["objective"]["self_supervised"].items():
        place = f"objective.self_supervised: {name}: {views}"
        if name not in config["modality"]:
            raise ValueError(f"{place}: the recipe is of {' and '.join(config['modality'])}; name one of these")
        if views not in MODALITIES[name].views:
            known = " or ".join(MODALITIES[name].views) or "no views, so name another modality"
            raise ValueError(f"{place}: {name} has {known}")
        found[name] = MODALITIES[name].views[views]
    return found


def _target(config: Config) -> Target | None:
    """None where an objective does without one."""
    name = config["objective"]["target"]
    return None if name is None else MODALITIES[config["modality"]].targets[name]
