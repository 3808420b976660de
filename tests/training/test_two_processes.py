"""Two processes against one. What each of the two does stands in toy.py; starting them is dear, so it is done once."""

import json
import socket
from pathlib import Path

import pytest
import torch
from toy import Diverse, Loader, Skipping, Toy, gradient, start


@pytest.mark.processes
def test_two_processes_give_the_gradient_of_one_and_go_on_to_the_bit(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start("rank", tmp_path, RANK=rank, LOCAL_RANK=rank, **together) for rank in (0, 1)]
    for process in processes:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]

    # two processes took two micro-batches of four clips each, whose frames are not equally many
    alone: list[tuple[type[Toy], int, int]] = [(Toy, 4, 4), (Toy, 16, 1), (Skipping, 4, 4), (Diverse, 16, 1)]
    for kind, size, accumulate in alone:
        expected = gradient(tmp_path / f"{kind.__name__}{size}", kind, loader=Loader(size), accumulate=accumulate)
        for own in ranks:
            found = own["gradients"][kind.__name__]
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.allclose(torch.tensor(found[name], dtype=torch.float64), value, rtol=1e-10, atol=1e-14)

    assert ranks[0]["final"] == ranks[1]["final"], "both report the means over both"
    assert [own["resumed"] for own in ranks] == [True, True], "resumed with dropout, both equal the unbroken run"
