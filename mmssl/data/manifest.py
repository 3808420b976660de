"""Manifests: one JSON object a line, one line a clip, read by byte offset; and how one is written.

A manifest in memory is an array of 13 bytes a row, never a list of dicts: that costs 720, in every process.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from mmssl.files import open_clip
from mmssl.types import BadClip

Row = dict[str, Any]

MEDIA = ("audio", "image", "video", "codes")  # the keys of a row whose values are files
READ = (*MEDIA, "text")  # the keys whose values a modality may read
INDEX_FROM = 200_000  # rows: reading fewer takes a second or so, and a file beside each small manifest is clutter
# what says which part of a file a clip is: key -> what it must be, its types, its least value
PLACES: dict[str, tuple[str, type[Any] | UnionType, float]] = {
    "start": ("seconds from 0 on", int | float, 0),
    "duration": ("seconds above 0", int | float, 0),
    "offset": ("a number of bytes", int, 0),
    "size": ("a number of bytes", int, 0),
}
# where a file lies that is not below the manifest: rows that have an id are the same clips wherever that is
_ELSEWHERE = re.compile(rb'"/[^"]*/')
# read: bit i is set where the row has the key READ[i]
_INDEX = np.dtype([("offset", "<i8"), ("seconds", "<f4"), ("read", "u1")])


class Manifest(Sequence[Row]):
    """The rows of a .jsonl file, each read when it is asked for.

    Every line is checked when the manifest is opened, so a broken one stops a run before it starts. A million rows of
    190 bytes take 8 s of one core to check; from `INDEX_FROM` rows on, what was found is kept in `<name>.index` beside
    the manifest and mapped into memory the next time (1 ms), as long as the manifest's size and date stay the same.

    Rows come with the paths of their media and units joined to the manifest's folder, and with an `id`. A video that
    has sound, as `mmssl manifest` notes, comes with it as its `audio`, unless the row names another file for that.

    Raises:
        ValueError: no such file, no rows, or a line that is not a JSON object or does not say where a clip lies, by its
            number.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._index, self.digest = _read_index(self.path)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return self.select(np.arange(len(self))[place])
        offset = int(self._index["offset"][place])
        with open(self.path, "rb") as handle:
            handle.seek(offset)
            return self._row(handle.readline(), offset)

    def __iter__(self) -> Iterator[Row]:
        with open(self.path, "rb") as handle:
            for offset in self._index["offset"]:
                handle.seek(offset)
                yield self._row(handle.readline(), int(offset))

    def lengths(self, media: Collection[str] | None = None) -> np.ndarray:
        """(rows,) float32, the seconds of each clip as its row states them.

        Args:
            media: the keys of `READ` that take time: a row with none of them counts as one of the shortest. None where
                each row has its length.

        Raises:
            ValueError: a row states none.
        """
        seconds, timeless = np.array(self._index["seconds"]), np.zeros(len(self), bool)
        if media is not None:
            timeless = self._index["read"] & sum(1 << READ.index(key) for key in set(media)) == 0
        unknown = np.flatnonzero(np.isnan(seconds) & ~timeless)
        if len(unknown):
            raise ValueError(
                f"{self.place(unknown[0])}: the row has no 'seconds', which batches by length need; `mmssl manifest` "
                "writes them"
            )
        if timeless.any():
            seconds[timeless] = seconds[~timeless].min() if not timeless.all() else 1.0
        return seconds

    def values(self, key: str) -> Iterator[Any]:
        """The value that every row has for `key`, row by row: they are never all in memory.

        Raises:
            ValueError: a row has no such key.
        """
        for place, row in enumerate(self):
            if key not in row:
                raise ValueError(f"{self.place(place)}: the row has no {key!r}, only {', '.join(sorted(row))}")
            yield row[key]

    def identities(self) -> Iterator[str]:
        """What tells each clip from others, row by row: its id, its files, and which part of them it is.

        Of a file that does not lie below the manifest its name alone: it is the same clip wherever that is.
        """
        for row in self:
            files = {key: _map_paths(row[key], self._below) for key in MEDIA if key in row}
            yield json.dumps(files | {key: row[key] for key in ("id", "seconds", *PLACES) if key in row})

    def require(self, media: str, reader: str) -> None:
        """See that every row has a key of `READ`.

        Raises:
            ValueError: a row has it not; `reader` is who wants to read it.
        """
        lacking = np.flatnonzero(self._index["read"] & (1 << READ.index(media)) == 0)
        if len(lacking):
            row = self[int(lacking[0])]
            why = f"the row has {', '.join(sorted(row))}"
            if media == "audio" and row.get("sound") is False:
                why = "there is no sound in its video; `mmssl manifest --modality video,audio` leaves such videos out"
            raise ValueError(f"{self.place(lacking[0])}: no {media!r}, which {reader} reads; {why}")

    def having(self, keys: Sequence[str]) -> Manifest:
        """The rows that have all of these keys of `READ`."""
        wanted = sum(1 << READ.index(key) for key in keys)
        return self.select(np.flatnonzero(self._index["read"] & wanted == wanted))

    def require_several(self, keys: Sequence[str]) -> None:
        """See that every row has at least two of these keys of `READ`.

        Raises:
            ValueError: a row has less.
        """
        having = np.stack([self._index["read"] & (1 << READ.index(key)) != 0 for key in keys]).sum(0)
        lacking = np.flatnonzero(having < 2)
        if len(lacking):
            row = self[int(lacking[0])]
            raise ValueError(
                f"{self.place(lacking[0])}: a row needs at least two of {', '.join(map(repr, keys))} to learn from; "
                f"this one has {', '.join(sorted(row))}"
            )

    def place(self, index: int) -> str:
        """Where row `index` stands: the file and its line, counted from 1."""
        with open(self.path, "rb") as handle:
            remaining = int(self._index["offset"][index])
            line = 1
            while remaining > 0:
                block = handle.read(min(remaining, 1 << 20))
                line += block.count(b"\n")
                remaining -= len(block)
        return f"{self.path}:{line}"

    def select(self, indices: np.ndarray | Sequence[int]) -> Manifest:
        """A manifest of these rows only, in this order."""
        part = Manifest.__new__(Manifest)
        part.path, part.digest = self.path, self.digest
        part._index = self._index[np.asarray(indices, dtype=np.int64)]
        return part

    def _below(self, path: str) -> str:
        """A path as it is seen from the manifest, where it lies below it, else the file's name."""
        name = os.path.relpath(path, self.path.parent)
        return os.path.basename(name) if name.startswith(os.pardir + os.sep) else name

    def _row(self, line: bytes, offset: int) -> Row:
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(f"{self.path}: changed since it was opened, no row starts at byte {offset} now") from None
        row["id"] = str(row["id"]) if "id" in row else _default_id(row)
        if _is_heard(row):
            row["audio"] = row["video"]
        for key, value in row.items():
            if _has_path(key, value):
                row[key] = _map_paths(value, lambda name: os.path.join(self.path.parent, name))
        return row


def captions_of(row: Mapping[str, Any]) -> list[Any]:
    """The texts of a row, of which it may have a list; none where it has no text."""
    text = row.get("text", [])
    return text if isinstance(text, list) else [text]


def with_content(text: Any) -> list[Any]:
    """Of a text, or of a list of them, those in which something stands; the first is what is read without a draw."""
    return [one for one in (text if isinstance(text, list) else [text]) if str(one).strip()]


def write_manifest(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows, all or nothing, and say how many.

    Paths of media and units are seen from the working directory, as everywhere in Python and as `Manifest` gives them.
    Those inside the manifest's own folder are written relative to it, so that the folder can move, and others in full.

    Raises:
        ValueError: there are no rows.
        OSError: the file cannot be written; what was there stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    root = os.path.join(os.path.abspath(path.parent), "")
    unfinished = path.with_name(path.name + ".tmp")
    count = 0
    try:
        with open(unfinished, "w", encoding="utf-8", newline="\n") as handle:
            for row in rows:
                local = dict(row)
                for key, value in row.items():
                    if _has_path(key, value):
                        local[key] = _map_paths(value, lambda name: os.path.abspath(name).removeprefix(root))
                handle.write(_json_line(local))
                count += 1
        if not count:
            raise ValueError(f"{path}: there are no rows to write")
        os.replace(unfinished, path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    return count


def split_rows(
    rows: Iterable[Row], *, shares: Mapping[str, float] | None = None, by: str = "id"
) -> dict[str, list[Row]]:
    """Rows by split.

    Args:
        shares: split name -> share of the rows; None to go by each row's own "split".
        by: with `shares`, rows that agree in this key stay together ("speaker" keeps a voice on one side); "id" keeps
            parts of one file together, and its rows where a table names it several times. A row's side depends on that
            key alone, so adding files later moves no other.

    Raises:
        ValueError: shares that do not add up to 1, or a row without the key.
    """
    if shares is not None:
        check_shares(shares)
    key = "split" if shares is None else by
    found: dict[str, list[Row]] = defaultdict(list)
    rows = list(rows)
    ids = {row.get("id") for row in rows} if key == "id" else set()
    for row in rows:
        if key not in row:
            raise ValueError(
                f"splits: the row of {row.get('id', 'an unnamed clip')} has no {key!r}; name a column or a folder "
                "level that tells it, or give shares"
            )
        if shares is None:
            found[str(row["split"])].append(row)
            continue
        value = str(row[by])
        if by == "id":
            first = re.sub(r"#\d+$", "", value)  # of those that `scan` numbers
            value = (first if first in ids else value).removesuffix(segment(row))
        digest = blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        # its place in [0, 1), where the shares lie end to end
        place = np.searchsorted(np.cumsum(list(shares.values())), int.from_bytes(digest, "little") / 2.0**64, "right")
        name = list(shares)[min(int(place), len(shares) - 1)]
        found[name].append({**row, "split": name})
    return dict(found)


def check_shares(shares: Mapping[str, float]) -> None:
    """Shares of splits must be above 0 and add up to 1.

    Raises:
        ValueError: they do not.
    """
    written = ",".join(f"{name}={share:g}" for name, share in shares.items())
    if not all(share > 0 for share in shares.values()):
        raise ValueError(f"splits: the shares {written} must all be above 0")
    if not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise ValueError(f"splits: the shares {written} add up to {sum(shares.values()):g}, not to 1")


def _has_path(key: str, value: Any) -> bool:
    """Whether a key of a row names a file: one of media, or any other by an object with a path (see `data.units`)."""
    return key in MEDIA or (isinstance(value, dict) and "path" in value)


def _map_paths(value: Any, change: Callable[[str], str]) -> Any:
    """The value of a media key with `change` applied to its path, or to the path of each part."""
    if isinstance(value, str) and value:
        return change(value)
    if isinstance(value, list):
        return [_map_paths(part, change) for part in value]
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return {**value, "path": change(value["path"])}
    return value  # whoever reads the clip says what is wrong with it


def _default_id(row: Row) -> str:
    """The paths as written, each with what tells apart two clips of one file."""
    value = next((row[key] for key in READ if key in row), None)
    names = []
    for part in value if isinstance(value, list) and value else [value]:
        place = part if isinstance(part, dict) else {**row, "path": part}
        inside = "".join(f"#{place[key]}" for key in ("offset", "first") if key in place)
        names.append(f"{place.get('path')}{inside}{segment(place)}")
    return ",".join(names)


def segment(place: Mapping[str, Any]) -> str:
    """What tells a part of a file from other parts, to be put behind its name: "@start" or "@start+duration".

    Nothing without a start: a duration alone may be that of the whole file.
    """
    # 15 digits: as many as whoever writes seconds can mean, and 2.0 and 2 are the same
    if "start" not in place:
        return ""
    return f"@{place['start']:.15g}" + (f"+{place['duration']:.15g}" if "duration" in place else "")


def _json_line(row: Row) -> str:
    line = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        # a file name that is not UTF-8: as \udc.. escapes it opens the same file again
        line = json.dumps(row, allow_nan=False)
    return line + "\n"


def _read_index(path: Path) -> tuple[np.ndarray, str]:
    """The index of a manifest and the digest of its rows, from the file beside it where there is one."""
    if not path.is_file():
        what = "a folder, not a manifest" if path.is_dir() else "no such manifest"
        raise ValueError(f"{path}: {what}; `mmssl manifest FOLDER` writes one")
    stat = path.stat()
    stamp = _whole_number(blake2b(f"{stat.st_size} {stat.st_mtime_ns} with digest".encode(), digest_size=8))
    kept = path.with_name(path.name + ".index")
    if kept.is_file():
        try:
            index = np.load(kept, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError):
            index = np.empty(0, _INDEX)  # torn or foreign: made anew
        if index.dtype == _INDEX and len(index) > 2 and index["offset"][0] == stamp:
            return index[2:], f"{index['offset'][1]:016x}"
    index, digest = _make_index(path)
    if len(index) >= INDEX_FROM:
        unfinished = kept.with_name(f"{kept.name}.{os.getpid()}.tmp")
        try:
            with open(unfinished, "wb") as handle:
                head = np.array([(stamp, math.nan, 0), (digest, math.nan, 0)], _INDEX)
                np.save(handle, np.concatenate([head, index]))
            os.replace(unfinished, kept)
        except OSError:
            unfinished.unlink(missing_ok=True)  # a read-only folder or a full disk: it is only slower the next time
    return index, f"{digest:016x}"


def _make_index(path: Path) -> tuple[np.ndarray, int]:
    digest = blake2b(digest_size=8)
    offsets, seconds, read = array("q"), array("f"), array("B")
    offset = 0
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.isspace():
                try:
                    stated, bits = _checked(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: {error}") from None
                offsets.append(offset)
                seconds.append(stated)
                read.append(bits)
                # ends of lines aside, which editors add and change
                digest.update((_ELSEWHERE.sub(b'"', line) if b'"id"' in line else line).rstrip() + b"\n")
            offset += len(line)
    if not offsets:
        raise ValueError(f"{path}: the manifest has no rows")
    index = np.empty(len(offsets), _INDEX)
    index["offset"], index["seconds"], index["read"] = offsets, seconds, read
    return index, _whole_number(digest)


def _whole_number(digest: blake2b) -> int:
    """A digest of 8 bytes, but for a bit, as an index can hold it."""
    return int.from_bytes(digest.digest(), "little") >> 1


def _checked(line: bytes) -> tuple[float, int]:
    """The seconds of a row, and which keys of `READ` it has.

    Raises:
        ValueError: it is none; the caller knows its place.
    """
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason}); save the manifest as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"not a JSON object ({error}): {_shown(line)}") from None
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object: {_shown(line)}")
    if not isinstance(row.get("id", ""), str | int):
        raise ValueError(f"'id' must be text or a number, got {row['id']!r}")
    if not row.keys().isdisjoint(PLACES):
        _check_place(row)
        _check_start(row)
    seconds = row.get("seconds", row.get("duration", math.nan))
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0 or math.isinf(seconds):
        raise ValueError(f"'seconds' must be a number above 0, got {seconds!r}")
    bits = 0
    for bit, key in enumerate(READ):
        if key in row:
            bits |= 1 << bit
            if key in MEDIA and (type(row[key]) is not str or not row[key]):
                _check_media(key, row[key])
    if _is_heard(row):
        bits |= 1 << READ.index("audio")
    return seconds, bits


def _is_heard(row: Row) -> bool:
    """Whether the sound of a row is that of its video."""
    return row.get("sound") is True and "video" in row and "audio" not in row


def _check_media(key: str, value: Any) -> None:
    parts = value if isinstance(value, list) else [value]
    if not parts:
        raise ValueError(f"{key!r} must name at least one file, got []")
    for part in parts:
        path = part.get("path") if isinstance(part, dict) else part
        if not isinstance(path, str) or not path:
            raise ValueError(f"{key!r} must be a path, got {part!r}")
        if isinstance(part, dict):
            _check_place(part)


def _check_place(place: Row) -> None:
    """What says which part of a file a clip is."""
    for key, (rule, kinds, least) in PLACES.items():
        value = place.get(key, least)
        if value is None and key == "size":
            continue  # to the end of the file
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < math.inf:
            raise ValueError(f"{key!r} must be {rule}, got {value!r}")
    if "duration" in place and not place["duration"]:
        raise ValueError("'duration' must be seconds above 0, got 0")


def _check_start(row: Row) -> None:
    """A second at which a row begins must not pass by one of its files: members of a pair would be of other times."""
    for key in ("audio", "video") if "start" in row else ():
        value = row.get(key)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict) and "start" not in part:
                raise ValueError(
                    f"'start' of a row is of files that are paths, and {key!r} is an object, which says its own; write "
                    "it beside its 'path', 0 for all of the file"
                )


def _shown(line: bytes) -> str:
    return repr(line[:60].decode(errors="replace").strip())


def read_slice(path: str, offset: int, size: int | None) -> io.BytesIO:
    """`size` bytes of a file from `offset` on (None: to its end), with one seek.

    Raises:
        BadClip: the file is missing or ends before that.
    """
    with open_clip(path) as handle:
        try:
            handle.seek(offset)
            content = handle.read(-1 if size is None else size)
        except OSError as error:
            raise BadClip(path, (error.strerror or str(error)).lower()) from None
    if size is not None and len(content) < size:
        raise BadClip(path, f"the file ends before byte {offset + size}, where the clip at byte {offset} should end")
    return io.BytesIO(content)
