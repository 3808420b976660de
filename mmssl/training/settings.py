"""What the section `trainer` of a recipe may say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmssl.training import health


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a run is trained, whatever it trains.

    Args:
        steps: optimizer updates in the whole run.
        accumulate: micro-batches of each process for one update.
        precision: of the forward pass; weights, gradients and losses are float32 in both.
        sharding: with several processes, "none" has all weights in each of them, "full" spreads weights, gradients and
            the optimizer's memory over them, for models that are too large for one device; the updates are the same.
        clip: largest norm of the gradient; longer ones are shortened to it.
        seed: of dropout, together with the rank; the caller builds the objective and the loader from it as well.
        log_every, save_every, eval_every: updates between two lines of the log, two checkpoints, two evaluations. 0
            checkpoints are saved at the end alone, and 0 evaluates never.
        keep: checkpoints to keep.
        best: the number of an evaluation by which the run's best weights are told, the least "loss", "wer" or "cer" or
            the greatest "accuracy" or "map" (mean average precision, where a clip has several classes): those are
            exported, and not the last ones. Checkpoints to go on from are the last.
        patience: evaluations in a row that do not better it, after which the run ends.
        stop_on: verdicts (see health.py) that end the run.
        device: "auto" takes a GPU if there is one.
        threads: that torch computes with on the CPU; its own choice by default.

    Raises:
        ValueError: a value outside its range.
    """

    steps: int
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    sharding: Literal["none", "full"] = "none"
    clip: float | None = None
    seed: int = 0
    log_every: int = 50
    save_every: int = 1000
    eval_every: int = 0
    keep: int = 2
    best: Literal["loss", "wer", "cer", "accuracy", "map"] | None = None
    patience: int | None = None
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
        if self.seed >= 2**63:
            raise ValueError(f"trainer.seed={self.seed}: must be below 2^63")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"trainer.precision={self.precision}: must be float32 or bfloat16")
        if self.sharding not in ("none", "full"):
            raise ValueError(f"trainer.sharding={self.sharding}: must be none or full")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"trainer.clip={self.clip}: must be above 0; leave it out for no clipping")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"trainer.threads={self.threads}: must be at least 1; leave it out for torch's own choice")
        if self.best not in (None, "loss", "wer", "cer", "accuracy", "map"):
            raise ValueError(f"trainer.best={self.best}: must be loss, wer, cer, accuracy or map")
        if self.best is not None and not self.eval_every:
            raise ValueError(f"trainer.best={self.best}: is told by evaluations; set trainer.eval_every")
        if self.patience is not None and (self.patience < 1 or self.best is None):
            raise ValueError(
                f"trainer.patience={self.patience}: must be at least 1, and wait for something: set trainer.best"
            )
        for name in self.stop_on:
            if name not in health.NAMES:
                raise ValueError(f"trainer.stop_on: no verdict is called '{name}'; one of: {', '.join(health.NAMES)}")
