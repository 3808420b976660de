"""A folder becomes the rows of a manifest without losing a file: what is left out is named."""

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mmssl.data.manifest import Manifest, read_slice, write_manifest
from mmssl.data.scan import ScanResult, read_table, scan
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
