"""Two processes give the gradient of one on all pairs. As a program, this file is one of the two."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pairs import POOL, batch, encoders, raw

from mmssl import distributed
from mmssl.modalities.image.views import distortions
from mmssl.objectives.clip import CLIP
from mmssl.objectives.clip_lite import CLIPLite
from mmssl.objectives.siglip import SigLIP
from mmssl.objectives.slip import SLIP
from mmssl.training.parallel import parallelize
from mmssl.types import Batch

NAMES = ("speech", "image", "text")
VIEWS = {"self_supervised": {"image": "distortions"}, "view_makers": {"image": distortions}}
KINDS = {
    "clip": (CLIP, {}),
    "clip_in_chunks": (CLIP, {"chunk": 1}),
    "siglip": (SigLIP, {}),
    "siglip_in_chunks": (SigLIP, {"chunk": 1}),
    "clip_lite": (CLIPLite, {}),
    "clip_lite_in_chunks": (CLIPLite, {"chunk": 1}),
    "slip": (SLIP, {**VIEWS, "ssl_hidden": 12, "ssl_dim": 6}),
    "slip_in_chunks": (SLIP, {**VIEWS, "ssl_hidden": 12, "ssl_dim": 6, "chunk": 2}),
}
LABELS = [5, 6, 5, 7]
ROWS = ((0, 1, 3), (2,))  # of each process: they need not have equally many


def pairs(rows: tuple[int, ...]) -> Batch:
    """Pairs of which the third has no picture, so that one process has none at all."""
    made = batch(*NAMES, rows=rows, labels=[LABELS[row] for row in rows])
    have = [place for place, row in enumerate(rows) if row != 2]
    inputs = {name: clips for name, clips in made.inputs.items() if name != "image"}
    if have:
        inputs = {"speech": inputs["speech"], "image": raw("image", [rows[place] for place in have]), **inputs}
    return replace(made, inputs=inputs, rows={"image": torch.tensor(have)} if 0 < len(have) < len(rows) else {})


def gradient(name: str, rows: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """The gradient of the sum over all processes, zero where none of them has any; and the own sum."""
    kind, settings = KINDS[name]
    model = kind(encoders(*NAMES), dim=8, pool=POOL, same="text", **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    whole = parallelize(model, optimizer, torch.device("cpu"), sharded=False)
    loss = whole(pairs(rows))
    loss.total.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([own.flatten() for own in found]).numpy() * distributed.world_size(), loss.total.item()


def one_of_two(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.setup("cpu")
    rank = distributed.rank()
    for name in KINDS:
        found, total = gradient(name, ROWS[rank])
        np.savez(folder / f"{name}_{rank}.npz", gradient=found, total=total)
    distributed.shutdown()


@pytest.mark.processes
def test_two_processes_give_the_gradient_of_one_on_all_pairs(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env=os.environ | together | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    for name in KINDS:
        expected, total = gradient(name, (0, 1, 3, 2))
        ranks = [np.load(tmp_path / f"{name}_{rank}.npz") for rank in (0, 1)]
        assert sum(float(own["total"]) for own in ranks) == pytest.approx(total, rel=1e-5)
        for own in ranks:  # the same on both: exchanged
            assert np.linalg.norm(own["gradient"] - expected) < 1e-5 * np.linalg.norm(expected), name


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
