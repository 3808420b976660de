"""The scripts of data_manifests/ write what their READMEs say: on tiny sets of the same form, and on the real ones."""

import gzip
import importlib.util
import itertools
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmssl.data.dataset import ManifestDataset
from mmssl.data.manifest import Manifest, read_slice, write_manifest
from mmssl.data.scan import read_table
from mmssl.modalities.image.reader import read as read_image
from mmssl.modalities.speech.reader import probe
from mmssl.modalities.speech.reader import read as read_speech
from mmssl.modalities.video.reader import read as read_video
from mmssl.tasks.crossmodal import read_prompts

FOLDER = Path(__file__).parents[2] / "data_manifests"


def script(name: str, file: str = "write_manifest") -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{file}_{name}", FOLDER / name / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def speech(manifest: Path) -> ManifestDataset:
    return ManifestDataset(
        Manifest(manifest),
        media={"speech": "audio"},
        readers={"speech": lambda source, **part: read_speech(source, rate=8000, **part)},
        rates={"speech": 8000.0},
    )


def test_every_data_set_has_a_readme_and_a_script() -> None:
    folders = [path for path in FOLDER.iterdir() if path.is_dir()]
    assert len(folders) >= 4
    for folder in folders:
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert "* Licence: " in text
        assert "* Get it: " in text
        assert f"python data_manifests/{folder.name}/write_manifest.py" in text
        assert (folder / "write_manifest.py").is_file()


def test_emoji_are_pairs_by_style_and_split(tmp_path: Path) -> None:
    table = [
        ("a.png", "red heart", "heart; red", "Symbols", "heart", "red heart", "noto,twemoji", "train"),
        ("b.png", "blue box", "", "Objects", "box", "blue box", "noto,twemoji", "test"),
    ]
    names = ("file", "name", "keywords", "category", "subcategory", "concept", "styles", "split")
    (tmp_path / "index.tsv").write_text("".join("\t".join(line) + "\n" for line in (names, *table)))
    for style, color in (("noto", "red"), ("twemoji", "blue")):
        with tarfile.open(tmp_path / f"{style}.tar", "w") as shard:
            for file, *_ in table:
                Image.new("RGBA", (8, 8), color).save(tmp_path / file)
                shard.add(tmp_path / file, file)
                (tmp_path / file).unlink()
    script("emoji_text").main(tmp_path, tmp_path / "out")
    train = {row["id"]: row for row in Manifest(tmp_path / "out" / "train.jsonl")}
    assert {name: row["text"] for name, row in train.items()} == {
        "noto/a": "red heart",
        "noto/a#keywords": "heart, red",
        "twemoji/a": "red heart",
        "twemoji/a#keywords": "heart, red",
    }
    assert {row["name"] for row in train.values()} == {"red heart"}
    [row] = Manifest(tmp_path / "out" / "test_twemoji.jsonl")
    assert (row["id"], row["text"], row["label"]) == ("twemoji/b", "blue box", "Objects")
    clip = read_image(read_slice(row["image"], row["offset"], row["size"]))
    assert clip[:, 0, 0].tolist() == [0, 0, 1]


def test_the_real_emoji_have_as_many_rows_as_the_readme_says(data_root: Path, tmp_path: Path) -> None:
    if not (data_root / "emoji_text").is_dir():
        pytest.skip("no emoji_text in the data")
    script("emoji_text").main(data_root / "emoji_text", tmp_path)
    counts = {path.stem: len(Manifest(path)) for path in tmp_path.glob("*.jsonl")}
    assert counts == {
        "train": 6004,
        "valid": 186,
        "valid_noto": 93,
        "valid_twemoji": 93,
        "test": 540,
        "test_noto": 270,
        "test_twemoji": 270,
    }
    labels = {row["label"] for row in Manifest(tmp_path / "test.jsonl")}
    assert labels <= set(read_prompts(FOLDER / "emoji_text" / "categories.yaml"))


@pytest.mark.parametrize("tar", [False, True])
def test_fsdd_is_split_by_speaker_and_joined_to_strings(tmp_path: Path, tar: bool) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for digit, speaker, take in itertools.product((0, 7), ("theo", "george", "lucas", "nicolas"), range(4)):
        wave = np.full(80 * (take + 1), (digit + 1) / 10, np.float32)
        soundfile.write(clips / f"{digit}_{speaker}_{take}.wav", wave, 8000)
    if tar:
        with tarfile.open(tmp_path / "audio.tar", "w") as shard:
            shard.add(clips, arcname="")
        clips = tmp_path / "packed"
        clips.mkdir()
        (tmp_path / "audio.tar").rename(clips / "audio.tar")
    script("fsdd").main(clips, tmp_path / "out")
    train, valid, test = (list(Manifest(tmp_path / "out" / f"{name}.jsonl")) for name in ("train", "valid", "test"))
    assert [len(rows) for rows in (train, valid, test)] == [16, 8, 8]
    assert {row["speaker"] for row in train} == {"lucas", "nicolas"}
    assert {row["speaker"] for row in test} == {"theo"}
    assert {(row["label"], row["text"]) for row in valid} == {(0, "zero"), (7, "seven")}
    for split, passes in (("train", 3), ("valid", 1), ("test", 1)):
        dataset = speech(tmp_path / "out" / f"strings_{split}.jsonl")
        words = [row["text"].split() for row in dataset.manifest]
        assert all(2 <= len(text) <= 6 for text in words)
        assert sum(map(len, words)) == passes * len(speech(tmp_path / "out" / f"{split}.jsonl"))
        for place, row in enumerate(dataset.manifest):
            clip = dataset[place, 0].inputs["speech"]
            assert len(clip) == round(row["seconds"] * 8000)
            heard = [value for value, _ in itertools.groupby((clip * 10).round().int().tolist())]
            said = [{"zero": 1, "seven": 8}[word] for word, _ in itertools.groupby(row["text"].split())]
            assert heard == said


def test_asterisk_prompts_are_for_pretraining_and_for_ctc(tmp_path: Path) -> None:
    lines = ["file\tlanguage\tspeaker\tkind\thas_digits\tsplit\tseconds\ttext\tnorm"]
    for name, kind, digits, split, seconds in (
        ("en/a", "phrase", 0, "train", 1),
        ("en/b", "letter", 0, "train", 1),
        ("en/c", "phrase", 1, "train", 1),
        ("en/d", "phrase", 0, "train", 13),
        ("en/e", "number", 0, "test", 1),
        ("fr/a", "phrase", 0, "valid", 1),
    ):
        path = tmp_path / "in" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.zeros(80 * seconds), 80)
        lines.append(f"{name}.wav\t{name[:2]}\tA\t{kind}\t{digits}\t{split}\t{seconds}\tWell, {name}.\twell {name}")
    (tmp_path / "in" / "index.tsv").write_text("\n".join(lines))
    script("asterisk_prompts").main(tmp_path / "in", tmp_path / "out")
    ids = {path.stem: list(Manifest(path).values("id")) for path in (tmp_path / "out").glob("*.jsonl")}
    assert ids == {
        "pretrain_train": ["en/a.wav", "en/b.wav", "en/c.wav", "en/d.wav"],
        "pretrain_valid": ["fr/a.wav"],
        "en_train": ["en/a.wav"],
        "en_test": ["en/e.wav"],
        "fr_valid": ["fr/a.wav"],
    }
    assert Manifest(tmp_path / "out" / "en_train.jsonl")[0]["text"] == "well en/a"
    assert "text" not in Manifest(tmp_path / "out" / "pretrain_train.jsonl")[0]


def test_fashion_mnist_becomes_pictures_in_one_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (7, 28, 28), np.uint8), rng.integers(0, 10, 7).astype(np.uint8)

    def idx(name: str, values: np.ndarray) -> None:
        head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
        (tmp_path / name).write_bytes(gzip.compress(head + values.tobytes()))

    idx("train-images-idx3-ubyte.gz", images[:5])
    idx("train-labels-idx1-ubyte.gz", labels[:5])
    idx("t10k-images-idx3-ubyte.gz", images[5:])
    idx("t10k-labels-idx1-ubyte.gz", labels[5:])
    module = script("fashion_mnist")
    monkeypatch.setattr(module, "VALID", 2)
    module.main(tmp_path, tmp_path / "out")
    got, classes = [], []
    for split, count in (("train", 3), ("valid", 2), ("test", 2)):
        manifest = Manifest(tmp_path / "out" / f"{split}.jsonl")
        assert len(manifest) == count
        dataset = ManifestDataset(
            manifest, media={"image": "image"}, readers={"image": lambda source: read_image(source, channels=1)}
        )
        got += [dataset[place, 0].inputs["image"] for place in range(count)]
        classes += manifest.values("label")
    assert np.array_equal((torch.cat(got) * 255).round().byte().numpy(), images)
    assert classes == labels.tolist()
    idx("t10k-labels-idx1-ubyte.gz", labels[6:])
    with pytest.raises(ValueError, match="2 pictures but 1 labels for test"):
        module.main(tmp_path, tmp_path / "out")
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"rubbish"))
    with pytest.raises(ValueError, match="not an idx file of bytes"):
        module.read_idx(tmp_path / "x.gz")


def test_sign_digits_are_split_by_person(tmp_path: Path) -> None:
    for digit, number in ((0, 1118), (3, 1158), (4, 1169), (9, 5999)):
        path = tmp_path / "in" / str(digit) / f"IMG_{number}.JPG"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(path, "jpeg")
    script("sign_digits").main(tmp_path / "in", tmp_path / "out")
    rows = {path.stem: list(Manifest(path)) for path in (tmp_path / "out").glob("*.jsonl")}
    assert {name: [(row["id"], row["label"]) for row in part] for name, part in rows.items()} == {
        "train": [("IMG_1118", 0), ("IMG_5999", 9)],
        "valid": [("IMG_1158", 3)],
        "test": [("IMG_1169", 4)],
    }
    (tmp_path / "in" / "0" / "example.jpg").write_bytes((tmp_path / "in" / "0" / "IMG_1118.JPG").read_bytes())
    with pytest.raises(ValueError, match="0/example.jpg: expected DIGIT/IMG_NUMBER.jpg"):
        script("sign_digits").main(tmp_path / "in", tmp_path / "out")


def test_digit_pairs_join_each_digit_with_itself(tmp_path: Path) -> None:
    words = {0: "zero", 3: "three"}
    for split, digits in (("train", (0, 0, 0, 3)), ("valid", (0, 3)), ("test", (3, 0, 3))):
        signs = [
            {"id": f"{split}{n}", "image": f"{n}.tar", "offset": n, "size": 7, "label": digit}
            for n, digit in enumerate(digits)
        ]
        clips = [
            {"id": f"{digit}_{n}", "audio": f"{digit}_{n}.wav", "seconds": n / 10, "label": digit}
            | {"text": words[digit], "speaker": split}
            for digit in words
            for n in (1, 2)
        ]
        write_manifest(tmp_path / "signs" / f"{split}.jsonl", signs)
        write_manifest(tmp_path / "fsdd" / f"{split}.jsonl", clips)
    pairs = script("digit_pairs")
    pairs.main(tmp_path / "signs", tmp_path / "fsdd", tmp_path / "out", {"train": 5, "valid": 1, "test": 2})
    rows = list(Manifest(tmp_path / "out" / "train.jsonl"))
    assert [(row["id"], row["label"], row["text"]) for row in rows] == [
        (f"{digit}_{n:03}", digit, word) for digit, word in words.items() for n in range(5)
    ]
    for row in rows:
        # the only picture of a three is the fourth, and lies where its own row said
        assert (row["image"]["offset"] == 3) == (row["label"] == 3)
        assert row["image"]["size"] == 7
        assert Path(row["image"]["path"]).name == f"{row['image']['offset']}.tar"
        name = Path(row["audio"]["path"]).name
        assert name.startswith(f"{row['label']}_")
        assert row["seconds"] == int(name[2]) / 10
        assert "offset" not in row
        assert "offset" not in row["audio"]
    for key, names in (("image", 3), ("audio", 2)):
        used = [row[key]["path"] for row in rows if row["label"] == 0]
        assert len(set(used)) == names
        assert max(map(used.count, used)) - min(map(used.count, used)) <= 1
    again = tmp_path / "again"
    pairs.main(tmp_path / "signs", tmp_path / "fsdd", again, {"train": 5, "valid": 1, "test": 2})
    assert (again / "train.jsonl").read_text() == (tmp_path / "out" / "train.jsonl").read_text()
    write_manifest(tmp_path / "signs" / "valid.jsonl", signs[:1])
    with pytest.raises(ValueError, match="digit 0: one of the two sets has none in this split"):
        pairs.main(tmp_path / "signs", tmp_path / "fsdd", again, {"valid": 1})


@pytest.mark.data
def test_the_real_digit_pairs_are_of_people_on_one_side(data_root: Path, tmp_path: Path) -> None:
    script("sign_digits").main(data_root / "sign_digits", tmp_path / "signs")
    script("fsdd").main(data_root / "fsdd", tmp_path / "fsdd")
    script("digit_pairs").main(tmp_path / "signs", tmp_path / "fsdd", tmp_path)
    rows = {split: list(Manifest(tmp_path / f"{split}.jsonl")) for split in ("train", "valid", "test")}
    assert {split: len(part) for split, part in rows.items()} == {"train": 4000, "valid": 400, "test": 1000}
    assert {row["speaker"] for row in rows["test"]} == {"theo"}
    row = rows["test"][0]
    assert read_image(read_slice(**row["image"])).shape == (3, 100, 100)
    assert read_speech(read_slice(**row["audio"]), rate=8000).shape[0] == round(8000 * row["seconds"])


def test_esc10_leaves_out_one_fold_after_the_other(tmp_path: Path) -> None:
    for folder, fold in (("001 - Dog bark", 1), ("001 - Dog bark", 2), ("002 - Rain", 3), ("rain", 4), ("rain", 5)):
        path = tmp_path / "in" / folder / f"{fold}-{fold}00{fold}-A.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.zeros(800), 8000)
    script("esc10").main(tmp_path / "in", tmp_path / "out")
    tests = [list(Manifest(tmp_path / "out" / f"fold{fold}" / "test.jsonl")) for fold in range(1, 6)]
    assert [[(row["id"], row["label"], row["fold"]) for row in part] for part in tests] == [
        [("dog_bark/1-1001-A", "dog_bark", "1")],
        [("dog_bark/2-2002-A", "dog_bark", "2")],
        [("rain/3-3003-A", "rain", "3")],
        [("rain/4-4004-A", "rain", "4")],
        [("rain/5-5005-A", "rain", "5")],
    ]
    assert list(Manifest(tmp_path / "out" / "all.jsonl").values("fold")) == ["1", "2", "3", "4", "5"]
    train = Manifest(tmp_path / "out" / "fold2" / "train.jsonl")
    assert sorted(train.values("fold")) == ["1", "3", "4", "5"]
    soundfile.write(tmp_path / "in" / "rain" / "drops.wav", np.zeros(800), 8000)
    with pytest.raises(ValueError, match="rain/drops.wav: expected CLASS/FOLD-NUMBER-TAKE"):
        script("esc10").main(tmp_path / "in", tmp_path / "out")


def test_motion_is_told_by_no_frame_and_by_every_two(tmp_path: Path) -> None:
    motion = script("motion")
    motion.main(tmp_path, {"train": 16, "valid": 8, "test": 8})
    rows = list(Manifest(tmp_path / "train.jsonl"))
    assert len(rows) == 16
    assert sorted({row["label"] for row in rows}) == sorted(motion.DIRECTIONS)
    for number, name in enumerate(motion.DIRECTIONS):
        clip = motion.draw(number, np.random.default_rng([0, number])).astype(float)
        row = next(row for row in rows if row["id"] == f"train_{number:05}")
        assert row["label"] == name
        content = read_slice(row["video"], row["offset"], row["size"])
        stored = read_video(content, rate=8, channels=1)[0].numpy() * 255
        assert stored.shape == clip.shape
        assert np.abs(stored - clip).mean() < 4
        # where the second frame fits the first best, by the cross-correlation on the torus
        spectra = np.fft.fft2(clip[[0, 3]] - clip[[0, 3]].mean())
        peak = np.fft.ifft2(spectra[1] * spectra[0].conj()).real
        down, across = ((place + 16) % 32 - 16 for place in np.unravel_index(peak.argmax(), peak.shape))
        angle = 2 * np.pi * number / 8
        assert np.cos(np.arctan2(-down, across) - angle) > 0.9


def test_the_floor_of_motion_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("motion").main(tmp_path, {"train": 16, "valid": 8, "test": 8})
    capsys.readouterr()
    script("motion", "floor").main(tmp_path)
    scores = dict(line.split(": accuracy ") for line in capsys.readouterr().out.splitlines() if ": accuracy " in line)
    assert list(scores) == ["pixels of one frame", "amplitudes of one frame", "turns of phases between frames"]
    assert all("n = 8)" in score for score in scores.values())


def test_sample_videos_become_windows(tmp_path: Path, videos: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with tarfile.open(folder / "videos.tar", "w") as shard:
        shard.add(videos / "train" / "up" / "0.mp4", arcname="a.mp4")
        shard.add(videos / "test" / "up" / "6.mp4", arcname="b.mp4")
    (folder / "index.tsv").write_text("file\tsplit\tfps\na.mp4\ttrain\t8.0\nb.mp4\ttest\t8.0\n")
    for name, key in (("windows", "scene"), ("event_windows", "event")):
        lines = [f"file\tstart\tframes\t{key}\tsplit", "a.mp4\t4\t8\tone\ttrain", "b.mp4\t0\t8\ttwo\ttest"]
        (folder / f"{name}.tsv").write_text("\n".join(lines))
    script("sample_videos").main(folder, tmp_path / "out")
    rows = {path.stem: list(Manifest(path)) for path in (tmp_path / "out").glob("*.jsonl")}
    assert set(rows) == {"pretrain_train", "scene_train", "scene_test", "event_train", "event_test"}
    [window] = rows["scene_train"]
    assert (window["id"], window["start"], window["duration"], window["label"]) == ("a@4", 0.5, 1.0, "one")
    dataset = ManifestDataset(
        Manifest(tmp_path / "out" / "scene_train.jsonl"),
        media={"video": "video"},
        readers={"video": lambda source, **part: read_video(source, rate=8, **part)},
        rates={"video": 8.0},
        hints={"video": ("decoder",)},
    )
    whole = read_video(videos / "train" / "up" / "0.mp4", rate=8)
    assert torch.equal(dataset[0, 0].inputs["video"], whole[:, 4:12])


def test_sample_videos_with_sound_have_a_manifest_of_their_own(tmp_path: Path, videos: Path) -> None:
    folder = tmp_path / "in"
    (folder / "with_sound").mkdir(parents=True)
    with tarfile.open(folder / "videos.tar", "w") as shard:
        shard.add(videos / "train" / "up" / "0.mp4", arcname="a.mp4")
    (folder / "index.tsv").write_text("file\tsplit\tfps\na.mp4\ttrain\t8.0\n")
    for name, key in (("windows", "scene"), ("event_windows", "event")):
        (folder / f"{name}.tsv").write_text(f"file\tstart\tframes\t{key}\tsplit\na.mp4\t4\t8\tone\ttrain")
    with av.open(str(folder / "with_sound" / "heard.mp4"), "w") as container:
        seen, heard = container.add_stream("libx264", rate=8), container.add_stream("aac", rate=16_000)
        seen.width, seen.height, seen.pix_fmt = 32, 32, "yuv420p"
        wave = np.zeros((1, 16_000), np.float32)
        sound = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        sound.rate = 16_000
        container.mux(heard.encode(sound))
        for step in range(8):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32), np.uint8), format="gray").reformat(format="yuv420p")
            frame.pts = step
            container.mux(seen.encode(frame))
        container.mux([*seen.encode(), *heard.encode()])
    script("sample_videos").main(folder, tmp_path / "out")
    [row] = Manifest(tmp_path / "out" / "with_sound.jsonl")
    assert row["id"] == "with_sound/heard.mp4"
    assert row["audio"] == row["video"]
    assert [row["id"] for row in Manifest(tmp_path / "out" / "pretrain_train.jsonl")] == ["a"]


def index(root: Path, name: str) -> list[dict[str, str]]:
    return [row for _, row in read_table(root / name / "index.tsv")]


@pytest.mark.data
def test_the_splits_are_those_of_the_real_sets(data_root: Path) -> None:
    fsdd, signs = script("fsdd"), script("sign_digits")
    assert {row["fold"] for row in index(data_root, "esc10")} == set(script("esc10").FOLDS)
    for row in index(data_root, "fsdd"):
        assert fsdd.SPLITS.get(row["speaker"], "train") == row["speaker_split"]
        assert fsdd.WORDS[int(row["label"])] == row["text"]
    found = [signs.SPLITS.get(int(Path(row["file"]).stem[4:]), "train") for row in index(data_root, "sign_digits")]
    assert found == [row["split"] for row in index(data_root, "sign_digits")]


@pytest.mark.data
@pytest.mark.parametrize(("name", "rate"), [("fsdd", 8000), ("asterisk_prompts", 16000)])
def test_real_clips_are_as_long_as_their_index_says(data_root: Path, tmp_path: Path, name: str, rate: int) -> None:
    seconds = {row["file"]: float(row["seconds"]) for row in index(data_root, name)}
    rows: list[dict[str, Any]] = []
    with tarfile.open(data_root / name / "audio.tar") as shard:
        for member in itertools.islice(shard, 0, 60, 3):
            part = {"offset": member.offset_data, "size": member.size}
            rows.append({"id": member.name, "audio": shard.name, **part, "seconds": seconds[member.name]})
    write_manifest(tmp_path / "a.jsonl", rows)
    dataset = speech(tmp_path / "a.jsonl")
    with open(data_root / name / "audio.tar", "rb") as file:
        for place, row in enumerate(dataset.manifest):
            clip = dataset[place, 0].inputs["speech"]
            assert len(clip) / 8000 == pytest.approx(row["seconds"], abs=0.002)
            assert 0.01 < clip.abs().max() <= 1.05
            file.seek(row["offset"])
            (tmp_path / "clip").write_bytes(file.read(row["size"]))
            assert probe(tmp_path / "clip")["rate"] == rate
