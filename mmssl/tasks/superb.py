"""Of the tasks of `mmssl evaluate`: SUPERB's protocol, on the labels, speakers and transcripts that a manifest has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal
from unicodedata import normalize

import torch
from torch import Tensor

from mmssl.data.manifest import Manifest
from mmssl.data.text import CharVocabulary, Classes
from mmssl.embed import Embedder
from mmssl.evaluation.protocol import Split, choose, hold_out, measure
from mmssl.evaluation.score import Score
from mmssl.evaluation.speech import error_rates
from mmssl.evaluation.superb import fit_spelling, fit_superb, n_updates
from mmssl.evaluation.verification import all_pairs, said_pairs, verify
from mmssl.tasks.labelled import Clips, fitting_of, labelled, manifest_of
from mmssl.types import Encoded, Raw, Tokens

Part = Literal["superb", "superb-verify", "superb-ctc"]


def measure_superb(
    embedder: Embedder,
    task: Part,
    test: Clips,
    *,
    train: Clips,
    valid: Clips | None = None,
    by: str | None = None,
    label: str = "label",
    labels_per_class: int | None = None,
    label_share: float | None = None,
    draws: int = 5,
    **settings: Any,
) -> dict[str, Score]:
    """A frozen encoder with learned weights of its layers and a small head; the rate is searched on validation.

    Layers 0 to the last are computed once and kept, of whole clips their means, for characters all of their tokens.

    Args:
        task: "superb" tells classes: keywords, intents, speakers. "superb-verify" learns to tell those of `train`, and
            compares clips of `test`, whose classes may be others. "superb-ctc" spells the "text" of rows.
        test, train, valid, by, label, labels_per_class, label_share, draws, settings: see `evaluate`.

    Returns:
        {"accuracy"}, {"eer", ...} or {"wer", "cer"}. The weight of each layer is in `details["weights"]`, which
        `read_weighting` reads from what --out writes.

    Raises:
        ValueError: an encoder without layers, or see `fit_superb` and `fit_spelling`.
    """
    if not embedder.depth:
        raise ValueError(f"task={task}: {embedder.name} has no layers to weight; leave the baseline out")
    layers = list(range(embedder.depth + 1))
    if task == "superb-ctc":
        if by is not None:
            raise ValueError(f"by={by}: superb-ctc chooses on validation clips; leave by out")
        return _spelled(embedder, layers, manifest_of(train), valid, manifest_of(test), settings)

    def collect(clips: Clips, by: str | None = None, classes: Classes | None = None) -> tuple[Split, int]:
        manifest = manifest_of(clips)
        given: dict[str, Any] = {"classes": classes or known, "label": label, "by": by, "layers": layers, **settings}
        found, skipped = labelled(embedder, manifest, **given)
        return replace(found, features=torch.cat([found.layers[i] for i in layers], 1)), skipped

    known = Classes.from_labels(manifest_of(train).values(label))
    few = labels_per_class is not None or label_share is not None
    given = fitting_of(collect, train, valid, by=by, choose=True, few=few)
    fit = partial(fit_superb, layers=len(layers), refit=given.refit, device=embedder.device)
    if task == "superb":
        testing, also = collect(test)
        note = _note(embedder, given.said, given.skipped + also)
        share: dict[str, Any] = {"per_class": labels_per_class, "share": label_share, "draws": draws}
        score = measure(fit, given.train, given.valid, testing, task=task, note=note, **share)
        return {"accuracy": replace(score, details={**score.details, "layer": "weighted", "encoder": embedder.name})}
    own = Classes.from_labels(manifest_of(test).values(label))
    testing, also = collect(test, classes=own)
    _, fitted = choose(fit, given.train, given.valid)
    [one] = fitted.values()
    assert one.vectors is not None
    first, second, target = all_pairs(testing.labels)
    which = said_pairs(first, len(testing))
    scores = verify(one.vectors(testing.layers[-1]), first, second, target, center=None, trials=which)
    new = len(set(own.names) - set(known.names))
    said = f"vectors before the last layer of: {one.protocol}; {new} of {len(own)} classes are not among those of train"
    note = _note(embedder, given.said, given.skipped + also)
    return {
        name: replace(
            score,
            task=task,
            protocol=f"{score.protocol}; {said}; {note}",
            details={**score.details, **one.details, "encoder": embedder.name},
        )
        for name, score in scores.items()
    }


def _spelled(
    embedder: Embedder,
    layers: Sequence[int],
    train: Manifest,
    valid: Clips | None,
    test: Manifest,
    settings: dict[str, Any],
) -> dict[str, Score]:
    """Word and character errors of a head that spells from frozen layers."""

    def collect(manifest: Manifest) -> tuple[list[Tensor], list[str], int]:
        texts = [normalize("NFC", text) for text in manifest.values("text")]
        found: dict[int, Tensor] = {}

        def see(places: list[int], raw: Raw, given: Tokens, encoded: Encoded, stack: list[Tensor]) -> None:
            if given.axes != ("t",):
                raise ValueError(f"task=superb-ctc: spells along time, and tokens lie on {', '.join(given.axes)}")
            for row, (place, length) in enumerate(zip(places, given.lengths.tolist(), strict=True)):
                own = [x[row, encoded.n_prefix : encoded.n_prefix + length].float().cpu() for x in stack]
                found[place] = torch.stack(own, 1)

        embedder.each_batch(manifest, see, layers=layers, **settings)
        places = sorted(found)
        return [found[place] for place in places], [texts[place] for place in places], len(texts) - len(places)

    clips, texts, skipped = collect(train)
    said = ""
    if valid is None:
        rest, held = hold_out(torch.zeros(len(clips), dtype=torch.int64))
        choosing, truth = [clips[i] for i in held.tolist()], [texts[i] for i in held.tolist()]
        clips, texts = [clips[i] for i in rest.tolist()], [texts[i] for i in rest.tolist()]
        said = "; validation is a fifth of the training clips"
    else:
        choosing, truth, also = collect(manifest_of(valid))
        skipped += also
    vocabulary = CharVocabulary.from_texts(texts)

    def errors(found: list[list[int]]) -> float:
        return error_rates(truth, [vocabulary.decode(row) for row in found], decoding="best path")["cer"].value

    speller = fit_spelling(
        (clips, [vocabulary.encode(text) for text in texts]),
        choosing,
        n_characters=len(vocabulary),
        errors=errors,
        device=embedder.device,
    )
    testing, right, also = collect(test)
    rates = error_rates(
        right, [vocabulary.decode(row) for row in speller(testing)], decoding="best path, no language model"
    )
    weights = {str(i): float(weight) for i, weight in enumerate(speller.head.layers.weights)}
    short = len(clips) - speller.clips
    said += f"; {short} training clips too short for their transcripts left out" if short else ""
    how = (
        f"SUPERB: frozen, learned weights of {len(layers)} layers, two LSTMs both ways, fitted on train, "
        f"{n_updates(speller.clips)} updates of Adam, rate = {speller.rate:g} (on validation, its CER "
        f"{100 * speller.valid_errors:.1f} %); test touched once; {_note(embedder, said, skipped + also)}"
    )
    details = {"rate": speller.rate, "weights": weights, "encoder": embedder.name}
    return {
        name: replace(rate, task="superb-ctc", protocol=f"{rate.protocol}; {how}", details={**rate.details, **details})
        for name, rate in rates.items()
    }


def _note(embedder: Embedder, said: str, skipped: int) -> str:
    return f"{embedder.name}{said}" + (f"; {skipped} clips could not be read" if skipped else "")
