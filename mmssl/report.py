"""What `mmssl report` writes: a run as one page that needs nothing but itself.

What the run's folder holds is shown, and what it lacks is left out, so that a run that is still going on, or that broke
off, has a page too; what a command would add, of layers or of confused classes, is said with that command. With
labelled or unlabelled clips the page shows as well what the encoder makes of them.
"""

from __future__ import annotations

import importlib
import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from html import escape
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import normalize

from mmssl.clips import rows_of
from mmssl.data.manifest import Manifest, captions_of
from mmssl.embed import Embedder, load
from mmssl.evaluation.knn import knn_predict
from mmssl.evaluation.layers import OUTPUT, dealt_out, layer_plot, layers_file, read_layers, weights_of
from mmssl.recipe import Recipe, parse
from mmssl.tasks.evaluate import as_baseline
from mmssl.thumbnails import MOST_BYTES, SECONDS, Thumbnail, data_url, thumbnails
from mmssl.training.health import diagnose

MOST_CLIPS = 1_000  # of a manifest, evenly from it: a page of so many thumbnails has some 2 MB
MOST_SHEETS, MOST_SHEET_BYTES = 8, 8_000_000  # of pictures, the last one among them
MOST_BAD = 100  # bad clips by name
NEIGHBORS, GALLERY = 5, 12
MOST_CLASSES, MOST_CONFUSED = 50, 50  # of a table, and of the list in its place: 1,000 classes have a million cells
FOLDS = 5
WIDTH, HEIGHT, MARGIN = 480, 220, 62
MAP = 560
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#e07b39", "#5b5b5b", "#8c6bb1", "#2a9d8f")

_SHEETS = {".png": "image/png", ".webp": "image/webp"}

Row = Mapping[str, Any]
Points = Sequence[tuple[float, float | None]]


def write_report(
    run: str | Path,
    out: str | Path | None = None,
    *,
    data: str | Path | Manifest | None = None,
    modality: str | None = None,
    label: str = "label",
    pool: str = "mean",
    device: str = "auto",
    batch_size: int = 16,
    progress: bool = False,
) -> Path:
    """Write the page of a run: curves, verdicts, pictures, costs, bad clips, what its layers hold, and recipe.

    Args:
        run: its folder; with `data` also anything else that `mmssl.load` takes.
        out: the file; report.html in the folder of the run by default.
        data: a manifest, of which at most `MOST_CLIPS` clips are embedded: their map, nearest neighbors, how well each
            layer tells labels apart, beside the same network with random weights, and, of a run that was fine-tuned to
            tell classes, what it takes for what.
        modality: of a run on several, the one whose clips are shown; all by default.
        label: the key of a row that holds its class, where it has one.
        pool: see `Pool.named`.
        device, batch_size, progress: see `mmssl.load` and `Embedder.embed`. Clips that cannot be read are named.

    Returns:
        the file.

    Raises:
        ValueError: the folder holds nothing of a run, or the manifest cannot be read.
    """
    folder = Path(run)
    if out is None and not folder.is_dir():
        raise ValueError(f"{run}: no such folder; give the folder of a run, or --out for the file of the page")
    out = folder / "report.html" if out is None else Path(out)
    rows, broken = read_log(folder / "log.jsonl")
    text = _text(folder / "recipe.yaml")
    recipe = _parsed(text)
    found = {
        "Health": _health(rows, broken),
        "Curves": _curves(rows),
        "Pictures": _pictures(folder / "pictures"),
        "Costs": _costs(rows, folder),
        "Bad clips": _bad_clips(folder / "bad_clips.jsonl"),
    }
    if not any(found.values()) and not text and data is None:
        raise ValueError(f"{folder}: holds no log, no recipe and no pictures, so it is no run; give the folder of one")
    clips: list[dict[str, Any]] = []
    if data is not None:
        manifest = data if isinstance(data, Manifest) else Manifest(data)
        try:
            embedder = load(run, device=device)
        except ValueError as error:
            found["Embeddings"] = f'<p class="bad">No encoder to embed with: {escape(str(error))}</p>'
        else:
            asked = [embedder.of(name) for name in (embedder.modalities if modality is None else [modality])]
            parts = [manifest] * len(asked)
            if len(embedder.modalities) > 1:
                parts = [rows_of(manifest, one.modality) for one in asked]
            if not any(map(len, parts)):
                found["Embeddings"] = (
                    f'<p class="bad">No row of {escape(str(manifest.path))} has what '
                    f"{' or '.join(one.modality for one in asked)} reads.</p>"
                )
            for one, part in zip(asked, parts, strict=True):
                if not len(part):
                    continue
                name = one.modality
                own, sections = _embedded(one, part, label, pool, batch_size, progress, before=len(clips))
                several = f" ({name})" if len(embedder.modalities) > 1 else ""
                clips += own
                found |= {f"{heading}{several}": text for heading, text in sections.items()}
    found |= _analyses(folder, recipe)
    if recipe is not None and _tells_classes(recipe) and not any(name.startswith("Confusion") for name in found):
        found["Confusion"] = _to_do("what it takes for what, of clips with labels", "report", run, "--data MANIFEST")
    if text:
        found["Recipe"] = f"<pre>{escape(text)}</pre>"
    name = folder.name or str(run)
    title = f"<h1>{escape(name)}</h1>\n<p>{escape(_state(rows, recipe))}</p>"
    body = "\n".join([title, *(f"<h2>{heading}</h2>\n{text}" for heading, text in found.items() if text)])
    page = resources.files("mmssl").joinpath("report.html").read_text(encoding="utf-8")
    # one after the other over pieces of the template: what a file is called is never taken for a place to fill
    head, rest = page.split("{{title}}")
    middle, rest = rest.split("{{body}}")
    before, after = rest.split("{{clips}}")
    # in a script nothing but "<" could end it, or begin another
    blob = json.dumps(clips, allow_nan=False).replace("<", "\\u003c")
    out.parent.mkdir(parents=True, exist_ok=True)
    # a name may hold bytes that are no text
    out.write_text(
        head + escape(name) + middle + body + before + blob + after, encoding="utf-8", errors="backslashreplace"
    )
    return out


def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a run's log, and how many are no lines of one, as where a machine went down while it wrote."""
    rows, broken = [], 0
    for line in _text(path).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            broken += 1
    return rows, broken


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _parsed(text: str) -> Recipe | None:
    try:
        return parse(text, source="recipe.yaml") if text else None
    except ValueError:
        return None


def _trained(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "loss" in row]


def _state(rows: Sequence[Row], recipe: Recipe | None) -> str:
    """How far the run is, in a sentence."""
    steps = None if recipe is None else recipe.get("trainer.steps")
    last = max((row["step"] for row in rows), default=0)
    if not isinstance(steps, int):
        return f"Update {last:,} is the last in the log." if rows else "No log."
    if any(row.get("ended") for row in rows if row["step"] == last):
        return f"Finished: after update {last:,} of {steps:,}, as evaluations got no better."
    return f"Finished: {steps:,} updates." if last >= steps else f"Not finished: update {last:,} of {steps:,}."


def _health(rows: Sequence[Row], broken: int) -> str:
    history = _trained(rows)
    now = dict(history[-1].get("verdict") or diagnose(history)) if history else {}
    parts = [f'<p class="bad"><b>{escape(name)}</b>: {escape(str(said))}</p>' for name, said in now.items()]
    if history and not now:
        parts.append('<p class="good">No verdict on the last lines: nothing that is known to go wrong has.</p>')
    if broken:
        parts.append(f'<p class="bad">{broken} lines of log.jsonl cannot be read.</p>')
    said: list[tuple[int, str]] = []
    before: set[str] = set()
    for row in rows:
        verdicts = row.get("verdict") or {}
        said += [(row["step"], f"{name}: {text}") for name, text in verdicts.items() if name not in before]
        if "loss" in row:
            before = set(verdicts)
        if "note" in row:
            said.append((row["step"], str(row["note"])))
        if row.get("not_finite"):
            said.append((row["step"], f"not finite: {', '.join(map(str, row['not_finite']))}"))
    if said:
        lines = "".join(f"<tr><td>{step:,}</td><td>{escape(text)}</td></tr>" for step, text in said)
        parts.append(f"<table><tr><th>update</th><th>what was said</th></tr>{lines}</table>")
    return "\n".join(parts)


def _curves(rows: Sequence[Row]) -> str:
    """Loss and metrics, of training and of evaluation, then rate and gradient, each over updates."""
    series: dict[str, dict[str, list[tuple[float, float | None]]]] = {"loss": {}}
    for row in rows:
        found = {(name, "training"): value for name, value in (row.get("metrics") or {}).items()}
        found |= {(name, "evaluation"): value for name, value in (row.get("evaluation") or {}).items()}
        found |= {(name, "training"): row[name] for name in ("loss", "lr", "grad_norm") if name in row}
        for (name, side), value in found.items():
            if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
                series.setdefault(name, {}).setdefault(side, []).append((row["step"], value))
    plots = [_plot(name, "update", lines) for name, lines in series.items() if lines]
    return f'<div class="curves">{"".join(plots)}</div>' if plots else ""


def _plot(title: str, axis: str, lines: Mapping[str, Points]) -> str:
    """A figure of lines over one axis, with the last value of each in its caption."""
    known = [(x, y) for points in lines.values() for x, y in points if y is not None and math.isfinite(y)]
    if not known:
        return f"<figure><figcaption><b>{escape(title)}</b>: no finite value</figcaption></figure>"
    left, right = min(x for x, _ in known), max(x for x, _ in known)
    low, high = min(y for _, y in known), max(y for _, y in known)
    # what differs by rounding alone is drawn as level
    varies = high - low > 1e-6 * max(abs(low), abs(high))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left) if right > left else 0.5
        up = (y - low) / (high - low) if varies else 0.5
        return MARGIN + across * (WIDTH - MARGIN - 12), HEIGHT - 26 - up * (HEIGHT - 42)

    drawn, said = [], []
    for (name, points), color in zip(lines.items(), COLORS, strict=False):
        pieces: list[list[tuple[float, float]]] = [[]]
        for x, y in points:
            # a value that is not finite leaves a gap
            if y is None or not math.isfinite(y):
                pieces.append([])
            else:
                spot = place(x, y)
                pieces[-1].append(spot)
                note = f"<title>{escape(name)} {escape(axis)} {x:g}: {y:.5g}</title>"
                drawn.append(f'<circle cx="{spot[0]:.1f}" cy="{spot[1]:.1f}" r="2" fill="{color}">{note}</circle>')
        for piece in pieces:
            spots = " ".join(f"{x:.1f},{y:.1f}" for x, y in piece)
            drawn.append(f'<polyline stroke="{color}" points="{spots}"/>' if len(piece) > 1 else "")
        last = next((y for _, y in reversed(points) if y is not None), math.nan)
        said.append(f'<span class="swatch" style="background:{color}"></span> {escape(name)} {last:.4g}')
    ticks = (
        f'<text x="4" y="20">{high:.3g}</text><text x="4" y="{HEIGHT - 26}">{low:.3g}</text>'
        f'<text x="{MARGIN}" y="{HEIGHT - 8}">{left:g}</text>'
        f'<text x="{WIDTH - 12}" y="{HEIGHT - 8}" text-anchor="end">{escape(axis)} {right:g}</text>'
    )
    return (
        f'<figure><svg width="{WIDTH}" height="{HEIGHT}" role="img">{ticks}{"".join(drawn)}</svg>'
        f"<figcaption><b>{escape(title)}</b>: {', '.join(said)}</figcaption></figure>"
    )


def _pictures(folder: Path) -> str:
    """The sheets that evaluations have drawn, evenly from all of them while there is room, the last one on top.

    Where its clips can be heard, they follow it.
    """
    sheets = sorted(
        (path for path in folder.glob("update_*.*") if path.suffix in _SHEETS and path.stem[7:].isdigit()),
        key=lambda path: int(path.stem[7:]),
    )
    if not sheets:
        return ""
    count = min(MOST_SHEETS, len(sheets))
    chosen = [sheets[round(i * (len(sheets) - 1) / max(count - 1, 1))] for i in range(count)]
    if count == 1:
        chosen = sheets[-1:]
    shown: list[str] = []
    room = MOST_SHEET_BYTES
    for path in reversed(chosen):
        content = path.read_bytes()
        room -= len(content)
        if shown and room < 0:
            break
        shown.append(
            f'<figure><img alt="{path.stem}" src="{data_url(content, _SHEETS[path.suffix])}">'
            f"<figcaption>after update {int(path.stem[7:]):,}</figcaption></figure>"
        )
    words = f"<p>{escape(_text(folder / 'README.txt'))}</p>"
    earlier = f"<details><summary>{len(shown) - 1} earlier</summary>{''.join(shown[1:])}</details>"
    return words + shown[0] + _sounds(folder / sheets[-1].stem) + (earlier if len(shown) > 1 else "")


def _sounds(folder: Path) -> str:
    """The clips of a sheet to be heard, a line for each of its columns."""
    lines: dict[str, str] = {}
    for path in sorted(folder.glob("*_*_*.mp3")):
        clip, _, kind = path.stem.split("_", 2)
        url = data_url(path.read_bytes(), "audio/mpeg")
        lines[clip] = lines.get(clip, "") + f'<td>{escape(kind)}<br><audio controls src="{url}"></audio></td>'
    rows = "".join(f"<tr><th>{escape(clip)}</th>{cells}</tr>" for clip, cells in lines.items())
    return f"<table>{rows}</table>" if rows else ""


def _costs(rows: Sequence[Row], folder: Path) -> str:
    last = next((row for row in reversed(rows) if "seconds" in row and "clips" in row), None)
    lines: list[tuple[str, str]] = []
    if last is not None and last["seconds"]:
        lines += [
            ("time in updates", str(timedelta(seconds=round(last["seconds"])))),
            ("clips seen", f"{last['clips']:,}"),
            ("clips a second", f"{last['clips'] / last['seconds']:.1f}"),
            ("seconds an update", f"{last['seconds'] / max(last['step'], 1):.3g}"),
        ]
    try:
        with safe_open(folder / "encoder.safetensors", framework="pt") as file:
            sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118 (no mapping)
        lines.append(("weights of the encoder", f"{sum(sizes):,}"))
    except (OSError, SafetensorError):
        pass  # not exported yet, or not whole: nothing to say of it
    if not lines:
        return ""
    return f"<table>{''.join(f'<tr><th>{name}</th><td>{value}</td></tr>' for name, value in lines)}</table>"


def _bad_clips(path: Path) -> str:
    found = []
    for line in _text(path).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append([str(row.get(key, "")) for key in ("id", "path", "reason")])
    if not found:
        return ""
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in cells) for cells in found[:MOST_BAD])
    more = f"<p>and {len(found) - MOST_BAD} more in bad_clips.jsonl</p>" if len(found) > MOST_BAD else ""
    head = "<tr><th>clip</th><th>file</th><th>reason</th></tr>"
    return f"<p>{len(found)} left out</p><table>{head}{''.join(f'<tr>{line}</tr>' for line in lines)}</table>{more}"


def _analyses(folder: Path, recipe: Recipe | None) -> dict[str, str]:
    """What `mmssl evaluate --task layers` has said of each encoder, or how to ask it."""
    chosen = None if recipe is None else recipe.get("modality")
    names = [chosen] if isinstance(chosen, str) else list(chosen) if isinstance(chosen, Mapping) else []
    found = {}
    for name in names:
        several = len(names) > 1
        heading = f"Layer-wise analysis ({escape(name)})" if several else "Layer-wise analysis"
        path = layers_file(folder, name)
        command = f"--task layers{f' --modality {name}' if several else ''} --test MANIFEST"
        if path.is_file():
            found[heading] = _analysis(path, folder, command)
        else:
            found[heading] = _to_do("what each layer holds of the input and of labels", "evaluate", folder, command)
    return found


def _analysis(path: Path, folder: Path, command: str) -> str:
    """The curves of each measure over layers with their intervals, and what each is."""
    try:
        scores = read_layers(path)
    except ValueError as error:
        return f'<p class="bad">{escape(str(error))}</p>'
    # those that an earlier version has written do not say of which weights they are
    measured = {str(score.details["weights"]) for score in scores.values() if score.details.get("weights")}
    stale = ""
    if measured and measured != {weights_of(folder)}:
        again = _command("evaluate", folder, command)
        stale = f'<p class="bad">Of other weights than the run holds now; {again} measures those.</p>'
    # of a picture inside a page the namespace goes without saying, and a page names no address
    drawn = layer_plot(scores).replace(' xmlns="http://www.w3.org/2000/svg"', ' role="img"')
    lines = "".join(
        f"<tr><td>{escape(score.metric)}</td><td>{score.value:.3f}</td><td>{score.low:.3f} to {score.high:.3f}</td>"
        f"<td>{'output' if score.details['layer'] == OUTPUT else score.details['layer']}</td>"
        f"<td>{escape(score.protocol)}</td></tr>"
        for score in scores.values()
    )
    head = "<tr><th>measure</th><th>highest</th><th>95 % interval</th><th>layer</th><th>how it was measured</th></tr>"
    return f"{stale}<figure>{drawn}</figure><table>{head}{lines}</table>"


def _tells_classes(recipe: Recipe) -> bool:
    """Whether a run tells each clip one class."""
    return recipe.get("objective.name") == "classify" and not recipe.get("objective.multi_label")


def _to_do(what: str, verb: str, run: str | Path, settings: str) -> str:
    """What the page lacks, and the command that adds it."""
    return f"<p>Not here yet: {what}; {_command(verb, run, settings)}</p>"


def _command(verb: str, run: str | Path, settings: str) -> str:
    return f"<code>mmssl {verb} {escape(shlex.quote(str(run)))} {escape(settings)}</code>"


def _embedded(
    embedder: Embedder, manifest: Manifest, label: str, pool: str, batch_size: int, progress: bool, *, before: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What the page's script knows of each clip, and the sections about clips.

    Args:
        before: clips that the script knows already, from another modality.
    """
    if len(manifest) > MOST_CLIPS:
        manifest = manifest.select(np.linspace(0, len(manifest) - 1, MOST_CLIPS).round().astype(np.int64))
    layers = [-1, *range(embedder.depth + 1)]
    same: dict[str, Any] = {"pool": pool, "tokens": False, "batch_size": batch_size, "progress": progress}
    try:
        found = embedder.embed(manifest, layer=layers, on_bad_clip="skip", **same)
    except ValueError as error:  # none of the clips can be read, or not by this encoder
        return [], {"Embeddings": f'<p class="bad">{escape(str(error))}</p>'}
    read = torch.isfinite(found[0].scene).all(1).nonzero()[:, 0]
    sections = {}
    if found[0].bad:
        lines = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(reason)}</td></tr>"
            for name, reason in islice(found[0].bad.items(), MOST_BAD)
        )
        sections["Clips that could not be embedded"] = f"<p>{len(found[0].bad)} clips</p><table>{lines}</table>"
    if len(read) < 2:
        sections["Embeddings"] = f'<p class="bad">{len(read)} clips could be embedded, and a map takes two.</p>'
        return [], sections
    manifest = manifest.select(read.numpy())
    labels = [_label(row.get(label)) for row in manifest]
    scenes = {layer: one.scene[read] for layer, one in zip(layers, found, strict=True)}
    near = _neighbors(scenes[-1])
    shown = _shown(len(labels))
    first = [place for one in shown for place in (one, *(other for other, _ in near[one]))]
    media = thumbnails(embedder.clips(manifest), first)
    clips = [
        {
            "name": row["id"],
            "text": next(iter(captions_of(row)), None) if embedder.modality == "text" else None,
            "label": name,
            "near": [(before + place, value) for place, value in close],
            "picture": one.picture,
            "sound": one.sound,
        }
        for row, name, close, one in zip(manifest, labels, near, media, strict=True)
    ]
    sections["Embedding map"] = _map(scenes[-1], labels, _said(media), before)
    sections["Nearest neighbors"] = _gallery(shown, before)
    if (numbers := _numbers(labels)) is not None:
        others = as_baseline(embedder, "random").embed(manifest, layer=layers, on_bad_clip="skip", **same)
        untrained = {layer: one.scene for layer, one in zip(layers, others, strict=True)}
        sections["Layers"] = _layerwise(scenes, untrained, numbers)
    objective = embedder.config.get("objective") or {}
    if embedder.config.get("classes") and not objective.get("multi_label") and all(name is not None for name in labels):
        said = embedder.predict(manifest, batch_size=batch_size, progress=progress)
        sections["Confusion"] = _confusion([str(name) for name in labels], [str(name) for name in said])
    return clips, sections


def _label(value: Any) -> str | None:
    return None if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _neighbors(scenes: Tensor) -> list[list[tuple[int, float]]]:
    """The nearest other clips of each, by cosine similarity."""
    directions = normalize(scenes.float(), dim=1)
    similarity = directions @ directions.T
    similarity.fill_diagonal_(-torch.inf)
    values, places = similarity.topk(min(NEIGHBORS, len(scenes) - 1), dim=1)
    return [
        [(place, round(value, 4)) for place, value in zip(own, close, strict=True)]
        for own, close in zip(places.tolist(), values.tolist(), strict=True)
    ]


def _said(media: Sequence[Thumbnail]) -> str:
    """What is to be said of what can be heard or moves."""
    heard, cut = sum(one.sound is not None for one in media), sum(one.cut for one in media)
    said = f" Click to hear a clip, its first {SECONDS:g} s at most." if heard else ""
    if cut:
        what = "can be heard" if heard else "move"
        said += f" {len(media) - cut} of them {what}: there is room for {MOST_BYTES // 1_000_000} MB of that."
    return said


def _spread(scenes: Tensor) -> tuple[Tensor, str]:
    """(B, 2) places of clips, and what made them."""
    try:
        umap = importlib.import_module("umap")
    except ImportError:
        centered = scenes.double() - scenes.double().mean(0)
        _, sizes, axes = torch.linalg.svd(centered, full_matrices=False)
        share = float(sizes[:2].square().sum() / sizes.square().sum().clamp_min(1e-30))
        # of an axis either end may be the first: the largest weight is made positive, so that pages can be compared
        axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()
        return centered @ axes.T, f"PCA: two axes with {share:.0%} of the variance"
    return torch.from_numpy(umap.UMAP(random_state=0).fit_transform(scenes.numpy())).double(), "UMAP"


def _map(scenes: Tensor, labels: Sequence[str | None], said: str, before: int) -> str:
    places, how = _spread(scenes)
    places = torch.nn.functional.pad(places, (0, 2 - places.shape[1]))
    span = (places.amax(0) - places.amin(0)).clamp_min(1e-30)
    spots = ((places - places.amin(0)) / span * (MAP - 24) + 12).tolist()
    names = sorted({name for name in labels if name is not None})
    colors = {
        name: COLORS[i] if len(names) <= len(COLORS) else f"hsl({i * 360 // len(names)} 65% 45%)"
        for i, name in enumerate(names)
    }
    dots = "".join(
        f'<circle data-clip="{i}" cx="{x:.1f}" cy="{MAP - y:.1f}" r="5" fill="{colors.get(name or "", COLORS[0])}"/>'
        for i, ((x, y), name) in enumerate(zip(spots, labels, strict=True), start=before)
    )
    legend = "".join(
        f'<div><span class="swatch" style="background:{color}"></span> {escape(name)}</div>'
        for name, color in colors.items()
    )
    return (
        f"<p>{len(labels)} clips. {how}. Hover to see a clip, click for its nearest neighbors.{said}</p>"
        f'<div class="map"><svg width="{MAP}" height="{MAP}" role="img">{dots}</svg><div class="side">'
        f'<div class="shown"></div><h3>Nearest</h3><div class="near clips"></div><h3>Labels</h3>{legend}</div></div>'
    )


def _shown(count: int) -> list[int]:
    """Clips evenly from all, for the gallery."""
    return list(dict.fromkeys(round(i * (count - 1) / max(GALLERY - 1, 1)) for i in range(GALLERY)))


def _gallery(shown: Sequence[int], before: int) -> str:
    """Clips, each with its nearest neighbors beside it; the page's script puts them in."""
    rows = "".join(f'<div class="clips gallery" data-clip="{before + i}"></div>' for i in shown)
    return f"<p>A clip, then those nearest to it, by cosine similarity of the output.</p>{rows}"


def _numbers(labels: Sequence[str | None]) -> Tensor | None:
    """(B,) the number of each clip's label; None where there are no labels to tell."""
    names = sorted({name for name in labels if name is not None})
    if len(names) < 2 or None in labels or len(labels) < 2 * FOLDS:
        return None
    return torch.tensor([names.index(name) for name in labels if name is not None])


def _layerwise(scenes: Mapping[int, Tensor], untrained: Mapping[int, Tensor], numbers: Tensor) -> str:
    """How well the neighbors of a clip tell its label, by layer, beside the same network with random weights."""
    fold = dealt_out(numbers) % FOLDS  # each label in as many as it can, whatever order they come in

    def right(features: Tensor) -> Tensor:
        said = torch.empty_like(numbers)
        for held in range(FOLDS):
            asked = fold == held
            said[asked] = knn_predict(features[~asked], numbers[~asked], features[asked])
        return (said == numbers).double()

    trained, other = ({layer: right(x) for layer, x in each.items()} for each in (scenes, untrained))
    commonest = float(numbers.bincount().max() / len(numbers))
    lines: dict[str, Points] = {
        name: [(layer, float(clips.mean())) for layer, clips in each.items() if layer >= 0]
        for name, each in (("accuracy", trained), ("random weights", other))
    }
    lines["the commonest label"] = [(0, commonest), (max(scenes), commonest)]
    # of the same clips: each is told by both, by one, or by none
    gains = trained[-1] - other[-1]
    gain, around = float(gains.mean()), 1.96 * float(gains.std(correction=1)) / math.sqrt(len(gains))
    return (
        f"<p>Accuracy of 20 nearest neighbors on {len(numbers)} clips, {FOLDS} folds; of the output, after the final "
        f"norm, {trained[-1].mean():.3f}. The same network with random weights (seed 0) has {other[-1].mean():.3f}: "
        f"what was learned changes that by {gain:+.3f} (95 % interval over these clips {gain - around:+.3f} to "
        f"{gain + around:+.3f}).</p>{_plot('kNN', 'layer', lines)}"
    )


def _confusion(truth: Sequence[str], said: Sequence[str]) -> str:
    """A table of all classes, or a list of what is confused most where there are more than `MOST_CLASSES`."""
    names = sorted({*truth, *said})
    counts = Counter(zip(truth, said, strict=True))
    clips = Counter(truth)
    right = f"<p>{sum(counts[name, name] for name in names)} of {len(truth)} right."
    if len(names) > MOST_CLASSES:
        wrong = [(pair, count) for pair, count in counts.most_common() if pair[0] != pair[1]]
        listed = "".join(
            f"<tr><td>{escape(one)}</td><td>{escape(other)}</td><td>{count} of {clips[one]}</td></tr>"
            for (one, other), count in wrong[:MOST_CONFUSED]
        )
        head = "<tr><th>what a clip is</th><th>what it is taken for</th><th>clips</th></tr>"
        return (
            f"{right} Of {len(names)} classes, the {min(len(wrong), MOST_CONFUSED)} most frequent confusions of "
            f"{len(wrong)}.</p><table>{head}{listed}</table>"
        )

    def cell(one: str, other: str) -> str:
        count = counts[one, other]
        return (
            f'<td style="background:rgb(68 119 170 / {count / clips[one]:.2f})">{count}</td>' if count else "<td></td>"
        )

    lines = "".join(f"<tr><th>{escape(one)}</th>{''.join(cell(one, other) for other in names)}</tr>" for one in names)
    return (
        f"{right} A row is what a clip is, a column what it is taken for.</p>"
        f'<table class="confusion"><tr><th></th>{"".join(f"<th>{escape(name)}</th>" for name in names)}</tr>'
        f"{lines}</table>"
    )
