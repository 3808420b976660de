"""The training loop: one for all objectives, pretraining and fine-tuning, on one process or several.

The gradient of an update is the sum of all losses over the number of all items, over every micro-batch of every
process. An objective gives a sum and a count, and the division happens once, here, by the global count: neither the
number of micro-batches nor that of processes changes the gradient.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mmssl import distributed
from mmssl.memory import keep_freed_memory
from mmssl.training import checkpoint, health
from mmssl.training.gradients import backward, scale_gradients, share_statistics, weight_size
from mmssl.training.log import LeftOut, RunLog, Window, finite
from mmssl.training.parallel import gathered, parallelize
from mmssl.training.resume import Place, begin, held, made_with
from mmssl.training.rng import random_state, undisturbed
from mmssl.training.settings import TrainSettings
from mmssl.training.signals import StopSignal
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
    data: Mapping[str, str] | None = None,
    resume: bool = False,
) -> dict[str, float]:
    """Train an objective to the last update, and save it there.

    With `resume` a run goes on from its latest checkpoint, to the bit as if it had never stopped (with as many
    processes, micro-batches and threads), or starts where there is none yet; the next line of its log tells of the
    updates since then only. The first SIGTERM or SIGINT saves and
    exits, with status 0 for SIGTERM and, as shells have it, 130 for SIGINT; the second does what it always does.

    Args:
        objective: see `mmssl.types.Objective`. What else it may have: `skips_parameters`, true where some parameters
            get no gradient in some updates; `statistics` and `global_statistics`, see `gradients.share_statistics`.
        run: folder of the run.
        optimizer: over parameters of the objective; "lr_scale" of a group, if it has one, multiplies its rate.
        schedule: the number of an update, 1 to `steps`, -> what to multiply the optimizer's rate by.
        evaluate: the number of the last update -> numbers for the log. Called on every process at the same time, with
            the objective in evaluation mode; the random numbers that it draws change nothing in training.
        export: writes what it takes to use the model, with `checkpoint.export_encoder`; called by all processes after
            each checkpoint, or with `best` after each evaluation that is the best so far; it takes all of them to put
            sharded weights together.
        recipe: text that is kept in the run folder and in its checkpoints.
        data: what the loader reads, setting -> words that are others where the data are: kept in the checkpoints, and a
            run that goes on with other data says so.

    Returns:
        "loss" and metrics of the last line of the log, the last evaluation's numbers as "evaluation/name" and, with
        `best`, the best one as "best/name" and its update as "best/step".

    Raises:
        FileExistsError: the folder holds another run, and `resume` is false; or one is going on in it.
        RunStopped: ten attempts in a row gave no update, or a verdict of `stop_on` was reached.
        OSError: the last checkpoint could not be saved, or not exported.
        ValueError: `best` names what evaluations do not give.
    """
    if settings.best is not None and evaluate is None:
        raise ValueError(f"trainer.best={settings.best}: is told by evaluations, and there are none; set data.valid")
    device = distributed.setup(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    keep_freed_memory()
    objective.to(device).train()
    torch.manual_seed(settings.seed + distributed.rank())
    model = parallelize(objective, optimizer, device, sharded=settings.sharding == "full")
    with held(run):
        made = made_with(device, settings, data or {})
        place, remarks = begin(objective, optimizer, run, device, settings, recipe, resume, made)
        if settings.sharding == "full" and distributed.world_size() == 1:
            remarks.append("trainer.sharding=full: nothing is sharded on one process; torchrun starts several")
        loader.consumed, loader.epoch_start = place.consumed, place.epoch_start
        with (
            RunLog(run, steps=settings.steps, after=place.step, main=distributed.is_main()) as log,
            StopSignal() as stop,
        ):
            for remark in remarks:
                log.note(place.step, remark)
            return _Run(
                model=model,
                objective=objective,
                loader=loader,
                optimizer=optimizer,
                schedule=schedule,
                settings=settings,
                evaluate=evaluate,
                export=export,
                run=run,
                recipe=recipe,
                made=made,
                device=device,
                place=place,
                log=log,
                stop=stop,
            ).go()


@dataclass(kw_only=True, eq=False)
class _Run:
    """The parts of a run between its first update and its last; see `train` for those that it is given.

    model: the objective as it is called on this process: itself, or in DDP or FSDP.
    made: what `made_with` gives.
    saved, told: the update after which a checkpoint was last saved, -1 before; the signal that all processes stop for.
    unsaved, unexported: why the last checkpoint could not be saved, and the encoder not be exported; empty if they
        were.
    """

    model: nn.Module
    objective: nn.Module
    loader: Loader
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    settings: TrainSettings
    evaluate: Callable[[int], dict[str, float]] | None
    export: Callable[[], None] | None
    run: Path
    recipe: str | None
    made: Mapping[str, Any]
    device: torch.device
    place: Place
    log: RunLog
    stop: StopSignal
    saved: int = field(default=-1, init=False)
    told: int | None = field(default=None, init=False)
    unsaved: str = field(default="", init=False)
    unexported: str = field(default="", init=False)
    remark: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.world = distributed.world_size()
        self.window = Window(self.place)
        self.left_out = LeftOut(self.run)
        self.started = time.monotonic() - self.place.seconds
        self.weight_size = weight_size(self.optimizer)

    def go(self) -> dict[str, float]:
        # made after `stop`: workers that are forked inherit its handler, and so outlive a Ctrl-C until all is saved
        batches = iter(self.loader)
        try:
            return self.follow(batches)
        finally:
            if isinstance(batches, Generator):
                batches.close()  # ends its workers now, and not when somebody lets go of the traceback

    def follow(self, batches: Iterator[Batch]) -> dict[str, float]:
        settings, place = self.settings, self.place
        if self.evaluation_due:  # this update was saved before it was evaluated, as where that failed
            self.score()
        while place.step < settings.steps and not self.patient_enough:
            parts = []
            for _ in range(settings.accumulate):
                # making an epoch's workers draws random numbers, at other times in a run that was resumed
                try:
                    with undisturbed(self.device):
                        parts.append(next(batches))
                except Exception:
                    # a clip that cannot be read costs no update that was made before it; a process by itself cannot
                    # save what all hold together
                    if self.world == 1 and place.step and self.saved != place.step:
                        self.save()
                    raise
            if self.update(parts):
                if place.step == settings.steps or place.step % settings.log_every == 0:
                    self.report()
                if self.evaluation_due:
                    try:
                        self.score()
                    except Exception:
                        # whatever is wrong with the validation clips, the updates so far are not lost for it
                        if self.world == 1:
                            self.save()
                        raise
                if settings.save_every and place.step % settings.save_every == 0:
                    self.save()
            number = self.stop.number if self.world == 1 else self.told
            if number is not None and place.step < settings.steps and not self.patient_enough:
                path = self.save()
                self.check_saved()
                self.log.note(
                    place.step,
                    f"stopped by {signal.Signals(number).name} after update {place.step}, which is saved in {path}; "
                    "to go on from there, start the same run again",
                )
                # who sends SIGTERM wants room and starts the run again; Ctrl-C must end a shell's script as well
                raise SystemExit(0 if number == signal.SIGTERM else 128 + number)
        if self.saved != place.step:
            self.save()
        self.check_saved()
        if self.unexported:
            raise OSError(f"{self.unexported}; make room, and start the same run again to export it")
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
            share_statistics(self.model, self.objective, parts, self.device, settings.precision)
        losses = backward(self.model, parts, self.device, settings.precision)
        self.name_left_out(losses)
        if shares:
            self.objective.global_statistics = None  # type: ignore[assignment]
        sums = torch.tensor(
            [
                sum(loss.count for loss in losses),
                sum(len(part) for part in parts),
                self.stop.number == signal.SIGTERM,
                self.stop.number == signal.SIGINT,
            ],
            dtype=torch.float64,
        )
        count, clips, terminated, interrupted = distributed.all_reduce_sum(sums).tolist()
        place.clips += int(clips)
        # agreed on in each update, so that all processes stop after the same one
        self.told = signal.SIGTERM if terminated else signal.SIGINT if interrupted else None
        # DDP and FSDP give the mean of the processes' sums
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

    def name_left_out(self, losses: Sequence[Loss]) -> None:
        """Write down the clips that losses leave out, each once."""
        try:
            new = self.left_out.add({name: why for loss in losses for name, why in loss.left_out.items()})
        except OSError as error:  # as where the log cannot be written
            self.log.say_once(f"{self.left_out.path}: {error.strerror}, so clips that are left out are missing there")
            return
        if new:
            self.log.say_once(f"clips that are left out of the loss are named in {self.left_out.path}")

    def skip(self, number: int, count: float, losses: Sequence[Loss], parts: Sequence[Batch]) -> None:
        """Say which clips an update was skipped for; stop where that goes on."""
        place = self.place
        place.skipped += 1
        odd = [not math.isfinite(float(loss.total)) for loss in losses]
        found = [(i, wrong) for part, wrong in zip(parts, odd, strict=True) for i in part.ids]
        named = [pair for text in distributed.gather_text(json.dumps(found)) for pair in json.loads(text)]
        ids = [i for i, wrong in named if wrong] or [i for i, _ in named]
        sentence = (
            health.not_finite(number, ids)
            if count
            else health.nothing_to_learn(number, ids, sorted({loss.nothing for loss in losses} - {""}))
        )
        said = {"verdict": {"not_finite": sentence}} if count else {"note": sentence}
        self.log.write({"step": place.step, **said, "ids": ids})
        self.log.say(sentence)
        if count and "not_finite" in self.settings.stop_on:
            self.stop_for(sentence)
        if place.skipped >= _HOPELESS:
            self.stop_for(f"{_HOPELESS} attempts in a row gave no update, at last: {sentence}")

    def report(self) -> None:
        """Close a line of the log, and judge the run by it."""
        place, log = self.place, self.log
        place.seconds = time.monotonic() - self.started
        rate, left = self.window.rate(place), self.window.left(place, self.settings.steps)
        row = {"step": place.step, "lr": self.lr * self.schedule(place.step), **self.window.close(place)}
        before, self.weight_size = self.weight_size, weight_size(self.optimizer)
        row = finite(row | {"weight_size": self.weight_size, "weight_size_before": before})
        verdicts = json.loads(distributed.broadcast_text(json.dumps(health.diagnose([*log.history, row]))))
        known = log.history[-1].get("verdict", {}) if log.history else {}
        if verdicts:
            row["verdict"] = verdicts
        log.line(row, rate=rate, left=left)
        remark = self.loader.remark
        if remark != self.remark and (not self.remark or place.step == self.settings.steps):
            self.remark = remark
            log.note(place.step, remark)
        place.final |= {"loss": row["loss"], **row["metrics"]}
        for name, sentence in verdicts.items():
            if name not in known:
                log.say(f"{name}: {sentence}")
        for name in self.settings.stop_on:
            if name in verdicts:
                self.stop_for(f"{name}: {verdicts[name]}")

    @property
    def evaluation_due(self) -> bool:
        """Whether the last update is one to be evaluated after, and was not yet."""
        place, every = self.place, self.settings.eval_every
        if self.evaluate is None or not every or place.evaluated == place.step:
            return False
        return place.step == self.settings.steps or place.step % every == 0

    def score(self) -> None:
        """Evaluate, and log it."""
        assert self.evaluate is not None
        self.objective.eval()
        with undisturbed(self.device), gathered(self.model):
            scores = self.evaluate(self.place.step)
        self.objective.train()
        row = finite({"step": self.place.step, "evaluation": scores})
        self.log.evaluation(row)
        self.place.final |= {f"evaluation/{name}": value for name, value in row["evaluation"].items()}
        if self.settings.best is not None:
            self.compare(self.settings.best, row["evaluation"])
        self.place.evaluated = self.place.step

    @property
    def patient_enough(self) -> bool:
        """Whether so many evaluations in a row were no better that the run ends before its last update."""
        return self.settings.patience is not None and self.place.waited >= self.settings.patience

    def compare(self, name: str, scores: Mapping[str, float | None]) -> None:
        """Export the weights where they are the best so far. The main process judges, so that all agree."""
        place = self.place
        if distributed.broadcast_text("" if name in scores else "none"):
            raise ValueError(
                f"trainer.best={name}: evaluations of this run give none, but {', '.join(scores)}; choose one of them"
            )
        value = json.loads(distributed.broadcast_text(json.dumps(scores.get(name))))
        sign = 1 if name in ("accuracy", "map") else -1
        if value is not None and (place.best is None or sign * value > sign * place.best):
            self.write_export()
            # where it failed, some of the files may be new: the next evaluation writes them all again
            place.best, place.best_step, place.waited = None if self.unexported else value, place.step, 0
            place.final |= {f"best/{name}": value, "best/step": place.step}
        else:
            place.waited += 1
            if self.patient_enough:
                said = f"{name} was not finite in {place.waited} evaluations, so the run ends"
                if place.best is not None:
                    said = (
                        f"{name} was best after update {place.best_step}, with {place.best:.5g}, and {place.waited} "
                        "evaluations since then were no better, so the run ends"
                    )
                self.log.say(said)
                self.log.write({"step": place.step, "note": said, "ended": True})

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
        state = asdict(place) | {"recipe": self.recipe, "made_with": self.made}
        unsaved = ""
        try:
            checkpoint.save(path.parent, self.objective, self.optimizer, rng=rng, state=state, keep=self.settings.keep)
        except OSError as error:
            unsaved = f"{path}: could not be saved ({error.strerror or error})"
            self.log.note(place.step, f"{unsaved}; the checkpoint before it stays")
        # the main process alone writes, and so alone knows
        self.unsaved = distributed.broadcast_text(unsaved)
        if not self.unsaved:
            self.saved = place.step
            if place.best is None:
                self.write_export()
        return path

    def write_export(self) -> None:
        """Write what it takes to use the model. A full disk is no reason to end a run here either."""
        unexported = ""
        try:
            if self.export is not None:
                self.export()
        except OSError as error:
            unexported = f"{error.filename or self.run}: could not be exported ({error.strerror or error})"
            saved = (
                "no checkpoint yet"
                if self.saved < 0
                else f"the checkpoint {self.run}/checkpoints/step_{self.saved} is saved"
            )
            self.log.note(self.place.step, f"{unexported}; {saved}")
        self.unexported = distributed.broadcast_text(unexported)

    def check_saved(self) -> None:
        if self.unsaved:
            raise OSError(f"{self.unsaved}; make room, and start the same run again to go on from its last checkpoint")

    def stop_for(self, reason: str) -> None:
        self.place.skipped = 0
        path = self.save()
        self.check_saved()
        self.log.note(self.place.step, f"stopped after update {self.place.step}, which is saved in {path}")
        raise RunStopped(reason)

    @property
    def lr(self) -> float:
        return float(self.optimizer.defaults["lr"])
