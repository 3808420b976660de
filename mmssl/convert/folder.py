"""Folders of transformers: found or fetched, read and written.

Weights are read from safetensors or with torch's weights-only reader, so a file from a stranger can do no more than be
wrong. The network is touched only where a name of the hub is given.
"""

from __future__ import annotations

import importlib
import json
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmssl.convert import LAYOUTS, TOWERS
from mmssl.convert.classes import read_classes, write_classes
from mmssl.convert.ctc import TOKENIZER, read_head, tokens_of, write_head
from mmssl.convert.layout import Config, Layout
from mmssl.convert.towers import TOKENIZER as CAPTIONS
from mmssl.convert.towers import read_towers, write_towers
from mmssl.convert.translate import layouts_for, to_ours, to_theirs
from mmssl.recipe import members
from mmssl.training.checkpoint import read_encoder, read_tensors, write_encoder

log = logging.getLogger(__name__)

_CONFIG, _WEIGHTS, _OLD_WEIGHTS = "config.json", "model.safetensors", "pytorch_model.bin"
# in the first that there is
_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_TOKENS = ("vocab.json", "added_tokens.json", "tokenizer_config.json")
_HEADS = ("lm_head", "classifier")  # that say something of a clip
_NESTED = ("feature_extractor", "image_processor", "video_processor")
# no path of several folders, none from here, home or the root, and none that ends as files do, in a dot and a letter
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/(?![\w.-]*\.[A-Za-z]\w*$)[\w.-]+")


@dataclass(frozen=True)
class Exported:
    """An encoder ready to be built: what a run exports, wherever it was read.

    config: what config.json of a run holds.
    encoder, objective: tensors; those of the objective are none where it was not fine-tuned.
    folder: where.
    left_out: the head of a fine-tuned model of theirs that was not read, and why where that can be told; empty where
        there is none.
    """

    config: Config
    encoder: dict[str, Tensor]
    objective: dict[str, Tensor]
    folder: Path
    left_out: str = ""


def find(source: str | Path) -> Path:
    """The folder that a path or a name of the hub stands for.

    Raises:
        ValueError: there is no such folder, and no such name.
    """
    path = Path(source)
    if path.name in ("encoder.safetensors", _WEIGHTS):
        path = path.parent
    if path.is_dir():
        return path
    name = str(source)
    # a run that is not there is no reason to ask the network for it
    if not _HUB_NAME.fullmatch(name) or path.parts[0] == "runs" or Path(path.parts[0]).exists():
        raise ValueError(
            f"{source}: no such folder; give the folder of a run or of an exported encoder, or of a model of "
            "transformers or its name, such as facebook/wav2vec2-base"
        )
    return _fetch(name)


def convert(source: str | Path, folder: str | Path, *, to: str = "transformers", modality: str | None = None) -> str:
    """Write an encoder as transformers reads it, or as a run of mmssl exports it.

    Args:
        source: see `open_encoder`.
        folder: to write; it must be new or empty.
        to: "transformers" for the layout that fits, the name of a layout, or "mmssl".
        modality: of a run on several, the one whose encoder is written, alone; with "mmssl" all by default.

    Returns:
        what opens it, in a sentence.

    Raises:
        ValueError: the source cannot be read, the folder holds something, no layout can say what the encoder is, or
            there are several and it is not said which.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is there already; give a new folder")
    found = open_encoder(source)
    several = members(found.config)
    if modality is not None:
        found = encoder_of(found, modality)
    if modality is not None and len(several) > 1:
        log.warning(
            "%s: the encoder of %s alone is written, and not what brings it together with others", folder, modality
        )
    if to == "mmssl":
        write_encoder(folder, found.config, found.encoder, found.objective)
        return f'mmssl.load("{folder}") opens it'
    architecture = write_transformers(folder, found, layout=None if to == "transformers" else to)
    return f'transformers.{architecture}.from_pretrained("{folder}") opens it'


def open_encoder(source: str | Path) -> Exported:
    """What a run exported, or the encoder of a model of transformers.

    Args:
        source: a folder, or a name of the hub.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    folder = find(source)
    return read_transformers(folder) if is_transformers(folder) else Exported(*read_encoder(folder), folder)


def encoder_of(found: Exported, modality: str) -> Exported:
    """What was exported, as the encoder of one modality: of a run on several, that of this one.

    Raises:
        ValueError: it is of another.
    """
    own = members(found.config)
    if modality not in own:
        raise ValueError(f"{found.folder}: holds an encoder of {' and '.join(own)}, and none of {modality}")
    if isinstance(found.config["modality"], str):
        return found
    tensors = {
        name.removeprefix(f"{modality}."): tensor
        for name, tensor in found.encoder.items()
        if name.startswith(f"{modality}.")
    }
    nothing = {"format": found.config["format"], "objective": None, "classes": None, "vocabulary": None}
    return Exported({**nothing, **own[modality]}, tensors, {}, found.folder)


def _fetch(name: str) -> Path:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise ValueError(
            f"{name}: there is no such folder, and if it is meant as a name of the hub, that needs `pip install "
            "mmssl[hub]`"
        ) from None
    try:
        folder = Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(hub.snapshot_download(name, allow_patterns=["*.json", f"{_OLD_WEIGHTS[:-4]}*.bin"]))
    except Exception as error:  # of that library, of its client and of the socket: all mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{name}: as a path, there is no folder {name.partition('/')[0]} here, and as a name of the hub it could "
            f"not be had ({reason}); correct one or the other"
        ) from error
    return folder


def is_transformers(folder: Path) -> bool:
    """Whether a folder holds a model of transformers, by its config.json."""
    try:
        return "model_type" in _read_json(folder / _CONFIG)
    except ValueError:
        return False


def read_transformers(folder: Path) -> Exported:
    """The encoder of a model of transformers, and its head where it spells or tells classes; or both of two towers.

    Without a tokenizer.json a model of pictures and captions is read as its vision tower alone.

    Raises:
        ValueError: a layout, a setting or a tensor that we have no counterpart of, or a file that is broken.
    """
    whole = given = _read_json(folder / _CONFIG)
    kind = str(given["model_type"])
    towers = TOWERS.get(kind)
    if towers is None and kind not in LAYOUTS:
        raise ValueError(f"{folder}: layout {kind!r}: mmssl reads {', '.join([*LAYOUTS, *TOWERS])}")
    layout = LAYOUTS[kind] if towers is None else towers.image
    preprocessor, tensors = _preprocessor(folder), read_weights(folder)
    if preprocessor is None:
        log.warning(
            "%s: no preprocessor_config.json, so clips are prepared as is usual for a %s", folder, layout.model_type
        )
    why = ""
    if towers is not None and any(name.startswith(towers.text.prefixes) for name in tensors):
        if (folder / CAPTIONS).is_file():
            said = _read_json(folder / _TOKENS[2]) if (folder / _TOKENS[2]).is_file() else {}
            return Exported(*read_towers(towers, given, preprocessor or {}, said, tensors, folder=folder), folder)
        why = f", for there is no {CAPTIONS} to read captions with"
    if layout.nested is not None and layout.nested in given:
        given = given[layout.nested] or {}
    config, encoder, beside = to_ours(layout, given, preprocessor or {}, tensors, place=folder)
    objective: dict[str, Tensor] = {}
    if "lm_head.weight" in beside and (folder / _TOKENS[0]).is_file():
        try:
            files = [_read_json(folder / name) if (folder / name).is_file() else {} for name in _TOKENS]
            tokens = tokens_of(files[0], files[1], files[2], rows=len(beside["lm_head.weight"]))
            config, objective = read_head(config, given, tokens, beside)
            beside = {name: tensor for name, tensor in beside.items() if not name.startswith("lm_head.")}
        except ValueError as error:
            why = f", for {error}"
    elif any(name.startswith("classifier.") for name in beside) and layout.classifier:
        try:
            config, objective = read_classes(layout, config, whole, beside)
            beside = {}
        except ValueError as error:
            why = f", for {error}"
    if beside:
        parts = sorted({f"{name.partition('.')[0]}" for name in beside})
        log.warning(
            "%s: the encoder alone is read; %d tensors beside it are left out: %s%s",
            folder,
            len(beside),
            ", ".join(parts),
            why,
        )
    config = {"objective": None, "classes": None, "vocabulary": None, **config}
    head = next((head for head in _HEADS if any(name.startswith(f"{head}.") for name in beside)), "")
    return Exported(config, encoder, objective, folder, left_out=head and f"{head}{why}")


def write_transformers(folder: Path, source: Exported, *, layout: str | None = None) -> str:
    """Write an encoder as transformers reads it, and its head where theirs computes the same; the class that opens it.

    Args:
        layout: its name; by default the first that can say what encoder and head are, or else the encoder, and that
            which it came in before all others. Of a run on several modalities that of one writes its encoder alone.

    Raises:
        ValueError: no layout can.
    """
    if not isinstance(source.config["modality"], str):
        if layout not in LAYOUTS:
            return _write(folder, *write_towers(source.config, source.encoder, source.objective, wanted=layout))
        source = encoder_of(source, LAYOUTS[layout].modality)
    fitting = layouts_for(source.config, layout)
    objective = (source.config.get("objective") or {}).get("name")
    tells: tuple[Config, dict[str, Tensor]] | None = None
    chosen, why = fitting[0], ""
    if source.objective and objective == "classify":
        chosen, tells, why = _telling(fitting, source)
    given, preprocessor, tensors = to_theirs(chosen, source.config, source.encoder)
    files: dict[str, Any] = {"preprocessor_config.json": preprocessor}
    if tells is not None:
        settings, head = tells
        if chosen.nested is not None:  # a head is of the model of several towers, and reads one
            outer = next(name for name, towers in TOWERS.items() if towers.image is chosen)
            given = {"model_type": outer, "dtype": given["dtype"], chosen.nested: given}
        given |= settings
        prefix = "" if chosen.written else chosen.prefixes[0]
        tensors = {prefix + name: tensor for name, tensor in tensors.items()} | head
    elif source.objective and objective == "ctc":
        settings, vocabulary, head = write_head(source.config, source.objective)
        given |= {**settings, "architectures": [chosen.architecture.replace("Model", "ForCTC")]}
        tensors = {chosen.prefixes[0] + name: tensor for name, tensor in tensors.items()} | head
        files |= {"vocab.json": vocabulary, "tokenizer_config.json": TOKENIZER}
    elif source.objective:
        log.warning("%s: the encoder alone is written, and not the head of its objective %s%s", folder, objective, why)
    return _write(folder, given, tensors, files)


def _write(folder: Path, given: Config, tensors: Mapping[str, Tensor], files: Mapping[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / _WEIGHTS, metadata={"format": "pt"})
    for name, content in {**files, _CONFIG: given}.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return str(given["architectures"][0])


def _telling(fitting: list[Layout], source: Exported) -> tuple[Layout, tuple[Config, dict[str, Tensor]] | None, str]:
    """The first layout whose head tells classes as this run does, and what there is to write of it.

    Where there is none, the first layout, and why.
    """
    reasons = []
    for layout in fitting:
        try:
            return layout, write_classes(layout, source.config, source.objective), ""
        except ValueError as error:
            if layout.classifier:
                reasons.append(str(error))
    reasons.append(f"layout {fitting[0].model_type} has no head that tells classes; --to mmssl keeps it")
    return fitting[0], None, f", for {reasons[0]}"


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model of transformers, in one file or in several.

    Raises:
        ValueError: there are none, or a file holds more than tensors.
    """
    for name in (_WEIGHTS, _OLD_WEIGHTS):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [name]
        elif index.is_file():
            files = sorted(set(_read_json(index)["weight_map"].values()))
        else:
            continue
        tensors: dict[str, Tensor] = {}
        for file in files:
            if not (folder / file).is_file():
                raise ValueError(f"{folder}: no {file}, which {index.name} names; copy the whole folder again")
            tensors |= read_tensors(folder / file) if file.endswith(".safetensors") else _read_old(folder / file)
        return tensors
    raise ValueError(f"{folder}: neither {_WEIGHTS} nor {_OLD_WEIGHTS} beside config.json; copy the whole folder again")


def _read_old(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: holds more than tensors, or is broken, and nothing else is unpickled ({reason}); ask for "
            "safetensors"
        ) from None
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path}: holds no tensors by name; ask for safetensors")
    return dict(tensors)


def _preprocessor(folder: Path) -> dict[str, Any] | None:
    for name in _PREPROCESSORS:
        if (folder / name).is_file():
            found = _read_json(folder / name)
            return next((found[key] for key in _NESTED if isinstance(found.get(key), dict)), found)
    return None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent}: no {path.name} here")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: this is not JSON ({error}); copy it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: this is no description of a model; copy it again")
    return found
