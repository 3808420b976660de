"""What is wrong with a run while it is wrong: small functions over the lines of its log.

Each takes the history, oldest line first, and gives a sentence or None. A line is what `log.jsonl` holds: "step",
"loss", "lr" (of AdamW), "grad_norm", "weight_size" (see `gradients`), "weight_size_before" (at the line before, or
where the run began or went on), and "metrics", in which these names are looked for, each only where the objective gives
it:

    accuracy, chance_accuracy            of a choice, and what equal guesses would have
    code_perplexity, soft_perplexity     codewords in use in a codebook, by choices and by probabilities
    codes                                codewords in a codebook
    unit_perplexity, target_perplexity   labels that there are to be told apart, as if all came alike
    prediction_std, target_std           how far predictions and targets differ from one token to another
    feature_std                          the same of the frontend's normalized features
    teacher_decay                        of the moving average that gives the targets
    target_norms                         how often those targets are normalized

Where several modalities learn in turn, these are "image/accuracy" and so on, and each modality is judged by its own.

There are three kinds of verdicts. What a run was set up with is wrong from its first line: a teacher that is no slow
one, targets whose scale nothing holds. What no healthy run shows at any time is named within some fifty updates:
targets that are exactly alike, or shrink; weights that are replaced rather than learned. All else is normal at the
start, and waits for `_PATIENCE`. Not seen: targets that differ by place alone and are the same for every clip, as the
deviation is over places and clips together.
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
# Updates whose lines must agree on what is wrong from the start on.
_EARLY = 50
# Targets of random weights differ by .1 and more. Those that are the same up to rounding are an error and no state that
# training passes through: a codebook of zeros, one unit for all of the data.
_SAME = 1e-4
# the share of the commonest label above which there is nothing to tell apart
_ONE_LABEL = 0.99
# labels in use, as if all came alike: of two that come nine times and once it is 1.4
_FEW_LABELS = 1.5
# What a teacher makes may have any scale from the start. Normalized, it keeps that within a factor of two or so; what
# has lost nine tenths of its deviation before a run is old enough for `_CONSTANT` is on its way there.
_SHRUNK = 0.1
# Of the decays that BYOL and MoCo tried, 0 fails in both, .9 learns a little less than .99, and neither tried others
# between (Grill et al. 2020, arXiv:2006.07733, table 5; He et al. 2020, arXiv:1911.05722, section 4.1).
_SLOW = 0.9
# AdamW moves a weight by about the rate at each update, whatever the gradient. New weights are .02 (wide) to .15
# (narrow), so the rates of the shipped recipes are a hundredth to a quarter of them; at half, two updates replace them.
_SHARE = 0.5
# In 200 updates to and fro weights move by 14 rates: at 1e-3 they stay about as large as they were, at .1 they are soon
# ten times as large, or less where the gradient dies before. Over thousands of updates healthy ones may grow as well.
_GROWTH = 3.0
_GROWTH_UPDATES = 200


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
        "a lower rate, a longer warm-up or, of wav2vec2, a larger diversity_weight revives a codebook"
    )


def chance_plateau(history: Sequence[Line]) -> str | None:
    """The accuracy is that of guessing."""
    accuracies, chances = _recent(history, "accuracy"), _recent(history, "chance_accuracy")
    if not accuracies or not chances:
        return None
    rates = [rate for line in history[-_LINES:] if (rate := line.get("lr")) is not None]
    if rates and rates[-1] > rates[0]:
        return None  # long warm-ups take tens of thousands of updates, and what they begin with is no rate to learn at
    if any(a >= c + _ABOVE_CHANCE * c * (1 - c) for a, c in zip(accuracies, chances, strict=True)):
        return None
    return (
        f"accuracy {accuracies[-1]:.4f} is that of guessing ({chances[-1]:.4f}) and has been for {_span(history)} "
        "updates; try another rate, a longer warm-up, larger batches or shorter masks"
    )


def constant_prediction(history: Sequence[Line]) -> str | None:
    """Predictions, targets or features do not depend on the input, or no longer."""
    commonest = _lately(history, "chance_accuracy")
    if commonest and min(commonest) > _ONE_LABEL:
        return f"all targets are alike: the commonest is {commonest[0]:.1%} of them, so there is nothing to tell apart"
    for name in ("unit_perplexity", "target_perplexity"):
        labels = _lately(history, name)
        if labels and max(labels) < _FEW_LABELS:
            return f"nearly all targets are alike: {labels[0]:.1f} labels are in use; write them anew, with more codes"
    for what in ("target", "feature"):
        recent, lately = _recent(history, f"{what}_std"), _lately(history, f"{what}_std")
        if (recent and max(recent) < _CONSTANT) or (lately and max(lately) < _SAME):
            deviation = recent[-1] if recent else lately[0]
            return f"all {what}s are alike: their deviation is {deviation:.2g}; what is to be predicted has collapsed"
    lately, first = _lately(history, "target_std"), _metric(history[0], "target_std") if history else None
    if lately and first and history[-1]["step"] <= _PATIENCE and max(lately) < _SHRUNK * first:
        return (
            f"the targets shrink: their deviation is {lately[0]:.2g}, and was {first:.2g} at update "
            f"{history[0]['step']}; a lower rate, a slower teacher or normalized targets keep them apart"
        )
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


def high_rate(history: Sequence[Line]) -> str | None:
    """Updates replace what the ones before them learned: they are nearly as large as the weights, or these explode."""
    now, rate = (history[-1].get(name) if history else None for name in ("weight_size", "lr"))
    if now is None:
        return None
    if rate is not None and rate > _SHARE * now:
        return (
            f"the rate is {rate:.3g} and a typical weight {now:.3g}, which each update moves by about the rate; a rate "
            f"below {_SHARE * now:.2g} lets weights learn"
        )
    for i, line in enumerate(history):
        updates = history[-1]["step"] - (history[i - 1]["step"] if i else 0)
        before = line.get("weight_size_before")
        # a log of few lines is judged by its last one, however many updates that tells of
        if (updates > _GROWTH_UPDATES and line is not history[-1]) or before is None or now <= _GROWTH * before:
            continue
        return (
            f"a typical weight is {now:.3g}, and was {before:.3g} only {updates} updates before, so little is left of "
            "what it had learned; a lower rate is the first thing to try"
        )
    return None


def fast_teacher(history: Sequence[Line]) -> str | None:
    """The teacher is hardly slower than the student, and the targets move with what predicts them."""
    decay = _metric(history[-1], "teacher_decay") if history else None
    if decay is None or decay >= _SLOW:
        return None
    return (
        f"the teacher's decay is {decay:.3g}, so it is the student of the last {1 / (1 - decay):.0f} updates and no "
        "slow average, and targets and predictions may collapse together; set objective.ema_decay to .99 or more"
    )


def free_targets(history: Sequence[Line]) -> str | None:
    """Nothing holds the scale of targets that the model makes itself."""
    if not history or _metric(history[-1], "target_norms") != 0:
        return None
    return (
        "the targets are not normalized, so the loss can be lowered by shrinking them; set objective.layer_norm to "
        "instance, or objective.target_norm to layer"
    )


def not_finite(step: int, ids: Sequence[str]) -> str:
    """The sentence for an update whose gradient is not finite; the loop knows this without any history.

    Args:
        ids: the clips whose loss is not finite, or all of the update where each loss is and the gradient is not.
    """
    return f"NaN or infinity at update {step} from these clips: {_shown(ids, 8)}; the update is skipped"


def nothing_to_learn(step: int, ids: Sequence[str], reasons: Sequence[str]) -> str:
    """The sentence for an update whose losses count no item.

    Args:
        ids: all clips of the update.
        reasons: `Loss.nothing` of them, where there is one.
    """
    why = f" ({'; '.join(reasons)})" if reasons else ""
    return f"update {step} is skipped: its {len(ids)} clips hold nothing to learn from{why}: {_shown(ids, 3)}"


VERDICTS: dict[str, Callable[[Sequence[Line]], str | None]] = {
    "dead_codebook": dead_codebook,
    "chance_plateau": chance_plateau,
    "constant_prediction": constant_prediction,
    "exploding_gradient": exploding_gradient,
    "high_rate": high_rate,
    "fast_teacher": fast_teacher,
    "free_targets": free_targets,
}
# what `stop_on` may name
NAMES = (*VERDICTS, "not_finite")


def diagnose(history: Sequence[Line]) -> dict[str, str]:
    """Name -> sentence of every verdict on a run's log so far."""
    said = {name: verdict(history) for name, verdict in VERDICTS.items()}
    found = {name: sentence for name, sentence in said.items() if sentence is not None}
    for part in dict.fromkeys(
        name.partition("/")[0] for line in history for name in line.get("metrics", {}) if "/" in name
    ):
        own = _of(part, history)
        for name, verdict in VERDICTS.items():
            if name not in found and (sentence := verdict(own)) is not None:
                found[name] = f"{part}: {sentence}"
    return found


def _of(part: str, history: Sequence[Line]) -> list[Line]:
    """The lines that have metrics "part/name", with these alone."""
    lines: list[Line] = []
    for line in history:
        own = {
            name.removeprefix(f"{part}/"): value
            for name, value in line.get("metrics", {}).items()
            if name.startswith(f"{part}/")
        }
        if own:
            # a modality is as old as its own updates
            lines.append({"step": own.pop("updates", line["step"]), "lr": line.get("lr"), "metrics": own})
    return lines


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


def _lately(history: Sequence[Line], name: str) -> list[float]:
    """A metric's values over the last `_EARLY` updates at least, latest first; none where one is missing."""
    values: list[float] = []
    for i in reversed(range(len(history))):
        value = _metric(history[i], name)
        if value is None:
            return []
        values.append(value)
        if history[-1]["step"] - (history[i - 1]["step"] if i else 0) >= _EARLY:
            return values
    return []


def _span(history: Sequence[Line]) -> int:
    """Updates that the last lines tell of."""
    before = history[-_LINES - 1]["step"] if len(history) > _LINES else 0
    return int(history[-1]["step"] - before)
