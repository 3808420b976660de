"""What a run says: one JSON object a line for programs, event files for TensorBoard, a bar or lines for people."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmssl import distributed
from mmssl.training.resume import Place
from mmssl.types import Loss

# of all that log.jsonl holds, what a line on the screen has room for
_SHOWN = ("loss", "accuracy", "chance_accuracy", "code_perplexity", "grad_norm")
_EVALUATED = ("loss", "accuracy", "chance_accuracy", "map", "wer", "cer")


class LeftOut:
    """The clips that an objective leaves out of its loss, each named once in a run, in `left_out.jsonl`.

    Several processes share the file: each names its own clips that nobody has named before.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / "left_out.jsonl"
        self._ids: set[str] = set()

    def add(self, found: Mapping[str, str]) -> bool:
        """Note clips, id -> why; whether there are new ones.

        Raises:
            OSError: the file cannot be read or written; the clips are named when they are met again.
        """
        if found.keys() <= self._ids:
            return False
        if self.path.exists():  # what other processes wrote in the meantime, and this run before it was cut off
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # half a line, where a machine failed
                    self._ids.add(json.loads(line)["id"])
        new = {name: reason for name, reason in found.items() if name not in self._ids}
        if new:
            _append(self.path, "".join(json.dumps({"id": name, "reason": why}) + "\n" for name, why in new.items()))
        self._ids |= new.keys()
        return bool(new)


class RunLog:
    """The log of a run. On all processes but the main one nothing is written or shown.

    A line of `log.jsonl` has "step" and what `write` is given. NaN and infinity are no JSON: they are written as null,
    and their names are listed under "not_finite".

    Args:
        run: folder of the run.
        steps: updates in the whole run.
        after: the update that the run goes on from. Lines of later ones were written by a run that was cut off after
            its last checkpoint; they are removed, because the same updates are made again.
        main: whether this is the main process.
    """

    def __init__(self, run: Path, *, steps: int, after: int = 0, main: bool = True) -> None:
        self.run, self.steps, self.main = run, steps, main
        self.history: list[dict[str, Any]] = []
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._events: Any = None
        self._after = after
        self._said: set[str] = set()
        if main:
            run.mkdir(parents=True, exist_ok=True)
            self._recall(after)

    def __enter__(self) -> RunLog:
        if self.main and self._console.is_terminal:
            self._bar = Progress(
                TextColumn(self.run.name),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4g}"),
                TextColumn("{task.fields[rate]:.1f} clips/s"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=self.steps, completed=self._after, loss=math.nan, rate=math.nan)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._events is not None:
            try:
                self._events.close()
            except OSError as problem:
                self.say(f"{self.run / 'events'}: {problem.strerror}, so the last events are missing")

    def say(self, sentence: str) -> None:
        """One line for the user."""
        if self.main:
            self._console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def say_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self.say(sentence)

    def note(self, step: int, sentence: str) -> None:
        """A line for the user that is worth keeping in the log as well."""
        self.say(sentence)
        self.write({"step": step, "note": sentence})

    def advance(self, step: int, *, loss: float, rate: float) -> None:
        """Move the bar, where there is one."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss, rate=rate)

    def line(self, row: Mapping[str, Any], *, rate: float, left: float) -> None:
        """Write a line of training: keep it for the verdicts, and print it where there is no bar.

        Args:
            row: as health.py describes it.
            rate: clips a second.
            left: seconds to the end of the run.
        """
        clean = self.write(row)
        self.history.append(clean)
        if self._bar is None:
            numbers = {"loss": clean["loss"], **clean["metrics"], "grad_norm": clean["grad_norm"]}
            # of several modalities in turn, the loss of each as well
            names = [name for name in _SHOWN if name in numbers] + [name for name in numbers if name.endswith("/loss")]
            shown = "  ".join(_number(name, numbers[name]) for name in names)
            time = timedelta(seconds=round(left))
            self.say(f"update {clean['step']}/{self.steps}  {shown}  {rate:.1f} clips/s  {time} left")

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of an evaluation, `row["evaluation"]`, and print the few that a reader looks for first."""
        scores = self.write(row)["evaluation"]
        names = [name for name in _EVALUATED if name in scores] or list(scores)[: len(_EVALUATED)]
        self.say(f"validation after update {row['step']}: {'  '.join(_number(name, scores[name]) for name in names)}")

    def write(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Append a line to log.jsonl and its numbers to the event files; gives it back without NaN."""
        clean = finite(row)
        if self.main:
            try:
                _append(self._path, json.dumps(clean, allow_nan=False) + "\n")
                self._write_events(clean)
            except OSError as error:
                # a full disk must not end a run that could still be saved when there is room again
                self.say_once(f"{self.run}: {error.strerror}, so lines of the log are missing")
        return clean

    @property
    def _path(self) -> Path:
        return self.run / "log.jsonl"

    def _recall(self, after: int) -> None:
        """Read the lines up to an update, and drop what follows: later lines, and one that was cut off."""
        if not self._path.is_file():
            return
        kept = []
        text = self._path.read_text(encoding="utf-8")
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row["step"] <= after:
                kept.append(line)
                if "loss" in row:
                    self.history.append(row)
        wanted = "".join(line + "\n" for line in kept)
        if wanted != text:
            new = self._path.with_suffix(".tmp")
            new.write_text(wanted, encoding="utf-8")
            os.replace(new, self._path)

    def _write_events(self, row: Mapping[str, Any]) -> None:
        numbers = {"train/" + name: value for name, value in row.get("metrics", {}).items()}
        numbers |= {"train/" + name: row[name] for name in ("loss", "lr", "grad_norm") if name in row}
        numbers |= {"evaluation/" + name: value for name, value in row.get("evaluation", {}).items()}
        if not numbers:
            return
        if self._events is None:
            if importlib.util.find_spec("tensorboard") is None:
                self.say_once("TensorBoard is not installed, so no event files are written: pip install 'mmssl[tb]'")
                return
            # takes a second and a half to import, so not before there is something to write
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.run / "events"), purge_step=self._after + 1)
        for name, value in numbers.items():
            if value is not None:
                self._events.add_scalar(name, value, row["step"])


def _number(name: str, value: float | None) -> str:
    return f"{name} {'nan' if value is None else format(value, '.4g')}"


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


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with None for every number that is not finite, and their names under "not_finite"."""
    clean, names = _finite(row)
    return clean | {"not_finite": names} if names else clean


def _finite(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The row with None for every number that is not finite, and their names."""
    clean: dict[str, Any] = {}
    missing: list[str] = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            clean[name], inner = _finite(value)
            missing += inner
        elif isinstance(value, float) and not math.isfinite(value):
            clean[name] = None
            missing.append(name)
        else:
            clean[name] = value
    return clean, missing


def _append(path: Path, lines: str) -> None:
    """All of it or nothing, so that the next line does not go on where half of this one ended."""
    data = lines.encode()
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        if file.write(data) < len(data):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
