"""Which room may import which, as the tree in the README means it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ["types", "nn"]
ARROWS = {
    "types": [],
    "files": ["types"],
    "distributed": [],
    "memory": [],
    "progress": [],
    "recipe": [],
    "nn": ["types", "memory"],
    "encoder": PARTS,
    "modalities": [*PARTS, "files", "data.units"],  # the codes that `mmssl units` writes are what one modality reads
    "objectives": [*PARTS, "encoder", "distributed"],
    "data": ["types", "files", "progress"],
    "evaluation": [*PARTS, "encoder"],
    "training": ["types", "files", "data", "distributed", "memory"],
    "loading": ["recipe", *PARTS, "encoder", "objectives", "modalities", "data"],
    "validation": ["types", "distributed", "data", "evaluation", "training.pictures"],
    "convert": ["recipe", *PARTS, "encoder", "modalities", "objectives", "training.checkpoint"],
    "build": ["recipe", *PARTS, "encoder", "objectives", "modalities", "convert"],
    "resolve": ["recipe", *PARTS, "encoder", "objectives", "modalities", "loading", "training", "convert", "build"],
    "assemble": [
        "recipe",
        "types",
        "encoder",
        "objectives",
        "modalities",
        "data",
        "loading",
        "validation",
        "training",
        "distributed",
        "convert",
        "build",
        "resolve",
    ],
    "clips": [*PARTS, "files", "encoder", "modalities", "data", "loading"],
    "recordings": ["types"],
    "gather": ["types", "data", "clips", "progress"],
    "embed": ["recipe", *PARTS, "encoder", "data", "evaluation", "build", "clips", "convert", "gather", "recordings"],
    "hear": ["embed"],
    "index": ["types", "modalities", "data", "embed"],
    "on_ray": ["clips", "embed", "progress", "store"],
    "store": ["types", "files", "data", "clips", "embed", "index", "recordings"],
    "tasks": ["recipe", *PARTS, "encoder", "modalities", "data", "evaluation", "build", "clips", "embed"],
    "folds": ["recipe", "objectives", "data", "evaluation", "resolve", "assemble", "tasks"],
    "matrix": ["recipe", "modalities", "objectives", "build", "resolve", "assemble"],
    "thumbnails": ["clips", "modalities", "training.pictures"],
    "report": ["recipe", "types", "data", "evaluation", "clips", "embed", "tasks", "thumbnails", "training.health"],
    "units": [*PARTS, "modalities", "data", "convert.folder", "embed", "progress", "training.checkpoint"],
    "topics": ["data", "progress", "units"],
    "normalization": ["recipe", "types", "progress", "modalities", "data", "loading", "build", "resolve"],
}
FREE = {"__init__", "__main__", "cli", "recipes"}  # the front door may use every room; recipes hold no code


def rooms() -> dict[str, list[Path]]:
    """Room -> its files."""
    found = {path.stem: [path] for path in (ROOT / "mmssl").glob("*.py")}
    found |= {folder.name: sorted(folder.rglob("*.py")) for folder in (ROOT / "mmssl").iterdir() if folder.is_dir()}
    found |= {name: sorted((ROOT / name).rglob("*.py")) for name in ("modalities", "recipes")}
    return {room: files for room, files in found.items() if files}


def forbidden(text: str, room: str, allowed: list[str]) -> list[str]:
    """Each import of `text` that its room may not make, as "line: module"."""
    wrong = []
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the import from the package's root"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            inner = name.removeprefix("mmssl.")
            if inner != name and not any(f"{inner}.".startswith(f"{okay}.") for okay in [room, *allowed]):
                wrong.append(f"{node.lineno}: {name}")
    return wrong


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_imports_only_what_its_arrows_name(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in rooms()[room]
        for line in forbidden(path.read_text(encoding="utf-8"), room, ARROWS[room])
    ]
    assert not wrong, f"{room} may import {ARROWS[room] or 'no room'}, but: {'; '.join(wrong)}"


def test_every_room_has_its_arrows() -> None:
    assert set(rooms()) == set(ARROWS) | FREE


def test_a_planted_import_is_found() -> None:
    text = "import mmssl.nn.masking\ndef f():\n    from mmssl.modalities import MODALITIES"
    assert forbidden(text, "objectives", ARROWS["objectives"]) == ["3: mmssl.modalities.MODALITIES"]
