"""What evaluations leave to be looked at and listened to, and what only all clips together tell."""

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.classify import Classify
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


def test_the_mean_average_precision_is_that_of_all_batches_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = Encoder(
        Patches(dim=8, size=[4, 4], channels=1, mean=[0.5], std=[0.3]), Transformer(dim=8, depth=1, heads=2), SinCos(8)
    )
    objective = Classify(body, n_classes=4, multi_label=True).eval()
    # one, two or no classes a clip; class 3, which no clip has, counts for nothing
    names = torch.tensor([[n % 3, (n + 1) % 3] for n in range(12)])
    sizes = torch.tensor([1, 2, 0] * 4)
    truth = torch.zeros(12, 4).scatter_add(1, names, (torch.arange(2) < sizes[:, None]).float())
    raw = Raw(torch.rand(12, 1, 8, 8), torch.ones(12, dtype=torch.int64), [str(i) for i in range(12)])
    parts = [slice(0, 5), slice(5, 12)]
    batches = [Batch({"image": raw.part(part)}, torch.arange(12)[part], names[part], sizes[part]) for part in parts]
    found = torch.cat([objective(batch).answers[0] for batch in batches])
    expected = sum(average_precision_score(truth[:, i], found[:, i]) for i in range(3)) / 3
    scores = Validation(objective, lambda: iter(batches), {}, torch.device("cpu"), "float32", tmp_path)(1)
    assert scores["map"] == pytest.approx(expected, abs=1e-6)
    assert objective.train()(batches[0]).answers is None
