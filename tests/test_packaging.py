"""What the wheel holds, and that it works away from the source tree."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = {"mmssl": "mmssl", "modalities": "mmssl.modalities", "recipes": "mmssl.recipes"}


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_the_package_list_is_the_tree() -> None:
    listed = [line for line in setup()["options"]["packages"].splitlines() if line]
    found = [
        ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
        for folder, package in MAPPED.items()
        for init in (ROOT / folder).rglob("__init__.py")
    ]
    assert listed == sorted(found)


def test_every_folder_with_code_is_a_package() -> None:
    bare = {
        str(path.parent.relative_to(ROOT))
        for folder in MAPPED
        for path in (ROOT / folder).rglob("*.py")
        if not (path.parent / "__init__.py").exists()
    }
    assert not bare, f"no __init__.py, so the wheel leaves it out: {sorted(bare)}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel installs it, without its dependencies, in an empty folder."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # setuptools writes build/ beside the sources, and leaves in a wheel what lay there
    source.mkdir()
    for name in (*MAPPED, "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, source / name, ignore=ignore) if path.is_dir() else shutil.copy(path, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(folder / "target"), str(source)], check=True, capture_output=True)
    return folder / "target"


def run(installed: Path, *command: str) -> str:
    """A command that sees the installed copy first, run from a folder that is not the source tree."""
    done = subprocess.run(
        command,
        cwd=installed.parent,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_the_wheel_holds_every_module_and_recipe(installed: Path) -> None:
    shipped = {path.relative_to(installed).as_posix() for path in (installed / "mmssl").rglob("*") if path.is_file()}
    wanted = {
        (Path(MAPPED[folder].replace(".", "/")) / path.relative_to(ROOT / folder)).as_posix()
        for folder in MAPPED
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".typed", ".html")
    }
    assert wanted <= shipped, f"left out of the wheel: {sorted(wanted - shipped)}"
    assert {name for name in shipped if not name.endswith(".pyc")} - wanted == {"mmssl/recipes/README.md"}


def test_the_installed_command_works_from_any_folder(installed: Path) -> None:
    where = run(
        installed, sys.executable, "-c", "import mmssl, mmssl.modalities as m; print(mmssl.__file__, m.__file__)"
    )
    assert all(str(installed) in path for path in where.split())
    assert "pretrain" in run(installed, str(installed / "bin" / "mmssl"), "--help")
    assert "speech/wav2vec2_base" in run(installed, sys.executable, "-m", "mmssl", "recipes")


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    names = {
        "PIL": "pillow",
        "yaml": "PyYAML",
        "sklearn": "scikit-learn",
        "flashlight": "flashlight-text",
        "faiss": "faiss-cpu",
    }
    imported = {
        node.module.partition(".")[0] if isinstance(node, ast.ImportFrom) else alias.name.partition(".")[0]
        for folder in MAPPED
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module)
        for alias in node.names
    }
    wanted = setup()["options"]["install_requires"] + "".join(
        setup()["options.extras_require"][e] for e in ("ann", "codec", "lm", "parquet", "ray")
    )
    declared = re.findall(r"^([A-Za-z][\w-]*)", wanted, re.MULTILINE)
    ours = imported - set(sys.stdlib_module_names) - {"mmssl"}
    assert {names.get(name, name) for name in ours} == set(declared)
