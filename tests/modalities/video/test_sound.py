"""A video and its own sound: one row, one time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mmssl.build import build_frontend
from mmssl.cli import app
from mmssl.data.dataset import ManifestDataset
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.loading import clips_of
from mmssl.modalities import MODALITIES
from mmssl.types import BadClip

RATE = 16_000
FRONTENDS = {"video": {"name": "tubes", "size": [1, 8, 8], "rate": 10}, "audio": {"name": "spectrogram"}}


@pytest.fixture(scope="module")
def folder(painted: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 10 frames/s with the number of each frame painted into it, and a click after one second."""
    folder = tmp_path_factory.mktemp("heard")
    painted.write(folder / "a.mp4", "libx264", frames=30, sound="aac")
    painted.write(folder / "mute.mp4", "libx264", frames=30)
    return folder


def rows(folder: Path, *names: str, **more: Any) -> Manifest:
    probe = MODALITIES["video"].probe
    assert probe is not None
    write_manifest(
        folder / "a.jsonl", [{"video": str(folder / f"{n}.mp4")} | probe(folder / f"{n}.mp4") | more for n in names]
    )
    return Manifest(folder / "a.jsonl")


def dataset(manifest: Manifest, steps: dict[str, list[dict[str, Any]]]) -> ManifestDataset:
    frontends = {
        name: build_frontend({"modality": name, "frontend": FRONTENDS[name]}, dim=8) for name in ("video", "audio")
    }
    return clips_of(manifest, frontends, steps)


def click(wave: torch.Tensor) -> float | None:
    """The second at which the click begins; None where there is none."""
    loud = (wave.abs() > 0.3).nonzero()
    return None if not len(loud) else float(loud[0]) / RATE


def test_the_sound_of_a_video_is_its_audio_unless_the_row_says_otherwise(folder: Path) -> None:
    heard, mute = rows(folder, "a", "mute")
    assert heard["audio"] == heard["video"] == str(folder / "a.mp4")
    assert "audio" not in mute
    assert len(rows(folder, "a", "mute").having(["video", "audio"])) == 1
    [other] = rows(folder, "a", audio=str(folder / "b.wav"))
    assert other["audio"] == str(folder / "b.wav")
    with pytest.raises(
        ValueError, match=r"a.jsonl:2: no 'audio', which audio reads; there is no sound in its video; `mmss"
    ):
        dataset(rows(folder, "a", "mute"), {"video": [], "audio": []})


def test_a_folder_of_videos_gives_those_with_sound_as_pairs(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "mute.mp4"):
        (tmp_path / "videos" / name).write_bytes((folder / name).read_bytes())
    given = ["manifest", str(tmp_path / "videos"), "--modality", "video,audio", "--out", str(tmp_path / "m.jsonl")]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert "left out: mute.mp4: there is no sound in it" in done.output
    [row] = Manifest(tmp_path / "m.jsonl").having(["video", "audio"])
    assert row["id"] == "a.mp4"


@pytest.mark.parametrize(
    ("frames", "seconds"),
    [(8, 0.8), (3, 0.8), (8, 0.3)],
    ids=["the same time", "frames within the sound", "sound within the frames"],
)
def test_spans_of_both_show_the_same_time(folder: Path, painted: Any, frames: int, seconds: float) -> None:
    steps = {
        "video": [{"name": "random_span", "frames": frames}],
        "audio": [{"name": "random_span", "seconds": seconds}],
    }
    clips = dataset(rows(folder, "a"), steps)
    met = []
    for epoch in range(80):
        inputs = clips.read(0, epoch).inputs
        assert list(inputs) == ["video", "audio"]
        numbers, heard = painted.numbers(inputs["video"]), click(inputs["audio"])
        assert inputs["audio"].shape == (round(seconds * RATE),)
        assert numbers == list(range(numbers[0], numbers[0] + frames))
        if heard is None:
            continue
        # frame n shows from n / 10 s on, and the one of the middle of the first tenth of the span is taken
        first = numbers[0] / 10
        begins = 1.0 - heard  # of the sound
        met.append(numbers[0])
        if frames == 8 and seconds == 0.8:
            assert abs(first - begins) <= 0.05 + 0.01
        elif frames == 3:
            assert begins - 0.06 <= first <= begins + seconds - 0.3 + 0.06
        else:
            assert first - 0.06 <= begins <= first + 0.8 - seconds + 0.06
    assert len(set(met)) > 1


def test_the_middles_of_both_are_the_same_time(folder: Path, painted: Any) -> None:
    steps = {"video": [{"name": "center_span", "frames": 16}], "audio": [{"name": "center_span", "seconds": 1.6}]}
    inputs = dataset(rows(folder, "a"), steps).read(0, 0).inputs
    assert painted.numbers(inputs["video"]) == list(range(7, 23))
    assert click(inputs["audio"]) == pytest.approx(0.3, abs=0.01)


def test_sound_that_ends_before_the_frames_that_are_read_is_one_sentence(tmp_path: Path, folder: Path) -> None:
    import soundfile

    soundfile.write(tmp_path / "short.wav", np.full(800, 0.1), RATE)
    manifest = rows(folder, "a", audio=str(tmp_path / "short.wav"), id="one")
    steps = {"video": [{"name": "center_span", "frames": 4}], "audio": [{"name": "center_span", "seconds": 0.1}]}
    with pytest.raises(BadClip, match=r"one: its audio ends at 0.05 s, and what is read of it begins at 1.30 s"):
        dataset(manifest, steps).read(0, 0)
