"""The same job on a cluster: the same file to the bit."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mmssl.build import build_encoder
from mmssl.embed import load
from mmssl.on_ray import _tasks, _Worker, on_ray
from mmssl.store import write_embeddings
from mmssl.training.checkpoint import export_encoder

SPEECH: dict[str, Any] = {
    "format": 1,
    "modality": "speech",
    "frontend": {"name": "waveform", "layers": [[8, 10, 5], [8, 4, 4], [8, 4, 4]], "rate": 8000},
    "positions": {"name": "conv", "kernel": 8, "groups": 2},
    "transformer": {"dim": 16, "depth": 2, "heads": 2},
    "encoder": {},
    "augment_eval": [],
    "objective": None,
    "classes": None,
    "vocabulary": None,
}
# a small cluster in this process alone, as a user of Ray has one; it ends with the process
ON_A_CLUSTER = """
import logging, tempfile
import ray
from mmssl.cli import app
if __name__ == "__main__":
    quiet = {"include_dashboard": False, "logging_level": logging.ERROR}
    with tempfile.TemporaryDirectory(prefix="ray") as place:  # not pytest's: the names of sockets must be short
        ray.init(num_cpus=1, object_store_memory=80 * 2**20, _temp_dir=place, **quiet)
        try:
            app(ARGUMENTS)
        except SystemExit as end:
            assert end.code == 0
        assert ray.is_initialized(), "a cluster that was there before must stay"
        ray.shutdown()
"""


@pytest.mark.processes
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray Data: pip install mmssl[ray]")
def test_a_cluster_writes_the_same_file_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow", reason="Parquet takes pyarrow: pip install mmssl[parquet]")
    torch.manual_seed(0)
    export_encoder(tmp_path / "run", build_encoder(SPEECH), SPEECH)
    rng = np.random.default_rng(0)
    (tmp_path / "clips").mkdir()
    for n in range(40):
        soundfile.write(tmp_path / "clips" / f"{n:02}.wav", rng.standard_normal(300 + 97 * n % 611) / 4, 8000)
    (tmp_path / "clips" / "17.wav").write_bytes(b"rubbish")
    command = ["embed", "run", "clips", "--batch-size", "2", "--layer", "0,2", "--tokens", "--device", "cpu"]
    command += ["--engine", "ray", "--out", "ray.parquet"]
    script = tmp_path / "cluster.py"
    script.write_text(ON_A_CLUSTER.replace("ARGUMENTS", repr(command)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "ray.parquet: 39 clips, 1 could not be read, width 16, layer 0,2" in done.stdout
    assert "left out: clips/17.wav: " in done.stderr
    # without a cluster, in one process
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"batch_size": 2, "layers": [0, 2], "tokens": True}
    write_embeddings(load("run", device="cpu"), "clips", "here.parquet", **given)
    assert Path("ray.parquet").read_bytes() == Path("here.parquet").read_bytes()


def test_what_goes_wrong_in_a_worker_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export_encoder(tmp_path / "run", build_encoder(SPEECH), SPEECH)
    (tmp_path / "a.wav").write_bytes(b"rubbish")
    (tmp_path / "job.json").write_text("{}")
    for on_bad_clip, bad, error in (("raise", "[]", "a.wav: not a sound"), ("skip", '[["a.wav", "not a sound', "")):
        settings = {"layers": [-1], "window": None, "batch_size": 2, "on_bad_clip": on_bad_clip, "job": {}}
        worker = _Worker("run", ["a.wav"], None, "cpu", "float32", str(tmp_path), str(tmp_path), settings)
        found = worker({"start": np.array([0]), "stop": np.array([1])})
        assert found["error"][0].startswith(error)
        assert found["bad"][0].startswith(bad)
        assert bool(found["error"][0]) == bool(error)


def test_workers_get_stretches_that_begin_where_windows_do() -> None:
    def tasks(*stretches: range, workers: int) -> list[tuple[int, int]]:
        return [(task["start"], task["stop"]) for task in _tasks(stretches, 2, workers)]

    # windows of 32 clips, at least four tasks a worker where there are so many
    assert tasks(range(100), workers=4) == [(0, 32), (32, 64), (64, 96), (96, 100)]
    assert tasks(range(10, 40), range(70, 71), workers=1) == [(10, 32), (32, 40), (70, 71)]
    many = tasks(range(10**6), workers=1)
    assert {stop - start for start, stop in many[:-1]} == {16 * 32}
    assert [start for start, _ in many[1:]] == [stop for _, stop in many[:-1]]


def test_without_ray_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"--engine ray: takes Ray Data: pip install mmssl\[ray\]"):
        on_ray("run", ["clips"], modality=None, device="cpu", precision="float32")
