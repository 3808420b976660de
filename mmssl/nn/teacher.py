"""A slow copy of a network that gives targets and takes no gradient."""

from __future__ import annotations

import copy as copying
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class Teacher(nn.Module):
    """An exponential moving average of a student's weights, in float32, always in evaluation mode.

    Source: Tarvainen and Valpola 2017 (arXiv:1703.01780), section 2. An objective moves it once for each update of the
    optimizer, in `after_step`, and nowhere else; it is part of the objective's state, so it survives a resume.

    Args:
        student: copied as it is now.
        copy: parameters to copy at each update rather than to average: full names, or names of modules that hold
            them. Buffers are always copied.

    Attributes:
        averaged, copied: which parameter and which buffer is which, by name.
        decay: of the last update; 1 before the first.

    Raises:
        ValueError: a name in `copy` is none of the student's.
    """

    def __init__(self, student: nn.Module, *, copy: Iterable[str] = ()) -> None:
        super().__init__()
        self.module = copying.deepcopy(student).float().requires_grad_(False)
        chosen = list(copy)
        names = [name for name, _ in student.named_parameters()]
        for part in chosen:
            if not any(_belongs(name, part) for name in names):
                raise ValueError(f"teacher: copy={part!r} names no parameter of {type(student).__name__}")
        self.averaged = [name for name in names if not any(_belongs(name, part) for part in chosen)]
        self.copied = [name for name in names if name not in set(self.averaged)]
        self.copied += [name for name, _ in student.named_buffers()]
        self.decay = 1.0
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """A teacher has no training mode: a target must not depend on dropout."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module, decay: float) -> None:
        """Move towards the student: weight <- decay * weight + (1 - decay) * student's.

        Raises:
            ValueError: decay outside [0, 1].
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"ema_decay={decay}: must lie between 0 and 1")
        self.decay = decay
        theirs = dict(student.named_parameters()) | dict(student.named_buffers())
        ours = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        if self.averaged:
            new = [theirs[name].detach().float() for name in self.averaged]
            # One call for all weights: a loop over parameters is an order of magnitude slower on a GPU.
            torch._foreach_lerp_([ours[name] for name in self.averaged], new, 1 - decay)
        for name in self.copied:
            ours[name].copy_(theirs[name])


def ema_decay(step: int, *, first: float, last: float, updates: int) -> float:
    """The decay of update number `step`: a straight line from `first`, before any, to `last` at `updates`, and level.

    Source: Baevski et al. 2022, data2vec (arXiv:2202.03555), section 3.3. A function of the optimizer's updates, so
    neither accumulation nor resuming changes it.
    """
    return first + (last - first) * min(step / updates, 1.0) if updates else last


def _belongs(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")
