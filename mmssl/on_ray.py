"""The job of `mmssl embed` on Ray Data: over the cores, GPUs and machines of a cluster.

The job stays what it is, parts in a folder that all machines see: a job that was cut off goes on, here or there, and
what is put together is the same to the bit, on processors of one kind with as many threads as a worker has (one).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.clips import WINDOW_GROUPS
from mmssl.embed import Precision, load
from mmssl.progress import bar
from mmssl.store import Spread, write_parts

# Stretches that a worker gets at a time: the more, the longer it reads ahead of the model without a break, and the
# longer others wait for the last of them.
_MOST_WINDOWS, _TASKS_A_WORKER = 16, 4


def on_ray(
    model: str | Path, inputs: Sequence[str], *, modality: str | None, device: str, precision: Precision
) -> Spread:
    """What `write_embeddings` takes as `spread`.

    Runs on the cluster that this process is connected to, or that RAY_ADDRESS names, else on this machine. Each worker
    loads the encoder once, and takes a GPU where the cluster has any, else a core. All see the same files, under the
    same names, and have mmssl installed.

    Args:
        model, modality, device, precision: of the embedder, see `mmssl.load`.
        inputs: paths, patterns or captions, see `Embedder.embed`.

    Raises:
        ValueError: Ray is not installed, or what goes wrong in a worker.
    """
    ray = _ray()

    def spread(
        folder: Path, stretches: Sequence[range], settings: Mapping[str, Any], progress: bool
    ) -> Iterator[tuple[str, str]]:
        if not stretches:
            return
        started = not ray.is_initialized()
        if started:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone
            ray.init(include_dashboard=False, logging_level=logging.ERROR)
            logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            resources = ray.cluster_resources()
            gpus = 0 if device == "cpu" else int(resources.get("GPU", 0))
            workers = max(1, gpus or int(resources.get("CPU", 1)))
            tasks = list(_tasks(stretches, settings["batch_size"], workers))
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            given = (str(model), list(inputs), modality, device, precision, os.getcwd(), str(folder), dict(settings))
            done = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
                _Worker,
                fn_constructor_args=given,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(workers, len(tasks))),
                num_cpus=None if gpus else 1,
                num_gpus=1 if gpus else None,
            )
            with bar("embedding", sum(map(len, stretches)), shown=progress) as advance:
                for row in done.iter_rows():
                    if row["error"]:
                        raise ValueError(row["error"])
                    yield from map(tuple, json.loads(row["bad"]))
                    advance(int(row["clips"]))
        finally:
            if started:
                ray.shutdown()

    return spread


def _tasks(stretches: Sequence[range], batch_size: int, workers: int) -> Iterator[dict[str, int]]:
    """The stretches in pieces that begin and end where windows do."""
    size = WINDOW_GROUPS * batch_size
    clips = sum(map(len, stretches))
    size *= min(max(clips // (size * workers * _TASKS_A_WORKER), 1), _MOST_WINDOWS)
    for stretch in stretches:
        start = stretch.start
        while start < stretch.stop:
            stop = min((start // size + 1) * size, stretch.stop)
            yield {"start": start, "stop": stop}
            start = stop


class _Worker:
    """Embeds stretches of clips into parts; what it returns is which clips cannot be read."""

    def __init__(
        self,
        model: str,
        inputs: list[str],
        modality: str | None,
        device: str,
        precision: Precision,
        here: str,
        folder: str,
        settings: dict[str, Any],
    ) -> None:
        os.chdir(here)  # names of clips are as they were given
        self.embedder = load(model, device=device, precision=precision).of(modality)
        self.clips = self.embedder.clips(inputs, window=settings["window"])
        self.folder, self.settings = Path(folder), settings

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        places = range(int(batch["start"][0]), int(batch["stop"][0]))
        try:
            bad = list(write_parts(self.embedder, self.clips, self.folder, places, self.settings))
        except (ValueError, OSError) as error:  # as one sentence, not as the stack of a worker
            return {"bad": ["[]"], "clips": [0], "error": [str(error)]}
        return {"bad": [json.dumps(bad)], "clips": [len(places)], "error": [""]}


def _ray() -> Any:
    """Ray with its Data.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError("--engine ray: takes Ray Data: pip install mmssl[ray]") from None
    return ray
