"""Manifest rows to samples. What is random depends on (seed, epoch, id) alone, never on a worker or on order."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmssl.data.manifest import MEDIA, Manifest, read_slice, with_content
from mmssl.data.units import cut_units, read_units
from mmssl.types import BadClip, Raw, Units

Label = int | list[int] | None
Drawn = dict[str, tuple[float, float, bool]]  # modality -> start and duration of what is read, and if it is but a part
ATTEMPTS = 20  # substitutes tried for one bad clip; so many in a row do not happen below a share worth going on with


@dataclass(frozen=True)
class Sample:
    """One clip.

    inputs: modality -> (L,) waveform or ids | (G, T) codes | (C, H, W) picture | (C, T, H, W) video.
    rates: modality -> units along time per second, None where there is no time.
    seed: a function of run seed, epoch and id; masks are drawn from it.
    bad: what was met on the way to this clip and could not be read.
    units: key of the row -> its label set, a batch of one.
    starts: modality -> second of the clip at which what was read of it begins; without those read whole.
    """

    id: str
    inputs: dict[str, Tensor]
    rates: dict[str, float | None]
    label: Label
    seed: int
    bad: list[dict[str, Any]] = field(default_factory=list)
    units: dict[str, Units] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)


class ManifestDataset(Dataset[Sample]):
    """The clips of a manifest, read, augmented and labelled.

    An item is asked for as (row, epoch), or as (row, epoch, function that gives the rows that may take its place).

    Args:
        media: modality -> the key of a row that names its file, or holds what it reads: a "text".
        readers: modality -> (path or binary file, **{start, duration} where the row has them; or text) -> the raw
            clip.
        hints: modality -> further keys of a row that its reader takes.
        spans: modality -> (seconds, rng=generator) -> (start, duration): the part of a clip that is read, where it is
            not all of it. Its reader takes that function, with its generator, as `span`. Where several modalities have
            one, the first is drawn from the whole clip and the others within it, so that all show the same time: the
            longest comes first.
        augments: modality -> (clip, generator) -> clip.
        cuts: modality -> (units along time) -> those that `augments` leave of so many, where they leave out any.
        rates: modality -> what `Sample.rates` says. Where several have one, what is read of each must be about as long,
            or the clip is a bad one.
        fits: modality -> (one clip after augmentation) -> anything; a ValueError of it makes the clip a bad one, and so
            does one of `augments`.
        label: row -> label; a ValueError of it makes the clip a bad one.
        units: key of a row -> how many codes there are of each label in the label set that it names; a ValueError of
            it makes the clip a bad one.
        optional: modalities that a row may lack, as long as it has two.
        seed: of the run.
        on_bad_clip: "raise" stops at the first one; "skip" puts another clip in its place, always the same one of those
            that may take it; any may where an item does not say.
        max_bad_share: of the manifest's clips, beyond which "skip" stops too.
        cache: keep decoded clips, not yet augmented, in memory: once for every loader worker. Not with spans, which
            read another part each time.
        draws: whether of a text that is a list one is drawn in each epoch; else it is the first.

    Raises:
        ValueError: a row has no file of a modality, or a setting outside its range.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        media: Mapping[str, str],
        readers: Mapping[str, Callable[..., Tensor]],
        hints: Mapping[str, Sequence[str]] | None = None,
        spans: Mapping[str, Callable[..., tuple[float, float]]] | None = None,
        augments: Mapping[str, Callable[[Tensor, np.random.Generator], Tensor]] | None = None,
        cuts: Mapping[str, Callable[[int], slice]] | None = None,
        rates: Mapping[str, float | None] | None = None,
        fits: Mapping[str, Callable[[Raw], object]] | None = None,
        label: Callable[[dict[str, Any]], Label] | None = None,
        units: Mapping[str, Sequence[int]] | None = None,
        optional: Collection[str] = (),
        seed: int = 0,
        on_bad_clip: Literal["raise", "skip"] = "raise",
        max_bad_share: float = 0.01,
        cache: bool = False,
        draws: bool = False,
    ) -> None:
        if on_bad_clip not in ("raise", "skip"):
            raise ValueError(f"on_bad_clip: expected raise or skip, got {on_bad_clip!r}")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share: expected a share of the clips from 0 to 1, got {max_bad_share}")
        if cache and spans:
            raise ValueError(
                "data.cache=true: a kept clip would be the same part every time; set it to false, or read clips whole"
            )
        for name, key in media.items():
            if name not in optional:
                manifest.require(key, name)
        if optional:
            manifest.require_several(list(media.values()))
        self.manifest = manifest
        self.media = dict(media)
        self.readers = dict(readers)
        self.hints = dict(hints or {})
        self.spans = dict(spans or {})
        self.augments = dict(augments or {})
        self.cuts = dict(cuts or {})
        self.rates = {name: (rates or {}).get(name) for name in media}
        self.fits = dict(fits or {})
        self.label = label
        self.units = dict(units or {})
        self.seed = seed
        self.on_bad_clip = on_bad_clip
        self.max_bad_share = max_bad_share
        self.draws = draws
        self._cache: dict[int, dict[str, Tensor]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, item: tuple[int, int] | tuple[int, int, Callable[[], np.ndarray]]) -> Sample:
        """The clip of (row, epoch), or with "skip" another one in its place, which names the bad one.

        Raises:
            BadClip: with "raise", or when `ATTEMPTS` substitutes are bad as well.
        """
        index, epoch = item[:2]
        bad: list[dict[str, Any]] = []
        place = index
        for attempt in range(ATTEMPTS):
            try:
                sample = self.read(place, epoch)
            except BadClip as error:
                if self.on_bad_clip == "raise":
                    raise self.refusal(place, error) from None
                bad.append(self.describe(place, epoch, error))
                last = error
                # asked for here alone: it looks at every clip's length, and bad clips are few
                others = item[2]() if len(item) == 3 else range(len(self))
                place = int(others[_hash(self.seed, epoch, index, attempt) % len(others)])
                continue
            return replace(sample, bad=bad)
        raise BadClip(last.path, f"{last.reason}; and so were {ATTEMPTS - 1} clips taken at random in its place")

    def read(self, index: int, epoch: int) -> Sample:
        """Exactly this clip.

        Raises:
            BadClip: it cannot be read, is not what its row says, or has a label that does not fit.
        """
        row = self.manifest[index]
        seed = _hash(self.seed, epoch, row["id"])
        # spawned from the seed, not equal to it: masks are drawn from the seed too
        generator = np.random.default_rng([seed, 1])
        texts = {name: key for name, key in self.media.items() if key not in MEDIA and key in row}
        # what is said of a row below is said of the caption that is read
        row = row | {key: self._caption(row[key], seed) for key in texts.values()}
        raw, drawn = self._raw(index, row, generator)
        starts: dict[str, float | None] = {name: start if part else None for name, (start, _, part) in drawn.items()}
        raw = raw | {name: self._read_text(name, row["id"], row[key]) for name, key in texts.items()}
        inputs = {}
        for name, clip in ((name, raw[name]) for name in self.media if name in raw):
            try:
                if name in self.cuts:
                    starts[name] = begins(starts.get(name), clip, self.cuts[name], self.rates[name])
                inputs[name] = self.augments[name](clip, generator) if name in self.augments else clip
                if name in self.fits:
                    self.fits[name](_alone(row["id"], inputs[name], self.rates[name]))
            except ValueError as error:
                raise BadClip(row["id"], str(error).removeprefix(f"{row['id']}: ")) from None
        try:
            label = None if self.label is None else self.label(row)
            start = list(drawn.values())[-1][0] if drawn else 0.0
            units = {key: self._units(row, key, start, raw) for key in self.units}
        except ValueError as error:
            raise BadClip(row["id"], str(error)) from None
        later = {name: start for name, start in starts.items() if start is not None}
        return Sample(row["id"], inputs, self.rates, label, seed, units=units, starts=later)

    def refusal(self, index: int, error: BadClip) -> BadClip:
        """The error of a run that stops at a bad clip: with the place of its row, and the way out."""
        # found here alone: to count a long manifest's lines for each clip that is skipped would take seconds each time
        place = self.manifest.place(index)
        return BadClip(error.path, f"{error.reason} (at {place}); data.on_bad_clip=skip goes on without such clips")

    def describe(self, index: int, epoch: int, error: BadClip) -> dict[str, Any]:
        """What `bad_clips.jsonl` says of a bad clip."""
        row = self.manifest[index]
        return {
            "id": row["id"],
            "path": error.path,
            "reason": error.reason,
            "epoch": epoch,
            "manifest": str(self.manifest.path),
        }

    def _units(self, row: dict[str, Any], key: str, start: float, raw: dict[str, Tensor]) -> Units:
        """The label set that a key of a row names, of the part that was read."""
        if key not in row:
            raise ValueError(f"the row has no {key!r}, which this objective predicts; `mmssl units` writes it")
        units = read_units(row[key], self.units[key])
        seconds = [_steps(clip) / rate for name, clip in raw.items() if (rate := self.rates[name]) is not None]
        return cut_units(units, start, max(seconds, default=0.0))

    def _raw(self, index: int, row: dict[str, Any], generator: np.random.Generator) -> tuple[dict[str, Tensor], Drawn]:
        """What is read of files, and the spans that were drawn of them."""
        if self._cache is not None and index in self._cache:
            return self._cache[index], {}
        raw: dict[str, Tensor] = {}
        drawn: Drawn = {}
        for name in sorted(self.media, key=self._order):
            key = self.media[name]
            if key not in row or key not in MEDIA:
                continue
            value = row[key]
            parts = value if isinstance(value, list) else [value]
            if name in self.spans and len(parts) > 1:
                raise BadClip(row["id"], "a span is drawn from one file, and this clip has several; give each its row")
            clips = [self._read_part(name, row, part, generator, drawn) for part in parts]
            raw[name] = clips[0] if len(clips) == 1 else _joined(row["id"], clips)
            self._check_length(name, row, raw[name])
        self._check_together(row, raw)
        if self._cache is not None:
            self._cache[index] = raw
        return raw, drawn

    def _order(self, name: str) -> int:
        """Where a modality stands in what is read of a row: those with a span in the order of `spans`."""
        return list(self.spans).index(name) if name in self.spans else len(self.spans)

    def _caption(self, value: Any, seed: int) -> Any:
        """Of a text that is a list the one that is read."""
        if not isinstance(value, list):
            return value
        value = with_content(value) or value
        return value[_hash(seed, "text") % len(value) if self.draws else 0] if value else value

    def _read_text(self, name: str, id: str, value: Any) -> Tensor:
        try:
            return self.readers[name](value)
        except BadClip as error:
            raise BadClip(id, error.reason) from None

    def _read_part(
        self,
        name: str,
        row: dict[str, Any],
        part: Any,
        generator: np.random.Generator,
        drawn: Drawn,
    ) -> Tensor:
        place = part if isinstance(part, dict) else {**row, "path": part}
        path = place["path"]
        # a picture has no time: what its row says of that is of the sound beside it
        timed = () if self.media[name] == "image" else ("start", "duration")
        segment: dict[str, Any] = {key: float(place[key]) for key in timed if key in place}
        segment |= {key: place[key] for key in self.hints.get(name, ()) if key in place}
        if name in self.spans:
            # where tracks of a clip go on for longer than its row says, others may have ended
            stated = float(row.get("seconds", math.inf)) if len(self.spans) > 1 else math.inf
            segment["span"] = partial(self._draw, name, row["id"], generator, drawn, stated)
        if "offset" not in place:
            return self.readers[name](path, **segment)
        try:
            return self.readers[name](read_slice(path, int(place["offset"]), place.get("size")), **segment)
        except BadClip as error:
            raise BadClip(f"{path}#{place['offset']}", error.reason) from None

    def _draw(
        self, name: str, id: str, generator: np.random.Generator, drawn: Drawn, stated: float, seconds: float
    ) -> tuple[float, float]:
        """A span of a file of so many seconds, `stated` at most, within the first that was drawn of this clip; it is
        noted there."""
        whole, seconds = seconds, min(seconds, stated)
        begin, room, _ = next(iter(drawn.values()), (0.0, seconds, False))
        if begin >= seconds:
            raise BadClip(id, f"its {name} ends at {seconds:.2f} s, and what is read of it begins at {begin:.2f} s")
        start, duration = self.spans[name](min(room, seconds - begin), rng=generator)
        drawn[name] = begin + start, duration, duration < whole
        return begin + start, duration

    def _check_length(self, name: str, row: dict[str, Any], clip: Tensor) -> None:
        """A clip much longer than its row says would break the bound that the batch was planned by."""
        rate, stated = self.rates[name], row.get("seconds", math.inf)
        if rate is not None and _steps(clip) / rate > 1.1 * stated + 0.5:
            raise BadClip(
                row["id"],
                f"{_steps(clip) / rate:.2f} s long where its row says {stated:g} s; write the manifest again",
            )

    def _check_together(self, row: dict[str, Any], raw: Mapping[str, Tensor]) -> None:
        """Members of a pair that go on for different times are of different things."""
        seconds = {
            name: _steps(clip) / rate
            for name, clip in raw.items()
            if (rate := self.rates[name]) is not None and name not in self.spans
        }
        if len(seconds) > 1 and max(seconds.values()) > 1.1 * min(seconds.values()) + 0.5:
            each = " and ".join(f"its {name} is {length:.2f} s long" for name, length in seconds.items())
            raise BadClip(row["id"], f"{each}; give each its start and duration, so that they are of the same time")


class BadClips:
    """The bad clips of a run: each is counted and named once, and too many of them end it.

    Args:
        path: a .jsonl file that is appended to, and read at the start so that resuming goes on counting; None to keep
            the list in memory only. Several ranks may share it.
        manifest: the count is a share of its clips, and other manifests' clips in the same file do not count.
        max_share: see `ManifestDataset`.
    """

    def __init__(self, path: str | Path | None, *, manifest: Manifest, max_share: float) -> None:
        self.path = None if path is None else Path(path)
        self.manifest = manifest
        self.max_share = max_share
        self._ids: set[str] = set()
        self._end = 0  # of what was read of the file
        self._read()

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, found: list[dict[str, Any]]) -> None:
        """Note bad clips.

        Raises:
            ValueError: they are now more than `max_share` of the manifest.
        """
        new = {bad["id"]: bad for bad in found if bad["id"] not in self._ids}
        if not new:
            return
        self._ids |= set(new)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write("".join(json.dumps(bad) + "\n" for bad in new.values()))
            self._read()  # what other ranks wrote in the meantime
        share = len(self._ids) / len(self.manifest)
        if share > self.max_share:
            bad = next(reversed(new.values()))
            raise ValueError(
                f"{self.manifest.path}: {len(self._ids)} of {len(self.manifest)} clips cannot be read ({share:.2%}), "
                f"more than max_bad_share allows ({self.max_share:.2%}); the last is {bad['path']} ({bad['reason']})"
                + (f", all are in {self.path}" if self.path else "")
            )

    @property
    def remark(self) -> str:
        """How many clips could not be read, and where they are named; empty where there are none."""
        if not self._ids:
            return ""
        where = "" if self.path is None else f"; they are named in {self.path}"
        return f"{self.manifest.path}: {len(self._ids)} of {len(self.manifest)} clips could not be read so far{where}"

    def _read(self) -> None:
        """Take note of the lines that the file has got since the last time."""
        if self.path is None or not self.path.is_file():
            return
        with open(self.path, "rb") as handle:
            handle.seek(self._end)
            lines, newline, _ = handle.read().rpartition(b"\n")
        self._end += len(lines) + len(newline)  # the end of a line that is being written comes the next time
        for line in lines.splitlines():
            try:
                bad = json.loads(line)
            except ValueError:
                continue  # a line that a killed run left half written; its clip is met again
            if bad.get("manifest") == str(self.manifest.path):
                self._ids.add(bad["id"])


def begins(start: float | None, clip: Tensor, cut: Callable[[int], slice], rate: float | None) -> float | None:
    """The second of a clip at which what is left of it begins, None where that is all of it.

    Args:
        start: the same before augmentation cuts what was read.
        clip: what was read.
        cut: see `cuts` of `ManifestDataset`.
        rate: units along time per second.
    """
    kept = cut(_steps(clip))
    if rate is None or kept.stop - kept.start == _steps(clip):
        return start
    return (start or 0.0) + float(kept.start) / rate


def _alone(id: str, clip: Tensor, rate: float | None) -> Raw:
    """A batch of one clip."""
    return Raw(clip[None], torch.tensor([_steps(clip)]), [id], rate)


def _steps(clip: Tensor) -> int:
    """Units along time; 1 of a picture."""
    return 1 if clip.ndim == 3 else clip.shape[_time_axis(clip)]


def _joined(id: str, clips: list[Tensor]) -> Tensor:
    """The parts of a clip, one after the other.

    Raises:
        BadClip: they are no parts of one clip.
    """
    sizes = [clip.movedim(_time_axis(clip), 0).shape[1:] for clip in clips]
    other = next((size for size in sizes if size != sizes[0]), None)
    if clips[0].ndim == 3 or other is not None:
        what = "pictures" if clips[0].ndim == 3 else f"of sizes {tuple(sizes[0])} and {tuple(other or ())}"
        raise BadClip(id, f"its parts are {what}, which do not go on one after the other; give each a row of its own")
    return torch.cat(clips, dim=_time_axis(clips[0]))


def _time_axis(clip: Tensor) -> int:
    return 1 if clip.ndim == 4 else -1


def _hash(*parts: int | str) -> int:
    """A stable 63-bit hash: the same on every machine and in every process."""
    text = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1
