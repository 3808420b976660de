"""Where a run begins: at its first update, or after its latest checkpoint."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmssl import distributed
from mmssl.files import alone
from mmssl.training import checkpoint
from mmssl.training.rng import set_random_state
from mmssl.training.settings import TrainSettings

LOCK = "lock"  # in the folder of a run, which holds it while it goes on


@dataclass
class Place:
    """How far a run has come: what a checkpoint holds beside tensors and recipe.

    step: optimizer updates made.
    consumed, epoch_start: see `Loader`.
    clips: that all processes together were given.
    seconds: that the run took, without the time between being cut off and going on.
    skipped: attempts in a row that gave no update.
    evaluated: the update after which the last evaluation was made.
    best, best_step: the best value of an evaluation so far, and after which update; None where there is none.
    waited: evaluations since then.
    final: what `train` returns if nothing follows; None for what is not finite.
    """

    step: int = 0
    consumed: int = 0
    clips: int = 0
    seconds: float = 0.0
    skipped: int = 0
    evaluated: int = 0
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    final: dict[str, float | None] = field(default_factory=dict)
    epoch_start: tuple[int, int] = (0, 0)


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Make a folder and keep it for this run alone until it ends, however it ends; see `alone`.

    Raises:
        FileExistsError: on all processes, where another run is going on in it.
    """
    refusal = ""
    with ExitStack() as stack:
        if distributed.is_main():
            run.mkdir(parents=True, exist_ok=True)
            (run / LOCK).touch()  # and never removed: another run may have opened it to see whether it is held
            if not stack.enter_context(alone(run / LOCK)):
                refusal = f"{run}: another run is going on in this folder; wait until it ends, or choose another folder"
        refusal = distributed.broadcast_text(refusal)
        if refusal:
            raise FileExistsError(refusal)
        yield


def begin(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: Path,
    device: torch.device,
    settings: TrainSettings,
    recipe: str | None,
    resume: bool,
    made: Mapping[str, Any],
) -> tuple[Place, list[str]]:
    """Where the run begins, and what is to be said about it. The main process looks, so that all agree.

    Args:
        made: what `made_with` gives now.
    """
    remarks: list[str] = []
    found, refusal = "", ""
    if distributed.is_main():
        path = checkpoint.latest(run / "checkpoints", say=remarks.append)
        if not resume and (path is not None or (run / "log.jsonl").exists()):
            refusal = f"{run}: this folder holds another run; resume it, or choose another folder"
        elif resume:
            found = str(path or "")
    found, refusal = json.loads(distributed.broadcast_text(json.dumps([found, refusal])))
    if refusal:
        raise FileExistsError(refusal)
    if recipe is not None and distributed.is_main():
        run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.yaml.tmp").write_text(recipe, encoding="utf-8")
        os.replace(run / "recipe.yaml.tmp", run / "recipe.yaml")
    if not found:
        return Place(), [*remarks, f"{run}: there is no checkpoint yet, so the run starts"] if resume else remarks
    state, rng = checkpoint.load(Path(found), objective, optimizer)
    own = f"{distributed.rank()}."
    set_random_state({name.removeprefix(own): value for name, value in rng.items() if name.startswith(own)}, device)
    # checkpoints were made after the evaluation of their update before they said so
    state = {"evaluated": state["step"]} | state
    place = Place(**{name: state[name] for name in Place.__dataclass_fields__ if name in state})
    place.epoch_start = (place.epoch_start[0], place.epoch_start[1])  # a list as JSON has it
    remarks.append(f"{run}: goes on after update {place.step} of {settings.steps}")
    if recipe is not None and state["recipe"] is not None and recipe != state["recipe"]:
        changes = [line for line in difflib.ndiff(state["recipe"].splitlines(), recipe.splitlines()) if line[0] in "+-"]
        remarks.append(f"{run}: the recipe is not that of the checkpoint: {'; '.join(changes[:8])}")
    # nothing was sharded before there was a choice, and what else was not noted then is taken to be the same
    before = {**made, "sharding": "none", **state["made_with"]}
    changes = [f"{name} {before[name]} -> {made[name]}" for name in made if made[name] != before[name]]
    if changes:
        remarks.append(f"{run}: goes on as the same run, but not to the bit, because of {', '.join(changes)}")
    return place, remarks


def trained_on(run: Path) -> dict[str, str]:
    """`data` of `train`, as the latest checkpoint of a run has it; empty where there is none."""
    path = checkpoint.latest(run / "checkpoints", say=lambda sentence: None)
    made = {} if path is None else json.loads((path / "state.json").read_text(encoding="utf-8")).get("made_with", {})
    return {name: said for name, said in made.items() if name.startswith("data.")}


def made_with(device: torch.device, settings: TrainSettings, data: Mapping[str, str]) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same to the bit; `data` as `train` has it."""
    return {
        "torch": torch.__version__,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "sharding": settings.sharding if distributed.world_size() > 1 else "none",
        "accumulate": settings.accumulate,
        "precision": settings.precision,
        **data,
    }
