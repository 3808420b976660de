"""Embedding a folder of small pictures, files to vectors: whether decoding and model overlap, and what memory it takes.

    OMP_NUM_THREADS=1 python benchmarks/files_speed.py --files 10000

Prints pictures a second (median over rounds, in turn) of decoding alone, of the model alone on pictures in memory, and
of both as `mmssl embed` has them, as a share of the slower of the two alone: 1 where they overlap wholly. The reader is
one thread, so that needs a core beside those of the model. Then the peak memory of `mmssl embed` to .npz and to an
index, each in a process of its own, for a tenth of the files and for all; below 1,000 what is read ahead still grows.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmssl.clips import find_clips, windows
from mmssl.embed import Embedder
from mmssl.encoder import Encoder
from mmssl.memory import keep_freed_memory
from mmssl.modalities.image.frontend import Patches
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.store import write_embeddings

BATCH = 16


def embedder() -> Embedder:
    torch.manual_seed(0)
    frontend = Patches(dim=192, size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    encoder = Encoder(frontend, Transformer(dim=192, depth=6, heads=3), SinCos(192))
    steps = [{"name": "resize", "size": 112}, {"name": "center_crop", "size": [112, 112]}]
    return Embedder(encoder, {"modality": "image", "augment_eval": steps}, device="cpu")


def write_files(folder: Path, count: int) -> None:
    """Pictures of 256 x 256 with structure at every scale, so that decoding costs what it costs."""
    rng = np.random.default_rng(0)
    for n in range(count):
        x = sum(np.kron(rng.random((s, s, 3)), np.ones((256 // s, 256 // s, 1))) for s in (4, 32, 256))
        Image.fromarray((x * 85).astype(np.uint8)).save(folder / f"{n:07}.jpg", quality=90)


def peak(folder: Path, count: int, index: bool) -> int:
    """MiB of a process that embeds so many files; Linux alone tells."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (folder, count, index))


def _peak(folder: Path, count: int, index: bool) -> int:
    keep_freed_memory()
    model, files = embedder(), sorted(str(path) for path in folder.iterdir())[:count]
    with tempfile.TemporaryDirectory() as out:
        write_embeddings(model, files, Path(out) / "e.npz", index=index, batch_size=BATCH)
    # not ru_maxrss, which a process takes over from the one that started it
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    keep_freed_memory()
    model = embedder()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_files(folder, given.files)
        clips = find_clips(folder, model.config, model.encoder, rate=None)
        ready = torch.stack([next(iter(clips.read(n).sample.inputs.values())) for n in range(BATCH)])  # type: ignore[union-attr]
        raw = find_clips(ready, model.config, model.encoder, rate=None)
        assert len(raw) == BATCH

        def decode() -> None:
            for _ in windows(clips, BATCH):
                pass

        def compute() -> None:
            for _ in range(len(clips) // BATCH):
                model.embed(ready, tokens=False, batch_size=BATCH)

        def both() -> None:
            for _ in model.stream(clips, batch_size=BATCH):
                pass

        ways: dict[str, Callable[[], None]] = {"decoding": decode, "model": compute, "both": both}
        took: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(given.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                took[name].append(time.perf_counter() - start)
        seconds = {name: statistics.median(times) for name, times in took.items()}
        print(f"{len(clips)} pictures, {torch.get_num_threads()} threads for the model")
        for name, one in seconds.items():
            print(f"{name:10} {len(clips) / one:8.0f} pictures/s")
        share = max(seconds["decoding"], seconds["model"]) / seconds["both"]
        print(f"both run at {share:.2f} of the slower one alone")
        for index in (False, True):
            few, many = (peak(folder, count, index) for count in (len(clips) // 10, len(clips)))
            print(
                f"{'index' if index else 'npz':10} {few} MiB at the peak for {len(clips) // 10} files, {many} for all"
            )


if __name__ == "__main__":
    main()
