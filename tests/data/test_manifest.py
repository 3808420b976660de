"""Manifests are read by place, and written whole."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmssl.data import manifest as module
from mmssl.data.manifest import Manifest, read_slice, split_rows, write_manifest
from mmssl.types import BadClip


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


# reading


def test_rows_are_read_by_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *(json.dumps({"id": f"ü{i}", "seconds": i + 0.5}) for i in range(5)))
    manifest = Manifest(path)
    assert len(manifest) == 5
    assert [manifest[i]["id"] for i in (4, 0, -1, 2)] == ["ü4", "ü0", "ü4", "ü2"]
    assert [row["id"] for row in manifest] == [f"ü{i}" for i in range(5)]
    assert manifest.lengths().tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert list(manifest.values("id")) == [f"ü{i}" for i in range(5)]
    with pytest.raises(IndexError):
        manifest[5]


def test_blank_lines_and_the_marks_of_other_systems_do_no_harm(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", b'\xef\xbb\xbf{"id": "a", "seconds": 1}\r', "", "  ", '{"id": "b", "seconds": 2}\r', ""
    )
    manifest = Manifest(path)
    assert list(manifest.values("id")) == ["a", "b"]
    assert [manifest.place(i) for i in range(2)] == [f"{path}:1", f"{path}:4"]


def test_a_selection_is_a_manifest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *(json.dumps({"id": str(i), "seconds": i + 1}) for i in range(5)))
    part = Manifest(path).select([3, 0])
    assert list(part.values("id")) == ["3", "0"]
    assert part.lengths().tolist() == [4, 1]
    assert part.place(0) == f"{path}:4"
    assert list(Manifest(path)[1:3].values("id")) == ["1", "2"]


def test_paths_are_seen_from_the_folder_of_the_manifest(tmp_path: Path) -> None:
    parts = [{"path": "b.tar", "offset": 512, "size": 3}, "c.wav"]
    path = write(
        tmp_path / "a.jsonl",
        json.dumps({"audio": "x/a.wav", "text": "a"}),
        json.dumps({"image": "/data/a.png", "audio": parts}),
    )
    first, second = Manifest(path)
    assert first == {"id": "x/a.wav", "audio": str(tmp_path / "x/a.wav"), "text": "a"}
    assert second["image"] == "/data/a.png"
    assert second["audio"] == [{**parts[0], "path": str(tmp_path / "b.tar")}, str(tmp_path / "c.wav")]


@pytest.mark.parametrize(
    ("row", "id"),
    [
        ({"audio": "a.wav"}, "a.wav"),
        ({"audio": "a.wav", "id": "mine"}, "mine"),
        ({"audio": "a.wav", "id": 7}, "7"),
        ({"audio": "a.tar", "offset": 512, "size": 1}, "a.tar#512"),
        ({"audio": "a.wav", "start": 1.5}, "a.wav@1.5"),
        ({"audio": "a.wav", "start": 2.0, "duration": 0.5}, "a.wav@2+0.5"),
        ({"audio": "a.wav", "start": 36000.125}, "a.wav@36000.125"),
        ({"audio": "a.wav", "duration": 3.5}, "a.wav"),  # which may be that of the whole file
        ({"audio": [{"path": "a.tar", "offset": 9}, {"path": "a.tar", "offset": 2}]}, "a.tar#9,a.tar#2"),
        ({"audio": ["a.wav", {"path": "b.wav", "start": 1}]}, "a.wav,b.wav@1"),
        ({"audio": ["a.wav"]}, "a.wav"),
        ({"audio": {"path": "a.tar", "offset": 9}}, "a.tar#9"),
    ],
)
def test_every_clip_has_an_id_of_its_own(tmp_path: Path, row: dict[str, Any], id: str) -> None:
    assert Manifest(write(tmp_path / "a.jsonl", json.dumps(row)))[0]["id"] == id


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"id": "b", "seconds": 1', r"a.jsonl:3: not a JSON object \(Expecting ',' delimiter"),
        ("[1, 2]", r"a.jsonl:3: not a JSON object: '\[1, 2\]'"),
        (b'{"id": "\xe4"}', "a.jsonl:3: not UTF-8"),
        ('{"seconds": -1}', "a.jsonl:3: 'seconds' must be a number above 0, got -1"),
        ('{"seconds": "5"}', "a.jsonl:3: 'seconds' must be a number above 0, got '5'"),
        ('{"audio": "a", "start": "x"}', "a.jsonl:3: 'start' must be seconds from 0 on, got 'x'"),
        ('{"audio": "a", "start": null}', "a.jsonl:3: 'start' must be seconds from 0 on, got None"),
        ('{"audio": "a", "start": NaN}', "a.jsonl:3: 'start' must be seconds from 0 on, got nan"),
        ('{"audio": "a", "duration": []}', r"a.jsonl:3: 'duration' must be seconds above 0, got \[\]"),
        ('{"audio": "a", "duration": 0, "seconds": 1}', "a.jsonl:3: 'duration' must be seconds above 0, got 0"),
        ('{"audio": "a", "offset": 1.5}', "a.jsonl:3: 'offset' must be a number of bytes, got 1.5"),
        ('{"audio": "a", "offset": 1, "size": -1}', "a.jsonl:3: 'size' must be a number of bytes, got -1"),
        ('{"audio": "a", "id": null}', "a.jsonl:3: 'id' must be text or a number, got None"),
        ('{"audio": []}', r"a.jsonl:3: 'audio' must name at least one file, got \[\]"),
        ('{"audio": null}', "a.jsonl:3: 'audio' must be a path, got None"),
        ('{"image": ""}', "a.jsonl:3: 'image' must be a path, got ''"),
        ('{"audio": ["a", 7]}', "a.jsonl:3: 'audio' must be a path, got 7"),
        ('{"audio": {"offset": 3}}', "a.jsonl:3: 'audio' must be a path, got {'offset': 3}"),
        (
            '{"audio": {"path": "a"}, "start": 2}',
            "a.jsonl:3: 'start' of a row is of files that are paths, and 'audio' is",
        ),
        ('{"audio": "a", "video": {"path": "a", "duration": 2}, "start": 2}', "a.jsonl:3: .* and 'video' is an object"),
        ('{"audio": ["a", {"path": "a"}], "start": 2}', "beside its 'path', 0 for all of the file$"),
        ('{"audio": [{"path": "a", "offset": "3"}]}', "a.jsonl:3: 'offset' must be a number of bytes, got '3'"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_by_its_number(tmp_path: Path, line: str | bytes, sentence: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"id": "a"}', "", line, '{"id": "c"}')
    with pytest.raises(ValueError, match=sentence) as caught:
        Manifest(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_manifest_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such manifest; `mmssl manifest FOLDER` writes one"):
        Manifest(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="a folder, not a manifest"):
        Manifest(tmp_path)
    with pytest.raises(ValueError, match="has no rows"):
        Manifest(write(tmp_path / "a.jsonl", "", ""))


def test_missing_keys_are_named_with_their_line(tmp_path: Path) -> None:
    manifest = Manifest(write(tmp_path / "a.jsonl", '{"audio": "a", "seconds": 1, "text": "x"}', '{"audio": "b"}'))
    with pytest.raises(ValueError, match=r"a.jsonl:2: the row has no 'seconds'"):
        manifest.lengths()
    with pytest.raises(ValueError, match=r"a.jsonl:2: the row has no 'text', only audio, id"):
        list(manifest.values("text"))


def test_a_row_that_lacks_a_file_is_found_before_any_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"audio": "a", "image": "b"}', "", '{"image": "b"}', '{"id": "c"}')
    manifest = Manifest(path)
    with pytest.raises(ValueError, match="a.jsonl:3: no 'audio', which speech reads; the row has id, image"):
        manifest.require("audio", "speech")
    with pytest.raises(ValueError, match="a.jsonl:4: no 'image', which eyes reads; the row has id"):
        manifest.require("image", "eyes")
    manifest.select([1, 0]).require("image", "eyes")


def test_values_are_read_one_by_one(tmp_path: Path) -> None:
    values = Manifest(write(tmp_path / "a.jsonl", '{"text": "a"}', '{"label": 1}')).values("text")
    assert next(values) == "a"
    with pytest.raises(ValueError, match="a.jsonl:2: the row has no 'text', only id, label"):
        next(values)


def test_a_manifest_that_changes_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"id": "first"}', '{"id": "second"}')
    manifest = Manifest(path)
    write(path, '{"id": "1"}', '{"id": "2"}')
    with pytest.raises(ValueError, match="changed since it was opened"):
        manifest[1]


def test_the_index_of_a_long_manifest_is_kept_until_the_manifest_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", *(json.dumps({"id": str(i), "seconds": i + 1}) for i in range(4)))
    Manifest(path)
    kept = tmp_path / "a.jsonl.index"
    assert not kept.exists()
    monkeypatch.setattr(module, "INDEX_FROM", 4)
    Manifest(path)
    assert kept.exists()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_make_index", lambda path: pytest.fail("the index was not used"))
        again = Manifest(path)
    assert list(again.values("id")) == ["0", "1", "2", "3"]
    assert again.lengths().tolist() == [1, 2, 3, 4]
    assert isinstance(again._index, np.memmap)  # costs no memory in any process
    assert again.digest == again.select([2]).digest == Manifest(write(tmp_path / "b.jsonl", path.read_bytes())).digest
    content = path.read_text().replace('"1"', '"x"')
    path.write_text(content)
    os.utime(path, ns=(0, 0))
    assert list(Manifest(path).values("id")) == ["0", "x", "2", "3"]
    for rubbish in (b"", b"rubbish", kept.read_bytes()[:-10]):
        kept.write_bytes(rubbish)
        assert Manifest(path).lengths().tolist() == [1, 2, 3, 4]


def test_the_digest_tells_other_rows_and_not_other_places(tmp_path: Path) -> None:
    def digest(*lines: str, name: str = "a.jsonl") -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        return Manifest(write(tmp_path / name, *lines)).digest

    rows = ['{"id": "a", "audio": "/one/x/a.wav", "label": "n/y"}', '{"id": "b", "audio": "b.wav", "label": 1}']
    same = digest(*rows)
    assert len(same) == 16
    assert digest(*rows, name="other/b.jsonl") == same
    assert digest(rows[0] + "\r", "", rows[1] + "\r", "") == same
    os.utime(tmp_path / "a.jsonl", ns=(0, 0))
    assert Manifest(tmp_path / "a.jsonl").digest == same
    assert digest(rows[0].replace("/one/x", "/two"), rows[1]) == same  # the clips were moved
    different = [rows[::-1], rows[:1], [*rows, rows[1]], [rows[0], rows[1].replace("1", "2")]]
    different += [[rows[0].replace(*change), rows[1]] for change in (("a.wav", "c.wav"), ("n/", "m/"), ('"a"', '"c"'))]
    assert len({same, *(digest(*lines) for lines in different)}) == 1 + len(different)
    # a row without an id is called by its path, and masks are drawn by that
    assert len({digest(f'{{"audio": "/{folder}/a.wav"}}') for folder in ("one", "two")}) == 2


def test_a_clip_is_told_by_its_id_its_files_and_its_part_of_them(tmp_path: Path) -> None:
    def identities(rows: list[dict[str, Any]], folder: str = "a") -> list[str]:
        write_manifest(tmp_path / folder / "m.jsonl", rows)
        return list(Manifest(tmp_path / folder / "m.jsonl").identities())

    def clip(folder: str = "a", **other: Any) -> dict[str, Any]:
        return {"id": "1", "audio": str(tmp_path / folder / "x" / "1.wav"), "seconds": 2.0, **other}

    [same] = identities([clip()])
    assert identities([clip("b")], "b") == [same]  # moved, with what lies below it
    assert identities([clip(text="two", label="n", speaker=3)]) == [same]
    parts = [clip(start=0.5), clip(start=0.5, duration=1.0), clip(offset=512, size=9), clip(seconds=2.5), clip(id="2")]
    files = [clip(audio=str(tmp_path / "a" / name)) for name in ("y/1.wav", "x/2.wav")]
    several = [clip(audio=[clip()["audio"], {"path": clip()["audio"], "start": 0.5}]), clip(image="/e/1.png")]
    assert len({same, *identities([*parts, *files, *several])}) == 10
    # elsewhere it is the same file wherever that is
    assert len(set(identities([clip(audio=f"{where}/1.wav") for where in ("/e", "/f/g")]))) == 1


# writing


def test_what_is_written_is_read_back_and_the_folder_can_move(tmp_path: Path) -> None:
    rows = [
        {"id": "ü", "audio": str(tmp_path / "set" / "clips" / "a.wav"), "seconds": 1.5},
        {"id": "b", "audio": [{"path": str(tmp_path / "set" / "b.tar"), "offset": 3}], "image": "/elsewhere/b.png"},
    ]
    assert write_manifest(tmp_path / "set" / "a.jsonl", rows) == 2
    (tmp_path / "set").rename(tmp_path / "moved")
    first, second = Manifest(tmp_path / "moved" / "a.jsonl")
    assert first == {**rows[0], "audio": str(tmp_path / "moved" / "clips" / "a.wav")}
    assert second == {**rows[1], "audio": [{"path": str(tmp_path / "moved" / "b.tar"), "offset": 3}]}
    assert "ü" in (tmp_path / "moved" / "a.jsonl").read_text(encoding="utf-8")


def test_paths_are_written_as_they_are_seen_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = [tmp_path / "here.wav", tmp_path / "lists" / "inside.wav"]
    (tmp_path / "lists").mkdir()
    for path in make:
        path.write_text(path.name)
    monkeypatch.chdir(tmp_path)
    write_manifest("lists/a.jsonl", [{"audio": "here.wav"}, {"audio": ["lists/inside.wav", "./lists/../here.wav"]}])
    assert json.loads((tmp_path / "lists/a.jsonl").read_text().splitlines()[1])["audio"][0] == "inside.wav"
    # what a manifest gives, another one can be written of
    (tmp_path / "other").mkdir()
    write_manifest("other/b.jsonl", Manifest("lists/a.jsonl"))
    monkeypatch.chdir(tmp_path / "other")
    first, second = (row["audio"] for row in Manifest("b.jsonl"))
    assert Path(first).read_text() == "here.wav"
    assert [Path(path).read_text() for path in second] == ["inside.wav", "here.wav"]


def test_a_full_disk_is_named_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.jsonl'"):
        write_manifest(tmp_path / "a.jsonl", [{"audio": "a.wav"}])
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"id": "old"}')

    def rows() -> Any:
        yield {"id": "new"}
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_manifest(path, rows())
    assert list(Manifest(path).values("id")) == ["old"]
    with pytest.raises(ValueError, match="no rows to write"):
        write_manifest(path, [])
    assert list(Manifest(path).values("id")) == ["old"]


def test_rows_are_split_by_their_split_or_by_shares() -> None:
    rows = [{"id": str(i), "speaker": str(i % 10), "split": "train" if i < 70 else "test"} for i in range(100)]
    assert {name: len(part) for name, part in split_rows(rows).items()} == {"train": 70, "test": 30}
    many = [{"id": str(i), "split": "old"} for i in range(2000)]
    parts = split_rows(many, shares={"train": 0.8, "valid": 0.1, "test": 0.1})
    assert sum(map(len, parts.values())) == 2000
    assert 1500 < len(parts["train"]) < 1700
    assert 140 < len(parts["valid"]) < 260
    assert {row["split"] for row in parts["valid"]} == {"valid"}
    fewer = split_rows(many[::2], shares={"train": 0.8, "valid": 0.1, "test": 0.1})
    assert all(row in parts[name] for name, part in fewer.items() for row in part)
    voices = split_rows(rows, shares={"train": 0.5, "test": 0.5}, by="speaker")
    sides = [{row["speaker"] for row in part} for part in voices.values()]
    assert len(sides) == 2
    assert not sides[0] & sides[1]


def test_parts_of_a_file_stay_on_one_side_where_the_file_would_be() -> None:
    shares = {"train": 0.5, "test": 0.5}
    files = split_rows([{"id": f"{i}.wav"} for i in range(20)], shares=shares)
    places: dict[str, dict[str, float]] = {
        "@0+2.5": {"start": 0.0, "duration": 2.5},
        "@0+4": {"start": 0.0, "duration": 4.0},
        "@36000.125": {"start": 36000.125},
    }
    parts = [{"id": f"{i}.wav{end}", **place} for i in range(20) for end, place in places.items()]
    for name, found in split_rows(parts, shares=shares).items():
        assert {row["id"].partition("@")[0] for row in found} == {row["id"] for row in files[name]}
        assert len(found) == 3 * len(files[name])


def test_the_captions_of_a_picture_stay_on_one_side() -> None:
    rows = [{"id": f"{n}.png" + (f"#{k}" if k > 1 else ""), "text": str(k)} for n in range(40) for k in (1, 2, 3)]
    rows.append({"id": "a.wav#512"})  # of a file that is no other's
    found = split_rows(rows, shares={"train": 0.5, "test": 0.5})
    sides = [{row["id"].partition("#")[0] for row in part} for part in found.values()]
    assert len(sides) == 2
    assert not sides[0] & sides[1]
    assert sum(map(len, found.values())) == 121


def test_splits_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to 0.9, not to 1"):
        split_rows([{"id": "a"}], shares={"train": 0.9})
    with pytest.raises(ValueError, match="the row of a has no 'split'"):
        split_rows([{"id": "a"}])
    with pytest.raises(ValueError, match="the row of a has no 'speaker'"):
        split_rows([{"id": "a"}], shares={"train": 1.0}, by="speaker")


def test_a_slice_of_a_shard_that_is_gone_or_short_is_a_bad_clip(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", "0123456789")
    assert read_slice(str(path), 3, 4).read() == b"3456"
    assert read_slice(str(path), 8, None).read() == b"89"
    with pytest.raises(BadClip, match="ends before byte 12, where the clip at byte 8 should end"):
        read_slice(str(path), 8, 4)
    with pytest.raises(BadClip, match="no such file"):
        read_slice(str(tmp_path / "b.tar"), 0, 1)
