"""The command `mmssl convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmssl.cli import app
from mmssl.convert import LAYOUTS

pytest.importorskip("transformers")


def test_the_command_converts_and_says_what_opens_it(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = saved("vit_mae")
    arguments = [str(folder), str(tmp_path / "vit"), "--to", "vit"]
    with pytest.raises(SystemExit) as ended:
        app(["convert", *arguments])
    assert ended.value.code == 0
    out = tmp_path / "vit"
    assert capsys.readouterr().out == f'{out}: transformers.ViTModel.from_pretrained("{out}") opens it\n'
    with pytest.raises(SystemExit) as ended:
        app(["convert", *arguments])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"mmssl: {out}: is there already; give a new folder\n"


def test_the_help_names_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app(["convert", "--help"])
    said = capsys.readouterr().out.replace("\n", " ")
    assert {name for name in LAYOUTS if name not in said} == set()
