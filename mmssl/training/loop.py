"""The training loop: one for all objectives, pretraining and fine-tuning, on one process or several.

The gradient of an update is the sum of all losses over the number of all items, over every micro-batch of every
process. An objective gives a sum and a count, and the division happens once, here, by the global count: neither the
number of micro-batches nor that of processes changes the gradient.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from mmssl import distributed
from mmssl.training import checkpoint, health
from mmssl.training.log import RunLog, finite
from mmssl.types import Batch, Loss

# One odd clip costs one update; what goes on for this many in a row does not mend itself.
_HOPELESS = 10


class Loader(Protocol):
    """Gives the micro-batches of this process for ever, epoch after epoch.

    The order of micro-batches is one for all processes together, and rank r of W takes every W-th from the r-th on, so
    that how far a run has come is one number.

    consumed: micro-batches that all processes together were given; set before iterating to go on from there.
    epoch_start: the epoch of the last one, and the micro-batches before it; set as well, so that no epoch before it
        must be counted.
    remark: what is to be said about clips that were left out; empty where there are none.
    """

    consumed: int
    epoch_start: tuple[int, int]

    @property
    def remark(self) -> str: ...

    def __iter__(self) -> Iterator[Batch]: ...


class RunStopped(RuntimeError):
    """A run that ended before its last update, for the reason that the message gives. It was saved."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a run is trained, whatever it trains.

    Args:
        steps: optimizer updates in the whole run.
        accumulate: micro-batches of each process for one update.
        precision: of the forward pass; weights, gradients and losses are float32 in both.
        clip: largest norm of the gradient; longer ones are shortened to it.
        seed: of dropout, together with the rank; the caller builds the objective and the loader from it as well.
        log_every, save_every, eval_every: updates between two lines of the log, two checkpoints, two evaluations; 0 is
            only at the end, and for evaluation never.
        keep: checkpoints to keep.
        stop_on: verdicts (see health.py) that end the run.
        device: "auto" takes a GPU if there is one.
        threads: that torch computes with on the CPU; its own choice by default.

    Raises:
        ValueError: a value outside its range.
    """

    steps: int
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    clip: float | None = None
    seed: int = 0
    log_every: int = 50
    save_every: int = 1000
    eval_every: int = 0
    keep: int = 2
    stop_on: Sequence[str] = ()
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name}={getattr(self, name)}: must be at least 1")
        for name in ("save_every", "eval_every", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"trainer.{name}={getattr(self, name)}: must be at least 0")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"trainer.precision={self.precision}: must be float32 or bfloat16")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"trainer.clip={self.clip}: must be above 0; leave it out for no clipping")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"trainer.threads={self.threads}: must be at least 1; leave it out for torch's own choice")
        for name in self.stop_on:
            if name not in health.NAMES:
                raise ValueError(f"trainer.stop_on: no verdict is called '{name}'; one of: {', '.join(health.NAMES)}")


@dataclass
class Place:
    """How far a run has come: what a checkpoint holds beside tensors and recipe.

    step: optimizer updates made.
    consumed, epoch_start: see `Loader`.
    clips: that all processes together were given.
    seconds: that the run took, without the time between being cut off and going on.
    skipped: attempts in a row that gave no update.
    final: what `train` returns if nothing follows; None for what is not finite.
    """

    step: int = 0
    consumed: int = 0
    clips: int = 0
    seconds: float = 0.0
    skipped: int = 0
    final: dict[str, float | None] = field(default_factory=dict)
    epoch_start: tuple[int, int] = (0, 0)


def train(
    objective: nn.Module,
    loader: Loader,
    *,
    run: Path,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    settings: TrainSettings,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    export: Callable[[], None] | None = None,
    recipe: str | None = None,
    resume: bool = False,
) -> dict[str, float]:
    """Train an objective to the last update, and save it there.

    With `resume` a run goes on from its latest checkpoint, to the bit as if it had never stopped (with as many
    processes, micro-batches and threads), or starts where there is none yet. The first SIGTERM or SIGINT saves and
    exits with status 0; the second does what it always does.

    Args:
        objective: see `mmssl.types.Objective`. What else it may have: `skips_parameters`, true where some parameters
            get no gradient in some updates; `statistics` and `global_statistics`, see `share_statistics`.
        run: folder of the run.
        optimizer: over parameters of the objective; "lr_scale" of a group, if it has one, multiplies its rate.
        schedule: the number of an update, 1 to `steps`, -> what to multiply the optimizer's rate by.
        evaluate: the number of the last update -> numbers for the log. Called on every process at the same time, with
            the objective in evaluation mode; the random numbers that it draws change nothing in training.
        export: writes what it takes to use the model; called by the main process after each checkpoint.
        recipe: text that is kept in the run folder and in its checkpoints.

    Returns:
        "loss" and metrics of the last line of the log, and the last evaluation's numbers as "evaluation/name".

    Raises:
        FileExistsError: the folder holds another run, and `resume` is false.
        RunStopped: ten attempts in a row gave no update, or a verdict of `stop_on` was reached.
        OSError: the last checkpoint could not be saved.
    """
    device = distributed.setup(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    objective.to(device).train()
    torch.manual_seed(settings.seed + distributed.rank())
    place, remarks = _start(objective, optimizer, run, device, settings, recipe, resume)
    loader.consumed, loader.epoch_start = place.consumed, place.epoch_start
    with (
        RunLog(run, steps=settings.steps, after=place.step, main=distributed.is_main()) as log,
        StopSignal() as stop,
    ):
        for remark in remarks:
            log.note(place.step, remark)
        return _Run(
            objective, optimizer, schedule, settings, evaluate, export, run, recipe, device, place, log, stop
        ).go(loader)


class _Run:
    """The parts of a run between its first update and its last."""

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        settings: TrainSettings,
        evaluate: Callable[[int], dict[str, float]] | None,
        export: Callable[[], None] | None,
        run: Path,
        recipe: str | None,
        device: torch.device,
        place: Place,
        log: RunLog,
        stop: StopSignal,
    ) -> None:
        self.objective, self.optimizer, self.schedule = objective, optimizer, schedule
        self.settings, self.evaluate, self.export, self.run, self.recipe = settings, evaluate, export, run, recipe
        self.device, self.place, self.log, self.stop = device, place, log, stop
        self.world = distributed.world_size()
        self.model: nn.Module = objective
        if self.world > 1:
            skips = getattr(objective, "skips_parameters", False)
            # buffers are equal on all processes without being sent: they count updates, or make up a teacher
            self.model = DistributedDataParallel(objective, find_unused_parameters=skips, broadcast_buffers=False)
        self.window = Window(place)
        self.started = time.monotonic() - place.seconds
        self.saved = -1
        self.unsaved = ""
        self.signals = 0.0
        self.remark = ""

    def go(self, loader: Loader) -> dict[str, float]:
        self.loader = loader
        # made after `stop`: workers that are forked inherit its handler, and so outlive a Ctrl-C until all is saved
        batches = iter(loader)
        try:
            return self.follow(batches)
        finally:
            if isinstance(batches, Generator):
                batches.close()  # ends its workers now, and not when somebody lets go of the traceback

    def follow(self, batches: Iterator[Batch]) -> dict[str, float]:
        settings, place = self.settings, self.place
        while place.step < settings.steps:
            parts = []
            for _ in range(settings.accumulate):
                # making an epoch's workers draws random numbers, at other times in a run that was resumed
                try:
                    with undisturbed(self.device):
                        parts.append(next(batches))
                except Exception:
                    # a clip that cannot be read costs no update that was made before it
                    if place.step and self.saved != place.step:
                        self.save()
                    raise
            if self.update(parts):
                last = place.step == settings.steps
                if last or place.step % settings.log_every == 0:
                    self.report()
                if settings.eval_every and (last or place.step % settings.eval_every == 0):
                    try:
                        self.score()
                    except Exception:
                        # whatever is wrong with the validation clips, the updates so far are not lost for it
                        self.save()
                        raise
                if settings.save_every and place.step % settings.save_every == 0:
                    self.save()
            if self.stopping():
                path = self.save()
                self.check_saved()
                self.log.note(
                    place.step,
                    f"stopped by {self.stop.name} after update {place.step}, which is saved in {path}; "
                    "to go on from there, start the same run again",
                )
                raise SystemExit(0)
        if self.saved != place.step:
            self.save()
        self.check_saved()
        return {name: math.nan if value is None else value for name, value in place.final.items()}

    def update(self, parts: Sequence[Batch]) -> bool:
        """One optimizer update from the micro-batches of this process; false where it had to be skipped."""
        place, settings = self.place, self.settings
        place.consumed += len(parts) * self.world
        place.epoch_start = self.loader.epoch_start
        number = place.step + 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0) * self.schedule(number)
        shares = hasattr(self.objective, "statistics") and len(parts) * self.world > 1
        if shares:
            share_statistics(self.objective, parts, self.device, settings.precision)
        losses = backward(self.model, parts, self.device, settings.precision)
        if shares:
            self.objective.global_statistics = None  # type: ignore[assignment]
        sums = torch.tensor(
            [sum(loss.count for loss in losses), sum(len(part) for part in parts), self.stop.requested],
            dtype=torch.float64,
        )
        count, clips, self.signals = distributed.all_reduce_sum(sums).tolist()
        place.clips += int(clips)
        # DDP gives the mean of the processes' sums
        norm = scale_gradients(self.optimizer, self.world / count, settings.clip) if count else 0.0
        good = count > 0 and math.isfinite(norm)
        if good:
            self.optimizer.step()
            place.step, place.skipped = number, 0
        self.objective.zero_grad(set_to_none=True)
        if good:
            self.objective.after_step(number)  # type: ignore[operator]
            self.window.add(losses, norm)
            self.log.advance(number, loss=self.window.last_loss, rate=self.window.rate(place))
        else:
            self.skip(number, count, losses, parts)
        return good

    def skip(self, number: int, count: float, losses: Sequence[Loss], parts: Sequence[Batch]) -> None:
        """Say which clips an update was skipped for; stop where that goes on."""
        place = self.place
        place.skipped += 1
        odd = [not math.isfinite(float(loss.total)) for loss in losses]
        found = [(i, wrong) for part, wrong in zip(parts, odd, strict=True) for i in part.ids]
        named = [pair for text in distributed.gather_text(json.dumps(found)) for pair in json.loads(text)]
        ids = [i for i, wrong in named if wrong] or [i for i, _ in named]
        if count:
            sentence = health.not_finite(number, ids)
            self.log.write({"step": place.step, "verdict": {"not_finite": sentence}, "ids": ids})
            self.log.say(sentence)
        else:
            sentence = f"update {number} is skipped: in none of these clips was there anything to learn from: {ids}"
            self.log.note(place.step, sentence)
        if count and "not_finite" in self.settings.stop_on:
            self.stop_for(sentence)
        if place.skipped >= _HOPELESS:
            self.stop_for(f"{_HOPELESS} attempts in a row gave no update, at last: {sentence}")

    def report(self) -> None:
        """Close a line of the log, and judge the run by it."""
        place, log = self.place, self.log
        place.seconds = time.monotonic() - self.started
        rate, left = self.window.rate(place), self.window.left(place, self.settings.steps)
        row = finite({"step": place.step, "lr": self.lr * self.schedule(place.step), **self.window.close(place)})
        verdicts = json.loads(distributed.broadcast_text(json.dumps(health.diagnose([*log.history, row]))))
        before = log.history[-1].get("verdict", {}) if log.history else {}
        if verdicts:
            row["verdict"] = verdicts
        log.line(row, rate=rate, left=left)
        remark = self.loader.remark
        if remark != self.remark and (not self.remark or place.step == self.settings.steps):
            self.remark = remark
            log.note(place.step, remark)
        place.final |= {"loss": row["loss"], **row["metrics"]}
        for name, sentence in verdicts.items():
            if name not in before:
                log.say(f"{name}: {sentence}")
        for name in self.settings.stop_on:
            if name in verdicts:
                self.stop_for(f"{name}: {verdicts[name]}")

    def score(self) -> None:
        """Evaluate, and log it."""
        if self.evaluate is None:
            return
        self.objective.eval()
        with undisturbed(self.device):
            scores = self.evaluate(self.place.step)
        self.objective.train()
        row = finite({"step": self.place.step, "evaluation": scores})
        self.log.write(row)
        self.log.say(f"update {self.place.step}  " + "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        self.place.final |= {f"evaluation/{name}": value for name, value in row["evaluation"].items()}

    def save(self) -> Path:
        """Save a checkpoint. A full disk is no reason to end a run: there may be room the next time."""
        place = self.place
        path = self.run / "checkpoints" / f"step_{place.step}"
        place.seconds = time.monotonic() - self.started
        rng = {
            f"{rank}.{name}": state
            for name, own in random_state(self.device).items()
            for rank, state in enumerate(distributed.all_gather(own))
        }
        unsaved = ""
        if distributed.is_main():
            state = asdict(place) | {"recipe": self.recipe, "made_with": _made_with(self.device, self.settings)}
            try:
                checkpoint.save(
                    path.parent, self.objective, self.optimizer, rng=rng, state=state, keep=self.settings.keep
                )
                if self.export is not None:
                    self.export()
            except OSError as error:
                unsaved = f"{path}: could not be saved ({error.strerror or error})"
                self.log.note(place.step, f"{unsaved}; the checkpoint before it stays")
        self.unsaved = distributed.broadcast_text(unsaved)
        if not self.unsaved:
            self.saved = place.step
        return path

    def check_saved(self) -> None:
        if self.unsaved:
            raise OSError(f"{self.unsaved}; make room, and start the same run again to go on from its last checkpoint")

    def stopping(self) -> bool:
        """Whether any process was told to stop; agreed on in each update, so that all stop after the same one."""
        return self.signals > 0 or (self.world == 1 and self.stop.requested)

    def stop_for(self, reason: str) -> None:
        self.place.skipped = 0
        path = self.save()
        self.check_saved()
        self.log.note(self.place.step, f"stopped after update {self.place.step}, which is saved in {path}")
        raise RunStopped(reason)

    @property
    def lr(self) -> float:
        return float(self.optimizer.defaults["lr"])


def backward(model: nn.Module, parts: Sequence[Batch], device: torch.device, precision: str) -> list[Loss]:
    """Add up the gradients of micro-batches; with several processes, over these too, once.

    Raises:
        ValueError: a loss has no gradient.
    """
    losses = []
    for number, part in enumerate(parts, 1):
        with contextlib.ExitStack() as stack:
            if isinstance(model, DistributedDataParallel) and number < len(parts):
                stack.enter_context(model.no_sync())
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                loss: Loss = model(part.to(device))
            if not loss.total.requires_grad:
                raise ValueError(
                    "the loss has no gradient: an objective that finds nothing to learn from in a batch should return "
                    "a sum that is zero but depends on its parameters, with a count of zero"
                )
            loss.total.backward()
        metrics = {n: (v.detach() if isinstance(v, Tensor) else v, count) for n, (v, count) in loss.metrics.items()}
        losses.append(Loss(loss.total.detach(), loss.count, metrics))
    return losses


def share_statistics(objective: nn.Module, parts: Sequence[Batch], device: torch.device, precision: str) -> None:
    """Tell an objective the sums over the whole batch that its loss needs beside a sum over clips.

    A term such as the diversity of codes is a function of a mean over the whole batch. `objective.statistics(batch)`
    gives the sums of a part; their total over all parts becomes `objective.global_statistics`, a constant to which
    the objective adds its own part's gradient. The gradients of the parts then add up exactly.
    """
    with (
        undisturbed(device),
        torch.no_grad(),
        # a context of its own: within one, weights cast without gradient would be used again with gradient
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        sums = [objective.statistics(part.to(device)) for part in parts]  # type: ignore[operator]
    objective.global_statistics = distributed.all_reduce_sum(torch.stack(sums).sum(0))


def scale_gradients(optimizer: torch.optim.Optimizer, factor: float, clip: float | None) -> float:
    """Multiply all gradients by a factor, and shorten them together to norm `clip`; gives the norm before clipping."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = float(get_total_norm(gradients)) * factor
    if clip is not None and norm > clip:
        factor *= clip / norm
    if gradients and math.isfinite(norm):
        torch._foreach_mul_(gradients, factor)
    return norm


class Window:
    """What has happened since the last line of the log."""

    def __init__(self, place: Place) -> None:
        self._open(place)

    def _open(self, place: Place) -> None:
        self._losses: list[Loss] = []
        self._norms: list[float] = []
        self._step, self._clips, self._start = place.step, place.clips, time.monotonic()
        self.last_loss = math.nan

    def add(self, losses: Sequence[Loss], norm: float) -> None:
        self._losses += losses
        self._norms.append(norm)
        count = sum(loss.count for loss in losses)
        self.last_loss = sum(float(loss.total) for loss in losses) / count if count else math.nan

    def rate(self, place: Place) -> float:
        """Clips a second, of all processes."""
        return (place.clips - self._clips) / max(time.monotonic() - self._start, 1e-9)

    def left(self, place: Place, steps: int) -> float:
        """Seconds to the end of the run."""
        return (steps - place.step) * (time.monotonic() - self._start) / max(place.step - self._step, 1)

    def close(self, place: Place) -> dict[str, Any]:
        """The means over all clips of all processes, and a new window."""
        sums: dict[str, tuple[float, float]] = {}
        for loss in self._losses:
            for name, (value, count) in {**loss.metrics, "/loss": (loss.total, loss.count)}.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + float(value), before[1] + float(count))
        shares = [json.loads(text) for text in distributed.gather_text(json.dumps(sums))]
        means = {}
        for name in dict.fromkeys(name for share in shares for name in share):
            value, count = (sum(share[name][i] for share in shares if name in share) for i in (0, 1))
            means[name] = value / count if count else math.nan
        row = {
            "loss": means.pop("/loss"),
            "metrics": means,
            "grad_norm": sum(self._norms) / len(self._norms),
            "grad_norm_max": max(self._norms),
            "seconds": place.seconds,
            "clips": place.clips,
        }
        self._open(place)
        return row


class StopSignal:
    """Remembers the first SIGTERM or SIGINT instead of dying of it; the second finds the handlers that were there."""

    def __init__(self) -> None:
        self.name = "a signal to another process"
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        # Python lets only the main thread set handlers
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.name = signal.Signals(number).name
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside leaves no trace in the random numbers that follow."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


def _start(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: Path,
    device: torch.device,
    settings: TrainSettings,
    recipe: str | None,
    resume: bool,
) -> tuple[Place, list[str]]:
    """Where the run begins, and what is to be said about it. The main process looks, so that all agree."""
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
    place = Place(**{name: state[name] for name in Place.__dataclass_fields__ if name in state})
    place.epoch_start = (place.epoch_start[0], place.epoch_start[1])  # a list as JSON has it
    remarks.append(f"{run}: goes on after update {place.step} of {settings.steps}")
    if recipe is not None and state["recipe"] is not None and recipe != state["recipe"]:
        changes = [line for line in difflib.ndiff(state["recipe"].splitlines(), recipe.splitlines()) if line[0] in "+-"]
        remarks.append(f"{run}: the recipe is not that of the checkpoint: {'; '.join(changes[:8])}")
    now = _made_with(device, settings)
    changes = [
        f"{name} {state['made_with'].get(name)} -> {now[name]}"
        for name in now
        if now[name] != state["made_with"].get(name)
    ]
    if changes:
        remarks.append(f"{run}: goes on as the same run, but not to the bit, because of {', '.join(changes)}")
    return place, remarks


def _made_with(device: torch.device, settings: TrainSettings) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same to the bit."""
    return {
        "torch": torch.__version__,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "accumulate": settings.accumulate,
        "precision": settings.precision,
    }
