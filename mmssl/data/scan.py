"""From a folder of files, and what a table says of them, to the rows of a manifest."""

from __future__ import annotations

import csv
import json
import math
import os
import posixpath
import re
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

from mmssl.data.manifest import MEDIA, PLACES, Row, read_slice, segment, with_content
from mmssl.files import open_clip
from mmssl.progress import bar
from mmssl.types import BadClip


@dataclass
class ScanResult:
    """What a scan found.

    rows: one a readable clip, in the order of their names (of the table, where there is one).
    bad: (path, reason) of each file and folder that cannot be read, and of each line of the table that names no file.
    remarks: (path, sentence) of each file that is in `rows` and has something odd about it.
    unlisted: files that the table does not name; they are not in `rows`.
    ignored: suffix -> number of files that are not of this media, and say nothing of one that is.
    """

    rows: list[Row] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[tuple[str, str]] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


class NoClips(ValueError):
    """A folder without a file of the media that was looked for; `ignored` as in `ScanResult`."""

    def __init__(self, sentence: str, ignored: Counter[str]) -> None:
        super().__init__(sentence)
        self.ignored = ignored


# path, and of a member of a tar its offset and size
_Place = tuple[str, int | None, int | None]


@dataclass
class _Clip:
    """A file, or a slice of one, that may become a row."""

    name: str  # relative to the scanned folder
    path: str
    offset: int | None = None
    size: int | None = None
    member: str = ""  # its name inside a tar
    beside: dict[str, _Place] = field(default_factory=dict)  # suffix -> the file of its name that says more of it
    known: Row = field(default_factory=dict)  # what a table says of it
    id: str = ""  # where its name is that of another too


def scan(
    folder: str | Path,
    *,
    media: str,
    probe: Callable[[Any], Mapping[str, Any]],
    suffixes: Collection[str],
    label_from: int | None = None,
    split_from: int | None = None,
    text_from: int | None = None,
    keys_from: Mapping[str, int] | None = None,
    tsv: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    tars: Collection[str | Path] = (),
    workers: int = 4,
    progress: bool = True,
) -> ScanResult:
    """Look through a folder, and through the uncompressed tar files in it, for clips.

    What lies beside a clip under its name says more of it, in a folder and in a tar, as WebDataset lays them out:
    `0001.txt` its text, `0001.cls` its label, and `0001.json` whatever of its keys means text, label, split or speaker.
    A clip's id is its name below the folder, with "@start+duration" where it is a part of a file; where two tars have
    one name, that of the tar stands before it, and where a table names a clip again, "#2" and so on behind it.

    Args:
        media: the key that names a row's file: "audio", "image", "video", "codes".
        probe: (path or binary file) -> what to note of the clip ("seconds", "height"), and perhaps a "remark" for the
            user; raises `BadClip`.
        suffixes: with their dot, in lower case. They choose what is looked at; what a file is, its content decides.
        label_from, split_from, text_from: the folder whose name is the clip's label, split, transcript: 1 is the first
            below `folder`, -1 the one that the file lies in.
        keys_from: other keys of a row, such as "speaker" -> the folder that tells it.
        tsv: a table of the clips: tab-separated (or .csv) with a line of column names, or fairseq's (a root, then
            `relative path <tab> samples`; a .wrd or .ltr file beside it gives the transcripts). Its file names may be
            relative paths or bare names, with or without suffix.
        columns: row key -> column of the table (without one, key of the .json files), where the names do not tell:
            {"text": "norm", "split": "fold"}.
        tars: look through these only, of those in the folder.
        workers: threads that read headers.

    Raises:
        NoClips: nothing in it to look at.
        ValueError: no such folder, a table that cannot be read, columns of neither a table nor any .json, or a key of
            `keys_from` that says where a clip lies.
    """
    root = os.path.abspath(folder)
    if not os.path.isdir(root):
        what = "a file; give the folder that it lies in" if os.path.isfile(root) else "no such folder"
        raise ValueError(f"{folder}: {what}")
    if media not in MEDIA:
        raise ValueError(f"scan: media {media!r} is not among {', '.join(MEDIA)}")
    for key in keys_from or {}:
        if key in (*MEDIA, *PLACES, "id", "seconds"):
            raise ValueError(f"scan: {key!r} says where a clip lies, and no folder's name does; choose another key")
    result = ScanResult()
    if tars:
        inside = {os.path.abspath(path): os.path.relpath(os.path.dirname(os.path.abspath(path)), root) for path in tars}
        clips = [clip for path in inside for clip in _members(path, inside[path], frozenset(suffixes), result)]
    else:
        clips = list(_walk(root, frozenset(suffixes), result))
    for suffix, _ in {item for clip in clips for item in clip.beside.items()}:
        result.ignored[suffix] -= 1
    result.ignored = +result.ignored
    names = Counter(clip.name for clip in clips)
    for clip in clips:
        if clip.member and names[clip.name] > 1:
            clip.id = f"{os.path.basename(clip.path)}/{clip.name}"
    if tsv is not None:
        clips = _listed(clips, root, Path(tsv), dict(columns or {}), result)
    if not clips and not result.bad:
        others = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in result.ignored.most_common(5))
        raise NoClips(
            f"{folder}: no {media} file here ({' '.join(sorted(suffixes))}); found {others or 'nothing'}",
            result.ignored,
        )
    if columns and tsv is None and not any(".json" in clip.beside for clip in clips):
        written = ", ".join(f"{key}={column}" for key, column in columns.items())
        raise ValueError(
            f"columns {written}: name what a table or .json files say, and {folder} has no .json beside a clip; give a "
            "table (--tsv), or leave the columns out"
        )
    levels = {"label": label_from, "split": split_from, "text": text_from, **(keys_from or {})}

    def look(part: list[_Clip]) -> list[Row | tuple[str, str]]:
        return [_probe(clip, media, probe, levels, {} if tsv is not None else columns or {}) for clip in part]

    parts = [clips[start : start + 32] for start in range(0, len(clips), 32)]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for found in _with_progress(pool.map(look, parts), parts, progress):
            for item in found:
                if isinstance(item, tuple):
                    result.bad.append(item)
                else:
                    if "remark" in item:
                        result.remarks.append((item[media], item.pop("remark")))
                    result.rows.append(item)
    # a table may name a file several times, and what is drawn of a clip depends on its id; those of a column are kept
    seen: Counter[str] = Counter()
    for row in result.rows if "id" not in (columns or {}) else ():
        seen[row["id"]] += 1
        if seen[row["id"]] > 1:
            row["id"] += f"#{seen[row['id']]}"
    return result


def pair(found: Mapping[str, ScanResult], hints: Mapping[str, Collection[str]], *, text: bool) -> ScanResult:
    """Clips of several media as one row, where they bear one name in one folder or tar: `0001.png` and `0001.wav`.

    Args:
        found: media -> the scan for it.
        hints: media -> keys of a row that tell how its file is to be read.
        text: whether a text is a member too.

    Returns:
        Rows with two members at least; what is alone is in `bad`.
    """
    if len(found) == 1:  # a table may name a file several times, each time with another text
        [one] = found.values()
        rows = [told for row in one.rows if "text" in (told := _with_texts(row))]
        bad = [
            (row["id"], "its text is empty" if "text" in row else "there is no text of this name beside it")
            for row in one.rows
            if "text" not in _with_texts(row)
        ]
        return replace(one, rows=rows, bad=one.bad + bad)
    groups: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    result = ScanResult(ignored=reduce(and_, (one.ignored for one in found.values())))
    for media, one in found.items():
        result.bad += one.bad
        result.remarks += one.remarks
        for row in one.rows:
            shard = row[media] if "offset" in row else ""
            # one media may have a name in several tars, and another in this one only
            name = row["id"].removeprefix(f"{os.path.basename(shard)}/").removesuffix(segment(row))
            folder, base = posixpath.split(name)
            stem = base.partition(".")[0] if shard else os.path.splitext(base)[0]
            group = groups[shard, posixpath.join(folder, stem)]
            if media in group:
                result.bad.append((row["id"], f"bears the name of {group[media]['id']}, and a pair has one {media}"))
            else:
                group[media] = row
    wanted = [*found, *(["text"] if text else [])]
    names = Counter(name for _, name in groups)
    for (shard, name), group in sorted(groups.items()):
        merged = _with_texts({key: value for row in reversed(group.values()) for key, value in row.items()})
        merged["id"] = f"{os.path.basename(shard)}/{name}" if shard and names[name] > 1 else name
        seconds = [row["seconds"] for row in group.values() if "seconds" in row]
        merged |= {"seconds": max(seconds)} if seconds else {}
        for media, row in group.items():
            own = {key: row[key] for key in (*PLACES, *hints[media]) if key in row}
            merged[media] = {"path": row[media], **own} if own else row[media]
        for key in PLACES:
            merged.pop(key, None)
        if sum(key in merged for key in wanted) < 2:
            lacking = " or ".join(key for key in wanted if key not in merged)
            result.bad.append((next(iter(group.values()))["id"], f"there is no {lacking} of this name beside it"))
        else:
            result.rows.append(merged)
    result.bad = list(dict.fromkeys(result.bad))  # what no scan could read, each has named
    return result


def _with_texts(row: Row) -> Row:
    """A row without those of its texts in which nothing stands: no pair is made with them."""
    said = with_content(row.get("text", ""))
    if not said:
        return {key: value for key, value in row.items() if key != "text"}
    return row | {"text": said if isinstance(row["text"], list) else said[0]}


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


def walk(root: str, refused: Callable[[BadClip], None]) -> Iterator[tuple[str, list[str]]]:
    """`root` and the folders below it, each with its files, by name.

    Links to folders are followed, to each folder once. Folders whose names start with a dot are left out; files whose
    names do are given, and are no clips.

    Args:
        refused: called with each folder that cannot be read, and why.
    """
    seen = set()

    def name(error: OSError) -> None:
        refused(BadClip(error.filename, f"the folder cannot be read ({(error.strerror or str(error)).lower()})"))

    for where, folders, files in os.walk(root, onerror=name, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield where, sorted(files)


def _walk(root: str, suffixes: frozenset[str], result: ScanResult) -> Iterator[_Clip]:
    """Clips below `root`, by name."""
    for where, files in walk(root, lambda error: result.bad.append((error.path, error.reason))):
        inside = os.path.relpath(where, root)
        notes = {
            f"{stem}{suffix.lower()}": (os.path.join(where, stem + suffix), None, None)
            for stem, suffix in map(os.path.splitext, files)
            if suffix.lower() in _BESIDE
        }
        for file in files:
            name = os.path.normpath(os.path.join(inside, file)).replace(os.sep, "/")
            path, suffix = os.path.join(where, file), os.path.splitext(file)[1].lower()
            if file.startswith("."):
                result.ignored[file] += 1
            elif suffix in suffixes:
                yield _Clip(name, path, beside=_beside(file, notes))
            elif suffix == ".tar":
                yield from _members(path, os.path.dirname(name), suffixes, result)
            else:
                result.ignored[suffix] += 1


def _members(path: str, inside: str, suffixes: frozenset[str], result: ScanResult) -> Iterator[_Clip]:
    """The files of an uncompressed tar, as slices of it: nothing is unpacked."""
    members: list[tuple[str, int, int]] = []
    try:
        members.extend(tar_members(path))
    except BadClip as error:
        result.bad.append((path, error.reason))
    notes: dict[str, _Place] = {}
    for name, offset, size in members:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in _BESIDE:
            notes[stem + suffix.lower()] = (path, offset, size)
    for name, offset, size in members:
        suffix = os.path.splitext(name)[1].lower()
        if suffix not in suffixes or posixpath.basename(name).startswith("."):
            result.ignored[suffix] += 1
            continue
        full = posixpath.normpath(posixpath.join(inside, name))
        yield _Clip(full, path, offset, size, name, _beside(name, notes))


def tar_members(path: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each file in an uncompressed tar, and of each link to one.

    Raises:
        BadClip: it is none, or it ends too early; what comes before is given all the same.
    """
    places: dict[str, tuple[int, int]] = {}
    links: list[tuple[str, str]] = []  # name, that of the file
    with open_clip(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as shard:
                for member in shard:
                    name = posixpath.normpath(member.name).lstrip("/")
                    if member.isfile():
                        places[name] = (member.offset_data, member.size)
                        yield name, *places[name]
                    elif member.islnk():
                        links.append((name, posixpath.normpath(member.linkname).lstrip("/")))
                    elif member.issym():
                        target = posixpath.join(posixpath.dirname(name), member.linkname)
                        links.append((name, posixpath.normpath(target)))
                for name, target in links:  # a symbolic one may come before its file
                    if target in places:
                        yield name, *places[target]
                # a header that was cut off, or is none, ends it for tarfile as the end of the archive does
                end = shard.offset
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise BadClip(
                    path,
                    f"at byte {end} comes neither another file nor the end of the tar: it was cut off or is damaged; "
                    "copy it again",
                )
        except (tarfile.TarError, OSError, EOFError) as error:
            raise BadClip(path, f"cannot be read as an uncompressed tar ({error})") from None


def _beside(name: str, notes: Mapping[str, _Place]) -> dict[str, _Place]:
    """Of the notes those that bear a clip's name: without its suffix, or up to its first dot, as in WebDataset."""
    folder, base = posixpath.split(name)
    stems = [posixpath.join(folder, stem) for stem in (base.partition(".")[0], os.path.splitext(base)[0])]
    return {suffix: notes[stem + suffix] for suffix in _BESIDE for stem in stems if stem + suffix in notes}


def _said(clip: _Clip, columns: Mapping[str, str]) -> Row:
    """What the files beside a clip say of it.

    Raises:
        BadClip: one of them cannot be read.
    """
    found: Row = {}
    for suffix, place in clip.beside.items():
        name = posixpath.splitext(clip.name)[0] + suffix
        try:
            text = read_slice(place[0], place[1] or 0, place[2]).read().decode("utf-8-sig").strip()
            found |= _BESIDE[suffix](text, columns)
        except UnicodeDecodeError as error:
            raise BadClip(name, f"{name} beside it is not UTF-8 ({error.reason})") from None
        except ValueError as error:
            raise BadClip(name, f"{name} beside it {error}") from None
    return found


def _read_json(text: str, columns: Mapping[str, str]) -> Row:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"is no JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError("is no JSON object")
    for key, column in columns.items():
        if column not in values:
            raise ValueError(f"has no {column!r} for {key!r}; its keys are {', '.join(values) or 'none'}")
    guessed = _guess(values, {key: column for key, column in columns.items() if key != "file"})
    found = {key: values[column] for key, column in guessed.items() if key != "file" and values[column] is not None}
    texts = found.get("text")
    several = isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
    if "text" in found and not isinstance(texts, str) and not several:
        if isinstance(found["text"], bool) or not isinstance(found["text"], int | float):
            told = json.dumps(found["text"], ensure_ascii=False)
            raise ValueError(
                f"has {told[:60]} for its {guessed['text']!r}, and a text is a string or a list of strings"
            )
        found["text"] = str(found["text"])  # a caption such as 1984
    return found


# what lies beside a clip under its name -> the keys of a row that it gives
_BESIDE: dict[str, Callable[[str, Mapping[str, str]], Row]] = {
    ".json": _read_json,
    ".cls": lambda text, columns: {"label": int(text) if text.isdecimal() else text},
    ".txt": lambda text, columns: {"text": text},
}


def _probe(
    clip: _Clip,
    media: str,
    probe: Callable[[Any], Mapping[str, Any]],
    levels: Mapping[str, int | None],
    columns: Mapping[str, str],
) -> Row | tuple[str, str]:
    row: Row = {media: clip.path}
    place = clip.path
    try:
        if clip.offset is None:
            found = probe(clip.path)
        else:
            row |= {"offset": clip.offset, "size": clip.size}
            place = f"{clip.path}#{clip.name}"
            found = probe(read_slice(clip.path, clip.offset, clip.size))
        said = _said(clip, columns)
    except BadClip as error:
        return place, error.reason
    row |= {key: round(value, 6) if isinstance(value, float) else value for key, value in found.items()}
    row |= said
    folders = clip.name.split("/")[:-1]
    for key, level in levels.items():
        if level is None:
            continue
        if level == 0 or not -len(folders) <= level - (level > 0) < len(folders):
            return place, f"has no folder of level {level} to take its {key} from (its folders: {folders or 'none'})"
        row[key] = folders[level - (level > 0)]
    row |= clip.known
    if media == "image":  # it has no time: what a note says of that is of the sound or video beside it
        row = {key: value for key, value in row.items() if key not in ("start", "duration")}
    try:
        row |= {key: float(row[key]) for key in ("start", "duration") if key in row}
    except ValueError as error:
        return place, f"'start' and 'duration' must be seconds ({error})"
    if "start" in row or "duration" in row:
        row["seconds"] = row.get("duration", row.get("seconds", math.inf) - row.get("start", 0.0))
        if not 0 < row["seconds"] < math.inf:
            return place, f"the segment that starts at {row.get('start', 0.0):g} s is {row['seconds']:g} s long"
    return {"id": (clip.id or clip.name) + segment(row), **row}


# row key -> names of columns that mean it
_COLUMNS = {
    "file": ("file", "path", "audio", "image", "video", "filename", "file_name", "wav", "clip"),
    "text": ("text", "sentence", "transcript", "transcription", "caption"),
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
    columns = _guess(names, columns)
    if "file" not in columns:
        raise ValueError(
            f"{tsv}: no column is called {', '.join(_COLUMNS['file'])}; say which names the file, of "
            f"{', '.join(names) or 'none at all'}"
        )
    file = columns.pop("file")
    return [(line, entry[file], {key: entry[column] for key, column in columns.items()}) for line, entry in table]


def _guess(names: Iterable[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Row key -> column, of those that are given and of those that a name tells."""
    guessed = {
        key: next((name for name in names if name.lower() in guesses), None) for key, guesses in _COLUMNS.items()
    }
    return {key: name for key, name in guessed.items() if name is not None} | dict(columns)


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
    with bar("reading headers", sum(len(part) for part in parts), shown=shown and sys.stderr.isatty()) as advance:
        for part, item in zip(parts, found, strict=True):
            advance(len(part))
            yield item
