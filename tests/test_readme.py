"""What the README says is true: its tree, its tour, its commands and its ten lines."""

import ast
import contextlib
import inspect
import io
import json
import math
import re
import shlex
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from mmssl.assemble import export_config
from mmssl.build import build_encoder
from mmssl.cli import app
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.matrix import ALONE, refusal
from mmssl.modalities import MODALITIES
from mmssl.objectives import CONTRASTING, OBJECTIVES
from mmssl.recipe import header, load, shipped
from mmssl.resolve import resolve
from mmssl.training.checkpoint import export_encoder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "recipes/README.md", "data_manifests/README.md"]


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a language, in order."""
    found: list[str] = []
    inside: str | None = None
    for line in text.splitlines(keepends=True):
        if line.startswith("```"):
            inside = line[3:].strip() if inside is None else None
            if inside == language:
                found.append("")
        elif inside == language:
            found[-1] += line
    return found


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def tree() -> dict[str, str]:
    """Path -> what the tree says of it."""
    found, folder = {}, ""
    lines = re.sub(r"\n {20,}", " ", blocks(section("The tree"))[0])  # a purpose may go on below itself
    for line in lines.splitlines():
        name, _, purpose = line.strip().partition(" ")
        folder = folder if line.startswith(" ") else name
        found[folder + name if line.startswith(" ") else name] = purpose.strip()
    return found


def test_every_path_of_the_tree_exists_and_has_a_purpose() -> None:
    for path, purpose in tree().items():
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
        assert purpose, path


def test_the_tree_leaves_no_room_out() -> None:
    listed = set(tree())
    for folder in ("mmssl", "modalities", "recipes"):
        for path in (ROOT / folder).iterdir():
            name = f"{folder}/{path.name}/" if path.is_dir() else f"{folder}/{path.name}"
            if path.name not in ("__pycache__", "__main__.py") and (path.is_dir() or folder != "recipes"):
                assert path.suffix == ".typed" or name in listed, name
    rooms = ("data", "training", "evaluation", "tasks")
    modules = {path.stem for room in rooms for path in (ROOT / "mmssl" / room).glob("*.py")}
    said = " ".join(tree()[f"mmssl/{room}/"] for room in rooms)
    assert modules - {"__init__"} == set(said.replace(",", "").split())


def test_every_stop_of_the_tour_is_defined_where_it_says() -> None:
    stops = re.findall(r"`([\w/]+\.(?:py|yaml))`((?:[:,]\s`\w+`)*)", section("The tour"))
    assert len(stops) >= 8
    for path, symbols in stops:
        text = (ROOT / path).read_text(encoding="utf-8")
        names = re.findall(r"\w+", symbols)
        assert names or path.endswith(".yaml"), path
        defined = {getattr(node, "name", None) for node in ast.parse(text).body} if names else set()
        assert set(names) <= defined, path


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_commands_are_found_in_blocks_and_in_recipes() -> None:
    names = {line.split()[1] for line in commands()}
    assert names == {
        "manifest",
        "pretrain",
        "finetune",
        "embed",
        "search",
        "evaluate",
        "report",
        "units",
        "topics",
        "convert",
        "recipes",
    }


def commands() -> list[str]:
    """Every line that begins with `mmssl` in a block of a document or in the head of a recipe."""
    texts = [block for name in DOCUMENTS for block in blocks((ROOT / name).read_text(encoding="utf-8"))]
    texts += [header(path.read_text(encoding="utf-8"))["run"] for path in shipped().values()]
    lines = [line for text in texts for line in text.splitlines()]
    return [line for line in lines if line.startswith("mmssl ")]


@pytest.mark.parametrize("line", commands())
def test_a_command_line_parses(line: str) -> None:
    command = typer.main.get_command(app)
    arguments = shlex.split(line, comments=True)[1:]
    if arguments[0] in ("pretrain", "finetune"):
        overrides = [argument for argument in arguments[2:] if "=" in argument and not argument.startswith("-")]
        load(arguments[1], overrides)
    inner = command.get_command(typer.Context(command), arguments[0])  # type: ignore[attr-defined]
    assert inner is not None
    inner.make_context(arguments[0], arguments[1:])


def test_the_ten_lines_print_what_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seconds in (("a.wav", 1.0), ("b.wav", 2.5)):
        soundfile.write(name, np.random.default_rng(0).normal(0, 0.1, int(16_000 * seconds)), 16_000)
    write_manifest("train.jsonl", [{"audio": "a.wav", "seconds": 1.0}])
    torch.manual_seed(0)
    config = export_config(
        resolve(load("small/wav2vec2_speech", ["data.train=train.jsonl"])), Manifest(Path("train.jsonl"))
    )
    export_encoder(Path("runs/wav2vec2_speech"), build_encoder(config), config)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(blocks(README, "python")[0], {})
    assert printed.getvalue() == blocks(README.partition("```python")[2].partition("```\n")[2])[0]


def test_four_folders_of_files_of_any_size_train_one_trunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder in ("pictures", "sounds", "recordings", "videos"):
        (tmp_path / folder).mkdir()
    pictures = (
        ("a.jpg", "RGB", (90, 61)),
        ("b.jpg", "L", (33, 200)),
        ("c.png", "RGBA", (5, 7)),
        ("d.jpg", "RGB", (300, 40)),
    )
    for name, mode, size in pictures:
        picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        picture.convert(mode).save(f"pictures/{name}")
    for folder in ("sounds", "recordings"):
        for n, (rate, channels, seconds) in enumerate(((44_100, 2, 6.5), (8_000, 1, 0.4), (16_000, 1, 2.0))):
            wave = rng.normal(0, 0.1, (int(rate * seconds), channels))
            soundfile.write(f"{folder}/{n}.wav", wave, rate)
    for n, (rate, height, width, frames) in enumerate(((30, 48, 100, 45), (12, 90, 50, 6), (8, 64, 64, 20))):
        with av.open(f"videos/{n}.mp4", "w") as container:
            stream = container.add_stream("libx264", rate=rate)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for _ in range(frames):
                frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
                container.mux(stream.encode(frame.reformat(format="yuv420p")))
            container.mux(stream.encode())
    [block] = [block for block in blocks(README) if "omni_media" in block]
    trainer = "trainer={steps: 8, eval_every: 8, device: cpu}"
    toy = ["transformer={dim: 16, depth: 3, heads: 2}", trainer, "data.on_bad_clip=raise"]
    for line in block.splitlines():
        arguments = shlex.split(line)[1:]
        if arguments[0] == "pretrain":
            valid = [argument.replace("train", "valid") for argument in arguments if argument.startswith("data.train")]
            arguments += [*toy, *valid, "data.batch_size=3"]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    assert np.load("pictures.npz")["scene"].shape == (4, 16)
    [*_, last] = (tmp_path / "runs/omni_media/log.jsonl").read_text(encoding="utf-8").splitlines()
    found = json.loads(last)["evaluation"]
    assert all(math.isfinite(found[f"{name}/loss"]) for name in ("image", "audio", "speech", "video"))


def test_the_table_of_modalities_is_theirs() -> None:
    table = [line.strip("| ").split(" | ") for line in section("Modalities").splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in table] == list(MODALITIES)
    for name, formats, frontends, _, objectives in table:
        assert set(re.findall(r"`(\w+)`", frontends)) == set(MODALITIES[name].frontends)
        assert {f".{format}" for format in re.findall(r"\w+", formats)} <= MODALITIES[name].suffixes
        sources = [f"{name}/{frontend}" for frontend in MODALITIES[name].frontends]
        fitting = {one for one in ALONE if any(refusal(one, source) is None for source in sources)}
        assert set(re.findall(r"`(\w+)`", objectives)) == fitting


def test_the_objectives_that_take_a_chunk_are_named_and_those_that_do_not() -> None:
    [paragraph] = [part for part in section("Several machines").split("\n\n") if "objective.chunk" in part]
    said, _, others = paragraph.partition("take `objective.chunk=256`")
    having = {name for name, kind in OBJECTIVES.items() if "chunk" in inspect.signature(kind).parameters}
    assert set(re.findall(r"`(\w+)`", said)) == having
    assert set(re.findall(r"`(\w+)`", others)) == set(CONTRASTING) - having


def test_the_first_screen_has_the_two_commands_and_what_they_need() -> None:
    screen = "\n".join(README.splitlines()[:25])
    for text in ("make demo", "make test", "apt-get install -y python3-venv make"):
        assert text in screen
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo: \$\(VENV\)/\.ok$", makefile, re.MULTILINE)
    assert re.search(r"^test: lint$", makefile, re.MULTILINE)
