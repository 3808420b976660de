"""The learning rate over a run: the number of an update -> what to multiply the rate by.

Updates count 1, 2, ..., `steps`; warm-up grows linearly from 0, so its last update has the full rate and its first one
is not wasted. Every schedule reaches `final` at the last update and stays there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def constant(step: int, *, steps: int, warmup: float = 0) -> float:
    """The full rate after warm-up.

    Args:
        warmup: updates; a share of all of them where it is below 1.
    """
    return _warm(step, _updates(warmup, steps))


def warmup_cosine(step: int, *, steps: int, warmup: float = 0, final: float = 0.0) -> float:
    """Down along half a cosine after warm-up.

    Source: Loshchilov and Hutter 2017 (arXiv:1608.03983) without restarts; warm-up as in He et al. 2022.

    Args:
        warmup: updates; a share of all of them where it is below 1.
        final: multiplier of the last update.
    """
    first = _updates(warmup, steps)
    if step <= first:
        return _warm(step, first)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * _done(step, first, steps)))


def polynomial(step: int, *, steps: int, warmup: float = 0, power: float = 1.0, final: float = 0.0) -> float:
    """Down along (1 - share done) ** power after warm-up; a straight line by default, as for wav2vec 2.0.

    Args:
        warmup: updates; a share of all of them where it is below 1.
        final: multiplier of the last update.
    """
    if power <= 0:
        raise ValueError(f"schedule.power={power:g}: must be above 0")
    first = _updates(warmup, steps)
    if step <= first:
        return _warm(step, first)
    return final + (1 - final) * (1 - _done(step, first, steps)) ** power


def linear(step: int, *, steps: int, warmup: float = 0, final: float = 0.0) -> float:
    """Down along a straight line after warm-up: `polynomial` of power 1."""
    return polynomial(step, steps=steps, warmup=warmup, final=final)


def tri_stage(
    step: int,
    *,
    steps: int,
    phases: Sequence[float] = (0.1, 0.4, 0.5),
    initial: float = 0.01,
    final: float = 0.05,
) -> float:
    """Up along a straight line, level, then down exponentially.

    Source: Park et al. 2019 (arXiv:1904.08779), section 4.2; shares and multipliers as wav2vec 2.0 is fine-tuned.

    Args:
        phases: shares of the updates that go up, level and down; they sum to 1.
        initial: multiplier before the first update.
        final: multiplier of the last update.
    """
    if len(phases) != 3 or not math.isclose(sum(phases), 1.0, abs_tol=1e-6) or min(phases) < 0:
        raise ValueError(f"schedule.phases={list(phases)}: three shares of the updates that sum to 1 are wanted")
    if final <= 0:
        raise ValueError(f"schedule.final={final:g}: must be above 0, which an exponential never reaches")
    up = round(phases[0] * steps)
    level = up + round(phases[1] * steps)
    if step <= up:
        return initial + (1 - initial) * step / up
    if step <= level:
        return 1.0
    return final ** _done(step, level, steps)


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "linear": linear,
    "polynomial": polynomial,
    "tri_stage": tri_stage,
    "warmup_cosine": warmup_cosine,
}


def _updates(warmup: float, steps: int) -> int:
    first = round(warmup * steps) if warmup < 1 else int(warmup)
    if not 0 <= first <= steps:
        raise ValueError(
            f"schedule.warmup={warmup}: must be from 0 to the {steps} updates of the run (trainer.steps), "
            "or a share of them below 1"
        )
    return first


def _warm(step: int, first: int) -> float:
    return min(1.0, step / first) if first else 1.0


def _done(step: int, first: int, steps: int) -> float:
    """Share of the updates after `first` that are done with this one."""
    return min(1.0, (step - first) / (steps - first)) if steps > first else 1.0
