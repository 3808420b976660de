"""Two processes against one. What each of the two does stands in toy.py; starting them is dear, so it is done once."""

import json
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import Deep, Diverse, Loader, Skipping, Toy, gradient, start, trained_on

from mmssl.training.checkpoint import read_tensors


@pytest.mark.processes
def test_two_processes_give_the_gradient_of_one_and_go_on_to_the_bit(tmp_path: Path) -> None:
    trained_on(tmp_path / "given", 3, accumulate=2)
    begun = shutil.copytree(tmp_path / "given", tmp_path / "begun")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start("rank", tmp_path, RANK=rank, LOCAL_RANK=rank, **together) for rank in (0, 1)]
    for process in processes:
        said, _ = process.communicate(timeout=480)
        assert process.returncode == 0, said
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]

    # two processes took two micro-batches of four clips each, whose frames are not equally many
    alone: list[tuple[type[Toy], int, int]] = [
        (Toy, 4, 4),
        (Toy, 16, 1),
        (Skipping, 4, 4),
        (Diverse, 16, 1),
        (Deep, 16, 1),
    ]
    for kind, size, accumulate in alone:
        expected = gradient(tmp_path / f"{kind.__name__}{size}", kind, loader=Loader(size), accumulate=accumulate)
        for own in ranks:
            for sharding in ("none", "full"):
                same(own["gradients"][sharding][kind.__name__], expected)
    # which blocks are left out is told by the micro-batches of a process, so that one process leaves out others
    for own in ranks:
        same(own["gradients"]["full"]["Dropping"], own["gradients"]["none"]["Dropping"])

    assert ranks[0]["final"] == ranks[1]["final"], "both report the means over both"
    for name, value in ranks[0]["final"]["none"].items():
        assert ranks[0]["final"]["full"][name] == pytest.approx(value, rel=1e-6)
    assert [own["resumed"] for own in ranks] == [[True, True]] * 2, "resumed with dropout, both equal the unbroken run"

    assert [own["evaluated"] for own in ranks] == [[[4, 8]] * 2] * 2, "what the checkpoint lacks is made up for by both"

    # the first process judges for both, and both end after two evaluations that were no better
    assert [own["best"] for own in ranks] == [[0.5, 1, 0.3], [0.5, 1, 0.3]]

    # of three micro-batches: each of four units (three blocks and the root) exchanges its gradients once; parameters
    # are put together once for the root, once a micro-batch for the last block, once a pass for the other two and for
    # the teacher's three, which have one pass; and once more for one of these, which torch fetches ahead in vain
    assert ranks[0]["exchanges"] == {
        "_reduce_scatter_base_": 3 + 1,
        "_allgather_base_": 1 + 3 * (1 + 2 * 2 + 3 + 1),
        "allreduce_": 1,
    }

    # a run goes from one process to two that share its weights, where it is loaded, saved and exported to the bit
    names = ["checkpoints/step_3/model", "checkpoints/step_3/optimizer", "update_3/encoder", "update_3/objective"]
    for name in names:
        first, again = ((run / f"{name}.safetensors").read_bytes() for run in (begun, tmp_path / "given"))
        assert first == again, name
    # and back
    back = shutil.copytree(tmp_path / "together", tmp_path / "back")
    (back / "checkpoints" / "latest").write_text("step_3\n")
    for run in (begun, back):
        trained_on(run, 6, accumulate=2)
    expected = read_tensors(begun / "checkpoints" / "step_6" / "model.safetensors")
    for run in ("given", "together", "back"):
        # the bias of a key has no gradient but rounding errors, of which Adam makes steps
        same(read_tensors(tmp_path / run / "checkpoints" / "step_6" / "model.safetensors"), expected, atol=1e-9)


def same(found: Mapping[str, Any], expected: Mapping[str, Any], *, atol: float = 1e-14) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        own, other = (torch.as_tensor(x, dtype=torch.float64) for x in (found[name], value))
        single = name.startswith("slow.")  # the precision of a teacher
        assert torch.allclose(own, other, rtol=1e-5 if single else 1e-10, atol=1e-7 if single else atol), name
