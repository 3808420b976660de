"""From a run folder to vectors: load an encoder, and embed or classify what you have."""

from __future__ import annotations

import copy
import glob
import math
import os
import queue
import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, cast, overload

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.assemble import build_augment, build_encoder, build_objective, build_reader, build_span, read_config
from mmssl.data.batching import collate_samples
from mmssl.data.dataset import ManifestDataset, Sample
from mmssl.data.manifest import Manifest
from mmssl.data.text import CharVocabulary
from mmssl.encoder import Encoder
from mmssl.evaluation.speech import best_path, prefix_beam
from mmssl.modalities import MODALITIES
from mmssl.nn.pooling import Pool
from mmssl.training.checkpoint import read_tensors
from mmssl.types import BadClip, Batch, Embeddings, Frontend, Raw, Tokens, valid_mask

Input: TypeAlias = str | Path | BinaryIO | np.ndarray | Tensor | Manifest
Precision = Literal["float32", "bfloat16"]
# Clips are read in windows, sorted by length within, and embedded in groups. Windows start small, so that the model
# has something to do soon, and double up to so many groups, or so many values whichever comes first.
WINDOW_GROUPS = 16
WINDOW_VALUES = 2**24


def load(path: str | Path, *, device: str = "auto", precision: Precision = "float32") -> Embedder:
    """The encoder of a run, ready for use.

    Args:
        path: folder of a run or of an exported encoder: config.json and encoder.safetensors, and
            objective.safetensors where the run was fine-tuned.
        device: "auto" takes a GPU where there is one.
        precision: "bfloat16" computes products in half the bits; what comes out is float32 all the same.

    Raises:
        ValueError: there is no such folder, or what is in it is not an encoder, whole and of this version.
    """
    folder = Path(path)
    if folder.name == "encoder.safetensors":
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{path}: no such folder; give the folder of a run or of an exported encoder")
    config = read_config(folder)
    file = folder / "encoder.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder}: no encoder.safetensors beside config.json; a run writes it when it ends")
    try:
        encoder = build_encoder(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: no encoder can be built from this: {error!r}") from error
    tensors = read_tensors(file)
    _check(encoder.state_dict(), tensors, file)
    encoder.load_state_dict(tensors)
    head = folder / "objective.safetensors"
    return Embedder(
        encoder, config, device=device, precision=precision, head=head if head.is_file() else None, name=str(folder)
    )


def _check(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], place: Path) -> None:
    """Compare the weights that a model has with those that a file holds.

    Raises:
        ValueError: one is missing, unknown or of another shape; the first of them is named.
    """
    for name in [*own, *tensors]:
        if name not in tensors:
            raise ValueError(f"{place}: '{name}' is missing; config.json and these weights are not of the same run")
        if name not in own:
            raise ValueError(f"{place}: '{name}' has no place; config.json and these weights are not of the same run")
        if own[name].shape != tensors[name].shape:
            raise ValueError(
                f"{place}: '{name}' is {tuple(tensors[name].shape)}, and config.json makes it "
                f"{tuple(own[name].shape)}; they are not of the same run"
            )


class Embedder:
    """An encoder with all that it takes to use it on files.

    Args:
        encoder: or anything else with its `tokens`, `forward`, `frontend`, `dim` and `depth`.
        config: what config.json holds.
        device, precision: see `load`.
        head: the file of the objective's own weights, for `predict`.
        name: what protocols call it.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: Mapping[str, Any],
        *,
        device: str = "auto",
        precision: Precision = "float32",
        head: Path | None = None,
        name: str = "encoder",
    ) -> None:
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision={precision!r}: choose float32 or bfloat16")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
            self.encoder = encoder.to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={device!r}: torch cannot use it here: {str(error).splitlines()[0]}") from None
        if precision == "bfloat16":
            # autocast would bring every weight to bfloat16 at every call, and keeps none of those that need no gradient
            self.encoder = copy.deepcopy(self.encoder)
            for module in self.encoder.modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
        self.encoder.eval().requires_grad_(False)
        self.config = dict(config)
        self.precision = precision
        self.name = name
        self._head = head
        self._objective: nn.Module | None = None

    @property
    def dim(self) -> int:
        """The width of a token."""
        return self.encoder.dim

    @property
    def depth(self) -> int:
        """The number of blocks, and of the last layer."""
        return self.encoder.depth

    @property
    def modality(self) -> str:
        return str(self.config["modality"])

    @overload
    def embed(
        self,
        inputs: Input | Sequence[Input],
        *,
        layer: int = ...,
        pool: str = ...,
        rate: float | None = ...,
        tokens: bool = ...,
        batch_size: int = ...,
        batch_seconds: float = ...,
        on_bad_clip: Literal["raise", "skip"] = ...,
        progress: bool = ...,
    ) -> Embeddings: ...

    @overload
    def embed(
        self,
        inputs: Input | Sequence[Input],
        *,
        layer: Sequence[int] | Literal["all"],
        pool: str = ...,
        rate: float | None = ...,
        tokens: bool = ...,
        batch_size: int = ...,
        batch_seconds: float = ...,
        on_bad_clip: Literal["raise", "skip"] = ...,
        progress: bool = ...,
    ) -> list[Embeddings]: ...

    def embed(
        self,
        inputs: Input | Sequence[Input],
        *,
        layer: int | Sequence[int] | Literal["all"] = -1,
        pool: str = "mean",
        rate: float | None = None,
        tokens: bool = True,
        batch_size: int = 16,
        batch_seconds: float = 60.0,
        on_bad_clip: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> Embeddings | list[Embeddings]:
        """Embed clips, in their order. Neither that order nor the batch size changes a clip's vectors.

        Args:
            inputs: one of these or a sequence of them: a path; a glob pattern; a folder (all files of the modality
                below it); a manifest (.jsonl); an open binary file; an array or tensor: (L,) samples, (C, H, W)
                pixels in [0, 1], or (C, T, H, W) of frames, or with one axis more several such clips.
            layer: -1 the encoder's output, after its final norm where it has one; 0 the input of the first block; i the
                output of block i, without the final norm; several of them, or "all" (0 to `depth`), in one pass.
            pool: how tokens become the scene, see `Pool.named`.
            rate: samples per second of arrays, where it is not the encoder's own.
            tokens: keep every token, not only the scenes.
            batch_size: most clips computed at a time.
            batch_seconds: most seconds of sound computed at a time; a longer clip goes alone.
            on_bad_clip: "raise" stops at the first clip that cannot be read; "skip" goes on, and gives it a row of NaN
                and an entry in `Embeddings.bad`.
            progress: show a bar.

        Returns:
            Embeddings, or a list of them, one for each layer, where several are asked for. On the CPU, float32.

        Raises:
            BadClip: a clip cannot be read, or is shorter than one token.
            ValueError: a layer or pool that this encoder does not have, or nothing to embed.
        """
        layers = self._layers(layer)
        clips = self._clips(inputs, rate)
        gathered = [_Gathered(len(clips), keep=tokens) for _ in layers]
        pooled = Pool.named(pool)

        def compute(batch: Batch, places: list[int]) -> None:
            raw = batch.raw.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                given = self.encoder.tokens(raw)
                encoded = self.encoder(given, layers=sorted({i for i in layers if i >= 0}))
            times = self._times(given, raw) if tokens else None
            for i, into in zip(layers, gathered, strict=True):
                x = encoded.x if i < 0 else encoded.layers[i]
                into.add(places, pooled(x, encoded, given), x[:, encoded.n_prefix :], given.lengths, times)

        names, bad = self._run(clips, compute, batch_size, batch_seconds, on_bad_clip, progress)
        found = [into.result(names, bad) for into in gathered]
        return found[0] if isinstance(layer, int) else found

    def predict(
        self,
        inputs: Input | Sequence[Input],
        *,
        beam: int | None = None,
        rate: float | None = None,
        batch_size: int = 16,
        batch_seconds: float = 60.0,
        on_bad_clip: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> list[str | None]:
        """What a fine-tuned encoder says of each clip: its class, or its transcript.

        Args:
            beam: of the search for the likeliest transcript; None takes the best path. For transcripts only.
            inputs, rate, batch_size, batch_seconds, on_bad_clip, progress: see `embed`; None for a clip that was
                skipped.

        Raises:
            ValueError: this encoder was not fine-tuned.
        """
        objective, config = self._fine_tuned(), self.config
        vocabulary = None if config["vocabulary"] is None else CharVocabulary(config["vocabulary"])
        if beam is not None and vocabulary is None:
            raise ValueError(f"beam={beam}: {self.name} tells classes, and only transcripts are searched for")
        clips = self._clips(inputs, rate)
        said: list[str | None] = [None] * len(clips)

        def compute(batch: Batch, places: list[int]) -> None:
            batch = batch.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                if vocabulary is None:
                    texts = [config["classes"][i] for i in objective.predict(batch).argmax(1).tolist()]
                else:
                    log_probs, lengths = objective.log_probs(batch.raw)
                    ids = best_path(log_probs, lengths) if beam is None else prefix_beam(log_probs, lengths, beam=beam)
                    texts = [vocabulary.decode(row) for row in ids]
            for place, text in zip(places, texts, strict=True):
                said[place] = text

        self._run(clips, compute, batch_size, batch_seconds, on_bad_clip, progress)
        return said

    def _layers(self, layer: int | Sequence[int] | Literal["all"]) -> list[int]:
        if isinstance(layer, str) and layer != "all":
            raise ValueError(f"layer={layer!r}: give a number, several, or 'all'")
        asked = range(self.depth + 1) if layer == "all" else [layer] if isinstance(layer, int) else list(layer)
        for i in asked:
            if not -1 <= i <= self.depth:
                raise ValueError(
                    f"layer={i}: {self.name} has layers 0 to {self.depth}, and -1 is its output after the final norm"
                )
        if not asked:
            raise ValueError("layer=[]: name at least one")
        return list(asked)

    def _fine_tuned(self) -> Any:
        if self._objective is None:
            if self._head is None:
                raise ValueError(
                    f"{self.name}: was pretrained and not fine-tuned, so there is nothing to predict with; "
                    "`mmssl finetune` it first, or use embed"
                )
            objective = build_objective(self.config, self.encoder)
            # all but the encoder, which is loaded already
            own = {name: tensor for name, tensor in objective.state_dict().items() if not name.startswith("encoder.")}
            tensors = read_tensors(self._head)
            _check(own, tensors, self._head)
            objective.load_state_dict(tensors, strict=False)
            self._objective = objective.eval().requires_grad_(False).to(self.device)
        return self._objective

    def _times(self, tokens: Tokens, raw: Raw) -> Tensor | None:
        """(B, N): the middle of what each token sees, in milliseconds."""
        if tokens.step_ms is None or raw.rate is None:
            return None
        width = 1000 * self.encoder.frontend.min_length / raw.rate
        return tokens.coords[..., tokens.axes.index("t")] * tokens.step_ms + width / 2

    def _clips(self, inputs: Input | Sequence[Input], rate: float | None) -> _Clips:
        single = isinstance(inputs, (str, Path, np.ndarray, Tensor, Manifest)) or hasattr(inputs, "read")
        listed: Sequence[Input] = [cast(Input, inputs)] if single else cast("Sequence[Input]", inputs)
        kind = MODALITIES[self.modality]
        clips = _Clips(self.modality, self.encoder.frontend)
        augment = build_augment(self.config["augment_eval"], self.modality, self.encoder)
        read = build_reader(self.config, self.encoder)
        settings = self.encoder.frontend.reader_settings
        span = build_span(self.config["augment_eval"], self.modality, self.encoder)
        part = {} if span is None else {"span": partial(span, rng=np.random.default_rng(0))}
        read_part = partial(read, **part)

        def ready(make: Callable[..., Tensor], *given: Any) -> Tensor:
            # nothing that is done for evaluation is random; the augmentations take a generator all the same
            return augment(make(*given), np.random.default_rng(0))

        for place, item in enumerate(listed):
            if isinstance(item, Manifest) or (isinstance(item, (str, Path)) and str(item).endswith(".jsonl")):
                manifest = item if isinstance(item, Manifest) else Manifest(item)
                clips.add(
                    ManifestDataset(
                        manifest,
                        media={self.modality: kind.media},
                        readers={self.modality: read},
                        hints={self.modality: kind.hints},
                        spans={} if span is None else {self.modality: span},
                        augments={self.modality: augment},
                        rates={self.modality: settings.get("rate")},
                    )
                )
            elif isinstance(item, (str, Path)):
                for path in _expand(str(item), kind.suffixes, self.modality):
                    clips.add((path, partial(ready, read_part, path)))
            elif isinstance(item, (np.ndarray, Tensor)):
                batch = _split(item, f"input {place}", kind.media)
                for i, clip in enumerate(batch):
                    name = f"input {place}" if len(batch) == 1 else f"input {place}.{i}"
                    if kind.media == "audio":
                        clips.add((name, partial(ready, _wave, clip, name, rate, settings["rate"])))
                    else:
                        clips.add((name, partial(ready, _picture, clip, name, settings["channels"])))
            elif hasattr(item, "read"):
                clips.add((str(getattr(item, "name", f"input {place}")), partial(ready, read_part, item)))
            else:
                raise ValueError(
                    f"input {place}: {type(item).__name__} is none of path, glob, folder, manifest, binary file, array "
                    "and tensor"
                )
        if not len(clips):
            raise ValueError("nothing to embed: the inputs are empty")
        return clips

    @torch.no_grad()  # not inference mode: what is returned may be trained on
    def _run(
        self,
        clips: _Clips,
        compute: Callable[[Batch, list[int]], None],
        batch_size: int,
        batch_seconds: float,
        on_bad_clip: str,
        progress: bool,
    ) -> tuple[list[str], dict[str, str]]:
        """Call `compute` on groups of clips that were read ahead; ids in order, and the reasons of bad clips."""
        if batch_size < 1 or batch_seconds <= 0:
            raise ValueError(f"batch_size={batch_size}, batch_seconds={batch_seconds}: both must be above 0")
        if on_bad_clip not in ("raise", "skip"):
            raise ValueError(f"on_bad_clip={on_bad_clip!r}: choose raise or skip")
        names, bad, left_out = [""] * len(clips), {}, 0
        with closing(_windows(clips, batch_size)) as windows, _bar(len(clips), progress) as advance:
            for window in windows:
                good = []
                for item in window:
                    names[item.place] = item.name
                    if item.error is None:
                        good.append(item)
                    elif on_bad_clip == "raise":
                        raise item.error
                    else:
                        bad[item.name] = item.error.reason
                        left_out += 1
                for group in _groups(good, batch_size, batch_seconds):
                    samples = [item.sample for item in group if item.sample is not None]
                    compute(collate_samples(samples), [item.place for item in group])
                    advance(len(group))
                advance(len(window) - len(good))
        if left_out == len(clips):
            first = next(iter(bad))
            raise ValueError(f"none of the {len(clips)} clips can be read; the first is {first} ({bad[first]})")
        return names, bad


def write_npz(
    path: str | Path, embeddings: Embeddings | Sequence[Embeddings], *, layers: Sequence[int] | None = None
) -> Path:
    """Write embeddings as a .npz file that numpy opens without unpickling, all or nothing.

    Holds `ids` and `scene`; where tokens were kept `tokens`, `valid` and, for sound, `time_ms`; where clips were bad
    `bad_ids` and `bad_reasons`. With several layers `scene` and `tokens` get an axis of layers in front, and `layers`
    names them.

    Raises:
        ValueError: layers without names, or not one for each.
    """
    several = not isinstance(embeddings, Embeddings)
    found = list(embeddings) if not isinstance(embeddings, Embeddings) else [embeddings]
    if several and (layers is None or len(layers) != len(found)):
        raise ValueError(f"{path}: {len(found)} layers of embeddings need as many names, got {layers}")
    first = found[0]
    arrays: dict[str, Any] = {
        "ids": np.array(first.ids, dtype=np.str_),
        "scene": np.stack([one.scene.numpy() for one in found]) if several else first.scene.numpy(),
    }
    if several:
        arrays["layers"] = np.array(layers, dtype=np.int64)
    if first.tokens.shape[1]:
        arrays["tokens"] = np.stack([one.tokens.numpy() for one in found]) if several else first.tokens.numpy()
        arrays["valid"] = first.valid.numpy()
        if first.time_ms is not None:
            arrays["time_ms"] = first.time_ms.numpy()
    if first.bad:
        arrays["bad_ids"] = np.array(list(first.bad), dtype=np.str_)
        arrays["bad_reasons"] = np.array(list(first.bad.values()), dtype=np.str_)
    path = Path(path)
    if path.suffix != ".npz":
        path = path.with_name(path.name + ".npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    return path


@dataclass(frozen=True)
class _Item:
    """One clip that was read, or the reason why it could not be."""

    place: int
    name: str
    sample: Sample | None = None
    error: BadClip | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its only input."""
        assert self.sample is not None
        return tuple(next(iter(self.sample.inputs.values())).shape)


class _Clips:
    """What is to be embedded, read clip by clip.

    A manifest stays a manifest: its rows are not listed.
    """

    def __init__(self, modality: str, frontend: Frontend) -> None:
        self.modality = modality
        self.frontend = frontend
        self.rate = frontend.reader_settings.get("rate")
        self._parts: list[ManifestDataset | tuple[str, Callable[[], Tensor]]] = []
        self._ends: list[int] = []

    def add(self, part: ManifestDataset | tuple[str, Callable[[], Tensor]]) -> None:
        """Rows of a manifest, or (name, how to read it)."""
        self._parts.append(part)
        self._ends.append(len(self) + (len(part) if isinstance(part, ManifestDataset) else 1))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, place: int) -> _Item:
        """The clip at `place`, fit for the frontend."""
        number = bisect_right(self._ends, place)
        part = self._parts[number]
        row = place - (self._ends[number - 1] if number else 0)
        name = part.manifest[row]["id"] if isinstance(part, ManifestDataset) else part[0]
        try:
            if isinstance(part, ManifestDataset):
                sample = part.read(row, 0)
            else:
                sample = Sample(name, {self.modality: part[1]()}, {self.modality: self.rate}, None, 0)
            self._try(sample)
        except BadClip as error:
            return _Item(place, name, error=error)
        except ValueError as error:  # a clip that an augmentation or the frontend cannot take
            return _Item(place, name, error=BadClip(name, str(error).removeprefix(f"{name}: ")))
        return _Item(place, name, sample)

    def _try(self, sample: Sample) -> None:
        """A clip that is no whole token is found before it is put beside others.

        Raises:
            ValueError: the frontend cannot take it.
        """
        self.frontend.lengths(collate_samples([sample]).raw)


def _windows(clips: _Clips, batch_size: int) -> Generator[list[_Item], None, None]:
    """Clips in order, many at a time, read by one thread while the caller works on those before."""
    ready: queue.Queue[list[_Item] | Exception | None] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def hand_over(what: list[_Item] | Exception | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(what, timeout=0.1)
            except queue.Full:
                continue

    def read() -> None:
        window: list[_Item] = []
        values, most = 0, batch_size
        try:
            for place in range(len(clips)):
                if stopped.is_set():
                    return
                window.append(clips.read(place))
                values += 0 if window[-1].sample is None else math.prod(window[-1].shape)
                if len(window) >= most or values >= WINDOW_VALUES:
                    hand_over(window)
                    window, values, most = [], 0, min(2 * most, WINDOW_GROUPS * batch_size)
            if window:
                hand_over(window)
            hand_over(None)
        except Exception as error:  # whatever it is, it belongs to the thread that waits
            hand_over(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while (window := ready.get()) is not None:
            if isinstance(window, Exception):
                raise window
            yield window
    finally:
        stopped.set()
        thread.join()


def _groups(items: Sequence[_Item], batch_size: int, batch_seconds: float) -> Iterator[list[_Item]]:
    """Clips that are computed together: sound of similar length, pictures of the same size."""
    group: list[_Item] = []
    for item in sorted(items, key=lambda item: item.shape):
        assert item.sample is not None
        rate = next(iter(item.sample.rates.values()))
        if len(item.shape) == 1:
            full = rate is not None and (len(group) + 1) * item.shape[0] > batch_seconds * rate
        else:
            full = bool(group) and group[0].shape != item.shape
        if group and (full or len(group) == batch_size):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


class _Gathered:
    """The embeddings of one layer, put together clip by clip."""

    def __init__(self, count: int, *, keep: bool) -> None:
        self.count = count
        self.keep = keep
        self.scene: Tensor | None = None
        self.tokens: dict[int, Tensor] = {}
        self.times: dict[int, Tensor] = {}

    def add(self, places: list[int], scene: Tensor, x: Tensor, lengths: Tensor, times: Tensor | None) -> None:
        """Scenes (B, E), tokens (B, N, D) and their times (B, N) of the clips at `places`."""
        if self.scene is None:
            self.scene = torch.full((self.count, scene.shape[1]), torch.nan)
        self.scene[places] = scene.float().cpu()
        if not self.keep:
            return
        x, times = x.float().cpu(), None if times is None else times.cpu()
        for row, (place, length) in enumerate(zip(places, lengths.tolist(), strict=True)):
            # a copy, so that no padding is kept
            self.tokens[place] = x[row, :length].clone()
            if times is not None:
                self.times[place] = times[row, :length].clone()

    def result(self, names: list[str], bad: dict[str, str]) -> Embeddings:
        assert self.scene is not None
        longest = max((len(x) for x in self.tokens.values()), default=0)
        width = next((x.shape[1] for x in self.tokens.values()), 0)
        tokens = torch.zeros(self.count if longest else len(names), longest, width)
        lengths = torch.zeros(self.count, dtype=torch.int64)
        times = torch.zeros(self.count, longest) if self.times else None
        for place in list(self.tokens):
            x = self.tokens.pop(place)
            tokens[place, : len(x)], lengths[place] = x, len(x)
            if times is not None:
                times[place, : len(x)] = self.times.pop(place)
        return Embeddings(self.scene, tokens, valid_mask(lengths, longest), times, names, bad)


def _expand(text: str, suffixes: Collection[str], modality: str) -> list[str]:
    """The files that a path, a folder or a glob pattern means, sorted where there are several."""
    if os.path.isdir(text):
        inside = sorted(str(path) for path in Path(text).rglob("*") if path.suffix.lower() in suffixes)
        if not inside:
            raise ValueError(f"{text}: no {modality} file in this folder ({' '.join(sorted(suffixes))})")
        return inside
    if os.path.exists(text) or not glob.has_magic(text):
        return [text]
    matching = sorted(path for path in glob.glob(text, recursive=True) if os.path.isfile(path))
    if not matching:
        raise ValueError(f"{text}: no file matches this pattern")
    return matching


# what an array of each media is
_AXES = {"audio": "(samples,)", "image": "(channels, height, width)", "video": "(channels, frames, height, width)"}


def _split(array: np.ndarray | Tensor, name: str, media: str) -> list[Tensor]:
    """The clips of an array: one, or one for each place on an axis in front."""
    x = torch.as_tensor(array)
    meaning = _AXES[media]
    axes = len(meaning.split())
    if x.ndim not in (axes, axes + 1):
        raise ValueError(
            f"{name}: an array of shape {tuple(x.shape)}; a clip is {meaning}, with or without an axis of "
            "clips in front"
        )
    return [x] if x.ndim == axes else list(x)


def _wave(x: Tensor, name: str, rate: float | None, own_rate: float) -> Tensor:
    """Samples as a reader would give them."""
    if x.dtype == torch.int16:
        x = x / 32768
    if not x.is_floating_point():
        raise BadClip(name, f"samples of type {x.dtype}; give floating point numbers, or int16")
    x = x.detach().float().cpu()
    if not len(x) or not torch.isfinite(x).all():
        raise BadClip(name, "holds no samples" if not len(x) else "samples are NaN or infinite")
    if rate is not None and rate != own_rate:
        from mmssl.modalities.speech.reader import resample

        return torch.from_numpy(resample(x.numpy(), rate, own_rate))
    return x


def _picture(x: Tensor, name: str, channels: int) -> Tensor:
    """Pixels as a reader would give them."""
    if x.shape[0] != channels and x.shape[-1] == channels:
        meaning = _AXES["image" if x.ndim == 3 else "video"]
        raise BadClip(name, f"pixels of shape {tuple(x.shape)}; they must be {meaning}")
    if x.dtype == torch.uint8:
        x = x / 255
    x = x.detach().float().cpu()
    if not x.numel() or not bool(((x >= -1e-3) & (x <= 1 + 1e-3)).all()):
        raise BadClip(name, "pixels must be from 0 to 1 (or uint8), and there must be some")
    return x


@contextmanager
def _bar(count: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, and how to move it."""
    if not shown:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    look = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*look, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=count)
        yield lambda done: progress.advance(task, done)
