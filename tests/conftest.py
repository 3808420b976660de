"""Tiny clips made on the spot, and the real data sets where there are some."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mmssl.data.manifest import write_manifest

# tests share the machine with each other: more threads make small tensors slower, not faster
torch.set_num_threads(1)

WORDS = ("low", "high")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets."""
    folder = os.environ.get("MMSSL_DATA")
    if not folder:
        pytest.skip("needs real data: set MMSSL_DATA to the folder that holds the data sets of data_manifests/")
    return Path(folder)


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 wav files of 0.4 to 0.7 s at 8 kHz, as <split>/<word>/<n>.wav: chirps that rise from a low or a high pitch."""
    import soundfile

    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for n in range(16):
        split, word = ("train", "test")[n % 8 >= 6], WORDS[n % 2]
        time = np.arange(int(8000 * (0.4 + 0.02 * n))) / 8000
        pitch = (300.0, 1500.0)[n % 2] * (1 + time)
        wave = 0.5 * np.sin(2 * np.pi * np.cumsum(pitch) / 8000) + 0.01 * rng.standard_normal(len(time))
        path = folder / split / word / f"{n}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, 8000)
    return folder


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 gray mp4 files, 32 x 32, 16 frames at 8 a second, as <split>/<way>/<n>.mp4: stripes that move up or down."""
    import av

    folder = tmp_path_factory.mktemp("videos")
    for n in range(16):
        split, way = ("train", "test")[n % 8 >= 6], ("up", "down")[n % 2]
        path = folder / split / way / f"{n}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for step in range(16):
                rows = np.arange(32) + n + (step if way == "up" else -step)
                picture = np.repeat((rows // 4 % 2 * 200)[:, None].astype(np.uint8), 32, 1)
                frame = av.VideoFrame.from_ndarray(picture, format="gray").reformat(format="yuv420p")
                frame.pts = step
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 gray png files of 16 x 16, as <split>/<kind>/<n>.png: stripes or checkerboards, at any phase."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    rows, columns = np.mgrid[:16, :16]
    for n in range(16):
        split, kind = ("train", "test")[n % 8 >= 6], ("stripes", "checks")[n % 2]
        x = (rows + n) // 4 % 2 if kind == "stripes" else ((rows + n) // 4 + (columns + n) // 4) % 2
        path = folder / split / kind / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((x * 200 + n).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def seen(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return listed(pictures, "image", tmp_path_factory.mktemp("seen"))


@pytest.fixture(scope="session")
def heard(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return listed(sounds, "audio", tmp_path_factory.mktemp("heard"))


def listed(folder: Path, key: str, out: Path) -> dict[str, Path]:
    """A manifest for each split of the folders that conftest makes; the label is also the text."""
    manifests = {}
    for split in ("train", "test"):
        files = sorted(path for path in (folder / split).rglob("*") if path.is_file())
        rows = [{key: str(path), "label": path.parent.name, "text": path.parent.name, "seconds": 0.5} for path in files]
        manifests[split] = out / f"{split}.jsonl"
        write_manifest(manifests[split], rows)
    return manifests
