"""What `mmssl evaluate` measures: an encoder, or a baseline in its place, on the clips of manifests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args
from unicodedata import normalize

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.build import build_encoder
from mmssl.data.manifest import Manifest
from mmssl.data.text import Classes
from mmssl.embed import Embedder, Layer, Precision, load
from mmssl.evaluation.attentive import fit_attentive
from mmssl.evaluation.clusters import cluster
from mmssl.evaluation.geometry import measure_rank
from mmssl.evaluation.knn import fit_knn
from mmssl.evaluation.layers import layer_plot
from mmssl.evaluation.novelty import measure_novelty
from mmssl.evaluation.probe import STRENGTHS, fit_linear
from mmssl.evaluation.protocol import Fit, Split, balanced_accuracy, measure, said_balanced
from mmssl.evaluation.retrieval import retrieve
from mmssl.evaluation.score import Score, average_precisions, student, wilson
from mmssl.evaluation.speech import error_rates
from mmssl.evaluation.verification import all_pairs, read_trials, said_pairs, verify
from mmssl.modalities import MODALITIES
from mmssl.tasks import Baseline, Task
from mmssl.tasks.crossmodal import retrieval, zero_shot
from mmssl.tasks.labelled import Clips, fitting_of, labelled, labelled_tokens, manifest_of, numbers_of
from mmssl.tasks.layerwise import measure_layers
from mmssl.tasks.robustness import measure_robustness
from mmssl.tasks.superb import measure_superb
from mmssl.types import Encoded, Raw, Tokens

# what may be fitted on few labels, what is fitted, what goes by frozen features, and what of that reads no classes
_FEW: tuple[Task, ...] = ("linear", "knn", "attentive", "superb", "layers")
_FITTED: tuple[Task, ...] = (*_FEW, "superb-verify", "superb-ctc", "corruption")
_FROZEN: tuple[Task, ...] = (*_FITTED, "cluster", "retrieval", "verify", "rank", "ood")
_UNLABELLED: tuple[Task, ...] = ("rank", "ood", "superb-ctc")


def evaluate(
    run: str | Path | Embedder,
    *,
    task: Task = "linear",
    test: Clips,
    train: Clips | None = None,
    valid: Clips | None = None,
    modality: str | None = None,
    classes: str | Path | None = None,
    same: str | None = None,
    layer: int | Mapping[int, float] | Sequence[Layer] | Literal["select", "all"] = "select",
    pool: str = "mean",
    label: str = "label",
    by: str | None = None,
    strength: float | None = None,
    labels_per_class: int | None = None,
    label_share: float | None = None,
    draws: int = 5,
    k: int | Sequence[int] = 20,
    beam: int | None = None,
    lm: str | Path | None = None,
    lm_weight: float = 2.0,
    word_score: float = 0.0,
    spans: int = 1,
    crops: int = 1,
    trials: str | Path | None = None,
    ood: Clips | None = None,
    plot: str | Path | None = None,
    against: str | Path | None = None,
    baseline: Baseline | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "float32",
    batch_size: int = 16,
    on_bad_clip: Literal["raise", "skip"] = "raise",
    progress: bool = False,
) -> dict[str, Score]:
    """Measure a run by one protocol, which the score states.

    "linear" and "knn" fit a logistic regression or a nearest-neighbor classifier on frozen features of `train`, and
    "attentive" a query that looks at all tokens of a clip; layer and settings are chosen on `valid`, and `test` is
    touched once. "classify" and "ctc" measure what a fine-tuned run says of the clips of `test`, and fit nothing.
    "retrieval" and "zero-shot" measure a run on several modalities, see `crossmodal`, and fit nothing either. The
    others measure the frozen features of `test` themselves, of one layer, and choose nothing: "cluster", how far
    k-means finds the classes; "retrieval" of one modality, how far up a clip finds those of its class; "verify", how
    well pairs of one class are told from pairs of two; "rank", of how many directions features make use, without
    labels; "ood", how well clips of another kind are told by their distance from `train`. "layers" measures what each
    layer holds, see `measure_layers`; "superb", "superb-verify" and "superb-ctc" are SUPERB's protocol, see
    `measure_superb`; "corruption" what a linear probe of clean clips gets wrong of spoiled ones, see
    `measure_robustness`.

    Args:
        run: see `mmssl.load`; or an `Embedder`.
        train, valid, test: manifests. Where something is to be chosen and there is no `valid`, a fifth of the training
            clips is set aside for it, drawn by class; once chosen, what is fitted sees them too, unless `train` is to
            be used with few labels. "retrieval" of one modality searches `train`, or without it the other clips.
        modality: see `Embedder.embed`. With it "retrieval" is of that modality alone.
        classes: of "zero-shot", see `crossmodal.read_prompts`.
        same: of "retrieval", a key such as "text": members of rows that agree in it are right as well.
        layer: see `Embedder.embed`; "select" or "all" chooses among all of them, the output after the final norm
            included; where nothing is chosen, and for "attentive", which keeps all tokens in memory, it is that output.
            A mapping {layer: weight} is one layer.
        pool: see `Pool.named`.
        label: the key of a row that holds its class.
        by: a key such as "speaker": settings are chosen by leaving out each of its values in `train` in turn, and there
            is no `valid`.
        strength: C of "linear", where it is not to be chosen.
        labels_per_class, label_share: fit on a few labels only, in `draws` random draws.
        k: of "knn"; of several the best on validation. Of "ood", the neighbor whose distance counts.
        beam, lm, lm_weight, word_score: of "ctc", see `Embedder.predict`.
        spans, crops: of "classify", see `Embedder.probabilities`.
        trials: of "verify", the pairs to tell: see `read_trials`; None for all pairs of clips, or a draw where they are
            too many.
        ood: of "ood", manifest of the clips to be told from those of `test`.
        plot: of "layers", a file for the values of each layer as a picture, SVG.
        against: of "corruption", JSON of the same scores of another model, to which errors are relative.
        baseline: measure this in place of the encoder: "random", the same network with new weights (from `seed`);
            "pixels", the raw picture; "logmel", log-mel energies every 10 ms. Read and pooled as for the encoder.
        device, precision: see `mmssl.load`.
        batch_size, on_bad_clip, progress: see `Embedder.embed`. Clips that are skipped are not measured; the protocol
            line counts them.

    Returns:
        {"accuracy": Score}; {"wer": Score, "cer": Score} for "ctc"; {"map": Score}, the mean average precision, for
        "classify" where clips have several classes; {"image_to_text_at_1": Score, ...} for "retrieval", of one
        modality {"map", "at_1", "at_5", "at_10"}; {"nmi", "ari"} for "cluster", {"eer", "min_dcf_0.01",
        "min_dcf_0.05"} for "verify", {"rank_me", "spread"} for "rank", {"auroc"} for "ood"; for "layers" see
        `measure_layers`, for "corruption" `measure_robustness`, for "superb" and so on `measure_superb`.

    Raises:
        ValueError: something that this task needs is missing, or manifests that do not fit each other.
    """
    if task not in get_args(Task):
        raise ValueError(f"task={task!r}: choose {_one_of(get_args(Task))}")
    layer = "select" if layer == "all" else layer
    # setting -> the tasks that it is for, its value, and what leaves it out
    own: dict[str, tuple[Sequence[Task], Any, Any]] = {
        "train": ((*_FITTED, "retrieval", "verify", "ood"), train, None),
        "valid": (_FITTED, valid, None),
        "by": (_FITTED, by, None),
        "layer": (_FROZEN, layer, "select"),
        "pool": (_FROZEN, pool, "mean"),
        "label": ([*(one for one in _FROZEN if one not in _UNLABELLED), "classify", "zero-shot"], label, "label"),
        "strength": (("linear", "layers", "corruption"), strength, None),
        "draws": (_FEW, draws, 5),
        "k": (("knn", "ood"), k, 20),
        "seed": (_FROZEN, seed, 0),
        "spans": (["classify"], spans, 1),
        "crops": (["classify"], crops, 1),
        "beam": (["ctc"], beam, None),
        "lm": (["ctc"], lm, None),
        "lm_weight": (["ctc"], lm_weight, 2.0),
        "word_score": (["ctc"], word_score, 0.0),
        "trials": (["verify"], trials, None),
        "ood": (["ood"], ood, None),
        "plot": (["layers"], plot, None),
        "against": (["corruption"], against, None),
        "classes": (["zero-shot"], classes, None),
        "same": (["retrieval"], same, None),
    }
    for name, (tasks, value, absent) in own.items():
        if value != absent and task not in tasks:
            shown = value.path if isinstance(value, Manifest) else value
            raise ValueError(f"{name}={shown}: is for task {_one_of(tasks)} only; leave {name} out")
    few = labels_per_class is not None or label_share is not None
    if isinstance(layer, Mapping):
        layer = [tuple(sorted((int(i), float(weight)) for i, weight in layer.items()))]
    if few and task not in _FEW:
        raise ValueError(f"labels_per_class={labels_per_class}, label_share={label_share}: {task} takes no few labels")
    embedder = run if isinstance(run, Embedder) else load(run, device=device, precision=precision)
    crossing = task == "retrieval" and modality is None and len(embedder.modalities) > 1
    if task == "retrieval":
        _one_kind_of_retrieval(crossing, train=train, layer=layer, pool=pool, label=label, same=same)
    if crossing or task == "zero-shot":
        if baseline is not None:
            raise ValueError(
                f"baseline={baseline}: {task} goes by a space of several modalities; leave the baseline out"
            )
        common: dict[str, Any] = {"batch_size": batch_size, "on_bad_clip": on_bad_clip, "progress": progress}
        if crossing:
            return retrieval(embedder, manifest_of(test), same=same, **common)
        if classes is None:
            raise ValueError("task=zero-shot: give a file with the names of classes (classes, --classes)")
        return zero_shot(embedder, manifest_of(test), classes=classes, modality=modality, label=label, **common)
    embedder = embedder.of(modality)
    if baseline is not None:
        embedder = as_baseline(embedder, baseline, seed=seed)
    settings: dict[str, Any] = {"batch_size": batch_size, "on_bad_clip": on_bad_clip, "progress": progress}
    if task == "ood" and ood is None:
        raise ValueError("task=ood: tells clips of another kind from those of test; give their manifest as ood")
    if task in ("classify", "ctc"):
        if baseline is not None:
            raise ValueError(f"baseline={baseline}: {task} measures what a fine-tuned run says; leave the baseline out")
        search = {"beam": beam, "lm": lm, "lm_weight": lm_weight, "word_score": word_score}
        views = {"spans": spans, "crops": crops}
        return _fine_tuned(embedder, task, manifest_of(test), label, search, views, settings)
    if task == "layers":
        if layer != "select":
            raise ValueError(f"layer={layer}: task layers measures all of them; leave layer out")
        scores = measure_layers(
            embedder,
            test,
            train=train,
            valid=valid,
            by=by,
            label=label,
            pool=pool,
            strength=strength,
            labels_per_class=labels_per_class,
            label_share=label_share,
            draws=draws,
            **settings,
        )
        if plot is not None:
            Path(plot).parent.mkdir(parents=True, exist_ok=True)
            Path(plot).write_text(layer_plot(scores), encoding="utf-8")
        return scores
    if task in ("cluster", "retrieval", "verify", "rank", "ood"):
        return _frozen(embedder, task, test, train, ood, trials, layer, pool, label, k, settings)
    if train is None:
        raise ValueError(f"task={task}: is fitted on labelled clips, give their manifest as train")

    if task in ("superb", "superb-verify", "superb-ctc"):
        if layer != "select" or pool != "mean":
            raise ValueError(f"layer={layer}, pool={pool!r}: {task} weights all layers and takes means; leave both out")
        return measure_superb(
            embedder,
            task,
            test,
            train=train,
            valid=valid,
            by=by,
            label=label,
            labels_per_class=labels_per_class,
            label_share=label_share,
            draws=draws,
            **settings,
        )
    if task == "attentive" and pool != "mean":
        raise ValueError(f"pool={pool!r}: attentive pools by attention; leave pool out")

    layers: list[Layer]
    if layer == "select" and task == "attentive":
        layers = [-1]
    elif layer == "select":
        layers = [-1, *range(embedder.depth + 1)] if embedder.depth else [-1]
    else:
        layers = [layer] if isinstance(layer, int) else list(layer)
    if task == "corruption":
        return measure_robustness(
            embedder,
            test,
            train=train,
            valid=valid,
            by=by,
            label=label,
            layers=layers,
            pool=pool,
            strength=strength,
            against=against,
            seed=seed,
            **settings,
        )
    known = Classes.from_labels(manifest_of(train).values(label))

    def collect(clips: Clips, by: str | None = None) -> tuple[Split, int]:
        given: dict[str, Any] = {"classes": known, "label": label, "by": by, "layers": layers, **settings}
        if task == "attentive":
            return labelled_tokens(embedder, manifest_of(clips), **given)
        return labelled(embedder, manifest_of(clips), pool=pool, **given)

    chosen_anyway = task == "attentive" or (task == "linear" and strength is None)
    choose = chosen_anyway or len(layers) > 1 or not isinstance(k, int)
    given = fitting_of(collect, train, valid, by=by, choose=choose, few=few)
    testing, also = collect(test)
    skipped = given.skipped + also

    if task == "linear":
        fit: Fit = partial(fit_linear, refit=given.refit, strengths=STRENGTHS if strength is None else strength)
    elif task == "attentive":
        fit, pool = partial(fit_attentive, refit=given.refit, device=embedder.device), "attention"
    else:
        fit = partial(fit_knn, refit=given.refit, k=k)
    note = f"{embedder.name}, pool {pool}{given.said}" + (f"; {skipped} clips could not be read" if skipped else "")
    score = measure(
        fit,
        given.train,
        given.valid,
        testing,
        task=task,
        per_class=labels_per_class,
        share=label_share,
        draws=draws,
        note=note,
    )
    return {"accuracy": replace(score, details={**score.details, "pool": pool, "encoder": embedder.name})}


def _one_of(names: Sequence[str]) -> str:
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _one_kind_of_retrieval(crossing: bool, **given: Any) -> None:
    """Raises ValueError where a setting is of the other kind: between modalities, or by the classes of one."""
    absent = {"train": None, "layer": "select", "pool": "mean", "label": "label"} if crossing else {"same": None}
    for name, value in absent.items():
        if given[name] != value:
            shown = given[name].path if isinstance(given[name], Manifest) else given[name]
            way = (
                "retrieval between modalities goes by their common space; leave it out, or name one modality"
                if crossing
                else "is for retrieval between modalities; in one, label names the key of what is right"
            )
            raise ValueError(f"{name}={shown}: {way}")


def _frozen(
    embedder: Embedder,
    task: str,
    test: Clips,
    train: Clips | None,
    ood: Clips | None,
    trials: str | Path | None,
    layer: int | Sequence[Layer] | Literal["select"],
    pool: str,
    label: str,
    k: int | Sequence[int],
    settings: dict[str, Any],
) -> dict[str, Score]:
    """What is measured of one layer's features, nothing fitted to labels and nothing chosen: see `evaluate`."""
    layers = [-1] if layer == "select" else [layer] if isinstance(layer, int) else list(layer)
    if len(layers) != 1:
        raise ValueError(f"layer={layer}: task {task} measures one layer, and chooses none; name one")
    skipped = 0

    def collect(clips: Clips) -> tuple[Tensor, Tensor]:
        nonlocal skipped
        [found] = embedder.embed(manifest_of(clips), layer=layers, pool=pool, tokens=False, **settings)
        scene = found.scene
        read = torch.isfinite(scene).all(1)
        skipped += int((~read).sum())
        return scene, read

    scene, read = collect(test)
    manifest = manifest_of(test)
    if task == "rank":
        scores = measure_rank(scene[read])
    elif task == "ood":
        if train is None or ood is None or not isinstance(k, int):
            raise ValueError(f"task=ood: measures the distance to one neighbor in train, got train={train} and k={k}")
        bank, outside = (found[good] for found, good in map(collect, (train, ood)))
        scores = measure_novelty(bank, scene[read], outside, k=k)
    elif task == "verify" and trials is not None:
        first, second, target = read_trials(trials, [row["id"] for row in manifest])
        both = read.numpy()[first] & read.numpy()[second]
        # NaN would spoil the check for features that are not finite; no trial that is left has a clip without any
        features = scene.nan_to_num()
        scores = verify(
            features, first[both], second[both], target[both], center=_center(collect, train), trials="listed"
        )
    else:
        known = [manifest] if task != "retrieval" or train is None else [manifest, manifest_of(train)]
        classes = Classes.from_labels(chain.from_iterable(one.values(label) for one in known))
        numbers = numbers_of(manifest, classes, label)[read]
        if task == "cluster":
            scores = cluster(scene[read], numbers)
        elif task == "retrieval":
            scores = retrieve(scene[read], numbers, *_bank(collect, train, classes, label))
        else:
            first, second, target = all_pairs(numbers)
            which = said_pairs(first, len(numbers))
            scores = verify(scene[read], first, second, target, center=_center(collect, train), trials=which)
    told = layers[0] if isinstance(layers[0], int) else f"sum of {len(layers[0])} by weights"
    note = f"{embedder.name}, layer {told}, pool {pool}" + (f"; {skipped} clips could not be read" if skipped else "")
    return {
        name: replace(
            score,
            protocol=f"{score.protocol}; {note}",
            details={**score.details, "layer": layers[0], "pool": pool, "encoder": embedder.name},
        )
        for name, score in scores.items()
    }


def _bank(
    collect: Callable[[Clips], tuple[Tensor, Tensor]], train: Clips | None, classes: Classes, label: str
) -> tuple[Tensor | None, Tensor | None]:
    """What is searched, where it is not the other clips: features and classes."""
    if train is None:
        return None, None
    scene, read = collect(train)
    return scene[read], numbers_of(manifest_of(train), classes, label)[read]


def _center(collect: Callable[[Clips], tuple[Tensor, Tensor]], train: Clips | None) -> Tensor | None:
    """The mean of training features, where there are training clips."""
    if train is None:
        return None
    scene, read = collect(train)
    return scene[read].mean(0)


def as_baseline(embedder: Embedder, baseline: Baseline, *, seed: int = 0) -> Embedder:
    """The same reading, cropping and pooling, with other features: see `evaluate`.

    Raises:
        ValueError: there is no such baseline for this modality.
    """
    config, frontend = embedder.config, embedder.encoder.frontend
    encoder: Any
    if baseline == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = build_encoder(config)
        name = f"{embedder.name} with random weights (seed {seed})"
    elif baseline == "pixels" and MODALITIES[embedder.modality].media == "image":
        encoder, name = Pixels(frontend.reader_settings), "raw pixels"
    elif baseline == "logmel" and MODALITIES[embedder.modality].media == "audio":
        encoder, name = LogMel(frontend.reader_settings), "log-mel energies"
    else:
        raise ValueError(
            f"baseline={baseline!r}: choose random, or pixels for pictures, or logmel for sound; this encoder is for "
            f"{embedder.modality}"
        )
    return Embedder(encoder, config, device=str(embedder.device), precision=embedder.precision, name=name)


class Pixels(nn.Module):
    """In place of an encoder and its frontend: a picture is one token, all its pixels in a row."""

    depth = 0
    min_length = 1

    def __init__(self, reader_settings: dict[str, Any]) -> None:
        super().__init__()
        self.reader_settings = reader_settings

    @property
    def frontend(self) -> Pixels:
        return self

    def lengths(self, raw: Raw) -> Tensor:
        return torch.ones(len(raw), dtype=torch.int64)

    def tokens(self, raw: Raw) -> Tokens:
        x = raw.data.flatten(1)[:, None]
        coords = torch.zeros(len(x), 1, 2, dtype=torch.int64, device=x.device)
        return Tokens(x, self.lengths(raw), coords, axes=("h", "w"), grid=(1, 1))

    def forward(self, tokens: Tokens, *, layers: Sequence[int] = ()) -> Encoded:
        return Encoded(tokens.x, tokens.lengths, dict.fromkeys(layers, tokens.x), n_prefix=0)


class LogMel(nn.Module):
    """In place of an encoder and its frontend: log-mel energies of 25 ms, one token every 10 ms."""

    depth = 0
    step_ms = 10.0

    def __init__(self, reader_settings: dict[str, Any]) -> None:
        from mmssl.modalities.speech.targets import WINDOW_MS

        super().__init__()
        self.reader_settings = reader_settings
        self.hop = round(reader_settings["rate"] * self.step_ms / 1000)
        self.min_length = round(reader_settings["rate"] * WINDOW_MS / 1000)

    @property
    def frontend(self) -> LogMel:
        return self

    def lengths(self, raw: Raw) -> Tensor:
        # a clip shorter than a window still has one, filled up with silence
        return (torch.div(raw.lengths - self.min_length, self.hop, rounding_mode="floor") + 1).clamp_min(1)

    def tokens(self, raw: Raw) -> Tokens:
        from mmssl.modalities.speech.targets import WINDOW_MS, log_mel

        lengths = self.lengths(raw)
        size = int(lengths.max())
        coords = torch.arange(size, device=raw.data.device)[None, :, None].expand(len(raw), -1, -1)
        empty = raw.data.new_zeros(len(raw), size, 0)
        bare = Tokens(empty, lengths, coords, ("t",), (size,), step_ms=self.step_ms, span_ms=WINDOW_MS)
        return replace(bare, x=log_mel(raw, bare))

    def forward(self, tokens: Tokens, *, layers: Sequence[int] = ()) -> Encoded:
        return Encoded(tokens.x, tokens.lengths, dict.fromkeys(layers, tokens.x), n_prefix=0)


def _fine_tuned(
    embedder: Embedder,
    task: str,
    manifest: Manifest,
    label: str,
    search: dict[str, Any],
    views: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Score]:
    """What a fine-tuned run says of clips, against what their rows say."""
    wanted = "vocabulary" if task == "ctc" else "classes"
    if embedder.config.get(wanted) is None:
        raise ValueError(f"task={task}: {embedder.name} has no {wanted}; give a run that was fine-tuned for it")
    if task == "classify" and embedder.config["objective"].get("multi_label"):
        return {"map": _several_classes(embedder, manifest, label, views, settings)}
    if task == "ctc":
        truth = [normalize("NFC", text) for text in manifest.values("text")]  # as the vocabulary spells
    else:
        truth = [str(name) for name in manifest.values(label)]
        for place, name in enumerate(truth):
            if name not in embedder.config["classes"]:
                raise ValueError(f"{manifest.place(place)}: the label {name!r} is none that {embedder.name} knows")
    said: Sequence[str | list[str] | None]
    if any(number != 1 for number in views.values()):
        found = embedder.probabilities(manifest, **views, **settings)
        places = found.argmax(1).tolist()
        read = torch.isfinite(found).all(1).tolist()
        said = [embedder.config["classes"][i] if here else None for i, here in zip(places, read, strict=True)]
    else:
        said = embedder.predict(manifest, **search, **settings)
    pairs = [(right, guess) for right, guess in zip(truth, said, strict=True) if isinstance(guess, str)]
    skipped = len(truth) - len(pairs)
    note = f"{embedder.name}" + (f"; {skipped} clips could not be read" if skipped else "")
    if task == "ctc":
        rates = error_rates([right for right, _ in pairs], [guess for _, guess in pairs], decoding=_decoding(**search))
        return {name: replace(rate, protocol=f"{rate.protocol}; {note}") for name, rate in rates.items()}
    right = sum(one == other for one, other in pairs)
    low, high = wilson(right, len(pairs))
    number = {name: place for place, name in enumerate(embedder.config["classes"])}
    labels, guesses = (torch.tensor([number[name] for name in side]) for side in zip(*pairs, strict=True))
    balanced = balanced_accuracy(guesses, labels)
    protocol = f"the fine-tuned run's own classes{_of_views(**views)}; test touched once"
    protocol += f"{said_balanced(balanced, labels)}; {note}"
    details = {"balanced_accuracy": balanced}
    return {"accuracy": Score("classify", right / len(pairs), low, high, len(pairs), protocol, details=details)}


def _decoding(beam: int | None, lm: str | Path | None, lm_weight: float, word_score: float) -> str:
    """How transcripts were searched for."""
    if lm is None:
        return ("best path" if beam is None else f"prefix beam of {beam}") + ", no language model"
    width = "" if beam is None else f" of {beam}"
    return f"beam{width} over the words of {Path(lm).name}, weight {lm_weight:g}, {word_score:g} a word"


def _of_views(spans: int, crops: int) -> str:
    parts = [f"{number} {name}" for name, number in (("spans", spans), ("crops", crops)) if number > 1]
    return f", mean over {' x '.join(parts)} of each clip" if parts else ""


def _several_classes(
    embedder: Embedder, manifest: Manifest, label: str, views: dict[str, Any], settings: dict[str, Any]
) -> Score:
    """The mean average precision of a run whose clips have several classes each."""
    classes = Classes(embedder.config["classes"])
    truth = torch.zeros(len(manifest), len(classes), dtype=torch.bool)
    for place, names in enumerate(manifest.values(label)):
        try:
            truth[place, classes.encode_all(names)] = True
        except ValueError as error:
            raise ValueError(f"{manifest.place(place)}: {error}") from None
    found = embedder.probabilities(manifest, **views, **settings)
    read = torch.isfinite(found).all(1)
    precisions = average_precisions(found[read].numpy(), truth[read].numpy())
    heard = precisions[~np.isnan(precisions)]
    if len(heard) < 2:
        raise ValueError(f"task=classify: the test clips have {len(heard)} of the classes, and a mean takes two")
    low, high = student(heard.tolist())
    protocol = (
        f"mean over the {len(heard)} of {len(classes)} classes that test clips have, interval over those classes"
        f"{_of_views(**views)}; test touched once; {embedder.name}"
    )
    skipped = int((~read).sum())
    protocol += f"; {skipped} clips could not be read" if skipped else ""
    value = float(heard.mean())
    return Score("classify", value, max(0.0, low), min(1.0, high), int(read.sum()), protocol, metric="mAP")
