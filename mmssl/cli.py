"""The command `mmssl`. Nothing heavy is imported before a command needs it: the help answers in under a second."""

from __future__ import annotations

import functools
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar

import typer

from mmssl.memory import keep_freed_memory
from mmssl.tasks import Baseline, Task

if TYPE_CHECKING:
    from collections import Counter

    from mmssl.recipe import Recipe

P = ParamSpec("P")
N = TypeVar("N", int, float)

app = typer.Typer(
    name="mmssl",
    help="Self-supervised learning across modalities: from files on disk to encoders, embeddings and scores.",
    epilog="Each command shows an example: mmssl pretrain --help. MMSSL_TRACEBACK=1 shows where an error came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Short name (see `mmssl recipes`) or a YAML file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as trainer.steps=2000.", show_default=False),
]
RunFolder = Annotated[
    Path | None, typer.Option("--out", help="Folder of the run.", show_default="runs/ and the recipe's name")
]
Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="Folder of a run, an exported encoder, or a model of transformers: its folder or its name on the hub.",
        show_default=False,
    ),
]


def command(example: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a function a command that says what is wrong in one sentence, and shows an example in its help."""

    def decorate(function: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            keep_freed_memory()
            try:
                function(*args, **kwargs)
            except BrokenPipeError:  # who reads it has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(1) from None
            except (ValueError, OSError, RuntimeError) as error:
                if os.environ.get("MMSSL_TRACEBACK") == "1" or not _is_for_the_user(error):
                    raise
                print(f"mmssl: {_sentence(error)}", file=sys.stderr)
                raise typer.Exit(2) from None

        return app.command(epilog=f"Example: {example}")(run)

    return decorate


@command("mmssl pretrain speech/wav2vec2_base data.train=train.jsonl data.valid=valid.jsonl --out runs/mine")
def pretrain(recipe: RecipeName, overrides: Overrides = None, out: RunFolder = None) -> None:
    """Train an encoder without labels.

    The same command goes on where a run was cut off. With 8 GPUs: torchrun --nproc-per-node 8 -m mmssl pretrain ...
    """
    from mmssl.recipe import load

    loaded = load(recipe, overrides or [])
    from mmssl.assemble import pretrain

    _done(pretrain(loaded, out))


@command("mmssl finetune speech/ctc_base init=runs/wav2vec2_base data.train=labelled.jsonl data.valid=valid.jsonl")
def finetune(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: RunFolder = None,
    folds: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Train and test once for each value of this key of the rows of data.train: fold, speaker.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train with labels: from the encoder that init= names, of a run or of transformers, or from new weights.

    Rows of the manifests need "label" (classify) or "text" (ctc). The same command goes on where a run was cut off.
    With --folds each value's rows are tested on in turn, and scores.json in --out holds what came out; of a key such as
    fold, init=runs/mae_{fold} names an encoder for each value, pretrained without its rows.
    """
    from mmssl.recipe import load

    loaded = load(recipe, overrides or [])
    if folds is not None:
        _cross_validate(loaded, folds, Path("runs", loaded.name) if out is None else out)
        return
    from mmssl.assemble import finetune

    _done(finetune(loaded, out))


@command("mmssl embed runs/wav2vec2_base clips/ --layer 8 --pool mean+std --out clips.npz")
def embed(
    model: Model,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="CLIP",
            help="Files, folders, patterns in quotes, or manifests; for an encoder of text, sentences in quotes.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write: .npz for numpy.load, or .parquet.", show_default="embeddings.npz"),
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="Write an index for `mmssl search` instead: its folder.", show_default=False)
    ] = None,
    modality: Annotated[
        str | None, typer.Option(help="What the clips are, for a run on several modalities.", show_default=False)
    ] = None,
    layer: Annotated[
        str,
        typer.Option(
            help="-1 is the output, 0 the input of the first block, i the output of block i; all; or a file of weights."
        ),
    ] = "-1",
    pool: Annotated[
        str | None,
        typer.Option(
            help="mean, class, last, slices:4, grid:2x2; +std adds deviations; joint: the space of several modalities; "
            "attention: as a classifier learned it.",
            show_default="joint where there is one, else mean",
        ),
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Keep every token, not only one vector a clip.")] = False,
    window: Annotated[
        float | None, typer.Option(help="Seconds: cut longer recordings into windows.", show_default="whole clips")
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(help="Seconds that two windows share.", show_default="a quarter of a window, at most 1"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Most clips computed at a time.")] = 16,
    precision: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of products.")] = "float32",
    device: Annotated[str, typer.Option(help="auto takes a GPU if there is one.")] = "auto",
    on_bad_clip: Annotated[
        Literal["raise", "skip"], typer.Option(help="Stop at the first bad clip, or give it an empty row and go on.")
    ] = "skip",
    part: Annotated[str, typer.Option(metavar="N/OF", help="Of several processes that share the work, this one.")] = (
        "1/1"
    ),
    engine: Annotated[
        Literal["here", "ray"],
        typer.Option(help="ray: on a cluster of Ray (RAY_ADDRESS), or all cores of this machine."),
    ] = "here",
) -> None:
    """Write the embeddings of files: one vector a clip and, if asked for, one a token.

    A .npz file holds `ids` and `scene` (clips, width), with --tokens `tokens`, `valid` and for sound and video
    `time_ms`; with several layers an axis of layers in front, which `layers` names. A .parquet file has a row a clip:
    `id`, `scene`, `error`. The same command goes on where it was cut off, from the parts beside --out.
    """
    if index is not None and out is not None:
        raise ValueError(f"--out {out}, --index {index}: give one of them")
    from mmssl.embed import load
    from mmssl.store import write_embeddings

    # with Ray the devices are its workers'
    embedder = load(model, device="cpu" if engine == "ray" else device, precision=precision)
    layers = list(range(embedder.of(modality).depth + 1)) if layer == "all" else _layers(layer)
    place = index or out or Path("embeddings.npz")
    spread = None
    if engine == "ray":
        from mmssl.on_ray import on_ray

        spread = on_ray(model, inputs, modality=modality, device=device, precision=precision)
    done = write_embeddings(
        embedder,
        inputs,
        place,
        modality=modality,
        layers=layers,
        pool=pool,
        tokens=tokens,
        window=window,
        overlap=overlap,
        batch_size=batch_size,
        on_bad_clip=on_bad_clip,
        part=_part(part),
        progress=sys.stderr.isatty(),
        tell=lambda name, reason: print(f"left out: {name}: {reason}", file=sys.stderr),
        index=index is not None,
        spread=spread,
    )
    if done.path is None:
        print(f"{place}: part {part} is done, and others are not yet")
        return
    read = f"{done.clips - done.bad} clips, {done.bad} could not be read" if done.bad else f"{done.clips} clips"
    print(f"{done.path}: {read}, width {done.width}, layer {layer}")


@command('mmssl search pictures.index "a red heart" -k 5')
def search(
    index: Annotated[
        Path, typer.Argument(metavar="INDEX", help="Folder that `mmssl embed --index` wrote.", show_default=False)
    ],
    query: Annotated[
        str,
        typer.Argument(metavar="QUERY", help="A sentence in quotes, or a file to find like.", show_default=False),
    ],
    modality: Annotated[
        str | None, typer.Option(help="What the query is, where its name does not tell.", show_default=False)
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many clips to show.")] = 10,
    model: Annotated[
        Path | None, typer.Option(help="Where the index's encoder is now.", show_default="where it was")
    ] = None,
    device: Annotated[str, typer.Option(help="auto takes a GPU if there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of scores and rows.")] = False,
) -> None:
    """Find the clips of an index that are most similar to a sentence or a file, by cosine similarity.

    A run on several modalities finds any of them by any other; a run on one finds clips like a clip.
    """
    from mmssl.index import Index

    hits = Index(index, model=model, device=device).search(query, modality=modality, k=k)
    if as_json:
        print(json.dumps([{**hit.row, "score": round(hit.score, 6)} for hit in hits], indent=2))
        return
    for hit in hits:
        said = [str(hit.row[key]) for key in ("text", "label") if key in hit.row and hit.row[key] != hit.row["id"]]
        print("  ".join([f"{hit.score:7.4f}", hit.row["id"], *said]))


@command("mmssl evaluate runs/mae_base --task linear --train train.jsonl --valid valid.jsonl --test test.jsonl")
def evaluate(
    model: Model,
    test: Annotated[Path, typer.Option(help="Manifest of the clips to measure on.", show_default=False)],
    task: Annotated[
        Task,
        typer.Option(
            help="linear, knn, attentive: fitted on frozen features; superb, superb-verify, superb-ctc: with learned "
            "weights of layers; corruption: on spoiled clips; layers: what each layer holds; cluster, verify, rank, "
            "ood, retrieval: of frozen features themselves; classify, ctc: what a fine-tuned run says; retrieval, "
            "zero-shot: of a run on several modalities."
        ),
    ] = "linear",
    train: Annotated[
        Path | None,
        typer.Option(help="Manifest to fit on, to search (retrieval), to be near to (ood), or to center on (verify)."),
    ] = None,
    valid: Annotated[
        Path | None, typer.Option(help="Manifest to choose layer and settings on.", show_default="a fifth of --train")
    ] = None,
    modality: Annotated[
        str | None, typer.Option(help="What the clips are, for a run on several modalities.", show_default=False)
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="zero-shot: a file with the names of classes and templates.", show_default=False)
    ] = None,
    same: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="retrieval: members of rows that agree in this key are right too: text, label.",
            show_default="a row's own alone",
        ),
    ] = None,
    layer: Annotated[
        str, typer.Option(help="select (or all) tries all on --valid; or one as for embed, or several: 4,6.")
    ] = ("select"),
    pool: Annotated[str, typer.Option(help="mean, class, last, slices:4, grid:2x2; +std adds deviations.")] = "mean",
    label: Annotated[str, typer.Option(help="Key of a row that holds its class.")] = "label",
    by: Annotated[
        str | None, typer.Option(help="Without --valid: choose by leaving out each value of this key in turn: speaker.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="C of linear; larger fits closer.", show_default="chosen on --valid")
    ] = None,
    labels_per_class: Annotated[
        int | None, typer.Option(help="Fit on so many labels of each class only, in several random draws.")
    ] = None,
    label_share: Annotated[float | None, typer.Option(help="The same by share: 0.01 fits on a hundredth.")] = None,
    draws: Annotated[int, typer.Option(help="Draws of few labels.")] = 5,
    k: Annotated[str, typer.Option(help="Neighbors of knn; of several, 5,20, the best on --valid; of ood.")] = "20",
    beam: Annotated[int | None, typer.Option(help="Width of the search: ctc.", show_default="the best path")] = None,
    lm: Annotated[
        Path | None, typer.Option(help="ctc: n-gram model, an ARPA file, whose words are written.", show_default=False)
    ] = None,
    lm_weight: Annotated[float, typer.Option(help="With --lm: its weight, to be chosen on other clips.")] = 2.0,
    word_score: Annotated[float, typer.Option(help="With --lm: added for each word.")] = 0.0,
    spans: Annotated[int, typer.Option(help="classify: mean over so many parts of each clip; sound, video.")] = 1,
    crops: Annotated[int, typer.Option(help="classify: so many crops of each, side by side; pictures, video.")] = 1,
    trials: Annotated[
        Path | None, typer.Option(help="verify: pairs to tell, a line is 1 or 0 and two ids.", show_default="all pairs")
    ] = None,
    ood: Annotated[Path | None, typer.Option(help="ood: manifest of clips of another kind than --test.")] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="corruption: --out of another model; errors relative to its.", show_default=False),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="layers: write the values of each layer as a picture, SVG.")] = None,
    baseline: Annotated[
        Baseline | None,
        typer.Option(help="Measure this in the encoder's place: random weights, raw pixels, log-mel energies."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the scores as JSON as well.")] = None,
    batch_size: Annotated[int, typer.Option(help="Most clips computed at a time.")] = 16,
    precision: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of products.")] = "float32",
    device: Annotated[str, typer.Option(help="auto takes a GPU if there is one.")] = "auto",
    on_bad_clip: Annotated[
        Literal["raise", "skip"], typer.Option(help="Stop at the first bad clip, or leave it out and count it.")
    ] = "raise",
) -> None:
    """Measure an encoder: accuracy, clusters, verification, rank, distances, or word and character error rates.

    Every score comes with its interval and with one line that says how it was measured. What the layers of a run hold
    is kept in its folder, for `mmssl report`.
    """
    from mmssl.evaluation.layers import layer_table, layers_file, weights_of
    from mmssl.evaluation.score import write_scores
    from mmssl.tasks.evaluate import evaluate

    neighbors = [_number("--k", part, int) for part in k.split(",")]
    of_run = task == "layers" and baseline is None and (model / "recipe.yaml").is_file()
    # looked at before they are read: a run that goes on may write others at any time
    weights = weights_of(model) if of_run else None
    scores = evaluate(
        model,
        task=task,
        test=test,
        train=train,
        valid=valid,
        modality=modality,
        classes=classes,
        same=same,
        layer="all" if layer in ("select", "all") else _layers(layer),
        pool=pool,
        label=label,
        by=by,
        strength=strength,
        labels_per_class=labels_per_class,
        label_share=label_share,
        draws=draws,
        k=neighbors[0] if len(neighbors) == 1 else neighbors,
        beam=beam,
        lm=lm,
        lm_weight=lm_weight,
        word_score=word_score,
        spans=spans,
        crops=crops,
        trials=trials,
        ood=ood,
        plot=plot,
        against=against,
        baseline=baseline,
        seed=seed,
        device=device,
        precision=precision,
        batch_size=batch_size,
        on_bad_clip=on_bad_clip,
        progress=sys.stderr.isatty(),
    )
    for score in scores.values():
        print(score)
    if task == "layers":
        print(layer_table(scores))
    if of_run:
        scores = {name: replace(one, details={**one.details, "weights": weights}) for name, one in scores.items()}
    if out is not None:
        write_scores(out, scores)
    if of_run:
        kept = layers_file(model, next(iter(scores.values())).details["modality"])
        try:
            write_scores(kept, scores)
        except OSError as error:  # somebody else's run: what was asked for has been said
            print(f"mmssl: {kept}: {error.strerror}; the page of the run goes without it", file=sys.stderr)


@command(
    "mmssl manifest digits/ --label-from -1 --key-from speaker=1 --split train=0.9,valid=0.1 --by speaker "
    "--out manifests/digits"
)
def manifest(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR",
            help="Folder of files, and of uncompressed tar files; or tar files; a manifest: --stats.",
            show_default=False,
        ),
    ],
    modality: Annotated[
        str,
        typer.Option(
            help="speech, audio, image or video: which files to look for; or pairs: image,text, image,speech."
        ),
    ] = "speech",
    out: Annotated[
        Path | None, typer.Option(help="File to write, or with splits a folder for one file each.", show_default="DIR")
    ] = None,
    label_from: Annotated[
        int | None, typer.Option(help="Folder level whose name is the label: 1 is the first below DIR, -1 the last.")
    ] = None,
    split_from: Annotated[int | None, typer.Option(help="Folder level whose name is the split.")] = None,
    text_from: Annotated[int | None, typer.Option(help="Folder level whose name is the transcript.")] = None,
    key_from: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=LEVEL", help="Folder level whose name is the value of a key: speaker=1."),
    ] = None,
    tsv: Annotated[
        Path | None, typer.Option(help="Table of the clips with column names (.tsv, .csv), or fairseq's manifest.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(metavar="KEY=COLUMN", help="Column of the table for a key: text=sentence.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME=SHARE,...", help="Draw splits: train=0.9,valid=0.1.")
    ] = None,
    by: Annotated[str, typer.Option(help="With --split: rows that agree in this key stay on one side.")] = "id",
    workers: Annotated[int, typer.Option(help="Threads that read headers.")] = 4,
    stats: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="Measure the mean and deviation that this recipe normalizes by."),
    ] = None,
) -> None:
    """Write a JSON-lines manifest of a folder: one row a clip, with durations, labels, texts and splits.

    Labels, splits and texts come from folder names, from a table, or from what lies beside a file under its name, as in
    shards of WebDataset: 0001.txt its text, 0001.cls its label, 0001.json both. Files that cannot be read are named and
    left out, and of pairs what has no partner; those of other kinds are counted by suffix. With --stats the constants
    of normalization are printed as settings of a recipe: of the training split where there are splits; and where DIR is
    a manifest already, nothing is written.
    """
    from mmssl.data.manifest import check_shares, split_rows, write_manifest
    from mmssl.data.scan import NoClips, pair, read_table, scan
    from mmssl.modalities import MODALITIES

    tars = folders if folders[0].suffix == ".tar" else []
    if any((one.suffix == ".tar") != bool(tars) for one in folders) or (len(folders) > 1 and not tars):
        raise ValueError(f"{folders[1]}: give one folder, or tar files alone")
    folder = Path(os.path.commonpath([os.path.dirname(os.path.abspath(one)) for one in tars])) if tars else folders[0]
    if folder.suffix == ".jsonl":
        if stats is None:
            raise ValueError(f"{folder}: a manifest already; give a folder, or measure its clips with --stats RECIPE")
        _print_stats(stats, folder)
        return
    shares: dict[str, float] | None = None
    if split is not None:
        shares = {name: _number("--split", share, float) for name, share in _pairs("--split", split.split(","))}
        check_shares(shares)  # before every header is read
    columns = dict(_pairs("--column", column or []))
    keys_from = {key: _number("--key-from", level, int) for key, level in _pairs("--key-from", key_from or [])}
    names = modality.split(",")
    for name in names:
        if name not in MODALITIES:
            raise ValueError(f"--modality {name}: one of {', '.join(MODALITIES)}, or several of them: image,text")
    kinds = {MODALITIES[name].media: MODALITIES[name] for name in names}
    if len(kinds) < len(names):
        raise ValueError(f"--modality {modality}: two that read the same files are no pair")
    filed = {media: kind for media, kind in kinds.items() if kind.probe is not None}
    if not filed:
        raise ValueError(
            f"--modality {modality}: a caption has no file of its own; look for the files that captions describe, such "
            "as --modality image,text"
        )
    if len(filed) > 1 and tsv is not None:
        raise ValueError(f"--tsv {tsv}: names files of one kind, and --modality {modality} pairs files by their names")
    each = {}
    try:
        for media, kind in filed.items():
            try:
                each[media] = scan(
                    folder,
                    media=media,
                    probe=kind.probe,  # type: ignore[arg-type]  # these have one
                    suffixes=kind.suffixes,
                    label_from=label_from,
                    split_from=split_from,
                    text_from=text_from,
                    keys_from=keys_from,
                    tsv=tsv,
                    columns=columns,
                    tars=tars,
                    workers=workers,
                )
            except NoClips:
                if media != "audio" or "video" not in filed:
                    raise
        if len(each) < len(filed):  # a video with sound is a pair by itself
            found = each["video"]
            silent = [(row["id"], "there is no sound in it") for row in found.rows if not row.get("sound")]
            rows = [row for row in found.rows if row.get("sound")]
            each["video"] = replace(found, rows=rows, bad=found.bad + silent)
        found = next(iter(each.values()))
        if len(each) + ("text" in kinds) > 1:
            if "text" in kinds and tsv is not None and found.rows and not any("text" in row for row in found.rows):
                heads = ", ".join(read_table(tsv)[0][1])
                raise ValueError(f"{tsv}: no column for the text; it has {heads}; say which, --column text=COLUMN")
            found = pair(each, {media: kind.hints for media, kind in filed.items()}, text="text" in kinds)
    except NoClips as error:
        fitting = {name for suffix in error.ignored for name in _looking_for(suffix)}
        meant = [f"--modality {name}" for name in MODALITIES if name in fitting]
        looks = "looks" if len(meant) == 1 else "look"
        raise ValueError(f"{error}" + (f"; {' and '.join(meant)} {looks} for those" if meant else "")) from None
    if not found.rows:
        path, reason = found.bad[0]
        raise ValueError(f"{folder}: none of the {len(found.bad)} files gives a row; the first is {path}: {reason}")
    for path, reason in found.bad:
        print(f"left out: {path}: {reason}", file=sys.stderr)
    if found.remarks:
        path, remark = found.remarks[0]
        print(f"odd: {len(found.remarks)} of the clips; the first is {path}, which {remark}", file=sys.stderr)
    if found.unlisted:
        print(f"left out: {len(found.unlisted)} files that {tsv} does not name", file=sys.stderr)
    if found.ignored:
        print(f"passed over: {_passed_over(found.ignored)}", file=sys.stderr)
    place = folder if out is None else out
    if shares is not None or all("split" in row for row in found.rows):
        if place.suffix == ".jsonl":
            raise ValueError(f"--out {place}: the rows have splits, with a file for each; give a folder")
        parts = split_rows(found.rows, shares=shares, by=by)
        empty = [name for name in shares or () if name not in parts]
        if empty:
            raise ValueError(
                f"--split {split}: none of the {len(found.rows)} rows falls to {empty[0]}; give it a larger share, or "
                "put more files there"
            )
        files = {place / f"{name}.jsonl": rows for name, rows in sorted(parts.items())}
    else:
        files = {place if place.suffix == ".jsonl" else place / "manifest.jsonl": found.rows}
    for file, rows in files.items():
        texts = sum("text" in row for row in rows)
        print(f"{file}: {write_manifest(file, rows)} clips" + (f", {texts} with text" if texts else ""))
    if stats is not None:
        _print_stats(stats, next((file for file in files if file.stem == "train"), next(iter(files))))


@command("mmssl convert runs/wav2vec2_base shared/ --to transformers")
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Folder of a run or an exported encoder, or a model of transformers: its folder or its name on the "
            "hub.",
            show_default=False,
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DST", help="New folder to write.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            metavar="transformers|mmssl|LAYOUT",
            help="transformers: the layout that fits, or name one, such as vit_mae; mmssl: as a run exports it.",
        ),
    ] = "transformers",
    modality: Annotated[
        str | None,
        typer.Option(help="Of a run on several modalities, the one whose encoder is written.", show_default=False),
    ] = None,
) -> None:
    """Write an encoder so that transformers opens it with `from_pretrained`, or one of theirs as mmssl exports it.

    To read one of theirs, this is not needed: give its folder or name to embed, evaluate, or init=.

    Layouts: wav2vec2, hubert, data2vec-audio, wavlm, vit, vit_mae, dinov2, dinov2_with_registers, beit,
    data2vec-vision, clip_vision_model, siglip_vision_model, videomae, audio-spectrogram-transformer; and of
    pictures with captions clip and siglip.

    Written are weights, settings, preprocessor and the head: for CTC with its vocabulary, for classes with their names
    where theirs computes the same. What a layout cannot say of an encoder is refused by the name of the setting.
    """
    from mmssl.convert.folder import convert

    print(f"{folder}: {convert(source, folder, to=to, modality=modality)}")


@command("mmssl report runs/mae_base --data test.jsonl")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
    data: Annotated[
        Path | None, typer.Option(help="Manifest of clips to show the embeddings of; with labels, the better.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="report.html in RUN")] = None,
    modality: Annotated[
        str | None,
        typer.Option(help="Of a run on several modalities, the one to show the clips of.", show_default="all"),
    ] = None,
    label: Annotated[str, typer.Option(help="Key of a row that holds its class.")] = "label",
    pool: Annotated[str, typer.Option(help="mean, class, slices:4, grid:2x2; +std adds deviations.")] = "mean",
    batch_size: Annotated[int, typer.Option(help="Most clips computed at a time.")] = 16,
    device: Annotated[str, typer.Option(help="auto takes a GPU if there is one.")] = "auto",
) -> None:
    """Write a run as one page of HTML: curves, health, pictures, costs, bad clips, recipe; it needs nothing but itself.

    With --data a map of the embeddings (UMAP where it is installed, PCA elsewhere), nearest neighbors, how well each
    layer tells labels apart, beside the same network with random weights, and, of a run of classify, what it takes for
    what; sound can be heard, and video moves.
    After `mmssl evaluate RUN --task layers` what each layer holds. Runs that go on or broke off have a page too.
    """
    from mmssl.report import write_report

    print(
        write_report(
            run,
            out,
            data=data,
            modality=modality,
            label=label,
            pool=pool,
            device=device,
            batch_size=batch_size,
            progress=sys.stderr.isatty(),
        )
    )


@command("mmssl units train.jsonl valid.jsonl --features mfcc --codes 100 --out units/mfcc100")
def units(
    manifests: Annotated[
        list[Path],
        typer.Argument(metavar="MANIFEST", help="Clusters are of the first; all get units.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the codebook, units and manifests.", show_default=False)],
    codes: Annotated[int | None, typer.Option(help="Clusters.", show_default=False)] = None,
    features: Annotated[
        Literal["mfcc", "logmel"] | None, typer.Option(help="Cluster these, every 10 ms of sound.", show_default=False)
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Cluster the tokens of this run or exported encoder.", show_default=False)
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            help="Write the codes of this EnCodec, a folder or a name, or of this run of vq_wav2vec.",
            show_default=False,
        ),
    ] = None,
    bandwidth: Annotated[float, typer.Option(help="With an EnCodec: kbit per second.")] = 6.0,
    layer: Annotated[int, typer.Option(help="With --model: -1 is the output, i the output of block i.")] = -1,
    key: Annotated[str, typer.Option(help="Of the rows, for the place of their units.")] = "units",
    frames: Annotated[int, typer.Option(help="Tokens that k-means is fitted on.")] = 1_000_000,
    rate: Annotated[int, typer.Option(help="With --features: samples per second.")] = 16_000,
    modality: Annotated[Literal["speech", "audio"], typer.Option(help="With --features and --codec.")] = "speech",
    seed: Annotated[int, typer.Option(help="Of the sample and of k-means.")] = 0,
    part: Annotated[str, typer.Option(metavar="N/OF", help="Of several processes that share the work, this one.")] = (
        "1/1"
    ),
    batch_size: Annotated[int, typer.Option(help="Most clips computed at a time.")] = 16,
    device: Annotated[str, typer.Option(help="auto takes a GPU if there is one.")] = "auto",
    on_bad_clip: Annotated[
        Literal["raise", "skip"], typer.Option(help="Stop at the first bad clip, or name it and leave it out.")
    ] = "raise",
) -> None:
    """Cluster the features of clips, and write the unit of each moment beside the rows of manifests.

    The manifests in the folder are for objectives that predict units. The same command goes on where it was cut off,
    and with other manifests it uses the codebook that the folder holds.
    """
    from mmssl.units import write_units

    found = write_units(
        manifests,
        out,
        codes=codes,
        features=features,
        codec=codec,
        bandwidth=bandwidth,
        model=model,
        layer=layer,
        key=key,
        frames=frames,
        rate=rate,
        modality=modality,
        seed=seed,
        part=_part(part),
        batch_size=batch_size,
        device=device,
        on_bad_clip=on_bad_clip,
        progress=sys.stderr.isatty(),
    )
    for manifest, one in zip(manifests, found, strict=True):
        for name, reason in one.bad.items():
            print(f"left out: {name}: {reason}", file=sys.stderr)
        if one.manifest is None:
            print(f"{manifest}: part {part} is done, and others are not yet")
        else:
            of = "" if codes is None else f"of {codes} "
            print(f"{one.manifest}: {one.clips} clips, {one.units:,} units, {one.perplexity:.1f} {of}codes in use")


@command("mmssl topics units/train.jsonl units/valid.jsonl --topics 50 --codes 100 --out topics")
def topics(
    manifests: Annotated[
        list[Path],
        typer.Argument(metavar="MANIFEST", help="Topics are of the first; all get theirs.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the topics and manifests.", show_default=False)],
    topics: Annotated[int, typer.Option(help="How many topics.", show_default=False)],
    codes: Annotated[int, typer.Option(help="How many units there are.", show_default=False)],
    of: Annotated[str, typer.Option(help="Key of the rows at which their units stand.")] = "units",
    ngram: Annotated[int, typer.Option(help="Units in a row that are counted together.")] = 1,
    key: Annotated[str, typer.Option(help="Of the rows, for their topics.")] = "topic",
    seed: Annotated[int, typer.Option(help="Of the topics' first values.")] = 0,
) -> None:
    """Write a topic of each clip, from how often each unit stands in it, beside the rows of manifests.

    Their units are those that `mmssl units` wrote. With other manifests it uses the topics that the folder holds.
    """
    from mmssl.topics import write_topics

    for one in write_topics(
        manifests,
        out,
        topics=topics,
        codes=codes,
        of=of,
        key=key,
        ngram=ngram,
        seed=seed,
        progress=sys.stderr.isatty(),
    ):
        print(f"{one.manifest}: {one.clips} clips, {one.perplexity:.1f} of {topics} topics in use")


@command("mmssl recipes image/mae_base > mine.yaml")
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Print this one.", show_default=False)] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Which objective goes with which modality, in Markdown.")
    ] = False,
) -> None:
    """List the recipes that come with mmssl, or print one, to start your own from."""
    from mmssl.recipe import find, header, shipped

    if matrix:
        if name is not None:
            raise ValueError(f"--matrix: shows every objective, so it goes without the recipe {name}")
        from mmssl.matrix import table

        print(table(), end="")
        return
    if name is not None:
        print(find(name).read_text(encoding="utf-8"), end="")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    # names whole, to be copied
    listed = Table(Column("recipe", no_wrap=True, overflow="ignore"), "what", "result", box=box.SIMPLE_HEAD)
    for short, path in shipped().items():
        said = header(path.read_text(encoding="utf-8"))
        what, result = said["title"].partition(". ")[0], said.get("result", "not yet run")
        if sys.stdout.isatty():
            listed.add_row(short, what, result)
        else:
            print(short, what, result, sep="\t")
    if not sys.stdout.isatty():
        return
    console = Console()
    console.print(listed)
    console.print("Run one: mmssl pretrain RECIPE data.train=FILE   See one: mmssl recipes RECIPE", highlight=False)


def main() -> None:
    """The entry point of the command."""
    # a file's name may be no text, and is printed all the same
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()


def _done(run: Path) -> None:
    from mmssl import distributed
    from mmssl.objectives import LABELLED, OBJECTIVES
    from mmssl.recipe import parse

    if distributed.is_main():
        path = run / "recipe.yaml"
        values = parse(path.read_text(encoding="utf-8"), source=str(path)).values
        train, valid = (values["data"][side] for side in ("train", "valid"))
        task = values["objective"]["name"]
        test = valid or "HELD_OUT.jsonl"
        if isinstance(values["modality"], dict):
            print(f"{run}: done; what it is good for:")
            if hasattr(OBJECTIVES[task], "joint"):  # a space that they share
                same = values["objective"].get("same")  # what the run took for one thing is right
                print(f"  mmssl evaluate {run} --task retrieval --test {test}{f' --same {same}' if same else ''}")
            for name in values["modality"]:
                held_out = test.get(name) or "HELD_OUT.jsonl" if isinstance(test, dict) else test
                print(f"  mmssl embed {run} {held_out} --modality {name} --out {name}.npz")
            distributed.shutdown()
            return
        fitted = f"--task {task}" if task in LABELLED else f"--task linear --train {train}"
        print(
            f"{run}: done; what it is good for:\n"
            f"  mmssl embed {run} {test} --out embeddings.npz\n"
            f"  mmssl evaluate {run} {fitted} --test {test}"
        )
    distributed.shutdown()


def _cross_validate(recipe: Recipe, key: str, out: Path) -> None:
    from mmssl.folds import cross_validate

    scores: dict[str, dict[str, Any]] = {}
    for name, found in cross_validate(recipe, key, out):
        for score in found.values():
            print(f"{name}: {score}" if name else score)
        scores[name or "all"] = {metric: asdict(score) for metric, score in found.items()}
        (out / "scores.json").write_text(json.dumps(scores, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _print_stats(recipe: str, manifest: Path) -> None:
    from mmssl.normalization import input_statistics

    found = input_statistics(recipe, manifest, progress=sys.stderr.isatty())
    for path, reason in found.bad.items():
        print(f"left out: {path}: {reason}", file=sys.stderr)
    print(found)
    print(f"  {found.values:,} values of {found.clips:,} clips in {manifest}, as {recipe} reads them")


def _looking_for(suffix: str) -> list[str]:
    """The modalities that `mmssl manifest` lists files of this suffix for."""
    from mmssl.modalities import MODALITIES

    return [name for name, kind in MODALITIES.items() if kind.probe is not None and suffix in kind.suffixes]


def _passed_over(ignored: Counter[str]) -> str:
    """How many files of each suffix, the commonest first, and what would look for them."""
    told = []
    for suffix, count in ignored.most_common():
        names = " or ".join(_looking_for(suffix))
        told.append(f"{count} {suffix or 'without suffix'}" + (f" (--modality {names})" if names else ""))
    return ", ".join(told)


def _is_for_the_user(error: Exception) -> bool:
    """Whether an error is a sentence about what the user gave, rather than a mistake of the program."""
    if isinstance(error, RuntimeError):
        from mmssl.training.loop import RunStopped

        return isinstance(error, RunStopped)
    return True


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}" if error.filename else error.strerror
    return str(error)


def _part(text: str) -> tuple[int, int]:
    """Of --part N/OF."""
    number, _, of = text.partition("/")
    return _number("--part", number, int), _number("--part", of, int)


def _layers(text: str) -> Any:
    """Numbers of layers; or of a file of weights the one layer that they make of several."""
    if text.endswith(".json"):
        from mmssl.embed import read_weighting

        return [tuple(sorted(read_weighting(text).items()))]
    return [_number("--layer", part, int) for part in text.split(",")]


def _number(option: str, text: str, kind: Callable[[str], N]) -> N:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{option}: {text!r} is no number") from None


def _pairs(option: str, texts: list[str]) -> list[tuple[str, Any]]:
    """ "key=value" of a command line option."""
    for text in texts:
        if not text.partition("=")[0] or not text.partition("=")[2]:
            raise ValueError(f"{option} {text}: expected NAME=VALUE")
    return [(text.partition("=")[0], text.partition("=")[2]) for text in texts]
