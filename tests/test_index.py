"""An index on disk, and what is found in it: the same as by comparing with every vector oneself."""

import json
import shlex
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmssl
from mmssl import index as room
from mmssl.assemble import train
from mmssl.cli import app
from mmssl.data.manifest import Manifest, read_slice, write_manifest
from mmssl.index import Index
from mmssl.store import write_embeddings
from mmssl.types import BadClip

faiss = pytest.importorskip("faiss", reason="an index takes faiss: pip install mmssl[ann]")

RECIPE = """# toy
modality:
  image:
    frontend: {name: patches, size: [4, 4], mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
    positions: {name: sincos}
    encoder: {prefix: 1}
  text:
    frontend: {name: tokens, context: 12}
    positions: {name: learned, grid: [12]}
backbone: separate
tokenizer: {name: byte_bpe, entries: 300}
transformer: {dim: 16, depth: 1, heads: 2}
objective: {name: clip, dim: 8, pool: {image: class, text: last}}
data: {train: rows.jsonl, batch_size: 4}
optimizer: {lr: 0.003}
schedule: {name: constant}
trainer: {steps: 2, log_every: 1, device: cpu, threads: 1}
"""
WORDS = ["red heart", "blue box", "green tree", "white moon", "black cat", "red box", "old boat"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures with captions, of which the fourth cannot be read, a run on the others, and its index."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for n, words in enumerate(WORDS):
        path = folder / f"{n}.png"
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
        rows.append({"id": f"picture {n}", "image": str(path), "text": words, "label": n % 2})
    write_manifest(folder / "rows.jsonl", rows[:3] + rows[4:])
    write_manifest(folder / "all.jsonl", rows)
    (folder / "3.png").write_bytes(b"rubbish")
    (folder / "toy.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        train("toy.yaml", "run")
    write_embeddings(
        mmssl.load(folder / "run", device="cpu"), folder / "all.jsonl", folder / "i", modality="image", index=True
    )
    return folder


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def cli(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.output


def test_a_sentence_finds_what_lies_nearest_in_the_joint_space(folder: Path) -> None:
    encoder = mmssl.load("run", device="cpu")
    pictures = encoder.embed("rows.jsonl", modality="image").scene
    for query, modality in (("an old boat", "text"), ("2.png", "image")):
        similarity = pictures @ encoder.embed([query], modality=modality).scene[0]
        hits = Index("i", device="cpu").search(query, k=4)
        order = similarity.argsort(descending=True)[:4]
        assert [hit.row["id"] for hit in hits] == [Manifest("rows.jsonl")[int(place)]["id"] for place in order]
        assert [hit.score for hit in hits] == pytest.approx(similarity[order].tolist(), abs=1e-5)
    assert hits[0].score == pytest.approx(1)
    assert hits[0].row == Manifest(folder / "rows.jsonl")[2]
    assert len(Index("i", device="cpu").search("a boat", k=100)) == 6


def test_windows_of_the_clips_are_none_for_a_query_without_time(folder: Path, tmp_path: Path) -> None:
    shutil.copytree("i", tmp_path / "i")
    about = json.loads((tmp_path / "i" / "index.json").read_text())
    (tmp_path / "i" / "index.json").write_text(json.dumps({**about, "window": 1.0, "overlap": 0.2}))
    assert [hit.row["id"] for hit in Index(tmp_path / "i").search("red heart", k=2)] == [
        hit.row["id"] for hit in Index("i").search("red heart", k=2)
    ]


def test_an_index_is_plain_files(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "i").iterdir()) == [
        "bad.jsonl",
        "clips.jsonl",
        "index.json",
        "vectors.000.faiss",
    ]
    assert [row["text"] for row in Manifest("i/clips.jsonl")] == WORDS[:3] + WORDS[4:]
    [bad] = [json.loads(line) for line in (folder / "i" / "bad.jsonl").read_text().splitlines()]
    assert bad["id"] == "picture 3"
    assert "3.png" in bad["error"] or "picture" in bad["error"]
    about = json.loads((folder / "i" / "index.json").read_text())
    assert about["encoder"] == str(folder / "run")
    assert (about["modality"], about["pool"], about["clips"]) == ("image", "joint", 6)
    vectors = faiss.read_index("i/vectors.000.faiss")
    assert np.linalg.norm(vectors.reconstruct_n(0, 6), axis=1) == pytest.approx(np.ones(6), abs=1e-6)


def test_vectors_in_several_files_are_found_as_in_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SHARD_VALUES", 8)  # one clip of width 8
    encoder = mmssl.load("run", device="cpu")
    write_embeddings(encoder, "all.jsonl", "parted", modality="image", index=True, batch_size=1)
    assert len(list(Path("parted").glob("*.faiss"))) == 4
    whole, parted = (Index(name, device="cpu").search("black cat", k=6) for name in ("i", "parted"))
    assert [hit.row for hit in parted] == [hit.row for hit in whole]
    assert [hit.score for hit in parted] == pytest.approx([hit.score for hit in whole], abs=1e-5)


def test_captions_are_found_by_a_picture_and_files_without_a_manifest_by_a_file(folder: Path) -> None:
    encoder = mmssl.load("run", device="cpu")
    write_embeddings(encoder, WORDS, "words", modality="text", index=True)
    similarity = encoder.embed(WORDS, modality="text").scene @ encoder.embed("1.png", modality="image").scene[0]
    [hit] = Index("words", device="cpu").search("1.png", k=1)
    assert hit.row == {"id": WORDS[int(similarity.argmax())], "text": WORDS[int(similarity.argmax())]}
    # by the mean of tokens, which is no joint space: pictures still find pictures
    write_embeddings(encoder, ["0.png", "1.png"], "plain", modality="image", index=True, pool="mean")
    [hit] = Index("plain", device="cpu").search("1.png", k=1)
    assert hit.row == {"id": "1.png", "image": str(folder / "1.png")}
    assert hit.score == pytest.approx(1)
    with pytest.raises(ValueError, match=r"plain: its vectors \(pool mean, layer -1\) are of no space that image"):
        Index("plain", device="cpu").search("a heart")


def test_a_query_without_a_vector_finds_nothing_and_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index("i", device="cpu")
    monkeypatch.setattr(index.embedder.encoder["image"].frontend.project.bias, "data", torch.full((16,), torch.inf))
    with pytest.raises(BadClip, match="1.png: its vector is not finite"):
        index.search("1.png")


def test_a_job_of_several_processes_that_was_cut_off_gives_the_same_index(folder: Path) -> None:
    code, said = cli("embed", "run", "all.jsonl", "--modality", "image", "--index", "shared", "--part", "2/2")
    assert code == 0
    assert "shared: part 2/2 is done, and others are not yet" in said
    assert cli("search", "shared", "a cat") == (
        2,
        "mmssl: shared: no index; `mmssl embed MODEL CLIPS --index shared` writes one\n",
    )
    code, said = cli("embed", "run", "all.jsonl", "--modality", "image", "--index", "shared")
    assert code == 0
    assert "shared: 6 clips, 1 could not be read, width 8, layer -1" in said
    assert not list(Path().glob("shared.*"))
    for name in ("clips.jsonl", "bad.jsonl"):
        assert Path("shared", name).read_bytes() == Path("i", name).read_bytes()
    mine, whole = (faiss.read_index(f"{name}/vectors.000.faiss").reconstruct_n(0, 6) for name in ("shared", "i"))
    assert mine == pytest.approx(whole, abs=1e-5)
    # and the same command writes it anew
    assert cli("embed", "run", "0.png", "--modality", "image", "--index", "shared")[0] == 0
    assert len(Manifest("shared/clips.jsonl")) == 1


def test_the_command_prints_lines_and_json(folder: Path) -> None:
    code, lines = cli("search", "i", "0.png", "-k", 2)
    assert code == 0
    assert lines.splitlines()[0] == " 1.0000  picture 0  red heart  0"
    code, text = cli("search", "i", "0.png", "-k", 2, "--json")
    first, second = json.loads(text)
    assert first == {"score": 1.0, **Manifest(folder / "rows.jsonl")[0]}
    assert second["score"] < 1
    code, text = cli("search", "i", "0.png", "--modality", "text", "--json")  # as a sentence
    assert json.loads(text)[0]["score"] < 1


def test_what_does_not_fit_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    for arguments, sentence in (
        (["nowhere", "a heart"], "nowhere: no index; `mmssl embed MODEL CLIPS --index nowhere` writes one"),
        (["i", "hart.png"], "hart.png: no such file; for these words as a sentence, add --modality text"),
        (["i", "hart.png", "--modality", "image"], "hart.png: no such file"),
        (["i", "toy.yaml"], "toy.yaml: is no file of image or text by its name; say what it is by --modality"),
        (["i", "3.png"], "3.png: "),
        (["i", " "], "the query is empty; give a sentence or a file"),
        (["i", "a heart", "-k", "0"], "k=0: must be at least 1"),
        (["i", "a heart", "--modality", "sound"], "modality='sound': "),
        (["i", "a heart", "--model", "nowhere"], "nowhere: no such folder"),
    ):
        code, said = cli("search", *arguments)
        assert (code, said.count("\n"), said.startswith(f"mmssl: {sentence}")) == (2, 1, True), said
    with pytest.raises(BadClip):
        Index("i", device="cpu").search("3.png")

    Path("notes").mkdir()
    Path("notes/thesis.tex").touch()
    encoder = mmssl.load("run", device="cpu")
    with pytest.raises(ValueError, match="notes: is there already and is no index; give a new folder"):
        write_embeddings(encoder, "0.png", "notes", modality="image", index=True)
    for settings in ({"tokens": True}, {"layers": [0, 1]}):
        with pytest.raises(ValueError, match="an index has one vector a clip"):
            write_embeddings(encoder, "0.png", "new", modality="image", index=True, **settings)
    assert (
        cli("embed", "run", "0.png", "--out", "a", "--index", "b")[1] == "mmssl: --out a, --index b: give one of them\n"
    )


def test_an_index_of_other_weights_or_a_damaged_one_is_refused(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree("i", moved)
    about = json.loads((moved / "index.json").read_text())
    (moved / "index.json").write_text(json.dumps({**about, "encoder": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match="gone: no such folder.*was written by it: say where it is now by --model"):
        Index(moved, device="cpu")
    assert len(Index(moved, model="run", device="cpu")) == 6

    # the encoders are the same, and the way into their common space is not
    shutil.copytree("run", tmp_path / "other")
    from mmssl.training.checkpoint import read_tensors, write_tensors

    head = read_tensors(tmp_path / "other" / "objective.safetensors")
    head["project.text.weight"][0, 0] += 0.1
    write_tensors(tmp_path / "other" / "objective.safetensors", head)
    with pytest.raises(
        ValueError, match="moved: was written by another encoder than .*other holds now; embed the clips"
    ):
        Index(moved, model=tmp_path / "other", device="cpu")

    vectors = moved / "vectors.000.faiss"
    vectors.write_bytes(vectors.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"vectors\.000\.faiss: cannot be read \(.*\); write the index again"):
        Index(moved, model="run", device="cpu")
    shutil.copy("i/vectors.000.faiss", vectors)
    lines = (moved / "clips.jsonl").read_text().splitlines(keepends=True)
    (moved / "clips.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(
        ValueError, match="moved: holds 6 vectors of 5 clips, and index.json says 6; write the index again"
    ):
        Index(moved, model="run", device="cpu")
    (moved / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="is not of an index of this version"):
        Index(moved)


def test_without_faiss_it_is_said_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"x: an index takes faiss: pip install mmssl\[ann\]"):
        write_embeddings(mmssl.load("run", device="cpu"), "0.png", "x", modality="image", index=True)
    with pytest.raises(ValueError, match=r"i: an index takes faiss: pip install mmssl\[ann\]"):
        Index("i")


def test_an_encoder_of_pictures_alone_finds_like_by_like(folder: Path) -> None:
    from mmssl.build import build_encoder
    from mmssl.training.checkpoint import export_encoder

    config: dict[str, Any] = {
        "format": 1,
        "modality": "image",
        "frontend": {"name": "patches", "size": [4, 4], "mean": [0.5] * 3, "std": [0.5] * 3},
        "positions": {"name": "sincos"},
        "transformer": {"dim": 16, "depth": 1, "heads": 2},
        "encoder": {},
        "augment_eval": [],
        "objective": None,
        "classes": None,
        "vocabulary": None,
    }
    torch.manual_seed(0)
    export_encoder(Path("alone"), build_encoder(config), config)
    assert cli("embed", "alone", "rows.jsonl", "--index", "alone.index")[0] == 0
    assert cli("search", "alone.index", "4.png", "-k", 1) == (0, " 1.0000  picture 4  black cat  0\n")
    assert cli("search", "alone.index", "a cat")[1] == (
        f"mmssl: a cat: no such file, and {folder / 'alone'} has no encoder of text that would read it as a sentence\n"
    )


def test_what_is_found_in_a_shard_can_be_read_where_it_lies(folder: Path) -> None:
    with tarfile.open("shard.tar", "w") as shard:
        for n in (0, 1, 2):
            shard.add(f"{n}.png")
    write_embeddings(mmssl.load("run", device="cpu"), "shard.tar", "tarred", modality="image", index=True)
    [hit] = Index("tarred", device="cpu").search("1.png", k=1)
    assert hit.row["id"] == "shard.tar#1.png"
    place = hit.row["image"]
    assert read_slice(place["path"], place["offset"], place["size"]).read() == Path("1.png").read_bytes()
    # and the manifest of an index is one like any other
    assert cli("embed", "run", "tarred/clips.jsonl", "--modality", "image", "--index", "again")[0] == 0
    assert Index("again", device="cpu").search("1.png", k=1)[0].score == pytest.approx(1)


def test_from_a_folder_with_captions_to_a_search_as_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of the README's section, word for word, but for the size of what is trained."""
    monkeypatch.chdir(tmp_path)
    Path("pictures/flags").mkdir(parents=True)
    rng = np.random.default_rng(0)
    colors = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
    for n in range(12):
        name = list(colors)[n % 3]
        picture = np.clip(np.array(colors[name]) + rng.normal(0, 12, (16, 16, 3)), 0, 255).astype(np.uint8)
        path = Path("pictures", "flags" if n % 2 else "", f"{n}.png")
        Image.fromarray(picture).save(path)
        path.with_suffix(".txt").write_text(f"a {name} picture\n")
    Image.fromarray(picture).save("pictures/untold.png")
    Image.fromarray(np.full((16, 16, 3), colors["red"], np.uint8)).save("drawing.png")
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    lines = readme.partition("\n## Several modalities\n")[2].partition("```\n")[2].partition("```")[0].splitlines()
    smaller = ["modality.image.frontend.size=[8, 8]", "transformer.dim=48", "transformer.depth=1"]
    smaller += ["tokenizer.entries=300", "trainer.steps=30", "trainer.precision=float32"]
    smaller += ["trainer.eval_every=30", "trainer.device=cpu", "trainer.threads=1", "trainer.log_every=30"]
    said = []
    for line in lines:
        command, *arguments = shlex.split(line, comments=True)[1:]
        code, output = cli(command, *arguments, *(smaller if command == "pretrain" else []))
        assert code == 0, output
        said.append(output)
    assert "pictures.jsonl: 12 clips, 12 with text" in said[0]
    assert "left out: untold.png: there is no text of this name beside it" in said[0]
    [sentence, like] = said[-2:]
    assert all("a red picture" in line for line in sentence.splitlines()[:2]), sentence
    assert all("a red picture" in hit["text"] for hit in json.loads(like)[:2]), like
