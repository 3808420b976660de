"""An index of clips, searched by whatever its encoder reads: a sentence, a picture, a sound.

A folder of plain files: `index.json` says by which encoder and how, `clips.jsonl` is a manifest of the clips,
`bad.jsonl` names those that could not be read, and `vectors.000.faiss` and on hold their vectors, of length 1, in the
clips' order. A search compares with every vector (exact), and maps them from the disk: memory stays flat.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.data.manifest import Manifest, Row, write_manifest
from mmssl.embed import NOT_FINITE, Embedder, load
from mmssl.modalities import MODALITIES
from mmssl.types import BadClip

FORMAT = 1
SHARD_VALUES = 2**26  # of one file of vectors: 256 MB, the most that is in memory while an index is written
_ABOUT, _CLIPS, _BAD = "index.json", "clips.jsonl", "bad.jsonl"


@dataclass(frozen=True)
class Hit:
    """A clip that was found.

    score: cosine similarity with the query, from -1 to 1.
    row: what is known of the clip: "id", the path of its file, and "text", "label" and whatever else its manifest says.
    """

    score: float
    row: Row


def write_index(
    folder: Path, about: Mapping[str, Any], vectors: Iterable[np.ndarray], rows: Iterable[Row], bad: Iterable[Row]
) -> None:
    """Write an index, all or nothing, in the place of one that is there.

    Args:
        about: the encoder ("encoder", "digest", "modality", "precision"), and how it was used ("layer", "pool",
            "window", "overlap").
        vectors: (B, E) of the clips in their order, some at a time.
        rows: of each vector its clip.
        bad: "id" and "error" of the clips without one.

    Raises:
        ValueError: see `check`; or there are no vectors.
    """
    check(folder)
    faiss = _faiss(folder)
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    shards = clips = 0
    shard = None
    for some in vectors:
        if shard is None:
            shard = faiss.IndexFlatIP(some.shape[1])
        shard.add(_unit(some))
        clips += len(some)
        if shard.ntotal * shard.d >= SHARD_VALUES:
            _write(faiss, shard, _shard(unfinished, shards))
            shard, shards = None, shards + 1
    if shard is not None:
        _write(faiss, shard, _shard(unfinished, shards))
        shards += 1
    write_manifest(unfinished / _CLIPS, rows)
    with open(unfinished / _BAD, "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in bad)
    whole = {"format": FORMAT, **about, "clips": clips, "shards": shards}
    (unfinished / _ABOUT).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def check(folder: Path) -> None:
    """See that an index can be written here, before any clip is embedded.

    Raises:
        ValueError: faiss is not installed, or the folder holds something else than an index.
    """
    _faiss(folder)
    if folder.exists() and not (folder / _ABOUT).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is there already and is no index; give a new folder")


class Index:
    """An index that `mmssl embed --index` wrote, with the encoder that wrote it.

    Args:
        folder: of the index.
        model: where its encoder is, if it is no longer where the index says.
        device: see `mmssl.load`.

    Raises:
        ValueError: no index, a file of it that is damaged, or an encoder that is not there or has other weights.
    """

    def __init__(self, folder: str | Path, *, model: str | Path | None = None, device: str = "auto") -> None:
        self.folder = Path(folder)
        self.about = _read_about(self.folder)
        faiss = _faiss(self.folder)
        self.clips = Manifest(self.folder / _CLIPS)
        self._vectors = None
        for number in range(self.about["shards"]):
            path = _shard(self.folder, number)
            try:
                shard = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
            except RuntimeError as error:
                reason = str(error).rpartition(": ")[2]
                raise ValueError(f"{path}: cannot be read ({reason}); write the index again") from None
            if self._vectors is None:
                self._vectors = faiss.IndexShards(shard.d, False, True)
            self._vectors.add_shard(shard)
        found = 0 if self._vectors is None else self._vectors.ntotal
        if not found == len(self.clips) == self.about["clips"]:
            raise ValueError(
                f"{self.folder}: holds {found} vectors of {len(self.clips)} clips, and {_ABOUT} says "
                f"{self.about['clips']}; write the index again"
            )
        self.embedder = self._load(model, device)

    def __len__(self) -> int:
        return len(self.clips)

    def search(self, query: str | Path, *, modality: str | None = None, k: int = 10) -> list[Hit]:
        """The clips that are most similar to a query, from the most similar on.

        Args:
            query: a file of any modality of the encoder, or a sentence where one of them is text.
            modality: what the query is, where its file does not tell.
            k: how many; all where there are fewer.

        Raises:
            ValueError: nothing that the encoder reads, or of a modality that shares no space with the index's.
            BadClip: a file that cannot be read.
        """
        if k < 1:
            raise ValueError(f"k={k}: must be at least 1")
        if not str(query).strip():
            raise ValueError("the query is empty; give a sentence or a file")
        modality = self._modality(str(query), modality)
        if modality != self.about["modality"] and self.about["pool"] != "joint":
            raise ValueError(
                f"{self.folder}: its vectors (pool {self.about['pool']}, layer {self.about['layer']}) are of no space "
                f"that {self.about['modality']} shares with {modality}; search with {self.about['modality']}, or embed "
                "the clips with --pool joint by a run on both"
            )
        reader = self.embedder.of(modality)
        timed = self.about["window"] is not None and reader.encoder.frontend.reader_settings.get("rate") is not None
        window = {key: self.about[key] for key in ("window", "overlap")} if timed else {}
        layer = self.about["layer"]
        if isinstance(layer, list):  # weights of several
            layer = tuple((int(i), float(weight)) for i, weight in layer)
        settings: dict[str, Any] = {"layers": [layer], "pool": self.about["pool"], **window}
        [[found], *more] = reader.stream([query], on_bad_clip="skip", **settings)
        for name, reason in found.bad.items():
            raise BadClip(name, reason)
        if more or len(found.ids) != 1:
            raise ValueError(f"{query}: holds several clips; search with one at a time")
        if not found.scene.isfinite().all():
            raise BadClip(str(query), NOT_FINITE)
        scores, places = self._vectors.search(_unit(found.scene.numpy()), min(k, len(self)))  # type: ignore[union-attr]
        return [Hit(float(score), self.clips[int(place)]) for score, place in zip(scores[0], places[0], strict=True)]

    def _load(self, model: str | Path | None, device: str) -> Embedder:
        try:
            found = load(model or self.about["encoder"], device=device, precision=self.about["precision"])
        except ValueError as error:
            if model is not None:
                raise
            raise ValueError(f"{error}; {self.folder} was written by it: say where it is now by --model") from None
        if found.digest() != self.about["digest"]:
            raise ValueError(
                f"{self.folder}: was written by another encoder than {found.name} holds now; embed the clips again, or "
                "give the one that wrote it by --model"
            )
        return found

    def _modality(self, query: str, modality: str | None) -> str:
        """What a query is; see `search`."""
        own, name = self.embedder.modalities, self.embedder.name
        if modality is not None and modality not in own:
            raise ValueError(f"modality={modality!r}: {name} has an encoder of {' and '.join(own)}")
        is_file, suffix = os.path.isfile(query), os.path.splitext(query)[1].lower()
        if modality is not None and (is_file or MODALITIES[modality].media == "text"):
            return modality
        fitting = [one for one in own if suffix in MODALITIES[one].suffixes]
        if not is_file:
            if "text" in own and modality is None and not fitting:
                return "text"
            way = "; for these words as a sentence, add --modality text" if "text" in own and modality is None else ""
            sentence = "" if "text" in own else f", and {name} has no encoder of text that would read it as a sentence"
            raise ValueError(f"{query}: no such file{sentence}{way}")
        if len(fitting) != 1:
            raise ValueError(
                f"{query}: might be of {' or '.join(fitting)}; say which by --modality"
                if fitting
                else f"{query}: is no file of {' or '.join(own)} by its name; say what it is by --modality"
            )
        return fitting[0]


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{folder}: no index; `mmssl embed MODEL CLIPS --index {folder}` writes one") from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{folder / _ABOUT}: is not of an index of this version; write the index again")
    return found


def _shard(folder: Path, number: int) -> Path:
    return folder / f"vectors.{number:03}.faiss"


def _write(faiss: Any, shard: Any, path: Path) -> None:
    try:
        faiss.write_index(shard, str(path))
    except RuntimeError as error:
        raise OSError(errno.EIO, f"cannot be written ({str(error).rpartition(': ')[2]})", str(path)) from None


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1; zero where they are zero."""
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30), np.float32)


def _faiss(folder: Path) -> Any:
    """faiss.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise ValueError(f"{folder}: an index takes faiss: pip install mmssl[ann]") from None
    return faiss
