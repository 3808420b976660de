"""A folder becomes the rows of a manifest without losing a file: what is left out is named."""

import errno
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mmssl.data.manifest import Manifest, read_slice, write_manifest
from mmssl.data.scan import ScanResult, pair, read_table, scan, tar_members
from mmssl.types import BadClip


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


def probe(source: Any) -> dict[str, Any]:
    """A clip is a text file that says its seconds."""
    try:
        content = source.read() if isinstance(source, io.BytesIO) else Path(source).read_bytes()
        return {"seconds": float(content), "rate": 8}
    except (OSError, ValueError) as error:
        raise BadClip(source, str(error)) from None


def look(folder: Path, **settings: Any) -> ScanResult:
    return scan(folder, media="audio", probe=probe, suffixes={".wav"}, progress=False, **settings)


def make(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_a_folder_gives_a_row_for_each_clip_and_names_the_rest(tmp_path: Path) -> None:
    make(tmp_path, {"b/2.wav": "2.5", "a/1.WAV": "1.25", "a/bad.wav": "x", "a/notes.txt": "", ".hidden/3.wav": "1"})
    result = look(tmp_path)
    assert result.rows == [
        {"id": "a/1.WAV", "audio": str(tmp_path / "a/1.WAV"), "seconds": 1.25, "rate": 8},
        {"id": "b/2.wav", "audio": str(tmp_path / "b/2.wav"), "seconds": 2.5, "rate": 8},
    ]
    assert [path for path, _ in result.bad] == [str(tmp_path / "a/bad.wav")]
    assert "could not convert" in result.bad[0][1]
    assert result.ignored == {".txt": 1}


@pytest.mark.parametrize("tarred", [False, True])
def test_what_was_passed_over_is_counted_but_for_what_speaks_of_a_clip(tmp_path: Path, tarred: bool) -> None:
    files = {"1.wav": "1", "1.txt": "a word", "1.json": "{}", "2.wav": "2", "alone.txt": "", "3.mp4": "", "4.mp4": ""}
    make(tmp_path / "in", files)
    if tarred:
        with tarfile.open(tmp_path / "a.tar", "w") as shard:
            for name in files:
                shard.add(tmp_path / "in" / name, name)
    found = look(tmp_path, tars=[tmp_path / "a.tar"]) if tarred else look(tmp_path / "in")
    assert len(found.rows) == 2
    assert found.ignored == {".txt": 1, ".mp4": 2}
    # of what a pair is looked for in, only what none of its members is
    shown = scan(tmp_path / "in", media="video", probe=lambda source: {}, suffixes={".mp4"}, progress=False)
    both = pair({"audio": found, "video": shown}, {"audio": (), "video": ()}, text=False)
    assert both.ignored == {".txt": 1}


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, {"a/1.wav": "1", "a/1.txt": "", "b/2.wav": "2"})
    scandir = os.scandir

    def denied(path: str) -> Any:
        if str(path) == str(tmp_path / "b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    named = [(str(tmp_path / "b"), "the folder cannot be read (permission denied)")]
    sounds = look(tmp_path)
    assert [row["id"] for row in sounds.rows] == ["a/1.wav"]
    assert sounds.bad == named
    assert look(tmp_path / "b").bad == named  # and not: no audio file here
    texts = scan(tmp_path, media="image", probe=lambda path: {}, suffixes={".txt"}, progress=False)
    assert pair({"audio": sounds, "image": texts}, {"audio": (), "image": ()}, text=False).bad == named


def test_the_order_of_rows_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    make(tmp_path, {f"{i:03}.wav": "1" for i in range(100)})
    assert look(tmp_path, workers=1).rows == look(tmp_path, workers=7).rows


def test_labels_splits_and_texts_come_from_folder_names(tmp_path: Path) -> None:
    make(tmp_path, {"train/cat/x/1.wav": "1", "test/dog/y/2.wav": "1", "test/3.wav": "1"})
    result = look(tmp_path, split_from=1, label_from=2, text_from=-1)
    assert [(row["split"], row["label"], row["text"]) for row in result.rows] == [
        ("test", "dog", "y"),
        ("train", "cat", "x"),
    ]
    assert result.bad == [
        (str(tmp_path / "test/3.wav"), "has no folder of level 2 to take its label from (its folders: ['test'])")
    ]
    rows = look(tmp_path, keys_from={"speaker": -1, "room": 1}).rows
    assert [(row["speaker"], row["room"]) for row in rows] == [("test", "test"), ("y", "test"), ("x", "train")]


def test_a_tar_is_read_in_place(tmp_path: Path) -> None:
    make(tmp_path, {"in/cat/1.wav": "1.5", "in/cat/2.wav": "bad", "in/readme.txt": ""})
    (tmp_path / "out").mkdir()
    with tarfile.open(tmp_path / "out" / "a.tar", "w") as shard:
        shard.add(tmp_path / "in", arcname=".")
    (tmp_path / "out" / "b.tar").write_bytes(b"rubbish")
    result = look(tmp_path / "out", label_from=-1)
    (row,) = result.rows
    assert row["id"] == "cat/1.wav"
    assert row["label"] == "cat"
    assert read_slice(row["audio"], row["offset"], row["size"]).read() == b"1.5"
    assert sorted(Path(path).name for path, _ in result.bad) == ["2.wav", "b.tar"]
    assert result.ignored == {".txt": 1}


def test_links_in_a_tar_are_the_files_that_they_name(tmp_path: Path) -> None:
    make(tmp_path, {"in/1.wav": "1", "in/sub/4.wav": "4"})
    os.link(tmp_path / "in/1.wav", tmp_path / "in/2.wav")
    (tmp_path / "in/0.wav").symlink_to("sub/4.wav")
    (tmp_path / "in/gone.wav").symlink_to("nowhere.wav")
    (tmp_path / "out").mkdir()
    with tarfile.open(tmp_path / "out" / "a.tar", "w") as shard:
        shard.add(tmp_path / "in", arcname=".")
    said = {
        row["id"]: read_slice(row["audio"], row["offset"], row["size"]).read() for row in look(tmp_path / "out").rows
    }
    assert said == {"1.wav": b"1", "2.wav": b"1", "0.wav": b"4", "sub/4.wav": b"4"}


def test_a_table_says_what_is_known_and_what_is_missing(tmp_path: Path) -> None:
    make(tmp_path, {"x/1.wav": "1", "x/2.wav": "2", "x/3.wav": "x", "y/4.wav": "4", "y/dup.wav": "1", "x/dup.wav": "1"})
    tsv = write(
        tmp_path / "index.tsv",
        "path\tsentence\tspeaker\tnorm\tfold",
        'x/2.wav\tTwo "quoted.\ts1\ttwo\t7',  # a quote is a character like any other
        "1\tOne.\ts1\tone\t8",
        "5.wav\tFive.\ts1\tfive\t9",
        "x/3.wav\tThree.\ts1\tthree\t9",
        "dup.wav\tTwice.\ts1\ttwice\t9",
    )
    result = look(tmp_path, tsv=tsv)
    assert [(row["id"], row["text"], row["speaker"], row["seconds"]) for row in result.rows] == [
        ("x/2.wav", 'Two "quoted.', "s1", 2.0),
        ("x/1.wav", "One.", "s1", 1.0),
    ]
    assert [(Path(path).name, reason.split(": ")[-1].split(" ", 1)[-1]) for path, reason in result.bad[:2]] == [
        ("5.wav", f"names it, but there is no such file in {tmp_path}"),
        ("dup.wav", "names it, and 2 files have that name"),
    ]
    assert f"{tsv}:4 names it" in result.bad[0][1]
    assert len(result.bad) == 3
    assert result.unlisted == ["x/dup.wav", "y/4.wav", "y/dup.wav"]
    renamed = look(tmp_path, tsv=tsv, columns={"text": "norm", "split": "fold"})
    assert [(row["text"], row["split"]) for row in renamed.rows] == [("two", "7"), ("one", "8")]
    with pytest.raises(ValueError, match="no column 'nrm' for 'text'; the columns are path, sentence"):
        look(tmp_path, tsv=tsv, columns={"text": "nrm"})


def test_a_table_may_name_the_members_of_a_tar(tmp_path: Path) -> None:
    make(tmp_path, {"in/en/1.wav": "1.5"})
    (tmp_path / "out/sub").mkdir(parents=True)
    with tarfile.open(tmp_path / "out/sub/a.tar", "w") as shard:
        shard.add(tmp_path / "in", arcname="")
    tsv = write(tmp_path / "out" / "index.tsv", "file\tlabel", "en/1.wav\t7")
    (row,) = look(tmp_path / "out", tsv=tsv).rows
    assert (row["id"], row["label"], row["seconds"]) == ("sub/en/1.wav", "7", 1.5)


def test_a_table_may_cut_files_into_segments(tmp_path: Path) -> None:
    make(tmp_path, {"1.wav": "10"})
    tsv = write(tmp_path / "index.tsv", "file\tfrom\tlong", "1.wav\t2\t3.5", "1.wav\t9\t0", "1.wav\t2\tx")
    result = look(tmp_path, tsv=tsv, columns={"start": "from", "duration": "long"})
    (row,) = result.rows
    assert (row["start"], row["duration"], row["seconds"]) == (2.0, 3.5, 3.5)
    assert len(result.bad) == 2
    (row,) = look(tmp_path, tsv=write(tmp_path / "index.tsv", "file\tfrom", "1.wav\t4"), columns={"start": "from"}).rows
    assert row["seconds"] == 6.0


def test_each_part_of_a_file_has_an_id_of_its_own(tmp_path: Path) -> None:
    make(tmp_path, {"a/1.wav": "90000"})
    parts = ["0\t2", "0\t4.5", "70000.125\t2", "70000.25\t2"]
    tsv = write(tmp_path / "t.tsv", "file\tfrom\tlong\tname", *(f"1.wav\t{part}\tn{part[0]}" for part in parts))
    columns = {"start": "from", "duration": "long"}
    rows = look(tmp_path, tsv=tsv, columns=columns).rows
    ids = ["a/1.wav@0+2", "a/1.wav@0+4.5", "a/1.wav@70000.125+2", "a/1.wav@70000.25+2"]
    assert [row["id"] for row in rows] == ids
    # the same as without: what a manifest calls the parts by itself
    write_manifest(tmp_path / "m.jsonl", [{key: row[key] for key in row if key != "id"} for row in rows])
    assert list(Manifest(tmp_path / "m.jsonl").values("id")) == ids
    named = look(tmp_path, tsv=tsv, columns={**columns, "id": "name"}).rows
    assert [row["id"] for row in named] == ["n0", "n0", "n7", "n7"]  # as was asked for


def test_a_table_that_cannot_be_read_is_named_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index.tsv:3: 1 columns, but the first line names 2"):
        read_table(write(tmp_path / "index.tsv", "file\ttext", "a\tb", "c"))
    with pytest.raises(ValueError, match=r"index.tsv:2: not UTF-8"):
        read_table(write(tmp_path / "index.tsv", "file\ttext", b"a\t\xe4"))
    with pytest.raises(ValueError, match="empty"):
        read_table(write(tmp_path / "index.tsv"))
    with pytest.raises(ValueError, match="no such file"):
        read_table(tmp_path / "none.tsv")
    make(tmp_path, {"1.wav": "1"})
    with pytest.raises(ValueError, match="no column is called file, path, .* of a, b"):
        look(tmp_path, tsv=write(tmp_path / "index.tsv", "a\tb", "1.wav\tx"))
    with pytest.raises(ValueError, match="no such file"):
        look(tmp_path, tsv=tmp_path / "none.tsv")


def test_a_csv_may_quote(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.csv", "file,text", '1.wav,"well, yes"'))
    assert table == [(2, {"file": "1.wav", "text": "well, yes"})]


@pytest.mark.parametrize("root", [True, False])
def test_fairseq_tables_bring_their_transcripts(tmp_path: Path, root: bool) -> None:
    make(tmp_path, {"clips/x/1.wav": "1", "clips/2.wav": "2", "lists/a.ltr": "O N E | T W O |\nT W O |\n"})
    first = str(tmp_path / "clips") if root else "/nowhere/at/all"
    tsv = write(tmp_path / "lists" / "a.tsv", first, "x/1.wav\t16000", "2.wav\t32000", "")
    result = look(tmp_path / "clips", tsv=tsv)
    assert [(row["id"], row["text"], row["seconds"]) for row in result.rows] == [
        ("x/1.wav", "ONE TWO", 1.0),
        ("2.wav", "TWO", 2.0),
    ]
    write(tmp_path / "lists" / "a.wrd", "one two", "two")
    assert [row["text"] for row in look(tmp_path / "clips", tsv=tsv).rows] == ["one two", "two"]
    write(tmp_path / "lists" / "a.wrd", "one two")
    with pytest.raises(ValueError, match="1 transcripts for the 2 clips"):
        look(tmp_path / "clips", tsv=tsv)


def test_fairseq_tables_may_point_into_a_stored_archive(tmp_path: Path) -> None:
    make(tmp_path, {"a.zip": "xx1.5yy", "1.wav": "1"})
    tsv = write(tmp_path / "a.tsv", str(tmp_path), "a.zip:2:3\t16000")
    (row,) = look(tmp_path, tsv=tsv).rows
    assert (row["audio"], row["offset"], row["size"], row["seconds"]) == (str(tmp_path / "a.zip"), 2, 3, 1.5)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    make(tmp_path, {"a/1.wav": "1", "other/2.wav": "2"})
    (tmp_path / "a" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "other").symlink_to(tmp_path / "other")
    assert [row["id"] for row in look(tmp_path / "a").rows] == ["1.wav", "other/2.wav"]


def test_folders_without_clips_are_refused(tmp_path: Path) -> None:
    make(tmp_path, {"1.mp4": "", "2.mp4": ""})
    with pytest.raises(ValueError, match=r"no audio file here \(\.wav\); found 2 \.mp4"):
        look(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        look(tmp_path / "none")
    with pytest.raises(ValueError, match="media 'sound' is not among audio, image, video"):
        scan(tmp_path, media="sound", probe=probe, suffixes={".wav"})


def test_a_name_that_is_not_utf8_still_opens_its_file(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xe4.wav")
    Path(path).write_text("1.5")
    result = look(tmp_path)
    write_manifest(tmp_path / "a.jsonl", result.rows)
    assert Path(Manifest(tmp_path / "a.jsonl")[0]["audio"]).read_text() == "1.5"


def shard(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content.encode())
            tar.addfile(info, io.BytesIO(content.encode()))
    return path


NOTES = {
    "1.wav": "1.5",
    "1.txt": " a dog\n",
    "1.cls": "3",
    "2.left.wav": "2",
    "2.json": '{"Caption": "two cats", "label": "cat", "url": "x", "speaker": null}',
    "3.wav": "3",
    "3.json": '{"caption": "of the json"}',
    "3.txt": "of the text",
    "._1.wav": "1",
}


@pytest.mark.parametrize("layout", ["folder", "shard"])
def test_what_lies_beside_a_clip_says_more_of_it(tmp_path: Path, layout: str) -> None:
    if layout == "folder":
        make(tmp_path / "in", {f"sub/{name}": content for name, content in NOTES.items()})
    else:
        (tmp_path / "in").mkdir()
        shard(tmp_path / "in/000.tar", {f"./sub/{name}": content for name, content in NOTES.items()})
    result = look(tmp_path / "in", label_from=None)
    keys = ("id", "seconds", "text", "label", "speaker", "url")
    assert [[row.get(key) for key in keys] for row in result.rows] == [
        ["sub/1.wav", 1.5, "a dog", 3, None, None],
        ["sub/2.left.wav", 2.0, "two cats", "cat", None, None],
        ["sub/3.wav", 3.0, "of the text", None, None, None],
    ]
    assert look(tmp_path / "in", label_from=-1).rows[0]["label"] == "sub"  # as was asked for
    named = look(tmp_path / "in", columns={"source": "url"})
    assert [row.get("source") for row in named.rows] == [None, "x"]
    assert [reason for _, reason in named.bad] == [
        "sub/3.json beside it has no 'url' for 'source'; its keys are caption"
    ]
    write_manifest(tmp_path / "m.jsonl", result.rows)
    assert [row["text"] for row in Manifest(tmp_path / "m.jsonl")] == ["a dog", "two cats", "of the text"]


def test_a_note_that_cannot_be_read_leaves_its_clip_out(tmp_path: Path) -> None:
    make(tmp_path, {"1.wav": "1", "1.json": "[1]", "2.wav": "2", "2.json": "{", "3.wav": "3"})
    write(tmp_path / "3.txt", b"\xff\xfe")
    result = look(tmp_path)
    assert not result.rows
    assert [reason.partition(" (")[0] for _, reason in result.bad] == [
        "1.json beside it is no JSON object",
        "2.json beside it is no JSON",
        "3.txt beside it is not UTF-8",
    ]


def test_a_caption_is_a_text_whatever_json_makes_of_it(tmp_path: Path) -> None:
    captions = (("1", "1984"), ("2", '["a dog", "a cat"]'), ("3", "true"), ("4", '["a dog", 3]'), ("5", "[]"))
    for name, caption in captions:
        make(tmp_path, {f"{name}.wav": "1", f"{name}.json": f'{{"caption": {caption}}}'})
    result = look(tmp_path)
    assert [row["text"] for row in result.rows] == ["1984", ["a dog", "a cat"]]
    assert [reason for _, reason in result.bad] == [
        "3.json beside it has true for its 'caption', and a text is a string or a list of strings",
        """4.json beside it has ["a dog", 3] for its 'caption', and a text is a string or a list of strings""",
        "5.json beside it has [] for its 'caption', and a text is a string or a list of strings",
    ]


def test_columns_of_nothing_are_refused(tmp_path: Path) -> None:
    make(tmp_path, {"1.wav": "1", "1.txt": "a dog"})
    with pytest.raises(ValueError, match="columns text=sentence: .* has no .json beside a clip; give a table"):
        look(tmp_path, columns={"text": "sentence"})


def test_shards_may_be_named_one_by_one_and_a_torn_one_gives_what_it_has(tmp_path: Path) -> None:
    for n in range(3):
        shard(tmp_path / f"{n}.tar", {f"{n}a.wav": "1", f"{n}a.txt": f"clip {n}", f"{n}b.wav": "1"})
    content = (tmp_path / "2.tar").read_bytes()
    (tmp_path / "2.tar").write_bytes(content[: 512 * 5])  # after the header of its third member
    result = look(tmp_path, tars=[tmp_path / "1.tar", tmp_path / "2.tar"])
    assert [(row["id"], row.get("text")) for row in result.rows] == [
        ("1a.wav", "clip 1"),
        ("1b.wav", None),
        ("2a.wav", "clip 2"),
    ]
    assert [(Path(path).name, reason.partition(" (")[0]) for path, reason in result.bad] == [
        ("2.tar", "cannot be read as an uncompressed tar"),
        ("2.tar#2b.wav", "the file ends before byte 2561, where the clip at byte 2560 should end"),
    ]


# of three members, a header and a block each: within the third header, at it, and where the end should be
@pytest.mark.parametrize(("bytes_left", "members", "byte"), [(2148, 2, 2048), (2048, 2, 2048), (3072, 3, 3072)])
@pytest.mark.parametrize("more", [b"", b"x" * 512], ids=["cut off", "damaged"])
def test_a_shard_that_ends_without_the_end_of_a_tar_is_named(
    tmp_path: Path, bytes_left: int, members: int, byte: int, more: bytes
) -> None:
    shard(tmp_path / "0.tar", {f"{n}.wav": "1" for n in range(3)})
    whole = (tmp_path / "0.tar").read_bytes()
    assert len(list(tar_members(str(tmp_path / "0.tar")))) == 3
    (tmp_path / "0.tar").write_bytes(whole[:bytes_left] + more)
    result = look(tmp_path)
    assert [row["id"] for row in result.rows] == [f"{n}.wav" for n in range(members)]
    [(path, reason)] = result.bad
    assert path == str(tmp_path / "0.tar")
    assert reason.startswith(f"at byte {byte} comes neither another file nor the end of the tar: it was cut off or is")


def test_files_of_one_name_are_one_row(tmp_path: Path) -> None:
    files = {"1.wav": "1.5", "1.png": "2.5", "1.txt": "one", "2.wav": "2", "3.png": "3", "3.txt": "three"}
    make(tmp_path / "f", files)
    shard(tmp_path / "0.tar", files)
    for where in (tmp_path / "f", tmp_path):
        of = {} if where.name == "f" else {"tars": [tmp_path / "0.tar"]}
        found = {
            media: scan(where, media=media, probe=probe, suffixes={suffix}, progress=False, **of)
            for media, suffix in (("audio", ".wav"), ("image", ".png"))
        }
        result = pair(found, {"audio": (), "image": ["rate"]}, text=False)
        [row] = result.rows
        assert (row["id"], row["text"], row["seconds"]) == ("1", "one", 2.5)
        assert dict(result.bad) == {
            "2.wav": "there is no image of this name beside it",
            "3.png": "there is no audio of this name beside it",
        }
        write_manifest(tmp_path / "m.jsonl", result.rows)
        [row] = Manifest(tmp_path / "m.jsonl")
        if where.name == "f":
            assert row["audio"] == str(tmp_path / "f/1.wav")
            assert row["image"] == {"path": str(tmp_path / "f/1.png"), "rate": 8}
        else:
            assert read_slice(row["audio"]["path"], row["audio"]["offset"], row["audio"]["size"]).read() == b"1.5"
            assert row["image"].keys() == {"path", "offset", "size", "rate"}
        three = pair(found, {"audio": (), "image": ()}, text=True)
        assert [row["id"] for row in three.rows] == ["1", "3"]
        assert three.bad == [("2.wav", "there is no image or text of this name beside it")]


@pytest.mark.parametrize("layout", ["folder", "shard"])
def test_a_note_of_a_time_holds_for_each_member_that_has_one(tmp_path: Path, layout: str) -> None:
    files = {f"{n}{suffix}": "9" for n in (1, 2) for suffix in (".wav", ".mp4", ".png")}
    files |= {"1.json": '{"begin": 5.0, "length": 2.5}', "2.json": '{"begin": 0, "length": 1}'}
    if layout == "folder":
        make(tmp_path, files)
    else:
        shard(tmp_path / "0.tar", files)
    kinds = {"video": (".mp4", ["rate"]), "audio": (".wav", ()), "image": (".png", ())}
    found = {
        media: scan(
            tmp_path,
            media=media,
            probe=probe if media != "image" else lambda source: {"height": 8},
            suffixes={suffix},
            columns={"start": "begin", "duration": "length"},
            progress=False,
        )
        for media, (suffix, _) in kinds.items()
    }
    result = pair(found, {media: hints for media, (_, hints) in kinds.items()}, text=False)
    assert not result.bad
    write_manifest(tmp_path / "m.jsonl", result.rows)
    for row, name, time in zip(Manifest(tmp_path / "m.jsonl"), "12", [(5.0, 2.5), (0.0, 1.0)], strict=True):
        assert row["id"] == name
        assert row["seconds"] == time[1]
        assert not {"start", "duration"} & row.keys()
        for media in ("video", "audio"):
            assert (row[media]["start"], row[media]["duration"]) == time
        assert "start" not in row["image"]


def test_a_pair_needs_a_text_in_which_something_stands(tmp_path: Path) -> None:
    make(tmp_path, {"1.wav": "1", "1.txt": " \n", "2.wav": "2", "2.json": '{"text": ["", "two"]}', "3.wav": "3"})
    result = pair({"audio": look(tmp_path)}, {"audio": ()}, text=True)
    assert [(row["id"], row["text"]) for row in result.rows] == [("2.wav", ["two"])]
    assert result.bad == [("1.wav", "its text is empty"), ("3.wav", "there is no text of this name beside it")]
    # without a pair it is a clip like any other, whose transcript is empty
    assert [row.get("text") for row in look(tmp_path).rows] == ["", ["", "two"], None]


def test_a_file_that_a_table_names_again_is_another_clip(tmp_path: Path) -> None:
    make(tmp_path, {"1.wav": "1", "2.wav": "2"})
    table = write(tmp_path / "t.tsv", "file\ttext", "1.wav\tone", "2.wav\ttwo", "1.wav\ta one", "1.wav\tthe one")
    assert [row["id"] for row in look(tmp_path, tsv=table).rows] == ["1.wav", "2.wav", "1.wav#2", "1.wav#3"]


def test_names_that_come_twice_are_no_pair_and_equal_names_in_two_shards_are_two(tmp_path: Path) -> None:
    for n in range(2):
        shard(tmp_path / f"{n}.tar", {"1.left.wav": "1", "1.right.wav": "2", "1.png": "3"})
    found = {
        media: scan(tmp_path, media=media, probe=probe, suffixes={suffix}, progress=False)
        for media, suffix in (("audio", ".wav"), ("image", ".png"))
    }
    result = pair(found, {"audio": (), "image": ()}, text=False)
    assert [Path(row["audio"]["path"]).name for row in result.rows] == ["0.tar", "1.tar"]
    assert [row["id"] for row in result.rows] == ["0.tar/1", "1.tar/1"]
    assert result.bad == [
        (f"{n}.tar/1.right.wav", f"bears the name of {n}.tar/1.left.wav, and a pair has one audio") for n in range(2)
    ]


def test_clips_of_one_name_in_two_shards_have_an_id_each(tmp_path: Path) -> None:
    make(tmp_path, {"a/2.wav": "1"})
    shard(tmp_path / "0.tar", {"a/1.wav": "1", "a/2.wav": "1", "a/3.wav": "1"})
    shard(tmp_path / "1.tar", {"a/1.wav": "1"})
    rows = look(tmp_path, label_from=1).rows
    assert [row["id"] for row in rows] == ["0.tar/a/1.wav", "0.tar/a/2.wav", "a/3.wav", "1.tar/a/1.wav", "a/2.wav"]
    assert {row["label"] for row in rows} == {"a"}  # folders are counted as before
    # a table may name a clip twice
    write(tmp_path / "t.tsv", "file\ttext", "a/3.wav\tthree", "a/3.wav\tagain")
    assert [row["id"] for row in look(tmp_path, tsv=tmp_path / "t.tsv").rows] == ["a/3.wav", "a/3.wav#2"]


def test_a_name_that_only_one_media_has_in_two_shards_still_makes_a_pair(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", {"1.wav": "1", "1.png": "3"})
    shard(tmp_path / "1.tar", {"1.wav": "2"})
    found = {
        media: scan(tmp_path, media=media, probe=probe, suffixes={suffix}, progress=False)
        for media, suffix in (("audio", ".wav"), ("image", ".png"))
    }
    result = pair(found, {"audio": (), "image": ()}, text=False)
    assert [row["id"] for row in result.rows] == ["0.tar/1"]
    assert result.bad == [("1.tar/1.wav", "there is no image of this name beside it")]
