"""Manifests: one JSON object a line, one line a clip, read by byte offset; and how one is written.

A manifest in memory is two arrays, never a list of dicts: that costs 720 bytes a row, in every process.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import posixpath
import re
import tarfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.types import BadClip

Row = dict[str, Any]

MEDIA = ("audio", "image", "video")  # the keys of a row whose values are files
INDEX_FROM = 200_000  # rows: reading fewer takes a second or so, and a file beside each small manifest is clutter
_INDEX = np.dtype([("offset", "<i8"), ("seconds", "<f4")])


class Manifest(Sequence[Row]):
    """The rows of a .jsonl file, each read when it is asked for.

    Every line is checked when the manifest is opened, so a broken one stops a run before it starts. A million rows of
    190 bytes take 6 s of one core to check; from `INDEX_FROM` rows on, what was found is kept in `<name>.index` beside
    the manifest and mapped into memory the next time (1 ms), as long as the manifest's size and date stay the same.

    Rows come with the paths of their media joined to the manifest's folder, and with an `id`.

    Raises:
        ValueError: no such file, no rows, or a line that is not a JSON object, by its number.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._index = _read_index(self.path)

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

    def lengths(self) -> np.ndarray:
        """(rows,) float32, the seconds of each clip as its row states them.

        Raises:
            ValueError: a row states none.
        """
        unknown = np.flatnonzero(np.isnan(self._index["seconds"]))
        if len(unknown):
            raise ValueError(
                f"{self.place(unknown[0])}: the row has no 'seconds', which batches by length need; `mmssl manifest` "
                "writes them"
            )
        return np.asarray(self._index["seconds"])

    def column(self, key: str) -> list[Any]:
        """The value that every row has for `key`.

        Raises:
            ValueError: a row has no such key.
        """
        values = []
        for place, row in enumerate(self):
            if key not in row:
                raise ValueError(f"{self.place(place)}: the row has no {key!r}, only {', '.join(sorted(row))}")
            values.append(row[key])
        return values

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
        part.path = self.path
        part._index = self._index[np.asarray(indices, dtype=np.int64)]
        return part

    def _row(self, line: bytes, offset: int) -> Row:
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(f"{self.path}: changed since it was opened, no row starts at byte {offset} now") from None
        row.setdefault("id", _default_id(row))
        for key in MEDIA:
            if key in row:
                row[key] = _map_paths(row[key], lambda name: os.path.join(self.path.parent, name))
        return row


def write_manifest(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows, all or nothing, and say how many.

    Media inside the manifest's own folder are written relative to it, so that the folder can move.

    Raises:
        ValueError: there are no rows.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    root = os.path.join(os.path.abspath(path.parent), "")
    unfinished = path.with_name(path.name + ".tmp")
    count = 0
    with open(unfinished, "w", encoding="utf-8", newline="\n") as handle:
        for row in rows:
            local = dict(row)
            for key in MEDIA:
                if key in local:
                    local[key] = _map_paths(local[key], lambda name: name.removeprefix(root))
            handle.write(_json_line(local))
            count += 1
    if not count:
        unfinished.unlink()
        raise ValueError(f"{path}: there are no rows to write")
    os.replace(unfinished, path)
    return count


def split_rows(
    rows: Iterable[Row], *, shares: Mapping[str, float] | None = None, by: str = "id"
) -> dict[str, list[Row]]:
    """Rows by split.

    Args:
        shares: split name -> share of the rows; None to go by each row's own "split".
        by: with `shares`, rows that agree in this key stay together ("speaker" keeps a voice on one side). A row's side
            depends on that key alone, so adding files later moves no other.

    Raises:
        ValueError: shares that do not add up to 1, or a row without the key.
    """
    if shares is not None and not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise ValueError(f"split_rows: the shares {dict(shares)} add up to {sum(shares.values()):g}, not to 1")
    key = "split" if shares is None else by
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if key not in row:
            raise ValueError(
                f"split_rows: the row of {row.get('id', 'an unnamed clip')} has no {key!r}; name a column or a folder "
                "level that tells it, or give shares"
            )
        if shares is None:
            found[str(row["split"])].append(row)
            continue
        digest = blake2b(str(row[by]).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        # its place in [0, 1), where the shares lie end to end
        place = np.searchsorted(np.cumsum(list(shares.values())), int.from_bytes(digest, "little") / 2.0**64, "right")
        name = list(shares)[min(int(place), len(shares) - 1)]
        found[name].append({**row, "split": name})
    return dict(found)


@dataclass
class ScanResult:
    """What a scan found.

    rows: one a readable clip, in the order of their names (of the table, where there is one).
    bad: (path, reason) of each file that cannot be read, and of each line of the table that names no file.
    unlisted: files that the table does not name; they are not in `rows`.
    ignored: suffix -> number of files that are not of this media.
    """

    rows: list[Row] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


@dataclass
class _Clip:
    """A file, or a slice of one, that may become a row."""

    name: str  # relative to the scanned folder
    path: str
    offset: int | None = None
    size: int | None = None
    member: str = ""  # its name inside a tar
    known: Row = field(default_factory=dict)  # what a table says of it


def scan(
    folder: str | Path,
    *,
    media: str,
    probe: Callable[[Any], Mapping[str, Any]],
    suffixes: Collection[str],
    label_from: int | None = None,
    split_from: int | None = None,
    text_from: int | None = None,
    tsv: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    workers: int = 4,
    progress: bool = True,
) -> ScanResult:
    """Look through a folder, and through the uncompressed tar files in it, for clips.

    Args:
        media: the key that names a row's file: "audio", "image".
        probe: (path or binary file) -> what to note of the clip ("seconds", "height"); raises `BadClip`.
        suffixes: with their dot, in lower case. They choose what is looked at; what a file is, its content decides.
        label_from, split_from, text_from: the folder whose name is the clip's label, split, transcript: 1 is the first
            below `folder`, -1 the one that the file lies in.
        tsv: a table of the clips: tab-separated (or .csv) with a line of column names, or fairseq's (a root, then
            `relative path <tab> samples`; a .wrd or .ltr file beside it gives the transcripts). Its file names may be
            relative paths or bare names, with or without suffix.
        columns: row key -> column of the table, where the names do not tell: {"text": "norm", "split": "fold"}.
        workers: threads that read headers.

    Raises:
        ValueError: no such folder, nothing in it to look at, or a table that cannot be read.
    """
    root = os.path.abspath(folder)
    if not os.path.isdir(root):
        raise ValueError(f"{folder}: no such folder")
    if media not in MEDIA:
        raise ValueError(f"scan: media {media!r} is not among {', '.join(MEDIA)}")
    result = ScanResult()
    clips = list(_walk(root, frozenset(suffixes), result))
    if tsv is not None:
        clips = _listed(clips, root, Path(tsv), dict(columns or {}), result)
    if not clips and not result.bad:
        others = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in result.ignored.most_common(5))
        raise ValueError(f"{folder}: no {media} file here ({' '.join(sorted(suffixes))}); found {others or 'nothing'}")
    levels = {"label": label_from, "split": split_from, "text": text_from}

    def look(part: list[_Clip]) -> list[Row | tuple[str, str]]:
        return [_probe(clip, media, probe, levels) for clip in part]

    parts = [clips[start : start + 32] for start in range(0, len(clips), 32)]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for found in _with_progress(pool.map(look, parts), parts, progress):
            for item in found:
                if isinstance(item, tuple):
                    result.bad.append(item)
                else:
                    result.rows.append(item)
    return result


def read_table(path: str | Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, values by the names in the first line) of a tab-separated file (.csv: of a comma-separated one).

    Raises:
        ValueError: not UTF-8, or a line with more or fewer columns than the first, by its number.
    """
    path = Path(path)

    def lines() -> Iterator[str]:
        with open(path, "rb") as handle:
            for number, line in enumerate(handle, 1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason}); save the table as UTF-8") from None

    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    comma = path.suffix.lower() == ".csv"
    reader = csv.reader(
        lines(), delimiter="," if comma else "\t", quoting=csv.QUOTE_MINIMAL if comma else csv.QUOTE_NONE
    )
    names = next(reader, None)
    if not names:
        raise ValueError(f"{path}: the table is empty")
    table = []
    for values in reader:
        if not values:
            continue
        if len(values) != len(names):
            raise ValueError(f"{path}:{reader.line_num}: {len(values)} columns, but the first line names {len(names)}")
        table.append((reader.line_num, dict(zip(names, values, strict=True))))
    return table


def _map_paths(value: Any, change: Callable[[str], str]) -> Any:
    """The value of a media key with `change` applied to its path, or to the path of each part."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_paths(part, change) for part in value]
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return {**value, "path": change(value["path"])}
    return value  # whoever reads the clip says what is wrong with it


def _default_id(row: Row) -> str:
    """The path as written, with what tells apart two clips of one file."""
    value = next((row[key] for key in MEDIA if key in row), None)
    part = value[0] if isinstance(value, list) and value else value
    part = part if isinstance(part, dict) else {**row, "path": part}
    name = str(part.get("path"))
    name += f"#{part['offset']}" if "offset" in part else ""
    return name + (f"@{part['start']:g}" if "start" in part else "")


def _json_line(row: Row) -> str:
    line = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        # a file name that is not UTF-8: as \udc.. escapes it opens the same file again
        line = json.dumps(row, allow_nan=False)
    return line + "\n"


def _read_index(path: Path) -> np.ndarray:
    if not path.is_file():
        what = "a folder, not a manifest" if path.is_dir() else "no such manifest"
        raise ValueError(f"{path}: {what}; `mmssl manifest FOLDER` writes one")
    stat = path.stat()
    digest = blake2b(f"{stat.st_size} {stat.st_mtime_ns}".encode(), digest_size=8).digest()
    stamp = int.from_bytes(digest, "little") >> 1
    kept = path.with_name(path.name + ".index")
    if kept.is_file():
        try:
            index = np.load(kept, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError):
            index = np.empty(0, _INDEX)  # torn or foreign: made anew
        if index.dtype == _INDEX and len(index) > 1 and index["offset"][0] == stamp:
            return index[1:]
    index = _make_index(path)
    if len(index) >= INDEX_FROM:
        unfinished = kept.with_name(f"{kept.name}.{os.getpid()}.tmp")
        try:
            with open(unfinished, "wb") as handle:
                np.save(handle, np.concatenate([np.array([(stamp, math.nan)], _INDEX), index]))
            os.replace(unfinished, kept)
        except OSError:
            unfinished.unlink(missing_ok=True)  # a read-only folder or a full disk: it is only slower the next time
    return index


def _make_index(path: Path) -> np.ndarray:
    offsets, seconds = array("q"), array("f")
    offset = 0
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.isspace():
                offsets.append(offset)
                seconds.append(_checked_seconds(line, f"{path}:{number}"))
            offset += len(line)
    if not offsets:
        raise ValueError(f"{path}: the manifest has no rows")
    index = np.empty(len(offsets), _INDEX)
    index["offset"], index["seconds"] = offsets, seconds
    return index


def _checked_seconds(line: bytes, place: str) -> float:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 ({error.reason}); save the manifest as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{place}: not a JSON object ({error}): {_shown(line)}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: not a JSON object: {_shown(line)}")
    seconds = row.get("seconds", row.get("duration", math.nan))
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0 or math.isinf(seconds):
        raise ValueError(f"{place}: 'seconds' must be a number above 0, got {seconds!r}")
    return seconds


def _shown(line: bytes) -> str:
    return repr(line[:60].decode(errors="replace").strip())


def _walk(root: str, suffixes: frozenset[str], result: ScanResult) -> Iterator[_Clip]:
    """Clips below `root`, by name; folders and files whose names start with a dot are left out."""
    seen = set()
    for where, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(where, root)
        for file in sorted(files):
            name = os.path.normpath(os.path.join(inside, file)).replace(os.sep, "/")
            path, suffix = os.path.join(where, file), os.path.splitext(file)[1].lower()
            if file.startswith("."):
                result.ignored[file] += 1
            elif suffix in suffixes:
                yield _Clip(name, path)
            elif suffix == ".tar":
                yield from _members(path, os.path.dirname(name), suffixes, result)
            else:
                result.ignored[suffix] += 1


def _members(path: str, inside: str, suffixes: frozenset[str], result: ScanResult) -> Iterator[_Clip]:
    """The files of an uncompressed tar, as slices of it: nothing is unpacked."""
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                suffix = os.path.splitext(member.name)[1].lower()
                if not member.isfile():
                    continue
                if suffix not in suffixes:
                    result.ignored[suffix] += 1
                    continue
                inner = posixpath.normpath(member.name).lstrip("/")
                yield _Clip(posixpath.join(inside, inner), path, member.offset_data, member.size, inner)
    except (tarfile.TarError, OSError, EOFError) as error:
        result.bad.append((path, f"cannot be read as an uncompressed tar ({error})"))


def _probe(
    clip: _Clip, media: str, probe: Callable[[Any], Mapping[str, Any]], levels: Mapping[str, int | None]
) -> Row | tuple[str, str]:
    row: Row = {"id": clip.name, media: clip.path}
    place = clip.path
    try:
        if clip.offset is None:
            found = probe(clip.path)
        else:
            row |= {"offset": clip.offset, "size": clip.size}
            place = f"{clip.path}#{clip.name}"
            found = probe(read_slice(clip.path, clip.offset, clip.size))
    except BadClip as error:
        return place, error.reason
    row |= {key: round(value, 6) if isinstance(value, float) else value for key, value in found.items()}
    folders = clip.name.split("/")[:-1]
    for key, level in levels.items():
        if level is None:
            continue
        if level == 0 or not -len(folders) <= level - (level > 0) < len(folders):
            return place, f"has no folder of level {level} to take its {key} from (its folders: {folders or 'none'})"
        row[key] = folders[level - (level > 0)]
    row |= clip.known
    try:
        row |= {key: float(row[key]) for key in ("start", "duration") if key in row}
    except ValueError as error:
        return place, f"'start' and 'duration' must be seconds ({error})"
    if "start" in row or "duration" in row:
        row["seconds"] = row.get("duration", row.get("seconds", math.inf) - row.get("start", 0.0))
        if not 0 < row["seconds"] < math.inf:
            return place, f"the segment that starts at {row.get('start', 0.0):g} s is {row['seconds']:g} s long"
    return row


def read_slice(path: str, offset: int, size: int | None) -> io.BytesIO:
    """`size` bytes of a file from `offset` on (None: to its end), with one seek.

    Raises:
        BadClip: the file is missing or ends before that.
    """
    try:
        with open(path, "rb") as handle:
            handle.seek(offset)
            content = handle.read(-1 if size is None else size)
    except OSError as error:
        raise BadClip(path, _os_reason(error)) from None
    if size is not None and len(content) < size:
        raise BadClip(path, f"the file ends before byte {offset + size}, where the clip at byte {offset} should end")
    return io.BytesIO(content)


def _os_reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


# row key -> names of columns that mean it
_COLUMNS = {
    "file": ("file", "path", "audio", "image", "filename", "file_name", "wav", "clip"),
    "text": ("text", "sentence", "transcript", "transcription"),
    "label": ("label", "class", "category"),
    "split": ("split", "subset"),
    "speaker": ("speaker", "speaker_id", "client_id"),
}


def _listed(clips: list[_Clip], root: str, tsv: Path, columns: dict[str, str], result: ScanResult) -> list[_Clip]:
    """The clips that a table names, with what it says of them, in its order."""
    if not tsv.is_file():
        raise ValueError(f"{tsv}: no such file")
    fairseq = _read_fairseq(tsv)
    entries = _read_entries(tsv, columns) if fairseq is None else fairseq
    by_name: dict[str, set[int]] = defaultdict(set)
    for place, clip in enumerate(clips):
        for name in {clip.name, clip.member or clip.name, os.path.basename(clip.name)}:
            by_name[name].add(place)
            by_name[os.path.splitext(name)[0]].add(place)
    listed, used = [], set()
    for line, file, known in entries:
        name = os.path.relpath(file, root) if os.path.isabs(file) else os.path.normpath(file)
        name = name.replace(os.sep, "/")
        places = by_name.get(name, set())
        path = os.path.join(root, file)
        piece = re.fullmatch(r"(.+):(\d+):(\d+)", path)
        if len(places) == 1:
            place = next(iter(places))
            used.add(place)
            listed.append(replace(clips[place], known=known))
        elif len(places) > 1:
            result.bad.append((file, f"{tsv}:{line} names it, and {len(places)} files have that name"))
        elif os.path.isfile(path):
            listed.append(_Clip(name, path, known=known))
        elif piece and os.path.isfile(piece[1]):
            listed.append(_Clip(name, piece[1], int(piece[2]), int(piece[3]), known=known))
        else:
            result.bad.append((file, f"{tsv}:{line} names it, but there is no such file in {root}"))
    result.unlisted = [clip.name for place, clip in enumerate(clips) if place not in used]
    return listed


def _read_entries(tsv: Path, columns: dict[str, str]) -> list[tuple[int, str, Row]]:
    """(line, file, what is known) of a table with column names."""
    table = read_table(tsv)
    names = list(table[0][1]) if table else []
    for key, column in columns.items():
        if column not in names:
            raise ValueError(f"{tsv}: no column {column!r} for {key!r}; the columns are {', '.join(names) or 'none'}")
    for key, guesses in _COLUMNS.items():
        guess = next((name for name in names if name.lower() in guesses), None)
        if guess is not None:
            columns.setdefault(key, guess)
    if "file" not in columns:
        raise ValueError(
            f"{tsv}: no column is called {', '.join(_COLUMNS['file'])}; say which names the file, of "
            f"{', '.join(names) or 'none at all'}"
        )
    file = columns.pop("file")
    return [(line, entry[file], {key: entry[column] for key, column in columns.items()}) for line, entry in table]


def _read_fairseq(tsv: Path) -> list[tuple[int, str, Row]] | None:
    """(line, file, what is known) of fairseq's table, None where it is not one.

    A clip inside a stored zip is written `archive.zip:offset:size` there. The count of samples is not taken over: it
    says nothing of the rate, and is a header's word. A root that is gone is read as the scanned folder.
    """
    with open(tsv, encoding="utf-8", errors="replace") as handle:
        lines = handle.read().splitlines()
    if len(lines) < 2 or "\t" in lines[0] or not all(_is_fairseq(line) for line in lines[1:] if line):
        return None
    texts: list[str] | None = None
    for suffix in (".wrd", ".ltr"):
        beside = tsv.with_suffix(suffix)
        if texts is None and beside.is_file():
            texts = beside.read_text(encoding="utf-8").splitlines()
            if suffix == ".ltr":
                texts = [" ".join(text.replace(" ", "").replace("|", " ").split()) for text in texts]
            if len(texts) != len(lines) - 1:
                raise ValueError(f"{beside}: {len(texts)} transcripts for the {len(lines) - 1} clips of {tsv}")
    entries = []
    for number, line in enumerate(lines[1:], 2):
        if line:
            file = os.path.join(lines[0] if os.path.isdir(lines[0]) else "", line.split("\t")[0])
            entries.append((number, file, {} if texts is None else {"text": texts[number - 2]}))
    return entries


def _is_fairseq(line: str) -> bool:
    parts = line.split("\t")
    return len(parts) == 2 and parts[1].strip().isdigit()


def _with_progress(found: Iterable[Any], parts: list[list[_Clip]], shown: bool) -> Iterator[Any]:
    """Hand through, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    look = (TextColumn("reading headers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*look, console=console, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task("", total=sum(len(part) for part in parts))
        for part, item in zip(parts, found, strict=True):
            progress.advance(task, len(part))
            yield item
