"""Embeddings of any number of clips to one file, in parts: memory stays flat, and a job that was cut off goes on.

Parts are .npz files in a folder beside the file that is to come. They are put together, in the order of the clips, when
the last of them is there. Processes that share a job may start, end and be started again at any time: the folder comes
into being with the job written in it, and whoever puts the parts together renames it, and holds a lock meanwhile.
Another job may take a folder that has no part yet; whoever writes a part sees that it is still of the same job.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import torch

from mmssl.clips import Clips, Input
from mmssl.data.manifest import Row
from mmssl.embed import NOT_FINITE, Embedder, Layer
from mmssl.files import alone
from mmssl.index import check, write_index
from mmssl.recordings import overlap_of
from mmssl.types import Embeddings

# the folder of parts, the stretches of clips that it lacks, settings of `write_parts`, and whether to show a bar -> the
# name of each clip that cannot be read, and why
Spread = Callable[[Path, Sequence[range], Mapping[str, Any], bool], Iterable[tuple[str, str]]]

_JOB = "job.json"  # in the folder of parts: what they are of; whoever puts them together holds it
_WAY_OUT = "delete it, or choose another --out"


@dataclass(frozen=True)
class Written:
    """What became of a job.

    path: the file; None while parts that other processes work on are not there yet, or one of them puts all together.
    clips: all of them.
    bad: those that could not be read; 0 where there is no file yet.
    width: of a scene; 0 where there is no file yet.
    """

    path: Path | None
    clips: int
    bad: int
    width: int


def write_embeddings(
    embedder: Embedder,
    inputs: Input | Sequence[Input],
    out: str | Path,
    *,
    modality: str | None = None,
    layers: Sequence[Layer] = (-1,),
    pool: str | None = None,
    tokens: bool = False,
    window: float | None = None,
    overlap: float | None = None,
    batch_size: int = 16,
    batch_seconds: float = 60.0,
    on_bad_clip: Literal["raise", "skip"] = "skip",
    part: tuple[int, int] = (1, 1),
    progress: bool = False,
    tell: Callable[[str, str], None] = lambda name, reason: None,
    index: bool = False,
    spread: Spread | None = None,
) -> Written:
    """Embed clips into a file; the same call goes on where it was cut off.

    .npz, which numpy opens without unpickling, holds `ids` and `scene` (clips, width), NaN for a clip that could not
    be read; where tokens are kept `tokens`, `valid` and, for sound and video, `time_ms`; where clips were bad `bad_ids`
    and `bad_reasons`. With several layers `scene` and `tokens` get an axis of layers in front, which `layers` names.

    .parquet has one row a clip: `id`, `scene`, `error`, and where tokens are kept `tokens` and `time_ms`; the scene of
    a clip that could not be read is null and its error says why. With several layers there is a `scene_<layer>` and a
    `tokens_<layer>` for each of them.

    An index is a folder of the scenes of one layer, see `mmssl.index`; clips that could not be read are not in it.

    Args:
        out: file to write; .npz is added where it has another ending than .npz and .parquet. Until it is written,
            parts lie in a folder of its name with .parts.
        inputs, modality, pool, tokens, window, overlap, batch_size, batch_seconds, on_bad_clip, progress: see
            `Embedder.embed`.
        layers: see `layer` of `Embedder.embed`.
        part: (i, n): embed only the i-th of n stretches of the clips, one for each of n processes. Whoever is there
            last writes the file.
        tell: called with the name of each clip that could not be read, and why.
        index: write an index, a folder, whatever the ending of `out`.
        spread: embeds stretches of the clips elsewhere, see `on_ray`; None for here and one after the other.

    Raises:
        ValueError: parts of another job lie there, no clip can be read, Parquet is asked for without pyarrow or an
            index without faiss, or an index of tokens or several layers.
    """
    out = Path(out)
    if index:
        if tokens or len(layers) > 1:
            raise ValueError(f"{out}: an index has one vector a clip; leave out tokens, and choose one layer")
        check(out)
    elif out.suffix not in FORMATS:
        out = out.with_name(out.name + ".npz")
    if not index and out.suffix == ".parquet":
        _pyarrow(out)
    elif not index and len(layers) > 1 and not all(isinstance(layer, int) for layer in layers):
        raise ValueError(
            f"{out}: layers={list(layers)}: an .npz names layers by numbers, and a weighting has none; write "
            "it to a file of its own, or .parquet"
        )
    number, of = part
    if not 1 <= number <= of:
        raise ValueError(f"part={number}/{of}: counts from 1 to the number of processes")
    whole, embedder = embedder, embedder.of(modality)
    overlap = None if window is None else overlap_of(window, overlap)
    settings: dict[str, Any] = {"layers": layers, "pool": pool, "window": window, "overlap": overlap}
    settings |= {"batch_size": batch_size, "batch_seconds": batch_seconds, "on_bad_clip": on_bad_clip}
    embedder.check(**settings)
    clips = embedder.clips(inputs, window=window)
    digest = whole.digest()
    job = {
        # these first, for the encoder's digest changes with them
        "modality": embedder.modality,
        "precision": embedder.precision,
        "clips": len(clips),
        "encoder": digest,
        "layers": [layer if isinstance(layer, int) else [list(pair) for pair in layer] for layer in layers],
        "pool": pool,
        "tokens": tokens,
        "window": None if window is None else [window, overlap],
    }
    folder, merging = (out.with_name(f"{out.name}.{state}") for state in ("parts", "merging"))
    left_to_others = Written(None, len(clips), 0, 0)
    if not _open(folder, merging, job, clips):
        return left_to_others

    mine = range(len(clips) * (number - 1) // of, len(clips) * number // of)
    missing = list(_missing(mine, folder))
    settings |= {"tokens": tokens, "job": job}
    if spread is not None:
        told: Iterable[tuple[str, str]] = spread(folder, missing, settings, progress)
    else:
        told = (bad for places in missing for bad in write_parts(embedder, clips, folder, places, settings, progress))
    try:
        for name, reason in told:
            tell(name, reason)
    except FileNotFoundError:
        if folder.exists() or not (merging.exists() or out.exists()):
            raise
        return left_to_others  # which had the same clips, and were faster

    def write(parts: Sequence[Path], path: Path) -> None:
        if not index:
            with _whole(path) as unfinished:
                FORMATS[path.suffix](parts, unfinished, layers)
            return
        about = {
            "encoder": os.path.abspath(whole.name) if os.path.exists(whole.name) else whole.name,
            "digest": digest,
            "modality": embedder.modality,
            "layer": layers[0],
            "pool": embedder.pool_name(pool, layers),
            "precision": embedder.precision,
            "window": window,
            "overlap": overlap,
        }
        write_index(path, about, _scenes(parts, layers[0]), _rows(parts, clips), _bad(parts))

    return _finish(folder, merging, out, len(clips), layers[0], write) or left_to_others


def write_parts(
    embedder: Embedder, clips: Clips, folder: Path, places: range, settings: Mapping[str, Any], progress: bool = False
) -> Iterator[tuple[str, str]]:
    """Embed a stretch of clips into parts, and give the name of each that cannot be read, and why.

    Args:
        embedder: of one modality.
        folder: of the parts.
        settings: of `Embedder.stream`, and the job.

    Raises:
        ValueError: the folder is of another job by now.
    """
    start, settings = places.start, dict(settings)
    job = settings.pop("job")
    for found in embedder.stream(clips, places=places, progress=progress, **settings):
        stop = start + len(found[0].ids)
        part = _part(folder, start, stop)
        _check_job(folder, job)
        _write_part(part, found, settings["layers"])
        try:
            _check_job(folder, job)
        except ValueError:  # it has just been taken
            part.unlink(missing_ok=True)
            raise
        yield from found[0].bad.items()
        start = stop


def _open(folder: Path, merging: Path, job: Mapping[str, Any], clips: Clips) -> bool:
    """Make the folder of parts, or see that those in it are of the same job.

    Returns:
        False where another process is putting them together.

    Raises:
        ValueError: they are of another job, or it is not known of which.
    """
    said = folder / _JOB
    try:
        if merging.exists() and not folder.exists():
            with alone(merging / _JOB) as free:
                if not free:
                    _check_job(merging, job)
                    return False
                merging.rename(folder)  # it was cut off while the parts were put together
        if not said.exists():
            _begin(folder, job)
        elif json.loads(said.read_text(encoding="utf-8")) != job and not _parts(folder):
            _write_job(said, job)  # of another that wrote nothing, such as one that failed at its first clip
        _check_job(folder, job)
        _check_clips(folder, clips)
    except FileNotFoundError:  # another process has begun to, or is done
        if folder.exists() and not said.exists():
            raise ValueError(f"{folder}: has no {_JOB}, which says what its parts are of; {_WAY_OUT}") from None
        return False
    return True


def _begin(folder: Path, job: Mapping[str, Any]) -> None:
    """Make the folder together with what says its job, so that of several processes exactly one does."""
    new = folder.with_name(f"{folder.name}.{uuid4().hex}")
    new.mkdir(parents=True)
    _write_job(new / _JOB, job)
    try:
        new.rename(folder)
    except OSError as error:
        shutil.rmtree(new)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # which another process has made
            raise


def _write_job(path: Path, job: Mapping[str, Any]) -> None:
    with _whole(path, f".{uuid4().hex}") as unfinished:
        unfinished.write_text(json.dumps(job, indent=2) + "\n", encoding="utf-8")


def _check_job(folder: Path, job: Mapping[str, Any]) -> None:
    """See that what a folder says its parts are of is this job."""
    before = json.loads((folder / _JOB).read_text(encoding="utf-8"))
    for key, value in job.items():
        if before.get(key) != value:
            raise ValueError(
                f"{folder}: holds parts of another job, where {key} is {before.get(key)} and not {value}; {_WAY_OUT}"
            )


def _check_clips(folder: Path, clips: Clips) -> None:
    """See that the parts in a folder are of these clips."""
    for path in _parts(folder):
        first, stop = _places(path)
        with np.load(path, allow_pickle=False) as file:
            ids = file["ids"].tolist()
        for place, name in zip(range(first, stop), ids, strict=True):
            if clips.name(place) != name:
                raise ValueError(
                    f"{folder}: holds parts of other clips, number {place} was {name} and is {clips.name(place)}; "
                    f"{_WAY_OUT}"
                )


def _finish(
    folder: Path, merging: Path, out: Path, clips: int, layer: Layer, write: Callable[[Sequence[Path], Path], None]
) -> Written | None:
    """Put the parts together where all of them are there and no other process does, and remove them."""
    if any(_missing(range(clips), folder)):
        return None
    with ExitStack() as stack:
        try:
            if not stack.enter_context(alone(folder / _JOB)):
                return None
            folder.rename(merging)
        except FileNotFoundError:  # another process has begun to
            return None
        parts = _end_to_end(merging)
        bad = width = 0
        for path in parts:
            with np.load(path, allow_pickle=False) as file:
                bad += int((file["errors"] != "").sum())
                width = max(width, file[f"scene_{layer}"].shape[1])
        if bad < clips:
            write(parts, out)
        else:
            with np.load(parts[0], allow_pickle=False) as file:
                first_bad, reason = file["ids"][0], file["errors"][0]
        for path in parts:
            path.unlink()
    # no sooner than the lock is gone: NFS keeps a file that is open, and with it the folder
    shutil.rmtree(merging, ignore_errors=True)
    if bad == clips:
        raise ValueError(f"none of the {clips} clips can be read; the first is {first_bad} ({reason})")
    return Written(out, clips, bad, width)


def _parts(folder: Path) -> list[Path]:
    """In the order of their clips."""
    return sorted(folder.glob("*.npz"))


def _missing(mine: range, folder: Path) -> Iterator[range]:
    """The stretches of these clips that no part covers; parts may be of a job that more processes or fewer shared."""
    at = mine.start
    for first, stop in map(_places, _parts(folder)):
        if at < min(first, mine.stop):
            yield range(at, min(first, mine.stop))
        at = max(at, stop)
    if at < mine.stop:
        yield range(at, mine.stop)


def _end_to_end(folder: Path) -> list[Path]:
    """The parts in the order of their clips, each clip in one of them only.

    Where two processes were at the same clips at the same time, and shared the job otherwise or with another batch
    size, their parts do not begin at the same clips.
    """
    parts, kept = _parts(folder), []
    at = 0
    for path in parts:
        first, stop = _places(path)
        if at < stop:
            kept.append(_part(folder, at, stop))
            if first < at:
                _write_arrays(kept[-1], _without_first(path, at - first))
            at = stop
    for path in set(parts) - set(kept):
        path.unlink()
    return kept


def _without_first(path: Path, clips: int) -> dict[str, np.ndarray]:
    """What a part holds but for its first clips."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    good = int((arrays["errors"][:clips] == "").sum())
    tokens = int(arrays["lengths"][:clips].sum()) if "lengths" in arrays else 0
    each = {"ids": clips, "errors": clips, "lengths": clips}
    return {name: x[each.get(name, good if name.startswith("scene_") else tokens) :] for name, x in arrays.items()}


def _part(folder: Path, first: int, stop: int) -> Path:
    return folder / f"{first:012}-{stop:012}.npz"


def _places(path: Path) -> tuple[int, int]:
    """The first clip of a part, and the one after its last."""
    first, _, stop = path.stem.partition("-")
    return int(first), int(stop)


def _write_part(path: Path, found: Sequence[Embeddings], layers: Sequence[Layer]) -> None:
    """The rows of good clips only, and tokens end to end."""
    ids = found[0].ids
    # no width where no clip of them is good; a name may come twice, good once and bad once
    finite = torch.stack([one.scene.isfinite().all(1) for one in found]).all(0)
    good = finite.numpy() & (found[0].scene.shape[1] > 0)
    errors = ["" if fine else found[0].bad.get(name, NOT_FINITE) for name, fine in zip(ids, good, strict=True)]
    valid = found[0].valid.numpy() & good[:, None]
    arrays: dict[str, Any] = {"ids": np.array(ids, np.str_), "errors": np.array(errors, np.str_)}
    for layer, one in zip(layers, found, strict=True):
        arrays[f"scene_{layer}"] = one.scene.numpy()[good]
        if valid.shape[1]:
            arrays[f"tokens_{layer}"] = one.tokens.numpy()[valid]
    if valid.shape[1]:
        arrays["lengths"] = valid.sum(1)
        if found[0].time_ms is not None:
            arrays["time_ms"] = found[0].time_ms.numpy()[valid]
    _write_arrays(path, arrays)


def _write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    # two processes may be at the same part, where one was started again
    with _whole(path, f".{uuid4().hex}") as unfinished, unfinished.open("wb") as file:
        np.savez(file, **arrays)


@contextmanager
def _whole(path: Path, mark: str = "") -> Iterator[Path]:
    """A place to write to, which becomes `path` if nothing goes wrong.

    Args:
        mark: in its name, to tell it from those of others who write the same.
    """
    unfinished = path.with_name(f"{path.name}{mark}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        if error.filename is None:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _to_npz(parts: Sequence[Path], path: Path, layers: Sequence[Layer]) -> None:
    """One array after the other, each part by part: no array is ever in memory."""
    count = _places(parts[-1])[1]
    width = channels = longest = 0
    text = {"ids": 1, "errors": 1}  # characters of the longest
    n_bad, timed = 0, False
    for part in parts:
        with np.load(part, allow_pickle=False) as file:
            text = {key: max(most, file[key].dtype.itemsize // 4) for key, most in text.items()}
            n_bad += int((file["errors"] != "").sum())
            width = max(width, file[f"scene_{layers[0]}"].shape[1])
            if "lengths" in file:
                longest = max(longest, int(file["lengths"].max()))
                channels = file[f"tokens_{layers[0]}"].shape[1]
                timed = timed or "time_ms" in file
    stack = (len(layers),) if len(layers) > 1 else ()

    def scenes() -> Iterator[np.ndarray]:
        for layer in layers:
            for part in parts:
                with np.load(part, allow_pickle=False) as file:
                    rows = np.full((len(file["ids"]), width), np.nan, np.float32)
                    good = file["errors"] == ""
                    if good.any():
                        rows[good] = file[f"scene_{layer}"]
                yield rows

    def ragged(names: Sequence[str], *shape: int) -> Iterator[np.ndarray]:
        for name in names:
            for part in parts:
                with np.load(part, allow_pickle=False) as file:
                    rows = np.zeros((len(file["ids"]), longest, *shape), np.float32)
                    if "lengths" in file:
                        rows[np.arange(longest) < file["lengths"][:, None]] = file[name]
                yield rows

    def valid() -> Iterator[np.ndarray]:
        for part in parts:
            with np.load(part, allow_pickle=False) as file:
                lengths = file["lengths"] if "lengths" in file else np.zeros(len(file["ids"]), np.int64)
            yield np.arange(longest) < lengths[:, None]

    def texts(key: str, only_bad: bool) -> Iterator[np.ndarray]:
        for part in parts:
            with np.load(part, allow_pickle=False) as file:
                chosen = file["errors"] != "" if only_bad else slice(None)
                yield file[key][chosen].astype(f"<U{text[key]}")

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

        def put(name: str, shape: tuple[int, ...], dtype: str, rows: Iterator[np.ndarray]) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = {"descr": dtype, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for chunk in rows:
                    file.write(np.ascontiguousarray(chunk, np.dtype(dtype)).tobytes())

        put("ids", (count,), f"<U{text['ids']}", texts("ids", False))
        put("scene", (*stack, count, width), "<f4", scenes())
        if stack:
            put("layers", stack, "<i8", iter([np.array(layers)]))
        if longest:
            names = [f"tokens_{layer}" for layer in layers]
            put("tokens", (*stack, count, longest, channels), "<f4", ragged(names, channels))
            put("valid", (count, longest), "|b1", valid())
            if timed:
                put("time_ms", (count, longest), "<f4", ragged(["time_ms"]))
        if n_bad:
            put("bad_ids", (n_bad,), f"<U{text['ids']}", texts("ids", True))
            put("bad_reasons", (n_bad,), f"<U{text['errors']}", texts("errors", True))


def _to_parquet(parts: Sequence[Path], path: Path, layers: Sequence[Layer]) -> None:
    """One row group a part."""
    pa, parquet = _pyarrow(path)
    scenes = {f"scene_{layer}": f"scene_{layer}" if len(layers) > 1 else "scene" for layer in layers}
    tokens = {f"tokens_{layer}": f"tokens_{layer}" if len(layers) > 1 else "tokens" for layer in layers}
    width = channels = 0
    timed = False
    for part in parts:
        with np.load(part, allow_pickle=False) as file:
            width = max(width, file[f"scene_{layers[0]}"].shape[1])
            if "lengths" in file:
                channels, timed = file[f"tokens_{layers[0]}"].shape[1], timed or "time_ms" in file
    vector, token = (pa.list_(pa.float32(), size) for size in (width, channels))
    fields = [pa.field("id", pa.string(), nullable=False), *(pa.field(name, vector) for name in scenes.values())]
    if channels:
        fields += [pa.field(name, pa.list_(token)) for name in tokens.values()]
        fields += [pa.field("time_ms", pa.list_(pa.float32()))] if timed else []
    schema = pa.schema([*fields, pa.field("error", pa.string())])

    with parquet.ParquetWriter(path, schema) as writer:
        for part in parts:
            with np.load(part, allow_pickle=False) as file:
                bad = file["errors"] != ""
                columns: dict[str, Any] = {"id": [_utf8(name) for name in file["ids"]]}
                for stored, name in scenes.items():
                    rows = np.zeros((len(bad), width), np.float32)
                    if not bad.all():
                        rows[~bad] = file[stored]
                    columns[name] = pa.FixedSizeListArray.from_arrays(rows.ravel(), width, mask=pa.array(bad))
                if channels:
                    lengths = file["lengths"] if "lengths" in file else np.zeros(len(bad), np.int64)
                    ends = pa.array(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
                    for stored, name in tokens.items():
                        x = file[stored] if stored in file else np.zeros((0, channels), np.float32)
                        values = pa.FixedSizeListArray.from_arrays(x.ravel(), channels)
                        columns[name] = pa.ListArray.from_arrays(ends, values, mask=pa.array(bad))
                    if timed:
                        times = file["time_ms"] if "time_ms" in file else np.zeros(0, np.float32)
                        columns["time_ms"] = pa.ListArray.from_arrays(ends, pa.array(times), mask=pa.array(bad))
                columns["error"] = [_utf8(error) or None for error in file["errors"]]
            writer.write_table(pa.table(columns, schema=schema))


def _scenes(parts: Sequence[Path], layer: Layer) -> Iterator[np.ndarray]:
    for part in parts:
        with np.load(part, allow_pickle=False) as file:
            if len(scenes := file[f"scene_{layer}"]):
                yield scenes


def _rows(parts: Sequence[Path], clips: Clips) -> Iterator[Row]:
    for part in parts:
        with np.load(part, allow_pickle=False) as file:
            errors = file["errors"]
        yield from (clips.row(place) for place, error in enumerate(errors, _places(part)[0]) if not error)


def _bad(parts: Sequence[Path]) -> Iterator[Row]:
    for part in parts:
        with np.load(part, allow_pickle=False) as file:
            ids, errors = file["ids"].tolist(), file["errors"].tolist()
        yield from ({"id": id, "error": error} for id, error in zip(ids, errors, strict=True) if error)


def _utf8(text: str) -> str:
    """What of a file's name is no UTF-8 becomes a question mark: Parquet holds nothing else."""
    return str(text).encode("utf-8", "replace").decode("utf-8")


def _pyarrow(path: Path) -> tuple[Any, Any]:
    """pyarrow and its Parquet.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path}: Parquet takes pyarrow: pip install mmssl[parquet]; or name a .npz file") from None
    return pyarrow, parquet


FORMATS: dict[str, Callable[[Sequence[Path], Path, Sequence[Layer]], None]] = {".npz": _to_npz, ".parquet": _to_parquet}
