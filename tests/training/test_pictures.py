"""Sheets of pictures."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmssl.training.pictures import GAP, write_sheet


def test_a_sheet_has_a_row_for_each_kind_and_a_column_for_each_clip(tmp_path: Path) -> None:
    white, black = torch.ones(3, 1, 64, 64), torch.zeros(3, 1, 64, 64)
    black[2, 0, 0, 0] = 0.5
    write_sheet(tmp_path / "new" / "sheet.png", {"input": white, "reconstruction": black}, note="a leak")
    with Image.open(tmp_path / "new" / "sheet.png") as image:
        sheet = np.asarray(image)
    side = 64 + 2 * GAP
    assert sheet.shape == (2 * side, 3 * side, 3)
    assert (sheet[:side] == 255).all()
    assert (sheet[side + GAP, 2 * side + GAP] == 128).all()
    assert (sheet[side + GAP + 1 : 2 * side - GAP, GAP : side - GAP] == 0).all()
    text = (tmp_path / "new" / "README.txt").read_text()
    assert text == "Each column is a clip; the rows, from the top: input, reconstruction.\nNote: a leak.\n"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["README.txt", "sheet.png"]


def test_small_pictures_are_enlarged_and_only_so_many_are_shown(tmp_path: Path) -> None:
    write_sheet(tmp_path / "sheet.png", {"input": torch.rand(5, 3, 16, 16)}, columns=2)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (2 * (64 + 2 * GAP), 64 + 2 * GAP)
