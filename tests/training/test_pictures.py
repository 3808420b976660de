"""Sheets of pictures, and what is heard of them."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmssl.training.pictures import GAP, MOST, sound_file, write_sheet, write_sounds


def test_a_sheet_has_a_row_for_each_kind_and_a_column_for_each_clip(tmp_path: Path) -> None:
    white, black = torch.ones(3, 1, 64, 64), torch.zeros(3, 1, 64, 64)
    black[2, 0, 0, 0] = 0.5
    write_sheet(tmp_path / "new" / "sheet", {"input": white, "reconstruction": black}, note="a leak")
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
    write_sheet(tmp_path / "sheet", {"input": torch.rand(5, 3, 16, 16)}, columns=2)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (2 * (64 + 2 * GAP), 64 + 2 * GAP)


def test_clips_that_move_are_a_sheet_that_moves(tmp_path: Path) -> None:
    black = torch.zeros(1, 3, 2 * MOST, MOST)
    clips = torch.stack([black, black + 1], 2)
    path = write_sheet(tmp_path / "sheet", {"input": clips, "reconstruction": 1 - clips}, rate=8)
    assert path.name == "sheet.webp"
    with Image.open(path) as image:
        # larger than is of use, so half as high and wide
        assert (image.n_frames, image.size) == (2, (MOST // 2 + 2 * GAP, 2 * (MOST + 2 * GAP)))
        assert image.info["loop"] == 0
        shades = []
        for frame in range(2):
            image.seek(frame)
            sheet = np.asarray(image.convert("L"))
            shades.append((int(sheet[MOST // 2, MOST // 4]), int(sheet[-MOST // 2, MOST // 4])))
            assert image.info["duration"] == 125
    assert shades == [(0, 255), (255, 0)]


def test_what_is_no_sound_does_not_end_the_process() -> None:
    wave = torch.full((8_000,), torch.nan)
    wave[::2], wave[::3] = torch.inf, -torch.inf
    assert soundfile.read(io.BytesIO(sound_file(wave, 8_000)))[1] == 8_000


@pytest.mark.parametrize("rate", [8_000, 10_000, 44_100])
def test_sound_is_the_same_as_mp3(tmp_path: Path, rate: int) -> None:
    wave = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(rate) / rate)
    write_sounds(tmp_path / "sounds", {"input": wave[None], "masked": wave[None] * 0}, rate=rate)
    assert sorted(path.name for path in (tmp_path / "sounds").iterdir()) == ["1_1_input.mp3", "1_2_masked.mp3"]
    heard, own = soundfile.read(io.BytesIO(sound_file(wave, rate)))
    assert own == (rate if rate == 8_000 else 16_000)
    middle = heard[own // 4 : own // 4 + own // 2]
    spectrum = np.abs(np.fft.rfft(middle))
    assert spectrum.argmax() == 220  # of half a second, so 440 Hz
    assert abs(20 * np.log10(middle.std() / (0.5 / np.sqrt(2)))) < 2  # decibels; MP3 keeps what is heard, no sample
