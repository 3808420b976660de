"""What is to be embedded, from whatever a user gives: files, folders, manifests and arrays, read ahead as clips."""

from __future__ import annotations

import copy
import glob
import inspect
import math
import os
import queue
import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from mmssl.data.batching import collate_samples
from mmssl.data.dataset import ManifestDataset, Sample, begins
from mmssl.data.manifest import Manifest, Row, read_slice
from mmssl.data.scan import tar_members, walk
from mmssl.data.units import check_units
from mmssl.encoder import Encoder
from mmssl.files import refuse_special
from mmssl.loading import Span, build_augment, build_cut, build_reader, build_span, clips_of
from mmssl.modalities import MODALITIES
from mmssl.modalities.modality import Modality
from mmssl.modalities.speech.reader import resample, samples_of
from mmssl.modalities.video.reader import frames_of
from mmssl.types import BadClip, Frontend

Input: TypeAlias = str | Path | BinaryIO | np.ndarray | Tensor | Manifest


class Member(NamedTuple):
    """A file in an uncompressed tar."""

    tar: str
    name: str
    offset: int
    size: int


Read: TypeAlias = tuple[Tensor, float | None]  # a clip, and where in it that begins, see `Sample.starts`
Part: TypeAlias = ManifestDataset | str | Member | tuple[str, Callable[[], Read]]
# Clips are read in windows, sorted by length within, and embedded in groups. Windows start small, so that the model
# has something to do soon, and double up to so many groups, or so many values whichever comes first. From where they
# are that large, one begins at each multiple of it, so that whoever reads from such a place on reads the same windows.
WINDOW_GROUPS = 16
WINDOW_VALUES = 2**24
# what an array of each media is
_AXES = {
    "audio": "(samples,)",
    "codes": "(codebooks, steps)",
    "image": "(channels, height, width)",
    "video": "(channels, frames, height, width)",
}
KINDS = "path, glob, folder, manifest, caption, binary file, array and tensor"


def find_clips(
    inputs: Input | Sequence[Input], config: Mapping[str, Any], encoder: Encoder, *, rate: float | None
) -> Clips:
    """The clips of inputs, none of them read yet; see `Embedder.embed`.

    Args:
        config: what config.json holds.
        rate: samples or frames per second of arrays, where it is not the encoder's own.

    Raises:
        ValueError: an input that is none, or nothing to embed.
    """
    if rate is not None and not (rate > 0 and math.isfinite(rate)):
        raise ValueError(f"rate={rate}: must be above 0; leave it out for arrays at the encoder's own rate")
    single = isinstance(inputs, (str, Path, np.ndarray, Tensor, Manifest)) or hasattr(inputs, "read")
    if not single and not isinstance(inputs, Iterable):
        raise ValueError(f"inputs: {type(inputs).__name__} is none of {KINDS}, nor a sequence of them")
    listed: Iterable[Input] = [cast(Input, inputs)] if single else cast("Iterable[Input]", inputs)
    modality, frontend = config["modality"], encoder.frontend
    kind = MODALITIES[modality]
    augment = build_augment(config["augment_eval"], modality, frontend)
    read = build_reader(modality, frontend)
    span = build_span(config["augment_eval"], modality, frontend)
    cut = build_cut(config["augment_eval"], modality, frontend)
    settings = frontend.reader_settings

    def ready(make: Callable[..., Tensor], *given: Any) -> Read:
        # nothing that is done for evaluation is random; spans and augmentations take a generator all the same
        start: float | None = None

        def choose(seconds: float) -> tuple[float, float]:
            nonlocal start
            assert span is not None
            begin, duration = span(seconds, rng=np.random.default_rng(0))
            start = begin if duration < seconds else None
            return begin, duration

        x = make(*given) if span is None else make(*given, span=choose)
        if cut is not None:
            start = begins(start, x, cut, settings["rate"])
        return augment(x, np.random.default_rng(0)), start

    clips = Clips(modality, frontend, partial(ready, read))
    barren: list[str] = []  # tars without a file of this modality
    for place, item in enumerate(listed):
        if isinstance(item, Manifest) or (isinstance(item, (str, Path)) and str(item).endswith(".jsonl")):
            manifest = item if isinstance(item, Manifest) else Manifest(item)
            clips.add(clips_of(manifest, {modality: frontend}, {modality: config["augment_eval"]}))
        elif kind.media == "text":
            for caption in _captions(item, f"input {place}"):
                clips.add((caption, partial(ready, read, caption)))
        elif isinstance(item, (str, Path)):
            paths, refused = _expand(str(item), kind.suffixes, modality)
            for inside in refused:  # a folder of who knows how many is one bad clip
                clips.add((inside.path, partial(_refuse, inside)))
            for path in paths:
                if not path.lower().endswith(".tar"):
                    clips.add(path)
                    continue
                before = len(clips)
                try:
                    for name, offset, size in tar_members(path):
                        base = os.path.basename(name)
                        if os.path.splitext(base)[1].lower() in kind.suffixes and not base.startswith("."):
                            clips.add(Member(path, name, offset, size))
                except BadClip as error:  # it ends too early: what is missing of it is one bad clip
                    clips.add((path, partial(_refuse, error)))
                if len(clips) == before:
                    barren.append(path)
        elif isinstance(item, (np.ndarray, Tensor)):
            batch = _split(item, f"input {place}", kind.media, frontend.min_length)
            for i, clip in enumerate(batch):
                name = f"input {place}" if len(batch) == 1 else f"input {place}.{i}"
                if kind.media == "audio":
                    clips.add((name, partial(ready, _wave, clip, name, rate, settings["rate"])))
                elif kind.media == "codes":
                    clips.add((name, partial(ready, _codes, clip, name, settings["codes"])))
                elif kind.media == "video":
                    rates = rate or settings["rate"], settings["rate"]
                    clips.add((name, partial(ready, _film, clip, name, settings["channels"], *rates)))
                else:
                    clips.add((name, partial(ready, _picture, clip, name, settings["channels"])))
        elif hasattr(item, "read"):
            clips.add((str(getattr(item, "name", f"input {place}")), partial(ready, read, item)))
        else:
            way = "; give torchvision.transforms.functional.to_tensor of it" if hasattr(item, "getbands") else ""
            raise ValueError(f"input {place}: {type(item).__name__} is none of {KINDS}{way}")
    if not len(clips) and barren:
        raise ValueError(_none_of(modality, "tar", barren[0], kind.suffixes))
    if not len(clips):
        raise ValueError("nothing to embed: the inputs are empty")
    return clips


def rows_of(manifest: Manifest, modality: str) -> Manifest:
    """The rows that have what a modality reads; without pairs each has that of one modality only."""
    return manifest.having([MODALITIES[modality].media])


def whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config that reads clips from their beginning to their end."""
    changing = MODALITIES[config["modality"]].durations
    return {**config, "augment_eval": [step for step in config["augment_eval"] if step["name"] not in changing]}


def spread_out(config: Mapping[str, Any], *, spans: int, crops: int) -> list[dict[str, Any]]:
    """The configs that read so many parts of each clip in place of its middle.

    Args:
        spans: parts of its time, evenly from the beginning to the end.
        crops: of each of them parts of the frame, evenly from one end of its longer side to the other.

    Raises:
        ValueError: less than one, or several of a modality or by steps that have but one.
    """
    kind = MODALITIES[config["modality"]]
    steps = _spread(config["augment_eval"], f"spans={spans}", spans, kind.durations, "no time to choose from", kind)
    return [
        {**config, "augment_eval": part}
        for span in steps
        for part in _spread(span, f"crops={crops}", crops, kind.sizes, "no frame to crop", kind)
    ]


def _spread(
    steps: list[dict[str, Any]], given: str, parts: int, changing: Collection[str], lacks: str, kind: Modality
) -> list[list[dict[str, Any]]]:
    """The steps so many times, each time with another place for those among `changing` that have one."""
    if parts < 1:
        raise ValueError(f"{given}: must be at least 1")
    if parts == 1:
        return [steps]
    if not changing:
        raise ValueError(f"{given}: {kind.name} has {lacks}; leave {given.partition('=')[0]} out")
    table = {**kind.augments, **kind.spans}
    placed = [name for name in changing if "at" in inspect.signature(table[name]).parameters]
    if not any(step["name"] in placed for step in steps):
        raise ValueError(
            f"{given}: this run's augment.eval has no step that reads a part of each clip, such as "
            f"{' or '.join(placed)}; leave {given.partition('=')[0]} out"
        )
    shares = [place / (parts - 1) for place in range(parts)]
    return [[step | ({"at": at} if step["name"] in placed else {}) for step in steps] for at in shares]


@dataclass(frozen=True)
class Item:
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


class Clips:
    """What is to be embedded, read clip by clip.

    A manifest stays a manifest: its rows are not listed. Of a file no more is kept than its path.

    Args:
        read_file: a path or a binary file to a clip that is fit for the frontend, and where in it that begins.
    """

    def __init__(self, modality: str, frontend: Frontend, read_file: Callable[[str | BinaryIO], Read]) -> None:
        self.modality = modality
        self.frontend = frontend
        self.read_file = read_file
        self.rate = frontend.reader_settings.get("rate")
        self._change: Callable[[Tensor, str], Tensor] | None = None
        self._parts: list[Part] = []
        self._ends: list[int] = []

    def add(self, part: Part) -> None:
        """Rows of a manifest, a path, a member of a tar, or (name, how to read it)."""
        self._parts.append(part)
        self._ends.append(len(self) + (len(part) if isinstance(part, ManifestDataset) else 1))

    def changed(self, change: Callable[[Tensor, str], Tensor]) -> Clips:
        """The same clips, each with something done to it that is given its name, once it is fit for the frontend."""
        other = copy.copy(self)
        other._change = change
        return other

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def line(self, place: int) -> str:
        """The manifest and its line where the clip at `place` is a row of one, else nothing."""
        part, row = self._find(place)
        return part.manifest.place(row) if isinstance(part, ManifestDataset) else ""

    def name(self, place: int) -> str:
        """What the clip at `place` is called."""
        part, row = self._find(place)
        if isinstance(part, ManifestDataset):
            return str(part.manifest[row]["id"])
        if isinstance(part, Member):
            return f"{part.tar}#{part.name}"
        return part if isinstance(part, str) else part[0]

    def row(self, place: int) -> Row:
        """What is known of the clip at `place`: its row in a manifest, or its path or caption as one would name it."""
        part, row = self._find(place)
        if isinstance(part, ManifestDataset):
            return dict(part.manifest[row])
        if isinstance(part, Member):
            inside = {"path": part.tar, "offset": part.offset, "size": part.size}
            return {"id": self.name(place), MODALITIES[self.modality].media: inside}
        name, media = self.name(place), MODALITIES[self.modality].media
        return {"id": name, media: name} if isinstance(part, str) or media == "text" else {"id": name}

    def read(self, place: int) -> Item:
        """The clip at `place`, fit for the frontend."""
        part, row = self._find(place)
        name = self.name(place)
        try:
            if isinstance(part, ManifestDataset):
                sample = part.read(row, 0)
            else:
                if isinstance(part, Member):
                    clip, start = self.read_file(read_slice(part.tar, part.offset, part.size))
                else:
                    clip, start = self.read_file(part) if isinstance(part, str) else part[1]()
                starts = {} if start is None else {self.modality: start}
                sample = Sample(name, {self.modality: clip}, {self.modality: self.rate}, None, 0, starts=starts)
            if self._change is not None:
                sample = replace(sample, inputs={key: self._change(x, name) for key, x in sample.inputs.items()})
            self._try(sample)
        except BadClip as error:
            return Item(place, name, error=error)
        except ValueError as error:  # a clip that an augmentation or the frontend cannot take
            return Item(place, name, error=BadClip(name, str(error).removeprefix(f"{name}: ")))
        return Item(place, name, sample)

    def _find(self, place: int) -> tuple[Part, int]:
        """What holds the clip at `place`, and its row in there."""
        number = bisect_right(self._ends, place)
        return self._parts[number], place - (self._ends[number - 1] if number else 0)

    def _try(self, sample: Sample) -> None:
        """A clip that is no whole token is found before it is put beside others.

        Raises:
            ValueError: the frontend cannot take it.
        """
        self.frontend.lengths(collate_samples([sample]).raw)


def windows(clips: Clips, batch_size: int, places: range | None = None) -> Generator[list[Item], None, None]:
    """Clips in order, many at a time, read by one thread while the caller works on those before.

    Args:
        places: of the clips to read; all by default.
    """
    ready: queue.Queue[list[Item] | Exception | None] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def hand_over(what: list[Item] | Exception | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(what, timeout=0.1)
            except queue.Full:
                continue

    def read() -> None:
        window: list[Item] = []
        values = 0
        try:
            for place in range(len(clips)) if places is None else places:
                if stopped.is_set():
                    return
                window.append(clips.read(place))
                values += 0 if window[-1].sample is None else math.prod(window[-1].shape)
                if values >= WINDOW_VALUES or _ends_window(place + 1, batch_size):
                    hand_over(window)
                    window, values = [], 0
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


def _ends_window(place: int, batch_size: int) -> bool:
    """Whether the clip at `place` is the first of another window."""
    groups, rest = divmod(place, batch_size)
    return rest == 0 and (groups % WINDOW_GROUPS == 0 if groups > WINDOW_GROUPS else groups & (groups - 1) == 0)


def groups(items: Sequence[Item], batch_size: int, batch_seconds: float) -> Iterator[list[Item]]:
    """Clips that are computed together: sound and codes of similar length, pictures and video of the same shape."""
    group: list[Item] = []
    for item in sorted(items, key=lambda item: item.shape):
        assert item.sample is not None
        rate = next(iter(item.sample.rates.values()))
        if len(item.shape) < 3:
            full = rate is not None and (len(group) + 1) * item.shape[-1] > batch_seconds * rate
        else:
            full = bool(group) and group[0].shape != item.shape
        if group and (full or len(group) == batch_size):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _refuse(error: BadClip) -> Read:
    raise error


def _captions(item: object, name: str) -> list[str]:
    """The captions of an input for an encoder of text: a string is one, and a .txt file has one a line.

    Raises:
        ValueError: another kind of input, a folder, or a file that cannot be read or is not there.
    """
    named = isinstance(item, str) and item.lower().endswith(".txt") and (len(item.split()) == 1 or os.path.exists(item))
    if isinstance(item, str) and not named and not os.path.isdir(item):
        return [item]
    if not isinstance(item, (str, Path)):
        raise ValueError(f"{name}: {type(item).__name__} is no caption; give text, a .txt file or a manifest")
    try:
        refuse_special(item)
        # at line ends alone: captions may hold other characters at which a text is divided
        lines = Path(item).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else "not UTF-8"
        raise ValueError(f"{item}: {reason}; give a text file with a caption in each line") from None
    return [line for line in lines if line.strip()]


def _expand(text: str, suffixes: Collection[str], modality: str) -> tuple[list[str], list[BadClip]]:
    """The files that a path, a folder or a glob pattern means, sorted where there are several; and why there may be
    more: the folders that cannot be read."""
    if os.path.isdir(text):
        looked_for = {*suffixes, ".tar"}
        refused: list[BadClip] = []
        inside = sorted(
            str(Path(where, file))
            for where, files in walk(text, refused.append)
            for file in files
            if os.path.splitext(file)[1].lower() in looked_for and not file.startswith(".")
        )
        if not inside and refused:
            raise refused[0]
        if not inside:
            way = f'; a pattern, "{os.path.join(text, "*")}", takes files of any name'
            raise ValueError(_none_of(modality, "folder", text, suffixes) + way)
        return inside, refused
    if os.path.exists(text) or not glob.has_magic(text):
        return [text], []
    matching = sorted(path for path in glob.glob(text, recursive=True) if not os.path.isdir(path))
    if not matching:
        raise ValueError(f"{text}: no file matches this pattern")
    return matching, []


def _none_of(modality: str, place: str, path: str, suffixes: Collection[str]) -> str:
    return f"{path}: no {modality} file in this {place} ({' '.join(sorted(suffixes))})"


def _split(array: np.ndarray | Tensor, name: str, media: str, shortest: int) -> list[Tensor]:
    """The clips of an array: one, or one for each place on an axis in front; `shortest` is what a token sees of one."""
    try:
        x = torch.as_tensor(array)
    except TypeError:
        raise ValueError(f"{name}: an array of {array.dtype} holds no numbers; give paths as a list") from None
    meaning = _AXES[media]
    axes = len(meaning.split())
    if x.ndim not in (axes, axes + 1):
        raise ValueError(
            f"{name}: an array of shape {tuple(x.shape)}; a clip is {meaning}, with or without an axis of "
            "clips in front"
        )
    if media == "audio" and x.ndim == 2 and x.shape[1] < shortest <= x.shape[0]:
        raise ValueError(
            f"{name}: an array of shape {tuple(x.shape)} is {x.shape[0]} clips of {x.shape[1]} samples, each shorter "
            "than one token; if these are samples by channels, give the mean over axis 1"
        )
    return [x] if x.ndim == axes else list(x)


def _wave(x: Tensor, name: str, rate: float | None, own_rate: float, span: Span | None = None) -> Tensor:
    """Samples as a reader would give them."""
    rate = own_rate if rate is None else rate
    if span is not None and len(x):
        x = x[samples_of(span, len(x), rate)]
    if x.dtype == torch.int16:
        x = x / 32768
    if not x.is_floating_point():
        raise BadClip(name, f"samples of type {x.dtype}; give floating point numbers, or int16")
    x = x.detach().float().cpu()
    if not len(x) or not torch.isfinite(x).all():
        raise BadClip(name, "holds no samples" if not len(x) else "samples are NaN or infinite")
    return torch.from_numpy(resample(x.numpy(), rate, own_rate))


def _codes(x: Tensor, name: str, codes: Sequence[int]) -> Tensor:
    """Codes as a reader would give them."""
    if x.is_floating_point() or x.dtype is torch.bool:
        raise BadClip(name, f"codes of type {x.dtype}; give whole numbers")
    x = x.detach().long().cpu()
    try:
        check_units(x.t().numpy(), codes)
    except ValueError as error:
        raise BadClip(name, str(error)) from None
    return x


def _film(x: Tensor, name: str, channels: int, own_rate: float, rate: float, span: Span | None = None) -> Tensor:
    """Frames as a reader would give them."""
    return _picture(x, name, channels, partial(frames_of, own_rate=own_rate, rate=rate, span=span))


def _picture(x: Tensor, name: str, channels: int, frames: Callable[[int], Tensor] | None = None) -> Tensor:
    """Pixels as a reader would give them; of video those of the frames that are chosen of so many."""
    if x.shape[0] != channels and x.shape[-1] == channels:
        meaning = _AXES["image" if x.ndim == 3 else "video"]
        raise BadClip(name, f"pixels of shape {tuple(x.shape)}; they must be {meaning}")
    if frames is not None and x.shape[1]:
        x = x[:, frames(x.shape[1])]
    if x.dtype == torch.uint8:
        x = x / 255
    x = x.detach().float().cpu()
    if not x.numel() or not bool(((x >= -1e-3) & (x <= 1 + 1e-3)).all()):
        raise BadClip(name, "pixels must be from 0 to 1 (or uint8), and there must be some")
    return x
