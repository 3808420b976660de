"""What is wrong with a run while it is wrong: small functions over the lines of its log.

Each takes the history, oldest line first, and gives a sentence or None. A line is what `log.jsonl` holds: "step",
"loss", "grad_norm", and "metrics", in which these names are looked for, each only where the objective gives it:

    accuracy, chance_accuracy            of a choice, and what equal guesses would have
    code_perplexity, soft_perplexity     codewords in use in a codebook, by choices and by probabilities
    codes                                codewords in a codebook
    prediction_std, target_std           how far predictions and targets differ from one token to another
    feature_std                          the same of the frontend's normalized features

Nothing is said before a run is some way in (see `_PATIENCE`), because every one of these is normal at the start.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]

# A verdict needs this many lines in a row that agree, so that one odd batch condemns nothing, ...
_LINES = 5
# ... and this many updates: random weights sit at chance and use few codes, and even short warm-ups take some hundred.
_PATIENCE = 500
# Chance accuracy plus half of it, less where chance is high. Of 1,000 frames with 100 negatives each, sampling noise is
# a third of chance: five lines in a row do not pass this by luck, and whatever has begun to learn is soon far above.
_ABOVE_CHANCE = 0.5
# Codes in use in a codebook: a collapsed one has 1 (the known dead end of wav2vec 2.0 is perplexity 2 of 640 over two
# codebooks), and 2 where it only tells speech from silence; of a large codebook, a share of 2 % is as dead.
_LIVE_CODES = 2.0
_LIVE_SHARE = 0.02
# data2vec's released code gives up after 5,000 updates below .1 for its normalized targets and .01 for predictions;
# this is the lower of the two, relative to the targets for predictions, so that honest small variation is not blamed.
_CONSTANT = 0.01
# Norms fall by about ten over a run and jump by ten on an odd batch; the mean over the updates of a line is neither
# when it is a hundred times the usual.
_EXPLODED = 100.0
# lines that tell what is usual
_USUAL = 20


def dead_codebook(history: Sequence[Line]) -> str | None:
    """Nearly all frames choose the same codeword: the contrast is then trivial, however low its loss."""
    recent = _recent(history, "code_perplexity")
    if not recent:
        return None
    codes = _metric(history[-1], "codes")
    least = max(_LIVE_CODES, _LIVE_SHARE * codes) if codes else _LIVE_CODES
    if max(recent) >= least:
        return None
    of = f" of {codes:.0f}" if codes else ""
    soft = _metric(history[-1], "soft_perplexity")
    beside = f" (by their probabilities {soft:.1f})" if soft is not None else ""
    return (
        f"only {recent[-1]:.1f}{of} codewords are in use{beside}, fewer than {least:.1f} for {_span(history)} updates; "
        "a lower rate, a longer warm-up or a larger diversity_weight revives a codebook"
    )


def chance_plateau(history: Sequence[Line]) -> str | None:
    """The accuracy is that of guessing."""
    accuracies, chances = _recent(history, "accuracy"), _recent(history, "chance_accuracy")
    if not accuracies or not chances:
        return None
    if any(a >= c + _ABOVE_CHANCE * c * (1 - c) for a, c in zip(accuracies, chances, strict=True)):
        return None
    return (
        f"accuracy {accuracies[-1]:.4f} is that of guessing ({chances[-1]:.4f}) and has been for {_span(history)} "
        "updates; try another rate, a longer warm-up, larger batches or shorter masks"
    )


def constant_prediction(history: Sequence[Line]) -> str | None:
    """Predictions, targets or features no longer depend on the input."""
    for what in ("target", "feature"):
        recent = _recent(history, f"{what}_std")
        if recent and max(recent) < _CONSTANT:
            return f"all {what}s are alike: their deviation is {recent[-1]:.2g}; what is to be predicted has collapsed"
    predictions, targets = _recent(history, "prediction_std"), _recent(history, "target_std")
    targets = targets or [1.0] * len(predictions)
    if not predictions or any(p >= _CONSTANT * t for p, t in zip(predictions, targets, strict=True)):
        return None
    return (
        f"all predictions are alike: their deviation is {predictions[-1]:.2g}, that of the targets {targets[-1]:.2g}; "
        "a lower rate or a longer warm-up is the first thing to try"
    )


def exploding_gradient(history: Sequence[Line]) -> str | None:
    """The gradient is far larger than it used to be."""
    norms = [line["grad_norm"] for line in history if line.get("grad_norm") is not None]
    if len(norms) <= _LINES:
        return None
    usual = statistics.median(norms[-_USUAL - 1 : -1])
    if norms[-1] <= _EXPLODED * usual:
        return None
    return (
        f"the gradient's norm is {norms[-1]:.3g}, {norms[-1] / usual if usual else float('inf'):.0f} times its usual "
        f"{usual:.3g}; lower the rate, or set trainer.clip"
    )


def not_finite(step: int, ids: Sequence[str]) -> str:
    """The sentence for an update whose gradient is not finite; the loop knows this without any history.

    Args:
        ids: the clips whose loss is not finite, or all of the update where each loss is and the gradient is not.
    """
    return f"NaN or infinity at update {step} from these clips: {_shown(ids, 8)}; the update is skipped"


def nothing_to_learn(step: int, ids: Sequence[str]) -> str:
    """The sentence for an update whose losses count no item.

    Args:
        ids: all clips of the update.
    """
    return f"update {step} is skipped: its {len(ids)} clips hold nothing to learn from: {_shown(ids, 3)}"


VERDICTS: dict[str, Callable[[Sequence[Line]], str | None]] = {
    "dead_codebook": dead_codebook,
    "chance_plateau": chance_plateau,
    "constant_prediction": constant_prediction,
    "exploding_gradient": exploding_gradient,
}
# what `stop_on` may name
NAMES = (*VERDICTS, "not_finite")


def diagnose(history: Sequence[Line]) -> dict[str, str]:
    """Name -> sentence of every verdict on a run's log so far."""
    said = {name: verdict(history) for name, verdict in VERDICTS.items()}
    return {name: sentence for name, sentence in said.items() if sentence is not None}


def _shown(ids: Sequence[str], most: int) -> str:
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def _metric(line: Line, name: str) -> float | None:
    return line.get("metrics", {}).get(name)


def _recent(history: Sequence[Line], name: str) -> list[float]:
    """A metric's last values; none where the run is young, or where one of them is missing."""
    if len(history) < _LINES or history[-1]["step"] < _PATIENCE:
        return []
    values = [_metric(line, name) for line in history[-_LINES:]]
    return [value for value in values if value is not None] if None not in values else []


def _span(history: Sequence[Line]) -> int:
    """Updates that the last lines tell of."""
    before = history[-_LINES - 1]["step"] if len(history) > _LINES else 0
    return int(history[-1]["step"] - before)
