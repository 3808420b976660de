"""What evaluations leave to be looked at and listened to."""

from pathlib import Path
from typing import Any

import soundfile
import torch
from PIL import Image

from mmssl.types import Batch, Loss, Raw
from mmssl.validation import Validation


class Drawn:
    """Draws what it is told to."""

    pictures = True

    def __init__(self, shown: dict[str, Any]) -> None:
        self.shown = shown

    def __call__(self, batch: Batch) -> Loss:
        return Loss(torch.tensor(6.0), 3)

    def reconstruct(self, batch: Batch) -> dict[str, Any]:
        return dict(self.shown)


def evaluated(shown: dict[str, Any], folder: Path) -> list[str]:
    """The files that an evaluation after update 7 leaves."""
    batch = Batch(
        {"image": Raw(torch.zeros(2, 1, 4, 4), torch.ones(2, dtype=torch.int64), ["a", "b"])}, torch.arange(2)
    )
    scores = Validation(Drawn(shown), lambda: iter([batch, batch]), {}, torch.device("cpu"), "float32", folder)(7)
    assert scores == {"loss": 2.0}
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def test_a_spectrogram_is_drawn_and_can_be_heard(tmp_path: Path) -> None:
    picture, wave = torch.rand(2, 1, 8, 12), torch.rand(1, 4000)
    sounds = {"input": wave, "reconstruction": wave}
    found = evaluated(
        {"input": picture, "reconstruction": picture, "sounds": sounds, "rate": 8000, "note": ""}, tmp_path
    )
    assert found == ["README.txt", "update_7.png", "update_7/1_1_input.mp3", "update_7/1_2_reconstruction.mp3"]
    assert soundfile.info(tmp_path / "update_7" / "1_1_input.mp3").samplerate == 8000


def test_a_clip_that_moves_is_drawn_moving(tmp_path: Path) -> None:
    clip = torch.rand(2, 3, 4, 8, 8)
    assert evaluated({"input": clip, "rate": 4.0, "note": "a leak"}, tmp_path) == ["README.txt", "update_7.webp"]
    with Image.open(tmp_path / "update_7.webp") as image:
        assert getattr(image, "n_frames", 1) == 4
    assert "Note: a leak." in (tmp_path / "README.txt").read_text()
