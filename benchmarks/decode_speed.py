"""Random clips of 16 frames out of video files, a second, with each decoder and 0, 1 and 2 workers.

    python benchmarks/decode_speed.py                                      # on files made for it, and small/mae_video
    python benchmarks/decode_speed.py --videos clips/ --batches 40
    python benchmarks/decode_speed.py --recipe small/mae_video --train motion/train.jsonl --steps 100

A recipe is run for so many updates, and the share of their time that was spent waiting for data is printed: from the
first micro-batch on. A small recipe keeps what it has read, so with few updates for many clips the share is larger.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmssl import assemble
from mmssl.data.batching import AHEAD, BatchPlan, Loader
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.data.scan import scan
from mmssl.loading import clips_of
from mmssl.modalities import MODALITIES
from mmssl.modalities.video.frontend import Tubes
from mmssl.recipe import load
from mmssl.types import Batch

WORKERS = (0, 1, 2)
STEPS = [
    {"name": "random_span", "frames": 16},
    {"name": "resize", "size": 128},
    {"name": "center_crop", "size": [112, 112]},
]


def make_videos(folder: Path, *, count: int, seconds: float, size: tuple[int, int]) -> None:
    """H.264 files of 30 frames/s, a key frame every 2 s, in which smooth noise moves."""
    import av

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    height, width = size
    for number in range(count):
        coarse = rng.integers(0, 255, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        picture = np.kron(coarse, np.ones((16, 16, 1), np.uint8))[:height, :width]
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30, options={"g": "60"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for step in range(round(30 * seconds)):
                frame = av.VideoFrame.from_ndarray(np.roll(picture, (step, 2 * step), (0, 1)), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def clips_a_second(rows: list[dict[str, Any]], decoder: str, workers: int, batches: int, batch_size: int) -> float:
    """Without the first micro-batches: with one of them processes start, and others were read ahead in the meantime."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clips.jsonl"
        write_manifest(path, [{**row, "decoder": decoder} for row in rows])
        manifest = Manifest(path)
        dataset = clips_of(manifest, {"video": Tubes(dim=1)}, {"video": STEPS})
        plan = BatchPlan(np.ones(len(manifest)), batch_size=batch_size, bucket=False)
        loaded = iter(Loader(dataset, plan, workers=workers))
        for _ in range(1 + AHEAD * max(1, workers)):
            next(loaded)
        start, clips = time.perf_counter(), 0
        for _ in range(batches):
            clips += len(next(loaded))
        taken = time.perf_counter() - start
        loaded.close()
    return clips / taken


class Watched(Loader):
    """Counts the seconds that its user waits for a micro-batch, from the first one on."""

    waited = 0.0
    began: float | None = None

    def __iter__(self) -> Iterator[Batch]:
        batches = super().__iter__()
        while True:
            start = time.perf_counter()
            batch = next(batches)
            now = time.perf_counter()
            if Watched.began is None:
                Watched.began = now
            else:
                Watched.waited += now - start
            yield batch


def waiting(recipe: str, train: Path, workers: int, steps: int) -> tuple[float, float]:
    """Seconds spent waiting for data, and in all, of so many updates of a recipe."""
    settings = [f"data.train={train}", f"data.workers={workers}", f"trainer.steps={steps}", "trainer.save_every=0"]
    if load(recipe).get("schedule.warmup") is not None:
        settings.append("schedule.warmup=0")
    assemble.Loader, Watched.waited, Watched.began = Watched, 0.0, None
    try:
        with tempfile.TemporaryDirectory() as folder:
            assemble.train(load(recipe, [*settings, "trainer.eval_every=0"]), Path(folder) / "run")
            taken = time.perf_counter() - (Watched.began or 0.0)
    finally:
        assemble.Loader = Loader
    return Watched.waited, taken


def print_waiting(recipe: str, train: Path, steps: int) -> None:
    for workers in WORKERS:
        waited, taken = waiting(recipe, train, workers, steps)
        print(f"{recipe}, {workers} workers: waited {waited:.2f} s of {taken:.2f} s ({waited / taken:.1%})", flush=True)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What a manifest says of the videos of a folder."""
    kind = MODALITIES["video"]
    rows = scan(folder, media="video", probe=kind.probe, suffixes=kind.suffixes, progress=False).rows
    return [{**row, "video": str(folder / row["video"])} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path)
    parser.add_argument("--count", type=int, default=16, help="files that are made")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each file that is made")
    parser.add_argument("--size", type=int, nargs=2, default=[256, 340], help="height and width of these")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--recipe")
    parser.add_argument("--train", type=Path, help="manifest for the recipe")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    if args.recipe is not None:
        print_waiting(args.recipe, args.train, args.steps)
        return
    with tempfile.TemporaryDirectory() as made:
        folder = args.videos or Path(made, "large")
        if args.videos is None:
            make_videos(folder, count=args.count, seconds=args.seconds, size=tuple(args.size))
        rows = rows_of(folder)
        for decoder in ("decord", "pyav"):
            for workers in WORKERS:
                rate = clips_a_second(rows, decoder, workers, args.batches, args.batch_size)
                print(f"{decoder:6} {workers} workers: {rate:7.1f} clips of 16 frames a second", flush=True)
        if args.videos is None:
            small = Path(made, "small")
            make_videos(small, count=128, seconds=2.0, size=(32, 32))
            write_manifest(small / "train.jsonl", rows_of(small))
            print_waiting("small/mae_video", small / "train.jsonl", args.steps)


if __name__ == "__main__":
    main()
