"""Checkpoints that are either whole or not there, and weights that anyone can read.

Tensors are safetensors, everything else is JSON; nothing is ever pickled or unpickled, so a checkpoint from a stranger
can do no more than be wrong. A checkpoint is a folder:

    step_2000/model.safetensors      the objective's state, teacher included
              optimizer.safetensors  "parameter name/key", such as "encoder.mask_token/exp_avg"
              rng.safetensors        the state of each rank's random numbers
              state.json             step, micro-batches consumed, recipe; and the size of each file, to know a torn one
    latest                           the name of the folder to go on from
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmssl import distributed

FORMAT = 1
# of what `export_encoder` writes
ENCODER_FORMAT = 1
TOKENIZER = "tokenizer.json"


def save(
    folder: Path,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    rng: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint, make it the latest, and remove all but the `keep` newest.

    All processes call it together, and the main one writes: the file is the same however many there are, and whether
    parameters are sharded.

    The files are written into `step_N.tmp`, and only a rename makes a checkpoint of them: whenever the process or the
    machine dies, the checkpoints before are as they were.

    Args:
        folder: of all checkpoints of the run.
        rng: random states by name, as `load` gives them back.
        state: plain values; `step` names the checkpoint.

    Raises:
        OSError: nothing was saved, and what was half written is removed; ENOSPC for a full disk.
    """
    name = f"step_{state['step']}"
    path, unfinished = folder / name, folder / f"{name}.tmp"
    files = {
        "model.safetensors": _whole(objective.state_dict(keep_vars=True)),
        "optimizer.safetensors": _whole(_optimizer_tensors(objective, optimizer)),
        "rng.safetensors": rng,
    }
    if not distributed.is_main():
        return path
    try:
        _remove(unfinished)
        unfinished.mkdir(parents=True)
        for file, tensors in files.items():
            write_tensors(unfinished / file, tensors)
        sizes = {file: (unfinished / file).stat().st_size for file in files}
        _write_text(unfinished / "state.json", json.dumps({"format": FORMAT, **state, "files": sizes}, indent=1))
        _sync(unfinished)
        if path.exists():  # the run went back to an earlier checkpoint and came here again
            aside = folder / f"{name}.old.tmp"
            _remove(aside)
            path.rename(aside)
        unfinished.rename(path)
        _write_text(folder / "latest.tmp", name + "\n")
        os.replace(folder / "latest.tmp", folder / "latest")
        _sync(folder)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    older = [other for other in _folders(folder) if _step(other) < int(state["step"])]
    for other in set(folder.glob("step_*")) - {path, *older[: keep - 1]}:
        _remove(other)
    return path


def latest(folder: Path, *, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from: what `latest` names, else the newest that is whole; None where there is none.

    Args:
        say: is told of every torn folder that is passed over, in one sentence.
    """
    folders = _folders(folder)
    if (folder / "latest").is_file():
        named = folder / (folder / "latest").read_text(encoding="utf-8").strip()
        folders.sort(key=lambda path: path != named)
    for leftover in sorted(folder.glob("step_*.tmp")):
        say(f"{leftover}: saving was cut off here, so this checkpoint is passed over")
    for path in folders:
        reason = _torn(path)
        if reason is None:
            return path
        say(f"{path}: {reason}, so this checkpoint is passed over")
    return None


def load(
    path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put a checkpoint into an objective and its optimizer; give back its state and its random states.

    Rates and weight decays stay as the optimizer has them: they are the recipe's, and only its memory is restored.

    Raises:
        ValueError: the checkpoint is of another format or another model.
    """
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise ValueError(f"{path}: this is format {state['format']}, and this version of mmssl reads {FORMAT}")
    tensors = read_tensors(path / "model.safetensors")
    own = objective.state_dict()
    for name in sorted(own.keys() ^ tensors.keys()):
        where = "the checkpoint" if name in own else "the model"
        raise ValueError(f"{path}: '{name}' is missing in {where}; it was saved with another recipe, start a new run")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{path}: '{name}' is {tuple(tensor.shape)} in the checkpoint and {tuple(own[name].shape)} in the "
                "model; it was saved with another recipe, start a new run"
            )
    objective.load_state_dict({name: distributed.part(tensor, own[name]) for name, tensor in tensors.items()})
    memory: dict[int, dict[str, Tensor]] = {}
    indices = {name: index for index, name in enumerate(_parameter_names(objective, optimizer))}
    for entry, tensor in read_tensors(path / "optimizer.safetensors").items():
        name, _, key = entry.rpartition("/")
        if name not in indices:
            raise ValueError(f"{path}: '{name}' was trained and is not any more; go on with the recipe of that run")
        memory.setdefault(indices[name], {})[key] = distributed.part(tensor, own[name])
    optimizer.load_state_dict({"state": memory, "param_groups": optimizer.state_dict()["param_groups"]})
    del state["files"]
    return state, read_tensors(path / "rng.safetensors")


def export_encoder(
    run: Path, encoder: nn.Module, config: Mapping[str, Any], *, objective: nn.Module | None = None
) -> None:
    """Write what is needed to use an encoder: `encoder.safetensors`, `config.json` and, for text, `tokenizer.json`.

    All processes call it together, and the main one writes.

    Args:
        objective: of a fine-tuned encoder, or one that gives codes; what it owns beside the encoder goes into
            `objective.safetensors`.
    """
    encoder_tensors = _whole(encoder.state_dict(keep_vars=True))
    state = {} if objective is None else objective.state_dict(keep_vars=True)
    head = _whole({name: tensor for name, tensor in state.items() if not name.startswith("encoder.")})
    if distributed.is_main():
        write_encoder(run, config, encoder_tensors, head)


def write_encoder(
    run: Path, config: Mapping[str, Any], encoder: Mapping[str, Tensor], objective: Mapping[str, Tensor]
) -> None:
    """The same of tensors; without those of an objective there is no file of it.

    A tokenizer, JSON too, has a file of its own, which other programs open: `tokenizer.json`.
    """
    run.mkdir(parents=True, exist_ok=True)
    config = dict(config)
    tokenizer = config.pop("tokenizer", None)
    if tokenizer is not None:
        _write_text(run / "tokenizer.json.tmp", tokenizer)
        os.replace(run / "tokenizer.json.tmp", run / TOKENIZER)
    files = {"encoder.safetensors": encoder}
    if objective:
        files["objective.safetensors"] = objective
    for file, tensors in files.items():
        write_tensors(run / f"{file}.tmp", tensors)
        os.replace(run / f"{file}.tmp", run / file)
    _write_text(run / "config.json.tmp", json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    os.replace(run / "config.json.tmp", run / "config.json")


def read_encoder(run: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """What `export_encoder` wrote: config, the encoder's tensors, and the objective's (empty where there are none).

    Raises:
        ValueError: the folder holds no encoder, or one of another format.
    """
    config, file, head = read_config(run), run / "encoder.safetensors", run / "objective.safetensors"
    if not file.is_file():
        raise ValueError(f"{run}: no encoder.safetensors beside config.json; a run writes it when it ends")
    return config, read_tensors(file), read_tensors(head) if head.is_file() else {}


def read_config(run: Path) -> dict[str, Any]:
    """The config.json of a run folder.

    Raises:
        ValueError: there is none, or it is of another format.
    """
    path = run / "config.json"
    if not path.is_file():
        if (run / "recipe.yaml").is_file():
            raise ValueError(f"{run}: no config.json here; a run writes it when it ends, so let this one go on")
        raise ValueError(
            f"{run}: no config.json here, so it holds no encoder; give the folder of a run, of an exported encoder or "
            "of a model of transformers"
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: this is not JSON ({error}); copy or export it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: this is no description of an encoder; copy or export it again")
    if config.get("format") != ENCODER_FORMAT:
        raise ValueError(f"{path}: format {config.get('format')!r}, but this version of mmssl reads {ENCODER_FORMAT}")
    if (run / TOKENIZER).is_file():
        config["tokenizer"] = (run / TOKENIZER).read_text(encoding="utf-8")
    return config


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, safely on the disk when this returns.

    safetensors refuses tensors that share memory, and a Transformer that two encoders hold is one memory under two
    names: it is written once, and the other name goes into the file's metadata.

    Raises:
        OSError: it could not be written; ENOSPC for a full disk.
    """
    written: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path.name}: '{name}' is {type(tensor).__name__}, and only tensors are saved")
        storage = tensor.untyped_storage()
        view = (storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in names:
            aliases[name] = names[view]
            continue
        names[view] = name
        partial = storage.nbytes() != tensor.numel() * tensor.element_size() or storage.data_ptr() in storages
        storages.add(storage.data_ptr())
        tensor = tensor.detach().cpu()
        written[name] = tensor.clone(memory_format=torch.contiguous_format) if partial else tensor.contiguous()
    try:
        save_file(written, path, metadata={"aliases": json.dumps(aliases)})
    except SafetensorError as error:
        # it reports what the system says in words of its own
        number = re.search(r"(?:os error|code:) (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    _sync(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What `write_tensors` wrote, on the CPU; files of other programs are read as well.

    Raises:
        ValueError: this is no safetensors file, or not the whole of one.
    """
    try:
        # cloned, because the file may be mapped into memory, and training writes into these tensors
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path}: this is not a whole safetensors file ({error}); copy or make it again") from None
    return tensors | {name: tensors[first] for name, first in aliases.items()}


def _parameter_names(objective: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Name of each parameter in the order in which the optimizer's state numbers them."""
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = _parameter_names(objective, optimizer)
    memory = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{key}": value
        for index, entry in memory.items()
        for key, value in entry.items()
        if value is not None  # SGD without momentum remembers that it has none
    }


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which each process may hold a part, put together one by one in the main process's memory.

    A tensor that has two names has one memory afterwards as well.
    """
    found: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in found:
            whole = distributed.whole(tensor)
            if whole is tensor:
                found[id(tensor)] = tensor
            else:
                found[id(tensor)] = whole.detach().cpu() if distributed.is_main() else whole.new_empty(0)
    return {name: found[id(tensor)] for name, tensor in tensors.items()}


def _folders(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [path for path in folder.glob("step_*") if path.suffix != ".tmp" and _step(path) >= 0]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    number = path.name.removeprefix("step_")
    return int(number) if number.isdigit() else -1


def _torn(path: Path) -> str | None:
    """What is wrong with a checkpoint that was not written, or not copied, to its end."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for file, size in state["files"].items():
            if (path / file).stat().st_size != size:
                return f"{file} is not as long as it was when it was saved"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "state.json is broken"
    return None


def _remove(path: Path) -> None:
    """A folder and what is in it; first under a name that nobody takes for a checkpoint."""
    if not path.exists():
        return
    if path.suffix != ".tmp":
        aside = path.with_name(path.name + ".tmp")
        shutil.rmtree(aside, ignore_errors=True)
        path = path.rename(aside)
    shutil.rmtree(path, ignore_errors=True)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and not only in its queue."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
